//! The known errors of the models are still there. One that is gone can be struck from the list, and the tests that stay away from it may ask more.
#![allow(clippy::unwrap_used)]

use std::process::Command;

use stagecraft_models::amd::Amd;
use stagecraft_models::judge::{compare, lookup, second_stage};
use stagecraft_models::known::{self, KnownError};
use stagecraft_models::riscv::{Riscv, RiscvTables};
use stagecraft_models::smmu::{Smmu, SmmuTables, Stages, context_descriptor};
use stagecraft_models::tables::amd::{self, AmdTable};
use stagecraft_models::tables::riscv::{self, RiscvTable};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Access, Board, Memory, Model, Outcome, Probe, Tables, available};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::{Generated, Options, Rng, build};
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};

const PLAIN: Options = Options { clusters: 0, restrictions: false, decoys: false, noise: false };

/// A place for targets, in every machine's RAM.
const TARGET: u64 = 0x12_0000_0000;

/// The list was made with this version; another one may be better.
fn right_version() -> bool {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    output.is_ok_and(|output| String::from_utf8_lossy(&output.stdout).contains("version 10.0."))
}

/// `right` is what the architecture wants: the address, or none for a fault.
fn assert_wrong(error: KnownError, right: Option<u64>, outcome: Outcome) {
    let correct = match (right, outcome) {
        (Some(address), Outcome::Reached(reached)) => address == reached,
        (None, Outcome::Fault(_)) => true,
        (None, Outcome::Nothing) => error.model == "amd-iommu",
        _ => false,
    };
    assert_there(error, !correct, &format!("{outcome:x?} is right"));
}

/// Whether an error is still there; if not, what shows that.
fn assert_there(error: KnownError, there: bool, otherwise: &str) {
    assert!(known::ALL.contains(&error));
    let message = format!("{}: {otherwise}; gone: {}", error.model, error.what);
    if right_version() {
        assert!(there, "{message}");
    } else if !there {
        println!("{message}");
    }
}

/// An error that no test shows could be gone without anybody noticing.
#[test]
fn every_known_error_is_shown() {
    let list = include_str!("../src/known.rs");
    let tests = [include_str!("known.rs"), include_str!("events.rs")].concat();
    let names: Vec<&str> =
        list.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(": KnownError")).map(|(name, _)| name).collect();
    assert_eq!(names.len(), known::ALL.len());
    for name in names {
        let shown = [", ", ")"].iter().any(|end| tests.contains(&format!("known::{name}{end}")));
        assert!(shown, "no test shows {name}");
    }
}

fn page(iova: u64, address: u64, access: Access) -> Run {
    Run { iova, address, size: 4096, access }
}

fn half(granule: u64, input_bits: u32, top_byte_ignored: bool) -> ArmHalf {
    ArmHalf { root: 0, granule, input_bits, top_byte_ignored, hierarchical_disabled: false }
}

fn first_of(generated: &Generated) -> ArmStage1 {
    let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
    config
}

fn second_of(generated: &Generated) -> ArmStage2 {
    let TableConfig::ArmStage2(config) = generated.config else { unreachable!() };
    config
}

/// Changes every entry that is not zero.
fn change(memory: &mut Memory, change: impl Fn(u64) -> u64) {
    let pages: Vec<u64> = memory.pages.keys().copied().collect();
    for slot in pages.iter().flat_map(|page| (*page..*page + 4096).step_by(8)) {
        let entry = memory.read(slot, false).unwrap();
        if entry != 0 {
            memory.write(slot, change(entry), false);
        }
    }
}

