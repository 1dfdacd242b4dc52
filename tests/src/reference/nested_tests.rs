//! Tests of the units set up by hand.

use super::detect::{Resolution, resolve, resolve_pasid};
use super::generate::Format;
use super::snapshot::{Memory, Snapshot};
use super::tables::{TableConfig, VtdSecond};
use super::units::{Nested, STRUCTURES, smmu_nested, smmu_single, vtd, vtd_nested, write_words};
use super::units::{amd_guest, amd_host, amd_nested, riscv_nested, riscv_single};
use super::walk::{Fault, Walker};

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

#[test]
fn smmu_stage_1_behind_stage_2_with_substreams() {
    let mut tried = 0;
    for seed in 0..200 {
        let Some((mut snapshot, nested)) = smmu_nested(seed) else { continue };
        let place = STRUCTURES + 0x38 * 64;
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
            let (snapshot, generated) = smmu_single(format, seed);
            assert_eq!(resolve(&snapshot, 0x103), Ok(Resolution::Tables(vec![generated.config])), "{format:?} {seed}");
            for id in [0x3, 0x102, 0x110, 0x203, 0x10103] {
                assert!(matches!(resolve(&snapshot, id), Ok(Resolution::Blocked(_))), "{id:#x}");
            }
        }
    }
}

#[test]
fn vtd_first_stage_behind_second_stage() {
    for seed in 0..60 {
        let (mut snapshot, nested) = vtd_nested(seed);
        let TableConfig::VtdSecond(second) = nested.second.config else { unreachable!() };
        let Resolution::Tables(stages) = resolve(&snapshot, 0x5fe).unwrap() else { panic!("{seed}") };
        check(&snapshot, &nested, &stages);
        // RID_PASID is for requests without a PASID.
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
        Resolution::Tables(vec![TableConfig::VtdSecond(VtdSecond { root: 0x5000_0000, levels, input_bits, output_bits: 52, ..VtdSecond::default() })])
    };
    assert_eq!(resolve(&snapshot, 0x200), Ok(tables(3)));
    assert_eq!(resolve(&snapshot, 0x201), Ok(tables(5)));
    assert_eq!(resolve(&snapshot, 0x202), Ok(Resolution::Bypass));
    for id in [0x203, 0x204, 0x205, 0x100] {
        assert!(matches!(resolve(&snapshot, id), Ok(Resolution::Blocked(_))), "{id:#x}");
    }
}

#[test]
fn amd_device_table_entries_of_every_kind() {
    for seed in 0..200 {
        for (snapshot, request, generated) in [amd_host(seed), amd_guest(seed)] {
            let resolution = resolve_pasid(&snapshot, request.id, request.pasid).unwrap();
            assert_eq!(resolution, Resolution::Tables(vec![generated.config]), "{seed} {request:?}");
            for (id, pasid) in &request.others {
                assert!(matches!(resolve_pasid(&snapshot, *id, *pasid), Ok(Resolution::Blocked(_))), "{seed} {id:#x} {pasid:?}");
            }
        }
        let (snapshot, request, nested) = amd_nested(seed);
        let Resolution::Tables(stages) = resolve_pasid(&snapshot, request.id, request.pasid).unwrap() else { panic!("{seed} {request:?}") };
        check(&snapshot, &nested, &stages);
        for (id, pasid) in &request.others {
            assert!(matches!(resolve_pasid(&snapshot, *id, *pasid), Ok(Resolution::Blocked(_))), "{seed} {id:#x} {pasid:?}");
        }
    }
}

#[test]
fn riscv_contexts_of_every_kind() {
    for seed in 0..200 {
        for (snapshot, request, generated) in [riscv_single(false, seed), riscv_single(true, seed)] {
            let resolution = resolve_pasid(&snapshot, request.id, request.pasid).unwrap();
            assert_eq!(resolution, Resolution::Tables(vec![generated.config]), "{seed} {request:?}");
            for (id, pasid) in &request.others {
                assert!(matches!(resolve_pasid(&snapshot, *id, *pasid), Ok(Resolution::Blocked(_))), "{seed} {id:#x} {pasid:?}");
            }
        }
        let (snapshot, request, nested) = riscv_nested(seed);
        let Resolution::Tables(stages) = resolve_pasid(&snapshot, request.id, request.pasid).unwrap() else { panic!("{seed} {request:?}") };
        check(&snapshot, &nested, &stages);
    }
}
