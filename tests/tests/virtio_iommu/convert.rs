//! Domains as a source: random ones converted to every format that is installed, against a naive list of what was asked for; large ones; the same twice.

use std::sync::Arc;

use stagecraft::convert::{Conversion, Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::{Kind, MemoryMap};
use stagecraft::plugin::{Config as PluginConfig, Engine, Plugins};
use stagecraft::snapshot::{self, Device as Named, DomainEntry, Domains, Snapshot};
use stagecraft::table::Mapping;
use stagecraft::virtio_iommu::{Config, Device, Effect, Features, MapFlags, Request, RequestLimits, Status};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference::{self, Run, generate::Rng};

use crate::{device, memory};

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(PluginConfig::default()).unwrap()).unwrap()
}

fn formats(plugins: &Plugins) -> Vec<String> {
    plugins.iter().flat_map(|(manifest, _)| manifest.formats.iter().map(|format| format.name.clone()).collect::<Vec<_>>()).collect()
}

fn ram() -> Arc<MemoryMap> {
    memory(&[(Kind::Ram, 0, 0x7fff_ffff), (Kind::Device, 0x1_0000_0000, 0x1_3fff_ffff)])
}

/// A domain of random mappings, asked for one by one in random order, and the naive list of those that were accepted.
fn random(seed: u64, count: u64) -> (Device, Vec<Run>) {
    let mut rng = Rng::new(seed);
    let mut device = device(Config::default(), ram(), RequestLimits::default());
    for endpoint in [8, 0x10, 0x18] {
        device.add_endpoint(endpoint, &[]).unwrap();
    }
    let mut status = |request| device.handle(&request, &mut Vec::new());
    assert_eq!(status(Request::Attach { domain: 5, endpoint: 8, flags: 0 }), Status::Ok);
    assert_eq!(status(Request::Attach { domain: 5, endpoint: 0x10, flags: 0 }), Status::Ok);
    assert_eq!(status(Request::Attach { domain: 6, endpoint: 0x18, flags: 1 }), Status::Ok);
    let mut runs: Vec<Run> = Vec::new();
    for _ in 0..count {
        // Pages, large pages and odd lengths; low, above 4 GiB and at the end of a 47-bit space.
        let size: u64 = [0x1000, 0x1000, 0x3000, 0x1_0000, 0x20_0000, 0x21_0000, 0x4000_0000][rng.below(7) as usize];
        let base = [0, 0x40_0000, 0x8000_0000, 0x12_0000_0000, 0x7fff_0000_0000][rng.below(5) as usize];
        let align = if rng.below(2) == 0 { 0x1000 } else { size & size.wrapping_neg() };
        let iova = (base + rng.below(0x1000) * 0x1000) & !(align - 1);
        let target = if rng.below(4) == 0 { 0x1_0000_0000 } else { 0 };
        let address = (target + rng.below(0x8_0000) * 0x1000) & !(align - 1);
        let flags = MapFlags(rng.below(8) as u32);
        let request = Request::Map { domain: 5, first: iova, last: iova + size - 1, address, flags };
        let overlaps = runs.iter().any(|run| run.iova < iova + size && iova < run.iova + run.size);
        let inside = address + size <= 0x8000_0000 || (0x1_0000_0000..).contains(&address) && address + size <= 0x1_4000_0000;
        assert_eq!(status(request) == Status::Ok, !overlaps && inside, "{request:?}");
        if !overlaps && inside {
            let access = reference::Access { read: flags.0 & 1 != 0, write: flags.0 & 2 != 0 };
            runs.push(Run { iova, address, size, access });
        }
    }
    (device, runs)
}

fn store(path: &std::path::Path, device: &Device) -> Snapshot {
    let label = |id: u64| Named { label: format!("endpoint {id:#x}"), id };
    snapshot::store_domains(path, false, "", &ram(), &[label(8), label(0x10), label(0x18), label(0x20)], &Domains::of_device(device)).unwrap();
    Snapshot::load(path).unwrap()
}

fn reached(runs: &[Run]) -> Vec<Run> {
    reference::merge(runs.iter().copied().filter(|run| run.access != reference::Access::NONE).collect())
}

fn run(mapping: &Mapping) -> Run {
    let access = reference::Access { read: mapping.access.read, write: mapping.access.write };
    Run { iova: mapping.iova.first, address: mapping.address, size: mapping.iova.length_minus_one() + 1, access }
}

fn mappings(guest: &Guest<'_>, id: u64) -> Vec<Run> {
    let State::Translated(configs) = guest.stream(id, None).unwrap().state else { panic!("{id:#x} has no table") };
    let collected = guest.collect(&mut guest.open(&configs).unwrap(), 3).unwrap();
    assert_eq!((collected.stopped, collected.collector.faults()), (None, &[][..]));
    collected.collector.mappings().iter().map(run).collect()
}

fn to(guest: &Guest<'_>, format: &str) -> Conversion {
    convert(guest, &guest.streams().unwrap(), &Target::new(format), &mut |_, _| ()).unwrap_or_else(|error| panic!("{format}: {error}"))
}

