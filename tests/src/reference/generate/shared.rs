//! Unused slots that lead somewhere: to tables with nothing in them, one for each level, which all of them share. What is mapped stays the same.

use std::collections::{BTreeMap, BTreeSet};

use super::{Generated, Rng};
use crate::reference::Access;
use crate::reference::snapshot::Memory;
use crate::reference::tables::{Entry, Region, Step, TableConfig};

/// A table that has tables below it: depth, address, half.
type Directory = (usize, u64, usize);

struct Filler<'a> {
    config: TableConfig,
    region: &'a Region,
    memory: &'a mut Memory,
    rng: &'a mut Rng,
    /// Of so many in a hundred unused slots.
    percent: u64,
    /// Where the next table goes: the generators begin at 0x4000_0000.
    next: u64,
    /// All directories that are reached, and entries of them that point to whole tables of the next level.
    directories: BTreeSet<Directory>,
    pointers: BTreeMap<usize, u64>,
    filled: u64,
}

/// Lets about `percent` in a hundred of the unused slots of all directories point to empty tables, those of the empty tables' own as well; how many slots it
/// were. None where the tables have no table entry to learn from, and the format needs more in it than an address.
pub fn share_empty_tables(generated: &mut Generated, rng: &mut Rng, percent: u64) -> u64 {
    let (mut next, mut filled) = (0x1000_0000, 0);
    for region in &generated.config.regions().expect("the generator's settings are legal") {
        let mut filler = Filler {
            config: generated.config,
            region,
            memory: &mut generated.snapshot.memory,
            rng,
            percent,
            next,
            directories: BTreeSet::new(),
            pointers: BTreeMap::new(),
            filled: 0,
        };
        filler.explore(0, region.root, region.half);
        filler.fill();
        (next, filled) = (filler.next, filled + filler.filled);
    }
    filled
}

impl Filler<'_> {
    fn read(&self, address: u64) -> Option<u64> {
        let big = self.config.big_endian();
        let entry = if self.config.entry_bytes() == 4 { self.memory.read4(address, big) } else { self.memory.read(address, big) };
        entry.ok()
    }

    fn write(&mut self, address: u64, entry: u64) {
        let big = self.config.big_endian();
        if self.config.entry_bytes() == 4 { self.memory.write4(address, entry, big) } else { self.memory.write(address, entry, big) }
    }

    fn step(&self, depth: usize) -> Step {
        self.region.steps[depth]
    }

    fn explore(&mut self, depth: usize, table: u64, half: usize) {
        if depth + 1 >= self.region.steps.len() || !self.directories.insert((depth, table, half)) {
            return;
        }
        let step = self.step(depth);
        for index in 0..step.entries {
            let Some(entry) = self.read(table + index * self.config.entry_bytes()) else { return };
            let Entry::Table { address, limit, skip, exists, half } = self.config.decode(half, step, entry) else { continue };
            let whole = exists.is_none_or(|exists| exists == (0, self.step(depth + 1 + skip).entries - 1));
            if skip == 0 && whole && limit == Access::RW {
                self.pointers.entry(depth).or_insert(entry);
            }
            self.explore(depth + 1 + skip, address, half);
        }
    }

    /// A table entry that points to `wanted`, for a directory; none if its own entries show no way to say it.
    fn pointer(&self, depth: usize, half: usize, wanted: u64) -> Option<(u64, usize)> {
        let step = self.step(depth);
        let known = self.pointers.get(&depth).copied().unwrap_or(0);
        // In place, with and without address bits in the lowest ones; as page numbers at bit 10; as DART has them, four bits lower.
        let forms = [
            known & !0x000f_ffff_ffff_f000 | wanted,
            known & !0x000f_ffff_ffff_f300 | wanted,
            known & !0x000f_ffff_ffff_fc00 | wanted,
            known & !0x003f_ffff_ffff_fc00 | wanted >> 2,
            known & !0x0000_003f_ffff_fc00 | wanted >> 4,
        ];
        forms.into_iter().find_map(|entry| match self.config.decode(half, step, entry) {
            Entry::Table { address, limit: Access::RW, skip: 0, exists, half } if address == wanted => {
                exists.is_none_or(|exists| exists == (0, self.step(depth + 1).entries - 1)).then_some((entry, half))
            }
            _ => None,
        })
    }

    fn is_unused(&self, depth: usize, half: usize, entry: u64) -> bool {
        let is_empty = match self.config {
            // A huge page that is not valid.
            TableConfig::LoongArch(_) => entry == 1 << 6,
            _ => entry == 0,
        };
        is_empty && self.config.decode(half, self.step(depth), entry) == Entry::Fault
    }

    fn fill(&mut self) {
        // The empty table for a kind of slot: depth and half of the directory; the entry for it.
        let mut empties: BTreeMap<(usize, usize), Option<u64>> = BTreeMap::new();
        let directories: Vec<Directory> = self.directories.iter().copied().collect();
        for (depth, table, half) in directories {
            self.fill_table((depth, table, half), &mut empties);
        }
    }

    fn fill_table(&mut self, (depth, table, half): Directory, empties: &mut BTreeMap<(usize, usize), Option<u64>>) {
        let bytes = self.config.entry_bytes();
        for index in 0..self.step(depth).entries {
            let slot = table + index * bytes;
            let Some(entry) = self.read(slot) else { return };
            if !self.is_unused(depth, half, entry) || !self.rng.percent(self.percent) {
                continue;
            }
            if let Some(pointer) = self.empty(depth, half, empties) {
                self.write(slot, pointer);
                self.filled += 1;
            }
        }
    }

    /// The entry that points to the empty table below directories of a kind, which is made when the first needs it.
    fn empty(&mut self, depth: usize, half: usize, empties: &mut BTreeMap<(usize, usize), Option<u64>>) -> Option<u64> {
        if let Some(known) = empties.get(&(depth, half)) {
            return *known;
        }
        let below = self.step(depth + 1);
        let size = (below.entries * self.config.entry_bytes()).next_power_of_two().max(0x1_0000);
        let table = self.next.next_multiple_of(size);
        let made = self.pointer(depth, half, table);
        empties.insert((depth, half), made.map(|(entry, _)| entry));
        let (entry, half_below) = made?;
        self.next = table + size;
        self.memory.add_zeroed(table, below.entries * self.config.entry_bytes());
        if depth + 2 < self.region.steps.len() {
            if let TableConfig::LoongArch(_) = self.config {
                (0..below.entries).for_each(|index| self.write(table + index * 8, 1 << 6));
            }
            self.fill_table((depth + 1, table, half_below), empties);
        }
        Some(entry)
    }
}
