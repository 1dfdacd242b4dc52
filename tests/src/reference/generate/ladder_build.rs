//! Writing Arm's and Intel's tables.

use std::collections::BTreeMap;

use super::ladder::{Tree, Window, contiguous_group, is_vtd, shape};
use super::{Generated, Options, Rng, generated};
use crate::reference::snapshot::Memory;
use crate::reference::tables::TableConfig;
use crate::reference::{Access, Run, bit, bits};

struct Builder<'a> {
    config: TableConfig,
    trees: Vec<Tree>,
    memory: Memory,
    /// What a table entry at this address points to, and what it lets through.
    children: BTreeMap<u64, (u64, Access)>,
    /// All tables: tree, address, height, entries.
    tables: Vec<(usize, u64, u32, u64)>,
    rng: &'a mut Rng,
    options: Options,
}

/// Writes the tables of a config for leaves that do not overlap: each a legal leaf of its window, `size` and alignment included. Write-only leaves become
/// read-write ones where the format has no write-only. The config's roots are set.
pub(super) fn build(config: TableConfig, leaves: &[Run], rng: &mut Rng, options: Options) -> Generated {
    let windows = shape(&config).1;
    let mut builder = builder(config, rng, options);
    builder.add_roots();
    let mut truth = Vec::new();
    let contiguous = builder.contiguous(&windows, leaves);
    for (leaf, contiguous) in leaves.iter().zip(contiguous) {
        let mut leaf = *leaf;
        if leaf.access == Access::W && matches!(config, TableConfig::ArmStage1(_) | TableConfig::VtdFirst(_)) {
            leaf.access = Access::RW;
        }
        let window = window_of(&windows, leaf.iova);
        let allowed = builder.insert(window.tree, leaf, contiguous);
        if allowed != Access::NONE {
            truth.push(Run { access: allowed, ..leaf });
        }
    }
    if options.decoys {
        for _ in 0..40 {
            builder.add_decoy();
        }
    }
    let last = builder.trees.iter().map(|tree| tree.address_bits).max().unwrap();
    generated(builder.config, builder.memory, truth, last)
}

/// A builder that has built nothing.
fn builder(config: TableConfig, rng: &mut Rng, options: Options) -> Builder<'_> {
    Builder { config, trees: shape(&config).0, memory: Memory::default(), children: BTreeMap::new(), tables: Vec::new(), rng, options }
}

/// The entry that points to a table.
pub(super) fn pointer(config: TableConfig, tree: usize, table: u64, restricted: bool, rng: &mut Rng, options: Options) -> u64 {
    builder(config, rng, options).table_entry(tree, table, restricted).0
}

/// The entry of a leaf, at a height of a tree.
pub(super) fn leaf(config: TableConfig, (tree, height): (usize, u32), leaf: &Run, rng: &mut Rng, options: Options) -> u64 {
    builder(config, rng, options).leaf_entry(tree, height, leaf.address, leaf.access, false)
}

fn window_of(windows: &[Window], iova: u64) -> &Window {
    windows.iter().find(|window| iova >= window.first && (iova - window.first) >> window.bits == 0).expect("the leaf is inside a window")
}

fn height_of(tree: &Tree, size: u64) -> u32 {
    let height = (0..=tree.largest_leaf.min(tree.top)).find(|height| size == 1 << tree.span_bits(*height));
    height.expect("the size is a leaf's")
}

