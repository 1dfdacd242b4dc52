//! Devices that were detached because the kernel failed: nobody else gets where they were, and they come back to what is there then.

use std::sync::Arc;

use stagecraft::ioasid::{Context, Device, Error, GuestView, Ioasid, Property, Request, Setup, Strategy, Target};
use stagecraft::kernel::{Errno, Pasid};
use stagecraft::plugin::{Outcome, Requester};
use stagecraft::sync::{self, Unwatched};
use stagecraft::viommu::{AddressSpaces, ContextSpaces, HostError, Way};
use stagecraft::{Access, Gpa, Iova, Span};

use crate::guests::{Arch, Guest};
use crate::memory::{BYTES, HOTPLUGGED, memory};
use crate::rig::{DATA, Deaf, EVERYTHING, Rig, page, unit};

const READ: Access = Access { read: true, write: false };

/// Guest, host, strategy: all ways of being told what is gone.
const CASES: [(Arch, Arch, Strategy); 8] = [
    (Arch::Vtd, Arch::Vtd, Strategy::Native),
    (Arch::Arm, Arch::Arm, Strategy::Native),
    (Arch::Riscv, Arch::Riscv, Strategy::Native),
    (Arch::Arm, Arch::Vtd, Strategy::Nested),
    (Arch::Vtd, Arch::Arm, Strategy::Nested),
    (Arch::Arm, Arch::Riscv, Strategy::Nested),
    (Arch::Riscv, Arch::Amd, Strategy::Nested),
    (Arch::Arm, Arch::Vtd, Strategy::Areas),
];

/// A machine of which "nic" and "two" are behind one unit, with a kernel that can be deaf.
struct Machine {
    rig: Rig,
    deaf: Arc<Deaf>,
    context: Context,
    nic: Device,
    two: Device,
}

impl Machine {
    fn new(host: Arch) -> Self {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("two", &[0])]);
        let deaf = Deaf::before(rig.kernel());
        let context = Context::with(Setup { kernel: Arc::clone(&deaf) as _, ..rig.setup() }).unwrap();
        let (nic, two) = (context.connect("nic").unwrap(), context.connect("two").unwrap());
        Self { rig, deaf, context, nic, two }
    }

    /// What is gone cannot be told, neither by invalidations nor by unmapping areas.
    fn fails(&self, strategy: Strategy) {
        if strategy == Strategy::Areas { self.rig.sim.fail_from(1, Errno::ENOMEM) } else { self.deaf.takes(0) }
    }

    fn works(&self) {
        self.rig.sim.disarm();
        self.deaf.hears();
    }

    /// 0x1000 and 0x2000 lead to two pages for "nic"; then the first one is taken away, which nobody can be told.
    fn stale(&self, guest: &Guest, strategy: Strategy) -> Ioasid {
        guest.map(0x1000, DATA, true);
        guest.map(0x2000, DATA + 0x1000, true);
        let ioasid = self.context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
        ioasid.attach(&self.nic, None).unwrap();
        assert_eq!(self.both("nic"), (Some(DATA), Some(DATA + 0x1000)));
        guest.unmap(0x1000);
        self.fails(strategy);
        assert!(matches!(ioasid.invalidate(&[page(0x1000)]), Err(Error::Blocked(_))));
        assert_eq!((counts(&ioasid), self.nic.attached().len(), self.both("nic")), ((0, 1, 1), 0, (None, None)));
        ioasid
    }

    fn both(&self, label: &str) -> (Option<u64>, Option<u64>) {
        (self.rig.dma(label, 0x1000), self.rig.dma(label, 0x2000))
    }
}

/// Attached, blocked, stale.
fn counts(ioasid: &Ioasid) -> (usize, usize, usize) {
    let stats = ioasid.stats();
    (stats.attached, stats.blocked, stats.stale)
}

