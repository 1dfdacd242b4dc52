//! Every kernel call of a sequence fails once, and every step inside of calls: nothing is leaked, and the next attempt works.

use super::nested::{ALL, Arch, Rig};
use super::{BASE, Lab, PAGE, RW, SIZE};
use crate::Iova;
use crate::kernel::handle::{Device, FaultQueue, Ioas, PageTable};
use crate::kernel::sim::{Call, DmaAccess, UnitConfig};
use crate::kernel::{CopyRange, Errno, HwptFlags, Invalidate, InvalidateTarget, Pasid, Result, hwpt_data, invalidate_data, viommu_type};

/// Everything that the trait has, in a sequence that succeeds: two devices behind two units, a copy, a nested page table in a vIOMMU, a PASID, a
/// replacement, a queue.
fn sequence(lab: &Lab) -> Result<()> {
    let (arm, vtd) = (Device::bind(&lab.kernel, "dev0")?, Device::bind(&lab.kernel, "dev1")?);
    lab.kernel.hw_info(arm.id())?;
    let (gpa, guest) = (Ioas::alloc(&lab.kernel)?, Ioas::alloc(&lab.kernel)?);
    lab.map(gpa.id(), BASE, BASE, SIZE)?;
    let queue = FaultQueue::alloc(&lab.kernel)?;
    let parent = gpa.hwpt(&arm, HwptFlags::NEST_PARENT, None)?;
    let viommu = parent.viommu(&arm, viommu_type::ARM_SMMUV3)?;
    let _vdevice = viommu.vdevice(&arm, 0x42)?;
    let events = viommu.event_queue(viommu_type::ARM_SMMUV3, 8)?;
    let ste = [(1u64 | 5 << 1 | BASE).to_ne_bytes(), [0; 8]].concat();
    let nested = viommu.nested(&arm, HwptFlags::NONE, (hwpt_data::ARM_SMMUV3, &ste), Some(&queue))?;
    let mut first = arm.attach(None, PageTable::Ioas(&gpa))?;
    first.replace(PageTable::Hwpt(&nested))?;
    let copy = CopyRange {
        flags: RW,
        destination: guest.id(),
        destination_iova: Some(Iova(0x1000)),
        source: gpa.id(),
        source_iova: Iova(BASE),
        length: 4 * PAGE,
    };
    lab.kernel.ioas_copy(&copy)?;
    let own = guest.hwpt(&vtd, HwptFlags::PASID | HwptFlags::DIRTY_TRACKING, None)?;
    let _second = vtd.attach(None, PageTable::Hwpt(&own))?;
    let _third = vtd.attach(Some(Pasid(3)), PageTable::Ioas(&guest))?;
    lab.kernel.set_dirty_tracking(own.id(), true)?;
    lab.kernel.ioas_unmap(guest.id(), Iova(0x1000), 4 * PAGE)?;
    lab.kernel.ioas_copy(&copy)?;
    let all = Invalidate { target: InvalidateTarget::Viommu(viommu.id()), data_type: invalidate_data::ARM_SMMUV3, entry_length: 16, entries: &[] };
    lab.kernel.hwpt_invalidate(&all).map_err(|error| error.errno)?;
    lab.kernel.ioas_iova_ranges(guest.id())?;
    lab.kernel.read_events(events.id())?;
    lab.kernel.read_faults(queue.id())?;
    Ok(())
}

