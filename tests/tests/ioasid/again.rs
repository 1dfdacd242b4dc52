//! What could not be done because the kernel failed is done the next time, and not only by chance.

use std::sync::Arc;

use stagecraft::ioasid::{Context, Error, Ioasid, Request, Setup, SpaceLimits, Strategy};
use stagecraft::kernel::Errno;
use stagecraft::sync::AreaLimits;
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Iova, Span};
use vm_memory::MmapRegion;

use crate::guests::{Arch, Guest};
use crate::memory::{BYTES, HOTPLUGGED, memory, reaches};
use crate::rig::{DATA, Rig, page, range, unit};

/// Pages so far from each other that each takes tables of its own.
fn iovas() -> impl Iterator<Item = u64> {
    (1..64).map(|number| number << 30)
}

type Again = fn(&Ioasid) -> Result<(), Error>;

const AGAIN: [(&str, Again); 2] = [("synchronise", |ioasid| ioasid.synchronise().map(drop)), ("recover", Ioasid::recover)];

fn reached(rig: &Rig) -> usize {
    iovas().filter(|iova| rig.dma("nic", *iova) == Some(DATA)).count()
}

#[test]
fn memory_for_tables_that_the_kernel_refused_is_asked_for_again() {
    // Any look does, at whatever it looks.
    let look: Again = |ioasid| ioasid.invalidate(&[page(0x5000)]).map(drop);
    for host in Arch::ALL {
        for (what, again) in AGAIN.into_iter().chain([("invalidate", look)]) {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            let guest = Guest::new(Arch::Arm, &rig.memory);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            for iova in iovas() {
                guest.map(iova, DATA, true);
            }
            rig.sim.fail_from(1, Errno::ENOMEM);
            ioasid.synchronise().unwrap();
            assert!(reached(&rig) < iovas().count() && ioasid.stats().without_memory > 0, "{host:?}: there was memory");
            rig.sim.disarm();
            again(&ioasid).unwrap();
            assert_eq!((reached(&rig), ioasid.stats().without_memory), (iovas().count(), 0), "{host:?}: {what}");
        }
    }
}

#[test]
fn what_a_guest_asked_for_is_mapped_when_there_is_memory_for_tables_again() {
    for host in Arch::ALL {
        for (what, again) in AGAIN {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::requests().with_strategies(&[Strategy::Nested])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            rig.sim.fail_from(1, Errno::ENOMEM);
            let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
            let map = |first: u64| Change::Map(Piece { iova: Span { first, last: first + 0xfff }, address: DATA, attributes });
            ioasid.change(&iovas().map(map).collect::<Vec<_>>()).unwrap();
            assert!(reached(&rig) < iovas().count() && ioasid.stats().without_memory > 0, "{host:?}: there was memory");
            rig.sim.disarm();
            // What is gone by then is not mapped.
            ioasid.change(&[Change::Unmap(Span { first: 7 << 30, last: (7 << 30) + 0xfff })]).unwrap();
            again(&ioasid).unwrap();
            assert_eq!((reached(&rig), rig.dma("nic", 7 << 30)), (iovas().count() - 1, None), "{host:?}: {what}");
            assert_eq!(ioasid.stats().without_memory, 0, "{host:?}: {what}");
        }
    }
}

/// Whatever fails while memory comes, and goes on failing when that is taken back: it comes when it is said again.
#[test]
fn memory_that_could_not_come_comes_when_it_is_said_again() {
    for host in Arch::ALL {
        for strategy in [Strategy::Nested, Strategy::Areas] {
            for n in 1.. {
                let what = format!("{host:?} {strategy:?} call {n}");
                let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
                let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
                rig.sim.register_region(Arc::clone(&more)).unwrap();
                let guest = Guest::new(Arch::Arm, &rig.memory);
                guest.map(0x2000, HOTPLUGGED + 0x3000, true);
                let context = Context::with(Setup { memory: memory(&rig, None), ..rig.setup() }).unwrap();
                let nic = context.connect("nic").unwrap();
                let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
                ioasid.attach(&nic, None).unwrap();
                rig.sim.fail_from(n, Errno::ENOMEM);
                let came = context.memory_changed(memory(&rig, Some(&more)));
                let is_over = rig.sim.disarm();
                assert!(came.is_ok() || !is_over && !reaches(&rig, 0x2000, &more), "{what}: {came:?}");
                context.memory_changed(memory(&rig, Some(&more))).unwrap_or_else(|error| panic!("{what}: {error}"));
                ioasid.recover().unwrap();
                assert!(reaches(&rig, 0x2000, &more) && context.memory_leaving().is_empty(), "{what}");
                drop((ioasid, nic, context));
                rig.assert_clean();
                if is_over {
                    assert!(n > 1, "{what}: no call at all");
                    break;
                }
            }
        }
    }
}

