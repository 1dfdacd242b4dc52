//! VT-d: fault recording registers.
//!
//! Source: Intel D51397 sections 7.1.3 (fault conditions) and 11.4.14 (FRCD_REG).

use super::path::Path;
use super::{Answer, Cause, Fetch, Refused, Request, Told, Unit, field, flag};
use crate::reference::detect::{self, Resolution};
use crate::reference::tables::TableConfig;
use crate::reference::{Problem, bit, bits};

/// FI 63:12: the page. SID 79:64, T2 92, PRIV 93, EXE 94, PP 95, FR 103:96, PV 123:104, AT 125:124, T1 126 for reads, F 127. EXE, PRIV and PV go with PP.
fn record(reason: u64, request: &Request) -> Told {
    let mut high = field(request.id, 15, 0) | field(reason, 39, 32) | flag(request.reads(), 62) | 1 << 63;
    if let Some(pasid) = request.pasid {
        high |= flag(request.privileged, 29) | flag(request.executes(), 30) | 1 << 31 | field(pasid.into(), 59, 40);
    }
    let told = Told::record(&[request.iova >> 12 << 12, high]);
    if request.pasid.is_some() { told } else { told.without(1, 59, 40).without(1, 30, 29) }
}

fn records(reasons: &[u64], request: &Request) -> Vec<Told> {
    reasons.iter().map(|reason| record(*reason, request)).collect()
}

pub(super) fn expected(unit: &Unit<'_>, request: &Request) -> Result<Option<Answer>, Problem> {
    // GSTS.TES.
    if !bit(unit.register("GSTS"), 31) {
        return Ok(None);
    }
    // RTADDR: TTM 11:10, table 63:12.
    let root = unit.register("RTADDR");
    match bits(root, 11, 10) {
        0 => legacy(unit, request, root >> 12 << 12),
        1 => scalable(unit, request, root >> 12 << 12),
        mode => Err(Problem::Unsupported(format!("TTM {mode}"))),
    }
}

/// A fault of a structure: always told, or unless FPD of a structure says otherwise ("qualified").
fn structure(why: &str, reasons: &[u64], request: &Request, quiet: bool) -> Option<Answer> {
    let told = if quiet { vec![Told::Nothing] } else { records(reasons, request) };
    Some(Answer::new(format!("{why}, quiet: {quiet}"), told))
}

fn legacy(unit: &Unit<'_>, request: &Request, table: u64) -> Result<Option<Answer>, Problem> {
    if request.pasid.is_some() {
        // RTA.2: a request with PASID. Table 26 has it for legacy mode of units with scalable mode; others know no such request.
        return Ok(structure("PASID in legacy mode", &[0x31], request, false));
    }
    let Some(root) = unit.words::<2>(table + (request.id >> 8) * 16)? else { return Ok(structure("LRT.1", &[0x08], request, false)) };
    if !bit(root[0], 0) {
        return Ok(structure("LRT.2", &[0x01], request, false));
    }
    let resolution = detect::resolve_pasid(unit.snapshot, request.id, None);
    let reason = if let Ok(Resolution::Blocked(reason)) = &resolution { reason.as_str() } else { "" };
    if reason.contains("root entry") {
        return Ok(structure("LRT.3", &[0x0a], request, false));
    }
    let Some(context) = unit.words::<2>((root[0] >> 12 << 12) + (request.id & 0xff) * 16)? else {
        return Ok(structure("LCT.1", &[0x09], request, false));
    };
    // FPD counts whether the entry is present or not.
    let quiet = bit(context[0], 1);
    if !bit(context[0], 0) {
        return Ok(structure("LCT.2", &[0x02], request, quiet));
    }
    if reason.contains("reserved bits of the context entry") {
        // AW and TT may be wrong as well.
        return Ok(structure("LCT.3", &[0x0b, 0x03], request, quiet));
    }
    if reason.contains("AW") || reason.contains("TT") {
        return Ok(structure("LCT.4", &[0x03], request, quiet));
    }
    let stages = match resolution? {
        Resolution::Tables(stages) => stages,
        Resolution::Bypass => return pass_through(unit, request, 0x04, quiet),
        other => return Err(Problem::Unsupported(format!("{other:?}"))),
    };
    Ok(Path::new(unit, &stages)?.request(request)?.err().and_then(|refused| {
        let mut reasons = Vec::new();
        for cause in &refused.causes {
            reasons.push(match cause {
                Cause::Range => 0x04,
                Cause::Absent | Cause::Permission if request.writes() => 0x05,
                Cause::Absent | Cause::Permission => 0x06,
                // LCT.4.3 through SSPTPTR, LSS.1 through an entry.
                Cause::Unreadable(address) if may_be_reserved(*address) => 0x0c,
                Cause::Unreadable(_) if refused.depth == 0 => 0x03,
                Cause::Unreadable(_) => 0x07,
                _ => 0x0c,
            });
        }
        structure(&format!("{refused:x?}"), &reasons, request, quiet)
    }))
}

