//! DART tables: several roots, inverted permissions, sub-page ranges.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::{Dart, Packing};
use crate::reference::{Access, Run, bits};

pub(super) fn random(packing: Packing, rng: &mut Rng) -> Dart {
    let granule: u64 = if packing == Packing::Dart1 { rng.pick(&[4096, 16384]) } else { 16384 };
    let levels = rng.pick(&[2, 2, 3]);
    let page_bits = granule.trailing_zeros();
    let bits = page_bits + (page_bits - 3) * levels;
    let input_bits = rng.pick(&[bits, bits + 1, bits + 2, 32.min(bits)]);
    let widest = if packing == Packing::Dart1 { 36 } else { 42 };
    let mut roots = [None; 4];
    for (index, root) in roots.iter_mut().enumerate() {
        if (index as u64) << bits >> input_bits == 0 && (index == 0 || rng.percent(70)) {
            *root = Some(0);
        }
    }
    Dart { packing, granule, levels, input_bits, output_bits: rng.pick(&[widest, widest, 34]), roots }
}

impl Dart {
    fn page_bits(&self) -> u32 {
        self.granule.trailing_zeros()
    }

    fn pack(&self, address: u64) -> u64 {
        match self.packing {
            Packing::Dart1 => address,
            Packing::Dart2 => address >> 4,
        }
    }

    /// Read and write are forbidden, not allowed.
    fn forbidden(&self, access: Access) -> u64 {
        let (read, write) = if self.packing == Packing::Dart1 { (8, 7) } else { (3, 2) };
        (u64::from(!access.read) << read) + (u64::from(!access.write) << write)
    }
}

/// The whole page, 63:52 to 51:40.
const WHOLE: u64 = 0xfff << 40;

impl Radix for Dart {
    fn windows(&self) -> Vec<Window> {
        let bits = self.root_bits().min(self.input_bits);
        let roots = self.roots.iter().enumerate().filter(|(_, root)| root.is_some());
        roots
            .map(|(tree, _)| {
                let first = (tree as u64) << self.root_bits();
                Window { first, last: first + ((1 << bits) - 1), tree, position: 0 }
            })
            .collect()
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
        vec![self.page_bits()]
    }

    fn leaf_height(&self, _size: u32) -> u32 {
        0
    }

    fn address_bits(&self) -> u32 {
        self.output_bits
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::W, Access::RW, Access::RW]
    }

    fn pointer(&self, pointer: Pointer, _ink: &mut Ink<'_>) -> (u64, Access, u64) {
        (self.pack(pointer.address) + 1, Access::RW, 0)
    }

    fn leaf(&self, _height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        let entry = self.pack(leaf.address) + 1 + self.forbidden(leaf.access);
        // DART1 can turn the range off: then it may say anything.
        let range = match self.packing {
            Packing::Dart1 if ink.rng.percent(50) => (1 << 1) + (ink.rng.number() >> 40 << 40),
            _ => WHOLE,
        };
        (entry + range, leaf.access)
    }

    fn cut(&self, _leaf: &Run, entry: u64, rng: &mut Rng) -> Option<(u64, (u64, u64))> {
        if !rng.percent(20) {
            return None;
        }
        let (one, other) = (rng.below(4096), rng.below(4096));
        let (first, last) = rng.pick(&[(0, 0), (0, 0xffe), (1, 0xfff), (0xfff, 0xfff), (one.min(other), one.max(other))]);
        // DART1's switch for whole pages is off.
        let kept = bits(entry, 39, 0) & if self.packing == Packing::Dart1 { !2 } else { u64::MAX };
        let unit = self.granule / 4096;
        Some((kept + (first << 52) + (last << 40), (first * unit, last * unit + (unit - 1))))
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let address = ink.address(self.output_bits, self.page_bits());
        match ink.rng.below(4) {
            // A part that ends before it begins.
            0 if height == 0 => self.pack(address) + 1 + (ink.rng.pick(&[0x1000, 0x80_07ff, 0xfff_fffe, 0xfff_f000]) << 40),
            1 if height == 0 => self.pack(address) + 1 + WHOLE + self.forbidden(Access::NONE),
            _ => ink.rng.number() & !1,
        }
    }
}
