//! A guest with a vIOMMU moves to a host with another IOMMU, and goes on.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::Iova;
use stagecraft::ioasid::{Context, Error, Ioasid, Property, Restored, Saved};
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::viommu::{ContextSpaces, StreamState};

use super::behaviour::{ONE, TWO, without_pasid};
use super::guests::{Arch, DATA};
use super::kernel::{IOVA, Rig};

/// A guest whose first device has a table with some pages, and whose second one sees memory as it is.
fn running(arch: Arch, host: UnitConfig) -> (Rig, u64) {
    let mut rig = Rig::new(arch, host);
    let root = rig.guest.new_table();
    for page in 0..4 {
        rig.guest.map_page(root, IOVA + (page << 12), DATA + (page << 12), true);
    }
    rig.guest.translate(ONE, root, 7);
    rig.guest.bypass(TWO);
    for id in [ONE, TWO] {
        let handled = rig.viommu.connect(id, false);
        assert!(handled.loose.is_empty() && matches!(rig.viommu.stream(without_pasid(id)), Some(StreamState::Space(_))));
    }
    rig.guest.unmap_page(root, IOVA + 0x1000);
    rig.commands(&[arch.forget_page(7, IOVA + 0x1000)]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000), rig.reads(TWO, DATA)), (Some(DATA), None, Some(DATA)));
    (rig, root)
}

/// The context as it was, over the other host, and what keeps it alive until the vIOMMU has taken over.
fn arrive(from: &Rig, host: UnitConfig) -> (Rig, Restored) {
    let text = serde_json::to_string(&from.viommu.host().context().save()).unwrap();
    let saved: Saved = serde_json::from_str(&text).unwrap();
    let mut kept = None;
    let rig = Rig::over(from.guest.moved(), host, Rig::template(), |setup| {
        let restored = saved.restore(setup, |_, _| None).unwrap();
        let context = restored.context.clone();
        kept = Some(restored);
        context
    });
    (rig, kept.unwrap())
}

fn moves(arch: Arch, from: UnitConfig, to: UnitConfig) {
    let what = format!("{arch:?} from {} to {}, nesting: {}", from.name, to.name, to.nesting);
    let (first, root) = running(arch, from);
    let (mut rig, restored) = arrive(&first, to);
    drop(first);
    // What was restored is right before any vIOMMU looks.
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000), rig.reads(TWO, DATA)), (Some(DATA), None, Some(DATA)), "{what}");
    let device = rig.sim.device("one").unwrap();
    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let dma = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                device.read(None, Iova(IOVA), &mut [0; 8]).unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        });
        let begun = |than: u64| {
            while done.load(Ordering::Relaxed) <= than && !dma.is_finished() {
                std::thread::yield_now();
            }
        };
        begun(0);
        for id in [ONE, TWO] {
            let handled = rig.viommu.connect(id, false);
            assert!(handled.loose.is_empty(), "{what}: {handled:?}");
        }
        begun(done.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        assert!(dma.join().is_ok(), "{what}: a transaction missed");
    });
    let ids: Vec<_> = restored.ioasids.iter().map(Ioasid::id).collect();
    drop(restored);
    let context = rig.viommu.host().context().clone();
    assert!(ids.iter().all(|id| context.ioasid(*id).is_none()), "{what}: what was restored is gone");
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000), rig.reads(TWO, DATA)), (Some(DATA), None, Some(DATA)), "{what}");
    // The guest goes on: commands, written tables, structures.
    rig.guest.unmap_page(root, IOVA);
    rig.guest.map_page(root, IOVA + 0x1000, DATA + 0x8000, true);
    rig.commands(&[arch.forget_page(7, IOVA), arch.forget_page(7, IOVA + 0x1000)]);
    assert_eq!((rig.reads(ONE, IOVA), rig.reads(ONE, IOVA + 0x1000)), (None, Some(DATA + 0x8000)), "{what}");
    let slot = rig.guest.map_page(root, IOVA + 0x9000, DATA + 0x9000, true);
    rig.viommu.table_written(slot, 8);
    assert_eq!(rig.reads(ONE, IOVA + 0x9000), Some(DATA + 0x9000), "{what}");
    rig.guest.translate(TWO, root, 7);
    rig.commands(&[arch.forget_device(TWO, 1)]);
    assert_eq!((rig.reads(TWO, IOVA + 0x9000), rig.reads(TWO, DATA)), (Some(DATA + 0x9000), None), "{what}");
    rig.guest.abort(ONE);
    rig.commands(&[arch.forget_device(ONE, 7)]);
    assert_eq!(rig.reads(ONE, IOVA + 0x9000), None, "{what}");
    assert_eq!(rig.viommu.figures().host_errors, 0, "{what}");
    for id in [ONE, TWO] {
        rig.viommu.disconnect(id);
        rig.viommu.host_mut().disconnect(id);
    }
    assert!(rig.watched.0.lock().unwrap().is_empty(), "{what}");
    let Rig { viommu, sim, .. } = rig;
    drop((viommu, context));
    assert_eq!((sim.objects(), sim.pinned_pages(), sim.areas()), (0, 0, 0), "{what}: nothing is left in the kernel");
}

