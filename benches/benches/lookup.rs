//! Software lookups beside `vm_memory`'s own: an `Iotlb` with as many extents, and an `IommuMemory` over it, in one run.
#![allow(clippy::unwrap_used, missing_docs)]

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{RwLock, RwLockReadGuard};
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::lookup::{Limits, Lookup, LookupIommu, Miss, Updater};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Iova, Span};
use stagecraft_benches::contest::{Contestant, contest, is_measuring, is_wanted, processor_time};
use stagecraft_benches::guest::Random;
use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Iommu, IommuMemory, Iotlb, Permissions};

const EXTENTS: u64 = 65_536;
const PAGE: u64 = 4096;
const IOVA: u64 = 0xf000_0000;
/// Every second page is mapped: no extent continues the one before.
const STRIDE: u64 = 2 * PAGE;
const ENTRIES: usize = 8192;
/// Pages of the guest's memory, all of them target of some extents.
const FRAMES: u64 = 16_384;

/// IOVA and address of each extent.
fn extents() -> Vec<(u64, u64)> {
    let mut random = Random(0x5eed);
    (0..EXTENTS).map(|extent| (IOVA + extent * STRIDE, random.below(FRAMES) * PAGE)).collect()
}

fn ours(extents: &[(u64, u64)]) -> (Updater, Lookup) {
    let (mut updater, lookup) = Updater::new(Limits::default()).unwrap();
    let attributes = Attributes::READ.with(Attributes::WRITE);
    let piece = |&(iova, address): &(u64, u64)| Change::Map(Piece { iova: Span::of_log2(iova, 12), address, attributes });
    updater.apply(&extents.iter().map(piece).collect::<Vec<_>>()).unwrap();
    (updater, lookup)
}

fn theirs(extents: &[(u64, u64)]) -> Iotlb {
    let mut iotlb = Iotlb::new();
    for (iova, address) in extents {
        iotlb.set_mapping(GuestAddress(*iova), GuestAddress(*address), PAGE as usize, Permissions::ReadWrite).unwrap();
    }
    iotlb
}

/// The example of `vm_memory`'s documentation: an `Iotlb` behind a lock; here it has everything, so that nothing is missed.
#[derive(Debug)]
struct Locked(RwLock<Iotlb>);

impl Iommu for Locked {
    type IotlbGuard<'a> = RwLockReadGuard<'a, Iotlb>;

    fn translate(&self, iova: GuestAddress, length: usize, access: Permissions) -> Result<IotlbIterator<Self::IotlbGuard<'_>>, Error> {
        let miss = |_| Error::CannotResolve { iova_range: IovaRange { base: iova, length }, reason: "not mapped".to_owned() };
        Iotlb::lookup(self.0.read().unwrap(), iova, length, access).map_err(miss)
    }
}

fn refuse(miss: &Miss) -> Result<(), String> {
    Err(format!("{} is not mapped", miss.iova))
}

/// Single IOVAs in random order.
fn hits(criterion: &mut Criterion) {
    let extents = extents();
    let (_updater, lookup) = ours(&extents);
    let iotlb = theirs(&extents);
    let mut random = Random(7);
    let probes: Vec<u64> = (0..ENTRIES).map(|_| extents[random.below(EXTENTS) as usize].0 + random.below(PAGE)).collect();
    let ours = || probes.iter().for_each(|iova| assert!(black_box(lookup.find(Iova(*iova))).is_some()));
    let dependent = || {
        // Each lookup waits for the one before.
        let mut last = 0;
        for iova in &probes {
            last = lookup.find(Iova(*iova ^ (last & 1 << 63))).unwrap().address.0;
        }
        black_box(last);
    };
    let theirs = || {
        for iova in &probes {
            let mut found = Iotlb::lookup(&iotlb, GuestAddress(*iova), 1, Permissions::Read).unwrap();
            black_box(found.next().unwrap());
        }
    };
    let mut contestants = [
        Contestant::new("stagecraft, find", ours),
        Contestant::new("stagecraft, each waits for the last", dependent),
        Contestant::new("vm_memory's Iotlb", theirs),
    ];
    contest(criterion, "lookup: hits, 65536 extents", ENTRIES as u64, 15, &mut contestants);
}

/// What a device model does for one buffer: the ring's next index, a descriptor, the buffer, the used ring.
fn serve<M: GuestMemory>(memory: &M, rings: u64, buffers: &[u64], data: &mut [u8]) {
    for (index, buffer) in buffers.iter().enumerate() {
        let index = index as u64 % 256;
        let _: u16 = memory.load(GuestAddress(rings + 2 * STRIDE + 2), Ordering::Acquire).unwrap();
        let _: u16 = memory.load(GuestAddress(rings + 2 * STRIDE + 4 + index * 2), Ordering::Relaxed).unwrap();
        let mut descriptor = [0; 16];
        memory.read_slice(&mut descriptor, GuestAddress(rings + index * 16)).unwrap();
        memory.write_slice(data, GuestAddress(*buffer)).unwrap();
        memory.write_slice(&descriptor[..8], GuestAddress(rings + 4 * STRIDE + 4 + index * 8)).unwrap();
        memory.store(index as u16, GuestAddress(rings + 4 * STRIDE + 2), Ordering::Release).unwrap();
    }
}

