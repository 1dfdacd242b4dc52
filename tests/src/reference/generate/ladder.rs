//! Settings, shapes and leaves of Arm's and Intel's tables.

use std::collections::BTreeMap;

use super::{Format, Options, Rng};
use crate::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};
use crate::reference::{Access, Run};

/// Random settings that the architecture allows. Roots are zero until [`build`].
pub(super) fn random_config(format: Format, rng: &mut Rng) -> TableConfig {
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
                hardware_tables: hardware_access && rng.percent(40),
                big_endian: rng.percent(15),
                lpa: [granule, high.map_or(granule, |high| high.granule)].contains(&65536) && (output_bits == 52 || rng.percent(50)),
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
                hardware_tables: hardware_access && rng.percent(40),
                big_endian: rng.percent(15),
                lpa: granule == 65536 && (output_bits == 52 || rng.percent(50)),
                lpa2,
                protected_walk: false,
            })
        }
        Format::VtdFirst => {
            let levels = rng.pick(&[4, 4, 5]);
            TableConfig::VtdFirst(VtdFirst {
                root: 0,
                levels,
                output_bits: 52,
                large_1g: true,
                execute_disable: true,
                extended_access: rng.percent(20),
            })
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
                accessed_dirty: rng.percent(40),
            })
        }
        _ => unreachable!("the other formats have modules of their own"),
    }
}

fn random_output_bits(wide: bool, rng: &mut Rng) -> u32 {
    if wide && rng.percent(60) { 52 } else { rng.pick(&[32, 36, 40, 42, 44, 48, 48, 48]) }
}

pub(super) fn random_input_bits(largest: u32, rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => largest,
        1 => rng.pick(&[32, 36, 39, 40, 42, 44, 47, 48]).min(largest),
        2 => largest - rng.below(4) as u32,
        // TxSZ is at most 39 without small tables.
        _ => 25 + rng.below(u64::from(largest - 25) + 1) as u32,
    }
}

/// One of the start levels that the input size allows; the first ones need a large enough output size (DDI 0487 D8.2, start level by physical address size).
pub(super) fn random_start_level(granule: u64, input_bits: u32, output_bits: u32, lpa2: bool, rng: &mut Rng) -> i32 {
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
pub(super) struct Tree {
    pub(super) root: u64,
    /// 1 for Arm's TTB1, else 0.
    pub(super) half: usize,
    pub(super) page_bits: u32,
    /// Index bits of a table that is not the first.
    pub(super) stride: u32,
    /// The height of the first table.
    pub(super) top: u32,
    /// Entries in the first table, or in all concatenated ones.
    pub(super) top_entries: u64,
    /// The largest height of a leaf.
    pub(super) largest_leaf: u32,
    /// Addresses must be below `1 << address_bits`.
    pub(super) address_bits: u32,
}

impl Tree {
    pub(super) fn span_bits(&self, height: u32) -> u32 {
        self.page_bits + self.stride * height
    }
}

/// A range of IOVAs and the tree that it goes to.
pub(super) struct Window {
    pub(super) first: u64,
    pub(super) bits: u32,
    pub(super) tree: usize,
}

/// The trees of a format (roots zero) and the IOVA windows.
pub(super) fn shape(config: &TableConfig) -> (Vec<Tree>, Vec<Window>) {
    let arm_tree = |half: usize, granule: u64, input_bits: u32, top: Option<u32>, output_bits: u32, lpa: bool, lpa2: bool| {
        let page_bits = granule.trailing_zeros();
        let stride = page_bits - 3;
        // As many levels as it takes.
        let top = top.unwrap_or((input_bits - page_bits).div_ceil(stride) - 1);
        let lpa2 = lpa2 && granule != 65536;
        let largest_leaf = match granule {
            4096 => 2 + u32::from(lpa2),
            16384 => 1 + u32::from(lpa2),
            _ => 1 + u32::from(lpa),
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
                    trees.push(arm_tree(half, part.granule, part.input_bits, None, config.output_bits, config.lpa, config.lpa2));
                }
            }
            (trees, windows)
        }
        TableConfig::ArmStage2(config) => {
            let top = Some((3 - config.start_level) as u32);
            let tree = arm_tree(0, config.granule, config.input_bits, top, config.output_bits, config.lpa, config.lpa2);
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
        _ => unreachable!("the other formats have modules of their own"),
    }
}

pub(super) fn is_vtd(config: &TableConfig) -> bool {
    matches!(config, TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_))
}

/// VT-d's interrupt range, which must not be translated to (D51397 section 3.15).
pub(super) fn in_interrupt_range(first: u64, size: u64) -> bool {
    first <= 0xfeef_ffff && first + (size - 1) >= 0xfee0_0000
}

/// How many neighbours make a contiguous group (DDI 0487 D8.7.1), by height.
pub(super) fn contiguous_group(tree: &Tree, height: u32) -> u64 {
    match (tree.page_bits, height) {
        (12, _) => 16,
        (14, 0) => 128,
        _ => 32,
    }
}

/// Random leaves that do not overlap: groups of pages and large leaves, at the ends of the input range and between, with holes and mixed access.
pub(super) fn random_leaves(config: &TableConfig, rng: &mut Rng, options: Options) -> Vec<Run> {
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
            // The tables say what they say of IOVAs there; who asks them decides. Addresses there are refused.
            let interrupts = is_vtd(config) && in_interrupt_range(address, size);
            if !overlaps && !interrupts {
                leaves.insert(iova, Run { iova, address, size, access });
                previous_end = last.wrapping_add(1);
            }
        }
    }
    leaves.into_values().collect()
}
