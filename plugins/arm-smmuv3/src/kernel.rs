//! How Linux speaks of an SMMUv3: `include/uapi/linux/iommufd.h`.

use stagecraft_sdk::{Binding, Error, Format, Offer, TableConfig};

use crate::spec::registers::{address_size, address_size_code, idr0, idr5};
use crate::spec::{Words, cd, ste};
use crate::{Stage1, Stage2};

/// `IOMMU_HW_INFO_TYPE_ARM_SMMUV3`.
const HW_INFO_ARM_SMMUV3: u32 = 2;
/// `struct iommu_hw_info_arm_smmuv3`: flags, reserved, idr\[6\], iidr, aidr; 32 bits each.
const HW_INFO_WORDS: usize = 10;
/// `IOMMU_HW_INFO_ARM_SMMUV3_ERRATA_REPEAT_TLBI_CFGI` of its flags.
const ERRATUM_REPEAT: u64 = 1;
/// `IOMMU_HWPT_DATA_ARM_SMMUV3`.
const HWPT_DATA_ARM_SMMUV3: u32 = 2;
/// S1ContextPtr bits that the kernel takes.
const CONTEXT_ADDRESS_BITS: u32 = 52;

/// Only stage 1 can belong to user space: stage 2 is the kernel's own. Hardware marks, LPA2 and what the STE decides are not offered, because the kernel's
/// nesting does not have them.
pub(crate) fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
    if kind != HW_INFO_ARM_SMMUV3 {
        return Err(Error::Unsupported(format!("hardware information of type {kind} is not an SMMUv3's")));
    }
    let words: Vec<u64> = info.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes).into()).collect();
    if words.len() < HW_INFO_WORDS {
        return Err(Error::invalid("info", info.len() as u64, "iommu_hw_info_arm_smmuv3", "must have 40 bytes"));
    }
    let (id0, id5) = (words[2], words[7]);
    let endian = idr0::TTENDIAN.of(id0);
    // Stage 1 can only belong to user space where stage 2 is the kernel's.
    if idr0::S1P.of(id0) == 0 || idr0::S2P.of(id0) == 0 || idr0::TTF.of(id0) & 2 == 0 || endian == 3 {
        return Ok(Vec::new());
    }
    let granules = [(idr5::GRAN4K, 4096), (idr5::GRAN16K, 16384), (idr5::GRAN64K, 65536)];
    let granule: u64 = granules.iter().filter(|(field, _)| field.of(id5) != 0).map(|(_, bytes)| bytes).sum();
    let wide = idr5::VAX.of(id5) != 0 && idr5::GRAN64K.of(id5) != 0;
    let input_bits = if wide { 52 } else { 48 };
    let limits = [
        ("granule", granule),
        ("granule-high", granule),
        ("input-bits", input_bits),
        ("input-bits-high", input_bits),
        ("output-bits", address_size(idr5::OAS.of(id5)).into()),
        ("big-endian", u64::from(endian == 0)),
        ("hardware-access", 0),
        ("hardware-dirty", 0),
        ("lpa2", 0),
        ("privileged", 0),
        ("single-privilege", 0),
    ];
    let limits = limits.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let mut conditions = Vec::new();
    if words[0] & ERRATUM_REPEAT != 0 {
        conditions.push("an erratum makes the kernel issue invalidations twice".to_owned());
    }
    if idr0::COHACC.of(id0) == 0 {
        conditions.push("walks do not snoop: tables must be written back from the processors' caches".to_owned());
    }
    Ok(vec![Offer { format: Stage1::NAME.to_owned(), limits, conditions }])
}

