//! Which format a table has, told from its pages and the memory map alone: snapshots of real guests with their registers withheld, generated tables, and
//! memory that holds no tables at all.
#![allow(clippy::unwrap_used)]

mod fixtures;

use std::collections::BTreeMap;

use stagecraft::guess::{Candidate, Guess, Missing, Options, Subject, guess};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::VmMemory;
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::snapshot::Snapshot;
use stagecraft::table::Format as _;

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

/// Guesses from the pages and the memory map of a snapshot, and nothing else of it.
fn ask(plugins: &Plugins, snapshot: &Snapshot, root: u64, options: &Options) -> Guess {
    let memory = VmMemory(&snapshot.memory);
    let subject = Subject { memory: &memory, map: &snapshot.map, readable: snapshot.pages * 4096, missing: Missing::Against, root };
    guess(plugins, &subject, options).unwrap()
}

/// Levels and granule of a configuration, from its geometry.
fn nest(plugins: &Plugins, config: &TableConfig, root: u64) -> (u8, u64) {
    let geometry = plugins.by_format(&config.format).unwrap().open(config).unwrap().geometry().unwrap();
    let top = geometry.roots.iter().find(|window| window.address == root).unwrap().level;
    let mut lsbs: Vec<u8> = geometry.levels.iter().map(|level| level.index_lsb).collect();
    lsbs.retain(|lsb| *lsb <= geometry.levels[usize::from(top)].index_lsb);
    lsbs.sort_unstable();
    lsbs.dedup();
    (lsbs.len() as u8, 1 << lsbs[0])
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
    for fixture in fixtures::all().into_iter().chain(fixtures::others()) {
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
            for candidate in found.candidates.iter().take(4) {
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
            let stagecraft::snapshot::Source::Unit { kind, .. } = &snapshot.source else { panic!("a real guest") };
            let told = ask(&plugins, &snapshot, root, &Options { unit: Some(kind.clone()), ..Options::default() });
            if !told.likeliest().first().is_some_and(|candidate| right(&candidate)) {
                wrong.push(format!("{} {root:#x} with the kind of unit", fixture.name));
            }
        }
    }
    println!("{asked} tables with 64 leaves or more, {} not told; of {small} smaller ones {small_right} were told", wrong.len());
    assert!(asked >= 2 && wrong.is_empty(), "{wrong:?}");
}
