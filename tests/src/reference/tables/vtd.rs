//! VT-d's first-stage and second-stage tables.
//!
//! Source: Intel Virtualization Technology for Directed I/O, sections 3.6, 3.7 and 9.7, 9.8 (first-stage and second-stage paging entries).

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step};
use crate::reference::{Access, Problem, bit, bits};

/// `intel-vtd/first-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdFirst {
    /// Address of the first table.
    pub root: u64,
    /// 4 or 5.
    pub levels: u32,
    /// The host address width: addresses beyond it are reserved.
    pub output_bits: u32,
    /// 1G leaves are supported (CAP.FL1GP).
    pub large_1g: bool,
    /// NXE: bit 63 is not reserved.
    pub execute_disable: bool,
    /// EAFE: hardware sets EA wherever it sets A.
    pub extended_access: bool,
}

/// `intel-vtd/second-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdSecond {
    /// Address of the first table.
    pub root: u64,
    /// 3, 4 or 5.
    pub levels: u32,
    /// IOVAs with bits at or above this fault: what the levels give, or less (CAP.MGAW).
    pub input_bits: u32,
    /// The host address width: addresses beyond it are reserved.
    pub output_bits: u32,
    /// 2M leaves are supported (CAP.SLLPS).
    pub large_2m: bool,
    /// 1G leaves are supported (CAP.SLLPS).
    pub large_1g: bool,
    /// The unit has snoop control (ECAP.SC): bit 11 of a leaf is not reserved.
    pub snoop_control: bool,
    /// SSADE: hardware sets A and D.
    pub accessed_dirty: bool,
}

/// Four levels with large pages, and nothing else that a unit may have.
impl Default for VtdSecond {
    fn default() -> Self {
        Self { root: 0, levels: 4, input_bits: 48, output_bits: 52, large_2m: true, large_1g: true, snoop_control: false, accessed_dirty: false }
    }
}

/// Nine bits a level, from the given level down to 1.
fn vtd_steps(levels: u32) -> Vec<Step> {
    (1..=levels).rev().map(|level| Step { level: level as i32, shift: 12 + 9 * (level - 1), entries: 512 }).collect()
}

impl VtdFirst {
    /// The IOVA must be canonical (VT-d 3.6): bits above the table's input repeat its top bit. So the lower half of the first table is at the bottom of the
    /// 64-bit space and the upper half at its top.
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        if self.levels != 4 && self.levels != 5 {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let half_bits = 12 + 9 * self.levels - 1;
        let root = self.root - self.root % 4096;
        let low = Region { first: 0, bits: half_bits, table_first: 0, root, steps: vtd_steps(self.levels), half: 0, last: None };
        let high = Region { first: 0u64.wrapping_sub(1 << half_bits), table_first: 1 << half_bits, ..low.clone() };
        Ok(vec![low, high])
    }

    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        // Bit 0 present, 1 writable, 2 user, 7 page size, 63 execute-disable.
        if !bit(entry, 0) {
            return Entry::Fault;
        }
        if bit(entry, 63) && !self.execute_disable {
            return Entry::Fault;
        }
        let address = bits(entry, 51, 12) << 12;
        if address >> self.output_bits != 0 {
            return Entry::Fault;
        }
        let access = Access { read: bit(entry, 2), write: bit(entry, 2) && bit(entry, 1) };
        let page_size = bit(entry, 7);
        match step.level {
            1 => Entry::leaf(address, access),
            2 | 3 if page_size => {
                // Bit 12 of a large leaf is PAT; the bits from 13 to its size are reserved.
                if (step.level == 3 && !self.large_1g) || bits(entry, step.shift - 1, 13) != 0 {
                    return Entry::Fault;
                }
                Entry::leaf(address - address % (1 << step.shift), access)
            }
            _ if page_size => Entry::Fault,
            _ => Entry::table(address, access, 0),
        }
    }
}

impl VtdSecond {
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        if !(3..=5).contains(&self.levels) {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let input_bits = self.input_bits.min(12 + 9 * self.levels);
        let root = self.root - self.root % 4096;
        Ok(vec![Region { first: 0, bits: input_bits, table_first: 0, root, steps: vtd_steps(self.levels), half: 0, last: None }])
    }

    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        // Bit 0 read, 1 write, 7 page size; there is no present bit (VT-d 9.8).
        let access = Access { read: bit(entry, 0), write: bit(entry, 1) };
        if access == Access::NONE {
            return Entry::Fault;
        }
        let address = bits(entry, 51, 12) << 12;
        if address >> self.output_bits != 0 {
            return Entry::Fault;
        }
        let page_size = bit(entry, 7);
        let leaf = step.level == 1 || (step.level <= 3 && page_size);
        // Bit 62 is reserved (it was the transient-mapping bit once), and bit 11, which forces snooping, in table entries and on units without snoop control.
        if bit(entry, 62) || (bit(entry, 11) && !(leaf && self.snoop_control)) {
            return Entry::Fault;
        }
        match step.level {
            1 => Entry::leaf(address, access),
            2 | 3 if page_size => {
                let supported = if step.level == 2 { self.large_2m } else { self.large_1g };
                // The address bits below the leaf's size are reserved.
                if !supported || bits(entry, step.shift - 1, 12) != 0 {
                    return Entry::Fault;
                }
                Entry::leaf(address, access)
            }
            _ if page_size => Entry::Fault,
            _ => Entry::table(address, access, 0),
        }
    }
}

impl VtdFirst {
    pub(super) fn read(reader: &Reader<'_>) -> Result<VtdFirst, Problem> {
        reader.know(&["root", "levels", "output-bits", "large-1g", "execute-disable", "extended-access"])?;
        Ok(VtdFirst {
            root: reader.need("root")?,
            levels: reader.need("levels")? as u32,
            output_bits: reader.number("output-bits", 52, 32, 52)?,
            large_1g: reader.flag("large-1g", true),
            execute_disable: reader.flag("execute-disable", true),
            extended_access: reader.flag("extended-access", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("root", self.root), said("levels", self.levels), ("output-bits", u64::from(self.output_bits), 52)];
        all.extend([("large-1g", u64::from(self.large_1g), 1), ("execute-disable", u64::from(self.execute_disable), 1)]);
        all.push(("extended-access", u64::from(self.extended_access), 0));
        all
    }
}

impl VtdSecond {
    pub(super) fn read(reader: &Reader<'_>) -> Result<VtdSecond, Problem> {
        reader.know(&["root", "levels", "input-bits", "output-bits", "large-2m", "large-1g", "snoop-control", "accessed-dirty"])?;
        let levels = reader.number("levels", 0, 3, 5)?;
        Ok(VtdSecond {
            root: reader.need("root")?,
            levels,
            input_bits: reader.get("input-bits").unwrap_or(64).min(12 + 9 * u64::from(levels)) as u32,
            output_bits: reader.number("output-bits", 52, 32, 52)?,
            large_2m: reader.flag("large-2m", true),
            large_1g: reader.flag("large-1g", true),
            snoop_control: reader.flag("snoop-control", false),
            accessed_dirty: reader.flag("accessed-dirty", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("root", self.root), said("levels", self.levels)];
        if self.input_bits < 12 + 9 * self.levels {
            all.push(said("input-bits", self.input_bits));
        }
        all.push(("output-bits", u64::from(self.output_bits), 52));
        all.extend([("large-2m", u64::from(self.large_2m), 1), ("large-1g", u64::from(self.large_1g), 1)]);
        all.extend([("snoop-control", u64::from(self.snoop_control), 0), ("accessed-dirty", u64::from(self.accessed_dirty), 0)]);
        all
    }
}
