//! Tables with known content for the formats that the reference of `stagecraft-tests` does not write: RISC-V and AMD v1.
//!
//! One leaf is written after the other, and the truth is kept beside them; nothing is read back.

pub mod amd;
pub mod riscv;

use std::collections::BTreeMap;
use std::ops::Range;

use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::Rng;

use crate::{Access, Memory};

/// Tables, and what they map.
#[derive(Clone, Debug)]
pub struct Built<C> {
    /// The settings, with the root.
    pub config: C,
    /// The tables' pages.
    pub memory: Memory,
    /// Sorted maximal runs.
    pub truth: Vec<Run>,
    /// IOVAs of entries that look like something and do not translate.
    pub decoys: Vec<u64>,
}

/// Random leaves that do not overlap.
///
/// `windows` are ranges of IOVAs: the first one, and log2 of the size. `sizes` are log2 of leaf sizes. Most addresses are between 4 and 512 GiB.
pub fn random_leaves(windows: &[(u64, u32)], sizes: &[u32], accesses: &[Access], rng: &mut Rng, clusters: u64) -> Vec<Run> {
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    let mut previous = 0;
    for _ in 0..clusters {
        let (first, window_bits) = rng.pick(windows);
        let bits = if rng.percent(50) { sizes[0] } else { rng.pick(sizes) };
        if bits > window_bits {
            continue;
        }
        let size = 1 << bits;
        let slots = 1u64 << (window_bits - bits);
        let count = (1 + rng.below(if bits == 12 { 60 } else { 6 })).min(slots);
        let slot = match rng.below(6) {
            0 => 0,
            1 => slots - count,
            // Near the last cluster.
            2 | 3 if previous >= first => ((previous - first).div_ceil(size) + rng.below(3)).min(slots - count),
            _ => rng.below(slots - count + 1),
        };
        let base = if bits >= 38 { 0 } else { ((4 << 30) + rng.below(500 << 30)) >> bits << bits };
        let access = rng.pick(accesses);
        let (scattered, mixed, holes) = (rng.percent(20), rng.percent(30), rng.percent(30));
        for index in 0..count {
            if holes && rng.percent(30) {
                continue;
            }
            let iova = first + ((slot + index) << bits);
            let last = iova + (size - 1);
            if leaves.range(..=last).next_back().is_some_and(|(_, leaf)| leaf.iova + (leaf.size - 1) >= iova) {
                continue;
            }
            let address = if scattered && bits < 38 { ((4 << 30) + rng.below(500 << 30)) >> bits << bits } else { base + (index << bits) };
            let access = if mixed { rng.pick(accesses) } else { access };
            leaves.insert(iova, Run { iova, address, size, access });
            previous = last;
        }
    }
    leaves.into_values().collect()
}

/// Table memory under construction.
#[derive(Debug)]
pub(crate) struct Arena {
    pub(crate) memory: Memory,
    places: Range<u64>,
}

impl Arena {
    /// Nothing yet.
    pub(crate) fn new(places: Range<u64>) -> Arena {
        Arena { memory: Memory::default(), places }
    }

    /// A free, aligned place for a table of zeros.
    pub(crate) fn room(&mut self, size: u64, rng: &mut Rng) -> u64 {
        loop {
            let place = self.places.start + rng.below((self.places.end - self.places.start) / size) * size;
            if self.memory.pages.range(place..place + size).next().is_none() {
                self.memory.add_zeroed(place, size);
                return place;
            }
        }
    }

    fn is_free(&self, slot: u64) -> bool {
        self.memory.read(slot, false) == Ok(0)
    }

    pub(crate) fn write(&mut self, slot: u64, entry: u64) {
        self.memory.write(slot, entry, false);
    }
}
