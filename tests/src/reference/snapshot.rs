//! Snapshot folders: `snapshot.json`, `pages.bin`, and beside them `expected.json` and `dma.json`.
//!
//! Two forms are read. In the first, `unit.registers` holds the unit's registers and [`crate::reference::detect`] finds the tables. In the converted one, a list
//! `tables` (at the top level, or inside `unit`) names each device's table with its format and settings.

use std::collections::BTreeMap;
use std::fs;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::tables::{Settings, TableConfig};
use super::{Access, Problem, Run};

/// The size of a page in `pages.bin`.
pub const PAGE: u64 = 4096;

/// The bytes of a page of 4 KiB. Copies share them until one is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page(Arc<[u8; 4096]>);

impl Page {
    /// A page of zeroes.
    #[must_use]
    pub fn zeroed() -> Self {
        [0; 4096].into()
    }
}

impl From<[u8; 4096]> for Page {
    fn from(bytes: [u8; 4096]) -> Self {
        Self(Arc::new(bytes))
    }
}

impl Deref for Page {
    type Target = [u8; 4096];

    fn deref(&self) -> &[u8; 4096] {
        &self.0
    }
}

impl DerefMut for Page {
    fn deref_mut(&mut self) -> &mut [u8; 4096] {
        Arc::make_mut(&mut self.0)
    }
}

/// Physical memory as far as it is known: pages of 4 KiB by address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// The pages.
    pub pages: BTreeMap<u64, Page>,
}

impl Memory {
    /// Reads eight bytes at an address that is a multiple of eight.
    ///
    /// # Errors
    /// [`Problem::Unreadable`] with the page's address if it is not there.
    pub fn read(&self, address: u64, big_endian: bool) -> Result<u64, Problem> {
        assert_eq!(address % 8, 0, "entries are aligned");
        let page_address = address - address % PAGE;
        let page = self.pages.get(&page_address).ok_or(Problem::Unreadable(page_address))?;
        let start = (address % PAGE) as usize;
        let bytes: [u8; 8] = page[start..start + 8].try_into().unwrap();
        Ok(if big_endian { u64::from_be_bytes(bytes) } else { u64::from_le_bytes(bytes) })
    }

    /// Reads four bytes at an address that is a multiple of four.
    ///
    /// # Errors
    /// [`Problem::Unreadable`] with the page's address if it is not there.
    pub fn read4(&self, address: u64, big_endian: bool) -> Result<u64, Problem> {
        let both = self.read(address - address % 8, big_endian)?;
        let first = address.is_multiple_of(8) == big_endian;
        Ok(if first { both >> 32 } else { both % (1 << 32) })
    }

    /// Writes four bytes, adding the page if it was not there.
    pub fn write4(&mut self, address: u64, value: u64, big_endian: bool) {
        let place = address - address % 8;
        let both = self.read(place, big_endian).unwrap_or(0);
        let first = address.is_multiple_of(8) == big_endian;
        let both = if first { (both % (1 << 32)) | value << 32 } else { (both >> 32 << 32) | value };
        self.write(place, both, big_endian);
    }

    /// Writes eight bytes, adding the page if it was not there.
    pub fn write(&mut self, address: u64, value: u64, big_endian: bool) {
        assert_eq!(address % 8, 0, "entries are aligned");
        let page = self.pages.entry(address - address % PAGE).or_insert_with(Page::zeroed);
        let start = (address % PAGE) as usize;
        let bytes = if big_endian { value.to_be_bytes() } else { value.to_le_bytes() };
        page[start..start + 8].copy_from_slice(&bytes);
    }

    /// Adds zeroed pages for a range that is not there yet.
    pub fn add_zeroed(&mut self, address: u64, size: u64) {
        let mut page = address - address % PAGE;
        while page < address + size {
            self.pages.entry(page).or_insert_with(Page::zeroed);
            page += PAGE;
        }
    }
}

/// A range of the guest-physical map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// `ram` or `device`.
    pub kind: String,
    /// First address.
    pub first: u64,
    /// Last address, inclusive.
    pub last: u64,
}