#[test]
fn a_guest_with_a_viommu_goes_on_at_a_host_with_another_iommu() {
    let units = [UnitConfig::vtd("VT-d"), UnitConfig::smmuv3("SMMUv3"), UnitConfig::amd("AMD"), UnitConfig::riscv("RISC-V")];
    for arch in Arch::ALL {
        for (index, from) in units.iter().enumerate() {
            let to = &units[(index + 1) % units.len()];
            moves(arch, from.clone(), to.clone());
        }
        moves(arch, units[0].clone(), units[0].clone().without_nesting());
        moves(arch, units[1].clone().without_nesting(), units[1].clone());
    }
}

/// A stream that the guest blocks is blocked, whatever was restored for it.
#[test]
fn what_was_restored_and_is_not_wanted_any_more_is_blocked() {
    for arch in Arch::ALL {
        let (first, _) = running(arch, UnitConfig::vtd("VT-d"));
        let (mut rig, restored) = arrive(&first, UnitConfig::amd("AMD"));
        rig.guest.abort(ONE);
        assert_eq!(rig.reads(ONE, IOVA), Some(DATA));
        let handled = rig.viommu.connect(ONE, false);
        assert!(handled.loose.is_empty(), "{handled:?}");
        assert_eq!(rig.reads(ONE, IOVA), None, "{arch:?}");
        assert!(matches!(rig.viommu.stream(without_pasid(ONE)), Some(StreamState::Blocked(_))));
        drop(restored);
        assert_eq!(rig.reads(TWO, DATA), Some(DATA), "{arch:?}: nobody has looked at it yet");
    }
}

#[test]
fn a_restored_device_is_taken_over_once_and_under_its_number() {
    let (first, _) = running(Arch::Smmu, UnitConfig::vtd("VT-d"));
    let saved = first.viommu.host().context().save();
    let mut kept = None;
    let _rig = Rig::over(first.guest.moved(), UnitConfig::amd("AMD"), Rig::template(), |setup| {
        let restored = saved.restore(setup, |_, _| None).unwrap();
        let context: Context = restored.context.clone();
        let mut other = ContextSpaces::new(context.clone(), Rig::template());
        let refused = other.connect(ONE + 1, "one").unwrap_err();
        assert!(matches!(refused, Error::Refused(refusal) if refusal.property == Property::Attachment), "as another one than it was");
        kept = Some(restored);
        context
    });
    let context = kept.unwrap().context;
    assert!(matches!(ContextSpaces::new(context, Rig::template()).connect(ONE, "one"), Err(Error::Kernel { .. })), "another vIOMMU has it");
}