fn property(result: Result<(), Error>) -> Property {
    match result {
        Err(Error::Refused(refusal)) => refusal.property,
        other => panic!("{other:?}"),
    }
}

#[test]
fn nobody_is_attached_where_something_stale_may_be() {
    for (arch, host, strategy) in CASES {
        let what = format!("{arch:?} on {host:?}, {strategy}");
        let machine = Machine::new(host);
        let guest = Guest::new(arch, &machine.rig.memory);
        let ioasid = machine.stale(&guest, strategy);
        if strategy != Strategy::Areas {
            // One that was never here, and the one that was.
            for device in [&machine.two, &machine.nic] {
                assert!(matches!(ioasid.attach(device, None), Err(Error::Blocked(_))), "{what}");
                assert_eq!((device.attached().len(), machine.both(device.label())), (0, (None, None)), "{what}");
            }
            // Nor in the place of something else, which stays.
            machine.deaf.hears();
            let bypass = machine.context.allocate(Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 })).unwrap();
            bypass.attach(&machine.two, None).unwrap();
            machine.deaf.takes(0);
            assert!(matches!(ioasid.replace(&machine.two, None), Err(Error::Blocked(_))), "{what}");
            assert_eq!(machine.rig.dma("two", DATA), Some(DATA), "{what}");
            machine.two.detach(None).unwrap();
        }
        assert_eq!(counts(&ioasid), (0, 1, 1), "{what}");
        machine.works();
        ioasid.attach(&machine.two, None).unwrap();
        assert_eq!((machine.both("two"), counts(&ioasid)), ((None, Some(DATA + 0x1000)), (1, 1, 0)), "{what}");
        ioasid.attach(&machine.nic, None).unwrap();
        assert_eq!((machine.both("nic"), counts(&ioasid)), ((None, Some(DATA + 0x1000)), (2, 0, 0)), "{what}");
        ioasid.recover().unwrap();
        assert_eq!(counts(&ioasid), (2, 0, 0), "{what}");
        // One that is alone at the first attempt after the failure, and fails then.
        if strategy == Strategy::Areas {
            ioasid.detach(&machine.two, None).unwrap();
            ioasid.detach(&machine.nic, None).unwrap();
            let ioasid = machine.stale(&guest, strategy);
            machine.rig.sim.fail_from(1, Errno::ENOMEM);
            assert!(matches!(ioasid.attach(&machine.two, None), Err(Error::Blocked(_))));
            machine.rig.sim.disarm();
            ioasid.attach(&machine.two, None).unwrap();
            assert_eq!(machine.both("two"), (None, Some(DATA + 0x1000)));
        }
    }
}

/// A commit of areas that failed, and a device that is put on them without another one.
#[test]
fn areas_that_were_to_go_are_gone_for_whoever_comes() {
    for moves in [false, true] {
        let machine = Machine::new(Arch::Vtd);
        let guest = Guest::new(Arch::Arm, &machine.rig.memory);
        let ioasid = machine.stale(&guest, Strategy::Areas);
        machine.works();
        let managed = machine.context.allocate(Request::managed()).unwrap();
        managed.map(Span { first: 0x2000, last: 0x2fff }, Target::Guest(Gpa(DATA + 0x1000)), READ).unwrap();
        if moves {
            managed.attach(&machine.two, None).unwrap();
            ioasid.replace(&machine.two, None).unwrap();
        } else {
            ioasid.attach(&machine.two, None).unwrap();
        }
        assert_eq!(machine.both("two"), (None, Some(DATA + 0x1000)));
    }
}

