//! Snapshots of guests that have no tables: endpoints, domains and the mappings that were asked for.
//!
//! Beside `unit` with the kind `virtio-iommu` stands the member `domains`, and the registers are the fields of the device's configuration space; see
//! `docs/snapshot.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::json::{Number, Unit1};
use super::store::{Pages, document, hex, write};
use super::{Device, Named, SnapshotError};
use crate::memory::MemoryMap;
use crate::table::Piece;
use crate::virtio_iommu::{Device as RequestDevice, Domain, Features, MapFlags, UNIT};
use crate::{Gpa, MemoryType, Span};

/// A domain and who is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DomainEntry {
    /// Its id.
    pub id: u32,
    /// Ids of the devices that are attached to it.
    pub endpoints: Vec<u64>,
    /// What it maps; none for a bypass domain.
    pub contents: Option<Arc<Domain>>,
}

/// What a guest without tables asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domains {
    /// Fields of the configuration space, `features` (those that were offered) and `accepted` (those that the driver accepted).
    pub registers: Named,
    /// The domains. No endpoint is in two of them.
    pub entries: Vec<DomainEntry>,
}

impl Domains {
    /// What the guest asked a device for, up to now.
    #[must_use]
    pub fn of_device(device: &RequestDevice) -> Self {
        let config = device.config();
        let registers = [
            ("features", device.offered().0),
            ("accepted", device.accepted().0),
            ("page_size_mask", config.page_size_mask),
            ("input_range_start", config.input_range.first),
            ("input_range_end", config.input_range.last),
            ("domain_range_start", config.domain_range.first.into()),
            ("domain_range_end", config.domain_range.last.into()),
            ("probe_size", config.probe_size.into()),
            ("bypass", config.bypass.into()),
        ];
        let entries = device.domains().map(|(id, endpoints, contents)| DomainEntry {
            id,
            endpoints: endpoints.map(u64::from).collect(),
            contents: contents.cloned().map(Arc::new),
        });
        Self { entries: entries.collect(), registers: registers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect() }
    }

    /// The domain that a device is attached to.
    #[must_use]
    pub fn of(&self, id: u64) -> Option<&DomainEntry> {
        self.entries.iter().find(|entry| entry.endpoints.contains(&id))
    }

    /// What a domain maps; none if there is no such domain, or it is a bypass domain.
    #[must_use]
    pub fn get(&self, id: u64) -> Option<Arc<Domain>> {
        self.entries.iter().find(|entry| u64::from(entry.id) == id)?.contents.clone()
    }

    /// Whether devices without a domain bypass translation (Virtio 1.3 section 5.13.6).
    #[must_use]
    pub fn bypass(&self) -> bool {
        let register = |name: &str| self.registers.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
        let has = |name: &str, feature: Features| register(name).is_some_and(|bits| Features(bits).contains(feature));
        has("features", Features::BYPASS_CONFIG) && register("bypass") == Some(1) || has("accepted", Features::BYPASS)
    }

    /// Mappings in all domains together.
    #[must_use]
    pub fn mappings(&self) -> u64 {
        self.entries.iter().filter_map(|entry| entry.contents.as_ref()).map(|domain| domain.len()).sum()
    }
}

/// A domain in `snapshot.json`.
#[derive(Deserialize)]
#[serde(expecting = "a domain: an object with `id`, `endpoints` and `mappings`")]
pub(super) struct Domain1 {
    id: Number,
    #[serde(default)]
    bypass: bool,
    endpoints: Vec<Number>,
    #[serde(default)]
    mappings: Vec<Mapping1>,
}

#[derive(Deserialize)]
#[serde(expecting = "a mapping: an object with `first`, `last`, `address` and `access`")]
struct Mapping1 {
    first: Number,
    last: Number,
    address: Number,
    access: String,
    #[serde(default)]
    mmio: bool,
}

