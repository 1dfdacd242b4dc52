//! A host for a vIOMMU: VT-d hardware of the simulation, which nests first-stage tables, and whose caches forget nothing by themselves.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use stagecraft::kernel::handle::{Attachment, Device, Hwpt, Ioas, PageTable};
use stagecraft::kernel::sim::{self, DeviceConfig, Sim, SimBuilder, UnitConfig};
use stagecraft::kernel::{HwptFlags, Invalidate, InvalidateTarget, Kernel, Map, MapFlags, Pasid, hwpt_data, invalidate_data};
use stagecraft::memory::{MemoryMap, VmMemory};
use stagecraft::plugin::queue::Invalidation;
use stagecraft::plugin::{Requester, Supervisor, TableConfig, Tag};
use stagecraft::sync::{self, CommitError, Committer, Live, LiveError, Needed, Nested, NestedTable, RegionTables, Report, ShadowLimits, Watcher};
use stagecraft::viommu::{AddressSpaces, HostError, Told, Way};
use stagecraft::{Gpa, Iova};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

/// Bytes of each space's tables, and where the first one's are.
const TABLES: u64 = 4 << 20;
const BASE: u64 = 1 << 40;

/// Tells the kernel what must be invalidated, and counts.
struct Teller {
    kernel: Arc<dyn Kernel>,
    target: InvalidateTarget,
    counts: Arc<Mutex<Counts>>,
}

/// What the host was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls of the kernel to invalidate.
    pub invalidations: u64,
    /// Calls of the vIOMMU that look at a space.
    pub looks: u64,
    /// The next invalidations that fail.
    pub failing: u64,
}

impl Committer for Teller {
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError> {
        {
            let mut counts = self.counts.lock().unwrap();
            counts.invalidations += 1;
            if counts.failing > 0 {
                counts.failing -= 1;
                return Err(CommitError("told to fail".into()));
            }
        }
        let leaf = u64::from(!needed.tables);
        let words: Vec<u64> = needed.spans.iter().flat_map(|span| [span.first, (span.length_minus_one() >> 12) + 1, leaf]).collect();
        let entries: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let request = Invalidate { target: self.target, data_type: invalidate_data::VTD_S1, entry_length: 24, entries: &entries };
        self.kernel.hwpt_invalidate(&request).map_err(|error| CommitError(Box::new(error)))?;
        Ok(())
    }
}

type Sink = Nested<RegionTables, Teller>;

enum Space {
    Bypass,
    Tables { live: Box<Live<Sink>>, hwpt: Hwpt },
}

/// The host.
pub struct Host {
    attachments: BTreeMap<Requester, Attachment>,
    spaces: BTreeMap<u32, Space>,
    parent: Hwpt,
    ioas: Ioas,
    devices: BTreeMap<u64, Device>,
    sim: Arc<Sim>,
    memory: GuestMemoryMmap,
    map: MemoryMap,
    /// For the host's own tables.
    vtd: Supervisor,
    pub limits: ShadowLimits,
    pub questions: u64,
    pub counts: Arc<Mutex<Counts>>,
    next: u32,
}

impl Host {
    /// Devices with these ids, all behind one unit.
    pub fn new(memory: &GuestMemoryMmap, map: &MemoryMap, ids: &[u64], vtd: Supervisor) -> Self {
        let mut builder = SimBuilder::new();
        let unit = builder.unit(UnitConfig::vtd("unit"));
        for id in ids {
            builder.device(DeviceConfig::new(&format!("{id:x}"), *id as u32), &[unit]);
        }
        let sim = builder.build().unwrap();
        sim.register_memory(&Arc::new(memory.clone())).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let devices: BTreeMap<u64, Device> = ids.iter().map(|id| (*id, Device::bind(&kernel, &format!("{id:x}")).unwrap())).collect();
        let ioas = Ioas::alloc(&kernel).unwrap();
        for region in memory.iter() {
            add(&ioas, region.start_addr().0, region.get_mmap().as_ptr() as u64, region.len());
        }
        let parent = ioas.hwpt(devices.values().next().unwrap(), HwptFlags::NEST_PARENT | HwptFlags::PASID, None).unwrap();
        Self {
            attachments: BTreeMap::new(),
            spaces: BTreeMap::new(),
            parent,
            ioas,
            devices,
            sim,
            memory: memory.clone(),
            map: map.clone(),
            vtd,
            limits: ShadowLimits::default(),
            questions: 256,
            counts: Arc::default(),
            next: 0,
        }
    }

    /// A device, for DMA.
    pub fn device(&self, id: u64) -> sim::Device {
        self.sim.device(&format!("{id:x}")).unwrap()
    }

    /// Counts since the last time.
    pub fn take_counts(&self) -> Counts {
        std::mem::take(&mut self.counts.lock().unwrap())
    }

