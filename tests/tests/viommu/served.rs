//! What units of the host refuse, told to guests: records of the kernel's queues, decoded by one architecture's plugin and written by another's.

use stagecraft::Iova;
use stagecraft::ioasid::{HostEvents, Strategy};
use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::UnitConfig;
use stagecraft::plugin::queue::EventAccess;
use stagecraft::viommu::{BlockedDma, Events, Limits};

use super::behaviour::{ONE, TWO, without_pasid};
use super::guests::{Arch, DATA};
use super::kernel::{IOVA, Rig};

/// A page that may be read and written, and one that may only be read; the next is nowhere.
const READ_ONLY: u64 = IOVA + 0x1000;
const NOTHING: u64 = IOVA + 0x2000;

/// Units that the kernel has a vIOMMU for.
fn hosts() -> [UnitConfig; 3] {
    [UnitConfig::smmuv3("SMMUv3"), UnitConfig::amd("AMD"), UnitConfig::riscv("RISC-V")]
}

/// Both devices are to have the same tables.
fn guest(arch: Arch, host: UnitConfig) -> (Rig, u64) {
    let rig = Rig::new(arch, host);
    let root = rig.guest.new_table();
    rig.guest.map_page(root, IOVA, DATA, true);
    rig.guest.map_page(root, READ_ONLY, DATA + 0x1000, false);
    for id in [ONE, TWO] {
        rig.guest.translate(id, root, 7);
    }
    (rig, root)
}

/// And have them.
fn rig(arch: Arch, host: UnitConfig) -> (Rig, u64) {
    let (mut rig, root) = guest(arch, host);
    for id in [ONE, TWO] {
        rig.viommu.connect(id, false);
    }
    (rig, root)
}

fn read(rig: &Rig, id: u64, iova: u64) -> BlockedDma {
    assert!(rig.device(id).read(None, Iova(iova), &mut [0; 4]).is_err(), "{iova:#x}");
    BlockedDma { requester: without_pasid(id), iova: Iova(iova), access: EventAccess::Read, privileged: false }
}

fn write(rig: &Rig, id: u64, iova: u64) -> BlockedDma {
    assert!(rig.device(id).write(None, Iova(iova), &[1; 4]).is_err(), "{iova:#x}");
    BlockedDma { requester: without_pasid(id), iova: Iova(iova), access: EventAccess::Write, privileged: false }
}

#[test]
fn guests_hear_of_what_the_hosts_units_refuse() {
    for arch in Arch::ALL {
        for host in hosts() {
            let what = format!("{arch:?} on {}", host.name);
            let (mut rig, _) = rig(arch, host);
            assert_eq!(rig.viommu.serve_events().unwrap(), Events::default(), "{what}");
            assert!(rig.device(ONE).write(None, Iova(IOVA), &[1; 4]).is_ok(), "{what}");
            let refused = [read(&rig, ONE, NOTHING + 0x10), write(&rig, TWO, READ_ONLY + 0x28), read(&rig, ONE, 0x1000)];
            let told = rig.viommu.serve_events().unwrap();
            // What a VMM would be told that knows of them by itself.
            let wanted = rig.viommu.faults(&refused);
            assert_eq!((told.records.len(), told.lost, told.silent), (3, 0, 0), "{what}");
            assert_eq!(told, wanted, "{what}");
            assert_eq!(rig.viommu.serve_events().unwrap(), Events::default(), "{what}: each is told once");
            rig.end(&what);
        }
    }
}

/// A guest is told so much at a time, and later of the rest; what the kernel had no room for is counted.
#[test]
fn what_does_not_fit_is_counted() {
    for host in hosts() {
        let what = host.name.clone();
        let (mut rig, _) = rig(Arch::Vtd, host);
        for round in 1..3 {
            for _ in 0..600 {
                read(&rig, ONE, NOTHING);
            }
            let (mut records, mut lost) = (0, 0);
            loop {
                let told = rig.viommu.serve_events().unwrap();
                assert!(told.records.len() <= Limits::default().events as usize, "{what}");
                records += told.records.len() as u64;
                lost += told.lost;
                if told.records.is_empty() {
                    break;
                }
            }
            // As many as the kernel's queue holds.
            assert_eq!((records, lost), (256, 344), "{what}");
            assert_eq!(rig.viommu.figures().lost_events, round * lost, "{what}");
        }
        // There is room again, and the count goes on.
        read(&rig, TWO, NOTHING);
        let told = rig.viommu.serve_events().unwrap();
        assert_eq!((told.records.len(), told.lost), (1, 0), "{what}");
        rig.end(&what);
    }
}

