//! The simulated hardware against the independent generator: tables whose contents are known, walked by the sim's own walkers through DMA.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use stagecraft::kernel::handle::{Attachment, Device, Hwpt, Ioas, PageTable, Vdevice, Viommu};
use stagecraft::kernel::sim::{DmaAccess, Sim, SimBuilder, UnitConfig, UnitKind};
use stagecraft::kernel::{HwptFlags, Kernel, Map, MapFlags, hwpt_data, viommu_type};
use stagecraft::{Iova, Span};
use stagecraft_models::tables::riscv::RiscvTable;
use stagecraft_models::tables::{random_leaves, riscv};
use stagecraft_tests::reference::generate::{Format, Rng, generate};
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, TableConfig};
use stagecraft_tests::reference::{Access, Run, merge};
use vm_memory::{MmapRegion, VolatileMemory};

fn seeds() -> u64 {
    std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(60)
}

/// A device on a nested page table; the pages of the tables are all of guest memory there is.
struct Rig {
    sim: Arc<Sim>,
    // Dropped in this order.
    _attachment: Attachment,
    _nested: Hwpt,
    _viommu: Option<(Viommu, Vdevice)>,
    _parent: Hwpt,
    _ioas: Ioas,
    _device: Device,
}

impl Rig {
    fn new(mut unit: UnitConfig, memory: &Memory, viommu: Option<u32>, data: (u32, &[u64])) -> Self {
        // Tables lie anywhere in 52 bits.
        (unit.aperture, unit.reserved) = (Span::ALL, Vec::new());
        let mut builder = SimBuilder::new();
        let index = builder.unit(unit);
        builder.device(stagecraft::kernel::sim::DeviceConfig::new("device", 1), &[index]);
        let sim = builder.build().unwrap();
        let region = Arc::new(MmapRegion::new(memory.pages.len() * 4096).unwrap());
        sim.register_region(Arc::clone(&region)).unwrap();
        let kernel: Arc<dyn Kernel> = Arc::clone(&sim) as Arc<dyn Kernel>;
        let device = Device::bind(&kernel, "device").unwrap();
        let ioas = Ioas::alloc(&kernel).unwrap();
        for (place, (address, bytes)) in (0..).step_by(4096).zip(&memory.pages) {
            region.get_slice(place, 4096).unwrap().copy_from(&bytes[..]);
            let user_address = region.as_ptr() as u64 + place as u64;
            let flags = MapFlags::READABLE | MapFlags::WRITEABLE;
            kernel.ioas_map(ioas.id(), &Map { flags, iova: Some(Iova(*address)), user_address, length: 4096 }).unwrap();
        }
        let parent = ioas.hwpt(&device, HwptFlags::NEST_PARENT, None).unwrap();
        let viommu = viommu.map(|kind| {
            let viommu = parent.viommu(&device, kind).unwrap();
            let vdevice = viommu.vdevice(&device, 7).unwrap();
            (viommu, vdevice)
        });
        let bytes: Vec<u8> = data.1.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let nested = match &viommu {
            Some((viommu, _)) => viommu.nested(&device, HwptFlags::NONE, (data.0, &bytes), None).unwrap(),
            None => parent.nested(&device, HwptFlags::NONE, (data.0, &bytes), None).unwrap(),
        };
        let attachment = device.attach(None, PageTable::Hwpt(&nested)).unwrap();
        Self { sim, _attachment: attachment, _nested: nested, _viommu: viommu, _parent: parent, _ioas: ioas, _device: device }
    }

