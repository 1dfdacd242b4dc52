//! Mappings of the VMM, mirrored in all units.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stagecraft::ioasid::{Context, Device, Error, Ioasid, Property, Request, Setup, Target};
use stagecraft::kernel::sim::{Sim, UnitConfig};
use stagecraft::kernel::{Before, Errno, IoasId, Kernel};
use stagecraft::{Access, Gpa, Iova, Span};

use crate::rig::{DATA, Rig};

const BOTH: Access = Access { read: true, write: true };
const READ: Access = Access { read: true, write: false };

fn span(first: u64, bytes: u64) -> Span {
    Span { first, last: first + bytes - 1 }
}

fn two_units() -> Rig {
    Rig::new(&[UnitConfig::vtd("one"), UnitConfig::smmuv3("other").without_nesting()], &[("nic", &[0]), ("disk", &[1])])
}

/// The devices behind both units, attached to one IOASID.
fn attached(context: &Context) -> ([Device; 2], Ioasid) {
    let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
    let ioasid = context.allocate(Request::managed()).unwrap();
    ioasid.attach(&nic, None).unwrap();
    ioasid.attach(&disk, None).unwrap();
    ([nic, disk], ioasid)
}

#[test]
fn two_units_have_the_same() {
    let rig = two_units();
    {
        let context = rig.context();
        let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
        let ioasid = context.allocate(Request::managed()).unwrap();
        ioasid.map(span(0x10_0000, 0x4000), Target::Guest(Gpa(DATA)), BOTH).unwrap();
        ioasid.attach(&nic, None).unwrap();
        ioasid.attach(&disk, None).unwrap();
        ioasid.map(span(0x20_0000, 0x1000), Target::Guest(Gpa(DATA + 0x8000)), READ).unwrap();
        for label in ["nic", "disk"] {
            assert_eq!((rig.dma(label, 0x10_3000), rig.dma(label, 0x20_0008)), (Some(DATA + 0x3000), Some(DATA + 0x8008)));
            assert!(rig.writes(label, 0x10_0000) && !rig.writes(label, 0x20_0000));
        }
        assert!(matches!(ioasid.unmap(span(0x10_0000, 0x1000)), Err(Error::NotMapped(_))), "a mapping is not cut");
        assert!(matches!(ioasid.unmap(span(0x30_0000, 0x1000)), Err(Error::NotMapped(_))));
        assert!(matches!(ioasid.map(span(0x10_3000, 0x2000), Target::Guest(Gpa(DATA)), BOTH), Err(Error::Mapped(_))));
        assert!(matches!(ioasid.map(span(0x50_0000, 0x2000), Target::Guest(Gpa(1 << 40)), BOTH), Err(Error::NotMemory(_))));
        assert_eq!(ioasid.unmap(span(0, 0x100_0000)).unwrap(), 2);
        for label in ["nic", "disk"] {
            assert_eq!((rig.dma(label, 0x10_3000), rig.dma(label, 0x20_0008)), (None, None));
        }
    }
    rig.assert_clean();
}

/// Whatever step inside the kernel fails, both units have it or none has.
#[test]
fn mappings_are_made_in_both_units_or_in_none() {
    let rig = two_units();
    let context = rig.context();
    let (_devices, ioasid) = attached(&context);
    let mut failures = 0;
    for call in [true, false] {
        for n in 1.. {
            if call {
                rig.sim.fail_nth(n, Errno::ENOMEM);
            } else {
                rig.sim.fail_step_nth(n, Errno::ENOMEM);
            }
            let mapped = ioasid.map(span(0x10_0000, 0x4000), Target::Guest(Gpa(DATA)), BOTH);
            let untouched = rig.sim.disarm();
            let wanted = mapped.is_ok().then_some(DATA + 0x3000);
            assert_eq!((rig.dma("nic", 0x10_3000), rig.dma("disk", 0x10_3000)), (wanted, wanted), "step {n}: {mapped:?}");
            if mapped.is_ok() {
                assert!(untouched, "nothing was left to fail");
                assert_eq!(ioasid.unmap(span(0x10_0000, 0x4000)).unwrap(), 1);
                break;
            }
            failures += 1;
            assert!(matches!(mapped, Err(Error::Kernel { errno: Errno::ENOMEM, .. })));
        }
    }
    assert!(failures >= 4, "{failures}");
}

/// Where the mappings of the tests below are, and where they lead.
const PLACES: [(u64, u64); 3] = [(0x10_0000, DATA), (0x10_4000, DATA + 0x9000), (0x20_0000, DATA + 0x1000)];

/// Where each of them leads, the same for both devices.
fn found(rig: &Rig) -> [Option<u64>; 3] {
    let [one, other] = ["nic", "disk"].map(|label| PLACES.map(|(iova, _)| rig.dma(label, iova)));
    assert_eq!(one, other);
    one
}

