//! `stagecraft inspect`: what maps where.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::{Value, json};
use stagecraft::Access;
use stagecraft::guest::{Guest, State};
use stagecraft::plugin::{Plugins, TableConfig};
use stagecraft::snapshot::{Snapshot, Source};
use stagecraft::table::{Intercept, Mapping, Window};

use crate::failure::Status;
use crate::json::{self, Separator};
use crate::options::Global;
use crate::output::{BAD, Cell, Columns, DIM, FEW, GOOD, HEAD, PLAIN, WARN, count, counted, human, printable, raw, size};
use crate::session::{Session, device, load};
use crate::view::{Seen, View, mapped, most_mappings};

/// Show which tables each device uses, and what maps where
///
/// One line per device (and PASID), then one summary per table; devices of one domain share a table. A table that cannot be followed to its end is shown as
/// far as it goes, and the reason with it: exit status 2 if the snapshot lacks a page, 1 if a budget was spent. JSON repeats what devices share for each of
/// them, which is bounded, too.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    snapshot: PathBuf,
    /// Only this device: an id such as 0x38, or a label such as 0000:00:07.0
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    device: Option<String>,
    /// Show all mappings, and all devices
    #[arg(long)]
    all: bool,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let snapshot = load(&arguments.snapshot)?;
    let only = arguments.device.as_deref().map(|text| device(&snapshot, text)).transpose()?;
    let session = Session::new(global)?;
    let guest = session.guest(&snapshot)?;
    let mut view = View::new(&guest, only)?;
    if global.json() {
        view.bound(most_mappings(&guest));
        write_json(&mut raw(), &view)?;
    } else {
        write_human(&mut human(), &guest, &view, arguments.all)?;
    }
    Ok(view.completeness())
}

/// Writes the fixed form, mapping by mapping: there may be very many.
fn write_json(out: &mut impl Write, view: &View) -> Result<()> {
    write!(out, "{{\"version\":{},\"streams\":[", json::VERSION)?;
    let mut streams = Separator::default();
    for seen in &view.streams {
        write!(out, "{}", streams.next())?;
        let stream = &seen.stream;
        let reach = seen.table.map(|table| &view.tables[table]);
        let tables: Vec<Value> = stream.tables().iter().map(json::table).collect();
        let mut head = json!({
            "label": stream.label,
            "id": json::hex(stream.id),
            "pasid": stream.pasid,
            "state": stream.state.as_str(),
            "reason": view.reason(seen),
            "tables": tables,
        });
        if let Some(head) = head.as_object_mut().filter(|_| !stream.intercepts.is_empty()) {
            head.insert("intercepts".to_owned(), stream.intercepts.iter().map(json::intercept).collect());
        }
        let head = head.to_string();
        write!(out, "{},\"mappings\":[", head.strip_suffix('}').unwrap_or(&head))?;
        let mut mappings = Separator::default();
        for mapping in reach.map_or(&[][..], |reach| reach.collected.collector.mappings()).iter().take(seen.shown) {
            let Mapping { iova, address, access } = mapping;
            let bytes = u128::from(iova.length_minus_one()) + 1;
            let separator = mappings.next();
            write!(out, "{separator}{{\"iova\":\"{:#x}\",\"address\":\"{address:#x}\",\"size\":{bytes},\"access\":\"{access}\"}}", iova.first)?;
        }
        write!(out, "]}}")?;
    }
    writeln!(out, "]}}")?;
    Ok(out.flush()?)
}

fn write_human(out: &mut impl Write, guest: &Guest<'_>, view: &View, all: bool) -> Result<()> {
    write_snapshot(out, guest.snapshot())?;
    writeln!(out)?;
    let mut columns = Columns::new(0, &["DEVICE", "ID", "PASID", "STATE", "TABLE", "RUNS", "MAPPED", "FORMAT OR REASON"]).right(&[5, 6]);
    let few = if all { usize::MAX } else { 3 * FEW };
    for seen in view.streams.iter().take(few) {
        write_stream(&mut columns, view, seen);
    }
    columns.write(out)?;
    if view.streams.len() > few {
        writeln!(out, "{DIM}and {} more (--all){DIM:#}", count((view.streams.len() - few) as u64))?;
    }
    // With many tables a few words about each have to do.
    let tables = if all { view.tables.len() } else { view.tables.len().min(FEW) };
    let few = match tables {
        _ if all => usize::MAX,
        0..=2 => FEW,
        _ => 3,
    };
    for index in 0..tables {
        writeln!(out)?;
        write_table(out, guest.plugins(), view, index, few)?;
    }
    if view.tables.len() > tables {
        writeln!(out, "\n{DIM}and {} (--all, or --device ID){DIM:#}", counted((view.tables.len() - tables) as u64, "more table", "more tables"))?;
    }
    Ok(out.flush()?)
}

