//! Marks of hosts whose tables went, or became others: they get into the guest's entries all the same.

use std::sync::Arc;

use stagecraft::Span;
use stagecraft::ioasid::{Context, Ioasid, Request, Setup, Strategy};
use stagecraft::plugin::Outcome;
use stagecraft::sync::MarksWritten;
use vm_memory::MmapRegion;

use crate::guests::{Arch, Guest, ROOT};
use crate::memory::{BYTES, HOTPLUGGED, memory};
use crate::rig::{DATA, Rig, unit};

/// Marks of a VT-d entry.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
/// A page that another root has at another address.
const OTHER: u64 = DATA + 0x8000;

/// A page that may be written, and was not used.
fn clean(guest: &Guest, iova: u64, address: u64) -> u64 {
    let slot = guest.map(iova, address, true);
    guest.set(slot, guest.entry(slot) & !A & !D);
    slot
}

fn marks(guest: &Guest, slots: &[u64]) -> Vec<u64> {
    slots.iter().map(|slot| guest.entry(*slot) & (A | D)).collect()
}

fn nested(guest: &Guest) -> Request {
    Request::guest(guest.view()).with_strategies(&[Strategy::Nested])
}

fn nothing(ioasid: &Ioasid) -> bool {
    ioasid.write_marks(Span::ALL) == MarksWritten::default()
}

#[test]
fn what_was_used_is_marked_when_its_memory_is_gone() {
    for host in [Arch::Vtd, Arch::Amd] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
        rig.sim.register_region(Arc::clone(&more)).unwrap();
        let guest = Guest::new(Arch::Vtd, &rig.memory);
        let mut slots = vec![clean(&guest, 0x1000, DATA)];
        // In one table all goes, in the other one something stays.
        for iova in [0x20_0000, 0x2000] {
            slots.extend((0..3).map(|page| clean(&guest, iova + (page << 12), HOTPLUGGED + (page << 12))));
        }
        let context = Context::with(Setup { memory: memory(&rig, Some(&more)), ..rig.setup() }).unwrap();
        let device = context.connect("nic").unwrap();
        let ioasid = context.allocate(nested(&guest)).unwrap();
        ioasid.attach(&device, None).unwrap();
        for iova in [0x1000, 0x2000, 0x20_0000] {
            assert!(rig.writes("nic", iova), "{host:?}");
        }
        let nic = rig.sim.device("nic").unwrap();
        for iova in [0x3000, 0x20_1000] {
            nic.read(None, stagecraft::Iova(iova), &mut [0]).unwrap();
        }
        context.memory_changed(memory(&rig, None)).unwrap();
        assert_eq!(marks(&guest, &slots), [0; 7], "{host:?}: not before it is asked for");
        let written = ioasid.write_marks(Span::ALL);
        assert_eq!((written.accessed, written.dirty, written.earlier, written.skipped), (1, 1, 4, 0), "{host:?}");
        assert_eq!(marks(&guest, &slots), [A | D, A | D, A, 0, A | D, A, 0], "{host:?}");
        assert!(nothing(&ioasid), "{host:?}");
        context.memory_changed(memory(&rig, Some(&more))).unwrap();
        assert!(nothing(&ioasid) && ioasid.synchronise().unwrap().changes == 0, "{host:?}: it comes, and nobody has used it");
        assert!(rig.writes("nic", 0x3000) && rig.writes("nic", 0x4000), "{host:?}");
        ioasid.write_marks(Span::ALL);
        assert_eq!(marks(&guest, &slots), [A | D, A | D, A, 0, A | D, A | D, A | D], "{host:?}");
    }
}

