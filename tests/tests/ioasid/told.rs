//! What goes is told to all who have it: hosts of every kind and lookups in software, by whatever way it was found.

use std::sync::Arc;

use stagecraft::ioasid::{Context, GuestView, Ioasid, Request, Response, Setup, SpaceLimits, Strategy, Target};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{Outcome, TableConfig, Tag, Translated};
use stagecraft::sync::{AreaLimits, ShadowLimits, Unwatched};
use stagecraft::table::Piece;
use stagecraft::{Access, Attributes, Change, Gpa, Iova, Span};
use vm_memory::MmapRegion;

use crate::guests::{Arch, Guest};
use crate::memory::{BYTES, HOTPLUGGED, memory};
use crate::rig::{DATA, Deaf, Rig, page, unit};

const BOTH: Access = Access { read: true, write: true };

/// Tells of a page that went; the address is that of its entry.
type Tell = fn(&Context, &Ioasid, Gpa);

const WAYS: [(&str, Tell); 5] = [
    ("a command", |_, ioasid, _| drop(ioasid.invalidate(&[page(0x1000)]).unwrap())),
    ("a write", |_, ioasid, entry| drop(ioasid.table_written(entry, 8).unwrap())),
    ("a write that the context hears of", |context, _, entry| drop(context.table_written(entry, 8).unwrap())),
    ("all is read again", |_, ioasid, _| drop(ioasid.synchronise().unwrap())),
    ("a fault", |_, ioasid, _| drop(ioasid.fault(Iova(0x1000), BOTH).unwrap())),
];

#[test]
fn a_page_that_went_is_gone_for_all() {
    for (host, strategy) in Arch::ALL.into_iter().flat_map(|host| [(host, Strategy::Nested), (host, Strategy::Areas)]) {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        for (what, tell) in WAYS {
            let guest = Guest::new(Arch::Riscv, &rig.memory);
            let entry = guest.map(0x1000, DATA, true);
            guest.map(0x2000, DATA + 0x1000, true);
            let context = Context::with(Setup { watcher: Some(Box::new(Unwatched)), ..rig.setup() }).unwrap();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy, Strategy::Software])).unwrap();
            let lookup = ioasid.lookup().unwrap();
            ioasid.attach(&nic, None).unwrap();
            let at = |iova: u64| [rig.dma("nic", iova), lookup.find(Iova(iova)).map(|target| target.address.0)];
            assert_eq!((at(0x1000), at(0x2000)), ([Some(DATA); 2], [Some(DATA + 0x1000); 2]));
            guest.unmap(0x1000);
            tell(&context, &ioasid, Gpa(entry));
            assert_eq!((at(0x1000), at(0x2000)), ([None; 2], [Some(DATA + 0x1000); 2]), "{host:?} {strategy}: {what}");
        }
        rig.assert_clean();
    }
}

/// What a guest's structures give, with a number.
fn view(guest: &Guest, domain: u32) -> GuestView {
    let tag = Tag { domain: Some(domain), space: None };
    GuestView { outcome: Outcome::Tables(Translated { tables: vec![guest.arch.config(guest.root())], intercepts: Vec::new(), tag }), id: 0 }
}

/// Commands mean an address space by the numbers that the guest's structures have given it last.
#[test]
fn after_a_switch_commands_name_other_numbers() {
    let command = |domain: u16| {
        let scope = Scope { leaf: true, second_stage: false, domain: Some(domain), space: None, id: None };
        [Invalidation { index: 0, effect: Effect::Range { scope, iova: Span { first: 0x1000, last: 0x1fff } } }]
    };
    for (arch, strategy) in [(Arch::Arm, Strategy::Native), (Arch::Vtd, Strategy::Nested), (Arch::Vtd, Strategy::Areas)] {
        let rig = Rig::new(&[unit(Arch::Arm)], &[("nic", &[0])]);
        {
            let guest = Guest::new(arch, &rig.memory);
            guest.map(0x1000, DATA, true);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(view(&guest, 1)).with_strategies(&[strategy, Strategy::Software])).unwrap();
            let lookup = ioasid.lookup().unwrap();
            ioasid.attach(&nic, None).unwrap();
            let found = || [rig.dma("nic", 0x1000), lookup.find(Iova(0x1000)).map(|target| target.address.0)];
            ioasid.switch(view(&guest, 2)).unwrap();
            assert_eq!(found(), [Some(DATA); 2], "{strategy}");
            guest.unmap(0x1000);
            ioasid.invalidate(&command(1)).unwrap();
            assert_eq!(found(), [Some(DATA); 2], "{strategy}: another's");
            ioasid.invalidate(&command(2)).unwrap();
            assert_eq!(found(), [None; 2], "{strategy}");
        }
        rig.assert_clean();
    }
}

