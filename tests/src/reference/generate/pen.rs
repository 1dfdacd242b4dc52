//! Single entries of tables of any format, for guests that change their tables while somebody looks.

use super::ladder::{self, in_interrupt_range, is_vtd};
use super::radix::{self, Ink, Pointer};
use super::{Options, Rng, ladder_build, says_write_only};
use crate::reference::tables::TableConfig;
use crate::reference::{Access, Run, bits};

/// A range of IOVAs that one root serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The lowest IOVA.
    pub first: u64,
    /// The highest one.
    pub last: u64,
    /// The number of the root.
    pub tree: usize,
    /// Where `first` lies in what the root could cover, in bytes.
    pub position: u64,
}

/// A table that an entry is to point to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// Its height above the last level.
    pub height: u32,
    /// Where it is.
    pub address: u64,
    /// The entry is to forbid something, or to leave out a part of the table, if the format can say so.
    pub restricted: bool,
}

/// What makes entries those of one address space alone. Others are for all in the domain, and caches need not ask whose they are: a guest with more than one address
/// space has none of these. Bits to set, and bits to clear.
fn private(config: &TableConfig) -> (u64, u64) {
    match config {
        // nG.
        TableConfig::ArmStage1(_) => (1 << 11, 0),
        // G, of leaves and of pointers.
        TableConfig::RiscvFirst(_) => (0, 1 << 5),
        _ => (0, 0),
    }
}

/// Writes entries: what their address, size and access say, in the format's own bits, with random values where hardware does not look. Heights count from the last
/// level, which is 0; positions are offsets into what a root could cover.
#[derive(Clone, Debug)]
pub struct Pen {
    config: TableConfig,
    rng: Rng,
}

const OPTIONS: Options = Options { clusters: 0, restrictions: true, decoys: false, noise: true };

impl Pen {
    /// For tables with these settings; their roots play no part.
    pub fn new(config: TableConfig, rng: Rng) -> Pen {
        Pen { config, rng }
    }

    /// The ranges of IOVAs, each with its root.
    pub fn windows(&self) -> Vec<Window> {
        let Some(format) = radix::of(&self.config) else {
            let (trees, windows) = ladder::shape(&self.config);
            let window = |window: &ladder::Window| {
                let tree = &trees[window.tree];
                let covered = tree.span_bits(tree.top) + tree.top_entries.trailing_zeros();
                let position = bits(window.first, covered - 1, 0);
                Window { first: window.first, last: window.first + ((1 << window.bits) - 1), tree: window.tree, position }
            };
            return windows.iter().map(window).collect();
        };
        format
            .windows()
            .into_iter()
            .map(|window| Window { first: window.first, last: window.last, tree: window.tree, position: window.position })
            .collect()
    }

    /// The height of a root.
    pub fn top(&self, tree: usize) -> u32 {
        radix::of(&self.config).map_or_else(|| ladder::shape(&self.config).0[tree].top, radix::Radix::top)
    }

    /// Log2 of what an entry covers.
    pub fn shift(&self, tree: usize, height: u32) -> u32 {
        radix::of(&self.config).map_or_else(|| ladder::shape(&self.config).0[tree].span_bits(height), |format| format.shift(height))
    }

    /// Entries of a table.
    pub fn entries(&self, tree: usize, height: u32) -> u64 {
        if let Some(format) = radix::of(&self.config) {
            return format.entries(height, tree);
        }
        let tree = &ladder::shape(&self.config).0[tree];
        if height == tree.top { tree.top_entries } else { 1 << tree.stride }
    }

    /// Bytes that a table takes, and what it is aligned to.
    pub fn table_size(&self, tree: usize, height: u32) -> (u64, u64) {
        let bytes = self.entries(tree, height) * self.config.entry_bytes();
        let least = if height == self.top(tree) { 4096 } else { 0 };
        let size = bytes.max(least);
        (size, radix::of(&self.config).map_or(size, |format| format.table_alignment(size)))
    }

    /// What an entry holds that nobody uses.
    pub fn absent(&self, height: u32) -> u64 {
        radix::of(&self.config).map_or(0, |format| format.absent(height))
    }

