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

/// Bits 55 to `low` of a pointer, in place.
fn pointer(word: u64, low: u32) -> u64 {
    bits(word, 55, low) << low
}

/// Bits 51 to 4 of a first table's address; bits 55 to 52 are for 128-bit tables (IHI 0070 CD.TTB0, STE.S2TTB).
fn table_pointer(word: u64) -> u64 {
    bits(word, 51, 4) << 4
}

/// An address with so many low bits taken as zero.
fn aligned(address: u64, log2: u64) -> u64 {
    if log2 > 63 { 0 } else { address - address % (1 << log2) }
}

/// IHI 0070 3.4: intermediate addresses have at least 40 bits if AArch32 tables are implemented (IDR0.TTF 3:2, bit 0).
fn intermediate_bits(idr0: u64, idr5: u64) -> u32 {
    let oas = arm_size(bits(idr5, 2, 0));
    if bit(idr0, 2) { oas.max(40) } else { oas }
}

/// IHI 0070 5.2.2, `SteIllegal`, for a Non-secure STE that is valid and translates or bypasses; what belongs to stage 2's tables is in [`ste_stage2`].
/// Not looked at, as both sides agree: MPAM, the device permission table, permission overlays.
fn ste_illegal(snapshot: &Snapshot, ste: &[u64; 4], stage1: bool, stage2: bool) -> Result<Option<&'static str>, Problem> {
    let (idr0, idr1, idr5) = (register(snapshot, "IDR0")?, register(snapshot, "IDR1")?, register(snapshot, "IDR5")?);
    // IDR0: S2P 0, S1P 1.
    if (stage1 && !bit(idr0, 1)) || (stage2 && !bit(idr0, 0)) {
        return Ok(Some("a stage that is not implemented"));
    }
    // IDR0.ATS 10, NS1ATS 11; STE.EATS 93:92, S2S 185.
    let stall_at_stage2 = bit(ste[2], 57);
    if bit(idr0, 10) && (stage1 || stage2) {
        let eats = bits(ste[1], 29, 28);
        if eats == 2 && (!(stage1 && stage2) || stall_at_stage2 || bit(idr0, 11)) {
            return Ok(Some("EATS 0b10"));
        }
        if eats == 1 && stall_at_stage2 && stage2 {
            return Ok(Some("EATS 0b01"));
        }
    }
    // STRW 95:94 counts with stage 1 alone and IDR0.HYP 9.
    let strw = if stage1 && !stage2 && bit(idr0, 9) { bits(ste[1], 31, 30) } else { 0 };
    if strw % 2 == 1 {
        return Ok(Some("STRW"));
    }
    // S2VMID 143:128; IDR0.VMID16 18.
    if bit(idr0, 0) && (stage1 || stage2) && strw == 0 && !bit(idr0, 18) && bits(ste[2], 15, 8) != 0 {
        return Ok(Some("S2VMID"));
    }
    if stage1 {
        // S1STALLD 91; IDR0.STALL_MODEL 25:24.
        if bit(ste[1], 27) && bits(idr0, 25, 24) != 0 {
            return Ok(Some("S1STALLD"));
        }
        // IDR1.SSIDSIZE 10:6, IDR0.CD2L 19.
        let (most, max) = (bits(idr1, 10, 6), bits(ste[0], 63, 59));
        if most != 0 && max > most {
            return Ok(Some("S1CDMax"));
        }
        if most != 0 && max != 0 && !bit(idr0, 19) && [1, 2].contains(&bits(ste[0], 5, 4)) {
            return Ok(Some("S1Fmt"));
        }
        let limit = if stage2 { intermediate_bits(idr0, idr5) } else { arm_size(bits(idr5, 2, 0)) };
        if pointer(ste[0], 6) >> limit != 0 {
            return Ok(Some("S1ContextPtr"));
        }
    }
    Ok(None)
}

