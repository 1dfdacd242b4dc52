//! Random guests of every format change their tables in every way that a mutation can think of. After each look the model of what was told, and the host's
//! table, have what a naive walk of the guest's tables has.
//!
//! `STAGECRAFT_SEEDS=n` runs n seeds per format instead of the few of the short run, the first of which is `STAGECRAFT_FROM`; a failure names its seed.

use stagecraft::memory::{Budget, EntryMemory, Kind, Limits, MemoryMap, Region};
use stagecraft::plugin::{TableConfig, Tag};
use stagecraft::sync::{Live, Report, ShadowLimits, Space, Unwatched, Way};
use stagecraft::table::{Arena, Builder, Intercept, Mapping, Piece, Step, Table, Visitor, WalkError};
use stagecraft::{Access, Attributes, Gpa, Span};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::{Format, Options, Rng, build, generate_with, random_leaves, share_empty_tables};
use stagecraft_tests::reference::snapshot::{Memory, Snapshot};
use stagecraft_tests::reference::tables;
use stagecraft_tests::reference::walk::Walker;

use super::behaviour::range;
use super::support::{Host, View, append, format, walk, walk_within};
use crate::configs;
use crate::mutate::{Words, mutate};

/// Host formats, with settings that can say much. All have pages of 4 KiB: a live table joins no pieces, so that a conversion has more where a guest's pages are
/// smaller than the host's.
pub const HOSTS: &[(&str, &[(&str, u64)])] = &[
    ("amd-vi/v1", &[("levels", 6)]),
    ("intel-vtd/first-stage", &[("levels", 5), ("output-bits", 52)]),
    ("intel-vtd/second-stage", &[("levels", 5), ("output-bits", 52)]),
    ("arm-smmuv3/stage1", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48), ("input-bits-high", 48)]),
    ("arm-smmuv3/stage2", &[("granule", 4096), ("input-bits", 48), ("output-bits", 48)]),
    ("riscv-iommu/first-stage", &[("levels", 5)]),
    ("amd-vi/v2", &[("levels", 5)]),
    ("arm-v7s/short", &[]),
];

pub fn seeds() -> u64 {
    number("STAGECRAFT_SEEDS").unwrap_or(25)
}

fn from() -> u64 {
    number("STAGECRAFT_FROM").unwrap_or(0)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

/// The reference's runs where targets exist.
pub fn clipped(runs: &[Run], map: &MemoryMap) -> Vec<Mapping> {
    let mut mappings = Vec::new();
    for run in runs {
        let Some(last) = run.address.checked_add(run.size - 1) else { continue };
        for part in map.targets_within(Span { first: run.address, last }) {
            let first = run.iova + (part.first - run.address);
            let iova = Span { first, last: first + part.length_minus_one() };
            append(&mut mappings, Mapping { iova, address: part.first, access: Access { read: run.access.read, write: run.access.write } });
        }
    }
    mappings
}

/// Everything exists but some of `pages`; to some more addresses no leaf may point.
pub fn holes(truth: &[Run], pages: &[u64], bits: u8, rng: &mut Rng) -> MemoryMap {
    let everything = Span::of_log2(0, bits);
    let targets = truth.iter().filter(|_| rng.clone().percent(30)).map(|run| run.address & !0xfff).take(4).collect::<Vec<u64>>();
    let mut holes: Vec<(Span, bool)> =
        targets.iter().map(|first| (Span { first: *first, last: *first + ((1 + rng.below(16)) << 12) - 1 }, true)).collect();
    holes.extend(pages.iter().map(|page| (Span { first: *page, last: *page + 0xfff }, false)));
    holes.sort_unstable();
    let (mut regions, mut next) = (Vec::new(), 0);
    for (hole, exists) in holes {
        if hole.first < next || hole.last >= everything.last {
            continue;
        }
        regions.extend(hole.first.checked_sub(1).and_then(|last| Span::new(next, last)).map(|span| Region { kind: Kind::Ram, span }));
        regions.extend(exists.then_some(Region { kind: Kind::Table, span: hole }));
        next = hole.last + 1;
    }
    regions.push(Region { kind: Kind::Ram, span: Span { first: next, last: everything.last } });
    MemoryMap::new(regions).unwrap()
}

/// Where all requests are privileged, pages for those alone are for all.
pub struct ForAll<'a, 'b> {
    pub builder: &'a mut Builder<'b>,
    pub privileged: bool,
}

impl Visitor for ForAll<'_, '_> {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        let attributes = if self.privileged { piece.attributes.without(Attributes::PRIVILEGED_ONLY) } else { piece.attributes };
        self.builder.map(&Piece { attributes, ..*piece }).map_err(|_| WalkError::Stopped)
    }
}

