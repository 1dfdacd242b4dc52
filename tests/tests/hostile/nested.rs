//! Two stages: a hostile second stage under a first, and first-stage tables behind its holes.

use stagecraft::guest::Guest;
use stagecraft::memory::Limits;
use stagecraft::table::{Cause, Collector, FaultKind};
use stagecraft::{Access, Iova, Span};
use stagecraft_tests::reference::generate::{Format, Generated, Options, Rng, build, random_config};
use stagecraft_tests::reference::snapshot::{Device, MemoryRange, Snapshot};
use stagecraft_tests::reference::tables::{TableConfig, VtdSecond};
use stagecraft_tests::reference::{Access as Allowed, Run, bit, units};

use super::compare::plugin_config;
use super::{load, plugins};

/// A guest with two stages, found through its unit's registers.
pub struct Nested {
    pub snapshot: Snapshot,
    first: Generated,
    second: Generated,
}

fn nested(mut snapshot: Snapshot, id: u64, units::Nested { first, second, .. }: units::Nested) -> Nested {
    snapshot.map = vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 52) - 1 }];
    snapshot.devices = vec![Device { label: "0000:00:07.0".to_owned(), id }];
    Nested { snapshot, first, second }
}

/// SMMUv3: stage 1 of any kind, stage 2 of 4K pages.
pub fn smmu(seed: u64) -> Nested {
    let (snapshot, both) = (seed..).find_map(units::smmu_nested).expect("some seeds give such a guest");
    nested(snapshot, 0x38, both)
}

/// VT-d: scalable mode, both stages.
pub fn vtd(seed: u64) -> Nested {
    let (snapshot, both) = units::vtd_nested(seed);
    nested(snapshot, 0x5fe, both)
}

/// AMD-Vi: guest tables behind host tables.
pub fn amd(seed: u64) -> Nested {
    let (snapshot, request, both) = units::amd_nested(seed);
    nested(snapshot, request.id, both)
}

/// RISC-V: both stages.
pub fn riscv(seed: u64) -> Nested {
    let (snapshot, request, both) = units::riscv_nested(seed);
    nested(snapshot, request.id, both)
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
            // Write-only: S2AP is bits 7 and 6, VT-d's W and R are bits 1 and 0.
            let (write, read) = if matches!(nested.second.config, TableConfig::ArmStage2(_)) { (1 << 7, 1 << 6) } else { (1 << 1, 1) };
            let found = faults(&nested, |snapshot| snapshot.memory.write(slot, entry & !read | write, big_endian));
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
    let first = random_config(Format::VtdFirst, &mut Rng::new(1));
    let pages = (0..20_000)
        .map(|index| Run { iova: index << 12, address: 0x1_0000_0000 + (index << 12), size: 4096, access: Allowed::RW })
        .collect::<Vec<_>>();
    let quiet = Options { restrictions: false, decoys: false, noise: false, clusters: 0 };
    let first = build(first, &pages, rng, quiet);
    let second = VtdSecond { levels: 5, input_bits: 57, output_bits: 52, ..VtdSecond::default() };
    let large = (0..64).map(|index| Run { iova: index << 30, address: index << 30, size: 1 << 30, access: Allowed::RW });
    let far = first.snapshot.memory.pages.keys().map(|page| Run { iova: *page, address: *page, size: 4096, access: Allowed::RW });
    let leaves: Vec<Run> = large.chain(far.filter(|run| run.iova >= 64 << 30)).collect();
    let second = build(TableConfig::VtdSecond(second), &leaves, rng, quiet);
    let mut memory = first.snapshot.memory.clone();
    memory.pages.extend(second.snapshot.memory.pages.clone());
    // The unit is off: the tables are opened by name.
    let mut snapshot = units::vtd(memory, 0);
    snapshot.registers.insert("GSTS".to_owned(), 0);
    snapshot.map = vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 52) - 1 }];
    let folder = tempfile::tempdir().unwrap();
    let loaded = load(&snapshot, folder.path());
    let guest = Guest::new(&loaded, plugins()).unwrap();
    let mut space = guest.open(&[plugin_config(&first.config), plugin_config(&second.config)]).unwrap();
    let mut collector = Collector::new(false, 10);
    space.walk(&guest.memory(), guest.map(), Span::ALL, &guest.budget(), &mut collector).unwrap();
    assert_eq!(collector.mappings().len(), 1, "{:?}", collector.mappings().get(..3));
    assert_eq!(collector.mappings()[0].iova.last, (20_000 << 12) - 1);
}
