//! SMMUv3: stream tables and context descriptors.
//!
//! Source: Arm IHI 0070 sections 3.3, 5.1 to 5.4 and 6.3.

use super::{Resolution, blocked, illegal, register};
use crate::reference::snapshot::Snapshot;
use crate::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig};
use crate::reference::walk::Walker;
use crate::reference::{Problem, bit, bits};

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

/// OAS itself, for addresses that are in no table.
fn arm_physical_bits(idr5: u64) -> u32 {
    if bits(idr5, 2, 0) == 7 { 56 } else { arm_size(bits(idr5, 2, 0)) }
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
    let oas = arm_physical_bits(idr5);
    if bit(idr0, 2) { oas.max(40) } else { oas }
}

/// IHI 0070 5.2.2, `SteIllegal`, for a Non-secure STE that is valid and translates or bypasses; what belongs to stage 2's tables is in [`ste_stage2`].
fn ste_illegal(snapshot: &Snapshot, ste: &[u64; 6], stage1: bool, stage2: bool) -> Result<Option<&'static str>, Problem> {
    let (idr0, idr1, idr5) = (register(snapshot, "IDR0")?, register(snapshot, "IDR1")?, register(snapshot, "IDR5")?);
    let idr3 = register(snapshot, "IDR3").unwrap_or(0);
    // IDR0: S2P 0, S1P 1.
    if (stage1 && !bit(idr0, 1)) || (stage2 && !bit(idr0, 0)) {
        return Ok(Some("a stage that is not implemented"));
    }
    // IDR0.ATS 10, NS1ATS 11; STE.EATS 93:92, S2S 185.
    let stall_at_stage2 = bit(ste[2], 57);
    // STRW 95:94 counts with stage 1 alone and IDR0.HYP 9.
    let strw = if stage1 && !stage2 && bit(idr0, 9) { bits(ste[1], 31, 30) } else { 0 };
    if bit(idr0, 10) && (stage1 || stage2) {
        let eats = bits(ste[1], 29, 28);
        if eats == 2 && (!(stage1 && stage2) || stall_at_stage2 || bit(idr0, 11)) {
            return Ok(Some("EATS 0b10"));
        }
        if eats == 1 && stall_at_stage2 && stage2 {
            return Ok(Some("EATS 0b01"));
        }
        // IDR3.DPT 15. Without it the value behaves as 0.
        if eats == 3 && bit(idr3, 15) && (strw != 0 || (stall_at_stage2 && stage2)) {
            return Ok(Some("EATS 0b11"));
        }
    }
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
        let limit = if stage2 { intermediate_bits(idr0, idr5) } else { arm_physical_bits(idr5) };
        if pointer(ste[0], 6) >> limit != 0 {
            return Ok(Some("S1ContextPtr"));
        }
        // VMSPtr 375:332 is used with both stages, S1MPAM 90 and IDR3.MPAM 7.
        if stage2 && bit(ste[1], 26) && bit(idr3, 7) && pointer(ste[5], 12) >> arm_physical_bits(idr5) != 0 {
            return Ok(Some("VMSPtr"));
        }
    }
    // INSTCFG 115:114 counts with IDR1.ATTR_PERMS_OVR 26: 0b11 makes fetches of reads.
    if (stage1 || stage2) && bit(idr1, 26) && bits(ste[1], 51, 50) == 3 {
        return Err(Problem::Unsupported("INSTCFG".to_string()));
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

pub(super) fn smmu(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
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
        memory.read(ste_address + 32, false)?,
        memory.read(ste_address + 40, false)?,
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
            stages => match Walker::new(memory, stages)?.fetch(address) {
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

/// The second-stage fields of an STE: its third and fourth word. With [`ste_illegal`], what `SteIllegal` says of them.
fn ste_stage2(snapshot: &Snapshot, ste: &[u64; 6]) -> Result<ArmStage2, Problem> {
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
    // S2PIE, bit 188; IDR3.S2PI 19. S2POE, bit 189, which needs it; IDR3.S2PO 20.
    let indirect = bit(word, 60) && bit(idr3, 19);
    if bit(word, 61) && bit(idr3, 20) && !indirect {
        return illegal("STE.S2POE");
    }
    // AssuredOnly 329, TL0 330, TL1 331; IDR3.THE 21.
    if !indirect && bit(idr3, 21) && bits(ste[5], 11, 9) != 0 {
        return Err(Problem::Unsupported("translation hardening".to_string()));
    }
    if indirect {
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
    // `AArch64.S2InvalidSL`: the larger first tables are for units with larger addresses.
    let least = match (granule, start_level) {
        (4096, 0) | (65536, 1) => 44,
        (16384, 1) => 42,
        _ => 32,
    };
    if oas < least {
        return illegal("STE.S2SL0");
    }
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
        hardware_tables: access && bit(word, 59) && bits(idr0, 7, 6) == 3,
        big_endian: bit(word, 52),
        lpa: granule == 65536 && oas == 52,
        lpa2,
        // S2PTW 182, of a stream with two stages: Config, 3:1.
        protected_walk: bit(word, 54) && bit(ste[0], 1),
    };
    TableConfig::ArmStage2(config).regions()?;
    // The address as it stands, its low bits included, must be within the output size, and 48 bits if entries have no more.
    if config.root >> output_bits.min(most) != 0 {
        return illegal("STE.S2TTB");
    }
    Ok(config)
}

/// A CD, with what the STE says of privilege and regime; IHI 0070 5.4.2, `CdIllegal`.
fn cd_stage1(snapshot: &Snapshot, ste: &[u64; 6], cd: &[u64; 4]) -> Result<ArmStage1, Problem> {
    let (idr0, idr1) = (register(snapshot, "IDR0")?, register(snapshot, "IDR1")?);
    let (idr3, idr5) = (register(snapshot, "IDR3").unwrap_or(0), register(snapshot, "IDR5")?);
    let stage2 = bit(ste[0], 2);
    // V 31.
    if !bit(cd[0], 31) {
        return illegal("CD.V is 0");
    }
    // S 44, A 46; S1STALLD, STE bit 91; IDR0.TERM_MODEL 26, STALL_MODEL 25:24.
    let illegal_stall = match (bits(idr0, 25, 24), bit(cd[0], 44)) {
        (1, true) | (2, false) => true,
        (_, stall) => stall && bit(ste[1], 27),
    };
    if illegal_stall {
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
    let any_half = !off_low || !off_high;
    if any_half && !endianness_allowed(idr0, bit(cd[0], 15)) {
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
    if !any_half {
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
        hardware_tables: access && bit(cd[1], 3) && bits(idr0, 7, 6) == 3,
        big_endian: bit(cd[0], 15),
        lpa: arm_size(bits(idr5, 2, 0)) == 52 && [low, high].into_iter().flatten().any(|half| half.granule == 65536),
        lpa2,
        privileged,
    };
    TableConfig::ArmStage1(config).regions()?;
    Ok(config)
}