#[test]
fn tables_that_were_switched_meanwhile_are_what_devices_come_back_to() {
    for (arch, host, strategy) in CASES {
        let what = format!("{arch:?} on {host:?}, {strategy}");
        let machine = Machine::new(host);
        let (old, new) = (Guest::at(arch, &machine.rig.memory, 0x10_0000), Guest::at(arch, &machine.rig.memory, 0x20_0000));
        new.map(0x1000, DATA + 0x5000, true);
        let ioasid = machine.stale(&old, strategy);
        machine.works();
        ioasid.switch(new.view()).unwrap();
        assert_eq!((ioasid.stats().blocked, machine.both("nic")), (1, (None, None)), "{what}: nobody asked for it");
        ioasid.recover().unwrap();
        assert_eq!((counts(&ioasid), machine.both("nic")), ((1, 0, 0), (Some(DATA + 0x5000), None)), "{what}");
        new.map(0x1000, DATA + 0x6000, true);
        ioasid.invalidate(&[EVERYTHING]).unwrap();
        assert_eq!(machine.rig.dma("nic", 0x1000), Some(DATA + 0x6000), "{what}");
    }
}

/// Whatever call fails while devices are attached again: each is attached or waits.
#[test]
fn no_device_is_lost_by_a_recovery_that_fails() {
    for (arch, host, strategy) in CASES {
        let machine = Machine::new(host);
        let guest = Guest::new(arch, &machine.rig.memory);
        for stays in [false, true] {
            for n in 1.. {
                let what = format!("{arch:?} on {host:?}, {strategy}, call {n}");
                guest.map(0x1000, DATA, true);
                guest.map(0x2000, DATA + 0x1000, true);
                let ioasid = machine.context.allocate(Request::guest(guest.view()).with_strategies(&[strategy])).unwrap();
                ioasid.attach(&machine.nic, None).unwrap();
                ioasid.attach(&machine.two, None).unwrap();
                assert_eq!((machine.both("nic").0, machine.both("two").0), (Some(DATA), Some(DATA)), "{what}");
                guest.unmap(0x1000);
                machine.fails(strategy);
                ioasid.invalidate(&[page(0x1000)]).unwrap_err();
                machine.works();
                if stays {
                    machine.rig.sim.fail_from(n, Errno::ENOMEM);
                } else {
                    machine.rig.sim.fail_nth(n, Errno::ENOMEM);
                }
                let recovered = ioasid.recover();
                let is_over = machine.rig.sim.disarm();
                let (attached, blocked, _) = counts(&ioasid);
                assert_eq!((attached + blocked, recovered.is_ok()), (2, attached == 2), "{what}: {recovered:?}");
                for device in [&machine.nic, &machine.two] {
                    let (gone, stays) = machine.both(device.label());
                    assert_eq!(gone, None, "{what}");
                    // Areas that could not be made again come with the next commit.
                    let is_late = strategy == Strategy::Areas && stays.is_none();
                    let is_there = !device.attached().is_empty() && !is_late;
                    assert_eq!(stays, is_there.then_some(DATA + 0x1000), "{what}");
                }
                ioasid.recover().unwrap();
                assert_eq!(counts(&ioasid), (2, 0, 0), "{what}");
                assert_eq!((machine.both("nic"), machine.both("two")), ((None, Some(DATA + 0x1000)), (None, Some(DATA + 0x1000))), "{what}");
                machine.nic.detach(None).unwrap();
                machine.two.detach(None).unwrap();
                if is_over {
                    assert!(n > 2, "{what}");
                    break;
                }
            }
        }
    }
}

