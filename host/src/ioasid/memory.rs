//! A guest's memory, as a context needs it: to be read, to be mapped, and to be pinned. And memory for host tables. All of it comes from the caller.

use std::fmt;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};

use crate::kernel::sim::Sim;
use crate::memory::{EntryLayout, EntryMemory, Kind, MarkMemory, MemoryMap, MemoryMapError, Nearby, ReadError, Region, VmMemory, WriteError};
use crate::table::Passing;
use crate::{Gpa, Span};

/// A region of guest memory, or of a device's that other devices may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest-physical addresses, whole pages.
    pub span: Span,
    /// What it is.
    pub kind: Kind,
    /// Where it is mapped in this process, if it is: the kernel can only let devices reach what is. It stays there as long as the context knows the region.
    pub user_address: Option<u64>,
    /// Devices may write there.
    pub writable: bool,
    /// Bytes that can go by themselves, a multiple of 4096, such as those of a balloon or of pluggable memory: blocks begin at multiples of it within the region. When a
    /// region with blocks grows or shrinks by some, DMA to the others does not notice. None: it goes as a whole, and what stays of it comes again.
    pub block: Option<u64>,
}

impl MemoryRegion {
    /// The same memory at these addresses of it.
    const fn part(self, span: Span) -> Self {
        let user_address = match self.user_address {
            Some(address) => Some(address.wrapping_add(span.first - self.span.first)),
            None => None,
        };
        Self { span, user_address, ..self }
    }

    /// Where two regions are the same memory, and one can become the other without being taken away in between.
    fn common(self, other: Self) -> Option<Span> {
        let both = self.span.intersection(other.span)?;
        let is_same = self == other || self.block.is_some() && self.part(both) == other.part(both);
        is_same.then_some(both)
    }
}

/// What of `regions` is in `others` as well, and what is not; both ascending. Neither list overlaps with itself.
pub(crate) fn compare(regions: &[MemoryRegion], others: &[MemoryRegion]) -> (Vec<MemoryRegion>, Vec<MemoryRegion>) {
    let (mut kept, mut missing) = (Vec::new(), Vec::new());
    for region in regions {
        let mut next = Some(region.span.first);
        for both in others.iter().filter_map(|other| region.common(*other)) {
            let before = next.and_then(|first| Span::new(first, both.first.checked_sub(1)?));
            missing.extend(before.map(|before| region.part(before)));
            kept.push(region.part(both));
            next = both.last.checked_add(1);
        }
        let rest = next.and_then(|first| Span::new(first, region.span.last));
        missing.extend(rest.map(|rest| region.part(rest)));
    }
    (kept, missing)
}

/// Any memory of the `vm-memory` crate, owned: a handle, as its collections are.
#[derive(Clone, Debug)]
pub struct Shared<M>(pub M);

impl<M: vm_memory::GuestMemory> EntryMemory for Shared<M> {
    fn read_entries(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        VmMemory(&self.0).read_entries(address, layout, entries)
    }

    fn read_entries_passing(
        &self,
        address: Gpa,
        layout: EntryLayout,
        entries: &mut [u64],
        passing: &mut Passing<'_, '_>,
    ) -> Result<Nearby, ReadError> {
        VmMemory(&self.0).read_entries_passing(address, layout, entries, passing)
    }

    fn read_entries_nearby(&self, address: Gpa, layout: EntryLayout, entries: &mut [u64]) -> Result<Nearby, ReadError> {
        VmMemory(&self.0).read_entries_nearby(address, layout, entries)
    }

    fn read_entry(&self, address: Gpa, layout: EntryLayout) -> Result<u64, ReadError> {
        VmMemory(&self.0).read_entry(address, layout)
    }

    fn first_changed(&self, layout: EntryLayout, entries: &[(Gpa, u64)]) -> Option<(usize, Option<u64>)> {
        VmMemory(&self.0).first_changed(layout, entries)
    }

