//! The generator against the walker.

use super::*;
use crate::reference::bit;
use crate::reference::detect::{Resolution, resolve};
use crate::reference::tables::*;
use crate::reference::walk::{Fault, Walker};

/// `REFERENCE_SEEDS` asks for another number.
fn seeds() -> u64 {
    std::env::var("REFERENCE_SEEDS").map_or(250, |text| text.parse().unwrap())
}

#[test]
fn the_walker_finds_the_truth() {
    for format in Format::ALL {
        let mut runs = 0;
        let mut leaves_of_every_access = [false; 3];
        for seed in 0..seeds() {
            let generated = generate(format, seed);
            let Resolution::Tables(stages) = resolve(&generated.snapshot, DEVICE).unwrap() else { panic!("{format:?} {seed}") };
            assert_eq!(stages, [generated.config]);
            let walker = Walker::new(&generated.snapshot.memory, &stages).unwrap();
            let found = walker.mappings().unwrap_or_else(|problem| panic!("{format:?} {seed}: {problem} {:#x?}", generated.config));
            for (index, run) in generated.truth.iter().enumerate() {
                assert_eq!(found.get(index), Some(run), "{format:?} {seed}, run {index}, {:#x?}", generated.config);
            }
            assert_eq!(found.len(), generated.truth.len(), "{format:?} {seed}");
            runs += found.len();
            for run in &found {
                leaves_of_every_access[usize::from(run.access.read) + 2 * usize::from(run.access.write) - 1] = true;
            }
        }
        assert!(runs as u64 > seeds() * 5, "{format:?}: {runs} runs are too few to mean anything");
        assert!(leaves_of_every_access[0] && leaves_of_every_access[2], "{format:?}");
    }
}

#[test]
fn walks_agree_with_the_truth_at_every_edge() {
    for format in Format::ALL {
        for seed in 0..seeds() {
            let generated = generate(format, seed);
            let walker = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap();
            let expected = |iova: u64, write: bool| {
                let run = generated.truth.iter().find(|run| run.iova <= iova && iova - run.iova < run.size && run.access.allows(write));
                run.map(|run| run.address + (iova - run.iova)).ok_or(Fault)
            };
            for run in &generated.truth {
                let last = run.iova + (run.size - 1);
                for iova in [run.iova, last, run.iova.wrapping_sub(1), last.wrapping_add(1)] {
                    for write in [false, true] {
                        assert_eq!(walker.translate(iova, write), expected(iova, write), "{format:?} {seed} {iova:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn an_ignored_top_byte_changes_nothing() {
    let mut looked_at = 0;
    for seed in 0..seeds() {
        let generated = generate(Format::ArmStage1, seed);
        let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
        let walker = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap();
        for run in &generated.truth {
            let half = if bit(run.iova, 63) { config.high } else { config.low }.unwrap();
            let tagged = (run.iova & !(0xff << 56)) | 0x5a << 56;
            let plain = walker.translate(run.iova, !run.access.read);
            assert_eq!(walker.translate(tagged, !run.access.read), if half.top_byte_ignored { plain } else { Err(Fault) }, "{seed} {run:?}");
            looked_at += u64::from(half.top_byte_ignored);
        }
    }
    assert!(looked_at > 0);
}

#[test]
fn settings_survive_their_names() {
    for format in Format::ALL {
        for seed in 0..seeds() {
            let config = generate_with(format, seed, Options { clusters: 0, ..Options::default() }).config;
            assert_eq!(TableConfig::from_settings(config.format(), &config.settings()), Ok(config), "{format:?} {seed}");
        }
    }
}

#[test]
fn a_written_snapshot_is_read_back() {
    let folder = std::env::temp_dir().join(format!("stagecraft-reference-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for format in Format::ALL {
        for seed in 0..20 {
            let generated = generate(format, seed);
            generated.write_snapshot(&folder).unwrap();
            assert!(Snapshot::load(&folder).unwrap() == generated.snapshot, "{format:?} {seed}");
            let streams = crate::reference::snapshot::load_expected(&folder).unwrap();
            assert!(streams[0].runs == generated.truth, "{format:?} {seed}");
        }
    }
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Flipping single bits of table memory must end in some answer, within the budget, and often in another one.
#[test]
fn damaged_tables_end_and_differ() {
    for format in Format::ALL {
        let mut different = 0;
        for seed in 0..40 {
            let mut generated = generate(format, seed);
            let mut rng = Rng::new(seed);
            let pages: Vec<u64> = generated.snapshot.memory.pages.keys().copied().collect();
            let big_endian = generated.config.big_endian();
            let used: Vec<u64> = pages.iter().flat_map(|page| (0..512).map(move |index| page + index * 8)).collect();
            let used: Vec<u64> = used.into_iter().filter(|slot| generated.snapshot.memory.read(*slot, false).unwrap() != 0).collect();
            if used.is_empty() {
                continue;
            }
            for _ in 0..80 {
                let slot = rng.pick(&used);
                let entry = generated.snapshot.memory.read(slot, big_endian).unwrap();
                generated.snapshot.memory.write(slot, entry ^ (1 << rng.below(64)), big_endian);
            }
            let walk = Walker::new(&generated.snapshot.memory, &[generated.config]).unwrap().with_budget(1_000_000).walk();
            different += u64::from(walk.runs != generated.truth);
        }
        assert!(different > 20, "{format:?}: {different}");
    }
}
