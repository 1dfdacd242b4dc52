//! The walker against tables that real drivers built.

use std::path::{Path, PathBuf};

use super::detect::{Resolution, resolve};
use super::snapshot::{DmaRow, Snapshot, Stream, load_dma, load_expected};
use super::walk::{Fault, Walker};
use super::{Problem, Run};

/// The fixtures of Arm and Intel units; nothing, with a line that says so, where they are absent.
fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures");
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("skipped: no {}", root.display());
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            let name = path.file_name().unwrap().to_string_lossy().to_string();
            name.starts_with("arm64-") || name.starts_with("vtd-")
        })
        .collect();
    folders.sort();
    folders
}

/// The mappings of a device; a bypassed or blocked one has none.
fn mappings(snapshot: &Snapshot, id: u64) -> Result<Vec<Run>, Problem> {
    match resolve(snapshot, id)? {
        Resolution::Tables(stages) => Walker::new(&snapshot.memory, &stages)?.mappings(),
        Resolution::Bypass | Resolution::Blocked(_) => Ok(Vec::new()),
    }
}

#[test]
fn mappings_are_what_the_kernel_mapped() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        for Stream { id, runs, label } in load_expected(&folder).unwrap() {
            assert!(matches!(resolve(&snapshot, id).unwrap(), Resolution::Tables(_)), "{folder:?} {label}");
            let found = mappings(&snapshot, id).unwrap();
            for (index, run) in runs.iter().enumerate() {
                assert_eq!(Some(run), found.get(index), "{folder:?} {label}, run {index}");
            }
            assert_eq!(found.len(), runs.len(), "{folder:?} {label}");
        }
    }
}

/// Rows that contradict `expected.json` of the same folder, not only the tables: reads inside the first megabyte that the guest's test module mapped (its own
/// buffer, mapped read-write in the snapshot) which are said to have failed.
fn contradicts_the_trace(row: &DmaRow, expected: bool) -> bool {
    (0x500_0000..0x510_0000).contains(&row.iova) && !row.write && !row.succeeds && expected
}

#[test]
fn translation_does_what_the_device_saw() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        let streams = load_expected(&folder).unwrap();
        let mut contradictions = 0;
        for row in load_dma(&folder).unwrap() {
            let Resolution::Tables(stages) = resolve(&snapshot, row.id).unwrap() else { panic!("{folder:?}: no tables for {:#x}", row.id) };
            let result = Walker::new(&snapshot.memory, &stages).unwrap().translate(row.iova, row.write);
            let stream = streams.iter().find(|stream| stream.id == row.id).unwrap();
            let run = stream.runs.iter().find(|run| run.iova <= row.iova && row.iova - run.iova < run.size && run.access.allows(row.write));
            // Where it goes is known from the trace only.
            assert_eq!(result, run.map(|run| run.address + (row.iova - run.iova)).ok_or(Fault), "{folder:?} {row:x?}");
            if contradicts_the_trace(&row, run.is_some()) {
                contradictions += 1;
            } else {
                assert_eq!(result.is_ok(), row.succeeds, "{folder:?} {row:x?}");
            }
        }
        if contradictions > 0 {
            println!("{}: {contradictions} rows of dma.json contradict expected.json", folder.display());
        }
        assert!(contradictions <= 4, "{folder:?}");
    }
}

#[test]
fn visiting_and_walking_agree_at_every_edge() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        for stream in load_expected(&folder).unwrap() {
            let Resolution::Tables(stages) = resolve(&snapshot, stream.id).unwrap() else { panic!("{folder:?} {}", stream.label) };
            let walker = Walker::new(&snapshot.memory, &stages).unwrap();
            let mut end = 0;
            for run in &stream.runs {
                if run.iova > end {
                    assert_eq!(walker.translate(run.iova - 1, false), Err(Fault), "{folder:?} below {run:?}");
                    assert_eq!(walker.translate(run.iova - 1, true), Err(Fault), "{folder:?} below {run:?}");
                }
                for offset in [0, run.size - 1] {
                    for write in [false, true] {
                        let expected = if run.access.allows(write) { Ok(run.address + offset) } else { Err(Fault) };
                        assert_eq!(walker.translate(run.iova + offset, write), expected, "{folder:?} {run:?}");
                    }
                }
                end = run.iova + run.size;
            }
        }
    }
}

#[test]
fn devices_share_the_tables_of_their_domain() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        assert_eq!(resolve(&snapshot, 0x38), resolve(&snapshot, 0x40), "{folder:?}");
    }
}

/// The comparison above must be able to fail: flipping bits of entries in use changes the mappings or makes the page unreadable.
#[test]
fn damage_is_seen() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        let expected = load_expected(&folder).unwrap();
        let stream = expected.iter().find(|stream| stream.id == 0x38).unwrap();
        let Resolution::Tables(stages) = resolve(&snapshot, 0x38).unwrap() else { panic!("{folder:?}") };
        let root = stages[0].regions().unwrap()[0].root;
        let slot =
            (0..512).map(|index| root + index * 8).find(|address| snapshot.memory.read(*address, false).is_ok_and(|entry| entry != 0)).unwrap();
        let mut damaged = snapshot.clone();
        let entry = damaged.memory.read(slot, false).unwrap();
        damaged.memory.write(slot, 0, false);
        let found = mappings(&damaged, 0x38).unwrap();
        assert_ne!(found, stream.runs, "{folder:?}");
        assert!(found.len() < stream.runs.len(), "{folder:?}");
        // A table that points to itself is visited to the end or to the budget, and nothing else happens.
        damaged.memory.write(slot, entry & !0xf_ffff_ffff_f000 | root, false);
        let walker = Walker::new(&damaged.memory, &stages).unwrap().with_budget(100_000);
        let walk = walker.walk();
        assert_ne!(walk.runs, stream.runs, "{folder:?}");
        // A pointer to a page that is not there.
        damaged.memory.write(slot, entry & !0xf_ffff_ffff_f000 | 0x7_ffff_0000, false);
        assert_eq!(mappings(&damaged, 0x38), Err(Problem::Unreadable(0x7_ffff_0000)), "{folder:?}");
    }
}
