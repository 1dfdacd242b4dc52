//! Tables that user space owns: stale until invalidated, right afterwards, for each architecture.

use super::{BASE, Lab, PAGE, SIZE};
use crate::Iova;
use crate::kernel::handle::{Attachment, Device, EventQueue, Hwpt, Ioas, PageTable, Vdevice, Viommu};
use crate::kernel::sim::{DmaAccess, Fault, Reason, Stage, UnitConfig, UnitIndex, UnitKind};
use crate::kernel::{DirtyFlags, DirtyRange, Errno, HwptFlags, Invalidate, InvalidateTarget, Pasid, hwpt_data, invalidate_data, viommu_type};

/// Where the tests put structures and tables.
const CONTEXT: u64 = BASE + 0x10_0000;
const ROOT: u64 = BASE + 0x20_0000;
const TARGET: u64 = BASE + 0x40_0000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arch {
    Vtd,
    Arm,
    Amd,
    Riscv,
}

pub(super) const ALL: [Arch; 4] = [Arch::Vtd, Arch::Arm, Arch::Amd, Arch::Riscv];

/// A machine of one unit, with a nested page table of four levels (4K pages) that is attached.
pub(super) struct Rig {
    pub(super) arch: Arch,
    pub(super) lab: Lab,
    pub(super) dma: crate::kernel::sim::Device,
    attachment: Attachment,
    nested: Hwpt,
    viommu: Option<(Viommu, Vdevice)>,
    pub(super) parent: Hwpt,
    ioas: Ioas,
    pub(super) device: Device,
    next_table: std::cell::Cell<u64>,
}

impl Rig {
    pub(super) fn new(arch: Arch) -> Self {
        Self::with(arch, HwptFlags::NONE)
    }

    pub(super) fn with(arch: Arch, flags: HwptFlags) -> Self {
        let unit = match arch {
            Arch::Vtd => UnitConfig::vtd("unit"),
            Arch::Arm => UnitConfig::smmuv3("unit"),
            Arch::Amd => UnitConfig::amd("unit"),
            Arch::Riscv => UnitConfig::riscv("unit"),
        };
        let lab = Lab::new(vec![unit]);
        let (device, ioas, parent) = lab.parent("dev0", flags);
        let viommu = arch.viommu_type().map(|kind| {
            let viommu = parent.viommu(&device, kind).unwrap();
            let vdevice = viommu.vdevice(&device, 0x42).unwrap();
            (viommu, vdevice)
        });
        arch.write_context(&lab, ROOT, 7);
        let nested = arch.nested(&parent, viommu.as_ref().map(|(viommu, _)| viommu), &device, ROOT);
        let attachment = device.attach(None, PageTable::Hwpt(&nested)).unwrap();
        let dma = lab.sim.device("dev0").unwrap();
        Self { arch, lab, dma, attachment, nested, viommu, parent, ioas, device, next_table: std::cell::Cell::new(ROOT + PAGE) }
    }

    /// Sets the entry of `iova` at a height above the last level (0), with tables as needed; 0 makes it absent.
    pub(super) fn set(&self, iova: u64, height: u32, entry: u64) {
        let mut table = ROOT;
        for above in (height + 1..4).rev() {
            let slot = table + (iova >> (12 + 9 * above) & 0x1ff) * 8;
            if self.lab.load(slot) == 0 {
                let fresh = self.next_table.replace(self.next_table.get() + PAGE);
                self.lab.store(slot, self.arch.table(fresh));
            }
            table = self.arch.address(self.lab.load(slot));
        }
        self.lab.store(table + (iova >> (12 + 9 * height) & 0x1ff) * 8, entry);
    }

    pub(super) fn slot(&self, iova: u64, height: u32) -> u64 {
        let mut table = ROOT;
        for above in (height + 1..4).rev() {
            table = self.arch.address(self.lab.load(table + (iova >> (12 + 9 * above) & 0x1ff) * 8));
        }
        table + (iova >> (12 + 9 * height) & 0x1ff) * 8
    }

    pub(super) fn leaf(&self, iova: u64, target: u64) {
        self.set(iova, 0, self.arch.leaf(target, 0, true));
    }

    pub(super) fn reached(&self, iova: u64) -> Result<u64, (Reason, Stage)> {
        self.access(iova, DmaAccess::Read)
    }