    fn look(
        &mut self,
        space: u32,
        look: impl FnOnce(&mut Live<Sink>, &VmMemory<'_, GuestMemoryMmap>) -> Result<Report, HostError>,
    ) -> Result<Report, HostError> {
        self.counts.lock().unwrap().looks += 1;
        let memory = VmMemory(&self.memory);
        match self.spaces.get_mut(&space).expect("a space that is there") {
            Space::Tables { live, .. } => look(live, &memory),
            Space::Bypass => panic!("there are no tables in this space"),
        }
    }
}

fn add(ioas: &Ioas, iova: u64, user_address: u64, length: u64) {
    let flags = MapFlags::READABLE | MapFlags::WRITEABLE;
    ioas.kernel().ioas_map(ioas.id(), &Map { flags, iova: Some(Iova(iova)), user_address, length }).unwrap();
}

fn boxed(error: impl std::error::Error + Send + Sync + 'static) -> HostError {
    HostError::Refused(Box::new(error))
}

fn live(error: LiveError) -> HostError {
    match error {
        LiveError::Open(error) => boxed(error),
        LiveError::Commit(error) => HostError::Stale(Box::new(error)),
    }
}

impl AddressSpaces for Host {
    type Id = u32;
    /// Of this host's devices; its kernel has all memory that there ever is.
    type Memory = (GuestMemoryMmap, MemoryMap);

    fn allocate(&mut self, way: &Way, opened: sync::Way, watcher: Box<dyn Watcher>) -> Result<(u32, Report), HostError> {
        let number = self.next;
        let (space, report) = match way {
            Way::Bypass => (Space::Bypass, Report::default()),
            Way::Direct(_) | Way::Tables { .. } => {
                let region = Arc::new(MmapRegion::new(TABLES as usize).unwrap());
                let base = BASE + u64::from(number) * TABLES;
                self.sim.register_region(Arc::clone(&region)).unwrap();
                add(&self.ioas, base, region.as_ptr() as u64, TABLES);
                let config = TableConfig::new("intel-vtd/first-stage", &[("levels", 5)]);
                let format = self.vtd.open(&config).map_err(boxed)?;
                let table = NestedTable::new(Box::new(format), RegionTables::new(region, Gpa(base))).map_err(boxed)?;
                let root = table.roots().next().unwrap().1.0;
                let data: Vec<u8> = [0, root, 57_u64].iter().flat_map(|word| word.to_ne_bytes()).collect();
                let any = self.devices.values().next().unwrap();
                let hwpt = self.parent.nested(any, HwptFlags::PASID, (hwpt_data::VTD_S1, &data), None).map_err(boxed)?;
                let kernel = Arc::clone(self.ioas.kernel());
                let teller = Teller { kernel, target: InvalidateTarget::Hwpt(hwpt.id()), counts: Arc::clone(&self.counts) };
                let space = sync::Space::open(opened, self.map.clone(), self.limits, watcher).map_err(boxed)?;
                let mut live = Live::new(space, Nested::new(table, teller), Tag::default(), 0, self.questions);
                let report = live.synchronise(&VmMemory(&self.memory)).map_err(boxed)?;
                (Space::Tables { live: Box::new(live), hwpt }, report)
            }
        };
        self.next += 1;
        self.spaces.insert(number, space);
        Ok((number, report))
    }

    fn release(&mut self, space: u32) {
        // The kernel refuses to let go of a table that is in use.
        assert!(self.spaces.remove(&space).is_some(), "released twice");
    }

    fn attach(&mut self, requester: Requester, space: u32) -> Result<Report, HostError> {
        let hwpt = match &self.spaces[&space] {
            Space::Bypass => &self.parent,
            Space::Tables { hwpt, .. } => hwpt,
        };
        if let Some(attachment) = self.attachments.get_mut(&requester) {
            return attachment.replace(PageTable::Hwpt(hwpt)).map(|()| Report::default()).map_err(boxed);
        }
        let attachment = self.devices[&requester.id].attach(requester.pasid.map(Pasid), PageTable::Hwpt(hwpt)).map_err(boxed)?;
        self.attachments.insert(requester, attachment);
        Ok(Report::default())
    }

    fn detach(&mut self, requester: Requester) -> Result<(), HostError> {
        assert!(self.attachments.remove(&requester).is_some(), "{requester:?} was not attached");
        Ok(())
    }

    fn switch(&mut self, space: u32, _: &Way, opened: sync::Way) -> Result<Report, HostError> {
        self.look(space, |live, memory| live.switch(opened, memory).map_err(self::live))
    }

    fn invalidate(&mut self, space: u32, invalidations: &[Invalidation]) -> Result<Report, HostError> {
        self.look(space, |live, memory| live.invalidate(memory, invalidations).map_err(self::live))
    }

    fn table_written(&mut self, space: u32, address: Gpa, length: u64) -> Result<Report, HostError> {
        self.look(space, |live, memory| live.table_written(memory, address, length).map_err(self::live))
    }

    fn memory_changed(&mut self, (memory, map): (GuestMemoryMmap, MemoryMap)) -> Result<Vec<Told<u32>>, HostError> {
        (self.memory, self.map) = (memory, map);
        let numbers: Vec<u32> = self.spaces.iter().filter(|(_, space)| matches!(space, Space::Tables { .. })).map(|(number, _)| *number).collect();
        let map = self.map.clone();
        Ok(numbers
            .into_iter()
            .map(|number| (number, self.look(number, |live, memory| live.memory_changed(memory, map.clone()).map_err(self::live))))
            .collect())
    }
}
