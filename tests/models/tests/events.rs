//! The records that the models write about refused requests, and those that the plugins write about the same requests: the same bytes, but for the fields that
//! each test lists, with the reason.
#![allow(clippy::unwrap_used)]

use stagecraft_models::amd::Amd;
use stagecraft_models::judge::second_stage;
use stagecraft_models::riscv::{Riscv, RiscvTables};
use stagecraft_models::smmu::{Smmu, SmmuTables, Stages, context_descriptor};
use stagecraft_models::tables::amd::{self, AmdTable};
use stagecraft_models::tables::riscv::{self, RiscvTable};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Access, Board, FaultRecord, Model, Outcome, Tables, available, known, machine};
use stagecraft_plugin_arm_smmuv3::Smmuv3;
use stagecraft_plugin_intel_vtd::unit::IntelVtd;
use stagecraft_plugin_riscv_iommu::unit::RiscvIommu;
use stagecraft_sdk::{BlockedDma, Error, Event, FaultKind, Registers, Unit, queue};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::{Options, Rng, build};
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, TableConfig, VtdFirst, VtdSecond};

const PLAIN: Options = Options { clusters: 0, restrictions: false, decoys: false, noise: false };
const TARGET: u64 = 0x12_0000_0000;
/// A page that may be read and written, one that may only be read; what follows is not mapped, in the same table.
const BOTH: u64 = 0x4000_5000;
const READ_ONLY: u64 = 0x4000_6000;
const NOTHING: u64 = 0x4000_7000;

fn page(iova: u64, address: u64, access: Access) -> Run {
    Run { iova, address, size: 4096, access }
}

fn leaves() -> [Run; 2] {
    [page(BOTH, TARGET, Access::RW), page(READ_ONLY, TARGET + 0x1000, Access::R)]
}

fn event(fault: FaultKind, format: &str, iova: u64, write: bool) -> Event {
    Event {
        fault,
        name: None,
        format: Some(format.to_owned()),
        level: Some(1),
        entries: Vec::new(),
        id: machine::DEVICE,
        pasid: None,
        iova,
        intermediate: None,
        reading_table: false,
        unreadable: None,
        access: if write { queue::Access::Write } else { queue::Access::Read },
        privileged: false,
        domain: Some(1),
    }
}

/// Requests that fail: to a hole, and to write where only reads pass.
fn refused(format: &str) -> [Event; 3] {
    [
        event(FaultKind::Translation, format, NOTHING + 8, false),
        event(FaultKind::Translation, format, NOTHING + 8, true),
        event(FaultKind::Permission, format, READ_ONLY + 8, true),
    ]
}

/// What the model wrote, and what the plugin writes, of one request; and what the plugin reads of what the model wrote. `different` are the bits of each word that need not agree.
fn compare<U: Unit>(model: &mut impl Model, registers: &[(&str, u64)], event: &Event, different: [u64; 4]) {
    let outcome = model.dma(event.iova, event.access == queue::Access::Write).unwrap();
    let Outcome::Fault(FaultRecord { words, .. }) = outcome else { panic!("{}: {event:x?}: {outcome:x?}", model.name()) };
    let registers: Registers = registers.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
    let record = U::encode_event(&registers, event).unwrap();
    let mut ours = stagecraft_sdk::bits::words(&record.bytes);
    ours.resize(4, 0);
    for ((ours, theirs), different) in ours.iter().zip(words).zip(different) {
        assert_eq!(ours & !different, theirs & !different, "{}: {event:x?}: {ours:#x}, and the model {theirs:#x}", model.name());
    }
    // As a host's kernel would hand out the model's record: the request is found in it. Where the model says other things of requests, of what it says.
    match U::decode_event(&words.map(u64::to_le_bytes).concat()) {
        Ok(decoded) => {
            let Some(BlockedDma { id, pasid, iova, access, privileged }) = decoded else { panic!("{}: {words:x?} is about nothing", model.name()) };
            assert_eq!((id, iova, privileged), (event.id, event.iova, event.privileged), "{}: {words:x?}", model.name());
            if different[0] == 0 {
                assert_eq!((pasid, access), (event.pasid, event.access), "{}: {words:x?}", model.name());
            }
        }
        Err(error) => assert!(matches!(error, Error::Unsupported(_)) && model.name().starts_with("intel-iommu"), "{}: {error:?}", model.name()),
    }
}

