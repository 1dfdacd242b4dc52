//! Reading guest memory through `vm-memory`: each entry once, atomically.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryRegion, Permissions, VolatileMemory};

use crate::Gpa;
use crate::memory::MemoryMap;
use crate::memory::atomic::{self, Nearby};
use crate::table::{ByteOrder, Passing};

/// The unit in which tables are read, and the smallest page of any guest: 4 KiB.
pub const PAGE: u64 = 4096;

/// How entries stand in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryLayout {
    /// 4 or 8.
    pub bytes: u8,
    /// Order of the bytes.
    pub order: ByteOrder,
}

impl EntryLayout {
    /// An entry as it stands in memory, or what stands in memory as an entry.
    pub(crate) const fn word(self, entry: u64) -> u64 {
        match (self.bytes, self.order) {
            (8, ByteOrder::Little) => entry.to_le(),
            (8, ByteOrder::Big) => entry.to_be(),
            (_, ByteOrder::Little) => (entry as u32).to_le() as u64,
            (_, ByteOrder::Big) => (entry as u32).to_be() as u64,
        }
    }
}

/// Guest memory at this address could not be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {0} cannot be read")]
pub struct ReadError(pub Gpa);

/// Memory that holds tables.
///
/// The engine calls this once per entry and walk, and uses what it got: an implementation need not be stable between calls, and the guest may write
/// at any moment.
pub trait EntryMemory {
    /// Fills `entries` with consecutive entries from `address`, each loaded once and atomically. `address` is a multiple of the entry size, and the
    /// range does not cross a 4 KiB boundary.
    ///
    /// # Errors
    /// The first address that is not there; `entries` is then unspecified.
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError>;

    /// The same, and where the first of them stands in this process, if that is known: the walk then tells the processor which table it will read next.
    ///
    /// # Errors
    /// As [`EntryMemory::read_entries`].
    fn read_entries_nearby(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<Nearby, ReadError> {
        self.read_entries(address, layout, entries).map(|()| Nearby::UNKNOWN)
    }

    /// The same for entries that are written on if they are as usual, by whoever can do both at once: `passing` knows whether that was done.
    ///
    /// # Errors
    /// As [`EntryMemory::read_entries`].
    fn read_entries_passing(
        &self,
        address: Gpa,
        layout: EntryLayout,
        entries: &mut [u64],
        passing: &mut Passing<'_, '_>,
    ) -> Result<Nearby, ReadError> {
        let _ = passing;
        self.read_entries_nearby(address, layout, entries)
    }

    /// One entry.
    ///
    /// # Errors
    /// It is not there.
    fn read_entry(&self, address: Gpa, layout: EntryLayout) -> Result<u64, ReadError> {
        let mut entry = [0];
        self.read_entries(address, layout, &mut entry).map(|()| entry[0])
    }

    /// The first of some entries, each with its address, that is not what it was known to be: its place among them, and what it is; none of that if it is not
    /// there. None: all are as they were. Each is read at most once, atomically.
    fn first_changed(&self, layout: EntryLayout, entries: &[(Gpa, u64)]) -> Option<(usize, Option<u64>)> {
        entries.iter().enumerate().find_map(|(place, (address, known))| {
            let entry = self.read_entry(*address, layout).ok();
            (entry != Some(*known)).then_some((place, entry))
        })
    }

    /// Whether hardware could set a mark in the entry at `address`: memory that another stage maps may be there to be read alone.
    #[inline]
    fn can_mark(&self, address: Gpa) -> bool {
        let _ = address;
        true
    }

    /// Whether [`EntryMemory::can_mark`] may say no somewhere: then the same entries may mean something else in another page.
    #[inline]
    fn may_refuse_marks(&self) -> bool {
        false
    }

    /// Reads entries of which `known` has as many as were there before, at most a page, and tells in which lines of [`LINE`] entries any is another: bit `n` for
    /// line `n`, counted from the first entry. Of these lines, `fresh` has all entries as they were read; of others it has anything.
    ///
    /// # Errors
    /// As [`EntryMemory::read_entries`].
    fn read_changed(&self, address: Gpa, layout: EntryLayout, known: &[u64], fresh: &mut [u64]) -> Result<u128, ReadError> {
        self.read_entries(address, layout, fresh).map(|()| changed_lines(known, fresh))
    }
}

/// Entries that are compared at once: those of a cache line, if they have eight bytes.
pub const LINE: usize = 8;

/// Memory of which only that can be read which a map has.
#[derive(Debug)]
pub(crate) struct Within<'a, M>(pub M, pub &'a MemoryMap);

impl<M: EntryMemory> EntryMemory for Within<'_, M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        let last = address.0.saturating_add(entries.len() as u64 * u64::from(layout.bytes) - 1);
        if self.1.has_both(address.0, last) { self.0.read_entries(address, layout, entries) } else { Err(ReadError(address)) }
    }
}

