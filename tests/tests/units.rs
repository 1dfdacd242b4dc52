//! Units set up by hand around generated tables: every stream-table and context shape, PASIDs, and above all nested translation, flattened.
#![allow(clippy::unwrap_used)]

use stagecraft::guest::{Guest, State};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::Snapshot;
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::Format;
use stagecraft_tests::reference::snapshot::{Device, MemoryRange};
use stagecraft_tests::reference::units::{
    Nested, Request, amd_guest, amd_host, amd_nested, riscv_nested, riscv_single, smmu_nested, smmu_single, vtd_nested,
};
use stagecraft_tests::reference::walk::Walker;

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

/// The same guest as the library reads it.
fn load(mut snapshot: reference::snapshot::Snapshot, ids: &[u64]) -> Snapshot {
    let folder = tempfile::tempdir().unwrap();
    snapshot.map = vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 56) - 1 }];
    snapshot.devices = ids.iter().map(|id| Device { label: format!("device-{id:x}"), id: *id }).collect();
    // A unit needs these, and the naive reader does not.
    if snapshot.unit_kind == "intel-vtd" {
        snapshot.registers.insert("VER".to_owned(), 0x60);
    }
    snapshot.write_snapshot(folder.path()).unwrap();
    Snapshot::load(folder.path()).unwrap()
}

fn mappings(guest: &Guest<'_>, id: u64, pasid: Option<u32>, stages: usize, what: &str) -> Vec<reference::Run> {
    let state = guest.stream(id, pasid).unwrap().state;
    let State::Translated(tables) = state else { panic!("{what}: {state:?}") };
    assert_eq!(tables.len(), stages, "{what}");
    let collected = guest.collect(&mut guest.open(&tables).unwrap(), 10).unwrap();
    assert_eq!(collected.stopped, None, "{what}");
    let run = |mapping: &stagecraft::table::Mapping| reference::Run {
        iova: mapping.iova.first,
        address: mapping.address,
        size: mapping.iova.length_minus_one() + 1,
        access: reference::Access { read: mapping.access.read, write: mapping.access.write },
    };
    collected.collector.mappings().iter().map(run).collect()
}

/// Every answer of the engine about a nested guest is the naive reader's, and the stage that failed is named.
fn check_nested(guest: &Guest<'_>, snapshot: &reference::snapshot::Snapshot, nested: &Nested, id: u64, pasid: Option<u32>, what: &str) {
    assert_eq!(mappings(guest, id, pasid, 2, what), nested.truth, "{what}");
    let State::Translated(tables) = guest.stream(id, pasid).unwrap().state else { panic!("{what}") };
    let mut space = guest.open(&tables).unwrap();
    let stages = [nested.first.config, nested.second.config];
    let both = Walker::new(&snapshot.memory, &stages).unwrap();
    for run in nested.first.truth.iter().take(30) {
        for iova in [run.iova, run.iova + (run.size - 1), run.iova + run.size / 2, run.iova.wrapping_add(run.size)] {
            for access in [Access::READ, Access::WRITE] {
                let ours = guest.translate(&mut space, Iova(iova), access).unwrap();
                assert_eq!(
                    ours.as_ref().ok().map(|found| found.address.0),
                    both.translate(iova, access.write).ok(),
                    "{what}: {iova:#x} {access} {ours:?}"
                );
                if let Err(fault) = ours {
                    let inside = nested.first.truth.iter().find(|run| run.iova <= iova && iova - run.iova < run.size);
                    let stage = if inside.is_some_and(|run| run.access.allows(access.write)) { 2 } else { 1 };
                    assert_eq!(fault.stage, stage, "{what}: {iova:#x} {access} {fault:?}");
                }
            }
        }
    }
}

#[test]
fn smmu_stage_1_through_stage_2() {
    let plugins = plugins();
    let mut tried = 0;
    for seed in 0..60 {
        let Some((guest_snapshot, nested)) = smmu_nested(seed) else { continue };
        let snapshot = load(guest_snapshot.clone(), &[0x38, 0x39, 0x100]);
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        for pasid in [None, Some(70)] {
            check_nested(&guest, &guest_snapshot, &nested, 0x38, pasid, &format!("seed {seed} {pasid:?}: {:?}", nested.first.config));
        }
        for pasid in [0, 71, 1, 256] {
            assert!(matches!(guest.stream(0x38, Some(pasid)).unwrap().state, State::Blocked(_)), "seed {seed} pasid {pasid}");
        }
        for id in [0x39, 0x100] {
            assert!(matches!(guest.stream(id, None).unwrap().state, State::Blocked(_)), "seed {seed} id {id:#x}");
        }
        // Substreams are found without being asked for, each once.
        let pasids: Vec<Option<u32>> = guest.streams().unwrap().iter().filter(|stream| stream.id == 0x38).map(|stream| stream.pasid).collect();
        assert_eq!(pasids, [None, Some(70)], "seed {seed}");
        tried += 1;
    }
    assert!(tried > 15, "{tried}");
}

#[test]
fn vtd_first_stage_through_second_stage() {
    let plugins = plugins();
    for seed in 0..40 {
        let (guest_snapshot, nested) = vtd_nested(seed);
        let snapshot = load(guest_snapshot.clone(), &[0x57e, 0x5fe, 0x5ff]);
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        check_nested(&guest, &guest_snapshot, &nested, 0x5fe, None, &format!("seed {seed}"));
        // 0x4321 is the PASID that requests without one use: others may not name it (D51397 section 7.1.3, SCT.9).
        for (id, pasid) in [(0x5fe, Some(0x4321)), (0x5fe, Some(0x4322)), (0x5fe, Some(0x1_4321)), (0x5ff, None), (0x57e, None)] {
            assert!(matches!(guest.stream(id, pasid).unwrap().state, State::Blocked(_)), "seed {seed} id {id:#x}");
        }
    }
}

