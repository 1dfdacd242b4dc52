//! RISC-V: records of the fault queue.
//!
//! Source: RISC-V IOMMU Architecture Specification 1.0, "Process to translate an IOVA" and those that it calls, and "Fault/Event-Queue".

use super::path::Path;
use super::{Answer, Cause, Fetch, Kind, Refused, Request, Told, Unit, field, flag};
use crate::reference::detect::{self, Resolution};
use crate::reference::tables::{RiscvSecond, TableConfig};
use crate::reference::{Problem, bit, bits};

const ALL_DISALLOWED: u64 = 256;
const DDT_LOAD: u64 = 257;
const DDT_INVALID: u64 = 258;
const DDT_MISCONFIGURED: u64 = 259;
const DISALLOWED: u64 = 260;
const PDT_LOAD: u64 = 265;
const PDT_INVALID: u64 = 266;
const PDT_MISCONFIGURED: u64 = 267;

/// CAUSE 11:0, PID 31:12, PV 32, PRIV 33, TTYP 39:34, DID 63:40; iotval; iotval2. PID and PRIV are zero without PV. Page offsets may be zero; 95:64 are custom.
fn record(cause: u64, request: &Request, second: Option<u64>) -> Vec<Told> {
    // Untranslated: execute 1, read 2, write 3.
    let kind = match request.kind {
        Kind::Execute => 1,
        Kind::Read => 2,
        Kind::Write => 3,
    };
    let mut word = cause | field(kind, 39, 34) | field(request.id, 63, 40);
    if let Some(process) = request.pasid {
        word |= field(process.into(), 31, 12) | 1 << 32 | flag(request.privileged, 33);
    }
    let told = Told::record(&[word, 0, request.iova, second.unwrap_or(0)]).without(1, 31, 0);
    let page = Told::record(&[word, 0, request.iova & !0xfff, second.map_or(0, |second| second & !0xffc)]).without(1, 31, 0);
    vec![told, page]
}

/// Access fault, page fault and guest page fault of what the request did.
fn causes(request: &Request) -> [u64; 3] {
    match request.kind {
        Kind::Execute => [1, 12, 20],
        Kind::Read => [5, 13, 21],
        Kind::Write => [7, 15, 23],
    }
}

/// DTF: of these causes nothing is told.
fn unless(quiet: bool, why: String, told: Vec<Told>) -> Answer {
    Answer::new(format!("{why}, quiet: {quiet}"), if quiet { vec![Told::Nothing] } else { told })
}

/// A walk that ends: in the second stage with the address that it was asked for, and whether that was an implicit access.
fn walked(stages: &[TableConfig], request: &Request, refused: &Refused) -> Vec<Told> {
    let [access, page, guest] = causes(request);
    let second = matches!(stages[refused.stage], TableConfig::RiscvSecond(_));
    match refused.causes.last() {
        Some(Cause::Unreadable(_)) => record(access, request, None),
        _ if second => {
            let implicit = match refused.fetch {
                None => 0,
                Some(Fetch::Entry { writes: true, .. }) => 3,
                Some(_) => 1,
            };
            record(guest, request, Some(refused.input & !3 | implicit))
        }
        _ => record(page, request, None),
    }
}

pub(super) fn expected(unit: &Unit<'_>, request: &Request) -> Result<Option<Answer>, Problem> {
    let one = |why: &str, cause: u64| Ok(Some(Answer::new(why, record(cause, request, None))));
    // iommu_mode 3:0, PPN 53:10.
    let root = unit.register("DDTP");
    let levels = match bits(root, 3, 0) {
        0 => return one("off", ALL_DISALLOWED),
        1 => return Ok(None),
        mode => mode as usize - 1,
    };
    // MSI_FLAT 22.
    let (own, words) = if bit(unit.register("CAPABILITIES"), 22) { (6, 8) } else { (7, 4) };
    let index = [bits(request.id, own - 1, 0), bits(request.id, own + 8, own), bits(request.id, 23, own + 9)];
    if index[levels..].iter().any(|part| *part != 0) {
        return one("device id", DISALLOWED);
    }
    let resolution = detect::resolve_pasid(unit.snapshot, request.id, request.pasid.map(u64::from));
    let reason = if let Ok(Resolution::Blocked(reason)) = &resolution { reason.as_str() } else { "" };
    let mut table = bits(root, 53, 10) << 12;
    for level in (1..levels).rev() {
        let Some(entry) = unit.read(table + index[level] * 8)? else { return one("DDT", DDT_LOAD) };
        if !bit(entry, 0) {
            return one("DDT", DDT_INVALID);
        }
        if bits(entry, 9, 1) != 0 || bits(entry, 63, 54) != 0 {
            return one("DDT", DDT_MISCONFIGURED);
        }
        table = bits(entry, 53, 10) << 12;
    }
    let address = table + index[0] * words * 8;
    let (Some(context), Some(_)) = (unit.words::<4>(address)?, unit.read(address + (words - 1) * 8)?) else { return one("DC", DDT_LOAD) };
    if !bit(context[0], 0) {
        return one("DC", DDT_INVALID);
    }
    // What the reference says of device contexts, and not of processes.
    let misconfigured = [
        "reserved bits of the device context",
        "RCID or MCID",
        "ATS and PRI",
        "T2GPA",
        "pdtp.MODE",
        "iosatp.MODE",
        "DPE without process directory",
        "iohgatp.MODE",
        "msiptp.MODE",
        "iohgatp.PPN",
        "GADE or SADE",
        "SBE",
        "SXL",
    ];
    // Where fctl.GXL cannot be written SXL must be as it is, and otherwise may be 1. Whether it can no register says.
    if reason == "SXL" && bit(context[0], 11) {
        return Err(Problem::Unsupported("SXL where GXL might be writable".to_owned()));
    }
    if misconfigured.contains(&reason) {
        return one(reason, DDT_MISCONFIGURED);
    }
    // DTF 4, PDTV 5, DPE 9.
    let (quiet, directory) = (bit(context[0], 4), bit(context[0], 5));
    let mode = bits(context[3], 63, 60);
    if let Some(process) = request.pasid {
        let width = [0, 8, 17, 20][if directory { mode as usize & 3 } else { 0 }];
        // Bare has no directory that a process id could be too wide for.
        if !directory || mode != 0 && process >> width != 0 || process >> 20 != 0 {
            return Ok(Some(unless(quiet, "process id".to_owned(), record(DISALLOWED, request, None))));
        }
    }
    let process = request.pasid.or((directory && bit(context[0], 9)).then_some(0));
    if let Some(process) = process.filter(|_| directory && mode != 0)
        && let Some(answer) = process_context(unit, request, &context, process, reason)?
    {
        return Ok(Some(unless(quiet, answer.why, answer.told)));
    }
    let stages = match resolution {
        Ok(Resolution::Tables(stages)) => stages,
        Ok(Resolution::Bypass | Resolution::Direct(_)) => return Ok(None),
        other => return Err(Problem::Unsupported(format!("{other:?}"))),
    };
    let refused = Path::new(unit, &stages)?.request(request)?.err();
    Ok(refused.map(|refused| unless(quiet, format!("{refused:x?}"), walked(&stages, request, &refused))))
}