/// A comparison that could not fail would prove nothing.
#[test]
fn a_wrong_truth_is_noticed() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(Mode::Legacy, 48).unwrap();
    let config = vtd_second();
    let leaves = [page(0x5000, TARGET, Access::RW), page(0x6000, TARGET + 0x9000, Access::R), page(0x8000, TARGET + 0x7000, Access::W)];
    let generated = build(config, &leaves, &mut Rng::new(1), PLAIN);
    model.write_memory(&generated.snapshot.memory).unwrap();
    model.set_table(Tables::Vtd(generated.config)).unwrap();
    let iovas = [0x5008, 0x6010, 0x7000, 0x8ff8];
    compare(&mut model, &iovas, |iova, write| lookup(&leaves, iova, write), |_, _| true).unwrap();
    for wrong in 0..leaves.len() {
        let mut moved = leaves;
        moved[wrong].address += 4096;
        compare(&mut model, &iovas, |iova, write| lookup(&moved, iova, write), |_, _| true).unwrap_err();
        let mut missing = leaves.to_vec();
        missing.remove(wrong);
        compare(&mut model, &iovas, |iova, write| lookup(&missing, iova, write), |_, _| true).unwrap_err();
        let mut more = leaves;
        more[wrong].access = Access::RW;
        assert_eq!(compare(&mut model, &iovas, |iova, write| lookup(&more, iova, write), |_, _| true).is_ok(), wrong == 0);
    }
    let more = [page(0x7000, TARGET, Access::R)];
    compare(&mut model, &[0x7000], |iova, write| lookup(&more, iova, write), |_, _| true).unwrap_err();
}

fn vtd_second() -> TableConfig {
    TableConfig::VtdSecond(VtdSecond { levels: 4, input_bits: 48, output_bits: 39, ..VtdSecond::default() })
}

#[test]
fn vtd() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(Mode::ScalableSecond, 48).unwrap();
    // A page of 1 GiB around the interrupts, and device memory in it.
    let device = Board::Q35.device_memory().start;
    let leaf = Run { iova: 1 << 30, address: 3 << 30, size: 1 << 30, access: Access::RW };
    let generated = build(vtd_second(), &[leaf], &mut Rng::new(1), PLAIN);
    model.write_memory(&generated.snapshot.memory).unwrap();
    model.set_table(Tables::Vtd(generated.config)).unwrap();
    model.tag_page(device).unwrap();
    assert_wrong(known::VTD_INTERRUPT_PAGES, Some(device), model.dma((1 << 30) + (device - (3 << 30)), false).unwrap());
    // A leaf with SNP.
    let generated = build(vtd_second(), &[page(0x5000, TARGET, Access::RW)], &mut Rng::new(1), PLAIN);
    let mut memory = generated.snapshot.memory.clone();
    change(&mut memory, |entry| if entry & 0xf_ffff_ffff_f000 == TARGET { entry | 1 << 11 } else { entry });
    model.write_memory(&memory).unwrap();
    model.set_table(Tables::Vtd(generated.config)).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::VTD_SNOOP, None, model.dma(0x5000, false).unwrap());
}

#[test]
fn marks_of_vtd() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(Mode::ScalableFirst, 48).unwrap();
    let config = VtdFirst { root: 0, levels: 4, output_bits: 39, large_1g: true, execute_disable: true, extended_access: false };
    let generated = build(TableConfig::VtdFirst(config), &[page(0x5000, TARGET, Access::RW)], &mut Rng::new(1), PLAIN);
    // A is bit 5, D is bit 6.
    for (stands, wrong) in [(0, false), (1 << 5, true), (1 << 6, true), (3 << 5, false)] {
        let (mut memory, mut leaf) = (generated.snapshot.memory.clone(), 0);
        change(&mut memory, |entry| if entry & 0xf_ffff_ffff_f000 == TARGET { entry & !(3 << 5) | stands } else { entry });
        for slot in memory.pages.keys().flat_map(|page| (*page..*page + 4096).step_by(8)) {
            leaf = if memory.read(slot, false).unwrap() & 0xf_ffff_ffff_f000 == TARGET { slot } else { leaf };
        }
        model.write_memory(&memory).unwrap();
        model.set_table(Tables::Vtd(generated.config)).unwrap();
        model.tag_page(TARGET).unwrap();
        let probe = Probe { iova: 0x5000, write: true, expected: Some(TARGET) };
        assert_eq!(model.dma_many(&[probe]).unwrap(), [Outcome::Reached(TARGET)]);
        let marks = model.machine().qtest.read8(leaf).unwrap() & 3 << 5;
        if wrong {
            assert_there(known::VTD_ONE_MARK, marks == stands, &format!("{stands:#x} became {marks:#x}"));
        } else {
            assert_eq!(marks, 3 << 5, "{stands:#x}");
        }
    }
}

