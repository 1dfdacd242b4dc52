//! `stagecraft convert`: the same address spaces in another format, as a snapshot.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args;
use serde_json::{Value, json};
use stagecraft::convert::{Conversion, ConvertedTable, Target, convert};
use stagecraft::guest::{Guest, State, StreamState};
use stagecraft::offers::{Choice, Hardware, offers};
use stagecraft::plugin::{Plugins, Settings};
use stagecraft::snapshot::{Device, Snapshot, SnapshotError, store};
use stagecraft::table::{Count, Intercept, Loss, Piece};

use crate::failure::{Status, complain};
use crate::inspect::{describe, describe_intercept, describe_windows};
use crate::json;
use crate::numbers::{number, setting};
use crate::offers::{choose, hardware, status};
use crate::options::Global;
use crate::output::{BAD, Cell, Columns, DIM, GOOD, HEAD, WARN, counted, human, printable, raw, size};
use crate::progress::Progress;
use crate::session::{Session, device, load};
use crate::view::{stream_name, whole_streams};

/// Convert the tables of a snapshot into another format, and write them as a snapshot of their own
///
/// What the target format cannot say is never widened: it is refused (not mapped) or narrowed (mapped with less), counted and listed. That is no failure,
/// unless --strict says so. Nothing is written when anything fails.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    snapshot: PathBuf,
    /// Full name of the target format, such as intel-vtd/first-stage; `stagecraft formats` lists them
    #[arg(long, value_name = "FORMAT", required_unless_present = "hardware", conflicts_with = "hardware")]
    to: Option<String>,
    /// Pick the target format and its settings for a real unit, as `stagecraft offers` does: TYPE:HEX or TYPE:@FILE of its iommu_hw_info
    #[arg(long = "for", id = "hardware", value_name = "HARDWARE", value_parser = hardware)]
    hardware: Option<Hardware>,
    /// Folder for the converted snapshot
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// A setting of the target format, which otherwise follows from what the tables need; may be repeated
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = setting)]
    settings: Vec<(String, u64)>,
    /// Only this device, id or label; may be repeated
    #[arg(long = "device", value_name = "ID", allow_negative_numbers = true)]
    devices: Vec<String>,
    /// Use a folder that exists: snapshot.json and pages.bin in it are replaced, other files are left alone
    #[arg(long)]
    force: bool,
    /// Refuse to convert, with exit status 1, if any mapping would be refused, or an intercept that the guest set up is not carried over
    #[arg(long)]
    strict: bool,
    /// Most bytes that the new tables may take, all together [default: 1 GiB]
    #[arg(long, value_name = "N", value_parser = number, allow_negative_numbers = true)]
    table_bytes: Option<u64>,
    /// Show all examples of what is lost that were kept
    #[arg(long)]
    all: bool,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let snapshot = load(&arguments.snapshot)?;
    check_out(arguments)?;
    let devices = devices(&snapshot, &arguments.devices)?;
    let session = Session::new(global)?;
    let guest = session.guest(&snapshot)?;
    let streams = match whole_streams(&guest, &devices)? {
        Ok(streams) => streams,
        Err(status) => return Ok(status),
    };
    let target = match &arguments.hardware {
        None => target(arguments)?,
        Some(hardware) => match for_hardware(&session.plugins, hardware, &guest, &streams, arguments)? {
            Ok(target) => target,
            Err(status) => return Ok(status),
        },
    };
    let progress = Progress::new("converting tables", &guest);
    let conversion = convert(&guest, &streams, &target, &mut |done, all| progress.at(done, all))?;
    drop(progress);
    let refused: u128 = conversion.tables.iter().map(|table| table.built.losses.refused_bytes()).sum();
    let lost_intercepts = conversion.tables.iter().map(|table| table.lost_intercepts().count() as u64).sum::<u64>();
    let keep = !(arguments.strict && (refused > 0 || lost_intercepts > 0));
    if keep {
        let description = match &*snapshot.description {
            "" => format!("converted to {}", target.format),
            description => format!("{description}; converted to {}", target.format),
        };
        store(&arguments.out, arguments.force, &description, &conversion.map, &devices, &conversion.streams, &conversion.arena)?;
    }
    let out = keep.then_some(&*arguments.out);
    if global.json() {
        let mut stdout = raw();
        writeln!(stdout, "{:#}", report(&conversion, out))?;
        stdout.flush()?;
    } else {
        write_human(&mut human(), &guest, &conversion, out, arguments.all)?;
    }
    if keep {
        return Ok(Status::Good);
    }
    let mapped = (refused > 0).then(|| format!("{} of what is mapped", size(refused)));
    let intercepts = (lost_intercepts > 0).then(|| counted(lost_intercepts, "intercept that the guest set up", "intercepts that the guest set up"));
    let lost: Vec<String> = mapped.into_iter().chain(intercepts).collect();
    complain(&format!("{} cannot say {}, and --strict was given: nothing was written", target.format, lost.join(" and ")));
    Ok(Status::Found)
}

