//! Units: pieces of IOMMU hardware, with what they can do and what they cached.

use std::sync::{Arc, RwLock};

use super::cache::Caches;
use super::lock::write;
use crate::Span;
use crate::kernel::{HwCapabilities, HwInfo, hw_info_type};

/// What architecture a unit has, with the registers that say what it can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnitKind {
    /// Intel VT-d, by its capability registers (VT-d specification sections 11.4.2 and 11.4.3).
    Vtd {
        /// `IOMMU_HW_INFO_VTD_*`; 1 is erratum 772415.
        flags: u32,
        /// CAP_REG.
        cap: u64,
        /// ECAP_REG.
        ecap: u64,
    },
    /// Arm SMMUv3, by its identification registers (IHI 0070 section 6.3).
    Smmuv3 {
        /// IDR0 to IDR5.
        idr: [u32; 6],
        /// IIDR.
        iidr: u32,
        /// AIDR.
        aidr: u32,
    },
    /// AMD, by its extended feature registers (AMD IOMMU specification, MMIO offsets 0x30 and 0x1a0).
    Amd {
        /// EFR.
        efr: u64,
        /// EFR2.
        efr2: u64,
    },
    /// RISC-V, by its `capabilities` register (RISC-V IOMMU specification section 6.3).
    Riscv {
        /// The register.
        capabilities: u64,
    },
}

/// A unit to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnitConfig {
    /// For messages.
    pub name: String,
    /// Its architecture.
    pub kind: UnitKind,
    /// IOVAs that the kernel's own tables can translate.
    pub aperture: Span,
    /// IOVAs that the unit keeps for itself: interrupt windows. No area may be there while a device behind the unit is attached.
    pub reserved: Vec<Span>,
    /// Smallest page of the kernel's own tables, bytes.
    pub page_size: u64,
    /// Takes tables that user space owns.
    pub nesting: bool,
    /// Can record which pages were written.
    pub dirty_tracking: bool,
    /// Also in page tables that nested ones stand on: not every driver can.
    pub dirty_tracking_nested: bool,
    /// Log2 of the number of PASIDs; 0 is none.
    pub pasid_log2: u8,
    /// So many entries its caches hold. At the limit DMA fails ([`Reason::CacheFull`](super::Reason::CacheFull)); nothing is evicted.
    pub cache_limit: usize,
}

const CACHE_LIMIT: usize = 1 << 22;
/// Where x86 machines deliver interrupts.
const X86_INTERRUPTS: Span = Span { first: 0xfee0_0000, last: 0xfeef_ffff };

impl UnitConfig {
    /// VT-d with everything: scalable mode, nesting, 4 and 5 levels, 1G pages, accessed and dirty bits, PASIDs.
    #[must_use]
    pub fn vtd(name: &str) -> Self {
        // SAGAW 39, 48 and 57 bits; MGAW 57; SLLPS 2M and 1G; FL1GP (56); FL5LP (60).
        let cap = 0b1110 << 8 | 56 << 16 | 0b11 << 34 | 1 << 56 | 1 << 60;
        // C, QI, IR, EIM, SC (7), NEST (26), PRS (29), SRS (31), PSS 19 (39:35), PASID (40), SMTS (43), SLADS (45), SLTS (46), FLTS (47), SMPWC (48).
        let ecap = 0x9b | 1 << 26 | 1 << 29 | 1 << 31 | 19 << 35 | 1 << 40 | 1 << 43 | 1 << 45 | 1 << 46 | 1 << 47 | 1 << 48;
        Self::new(name, UnitKind::Vtd { flags: 0, cap, ecap }, 57, vec![X86_INTERRUPTS])
    }

    /// SMMUv3.3 with both stages, all granules, 52-bit addresses, hardware updates of access flag and dirty state, range invalidation, substreams.
    #[must_use]
    pub fn smmuv3(name: &str) -> Self {
        // IDR0: S2P, S1P, TTF AArch64, COHACC, BTM clear, HTTU 2 (7:6), ATS, ASID16 (12), VMID16 (18), CD2L (19), stall forced off, TTENDIAN mixed,
        // two-level streams.
        let idr0 = 0b11 | 0b10 << 2 | 1 << 4 | 2 << 6 | 1 << 10 | 1 << 12 | 1 << 16 | 1 << 18 | 1 << 19 | 1 << 24 | 1 << 27;
        // IDR1: SIDSIZE 16, SSIDSIZE 20.
        let idr1 = 16 | 20 << 6;
        // IDR3: HAD (2), RIL (10).
        let idr3 = 1 << 2 | 1 << 10;
        // IDR5: OAS 52 bits (6), 4K, 16K, 64K, DS (7), VAX 52 (11:10).
        let idr5 = 6 | 0b111 << 4 | 1 << 7 | 1 << 10;
        let reserved = vec![Span { first: 0x0800_0000, last: 0x080f_ffff }];
        Self::new(name, UnitKind::Smmuv3 { idr: [idr0, idr1, 0, idr3, 0, idr5], iidr: 0, aidr: 3 }, 48, reserved)
    }