/// The smallest input size: TxSZ is at most 39, or with IDR3.STT (9) 48, 47 with 64K pages.
fn least_input_bits(idr3: u64, granule: u64) -> u32 {
    match (bit(idr3, 9), granule) {
        (false, _) => 25,
        (true, 65536) => 17,
        (true, _) => 16,
    }
}

/// IDR0.TTENDIAN, 22:21: 2 is little-endian alone, 3 big-endian alone.
fn endianness_allowed(idr0: u64, big: bool) -> bool {
    match bits(idr0, 22, 21) {
        2 => !big,
        3 => big,
        _ => true,
    }
}

/// Hardware updates of flags: IDR0.HTTU, 7:6, is 0 none, 1 accessed, 2 and dirty, 3 and accessed in tables.
fn hardware_updates_allowed(idr0: u64, access: bool, dirty: bool, tables: bool) -> bool {
    let httu = bits(idr0, 7, 6);
    !(((access || dirty) && httu == 0) || (dirty && httu == 1) || (tables && !access && httu == 3))
}

fn smmu(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let memory = &snapshot.memory;
    // CR0.SMMUEN, bit 0. Without it, GBPA.ABORT (bit 20) decides.
    if !bit(register(snapshot, "CR0")?, 0) {
        let gbpa = snapshot.registers.get("GBPA").copied().unwrap_or(0);
        return if bit(gbpa, 20) { blocked("SMMU disabled, GBPA.ABORT") } else { Ok(Resolution::Bypass) };
    }
    let (idr0, idr1) = (register(snapshot, "IDR0")?, register(snapshot, "IDR1")?);
    // STRTAB_BASE_CFG: LOG2SIZE 5:0, SPLIT 10:6, FMT 17:16. Reserved values of SPLIT behave as 6, those of FMT as linear; without IDR0.ST_LEVEL (28:27)
    // there is only linear.
    let config = register(snapshot, "STRTAB_BASE_CFG")?;
    let log2size = bits(config, 5, 0);
    let split = Some(bits(config, 10, 6)).filter(|split| [8, 10].contains(split)).unwrap_or(6);
    let two_levels = bits(config, 17, 16) == 1 && bits(idr0, 28, 27) != 0;
    let base = pointer(register(snapshot, "STRTAB_BASE")?, 6);
    // For the range of StreamIDs LOG2SIZE is not more than IDR1.SIDSIZE, 5:0; for the alignment of the table it is what it says.
    if id >> log2size.min(bits(idr1, 5, 0)).min(32) != 0 {
        return blocked("StreamID beyond the stream table");
    }
    let ste_address = match two_levels {
        // Linear: aligned to its size.
        false => aligned(base, log2size + 6) + id * 64,
        true => {
            // The first level is aligned to its size, at least 64 bytes.
            let descriptor = memory.read(aligned(base, (log2size.saturating_sub(split) + 3).max(6)) + (id >> split) * 8, false)?;
            // L1STD: Span 4:0, L2Ptr 51:6; the second level has 2^(Span-1) entries and is aligned to its size.
            let span = bits(descriptor, 4, 0);
            if span == 0 || span > 11 {
                return blocked("L1STD.Span is 0 or reserved");
            }
            let index = id % (1 << split);
            if span > split + 1 || index >= 1 << (span - 1) {
                return blocked("StreamID beyond L1STD.Span");
            }
            aligned(pointer(descriptor, 6), span - 1 + 6) + index * 64
        }
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
    if let Some(reason) = ste_illegal(snapshot, &ste, stage1, stage2)? {
        return blocked(reason);
    }
    let mut after = Vec::new();
    if stage2 {
        match ste_stage2(snapshot, &ste) {
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
        None => aligned(context, cd_max + 6) + substream * 64,
        Some(leaf_bits) => {
            let l1cd = aligned(context, (cd_max.saturating_sub(leaf_bits) + 3).max(6)) + (substream >> leaf_bits) * 8;
            let Some(descriptor) = fetch(l1cd)? else { return blocked("L1CD faults in stage 2") };
            // L1CD: V 0, L2Ptr 51:12.
            if !bit(descriptor, 0) {
                return blocked("L1CD.V is 0");
            }
            aligned(pointer(descriptor, 12), leaf_bits + 6) + (substream % (1 << leaf_bits)) * 64
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

/// The second-stage fields of an STE: its third and fourth word. With [`ste_illegal`], what `SteIllegal` says of them.
fn ste_stage2(snapshot: &Snapshot, ste: &[u64; 4]) -> Result<ArmStage2, Problem> {
    let (idr0, idr3, idr5) = (register(snapshot, "IDR0")?, register(snapshot, "IDR3").unwrap_or(0), register(snapshot, "IDR5")?);
    let (word, base) = (ste[2], ste[3]);
    // S2S 185; IDR0.STALL_MODEL 25:24.
    match (bits(idr0, 25, 24), bit(word, 57)) {
        (1, true) | (2, false) => return illegal("STE.S2S"),
        _ => {}
    }
    // S2AA64, bit 179: without it AArch32 tables, or 128-bit ones if IDR5.D128 (8). IDR0.TTF, 3:2.
    if !bit(word, 51) {
        if !bit(idr5, 8) && !bit(idr0, 2) {
            return illegal("STE.S2AA64");
        }
        return Err(Problem::Unsupported("stage 2 tables other than VMSAv8-64".to_string()));
    }
    if !bit(idr0, 3) {
        return illegal("STE.S2AA64");
    }
    // S2PIE, bit 188; IDR3.S2PI 19.
    if bit(word, 60) && bit(idr3, 19) {
        return Err(Problem::Unsupported("stage 2 permission indirection".to_string()));
    }
    // S2HD 183, S2HA 184, S2HAFT 187, S2ENDI 180.
    let (access, dirty) = (bit(word, 56), bit(word, 55));
    if !hardware_updates_allowed(idr0, access, dirty, bit(word, 59)) {
        return illegal("STE.S2HA");
    }
    if !endianness_allowed(idr0, bit(word, 52)) {
        return illegal("STE.S2ENDI");
    }
    // S2T0SZ 165:160, S2SL0 167:166, S2TG 175:174, S2PS 178:176.
    let Some(granule) = arm_granule(bits(word, 47, 46), idr5) else { return illegal("STE.S2TG") };
    let input_bits = 64 - bits(word, 37, 32) as u32;
    let oas = arm_size(bits(idr5, 2, 0));
    let output_bits = arm_size(bits(word, 50, 48)).min(oas);
    // S2DS, bit 195, if IDR5.DS (bit 7).
    let lpa2 = bit(base, 3) && bit(idr5, 7) && granule != 65536;
    let most = if lpa2 || granule == 65536 { 52 } else { 48 };
    if input_bits < least_input_bits(idr3, granule) || input_bits > most.min(intermediate_bits(idr0, idr5)) {
        return illegal("STE.S2T0SZ");
    }
    // DDI 0487 D8.2: S2SL0 counts downwards from level 2 (4K) or 3 (16K, 64K). With small tables 4K's value 3 is level 3. S2SL0_2, bit 194, which only 4K with
    // 52-bit addresses has, makes 0 level -1; its other values are reserved, as is 3 with 64K.
    let start_level = match (granule, bits(word, 39, 38), granule == 4096 && lpa2 && bit(base, 2)) {
        (4096, 0, true) => -1,
        (4096, _, true) | (65536, 3, _) => return illegal("STE.S2SL0"),
        (4096, 3, false) if bit(idr3, 9) => 3,
        (4096, 3, false) => return illegal("STE.S2SL0"),
        (4096, code, false) => 2 - code as i32,
        (_, code, _) => 3 - code as i32,
    };
    // S2AFFD 181, S2TTB 243:196.
    let config = ArmStage2 {
        root: table_pointer(base),
        granule,
        input_bits,
        output_bits,
        start_level,
        hardware_access: access,
        hardware_dirty: dirty,
        access_flag_disabled: bit(word, 53),
        big_endian: bit(word, 52),
        lpa2,
    };
    TableConfig::ArmStage2(config).regions()?;
    // The address as it stands, its low bits included, must be within the output size, and 48 bits if entries have no more.
    if config.root >> output_bits.min(most) != 0 {
        return illegal("STE.S2TTB");
    }
    Ok(config)
}

/// A CD, with what the STE says of privilege and regime; IHI 0070 5.4.2, `CdIllegal`.
fn cd_stage1(snapshot: &Snapshot, ste: &[u64; 4], cd: &[u64; 4]) -> Result<ArmStage1, Problem> {
    let (idr0, idr1) = (register(snapshot, "IDR0")?, register(snapshot, "IDR1")?);
    let (idr3, idr5) = (register(snapshot, "IDR3").unwrap_or(0), register(snapshot, "IDR5")?);
    let stage2 = bit(ste[0], 2);
    // V 31.
    if !bit(cd[0], 31) {
        return illegal("CD.V is 0");
    }
    // S 44, A 46; S1STALLD, STE bit 91; IDR0.TERM_MODEL 26, STALL_MODEL 25:24.
    let stall = bit(cd[0], 44);
    if stall && bit(ste[1], 27) || bits(idr0, 25, 24) == 1 && stall || bits(idr0, 25, 24) == 2 && !stall {
        return illegal("CD.S");
    }
    if bit(idr0, 26) && !bit(cd[0], 46) {
        return illegal("CD.A");
    }
    // STRW, STE bits 95:94, with stage 1 alone and IDR0.HYP 9: 0b10 is EL2, which without CR2.E2H (bit 0) has one root, and no unprivileged requests.
    let strw = if !stage2 && bit(idr0, 9) { bits(ste[1], 31, 30) } else { 0 };
    let e2h = bit(register(snapshot, "CR2").unwrap_or(0), 0);
    let el2 = strw == 2 && !e2h;
    // EPD0 14, EPD1 30.
    let (off_low, off_high) = (!el2 && bit(cd[0], 14), el2 || bit(cd[0], 30));
    // ENDI 15.
    if !(off_low && off_high) && !endianness_allowed(idr0, bit(cd[0], 15)) {
        return illegal("CD.ENDI");
    }
    // AA64 41: without it AArch32 tables, or 128-bit ones if IDR5.D128 (8). IDR0.TTF, 3:2.
    if !bit(cd[0], 41) {
        if !bit(idr5, 8) && (!bit(idr0, 2) || (strw == 2 && e2h)) {
            return illegal("CD.AA64");
        }
        return Err(Problem::Unsupported("stage 1 tables other than VMSAv8-64".to_string()));
    }
    if !bit(idr0, 3) {
        return illegal("CD.AA64");
    }
    // HD 42, HA 43, HAFT 67.
    let (access, dirty) = (bit(cd[0], 43), bit(cd[0], 42));
    if !hardware_updates_allowed(idr0, access, dirty, bit(cd[1], 3)) {
        return illegal("CD.HA");
    }
    // ASID 63:48, ignored in EL2; IDR0.ASID16 12.
    if !el2 && !bit(idr0, 12) && bits(cd[0], 63, 56) != 0 {
        return illegal("CD.ASID");
    }
    // PIE 187, if IDR3.S1PI (18) and S1PIE, STE bit 88; AIE 131, if IDR3.AIE (23).
    if bit(cd[2], 59) && bit(idr3, 18) && bit(ste[1], 24) {
        return Err(Problem::Unsupported("stage 1 permission indirection".to_string()));
    }
    if bit(cd[2], 3) && bit(idr3, 23) {
        return Err(Problem::Unsupported("attribute index extension".to_string()));
    }
    // PRIVCFG, STE bits 113:112, if IDR1.ATTR_PERMS_OVR (26): 0b11 makes every request privileged.
    let always_privileged = bit(idr1, 26) && bits(ste[1], 49, 48) == 3;
    let privileged = el2 || always_privileged;
    // PAN 40: privileged requests must not reach what unprivileged ones could.
    if !el2 && always_privileged && bit(cd[0], 40) {
        return Err(Problem::Unsupported("PAN".to_string()));
    }
    // IPS 34:32, not more than OAS.
    let output_bits = arm_size(bits(cd[0], 34, 32)).min(arm_size(bits(idr5, 2, 0)));
    // DS 186, if IDR5.DS (bit 7).
    let lpa2 = bit(cd[2], 58) && bit(idr5, 7);
    // HAD0 65 and HAD1 129 count if IDR3.HAD (bit 2); E0PD0 66 and E0PD1 130 make unprivileged requests fault if IDR3.E0PD (13).
    let had = |word: u64| bit(word, 1) && bit(idr3, 2);
    let e0pd = |word: u64| bit(word, 2) && bit(idr3, 13) && !privileged;
    // Sizes of more than 48 bits need IDR5.VAX, 11:10, and 64K pages or DS.
    let size = |granule: u64, code: u64| {
        let input_bits = 64 - code as u32;
        let wide = bits(idr5, 11, 10) != 0 && (granule == 65536 || lpa2);
        let most = if wide { 52 } else { 48 };
        Some(input_bits).filter(|bits| (least_input_bits(idr3, granule)..=most).contains(bits))
    };
    // A root as it stands, its low bits included, must be within the output size, and 48 bits if entries have no more.
    let beyond = |root: u64, granule: u64| root >> output_bits.min(if granule == 65536 || lpa2 { 52 } else { 48 }) != 0;
    let mut low = None;
    // T0SZ 5:0, TG0 7:6, TTB0 115:68, TBI0 38.
    if !off_low {
        let Some(granule) = arm_granule(bits(cd[0], 7, 6), idr5) else { return illegal("CD.TG0") };
        let Some(input_bits) = size(granule, bits(cd[0], 5, 0)) else { return illegal("CD.T0SZ") };
        let root = table_pointer(cd[1]);
        if beyond(root, granule) {
            return illegal("CD.TTB0");
        }
        let part = ArmHalf { root, granule, input_bits, top_byte_ignored: bit(cd[0], 38), hierarchical_disabled: had(cd[1]) };
        low = Some(part).filter(|_| !e0pd(cd[1]));
    }
    let mut high = None;
    // T1SZ 21:16, TG1 23:22, TTB1 179:132, TBI1 39.
    if !off_high {
        let Some(granule) = arm_granule_high(bits(cd[0], 23, 22), idr5) else { return illegal("CD.TG1") };
        let Some(input_bits) = size(granule, bits(cd[0], 21, 16)) else { return illegal("CD.T1SZ") };
        let root = table_pointer(cd[2]);
        if beyond(root, granule) {
            return illegal("CD.TTB1");
        }
        let part = ArmHalf { root, granule, input_bits, top_byte_ignored: bit(cd[0], 39), hierarchical_disabled: had(cd[2]) };
        high = Some(part).filter(|_| !e0pd(cd[2]));
    }
    if off_low && off_high {
        return illegal("both halves are off");
    }
    // AFFD 35; MAIR is the fourth word.
    let config = ArmStage1 {
        low,
        high,
        output_bits,
        mair: cd[3],
        hardware_access: access,
        hardware_dirty: dirty,
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

fn vtd_second(cap: u64, ecap: u64, root: u64, levels: u32) -> TableConfig {
    // CAP.MGAW 21:16 is one less than the width of an IOVA; CAP.SLLPS 37:34 has 2M in bit 34 and 1G in bit 35.
    let guest_width = bits(cap, 21, 16) as u32 + 1;
    TableConfig::VtdSecond(VtdSecond {
        root,
        levels,
        input_bits: guest_width.min(12 + 9 * levels),
        output_bits: 52,
        large_2m: bit(cap, 34),
        large_1g: bit(cap, 35),
        // ECAP.SC.
        snoop_control: bit(ecap, 7),
    })
}

fn page_pointer(word: u64) -> u64 {
    bits(word, 63, 12) << 12
}

/// Whether any of the bits `high..=low` is set.
fn any(word: u64, high: u32, low: u32) -> bool {
    bits(word, high, low) != 0
}

/// The host address width, from which on pointers are reserved. No register says it: 48, or CAP.MGAW if that is more.
fn vtd_host_bits(cap: u64) -> u32 {
    (bits(cap, 21, 16) as u32 + 1).clamp(48, 52)
}

/// Domain ids have 4 + 2 * CAP.ND (2:0) bits.
fn vtd_domain_illegal(cap: u64, domain: u64) -> bool {
    domain >> (4 + 2 * bits(cap, 2, 0)).min(16) != 0
}

fn vtd(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let memory = &snapshot.memory;
    let cap = register(snapshot, "CAP")?;
    let ecap = register(snapshot, "ECAP")?;
    // GSTS.TES, bit 31.
    if !bit(register(snapshot, "GSTS")?, 31) {
        return Ok(Resolution::Bypass);
    }
    if id > 0xffff {
        return blocked("not a requester id");
    }
    let (bus, function) = (id >> 8, id % 256);
    // RTADDR: SSIRWE 7 (if ECAP.SSIRWS, 57), TTM 11:10, table 63:12.
    let rtaddr = register(snapshot, "RTADDR")?;
    let io_permissions = bit(rtaddr, 7) && bit(ecap, 57);
    let root_entry = page_pointer(rtaddr) + bus * 16;
    match bits(rtaddr, 11, 10) {
        0 => {
            if io_permissions {
                return blocked("I/O permissions in legacy mode");
            }
            if pasid.is_some() {
                return blocked("PASID in legacy mode");
            }
            // Root entry: present 0, context table 63:12, the rest reserved. 256 context entries of 16 bytes.
            let (root, reserved) = (memory.read(root_entry, false)?, memory.read(root_entry + 8, false)?);
            if !bit(root, 0) {
                return blocked("root entry not present");
            }
            if any(root, 11, 1) || any(root, 63, vtd_host_bits(cap)) || reserved != 0 {
                return blocked("reserved bits of the root entry");
            }
            let context_entry = page_pointer(root) + function * 16;
            let (low, high) = (memory.read(context_entry, false)?, memory.read(context_entry + 8, false)?);
            // Context entry: P 0, FPD 1, TT 3:2, SSPTPTR 63:12, AW 66:64, ignored 70:67, DID 87:72.
            if !bit(low, 0) {
                return blocked("context entry not present");
            }
            let reserved = any(low, 11, 4) || any(low, 63, vtd_host_bits(cap)) || bit(high, 7) || any(high, 63, 24);
            if reserved || vtd_domain_illegal(cap, bits(high, 23, 8)) {
                return blocked("reserved bits of the context entry");
            }
            let Some(levels) = vtd_levels(bits(high, 2, 0), cap) else { return blocked("context entry's AW") };
            // TT 1 is for units with device TLBs (ECAP.DT, 2), TT 2 with pass-through (ECAP.PT, 6).
            match bits(low, 3, 2) {
                0 => Ok(Resolution::Tables(vec![vtd_second(cap, ecap, page_pointer(low), levels)])),
                1 if bit(ecap, 2) => Ok(Resolution::Tables(vec![vtd_second(cap, ecap, page_pointer(low), levels)])),
                2 if bit(ecap, 6) => Ok(Resolution::Bypass),
                _ => blocked("context entry's TT"),
            }
        }
        // ECAP.SMTS, 43.
        1 if bit(ecap, 43) => {
            let resolution = vtd_scalable(memory, cap, ecap, root_entry, function, pasid)?;
            if io_permissions
                && matches!(&resolution, Resolution::Tables(stages) if stages.iter().any(|stage| matches!(stage, TableConfig::VtdSecond(_))))
            {
                return Err(Problem::Unsupported("I/O permissions".to_string()));
            }
            Ok(resolution)
        }
        1 => blocked("a unit without scalable mode"),
        3 => blocked("RTADDR.TTM aborts"),
        _ => blocked("RTADDR.TTM is reserved"),
    }
}

fn vtd_scalable(memory: &Memory, cap: u64, ecap: u64, root_entry: u64, function: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
    let host_bits = vtd_host_bits(cap);
    // Scalable root entry: LP 0, LCTP 63:12 for functions 0 to 127; UP 64, UCTP 127:76 for the others. Context entries have 32 bytes.
    let halves = [memory.read(root_entry, false)?, memory.read(root_entry + 8, false)?];
    let root = halves[(function / 128) as usize];
    if !bit(root, 0) {
        return blocked("root entry not present");
    }
    if halves.iter().any(|half| bit(*half, 0) && (any(*half, 11, 1) || any(*half, 63, host_bits))) {
        return blocked("reserved bits of the root entry");
    }
    let context_entry = page_pointer(root) + (function % 128) * 32;
    let low = memory.read(context_entry, false)?;
    let high = memory.read(context_entry + 8, false)?;
    let rest = memory.read(context_entry + 16, false)? | memory.read(context_entry + 24, false)?;
    // Scalable context entry: P 0, FPD 1, DTE 2, PASIDE 3, PRE 4, HPTE 5, EPTR 6, PDTS 11:9, PASIDDIRPTR 63:12, RID_PASID 83:64, RID_PRIV 84.
    if !bit(low, 0) {
        return blocked("context entry not present");
    }
    // What a capability allows: ECAP.DT 2, PASID 40, PRS 29, HPTS 55, PTRS 56, RPS 49, RPRIVS 53.
    let without = |capability: u32, set: bool| set && !bit(ecap, capability);
    let mut reserved = any(low, 8, 7) || any(low, 63, host_bits) || any(high, 63, 21) || rest != 0;
    reserved |= without(2, bit(low, 2)) || without(40, bit(low, 3)) || without(29, bit(low, 4)) || without(55, bit(low, 5));
    reserved |= without(56, bit(low, 6)) || without(49, any(high, 19, 0)) || without(53, bit(high, 20));
    if reserved {
        return blocked("reserved bits of the context entry");
    }
    // Page requests need a device TLB; PASIDs in translated requests need PASIDs.
    if (bit(low, 4) && !bit(low, 2)) || (bit(low, 6) && !bit(low, 3)) {
        return blocked("context entry contradicts itself");
    }
    let own = bits(high, 19, 0);
    // A directory of 2^(PDTS+7) entries, each with a table of 64 PASID entries of 64 bytes.
    let beyond = |pasid: u64| (pasid >> 6) >> (bits(low, 11, 9) + 7) != 0;
    if beyond(own) {
        return blocked("RID_PASID beyond the directory");
    }
    // ECAP.PSS, 39:35, is one less than the number of PASID bits.
    let pasid = match pasid {
        Some(_) if !bit(low, 3) => return blocked("PASIDs disabled"),
        Some(pasid) if beyond(pasid) || pasid == own || pasid >> (bits(ecap, 39, 35) + 1).min(20) != 0 => return blocked("PASID out of range"),
        Some(pasid) => pasid,
        None => own,
    };
    let directory = memory.read(page_pointer(low).wrapping_add((pasid >> 6) * 8), false)?;
    if !bit(directory, 0) {
        return blocked("PASID directory entry not present");
    }
    if any(directory, 11, 2) || any(directory, 63, host_bits) {
        return blocked("reserved bits of the PASID directory entry");
    }
    let mut words = [0; 8];
    for (index, word) in words.iter_mut().enumerate() {
        *word = memory.read(page_pointer(directory) + (pasid % 64) * 64 + index as u64 * 8, false)?;
    }
    let (first, third) = (words[0], words[2]);
    // PASID entry: P 0, FPD 1, AW 4:2, PGTT 8:6, SSADE 9, SSPTPTR 63:12; DID 79:64, PWSNP 87, PGSNP 88, CD 89, EMTE 90, PAT 127:96; SRE 128, FSPM 131:130,
    // WPE 132, ignored 134:133, EAFE 135, FSPTPTR 191:140; then host permission tables: enable and type 258:256, pointer 319:268, domain 335:320.
    if !bit(first, 0) {
        return blocked("PASID entry not present");
    }
    let mut reserved = bit(first, 5) || any(first, 11, 10) || any(first, 63, host_bits) || any(words[1], 22, 16) || any(words[1], 31, 27);
    reserved |= bit(third, 1) || any(third, 11, 8) || any(third, 63, host_bits) || words[3] != 0 || any(words[4], 11, 3) || any(words[5], 63, 16);
    reserved |= words[6] != 0 || words[7] != 0;
    // ECAP.SMPWCS 48, SC 7, MTS 25, HPTS 55.
    let memory_type = any(words[1], 26, 25) || any(words[1], 63, 32);
    reserved |= without(48, bit(words[1], 23)) || without(7, bit(words[1], 24)) || without(25, memory_type);
    reserved |= without(55, words[4] != 0 || words[5] != 0) || any(words[4], 63, host_bits);
    if reserved || vtd_domain_illegal(cap, bits(words[1], 15, 0)) {
        return blocked("reserved bits of the PASID entry");
    }
    let second_stage = || vtd_levels(bits(first, 4, 2), cap).map(|levels| vtd_second(cap, ecap, page_pointer(first), levels));
    let first_stage = || {
        // CAP.FS5LP, bit 60; CAP.FS1GP, bit 56.
        let levels = match bits(third, 3, 2) {
            0 => 4,
            1 if bit(cap, 60) => 5,
            _ => return None,
        };
        // Bit 133 was NXE, and without it bit 63 of an entry was reserved. Both are ignored since requests to execute are no longer part of the architecture.
        let large_1g = bit(cap, 56);
        Some(TableConfig::VtdFirst(VtdFirst { root: page_pointer(third), levels, output_bits: 52, large_1g, execute_disable: true }))
    };
    // ECAP.FSTS 47, SSTS 46, NEST 26, PT 6. Fields of a stage that is not used do not matter.
    let (kind, capability) = match bits(first, 8, 6) {
        1 => ((true, false), 47),
        2 => ((false, true), 46),
        3 => ((true, true), 26),
        4 => ((false, false), 6),
        _ => return blocked("PASID entry's PGTT"),
    };
    if !bit(ecap, capability) {
        return blocked("PASID entry's PGTT");
    }
    // ECAP.SSADS 45; SRS 31, EAFS 34.
    if kind.1 && without(45, bit(first, 9)) || kind.0 && (without(31, bit(third, 0)) || without(34, bit(third, 7))) {
        return blocked("a feature that the unit does not have");
    }
    let mut stages = Vec::new();
    if kind.0 {
        stages.push(first_stage());
    }
    if kind.1 {
        stages.push(second_stage());
    }
    let Some(stages) = stages.into_iter().collect::<Option<Vec<TableConfig>>>() else { return blocked("PASID entry's levels") };
    // RID_PRIV, 84 of the context entry: requests without PASID are privileged, which SRE must allow.
    if bit(high, 20) && pasid == own {
        if !bit(third, 0) {
            return blocked("privileged requests without SRE");
        }
        if kind.0 {
            return Err(Problem::Unsupported("RID_PRIV".to_string()));
        }
    }
    if let [TableConfig::VtdFirst(first), TableConfig::VtdSecond(second)] = stages.as_slice()
        && first.root >> second.input_bits != 0
    {
        return blocked("the first stage's table is beyond the second stage's input");
    }
    Ok(if stages.is_empty() { Resolution::Bypass } else { Resolution::Tables(stages) })
}
