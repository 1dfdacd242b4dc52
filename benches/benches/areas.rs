//! Areas that follow a guest, against what VMMs do today: unmap and map, one kernel call for each leaf. On the simulated kernel, so times are those of its
//! in-process calls; the calls themselves are counted and printed side by side.
#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::sync::Arc;

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::kernel::handle::{Attachment, Device, Ioas, PageTable};
use stagecraft::kernel::sim::{DeviceConfig, Sim, SimBuilder, UnitConfig};
use stagecraft::kernel::{Kernel, Map, MapFlags};
use stagecraft::pins::{Backing, Pins, Region};
use stagecraft::sync::{AreaLimits, Areas, CommitError, Sink};
use stagecraft::table::Piece;
use stagecraft::{Attributes, Change, Gpa, Iova, Span};
use stagecraft_benches::contest::{Contestant, contest};
use vm_memory::MmapRegion;

const PAGE: u64 = 4096;
const LARGE: u64 = 2 << 20;
/// Guest memory.
const MEMORY: u64 = 256 << 20;
/// Pages that are mapped all the time, each an area.
const RESIDENT: u64 = 16384;
const RW: Attributes = Attributes::READ.with(Attributes::WRITE);

/// One call for each leaf, from user memory.
struct PerLeaf {
    kernel: Arc<dyn Kernel>,
    user: u64,
    // Detached first.
    _attachment: Attachment,
    ioas: Ioas,
}

impl Sink for PerLeaf {
    fn apply(&mut self, batch: &[Change]) {
        for change in batch {
            match change {
                Change::Unmap(span) => drop(self.kernel.ioas_unmap(self.ioas.id(), Iova(span.first), span.length_minus_one() + 1).unwrap()),
                Change::Map(piece) => {
                    let flags = MapFlags::READABLE | MapFlags::WRITEABLE;
                    let length = piece.iova.length_minus_one() + 1;
                    let map = Map { flags, iova: Some(Iova(piece.iova.first)), user_address: self.user + piece.address, length };
                    self.kernel.ioas_map(self.ioas.id(), &map).unwrap();
                }
            }
        }
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        Ok(())
    }
}

/// A machine of its own for each contestant.
fn machine() -> (Arc<Sim>, Arc<dyn Kernel>, u64) {
    let mut builder = SimBuilder::new();
    let unit = builder.unit(UnitConfig::riscv("unit").without_nesting());
    builder.device(DeviceConfig::new("device", 1), &[unit]);
    let sim = builder.build().unwrap();
    let region = Arc::new(MmapRegion::new(MEMORY as usize).unwrap());
    let user = region.as_ptr() as u64;
    sim.register_region(region).unwrap();
    let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
    (sim, kernel, user)
}

fn per_leaf() -> (Arc<Sim>, Box<dyn Sink>) {
    let (sim, kernel, user) = machine();
    let ioas = Ioas::alloc(&kernel).unwrap();
    let attachment = Device::bind(&kernel, "device").unwrap().attach(None, PageTable::Ioas(&ioas)).unwrap();
    (sim, Box::new(PerLeaf { kernel, user, _attachment: attachment, ioas }))
}

fn areas(join: u64) -> (Arc<Sim>, Box<dyn Sink>) {
    let (sim, kernel, user) = machine();
    let pins = Pins::new(&kernel, MEMORY).unwrap();
    pins.add(&Region { gpa: Gpa(0), length: MEMORY, backing: Backing::User(user), writable: true, block: None }).unwrap();
    let mut areas = Areas::new(&pins, AreaLimits { join, ..AreaLimits::default() }).unwrap();
    areas.attach(&Device::bind(&kernel, "device").unwrap(), None).unwrap();
    (sim, Box::new(areas))
}

fn map(first: u64, length: u64, address: u64) -> Change {
    Change::Map(Piece { iova: Span { first, last: first + (length - 1) }, address, attributes: RW })
}

const fn unmap(first: u64, length: u64) -> Change {
    Change::Unmap(Span { first, last: first + (length - 1) })
}

/// Small pages, neighbours in IOVAs and memory.
fn pages(first: u64, count: u64, address: u64) -> Vec<Change> {
    (0..count).map(|index| map(first + index * PAGE, PAGE, address + index * PAGE)).collect()
}

