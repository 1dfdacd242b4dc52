//! What a VMM passes on from a guest and its devices, and registers that a guest writes: any numbers whatever.

use stagecraft::plugin::Requester;
use stagecraft::plugin::queue::{Effect, EventAccess, Invalidation, PageRequest, Scope};
use stagecraft::viommu::{BlockedDma, CommandError, Limits};
use stagecraft::{Access, Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;

use super::behaviour::{ONE, Rig, TWO};
use super::guests::{Arch, DATA};

const IOVA: u64 = 0x12_3456_7000;

fn absurd(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << rng.below(64),
        3 => !(1 << rng.below(64)),
        _ => rng.number() >> rng.below(64),
    }
}

fn rig(arch: Arch) -> Rig {
    let mut rig = Rig::new(arch, Limits::default());
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.connect_both(root);
    rig
}

#[test]
fn requesters_and_addresses_of_any_kind_are_answered() {
    for arch in Arch::ALL {
        let mut rig = rig(arch);
        let mut rng = Rng::new(5);
        for _ in 0..400 {
            let id = if rng.percent(50) { ONE } else { absurd(&mut rng) };
            let requester = Requester { id, pasid: if rng.percent(50) { None } else { Some(absurd(&mut rng) as u32) } };
            let (iova, privileged, last) = (Iova(absurd(&mut rng)), rng.percent(50), rng.percent(70));
            let access = rng.pick(&[EventAccess::Read, EventAccess::Write, EventAccess::Execute]);
            let events = rig.viommu.faults(&[BlockedDma { requester, iova, access, privileged }]);
            assert_eq!(events.records.len() as u64 + events.lost + events.silent, 1, "{arch:?}: {requester:?} at {iova}");
            let access = Access { read: rng.percent(50), write: rng.percent(50) };
            let (execute, group) = (rng.percent(50), absurd(&mut rng) as u16);
            rig.viommu.page_requests(&[PageRequest { requester, address: iova, access, execute, privileged, group, last }]);
            match rng.below(6) {
                0 => drop(rig.viommu.stream_changed(id)),
                1 => drop(rig.viommu.table_written(Gpa(absurd(&mut rng)), absurd(&mut rng))),
                2 if id != ONE && id != TWO => drop(rig.viommu.disconnect(id)),
                3 => {
                    let scope = Scope {
                        leaf: rng.percent(50),
                        second_stage: rng.percent(50),
                        domain: rng.percent(50).then(|| absurd(&mut rng) as u16),
                        space: rng.percent(50).then(|| absurd(&mut rng) as u32),
                        id: rng.percent(50).then(|| (absurd(&mut rng) as u32, absurd(&mut rng) as u32)),
                    };
                    let iova = Span { first: absurd(&mut rng), last: absurd(&mut rng) };
                    let effect = rng.pick(&[Effect::Range { scope, iova }, Effect::Structures(scope), Effect::DeviceTlb { scope, iova }]);
                    rig.viommu.invalidate(&[Invalidation { index: 0, effect }]);
                }
                _ => {}
            }
        }
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)), "{arch:?}: nothing had changed");
        assert_eq!(rig.viommu.supervisor().figures().failures, 0, "{arch:?}");
    }
}

/// A ring in which there is nothing has its end before its beginning.
#[test]
fn a_queue_without_commands_has_none() {
    for arch in Arch::ALL {
        let mut rig = rig(arch);
        let at = rig.guest.new_table();
        let handled = rig.viommu.commands_at(&[Span { first: at, last: at - 1 }]).unwrap();
        assert_eq!((handled.illegal, handled.spaces), (None, 0), "{arch:?}");
        for span in [Span { first: u64::MAX, last: 0 }, Span { first: at, last: 0 }] {
            let handled = rig.viommu.commands_at(&[span]);
            assert!(matches!(handled, Ok(_) | Err(CommandError::Unreadable(_) | CommandError::TooLong(_))), "{arch:?}: {span}");
        }
    }
}

/// All registers are the guest's to write, with devices behind the unit: what comes of it is undone when they are what they were.
#[test]
fn registers_of_any_value_do_no_harm() {
    for arch in Arch::ALL {
        let mut rig = rig(arch);
        let (registers, mut rng) = (arch.registers(), Rng::new(9));
        for _ in 0..150 {
            let mut others = registers.clone();
            for _ in 0..=rng.below(2) {
                let index = rng.below(others.len() as u64) as usize;
                others[index].1 = if rng.percent(50) { others[index].1 ^ 1 << rng.below(64) } else { absurd(&mut rng) };
            }
            rig.viommu.registers_changed(others);
            let batch: Vec<u8> = (0..16 * (1 + rng.below(4))).map(|_| rng.below(256) as u8).collect();
            let _ = rig.viommu.commands(&batch);
            rig.viommu.table_written(Gpa(absurd(&mut rng)), 64);
            if rng.percent(30) {
                rig.viommu.registers_changed(registers.clone());
                assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)), "{arch:?}");
            }
        }
        rig.viommu.registers_changed(registers.clone());
        assert_eq!((rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)), (Some(DATA), Some(DATA)), "{arch:?}");
        assert_eq!(rig.viommu.supervisor().figures().failures, 0, "{arch:?}");
    }
}