/// A device of which nobody wants to know does not keep others from being heard.
#[test]
fn nobody_is_silenced_by_another() {
    let (rig, _) = rig(Arch::Vtd, UnitConfig::smmuv3("SMMUv3"));
    for _ in 0..10 {
        for _ in 0..250 {
            read(&rig, TWO, NOTHING);
        }
        let refused = read(&rig, ONE, NOTHING);
        let context = rig.viommu.host().context();
        let one = context.device("one").unwrap();
        assert_eq!(context.host_events(&[one], 16).unwrap(), HostEvents { blocked: vec![refused], lost: 0 });
    }
    let context = rig.viommu.host().context();
    let two = context.device("two").unwrap();
    let told = context.host_events(&[two], usize::MAX).unwrap();
    assert_eq!((told.blocked.len() as u64 + told.lost, told.lost > 0), (2500, true));
    rig.end("two devices");
}

#[test]
fn what_is_known_of_other_devices_is_kept_for_them() {
    let (mut rig, _) = rig(Arch::Amd, UnitConfig::smmuv3("SMMUv3"));
    let refused = [read(&rig, ONE, NOTHING), read(&rig, TWO, NOTHING), write(&rig, ONE, READ_ONLY)];
    let context = rig.viommu.host().context().clone();
    let [one, two] = ["one", "two"].map(|label| context.device(label).unwrap());
    assert_eq!(context.host_events(&[], 16).unwrap().blocked, []);
    assert_eq!(context.host_events(&[two], 16).unwrap().blocked, refused[1..2]);
    assert_eq!(context.host_events(&[one], 16).unwrap().blocked, [refused[0], refused[2]]);
    assert_eq!(rig.viommu.serve_events().unwrap(), Events::default());
    // A device that goes: nobody is told of it, and others are.
    read(&rig, ONE, NOTHING);
    let other = read(&rig, TWO, NOTHING);
    assert_eq!(context.host_events(&[], 16).unwrap().blocked, []);
    rig.viommu.disconnect(ONE);
    rig.viommu.host_mut().disconnect(ONE);
    let told = rig.viommu.serve_events().unwrap();
    assert_eq!(told, rig.viommu.faults(&[other]));
    // Another one that the guest gives the same number is told nothing of what this one did.
    let one = rig.viommu.host_mut().connect(ONE, "one").unwrap();
    assert_eq!(context.host_events(&[one], 16).unwrap(), HostEvents::default());
    drop(context);
    rig.end("devices");
}

/// The queue goes with the last address space under it, and is read before.
#[test]
fn what_was_refused_at_last_is_told() {
    for host in hosts() {
        let what = host.name.clone();
        let (mut rig, root) = rig(Arch::Vtd, host);
        let refused = read(&rig, ONE, NOTHING);
        for id in [ONE, TWO] {
            rig.guest.abort(id);
        }
        rig.commands(&[Arch::Vtd.forget_device(ONE, 7), Arch::Vtd.forget_device(TWO, 7)]);
        assert_eq!(rig.viommu.figures().spaces, 0, "{what}");
        rig.guest.translate(ONE, root, 7);
        rig.commands(&[Arch::Vtd.forget_device(ONE, 7)]);
        // Nor is it lost because the next queue cannot be read.
        rig.sim.fail_nth(1, Errno::EIO);
        assert!(rig.viommu.serve_events().is_err(), "{what}");
        let told = rig.viommu.serve_events().unwrap();
        assert_eq!((told.records.len(), told.lost), (1, 0), "{what}");
        assert_eq!(told, rig.viommu.faults(&[refused]), "{what}");
        rig.end(&what);
    }
}

#[test]
fn nothing_is_lost_by_a_kernel_that_cannot_be_asked() {
    let (mut rig, _) = rig(Arch::Smmu, UnitConfig::riscv("RISC-V"));
    let refused = [read(&rig, ONE, NOTHING), write(&rig, ONE, READ_ONLY)];
    rig.sim.fail_nth(1, Errno::EIO);
    let error = rig.viommu.serve_events().unwrap_err().to_string();
    assert!(error.contains("reading events"), "{error}");
    let told = rig.viommu.serve_events().unwrap();
    assert_eq!((told.records.len(), told.lost), (2, 0));
    assert_eq!(told, rig.viommu.faults(&refused));
    rig.end("a kernel that fails");
}

/// Kernels had vIOMMUs before they had queues for them.
#[test]
fn a_kernel_without_event_queues_nests_all_the_same() {
    for errno in [Errno::EOPNOTSUPP, Errno::ENOTTY] {
        let mut silent = 0;
        for n in 1.. {
            let (mut rig, _) = guest(Arch::Vtd, UnitConfig::smmuv3("SMMUv3"));
            rig.sim.fail_nth(n, errno);
            rig.viommu.connect(ONE, false);
            let is_over = rig.sim.disarm();
            if rig.space(ONE).is_some() && rig.strategy(ONE) == Strategy::Nested {
                assert_eq!(rig.reads(ONE, IOVA), Some(DATA), "call {n}");
                read(&rig, ONE, NOTHING);
                let told = rig.viommu.serve_events().unwrap();
                assert_eq!((told.lost, told.silent), (0, 0), "call {n}");
                silent += u32::from(told.records.is_empty());
            }
            rig.end(&format!("{errno} in call {n}"));
            if is_over {
                break;
            }
        }
        assert_eq!(silent, 1, "{errno}: one call makes the queue");
    }
}
