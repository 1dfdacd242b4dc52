//! Two stages: a hostile second stage under a first, and first-stage tables behind its holes.

use std::collections::BTreeMap;

use stagecraft::guest::Guest;
use stagecraft::memory::Limits;
use stagecraft::table::{Cause, Collector, FaultKind};
use stagecraft::{Access, Iova, Span};
use stagecraft_tests::reference::generate::{Format, Generated, Options, Rng, build, generate_with};
use stagecraft_tests::reference::snapshot::{Device, Memory, MemoryRange, Snapshot};
use stagecraft_tests::reference::tables::{ArmStage2, TableConfig, VtdSecond};
use stagecraft_tests::reference::{Access as Allowed, Run, bit};

use super::compare::plugin_config;
use super::{load, plugins};

/// Where structures are that no stage translates; generated tables are elsewhere.
const STRUCTURES: u64 = 0x30_0000_0000;
/// Where the pages of the first stage's tables really are.
const BACKING: u64 = 0x20_0000_0000;
/// The CD's address, which the second stage translates.
const CONTEXT: u64 = 0x12_3000;

/// A guest with two stages, found through its unit's registers.
pub struct Nested {
    pub snapshot: Snapshot,
    first: Generated,
    second: Generated,
}

fn write_words(memory: &mut Memory, address: u64, words: &[u64]) {
    memory.add_zeroed(address & !0xfff, 4096);
    for (index, word) in words.iter().enumerate() {
        memory.write(address + index as u64 * 8, *word, false);
    }
}

/// The pages of the first stage's tables and `extra` go to other places, readable; some of what the first stage maps goes somewhere too.
fn nest(first: Generated, second: TableConfig, extra: &Memory, rng: &mut Rng) -> (Generated, Generated, Memory) {
    let mut memory = Memory::default();
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    for (index, (page, content)) in first.snapshot.memory.pages.iter().chain(&extra.pages).enumerate() {
        let address = BACKING + index as u64 * 4096;
        leaves.insert(*page, Run { iova: *page, address, size: 4096, access: Allowed::RW });
        memory.pages.insert(address, *content);
    }
    for run in &first.truth {
        for index in (0..(run.size / 4096).min(20)).chain([run.size / 4096 - 1]) {
            let page = run.address + index * 4096;
            let interrupts = (0xfee0_0000..0xfef0_0000).contains(&page);
            if rng.percent(80) && !interrupts {
                let access = rng.pick(&[Allowed::R, Allowed::W, Allowed::RW, Allowed::RW]);
                leaves.entry(page).or_insert(Run { iova: page, address: 0x1_0000_0000 + rng.below(0x1000) * 4096, size: 4096, access });
            }
        }
    }
    let leaves: Vec<Run> = leaves.into_values().collect();
    let second = build(second, &leaves, rng, Options { restrictions: false, ..Options::default() });
    memory.pages.extend(second.snapshot.memory.pages.clone());
    (first, second, memory)
}

fn guest(kind: &str, registers: &[(&str, u64)], id: u64, memory: Memory) -> Snapshot {
    Snapshot {
        description: "two stages".to_owned(),
        unit_kind: kind.to_owned(),
        registers: registers.iter().map(|(name, value)| ((*name).to_owned(), *value)).collect(),
        map: vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 52) - 1 }],
        devices: vec![Device { label: "0000:00:07.0".to_owned(), id }],
        memory,
        ..Snapshot::default()
    }
}