    fn read_changed(&self, address: Gpa, layout: EntryLayout, known: &[u64], fresh: &mut [u64]) -> Result<u128, ReadError> {
        VmMemory(&self.0).read_changed(address, layout, known, fresh)
    }
}

impl<M: vm_memory::GuestMemory> MarkMemory for Shared<M> {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        VmMemory(&self.0).compare_exchange_entry(address, layout, old, new)
    }
}

/// A guest's memory at one moment. When regions come or go, make a new one and tell [`Context::memory_changed`](super::Context::memory_changed).
#[derive(Clone)]
pub struct GuestMemory {
    entries: Arc<dyn EntryMemory + Send + Sync>,
    marks: Arc<dyn MarkMemory + Send + Sync>,
    map: Arc<MemoryMap>,
    regions: Arc<[MemoryRegion]>,
    tables: Span,
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory").field("regions", &self.regions).field("tables", &self.tables).finish_non_exhaustive()
    }
}

/// Where host tables stand unless the caller says otherwise: 64 TiB from 64 TiB on.
const TABLES: Span = Span { first: 1 << 46, last: (1 << 47) - 1 };

impl GuestMemory {
    /// Memory of these regions, in any order; `memory` reads it, and sets marks in tables.
    ///
    /// # Errors
    /// Two regions overlap.
    pub fn new<M: EntryMemory + MarkMemory + Send + Sync + 'static>(memory: Arc<M>, regions: Vec<MemoryRegion>) -> Result<Self, MemoryMapError> {
        let marks = Arc::clone(&memory);
        Self::of((memory, marks), TABLES, regions)
    }

    fn of(
        (entries, marks): (Arc<dyn EntryMemory + Send + Sync>, Arc<dyn MarkMemory + Send + Sync>),
        tables: Span,
        mut regions: Vec<MemoryRegion>,
    ) -> Result<Self, MemoryMapError> {
        regions.sort_by_key(|region| region.span);
        let map = MemoryMap::new(regions.iter().map(|region| Region { kind: region.kind, span: region.span }).collect())?;
        Ok(Self { entries, marks, map: Arc::new(map), regions: regions.into(), tables })
    }

    /// All regions of a `GuestMemoryMmap`, as memory that devices may write.
    ///
    /// # Errors
    /// Two regions overlap.
    pub fn of_mmap<B: Bitmap + Send + Sync + 'static>(memory: &GuestMemoryMmap<B>) -> Result<Self, MemoryMapError>
    where
        GuestMemoryMmap<B>: vm_memory::GuestMemory + Clone + Send + Sync,
    {
        let region = |region: &vm_memory::GuestRegionMmap<B>| MemoryRegion {
            span: Span { first: region.start_addr().0, last: region.last_addr().0 },
            kind: Kind::Ram,
            user_address: Some(region.get_mmap().as_ptr() as u64),
            writable: true,
            block: None,
        };
        Self::new(Arc::new(Shared(memory.clone())), memory.iter().map(region).collect())
    }

    /// The same, with host tables in `tables` where the hardware has addresses for them: guest-physical addresses at which there is never memory. Every unit
    /// that walks host tables must reach them, so for units with few address bits this is to be low.
    #[must_use]
    pub fn with_tables_in(self, tables: Span) -> Self {
        Self { tables, ..self }
    }

    /// The same reader and window with other regions.
    pub(super) fn with_regions(&self, regions: Vec<MemoryRegion>) -> Result<Self, MemoryMapError> {
        Self::of((Arc::clone(&self.entries), Arc::clone(&self.marks)), self.tables, regions)
    }

    /// Reads it.
    #[must_use]
    pub fn entries(&self) -> &(dyn EntryMemory + Send + Sync) {
        &*self.entries
    }

    /// Sets marks in it.
    pub(super) fn marks(&self) -> &(dyn MarkMemory + Send + Sync) {
        &*self.marks
    }

    /// Which addresses exist.
    #[must_use]
    pub fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// The regions, ascending.
    #[must_use]
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Where host tables may stand.
    #[must_use]
    pub const fn tables(&self) -> Span {
        self.tables
    }

    /// Highest address that a mapping can have.
    pub(super) fn last_address(&self) -> u64 {
        self.map.targets().last().map_or(0, |span| span.last)
    }
}

