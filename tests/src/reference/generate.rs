//! Tables with known content.
//!
//! [`generate`] picks settings and mappings from a seed and writes the tables the plain way, one leaf after the other; the truth is kept beside them. Where the
//! entries of a path restrict what is behind them, the truth follows at the moment of writing, so nothing is ever read back from a table. The geometry is worked
//! out here once more, in heights above the last level, and not taken from [`crate::reference::tables`].

use std::collections::BTreeMap;
use std::path::Path;

use super::snapshot::{Device, Memory, MemoryRange, Snapshot, Stream, TableEntry, TableState, write_expected};
use super::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};
use super::{Access, Run, bit, bits, merge};

/// The id of the only device in a generated snapshot.
pub const DEVICE: u64 = 0x38;

/// SplitMix64.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator; equal seeds give equal numbers.
    pub fn new(seed: u64) -> Rng {
        Rng(seed)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ (value >> 31)
    }

    /// A number below `end`, which is not zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// True in so many cases out of a hundred.
    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }

    /// One of the items.
    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len() as u64) as usize]
    }
}

/// The four formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `arm-smmuv3/stage1`
    ArmStage1,
    /// `arm-smmuv3/stage2`
    ArmStage2,
    /// `intel-vtd/first-stage`
    VtdFirst,
    /// `intel-vtd/second-stage`
    VtdSecond,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 4] = [Format::ArmStage1, Format::ArmStage2, Format::VtdFirst, Format::VtdSecond];
}

/// What the tables hold besides plain leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// How many groups of mappings are tried.
    pub clusters: u64,
    /// Table entries that forbid some or all access to what is behind them.
    pub restrictions: bool,
    /// Entries that look like something and must not translate: invalid, reserved, misaligned, without access flag, beyond the output size, empty tables.
    pub decoys: bool,
    /// Bits that hardware ignores have random values.
    pub noise: bool,
}

impl Default for Options {
    fn default() -> Options {
        Options { clusters: 10, restrictions: true, decoys: true, noise: true }
    }
}

/// A generated guest.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The snapshot, in the converted form, with the one device [`DEVICE`].
    pub snapshot: Snapshot,
    /// What the tables map: sorted maximal runs.
    pub truth: Vec<Run>,
    /// The format with its settings; also in the snapshot.
    pub config: TableConfig,
}

impl Generated {
    /// Writes `snapshot.json`, `pages.bin` and, from the truth, `expected.json`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write_snapshot(&self, folder: &Path) -> std::io::Result<()> {
        self.snapshot.write_snapshot(folder)?;
        let label = self.snapshot.devices[0].label.clone();
        write_expected(folder, &[Stream { label, id: DEVICE, runs: self.truth.clone() }])
    }
}

/// Tables of a format, all from one seed.
pub fn generate(format: Format, seed: u64) -> Generated {
    generate_with(format, seed, Options::default())
}

/// The same with options.
pub fn generate_with(format: Format, seed: u64, options: Options) -> Generated {
    let mut rng = Rng::new(seed);
    let config = random_config(format, &mut rng);
    let leaves = random_leaves(&config, &mut rng, options);
    build(config, &leaves, &mut rng, options)
}

