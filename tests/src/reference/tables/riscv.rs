//! RISC-V: Sv32 to Sv57 for the first stage, Sv32x4 to Sv57x4 for the second.
//!
//! Sources: The RISC-V Instruction Set Manual, volume II: supervisor level (Sv32 to Sv57, Svnapot, Svpbmt) and hypervisor extension (two-stage translation); RISC-V
//! IOMMU Architecture Specification 1.0 for the settings.

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond};
use crate::reference::{Access, Problem, bit, bits};

/// What entries of both stages have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries {
    /// Addresses beyond fault.
    pub output_bits: u32,
    /// N: pages of 64 KiB.
    pub svnapot: bool,
    /// PBMT: bits 62:61 are a memory type.
    pub svpbmt: bool,
    /// Bits 60 and 59 are for software.
    pub svrsw60t59b: bool,
    /// Hardware sets A and D.
    pub hardware_update: bool,
    /// Big-endian entries.
    pub big_endian: bool,
}

/// `riscv-iommu/first-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiscvFirst {
    /// Address of the first table.
    pub root: u64,
    /// 2 (Sv32) to 5 (Sv57).
    pub levels: u32,
    /// Entries.
    pub entries: Entries,
}

/// `riscv-iommu/second-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RiscvSecond {
    /// Address of the first table, which has 16 KiB.
    pub root: u64,
    /// 2 (Sv32x4) to 5 (Sv57x4).
    pub levels: u32,
    /// Input addresses with bits at or above this fault, if the table would take more.
    pub input_bits: u32,
    /// Entries.
    pub entries: Entries,
}

const COMMON: &[&str] = &["root", "levels", "output-bits", "svnapot", "svpbmt", "svrsw60t59b", "hardware-update", "big-endian"];

impl Entries {
    fn read(reader: &Reader<'_>) -> Result<Entries, Problem> {
        Ok(Entries {
            output_bits: reader.number("output-bits", 56, 12, 56)?,
            svnapot: reader.flag("svnapot", false),
            svpbmt: reader.flag("svpbmt", false),
            svrsw60t59b: reader.flag("svrsw60t59b", false),
            hardware_update: reader.flag("hardware-update", false),
            big_endian: reader.flag("big-endian", false),
        })
    }

    fn said(&self) -> [Said; 6] {
        [
            said("output-bits", self.output_bits),
            said("svnapot", self.svnapot),
            said("svpbmt", self.svpbmt),
            said("svrsw60t59b", self.svrsw60t59b),
            said("hardware-update", self.hardware_update),
            said("big-endian", self.big_endian),
        ]
    }

    /// V 0, R 1, W 2, X 3, U 4, G 5, A 6, D 7, RSW 9:8, PPN from 10. With 64 bits: PPN 53:10, reserved 60:54, PBMT 62:61, N 63.
    fn decode(&self, wide: bool, step: Step, entry: u64) -> Entry {
        if !bit(entry, 0) {
            return Entry::Fault;
        }
        let (read, write, execute) = (bit(entry, 1), bit(entry, 2), bit(entry, 3));
        // Writable without readable is reserved.
        if write && !read {
            return Entry::Fault;
        }
        let (mut memory_type, mut napot) = (0, false);
        if wide {
            memory_type = bits(entry, 62, 61);
            napot = bit(entry, 63);
            let reserved = bits(entry, 58, 54) != 0 || (bits(entry, 60, 59) != 0 && !self.svrsw60t59b);
            if reserved || (memory_type != 0 && !self.svpbmt) || memory_type == 3 || (napot && !self.svnapot) {
                return Entry::Fault;
            }
        }
        let page = bits(entry, if wide { 53 } else { 31 }, 10);
        if !read && !execute {
            // A pointer: U, A, D, PBMT and N are reserved, and the last level has none.
            let reserved = bit(entry, 4) || bit(entry, 6) || bit(entry, 7) || memory_type != 0 || napot;
            let address = page << 12;
            return if reserved || step.level == 1 || beyond(address, self.output_bits) {
                Entry::Fault
            } else {
                Entry::table(address, Access::RW, 0)
            };
        }
        // Requests here are not privileged: U in the first stage; the second stage takes all requests as such ones.
        let usable = bit(entry, 4) && (bit(entry, 6) || self.hardware_update);
        let access = Access { read: usable && read, write: usable && write && (bit(entry, 7) || self.hardware_update) };
        let mut address = page << 12;
        let mut size = step.shift;
        if napot {
            // Only 64 KiB: ppn[3:0] is 1000, at the last level.
            if step.level != 1 || page % 16 != 8 {
                return Entry::Fault;
            }
            size = 16;
            address -= 8 << 12;
        }
        if !address.is_multiple_of(1 << size) || beyond(address, self.output_bits) {
            return Entry::Fault;
        }
        Entry::Leaf { address, access, size: Some(size), reach: None }
    }
}

/// The levels' steps; `widened` is by how many bits the first table is larger.
fn steps(levels: u32, widened: u32) -> Vec<Step> {
    let stride = if levels == 2 { 10 } else { 9 };
    let mut steps = super::equal_steps(levels, 12, stride);
    steps[0].entries <<= widened;
    steps
}

fn check_levels(levels: u32) -> Result<(), Problem> {
    if (2..=5).contains(&levels) { Ok(()) } else { Err(Problem::Illegal(format!("levels {levels}"))) }
}

impl RiscvFirst {
    pub(super) fn read(reader: &Reader<'_>) -> Result<RiscvFirst, Problem> {
        // What privileged requests may do is not looked at.
        reader.know(&[COMMON, &["supervisor", "sum"]].concat())?;
        let (root, levels) = (reader.need("root")?, reader.number("levels", 3, 2, 5)?);
        Ok(RiscvFirst { root, levels, entries: Entries::read(reader)? })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let own = [said("root", self.root), said("levels", self.levels)];
        own.into_iter().chain(self.entries.said()).collect()
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        check_levels(self.levels)?;
        let steps = steps(self.levels, 0);
        let root = self.root - self.root % 4096;
        if self.levels == 2 {
            // Sv32 has no upper half: bits beyond 31 fault.
            return Ok(vec![Region { first: 0, bits: 32, table_first: 0, root, steps, half: 0, last: None }]);
        }
        let bits = 11 + 9 * self.levels;
        let low = Region { first: 0, bits, table_first: 0, root, steps, half: 0, last: None };
        let high = Region { first: 0u64.wrapping_sub(1 << bits), table_first: 1 << bits, ..low.clone() };
        Ok(vec![low, high])
    }

    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        self.entries.decode(self.levels > 2, step, entry)
    }
}

impl RiscvSecond {
    pub(super) fn read(reader: &Reader<'_>) -> Result<RiscvSecond, Problem> {
        reader.know(&[COMMON, &["input-bits"]].concat())?;
        let (root, levels) = (reader.need("root")?, reader.number("levels", 3, 2, 5)?);
        let input_bits = reader.number("input-bits", 59, 12, 59)?;
        Ok(RiscvSecond { root, levels, input_bits, entries: Entries::read(reader)? })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let own = [said("root", self.root), said("levels", self.levels), said("input-bits", self.input_bits)];
        own.into_iter().chain(self.entries.said()).collect()
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        check_levels(self.levels)?;
        let steps = steps(self.levels, 2);
        let input_bits = steps[0].shift + steps[0].entries.trailing_zeros();
        let root = self.root - self.root % 16384;
        Ok(vec![Region { first: 0, bits: input_bits.min(self.input_bits), table_first: 0, root, steps, half: 0, last: None }])
    }

    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        self.entries.decode(self.levels > 2, step, entry)
    }
}
