//! AMD-Vi tables: v1 with pages of every power of two and with levels left out, v2.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::{AmdV1, AmdV2};
use crate::reference::{Access, Run};

/// NextLevel, 11:9.
const SIZED: u64 = 7 << 9;

pub(super) fn random_v1(rng: &mut Rng) -> AmdV1 {
    let granted = rng.pick(&[Access::RW, Access::RW, Access::RW, Access::RW, Access::R, Access::W]);
    let (levels, output_bits) = (1 + rng.below(6) as u32, rng.pick(&[52, 52, 48, 40]));
    let update_accessed = rng.percent(40);
    AmdV1 { root: 0, levels, output_bits, granted, update_accessed, update_dirty: update_accessed && rng.percent(60) }
}

pub(super) fn random_v2(rng: &mut Rng) -> AmdV2 {
    AmdV2 {
        root: 0,
        levels: rng.pick(&[4, 4, 5]),
        output_bits: rng.pick(&[52, 52, 48, 40]),
        sign_extended: rng.percent(70),
        page_1g: rng.percent(80),
        privileged: false,
        granted: rng.pick(&[Access::RW, Access::RW, Access::RW, Access::R, Access::W]),
        update_accessed: true,
        update_dirty: true,
    }
}

/// IR 61 and IW 62.
fn permissions(access: Access) -> u64 {
    (u64::from(access.read) << 61) + (u64::from(access.write) << 62)
}

impl Radix for AmdV1 {
    fn windows(&self) -> Vec<Window> {
        let last = if self.levels == 6 { u64::MAX } else { (1 << (12 + 9 * self.levels)) - 1 };
        vec![Window { first: 0, last, tree: 0, position: 0 }]
    }

    fn top(&self) -> u32 {
        self.levels - 1
    }

    fn shift(&self, height: u32) -> u32 {
        12 + 9 * height
    }

    fn entries(&self, height: u32, _tree: usize) -> u64 {
        // Level 6 resolves bits 63 to 57.
        if height == 5 { 128 } else { 512 }
    }

    fn leaf_sizes(&self) -> Vec<u32> {
        // Every power of two below what the root's last entry but one covers.
        (12..(12 + 9 * self.levels).min(self.output_bits).min(50)).collect()
    }

    fn leaf_height(&self, size: u32) -> u32 {
        (size - 12) / 9
    }

    fn address_bits(&self) -> u32 {
        self.output_bits
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::W, Access::RW, Access::RW]
    }

    fn granted(&self) -> Access {
        self.granted
    }

    fn least_root(&self) -> u64 {
        4096
    }

    fn may_skip(&self) -> bool {
        true
    }

    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
        let limit = if pointer.restricted { ink.rng.pick(&[Access::R, Access::W, Access::NONE]) } else { Access::RW };
        let ignored = ink.noise(4, 1) + ink.noise(8, 5) + ink.noise(63, 63);
        (pointer.address + 1 + (u64::from(pointer.next + 1) << 9) + permissions(limit) + ignored, limit, 0)
    }

    fn leaf(&self, height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        // A, D, U, FC, and what is ignored.
        let mut entry = leaf.address + 1 + permissions(leaf.access) + ink.noise(4, 1) + ink.noise(8, 5) + ink.noise(60, 59) + ink.noise(63, 63);
        if leaf.size > 1 << self.shift(height) {
            // Ones from bit 12 on, up to the bit below half the size.
            entry += SIZED + (leaf.size / 2 - 4096);
        } else if height > 0 {
            // Nobody looks at the address bits below the level's own size.
            entry += ink.noise(self.shift(height) - 1, 12);
        }
        (entry, leaf.access)
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let level = u64::from(height) + 1;
        let address = ink.address(self.output_bits, 12);
        let good = 1 + permissions(Access::RW);
        match ink.rng.below(9) {
            // Nobody may.
            0 => address + 1,
            // Not present.
            1 => (address + good) & !1,
            // Reserved bits.
            2 => address + good + (1 << (52 + ink.rng.below(7))),
            // A table of this level or a higher one.
            3 => (address & !0xfff) + good + (ink.rng.pick(&[level.min(6), 6]) << 9),
            // A page that is too large for this level, or too small.
            4 if height < 4 => (1u64 << (12 + 9 * (height + 1))) - 4096 + SIZED + good,
            5 if height > 0 => SIZED + good + (1 << 40),
            // Of a size that does not exist.
            6 if height == 5 => good,
            7 if self.output_bits < 52 && self.shift(height) <= self.output_bits => (1 << self.output_bits) + good,
            // A table that holds nothing may be anywhere.
            _ => ink.rng.number() & !1,
        }
    }
}

impl Radix for AmdV2 {
    fn windows(&self) -> Vec<Window> {
        let bits = 12 + 9 * self.levels;
        if !self.sign_extended {
            return vec![Window { first: 0, last: (1 << bits) - 1, tree: 0, position: 0 }];
        }
        let half = 1u64 << (bits - 1);
        vec![
            Window { first: 0, last: half - 1, tree: 0, position: 0 },
            Window { first: half.wrapping_neg(), last: u64::MAX, tree: 0, position: half },
        ]
    }

    fn top(&self) -> u32 {
        self.levels - 1
    }

    fn shift(&self, height: u32) -> u32 {
        12 + 9 * height
    }

    fn entries(&self, _height: u32, _tree: usize) -> u64 {
        512
    }

    fn leaf_sizes(&self) -> Vec<u32> {
        if self.page_1g { vec![12, 21, 30] } else { vec![12, 21] }
    }

    fn leaf_height(&self, size: u32) -> u32 {
        (size - 12) / 9
    }

    fn address_bits(&self) -> u32 {
        self.output_bits
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::RW, Access::RW]
    }

    fn granted(&self) -> Access {
        self.granted
    }

    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
        let (limit, permissions) = match (pointer.restricted, ink.rng.below(3)) {
            (true, 0) => (Access::NONE, 0b011),
            (true, 1) => (Access::NONE, 0b001),
            (true, _) => (Access::R, 0b101),
            (false, _) => (Access::RW, 0b111),
        };
        (pointer.address + permissions + ink.noise(5, 3) + ink.noise(11, 9) + ink.noise(62, 52), limit, 0)
    }

    fn leaf(&self, height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        // PWT, PCD, A, D; G and software's; PAT is 7 of a page and 12 of a larger one.
        let mut entry = leaf.address + 0b101 + 2 * u64::from(leaf.access.write) + ink.noise(6, 3) + ink.noise(11, 8) + ink.noise(62, 52);
        entry += if height == 0 { ink.noise(7, 7) } else { (1 << 7) + ink.noise(12, 12) };
        (entry, Access { read: true, write: leaf.access.write })
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let largest = if self.page_1g { 2 } else { 1 };
        let address = ink.address(self.output_bits, 12 + 9 * height.min(2));
        let large = u64::from(height > 0) << 7;
        match ink.rng.below(7) {
            // Reserved bits of the two highest levels.
            6 if height > 2 => address + 0b111 + (ink.rng.pick(&[1, 2, 3]) << 7),
            // For privileged requests.
            0 if height <= largest => address + 0b011 + large,
            // Misaligned.
            1 | 2 if height > 0 && height <= largest => address + 0b111 + large + (1 << (11 + 9 * height)),
            // Too large.
            3 if height > largest => address + 0b1000_0111,
            4 if self.output_bits < 52 && height <= largest => (1 << self.output_bits) + 0b111 + large,
            _ => ink.rng.number() & !1,
        }
    }
}
