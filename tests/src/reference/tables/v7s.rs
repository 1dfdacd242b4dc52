//! ARMv7 short descriptors.
//!
//! Source: Arm Architecture Reference Manual ARMv7-A, DDI 0406, section B3.5.

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond};
use crate::reference::{Access, Problem, bit, bits};

/// `arm-v7s/short`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct V7s {
    /// TTBCR.N.
    pub split: u32,
    /// Table of the low range.
    pub root: Option<u64>,
    /// Table of the high range.
    pub root_high: Option<u64>,
    /// AP\[0\] is the access flag.
    pub access_flag: bool,
    /// DACR.
    pub domains: u32,
    /// There is a PXN bit.
    pub execute_never_privileged: bool,
    /// There are supersections.
    pub supersections: bool,
    /// Addresses beyond fault; supersections alone have more than 32 bits.
    pub output_bits: u32,
    /// Requests are privileged.
    pub privileged: bool,
    /// TEX\[0\], C and B select a type of `prrr`.
    pub tex_remap: bool,
    /// PRRR: two bits for each of eight types, of which 3 is reserved.
    pub prrr: u32,
}

/// What Linux writes into PRRR.
pub(crate) const PRRR: u32 = 0x8008_8204;

/// A field of DACR.
const MANAGER: u64 = 3;