    pub(super) fn access(&self, iova: u64, access: DmaAccess) -> Result<u64, (Reason, Stage)> {
        self.dma.translate(None, Iova(iova), access).map(|found| found.address.0).map_err(|fault| (fault.reason, fault.stage))
    }

    pub(super) fn cached(&self) -> usize {
        self.lab.sim.cached(UnitIndex(0))
    }

    /// One page, or all; leaves only or tables too.
    pub(super) fn invalidate(&self, page: Option<u64>, leaf_only: bool) {
        let leaf = u64::from(leaf_only);
        let words = match (self.arch, page) {
            (Arch::Vtd, Some(iova)) => vec![iova, 1, leaf],
            (Arch::Vtd, None) => vec![0, u64::MAX, 0],
            (Arch::Arm, Some(iova)) => vec![0x12 | 7 << 48, iova | leaf],
            (Arch::Arm, None) => vec![0x11 | 7 << 48, 0],
            (Arch::Amd, Some(iova)) => vec![3 << 60 | 7 << 32, iova | 4 | (1 - leaf) << 1],
            (Arch::Amd, None) => vec![3 << 60 | 7 << 32, 0x7fff_ffff_ffff_f007],
            (Arch::Riscv, Some(iova)) => vec![1 | 1 << 10 | 7 << 12 | 1 << 32 | (1 - leaf) << 34, iova >> 2],
            (Arch::Riscv, None) => vec![1 | 7 << 12 | 1 << 32, 0],
        };
        assert_eq!(self.send(&words), Ok(1));
    }

    pub(super) fn send(&self, words: &[u64]) -> Result<u32, (u32, Errno)> {
        let entries: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let (target, data_type, entry_length) = match (self.arch, &self.viommu) {
            (Arch::Vtd, _) | (_, None) => (InvalidateTarget::Hwpt(self.nested.id()), invalidate_data::VTD_S1, 24),
            (Arch::Arm, Some((viommu, _))) => (InvalidateTarget::Viommu(viommu.id()), invalidate_data::ARM_SMMUV3, 16),
            (Arch::Amd, Some((viommu, _))) => (InvalidateTarget::Viommu(viommu.id()), invalidate_data::SIM_AMD, 16),
            (Arch::Riscv, Some((viommu, _))) => (InvalidateTarget::Viommu(viommu.id()), invalidate_data::SIM_RISCV, 16),
        };
        let request = Invalidate { target, data_type, entry_length, entries: &entries };
        self.lab.kernel.hwpt_invalidate(&request).map_err(|error| (error.handled, error.errno))
    }

    pub(super) fn event_queue(&self, kind: u32, depth: u32) -> EventQueue {
        self.viommu.as_ref().unwrap().0.event_queue(kind, depth).unwrap()
    }

    /// Drops the context structures of the device.
    fn invalidate_context(&self) {
        match self.arch {
            Arch::Vtd => {}
            Arch::Arm => drop(self.send(&[0x05 | 0x42 << 32, 1]).unwrap()),
            Arch::Amd => drop(self.send(&[2 << 60 | 0x42, 0]).unwrap()),
            Arch::Riscv => drop(self.send(&[3 | 1 << 33 | 0x42 << 40, 0]).unwrap()),
        }
    }

    pub(super) fn finish(self) {
        let Self { lab, attachment, nested, viommu, parent, ioas, device, .. } = self;
        let (sim, kernel) = (lab.sim.clone(), lab.kernel.clone());
        drop(attachment);
        drop((nested, viommu, parent, ioas, device));
        lab.assert_clean();
        assert_eq!(sim.cached(UnitIndex(0)), 0, "tags that were given up are flushed");
        drop(kernel);
    }
}

impl Arch {
    fn viommu_type(self) -> Option<u32> {
        match self {
            Self::Vtd => None,
            Self::Arm => Some(viommu_type::ARM_SMMUV3),
            Self::Amd => Some(viommu_type::SIM_AMD),
            Self::Riscv => Some(viommu_type::SIM_RISCV),
        }
    }

    /// The structure that leads to the table, where there is one. RISC-V has a process directory of eight bits here.
    pub(super) fn write_context(self, lab: &Lab, root: u64, tag: u64) {
        let words = match self {
            Self::Vtd => vec![],
            // T0SZ 16, EPD1, V, IPS 48 bits, AA64, R, A, ASID.
            Self::Arm => vec![16 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 3 << 45 | tag << 48, root, 0, 0xff],
            Self::Amd => vec![root | 1],
            Self::Riscv => vec![1 | tag << 12, 9 << 60 | root >> 12],
        };
        for (index, word) in (0..).zip(words) {
            lab.store(CONTEXT + index * 8, word);
        }
    }