/// In which lines any entry is another than was known.
pub(super) fn changed_lines(known: &[u64], fresh: &[u64]) -> u128 {
    let lines = known.chunks(LINE).zip(fresh.chunks(LINE)).enumerate();
    lines.fold(0, |changed, (line, (known, fresh))| changed | u128::from(known != fresh) << line)
}

/// Any guest memory of the `vm-memory` crate.
#[derive(Debug)]
pub struct VmMemory<'a, M: ?Sized>(pub &'a M);

impl<M: GuestMemory + ?Sized> VmMemory<'_, M> {
    /// Entries that are written on, if somebody is there to do it.
    fn read(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64], passing: Option<&mut Passing<'_, '_>>) -> Result<Nearby, ReadError> {
        let size = usize::from(layout.bytes);
        // Most memory is plain memory, whose regions can be asked without an iterator over slices.
        let plain = self.0.physical_memory().and_then(|memory| memory.to_region_addr(GuestAddress(address.0)));
        if let Some(slice) = plain.and_then(|(region, at)| region.get_slice(at, entries.len() * size).ok()) {
            let loaded = match passing {
                Some(passing) => atomic::load_passing(&slice, layout, entries, passing),
                None => atomic::load(&slice, layout, entries),
            };
            return if loaded { Ok(atomic::nearby(&slice)) } else { Err(ReadError(address)) };
        }
        let mut nearby = Nearby::UNKNOWN;
        let slices = self.0.get_slices(GuestAddress(address.0), entries.len() * size, Permissions::Read).map_err(|_| ReadError(address))?;
        let mut done = 0;
        for slice in slices {
            let at = ReadError(Gpa(address.0 + (done * size) as u64));
            let slice = slice.map_err(|_| at)?;
            if done == 0 {
                nearby = atomic::nearby(&slice);
            }
            let count = slice.len() / size;
            if count * size != slice.len() {
                return Err(at); // an entry that straddles two regions is no entry
            }
            let part = &mut entries[done..done + count];
            if !atomic::load(&slice, layout, part) {
                return Err(at);
            }
            done += count;
        }
        Ok(nearby)
    }
}

impl<M: GuestMemory + ?Sized> EntryMemory for VmMemory<'_, M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        self.read_entries_nearby(address, layout, entries).map(|_| ())
    }

    fn read_entries_nearby(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<Nearby, ReadError> {
        self.read(address, layout, entries, None)
    }

    fn read_entries_passing(
        &self,
        address: Gpa,
        layout: EntryLayout,
        entries: &mut [u64],
        passing: &mut Passing<'_, '_>,
    ) -> Result<Nearby, ReadError> {
        self.read(address, layout, entries, Some(passing))
    }

    #[inline]
    fn read_entry(&self, address: Gpa, layout: EntryLayout) -> Result<u64, ReadError> {
        let (at, bytes) = (GuestAddress(address.0), usize::from(layout.bytes));
        // Most memory is plain memory, whose regions can be asked without an iterator over slices.
        let word = match self.0.physical_memory() {
            Some(memory) => memory.to_region_addr(at).and_then(|(region, at)| atomic::load_one(&region.get_slice(at, bytes).ok()?, bytes)),
            None => self.0.get_slices(at, bytes, Permissions::Read).ok().and_then(|mut slices| atomic::load_one(&slices.next()?.ok()?, bytes)),
        };
        word.map(|word| layout.word(word)).ok_or(ReadError(address))
    }

    #[inline]
    fn first_changed(&self, layout: EntryLayout, entries: &[(Gpa, u64)]) -> Option<(usize, Option<u64>)> {
        let memory = self.0.physical_memory();
        // Tables are often in one region.
        let mut last: Option<(&<M::PhysicalMemory as GuestMemoryBackend>::R, u64, u64)> = None;
        entries.iter().enumerate().find_map(|(place, (address, known))| {
            let entry = match memory {
                Some(memory) => {
                    if last.is_none_or(|(_, start, length)| address.0.wrapping_sub(start) >= length) {
                        last = memory.find_region(GuestAddress(address.0)).map(|region| (region, region.start_addr().0, region.len()));
                    }
                    let word = last.and_then(|(region, start, _)| atomic::load_in(region, address.0 - start, layout.bytes.into()));
                    word.map(|word| layout.word(word))
                }
                None => self.read_entry(*address, layout).ok(),
            };
            (entry != Some(*known)).then_some((place, entry))
        })
    }

    fn read_changed(&self, address: Gpa, layout: EntryLayout, known: &[u64], fresh: &mut [u64]) -> Result<u128, ReadError> {
        if let (Some(memory), 8, true) = (self.0.physical_memory(), layout.bytes, layout.order.is_native()) {
            let place = memory.to_region_addr(GuestAddress(address.0));
            let slice = place.and_then(|(region, at)| region.get_slice(at, size_of_val(known)).ok());
            // None: two regions meet within the page, or it is not there. Nothing was read yet.
            if let Some(slice) = slice {
                return atomic::changed_u64(&slice, layout, known, fresh).ok_or(ReadError(address));
            }
        }
        self.read_entries(address, layout, fresh).map(|()| changed_lines(known, fresh))
    }
}