/// What an offline conversion of the same tables maps: with everything that the host's format cannot say left out.
pub fn converted(guest: &mut Table, memory: &impl EntryMemory, map: &MemoryMap, host: &TableConfig) -> Vec<Mapping> {
    // Where every format's entries can point.
    let mut arena = Arena::new(1 << 28, 1 << 28);
    let mut builder = Builder::new(format(host), &mut arena).unwrap();
    let budget = Budget::new(Limits::default());
    let privileged = guest.geometry().privileged;
    guest.walk(memory, map, Span::ALL, &budget, &mut ForAll { builder: &mut builder, privileged }).unwrap();
    let built = builder.finish().unwrap();
    let mut config = host.clone();
    for (setting, address) in &built.roots {
        config.settings.set(setting, address.0);
    }
    walk(&mut Table::open(format(&config)).unwrap(), &arena, &MemoryMap::everything(64))
}

fn beyond_all_tables() -> Intercept {
    Intercept { passed: 1, mask: u64::MAX, value: u64::MAX, server: "nothing".to_owned(), address: None, section: String::new() }
}

/// Collects where [`Case::dropped`] looks.
struct Dropped<'a> {
    before: &'a Memory,
    after: &'a Memory,
    bytes: usize,
    spans: Vec<Span>,
}

impl Dropped<'_> {
    /// Whether the entry of a step, or one so many places further, was another one before.
    fn is_other(&self, step: &Step, further: u64) -> bool {
        let address = step.table.0 + (step.index + further) * self.bytes as u64;
        let word = |memory: &Memory| memory.pages.get(&(address & !0xfff)).map(|page| page[(address % 4096) as usize..][..self.bytes].to_vec());
        word(self.before) != word(self.after)
    }
}

impl Visitor for Dropped<'_> {
    fn piece(&mut self, _: &Piece, _: &[Step]) -> Result<(), WalkError> {
        Ok(())
    }

    fn absent(&mut self, span: Span, path: &[Step]) -> Result<(), WalkError> {
        let is_other = path.iter().any(|step| self.is_other(step, 0));
        self.spans.extend(is_other.then_some(span));
        Ok(())
    }

    fn nothing_below(&mut self, span: Span, entries: u64, path: &[Step]) -> Result<(), WalkError> {
        let Some((pointer, above)) = path.split_last() else { return Ok(()) };
        let is_other = above.iter().any(|step| self.is_other(step, 0)) || (0..entries).any(|further| self.is_other(pointer, further));
        self.spans.extend(is_other.then_some(span));
        Ok(())
    }
}

struct Case {
    what: String,
    config: tables::TableConfig,
    snapshot: Snapshot,
    truth: Vec<Run>,
    map: MemoryMap,
    intercepts: Vec<Intercept>,
    live: Live<Host>,
    table: Table,
    compared: u64,
    exhausted: u64,
}