/// Random settings that the architecture allows. Roots are zero until [`build`].
pub fn random_config(format: Format, rng: &mut Rng) -> TableConfig {
    match format {
        Format::ArmStage1 => {
            let lpa2 = rng.percent(20);
            let granule = if lpa2 { rng.pick(&[4096, 16384]) } else { rng.pick(&[4096, 4096, 16384, 65536]) };
            let wide = lpa2 || granule == 65536;
            let output_bits = random_output_bits(wide, rng);
            let half = |granule: u64, rng: &mut Rng| ArmHalf {
                root: 0,
                granule,
                input_bits: random_input_bits(if lpa2 || granule == 65536 { 52 } else { 48 }, rng),
                top_byte_ignored: rng.percent(20),
                hierarchical_disabled: rng.percent(20),
            };
            let low = half(granule, rng);
            let high_granule = if lpa2 || rng.percent(60) { granule } else { rng.pick(&[4096, 16384, 65536]) };
            let high = if rng.percent(40) { Some(half(high_granule, rng)) } else { None };
            let hardware_access = rng.percent(30);
            TableConfig::ArmStage1(ArmStage1 {
                low: Some(low),
                high,
                output_bits,
                // Indexes 0, 1, 2: normal without cache, normal write-back, device.
                mair: 0x04_ff_44,
                hardware_access,
                hardware_dirty: hardware_access && rng.percent(60),
                access_flag_disabled: rng.percent(10),
                big_endian: rng.percent(15),
                lpa2,
                privileged: false,
            })
        }
        Format::ArmStage2 => {
            let lpa2 = rng.percent(20);
            let granule = if lpa2 { rng.pick(&[4096, 16384]) } else { rng.pick(&[4096, 4096, 16384, 65536]) };
            let output_bits = random_output_bits(lpa2 || granule == 65536, rng);
            // IHI 0070 STE.S2T0SZ: not more than the output size, and 48 without 52-bit addresses.
            let largest = if lpa2 || granule == 65536 { output_bits } else { output_bits.min(48) };
            let input_bits = random_input_bits(largest, rng);
            let hardware_access = rng.percent(30);
            TableConfig::ArmStage2(ArmStage2 {
                root: 0,
                granule,
                input_bits,
                output_bits,
                start_level: random_start_level(granule, input_bits, output_bits, lpa2, rng),
                hardware_access,
                hardware_dirty: hardware_access && rng.percent(60),
                access_flag_disabled: rng.percent(10),
                big_endian: rng.percent(15),
                lpa2,
            })
        }
        Format::VtdFirst => {
            let levels = rng.pick(&[4, 4, 5]);
            TableConfig::VtdFirst(VtdFirst { root: 0, levels, output_bits: 52, large_1g: true, execute_disable: true })
        }
        Format::VtdSecond => {
            let levels = rng.pick(&[3, 4, 4, 5]);
            TableConfig::VtdSecond(VtdSecond {
                root: 0,
                levels,
                input_bits: 12 + 9 * levels,
                output_bits: 52,
                large_2m: true,
                large_1g: true,
                snoop_control: false,
            })
        }
    }
}

fn random_output_bits(wide: bool, rng: &mut Rng) -> u32 {
    if wide && rng.percent(60) { 52 } else { rng.pick(&[32, 36, 40, 42, 44, 48, 48, 48]) }
}

fn random_input_bits(largest: u32, rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => largest,
        1 => rng.pick(&[32, 36, 39, 40, 42, 44, 47, 48]).min(largest),
        2 => largest - rng.below(4) as u32,
        // TxSZ is at most 39 without small tables.
        _ => 25 + rng.below(u64::from(largest - 25) + 1) as u32,
    }
}

/// One of the start levels that the input size allows; the first ones need a large enough output size (DDI 0487 D8.2, start level by physical address size).
fn random_start_level(granule: u64, input_bits: u32, output_bits: u32, lpa2: bool, rng: &mut Rng) -> i32 {
    let page_bits = granule.trailing_zeros();
    let stride = page_bits - 3;
    let mut allowed = Vec::new();
    for level in -1..=3 {
        let below = page_bits + stride * (3 - level) as u32;
        let resolved = input_bits.saturating_sub(below);
        let possible = match (granule, level) {
            (4096, -1) => lpa2 && output_bits == 52,
            (4096, 0) => output_bits >= 44,
            (16384, 0) => lpa2 && output_bits == 52,
            (16384, 1) => output_bits >= 42,
            (65536, 1) => output_bits >= 44,
            (16384, -1) | (65536, -1 | 0) => false,
            _ => true,
        };
        if possible && resolved >= 1 && resolved <= stride + 4 {
            allowed.push(level);
        }
    }
    rng.pick(&allowed)
}

/// A root with its levels. Heights count from the last level, which is 0.
struct Tree {
    root: u64,
    /// 1 for Arm's TTB1, else 0.
    half: usize,
    page_bits: u32,
    /// Index bits of a table that is not the first.
    stride: u32,
    /// The height of the first table.
    top: u32,
    /// Entries in the first table, or in all concatenated ones.
    top_entries: u64,
    /// The largest height of a leaf.
    largest_leaf: u32,
    /// Addresses must be below `1 << address_bits`.
    address_bits: u32,
}

impl Tree {
    fn span_bits(&self, height: u32) -> u32 {
        self.page_bits + self.stride * height
    }
}

/// A range of IOVAs and the tree that it goes to.
struct Window {
    first: u64,
    bits: u32,
    tree: usize,
}

