//! x86-64 tables as IOMMUs walk them: VT-d first stage (VT-d specification sections 3.6 and 9.7) and AMD v2 (AMD64 volume 2 section 5.3; AMD IOMMU
//! section 2.2.6).
//!
//! An entry: P 0, R/W 1, U/S 2, PWT 3, PCD 4, A 5, D 6 (leaf), PS 7 (above the last level), G 8, EA 10 (VT-d, extended accessed), address 51:12, XD
//! 63. R/W and U/S are ANDed down the path. Requests here are unprivileged: without U/S they are refused. Hardware always sets A, and D of what is
//! written.

use super::{Entry, Leaf, Reason, Table};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const EXTENDED_ACCESSED: u64 = 1 << 10;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Restrictions: some entry on the path was read-only; some was supervisor's.
const READ_ONLY: u8 = 1;
const SUPERVISOR: u8 = 2;

#[derive(Clone, Debug)]
pub(in super::super) struct X86 {
    pub(in super::super) root: u64,
    /// 4 or 5.
    pub(in super::super) levels: u8,
    /// Address bits at or above this are reserved.
    pub(in super::super) address_bits: u8,
    /// 1G leaves exist.
    pub(in super::super) large_1g: bool,
    /// Set EA too (VT-d EAFE).
    pub(in super::super) extended_accessed: bool,
    /// An output in 0xfeex_xxxx is a fault: VT-d's interrupt range.
    pub(in super::super) interrupts_refused: bool,
    /// All bits select entries, and nothing is sign-extended: AMD without PASID, as Linux reports it of real units.
    pub(in super::super) without_upper_half: bool,
}

impl X86 {
    pub(super) fn root(&self, iova: u64) -> Result<Table, Reason> {
        // Canonical: all bits from the highest that is translated on are equal.
        let highest = 11 + 9 * u32::from(self.levels);
        let sign = i64::from_ne_bytes(iova.to_ne_bytes()) >> highest;
        let exists = if self.without_upper_half { iova >> (highest + 1) == 0 } else { sign == 0 || sign == -1 };
        if !exists {
            return Err(Reason::InputRange);
        }
        Ok(self.table(self.root & ADDRESS, self.levels, 0))
    }

    fn table(&self, address: u64, level: u8, restrictions: u8) -> Table {
        Table { address, shift: 3 + 9 * level, index_bits: 9, level: i8::try_from(level).unwrap_or(i8::MAX), restrictions }
    }

    pub(super) fn judge(&self, table: &Table, entry: u64, writes: bool) -> Entry {
        if entry & PRESENT == 0 {
            return Entry::Fault(Reason::NotPresent);
        }
        let large = entry & LARGE != 0 && table.level > 1;
        let leaf = table.level == 1 || large;
        if large && !(table.level == 2 || table.level == 3 && self.large_1g) {
            return Entry::Fault(Reason::Reserved);
        }
        // Between PAT (12) and the address of a large page nothing may be set.
        let low = if large { ((1u64 << table.shift) - 1) & ADDRESS & !(1 << 12) } else { 0 };
        if entry & ADDRESS & (low | u64::MAX.checked_shl(self.address_bits.into()).unwrap_or(0)) != 0 {
            return Entry::Fault(Reason::Reserved);
        }
        let mut restrictions = table.restrictions;
        if entry & WRITE == 0 {
            restrictions |= READ_ONLY;
        }
        if entry & USER == 0 {
            restrictions |= SUPERVISOR;
        }
        let accessed = ACCESSED | if self.extended_accessed { EXTENDED_ACCESSED } else { 0 };
        if !leaf {
            let level = u8::try_from(table.level - 1).unwrap_or(1);
            return Entry::Table { next: self.table(entry & ADDRESS, level, restrictions), update: entry | accessed };
        }
        let write = restrictions & READ_ONLY == 0;
        if restrictions & SUPERVISOR != 0 || writes && !write {
            return Entry::Fault(Reason::Permission);
        }
        let output = entry & ADDRESS & !((1 << table.shift) - 1);
        if self.interrupts_refused && output >> 20 == 0xfee {
            return Entry::Fault(Reason::InterruptRange);
        }
        let update = entry | accessed | if writes { DIRTY } else { 0 };
        let dirty = update & DIRTY != 0;
        Entry::Leaf { leaf: Leaf { output, size_log2: table.shift, read: true, write, dirty, global: false, level: table.level }, update }
    }
}
