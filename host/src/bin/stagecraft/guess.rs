//! `stagecraft guess`: which format a table of unknown origin has.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use stagecraft::Span;
use stagecraft::guess::{Candidate, Evidence, Guess, Missing, Options, Subject, guess};
use stagecraft::memory::{Kind, MemoryMap, Region, VmMemory};
use stagecraft::snapshot::{Dump, Source};
use stagecraft::table::FaultKind;

use crate::failure::{Status, complain};
use crate::json;
use crate::numbers::number;
use crate::options::Global;
use crate::output::{BAD, Cell, Columns, DIM, GOOD, HEAD, WARN, counted, human, printable, raw, size};
use crate::session::{Session, load_memory};

/// Say which format a table of unknown origin has, with which settings, and why
///
/// For when the registers that say so are missing: tries the formats of all plugins on the table and on what it points to, and compares what they explain.
/// Evidence is counted in bits: chance would do as well once in 2^bits times. Formats whose evidence is the same within 8 bits cannot be told apart; all of
/// them are named.
///
/// Exit status 1, and no guess, if nothing fits.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin, whose registers are not looked at and may be missing; or a file with a raw dump of memory
    #[arg(value_name = "FILE|SNAPSHOT")]
    source: PathBuf,
    /// Guest-physical address of the table that walks begin at
    #[arg(long, value_name = "X", value_parser = number, allow_negative_numbers = true)]
    root: u64,
    /// Guest-physical address of the first byte of a dump [default: 0]
    #[arg(long, value_name = "GPA", value_parser = number, allow_negative_numbers = true)]
    base: Option<u64>,
    /// Memory that exists besides what is in the dump, such as 0x100000000-0x17fffffff: leaves and tables may be there; may be repeated
    #[arg(long = "memory", value_name = "FIRST-LAST", value_parser = range, allow_negative_numbers = true)]
    memory: Vec<Span>,
    /// Only this format, or the formats of this plugin; may be repeated
    #[arg(long = "only", value_name = "NAME")]
    only: Vec<String>,
    /// List all that was tried on more than a few tables, whether it fits or not
    #[arg(long)]
    all: bool,
}

/// Candidates that are shown without `--all`.
const SHOWN: usize = 4;

/// `first-last`, both included.
fn range(text: &str) -> Result<Span, String> {
    let span = text.split_once('-').and_then(|(first, last)| Span::new(number(first).ok()?, number(last).ok()?));
    span.ok_or_else(|| "a range is expected, first and last address, such as 0x100000000-0x17fffffff".to_owned())
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let path = &arguments.source;
    let mut options = Options { only: arguments.only.clone(), ..Options::default() };
    if let Some(pages) = global.budget_tables {
        options.pages = pages;
        options.trial_pages = options.trial_pages.min(pages);
    }
    if !path.is_file() {
        if path.exists() && !path.is_dir() {
            bail!("{}: neither a file nor a folder; give a dump of memory, or a snapshot", path.display());
        }
        if arguments.base.is_some() || !arguments.memory.is_empty() {
            bail!("{}: a snapshot says itself where memory is; --base and --memory are for a dump", path.display());
        }
        let snapshot = load_memory(path)?;
        if let Source::Unit { kind, .. } = &snapshot.source {
            options.unit = Some(kind.clone());
        }
        let (memory, readable) = (VmMemory(&snapshot.memory), snapshot.pages * 4096);
        let subject = Subject { memory: &memory, map: &snapshot.map, readable, missing: Missing::Against, root: arguments.root };
        return answer(global, arguments, path, &subject, &options);
    }
    let dump = Dump::load(path, arguments.base.unwrap_or(0))?;
    let map = map(path, dump.span, &arguments.memory)?;
    let memory = VmMemory(&dump.memory);
    let subject = Subject { memory: &memory, map: &map, readable: dump.span.length_minus_one() + 1, missing: Missing::Unknown, root: arguments.root };
    answer(global, arguments, path, &subject, &options)
}

/// The dump itself and what else is said to exist, which may overlap it.
fn map(path: &Path, dump: Span, others: &[Span]) -> Result<MemoryMap> {
    let mut spans: Vec<Span> = others.iter().copied().chain([dump]).collect();
    spans.sort();
    let mut joined: Vec<Span> = Vec::new();
    for span in spans {
        match joined.last_mut() {
            Some(last) if last.last.checked_add(1).is_none_or(|next| span.first <= next) => last.last = last.last.max(span.last),
            _ => joined.push(span),
        }
    }
    let regions = joined.into_iter().map(|span| Region { kind: Kind::Ram, span }).collect();
    MemoryMap::new(regions).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))
}

fn answer(
    global: &Global,
    arguments: &Arguments,
    path: &Path,
    subject: &Subject<'_, impl stagecraft::memory::EntryMemory>,
    options: &Options,
) -> Result<Status> {
    if subject
        .memory
        .read_entries(stagecraft::Gpa(subject.root & !7), stagecraft::memory::EntryLayout { bytes: 8, order: Default::default() }, &mut [0])
        .is_err()
    {
        bail!("{}: there is no page for a root at {:#x}", path.display(), subject.root);
    }
    let session = Session::new(global)?;
    let found = guess(&session.plugins, subject, options)?;
    if global.json() {
        let mut out = raw();
        writeln!(out, "{:#}", report(&found, subject.root, subject.missing, arguments.all))?;
        out.flush()?;
    } else {
        write_human(&mut human(), &found, subject.missing, arguments.all)?;
    }
    if found.fits {
        return Ok(Status::Good);
    }
    complain(&format!("nothing fits: no installed format explains what stands at {:#x} better than chance", subject.root));
    Ok(Status::Found)
}