#[test]
fn who_was_detached_or_is_elsewhere_does_not_come_back() {
    let machine = Machine::new(Arch::Vtd);
    let guest = Guest::new(Arch::Arm, &machine.rig.memory);
    let ioasid = machine.stale(&guest, Strategy::Nested);
    machine.works();
    let other = machine.context.allocate(Request::guest(guest.view())).unwrap();
    assert_eq!(property(other.detach(&machine.nic, None)), Property::Attachment, "it waits for another one");
    assert_eq!(machine.context.save().ioasids(), 2);
    for by_device in [false, true] {
        if by_device { machine.nic.detach(None) } else { ioasid.detach(&machine.nic, None) }.unwrap();
        assert_eq!(property(machine.nic.detach(None)), Property::Attachment);
        assert_eq!(property(ioasid.detach(&machine.nic, None)), Property::Attachment);
        assert_eq!(ioasid.stats().blocked, 0);
        ioasid.recover().unwrap();
        assert_eq!((machine.nic.attached(), machine.both("nic")), (Vec::new(), (None, None)));
        // And again.
        ioasid.attach(&machine.nic, None).unwrap();
        ioasid.synchronise().unwrap();
        machine.deaf.takes(0);
        guest.map(0x1000, DATA, true);
        guest.unmap(0x2000);
        ioasid.invalidate(&[EVERYTHING]).unwrap_err();
        machine.deaf.hears();
        guest.map(0x2000, DATA + 0x1000, true);
        assert_eq!(ioasid.stats().blocked, 1);
    }
    // Attached to something else, and detached from that.
    other.attach(&machine.nic, None).unwrap();
    assert_eq!(ioasid.stats().blocked, 0);
    ioasid.recover().unwrap();
    assert_eq!(machine.nic.attached(), [(None, other.id())]);
    machine.nic.detach(None).unwrap();
    ioasid.recover().unwrap();
    assert_eq!(machine.nic.attached(), []);
}

/// Two units, each with a device of the IOASID: whatever call fails, a switch is one for both, and who cannot go along or stay is blocked.
#[test]
fn a_switch_is_for_all_units_or_for_none() {
    let all = &Strategy::ALL[..];
    let hosts = [
        ([Arch::Arm, Arch::Arm], Arch::Arm, all),
        ([Arch::Vtd, Arch::Vtd], Arch::Vtd, all),
        ([Arch::Riscv, Arch::Riscv], Arch::Riscv, &[Strategy::Native]),
        // One follows, the other is made anew.
        ([Arch::Arm, Arch::Vtd], Arch::Arm, all),
        ([Arch::Vtd, Arch::Arm], Arch::Arm, all),
    ];
    for (hosts, arch, strategies) in hosts {
        let (mut failed, mut detached) = (0, 0);
        let rig = Rig::new(&hosts.map(unit), &[("nic", &[0]), ("second", &[0]), ("two", &[1])]);
        let guests = [0x10_0000, 0x20_0000].map(|root| Guest::at(arch, &rig.memory, root));
        guests.iter().zip([DATA, DATA + 0x5000]).for_each(|(guest, address)| guest.put(0x1000, address, true));
        {
            let context = rig.context();
            let labels = ["nic", "second", "two"];
            let devices = labels.map(|label| context.connect(label).unwrap());
            let ioasid = context.allocate(Request::guest(guests[0].view()).with_strategies(strategies).with_second_table()).unwrap();
            devices.iter().for_each(|device| drop(ioasid.attach(device, None).unwrap()));
            for stays in [false, true] {
                for n in 1.. {
                    let what = format!("{arch:?} on {hosts:?}, call {n}, stays {stays}");
                    assert_eq!(labels.map(|label| rig.dma(label, 0x1000)), [Some(DATA); 3], "{what}");
                    if stays {
                        rig.sim.fail_from(n, Errno::ENOMEM);
                    } else {
                        rig.sim.fail_nth(n, Errno::ENOMEM);
                    }
                    let switched = ioasid.switch(guests[1].view());
                    let is_over = rig.sim.disarm();
                    let there = ioasid.translate(Iova(0x1000), READ).unwrap().unwrap().address.0;
                    for device in &devices {
                        let wanted = (!device.attached().is_empty()).then_some(there);
                        assert_eq!(rig.dma(device.label(), 0x1000), wanted, "{what}: {switched:?}");
                    }
                    let blocked = devices.iter().filter(|device| device.attached().is_empty()).count();
                    assert_eq!((ioasid.stats().attached, ioasid.stats().blocked), (3 - blocked, blocked), "{what}");
                    match &switched {
                        Ok(_) => assert_eq!((there, blocked), (DATA + 0x5000, 0), "{what}"),
                        Err(Error::Detached(_)) => {
                            detached += 1;
                            assert!(blocked > 0, "{what}");
                        }
                        Err(Error::Blocked(_)) => assert_eq!(there, DATA + 0x5000, "{what}"),
                        Err(_) => {
                            failed += 1;
                            assert_eq!((there, blocked), (DATA, 0), "{what}: {switched:?}");
                        }
                    }
                    ioasid.recover().unwrap();
                    assert_eq!((labels.map(|label| rig.dma(label, 0x1000)), counts(&ioasid)), ([Some(there); 3], (3, 0, 0)), "{what}");
                    ioasid.switch(guests[0].view()).unwrap();
                    if is_over {
                        assert!(switched.is_ok(), "{what}: {switched:?}");
                        break;
                    }
                }
            }
        }
        rig.assert_clean();
        assert!(failed > 4, "{arch:?} on {hosts:?}: {failed}");
        assert!(detached > 0 || hosts[0] != hosts[1], "{arch:?} on {hosts:?}");
    }
}

