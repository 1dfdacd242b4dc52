//! The rival from crates.io: walking with `aarch64-paging`, building with `x86_64`.
//!
//! `aarch64-paging` is made for tables that it built itself: there is no constructor for an existing one. But it asks its `Translation` for the root
//! table's memory, so a `Translation` that hands out the guest's root gets there. It trusts the table: an address outside of guest memory cannot be
//! reported, only crash, so this rival is for tables that are known to be sound. `x86_64` maps one page at a time, each from the root, and has four levels.

use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use aarch64_paging::descriptor::{El1Attributes, PhysicalAddress};
use aarch64_paging::paging::{El1And0, MemoryRegion, PageTable, RootTable, Translation, VaRange};
use stagecraft::memory::MemoryMap;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};
use x86_64::structures::paging::{FrameAllocator, Mapper as _, OffsetPageTable, Page, PageTableFlags, PhysFrame, Size4KiB};
use x86_64::{PhysAddr, VirtAddr};

use crate::pool::Pool;

/// Guest memory in which the tables lie, as one range.
struct GuestTables {
    root: u64,
    first: u64,
    bytes: u64,
    host: *mut u8,
}

impl Translation<El1Attributes> for GuestTables {
    fn allocate_table(&mut self) -> (NonNull<PageTable<El1Attributes>>, PhysicalAddress) {
        let root = PhysicalAddress(self.root as usize);
        (self.physical_to_virtual(root), root)
    }

    unsafe fn deallocate_table(&mut self, _: NonNull<PageTable<El1Attributes>>) {}

    fn physical_to_virtual(&self, address: PhysicalAddress) -> NonNull<PageTable<El1Attributes>> {
        let offset = (address.0 as u64).wrapping_sub(self.first);
        assert!(offset.is_multiple_of(4096) && offset < self.bytes, "a table outside of guest memory");
        NonNull::new(self.host.wrapping_add(offset as usize).cast()).unwrap()
    }
}

/// Frames of a pool.
struct Frames<'a>(&'a mut Pool);

// SAFETY: a pool hands out each page once.
unsafe impl FrameAllocator<Size4KiB> for Frames<'_> {
    fn allocate_frame(&mut self) -> Option<PhysFrame> {
        let index = self.0.allocate();
        PhysFrame::from_start_address(PhysAddr::new(self.0.address(index))).ok()
    }
}

/// Converts the 4K pages that the table at `root` maps; how many could not be said (IOVAs beyond the lower half of four levels, addresses outside
/// of memory, larger pages).
pub fn convert(memory: &GuestMemoryMmap, first: u64, bytes: u64, root: u64, map: &MemoryMap, pool: &mut Pool) -> u64 {
    let host = memory.get_host_address(GuestAddress(first)).unwrap();
    // Dropping a `RootTable` gives all tables back, one by one: they are not its own.
    let walked = ManuallyDrop::new(RootTable::with_va_range(GuestTables { root, first, bytes, host }, 0, El1And0, VaRange::Lower));
    let regions: Vec<(u64, u64)> = map.regions().iter().map(|region| (region.span.first, region.span.last)).collect();
    pool.reset();
    let root = pool.allocate();
    pool.words(root).fill(0);
    let offset = VirtAddr::from_ptr(pool.all().as_ptr()) - pool.base();
    let level_4 = NonNull::from(pool.words(root)).cast();
    // SAFETY: the first page of the pool is zero, aligned, and used by nobody else until the walk has ended.
    let level_4 = unsafe { &mut *level_4.as_ptr() };
    // SAFETY: at `offset` above their addresses lie the pages of the pool, all of which are valid for writing.
    let mut built = unsafe { OffsetPageTable::new(level_4, offset) };
    let mut frames = Frames(pool);
    let table_flags = PageTableFlags::PRESENT | PageTableFlags::WRITABLE | PageTableFlags::USER_ACCESSIBLE | PageTableFlags::ACCESSED;
    let mut unsaid = 0;
    let range = MemoryRegion::new(0, 1 << 48);
    walked
        .walk_range(&range, &mut |region, descriptor, level| {
            if !descriptor.is_valid() {
                return Ok(());
            }
            let (flags, address) = (descriptor.flags(), descriptor.output_address().0 as u64);
            let usable = flags.contains(El1Attributes::ACCESSED | El1Attributes::USER);
            let inside = regions.iter().any(|&(first, last)| first <= address && address + 4095 <= last);
            if level != 3 || !usable || !inside || region.start().0 >> 47 != 0 {
                unsaid += 1;
                return Ok(());
            }
            let mut leaf = PageTableFlags::PRESENT | PageTableFlags::USER_ACCESSIBLE | PageTableFlags::ACCESSED;
            if !flags.contains(El1Attributes::READ_ONLY) {
                leaf |= PageTableFlags::WRITABLE | PageTableFlags::DIRTY;
            }
            let page = Page::<Size4KiB>::containing_address(VirtAddr::new(region.start().0 as u64));
            let frame = PhysFrame::containing_address(PhysAddr::new(address));
            // SAFETY: this table is never used by a processor.
            let mapped = unsafe { built.map_to_with_table_flags(page, frame, leaf, table_flags, &mut frames) };
            mapped.map_err(|_| ())?.ignore();
            Ok(())
        })
        .unwrap();
    unsaid
}
