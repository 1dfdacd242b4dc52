//! Commands that a guest's driver writes when something changed: bytes, from the specifications.

use super::structures::{Name, Structures, id};
use crate::guests::{Arch, words};

/// What is to be forgotten of an address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// A page, and with `false` the tables on the way to it.
    Page(u64, bool),
    All,
}

impl Structures {
    /// Everything.
    pub fn forget_everything(&self) -> Vec<Vec<u8>> {
        let commands: &[[u64; 2]] = match self.arch {
            // TLBI_NSNH_ALL.
            Arch::Smmu => &[[0x30, 0]],
            // A global flush of the IOTLB.
            Arch::Vtd => &[[2 | 1 << 4, 0]],
            // INVALIDATE_IOMMU_ALL.
            Arch::Amd => &[[8 << 60, 0]],
            // IOTINVAL.VMA without AV and PSCV, IOTINVAL.GVMA without GV.
            Arch::Riscv => &[[1, 0], [1 | 1 << 7, 0]],
        };
        commands.iter().map(|command| words(command)).collect()
    }

    /// Translations of a first stage, with what is behind it.
    pub fn forget_first(&self, (domain, space): Name, is_nested: bool, extent: Extent) -> Vec<u8> {
        let number = space.unwrap_or(0);
        let (page, leaf) = match extent {
            Extent::Page(iova, leaf) => (Some(iova & !0xfff), u64::from(leaf)),
            Extent::All => (None, 0),
        };
        words(&match (self.arch, page) {
            // TLBI_NH_VA, TLBI_NH_ASID.
            (Arch::Smmu, Some(page)) => [0x12 | domain << 32 | number << 48, page | leaf],
            (Arch::Smmu, None) => [0x11 | domain << 32 | number << 48, 0],
            // PASID-based: pages with IH, all.
            (Arch::Vtd, Some(page)) => [6 | 3 << 4 | domain << 16 | number << 32, page | leaf << 6],
            (Arch::Vtd, None) => [6 | 2 << 4 | domain << 16 | number << 32, 0],
            // GN; PDE, S. Without a PASID IOVAs have 48 bits.
            (Arch::Amd, Some(page)) => {
                let page = if number == 0 { page & 0xffff_ffff_f000 } else { page };
                [3 << 60 | domain << 32 | number, page | 1 << 2 | (1 - leaf) << 1]
            }
            (Arch::Amd, None) => [3 << 60 | domain << 32 | number, 0x7fff_ffff_ffff_f007],
            // IOTINVAL.VMA with AV, PSCV, GV.
            (Arch::Riscv, page) => {
                let guest = if is_nested { 1 << 33 | domain << 44 } else { 0 };
                [1 | u64::from(page.is_some()) << 10 | number << 12 | 1 << 32 | guest, page.unwrap_or(0) >> 12 << 10]
            }
        })
    }

    /// Translations of a second stage; `is_behind` a first one, then of what that has as well.
    pub fn forget_second(&self, domain: u64, is_behind: bool, extent: Extent) -> Vec<Vec<u8>> {
        let (page, leaf) = match extent {
            Extent::Page(address, leaf) => (Some(address & !0xfff), u64::from(leaf)),
            Extent::All => (None, 0),
        };
        let second = match (self.arch, page) {
            // TLBI_S2_IPA, TLBI_S12_VMALL.
            (Arch::Smmu, Some(page)) => [0x2a | domain << 32, page | leaf],
            (Arch::Smmu, None) => [0x28 | domain << 32, 0],
            // Pages of a domain, all of it.
            (Arch::Vtd, Some(page)) => [2 | 3 << 4 | domain << 16, page | leaf << 6],
            (Arch::Vtd, None) => [2 | 2 << 4 | domain << 16, 0],
            (Arch::Amd, Some(page)) => [3 << 60 | domain << 32, page | (1 - leaf) << 1],
            (Arch::Amd, None) => [3 << 60 | domain << 32, 0x7fff_ffff_ffff_f003],
            // IOTINVAL.GVMA with AV, GV.
            (Arch::Riscv, page) => [1 | 1 << 7 | u64::from(page.is_some()) << 10 | 1 << 33 | domain << 44, page.unwrap_or(0) >> 12 << 10],
        };
        let first = match self.arch {
            // TLBI_NH_ALL.
            Arch::Smmu => Some([0x10 | domain << 32, 0]),
            // IOTINVAL.VMA of a guest.
            Arch::Riscv => Some([1 | 1 << 33 | domain << 44, 0]),
            _ => None,
        };
        [Some(second), first.filter(|_| is_behind)].into_iter().flatten().map(|command| words(&command)).collect()
    }

    /// A context was written; `number` tells how much else may go with it.
    pub fn forget_context(&self, device: usize, pasid: u32, (domain, _): Name, number: u64) -> Vec<u8> {
        let (id, pasid) = (id(device), u64::from(pasid));
        words(&match (self.arch, number % 4) {
            // CFGI_STE, CFGI_CD_ALL, CFGI_CD.
            (Arch::Smmu, 0) => [3 | id << 32, 1],
            (Arch::Smmu, 1) => [6 | id << 32, 0],
            (Arch::Smmu, _) => [5 | 1 << 11 | pasid << 12 | id << 32, 0],
            // PASID cache: all, of a domain, of a PASID of it.
            (Arch::Vtd, 0) => [7 | 3 << 4, 0],
            (Arch::Vtd, 1) => [7 | domain << 16, 0],
            (Arch::Vtd, _) => [7 | 1 << 4 | domain << 16 | pasid << 32, 0],
            // The device table entry, or as drivers do it all pages of a PASID.
            (Arch::Amd, 0) => [2 << 60 | id, 0],
            (Arch::Amd, _) => [3 << 60 | domain << 32 | pasid, 0x7fff_ffff_ffff_f007],
            // IODIR.INVAL_DDT, IODIR.INVAL_PDT.
            (Arch::Riscv, 0) => [3 | 1 << 33 | id << 40, 0],
            (Arch::Riscv, _) => [3 | 1 << 7 | pasid << 12 | 1 << 33 | id << 40, 0],
        })
    }

    /// A device's own structure was written; it had these domains.
    pub fn forget_device(&self, device: usize, domains: &[u64], number: u64) -> Vec<Vec<u8>> {
        let id = id(device);
        let one = |command: [u64; 2]| vec![words(&command)];
        match self.arch {
            // CFGI_STE_RANGE of all, of eight; CFGI_STE.
            Arch::Smmu => match number % 4 {
                0 => one([4, 31]),
                1 => one([4 | (id & !7) << 32, 2]),
                _ => one([3 | id << 32, 1]),
            },
            // Context cache, one device: with the domain that it had in legacy mode; in scalable mode no entry has one, and nothing is what drivers say.
            Arch::Vtd if self.is_legacy() => {
                let known = domains.first().copied().unwrap_or(1);
                one([1 | 3 << 4 | known << 16 | id << 32, 0])
            }
            // And the PASIDs of its domains, or all.
            Arch::Vtd => {
                let pasids =
                    if number.is_multiple_of(2) { vec![[7 | 3 << 4, 0]] } else { domains.iter().map(|domain| [7 | domain << 16, 0]).collect() };
                [[1 | 3 << 4 | id << 32, 0]].into_iter().chain(pasids).map(|command| words(&command)).collect()
            }
            Arch::Amd => one([2 << 60 | id, 0]),
            // IODIR.INVAL_DDT with DV.
            Arch::Riscv => one([3 | 1 << 33 | id << 40, 0]),
        }
    }
}
