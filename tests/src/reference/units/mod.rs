//! Units set up by hand around generated tables: shapes that the fixtures do not have, above all two stages that follow each other.

use std::collections::BTreeMap;

use super::detect::MessageTable;
use super::generate::{Format, Generated, Options, Rng, build, generate_with, says_write_only};
use super::snapshot::{Memory, Snapshot};
use super::tables::{ArmHalf, ArmStage2, TableConfig, VtdSecond};
use super::{Access, Run, merge};

mod amd;
mod riscv;

pub use amd::{amd_guest, amd_host, amd_nested};
pub use riscv::{riscv_nested, riscv_single};

/// Where structures go that no stage translates; generated tables are elsewhere.
pub const STRUCTURES: u64 = 0x30_0000_0000;

/// A guest's first-stage tables behind a second stage that moves each of their pages.
#[derive(Debug)]
pub struct Nested {
    /// Stage 1, with the memory and the truth that it has alone.
    pub first: Generated,
    /// Stage 2.
    pub second: Generated,
    /// What both stages give together.
    pub truth: Vec<Run>,
    /// All tables, where the second stage puts them.
    pub memory: Memory,
}

/// Hardware can mark every entry of the first stage: the second lets its tables be written. `extra` are more guest pages that the second stage has to map, with their content.
pub fn nest(first: Generated, second: TableConfig, extra: &Memory, seed: u64) -> Nested {
    let mut rng = Rng::new(seed);
    let mut pages: BTreeMap<u64, Run> = BTreeMap::new();
    let mut memory = Memory::default();
    let mut next = 0x20_0000_0000;
    for (page, content) in first.snapshot.memory.pages.iter().chain(&extra.pages) {
        pages.insert(*page, Run { iova: *page, address: next, size: 4096, access: Access::RW });
        memory.pages.insert(next, content.clone());
        next += 4096;
    }
    // Some pages of what the guest maps: the first ones, one of them missing now and then, and the last one.
    for run in &first.truth {
        let count = (run.size / 4096).min(20);
        for index in (0..count).chain([run.size / 4096 - 1]) {
            let page = run.address + index * 4096;
            if rng.percent(80) && !(0xfee0_0000..0xfef0_0000).contains(&page) {
                let access = rng.pick(&[Access::R, Access::W, Access::RW, Access::RW, Access::RW]);
                let access = if access == Access::W && !says_write_only(&second) { Access::RW } else { access };
                pages.entry(page).or_insert(Run { iova: page, address: 0x1_0000_0000 + rng.below(0x1000) * 4096, size: 4096, access });
            }
        }
    }
    let leaves: Vec<Run> = pages.into_values().collect();
    let second = build(second, &leaves, &mut rng, Options { restrictions: false, ..Options::default() });
    memory.pages.extend(second.snapshot.memory.pages.clone());
    // Page by page, from the second stage's side: what it really allows is in its truth.
    let mut both = Vec::new();
    for leaf in &leaves {
        let Some(run) = second.truth.iter().find(|run| run.iova <= leaf.iova && leaf.iova - run.iova < run.size) else { continue };
        let leaf = &Run { access: run.access, ..*leaf };
        for run in &first.truth {
            if run.address <= leaf.iova && leaf.iova - run.address < run.size && run.access.and(leaf.access) != Access::NONE {
                both.push(Run { iova: run.iova + (leaf.iova - run.address), access: run.access.and(leaf.access), ..*leaf });
            }
        }
    }
    Nested { first, second, truth: merge(both), memory }
}

/// A place in a unit's structures: device and process ids, and the tables that requests get.
#[derive(Clone, Debug)]
pub struct Request {
    /// Device id.
    pub id: u64,
    /// PASID or process id, none for requests without.
    pub pasid: Option<u64>,
    /// Ids that are next to it and have nothing.
    pub others: Vec<(u64, Option<u64>)>,
    /// The device's MSI page table, if it has one.
    pub messages: Option<MessageTable>,
}

