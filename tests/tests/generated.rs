//! Tables made by an independent generator, whose contents are known: every granule, level count and option that drivers rarely use.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

mod configs;

use stagecraft::guest::{Guest, State};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::{DEVICE, Format, Rng, generate};
use stagecraft_tests::reference::walk::Walker;

/// Every table of these formats, by the engine and by the naive walker.
fn check(formats: &[Format]) {
    let seeds: u64 = std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(150);
    let folder = tempfile::tempdir().unwrap();
    let mut leaves = 0;
    for format in formats.iter().copied() {
        for seed in 0..seeds {
            let generated = generate(format, seed);
            let snapshot = configs::load(&generated.snapshot, folder.path());
            let what = format!("{format:?} seed {seed}: {:?}", generated.config);
            let guest = Guest::new(&snapshot, configs::plugins()).unwrap();
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
            for (index, run) in generated.truth.iter().enumerate() {
                assert_eq!(walked.get(index), Some(run), "{what}: run {index}");
            }
            assert_eq!(walked.len(), generated.truth.len(), "{what}");
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
    assert!(leaves as u64 > 15 * seeds, "{leaves} runs");
    println!("{formats:?}: {seeds} seeds per format, {leaves} runs");
}

#[test]
fn arm_tables_are_walked_as_they_were_written() {
    check(&[Format::ArmStage1, Format::ArmStage2, Format::V7s]);
}

#[test]
fn intel_tables_are_walked_as_they_were_written() {
    check(&[Format::VtdFirst, Format::VtdSecond]);
}

#[test]
fn amd_tables_are_walked_as_they_were_written() {
    check(&[Format::AmdV1, Format::AmdV2]);
}

#[test]
fn riscv_tables_are_walked_as_they_were_written() {
    check(&[Format::RiscvFirst, Format::RiscvSecond]);
}

#[test]
fn s390_tables_are_walked_as_they_were_written() {
    check(&[Format::S390]);
}

#[test]
fn loongarch_tables_are_walked_as_they_were_written() {
    check(&[Format::LoongArch]);
}

#[test]
fn dart_tables_are_walked_as_they_were_written() {
    check(&[Format::Dart1, Format::Dart2]);
}
