//! The walker against tables that real drivers built.

use std::path::{Path, PathBuf};

use super::detect::{Resolution, resolve};
use super::snapshot::{DmaRow, Snapshot, Stream, load_dma, load_expected};
use super::tables::{Entry, TableConfig};
use super::walk::{Fault, Walker};
use super::{Problem, Run};

/// All fixtures; nothing, with a line that says so, where they are absent.
fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/fixtures");
    let Ok(entries) = std::fs::read_dir(&root) else {
        println!("skipped: no {}", root.display());
        return Vec::new();
    };
    let mut folders: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).filter(|path| path.join("snapshot.json").exists()).collect();
    folders.sort();
    folders
}

/// The mappings of a device; a bypassed or blocked one has none.
fn mappings(snapshot: &Snapshot, id: u64) -> Result<Vec<Run>, Problem> {
    match resolve(snapshot, id)? {
        Resolution::Tables(stages) => Walker::new(&snapshot.memory, &stages)?.mappings(),
        Resolution::Bypass | Resolution::Direct(_) | Resolution::Blocked(_) => Ok(Vec::new()),
    }
}

#[test]
fn mappings_are_what_the_kernel_mapped() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        for Stream { id, runs, label } in load_expected(&folder).unwrap() {
            // Some are listed without mappings: they are bypassed.
            assert!(runs.is_empty() || matches!(resolve(&snapshot, id).unwrap(), Resolution::Tables(_)), "{folder:?} {label}");
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
            let Resolution::Tables(stages) = resolve(&snapshot, stream.id).unwrap() else {
                assert_eq!(stream.runs, [], "{folder:?} {}", stream.label);
                continue;
            };
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
        let expected = load_expected(&folder).unwrap();
        if expected.iter().any(|stream| stream.id == 0x40 && !stream.runs.is_empty()) {
            assert_eq!(resolve(&snapshot, 0x38), resolve(&snapshot, 0x40), "{folder:?}");
        }
    }
}

/// The same table entry with another address.
fn pointing(config: &TableConfig, entry: u64, address: u64) -> u64 {
    match config {
        TableConfig::RiscvFirst(_) => entry & !0x3f_ffff_ffff_fc00 | address >> 2,
        _ => entry & !0xf_ffff_ffff_f000 | address,
    }
}

/// The comparison above must be able to fail: flipping bits of entries in use changes the mappings or makes the page unreadable.
#[test]
fn damage_is_seen() {
    for folder in folders() {
        let snapshot = Snapshot::load(&folder).unwrap();
        let expected = load_expected(&folder).unwrap();
        // The device under test, or the first one.
        let stream = expected.iter().find(|stream| stream.id == 0x38).unwrap_or(&expected[0]);
        let Resolution::Tables(stages) = resolve(&snapshot, stream.id).unwrap() else { panic!("{folder:?}") };
        let (config, region) = (&stages[0], stages[0].regions().unwrap().remove(0));
        let big_endian = config.big_endian();
        let slots = (0..region.steps[0].entries).map(|index| region.root + index * 8);
        let is_table = |entry: u64| matches!(config.decode(region.half, region.steps[0], entry), Entry::Table { .. });
        let mut slots = slots;
        let slot = slots.find(|slot| snapshot.memory.read(*slot, big_endian).is_ok_and(is_table)).unwrap();
        let mut damaged = snapshot.clone();
        let entry = damaged.memory.read(slot, big_endian).unwrap();
        damaged.memory.write(slot, 0, big_endian);
        // An entry of zero is an s390 table at zero, of the wrong type.
        let found = mappings(&damaged, stream.id).unwrap();
        assert_ne!(found, stream.runs, "{folder:?}");
        assert!(found.len() < stream.runs.len(), "{folder:?}");
        // A table that points to itself is visited to the end or to the budget, and nothing else happens.
        damaged.memory.write(slot, pointing(config, entry, region.root), big_endian);
        let walker = Walker::new(&damaged.memory, &stages).unwrap().with_budget(100_000);
        let walk = walker.walk();
        assert_ne!(walk.runs, stream.runs, "{folder:?}");
        // A pointer to a page that is not there.
        damaged.memory.write(slot, pointing(config, entry, 0x7_ffff_0000), big_endian);
        assert_eq!(mappings(&damaged, stream.id), Err(Problem::Unreadable(0x7_ffff_0000)), "{folder:?}");
    }
}
