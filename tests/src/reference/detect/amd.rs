//! AMD-Vi: device table entries and guest CR3 tables.
//!
//! Source: AMD I/O Virtualization Technology (IOMMU) Specification 48882, sections 2.2.2 (device table), 2.2.6 (guest CR3 tables) and 3.4 (registers).

use super::{Resolution, Window, any, blocked, illegal, register};
use crate::reference::snapshot::Snapshot;
use crate::reference::tables::{AmdV1, AmdV2, TableConfig, beyond};
use crate::reference::walk::Walker;
use crate::reference::{Access, Problem, bit, bits};

/// What is taken of the registers.
struct Unit {
    control: u64,
    features: u64,
}

/// The first byte of a device's entry; none if its table is shorter.
fn entry_address(snapshot: &Snapshot, unit: &Unit, id: u64) -> Result<Option<u64>, Problem> {
    // DevTblSegEn, 36:34 of CONTROL: so many of the upper bits of the id select a table of its own. More than three is reserved.
    let segment_bits = bits(unit.control, 36, 34) as u32;
    let (segment, index) = (id >> (16 - segment_bits), bits(id, 15 - segment_bits, 0));
    let base = match segment {
        0 => register(snapshot, "DEVTAB_BASE")?,
        _ => register(snapshot, &format!("DEVTAB_SEG{segment}_BASE"))?,
    };
    // Size, 8:0, in pages of 4 KiB less one; table 51:12.
    let size = (bits(base, 8, 0) + 1) * 4096;
    Ok((index * 32 < size).then(|| (bits(base, 51, 12) << 12) + index * 32))
}

/// IR 61 and IW 62.
fn granted(entry: &[u64; 4]) -> Access {
    Access { read: bit(entry[0], 61), write: bit(entry[0], 62) }
}

/// Mode 11:9, root 51:12: the host table; none for mode 0.
fn host_table(unit: &Unit, entry: &[u64; 4]) -> Result<Option<AmdV1>, &'static str> {
    let mode = bits(entry[0], 11, 9) as u32;
    // HATS, 11:10 of the features: 3 is a unit without host tables. What else software asks for beyond the features is its own fault, and not looked at.
    if bits(unit.features, 11, 10) == 3 && (mode != 0 || bits(entry[0], 51, 12) != 0) {
        return Err("the unit has no host tables");
    }
    match mode {
        0 => Ok(None),
        7 => Err("Mode 7"),
        _ => Ok(Some(AmdV1 {
            root: bits(entry[0], 51, 12) << 12,
            levels: mode,
            output_bits: 52,
            granted: granted(entry),
            // HAD, 8:7.
            update_accessed: bit(entry[0], 7),
            update_dirty: bit(entry[0], 8),
        })),
    }
}

/// GCR3 root pointer: bits 14:12 in 60:58, 30:15 in 95:80, 51:31 in 127:107.
fn guest_root(entry: &[u64; 4]) -> u64 {
    (bits(entry[0], 60, 58) << 12) + (bits(entry[1], 31, 16) << 15) + (bits(entry[1], 63, 43) << 31)
}

