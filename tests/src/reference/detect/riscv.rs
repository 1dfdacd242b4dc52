//! RISC-V: device contexts and process contexts.
//!
//! Source: RISC-V IOMMU Architecture Specification 1.0, chapter 3 (data structures) and 6 (registers).

use super::{MessageTable, Resolution, Window, any, blocked, illegal, register};
use crate::reference::snapshot::Snapshot;
use crate::reference::tables::beyond;
use crate::reference::tables::riscv::Entries;
use crate::reference::tables::{RiscvFirst, RiscvSecond, TableConfig};
use crate::reference::walk::Walker;
use crate::reference::{Access, Problem, bit, bits};

/// What the registers say.
struct Unit {
    capabilities: u64,
    /// `fctl.BE`: device directories and second-stage entries are big-endian.
    big_endian: bool,
    /// `fctl.GXL`: guests have 32 bits.
    guest_32: bool,
}

impl Unit {
    fn has(&self, capability: u32) -> bool {
        bit(self.capabilities, capability)
    }

    /// Svpbmt 15, Svrsw60t59b 14; Svnapot is there always.
    fn entries(&self, levels: u32, output_bits: u32, hardware_update: bool, big_endian: bool) -> Entries {
        // Entries of 32 bits have none of these.
        let wide = levels > 2;
        let (svpbmt, svrsw60t59b) = (wide && self.has(15), wide && self.has(14));
        Entries { output_bits, svnapot: wide, svpbmt, svrsw60t59b, hardware_update, big_endian }
    }

    /// PAS 37:32; page numbers have no room for more than 56 bits.
    fn physical_bits(&self) -> u32 {
        bits(self.capabilities, 37, 32).min(56) as u32
    }

    /// Levels of a first stage; none for Bare.
    fn first_levels(&self, mode: u64, wide: bool) -> Result<Option<u32>, &'static str> {
        // Sv32 8, Sv39 9, Sv48 10, Sv57 11.
        match (mode, wide) {
            (0, _) => Ok(None),
            (8, false) if self.has(8) => Ok(Some(2)),
            (8..=10, true) if self.has(mode as u32 + 1) => Ok(Some(mode as u32 - 5)),
            _ => Err("iosatp.MODE"),
        }
    }

    /// Levels of a second stage; none for Bare.
    fn second_levels(&self, mode: u64) -> Result<Option<u32>, &'static str> {
        // Sv32x4 16, Sv39x4 17, Sv48x4 18, Sv57x4 19.
        match (mode, self.guest_32) {
            (0, _) => Ok(None),
            (8, true) if self.has(16) => Ok(Some(2)),
            (8..=10, false) if self.has(mode as u32 + 9) => Ok(Some(mode as u32 - 5)),
            _ => Err("iohgatp.MODE"),
        }
    }
}

/// PPN 43:0 of a pointer.
fn pointer(word: u64) -> u64 {
    bits(word, 43, 0) << 12
}

/// A device context, four words or eight.
struct Context {
    words: [u64; 8],
}

impl Context {
    /// EN_ATS 1, EN_PRI 2, T2GPA 3, DTF 4, PDTV 5, PRPR 6, GADE 7, SADE 8, DPE 9, SBE 10, SXL 11.
    fn control(&self, position: u32) -> bool {
        bit(self.words[0], position)
    }

    fn mode(&self, word: usize) -> u64 {
        bits(self.words[word], 63, 60)
    }

    /// MODE Flat; masks and patterns have the 52 bits of a page number.
    fn messages(&self) -> Option<MessageTable> {
        (self.mode(4) == 1).then(|| MessageTable { root: pointer(self.words[4]), mask: self.words[5], pattern: self.words[6] })
    }

