//! One kernel, one guest's memory, the plugins, and what was made of them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use super::device::Connected;
use super::events::Told;
use super::left::Left;
use super::memory::compare;
use super::metrics::{Counter, Counters};
use super::parent::{Parent, Under};
use super::record::Log;
use super::space::Space;
use super::watch::Watched;
use super::{ContextLimits, Device, Error, GuestMemory, Ioasid, MemoryRegion, PlainTables, Property, Refusal, Request, SpaceId, TableSupply};
use crate::kernel::handle::{Device as Bound, FaultQueue, Hwpt, Ioas, PageTable};
use crate::kernel::{Errno, HwInfo, HwptFlags, IovaRanges, Kernel, Pasid};
use crate::pins::{Backing, PinError, Pins, Region};
use crate::plugin::{Offer, Plugins, Policy, Supervisors, TableConfig};
use crate::sync::{Report, Watcher};
use crate::table::Format;
use crate::{Gpa, Span};

/// What a [`Context`] is made of.
pub struct Setup {
    /// The kernel.
    pub kernel: Arc<dyn Kernel>,
    /// Formats.
    pub plugins: Arc<Plugins>,
    /// The guest's memory.
    pub memory: GuestMemory,
    /// Memory for host tables.
    pub tables: Arc<dyn TableSupply>,
    /// Hears which guest pages hold tables, each once, whoever uses it.
    pub watcher: Option<Box<dyn Watcher>>,
    /// How much all of it may take.
    pub limits: ContextLimits,
    /// The same plugins under supervision; none: with the default policy.
    pub supervisors: Option<Supervisors>,
}

impl fmt::Debug for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Setup").field("kernel", &self.kernel).field("memory", &self.memory).field("limits", &self.limits).finish_non_exhaustive()
    }
}

impl Setup {
    /// With host tables in anonymous memory, nobody who watches, and default limits.
    #[must_use]
    pub fn new(kernel: Arc<dyn Kernel>, plugins: Arc<Plugins>, memory: GuestMemory) -> Self {
        Self { kernel, plugins, memory, tables: Arc::new(PlainTables), watcher: None, limits: ContextLimits::default(), supervisors: None }
    }
}

/// A piece of hardware, known by what can be attached to its page tables.
#[derive(Debug)]
struct Unit {
    path: Vec<HwInfo>,
    /// A page table of an empty address space.
    probe: Hwpt,
    /// It is made for PASIDs.
    pasids: bool,
    /// Whether page tables that nested ones stand on can record which pages are written, once that is known.
    records_nested: Option<bool>,
    ioas: Ioas,
}