/// The guest table of a PASID. `host` translates the addresses of guest CR3 tables.
fn guest_table(snapshot: &Snapshot, unit: &Unit, entry: &[u64; 4], host: Option<AmdV1>, pasid: u64) -> Result<Result<AmdV2, &'static str>, Problem> {
    // GLX 57:56: 1 to 3 levels of 9 bits, for 20 bits at most.
    let glx = bits(entry[0], 57, 56);
    if glx == 3 {
        return Ok(Err("GLX"));
    }
    if pasid >> (9 * (glx + 1)).min(20) != 0 {
        return Ok(Err("PASID out of range"));
    }
    // GuestPagingMode, 183:182: 4 or 5 levels.
    let paging_mode = bits(entry[2], 55, 54);
    if paging_mode > 1 {
        return Ok(Err("GuestPagingMode"));
    }
    let mut table = guest_root(entry);
    // GCR3TRPMode, 58 of CONTROL: the first table's address is the guest's too. Those of the others are always.
    let mut guest_physical = bit(unit.control, 58);
    for level in (0..=glx).rev() {
        let mut address = table + bits(pasid >> (9 * level), 8, 0) * 8;
        if let Some(host) = host.filter(|_| guest_physical) {
            match Walker::new(&snapshot.memory, &[TableConfig::AmdV1(host)])?.translate(address, false) {
                Ok(translated) => address = translated,
                Err(_) => return Ok(Err("the guest CR3 table faults in the host table")),
            }
        }
        let word = snapshot.memory.read(address, false)?;
        // Valid 0, address 51:12, reserved 63:52.
        if !bit(word, 0) || any(word, 63, 52) {
            return Ok(Err("guest CR3 table entry"));
        }
        guest_physical = true;
        table = bits(word, 51, 12) << 12;
    }
    // A root is a guest-physical address, too. Mode says how many bits of these a host table takes; more of them fault (section 2.2.3).
    if host.is_some_and(|host| beyond(table, 12 + 9 * host.levels)) {
        return Ok(Err("the guest table's root is no guest-physical address"));
    }
    Ok(Ok(AmdV2 {
        root: table,
        levels: 4 + paging_mode as u32,
        output_bits: 52,
        sign_extended: pasid != 0,
        page_1g: true,
        privileged: false,
        granted: if host.is_some() { Access::RW } else { granted(entry) },
        // CONTROL.GAUpdateDis 54, GDUpdateDis 48.
        update_accessed: !bit(unit.control, 54),
        update_dirty: !bit(unit.control, 48),
    }))
}

pub(super) fn amd(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    // IommuEn.
    let unit = Unit { control: register(snapshot, "CONTROL")?, features: register(snapshot, "EXT_FEATURES").unwrap_or(0) };
    if !bit(unit.control, 0) {
        return Ok(Resolution::Bypass);
    }
    if id > 0xffff || bits(unit.control, 36, 34) > 3 {
        return illegal("DevTblSegEn, or no device id");
    }
    for segment in 1..1u64 << bits(unit.control, 36, 34) {
        if !snapshot.registers.contains_key(&format!("DEVTAB_SEG{segment}_BASE")) {
            return illegal("a segment's register is missing");
        }
    }
    let Some(address) = entry_address(snapshot, &unit, id)? else { return blocked("beyond the device table") };
    let mut entry = [0; 4];
    for (index, word) in entry.iter_mut().enumerate() {
        *word = snapshot.memory.read(address + index as u64 * 8, false)?;
    }
    // V 0, TV 1, GIoV 54, GV 55.
    if !bit(entry[0], 0) {
        return Ok(Resolution::Bypass);
    }
    // 6:2 and 63 are reserved.
    if any(entry[0], 6, 2) || bit(entry[0], 63) {
        return blocked("reserved bits of the device table entry");
    }
    // EXCL_BASE: enabled 0, for all 1; else for entries with EX, 103. MARC is 40 of CONTROL.
    let exclusion = snapshot.registers.get("EXCL_BASE").copied().unwrap_or(0);
    if (bit(exclusion, 0) && (bit(exclusion, 1) || bit(entry[1], 39))) || bit(unit.control, 40) {
        return Err(Problem::Unsupported("addresses beside the tables".to_string()));
    }
    if !bit(entry[0], 1) {
        return blocked("TV is 0");
    }
    let host = match host_table(&unit, &entry) {
        Ok(host) => host,
        Err(reason) => return blocked(reason),
    };
    if granted(&entry) == Access::NONE {
        return blocked("nothing is allowed");
    }
    // GTEn, 16 of CONTROL.
    let guest = bit(entry[0], 55) && bit(unit.control, 16);
    let pasid = match pasid {
        Some(_) if !guest => return blocked("PASID without guest tables"),
        None if guest && bit(entry[0], 54) => Some(0),
        pasid => pasid,
    };
    let mut stages = Vec::new();
    if let Some(pasid) = pasid {
        match guest_table(snapshot, &unit, &entry, host, pasid)? {
            Ok(table) => stages.push(TableConfig::AmdV2(table)),
            Err(reason) => return blocked(reason),
        }
    }
    stages.extend(host.map(TableConfig::AmdV1));
    if stages.is_empty() {
        return match granted(&entry) {
            Access::RW => Ok(Resolution::Bypass),
            // "Translation disabled (access controlled by IR and IW bits)".
            access => Ok(Resolution::Direct(Window::everything(access))),
        };
    }
    Ok(Resolution::Tables(stages))
}