/// A device behind the unit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its PCI address.
    pub label: String,
    /// Its StreamID or requester id.
    pub id: u64,
}

/// What the converted form says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TableState {
    /// Untranslated.
    Bypass,
    /// Every request fails; the reason.
    Blocked(String),
    /// Translated by these tables.
    Tables(TableConfig),
}

/// An entry of the converted form's `tables`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableEntry {
    /// The device's id.
    pub id: u64,
    /// The PASID, or none for requests without one.
    pub pasid: Option<u64>,
    /// What happens to its requests.
    pub state: TableState,
}

/// A snapshot in memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// What the guest was.
    pub description: String,
    /// Which unit the registers belong to.
    pub unit_kind: String,
    /// The unit's registers by architectural name; empty in the converted form.
    pub registers: BTreeMap<String, u64>,
    /// The converted form's tables; empty in the first form.
    pub tables: Vec<TableEntry>,
    /// The guest-physical map.
    pub map: Vec<MemoryRange>,
    /// The devices.
    pub devices: Vec<Device>,
    /// The pages that were kept.
    pub memory: Memory,
}

/// What `expected.json` says of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stream {
    /// The device's PCI address.
    pub label: String,
    /// The device's id.
    pub id: u64,
    /// Its mappings: sorted maximal runs.
    pub runs: Vec<Run>,
}

/// A row of `dma.json`: one real access and its fate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DmaRow {
    /// The device's id.
    pub id: u64,
    /// Where it accessed.
    pub iova: u64,
    /// Whether it wrote.
    pub write: bool,
    /// Whether the access went through.
    pub succeeds: bool,
}

/// A JSON number, or a string with a hexadecimal (`0x`) or decimal number, or a truth value.
pub(crate) fn number(value: &Value) -> Option<u64> {
    match value {
        Value::Number(number) => number.as_u64().or_else(|| number.as_i64().map(|value| value as u64)),
        Value::Bool(truth) => Some(u64::from(*truth)),
        Value::String(text) => match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => text.parse().ok(),
        },
        _ => None,
    }
}

fn malformed(what: &str) -> Problem {
    Problem::File(format!("malformed or missing: {what}"))
}

fn number_of(object: &Value, key: &str) -> Result<u64, Problem> {
    object.get(key).and_then(number).ok_or_else(|| malformed(key))
}

fn text_of(object: &Value, key: &str) -> Result<String, Problem> {
    object.get(key).and_then(Value::as_str).map(str::to_string).ok_or_else(|| malformed(key))
}

fn list_of<'a>(object: &'a Value, key: &str) -> Result<&'a Vec<Value>, Problem> {
    object.get(key).and_then(Value::as_array).ok_or_else(|| malformed(key))
}

fn read_json(path: &Path) -> Result<Value, Problem> {
    let bytes = fs::read(path).map_err(|error| Problem::File(format!("{}: {error}", path.display())))?;
    serde_json::from_slice(&bytes).map_err(|error| Problem::File(format!("{}: {error}", path.display())))
}

fn table_entry(value: &Value) -> Result<TableEntry, Problem> {
    let id = number_of(value, "id")?;
    let pasid = match value.get("pasid") {
        None | Some(Value::Null) => None,
        Some(pasid) => Some(number(pasid).ok_or_else(|| malformed("pasid"))?),
    };
    let state = match value.get("state").and_then(Value::as_str) {
        Some("bypass") => TableState::Bypass,
        Some("blocked") => TableState::Blocked(value.get("reason").and_then(Value::as_str).unwrap_or("").to_string()),
        Some(other) if value.get("format").is_none() => return Err(malformed(&format!("state {other}"))),
        _ => {
            let format = text_of(value, "format")?;
            let mut settings = Settings::new();
            if let Some(object) = value.get("settings").and_then(Value::as_object) {
                for (key, value) in object {
                    settings.insert(key.clone(), number(value).ok_or_else(|| malformed(key))?);
                }
            }
            // The root stands beside the settings; inside them it is accepted too.
            if let Some(root) = value.get("root").filter(|root| !root.is_null()) {
                settings.insert("root".to_string(), number(root).ok_or_else(|| malformed("root"))?);
            }
            TableState::Tables(TableConfig::from_settings(&format, &settings)?)
        }
    };
    Ok(TableEntry { id, pasid, state })
}

