//! Whether an IOASID serves a device is answered as attaching it answers, and what is said of it is what is done.

use stagecraft::ioasid::{Context, Device, Error, Explanation, GuestView, Ioasid, Property, Request, Strategies, Strategy, Target};
use stagecraft::kernel::Pasid;
use stagecraft::kernel::sim::{DeviceConfig, SimBuilder, UnitConfig};
use stagecraft::plugin::{BlockKind, Blocked, Outcome};
use stagecraft::{Access, Gpa, Span};
use stagecraft_tests::reference::generate::Rng;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, MEMORY, Rig, unit};

const BOTH: Access = Access { read: true, write: true };
const LABELS: [&str; 4] = ["nic", "disk", "second", "far"];

/// Two units with this and that left out, and devices behind them that can do this and that.
fn machine(rng: &mut Rng) -> Rig {
    let mut builder = SimBuilder::new();
    let mut some_unit = || {
        let unit = unit(rng.pick(&Arch::ALL));
        let unit = if rng.percent(30) { unit.without_nesting() } else { unit };
        let pasid_log2 = if rng.percent(80) { 20 } else { 0 };
        builder.unit(UnitConfig { dirty_tracking: rng.percent(80), pasid_log2, ..unit })
    };
    let units = [some_unit(), some_unit()];
    for (requester, label) in (1..).zip(LABELS) {
        let mut device = DeviceConfig::new(label, requester);
        (device.pasids, device.page_requests) = (rng.percent(80), rng.percent(70));
        if rng.percent(30) {
            device.reserved.push(Span { first: DATA, last: DATA | 0xfff });
        }
        let path = if label == "far" && rng.percent(50) { &units[..] } else { &units[usize::from(rng.percent(50))..][..1] };
        builder.device(device, path);
    }
    let sim = builder.build().unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
    sim.register_memory(&memory).unwrap();
    Rig { sim, memory }
}

fn request(rng: &mut Rng, rig: &Rig) -> Request {
    let guest = Guest::new(rng.pick(&Arch::ALL), &rig.memory);
    guest.map(DATA, DATA, true);
    let mut request = match rng.below(8) {
        0 => Request::managed(),
        1 => Request::requests(),
        2 => Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }),
        3 => {
            let (event, section, reason) = (String::new(), String::new(), String::new());
            Request::guest(GuestView { outcome: Outcome::Blocked(Blocked { kind: BlockKind::Unused, event, section, reason }), id: 0 })
        }
        _ => Request::guest(guest.view()),
    };
    if rng.percent(50) {
        let some: Vec<Strategy> = Strategy::ALL.into_iter().filter(|_| rng.percent(60)).collect();
        request.strategies = Strategies::of(&some);
    }
    request.second_table = rng.percent(30);
    request.page_requests = rng.percent(20);
    request.dirty_tracking = rng.percent(20);
    request
}

/// Devices that use PASIDs elsewhere.
fn busy_with_pasids(rng: &mut Rng, context: &Context, devices: &[Device]) -> Ioasid {
    let elsewhere = context.allocate(Request::managed()).unwrap();
    for device in devices.iter().filter(|device| device.capabilities().pasid_log2 > 0) {
        if rng.percent(40) {
            elsewhere.attach(device, Some(Pasid(7))).unwrap();
        }
    }
    elsewhere
}

