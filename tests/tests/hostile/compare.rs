//! The engine's view of a guest beside the reference's.

use stagecraft::device::LookupError;
use stagecraft::guest::{GuestError, State, StreamState};
use stagecraft::memory::MemoryMap;
use stagecraft::plugin::{CallError, Refusal, TableConfig};
use stagecraft::table::{AddressSpace, Cause, Fault, FaultKind, Finding, Mapping, Severity};
use stagecraft::{Access, Span};
use stagecraft_tests::reference::detect::{INTERRUPTS, Resolution, is_interrupt, messages};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::{self, Problem, Run};

pub use crate::configs::{plugin_config, reference_config};

/// Without what plays no part in what devices reach: memory attributes, and root addresses as they were written instead of as they are used.
fn normal(config: &tables::TableConfig) -> tables::TableConfig {
    let mut config = *config;
    let regions = config.regions().expect("what was resolved has regions");
    let root = |half: usize| regions.iter().find(|region| region.half == half).map_or(0, |region| region.root);
    match &mut config {
        tables::TableConfig::ArmStage1(config) => {
            config.mair = 0;
            for (index, half) in [&mut config.low, &mut config.high].into_iter().enumerate() {
                if let Some(half) = half {
                    half.root = root(index);
                }
            }
            // 64K pages have 52-bit addresses without it.
            config.lpa2 &= [config.low, config.high].into_iter().flatten().any(|half| half.granule != 65536);
            config.hardware_dirty &= config.hardware_access;
            config.access_flag_disabled &= !config.hardware_access;
        }
        tables::TableConfig::ArmStage2(config) => {
            config.root = root(0);
            config.lpa2 &= config.granule != 65536;
            config.hardware_dirty &= config.hardware_access;
            config.access_flag_disabled &= !config.hardware_access;
        }
        tables::TableConfig::VtdFirst(config) => config.output_bits = 0,
        tables::TableConfig::VtdSecond(config) => config.output_bits = 0,
        tables::TableConfig::AmdV1(config) => config.output_bits = 0,
        tables::TableConfig::AmdV2(config) => config.output_bits = 0,
        _ => {}
    }
    config
}

/// A difference in what a device gets that is known.
struct Exception {
    /// What the engine says contains this.
    engine: &'static str,
    /// What the reference says instead.
    reference: fn(&Result<Resolution, Problem>) -> bool,
    /// Why that is nobody's mistake.
    #[allow(dead_code)]
    why: &'static str,
}

fn unsupported(result: &Result<Resolution, Problem>, what: &str) -> bool {
    matches!(result, Err(Problem::Unsupported(text)) if text == what)
}

/// All known differences in what a device gets. In what tables map there are none; two things are left out of that comparison: the host address width
/// of VT-d and AMD-Vi, which no register says (see [`normal`]), and addresses outside the memory map, which only the engine knows (see [`clip`]).
const EXCEPTIONS: &[Exception] = &[
    Exception {
        engine: "blocked: ",
        reference: |result| matches!(result, Err(Problem::Unreadable(_))),
        why: "a structure that cannot be read blocks; the engine names the event, or a check that comes before the read",
    },
    Exception {
        engine: " pan=0x1",
        reference: |result| unsupported(result, "PAN"),
        why: "privileged requests to unprivileged memory are refused; the reference has unprivileged requests only",
    },
    Exception {
        engine: " privileged=0x1",
        reference: |result| unsupported(result, "RID_PRIV"),
        why: "privileged requests without a PASID; the reference has unprivileged requests only",
    },
    Exception {
        engine: " io-permissions=0x1",
        reference: |result| unsupported(result, "I/O permissions"),
        why: "permissions in other bits of second-stage entries, which the reference does not know",
    },
];

/// The tables of a device, as the engine found them and as the reference did.
pub type Found = (Vec<TableConfig>, Vec<tables::TableConfig>);

