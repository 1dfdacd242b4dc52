//! s390 tables: whole ones and partial ones, with a range of their own.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::S390;
use crate::reference::{Access, Run};

pub(super) fn random(rng: &mut Rng) -> S390 {
    let levels = 1 + rng.below(5) as u32;
    let input_bits = if levels == 1 { 20 } else { 9 + 11 * levels };
    let end = if input_bits == 64 { u64::MAX } else { (1 << input_bits) - 1 };
    let first_iova = if rng.percent(40) { rng.below((end >> 13) + 1) << 12 } else { 0 };
    let last_iova = rng.percent(50).then(|| first_iova + ((rng.below((end - first_iova) >> 12) << 12) | 0xfff));
    S390 {
        root: 0,
        levels,
        first_iova,
        last_iova,
        output_bits: rng.pick(&[64, 64, 48, 40]),
        read_only: rng.percent(10),
        page_1m: rng.percent(70),
        partial_tables: rng.percent(50),
    }
}

impl Radix for S390 {
    fn windows(&self) -> Vec<Window> {
        let input_bits = if self.levels == 1 { 20 } else { 9 + 11 * self.levels };
        let end = if input_bits == 64 { u64::MAX } else { (1 << input_bits) - 1 };
        let last = self.last_iova.unwrap_or(end).min(end);
        vec![Window { first: self.first_iova, last, tree: 0, position: self.first_iova }]
    }

    fn top(&self) -> u32 {
        self.levels - 1
    }

    fn shift(&self, height: u32) -> u32 {
        if height == 0 { 12 } else { 9 + 11 * height }
    }

    fn entries(&self, height: u32, _tree: usize) -> u64 {
        if height == 0 { 256 } else { 2048 }
    }

    fn leaf_sizes(&self) -> Vec<u32> {
        if self.page_1m && self.levels > 1 { vec![12, 20] } else { vec![12] }
    }

    fn leaf_height(&self, size: u32) -> u32 {
        u32::from(size == 20)
    }

    fn address_bits(&self) -> u32 {
        self.output_bits
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::RW, Access::RW]
    }

    fn big_endian(&self) -> bool {
        true
    }

    fn absent(&self, height: u32) -> u64 {
        if height == 0 { 0x400 } else { 0x20 }
    }

    fn least_root(&self) -> u64 {
        4096
    }

    fn table_alignment(&self, size: u64) -> u64 {
        if self.partial_tables { size.min(4096) } else { size }
    }

    fn granted(&self) -> Access {
        Access { read: true, write: !self.read_only }
    }

    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
        let mut entry = pointer.address;
        if pointer.height > 1 {
            // The type, and which quarters of the next table there are; a segment table's entry has neither.
            entry += u64::from(pointer.height - 1) << 2;
            let (mut offset, mut length) = (0, 3);
            if self.partial_tables {
                offset = ink.rng.below(pointer.used.0 / 512 + 1);
                length = pointer.used.1 / 512 + ink.rng.below(4 - pointer.used.1 / 512);
            }
            entry += (offset << 6) + length;
        }
        if pointer.restricted {
            return (entry + 0x200, Access::R, 0);
        }
        (entry, Access::RW, 0)
    }

    fn leaf(&self, height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        let protection = if leaf.access.write { 0 } else { 0x200 };
        // What processors use for instructions and what software may use.
        let entry = if height == 0 { leaf.address + ink.noise(7, 0) } else { leaf.address + 0x400 };
        (entry + protection, Access { read: true, write: leaf.access.write })
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let address = ink.address(self.output_bits, 12);
        let kind = u64::from(height.saturating_sub(1)) << 2;
        match (height, ink.rng.below(5)) {
            // Invalid.
            (0, 0 | 1) => address + 0x400,
            (0, 2) => address + 0xc00,
            (0, _) => address + 0x600,
            (1, 0) => address + 0x20,
            // The type of another table.
            (1, 1) => address + 0x4 * (1 + ink.rng.below(3)),
            (1, 2) if !self.page_1m => address + 0x400,
            (1, _) => address + 0x420,
            (_, 0) => address + kind + 0x23,
            (_, 1) => address + (kind ^ 4) + 3,
            // A frame of 2 GiB, which is for processors.
            (2, 2) => (address >> 31 << 31) + kind + 0x403,
            // Parts of tables where tables are whole.
            (_, 3) if !self.partial_tables => address + kind + ink.rng.pick(&[0, 1, 2, 0x43, 0xc3]),
            // Nothing: it begins behind its end.
            (_, 3) => address + kind + ink.rng.pick(&[0x40, 0x81, 0xc2]),
            _ => address + kind + 0x20,
        }
    }
}
