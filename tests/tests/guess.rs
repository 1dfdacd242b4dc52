//! Which format a table has, told from its pages and the memory map alone: snapshots of real guests with their registers withheld, generated tables, and
//! memory that holds no tables at all.
#![allow(clippy::unwrap_used)]

mod configs;
mod fixtures;

use std::collections::BTreeMap;

use stagecraft::Span;
use stagecraft::convert::{Target, convert};
use stagecraft::guess::{Candidate, Guess, Missing, Options, Subject, guess};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::VmMemory;
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::snapshot::{Snapshot, Source, store};
use stagecraft::table::{Collector, Format as _};
use stagecraft_tests::reference::generate::{self, Rng};

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

/// Guesses from the pages and the memory map of a snapshot, and nothing else of it.
fn ask(plugins: &Plugins, snapshot: &Snapshot, root: u64, options: &Options) -> Guess {
    let memory = VmMemory(&snapshot.memory);
    let subject = Subject { memory: &memory, map: &snapshot.map, readable: snapshot.pages * 4096, missing: Missing::Against, root };
    guess(plugins, &subject, options).unwrap()
}

/// Levels and granule of a configuration, from its geometry: the chain of tables from the root down, each as wide as a slot of the one above.
fn nest(plugins: &Plugins, config: &TableConfig, root: u64) -> (u8, u64) {
    let geometry = plugins.by_format(&config.format).unwrap().open(config).unwrap().geometry().unwrap();
    let mut at = &geometry.levels[usize::from(geometry.roots.iter().find(|window| window.address == root).unwrap().level)];
    let mut levels = 1;
    while let Some(next) = geometry.levels.iter().find(|level| level.top_bit() == at.index_lsb) {
        at = next;
        levels += 1;
    }
    (levels, 1 << at.index_lsb)
}

/// A root, its configuration, and how many leaves can be reached from it.
fn roots(guest: &Guest<'_>) -> BTreeMap<u64, (TableConfig, u64)> {
    let mut roots = BTreeMap::new();
    for stream in guest.streams().unwrap() {
        let State::Translated(configs) = &stream.state else { continue };
        for config in configs {
            for (_, root) in config.settings.iter().filter(|(name, _)| name.starts_with("root")) {
                let leaves = guest.collect(&mut guest.open(std::slice::from_ref(config)).unwrap(), 0).unwrap().collector.leaf_sizes().iter().sum();
                roots.insert(root, (config.clone(), leaves));
            }
        }
    }
    roots
}

fn show(candidate: &Candidate) -> String {
    let words = candidate.words(Missing::Against).join("; ");
    format!("  {} {} levels={} {:.0} bits: {words}", candidate.rank, candidate.config, candidate.levels, candidate.evidence.bits)
}

/// What a guess must find.
struct Truth<'a> {
    format: &'a str,
    levels: u8,
    granule: u64,
}

impl Truth<'_> {
    fn is(&self, candidate: &Candidate) -> bool {
        (&*candidate.config.format, candidate.levels, candidate.granule) == (self.format, self.levels, self.granule)
    }

    /// Whether it is the guess, or one of those that cannot be told apart.
    fn told(&self, found: &Guess) -> bool {
        found.likeliest().iter().any(|candidate| self.is(candidate))
    }

    /// How many bits the best of all others is behind; negative if it is before.
    fn margin(&self, found: &Guess) -> f64 {
        let bits = |right: bool| {
            let some = found.candidates.iter().filter(|candidate| self.is(candidate) == right && (right || candidate.rank > 1));
            some.map(|candidate| candidate.evidence.bits).fold(f64::NEG_INFINITY, f64::max)
        };
        bits(true) - bits(false)
    }
}