    /// AMD with guest translation of 4 and 5 levels, and three GCR3 levels.
    #[must_use]
    pub fn amd(name: &str) -> Self {
        // PreF, PPR, NX, GT (4), IA; HATS 48+ (11:10 = 2), GATS 5 levels (13:12 = 1), GLX 3 levels (15:14 = 2), PASmax 19 (36:32), GIOSup (48).
        let efr = 0b1_1011 | 1 << 6 | 2 << 10 | 1 << 12 | 2 << 14 | 19 << 32 | 1 << 48;
        // The guest CR3 table's address is a guest-physical one: GCR3TRPMode.
        let efr2 = 1 << 3;
        let mut config = Self::new(name, UnitKind::Amd { efr, efr2 }, 64, vec![X86_INTERRUPTS, Span { first: 0xfd_0000_0000, last: 0xff_ffff_ffff }]);
        config.aperture = Span::ALL;
        config
    }

    /// RISC-V with Sv39, Sv48 and Sv57, Svnapot, Svpbmt, hardware updates, process directories of all sizes. The real kernel nests nothing there.
    #[must_use]
    pub fn riscv(name: &str) -> Self {
        // Version 1.0; Sv39, Sv48, Sv57 (9, 10, 11); Svpbmt (15); Sv39x4 .. Sv57x4 (17 .. 19); AMO_HWAD (24); PAS 56 (37:32); PD8, PD17, PD20 (38 ..
        // 40); NL (42); S (43).
        let capabilities = 0x10 | 0b111 << 9 | 1 << 15 | 0b111 << 17 | 1 << 24 | 56 << 32 | 0b111 << 38 | 1 << 42;
        Self::new(name, UnitKind::Riscv { capabilities }, 56, vec![Span { first: 0x2800_0000, last: 0x28ff_ffff }])
    }

    fn new(name: &str, kind: UnitKind, aperture_bits: u8, reserved: Vec<Span>) -> Self {
        Self {
            name: name.to_owned(),
            kind,
            aperture: Span::of_log2(0, aperture_bits),
            reserved,
            page_size: 4096,
            nesting: true,
            dirty_tracking: true,
            dirty_tracking_nested: true,
            pasid_log2: 20,
            cache_limit: CACHE_LIMIT,
        }
    }

    /// The same without nesting: a unit that takes map and unmap only. The registers say so too.
    #[must_use]
    pub fn without_nesting(mut self) -> Self {
        self.nesting = false;
        match &mut self.kind {
            UnitKind::Vtd { ecap, .. } => *ecap &= !(1 << 26),
            UnitKind::Smmuv3 { idr, .. } => idr[0] &= !0b10,
            UnitKind::Amd { efr, .. } => *efr &= !(1 << 4),
            UnitKind::Riscv { .. } => {}
        }
        self
    }

    /// What GET_HW_INFO says.
    #[must_use]
    pub fn hw_info(&self) -> HwInfo {
        let mut data = Vec::new();
        let mut words = |words: &[u32]| data.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
        let halves = |word: u64| {
            let bytes = word.to_ne_bytes();
            [[bytes[0], bytes[1], bytes[2], bytes[3]], [bytes[4], bytes[5], bytes[6], bytes[7]]].map(u32::from_ne_bytes)
        };
        let data_type = match self.kind {
            UnitKind::Vtd { flags, cap, ecap } => {
                words(&[flags, 0]);
                words(&halves(cap));
                words(&halves(ecap));
                hw_info_type::INTEL_VTD
            }
            UnitKind::Smmuv3 { idr, iidr, aidr } => {
                words(&[0, 0]);
                words(&idr);
                words(&[iidr, aidr]);
                hw_info_type::ARM_SMMUV3
            }
            UnitKind::Amd { efr, efr2 } => {
                words(&halves(efr));
                words(&halves(efr2));
                hw_info_type::AMD
            }
            // The register does not tell: nothing is said, as the real kernel does.
            UnitKind::Riscv { .. } if !self.nesting => hw_info_type::NONE,
            UnitKind::Riscv { capabilities } => {
                words(&halves(capabilities));
                hw_info_type::SIM_RISCV
            }
        };
        let capabilities = if self.dirty_tracking { HwCapabilities::DIRTY_TRACKING } else { HwCapabilities::NONE };
        HwInfo { data_type, data, capabilities, max_pasid_log2: self.pasid_log2 }
    }
}

/// A unit.
#[derive(Debug)]
pub(super) struct Unit {
    pub(super) config: UnitConfig,
    pub(super) caches: Caches,
    /// Held for reading by each transaction from its first look-up until its last byte is transferred; taken for writing, for a moment, by everything
    /// that promises that no transaction uses the old state any more. Kernel calls never hold it while they change something.
    pub(super) gate: RwLock<()>,
}

impl Unit {
    pub(super) fn new(config: UnitConfig) -> Arc<Self> {
        let caches = Caches::new(config.cache_limit);
        Arc::new(Self { config, caches, gate: RwLock::new(()) })
    }

    /// Waits until all transactions that began before have ended.
    pub(super) fn drain(&self) {
        drop(write(&self.gate));
    }
}