    fn data(self, root: u64) -> (u32, Vec<u64>) {
        match self {
            Self::Vtd => (hwpt_data::VTD_S1, vec![0, root, 48]),
            Self::Arm => (hwpt_data::ARM_SMMUV3, vec![1 | 5 << 1 | CONTEXT, 1 << 2 | 1 << 4 | 3 << 6]),
            // V, TV, GV, GIoV, the GCR3 table's address in three pieces, the domain.
            Self::Amd => (
                hwpt_data::AMD_GUEST,
                vec![3 | 1 << 54 | 1 << 55 | (CONTEXT >> 12 & 7) << 58, 7 | (CONTEXT >> 15 & 0xffff) << 16 | (CONTEXT >> 31) << 43, 0, 0],
            ),
            // V, PDTV, DPE, SADE.
            Self::Riscv => (hwpt_data::SIM_RISCV, vec![1 | 1 << 5 | 1 << 9 | 1 << 8, 0, 1 << 60 | CONTEXT >> 12]),
        }
    }

    pub(super) fn nested(self, parent: &Hwpt, viommu: Option<&Viommu>, device: &Device, root: u64) -> Hwpt {
        let (data_type, words) = self.data(root);
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match viommu {
            Some(viommu) => viommu.nested(device, HwptFlags::NONE, (data_type, &bytes), None).unwrap(),
            None => parent.nested(device, HwptFlags::NONE, (data_type, &bytes), None).unwrap(),
        }
    }

    fn table(self, address: u64) -> u64 {
        match self {
            Self::Vtd | Self::Amd => address | 7,
            Self::Arm => address | 3,
            Self::Riscv => address >> 2 | 1,
        }
    }

    fn address(self, entry: u64) -> u64 {
        match self {
            Self::Riscv => entry << 2 & 0x00ff_ffff_ffff_f000,
            _ => entry & 0x0000_ffff_ffff_f000,
        }
    }

    /// Accessed, not dirty; not global.
    pub(super) fn leaf(self, address: u64, height: u32, write: bool) -> u64 {
        let (low, large) = (u64::from(write), u64::from(height > 0));
        match self {
            Self::Vtd | Self::Amd => address | 1 | low << 1 | 1 << 2 | 1 << 5 | large << 7,
            Self::Arm => address | 1 | (1 - large) << 1 | 1 << 6 | (1 - low) << 7 | 1 << 10 | 1 << 11,
            Self::Riscv => address >> 2 | 1 | 1 << 1 | low << 2 | 1 << 4 | 1 << 6,
        }
    }
}

#[test]
fn stale_until_invalidated() {
    for arch in ALL {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, TARGET);
        assert_eq!(rig.reached(0x1234), Ok(TARGET + 0x234), "{arch:?}");
        rig.leaf(0x1000, TARGET + PAGE);
        assert_eq!(rig.reached(0x1000), Ok(TARGET), "{arch:?}: the IOTLB must not know of the change");
        rig.invalidate(Some(0x2000), true);
        assert_eq!(rig.reached(0x1000), Ok(TARGET), "{arch:?}: another page's invalidation");
        rig.invalidate(Some(0x1000), true);
        assert_eq!(rig.reached(0x1000), Ok(TARGET + PAGE), "{arch:?}");
        rig.set(0x1000, 0, 0);
        assert_eq!(rig.reached(0x1000), Ok(TARGET + PAGE), "{arch:?}: unmapped, but not invalidated");
        rig.invalidate(None, false);
        assert_eq!(rig.reached(0x1000), Err((Reason::NotPresent, Stage::First)), "{arch:?}");
        rig.leaf(0x1000, TARGET);
        assert_eq!(rig.reached(0x1000), Ok(TARGET), "{arch:?}: what is not present is not remembered");
        rig.finish();
    }
}

#[test]
fn leaf_only_keeps_the_walk_caches() {
    for arch in ALL {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, TARGET);
        assert_eq!(rig.reached(0x1000), Ok(TARGET));
        // Another last-level table in the place of the old one.
        let other = BASE + 0x30_0000;
        rig.set(0x1000, 1, arch.table(other));
        rig.lab.store(other + 8, arch.leaf(TARGET + PAGE, 0, true));
        rig.invalidate(Some(0x1000), true);
        assert_eq!(rig.reached(0x1000), Ok(TARGET), "{arch:?}: the old table is still walked");
        rig.invalidate(Some(0x1000), false);
        assert_eq!(rig.reached(0x1000), Ok(TARGET + PAGE), "{arch:?}");
        rig.finish();
    }
}

