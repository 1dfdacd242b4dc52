//! Units set up by hand around generated tables: shapes that the fixtures do not have, above all two stages that follow each other.

use std::collections::BTreeMap;

use super::detect::{Resolution, resolve, resolve_pasid};
use super::generate::{Format, Generated, Options, Rng, build, generate_with};
use super::snapshot::{Memory, Snapshot};
use super::tables::{ArmHalf, ArmStage2, TableConfig, VtdSecond};
use super::walk::{Fault, Walker};
use super::{Access, Run, merge};

/// Where structures go that no stage translates; generated tables are elsewhere.
const STRUCTURES: u64 = 0x30_0000_0000;

/// A guest's first-stage tables behind a second stage that moves each of their pages.
struct Nested {
    first: Generated,
    second: Generated,
    /// What both stages give together.
    truth: Vec<Run>,
    memory: Memory,
}

/// `extra` are more guest pages that the second stage has to map, with their content.
fn nest(first: Generated, second: TableConfig, extra: &Memory, seed: u64) -> Nested {
    let mut rng = Rng::new(seed);
    let mut pages: BTreeMap<u64, Run> = BTreeMap::new();
    let mut memory = Memory::default();
    let mut next = 0x20_0000_0000;
    for (page, content) in first.snapshot.memory.pages.iter().chain(&extra.pages) {
        pages.insert(*page, Run { iova: *page, address: next, size: 4096, access: Access::R });
        memory.pages.insert(next, *content);
        next += 4096;
    }
    // Some pages of what the guest maps: the first ones, one of them missing now and then, and the last one.
    for run in &first.truth {
        let count = (run.size / 4096).min(20);
        for index in (0..count).chain([run.size / 4096 - 1]) {
            let page = run.address + index * 4096;
            if rng.percent(80) && !(0xfee0_0000..0xfef0_0000).contains(&page) {
                let access = rng.pick(&[Access::R, Access::W, Access::RW, Access::RW, Access::RW]);
                pages.entry(page).or_insert(Run { iova: page, address: 0x1_0000_0000 + rng.below(0x1000) * 4096, size: 4096, access });
            }
        }
    }
    let leaves: Vec<Run> = pages.into_values().collect();
    let second = build(second, &leaves, &mut rng, Options { restrictions: false, ..Options::default() });
    memory.pages.extend(second.snapshot.memory.pages.clone());
    // Page by page, from the second stage's side.
    let mut both = Vec::new();
    for leaf in &leaves {
        for run in &first.truth {
            if run.address <= leaf.iova && leaf.iova - run.address < run.size && run.access.and(leaf.access) != Access::NONE {
                both.push(Run { iova: run.iova + (leaf.iova - run.address), access: run.access.and(leaf.access), ..*leaf });
            }
        }
    }
    Nested { first, second, truth: merge(both), memory }
}

fn check(snapshot: &Snapshot, nested: &Nested, stages: &[TableConfig]) {
    assert_eq!(stages, [nested.first.config, nested.second.config]);
    let walker = Walker::new(&snapshot.memory, stages).unwrap();
    let found = walker.mappings().unwrap();
    for (index, run) in nested.truth.iter().enumerate() {
        assert_eq!(found.get(index), Some(run), "run {index}");
    }
    assert_eq!(found.len(), nested.truth.len());
    for run in &nested.truth {
        for offset in [0, run.size - 1] {
            for write in [false, true] {
                let expected = if run.access.allows(write) { Ok(run.address + offset) } else { Err(Fault) };
                assert_eq!(walker.translate(run.iova + offset, write), expected, "{run:?}");
            }
        }
    }
}

fn write_words(memory: &mut Memory, address: u64, words: &[u64]) {
    memory.add_zeroed(address, 4096);
    for (index, word) in words.iter().enumerate() {
        memory.write(address + index as u64 * 8, *word, false);
    }
}

fn granule_code(granule: u64) -> u64 {
    match granule {
        4096 => 0,
        65536 => 1,
        _ => 2,
    }
}

fn size_code(bits: u32) -> u64 {
    [32, 36, 40, 42, 44, 48, 52].iter().position(|size| *size == bits).unwrap() as u64
}

