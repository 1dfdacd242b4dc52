//! Devices that go from one address space to another, PASIDs, switches, and faults.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::ioasid::{Error, GuestView, Ioasid, Property, Request, Response, Strategy, Target};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::kernel::{Errno, Pasid};
use stagecraft::plugin::Outcome;
use stagecraft::plugin::queue::Effect;
use stagecraft::{Access, Gpa, Iova, Span};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, EVERYTHING, Rig, Stop, page, range, unit};

const BOTH: Access = Access { read: true, write: true };

/// While `act` runs, again and again, DMA to a page never fails.
pub fn without_a_miss(rig: &Rig, iova: u64, mut act: impl FnMut(u64)) {
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    let device = rig.sim.device("nic").unwrap();
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                device.write(None, Iova(iova), &[1, 2, 3]).unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        let end = Stop(&stop);
        let mut round = 0;
        while (round < 24 || done.load(Ordering::Relaxed) < 200) && !dma.is_finished() {
            act(round);
            round += 1;
        }
        drop(end);
        dma.join().unwrap();
    });
}

#[test]
fn a_device_moves_between_all_kinds_without_a_miss() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let guest = Guest::new(host, &rig.memory);
            // A page that is the same everywhere: guest memory as it is has it too.
            guest.map(DATA, DATA, true);
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let of = |strategies: &[Strategy]| context.allocate(Request::guest(guest.view()).with_strategies(strategies)).unwrap();
            let managed = context.allocate(Request::managed()).unwrap();
            managed.map(Span { first: DATA, last: DATA | 0xfff }, Target::Guest(Gpa(DATA)), BOTH).unwrap();
            let bypass = context.allocate(Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 })).unwrap();
            let all: [Ioasid; 5] = [of(&[Strategy::Native, Strategy::Nested]), of(&[Strategy::Nested]), of(&[Strategy::Areas]), managed, bypass];
            all[0].attach(&device, None).unwrap();
            without_a_miss(&rig, DATA, |round| {
                // Every pair in both directions, in time.
                let (step, from) = (round / 5 % 4 + 1, round);
                let to = &all[((from * step + step) % 5) as usize];
                to.replace(&device, None).unwrap();
                assert_eq!(device.attached(), [(None, to.id())]);
            });
        }
        rig.assert_clean();
    }
}

#[test]
fn switched_tables_are_hitless_and_the_old_ones_are_gone() {
    for host in Arch::ALL {
        for strategies in [&Strategy::ALL[..], &[Strategy::Nested], &[Strategy::Areas]] {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
            {
                let guests = [ROOT_ONE, ROOT_TWO].map(|root| Guest::at(host, &rig.memory, root));
                for (guest, only) in guests.iter().zip([0x1000, 0x2000]) {
                    guest.map(DATA, DATA, true);
                    guest.map(only, DATA + only, true);
                }
                let context = rig.context();
                let device = context.connect("nic").unwrap();
                let ioasid = context.allocate(Request::guest(guests[0].view()).with_strategies(strategies)).unwrap();
                ioasid.attach(&device, None).unwrap();
                without_a_miss(&rig, DATA, |round| {
                    let (now, before) = (&guests[(round % 2) as usize], if round % 2 == 0 { 0x2000 } else { 0x1000 });
                    ioasid.switch(now.view()).unwrap();
                    let what = format!("{host:?} {strategies:?} round {round}");
                    assert_eq!(rig.dma("nic", before), None, "{what}: what only the other table has");
                    let here = 0x3000 - before;
                    assert_eq!(rig.dma("nic", here), Some(DATA + here), "{what}");
                });
                // Through everything that a requester can get, and back.
                ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 }).unwrap();
                assert_eq!(rig.dma("nic", DATA + 0x5000), Some(DATA + 0x5000));
                ioasid.switch(guests[0].view()).unwrap();
                assert_eq!((rig.dma("nic", DATA + 0x5000), rig.dma("nic", 0x1000)), (None, Some(DATA + 0x1000)));
                guests[0].unmap(0x1000);
                ioasid.invalidate(&[page(0x1000)]).unwrap();
                assert_eq!(rig.dma("nic", 0x1000), None, "the new page table is invalidated");
            }
            rig.assert_clean();
        }
    }
}

