//! The rival by hand: SMMUv3 stage 1, 4K granule, 48 bits, straight to VT-d first stage. It knows both formats and nothing else, as the code in a VMM would.
//!
//! It does what a careful engineer would do and no more: one recursive walk, each entry read once, its meaning from its bits, its address checked against
//! the memory map, the new entry written at once. It does not make large pages out of small ones and counts nothing.

use stagecraft::memory::MemoryMap;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, VolatileMemory as _};

use crate::pool::Pool;

const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// DDI 0487 section D8.3.
mod arm {
    pub const VALID: u64 = 1;
    pub const TABLE_OR_PAGE: u64 = 1 << 1;
    pub const UNPRIVILEGED: u64 = 1 << 6;
    pub const READ_ONLY: u64 = 1 << 7;
    pub const ACCESSED: u64 = 1 << 10;
    pub const TABLE_UNPRIVILEGED_DENIED: u64 = 1 << 61;
    pub const TABLE_READ_ONLY: u64 = 1 << 62;
}

/// VT-d specification section 9.7.
mod vtd {
    pub const PRESENT: u64 = 1;
    pub const WRITE: u64 = 1 << 1;
    pub const USER: u64 = 1 << 2;
    pub const ACCESSED: u64 = 1 << 5;
    pub const DIRTY: u64 = 1 << 6;
    pub const LARGE: u64 = 1 << 7;
    pub const TABLE: u64 = PRESENT | WRITE | USER | ACCESSED;
}

/// Why the guest's table was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// An address that is not in guest memory.
    OutsideMemory(u64),
}

/// The converter.
#[derive(Debug)]
pub struct Fused {
    /// Guest memory that leaves may point to.
    regions: Vec<(u64, u64)>,
}

/// One conversion.
struct Run<'a> {
    memory: &'a GuestMemoryMmap,
    regions: &'a [(u64, u64)],
    pool: &'a mut Pool,
}

/// What the tables above an entry forbid.
#[derive(Clone, Copy)]
struct Above {
    read_only: bool,
    denied: bool,
}

impl Fused {
    /// A converter for a guest with this memory map.
    #[must_use]
    pub fn new(map: &MemoryMap) -> Self {
        Self { regions: map.regions().iter().map(|region| (region.span.first, region.span.last)).collect() }
    }

    /// Converts the table at `root` into `pool`, whose first page becomes the new root. Entries that fault for the guest's unit become absent.
    ///
    /// # Errors
    /// A table outside guest memory.
    pub fn convert(&self, memory: &GuestMemoryMmap, root: u64, five_levels: bool, pool: &mut Pool) -> Result<u64, Refused> {
        pool.reset();
        let mut run = Run { memory, regions: &self.regions, pool };
        let above = Above { read_only: false, denied: false };
        if !five_levels {
            return run.table(root, 39, above);
        }
        let top = run.pool.allocate();
        let below = run.table(root, 39, above)?;
        let words = run.pool.words(top);
        words.fill(0);
        words[0] = below | vtd::TABLE;
        Ok(run.pool.address(top))
    }
}

impl Run<'_> {
    /// Converts a table whose entries each serve `2^shift` bytes; the address of the new one.
    fn table(&mut self, source: u64, shift: u32, above: Above) -> Result<u64, Refused> {
        let outside = Refused::OutsideMemory(source);
        let slice = self.memory.get_slice(GuestAddress(source), 4096).map_err(|_| outside)?;
        let entries = slice.get_array_ref::<u64>(0, 512).map_err(|_| outside)?;
        let target = self.pool.allocate();
        if shift == 12 {
            let words = self.pool.words(target);
            for (index, word) in words.iter_mut().enumerate() {
                let entry = u64::from_le(entries.load(index));
                let page = arm::VALID | arm::TABLE_OR_PAGE;
                *word = if entry & page == page { leaf(self.regions, entry, shift, above).to_le() } else { 0 };
            }
            return Ok(self.pool.address(target));
        }
        for index in 0..512 {
            let entry = u64::from_le(entries.load(index));
            let converted = match entry & (arm::VALID | arm::TABLE_OR_PAGE) {
                0b11 => {
                    let above = Above {
                        read_only: above.read_only || entry & arm::TABLE_READ_ONLY != 0,
                        denied: above.denied || entry & arm::TABLE_UNPRIVILEGED_DENIED != 0,
                    };
                    self.table(entry & ADDRESS, shift - 9, above)? | vtd::TABLE
                }
                0b01 if shift < 39 => match leaf(self.regions, entry, shift, above) {
                    0 => 0,
                    converted => converted | vtd::LARGE,
                },
                _ => 0,
            };
            self.pool.words(target)[index] = converted.to_le();
        }
        Ok(self.pool.address(target))
    }
}

/// The new leaf, or zero.
#[inline]
fn leaf(regions: &[(u64, u64)], entry: u64, shift: u32, above: Above) -> u64 {
    let address = entry & ADDRESS;
    let bytes = 1_u64 << shift;
    if entry & arm::ACCESSED == 0 || entry & arm::UNPRIVILEGED == 0 || above.denied || address & (bytes - 1) != 0 {
        return 0;
    }
    if !regions.iter().any(|&(first, last)| first <= address && address + (bytes - 1) <= last) {
        return 0;
    }
    let pattern = vtd::PRESENT | vtd::USER | vtd::ACCESSED;
    let writable = if entry & arm::READ_ONLY == 0 && !above.read_only { vtd::WRITE | vtd::DIRTY } else { 0 };
    address | pattern | writable
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Permissions, Recipe, Tables};
    use crate::production;
    use stagecraft::plugin::{Config, Engine, Plugins};
    use stagecraft::table::Arena;

    #[test]
    fn the_same_table_as_stagecrafts_when_no_page_grows() {
        let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
        for (permissions, hole) in [(Permissions::MostlyUniform, false), (Permissions::Alternating, false), (Permissions::MostlyUniform, true)] {
            let tables = Tables::make(&Recipe { leaves: 5000, granule_log2: 12, permissions, hole });
            let memory = tables.memory();
            let base = 1 << 32;
            let mut arena = Arena::new(base, 1 << 30);
            let format = production::open_format(&plugins, &production::target(false));
            let built = production::convert(&mut production::open(&plugins, &tables.config), &memory, &tables.map, format, &mut arena);
            let mut pool = Pool::new(base, 100);
            let root = Fused::new(&tables.map).convert(&memory, tables.root(), false, &mut pool).unwrap();
            assert_eq!(root, built.roots[0].1.0);
            let (ours, theirs): (Vec<&[u64]>, Vec<&[u64]>) =
                (arena.pages().map(|(_, words)| words).collect(), pool.pages().iter().map(|page| &page.0[..]).collect());
            assert_eq!(ours.len(), 3 + 5000_usize.div_ceil(512));
            assert!(ours == theirs, "{permissions:?}");
        }
    }
}
