//! How Linux speaks of an SMMUv3: `include/uapi/linux/iommufd.h`.

use stagecraft_sdk::{Binding, Error, Extent, Format, InvalidationTarget, Offer, Place, PlaceToBind, RangeEntry, Recipe, TableConfig};

use crate::spec::command;
use crate::spec::registers::{address_size, address_size_code, idr0, idr3, idr5};
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
/// `IOMMU_VIOMMU_TYPE_ARM_SMMUV3`, and `IOMMU_VIOMMU_INVALIDATE_DATA_ARM_SMMUV3`: raw commands.
const VIOMMU_ARM_SMMUV3: u32 = 1;
const INVALIDATE_ARM_SMMUV3: u32 = 1;
/// S1ContextPtr bits that the kernel takes.
const CONTEXT_ADDRESS_BITS: u32 = 52;

/// Only stage 1 can belong to user space: stage 2 is the kernel's own. Hardware marks, LPA2 and what the STE decides are not offered, because the kernel's
/// nesting does not have them.
pub(crate) fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
    if kind != HW_INFO_ARM_SMMUV3 {
        return Err(Error::Unsupported(format!("hardware information of type {kind} is not an SMMUv3's")));
    }
    let words = hw_info(info);
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
        ("hardware-table-access", 0),
        ("lpa", u64::from(address_size(idr5::OAS.of(id5)) == 52)),
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

fn hw_info(info: &[u8]) -> Vec<u64> {
    info.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes).into()).collect()
}

/// A one-entry CD table at the context address, and the STE words that point to it.
pub(crate) fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
    let context_address = to.context_address;
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
    let unit = hw_info(&to.info);
    let unit = |word: usize| unit.get(2 + word).copied().unwrap_or(0);
    // Without 16-bit ASIDs the upper half must be zero (section 5.4).
    let widest = if to.info.is_empty() || idr0::ASID16.of(unit(0)) == 1 { 0xffff } else { 0xff };
    if to.space > widest {
        return Err(Error::invalid("space", to.space.into(), "IHI 0070 section 5.4, ASID", &format!("ASIDs of this unit go up to {widest:#x}")));
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
    Ok(Binding {
        kind: HWPT_DATA_ARM_SMMUV3,
        data: bytes(&entry[..2]),
        context: bytes(&context(&stage1, to.space)),
        viommu: Some(VIOMMU_ARM_SMMUV3),
        pasids: false,
        invalidation: Some(recipe(&stage1, to, idr3::RIL.of(unit(3)) == 1)),
    })
}

/// TLBI commands, as the kernel checks them: fields that do not count are zero, and the VMID is the kernel's to fill in. With a granule, TTL, NUM and SCALE
/// must not all be zero, so that one page is a command without a granule. What is for single addresses also drops global entries; what is for an ASID does not.
fn recipe(stage1: &Stage1, to: &PlaceToBind, ranges: bool) -> Recipe {
    let asid = command::ASID.put(to.space.into());
    let granules: Vec<u8> = [stage1.low.as_ref(), stage1.high.as_ref()].into_iter().flatten().map(|half| half.granule.log2()).collect();
    let granule = granules.iter().copied().min().unwrap_or(12);
    // A range is in granules of the table: two halves that differ have no common one.
    let ranges = ranges && granules.iter().all(|other| *other == granule);
    let place = |word: u8, (lsb, width): (u8, u8)| Place { word, lsb, width, number_lsb: 0 };
    let range = RangeEntry {
        words: vec![command::NH_VA | asid, command::TG.put(u64::from(granule - 10) / 2)],
        extent: Extent::Scaled { number: place(0, command::NUM), scale: place(0, command::SCALE) },
    };
    Recipe {
        data_type: INVALIDATE_ARM_SMMUV3,
        target: InvalidationTarget::Viommu,
        page_log2: granule,
        page: vec![command::NH_VA | asid, 0],
        address: Place { word: 1, lsb: granule, width: 64 - granule, number_lsb: granule },
        range: ranges.then_some(range),
        leaf: vec![0, command::LEAF],
        tables: Some(vec![0, 0]),
        everything: if to.host_made { vec![command::NH_ASID | asid, 0] } else { vec![command::NH_ALL, 0] },
        most: MOST_COMMANDS,
    }
}

/// The queue of a unit may be short, and a command takes its time: Linux itself gives up single pages at one table's worth of them.
const MOST_COMMANDS: u32 = 512;

/// Cacheability of structures and walks: write-back, read- and write-allocate.
const WRITE_BACK: u64 = 1;
/// Shareability of structures and walks.
const INNER_SHAREABLE: u64 = 3;

/// The CD that says what `stage1` says, under the host's number for it.
fn context(stage1: &Stage1, space: u32) -> Words {
    let mut words: Words = [0; 8];
    let mut set = |slot: crate::spec::Slot, value: u64| slot.set(&mut words, value);
    set(cd::V, 1);
    set(cd::AA64, 1);
    set(cd::R, 1);
    set(cd::A, 1);
    set(cd::ASET, 1);
    set(cd::ASID, space.into());
    set(cd::IPS, address_size_code(stage1.output_bits));
    set(cd::ENDI, stage1.big_endian.into());
    set(cd::HA, stage1.hardware.access.into());
    set(cd::HD, stage1.hardware.dirty.into());
    set(cd::AFFD, stage1.hardware.access_flag_disabled.into());
    set(cd::HAFT, stage1.hardware.tables.into());
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
