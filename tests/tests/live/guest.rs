//! A small guest with VT-d first-stage tables in real memory, written entry by entry.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stagecraft::memory::{Kind, MemoryMap, Region, VmMemory};
use stagecraft::plugin::TableConfig;
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::{self, VtdFirst};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory is from 0 up to here.
pub const MEMORY: u64 = 32 << 20;
/// Where the first root is; other tables follow.
pub const ROOT: u64 = 0x10_0000;
/// Where pages for DMA begin.
pub const DATA: u64 = 0x80_0000;

/// Present, writable, for users, accessed, dirty.
pub const RW: u64 = 0b110_0111;
/// The same, without write.
pub const RO: u64 = 0b110_0101;
/// A large page.
pub const PS: u64 = 1 << 7;
/// A table.
const TABLE: u64 = 0b10_0111;

/// The guest.
pub struct Guest {
    pub memory: Arc<GuestMemoryMmap>,
    root: AtomicU64,
    next: AtomicU64,
}

impl Guest {
    pub fn new() -> Self {
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap());
        Self { memory, root: AtomicU64::new(ROOT), next: AtomicU64::new(ROOT + 4096) }
    }

    pub fn map() -> MemoryMap {
        MemoryMap::new(vec![Region { kind: Kind::Ram, span: Span { first: 0, last: MEMORY - 1 } }]).unwrap()
    }

    pub fn root(&self) -> u64 {
        self.root.load(Ordering::Relaxed)
    }

    pub fn set_root(&self, root: u64) {
        self.root.store(root, Ordering::Relaxed);
    }

    pub fn view(&self) -> VmMemory<'_, GuestMemoryMmap> {
        VmMemory(&*self.memory)
    }

    pub fn config(&self) -> TableConfig {
        TableConfig::new("intel-vtd/first-stage", &[("levels", 4), ("root", self.root())])
    }

    pub fn table(&self) -> u64 {
        self.next.fetch_add(4096, Ordering::Relaxed)
    }

    /// Makes tables from here on again.
    pub fn restart(&self, address: u64) {
        self.next.store(address, Ordering::Relaxed);
    }

    pub fn load(&self, address: u64) -> u64 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    pub fn store(&self, address: u64, entry: u64) {
        self.memory.store(entry, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Where the entry of `iova` is, at a height above the last level (0); tables are made as needed.
    pub fn slot(&self, iova: u64, height: u32) -> Gpa {
        let mut table = self.root();
        for above in (height + 1..4).rev() {
            let slot = table + (iova >> (12 + 9 * above) & 0x1ff) * 8;
            if self.load(slot) == 0 {
                self.store(slot, self.table() | TABLE);
            }
            table = self.load(slot) & 0x000f_ffff_ffff_f000;
        }
        Gpa(table + (iova >> (12 + 9 * height) & 0x1ff) * 8)
    }

    /// Writes an entry, and says where.
    pub fn set(&self, iova: u64, height: u32, entry: u64) -> Gpa {
        let slot = self.slot(iova, height);
        self.store(slot.0, entry);
        slot
    }

    /// The same, for whom it does not matter where.
    pub fn put(&self, iova: u64, height: u32, entry: u64) {
        self.set(iova, height, entry);
    }

    /// All of its memory, for the reference.
    pub fn snapshot(&self) -> Memory {
        let mut memory = Memory::default();
        for address in (0..MEMORY).step_by(4096) {
            let mut page = [0; 4096];
            self.memory.read_slice(&mut page, GuestAddress(address)).unwrap();
            memory.pages.insert(address, page.into());
        }
        memory
    }

    /// Its tables, for the reference.
    pub fn reference(&self) -> tables::TableConfig {
        tables::TableConfig::VtdFirst(VtdFirst {
            root: self.root(),
            levels: 4,
            output_bits: 48,
            large_1g: true,
            execute_disable: true,
            extended_access: false,
        })
    }

    /// A new table of 512 pages that say what the large page at `iova` says.
    pub fn split(&self, iova: u64) {
        let large = self.load(self.slot(iova, 1).0);
        let table = self.table();
        for index in 0..512 {
            self.store(table + index * 8, large & !PS | index << 12);
        }
        self.set(iova, 1, table | TABLE);
    }
}