fn no_pages(first: u64, count: u64) -> Vec<Change> {
    (0..count).map(|index| unmap(first + index * PAGE, PAGE)).collect()
}

/// Where the changes are.
const AT: u64 = 1 << 40;

/// What a guest does again and again.
struct Workload {
    name: &'static str,
    /// What is mapped at first.
    before: Vec<Change>,
    /// End as they began.
    batches: [Vec<Change>; 2],
}

fn workloads() -> Vec<Workload> {
    let large = || vec![map(AT, LARGE, LARGE)];
    let split = || [vec![unmap(AT, LARGE)], pages(AT, 512, LARGE)].concat();
    let merge = || [no_pages(AT, 512), large()].concat();
    let changed = || {
        let mut batch = split();
        batch[101] = map(AT + 100 * PAGE, PAGE, 0);
        batch
    };
    let moved = || [vec![unmap(AT, PAGE)], vec![map(AT, PAGE, 7 * PAGE)]].concat();
    let back = || [vec![unmap(AT, PAGE)], vec![map(AT, PAGE, 3 * PAGE)]].concat();
    let marked = || {
        let attributes = RW.with(Attributes::ACCESSED).with(Attributes::DIRTY);
        [
            no_pages(AT, 64),
            (0..64)
                .map(|index| {
                    Change::Map(Piece { iova: Span { first: AT + index * PAGE, last: AT + index * PAGE + 0xfff }, address: index * PAGE, attributes })
                })
                .collect(),
        ]
        .concat()
    };
    let unmarked = || [no_pages(AT, 64), pages(AT, 64, 0)].concat();
    let workload = |name, before, batches| Workload { name, before, batches };
    vec![
        workload("a page comes and goes", Vec::new(), [pages(AT, 1, 0), no_pages(AT, 1)]),
        workload("a buffer of 16 pages comes and goes", Vec::new(), [pages(AT, 16, 0), no_pages(AT, 16)]),
        workload("a page is moved, and back", pages(AT, 1, 3 * PAGE), [moved(), back()]),
        workload("64 pages are marked accessed and dirty", pages(AT, 64, 0), [marked(), unmarked()]),
        workload("2 MiB are split and merged", large(), [split(), merge()]),
        workload("2 MiB are split with a change, and merged", large(), [changed(), merge()]),
    ]
}

fn run(sink: &RefCell<Box<dyn Sink>>, batches: &[Vec<Change>]) {
    let sink = &mut *sink.borrow_mut();
    for batch in batches {
        sink.apply(batch);
        sink.commit().unwrap();
    }
}

fn against_a_call_per_leaf(criterion: &mut Criterion) {
    for Workload { name, before, batches } in workloads() {
        let hosts = [("a call per leaf", per_leaf()), ("areas, as leaves", areas(0)), ("areas, joined", areas(LARGE))];
        let hosts = hosts.map(|(who, (sim, sink))| (who, sim, RefCell::new(sink)));
        for (_, _, sink) in &hosts {
            // Other pages are mapped all the while, none of them neighbours of another.
            let resident: Vec<Change> = (0..RESIDENT).map(|index| map((1 << 32) + index * 2 * PAGE, PAGE, index * PAGE)).collect();
            run(sink, &[resident]);
            run(sink, std::slice::from_ref(&before));
        }
        println!("\n{name}: kernel calls\n{:<34}{:>12}{:>12}", "", "first time", "again");
        for (who, sim, sink) in &hosts {
            let calls = [(); 2].map(|()| {
                let calls = sim.calls_total();
                run(sink, &batches);
                sim.calls_total() - calls
            });
            println!("{who:<34}{:>12}{:>12}", calls[0], calls[1]);
        }
        let mut contestants: Vec<Contestant<'_>> = hosts.iter().map(|(who, _, sink)| Contestant::new(who, || run(sink, &batches))).collect();
        let leaves = batches.iter().map(Vec::len).sum::<usize>() as u64;
        contest(criterion, name, leaves, 21, &mut contestants);
    }
}

criterion_group!(benches, against_a_call_per_leaf);
criterion_main!(benches);