const ROOT_ONE: u64 = 0x10_0000;
const ROOT_TWO: u64 = 0x20_0000;

#[test]
fn pasids_have_address_spaces_of_their_own() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let guests = [ROOT_ONE, ROOT_TWO].map(|root| Guest::at(Arch::Arm, &rig.memory, root));
            guests.iter().zip(1..).for_each(|(guest, n)| guest.put(0x1000, DATA + (n << 12), true));
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let request = |guest: &Guest| Request::guest(guest.view());
            let pasid = Some(Pasid(5));
            let strict = context.allocate(request(&guests[0]).with_strategies(&[Strategy::Nested])).unwrap();
            let attached = strict.attach(&device, pasid);
            if host == Arch::Vtd {
                attached.unwrap();
                strict.detach(&device, pasid).unwrap();
            } else {
                assert!(
                    matches!(attached, Err(Error::Refused(refusal)) if refusal.reason.contains("PASIDs of the device belong to the owner of such a table"))
                );
            }
            let ioasids = guests.each_ref().map(|guest| context.allocate(request(guest)).unwrap());
            ioasids[0].attach(&device, pasid).unwrap();
            ioasids[1].attach(&device, Some(Pasid(6))).unwrap();
            let at = |pasid: u32| rig.dma_of("nic", Some(Pasid(pasid)), 0x1000);
            assert_eq!((at(5), at(6), at(7), rig.dma("nic", 0x1000)), (Some(DATA + 0x1000), Some(DATA + 0x2000), None, None), "{host:?}");
            guests[0].unmap(0x1000);
            ioasids[0].invalidate(&[page(0x1000)]).unwrap();
            assert_eq!((at(5), at(6)), (None, Some(DATA + 0x2000)), "{host:?}");
            device.detach(Some(Pasid(6))).unwrap();
            assert_eq!(at(6), None);
            for bad in [0, 1 << 20] {
                let Err(Error::Refused(refusal)) = ioasids[1].attach(&device, Some(Pasid(bad))) else { panic!("refused") };
                assert_eq!(refusal.property, Property::Pasid);
            }
        }
        rig.assert_clean();
    }
}

/// A device with PASIDs comes to a table that others have, or one of its PASIDs does: where PASIDs belong to such a table's owner, all of them have areas then.
#[test]
fn a_table_that_others_have_is_made_anew_for_who_has_pasids() {
    for host in Arch::ALL {
        for comes in [None, Some(Pasid(6))] {
            let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("disk", &[0])]);
            {
                let guests = [ROOT_ONE, ROOT_TWO].map(|root| Guest::at(Arch::Riscv, &rig.memory, root));
                guests.iter().zip(1..).for_each(|(guest, n)| guest.put(0x1000, DATA + (n << 12), true));
                let context = rig.context();
                let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
                let strategies = [Strategy::Nested, Strategy::Areas];
                let [shared, other] =
                    guests.each_ref().map(|guest| context.allocate(Request::guest(guest.view()).with_strategies(&strategies)).unwrap());
                shared.attach(&nic, None).unwrap();
                assert_eq!(shared.strategies(), [Strategy::Nested], "{host:?}");
                other.attach(&disk, Some(Pasid(5))).unwrap();
                let outlook = shared.explain_for(&disk, comes).unwrap();
                shared.attach(&disk, comes).unwrap();
                let expected = if host == Arch::Vtd { Strategy::Nested } else { Strategy::Areas };
                assert_eq!((shared.strategies(), outlook.chosen.unwrap().strategy), (vec![expected], expected), "{host:?} {comes:?}");
                let found = [rig.dma("nic", 0x1000), rig.dma_of("disk", comes, 0x1000), rig.dma_of("disk", Some(Pasid(5)), 0x1000)];
                assert_eq!(found, [Some(DATA + 0x1000), Some(DATA + 0x1000), Some(DATA + 0x2000)], "{host:?} {comes:?}");
                guests[0].unmap(0x1000);
                shared.invalidate(&[page(0x1000)]).unwrap();
                assert_eq!((rig.dma("nic", 0x1000), rig.dma_of("disk", comes, 0x1000)), (None, None), "{host:?} {comes:?}");
            }
            rig.assert_clean();
        }
    }
}