fn virtqueue(criterion: &mut Criterion) {
    let extents = extents();
    let (_updater, lookup) = ours(&extents);
    let ram = || GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), (FRAMES * PAGE) as usize)]).unwrap();
    let stagecraft = IommuMemory::new(ram(), LookupIommu::new(lookup, refuse), true, ());
    let locked = IommuMemory::new(ram(), Locked(RwLock::new(theirs(&extents))), true, ());
    let mut random = Random(9);
    // Any page, and data that lies in one page.
    let buffers: Vec<u64> = (0..1024).map(|_| extents[random.below(EXTENTS) as usize].0 + random.below(PAGE - 256)).collect();
    let rings = extents[EXTENTS as usize / 2].0;
    let mut contestants = [
        Contestant::new("stagecraft's Iommu", || serve(&stagecraft, rings, &buffers, &mut [1; 256])),
        Contestant::new("vm_memory's Iotlb in a lock", || serve(&locked, rings, &buffers, &mut [1; 256])),
    ];
    contest(criterion, "lookup: a virtqueue over IommuMemory", buffers.len() as u64, 15, &mut contestants);
}

/// Lookups in a second of each thread's processor time, by so many threads together.
fn throughput(threads: u64, time: Duration, lookup: impl Fn(u64) + Sync) -> f64 {
    let (stop, total) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (stop, total, lookup) = (&stop, &total, &lookup);
            scope.spawn(move || {
                let (mut random, mut count, start) = (Random(thread + 1), 0_u64, processor_time());
                while !stop.load(Ordering::Relaxed) {
                    (0..256).for_each(|_| lookup(random.below(EXTENTS)));
                    count += 256;
                }
                let rate = count as f64 / processor_time().saturating_sub(start).as_secs_f64();
                total.fetch_add(rate as u64, Ordering::Relaxed);
            });
        }
        std::thread::sleep(time);
        stop.store(true, Ordering::Relaxed);
    });
    total.into_inner() as f64
}

/// Two threads against one, and both against the lock. Processor time: what a thread waits in the kernel does not count, here to the lock's advantage.
fn threads(_: &mut Criterion) {
    if !is_wanted("lookup: threads") {
        return;
    }
    let extents = extents();
    let (updater, lookup) = ours(&extents);
    let locked = Locked(RwLock::new(theirs(&extents)));
    let ours = |extent: u64| assert!(black_box(lookup.find(Iova(IOVA + extent * STRIDE))).is_some());
    let theirs = |extent: u64| {
        black_box(locked.translate(GuestAddress(IOVA + extent * STRIDE), 1, Permissions::Read).unwrap().next().unwrap());
    };
    let time = Duration::from_millis(if is_measuring() { 300 } else { 5 });
    let rounds = if is_measuring() { 9 } else { 1 };
    let scaling = |lookup: &(dyn Fn(u64) + Sync)| -> Vec<(f64, f64)> {
        (0..rounds).map(|_| (throughput(1, time, lookup), throughput(2, time, lookup))).map(|(one, two)| (one, two / one)).collect()
    };
    println!("\nlookup: threads, medians of {rounds} rounds");
    for (name, mut rounds) in [("stagecraft", scaling(&ours)), ("vm_memory's Iotlb in a lock", scaling(&theirs))] {
        rounds.sort_by(|a, b| a.1.total_cmp(&b.1));
        let (one, ratio) = rounds[rounds.len() / 2];
        println!("{name:<34}{:>10.1} million per second, two threads {ratio:.2} times that", one / 1e6);
    }
    println!("memory: {} KiB for {EXTENTS} extents", updater.bytes() >> 10);
}

/// One page mapped and unmapped, in an address space with many others.
fn updates(criterion: &mut Criterion) {
    let extents = extents();
    let (updater, _lookup) = ours(&extents);
    let (updater, mut iotlb) = (std::cell::RefCell::new(updater), theirs(&extents));
    let mut random = Random(11);
    let pages: Vec<u64> = (0..1024).map(|_| IOVA + random.below(EXTENTS) * STRIDE + PAGE).collect();
    let ours = || {
        let mut updater = updater.borrow_mut();
        for page in &pages {
            let iova = Span::of_log2(*page, 12);
            updater.apply(&[Change::Map(Piece { iova, address: 0x5000, attributes: Attributes::READ })]).unwrap();
            updater.apply(&[Change::Unmap(iova)]).unwrap();
        }
    };
    let theirs = || {
        for page in &pages {
            iotlb.set_mapping(GuestAddress(*page), GuestAddress(0x5000), PAGE as usize, Permissions::Read).unwrap();
            iotlb.invalidate_mapping(GuestAddress(*page), PAGE as usize);
        }
    };
    let mut contestants = [Contestant::new("stagecraft's Updater", ours), Contestant::new("vm_memory's Iotlb", theirs)];
    contest(criterion, "lookup: map and unmap a page", pages.len() as u64, 15, &mut contestants);
}

criterion_group!(benches, hits, virtqueue, updates, threads);
criterion_main!(benches);