/// The second stage refuses to have a process directory read: "let a be ..., translate a" may mean a table's address, or an entry's in it. The Privileged specification
/// has implicit accesses fail as what the request did; these are "treated as implicit read memory accesses", and count as reads by themselves, and what cannot be
/// read as an access to the directory.
fn directory(stages: &[TableConfig], request: &Request, refused: &Refused) -> Vec<Told> {
    let mut told = Vec::new();
    for input in [refused.input, refused.input & !0xfff] {
        let refused = Refused { input, ..refused.clone() };
        told.extend(walked(stages, request, &refused));
        if let Some(Cause::Unreadable(_)) = refused.causes.last() {
            told.extend(record(PDT_LOAD, request, None));
        } else {
            told.extend(record(21, request, Some(input & !3 | 1)));
        }
    }
    told
}

/// The second stage of a device context: Sv39x4, Sv48x4 or Sv57x4.
fn second_stage(unit: &Unit<'_>, context: &[u64; 4]) -> Option<TableConfig> {
    let mode = bits(context[1], 63, 60);
    let physical = bits(unit.register("CAPABILITIES"), 37, 32).min(56) as u32;
    let entries = crate::reference::tables::riscv::Entries {
        output_bits: physical,
        svnapot: true,
        svpbmt: bit(unit.register("CAPABILITIES"), 15),
        svrsw60t59b: bit(unit.register("CAPABILITIES"), 14),
        hardware_update: bit(context[0], 7),
        big_endian: false,
    };
    let root = bits(context[1], 43, 0) << 12;
    (mode != 0).then(|| TableConfig::RiscvSecond(RiscvSecond { root, levels: mode as u32 - 5, input_bits: 59, entries }))
}

/// What is told because a process has no context, or none that is valid.
fn process_context(unit: &Unit<'_>, request: &Request, context: &[u64; 4], process: u32, reason: &str) -> Result<Option<Answer>, Problem> {
    let answer = |why: &str, cause: u64| Ok(Some(Answer::new(why, record(cause, request, None))));
    let second = second_stage(unit, context);
    let read = |address: u64| -> Result<Result<u64, Answer>, Problem> {
        let physical = match second {
            None => address,
            Some(second) => match Path::new(unit, &[second])?.structure(address)? {
                Ok(physical) => physical,
                Err(refused) => {
                    return Ok(Err(Answer::new(format!("PDT: {refused:x?}"), directory(&[second], request, &refused))));
                }
            },
        };
        Ok(unit.read(physical)?.ok_or_else(|| Answer::new("PDT cannot be read", record(PDT_LOAD, request, None))))
    };
    let process = u64::from(process);
    let index = [bits(process, 7, 0), bits(process, 16, 8), bits(process, 19, 17)];
    let mut table = bits(context[3], 43, 0) << 12;
    for level in (1..bits(context[3], 63, 60) as usize).rev() {
        let entry = match read(table + index[level] * 8)? {
            Ok(entry) => entry,
            Err(answer) => return Ok(Some(answer)),
        };
        if !bit(entry, 0) {
            return answer("PDT entry", PDT_INVALID);
        }
        if bits(entry, 9, 1) != 0 || bits(entry, 63, 54) != 0 {
            return answer("PDT entry", PDT_MISCONFIGURED);
        }
        table = bits(entry, 53, 10) << 12;
    }
    let attributes = match read(table + index[0] * 16)? {
        Ok(attributes) => attributes,
        Err(answer) => return Ok(Some(answer)),
    };
    if !bit(attributes, 0) {
        return answer("PC", PDT_INVALID);
    }
    if ["reserved bits of the process context", "the process context's MODE"].contains(&reason) {
        return answer(reason, PDT_MISCONFIGURED);
    }
    // ENS 1.
    if request.privileged && request.pasid.is_some() && !bit(attributes, 1) {
        return answer("PC.ENS", DISALLOWED);
    }
    Ok(None)
}
