//! `snapshot.json`, read.

use std::collections::HashSet;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::domains::{self, Domain1};
use super::{Device, PageMemory, Snapshot, SnapshotError, Source, Stream, StreamEntry, memory, place};
use crate::Span;
use crate::memory::{Kind, MemoryMap, PAGE, Region};

/// Largest `snapshot.json` that is read: room for some ten million pages.
const MAX_JSON: u64 = 256 << 20;

/// Most pages that are read: 8 GiB.
const MAX_PAGES: u64 = 1 << 21;
/// Most ranges of guest memory.
const MAX_RANGES: usize = 1 << 16;
/// Most devices of a guest.
const MAX_DEVICES: usize = 1 << 16;
/// Most streams that a list of tables names.
const MAX_STREAMS: usize = 1 << 20;

/// A number, written in hex (`"0x1000"`) or as a JSON integer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Number(pub(super) u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Digits;
        impl Visitor<'_> for Digits {
            type Value = Number;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a number such as \"0x1000\" or 4096, below 2^64")
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Number, E> {
                Ok(Number(value))
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Number, E> {
                let hex = text.strip_prefix("0x").filter(|digits| !digits.starts_with('+'));
                let value = hex.and_then(|digits| u64::from_str_radix(digits, 16).ok());
                value.map(Number).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
            }
        }
        deserializer.deserialize_any(Digits)
    }
}

#[derive(Deserialize)]
#[serde(expecting = "a snapshot: an object with `version`, `memory`, `devices`, `page_size`, `pages` and what docs/snapshot.md lists")]
struct File1 {
    version: Number,
    #[serde(default)]
    description: String,
    unit: Option<Unit1>,
    tables: Option<Vec<Table1>>,
    domains: Option<Vec<Domain1>>,
    memory: Vec<Region1>,
    devices: Option<Vec<Device1>>,
    page_size: Number,
    pages: Vec<Number>,
}

#[derive(Deserialize)]
#[serde(expecting = "a unit: an object with `kind` and `registers`")]
pub(super) struct Unit1 {
    pub(super) kind: Option<String>,
    pub(super) registers: Option<Pairs>,
}

#[derive(Deserialize)]
#[serde(expecting = "a memory range: an object with `kind`, `first` and `last`")]
struct Region1 {
    kind: String,
    first: Number,
    last: Number,
}

#[derive(Deserialize)]
#[serde(expecting = "a device: an object with `label` and `id`")]
struct Device1 {
    label: String,
    id: Number,
}

#[derive(Deserialize)]
#[serde(expecting = "a stream: an object with `id`, and `format`, `root` and `settings`, or a `state`")]
struct Table1 {
    id: Number,
    #[serde(default)]
    pasid: Option<Number>,
    #[serde(default)]
    state: Option<String>,
    #[serde(default)]
    reason: Option<String>,
    #[serde(default)]
    unused: bool,
    #[serde(default)]
    format: Option<String>,
    #[serde(default)]
    root: Option<Number>,
    #[serde(default)]
    settings: Pairs,
}

/// A JSON object of names and numbers, in order and without repetition.
#[derive(Default)]
pub(super) struct Pairs(pub(super) Vec<(String, u64)>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Pairs;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of names and numbers")
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs: Vec<(String, u64)> = Vec::new();
                while let Some((name, Number(value))) = map.next_entry::<String, Number>()? {
                    if pairs.len() >= 512 {
                        return Err(de::Error::custom("more than 512 names"));
                    }
                    if pairs.iter().any(|(known, _)| *known == name) {
                        return Err(de::Error::custom(format!("`{name}` is given twice")));
                    }
                    pairs.push((name, value));
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Object)
    }
}

impl Snapshot {
    /// Reads the snapshot in the folder `path`.
    ///
    /// # Errors
    /// A file that is not there or cannot be read, and everything that makes no sense, with the file and the thing.
    pub fn load(path: &Path) -> Result<Self, SnapshotError> {
        read(path, source)
    }

    /// Reads a snapshot that need not say what devices reach: the members `unit` and `devices` may be missing or incomplete, for guesses about its memory. What it
    /// does not say is nothing: no registers, or an empty list of tables.
    ///
    /// # Errors
    /// As [`Snapshot::load`].
    pub fn load_memory(path: &Path) -> Result<Self, SnapshotError> {
        read(path, |unit, tables, devices| match unit {
            None if tables.is_none() => Ok(Source::Tables(Vec::new())),
            Some(Unit1 { kind: Some(kind), registers }) if tables.is_none() => Ok(Source::Unit { kind, registers: registers.unwrap_or_default().0 }),
            Some(Unit1 { kind: None, .. }) if tables.is_none() => Ok(Source::Tables(Vec::new())),
            unit => source(unit, tables, devices),
        })
    }
}

