//! Real guests: what unmodified Linux drivers built is understood exactly, and converts to every format without a difference that is not listed.
//!
//! Truth comes from others: `expected.json` from the kernel's map and unmap events, `dma.json` from DMA in QEMU, and a second, naive walker that shares
//! no code with the engine or the plugins.
#![allow(clippy::unwrap_used)]

mod configs;
mod fixtures;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use stagecraft::convert::{Conversion, ConvertError, Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::plugin::Settings;
use stagecraft::snapshot::{self, Snapshot};
use stagecraft::table::{Loss, Mapping};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference;
use stagecraft_tests::reference::generate::says_write_only;
use stagecraft_tests::reference::walk::Walker;

use configs::{plugins, reference_config};

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
        let guest = Guest::new(&snapshot, plugins).unwrap();
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
fn every_dma_goes_where_it_went() {
    let plugins = plugins();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, plugins).unwrap();
        let rows = reference::snapshot::load_dma(&fixture.path).unwrap();
        let expected = reference::snapshot::load_expected(&fixture.path).unwrap();
        let contradicted = CONTRADICTED.iter().filter(|(name, _)| *name == fixture.name).flat_map(|(_, iovas)| iovas.iter().copied());
        let (contradicted, mut met) = (contradicted.collect::<BTreeSet<u64>>(), BTreeSet::new());
        for row in &rows {
            let State::Translated(tables) = guest.stream(row.id, None).unwrap().state else { panic!("device {:#x} is not translated", row.id) };
            let access = if row.write { Access::WRITE } else { Access::READ };
            let found = guest.translate(&mut guest.open(&tables).unwrap(), Iova(row.iova), access).unwrap();
            if let Ok(translation) = &found {
                let stream = expected.iter().find(|stream| stream.id == row.id).unwrap();
                let run = stream.runs.iter().find(|run| run.iova <= row.iova && row.iova - run.iova < run.size).unwrap();
                assert_eq!(translation.address.0, run.address + (row.iova - run.iova));
            }
            if contradicted.contains(&row.iova) {
                assert!(!row.write && !row.succeeds && found.is_ok(), "{} iova {:#x}: not the row that is known", fixture.name, row.iova);
                met.insert(row.iova);
                continue;
            }
            assert_eq!(found.is_ok(), row.succeeds, "{} device {:#x} iova {:#x}", fixture.name, row.id, row.iova);
        }
        assert_eq!(met, contradicted, "{}: rows that are known to contradict the recording", fixture.name);
        println!("{}: {} DMAs as recorded, {} addresses contradicted by the recording itself", fixture.name, rows.len(), met.len());
    }
}

/// Reads of the test module's own buffer, mapped from 0x5000000, that were recorded as failing although the kernel's own events, the bytes of the tables and the
/// naive walker all say that they are mapped. No other row of any snapshot differs.
const CONTRADICTED: &[(&str, &[u64])] = &[
    ("arm64-s1-16k", &[0x504_8000]),
    ("arm64-s1-4k", &[0x507_c000]),
    ("arm64-s2-4k", &[0x507_7000]),
    ("riscv-sv39", &[0x505_f000, 0x509_3000]),
    ("riscv-sv48", &[0x505_1000, 0x50b_a000]),
    ("vtd-legacy-48", &[0x509_6000, 0x509_7000, 0x50e_c000, 0x50f_7000]),
    ("vtd-sm-fs", &[0x502_3000]),
];