/// A device's own table and its PASIDs: where PASIDs belong to the owner of a nested table, the kernel can have them only while it keeps the device's own table too. So the
/// strategy is chosen again when the first comes and when the last one goes, and DMA does not notice.
#[test]
fn the_first_pasid_and_the_last_one_have_strategies_chosen_again_without_a_miss() {
    for host in Arch::ALL {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let guests = [ROOT_ONE, ROOT_TWO].map(|root| Guest::at(Arch::Riscv, &rig.memory, root));
            let guest = Guest::at(host, &rig.memory, 0x30_0000);
            guests.iter().for_each(|guest| guest.put(0x1000, DATA + 0x1000, true));
            guest.map(DATA, DATA, true);
            guest.map(0x2000, DATA + 0x2000, true);
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let own = context.allocate(Request::guest(guest.view())).unwrap();
            let others = guests.each_ref().map(|guest| context.allocate(Request::guest(guest.view())).unwrap());
            own.attach(&device, None).unwrap();
            let first = own.strategies();
            assert_eq!(first, [if host == Arch::Amd { Strategy::Nested } else { Strategy::Native }]);
            let nests_pasids = host == Arch::Vtd;
            without_a_miss(&rig, DATA, |round| {
                let what = format!("{host:?} round {round}");
                for (ioasid, pasid) in others.iter().zip([5, 6]) {
                    ioasid.attach(&device, Some(Pasid(pasid))).unwrap();
                    assert_eq!(rig.dma_of("nic", Some(Pasid(pasid)), 0x1000), Some(DATA + 0x1000), "{what}");
                }
                let with = own.explain().remove(0);
                assert_eq!(own.strategies(), if nests_pasids { first.clone() } else { vec![Strategy::Areas] }, "{what}: {with}");
                if !nests_pasids {
                    let text = with.to_string();
                    assert!(
                        text.contains("not converted, nested: PASID: PASIDs of the device belong to the owner of such a table on this unit"),
                        "{text}"
                    );
                    assert!(
                        text.contains("note: chosen because device nic uses PASIDs, which belong to such a table's owner on this unit: was "),
                        "{text}"
                    );
                }
                // It is followed as before.
                guest.unmap(0x2000);
                own.invalidate(&[page(0x2000)]).unwrap();
                assert_eq!(rig.dma("nic", 0x2000), None, "{what}");
                guest.map(0x2000, DATA + 0x2000, true);
                own.invalidate(&[EVERYTHING]).unwrap();
                assert_eq!(rig.dma("nic", 0x2000), Some(DATA + 0x2000), "{what}");
                device.detach(Some(Pasid(5))).unwrap();
                assert_eq!(own.strategies() == first, nests_pasids, "{what}: one PASID is left");
                device.detach(Some(Pasid(6))).unwrap();
                let without = own.explain().remove(0);
                assert_eq!(own.strategies(), first, "{what}: {without}");
                if !nests_pasids {
                    assert!(
                        without.notes.iter().any(|note| note.starts_with("chosen because device nic uses no PASIDs any more: was ")),
                        "{without}"
                    );
                }
                guest.unmap(0x2000);
                own.invalidate(&[page(0x2000)]).unwrap();
                assert_eq!(rig.dma("nic", 0x2000), None, "{what}");
                guest.map(0x2000, DATA + 0x2000, true);
                own.invalidate(&[EVERYTHING]).unwrap();
            });
        }
        rig.assert_clean();
    }
}

