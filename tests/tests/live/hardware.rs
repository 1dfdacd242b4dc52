//! The host table behind the simulated hardware, whose caches forget nothing by themselves: VT-d's first stage and SMMUv3's stage 1, nested.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use stagecraft::kernel::handle::{Attachment, Device, Hwpt, Ioas, PageTable, Vdevice, Viommu};
use stagecraft::kernel::sim::{DeviceConfig, DmaAccess, Sim, SimBuilder, UnitConfig};
use stagecraft::kernel::{HwptFlags, Invalidate, InvalidateTarget, Kernel, Map, MapFlags, hwpt_data, invalidate_data, viommu_type};
use stagecraft::memory::{Kind, MemoryMap, Region};
use stagecraft::plugin::queue::{Effect, Invalidation};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{CommitError, Committer, Live, Needed, Nested, NestedTable, RegionTables, Shadow, ShadowLimits, Unwatched};
use stagecraft::{Gpa, Iova, Span};
use stagecraft_tests::reference::generate::Rng;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion, MmapRegion, VolatileMemory};

use super::behaviour::range;
use super::guest::{DATA, Guest, MEMORY, PS, RO, RW};
use super::support::{HOST_BASE, format};

/// Which hardware.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arch {
    Vtd,
    Smmu,
}

/// What is left out: each must be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forgotten {
    Nothing,
    Everything,
    FirstSpan,
    LastPage,
    Tables,
}

/// Tells the kernel what must be invalidated, with something forgotten.
pub struct Teller {
    kernel: Arc<dyn Kernel>,
    target: InvalidateTarget,
    arch: Arch,
    forgotten: Forgotten,
    calls: u64,
}

impl Committer for Teller {
    fn invalidate(&mut self, needed: &Needed) -> Result<(), CommitError> {
        self.calls += 1;
        let mut words: Vec<u64> = Vec::new();
        let leaf = u64::from(!needed.tables || self.forgotten == Forgotten::Tables);
        for (index, span) in needed.spans.iter().enumerate() {
            let mut pages = (span.length_minus_one() >> 12) + 1;
            match self.forgotten {
                Forgotten::Everything => continue,
                Forgotten::FirstSpan if index == 0 => continue,
                Forgotten::LastPage if pages > 1 => pages -= 1,
                _ => {}
            }
            match self.arch {
                Arch::Vtd => words.extend([span.first, pages, leaf]),
                Arch::Smmu => (0..pages).for_each(|page| words.extend([0x12 | 7 << 48, (span.first + (page << 12)) | leaf])),
            }
        }
        let (data_type, entry_length) = match self.arch {
            Arch::Vtd => (invalidate_data::VTD_S1, 24),
            Arch::Smmu => (invalidate_data::ARM_SMMUV3, 16),
        };
        let entries: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let request = Invalidate { target: self.target, data_type, entry_length, entries: &entries };
        self.kernel.hwpt_invalidate(&request).map_err(|error| CommitError(Box::new(error)))?;
        Ok(())
    }
}

/// A guest, its host table, and a device behind it.
pub struct Rig {
    pub guest: Guest,
    pub live: Live<Nested<RegionTables, Teller>>,
    pub device: stagecraft::kernel::sim::Device,
    // Dropped in this order.
    _attachment: Attachment,
    _nested: Hwpt,
    _viommu: Option<(Viommu, Vdevice)>,
    _parent: Hwpt,
    _ioas: Ioas,
    _bound: Device,
    _sim: Arc<Sim>,
}

const TABLES: usize = 4 << 20;

impl Rig {
    fn new(arch: Arch, forgotten: Forgotten) -> Self {
        Self::with(arch, forgotten, false)
    }

