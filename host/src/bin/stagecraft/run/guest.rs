//! The guest's side: a driver that keeps tables in the guest's memory, or makes requests, and tells about it as its architecture does.
//!
//! The driver's tables are made by the engine's own table maker, in the guest's memory and format: so this knows no format either.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Result, bail, ensure};
use stagecraft::ioasid::{Context, Ioasid};
use stagecraft::memory::{EntryLayout, MemoryMap, PAGE};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{FormatManifest, Plugin, Settings, TableConfig};
use stagecraft::sync::{NestedTable, RegionTables, TableMemory, Watcher};
use stagecraft::table::{Geometry, Need, Piece};
use stagecraft::virtio_iommu::{self, Features, MapFlags, Request, RequestLimits, Status};
use stagecraft::{Change, Gpa, Span};
use vm_memory::MmapRegion;

use super::scenario::Announces;
use super::unit::Forget;
use super::vmm::Vmm;

/// Highest IOVA that tables are made for, if the format has so many.
const LAST_IOVA: u64 = (1 << 48) - 1;

/// Settings of a table of the guest's: the scenario's, completed by the plugin.
pub fn settings(plugin: &Plugin, format: &str, given: &[(String, u64)], last_address: u64) -> Result<Settings> {
    let manifest = plugin.manifest().format(format);
    let mut settings = Settings::new();
    for (name, value) in given {
        if !manifest.is_some_and(|format| format.settings.iter().any(|setting| setting.name == *name)) {
            let known: Vec<&str> = manifest.into_iter().flat_map(FormatManifest::wishable).collect();
            bail!("{format} has no setting `{name}`; there are {}", known.join(", "));
        }
        settings.set(name, *value);
    }
    let need = Need { last_low: Some(LAST_IOVA), first_high: None, last_address, alignment_log2: 12 };
    Ok(plugin.instantiate()?.suggest(format, &settings, &need)?)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest pages that hold tables, as the host wants them watched.
#[derive(Clone, Debug, Default)]
pub struct Watched(Arc<Mutex<HashSet<u64>>>);

impl Watched {
    fn contains(&self, page: u64) -> bool {
        lock(&self.0).contains(&page)
    }
}

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        lock(&self.0).insert(page.0);
    }

    fn unwatch(&mut self, page: Gpa) {
        lock(&self.0).remove(&page.0);
    }
}

/// What became of the driver's tables in guest memory.
#[derive(Debug, Default)]
struct Log {
    /// First byte and length of what was written, in that order; neighbours are one.
    written: Vec<(u64, u64)>,
    /// Bytes of tables.
    used: u64,
}

impl Log {
    fn note(&mut self, address: u64, bytes: u64) {
        match self.written.last_mut() {
            Some((first, length)) if *first + *length == address => *length += bytes,
            _ => self.written.push((address, bytes)),
        }
    }
}

/// Tables in guest memory, with a log.
#[derive(Debug)]
struct Recorded {
    tables: RegionTables,
    log: Arc<Mutex<Log>>,
}

impl Recorded {
    fn log(&self) -> MutexGuard<'_, Log> {
        lock(&self.log)
    }

    fn note_entry(&self, table: Gpa, layout: EntryLayout, index: u64) {
        let bytes = u64::from(layout.bytes);
        self.log().note(table.0 + index * bytes, bytes);
    }
}

impl TableMemory for Recorded {
    fn allocate(&mut self, bytes: u64) -> Option<Gpa> {
        let table = self.tables.allocate(bytes)?;
        self.log().used += bytes;
        Some(table)
    }

    fn release(&mut self, table: Gpa, bytes: u64) {
        self.log().used -= bytes;
        self.tables.release(table, bytes);
    }

    fn fill(&mut self, table: Gpa, layout: EntryLayout, entries: &[u64]) {
        self.tables.fill(table, layout, entries);
        self.log().note(table.0, entries.len() as u64 * u64::from(layout.bytes));
    }

    fn store(&mut self, table: Gpa, layout: EntryLayout, index: u64, entry: u64) {
        self.tables.store(table, layout, index, entry);
        self.note_entry(table, layout, index);
    }

