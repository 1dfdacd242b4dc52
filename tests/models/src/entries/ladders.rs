//! What stands in the tables of each format, and what each model gets wrong about single entries.

use std::ops::Range;

use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};

use super::{Damage, Good, Ladder};
use crate::known::{self, KnownError};
use crate::riscv::RiscvTables;
use crate::smmu::SmmuTables;
use crate::spaces::PLACES;
use crate::tables::amd::AmdTable;
use crate::tables::riscv::RiscvTable;
use crate::{Access, Tables};

const fn good(what: &'static str, entry: u64) -> Good {
    Good { what, entry }
}

/// Nine bits a level above pages of 4 KiB.
fn nine_bits(levels: u32) -> Vec<(u32, u64)> {
    (0..levels).map(|height| (12 + 9 * height, 512)).collect()
}

/// An address that repeats its highest bit.
fn extended(position: u64, bits: u32) -> u64 {
    let unused = 64 - bits;
    ((position << unused).cast_signed() >> unused).cast_unsigned()
}

/// VT-d: Intel Virtualization Technology for Directed I/O, sections 9.7 and 9.8.
#[derive(Clone, Copy, Debug)]
pub struct VtdLadder {
    /// Scalable mode, or legacy.
    pub scalable: bool,
    /// The first stage, or the second.
    pub first_stage: bool,
    /// Levels of tables.
    pub levels: u32,
}

impl Ladder for VtdLadder {
    fn name(&self) -> String {
        format!("{} of {} levels", if self.first_stage { "first stage" } else { "second stage" }, self.levels)
    }

    fn formats(&self) -> Vec<&'static str> {
        vec![if self.first_stage { "intel-vtd/first-stage" } else { "intel-vtd/second-stage" }]
    }

    fn rungs(&self) -> Vec<(u32, u64)> {
        nine_bits(self.levels)
    }

    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good> {
        // Present, writable, user, accessed; or read and write.
        let bits = if self.first_stage { 0x27 } else { 3 };
        (below + 1 == height).then_some(good("pointer", table | bits))
    }

    fn leaves(&self, height: usize) -> Vec<(Good, u32)> {
        let bits = if self.first_stage { 0x67 } else { 3 };
        match height {
            0 => vec![(good("page", bits), 12)],
            1 | 2 => vec![(good("large page", bits | 1 << 7), 12 + 9 * height as u32)],
            _ => Vec::new(),
        }
    }

    fn iova(&self, position: u64) -> u64 {
        if self.first_stage { extended(position, 12 + 9 * self.levels) } else { position }
    }

    fn tables(&self, root: u64) -> Tables {
        let (levels, output_bits) = (self.levels, 48);
        Tables::Vtd(if self.first_stage {
            TableConfig::VtdFirst(VtdFirst { root, levels, output_bits, large_1g: true, execute_disable: true, extended_access: false })
        } else {
            let input_bits = 12 + 9 * levels;
            TableConfig::VtdSecond(VtdSecond { root, levels, input_bits, output_bits, ..VtdSecond::default() })
        })
    }

    fn excuse(&self, damage: &Damage, _: bool) -> Option<KnownError> {
        const SNP: u64 = 1 << 11;
        let is_leaf = damage.height == 0 || damage.entry & 1 << 7 != 0;
        (self.scalable && !self.first_stage && is_leaf && damage.entry & SNP != 0).then_some(known::VTD_SNOOP)
    }
}

/// Which halves of all IOVAs have the tables of a stage 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Halves {
    /// The lower one.
    Low,
    /// The upper one.
    High,
    /// Both have the same, and top bytes are ignored (see `known::SMMU_TBI1` for why not in one of them alone).
    Tagged,
}

/// SMMUv3: Arm DDI 0487 section D8.3.
#[derive(Clone, Copy, Debug)]
pub struct ArmLadder {
    /// Stage 1, or stage 2.
    pub first_stage: bool,
    /// 4096, 16384 or 65536.
    pub granule: u64,
    /// Input address bits.
    pub input_bits: u32,
    /// Output address bits, at most 44.
    pub output_bits: u32,
    /// Of stage 1.
    pub halves: Halves,
}

impl ArmLadder {
    fn page_bits(&self) -> u32 {
        self.granule.trailing_zeros()
    }

    pub(super) fn stage_1(&self, root: u64) -> ArmStage1 {
        let (granule, input_bits, output_bits) = (self.granule, self.input_bits, self.output_bits);
        let half = ArmHalf { root, granule, input_bits, top_byte_ignored: self.halves == Halves::Tagged, hierarchical_disabled: false };
        let (low, high) = match self.halves {
            Halves::Low => (Some(half), None),
            Halves::High => (None, Some(half)),
            Halves::Tagged => (Some(half), Some(half)),
        };
        ArmStage1 { low, high, output_bits, mair: 0x04_ff_44, ..ArmStage1::default() }
    }