/// What was chosen again for another reason follows later switches all the same.
#[test]
fn a_part_that_was_chosen_again_follows_the_next_switch() {
    for host in [Arch::Arm, Arch::Riscv] {
        let machine = Machine::new(host);
        let guests = [0x10_0000, 0x20_0000].map(|root| Guest::at(host, &machine.rig.memory, root));
        guests.iter().zip([DATA, DATA + 0x5000]).for_each(|(guest, address)| guest.put(0x1000, address, true));
        let [own, other] = [0, 0].map(|_| machine.context.allocate(Request::guest(guests[0].view())).unwrap());
        own.attach(&machine.nic, None).unwrap();
        other.attach(&machine.nic, Some(Pasid(3))).unwrap();
        assert_eq!((own.strategies(), machine.rig.dma("nic", 0x1000)), (vec![Strategy::Areas], Some(DATA)));
        own.switch(guests[1].view()).unwrap();
        assert_eq!(machine.rig.dma("nic", 0x1000), Some(DATA + 0x5000), "{host:?}");
    }
}

/// A vIOMMU's space that nobody uses at the moment, and whose caches could not be told what went: it counts as out of step, and nobody gets there.
#[test]
fn a_space_that_nobody_uses_is_stale_too() {
    for (arch, host, strategy) in [(Arch::Arm, Arch::Vtd, Strategy::Nested), (Arch::Vtd, Arch::Arm, Strategy::Nested)] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("two", &[0])]);
        let more = Arc::new(vm_memory::MmapRegion::new(BYTES as usize).unwrap());
        rig.sim.register_region(Arc::clone(&more)).unwrap();
        let guest = Guest::new(arch, &rig.memory);
        guest.map(0x1000, DATA, true);
        guest.map(0x2000, HOTPLUGGED + 0x3000, true);
        let deaf = Deaf::before(rig.kernel());
        let whole = memory(&rig, Some(&more));
        let context = Context::with(Setup { kernel: Arc::clone(&deaf) as _, memory: whole, ..rig.setup() }).unwrap();
        let template = Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }).with_strategies(&[strategy]);
        let mut spaces = ContextSpaces::new(context, template);
        spaces.connect(1, "nic").unwrap();
        spaces.connect(2, "two").unwrap();
        let way = Way::Tables { tables: vec![arch.config(guest.root())], intercepts: Vec::new() };
        let (id, _) = spaces.allocate(&way, sync::Way::blocked(), Box::new(Unwatched)).unwrap();
        let [one, two] = [1, 2].map(|id| Requester { id, pasid: None });
        spaces.attach(one, id).unwrap();
        assert_eq!(rig.dma("nic", 0x1000), Some(DATA));
        spaces.detach(one).unwrap();
        deaf.takes(0);
        let told = spaces.memory_changed(memory(&rig, None)).unwrap();
        assert!(matches!(&told[..], [(space, Err(HostError::Stale(_)))] if *space == id), "{told:?}");
        assert!(matches!(spaces.attach(two, id), Err(HostError::Stale(_))));
        assert_eq!(rig.dma("two", 0x1000), None);
        deaf.hears();
        spaces.attach(two, id).unwrap();
        assert_eq!(rig.dma("two", 0x1000), Some(DATA), "{arch:?}");
    }
}