    /// With `marks`, hardware sets accessed and dirty marks where it can, and entries are written so that it does.
    pub fn with(arch: Arch, forgotten: Forgotten, marks: bool) -> Self {
        let guest = Guest::new();
        let mut builder = SimBuilder::new();
        let unit = builder.unit(if arch == Arch::Vtd { UnitConfig::vtd("unit") } else { UnitConfig::smmuv3("unit") });
        builder.device(DeviceConfig::new("device", 1), &[unit]);
        let sim = builder.build().unwrap();
        sim.register_memory(&guest.memory).unwrap();
        let region = Arc::new(MmapRegion::new(TABLES).unwrap());
        sim.register_region(Arc::clone(&region)).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let bound = Device::bind(&kernel, "device").unwrap();
        let ioas = Ioas::alloc(&kernel).unwrap();
        let ram = guest.memory.iter().next().unwrap();
        let map = |iova: u64, user_address: u64, length: u64| {
            let flags = MapFlags::READABLE | MapFlags::WRITEABLE;
            kernel.ioas_map(ioas.id(), &Map { flags, iova: Some(Iova(iova)), user_address, length }).unwrap();
        };
        map(0, ram.get_mmap().as_ptr() as u64, ram.len());
        map(HOST_BASE, region.as_ptr() as u64, TABLES as u64);
        let parent = ioas.hwpt(&bound, HwptFlags::NEST_PARENT, None).unwrap();
        // The last page of the region has the context descriptor, where there is one.
        let config = match arch {
            Arch::Vtd => TableConfig::new("intel-vtd/first-stage", &[("levels", 4)]),
            Arch::Smmu => {
                let update = u64::from(marks);
                let hardware = [("hardware-access", update), ("hardware-dirty", update)];
                let plain = [("granule", 4096), ("input-bits", 48), ("output-bits", 48), ("mair", 0xff)];
                TableConfig::new("arm-smmuv3/stage1", &[&plain[..], &hardware[..]].concat())
            }
        };
        let mut table = NestedTable::new(format(&config), RegionTables::new(Arc::clone(&region), Gpa(HOST_BASE))).unwrap();
        if marks {
            table.track_accessed(true);
        }
        let root = table.roots().next().unwrap().1.0;
        let context = TABLES as u64 - 4096;
        let words = match arch {
            Arch::Vtd => vec![0, root, 48],
            Arch::Smmu => {
                let cd = [16 | (u64::from(marks) * 3) << 42 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46 | 7 << 48, root, 0, 0xff_u64];
                region.get_slice(context as usize, 32).unwrap().copy_from(&cd[..]);
                vec![1 | 5 << 1 | (HOST_BASE + context), 0]
            }
        };
        let bytes: Vec<u8> = words.iter().flat_map(|word: &u64| word.to_ne_bytes()).collect();
        let viommu = (arch == Arch::Smmu).then(|| {
            let viommu = parent.viommu(&bound, viommu_type::ARM_SMMUV3).unwrap();
            let vdevice = viommu.vdevice(&bound, 7).unwrap();
            (viommu, vdevice)
        });
        let nested = match &viommu {
            Some((viommu, _)) => viommu.nested(&bound, HwptFlags::NONE, (hwpt_data::ARM_SMMUV3, &bytes), None).unwrap(),
            None => parent.nested(&bound, HwptFlags::NONE, (hwpt_data::VTD_S1, &bytes), None).unwrap(),
        };
        let target = viommu.as_ref().map_or(InvalidateTarget::Hwpt(nested.id()), |(viommu, _)| InvalidateTarget::Viommu(viommu.id()));
        let attachment = bound.attach(None, PageTable::Hwpt(&nested)).unwrap();
        let shadow = Shadow::open(format(&guest.config()), Guest::map(), ShadowLimits::default(), Box::new(Unwatched)).unwrap();
        let teller = Teller { kernel, target, arch, forgotten, calls: 0 };
        let mut live = Live::new(shadow, Nested::new(table, teller), Tag::default(), 0, 1 << 10);
        live.synchronise(&guest.view()).unwrap();
        let device = sim.device("device").unwrap();
        Self {
            guest,
            live,
            device,
            _attachment: attachment,
            _nested: nested,
            _viommu: viommu,
            _parent: parent,
            _ioas: ioas,
            _bound: bound,
            _sim: sim,
        }
    }

    fn reaches(&self, iova: u64, access: DmaAccess) -> Option<u64> {
        self.device.first_stage(None, Iova(iova), access).ok().map(|gpa| gpa.0)
    }
}

/// Changes at random, and looks through the device after each batch: whether the device ever got anything else than what the guest says now.
fn is_stale(arch: Arch, forgotten: Forgotten, seed: u64) -> bool {
    let mut rig = Rig::new(arch, forgotten);
    let mut rng = Rng::new(seed);
    // (slot of 2 MiB, page or whole) -> what the guest says.
    let mut small = std::collections::BTreeMap::<u64, (u64, bool)>::new();
    let mut large = [None::<(u64, bool)>; 4];
    for _ in 0..150 {
        let mut commands: Vec<Invalidation> = Vec::new();
        for _ in 0..=rng.below(3) {
            let block = rng.below(4);
            let base = block << 21;
            if rng.percent(15) {
                small.retain(|iova, _| iova >> 21 != block);
                let new = rng.percent(50).then(|| (0x100_0000 + (rng.below(4) << 21), rng.percent(50)));
                large[block as usize] = new;
                rig.guest.set(base, 1, new.map_or(0, |(address, writes)| address | PS | if writes { RW } else { RO }));
                commands.push(range(base, base | 0x1f_ffff, false));
            } else if large[block as usize].is_none() {
                let iova = base | rng.below(5) << 12;
                let new = rng.percent(60).then(|| (DATA + (rng.below(64) << 12), rng.percent(50)));
                rig.guest.set(iova, 0, new.map_or(0, |(address, writes)| address | if writes { RW } else { RO }));
                match new {
                    Some(new) => drop(small.insert(iova, new)),
                    None => drop(small.remove(&iova)),
                }
                commands.push(range(iova, iova | 0xfff, false));
            }
        }
        if rng.percent(10) {
            commands.push(Invalidation { index: 0, effect: Effect::Everything });
        }
        let calls = rig.live.sink_mut().committer().calls;
        rig.live.invalidate(&rig.guest.view(), &commands).unwrap();
        assert!(rig.live.sink_mut().committer().calls <= calls + 1, "at most one call for a batch");
        for block in 0..4_u64 {
            for index in 0..6 {
                let iova = block << 21 | index << 12;
                let says = large[block as usize].map(|(address, writes)| (address + (index << 12), writes)).or(small.get(&iova).copied());
                for access in [DmaAccess::Read, DmaAccess::Write] {
                    let wanted = says.filter(|(_, writes)| *writes || access == DmaAccess::Read).map(|(address, _)| address);
                    if rig.reaches(iova, access) != wanted {
                        return true;
                    }
                }
            }
        }
    }
    false
}

