//! Guest memory that comes and goes under a vIOMMU: with pages for DMA in it, with tables, with device structures, with the command queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::ioasid::{self, Context, MemoryRegion, Request, Setup, Strategy, TableSupply};
use stagecraft::kernel::sim::{DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig};
use stagecraft::kernel::{Errno, Kernel};
use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::plugin::queue::EventAccess;
use stagecraft::plugin::{Outcome, Policy, Supervisors};
use stagecraft::viommu::{BlockedDma, CommandError, ContextSpaces, Handled, HostError, Limits, StreamState, UnitConfig as ViommuConfig, Viommu};
use stagecraft::{Iova, Span};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap};

use super::behaviour::{ONE, Watched, without_pasid};
use super::guests::{Arch, DATA, Guest, MEMORY};
use super::kernel::{nothing_is_left, plugins};

const IOVA: u64 = 0x12_3456_7000;
/// Memory that comes and goes.
const HIGH: u64 = 1 << 32;
const BYTES: u64 = 1 << 20;
/// What of it the tests use for what.
const STRUCTURES: u64 = HIGH;
const TABLES: u64 = HIGH + 0x4_0000;
const PAGES: u64 = HIGH + 0x8_0000;
const QUEUE: u64 = HIGH + 0xf_f000;

struct Rig {
    viommu: Viommu<GuestMemoryMmap, ContextSpaces>,
    guest: Guest,
    sim: Arc<Sim>,
    watched: Watched,
    high: Arc<GuestRegionMmap>,
}

fn spans(memory: &GuestMemoryMmap) -> Vec<Span> {
    memory.iter().map(|region| Span { first: region.start_addr().0, last: region.last_addr().0 }).collect()
}

fn map(memory: &GuestMemoryMmap) -> Arc<MemoryMap> {
    Arc::new(MemoryMap::new(spans(memory).into_iter().map(|span| Region { kind: Kind::Ram, span }).collect()).unwrap())
}

impl Rig {
    /// A guest that has the memory, with its device connected; `prepare` is what its driver does before.
    fn new(arch: Arch, host: UnitConfig, strategies: &[Strategy], structures: u64, prepare: impl FnOnce(&Guest)) -> Self {
        let mut guest = Guest::new(arch);
        let high = Arc::new(GuestRegionMmap::from_range(GuestAddress(HIGH), BYTES as usize, None).unwrap());
        guest.memory = guest.memory.insert_region(Arc::clone(&high)).unwrap();
        guest.structures = structures;
        for page in 0..16 {
            for base in [DATA, PAGES] {
                guest.store(base + (page << 12), base + (page << 12));
            }
        }
        prepare(&guest);
        let mut builder = SimBuilder::new();
        let unit = builder.unit(host);
        builder.device(DeviceConfig::new("one", 1), &[unit]);
        let sim = builder.build().unwrap();
        sim.register_memory(&Arc::new(guest.memory.clone())).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let supervisors = Supervisors::new(plugins(), Policy::default());
        let watched = Watched::default();
        let setup = Setup {
            tables: Arc::clone(&sim) as Arc<dyn TableSupply>,
            supervisors: Some(supervisors.clone()),
            ..Setup::new(kernel, plugins(), ioasid::GuestMemory::of_mmap(&guest.memory).unwrap())
        };
        let template = Request::guest(ioasid::GuestView { outcome: Outcome::Bypass, id: 0 }).with_strategies(strategies);
        let mut spaces = ContextSpaces::new(Context::with(setup).unwrap(), template);
        spaces.connect(ONE, "one").unwrap();
        let unit = ViommuConfig {
            kind: arch.kind().to_owned(),
            registers: arch.registers_at(structures),
            map: map(&guest.memory),
            limits: Limits::default(),
        };
        let supervisor = supervisors.by_unit(arch.kind()).unwrap();
        let viommu = Viommu::new(supervisor, unit, guest.memory.clone(), spaces, Box::new(watched.clone()));
        let mut this = Self { viommu, guest, sim, watched, high };
        let handled = this.viommu.connect(ONE, false);
        assert_eq!((handled.loose.len(), handled.blocked), (0, 0));
        this
    }

    /// The guest's memory is with or without the region from now on.
    fn change(&mut self, with: bool) -> Handled {
        let memory = match with {
            true => self.guest.memory.insert_region(Arc::clone(&self.high)).unwrap(),
            false => self.guest.memory.remove_region(GuestAddress(HIGH), BYTES).unwrap().0,
        };
        self.guest.memory = memory;
        self.change_again()
    }

    fn change_again(&mut self) -> Handled {
        let memory = &self.guest.memory;
        self.viommu.memory_changed(memory.clone(), map(memory), ioasid::GuestMemory::of_mmap(memory).unwrap())
    }