    /// "Device-context configuration checks".
    fn misconfigured(&self, unit: &Unit) -> Option<&'static str> {
        let [control, hypervisor, attributes, first, msi, mask, pattern, rest] = self.words;
        // Custom 31:24. QOSID is 41: RCID 51:40 and MCID 63:52.
        let quality = unit.has(41);
        let reserved = any(control, 23, 12) || any(control, 63, 32) || any(attributes, 11, 0) || any(attributes, 39, 32);
        if reserved || any(first, 59, 44) || any(msi, 59, 44) || any(mask, 63, 52) || any(pattern, 63, 52) || rest != 0 {
            return Some("reserved bits of the device context");
        }
        if !quality && any(attributes, 63, 40) {
            return Some("RCID or MCID");
        }
        let (ats, pri, guest, directory, prpr) = (self.control(1), self.control(2), self.control(3), self.control(5), self.control(6));
        if (!unit.has(25) && (ats || pri || prpr)) || (!ats && (guest || pri)) || (!pri && prpr) {
            return Some("ATS and PRI");
        }
        if guest && (!unit.has(26) || self.mode(1) == 0) {
            return Some("T2GPA");
        }
        let wide = !self.control(11);
        if directory {
            // PD8 38, PD17 39, PD20 40.
            let mode = self.mode(3);
            if mode > 3 || (mode > 0 && !unit.has(37 + mode as u32)) {
                return Some("pdtp.MODE");
            }
        } else {
            if unit.first_levels(self.mode(3), wide).is_err() {
                return Some("iosatp.MODE");
            }
            if self.control(9) {
                return Some("DPE without process directory");
            }
        }
        if unit.second_levels(self.mode(1)).is_err() {
            return Some("iohgatp.MODE");
        }
        if self.mode(4) > 1 {
            return Some("msiptp.MODE");
        }
        if self.mode(1) != 0 && bits(hypervisor, 1, 0) != 0 {
            return Some("iohgatp.PPN");
        }
        // AMO_HWAD 24.
        if !unit.has(24) && (self.control(7) || self.control(8)) {
            return Some("GADE or SADE");
        }
        // END 27: without it there is one byte order.
        if !unit.has(27) && self.control(10) != unit.big_endian {
            return Some("SBE");
        }
        // 32-bit guests have 32-bit processes; a unit without Sv32 has neither.
        if (unit.guest_32 && wide) || (!wide && !unit.guest_32 && !unit.has(8)) {
            return Some("SXL");
        }
        None
    }
}

/// Levels of the device directory's index, from the last: bits of the device id.
fn directory_index(extended: bool, id: u64) -> [u64; 3] {
    let own = if extended { 6 } else { 7 };
    [bits(id, own - 1, 0), bits(id, own + 8, own), bits(id, 23, own + 9)]
}

fn device_context(snapshot: &Snapshot, unit: &Unit, id: u64, ddtp: u64) -> Result<Result<Context, &'static str>, Problem> {
    // MSI_FLAT 22: contexts have eight words.
    let extended = unit.has(22);
    let index = directory_index(extended, id);
    let levels = (bits(ddtp, 3, 0) - 1) as usize;
    if index[levels..].iter().any(|part| *part != 0) {
        return Ok(Err("device id too wide"));
    }
    // PPN 53:10.
    let mut table = bits(ddtp, 53, 10) << 12;
    for level in (1..levels).rev() {
        let word = snapshot.memory.read(table + index[level] * 8, unit.big_endian)?;
        if !bit(word, 0) || any(word, 9, 1) || any(word, 63, 54) {
            return Ok(Err("device directory entry"));
        }
        table = bits(word, 53, 10) << 12;
    }
    let count = if extended { 8 } else { 4 };
    let mut words = [0; 8];
    for (position, word) in words.iter_mut().enumerate().take(count as usize) {
        *word = snapshot.memory.read(table + index[0] * count * 8 + position as u64 * 8, unit.big_endian)?;
    }
    Ok(if bit(words[0], 0) { Ok(Context { words }) } else { Err("device context not valid") })
}

/// The first-stage context of a process: `fsc`, none if something refuses.
fn process_context(
    snapshot: &Snapshot,
    unit: &Unit,
    context: &Context,
    second: Option<RiscvSecond>,
    process: u64,
) -> Result<Result<u64, &'static str>, Problem> {
    let big_endian = context.control(10);
    let read = |address: u64| -> Result<Option<u64>, Problem> {
        // With a second stage the directory is the guest's.
        let address = match second {
            None => address,
            Some(second) => match Walker::new(&snapshot.memory, &[TableConfig::RiscvSecond(second)])?.translate(address, false) {
                Ok(address) => address,
                Err(_) => return Ok(None),
            },
        };
        snapshot.memory.read(address, big_endian).map(Some)
    };
    let index = [bits(process, 7, 0), bits(process, 16, 8), bits(process, 19, 17)];
    let levels = context.mode(3) as usize;
    if process >> 20 != 0 || index[levels..].iter().any(|part| *part != 0) {
        return Ok(Err("process id too wide"));
    }
    let mut table = pointer(context.words[3]);
    for level in (1..levels).rev() {
        let Some(word) = read(table + index[level] * 8)? else { return Ok(Err("the process directory faults in the second stage")) };
        if !bit(word, 0) || any(word, 9, 1) || any(word, 63, 54) {
            return Ok(Err("process directory entry"));
        }
        table = bits(word, 53, 10) << 12;
    }
    let (Some(attributes), Some(first)) = (read(table + index[0] * 16)?, read(table + index[0] * 16 + 8)?) else {
        return Ok(Err("the process context faults in the second stage"));
    };
    // V 0, ENS 1, SUM 2, PSCID 31:12.
    if !bit(attributes, 0) {
        return Ok(Err("process context not valid"));
    }
    if any(attributes, 11, 3) || any(attributes, 63, 32) || any(first, 59, 44) {
        return Ok(Err("reserved bits of the process context"));
    }
    if unit.first_levels(bits(first, 63, 60), !context.control(11)).is_err() {
        return Ok(Err("the process context's MODE"));
    }
    Ok(Ok(first))
}