#[test]
fn the_tables_of_real_guests_are_told_without_registers() {
    let plugins = configs::plugins();
    let mut asked = 0;
    let mut wrong = Vec::new();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, plugins).unwrap();
        for (root, (config, leaves)) in roots(&guest) {
            // What smaller tables are is often a matter of taste: one leaf alone, or nothing at all.
            if leaves < 64 {
                continue;
            }
            let (levels, granule) = nest(plugins, &config, root);
            let truth = Truth { format: &config.format, levels, granule };
            let found = ask(plugins, &snapshot, root, &Options::default());
            asked += 1;
            let (name, margin, equal) = (&fixture.name, truth.margin(&found), found.likeliest().len());
            println!("{name} {root:#x} {} levels={levels} granule={granule} leaves={leaves}: {margin:.0} bits, {equal} equal", config.format);
            if !truth.told(&found) {
                wrong.push(format!("{name} {root:#x}"));
                found.candidates.iter().take(3).for_each(|candidate| println!("{}", show(candidate)));
            }
            // What is equal at the top is ordered by the kind of unit, and the rest is as it was.
            let Source::Unit { kind, .. } = &snapshot.source else { panic!("a real guest") };
            if equal == 1 {
                continue;
            }
            let found = ask(plugins, &snapshot, root, &Options { unit: Some(kind.clone()), ..Options::default() });
            if !found.likeliest().first().is_some_and(|candidate| truth.is(candidate)) {
                wrong.push(format!("{name} {root:#x} with the kind of unit"));
            }
        }
    }
    println!("{asked} tables with 64 leaves or more, {} not told", wrong.len());
    assert!(asked >= 2 && wrong.is_empty(), "{wrong:?}");
}

/// Hit rates of generated tables with 64 leaves or more. The generator uses options that drivers do not: noise in ignored bits, entries that fault,
/// restrictions by tables, byte orders and widths of all kinds. `STAGECRAFT_SEEDS` says how many seeds, `STAGECRAFT_SEED` the first, and `STAGECRAFT_FORMAT`
/// a part of what is to be tried, such as `plain Arm`.
#[test]
fn generated_tables_are_told() {
    let number = |name: &str, default: u64| std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(default);
    let (first, seeds) = (number("STAGECRAFT_SEED", 0), number("STAGECRAFT_SEEDS", 3));
    let only = std::env::var("STAGECRAFT_FORMAT").ok();
    let plain = generate::Options { clusters: 24, restrictions: false, decoys: false, noise: false };
    let wild = generate::Options { clusters: 24, ..generate::Options::default() };
    let mut rates = Vec::new();
    for (name, options) in [("plain", plain), ("wild", wild)] {
        for format in generate::Format::ALL {
            if only.as_ref().is_some_and(|only| !format!("{name} {format:?}").contains(only)) {
                continue;
            }
            let mut rate = Rate::default();
            (first..first + seeds)
                .for_each(|seed| rate.add(&format!("{name} {format:?} seed {seed}"), &generate::generate_with(format, seed, options)));
            println!("{name} {format:?}: {rate:?}");
            rates.push((name, format, rate));
        }
    }
    for (name, format, rate) in rates {
        // With noise in all ignored bits and tables that forbid things, tables of the first stage are near those of the second, where other bits are ignored.
        let least = if (name, format) == ("wild", generate::Format::VtdFirst) { 50 } else { 95 };
        assert!(rate.asked > 0 && rate.hits * 100 >= rate.asked * least, "{name} {format:?}: {rate:?}");
    }
}

/// How many of the tables with 64 leaves or more were told, first of all, and among several that cannot be told apart.
#[derive(Debug, Default)]
struct Rate {
    asked: u32,
    hits: u32,
    first: u32,
    ties: u32,
}

