//! Snapshots, written: whole or not at all.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{Device, SnapshotError, Stream, StreamEntry};
use crate::Gpa;
use crate::memory::MemoryMap;

/// Pages to be written: address, and 512 words in the byte order of memory.
pub trait Pages {
    /// The pages, ascending.
    fn pages(&self) -> Box<dyn Iterator<Item = (Gpa, &[u64])> + '_>;
}

impl Pages for crate::table::Arena {
    fn pages(&self) -> Box<dyn Iterator<Item = (Gpa, &[u64])> + '_> {
        Box::new(Self::pages(self))
    }
}

/// Writes a snapshot that names its tables into the folder `path`.
///
/// Files appear under their names only once they are complete. With `force` an existing folder is used, and other files in it are left alone.
///
/// # Errors
/// The folder exists and `force` is not given, or the operating system refused.
pub fn store(
    path: &Path,
    force: bool,
    description: &str,
    map: &MemoryMap,
    devices: &[Device],
    streams: &[StreamEntry],
    pages: &dyn Pages,
) -> Result<(), SnapshotError> {
    let tables = streams.iter().map(stream).collect::<Vec<Value>>();
    write(path, force, &document(description, ("tables", tables.into()), map, devices, pages), pages)
}

/// Writes both files of a snapshot.
pub(super) fn write(path: &Path, force: bool, json: &Value, pages: &dyn Pages) -> Result<(), SnapshotError> {
    let exists = fs::symlink_metadata(path).is_ok();
    if exists && !force {
        return Err(SnapshotError::Exists(path.to_owned()));
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    };
    if !parent.is_dir() {
        return Err(SnapshotError::invalid(&parent, "no such folder; create it first"));
    }
    let name = path.file_name().ok_or_else(|| SnapshotError::invalid(path, "not a name for a new folder"))?;
    if exists {
        if !path.is_dir() {
            return Err(SnapshotError::invalid(path, "exists and is not a folder"));
        }
        FILES.iter().try_for_each(|file| check_replaceable(&path.join(file)))?;
        let staged = Staged::new(path.join(format!(".stagecraft-{}", std::process::id())), path)?;
        write_files(&staged.0, path, json, pages)?;
        return replace(&staged.0, path);
    }
    let staged = Staged::new(parent.join(format!(".{}.stagecraft-{}", name.to_string_lossy(), std::process::id())), path)?;
    write_files(&staged.0, path, json, pages)?;
    fs::rename(&staged.0, path).map_err(SnapshotError::io(path))
}

/// The files of a snapshot, in the order in which they are put into place.
const FILES: [&str; 2] = ["pages.bin", "snapshot.json"];

/// Refuses what a file cannot take the place of, or should not: folders, devices, pipes. A link is replaced, not followed.
fn check_replaceable(path: &Path) -> Result<(), SnapshotError> {
    match fs::symlink_metadata(path) {
        Ok(found) if !(found.is_file() || found.is_symlink()) => Err(SnapshotError::invalid(path, "exists and is not a file: it is not replaced")),
        _ => Ok(()),
    }
}

/// Puts the files of `staged` into `path`: all of them, or else what was there is there again.
fn replace(staged: &Path, path: &Path) -> Result<(), SnapshotError> {
    let old = |file: &str| staged.join(format!("old-{file}"));
    let mut done = Vec::new();
    for file in FILES {
        let to = path.join(file);
        // A second name for the old file, so that there is no moment without it; where there are none, it is moved away.
        let moved = match fs::hard_link(&to, old(file)).or_else(|_| fs::rename(&to, old(file))) {
            Ok(()) => fs::rename(staged.join(file), &to),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => fs::rename(staged.join(file), &to),
            Err(error) => Err(error),
        };
        done.push(file);
        if let Err(error) = moved {
            for file in done.into_iter().rev() {
                // What was not there before does not stay.
                if fs::rename(old(file), path.join(file)).is_err() && file != to.file_name().unwrap_or_default() {
                    let _ = fs::remove_file(path.join(file));
                }
            }
            return Err(SnapshotError::io(&to)(error));
        }
    }
    Ok(())
}

