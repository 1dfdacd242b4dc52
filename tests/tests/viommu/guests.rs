//! Guests of four architectures in real memory, written word by word from the specifications: structures, tables of four levels of 512 entries, commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::{Gpa, Span};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Guest memory is from 0 up to here.
pub const MEMORY: u64 = 32 << 20;
/// Device structures.
pub const STRUCTURES: u64 = 0x10_0000;
/// Tables; one page after the other.
const TABLES: u64 = 0x20_0000;
/// Pages for DMA.
pub const DATA: u64 = 0x80_0000;

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    Smmu,
    Vtd,
    Amd,
    Riscv,
}

impl Arch {
    pub const ALL: [Self; 4] = [Self::Smmu, Self::Vtd, Self::Amd, Self::Riscv];

    pub const fn kind(self) -> &'static str {
        match self {
            Self::Smmu => "arm-smmuv3",
            Self::Vtd => "intel-vtd",
            Self::Amd => "amd-vi",
            Self::Riscv => "riscv-iommu",
        }
    }

    pub fn registers(self) -> Vec<(String, u64)> {
        self.registers_at(STRUCTURES)
    }

    /// The same with device structures at another address.
    pub fn registers_at(self, structures: u64) -> Vec<(String, u64)> {
        let registers: &[(&str, u64)] = match self {
            // IDR0: both stages, AArch64 tables, ASID16, VMID16, two-level CDs and STEs, both byte orders; IDR1: 16 bits of StreamID, 8 of SubstreamID;
            // IDR3: HAD, RIL; IDR5: 48 bits, all granules. CR0: SMMUEN and both queues. A linear table of 256 STEs.
            Self::Smmu => &[
                ("IDR0", 0x090c_109b),
                ("IDR1", 8 << 6 | 16),
                ("IDR3", 1 << 2 | 1 << 10),
                ("IDR5", 0x75),
                ("CR0", 0b1101),
                ("CR2", 0),
                ("STRTAB_BASE_CFG", 8),
                ("STRTAB_BASE", structures),
            ],
            // CAP: 39 and 48 bits; MGAW 48. ECAP: pass-through (6), queue. Legacy mode. Translation enabled (31), root table set (30).
            Self::Vtd => &[
                ("VER", 0x10),
                ("CAP", 0b0110 << 8 | 47 << 16 | 0b11 << 34),
                ("ECAP", 1 << 1 | 1 << 6),
                ("GSTS", 0xc000_0000),
                ("RTADDR", structures),
                ("IQA", 0),
            ],
            // 128 devices; IommuEn.
            Self::Amd => &[("DEVTAB_BASE", structures), ("CONTROL", 1), ("EXT_FEATURES", 0x1_0000_e9d3)],
            // Sv39 to Sv57, 56 address bits; one level of 128 device contexts.
            Self::Riscv => &[("CAPABILITIES", 0x10 | 0xe << 8 | 0xe << 16 | 56 << 32), ("FCTL", 0), ("DDTP", structures >> 12 << 10 | 2)],
        };
        registers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect()
    }

    /// The registers of a unit that has a queue of page requests.
    pub fn registers_with_requests(self) -> Vec<(String, u64)> {
        // IDR0.PRI; ECAP.PRS; EFR.PPRSup; capabilities.ATS.
        let (name, bit) = match self {
            Self::Smmu => ("IDR0", 16),
            Self::Vtd => ("ECAP", 29),
            Self::Amd => ("EXT_FEATURES", 1),
            Self::Riscv => ("CAPABILITIES", 25),
        };
        self.registers_and(&[(name, 1 << bit)])
    }

    /// With these bits set as well.
    pub fn registers_and(self, bits: &[(&str, u64)]) -> Vec<(String, u64)> {
        let mut registers = self.registers();
        for (name, bits) in bits {
            registers.iter_mut().filter(|(known, _)| known == name).for_each(|(_, value)| *value |= bits);
        }
        registers
    }

    /// What a driver reads of a page request without PASID: whose, the page, whether it writes, the group, and whether it is its last.
    pub fn requested(self, record: &[u8]) -> (u64, u64, bool, u64, bool) {
        let word = |index: usize| u64::from_le_bytes(record[index * 8..index * 8 + 8].try_into().unwrap());
        let (low, high) = (word(0), word(1));
        let page = high & !0xfff;
        match self {
            Self::Smmu => (low & 0xffff_ffff, page, low >> 61 & 1 == 1, high & 0x1ff, low >> 62 & 1 == 1),
            Self::Vtd => (low >> 16 & 0xffff, page, high >> 1 & 1 == 1, high >> 3 & 0x1ff, high >> 2 & 1 == 1),
            Self::Amd => (low & 0xffff, page, low >> 53 & 1 == 1, low >> 32 & 0x1ff, low >> 41 & 1 == 1),
            Self::Riscv => (low >> 40, page, high >> 1 & 1 == 1, high >> 3 & 0x1ff, high >> 2 & 1 == 1),
        }
    }

    /// The driver's answer to a group: whether the device tries again.
    pub fn answer(self, id: u64, group: u64, success: bool) -> Vec<u8> {
        let invalid = u64::from(!success);
        words(&match self {
            // CMD_PRI_RESP: success is 2, an invalid request 1.
            Self::Smmu => [0x41 | id << 32, group | (2 - invalid) << 12],
            // Page group response.
            Self::Vtd => [9 | invalid << 12 | id << 16, group << 3],
            // COMPLETE_PPR_REQUEST.
            Self::Amd => [7 << 60 | id, group << 32 | invalid << 44],
            // ATS.PRGR.
            Self::Riscv => [4 | 1 << 7 | id << 40, group << 32 | invalid << 44],
        })
    }

    fn table(self, address: u64, height: u32) -> u64 {
        match self {
            Self::Smmu | Self::Vtd => address | 3,
            // PR, NextLevel, IR, IW.
            Self::Amd => address | 1 | u64::from(height) << 9 | 3 << 61,
            Self::Riscv => address >> 2 | 1,
        }
    }

    /// The entry of a page of 4 KiB.
    pub fn page(self, address: u64, writable: bool) -> u64 {
        match self {
            // AttrIndx 0, AP[1], AP[2] for read-only, SH 3, AF, nG.
            Self::Smmu => address | 3 | 1 << 6 | u64::from(!writable) << 7 | 3 << 8 | 3 << 10,
            Self::Vtd => address | 1 | u64::from(writable) << 1,
            Self::Amd => address | 1 | 1 << 61 | u64::from(writable) << 62,
            // V, R, W, U, A, D.
            Self::Riscv => address >> 2 | 0b1101_0011 | u64::from(writable) << 2,
        }
    }

    fn address(self, entry: u64) -> u64 {
        match self {
            Self::Riscv => (entry >> 10 & ((1 << 44) - 1)) << 12,
            _ => entry & 0x000f_ffff_ffff_f000,
        }
    }

    /// Forget one page of an address space, as drivers ask for it.
    pub fn forget_page(self, space: u16, iova: u64) -> Vec<u8> {
        let space = u64::from(space);
        words(&match self {
            // TLBI_NH_VA, VMID 0, leaf.
            Self::Smmu => [0x12 | space << 48, iova | 1],
            // IOTLB, pages of a domain, AM 0.
            Self::Vtd => [2 | 3 << 4 | space << 16, iova],
            // INVALIDATE_IOMMU_PAGES of a domain.
            Self::Amd => [3 << 60 | space << 32, iova],
            // IOTINVAL.VMA with AV and PSCV.
            Self::Riscv => [1 | 1 << 10 | space << 12 | 1 << 32, iova >> 12 << 10],
        })
    }

    /// The device's structures changed.
    pub fn forget_device(self, id: u64, space: u16) -> Vec<u8> {
        words(&match self {
            // CFGI_STE.
            Self::Smmu => [3 | id << 32, 1],
            // Context cache, one device, all functions' bits count.
            Self::Vtd => [1 | 3 << 4 | u64::from(space) << 16 | id << 32, 0],
            Self::Amd => [2 << 60 | id, 0],
            // IODIR.INVAL_DDT with DV.
            Self::Riscv => [3 | 1 << 33 | id << 40, 0],
        })
    }

    /// A wait, which every driver puts behind its commands.
    pub fn wait(self) -> Vec<u8> {
        words(&match self {
            Self::Smmu => [0x46, 0],
            Self::Vtd => [5, 0],
            Self::Amd => [1 << 60, 0],
            Self::Riscv => [2, 0],
        })
    }

    /// The record of a read or write of an IOVA that nothing is mapped at, in the last level of a space's table.
    pub fn nothing_mapped(self, id: u64, space: u16, iova: u64, write: bool) -> Vec<u8> {
        let read = u64::from(!write);
        match self {
            // F_TRANSLATION; RnW; class IN.
            Self::Smmu => words(&[0x10 | id << 32, read << 35 | 2 << 40, iova, 0]),
            // Fault reason 6 for reads and 5 for writes; T1 for reads; F.
            Self::Vtd => words(&[iova & !0xfff, id | (5 + read) << 32 | read << 62 | 1 << 63]),
            // IO_PAGE_FAULT.
            Self::Amd => words(&[2 << 60 | id | u64::from(space) << 32, iova]),
            // Page fault 13 or 15, TTYP 2 or 3.
            Self::Riscv => words(&[(15 - 2 * read) | (3 - read) << 34 | id << 40, 0, iova, 0]),
        }
    }
}

pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A guest.
pub struct Guest {
    pub arch: Arch,
    pub memory: GuestMemoryMmap,
    /// Where its device structures are.
    pub structures: u64,
    next: AtomicU64,
}

impl Guest {
    pub fn new(arch: Arch) -> Self {
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY as usize)]).unwrap();
        Self { arch, memory, structures: STRUCTURES, next: AtomicU64::new(TABLES) }
    }

    /// The same guest in the memory of another machine.
    pub fn moved(&self) -> Self {
        let there = Self { next: AtomicU64::new(self.next.load(Ordering::Relaxed)), structures: self.structures, ..Self::new(self.arch) };
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        there.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        there
    }

    pub fn map() -> Arc<MemoryMap> {
        Arc::new(MemoryMap::new(vec![Region { kind: Kind::Ram, span: Span { first: 0, last: MEMORY - 1 } }]).unwrap())
    }

    pub fn load(&self, address: u64) -> u64 {
        self.memory.load(GuestAddress(address), Ordering::Acquire).unwrap()
    }

    pub fn store(&self, address: u64, word: u64) {
        self.memory.store(word, GuestAddress(address), Ordering::Release).unwrap();
    }

    /// Tables are made from here on; where they would have been made.
    pub fn tables_from(&self, address: u64) -> u64 {
        self.next.swap(address, Ordering::Relaxed)
    }

    pub fn new_table(&self) -> u64 {
        self.next.fetch_add(4096, Ordering::Relaxed)
    }

    /// Where the entry of a page is; tables are made as needed.
    pub fn slot(&self, root: u64, iova: u64) -> Gpa {
        self.slot_at(root, iova, 0)
    }

    /// The same, so many levels above the last one.
    pub fn slot_at(&self, root: u64, iova: u64, height: u32) -> Gpa {
        let mut table = root;
        for height in (height + 1..4).rev() {
            let slot = table + (iova >> (12 + 9 * height) & 0x1ff) * 8;
            if self.load(slot) == 0 {
                self.store(slot, self.arch.table(self.new_table(), height));
            }
            table = self.arch.address(self.load(slot));
        }
        Gpa(table + (iova >> (12 + 9 * height) & 0x1ff) * 8)
    }

    /// The same in a first-stage table of x86, which AMD's guests and Intel's have: pointers are present, writable and a user's.
    pub fn first_stage_slot(&self, root: u64, iova: u64) -> Gpa {
        let mut table = root;
        for shift in [39, 30, 21] {
            let slot = table + (iova >> shift & 0x1ff) * 8;
            if self.load(slot) == 0 {
                self.store(slot, self.new_table() | 7);
            }
            table = self.load(slot) & 0x000f_ffff_ffff_f000;
        }
        Gpa(table + (iova >> 12 & 0x1ff) * 8)
    }

    /// Maps a page, and says where the entry is.
    pub fn map_page(&self, root: u64, iova: u64, address: u64, writable: bool) -> Gpa {
        let slot = self.slot(root, iova);
        self.store(slot.0, self.arch.page(address, writable));
        slot
    }

    pub fn unmap_page(&self, root: u64, iova: u64) -> Gpa {
        let slot = self.slot(root, iova);
        self.store(slot.0, 0);
        slot
    }

    /// Where a device's structure is that says what its DMA gets. (VT-d's context tables, and SMMUv3's CDs, are made on the way.)
    pub fn structure(&self, id: u64) -> u64 {
        match self.arch {
            Arch::Smmu => self.structures + id * 64,
            Arch::Vtd => {
                let root = self.structures + (id >> 8) * 16;
                if self.load(root) == 0 {
                    self.store(root, self.new_table() | 1);
                }
                (self.load(root) & !0xfff) + (id & 0xff) * 16
            }
            Arch::Amd | Arch::Riscv => self.structures + id * 32,
        }
    }

    fn write_structure(&self, id: u64, words: &[u64]) {
        let at = self.structure(id);
        // The word that makes it valid comes last.
        for (index, word) in words.iter().enumerate().rev() {
            self.store(at + index as u64 * 8, *word);
        }
    }

    /// A device's DMA goes by the table at `root`, which commands call `space`.
    pub fn translate(&self, id: u64, root: u64, space: u16) {
        let number = u64::from(space);
        match self.arch {
            Arch::Smmu => {
                let cd = self.new_table();
                self.write_cd(cd, root, space);
                // V, Config 5.
                self.write_structure(id, &[1 | 5 << 1 | cd, 0, 0, 0]);
            }
            // AW 2 is 48 bits; DID.
            Arch::Vtd => self.write_structure(id, &[root | 1, 2 | number << 8]),
            // V, TV, mode 4, IR, IW; domain.
            Arch::Amd => self.write_structure(id, &[root | 3 | 4 << 9 | 3 << 61, number, 0, 0]),
            // V; PSCID; Sv48.
            Arch::Riscv => self.write_structure(id, &[1, 0, number << 12, 9 << 60 | root >> 12]),
        }
    }

    /// A context descriptor: T0SZ 16, 4K, EPD1, V, 48 bits, AArch64, no faults for others; ASID; MAIR 0xff.
    pub fn write_cd(&self, cd: u64, root: u64, space: u16) {
        let low = 16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | u64::from(space) << 48;
        self.store(cd + 8, root);
        self.store(cd + 24, 0xff);
        self.store(cd, low);
    }

    pub fn bypass(&self, id: u64) {
        match self.arch {
            Arch::Smmu => self.write_structure(id, &[1 | 4 << 1, 1 << 44, 0, 0]),
            // Pass-through.
            Arch::Vtd => self.write_structure(id, &[1 | 2 << 2, 2 | 1 << 8]),
            // V, TV, mode 0, IR, IW.
            Arch::Amd => self.write_structure(id, &[3 | 3 << 61, 0, 0, 0]),
            Arch::Riscv => self.write_structure(id, &[1, 0, 0, 0]),
        }
    }

    pub fn abort(&self, id: u64) {
        match self.arch {
            Arch::Smmu => self.write_structure(id, &[1, 0, 0, 0]),
            Arch::Vtd | Arch::Riscv => self.write_structure(id, &[0, 0]),
            // V, and nothing granted.
            Arch::Amd => self.write_structure(id, &[3, 0, 0, 0]),
        }
    }
}
