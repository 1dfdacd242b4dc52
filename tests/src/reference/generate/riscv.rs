//! RISC-V tables of both stages.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::riscv::Entries;
use crate::reference::tables::{RiscvFirst, RiscvSecond};
use crate::reference::{Access, Run, bits};

const V: u64 = 1;
const R: u64 = 1 << 1;
const W: u64 = 1 << 2;
const X: u64 = 1 << 3;
const U: u64 = 1 << 4;
const A: u64 = 1 << 6;
const D: u64 = 1 << 7;
const N: u64 = 1 << 63;

fn random_entries(levels: u32, rng: &mut Rng) -> Entries {
    Entries {
        output_bits: if levels == 2 { 34 } else { rng.pick(&[56, 56, 48, 40, 34]) },
        svnapot: levels > 2 && rng.percent(70),
        svpbmt: levels > 2 && rng.percent(50),
        svrsw60t59b: levels > 2 && rng.percent(30),
        hardware_update: rng.percent(30),
        big_endian: rng.percent(15),
    }
}

pub(super) fn random_first(rng: &mut Rng) -> RiscvFirst {
    let levels = rng.pick(&[2, 3, 3, 4, 5]);
    RiscvFirst { root: 0, levels, entries: random_entries(levels, rng) }
}

pub(super) fn random_second(rng: &mut Rng) -> RiscvSecond {
    let levels = rng.pick(&[2, 3, 3, 4, 5]);
    let input_bits = if rng.percent(20) { 34 } else { 59 };
    RiscvSecond { root: 0, levels, input_bits, entries: random_entries(levels, rng) }
}

/// What both stages share.
#[derive(Clone, Copy)]
struct Sv {
    levels: u32,
    entries: Entries,
}

impl Sv {
    fn wide(self) -> bool {
        self.levels > 2
    }

    fn stride(self) -> u32 {
        if self.wide() { 9 } else { 10 }
    }

    fn shift(self, height: u32) -> u32 {
        12 + self.stride() * height
    }

    fn leaf_sizes(self) -> Vec<u32> {
        let mut sizes: Vec<u32> = (0..self.levels).map(|height| self.shift(height)).filter(|size| *size < self.entries.output_bits).collect();
        if self.entries.svnapot {
            sizes.insert(1, 16);
        }
        sizes
    }

    fn leaf_height(self, size: u32) -> u32 {
        (0..self.levels).rev().find(|height| self.shift(*height) <= size).unwrap()
    }

    fn page_number(self, address: u64) -> u64 {
        address >> 12 << 10
    }

    /// RSW, and what the extensions leave to software.
    fn software(self, ink: &mut Ink<'_>) -> u64 {
        ink.noise(9, 8) + if self.entries.svrsw60t59b { ink.noise(60, 59) } else { 0 }
    }

    fn pointer(self, pointer: Pointer, ink: &mut Ink<'_>) -> u64 {
        // G may be set in a pointer.
        self.page_number(pointer.address) + V + ink.noise(5, 5) + self.software(ink)
    }

    fn leaf(self, height: u32, leaf: &Run, ink: &mut Ink<'_>) -> (u64, Access) {
        let mut entry = self.page_number(leaf.address) + V + R + U + self.software(ink) + ink.noise(5, 5);
        if ink.rng.percent(30) {
            entry += X;
        }
        if leaf.access.write {
            entry += W;
        }
        if self.entries.svpbmt {
            entry += ink.rng.below(3) << 61;
        }
        if leaf.size > 1 << self.shift(height) {
            entry += N + (8 << 10);
        }
        let mut access = Access { read: true, write: leaf.access.write };
        // Without hardware that sets them, A and D are permissions.
        match ink.rng.below(if ink.options.restrictions { 12 } else { 1 }) {
            1 => {
                entry += ink.noise(7, 7);
                if !self.entries.hardware_update {
                    access = Access::NONE;
                }
            }
            2 => {
                entry += A;
                access.write &= self.entries.hardware_update;
            }
            _ => entry += A + D,
        }
        (entry, access)
    }