#[test]
fn smmu_contexts_of_every_kind() {
    let plugins = plugins();
    for seed in 0..120 {
        for format in [Format::ArmStage1, Format::ArmStage2] {
            let (guest_snapshot, generated) = smmu_single(format, seed);
            let snapshot = load(guest_snapshot, &[0x3, 0x102, 0x103, 0x110]);
            let guest = Guest::new(&snapshot, &plugins).unwrap();
            let what = format!("{format:?} seed {seed}: {:?}", generated.config);
            assert_eq!(mappings(&guest, 0x103, None, 1, &what), generated.truth, "{what}");
            for id in [0x3, 0x102, 0x110] {
                assert!(matches!(guest.stream(id, None).unwrap().state, State::Blocked(_)), "{what}: {id:#x}");
            }
        }
    }
}

fn pasid(pasid: Option<u64>) -> Option<u32> {
    pasid.map(|pasid| pasid as u32)
}

/// The device, and those beside it.
fn ids(request: &Request) -> Vec<u64> {
    let all: std::collections::BTreeSet<u64> = request.others.iter().map(|(id, _)| *id).chain([request.id]).collect();
    all.into_iter().collect()
}

/// What is next to a request's place is blocked.
fn check_others(guest: &Guest<'_>, request: &Request, what: &str) {
    for (id, other) in &request.others {
        let state = guest.stream(*id, pasid(*other)).unwrap().state;
        assert!(matches!(state, State::Blocked(_)), "{what}: {id:#x} {other:?}: {state:?}");
    }
}

/// PASIDs with a context are found without being asked for, each once.
fn check_pasids(guest: &Guest<'_>, request: &Request, what: &str) {
    let found: Vec<Option<u32>> = guest.streams().unwrap().iter().filter(|stream| stream.id == request.id).map(|stream| stream.pasid).collect();
    let mut expected = vec![None];
    expected.extend(request.pasid.map(|pasid| Some(pasid as u32)));
    assert_eq!(found, expected, "{what}");
}

/// A unit with one stage: the tables are found, and map what they map.
fn check_single(plugins: &Plugins, unit: (reference::snapshot::Snapshot, Request, reference::generate::Generated), what: &str) {
    let (guest_snapshot, request, generated) = unit;
    let snapshot = load(guest_snapshot, &ids(&request));
    let guest = Guest::new(&snapshot, plugins).unwrap();
    let what = format!("{what} {request:?}: {:?}", generated.config);
    assert_eq!(mappings(&guest, request.id, pasid(request.pasid), 1, &what), generated.truth, "{what}");
    check_others(&guest, &request, &what);
    check_pasids(&guest, &request, &what);
}

#[test]
fn amd_device_table_entries_of_every_kind() {
    let plugins = plugins();
    for seed in 0..60 {
        check_single(&plugins, amd_host(seed), &format!("host table, seed {seed}"));
        check_single(&plugins, amd_guest(seed), &format!("guest table, seed {seed}"));
    }
}

#[test]
fn amd_guest_tables_through_host_tables() {
    let plugins = plugins();
    for seed in 0..60 {
        let (guest_snapshot, request, nested) = amd_nested(seed);
        let snapshot = load(guest_snapshot.clone(), &ids(&request));
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let what = format!("seed {seed} {request:?}: {:?}", nested.first.config);
        check_nested(&guest, &guest_snapshot, &nested, request.id, pasid(request.pasid), &what);
        check_others(&guest, &request, &what);
        check_pasids(&guest, &request, &what);
    }
}

#[test]
fn riscv_contexts_of_every_kind() {
    let plugins = plugins();
    for seed in 0..60 {
        for second_stage in [false, true] {
            check_single(&plugins, riscv_single(second_stage, seed), &format!("second stage {second_stage}, seed {seed}"));
        }
    }
}

#[test]
fn riscv_first_stage_through_second_stage() {
    let plugins = plugins();
    for seed in 0..60 {
        let (guest_snapshot, request, nested) = riscv_nested(seed);
        let snapshot = load(guest_snapshot.clone(), &ids(&request));
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let what = format!("seed {seed} {request:?}: {:?}", nested.first.config);
        check_nested(&guest, &guest_snapshot, &nested, request.id, pasid(request.pasid), &what);
        check_others(&guest, &request, &what);
        check_pasids(&guest, &request, &what);
    }
}

#[test]
fn riscv_msi_page_tables_are_reported() {
    let plugins = plugins();
    let mut reported = 0;
    for seed in 0..60 {
        let (guest_snapshot, request, _) = riscv_single(seed % 2 == 0, seed);
        let snapshot = load(guest_snapshot, &ids(&request));
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let stream = guest.stream(request.id, pasid(request.pasid)).unwrap();
        // They are no part of a table, and are compared before a second stage.
        assert!(stream.tables()[0].settings.iter().all(|(name, _)| !name.starts_with("msi")), "seed {seed}");
        let passed = u8::from(stream.tables()[0].format == "riscv-iommu/first-stage");
        let said: Vec<_> = stream.intercepts.iter().map(|one| (one.passed, one.mask, one.value, one.address)).collect();
        let expected = request.messages.map(|table| {
            let mask = !(table.mask << 12 | 0xfff);
            (passed, mask, table.pattern << 12 & mask, Some(table.root))
        });
        assert_eq!(said, expected.into_iter().collect::<Vec<_>>(), "seed {seed}");
        reported += said.len();
    }
    assert!(reported > 5, "{reported}");
}
