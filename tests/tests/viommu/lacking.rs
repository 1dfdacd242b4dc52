//! What the kernel had no memory for, in the tables of a quiet guest: it is tried again without another command.

use stagecraft::Gpa;
use stagecraft::ioasid::Strategy;
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::UnitConfig;

use super::behaviour::{ONE, without_pasid};
use super::guests::{Arch, DATA, MEMORY};
use super::kernel::{IOVA, Rig};

/// Pages that are far enough from each other to need tables of their own.
const PAGES: u64 = 400;

fn page(number: u64) -> u64 {
    IOVA + (number << 30)
}

fn brings_what_was_missing(arch: Arch, host: UnitConfig, strategy: Strategy) {
    let what = format!("{arch:?} on {}: {strategy}", host.name);
    let mut rig = Rig::with(arch, host, Rig::template().with_strategies(&[strategy]));
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.translate(ONE, root, 7);
    rig.viommu.connect(ONE, false);
    assert_eq!((rig.strategy(ONE), rig.reads(ONE, IOVA)), (strategy, Some(DATA)), "{what}");
    rig.sim.fail_from(1, Errno::ENOMEM);
    for number in 1..PAGES {
        rig.guest.map_page(root, page(number), DATA + ((number % 64) << 12), true);
    }
    let handled = rig.viommu.table_written(Gpa(0), MEMORY);
    assert_eq!((handled.changes, handled.blocked, handled.loose.len()), (PAGES - 1, 0, 0), "{what}");
    let missing = |rig: &Rig| (0..PAGES).filter(|number| rig.reads(ONE, page(*number)).is_none()).count();
    let (before, waiting) = (missing(&rig), rig.viommu.figures().pending);
    assert!(before > 0, "{what}: the kernel has memory for everything");
    assert_eq!(waiting, 1, "{what}");
    // A kernel that has none for a while is not asked at each call.
    let asked = rig.sim.calls_total();
    (0..64).for_each(|_| drop(rig.viommu.idle()));
    assert_eq!(missing(&rig), before, "{what}");
    let tries = rig.viommu.figures().retries;
    assert!((1..16).contains(&tries), "{what}: {tries} tries, {} kernel calls", rig.sim.calls_total() - asked);
    rig.sim.disarm();
    (0..128).for_each(|_| drop(rig.viommu.idle()));
    assert_eq!((missing(&rig), rig.viommu.figures().pending), (0, 0), "{what}");
    assert_eq!(rig.space(ONE).unwrap().stats().without_memory, 0, "{what}");
    assert!(rig.viommu.stream(without_pasid(ONE)).is_some());
    rig.end(&what);
}

#[test]
fn areas() {
    for arch in Arch::ALL {
        brings_what_was_missing(arch, UnitConfig::vtd("VT-d").without_nesting(), Strategy::Areas);
    }
}

#[test]
fn nested_tables() {
    for arch in Arch::ALL {
        brings_what_was_missing(arch, UnitConfig::vtd("VT-d"), Strategy::Nested);
    }
}
