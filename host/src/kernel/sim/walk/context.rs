//! From what a nested page table was made from, and the context structures in memory that it names, to one address space.
//!
//! VT-d has none: the table is in the data. SMMUv3 has context descriptors, AMD a GCR3 table, RISC-V a process directory; they are read through the
//! parent, and what they said is remembered by device and PASID until a command for just that is given (CFGI_CD, INVALIDATE_IOMMU_PAGES of a PASID,
//! IODIR.INVAL_PDT).

use std::sync::Arc;

use super::super::cache::Space;
use super::super::fault::{Reason, Stage};
use super::super::unit::UnitKind;
use super::{Failed, Format, Reach, arm, riscv, x86};

/// What a nested page table was made from, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct FirstStage {
    /// The nested page table (VT-d) or the vIOMMU: whose tags they are.
    pub(in super::super) owner: u64,
    pub(in super::super) data: Data,
}

/// In the words of the architectures.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Data {
    /// `struct iommu_hwpt_vtd_s1`.
    Vtd { flags: u64, root: u64, width: u32 },
    /// Two words of an STE.
    Smmu { ste: [u64; 2] },
    /// Four words of a device table entry.
    Amd { dte: [u64; 4] },
    /// tc, ta and fsc of a device context.
    Riscv { tc: u64, ta: u64, fsc: u64 },
}

/// `IOMMU_VTD_S1_EAFE`.
const VTD_EAFE: u64 = 2;

impl Data {
    /// Whether requests with a PASID use this too, without an attachment of their own.
    pub(in super::super) fn has_pasids(&self) -> bool {
        match self {
            Self::Vtd { .. } => false,
            Self::Smmu { ste } => ste[0] >> 59 != 0,
            Self::Amd { .. } => true,
            Self::Riscv { tc, .. } => tc & riscv_tc::PDTV != 0,
        }
    }
}

/// What a stream's DMA gets.
#[derive(Clone, Debug)]
pub(in super::super) enum Context {
    /// The IOVA is what the parent translates.
    Bypass,
    /// Tables.
    Tables { space: Space, format: Format },
}

fn context(reason: Reason) -> Failed {
    Failed { reason, stage: Stage::Context, level: None }
}

/// The context of a stream, remembered or read.
pub(in super::super) fn resolve(reach: Reach<'_>, first: &FirstStage, device: u64, pasid: Option<u32>) -> Result<Arc<Context>, Failed> {
    let caches = &reach.unit().caches;
    let cached = !matches!(first.data, Data::Vtd { .. });
    // While a device is put on another page table, what was remembered of the one before is not mixed with it: the entry that both hang on is one word to hardware.
    if cached && let Some(context) = caches.context((device, pasid), first) {
        return Ok(context);
    }
    let found = Arc::new(match &first.data {
        Data::Vtd { flags, root, width } => vtd(reach, first.owner, pasid, (*flags, *root, *width)),
        Data::Smmu { ste } => smmu(reach, first.owner, pasid, *ste)?,
        Data::Amd { dte } => amd(reach, first.owner, pasid, dte)?,
        Data::Riscv { tc, ta, fsc } => riscv(reach, first.owner, pasid, (*tc, *ta, *fsc))?,
    });
    if cached {
        caches.insert_context((device, pasid), first, &found)?;
    }
    Ok(found)
}

fn vtd(reach: Reach<'_>, owner: u64, pasid: Option<u32>, (flags, root, width): (u64, u64, u32)) -> Context {
    let large_1g = matches!(reach.unit().config.kind, UnitKind::Vtd { cap, .. } if cap & 1 << 56 != 0);
    let format = Format::X86(x86::X86 {
        root,
        levels: if width == 57 { 5 } else { 4 },
        address_bits: 52,
        large_1g,
        extended_accessed: flags & VTD_EAFE != 0,
        interrupts_refused: true,
        without_upper_half: false,
    });
    Context::Tables { space: Space { owner, domain: 0, tag: pasid.unwrap_or(0) }, format }
}