fn write_snapshot(out: &mut impl Write, snapshot: &Snapshot) -> Result<()> {
    if !snapshot.description.is_empty() {
        writeln!(out, "{HEAD}{}{HEAD:#}", printable(&snapshot.description))?;
    }
    let source = match &snapshot.source {
        Source::Unit { kind, .. } => format!("unit {}", printable(kind)),
        Source::Tables(_) => "tables as listed in the snapshot".to_owned(),
        Source::Domains(domains) => {
            let (domains, mappings) = (counted(domains.entries.len() as u64, "domain", "domains"), domains.mappings());
            format!("unit virtio-iommu, which has no tables; {domains} with {}", counted(mappings, "mapping", "mappings"))
        }
    };
    let mut memory: Vec<(&str, u128)> = Vec::new();
    for region in snapshot.map.regions() {
        let (kind, bytes) = (region.kind.as_str(), u128::from(region.span.length_minus_one()) + 1);
        match memory.iter_mut().find(|(known, _)| *known == kind) {
            Some((_, sum)) => *sum += bytes,
            None => memory.push((kind, bytes)),
        }
    }
    let memory: Vec<String> = memory.iter().map(|(kind, bytes)| format!("{} {kind}", size(*bytes))).collect();
    let devices = counted(snapshot.devices.len() as u64, "device", "devices");
    writeln!(out, "{source}; {devices}; memory: {}; {} of tables", memory.join(", "), counted(snapshot.pages, "page", "pages"))?;
    Ok(())
}

fn write_stream(columns: &mut Columns, view: &View, seen: &Seen) {
    let stream = &seen.stream;
    let style = match &stream.state {
        State::Translated(_) => GOOD,
        State::Bypass | State::Direct(_) => WARN,
        State::Blocked(_) => DIM,
    };
    let reach = seen.table.map(|table| &view.tables[table]);
    let formats = match &stream.state {
        State::Translated(configs) => Some(configs.iter().map(|config| &*config.format).collect::<Vec<_>>().join(" through ")),
        State::Direct(windows) => Some(counted(windows.len() as u64, "window without a table", "windows without a table")),
        _ => None,
    };
    let what: Vec<String> = formats.into_iter().chain(view.reason(seen)).collect();
    columns.row([
        printable(&stream.label).into(),
        format!("{:#x}", stream.id).into(),
        stream.pasid.map_or("-".to_owned(), |pasid| format!("{pasid:#x}")).into(),
        Cell::styled(stream.state.as_str(), style),
        seen.table.map_or("-".to_owned(), |table| format!("#{}", table + 1)).into(),
        reach.map_or(String::new(), |reach| count(reach.collected.collector.mappings().len() as u64)).into(),
        reach.map_or(String::new(), |reach| size(reach.bytes)).into(),
        printable(&what.join("; ")).into(),
    ]);
}

