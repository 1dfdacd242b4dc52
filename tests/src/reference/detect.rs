//! From the unit's registers to a device's tables.
//!
//! Sources: Arm IHI 0070 sections 3.3, 5.1 to 5.4 and 6.3 (SMMUv3), Intel VT-d sections 3.4, 9.1 to 9.6 and 11.4.

use super::snapshot::{Memory, Snapshot, TableState};
use super::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};
use super::walk::Walker;
use super::{Problem, bit, bits};

/// What happens to a device's requests.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// They pass untranslated.
    Bypass,
    /// They fail; the reason.
    Blocked(String),
    /// One table, or two: the one that the IOVA enters first.
    Tables(Vec<TableConfig>),
}

fn blocked(reason: &str) -> Result<Resolution, Problem> {
    Ok(Resolution::Blocked(reason.to_string()))
}

/// What happens to requests without a PASID.
///
/// # Errors
/// [`Problem::Unreadable`] if a structure is not in the snapshot, [`Problem::Unsupported`] for what this reference does not know.
pub fn resolve(snapshot: &Snapshot, id: u64) -> Result<Resolution, Problem> {
    resolve_pasid(snapshot, id, None)
}

/// What happens to requests with a PASID, or without one.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_pasid(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    if snapshot.registers.is_empty() {
        return match snapshot.tables.iter().find(|entry| entry.id == id && entry.pasid == pasid).map(|entry| &entry.state) {
            None => blocked("not listed"),
            Some(TableState::Bypass) => Ok(Resolution::Bypass),
            Some(TableState::Blocked(reason)) => blocked(reason),
            Some(TableState::Tables(config)) => Ok(Resolution::Tables(vec![*config])),
        };
    }
    match snapshot.unit_kind.as_str() {
        "arm-smmuv3" => smmu(snapshot, id, pasid),
        "intel-vtd" => vtd(snapshot, id, pasid),
        other => Err(Problem::Unsupported(format!("unit {other}"))),
    }
}

fn register(snapshot: &Snapshot, name: &str) -> Result<u64, Problem> {
    snapshot.registers.get(name).copied().ok_or_else(|| Problem::File(format!("no register {name}")))
}

// ---- SMMUv3 ----

/// The encoding of OAS, IPS and S2PS. 56 bits exist with VMSAv9-128 only.
fn arm_size(code: u64) -> u32 {
    match code {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        5 => 48,
        _ => 52,
    }
}

/// TG0 and S2TG; IDR5 bits 4, 5, 6 say which granules there are.
fn arm_granule(code: u64, idr5: u64) -> Option<u64> {
    match code {
        0 if bit(idr5, 4) => Some(4096),
        1 if bit(idr5, 6) => Some(65536),
        2 if bit(idr5, 5) => Some(16384),
        _ => None,
    }
}

/// TG1 has an encoding of its own.
fn arm_granule_high(code: u64, idr5: u64) -> Option<u64> {
    match code {
        1 if bit(idr5, 5) => Some(16384),
        2 if bit(idr5, 4) => Some(4096),
        3 if bit(idr5, 6) => Some(65536),
        _ => None,
    }
}

/// Bits 51 to `low` of a pointer, in place.
fn pointer(word: u64, low: u32) -> u64 {
    bits(word, 51, low) << low
}