    /// Every run at its edges and somewhere in it, and beside; other places in the same tables; and IOVAs of `others`.
    fn check(&self, truth: &[Run], others: &[u64], rng: &mut Rng, what: &str) -> usize {
        let device = self.sim.device("device").unwrap();
        let mut probes: Vec<u64> = others.to_vec();
        for run in truth {
            let last = run.iova + (run.size - 1);
            probes.extend([run.iova, last, run.iova + rng.below(run.size), run.iova.wrapping_sub(1), last.wrapping_add(1), rng.number()]);
        }
        // Elsewhere in the same tables of every level: that is where the entries are that look like something and must not translate.
        for run in truth.iter().take(60) {
            for shift in (12..57).step_by(3) {
                probes.extend((0..4).map(|_| run.iova ^ rng.below(512) << shift));
            }
        }
        let mut translated = 0;
        for iova in probes {
            // The interrupt range of an x86 device without a PASID is never translated.
            let interrupts = what.starts_with("x86") && iova >> 20 == 0xfee;
            let run = truth.iter().find(|run| run.iova <= iova && iova - run.iova < run.size).filter(|_| !interrupts);
            for write in [false, true] {
                let access = if write { DmaAccess::Write } else { DmaAccess::Read };
                let wanted = run.filter(|run| run.access.allows(write)).map(|run| run.address + (iova - run.iova));
                let found = device.first_stage(None, Iova(iova), access);
                assert_eq!(found.as_ref().ok().map(|gpa| gpa.0), wanted, "{what}: {access:?} at {iova:#x}: {found:?}");
                translated += usize::from(wanted.is_some());
            }
        }
        translated
    }
}

/// A page that no table is in.
fn free_page(memory: &mut Memory) -> u64 {
    let place = (0x1000..).step_by(4096).find(|address| !memory.pages.contains_key(address)).unwrap();
    memory.add_zeroed(place, 4096);
    place
}

#[test]
fn vtd_first_stage_and_amd_v2() {
    let mut translated = 0;
    for seed in 0..seeds() {
        let generated = generate(Format::VtdFirst, seed);
        let TableConfig::VtdFirst(config) = generated.config else { unreachable!() };
        let width = if config.levels == 5 { 57 } else { 48 };
        let mut memory = generated.snapshot.memory.clone();
        let vtd = Rig::new(UnitConfig::vtd("vtd"), &memory, None, (hwpt_data::VTD_S1, &[0, config.root, width]));
        translated += vtd.check(&generated.truth, &[], &mut Rng::new(seed), &format!("x86, VT-d seed {seed}: {config:?}"));

        // The same tables are AMD's v2, behind a GCR3 table with one level.
        let gcr3 = free_page(&mut memory);
        memory.write(gcr3, config.root | 1, false);
        let level = u64::from(config.levels - 4) << 54;
        let dte = [3 | 3 << 54 | (gcr3 >> 12 & 7) << 58, (gcr3 >> 15 & 0xffff) << 16 | (gcr3 >> 31) << 43, level, 0];
        let amd = Rig::new(UnitConfig::amd("amd"), &memory, Some(viommu_type::SIM_AMD), (hwpt_data::AMD_GUEST, &dte));
        // Without PASID nothing is sign-extended: what is the upper half elsewhere follows the lower one.
        let inputs = (1 << (12 + 9 * config.levels)) - 1;
        let truth = merge(generated.truth.iter().map(|run| Run { iova: run.iova & inputs, ..*run }).collect());
        translated += amd.check(&truth, &[], &mut Rng::new(seed), &format!("x86, AMD seed {seed}: {config:?}"));
    }
    assert!(translated > 100 * usize::try_from(seeds()).unwrap(), "{translated}");
}

/// IHI 0070 section 5.4.
fn context_descriptor(config: &ArmStage1) -> [u64; 4] {
    let sizes = [32, 36, 40, 42, 44, 48, 52];
    let ips = sizes.iter().position(|size| *size == config.output_bits).unwrap() as u64;
    let flag = |set: bool, bit: u32| u64::from(set) << bit;
    let granule = |half: &ArmHalf, codes: [u64; 3]| codes[[4096, 16384, 65536].iter().position(|size| *size == half.granule).unwrap()];
    let mut cd = [ips << 32 | 1 << 31 | 1 << 41 | 7 << 48, 0, 0, config.mair];
    cd[0] |= flag(config.hardware_access, 43) | flag(config.hardware_dirty, 42) | flag(config.access_flag_disabled, 35) | flag(config.big_endian, 15);
    match &config.low {
        Some(low) => {
            cd[0] |= u64::from(64 - low.input_bits) | granule(low, [0, 2, 1]) << 6 | flag(low.top_byte_ignored, 38);
            cd[1] = low.root | flag(low.hierarchical_disabled, 1);
        }
        None => cd[0] |= 1 << 14,
    }
    match &config.high {
        Some(high) => {
            cd[0] |= u64::from(64 - high.input_bits) << 16 | granule(high, [2, 1, 3]) << 22 | flag(high.top_byte_ignored, 39);
            cd[2] = high.root | flag(high.hierarchical_disabled, 1);
        }
        None => cd[0] |= 1 << 30,
    }
    cd[2] |= flag(config.lpa2, 58);
    cd
}