/// The target that suits a real unit best; or how the command ends if there is nothing to convert.
fn for_hardware(
    plugins: &Plugins,
    hardware: &Hardware,
    guest: &Guest<'_>,
    streams: &[StreamState],
    arguments: &Arguments,
) -> Result<std::result::Result<Target, Status>> {
    if !arguments.settings.is_empty() {
        bail!("--set: the settings follow from --for; give --to to choose them");
    }
    let offered = offers(plugins, hardware)?;
    let table_bytes = arguments.table_bytes.unwrap_or(Target::new("").table_bytes);
    let choice = choose(guest, streams, &offered, table_bytes)?;
    Ok(match choice {
        Choice::Convert { target, .. } => Ok(target),
        Choice::Native { offer } => {
            complain(&format!(
                "nothing to convert: the guest's tables have the format {} already, and the unit takes them as they are",
                offer.format
            ));
            Err(Status::Found)
        }
        Choice::Nothing(_) => Err(status(&offered, Some(&choice))),
    })
}

/// Refuses, before any work, a folder that the result cannot go to.
fn check_out(arguments: &Arguments) -> Result<()> {
    let out = &arguments.out;
    if fs::symlink_metadata(out).is_err() {
        return Ok(());
    }
    if !arguments.force {
        return Err(SnapshotError::Exists(out.clone()).into());
    }
    let same = |path: &Path| fs::canonicalize(path).ok();
    if same(out).is_some() && same(out) == same(&arguments.snapshot) {
        bail!("{}: the snapshot that is read; give another folder for the result", out.display());
    }
    Ok(())
}

fn devices(snapshot: &Snapshot, wanted: &[String]) -> Result<Vec<Device>> {
    if wanted.is_empty() {
        return Ok(snapshot.devices.clone());
    }
    let mut devices: Vec<Device> = wanted.iter().map(|text| device(snapshot, text).cloned()).collect::<Result<_>>()?;
    devices.sort_by_key(|device| device.id);
    devices.dedup();
    Ok(devices)
}

fn target(arguments: &Arguments) -> Result<Target> {
    let mut target = Target::new(arguments.to.as_deref().unwrap_or_default());
    let mut settings = Settings::new();
    for (name, value) in &arguments.settings {
        if settings.get(name).is_some() {
            bail!("--set {}: given twice", printable(name));
        }
        settings.set(name, *value);
    }
    target.settings = settings;
    target.table_bytes = arguments.table_bytes.unwrap_or(target.table_bytes);
    Ok(target)
}

fn report(conversion: &Conversion, out: Option<&Path>) -> Value {
    let example = |piece: &Piece| {
        let bytes = u128::from(piece.iova.length_minus_one()) + 1;
        json!({"iova": json::hex(piece.iova.first), "address": json::hex(piece.address), "size": json::bytes(bytes), "attributes": piece.attributes.to_string()})
    };
    let loss = |(loss, count): (Loss, &Count)| {
        json!({
            "loss": loss.as_str(),
            "refused": loss.is_refused(),
            "description": loss.describe(),
            "pieces": count.pieces,
            "bytes": json::bytes(count.bytes),
            "examples": count.examples.iter().map(example).collect::<Vec<_>>(),
        })
    };
    let intercept = |intercept: &Intercept| {
        let mut object = json::intercept(intercept);
        if let Some(object) = object.as_object_mut() {
            object.insert("refused".to_owned(), intercept.is_guests_own().into());
        }
        object
    };
    let table = |table: &ConvertedTable| {
        let mut object = json!({
            "streams": table.streams.iter().copied().map(json::stream).collect::<Vec<_>>(),
            "source": table.source.iter().map(json::table).collect::<Vec<_>>(),
        });
        if let Some(object) = object.as_object_mut().filter(|_| !table.windows.is_empty()) {
            object.insert("windows".to_owned(), table.windows.iter().map(json::window).collect());
        }
        // Format, root and settings stand beside the streams.
        if let (Some(object), Value::Object(target)) = (object.as_object_mut(), json::table(&table.table)) {
            object.extend(target);
            object.insert("leaves".to_owned(), json!({"source": table.source_leaves, "target": table.built.leaves}));
            object.insert("bytes".to_owned(), table.bytes.into());
            object.insert("losses".to_owned(), table.built.losses.iter().map(loss).collect());
        }
        if let Some(object) = object.as_object_mut().filter(|_| !table.intercepts.is_empty()) {
            object.insert("intercepts".to_owned(), table.intercepts.iter().map(intercept).collect());
        }
        object
    };
    json!({
        "version": json::VERSION,
        "tables": conversion.tables.iter().map(table).collect::<Vec<_>>(),
        "out": out.map(|path| path.display().to_string()),
    })
}