/// The trees of a format (roots zero) and the IOVA windows.
fn shape(config: &TableConfig) -> (Vec<Tree>, Vec<Window>) {
    let arm_tree = |half: usize, granule: u64, input_bits: u32, top: Option<u32>, output_bits: u32, lpa2: bool| {
        let page_bits = granule.trailing_zeros();
        let stride = page_bits - 3;
        // As many levels as it takes.
        let top = top.unwrap_or((input_bits - page_bits).div_ceil(stride) - 1);
        let lpa2 = lpa2 && granule != 65536;
        let largest_leaf = match granule {
            4096 => 2 + u32::from(lpa2),
            16384 => 1 + u32::from(lpa2),
            _ => 1 + u32::from(output_bits == 52),
        };
        let address_bits = if granule == 65536 || lpa2 { output_bits } else { output_bits.min(48) };
        let top_entries = 1 << (input_bits - page_bits - stride * top);
        Tree { root: 0, half, page_bits, stride, top, top_entries, largest_leaf, address_bits }
    };
    let vtd_tree = |levels: u32, output_bits: u32| Tree {
        root: 0,
        half: 0,
        page_bits: 12,
        stride: 9,
        top: levels - 1,
        top_entries: 512,
        largest_leaf: 2,
        address_bits: output_bits,
    };
    match config {
        TableConfig::ArmStage1(config) => {
            let mut trees = Vec::new();
            let mut windows = Vec::new();
            for (half, part) in [config.low, config.high].into_iter().enumerate() {
                if let Some(part) = part {
                    let first = if half == 0 { 0 } else { u64::MAX - ((1 << part.input_bits) - 1) };
                    windows.push(Window { first, bits: part.input_bits, tree: trees.len() });
                    trees.push(arm_tree(half, part.granule, part.input_bits, None, config.output_bits, config.lpa2));
                }
            }
            (trees, windows)
        }
        TableConfig::ArmStage2(config) => {
            let top = Some((3 - config.start_level) as u32);
            let tree = arm_tree(0, config.granule, config.input_bits, top, config.output_bits, config.lpa2);
            (vec![tree], vec![Window { first: 0, bits: config.input_bits, tree: 0 }])
        }
        TableConfig::VtdFirst(config) => {
            // Canonical addresses: 47 or 56 bits at each end.
            let bits = 9 * config.levels + 11;
            let high = u64::MAX - ((1 << bits) - 1);
            (vec![vtd_tree(config.levels, config.output_bits)], vec![Window { first: 0, bits, tree: 0 }, Window { first: high, bits, tree: 0 }])
        }
        TableConfig::VtdSecond(config) => {
            (vec![vtd_tree(config.levels, config.output_bits)], vec![Window { first: 0, bits: 9 * config.levels + 12, tree: 0 }])
        }
    }
}

fn is_vtd(config: &TableConfig) -> bool {
    matches!(config, TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_))
}

/// VT-d's interrupt range, which is never translated and must not be translated to.
fn in_interrupt_range(first: u64, size: u64) -> bool {
    first <= 0xfeef_ffff && first + (size - 1) >= 0xfee0_0000
}

/// How many neighbours make a contiguous group (DDI 0487 D8.7.1), by height.
fn contiguous_group(tree: &Tree, height: u32) -> u64 {
    match (tree.page_bits, height) {
        (12, _) => 16,
        (14, 0) => 128,
        _ => 32,
    }
}