/// SMMUv3: stage 1 of 4K pages or others, stage 2 of 4K pages.
pub fn smmu(seed: u64) -> Nested {
    let mut rng = Rng::new(seed);
    let (first, config) = loop {
        let first = generate_with(Format::ArmStage1, rng.number(), Options { clusters: 5, ..Options::default() });
        let TableConfig::ArmStage1(config) = first.config else { unreachable!() };
        if config.output_bits <= 48 && !first.truth.is_empty() && !config.lpa2 {
            break (first, config);
        }
    };
    let code = |bits: u32| [32, 36, 40, 42, 44, 48, 52].iter().position(|size| *size == bits).expect("a size") as u64;
    let granule0 = |granule: u64| if granule == 4096 { 0 } else { 1 + u64::from(granule == 16384) };
    let granule1 = |granule: u64| match granule {
        16384 => 1,
        4096 => 2,
        _ => 3_u64,
    };
    let low = config.low.expect("a low half");
    let mut cd = [0; 8];
    cd[0] = 64 - u64::from(low.input_bits) + (granule0(low.granule) << 6) + (1 << 31) + (code(config.output_bits) << 32) + (1 << 41);
    cd[0] += (u64::from(config.big_endian) << 15) + (u64::from(config.access_flag_disabled) << 35) + (u64::from(low.top_byte_ignored) << 38);
    cd[0] += (u64::from(config.hardware_dirty) << 42) + (u64::from(config.hardware_access) << 43);
    cd[1] = low.root + (u64::from(low.hierarchical_disabled) << 1);
    cd[3] = config.mair;
    match config.high {
        None => cd[0] += 1 << 30,
        Some(high) => {
            cd[0] += ((64 - u64::from(high.input_bits)) << 16) + (granule1(high.granule) << 22) + (u64::from(high.top_byte_ignored) << 39);
            cd[2] = high.root + (u64::from(high.hierarchical_disabled) << 1);
        }
    }
    let mut extra = Memory::default();
    write_words(&mut extra, CONTEXT, &cd);
    let second = ArmStage2 { granule: 4096, input_bits: 48, output_bits: 48, start_level: 0, ..ArmStage2::default() };
    let (first, second, mut memory) = nest(first, TableConfig::ArmStage2(second), &extra, &mut rng);
    let TableConfig::ArmStage2(config) = second.config else { unreachable!() };
    // STE: valid, both stages; S2T0SZ 16, S2SL0 2, S2PS 48 bits, S2AA64.
    let word = (16 << 32) + (2 << 38) + (5 << 48) + (1 << 51);
    write_words(&mut memory, STRUCTURES + 0x38 * 64, &[1 + (7 << 1) + CONTEXT, 0, word, config.root]);
    // IDR0: both stages, AArch64, hardware updates, 16-bit ids. IDR1.SIDSIZE 16; IDR3.HAD, STT; IDR5: 52 bits both ways, all granules.
    let registers = [
        ("IDR0", 0b11 + (0b10 << 2) + (0b10 << 6) + (1 << 12) + (1 << 18)),
        ("IDR1", 16),
        ("IDR3", 0x204),
        ("IDR5", 0x476),
        ("CR0", 1),
        ("CR2", 0),
        ("STRTAB_BASE_CFG", 8),
        ("STRTAB_BASE", STRUCTURES),
    ];
    Nested { snapshot: guest("arm-smmuv3", &registers, 0x38, memory), first, second }
}

/// VT-d: scalable mode, both stages.
pub fn vtd(seed: u64) -> Nested {
    let mut rng = Rng::new(seed);
    let first = generate_with(Format::VtdFirst, rng.number(), Options { clusters: 5, ..Options::default() });
    let second = VtdSecond { root: 0, levels: 5, input_bits: 57, output_bits: 52, large_2m: true, large_1g: true, snoop_control: false };
    let (first, second, mut memory) = nest(first, TableConfig::VtdSecond(second), &Memory::default(), &mut rng);
    let (TableConfig::VtdFirst(one), TableConfig::VtdSecond(two)) = (first.config, second.config) else { unreachable!() };
    // Bus 0, function 0x38: root, context (PASID 0 for requests without), directory, PASID entry with PGTT 3.
    let [context, directory, table] = [1, 2, 3].map(|page| STRUCTURES + page * 0x1000);
    write_words(&mut memory, STRUCTURES, &[context + 1]);
    write_words(&mut memory, context + 0x38 * 32, &[directory + 1]);
    write_words(&mut memory, directory, &[table + 1]);
    write_words(&mut memory, table, &[1 + (3 << 2) + (3 << 6) + two.root, 0, one.root + (u64::from(one.levels - 4) << 2)]);
    // CAP: 16-bit domains, all level counts, 57 bits, all page sizes, five levels. ECAP: NEST, SMTS, SSTS, FSTS.
    let cap = 6 + (0b1110 << 8) + (56 << 16) + (0b11 << 34) + (1 << 56) + (1 << 60);
    let ecap = (1 << 26) + (1 << 43) + (1 << 46) + (1 << 47);
    let registers = [("CAP", cap), ("ECAP", ecap), ("GSTS", 1 << 31), ("RTADDR", STRUCTURES + (1 << 10))];
    Nested { snapshot: guest("intel-vtd", &registers, 0x38, memory), first, second }
}