fn write_human(stdout: &mut impl Write, guest: &Guest<'_>, conversion: &Conversion, out: Option<&Path>, all: bool) -> Result<()> {
    if conversion.tables.is_empty() {
        writeln!(stdout, "no device is translated: there is nothing to convert")?;
    }
    for (index, table) in conversion.tables.iter().enumerate() {
        if index > 0 {
            writeln!(stdout)?;
        }
        write_table(stdout, guest, index, table, all)?;
    }
    if let Some(path) = out {
        let others = conversion.streams.len() - conversion.tables.iter().map(|table| table.streams.len()).sum::<usize>();
        let others = if others == 0 { String::new() } else { format!(", {} without a table", counted(others as u64, "stream", "streams")) };
        let tables = counted(conversion.tables.len() as u64, "table", "tables");
        writeln!(stdout, "\n{GOOD}written: {}{GOOD:#} ({tables}{others})", path.display())?;
    }
    Ok(stdout.flush()?)
}

fn write_table(out: &mut impl Write, guest: &Guest<'_>, index: usize, table: &ConvertedTable, all: bool) -> Result<()> {
    let plugins: &Plugins = guest.plugins();
    writeln!(out, "{HEAD}Table #{}{HEAD:#}  {}", index + 1, describe(&table.table, plugins))?;
    let mut rows = Columns::new(2, &[]);
    let name = |(id, pasid): (u64, Option<u32>)| {
        let label = guest.snapshot().device(id).map_or(String::new(), |device| device.label.clone());
        stream_name(&stagecraft::guest::StreamState::new(&label, id, pasid, State::Bypass))
    };
    let users: Vec<String> = table.streams.iter().copied().map(name).collect();
    rows.row([Cell::styled("used by", DIM), users.join(", ").into()]);
    for config in &table.source {
        rows.row([Cell::styled("from", DIM), describe(config, plugins).into()]);
    }
    if !table.windows.is_empty() {
        rows.row([Cell::styled("from", DIM), format!("no table: {}", describe_windows(&table.windows)).into()]);
    }
    let (before, after) = (counted(table.source_leaves, "leaf", "leaves"), counted(table.built.leaves, "leaf", "leaves"));
    rows.row([Cell::styled("size", DIM), format!("{before} before, {after} in {} after", size(table.bytes.into())).into()]);
    if table.built.losses.is_empty() && table.lost_intercepts().next().is_none() {
        rows.row([Cell::styled("losses", DIM), Cell::styled("none", GOOD)]);
    }
    rows.write(out)?;
    for (loss, count) in table.built.losses.iter() {
        let (style, word) = if loss.is_refused() { (BAD, "refused") } else { (WARN, "narrowed") };
        writeln!(out, "  {style}{word}{style:#} {loss}: {} in {}: {}", size(count.bytes), counted(count.pieces, "leaf", "leaves"), loss.describe())?;
        let shown = if all { count.examples.len() } else { count.examples.len().min(2) };
        for piece in &count.examples[..shown] {
            writeln!(out, "    such as {}, the first byte to {:#x}, {}", piece.iova, piece.address, piece.attributes)?;
        }
        if shown < count.examples.len() {
            writeln!(out, "    {DIM}(--all shows {} examples){DIM:#}", count.examples.len())?;
        }
    }
    for intercept in &table.intercepts {
        let (style, word) = if intercept.is_guests_own() { (BAD, "refused") } else { (DIM, "left out") };
        writeln!(out, "  {style}{word}{style:#} intercept: {}: requests there fault", describe_intercept(intercept))?;
    }
    Ok(())
}
