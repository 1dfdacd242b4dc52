//! With real memory of this process and real writers. Where the kernel forbids it, each test says so.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_memory::{Bytes as _, FileOffset, GuestAddress, GuestMemoryMmap};

use super::{UffdWatcher, WatchError, Watcher, Writers};
use crate::Gpa;

type Memory = GuestMemoryMmap<()>;

const PAGE: u64 = 4096;
const RAM: u64 = 0x4000_0000;
const PAGES: u64 = 64;

fn file() -> File {
    File::from(rustix::fs::memfd_create("stagecraft-watch", rustix::fs::MemfdFlags::CLOEXEC).unwrap())
}

/// Anonymous memory, and memory of a file.
fn memories() -> Vec<(&'static str, Arc<Memory>)> {
    let bytes = (PAGES * PAGE) as usize;
    let file = file();
    file.set_len(bytes as u64).unwrap();
    let shared = Memory::from_ranges_with_files([(GuestAddress(RAM), bytes, Some(FileOffset::new(file, 0)))]).unwrap();
    let anonymous = Memory::from_ranges(&[(GuestAddress(RAM), bytes)]).unwrap();
    vec![("anonymous", Arc::new(anonymous)), ("shared", Arc::new(shared))]
}

/// Runs `test` on each kind of memory, with a watcher for `writers`; says plainly what the kernel does not allow.
fn each(writers: Writers, test: impl Fn(&Memory, UffdWatcher<Arc<Memory>>)) {
    for (kind, memory) in memories() {
        match UffdWatcher::new(&memory, writers) {
            Ok(watcher) => test(&memory, watcher),
            Err(error @ (WatchError::Forbidden(_) | WatchError::NoUserfaultfd | WatchError::NoWriteProtection | WatchError::Memory { .. })) => {
                skipped(&format!("userfaultfd with {kind} memory, {writers:?}: {error}"));
            }
            Err(error) => panic!("{kind} memory: {error}"),
        }
    }
}

/// Says what is left out: `cargo xtask test` names it at the end.
fn skipped(what: &str) {
    eprintln!("skipped: {what}");
    if let Some(file) = std::env::var_os("STAGECRAFT_SKIPPED") {
        let mut file = File::options().append(true).create(true).open(file).unwrap();
        file.write_all(format!("{what}\n").as_bytes()).unwrap();
    }
}

fn page(number: u64) -> Gpa {
    Gpa(RAM + number * PAGE)
}

fn store(memory: &Memory, address: u64, value: u64) {
    memory.store(value, GuestAddress(address), Ordering::Release).unwrap();
}

fn load(memory: &Memory, address: u64) -> u64 {
    memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
}

/// What is reported, until `done`.
fn serve_until(watcher: &mut impl Watcher, done: impl Fn() -> bool) -> BTreeMap<u64, usize> {
    let mut reports = BTreeMap::new();
    loop {
        let last = done();
        watcher
            .serve(&mut |at, length| {
                assert!(length >= PAGE);
                *reports.entry(at.0).or_default() += 1;
            })
            .unwrap();
        if last {
            return reports;
        }
        std::thread::yield_now();
    }
}

#[test]
fn every_write_to_a_watched_page_is_reported_and_no_other() {
    for writers in [Writers::All, Writers::UserMode] {
        each(writers, |memory, mut watcher| {
            // One page that was touched before, and others that nobody touched.
            store(memory, page(2).0, 1);
            (0..PAGES).step_by(2).for_each(|number| watcher.watch(page(number)).unwrap());
            // Nobody serves, and this thread gets through.
            (1..PAGES).step_by(2).for_each(|number| store(memory, page(number).0 + 8, number));
            (0..PAGES).for_each(|number| assert!(load(memory, page(number).0) <= 1, "reading is free"));
            let done = AtomicBool::new(false);
            let reports = std::thread::scope(|scope| {
                scope.spawn(|| {
                    (0..PAGES).for_each(|number| store(memory, page(number).0 + 16, number + 1));
                    done.store(true, Ordering::Release);
                });
                serve_until(&mut watcher, || done.load(Ordering::Acquire))
            });
            assert_eq!(reports.keys().copied().collect::<Vec<_>>(), (0..PAGES).step_by(2).map(|number| page(number).0).collect::<Vec<_>>());
            assert!(reports.values().all(|count| *count == 1), "not watched again before it is rearmed: {reports:?}");
            (0..PAGES).for_each(|number| assert_eq!(load(memory, page(number).0 + 16), number + 1));
            // Nothing is watched any more.
            (0..PAGES).for_each(|number| store(memory, page(number).0, 5));
        });
    }
}

/// The order protect, then read: while a page is watched nobody gets to write to it, so what was read after rearming is all that any writer finished.
#[test]
fn no_write_is_lost_between_rearming_and_reading() {
    const WRITES: u64 = 20_000;
    each(Writers::All, |memory, mut watcher| {
        let pages = [page(3), page(7)];
        pages.iter().for_each(|page| watcher.watch(*page).unwrap());
        let finished = [AtomicU64::new(0), AtomicU64::new(0)];
        let (mut known, mut rounds) = ([0, 0], 0_u64);
        std::thread::scope(|scope| {
            for (page, finished) in pages.iter().zip(&finished) {
                scope.spawn(move || {
                    for value in 1..=WRITES {
                        store(memory, page.0 + 24, value);
                        finished.store(value, Ordering::Release);
                        if value % 16 == 0 {
                            std::thread::yield_now();
                        }
                    }
                });
            }
            while known != [WRITES; 2] {
                // Both pages are watched here.
                for (known, finished) in known.iter().zip(&finished) {
                    let finished = finished.load(Ordering::Acquire);
                    assert!(*known >= finished, "{finished} was written, nobody said so, and {known} is the last that was read");
                }
                let mut reported = Vec::new();
                watcher.serve(&mut |at, _| reported.push(at)).unwrap();
                // Writers get some way, or none.
                (0..rounds % 4).for_each(|_| std::thread::yield_now());
                for at in reported {
                    watcher.rearm(at).unwrap();
                    // Time for writers, who must not get anywhere now.
                    (0..rounds % 8).for_each(|_| std::thread::yield_now());
                    let index = usize::from(at == pages[1]);
                    known[index] = load(memory, at.0 + 24);
                }
                rounds += 1;
            }
        });
        assert!(rounds > 1);
    });
}