#[test]
fn every_call_and_every_step_fails_once() {
    let lab = Lab::new(vec![UnitConfig::smmuv3("arm"), UnitConfig::vtd("vtd")]);
    let (dev0, dev1) = (lab.sim.device("dev0").unwrap(), lab.sim.device("dev1").unwrap());
    let blocked = || {
        for (device, iova) in [(&dev0, BASE), (&dev1, 0x1000)] {
            assert!(device.translate(None, Iova(iova), DmaAccess::Read).is_err(), "nothing may be mapped any more");
        }
    };
    let mut counts = Vec::new();
    for steps in [false, true] {
        for n in 1.. {
            if steps {
                lab.sim.fail_step_nth(n, Errno::ENOMEM);
            } else {
                lab.sim.fail_nth(n, Errno::EINTR);
            }
            let result = sequence(&lab);
            let waiting = lab.sim.disarm();
            lab.assert_clean();
            blocked();
            if waiting {
                assert_eq!(result, Ok(()));
                counts.push(n - 1);
                break;
            }
            assert_eq!(result, Err(if steps { Errno::ENOMEM } else { Errno::EINTR }), "{n}, steps: {steps}");
        }
    }
    assert_eq!(sequence(&lab), Ok(()));
    assert!(counts[0] >= 25 && counts[1] >= 20, "calls and steps that failed: {counts:?}");
}

#[test]
fn a_failed_replacement_leaves_the_old_one() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let (old, new) = (Ioas::alloc(&lab.kernel).unwrap(), Ioas::alloc(&lab.kernel).unwrap());
    lab.map(old.id(), 0x1000, BASE, PAGE).unwrap();
    lab.map(new.id(), 0x1000, BASE + PAGE, PAGE).unwrap();
    let mut attachment = device.attach(None, PageTable::Ioas(&old)).unwrap();
    let ranges = lab.kernel.ioas_iova_ranges(old.id()).unwrap();
    let dma = lab.sim.device("dev0").unwrap();
    let reached = || dma.translate(None, Iova(0x1000), DmaAccess::Read).unwrap().user_address;
    for n in 1.. {
        let objects = lab.sim.objects();
        lab.sim.fail_step_nth(n, Errno::ENOMEM);
        let result = attachment.replace(PageTable::Ioas(&new));
        if lab.sim.disarm() {
            assert!(n > 3, "{n}");
            break;
        }
        assert_eq!(result, Err(Errno::ENOMEM));
        assert_eq!((reached(), lab.sim.pinned_pages(), lab.sim.objects()), (lab.user, 1, objects), "step {n}");
        assert_eq!(lab.kernel.ioas_iova_ranges(old.id()).unwrap(), ranges);
        assert_eq!(lab.kernel.ioas_iova_ranges(new.id()).unwrap().ranges, [crate::Span::ALL]);
    }
    assert_eq!((reached(), lab.sim.pinned_pages()), (lab.user + PAGE, 1));
    assert_eq!(lab.kernel.ioas_iova_ranges(old.id()).unwrap().ranges, [crate::Span::ALL]);
    drop((attachment, device, old, new));
    lab.assert_clean();
}

#[test]
fn calls_are_counted_by_kind() {
    let rig = Rig::new(Arch::Arm);
    let before = rig.lab.sim.calls();
    rig.invalidate(Some(0x1000), true);
    rig.send(&[0x10, 0, 0x10, 0]).unwrap();
    let after = rig.lab.sim.calls();
    assert_eq!(after[&Call::Invalidate] - before.get(&Call::Invalidate).copied().unwrap_or(0), 2);
    assert_eq!(after[&Call::Map], before[&Call::Map]);
    assert_eq!(rig.lab.sim.calls_total(), after.values().sum::<u64>());
    rig.finish();
}

#[test]
fn a_failed_invalidation_drops_nothing() {
    for arch in ALL {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, BASE + 0x40_0000);
        rig.reached(0x1000).unwrap();
        rig.set(0x1000, 0, 0);
        rig.lab.sim.fail_nth(1, Errno::EINTR);
        let words = match arch {
            Arch::Vtd => vec![0, u64::MAX, 0],
            _ => vec![0x10, 0],
        };
        assert_eq!(rig.send(&words), Err((0, Errno::EINTR)));
        assert_eq!(rig.reached(0x1000), Ok(BASE + 0x40_0000), "{arch:?}");
        rig.finish();
    }
}
