//! `stagecraft draw`: address spaces as a picture that a person can read.

mod areas;
mod picture;
mod rows;

use std::collections::HashMap;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use serde_json::json;
use stagecraft::guest::{Guest, GuestError, State, StreamState};
use stagecraft::snapshot::SnapshotError;
use stagecraft::table::WalkError;

use crate::failure::{Status, complain};
use crate::json;
use crate::options::Global;
use crate::output::{GOOD, count, counted, human, raw};
use crate::progress::Progress;
use crate::session::{Session, device, load};
use crate::view::{missing_page, stopped_at, stream_name, streams};

use areas::{Area, Areas};
use picture::{Drawing, draw};

/// Draw address spaces as an SVG picture
///
/// One section per table: rows for the parts of the address space that are in use, the sizes of the holes between them, and in each row what a device may do,
/// how large the pages are, and whether they lead to RAM or to device memory.
///
/// Nothing is drawn if the snapshot lacks a page. A table that a budget bounds is drawn as far as it goes: exit status 1.
#[derive(Args, Debug)]
pub struct Arguments {
    /// Folder with snapshot.json and pages.bin
    snapshot: PathBuf,
    /// The picture to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Only this device: an id such as 0x38, or a label such as 0000:00:07.0
    #[arg(long, value_name = "ID", allow_negative_numbers = true)]
    device: Option<String>,
    /// Replace a picture that exists
    #[arg(long)]
    force: bool,
}

/// What is drawn of one table, or of two.
pub struct Section {
    /// The first stream that goes this way.
    pub stream: StreamState,
    /// Who uses it.
    pub users: Vec<String>,
    /// What is mapped.
    pub areas: Vec<Area>,
    /// Leaves of each size, at index log2.
    pub leaves: [u64; 65],
    /// Entries or ranges that fault.
    pub faults: u64,
    /// Why this is not all, if it is not.
    pub stopped: Option<String>,
}

/// Runs the command.
pub fn run(global: &Global, arguments: &Arguments) -> Result<Status> {
    let snapshot = load(&arguments.snapshot)?;
    let read = ["snapshot.json", "pages.bin"].map(|file| arguments.snapshot.join(file));
    check_out(&arguments.out, arguments.force, &read.each_ref().map(PathBuf::as_path))?;
    let only = arguments.device.as_deref().map(|text| device(&snapshot, text)).transpose()?;
    let session = Session::new(global)?;
    let guest = session.guest(&snapshot)?;
    let (sections, others, incomplete) = look(&guest, streams(&guest, only)?)?;
    // A picture with parts missing would be taken for the whole. One that a budget bounds says so.
    let incomplete = match incomplete {
        Some((Status::Trouble, what)) => bail!(what),
        other => other,
    };
    let drawing = draw(&snapshot.description, &sections, &others, &session.plugins);
    write_whole(&arguments.out, &drawing.svg)?;
    tell(global, arguments, &sections, &drawing)?;
    Ok(incomplete.map_or(Status::Good, |(status, what)| {
        complain(&what);
        status
    }))
}

/// What is not known, and the status that this is.
type Incomplete = Option<(Status, String)>;