/// Device models and vCPUs write through the kernel.
#[test]
fn writes_by_the_kernel_are_reported() {
    each(Writers::All, |memory, mut watcher| {
        watcher.watch(page(1)).unwrap();
        let mut file = file();
        file.write_all(&[7; 3 * PAGE as usize]).unwrap();
        file.rewind().unwrap();
        let done = AtomicBool::new(false);
        let reports = std::thread::scope(|scope| {
            let done = &done;
            scope.spawn(move || {
                memory.read_exact_volatile_from(GuestAddress(RAM), &mut file, 3 * PAGE as usize).unwrap();
                done.store(true, Ordering::Release);
            });
            serve_until(&mut watcher, || done.load(Ordering::Acquire))
        });
        assert_eq!(reports.into_keys().collect::<Vec<_>>(), [page(1).0]);
        assert_eq!(load(memory, page(1).0), 0x0707_0707_0707_0707);
    });
}

/// Starts a writer to `page(9)`, waits until it is on its way, and sees it end after `release`.
fn a_waiting_writer_goes_on(memory: &Memory, release: impl FnOnce()) {
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| store(memory, page(9).0, 1));
        // Long enough to run into the protection on most machines; if not, it is as right.
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!writer.is_finished(), "the page was not watched");
        release();
        writer.join().unwrap();
    });
    assert_eq!(load(memory, page(9).0), 1);
}

#[test]
fn a_writer_goes_on_when_nobody_watches_any_more() {
    each(Writers::All, |memory, mut watcher| {
        watcher.watch(page(9)).unwrap();
        a_waiting_writer_goes_on(memory, || watcher.unwatch(page(9)).unwrap());
        assert_eq!(watcher.serve(&mut |_, _| panic!("a page that is not watched")), Ok(0));
        watcher.watch(page(9)).unwrap();
        store(memory, page(10).0, 1);
        a_waiting_writer_goes_on(memory, || drop(watcher));
    });
}

#[test]
fn what_is_no_page_is_refused() {
    each(Writers::UserMode, |_, mut watcher| {
        for address in [0, RAM - PAGE, RAM + 8, RAM + PAGES * PAGE, u64::MAX, u64::MAX - 0xfff] {
            assert_eq!(watcher.watch(Gpa(address)), Err(WatchError::NoPage(Gpa(address))));
        }
        assert_eq!(watcher.rearm(page(0)), Err(WatchError::NotWatched(page(0))));
        watcher.watch(page(0)).unwrap();
        watcher.watch(page(0)).unwrap();
        watcher.unwatch(page(0)).unwrap();
        watcher.unwatch(page(0)).unwrap();
        assert_eq!(watcher.rearm(page(0)), Err(WatchError::NotWatched(page(0))));
    });
}

#[test]
fn memory_that_another_one_watches_is_refused() {
    each(Writers::UserMode, |_, _watcher| {
        let (_, memory) = memories().remove(0);
        let Ok(_first) = UffdWatcher::new(&memory, Writers::UserMode) else { return };
        assert!(matches!(UffdWatcher::new(&memory, Writers::UserMode), Err(WatchError::Memory { .. })));
    });
}

/// Memory comes, is watched, and goes: who waits to write there goes on, and what stays is watched as before.
#[test]
fn memory_comes_and_goes() {
    each(Writers::All, |memory, mut watcher| {
        let high = Gpa(RAM + (1 << 30));
        let region = Arc::new(vm_memory::GuestRegionMmap::from_range(GuestAddress(high.0), (PAGES * PAGE) as usize, None).unwrap());
        let without = Arc::new(memory.clone());
        let with = Arc::new(memory.insert_region(region).unwrap());
        watcher.watch(page(2)).unwrap();
        for _ in 0..2 {
            assert_eq!(watcher.watch(high), Err(WatchError::NoPage(high)));
            watcher.memory_changed(&with).unwrap();
            watcher.watch(high).unwrap();
            std::thread::scope(|scope| {
                let writer = scope.spawn(|| with.store(1_u64, GuestAddress(high.0), Ordering::Release).unwrap());
                let reports = serve_until(&mut watcher, || writer.is_finished());
                assert_eq!(reports.into_keys().collect::<Vec<_>>(), [high.0]);
            });
            watcher.rearm(high).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| with.store(2_u64, GuestAddress(high.0), Ordering::Release).unwrap());
                watcher.memory_changed(&without).unwrap();
            });
            assert_eq!(with.load::<u64>(GuestAddress(high.0), Ordering::Acquire).unwrap(), 2);
            // A message of before may be there still: it is of no page that is watched.
            watcher.serve(&mut |at, _| panic!("{at} is not there")).unwrap();
        }
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| store(memory, page(2).0, 1));
            assert_eq!(serve_until(&mut watcher, || writer.is_finished()).into_keys().collect::<Vec<_>>(), [page(2).0]);
        });
    });
}
