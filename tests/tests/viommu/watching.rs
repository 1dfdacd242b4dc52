//! The same with a real watcher: userfaultfd protects the pages that hold tables and structures, and the guest is a thread that just writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use stagecraft::plugin::{Policy, Supervisor};
use stagecraft::viommu::{Limits, UnitConfig, Viommu, Watching};
use stagecraft::watch::{UffdWatcher, WatchError, Writers};
use vm_memory::GuestMemoryMmap;

use super::behaviour::{ONE, plugin};
use super::guests::{Arch, DATA, Guest};
use super::host::Host;

const IOVA: u64 = 0x12_3456_7000;

/// A guest that announces nothing: it maps pages, and moves its device to another table, while somebody serves its writes.
#[test]
fn a_guest_that_only_writes_is_followed() {
    let guest = Guest::new(Arch::Riscv);
    let space = Arc::new(guest.memory.clone());
    let uffd = match UffdWatcher::new(&space, Writers::UserMode) {
        Ok(uffd) => uffd,
        Err(error @ (WatchError::Forbidden(_) | WatchError::NoUserfaultfd | WatchError::NoWriteProtection)) => {
            stagecraft_tests::skipped(&format!("a guest that is watched with userfaultfd: {error}"));
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let watching: Watching<UffdWatcher<Arc<GuestMemoryMmap>>> = Watching::new(uffd);
    let supervisor = Supervisor::new(plugin("riscv-iommu"), Policy::default());
    let host = Host::new(&guest.memory, &Guest::map(), &[ONE], Supervisor::new(plugin("intel-vtd"), Policy::default()));
    let unit = UnitConfig { kind: "riscv-iommu".to_owned(), registers: Arch::Riscv.registers(), map: Guest::map(), limits: Limits::default() };
    let mut viommu = Viommu::new(supervisor, unit, guest.memory.clone(), host, Box::new(watching.clone()));
    let roots = [guest.new_table(), guest.new_table()];
    (0..64).for_each(|page| guest.store(DATA + (page << 12), DATA + (page << 12)));
    guest.map_page(roots[1], IOVA, DATA + 0x3000, true);
    guest.translate(ONE, roots[0], 7);
    viommu.connect(ONE, false);
    let device = viommu.host().device(ONE);
    let reads = |iova: u64| {
        let mut bytes = [0; 8];
        device.read(None, stagecraft::Iova(iova), &mut bytes).ok().map(|()| u64::from_le_bytes(bytes))
    };
    let wait = |iova: u64, wanted: u64| {
        let start = Instant::now();
        // The write is over when the page is served, and served when it is told: after that DMA passes.
        while reads(iova) != Some(wanted) {
            assert!(start.elapsed() < Duration::from_secs(60), "the write was never followed");
            std::thread::yield_now();
        }
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (guest, stop, reads) = (&guest, &stop, &reads);
        let writer = scope.spawn(move || {
            for page in 0..32 {
                assert_eq!(reads(IOVA + (page << 12)), None);
                guest.map_page(roots[0], IOVA + (page << 12), DATA + (page << 12), true);
                wait(IOVA + (page << 12), DATA + (page << 12));
            }
            // Another table, by one word of the device context.
            guest.store(guest.structure(ONE) + 24, 9 << 60 | roots[1] >> 12);
            wait(IOVA, DATA + 0x3000);
            stop.store(true, Ordering::Relaxed);
        });
        while !stop.load(Ordering::Relaxed) && !writer.is_finished() {
            watching.serve(&mut viommu).unwrap();
            std::thread::yield_now();
        }
        writer.join().unwrap();
    });
    assert_eq!(reads(IOVA + 0x1000), None, "it was mapped in the first table");
    assert_eq!(viommu.supervisor().figures().failures, 0);
    drop(viommu);
}