fn smmu(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let memory = &snapshot.memory;
    let idr1 = register(snapshot, "IDR1")?;
    let idr5 = register(snapshot, "IDR5")?;
    // CR0.SMMUEN, bit 0. Without it, GBPA.ABORT (bit 20) decides.
    if !bit(register(snapshot, "CR0")?, 0) {
        let gbpa = snapshot.registers.get("GBPA").copied().unwrap_or(0);
        return if bit(gbpa, 20) { blocked("SMMU disabled, GBPA.ABORT") } else { Ok(Resolution::Bypass) };
    }
    // STRTAB_BASE_CFG: LOG2SIZE 5:0, SPLIT 10:6, FMT 17:16.
    let config = register(snapshot, "STRTAB_BASE_CFG")?;
    let (log2size, split, format) = (bits(config, 5, 0), bits(config, 10, 6), bits(config, 17, 16));
    let base = pointer(register(snapshot, "STRTAB_BASE")?, 6);
    // StreamIDs have 32 bits at most.
    if log2size > 32 {
        return Err(Problem::Unsupported(format!("LOG2SIZE {log2size}")));
    }
    if id >> log2size != 0 {
        return blocked("StreamID beyond the stream table");
    }
    let ste_address = match format {
        // Linear: aligned to its size.
        0 => base - base % (64 << log2size) + id * 64,
        1 => {
            if ![6, 8, 10].contains(&split) {
                return Err(Problem::Unsupported(format!("SPLIT {split}")));
            }
            // The first level is aligned to its size, at least 64 bytes.
            let size = (8u64 << log2size.saturating_sub(split)).max(64);
            let descriptor = memory.read(base - base % size + (id >> split) * 8, false)?;
            // L1STD: Span 4:0, L2Ptr 51:6; the second level has 2^(Span-1) entries and is aligned to its size.
            let span = bits(descriptor, 4, 0);
            if span == 0 {
                return blocked("L1STD.Span is 0");
            }
            let index = id % (1 << split);
            if span > split + 1 || index >= 1 << (span - 1) {
                return blocked("StreamID beyond L1STD.Span");
            }
            let table = pointer(descriptor, 6);
            table - table % (64 << (span - 1)) + index * 64
        }
        _ => return Err(Problem::Unsupported(format!("stream table format {format}"))),
    };
    let ste = [
        memory.read(ste_address, false)?,
        memory.read(ste_address + 8, false)?,
        memory.read(ste_address + 16, false)?,
        memory.read(ste_address + 24, false)?,
    ];
    if !bit(ste[0], 0) {
        return blocked("STE.V is 0");
    }
    // Config, 3:1.
    let (stage1, stage2) = match bits(ste[0], 3, 1) {
        0b100 => (false, false),
        0b101 => (true, false),
        0b110 => (false, true),
        0b111 => (true, true),
        _ => return blocked("STE.Config aborts"),
    };
    let mut after = Vec::new();
    if stage2 {
        match ste_stage2(&ste, idr5) {
            Ok(config) => after.push(TableConfig::ArmStage2(config)),
            Err(Problem::Illegal(reason)) => return blocked(&reason),
            Err(problem) => return Err(problem),
        }
    }
    let without_stage1 = |after: Vec<TableConfig>| Ok(if after.is_empty() { Resolution::Bypass } else { Resolution::Tables(after) });
    // S1CDMax, 63:59, does not count if there are no substreams at all (IDR1.SSIDSIZE, 10:6).
    let cd_max = if bits(idr1, 10, 6) == 0 { 0 } else { bits(ste[0], 63, 59) };
    if !stage1 {
        return if pasid.is_some() { blocked("substream without stage 1") } else { without_stage1(after) };
    }
    let substream = match (pasid, cd_max) {
        (None, 0) => 0,
        (Some(_), 0) => return blocked("substreams disabled"),
        // S1DSS, 1:0 of the second word.
        (None, _) => match bits(ste[1], 1, 0) {
            1 => return without_stage1(after),
            2 => 0,
            _ => return blocked("STE.S1DSS terminates"),
        },
        (Some(0), _) if bits(ste[1], 1, 0) == 2 => return blocked("substream 0 is the default"),
        (Some(substream), _) if substream >> cd_max != 0 => return blocked("substream beyond S1CDMax"),
        (Some(substream), _) => substream,
    };
    // CDs lie in the space that stage 2 translates.
    let fetch = |address: u64| -> Result<Option<u64>, Problem> {
        let address = match after.as_slice() {
            [] => address,
            stages => match Walker::new(memory, stages)?.translate(address, false) {
                Ok(address) => address,
                Err(_) => return Ok(None),
            },
        };
        memory.read(address, false).map(Some)
    };
    let context = pointer(ste[0], 6);
    // S1Fmt, 5:4: 1 and 2 have second-level tables of 64 and of 1024 CDs.
    let leaf_bits = match (cd_max, bits(ste[0], 5, 4)) {
        (0, _) => None,
        (_, 1) => Some(6),
        (_, 2) => Some(10),
        _ => None,
    };
    let cd_address = match leaf_bits {
        None => context - context % (64 << cd_max) + substream * 64,
        Some(leaf_bits) => {
            let size = (8u64 << cd_max.saturating_sub(leaf_bits)).max(64);
            let Some(descriptor) = fetch(context - context % size + (substream >> leaf_bits) * 8)? else { return blocked("L1CD faults in stage 2") };
            // L1CD: V 0, L2Ptr 51:12.
            if !bit(descriptor, 0) {
                return blocked("L1CD.V is 0");
            }
            let table = pointer(descriptor, 12);
            table - table % (64 << leaf_bits) + (substream % (1 << leaf_bits)) * 64
        }
    };
    let mut cd = [0; 4];
    for (index, word) in cd.iter_mut().enumerate() {
        match fetch(cd_address + index as u64 * 8)? {
            Some(value) => *word = value,
            None => return blocked("CD faults in stage 2"),
        }
    }
    match cd_stage1(snapshot, &ste, &cd) {
        Ok(config) => {
            let mut stages = vec![TableConfig::ArmStage1(config)];
            stages.extend(after);
            Ok(Resolution::Tables(stages))
        }
        Err(Problem::Illegal(reason)) => blocked(&reason),
        Err(problem) => Err(problem),
    }
}