impl Case {
    fn new(format_: Format, seed: u64) -> Self {
        let mut rng = Rng::new(seed ^ 0x11ee);
        let mut generated = generate_with(format_, seed, Options { clusters: 5, ..Options::default() });
        // Some of them let unused slots lead to tables with nothing in them, until something is written there. (A table that is not aligned to its size is something
        // that the reference refuses, and LoongArch's plugin does not: mutations would come across it.)
        let shares = match generated.config {
            tables::TableConfig::LoongArch(config) => config.granule == 4096,
            _ => seed % 4 == 1,
        };
        if shares {
            share_empty_tables(&mut generated, &mut Rng::new(seed), if seed % 8 == 1 { 100 } else { 20 });
        }
        let plugin = configs::plugin_config(&generated.config);
        let (name, settings) = rng.pick(HOSTS);
        let host = Host::new(&TableConfig::new(name, settings), 64 << 20);
        let bits = generated.config.output_bits().min(63) as u8;
        // Parts of DART's pages are told from whole ones by their size.
        let cut = !matches!(generated.config, tables::TableConfig::Dart(_));
        let truth = if cut { generated.truth } else { Vec::new() };
        let map = holes(&truth, &[], bits, &mut rng);
        let limits = ShadowLimits { table_pages: 1 << 12, leaves: 1 << 20 };
        // Half of them with an intercept, at an address that no table has room for: pieces then take the way of those that are cut.
        let intercepts = if seed.is_multiple_of(2) { Vec::new() } else { vec![beyond_all_tables()] };
        let way = Way::table(format(&plugin)).with_intercepts(intercepts.clone());
        let space = Space::open(way, map.clone(), limits, Box::new(Unwatched)).unwrap();
        let live = Live::new(space, host, Tag::default(), 0, 1 << 14);
        let what = format!("{format_:?} on {name} seed {seed}: {:?}", generated.config);
        let table = Table::open(format(&plugin)).unwrap();
        Self { what, config: generated.config, snapshot: generated.snapshot, truth, map, intercepts, live, table, compared: 0, exhausted: 0 }
    }

    /// Memory comes and goes, pages with tables among it.
    fn change_map(&mut self, rng: &mut Rng) {
        let pages = &self.snapshot.memory.pages;
        let gone: Vec<u64> = (0..rng.below(3)).filter_map(|_| pages.keys().nth(rng.below(pages.len() as u64 + 1) as usize).copied()).collect();
        self.map = holes(&self.truth, &gone, self.config.output_bits().min(63) as u8, rng);
        self.live.memory_changed(&View(&self.snapshot.memory), self.map.clone()).unwrap();
        assert!(self.live.sink().model.pieces.values().all(|piece| {
            let last = piece.address + piece.iova.length_minus_one();
            self.map.target(piece.address).is_some_and(|target| target.contains(last))
        }));
    }

    /// The guest's memory, without what the map has not.
    fn memory(&self) -> Memory {
        let mut memory = self.snapshot.memory.clone();
        memory.pages.retain(|page, _| self.map.region(*page).is_some());
        memory
    }

    /// What the naive walk finds, if it comes to an end.
    fn mappings(&self) -> Option<Vec<Mapping>> {
        let (memory, stages) = (self.memory(), [self.config]);
        let naive = Walker::new(&memory, &stages).unwrap().with_budget(1 << 20).walk();
        (!naive.exhausted).then(|| clipped(&naive.runs, &self.map))
    }

    fn synchronise(&mut self) -> Report {
        self.live.synchronise(&View(&self.snapshot.memory)).unwrap()
    }

    /// Tells every word that differs, in any order, as a watcher would.
    fn tell_writes(&mut self, before: &Memory, rng: &mut Rng) -> u64 {
        let after = &self.snapshot.memory;
        let mut writes: Vec<(u64, u64)> = Vec::new();
        for page in before.pages.keys().chain(after.pages.keys()) {
            match (before.pages.get(page), after.pages.get(page)) {
                (Some(old), Some(new)) => {
                    writes.extend((0..512).filter(|word| old[word * 8..][..8] != new[word * 8..][..8]).map(|word| (page + word as u64 * 8, 8)));
                }
                _ => writes.push((*page, 4096)),
            }
        }
        let mut blocked = 0;
        for index in (0..writes.len()).rev() {
            writes.swap(index, rng.below(index as u64 + 1) as usize);
            let (address, length) = writes[index];
            blocked += self.live.table_written(&View(after), Gpa(address), length).unwrap().blocked_count;
        }
        blocked
    }