/// What devices and address spaces share.
pub(super) struct Inner {
    spaces: Mutex<BTreeMap<u64, Weak<Space>>>,
    devices: Mutex<BTreeMap<String, Weak<Connected>>>,
    units: Mutex<Vec<Unit>>,
    parents: Mutex<[Weak<Parent>; 3]>,
    told: Arc<Told>,
    memory: RwLock<GuestMemory>,
    /// Held for reading while page tables are made, which have all of guest memory at first, and for writing while that changes. Taken before all other locks.
    /// In it: memory that went, and that the kernel still has because a call failed.
    gate: RwLock<Vec<MemoryRegion>>,
    pins: Arc<Pins>,
    watched: Option<Arc<Watched>>,
    supply: Arc<dyn TableSupply>,
    counters: Arc<Counters>,
    supervisors: Supervisors,
    kernel: Arc<dyn Kernel>,
    limits: ContextLimits,
    table_bytes: Arc<AtomicU64>,
    next_space: AtomicU64,
    next_virtual_id: AtomicU64,
    record: Mutex<Option<Log>>,
    marks_left: Arc<Left>,
    /// Devices and PASIDs that were detached because the kernel failed, since the context was made.
    lost: AtomicU64,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("kernel", &self.kernel).field("limits", &self.limits).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    pub(super) const fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.kernel
    }

    /// All formats are opened by them: a plugin that fails in the middle of a guest's life is made anew.
    pub(super) const fn supervisors(&self) -> &Supervisors {
        &self.supervisors
    }

    pub(super) fn plugins(&self) -> &Plugins {
        self.supervisors.plugins()
    }

    /// A format of a guest's table.
    pub(super) fn open(&self, config: &TableConfig) -> Result<Box<dyn Format>, Error> {
        Ok(Box::new(self.supervisors.open(config)?))
    }

    pub(super) fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    pub(super) fn count_report(&self, report: &Report) {
        self.count(Counter::Changes, report.changes);
        self.count(Counter::Blocked, report.blocked_count);
    }

    pub(super) fn count(&self, counter: Counter, by: u64) {
        self.counters.add(counter, by);
    }

    /// Devices and PASIDs were detached because the kernel failed.
    pub(super) fn count_lost(&self, users: usize) {
        self.count(Counter::Detached, users as u64);
        self.lost.fetch_add(users as u64, Ordering::Relaxed);
    }

    pub(super) fn supply(&self) -> Arc<dyn TableSupply> {
        Arc::clone(&self.supply)
    }

    /// While it is held, guest memory stays what it is.
    pub(super) fn hold_memory(&self) -> RwLockReadGuard<'_, Vec<MemoryRegion>> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest's memory at this moment: a handle.
    pub(super) fn memory(&self) -> GuestMemory {
        self.memory.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Guest memory, from which address spaces copy it.
    pub(super) const fn pins(&self) -> &Arc<Pins> {
        &self.pins
    }

    pub(super) fn table_budget(&self) -> (Arc<AtomicU64>, u64) {
        (Arc::clone(&self.table_bytes), self.limits.table_bytes)
    }

    pub(super) const fn watched(&self) -> Option<&Arc<Watched>> {
        self.watched.as_ref()
    }

    /// Those that there are.
    pub(super) fn parents(&self) -> Vec<Arc<Parent>> {
        lock(&self.parents).iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) const fn told(&self) -> &Arc<Told> {
        &self.told
    }

    /// Devices that are connected.
    pub(super) fn connected(&self) -> Vec<Arc<Connected>> {
        lock(&self.devices).values().filter_map(Weak::upgrade).collect()
    }

    /// The parent of nested tables; made when it is first needed, and gone with the last that needs it.
    pub(super) fn parent(&self, under: Under) -> Result<Arc<Parent>, Error> {
        let mut parents = lock(&self.parents);
        let place = &mut parents[under as usize];
        if let Some(parent) = place.upgrade() {
            return Ok(parent);
        }
        let parent = Parent::new(self, under)?;
        *place = Arc::downgrade(&parent);
        Ok(parent)
    }

    /// Which unit a device that is attached to nothing is behind, and what it can use there. Devices are behind the same one if a page table that is made for
    /// one of them can be attached to the other.
    pub(super) fn unit_of(&self, bound: &Bound, path: &[HwInfo]) -> Result<(usize, IovaRanges), Error> {
        let mut units = lock(&self.units);
        let ranges = |ioas: &Ioas| self.kernel.ioas_iova_ranges(ioas.id()).map_err(Error::kernel("asking for usable IOVAs"));
        for (number, unit) in units.iter().enumerate().filter(|(_, unit)| same_units(&unit.path, path)) {
            match bound.attach(None, PageTable::Hwpt(&unit.probe)) {
                // Ranges are narrower while the device is attached.
                Ok(_attachment) => return Ok((number, ranges(&unit.ioas)?)),
                Err(Errno::EINVAL) => {}
                Err(errno) => return Err(Error::kernel("finding the device's unit")(errno)),
            }
        }
        let ioas = Ioas::alloc(&self.kernel).map_err(Error::kernel("making an address space"))?;
        let pasids = path.iter().all(|unit| unit.max_pasid_log2 > 0);
        let flags = if pasids { HwptFlags::PASID } else { HwptFlags::NONE };
        let probe = ioas.hwpt(bound, flags, None).map_err(Error::kernel("making a page table for the device's unit"))?;
        let iova = {
            let _attachment = bound.attach(None, PageTable::Hwpt(&probe)).map_err(Error::kernel("attaching the device"))?;
            ranges(&ioas)?
        };
        units.push(Unit { path: path.to_vec(), probe, pasids, records_nested: None, ioas });
        Ok((units.len() - 1, iova))
    }

    /// A page table in which nothing is, for a device.
    pub(super) fn empty(&self, device: &Connected) -> Result<Hwpt, Errno> {
        let units = lock(&self.units);
        let unit = units.get(device.unit()).ok_or(Errno::ENOENT)?;
        // The probe was made for the first device behind the unit.
        if unit.pasids || device.pasid_flag() == HwptFlags::NONE {
            return Ok(unit.probe.clone());
        }
        unit.ioas.hwpt(device.bound(), device.pasid_flag(), None)
    }

    /// Whether the kernel records which pages are written in page tables that nested ones stand on, for a device's unit: not all that record do so there.
    pub(super) fn records_nested(&self, device: &Connected) -> Result<bool, Error> {
        let mut units = lock(&self.units);
        let Some(unit) = units.get_mut(device.unit()) else { return Ok(false) };
        if let Some(known) = unit.records_nested {
            return Ok(known);
        }
        let known = match unit.ioas.hwpt(device.bound(), HwptFlags::NEST_PARENT | HwptFlags::DIRTY_TRACKING, None) {
            Ok(_) => true,
            Err(Errno::EOPNOTSUPP | Errno::EINVAL) => false,
            Err(errno) => return Err(Error::kernel("asking whether writes are recorded")(errno)),
        };
        unit.records_nested = Some(known);
        Ok(known)
    }

    /// Marks that host tables had which are gone.
    pub(super) const fn marks_left(&self) -> &Arc<Left> {
        &self.marks_left
    }

    /// What is kept of IOASIDs that are gone, while writes are recorded.
    pub(super) const fn record(&self) -> &Mutex<Option<Log>> {
        &self.record
    }

    /// Whether the kernel attaches a device that is attached to nothing to a page table with a queue of faults.
    pub(super) fn takes_faults(&self, device: &Connected) -> Result<bool, Error> {
        let units = lock(&self.units);
        let Some(unit) = units.get(device.unit()) else { return Ok(false) };
        let queue = FaultQueue::alloc(&self.kernel).map_err(Error::kernel("making a queue of faults"))?;
        let probed =
            unit.ioas.hwpt(device.bound(), device.pasid_flag(), Some(&queue)).and_then(|hwpt| device.bound().attach(None, PageTable::Hwpt(&hwpt)));
        match probed {
            Ok(_attachment) => Ok(true),
            Err(Errno::ENODEV | Errno::EOPNOTSUPP) => Ok(false),
            Err(errno) => Err(Error::kernel("asking whether the device can ask for pages")(errno)),
        }
    }

    pub(super) fn forget_space(&self, id: SpaceId) {
        lock(&self.spaces).remove(&id.0);
    }
}

