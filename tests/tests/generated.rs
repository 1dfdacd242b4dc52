//! Tables made by an independent generator, whose contents are known: every granule, level count and option that drivers rarely use.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run; a failure names its seed.
#![allow(clippy::unwrap_used)]

mod configs;

use stagecraft::convert::{Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::table::Loss;
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::{DEVICE, Format, Rng, generate};
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, TableConfig};
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

/// Where a guest's IOVAs have a tag in the top byte, and the target's have none, every mapping of that range loses its other tags, and nothing else is counted.
#[test]
fn lost_tags_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let (mut lost, mut kept) = (0, 0);
    for seed in 0..120 {
        let generated = generate(Format::ArmStage1, seed);
        let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
        let snapshot = configs::load(&generated.snapshot, folder.path());
        let guest = Guest::new(&snapshot, configs::plugins()).unwrap();
        let streams = guest.streams().unwrap();
        let tagged = |half: Option<ArmHalf>| half.is_some_and(|half| half.top_byte_ignored);
        // What requests with privilege reach is mapped as well.
        let all = [TableConfig::ArmStage1(ArmStage1 { privileged: true, ..config })];
        let mapped = Walker::new(&generated.snapshot.memory, &all).unwrap().mappings().unwrap();
        let bytes = |upper: bool| mapped.iter().filter(|run| (run.iova >> 63 != 0) == upper).map(|run| u128::from(run.size)).sum::<u128>();
        let halves = [(config.low, false), (config.high, true)];
        let expected: u128 = halves.into_iter().filter(|(half, _)| tagged(*half)).map(|(_, upper)| bytes(upper)).sum();
        let count = |target: &Target| {
            let conversion = convert(&guest, &streams, target, &mut |_, _| {}).ok()?;
            let losses = &conversion.tables[0].built.losses;
            let found = losses.get(Loss::Tagged).map_or(0, |count| count.bytes);
            assert!(losses.iter().all(|(loss, _)| loss != Loss::Tagged || !loss.is_refused()));
            Some(found)
        };
        let what = format!("seed {seed}: {config:?}");
        for format in ["intel-vtd/second-stage", "arm-smmuv3/stage1"] {
            if let Some(found) = count(&Target::new(format)) {
                assert_eq!(found, expected, "{what} to {format}");
                lost += u64::from(found > 0);
            }
        }
        // The same windows: nothing is lost of those below.
        let mut same = Target::new("arm-smmuv3/stage1");
        same.settings.set("tbi", 1);
        if let Some(found) = count(&same) {
            assert_eq!(found, if tagged(config.high) { bytes(true) } else { 0 }, "{what} with tags");
            kept += u64::from(found < expected);
        }
    }
    assert!(lost > 20 && kept > 10, "{lost} {kept}");
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
