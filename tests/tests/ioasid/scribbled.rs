//! A guest that writes into its tables, leaves and entries that point to tables, while they are read: whatever a device or a device model gets at any moment is what some
//! read of each entry on the way justifies, and within the guest's memory. The guest writes few different things, so that the test knows all of these.
//!
//! All that it writes changes from one epoch to the next: when its tables were read after that, nobody gets anything of an earlier epoch.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::ioasid::{Ioasid, Request, SpaceLimits, Strategy};
use stagecraft::kernel::sim::{Device, DmaAccess};
use stagecraft::lookup::{Limits, Lookup};
use stagecraft::{Access, Gpa, Iova};
use stagecraft_tests::reference::generate::Rng;

use crate::guests::{Arch, Guest, ROOT};
use crate::rig::{DATA, EVERYTHING, MEMORY, Rig, Stop, page, range, unit};

const PAGE: u64 = 0x1000;
const BLOCK: u64 = 2 << 20;
/// Where host tables are in an address space of the kernel's: no guest memory.
const HOST_TABLES: u64 = 1 << 46;

/// What stands in an entry.
#[derive(Clone, Copy, Debug)]
enum Entry {
    Nothing(u64),
    /// Where the table is; what it leads to may be written.
    Table(u64, bool),
    Leaf(u64, bool),
}

/// The guest's tables, by number: two of the last level, two above, one above these, and the root.
const TABLES: u64 = 6;
const fn table(number: u64) -> u64 {
    ROOT + (TABLES - 1 - number) * PAGE
}
/// The height of each above the last level, and entries that are written.
const fn shape(number: u64) -> (u32, u64) {
    match number {
        0 | 1 => (0, 8),
        2 | 3 => (1, 3),
        4 => (2, 2),
        _ => (3, 1),
    }
}

/// Entries that are written: where, and the height.
fn slots() -> impl Iterator<Item = (u64, u64)> {
    (0..TABLES).flat_map(|number| (0..shape(number).1).map(move |index| (number, index)))
}

/// All that may stand in an entry in an epoch.
fn candidates(number: u64, index: u64, epoch: u64) -> [Entry; 6] {
    let nothing = Entry::Nothing(0);
    match number {
        // Each page is named by one entry in one epoch of eight; the other leaves lead to where no memory is.
        0 | 1 => {
            let own = DATA + ((epoch % 8 * 64 + (number * 8 + index) * 4) << 12);
            [
                Entry::Leaf(own, true),
                Entry::Leaf(own + PAGE, false),
                Entry::Leaf(own + 2 * PAGE, true),
                nothing,
                Entry::Leaf(MEMORY, true),
                Entry::Leaf(HOST_TABLES, true),
            ]
        }
        // Six blocks in even epochs, six others in odd ones.
        2 | 3 => {
            let own = DATA + (epoch % 2 * 6 + (number - 2) * 3 + index) * BLOCK;
            let lower = |number| Entry::Table(table(number), true);
            [
                lower(0),
                lower(1),
                Entry::Table(table(index % 2), false),
                Entry::Leaf(own, index != 1),
                Entry::Leaf(HOST_TABLES, true),
                Entry::Table(MEMORY, true),
            ]
        }
        // A leaf of which only the beginning is memory.
        4 => {
            let (one, other) = (Entry::Table(table(2), true), Entry::Table(table(3), true));
            [one, other, one, other, Entry::Table(table(3), false), Entry::Leaf(0, index == 0)]
        }
        _ => [
            Entry::Table(table(4), true),
            Entry::Table(table(4), true),
            Entry::Table(table(4), true),
            Entry::Table(table(4), false),
            nothing,
            Entry::Nothing(u64::MAX),
        ],
    }
}

impl Entry {
    fn encode(self, arch: Arch, height: u32) -> u64 {
        match self {
            Self::Nothing(entry) => entry,
            Self::Table(next, true) => arch.table(next, height),
            Self::Table(next, false) => arch.read_only_table(next, height),
            Self::Leaf(address, writes) => arch.leaf(address, height, writes),
        }
    }
}

/// The guest's tables as far as an access goes through them.
#[derive(Clone, Copy)]
struct Walk {
    iova: u64,
    writes: bool,
}

impl Walk {
    /// Where the entries lead that `of` says; each is given to `found` if it is within memory.
    fn go(self, arch: Arch, number: u64, of: &dyn Fn(u64, u64) -> Vec<Entry>, found: &mut dyn FnMut(u64)) {
        let (height, count) = shape(number);
        let bits = 12 + 9 * height;
        let index = self.iova >> bits & 0x1ff;
        if index >= count {
            return;
        }
        for entry in of(number, index) {
            match entry {
                Entry::Leaf(address, writes) if writes || !self.writes => {
                    let address = address + (self.iova & ((1 << bits) - 1));
                    if address < MEMORY {
                        found(address);
                    }
                }
                Entry::Table(next, writes) if writes || !self.writes || !arch.has_read_only_tables() => {
                    (0..TABLES).filter(|below| table(*below) == next).for_each(|below| self.go(arch, below, of, found));
                }
                _ => {}
            }
        }
    }

