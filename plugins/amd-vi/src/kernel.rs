//! Real units: what the kernel says that they can do, and how it is told about a guest's table.

use stagecraft_sdk::{Binding, Error, Format, Offer, TableConfig};

use crate::ADDRESS_BITS;
use crate::spec::device_table::{GIOV, GUEST_PAGING_MODE, GV, IR, IW, TV, V, gcr3, gcr3_words};
use crate::spec::registers::{efr, efr2};
use crate::v2::V2;

/// `iommu_hw_info` data type, and the size of its data: the two extended feature registers.
const HW_INFO_AMD: u32 = 4;
const HW_INFO_BYTES: usize = 16;
/// `iommu_hwpt_data_type`: a device table entry.
const HWPT_DATA_AMD_GUEST: u32 = 3;

/// Only guest tables can be a user's own; host tables belong to the kernel, which builds them from map and unmap. It nests on units that
/// take requests without PASID through a guest table, and find the guest CR3 table by its guest-physical address.
pub(crate) fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
    if kind != HW_INFO_AMD {
        return Err(Error::Unsupported(format!("hardware information of type {kind} is not AMD-Vi's")));
    }
    let words = info.get(..HW_INFO_BYTES).map(stagecraft_sdk::bits::words);
    let Some(&[features, features2]) = words.as_deref() else {
        return Err(Error::invalid("info", info.len() as u64, "", "AMD-Vi's hardware information has 16 bytes"));
    };
    let nests = efr::GT_SUP.of(features) == 1 && efr::GIO_SUP.of(features) == 1 && efr2::GCR3_TRP_MODE.of(features2) == 1;
    if !nests || efr::HATS.of(features) == efr::NO_HOST_TABLES {
        return Ok(Vec::new());
    }
    let limits = [
        ("levels", if efr::GATS.of(features) == 1 { 5 } else { 4 }),
        ("output-bits", ADDRESS_BITS),
        ("sign-extended", 0),
        ("page-1g", 1),
        ("no-execute", efr::NX_SUP.of(features)),
        ("privileged", 0),
        ("read", 1),
        ("write", 1),
        ("update-accessed", 1),
        ("update-dirty", 1),
    ];
    let limits = limits.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    // Linux 7.3: there is no data type of IOMMU_HWPT_INVALIDATE for AMD-Vi, and no vIOMMU.
    let conditions = vec!["the kernel takes no invalidations of such a table: nothing that was mapped can be changed while it is in use".to_owned()];
    Ok(vec![Offer { format: V2::NAME.to_owned(), limits, conditions }])
}

/// `struct iommu_hwpt_amd_guest`: a device table entry with the guest's part only, for requests without PASID. The context is a guest CR3 table with
/// PASID 0 in it and nothing else: 4 KiB.
pub(crate) fn bind_data(table: &TableConfig, context_address: u64) -> Result<Binding, Error> {
    if table.format != V2::NAME {
        return Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on AMD-Vi", table.format)));
    }
    let settings = &table.settings;
    let levels = V2::open(settings)?.levels().len() as u64;
    let root = settings.get("root").ok_or_else(|| Error::invalid("root", 0, "", "the table has no address yet"))?;
    if settings.flag("sign-extended", true)? {
        return Err(Error::Unsupported("requests without PASID have no upper half: sign-extended must be 0".to_owned()));
    }
    if settings.flag("privileged", false)? {
        return Err(Error::Unsupported("no requests without PASID are privileged: privileged must be 0".to_owned()));
    }
    for name in ["read", "write", "update-accessed", "update-dirty"] {
        if !settings.flag(name, true)? {
            return Err(Error::Unsupported(format!("the kernel does not take it from a guest: {name} must be 1")));
        }
    }
    if context_address & 0xfff != 0 || context_address == 0 || context_address >> ADDRESS_BITS != 0 {
        let reason = "must be a multiple of 4096 below 2^52, and not 0";
        return Err(Error::invalid("context-address", context_address, "48882 section 2.2.2, GCR3 Table Root Pointer", reason));
    }
    let [low, high] = gcr3_words(context_address);
    let entry = [V | TV | GIOV | GV | IR | IW | low, high, GUEST_PAGING_MODE.put(levels - 4), 0];
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut context = bytes(&[root | gcr3::V]);
    context.resize(gcr3::ENTRIES as usize * 8, 0);
    Ok(Binding { kind: HWPT_DATA_AMD_GUEST, data: bytes(&entry), context })
}
