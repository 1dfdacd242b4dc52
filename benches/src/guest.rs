//! Guests whose tables are converted: made ones of known content, and a real one from a snapshot.

use std::path::Path;

use stagecraft::Span;
use stagecraft::guest::{Guest, State};
use stagecraft::memory::{Kind, MemoryMap, Region, read_bytes};
use stagecraft::plugin::{Plugins, TableConfig};
use stagecraft::snapshot::Snapshot;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::pool::Page;

/// Where made guests have their RAM, and their tables at its start.
const RAM: u64 = 0x4000_0000;
/// The second part of a guest's RAM, if it has one: above a hole.
const HIGH_RAM: u64 = 0x10_0000_0000;
/// First IOVA of made tables.
const IOVA: u64 = 0x1_0000_0000;

/// Stage 1 descriptors as Linux' `io-pgtable-arm` writes them (DDI 0487 section D8.3).
mod descriptor {
    pub const TABLE: u64 = 0b11;
    pub const PAGE: u64 = 0b11;
    pub const CACHED: u64 = 1 << 2;
    pub const UNPRIVILEGED: u64 = 1 << 6;
    pub const READ_ONLY: u64 = 1 << 7;
    pub const INNER_SHAREABLE: u64 = 3 << 8;
    pub const ACCESSED: u64 = 1 << 10;
    pub const NOT_GLOBAL: u64 = 1 << 11;
    /// A leaf that may be read and written.
    pub const LEAF: u64 = PAGE | CACHED | UNPRIVILEGED | INNER_SHAREABLE | ACCESSED | NOT_GLOBAL;
}

/// Which leaves of a made table are read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permissions {
    /// One of about 256, at random.
    MostlyUniform,
    /// Every second.
    Alternating,
}

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Number of leaves.
    pub leaves: u64,
    /// 12 or 14: leaves are pages of this size.
    pub granule_log2: u8,
    /// Which are read-only.
    pub permissions: Permissions,
    /// Whether the guest's RAM has a hole, with leaves on both sides of it in turn.
    pub hole: bool,
}

/// SMMUv3 stage 1 tables in guest memory.
#[derive(Debug)]
pub struct Tables {
    /// The table's format and settings, the root among them.
    pub config: TableConfig,
    /// The guest's memory map.
    pub map: MemoryMap,
    /// The guest's memory as far as it holds tables, ascending.
    pub pages: Vec<(u64, Page)>,
    /// Leaf entries.
    pub leaves: u64,
    /// Whether IOVAs lie beyond the lower half of four x86 levels.
    pub five_levels: bool,
}

/// A random number generator, the same everywhere (xorshift64*).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, which is at most `2^32`.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((self.next() >> 32) * bound) >> 32
    }
}

fn ram(first: u64, bytes: u64) -> Region {
    Region { kind: Kind::Ram, span: Span { first, last: first + bytes - 1 } }
}

impl Tables {
    /// Tables that map IOVAs without a gap to pages in shuffled order.
    #[must_use]
    pub fn make(recipe: &Recipe) -> Self {
        let (size, index_bits) = (recipe.granule_log2, recipe.granule_log2 - 3);
        // Four times the memory that is mapped.
        let bytes = (recipe.leaves << size) * 4;
        let mut frames: Vec<u64> = if recipe.hole {
            (0..recipe.leaves / 2).flat_map(|page| [RAM + bytes / 2 + (page << size), HIGH_RAM + (page << size)]).collect()
        } else {
            (0..recipe.leaves).map(|page| RAM + bytes / 2 + (page << size)).collect()
        };
        let mut random = Random(0x5eed);
        for index in (1..frames.len()).rev() {
            frames.swap(index, random.below(index as u64 + 1) as usize);
        }
        let mut regions = vec![ram(RAM, bytes)];
        if recipe.hole {
            regions.push(ram(HIGH_RAM, bytes));
        }
        let mut tables = Builder { size, index_bits, words: Vec::new() };
        let levels = (48_u8 - size).div_ceil(index_bits);
        let root = tables.table();
        for (index, frame) in frames.iter().enumerate() {
            let read_only = match recipe.permissions {
                Permissions::MostlyUniform => random.below(256) == 0,
                Permissions::Alternating => index % 2 == 1,
            };
            let pattern = descriptor::LEAF | if read_only { descriptor::READ_ONLY } else { 0 };
            tables.map(root, levels, IOVA + ((index as u64) << size), frame | pattern);
        }
        let words = tables.words;
        let pages = words.chunks_exact(512).enumerate().map(|(index, words)| (RAM + index as u64 * 4096, Page(words.try_into().unwrap()))).collect();
        let config = TableConfig::new("arm-smmuv3/stage1", &[("root", RAM), ("granule", 1 << size)]);
        Self { config, map: MemoryMap::new(regions).unwrap(), pages, leaves: recipe.leaves, five_levels: false }
    }