    /// Log2 of the sizes of leaves, ascending.
    pub fn leaf_sizes(&self, tree: usize) -> Vec<u32> {
        if let Some(format) = radix::of(&self.config) {
            return format.leaf_sizes();
        }
        let tree = &ladder::shape(&self.config).0[tree];
        (0..=tree.largest_leaf.min(tree.top)).map(|height| tree.span_bits(height)).filter(|size| *size <= tree.address_bits).collect()
    }

    /// The height where a leaf of a size stands.
    pub fn leaf_height(&self, tree: usize, size: u32) -> u32 {
        match radix::of(&self.config) {
            Some(format) => format.leaf_height(size),
            None => (0..).find(|height| self.shift(tree, *height) == size).expect("the size is a leaf's"),
        }
    }

    /// Whether a leaf may be there: VT-d keeps a range of IOVAs for interrupts.
    pub fn allows(&self, iova: u64, size: u64) -> bool {
        !(is_vtd(&self.config) && in_interrupt_range(iova, size))
    }

    /// What leaves can allow.
    pub fn accesses(&self) -> Vec<Access> {
        if says_write_only(&self.config) { vec![Access::RW, Access::R, Access::W] } else { vec![Access::RW, Access::R] }
    }

    /// Whether an entry can point to a table more than one level below.
    pub fn may_skip(&self) -> bool {
        radix::of(&self.config).is_some_and(radix::Radix::may_skip)
    }

    /// An entry at `height` that points to a table, and a word that leaves in that table are told.
    pub fn pointer(&mut self, tree: usize, height: u32, child: Child) -> (u64, u64) {
        let Child { height: next, address, restricted } = child;
        let all = self.entries(tree, next) - 1;
        let Some(format) = radix::of(&self.config) else {
            return (ladder_build::pointer(self.config, tree, address, restricted, &mut self.rng, OPTIONS), 0);
        };
        let used = if restricted { (self.rng.below(all + 1), self.rng.below(all + 1)) } else { (0, all) };
        let used = (used.0.min(used.1), used.0.max(used.1));
        let mut ink = Ink { rng: &mut self.rng, options: OPTIONS };
        let (entry, _, word) = format.pointer(Pointer { height, next, address, used, restricted }, &mut ink);
        (entry & !private(&self.config).1, word)
    }

    /// The entry of a leaf, in all its replicas; `word` belongs to the table. Some are less than they look: cut, or for nobody.
    pub fn leaf(&mut self, tree: usize, height: u32, leaf: &Run, word: u64) -> u64 {
        let (set, clear) = private(&self.config);
        let Some(format) = radix::of(&self.config) else {
            return ladder_build::leaf(self.config, (tree, height), leaf, &mut self.rng, OPTIONS) | set;
        };
        let (entry, _) = format.leaf(height, leaf, word, &mut Ink { rng: &mut self.rng, options: OPTIONS });
        format.cut(leaf, entry, &mut self.rng).map_or(entry, |(entry, _)| entry) & !clear
    }

    /// The settings with these roots, by number.
    pub fn with_roots(&self, roots: &[u64]) -> TableConfig {
        let mut config = self.config;
        match &mut config {
            TableConfig::ArmStage1(arm) => {
                let halves = [&mut arm.low, &mut arm.high].into_iter().flatten();
                halves.zip(roots).for_each(|(half, root)| half.root = *root);
            }
            TableConfig::ArmStage2(arm) => arm.root = roots[0],
            TableConfig::VtdFirst(vtd) => vtd.root = roots[0],
            TableConfig::VtdSecond(vtd) => vtd.root = roots[0],
            _ => {
                let trees: Vec<usize> = self.trees();
                config = radix::with_roots(config, &trees.into_iter().zip(roots.iter().copied()).collect());
            }
        }
        config
    }

    /// The numbers of the roots, ascending.
    pub fn trees(&self) -> Vec<usize> {
        let mut trees: Vec<usize> = self.windows().iter().map(|window| window.tree).collect();
        trees.sort_unstable();
        trees.dedup();
        trees
    }
}
