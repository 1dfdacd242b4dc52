//! The data of nested page tables: what each driver of the kernel accepts.

use super::commands::words;
use super::unit::{Unit, UnitKind};
use super::walk::context::{Data, riscv_tc};
use crate::kernel::{Errno, Result, hwpt_data};

/// Reads and checks the data when the page table is made.
pub(super) fn parse(unit: &Unit, data_type: u32, data: &[u8]) -> Result<Data> {
    let long_enough = |bytes: usize| if data.len() < bytes { Err(Errno::EINVAL) } else { Ok(()) };
    match (unit.config.kind, data_type) {
        (UnitKind::Vtd { .. }, hwpt_data::VTD_S1) => {
            long_enough(24)?;
            let [flags, root, tail] = words::<3>(data);
            let bytes = tail.to_ne_bytes();
            let [width, reserved] = [[bytes[0], bytes[1], bytes[2], bytes[3]], [bytes[4], bytes[5], bytes[6], bytes[7]]].map(u32::from_ne_bytes);
            if reserved != 0 || flags >> 3 != 0 {
                return Err(Errno::EOPNOTSUPP);
            }
            Ok(Data::Vtd { flags, root, width })
        }
        (UnitKind::Smmuv3 { .. }, hwpt_data::ARM_SMMUV3) => {
            long_enough(16)?;
            smmuv3(words::<2>(data))
        }
        (UnitKind::Amd { efr, .. }, hwpt_data::AMD_GUEST) => {
            long_enough(32)?;
            amd(words::<4>(data), efr)
        }
        (UnitKind::Riscv { capabilities }, hwpt_data::SIM_RISCV) => {
            long_enough(24)?;
            riscv(words::<3>(data), capabilities)
        }
        // VT-d's driver says so of a type that is not its own; the helper that the others use says EINVAL.
        (UnitKind::Vtd { .. }, _) => Err(Errno::EOPNOTSUPP),
        _ => Err(Errno::EINVAL),
    }
}

/// EIO stands for an STE that is not valid.
fn smmuv3(mut ste: [u64; 2]) -> Result<Data> {
    // V, Config, S1Fmt, S1ContextPtr, S1CDMax; S1DSS, S1CIR, S1COR, S1CSH, S1STALLD, EATS.
    const ALLOWED: [u64; 2] = [1 | 7 << 1 | 3 << 4 | 0x000f_ffff_ffff_ffc0 | 0x1f << 59, 0xff | 1 << 27 | 3 << 28];
    if ste[0] & 1 == 0 {
        ste = [0, 0]; // not valid is an abort, whatever else it says
    }
    if ste[0] & !ALLOWED[0] != 0 || ste[1] & !ALLOWED[1] != 0 {
        return Err(Errno::EIO);
    }
    let config = (ste[0] >> 1) & 7;
    let ats = (ste[1] >> 28) & 3;
    if !matches!(config, 0 | 4 | 5) || ats > 1 {
        return Err(Errno::EIO);
    }
    Ok(Data::Smmu { ste })
}

/// V and TV set, no host table of the guest's own, guest translation on, levels that the unit has.
fn amd(dte: [u64; 4], efr: u64) -> Result<Data> {
    let valid_translation = dte[0] & 3 == 3;
    let host_mode = (dte[0] >> 9) & 7;
    let guest = dte[0] & 1 << 55 != 0;
    let glx = (dte[0] >> 56) & 3;
    let gcr3 = ((dte[0] >> 58) & 7) | ((dte[1] >> 16) & 0xffff) << 3 | (dte[1] >> 43) << 19;
    let levels = (dte[2] >> 54) & 3;
    // EFR: GATS 13:12 (0 is four levels), GLXSup 15:14.
    let supported = levels <= (efr >> 12) & 3 && glx <= (efr >> 14) & 3;
    if valid_translation && host_mode == 0 && guest && glx != 3 && gcr3 != 0 && levels < 2 && supported {
        Ok(Data::Amd { dte })
    } else {
        Err(Errno::EINVAL)
    }
}

/// The simulated kernel's own rules, after those of the others: EIO for what the device context may not say.
fn riscv([tc, ta, fsc]: [u64; 3], capabilities: u64) -> Result<Data> {
    const TC: u64 = riscv_tc::V | riscv_tc::PDTV | riscv_tc::SADE | riscv_tc::DPE | riscv_tc::SBE;
    // PSCID 31:12 only; mode 63:60 and page number 43:0.
    if tc & !TC != 0 || tc & riscv_tc::V == 0 || ta & !0xffff_f000 != 0 || fsc & 0x0fff_f000_0000_0000 != 0 {
        return Err(Errno::EIO);
    }
    // SADE needs capabilities.AMO_HWAD, SBE capabilities.END. Process directories: PD8, PD17, PD20 are 38 to 40; Sv39, Sv48, Sv57 are 9 to 11.
    let mode = fsc >> 60;
    let directory = tc & riscv_tc::PDTV != 0;
    let known = match (directory, mode) {
        (_, 0) => true,
        (true, 1..=3) => capabilities >> (37 + mode) & 1 != 0,
        (false, 8..=10) => capabilities >> (1 + mode) & 1 != 0,
        _ => false,
    };
    let updates = tc & riscv_tc::SADE == 0 || capabilities & 1 << 24 != 0;
    let endian = tc & riscv_tc::SBE == 0 || capabilities & 1 << 27 != 0;
    if known && updates && endian { Ok(Data::Riscv { tc, ta, fsc }) } else { Err(Errno::EIO) }
}

/// What the driver finds out only when a device is attached: EINVAL.
pub(super) fn check_attach(unit: &Unit, data: &Data) -> Result<()> {
    let (UnitKind::Vtd { cap, ecap, .. }, Data::Vtd { flags, width, .. }) = (unit.config.kind, data) else { return Ok(()) };
    let width = match width {
        48 => true,
        57 => cap & 1 << 60 != 0,
        _ => false,
    };
    // SRE needs ECAP.SRS (31), EAFE needs ECAP.EAFS (34).
    let supervisor = flags & 1 == 0 || ecap & 1 << 31 != 0;
    let accessed = flags & 2 == 0 || ecap & 1 << 34 != 0;
    if width && supervisor && accessed { Ok(()) } else { Err(Errno::EINVAL) }
}