impl Rate {
    fn add(&mut self, what: &str, generated: &generate::Generated) {
        let plugins = configs::plugins();
        let folder = tempfile::tempdir().unwrap();
        let snapshot = configs::load(&generated.snapshot, folder.path());
        let guest = Guest::new(&snapshot, plugins).unwrap();
        let State::Translated(tables) = guest.stream(generate::DEVICE, None).unwrap().state else { panic!("{what}: not translated") };
        for (root, (config, leaves)) in roots_of(&guest, &tables[0]) {
            if leaves < 64 {
                continue;
            }
            let found = ask(plugins, &snapshot, root, &Options::default());
            let (levels, granule) = nest(plugins, &config, root);
            let right =
                |candidate: &Candidate| (&*candidate.config.format, candidate.levels, candidate.granule) == (&*config.format, levels, granule);
            let hit = found.likeliest().iter().any(right);
            self.asked += 1;
            self.hits += u32::from(hit);
            self.first += u32::from(hit && found.candidates.first().is_some_and(right));
            self.ties += u32::from(hit && found.likeliest().len() > 1);
            if !hit {
                let best = found.candidates.first().map(show);
                let truth = found.candidates.iter().find(|candidate| right(candidate)).map(show);
                println!("{what}: {config} levels={levels} granule={granule} leaves={leaves}\n   not {best:?}\n   but {truth:?}");
            }
        }
    }
}

/// The roots of one configuration, each with the leaves below it alone.
fn roots_of(guest: &Guest<'_>, config: &TableConfig) -> BTreeMap<u64, (TableConfig, u64)> {
    let mut roots = BTreeMap::new();
    let addresses: Vec<u64> = config.settings.iter().filter(|(name, _)| name.starts_with("root")).map(|(_, root)| root).collect();
    for root in addresses {
        let mut space = guest.open(std::slice::from_ref(config)).unwrap();
        let window = space.tables().next().unwrap().geometry().roots.iter().filter(|window| window.address == root);
        let spans: Vec<Span> = window.map(|window| Span { first: window.first, last: window.last }).collect();
        let mut leaves = 0;
        for span in spans {
            let mut collector = Collector::new(false, 0);
            space.walk(&guest.memory(), guest.map(), span, &guest.budget(), &mut collector).unwrap();
            leaves += collector.leaf_sizes().iter().sum::<u64>();
        }
        roots.insert(root, (config.clone(), leaves));
    }
    roots
}