/// A register of a model, by its architectural name.
fn register(model: &mut dyn Model, name: &str) -> u64 {
    let found = model.registers().unwrap().into_iter().find(|(other, _)| *other == name);
    found.unwrap_or_else(|| panic!("{} has no {name}", model.name())).1
}

#[test]
fn what_vtd_does_not_have() {
    if !available(Board::Q35) {
        return;
    }
    // CAP: SAGAW 12:8, whose bit 3 is five levels of the second stage, and FL5LP 60. ECAP: NEST 26.
    let five = |cap: u64| cap >> 11 & 1 == 1 || cap >> 60 & 1 == 1;
    for mode in [Mode::Legacy, Mode::ScalableSecond, Mode::ScalableFirst] {
        let mut model = Vtd::start(mode, 48).unwrap();
        let (cap, ecap) = (register(&mut model, "CAP"), register(&mut model, "ECAP"));
        assert_there(known::VTD_FIVE_LEVELS, !five(cap), &format!("CAP is {cap:#x}"));
        assert_there(known::VTD_NESTED, ecap >> 26 & 1 == 0, &format!("ECAP is {ecap:#x}"));
        match Vtd::start(mode, 57) {
            Err(error) => assert!(format!("{error:#}").contains("aw-bits"), "{error:#}"),
            Ok(mut model) => {
                let cap = register(&mut model, "CAP");
                assert_there(known::VTD_FIVE_LEVELS, !five(cap), &format!("with 57 bits CAP is {cap:#x}"));
            }
        }
    }
}

