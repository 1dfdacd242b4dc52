//! The same over a context and its IOASIDs: every guest on every kind of unit, by whatever strategy is chosen.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use stagecraft::ioasid::{Context, GuestMemory, GuestView, Ioasid, Request, Setup, Shared, Strategy, TableSupply};
use stagecraft::kernel::Kernel;
use stagecraft::kernel::sim::{Device, DeviceConfig, Sim, SimBuilder, UnitConfig};
use stagecraft::memory::{EntryLayout, EntryMemory, MarkMemory, ReadError, WriteError};
use stagecraft::plugin::{Config, Engine, Outcome, Plugins, Policy, Supervisors, Translated};
use stagecraft::sync;
use stagecraft::viommu::{AddressSpaces, ContextSpaces, Handled, Limits, StreamState, UnitConfig as ViommuConfig, Viommu, Way};
use stagecraft::{Gpa, Iova, Span};
use vm_memory::GuestMemoryMmap;

use super::behaviour::{ONE, TWO, Watched, without_pasid};
use super::guests::{Arch, DATA, Guest};

pub const IOVA: u64 = 0x12_3456_7000;

/// The plugins, compiled once.
pub fn plugins() -> Arc<Plugins> {
    static PLUGINS: OnceLock<Arc<Plugins>> = OnceLock::new();
    Arc::clone(PLUGINS.get_or_init(|| Arc::new(Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap())))
}

pub struct Rig {
    pub viommu: Viommu<GuestMemoryMmap, ContextSpaces>,
    pub guest: Guest,
    pub sim: Arc<Sim>,
    supervisors: Supervisors,
    pub watched: Watched,
}

/// Devices go, and so does their vIOMMU: nobody watches anything, and nothing is left in the kernel.
pub fn nothing_is_left(mut viommu: Viommu<GuestMemoryMmap, ContextSpaces>, devices: &[u64], watched: &Watched, sim: &Sim, what: &str) {
    for id in devices {
        viommu.disconnect(*id);
        viommu.host_mut().disconnect(*id);
    }
    assert!(watched.0.lock().unwrap().is_empty(), "{what}");
    drop(viommu);
    assert_eq!((sim.objects(), sim.pinned_pages(), sim.areas()), (0, 0, 0), "{what}: nothing is left in the kernel");
}

impl Rig {
    pub fn new(arch: Arch, host: UnitConfig) -> Self {
        Self::with(arch, host, Self::template())
    }

    pub fn template() -> Request {
        Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 })
    }

    pub fn with(arch: Arch, host: UnitConfig, template: Request) -> Self {
        Self::with_registers(arch, arch.registers(), host, template)
    }

    /// A guest whose unit has other registers.
    pub fn with_registers(arch: Arch, registers: Vec<(String, u64)>, host: UnitConfig, template: Request) -> Self {
        let guest = Guest::new(arch);
        for page in 0..64 {
            guest.store(DATA + (page << 12), DATA + (page << 12));
        }
        Self::made(guest, registers, host, template, |setup| Context::with(setup).unwrap())
    }

    /// A machine with a guest in it, whose context is made or restored.
    pub fn over(guest: Guest, host: UnitConfig, template: Request, context: impl FnOnce(Setup) -> Context) -> Self {
        let registers = guest.arch.registers();
        Self::made(guest, registers, host, template, context)
    }

    fn made(guest: Guest, registers: Vec<(String, u64)>, host: UnitConfig, template: Request, context: impl FnOnce(Setup) -> Context) -> Self {
        let arch = guest.arch;
        let mut builder = SimBuilder::new();
        let unit = builder.unit(host);
        for (requester, label) in [(1, "one"), (2, "two")] {
            builder.device(DeviceConfig::new(label, requester), &[unit]);
        }
        let sim = builder.build().unwrap();
        sim.register_memory(&Arc::new(guest.memory.clone())).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let plugins = plugins();
        let supervisors = Supervisors::new(Arc::clone(&plugins), Policy::default());
        // One watcher, for tables and structures.
        let watched = Watched::default();
        let setup = Setup {
            tables: Arc::clone(&sim) as Arc<dyn TableSupply>,
            supervisors: Some(supervisors.clone()),
            ..Setup::new(kernel, plugins, GuestMemory::of_mmap(&guest.memory).unwrap())
        };
        let mut spaces = ContextSpaces::new(context(setup), template);
        spaces.connect(ONE, "one").unwrap();
        spaces.connect(TWO, "two").unwrap();
        let unit = ViommuConfig { kind: arch.kind().to_owned(), registers, map: Guest::map(), limits: Limits::default() };
        let supervisor = supervisors.by_unit(arch.kind()).unwrap();
        let viommu = Viommu::new(supervisor, unit, guest.memory.clone(), spaces, Box::new(watched.clone()));
        Self { viommu, guest, sim, supervisors, watched }
    }

    pub fn reads(&self, id: u64, iova: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.device(id).read(None, Iova(iova), &mut bytes).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    pub fn commands(&mut self, commands: &[Vec<u8>]) -> Handled {
        let batch = [commands.concat(), self.guest.arch.wait()].concat();
        self.viommu.commands(&batch).unwrap()
    }

    /// A device, for DMA.
    pub fn device(&self, id: u64) -> Device {
        self.sim.device(if id == ONE { "one" } else { "two" }).unwrap()
    }

    /// Everybody goes, and nothing is left in the kernel.
    pub fn end(self, what: &str) {
        nothing_is_left(self.viommu, &[ONE, TWO], &self.watched, &self.sim, what);
    }

    /// The address space that a device is in.
    pub fn space(&self, id: u64) -> Option<&Ioasid> {
        let Some(StreamState::Space(number)) = self.viommu.stream(without_pasid(id)) else { return None };
        let (id, _) = self.viommu.space(*number)?;
        self.viommu.host().ioasid(id)
    }

    pub fn strategy(&self, id: u64) -> Strategy {
        self.space(id).unwrap().strategies()[0]
    }
}