    /// Where a read gets: the offset in the process from the beginning of the region of `address`.
    fn reaches(&self, iova: u64, address: u64) -> bool {
        let found = self.sim.device("one").unwrap().translate(None, Iova(iova), DmaAccess::Read);
        let there = if address >= HIGH {
            self.high.get_mmap().as_ptr() as u64 + (address - HIGH)
        } else {
            self.guest.memory.get_host_address(GuestAddress(address)).unwrap() as u64
        };
        found.is_ok_and(|found| found.user_address == there)
    }

    fn translates(&self, iova: u64) -> bool {
        self.sim.device("one").unwrap().translate(None, Iova(iova), DmaAccess::Read).is_ok()
    }

    fn records(&mut self, iova: u64) -> usize {
        let request = BlockedDma { requester: without_pasid(ONE), iova: Iova(iova), access: EventAccess::Read, privileged: false };
        let events = self.viommu.faults(&[request]);
        assert_eq!(events.lost, 0);
        events.records.len()
    }

    fn end(self, what: &str) {
        nothing_is_left(self.viommu, &[ONE], &self.watched, &self.sim, what);
    }
}

/// The unit that walks tables of this guest as they are.
fn same(arch: Arch) -> UnitConfig {
    match arch {
        Arch::Smmu => UnitConfig::smmuv3("host"),
        Arch::Vtd => UnitConfig::vtd("host"),
        Arch::Amd => UnitConfig::amd("host"),
        Arch::Riscv => UnitConfig::riscv("host"),
    }
}

/// Guests with hosts for each strategy. (No unit's user may own tables of AMD's first format or of VT-d's second stage, which these two guests have.)
fn cases() -> Vec<(Arch, UnitConfig, Strategy)> {
    let mut cases = Vec::new();
    for arch in Arch::ALL {
        if matches!(arch, Arch::Smmu | Arch::Riscv) {
            cases.push((arch, same(arch), Strategy::Native));
        }
        cases.push((arch, UnitConfig::vtd("host"), Strategy::Nested));
        cases.push((arch, UnitConfig::smmuv3("host").without_nesting(), Strategy::Areas));
    }
    cases
}

#[test]
fn pages_tables_and_structures_go_with_their_memory_and_come_back_with_it() {
    for (arch, host, strategy) in cases() {
        // What is in the memory that goes: pages for DMA, tables, structures.
        for case in 0..3 {
            let what = format!("{arch:?} {strategy:?} case {case}");
            let structures = if case == 2 { STRUCTURES } else { super::guests::STRUCTURES };
            let mut root = 0;
            let mut rig = Rig::new(arch, host.clone(), &[strategy], structures, |guest| {
                root = guest.new_table();
                guest.translate(ONE, root, 7);
                guest.map_page(root, IOVA, DATA, true);
                guest.map_page(root, IOVA + 0x1000, PAGES + 0x1000, true);
                if case == 1 {
                    // The last table of some other IOVAs, and no other.
                    guest.slot_at(root, IOVA + 0x20_0000, 1);
                    let before = guest.tables_from(TABLES);
                    guest.map_page(root, IOVA + 0x20_0000, DATA + 0x2000, true);
                    guest.tables_from(before);
                }
            });
            assert_eq!(rig.viommu.host().ioasid(space(&rig)).unwrap().strategies(), [strategy], "{what}");
            for round in 0..3 {
                let what = format!("{what} round {round}");
                assert!(rig.reaches(IOVA, DATA) && rig.reaches(IOVA + 0x1000, PAGES + 0x1000), "{what}");
                assert_eq!(rig.reaches(IOVA + 0x20_0000, DATA + 0x2000), case == 1, "{what}");
                let pinned = rig.sim.pinned_pages();
                let handled = rig.change(false);
                assert!(handled.memory.is_none() && handled.loose.is_empty(), "{what}: {handled:?}");
                assert!(!rig.translates(IOVA + 0x1000), "{what}: the page went");
                if strategy != Strategy::Areas {
                    assert!(pinned - rig.sim.pinned_pages() >= BYTES >> 12, "{what}: nobody pins it any more");
                }
                match case {
                    2 => {
                        assert!(!rig.translates(IOVA), "{what}: its structures went");
                        assert!(matches!(rig.viommu.stream(without_pasid(ONE)), Some(StreamState::Blocked(_))), "{what}");
                        assert_eq!(rig.records(IOVA), 1, "{what}");
                    }
                    1 => {
                        assert!(rig.reaches(IOVA, DATA) && !rig.translates(IOVA + 0x20_0000), "{what}: a table went");
                        assert_eq!(rig.records(IOVA + 0x20_0000), 1, "{what}");
                    }
                    _ => assert!(rig.reaches(IOVA, DATA), "{what}"),
                }
                // The process may give it back now: what the guest has there later is nobody's table.
                let handled = rig.change(true);
                assert!(handled.memory.is_none() && handled.loose.is_empty(), "{what}: {handled:?}");
            }
            assert!(rig.reaches(IOVA, DATA) && rig.reaches(IOVA + 0x1000, PAGES + 0x1000), "{what}");
            // What follows is followed in memory that came.
            if case == 1 {
                let slot = rig.guest.unmap_page(root, IOVA + 0x20_0000);
                rig.viommu.table_written(slot, 8);
                rig.viommu.commands(&arch.forget_page(7, IOVA + 0x20_0000)).unwrap();
                assert!(!rig.translates(IOVA + 0x20_0000), "{what}");
            }
            rig.end(&what);
        }
    }
}

