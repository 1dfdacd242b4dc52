//! `stagecraft validate`: everything that is wrong with a guest's tables, with the bits that show it.

mod examine;
mod print;
mod replicas;

use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;

use anyhow::Result;
use clap::Args;
use stagecraft::guest::{Guest, GuestError, State, StreamState};
use stagecraft::memory::PAGE;
use stagecraft::plugin::{Note, TableConfig};
use stagecraft::table::{Cause, Severity, Step, WalkError};
use stagecraft::{Gpa, Span};

use crate::failure::{Status, complain, more};
use crate::numbers::number;
use crate::options::Global;
use crate::output::{human, raw};
use crate::progress::Progress;
use crate::session::{Session, device, load};
use crate::translate::{describe, worst};
use crate::view::{in_one_report, missing_page, stopped_at, streams};

use examine::{Entry, Examine, FaultSeen};
use replicas::Unlike;

/// List everything that is wrong with a guest's tables
///
/// Errors are what hardware would fault on: each with the path from the root to the entry, the entry, the bits that show it, and the section of the
/// specification. Where nothing is mapped is no error, and neither is a device for which nothing was set up. Warnings are what should not be so and hardware
/// does not mind: one per pattern of entries, with how often it occurs and where first, and one per device structure, with its address and the bits. Exit status 1 if there are errors; warnings do not change it, unless --strict
/// says so.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    snapshot: PathBuf,
    /// Only this device: an id such as 0x38, or a label such as 0000:00:07.0
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    device: Option<String>,
    /// Warnings count as violations
    #[arg(long)]
    strict: bool,
    /// Record this many violations; further ones are counted
    #[arg(long, value_name = "N", value_parser = number, default_value = "1000", allow_negative_numbers = true)]
    max: u64,
    /// Show all violations that were recorded
    #[arg(long)]
    all: bool,
}

/// One thing that is wrong.
pub struct Violation<'a> {
    /// The first stream that it concerns.
    pub stream: &'a StreamState,
    /// Others, whose tables are the same.
    pub shared: Rc<[&'a StreamState]>,
    /// Error or warning.
    pub severity: Severity,
    /// Why a request fails, or would.
    pub kind: &'static str,
    /// Which stage; none if no table was reached.
    pub stage: Option<u8>,
    /// The IOVAs; none if no IOVA leads there.
    pub span: Option<Span>,
    /// From the root of the stage to the entry; empty unless a table's entry is meant.
    pub path: Vec<Step>,
    /// A device structure's address and the 64-bit word in it, if one is meant.
    pub structure: Option<(Gpa, u8)>,
    /// The bits of the entry, or of the word, that show it.
    pub bits: Option<u64>,
    /// Document and section.
    pub section: Option<String>,
    /// One sentence in lower case.
    pub reason: String,
    /// How many entries have the same pattern.
    pub count: u64,
}

/// All that was found.
#[derive(Default)]
pub struct Report<'a> {
    /// What was recorded, errors of a table before its warnings.
    pub violations: Vec<Violation<'a>>,
    /// All errors, those that were not recorded included.
    pub errors: u64,
    /// All warnings.
    pub warnings: u64,
    /// Streams that were looked at.
    pub streams: usize,
    /// Different tables that they use.
    pub tables: usize,
    /// How many violations are recorded.
    max: usize,
    /// How many streams they name, those that share tables with the first.
    named: usize,
    /// Why the report is not all, and the status that this is.
    incomplete: Option<(Status, String)>,
}

/// Streams that share the tables of `configs`.
struct Group<'a> {
    configs: &'a [TableConfig],
    stream: &'a StreamState,
    shared: Rc<[&'a StreamState]>,
}

/// How many streams all violations together may name: each of a thousand violations those of as many devices.
const MOST_NAMED: usize = 1 << 20;

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let snapshot = load(&arguments.snapshot)?;
    let only = arguments.device.as_deref().map(|text| device(&snapshot, text)).transpose()?;
    let session = Session::new(global)?;
    let guest = session.guest(&snapshot)?;
    let streams = streams(&guest, only)?;
    let mut report = Report { max: usize::try_from(arguments.max).unwrap_or(usize::MAX), streams: streams.len(), ..Report::default() };
    let mut translated: Vec<(&[TableConfig], Vec<&StreamState>)> = Vec::new();
    let mut places = HashMap::new();
    for (stream, stopped) in &streams {
        if let Some(page) = stream.missing {
            report.lacks(page, stream);
        } else if let Some(stopped) = stopped {
            report.stops(stopped, stream);
        }
        // Those that were not kept are at least counted.
        report.warnings += stream.notes.dropped;
        match &stream.state {
            State::Bypass | State::Direct(_) => {}
            State::Blocked(_) if stream.missing.is_some() || stopped.is_some() || stream.unused => {}
            State::Blocked(reason) => report.blocked(stream, reason),
            State::Translated(configs) => {
                let place = *places.entry(stream.way()).or_insert(translated.len());
                match translated.get_mut(place) {
                    Some((_, users)) => users.push(stream),
                    None => translated.push((configs, vec![stream])),
                }
            }
        }
    }
    report.structures(&streams);
    let groups: Vec<Group<'_>> = translated.iter().filter_map(|(configs, users)| Group::new(configs, users)).collect();
    report.tables = groups.len();
    let progress = Progress::new("examining tables", &guest);
    for (done, group) in groups.iter().enumerate() {
        progress.at(done, groups.len());
        report.examine(&guest, group)?;
    }
    drop(progress);
    if global.json() {
        print::json(&mut raw(), &report)?;
    } else {
        print::human(&mut human(), &report, arguments.all)?;
    }
    let found = report.errors > 0 || arguments.strict && report.warnings > 0;
    let status = if found { Status::Found } else { Status::Good };
    Ok(report.incomplete.map_or(status, |(incomplete, what)| {
        complain(&what);
        status.max(incomplete)
    }))
}