/// Random leaves that do not overlap: groups of pages and large leaves, at the ends of the input range and between, with holes and mixed access.
pub fn random_leaves(config: &TableConfig, rng: &mut Rng, options: Options) -> Vec<Run> {
    let (trees, windows) = shape(config);
    let write_only = matches!(config, TableConfig::ArmStage2(_) | TableConfig::VtdSecond(_));
    let accesses: &[Access] = if write_only { &[Access::R, Access::W, Access::RW, Access::RW] } else { &[Access::R, Access::RW, Access::RW] };
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    let mut previous_end = 0;
    for _ in 0..options.clusters {
        let window = &windows[rng.below(windows.len() as u64) as usize];
        let tree = &trees[window.tree];
        // With few address bits the largest leaf can be larger than everything.
        let fits = (0..=tree.largest_leaf.min(tree.top)).filter(|height| tree.span_bits(*height) <= tree.address_bits);
        let largest = fits.max().unwrap();
        let height = if rng.percent(55) { 0 } else { rng.below(u64::from(largest) + 1) as u32 };
        let size = 1u64 << tree.span_bits(height);
        let slots = 1u64 << (window.bits - tree.span_bits(height));
        let address_slots = 1u64 << (tree.address_bits - tree.span_bits(height));
        let group = contiguous_group(tree, height);
        let in_groups = rng.percent(25) && slots >= group && address_slots >= group;
        let count = match height {
            _ if in_groups => group * (1 + rng.below(2)),
            0 if rng.percent(15) => 1 + rng.below(700),
            0 => 1 + rng.below(40),
            1 => 1 + rng.below(8),
            _ => 1 + rng.below(3),
        };
        let count = count.min(slots).min(address_slots);
        let mut slot = match rng.below(6) {
            0 => 0,
            1 => slots - count,
            // Just behind the last cluster, or with a small hole.
            2 | 3 if previous_end >= window.first => ((previous_end - window.first).div_ceil(size) + rng.below(3)).min(slots - count),
            _ => rng.below(slots - count + 1),
        };
        let mut address_slot = match rng.below(8) {
            0 => 0,
            1 => address_slots - count,
            _ => rng.below(address_slots - count + 1),
        };
        if in_groups {
            slot -= slot % group;
            address_slot -= address_slot % group;
        }
        let access = rng.pick(accesses);
        let scattered = !in_groups && rng.percent(20);
        let mixed = !in_groups && rng.percent(20);
        let holes = !in_groups && rng.percent(30);
        for index in 0..count {
            if holes && rng.percent(25) {
                continue;
            }
            let iova = window.first + (slot + index) * size;
            let address = if scattered { rng.below(address_slots) } else { address_slot + index } * size;
            let access = if mixed { rng.pick(accesses) } else { access };
            let last = iova + (size - 1);
            let overlaps = leaves.range(..=last).next_back().is_some_and(|(_, leaf)| leaf.iova + (leaf.size - 1) >= iova);
            let interrupts = is_vtd(config) && (in_interrupt_range(iova, size) || in_interrupt_range(address, size));
            if !overlaps && !interrupts {
                leaves.insert(iova, Run { iova, address, size, access });
                previous_end = last.wrapping_add(1);
            }
        }
    }
    leaves.into_values().collect()
}

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
pub fn build(config: TableConfig, leaves: &[Run], rng: &mut Rng, options: Options) -> Generated {
    let (trees, windows) = shape(&config);
    let mut builder = Builder { config, trees, memory: Memory::default(), children: BTreeMap::new(), tables: Vec::new(), rng, options };
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
    let config = builder.config;
    let last = builder.trees.iter().map(|tree| (1u64 << tree.address_bits) - 1).max().unwrap();
    let snapshot = Snapshot {
        description: format!("generated {}", config.format()),
        unit_kind: String::new(),
        registers: BTreeMap::new(),
        tables: vec![TableEntry { id: DEVICE, pasid: None, state: TableState::Tables(config) }],
        map: vec![MemoryRange { kind: "ram".to_string(), first: 0, last }],
        devices: vec![Device { label: "0000:00:07.0".to_string(), id: DEVICE }],
        memory: builder.memory,
    };
    Generated { snapshot, truth: merge(truth), config }
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
                (child + permissions + self.noise(5, 5) + self.noise(58, 52), limit)
            }
            TableConfig::VtdSecond(_) => {
                let limit = if restricted { self.rng.pick(&[Access::R, Access::W]) } else { Access::RW };
                (child + u64::from(limit.read) + 2 * u64::from(limit.write) + self.noise(61, 52), limit)
            }
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
                // Accessed, dirty, global; bits 9 and 11 and the software bits.
                let ignored = self.noise(6, 5) + self.noise(8, 8) + self.noise(9, 9) + self.noise(11, 11) + self.noise(58, 52);
                let page_size = if height > 0 { 1 << 7 } else { 0 };
                address + 0b101 + 2 * u64::from(access.write) + page_size + ignored
            }
            TableConfig::VtdSecond(_) => {
                let page_size = if height > 0 { 1 << 7 } else { 0 };
                // Accessed and dirty are 8 and 9; 10 and 61 to 52 are ignored.
                let ignored = self.noise(10, 8) + self.noise(61, 52);
                address + u64::from(access.read) + 2 * u64::from(access.write) + page_size + ignored
            }
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
        };
        self.write(slot, entry);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::detect::{Resolution, resolve};
    use crate::reference::walk::{Fault, Walker};

    /// `REFERENCE_SEEDS` asks for another number.
    fn seeds() -> u64 {
        std::env::var("REFERENCE_SEEDS").map_or(250, |text| text.parse().unwrap())
    }

    #[test]
    fn the_walker_finds_the_truth() {
        for format in Format::ALL {
            let mut runs = 0;
            let mut leaves_of_every_access = [false; 3];
            for seed in 0..seeds() {
                let generated = generate(format, seed);
                let Resolution::Tables(stages) = resolve(&generated.snapshot, DEVICE).unwrap() else { panic!("{format:?} {seed}") };
                assert_eq!(stages, [generated.config]);
                let walker = Walker::new(&generated.snapshot.memory, &stages).unwrap();
                let found = walker.mappings().unwrap_or_else(|problem| panic!("{format:?} {seed}: {problem} {:#x?}", generated.config));
                for (index, run) in generated.truth.iter().enumerate() {
                    assert_eq!(found.get(index), Some(run), "{format:?} {seed}, run {index}, {:#x?}", generated.config);
                }
                assert_eq!(found.len(), generated.truth.len(), "{format:?} {seed}");
                runs += found.len();
                for run in &found {
                    leaves_of_every_access[usize::from(run.access.read) + 2 * usize::from(run.access.write) - 1] = true;
                }
            }
            assert!(runs as u64 > seeds() * 5, "{format:?}: {runs} runs are too few to mean anything");
            assert!(leaves_of_every_access[0] && leaves_of_every_access[2], "{format:?}");
        }
    }

    #[test]
    fn walks_agree_with_the_truth_at_every_edge() {
        for format in Format::ALL {
            for seed in 0..seeds() {
                let generated = generate(format, seed);
                let walker = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap();
                let expected = |iova: u64, write: bool| {
                    let run = generated.truth.iter().find(|run| run.iova <= iova && iova - run.iova < run.size && run.access.allows(write));
                    run.map(|run| run.address + (iova - run.iova)).ok_or(Fault)
                };
                for run in &generated.truth {
                    let last = run.iova + (run.size - 1);
                    for iova in [run.iova, last, run.iova.wrapping_sub(1), last.wrapping_add(1)] {
                        for write in [false, true] {
                            assert_eq!(walker.translate(iova, write), expected(iova, write), "{format:?} {seed} {iova:#x}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn an_ignored_top_byte_changes_nothing() {
        let mut looked_at = 0;
        for seed in 0..seeds() {
            let generated = generate(Format::ArmStage1, seed);
            let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
            let walker = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap();
            for run in &generated.truth {
                let half = if bit(run.iova, 63) { config.high } else { config.low }.unwrap();
                let tagged = (run.iova & !(0xff << 56)) | 0x5a << 56;
                let plain = walker.translate(run.iova, !run.access.read);
                assert_eq!(walker.translate(tagged, !run.access.read), if half.top_byte_ignored { plain } else { Err(Fault) }, "{seed} {run:?}");
                looked_at += u64::from(half.top_byte_ignored);
            }
        }
        assert!(looked_at > 0);
    }

    #[test]
    fn settings_survive_their_names() {
        for format in Format::ALL {
            for seed in 0..seeds() {
                let config = generate_with(format, seed, Options { clusters: 0, ..Options::default() }).config;
                assert_eq!(TableConfig::from_settings(config.format(), &config.settings()), Ok(config), "{format:?} {seed}");
            }
        }
    }

    #[test]
    fn a_written_snapshot_is_read_back() {
        let folder = std::env::temp_dir().join(format!("stagecraft-reference-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for format in Format::ALL {
            for seed in 0..20 {
                let generated = generate(format, seed);
                generated.write_snapshot(&folder).unwrap();
                assert!(Snapshot::load(&folder).unwrap() == generated.snapshot, "{format:?} {seed}");
                let streams = crate::reference::snapshot::load_expected(&folder).unwrap();
                assert!(streams[0].runs == generated.truth, "{format:?} {seed}");
            }
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }

    /// Flipping single bits of table memory must end in some answer, within the budget, and often in another one.
    #[test]
    fn damaged_tables_end_and_differ() {
        for format in Format::ALL {
            let mut different = 0;
            for seed in 0..40 {
                let mut generated = generate(format, seed);
                let mut rng = Rng::new(seed);
                let pages: Vec<u64> = generated.snapshot.memory.pages.keys().copied().collect();
                let big_endian = generated.config.big_endian();
                let used: Vec<u64> = pages.iter().flat_map(|page| (0..512).map(move |index| page + index * 8)).collect();
                let used: Vec<u64> = used.into_iter().filter(|slot| generated.snapshot.memory.read(*slot, false).unwrap() != 0).collect();
                if used.is_empty() {
                    continue;
                }
                for _ in 0..20 {
                    let slot = rng.pick(&used);
                    let entry = generated.snapshot.memory.read(slot, big_endian).unwrap();
                    generated.snapshot.memory.write(slot, entry ^ (1 << rng.below(64)), big_endian);
                }
                let walk = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap().with_budget(1_000_000).walk();
                different += u64::from(walk.runs != generated.truth);
            }
            assert!(different > 20, "{format:?}: {different}");
        }
    }
}