/// The guest maps a page where its device must not translate in the kernel's own tables. A table of user space's has it in vain; areas that the device is put on are to do
/// without it, and nothing else is missed.
#[test]
fn areas_do_without_what_a_device_reserves_that_comes_from_a_table() {
    const RESERVED: Span = Span { first: 0x0900_0000, last: 0x090f_ffff };
    for host in [Arch::Arm, Arch::Amd, Arch::Riscv] {
        let rig = Rig::new(&[UnitConfig { reserved: vec![RESERVED], ..unit(host) }], &[("nic", &[0])]);
        {
            let guest = Guest::at(Arch::Vtd, &rig.memory, ROOT_ONE);
            [DATA, RESERVED.first - 0x1000, RESERVED.first, RESERVED.last + 1].iter().for_each(|iova| guest.put(*iova, DATA, true));
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
            ioasid.attach(&device, None).unwrap();
            let found = |pasid: Option<u32>| {
                let at = |iova: u64| rig.dma_of("nic", pasid.map(Pasid), iova);
                [at(DATA), at(RESERVED.first - 0x1000), at(RESERVED.last + 1)]
            };
            let reserved = |pasid: Option<u32>| rig.dma_of("nic", pasid.map(Pasid), RESERVED.first);
            without_a_miss(&rig, DATA, |round| {
                ioasid.attach(&device, Some(Pasid(5))).unwrap();
                let what = format!("{host:?} round {round}");
                assert_eq!(ioasid.strategies(), [Strategy::Areas], "{what}");
                assert_eq!([found(None), found(Some(5))], [[Some(DATA); 3]; 2], "{what}");
                assert_eq!((reserved(None), reserved(Some(5))), (None, None), "{what}");
                ioasid.detach(&device, Some(Pasid(5))).unwrap();
                assert_eq!((ioasid.strategies(), found(None)), (vec![Strategy::Nested], [Some(DATA); 3]), "{what}");
            });
            // The same when both were detached because the kernel failed: they come back one by one.
            ioasid.attach(&device, Some(Pasid(5))).unwrap();
            guest.put(0x1000, DATA, true);
            ioasid.invalidate(&[EVERYTHING]).unwrap();
            guest.remove(0x1000);
            rig.sim.fail_from(1, Errno::ENOMEM);
            assert!(matches!(ioasid.invalidate(&[EVERYTHING]), Err(Error::Blocked(_))), "{host:?}");
            rig.sim.disarm();
            assert_eq!([found(None), found(Some(5))], [[None; 3]; 2], "{host:?}");
            ioasid.recover().unwrap();
            assert_eq!([found(None), found(Some(5))], [[Some(DATA); 3]; 2], "{host:?}");
            assert_eq!((reserved(None), reserved(Some(5)), rig.dma("nic", 0x1000)), (None, None, None), "{host:?}");
        }
        rig.assert_clean();
    }
}

#[test]
fn pasids_come_first_share_a_space_or_are_refused_with_the_reason() {
    for host in [Arch::Arm, Arch::Amd, Arch::Riscv] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let guests = [ROOT_ONE, ROOT_TWO].map(|root| Guest::at(Arch::Vtd, &rig.memory, root));
            guests.iter().for_each(|guest| guest.put(0x1000, DATA + 0x1000, true));
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasids = guests.each_ref().map(|guest| context.allocate(Request::guest(guest.view())).unwrap());
            // The PASID first: the device itself gets what goes with it. What is said before is what is done.
            let before = [ioasids[0].explain_for(&device, Some(Pasid(5))).unwrap(), ioasids[1].explain_for(&device, None).unwrap()];
            assert_eq!(before[1].chosen.as_ref().map(|chosen| chosen.strategy), Some(Strategy::Nested), "{host:?}");
            ioasids[0].attach(&device, Some(Pasid(5))).unwrap();
            assert_eq!(ioasids[0].explain(), before[..1], "{host:?}");
            let before = ioasids[1].explain_for(&device, None).unwrap();
            ioasids[1].attach(&device, None).unwrap();
            assert_eq!(ioasids[1].explain(), [before], "{host:?}");
            assert_eq!((ioasids[0].strategies(), ioasids[1].strategies()), (vec![Strategy::Areas], vec![Strategy::Areas]), "{host:?}");
            let at = |pasid: Option<u32>| rig.dma_of("nic", pasid.map(Pasid), 0x1000);
            assert_eq!((at(Some(5)), at(None)), (Some(DATA + 0x1000), Some(DATA + 0x1000)), "{host:?}");
            device.detach(Some(Pasid(5))).unwrap();
            assert_eq!((ioasids[1].strategies(), at(None), at(Some(5))), (vec![Strategy::Nested], Some(DATA + 0x1000), None), "{host:?}");
            // A PASID of the same address space.
            ioasids[1].attach(&device, Some(Pasid(7))).unwrap();
            assert_eq!(
                (ioasids[1].strategies(), at(Some(7)), at(None)),
                (vec![Strategy::Areas], Some(DATA + 0x1000), Some(DATA + 0x1000)),
                "{host:?}"
            );
            device.detach(Some(Pasid(7))).unwrap();
            assert_eq!((ioasids[1].strategies(), at(Some(7))), (vec![Strategy::Nested], None), "{host:?}");
            device.detach(None).unwrap();
            // What was made for a PASID that is gone is not what the device itself gets.
            ioasids[0].attach(&device, Some(Pasid(5))).unwrap();
            device.detach(Some(Pasid(5))).unwrap();
            assert_eq!(ioasids[0].strategies(), [Strategy::Areas], "{host:?}");
            assert_eq!(ioasids[0].explain_for(&device, None).unwrap().chosen.map(|chosen| chosen.strategy), Some(Strategy::Nested), "{host:?}");
            ioasids[0].attach(&device, None).unwrap();
            assert_eq!((ioasids[0].strategies(), at(None)), (vec![Strategy::Nested], Some(DATA + 0x1000)), "{host:?}");
            device.detach(None).unwrap();
            // Whoever wants nothing but a nested table keeps it, and the PASID is refused.
            let strict = context.allocate(Request::guest(guests[1].view()).with_strategies(&[Strategy::Nested])).unwrap();
            strict.attach(&device, None).unwrap();
            let Err(Error::Refused(refusal)) = ioasids[0].attach(&device, Some(Pasid(5))) else { panic!("{host:?}: refused") };
            assert_eq!(refusal.property, Property::Pasid);
            assert!(refusal.reason.contains("PASIDs of the device belong to the owner of such a table on this unit"), "{refusal}");
            assert_eq!((strict.strategies(), at(None), at(Some(5))), (vec![Strategy::Nested], Some(DATA + 0x1000), None), "{host:?}");
        }
        rig.assert_clean();
    }
}

