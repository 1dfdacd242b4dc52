//! LoongArch page tables.
//!
//! Source: LoongArch Reference Manual, volume 1, section 5.4.

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond, equal_steps};
use crate::reference::{Access, Problem, bit, bits};

/// `loongarch/paging`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoongArch {
    /// 4096, 16384 or 65536.
    pub granule: u64,
    /// 2, 3 or 4.
    pub levels: u32,
    /// Bits of each half.
    pub input_bits: u32,
    /// PALEN.
    pub output_bits: u32,
    /// Table of the lower half.
    pub root: Option<u64>,
    /// Table of the upper half.
    pub root_high: Option<u64>,
    /// Hardware sets V where P is set, and D where W is set.
    pub hardware_update: bool,
}

impl LoongArch {
    pub(super) fn read(reader: &Reader<'_>) -> Result<LoongArch, Problem> {
        reader.know(&["granule", "levels", "input-bits", "output-bits", "root", "root-high", "hardware-update"])?;
        let granule = reader.get("granule").unwrap_or(16384);
        if ![4096, 16384, 65536].contains(&granule) {
            return Err(Problem::Illegal(format!("granule {granule}")));
        }
        let levels = reader.number("levels", 3, 2, 4)?;
        let page_bits = granule.trailing_zeros();
        let held = page_bits + (page_bits - 3) * levels;
        let input_bits = reader.number("input-bits", u64::from(held.min(47)), 12, u64::from(held.min(63)))?;
        Ok(LoongArch {
            granule,
            levels,
            input_bits,
            output_bits: reader.number("output-bits", 48, 12, 48)?,
            root: reader.get("root"),
            root_high: reader.get("root-high"),
            hardware_update: reader.flag("hardware-update", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("granule", self.granule), said("levels", self.levels), said("input-bits", self.input_bits)];
        all.extend([said("output-bits", self.output_bits), said("hardware-update", self.hardware_update)]);
        all.extend(self.root.map(|root| said("root", root)));
        all.extend(self.root_high.map(|root| said("root-high", root)));
        all
    }

    /// Each half has a table of its own, indexed by the low bits of the IOVA.
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        let page_bits = self.granule.trailing_zeros();
        let steps = equal_steps(self.levels, page_bits, page_bits - 3);
        let held = page_bits + (page_bits - 3) * self.levels;
        let end = if held >= 64 { 0 } else { 1u64 << held };
        let region = |first: u64, root: u64| Region {
            first,
            bits: self.input_bits,
            // The upper half's addresses have ones where the table begins to count, unless the table counts no further than the half.
            table_first: if first == 0 || held <= self.input_bits { 0 } else { end.wrapping_sub(1 << self.input_bits) },
            root: root - root % self.granule,
            steps: steps.clone(),
            half: 0,
            last: None,
        };
        let low = self.root.map(|root| region(0, root));
        let high = self.root_high.map(|root| region(0u64.wrapping_sub(1 << self.input_bits), root));
        Ok(low.into_iter().chain(high).collect())
    }

    /// V 0, D 1, PLV 3:2, MAT 5:4, G 6, P 7, W 8, address from 12, NR 61, NX 62, RPLV 63. In a directory bit 6 says that this is a huge page, whose G is bit 12.
    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        let page_bits = self.granule.trailing_zeros();
        let huge = step.level > 1 && bit(entry, 6);
        if step.level > 1 && !huge {
            // The address of a table, also if it is zero; there is no bit for validity. It is aligned to the table's size: the manual does not say what others lead to. Kernels keep virtual addresses there, whose bits from 48 on play no part.
            let address = bits(entry, 47, page_bits) << page_bits;
            if bits(entry, 47, 0) != address || beyond(address, self.output_bits) {
                return Entry::Fault;
            }
            return Entry::table(address, Access::RW, 0);
        }
        // Where hardware walks, V and D are what it sets: whether the page is there and may be written is said by P and W (section 5.4.5). Of the access
        // types, 3 is reserved (section 5.3).
        if !bit(entry, if self.hardware_update { 7 } else { 0 }) || bits(entry, 5, 4) == 3 {
            return Entry::Fault;
        }
        // Of the page number in a TLB entry, the bits below the page's size may be anything (section 5.4.2).
        if step.shift > 47 {
            return Entry::Fault;
        }
        let address = bits(entry, 47, step.shift) << step.shift;
        if beyond(address, self.output_bits) {
            return Entry::Fault;
        }
        // An unprivileged request has privilege level 3.
        let reachable = bits(entry, 3, 2) == 3;
        let writable = bit(entry, if self.hardware_update { 8 } else { 1 });
        Entry::leaf(address, Access { read: reachable && !bit(entry, 61), write: reachable && writable })
    }
}