    /// Whether an address is justified in one of some epochs.
    fn may_find(self, arch: Arch, address: u64, mut epochs: std::ops::RangeInclusive<u64>) -> bool {
        epochs.any(|epoch| {
            let mut may = false;
            self.go(arch, TABLES - 1, &|number, index| candidates(number, index, epoch).to_vec(), &mut |found| may |= found == address);
            may
        })
    }

    /// Where it goes by what stands in the tables now.
    fn finds(self, guest: &Guest, epoch: u64) -> Option<u64> {
        let mut address = None;
        let stands = |number, index| {
            let entry = guest.entry(table(number) + index * 8);
            let is = |candidate: &Entry| candidate.encode(guest.arch, shape(number).0) == entry;
            vec![candidates(number, index, epoch).into_iter().find(is).unwrap()]
        };
        self.go(guest.arch, TABLES - 1, &stands, &mut |found| address = Some(found));
        address
    }
}

/// All accesses that somebody tries: pages that have entries, some that are only in blocks, and the last one of memory and what is behind it.
fn walks() -> Vec<Walk> {
    let pages = (0..3).flat_map(|block| (0..10).map(move |page| block << 21 | page << 12)).chain([MEMORY - PAGE, MEMORY]);
    let iovas = pages.flat_map(|page| [0, 1].map(|top| top << 30 | page));
    iovas.flat_map(|iova| [false, true].map(|writes| Walk { iova, writes })).collect()
}

/// Who uses the address space.
struct Users {
    rig: Rig,
    device: Option<Device>,
    lookup: Lookup,
    nested: bool,
}

impl Users {
    /// Where an access gets to by each of them.
    fn reach(&self, Walk { iova, writes }: Walk) -> [Option<u64>; 2] {
        let access = if writes { DmaAccess::Write } else { DmaAccess::Read };
        // What a nested table says, even if nothing is behind it.
        let device = match &self.device {
            Some(device) if self.nested => device.first_stage(None, Iova(iova), access).ok().map(|address| address.0),
            Some(_) => self.rig.reaches("nic", iova, access),
            None => None,
        };
        let found = self
            .lookup
            .find(Iova(iova))
            .filter(|target| if writes { target.attributes.access(false).write } else { target.attributes.access(false).read });
        [device, found.map(|target| target.address.0)]
    }
}

/// Tells of something, all the while more is written.
fn tell(ioasid: &Ioasid, rng: &mut Rng) {
    let walk = rng.pick(&walks());
    let block = walk.iova & !(BLOCK - 1);
    match rng.below(7) {
        0 => drop(ioasid.synchronise().unwrap()),
        1 => drop(ioasid.invalidate(&[EVERYTHING]).unwrap()),
        2 => drop(ioasid.invalidate(&[range(block, block + BLOCK - 1, false), page(walk.iova)]).unwrap()),
        3 => drop(ioasid.invalidate(&[page(walk.iova)]).unwrap()),
        4 => drop(ioasid.table_written(Gpa(table(rng.below(TABLES))), PAGE).unwrap()),
        5 => drop(ioasid.table_written(Gpa(table(rng.below(2)) + rng.below(8) * 8), 8).unwrap()),
        _ => drop(ioasid.fault(Iova(walk.iova), Access { read: true, write: walk.writes }).unwrap()),
    }
}

