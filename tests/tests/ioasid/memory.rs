//! Guest memory that comes and goes while devices are attached.

use std::sync::Arc;

use stagecraft::ioasid::{Context, Error, GuestMemory, GuestView, MemoryRegion, Request, Setup, Strategy, Target};
use stagecraft::memory::Kind;
use stagecraft::plugin::Outcome;
use stagecraft::{Access, Gpa, Span};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

pub const HOTPLUGGED: u64 = 1 << 32;
pub const BYTES: u64 = 1 << 20;

/// Guest memory with a region more, or without it. Tables are in the first one.
pub fn memory(rig: &Rig, more: Option<&Arc<MmapRegion>>) -> GuestMemory {
    let region = |first: u64, bytes: u64, user_address: u64| MemoryRegion {
        span: Span { first, last: first + bytes - 1 },
        kind: Kind::Ram,
        user_address: Some(user_address),
        writable: true,
        block: None,
    };
    let ram = rig.memory.iter().next().unwrap();
    let mut regions = vec![region(0, ram.len(), ram.get_mmap().as_ptr() as u64)];
    regions.extend(more.map(|more| region(HOTPLUGGED, BYTES, more.as_ptr() as u64)));
    GuestMemory::new(Arc::new(stagecraft::ioasid::Shared((*rig.memory).clone())), regions).unwrap()
}

/// Whether the device gets from an IOVA to the page of the region that the guests here use.
pub fn reaches(rig: &Rig, iova: u64, region: &MmapRegion) -> bool {
    let device = rig.sim.device("nic").unwrap();
    let found = device.translate(None, stagecraft::Iova(iova), stagecraft::kernel::sim::DmaAccess::Read);
    found.is_ok_and(|found| found.user_address - region.as_ptr() as u64 == 0x3000)
}

#[test]
fn no_device_reaches_memory_that_went_and_all_reach_what_came() {
    for host in Arch::ALL {
        for strategy in Strategy::ALL.into_iter().take(3) {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
            rig.sim.register_region(Arc::clone(&more)).unwrap();
            {
                // AMD's own first format is not for users.
                let guest = Guest::new(if host == Arch::Amd && strategy == Strategy::Native { continue } else { host }, &rig.memory);
                guest.map(0x1000, DATA, true);
                guest.map(0x2000, HOTPLUGGED + 0x3000, true);
                let context = Context::with(Setup { memory: memory(&rig, None), ..rig.setup() }).unwrap();
                let device = context.connect("nic").unwrap();
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy, Strategy::Software])).unwrap();
                let managed = context.allocate(Request::managed()).unwrap();
                let bypass = context.allocate(Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 })).unwrap();
                ioasid.attach(&device, None).unwrap();
                // Where emulated devices get.
                let lookup = ioasid.lookup().unwrap();
                let found = || lookup.find(stagecraft::Iova(0x2000)).map(|target| target.address.0);
                let access = Access { read: true, write: true };
                let span = Span { first: 0x9000, last: 0x9fff };
                for round in 0..3 {
                    let what = format!("{host:?} {strategy:?} round {round}");
                    ioasid.replace(&device, None).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), false), "{what}");
                    assert!(matches!(managed.map(span, Target::Guest(Gpa(HOTPLUGGED)), access), Err(Error::NotMemory(_))), "{what}");
                    context.memory_changed(memory(&rig, Some(&more))).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), true), "{what}: it came");
                    assert_eq!(found(), Some(HOTPLUGGED + 0x3000), "{what}: lookups as well");
                    managed.map(span, Target::Guest(Gpa(HOTPLUGGED + 0x3000)), access).unwrap();
                    managed.replace(&device, None).unwrap();
                    assert!(reaches(&rig, 0x9000, &more), "{what}");
                    bypass.replace(&device, None).unwrap();
                    assert!(reaches(&rig, HOTPLUGGED + 0x3000, &more), "{what}");
                    ioasid.replace(&device, None).unwrap();
                    assert!(reaches(&rig, 0x2000, &more), "{what}");
                    context.memory_changed(memory(&rig, None)).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), false), "{what}: it went");
                    assert_eq!(found(), None, "{what}: lookups as well");
                    assert_eq!(managed.stats().mappings, 0, "{what}: what led there went with it");
                    managed.replace(&device, None).unwrap();
                    assert!(!reaches(&rig, 0x9000, &more), "{what}");
                    bypass.replace(&device, None).unwrap();
                    assert!(!reaches(&rig, HOTPLUGGED + 0x3000, &more), "{what}");
                }
            }
            rig.assert_clean();
        }
    }
}