/// All targets: every format, with every number of levels, granule, and way to say large pages.
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
    ("amd-vi/v1", &[]),
    ("amd-vi/v1", &[("levels", 1)]),
    ("amd-vi/v1", &[("levels", 2)]),
    ("amd-vi/v1", &[("levels", 3)]),
    ("amd-vi/v1", &[("levels", 4)]),
    ("amd-vi/v1", &[("levels", 5)]),
    ("amd-vi/v1", &[("levels", 6)]),
    ("amd-vi/v1", &[("next-level-7", 1)]),
    ("amd-vi/v1", &[("levels", 3), ("next-level-7", 1)]),
    ("amd-vi/v1", &[("levels", 6), ("next-level-7", 1)]),
    ("amd-vi/v2", &[]),
    ("amd-vi/v2", &[("levels", 4)]),
    ("amd-vi/v2", &[("levels", 5)]),
    ("amd-vi/v2", &[("levels", 4), ("page-1g", 0), ("sign-extended", 0)]),
    ("riscv-iommu/first-stage", &[]),
    ("riscv-iommu/first-stage", &[("levels", 2)]),
    ("riscv-iommu/first-stage", &[("levels", 3)]),
    ("riscv-iommu/first-stage", &[("levels", 4)]),
    ("riscv-iommu/first-stage", &[("levels", 5)]),
    ("riscv-iommu/first-stage", &[("levels", 3), ("svnapot", 1)]),
    ("riscv-iommu/first-stage", &[("levels", 5), ("svnapot", 1)]),
    ("riscv-iommu/second-stage", &[]),
    ("riscv-iommu/second-stage", &[("levels", 2)]),
    ("riscv-iommu/second-stage", &[("levels", 3)]),
    ("riscv-iommu/second-stage", &[("levels", 4)]),
    ("riscv-iommu/second-stage", &[("levels", 5)]),
    ("riscv-iommu/second-stage", &[("levels", 4), ("svnapot", 1)]),
    ("s390-zpci/dma", &[]),
    ("s390-zpci/dma", &[("levels", 1)]),
    ("s390-zpci/dma", &[("levels", 2)]),
    ("s390-zpci/dma", &[("levels", 3), ("page-1m", 0)]),
    ("s390-zpci/dma", &[("levels", 4)]),
    ("s390-zpci/dma", &[("levels", 5)]),
    ("loongarch/paging", &[]),
    ("loongarch/paging", &[("granule", 4096), ("levels", 4)]),
    ("loongarch/paging", &[("granule", 65536), ("levels", 3)]),
    ("loongarch/paging", &[("granule", 16384), ("levels", 2)]),
    ("apple-dart/dart1", &[]),
    ("apple-dart/dart1", &[("granule", 4096), ("levels", 3)]),
    ("apple-dart/dart1", &[("granule", 16384), ("levels", 3)]),
    ("apple-dart/dart2", &[]),
    ("apple-dart/dart2", &[("levels", 3)]),
    ("arm-v7s/short", &[]),
    ("arm-v7s/short", &[("split", 1)]),
    ("arm-v7s/short", &[("supersections", 0)]),
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

/// Converts every snapshot to the targets whose format begins so.
fn convert_all(prefix: &str) {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    let targets: Vec<_> = TARGETS.iter().filter(|(format, _)| format.starts_with(prefix)).collect();
    assert!(!targets.is_empty());
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, plugins).unwrap();
        let before: BTreeMap<u64, Vec<reference::Run>> =
            snapshot.devices.iter().map(|device| (device.id, runs(&mappings(&guest, device.id)))).collect();
        let mut converted_to = 0;
        for (format, settings) in &targets {
            let what = format!("{} to {format} {settings:?}", fixture.name);
            let conversion = match to(&guest, format, settings) {
                Ok(conversion) => conversion,
                // Small addresses are all taken in some guests.
                Err(ConvertError::NoHole { bits, .. }) if bits <= 36 => continue,
                Err(error) => panic!("{what}: {error}"),
            };
            check_conversion(&snapshot, &before, &conversion, &folder.path().join("converted"), &what);
            converted_to += 1;
        }
        assert!(converted_to > 0 || prefix == "arm-v7s", "{}: to no {prefix}", fixture.name);
        println!("{}: converts to {converted_to} targets of {prefix}", fixture.name);
    }
}

