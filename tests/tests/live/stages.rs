//! Random guests with two stages change the tables of both in every way that a mutation can think of. After each look the model of what was told has what a
//! naive walk of both tables has, and the host's table what a conversion makes of them.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per kind of guest instead of the few of the short run; a failure names its seed, and `STAGECRAFT_SEED=n` runs that one alone.

use std::collections::{BTreeMap, BTreeSet};

use stagecraft::memory::{Budget, Limits, MemoryMap, PAGE};
use stagecraft::plugin::queue::{Effect, Invalidation, Scope};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, ShadowLimits, Space, Way};
use stagecraft::table::{AddressSpace, Arena, Builder, Mapping, Table, Window};
use stagecraft::{Attributes, Gpa, Iova, Span};
use stagecraft_tests::reference::generate::{Generated, Options, Rng, build, says_write_only};
use stagecraft_tests::reference::snapshot::{Memory, Snapshot};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::units::{amd_nested, riscv_nested, smmu_nested, vtd_nested};
use stagecraft_tests::reference::walk::Walker;
use stagecraft_tests::reference::{Access, Run};

use super::behaviour::Watched;
use super::equality::{ForAll, HOSTS, assert_same, clipped, holes, seeds};
use super::support::{Host, View, format, walk};
use crate::configs::plugin_config;
use crate::mutate::{Words, mutate};

/// Guests with two stages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pair {
    Smmu,
    Vtd,
    Amd,
    Riscv,
}

/// Both stages' tables, where the second stage puts them.
pub struct Both {
    pub first: Generated,
    pub second: tables::TableConfig,
    pub memory: Memory,
    /// What the second stage maps.
    pub outer: Vec<Run>,
}

/// The tables of the first stage, and settings for a second. Not every seed gives some.
fn stages(pair: Pair, seed: u64) -> Option<(Generated, tables::TableConfig)> {
    let nested = match pair {
        Pair::Smmu => smmu_nested(seed)?.1,
        Pair::Vtd => vtd_nested(seed).1,
        Pair::Amd => amd_nested(seed).2,
        Pair::Riscv => riscv_nested(seed).2,
    };
    Some((nested.first, nested.second.config))
}

/// Places for a first stage's tables and targets behind a second stage: each page of tables somewhere else, targets in pages and in large pages, with holes.
fn outer_leaves(first: &Generated, second: &tables::TableConfig, rng: &mut Rng, writable: bool) -> BTreeMap<u64, Run> {
    const LARGE: u64 = 2 << 20;
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    let shift = rng.below(1 << 10) * PAGE;
    for (index, page) in first.snapshot.memory.pages.keys().enumerate() {
        // Entries that lack a mark need a page that can be written.
        let access = if writable || rng.percent(70) { Access::RW } else { Access::R };
        leaves.insert(*page, Run { iova: *page, address: 0x20_0000_0000 + shift + index as u64 * PAGE, size: PAGE, access });
    }
    let access = |rng: &mut Rng| {
        let access = rng.pick(&[Access::R, Access::W, Access::RW, Access::RW, Access::RW]);
        if access == Access::W && !says_write_only(second) { Access::RW } else { access }
    };
    for run in &first.truth {
        // A large page that has targets and no table, as long as it is in reach.
        let chunk = run.address & !(LARGE - 1);
        if run.size >= PAGE && rng.percent(30) && leaves.range(..chunk + LARGE).next_back().is_none_or(|(_, leaf)| leaf.iova + leaf.size <= chunk) {
            leaves.insert(chunk, Run { iova: chunk, address: 0x1_0000_0000 + rng.below(8) * LARGE, size: LARGE, access: access(rng) });
        }
        for index in (0..(run.size / PAGE).min(20)).chain((run.size / PAGE).checked_sub(1)) {
            let page = run.address + index * PAGE;
            let free = leaves.range(..=page).next_back().is_none_or(|(_, leaf)| leaf.iova + leaf.size <= page);
            if free && rng.percent(80) {
                leaves.insert(page, Run { iova: page, address: 0x1_0000_0000 + rng.below(0x1000) * PAGE, size: PAGE, access: access(rng) });
            }
        }
    }
    leaves
}