impl<'a> Report<'a> {
    fn incomplete(&mut self, status: Status, what: String) {
        if self.incomplete.as_ref().is_none_or(|(known, _)| *known < status) {
            self.incomplete = Some((status, what));
        }
    }

    fn lacks(&mut self, page: Gpa, stream: &StreamState) {
        self.incomplete(Status::Trouble, missing_page(page.0 & !(PAGE - 1), stream));
    }

    fn stops(&mut self, stopped: &str, stream: &StreamState) {
        self.incomplete(Status::Found, stopped_at(stopped, stream));
    }

    fn add(&mut self, mut violation: Violation<'a>) {
        match violation.severity {
            Severity::Error => self.errors += 1,
            _ => self.warnings += 1,
        }
        if self.violations.len() < self.max {
            if self.named + violation.shared.len() > MOST_NAMED {
                let stopped = in_one_report("names of streams", MOST_NAMED as u64);
                self.incomplete(Status::Found, format!("{stopped}{}", more(&stopped)));
                violation.shared = Rc::default();
            }
            self.named += violation.shared.len();
            self.violations.push(violation);
        }
    }

    /// A structure that hardware refuses: which one, and which bits, as far as the plugin says so.
    fn blocked(&mut self, stream: &'a StreamState, reason: &str) {
        let (section, reason) = match &stream.blocked {
            Some(blocked) => (Some(blocked.section.clone()), format!("{}: {}", blocked.event, blocked.reason)),
            None => (None, reason.to_owned()),
        };
        let refused = stream.notes.refused();
        self.add(Violation {
            stream,
            shared: Rc::default(),
            severity: Severity::Error,
            kind: "blocked",
            stage: None,
            span: None,
            path: Vec::new(),
            structure: refused.map(|note| (note.address, note.word)),
            bits: refused.map(|note| note.bits).filter(|bits| *bits != 0),
            section: section.filter(|section| !section.is_empty()),
            reason,
            count: 1,
        });
    }

