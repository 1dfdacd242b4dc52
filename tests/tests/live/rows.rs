//! Many entries of one table that change at once, and are told of page by page, with others between them that nobody speaks of: tables of every format, full ones. What is
//! found is what the same commands find one by one, and in the end what is read of the tables for the first time.

use std::collections::BTreeSet;

use stagecraft::memory::MemoryMap;
use stagecraft::plugin::queue::Invalidation;
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, ShadowLimits, Space, Unwatched, Way};
use stagecraft::{Gpa, Span};
use stagecraft_tests::reference::generate::{Format, Generated, Options, Rng, generate_with};

use super::behaviour::range;
use super::equality::{HOSTS, assert_same, holes, seeds};
use super::support::{Host, View, format};
use crate::configs;

fn live(generated: &Generated, map: &MemoryMap, host: &(&str, &[(&str, u64)]), limits: ShadowLimits) -> Live<Host> {
    let way = Way::table(format(&configs::plugin_config(&generated.config)));
    let space = Space::open(way, map.clone(), limits, Box::new(Unwatched)).unwrap();
    let mut live = Live::new(space, Host::new(&TableConfig::new(host.0, host.1), 16 << 20), Tag::default(), 0, 1 << 14);
    live.synchronise(&View(&generated.snapshot.memory)).unwrap();
    live
}

fn spans(live: &Live<Host>) -> impl Iterator<Item = Span> + '_ {
    live.sink().model.pieces.values().map(|piece| piece.iova)
}

/// Entries of a page with tables: most that are absent become copies of others, or others absent, or each another's.
fn rewrite(generated: &mut Generated, tables: &[u64], rng: &mut Rng) {
    let bytes = generated.config.entry_bytes() as usize;
    let page = rng.pick(tables);
    let Some(content) = generated.snapshot.memory.pages.get_mut(&page) else { return };
    let used: Vec<Vec<u8>> = content.chunks(bytes).filter(|entry| entry.iter().any(|byte| *byte != 0)).map(<[u8]>::to_vec).collect();
    if used.is_empty() {
        return;
    }
    let (fills, empties, chance) = (rng.percent(60), rng.percent(40), rng.pick(&[10, 50, 95]));
    // Most are copies of one, as a driver writes them.
    let one = used[rng.below(used.len() as u64) as usize].clone();
    for entry in content.chunks_mut(bytes) {
        if !rng.percent(chance) {
            continue;
        }
        let is_used = entry.iter().any(|byte| *byte != 0);
        match (is_used, fills, empties) {
            (false, true, _) if rng.percent(90) => entry.copy_from_slice(&one),
            (false, true, _) => entry.copy_from_slice(&used[rng.below(used.len() as u64) as usize]),
            (true, _, true) => entry.fill(0),
            (true, _, false) if rng.percent(5) => entry.copy_from_slice(&one),
            _ => {}
        }
    }
}

fn run(format: Format, seed: u64) -> u64 {
    let mut rng = Rng::new(seed ^ 0x2075);
    let mut generated = generate_with(format, seed, Options { clusters: 4, ..Options::default() });
    let host = rng.pick(HOSTS);
    let what = format!("{format:?} on {} seed {seed}", host.0);
    let map = holes(&generated.truth, &[], generated.config.output_bits().min(63) as u8, &mut rng);
    let leaves = if rng.percent(30) { rng.pick(&[40, 300, 700]) } else { 1 << 20 };
    let limits = ShadowLimits { table_pages: 1 << 10, leaves };
    let (mut together, mut apart) = (live(&generated, &map, &host, limits), live(&generated, &map, &host, limits));
    let mut changes = 0;
    for round in 0..4 {
        let tables: Vec<u64> = together.space().watched_pages().map(|page| page.0).collect::<BTreeSet<_>>().into_iter().collect();
        if tables.is_empty() {
            break;
        }
        (0..=rng.below(2)).for_each(|_| rewrite(&mut generated, &tables, &mut rng));
        let memory = &generated.snapshot.memory;
        let after = live(&generated, &map, &host, limits);
        let all: BTreeSet<Span> = spans(&together).chain(spans(&after)).filter(|span| span.length_minus_one() < 1 << 30).collect();
        let step = rng.pick(&[2, 3]);
        for part in 0..step {
            let leaf_only = rng.percent(30);
            let commands: Vec<Invalidation> =
                all.iter().skip(part).step_by(step).take(500).map(|span| range(span.first, span.last, leaf_only)).collect();
            changes += together.invalidate(&View(memory), &commands).unwrap().changes;
            for command in &commands {
                apart.invalidate(&View(memory), &[*command]).unwrap();
            }
            let what = format!("{what}, round {round}, part {part}");
            assert_same(&together.sink().model.mappings(), &apart.sink().model.mappings(), &what);
            assert_eq!(together.space().figures().leaves, apart.space().figures().leaves, "{what}");
        }
        together.synchronise(&View(memory)).unwrap();
        apart.synchronise(&View(memory)).unwrap();
        if together.space().figures().blocked == 0 && after.space().figures().blocked == 0 {
            let what = format!("{what}, round {round}, at last");
            assert_same(&together.sink().model.mappings(), &after.sink().model.mappings(), &what);
            assert_same(&together.sink().walked(), &after.sink().walked(), &format!("{what}: the host's table"));
            assert_eq!(together.space().figures().leaves, after.space().figures().leaves, "{what}");
        }
    }
    // What the counts say is there goes with the tables.
    generated.snapshot.memory.pages.clear();
    together.table_written(&View(&generated.snapshot.memory), Gpa(0), u64::MAX).unwrap();
    together.synchronise(&View(&generated.snapshot.memory)).unwrap();
    assert!(together.sink().model.pieces.is_empty() && together.sink().walked().is_empty(), "{what}: all pages gone");
    assert_eq!(together.space().figures().leaves, 0, "{what}");
    changes
}

#[test]
fn rows_of_pages_of_every_format_are_found_as_they_are_one_by_one() {
    for format in Format::ALL {
        let seeds = seeds().div_ceil(8).max(4);
        let changes: u64 = (0..seeds).map(|seed| run(format, seed)).sum();
        println!("{format:?}: {changes} changes");
        assert!(changes > 10 * seeds, "{format:?}: {changes}");
    }
}