/// Both stages from a seed; with `restrictions`, entries of the second that point to tables may forbid access, to the first one's tables as well.
pub fn both(pair: Pair, seed: u64, rng: &mut Rng, restrictions: bool) -> Both {
    let (first, second) =
        (seed * 16..).find_map(|seed| stages(pair, seed).filter(|(first, _)| !first.truth.is_empty())).expect("some seeds give such a guest");
    put_behind(first, second, rng, restrictions, false)
}

/// The same with tables of the first stage that hardware can mark: what they map is what they say.
pub fn both_writable(pair: Pair, seed: u64, rng: &mut Rng) -> Both {
    let Both { first, second, .. } = both(pair, seed, rng, false);
    put_behind(first, second, rng, false, true)
}

/// A first stage's tables behind a second stage, in new memory.
fn put_behind(first: Generated, second: tables::TableConfig, rng: &mut Rng, restrictions: bool, writable: bool) -> Both {
    let leaves = outer_leaves(&first, &second, rng, writable);
    let list: Vec<Run> = leaves.values().copied().collect();
    let mut second = second;
    if let tables::TableConfig::ArmStage2(config) = &mut second {
        // Pages of tables that turn out to be device memory are then not read.
        config.protected_walk = !writable && rng.percent(25);
    }
    let second = build(second, &list, rng, Options { restrictions, ..Options::default() });
    let mut memory = second.snapshot.memory;
    for (page, content) in &first.snapshot.memory.pages {
        memory.pages.insert(leaves[page].address, content.clone());
    }
    Both { first, second: second.config, memory, outer: list }
}

struct Case {
    what: String,
    stages: [tables::TableConfig; 2],
    /// The pages of both stages, and of nothing else.
    snapshot: Snapshot,
    /// Where the second stage puts what is no table.
    targets: Vec<Run>,
    map: MemoryMap,
    live: Live<Host>,
    compared: u64,
    exhausted: u64,
}

/// How the live address space hears of a mutation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Told {
    /// Writes to pages that are watched at that moment, in any order.
    Writes,
    Everything,
    /// All IOVAs of the first stage, and nothing of the second.
    FirstStage,
    /// Inputs of the second stage that it translates differently now, and nothing else.
    SecondStage,
    /// Those and all IOVAs of the first stage, in pieces and in no order, as one batch.
    Both,
}