#[test]
fn vtd() {
    if !available(Board::Q35) {
        return;
    }
    let second = VtdSecond { levels: 4, input_bits: 48, output_bits: 39, ..VtdSecond::default() };
    let first = VtdFirst { root: 0, levels: 4, output_bits: 39, large_1g: true, execute_disable: true, extended_access: false };
    // Without a PASID (PP 31) the field for it, 59:40, means nothing; the model has all ones there.
    let no_pasid = 0xf_ffff << 40;
    // In scalable mode the model says of such requests that they had the PASID which the context entry gives them (PP).
    let own_pasid = no_pasid | 1 << 31;
    // Scalable mode's reasons, 39:32, for a second stage are its own; the model says those of legacy mode.
    for (mode, config, format, different) in [
        (Mode::Legacy, TableConfig::VtdSecond(second), "intel-vtd/second-stage", no_pasid),
        (Mode::ScalableSecond, TableConfig::VtdSecond(second), "intel-vtd/second-stage", own_pasid | 0xff << 32),
        (Mode::ScalableFirst, TableConfig::VtdFirst(first), "intel-vtd/first-stage", own_pasid),
    ] {
        let mut model = Vtd::start(mode, 48).unwrap();
        let generated = build(config, &leaves(), &mut Rng::new(1), PLAIN);
        model.write_memory(&generated.snapshot.memory).unwrap();
        model.set_table(Tables::Vtd(generated.config)).unwrap();
        let registers = [("RTADDR", if mode == Mode::Legacy { 0 } else { 1 << 10 })];
        for event in refused(format) {
            compare::<IntelVtd>(&mut model, &registers, &event, [0, different, 0, 0]);
        }
    }
}

#[test]
fn smmu() {
    if !available(Board::ArmVirt) {
        return;
    }
    let half = ArmHalf { root: 0, granule: 4096, input_bits: 39, top_byte_ignored: false, hierarchical_disabled: false };
    let first = ArmStage1 { low: Some(half), output_bits: 40, mair: 0xff44, ..ArmStage1::default() };
    let second = ArmStage2 { granule: 4096, input_bits: 39, output_bits: 40, start_level: 1, ..ArmStage2::default() };
    let mut model = Smmu::start(Stages::Nested).unwrap();
    for (config, format) in [(TableConfig::ArmStage1(first), "arm-smmuv3/stage1"), (TableConfig::ArmStage2(second), "arm-smmuv3/stage2")] {
        let generated = build(config, &leaves(), &mut Rng::new(1), PLAIN);
        model.write_memory(&generated.snapshot.memory).unwrap();
        let tables = match generated.config {
            TableConfig::ArmStage1(first) => SmmuTables { first: Some(first), ..SmmuTables::default() },
            TableConfig::ArmStage2(second) => SmmuTables { second: Some(second), ..SmmuTables::default() },
            other => panic!("{other:?}"),
        };
        model.set_table(Tables::Smmu(tables)).unwrap();
        for event in refused(format) {
            // The IPA is that of a page; the model also has the bits below.
            compare::<Smmuv3>(&mut model, &[], &event, [0, 0, 0, 0xfff]);
        }
    }
}

/// Stage 2 fails: for what stage 1 puts out, and for one of stage 1's own tables.
#[test]
fn smmu_nested() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut rng = Rng::new(1);
    let half = ArmHalf { root: 0, granule: 4096, input_bits: 39, top_byte_ignored: false, hierarchical_disabled: false };
    let config = ArmStage1 { low: Some(half), output_bits: 40, mair: 0xff44, ..ArmStage1::default() };
    // The IPA 0x7000 is nowhere.
    let first = build(TableConfig::ArmStage1(config), &[page(BOTH, 0x7000, Access::RW)], &mut rng, PLAIN);
    let TableConfig::ArmStage1(config) = first.config else { panic!() };
    let context = 0x8000_1000;
    let mut memory = first.snapshot.memory.clone();
    for (word, index) in context_descriptor(&config).unwrap().into_iter().zip(0..) {
        memory.write(context + index * 8, word, false);
    }
    // The last table on the way has the leaf.
    let leaf = memory.pages.iter().find(|(_, bytes)| bytes.as_chunks::<8>().0.iter().any(|word| u64::from_le_bytes(*word) >> 12 & 0xf_ffff == 7));
    let leaf = *leaf.unwrap().0;
    let second = ArmStage2 { granule: 4096, input_bits: 42, output_bits: 42, start_level: 0, ..ArmStage2::default() };
    let mut model = Smmu::start(Stages::Nested).unwrap();
    for missing in [None, Some(leaf)] {
        let (leaves, mut moved) = second_stage(&memory, &[], 4096, 4096, &[], &mut rng);
        let leaves: Vec<Run> = leaves.into_iter().filter(|run| missing.is_none_or(|page| !(run.iova..run.iova + run.size).contains(&page))).collect();
        let second = build(TableConfig::ArmStage2(second), &leaves, &mut rng, PLAIN);
        let TableConfig::ArmStage2(second_config) = second.config else { panic!() };
        moved.pages.extend(second.snapshot.memory.pages.clone());
        model.write_memory(&moved).unwrap();
        model.set_table(Tables::Smmu(SmmuTables { first: Some(config), second: Some(second_config), context: Some(context) })).unwrap();
        for write in [false, true] {
            let event = event(FaultKind::Translation, "arm-smmuv3/stage2", BOTH + 8, write);
            let event = match missing {
                None => Event { intermediate: Some(0x7008), ..event },
                Some(table) => Event { intermediate: Some(table), reading_table: true, ..event },
            };
            // Of a table below the first the model says stage 1 (S2 39), and it never says what was done to a table (TTRnW 44).
            let different = if missing.is_some() { 1 << 39 | 1 << 44 } else { 0 };
            compare::<Smmuv3>(&mut model, &[], &event, [0, different, 0, 0xfff]);
        }
    }
}

