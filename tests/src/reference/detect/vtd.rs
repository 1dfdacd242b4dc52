//! VT-d: root, context and PASID tables.
//!
//! Source: Intel VT-d sections 3.4, 9.1 to 9.6 and 11.4.

use super::{Resolution, any, blocked, register};
use crate::reference::snapshot::{Memory, Snapshot};
use crate::reference::tables::{TableConfig, VtdFirst, VtdSecond};
use crate::reference::{Problem, bit, bits};

/// AW in context and PASID entries: 1, 2, 3 are 3, 4, 5 levels; CAP.SAGAW (12:8) has one bit for each.
fn vtd_levels(code: u64, cap: u64) -> Option<u32> {
    if (1..=3).contains(&code) && bit(cap, 8 + code as u32) { Some(code as u32 + 2) } else { None }
}

fn vtd_second(cap: u64, ecap: u64, scalable: bool, root: u64, levels: u32, accessed_dirty: bool) -> TableConfig {
    // CAP.MGAW 21:16 is one less than the width of an IOVA; CAP.SLLPS 37:34 has 2M in bit 34 and 1G in bit 35.
    let guest_width = bits(cap, 21, 16) as u32 + 1;
    TableConfig::VtdSecond(VtdSecond {
        root,
        levels,
        input_bits: guest_width.min(12 + 9 * levels),
        output_bits: 52,
        large_2m: bit(cap, 34),
        large_1g: bit(cap, 35),
        // ECAP.SC; or scalable mode, where Linux 5.13 takes it for granted and QEMU ignores the bit.
        snoop_control: bit(ecap, 7) || scalable,
        accessed_dirty,
    })
}

fn page_pointer(word: u64) -> u64 {
    bits(word, 63, 12) << 12
}

/// The host address width, from which on pointers are reserved. No register says it: 48, or CAP.MGAW if that is more.
fn vtd_host_bits(cap: u64) -> u32 {
    (bits(cap, 21, 16) as u32 + 1).clamp(48, 52)
}

/// Domain ids have 4 + 2 * CAP.ND (2:0) bits.
fn vtd_domain_illegal(cap: u64, domain: u64) -> bool {
    domain >> (4 + 2 * bits(cap, 2, 0)).min(16) != 0
}

pub(super) fn vtd(snapshot: &Snapshot, id: u64, pasid: Option<u64>) -> Result<Resolution, Problem> {
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
                0 => Ok(Resolution::Tables(vec![vtd_second(cap, ecap, false, page_pointer(low), levels, false)])),
                1 if bit(ecap, 2) => Ok(Resolution::Tables(vec![vtd_second(cap, ecap, false, page_pointer(low), levels, false)])),
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
    // ECAP.SMPWCS 48, MTS 25, HPTS 55. PGSNP without SC: as with the leaves of the second stage.
    let memory_type = any(words[1], 26, 25) || any(words[1], 63, 32);
    reserved |= without(48, bit(words[1], 23)) || without(25, memory_type);
    reserved |= without(55, words[4] != 0 || words[5] != 0) || any(words[4], 63, host_bits);
    if reserved || vtd_domain_illegal(cap, bits(words[1], 15, 0)) {
        return blocked("reserved bits of the PASID entry");
    }
    let second_stage = || vtd_levels(bits(first, 4, 2), cap).map(|levels| vtd_second(cap, ecap, true, page_pointer(first), levels, bit(first, 9)));
    let first_stage = || {
        // CAP.FS5LP, bit 60; CAP.FS1GP, bit 56.
        let levels = match bits(third, 3, 2) {
            0 => 4,
            1 if bit(cap, 60) => 5,
            _ => return None,
        };
        // Bit 133 was NXE, and without it bit 63 of an entry was reserved. Both are ignored since requests to execute are no longer part of the architecture.
        let large_1g = bit(cap, 56);
        Some(TableConfig::VtdFirst(VtdFirst {
            root: page_pointer(third),
            levels,
            output_bits: 52,
            large_1g,
            execute_disable: true,
            extended_access: bit(third, 7),
        }))
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
