//! ARMv7 short descriptors: large pages and supersections sixteen times, domains, both permission models.

use super::Rng;
use super::radix::{Ink, Pointer, Radix, Window};
use crate::reference::tables::V7s;
use crate::reference::tables::v7s::PRRR;
use crate::reference::{Access, Run, bits};

/// Domains 0, 1: permissions count; 2: they do not; 3: nobody may.
const CLIENTS: [u64; 2] = [0, 1];
const MANAGER: u64 = 2;
const NOBODY: u64 = 3;
const DOMAINS: u32 = 0b00_11_01_01;

pub(super) fn random(rng: &mut Rng) -> V7s {
    let split = if rng.percent(50) { 0 } else { rng.below(8) as u32 };
    V7s {
        split,
        root: Some(0),
        root_high: (split > 0 && rng.percent(70)).then_some(0),
        access_flag: rng.percent(60),
        domains: DOMAINS,
        execute_never_privileged: rng.percent(40),
        supersections: rng.percent(80),
        output_bits: rng.pick(&[32, 32, 36, 40]),
        privileged: false,
        tex_remap: rng.percent(70),
        prrr: PRRR,
    }
}

impl V7s {
    /// AP\[2:0\].
    fn permissions(&self, access: Access, ink: &mut Ink<'_>) -> u64 {
        match (self.access_flag, access.write) {
            (true, true) => 0b011,
            (true, false) => 0b111,
            (false, true) => 0b011,
            (false, false) => ink.rng.pick(&[0b010, 0b110, 0b111]),
        }
    }

    /// A leaf of the right kind with these permissions.
    fn entry(&self, height: u32, address: u64, size: u64, permissions: u64, domain: u64, ink: &mut Ink<'_>) -> u64 {
        let (ap2, ap) = (permissions >> 2, permissions & 3);
        if height == 0 {
            // B, C; S, nG; AP[2] is 9, AP[1:0] 5:4.
            let entry = (ap2 << 9) + (ap << 4) + ink.noise(3, 2) + ink.noise(11, 10);
            return entry + address + if size == 1 << 16 { 1 + ink.noise(15, 15) } else { 2 + ink.noise(0, 0) };
        }
        // AP[2] is 15, AP[1:0] 11:10; XN 4, S, nG 17:16, NS 19.
        // Only a supersection has address bits 35:32, in 23:20, and 39:36, in 8:5.
        let address = bits(address, 31, 0) + (bits(address, 35, 32) << 20) + (bits(address, 39, 36) << 5);
        let entry = address + 2 + (ap2 << 15) + (ap << 10) + ink.noise(4, 2) + ink.noise(17, 16) + ink.noise(19, 19);
        let entry = entry + if self.execute_never_privileged { ink.noise(0, 0) } else { 0 };
        entry + if size == 1 << 24 { 1 << 18 } else { domain << 5 }
    }
}

impl Radix for V7s {
    fn windows(&self) -> Vec<Window> {
        let end = 1u64 << (32 - self.split);
        let low = Window { first: 0, last: end - 1, tree: 0, position: 0 };
        let high = self.root_high.map(|_| Window { first: end, last: (1 << 32) - 1, tree: 1, position: end });
        [Some(low), high].into_iter().flatten().collect()
    }

    fn top(&self) -> u32 {
        1
    }

    fn shift(&self, height: u32) -> u32 {
        12 + 8 * height
    }

    fn entries(&self, height: u32, tree: usize) -> u64 {
        match (height, tree) {
            (0, _) => 256,
            (_, 0) => 4096 >> self.split,
            _ => 4096,
        }
    }

    fn leaf_sizes(&self) -> Vec<u32> {
        if self.supersections { vec![12, 16, 20, 24] } else { vec![12, 16, 20] }
    }

    fn leaf_height(&self, size: u32) -> u32 {
        u32::from(size >= 20)
    }

    fn address_bits(&self) -> u32 {
        32
    }

    fn leaf_address_bits(&self, size: u32) -> u32 {
        if size == 24 { self.output_bits } else { 32 }
    }

    fn entry_bytes(&self) -> u64 {
        4
    }

    fn accesses(&self) -> Vec<Access> {
        vec![Access::R, Access::RW, Access::RW]
    }

    fn pointer(&self, pointer: Pointer, ink: &mut Ink<'_>) -> (u64, Access, u64) {
        let domain = if pointer.restricted { ink.rng.pick(&[MANAGER, NOBODY]) } else { ink.rng.pick(&CLIENTS) };
        let ignored = ink.noise(3, 3) + ink.noise(9, 9) + if self.execute_never_privileged { ink.noise(2, 2) } else { 0 };
        (pointer.address + 1 + (domain << 5) + ignored, Access::RW, domain)
    }

    fn leaf(&self, height: u32, leaf: &Run, word: u64, ink: &mut Ink<'_>) -> (u64, Access) {
        let mut domain = word;
        if height == 1 {
            let any = ink.options.restrictions && ink.rng.percent(10) && leaf.size < 1 << 24;
            domain = if any { ink.rng.pick(&[MANAGER, NOBODY]) } else { 0 };
        }
        let permissions = self.permissions(leaf.access, ink);
        let entry = self.entry(height, leaf.address, leaf.size, permissions, domain, ink);
        let access = match domain {
            MANAGER => Access::RW,
            NOBODY => Access::NONE,
            _ => Access { read: true, write: leaf.access.write },
        };
        (entry, access)
    }

    fn decoy(&self, height: u32, ink: &mut Ink<'_>) -> u64 {
        let address = ink.address(32, 20);
        let size = if height == 0 { 1 << 12 } else { 1 << 20 };
        match ink.rng.below(6) {
            // For privileged requests; without access flag. A manager's page would be open to all, so that these are in the first table.
            0 if height == 1 => self.entry(height, address, size, 0b001, 0, ink),
            1 if height == 1 && self.access_flag => self.entry(height, address, size, 0b010, 0, ink),
            // Reserved.
            2 if height == 1 && !self.access_flag => self.entry(height, address, size, 0b100, 0, ink),
            3 if height == 1 && !self.execute_never_privileged => self.entry(height, address, size, 0b011, 0, ink) | 1,
            4 if height == 1 && !self.supersections => self.entry(height, address, 1 << 24, 0b011, 0, ink),
            // Beyond what the unit can put out.
            5 if height == 1 && self.supersections && self.output_bits < 40 => {
                let address = (bits(address, 31, 24) << 24) + (1 << ink.rng.pick(&[self.output_bits, 39]));
                self.entry(height, address, 1 << 24, 0b011, 0, ink)
            }
            _ => bits(ink.rng.number(), 31, 2) << 2,
        }
    }
}