/// Whether two paths may be the same: what the kernel says of a unit depends on the device only as far as PASIDs go.
fn same_units(one: &[HwInfo], other: &[HwInfo]) -> bool {
    one.len() == other.len() && one.iter().zip(other).all(|(one, other)| (one.data_type, &one.data) == (other.data_type, &other.data))
}

/// A format that devices of a context offer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FormatOffer {
    /// The format's full name.
    pub format: String,
    /// Who offers it, with which limits: labels ascending.
    pub devices: Vec<(String, Offer)>,
}

/// What the devices of a context can do: each of these, at least one of them can.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ContextCapabilities {
    /// Formats of tables that user space may own, by name.
    pub formats: Vec<FormatOffer>,
    /// Labels of devices that requests with PASIDs are translated for, and log2 of the number of PASIDs.
    pub pasids: Vec<(String, u8)>,
    /// Labels of devices whose writes can be recorded.
    pub dirty_tracking: Vec<String>,
}

/// The owner of one kernel fd: see the [module](super). Clones are the same context.
#[derive(Clone, Debug)]
pub struct Context(pub(super) Arc<Inner>);

impl Context {
    /// A context with default limits, whose host tables are in anonymous memory.
    ///
    /// # Errors
    /// As [`Context::with`].
    pub fn new(kernel: Arc<dyn Kernel>, plugins: Arc<Plugins>, memory: GuestMemory) -> Result<Self, Error> {
        Self::with(Setup::new(kernel, plugins, memory))
    }

