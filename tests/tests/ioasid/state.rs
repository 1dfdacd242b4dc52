//! Contexts that are written down, and made again on another host.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use stagecraft::ioasid::{Context, Error, Property, Request, Restored, Saved, Strategy, Target};
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::sync::Watcher;
use stagecraft::table::Piece;
use stagecraft::{Access, Attributes, Change, Gpa, Iova, Span};
use vm_memory::{Bytes, GuestAddress, MmapRegion};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, MEMORY, Rig, page, unit};

const BOTH: Access = Access { read: true, write: true };

fn machine(host: UnitConfig) -> Rig {
    Rig::new(&[host], &[("nic", &[0]), ("disk", &[0]), ("gpu", &[0])])
}

/// A context with one of each kind, and everything that has to be kept alive.
fn original(rig: &Rig, guest: &Guest) -> (Context, Vec<stagecraft::ioasid::Device>, Vec<stagecraft::ioasid::Ioasid>, Arc<MmapRegion>) {
    let context = rig.context();
    let devices = [("nic", 0x10), ("disk", 0x20), ("gpu", 0x30)].map(|(label, id)| context.connect_as(label, id).unwrap());
    guest.map(0x1000, DATA, true);
    guest.map_large(0x4000_0000, 0x100_0000, false);
    let tables = context.allocate(Request::guest(guest.view())).unwrap();
    tables.lookup().unwrap();
    tables.attach(&devices[0], None).unwrap();
    let gone = context.allocate(Request::managed()).unwrap();
    let managed = context.allocate(Request::managed()).unwrap();
    drop(gone);
    managed.map(Span { first: 0x5000, last: 0x6fff }, Target::Guest(Gpa(DATA + 0x4000)), BOTH).unwrap();
    let own = Arc::new(MmapRegion::new(0x1000).unwrap());
    rig.sim.register_region(Arc::clone(&own)).unwrap();
    managed.map(Span { first: 0x9000, last: 0x9fff }, Target::User(own.as_ptr() as u64), Access { read: true, write: false }).unwrap();
    managed.attach(&devices[1], None).unwrap();
    let requests = context.allocate(Request::requests().with_strategies(&[Strategy::Nested, Strategy::Areas])).unwrap();
    let attributes = Attributes::READ.with(Attributes::COHERENT);
    requests.change(&[Change::Map(Piece { iova: Span { first: 0x7000, last: 0x8fff }, address: DATA + 0x7000, attributes })]).unwrap();
    requests.attach(&devices[2], None).unwrap();
    (context, devices.into(), vec![tables, managed, requests], own)
}

fn check(rig: &Rig, own: &MmapRegion) {
    assert_eq!((rig.dma("nic", 0x1008), rig.dma("nic", 0x4000_1000), rig.dma("nic", 0x2000)), (Some(DATA + 8), Some(0x100_1000), None));
    assert!(rig.writes("nic", 0x1000) && !rig.writes("nic", 0x4000_0000));
    assert_eq!((rig.dma("disk", 0x6008), rig.dma("disk", 0x7000)), (Some(DATA + 0x5008), None));
    let found = rig.sim.device("disk").unwrap().translate(None, Iova(0x9010), stagecraft::kernel::sim::DmaAccess::Read).unwrap();
    assert_eq!(found.user_address, own.as_ptr() as u64 + 0x10);
    assert!(!rig.writes("disk", 0x9000));
    assert_eq!((rig.dma("gpu", 0x8008), rig.dma("gpu", 0x9000)), (Some(DATA + 0x8008), None));
    assert!(!rig.writes("gpu", 0x7000));
}

/// The other machine has the guest's memory, and nothing else.
fn arrive(from: &Rig, host: UnitConfig) -> Rig {
    let rig = machine(host);
    let mut bytes = vec![0; MEMORY as usize];
    from.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    rig.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    rig
}

#[test]
fn a_guest_moves_to_a_host_of_another_architecture() {
    for arch in Arch::ALL {
        let first = machine(unit(Arch::Vtd));
        let guest = Guest::new(arch, &first.memory);
        let (context, _devices, _ioasids, own) = original(&first, &guest);
        check(&first, &own);
        let text = serde_json::to_string(&context.save()).unwrap();
        for host in Arch::ALL.into_iter().flat_map(|arch| [unit(arch), unit(arch).without_nesting()]) {
            let second = arrive(&first, host);
            {
                let saved: Saved = serde_json::from_str(&text).unwrap();
                let own = Arc::new(MmapRegion::new(0x1000).unwrap());
                second.sim.register_region(Arc::clone(&own)).unwrap();
                let user = |_, span: Span| (span.first == 0x9000).then_some(own.as_ptr() as u64);
                let Restored { context, devices, ioasids } = saved.restore(second.setup(), user).unwrap();
                check(&second, &own);
                assert_eq!(context.save(), saved, "what was restored is what was saved");
                assert_eq!(ioasids.iter().map(|ioasid| ioasid.id().0).collect::<Vec<_>>(), [1, 3, 4]);
                assert_eq!(
                    devices.iter().map(|device| (device.label(), device.virtual_id())).collect::<Vec<_>>(),
                    [("disk", 0x20), ("gpu", 0x30), ("nic", 0x10)]
                );
                assert!(context.allocate(Request::managed()).unwrap().id().0 > 4, "numbers are not used again");
                // It lives on.
                let here = Guest::new(arch, &second.memory);
                here.unmap(0x1000);
                ioasids[0].invalidate(&[page(0x1000)]).unwrap();
                assert_eq!((second.dma("nic", 0x1008), ioasids[0].lookup().unwrap().find(Iova(0x1008))), (None, None));
            }
            second.assert_clean();
        }
    }
}

