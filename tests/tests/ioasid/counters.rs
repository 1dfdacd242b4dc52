//! What is counted, and what is traced.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use stagecraft::ioasid::{Context, Error, GuestView, Request, Setup, Strategy, Target};
use stagecraft::kernel::sim::Call;
use stagecraft::plugin::Outcome;
use stagecraft::{Access, Gpa, Iova, Span};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use crate::guests::{Arch, Guest};
use crate::rig::{DATA, Deaf, MEMORY, Rig, page, unit};

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

/// What becomes of paths, and what goes wrong, each counted once.
#[test]
fn strategies_and_losses_are_counted() {
    let rig = Rig::new(&[unit(Arch::Vtd), unit(Arch::Vtd).without_nesting()], &[("near", &[0]), ("far", &[1])]);
    let deaf = Deaf::before(rig.kernel());
    let context = Context::with(Setup { kernel: Arc::clone(&deaf) as _, ..rig.setup() }).unwrap();
    let (near, far) = (context.connect("near").unwrap(), context.connect("far").unwrap());
    let counted = || {
        let metrics = context.metrics();
        ([metrics.native, metrics.nested, metrics.areas], [metrics.blocked, metrics.detached, metrics.invalidation_failures])
    };
    let guest = Guest::new(Arch::Vtd, &rig.memory);
    (0..3).for_each(|page| guest.put(page << 12, DATA + (page << 12), true));
    let native = context.allocate(Request::guest(guest.view())).unwrap();
    native.attach(&near, None).unwrap();
    assert_eq!(counted(), ([1, 0, 0], [0, 0, 0]));
    // Room for one of three leaves.
    let mut request = Request::guest(guest.view());
    request.limits.shadow.leaves = 1;
    let areas = context.allocate(request).unwrap();
    assert_eq!(areas.attach(&far, None).unwrap().blocked_count, 2);
    assert_eq!(counted(), ([1, 0, 1], [2, 0, 0]));
    // A kernel that takes no invalidation: whoever might reach what is gone is detached.
    guest.unmap(0);
    deaf.takes(0);
    assert!(matches!(native.invalidate(&[page(0)]), Err(Error::Blocked(_))));
    let (strategies, [blocked, detached, failures]) = counted();
    assert_eq!((strategies, blocked, detached), ([1, 0, 1], 2, 1));
    assert!(failures > 0 && deaf.hears());
    native.recover().unwrap();
    assert_eq!((near.attached().len(), counted().1[1]), (1, 1));
}

const READ: Access = Access { read: true, write: false };
const ONE_PAGE: Span = Span { first: 0x1000, last: 0x1fff };

/// What follows a guest's tables for lookups in software is counted as what does for a unit.
#[test]
fn lookups_in_software_are_counted() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    (0..4).for_each(|index| guest.put(index << 12, DATA + (index << 12), index != 2));
    let context = rig.context();
    let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
    assert_eq!(ioasid.stats(), stagecraft::ioasid::Stats::default());
    let lookup = ioasid.lookup().unwrap();
    assert!(lookup.find(Iova(0x1000)).is_some());
    let stats = ioasid.stats();
    // Tables, and pages that may be written and that may not.
    assert_eq!((stats.guest_tables, stats.leaves, stats.host_tables), (4, 4, 0));
    assert!(stats.patterns >= 3 && stats.questions >= stats.patterns, "{stats:?}");
    let metrics = context.metrics();
    assert_eq!((metrics.leaves, metrics.patterns, metrics.questions), (stats.leaves, stats.patterns, stats.questions));
    // Another page with a pattern that is known costs none.
    guest.put(0x7000, DATA, true);
    ioasid.invalidate(&[page(0x7000)]).unwrap();
    let after = ioasid.stats();
    assert_eq!((after.leaves, after.patterns, after.questions), (5, stats.patterns, stats.questions));
}