/// Reads a fault's stage off its path: tables of the second stage are where the second stage's generator put them.
fn tables_are_of(nested: &Nested, path: &[stagecraft::table::Step], stage: u8) -> bool {
    let tables = if stage == 2 { &nested.second.snapshot.memory.pages } else { &nested.first.snapshot.memory.pages };
    !path.is_empty() && path.iter().all(|step| tables.contains_key(&(step.table.0 & !0xfff)))
}

/// What the tests below do with a nested guest: damage one thing, and look at every fault.
fn faults(nested: &Nested, damage: impl FnOnce(&mut Snapshot)) -> Vec<(Span, stagecraft::table::Fault)> {
    let mut snapshot = nested.snapshot.clone();
    damage(&mut snapshot);
    let folder = tempfile::tempdir().unwrap();
    let loaded = load(&snapshot, folder.path());
    // Random leaves of the first stage share tables of the second more often than a real guest's.
    let guest = Guest::with_limits(&loaded, plugins(), Limits::default()).unwrap();
    let mut space = guest.open(&[plugin_config(&nested.first.config), plugin_config(&nested.second.config)]).unwrap();
    let collected = guest.collect(&mut space, 100_000).unwrap();
    assert_eq!(collected.stopped, None);
    for (span, fault) in collected.collector.faults() {
        assert!(tables_are_of(nested, &fault.path, fault.stage), "{span}: {fault:?}");
        // Asked alone, the same answer; unless the first stage's leaf does not let the device read in the first place.
        let alone = guest.translate(&mut space, Iova(span.first), Access::READ).unwrap().unwrap_err();
        let forbidden = (alone.stage, alone.cause) == (1, Cause::Entry(FaultKind::Permission));
        assert!(forbidden || (alone.stage, alone.cause) == (fault.stage, fault.cause), "{span}: {fault:?} and {alone:?}");
        // What is said about the entry comes from the stage that the entry belongs to.
        let step = fault.path.last().unwrap();
        let findings = space.explain(fault.stage, step).unwrap();
        if let Cause::Entry(kind) = fault.cause
            && fault.address.is_none()
            && kind != FaultKind::Translation
            && kind != FaultKind::Permission
        {
            assert_eq!(findings.first().map(|finding| finding.kind), Some(kind), "{fault:?}");
        }
    }
    collected.collector.faults().to_vec()
}

/// The entry of the second stage that maps this intermediate page.
fn second_stage_entry(nested: &Nested, page: u64) -> u64 {
    let big_endian = nested.second.config.big_endian();
    let backing = nested.second.truth.iter().find(|run| run.iova <= page && page - run.iova < run.size).expect("it is mapped");
    let address = backing.address + (page - backing.iova);
    let memory = &nested.second.snapshot.memory;
    let field = if matches!(nested.second.config, TableConfig::ArmStage2(_)) { 0x0000_ffff_ffff_f000 } else { 0x000f_ffff_ffff_f000 };
    let slots = memory.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8));
    let mut slots = slots.filter(|slot| memory.read(*slot, big_endian).is_ok_and(|entry| entry & field == address && bit(entry, 0)));
    slots.next().expect("a leaf of one page")
}

#[test]
fn first_stage_tables_behind_a_hole_fault_in_the_second_stage() {
    for seed in 0..12 {
        for nested in [smmu(seed), vtd(seed)] {
            let root = nested.first.config.regions().unwrap()[0].root;
            let entry = second_stage_entry(&nested, root & !0xfff);
            let found = faults(&nested, |snapshot| snapshot.memory.write(entry, 0, nested.second.config.big_endian()));
            let behind: Vec<_> = found.iter().filter(|(span, _)| span.first == 0).collect();
            assert!(behind.iter().all(|(_, fault)| fault.stage == 2 && fault.cause == Cause::Entry(FaultKind::Translation)), "{seed}: {behind:?}");
            assert!(!behind.is_empty(), "{seed}");
        }
    }
}