#[test]
fn what_makes_no_sense_is_refused_and_leaves_nothing() {
    let first = machine(unit(Arch::Vtd));
    let guest = Guest::new(Arch::Arm, &first.memory);
    let (context, _devices, _ioasids, _own) = original(&first, &guest);
    let text = serde_json::to_string(&context.save()).unwrap();
    let second = arrive(&first, unit(Arch::Arm));
    let restore = |text: &str| {
        let saved: Saved = serde_json::from_str(text).unwrap();
        let result = saved.restore(second.setup(), |_, _| None);
        let error = result.expect_err("refused");
        second.assert_clean();
        error
    };
    let refused = |text: &str| match restore(text) {
        Error::Refused(refusal) if refusal.property == Property::Kind => refusal.reason,
        error => panic!("{error}"),
    };
    assert!(refused(&text).contains("nobody knows where the memory at 0x9000..=0x9fff is now"));
    let changed = |from: &str, to: &str| {
        assert!(text.contains(from), "{from} in {text}");
        text.replace(from, to)
    };
    assert!(refused(&changed("\"version\":1", "\"version\":7")).contains("of version 7"));
    assert!(refused(&changed("\"id\":3,", "\"id\":1,")).contains("not in the order"));
    assert!(refused(&changed("\"attached\":[[\"nic\",null]]", "\"attached\":[[\"fan\",null]]")).contains("device fan is attached, and not there"));
    assert!(refused(&changed("\"first\":20480,\"last\":28671", "\"first\":20480,\"last\":4095")).contains("a mapping is empty"));
    assert!(refused(&changed("\"attributes\":3", "\"attributes\":4096")).contains("attributes without a meaning"));
    assert!(matches!(restore(&changed("\"arm-smmuv3/stage1\"", "\"arm-smmuv3/stage9\"")), Error::Plugins(_)));
    assert!(matches!(restore(&changed("[\"granule\",4096]", "[\"granule\",5]")), Error::Call(_)));
    assert!(matches!(restore(&changed("\"label\":\"gpu\"", "\"label\":\"fan\"")), Error::Kernel { .. }));
}

/// Whatever call or step of the other host's kernel fails while a context is made again: nothing is left, and it is made the next time.
#[test]
fn a_restore_that_fails_leaves_nothing() {
    for (arch, host) in [(Arch::Arm, unit(Arch::Vtd)), (Arch::Vtd, unit(Arch::Arm)), (Arch::Riscv, unit(Arch::Amd).without_nesting())] {
        let first = machine(unit(Arch::Vtd));
        let guest = Guest::new(arch, &first.memory);
        let (context, _devices, _ioasids, _own) = original(&first, &guest);
        let saved = context.save();
        let second = arrive(&first, host);
        let own = Arc::new(MmapRegion::new(0x1000).unwrap());
        second.sim.register_region(Arc::clone(&own)).unwrap();
        let restore = || saved.clone().restore(second.setup(), |_, _| Some(own.as_ptr() as u64));
        for steps in [false, true] {
            for n in 1.. {
                match steps {
                    false => second.sim.fail_nth(n, Errno::ENOMEM),
                    true => second.sim.fail_step_nth(n, Errno::ENOMEM),
                }
                let result = restore();
                let is_over = second.sim.disarm();
                // What was made up for is whole.
                let is_made = result.is_ok_and(|restored| {
                    check(&second, &own);
                    restored.context.save() == saved
                });
                second.assert_clean();
                assert!(["nic", "disk", "gpu"].iter().all(|label| second.dma(label, 0x1008).is_none()), "{arch:?}: {n}");
                if is_over {
                    assert!(is_made && n > 10, "{arch:?}: {n}");
                    break;
                }
                if n % 8 == 0 {
                    drop(restore().unwrap());
                    second.assert_clean();
                }
            }
        }
    }
}

/// Pages with tables, as a VMM's watcher hears of them.
#[derive(Clone, Default)]
struct Watched(Arc<Mutex<BTreeSet<u64>>>);

impl Watcher for Watched {
    fn watch(&mut self, page: Gpa) {
        self.0.lock().unwrap().insert(page.0);
    }

    fn unwatch(&mut self, page: Gpa) {
        self.0.lock().unwrap().remove(&page.0);
    }
}

#[test]
fn a_restored_ioasid_has_a_watcher_again() {
    let first = machine(unit(Arch::Vtd));
    let guest = Guest::new(Arch::Arm, &first.memory);
    guest.map(0x1000, DATA, true);
    let context = first.context();
    let device = context.connect("nic").unwrap();
    let before = Watched::default();
    let ioasid = context.allocate_watched(Request::guest(guest.view()), Box::new(before.clone())).unwrap();
    ioasid.attach(&device, None).unwrap();
    let second = arrive(&first, unit(Arch::Riscv));
    let after = Watched::default();
    let watcher = |id| (id == ioasid.id()).then(|| Box::new(after.clone()) as Box<dyn Watcher>);
    let restored = context.save().restore_watched(second.setup(), |_, _| None, watcher).unwrap();
    assert!(!after.0.lock().unwrap().is_empty());
    assert_eq!(*after.0.lock().unwrap(), *before.0.lock().unwrap());
    let here = Guest::new(Arch::Arm, &second.memory);
    let slot = here.unmap(0x1000);
    assert!(after.0.lock().unwrap().contains(&(slot & !0xfff)));
    restored.ioasids[0].table_written(Gpa(slot), 8).unwrap();
    assert_eq!(second.dma("nic", 0x1000), None);
    drop(restored);
    assert!(after.0.lock().unwrap().is_empty());
}