/// Reads a snapshot; `source` says where its tables are, from the members `unit` and `tables`, and whether there is a list of devices.
fn read(path: &Path, source: impl FnOnce(Option<Unit1>, Option<Vec<Table1>>, bool) -> Result<Source, String>) -> Result<Snapshot, SnapshotError> {
    let json_path = path.join("snapshot.json");
    let pages_path = path.join("pages.bin");
    if std::fs::symlink_metadata(&json_path).is_err_and(|error| error.kind() == ErrorKind::NotFound) && path.exists() {
        return Err(SnapshotError::invalid(path, "not a snapshot: there is no snapshot.json in it"));
    }
    let json = read_json(&json_path)?;
    let file: File1 = serde_json::from_slice(&json).map_err(|error| SnapshotError::invalid(&json_path, describe(&json, &error)))?;
    drop(json);
    let invalid = |what: String| SnapshotError::invalid(&json_path, what);
    if file.version.0 != 1 {
        return Err(invalid(format!("format version {}; this program reads version 1", file.version.0)));
    }
    if file.page_size.0 != PAGE {
        return Err(invalid(format!("page_size {}; it must be {PAGE}", file.page_size.0)));
    }
    let map = memory_map(file.memory).map_err(invalid)?;
    let has_devices = file.devices.is_some();
    let devices = devices(file.devices.unwrap_or_default()).map_err(invalid)?;
    let source = match file.domains {
        Some(list) if file.tables.is_none() => Source::Domains(domains::read(file.unit, list, &devices).map_err(invalid)?),
        Some(_) => return Err(invalid("both `tables` and `domains`: only one of them can say what devices reach".to_owned())),
        None => source(file.unit, file.tables, has_devices).map_err(invalid)?,
    };
    let mut pages: Vec<(u64, usize)> = file.pages.iter().enumerate().map(|(index, page)| (page.0, index)).collect();
    pages.sort_unstable();
    if let Some((address, _)) = pages.iter().find(|(address, _)| !address.is_multiple_of(PAGE)) {
        return Err(invalid(format!("page {address:#x} is not a multiple of {PAGE}")));
    }
    if let Some(pair) = pages.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(invalid(format!("page {:#x} is listed twice", pair[0].0)));
    }
    // Without tables there need not be a file of pages.
    let none = pages.is_empty() && std::fs::symlink_metadata(&pages_path).is_err_and(|error| error.kind() == ErrorKind::NotFound);
    let memory = if none { memory::PageFile::default().memory() } else { read_pages(&pages_path, &pages)? };
    Ok(Snapshot { description: file.description, source, map, devices, memory, pages: pages.len() as u64 })
}

/// What is wrong with the text, and with which member of it.
fn describe(json: &[u8], error: &serde_json::Error) -> String {
    let what = error.to_string();
    if !error.is_data() {
        return what;
    }
    let mut member = place::member(json, error.line(), error.column());
    // It names the member itself: where it stands twice is the object around it.
    if what.starts_with("duplicate field") {
        member.truncate(member.rfind('.').unwrap_or(0));
    }
    if member.is_empty() { what } else { format!("{member}: {what}") }
}

/// Opens a file, and nothing that is none: a pipe would be waited for, and a device may never end.
fn open(path: &Path) -> Result<File, SnapshotError> {
    let not_a_file = || SnapshotError::invalid(path, "not a file");
    // Looked at before it is opened, because opening a device can do something; and again, because what stands there may have changed.
    if !std::fs::metadata(path).map_err(SnapshotError::io(path))?.is_file() {
        return Err(not_a_file());
    }
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).map_err(|error| SnapshotError::io(path)(error.into()))?);
    if !file.metadata().map_err(SnapshotError::io(path))?.is_file() {
        return Err(not_a_file());
    }
    Ok(file)
}

fn read_json(path: &Path) -> Result<Vec<u8>, SnapshotError> {
    let mut bytes = Vec::new();
    open(path)?.take(MAX_JSON + 1).read_to_end(&mut bytes).map_err(SnapshotError::io(path))?;
    if bytes.len() as u64 > MAX_JSON {
        return Err(SnapshotError::invalid(path, format!("larger than {} MiB", MAX_JSON >> 20)));
    }
    Ok(bytes)
}

/// Memory with these pages: their addresses, ascending, each with its place in the file, which holds nothing else.
fn read_pages(path: &Path, pages: &[(u64, usize)]) -> Result<PageMemory, SnapshotError> {
    let mut file = open(path)?;
    let count = pages.len() as u64;
    let (bytes, found) = (count * PAGE, file.metadata().map_err(SnapshotError::io(path))?.len());
    let wrong = |found: u64| SnapshotError::invalid(path, format!("{found} bytes; the {count} pages of snapshot.json need {bytes}"));
    if found != bytes {
        return Err(wrong(found));
    }
    if count > MAX_PAGES {
        return Err(SnapshotError::invalid(path, format!("{count} pages; there may be {MAX_PAGES}")));
    }
    let no_room = |error| SnapshotError::invalid(path, format!("no memory for {count} pages: {error}"));
    let room = memory::PageFile::new(pages).map_err(no_room)?;
    let read = room.fill(&mut file).map_err(SnapshotError::io(path))?;
    let more = file.read(&mut [0]).map_err(SnapshotError::io(path))? as u64;
    if read + more == bytes { Ok(room.memory()) } else { Err(wrong(read + more)) }
}