#[test]
fn smmu() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(Stages::Nested).unwrap();
    let mut rng = Rng::new(1);
    // The second of two concatenated tables.
    let config = ArmStage2 { granule: 4096, input_bits: 40, output_bits: 40, start_level: 1, ..ArmStage2::default() };
    let generated = build(TableConfig::ArmStage2(config), &[page(1 << 39, TARGET, Access::RW)], &mut rng, PLAIN);
    model.write_memory(&generated.snapshot.memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { second: Some(second_of(&generated)), ..SmmuTables::default() })).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::SMMU_CONCATENATED, Some(TARGET), model.dma(1 << 39, false).unwrap());
    // A leaf without AP[1].
    let config = ArmStage1 { low: Some(half(4096, 39, false)), output_bits: 40, mair: 0xff44, ..ArmStage1::default() };
    let generated = build(TableConfig::ArmStage1(config), &[page(0x5000, TARGET, Access::RW)], &mut rng, PLAIN);
    let mut memory = generated.snapshot.memory.clone();
    change(&mut memory, |entry| entry & !(1 << 6));
    model.write_memory(&memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { first: Some(first_of(&generated)), ..SmmuTables::default() })).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::SMMU_PRIVILEGED, None, model.dma(0x5000, false).unwrap());
    // A tag in the upper half.
    let config = ArmStage1 { high: Some(half(4096, 39, true)), ..config };
    let generated = build(TableConfig::ArmStage1(config), &[page(u64::MAX - 0xfff, TARGET, Access::RW)], &mut rng, PLAIN);
    model.write_memory(&generated.snapshot.memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { first: Some(first_of(&generated)), ..SmmuTables::default() })).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_eq!(model.dma(u64::MAX - 0xfff, false).unwrap(), Outcome::Reached(TARGET));
    assert_wrong(known::SMMU_TBI1, Some(TARGET), model.dma(0x5aff_ffff_ffff_f000, false).unwrap());
    // A block of 64 GiB.
    let config = ArmStage1 { low: Some(half(16384, 40, false)), output_bits: 40, mair: 0xff44, ..ArmStage1::default() };
    let leaf = Run { iova: 0, address: TARGET, size: 16384, access: Access::RW };
    let generated = build(TableConfig::ArmStage1(config), &[leaf], &mut rng, PLAIN);
    let mut memory = generated.snapshot.memory.clone();
    let first = first_of(&generated);
    let block = 0x10_0000_0000;
    memory.write(first.low.unwrap().root + 8, block | 1 << 10 | 3 << 8 | 1 << 6 | 1, false);
    model.write_memory(&memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { first: Some(first), ..SmmuTables::default() })).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_eq!(model.dma(0, false).unwrap(), Outcome::Reached(TARGET));
    model.tag_page(block).unwrap();
    assert_wrong(known::SMMU_BLOCKS, None, model.dma(1 << 36, false).unwrap());
    // Bits 15:12 with 64K pages.
    let config = ArmStage1 { low: Some(half(65536, 42, false)), output_bits: 40, mair: 0xff44, ..ArmStage1::default() };
    let leaf = Run { iova: 0, address: TARGET, size: 65536, access: Access::RW };
    let generated = build(TableConfig::ArmStage1(config), &[leaf], &mut rng, PLAIN);
    let mut memory = generated.snapshot.memory.clone();
    change(&mut memory, |entry| if entry & 0xffff_ffff_0000 == TARGET { entry | 1 << 12 } else { entry });
    model.write_memory(&memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { first: Some(first_of(&generated)), ..SmmuTables::default() })).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::SMMU_64K_BITS, None, model.dma(0, false).unwrap());
    // Beyond OAS, with stage 2 only.
    let config = ArmStage2 { granule: 4096, input_bits: 39, output_bits: 40, start_level: 1, ..ArmStage2::default() };
    let generated = build(TableConfig::ArmStage2(config), &[page(0x5000, TARGET, Access::RW)], &mut rng, PLAIN);
    model.write_memory(&generated.snapshot.memory).unwrap();
    model.set_table(Tables::Smmu(SmmuTables { second: Some(second_of(&generated)), ..SmmuTables::default() })).unwrap();
    assert!(matches!(model.dma(1 << 43, false).unwrap(), Outcome::Fault(_)));
    assert_wrong(known::SMMU_UNRECORDED, None, model.dma(1 << 50, false).unwrap());
}

#[test]
fn smmu_with_two_stages() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(Stages::Nested).unwrap();
    let context = 0x8000_1000;
    // Granule and output bits of stage 1, and the blocks in which stage 2 moves its tables.
    let mut ask = |granule: u64, output_bits: u32, block: u64| {
        let mut rng = Rng::new(1);
        let config = ArmStage1 { low: Some(half(granule, 39, false)), output_bits, mair: 0xff44, ..ArmStage1::default() };
        // The last entries of the tables, so that they are not in the tables' first pages.
        let iova = (1 << 39) - granule;
        let leaf = Run { iova, address: 0x9000_0000, size: granule, access: Access::RW };
        let first = build(TableConfig::ArmStage1(config), &[leaf], &mut rng, PLAIN);
        let mut memory = first.snapshot.memory.clone();
        for (word, index) in context_descriptor(&first_of(&first)).unwrap().into_iter().zip(0..) {
            memory.write(context + index * 8, word, false);
        }
        let (mut leaves, mut moved) = second_stage(&memory, &[], 4096, block, &[], &mut rng);
        leaves.push(page(0x9000_0000, TARGET, Access::RW));
        leaves.sort_by_key(|leaf| leaf.iova);
        let config = ArmStage2 { granule: 4096, input_bits: 40, output_bits: 40, start_level: 0, ..ArmStage2::default() };
        let second = build(TableConfig::ArmStage2(config), &leaves, &mut rng, PLAIN);
        moved.pages.extend(second.snapshot.memory.pages.clone());
        model.write_memory(&moved).unwrap();
        model
            .set_table(Tables::Smmu(SmmuTables { first: Some(first_of(&first)), second: Some(second_of(&second)), context: Some(context) }))
            .unwrap();
        model.tag_page(TARGET).unwrap();
        model.dma(iova, false).unwrap()
    };
    assert_eq!(ask(4096, 36, 4096), Outcome::Reached(TARGET));
    assert_wrong(known::SMMU_NESTED_ROOT, Some(TARGET), ask(4096, 32, 4096));
    assert_eq!(ask(16384, 36, 16384), Outcome::Reached(TARGET));
    assert_wrong(known::SMMU_NESTED_TABLES, Some(TARGET), ask(16384, 36, 4096));
}