impl Case {
    fn new(pair: Pair, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x57a6);
        let Both { first, second, memory, outer } = both(pair, seed, &mut rng, seed.is_multiple_of(3));
        let (name, settings) = rng.pick(HOSTS);
        let host = Host::new(&TableConfig::new(name, settings), 8 << 20);
        // Holes where targets are, and no tables.
        let targets: Vec<Run> = outer.iter().filter(|run| !memory.pages.contains_key(&run.address)).copied().collect();
        let map = holes(&targets, &[], 52, &mut rng);
        let what = format!("{pair:?} on {name} seed {seed}: {:?} behind {second:?}", first.config);
        let snapshot = Snapshot { memory, ..Snapshot::default() };
        let stages = [first.config, second];
        let limits = ShadowLimits { table_pages: 1 << 12, leaves: 1 << 20 };
        let space = Space::open(way_of(&stages), map.clone(), limits, Box::new(Watched::default())).unwrap();
        let live = Live::new(space, host, Tag { domain: Some(1), space: Some(2) }, 0, 1 << 14);
        Self { what, stages, snapshot, targets, map, live, compared: 0, exhausted: 0 }
    }

    /// Memory comes and goes, pages with tables of both stages among it.
    fn change_map(&mut self, rng: &mut Rng) {
        let gone: Vec<u64> = (0..rng.below(3)).filter_map(|_| self.some_page(rng)).collect();
        self.map = holes(&self.targets, &gone, 52, rng);
        self.live.memory_changed(&View(&self.snapshot.memory), self.map.clone()).unwrap();
        assert!(self.live.sink().model.pieces.values().all(|piece| {
            let last = piece.address + piece.iova.length_minus_one();
            self.map.target(piece.address).is_some_and(|target| target.contains(last))
        }));
    }

    /// What the map has of the guest's memory.
    fn existing(&self, memory: &Memory) -> Memory {
        let mut memory = memory.clone();
        memory.pages.retain(|page, _| self.map.region(*page).is_some());
        memory
    }

    /// Pages that hold tables of a stage, as guest addresses.
    fn pages_of(&self, stage: u8) -> BTreeSet<u64> {
        let pages = self.live.space().table(stage).unwrap().watched_pages().map(|page| page.0);
        let outer = [self.stages[1]];
        let Ok(second) = Walker::new(&self.snapshot.memory, &outer) else { return BTreeSet::new() };
        pages.filter_map(|page| if stage == 2 { Some(page) } else { second.translate(page, false).ok() }).collect()
    }

    fn mutate(&mut self, rng: &mut Rng) -> String {
        let words = Words::of(&self.stages[usize::from(rng.percent(50))]);
        match rng.below(4) {
            0 => self.exchange_entries(rng, words),
            1 => self.move_page(rng, words),
            _ => mutate(&mut self.snapshot, rng, words),
        }
    }

    /// A page, often one of a stage.
    fn some_page(&self, rng: &mut Rng) -> Option<u64> {
        let of_stage = self.pages_of(1 + rng.below(2) as u8);
        let pages: Vec<u64> = match rng.percent(80) {
            true => of_stage.into_iter().filter(|page| self.snapshot.memory.pages.contains_key(page)).collect(),
            false => self.snapshot.memory.pages.keys().copied().collect(),
        };
        (!pages.is_empty()).then(|| rng.pick(&pages))
    }

    /// Entries of one table take each other's places.
    fn exchange_entries(&mut self, rng: &mut Rng, words: Words) -> String {
        let Some(page) = self.some_page(rng) else { return "nothing left".to_owned() };
        let memory = &mut self.snapshot.memory;
        let used: Vec<u64> = (0..512).map(|index| page + index * 8).filter(|at| memory.read(*at, words.big_endian).unwrap() != 0).collect();
        for _ in 0..=rng.below(6) {
            let one = if used.is_empty() { page } else { rng.pick(&used) };
            let other = if used.is_empty() || rng.percent(40) { page + rng.below(512) * 8 } else { rng.pick(&used) };
            let (first, second) = (memory.read(one, words.big_endian).unwrap(), memory.read(other, words.big_endian).unwrap());
            memory.write(one, second, words.big_endian);
            memory.write(other, first, words.big_endian);
        }
        format!("entries of {page:#x} exchanged")
    }

    /// A page moves, and every entry that points to it follows: the second stage's, where it is one of the first's.
    fn move_page(&mut self, rng: &mut Rng, words: Words) -> String {
        let Some(page) = self.some_page(rng) else { return "nothing left".to_owned() };
        let memory = &mut self.snapshot.memory;
        let target = 0x28_0000_0000 + rng.below(1 << 16) * PAGE;
        let content = memory.pages[&page].clone();
        memory.pages.insert(target, content);
        if rng.percent(50) {
            memory.pages.remove(&page);
        }
        let places: Vec<u64> = memory.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8)).collect();
        let mut followed = 0;
        for at in places {
            let entry = memory.read(at, words.big_endian).unwrap();
            if entry != 0 && entry == words.point(entry, page) {
                memory.write(at, words.point(entry, target), words.big_endian);
                followed += 1;
            }
        }
        format!("page {page:#x} moved to {target:#x}, {followed} entries follow")
    }

    /// Pages that differ, and where.
    fn differences(&self, before: &Memory) -> Vec<(u64, u64)> {
        let after = &self.snapshot.memory;
        let mut writes = Vec::new();
        for page in before.pages.keys().chain(after.pages.keys()).collect::<BTreeSet<_>>() {
            match (before.pages.get(page), after.pages.get(page)) {
                (Some(old), Some(new)) => {
                    writes.extend((0..512).filter(|word| old[word * 8..][..8] != new[word * 8..][..8]).map(|word| (page + word as u64 * 8, 8)));
                }
                _ => writes.push((*page, PAGE)),
            }
        }
        writes
    }

    /// What a mutation can be told as: of one stage only if no page changed that held tables of the other.
    fn choose(&self, before: &Memory, tables: &[BTreeSet<u64>; 2], rng: &mut Rng) -> Told {
        let pages: BTreeSet<u64> = self.differences(before).iter().map(|(address, _)| address & !0xfff).collect();
        let [first, second] = [0, 1].map(|stage| !tables[stage].is_disjoint(&pages));
        match rng.below(4) {
            0 => Told::Writes,
            1 if !second => Told::FirstStage,
            1 if !first && self.moved(before).is_some() => Told::SecondStage,
            2 if self.moved(before).is_some() => Told::Both,
            _ => Told::Everything,
        }
    }

    fn tell(&mut self, told: Told, before: &Memory, rng: &mut Rng) -> u64 {
        let view = View(&self.snapshot.memory);
        match told {
            Told::Writes => {
                let mut writes = self.differences(before);
                let mut blocked = 0;
                for index in (0..writes.len()).rev() {
                    writes.swap(index, rng.below(index as u64 + 1) as usize);
                    let (address, length) = writes[index];
                    if self.live.space().watched_pages().any(|page| page.0 == address & !0xfff) {
                        blocked += self.live.table_written(&view, Gpa(address), length).unwrap().blocked_count;
                    }
                }
                blocked
            }
            Told::Everything => self.live.invalidate(&view, &[Invalidation { index: 0, effect: Effect::Everything }]).unwrap().blocked_count,
            Told::FirstStage => {
                // All at once would mean both stages.
                let halves = [Span { first: 0, last: u64::MAX >> 1 }, Span { first: 1 << 63, last: u64::MAX }];
                halves.iter().map(|half| self.live.invalidate(&view, &[range(false, *half)]).unwrap().blocked_count).sum()
            }
            Told::SecondStage => self.live.invalidate(&view, &self.moved(before).expect("it was counted")).unwrap().blocked_count,
            Told::Both => {
                let mut commands = self.moved(before).expect("it was counted");
                let mut cuts: BTreeSet<u64> = (0..rng.below(12)).map(|_| (rng.below(1 << 32) << 32) >> rng.below(40)).collect();
                cuts.extend([0, 1 << 63]);
                // A byte is left out at each end, of an entry that is looked at all the same: so they do not become one.
                let ends = cuts.iter().skip(1).copied().chain([u64::MAX]);
                let pieces = cuts.iter().zip(ends).map(|(first, next)| Span { first: *first, last: next.saturating_sub(2).max(*first) });
                commands.extend(pieces.map(|iova| range(false, iova)));
                for index in (1..commands.len()).rev() {
                    commands.swap(index, rng.below(index as u64 + 1) as usize);
                }
                self.live.invalidate(&view, &commands).unwrap().blocked_count
            }
        }
    }

    /// Commands for the inputs that the second stage translates differently now; none if there are too many of them to be found by looking.
    fn moved(&self, before: &Memory) -> Option<Vec<Invalidation>> {
        let outer = [self.stages[1]];
        let runs = |memory: &Memory| {
            let walk = Walker::new(memory, &outer).unwrap().with_budget(1 << 20).walk();
            let runs = walk.runs.iter().map(|run| (run.iova, run.size, run.address, run.access.read, run.access.write));
            (!walk.exhausted).then(|| runs.collect::<BTreeSet<_>>())
        };
        let (old, new) = (runs(&self.existing(before))?, runs(&self.existing(&self.snapshot.memory))?);
        Some(old.symmetric_difference(&new).map(|(iova, size, ..)| range(true, Span { first: *iova, last: iova + (size - 1) })).collect())
    }

    /// The guest leaves its two stages for something else, and comes back to them.
    fn go_another_way(&mut self, rng: &mut Rng, round: u32) {
        let existing = self.existing(&self.snapshot.memory);
        let everything = || clipped(&[Run { iova: 0, address: 0, size: 1 << 52, access: Access::RW }], &self.map);
        let (what, way, expected) = match rng.below(4) {
            0 => ("blocked", Way::blocked(), Some(Vec::new())),
            1 => ("bypassed", Way::bypass(), Some(everything())),
            2 => {
                let window = Window { iova: Span { first: 0x5000, last: (1 << 40) - 1 }, address: 0x1_0000_0000, attributes: Attributes::READ };
                let run = Run { iova: 0x5000, address: 0x1_0000_0000, size: (1 << 40) - 0x5000, access: Access::R };
                ("a window", Way::direct(vec![window]), Some(clipped(&[run], &self.map)))
            }
            _ => {
                let outer = [self.stages[1]];
                let naive = Walker::new(&existing, &outer).unwrap().with_budget(1 << 20).walk();
                let way = Way::table(format(&plugin_config(&self.stages[1])));
                ("the second stage alone", way, (!naive.exhausted).then(|| clipped(&naive.runs, &self.map)))
            }
        };
        self.live.switch(way, &View(&self.snapshot.memory)).unwrap();
        if self.live.space().figures().blocked == 0
            && let Some(expected) = expected
        {
            assert_same(&self.live.sink().model.mappings(), &expected, &format!("{}, round {round}, {what}", self.what));
        }
        self.live.switch(way_of(&self.stages), &View(&self.snapshot.memory)).unwrap();
        self.check(&format!("round {round}, back from {what}"));
    }

    fn check(&mut self, when: &str) {
        let memory = &self.existing(&self.snapshot.memory);
        let what = format!("{}, {when}", self.what);
        let naive = Walker::new(memory, &self.stages).unwrap().with_budget(1 << 20).walk();
        // What is blocked now may have been blocked long ago.
        if naive.exhausted || self.live.space().figures().blocked > 0 {
            self.exhausted += 1;
            return;
        }
        let model = self.live.sink().model.mappings();
        let expected = clipped(&naive.runs, &self.map);
        assert_same(&model, &expected, &format!("{what}: what was told, and the naive walk"));
        self.translate(memory, &naive.runs, &what);
        let host = self.live.sink();
        let lossless = converted(&self.stages, memory, &self.map, &host.config);
        assert_same(&host.walked(), &lossless, &format!("{what}: the host's table, and a conversion"));
        let mut told = 0;
        self.live.space().pieces(Span::ALL, &mut |piece| {
            told += 1;
            assert_eq!(
                host.model.pieces.get(&piece.iova.first).map(|piece| (piece.iova, piece.address)),
                Some((piece.iova, piece.address)),
                "{what}"
            );
        });
        assert_eq!(told, host.model.pieces.len(), "{what}");
        self.compared += 1 + expected.len() as u64;
    }
}