fn illegal<T>(reason: &str) -> Result<T, Problem> {
    Err(Problem::Illegal(reason.to_string()))
}

/// The second-stage fields of an STE: its third and fourth word.
fn ste_stage2(ste: &[u64; 4], idr5: u64) -> Result<ArmStage2, Problem> {
    let (word, base) = (ste[2], ste[3]);
    // S2AA64, bit 179.
    if !bit(word, 51) {
        return Err(Problem::Unsupported("stage 2 tables other than VMSAv8-64".to_string()));
    }
    // S2PIE, bit 188.
    if bit(word, 60) {
        return Err(Problem::Unsupported("stage 2 permission indirection".to_string()));
    }
    // S2T0SZ 165:160, S2SL0 167:166, S2TG 175:174, S2PS 178:176.
    let Some(granule) = arm_granule(bits(word, 47, 46), idr5) else { return illegal("STE.S2TG") };
    let input_bits = 64 - bits(word, 37, 32) as u32;
    let oas = arm_size(bits(idr5, 2, 0));
    let output_bits = arm_size(bits(word, 50, 48)).min(oas);
    // S2DS, bit 195, if IDR5.DS (bit 7).
    let lpa2 = bit(base, 3) && bit(idr5, 7) && granule != 65536;
    // S2SL0 counts downwards from level 2 (4K) or 3 (16K, 64K); 4K's fourth value is level 3. S2SL0_2, bit 194, with DS selects level -1.
    let start_level = match (granule, bits(word, 39, 38)) {
        (4096, 0) if lpa2 && bit(base, 2) => -1,
        (4096, 3) => 3,
        (4096, code) => 2 - code as i32,
        (_, code) => 3 - code as i32,
    };
    // S2HD 183, S2HA 184, S2AFFD 181, S2ENDI 180, S2TTB 247:196.
    let config = ArmStage2 {
        root: pointer(base, 4),
        granule,
        input_bits,
        output_bits,
        start_level,
        hardware_access: bit(word, 56),
        hardware_dirty: bit(word, 55),
        access_flag_disabled: bit(word, 53),
        big_endian: bit(word, 52),
        lpa2,
    };
    TableConfig::ArmStage2(config).regions()?;
    Ok(config)
}