    fn load(&self, table: Gpa, layout: EntryLayout, index: u64) -> u64 {
        self.tables.load(table, layout, index)
    }

    fn compare_exchange(&mut self, table: Gpa, layout: EntryLayout, index: u64, old: u64, new: u64) -> u64 {
        let stood = self.tables.compare_exchange(table, layout, index, old, new);
        self.note_entry(table, layout, index);
        stood
    }
}

/// A driver.
#[derive(Debug)]
pub enum Driver {
    /// It writes tables.
    Tables(Box<Tables>),
    /// It makes requests.
    Requests(Box<Requests>),
}

impl Driver {
    /// Makes changes in the guest's memory, as the guest's processor does: the host does not know yet. With the guest's unit, commands are queued for that device.
    pub fn write(&mut self, changes: &[Change], vmm: Option<(&mut Vmm, usize)>) -> Result<()> {
        match self {
            Self::Tables(tables) => tables.write(changes, vmm),
            Self::Requests(requests) => {
                requests.queue(changes);
                Ok(())
            }
        }
    }

    /// Tells the host. What takes time here is the host's.
    pub fn tell(&mut self, context: &Context, ioasid: &Ioasid, vmm: Option<&mut Vmm>) -> Result<()> {
        match self {
            Self::Tables(tables) => tables.tell(context, ioasid, vmm),
            Self::Requests(requests) => requests.tell(ioasid),
        }
    }

    /// The host has done it: tables that are not used any more are free.
    pub fn done(&mut self) {
        if let Self::Tables(tables) = self {
            tables.table.completed();
        }
    }

    /// Bytes of the guest's tables.
    pub fn table_bytes(&self) -> u64 {
        match self {
            Self::Tables(tables) => lock(&tables.log).used,
            Self::Requests(_) => 0,
        }
    }
}

/// A driver that writes tables.
#[derive(Debug)]
pub struct Tables {
    table: NestedTable<Recorded>,
    announces: Announces,
    watched: Watched,
    log: Arc<Mutex<Log>>,
    /// What the driver is about to announce.
    invalidations: Vec<Invalidation>,
}

impl Tables {
    /// A driver with an empty table in `region`, which is at `base`; and how the guest's structures describe it.
    pub fn new(
        plugin: &Plugin,
        config: &TableConfig,
        memory: (Arc<MmapRegion>, Gpa),
        announces: Announces,
        watched: Watched,
    ) -> Result<(Self, TableConfig)> {
        let (region, base) = memory;
        let log = Arc::new(Mutex::new(Log::default()));
        let tables = Recorded { tables: RegionTables::new(region, base), log: Arc::clone(&log) };
        let mut table = NestedTable::new(Box::new(plugin.open(config)?), tables)?;
        table.completed();
        let mut config = config.clone();
        for (setting, address) in table.roots() {
            config.settings.set(setting, address.0);
        }
        let this = Self { table, announces, watched, log, invalidations: Vec::new() };
        Ok((this, config))
    }

    /// What the format's tables look like.
    pub fn geometry(&self) -> &Geometry {
        self.table.geometry()
    }

    fn write(&mut self, changes: &[Change], vmm: Option<(&mut Vmm, usize)>) -> Result<()> {
        lock(&self.log).written.clear();
        let needed = self.table.apply(changes);
        let mut forget: Vec<Forget> = needed.spans.iter().map(|span| Forget { iova: *span, leaf: !needed.tables }).collect();
        let announces_maps = self.announces == Announces::Changes
            || self.announces == Announces::Removals && vmm.as_ref().is_some_and(|(vmm, _)| vmm.announces_maps());
        if announces_maps {
            let maps = changes.iter().filter(|change| matches!(change, Change::Map(_)));
            forget.extend(maps.map(|change| Forget { iova: change.span(), leaf: false }));
        }
        if !self.announces.is_announced() {
            forget.clear();
        }
        self.invalidations.clear();
        match vmm {
            Some((vmm, device)) => vmm.queue(device, &forget)?,
            None => self.invalidations.extend(forget.into_iter().zip(0..).map(|(Forget { iova, leaf }, index)| {
                let scope = Scope { leaf, second_stage: false, domain: None, space: None, id: None };
                Invalidation { index, effect: Effect::Range { scope, iova } }
            })),
        }
        ensure!(self.table.figures().without_memory == 0, "the guest has no memory left for tables; give it more");
        let losses = self.table.losses();
        if losses.refused_bytes() > 0 {
            let losses: Vec<&str> = losses.iter().map(|(loss, _)| loss.as_str()).collect();
            bail!("the guest's format cannot say what its driver maps: {}", losses.join(", "));
        }
        Ok(())
    }

