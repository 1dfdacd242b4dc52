//! Apple DART, both address packings.
//!
//! Source: facts about the tables that Linux writes for these units; there is no public manual.

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond, equal_steps};
use crate::reference::{Access, Problem, bit, bits};

/// How an address stands in an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// Bits 35:12 in place.
    Dart1,
    /// Bits 41:14 in 37:10.
    Dart2,
}

/// `apple-dart/dart1` and `apple-dart/dart2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dart {
    /// Which of the two.
    pub packing: Packing,
    /// 4096 or 16384.
    pub granule: u64,
    /// 2 or 3, below the roots.
    pub levels: u32,
    /// Input bits.
    pub input_bits: u32,
    /// Output bits.
    pub output_bits: u32,
    /// Up to four tables, side by side in the input.
    pub roots: [Option<u64>; 4],
}

const ROOTS: [&str; 4] = ["root", "root-1", "root-2", "root-3"];

impl Dart {
    pub(super) fn format(&self) -> &'static str {
        match self.packing {
            Packing::Dart1 => "apple-dart/dart1",
            Packing::Dart2 => "apple-dart/dart2",
        }
    }

    pub(super) fn read(reader: &Reader<'_>, format: &str) -> Result<Dart, Problem> {
        reader.know(&[["granule", "levels", "input-bits", "output-bits"], ROOTS].concat())?;
        let packing = if format == "apple-dart/dart1" { Packing::Dart1 } else { Packing::Dart2 };
        let granule = reader.get("granule").unwrap_or(16384);
        if granule != 16384 && !(granule == 4096 && packing == Packing::Dart1) {
            return Err(Problem::Illegal(format!("granule {granule}")));
        }
        let widest = if packing == Packing::Dart1 { 36 } else { 42 };
        Ok(Dart {
            packing,
            granule,
            levels: reader.number("levels", 2, 2, 3)?,
            input_bits: reader.number("input-bits", 32, 12, 63)?,
            output_bits: reader.number("output-bits", widest, 12, widest)?,
            roots: ROOTS.map(|name| reader.get(name)),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("granule", self.granule), said("levels", self.levels)];
        all.extend([said("input-bits", self.input_bits), said("output-bits", self.output_bits)]);
        all.extend(ROOTS.iter().zip(self.roots).filter_map(|(name, root)| root.map(|root| said(name, root))));
        all
    }

    /// Log2 of what one root covers.
    pub(crate) fn root_bits(&self) -> u32 {
        let page_bits = self.granule.trailing_zeros();
        page_bits + (page_bits - 3) * self.levels
    }

    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        let page_bits = self.granule.trailing_zeros();
        let bits = self.root_bits();
        if self.input_bits > bits + 2 || self.input_bits < page_bits {
            return Err(Problem::Illegal(format!("input-bits {}", self.input_bits)));
        }
        let mut regions = Vec::new();
        for (index, root) in self.roots.iter().enumerate() {
            let first = (index as u64) << bits;
            let Some(root) = root.filter(|_| first >> self.input_bits == 0) else { continue };
            let steps = equal_steps(self.levels, page_bits, page_bits - 3);
            let root = root - root % self.granule;
            regions.push(Region { first, bits: bits.min(self.input_bits), table_first: 0, root, steps, half: 0, last: None });
        }
        Ok(regions)
    }

    /// Valid 0; DART1: sub-page protection off 1, no write 7, no read 8; DART2: no write 2, no read 3. First and last part of the page that may be reached, in 1/4096:
    /// 63:52 and 51:40. A last part before the first one leaves nothing.
    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        if !bit(entry, 0) {
            return Entry::Fault;
        }
        let (page, no_read, no_write) = match self.packing {
            Packing::Dart1 => (bits(entry, 35, 12) << 12, bit(entry, 8), bit(entry, 7)),
            Packing::Dart2 => (bits(entry, 37, 10) << 14, bit(entry, 3), bit(entry, 2)),
        };
        // With 16 KiB the two lowest bits of a DART1 address are not looked at.
        let page = page - page % self.granule;
        if beyond(page, self.output_bits) {
            return Entry::Fault;
        }
        if step.level > 1 {
            return Entry::table(page, Access::RW, 0);
        }
        let (first, last) = (bits(entry, 63, 52), bits(entry, 51, 40));
        let unchecked = self.packing == Packing::Dart1 && bit(entry, 1);
        let unit = self.granule / 4096;
        let reach = if unchecked || (first, last) == (0, 0xfff) { None } else { Some((first * unit, last * unit + (unit - 1))) };
        if !unchecked && first > last {
            return Entry::Fault;
        }
        Entry::Leaf { address: page, access: Access { read: !no_read, write: !no_write }, size: None, reach }
    }
}