impl Snapshot {
    /// Loads a snapshot folder, in either form.
    ///
    /// # Errors
    /// [`Problem::File`] for missing or malformed files, [`Problem::Illegal`] and [`Problem::Unsupported`] for settings.
    pub fn load(folder: &Path) -> Result<Snapshot, Problem> {
        let root = read_json(&folder.join("snapshot.json"))?;
        let mut snapshot = Snapshot { description: root.get("description").and_then(Value::as_str).unwrap_or("").to_string(), ..Snapshot::default() };
        let unit = root.get("unit").cloned().unwrap_or(Value::Null);
        snapshot.unit_kind = unit.get("kind").and_then(Value::as_str).unwrap_or("").to_string();
        if let Some(registers) = unit.get("registers").and_then(Value::as_object) {
            for (name, value) in registers {
                snapshot.registers.insert(name.clone(), number(value).ok_or_else(|| malformed(name))?);
            }
        }
        if let Some(tables) = root.get("tables").or_else(|| unit.get("tables")).and_then(Value::as_array) {
            for entry in tables {
                snapshot.tables.push(table_entry(entry)?);
            }
        }
        if root.get("memory").is_some() {
            for range in list_of(&root, "memory")? {
                snapshot.map.push(MemoryRange { kind: text_of(range, "kind")?, first: number_of(range, "first")?, last: number_of(range, "last")? });
            }
        }
        if root.get("devices").is_some() {
            for device in list_of(&root, "devices")? {
                snapshot.devices.push(Device { label: text_of(device, "label")?, id: number_of(device, "id")? });
            }
        }
        if number_of(&root, "page_size")? != PAGE {
            return Err(malformed("page_size"));
        }
        let addresses = list_of(&root, "pages")?;
        let path = folder.join("pages.bin");
        let content = fs::read(&path).map_err(|error| Problem::File(format!("{}: {error}", path.display())))?;
        if content.len() != addresses.len() * 4096 {
            return Err(malformed("length of pages.bin"));
        }
        for (address, page) in addresses.iter().zip(content.chunks_exact(4096)) {
            let address = number(address).filter(|address| address % PAGE == 0).ok_or_else(|| malformed("pages"))?;
            snapshot.memory.pages.insert(address, <[u8; 4096]>::try_from(page).unwrap().into());
        }
        Ok(snapshot)
    }

