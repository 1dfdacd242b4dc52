//! Writing tables of any format that a few functions describe: where it has windows, how its levels divide the input, and what its entries look like.

use std::collections::BTreeMap;

use super::{Options, Rng};
use crate::reference::snapshot::Memory;
use crate::reference::tables::TableConfig;
use crate::reference::{Access, Run, bits, merge};

/// A range of IOVAs and the root that it goes to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Window {
    pub(super) first: u64,
    /// Inclusive.
    pub(super) last: u64,
    pub(super) tree: usize,
    /// Where `first` lies in what the root could cover.
    pub(super) position: u64,
}

/// What a table entry should say.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pointer {
    /// Height of the table that has the entry; the last level is 0.
    pub(super) height: u32,
    /// Height of the table that it points to.
    pub(super) next: u32,
    /// Address of that table.
    pub(super) address: u64,
    /// The lowest and the highest index that is needed there.
    pub(super) used: (u64, u64),
    /// Whether something is to be forbidden, if the format can.
    pub(super) restricted: bool,
}

/// The random part of an entry.
pub(super) struct Ink<'a> {
    pub(super) rng: &'a mut Rng,
    pub(super) options: Options,
}

impl Ink<'_> {
    /// Random values for the bits from `low` to `high`, if noise is wanted.
    pub(super) fn noise(&mut self, high: u32, low: u32) -> u64 {
        if self.options.noise && self.rng.percent(30) { bits(self.rng.number(), high, low) << low } else { 0 }
    }

    /// An address of so many bits, aligned.
    pub(super) fn address(&mut self, address_bits: u32, alignment: u32) -> u64 {
        bits(self.rng.number(), address_bits.min(63) - 1, 0) >> alignment << alignment
    }
}

/// A format, for the builder.
pub(super) trait Radix {
    fn windows(&self) -> Vec<Window>;
    /// Height of the roots.
    fn top(&self) -> u32;
    /// Log2 of what an entry covers.
    fn shift(&self, height: u32) -> u32;
    /// Entries of a table; `tree` counts for roots.
    fn entries(&self, height: u32, tree: usize) -> u64;
    /// Log2 of the sizes of leaves, ascending.
    fn leaf_sizes(&self) -> Vec<u32>;
    /// The height where a leaf of a size stands.
    fn leaf_height(&self, size: u32) -> u32;
    /// Addresses of tables are below `1 << address_bits`.
    fn address_bits(&self) -> u32;
    /// Addresses of leaves of a size are below `1 << leaf_address_bits(size)`.
    fn leaf_address_bits(&self, _size: u32) -> u32 {
        self.address_bits()
    }
    /// What leaves can allow.
    fn accesses(&self) -> Vec<Access>;
    fn entry_bytes(&self) -> u64 {
        8
    }
    /// The least size, and alignment, of a root.
    fn least_root(&self) -> u64 {
        64
    }
    /// What a table of so many bytes is aligned to.
    fn table_alignment(&self, size: u64) -> u64 {
        size
    }
    fn big_endian(&self) -> bool {
        false
    }
    /// What an unused entry holds.
    fn absent(&self, _height: u32) -> u64 {
        0
    }
    /// What is allowed before any entry.
    fn granted(&self) -> Access {
        Access::RW
    }
    /// The heights that a table entry may point to, besides the next one, for what is behind it.
    fn may_skip(&self) -> bool {
        false
    }
    /// A table entry, what it lets through, and a word for the entries behind it.
    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64);
    /// A leaf, and what it allows.
    fn leaf(&self, height: u32, leaf: &Run, word: u64, ink: &mut Ink<'_>) -> (u64, Access);
    /// The entry of a leaf made such that only some of its bytes can be reached, and the first and the last of these; none if it stays whole.
    fn cut(&self, _leaf: &Run, _entry: u64, _rng: &mut Rng) -> Option<(u64, (u64, u64))> {
        None
    }
    /// Something that does not translate, at this height.
    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64;
}

