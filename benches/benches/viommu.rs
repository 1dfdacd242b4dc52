//! The guest's unit in front of live address spaces: a page that comes or goes in VT-d second-stage tables, kept in step in a nested SMMUv3 table, told to the unit
//! with the address that was written; beside the address space alone. Without the kernel's call, which is not ours.
#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::Gpa;
use stagecraft::memory::{MemoryMap, VmMemory};
use stagecraft::plugin::queue::Invalidation;
use stagecraft::plugin::{Config, Engine, Plugins, Policy, Requester, Supervisor, TableConfig, Tag};
use stagecraft::sync::{self, Live, Report, Shadow, ShadowLimits, Unwatched, Watcher};
use stagecraft::viommu::{AddressSpaces, HostError, Limits, StreamState, UnitConfig, Viommu, Way};
use stagecraft_benches::contest::{Contestant, contest};
use stagecraft_benches::nested::{Sink, sink};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory: structures and tables, one page after the other.
const MEMORY: u64 = 16 << 20;
/// Memory for the host's tables of one address space.
const TABLES: usize = 256 << 10;
/// The root table of the unit.
const STRUCTURES: u64 = 0x1000;
/// Where pages come and go: 512 slots in a table of their own.
const PLAYGROUND: u64 = 100 << 39;
/// Changes that one round makes.
const CHANGES: u64 = 256;
/// To read and to write.
const PAGE: u64 = 0b11;

/// Address spaces, and no devices.
struct Host {
    memory: GuestMemoryMmap,
    plugins: Arc<Plugins>,
    spaces: BTreeMap<u32, Live<Sink>>,
}

impl Host {
    fn live(&mut self, space: u32) -> (&mut Live<Sink>, VmMemory<'_, GuestMemoryMmap>) {
        (self.spaces.get_mut(&space).unwrap(), VmMemory(&self.memory))
    }
}

fn stale(error: impl std::error::Error + Send + Sync + 'static) -> HostError {
    HostError::Stale(Box::new(error))
}

impl AddressSpaces for Host {
    type Id = u32;
    /// This guest's memory stays as it is.
    type Memory = ();

    fn allocate(&mut self, _: &Way, opened: sync::Way, watcher: Box<dyn Watcher>) -> Result<(u32, Report), HostError> {
        let number = self.spaces.len() as u32;
        let space = sync::Space::open(opened, MemoryMap::everything(47), ShadowLimits::default(), watcher).map_err(stale)?;
        let mut live = Live::new(space, sink(&self.plugins, TABLES), Tag::default(), 0, 1 << 10);
        let report = live.synchronise(&VmMemory(&self.memory)).map_err(stale)?;
        self.spaces.insert(number, live);
        Ok((number, report))
    }

    fn release(&mut self, space: u32) {
        self.spaces.remove(&space);
    }

    fn attach(&mut self, _: Requester, _: u32) -> Result<Report, HostError> {
        Ok(Report::default())
    }

    fn detach(&mut self, _: Requester) -> Result<(), HostError> {
        Ok(())
    }

    fn switch(&mut self, space: u32, _: &Way, opened: sync::Way) -> Result<Report, HostError> {
        let (live, memory) = self.live(space);
        live.switch(opened, &memory).map_err(stale)
    }

    fn invalidate(&mut self, space: u32, invalidations: &[Invalidation]) -> Result<Report, HostError> {
        let (live, memory) = self.live(space);
        live.invalidate(&memory, invalidations).map_err(stale)
    }

    fn table_written(&mut self, space: u32, address: Gpa, length: u64) -> Result<Report, HostError> {
        let (live, memory) = self.live(space);
        live.table_written(&memory, address, length).map_err(stale)
    }

    fn memory_changed(&mut self, (): ()) -> Result<Vec<(u32, Result<Report, HostError>)>, HostError> {
        Ok(Vec::new())
    }
}

/// A guest with some devices, each with tables of its own.
struct Guest {
    memory: GuestMemoryMmap,
    next: u64,
}

impl Guest {
    fn new() -> Self {
        Self { memory: GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap(), next: STRUCTURES + 0x1000 }
    }

    fn store(&self, address: u64, word: u64) {
        self.memory.store(word, GuestAddress(address), Ordering::Relaxed).unwrap();
    }

    fn table(&mut self) -> u64 {
        self.next += 0x1000;
        assert!(self.next <= MEMORY, "no room for the guest's tables");
        self.next - 0x1000
    }

    /// Tables with 512 pages: the root, and the table that these are in.
    fn tables(&mut self) -> (u64, u64) {
        let root = self.table();
        let mut last = root;
        for height in (1..4).rev() {
            let below = self.table();
            self.store(last + (PLAYGROUND >> (12 + 9 * height) & 0x1ff) * 8, below | PAGE);
            last = below;
        }
        (0..512).for_each(|index| self.store(last + index * 8, index << 12 | PAGE));
        (root, last)
    }
}