    /// A context. Guest memory is made known to the kernel; it is pinned when the first page table needs it.
    ///
    /// # Errors
    /// [`Error::Kernel`]; [`Error::TableWindow`]; [`Error::Pins`], also for [`ContextLimits::pinned_bytes`].
    pub fn with(setup: Setup) -> Result<Self, Error> {
        let Setup { kernel, plugins, memory, tables, watcher, limits, supervisors } = setup;
        let (kernel, counters) = Counters::watch(kernel);
        check_window(&memory)?;
        let pins = Pins::new(&kernel, limits.pinned_bytes).map_err(Error::kernel("making an address space"))?;
        memory.regions().iter().try_for_each(|region| add(&pins, region))?;
        Ok(Self(Arc::new(Inner {
            spaces: Mutex::default(),
            devices: Mutex::default(),
            units: Mutex::default(),
            parents: Mutex::default(),
            told: Arc::default(),
            memory: RwLock::new(memory),
            gate: RwLock::default(),
            pins,
            watched: watcher.map(|watcher| Arc::new(Watched::new(watcher))),
            supply: tables,
            counters,
            supervisors: supervisors.unwrap_or_else(|| Supervisors::new(plugins, Policy::default())),
            kernel,
            limits,
            table_bytes: Arc::new(AtomicU64::new(0)),
            next_space: AtomicU64::new(1),
            next_virtual_id: AtomicU64::new(0),
            record: Mutex::default(),
            marks_left: Arc::default(),
            lost: AtomicU64::new(0),
        })))
    }

    /// Connects the device with this label; its DMA is blocked until it is attached. The guest's number of it is one that nobody has: see
    /// [`Context::connect_as`] where the guest is to see events of the device.
    ///
    /// # Errors
    /// [`Error::Kernel`]: ENODEV there is no such device, EBUSY it is connected already; [`Error::Plugins`], [`Error::Offers`].
    pub fn connect(&self, label: &str) -> Result<Device, Error> {
        // Above all numbers of requesters that guests have.
        self.connect_as(label, (1 << 32) + self.0.next_virtual_id.fetch_add(1, Ordering::Relaxed))
    }

    /// Connects the device with this label, which the guest knows by this number: StreamID, requester id, device id.
    ///
    /// # Errors
    /// As [`Context::connect`].
    pub fn connect_as(&self, label: &str, virtual_id: u64) -> Result<Device, Error> {
        let device = Device::connect(&self.0, label, virtual_id)?;
        let mut devices = lock(&self.0.devices);
        devices.retain(|_, device| device.strong_count() > 0);
        devices.insert(label.to_owned(), Arc::downgrade(&device.0));
        tracing::debug!(device = label, unit = device.0.unit(), formats = device.capabilities().formats.len(), "connected");
        Ok(device)
    }

    /// The connected device with this label.
    #[must_use]
    pub fn device(&self, label: &str) -> Option<Device> {
        lock(&self.0.devices).get(label).and_then(Weak::upgrade).map(Device)
    }

    /// All connected devices, by label.
    #[must_use]
    pub fn devices(&self) -> Vec<Device> {
        self.0.connected().into_iter().map(Device).collect()
    }

    /// The union over all connected devices, with who offers what.
    #[must_use]
    pub fn capabilities(&self) -> ContextCapabilities {
        let mut all = ContextCapabilities::default();
        let mut formats: BTreeMap<String, Vec<(String, Offer)>> = BTreeMap::new();
        for device in self.devices() {
            let (label, capabilities) = (device.label().to_owned(), device.capabilities());
            for offer in &capabilities.formats {
                formats.entry(offer.format.clone()).or_default().push((label.clone(), offer.clone()));
            }
            if capabilities.pasid_log2 > 0 {
                all.pasids.push((label.clone(), capabilities.pasid_log2));
            }
            if capabilities.dirty_tracking {
                all.dirty_tracking.push(label);
            }
        }
        all.formats = formats.into_iter().map(|(format, devices)| FormatOffer { format, devices }).collect();
        all
    }

    /// Makes an IOASID. Strategies are chosen when devices are attached; what needs no device is checked now: that the guest's tables can be opened.
    ///
    /// # Errors
    /// [`Error::Refused`] by [`ContextLimits::spaces`]; [`Error::Plugins`], [`Error::Call`] and [`Error::Open`] for tables; [`Error::Kernel`].
    pub fn allocate(&self, request: Request) -> Result<Ioasid, Error> {
        self.allocate_as(SpaceId(self.0.next_space.fetch_add(1, Ordering::Relaxed)), request, None)
    }

    /// The same with a watcher of its own: it hears which guest pages hold tables of this IOASID, instead of [`Setup::watcher`]. What is written there is told
    /// with [`Ioasid::table_written`].
    ///
    /// # Errors
    /// As [`Context::allocate`].
    pub fn allocate_watched(&self, request: Request, watcher: Box<dyn Watcher>) -> Result<Ioasid, Error> {
        self.allocate_as(SpaceId(self.0.next_space.fetch_add(1, Ordering::Relaxed)), request, Some(watcher))
    }