    pub(super) fn stage_2(&self, root: u64) -> ArmStage2 {
        let (granule, input_bits, output_bits) = (self.granule, self.input_bits, self.output_bits);
        ArmStage2 { root, granule, input_bits, output_bits, start_level: 4 - self.rungs().len() as i32, ..ArmStage2::default() }
    }

    /// The greatest height that has blocks.
    fn largest_block(&self) -> usize {
        if self.granule == 4096 { 2 } else { 1 }
    }
}

impl Ladder for ArmLadder {
    fn name(&self) -> String {
        let stage = if self.first_stage { 1 } else { 2 };
        format!("stage {stage} of {} bytes, {} to {} bits, {:?}", self.granule, self.input_bits, self.output_bits, self.halves)
    }

    fn formats(&self) -> Vec<&'static str> {
        vec![if self.first_stage { "arm-smmuv3/stage1" } else { "arm-smmuv3/stage2" }]
    }

    fn rungs(&self) -> Vec<(u32, u64)> {
        let stride = self.page_bits() - 3;
        let levels = (self.input_bits - self.page_bits()).div_ceil(stride);
        let shift = |height| self.page_bits() + stride * height;
        (0..levels).map(|height| (shift(height), 1 << stride.min(self.input_bits - shift(height)))).collect()
    }

    fn address_bits(&self) -> u32 {
        self.output_bits.min(38)
    }

    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good> {
        (below + 1 == height).then_some(good("table descriptor", table | 3))
    }

    fn leaves(&self, height: usize) -> Vec<(Good, u32)> {
        // Access flag, inner shareable; AttrIndx 1 and AP[1], or MemAttr write-back and S2AP.
        let bits = 1 << 10 | 3 << 8 | if self.first_stage { 1 << 6 | 1 << 2 } else { 3 << 6 | 15 << 2 };
        let (shift, _) = self.rungs()[height];
        match height {
            0 => vec![(good("page descriptor", bits | 3), shift)],
            _ if height <= self.largest_block() => vec![(good("block descriptor", bits | 1), shift)],
            _ => Vec::new(),
        }
    }

    fn iova(&self, position: u64) -> u64 {
        let upper = position | u64::MAX << self.input_bits;
        match self.halves {
            Halves::Low => position,
            Halves::High => upper,
            Halves::Tagged => {
                // Something that differs from one IOVA to the next.
                let hash = (position >> 3).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                let whole = if hash >> 55 & 1 == 0 { position } else { upper };
                whole & !(0xff << 56) | hash & 0xff << 56
            }
        }
    }

    fn tables(&self, root: u64) -> Tables {
        Tables::Smmu(if self.first_stage {
            SmmuTables { first: Some(self.stage_1(root)), ..SmmuTables::default() }
        } else {
            SmmuTables { second: Some(self.stage_2(root)), ..SmmuTables::default() }
        })
    }

    fn excuse(&self, damage: &Damage, _: bool) -> Option<KnownError> {
        let bit = |position: u32| damage.entry >> position & 1 == 1;
        let is_table = bit(0) && bit(1) && damage.height > 0;
        let is_leaf = bit(0) && !is_table;
        if is_leaf && damage.height > self.largest_block() {
            Some(known::SMMU_BLOCKS)
        } else if self.first_stage && ((is_leaf && !bit(6)) || (is_table && bit(61))) {
            Some(known::SMMU_PRIVILEGED)
        } else {
            (self.granule == 65536 && bit(0) && damage.entry >> 12 & 0xf != 0).then_some(known::SMMU_64K_BITS)
        }
    }
}

/// RISC-V Sv39 to Sv57 and Sv39x4 to Sv57x4.
#[derive(Clone, Copy, Debug)]
pub struct RiscvLadder {
    /// The second stage, or the first.
    pub second: bool,
    /// Levels of tables.
    pub levels: u32,
}

impl RiscvLadder {
    pub(super) fn table(&self, root: u64) -> RiscvTable {
        RiscvTable { root, levels: self.levels, second: self.second }
    }
}

impl Ladder for RiscvLadder {
    fn name(&self) -> String {
        format!("{} of {} levels", if self.second { "second stage" } else { "first stage" }, self.levels)
    }