#[test]
fn no_device_gets_what_the_guest_took_away() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        for seed in 0..6 {
            assert!(!is_stale(arch, Forgotten::Nothing, seed), "{arch:?} seed {seed}");
        }
        // Each of these is found, or the test above says nothing.
        for forgotten in [Forgotten::Everything, Forgotten::FirstSpan, Forgotten::LastPage, Forgotten::Tables] {
            assert!((0..6).any(|seed| is_stale(arch, forgotten, seed)), "{arch:?}: {forgotten:?} is not missed");
        }
    }
}

#[test]
fn memory_that_goes_is_out_of_reach() {
    let map = |last| MemoryMap::new(vec![Region { kind: Kind::Ram, span: Span { first: 0, last } }]).unwrap();
    for (arch, forgotten) in [(Arch::Vtd, Forgotten::Nothing), (Arch::Smmu, Forgotten::Nothing), (Arch::Vtd, Forgotten::Everything)] {
        let mut rig = Rig::new(arch, forgotten);
        // Its target is the lower half; the upper half; both, in one large page; and a table is in the upper half.
        let half = MEMORY / 2;
        rig.guest.put(0, 0, DATA | RW);
        rig.guest.put(0x1000, 0, half | RW);
        rig.guest.put(1 << 30, 2, RW | PS);
        rig.guest.restart(half + 0x10_0000);
        rig.guest.put(1 << 21, 0, DATA | RW);
        rig.live.synchronise(&rig.guest.view()).unwrap();
        let reached = |rig: &Rig| [0, 0x1000, 1 << 30, 1 << 30 | half, 1 << 21].map(|iova| rig.reaches(iova, DmaAccess::Write).is_some());
        assert_eq!(reached(&rig), [true; 5], "{arch:?}");
        rig.live.memory_changed(&rig.guest.view(), map(half - 1)).unwrap();
        let cached = forgotten == Forgotten::Everything;
        assert_eq!(reached(&rig), [true, cached, true, cached, cached], "{arch:?} {forgotten:?}");
        rig.live.memory_changed(&rig.guest.view(), map(MEMORY - 1)).unwrap();
        assert_eq!(reached(&rig), [true; 5], "{arch:?}");
    }
}

#[test]
fn dma_to_pages_that_stay_never_fails() {
    for arch in [Arch::Vtd, Arch::Smmu] {
        let mut rig = Rig::new(arch, Forgotten::Nothing);
        rig.guest.set(0, 1, 0x100_0000 | RW | PS);
        (0..64).for_each(|index| rig.guest.put(1 << 21 | index << 12, 0, (DATA + (index << 12)) | RW));
        rig.live.synchronise(&rig.guest.view()).unwrap();
        let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let device = rig.device.clone();
            let (stop, done) = (&stop, &done);
            let dma = scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    for iova in [0x5008, 0x1f_f000, 1 << 21, 1 << 21 | 0x2000] {
                        device.write(None, Iova(iova), &[1, 2, 3]).unwrap();
                    }
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
            let mut rounds = 0_u64;
            while (rounds < 1000 || done.load(Ordering::Relaxed) < 100) && !dma.is_finished() {
                rounds += 1;
                if rig.guest.load(rig.guest.slot(0, 1).0) & PS != 0 {
                    rig.guest.restart(0x20_0000 + (rounds % 64) * 4096);
                    rig.guest.split(0);
                } else {
                    rig.guest.set(0, 1, 0x100_0000 | RW | PS);
                }
                rig.guest.set(1 << 21 | 0x1000, 0, if rounds.is_multiple_of(3) { 0 } else { DATA | RO });
                rig.live.invalidate(&rig.guest.view(), &[range(0, 0x3f_ffff, false)]).unwrap();
            }
            stop.store(true, Ordering::Relaxed);
            dma.join().unwrap();
        });
    }
}