fn space(rig: &Rig) -> ioasid::SpaceId {
    let Some(StreamState::Space(number)) = rig.viommu.stream(without_pasid(ONE)) else { panic!("no space") };
    rig.viommu.space(*number).unwrap().0
}

#[test]
fn a_queue_is_read_where_the_guest_has_it_and_an_error_where_there_is_nothing() {
    for arch in Arch::ALL {
        let mut root = 0;
        let mut rig = Rig::new(arch, UnitConfig::vtd("host"), &Strategy::ALL, super::guests::STRUCTURES, |guest| {
            root = guest.new_table();
            guest.translate(ONE, root, 7);
            guest.map_page(root, IOVA, DATA, true);
        });
        rig.guest.unmap_page(root, IOVA);
        // A ring of one page, whose pointers are about to turn over: the command stands at its end, the wait at its beginning.
        let (command, wait) = (arch.forget_page(7, IOVA), arch.wait());
        let (end, begin) = (QUEUE + 0x1000 - command.len() as u64, QUEUE);
        rig.guest.memory.write_slice(&command, GuestAddress(end)).unwrap();
        rig.guest.memory.write_slice(&wait, GuestAddress(begin)).unwrap();
        let parts = [Span { first: end, last: QUEUE + 0xfff }, Span { first: begin, last: begin + wait.len() as u64 - 1 }];
        assert!(rig.reaches(IOVA, DATA));
        let handled = rig.viommu.commands_at(&parts).unwrap();
        assert_eq!((handled.illegal, handled.changes), (None, 1), "{arch:?}");
        assert!(!rig.translates(IOVA), "{arch:?}");
        let cut = Span { first: HIGH + BYTES - 8, last: HIGH + BYTES + 7 };
        assert!(matches!(rig.viommu.commands_at(&[parts[1], cut]), Err(CommandError::Unreadable(span)) if span == cut), "{arch:?}");
        assert!(matches!(rig.viommu.commands_at(&[Span { first: 0, last: u64::MAX }]), Err(CommandError::TooLong(_))));
        rig.change(false);
        assert!(matches!(rig.viommu.commands_at(&parts), Err(CommandError::Unreadable(span)) if span == parts[0]), "{arch:?}");
        rig.change(true);
        assert_eq!(rig.viommu.commands_at(&parts).unwrap().illegal, None, "{arch:?}");
        rig.end(&format!("{arch:?}"));
    }
}

/// A page that stays is reached all the while, from another thread.
#[test]
fn memory_that_stays_is_reached_while_other_memory_comes_and_goes() {
    for (arch, host, strategy) in cases() {
        let mut rig = Rig::new(arch, host, &[strategy], super::guests::STRUCTURES, |guest| {
            let root = guest.new_table();
            guest.translate(ONE, root, 7);
            guest.map_page(root, IOVA, DATA, true);
            guest.map_page(root, IOVA + 0x1000, PAGES, true);
        });
        let (stop, done, device) = (AtomicBool::new(false), AtomicU64::new(0), rig.sim.device("one").unwrap());
        std::thread::scope(|scope| {
            let dma = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    device.write(None, Iova(IOVA), &[1, 2, 3]).unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut round = 0;
            while (round < 16 || done.load(Ordering::Relaxed) < 100) && !dma.is_finished() {
                rig.change(round % 2 == 1);
                round += 1;
            }
            stop.store(true, Ordering::Relaxed);
            dma.join().unwrap();
        });
        drop(rig);
    }
}