/// Where the tables are, as a guest that is to be understood must say it.
fn source(unit: Option<Unit1>, tables: Option<Vec<Table1>>, devices: bool) -> Result<Source, String> {
    if !devices {
        return Err("missing field `devices`: a list of `label` and `id`".to_owned());
    }
    match (unit, tables) {
        (_, Some(tables)) if tables.len() > MAX_STREAMS => Err(format!("tables: {} streams; there may be {MAX_STREAMS}", tables.len())),
        (_, Some(tables)) => {
            let (mut entries, mut known) = (Vec::with_capacity(tables.len()), HashSet::new());
            for table in tables {
                let id = table.id.0;
                let pasid = table.pasid.map(|Number(pasid)| checked_pasid(id, pasid)).transpose()?;
                if !known.insert((id, pasid)) {
                    return Err(format!("tables: device {id:#x} is listed twice"));
                }
                entries.push(StreamEntry { id, pasid, stream: stream(table)? });
            }
            Ok(Source::Tables(entries))
        }
        (Some(Unit1 { kind: Some(kind), .. }), None) if kind == crate::virtio_iommu::UNIT => {
            Err(format!("a unit `{kind}` and no `domains`: it has no tables"))
        }
        (Some(Unit1 { kind: Some(kind), registers: Some(registers) }), None) => Ok(Source::Unit { kind, registers: registers.0 }),
        (Some(Unit1 { kind: None, registers: Some(_) }), None) => Err("`unit` without a `kind`, such as `intel-vtd`".to_owned()),
        (Some(Unit1 { registers: None, .. }) | None, None) => {
            Err("neither `unit.registers` nor `tables`: one of them must say where the tables are".to_owned())
        }
    }
}

/// A PASID that is one.
fn checked_pasid(id: u64, pasid: u64) -> Result<u32, String> {
    let checked = u32::try_from(pasid).ok().filter(|pasid| *pasid < 1 << 20);
    checked.ok_or_else(|| format!("tables: device {id:#x} has PASID {pasid:#x}; a PASID has 20 bits: 0 to 0xfffff"))
}

fn stream(table: Table1) -> Result<Stream, String> {
    let id = table.id.0;
    match (table.state.as_deref(), table.format) {
        (Some("bypass"), None) => Ok(Stream::Bypass),
        (Some("blocked"), None) => {
            let reason = table.reason.unwrap_or_else(|| "blocked in the snapshot".to_owned());
            Ok(if table.unused { Stream::Unused(reason) } else { Stream::Blocked(reason) })
        }
        (None | Some("translated"), Some(format)) => {
            let mut settings = table.settings.0;
            let given = settings.iter().any(|(name, _)| name == "root");
            match (table.root, given) {
                (Some(_), true) => return Err(format!("tables: device {id:#x} has a root beside its settings and another one in them")),
                (Some(root), false) => settings.push(("root".to_owned(), root.0)),
                (None, true) => {}
                // Formats whose tables have several roots may do without the first one.
                (None, false) if settings.iter().any(|(name, _)| name.starts_with("root")) => {}
                (None, false) => return Err(format!("tables: device {id:#x} has a format and no root, neither beside its settings nor among them")),
            }
            Ok(Stream::Table { format, settings })
        }
        (None, None) => Err(format!("tables: device {id:#x} has neither a format nor a state")),
        (Some(state), _) => {
            Err(format!("tables: device {id:#x} has state `{state}`; there are `translated` with a format, `bypass` and `blocked` without"))
        }
    }
}

fn memory_map(regions: Vec<Region1>) -> Result<MemoryMap, String> {
    if regions.len() > MAX_RANGES {
        return Err(format!("{} memory ranges; there may be {MAX_RANGES}", regions.len()));
    }
    let mut map = Vec::with_capacity(regions.len());
    for region in regions {
        let kind = match region.kind.as_str() {
            "ram" => Kind::Ram,
            "device" => Kind::Device,
            "table" => Kind::Table,
            other => return Err(format!("memory of kind `{other}`; there are `ram`, `device` and `table`")),
        };
        let (first, last) = (region.first.0, region.last.0);
        let span = Span::new(first, last).ok_or_else(|| format!("memory range {first:#x}..={last:#x} is empty"))?;
        map.push(Region { kind, span });
    }
    MemoryMap::new(map).map_err(|error| error.to_string())
}

fn devices(devices: Vec<Device1>) -> Result<Vec<Device>, String> {
    if devices.len() > MAX_DEVICES {
        return Err(format!("{} devices; there may be {MAX_DEVICES}, as many as a PCI segment has", devices.len()));
    }
    let mut list: Vec<Device> = devices.into_iter().map(|device| Device { label: device.label, id: device.id.0 }).collect();
    list.sort_by_key(|device| device.id);
    match list.windows(2).find(|pair| pair[0].id == pair[1].id) {
        Some(pair) => Err(format!("devices `{}` and `{}` have the same id {:#x}", pair[0].label, pair[1].label, pair[0].id)),
        None => Ok(list),
    }
}
