//! s390 zPCI: region, segment and page tables, as processors have them.
//!
//! Source: z/Architecture Principles of Operation SA22-7832, chapter 3, dynamic address translation.

use super::settings::{Reader, Said, said};
use super::{Entry, Region, Step, beyond};
use crate::reference::{Access, Problem, bit, bits};

/// `s390-zpci/dma`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct S390 {
    /// Address of the first table.
    pub root: u64,
    /// 1 (a page table) to 5 (a region-first table).
    pub levels: u32,
    /// The lowest IOVA.
    pub first_iova: u64,
    /// The highest IOVA; none is all that the tables hold.
    pub last_iova: Option<u64>,
    /// Addresses beyond fault.
    pub output_bits: u32,
    /// Nothing may be written.
    pub read_only: bool,
    /// There are frames of 1 MiB.
    pub page_1m: bool,
    /// Offsets and lengths count; otherwise region-table entries must name whole tables.
    pub partial_tables: bool,
}

impl S390 {
    pub(super) fn read(reader: &Reader<'_>) -> Result<S390, Problem> {
        let known = ["root", "levels", "first-iova", "last-iova", "output-bits", "read-only", "page-1m", "partial-tables"];
        reader.know(&known)?;
        Ok(S390 {
            root: reader.need("root")?,
            levels: reader.number("levels", 3, 1, 5)?,
            first_iova: reader.get("first-iova").unwrap_or(0),
            last_iova: reader.get("last-iova"),
            output_bits: reader.number("output-bits", 64, 12, 64)?,
            read_only: reader.flag("read-only", false),
            page_1m: reader.flag("page-1m", true),
            partial_tables: reader.flag("partial-tables", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("root", self.root), said("levels", self.levels), said("first-iova", self.first_iova)];
        if let Some(last) = self.last_iova {
            // The last byte of all is what is meant anyway.
            all.push(("last-iova", last, u64::MAX));
        }
        all.extend([said("output-bits", self.output_bits), said("read-only", self.read_only)]);
        all.extend([said("page-1m", self.page_1m), said("partial-tables", self.partial_tables)]);
        all
    }

    /// 256 pages of 4 KiB, then 2048 entries a level.
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
        if !(1..=5).contains(&self.levels) {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let step = |level: u32| match level {
            0 => Step { level: 0, shift: 12, entries: 256 },
            _ => Step { level: level as i32, shift: 20 + 11 * (level - 1), entries: 2048 },
        };
        let steps: Vec<Step> = (0..self.levels).rev().map(step).collect();
        let input_bits = if self.levels == 1 { 20 } else { 9 + 11 * self.levels };
        let end = if input_bits == 64 { u64::MAX } else { (1 << input_bits) - 1 };
        let last = self.last_iova.unwrap_or(end).min(end);
        // An empty range.
        let Some(length) = last.checked_sub(self.first_iova) else { return Ok(Vec::new()) };
        let root = self.root - self.root % 4096;
        Ok(vec![Region { first: self.first_iova, bits: 64, table_first: self.first_iova, root, steps, half: 0, last: Some(length) }])
    }

    pub(super) fn decode(&self, step: Step, entry: u64) -> Entry {
        match step.level {
            // Page: I 0x400, P 0x200. 0x800, which must be zero for processors, is not known to be looked at for functions.
            0 => {
                let address = entry - entry % 4096;
                if bit(entry, 10) || beyond(address, self.output_bits) {
                    return Entry::Fault;
                }
                Entry::leaf(address, Access { read: true, write: !bit(entry, 9) })
            }
            // Segment: I 0x20, TT 0xc is zero, FC 0x400, P 0x200.
            1 => {
                if bit(entry, 5) || bits(entry, 3, 2) != 0 {
                    return Entry::Fault;
                }
                let allowed = Access { read: true, write: !bit(entry, 9) };
                if bit(entry, 10) {
                    // A frame of 1 MiB.
                    let address = entry - entry % (1 << 20);
                    return if self.page_1m && !beyond(address, self.output_bits) { Entry::leaf(address, allowed) } else { Entry::Fault };
                }
                let address = entry - entry % 2048;
                if beyond(address, self.output_bits) { Entry::Fault } else { Entry::table(address, allowed, 0) }
            }
            // Regions: I 0x20, TT 0xc is 1, 2, 3 for third, second, first; TF 0xc0, TL 3, in quarters of a table; P 0x200; FC 0x400 of a third is a 2 GiB frame.
            level => {
                if bit(entry, 5) || bits(entry, 3, 2) != (level - 1) as u64 || (level == 2 && bit(entry, 10)) {
                    return Entry::Fault;
                }
                let (offset, length) = (bits(entry, 7, 6), bits(entry, 1, 0));
                if !self.partial_tables && (offset, length) != (0, 3) {
                    return Entry::Fault;
                }
                // Origins are bits 63:12. zPCI as drivers and models know it has whole tables of 16 KiB, aligned to them, and ignores bits 13:12.
                let address = entry - entry % if self.partial_tables { 4096 } else { 16384 };
                if offset > length || beyond(address, self.output_bits) {
                    return Entry::Fault;
                }
                let exists = Some((offset * 512, length * 512 + 511));
                Entry::Table { address, limit: Access { read: true, write: !bit(entry, 9) }, skip: 0, exists, half: 0 }
            }
        }
    }
}