/// Whatever call of the kernel fails while memory goes or comes: nobody reaches what went, and the next try has everything right.
#[test]
fn a_kernel_that_fails_leaves_nobody_with_memory_that_went() {
    for (arch, host, strategy) in cases() {
        for with in [false, true] {
            for n in 1.. {
                let what = format!("{arch:?} {strategy:?}, comes: {with}, call {n}");
                let mut rig = Rig::new(arch, host.clone(), &[strategy], super::guests::STRUCTURES, |guest| {
                    let root = guest.new_table();
                    guest.translate(ONE, root, 7);
                    guest.map_page(root, IOVA, DATA, true);
                    guest.map_page(root, IOVA + 0x1000, PAGES, true);
                });
                if with {
                    rig.change(false);
                }
                rig.sim.fail_nth(n, Errno::EBUSY);
                let handled = rig.change(with);
                let is_over = rig.sim.disarm();
                assert!(handled.loose.is_empty(), "{what}");
                if !with {
                    assert!(!rig.translates(IOVA + 0x1000), "{what}: {:?}", handled.memory);
                }
                if let Some(HostError::Stale(_)) = handled.memory {
                    // As long as the kernel has it, nobody is let in, however often that is tried.
                    (0..4).for_each(|_| drop(rig.viommu.idle()));
                    assert!(!rig.translates(IOVA), "{what}");
                }
                let handled = rig.change_again();
                assert!(handled.memory.is_none() && handled.loose.is_empty(), "{what}: {handled:?}");
                assert!(rig.viommu.host().context().memory_leaving().is_empty(), "{what}");
                (0..8).for_each(|_| drop(rig.viommu.idle()));
                assert!(rig.reaches(IOVA, DATA), "{what}: {:?}", rig.viommu.stream(without_pasid(ONE)));
                assert_eq!(rig.translates(IOVA + 0x1000), with, "{what}");
                rig.end(&what);
                if is_over {
                    assert!(n > 1, "{what}: no call at all");
                    break;
                }
            }
        }
    }
}

/// A kernel that lets go of nothing for a while: the VMM is told that it still has the memory, and who was detached for it comes back when it is said again.
#[test]
fn a_vmm_is_told_that_the_kernel_still_has_memory_that_went() {
    for (arch, host, strategy) in cases() {
        let what = format!("{arch:?} {strategy:?}");
        let mut rig = Rig::new(arch, host, &[strategy], super::guests::STRUCTURES, |guest| {
            let root = guest.new_table();
            guest.translate(ONE, root, 7);
            guest.map_page(root, IOVA, DATA, true);
            guest.map_page(root, IOVA + 0x1000, PAGES, true);
        });
        rig.sim.fail_from(1, Errno::ENOMEM);
        let handled = rig.change(false);
        rig.sim.disarm();
        assert!(handled.loose.is_empty() && !rig.translates(IOVA + 0x1000), "{what}: {handled:?}");
        assert!(!rig.viommu.host().context().memory_leaving().is_empty(), "{what}");
        assert!(matches!(handled.memory, Some(HostError::Stale(_))), "{what}: {handled:?}");
        let handled = rig.change_again();
        assert!(handled.memory.is_none() && rig.viommu.host().context().memory_leaving().is_empty(), "{what}: {handled:?}");
        (0..8).for_each(|_| drop(rig.viommu.idle()));
        assert!(rig.reaches(IOVA, DATA) && !rig.translates(IOVA + 0x1000), "{what}");
        rig.end(&what);
    }
}

/// A VMM that takes away half of a block is told so. Nothing is changed for the kernel, so nobody may do DMA until the VMM has made up its mind.
#[test]
fn half_a_block_cannot_go() {
    let mut rig = Rig::new(Arch::Smmu, UnitConfig::vtd("host"), &Strategy::ALL, super::guests::STRUCTURES, |guest| {
        let root = guest.new_table();
        guest.translate(ONE, root, 7);
        guest.map_page(root, IOVA, DATA, true);
    });
    let region = |first: u64, bytes: u64| MemoryRegion {
        span: Span { first, last: first + bytes - 1 },
        kind: Kind::Ram,
        user_address: Some(rig.guest.memory.get_host_address(GuestAddress(first)).unwrap() as u64),
        writable: true,
        block: Some(0x10_0000),
    };
    let host = |regions: Vec<MemoryRegion>| ioasid::GuestMemory::new(Arc::new(ioasid::Shared(rig.guest.memory.clone())), regions).unwrap();
    let (all, half) = (host(vec![region(0, MEMORY)]), host(vec![region(0, MEMORY - 0x8_0000)]));
    let memory = rig.guest.memory.clone();
    assert!(rig.viommu.memory_changed(memory.clone(), map(&memory), all.clone()).memory.is_none());
    assert!(rig.reaches(IOVA, DATA));
    let Some(HostError::Stale(error)) = rig.viommu.memory_changed(memory.clone(), map(&memory), half).memory else { panic!("it was cut") };
    assert!(error.to_string().contains("cuts the block"), "{error}");
    assert!(!rig.translates(IOVA));
    assert!(rig.viommu.memory_changed(memory.clone(), map(&memory), all).memory.is_none());
    (0..4).for_each(|_| drop(rig.viommu.idle()));
    assert!(rig.reaches(IOVA, DATA));
    rig.end("half a block");
}
