//! `stagecraft diff`: compares what devices reach in two snapshots.

mod spaces;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context as _, Result};
use clap::Args;
use serde_json::{Value, json};
use stagecraft::guest::StreamState;
use stagecraft::table::{Intercept, Mapping};

use crate::failure::{Status, complain};
use crate::inspect::describe_intercept;
use crate::json::{self, Separator};
use crate::options::Global;
use crate::output::{BAD, Columns, DIM, FEW, GOOD, HEAD, WARN, counted, human, printable, raw, size};
use crate::session::{Session, load};
use crate::view::{Seen, View, all_walks, stream_name};

use spaces::{Change, Range, Target, compare};

/// Compare what devices reach in two snapshots
///
/// Devices are matched by id and PASID; their address spaces are compared byte by byte, whatever the format, the page sizes and the place of the tables. Exit
/// status 0 if devices reach the same, 1 if they do not or a budget was spent before that could be said, 2 if a snapshot lacks a page.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    a: PathBuf,
    /// The folder to compare it with
    b: PathBuf,
    /// Show all ranges
    #[arg(long)]
    all: bool,
}

/// What the guest of each snapshot set up beside its tables.
type OwnIntercepts = [Vec<Intercept>; 2];

/// How one stream differs, or several whose tables are the same on both sides.
struct Difference {
    streams: Vec<StreamState>,
    states: States,
    ranges: Rc<[Range]>,
    /// What the guests set up beside the tables, if that differs.
    intercepts: Option<OwnIntercepts>,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let session = Session::new(global)?;
    let (a, b) = match (view(&session, &arguments.a)?, view(&session, &arguments.b)?) {
        (Ok(a), Ok(b)) => (a, b),
        // The worse of two.
        (a, b) => return Ok([a, b].into_iter().filter_map(Result::err).max().unwrap_or(Status::Trouble)),
    };
    let Ok((differences, compared)) = differences(&a, &b) else { return Ok(Status::Found) };
    if global.json() {
        write_json(&mut raw(), &differences, compared)?;
    } else {
        write_human(&mut human(), arguments, &differences, compared)?;
    }
    Ok(if differences.is_empty() { Status::Good } else { Status::Found })
}

/// A snapshot, and how much of it may be compared.
struct Side {
    view: View,
    most: u64,
}

/// Everything that devices reach in a snapshot; or how the command ends, which is said: half an address space cannot be compared.
fn view(session: &Session, path: &Path) -> Result<std::result::Result<Side, Status>> {
    let snapshot = load(path)?;
    let place = || path.display().to_string();
    let guest = session.guest(&snapshot).with_context(place)?;
    let view = View::new(&guest, None).with_context(place)?;
    Ok(match view.incomplete() {
        Some((status, what)) => {
            complain(&format!("{}: {what}", path.display()));
            Err(status)
        }
        None => Ok(Side { view, most: all_walks(&guest) }),
    })
}