/// The formats that are written here.
pub(super) fn of(config: &TableConfig) -> Option<&dyn Radix> {
    match config {
        TableConfig::ArmStage1(_) | TableConfig::ArmStage2(_) | TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_) => None,
        TableConfig::AmdV1(config) => Some(config),
        TableConfig::AmdV2(config) => Some(config),
        TableConfig::RiscvFirst(config) => Some(config),
        TableConfig::RiscvSecond(config) => Some(config),
        TableConfig::S390(config) => Some(config),
        TableConfig::LoongArch(config) => Some(config),
        TableConfig::Dart(config) => Some(config),
        TableConfig::V7s(config) => Some(config),
    }
}

/// The same config with the roots' addresses.
pub(super) fn with_roots(mut config: TableConfig, roots: &BTreeMap<usize, u64>) -> TableConfig {
    let get = |tree: usize| roots.get(&tree).copied();
    let only = get(0).unwrap_or(0);
    match &mut config {
        TableConfig::ArmStage1(_) | TableConfig::ArmStage2(_) | TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_) => {}
        TableConfig::AmdV1(config) => config.root = only,
        TableConfig::AmdV2(config) => config.root = only,
        TableConfig::RiscvFirst(config) => config.root = only,
        TableConfig::RiscvSecond(config) => config.root = only,
        TableConfig::S390(config) => config.root = only,
        TableConfig::LoongArch(config) => (config.root, config.root_high) = (get(0), get(1)),
        TableConfig::Dart(config) => config.roots = [0, 1, 2, 3].map(get),
        TableConfig::V7s(config) => (config.root, config.root_high) = (get(0), get(1)),
    }
    config
}

/// Random leaves that do not overlap, at the ends of windows and between.
pub(super) fn random_leaves(format: &dyn Radix, rng: &mut Rng, options: Options) -> Vec<Run> {
    let (windows, sizes, accesses) = (format.windows(), format.leaf_sizes(), format.accesses());
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    let mut previous: Option<u64> = None;
    for _ in 0..options.clusters {
        let window = rng.pick(&windows);
        let bits = if rng.percent(45) { sizes[0] } else { rng.pick(&sizes) };
        let (size, address_bits) = (1u64 << bits, format.leaf_address_bits(bits));
        // Slots of this size inside the window, by number from IOVA zero.
        let low = window.first.div_ceil(size);
        if bits >= address_bits || window.last < size - 1 || (window.last - (size - 1)) / size < low {
            continue;
        }
        let high = (window.last - (size - 1)) / size;
        let address_slots = 1u64 << (address_bits.min(63) - bits);
        let count = match bits {
            _ if rng.percent(10) && bits < 24 => 1 + rng.below(300),
            0..16 => 1 + rng.below(40),
            16..24 => 1 + rng.below(8),
            _ => 1 + rng.below(3),
        };
        let count = count.min((high - low).saturating_add(1)).min(address_slots);
        let slot = match rng.below(6) {
            0 => low,
            1 => high - (count - 1),
            2 | 3 if previous.is_some() => (previous.unwrap() / size + 1 + rng.below(3)).clamp(low, high - (count - 1)),
            _ => low + rng.below((high - (count - 1) - low).saturating_add(1).max(1)),
        };
        let address_slot = match rng.below(8) {
            0 => 0,
            1 => address_slots - count,
            _ => rng.below(address_slots - count + 1),
        };
        let access = rng.pick(&accesses);
        let (scattered, mixed, holes) = (rng.percent(20), rng.percent(25), rng.percent(30));
        for index in 0..count {
            if holes && rng.percent(25) {
                continue;
            }
            let iova = (slot + index) * size;
            let address = if scattered { rng.below(address_slots) } else { address_slot + index } * size;
            let access = if mixed { rng.pick(&accesses) } else { access };
            let last = iova + (size - 1);
            let overlaps = leaves.range(..=last).next_back().is_some_and(|(_, leaf)| leaf.iova + (leaf.size - 1) >= iova);
            if !overlaps {
                leaves.insert(iova, Run { iova, address, size, access });
                previous = Some(last);
            }
        }
    }
    leaves.into_values().collect()
}

/// What a table entry leads to.
#[derive(Clone, Copy)]
struct Child {
    table: u64,
    height: u32,
    limit: Access,
    word: u64,
}