impl Case {
    /// Single addresses, for which only what is on the way to them is looked at: the first and the last byte of runs, and what is beside them.
    fn translate(&self, memory: &Memory, runs: &[Run], what: &str) {
        let naive = Walker::new(memory, &self.stages).unwrap();
        let open = |config: &tables::TableConfig| Table::open(format(&plugin_config(config))).unwrap();
        let mut space = AddressSpace::nested(open(&self.stages[0]), open(&self.stages[1]));
        let budget = Budget::new(Limits { tables: 1 << 20, ..Limits::default() });
        let ends =
            runs.iter().take(40).flat_map(|run| [run.iova.wrapping_sub(1), run.iova, run.iova + (run.size - 1), run.iova.wrapping_add(run.size)]);
        for iova in ends {
            for (access, write) in [(stagecraft::Access::READ, false), (stagecraft::Access::WRITE, true)] {
                let found = space.translate(&View(memory), &self.map, Iova(iova), access, &budget).unwrap();
                let expected = naive.translate(iova, write).ok().filter(|address| self.map.target(*address).is_some());
                assert_eq!(found.map(|translation| translation.address.0).ok(), expected, "{what}: {iova:#x} write {write}");
            }
        }
    }
}

fn range(second_stage: bool, iova: Span) -> Invalidation {
    let scope = Scope { leaf: false, second_stage, domain: Some(1), space: (!second_stage).then_some(2), id: None };
    Invalidation { index: 0, effect: Effect::Range { scope, iova } }
}