/// What is listed: the guess and the next best, or everything.
fn listed(found: &Guess, all: bool) -> &[Candidate] {
    match (all, found.fits) {
        (true, _) => &found.all,
        (false, true) => &found.candidates[..found.candidates.len().min(SHOWN.max(found.likeliest().len()))],
        (false, false) => &[],
    }
}

fn report(found: &Guess, root: u64, missing: Missing, all: bool) -> Value {
    let candidate = |candidate: &Candidate| {
        let mut object = json!({"rank": candidate.rank, "levels": candidate.levels, "granule": candidate.granule});
        if let (Some(object), Value::Object(table)) = (object.as_object_mut(), json::table(&candidate.config)) {
            object.extend(table);
            object.insert("evidence".to_owned(), evidence(&candidate.evidence));
            object.insert("words".to_owned(), candidate.words(missing).into());
        }
        object
    };
    json!({
        "version": json::VERSION,
        "root": json::hex(root),
        "fits": found.fits,
        "equal": found.likeliest().len(),
        "tried": found.tried,
        "candidates": listed(found, all).iter().map(candidate).collect::<Vec<_>>(),
    })
}

fn evidence(evidence: &Evidence) -> Value {
    let faults = FaultKind::ALL.iter().zip(evidence.faults).filter(|(_, count)| *count > 0);
    json!({
        "bits": evidence.bits.round() as i64,
        "entries": {"good": evidence.good(), "bad": evidence.bad()},
        "leaves": {"inside": evidence.leaves, "outside": evidence.leaves_outside, "useless": evidence.useless_leaves, "continued": evidence.continued},
        "tables": {
            "levels": evidence.tables_by_level,
            "empty": evidence.empty_tables,
            "outside": evidence.tables_outside,
            "unknown": evidence.unknown_tables,
            "overlapping": evidence.overlaps,
            "skipped": evidence.skips,
        },
        "patterns": evidence.patterns,
        "unusual-bits": evidence.idle_bits,
        "faults": faults.map(|(kind, count)| (kind.as_str().to_owned(), Value::from(count))).collect::<serde_json::Map<_, _>>(),
        "stopped": evidence.stopped,
    })
}

fn write_human(out: &mut impl Write, found: &Guess, missing: Missing, all: bool) -> Result<()> {
    let likeliest = found.likeliest();
    for candidate in likeliest {
        write_candidate(out, candidate, missing)?;
    }
    if likeliest.len() > 1 {
        writeln!(out, "{WARN}These cannot be told apart by their entries: any of them may be the right one.{WARN:#}\n")?;
    }
    let others = if all { &*found.all } else { listed(found, false).get(likeliest.len()..).unwrap_or_default() };
    if let Some(best) = likeliest.first().or(found.all.first()).filter(|_| !others.is_empty()) {
        writeln!(out, "{HEAD}{}{HEAD:#}", if all { "All that was looked at closely" } else { "Less likely" })?;
        let mut columns = Columns::new(2, &["FORMAT", "LEVELS", "PAGES", "BITS", "BEHIND", "GOOD", "BAD", "SETTINGS"]).right(&[1, 2, 3, 4, 5, 6]);
        for candidate in others {
            columns.row([
                candidate.config.format.as_str().into(),
                candidate.levels.to_string().into(),
                size(candidate.granule.into()).into(),
                bits(candidate.evidence.bits).into(),
                bits(best.evidence.bits - candidate.evidence.bits).into(),
                candidate.evidence.good().to_string().into(),
                candidate.evidence.bad().to_string().into(),
                settings(candidate).into(),
            ]);
        }
        columns.write(out)?;
    }
    let (tried, style) = (counted(found.tried, "configuration", "configurations"), if found.fits { DIM } else { BAD });
    writeln!(out, "{style}{tried} tried{}{style:#}", if found.fits { "" } else { ": nothing fits" })?;
    Ok(out.flush()?)
}

fn bits(bits: f64) -> String {
    // Without the sign of a zero.
    format!("{}", bits.round() as i64)
}

fn settings(candidate: &Candidate) -> String {
    let hex =
        |name: &str, value: u64| if name.starts_with("root") || value >> 32 != 0 { format!("{name}={value:#x}") } else { format!("{name}={value}") };
    let settings: Vec<String> = candidate.config.settings.iter().map(|(name, value)| hex(name, value)).collect();
    printable(&settings.join(" "))
}

fn write_candidate(out: &mut impl Write, candidate: &Candidate, missing: Missing) -> Result<()> {
    let (levels, granule) = (counted(candidate.levels, "level", "levels"), size(candidate.granule.into()));
    writeln!(out, "{GOOD}{}{GOOD:#}, {levels}, pages of {granule}", candidate.config.format)?;
    let mut rows = Columns::new(2, &[]);
    rows.row([Cell::styled("settings", DIM), settings(candidate).into()]);
    rows.row([Cell::styled("evidence", DIM), format!("{} bits", bits(candidate.evidence.bits)).into()]);
    for line in candidate.words(missing) {
        rows.row(["".into(), printable(&line).into()]);
    }
    rows.write(out)?;
    Ok(writeln!(out)?)
}
