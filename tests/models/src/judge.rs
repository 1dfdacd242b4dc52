//! Asking a model about a whole address space, and comparing with the truth.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::env;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::tables::{Entry, Region, TableConfig};

use crate::known::KnownError;
use crate::production::{Answer, Production};
use crate::spaces::{INTERRUPTS, Space};
use crate::{Access, Board, Memory, Model, Outcome, Probe};

/// IOVAs of entries that are not zero and must not translate, in tables of the reference's formats: each a good question. Only to find them is an entry decoded.
pub fn rejected(memory: &Memory, config: &TableConfig) -> Vec<u64> {
    fn visit(memory: &Memory, config: &TableConfig, region: &Region, depth: usize, table: u64, start: u64, found: &mut Vec<u64>) {
        let step = region.steps[depth];
        for index in 0..step.entries {
            let position = start + (index << step.shift);
            let Some(offset) = position.checked_sub(region.table_first).filter(|offset| offset >> region.bits == 0) else { continue };
            let Ok(entry) = memory.read(table + index * 8, config.big_endian()) else { continue };
            match config.decode(region.half, step, entry) {
                Entry::Fault if entry != 0 => found.push(region.first + offset),
                Entry::Table { address, .. } => visit(memory, config, region, depth + 1, address, position, found),
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    for region in config.regions().unwrap_or_default() {
        visit(memory, config, &region, 0, region.root, 0, &mut found);
    }
    found
}

/// Adds IOVAs near the beginning of what some of these entries cover.
pub fn add_rejected(iovas: &mut Vec<u64>, rejected: &[u64], rng: &mut Rng, count: usize) {
    if !rejected.is_empty() {
        iovas.extend((0..count).map(|_| rng.pick(rejected) + rng.below(512) * 8));
    }
}

/// What a comparison did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// Requests that reached the right address.
    pub reached: u64,
    /// Requests that failed as they should.
    pub refused: u64,
    /// Among them, those without a fault record.
    pub unrecorded: u64,
    /// Requests at addresses of interrupts, which reached no memory. The models record nothing of them.
    pub interrupts: u64,
    /// Requests that were not made: their address is no memory, or holds a table; or the model is known to be wrong.
    pub unasked: u64,
    /// Among them, those about which the model is known to be wrong.
    pub excused: u64,
    /// Time in DMA and what belongs to it.
    pub time: Duration,
}

impl Tally {
    /// Adds another one.
    pub fn add(&mut self, other: Tally) {
        self.reached += other.reached;
        self.refused += other.refused;
        self.unrecorded += other.unrecorded;
        self.interrupts += other.interrupts;
        self.unasked += other.unasked;
        self.excused += other.excused;
        self.time += other.time;
    }

    /// Requests in a second.
    pub fn rate(&self) -> f64 {
        (self.reached + self.refused) as f64 / self.time.as_secs_f64().max(1e-9)
    }
}

/// The address that a request should reach, by runs that are sorted.
pub fn lookup(runs: &[Run], iova: u64, write: bool) -> Option<u64> {
    let index = runs.partition_point(|run| run.iova <= iova);
    let run = runs.get(index.checked_sub(1)?)?;
    (iova - run.iova < run.size && run.access.allows(write)).then(|| run.address + (iova - run.iova))
}

/// IOVAs that are worth asking about: both ends of runs from either side, inside at random, and anywhere. Multiples of eight.
pub fn interesting(runs: &[Run], rng: &mut Rng, count: usize) -> Vec<u64> {
    let mut iovas = Vec::with_capacity(count);
    for _ in 0..count {
        if runs.is_empty() || rng.percent(4) {
            let wide = rng.below(64) as u32;
            iovas.push(rng.number() >> wide);
            continue;
        }
        let run = rng.pick(runs);
        let last = run.iova + (run.size - 1);
        iovas.push(match rng.below(10) {
            0 | 1 => run.iova,
            2 | 3 => last,
            4 => run.iova.wrapping_sub(1),
            5 => last.wrapping_add(1),
            // The same place in a neighbouring table of any level.
            6 => run.iova ^ 1 << (12 + rng.below(52)),
            _ => run.iova + rng.below(run.size),
        });
    }
    for iova in &mut iovas {
        *iova -= *iova % 8;
    }
    iovas
}

/// Asks the model about every IOVA, reading and writing, and compares with `expect`. `ask` can exclude requests.
///
/// # Errors
/// Lists the first disagreements.
pub fn compare(model: &mut dyn Model, iovas: &[u64], expect: impl Fn(u64, bool) -> Option<u64>, ask: impl Fn(u64, bool) -> bool) -> Result<Tally> {
    let mut tally = Tally::default();
    let mut probes = Vec::new();
    let is_q35 = model.machine().board() == Board::Q35;
    for iova in iovas {
        for write in [false, true] {
            let expected = expect(*iova, write);
            let allowed = expected.is_none_or(|address| model.machine().is_target(address));
            if !allowed || !ask(*iova, write) {
                tally.unasked += 1;
                continue;
            }
            if let Some(address) = expected {
                model.tag_page(address)?;
            }
            probes.push(Probe { iova: *iova, write, expected });
        }
    }
    let start = Instant::now();
    let outcomes = model.dma_many(&probes)?;
    tally.time = start.elapsed();
    let mut wrong = String::new();
    let mut count = 0;
    for (probe, outcome) in probes.iter().zip(&outcomes) {
        match (probe.expected, outcome) {
            (Some(address), Outcome::Reached(reached)) if address == *reached => tally.reached += 1,
            (None, Outcome::Fault(record)) if record.iova >> 12 == probe.iova >> 12 => tally.refused += 1,
            (None, Outcome::Nothing) if is_q35 && INTERRUPTS.contains(&probe.iova) => tally.interrupts += 1,
            // Weaker than a record: a read of a page that nobody wrote looks the same.
            (None, Outcome::Nothing) => {
                tally.refused += 1;
                tally.unrecorded += 1;
            }
            _ => {
                count += 1;
                if count <= 10 {
                    let kind = if probe.write { "write" } else { "read" };
                    let expected = probe.expected.map_or("a fault".to_string(), |address| format!("{address:#x}"));
                    writeln!(wrong, "  {kind} at {:#x}: expected {expected}, the model says {outcome:x?}", probe.iova)?;
                }
            }
        }
    }
    if count > 0 {
        let messages = model.machine().qtest.messages();
        bail!("{}: {count} of {} requests differ:\n{wrong}{}", model.name(), probes.len(), messages.chars().take(2000).collect::<String>());
    }
    Ok(tally)
}

/// Judges one address space: what the production engine finds in the model's registers and memory, what the builder put there, and what the model does.
///
/// # Errors
/// Lists disagreements.
pub fn judge(model: &mut dyn Model, production: &Production, space: &Space, iovas: &[u64]) -> Result<Tally> {
    model.write_memory(&space.memory)?;
    model.set_table(space.tables)?;
    let snapshot = production.load(&model.snapshot()?)?;
    let mut view = production.view(&snapshot)?;
    if view.formats() != space.formats {
        bail!("the engine finds {:x?} instead of {:?}", view.configs, space.formats);
    }
    let (mut wrong, mut count) = (String::new(), 0);
    for (iova, write) in iovas.iter().flat_map(|iova| [(*iova, false), (*iova, true)]) {
        let answer = view.ask(iova, write)?;
        let truth = space.lookup(iova, write);
        let in_memory = truth.is_some_and(|address| model.machine().is_memory(address));
        if answer.address() != truth || matches!(answer, Answer::Reaches(_)) != in_memory {
            count += 1;
            if count <= 10 {
                writeln!(wrong, "  iova {iova:#x}, write {write}: the builder says {truth:x?}, the engine {answer:x?}")?;
            }
        }
    }
    if count > 0 {
        bail!(
            "the engine is wrong about {count} requests:
{wrong}{:x?}",
            view.configs
        );
    }
    // What is not in memory is not asked: `compare` knows.
    tag_interrupts(model, &space.beneath, iovas)?;
    compare_with_excuses(model, iovas, |iova, write| space.lookup(iova, write), |iova, write| space.excuse(iova, write))
}

/// Tags what the tables say of addresses of interrupts, so that a request there is seen if it comes to that.
///
/// # Errors
/// QEMU is lost.
pub fn tag_interrupts(model: &mut dyn Model, beneath: &[Run], iovas: &[u64]) -> Result<()> {
    for iova in iovas.iter().filter(|iova| INTERRUPTS.contains(iova)) {
        if let Some(address) = lookup(beneath, *iova, false).or_else(|| lookup(beneath, *iova, true)) {
            model.tag_page(address)?;
        }
    }
    Ok(())
}

/// The same as [`compare`], with known errors of the model instead of questions that are not asked.
///
/// # Errors
/// As [`compare`].
pub fn compare_with_excuses(
    model: &mut dyn Model,
    iovas: &[u64],
    expect: impl Fn(u64, bool) -> Option<u64>,
    excuse: impl Fn(u64, bool) -> Option<KnownError>,
) -> Result<Tally> {
    let excused = Cell::new(0);
    let ask = |iova: u64, write: bool| {
        let known = excuse(iova, write).is_some();
        excused.set(excused.get() + u64::from(known));
        !known
    };
    let tally = compare(model, iovas, expect, ask)?;
    Ok(Tally { excused: excused.get(), ..tally })
}

/// IOVAs to ask about in an address space.
pub fn questions(space: &Space, rng: &mut Rng, count: usize) -> Vec<u64> {
    let mut iovas = interesting(&space.truth, rng, count);
    add_rejected(&mut iovas, &space.decoys, rng, count / 3);
    iovas.extend(&space.corners);
    if space.has_tags() {
        let tagged: Vec<u64> = iovas.iter().step_by(8).map(|iova| iova & !(0xff << 56) | rng.below(256) << 56).collect();
        iovas.extend(tagged);
    }
    iovas
}

/// Rounds of [`judge`] with address spaces from the seeds of the environment.
///
/// # Panics
/// If anybody disagrees.
pub fn rounds(model: &mut dyn Model, production: &Production, rounds: u64, count: usize, mut space: impl FnMut(&mut Rng) -> Space) {
    let mut total = Tally::default();
    for seed in seeds(rounds) {
        let mut rng = Rng::new(seed);
        let space = space(&mut rng);
        let iovas = questions(&space, &mut rng, count);
        match judge(model, production, &space, &iovas) {
            Ok(tally) => total.add(tally),
            Err(error) => panic!("STAGECRAFT_SEED={seed} STAGECRAFT_ROUNDS=1: {:#x?}: {error:#}", space.tables),
        }
    }
    assert!(total.reached > 0 && total.refused > 0 && (total.unrecorded == 0 || !model.records()), "{total:?}");
    assert!(total.interrupts > 0 || model.machine().board() != Board::Q35, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

/// A number from the environment, or a default.
///
/// # Panics
/// If it is not a number.
fn setting(name: &str, default: u64) -> u64 {
    match env::var(name) {
        Err(_) => default,
        Ok(text) => {
            let parsed = match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16).ok(),
                None => text.parse().ok(),
            };
            parsed.unwrap_or_else(|| panic!("{name}={text} is not a number"))
        }
    }
}

/// The seeds of a test's rounds: `STAGECRAFT_ROUNDS` of them, from `STAGECRAFT_SEED` on. They are printed.
pub fn seeds(default_rounds: u64) -> impl Iterator<Item = u64> {
    let first = setting("STAGECRAFT_SEED", 1);
    let rounds = setting("STAGECRAFT_ROUNDS", default_rounds);
    println!("STAGECRAFT_SEED={first} STAGECRAFT_ROUNDS={rounds}");
    (0..rounds).map(move |round| first.wrapping_add(round))
}

/// A second stage for a first one: leaves that move each page of `memory` (the first stage's tables, and what else it needs), and that give some of the pages that
/// the first stage maps a place and an access. All are pages of `granule` bytes; `block` bytes of the first stage's tables, at least a granule, stay together.
///
/// Returns the leaves, and the memory as it is moved. Places are between 8 and 64 GiB.
pub fn second_stage(memory: &Memory, truth: &[Run], granule: u64, block: u64, accesses: &[Access], rng: &mut Rng) -> (Vec<Run>, Memory) {
    let mut leaves: BTreeMap<u64, Run> = BTreeMap::new();
    let mut moved = Memory::default();
    let mut next = 0x2_0000_0000;
    for (page, content) in &memory.pages {
        let start = page - page % block;
        if !leaves.contains_key(&start) {
            next += block * (1 + rng.below(5));
            for offset in (0..block).step_by(granule as usize) {
                leaves.insert(start + offset, Run { iova: start + offset, address: next + offset, size: granule, access: Access::RW });
            }
        }
        moved.pages.insert(leaves[&start].address + page % block, content.clone());
    }
    // Most of what the first stage maps keeps together in 64 KiB, so that there is something for larger pages; the rest is scattered.
    let mut chunks: BTreeMap<u64, Option<(u64, Access)>> = BTreeMap::new();
    let chunk_size = granule.max(1 << 16);
    let place = |size: u64, rng: &mut Rng| 0x4_0000_0000 + rng.below(0xc_0000_0000 / size) * size;
    for run in truth {
        let count = run.size.div_ceil(granule);
        for index in (0..count.min(20)).chain([count - 1]) {
            let block = run.address - run.address % granule + index * granule;
            let start = block - block % chunk_size;
            let chunk = *chunks.entry(start).or_insert_with(|| rng.percent(60).then(|| (place(chunk_size, rng), rng.pick(accesses))));
            let (address, access) = match chunk {
                Some((address, access)) => (address + (block - start), access),
                None if rng.percent(85) => (place(granule, rng), rng.pick(accesses)),
                None => continue,
            };
            leaves.entry(block).or_insert(Run { iova: block, address, size: granule, access });
        }
    }
    (leaves.into_values().collect(), moved)
}