#[test]
fn large_leaves_and_their_splits() {
    for arch in ALL {
        let rig = Rig::new(arch);
        let large = BASE + (16 << 20);
        rig.set(2 << 20, 1, arch.leaf(large, 1, true));
        assert_eq!(rig.reached((2 << 20) + 0x1_2345), Ok(large + 0x1_2345), "{arch:?}");
        rig.set(2 << 20, 1, 0);
        rig.leaf(2 << 20, TARGET);
        assert_eq!(rig.reached((2 << 20) + 0x1_2345), Ok(large + 0x1_2345), "{arch:?}: the block is cached as a whole");
        rig.invalidate(Some((2 << 20) + 0x5000), false);
        assert_eq!(rig.reached((2 << 20) + 0x1_2345), Err((Reason::NotPresent, Stage::First)), "{arch:?}: and goes as a whole");
        assert_eq!(rig.reached(2 << 20), Ok(TARGET), "{arch:?}");
        rig.finish();
    }
}

#[test]
fn data_arrive() {
    for arch in ALL {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, TARGET);
        rig.leaf(0x2000, TARGET + 5 * PAGE);
        let bytes: Vec<u8> = (0..=255).cycle().take(6000).collect();
        rig.dma.write(None, Iova(0x1100), &bytes).unwrap();
        let mut back = vec![0; 6000];
        rig.dma.read(None, Iova(0x1100), &mut back).unwrap();
        assert_eq!(back, bytes, "{arch:?}");
        assert_eq!(rig.lab.load(TARGET + 0x100), u64::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7]));
        assert_eq!(rig.lab.load(TARGET + 5 * PAGE).to_ne_bytes()[0], bytes[PAGE as usize - 0x100]);
        // What does not translate does not arrive.
        rig.set(0x2000, 0, 0);
        rig.invalidate(None, false);
        rig.lab.store(TARGET + 5 * PAGE, 0x55);
        let fault = rig.dma.write(None, Iova(0x1f00), &[9; 0x200]).unwrap_err();
        assert_eq!((fault.iova, fault.reason, fault.stage), (Iova(0x2000), Reason::NotPresent, Stage::First), "{arch:?}");
        assert_eq!(rig.lab.load(TARGET + 5 * PAGE), 0x55);
        assert_eq!(rig.lab.sim.take_faults(), [fault]);
        rig.finish();
    }
}

#[test]
fn accessed_and_dirty() {
    for arch in ALL {
        let rig = Rig::new(arch);
        if arch == Arch::Arm {
            // HA, HD; the entry is writable when dirty.
            let cd = rig.lab.load(CONTEXT);
            rig.lab.store(CONTEXT, cd | 3 << 42);
            rig.invalidate_context();
        }
        let (accessed, dirty, clean) = match arch {
            Arch::Vtd | Arch::Amd => (1 << 5, 1 << 6, 0),
            Arch::Arm => (1 << 10, 0, 1 << 51 | 1 << 7),
            Arch::Riscv => (1 << 6, 1 << 7, 0),
        };
        let fresh = arch.leaf(TARGET, 0, true) & !accessed | clean;
        rig.set(0x1000, 0, fresh);
        let slot = rig.slot(0x1000, 0);
        rig.reached(0x1000).unwrap();
        assert_eq!(rig.lab.load(slot), fresh | accessed, "{arch:?}: read");
        rig.access(0x1000, DmaAccess::Write).unwrap();
        let wanted = if arch == Arch::Arm { (fresh | accessed) & !(1 << 7) } else { fresh | accessed | dirty };
        assert_eq!(rig.lab.load(slot), wanted, "{arch:?}: written");
        // Cached as dirty: nobody looks at the entry again until it is invalidated.
        rig.lab.store(slot, fresh);
        rig.access(0x1000, DmaAccess::Write).unwrap();
        assert_eq!(rig.lab.load(slot), fresh, "{arch:?}");
        rig.invalidate(Some(0x1000), true);
        rig.access(0x1000, DmaAccess::Write).unwrap();
        assert_eq!(rig.lab.load(slot), wanted, "{arch:?}");
        rig.finish();
    }
}

