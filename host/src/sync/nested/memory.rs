//! Memory that host tables live in, and that hardware reads at the same time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::{MmapRegion, VolatileMemory};

use crate::Gpa;
use crate::memory::{EntryLayout, EntryMemory, PAGE, ReadError};

/// Memory for tables that hardware walks.
///
/// Addresses are those that the hardware has: for a nested table, addresses in the parent address space.
pub trait TableMemory: Send {
    /// Memory for a table of `bytes` bytes, a power of two and at least 4096, aligned to its size; none if there is none left.
    fn allocate(&mut self, bytes: u64) -> Option<Gpa>;

    /// Takes back what [`TableMemory::allocate`] gave. Nobody reads it any more.
    fn release(&mut self, table: Gpa, bytes: u64);

    /// What [`TableMemory::allocate`] last had no memory for may be had another time, although nothing is given back meanwhile: it is worth asking again.
    fn may_come(&self) -> bool {
        false
    }

    /// Writes the entries of a table that no entry leads to yet.
    fn fill(&mut self, table: Gpa, layout: EntryLayout, entries: &[u64]);

    /// Writes one entry with one atomic store; whoever sees it sees everything that was written before.
    fn store(&mut self, table: Gpa, layout: EntryLayout, index: u64, entry: u64);

    /// As [`TableMemory::store`] each of some entries, told with their index: all that `entries` has, in its order; how many these were.
    fn store_all(&mut self, table: Gpa, layout: EntryLayout, entries: impl Iterator<Item = (u64, u64)>) -> usize
    where
        Self: Sized,
    {
        entries.map(|(index, entry)| self.store(table, layout, index, entry)).count()
    }

    /// The entry that stands there, loaded once and atomically; zero where there is no memory.
    fn load(&self, table: Gpa, layout: EntryLayout, index: u64) -> u64;

    /// As [`TableMemory::store`], if `old` stands there, which hardware may have marked meanwhile; what stood there.
    fn compare_exchange(&mut self, table: Gpa, layout: EntryLayout, index: u64, old: u64, new: u64) -> u64;
}

/// Tables in a mapped region. Of the region no more than its pages is used by the tables; it is the caller's to map it where hardware finds it.
///
/// Tables that are given back are joined with their neighbours, so that what was taken by small ones is there for large ones again.
#[derive(Debug)]
pub struct RegionTables {
    region: Arc<MmapRegion>,
    base: u64,
    /// Bytes from the beginning that were handed out.
    used: u64,
    /// What is free of them: by bytes, which are a power of two, the addresses, which are multiples of it.
    free: BTreeMap<u64, BTreeSet<u64>>,
}

impl RegionTables {
    /// Tables in `region`, whose first byte hardware knows by the address `base`, a multiple of 4096. Larger tables are aligned by that address.
    #[must_use]
    pub const fn new(region: Arc<MmapRegion>, base: Gpa) -> Self {
        Self { region, base: base.0, used: 0, free: BTreeMap::new() }
    }

    /// The smallest free block that is large enough, cut to size.
    fn take_free(&mut self, bytes: u64) -> Option<u64> {
        let (size, table) = self.free.range(bytes..).find_map(|(size, tables)| Some((*size, *tables.first()?)))?;
        self.take_exactly(table, size);
        let mut rest = size;
        while rest > bytes {
            rest /= 2;
            self.free.entry(rest).or_default().insert(table + rest);
        }
        Some(table)
    }

    fn take_exactly(&mut self, table: u64, bytes: u64) -> bool {
        self.free.get_mut(&bytes).is_some_and(|tables| tables.remove(&table))
    }

    /// Where an entry of a table is.
    fn entry(&self, table: Gpa, layout: EntryLayout, index: u64) -> Option<usize> {
        let bytes = u64::from(layout.bytes);
        self.offset(Gpa(table.0.checked_add(index * bytes)?), bytes)
    }

    fn offset(&self, table: Gpa, bytes: u64) -> Option<usize> {
        let offset = table.0.checked_sub(self.base)?;
        let end = offset.checked_add(bytes)?;
        if end <= self.region.size() as u64 { usize::try_from(offset).ok() } else { None }
    }
}

impl TableMemory for RegionTables {
    fn allocate(&mut self, bytes: u64) -> Option<Gpa> {
        if let Some(table) = self.take_free(bytes) {
            return Some(Gpa(table));
        }
        let from = self.base.checked_add(self.used)?;
        let table = from.checked_next_multiple_of(bytes.max(PAGE))?;
        self.offset(Gpa(table), bytes)?;
        self.used = table - self.base + bytes;
        // What is skipped is there for smaller ones.
        (from..table).step_by(PAGE as usize).for_each(|page| self.release(Gpa(page), PAGE));
        Some(Gpa(table))
    }

    fn release(&mut self, table: Gpa, bytes: u64) {
        let (mut table, mut bytes) = (table.0, bytes);
        while self.take_exactly(table ^ bytes, bytes) {
            (table, bytes) = (table & !bytes, bytes * 2);
        }
        self.free.entry(bytes).or_default().insert(table);
    }