    fn decoy(self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let address_bits = self.entries.output_bits;
        let address = ink.address(address_bits, self.shift(height).min(address_bits));
        let place = self.page_number(address) + V + A + D;
        let good = place + R + W + U;
        let last = height == 0;
        match ink.rng.below(12) {
            // Reserved: writable without readable. Executable only.
            0 => place + W + U,
            1 => place + W + X + U,
            2 => place + X + U,
            // Privileged.
            3 => place + R + W,
            4 if !last => good + self.page_number(1 << (self.shift(height) - 1)),
            // A pointer at the last level, and pointers with what leaves have.
            5 if last => self.page_number(address) + V,
            5 => self.page_number(address) + V + ink.rng.pick(&[A, D, U]),
            6 if self.wide() => good + (1 << (54 + ink.rng.below(5))),
            7 if self.wide() && !self.entries.svrsw60t59b => good + (1 << (59 + ink.rng.below(2))),
            8 if self.wide() => good + (3 << 61),
            // N where it does not belong, or with another size.
            9 if self.wide() && !last => good + N,
            9 if self.wide() => (good & !(0xf << 10)) + N + (ink.rng.pick(&[0, 1, 4, 9, 12, 15]) << 10),
            10 if self.wide() && address_bits < 56 => good + self.page_number(1 << address_bits),
            _ => bits(ink.rng.number(), if self.wide() { 63 } else { 31 }, 0) & !V,
        }
    }
}

impl RiscvFirst {
    fn sv(&self) -> Sv {
        Sv { levels: self.levels, entries: self.entries }
    }
}

impl RiscvSecond {
    fn sv(&self) -> Sv {
        Sv { levels: self.levels, entries: self.entries }
    }
}

/// The functions that both stages have from [`Sv`].
macro_rules! shared {
    () => {
        fn top(&self) -> u32 {
            self.levels - 1
        }

        fn shift(&self, height: u32) -> u32 {
            self.sv().shift(height)
        }

        fn leaf_sizes(&self) -> Vec<u32> {
            self.sv().leaf_sizes()
        }

        fn leaf_height(&self, size: u32) -> u32 {
            self.sv().leaf_height(size)
        }

        fn address_bits(&self) -> u32 {
            self.entries.output_bits
        }

        fn accesses(&self) -> Vec<Access> {
            vec![Access::R, Access::RW, Access::RW]
        }

        fn entry_bytes(&self) -> u64 {
            if self.levels == 2 { 4 } else { 8 }
        }

        fn big_endian(&self) -> bool {
            self.entries.big_endian
        }

        fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
            (self.sv().pointer(pointer, ink), Access::RW, 0)
        }

        fn leaf(&self, height: u32, leaf: &Run, _word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
            self.sv().leaf(height, leaf, ink)
        }

        fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
            self.sv().decoy(height, ink)
        }
    };
}

impl Radix for RiscvFirst {
    fn windows(&self) -> Vec<Window> {
        if self.levels == 2 {
            return vec![Window { first: 0, last: (1 << 32) - 1, tree: 0, position: 0 }];
        }
        let half = 1u64 << (11 + 9 * self.levels);
        vec![
            Window { first: 0, last: half - 1, tree: 0, position: 0 },
            Window { first: half.wrapping_neg(), last: u64::MAX, tree: 0, position: half },
        ]
    }

    fn entries(&self, _height: u32, _tree: usize) -> u64 {
        1 << self.sv().stride()
    }

    shared!();
}

impl Radix for RiscvSecond {
    fn windows(&self) -> Vec<Window> {
        let bits = (14 + self.sv().stride() * self.levels).min(self.input_bits);
        vec![Window { first: 0, last: (1 << bits) - 1, tree: 0, position: 0 }]
    }

    fn entries(&self, height: u32, _tree: usize) -> u64 {
        1 << (self.sv().stride() + if height == self.top() { 2 } else { 0 })
    }

    shared!();
}