#[test]
fn permissions_and_both_stages() {
    for arch in ALL {
        let rig = Rig::new(arch);
        rig.set(0x1000, 0, arch.leaf(TARGET, 0, false));
        assert_eq!(rig.access(0x1000, DmaAccess::Write), Err((Reason::Permission, Stage::First)), "{arch:?}");
        assert_eq!(rig.reached(0x1000), Ok(TARGET));
        rig.leaf(0x2000, BASE + SIZE);
        assert_eq!(rig.reached(0x2000), Err((Reason::NotPresent, Stage::Second)), "{arch:?}");
        // A table where the parent does not reach.
        rig.set(1 << 30, 2, arch.table(BASE - PAGE));
        assert_eq!(rig.reached(1 << 30), Err((Reason::TableAccess, Stage::First)), "{arch:?}");
        let high = match arch {
            Arch::Arm => 1 << 48,
            _ => 1 << 47,
        };
        assert_eq!(rig.reached(high).unwrap_err().1, Stage::First, "{arch:?}");
        // The parent's memory goes, and takes effect at once.
        rig.leaf(0x3000, TARGET);
        assert_eq!(rig.reached(0x3000), Ok(TARGET));
        rig.lab.kernel.ioas_unmap(rig.ioas.id(), Iova(BASE), SIZE).unwrap();
        assert_eq!(rig.reached(0x3000), Err((Reason::NotPresent, Stage::Second)), "{arch:?}");
        rig.finish();
    }
}

#[test]
fn contexts_are_cached_too() {
    for arch in [Arch::Arm, Arch::Amd, Arch::Riscv] {
        let rig = Rig::new(arch);
        rig.leaf(0x1000, TARGET);
        assert_eq!(rig.reached(0x1000), Ok(TARGET));
        // Another first table, with another tag where the structure says one.
        let root = BASE + 0x60_0000;
        let mut table = root;
        for level in 1..4 {
            rig.lab.store(table, arch.table(root + level * PAGE));
            table = root + level * PAGE;
        }
        rig.lab.store(table + 8, arch.leaf(TARGET + PAGE, 0, true));
        arch.write_context(&rig.lab, root, 9);
        assert_eq!(rig.reached(0x1000), Ok(TARGET), "{arch:?}");
        rig.invalidate(None, false);
        // On AMD a command for all of a PASID takes its GCR3 entry along.
        let after = if arch == Arch::Amd { TARGET + PAGE } else { TARGET };
        assert_eq!(rig.reached(0x1000), Ok(after), "{arch:?}: translations went, the context did not");
        rig.invalidate_context();
        assert_eq!(rig.reached(0x1000), Ok(TARGET + PAGE), "{arch:?}");
        rig.finish();
    }
}

#[test]
fn a_full_cache_fails_loudly() {
    let rig = Rig::new(Arch::Vtd);
    rig.leaf(0x1000, TARGET);
    rig.reached(0x1000).unwrap();
    assert_eq!(rig.cached(), 4, "three tables and a leaf");
    rig.finish();
    let mut unit = UnitConfig::vtd("unit");
    unit.cache_limit = 3;
    let lab = Lab::new(vec![unit]);
    let (device, ioas, parent) = lab.parent("dev0", HwptFlags::NONE);
    let nested = Arch::Vtd.nested(&parent, None, &device, ROOT);
    for (level, table) in (0..).zip([ROOT, ROOT + PAGE, ROOT + 2 * PAGE]) {
        lab.store(table, (ROOT + (level + 1) * PAGE) | 7);
    }
    lab.store(ROOT + 3 * PAGE, TARGET | 7);
    let attachment = device.attach(None, PageTable::Hwpt(&nested)).unwrap();
    let fault = lab.sim.device("dev0").unwrap().translate(None, Iova(0), DmaAccess::Read).unwrap_err();
    assert_eq!(fault.reason, Reason::CacheFull);
    drop((attachment, nested, parent, ioas, device));
    lab.assert_clean();
}

