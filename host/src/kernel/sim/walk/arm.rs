//! VMSAv8-64 stage 1 as an SMMUv3 walks it (DDI 0487 chapter D8; IHI 0070 sections 3.4 and 5.4).
//!
//! A descriptor: valid 0, table or page 1, AttrIndx 4:2, AP\[1\] 6 (unprivileged access), AP\[2\] 7 (read-only), SH 9:8 (or address 51:50 with DS),
//! AF 10, nG 11, address from the granule on (64K: bits 51:48 at 15:12), DBM 51, contiguous 52, XN; of tables APTable 62:61. Requests are
//! unprivileged. The contiguous hint is not used.

use super::{Entry, Leaf, Reason, Table};

const VALID: u64 = 1;
const TABLE: u64 = 1 << 1;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const ACCESS_FLAG: u64 = 1 << 10;
const NOT_GLOBAL: u64 = 1 << 11;
const DIRTY_MODIFIER: u64 = 1 << 51;
const TABLE_UNPRIVILEGED_NONE: u64 = 1 << 61;
const TABLE_READ_ONLY: u64 = 1 << 62;

/// Restrictions, from APTable.
const NO_WRITE: u8 = 1;
const NO_ACCESS: u8 = 2;

/// TTB0 or TTB1 with its controls.
#[derive(Clone, Copy, Debug)]
pub(in super::super) struct Half {
    pub(in super::super) root: u64,
    /// Log2 of the granule: 12, 14 or 16.
    pub(in super::super) page_log2: u8,
    /// 64 - TxSZ.
    pub(in super::super) input_bits: u8,
    pub(in super::super) top_byte_ignored: bool,
    /// HAD: APTable is ignored.
    pub(in super::super) hierarchy_disabled: bool,
}

#[derive(Clone, Debug)]
pub(in super::super) struct Arm {
    /// For IOVAs from zero, and for IOVAs up to the last.
    pub(in super::super) halves: [Option<Half>; 2],
    /// Addresses at or above `2^output_bits` are a fault.
    pub(in super::super) output_bits: u8,
    /// The unit has 52-bit addresses, whatever the size above: blocks of 4T with 64K pages.
    pub(in super::super) lpa: bool,
    /// DS: 52-bit addresses with 4K and 16K granules.
    pub(in super::super) lpa2: bool,
    /// HA and HD.
    pub(in super::super) hardware_access: bool,
    pub(in super::super) hardware_dirty: bool,
    /// AFFD.
    pub(in super::super) access_flag_disabled: bool,
    pub(in super::super) big_endian: bool,
}

impl Arm {
    /// Which half an IOVA belongs to: bit 55 says so if the top byte is ignored there, bit 63 otherwise.
    fn half(&self, iova: u64) -> Result<Half, Reason> {
        let iova = self.normal(iova);
        let high = iova & 1 << 63 != 0;
        let half = self.halves[usize::from(high)].ok_or(Reason::NotPresent)?;
        // Everything from the input size on must be the sign. (A clear or set bit 55 alone falls out of this, too.)
        let above = i64::from_ne_bytes(iova.to_ne_bytes()) >> half.input_bits;
        if above == if high { -1 } else { 0 } { Ok(half) } else { Err(Reason::InputRange) }
    }

    /// An ignored top byte repeats bit 55.
    pub(super) fn normal(&self, iova: u64) -> u64 {
        let high = iova & 1 << 55 != 0;
        let ignored = self.halves[usize::from(high)].is_some_and(|half| half.top_byte_ignored);
        if !ignored {
            return iova;
        }
        if high { iova | 0xff << 56 } else { iova & !(0xff << 56) }
    }

    pub(super) fn root(&self, iova: u64) -> Result<Table, Reason> {
        let half = self.half(iova)?;
        let stride = half.page_log2 - 3;
        let levels = (half.input_bits - half.page_log2).div_ceil(stride);
        let shift = half.page_log2 + stride * (levels - 1);
        let index_bits = half.input_bits - shift;
        // A first table is aligned to its size, and to 64 bytes at least.
        let address = half.root & !((8u64 << index_bits).max(64) - 1);
        if address >> self.output_bits != 0 {
            return Err(Reason::AddressSize);
        }
        let level = 4 - i8::try_from(levels).unwrap_or(0);
        Ok(Table { address, shift, index_bits, level, restrictions: 0 })
    }

    pub(super) fn judge(&self, table: &Table, entry: u64, iova: u64, writes: bool) -> Entry {
        let Ok(half) = self.half(iova) else { return Entry::Fault(Reason::InputRange) };
        if entry & VALID == 0 || table.level == 3 && entry & TABLE == 0 {
            return Entry::Fault(Reason::NotPresent);
        }
        let leaf = table.level == 3 || entry & TABLE == 0;
        if leaf && table.level < 3 && !self.block_allowed(half, table.level) {
            return Entry::Fault(Reason::NotPresent); // reserved encodings are translation faults
        }
        let low_bit = if leaf { table.shift } else { half.page_log2 };
        let address = self.address(half, entry, low_bit);
        if address >> self.output_bits != 0 {
            return Entry::Fault(Reason::AddressSize);
        }
        if !leaf {
            let mut restrictions = table.restrictions;
            if !half.hierarchy_disabled {
                restrictions |= if entry & TABLE_READ_ONLY != 0 { NO_WRITE } else { 0 };
                restrictions |= if entry & TABLE_UNPRIVILEGED_NONE != 0 { NO_ACCESS } else { 0 };
            }
            let stride = half.page_log2 - 3;
            let next = Table { address, shift: table.shift - stride, index_bits: stride, level: table.level + 1, restrictions };
            return Entry::Table { next, update: entry };
        }
        self.leaf(table, entry, address, writes)
    }

    fn leaf(&self, table: &Table, entry: u64, output: u64, writes: bool) -> Entry {
        let mut update = entry;
        if entry & ACCESS_FLAG == 0 && !self.access_flag_disabled {
            if !self.hardware_access {
                return Entry::Fault(Reason::AccessFlag);
            }
            update |= ACCESS_FLAG;
        }
        let when_dirty = self.hardware_dirty && entry & DIRTY_MODIFIER != 0;
        let clean = when_dirty && entry & READ_ONLY != 0;
        let write = (entry & READ_ONLY == 0 || when_dirty) && table.restrictions & NO_WRITE == 0;
        if entry & UNPRIVILEGED == 0 || table.restrictions & NO_ACCESS != 0 || writes && !write {
            return Entry::Fault(Reason::Permission);
        }
        if writes && clean {
            update &= !READ_ONLY;
        }
        let dirty = writes || !clean;
        Entry::Leaf {
            leaf: Leaf { output, size_log2: table.shift, read: true, write, dirty, global: entry & NOT_GLOBAL == 0, level: table.level },
            update,
        }
    }

    fn block_allowed(&self, half: Half, level: i8) -> bool {
        let lowest = match half.page_log2 {
            12 => 1 - i8::from(self.lpa2),
            14 => 2 - i8::from(self.lpa2),
            _ => 2 - i8::from(self.lpa),
        };
        level >= lowest
    }

    fn address(&self, half: Half, entry: u64, low_bit: u8) -> u64 {
        let field = |high: u32| entry & ((1 << (high + 1)) - 1) & !((1 << low_bit) - 1);
        match half.page_log2 {
            16 => field(47) | ((entry >> 12) & 0xf) << 48,
            _ if self.lpa2 => field(49) | ((entry >> 8) & 3) << 50,
            _ => field(47),
        }
    }
}