    /// The same under a number that an earlier context gave.
    pub(super) fn allocate_as(&self, id: SpaceId, request: Request, watcher: Option<Box<dyn Watcher>>) -> Result<Ioasid, Error> {
        self.0.next_space.fetch_max(id.0.saturating_add(1), Ordering::Relaxed);
        if lock(&self.0.spaces).len() >= self.0.limits.spaces {
            return Err(Refusal::new(Property::Limit, format!("the context has {} IOASIDs already", self.0.limits.spaces)).into());
        }
        let space = Space::new(&self.0, id, request, watcher)?;
        // It is in the list when the next one asks who is to record, or records itself.
        let record = lock(&self.0.record);
        if record.is_some() {
            let recording = space.record(&mut space.lock(), true);
            if let Err(error) = recording {
                // Its end takes the lock.
                drop(record);
                return Err(error);
            }
        }
        lock(&self.0.spaces).insert(id.0, Arc::downgrade(&space));
        drop(record);
        Ok(Ioasid(space))
    }

    /// The IOASID with this number, if there still is one.
    #[must_use]
    pub fn ioasid(&self, id: SpaceId) -> Option<Ioasid> {
        lock(&self.0.spaces).get(&id.0).and_then(Weak::upgrade).map(Ioasid)
    }

    /// All IOASIDs, by number.
    #[must_use]
    pub fn ioasids(&self) -> Vec<Ioasid> {
        lock(&self.0.spaces).values().filter_map(Weak::upgrade).map(Ioasid).collect()
    }

    /// Whether an IOASID serves a device too, or a PASID of it: whether attaching would succeed, as far as that can be known without doing it.
    ///
    /// # Errors
    /// The property that says no.
    pub fn serves(&self, ioasid: &Ioasid, device: &Device, pasid: Option<Pasid>) -> Result<(), Refusal> {
        ioasid.serves(device, pasid)
    }