#[test]
fn riscv_entries() {
    if !available(Board::RiscvVirt) {
        return;
    }
    const LEAF: u64 = 0b1110;
    const USER: u64 = 1 << 4;
    let mut model = Riscv::start().unwrap();
    let config = RiscvTable { root: 0, levels: 3, second: false };
    let leaves: Vec<Run> = (0..16).map(|index| page(0x4000_0000 + index * 4096, TARGET + index * 4096, Access::RW)).collect();
    let built = riscv::build(config, &leaves, 0x8010_0000..0xb000_0000, false, &mut Rng::new(1));
    let mut request = |iova: u64, write: bool, entry: &dyn Fn(u64) -> u64| {
        let mut memory = built.memory.clone();
        // Without the random decoys.
        change(&mut memory, |value| if value >> 10 << 12 == 0 { 0 } else { entry(value) });
        model.write_memory(&memory).unwrap();
        model.set_table(Tables::Riscv(RiscvTables { first: Some(built.config), second: None })).unwrap();
        (0..16).for_each(|index| model.tag_page(TARGET + index * 4096).unwrap());
        model.dma(iova, write).unwrap()
    };
    const ACCESSED: u64 = 1 << 6;
    let without_accessed = |entry: u64| if entry & LEAF == 0 { entry } else { entry & !ACCESSED };
    assert!(matches!(request(0x4000_3000, false, &without_accessed), Outcome::Fault(_)));
    assert_wrong(known::RISCV_ACCESSED, None, request(0x4000_3000, true, &without_accessed));
    let mut ask = |iova: u64, entry: &dyn Fn(u64) -> u64| request(iova, false, entry);
    assert_eq!(ask(0x4000_3000, &|entry| entry), Outcome::Reached(TARGET + 0x3000));
    assert_wrong(known::RISCV_USER, None, ask(0x4000_3000, &|entry| if entry & LEAF == 0 { entry } else { entry & !USER }));
    assert_wrong(known::RISCV_POINTER_BITS, None, ask(0x4000_3000, &|entry| if entry & LEAF == 0 { entry | USER } else { entry }));
    // Svnapot: all sixteen entries have N and the same address with 8 in its lowest digit.
    let napot = |entry: u64| if entry & LEAF == 0 { entry } else { entry & !(0xf << 10) | 8 << 10 | 1 << 63 };
    assert_wrong(known::RISCV_UPPER_BITS, Some(TARGET + 0x3000), ask(0x4000_3000, &napot));
}

#[test]
fn riscv_with_two_stages() {
    if !available(Board::RiscvVirt) {
        return;
    }
    let mut model = Riscv::start().unwrap();
    let mut rng = Rng::new(1);
    let places = || 0x8010_0000..0xb000_0000;
    let first = riscv::build(RiscvTable { root: 0, levels: 3, second: false }, &[page(0x5000, 0x7000, Access::RW)], places(), false, &mut rng);
    let mut ask = |access: Access| {
        let (mut leaves, mut moved) = second_stage(&first.memory, &[], 4096, 4096, &[], &mut rng);
        leaves.insert(0, page(0x7000, TARGET, access));
        let second = riscv::build(RiscvTable { root: 0, levels: 3, second: true }, &leaves, places(), false, &mut rng);
        moved.pages.extend(second.memory.pages.clone());
        model.write_memory(&moved).unwrap();
        model.set_table(Tables::Riscv(RiscvTables { first: Some(first.config), second: Some(second.config) })).unwrap();
        model.tag_page(TARGET).unwrap();
        model.dma(0x5000, false).unwrap()
    };
    assert_eq!(ask(Access::RW), Outcome::Reached(TARGET));
    assert_wrong(known::RISCV_TWO_STAGES, Some(TARGET), ask(Access::R));
}