/// Whether the findings, the worst one first, have the reason for a fault that an entry caused at these IOVAs. A leaf of which only a part can be used is
/// no mistake, only worth mentioning: there the fault is less than what the entry covers.
pub fn have_reason(space: &AddressSpace, span: Span, fault: &Fault, findings: &[Finding]) -> bool {
    let (Some(step), Cause::Entry(kind)) = (fault.path.last(), fault.cause) else { return false };
    let table = space.tables().nth(usize::from(fault.stage - 1)).expect("the stage has a table");
    let slot = Span::of_log2(0, table.geometry().levels[usize::from(step.level)].index_lsb).last;
    let Some(worst) = findings.first() else { return false };
    let mentioned = findings.iter().any(|finding| finding.severity == Severity::Info && finding.kind == kind);
    match worst.severity {
        Severity::Error => worst.kind == kind,
        _ => kind == FaultKind::Permission && mentioned && span.length_minus_one() < slot,
    }
}

/// What both found, if both found tables; `Err` says how they differ.
pub fn same_state(engine: &Result<StreamState, GuestError>, reference: &Result<Resolution, Problem>) -> Result<Option<Found>, String> {
    let said = match engine {
        Ok(stream) => match &stream.state {
            State::Bypass => "bypass".to_owned(),
            State::Direct(windows) => format!("bypass in {} windows", windows.len()),
            State::Blocked(reason) => format!("blocked: {reason}"),
            State::Translated(tables) => tables.iter().map(|table| format!("<{table}>")).collect::<Vec<_>>().join(" then "),
        },
        Err(error) => format!("error: {error}"),
    };
    let differ = || {
        if EXCEPTIONS.iter().any(|exception| said.contains(exception.engine) && (exception.reference)(reference)) {
            Ok(None)
        } else {
            Err(format!("the engine says {said}, the reference {reference:x?}"))
        }
    };
    match (engine, reference) {
        (Ok(StreamState { state: State::Bypass, .. }), Ok(Resolution::Bypass)) => Ok(None),
        (Ok(StreamState { state: State::Blocked(_), .. }), Ok(Resolution::Blocked(_))) => Ok(None),
        (Ok(StreamState { state: State::Direct(windows), .. }), Ok(Resolution::Direct(expected))) => {
            let [window] = windows.as_slice() else { return differ() };
            let allowed = window.attributes.access(false);
            let found = (window.iova.first, window.iova.last, window.address, allowed);
            if found == (expected.first, expected.last, expected.address, access(expected.access)) { Ok(None) } else { differ() }
        }
        (Err(GuestError::Lookup(LookupError::Call(CallError::Refused { refusal: Refusal::Unsupported(_), .. }))), Err(Problem::Unsupported(_))) => {
            Ok(None)
        }
        (Err(GuestError::Lookup(LookupError::Call(CallError::Refused { refusal: Refusal::Invalid { .. }, .. }))), Err(Problem::Illegal(_))) => {
            Ok(None)
        }
        // A plugin that cannot answer for one device blocks it.
        (Ok(StreamState { state: State::Blocked(reason), .. }), Err(Problem::Unsupported(_)))
            if reason.starts_with("not known: ") && reason.contains("does not support") =>
        {
            Ok(None)
        }
        (Ok(StreamState { state: State::Translated(found), .. }), Ok(Resolution::Tables(expected))) => {
            let translated: Option<Vec<tables::TableConfig>> = found.iter().map(reference_config).collect();
            let Some(translated) = translated else { return differ() };
            let equal = translated.len() == expected.len()
                && translated.iter().zip(expected).all(|(one, other)| one.regions().is_ok() && normal(one) == normal(other));
            if equal { Ok(Some((found.clone(), expected.clone()))) } else { differ() }
        }
        _ => differ(),
    }
}