/// A balloon: blocks in the middle of the guest's only region go and come back, and neighbours are reached all the while.
#[test]
fn blocks_of_a_balloon_go_and_come_back_without_a_miss_beside_them() {
    const BLOCK: u64 = 2 << 20;
    for host in Arch::ALL {
        for strategy in [Strategy::Native, Strategy::Nested, Strategy::Areas] {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            {
                let guest = Guest::new(if host == Arch::Amd && strategy == Strategy::Native { continue } else { host }, &rig.memory);
                // Two blocks as one large page each, and a page of the second.
                let (stays, goes) = (4 * BLOCK, 5 * BLOCK);
                guest.map_large(0x4000_0000, stays, true);
                guest.map_large(0x4020_0000, goes, true);
                guest.map(0x1000, goes + 0x3000, true);
                let ram = rig.memory.iter().next().unwrap();
                let (bytes, user_address) = (ram.len(), ram.get_mmap().as_ptr() as u64);
                let region = |first: u64, last: u64| MemoryRegion {
                    span: Span { first, last },
                    kind: Kind::Ram,
                    user_address: Some(user_address + first),
                    writable: true,
                    block: Some(BLOCK),
                };
                let memory =
                    |regions: Vec<MemoryRegion>| GuestMemory::new(Arc::new(stagecraft::ioasid::Shared((*rig.memory).clone())), regions).unwrap();
                let whole = memory(vec![region(0, bytes - 1)]);
                let without = memory(vec![region(0, goes - 1), region(goes + BLOCK, bytes - 1)]);
                let context = Context::with(Setup { memory: whole.clone(), ..rig.setup() }).unwrap();
                let device = context.connect("nic").unwrap();
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
                ioasid.attach(&device, None).unwrap();
                let managed = context.allocate(Request::managed()).unwrap();
                let span = Span { first: 0x9000, last: 0x9fff };
                managed.map(span, Target::Guest(Gpa(goes)), Access { read: true, write: true }).unwrap();
                let lookup = managed.lookup().unwrap();
                crate::moves::without_a_miss(&rig, 0x4000_1000, |round| {
                    let what = format!("{host:?} {strategy:?} round {round}");
                    let pinned = rig.sim.pinned_pages();
                    context.memory_changed(without.clone()).unwrap();
                    assert_eq!((rig.dma("nic", 0x4020_0000), rig.dma("nic", 0x1000)), (None, None), "{what}");
                    assert!(pinned - rig.sim.pinned_pages() >= 1 && rig.sim.pinned_pages() > 0, "{what}");
                    assert_eq!((managed.stats().mappings, lookup.find(stagecraft::Iova(0x9000))), (0, None), "{what}: lookups as well");
                    context.memory_changed(whole.clone()).unwrap();
                    assert_eq!((rig.dma("nic", 0x4020_0000), rig.dma("nic", 0x1000)), (Some(goes), Some(goes + 0x3000)), "{what}");
                    assert_eq!((rig.sim.pinned_pages(), lookup.find(stagecraft::Iova(0x9000))), (pinned, None), "{what}");
                    managed.map(span, Target::Guest(Gpa(goes)), Access { read: true, write: true }).unwrap();
                });
                // Half of a block cannot go, and nothing has changed.
                let half = memory(vec![region(0, goes + BLOCK / 2 - 1), region(goes + BLOCK, bytes - 1)]);
                assert!(matches!(context.memory_changed(half), Err(Error::Pins(stagecraft::pins::PinError::Cut { .. }))));
                assert_eq!((rig.dma("nic", 0x4020_0000), context.memory_leaving()), (Some(goes), Vec::new()));
            }
            rig.assert_clean();
        }
    }
}