fn bytes(runs: &[Run]) -> u128 {
    runs.iter().map(|run| u128::from(run.size)).sum()
}

/// Where `iova` goes in a naive list.
fn target(runs: &[Run], iova: u64, access: Access) -> Option<u64> {
    let run = runs.iter().find(|run| run.iova <= iova && iova - run.iova < run.size)?;
    (run.access.allows(access.write)).then_some(run.address + (iova - run.iova))
}

#[test]
fn random_domains_convert_to_every_format() {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    let (mut whole, mut by_reference, mut dmas) = (0, 0, 0_u64);
    for seed in 0..6 {
        let (device, asked) = random(seed, 40 + seed * 60);
        let naive = reached(&asked);
        let snapshot = store(&folder.path().join(format!("guest-{seed}")), &device);
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        assert_eq!(mappings(&guest, 8), naive, "seed {seed}");
        assert_eq!(guest.stream(0x18, None).unwrap().state, State::Bypass);
        assert!(matches!(guest.stream(0x20, None).unwrap().state, State::Blocked(_)), "no domain, and no bypass");
        for (index, format) in formats(&plugins).iter().enumerate() {
            let conversion = to(&guest, format);
            let [table] = &conversion.tables[..] else { panic!("{format}: one table for both endpoints") };
            assert_eq!(table.streams, [(8, None), (0x10, None)]);
            let out = folder.path().join(format!("{seed}-{index}"));
            snapshot::store(&out, false, "", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
            let converted = Snapshot::load(&out).unwrap();
            let after = Guest::new(&converted, &plugins).unwrap();
            let found = mappings(&after, 0x10);
            // What is refused is counted, byte by byte; nothing goes elsewhere, and nothing is allowed that was not.
            for part in &found {
                assert!(is_in(part, &naive), "{format} seed {seed}: {part:?} was not asked for");
            }
            assert_eq!(bytes(&naive) - bytes(&found), table.built.losses.refused_bytes(), "{format} seed {seed}");
            whole += u64::from(bytes(&naive) == bytes(&found));
            // A naive reader of the format, where there is one.
            if let Ok(naive_snapshot) = reference::snapshot::Snapshot::load(&out)
                && let Ok(reference::detect::Resolution::Tables(stages)) = reference::detect::resolve(&naive_snapshot, 8)
                && let Ok(walker) = reference::walk::Walker::new(&naive_snapshot.memory, &stages)
            {
                assert_eq!(reference::merge(walker.mappings().unwrap()), found, "{format} seed {seed}");
                by_reference += 1;
            }
            dmas += same_dma(&guest, &after, &naive, &found, seed);
        }
    }
    assert!(whole >= 6 && by_reference >= 12 && dmas > 1000, "{whole} without refusals, {by_reference} read by the reference, {dmas} accesses");
    println!("{whole} conversions without refusals, {by_reference} read by the reference, {dmas} accesses compared");
}

fn is_in(part: &Run, whole: &[Run]) -> bool {
    let ends = [part.iova, part.iova + (part.size - 1)];
    let allowed = |run: &Run| part.access.and(run.access) == part.access && part.access == run.access;
    let inside = |run: &&Run| ends.iter().all(|end| run.iova <= *end && *end - run.iova < run.size);
    whole.iter().filter(inside).any(|run| run.address + (part.iova - run.iova) == part.address && allowed(run))
}

/// Accesses at the ends of what was asked for and beside it: from the requests, and from the tables.
fn same_dma(guest: &Guest<'_>, after: &Guest<'_>, naive: &[Run], found: &[Run], seed: u64) -> u64 {
    let open = |guest: &Guest<'_>| match guest.stream(8, None).unwrap().state {
        State::Translated(configs) => guest.open(&configs).unwrap(),
        other => panic!("{other:?}"),
    };
    let (mut before, mut converted) = (open(guest), open(after));
    let mut rng = Rng::new(seed ^ 0xd0a);
    let mut count = 0;
    for _ in 0..20 {
        let run = naive[rng.below(naive.len() as u64) as usize];
        for iova in [run.iova, run.iova + run.size - 1, run.iova.wrapping_sub(1), run.iova + run.size, run.iova + rng.below(run.size)] {
            for access in [Access::READ, Access::WRITE] {
                let source = guest.translate(&mut before, Iova(iova), access).unwrap().ok().map(|found| found.address.0);
                assert_eq!(source, target(naive, iova, access), "{iova:#x} {access}");
                let result = after.translate(&mut converted, Iova(iova), access).unwrap().ok().map(|found| found.address.0);
                assert_eq!(result, target(found, iova, access), "{iova:#x} {access}");
                count += 1;
            }
        }
    }
    count
}

