//! LoongArch tables: two roots, huge pages in directories.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::LoongArch;
use crate::reference::{Access, Run};

pub(super) fn random(rng: &mut Rng) -> LoongArch {
    let granule: u64 = rng.pick(&[4096, 16384, 16384, 65536]);
    let levels = rng.pick(&[2, 3, 3, 4]);
    let page_bits = granule.trailing_zeros();
    let held = (page_bits + (page_bits - 3) * levels).min(63);
    let root = Some(0);
    LoongArch {
        granule,
        levels,
        input_bits: rng.pick(&[held, held.min(47), held.min(39)]),
        output_bits: rng.pick(&[48, 48, 40, 36]),
        root,
        root_high: rng.percent(50).then_some(0),
        hardware_update: rng.percent(40),
    }
}

impl LoongArch {
    fn page_bits(&self) -> u32 {
        self.granule.trailing_zeros()
    }

    /// V, D, PLV 3:2, MAT 5:4, P 7, W 8, NR 61, NX 62, RPLV 63.
    fn permissions(&self, access: Access, ink: &mut Ink<'_>) -> u64 {
        let mut entry = (3 << 2) + (1 << 4) + ink.noise(11, 9) + ink.noise(62, 62);
        // Processors without hardware walks look at V and D; with them P and W are enough.
        if self.hardware_update && ink.rng.percent(50) {
            entry += (1 << 7) + (u64::from(access.write) << 8);
        } else {
            entry += 1 + (u64::from(access.write) << 1) + (1 << 7) + (u64::from(access.write) << 8);
        }
        entry + (u64::from(!access.read) << 61)
    }
}

impl Radix for LoongArch {
    fn windows(&self) -> Vec<Window> {
        let size = 1u64 << self.input_bits;
        let held = self.page_bits() + (self.page_bits() - 3) * self.levels;
        let mut windows = Vec::new();
        if self.root.is_some() {
            windows.push(Window { first: 0, last: size - 1, tree: 0, position: 0 });
        }
        if self.root_high.is_some() {
            // The indexes are bits of the IOVA, which are ones above the half.
            let end = if held >= 64 { 0 } else { 1u64 << held };
            windows.push(Window { first: size.wrapping_neg(), last: u64::MAX, tree: 1, position: end.wrapping_sub(size) });
        }
        windows
    }

    fn top(&self) -> u32 {
        self.levels - 1
    }

    fn shift(&self, height: u32) -> u32 {
        self.page_bits() + (self.page_bits() - 3) * height
    }

    fn entries(&self, _height: u32, _tree: usize) -> u64 {
        1 << (self.page_bits() - 3)
    }

    fn leaf_sizes(&self) -> Vec<u32> {
        (0..self.levels).map(|height| self.shift(height)).filter(|size| *size < self.output_bits && *size <= self.input_bits).collect()
    }

    fn leaf_height(&self, size: u32) -> u32 {
        (size - self.page_bits()) / (self.page_bits() - 3)
    }

    fn address_bits(&self) -> u32 {
        self.output_bits
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::W, Access::RW, Access::RW]
    }

    fn absent(&self, height: u32) -> u64 {
        // A huge page that is not valid.
        if height == 0 { 0 } else { 1 << 6 }
    }

    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
        // As a kernel's virtual address.
        (pointer.address + ink.noise(63, 48), Access::RW, 0)
    }

    fn leaf(&self, height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        let mut entry = leaf.address + self.permissions(leaf.access, ink);
        // G of a page; H of a huge one, and its G. Address bits below the size are ignored.
        let (flags, low) = if height == 0 { (ink.noise(6, 6), 12) } else { ((1 << 6) + ink.noise(12, 12), 13) };
        entry += flags;
        if self.shift(height) > low {
            entry += ink.noise(self.shift(height) - 1, low);
        }
        (entry, leaf.access)
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let shift = self.shift(height);
        let address = ink.address(self.output_bits, shift.min(self.output_bits));
        let huge = u64::from(height > 0) << 6;
        match ink.rng.below(5) {
            // Not valid.
            0 => (address + huge + self.permissions(Access::RW, ink)) & !0x81,
            // For privileged requests.
            1 => (address + huge + self.permissions(Access::RW, ink)) & !(3 << 2),
            // Leads to a table that is not aligned to its size.
            2 if height > 0 => address + (1 << (self.page_bits() - 1)),
            3 if self.output_bits < 48 && shift <= self.output_bits => (address | 1 << self.output_bits) + huge + self.permissions(Access::RW, ink),
            _ => self.absent(height),
        }
    }
}