#[test]
fn arm_commands_in_detail() {
    let rig = Rig::new(Arch::Arm);
    let global = |target| rig.arch.leaf(target, 0, true) & !(1 << 11);
    let moved = |iova, was: u64, words: &[u64]| {
        let before = rig.reached(iova).unwrap();
        rig.set(iova, 0, if was & 1 << 11 == 0 { global(before + PAGE) } else { rig.arch.leaf(before + PAGE, 0, true) });
        assert_eq!(rig.reached(iova), Ok(before));
        rig.send(words).unwrap();
        rig.reached(iova).unwrap() != before
    };
    rig.set(0x1000, 0, global(TARGET));
    rig.leaf(0x2000, TARGET);
    let (all, plain) = (0, 1 << 11);
    assert!(!moved(0x1000, all, &[0x11 | 7 << 48, 0]), "NH_ASID keeps global entries");
    assert!(moved(0x1000, all, &[0x12 | 8 << 48, 0x1001]), "NH_VA of any ASID takes a global entry");
    assert!(moved(0x1000, all, &[0x13, 0x1001]), "NH_VAA");
    assert!(moved(0x1000, all, &[0x10, 0]), "NH_ALL");
    assert!(!moved(0x2000, plain, &[0x12 | 8 << 48, 0x2001]), "another ASID");
    assert!(moved(0x2000, plain, &[0x13, 0x2001]), "NH_VAA");
    assert!(moved(0x2000, plain, &[0x12 | 7 << 48 | 1 << 12, 0x1001 | 1 << 10]), "a range of two pages");
    assert!(!moved(0x2000, plain, &[0x12 | 7 << 48, 0x1001 | 1 << 10]), "a range of one page, in front");
    assert!(moved(0x2000, plain, &[0x12 | 7 << 48 | 1 << 20, 0x1001 | 1 << 10]), "a range of one times two pages");
    assert!(!moved(0x2000, plain, &[0x12 | 7 << 48, 0x2001 | 1 << 10 | 2 << 8]), "TTL says that only a block changed");
    assert!(moved(0x2000, plain, &[0x12 | 7 << 48, 0x2001 | 1 << 10 | 3 << 8]), "TTL says a page");
    rig.finish();
}

#[test]
fn riscv_commands_in_detail() {
    let rig = Rig::new(Arch::Riscv);
    rig.set(0x1000, 0, rig.arch.leaf(TARGET, 0, true) | 1 << 5);
    rig.reached(0x1000).unwrap();
    rig.set(0x1000, 0, rig.arch.leaf(TARGET + PAGE, 0, true) | 1 << 5);
    rig.invalidate(Some(0x1000), false);
    assert_eq!(rig.reached(0x1000), Ok(TARGET), "a command for one PSCID keeps global entries");
    rig.send(&[1 | 1 << 10, 0x1000 >> 2]).unwrap();
    assert_eq!(rig.reached(0x1000), Ok(TARGET + PAGE));
    assert_eq!(rig.send(&[2, 0]), Err((0, Errno::EIO)), "IOFENCE is not the kernel's");
    rig.finish();
}

#[test]
fn amd_ranges() {
    let rig = Rig::new(Arch::Amd);
    for (page, command, goes) in
        [(0x3000, 5, false), (0x3000, 0x1000 | 5, true), (0x3000, 0x2000 | 5, true), (0x3000, 0x1000 | 4, false), (0x3000, 0x3000 | 4, true)]
    {
        rig.leaf(page, TARGET);
        rig.invalidate(None, false);
        rig.reached(page).unwrap();
        rig.leaf(page, TARGET + PAGE);
        rig.send(&[3 << 60 | 7 << 32, command]).unwrap();
        assert_eq!(rig.reached(page), Ok(if goes { TARGET + PAGE } else { TARGET }), "{command:#x}");
    }
    rig.send(&[3 << 60 | 8 << 32, 0x7fff_ffff_ffff_f007]).unwrap();
    assert_eq!(rig.send(&[3 << 60 | 7 << 32, 0x1000]), Err((0, Errno::EIO)), "GN must be set");
    rig.finish();
}

