//! AMD-Vi: host tables (v1) and guest tables (v2).
//!
//! Source: AMD I/O Virtualization Technology (IOMMU) Specification 48882, sections 2.2.3 (host tables) and 2.2.6 (guest tables); guest tables are those of AMD64
//! processors (24593 section 5.3).

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond, equal_steps};
use crate::reference::{Access, Problem, bit, bits};

/// `amd-vi/v1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmdV1 {
    /// Address of the first table.
    pub root: u64,
    /// Mode, 1 to 6.
    pub levels: u32,
    /// Addresses beyond are reserved.
    pub output_bits: u32,
    /// IR and IW of the device table entry.
    pub granted: Access,
    /// HAD: the unit sets A.
    pub update_accessed: bool,
    /// HAD: the unit sets D.
    pub update_dirty: bool,
}

/// `amd-vi/v2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AmdV2 {
    /// Address of the first table.
    pub root: u64,
    /// 4 or 5.
    pub levels: u32,
    /// Addresses beyond are reserved.
    pub output_bits: u32,
    /// The upper half of the table is at the upper end of all IOVAs.
    pub sign_extended: bool,
    /// There are pages of 1 GiB.
    pub page_1g: bool,
    /// Requests count as privileged.
    pub privileged: bool,
    /// IR and IW of a device table entry without host table.
    pub granted: Access,
    /// The unit sets A.
    pub update_accessed: bool,
    /// The unit sets D.
    pub update_dirty: bool,
}

/// The address in an entry, bits 51:12.
fn address_of(entry: u64) -> u64 {
    bits(entry, 51, 12) << 12
}

impl AmdV1 {
    pub(super) fn read(reader: &Reader<'_>) -> Result<AmdV1, Problem> {
        reader.know(&["root", "levels", "output-bits", "next-level-7", "read", "write", "update-accessed", "update-dirty"])?;
        Ok(AmdV1 {
            root: reader.need("root")?,
            levels: reader.number("levels", 4, 1, 6)?,
            output_bits: reader.number("output-bits", 52, 12, 52)?,
            granted: Access { read: reader.flag("read", true), write: reader.flag("write", true) },
            update_accessed: reader.flag("update-accessed", false),
            update_dirty: reader.flag("update-dirty", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("root", self.root), said("levels", self.levels), said("output-bits", self.output_bits)];
        all.extend([said("read", self.granted.read), said("write", self.granted.write)]);
        all.extend([("update-accessed", u64::from(self.update_accessed), 0), ("update-dirty", u64::from(self.update_dirty), 0)]);
        all
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        if !(1..=6).contains(&self.levels) {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let mut steps = equal_steps(self.levels, 12, 9);
        if self.levels == 6 {
            // 64 bits end in the middle of the sixth level.
            steps[0].entries = 128;
        }
        let root = self.root - self.root % 4096;
        Ok(vec![Region { first: 0, bits: (12 + 9 * self.levels).min(64), table_first: 0, root, steps, half: 0, last: None }])
    }

    /// PR 0, A 5, D 6, NextLevel 11:9, address 51:12, reserved 58:52, U 59, FC 60, IR 61, IW 62; 4:1, 8:7 and 63 are ignored. In a table entry 60:59 are reserved.
    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        let (next, address) = (bits(entry, 11, 9), address_of(entry));
        if !bit(entry, 0) || bits(entry, 58, 52) != 0 {
            return Entry::Fault;
        }
        let allowed = Access { read: bit(entry, 61), write: bit(entry, 62) };
        let level = step.level as u64;
        match next {
            0 | 7 => {
                // 2^57 bytes and more: there is no such page.
                if level == 6 {
                    return Entry::Fault;
                }
                let mut size = step.shift;
                let mut base = address;
                if next == 7 {
                    // The lowest bit that is zero is half the size: bit 52 at the most, which is no address bit.
                    size = (12..52).find(|position| !bit(address, *position)).unwrap_or(52) + 1;
                    if size <= step.shift || size >= step.shift + 9 {
                        return Entry::Fault;
                    }
                }
                // The address bits below the size code it, or are not looked at.
                base -= base % (1 << size);
                if beyond(base, self.output_bits) {
                    return Entry::Fault;
                }
                Entry::Leaf { address: base, access: allowed, size: Some(size), reach: None }
            }
            // A table of the same level or a higher one.
            _ if next >= level => Entry::Fault,
            _ if bits(entry, 60, 59) != 0 || beyond(address, self.output_bits) => Entry::Fault,
            _ => Entry::Table { address, limit: allowed, skip: (level - 1 - next) as usize, exists: None, half: 0 },
        }
    }
}

impl AmdV2 {
    pub(super) fn read(reader: &Reader<'_>) -> Result<AmdV2, Problem> {
        let known = ["root", "levels", "output-bits", "sign-extended", "page-1g", "no-execute", "privileged", "read", "write"];
        reader.know(&[known.as_slice(), &["update-accessed", "update-dirty"]].concat())?;
        Ok(AmdV2 {
            root: reader.need("root")?,
            levels: reader.number("levels", 4, 4, 5)?,
            output_bits: reader.number("output-bits", 52, 12, 52)?,
            sign_extended: reader.flag("sign-extended", true),
            page_1g: reader.flag("page-1g", true),
            privileged: reader.flag("privileged", false),
            granted: Access { read: reader.flag("read", true), write: reader.flag("write", true) },
            update_accessed: reader.flag("update-accessed", true),
            update_dirty: reader.flag("update-dirty", true),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        vec![
            said("root", self.root),
            said("levels", self.levels),
            said("output-bits", self.output_bits),
            said("sign-extended", self.sign_extended),
            said("page-1g", self.page_1g),
            said("privileged", self.privileged),
            said("read", self.granted.read),
            said("write", self.granted.write),
            ("update-accessed", u64::from(self.update_accessed), 1),
            ("update-dirty", u64::from(self.update_dirty), 1),
        ]
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        if self.levels != 4 && self.levels != 5 {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let steps = equal_steps(self.levels, 12, 9);
        let root = self.root - self.root % 4096;
        let input_bits = 12 + 9 * self.levels;
        let whole = Region { first: 0, bits: input_bits, table_first: 0, root, steps, half: 0, last: None };
        if !self.sign_extended {
            return Ok(vec![whole]);
        }
        let half = 1 << (input_bits - 1);
        let low = Region { bits: input_bits - 1, ..whole };
        Ok(vec![low.clone(), Region { first: 0u64.wrapping_sub(half), table_first: half, ..low }])
    }

    /// P 0, R/W 1, U/S 2, PS 7 (PAT at the last level), PAT 12 of large pages, address 51:12, NX 63.
    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        if !bit(entry, 0) {
            return Entry::Fault;
        }
        let reachable = bit(entry, 2) || self.privileged;
        let access = Access { read: reachable, write: reachable && bit(entry, 1) };
        // PML4E and PML5E: 8:7 must be zero.
        if step.level > 3 && bits(entry, 8, 7) != 0 {
            return Entry::Fault;
        }
        let large = step.level > 1 && bit(entry, 7);
        let address = address_of(entry);
        if large {
            let exists = step.level == 2 || (step.level == 3 && self.page_1g);
            if !exists || bits(entry, step.shift - 1, 13) != 0 {
                return Entry::Fault;
            }
        }
        let address = address - address % (1 << if large { step.shift } else { 12 });
        if beyond(address, self.output_bits) {
            return Entry::Fault;
        }
        if large || step.level == 1 { Entry::leaf(address, access) } else { Entry::table(address, access, 0) }
    }
}
