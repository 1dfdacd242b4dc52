//! User memory, and what "physical" means here: the simulated machine's physical addresses are the addresses that this process has its memory at.
//!
//! Nothing is reached that was not registered: an address is looked up among the registered regions, and everything goes through `vm-memory`'s
//! checked accessors. Words of tables are loaded, and changed, atomically and only whole.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use vm_memory::{MmapRegion, VolatileMemory};

use super::lock::{read, write};
use crate::kernel::{Errno, Result};

/// The registered regions.
#[derive(Debug, Default)]
pub(super) struct UserMemory {
    // By first address.
    regions: RwLock<BTreeMap<u64, Arc<MmapRegion>>>,
}

/// `prot` of mmap.
const PROT_WRITE: i32 = 2;

impl UserMemory {
    /// EEXIST if part of it is registered already.
    pub(super) fn register(&self, region: Arc<MmapRegion>) -> Result<()> {
        let first = region.as_ptr() as u64;
        let last = first + (region.size() as u64 - 1);
        let mut regions = write(&self.regions);
        if regions.range(..=last).next_back().is_some_and(|(start, other)| start + (other.size() as u64 - 1) >= first) {
            return Err(Errno::EEXIST);
        }
        regions.insert(first, region);
        Ok(())
    }

    /// False if there is no region that begins there.
    pub(super) fn unregister(&self, first: u64) -> bool {
        write(&self.regions).remove(&first).is_some()
    }

    fn find(&self, address: u64) -> Option<(u64, Arc<MmapRegion>)> {
        let regions = read(&self.regions);
        let (first, region) = regions.range(..=address).next_back()?;
        (address - first < region.size() as u64).then(|| (address - first, Arc::clone(region)))
    }

    /// Whether all of it is there, and can be written if need be.
    pub(super) fn covers(&self, address: u64, length: u64, writeable: bool) -> bool {
        let mut done = 0;
        while done < length {
            let Some((offset, region)) = address.checked_add(done).and_then(|address| self.find(address)) else { return false };
            if writeable && region.prot() & PROT_WRITE == 0 {
                return false;
            }
            done += region.size() as u64 - offset;
        }
        true
    }

    /// Where a range of a file is mapped here.
    pub(super) fn of_file(&self, file: BorrowedFd<'_>, start: u64, length: u64) -> Result<u64> {
        let wanted = rustix::fs::fstat(file).map_err(|errno| Errno(errno.raw_os_error()))?;
        for (first, region) in read(&self.regions).iter() {
            let Some(backing) = region.file_offset() else { continue };
            let Ok(other) = rustix::fs::fstat(backing.file().as_fd()) else { continue };
            let inside =
                start.checked_sub(backing.start()).filter(|offset| offset.checked_add(length).is_some_and(|end| end <= region.size() as u64));
            if let Some(offset) = inside
                && (wanted.st_dev, wanted.st_ino) == (other.st_dev, other.st_ino)
            {
                return Ok(first + offset);
            }
        }
        Err(Errno::EINVAL)
    }

    /// One aligned word, in the machine's byte order.
    pub(super) fn load(&self, address: u64) -> Option<u64> {
        let (offset, region) = self.find(address)?;
        Some(region.get_atomic_ref::<AtomicU64>(usize::try_from(offset).ok()?).ok()?.load(Ordering::Acquire))
    }

    /// Changes a word if it is still `old`; `Some(false)` if it is not.
    pub(super) fn compare_exchange(&self, address: u64, old: u64, new: u64) -> Option<bool> {
        let (offset, region) = self.find(address)?;
        if region.prot() & PROT_WRITE == 0 {
            return None;
        }
        let word = region.get_atomic_ref::<AtomicU64>(usize::try_from(offset).ok()?).ok()?;
        Some(word.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire).is_ok())
    }

    /// Copies out of memory; within one region.
    pub(super) fn copy_out(&self, address: u64, bytes: &mut [u8]) -> Option<()> {
        let (offset, region) = self.find(address)?;
        region.get_slice(usize::try_from(offset).ok()?, bytes.len()).ok()?.copy_to(bytes);
        Some(())
    }

    /// Copies into memory; within one region.
    pub(super) fn copy_in(&self, address: u64, bytes: &[u8]) -> Option<()> {
        let (offset, region) = self.find(address)?;
        if region.prot() & PROT_WRITE == 0 {
            return None;
        }
        region.get_slice(usize::try_from(offset).ok()?, bytes.len()).ok()?.copy_from(bytes);
        Some(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn words_change_only_if_nobody_else_changed_them() {
        let (memory, region) = (UserMemory::default(), Arc::new(MmapRegion::new(8192).unwrap()));
        let first = region.as_ptr() as u64;
        memory.register(Arc::clone(&region)).unwrap();
        assert_eq!(memory.register(region), Err(Errno::EEXIST));
        assert_eq!(memory.compare_exchange(first + 8, 0, 5), Some(true));
        assert_eq!(memory.compare_exchange(first + 8, 0, 6), Some(false));
        assert_eq!((memory.load(first + 8), memory.load(first + 4), memory.load(first + 8192)), (Some(5), None, None));
        assert!(memory.covers(first, 8192, true) && !memory.covers(first, 8193, false) && !memory.covers(first - 1, 2, false));
        assert!(memory.unregister(first) && memory.load(first).is_none());
    }
}
