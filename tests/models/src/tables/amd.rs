//! AMD v1 tables, for host translation.
//!
//! Source: AMD I/O Virtualization Technology (IOMMU) Specification, section 2.2.3.
//!
//! An entry: PR 0, A 5, D 6, NextLevel 11:9, address 51:12, U 59, FC 60, IR 61, IW 62; 4:1 and 8:7 are ignored. NextLevel 0 is a leaf of the level's natural size, 7 one
//! whose size the address tells: the lowest bit from 12 on that is zero is half the size; it stands in every slot that it covers. Any other NextLevel is a table of
//! that level. It may leave out levels: then the IOVA's bits of those levels must be zero.

use std::collections::BTreeMap;
use std::ops::Range;

use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::{Run, merge};

use super::{Arena, Built};
use crate::Access;

const PR: u64 = 1;

/// A table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmdTable {
    /// Address of the first table.
    pub root: u64,
    /// Paging mode: the level of the first table, 1 to 6.
    pub mode: u32,
    /// What the device table entry allows.
    pub access: Access,
}

/// The lowest bit of an IOVA that a level resolves.
fn shift(level: u32) -> u32 {
    3 + 9 * level
}

impl AmdTable {
    /// Ranges of IOVAs: the first one, and log2 of the size.
    pub fn windows(&self) -> Vec<(u64, u32)> {
        vec![(0, shift(self.mode + 1).min(64))]
    }

    /// Log2 of the sizes of leaves: every power of two, up to 256 GiB here.
    pub fn sizes(&self) -> Vec<u32> {
        (12..shift(self.mode + 1).min(39)).collect()
    }
}

/// Tables, and where they leave out levels.
#[derive(Clone, Debug)]
pub struct AmdBuilt {
    /// The tables.
    pub built: Built<AmdTable>,
    /// IOVAs that are not mapped because bits of a left-out level are not zero.
    pub skipped: Vec<Range<u64>>,
}

/// Writes the tables for leaves that do not overlap; their places are in `places`.
pub fn build(config: AmdTable, leaves: &[Run], places: Range<u64>, rng: &mut Rng) -> AmdBuilt {
    let mut arena = Arena::new(places);
    let root = arena.room(4096, rng);
    // Address, level, first IOVA.
    let mut tables = vec![(root, config.mode, 0)];
    // What an entry points to: table, level, what it lets through.
    let mut children: BTreeMap<u64, (u64, u32, Access)> = BTreeMap::new();
    let mut truth = Vec::new();
    let mut skipped = Vec::new();
    for leaf in leaves {
        let bits = leaf.size.trailing_zeros();
        let mut allowed = config.access.and(leaf.access);
        let (mut table, mut level) = (root, config.mode);
        loop {
            let slot = table + (leaf.iova >> shift(level)) % 512 * 8;
            if bits >= shift(level) {
                let entry = leaf_entry(leaf, bits > shift(level), rng);
                for replica in 0..1 << (bits - shift(level)) {
                    arena.write(slot + replica * 8, entry);
                }
                break;
            }
            let (child, child_level, limit) = *children.entry(slot).or_insert_with(|| {
                let base = leaf.iova >> shift(level) << shift(level);
                let mut next = level - 1;
                if rng.percent(30) {
                    next = lowest_level(leaves, base, level);
                }
                if next < level - 1 {
                    skipped.push(base + (1 << shift(next + 1))..base + (1 << shift(level)));
                }
                let child = arena.room(4096, rng);
                let limit = if rng.percent(10) { rng.pick(&[Access::R, Access::W]) } else { Access::RW };
                arena.write(slot, child | PR | u64::from(next) << 9 | permissions(limit) | ignored(rng));
                tables.push((child, next, base));
                (child, next, limit)
            });
            allowed = allowed.and(limit);
            table = child;
            level = child_level;
        }
        if allowed != Access::NONE {
            truth.push(Run { access: allowed, ..*leaf });
        }
    }
    let mut decoys = Vec::new();
    for _ in 0..30 {
        let (table, level, first) = rng.pick(&tables);
        // The level that mode 6 begins with resolves seven bits.
        let index = rng.below(if level == 6 { 128 } else { 512 });
        let slot = table + index * 8;
        if arena.is_free(slot) {
            decoys.push(first + (index << shift(level)));
            let decoy = decoy(level, rng);
            arena.write(slot, decoy);
        }
    }
    AmdBuilt { built: Built { config: AmdTable { root, ..config }, memory: arena.memory, truth: merge(truth), decoys }, skipped }
}

/// The lowest level of a table that holds all leaves behind an entry of `level` whose first IOVA is `base`.
fn lowest_level(leaves: &[Run], base: u64, level: u32) -> u32 {
    let inside = leaves.iter().filter(|leaf| leaf.iova >> shift(level) == base >> shift(level));
    let end = inside.map(|leaf| leaf.iova - base + (leaf.size - 1)).max().unwrap_or(0);
    (1..level - 1).find(|next| end >> shift(next + 1) == 0).unwrap_or(level - 1)
}

fn permissions(access: Access) -> u64 {
    u64::from(access.read) << 61 | u64::from(access.write) << 62
}

/// Values for bits that change nothing here: 4:1, A, D and 8:7.
fn ignored(rng: &mut Rng) -> u64 {
    if rng.percent(20) { rng.number() & 0x1fe } else { 0 }
}

fn leaf_entry(leaf: &Run, sized: bool, rng: &mut Rng) -> u64 {
    let mut entry = leaf.address | PR | permissions(leaf.access) | ignored(rng);
    if sized {
        // Ones from bit 12 to below half the size.
        entry |= 7 << 9 | ((leaf.size / 2 - 1) & !0xfff);
    }
    // U and FC.
    if rng.percent(30) {
        entry |= rng.below(4) << 59;
    }
    entry
}

/// Something that does not translate.
fn decoy(level: u32, rng: &mut Rng) -> u64 {
    let address = (rng.number() % (1 << 39)) & !0xfff;
    match rng.below(4) {
        // Nothing allowed.
        0 => address | PR,
        1 => address | PR | 7 << 9,
        // A table that is not present.
        2 if level > 1 => address | u64::from(level - 1) << 9 | permissions(Access::RW),
        _ => 0,
    }
}