/// Tables, and what they map.
pub(super) struct Built {
    pub(super) roots: BTreeMap<usize, u64>,
    pub(super) memory: Memory,
    pub(super) truth: Vec<Run>,
}

struct Builder<'a> {
    format: &'a dyn Radix,
    memory: Memory,
    /// Ranges that tables have taken: first byte and size.
    taken: BTreeMap<u64, u64>,
    roots: BTreeMap<usize, u64>,
    children: BTreeMap<u64, Child>,
    /// All tables: address, height, entries.
    tables: Vec<(u64, u32, u64)>,
    written: BTreeMap<u64, ()>,
    ink: Ink<'a>,
}

/// Writes the tables for leaves that do not overlap, sorted or not.
pub(super) fn build(format: &dyn Radix, leaves: &[Run], rng: &mut Rng, options: Options) -> Built {
    let mut builder = Builder {
        format,
        memory: Memory::default(),
        taken: BTreeMap::new(),
        roots: BTreeMap::new(),
        children: BTreeMap::new(),
        tables: Vec::new(),
        written: BTreeMap::new(),
        ink: Ink { rng, options },
    };
    let windows = format.windows();
    for window in &windows {
        if !builder.roots.contains_key(&window.tree) {
            let entries = format.entries(format.top(), window.tree);
            let root = builder.table(entries, format.top());
            builder.roots.insert(window.tree, root);
            builder.tables.push((root, format.top(), entries));
        }
    }
    // By tree and position, so that what is behind an entry is found.
    let mut placed: Vec<(usize, u64, Run)> = Vec::new();
    for leaf in leaves {
        let window = windows.iter().find(|window| window.first <= leaf.iova && leaf.iova <= window.last).expect("the leaf is inside a window");
        let access = if leaf.access == Access::W && !format.accesses().contains(&Access::W) { Access::RW } else { leaf.access };
        placed.push((window.tree, window.position + (leaf.iova - window.first), Run { access, ..*leaf }));
    }
    placed.sort_by_key(|(tree, position, _)| (*tree, *position));
    let mut truth = Vec::new();
    for index in 0..placed.len() {
        builder.insert(&placed, index, &mut truth);
    }
    if options.decoys {
        for _ in 0..40 {
            builder.add_decoy();
        }
    }
    Built { roots: builder.roots, memory: builder.memory, truth: merge(truth) }
}