impl Builder<'_> {
    /// Room for a table: some free, aligned place in one of the windows for tables.
    fn room(&mut self, tree: usize, size: u64) -> u64 {
        let address_bits = self.trees[tree].address_bits;
        let mut places = vec![0x4000_0000];
        if address_bits >= 40 {
            places.push(0x80_0000_0000);
        }
        if address_bits >= 48 {
            places.push(0xffff_8000_0000);
        }
        if address_bits == 52 {
            places.push(0xf_5a5a_0000_0000);
        }
        let step = size.max(4096);
        loop {
            let place = self.rng.pick(&places) + self.rng.below(0x4000_0000 / step) * step;
            if self.memory.pages.range(place..place + step).next().is_none() {
                self.memory.add_zeroed(place, size);
                return place;
            }
        }
    }

    fn add_roots(&mut self) {
        for index in 0..self.trees.len() {
            let entries = self.trees[index].top_entries;
            let size = (entries * 8).max(64);
            let mut root = self.room(index, size);
            if size < 4096 {
                // A short table shares its page with something else.
                let page = root;
                for offset in (0..4096).step_by(8) {
                    let junk = self.rng.number();
                    self.memory.write(page + offset, junk, false);
                }
                root += self.rng.below(4096 / size) * size;
                for offset in (0..entries * 8).step_by(8) {
                    self.memory.write(root + offset, 0, false);
                }
            }
            self.trees[index].root = root;
            let (half, top) = (self.trees[index].half, self.trees[index].top);
            self.tables.push((index, root, top, entries));
            match &mut self.config {
                TableConfig::ArmStage1(config) if half == 0 => config.low.as_mut().unwrap().root = root,
                TableConfig::ArmStage1(config) => config.high.as_mut().unwrap().root = root,
                TableConfig::ArmStage2(config) => config.root = root,
                TableConfig::VtdFirst(config) => config.root = root,
                TableConfig::VtdSecond(config) => config.root = root,
                _ => unreachable!("another builder's"),
            }
        }
    }

    /// Which leaves get the contiguous bit: whole, aligned groups that continue each other, some of them.
    fn contiguous(&mut self, windows: &[Window], leaves: &[Run]) -> Vec<bool> {
        let mut chosen = vec![false; leaves.len()];
        if is_vtd(&self.config) {
            return chosen;
        }
        for start in 0..leaves.len() {
            let leaf = leaves[start];
            let window = window_of(windows, leaf.iova);
            let tree = &self.trees[window.tree];
            let group = contiguous_group(tree, height_of(tree, leaf.size));
            let span = group * leaf.size;
            let end = start + group as usize;
            let aligned = (leaf.iova - window.first).is_multiple_of(span) && leaf.address.is_multiple_of(span);
            if !aligned || end > leaves.len() || span > 1 << window.bits {
                continue;
            }
            let whole = (0..group).all(|index| {
                let other = leaves[start + index as usize];
                let continues = other.iova - leaf.iova == index * leaf.size && other.address == leaf.address + index * leaf.size;
                continues && other.size == leaf.size && other.access == leaf.access
            });
            if whole && self.rng.percent(70) {
                chosen[start..end].fill(true);
            }
        }
        chosen
    }

    fn write(&mut self, address: u64, value: u64) {
        self.memory.write(address, value, self.config.big_endian());
    }

    /// Writes one leaf, and the tables above it that are not there yet. Returns what it allows in the end.
    fn insert(&mut self, tree: usize, leaf: Run, contiguous: bool) -> Access {
        let (stride, top, page_bits) = (self.trees[tree].stride, self.trees[tree].top, self.trees[tree].page_bits);
        let leaf_height = height_of(&self.trees[tree], leaf.size);
        assert!(leaf.iova.is_multiple_of(leaf.size) && leaf.address.is_multiple_of(leaf.size));
        let mut table = self.trees[tree].root;
        let mut allowed = leaf.access;
        let mut height = top;
        loop {
            let entries = if height == top { self.trees[tree].top_entries } else { 1 << stride };
            let index = (leaf.iova >> (page_bits + stride * height)) % entries;
            let slot = table + index * 8;
            if height == leaf_height {
                assert!(!self.children.contains_key(&slot), "leaves do not overlap");
                let entry = self.leaf_entry(tree, height, leaf.address, leaf.access, contiguous);
                self.write(slot, entry);
                return allowed;
            }
            let (child, limit) = match self.children.get(&slot) {
                Some(known) => *known,
                None => {
                    let child = self.room(tree, 8 << stride);
                    self.tables.push((tree, child, height - 1, 1 << stride));
                    let restricted = self.options.restrictions && self.rng.percent(8);
                    let (entry, limit) = self.table_entry(tree, child, restricted);
                    self.write(slot, entry);
                    self.children.insert(slot, (child, limit));
                    (child, limit)
                }
            };
            allowed = allowed.and(limit);
            table = child;
            height -= 1;
        }
    }

    /// An address in a descriptor.
    fn arm_address(&self, tree: usize, address: u64) -> u64 {
        let lpa2 = match &self.config {
            TableConfig::ArmStage1(config) => config.lpa2,
            TableConfig::ArmStage2(config) => config.lpa2,
            _ => unreachable!(),
        };
        match self.trees[tree].page_bits {
            // Bits 51 to 48 stand in 15 to 12.
            16 => address % (1 << 48) + (bits(address, 51, 48) << 12),
            // Bits 51 to 50 stand in 9 to 8.
            _ if lpa2 => address % (1 << 50) + (bits(address, 51, 50) << 8),
            _ => address,
        }
    }

    /// Random values for the bits from `low` to `high`, if noise is wanted.
    fn noise(&mut self, high: u32, low: u32) -> u64 {
        if self.options.noise && self.rng.percent(30) { bits(self.rng.number(), high, low) << low } else { 0 }
    }

    fn table_entry(&mut self, tree: usize, child: u64, restricted: bool) -> (u64, Access) {
        match self.config {
            TableConfig::ArmStage1(config) => {
                let half = if self.trees[tree].half == 0 { config.low } else { config.high }.unwrap();
                let mut entry = 0b11 + self.arm_address(tree, child) + self.noise(58, 52);
                let mut limit = Access::RW;
                if restricted {
                    let table_permissions = 1 + self.rng.below(3);
                    entry += table_permissions << 61;
                    // HAD makes these bits mean nothing.
                    if !half.hierarchical_disabled {
                        limit = if bit(table_permissions, 0) { Access::NONE } else { Access::R };
                    }
                }
                (entry, limit)
            }
            TableConfig::ArmStage2(_) => (0b11 + self.arm_address(tree, child) + self.noise(58, 52), Access::RW),
            TableConfig::VtdFirst(_) => {
                // Present, writable, user; accessed is set by hardware.
                let (limit, permissions) = match (restricted, self.rng.below(3)) {
                    (true, 0) => (Access::NONE, 0b011),
                    (true, 1) => (Access::NONE, 0b001),
                    (true, _) => (Access::R, 0b101),
                    (false, _) => (Access::RW, 0b111),
                };
                // Extended accessed is 10.
                (child + permissions + self.noise(5, 5) + self.noise(10, 10) + self.noise(58, 52), limit)
            }
            TableConfig::VtdSecond(_) => {
                let limit = if restricted { self.rng.pick(&[Access::R, Access::W]) } else { Access::RW };
                (child + u64::from(limit.read) + 2 * u64::from(limit.write) + self.noise(10, 8) + self.noise(61, 52), limit)
            }
            _ => unreachable!("another builder's"),
        }
    }

    fn leaf_entry(&mut self, tree: usize, height: u32, address: u64, access: Access, contiguous: bool) -> u64 {
        // Arm: page at the last level, else block.
        let arm_kind = if height == 0 { 0b11 } else { 0b01 };
        let arm_contiguous = u64::from(contiguous) << 52;
        match self.config {
            TableConfig::ArmStage1(config) => {
                // AttrIndx 1, AP[1], software bits, nG, XN.
                let mut entry = arm_kind + (1 << 2) + (1 << 6) + self.arm_address(tree, address) + arm_contiguous;
                entry += self.noise(58, 55) + self.noise(11, 11) + self.noise(54, 53);
                let shareability_in_entry = !config.lpa2 || self.trees[tree].page_bits == 16;
                if shareability_in_entry {
                    entry += 0b11 << 8;
                }
                // The access flag need not be set if hardware does it; members of a contiguous group look alike.
                if contiguous || !(config.hardware_access || config.access_flag_disabled) || self.rng.percent(50) {
                    entry += 1 << 10;
                }
                let dirty_managed = config.hardware_access && config.hardware_dirty;
                let clean = dirty_managed && access.write && !contiguous && self.rng.percent(50);
                if !access.write || clean {
                    entry += 1 << 7;
                }
                // DBM: writable although clean; without hardware management it means nothing.
                if clean || (!dirty_managed && !contiguous && self.options.noise && self.rng.percent(10)) {
                    entry += 1 << 51;
                }
                entry
            }
            TableConfig::ArmStage2(config) => {
                // MemAttr 0b1111: normal write-back.
                let mut entry = arm_kind + (0b1111 << 2) + self.arm_address(tree, address) + arm_contiguous + self.noise(58, 55);
                if !config.lpa2 {
                    entry += 0b11 << 8;
                }
                if contiguous || !(config.hardware_access || config.access_flag_disabled) || self.rng.percent(50) {
                    entry += 1 << 10;
                }
                let dirty_managed = config.hardware_access && config.hardware_dirty;
                let clean = dirty_managed && access.write && !contiguous && self.rng.percent(50);
                entry += u64::from(access.read) << 6;
                if access.write && !clean {
                    entry += 1 << 7;
                }
                if clean || (!dirty_managed && !contiguous && self.options.noise && self.rng.percent(10)) {
                    entry += 1 << 51;
                }
                entry
            }
            TableConfig::VtdFirst(_) => {
                // Accessed, dirty, global; extended accessed, bits 9 and 11 and the software bits.
                let ignored = self.noise(6, 5) + self.noise(8, 8) + self.noise(11, 9) + self.noise(58, 52);
                let page_size = if height > 0 { 1 << 7 } else { 0 };
                address + 0b101 + 2 * u64::from(access.write) + page_size + ignored
            }
            TableConfig::VtdSecond(_) => {
                let page_size = if height > 0 { 1 << 7 } else { 0 };
                // Accessed and dirty are 8 and 9; 10 and 61 to 52 are ignored.
                let ignored = self.noise(10, 8) + self.noise(61, 52);
                address + u64::from(access.read) + 2 * u64::from(access.write) + page_size + ignored
            }
            _ => unreachable!("another builder's"),
        }
    }

    /// Puts something that must not translate into a free slot.
    fn add_decoy(&mut self) {
        let (tree, table, height, entries) = self.tables[self.rng.below(self.tables.len() as u64) as usize];
        let slot = table + self.rng.below(entries) * 8;
        if self.memory.read(slot, false).unwrap() != 0 {
            return;
        }
        let span_bits = self.trees[tree].span_bits(height);
        let address_bits = self.trees[tree].address_bits;
        // What a leaf that is larger than all output addresses does is nothing to rely on.
        if span_bits > address_bits && height <= self.trees[tree].largest_leaf {
            return;
        }
        let leaf_allowed = height <= self.trees[tree].largest_leaf;
        // An address that the entry could hold if it were a leaf.
        let address = if span_bits < address_bits { (bits(self.rng.number(), address_bits - 1, 0) >> span_bits) << span_bits } else { 0 };
        let access = self.rng.pick(&[Access::R, Access::RW]);
        let junk = self.rng.number();
        let choice = self.rng.below(6);
        let entry = match self.config {
            TableConfig::ArmStage1(_) | TableConfig::ArmStage2(_) => {
                let (needs_flag, stage1) = match self.config {
                    TableConfig::ArmStage1(config) => (!config.hardware_access && !config.access_flag_disabled, true),
                    TableConfig::ArmStage2(config) => (!config.hardware_access && !config.access_flag_disabled, false),
                    _ => unreachable!(),
                };
                let leaf = self.leaf_entry(tree, height, address, access, false);
                match choice {
                    // Neither flag nor hardware that sets it.
                    0 if leaf_allowed && needs_flag => leaf - (1 << 10),
                    // For privileged requests only; nobody at all in stage 2.
                    1 if leaf_allowed && stage1 => leaf - (1 << 6),
                    1 if leaf_allowed => leaf & !(0b11 << 6) & !(1 << 51),
                    // Reserved at the last level; a block where there are none above.
                    2 if height == 0 => leaf - 0b10,
                    2 if !leaf_allowed => leaf,
                    // Beyond the output size, as a leaf or as a table.
                    3 if leaf_allowed && address_bits < 48 => leaf + (1 << address_bits),
                    4 if height > 0 && address_bits < 48 => 0b11 + (1 << address_bits),
                    // A table with nothing in it.
                    5 if height > 0 => {
                        let child = self.room(tree, 8 << self.trees[tree].stride);
                        self.table_entry(tree, child, false).0
                    }
                    _ => junk - junk % 2,
                }
            }
            TableConfig::VtdFirst(_) => match choice {
                // Without user, a large leaf that is not aligned, page size where there are no leaves.
                0 if height <= 2 => self.leaf_entry(tree, height, address, access, false) - 0b100,
                1 | 2 if height == 1 || height == 2 => self.leaf_entry(tree, height, address, access, false) + (1 << (span_bits - 1)),
                3 if height > 2 => (address & !0xfff) + 0b1000_0111,
                4 if height > 0 => {
                    let child = self.room(tree, 4096);
                    self.table_entry(tree, child, false).0
                }
                _ => junk - junk % 2,
            },
            TableConfig::VtdSecond(_) => match choice {
                1 | 2 if height == 1 || height == 2 => self.leaf_entry(tree, height, address, access, false) + (1 << (span_bits - 1)),
                3 if height > 2 => address + 0b1000_0011,
                4 if height > 0 => {
                    let child = self.room(tree, 4096);
                    self.table_entry(tree, child, false).0
                }
                _ => junk - junk % 8,
            },
            _ => unreachable!("another builder's"),
        };
        self.write(slot, entry);
    }
}