/// IHI 0070 sections 5.2 (STE), 5.3 (L1CD) and 5.4 (CD).
fn smmu(reach: Reach<'_>, owner: u64, pasid: Option<u32>, ste: [u64; 2]) -> Result<Context, Failed> {
    match (ste[0] & 1 != 0, (ste[0] >> 1) & 7) {
        (true, 5) => {}
        (true, 4) if pasid.is_none() => return Ok(Context::Bypass),
        (true, 4) => return Err(context(Reason::Pasid)),
        _ => return Err(context(Reason::Abort)),
    }
    let substreams = ste[0] >> 59;
    let index = match (pasid, substreams, ste[1] & 3) {
        (None, 0, _) => 0,
        (Some(_), 0, _) => return Err(context(Reason::Pasid)),
        (Some(pasid), ..) if u64::from(pasid) >> substreams != 0 => return Err(context(Reason::Pasid)),
        // S1DSS: without a substream the request is terminated, bypasses, or has CD 0 to itself.
        (Some(0), _, 2) => return Err(context(Reason::Pasid)),
        (Some(pasid), ..) => u64::from(pasid),
        (None, _, 1) => return Ok(Context::Bypass),
        (None, _, 2) => 0,
        (None, ..) => return Err(context(Reason::Pasid)),
    };
    let mut table = ste[0] & 0x000f_ffff_ffff_ffc0;
    // S1Fmt: linear, or leaf tables of 64 or 1024 CDs.
    let place = match (substreams != 0, (ste[0] >> 4) & 3) {
        (false, _) | (true, 0) => index,
        (true, format @ (1 | 2)) => {
            let split = if format == 1 { 6 } else { 10 };
            let descriptor = reach.load(table + (index >> split) * 8)?;
            if descriptor & 1 == 0 {
                return Err(context(Reason::Context));
            }
            table = descriptor & 0x000f_ffff_ffff_f000;
            index & ((1 << split) - 1)
        }
        _ => return Err(context(Reason::Context)),
    };
    let mut cd = [0; 4];
    for (word, value) in (0..).zip(&mut cd) {
        *value = reach.load(table + place * 64 + word * 8)?;
    }
    let UnitKind::Smmuv3 { idr, .. } = reach.unit().config.kind else { return Err(context(Reason::Context)) };
    let arm = descriptor(&cd, &idr).ok_or(context(Reason::Context))?;
    let tag = u32::try_from(cd[0] >> 48).unwrap_or(0);
    Ok(Context::Tables { space: Space { owner, domain: 0, tag }, format: Format::Arm(arm) })
}

/// A context descriptor; none if it is not valid.
fn descriptor(cd: &[u64; 4], idr: &[u32; 6]) -> Option<arm::Arm> {
    let bit = |word: usize, position: u32| cd[word] & 1 << position != 0;
    // V 31, AA64 41.
    if !bit(0, 31) || !bit(0, 41) {
        return None;
    }
    // IDR0.HTTU: 1 the access flag, 2 dirty state too. HA 43, HD 42.
    let httu = (idr[0] >> 6) & 3;
    let (hardware_access, hardware_dirty) = (bit(0, 43), bit(0, 42));
    if hardware_access && httu == 0 || hardware_dirty && (httu < 2 || !hardware_access) {
        return None;
    }
    let lpa2 = bit(2, 58) && idr[5] & 1 << 7 != 0;
    let largest = output_bits(u64::from(idr[5] & 7))?;
    // IPS 34:32, capped by IDR5.OAS. Without 64K pages or DS an address has 48 bits.
    let size = output_bits((cd[0] >> 32) & 7)?.min(largest);
    let half = |which: u32| -> Result<Option<arm::Half>, ()> {
        let base = 16 * which;
        // EPD0 14, EPD1 30.
        if bit(0, 14 + base) {
            return Ok(None);
        }
        // TG0: 4K, 64K, 16K; TG1: reserved, 16K, 4K, 64K.
        let page_log2 = match (which, (cd[0] >> (6 + base)) & 3) {
            (0, 0) | (1, 2) => 12,
            (0, 1) | (1, 3) => 16,
            (0, 2) | (1, 1) => 14,
            _ => return Err(()),
        };
        let wide = lpa2 && page_log2 != 16 || page_log2 == 16 && (idr[5] >> 10) & 3 != 0;
        let input_bits = 64 - u8::try_from((cd[0] >> base) & 0x3f).map_err(|_| ())?;
        if !(25..=if wide { 52 } else { 48 }).contains(&input_bits) {
            return Err(());
        }
        let word = 1 + which as usize;
        Ok(Some(arm::Half {
            root: cd[word] & 0x000f_ffff_ffff_fff0,
            page_log2,
            input_bits,
            top_byte_ignored: bit(0, 38 + which),
            hierarchy_disabled: bit(word, 1),
        }))
    };
    let halves = [half(0).ok()?, half(1).ok()?];
    // Both halves share the output size in the formats that matter here: 52 bits need 64K pages or DS.
    let wide = lpa2 || halves.iter().flatten().any(|half| half.page_log2 == 16);
    Some(arm::Arm {
        halves,
        output_bits: if wide { size } else { size.min(48) },
        lpa: largest == 52,
        lpa2,
        hardware_access,
        hardware_dirty,
        access_flag_disabled: bit(0, 35),
        big_endian: bit(0, 15),
    })
}

fn output_bits(code: u64) -> Option<u8> {
    [32, 36, 40, 42, 44, 48, 52].get(usize::try_from(code).ok()?).copied()
}