/// A context descriptor for a generated first stage.
fn context_descriptor(config: &TableConfig) -> [u64; 8] {
    let TableConfig::ArmStage1(config) = config else { unreachable!() };
    let low = config.low.unwrap();
    let mut cd = [0; 8];
    cd[0] = 64 - u64::from(low.input_bits) + (granule_code(low.granule) << 6) + (1 << 31) + (size_code(config.output_bits) << 32) + (1 << 41);
    cd[0] += (u64::from(config.big_endian) << 15) + (u64::from(config.access_flag_disabled) << 35) + (u64::from(low.top_byte_ignored) << 38);
    cd[0] += (u64::from(config.hardware_dirty) << 42) + (u64::from(config.hardware_access) << 43);
    cd[1] = low.root + (u64::from(low.hierarchical_disabled) << 1);
    cd[2] = u64::from(config.lpa2) << 58;
    cd[3] = config.mair;
    match config.high {
        None => cd[0] += 1 << 30,
        Some(ArmHalf { root, granule, input_bits, top_byte_ignored, hierarchical_disabled }) => {
            let code = match granule {
                16384 => 1,
                4096 => 2,
                _ => 3,
            };
            cd[0] += ((64 - u64::from(input_bits)) << 16) + (code << 22) + (u64::from(top_byte_ignored) << 39);
            cd[2] += root + (u64::from(hierarchical_disabled) << 1);
        }
    }
    cd
}

fn smmu(memory: Memory, base_cfg: u64) -> Snapshot {
    // IDR0: both stages, AArch64 tables, hardware updates, 16-bit ASIDs and VMIDs, two levels of CDs and STEs. IDR1.SSIDSIZE 16, SIDSIZE 32. IDR3.HAD, STT. IDR5:
    // 52 bits both ways, all granules, DS.
    let idr0 = 0b11 + (0b10 << 2) + (0b10 << 6) + (1 << 12) + (0b11 << 18) + (1 << 27);
    let registers = [
        ("IDR0", idr0),
        ("IDR1", (16 << 6) + 32),
        ("IDR3", 0x204),
        ("IDR5", 0x4f6),
        ("CR0", 0b1101),
        ("CR2", 0),
        ("STRTAB_BASE_CFG", base_cfg),
        ("STRTAB_BASE", 0x4000_0000_0000_0000 + STRUCTURES),
    ];
    Snapshot {
        unit_kind: "arm-smmuv3".to_string(),
        registers: registers.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        memory,
        ..Snapshot::default()
    }
}

#[test]
fn smmu_stage_1_behind_stage_2_with_substreams() {
    let mut tried = 0;
    for seed in 0..200 {
        let first = generate_with(Format::ArmStage1, seed, Options { clusters: 6, ..Options::default() });
        let TableConfig::ArmStage1(config) = first.config else { unreachable!() };
        if config.output_bits > 48 || first.truth.is_empty() {
            continue;
        }
        // Stage 2: concatenated tables for half of them.
        let (input_bits, start_level) = if config.output_bits <= 40 && seed % 2 == 0 { (40, 1) } else { (48, 0) };
        let second = TableConfig::ArmStage2(ArmStage2 { granule: 4096, input_bits, output_bits: 48, start_level, ..ArmStage2::default() });
        // Guest memory for CDs: the L1CD table at one page, CDs 64 to 127 and 0 to 63 at two others.
        let (l1, upper, lower) = (0x12_3000, 0x45_6000, 0x78_9000);
        let mut extra = Memory::default();
        write_words(&mut extra, l1, &[lower + 1, upper + 1]);
        write_words(&mut extra, lower, &context_descriptor(&first.config));
        write_words(&mut extra, upper + 6 * 64, &context_descriptor(&first.config));
        let nested = nest(first, second, &extra, seed);
        let TableConfig::ArmStage2(second) = nested.second.config else { unreachable!() };
        let mut memory = nested.memory.clone();
        memory.add_zeroed(STRUCTURES, 0x4000);
        // STE 0x38: Config 7, S1Fmt 1, S1CDMax 8, S1DSS 2.
        let s2sl0 = 2 - start_level as u64;
        let word = ((64 - u64::from(input_bits)) << 32) + (s2sl0 << 38) + (size_code(48) << 48) + (1 << 51) + (u64::from(second.big_endian) << 52);
        let ste = [1 + (7 << 1) + (1 << 4) + l1 + (8 << 59), 2, word, second.root];
        let place = STRUCTURES + 0x38 * 64;
        write_words(&mut memory, place, &ste);
        // A linear table of 256 STEs.
        let mut snapshot = smmu(memory, 8);
        for pasid in [None, Some(70)] {
            let Resolution::Tables(stages) = resolve_pasid(&snapshot, 0x38, pasid).unwrap() else { panic!("{seed} {pasid:?}") };
            check(&snapshot, &nested, &stages);
        }
        for pasid in [0, 71, 1, 256] {
            assert!(matches!(resolve_pasid(&snapshot, 0x38, Some(pasid)), Ok(Resolution::Blocked(_))), "{seed} {pasid}");
        }
        assert!(matches!(resolve(&snapshot, 0x100), Ok(Resolution::Blocked(_))));
        assert!(matches!(resolve(&snapshot, 0x39), Ok(Resolution::Blocked(_))));
        // S1DSS 1 leaves stage 2 alone, 0 terminates; Config 4 bypasses and 0 aborts.
        snapshot.memory.write(place + 8, 1, false);
        assert_eq!(resolve(&snapshot, 0x38), Ok(Resolution::Tables(vec![nested.second.config])));
        snapshot.memory.write(place + 8, 0, false);
        assert!(matches!(resolve(&snapshot, 0x38), Ok(Resolution::Blocked(_))));
        snapshot.memory.write(place, 1 + (4 << 1), false);
        assert_eq!(resolve(&snapshot, 0x38), Ok(Resolution::Bypass));
        snapshot.memory.write(place, 1, false);
        assert!(matches!(resolve(&snapshot, 0x38), Ok(Resolution::Blocked(_))));
        snapshot.registers.insert("CR0".to_string(), 0);
        assert_eq!(resolve(&snapshot, 0x38), Ok(Resolution::Bypass));
        tried += 1;
    }
    assert!(tried > 50, "{tried}");
}