/// Walks every table once. Streams without one are said in words.
fn look(guest: &Guest<'_>, streams: Vec<(StreamState, Option<String>)>) -> Result<(Vec<Section>, Vec<String>, Incomplete)> {
    let (mut sections, mut others, mut incomplete): (Vec<Section>, Vec<String>, Incomplete) = (Vec::new(), Vec::new(), None);
    let mut note = |status: Status, what: String| {
        if incomplete.as_ref().is_none_or(|(known, _)| *known < status) {
            incomplete = Some((status, what));
        }
    };
    let progress = Progress::new("walking tables", guest);
    let mut places = HashMap::new();
    let all = streams.len();
    for (done, (stream, stopped)) in streams.into_iter().enumerate() {
        progress.at(done, all);
        if let Some(page) = stream.missing {
            note(Status::Trouble, missing_page(page.0, &stream));
        } else if let Some(stopped) = stopped {
            note(Status::Found, stopped_at(&stopped, &stream));
        }
        let name = stream_name(&stream);
        match &stream.state {
            State::Bypass => {
                others.push(format!("{name}: bypass, all of guest memory as it is"));
                continue;
            }
            State::Blocked(reason) => {
                others.push(format!("{name}: blocked, {reason}"));
                continue;
            }
            State::Direct(_) | State::Translated(_) => {}
        }
        if let Some(section) = places.get(&stream.way()).and_then(|place: &usize| sections.get_mut(*place)) {
            section.users.push(name);
            continue;
        }
        let Some(mut space) = guest.space(&stream)? else { continue };
        places.insert(stream.way(), sections.len());
        let mut areas = Areas::new(guest.map(), space.privileged());
        let stopped = match guest.walk(&mut space, &mut areas) {
            Ok(()) => None,
            Err(WalkError::Exhausted(stopped)) => Some(stopped.to_string()),
            Err(error) => return Err(GuestError::from(error).into()),
        };
        if let Some(page) = areas.missing {
            note(Status::Trouble, missing_page(page, &stream));
        } else if let Some(stopped) = &stopped {
            note(Status::Found, stopped_at(stopped, &stream));
        }
        let Areas { areas, leaves, faults, .. } = areas;
        sections.push(Section { stream, users: vec![name], areas, leaves, faults, stopped });
    }
    Ok((sections, others, incomplete))
}

/// Refuses, before any work, a place that the picture cannot go to: also that of a file of those that it is made of.
pub fn check_out(out: &Path, force: bool, read: &[&Path]) -> Result<()> {
    if out.is_dir() {
        bail!("{}: a folder; give the name of a file, such as {}", out.display(), out.join("map.svg").display());
    }
    if let Ok(found) = fs::symlink_metadata(out) {
        if !force {
            return Err(SnapshotError::Exists(out.to_owned()).into());
        }
        // The picture takes the place of what is there: of a device or a pipe it must not, nor of a name of one such as /dev/stdout.
        let is_file = fs::metadata(out).map_or(found.is_symlink(), |target| target.is_file());
        if !is_file || fs::read_link(out).is_ok_and(|target| target.starts_with("/proc")) {
            bail!("{}: exists and is not a file: it is not replaced", out.display());
        }
        let whole = fs::canonicalize(out).ok();
        if whole.is_some() && read.iter().any(|read| fs::canonicalize(read).ok() == whole) {
            bail!("{}: a file that is read; give another one for the picture", out.display());
        }
    }
    match out.parent().filter(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        Some(parent) => bail!("{}: no such folder; create it first", parent.display()),
        None => Ok(()),
    }
}

/// A file appears under its name once it is whole.
pub fn write_whole(out: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    let name = out.file_name().with_context(|| format!("{}: not a name for a file", out.display()))?;
    let staged = out.with_file_name(format!(".{}.stagecraft-{}", name.to_string_lossy(), std::process::id()));
    let written = fs::write(&staged, bytes).and_then(|()| fs::rename(&staged, out));
    if written.is_err() {
        let _ = fs::remove_file(&staged);
    }
    written.with_context(|| out.display().to_string())
}

fn tell(global: &Global, arguments: &Arguments, sections: &[Section], drawing: &Drawing) -> Result<()> {
    let out = &arguments.out;
    let Drawing { elements, merged, tables, .. } = *drawing;
    if global.json() {
        let mut stdout = raw();
        let path = out.display().to_string();
        writeln!(stdout, "{}", json!({"version": json::VERSION, "out": path, "tables": tables, "elements": elements, "merged": merged}))?;
        return Ok(stdout.flush()?);
    }
    let mut stdout = human();
    let merged = if merged == 0 { String::new() } else { format!(", {} areas too small to be drawn one by one", count(merged)) };
    let left = match sections.len() - tables {
        0 => String::new(),
        left => format!(", {} left out (--device ID)", counted(left as u64, "table", "tables")),
    };
    writeln!(stdout, "{GOOD}written: {}{GOOD:#} ({}{merged}{left})", out.display(), counted(tables as u64, "table", "tables"))?;
    Ok(stdout.flush()?)
}