    fn formats(&self) -> Vec<&'static str> {
        vec![crate::spaces::riscv::format(self.second)]
    }

    fn rungs(&self) -> Vec<(u32, u64)> {
        let mut rungs = nine_bits(self.levels);
        if let Some(root) = rungs.last_mut().filter(|_| self.second) {
            root.1 = 2048;
        }
        rungs
    }

    fn places(&self) -> Range<u64> {
        PLACES
    }

    fn high_address(&self) -> u64 {
        // From bit 37: the page number begins at bit 10.
        0x3f_ffe0_0000_0000
    }

    fn blind_bits(&self) -> u64 {
        0x3ff << 54
    }

    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good> {
        (below + 1 == height).then_some(good("pointer", table >> 12 << 10 | 1))
    }

    fn leaves(&self, height: usize) -> Vec<(Good, u32)> {
        // V, R, W, U, A, D.
        vec![(good("leaf", 0xd7), 12 + 9 * height as u32)]
    }

    fn with_address(&self, leaf: u64, address: u64) -> u64 {
        leaf | address >> 12 << 10
    }

    fn address(&self, entry: u64) -> u64 {
        (entry >> 10 << 12) & 0xff_ffff_ffff_ffff
    }

    fn iova(&self, position: u64) -> u64 {
        if self.second { position } else { extended(position, 12 + 9 * self.levels) }
    }

    fn tables(&self, root: u64) -> Tables {
        let table = Some(self.table(root));
        Tables::Riscv(if self.second { RiscvTables { first: None, second: table } } else { RiscvTables { first: table, second: None } })
    }

    fn excuse(&self, damage: &Damage, write: bool) -> Option<KnownError> {
        const USER: u64 = 1 << 4;
        const ACCESSED: u64 = 1 << 6;
        const DIRTY: u64 = 1 << 7;
        let is_leaf = damage.entry & 0b1110 != 0;
        if damage.entry & 1 == 0 {
            None
        } else if damage.entry >> 54 != 0 {
            Some(known::RISCV_UPPER_BITS)
        } else if is_leaf && damage.entry & USER == 0 {
            Some(known::RISCV_USER)
        } else if is_leaf && write && damage.entry & ACCESSED == 0 {
            Some(known::RISCV_ACCESSED)
        } else {
            (!is_leaf && damage.entry & (USER | ACCESSED | DIRTY) != 0).then_some(known::RISCV_POINTER_BITS)
        }
    }
}

/// AMD v1.
#[derive(Clone, Copy, Debug)]
pub struct AmdLadder {
    /// Paging mode: levels of tables.
    pub mode: u32,
    /// Only entries of the first table are damaged.
    pub root_only: bool,
}

impl Ladder for AmdLadder {
    fn name(&self) -> String {
        format!("v1 of {} levels{}", self.mode, if self.root_only { ", the first" } else { "" })
    }

    fn formats(&self) -> Vec<&'static str> {
        vec!["amd-vi/v1"]
    }

    fn rungs(&self) -> Vec<(u32, u64)> {
        let mut rungs = nine_bits(self.mode);
        if let Some(root) = rungs.get_mut(5) {
            root.1 = 128;
        }
        rungs
    }

    fn blind_bits(&self) -> u64 {
        0x7f << 52
    }

    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good> {
        // PR, IR, IW, NextLevel.
        let entry = table | 1 | 3 << 61 | (below as u64 + 1) << 9;
        match height.checked_sub(below)? {
            1 => Some(good("pointer", entry)),
            2 => Some(good("pointer that leaves out a level", entry)),
            _ => None,
        }
    }

    fn lowest(&self) -> usize {
        if self.root_only { self.mode as usize - 1 } else { 0 }
    }

    fn leaves(&self, height: usize) -> Vec<(Good, u32)> {
        let bits = 1 | 3 << 61;
        let shift = 12 + 9 * height as u32;
        // Twice and sixteen times the size of a slot; the ones from bit 12 upwards say so.
        let sized = |log2: u32| (good("leaf of a coded size", bits | 7 << 9 | (((1 << (log2 - 1)) - 1) & !0xfff)), log2);
        match height {
            5 => Vec::new(),
            // All address bits are ones, so that bit 52 is the lowest zero: as large as it gets.
            4 => vec![(good("leaf", bits), shift), sized(shift + 1), sized(shift + 4), sized(53)],
            _ => vec![(good("leaf", bits), shift), sized(shift + 1), sized(shift + 4)],
        }
    }

    fn tables(&self, root: u64) -> Tables {
        Tables::Amd(AmdTable { root, mode: self.mode, access: Access::RW })
    }

    fn excuse(&self, damage: &Damage, _: bool) -> Option<KnownError> {
        let (entry, level) = (damage.entry, damage.height as u64 + 1);
        let next = entry >> 9 & 7;
        let is_table = (1..7).contains(&next);
        // A pointer that names a lower level than its table has: what follows names one that is not lower.
        let table_names = damage.below.filter(|_| is_table).map_or(0, |below| below as u64);
        if is_table && (next >= level || table_names >= next) {
            return Some(known::AMD_LOOPS);
        }
        if entry & 1 == 0 {
            return (!is_table).then_some(known::AMD_PRESENT);
        }
        if !is_table && level == 6 {
            return Some(known::AMD_LEVEL_6);
        }
        let size = 13 + u64::from((entry >> 12 & 0xff_ffff_ffff).trailing_ones());
        if next == 7 && (size <= 3 + 9 * level || size >= 12 + 9 * level) {
            return Some(known::AMD_SIZES);
        }
        let reserved = if is_table { 0x1ff << 52 } else { 0x7f << 52 };
        (entry & reserved != 0).then_some(known::AMD_RESERVED)
    }
}