fn follow(arch: Arch, host: UnitConfig) -> Strategy {
    let what = format!("{arch:?} on {}", host.name);
    let mut rig = Rig::new(arch, host);
    let (first, second) = (rig.guest.new_table(), rig.guest.new_table());
    for (root, target) in [(first, DATA), (second, DATA + 0x1_0000)] {
        rig.guest.map_page(root, IOVA, target, true);
        rig.guest.map_page(root, IOVA + 0x5000, DATA + 0x5000, true);
    }
    for id in [ONE, TWO] {
        rig.guest.translate(id, first, 7);
        let handled = rig.viommu.connect(id, false);
        assert_eq!((handled.loose.len(), handled.blocked), (0, 0), "{what}");
        assert!(matches!(rig.viommu.stream(without_pasid(id)), Some(StreamState::Space(_))), "{what}: {:?}", rig.viommu.stream(without_pasid(id)));
    }
    let strategy = rig.strategy(ONE);
    assert_eq!(rig.viommu.figures().spaces, 1, "{what}");
    assert_eq!(
        (rig.reads(ONE, IOVA), rig.reads(TWO, IOVA + 0x5000), rig.reads(ONE, IOVA + 0x1000)),
        (Some(DATA), Some(DATA + 0x5000), None),
        "{what}"
    );
    // A mapping that is written and not announced, and one that is taken away by command.
    let slot = rig.guest.map_page(first, IOVA + 0x2000, DATA + 0x2000, true);
    rig.viommu.table_written(slot, 8);
    assert_eq!(rig.reads(TWO, IOVA + 0x2000), Some(DATA + 0x2000), "{what}");
    rig.guest.unmap_page(first, IOVA);
    rig.commands(&[arch.forget_page(7, IOVA)]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA), rig.reads(ONE, IOVA + 0x5000)), (None, None, Some(DATA + 0x5000)), "{what}");
    // One device moves to other tables, both do, and one is set to bypass.
    rig.guest.translate(ONE, second, 8);
    rig.commands(&[arch.forget_device(ONE, 7)]);
    assert_eq!(
        (rig.reads(ONE, IOVA), rig.reads(TWO, IOVA), rig.reads(TWO, IOVA + 0x5000)),
        (Some(DATA + 0x1_0000), None, Some(DATA + 0x5000)),
        "{what}"
    );
    rig.guest.translate(TWO, second, 8);
    rig.commands(&[arch.forget_device(TWO, 7)]);
    assert_eq!((rig.reads(TWO, IOVA), rig.viommu.figures().spaces), (Some(DATA + 0x1_0000), 1), "{what}");
    rig.guest.map_page(first, IOVA, DATA + 0x3000, true);
    for id in [ONE, TWO] {
        rig.guest.translate(id, first, 9);
    }
    rig.commands(&[arch.forget_device(ONE, 8), arch.forget_device(TWO, 8)]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA), rig.viommu.figures().switches), (Some(DATA + 0x3000), Some(DATA + 0x3000), 1), "{what}");
    rig.guest.unmap_page(first, IOVA);
    rig.commands(&[arch.forget_page(9, IOVA)]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x2000)), (None, Some(DATA + 0x2000)), "{what}");
    rig.guest.bypass(TWO);
    rig.commands(&[arch.forget_device(TWO, 9)]);
    assert_eq!((rig.reads(TWO, DATA + 0x4000), rig.reads(TWO, IOVA + 0x2000)), (Some(DATA + 0x4000), None), "{what}");
    rig.guest.abort(ONE);
    let at = rig.guest.structure(ONE);
    rig.viommu.table_written(Gpa(at), 32);
    assert_eq!((rig.reads(ONE, IOVA + 0x2000), rig.reads(TWO, DATA)), (None, Some(DATA)), "{what}");
    assert!(rig.supervisors.known().iter().all(|supervisor| supervisor.figures().failures == 0), "{what}");
    assert_eq!(rig.viommu.figures().host_errors, 0, "{what}");
    rig.end(&what);
    strategy
}