/// A folder that is removed again unless it was renamed.
struct Staged(PathBuf);

impl Staged {
    /// For what will be `target`, which errors name.
    fn new(path: PathBuf, target: &Path) -> Result<Self, SnapshotError> {
        fs::create_dir(&path).map_err(SnapshotError::io(target))?;
        Ok(Self(path))
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Writes the files into `folder`; errors name the files of `target`, which is what people know.
fn write_files(folder: &Path, target: &Path, json: &Value, pages: &dyn Pages) -> Result<(), SnapshotError> {
    let write_pages = || -> std::io::Result<()> {
        let mut out = BufWriter::new(File::create(folder.join("pages.bin"))?);
        for (_, words) in pages.pages() {
            for word in words {
                out.write_all(&word.to_ne_bytes())?;
            }
        }
        out.flush()
    };
    write_pages().map_err(SnapshotError::io(&target.join("pages.bin")))?;
    let mut text = serde_json::to_string_pretty(json).unwrap_or_default();
    text.push('\n');
    fs::write(folder.join("snapshot.json"), text).map_err(SnapshotError::io(&target.join("snapshot.json")))
}

pub(super) fn hex(value: u64) -> Value {
    Value::String(format!("{value:#x}"))
}

/// A setting in JSON: a number, or in hex where a JSON number would lose digits.
#[must_use]
pub(crate) fn setting(value: u64) -> Value {
    if value < 1 << 53 { Value::from(value) } else { hex(value) }
}

/// `snapshot.json`, with the member `name` that says what devices reach.
pub(super) fn document(description: &str, (name, source): (&str, Value), map: &MemoryMap, devices: &[Device], pages: &dyn Pages) -> Value {
    let memory: Vec<Value> = map
        .regions()
        .iter()
        .map(|region| json!({"kind": region.kind.as_str(), "first": hex(region.span.first), "last": hex(region.span.last)}))
        .collect();
    let devices: Vec<Value> = devices.iter().map(|device| json!({"label": device.label, "id": hex(device.id)})).collect();
    let pages: Vec<Value> = pages.pages().map(|(address, _)| hex(address.0)).collect();
    json!({
        "version": 1,
        "description": description,
        name: source,
        "memory": memory,
        "devices": devices,
        "page_size": crate::memory::PAGE,
        "pages": pages,
    })
}

fn stream(entry: &StreamEntry) -> Value {
    let mut object = Map::new();
    object.insert("id".to_owned(), hex(entry.id));
    if let Some(pasid) = entry.pasid {
        object.insert("pasid".to_owned(), Value::from(pasid));
    }
    match &entry.stream {
        Stream::Table { format, settings } => {
            object.insert("format".to_owned(), Value::from(format.as_str()));
            // A table of which only another range has a root has none to stand beside the format.
            if let Some((_, root)) = settings.iter().find(|(name, _)| name == "root") {
                object.insert("root".to_owned(), hex(*root));
            }
            // Further roots are addresses too, and read better in hex.
            let others = settings.iter().filter(|(name, _)| name != "root");
            let value = |name: &str, value: u64| if name.starts_with("root") { hex(value) } else { setting(value) };
            object.insert("settings".to_owned(), others.map(|(name, number)| (name.clone(), value(name, *number))).collect::<Map<_, _>>().into());
        }
        Stream::Bypass => {
            object.insert("state".to_owned(), Value::from("bypass"));
        }
        Stream::Blocked(reason) | Stream::Unused(reason) => {
            object.insert("state".to_owned(), Value::from("blocked"));
            object.insert("reason".to_owned(), Value::from(reason.as_str()));
            if matches!(entry.stream, Stream::Unused(_)) {
                object.insert("unused".to_owned(), Value::from(true));
            }
        }
    }
    object.into()
}