/// Bits beyond the host's address width are reserved in entries. No register says it; it is 48 at least.
fn may_be_reserved(address: u64) -> bool {
    address >> 48 != 0
}

/// Addresses that no memory has.
fn pass_through(unit: &Unit<'_>, request: &Request, reason: u64, quiet: bool) -> Result<Option<Answer>, Problem> {
    let width = bits(unit.register("CAP"), 21, 16) + 1;
    // Nothing says how wide the host's addresses are but that they are wider than this.
    if request.iova >> width != 0 {
        return Ok(structure("beyond what passes", &[reason, if reason == 0x04 { 0x04 } else { 0x84 }], request, quiet));
    }
    Ok(None)
}

fn scalable(unit: &Unit<'_>, request: &Request, table: u64) -> Result<Option<Answer>, Problem> {
    let (bus, function) = (request.id >> 8, request.id & 0xff);
    // Lower and upper half of the root entry.
    let Some(root) = unit.words::<2>(table + bus * 16)? else { return Ok(structure("SRT.1", &[0x38], request, false)) };
    let root = root[(function / 128) as usize];
    if !bit(root, 0) {
        return Ok(structure("SRT.2", &[0x39], request, false));
    }
    let resolution = detect::resolve_pasid(unit.snapshot, request.id, request.pasid.map(u64::from));
    let reason = if let Ok(Resolution::Blocked(reason)) = &resolution { reason.as_str() } else { "" };
    if reason.contains("root entry") {
        return Ok(structure("SRT.3", &[0x3a], request, false));
    }
    let Some(context) = unit.words::<4>((root >> 12 << 12) + function % 128 * 32)? else {
        return Ok(structure("SCT.1", &[0x40], request, false));
    };
    let quiet = bit(context[0], 1);
    if !bit(context[0], 0) {
        return Ok(structure("SCT.2", &[0x41], request, quiet));
    }
    if reason.contains("reserved bits of the context entry") || reason.contains("contradicts") {
        return Ok(structure("SCT.3, SCT.4", &[0x42, 0x43], request, quiet));
    }
    // PASIDE 3, PDTS 11:9, RID_PASID 83:64.
    let own = bits(context[1], 19, 0);
    let beyond = |pasid: u64| (pasid >> 6) >> (bits(context[0], 11, 9) + 7) != 0;
    if beyond(own) {
        return Ok(structure("SCT.4", &[0x43], request, quiet));
    }
    let pasid = match request.pasid.map(u64::from) {
        Some(_) if !bit(context[0], 3) => return Ok(structure("SCT.6", &[0x45], request, quiet)),
        // A PASID that is also that of requests without one.
        Some(pasid) if pasid == own => return Ok(structure("SCT.9", &[0x48], request, quiet)),
        Some(pasid) if beyond(pasid) || reason.contains("PASID out of range") => return Ok(structure("SCT.7", &[0x46], request, quiet)),
        Some(pasid) => pasid,
        None => own,
    };
    let Some(directory) = unit.read((context[0] >> 12 << 12) + (pasid >> 6) * 8)? else {
        return Ok(structure("SPD.1", &[0x50], request, false));
    };
    // FPD 1.
    let quiet = quiet || bit(directory, 1);
    if !bit(directory, 0) {
        return Ok(structure("SPD.2", &[0x51], request, quiet));
    }
    if reason.contains("PASID directory entry") {
        return Ok(structure("SPD.3", &[0x52], request, quiet));
    }
    let Some(entry) = unit.words::<8>((directory >> 12 << 12) + pasid % 64 * 64)? else {
        return Ok(structure("SPT.1", &[0x58], request, false));
    };
    let quiet = quiet || bit(entry[0], 1);
    if !bit(entry[0], 0) {
        return Ok(structure("SPT.2", &[0x59], request, quiet));
    }
    match reason {
        "" => {}
        "reserved bits of the PASID entry" => return Ok(structure("SPT.3, SPT.4", &[0x5a, 0x5b], request, quiet)),
        // A field of a capability that there is not is "treated as Reserved(0)", and the programming is invalid.
        "a feature that the unit does not have" => return Ok(structure("SPT.3, SPT.4", &[0x5a, 0x5b], request, quiet)),
        // Or what its access ends in: nothing says when a root that no input of the second stage can be is found.
        "the first stage's table is beyond the second stage's input" => {
            return Ok(structure(reason, &[0x5b, 0x73, 0x74, 0x84], request, quiet));
        }
        _ => return Ok(structure("SPT.4", &[0x5b], request, quiet)),
    }
    // SRE 128: privileged requests with PASID, whatever is behind the entry.
    if request.privileged && request.pasid.is_some() && !bit(entry[2], 0) {
        return Ok(structure("SPT.6", &[0x5d], request, quiet));
    }
    let stages = match resolution? {
        Resolution::Tables(stages) => stages,
        Resolution::Bypass => return pass_through(unit, request, 0x83, quiet),
        other => return Err(Problem::Unsupported(format!("{other:?}"))),
    };
    let refused = Path::new(unit, &stages)?.request(request)?.err();
    Ok(refused.and_then(|refused| structure(&format!("{refused:x?}"), &walked(&stages, request, &refused), request, quiet)))
}