/// What was built maps what was there, as the library and the naive walker read it.
fn check_conversion(snapshot: &Snapshot, before: &BTreeMap<u64, Vec<reference::Run>>, conversion: &Conversion, out: &Path, what: &str) {
    snapshot::store(out, false, what, &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
    let converted = Snapshot::load(out).unwrap();
    let after_guest = Guest::new(&converted, plugins()).unwrap();
    let memory = configs::arena_memory(&conversion.arena);
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
        let config = reference_config(&table.table).unwrap_or_else(|| panic!("{what}: the reference does not know {}", table.table));
        check_losses(&config, &table.built.losses, what);
        // The naive walker sees the same.
        let walked = Walker::new(&memory, &[config]).unwrap().with_budget(1 << 27).mappings().unwrap();
        assert_eq!(reference::merge(walked), after, "{what}: device {id:#x}: the naive walker disagrees");
    }
    // Devices of one domain still share one table.
    let streams: usize = conversion.tables.iter().map(|table| table.streams.len()).sum();
    let sources: BTreeSet<&Vec<reference::Run>> = before.values().filter(|runs| !runs.is_empty()).collect();
    assert!(sources.len() == streams || conversion.tables.len() < streams, "{what}: no table is shared");
    std::fs::remove_dir_all(out).unwrap();
}

#[test]
fn every_snapshot_converts_to_intel_formats() {
    convert_all("intel-vtd");
}

#[test]
fn every_snapshot_converts_to_arm_formats() {
    convert_all("arm-smmuv3");
}

#[test]
fn every_snapshot_converts_to_amd_formats() {
    convert_all("amd-vi");
}

#[test]
fn every_snapshot_converts_to_riscv_formats() {
    convert_all("riscv-iommu");
}

#[test]
fn every_snapshot_converts_to_s390_tables() {
    convert_all("s390-zpci");
}

#[test]
fn every_snapshot_converts_to_loongarch_tables() {
    convert_all("loongarch");
}

#[test]
fn every_snapshot_converts_to_dart_tables() {
    convert_all("apple-dart");
}

#[test]
fn every_snapshot_converts_to_short_descriptors() {
    convert_all("arm-v7s");
}

/// Only what the target really lacks may be lost, by what the reference knows of it.
fn check_losses(config: &reference::tables::TableConfig, losses: &stagecraft::table::Losses, what: &str) {
    let regions = config.regions().unwrap();
    let page = 1u64 << regions[0].steps.last().unwrap().shift;
    let in_range = |iova: u64| regions.iter().any(|region| iova >= region.first && region.contains(iova - region.first));
    for (loss, count) in losses.iter() {
        for piece in &count.examples {
            let documented = match loss {
                Loss::InputRange => !in_range(piece.iova.first),
                Loss::OutputRange => config.output_bits() < 64 && (piece.address + piece.iova.length_minus_one()) >> config.output_bits() != 0,
                Loss::Granule => [piece.iova.first, piece.address, piece.iova.length_minus_one() + 1].iter().any(|edge| edge % page != 0),
                Loss::Permission => !says_write_only(config) && piece.attributes.access(true) == Access::WRITE,
                Loss::Execute | Loss::MemoryType | Loss::Coherent | Loss::DirtyTracking => true,
                // No guest here has tags.
                Loss::Tagged => false,
            };
            assert!(documented, "{what}: {loss} lost {} bytes, such as {piece:x?}", count.bytes);
        }
    }
}

#[test]
fn conversion_is_deterministic() {
    let plugins = plugins();
    let fixture = fixtures::small();
    let snapshot = Snapshot::load(&fixture.path).unwrap();
    let guest = Guest::new(&snapshot, plugins).unwrap();
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
    let guest = Guest::new(&snapshot, plugins).unwrap();
    let there = to(&guest, "intel-vtd/second-stage", &[]).unwrap();
    let out = folder.path().join("there");
    snapshot::store(&out, false, "there", &there.map, &snapshot.devices, &there.streams, &there.arena).unwrap();
    let middle = Snapshot::load(&out).unwrap();
    let middle_guest = Guest::new(&middle, plugins).unwrap();
    let back = to(&middle_guest, "arm-smmuv3/stage1", &[]).unwrap();
    let out = folder.path().join("back");
    snapshot::store(&out, false, "back", &back.map, &middle.devices, &back.streams, &back.arena).unwrap();
    let after = Snapshot::load(&out).unwrap();
    let after_guest = Guest::new(&after, plugins).unwrap();
    for device in &snapshot.devices {
        assert_eq!(mappings(&guest, device.id), mappings(&after_guest, device.id), "device {:#x}", device.id);
    }
}