#[test]
fn memory_that_could_not_go_goes_when_it_is_said_again() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        let more = Arc::new(MmapRegion::new(BYTES as usize).unwrap());
        rig.sim.register_region(Arc::clone(&more)).unwrap();
        {
            let guest = Guest::new(Arch::Arm, &rig.memory);
            guest.map(0x1000, DATA, true);
            guest.map(0x2000, HOTPLUGGED + 0x3000, true);
            let context = Context::with(Setup { memory: memory(&rig, Some(&more)), ..rig.setup() }).unwrap();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Areas])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            rig.sim.fail_from(1, Errno::ENOMEM);
            assert!(matches!(context.memory_changed(memory(&rig, None)), Err(Error::Blocked(_))), "{host:?}");
            assert_eq!((context.memory_leaving().len(), rig.dma("nic", 0x2000)), (1, None), "{host:?}");
            rig.sim.disarm();
            // Nobody has called anything else.
            context.memory_changed(memory(&rig, None)).unwrap();
            assert_eq!(context.memory_leaving(), Vec::new(), "{host:?}");
            ioasid.recover().unwrap();
            assert_eq!((rig.dma("nic", 0x1000), rig.dma("nic", 0x2000)), (Some(DATA), None), "{host:?}");
        }
        rig.assert_clean();
    }
}

/// A guest that asks for more areas than it may have has some of them, whether it asks before its device comes or after; what goes makes room.
#[test]
fn more_areas_than_are_allowed_are_no_reason_to_refuse_a_device() {
    for host in Arch::ALL {
        for before in [true, false] {
            let rig = Rig::new(&[unit(host).without_nesting()], &[("nic", &[0])]);
            {
                let guest = Guest::new(Arch::Arm, &rig.memory);
                let map = || iovas().for_each(|iova| guest.put(iova, DATA, true));
                let context = rig.context();
                let nic = context.connect("nic").unwrap();
                let mut request = Request::guest(guest.view());
                request.limits.areas.areas = 10;
                let ioasid = context.allocate(request).unwrap();
                if before {
                    map();
                }
                ioasid.attach(&nic, None).unwrap();
                if !before {
                    map();
                    ioasid.synchronise().unwrap();
                }
                let what = format!("{host:?}, mapped before: {before}");
                assert_eq!((reached(&rig), ioasid.stats().areas), (10, 10), "{what}");
                assert!(ioasid.stats().without_memory > 0, "{what}");
                let (stay, go): (Vec<u64>, Vec<u64>) = iovas().partition(|iova| iova >> 30 > 55);
                go.iter().for_each(|iova| guest.remove(*iova));
                ioasid.synchronise().unwrap();
                assert_eq!((reached(&rig), ioasid.stats().areas), (stay.len(), stay.len() as u64), "{what}");
                // A kernel that refuses is another matter: a device is not attached to half of what it is to have.
                nic.detach(None).unwrap();
                let other = context.allocate(Request::guest(guest.view())).unwrap();
                rig.sim.fail_from(4, Errno::ENOMEM);
                assert!(matches!(other.attach(&nic, None), Err(Error::Kernel { .. })), "{what}");
                rig.sim.disarm();
                other.attach(&nic, None).unwrap();
                assert_eq!(reached(&rig), stay.len(), "{what}");
            }
            rig.assert_clean();
        }
    }
}