/// Commands for structures change nothing by themselves: whoever knows what leads to the tables is told that it has to look.
#[test]
fn commands_for_structures_are_told() {
    for (arch, strategy) in [(Arch::Arm, Strategy::Native), (Arch::Vtd, Strategy::Nested), (Arch::Vtd, Strategy::Areas)] {
        let rig = Rig::new(&[unit(Arch::Arm)], &[("nic", &[0])]);
        {
            let guest = Guest::new(arch, &rig.memory);
            guest.map(0x1000, DATA, true);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(view(&guest, 1)).with_strategies(&[strategy])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            for (domain, is_meant) in [(None, true), (Some(1), true), (Some(2), false)] {
                let effect = Effect::Structures(Scope { leaf: false, second_stage: false, domain, space: None, id: None });
                let report = ioasid.invalidate(&[Invalidation { index: 0, effect }, page(0x1000)]).unwrap();
                assert_eq!((report.structures, report.changes), (is_meant, 0), "{strategy}: {domain:?}");
            }
        }
        rig.assert_clean();
    }
}

#[test]
fn what_the_vmm_unmaps_is_gone_for_lookups() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    {
        let context = rig.context();
        let nic = context.connect("nic").unwrap();
        let ioasid = context.allocate(Request::managed()).unwrap();
        let span = |number: u64| Span { first: number << 12, last: number << 12 | 0xfff };
        (1..4).for_each(|number| ioasid.map(span(number), Target::Guest(Gpa(DATA + (number << 12))), BOTH).unwrap());
        let lookup = ioasid.lookup().unwrap();
        ioasid.attach(&nic, None).unwrap();
        let there = || [1_u64, 2, 3].map(|number| (rig.dma("nic", number << 12).is_some(), lookup.find(Iova(number << 12)).is_some()));
        assert_eq!(there(), [(true, true); 3]);
        assert_eq!(ioasid.unmap(Span { first: 0x1000, last: 0x2fff }).unwrap(), 2);
        assert_eq!(there(), [(false, false), (false, false), (true, true)]);
    }
    rig.assert_clean();
}

fn map(first: u64, address: u64) -> Change {
    let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
    Change::Map(Piece { iova: Span { first, last: first | 0xfff }, address, attributes })
}

/// Memory goes to which a guest asked for mappings, and comes again.
#[test]
fn memory_that_went_is_gone_where_a_guest_asked_for_it() {
    for strategy in [Strategy::Nested, Strategy::Areas] {
        let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
        {
            let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
            rig.sim.register_region(Arc::clone(&more)).unwrap();
            let context = Context::with(Setup { memory: memory(&rig, Some(&more)), ..rig.setup() }).unwrap();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::requests().with_strategies(&[strategy])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            ioasid.change(&[map(0x1000, DATA), map(0x2000, HOTPLUGGED + 0x3000)]).unwrap();
            let there = || [0x1000, 0x2000].map(|iova| rig.writes("nic", iova));
            assert_eq!(there(), [true, true], "{strategy}");
            context.memory_changed(memory(&rig, None)).unwrap();
            assert_eq!((there(), context.memory_leaving().len()), ([true, false], 0), "{strategy}");
            context.memory_changed(memory(&rig, Some(&more))).unwrap();
            assert_eq!(there(), [true, true], "{strategy}: it came again");
        }
        rig.assert_clean();
    }
}

/// What devices write through mappings that a guest asked for, in tables that hardware marks: also what was in caches before, and what was told already.
#[test]
fn writes_through_what_a_guest_asked_for_are_told() {
    for host in [Arch::Vtd, Arch::Amd] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::requests().with_strategies(&[Strategy::Nested])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            ioasid.change(&(0..8).map(|number| map(number << 12, DATA + (number << 12))).collect::<Vec<_>>()).unwrap();
            let told = |clear: bool| {
                let words = ioasid.dirty(Span { first: DATA, last: DATA + 0x7fff }, clear).unwrap();
                (0..8_u64).filter(|page| words[0] >> page & 1 != 0).collect::<Vec<u64>>()
            };
            assert!(rig.writes("nic", 0x3000));
            ioasid.track_dirty(true).unwrap();
            assert_eq!(told(false), [0; 0], "{host:?}: what was written before");
            assert!(rig.writes("nic", 0x3000));
            assert_eq!((told(false), told(true), told(true)), (vec![3], vec![3], vec![]), "{host:?}");
            assert!(rig.writes("nic", 0x3000));
            assert_eq!(told(true), [3], "{host:?}: written again");
        }
        rig.assert_clean();
    }
}