/// Whether both say the same of addresses that no table serves, where requests are not blocked.
pub fn same_intercepts(
    engine: &Result<StreamState, GuestError>,
    guest: &reference::snapshot::Snapshot,
    id: u64,
    pasid: Option<u64>,
) -> Result<(), String> {
    let reference = &messages(guest, id);
    let Ok(stream @ StreamState { state: State::Translated(_) | State::Direct(_) | State::Bypass, .. }) = engine else { return Ok(()) };
    let said: Vec<_> = stream.intercepts.iter().map(|one| (one.passed, one.mask, one.value, one.address)).collect();
    let Ok(table) = reference else { return Err(format!("the reference says {reference:x?}")) };
    let passed = u8::from(stream.tables().iter().any(|table| table.format == "riscv-iommu/first-stage"));
    let expected: Vec<_> = table.iter().map(|table| (passed, *table, !(table.mask << 12 | 0xfff))).collect();
    let expected = expected.iter().map(|(passed, table, mask)| (*passed, *mask, table.pattern << 12 & mask, Some(table.root)));
    // Where nothing is translated, interrupts are addresses as any other to this engine.
    let interrupts = stream.state != State::Bypass && is_interrupt(&guest.unit_kind, pasid, INTERRUPTS.0);
    let expected: Vec<_> = expected.chain(interrupts.then_some((0, !(INTERRUPTS.1 - INTERRUPTS.0), INTERRUPTS.0, None))).collect();
    if said == expected { Ok(()) } else { Err(format!("the engine intercepts {said:x?}, the reference {expected:x?}")) }
}

/// What can happen to a lookup: a plugin that traps or is interrupted is a bug, however absurd the guest.
pub fn is_orderly(error: &GuestError) -> bool {
    match error {
        GuestError::Lookup(LookupError::Exhausted(_)) => true,
        GuestError::Lookup(LookupError::Call(error)) | GuestError::Call(error) => matches!(error, CallError::Refused { .. }),
        _ => false,
    }
}

/// What devices reach of the reference's runs once addresses that do not exist are taken away: maximal runs again.
pub fn clip(runs: &[Run], map: &MemoryMap) -> Vec<Mapping> {
    let mut clipped: Vec<Mapping> = Vec::new();
    for run in runs {
        let Some(last) = run.address.checked_add(run.size - 1) else { continue };
        for part in map.targets_within(Span { first: run.address, last }) {
            let first = run.iova + (part.first - run.address);
            let iova = Span { first, last: first + part.length_minus_one() };
            append(&mut clipped, Mapping { iova, address: part.first, access: access(run.access) });
        }
    }
    clipped
}

/// Adds a mapping behind all others, as a part of the last one where it continues it.
pub fn append(mappings: &mut Vec<Mapping>, mapping: Mapping) {
    if let Some(last) = mappings.last_mut()
        && last.access == mapping.access
        && last.iova.last.checked_add(1) == Some(mapping.iova.first)
        && last.address.checked_add(last.iova.length_minus_one()).and_then(|address| address.checked_add(1)) == Some(mapping.address)
    {
        last.iova.last = mapping.iova.last;
        return;
    }
    mappings.push(mapping);
}

/// The reference's access in the engine's words.
pub fn access(access: reference::Access) -> Access {
    Access { read: access.read, write: access.write }
}

/// Where the two differ first.
pub fn first_difference(engine: &[Mapping], reference: &[Mapping]) -> Option<String> {
    let index = (0..engine.len().max(reference.len())).find(|index| engine.get(*index) != reference.get(*index))?;
    Some(format!("mapping {index}: the engine has {:x?}, the reference {:x?}", engine.get(index), reference.get(index)))
}

/// Whether `inner` allows nothing that `outer` does not: every byte of it goes to the same address with no more access.
pub fn within(inner: &[Mapping], outer: &[Mapping]) -> Result<(), String> {
    for mapping in inner {
        let mut next = Some(mapping.iova.first);
        let start = outer.partition_point(|other| other.iova.last < mapping.iova.first);
        for other in &outer[start..] {
            let Some(first) = next else { break };
            if !other.iova.contains(first) {
                break;
            }
            let same = other.address.wrapping_add(first - other.iova.first) == mapping.address.wrapping_add(first - mapping.iova.first);
            if !same || !other.access.allows(mapping.access) {
                break;
            }
            next = other.iova.last.checked_add(1).filter(|next| *next <= mapping.iova.last);
        }
        if let Some(first) = next {
            return Err(format!("{mapping:x?} is not what the source has at {first:#x}"));
        }
    }
    Ok(())
}

/// Bytes of all mappings together.
pub fn bytes(mappings: &[Mapping]) -> u128 {
    mappings.iter().map(|mapping| u128::from(mapping.iova.length_minus_one()) + 1).sum()
}