/// Reads the member `domains`.
pub(super) fn read(unit: Option<Unit1>, list: Vec<Domain1>, devices: &[Device]) -> Result<Domains, String> {
    let registers = match unit {
        Some(Unit1 { kind: Some(kind), registers }) if kind == UNIT => registers.map_or(Vec::new(), |registers| registers.0),
        Some(Unit1 { kind: Some(kind), .. }) => return Err(format!("a unit of kind `{kind}` has no `domains`; one of kind `{UNIT}` has")),
        Some(Unit1 { kind: None, .. }) | None => return Err(format!("`domains` without a unit of kind `{UNIT}`")),
    };
    let devices: BTreeSet<u64> = devices.iter().map(|device| device.id).collect();
    let mut attached: BTreeMap<u64, u32> = BTreeMap::new();
    let mut entries: Vec<DomainEntry> = Vec::with_capacity(list.len());
    let mut ids = BTreeSet::new();
    for domain in list {
        let id = u32::try_from(domain.id.0).map_err(|_| format!("domain {:#x} has more than 32 bits", domain.id.0))?;
        if !ids.insert(id) {
            return Err(format!("domain {id:#x} is listed twice"));
        }
        for Number(endpoint) in &domain.endpoints {
            if !devices.contains(endpoint) {
                return Err(format!("domain {id:#x}: endpoint {endpoint:#x} is not among the devices"));
            }
            if let Some(other) = attached.insert(*endpoint, id) {
                if other == id {
                    return Err(format!("domain {id:#x}: endpoint {endpoint:#x} is listed twice"));
                }
                return Err(format!("endpoint {endpoint:#x} is in domains {other:#x} and {id:#x}"));
            }
        }
        if domain.bypass && !domain.mappings.is_empty() {
            return Err(format!("domain {id:#x} is a bypass domain and has mappings"));
        }
        let contents = if domain.bypass { None } else { Some(Arc::new(contents(id, &domain.mappings)?)) };
        entries.push(DomainEntry { id, endpoints: domain.endpoints.iter().map(|endpoint| endpoint.0).collect(), contents });
    }
    Ok(Domains { registers, entries })
}

fn contents(id: u32, mappings: &[Mapping1]) -> Result<Domain, String> {
    let mut domain = Domain::new();
    for Mapping1 { first, last, address, access, mmio } in mappings {
        let access = match access.as_str() {
            "r" => MapFlags::READ,
            "w" => MapFlags::WRITE,
            "rw" => MapFlags::READ.with(MapFlags::WRITE),
            "-" => MapFlags::default(),
            other => return Err(format!("domain {id:#x}: access `{other}`; there are `r`, `w`, `rw` and `-`")),
        };
        let flags = if *mmio { access.with(MapFlags::MMIO) } else { access };
        let piece = Piece { iova: Span { first: first.0, last: last.0 }, address: address.0, attributes: flags.attributes() };
        domain.map(piece).map_err(|error| format!("domain {id:#x}: {error}"))?;
    }
    Ok(domain)
}

/// No pages: there are no tables.
struct NoPages;

impl Pages for NoPages {
    fn pages(&self) -> Box<dyn Iterator<Item = (Gpa, &[u64])> + '_> {
        Box::new(std::iter::empty())
    }
}

/// Writes a snapshot of a guest that asked for its mappings into the folder `path`, as [`store`](super::store) does for tables.
///
/// # Errors
/// The folder exists and `force` is not given, or the operating system refused.
pub fn store_domains(
    path: &Path,
    force: bool,
    description: &str,
    map: &MemoryMap,
    devices: &[Device],
    domains: &Domains,
) -> Result<(), SnapshotError> {
    let registers: serde_json::Map<String, Value> = domains.registers.iter().map(|(name, value)| (name.clone(), hex(*value))).collect();
    let list: Vec<Value> = domains.entries.iter().map(entry).collect();
    let mut json = document(description, ("domains", list.into()), map, devices, &NoPages);
    if let Some(object) = json.as_object_mut() {
        object.insert("unit".to_owned(), json!({"kind": UNIT, "registers": registers}));
    }
    write(path, force, &json, &NoPages)
}

fn entry(entry: &DomainEntry) -> Value {
    let endpoints: Vec<Value> = entry.endpoints.iter().map(|id| hex(*id)).collect();
    match &entry.contents {
        None => json!({"id": entry.id, "bypass": true, "endpoints": endpoints}),
        Some(domain) => json!({"id": entry.id, "endpoints": endpoints, "mappings": domain.iter().map(mapping).collect::<Vec<_>>()}),
    }
}

fn mapping(piece: &Piece) -> Value {
    let mut object = json!({
        "first": hex(piece.iova.first),
        "last": hex(piece.iova.last),
        "address": hex(piece.address),
        "access": piece.attributes.access(false).as_str(),
    });
    if let (MemoryType::Device, Some(object)) = (piece.attributes.memory_type(), object.as_object_mut()) {
        object.insert("mmio".to_owned(), true.into());
    }
    object
}
