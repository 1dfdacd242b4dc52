//! Table formats: where a walk starts, and what one entry means.
//!
//! Each module knows one architecture and names its sources. Here is what they have in common, which is little: a table has entries, and an entry is nothing, another
//! table, or a leaf.

use std::collections::BTreeMap;

use super::{Access, Problem, bit, bits};

pub mod amd;
pub mod arm;
pub mod dart;
pub mod loongarch;
pub mod riscv;
pub mod s390;
mod settings;
pub mod v7s;
pub mod vtd;

pub use amd::{AmdV1, AmdV2};
pub use arm::{ArmHalf, ArmStage1, ArmStage2};
pub use dart::{Dart, Packing};
pub use loongarch::LoongArch;
pub use riscv::{RiscvFirst, RiscvSecond};
pub use s390::S390;
pub use v7s::V7s;
pub use vtd::{VtdFirst, VtdSecond};

/// Settings by name, all numbers.
pub type Settings = BTreeMap<String, u64>;

/// A table with its format and settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableConfig {
    /// SMMUv3 stage 1.
    ArmStage1(ArmStage1),
    /// SMMUv3 stage 2.
    ArmStage2(ArmStage2),
    /// VT-d first stage.
    VtdFirst(VtdFirst),
    /// VT-d second stage.
    VtdSecond(VtdSecond),
    /// AMD-Vi host tables.
    AmdV1(AmdV1),
    /// AMD-Vi guest tables.
    AmdV2(AmdV2),
    /// RISC-V first stage.
    RiscvFirst(RiscvFirst),
    /// RISC-V second stage.
    RiscvSecond(RiscvSecond),
    /// s390 zPCI.
    S390(S390),
    /// LoongArch.
    LoongArch(LoongArch),
    /// Apple DART, of both packings.
    Dart(Dart),
    /// ARMv7 short descriptors.
    V7s(V7s),
}

/// A level of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The format's own number of the level: Arm -1 to 3 from the root, the others down to 1 or 0 at the last level.
    pub level: i32,
    /// Log2 of what one entry covers.
    pub shift: u32,
    /// Entries in a table of this level; for the first level of concatenated tables, in all of them.
    pub entries: u64,
}

/// A range of IOVAs with one root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The lowest IOVA.
    pub first: u64,
    /// Log2 of the range's size, 64 at most.
    pub bits: u32,
    /// Where the lowest IOVA lies in what the first table could cover: zero, except for the upper half of tables with sign-extended input, and where a range that is
    /// given apart begins later.
    pub table_first: u64,
    /// Address of the first table, aligned as the hardware aligns it.
    pub root: u64,
    /// The levels from the root.
    pub steps: Vec<Step>,
    /// What [`TableConfig::decode`] is told for entries of the root: 1 for Arm's TTB1, else 0.
    pub half: usize,
    /// How many bytes behind the lowest IOVA the last one is, where that is less than what `bits` say.
    pub last: Option<u64>,
}

impl Region {
    /// How many bytes behind the lowest IOVA the last one is.
    pub fn length(&self) -> u64 {
        let all = if self.bits >= 64 { u64::MAX } else { (1 << self.bits) - 1 };
        self.last.map_or(all, |last| last.min(all))
    }

    /// Whether the range has a byte so far behind its lowest IOVA.
    pub fn contains(&self, offset: u64) -> bool {
        offset <= self.length()
    }
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not present, or malformed: requests fail.
    Fault,
    /// Another table.
    Table {
        /// Its address.
        address: u64,
        /// The most that anything behind it allows.
        limit: Access,
        /// How many levels are left out; the IOVA's bits of those must be zero.
        skip: usize,
        /// The entries that the table has, if not all that the level has: the first and the last.
        exists: Option<(u64, u64)>,
        /// What [`TableConfig::decode`] is told for its entries.
        half: usize,
    },
    /// A leaf, or the part of one that a slot shows.
    Leaf {
        /// The output address of the leaf's first byte.
        address: u64,
        /// What it allows by itself.
        access: Access,
        /// Log2 of its size if that is not what the slot covers: then it is repeated in more slots, and each shows the part that lies under it.
        size: Option<u32>,
        /// The first and the last of its bytes that can be reached, counted from its beginning, if not all of them.
        reach: Option<(u64, u64)>,
    },
}

/// The marks that an entry lacks and that hardware sets when it uses the entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marks {
    /// None.
    None,
    /// One that only a write sets.
    ByWrites,
    /// One that any request sets.
    Any,
}

impl Entry {
    /// A whole table of the next level.
    fn table(address: u64, limit: Access, half: usize) -> Entry {
        Entry::Table { address, limit, skip: 0, exists: None, half }
    }

    /// A leaf of the slot's size.
    fn leaf(address: u64, access: Access) -> Entry {
        Entry::Leaf { address, access, size: None, reach: None }
    }
}