/// `length` bytes from `address`, each read once: for device structures.
///
/// # Errors
/// The address that was asked for, if any of it is not there.
pub fn read_bytes<M: GuestMemory + ?Sized>(memory: &M, address: Gpa, length: usize) -> Result<Vec<u8>, ReadError> {
    let failed = ReadError(address);
    let mut bytes = Vec::with_capacity(length);
    for slice in memory.get_slices(GuestAddress(address.0), length, Permissions::Read).map_err(|_| failed)? {
        let slice = slice.map_err(|_| failed)?;
        let mut at = 0;
        while at < slice.len() {
            // Whole words where they are aligned: fields of device structures are read as hardware reads them.
            if slice.len() - at >= 8
                && let Ok(word) = slice.get_atomic_ref::<AtomicU64>(at)
            {
                bytes.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
                at += 8;
            } else {
                bytes.push(slice.get_atomic_ref::<AtomicU8>(at).map_err(|_| failed)?.load(Ordering::Relaxed));
                at += 1;
            }
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::{Bytes, GuestMemoryMmap};

    /// A page of bytes that are all different from their neighbours, read as entries of either size and order: from its start, and from where wide loads do not fit.
    #[test]
    fn entries_are_what_stands_in_memory() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 4096)]).expect("a page");
        let bytes: Vec<u8> = (0..4096_u32).map(|index| (index.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0x1000)).expect("in memory");
        for (size, order) in [(4, ByteOrder::Little), (4, ByteOrder::Big), (8, ByteOrder::Little), (8, ByteOrder::Big)] {
            for (skipped, count) in [(0, 4096 / size), (0, 64), (1, 64), (3, 33), (16, 1)] {
                let mut entries = vec![u64::MAX; count];
                let layout = EntryLayout { bytes: size as u8, order };
                VmMemory(&memory).read_entries(Gpa(0x1000 + (skipped * size) as u64), layout, &mut entries).expect("in memory");
                for (index, entry) in entries.iter().enumerate() {
                    let mut word = [0; 8];
                    let at = (skipped + index) * size;
                    word[..size].copy_from_slice(&bytes[at..at + size]);
                    if order == ByteOrder::Big {
                        word[..size].reverse();
                    }
                    assert_eq!(*entry, u64::from_le_bytes(word), "{size} bytes, {order:?}, {skipped} + {index}");
                }
            }
        }
    }

    /// Entries alone, and compared with what was known of them: all that is told is what stands in memory, wherever the first one is and whatever differs.
    #[test]
    fn what_changed_is_told_by_line() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 4096), (GuestAddress(0x2000), 2048), (GuestAddress(0x2800), 2048)]);
        let memory = memory.expect("three regions");
        let bytes: Vec<u8> = (0..8192_u32).map(|index| (index.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
        memory.write_slice(&bytes, GuestAddress(0x1000)).expect("in memory");
        for (size, order) in [(4, ByteOrder::Little), (4, ByteOrder::Big), (8, ByteOrder::Little), (8, ByteOrder::Big)] {
            let layout = EntryLayout { bytes: size as u8, order };
            // The second page is of two regions.
            for (page, skipped, count) in [(0, 0, 4096 / size), (0, 1, 64), (0, 2, 64), (0, 3, 33), (0, 16, 7), (1, 0, 4096 / size), (1, 5, 300)] {
                let address = Gpa(0x1000 + page * 0x1000 + (skipped * size) as u64);
                let mut entries = vec![0; count];
                VmMemory(&memory).read_entries(address, layout, &mut entries).expect("in memory");
                for (index, entry) in entries.iter().enumerate() {
                    let at = Gpa(address.0 + (index * size) as u64);
                    assert_eq!(VmMemory(&memory).read_entry(at, layout), Ok(*entry), "{size} bytes, {order:?}, {at}");
                }
                for different in [vec![], vec![0], vec![count - 1], vec![count / 2], (0..count).collect()] {
                    let mut known = entries.clone();
                    different.iter().for_each(|index| known[*index] ^= 1 << (index % 32));
                    let mut fresh = vec![u64::MAX; count];
                    let lines = VmMemory(&memory).read_changed(address, layout, &known, &mut fresh).expect("in memory");
                    let wanted = different.iter().fold(0_u128, |lines, index| lines | 1 << (index / LINE));
                    assert_eq!(lines, wanted, "{size} bytes, {order:?}, {address}, {count} entries");
                    let same = |index: usize| lines >> (index / LINE) & 1 == 0 || fresh[index] == entries[index];
                    assert!((0..count).all(same), "{size} bytes, {order:?}, {address}, {count} entries");
                }
            }
        }
        let layout = EntryLayout { bytes: 8, order: ByteOrder::Little };
        assert_eq!(VmMemory(&memory).read_entry(Gpa(0x3000), layout), Err(ReadError(Gpa(0x3000))));
        assert!(VmMemory(&memory).read_changed(Gpa(0x3000), layout, &[0; 512], &mut [0; 512]).is_err());
    }
}
