//! What is counted.

use stagecraft::ioasid::{Request, Strategy};
use stagecraft::kernel::sim::Call;

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, MEMORY, Rig, page, unit};

#[test]
fn counters_say_what_happened() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    (0..4).for_each(|index| guest.put(index << 12, DATA + (index << 12), true));
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_strategies(&[Strategy::Nested])).unwrap();
    ioasid.attach(&device, None).unwrap();
    guest.unmap(0);
    guest.map(0x9000, DATA, true);
    ioasid.invalidate(&[page(0), page(0x9000)]).unwrap();
    let metrics = context.metrics();
    assert_eq!(metrics.kernel_calls, rig.sim.calls_total());
    assert_eq!((metrics.native, metrics.nested, metrics.areas, metrics.ioasids), (0, 1, 0, 1));
    assert_eq!((metrics.invalidations, metrics.invalidation_entries, metrics.invalidation_failures), (2, 1, 0));
    assert_eq!((metrics.changes, metrics.blocked, metrics.leaves), (2, 0, 4), "one page went and one came");
    assert_eq!((metrics.pinned_bytes, metrics.detached, metrics.faults), (MEMORY, 0, 0));
    assert!(metrics.questions > 0 && metrics.table_bytes > 0);
    // A failure that is over the next moment shows nowhere but here.
    guest.unmap(0x1000);
    let calls = rig.sim.calls().get(&Call::Invalidate).copied();
    rig.sim.fail_nth(1, stagecraft::kernel::Errno::EIO);
    ioasid.invalidate(&[page(0x1000)]).unwrap();
    assert_eq!(rig.sim.calls().get(&Call::Invalidate).copied(), calls.map(|calls| calls + 2));
    assert_eq!((context.metrics().invalidation_failures, rig.dma("nic", 0x1000)), (1, None));
}