#[test]
fn what_is_answered_is_what_attaching_says() {
    let (mut yes, mut pasids, mut no_room, mut no) = (0, 0, 0, Vec::new());
    for seed in 0..400 {
        let mut rng = Rng::new(seed);
        let rig = machine(&mut rng);
        {
            let context = rig.context();
            let devices: Vec<Device> = LABELS.iter().map(|label| context.connect(label).unwrap()).collect();
            let _elsewhere = busy_with_pasids(&mut rng, &context, &devices);
            let request = request(&mut rng, &rig);
            let ioasid = context.allocate(request.clone()).unwrap();
            if request == Request::managed() {
                ioasid.map(Span { first: DATA, last: DATA | 0xfff }, Target::Guest(Gpa(DATA)), BOTH).unwrap();
            }
            for _ in 0..8 {
                let device = &devices[rng.below(4) as usize];
                let pasid = rng.percent(25).then_some(Pasid(3));
                if device.attached().contains(&(pasid, ioasid.id())) {
                    device.detach(pasid).unwrap();
                    continue;
                }
                let (said, explained) = (ioasid.serves(device, pasid), ioasid.explain_for(device, pasid).unwrap());
                let done = ioasid.attach(device, pasid);
                let which = format!("seed {seed}: {}, {pasid:?}, to {request:?}: {said:?}, {done:?}\n{explained}", device.label());
                assert_eq!(explained.chosen.is_some(), said.is_ok(), "{which}");
                match (&said, &done) {
                    (Ok(()), Ok(_)) => {
                        let now = ioasid.explain();
                        // What was made anew says why; to make room for PASIDs it may have become another one.
                        let is_anew = |known: &Explanation| known.chosen == explained.chosen && known.to_string().contains("uses PASIDs");
                        let has_pasids =
                            devices.iter().any(|device| device.attached().iter().any(|(pasid, id)| pasid.is_some() && *id == ioasid.id()));
                        assert!(has_pasids || now.contains(&explained) || now.iter().any(is_anew), "{which}\n{now:?}");
                        yes += 1;
                        pasids += u32::from(pasid.is_some());
                    }
                    // There was no room for it.
                    (Ok(()), Err(Error::Refused(done))) if pasid.is_some() && done.property == Property::Pasid => no_room += 1,
                    (Err(said), Err(Error::Refused(done))) => {
                        assert_eq!(said.property, done.property, "{which}");
                        no.push(said.property);
                    }
                    _ => panic!("{which}"),
                }
            }
        }
        rig.assert_clean();
    }
    let seen = |property| no.contains(&property);
    assert!(
        yes > 500 && pasids > 50 && no_room < 5 && seen(Property::Strategy) && seen(Property::Unit) && seen(Property::Pasid),
        "{yes} {pasids} {no_room} {no:?}"
    );
    assert!(seen(Property::PageRequests) && seen(Property::DirtyTracking) && seen(Property::Iova), "{no:?}");
}

/// A device that uses PASIDs, and a unit on which PASIDs belong to whoever owns the table.
#[test]
fn company_is_asked_about() {
    for host in [Arch::Arm, Arch::Riscv] {
        let rig = Rig::new(&[unit(host)], &[("nic", &[0]), ("disk", &[0])]);
        let guest = Guest::new(host, &rig.memory);
        let context = rig.context();
        let [nic, disk] = ["nic", "disk"].map(|label| context.connect(label).unwrap());
        let elsewhere = context.allocate(Request::managed()).unwrap();
        elsewhere.attach(&nic, Some(Pasid(1))).unwrap();
        let native = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Native])).unwrap();
        let refused = native.serves(&nic, None).unwrap_err();
        assert!(refused.reason.contains("PASIDs of the device belong to the owner"), "{refused}");
        assert_eq!(native.explain_for(&nic, None).unwrap().chosen, None);
        // The same where there is a part of the unit already.
        native.serves(&disk, None).unwrap();
        native.attach(&disk, None).unwrap();
        assert_eq!(native.serves(&nic, None).unwrap_err().property, Property::Pasid);
        assert!(matches!(native.attach(&nic, None), Err(Error::Refused(refusal)) if refusal.property == Property::Pasid));
        nic.detach(Some(Pasid(1))).unwrap();
        native.serves(&nic, None).unwrap();
        native.attach(&nic, None).unwrap();
    }
}

#[test]
fn devices_say_whether_they_ask_for_pages() {
    for host in Arch::ALL {
        let mut builder = SimBuilder::new();
        let unit = builder.unit(unit(host));
        for (requester, label, page_requests) in [(1, "asks", true), (2, "does not", false), (3, "is busy", false)] {
            builder.device(DeviceConfig { page_requests, ..DeviceConfig::new(label, requester) }, &[unit]);
        }
        let sim = builder.build().unwrap();
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        sim.register_memory(&memory).unwrap();
        let rig = Rig { sim, memory };
        let context = rig.context();
        let [asks, does_not, is_busy] = ["asks", "does not", "is busy"].map(|label| context.connect(label).unwrap());
        let ioasid = context.allocate(Request::managed()).unwrap();
        ioasid.attach(&is_busy, None).unwrap();
        for _ in 0..2 {
            assert_eq!([&asks, &does_not, &is_busy].map(|device| device.asks_for_pages().unwrap()), [true, false, true], "{host:?}");
        }
        // Nobody stays where the attempt was made, and the kernel is not asked again.
        assert_eq!((asks.attached().len(), does_not.attached().len(), is_busy.attached().len()), (0, 0, 1), "{host:?}");
        let calls = rig.sim.calls_total();
        assert!(asks.asks_for_pages().unwrap() && !does_not.asks_for_pages().unwrap());
        assert_eq!(rig.sim.calls_total(), calls, "{host:?}");
        // One that is free says so.
        is_busy.detach(None).unwrap();
        assert!(!is_busy.asks_for_pages().unwrap(), "{host:?}");
        drop((ioasid, asks, does_not, is_busy, context));
        assert_eq!((rig.sim.objects(), rig.sim.pinned_pages()), (0, 0), "{host:?}");
    }
}