#[test]
fn riscv() {
    if !available(Board::RiscvVirt) {
        return;
    }
    let places = || 0x8010_0000..0xb000_0000;
    // The model calls every request a write (TTYP 39:34), and says of each that it has a process id (PV 32), which is 0.
    let different = [0x3f << 34 | 1 << 32, 0, 0, 0];
    let mut model = Riscv::start().unwrap();
    let mut rng = Rng::new(1);
    let first = riscv::build(RiscvTable { root: 0, levels: 3, second: false }, &leaves(), places(), false, &mut rng);
    model.write_memory(&first.memory).unwrap();
    model.set_table(Tables::Riscv(RiscvTables { first: Some(first.config), second: None })).unwrap();
    for event in refused("riscv-iommu/first-stage") {
        compare::<RiscvIommu>(&mut model, &[], &event, different);
    }
    let second = riscv::build(RiscvTable { root: 0, levels: 3, second: true }, &leaves(), places(), false, &mut rng);
    model.write_memory(&second.memory).unwrap();
    model.set_table(Tables::Riscv(RiscvTables { first: None, second: Some(second.config) })).unwrap();
    for event in refused("riscv-iommu/second-stage") {
        // The model does not say the guest-physical address, which is the IOVA.
        compare::<RiscvIommu>(&mut model, &[], &event, [different[0], 0, 0, u64::MAX]);
    }
    // Both: the first stage leads to an address that the second does not have.
    let first = riscv::build(RiscvTable { root: 0, levels: 3, second: false }, &[page(BOTH, 0x7000, Access::RW)], places(), false, &mut rng);
    let (leaves, mut moved) = second_stage(&first.memory, &[], 4096, 4096, &[], &mut rng);
    let second = riscv::build(RiscvTable { root: 0, levels: 3, second: true }, &leaves, places(), false, &mut rng);
    moved.pages.extend(second.memory.pages.clone());
    model.write_memory(&moved).unwrap();
    model.set_table(Tables::Riscv(RiscvTables { first: Some(first.config), second: Some(second.config) })).unwrap();
    // Of reads the model says that they were writes: see [`known::RISCV_TWO_STAGES`].
    let nested = Event { intermediate: Some(0x7008), ..event(FaultKind::Translation, "riscv-iommu/second-stage", BOTH + 8, true) };
    compare::<RiscvIommu>(&mut model, &[], &nested, different);
}

/// There is nothing to compare with: see [`known::AMD_EVENTS`]. When that is gone this test says so, and records can be compared as above.
#[test]
fn amd() {
    if !available(Board::Q35) {
        return;
    }
    assert!(known::ALL.contains(&known::AMD_EVENTS));
    let mut model = Amd::start().unwrap();
    let config = AmdTable { root: 0, mode: 3, access: Access::RW };
    let tables = amd::build(config, &leaves(), 0x4000_0000..0x8000_0000, &mut Rng::new(1));
    model.set_table(Tables::Amd(tables.built.config)).unwrap();
    model.write_memory(&tables.built.memory).unwrap();
    for event in refused("amd-vi/v1") {
        assert_eq!(model.dma(event.iova, event.access == queue::Access::Write).unwrap(), Outcome::Nothing);
    }
}