/// Whatever call or step fails, several mappings are gone from both units, or all are still there.
#[test]
fn mappings_are_unmapped_in_both_units_or_in_none() {
    let rig = two_units();
    let context = rig.context();
    let (_devices, ioasid) = attached(&context);
    let mut failures = 0;
    for way in 0..3 {
        for n in 1.. {
            PLACES.iter().for_each(|(iova, to)| ioasid.map(span(*iova, 0x1000), Target::Guest(Gpa(*to)), BOTH).unwrap());
            match way {
                0 => rig.sim.fail_nth(n, Errno::EBUSY),
                1 => rig.sim.fail_from(n, Errno::EBUSY),
                _ => rig.sim.fail_step_nth(n, Errno::ENOMEM),
            }
            let unmapped = ioasid.unmap(span(0, 0x100_0000));
            rig.sim.disarm();
            if matches!(unmapped, Ok(3)) {
                assert_eq!((found(&rig), ioasid.stats().mappings), ([None; 3], 0));
                break;
            }
            failures += 1;
            assert!(matches!(unmapped, Err(Error::Kernel { errno: Errno::EBUSY, .. })), "{unmapped:?}");
            assert_eq!((found(&rig), ioasid.stats().mappings), (PLACES.map(|(_, to)| Some(to)), 3));
            assert_eq!(ioasid.unmap(span(0, 0x100_0000)).unwrap(), 3);
        }
    }
    assert!(failures >= 2, "{failures}");
}

/// A kernel that removes the first mapping and then fails, and so many further calls.
#[derive(Debug)]
struct HalfWay {
    sim: Arc<Sim>,
    failures: AtomicU64,
}

impl Before for HalfWay {
    fn behind(&self) -> &dyn Kernel {
        &*self.sim
    }

    fn passes(&self) {
        if self.failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok() {
            // Whichever address space it is; in others that is a part of something, and stays.
            for id in 1..64 {
                let _ = self.sim.ioas_unmap(IoasId(id), Iova(PLACES[0].0), 0x1000);
            }
            self.sim.fail_nth(1, Errno::EBUSY);
        }
    }
}

#[test]
fn what_a_kernel_removed_before_it_failed_is_mapped_again() {
    // So many calls fail; is the first one still known, and is it there?
    for (failures, known, there) in [(1, true, true), (2, false, false), (u64::MAX, true, false)] {
        let rig = two_units();
        {
            let kernel = Arc::new(HalfWay { sim: Arc::clone(&rig.sim), failures: AtomicU64::new(0) });
            let context = Context::with(Setup { kernel: Arc::clone(&kernel) as _, ..rig.setup() }).unwrap();
            let (_devices, ioasid) = attached(&context);
            PLACES.iter().for_each(|(iova, to)| ioasid.map(span(*iova, 0x1000), Target::Guest(Gpa(*to)), BOTH).unwrap());
            kernel.failures.store(failures, Ordering::Relaxed);
            let unmapped = ioasid.unmap(span(0, 0x100_0000));
            kernel.failures.store(0, Ordering::Relaxed);
            rig.sim.disarm();
            assert!(matches!(unmapped, Err(Error::Kernel { errno: Errno::EBUSY, .. })), "{unmapped:?}");
            let [first, rest @ ..] = PLACES.map(|(_, to)| Some(to));
            let [found_first, found_rest @ ..] = found(&rig);
            assert_eq!((found_first, found_rest), (first.filter(|_| there), rest), "{failures} calls failed");
            assert_eq!(ioasid.stats().mappings, 2 + u64::from(known), "{failures} calls failed");
            assert_eq!(ioasid.unmap(span(0, 0x100_0000)).unwrap(), 2 + u64::from(known));
            assert_eq!(found(&rig), [None; 3]);
        }
        rig.assert_clean();
    }
}

#[test]
fn what_does_not_fit_is_refused_with_the_property() {
    let rig = Rig::new(&[UnitConfig::vtd("one"), UnitConfig::smmuv3("other")], &[("nic", &[0]), ("disk", &[1])]);
    let context = rig.context();
    let (nic, disk) = (context.connect("nic").unwrap(), context.connect("disk").unwrap());
    let property = |result: Result<(), Error>| match result {
        Err(Error::Refused(refusal)) => refusal.property,
        other => panic!("{other:?}"),
    };
    let ioasid = context.allocate(Request::managed()).unwrap();
    // Where x86 units have their interrupts an SMMU has nothing, and the reverse.
    ioasid.map(span(0xfee0_0000, 0x1000), Target::Guest(Gpa(DATA)), BOTH).unwrap();
    assert_eq!(ioasid.serves(&nic, None).unwrap_err().property, Property::Iova);
    assert_eq!(property(ioasid.attach(&nic, None).map(drop)), Property::Iova);
    ioasid.serves(&disk, None).unwrap();
    ioasid.attach(&disk, None).unwrap();
    assert_eq!(rig.dma("disk", 0xfee0_0000), Some(DATA));
    assert_eq!(property(ioasid.attach(&disk, None).map(drop)), Property::Attachment);
    assert_eq!(property(ioasid.replace(&nic, None).map(drop)), Property::Attachment);
    assert_eq!(property(ioasid.detach(&nic, None)), Property::Attachment);
    assert_eq!(property(ioasid.invalidate(&[]).map(drop).and(ioasid.change(&[]))), Property::Kind);
    let other = rig_of_another();
    assert_eq!(property(ioasid.attach(&other.1, None).map(drop)), Property::Context);
    ioasid.detach(&disk, None).unwrap();
    assert_eq!(rig.dma("disk", 0xfee0_0000), None);
}

fn rig_of_another() -> (Rig, stagecraft::ioasid::Device) {
    let rig = Rig::new(&[UnitConfig::vtd("one")], &[("nic", &[0])]);
    let device = rig.context().connect("nic").unwrap();
    (rig, device)
}