/// Whether an address has a bit that the unit does not have; `limit` is 64 at most.
pub(crate) fn beyond(address: u64, limit: u32) -> bool {
    limit < 64 && address >> limit != 0
}

/// Steps of equal tables: from `levels` down to 1, each resolving `stride` bits above `page_bits`.
fn equal_steps(levels: u32, page_bits: u32, stride: u32) -> Vec<Step> {
    (1..=levels).rev().map(|level| Step { level: level as i32, shift: page_bits + stride * (level - 1), entries: 1 << stride }).collect()
}

impl TableConfig {
    /// The ranges of IOVAs that have a root.
    ///
    /// # Errors
    /// [`Problem::Illegal`] if the settings contradict each other.
    pub fn regions(&self) -> Result<Vec<Region>, Problem> {
        match self {
            TableConfig::ArmStage1(config) => config.regions(),
            TableConfig::ArmStage2(config) => config.regions(),
            TableConfig::VtdFirst(config) => config.regions(),
            TableConfig::VtdSecond(config) => config.regions(),
            TableConfig::AmdV1(config) => config.regions(),
            TableConfig::AmdV2(config) => config.regions(),
            TableConfig::RiscvFirst(config) => config.regions(),
            TableConfig::RiscvSecond(config) => config.regions(),
            TableConfig::S390(config) => config.regions(),
            TableConfig::LoongArch(config) => config.regions(),
            TableConfig::Dart(config) => config.regions(),
            TableConfig::V7s(config) => config.regions(),
        }
    }

    /// What an entry of this level says. `half` comes from the region or from the table entry above.
    pub fn decode(&self, half: usize, step: Step, entry: u64) -> Entry {
        match self {
            TableConfig::ArmStage1(config) => config.decode(half, step, entry),
            TableConfig::ArmStage2(config) => config.decode(step, entry),
            TableConfig::VtdFirst(config) => config.decode(step, entry),
            TableConfig::VtdSecond(config) => config.decode(step, entry),
            TableConfig::AmdV1(config) => config.decode(step, entry),
            TableConfig::AmdV2(config) => config.decode(step, entry),
            TableConfig::RiscvFirst(config) => config.decode(step, entry),
            TableConfig::RiscvSecond(config) => config.decode(step, entry),
            TableConfig::S390(config) => config.decode(step, entry),
            TableConfig::LoongArch(config) => config.decode(step, entry),
            TableConfig::Dart(config) => config.decode(step, entry),
            TableConfig::V7s(config) => config.decode(half, step, entry),
        }
    }

    /// What hardware makes of an entry of this level that it uses, for a write or for anything else. In the order of the formats:
    ///
    /// * Arm with HA sets AF (bit 10) in leaves; with HD, of leaves with DBM (bit 51), stage 1 clears AP\[2\] and stage 2 sets S2AP\[1\] (bit 7): IHI 0070 section 3.13.
    ///   Descriptors of tables are marked with HAFT alone, which no configuration here has.
    /// * VT-d's first stage always sets A (bit 5) in whatever it uses, with EAFE also EA (bit 10), and D (bit 6) in leaves: D51397 section 3.6.2. With SSADE its
    ///   second stage sets A (bit 8) in whatever it uses, and D (bit 9) in leaves: section 9.8, where entries that reference tables have bit 8 as well.
    /// * AMD's host tables with HAD: A (bit 5) in whatever is used, D (bit 6) in leaves: 48882 section 2.2.3, where directory entries have bit 5 as well. Guest tables
    ///   are the processor's: the same bits, unless the unit is told not to.
    /// * RISC-V sets A (bit 6) and D (bit 7) in leaves: Privileged, on Sv39, and IOMMU section 2.1.3.1. In pointers they are reserved.
    /// * LoongArch sets V (bit 0) and D (bit 1) of pages with P and W.
    pub fn marked(&self, step: Step, entry: u64, write: bool) -> u64 {
        // What an x86 entry is, and an entry like it.
        let large = |last: i32| step.level == last || bit(entry, 7);
        let set = |accessed: u64, dirty: u64, leaf: bool| entry | accessed | if leaf && write { dirty } else { 0 };
        match self {
            TableConfig::ArmStage1(config) if config.hardware_access => {
                let leaf = bits(entry, 1, 0) == 1 || step.level == 3;
                let dirty = leaf && write && config.hardware_dirty && bit(entry, 51);
                let entry = if leaf || config.hardware_tables { entry | 1 << 10 } else { entry };
                if dirty { entry & !(1 << 7) } else { entry }
            }
            TableConfig::ArmStage2(config) if config.hardware_access => {
                let leaf = bits(entry, 1, 0) == 1 || step.level == 3;
                let dirty = leaf && write && config.hardware_dirty && bit(entry, 51);
                (if leaf || config.hardware_tables { entry | 1 << 10 } else { entry }) | u64::from(dirty) << 7
            }
            TableConfig::VtdFirst(config) => set(1 << 5 | u64::from(config.extended_access) << 10, 1 << 6, large(1)),
            TableConfig::VtdSecond(config) if config.accessed_dirty => set(1 << 8, 1 << 9, large(1)),
            TableConfig::AmdV1(config) => {
                let leaf = matches!(bits(entry, 11, 9), 0 | 7);
                set(u64::from(config.update_accessed) << 5, u64::from(config.update_dirty) << 6, leaf)
            }
            TableConfig::AmdV2(config) => set(u64::from(config.update_accessed) << 5, u64::from(config.update_dirty) << 6, large(1)),
            TableConfig::RiscvFirst(RiscvFirst { entries, .. }) | TableConfig::RiscvSecond(RiscvSecond { entries, .. })
                if entries.hardware_update =>
            {
                let leaf = bits(entry, 3, 1) != 0;
                set(u64::from(leaf) << 6, 1 << 7, leaf)
            }
            TableConfig::LoongArch(config) if config.hardware_update => {
                let leaf = step.level == 1 || bit(entry, 6);
                set(u64::from(leaf), 1 << 1, leaf)
            }
            _ => entry,
        }
    }

