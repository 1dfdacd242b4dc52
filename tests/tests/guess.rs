//! Which format a table has, told from its pages and the memory map alone: snapshots of real guests with their registers withheld, generated tables, and
//! memory that holds no tables at all.
#![allow(clippy::unwrap_used)]

mod fixtures;

use std::collections::BTreeMap;

use stagecraft::Span;
use stagecraft::convert::{Target, convert};
use stagecraft::guess::{Candidate, Guess, Missing, Options, Subject, guess};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::VmMemory;
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::snapshot::{Snapshot, Source, Stream, store};
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
    let mut at = usize::from(geometry.roots.iter().find(|window| window.address == root).unwrap().level);
    let mut levels = 1;
    loop {
        let lsb = geometry.levels[at].index_lsb;
        let beside = [at.wrapping_sub(1), at + 1];
        match beside.into_iter().find(|next| geometry.levels.get(*next).is_some_and(|level| level.top_bit() == lsb)) {
            Some(next) => at = next,
            None => return (levels, 1 << lsb),
        }
        levels += 1;
    }
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

#[test]
fn the_tables_of_real_guests_are_told_without_registers() {
    let plugins = plugins();
    let (mut asked, mut small, mut small_right) = (0, 0, 0);
    let mut wrong = Vec::new();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        for (root, (config, leaves)) in roots(&guest) {
            let (levels, granule) = nest(&plugins, &config, root);
            let found = ask(&plugins, &snapshot, root, &Options::default());
            let right =
                |candidate: &&Candidate| (&*candidate.config.format, candidate.levels, candidate.granule) == (&*config.format, levels, granule);
            let hit = found.likeliest().iter().any(|candidate| right(&candidate));
            println!(
                "{} {root:#x} {} levels={levels} granule={granule} leaves={leaves}: {}",
                fixture.name,
                config.format,
                if hit { "hit" } else { "miss" }
            );
            for candidate in found.candidates.iter().take(if hit { 0 } else { 3 }) {
                println!("{}", show(candidate));
            }
            if leaves < 64 {
                small += 1;
                small_right += u32::from(hit);
                continue;
            }
            asked += 1;
            if !hit {
                wrong.push(format!("{} {root:#x}", fixture.name));
            }
            // What is equal at the top is ordered by the kind of unit, and the rest is as it was.
            let Source::Unit { kind, .. } = &snapshot.source else { panic!("a real guest") };
            if found.likeliest().len() == 1 {
                continue;
            }
            let told = ask(&plugins, &snapshot, root, &Options { unit: Some(kind.clone()), ..Options::default() });
            if !told.likeliest().first().is_some_and(|candidate| right(&candidate)) {
                wrong.push(format!("{} {root:#x} with the kind of unit", fixture.name));
            }
        }
    }
    println!("{asked} tables with 64 leaves or more, {} not told; of {small} smaller ones {small_right} were told", wrong.len());
    assert!(asked >= 2 && wrong.is_empty(), "{wrong:?}");
}