    /// The tables of the device with the most leaves in a snapshot; none if there is no such folder.
    #[must_use]
    pub fn load(folder: &Path, plugins: &Plugins) -> Option<Self> {
        if !folder.is_dir() {
            return None;
        }
        let snapshot = Snapshot::load(folder).unwrap();
        let guest = Guest::new(&snapshot, plugins).unwrap();
        let mut best: Option<(u64, u64, TableConfig)> = None;
        for stream in guest.streams().unwrap() {
            let State::Translated(configs) = stream.state else { continue };
            let [config] = &configs[..] else { continue };
            let collected = guest.collect(&mut guest.open(&configs).unwrap(), 0).unwrap().collector;
            let leaves = collected.leaf_sizes().iter().sum();
            if best.as_ref().is_none_or(|(most, _, _)| leaves > *most) {
                let last = collected.mappings().last().map_or(0, |mapping| mapping.iova.last);
                best = Some((leaves, last, config.clone()));
            }
        }
        let (leaves, last_iova, config) = best?;
        let page = |address| {
            let bytes = read_bytes(&snapshot.memory, stagecraft::Gpa(address), 4096).unwrap();
            let words: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
            (address, Page(words.try_into().unwrap()))
        };
        // Only what this device's table consists of.
        let mut addresses = vec![config.settings.get("root")?];
        let mut pages = Vec::new();
        for level in 0..4 {
            let here: Vec<(u64, Page)> = addresses.iter().map(|&address| page(address)).collect();
            addresses = here
                .iter()
                .flat_map(|(_, page)| page.0)
                .filter(|entry| level < 3 && entry & 3 == descriptor::TABLE)
                .map(|entry| entry & 0xffff_ffff_f000)
                .collect();
            pages.extend(here);
        }
        pages.sort_by_key(|(address, _)| *address);
        pages.dedup_by_key(|(address, _)| *address);
        Some(Self { config, map: snapshot.map.clone(), pages, leaves, five_levels: last_iova >> 47 != 0 })
    }

    /// Address of the root table.
    #[must_use]
    pub fn root(&self) -> u64 {
        self.config.settings.get("root").unwrap()
    }

    /// Bytes of all tables.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages.len() as u64 * 4096
    }

    /// The tables as ranges of memory: address and bytes.
    #[must_use]
    pub fn ranges(&self) -> Vec<(u64, usize)> {
        let mut ranges: Vec<(u64, usize)> = Vec::new();
        for (address, _) in &self.pages {
            match ranges.last_mut() {
                Some((first, bytes)) if *first + *bytes as u64 == *address => *bytes += 4096,
                _ => ranges.push((*address, 4096)),
            }
        }
        ranges
    }

    /// A guest's memory with these tables in it: each call makes another copy.
    #[must_use]
    pub fn memory(&self) -> GuestMemoryMmap {
        let (first, last) = (self.pages[0].0, self.pages[self.pages.len() - 1].0);
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(first), (last + 4096 - first) as usize)]).unwrap();
        for (address, page) in &self.pages {
            let bytes: Vec<u8> = page.0.iter().flat_map(|word| word.to_le_bytes()).collect();
            memory.write_slice(&bytes, GuestAddress(*address)).unwrap();
        }
        memory
    }
}

/// Makes tables, one after the other from [`RAM`] upwards.
struct Builder {
    size: u8,
    index_bits: u8,
    words: Vec<u64>,
}

impl Builder {
    fn table(&mut self) -> u64 {
        let address = RAM + self.words.len() as u64 * 8;
        self.words.resize(self.words.len() + (1 << self.index_bits), 0);
        address
    }

    fn map(&mut self, root: u64, levels: u8, iova: u64, leaf: u64) {
        let mut table = root;
        for level in (0..levels).rev() {
            let index = iova >> (self.size + level * self.index_bits) & ((1 << self.index_bits) - 1);
            let slot = ((table - RAM) / 8 + index) as usize;
            if level == 0 {
                self.words[slot] = leaf;
            } else {
                if self.words[slot] == 0 {
                    self.words[slot] = self.table() | descriptor::TABLE;
                }
                table = self.words[slot] & !0xfff;
            }
        }
    }
}