    fn tell(&mut self, context: &Context, ioasid: &Ioasid, mut vmm: Option<&mut Vmm>) -> Result<()> {
        if self.announces.is_watched() {
            let log = lock(&self.log);
            for (first, length) in &log.written {
                for span in pages(*first, *length).filter(|span| self.watched.contains(span.first & !(PAGE - 1))) {
                    match &mut vmm {
                        Some(vmm) => vmm.trap(span)?,
                        None => drop(context.table_written(Gpa(span.first), span.length_minus_one() + 1)?),
                    }
                }
            }
        }
        match vmm {
            Some(vmm) => vmm.doorbell()?,
            None if !self.invalidations.is_empty() => drop(ioasid.invalidate(&self.invalidations)?),
            None => {}
        }
        Ok(())
    }
}

/// The parts of a range that lie in one page each.
fn pages(first: u64, length: u64) -> impl Iterator<Item = Span> {
    let last = first + length - 1;
    (first / PAGE..=last / PAGE).map(move |page| Span { first: first.max(page * PAGE), last: last.min(page * PAGE + PAGE - 1) })
}

/// A driver that makes requests, with the device that takes them.
#[derive(Debug)]
pub struct Requests {
    device: virtio_iommu::Device,
    queue: Vec<Vec<u8>>,
}

/// Every driver has a device of its own: these numbers need not differ.
const DOMAIN: u32 = 1;
const ENDPOINT: u32 = 1;

impl Requests {
    /// A driver that has attached its device to a domain.
    pub fn new(map: Arc<MemoryMap>) -> Result<Self> {
        let mut device = virtio_iommu::Device::new(Features::ALL, virtio_iommu::Config::default(), map, RequestLimits::default())?;
        let mut effects = Vec::new();
        device.accept(Features::ALL, &mut effects)?;
        device.add_endpoint(ENDPOINT, &[])?;
        let mut this = Self { device, queue: vec![Request::Attach { domain: DOMAIN, endpoint: ENDPOINT, flags: 0 }.encode()] };
        this.serve()?;
        Ok(this)
    }

    fn queue(&mut self, changes: &[Change]) {
        let request = |change: &Change| match change {
            Change::Map(Piece { iova, address, attributes }) => {
                let access = attributes.access(false);
                let flags = if access.write { MapFlags::READ.with(MapFlags::WRITE) } else { MapFlags::READ };
                Request::Map { domain: DOMAIN, first: iova.first, last: iova.last, address: *address, flags }
            }
            Change::Unmap(iova) => Request::Unmap { domain: DOMAIN, first: iova.first, last: iova.last },
        };
        self.queue.extend(changes.iter().map(|change| request(change).encode()));
    }

    /// What the requests that wait change.
    fn serve(&mut self) -> Result<Vec<Change>> {
        let mut effects = Vec::new();
        for request in self.queue.drain(..) {
            let mut tail = [0; 4];
            self.device.serve(&request, &mut tail, &mut effects);
            ensure!(tail[0] == Status::Ok as u8, "the virtio-iommu device refused a request with status {}", tail[0]);
        }
        let change = |effect: &virtio_iommu::Effect| if let virtio_iommu::Effect::Changed { change, .. } = effect { Some(*change) } else { None };
        Ok(effects.iter().filter_map(change).collect())
    }

    fn tell(&mut self, ioasid: &Ioasid) -> Result<()> {
        let changes = self.serve()?;
        Ok(ioasid.change(&changes)?)
    }
}