#[test]
fn smmu_context_descriptors_and_stage_2_entries_of_every_kind() {
    for seed in 0..300 {
        for format in [Format::ArmStage1, Format::ArmStage2] {
            let generated = generate_with(format, seed, Options::default());
            let mut memory = generated.snapshot.memory.clone();
            memory.add_zeroed(STRUCTURES, 0x8000);
            let context = STRUCTURES + 0x7000;
            let ste = match generated.config {
                TableConfig::ArmStage1(_) => {
                    write_words(&mut memory, context, &context_descriptor(&generated.config));
                    [1 + (5 << 1) + context, 0, 0, 0]
                }
                TableConfig::ArmStage2(config) => {
                    let sl0 = match (config.granule, config.start_level) {
                        (4096, -1) => 0,
                        (4096, 3) => 3,
                        (4096, level) => 2 - level,
                        (_, level) => 3 - level,
                    };
                    let mut word = 64 - u64::from(config.input_bits) + ((sl0 as u64) << 6) + (granule_code(config.granule) << 14);
                    word += (size_code(config.output_bits) << 16) + (1 << 19) + (u64::from(config.big_endian) << 20);
                    word += (u64::from(config.access_flag_disabled) << 21)
                        + (u64::from(config.hardware_dirty) << 23)
                        + (u64::from(config.hardware_access) << 24);
                    [1 + (6 << 1), 0, word << 32, config.root + (u64::from(config.lpa2) << 3) + (u64::from(config.start_level == -1) << 2)]
                }
                _ => unreachable!(),
            };
            // Two levels with SPLIT 8: descriptor 1 points to 2^(5-1) STEs, of which 0x103 is the fourth.
            write_words(&mut memory, STRUCTURES, &[0, STRUCTURES + 0x1000 + 5]);
            write_words(&mut memory, STRUCTURES + 0x1000 + 3 * 64, &ste);
            let snapshot = smmu(memory, 16 + (8 << 6) + (1 << 16));
            assert_eq!(resolve(&snapshot, 0x103), Ok(Resolution::Tables(vec![generated.config])), "{format:?} {seed}");
            for id in [0x3, 0x102, 0x110, 0x203, 0x10103] {
                assert!(matches!(resolve(&snapshot, id), Ok(Resolution::Blocked(_))), "{id:#x}");
            }
        }
    }
}

fn vtd(memory: Memory, mode: u64) -> Snapshot {
    // CAP: 16-bit domain ids; SAGAW 3, 4, 5 levels; MGAW 57; SLLPS 2M, 1G; FS1GP; FS5LP.
    let cap = 6 + (0b1110 << 8) + (56 << 16) + (0b11 << 34) + (1 << 56) + (1 << 60);
    // ECAP: DT, PT, NEST, PSS 20 bits, PASID, SMTS, SSTS, FSTS, RPS.
    let ecap = (1 << 2) + (1 << 6) + (1 << 26) + (19 << 35) + (1 << 40) + (1 << 43) + (1 << 46) + (1 << 47) + (1 << 49);
    let registers = [("CAP", cap), ("ECAP", ecap), ("GSTS", 0x8000_0000), ("RTADDR", STRUCTURES + (mode << 10))];
    Snapshot {
        unit_kind: "intel-vtd".to_string(),
        registers: registers.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        memory,
        ..Snapshot::default()
    }
}

/// A scalable-mode path to PASID 0x4321 of function 0xfe on bus 5; the PASID entry's first and third word are given.
fn scalable(memory: &mut Memory, first: u64, third: u64) {
    memory.add_zeroed(STRUCTURES, 0x1000);
    // The upper half of the root entry is for functions from 128.
    memory.write(STRUCTURES + 5 * 16 + 8, STRUCTURES + 0x1000 + 1, false);
    // PDTS 3: 1024 directory entries, which take two pages.
    write_words(memory, STRUCTURES + 0x1000 + (0xfe - 128) * 32, &[STRUCTURES + 0x2000 + (3 << 9) + (1 << 3) + 1, 0x4321]);
    memory.add_zeroed(STRUCTURES + 0x1000, 0x4000);
    write_words(memory, STRUCTURES + 0x2000 + (0x4321 >> 6) * 8, &[STRUCTURES + 0x4000 + 1]);
    write_words(memory, STRUCTURES + 0x4000 + (0x4321 % 64) * 64, &[first, 0, third]);
}