#[test]
fn first_stage_tables_that_may_not_be_read_fault_in_the_second_stage() {
    for seed in 0..12 {
        for nested in [smmu(seed), vtd(seed)] {
            let root = nested.first.config.regions().unwrap()[0].root;
            let big_endian = nested.second.config.big_endian();
            let slot = second_stage_entry(&nested, root & !0xfff);
            let entry = nested.snapshot.memory.read(slot, big_endian).unwrap();
            // Write-only: S2AP[0] is bit 6, VT-d's R is bit 0.
            let readable = if matches!(nested.second.config, TableConfig::ArmStage2(_)) { 1 << 6 } else { 1 };
            let found = faults(&nested, |snapshot| snapshot.memory.write(slot, entry & !readable, big_endian));
            let (_, fault) = found.iter().find(|(span, _)| span.first == 0).expect("the root cannot be read");
            assert_eq!((fault.stage, fault.cause), (2, Cause::Entry(FaultKind::Permission)), "{seed}");
        }
    }
}

#[test]
fn leaves_to_unmapped_intermediate_addresses_fault_in_the_second_stage() {
    let mut seen = 0;
    for seed in 0..12 {
        for nested in [smmu(seed), vtd(seed)] {
            // Nothing damaged: what the second stage does not map of the first stage's leaves.
            let found = faults(&nested, |_| {});
            for (span, fault) in &found {
                // The first stage maps it for everybody, so that only the second can be at fault.
                let Some(run) = nested.first.truth.iter().find(|run| run.iova <= span.first && span.first - run.iova < run.size) else { continue };
                assert_eq!(fault.stage, 2, "{span}: {fault:?}");
                let absent = fault.path.last().is_some_and(|step| step.entry == Some(0));
                if absent {
                    assert_eq!(fault.cause, Cause::Entry(FaultKind::Translation), "{span}: {fault:?}");
                    assert_eq!(fault.address, Some(run.address + (span.first - run.iova)), "{span}: {fault:?}");
                    seen += 1;
                }
            }
        }
    }
    assert!(seen > 100, "{seen}");
}

#[test]
fn a_guest_with_two_stages_and_a_million_pages_is_no_attack() {
    // As a real guest: many leaves side by side, of which each goes through the second stage.
    let rng = &mut Rng::new(7);
    let first = stagecraft_tests::reference::generate::random_config(Format::VtdFirst, &mut Rng::new(1));
    let pages = (0..20_000)
        .map(|index| Run { iova: index << 12, address: 0x1_0000_0000 + (index << 12), size: 4096, access: Allowed::RW })
        .collect::<Vec<_>>();
    let quiet = Options { restrictions: false, decoys: false, noise: false, clusters: 0 };
    let first = build(first, &pages, rng, quiet);
    let second = VtdSecond { root: 0, levels: 5, input_bits: 57, output_bits: 52, large_2m: true, large_1g: true, snoop_control: false };
    let large = (0..64).map(|index| Run { iova: index << 30, address: index << 30, size: 1 << 30, access: Allowed::RW });
    let far = first.snapshot.memory.pages.keys().map(|page| Run { iova: *page, address: *page, size: 4096, access: Allowed::RW });
    let leaves: Vec<Run> = large.chain(far.filter(|run| run.iova >= 64 << 30)).collect();
    let second = build(TableConfig::VtdSecond(second), &leaves, rng, quiet);
    let mut memory = first.snapshot.memory.clone();
    memory.pages.extend(second.snapshot.memory.pages.clone());
    let snapshot = guest("intel-vtd", &[("CAP", 0), ("ECAP", 0), ("GSTS", 0), ("RTADDR", 0)], 0x38, memory);
    let folder = tempfile::tempdir().unwrap();
    let loaded = load(&snapshot, folder.path());
    let guest = Guest::new(&loaded, plugins()).unwrap();
    let mut space = guest.open(&[plugin_config(&first.config), plugin_config(&second.config)]).unwrap();
    let mut collector = Collector::new(false, 10);
    space.walk(&guest.memory(), guest.map(), Span::ALL, &guest.budget(), &mut collector).unwrap();
    assert_eq!(collector.mappings().len(), 1, "{:?}", collector.mappings().get(..3));
    assert_eq!(collector.mappings()[0].iova.last, (20_000 << 12) - 1);
}
