//! RISC-V Sv39, Sv48 and Sv57 as an IOMMU's first stage (privileged architecture, sections on Sv39 to Sv57, Svnapot, Svpbmt; RISC-V IOMMU section 3).
//!
//! An entry: V 0, R 1, W 2, X 3, U 4, G 5, A 6, D 7, PPN 53:10, reserved 60:54, PBMT 62:61, N 63. Requests are unprivileged: leaves without U are
//! refused.

use super::{Entry, Leaf, Reason, Table};

const VALID: u64 = 1;
const READ: u64 = 1 << 1;
const WRITE: u64 = 1 << 2;
const EXECUTE: u64 = 1 << 3;
const USER: u64 = 1 << 4;
const GLOBAL: u64 = 1 << 5;
const ACCESSED: u64 = 1 << 6;
const DIRTY: u64 = 1 << 7;
const RESERVED: u64 = 0x7f << 54;
const MEMORY_TYPE: u64 = 3 << 61;
const NAPOT: u64 = 1 << 63;

/// Restriction: a global entry on the path makes everything below it global.
const GLOBAL_PATH: u8 = 1;

#[derive(Clone, Debug)]
pub(in super::super) struct Riscv {
    pub(in super::super) root: u64,
    /// 3, 4 or 5.
    pub(in super::super) levels: u8,
    /// Addresses of so many bits exist (capabilities.PAS).
    pub(in super::super) address_bits: u8,
    /// Hardware sets A and D (tc.SADE); otherwise their absence is a fault.
    pub(in super::super) hardware_updates: bool,
    /// Svpbmt is there.
    pub(in super::super) memory_types: bool,
    /// tc.SBE.
    pub(in super::super) big_endian: bool,
}

impl Riscv {
    pub(super) fn root(&self, iova: u64) -> Result<Table, Reason> {
        let sign = i64::from_ne_bytes(iova.to_ne_bytes()) >> (11 + 9 * u32::from(self.levels));
        if sign != 0 && sign != -1 {
            return Err(Reason::InputRange);
        }
        Ok(table(self.root, self.levels - 1, 0))
    }

    pub(super) fn judge(&self, at: &Table, entry: u64, writes: bool) -> Entry {
        if entry & VALID == 0 {
            return Entry::Fault(Reason::NotPresent);
        }
        let kind = entry & (READ | WRITE | EXECUTE);
        let memory_type = (entry & MEMORY_TYPE) >> 61;
        if entry & RESERVED != 0 || kind & (READ | WRITE) == WRITE || memory_type == 3 || !self.memory_types && memory_type != 0 {
            return Entry::Fault(Reason::Reserved);
        }
        let address = (entry << 2) & 0x00ff_ffff_ffff_f000;
        if address >> self.address_bits != 0 {
            return Entry::Fault(Reason::AddressSize);
        }
        let global = entry & GLOBAL != 0 || at.restrictions & GLOBAL_PATH != 0;
        if kind == 0 {
            if at.level == 0 || entry & (ACCESSED | DIRTY | USER | NAPOT | MEMORY_TYPE) != 0 {
                return Entry::Fault(Reason::Reserved);
            }
            let next = table(address, u8::try_from(at.level - 1).unwrap_or(0), if global { GLOBAL_PATH } else { 0 });
            return Entry::Table { next, update: entry };
        }
        // Svnapot: 64K only, said by the lowest bits of the page number.
        let (size_log2, output) = match (entry & NAPOT != 0, at.level, (address >> 12) & 0xf) {
            (false, ..) => (at.shift, address),
            (true, 0, 8) => (16, address & !0xffff),
            _ => return Entry::Fault(Reason::Reserved),
        };
        if output & ((1 << size_log2) - 1) != 0 {
            return Entry::Fault(Reason::Reserved); // a misaligned superpage
        }
        let (read, write) = (entry & READ != 0, entry & WRITE != 0);
        if entry & USER == 0 || writes && !write || !writes && !read {
            return Entry::Fault(Reason::Permission);
        }
        let update = entry | ACCESSED | if writes { DIRTY } else { 0 };
        if update != entry && !self.hardware_updates {
            return Entry::Fault(Reason::AccessFlag);
        }
        let dirty = update & DIRTY != 0;
        Entry::Leaf { leaf: Leaf { output, size_log2, read, write, dirty, global, level: at.level }, update }
    }
}

fn table(address: u64, level: u8, restrictions: u8) -> Table {
    Table { address, shift: 12 + 9 * level, index_bits: 9, level: i8::try_from(level).unwrap_or(i8::MAX), restrictions }
}