fn write_table(out: &mut impl Write, plugins: &Plugins, view: &View, index: usize, few: usize) -> Result<()> {
    let reach = &view.tables[index];
    let collector = &reach.collected.collector;
    let mappings = collector.mappings();
    if let State::Direct(windows) = &reach.stream.state {
        writeln!(out, "{HEAD}No table #{}{HEAD:#}  {}", index + 1, describe_windows(windows))?;
    }
    for (stage, config) in reach.stream.tables().iter().enumerate() {
        let what = if stage == 0 { format!("Table #{}", index + 1) } else { "  whose outputs go through".to_owned() };
        writeln!(out, "{HEAD}{what}{HEAD:#}  {}", describe(config, plugins))?;
    }
    let mut rows = Columns::new(2, &[]);
    for intercept in &reach.stream.intercepts {
        rows.row([Cell::styled("intercepted", WARN), describe_intercept(intercept).into()]);
    }
    if collector.intercepted_count() > 0 {
        let ranges = counted(collector.intercepted_count(), "range that the tables map", "ranges that the tables map");
        rows.row([Cell::styled("", WARN), format!("{ranges}; requests there never come to them").into()]);
    }
    let users: Vec<String> = view.users(index).map(crate::view::stream_name).collect();
    rows.row([Cell::styled("used by", DIM), users.join(", ").into()]);
    let span = match (mappings.first(), mappings.last()) {
        (Some(first), Some(last)) => format!(", IOVA {:#x}..={:#x}", first.iova.first, last.iova.last),
        _ => String::new(),
    };
    let runs = counted(mappings.len() as u64, "run", "runs");
    rows.row([Cell::styled("mapped", DIM), format!("{} in {runs}{span}", size(reach.bytes)).into()]);
    let leaves = collector.leaf_sizes().iter().enumerate().filter(|(_, leaves)| **leaves != 0);
    let leaves: Vec<String> = leaves.map(|(log2, leaves)| format!("{} x {}", count(*leaves), size(1_u128 << log2))).collect();
    rows.row([Cell::styled("leaves", DIM), if leaves.is_empty() { "none".to_owned() } else { leaves.join(", ") }.into()]);
    let access = |access| match mapped(mappings, Some(access)) {
        0 => None,
        bytes => Some(format!("{access} {}", size(bytes))),
    };
    let accesses: Vec<String> = [Access { read: true, write: true }, Access::READ, Access::WRITE].into_iter().filter_map(access).collect();
    if !accesses.is_empty() {
        rows.row([Cell::styled("access", DIM), accesses.join(", ").into()]);
    }
    let faults = collector.fault_count() - collector.intercepted_count();
    if faults > 0 {
        let faults = counted(faults, "entry or range", "entries or ranges");
        rows.row([Cell::styled("faults", WARN), Cell::styled(format!("{faults}; `stagecraft validate` explains them"), PLAIN)]);
    }
    if let Some(stopped) = &reach.collected.stopped {
        rows.row([Cell::styled("ends", BAD), format!("{stopped}; what follows is not all").into()]);
    }
    rows.write(out)?;
    write_mappings(out, mappings, few)
}

fn write_mappings(out: &mut impl Write, mappings: &[Mapping], few: usize) -> Result<()> {
    if mappings.is_empty() {
        return Ok(());
    }
    // Block by block, so that a long list begins at once and is never held as text.
    for (block, part) in mappings[..mappings.len().min(few)].chunks(4096).enumerate() {
        let headings: &[&str] = if block == 0 { &["IOVA", "LAST", "ADDRESS", "SIZE", "ACCESS"] } else { &[] };
        let mut columns = Columns::new(2, headings).right(&[0, 1, 2, 3]);
        for Mapping { iova, address, access } in part {
            columns.row([
                format!("{:#x}", iova.first).into(),
                format!("{:#x}", iova.last).into(),
                format!("{address:#x}").into(),
                size(u128::from(iova.length_minus_one()) + 1).into(),
                access.as_str().into(),
            ]);
        }
        columns.write(out)?;
    }
    if mappings.len() > few {
        writeln!(out, "  {DIM}and {} (--all){DIM:#}", counted((mappings.len() - few) as u64, "more run", "more runs"))?;
    }
    Ok(())
}

/// Windows without a table, for people.
pub fn describe_windows(windows: &[Window]) -> String {
    let window = |window: &Window| format!("{} to {:#x} {}", window.iova, window.address, window.attributes.access(true));
    windows.iter().map(window).collect::<Vec<_>>().join(", ")
}

/// What is intercepted, for people.
pub fn describe_intercept(intercept: &Intercept) -> String {
    let Intercept { passed, mask, value, server, address, section } = intercept;
    let what = match passed {
        0 => "IOVAs",
        1 => "outputs of the first table",
        _ => "outputs of the second table",
    };
    let at = address.map_or(String::new(), |address| format!(" at {address:#x}"));
    let section = if section.is_empty() { String::new() } else { format!(" ({section})") };
    printable(&format!("{what} with {value:#x} under mask {mask:#x}, by the {server}{at}{section}"))
}

/// A configuration for people: settings that are what they usually are, and off, are left out.
pub fn describe(config: &TableConfig, plugins: &Plugins) -> String {
    let manifest = plugins.iter().find_map(|(manifest, _)| manifest.format(&config.format));
    let usual = |name: &str, value: u64| {
        let default = manifest.and_then(|format| format.setting(name)).and_then(|setting| setting.default);
        default == Some(value) && (value == 0 || value >> 32 != 0)
    };
    let mut text = config.format.clone();
    for (name, value) in config.settings.iter().filter(|(name, value)| !usual(name, *value)) {
        let value = if name.starts_with("root") || value >> 32 != 0 { format!("{value:#x}") } else { value.to_string() };
        text.push_str(&format!(" {name}={value}"));
    }
    text
}
