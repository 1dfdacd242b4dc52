//! Guest memory of which only some pages are known, behind `vm-memory`'s traits.

use std::io::Read;
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

/// Bytes that are read from a file at once; a multiple of a page.
const CHUNK: usize = 1 << 20;

/// Room for pages of a file. Pages that are all zeroes, as those in the holes of a file are, take no memory.
#[derive(Debug, Default)]
pub(super) struct PageFile {
    backing: Option<Arc<MmapRegion>>,
    regions: Vec<PageRegion>,
    /// For each page of the file, its place in `backing`, in pages.
    places: Vec<usize>,
}

impl PageFile {
    /// Room for these pages: their addresses, ascending multiples of 4 KiB, each with its place in the file.
    pub(super) fn new(pages: &[(u64, usize)]) -> std::result::Result<Self, MmapRegionError> {
        if pages.is_empty() {
            return Ok(Self::default());
        }
        let page = PAGE as usize;
        let backing = Arc::new(MmapRegion::<()>::new(pages.len() * page)?);
        let (mut regions, mut places): (Vec<PageRegion>, Vec<usize>) = (Vec::new(), vec![0; pages.len()]);
        for (index, (address, place)) in pages.iter().enumerate() {
            places[*place] = index;
            match regions.last_mut() {
                Some(last) if last.start.0 + last.bytes == *address => last.bytes += PAGE,
                _ => regions.push(PageRegion { start: GuestAddress(*address), bytes: PAGE, offset: index * page, backing: Arc::clone(&backing) }),
            }
        }
        Ok(Self { backing: Some(backing), regions, places })
    }

    /// Reads the pages; tells how many bytes there were.
    pub(super) fn fill(&self, file: &mut impl Read) -> std::io::Result<u64> {
        let (mut chunk, mut done) = (vec![0; CHUNK], 0);
        let page = PAGE as usize;
        for places in self.places.chunks(CHUNK / page) {
            let read = read_up_to(file, &mut chunk[..places.len() * page])?;
            done += read as u64;
            for (bytes, place) in chunk[..read].chunks(page).zip(places) {
                write_unless_zero(self.backing.as_deref(), bytes, place * page);
            }
            if read < places.len() * page {
                break;
            }
        }
        Ok(done)
    }

    /// The memory.
    pub(super) fn memory(self) -> PageMemory {
        // Ascending and apart, as the caller checked: nothing to refuse.
        PageMemory::from_regions(self.regions).unwrap_or_default()
    }
}

/// Fills `buffer` from `file`, as far as that goes.
pub(super) fn read_up_to(file: &mut impl Read, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Compared with whole, which is faster than to look at bytes one by one.
const ZEROES: [u8; PAGE as usize] = [0; PAGE as usize];

/// Puts `bytes`, a page at most, at `offset` of memory that is all zeroes.
pub(super) fn write_unless_zero(backing: Option<&MmapRegion>, bytes: &[u8], offset: usize) {
    if let Some(backing) = backing
        && !ZEROES.starts_with(bytes)
    {
        // Cannot fail: there is room for all that is read.
        let _ = backing.as_volatile_slice().write_slice(bytes, offset);
    }
}

/// Memory of one range: `bytes`, a multiple of 4 KiB that is not zero, from `start`, all zeroes; and how to fill it.
pub(super) fn range(start: u64, bytes: u64) -> std::result::Result<(PageMemory, Arc<MmapRegion>), MmapRegionError> {
    let size = usize::try_from(bytes).map_err(|_| MmapRegionError::InvalidOffsetLength)?;
    let backing = Arc::new(MmapRegion::<()>::new(size)?);
    let region = PageRegion { start: GuestAddress(start), bytes, offset: 0, backing: Arc::clone(&backing) };
    Ok((PageMemory::from_regions(vec![region]).unwrap_or_default(), backing))
}