    /// `length` bytes of guest memory from `address` on were written: tells every IOASID with tables there, but those that have
    /// watchers of their own. Needs a [`Setup::watcher`], which has to be told which pages these are.
    ///
    /// # Errors
    /// The first error; all IOASIDs were told nevertheless.
    pub fn table_written(&self, address: Gpa, length: u64) -> Result<Vec<(SpaceId, Report)>, Error> {
        let ids = self.0.watched.as_ref().map(|watched| watched.users(address, length)).unwrap_or_default();
        let mut reports = Vec::new();
        let mut result = Ok(());
        for ioasid in ids.into_iter().filter_map(|id| self.ioasid(id)) {
            match ioasid.table_written(address, length) {
                Ok(report) => reports.push((ioasid.id(), report)),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.map(|()| reports)
    }

    /// The guest's memory is another: regions came, or went, or both; of regions with blocks also parts. When this returns, no device reaches what went, and
    /// it may be unmapped in this process. What came of each IOASID is told.
    ///
    /// # Errors
    /// [`Error::TableWindow`], and [`Error::Pins`] for a part that cuts a block: nothing changed. With every other error what came is not there. [`Error::Blocked`]:
    /// devices for which nothing could be promised were detached. What the kernel did not let go of is in [`Context::memory_leaving`]: it may still be reached, and stays mapped in
    /// this process until another call with the same memory has succeeded.
    pub fn memory_changed(&self, memory: GuestMemory) -> Result<Vec<(SpaceId, Report)>, Error> {
        let _span = tracing::debug_span!("memory_changed").entered();
        check_window(&memory)?;
        let mut leaving = self.0.gate.write().unwrap_or_else(PoisonError::into_inner);
        let before = self.0.memory();
        let ((kept, gone), (_, come)) = (compare(before.regions(), memory.regions()), compare(memory.regions(), before.regions()));
        let parents = self.0.parents();
        let mut reports = BTreeMap::new();
        // What goes is first out of all tables, and only then unknown to the kernel.
        gone.iter().for_each(|region| self.0.marks_left.forget(region.span));
        if !gone.is_empty() {
            let between = memory.with_regions(kept)?;
            self.withdraw(&gone)?;
            leaving.extend(gone);
            let told = self.tell(between, &mut reports);
            self.let_go(&mut leaving, &parents, told)?;
        } else if !leaving.is_empty() {
            // Areas that could not be unmapped before, and stand in the way.
            let told = self.tell(before, &mut reports);
            self.let_go(&mut leaving, &parents, told)?;
        }
        for (done, region) in come.iter().enumerate() {
            let added = add(&self.0.pins, region).and_then(|()| parents.iter().try_for_each(|parent| parent.add(&self.0, region)));
            if let Err(error) = added {
                // What the kernel keeps nevertheless is to go the next time.
                leaving.extend_from_slice(&come[..=done]);
                let _ = self.let_go(&mut leaving, &parents, Ok(()));
                return Err(error);
            }
        }
        self.tell(memory, &mut reports)?;
        Ok(reports.into_iter().collect())
    }

    /// Memory that went for the guest, or did not come after all, and that the kernel did not let go of, because a call failed: none as a rule.
    #[must_use]
    pub fn memory_leaving(&self) -> Vec<MemoryRegion> {
        self.0.hold_memory().clone()
    }

    /// Nobody makes new copies of these regions; as before on an error.
    fn withdraw(&self, gone: &[MemoryRegion]) -> Result<(), Error> {
        let known: Vec<Span> = gone.iter().filter(|region| region.user_address.is_some()).map(|region| region.span).collect();
        for (done, span) in known.iter().enumerate() {
            if let Err(error) = self.0.pins.withdraw(*span) {
                for span in &known[..done] {
                    let _ = self.0.pins.restore(*span);
                }
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// The kernel is to forget regions that are in no tables any more: those that it does not forget stay in the list. The first error, that before included.
    fn let_go(&self, leaving: &mut Vec<MemoryRegion>, parents: &[Arc<Parent>], mut result: Result<(), Error>) -> Result<(), Error> {
        leaving.retain(|region| {
            let mut gone = Ok(());
            // All parents, whatever becomes of one: each that lets go is one way less to get there.
            for parent in parents {
                gone = gone.and(parent.remove(region));
            }
            if gone.is_ok() && region.user_address.is_some() {
                gone = match self.0.pins.remove(region.span) {
                    // It never came.
                    Ok(_) | Err(PinError::Absent(_)) => Ok(()),
                    Err(error) => Err(error.into()),
                };
            }
            let stays = gone.is_err();
            if result.is_ok() {
                result = gone;
            }
            stays
        });
        result
    }

    /// All IOASIDs look at their tables with another memory.
    fn tell(&self, memory: GuestMemory, reports: &mut BTreeMap<SpaceId, Report>) -> Result<(), Error> {
        *self.0.memory.write().unwrap_or_else(PoisonError::into_inner) = memory.clone();
        let mut result = Ok(());
        for ioasid in self.ioasids() {
            // All of them, whatever becomes of one.
            match ioasid.0.memory_changed(&memory) {
                Ok(report) => reports.entry(ioasid.id()).or_default().join(report),
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }

    /// What has been counted since the context was made.
    #[cfg(feature = "metrics")]
    #[must_use]
    pub fn metrics(&self) -> super::Metrics {
        let figures = self.0.pins.figures();
        let stats: Vec<super::Stats> = self.ioasids().iter().map(Ioasid::stats).collect();
        self.0.counters.metrics(&stats, (figures.bytes, figures.limit), self.0.table_bytes.load(Ordering::Relaxed))
    }

    /// Devices and PASIDs that were detached because the kernel failed, since the context was made.
    pub(crate) fn lost(&self) -> u64 {
        self.0.lost.load(Ordering::Relaxed)
    }

    /// The guest's memory, as the context knows it.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.0.memory()
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> &Arc<dyn Kernel> {
        &self.0.kernel
    }

    /// The plugins under supervision: their health, and another version of one.
    #[must_use]
    pub fn supervisors(&self) -> &Supervisors {
        &self.0.supervisors
    }

    /// The plugins.
    #[must_use]
    pub fn plugins(&self) -> &Arc<Plugins> {
        self.0.supervisors.plugins()
    }
}

fn check_window(memory: &GuestMemory) -> Result<(), Error> {
    let tables = memory.tables();
    match memory.regions().iter().find(|region| region.span.intersection(tables).is_some()) {
        Some(region) => Err(Error::TableWindow { memory: region.span, tables }),
        None => Ok(()),
    }
}

fn add(pins: &Pins, region: &MemoryRegion) -> Result<(), Error> {
    let Some(user_address) = region.user_address else { return Ok(()) };
    let length = region.span.length_minus_one().saturating_add(1);
    let backing = Backing::User(user_address);
    Ok(pins.add(&Region { gpa: Gpa(region.span.first), length, backing, writable: region.writable, block: region.block })?)
}