impl Builder<'_> {
    /// A free, aligned place for a table.
    fn room(&mut self, size: u64) -> u64 {
        let mut places = vec![0x4000_0000];
        if self.format.address_bits() >= 36 {
            places.push(0xc_0000_0000);
        }
        if self.format.address_bits() >= 47 {
            places.push(0x7fff_8000_0000);
        }
        loop {
            let alignment = self.format.table_alignment(size);
            let place = self.ink.rng.pick(&places) + self.ink.rng.below((0x4000_0000 - size) / alignment + 1) * alignment;
            let free = self.taken.range(..place + size).next_back().is_none_or(|(first, length)| first + length <= place);
            if free {
                self.taken.insert(place, size);
                self.memory.add_zeroed(place, size);
                return place;
            }
        }
    }

    /// Room for a table, with nothing in it.
    fn table(&mut self, entries: u64, height: u32) -> u64 {
        let least = if height == self.format.top() { self.format.least_root() } else { 0 };
        let table = self.room((entries * self.format.entry_bytes()).max(least));
        let absent = self.format.absent(height);
        for index in 0..if absent == 0 { 0 } else { entries } {
            self.put(table + index * self.format.entry_bytes(), absent);
        }
        table
    }

    fn put(&mut self, slot: u64, entry: u64) {
        match self.format.entry_bytes() {
            4 => self.memory.write4(slot, entry, self.format.big_endian()),
            _ => self.memory.write(slot, entry, self.format.big_endian()),
        }
    }

    fn write(&mut self, slot: u64, entry: u64) {
        self.put(slot, entry);
        self.written.insert(slot, ());
    }

    fn slot(&self, table: u64, height: u32, tree: usize, position: u64) -> u64 {
        table + (position >> self.format.shift(height)) % self.format.entries(height, tree) * self.format.entry_bytes()
    }

    /// Writes one leaf with all its replicas, and the tables above it that are not there yet.
    fn insert(&mut self, placed: &[(usize, u64, Run)], index: usize, truth: &mut Vec<Run>) {
        let (tree, position, leaf) = placed[index];
        let leaf_height = self.format.leaf_height(leaf.size.trailing_zeros());
        let (mut table, mut height) = (self.roots[&tree], self.format.top());
        let (mut allowed, mut word) = (self.format.granted(), 0);
        while height > leaf_height {
            let slot = self.slot(table, height, tree, position);
            let child = match self.children.get(&slot) {
                Some(child) => *child,
                None => self.add_table(slot, height, placed, index),
            };
            allowed = allowed.and(child.limit);
            (table, height, word) = (child.table, child.height, child.word);
        }
        let shift = self.format.shift(height);
        let (entry, access) = self.format.leaf(height, &leaf, word, &mut self.ink);
        let cut = if self.ink.options.restrictions { self.format.cut(&leaf, entry, self.ink.rng) } else { None };
        let (entry, (reach_first, reach_last)) = cut.unwrap_or((entry, (0, leaf.size - 1)));
        let access = allowed.and(access);
        let slots = leaf.size >> shift;
        for replica in 0..slots {
            // Now and then one of the replicas is missing, and its piece is a hole.
            if slots > 1 && self.ink.options.decoys && self.ink.rng.percent(2) {
                continue;
            }
            let offset = replica << shift;
            let slot = self.slot(table, height, tree, position + offset);
            assert!(!self.written.contains_key(&slot), "leaves do not overlap");
            self.write(slot, entry);
            let (first, last) = (reach_first.max(offset), reach_last.min(offset + ((1 << shift) - 1)));
            if access != Access::NONE && first <= last {
                truth.push(Run { iova: leaf.iova + first, address: leaf.address + first, size: last - first + 1, access });
            }
        }
    }

    /// The table behind an entry, fit for all leaves that go through the entry.
    fn add_table(&mut self, slot: u64, height: u32, placed: &[(usize, u64, Run)], index: usize) -> Child {
        let (tree, position, _) = placed[index];
        let shift = self.format.shift(height);
        let inside = placed[index..].iter().take_while(|(other, place, _)| *other == tree && place >> shift == position >> shift);
        let offset = |place: u64| bits(place, shift - 1, 0);
        let (mut lowest, mut end, mut tallest) = (u64::MAX, 0, 0);
        for (_, place, leaf) in inside {
            lowest = lowest.min(offset(*place));
            end = end.max(offset(*place) + (leaf.size - 1));
            tallest = tallest.max(self.format.leaf_height(leaf.size.trailing_zeros()));
        }
        let mut next = height - 1;
        if self.format.may_skip() && self.ink.rng.percent(40) {
            // Not below the height of a leaf, and so that all of them fit into one table.
            let covers = |height: u32| self.format.shift(height) + self.format.entries(height, tree).trailing_zeros();
            next = (tallest..height).find(|next| end >> covers(*next) == 0).unwrap_or(next);
        }
        let entries = self.format.entries(next, tree);
        let address = self.table(entries, next);
        self.tables.push((address, next, entries));
        let restricted = self.ink.options.restrictions && self.ink.rng.percent(8);
        let used = (lowest >> self.format.shift(next), end >> self.format.shift(next));
        let (entry, limit, word) = self.format.pointer(Pointer { height, next, address, used, restricted }, &mut self.ink);
        self.write(slot, entry);
        let child = Child { table: address, height: next, limit, word };
        self.children.insert(slot, child);
        child
    }

    /// Puts something that must not translate into a free slot.
    fn add_decoy(&mut self) {
        let (table, height, entries) = self.tables[self.ink.rng.below(self.tables.len() as u64) as usize];
        let slot = table + self.ink.rng.below(entries) * self.format.entry_bytes();
        if !self.written.contains_key(&slot) {
            let entry = self.format.decoy(height, &mut self.ink);
            self.write(slot, entry);
        }
    }
}