#[test]
fn the_order_of_requests_plays_no_part() {
    let plugins = plugins();
    let folder = tempfile::tempdir().unwrap();
    let (one, asked) = random(77, 150);
    let (again, _) = random(77, 150);
    assert_eq!(format!("{one:?}"), format!("{again:?}"));
    // The same mappings the other way round, one of them after it was something else.
    let mut other = device(Config::default(), ram(), RequestLimits::default());
    for endpoint in [8, 0x10, 0x18] {
        other.add_endpoint(endpoint, &[]).unwrap();
    }
    let mut effects: Vec<Effect> = Vec::new();
    other.handle(&Request::Attach { domain: 6, endpoint: 0x18, flags: 1 }, &mut effects);
    other.handle(&Request::Attach { domain: 5, endpoint: 0x10, flags: 0 }, &mut effects);
    other.handle(&Request::Attach { domain: 5, endpoint: 8, flags: 0 }, &mut effects);
    for run in asked.iter().rev() {
        let (first, last) = (run.iova, run.iova + run.size - 1);
        other.handle(&Request::Map { domain: 5, first, last, address: 0, flags: MapFlags(1) }, &mut effects);
        other.handle(&Request::Unmap { domain: 5, first, last }, &mut effects);
        let device_memory = one.domain(5).and_then(|domain| domain.find(first)).unwrap().attributes.memory_type() == stagecraft::MemoryType::Device;
        let flags = u32::from(run.access.read) | u32::from(run.access.write) << 1 | u32::from(device_memory) << 2;
        let request = Request::Map { domain: 5, first, last, address: run.address, flags: MapFlags(flags) };
        assert_eq!(other.handle(&request, &mut effects), Status::Ok);
    }
    let (a, b) = (store(&folder.path().join("a"), &one), store(&folder.path().join("b"), &other));
    assert_eq!(a.source, b.source);
    let files = |path: &str| {
        let snapshot = Snapshot::load(&folder.path().join(path)).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let conversion = to(&guest, "arm-smmuv3/stage1");
        let out = folder.path().join(format!("{path}-converted"));
        snapshot::store(&out, false, "", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
        (std::fs::read(out.join("snapshot.json")).unwrap(), std::fs::read(out.join("pages.bin")).unwrap())
    };
    assert_eq!(files("a"), files("b"));
}

/// Three hundred thousand mappings, asked for in an order that helps nobody, taken back in another: with any step that looks at all of them this would not end.
#[test]
fn a_large_domain() {
    const COUNT: u64 = 300_000;
    let mut device = device(Config::default(), ram(), RequestLimits::default());
    device.add_endpoint(8, &[]).unwrap();
    let mut effects = Vec::new();
    assert_eq!(device.handle(&Request::Attach { domain: 5, endpoint: 8, flags: 0 }, &mut effects), Status::Ok);
    // 7919 is prime and does not divide COUNT: every page once.
    let page = |index: u64| index * 7919 % COUNT;
    for index in 0..COUNT {
        let first = page(index) << 13;
        let address = (COUNT - page(index)) << 12;
        effects.clear();
        let request = Request::Map { domain: 5, first, last: first + 0xfff, address, flags: MapFlags(3) };
        assert_eq!((device.handle(&request, &mut effects), effects.len()), (Status::Ok, 1));
        let middle = Request::Unmap { domain: 5, first: first + 0x800, last: first + 0x8ff };
        assert_eq!(device.handle(&middle, &mut effects), Status::Range);
    }
    assert_eq!(device.mappings(), COUNT);
    let plugins = plugins();
    let contents = device.domain(5).cloned().map(Arc::new);
    let source = snapshot::Source::Domains(Domains { registers: Vec::new(), entries: vec![DomainEntry { id: 5, endpoints: vec![8], contents }] });
    let devices = vec![Named { label: "endpoint".to_owned(), id: 8 }];
    let snapshot = Snapshot { description: String::new(), source, map: (*ram()).clone(), devices, memory: snapshot::PageMemory::new(), pages: 0 };
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let conversion = to(&guest, "intel-vtd/second-stage");
    assert_eq!((conversion.tables[0].source_leaves, conversion.tables[0].built.leaves), (COUNT, COUNT));
    assert_eq!(mappings(&guest, 8).len() as u64, COUNT);
    effects.clear();
    for index in 0..COUNT / 2 {
        let first = page(COUNT - 1 - index) << 13;
        assert_eq!(device.handle(&Request::Unmap { domain: 5, first, last: first + 0x1fff }, &mut effects), Status::Ok);
    }
    assert_eq!((effects.len() as u64, device.mappings()), (COUNT / 2, COUNT / 2));
    effects.clear();
    assert_eq!(device.handle(&Request::Unmap { domain: 5, first: 0, last: u64::MAX }, &mut effects), Status::Ok);
    assert_eq!((effects.len() as u64, device.mappings()), (COUNT / 2, 0), "all that was left, each as it was mapped");
}

/// Without the feature nothing is bypassed, whatever a snapshot's field says.
#[test]
fn a_snapshot_says_what_endpoints_without_a_domain_get() {
    let field = |features: u64, accepted: u64, bypass: u64| {
        let registers = [("features", features), ("accepted", accepted), ("bypass", bypass)];
        Domains { registers: registers.map(|(name, value)| (name.to_owned(), value)).to_vec(), entries: Vec::new() }.bypass()
    };
    let (config, old) = (Features::BYPASS_CONFIG.0, Features::BYPASS.0);
    assert!(field(config, 0, 1) && field(old, old, 0));
    assert!(!field(config, 0, 0) && !field(0, 0, 1) && !field(old, 0, 1));
}
