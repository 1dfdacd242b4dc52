//! Guest memory of which only some pages are known, behind `vm-memory`'s traits.

use std::sync::Arc;

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::Result;
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestUsize, MemoryRegionAddress, MmapRegion, VolatileMemory, VolatileSlice,
};

use super::PageMemory;
use crate::memory::PAGE;

/// A range of pages that continue each other. All regions of a snapshot share one mapping, so that their number has no other bound than memory.
#[derive(Clone, Debug)]
pub struct PageRegion {
    start: GuestAddress,
    bytes: GuestUsize,
    offset: usize,
    backing: Arc<MmapRegion>,
}

impl GuestMemoryRegion for PageRegion {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.bytes
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, ()> {}

    fn get_slice(&self, offset: MemoryRegionAddress, count: usize) -> Result<VolatileSlice<'_, BS<'_, ()>>> {
        let end = offset.0.checked_add(count as u64).filter(|end| *end <= self.bytes);
        if end.is_none() {
            return Err(vm_memory::GuestMemoryError::InvalidBackendAddress);
        }
        Ok(self.backing.get_slice(self.offset + offset.0 as usize, count)?)
    }
}

impl GuestMemoryRegionBytes for PageRegion {}

/// Memory with these pages: `addresses` ascending multiples of 4 KiB, each with its place in `contents`.
pub(super) fn memory(pages: &[(u64, usize)], contents: &[u8]) -> std::result::Result<PageMemory, MmapRegionError> {
    if pages.is_empty() {
        return Ok(PageMemory::new());
    }
    let page = PAGE as usize;
    let backing = Arc::new(MmapRegion::<()>::new(pages.len() * page)?);
    let mut regions: Vec<PageRegion> = Vec::new();
    for (index, (address, place)) in pages.iter().enumerate() {
        let slice = backing.as_volatile_slice();
        // Cannot fail: the mapping has room for all pages.
        let _ = slice.write_slice(&contents[place * page..(place + 1) * page], index * page);
        match regions.last_mut() {
            Some(last) if last.start.0 + last.bytes == *address => last.bytes += PAGE,
            _ => regions.push(PageRegion { start: GuestAddress(*address), bytes: PAGE, offset: index * page, backing: Arc::clone(&backing) }),
        }
    }
    // Ascending and apart, as the caller checked: nothing to refuse.
    Ok(PageMemory::from_regions(regions).unwrap_or_default())
}

/// Memory of one range: `bytes`, a multiple of 4 KiB that is not zero, from `start`, all zeroes; and how to fill it.
pub(super) fn range(start: u64, bytes: u64) -> std::result::Result<(PageMemory, Arc<MmapRegion>), MmapRegionError> {
    let size = usize::try_from(bytes).map_err(|_| MmapRegionError::InvalidOffsetLength)?;
    let backing = Arc::new(MmapRegion::<()>::new(size)?);
    let region = PageRegion { start: GuestAddress(start), bytes, offset: 0, backing: Arc::clone(&backing) };
    Ok((PageMemory::from_regions(vec![region]).unwrap_or_default(), backing))
}
