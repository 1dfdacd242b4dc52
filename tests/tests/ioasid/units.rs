//! Devices behind several units, and strategies that are chosen again: each unit gets what it would get if its devices came now, or what all share stays.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::ioasid::{Context, Device, Error, GuestView, Ioasid, Property, Request, Strategy};
use stagecraft::kernel::sim::{DeviceConfig, SimBuilder, UnitConfig};
use stagecraft::kernel::{Errno, Pasid};
use stagecraft::plugin::Outcome;
use stagecraft::{Access, Change, Iova, Span};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, EVERYTHING, MEMORY, Rig, Stop, page, unit};

const READ: Access = Access { read: true, write: false };
const LABELS: [&str; 3] = ["nic", "second", "disk"];

/// Three guests of these architectures with a page that is the same in all, and one that is another in each.
fn guests(rig: &Rig, archs: [Arch; 3]) -> [Guest; 3] {
    [0, 1, 2].map(|index| {
        let guest = Guest::at(archs[index], &rig.memory, 0x10_0000 * (index as u64 + 1));
        guest.map(DATA, DATA, true);
        guest.map(0x1000, own(index), true);
        guest.map(0x2000, DATA + 0x2000, true);
        guest
    })
}

/// Where 0x1000 leads in each of the guests.
const fn own(index: usize) -> u64 {
    DATA + 0x1_0000 + ((index as u64) << 12)
}

/// "nic" and "second" behind one unit, "disk" behind another.
fn rig(units: [UnitConfig; 2]) -> Rig {
    Rig::new(&units, &[("nic", &[0]), ("second", &[0]), ("disk", &[1])])
}

fn attached(context: &Context, request: Request) -> (Ioasid, [Device; 3]) {
    attached_after(context, request, None)
}

/// The same after a PASID of "nic".
fn attached_after(context: &Context, request: Request, first: Option<Pasid>) -> (Ioasid, [Device; 3]) {
    let devices = LABELS.map(|label| context.connect(label).unwrap());
    let ioasid = context.allocate(request).unwrap();
    first.iter().for_each(|pasid| drop(ioasid.attach(&devices[0], Some(*pasid)).unwrap()));
    devices.iter().for_each(|device| drop(ioasid.attach(device, None).unwrap()));
    (ioasid, devices)
}

