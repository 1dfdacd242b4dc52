//! Guests of four architectures that write their tables entry by entry: all have 512 entries of 8 bytes and four levels here. Entries are written from the
//! specifications.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stagecraft::ioasid::GuestView;
use stagecraft::plugin::TableConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Where the first root is; other tables follow.
pub const ROOT: u64 = 0x10_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    Arm,
    Vtd,
    Amd,
    Riscv,
}

impl Arch {
    pub const ALL: [Self; 4] = [Self::Arm, Self::Vtd, Self::Amd, Self::Riscv];

    pub const fn format(self) -> &'static str {
        match self {
            Self::Arm => "arm-smmuv3/stage1",
            Self::Vtd => "intel-vtd/first-stage",
            Self::Amd => "amd-vi/v1",
            Self::Riscv => "riscv-iommu/first-stage",
        }
    }

    pub fn config(self, root: u64) -> TableConfig {
        match self {
            Self::Arm => {
                TableConfig::new(self.format(), &[("granule", 4096), ("input-bits", 48), ("output-bits", 48), ("mair", 0xff), ("root", root)])
            }
            _ => TableConfig::new(self.format(), &[("levels", 4), ("root", root)]),
        }
    }

    /// A table in a table at a height above the last level (0).
    pub const fn table(self, next: u64, height: u32) -> u64 {
        match self {
            Self::Arm => next | 0b11,
            // Present, write, user, accessed.
            Self::Vtd => next | 0b10_0111,
            // PR, NextLevel, IR, IW.
            Self::Amd => next | 1 | (height as u64) << 9 | 3 << 61,
            Self::Riscv => next >> 2 | 1,
        }
    }

    /// The same, and nothing that it leads to may be written: where a format can say so.
    pub const fn read_only_table(self, next: u64, height: u32) -> u64 {
        let table = self.table(next, height);
        match self {
            // APTable[1].
            Self::Arm => table | 1 << 62,
            Self::Vtd => table & !2,
            Self::Amd => table & !(1 << 62),
            Self::Riscv => table,
        }
    }

    /// Whether it can.
    pub const fn has_read_only_tables(self) -> bool {
        !matches!(self, Self::Riscv)
    }

    /// A leaf.
    pub const fn leaf(self, address: u64, height: u32, writes: bool) -> u64 {
        match self {
            // Valid, page or block; AF, inner shareable, unprivileged, nG; AP[2].
            Self::Arm => address | if height == 0 { 0b11 } else { 0b01 } | 1 << 6 | 3 << 8 | 1 << 10 | 1 << 11 | if writes { 0 } else { 1 << 7 },
            // Present, user, accessed, dirty; write; PS.
            Self::Vtd => address | 0b110_0101 | if writes { 2 } else { 0 } | if height == 0 { 0 } else { 1 << 7 },
            // PR, FC, IR; IW.
            Self::Amd => address | 1 | 1 << 60 | 1 << 61 | if writes { 1 << 62 } else { 0 },
            // V, R, U, A, D; W.
            Self::Riscv => address >> 2 | 0b1101_0011 | if writes { 4 } else { 0 },
        }
    }

    const fn next(self, entry: u64) -> u64 {
        match self {
            Self::Riscv => (entry << 2) & 0x00ff_ffff_ffff_f000,
            _ => entry & 0x000f_ffff_ffff_f000,
        }
    }
}

/// A guest with one table.
pub struct Guest {
    pub arch: Arch,
    memory: Arc<GuestMemoryMmap>,
    root: AtomicU64,
    next: AtomicU64,
}

impl Guest {
    pub fn new(arch: Arch, memory: &Arc<GuestMemoryMmap>) -> Self {
        Self::at(arch, memory, ROOT)
    }

    pub fn at(arch: Arch, memory: &Arc<GuestMemoryMmap>, root: u64) -> Self {
        Self { arch, memory: Arc::clone(memory), root: AtomicU64::new(root), next: AtomicU64::new(root + 4096) }
    }

    pub fn root(&self) -> u64 {
        self.root.load(Ordering::Relaxed)
    }

    pub fn view(&self) -> GuestView {
        GuestView::table(self.arch.config(self.root()))
    }

    fn table(&self) -> u64 {
        self.next.fetch_add(4096, Ordering::Relaxed)
    }

    /// An entry as it stands.
    pub fn entry(&self, slot: u64) -> u64 {
        self.load(slot)
    }

    /// Writes an entry.
    pub fn set(&self, slot: u64, entry: u64) {
        self.store(slot, entry);
    }

    fn load(&self, address: u64) -> u64 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    fn store(&self, address: u64, entry: u64) {
        self.memory.store(entry, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Where the entry of `iova` is, at a height above the last level (0); tables are made as needed.
    pub fn slot(&self, iova: u64, height: u32) -> u64 {
        let mut table = self.root();
        for above in (height + 1..4).rev() {
            let slot = table + (iova >> (12 + 9 * above) & 0x1ff) * 8;
            if self.load(slot) == 0 {
                self.store(slot, self.arch.table(self.table(), above));
            }
            table = self.arch.next(self.load(slot));
        }
        table + (iova >> (12 + 9 * height) & 0x1ff) * 8
    }

    /// A page of 4 KiB; where its entry is.
    pub fn map(&self, iova: u64, address: u64, writes: bool) -> u64 {
        let slot = self.slot(iova, 0);
        self.store(slot, self.arch.leaf(address, 0, writes));
        slot
    }

    /// The same, for whom it does not matter where.
    pub fn put(&self, iova: u64, address: u64, writes: bool) {
        self.map(iova, address, writes);
    }

    pub fn remove(&self, iova: u64) {
        self.unmap(iova);
    }

    /// A page of 2 MiB, in the place of what was there.
    pub fn map_large(&self, iova: u64, address: u64, writes: bool) -> u64 {
        let slot = self.slot(iova, 1);
        self.store(slot, self.arch.leaf(address, 1, writes));
        slot
    }

    /// A table of pages in the place of a large page.
    pub fn split(&self, iova: u64, address: u64, writes: bool) {
        self.split_but(iova, address, writes, None);
    }

    /// The same, and one of the pages, with this number, has another entry; where the table's entry is.
    pub fn split_but(&self, iova: u64, address: u64, writes: bool, other: Option<(u64, u64)>) -> u64 {
        let table = self.table();
        for index in 0..512 {
            let entry = other.filter(|(number, _)| *number == index).map(|(_, entry)| entry);
            self.store(table + index * 8, entry.unwrap_or(self.arch.leaf(address + (index << 12), 0, writes)));
        }
        let slot = self.slot(iova, 1);
        self.store(slot, self.arch.table(table, 1));
        slot
    }

    /// The root stands elsewhere from now on, and says the same.
    pub fn move_root(&self) {
        let (from, to) = (self.root(), self.table());
        (0..512).for_each(|index| self.store(to + index * 8, self.load(from + index * 8)));
        self.root.store(to, Ordering::Relaxed);
    }

    pub fn unmap(&self, iova: u64) -> u64 {
        let slot = self.slot(iova, 0);
        self.store(slot, 0);
        slot
    }

    pub fn unmap_large(&self, iova: u64) -> u64 {
        let slot = self.slot(iova, 1);
        self.store(slot, 0);
        slot
    }
}