    /// Warnings about device structures: one for each, with all streams whose way leads through it.
    fn structures(&mut self, streams: &'a [(StreamState, Option<String>)]) {
        let mut noted: Vec<(&Note, Vec<&'a StreamState>)> = Vec::new();
        let mut places = HashMap::new();
        for (stream, _) in streams {
            for note in stream.notes.kept.iter().filter(|note| note.severity == Severity::Warning) {
                let place = *places.entry(note).or_insert(noted.len());
                if place == noted.len() {
                    noted.push((note, Vec::new()));
                }
                let known = &mut noted[place].1;
                // A plugin may say the same twice about one stream.
                if known.last().is_none_or(|last| (last.id, last.pasid) != (stream.id, stream.pasid)) {
                    known.push(stream);
                }
            }
        }
        for (note, streams) in noted {
            let Some((first, others)) = streams.split_first() else { continue };
            self.add(Violation {
                stream: first,
                shared: others.into(),
                severity: note.severity,
                kind: "structure",
                stage: None,
                span: None,
                path: Vec::new(),
                structure: Some((note.address, note.word)),
                bits: Some(note.bits),
                section: Some(note.section.clone()).filter(|section| !section.is_empty()),
                reason: note.reason.clone(),
                count: 1,
            });
        }
    }

    /// Walks the tables of a group. Of two stages the second is walked on its own as well: its entries show there, also those that no IOVA leads to.
    fn examine(&mut self, guest: &Guest<'_>, group: &Group<'a>) -> Result<()> {
        let keep = self.max - self.violations.len();
        let mut space = guest.open_for(group.stream, group.configs)?;
        let mut examine = Examine::new(space.tables().map(stagecraft::table::Table::geometry), 1, keep, guest.budget().limits().questions);
        let walked = guest.walk(&mut space, &mut examine);
        self.walked(walked, group)?;
        self.explain(group, &mut space, examine, None)?;
        let Some(second) = group.configs.get(1..).filter(|second| !second.is_empty()) else { return Ok(()) };
        let mut space = guest.open_for(group.stream, second)?;
        let mut examine = Examine::new(
            space.tables().map(stagecraft::table::Table::geometry),
            1,
            self.max - self.violations.len(),
            guest.budget().limits().questions,
        );
        let walked = guest.walk(&mut space, &mut examine);
        self.walked(walked, group)?;
        self.explain(group, &mut space, examine, Some(2))
    }

    fn walked(&mut self, walked: Result<(), WalkError>, group: &Group<'a>) -> Result<()> {
        match walked {
            Ok(()) => Ok(()),
            Err(WalkError::Exhausted(stopped)) => {
                self.stops(&stopped.to_string(), group.stream);
                Ok(())
            }
            Err(error) => Err(GuestError::from(error).into()),
        }
    }

    /// Turns what a walk met into violations. `alone`: the stage that was walked on its own, so that its addresses are no IOVAs.
    fn explain(&mut self, group: &Group<'a>, space: &mut stagecraft::table::AddressSpace, examine: Examine, alone: Option<u8>) -> Result<()> {
        if let Some(page) = examine.missing {
            self.lacks(Gpa(page), group.stream);
        }
        let known: Vec<(u64, u64)> = self.seen_in_stage(group, alone);
        let is_known = |path: &[Step]| path.last().is_some_and(|step| known.contains(&(step.table.0, step.index)));
        for FaultSeen { stage, cause, span, address, path } in examine.faults {
            // No IOVA leads out of memory through an entry that no IOVA leads to.
            if alone.is_some() && (cause == Cause::OutsideMemory || is_known(&path)) {
                continue;
            }
            let finding = match (cause, path.last()) {
                (Cause::Entry(kind), Some(step)) => worst(space.explain(stage, step).map_err(GuestError::Format)?, kind),
                _ => None,
            };
            let (bits, section, reason) = match finding {
                Some(finding) => (Some(finding.bits), Some(finding.section).filter(|section| !section.is_empty()), finding.reason),
                None => (None, None, sentence(cause, address)),
            };
            let (span, stage) = alone.map_or((Some(span), stage), |stage| (None, stage));
            self.add(group.violation(Severity::Error, cause.as_str(), stage, span, path, bits, section, reason, 1));
        }
        // Those that were not kept are at least counted.
        self.errors += examine.more;
        for Unlike { path, span, slots, alike } in examine.candidates.unlike(space).map_err(GuestError::Format)? {
            let reason = format!("of the {slots} slots of this leaf {alike} say the same; all of them should");
            let (span, stage) = alone.map_or((Some(span), 1), |stage| (None, stage));
            self.add(group.violation(Severity::Warning, "replica", stage, span, path, None, None, reason, 1));
        }
        for Entry { stage, path, span, count } in examine.entries.into_values() {
            let Some(step) = path.last() else { continue };
            for finding in space.explain(stage, step).map_err(GuestError::Format)? {
                if finding.severity != Severity::Warning {
                    continue;
                }
                let section = Some(finding.section).filter(|section| !section.is_empty());
                let (span, stage) = alone.map_or((Some(span), stage), |stage| (None, stage));
                let (kind, bits) = (finding.kind.as_str(), Some(finding.bits));
                self.add(group.violation(Severity::Warning, kind, stage, span, path.clone(), bits, section, finding.reason, count));
            }
        }
        Ok(())
    }

    /// Entries of the second stage that are recorded for this group already: table and index.
    fn seen_in_stage(&self, group: &Group<'a>, stage: Option<u8>) -> Vec<(u64, u64)> {
        let of_group = |violation: &&Violation<'_>| violation.stage == stage && violation.stream.id == group.stream.id;
        self.violations.iter().filter(of_group).filter_map(|violation| violation.path.last()).map(|step| (step.table.0, step.index)).collect()
    }
}

impl<'a> Group<'a> {
    fn new(configs: &'a [TableConfig], users: &[&'a StreamState]) -> Option<Self> {
        let (stream, shared) = users.split_first()?;
        Some(Self { configs, stream, shared: shared.into() })
    }

    #[allow(clippy::too_many_arguments)]
    fn violation(
        &self,
        severity: Severity,
        kind: &'static str,
        stage: u8,
        span: Option<Span>,
        path: Vec<Step>,
        bits: Option<u64>,
        section: Option<String>,
        reason: String,
        count: u64,
    ) -> Violation<'a> {
        let (stream, shared) = (self.stream, Rc::clone(&self.shared));
        Violation { stream, shared, severity, kind, stage: Some(stage), span, path, structure: None, bits, section, reason, count }
    }
}

/// Why an entry faults, where the format has nothing to say about it.
fn sentence(cause: Cause, address: Option<u64>) -> String {
    let address = address.map_or(String::new(), |address| format!(" {address:#x}"));
    match cause {
        Cause::OutsideMemory => format!("the guest has no memory at address{address}"),
        Cause::Missing => format!("the snapshot has no page for address{address}"),
        Cause::Intercepted => format!("address{address} is intercepted: something else than the tables serves it"),
        Cause::Entry(kind) if address.is_empty() => describe(kind).to_owned(),
        Cause::Entry(kind) => format!("{}:{address}", describe(kind)),
    }
}