/// While `act` runs, again and again, DMA of all devices to the page that all guests have never fails.
fn without_a_miss(rig: &Rig, mut act: impl FnMut(u64)) {
    let (stop, done) = (AtomicBool::new(false), [0, 1, 2].map(|_| AtomicU64::new(0)));
    std::thread::scope(|scope| {
        let threads: Vec<_> = LABELS
            .iter()
            .zip(&done)
            .map(|(label, done)| {
                let (device, stop) = (rig.sim.device(label).unwrap(), &stop);
                scope.spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        device.write(None, Iova(DATA), &[1, 2, 3]).unwrap();
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        let end = Stop(&stop);
        let mut round = 0;
        let is_enough = |round| round >= 12 && done.iter().all(|done| done.load(Ordering::Relaxed) >= 100);
        while !is_enough(round) && !threads.iter().any(std::thread::ScopedJoinHandle::is_finished) {
            act(round);
            round += 1;
        }
        drop(end);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// All devices get where the guest's tables say, and what is taken away is gone for all of them.
fn follows(rig: &Rig, ioasid: &Ioasid, guest: &Guest, index: usize, what: &str) {
    let all = |iova: u64| LABELS.map(|label| rig.dma(label, iova));
    assert_eq!((all(DATA), all(0x1000), all(0x2000)), ([Some(DATA); 3], [Some(own(index)); 3], [Some(DATA + 0x2000); 3]), "{what}");
    guest.unmap(0x2000);
    ioasid.invalidate(&[page(0x2000)]).unwrap();
    assert_eq!(all(0x2000), [None; 3], "{what}");
    guest.map(0x2000, DATA + 0x2000, true);
    ioasid.invalidate(&[EVERYTHING]).unwrap();
    assert_eq!(all(0x2000), [Some(DATA + 0x2000); 3], "{what}");
}

fn said(ioasid: &Ioasid) -> String {
    ioasid.explain().iter().map(|explanation| format!("{explanation}\n")).collect()
}

/// Areas that all units share because the first of them has nothing better.
#[test]
fn areas_are_left_by_the_unit_that_has_something_better() {
    for (better, arch, strategy) in [(Arch::Arm, Arch::Arm, Strategy::Native), (Arch::Vtd, Arch::Arm, Strategy::Nested)] {
        // Whether the devices of the unit that has something better came first.
        for turned in [false, true] {
            let units = [unit(Arch::Vtd).without_nesting(), unit(better)];
            let (first, second) = if turned { (&units[1], &units[0]) } else { (&units[0], &units[1]) };
            let rig = rig([first.clone(), second.clone()]);
            {
                let guests = guests(&rig, [arch, Arch::Riscv, Arch::Riscv]);
                let context = rig.context();
                let devices = LABELS.map(|label| context.connect(label).unwrap());
                let ioasid = context.allocate(Request::guest(guests[0].view()).with_second_table()).unwrap();
                // The unit with nothing better comes first, so that all are on its areas.
                let order = if turned { [2, 0, 1] } else { [0, 1, 2] };
                order.iter().for_each(|index| drop(ioasid.attach(&devices[*index], None).unwrap()));
                assert_eq!(ioasid.strategies(), [Strategy::Areas]);
                let mut report = None;
                without_a_miss(&rig, |round| {
                    let again = ioasid.reconsider().unwrap();
                    let what = format!("{better:?} round {round}: {}", said(&ioasid));
                    assert_eq!(ioasid.strategies(), [Strategy::Areas, strategy], "{what}");
                    assert_eq!(ioasid.stats().attached, 3, "{what}");
                    let before = report.get_or_insert(again.clone());
                    assert!(round == 0 || again == stagecraft::sync::Report::default(), "{what}: {again:?} after {before:?}");
                    follows(&rig, &ioasid, &guests[0], 0, &what);
                });
                let (stays, goes) = if turned { ("disk", "nic") } else { ("nic", "disk") };
                let text = said(&ioasid);
                assert!(text.contains(&format!("device {stays}: mapped by the kernel")), "{text}");
                assert!(text.contains(&format!("device {goes}: {strategy}")), "{text}");
                assert!(text.contains("note: chosen because somebody asked: was mapped by the kernel before"), "{text}");
                // Whoever comes next behind either unit shares what there is.
                devices.iter().for_each(|device| device.detach(None).unwrap());
                for device in &devices {
                    ioasid.attach(device, None).unwrap();
                }
                assert_eq!(ioasid.strategies().len(), 2, "{}", said(&ioasid));
                follows(&rig, &ioasid, &guests[0], 0, "attached again");
            }
            rig.assert_clean();
        }
    }
}

/// The same where one table is all that was asked for: the areas stay for all, and why is told.
#[test]
fn areas_stay_for_all_where_one_table_is_allowed() {
    for turned in [false, true] {
        let units = [unit(Arch::Vtd).without_nesting(), unit(Arch::Arm)];
        let rig = rig(if turned { [units[1].clone(), units[0].clone()] } else { units });
        {
            let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
            let context = rig.context();
            let devices = LABELS.map(|label| context.connect(label).unwrap());
            let ioasid = context.allocate(Request::guest(guests[0].view()).with_strategies(&[Strategy::Native, Strategy::Areas])).unwrap();
            let order = if turned { [2, 0, 1] } else { [0, 1, 2] };
            order.iter().for_each(|index| drop(ioasid.attach(&devices[*index], None).unwrap()));
            without_a_miss(&rig, |round| {
                ioasid.switch(guests[1].view()).unwrap();
                assert_eq!(ioasid.reconsider().unwrap(), stagecraft::sync::Report::default());
                let what = format!("round {round}: {}", said(&ioasid));
                assert_eq!(ioasid.strategies(), [Strategy::Areas], "{what}");
                let (stays, goes) = if turned { ("disk", "nic") } else { ("nic", "disk") };
                let expected = format!(
                    "device {stays}: mapped by the kernel: the kernel's own tables\n  not bound as it is: unit 1 of the path takes no tables of its users; for device \
                     {goes}: device {stays} is behind another unit, and the request does not allow a table for each of them\n"
                );
                assert!(what.contains(&expected), "{what}");
                follows(&rig, &ioasid, &guests[1], 1, &what);
                // What is said is what holds now.
                ioasid.switch(guests[2].view()).unwrap();
                let text = said(&ioasid);
                assert!(!text.contains("for each of them"), "{text}");
                follows(&rig, &ioasid, &guests[2], 2, &text);
            });
            // Alone it can have better.
            let alone = if turned { &devices[..2] } else { &devices[2..] };
            let others = if turned { &devices[2..] } else { &devices[..2] };
            ioasid.switch(guests[1].view()).unwrap();
            others.iter().for_each(|device| device.detach(None).unwrap());
            ioasid.reconsider().unwrap();
            assert_eq!(ioasid.strategies(), [Strategy::Native], "{}", said(&ioasid));
            alone.iter().for_each(|device| assert_eq!(rig.dma(device.label(), 0x1000), Some(own(1))));
            assert!(matches!(ioasid.attach(&others[0], None), Err(Error::Refused(refusal)) if refusal.property == Property::Unit));
        }
        rig.assert_clean();
    }
}

/// The guest's format changes while devices are behind units of two architectures: whose format it is walks it, the others have areas, and areas are shared.
#[test]
fn another_format_of_the_guest_is_another_strategy_for_each_unit() {
    let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
    {
        let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
        let context = rig.context();
        let request = Request::guest(guests[0].view()).with_strategies(&[Strategy::Native, Strategy::Areas]).with_second_table();
        let (ioasid, devices) = attached(&context, request);
        // The unit that the areas were made for leaves them: whoever comes behind it gets what it has now, and not what it left.
        ioasid.switch(guests[1].view()).unwrap();
        for (device, wanted) in devices.iter().zip([Strategy::Native, Strategy::Native, Strategy::Areas]) {
            device.detach(None).unwrap();
            let explanation = ioasid.explain_for(device, None).unwrap();
            assert_eq!(explanation.chosen.as_ref().map(|chosen| chosen.strategy), Some(wanted), "{explanation}");
            ioasid.attach(device, None).unwrap();
            assert_eq!((rig.dma(device.label(), 0x1000), ioasid.strategies().len()), (Some(own(1)), 2), "{}", said(&ioasid));
        }
        let strategies = [vec![Strategy::Areas], vec![Strategy::Native, Strategy::Areas], vec![Strategy::Native, Strategy::Areas]];
        without_a_miss(&rig, |round| {
            // Every order of two of them, in time.
            let index = [1, 2, 0, 2, 1, 0][(round % 6) as usize];
            ioasid.switch(guests[index].view()).unwrap();
            let what = format!("round {round}, guest {index}: {}", said(&ioasid));
            let mut found = ioasid.strategies();
            found.sort_unstable();
            assert_eq!((found, ioasid.stats().attached), (strategies[index].clone(), 3), "{what}");
            let native = ioasid.explain().into_iter().find(|explanation| explanation.chosen.as_ref().unwrap().strategy == Strategy::Native);
            let owner = native.map(|explanation| explanation.device);
            assert_eq!(owner.as_deref(), [None, Some("nic"), Some("disk")][index], "{what}");
            follows(&rig, &ioasid, &guests[index], index, &what);
        });
        // Bypass is the kernel's own for both.
        ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 }).unwrap();
        assert_eq!((ioasid.strategies(), LABELS.map(|label| rig.dma(label, DATA + 0x7000))), (vec![Strategy::Native; 2], [Some(DATA + 0x7000); 3]));
    }
    rig.assert_clean();
}

/// From the kernel's own tables, of which each unit has one, to a guest's table, of which there may be one.
#[test]
fn units_that_had_tables_of_the_kernels_share_areas_if_one_table_is_allowed() {
    let bypass = || GuestView { outcome: Outcome::Bypass, id: 0 };
    let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
    {
        let guests = guests(&rig, [Arch::Arm, Arch::Riscv, Arch::Vtd]);
        let context = rig.context();
        let (ioasid, devices) = attached(&context, Request::guest(bypass()));
        assert_eq!(ioasid.strategies(), [Strategy::Native; 2]);
        without_a_miss(&rig, |round| {
            for (index, guest) in guests.iter().enumerate() {
                ioasid.switch(guest.view()).unwrap();
                let what = format!("round {round}: {}", said(&ioasid));
                assert_eq!((ioasid.strategies(), ioasid.stats().attached), (vec![Strategy::Areas], 3), "{what}");
                assert!(what.contains("is behind another unit, and the request does not allow a table for each of them"), "{what}");
                assert!(what.contains("note: device disk, behind another unit, came because the guest's structures changed: was bound"), "{what}");
                follows(&rig, &ioasid, guest, index, &what);
            }
            ioasid.switch(bypass()).unwrap();
            assert_eq!(
                (ioasid.strategies(), LABELS.map(|label| rig.dma(label, 0x1000))),
                (vec![Strategy::Native; 2], [Some(0x1000); 3]),
                "{}",
                said(&ioasid)
            );
        });
        devices.iter().for_each(|device| device.detach(None).unwrap());
        // Without areas there is nothing that is for both.
        let strict = context.allocate(Request::guest(bypass()).with_strategies(&[Strategy::Native, Strategy::Nested])).unwrap();
        devices.iter().for_each(|device| drop(strict.attach(device, None).unwrap()));
        let refused = strict.switch(guests[0].view());
        assert!(
            matches!(&refused, Err(Error::Refused(refusal)) if refusal.reason.contains("does not allow a table for each of them")),
            "{refused:?}"
        );
        assert_eq!((strict.strategies(), LABELS.map(|label| rig.dma(label, 0x1000))), (vec![Strategy::Native; 2], [Some(0x1000); 3]));
        devices[2].detach(None).unwrap();
        strict.switch(guests[0].view()).unwrap();
        assert_eq!(strict.strategies(), [Strategy::Native], "with one of them there is");
    }
    rig.assert_clean();
}

/// The first PASID puts its device on the areas that another unit has, and the last one that goes takes it off.
#[test]
fn pasids_share_areas_of_another_unit_and_leave_them() {
    let rig = rig([unit(Arch::Arm), unit(Arch::Vtd).without_nesting()]);
    {
        let guests = guests(&rig, [Arch::Arm, Arch::Riscv, Arch::Vtd]);
        let context = rig.context();
        let (ioasid, devices) = attached(&context, Request::guest(guests[0].view()).with_second_table());
        let other = context.allocate(Request::guest(guests[1].view())).unwrap();
        assert_eq!(ioasid.strategies(), [Strategy::Native, Strategy::Areas]);
        without_a_miss(&rig, |round| {
            other.attach(&devices[0], Some(Pasid(3))).unwrap();
            let what = format!("round {round}: {}", said(&ioasid));
            assert_eq!(ioasid.strategies(), [Strategy::Areas], "{what}");
            assert!(what.contains("device nic, behind another unit, came because device nic uses PASIDs"), "{what}");
            follows(&rig, &ioasid, &guests[0], 0, &what);
            assert_eq!(rig.dma_of("nic", Some(Pasid(3)), 0x1000), Some(own(1)), "{what}");
            devices[0].detach(Some(Pasid(3))).unwrap();
            let what = format!("round {round}: {}", said(&ioasid));
            assert_eq!(ioasid.strategies(), [Strategy::Areas, Strategy::Native], "{what}");
            follows(&rig, &ioasid, &guests[0], 0, &what);
        });
    }
    rig.assert_clean();
}

/// A machine whose "plain" has no PASIDs: behind the unit of "nic", or behind another one.
fn with_a_plain_device(same: bool) -> Rig {
    let mut builder = SimBuilder::new();
    let units = [unit(Arch::Arm).without_nesting(), unit(Arch::Vtd).without_nesting()].map(|unit| builder.unit(unit));
    builder.device(DeviceConfig::new("nic", 1), &units[..1]);
    builder.device(DeviceConfig { pasids: false, ..DeviceConfig::new("plain", 2) }, &[units[usize::from(!same)]]);
    let sim = builder.build().unwrap();
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
    sim.register_memory(&memory).unwrap();
    Rig { sim, memory }
}

/// Areas that were made for a device without PASIDs are made anew for one that has some, whichever unit it is behind.
#[test]
fn areas_are_made_anew_for_the_device_that_has_pasids() {
    for same in [true, false] {
        for second_table in [false, true] {
            let rig = with_a_plain_device(same);
            {
                let guest = &guests(&rig, [Arch::Arm; 3])[0];
                let context = rig.context();
                let [plain, nic] = ["plain", "nic"].map(|label| context.connect(label).unwrap());
                let ioasid = context.allocate(Request { second_table, ..Request::guest(guest.view()) }).unwrap();
                ioasid.attach(&plain, None).unwrap();
                ioasid.attach(&nic, None).unwrap();
                assert_eq!(ioasid.strategies(), [Strategy::Areas]);
                ioasid.attach(&nic, Some(Pasid(3))).unwrap();
                let found = || [rig.dma("plain", 0x1000), rig.dma("nic", 0x1000), rig.dma_of("nic", Some(Pasid(3)), 0x1000)];
                let what = format!("same unit {same}: {}", said(&ioasid));
                assert_eq!((ioasid.strategies(), found()), (vec![Strategy::Areas], [Some(own(0)); 3]), "{what}");
                guest.unmap(0x1000);
                ioasid.invalidate(&[page(0x1000)]).unwrap();
                assert_eq!(found(), [None; 3], "{what}");
            }
            rig.assert_clean();
        }
    }
}

/// What a guest asks for, instead of tables.
#[test]
fn requests_are_converted_for_each_unit() {
    let rig = rig([unit(Arch::Vtd).without_nesting(), unit(Arch::Arm)]);
    {
        let context = rig.context();
        let (ioasid, _devices) = attached(&context, Request::requests().with_second_table());
        let piece = |iova: u64, address: u64| stagecraft::table::Piece {
            iova: Span { first: iova, last: iova | 0xfff },
            address,
            attributes: stagecraft::Attributes::READ.with(stagecraft::Attributes::WRITE),
        };
        ioasid.change(&[Change::Map(piece(DATA, DATA)), Change::Map(piece(0x1000, DATA + 0x5000))]).unwrap();
        assert_eq!(ioasid.strategies(), [Strategy::Areas]);
        without_a_miss(&rig, |_| {
            ioasid.reconsider().unwrap();
            assert_eq!(ioasid.strategies(), [Strategy::Areas, Strategy::Nested], "{}", said(&ioasid));
            assert_eq!(LABELS.map(|label| rig.dma(label, 0x1000)), [Some(DATA + 0x5000); 3]);
            ioasid.change(&[Change::Unmap(piece(0x1000, 0).iova)]).unwrap();
            assert_eq!(LABELS.map(|label| rig.dma(label, 0x1000)), [None; 3]);
            ioasid.change(&[Change::Map(piece(0x1000, DATA + 0x5000))]).unwrap();
        });
    }
    rig.assert_clean();
}

/// An address space with its devices, and what is done to it.
struct Case {
    what: &'static str,
    units: fn() -> [UnitConfig; 2],
    request: fn(&[Guest; 3]) -> Request,
    /// A PASID of "nic" that is attached before all devices.
    first: Option<Pasid>,
    /// What is done before, without failures.
    before: fn(&Setting<'_>),
    act: fn(&Setting<'_>) -> Result<(), Error>,
    /// The strategies when it has succeeded.
    after: &'static [Strategy],
}

struct Setting<'a> {
    guests: &'a [Guest; 3],
    ioasid: Ioasid,
    other: Ioasid,
    devices: [Device; 3],
}

const NATIVE_OR_AREAS: [Strategy; 2] = [Strategy::Native, Strategy::Areas];

fn cases() -> Vec<Case> {
    let plain_and_arm: fn() -> [UnitConfig; 2] = || [unit(Arch::Vtd).without_nesting(), unit(Arch::Arm)];
    let arm_and_vtd: fn() -> [UnitConfig; 2] = || [unit(Arch::Arm), unit(Arch::Vtd)];
    let arm_and_plain: fn() -> [UnitConfig; 2] = || [unit(Arch::Arm), unit(Arch::Vtd).without_nesting()];
    let any: fn(&[Guest; 3]) -> Request = |guests| Request::guest(guests[0].view()).with_second_table();
    let some: fn(&[Guest; 3]) -> Request = |guests| Request::guest(guests[0].view()).with_strategies(&NATIVE_OR_AREAS).with_second_table();
    let nothing: fn(&Setting<'_>) = |_| {};
    vec![
        Case {
            what: "areas are left",
            units: plain_and_arm,
            request: any,
            first: None,
            before: nothing,
            act: |setting| setting.ioasid.reconsider().map(drop),
            after: &[Strategy::Areas, Strategy::Nested],
        },
        Case {
            what: "areas are left by all",
            units: arm_and_vtd,
            request: any,
            first: Some(Pasid(5)),
            before: nothing,
            act: |setting| setting.devices[0].detach(Some(Pasid(5))),
            after: &[Strategy::Nested, Strategy::Nested],
        },
        Case {
            what: "areas become one unit's own table and areas",
            units: arm_and_vtd,
            request: some,
            first: None,
            before: nothing,
            act: |setting| setting.ioasid.switch(setting.guests[1].view()).map(drop),
            after: &[Strategy::Areas, Strategy::Native],
        },
        Case {
            what: "one unit's own table becomes another's",
            units: arm_and_vtd,
            request: some,
            first: None,
            before: |setting| drop(setting.ioasid.switch(setting.guests[1].view()).unwrap()),
            act: |setting| setting.ioasid.switch(setting.guests[2].view()).map(drop),
            after: &[Strategy::Areas, Strategy::Native],
        },
        Case {
            what: "one unit's own table becomes areas that are there",
            units: arm_and_vtd,
            request: some,
            first: None,
            before: |setting| drop(setting.ioasid.switch(setting.guests[2].view()).unwrap()),
            act: |setting| setting.ioasid.switch(setting.guests[0].view()).map(drop),
            after: &[Strategy::Areas],
        },
        Case {
            what: "the kernel's own tables become areas for both",
            units: arm_and_vtd,
            request: |_| Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }),
            first: None,
            before: nothing,
            act: |setting| setting.ioasid.switch(setting.guests[1].view()).map(drop),
            after: &[Strategy::Areas],
        },
        Case {
            what: "areas for both become the kernel's own tables",
            units: arm_and_vtd,
            request: |_| Request::guest(GuestView { outcome: Outcome::Bypass, id: 0 }),
            first: None,
            before: |setting| drop(setting.ioasid.switch(setting.guests[1].view()).unwrap()),
            act: |setting| setting.ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 }).map(drop),
            after: &[Strategy::Native, Strategy::Native],
        },
        Case {
            what: "a PASID puts its device on another unit's areas",
            units: arm_and_plain,
            request: any,
            first: None,
            before: nothing,
            act: |setting| setting.other.attach(&setting.devices[0], Some(Pasid(3))).map(drop),
            after: &[Strategy::Areas],
        },
        Case {
            what: "a PASID that goes takes its device off another unit's areas",
            units: arm_and_plain,
            request: any,
            first: None,
            before: |setting| drop(setting.other.attach(&setting.devices[0], Some(Pasid(3))).unwrap()),
            act: |setting| setting.devices[0].detach(Some(Pasid(3))),
            after: &[Strategy::Areas, Strategy::Nested],
        },
    ]
}

/// Whatever call fails, once or from then on: all are where the guest's tables say or wait, nothing stale is reached, and all goes well the next time.
#[test]
fn whatever_fails_each_device_has_a_table_that_is_right() {
    for case in cases() {
        let rig = rig((case.units)());
        let (mut failed, mut detached) = (0, 0);
        for stays in [false, true] {
            for n in 1.. {
                let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
                let context = rig.context();
                let (ioasid, devices) = attached_after(&context, (case.request)(&guests), case.first);
                let other = context.allocate(Request::guest(guests[1].view())).unwrap();
                let setting = Setting { guests: &guests, ioasid, other, devices };
                (case.before)(&setting);
                let Setting { ioasid, devices, .. } = &setting;
                if stays {
                    rig.sim.fail_from(n, Errno::ENOMEM);
                } else {
                    rig.sim.fail_nth(n, Errno::ENOMEM);
                }
                let done = (case.act)(&setting);
                let is_over = rig.sim.disarm();
                let what = format!("{}, call {n}, stays {stays}: {done:?}, {}", case.what, said(ioasid));
                let there = |iova: u64| ioasid.translate(Iova(iova), READ).unwrap().ok().map(|found| found.address.0);
                let is_there = |device: &Device| device.attached().contains(&(None, ioasid.id()));
                for device in devices {
                    for iova in [DATA, 0x1000, 0x2000] {
                        let wanted = if is_there(device) { there(iova) } else { None };
                        let found = rig.dma(device.label(), iova);
                        // What the kernel did not map is mapped later.
                        let is_missing = found.is_none() && ioasid.stats().without_memory > 0;
                        assert!(found == wanted || is_missing, "{what}: {} gets from {iova:#x} to {found:x?}, and not {wanted:x?}", device.label());
                    }
                }
                let blocked = devices.iter().filter(|device| !is_there(device)).count();
                assert_eq!(ioasid.stats().blocked, blocked, "{what}");
                assert!(blocked == 0 || done.is_ok() || matches!(done, Err(Error::Detached(_) | Error::Blocked(_))), "{what}");
                failed += u32::from(done.is_err());
                detached += u32::from(blocked > 0);
                ioasid.recover().unwrap();
                assert_eq!((ioasid.stats().blocked, ioasid.stats().stale), (0, 0), "{what}");
                LABELS.iter().for_each(|label| assert_eq!(rig.dma(label, 0x1000), there(0x1000), "{what}: {label} came back"));
                if done.is_err() {
                    (case.act)(&setting).unwrap_or_else(|error| panic!("{what}: again: {error}"));
                }
                ioasid.reconsider().unwrap();
                let mut strategies = ioasid.strategies();
                strategies.sort_unstable();
                let mut after = case.after.to_vec();
                after.sort_unstable();
                assert_eq!(strategies, after, "{what}, then {}", said(ioasid));
                if let Some(now) = (0..3).find(|index| there(0x1000) == Some(own(*index))) {
                    follows(&rig, ioasid, &guests[now], now, &what);
                }
                drop(setting);
                drop(context);
                rig.assert_clean();
                if is_over {
                    break;
                }
            }
        }
        println!("{}: {failed} failed, devices were detached in {detached}", case.what);
        assert!(failed + detached > 3, "{}: {failed}, {detached}", case.what);
    }
}

/// One table is allowed. What was made for devices of one unit that are gone stands in the way of nobody behind another: neither of a table nor of the kernel's own.
#[test]
fn a_table_that_nobody_uses_is_no_second_one() {
    let bypass = || GuestView { outcome: Outcome::Bypass, id: 0 };
    let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
    {
        let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
        let context = rig.context();
        let [nic, second, disk] = LABELS.map(|label| context.connect(label).unwrap());
        for request in [Request::guest(guests[0].view()), Request::requests().with_strategies(&[Strategy::Nested])] {
            let ioasid = context.allocate(request.clone()).unwrap();
            for round in 0..3 {
                for (device, other) in [(&nic, &disk), (&disk, &second)] {
                    let explained = ioasid.explain_for(device, None).unwrap();
                    assert_eq!(ioasid.serves(device, None), Ok(()), "round {round}: {}", device.label());
                    ioasid.attach(device, None).unwrap();
                    assert_eq!(
                        (ioasid.strategies(), ioasid.explain()),
                        (vec![Strategy::Nested], vec![explained]),
                        "round {round}: {}",
                        device.label()
                    );
                    // While it is used, there is no second one.
                    assert_eq!(ioasid.serves(other, None).unwrap_err().property, Property::Unit);
                    assert!(matches!(ioasid.attach(other, None), Err(Error::Refused(refusal)) if refusal.property == Property::Unit));
                    if request.kind != Request::requests().kind {
                        assert_eq!(rig.dma(device.label(), 0x1000), Some(own(0)), "round {round}: {}", device.label());
                    }
                    device.detach(None).unwrap();
                }
            }
        }
        // Nor does the kernel's own table for one unit stand beside a table for another.
        let ioasid = context.allocate(Request::guest(guests[0].view())).unwrap();
        ioasid.attach(&nic, None).unwrap();
        nic.detach(None).unwrap();
        ioasid.switch(bypass()).unwrap();
        ioasid.attach(&disk, None).unwrap();
        ioasid.attach(&nic, None).unwrap();
        assert_eq!((ioasid.strategies(), rig.dma("nic", 0x1000), rig.dma("disk", 0x1000)), (vec![Strategy::Native; 2], Some(0x1000), Some(0x1000)));
    }
    rig.assert_clean();
}

/// One table is allowed, and one for devices of another unit stays because what would be better failed, whatever of it. The kernel's own table is none in this sense.
#[test]
fn a_table_that_could_not_be_left_keeps_nobody_from_the_kernels_own() {
    let mut stayed = 0;
    for nth in 1.. {
        let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
        let happened = {
            let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
            let context = rig.context();
            let [nic, _, disk] = LABELS.map(|label| context.connect(label).unwrap());
            let ioasid = context.allocate(Request::guest(guests[0].view())).unwrap();
            ioasid.attach(&nic, None).unwrap();
            rig.sim.fail_nth(nth, Errno::ENOMEM);
            let switched = ioasid.switch(GuestView { outcome: Outcome::Bypass, id: 0 });
            let happened = !rig.sim.disarm();
            if switched.is_ok() && ioasid.strategies() == [Strategy::Nested] {
                stayed += 1;
                assert_eq!(ioasid.serves(&disk, None), Ok(()), "call {nth}");
                ioasid.attach(&disk, None).unwrap();
                assert_eq!(ioasid.strategies(), [Strategy::Nested, Strategy::Native], "call {nth}");
                assert_eq!((rig.dma("nic", 0x1000), rig.dma("disk", 0x1000)), (Some(0x1000), Some(0x1000)), "call {nth}");
            }
            happened
        };
        rig.assert_clean();
        if !happened {
            break;
        }
    }
    assert!(stayed > 0);
}

/// Devices that were detached because the kernel failed come back to what they had, whoever comes back first: one of them could have better than areas, and the PASID of another
/// could not follow. Nobody else takes their place meanwhile.
#[test]
fn those_who_wait_come_back_to_what_they_had() {
    for with_pasid in [true, false] {
        let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
        {
            let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
            let context = rig.context();
            let [nic, second, disk] = LABELS.map(|label| context.connect(label).unwrap());
            let ioasid = context.allocate(Request::guest(guests[0].view())).unwrap();
            let pasid = Some(Pasid(3));
            if with_pasid {
                ioasid.attach(&second, pasid).unwrap();
            }
            ioasid.attach(&nic, None).unwrap();
            if with_pasid {
                // The last to come.
                second.detach(pasid).unwrap();
                ioasid.attach(&second, pasid).unwrap();
            }
            let strategy = if with_pasid { Strategy::Areas } else { Strategy::Nested };
            let found = || (rig.dma("nic", 0x1000), rig.dma_of("second", pasid, 0x1000));
            let all = (Some(own(0)), Some(own(0)).filter(|_| with_pasid));
            assert_eq!((ioasid.strategies(), found()), (vec![strategy], all));
            guests[0].unmap(0x2000);
            rig.sim.fail_from(1, Errno::ENOMEM);
            assert!(matches!(ioasid.invalidate(&[EVERYTHING]), Err(Error::Blocked(_))));
            rig.sim.disarm();
            assert_eq!(found(), (None, None));
            if !with_pasid {
                assert_eq!(ioasid.serves(&disk, None).unwrap_err().property, Property::Unit);
                assert!(matches!(ioasid.attach(&disk, None), Err(Error::Refused(refusal)) if refusal.property == Property::Unit));
            }
            if with_pasid {
                // The first to come back, before anybody says that all should: alone it would have something better.
                ioasid.attach(&nic, None).unwrap();
                assert_eq!((ioasid.strategies(), found()), (vec![strategy], (all.0, None)), "{}", said(&ioasid));
            }
            ioasid.recover().unwrap();
            assert_eq!((ioasid.strategies(), found()), (vec![strategy], all), "{}", said(&ioasid));
            assert_eq!(rig.dma("nic", 0x2000), None);
            // Nobody waits any more, and nobody is there any more.
            nic.detach(None).unwrap();
            if with_pasid {
                second.detach(pasid).unwrap();
            }
            ioasid.attach(&disk, None).unwrap();
            assert_eq!((ioasid.strategies(), rig.dma("disk", 0x1000)), (vec![Strategy::Nested], Some(own(0))));
        }
        rig.assert_clean();
    }
}

/// Areas are for all units. Those that nobody is left on are not for a unit that can have something better.
#[test]
fn areas_that_nobody_uses_are_left_for_something_better() {
    let rig = rig([unit(Arch::Arm), unit(Arch::Vtd)]);
    {
        let guests = guests(&rig, [Arch::Riscv, Arch::Arm, Arch::Vtd]);
        let context = rig.context();
        let [nic, _, disk] = LABELS.map(|label| context.connect(label).unwrap());
        for second_table in [false, true] {
            let ioasid = context.allocate(Request { second_table, ..Request::guest(guests[0].view()) }).unwrap();
            ioasid.attach(&nic, Some(Pasid(3))).unwrap();
            assert_eq!(ioasid.strategies(), [Strategy::Areas]);
            nic.detach(Some(Pasid(3))).unwrap();
            let explained = ioasid.explain_for(&disk, None).unwrap();
            ioasid.attach(&disk, None).unwrap();
            assert_eq!((ioasid.strategies(), ioasid.explain()), (vec![Strategy::Nested], vec![explained]), "{}", said(&ioasid));
            assert_eq!(rig.dma("disk", 0x1000), Some(own(0)));
            disk.detach(None).unwrap();
            // Where nothing is better they serve.
            ioasid.attach(&nic, Some(Pasid(3))).unwrap();
            assert_eq!((ioasid.strategies().contains(&Strategy::Areas), rig.dma_of("nic", Some(Pasid(3)), 0x1000)), (true, Some(own(0))));
            nic.detach(Some(Pasid(3))).unwrap();
        }
    }
    rig.assert_clean();
}