/// Gives memory for host tables. A VMM that confines itself may have its own, such as memory that outlives it; [`PlainTables`] is anonymous memory.
pub trait TableSupply: Send + Sync + fmt::Debug {
    /// `bytes` bytes of zeroes, a power of two and at least 4096; none if there are none. They stay mapped as long as the region is held.
    fn region(&self, bytes: usize) -> Option<Arc<MmapRegion>>;

    /// A region that [`TableSupply::region`] gave is out of use: the kernel has forgotten it.
    fn release(&self, region: Arc<MmapRegion>) {
        drop(region);
    }
}

/// Anonymous memory of this process.
#[derive(Clone, Copy, Debug, Default)]
pub struct PlainTables;

impl TableSupply for PlainTables {
    fn region(&self, bytes: usize) -> Option<Arc<MmapRegion>> {
        MmapRegion::new(bytes).ok().map(Arc::new)
    }
}

/// Memory that the simulated kernel knows: it takes no other.
impl TableSupply for Sim {
    fn region(&self, bytes: usize) -> Option<Arc<MmapRegion>> {
        let region = Arc::new(MmapRegion::new(bytes).ok()?);
        self.register_region(Arc::clone(&region)).ok()?;
        Some(region)
    }

    fn release(&self, region: Arc<MmapRegion>) {
        let known = self.unregister_region(region.as_ptr() as u64);
        debug_assert!(known.is_ok(), "a region that was never handed out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_with_blocks_go_and_come_in_parts_and_others_as_a_whole() {
        let region = |first, last, block| MemoryRegion {
            span: Span { first, last },
            kind: Kind::Ram,
            user_address: Some(0x7000_0000_u64.wrapping_add(first)),
            writable: true,
            block,
        };
        let (blocks, whole) = (Some(0x1000), None);
        let spans = |(kept, missing): (Vec<MemoryRegion>, Vec<MemoryRegion>)| {
            [kept, missing].map(|list| list.iter().map(|region| (region.span.first, region.span.last)).collect::<Vec<_>>())
        };
        let one = [region(0x1000, 0x8fff, blocks), region(u64::MAX - 0xfff, u64::MAX, blocks)];
        let other = [region(0, 0x2fff, blocks), region(0x5000, 0x6fff, blocks), region(u64::MAX - 0xfff, u64::MAX, blocks)];
        assert_eq!(
            spans(compare(&one, &other)),
            [vec![(0x1000, 0x2fff), (0x5000, 0x6fff), (u64::MAX - 0xfff, u64::MAX)], vec![(0x3000, 0x4fff), (0x7000, 0x8fff)]]
        );
        assert_eq!(compare(&one, &other).1[1].user_address, Some(0x7000_7000));
        assert_eq!(spans(compare(&other, &one))[1], [(0, 0xfff)]);
        // Without blocks, of other memory, or for other uses: the whole.
        let smaller = region(0x1000, 0x1fff, whole);
        assert_eq!(spans(compare(&[region(0x1000, 0x8fff, whole)], &[smaller])), [vec![], vec![(0x1000, 0x8fff)]]);
        assert_eq!(spans(compare(&[smaller], &[smaller])), [vec![(0x1000, 0x1fff)], vec![]]);
        for other in
            [MemoryRegion { user_address: Some(1), ..one[0] }, MemoryRegion { writable: false, ..one[0] }, region(0x1000, 0x8fff, Some(0x2000))]
        {
            assert_eq!(spans(compare(&one[..1], &[other])), [vec![], vec![(0x1000, 0x8fff)]]);
        }
    }
}