    /// Tells as one batch of commands where translations differ from those before, and what is `dropped`: by the page, or in larger parts, in any order.
    fn tell_commands(&mut self, before: &[Mapping], after: &[Mapping], dropped: &[Span], rng: &mut Rng) -> u64 {
        let different = before.iter().filter(|mapping| !after.contains(mapping)).chain(after.iter().filter(|mapping| !before.contains(mapping)));
        let mut commands = Vec::new();
        for Mapping { iova, .. } in different {
            let pages = (iova.length_minus_one() >> 12) + 1;
            let step = if pages <= 256 && rng.percent(70) { 1 } else { pages / 16 + 1 + rng.below(pages) };
            let step = step << 12;
            let parts = (iova.first..=iova.last).step_by(usize::try_from(step).unwrap());
            commands.extend(parts.map(|first| range(first, first.saturating_add(step - 1).min(iova.last), false)));
        }
        commands.extend(dropped.iter().map(|iova| range(iova.first, iova.last, false)));
        for index in (1..commands.len()).rev() {
            commands.swap(index, rng.below(index as u64 + 1) as usize);
        }
        self.live.invalidate(&View(&self.snapshot.memory), &commands).unwrap().blocked_count
    }

    /// Where nothing was mapped, and an entry that led there is another one now. Hardware may have kept the old one, which leads to a table that something else can
    /// be in by now, so that a guest says so.
    fn dropped(&mut self, before: &Memory) -> Vec<Span> {
        let bytes = usize::from(self.table.geometry().entry_bytes);
        let mut memory = before.clone();
        memory.pages.retain(|page, _| self.map.region(*page).is_some());
        let mut dropped = Dropped { before, after: &self.snapshot.memory, bytes, spans: Vec::new() };
        // As far as it comes: where it has no end, nothing is compared.
        let _ = self.table.walk(&View(&memory), &self.map, Span::ALL, &Budget::new(Limits { tables: 1 << 16, ..Limits::default() }), &mut dropped);
        dropped.spans
    }

    /// The shadow tells again what it told, all of it and of any span.
    fn check_pieces(&self, what: &str) {
        let told = &self.live.sink().model.pieces;
        let spans =
            told.values().step_by(told.len() / 4 + 1).map(|piece| Span { first: piece.iova.last, last: piece.iova.last.saturating_add(0x12_3456) });
        for span in spans.chain([Span::ALL]) {
            let mut pieces = Vec::new();
            self.live.space().pieces(span, &mut |piece| pieces.push((piece.iova, piece.address)));
            let wanted: Vec<(Span, u64)> =
                told.values().filter(|piece| piece.iova.intersection(span).is_some()).map(|piece| (piece.iova, piece.address)).collect();
            assert!(pieces == wanted, "{what}: {span} is told again: {:x?} and {:x?}", pieces.first(), wanted.first());
        }
    }

    fn check(&mut self, when: &str) {
        let memory = &self.memory();
        let what = format!("{}, {when}", self.what);
        let model = self.live.sink().model.mappings();
        self.check_pieces(&what);
        let stages = [self.config];
        let naive = Walker::new(memory, &stages).unwrap().with_budget(1 << 20).walk();
        // What is blocked now may have been blocked long ago.
        if naive.exhausted || self.live.space().figures().blocked > 0 {
            self.exhausted += 1;
            return;
        }
        // A table that the naive walk takes for empty may be full of faults, which the engine tells one by one.
        let Ok(walked) = walk_within(1 << 16, &mut self.table, &View(memory), &self.map) else {
            self.exhausted += 1;
            return;
        };
        assert_same(&model, &walked, &format!("{what}: what was told, and a walk"));
        let expected = clipped(&naive.runs, &self.map);
        assert_same(&model, &expected, &format!("{what}: what was told, and the naive walk"));

        let host = self.live.sink();
        let lossless = converted(&mut self.table, &View(memory), &self.map, &host.config);
        let walked = host.walked();
        assert_same(&walked, &lossless, &format!("{what}: the host's table, and a conversion"));
        if let Some(config) = configs::reference_config(&host.config) {
            let (memory, stages) = (host.memory(), [config]);
            let naive = Walker::new(&memory, &stages).unwrap().mappings().unwrap();
            assert_same(&walked, &clipped(&naive, &MemoryMap::everything(63)), &format!("{what}: the host's table, and the naive walk of it"));
        }
        self.compared += 1 + walked.len() as u64;
    }
}