fn way_of(stages: &[tables::TableConfig; 2]) -> Way {
    Way::tables(format(&plugin_config(&stages[0])), format(&plugin_config(&stages[1])))
}

/// What an offline conversion of both stages maps.
fn converted(stages: &[tables::TableConfig; 2], memory: &Memory, map: &MemoryMap, host: &TableConfig) -> Vec<Mapping> {
    let open = |config: &tables::TableConfig| Table::open(format(&plugin_config(config))).unwrap();
    let mut space = AddressSpace::nested(open(&stages[0]), open(&stages[1]));
    let mut arena = Arena::new(1 << 28, 1 << 28);
    let mut builder = Builder::new(format(host), &mut arena).unwrap();
    let budget = Budget::new(Limits { tables: 1 << 20, ..Limits::default() });
    let privileged = space.privileged();
    space.walk(&View(memory), map, Span::ALL, &budget, &mut ForAll { builder: &mut builder, privileged }).unwrap();
    let built = builder.finish().unwrap();
    let mut config = host.clone();
    for (setting, address) in &built.roots {
        config.settings.set(setting, address.0);
    }
    walk(&mut Table::open(format(&config)).unwrap(), &arena, &MemoryMap::everything(64))
}

/// One guest, through some changes.
fn run(pair: Pair, seed: u64) -> (u64, u64) {
    let mut rng = Rng::new(seed);
    let mut case = Case::new(pair, seed);
    case.live.synchronise(&View(&case.snapshot.memory)).unwrap();
    case.check("at first");
    for round in 0..8 {
        if rng.percent(15) {
            // The same first stage behind another second one, or the one that it was.
            let first = both(pair, seed, &mut rng.clone(), false).first;
            let Both { second, memory, .. } = put_behind(first.clone(), case.stages[1], &mut rng, seed.is_multiple_of(3), false);
            (case.stages, case.snapshot.memory) = ([first.config, second], memory);
            case.live.switch(way_of(&case.stages), &View(&case.snapshot.memory)).unwrap();
            case.check(&format!("round {round}, switched"));
            continue;
        }
        if rng.percent(15) {
            case.change_map(&mut rng);
            case.check(&format!("round {round}, memory came or went"));
            continue;
        }
        if rng.percent(15) {
            case.go_another_way(&mut rng, round);
            continue;
        }
        let before = case.snapshot.memory.clone();
        let touched = [case.pages_of(1), case.pages_of(2)];
        let done = case.mutate(&mut rng);
        let told = case.choose(&before, &touched, &mut rng);
        let blocked = case.tell(told, &before, &mut rng);
        case.check(&format!("round {round}, {done}, told as {told:?}"));
        // A second stage's table that another one with the same entries took the place of was not told of; and what was blocked is looked at.
        if blocked > 0 || matches!(told, Told::SecondStage | Told::Both) {
            case.live.synchronise(&View(&case.snapshot.memory)).unwrap();
            case.check(&format!("round {round}, {done}, again"));
        }
    }
    // Everything goes.
    case.snapshot.memory.pages.clear();
    case.live.synchronise(&View(&case.snapshot.memory)).unwrap();
    assert!(case.live.sink().model.pieces.is_empty() && case.live.sink().walked().is_empty(), "{}: all pages gone", case.what);
    assert_eq!(case.live.space().figures().leaves, 0, "{}", case.what);
    (case.compared, case.exhausted)
}

fn check(pair: Pair) {
    let (mut compared, mut exhausted) = (0, 0);
    let only = std::env::var("STAGECRAFT_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    for seed in only.map_or(0..seeds(), |seed| seed..seed + 1) {
        let (more, gave_up) = run(pair, seed);
        compared += more;
        exhausted += gave_up;
    }
    println!("{pair:?}: {compared} runs compared, {exhausted} comparisons left out");
    assert!(only.is_some() || compared > 20 * seeds(), "{compared}");
}

#[test]
fn smmu() {
    check(Pair::Smmu);
}

#[test]
fn vtd() {
    check(Pair::Vtd);
}

#[test]
fn amd() {
    check(Pair::Amd);
}

#[test]
fn riscv() {
    check(Pair::Riscv);
}