/// Where nobody could be told to forget what a page table left in caches, nobody else gets its number.
#[test]
fn a_number_that_caches_may_know_is_not_used_again() {
    let rig = Rig::new(&[unit(Arch::Arm)], &[("nic", &[0]), ("disk", &[0])]);
    {
        let (one, other) = (Guest::new(Arch::Vtd, &rig.memory), Guest::at(Arch::Vtd, &rig.memory, 0x40_0000));
        one.map(0x1000, DATA, true);
        other.map(0x2000, DATA, true);
        let kernel = Deaf::before(rig.kernel());
        let context = Context::with(Setup { kernel: Arc::clone(&kernel) as _, ..rig.setup() }).unwrap();
        let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
        let of = |guest: &Guest| context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
        // What page tables of the unit share stays with this one.
        let stays = of(&other);
        stays.attach(&disk, None).unwrap();
        for is_heard in [true, false] {
            let first = of(&one);
            first.attach(&nic, None).unwrap();
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (Some(DATA), None));
            nic.detach(None).unwrap();
            kernel.takes(if is_heard { u64::MAX } else { 0 });
            drop(first);
            assert_eq!(kernel.hears(), !is_heard);
            let second = of(&other);
            second.attach(&nic, None).unwrap();
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (None, Some(DATA)), "heard: {is_heard}");
            nic.detach(None).unwrap();
        }
    }
    rig.assert_clean();
}

/// What any unit lacks for want of room is told, also where another one walks the guest's own table and lacks nothing; and a device that asks for it is not sent round in circles.
#[test]
fn what_any_host_has_no_room_for_is_told() {
    let rig = Rig::new(&[unit(Arch::Vtd), unit(Arch::Arm)], &[("nic", &[0]), ("disk", &[1])]);
    let guest = Guest::new(Arch::Vtd, &rig.memory);
    {
        let context = rig.context();
        let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
        let shadow = ShadowLimits { leaves: 1, ..ShadowLimits::default() };
        let limits = SpaceLimits { shadow, ..SpaceLimits::default() };
        guest.map(0x1000, DATA, true);
        let ioasid = context.allocate(Request::guest(guest.view()).with_second_table().with_limits(limits)).unwrap();
        ioasid.attach(&nic, None).unwrap();
        ioasid.attach(&disk, None).unwrap();
        assert_eq!(ioasid.strategies(), [Strategy::Native, Strategy::Nested]);
        guest.map(0x2000, DATA + 0x2000, true);
        let report = ioasid.invalidate(&[page(0x2000)]).unwrap();
        assert_eq!((rig.dma("nic", 0x2000), rig.dma("disk", 0x2000)), (Some(DATA + 0x2000), None));
        assert_eq!((report.blocked_count, report.blocked.len()), (1, 1));
        assert_eq!(ioasid.fault(Iova(0x2000), BOTH).unwrap(), Response::Blocked);
        assert_eq!(ioasid.fault(Iova(0x1000), BOTH).unwrap(), Response::Mapped);
        // There is room.
        guest.unmap(0x1000);
        assert_eq!(ioasid.invalidate(&[page(0x1000)]).unwrap().changes, 1);
        assert_eq!(ioasid.fault(Iova(0x2000), BOTH).unwrap(), Response::Mapped);
        assert_eq!((rig.dma("nic", 0x2000), rig.dma("disk", 0x2000)), (Some(DATA + 0x2000), Some(DATA + 0x2000)));
    }
    rig.assert_clean();
}

/// A host without memory for tables, and one without room for areas: whoever asks for what is not there hears that it will not be.
#[test]
fn a_device_is_not_sent_back_to_what_its_host_has_not() {
    let areas = AreaLimits { areas: 1, ..AreaLimits::default() };
    for limits in [SpaceLimits { table_bytes: 4 << 12, ..SpaceLimits::default() }, SpaceLimits { areas, ..SpaceLimits::default() }] {
        let is_areas = limits.areas.areas == 1;
        let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
        let guest = Guest::new(Arch::Arm, &rig.memory);
        {
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let strategy = if is_areas { Strategy::Areas } else { Strategy::Nested };
            let wish = |request: Request| {
                if is_areas { request } else { request.with_host_table(TableConfig::new("intel-vtd/first-stage", &[("levels", 4)])) }
            };
            let ioasid = context.allocate(wish(Request::guest(guest.view()).with_strategies(&[strategy]).with_limits(limits))).unwrap();
            // There is nobody who could lack anything.
            let far = 1 << 40;
            guest.map(0x1000, DATA, true);
            guest.map(far, DATA + 0x2000, true);
            assert_eq!(ioasid.fault(Iova(far), BOTH).unwrap(), Response::Mapped);
            ioasid.attach(&nic, None).unwrap();
            assert_eq!(ioasid.fault(Iova(0x1000), BOTH).unwrap(), Response::Mapped, "{strategy}");
            assert_eq!(ioasid.fault(Iova(far + 0x123), BOTH).unwrap(), Response::Blocked, "{strategy}");
            assert!(matches!(ioasid.fault(Iova(0x3000), BOTH).unwrap(), Response::Refused(_)));
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", far)), (Some(DATA), None));
            // There is room.
            guest.unmap(0x1000);
            ioasid.invalidate(&[page(0x1000)]).unwrap();
            assert_eq!(ioasid.fault(Iova(far), BOTH).unwrap(), Response::Mapped, "{strategy}");
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", far)), (None, Some(DATA + 0x2000)));
        }
        rig.assert_clean();
    }
}