#[test]
fn vtd_first_stage_behind_second_stage() {
    for seed in 0..60 {
        let first = generate_with(Format::VtdFirst, seed, Options { clusters: 6, ..Options::default() });
        let TableConfig::VtdFirst(config) = first.config else { unreachable!() };
        let second = VtdSecond { root: 0, levels: 5, input_bits: 57, output_bits: 52, large_2m: true, large_1g: true, snoop_control: false };
        let nested = nest(first, TableConfig::VtdSecond(second), &Memory::default(), seed);
        let TableConfig::VtdSecond(second) = nested.second.config else { unreachable!() };
        let mut memory = nested.memory.clone();
        // AW 3, PGTT 3; FSPM from the levels, NXE.
        let third = config.root + (u64::from(config.levels - 4) << 2) + (1 << 5);
        scalable(&mut memory, 1 + (3 << 2) + (3 << 6) + second.root, third);
        let mut snapshot = vtd(memory, 1);
        let Resolution::Tables(stages) = resolve(&snapshot, 0x5fe).unwrap() else { panic!("{seed}") };
        check(&snapshot, &nested, &stages);
        // RID_PASID is for requests without PASID.
        assert!(matches!(resolve_pasid(&snapshot, 0x5fe, Some(0x4321)), Ok(Resolution::Blocked(_))));
        assert!(matches!(resolve_pasid(&snapshot, 0x5fe, Some(0x4322)), Ok(Resolution::Blocked(_))));
        assert!(matches!(resolve_pasid(&snapshot, 0x5fe, Some(0x1_4321)), Ok(Resolution::Blocked(_))));
        for id in [0x5ff, 0x57e, 0x4fe] {
            assert!(matches!(resolve(&snapshot, id), Ok(Resolution::Blocked(_))), "{id:#x}");
        }
        // The other values of PGTT.
        let entry = STRUCTURES + 0x4000 + (0x4321 % 64) * 64;
        let with_type = |snapshot: &mut Snapshot, code: u64| {
            snapshot.memory.write(entry, 1 + (3 << 2) + (code << 6) + second.root, false);
            resolve(snapshot, 0x5fe).unwrap()
        };
        assert_eq!(with_type(&mut snapshot, 1), Resolution::Tables(vec![nested.first.config]));
        assert_eq!(with_type(&mut snapshot, 2), Resolution::Tables(vec![nested.second.config]));
        assert_eq!(with_type(&mut snapshot, 4), Resolution::Bypass);
        assert!(matches!(with_type(&mut snapshot, 5), Resolution::Blocked(_)));
        snapshot.registers.insert("GSTS".to_string(), 0);
        assert_eq!(resolve(&snapshot, 0x5fe), Ok(Resolution::Bypass));
    }
}

#[test]
fn vtd_legacy_context_entries() {
    let mut memory = Memory::default();
    memory.add_zeroed(STRUCTURES, 0x2000);
    memory.write(STRUCTURES + 2 * 16, STRUCTURES + 0x1000 + 1, false);
    let context = STRUCTURES + 0x1000;
    // Functions 0, 1, 2: three and five levels, passed through; 3 reserved type, 4 reserved width.
    for (function, low, high) in [(0, 0x5000_0001, 1), (1, 0x5000_0005, 3), (2, 0b1001, 2), (3, 0b1101, 2), (4, 0x5000_0001, 4)] {
        write_words(&mut memory, context + function * 16, &[low, high]);
    }
    let snapshot = vtd(memory, 0);
    let tables = |levels: u32| {
        let input_bits = 12 + 9 * levels;
        Resolution::Tables(vec![TableConfig::VtdSecond(VtdSecond {
            root: 0x5000_0000,
            levels,
            input_bits,
            output_bits: 52,
            large_2m: true,
            large_1g: true,
            snoop_control: false,
        })])
    };
    assert_eq!(resolve(&snapshot, 0x200), Ok(tables(3)));
    assert_eq!(resolve(&snapshot, 0x201), Ok(tables(5)));
    assert_eq!(resolve(&snapshot, 0x202), Ok(Resolution::Bypass));
    for id in [0x203, 0x204, 0x205, 0x100] {
        assert!(matches!(resolve(&snapshot, id), Ok(Resolution::Blocked(_))), "{id:#x}");
    }
}
