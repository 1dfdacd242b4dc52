//! DMA from several threads while the kernel and the owner of the tables change things: never a failure where nothing changed, never stale after a
//! call returned.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::nested::{ALL, Arch, Rig};
use super::{BASE, Lab, PAGE};
use crate::Iova;
use crate::kernel::handle::{Device, Ioas, PageTable};
use crate::kernel::sim::{DmaAccess, Reason, UnitConfig};

/// Tells the threads to stop when it goes, also by a panic: one that fails must not leave the others running.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `change` while two threads do DMA with `check` all the time; both must have been at it before the end.
fn meanwhile(check: impl Fn() + Sync, change: impl FnOnce()) {
    let (stop, done) = (AtomicBool::new(false), [AtomicU64::new(0), AtomicU64::new(0)]);
    std::thread::scope(|scope| {
        for count in &done {
            let (stop, check) = (&stop, &check);
            scope.spawn(move || {
                let _stop = Stop(stop);
                while !stop.load(Ordering::Relaxed) {
                    check();
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while done.iter().any(|count| count.load(Ordering::Relaxed) < 10) && !stop.load(Ordering::Relaxed) {
            std::thread::yield_now();
        }
        let _stop = Stop(&stop);
        change();
    });
}

#[test]
fn replacing_is_hitless() {
    let lab = Lab::new(vec![UnitConfig::vtd("u")]);
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let spaces = [Ioas::alloc(&lab.kernel).unwrap(), Ioas::alloc(&lab.kernel).unwrap()];
    // One page is the same in both; another is where the space says.
    for (ioas, gpa) in spaces.iter().zip([BASE + PAGE, BASE + 2 * PAGE]) {
        lab.map(ioas.id(), 0x1000, BASE, PAGE).unwrap();
        lab.map(ioas.id(), 0x2000, gpa, PAGE).unwrap();
    }
    let dma = lab.sim.device("dev0").unwrap();
    let mut attachment = device.attach(None, PageTable::Ioas(&spaces[0])).unwrap();
    meanwhile(
        || {
            let found = dma.translate(None, Iova(0x1000), DmaAccess::Write).unwrap();
            assert_eq!(found.user_address, lab.user);
            let mut bytes = [0; 64];
            dma.read(None, Iova(0x1fc0), &mut bytes).unwrap();
        },
        || {
            for round in 1..400 {
                attachment.replace(PageTable::Ioas(&spaces[round % 2])).unwrap();
                let found = dma.translate(None, Iova(0x2000), DmaAccess::Read).unwrap();
                assert_eq!(found.user_address, lab.at(BASE + PAGE + PAGE * (round as u64 % 2)), "the new one, once the call has returned");
            }
        },
    );
    assert_eq!(lab.sim.faults(), 0);
    drop((attachment, device, spaces));
    lab.assert_clean();
}

#[test]
fn unmap_waits_for_transactions() {
    let lab = Lab::new(vec![UnitConfig::smmuv3("u")]);
    let device = Device::bind(&lab.kernel, "dev0").unwrap();
    let ioas = Ioas::alloc(&lab.kernel).unwrap();
    let attachment = device.attach(None, PageTable::Ioas(&ioas)).unwrap();
    let dma = lab.sim.device("dev0").unwrap();
    let target = BASE + 3 * PAGE;
    meanwhile(
        || {
            if let Err(fault) = dma.write(None, Iova(0x5000), &[0xee; 4096]) {
                assert_eq!(fault.reason, Reason::NotPresent);
            }
        },
        || {
            for _ in 0..300 {
                lab.map(ioas.id(), 0x5000, target, PAGE).unwrap();
                std::thread::yield_now();
                lab.kernel.ioas_unmap(ioas.id(), Iova(0x5000), PAGE).unwrap();
                // The memory is the owner's again: nothing that was on its way may arrive now.
                lab.store(target + PAGE - 8, 0);
                for _ in 0..50 {
                    assert_eq!(lab.load(target + PAGE - 8), 0);
                }
            }
        },
    );
    drop((attachment, device, ioas));
    lab.assert_clean();
}

#[test]
fn detaching_and_invalidating_wait_for_transactions() {
    let target = BASE + 0x40_0000;
    let quiet = |lab: &Lab| {
        // The memory is the owner's again: nothing that was on its way may arrive now.
        lab.store(target + PAGE - 8, 0);
        for _ in 0..50 {
            assert_eq!(lab.load(target + PAGE - 8), 0);
        }
    };
    for arch in ALL {
        let rig = Rig::new(arch);
        let dma = rig.dma.clone();
        meanwhile(
            || {
                let _ = dma.write(None, Iova(0x5000), &[0xee; 4096]);
            },
            || {
                for _ in 0..200 {
                    rig.leaf(0x5000, target);
                    std::thread::yield_now();
                    rig.set(0x5000, 0, 0);
                    rig.invalidate(Some(0x5000), true);
                    quiet(&rig.lab);
                }
            },
        );
        rig.finish();
    }
    let lab = Lab::new(vec![UnitConfig::riscv("u")]);
    let (device, ioas) = (Device::bind(&lab.kernel, "dev0").unwrap(), Ioas::alloc(&lab.kernel).unwrap());
    lab.map(ioas.id(), 0x5000, target, PAGE).unwrap();
    let dma = lab.sim.device("dev0").unwrap();
    meanwhile(
        || {
            let _ = dma.write(None, Iova(0x5000), &[0xee; 4096]);
        },
        || {
            for _ in 0..200 {
                let attachment = device.attach(None, PageTable::Ioas(&ioas)).unwrap();
                std::thread::yield_now();
                drop(attachment);
                quiet(&lab);
            }
        },
    );
    drop((device, ioas));
    lab.assert_clean();
}

#[test]
fn neighbours_change_and_nothing_is_stale() {
    for arch in ALL {
        let rig = Rig::new(arch);
        let (target, other) = (BASE + 0x40_0000, BASE + 0x50_0000);
        rig.leaf(0x1000, target);
        rig.leaf(0x2000, other);
        // In threads that do not change the tables.
        let (dma, expected) = (rig.dma.clone(), target);
        meanwhile(
            || {
                let found = dma.translate(None, Iova(0x1000), DmaAccess::Write).unwrap();
                assert_eq!(found.address.0, expected, "{arch:?}");
                let _ = dma.translate(None, Iova(0x2000), DmaAccess::Write);
            },
            || {
                for round in 0..300 {
                    let to = other + PAGE * (round % 16);
                    rig.leaf(0x2000, to);
                    rig.invalidate(Some(0x2000), true);
                    assert_eq!(rig.reached(0x2000), Ok(to), "{arch:?}");
                    rig.set(0x2000, 0, 0);
                    rig.invalidate(if round % 2 == 0 { None } else { Some(0x2000) }, false);
                    assert_eq!(rig.reached(0x2000).map_err(|(reason, _)| reason), Err(Reason::NotPresent), "{arch:?}");
                }
            },
        );
        rig.finish();
    }
}

#[test]
fn dirty_bits_race_with_the_owner() {
    // The owner clears the leaf while hardware sets its bits: an entry that was cleared must never come back.
    for arch in [Arch::Vtd, Arch::Amd, Arch::Riscv] {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, BASE + 0x40_0000);
        let slot = rig.slot(0x1000, 0);
        let dma = rig.dma.clone();
        meanwhile(
            || {
                let _ = dma.translate(None, Iova(0x1000), DmaAccess::Write);
            },
            || {
                for _ in 0..500 {
                    rig.lab.store(slot, arch.leaf(BASE + 0x40_0000, 0, true));
                    rig.invalidate(Some(0x1000), true);
                    rig.lab.store(slot, 0);
                    rig.invalidate(Some(0x1000), true);
                    assert_eq!(rig.lab.load(slot), 0, "{arch:?}");
                }
            },
        );
        rig.finish();
    }
}

#[test]
fn kernel_calls_from_many_threads() {
    let lab = Lab::new(vec![UnitConfig::vtd("u"), UnitConfig::amd("v")]);
    std::thread::scope(|scope| {
        for (thread, label) in (0..).zip(["dev0", "twin0", "dev1", "twin1"]) {
            let lab = &lab;
            scope.spawn(move || {
                let dma = lab.sim.device(label).unwrap();
                for round in 0..40 {
                    let device = Device::bind(&lab.kernel, label).unwrap();
                    let ioas = Ioas::alloc(&lab.kernel).unwrap();
                    let attachment = device.attach(None, PageTable::Ioas(&ioas)).unwrap();
                    lab.map(ioas.id(), 0x1000, BASE + thread * PAGE, PAGE).unwrap();
                    dma.write(None, Iova(0x1000), &[round]).unwrap();
                    assert_eq!(lab.load(BASE + thread * PAGE) & 0xff, u64::from(round));
                    drop((attachment, ioas, device));
                    assert!(dma.write(None, Iova(0x1000), &[round]).is_err());
                }
            });
        }
    });
    lab.assert_clean();
}