    fn fill(&mut self, table: Gpa, layout: EntryLayout, entries: &[u64]) {
        let bytes = entries.len() * usize::from(layout.bytes);
        let slice = self.offset(table, bytes as u64).and_then(|offset| self.region.get_slice(offset, bytes).ok());
        let Some(slice) = slice else { return };
        match layout.bytes {
            8 => slice.copy_from(&entries.iter().map(|entry| layout.word(*entry)).collect::<Vec<u64>>()),
            _ => slice.copy_from(&entries.iter().map(|entry| layout.word(*entry) as u32).collect::<Vec<u32>>()),
        }
    }

    fn store(&mut self, table: Gpa, layout: EntryLayout, index: u64, entry: u64) {
        let Some(offset) = self.entry(table, layout, index) else { return };
        let word = layout.word(entry);
        if layout.bytes == 8 {
            if let Ok(slot) = self.region.get_atomic_ref::<AtomicU64>(offset) {
                slot.store(word, Ordering::Release);
            }
        } else if let Ok(slot) = self.region.get_atomic_ref::<AtomicU32>(offset) {
            slot.store(word as u32, Ordering::Release);
        }
    }

    #[inline]
    fn store_all(&mut self, table: Gpa, layout: EntryLayout, entries: impl Iterator<Item = (u64, u64)>) -> usize {
        let from = self.offset(table, 0).and_then(|first| self.region.get_slice(first, self.region.size() - first).ok());
        let Some(from) = from.filter(|_| layout.bytes == 8) else {
            return entries.map(|(index, entry)| self.store(table, layout, index, entry)).count();
        };
        let mut count = 0;
        for (index, entry) in entries {
            if let Ok(slot) = from.get_atomic_ref::<AtomicU64>((index as usize).saturating_mul(8)) {
                slot.store(layout.word(entry), Ordering::Release);
            }
            count += 1;
        }
        count
    }

    fn load(&self, table: Gpa, layout: EntryLayout, index: u64) -> u64 {
        let Some(offset) = self.entry(table, layout, index) else { return 0 };
        let word = match layout.bytes {
            8 => self.region.get_atomic_ref::<AtomicU64>(offset).map(|slot| slot.load(Ordering::Acquire)),
            _ => self.region.get_atomic_ref::<AtomicU32>(offset).map(|slot| slot.load(Ordering::Acquire).into()),
        };
        layout.word(word.unwrap_or(0))
    }

    fn compare_exchange(&mut self, table: Gpa, layout: EntryLayout, index: u64, old: u64, new: u64) -> u64 {
        let Some(offset) = self.entry(table, layout, index) else { return 0 };
        let (before, after) = (layout.word(old), layout.word(new));
        let stood = if layout.bytes == 8 {
            let slot = self.region.get_atomic_ref::<AtomicU64>(offset);
            slot.map(|slot| slot.compare_exchange(before, after, Ordering::AcqRel, Ordering::Acquire).unwrap_or_else(|stood| stood))
        } else {
            let slot = self.region.get_atomic_ref::<AtomicU32>(offset);
            let exchange = |slot: &AtomicU32| slot.compare_exchange(before as u32, after as u32, Ordering::AcqRel, Ordering::Acquire);
            slot.map(|slot| exchange(slot).unwrap_or_else(|stood| stood).into())
        };
        layout.word(stood.unwrap_or(0))
    }
}

impl EntryMemory for RegionTables {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let failed = ReadError(address);
        let bytes = usize::from(layout.bytes);
        let first = self.offset(address, (entries.len() * bytes) as u64).ok_or(failed)?;
        for (offset, entry) in (first..).step_by(bytes).zip(entries) {
            let raw = if bytes == 8 {
                self.region.get_atomic_ref::<AtomicU64>(offset).map_err(|_| failed)?.load(Ordering::Acquire)
            } else {
                self.region.get_atomic_ref::<AtomicU32>(offset).map_err(|_| failed)?.load(Ordering::Acquire).into()
            };
            *entry = layout.word(raw);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tables of several sizes come and go: none overlaps, each is aligned, and when all are gone the largest fits where they were.
    #[test]
    fn room_for_small_tables_is_room_for_large_ones() {
        let region = Arc::new(MmapRegion::new(1 << 20).expect("a region"));
        for base in [0x4000_0000_u64, 0x4000_3000] {
            let mut memory = RegionTables::new(Arc::clone(&region), Gpa(base));
            let mut held: Vec<(u64, u64)> = Vec::new();
            let mut number = 1_u64;
            for _ in 0..5000 {
                number = number.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                if number >> 63 == 0 {
                    let bytes = PAGE << (number >> 40 & 3);
                    let Some(Gpa(table)) = memory.allocate(bytes) else { continue };
                    assert!(table.is_multiple_of(bytes) && table >= base && table + bytes <= base + (1 << 20));
                    assert!(held.iter().all(|(other, size)| table + bytes <= *other || other + size <= table), "{table:#x} twice");
                    held.push((table, bytes));
                } else if !held.is_empty() {
                    let (table, bytes) = held.swap_remove((number >> 20) as usize % held.len());
                    memory.release(Gpa(table), bytes);
                }
            }
            held.drain(..).for_each(|(table, bytes)| memory.release(Gpa(table), bytes));
            assert!(memory.allocate(256 << 10).is_some(), "{:?}", memory.free);
        }
    }
}