/// What a VMM moves between its threads, and shares. A vIOMMU is moved, or shared behind a lock: all its calls that do something are for one thread at a time.
#[test]
fn types_can_be_sent_and_shared() {
    fn sent<T: Send>() {}
    fn shared<T: Send + Sync>() {}
    sent::<Viommu<GuestMemoryMmap, ContextSpaces>>();
    shared::<std::sync::Mutex<Viommu<GuestMemoryMmap, ContextSpaces>>>();
    shared::<ContextSpaces>();
    shared::<Context>();
    shared::<GuestMemory>();
    shared::<Plugins>();
    shared::<Sim>();
    shared::<Device>();
    shared::<stagecraft::pins::Pins>();
    shared::<stagecraft::virtio_iommu::Device>();
    shared::<stagecraft::lookup::Updater>();
    shared::<stagecraft::lookup::LookupIommu<fn(&stagecraft::lookup::Miss) -> Result<(), String>>>();
    shared::<stagecraft::ioasid::Device>();
    shared::<stagecraft::ioasid::Ioasid>();
    shared::<stagecraft::ioasid::Saved>();
    shared::<stagecraft::ioasid::Restored>();
    shared::<stagecraft::lookup::Lookup>();
    shared::<sync::Areas>();
    shared::<Supervisors>();
    shared::<stagecraft::plugin::Supervisor>();
    shared::<stagecraft::plugin::Supervised>();
    shared::<stagecraft::viommu::Watching<stagecraft::watch::UffdWatcher<Arc<GuestMemoryMmap>>>>();
}

#[test]
fn every_guest_is_followed_on_every_unit() {
    let mut strategies = std::collections::BTreeSet::new();
    for arch in Arch::ALL {
        for host in [UnitConfig::vtd("VT-d"), UnitConfig::smmuv3("SMMUv3"), UnitConfig::amd("AMD"), UnitConfig::riscv("RISC-V")] {
            strategies.insert(follow(arch, host));
        }
        // Units without nesting.
        strategies.insert(follow(arch, UnitConfig { nesting: false, ..UnitConfig::vtd("VT-d without nesting") }));
    }
    assert!(strategies.contains(&Strategy::Nested) && strategies.contains(&Strategy::Areas), "{strategies:?}");
}

/// Guest memory that counts how often tables are read: those of a span, and others.
pub struct Counting {
    memory: Shared<GuestMemoryMmap>,
    counted: Span,
    reads: [AtomicU64; 2],
}

impl Counting {
    pub fn new(memory: &GuestMemoryMmap, counted: Span) -> Self {
        Self { memory: Shared(memory.clone()), counted, reads: Default::default() }
    }

    /// Reads of the span since the last time, and others.
    pub fn take(&self) -> (u64, u64) {
        let [counted, others] = self.reads.each_ref().map(|reads| reads.swap(0, Ordering::Relaxed));
        (counted, others)
    }
}

impl EntryMemory for Counting {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        self.reads[usize::from(!self.counted.contains(address.0))].fetch_add(1, Ordering::Relaxed);
        self.memory.read_entries(address, layout, entries)
    }
}

impl MarkMemory for Counting {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        self.memory.compare_exchange_entry(address, layout, old, new)
    }
}