/// Questions that were asked stay asked, whatever goes.
#[test]
fn questions_only_grow() {
    for strategies in [&[Strategy::Nested, Strategy::Software], &[Strategy::Areas, Strategy::Software]] {
        let rig = Rig::new(&[unit(Arch::Riscv)], &[("nic", &[0])]);
        let guests = [0x10_0000, 0x20_0000].map(|root| Guest::at(Arch::Arm, &rig.memory, root));
        guests.iter().for_each(|guest| guest.put(0x1000, DATA, true));
        let other = Guest::at(Arch::Vtd, &rig.memory, 0x30_0000);
        other.put(0x1000, DATA, true);
        let context = rig.context();
        let device = context.connect("nic").unwrap();
        let mut before = 0;
        let mut grows = |what: &str| {
            let now = context.metrics().questions;
            assert!(now >= before, "{strategies:?}: {what}: {before} questions, then {now}");
            before = now;
        };
        let ioasid = context.allocate(Request::guest(guests[0].view()).with_strategies(strategies)).unwrap();
        ioasid.attach(&device, None).unwrap();
        grows("attached");
        ioasid.lookup().unwrap();
        grows("looked up");
        for view in [guests[1].view(), other.view(), GuestView { outcome: Outcome::Bypass, id: 0 }, guests[0].view()] {
            ioasid.switch(view).unwrap();
            grows("switched");
        }
        device.detach(None).unwrap();
        drop(ioasid);
        grows("dropped");
        assert!(before > 0);
    }
}

#[test]
fn faults_that_somebody_told_are_counted_too() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Vtd, &rig.memory);
    guest.map(0x1000, DATA, true);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let ioasid = context.allocate(Request::guest(guest.view()).with_page_requests()).unwrap();
    ioasid.attach(&device, None).unwrap();
    ioasid.fault(Iova(0x1000), READ).unwrap();
    assert_eq!(context.metrics().faults, 1);
    // A page that a device asks for is one fault, and not another one for being looked for.
    let sim = rig.sim.device("nic").unwrap();
    rig.sim.set_patience(10_000);
    std::thread::scope(|scope| {
        let read = scope.spawn(|| sim.read(None, Iova(0x2000), &mut [0; 8]));
        while !read.is_finished() {
            ioasid.serve_faults().unwrap();
            std::thread::yield_now();
        }
        assert!(read.join().unwrap().is_err());
    });
    assert_eq!(context.metrics().faults, 2);
}

/// Names of spans that were entered.
#[derive(Clone, Default)]
struct Names(Arc<Mutex<BTreeSet<(&'static str, &'static str)>>>);

impl Subscriber for Names {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_span()
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let module = span.metadata().target().split("::").nth(1).unwrap_or_default();
        self.0.lock().unwrap().insert((module, span.metadata().name()));
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn every_way_in_has_a_span() {
    let rig = Rig::new(&[unit(Arch::Vtd)], &[("nic", &[0])]);
    let guest = Guest::new(Arch::Arm, &rig.memory);
    guest.map(0x1000, DATA, true);
    let context = rig.context();
    let device = context.connect("nic").unwrap();
    let names = Names::default();
    let round = || {
        let ioasid = context.allocate(Request::guest(guest.view())).unwrap();
        ioasid.attach(&device, None).unwrap();
        ioasid.invalidate(&[page(0x1000)]).unwrap();
        ioasid.table_written(Gpa(guest.root()), 8).unwrap();
        ioasid.synchronise().unwrap();
        ioasid.switch(guest.view()).unwrap();
        ioasid.fault(Iova(0x1000), READ).unwrap();
        ioasid.recover().unwrap();
        ioasid.reconsider().unwrap();
        let requests = context.allocate(Request::requests()).unwrap();
        requests.replace(&device, None).unwrap();
        requests.change(&[]).unwrap();
        let managed = context.allocate(Request::managed()).unwrap();
        managed.map(ONE_PAGE, Target::Guest(Gpa(DATA)), READ).unwrap();
        managed.unmap(ONE_PAGE).unwrap();
        device.detach(None).unwrap();
        context.memory_changed(context.memory()).unwrap();
        context.host_events(&[], 16).unwrap();
        let other = Rig::new(&[unit(Arch::Arm)], &[("nic", &[0])]);
        context.save().restore(other.setup(), |_, _| None).unwrap();
    };
    // Other tests come by the same places without a subscriber at the same time; a place that two threads enter for the first time may be missed once.
    for _ in 0..3 {
        tracing::subscriber::with_default(names.clone(), || {
            tracing::callsite::rebuild_interest_cache();
            round();
        });
    }
    let names = names.0.lock().unwrap();
    let of: Vec<&str> = names.iter().filter(|(module, _)| *module == "ioasid").map(|(_, name)| *name).collect();
    let expected = "attach build change detach fault host_events invalidate map memory_changed reconsider recover replace restore save switch \
                    synchronise table_written unmap";
    assert_eq!(of, expected.split(' ').collect::<Vec<_>>());
}