/// Writes a page's first words.
pub fn write_words(memory: &mut Memory, address: u64, words: &[u64]) {
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
    cd[1] = low.root + (u64::from(low.hierarchical_disabled) << 1) + (u64::from(config.hardware_tables) << 3);
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

/// The unit of a stream with this table: what else it has is behind 48 bits.
fn smmu(memory: Memory, base_cfg: u64, config: &TableConfig) -> Snapshot {
    let (output_bits, input_bits, lpa) = match config {
        TableConfig::ArmStage1(config) => (config.output_bits, 0, config.lpa),
        TableConfig::ArmStage2(config) => (config.output_bits, config.input_bits, config.lpa),
        _ => unreachable!(),
    };
    // OAS: with 52 bits there are larger blocks, and a second stage has no larger input.
    let wide = output_bits > 48 || input_bits > 48 || lpa;
    // IDR0: both byte orders, accessed and dirty marks, those of tables too, two-level tables; IDR1: 16 bits of StreamID and SubstreamID; IDR3.HAD, STT; IDR5: 52 bits of input, all
    // granules, DS.
    let registers = [
        ("IDR0", 0x090c_10db),
        ("IDR1", (16 << 6) + 16),
        ("IDR3", 0x204),
        ("IDR5", 0x4f0 + if wide { 6 } else { 5 }),
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

/// Stream 0x38 of an SMMUv3 with two stages: requests without a substream and with substream 70 get the same tables. None if the seed gives no such guest.
#[allow(clippy::missing_panics_doc)]
pub fn smmu_nested(seed: u64) -> Option<(Snapshot, Nested)> {
    let first = generate_with(Format::ArmStage1, seed, Options { clusters: 6, ..Options::default() });
    let TableConfig::ArmStage1(config) = first.config else { unreachable!() };
    if config.output_bits > 48 || first.truth.is_empty() {
        return None;
    }
    // Stage 2: concatenated tables for half of them.
    let (input_bits, start_level) = if config.output_bits <= 40 && seed.is_multiple_of(2) { (40, 1) } else { (48, 0) };
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
    write_words(&mut memory, STRUCTURES + 0x38 * 64, &ste);
    // A linear table of 256 STEs.
    Some((smmu(memory, 8, &nested.first.config), nested))
}

/// Stream 0x103 of an SMMUv3 with one stage, of any kind that the generator makes, behind a two-level stream table.
#[allow(clippy::missing_panics_doc)]
pub fn smmu_single(format: Format, seed: u64) -> (Snapshot, Generated) {
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
            word +=
                (u64::from(config.access_flag_disabled) << 21) + (u64::from(config.hardware_dirty) << 23) + (u64::from(config.hardware_access) << 24);
            word += u64::from(config.hardware_tables) << 27;
            [1 + (6 << 1), 0, word << 32, config.root + (u64::from(config.lpa2) << 3) + (u64::from(config.start_level == -1) << 2)]
        }
        _ => unreachable!(),
    };
    // Two levels with SPLIT 8: descriptor 1 points to 2^(5-1) STEs, of which 0x103 is the fourth.
    write_words(&mut memory, STRUCTURES, &[0, STRUCTURES + 0x1000 + 5]);
    write_words(&mut memory, STRUCTURES + 0x1000 + 3 * 64, &ste);
    (smmu(memory, 16 + (8 << 6) + (1 << 16), &generated.config), generated)
}

/// A VT-d unit with its structures at [`STRUCTURES`]; `mode` 0 is legacy, 1 scalable.
pub fn vtd(memory: Memory, mode: u64) -> Snapshot {
    // CAP: SAGAW 3, 4, 5 levels; MGAW 57; SLLPS 2M, 1G; FS1GP; FS5LP.
    let cap = (0b1110 << 8) + (56 << 16) + (0b11 << 34) + (1 << 56) + (1 << 60);
    // ECAP: device TLBs, pass-through, nesting, 20-bit PASIDs, one for requests without, scalable mode, second and first stage.
    let registers = [
        ("CAP", cap),
        ("ECAP", (1 << 2) + (1 << 6) + (1 << 26) + (1 << 40) + (19 << 35) + (1 << 43) + (1 << 46) + (1 << 47) + (1 << 49)),
        ("GSTS", 0x8000_0000),
        ("RTADDR", STRUCTURES + (mode << 10)),
    ];
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

/// Function 0x5fe of a VT-d unit in scalable mode with nested translation, for requests without a PASID; they use PASID 0x4321, which others may not.
#[allow(clippy::missing_panics_doc)]
pub fn vtd_nested(seed: u64) -> (Snapshot, Nested) {
    let mut first = generate_with(Format::VtdFirst, seed, Options { clusters: 6, ..Options::default() });
    let TableConfig::VtdFirst(config) = &mut first.config else { unreachable!() };
    // The unit has no EAFE.
    config.extended_access = false;
    let config = *config;
    // In scalable mode, SNP is not reserved.
    let second = VtdSecond { levels: 5, input_bits: 57, output_bits: 52, snoop_control: true, ..VtdSecond::default() };
    let nested = nest(first, TableConfig::VtdSecond(second), &Memory::default(), seed);
    let TableConfig::VtdSecond(second) = nested.second.config else { unreachable!() };
    let mut memory = nested.memory.clone();
    // AW 3, PGTT 3; FSPM from the levels.
    let third = config.root + (u64::from(config.levels - 4) << 2);
    scalable(&mut memory, 1 + (3 << 2) + (3 << 6) + second.root, third);
    (vtd(memory, 1), nested)
}