/// A CD, with what the STE says of privilege and regime.
fn cd_stage1(snapshot: &Snapshot, ste: &[u64; 4], cd: &[u64; 4]) -> Result<ArmStage1, Problem> {
    let idr3 = register(snapshot, "IDR3").unwrap_or(0);
    let idr5 = register(snapshot, "IDR5")?;
    // V 31, AA64 41.
    if !bit(cd[0], 31) {
        return illegal("CD.V is 0");
    }
    if !bit(cd[0], 41) {
        return Err(Problem::Unsupported("stage 1 tables other than VMSAv8-64".to_string()));
    }
    // PIE 187.
    if bit(cd[2], 59) {
        return Err(Problem::Unsupported("stage 1 permission indirection".to_string()));
    }
    // STRW, STE bits 95:94: 0b10 is EL2, which without CR2.E2H (bit 0) has one root, and no unprivileged requests.
    let el2 = bits(ste[1], 31, 30) == 2 && !bit(register(snapshot, "CR2").unwrap_or(0), 0);
    // PRIVCFG, STE bits 113:112: 0b11 makes every request privileged.
    let privileged = el2 || bits(ste[1], 49, 48) == 3;
    // IPS 34:32, not more than OAS.
    let output_bits = arm_size(bits(cd[0], 34, 32)).min(arm_size(bits(idr5, 2, 0)));
    // DS 186, if IDR5.DS (bit 7).
    let lpa2 = bit(cd[2], 58) && bit(idr5, 7);
    // HAD0 65 and HAD1 129 count if IDR3.HAD (bit 2); E0PD0 66 and E0PD1 130 make unprivileged requests fault.
    let had = |word: u64| bit(word, 1) && bit(idr3, 2);
    let e0pd = |word: u64| bit(word, 2) && !privileged;
    let mut low = None;
    // EPD0 14, T0SZ 5:0, TG0 7:6, TTB0 119:68, TBI0 38.
    if el2 || !bit(cd[0], 14) {
        let Some(granule) = arm_granule(bits(cd[0], 7, 6), idr5) else { return illegal("CD.TG0") };
        let part = ArmHalf {
            root: pointer(cd[1], 4),
            granule,
            input_bits: 64 - bits(cd[0], 5, 0) as u32,
            top_byte_ignored: bit(cd[0], 38),
            hierarchical_disabled: had(cd[1]),
        };
        low = Some(part).filter(|_| !e0pd(cd[1]));
    }
    let mut high = None;
    // EPD1 30, T1SZ 21:16, TG1 23:22, TTB1 183:132, TBI1 39.
    if !el2 && !bit(cd[0], 30) {
        let Some(granule) = arm_granule_high(bits(cd[0], 23, 22), idr5) else { return illegal("CD.TG1") };
        let part = ArmHalf {
            root: pointer(cd[2], 4),
            granule,
            input_bits: 64 - bits(cd[0], 21, 16) as u32,
            top_byte_ignored: bit(cd[0], 39),
            hierarchical_disabled: had(cd[2]),
        };
        high = Some(part).filter(|_| !e0pd(cd[2]));
    }
    // HD 42, HA 43, AFFD 35, ENDI 15; MAIR is the fourth word.
    let config = ArmStage1 {
        low,
        high,
        output_bits,
        mair: cd[3],
        hardware_access: bit(cd[0], 43),
        hardware_dirty: bit(cd[0], 42),
        access_flag_disabled: bit(cd[0], 35),
        big_endian: bit(cd[0], 15),
        lpa2,
        privileged,
    };
    TableConfig::ArmStage1(config).regions()?;
    Ok(config)
}

// ---- VT-d ----

/// AW in context and PASID entries: 1, 2, 3 are 3, 4, 5 levels; CAP.SAGAW (12:8) has one bit for each.
fn vtd_levels(code: u64, cap: u64) -> Option<u32> {
    if (1..=3).contains(&code) && bit(cap, 8 + code as u32) { Some(code as u32 + 2) } else { None }
}

fn vtd_second(cap: u64, root: u64, levels: u32) -> TableConfig {
    // CAP.MGAW 21:16 is one less than the width of an IOVA; CAP.SLLPS 37:34 has 2M in bit 34 and 1G in bit 35.
    let guest_width = bits(cap, 21, 16) as u32 + 1;
    TableConfig::VtdSecond(VtdSecond {
        root,
        levels,
        input_bits: guest_width.min(12 + 9 * levels),
        output_bits: 52,
        large_2m: bit(cap, 34),
        large_1g: bit(cap, 35),
    })
}

fn page_pointer(word: u64) -> u64 {
    bits(word, 63, 12) << 12
}