/// A name, and pages with their addresses.
type Case = (&'static str, Vec<(u64, [u64; 512])>);

/// Memory of some pages, all of which the memory map has, in a map of 4 GiB.
fn memory_of(pages: &[(u64, [u64; 512])]) -> (tempfile::TempDir, Snapshot) {
    let folder = tempfile::tempdir().unwrap();
    let addresses: Vec<String> = pages.iter().map(|(address, _)| format!("{address:#x}")).collect();
    let json = serde_json::json!({
        "version": 1, "description": "", "unit": {"kind": "intel-vtd", "registers": {}}, "page_size": 4096,
        "memory": [{"kind": "ram", "first": "0x0", "last": "0xffffffff"}], "devices": [], "pages": addresses,
    });
    std::fs::write(folder.path().join("snapshot.json"), json.to_string()).unwrap();
    let bytes: Vec<u8> = pages.iter().flat_map(|(_, words)| words.iter().flat_map(|word| word.to_le_bytes())).collect();
    std::fs::write(folder.path().join("pages.bin"), bytes).unwrap();
    let snapshot = Snapshot::load(folder.path()).unwrap();
    (folder, snapshot)
}

#[test]
fn nothing_fits_what_is_no_table() {
    let plugins = plugins();
    let mut rng = Rng::new(1);
    let mut random = |mask: u64, value: u64| -> [u64; 512] { std::array::from_fn(|_| rng.number() & mask | value) };
    let text: [u64; 512] = std::array::from_fn(|index| u64::from_le_bytes(*b" of the ").wrapping_add((index as u64 * 7 % 26) << 8));
    let cases: [Case; 8] = [
        ("zeroes", vec![(0x1000, [0; 512])]),
        ("ones", vec![(0x1000, [u64::MAX; 512])]),
        ("random", (1..9).map(|page| (page << 12, random(u64::MAX, 0))).collect()),
        ("random with a valid bit", (1..9).map(|page| (page << 12, random(u64::MAX, 3))).collect()),
        ("small numbers", vec![(0x1000, random(0xfff, 0))]),
        ("text", vec![(0x1000, text)]),
        ("one word over and over", vec![(0x1000, [0x2003; 512])]),
        ("a table that points to itself everywhere", vec![(0x1000, [0x1067; 512])]),
    ];
    for (name, pages) in &cases {
        let (_folder, snapshot) = memory_of(pages);
        for readable in [Missing::Against, Missing::Unknown] {
            let memory = VmMemory(&snapshot.memory);
            let subject = Subject { memory: &memory, map: &snapshot.map, readable: snapshot.pages * 4096, missing: readable, root: 0x1000 };
            let found = guess(&plugins, &subject, &Options::default()).unwrap();
            let best: Vec<String> = found.candidates.iter().take(2).map(show).collect();
            assert!(!found.fits && found.likeliest().is_empty(), "{name}: {best:#?}");
        }
    }
}

#[test]
fn a_guess_is_the_same_every_time_and_stays_within_its_budget() {
    let plugins = plugins();
    let snapshot = Snapshot::load(&fixtures::small().path).unwrap();
    let first = ask(&plugins, &snapshot, 0x49d9_2000, &Options::default());
    assert_eq!(first, ask(&plugins, &snapshot, 0x49d9_2000, &Options::default()));
    let tight = Options { pages: 8, trial_pages: 4, ..Options::default() };
    let found = ask(&plugins, &snapshot, 0x49d9_2000, &tight);
    assert!(found.all.iter().all(|candidate| candidate.evidence.tables <= 9), "as many tables as were allowed, and the one that was one too many");
    assert!(found.all.iter().any(|candidate| candidate.evidence.stopped.is_some()));
    let asked = Options { questions: 3, ..Options::default() };
    assert!(ask(&plugins, &snapshot, 0x49d9_2000, &asked).all.iter().all(|candidate| candidate.evidence.patterns <= 3));
}

#[test]
fn all_candidates_can_be_opened_and_none_comes_twice() {
    let plugins = plugins();
    let formats: Vec<String> = plugins.iter().flat_map(|(manifest, _)| manifest.formats.iter().map(|format| format.name.clone())).collect();
    for format in formats {
        let plugin = plugins.by_format(&format).unwrap();
        let candidates = plugin.instantiate().unwrap().candidates(&format).unwrap();
        let mut setting = None;
        for (index, settings) in candidates.iter().enumerate() {
            assert!(!candidates[..index].contains(settings), "{format}: {settings:?} twice");
            let opened = plugin.open(&TableConfig { format: format.clone(), settings: settings.clone() });
            let root = opened.unwrap_or_else(|error| panic!("{format}: {settings:?}: {error}")).geometry_ref().roots[0].setting.clone();
            assert_eq!(setting.get_or_insert_with(|| root.clone()), &root, "{format}: {settings:?}: all of a format take the root in one setting");
        }
    }
}

/// Targets of conversions: level counts, granules and widths of all kinds.
const TARGETS: [(&str, &[(&str, u64)]); 40] = [
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 39)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 44)]),
    ("arm-smmuv3/stage1", &[("granule", 16384), ("input-bits", 47)]),
    ("arm-smmuv3/stage1", &[("granule", 16384), ("input-bits", 48)]),
    ("arm-smmuv3/stage1", &[("granule", 16384), ("input-bits", 40)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 48)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 42)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 52), ("output-bits", 52)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 52), ("lpa2", 1), ("output-bits", 52)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("big-endian", 1)]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 48)]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 39)]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 42), ("start-level", 1)]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 44)]),
    ("arm-smmuv3/stage2", &[("granule", 16384), ("input-bits", 47)]),
    ("arm-smmuv3/stage2", &[("granule", 16384), ("input-bits", 40), ("start-level", 2)]),
    ("arm-smmuv3/stage2", &[("granule", 65536), ("input-bits", 48)]),
    ("arm-smmuv3/stage2", &[("granule", 65536), ("input-bits", 42)]),
    ("intel-vtd/first-stage", &[("levels", 4)]),
    ("intel-vtd/first-stage", &[("levels", 5)]),
    ("intel-vtd/second-stage", &[("levels", 3)]),
    ("intel-vtd/second-stage", &[("levels", 4)]),
    ("intel-vtd/second-stage", &[("levels", 5)]),
    ("amd-vi/v1", &[("levels", 3)]),
    ("amd-vi/v1", &[("levels", 4)]),
    ("amd-vi/v1", &[("levels", 6), ("next-level-7", 1)]),
    ("amd-vi/v2", &[("levels", 4)]),
    ("amd-vi/v2", &[("levels", 5)]),
    ("riscv-iommu/first-stage", &[("levels", 3), ("svnapot", 1)]),
    ("riscv-iommu/first-stage", &[("levels", 5)]),
    ("riscv-iommu/second-stage", &[("levels", 3)]),
    ("riscv-iommu/second-stage", &[("levels", 4)]),
    ("s390-zpci/dma", &[("levels", 3)]),
    ("s390-zpci/dma", &[("levels", 4)]),
    ("loongarch/paging", &[("granule", 4096), ("levels", 4)]),
    ("loongarch/paging", &[("granule", 16384), ("levels", 3)]),
    ("apple-dart/dart1", &[("granule", 4096), ("levels", 3)]),
    ("apple-dart/dart2", &[("granule", 16384), ("levels", 3)]),
    ("arm-v7s/short", &[]),
];