/// A unit with so many devices, and the last table of one of them.
fn unit(plugins: &Arc<Plugins>, devices: u64) -> (Viommu<GuestMemoryMmap, Host>, u64) {
    let mut guest = Guest::new();
    let contexts = guest.table();
    guest.store(STRUCTURES, contexts | 1);
    let mut played = 0;
    for id in 0..devices {
        let (root, last) = guest.tables();
        // Address width 2 is 48 bits; the domain; present.
        guest.store(contexts + id * 16 + 8, 2 | (id + 1) << 8);
        guest.store(contexts + id * 16, root | 1);
        played = if id == devices / 2 { last } else { played };
    }
    // CAP: 65,536 domains; 39 and 48 bits; MGAW 48. ECAP: pass-through, queue. Legacy mode. Translation enabled, root table set.
    let registers: &[(&str, u64)] = &[
        ("VER", 0x10),
        ("CAP", 6 | 0b0110 << 8 | 47 << 16 | 0b11 << 34),
        ("ECAP", 1 << 1 | 1 << 6),
        ("GSTS", 0xc000_0000),
        ("RTADDR", STRUCTURES),
        ("IQA", 0),
    ];
    let registers = registers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect();
    let unit = UnitConfig { kind: "intel-vtd".to_owned(), registers, map: Arc::new(MemoryMap::everything(47)), limits: Limits::default() };
    let supervisor = Supervisor::new(plugins.by_unit("intel-vtd").unwrap(), Policy::default());
    let host = Host { memory: guest.memory.clone(), plugins: Arc::clone(plugins), spaces: BTreeMap::new() };
    let mut viommu = Viommu::new(supervisor, unit, guest.memory, host, Box::new(Unwatched));
    for id in 0..devices {
        viommu.connect(id, false);
        let state = viommu.stream(Requester { id, pasid: None }).unwrap();
        assert!(matches!(state, StreamState::Space(_)), "{state:?}");
    }
    (viommu, played)
}

/// Pages of a table go and come back; `told` is told where, and says how many translations changed.
fn churn(memory: GuestMemoryMmap, table: u64, mut told: impl FnMut(Gpa) -> u64) -> impl FnMut() {
    let mut round = 0_u64;
    move || {
        for change in 0..CHANGES {
            let index = (round * 37 + change / 2 * 3) % 512;
            let slot = table + index * 8;
            let entry = if change % 2 == 1 { index << 12 | PAGE } else { 0 };
            memory.store(entry, GuestAddress(slot), Ordering::Relaxed).unwrap();
            assert_eq!(told(Gpa(slot)), 1);
        }
        round += 1;
    }
}

fn written(criterion: &mut Criterion) {
    let plugins = Arc::new(Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap());
    let mut guest = Guest::new();
    let (root, last) = guest.tables();
    let config = TableConfig::new("intel-vtd/second-stage", &[("levels", 4), ("root", root)]);
    let format = Box::new(plugins.by_format(&config.format).unwrap().open(&config).unwrap());
    let shadow = Shadow::open(format, MemoryMap::everything(47), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
    let mut live = Live::new(shadow, sink(&plugins, TABLES), Tag::default(), 0, 1 << 10);
    live.synchronise(&VmMemory(&guest.memory)).unwrap();
    assert!(live.space().figures().leaves == 512 && live.space().table(1).is_some_and(|table| table.geometry().roots[0].last > PLAYGROUND));
    let memory = guest.memory.clone();
    let alone = move |slot: Gpa| live.table_written(&VmMemory(&memory), slot, 8).unwrap().changes;
    let units = [("one device", 1), ("100 devices", 100)].map(|(name, devices)| {
        let (viommu, table) = unit(&plugins, devices);
        (name, RefCell::new(viommu), table)
    });
    let mut contestants = vec![Contestant::new("the address space alone", churn(guest.memory, last, alone))];
    for (name, viommu, table) in &units {
        let memory = viommu.borrow().host().memory.clone();
        contestants.push(Contestant::new(name, churn(memory, *table, |slot| viommu.borrow_mut().table_written(slot, 8).changes)));
    }
    contest(criterion, "a written entry, told to the unit", CHANGES, 41, &mut contestants);
    drop(contestants);
    for (name, viommu, _) in &units {
        println!("{name}: {} lookups, {} watched pages", viommu.borrow().figures().lookups, viommu.borrow().figures().watched_pages);
    }
}

criterion_group!(benches, written);
criterion_main!(benches);
