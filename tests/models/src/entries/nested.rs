//! Two stages, of which one is damaged and the other is whole.
//!
//! The whole stage has leaves of 1 GiB, and is no identity: a model or an engine that leaves it out comes somewhere else. Where the first stage is damaged, the
//! second moves its tables and whatever its entries lead to, and has holes. Where the second stage is damaged, the first one's tables lie in pages that it maps.

use std::collections::BTreeMap;
use std::ops::Range;

use stagecraft_tests::reference::generate::Rng;

use super::{ArmLadder, Damage, Good, Halves, Image, Ladder, RiscvLadder};
use crate::known::{self, KnownError};
use crate::riscv::RiscvTables;
use crate::smmu::{SmmuTables, context_descriptor};
use crate::tables::Arena;
use crate::{Memory, Tables};

/// Log2 of the whole stage's leaves.
const CHUNK: u32 = 30;

/// Where the whole second stage's tables are, which nothing moves.
const SECOND: Range<u64> = 0xb000_0000..0xc000_0000;

/// Bytes for the whole first stage's tables in what the second one maps, and the first of them.
const ROOM: u64 = 1 << 20;

/// Where the context is, if the architecture has one: a page that holds no table, in what the second stage translates.
const CONTEXT: u64 = 0x8000_1000;

/// A ladder of an architecture with two stages.
pub trait Stage: Ladder + Sized {
    /// Whether this is the first stage.
    fn is_first(&self) -> bool;

    /// A stage that goes before or behind this one, with 4K pages and leaves of 1 GiB at height 2.
    fn other(&self) -> Self;

    /// For the model, by the stages' roots; and the words of the context, if the architecture has one.
    fn both(first: (&Self, u64), second: (&Self, u64), context: u64) -> (Tables, Vec<u64>);

    /// The error of the model that concerns two stages alone.
    fn excuse_of_two(&self, _: &Damage, _: bool) -> Option<KnownError> {
        None
    }
}

/// A damaged stage, with the other one before or behind it.
#[derive(Clone, Copy, Debug)]
pub struct Nested<L>(pub L);

/// Where the whole second stage moves a chunk. One in seven is not there; those with tables and the context are, and stay below 64 GiB (see
/// `known::SMMU_NESTED_ROOT`).
fn moved(chunk: u64) -> Option<u64> {
    (chunk < 512 && chunk % 7 != 3).then_some(2 + ((chunk ^ 5) + 30) % 512)
}

/// The IOVA chunk that the whole first stage leads to a chunk of the second stage's.
fn before(chunk: u64) -> u64 {
    chunk ^ 5
}

/// The same place in another chunk.
fn in_chunk(chunk: u64, address: u64) -> u64 {
    (chunk << CHUNK) + address % (1 << CHUNK)
}

/// A stage's tables with chunks that lead to others.
fn whole(ladder: &impl Ladder, chunks: &BTreeMap<u64, u64>, places: Range<u64>, rng: &mut Rng) -> (Memory, u64) {
    let rungs = ladder.rungs();
    let mut arena = Arena::new(places);
    let mut room = |arena: &mut Arena, height: usize| arena.room((rungs[height].1 * 8).next_multiple_of(4096), rng);
    let top = rungs.len() - 1;
    let root = room(&mut arena, top);
    let mut children: BTreeMap<u64, u64> = BTreeMap::new();
    for (from, to) in chunks {
        let (mut table, mut height) = (root, top);
        loop {
            let (shift, entries) = rungs[height];
            let slot = table + ((from << CHUNK) >> shift) % entries * 8;
            if shift == CHUNK {
                let (leaf, _) = ladder.leaves(height)[0];
                arena.write(slot, ladder.with_address(leaf.entry, to << CHUNK));
                break;
            }
            height -= 1;
            table = *children.entry(slot).or_insert_with(|| room(&mut arena, height));
            if let Some(pointer) = ladder.pointer(height + 1, height, table) {
                arena.write(slot, pointer.entry);
            }
        }
    }
    (arena.memory, root)
}

impl<L: Stage> Nested<L> {
    /// The damaged first stage behind which a second one is.
    fn behind(&self, image: Image, rng: &mut Rng) -> Image {
        let second = self.0.other();
        let chunks = (0..512).filter_map(|chunk| Some((chunk, moved(chunk)?))).collect();
        let (mut memory, root) = whole(&second, &chunks, SECOND, rng);
        let (tables, words) = L::both((&self.0, image.root), (&second, root), CONTEXT);
        let mut first = image.memory;
        for (word, index) in words.into_iter().zip(0..) {
            first.write(CONTEXT + index * 8, word, false);
        }
        memory.pages.extend(first.pages.into_iter().filter_map(|(page, bytes)| Some((self.place(page)?, bytes))));
        Image { memory, tables, ..image }
    }

