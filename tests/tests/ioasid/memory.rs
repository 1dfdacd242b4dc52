//! Guest memory that comes and goes while devices are attached.

use std::sync::Arc;

use stagecraft::ioasid::{Context, Error, GuestMemory, GuestView, MemoryRegion, Request, Setup, Strategy, Target};
use stagecraft::memory::Kind;
use stagecraft::plugin::Outcome;
use stagecraft::{Access, Gpa, Span};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Rig, unit};

const HOTPLUGGED: u64 = 1 << 32;
const BYTES: u64 = 1 << 20;

/// Guest memory with a region more, or without it. Tables are in the first one.
fn memory(rig: &Rig, more: Option<&Arc<MmapRegion>>) -> GuestMemory {
    let region = |first: u64, bytes: u64, user_address: u64| MemoryRegion {
        span: Span { first, last: first + bytes - 1 },
        kind: Kind::Ram,
        user_address: Some(user_address),
        writable: true,
    };
    let ram = rig.memory.iter().next().unwrap();
    let mut regions = vec![region(0, ram.len(), ram.get_mmap().as_ptr() as u64)];
    regions.extend(more.map(|more| region(HOTPLUGGED, BYTES, more.as_ptr() as u64)));
    GuestMemory::new(Arc::new(stagecraft::ioasid::Shared((*rig.memory).clone())), regions).unwrap()
}

fn reaches(rig: &Rig, iova: u64, region: &MmapRegion) -> bool {
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
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
                let managed = context.allocate(Request::managed()).unwrap();
                let bypass = context.allocate(Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 })).unwrap();
                ioasid.attach(&device, None).unwrap();
                let access = Access { read: true, write: true };
                let span = Span { first: 0x9000, last: 0x9fff };
                for round in 0..3 {
                    let what = format!("{host:?} {strategy:?} round {round}");
                    ioasid.replace(&device, None).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), false), "{what}");
                    assert!(matches!(managed.map(span, Target::Guest(Gpa(HOTPLUGGED)), access), Err(Error::NotMemory(_))), "{what}");
                    context.memory_changed(memory(&rig, Some(&more))).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), true), "{what}: it came");
                    managed.map(span, Target::Guest(Gpa(HOTPLUGGED + 0x3000)), access).unwrap();
                    managed.replace(&device, None).unwrap();
                    assert!(reaches(&rig, 0x9000, &more), "{what}");
                    bypass.replace(&device, None).unwrap();
                    assert!(reaches(&rig, HOTPLUGGED + 0x3000, &more), "{what}");
                    ioasid.replace(&device, None).unwrap();
                    assert!(reaches(&rig, 0x2000, &more), "{what}");
                    context.memory_changed(memory(&rig, None)).unwrap();
                    assert_eq!((rig.dma("nic", 0x1000), reaches(&rig, 0x2000, &more)), (Some(DATA), false), "{what}: it went");
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
