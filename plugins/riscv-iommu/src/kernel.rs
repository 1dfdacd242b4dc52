//! Real units: what a kernel says that they can do, and how it is told about a guest's table.
//!
//! Linux 7.3 says nothing of RISC-V units and nests nothing there. The numbers here are Stagecraft's own ("SG"), for kernels that do: what iommufd has for
//! other architectures, in this one's words.

use stagecraft_sdk::bits::{bit, words};
use stagecraft_sdk::{Binding, Error, Format, InvalidationTarget, Offer, Place, PlaceToBind, Recipe, TableConfig};

use crate::first_stage::FirstStage;
use crate::spec::registers::capabilities;
use crate::spec::structures::{atp, ta, tc};

/// An `iommu_hw_info` data type: the `capabilities` register.
const HW_INFO_RISCV: u32 = 0x5347_0001;
/// An `iommu_hwpt_data_type`: `tc`, `ta` and `fsc` of a device context.
const HWPT_DATA_RISCV: u32 = 0x5347_0001;
/// An `iommu_viommu_type`, and an `iommu_hwpt_invalidate_data_type`: raw commands.
const VIOMMU_RISCV: u32 = 0x5347_0002;
const INVALIDATE_RISCV: u32 = 0x5347_0002;
/// PSCIDs have 20 bits.
const WIDEST_SPACE: u32 = 0xf_ffff;

/// First stages of the unit. Second stages are the kernel's own, and requests with a process id are not offered.
pub(crate) fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
    if kind != HW_INFO_RISCV {
        return Err(Error::Unsupported(format!("hardware information of type {kind} is not a RISC-V IOMMU's")));
    }
    let Some(&unit) = words(info).first() else {
        return Err(Error::invalid("info", info.len() as u64, "", "a RISC-V IOMMU's hardware information has 8 bytes"));
    };
    let modes = [capabilities::SV57, capabilities::SV48, capabilities::SV39];
    let second = [capabilities::SV57X4, capabilities::SV48X4, capabilities::SV39X4];
    let Some(levels) = (3..=5).rev().zip(modes).find(|(_, mode)| mode.of(unit) == 1).map(|(levels, _)| levels) else { return Ok(Vec::new()) };
    // The output of a first stage is the input of the second, which has two bits more than the first one's half.
    let Some(output) = [59, 50, 41].into_iter().zip(second).find(|(_, mode)| mode.of(unit) == 1).map(|(bits, _)| bits) else {
        return Ok(Vec::new());
    };
    let limits = [
        ("levels", levels),
        ("output-bits", output.min(crate::entries::WIDEST_OUTPUT)),
        ("svnapot", 1),
        ("svpbmt", capabilities::SVPBMT.of(unit)),
        ("svrsw60t59b", capabilities::SVRSW60T59B.of(unit)),
        ("hardware-update", capabilities::AMO_HWAD.of(unit)),
        ("big-endian", capabilities::END.of(unit)),
        ("supervisor", 0),
        ("sum", 0),
    ];
    let limits = limits.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    Ok(vec![Offer { format: FirstStage::NAME.to_owned(), limits, conditions: Vec::new() }])
}

/// Three words of a device context for requests without a process id (IOMMU section 2.1.3). There is no structure besides.
pub(crate) fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
    if table.format != FirstStage::NAME {
        return Err(Error::Unsupported(format!("no kernel nests tables of format `{}` on a RISC-V IOMMU", table.format)));
    }
    let settings = &table.settings;
    let levels = FirstStage::open(settings)?.levels().len() as u64;
    let root = settings.get("root").ok_or_else(|| Error::invalid("root", 0, "", "the table has no address yet"))?;
    if levels == 2 || settings.flag("supervisor", false)? {
        return Err(Error::Unsupported("requests without a process id have neither Sv32 nor supervisor privilege here".to_owned()));
    }
    if to.space > WIDEST_SPACE {
        return Err(Error::invalid("space", to.space.into(), "RISC-V IOMMU 1.0 section 2.1.3.3, PSCID", "PSCIDs have 20 bits"));
    }
    let flag = |name: &'static str, bit: u64| settings.flag(name, false).map(|set| if set { bit } else { 0 });
    let control = tc::V | flag("hardware-update", tc::SADE)? | flag("big-endian", tc::SBE)?;
    let mode = atp::MODE.put(levels - 3 + atp::FEWEST_LEVELS);
    let data: [u64; 3] = [control, ta::PSCID.put(to.space.into()), mode | atp::PPN.put(root >> 12)];
    Ok(Binding {
        kind: HWPT_DATA_RISCV,
        data: data.iter().flat_map(|word| word.to_le_bytes()).collect(),
        context: Vec::new(),
        viommu: Some(VIOMMU_RISCV),
        pasids: false,
        invalidation: Some(recipe(to)),
    })
}

/// IOTINVAL.VMA, IOMMU section 3.1.1. With an address only what is cached of leaves goes, unless the unit has NL. With a PSCID global entries stay: what a
/// guest built may have some, so that its addresses are dropped of all address spaces of the vIOMMU.
fn recipe(to: &PlaceToBind) -> Recipe {
    const IOTINVAL_VMA: u64 = 1;
    const AV: u64 = bit(10);
    const PSCV: u64 = bit(32);
    const NL: u64 = bit(34);
    let of_space = if to.host_made { IOTINVAL_VMA | PSCV | ta::PSCID.put(to.space.into()) } else { IOTINVAL_VMA };
    let unit = words(&to.info).first().copied().unwrap_or(0);
    Recipe {
        data_type: INVALIDATE_RISCV,
        target: InvalidationTarget::Viommu,
        page_log2: 12,
        page: vec![of_space | AV, 0],
        address: Place { word: 1, lsb: 10, width: 52, number_lsb: 12 },
        range: None,
        leaf: vec![0, 0],
        tables: (capabilities::NL.of(unit) == 1).then(|| vec![NL, 0]),
        everything: vec![of_space, 0],
        most: 256,
    }
}