/// A table of the guest's own that the unit walks goes with its memory, and so does what hardware had cached of it.
#[test]
fn what_was_cached_of_a_table_goes_with_the_tables_memory() {
    const TABLES: (u64, u64) = (0x10_0000, 0x20_0000);
    for host in [Arch::Arm, Arch::Vtd, Arch::Riscv] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let guest = Guest::at(host, &rig.memory, TABLES.0);
        guest.map(0x1000, DATA, true);
        let ram = rig.memory.iter().next().unwrap();
        let (bytes, user_address) = (ram.len(), ram.get_mmap().as_ptr() as u64);
        let memory = |spans: &[(u64, u64)]| {
            let region = |(first, end): &(u64, u64)| MemoryRegion {
                span: Span { first: *first, last: end - 1 },
                kind: Kind::Ram,
                user_address: Some(user_address + first),
                writable: true,
                block: None,
            };
            GuestMemory::new(Arc::new(stagecraft::ioasid::Shared((*rig.memory).clone())), spans.iter().map(region).collect()).unwrap()
        };
        let whole = memory(&[(0, TABLES.0), TABLES, (TABLES.1, bytes)]);
        let context = Context::with(Setup { memory: whole.clone(), ..rig.setup() }).unwrap();
        let device = context.connect("nic").unwrap();
        let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Native])).unwrap();
        ioasid.attach(&device, None).unwrap();
        assert_eq!(rig.dma("nic", 0x1000), Some(DATA));
        context.memory_changed(memory(&[(0, TABLES.0), (TABLES.1, bytes)])).unwrap();
        assert_eq!(rig.dma("nic", 0x1000), None, "{host:?}");
        context.memory_changed(whole).unwrap();
        assert_eq!(rig.dma("nic", 0x1000), Some(DATA), "{host:?}: it is there again");
        // What nobody was told of is found when all is read again.
        guest.unmap(0x1000);
        ioasid.synchronise().unwrap();
        assert_eq!(rig.dma("nic", 0x1000), None, "{host:?}");
    }
}

#[test]
fn memory_where_tables_may_stand_is_refused() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let context =
        Context::with(Setup { memory: memory(&rig, None).with_tables_in(Span { first: 1 << 40, last: (1 << 41) - 1 }), ..rig.setup() }).unwrap();
    let low = memory(&rig, None).with_tables_in(Span { first: 0x100_0000, last: 0x1ff_ffff });
    assert!(matches!(context.memory_changed(low.clone()), Err(Error::TableWindow { .. })));
    assert!(matches!(Context::with(Setup { memory: low, ..rig.setup() }), Err(Error::TableWindow { .. })));
    let mut setup = rig.setup();
    setup.limits.pinned_bytes = 1 << 20;
    assert!(matches!(Context::with(setup), Err(Error::Pins(_))));
}

/// What was written to memory that goes is not lost: if memory comes there again, it counts as written.
#[test]
fn writes_are_recorded_while_memory_comes_and_goes() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
    rig.sim.register_region(Arc::clone(&more)).unwrap();
    for strategy in Strategy::ALL.into_iter().take(3) {
        {
            let guest = Guest::new(Arch::Vtd, &rig.memory);
            guest.map(0x2000, HOTPLUGGED + 0x3000, true);
            let context = Context::with(Setup { memory: memory(&rig, None), ..rig.setup() }).unwrap();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request { dirty_tracking: true, ..Request::guest(guest.view()).with_strategies(&[strategy]) }).unwrap();
            ioasid.attach(&device, None).unwrap();
            ioasid.track_dirty(true).unwrap();
            let told = || {
                let words = ioasid.dirty(Span { first: HOTPLUGGED, last: HOTPLUGGED + BYTES - 1 }, true).unwrap();
                (0..256).filter(|page| words[page / 64] >> (page % 64) & 1 != 0).collect::<Vec<usize>>()
            };
            assert_eq!(told(), [0; 0], "{strategy}: there is no such memory");
            context.memory_changed(memory(&rig, Some(&more))).unwrap();
            let came = told();
            assert!(rig.writes("nic", 0x2000));
            assert_eq!((told(), told()), (vec![3], vec![]), "{strategy}: after {came:?}");
            assert!(rig.writes("nic", 0x2000));
            context.memory_changed(memory(&rig, None)).unwrap();
            context.memory_changed(memory(&rig, Some(&more))).unwrap();
            assert!(told().contains(&3), "{strategy}: it went, and came");
        }
        rig.assert_clean();
    }
}