/// AMD IOMMU sections 2.2.2.1 (DTE) and 2.2.6 (GCR3 tables).
fn amd(reach: Reach<'_>, owner: u64, pasid: Option<u32>, dte: &[u64; 4]) -> Result<Context, Failed> {
    // GIoV 54: requests without a PASID are PASID 0's; otherwise the guest's tables are not for them.
    let index = match pasid {
        Some(pasid) => u64::from(pasid),
        None if dte[0] & 1 << 54 != 0 => 0,
        None => return Ok(Context::Bypass),
    };
    // The GCR3 table's address is in three pieces.
    let mut table = ((dte[0] >> 58) & 7) << 12 | ((dte[1] >> 16) & 0xffff) << 15 | (dte[1] >> 43) << 31;
    let levels = (dte[0] >> 56) & 3;
    if levels == 3 || index >> (9 * (levels + 1)).min(20) != 0 {
        return Err(context(Reason::Pasid));
    }
    let mut root = 0;
    for level in (0..=levels).rev() {
        root = reach.load(table + ((index >> (9 * level)) & 0x1ff) * 8)?;
        if root & 1 == 0 {
            return Err(context(Reason::Context));
        }
        table = root & 0x000f_ffff_ffff_f000;
    }
    // GuestPagingMode 55:54 of the third word.
    let levels = match (dte[2] >> 54) & 3 {
        0 => 4,
        1 => 5,
        _ => return Err(context(Reason::Context)),
    };
    let format = Format::X86(x86::X86 {
        root,
        levels,
        address_bits: 52,
        large_1g: true,
        extended_accessed: false,
        interrupts_refused: false,
        without_upper_half: index == 0,
    });
    let domain = u16::try_from(dte[1] & 0xffff).unwrap_or(0);
    Ok(Context::Tables { space: Space { owner, domain, tag: u32::try_from(index).unwrap_or(0) }, format })
}

/// Bits of `tc` (RISC-V IOMMU section 3.1.3.1).
pub(in super::super) mod riscv_tc {
    pub(in super::super::super) const V: u64 = 1;
    pub(in super::super::super) const PDTV: u64 = 1 << 5;
    pub(in super::super::super) const SADE: u64 = 1 << 8;
    pub(in super::super::super) const DPE: u64 = 1 << 9;
    pub(in super::super::super) const SBE: u64 = 1 << 10;
}

/// RISC-V IOMMU sections 3.1 (device context), 3.2 and 3.3 (process directory and context).
fn riscv(reach: Reach<'_>, owner: u64, pasid: Option<u32>, (tc, ta, fsc): (u64, u64, u64)) -> Result<Context, Failed> {
    let (mut ta, mut fsc) = (ta, fsc);
    match (tc & riscv_tc::PDTV != 0, pasid) {
        (false, None) => {}
        (false, Some(_)) => return Err(context(Reason::Pasid)),
        // DPE: no process id is process 0.
        (true, None) if tc & riscv_tc::DPE == 0 => return Ok(Context::Bypass),
        (true, pasid) => (ta, fsc) = process(reach, fsc, pasid.unwrap_or(0))?,
    }
    let levels = match fsc >> 60 {
        0 => return Ok(Context::Bypass),
        mode @ 8..=10 => u8::try_from(mode - 5).unwrap_or(3),
        _ => return Err(context(Reason::Context)),
    };
    let UnitKind::Riscv { capabilities } = reach.unit().config.kind else { return Err(context(Reason::Context)) };
    // Sv39, Sv48, Sv57 are bits 9, 10, 11.
    if capabilities >> (6 + levels) & 1 == 0 {
        return Err(context(Reason::Context));
    }
    let format = Format::Riscv(riscv::Riscv {
        root: (fsc & 0xfff_ffff_ffff) << 12,
        levels,
        address_bits: u8::try_from((capabilities >> 32) & 0x3f).unwrap_or(56),
        hardware_updates: tc & riscv_tc::SADE != 0,
        memory_types: capabilities & 1 << 15 != 0,
        big_endian: tc & riscv_tc::SBE != 0,
    });
    Ok(Context::Tables { space: Space { owner, domain: 0, tag: u32::try_from((ta >> 12) & 0xf_ffff).unwrap_or(0) }, format })
}

/// Walks the process directory: 8, 17 or 20 bits of process id.
fn process(reach: Reach<'_>, pdtp: u64, pasid: u32) -> Result<(u64, u64), Failed> {
    let index = u64::from(pasid);
    let (levels, bits) = match pdtp >> 60 {
        1 => (0, 8),
        2 => (1, 17),
        3 => (2, 20),
        _ => return Err(context(Reason::Pasid)),
    };
    if index >> bits != 0 {
        return Err(context(Reason::Pasid));
    }
    let mut table = (pdtp & 0xfff_ffff_ffff) << 12;
    for level in (1..=levels).rev() {
        let entry = reach.load(table + ((index >> (9 * level - 1)) & 0x1ff) * 8)?;
        if entry & 1 == 0 {
            return Err(context(Reason::Context));
        }
        table = (entry << 2) & 0x00ff_ffff_ffff_f000;
    }
    let place = table + (index & 0xff) * 16;
    let (ta, fsc) = (reach.load(place)?, reach.load(place + 8)?);
    if ta & 1 == 0 { Err(context(Reason::Context)) } else { Ok((ta, fsc)) }
}