/// Hit rates of generated tables with 64 leaves or more. The generator uses options that drivers do not: noise in ignored bits, entries that fault,
/// restrictions by tables, byte orders and widths of all kinds.
#[test]
fn generated_tables_are_told() {
    let seeds: u64 = std::env::var("STAGECRAFT_SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(25);
    let plugins = plugins();
    let mut rates = Vec::new();
    let plain = generate::Options { clusters: 24, restrictions: false, decoys: false, noise: false };
    let wild = generate::Options { clusters: 24, ..generate::Options::default() };
    for (name, options) in [("plain", plain), ("wild", wild)] {
        use generate::Format::{ArmStage1, ArmStage2, VtdFirst, VtdSecond};
        for format in [ArmStage1, ArmStage2, VtdFirst, VtdSecond] {
            // Arm tables of widths that no driver uses are not among the candidates. With noise in all ignored bits, tables of the first stage cannot be told
            // from those of the second, where other bits are ignored.
            let least = match (format, name) {
                (generate::Format::ArmStage1 | generate::Format::ArmStage2, _) => 65,
                (generate::Format::VtdFirst, "wild") => 0,
                _ => 95,
            };
            let (mut asked, mut hits) = (0, 0);
            for seed in 0..seeds {
                let Some((snapshot, config)) = generated(format, seed, options) else { continue };
                let guest = Guest::new(&snapshot, &plugins).unwrap();
                for (root, (config, leaves)) in roots_of(&guest, &config) {
                    if leaves < 64 {
                        continue;
                    }
                    let found = ask(&plugins, &snapshot, root, &Options::default());
                    let (levels, granule) = nest(&plugins, &config, root);
                    let right = |candidate: &Candidate| {
                        (&*candidate.config.format, candidate.levels, candidate.granule) == (&*config.format, levels, granule)
                    };
                    let hit = found.likeliest().iter().any(right);
                    asked += 1;
                    hits += u32::from(hit);
                    if !hit {
                        let best = found.candidates.first().map(show);
                        println!("{name} {format:?} seed {seed}: {config} levels={levels} granule={granule} leaves={leaves}, not {best:?}");
                    }
                }
            }
            println!("{name} {format:?}: {hits} of {asked} tables with 64 leaves or more were told");
            rates.push((name, format, hits, asked, least));
        }
    }
    for (name, format, hits, asked, least) in rates {
        assert!(asked > 0 && hits * 100 >= asked * least, "{name} {format:?}: {hits} of {asked}");
    }
}

/// A generated snapshot, and its configuration in the plugins' words.
fn generated(format: generate::Format, seed: u64, options: generate::Options) -> Option<(Snapshot, TableConfig)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("snapshot");
    std::fs::create_dir(&path).unwrap();
    generate::generate_with(format, seed, options).write_snapshot(&path).unwrap();
    let snapshot = Snapshot::load(&path).unwrap();
    let Source::Tables(entries) = &snapshot.source else { panic!("the generator names its tables") };
    let Stream::Table { format, settings } = &entries.first()?.stream else { return None };
    let known = names(format);
    // What the generator calls by another name changes what is allowed, or which addresses are taken, and not how tables nest.
    let settings = settings.iter().filter(|(name, _)| known.contains(&&**name)).map(|(name, value)| (name.clone(), *value)).map(start_level);
    let mut config = TableConfig { format: format.clone(), settings: settings.collect() };
    if format.starts_with("intel-vtd") {
        config.settings.set("output-bits", 52);
    }
    Some((snapshot, config))
}

/// Level -1 is 255.
fn start_level((name, value): (String, u64)) -> (String, u64) {
    if name == "start-level" { (name, value & 0xff) } else { (name, value) }
}

