//! Writing marks into guest entries, as hardware does: one compare-exchange on what was read.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemory, Permissions, VolatileMemory};

use crate::Gpa;
use crate::memory::{EntryLayout, VmMemory};

/// Guest memory at this address could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("guest memory at {0} cannot be written")]
pub struct WriteError(pub Gpa);

/// Memory that holds tables in which accessed and dirty marks can be set.
///
/// A page whose writes are watched is written here like by anybody else: where that stops the writer until the write was handled, as userfaultfd does, write from
/// another thread than the one that handles it, or through a mapping of the same memory that is not watched.
pub trait MarkMemory {
    /// Makes the entry at `address`, a multiple of the entry size, `new` if it is `old`; whether it was. What the guest writes at the same moment is never
    /// lost.
    ///
    /// # Errors
    /// The memory is not there, or cannot be written.
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError>;
}

impl<M: GuestMemory + ?Sized> MarkMemory for VmMemory<'_, M> {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        let failed = WriteError(address);
        let size = usize::from(layout.bytes);
        let mut slices = self.0.get_slices(GuestAddress(address.0), size, Permissions::ReadWrite).map_err(|_| failed)?;
        let slice = slices.next().ok_or(failed)?.map_err(|_| failed)?;
        if slice.len() != size {
            return Err(failed); // an entry that straddles two regions is no entry
        }
        let (old, new) = (layout.word(old), layout.word(new));
        let changed = if layout.bytes == 8 {
            let word = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| failed)?;
            word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        } else {
            let word = slice.get_atomic_ref::<AtomicU32>(0).map_err(|_| failed)?;
            word.compare_exchange(old as u32, new as u32, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        };
        if changed {
            // Whoever migrates this memory copies the page again.
            slice.bitmap().mark_dirty(0, size);
        }
        Ok(changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::ByteOrder;
    use vm_memory::{Bytes, GuestMemoryMmap};

    #[test]
    fn an_entry_is_written_if_nobody_changed_it() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 4096)]).expect("a page");
        for (bytes, order, stands) in [
            (8, ByteOrder::Little, [8, 7, 6, 5, 4, 3, 2, 1]),
            (8, ByteOrder::Big, [1, 2, 3, 4, 5, 6, 7, 8]),
            (4, ByteOrder::Little, [8, 7, 6, 5, 0xff, 0xff, 0xff, 0xff]),
            (4, ByteOrder::Big, [5, 6, 7, 8, 0xff, 0xff, 0xff, 0xff]),
        ] {
            let layout = EntryLayout { bytes, order };
            let (old, new) = if bytes == 8 { (u64::MAX, 0x0102_0304_0506_0708) } else { (0xffff_ffff, 0x0506_0708) };
            memory.write_slice(&[0xff; 16], GuestAddress(0x1008)).expect("in memory");
            let exchange = |old, new| VmMemory(&memory).compare_exchange_entry(Gpa(0x1008), layout, old, new);
            assert_eq!(exchange(1, 2), Ok(false));
            assert_eq!(exchange(old, new), Ok(true));
            let mut found = [0; 16];
            memory.read_slice(&mut found, GuestAddress(0x1008)).expect("in memory");
            assert_eq!((&found[..8], &found[8..]), (&stands[..], &[0xff; 8][..]), "{layout:?}");
            assert_eq!(exchange(old, 0), Ok(false));
        }
        let layout = EntryLayout { bytes: 8, order: ByteOrder::Little };
        assert_eq!(VmMemory(&memory).compare_exchange_entry(Gpa(0x2000), layout, 0, 1), Err(WriteError(Gpa(0x2000))));
    }
}