#[test]
fn substreams_of_an_smmu() {
    let rig = Rig::new(Arch::Arm);
    let viommu = &rig.viommu.as_ref().unwrap().0;
    // Two-level CD tables with 64 entries each: substream 0x41 is the second of the second.
    let second = BASE + 0x70_0000;
    let first = BASE + 0x71_0000;
    rig.lab.store(first + 8, second | 1);
    for word in 0..4 {
        rig.lab.store(second + 64 + word * 8, rig.lab.load(CONTEXT + word * 8));
    }
    let nested = |s1dss: u64| {
        let ste = [1 | 5 << 1 | 1 << 4 | first | 8 << 59, s1dss];
        let bytes: Vec<u8> = ste.iter().flat_map(|word| word.to_ne_bytes()).collect();
        viommu.nested(&rig.device, HwptFlags::NONE, (hwpt_data::ARM_SMMUV3, &bytes), None).unwrap()
    };
    rig.leaf(0x1000, TARGET);
    let reached = |pasid: Option<u32>, iova| {
        let found: Result<_, Fault> = rig.dma.translate(pasid.map(Pasid), Iova(iova), DmaAccess::Read);
        found.map(|found| found.address.0).map_err(|fault| fault.reason)
    };
    assert_eq!(reached(Some(0x41), 0x1000), Err(Reason::Pasid), "no substreams yet");
    let (terminate, bypass) = (nested(0), nested(1));
    let mut attachment = rig.device.attach(None, PageTable::Hwpt(&terminate)).unwrap();
    assert_eq!(reached(Some(0x41), 0x1000), Ok(TARGET));
    assert_eq!(reached(Some(0x40), 0x1000), Err(Reason::Context));
    assert_eq!(reached(Some(0x100), 0x1000), Err(Reason::Pasid), "beyond S1CDMax");
    assert_eq!(reached(None, 0x1000), Err(Reason::Pasid), "S1DSS terminates");
    attachment.replace(PageTable::Hwpt(&bypass)).unwrap();
    assert_eq!(reached(None, BASE), Ok(BASE), "S1DSS bypasses");
    drop(attachment);
    drop((terminate, bypass));
    rig.finish();
}

#[test]
fn pasids_on_vtd_are_attached_each() {
    let rig = Rig::new(Arch::Vtd);
    let s1 = [0u64, ROOT, 48].map(u64::to_ne_bytes).concat();
    let pasid_parent = rig.ioas.hwpt(&rig.device, HwptFlags::NEST_PARENT | HwptFlags::PASID, None).unwrap();
    let nested = pasid_parent.nested(&rig.device, HwptFlags::PASID, (hwpt_data::VTD_S1, &s1), None).unwrap();
    assert_eq!(rig.device.attach(Some(Pasid(5)), PageTable::Hwpt(&nested)).map(drop), Err(Errno::EINVAL), "the device's own table is not for PASIDs");
    let own = rig.device.attach(None, PageTable::Hwpt(&nested)).unwrap();
    let attachment = rig.device.attach(Some(Pasid(5)), PageTable::Hwpt(&nested)).unwrap();
    rig.leaf(0xfee0_0000, TARGET);
    let reached = |pasid: Option<Pasid>| {
        rig.dma.translate(pasid, Iova(0xfee0_0000), DmaAccess::Read).map(|found| found.address.0).map_err(|fault| fault.reason)
    };
    assert_eq!(reached(Some(Pasid(5))), Ok(TARGET), "with a PASID the interrupt range is memory");
    assert_eq!(reached(Some(Pasid(6))), Err(Reason::Pasid));
    assert_eq!(reached(None), Err(Reason::InterruptRange));
    drop(attachment);
    assert_eq!(reached(Some(Pasid(5))), Err(Reason::Pasid));
    drop(own);
    drop((nested, pasid_parent));
    rig.finish();
}

#[test]
fn dirty_bitmap_of_a_parent_sees_nested_writes() {
    for arch in ALL {
        let rig = Rig::with(arch, HwptFlags::DIRTY_TRACKING);
        rig.leaf(0x1000, TARGET);
        rig.leaf(0x2000, TARGET + 3 * PAGE);
        rig.access(0x1000, DmaAccess::Write).unwrap();
        let bitmap = |flags| {
            let range = DirtyRange { flags, iova: Iova(TARGET), length: 64 * PAGE, page_size: PAGE };
            rig.lab.kernel.dirty_bitmap(rig.parent.id(), &range)
        };
        assert_eq!(bitmap(DirtyFlags::NONE), Err(Errno::EINVAL), "nobody records");
        rig.lab.kernel.set_dirty_tracking(rig.parent.id(), true).unwrap();
        assert_eq!(bitmap(DirtyFlags::NONE), Ok(vec![0]));
        rig.dma.write(None, Iova(0x2010), &[1]).unwrap();
        rig.reached(0x1000).unwrap();
        assert_eq!(bitmap(DirtyFlags::NO_CLEAR), Ok(vec![8]), "{arch:?}");
        assert_eq!(bitmap(DirtyFlags::NONE), Ok(vec![8]), "{arch:?}");
        assert_eq!(bitmap(DirtyFlags::NONE), Ok(vec![0]), "{arch:?}");
        rig.dma.write(None, Iova(0x1000), &[1]).unwrap();
        rig.dma.write(None, Iova(0x2000), &[1]).unwrap();
        assert_eq!(bitmap(DirtyFlags::NONE), Ok(vec![9]), "{arch:?}: a write that the IOTLB serves counts as well");
        rig.lab.kernel.set_dirty_tracking(rig.parent.id(), false).unwrap();
        rig.finish();
    }
}