pub fn assert_same(one: &[Mapping], other: &[Mapping], what: &str) {
    let index = (0..one.len().max(other.len())).find(|index| one.get(*index) != other.get(*index));
    if let Some(index) = index {
        panic!("{what}: mapping {index}: {:x?} and {:x?}", one.get(index), other.get(index));
    }
}

/// One guest, through some changes.
fn run(format_: Format, seed: u64) -> (u64, u64) {
    let (mut rng, mut maps) = (Rng::new(seed), Rng::new(!seed));
    let mut case = Case::new(format_, seed);
    let words = Words::of(&case.config);
    case.synchronise();
    case.check("at first");
    for round in 0..6 {
        let (before, mapped) = (case.snapshot.memory.clone(), case.mappings());
        let changed = maps.percent(25);
        if changed {
            case.change_map(&mut maps);
            case.check(&format!("round {round}, memory came and went"));
        }
        let when = if rng.percent(30) {
            // Other leaves in tables of the same shape, at other places.
            let leaves = random_leaves(&case.config, &mut rng, Options { clusters: 5, ..Options::default() });
            let built = build(case.config, &leaves, &mut rng, Options::default());
            (case.config, case.snapshot.memory) = (built.config, built.snapshot.memory);
            let plugin = configs::plugin_config(&case.config);
            case.table = Table::open(format(&plugin)).unwrap();
            let way = Way::table(format(&plugin)).with_intercepts(case.intercepts.clone());
            case.live.switch(way, &View(&case.snapshot.memory)).unwrap();
            case.check(&format!("round {round}, roots switched"));
            continue;
        } else {
            mutate(&mut case.snapshot, &mut rng, words)
        };
        let written = rng.percent(50);
        // Memory that came and went is no business of commands.
        if let (Some(mapped), Some(after), true) = (mapped, case.mappings(), !changed && maps.percent(30)) {
            let dropped = case.dropped(&before);
            let blocked = case.tell_commands(&mapped, &after, &dropped, &mut maps);
            if blocked == 0 {
                case.check(&format!("round {round}, {when}, commands told"));
            }
        }
        let blocked = if written { case.tell_writes(&before, &mut rng) } else { case.synchronise().blocked_count };
        case.check(&format!("round {round}, {when}, {}", if written { "writes told" } else { "all invalidated" }));
        if blocked > 0 {
            case.synchronise();
            case.check(&format!("round {round}, {when}, again"));
        }
    }
    // Everything goes.
    case.snapshot.memory.pages.clear();
    case.synchronise();
    assert!(case.live.sink().model.pieces.is_empty() && case.live.sink().walked().is_empty(), "{}: all pages gone", case.what);
    assert_eq!(case.live.space().figures().leaves, 0, "{}", case.what);
    (case.compared, case.exhausted)
}

fn check(formats: &[Format]) {
    let (mut compared, mut exhausted) = (0, 0);
    for format in formats {
        for seed in from()..from() + seeds() {
            let (more, gave_up) = run(*format, seed);
            compared += more;
            exhausted += gave_up;
        }
    }
    println!("{formats:?}: {compared} runs compared, {exhausted} comparisons left out");
    assert!(compared > 20 * seeds(), "{compared}");
}

#[test]
fn arm() {
    check(&[Format::ArmStage1, Format::ArmStage2, Format::V7s]);
}

#[test]
fn intel() {
    check(&[Format::VtdFirst, Format::VtdSecond]);
}

#[test]
fn amd() {
    check(&[Format::AmdV1, Format::AmdV2]);
}

#[test]
fn riscv() {
    check(&[Format::RiscvFirst, Format::RiscvSecond]);
}

#[test]
fn others() {
    check(&[Format::S390, Format::LoongArch, Format::Dart1, Format::Dart2]);
}