    /// Writes `snapshot.json` and `pages.bin` into an existing folder: registers if there are any, else `tables`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_snapshot(&self, folder: &Path) -> std::io::Result<()> {
        let hex = |value: u64| Value::String(format!("{value:#x}"));
        let mut root = Map::new();
        root.insert("version".to_string(), json!(1));
        root.insert("description".to_string(), json!(self.description));
        if self.registers.is_empty() {
            let mut tables = Vec::new();
            for entry in &self.tables {
                let mut object = Map::new();
                object.insert("id".to_string(), hex(entry.id));
                if let Some(pasid) = entry.pasid {
                    object.insert("pasid".to_string(), hex(pasid));
                }
                match &entry.state {
                    TableState::Bypass => {
                        object.insert("state".to_string(), json!("bypass"));
                    }
                    TableState::Blocked(reason) => {
                        object.insert("state".to_string(), json!("blocked"));
                        object.insert("reason".to_string(), json!(reason));
                    }
                    TableState::Tables(config) => {
                        let mut settings = config.settings();
                        object.insert("format".to_string(), json!(config.format()));
                        if let Some(root) = settings.remove("root") {
                            object.insert("root".to_string(), hex(root));
                        }
                        let settings: Map<String, Value> = settings
                            .into_iter()
                            .map(|(key, value)| {
                                // Addresses and attribute words read better in hexadecimal.
                                let value = match key.as_str() {
                                    "root-high" | "mair" | "root-1" | "root-2" | "root-3" | "first-iova" | "last-iova" => hex(value),
                                    "start-level" => json!(value as i64),
                                    _ => json!(value),
                                };
                                (key, value)
                            })
                            .collect();
                        object.insert("settings".to_string(), Value::Object(settings));
                    }
                }
                tables.push(Value::Object(object));
            }
            root.insert("tables".to_string(), Value::Array(tables));
        } else {
            let registers: Map<String, Value> = self.registers.iter().map(|(name, value)| (name.clone(), hex(*value))).collect();
            root.insert("unit".to_string(), json!({"kind": self.unit_kind, "registers": registers}));
        }
        let map: Vec<Value> = self.map.iter().map(|range| json!({"kind": range.kind, "first": hex(range.first), "last": hex(range.last)})).collect();
        root.insert("memory".to_string(), Value::Array(map));
        let devices: Vec<Value> = self.devices.iter().map(|device| json!({"label": device.label, "id": hex(device.id)})).collect();
        root.insert("devices".to_string(), Value::Array(devices));
        root.insert("page_size".to_string(), json!(PAGE));
        let pages: Vec<Value> = self.memory.pages.keys().map(|address| hex(*address)).collect();
        root.insert("pages".to_string(), Value::Array(pages));
        fs::write(folder.join("snapshot.json"), serde_json::to_vec(&Value::Object(root))?)?;
        let mut content = Vec::with_capacity(self.memory.pages.len() * 4096);
        for page in self.memory.pages.values() {
            content.extend_from_slice(page.as_slice());
        }
        fs::write(folder.join("pages.bin"), content)
    }
}

/// Writes `expected.json`.
///
/// # Errors
/// Those of the file system.
pub fn write_expected(folder: &Path, streams: &[Stream]) -> std::io::Result<()> {
    let hex = |value: u64| format!("{value:#x}");
    let streams: Vec<Value> = streams
        .iter()
        .map(|stream| {
            let runs: Vec<Value> = stream
                .runs
                .iter()
                .map(|run| json!({"iova": hex(run.iova), "address": hex(run.address), "size": run.size, "access": run.access.to_string()}))
                .collect();
            json!({"label": stream.label, "id": hex(stream.id), "mappings": runs})
        })
        .collect();
    fs::write(folder.join("expected.json"), serde_json::to_vec(&json!({"streams": streams}))?)
}

/// Loads `expected.json`.
///
/// # Errors
/// [`Problem::File`] if it is missing or malformed.
pub fn load_expected(folder: &Path) -> Result<Vec<Stream>, Problem> {
    let root = read_json(&folder.join("expected.json"))?;
    let mut streams = Vec::new();
    for stream in list_of(&root, "streams")? {
        let mut runs = Vec::new();
        for mapping in list_of(stream, "mappings")? {
            runs.push(Run {
                iova: number_of(mapping, "iova")?,
                address: number_of(mapping, "address")?,
                size: number_of(mapping, "size")?,
                access: Access::parse(&text_of(mapping, "access")?).ok_or_else(|| malformed("access"))?,
            });
        }
        streams.push(Stream { label: text_of(stream, "label")?, id: number_of(stream, "id")?, runs });
    }
    Ok(streams)
}

/// Loads `dma.json`; nothing if the folder has none.
///
/// # Errors
/// [`Problem::File`] if it is malformed.
pub fn load_dma(folder: &Path) -> Result<Vec<DmaRow>, Problem> {
    let path = folder.join("dma.json");
    if !path.exists() {
        return Ok(Vec::new());
    }
    let root = read_json(&path)?;
    let mut rows = Vec::new();
    for row in root.as_array().ok_or_else(|| malformed("dma.json"))? {
        let access = Access::parse(&text_of(row, "access")?).filter(|access| *access == Access::R || *access == Access::W);
        rows.push(DmaRow {
            id: number_of(row, "id")?,
            iova: number_of(row, "iova")?,
            write: access.ok_or_else(|| malformed("access"))?.write,
            succeeds: row.get("succeeds").and_then(Value::as_bool).ok_or_else(|| malformed("succeeds"))?,
        });
    }
    Ok(rows)
}