/// One after the other of all epochs, while somebody writes and somebody looks; how often something was found.
fn nobody_gets_what_never_stood_there(host: Arch, arch: Arch, strategy: Strategy, seed: u64) -> u64 {
    const EPOCHS: u64 = 8;
    let what = format!("{arch:?} on {host:?}, {strategy}");
    let unit = if strategy == Strategy::Areas { unit(host).without_nesting() } else { unit(host) };
    let rig = Rig::new(&[unit], &[("nic", &[0])]);
    let guest = Guest::new(arch, &rig.memory);
    let write = |rng: &mut Rng, (number, index), epoch| {
        let entry = rng.pick(&candidates(number, index, epoch)).encode(arch, shape(number).0);
        guest.set(table(number) + index * 8, entry);
    };
    let slots: Vec<(u64, u64)> = slots().collect();
    let mut rng = Rng::new(seed);
    slots.iter().for_each(|slot| write(&mut rng, *slot, 0));
    let context = rig.context();
    let nic = context.connect("nic").unwrap();
    // So few nodes of lookups that they are used again and again.
    let limits = SpaceLimits { lookup: Limits { nodes: 32 }, ..SpaceLimits::default() };
    let request = Request::guest(guest.view()).with_limits(limits).with_strategies(&[strategy, Strategy::Software]);
    let ioasid = context.allocate(request).unwrap();
    let lookup = ioasid.lookup().unwrap();
    if strategy != Strategy::Software {
        ioasid.attach(&nic, None).unwrap();
    }
    let device = (strategy != Strategy::Software).then(|| rig.sim.device("nic").unwrap());
    let users = Users { rig, device, lookup, nested: strategy == Strategy::Nested };
    // The epoch that is to be written; the one that all entries are of; the one that all was read of.
    let (wanted, written, told) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let (stop, found, writes) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let end = Stop(&stop);
        let scribbles = scope.spawn(|| {
            let mut rng = Rng::new(!seed);
            while !stop.load(Ordering::Relaxed) {
                let epoch = wanted.load(Ordering::Acquire);
                if written.load(Ordering::Relaxed) != epoch {
                    slots.iter().for_each(|slot| write(&mut rng, *slot, epoch));
                    written.store(epoch, Ordering::Release);
                }
                let slot = rng.pick(&slots);
                write(&mut rng, slot, epoch);
                writes.fetch_add(1, Ordering::Relaxed);
            }
        });
        let looks = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for walk in walks() {
                    let first = told.load(Ordering::Acquire);
                    let reached = users.reach(walk);
                    let last = wanted.load(Ordering::Acquire);
                    for (address, who) in reached.into_iter().zip(["the device", "a lookup"]) {
                        let Some(address) = address else { continue };
                        let Walk { iova, writes } = walk;
                        assert!(address < MEMORY, "{what}: {who} is led beyond memory: {iova:#x} to {address:#x}");
                        assert!(
                            walk.may_find(arch, address, first..=last),
                            "{what}: {who} finds {address:#x} at {iova:#x} (write: {writes}), {first}..={last}"
                        );
                        found.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
        });
        for epoch in 1..=EPOCHS {
            wanted.store(epoch, Ordering::Release);
            while written.load(Ordering::Acquire) != epoch && !looks.is_finished() {
                std::thread::yield_now();
            }
            match epoch % 3 {
                0 => drop(ioasid.synchronise().unwrap()),
                1 => drop(ioasid.invalidate(&[EVERYTHING]).unwrap()),
                _ => drop(ioasid.table_written(Gpa(table(TABLES - 1)), TABLES * PAGE).unwrap()),
            }
            told.store(epoch, Ordering::Release);
            let (before, seen, mut count) = (writes.load(Ordering::Relaxed), found.load(Ordering::Relaxed), 0);
            // Each of the three threads gets somewhere, on a machine that has other things to do as well.
            let goes_on = |count| count < 20 || writes.load(Ordering::Relaxed) < before + 500 || found.load(Ordering::Relaxed) < seen + 20;
            while goes_on(count) && count < 100_000 && !looks.is_finished() {
                tell(&ioasid, &mut rng);
                count += 1;
            }
        }
        drop(end);
        scribbles.join().unwrap();
        looks.join().unwrap();
    });
    ioasid.synchronise().unwrap();
    for walk in walks() {
        let says = walk.finds(&guest, EPOCHS);
        let Walk { iova, writes } = walk;
        let [device, lookup] = users.reach(walk);
        assert_eq!(lookup, says, "{what}: a lookup at {iova:#x} (write: {writes})");
        assert!(users.device.is_none() || device == says, "{what}: the device finds {device:x?} at {iova:#x} (write: {writes}), not {says:x?}");
    }
    found.into_inner()
}

#[test]
fn in_nested_tables() {
    for (host, seed) in Arch::ALL.into_iter().zip(1..) {
        let found = Arch::ALL.map(|guest| nobody_gets_what_never_stood_there(host, guest, Strategy::Nested, seed));
        assert!(found.iter().all(|found| *found > 100), "{host:?}: {found:?}");
    }
}

#[test]
fn in_areas_of_units_that_nest_nothing() {
    for (host, guest) in Arch::ALL.into_iter().zip(Arch::ALL.into_iter().rev()) {
        let found = nobody_gets_what_never_stood_there(host, guest, Strategy::Areas, 5);
        assert!(found > 100, "{host:?}, {guest:?}: {found}");
    }
}

#[test]
fn in_lookups() {
    for guest in Arch::ALL {
        let found = nobody_gets_what_never_stood_there(Arch::Vtd, guest, Strategy::Software, 6);
        assert!(found > 100, "{guest:?}: {found}");
    }
}