/// Tables in each snapshot, if there are any.
type TablePair = (Option<usize>, Option<usize>);
/// What a stream gets in each snapshot; none if it is not there.
type States = [Option<&'static str>; 2];

/// How streams differ, and how many there are; or that there is too much to compare, which is said. Each pair of tables is compared once, but a guest
/// may pair its tables in as many ways as it has streams.
fn differences(a: &Side, b: &Side) -> std::result::Result<(Vec<Difference>, usize), Status> {
    let most = a.most.saturating_add(b.most);
    let mut left = most;
    let (a, b) = (&a.view, &b.view);
    let key = |seen: &Seen| (seen.stream.id, seen.stream.pasid);
    let mut keys: Vec<(u64, Option<u32>)> = a.streams.iter().chain(&b.streams).map(key).collect();
    keys.sort_unstable();
    keys.dedup();
    let in_a: HashMap<_, &Seen> = a.streams.iter().map(|seen| (key(seen), seen)).collect();
    let in_b: HashMap<_, &Seen> = b.streams.iter().map(|seen| (key(seen), seen)).collect();
    let mut known: HashMap<TablePair, Rc<[Range]>> = HashMap::new();
    let mut differences: Vec<Difference> = Vec::new();
    let mut places: HashMap<(TablePair, States, Option<OwnIntercepts>), usize> = HashMap::new();
    for key in &keys {
        let pair = [in_a.get(key).copied(), in_b.get(key).copied()];
        let Some(stream) = pair.iter().flatten().next().map(|seen| seen.stream.clone()) else { continue };
        let table = |side: usize| pair[side].and_then(|seen| seen.table);
        let tables = (table(0), table(1));
        let ranges = match known.get(&tables) {
            Some(ranges) => Rc::clone(ranges),
            None => {
                let (in_a, in_b) = (mappings(a, tables.0), mappings(b, tables.1));
                let Some(rest) = left.checked_sub((in_a.len() + in_b.len()) as u64) else {
                    complain(&format!("stopped by budget: more than {most} mappings to compare; --budget-leaves allows more"));
                    return Err(Status::Found);
                };
                left = rest;
                let ranges: Rc<[Range]> = compare(in_a, in_b).into();
                known.insert(tables, Rc::clone(&ranges));
                ranges
            }
        };
        let states = pair.map(|seen| seen.map(|seen| seen.stream.state.as_str()));
        // Windows without a table, and a table that maps the same, reach the same.
        let same_way = states[0] == states[1] || tables.0.is_some() && tables.1.is_some();
        let own = pair.map(|seen| seen.map_or_else(Vec::new, own_intercepts));
        let intercepts = (own[0] != own[1]).then_some(own);
        if same_way && ranges.is_empty() && intercepts.is_none() {
            continue;
        }
        let place = (tables, states, intercepts);
        match places.get(&place).filter(|_| tables != (None, None)).and_then(|place| differences.get_mut(*place)) {
            Some(other) => other.streams.push(stream),
            None => {
                differences.push(Difference { streams: vec![stream], states, ranges, intercepts: place.2.clone() });
                places.insert(place, differences.len() - 1);
            }
        }
    }
    Ok((differences, keys.len()))
}

/// What a guest set up beside a stream's tables. What comes with an architecture, like interrupts at fixed addresses, is in no guest's hands, and a
/// request there reaches no memory on either side.
fn own_intercepts(seen: &Seen) -> Vec<Intercept> {
    seen.stream.intercepts.iter().filter(|intercept| intercept.is_guests_own()).cloned().collect()
}

fn mappings(view: &View, table: Option<usize>) -> &[Mapping] {
    table.map_or(&[], |table| view.tables[table].collected.collector.mappings())
}

/// Ranges and bytes of one kind of change.
fn total(ranges: &[Range], change: Change) -> (u64, u128) {
    let of_kind = ranges.iter().filter(|range| range.change() == change);
    of_kind.fold((0, 0), |(ranges, bytes), range| (ranges + 1, bytes + range.bytes()))
}

fn write_json(out: &mut impl Write, differences: &[Difference], compared: usize) -> Result<()> {
    write!(out, "{{\"version\":{},\"same\":{},\"compared\":{compared},\"differences\":[", json::VERSION, differences.is_empty())?;
    let target = |target: Option<Target>| target.map(|target| json!({"address": json::hex(target.address), "access": target.access.as_str()}));
    let mut separator = Separator::default();
    for difference in differences {
        let totals = |change: Change| {
            let (ranges, bytes) = total(&difference.ranges, change);
            json!({"ranges": ranges, "bytes": json::bytes(bytes)})
        };
        let streams: Vec<Value> = difference.streams.iter().map(|stream| json::stream((stream.id, stream.pasid))).collect();
        let mut head = json!({
            "streams": streams,
            "states": {"a": difference.states[0], "b": difference.states[1]},
            "added": totals(Change::Added),
            "removed": totals(Change::Removed),
            "changed": totals(Change::Changed),
        });
        if let (Some([a, b]), Some(head)) = (&difference.intercepts, head.as_object_mut()) {
            let list = |intercepts: &[Intercept]| intercepts.iter().map(json::intercept).collect::<Vec<_>>();
            head.insert("intercepts".to_owned(), json!({"a": list(a), "b": list(b)}));
        }
        let head = head.to_string();
        let head = head.strip_suffix('}').unwrap_or(&head);
        write!(out, "{}{head},\"ranges\":[", separator.next())?;
        let mut inner = Separator::default();
        for range in difference.ranges.iter() {
            let object = json!({
                "change": range.change().as_str(),
                "iova": json::hex(range.iova.first),
                "size": json::bytes(range.bytes()),
                "a": target(range.a),
                "b": target(range.b),
            });
            write!(out, "{}{object}", inner.next())?;
        }
        write!(out, "]}}")?;
    }
    writeln!(out, "]}}")?;
    Ok(out.flush()?)
}

fn write_human(out: &mut impl Write, arguments: &Arguments, differences: &[Difference], compared: usize) -> Result<()> {
    let compared_streams = counted(compared as u64, "stream", "streams");
    if differences.is_empty() {
        writeln!(out, "{GOOD}the same{GOOD:#}: {compared_streams} reach the same addresses")?;
        return Ok(out.flush()?);
    }
    let differing: usize = differences.iter().map(|difference| difference.streams.len()).sum();
    writeln!(out, "{BAD}different{BAD:#}: {differing} of {compared_streams}")?;
    writeln!(out, "  {DIM}a{DIM:#} {}\n  {DIM}b{DIM:#} {}", arguments.a.display(), arguments.b.display())?;
    let shown = if arguments.all { differences.len() } else { differences.len().min(FEW) };
    let few = match shown {
        _ if arguments.all => usize::MAX,
        1 => 2 * FEW,
        _ => 5,
    };
    for difference in &differences[..shown] {
        write_difference(out, difference, few)?;
    }
    if differences.len() > shown {
        writeln!(out, "\n{DIM}and {} (--all){DIM:#}", counted((differences.len() - shown) as u64, "more", "more"))?;
    }
    Ok(out.flush()?)
}

fn write_difference(out: &mut impl Write, difference: &Difference, few: usize) -> Result<()> {
    let names: Vec<String> = difference.streams.iter().map(stream_name).collect();
    writeln!(out, "\n{HEAD}{}{HEAD:#}", printable(&names.join(", ")))?;
    let [a, b] = difference.states.map(|state| state.unwrap_or("not there"));
    if a != b {
        writeln!(out, "  {a} in a, {b} in b")?;
    }
    for (name, intercepts) in ["a", "b"].iter().zip(difference.intercepts.iter().flatten()) {
        for intercept in intercepts {
            writeln!(out, "  intercepted in {name}: {}", describe_intercept(intercept))?;
        }
    }
    let totals = [Change::Removed, Change::Added, Change::Changed].map(|change| (change, total(&difference.ranges, change)));
    let totals = totals.iter().filter(|(_, (ranges, _))| *ranges > 0);
    let words = |(change, (ranges, bytes)): &(Change, (u64, u128))| {
        format!("{} {} in {}", change.as_str(), size(*bytes), counted(*ranges, "range", "ranges"))
    };
    let totals: Vec<String> = totals.map(words).collect();
    if totals.is_empty() {
        return Ok(());
    }
    writeln!(out, "  {}", totals.join(", "))?;
    let target = |target: Option<Target>| target.map_or("-".to_owned(), |target| format!("{:#x} {}", target.address, target.access));
    for (block, part) in difference.ranges[..difference.ranges.len().min(few)].chunks(4096).enumerate() {
        let headings: &[&str] = if block == 0 { &["", "IOVA", "LAST", "SIZE", "IN A", "IN B"] } else { &[] };
        let mut columns = Columns::new(2, headings).right(&[1, 2, 3]);
        for range in part {
            let (mark, style) = match range.change() {
                Change::Removed => ("-", BAD),
                Change::Added => ("+", GOOD),
                Change::Changed => ("~", WARN),
            };
            columns.row([
                crate::output::Cell::styled(mark, style),
                format!("{:#x}", range.iova.first).into(),
                format!("{:#x}", range.iova.last).into(),
                size(range.bytes()).into(),
                target(range.a).into(),
                target(range.b).into(),
            ]);
        }
        columns.write(out)?;
    }
    let more = difference.ranges.len().saturating_sub(few);
    if more > 0 {
        writeln!(out, "  {DIM}and {} (--all){DIM:#}", counted(more as u64, "more range", "more ranges"))?;
    }
    Ok(())
}