    /// What hardware has to write into an entry of this level that is used, and is not there.
    pub fn missing_marks(&self, step: Step, entry: u64) -> Marks {
        match (self.marked(step, entry, false) == entry, self.marked(step, entry, true) == entry) {
            (false, _) => Marks::Any,
            (true, false) => Marks::ByWrites,
            (true, true) => Marks::None,
        }
    }

    /// Whether no table, and no structure, may be read through this leaf: with SMMUv3's S2PTW, device memory (IHI 0070 section 5.2); MemAttr is 5:2, and device
    /// memory has zero in its upper half.
    pub fn keeps_tables_out(&self, leaf: u64) -> bool {
        matches!(self, TableConfig::ArmStage2(config) if config.protected_walk && bits(leaf, 5, 4) == 0)
    }

    /// What a request is allowed before any entry is looked at: AMD's device table entry and s390's designation may take something away.
    pub fn granted(&self) -> Access {
        match self {
            TableConfig::AmdV1(config) => config.granted,
            TableConfig::AmdV2(config) => config.granted,
            TableConfig::S390(config) => Access { read: true, write: !config.read_only },
            _ => Access::RW,
        }
    }

    /// Output addresses with a bit at or above this one fault, also those in the middle of a leaf that is larger than all of them.
    pub fn output_bits(&self) -> u32 {
        match self {
            TableConfig::ArmStage1(config) => config.output_bits,
            TableConfig::ArmStage2(config) => config.output_bits,
            TableConfig::VtdFirst(config) => config.output_bits,
            TableConfig::VtdSecond(config) => config.output_bits,
            TableConfig::AmdV1(config) => config.output_bits,
            TableConfig::AmdV2(config) => config.output_bits,
            TableConfig::RiscvFirst(config) => config.entries.output_bits,
            TableConfig::RiscvSecond(config) => config.entries.output_bits,
            TableConfig::S390(config) => config.output_bits,
            TableConfig::LoongArch(config) => config.output_bits,
            TableConfig::Dart(config) => config.output_bits,
            TableConfig::V7s(config) => config.output_bits,
        }
    }

    /// Bytes of an entry, 4 or 8.
    pub fn entry_bytes(&self) -> u64 {
        match self {
            TableConfig::RiscvFirst(RiscvFirst { levels: 2, .. }) | TableConfig::RiscvSecond(RiscvSecond { levels: 2, .. }) | TableConfig::V7s(_) => {
                4
            }
            _ => 8,
        }
    }

    /// Whether entries are big-endian.
    pub fn big_endian(&self) -> bool {
        match self {
            TableConfig::ArmStage1(config) => config.big_endian,
            TableConfig::ArmStage2(config) => config.big_endian,
            TableConfig::RiscvFirst(config) => config.entries.big_endian,
            TableConfig::RiscvSecond(config) => config.entries.big_endian,
            TableConfig::S390(_) => true,
            _ => false,
        }
    }

    /// The IOVA as it is looked up: where the top byte is ignored, bits 63 to 56 become copies of bit 55 (IHI 0070 section 3.4.1).
    pub fn effective(&self, iova: u64) -> u64 {
        if let TableConfig::ArmStage1(config) = self {
            let upper = bit(iova, 55);
            let half = if upper { config.high } else { config.low };
            if half.is_some_and(|half| half.top_byte_ignored) {
                let rest = bits(iova, 55, 0);
                return if upper { rest + (0xff << 56) } else { rest };
            }
        }
        iova
    }
}