#[test]
fn tables_that_devices_have_left_have_their_marks() {
    for (host, strategy) in
        [(unit(Arch::Vtd), Strategy::Nested), (unit(Arch::Amd), Strategy::Nested), (unit(Arch::Vtd).without_nesting(), Strategy::Areas)]
    {
        let what = format!("{:?} {strategy}", host.kind);
        let rig = Rig::new(&[host], &[("nic", &[0])]);
        let (one, other) = (Guest::new(Arch::Vtd, &rig.memory), Guest::at(Arch::Vtd, &rig.memory, ROOT + 0x10_0000));
        // The first and the second are where they are in both.
        let [slots, others] = [(&one, DATA + 0x2000), (&other, OTHER)].map(|(guest, third)| {
            let pages = [(0x1000, DATA), (0x2000, DATA + 0x1000), (0x3000, third), (0x4000, DATA + 0x3000)];
            pages.map(|(iova, address)| clean(guest, iova, address))
        });
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        let ioasid = context.allocate(Request::guest(one.view()).with_strategies(&[strategy])).unwrap();
        ioasid.attach(&device, None).unwrap();
        let uses = |iovas: &[u64]| iovas.iter().for_each(|iova| assert!(rig.writes("nic", *iova), "{what}"));
        // What a host does not tell counts.
        let used = |guest: &Guest, slots: &[u64], pages: &[usize]| {
            let is = |page: usize| pages.contains(&page) || strategy == Strategy::Areas && !pages.is_empty();
            let wanted: Vec<u64> = (0..4).map(|page| if is(page) { A | D } else { 0 }).collect();
            assert_eq!(marks(guest, slots), wanted, "{what}: {pages:?}");
            slots.iter().for_each(|slot| guest.set(*slot, guest.entry(*slot) & !A & !D));
        };
        uses(&[0x1000, 0x3000]);
        ioasid.switch(other.view()).unwrap();
        uses(&[0x2000]);
        ioasid.write_marks(Span::ALL);
        used(&one, &slots, &[0, 2]);
        used(&other, &others, &[1]);
        ioasid.synchronise().unwrap();
        // The last handle goes; another IOASID writes the marks.
        uses(&[0x4000]);
        device.detach(None).unwrap();
        drop(ioasid);
        let second = context.allocate(Request::guest(one.view()).with_strategies(&[strategy])).unwrap();
        second.write_marks(Span { first: 0x10_0000, last: 0x10_0fff });
        used(&other, &others, &[3]);
        // All of them do, where there is none any more.
        second.attach(&device, None).unwrap();
        uses(&[0x2000, 0x3000]);
        device.detach(None).unwrap();
        drop(second);
        used(&one, &slots, &[]);
        context.write_marks();
        used(&one, &slots, &[1, 2]);
        // What the guest has changed meanwhile is not overwritten.
        let second = context.allocate(Request::guest(one.view()).with_strategies(&[strategy])).unwrap();
        second.attach(&device, None).unwrap();
        uses(&[0x1000, 0x2000]);
        device.detach(None).unwrap();
        drop(second);
        one.set(slots[0], 0);
        context.write_marks();
        assert_eq!((one.entry(slots[0]), one.entry(slots[1]) & (A | D)), (0, A | D), "{what}");
    }
}

#[test]
fn a_guest_that_has_marks_made_from_now_on_finds_them_on_what_it_uses() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    const AF: u64 = 1 << 10;
    let slots = [0x1000, 0x2000, 0x3000].map(|iova| guest.map(iova, DATA + iova, true));
    slots[1..].iter().for_each(|slot| guest.set(*slot, guest.entry(*slot) & !AF));
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(nested(&guest)).unwrap();
    ioasid.attach(&device, None).unwrap();
    assert_eq!([0x1000, 0x2000].map(|iova| rig.writes("nic", iova)), [true, false], "who sets the mark is the guest");
    let mut view = guest.view();
    if let Outcome::Tables(translated) = &mut view.outcome {
        translated.tables[0].settings.set("hardware-access", 1);
    }
    ioasid.switch(view).unwrap();
    assert!(nothing(&ioasid));
    assert!(rig.writes("nic", 0x2000));
    assert_eq!(ioasid.write_marks(Span::ALL).accessed, 1);
    assert_eq!(slots.map(|slot| guest.entry(slot) & AF), [AF, AF, 0]);
}