/// A one-entry CD table at `context_address`, and the STE words that point to it.
pub(crate) fn bind_data(table: &TableConfig, context_address: u64) -> Result<Binding, Error> {
    if table.format == Stage2::NAME {
        return Err(Error::Unsupported("the kernel nests stage 1 tables only; stage 2 is its own".to_owned()));
    }
    if table.format != Stage1::NAME {
        return Err(Error::Unsupported(format!("this plugin has no table format `{}`", table.format)));
    }
    let stage1 = Stage1::open(&table.settings)?;
    if stage1.privileged || stage1.single_privilege {
        return Err(Error::Unsupported("the kernel does not take PRIVCFG or STRW from a nested stream table entry".to_owned()));
    }
    if !context_address.is_multiple_of(64) || context_address >> CONTEXT_ADDRESS_BITS != 0 {
        let reason = "must be a multiple of 64 below 2^52";
        return Err(Error::invalid("context-address", context_address, "IHI 0070 section 5.2, S1ContextPtr", reason));
    }
    let mut entry: Words = [0; 8];
    ste::V.set(&mut entry, 1);
    ste::CONFIG.set(&mut entry, 0b101);
    ste::S1CONTEXTPTR.set_in_place(&mut entry, context_address);
    ste::S1DSS.set(&mut entry, 2);
    ste::S1CIR.set(&mut entry, WRITE_BACK);
    ste::S1COR.set(&mut entry, WRITE_BACK);
    ste::S1CSH.set(&mut entry, INNER_SHAREABLE);
    let bytes = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
    Ok(Binding { kind: HWPT_DATA_ARM_SMMUV3, data: bytes(&entry[..2]), context: bytes(&context(&stage1)) })
}

/// Cacheability of structures and walks: write-back, read- and write-allocate.
const WRITE_BACK: u64 = 1;
/// Shareability of structures and walks.
const INNER_SHAREABLE: u64 = 3;

/// The CD that says what `stage1` says.
fn context(stage1: &Stage1) -> Words {
    let mut words: Words = [0; 8];
    let mut set = |slot: crate::spec::Slot, value: u64| slot.set(&mut words, value);
    set(cd::V, 1);
    set(cd::AA64, 1);
    set(cd::R, 1);
    set(cd::A, 1);
    set(cd::ASET, 1);
    set(cd::ASID, stage1.asid.into());
    set(cd::IPS, address_size_code(stage1.output_bits));
    set(cd::ENDI, stage1.big_endian.into());
    set(cd::HA, stage1.hardware.access.into());
    set(cd::HD, stage1.hardware.dirty.into());
    set(cd::AFFD, stage1.hardware.access_flag_disabled.into());
    set(cd::WXN, stage1.wxn.into());
    set(cd::PAN, stage1.pan.into());
    set(cd::DS, stage1.lpa2.into());
    set(cd::MAIR, stage1.mair);
    // Shareability of the walk is that of the leaves with LPA2.
    let shareability = |non_shareable: bool| if stage1.lpa2 && non_shareable { 0 } else { INNER_SHAREABLE };
    match stage1.low {
        None => set(cd::EPD0, 1),
        Some(low) => {
            set(cd::T0SZ, 64 - u64::from(low.input_bits));
            set(cd::TG0, cd::granule0_code(low.granule.log2()));
            set(cd::IR0, WRITE_BACK);
            set(cd::OR0, WRITE_BACK);
            set(cd::SH0, shareability(low.non_shareable));
            set(cd::TBI0, low.top_byte_ignored.into());
            set(cd::HAD0, low.hierarchy_disabled.into());
            set(cd::E0PD0, low.unprivileged_disabled.into());
            set(cd::TTB0, low.root >> 4);
        }
    }
    match stage1.high {
        None => set(cd::EPD1, 1),
        Some(high) => {
            set(cd::T1SZ, 64 - u64::from(high.input_bits));
            set(cd::TG1, cd::granule1_code(high.granule.log2()));
            set(cd::IR1, WRITE_BACK);
            set(cd::OR1, WRITE_BACK);
            set(cd::SH1, shareability(high.non_shareable));
            set(cd::TBI1, high.top_byte_ignored.into());
            set(cd::HAD1, high.hierarchy_disabled.into());
            set(cd::E0PD1, high.unprivileged_disabled.into());
            set(cd::TTB1, high.root >> 4);
        }
    }
    words
}
