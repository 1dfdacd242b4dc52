//! Tables in which a walk found nothing: no leaf, no fault, and nothing below.
//!
//! Where a table entry has no valid bit, drivers fill the slots that they do not use with pointers to one empty table, which all of them share; at each level it
//! is another one, so that a walk that goes to each of them reads as many as the product of the slots. Such a table is read, and charged, once: whatever points to
//! it afterwards is as good as absent. Any format may have them.

use std::collections::HashSet;

/// All that decides what is found in a table, and below it. Where it stands in the address space does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct TableKey {
    pub(super) level: u8,
    pub(super) table: u64,
    pub(super) inherited: u64,
    /// First and last entry that exist.
    pub(super) exists: (u64, u64),
}

/// Tables that are remembered at a time: a bound on what a guest can make the host keep.
const MOST: usize = 4096;

/// The empty tables that one walk met.
#[derive(Debug, Default)]
pub(super) struct Empties {
    tables: HashSet<TableKey>,
    /// A bit for the address of each: most tables are none of these, and are not looked for.
    bits: u64,
}

impl Empties {
    const fn bit(table: u64) -> u64 {
        1 << (table.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
    }

    #[inline]
    pub(super) fn has(&self, key: &TableKey) -> bool {
        self.bits & Self::bit(key.table) != 0 && self.tables.contains(key)
    }

    pub(super) fn add(&mut self, key: TableKey) {
        // Those that are shared are soon met again.
        if self.tables.len() >= MOST {
            self.clear();
        }
        self.bits |= Self::bit(key.table);
        self.tables.insert(key);
    }

    /// Another walk begins: the guest may have written into them.
    pub(super) fn clear(&mut self) {
        if self.bits != 0 {
            self.tables.clear();
            self.bits = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_in_anything_is_another_table_and_few_are_kept() {
        let key = TableKey { level: 1, table: 0x5000, inherited: 7, exists: (0, u64::MAX) };
        let mut empties = Empties::default();
        empties.add(key);
        let others = [
            TableKey { level: 0, ..key },
            TableKey { table: 0x6000, ..key },
            TableKey { inherited: 6, ..key },
            TableKey { exists: (0, 511), ..key },
            TableKey { exists: (1, u64::MAX), ..key },
        ];
        assert!(empties.has(&key) && !others.iter().any(|other| empties.has(other)));
        for table in 0..3 * MOST as u64 {
            empties.add(TableKey { table: table << 12, ..key });
            assert!(empties.tables.len() <= MOST && empties.has(&TableKey { table: table << 12, ..key }));
        }
        empties.clear();
        assert!(!empties.has(&key) && empties.bits == 0);
    }
}