fn names(format: &str) -> &'static [&'static str] {
    match format {
        "arm-smmuv3/stage1" => &[
            "granule",
            "granule-high",
            "input-bits",
            "input-bits-high",
            "output-bits",
            "root",
            "root-high",
            "mair",
            "hardware-access",
            "hardware-dirty",
            "access-flag-disabled",
            "hardware-table-access",
            "big-endian",
            "lpa",
            "lpa2",
        ],
        "arm-smmuv3/stage2" => &[
            "granule",
            "input-bits",
            "output-bits",
            "start-level",
            "root",
            "hardware-access",
            "hardware-dirty",
            "access-flag-disabled",
            "hardware-table-access",
            "big-endian",
            "lpa",
            "lpa2",
        ],
        _ => &["levels", "root", "page-1g"],
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

/// A stage 2 table of 16 KiB pages with 40 bits, in memory of which all can be read: a root of 16 tables side by side, which are 64 pages, and leaves for runs of memory.
fn wide_root(rng: &mut Rng, memory: &mut [u8], base: u64, root: u64) {
    const TABLES: u64 = 40;
    const ENTRIES: u64 = 2048;
    let put = |memory: &mut [u8], address: u64, word: u64| {
        let at = (address - base) as usize;
        memory[at..at + 8].copy_from_slice(&word.to_le_bytes());
    };
    let pages = memory.len() as u64 >> 14;
    for index in 0..TABLES {
        let table = root + (16 + index) * (ENTRIES * 8);
        put(memory, root + rng.below(16 * ENTRIES) * 8, table | 3);
        let mut slot = 0;
        while slot < ENTRIES {
            let first = rng.below(pages);
            let run = (1 + rng.below(300)).min(ENTRIES - slot).min(pages - first);
            for page in 0..run {
                put(memory, table + (slot + page) * 8, (base + ((first + page) << 14)) | 0x7ff);
            }
            slot += run + rng.below(900);
        }
    }
}

/// A few pages of large tables say less than as many of small ones, and where all of memory can be read much else looks possible at first.
#[test]
fn large_tables_are_told_in_a_whole_memory() {
    let plugins = plugins();
    let (base, root) = (0x4000_0000_u64, 0x4040_0000);
    for seed in 0..3 {
        let mut memory = vec![0; 32 << 20];
        wide_root(&mut Rng::new(seed), &mut memory, base, root);
        let folder = tempfile::tempdir().unwrap();
        let addresses: Vec<String> = (0..memory.len() as u64).step_by(4096).map(|page| format!("{:#x}", base + page)).collect();
        let json = serde_json::json!({
            "version": 1, "page_size": 4096, "devices": [], "pages": addresses,
            "memory": [{"kind": "ram", "first": format!("{base:#x}"), "last": format!("{:#x}", base + memory.len() as u64 - 1)}],
        });
        std::fs::write(folder.path().join("snapshot.json"), json.to_string()).unwrap();
        std::fs::write(folder.path().join("pages.bin"), &memory).unwrap();
        let found = ask(&plugins, &Snapshot::load_memory(folder.path()).unwrap(), root, &Options::default());
        let best = found.likeliest().first().unwrap();
        let told = (&*best.config.format, best.levels, best.granule);
        assert_eq!(
            told,
            ("arm-smmuv3/stage2", 2, 16384),
            "seed {seed}:\n{}",
            found.candidates.iter().take(3).map(show).collect::<Vec<_>>().join("\n")
        );
    }
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
        for (index, settings) in candidates.iter().enumerate() {
            assert!(!candidates[..index].contains(settings), "{format}: {settings:?} twice");
            let opened = plugin.open(&TableConfig { format: format.clone(), settings: settings.clone() });
            assert!(opened.is_ok_and(|opened| !opened.geometry_ref().roots.is_empty()), "{format}: {settings:?}");
        }
    }
}

/// One guest's tables, converted to formats of which there is no snapshot: level counts and granules of all kinds.
#[test]
fn converted_tables_of_every_format_are_told() {
    const TARGETS: [(&str, &[(&str, u64)]); 22] = [
        ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48)]),
        ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 39)]),
        ("arm-smmuv3/stage1", &[("granule", 16384), ("input-bits", 47)]),
        ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 48)]),
        ("arm-smmuv3/stage1", &[("granule", 65536), ("input-bits", 42)]),
        ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 52), ("lpa2", 1), ("output-bits", 52)]),
        ("arm-smmuv3/stage2", &[("granule", 65536), ("input-bits", 48)]),
        ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 39)]),
        ("arm-smmuv3/stage2", &[("granule", 16384), ("input-bits", 47)]),
        ("intel-vtd/first-stage", &[("levels", 5)]),
        ("intel-vtd/second-stage", &[("levels", 3)]),
        ("intel-vtd/second-stage", &[("levels", 5)]),
        ("amd-vi/v1", &[("levels", 4)]),
        ("amd-vi/v1", &[("levels", 6), ("next-level-7", 1)]),
        ("amd-vi/v2", &[("levels", 5)]),
        ("riscv-iommu/first-stage", &[("levels", 5)]),
        ("riscv-iommu/second-stage", &[("levels", 3)]),
        ("riscv-iommu/second-stage", &[("levels", 4)]),
        ("s390-zpci/dma", &[("levels", 4)]),
        ("loongarch/paging", &[("granule", 4096), ("levels", 4)]),
        ("apple-dart/dart1", &[("granule", 4096), ("levels", 3)]),
        ("arm-v7s/short", &[]),
    ];
    let plugins = plugins();
    let snapshot = Snapshot::load(&fixtures::small().path).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let streams = [guest.stream(0x38, None).unwrap(), guest.stream(0x28, None).unwrap()];
    let (mut asked, mut missed) = (0, Vec::new());
    for (format, settings) in TARGETS {
        let target = Target { settings: TableConfig::new(format, settings).settings, table_bytes: 1 << 27, ..Target::new(format) };
        let conversion = match convert(&guest, &streams, &target, &mut |_, _| {}) {
            Ok(conversion) => conversion,
            Err(error) => {
                missed.push(format!("{format} {settings:?}: not converted: {error}"));
                continue;
            }
        };
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("converted");
        store(&path, false, "", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
        let converted = Snapshot::load(&path).unwrap();
        for table in conversion.tables.iter().filter(|table| table.built.leaves >= 64) {
            let (_, root) = table.table.settings.iter().find(|(name, _)| name.starts_with("root")).unwrap();
            let (levels, granule) = nest(&plugins, &table.table, root);
            let found = ask(&plugins, &converted, root, &Options::default());
            let right = |candidate: &Candidate| (&*candidate.config.format, candidate.levels, candidate.granule) == (format, levels, granule);
            asked += 1;
            if !found.likeliest().iter().any(right) {
                let best: Vec<String> = found.candidates.iter().take(2).map(show).collect();
                missed.push(format!("{} ({} leaves): {best:#?}", table.table, table.built.leaves));
            }
        }
    }
    println!("{asked} converted tables with 64 leaves or more, {} not told", missed.len());
    assert!(asked >= 20 && missed.is_empty(), "{}", missed.join("\n"));
}