#[test]
fn amd_v1() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Amd::start().unwrap();
    let config = AmdTable { root: 0, mode: 3, access: Access::RW };
    // A seed whose tables leave out level 2.
    let leaves = [page(0x5000, TARGET, Access::RW)];
    let build = |seed| amd::build(config, &leaves, 0x4000_0000..0x8000_0000, &mut Rng::new(seed));
    let tables = (0..1000).map(build).find(|tables| tables.skipped.iter().any(|range| range.end == 1 << 30)).unwrap();
    assert_eq!(tables.built.truth, leaves);
    model.set_table(Tables::Amd(tables.built.config)).unwrap();
    model.write_memory(&tables.built.memory).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_eq!(model.dma(0x5000, false).unwrap(), Outcome::Reached(TARGET));
    assert_wrong(known::AMD_WIDTH, None, model.dma(0x5000 + (1 << 39), false).unwrap());
    assert_wrong(known::AMD_SKIPPED, None, model.dma(0x5000 + (1 << 21), false).unwrap());
    // The leaf's address is the target's.
    let mut memory = tables.built.memory.clone();
    change(&mut memory, |entry| if entry & 0xf_ffff_ffff_f000 == TARGET { entry & !1 } else { entry });
    model.write_memory(&memory).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::AMD_PRESENT, None, model.dma(0x5000, false).unwrap());
    // Bit 52 in pointers.
    let mut memory = tables.built.memory.clone();
    change(&mut memory, |entry| if entry & 0xf_ffff_ffff_f000 == TARGET { entry } else { entry | 1 << 52 });
    model.write_memory(&memory).unwrap();
    model.tag_page(TARGET).unwrap();
    assert_wrong(known::AMD_RESERVED, None, model.dma(0x5000, false).unwrap());
    // A root alone: PR, IR, IW, and NextLevel 0 or 7.
    let mut ask = |mode: u32, entry: u64, iova: u64| {
        let mut memory = Memory::default();
        let root = 0x4000_0000;
        memory.write(root, entry | 1 | 3 << 61, false);
        model.write_memory(&memory).unwrap();
        model.set_table(Tables::Amd(AmdTable { root, mode, access: Access::RW })).unwrap();
        model.tag_page(TARGET).unwrap();
        model.dma(iova, false).unwrap()
    };
    assert_wrong(known::AMD_LEVEL_6, None, ask(6, 0, TARGET));
    // 8 KiB where each entry covers 2 MiB.
    assert_wrong(known::AMD_SIZES, None, ask(2, TARGET | 7 << 9, 0));
    // NextLevel 2 in a table of level 1, and in one of level 2. The entries that follow end the way: a leaf, and a pointer to a table of level 1 with a leaf.
    for (mode, below) in [(1, vec![TARGET]), (2, vec![0x4000_2000 | 1 << 9, TARGET])] {
        let mut memory = Memory::default();
        let tables = (0x4000_0000..).step_by(4096);
        for (table, entry) in tables.zip([0x4000_1000 | 2 << 9].into_iter().chain(below)) {
            memory.write(table, entry | 1 | 3 << 61, false);
        }
        model.write_memory(&memory).unwrap();
        model.set_table(Tables::Amd(AmdTable { root: 0x4000_0000, mode, access: Access::RW })).unwrap();
        model.tag_page(TARGET).unwrap();
        assert_wrong(known::AMD_LOOPS, None, model.dma(0, false).unwrap());
    }
    // GTSup, bit 4, is 1; GIoSup is bit 48.
    let features = register(&mut model, "EXT_FEATURES");
    assert_there(known::AMD_VERSION_2, features >> 48 & 1 == 0, &format!("EXT_FEATURES is {features:#x}"));
}