fn unit(snapshot: &Snapshot) -> Result<Unit, Problem> {
    let control = register(snapshot, "FCTL")?;
    Ok(Unit { capabilities: register(snapshot, "CAPABILITIES")?, big_endian: bit(control, 0), guest_32: bit(control, 2) })
}

/// The MSI page table of a device whose requests come so far.
pub(super) fn messages(snapshot: &Snapshot, id: u64) -> Result<Option<MessageTable>, Problem> {
    let (unit, ddtp) = (unit(snapshot)?, register(snapshot, "DDTP")?);
    // Off, everything passes, or no mode at all.
    if !(2..=4).contains(&bits(ddtp, 3, 0)) {
        return Ok(None);
    }
    Ok(device_context(snapshot, &unit, id, ddtp)?.ok().and_then(|context| context.messages()))
}

pub(super) fn riscv(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let (unit, ddtp) = (unit(snapshot)?, register(snapshot, "DDTP")?);
    // Registers hold no other values.
    if bits(ddtp, 3, 0) > 4 || id >> 24 != 0 {
        return illegal("iommu_mode, or no device id");
    }
    // iommu_mode 3:0.
    match bits(ddtp, 3, 0) {
        0 => return blocked("the unit is off"),
        1 => return Ok(Resolution::Bypass),
        _ if unit.physical_bits() < 32 => return illegal("PAS"),
        _ => {}
    }
    let context = match device_context(snapshot, &unit, id, ddtp)? {
        Ok(context) => context,
        Err(reason) => return blocked(reason),
    };
    if let Some(reason) = context.misconfigured(&unit) {
        return blocked(reason);
    }
    let narrow = context.control(11);
    let second = unit.second_levels(context.mode(1)).unwrap_or(None).map(|levels| RiscvSecond {
        root: pointer(context.words[1]),
        levels,
        input_bits: if narrow { 34 } else { 59 },
        entries: unit.entries(levels, unit.physical_bits(), context.control(7), unit.big_endian),
    });
    if second.is_some_and(|second| beyond(second.root, unit.physical_bits())) {
        return blocked("iohgatp.PPN beyond PAS");
    }
    let directory = context.control(5);
    let process = match pasid {
        Some(_) if !directory => return blocked("process id without process directory"),
        Some(process) => Some(process),
        // DPE.
        None if directory && context.control(9) => Some(0),
        None => None,
    };
    let first = match process {
        // Without a directory all processes are alike.
        Some(process) if context.mode(3) == 0 => {
            if process >> 20 != 0 {
                return blocked("process id too wide");
            }
            0
        }
        Some(process) => match process_context(snapshot, &unit, &context, second, process)? {
            Ok(first) => first,
            Err(reason) => return blocked(reason),
        },
        None if directory => 0,
        None => context.words[3],
    };
    let first = unit.first_levels(bits(first, 63, 60), !narrow).unwrap_or(None).map(|levels| RiscvFirst {
        root: pointer(first),
        levels,
        entries: unit.entries(levels, if second.is_some() { 56 } else { unit.physical_bits() }, context.control(8), context.control(10)),
    });
    if second.is_none() && first.is_some_and(|first| beyond(first.root, unit.physical_bits())) {
        return blocked("iosatp.PPN beyond PAS");
    }
    let stages: Vec<TableConfig> = first.map(TableConfig::RiscvFirst).into_iter().chain(second.map(TableConfig::RiscvSecond)).collect();
    Ok(match (stages.is_empty(), context.messages()) {
        (false, _) => Resolution::Tables(stages),
        (true, None) => Resolution::Bypass,
        // All but messages.
        (true, Some(_)) => Resolution::Direct(Window::everything(Access::RW)),
    })
}