#[test]
fn hardware_info_is_the_kernels_struct() {
    for arch in ALL {
        let rig = Rig::new(arch);
        let info = rig.lab.kernel.hw_info(rig.device.id()).unwrap();
        let length = match arch {
            Arch::Vtd => 24,
            Arch::Arm => 40,
            Arch::Amd => 16,
            Arch::Riscv => 8,
        };
        assert_eq!((info.data.len(), info.max_pasid_log2), (length, 20), "{arch:?}");
        if arch == Arch::Vtd {
            let UnitKind::Vtd { ecap, .. } = UnitConfig::vtd("").kind else { unreachable!() };
            assert_eq!(info.data[16..], ecap.to_ne_bytes());
        }
        assert_eq!(rig.lab.kernel.path(rig.device.id()).unwrap(), [info]);
        rig.finish();
    }
}

#[test]
fn riscv_64k_pages_memory_types_and_clear_bits() {
    let rig = Rig::new(Arch::Riscv);
    let napot = |target: u64, low: u64| target >> 2 | low << 10 | 1 << 63 | 0xd7;
    let target = BASE + 0x41_0000;
    for page in 0..16 {
        rig.set(0x1_0000 + page * PAGE, 0, napot(target, 8));
    }
    assert_eq!(rig.reached(0x1_5123), Ok(target + 0x5123));
    assert_eq!(rig.reached(0x1_f000), Ok(target + 0xf000), "out of the same cached entry");
    rig.invalidate(None, false);
    for (entry, wanted) in [
        (napot(target, 4), Err(Reason::Reserved)),                       // 32K is reserved
        (target >> 2 | 1 << 62 | 1 << 61 | 0xd7, Err(Reason::Reserved)), // memory type 3
        (target >> 2 | 1 << 61 | 0xd7, Ok(target)),                      // non-cacheable
        (target >> 2 | 1 << 54 | 0xd7, Err(Reason::Reserved)),           // reserved bit
        (target >> 2 | 0xc7, Err(Reason::Permission)),                   // not the user's
        (target >> 2 | 0xd5, Err(Reason::Reserved)),                     // writable, not readable
        (target >> 2 | 0xd9, Err(Reason::Permission)),                   // executable only
    ] {
        rig.set(0x3_0000, 0, entry);
        rig.invalidate(None, false);
        assert_eq!(rig.reached(0x3_0000).map_err(|(reason, _)| reason), wanted, "{entry:#x}");
    }
    rig.finish();
}

#[test]
fn x86_reserved_bits_and_levels() {
    let rig = Rig::new(Arch::Vtd);
    let large = BASE + (16 << 20);
    let one = |iova, height, entry| {
        rig.set(iova, height, entry);
        rig.invalidate(None, false);
        rig.reached(iova).map_err(|(reason, _)| reason)
    };
    assert_eq!(one(2 << 20, 1, large | 0xe7), Ok(large));
    assert_eq!(one(2 << 20, 1, large | 0xe7 | 1 << 12), Ok(large), "PAT");
    assert_eq!(one(2 << 20, 1, large | 0xe7 | 1 << 13), Err(Reason::Reserved));
    assert_eq!(one(2 << 20, 1, large | 0xe3), Err(Reason::Permission), "a supervisor's page");
    assert_eq!(one(1 << 39, 3, BASE | 0xe7), Err(Reason::Reserved), "no leaf at level 4");
    assert_eq!(one(0x5000, 0, 0xfee0_0067), Err(Reason::InterruptRange), "no translation into the interrupt range");
    assert_eq!(rig.reached(0xfee0_0000), Err((Reason::InterruptRange, Stage::Context)));
    assert_eq!(rig.reached(1 << 47), Err((Reason::InputRange, Stage::First)), "not canonical");
    // Accessed is set on the way down, too.
    rig.leaf(0x7000, TARGET);
    rig.reached(0x7000).unwrap();
    assert!((0..4).all(|height| rig.lab.load(rig.slot(0x7000, height)) & 1 << 5 != 0));
    rig.finish();
}