impl V7s {
    pub(super) fn read(reader: &Reader<'_>) -> Result<V7s, Problem> {
        let known = ["split", "root", "root-high", "access-flag", "tex-remap", "prrr", "nmrr", "domains"];
        reader.know(&[known.as_slice(), &["execute-never-privileged", "supersections", "output-bits", "privileged"]].concat())?;
        Ok(V7s {
            split: reader.number("split", 0, 0, 7)?,
            root: reader.get("root"),
            root_high: reader.get("root-high"),
            access_flag: reader.flag("access-flag", true),
            domains: reader.number("domains", 0x5555_5555, 0, u64::from(u32::MAX))?,
            execute_never_privileged: reader.flag("execute-never-privileged", false),
            supersections: reader.flag("supersections", true),
            output_bits: reader.number("output-bits", 32, 32, 40)?,
            privileged: reader.flag("privileged", false),
            tex_remap: reader.flag("tex-remap", true),
            prrr: reader.number("prrr", u64::from(PRRR), 0, u64::from(u32::MAX))?,
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("split", self.split), said("access-flag", self.access_flag), said("domains", self.domains)];
        all.push(said("execute-never-privileged", self.execute_never_privileged));
        all.extend([said("supersections", self.supersections), said("privileged", self.privileged)]);
        all.push(said("output-bits", self.output_bits));
        all.extend([said("tex-remap", self.tex_remap), said("prrr", self.prrr)]);
        all.extend(self.root.map(|root| said("root", root)));
        all.extend(self.root_high.map(|root| said("root-high", root)));
        all
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        let steps = |entries: u64| vec![Step { level: 1, shift: 20, entries }, Step { level: 2, shift: 12, entries: 256 }];
        let bits = 32 - self.split;
        let mut regions = Vec::new();
        if let Some(root) = self.root {
            let root = root - root % (16384 >> self.split);
            regions.push(Region { first: 0, bits, table_first: 0, root, steps: steps(4096 >> self.split), half: 0, last: None });
        }
        // With N = 0 nothing is left for TTBR1.
        if let Some(root) = self.root_high.filter(|_| self.split > 0) {
            let (first, root) = (1 << bits, root - root % 16384);
            let last = Some((1 << 32) - 1 - first);
            regions.push(Region { first, bits: 32, table_first: first, root, steps: steps(4096), half: 0, last });
        }
        Ok(regions)
    }

    /// AP\[2:0\] of a leaf in a domain.
    fn access(&self, domain: u64, permissions: u64) -> Option<Access> {
        if self.access_flag && !bit(permissions, 0) {
            return None;
        }
        // Reserved, also where nobody looks at permissions.
        if !self.access_flag && permissions == 4 {
            return None;
        }
        let field = bits(u64::from(self.domains), 2 * domain as u32 + 1, 2 * domain as u32);
        if field == MANAGER {
            return Some(Access::RW);
        }
        if field != 1 {
            return None;
        }
        let only = |write: bool| Access { read: true, write };
        let privileged = |write: bool| if self.privileged { only(write) } else { Access::NONE };
        if self.access_flag {
            // AP[1] is for unprivileged requests too, AP[2] forbids writing.
            return Some(if bit(permissions, 1) { only(!bit(permissions, 2)) } else { privileged(!bit(permissions, 2)) });
        }
        match permissions {
            0 => Some(Access::NONE),
            1 => Some(privileged(true)),
            2 => Some(only(self.privileged)),
            3 => Some(Access::RW),
            5 => Some(privileged(false)),
            6 | 7 => Some(Access::R),
            _ => None,
        }
    }

    /// Whether TEX, C and B say something: types that are reserved or of the implementation's own count as faults.
    fn is_type(&self, tex: u64, cb: u64) -> bool {
        if self.tex_remap {
            let kind = bits(tex, 0, 0) * 4 + cb;
            return kind != 6 && bits(u64::from(self.prrr), 2 * kind as u32 + 1, 2 * kind as u32) != 3;
        }
        // Table B3-10: C and B.
        match tex {
            0 | 4..=7 => true,
            1 => cb == 0 || cb == 3,
            2 => cb == 0,
            _ => false,
        }
    }

    /// `tex` and bits 3:2 of the entry say the memory type.
    fn leaf(&self, domain: u64, permissions: u64, address: u64, size: u32, tex: u64, entry: u64) -> Entry {
        match self.access(domain, permissions).filter(|_| self.is_type(tex, bits(entry, 3, 2))) {
            Some(access) => Entry::Leaf { address, access, size: Some(size), reach: None },
            None => Entry::Fault,
        }
    }

    /// `half` is the domain that the first table's entry named.
    pub(super) fn decode(&self, half: usize, step: Step, entry: u64) -> Entry {
        let kind = bits(entry, 1, 0);
        if step.level == 2 {
            // Large and small pages: AP 9 and 5:4.
            let permissions = bits(entry, 9, 9) * 4 + bits(entry, 5, 4);
            return match kind {
                0 => Entry::Fault,
                1 => self.leaf(half as u64, permissions, bits(entry, 31, 16) << 16, 16, bits(entry, 14, 12), entry),
                _ => self.leaf(half as u64, permissions, bits(entry, 31, 12) << 12, 12, bits(entry, 8, 6), entry),
            };
        }
        let domain = bits(entry, 8, 5);
        match kind {
            0 => Entry::Fault,
            // Domain 8:5, address 31:10; bit 2 is PXN or should be zero.
            1 => Entry::table(bits(entry, 31, 10) << 10, Access::RW, domain as usize),
            // With PXN bit 0 is that, without the value is reserved.
            3 if !self.execute_never_privileged => Entry::Fault,
            // AP 15 and 11:10; a supersection has address bits 35:32 in 23:20 and 39:36 in 8:5, and domain 0.
            _ if bit(entry, 18) => {
                let address = (bits(entry, 31, 24) << 24) + (bits(entry, 23, 20) << 32) + (domain << 36);
                if !self.supersections || beyond(address, self.output_bits) {
                    return Entry::Fault;
                }
                self.leaf(0, bits(entry, 15, 15) * 4 + bits(entry, 11, 10), address, 24, bits(entry, 14, 12), entry)
            }
            _ => self.leaf(domain, bits(entry, 15, 15) * 4 + bits(entry, 11, 10), bits(entry, 31, 20) << 20, 20, bits(entry, 14, 12), entry),
        }
    }
}