/// A guest at a limit, and a kernel that fails at the same moment: nobody was told what is kept out, and it can be asked for.
/// Lookups in software and areas get what they had no room for as soon as there is some, as host tables do.
#[test]
fn what_there_was_no_room_for_comes_when_there_is_some() {
    let iova = |block: u64| block << 21 | 0x1000;
    let piece = |block: u64| {
        let span = Span { first: iova(block), last: iova(block) | 0xfff };
        Piece { iova: span, address: DATA + (block << 12), attributes: Attributes::READ }
    };
    let lookup = stagecraft::lookup::Limits { nodes: 4 };
    let limits = SpaceLimits { lookup, areas: AreaLimits { pieces: 3, ..AreaLimits::default() }, ..SpaceLimits::default() };
    for (emulated, arch) in [false, true].into_iter().flat_map(|emulated| Arch::ALL.map(|arch| (emulated, arch))) {
        let what = format!("{arch:?}, emulated {emulated}");
        let rig = Rig::new(&[unit(arch).without_nesting()], &[("nic", &[0])]);
        let guest = Guest::new(arch, &rig.memory);
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        let begin = |ioasid: &Ioasid| if emulated { drop(ioasid.lookup().unwrap()) } else { drop(ioasid.attach(&device, None).unwrap()) };
        let found = |ioasid: &Ioasid| {
            let reached = |block: &u64| match emulated {
                true => ioasid.lookup().unwrap().find(Iova(iova(*block))).map(|found| found.address.0),
                false => rig.dma("nic", iova(*block)),
            };
            (0..8).filter(|block| reached(block) == Some(DATA + (block << 12))).collect::<Vec<u64>>()
        };
        let is_next =
            |first: &[u64], second: &[u64]| !second.is_empty() && second.len() >= first.len() && second.iter().all(|block| !first.contains(block));

        (0..8).for_each(|block| guest.put(iova(block), DATA + (block << 12), true));
        let ioasid = context.allocate(Request::guest(guest.view()).with_limits(limits)).unwrap();
        begin(&ioasid);
        let first = found(&ioasid);
        assert!(!first.is_empty() && first.len() < 5, "{what}: {first:?}");
        // They are gone: the others come, with the same command.
        first.iter().for_each(|block| guest.remove(iova(*block)));
        let report = ioasid.invalidate(&first.iter().map(|block| page(iova(*block))).collect::<Vec<_>>()).unwrap();
        let second = found(&ioasid);
        assert!(report.offered > 0 && is_next(&first, &second), "{what}: {first:?}, {second:?}");
        if !emulated {
            device.detach(None).unwrap();
        }

        let ioasid = context.allocate(Request::requests().with_limits(limits)).unwrap();
        begin(&ioasid);
        ioasid.change(&(0..8).map(|block| Change::Map(piece(block))).collect::<Vec<_>>()).unwrap();
        let first = found(&ioasid);
        assert!(!first.is_empty() && first.len() < 5, "{what}: {first:?}");
        ioasid.change(&first.iter().map(|block| Change::Unmap(piece(*block).iova)).collect::<Vec<_>>()).unwrap();
        ioasid.synchronise().unwrap();
        let second = found(&ioasid);
        assert!(is_next(&first, &second), "{what}: {first:?}, {second:?}");
    }
}

#[test]
fn what_a_limit_keeps_out_is_known_where_the_call_failed() {
    for strategy in [Strategy::Nested, Strategy::Areas] {
        let rig = Rig::new(&[unit(Arch::Arm)], &[("nic", &[0])]);
        {
            let guest = Guest::new(Arch::Vtd, &rig.memory);
            guest.map(0x1000, DATA, true);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let mut request = Request::guest(guest.view()).with_strategies(&[strategy]);
            request.limits.shadow.leaves = 4;
            let ioasid = context.allocate(request).unwrap();
            ioasid.attach(&nic, None).unwrap();
            assert_eq!(ioasid.stats().blocked_entries, 0);
            guest.unmap(0x1000);
            let pages = || (0x10..0x18).map(|page| page << 12);
            pages().for_each(|iova| guest.put(iova, DATA, true));
            rig.sim.fail_from(1, Errno::ENOMEM);
            ioasid.invalidate(&[range(0, 0xf_ffff, false)]).unwrap_err();
            rig.sim.disarm();
            ioasid.recover().unwrap();
            let reached = pages().filter(|iova| rig.dma("nic", *iova) == Some(DATA)).count();
            assert_eq!((reached, ioasid.stats().blocked_entries, rig.dma("nic", 0x1000)), (4, 4, None), "{strategy:?}");
        }
        rig.assert_clean();
    }
}
