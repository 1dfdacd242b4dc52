//! `stagecraft translate`: where one access of one device goes.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use serde_json::{Value, json};
use stagecraft::guest::{Guest, State, StreamState};
use stagecraft::memory::{MemoryMap, PAGE};
use stagecraft::snapshot::Device;
use stagecraft::table::{AddressSpace, Cause, Fault, FaultKind, Finding, Severity, Step};
use stagecraft::{Access, Iova};

use crate::failure::{Status, complain};
use crate::json;
use crate::numbers::{number, pasid};
use crate::options::Global;
use crate::output::{BAD, Cell, Columns, DIM, GOOD, human, printable, raw};
use crate::session::{Session, device, load};
use crate::view::{missing_page, of_device, stream_name};

/// Say where one access of one device goes, or why it fails
///
/// Exit status 0 when the question was answered, whether the access succeeds or not.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    snapshot: PathBuf,
    /// The device: an id such as 0x38, or a label such as 0000:00:07.0
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    device: String,
    /// The request's PASID, if it has one
    #[arg(long, value_name = "N", value_parser = pasid, allow_negative_numbers = true)]
    pasid: Option<u32>,
    /// I/O virtual address of the byte that is accessed
    #[arg(long, value_name = "X", value_parser = number, allow_negative_numbers = true)]
    iova: u64,
    /// What the device does there
    #[arg(long, value_name = "r|w")]
    access: Wanted,
}

/// What a device does.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wanted {
    /// It reads.
    R,
    /// It writes.
    W,
}

/// What became of the access.
enum Answer {
    /// It goes to this address; with what the leaf says, if one does.
    Goes(u64, Option<String>),
    /// It fails.
    Fails(Failed),
}

struct Failed {
    kind: &'static str,
    stage: Option<u8>,
    level: Option<i8>,
    reason: String,
    section: Option<String>,
    path: Vec<Step>,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let snapshot = load(&arguments.snapshot)?;
    let device = device(&snapshot, &arguments.device)?;
    let session = Session::new(global)?;
    let guest = session.guest(&snapshot)?;
    let access = match arguments.access {
        Wanted::R => Access::READ,
        Wanted::W => Access::WRITE,
    };
    let (found, missing, answer) = answer(&guest, device, arguments.pasid, Iova(arguments.iova), access)?;
    if global.json() {
        let mut out = raw();
        writeln!(out, "{}", answer.json())?;
        out.flush()?;
    } else {
        let mut out = human();
        let verb = if access.write { "write" } else { "read" };
        write!(out, "device {}: {verb} at {:#x} ", stream_name(&found), arguments.iova)?;
        answer.write(&mut out, guest.map())?;
        out.flush()?;
    }
    Ok(match missing {
        Some(page) => {
            complain(&missing_page(page & !(PAGE - 1), &found));
            Status::Trouble
        }
        None => Status::Good,
    })
}

/// The stream, a page that the snapshot lacks, and the answer.
fn answer(guest: &Guest<'_>, device: &Device, pasid: Option<u32>, iova: Iova, access: Access) -> Result<(StreamState, Option<u64>, Answer)> {
    let found = guest.stream(device.id, pasid).map_err(|error| of_device(error, device))?;
    let mut missing = found.missing.map(|page| page.0);
    let answer = match &found.state {
        State::Bypass if guest.map().target(iova.0).is_some() => Answer::Goes(iova.0, None),
        State::Bypass => {
            let reason = "the device bypasses translation, and the guest has no memory at this address";
            Answer::Fails(Failed::bare(Cause::OutsideMemory.as_str(), reason.to_owned()))
        }
        State::Blocked(reason) => Answer::Fails(Failed::bare("blocked", reason.clone())),
        State::Direct(_) | State::Translated(_) => {
            let space = guest.space(&found)?;
            let Some(mut space) = space else { bail!("device {} has no address space", stream_name(&found)) };
            match guest.translate(&mut space, iova, access)? {
                Ok(translation) => Answer::Goes(translation.address.0, Some(translation.attributes.to_string())),
                Err(fault) if fault.cause == Cause::Intercepted => Answer::Fails(Failed::intercepted(&found, &fault)),
                Err(fault) => {
                    if fault.cause == Cause::Missing {
                        missing = missing.or(fault.address);
                    }
                    Answer::Fails(Failed::new(&mut space, fault, access)?)
                }
            }
        }
    };
    Ok((found, missing, answer))
}

impl Failed {
    const fn bare(kind: &'static str, reason: String) -> Self {
        Self { kind, stage: None, level: None, reason, section: None, path: Vec::new() }
    }

    /// The address is none of the tables' business.
    fn intercepted(stream: &StreamState, fault: &Fault) -> Self {
        let matches = |intercept: &&stagecraft::table::Intercept| fault.address.is_some_and(|address| intercept.matches(address));
        let intercept = stream.intercepts.iter().find(matches);
        let server = intercept.map_or("something else", |intercept| &intercept.server);
        let address = fault.address.map_or(String::new(), |address| format!(" {address:#x}"));
        let section = intercept.map(|intercept| intercept.section.clone()).filter(|section| !section.is_empty());
        let reason = format!("address{address} is intercepted: the {server} serves it, and not the tables");
        Self { section, stage: Some(fault.stage), ..Self::bare(Cause::Intercepted.as_str(), reason) }
    }