#[test]
fn smmuv3_stage_1() {
    let (mut translated, mut ignored) = (0, 0);
    for seed in 0..2 * seeds() {
        let generated = generate(Format::ArmStage1, seed);
        let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
        let mut memory = generated.snapshot.memory.clone();
        let place = free_page(&mut memory);
        for (word, value) in (0..).zip(context_descriptor(&config)) {
            memory.write(place + word * 8, value, false);
        }
        let mut unit = UnitConfig::smmuv3("smmu");
        if config.output_bits <= 48 && !config.lpa {
            // OAS 48 bits: without the largest blocks.
            let UnitKind::Smmuv3 { idr, .. } = &mut unit.kind else { unreachable!() };
            idr[5] -= 1;
        }
        let rig = Rig::new(unit, &memory, Some(viommu_type::ARM_SMMUV3), (hwpt_data::ARM_SMMUV3, &[1 | 5 << 1 | place, 0]));
        let what = format!("SMMUv3 seed {seed}: {config:?}");
        // With the top byte ignored the truth repeats itself; random IOVAs would find that, so it is checked apart.
        let tagged = [config.low, config.high].iter().flatten().any(|half| half.top_byte_ignored);
        let mut rng = Rng::new(seed);
        if tagged {
            let device = rig.sim.device("device").unwrap();
            for run in generated.truth.iter().filter(|run| run.access.read) {
                let half = if run.iova >> 63 == 0 { config.low } else { config.high };
                let tagged = run.iova ^ (0x5a << 56);
                let found = device.first_stage(None, Iova(tagged), DmaAccess::Read).ok().map(|gpa| gpa.0);
                assert_eq!(found, half.filter(|half| half.top_byte_ignored).map(|_| run.address), "{what}: {tagged:#x}");
                ignored += 1;
            }
        } else {
            translated += rig.check(&generated.truth, &[], &mut rng, &what);
        }
        let inside: Vec<Run> = generated.truth.clone();
        let edges: Vec<u64> = inside.iter().flat_map(|run| [run.iova, run.iova + (run.size - 1)]).collect();
        let device = rig.sim.device("device").unwrap();
        for (run, iova) in inside.iter().flat_map(|run| [run, run]).zip(edges) {
            let found = device.first_stage(None, Iova(iova), DmaAccess::Read).unwrap();
            assert_eq!(found.0, run.address + (iova - run.iova), "{what}");
        }
    }
    assert!(translated > 50 * usize::try_from(seeds()).unwrap() && ignored > 0, "{translated} {ignored}");
}

#[test]
fn riscv_first_stage() {
    let mut translated = 0;
    for seed in 0..seeds() {
        let mut rng = Rng::new(seed);
        let table = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second: false };
        let leaves = random_leaves(&table.windows(), &table.sizes(), &[Access::R, Access::RW], &mut rng, 10);
        let built = riscv::build(table, &leaves, 1 << 30..2 << 30, true, &mut rng);
        let data = [1, 7 << 12, u64::from(table.levels + 5) << 60 | built.config.root >> 12];
        let rig = Rig::new(UnitConfig::riscv("riscv"), &built.memory, Some(viommu_type::SIM_RISCV), (hwpt_data::SIM_RISCV, &data));
        translated += rig.check(&built.truth, &built.decoys, &mut rng, &format!("RISC-V seed {seed}: {table:?}"));
    }
    assert!(translated > 50 * usize::try_from(seeds()).unwrap(), "{translated}");
}
