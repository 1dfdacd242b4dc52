//! Any format as source and as target, with tables that the engine built itself from scattered pages.

use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::plugin::{Plugins, TableConfig};
use stagecraft::table::{Arena, Builder, Piece};
use stagecraft::{Attributes, Span};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use crate::guest::Random;
use crate::production;

/// Where sources have their tables.
const TABLES: u64 = 0x4000_0000;
/// Where the pages are.
const FRAMES: u64 = 0x8000_0000;
/// First IOVA: sources with few address bits can hold this much twice.
const IOVA: u64 = 0x4000_0000;

/// A format with settings, as source or target.
#[derive(Clone, Copy, Debug)]
pub struct Side {
    /// A short name.
    pub name: &'static str,
    /// The format.
    pub format: &'static str,
    /// Its settings.
    pub settings: &'static [(&'static str, u64)],
    /// The size of the pages that are mapped, in log2 bytes.
    pub page_log2: u8,
    /// That of the slots of the tables: pages may fill several.
    pub slot_log2: u8,
    /// Input addresses are below `2^bits`, and output addresses of 32 bits if these are.
    pub bits: u8,
    /// Only so many different pages are mapped, time and again: for entries that the format must see whole.
    pub distinct: Option<u64>,
}

const fn side(name: &'static str, format: &'static str, settings: &'static [(&'static str, u64)], page_log2: u8, bits: u8) -> Side {
    Side { name, format, settings, page_log2, slot_log2: page_log2, bits, distinct: None }
}

/// Where the source of comparison stands in [`SIDES`], and the target.
pub const BASELINE: (usize, usize) = (0, 5);

/// What is both a source and a target.
pub const SIDES: [Side; 20] = [
    side("arm s1", "arm-smmuv3/stage1", &[], 12, 48),
    side("arm s1 16K", "arm-smmuv3/stage1", &[("granule", 16384)], 14, 48),
    side("arm s1 64K", "arm-smmuv3/stage1", &[("granule", 65536)], 16, 48),
    side("arm s1 LPA2", "arm-smmuv3/stage1", &[("lpa2", 1), ("input-bits", 52), ("output-bits", 52)], 12, 52),
    side("arm s2", "arm-smmuv3/stage2", &[], 12, 40),
    side("vt-d first", "intel-vtd/first-stage", &[], 12, 47),
    side("vt-d second", "intel-vtd/second-stage", &[], 12, 48),
    side("amd v1", "amd-vi/v1", &[], 12, 48),
    side("amd v1 NL7", "amd-vi/v1", &[("next-level-7", 1)], 12, 48),
    side("amd v2", "amd-vi/v2", &[], 12, 47),
    side("riscv first", "riscv-iommu/first-stage", &[], 12, 38),
    side("riscv napot", "riscv-iommu/first-stage", &[("svnapot", 1)], 12, 38),
    side("riscv Sv32", "riscv-iommu/first-stage", &[("levels", 2)], 12, 32),
    side("riscv secnd", "riscv-iommu/second-stage", &[], 12, 41),
    side("s390", "s390-zpci/dma", &[], 12, 42),
    side("loongarch", "loongarch/paging", &[], 14, 47),
    side("dart1 4K", "apple-dart/dart1", &[("granule", 4096)], 12, 32),
    side("dart1", "apple-dart/dart1", &[("input-bits", 36)], 14, 36),
    side("dart2", "apple-dart/dart2", &[("input-bits", 36)], 14, 36),
    side("v7s", "arm-v7s/short", &[], 12, 32),
];

/// Sources alone: their leaves are above their slots, and NextLevel 7 must be seen whole.
pub const LARGE: [Side; 2] = [
    Side { distinct: Some(1024), slot_log2: 12, ..side("amd NL7 8K", "amd-vi/v1", &[("next-level-7", 1)], 13, 48) },
    Side { slot_log2: 12, ..side("napot 64K", "riscv-iommu/first-stage", &[("svnapot", 1)], 16, 38) },
];

/// Bytes that `source` and `target` can both map, in entries of the finer of the two, of which there are at most `entries`.
#[must_use]
pub fn bytes(source: &Side, target: &Side, entries: u64) -> u64 {
    let bits = source.bits.min(target.bits);
    let most = if bits <= 32 { 1 << 30 } else { 1 << (bits - 1) };
    (entries << source.slot_log2.min(target.slot_log2)).min(most)
}

/// Source tables in guest memory.
#[derive(Debug)]
pub struct Made {
    /// The table's format and settings, the roots among them.
    pub config: TableConfig,
    /// The guest's memory map.
    pub map: MemoryMap,
    /// Copies of the memory.
    pub copies: Vec<GuestMemoryMmap>,
    /// Bytes that are mapped.
    pub bytes: u64,
}

/// Maps `bytes` bytes in scattered pages of `2^unit` bytes, one of 256 read-only, and copies the tables until there are `mebibytes` of them, at least twice.
#[must_use]
pub fn make(plugins: &Plugins, source: &Side, unit: u8, bytes: u64, mebibytes: u64) -> Made {
    let units = bytes >> unit;
    let mut frames: Vec<u64> = (0..units).map(|page| FRAMES + (page << unit)).collect();
    let mut random = Random(0x5eed);
    for index in (1..frames.len()).rev() {
        frames.swap(index, random.below(index as u64 + 1) as usize);
    }
    let distinct = source.distinct.map_or(frames.len(), |distinct| frames.len().min(distinct as usize));
    let read_only = Attributes::READ.with(Attributes::COHERENT).with(Attributes::ACCESSED);
    let all = read_only.with(Attributes::WRITE).with(Attributes::DIRTY);
    let mut arena = Arena::new(TABLES, 1 << 30);
    let config = TableConfig::new(source.format, source.settings);
    let mut builder = Builder::new(Box::new(production::open_format(plugins, &config)), &mut arena).unwrap();
    for index in 0..units {
        let attributes = if random.below(256) == 0 { read_only } else { all };
        let address = frames[index as usize % distinct];
        builder.map(&Piece { iova: Span::of_log2(IOVA + (index << unit), unit), address, attributes }).unwrap();
    }
    let built = builder.finish().unwrap();
    assert_eq!(built.losses.refused_bytes(), 0, "{}", source.name);
    let roots = built.roots.iter().map(|(name, root)| (name.as_str(), root.0));
    let settings: Vec<(&str, u64)> = source.settings.iter().copied().chain(roots).collect();
    let count = ((mebibytes << 20) / arena.bytes()).max(2);
    let copy = |_| {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(TABLES), arena.capacity() as usize)]).unwrap();
        for (address, words) in arena.pages() {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            memory.write_slice(&bytes, GuestAddress(address.0)).unwrap();
        }
        memory
    };
    let ram = Region { kind: Kind::Ram, span: Span { first: TABLES, last: FRAMES + bytes - 1 } };
    Made {
        config: TableConfig::new(source.format, &settings),
        map: MemoryMap::new(vec![ram]).unwrap(),
        copies: (0..count).map(copy).collect(),
        bytes,
    }
}