/// The guest's structures lead to another format: what is better then is taken up, and what holds no more is given up, without a miss.
#[test]
fn another_format_of_the_guest_is_another_strategy() {
    for host in [Arch::Vtd, Arch::Arm, Arch::Riscv] {
        let foreign = if host == Arch::Vtd { Arch::Arm } else { Arch::Vtd };
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let own = Guest::at(host, &rig.memory, ROOT_ONE);
            let other = Guest::at(foreign, &rig.memory, ROOT_TWO);
            for guest in [&own, &other] {
                guest.map(DATA, DATA, true);
            }
            own.map(0x1000, DATA + 0x1000, true);
            let context = rig.context();
            let device = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(other.view())).unwrap();
            ioasid.attach(&device, None).unwrap();
            assert_eq!(ioasid.strategies(), [Strategy::Nested]);
            assert_eq!(ioasid.reconsider().unwrap(), stagecraft::sync::Report::default(), "nothing is better");
            without_a_miss(&rig, DATA, |round| {
                let what = format!("{host:?} round {round}");
                ioasid.switch(own.view()).unwrap();
                assert_eq!((ioasid.strategies(), rig.dma("nic", 0x1000)), (vec![Strategy::Native], Some(DATA + 0x1000)), "{what}");
                let note = "chosen because the guest's structures changed: was converted, nested before";
                assert!(ioasid.explain()[0].notes.iter().any(|known| known == note), "{what}: {:?}", ioasid.explain());
                let report = ioasid.switch(other.view()).unwrap();
                assert_eq!((ioasid.strategies(), rig.dma("nic", 0x1000)), (vec![Strategy::Nested], None), "{what}");
                assert_eq!(report.changes, 1, "{what}: it was read once");
            });
            // Whatever fails on the way, the device keeps what is right.
            for n in 1.. {
                ioasid.switch(other.view()).unwrap();
                rig.sim.fail_nth(n, stagecraft::kernel::Errno::ENOMEM);
                let switched = ioasid.switch(own.view());
                let is_over = rig.sim.disarm();
                switched.unwrap();
                let strategies = ioasid.strategies();
                assert_eq!((rig.dma("nic", DATA), rig.dma("nic", 0x1000)), (Some(DATA), Some(DATA + 0x1000)), "{host:?} call {n}: {strategies:?}");
                ioasid.reconsider().unwrap();
                assert_eq!((ioasid.strategies(), rig.dma("nic", 0x1000)), (vec![Strategy::Native], Some(DATA + 0x1000)), "{host:?} call {n}");
                if is_over {
                    assert!(n > 2, "no call failed");
                    break;
                }
            }
        }
        rig.assert_clean();
    }
}