/// Real guests' tables, converted to formats and shapes of which there is no snapshot. What a target cannot say at all, because it is too narrow, is no
/// failure here. `STAGECRAFT_FIXTURES` says how many of the guests, and `STAGECRAFT_FORMAT` a part of what is to be tried, such as `to amd-vi`.
#[test]
fn converted_tables_of_every_format_are_told() {
    let plugins = configs::plugins();
    let most: usize = std::env::var("STAGECRAFT_FIXTURES").ok().and_then(|most| most.parse().ok()).unwrap_or(2);
    let (mut asked, mut missed, mut formats) = (0, Vec::new(), std::collections::BTreeSet::new());
    let only = std::env::var("STAGECRAFT_FORMAT").unwrap_or_default();
    for fixture in fixtures::all().into_iter().take(most) {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        for (format, settings) in TARGETS {
            if !format!("{} to {format} {settings:?}", fixture.name).contains(&only) {
                continue;
            }
            let guest = Guest::new(&snapshot, plugins).unwrap();
            let streams: Vec<_> = guest.streams().unwrap().into_iter().filter(|stream| matches!(stream.state, State::Translated(_))).collect();
            let target = Target { settings: TableConfig::new(format, settings).settings, table_bytes: 1 << 27, ..Target::new(format) };
            let conversion = match convert(&guest, &streams, &target, &mut |_, _| {}) {
                Ok(conversion) => conversion,
                Err(error) => {
                    println!("{} to {format} {settings:?}: not converted: {error}", fixture.name);
                    continue;
                }
            };
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("converted");
            store(&path, false, "", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
            let converted = Snapshot::load(&path).unwrap();
            for table in conversion.tables.iter().filter(|table| table.built.leaves >= 64) {
                let (_, root) = table.table.settings.iter().find(|(name, _)| name.starts_with("root")).unwrap();
                let (levels, granule) = nest(plugins, &table.table, root);
                let truth = Truth { format, levels, granule };
                let found = ask(plugins, &converted, root, &Options::default());
                let (leaves, margin, equal) = (table.built.leaves, truth.margin(&found), found.likeliest().len());
                println!("{} to {format} {settings:?} {root:#x} leaves={leaves}: {margin:.0} bits, {equal} equal", fixture.name);
                asked += 1;
                formats.insert(format);
                if !truth.told(&found) {
                    let best: Vec<String> = found
                        .candidates
                        .iter()
                        .enumerate()
                        .filter(|(index, each)| *index < 2 || truth.is(each))
                        .map(|(_, each)| show(each))
                        .collect();
                    missed.push(format!("{} to {} ({leaves} leaves): {best:#?}", fixture.name, table.table));
                }
            }
        }
    }
    println!("{asked} converted tables with 64 leaves or more, {} not told", missed.len());
    let all = only.is_empty();
    assert!(asked > 0 && missed.is_empty() && (!all || formats.len() == 13), "{formats:?}\n{}", missed.join("\n"));
}