/// The first attachment reads the tables once, and says what it found.
#[test]
fn the_first_attachment_reads_a_space_once_and_reports_it() {
    for nesting in [true, false] {
        let (host, arch) = (UnitConfig { nesting, ..UnitConfig::vtd("VT-d") }, Arch::Smmu);
        let rig = Rig::new(arch, host);
        let root = rig.guest.new_table();
        for page in 0..3 {
            rig.guest.map_page(root, IOVA + (page << 12), DATA + (page << 12), true);
        }
        rig.guest.translate(ONE, root, 7);
        let plain = GuestMemory::of_mmap(&rig.guest.memory).unwrap();
        let counting = Arc::new(Counting::new(&rig.guest.memory, Span::ALL));
        let memory = GuestMemory::new(Arc::clone(&counting), plain.regions().to_vec()).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&rig.sim) as Arc<dyn Kernel>;
        let sim = Arc::clone(&rig.sim);
        let lookup = rig.supervisors.by_unit(arch.kind()).unwrap();
        let unit = stagecraft::device::Unit::supervised(
            &lookup,
            arch.kind(),
            arch.registers(),
            rig.guest.memory.clone(),
            Guest::map(),
            stagecraft::memory::Limits::default(),
        );
        let Outcome::Tables(Translated { tables, intercepts, .. }) = unit.lookup(without_pasid(ONE)).unwrap().value else { panic!("tables") };
        let way = Way::Tables { tables, intercepts };
        let template = Rig::template();
        drop(rig);
        let setup = Setup { tables: Arc::clone(&sim) as Arc<dyn TableSupply>, ..Setup::new(kernel, plugins(), memory) };
        let mut spaces = ContextSpaces::new(Context::with(setup).unwrap(), template);
        spaces.connect(ONE, "one").unwrap();
        spaces.connect(TWO, "two").unwrap();
        let watched = Watched::default();
        let (id, report) = spaces.allocate(&way, sync::Way::blocked(), Box::new(watched.clone())).unwrap();
        assert_eq!((report, counting.take()), (sync::Report::default(), (0, 0)));
        let report = spaces.attach(without_pasid(ONE), id).unwrap();
        assert_eq!((report.changes, report.blocked_count), (3, 0), "nesting: {nesting}");
        // Four tables, each in one page.
        assert_eq!((counting.take(), watched.0.lock().unwrap().len()), ((4, 0), 4), "nesting: {nesting}");
        assert_eq!(spaces.attach(without_pasid(TWO), id).unwrap(), sync::Report::default());
        assert_eq!(counting.take(), (0, 0), "nobody reads for the second device");
        spaces.detach(without_pasid(ONE)).unwrap();
        spaces.detach(without_pasid(TWO)).unwrap();
        spaces.release(id);
        assert!(watched.0.lock().unwrap().is_empty());
    }
}

/// What is blocked when a space is read for the first time is told to the guest at once.
#[test]
fn what_is_blocked_at_first_is_told() {
    let mut template = Rig::template();
    template.limits.shadow.leaves = 2;
    let mut rig = Rig::with(Arch::Smmu, UnitConfig::vtd("VT-d"), template);
    let root = rig.guest.new_table();
    for page in 0..3 {
        rig.guest.map_page(root, IOVA + (page << 12), DATA + (page << 12), true);
    }
    rig.guest.translate(ONE, root, 7);
    let handled = rig.viommu.connect(ONE, false);
    assert_eq!((handled.changes, handled.events.len()), (2, 1), "{handled:?}");
    assert_eq!(rig.viommu.figures().pending, 1);
}

/// A device model of the VMM's looks up where the guest's structures and tables lead, and has nothing to look up in when it is blocked.
#[test]
fn device_models_look_up_what_the_guest_says() {
    const MODEL: u64 = 0x28;
    for arch in Arch::ALL {
        let mut rig = Rig::new(arch, UnitConfig::vtd("host"));
        let (first, second) = (rig.guest.new_table(), rig.guest.new_table());
        rig.guest.map_page(first, IOVA, DATA, true);
        rig.guest.map_page(second, IOVA, DATA + 0x1000, true);
        rig.viommu.host_mut().emulate(MODEL);
        rig.guest.translate(MODEL, first, 7);
        rig.viommu.connect(MODEL, false);
        let lookup = |rig: &Rig| rig.viommu.host().lookup(without_pasid(MODEL)).cloned();
        let found = |rig: &Rig| lookup(rig).unwrap().find(Iova(IOVA)).map(|target| target.address.0);
        assert_eq!(found(&rig), Some(DATA), "{arch:?}");
        rig.guest.translate(MODEL, second, 8);
        rig.commands(&[arch.forget_device(MODEL, 7)]);
        assert_eq!(found(&rig), Some(DATA + 0x1000), "{arch:?}");
        rig.guest.unmap_page(second, IOVA);
        rig.commands(&[arch.forget_page(8, IOVA)]);
        assert_eq!(found(&rig), None, "{arch:?}");
        rig.guest.abort(MODEL);
        rig.commands(&[arch.forget_device(MODEL, 8)]);
        assert!(lookup(&rig).is_none(), "{arch:?}");
    }
}