    fn new(space: &mut AddressSpace, fault: Fault, access: Access) -> Result<Self> {
        let finding = match (fault.cause, fault.path.last()) {
            (Cause::Entry(kind), Some(step)) => worst(space.explain(fault.stage, step).map_err(stagecraft::guest::GuestError::Format)?, kind),
            _ => None,
        };
        let has_tables = space.tables().next().is_some();
        let (reason, section) = match finding {
            Some(finding) => (finding.reason, Some(finding.section).filter(|section| !section.is_empty())),
            None if !has_tables && fault.cause == Cause::Entry(FaultKind::Translation) => (describe(FaultKind::Translation).to_owned(), None),
            None if !has_tables && fault.cause == Cause::Entry(FaultKind::Permission) => {
                (format!("the mapping does not allow {}", if access.write { "writing" } else { "reading" }), None)
            }
            None => (sentence(&fault, access), None),
        };
        Ok(Self { kind: fault.cause.as_str(), stage: Some(fault.stage), level: fault.level, reason, section, path: fault.path })
    }
}

/// The error that tells why a request fails for `kind`; any other error if the format has no word about that one.
pub fn worst(findings: Vec<Finding>, kind: FaultKind) -> Option<Finding> {
    let mut errors: Vec<Finding> = findings.into_iter().filter(|finding| finding.severity == Severity::Error).collect();
    let index = errors.iter().position(|finding| finding.kind == kind).unwrap_or(0);
    (index < errors.len()).then(|| errors.swap_remove(index))
}

/// Why a request fails, where the format has nothing to say about the entry.
fn sentence(fault: &Fault, access: Access) -> String {
    let address = fault.address.map_or(String::new(), |address| format!(" {address:#x}"));
    match fault.cause {
        Cause::OutsideMemory => format!("the guest has no memory at address{address}"),
        Cause::Missing => format!("the snapshot has no page for address{address}"),
        Cause::Intercepted => format!("address{address} is intercepted: something else than the tables serves it"),
        Cause::Entry(FaultKind::Translation) if fault.path.is_empty() => "no table covers this address".to_owned(),
        Cause::Entry(FaultKind::Translation) => "nothing is mapped here".to_owned(),
        Cause::Entry(FaultKind::Permission) => {
            let verb = if access.write { "writing" } else { "reading" };
            format!("the leaf, or a table above it, does not allow {verb}")
        }
        Cause::Entry(FaultKind::AddressSize) => format!("address{address} has more bits than the format's output"),
        Cause::Entry(FaultKind::Misaligned) => format!("address{address} is not aligned to the size of what it points to"),
        Cause::Entry(kind) => describe(kind).to_owned(),
    }
}

/// One sentence about a kind of fault.
pub const fn describe(kind: FaultKind) -> &'static str {
    match kind {
        FaultKind::Translation => "nothing is mapped here",
        FaultKind::Permission => "this access is not allowed",
        FaultKind::AccessFlag => "the entry needs an accessed mark that hardware does not set here",
        FaultKind::AddressSize => "an address has more bits than the unit has",
        FaultKind::Reserved => "a bit that must be zero is set, or an encoding is reserved",
        FaultKind::Misaligned => "an address is not aligned to the size of what it points to",
        FaultKind::Unreadable => "the entry could not be read",
        FaultKind::Configuration => "a structure that leads to the table is wrong",
    }
}

impl Answer {
    fn json(&self) -> Value {
        match self {
            Self::Goes(address, _) => json!({"succeeds": true, "address": json::hex(*address)}),
            Self::Fails(Failed { kind, stage, level, reason, section, .. }) => {
                let reason = section.as_ref().map_or_else(|| reason.clone(), |section| format!("{reason} ({section})"));
                json!({"succeeds": false, "fault": {"kind": kind, "stage": stage, "level": level, "reason": reason}})
            }
        }
    }

    fn write(&self, out: &mut impl Write, map: &MemoryMap) -> Result<()> {
        match self {
            Self::Goes(address, attributes) => {
                let kind = map.region(*address).map_or(String::new(), |region| format!(", {}", region.kind));
                writeln!(out, "{GOOD}goes to {address:#x}{GOOD:#}{kind}")?;
                let attributes = attributes.as_deref().unwrap_or("bypass: no table is asked");
                writeln!(out, "  {DIM}{attributes}{DIM:#}")?;
            }
            Self::Fails(failed) => {
                writeln!(out, "{BAD}fails: {}{BAD:#}", failed.kind)?;
                let section = failed.section.as_ref().map_or(String::new(), |section| format!(" ({section})"));
                writeln!(out, "  {}", printable(&format!("{}{section}", failed.reason)))?;
                write_path(out, failed.stage, &failed.path)?;
            }
        }
        Ok(())
    }
}

/// The way from the root to an entry, one line per table.
pub fn write_path(out: &mut impl Write, stage: Option<u8>, path: &[Step]) -> Result<()> {
    if path.is_empty() {
        return Ok(());
    }
    let mut columns = Columns::new(2, &["STAGE", "LEVEL", "TABLE", "INDEX", "ENTRY"]).right(&[0, 1, 2, 3, 4]);
    for step in path {
        columns.row([
            stage.map_or(String::new(), |stage| stage.to_string()).into(),
            step.number.to_string().into(),
            step.table.to_string().into(),
            step.index.to_string().into(),
            step.entry.map_or_else(|| Cell::styled("not read", DIM), |entry| format!("{entry:#018x}").into()),
        ]);
    }
    Ok(columns.write(out)?)
}