/// Who was detached by a failure and then by the vIOMMU does not come back by a recovery of the VMM's.
#[test]
fn whom_a_viommu_detached_does_not_come_back() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    guest.map(0x1000, DATA, true);
    let deaf = Deaf::before(rig.kernel());
    let context = Context::with(Setup { kernel: Arc::clone(&deaf) as _, ..rig.setup() }).unwrap();
    let mut spaces = ContextSpaces::new(context, Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }));
    spaces.connect(1, "nic").unwrap();
    let way = Way::Tables { tables: vec![guest.arch.config(guest.root())], intercepts: Vec::new() };
    let (id, _) = spaces.allocate(&way, sync::Way::blocked(), Box::new(Unwatched)).unwrap();
    let one = Requester { id: 1, pasid: None };
    spaces.attach(one, id).unwrap();
    guest.unmap(0x1000);
    deaf.takes(0);
    assert!(matches!(spaces.invalidate(id, &[EVERYTHING]), Err(HostError::Stale(_))));
    deaf.hears();
    let ioasid = spaces.ioasid(id).unwrap().clone();
    assert_eq!(ioasid.stats().blocked, 1);
    spaces.detach(one).unwrap();
    ioasid.recover().unwrap();
    assert_eq!(counts(&ioasid), (0, 0, 0));
}

/// Whatever call fails while a device's own table is made anew, so that a PASID has room beside it: it is reached as before, or the device waits.
#[test]
fn making_room_for_a_pasid_loses_nobody() {
    for host in [Arch::Arm, Arch::Riscv] {
        let machine = Machine::new(host);
        let guest = Guest::new(host, &machine.rig.memory);
        guest.map(0x1000, DATA, true);
        let (pasid, mut detached) = (Some(Pasid(3)), 0);
        for stays in [false, true] {
            for n in 1.. {
                let what = format!("{host:?}, call {n}, stays {stays}");
                let [own, other] = [0, 0].map(|_| machine.context.allocate(Request::guest(guest.view())).unwrap());
                own.attach(&machine.nic, None).unwrap();
                own.attach(&machine.two, None).unwrap();
                if stays {
                    machine.rig.sim.fail_from(n, Errno::ENOMEM);
                } else {
                    machine.rig.sim.fail_nth(n, Errno::ENOMEM);
                }
                let attached = other.attach(&machine.nic, pasid);
                let is_over = machine.rig.sim.disarm();
                let is_lost = matches!(attached, Err(Error::Detached(_)));
                detached += u32::from(is_lost);
                assert_eq!((own.stats().blocked, machine.rig.dma("nic", 0x1000)), (usize::from(is_lost), (!is_lost).then_some(DATA)), "{what}");
                assert_eq!(machine.rig.dma_of("nic", pasid, 0x1000), attached.is_ok().then_some(DATA), "{what}");
                assert_eq!(machine.rig.dma("two", 0x1000), Some(DATA), "{what}");
                own.recover().unwrap();
                assert_eq!((counts(&own), machine.rig.dma("nic", 0x1000)), ((2, 0, 0), Some(DATA)), "{what}");
                if attached.is_ok() {
                    machine.nic.detach(pasid).unwrap();
                }
                machine.nic.detach(None).unwrap();
                machine.two.detach(None).unwrap();
                if is_over {
                    attached.unwrap();
                    break;
                }
            }
        }
        assert!(detached > 0, "{host:?}");
    }
}