#[test]
fn faults_are_answered_by_the_guests_tables() {
    // A unit that walks the guest's own table finds new pages by itself: host tables are what has to be told.
    for (guest, host) in [(Arch::Arm, Arch::Vtd), (Arch::Vtd, Arch::Vtd), (Arch::Riscv, Arch::Arm)] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        rig.sim.set_patience(5000);
        let guest = Guest::new(guest, &rig.memory);
        guest.map(0x5000, DATA, false);
        let context = rig.context();
        let nic = context.connect("nic").unwrap();
        let ioasid = context.allocate(Request::guest(guest.view()).with_page_requests().with_strategies(&[Strategy::Nested])).unwrap();
        ioasid.attach(&nic, None).unwrap();
        let device = rig.sim.device("nic").unwrap();
        let write = |iova: u64| {
            let device = device.clone();
            move || device.write(None, Iova(iova), &[7]).is_ok()
        };
        let served = |wanted: &dyn Fn(&Response) -> bool| loop {
            let served = ioasid.serve_faults().unwrap();
            if let Some((fault, response)) = served.first() {
                assert!(wanted(response), "{fault:?}: {response:?}");
                return;
            }
            std::thread::yield_now();
        };
        std::thread::scope(|scope| {
            // The guest maps the page, and says nothing.
            guest.map(0x1000, DATA + 0x3000, true);
            let dma = scope.spawn(write(0x1000));
            served(&|response| *response == Response::Mapped);
            assert!(dma.join().unwrap());
            // Nothing is there; and what is there may not be written.
            for iova in [0x2000, 0x5000] {
                let dma = scope.spawn(write(iova));
                served(&|response| matches!(response, Response::Refused(_)));
                assert!(!dma.join().unwrap());
            }
        });
        assert_eq!(rig.dma("nic", 0x1000), Some(DATA + 0x3000));
    }
    let rig = Rig::new(&[UnitConfig::vtd("one")], &[("nic", &[0])]);
    let ioasid = rig.context().allocate(Request::guest(Guest::new(Arch::Arm, &rig.memory).view())).unwrap();
    assert!(matches!(ioasid.serve_faults(), Err(Error::Refused(refusal)) if refusal.property == Property::PageRequests));
}

/// Commands for a guest's own table in any order, side by side or overlapping: nothing of what they mean is in caches any more.
#[test]
fn all_that_commands_mean_is_forgotten_of_a_guests_own_table() {
    let pages = |pages: &[u64]| pages.iter().map(|number| page(number << 12)).collect::<Vec<_>>();
    let batches = [
        pages(&[2, 1]),
        pages(&[3, 1, 2, 1]),
        vec![range(0x1000, 0x2fff, true), range(0x2000, 0x4fff, true)],
        vec![range(0x1000, 0x5fff, true), range(0x2000, 0x2fff, true)],
        [pages(&[6]), vec![range(0x1000, 0x3fff, true)], pages(&[4])].concat(),
    ];
    for host in [Arch::Vtd, Arch::Arm, Arch::Riscv] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0])]);
        {
            let guest = Guest::new(host, &rig.memory);
            let context = rig.context();
            let nic = context.connect("nic").unwrap();
            let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Native])).unwrap();
            ioasid.attach(&nic, None).unwrap();
            for batch in &batches {
                let iovas = || (1..8).map(|number| number << 12);
                iovas().for_each(|iova| guest.put(iova, DATA + iova, true));
                ioasid.invalidate(&[EVERYTHING]).unwrap();
                assert!(iovas().all(|iova| rig.dma("nic", iova) == Some(DATA + iova)), "{host:?}");
                iovas().for_each(|iova| guest.remove(iova));
                ioasid.invalidate(batch).unwrap();
                for iova in iovas() {
                    let means = batch.iter().any(|one| matches!(one.effect, Effect::Range { iova: span, .. } if span.contains(iova)));
                    assert_eq!(rig.dma("nic", iova), (!means).then_some(DATA + iova), "{host:?}: {iova:#x} after {batch:x?}");
                }
            }
        }
        rig.assert_clean();
    }
}
