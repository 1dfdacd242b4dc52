//! Real units: what the kernel says that they can do, and how it is told about a guest's table.

use stagecraft_sdk::bits::bit;
use stagecraft_sdk::{Binding, Error, Extent, Format, InvalidationTarget, Offer, Place, PlaceToBind, RangeEntry, Recipe, TableConfig};

use crate::ADDRESS_BITS;
use crate::spec::device_table::{DOMAIN_ID, GIOV, GUEST_PAGING_MODE, GV, IR, IW, TV, V, gcr3, gcr3_words};
use crate::spec::registers::{efr, efr2};
use crate::v2::V2;

/// `iommu_hw_info` data type, and the size of its data: the two extended feature registers.
const HW_INFO_AMD: u32 = 4;
const HW_INFO_BYTES: usize = 16;
/// `iommu_hwpt_data_type`: a device table entry.
const HWPT_DATA_AMD_GUEST: u32 = 3;
/// Linux 7.3 has neither a vIOMMU nor invalidations for AMD-Vi, and takes any number for the first. These are Stagecraft's own ("SG"), for kernels that do: raw
/// commands, aimed at the vIOMMU.
const VIOMMU_AMD: u32 = 0x5347_0001;
const INVALIDATE_AMD: u32 = 0x5347_0001;

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
    let conditions =
        vec!["the kernel must take invalidations of such a table, which Linux 7.3 does not: else nothing that was mapped can be changed".to_owned()];
    Ok(vec![Offer { format: V2::NAME.to_owned(), limits, conditions }])
}

/// `struct iommu_hwpt_amd_guest`: a device table entry with the guest's part only, for requests without PASID. The context is a guest CR3 table with
/// PASID 0 in it and nothing else: 4 KiB.
pub(crate) fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
    let context_address = to.context_address;
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
    if to.space > 0xffff {
        return Err(Error::invalid("space", to.space.into(), "48882 section 2.2.2, DomainID", "domain ids have 16 bits"));
    }
    let [low, high] = gcr3_words(context_address);
    let entry = [V | TV | GIOV | GV | IR | IW | low, DOMAIN_ID.put(to.space.into()) | high, GUEST_PAGING_MODE.put(levels - 4), 0];
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>();
    let mut context = bytes(&[root | gcr3::V]);
    context.resize(gcr3::ENTRIES as usize * 8, 0);
    let invalidation = Some(recipe(to.space));
    Ok(Binding { kind: HWPT_DATA_AMD_GUEST, data: bytes(&entry), context, viommu: Some(VIOMMU_AMD), pasids: false, invalidation })
}

/// INVALIDATE_IOMMU_PAGES of PASID 0 in the domain, section 2.4.3. With S the address codes the size of a block; all ones up to bit 62 is everything.
fn recipe(space: u32) -> Recipe {
    const PAGES: u64 = 3 << 60;
    const S: u64 = bit(0);
    const PDE: u64 = bit(1);
    const GN: u64 = bit(2);
    let low = PAGES | u64::from(space) << 32;
    Recipe {
        data_type: INVALIDATE_AMD,
        target: InvalidationTarget::Viommu,
        page_log2: 12,
        page: vec![low, GN],
        address: Place { word: 1, lsb: 12, width: 52, number_lsb: 12 },
        range: Some(RangeEntry { words: vec![low, GN | S], extent: Extent::Block }),
        leaf: vec![0, 0],
        tables: Some(vec![0, PDE]),
        everything: vec![low, GN | PDE | S | 0x7fff_ffff_ffff_f000],
        most: 256,
    }
}
