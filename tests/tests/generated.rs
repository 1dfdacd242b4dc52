//! Tables made by an independent generator, whose contents are known: every granule, level count and option that drivers rarely use.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

use stagecraft::guest::{Guest, State};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::{Snapshot, Source, Stream};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::{DEVICE, Format, Rng, generate};
use stagecraft_tests::reference::walk::Walker;

/// The generator's names for settings, in the plugins' words.
fn rename(settings: &mut Vec<(String, u64)>, format: &str) {
    let mut renamed: Vec<(String, u64)> = Vec::new();
    for (name, value) in settings.drain(..) {
        match name.as_str() {
            "tbi" => renamed.extend([("tbi".to_owned(), value & 1), ("tbi-high".to_owned(), value >> 1)]),
            "hierarchical-disabled" => {
                renamed.extend([("hierarchy-disabled".to_owned(), value & 1), ("hierarchy-disabled-high".to_owned(), value >> 1)]);
            }
            // Level -1, as a number without a sign.
            "start-level" => renamed.push((name, value & 0xff)),
            _ => renamed.push((name, value)),
        }
    }
    if format.starts_with("intel-vtd") && !renamed.iter().any(|(name, _)| name == "output-bits") {
        renamed.push(("output-bits".to_owned(), 52));
    }
    // The generator leaves a `tbi-high` of a half that is not there at zero: say nothing of it.
    let has_high = renamed.iter().any(|(name, _)| name == "root-high");
    renamed.retain(|(name, _)| has_high || !name.ends_with("-high"));
    *settings = renamed;
}

#[test]
fn generated_tables_are_walked_as_they_were_written() {
    let seeds: u64 = std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(150);
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut leaves = 0;
    for format in Format::ALL {
        for seed in 0..seeds {
            let generated = generate(format, seed);
            let path = folder.path().join("snapshot");
            std::fs::create_dir(&path).unwrap();
            generated.write_snapshot(&path).unwrap();
            let mut snapshot = Snapshot::load(&path).unwrap();
            std::fs::remove_dir_all(&path).unwrap();
            let Source::Tables(entries) = &mut snapshot.source else { panic!("the generator names its tables") };
            for entry in entries.iter_mut() {
                if let Stream::Table { format, settings } = &mut entry.stream {
                    rename(settings, format);
                }
            }
            let what = format!("{format:?} seed {seed}: {:?}", generated.config);
            let guest = Guest::new(&snapshot, &plugins).unwrap();
            let State::Translated(tables) = guest.stream(DEVICE, None).unwrap().state else { panic!("{what}: not translated") };
            let mut space = guest.open(&tables).unwrap_or_else(|error| panic!("{what}: {error}"));
            let collected = guest.collect(&mut space, 10).unwrap();
            assert_eq!(collected.stopped, None, "{what}");
            let walked: Vec<reference::Run> = collected
                .collector
                .mappings()
                .iter()
                .map(|mapping| reference::Run {
                    iova: mapping.iova.first,
                    address: mapping.address,
                    size: mapping.iova.length_minus_one() + 1,
                    access: reference::Access { read: mapping.access.read, write: mapping.access.write },
                })
                .collect();
            assert_eq!(walked, generated.truth, "{what}");
            leaves += walked.len();
            // One address at a time, at edges, in the middle, and beside: the naive walker and the engine give one answer.
            let stages = [generated.config];
            let naive = Walker::new(&generated.snapshot.memory, &stages).unwrap();
            let mut rng = Rng::new(seed);
            for run in walked.iter().take(40) {
                for iova in
                    [run.iova, run.iova + (run.size - 1), run.iova + rng.below(run.size), run.iova.wrapping_sub(1), run.iova.wrapping_add(run.size)]
                {
                    for access in [Access::READ, Access::WRITE] {
                        let ours = guest.translate(&mut space, Iova(iova), access).unwrap();
                        let theirs = naive.translate(iova, access.write);
                        assert_eq!(ours.as_ref().ok().map(|found| found.address.0), theirs.ok(), "{what}: iova {iova:#x} {access} {ours:?}");
                    }
                }
            }
        }
    }
    assert!(leaves > 10_000, "{leaves} runs");
    println!("{seeds} seeds per format, {leaves} runs");
}
