//! RISC-V Sv39, Sv48, Sv57 and their second stages, Sv39x4 and so on.
//!
//! Source: The RISC-V Instruction Set Manual, volume II, chapters on the supervisor level (Sv39 to Sv57) and on the hypervisor extension (Sv39x4 to Sv57x4).
//!
//! An entry: V 0, R 1, W 2, X 3, U 4, G 5, A 6, D 7, RSW 9:8, PPN 53:10. V without R, W and X points to a table. A first table of a second stage has four times as
//! many entries, 2048, and is aligned to its size. First-stage IOVAs are sign-extended.

use std::collections::BTreeMap;
use std::ops::Range;

use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::{Run, merge};

use super::{Arena, Built};
use crate::Access;

const V: u64 = 1;
const R: u64 = 1 << 1;
const W: u64 = 1 << 2;
const X: u64 = 1 << 3;
const U: u64 = 1 << 4;
const A: u64 = 1 << 6;
const D: u64 = 1 << 7;

/// A table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiscvTable {
    /// Address of the first table.
    pub root: u64,
    /// 3, 4 or 5.
    pub levels: u32,
    /// A second stage.
    pub second: bool,
}

impl RiscvTable {
    /// Ranges of IOVAs: the first one, and log2 of the size.
    pub fn windows(&self) -> Vec<(u64, u32)> {
        let bits = 12 + 9 * self.levels;
        if self.second { vec![(0, bits + 2)] } else { vec![(0, bits - 1), (0u64.wrapping_sub(1 << (bits - 1)), bits - 1)] }
    }

    /// Log2 of the sizes of leaves: every level has them.
    pub fn sizes(&self) -> Vec<u32> {
        (0..self.levels).map(|height| 12 + 9 * height).collect()
    }
}

/// Writes the tables for leaves that do not overlap; their places are in `places`. Access is read or read-write: there is no write-only. With
/// `variety`, some leaves lack A or D, which takes away access, and some have X; without, all or none have it.
pub fn build(config: RiscvTable, leaves: &[Run], places: Range<u64>, variety: bool, rng: &mut Rng) -> Built<RiscvTable> {
    let executable = rng.percent(50);
    let mut arena = Arena::new(places);
    let root_entries = if config.second { 2048 } else { 512 };
    let root = arena.room(root_entries * 8, rng);
    // Address, height, entries, first IOVA.
    let mut tables = vec![(root, config.levels - 1, root_entries, 0)];
    let mut children: BTreeMap<u64, u64> = BTreeMap::new();
    let mut truth = Vec::new();
    for leaf in leaves {
        let (mut table, mut height, mut entries, _) = tables[0];
        loop {
            let slot = table + (leaf.iova >> (12 + 9 * height)) % entries * 8;
            if leaf.size == 1 << (12 + 9 * height) {
                let (entry, access) = leaf_entry(leaf, executable, variety, rng);
                arena.write(slot, entry);
                if access != Access::NONE {
                    truth.push(Run { access, ..*leaf });
                }
                break;
            }
            table = *children.entry(slot).or_insert_with(|| {
                let child = arena.room(4096, rng);
                arena.write(slot, pointer(child, rng));
                tables.push((child, height - 1, 512, leaf.iova >> (12 + 9 * height) << (12 + 9 * height)));
                child
            });
            height -= 1;
            entries = 512;
        }
    }
    let mut decoys = Vec::new();
    for _ in 0..30 {
        let (table, height, entries, first) = rng.pick(&tables);
        let index = rng.below(entries);
        let slot = table + index * 8;
        if arena.is_free(slot) {
            decoys.push(extend(config, first + (index << (12 + 9 * height))));
            let decoy = decoy(height, rng);
            arena.write(slot, decoy);
        }
    }
    Built { config: RiscvTable { root, ..config }, memory: arena.memory, truth: merge(truth), decoys }
}

/// The IOVA of a place in the first stage's table: its upper half is the upper end of all IOVAs.
fn extend(config: RiscvTable, position: u64) -> u64 {
    let unused = 64 - (12 + 9 * config.levels);
    if config.second { position } else { ((position << unused).cast_signed() >> unused).cast_unsigned() }
}

fn ppn(address: u64) -> u64 {
    address >> 12 << 10
}

/// RSW, for software.
fn software(rng: &mut Rng) -> u64 {
    if rng.percent(20) { rng.below(4) << 8 } else { 0 }
}

fn pointer(child: u64, rng: &mut Rng) -> u64 {
    ppn(child) | V | software(rng)
}

/// A leaf, and what it allows: nothing without A, no writing without D.
fn leaf_entry(leaf: &Run, executable: bool, variety: bool, rng: &mut Rng) -> (u64, Access) {
    let mut entry = ppn(leaf.address) | V | R | U | software(rng);
    if if variety { rng.percent(20) } else { executable } {
        entry |= X;
    }
    if leaf.access.write {
        entry |= W;
    }
    let mut access = Access { read: true, write: leaf.access.write };
    match rng.below(20) {
        0 if variety => access = Access::NONE,
        1 if variety => {
            entry |= A;
            access.write = false;
        }
        _ => entry |= A | D,
    }
    (entry, access)
}

/// Something that does not translate.
fn decoy(height: u32, rng: &mut Rng) -> u64 {
    let bits = 12 + 9 * height;
    let address = (rng.number() % (1 << 39)) >> bits << bits;
    match rng.below(6) {
        // Reserved: writable without readable, with and without X.
        0 => ppn(address) | V | W | U | A | D,
        1 => ppn(address) | V | W | X | U | A | D,
        // Executable only.
        2 => ppn(address) | V | X | U | A | D,
        // Misaligned.
        3 if height > 0 => ppn(address | 1 << (bits - 1)) | V | R | W | U | A | D,
        // A pointer at the last level.
        4 if height == 0 => ppn(address) | V,
        _ => rng.number() & !V,
    }
}