    /// The damaged second stage, and a first one before it.
    fn ahead(&self, image: Image, rng: &mut Rng) -> Image {
        let first = self.0.other();
        let start = 2 << self.rungs()[0].0;
        let chunks = image.damages.iter().map(|damage| (damage.iova >> CHUNK, before(damage.iova >> CHUNK))).collect();
        let (mut own, root) = whole(&first, &chunks, start + 4096..start + ROOM, rng);
        let (tables, words) = L::both((&first, root), (&self.0, image.root), start);
        for (word, index) in words.into_iter().zip(0..) {
            own.write(start + index * 8, word, false);
        }
        let mut memory = image.memory;
        memory.pages.extend(own.pages.into_iter().map(|(page, bytes)| (image.kept + (page - start), bytes)));
        Image { memory, tables, ..image }
    }
}

impl<L: Stage> Ladder for Nested<L> {
    fn name(&self) -> String {
        format!("two stages, damaged the {}", self.0.name())
    }

    fn formats(&self) -> Vec<&'static str> {
        let (this, other) = (self.0.formats(), self.0.other().formats());
        if self.0.is_first() { [this, other].concat() } else { [other, this].concat() }
    }

    fn rungs(&self) -> Vec<(u32, u64)> {
        self.0.rungs()
    }

    fn places(&self) -> Range<u64> {
        self.0.places()
    }

    fn address_bits(&self) -> u32 {
        self.0.address_bits()
    }

    fn high_address(&self) -> u64 {
        self.0.high_address()
    }

    fn blind_bits(&self) -> u64 {
        self.0.blind_bits()
    }

    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good> {
        self.0.pointer(height, below, table)
    }

    fn lowest(&self) -> usize {
        self.0.lowest()
    }

    fn leaves(&self, height: usize) -> Vec<(Good, u32)> {
        self.0.leaves(height)
    }

    fn with_address(&self, leaf: u64, address: u64) -> u64 {
        self.0.with_address(leaf, address)
    }

    fn address(&self, entry: u64) -> u64 {
        self.0.address(entry)
    }

    fn iova(&self, position: u64) -> u64 {
        let iova = self.0.iova(position);
        if self.0.is_first() { iova } else { in_chunk(before(iova >> CHUNK), iova) }
    }

    fn kept(&self) -> u64 {
        if self.0.is_first() { 0 } else { ROOM }
    }

    fn place(&self, address: u64) -> Option<u64> {
        if self.0.is_first() { Some(in_chunk(moved(address >> CHUNK)?, address)) } else { Some(address) }
    }

    fn tables(&self, root: u64) -> Tables {
        self.0.tables(root)
    }

    fn complete(&self, image: Image, rng: &mut Rng) -> Image {
        if self.0.is_first() { self.behind(image, rng) } else { self.ahead(image, rng) }
    }

    fn excuse(&self, damage: &Damage, write: bool) -> Option<KnownError> {
        self.0.excuse(damage, write).or_else(|| self.0.excuse_of_two(damage, write))
    }
}

impl Stage for ArmLadder {
    fn is_first(&self) -> bool {
        self.first_stage
    }

    fn other(&self) -> ArmLadder {
        let input_bits = if self.first_stage { 40 } else { 48 };
        ArmLadder { first_stage: !self.first_stage, granule: 4096, input_bits, output_bits: 44, halves: Halves::Low }
    }

    fn both(first: (&ArmLadder, u64), second: (&ArmLadder, u64), context: u64) -> (Tables, Vec<u64>) {
        let (first, second) = (first.0.stage_1(first.1), second.0.stage_2(second.1));
        let words = context_descriptor(&first).unwrap_or_default().to_vec();
        (Tables::Smmu(SmmuTables { first: Some(first), second: Some(second), context: Some(context) }), words)
    }
}

impl Stage for RiscvLadder {
    fn is_first(&self) -> bool {
        !self.second
    }

    fn other(&self) -> RiscvLadder {
        // The lower half of five levels has all addresses that a second stage of three or four has.
        RiscvLadder { second: !self.second, levels: if self.second { 5 } else { self.levels } }
    }

    fn both(first: (&RiscvLadder, u64), second: (&RiscvLadder, u64), _: u64) -> (Tables, Vec<u64>) {
        (Tables::Riscv(RiscvTables { first: Some(first.0.table(first.1)), second: Some(second.0.table(second.1)) }), Vec::new())
    }

    fn excuse_of_two(&self, damage: &Damage, write: bool) -> Option<KnownError> {
        const WRITE: u64 = 1 << 2 | 1 << 7;
        // The first stage allows writing everywhere; W and D must be set for that.
        let forbids = damage.entry & 0b1110 != 0 && damage.entry & WRITE != WRITE;
        (self.second && !write && forbids).then_some(known::RISCV_TWO_STAGES)
    }
}