fn vtd(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let memory = &snapshot.memory;
    let cap = register(snapshot, "CAP")?;
    // GSTS.TES, bit 31.
    if !bit(register(snapshot, "GSTS")?, 31) {
        return Ok(Resolution::Bypass);
    }
    if id > 0xffff {
        return blocked("not a requester id");
    }
    let (bus, function) = (id >> 8, id % 256);
    // RTADDR: TTM 11:10, table 63:12.
    let rtaddr = register(snapshot, "RTADDR")?;
    let root_entry = page_pointer(rtaddr) + bus * 16;
    match bits(rtaddr, 11, 10) {
        0 => {
            if pasid.is_some() {
                return blocked("PASID in legacy mode");
            }
            // Root entry: present 0, context table 63:12. 256 context entries of 16 bytes.
            let root = memory.read(root_entry, false)?;
            if !bit(root, 0) {
                return blocked("root entry not present");
            }
            let context_entry = page_pointer(root) + function * 16;
            let (low, high) = (memory.read(context_entry, false)?, memory.read(context_entry + 8, false)?);
            // Context entry: P 0, TT 3:2, SSPTPTR 63:12, AW 66:64.
            if !bit(low, 0) {
                return blocked("context entry not present");
            }
            match bits(low, 3, 2) {
                0 | 1 => match vtd_levels(bits(high, 2, 0), cap) {
                    Some(levels) => Ok(Resolution::Tables(vec![vtd_second(cap, page_pointer(low), levels)])),
                    None => blocked("context entry's AW"),
                },
                2 => Ok(Resolution::Bypass),
                _ => blocked("context entry's TT"),
            }
        }
        1 => vtd_scalable(memory, cap, root_entry, function, pasid),
        3 => blocked("RTADDR.TTM aborts"),
        mode => Err(Problem::Unsupported(format!("RTADDR.TTM {mode}"))),
    }
}

fn vtd_scalable(memory: &Memory, cap: u64, root_entry: u64, function: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    // Scalable root entry: LP 0, LCTP 63:12 for functions 0 to 127; UP 64, UCTP 127:76 for the others. Context entries have 32 bytes.
    let root = memory.read(root_entry + 8 * (function / 128), false)?;
    if !bit(root, 0) {
        return blocked("root entry not present");
    }
    let context_entry = page_pointer(root) + (function % 128) * 32;
    let (low, high) = (memory.read(context_entry, false)?, memory.read(context_entry + 8, false)?);
    // Scalable context entry: P 0, PASIDE 3, PDTS 11:9, PASIDDIRPTR 63:12, RID_PASID 83:64, RID_PRIV 84.
    if !bit(low, 0) {
        return blocked("context entry not present");
    }
    let pasid = match pasid {
        Some(_) if !bit(low, 3) => return blocked("PASIDs disabled"),
        Some(pasid) => pasid,
        None if bit(high, 20) => return Err(Problem::Unsupported("RID_PRIV".to_string())),
        None => bits(high, 19, 0),
    };
    // A directory of 2^(PDTS+7) entries, each with a table of 64 PASID entries of 64 bytes.
    if (pasid >> 6) >> (bits(low, 11, 9) + 7) != 0 {
        return blocked("PASID beyond the directory");
    }
    let directory = memory.read(page_pointer(low).wrapping_add((pasid >> 6) * 8), false)?;
    if !bit(directory, 0) {
        return blocked("PASID directory entry not present");
    }
    let entry = page_pointer(directory) + (pasid % 64) * 64;
    let (first, third) = (memory.read(entry, false)?, memory.read(entry + 16, false)?);
    // PASID entry: P 0, AW 4:2, PGTT 8:6, SSPTPTR 63:12; third word: FSPM 131:130, NXE 133, FSPTPTR 191:140.
    if !bit(first, 0) {
        return blocked("PASID entry not present");
    }
    let second_stage = || vtd_levels(bits(first, 4, 2), cap).map(|levels| vtd_second(cap, page_pointer(first), levels));
    let first_stage = || {
        // CAP.FS5LP, bit 60; CAP.FS1GP, bit 56.
        let levels = match bits(third, 3, 2) {
            0 => 4,
            1 if bit(cap, 60) => 5,
            _ => return None,
        };
        let (large_1g, execute_disable) = (bit(cap, 56), bit(third, 5));
        Some(TableConfig::VtdFirst(VtdFirst { root: page_pointer(third), levels, output_bits: 52, large_1g, execute_disable }))
    };
    let stages = match bits(first, 8, 6) {
        1 => vec![first_stage()],
        2 => vec![second_stage()],
        3 => vec![first_stage(), second_stage()],
        4 => return Ok(Resolution::Bypass),
        _ => return blocked("PASID entry's PGTT"),
    };
    match stages.into_iter().collect::<Option<Vec<TableConfig>>>() {
        Some(stages) => Ok(Resolution::Tables(stages)),
        None => blocked("PASID entry's levels"),
    }
}