/// Reasons for a walk that ends: of tables of the first stage (SFS), of the second (SSS), of either (SGN).
fn walked(stages: &[TableConfig], request: &Request, refused: &Refused) -> Vec<u64> {
    let first = matches!(stages[refused.stage], TableConfig::VtdFirst(_));
    let mut reasons = Vec::new();
    for cause in &refused.causes {
        match (first, cause, refused.fetch) {
            (true, Cause::Canonical, _) => reasons.push(0x80),
            (true, Cause::Absent, _) => reasons.push(0x71),
            (true, Cause::Privilege, _) => reasons.push(0x81),
            // SFS.4 through FSPTPTR, SFS.1 through an entry.
            (true, Cause::Unreadable(address), _) => {
                reasons.push(if refused.depth == 0 { 0x73 } else { 0x70 });
                // Of the entry that has the address: of this stage, or of the one behind it.
                let reserved = if stages.len() == 2 { 0x7a } else { 0x72 };
                reasons.extend(Some(reserved).filter(|_| may_be_reserved(*address)));
            }
            (true, Cause::Permission, _) => reasons.push(if request.writes() { 0x85 } else { 0x86 }),
            (true, ..) => reasons.push(0x72),
            // SSS.2: neither R nor W in an entry, or in all of them together.
            (false, Cause::Absent, None) => reasons.push(0x79),
            // Then there is no permission to read the first stage's entry as well: SFS.6, SFS.7.
            (false, Cause::Absent, Some(Fetch::Entry { depth: 0, .. })) => reasons.extend([0x79, 0x75]),
            (false, Cause::Absent, Some(_)) => reasons.extend([0x79, 0x76]),
            // SFS.5: an entry of the first stage points to where no input of the second is; SGN.5 of any such input.
            (false, Cause::Range, fetch) => {
                reasons.push(0x84);
                reasons.extend(Some(0x74).filter(|_| fetch.is_some()));
                reasons.extend(Some(0x72).filter(|_| refused.stage == 1 && may_be_reserved(refused.input)));
            }
            (false, Cause::Unreadable(address), _) => {
                reasons.push(if refused.depth == 0 { 0x7b } else { 0x78 });
                reasons.extend(Some(0x7a).filter(|_| may_be_reserved(*address)));
            }
            // SFS.6 of the first table, SFS.7 of the others, SFS.8 of marks.
            (false, Cause::Permission, Some(Fetch::Entry { writes: true, .. })) => reasons.push(0x77),
            (false, Cause::Permission, Some(Fetch::Entry { depth: 0, .. })) => reasons.push(0x75),
            (false, Cause::Permission, Some(_)) => reasons.push(0x76),
            (false, Cause::Permission, None) => reasons.push(if request.writes() { 0x85 } else { 0x86 }),
            (false, ..) => reasons.push(0x7a),
        }
    }
    // U/S and R/W of the first stage's entries, up to one that the second stage keeps from being read, or marked: nothing says when they count.
    for cause in &refused.before {
        reasons.push(match cause {
            Cause::Privilege => 0x81,
            _ if request.writes() => 0x85,
            _ => 0x86,
        });
    }
    // Nothing says which is found first: that a page is not allowed, or that it is at no input of the second stage (SGN.5).
    if first && stages.len() == 2 && refused.causes.iter().any(|cause| matches!(cause, Cause::Permission | Cause::Privilege)) {
        reasons.push(0x84);
    }
    // Together entries may leave nothing, where one by one they left something.
    if !first && refused.causes.contains(&Cause::Permission) {
        reasons.push(0x79);
    }
    reasons
}
