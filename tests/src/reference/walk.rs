//! Following the entries: all mappings by visiting every entry, and one address by a walk of its own.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::snapshot::{Memory, PAGE};
use super::tables::{Entry, Marks, Region, Step, TableConfig, beyond};
use super::{Access, Problem, Run, append, bits, merge};

/// How many entries [`Walker::mappings`] looks at before it gives up.
pub const DEFAULT_BUDGET: u64 = 1 << 23;

/// A request that does not go through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault;

/// What a visit of all entries found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walk {
    /// Sorted maximal runs.
    pub runs: Vec<Run>,
    /// Pages that tables point to and the memory does not hold; what lies behind them is not in `runs`.
    pub unreadable: BTreeSet<u64>,
    /// The budget ran out; `runs` is not complete.
    pub exhausted: bool,
}

/// What a stage is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Purpose {
    /// A request's own read or write.
    Read,
    Write,
    /// An entry of another stage's table, or a structure, is read.
    Fetch,
}

/// What a request leaves in an entry that it used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Marked {
    /// The stage whose entry it is, from 0.
    pub stage: usize,
    /// Where the entry stands in memory.
    pub address: u64,
    /// The entry before.
    pub old: u64,
    /// The entry afterwards.
    pub new: u64,
}

/// An entry that a walk used.
struct Used {
    stage: usize,
    address: u64,
    step: Step,
    entry: u64,
    write: bool,
}

/// The entries that a walk used, in their order, if somebody wants to know.
type Trace = Option<Vec<Used>>;

/// A table on the way.
#[derive(Clone, Copy)]
struct Table {
    address: u64,
    /// What [`TableConfig::decode`] is told.
    half: usize,
    /// The entries that it has, if not all.
    exists: Option<(u64, u64)>,
}

impl Table {
    fn has(&self, index: u64) -> bool {
        self.exists.is_none_or(|(first, last)| first <= index && index <= last)
    }
}

/// What the visit of a stage has left to spend, and what it found.
struct Visit {
    budget: u64,
    walk: Walk,
    /// Tables below which there was nothing, whole: neither a run nor a page that is not there. Many entries may point to one of them, with as little behind each.
    nothing: HashSet<Visited>,
}

/// First IOVA of the region, depth, address, half, entries that exist, access from above: all that what is found depends on.
type Visited = (u64, usize, u64, usize, Option<(u64, u64)>, Access);

enum NoEntry {
    Fault,
    Unreadable(u64),
}

/// A reader of one device's tables: one stage, or two that follow each other.
#[derive(Clone, Debug)]
pub struct Walker<'a> {
    memory: &'a Memory,
    stages: Vec<(TableConfig, Vec<Region>)>,
    budget: u64,
}

impl<'a> Walker<'a> {
    /// A walker of one stage, or of two: then the second translates what the first puts out, and the addresses of the first one's tables.
    ///
    /// # Errors
    /// [`Problem::Illegal`] if settings contradict each other.
    pub fn new(memory: &'a Memory, stages: &[TableConfig]) -> Result<Walker<'a>, Problem> {
        assert!(stages.len() == 1 || stages.len() == 2);
        let mut with_regions = Vec::new();
        for stage in stages {
            with_regions.push((*stage, stage.regions()?));
        }
        Ok(Walker { memory, stages: with_regions, budget: DEFAULT_BUDGET })
    }

    /// The same with another visit budget, in entries.
    pub fn with_budget(mut self, budget: u64) -> Walker<'a> {
        self.budget = budget;
        self
    }

    /// All mappings as sorted maximal runs, with the access of an unprivileged request.
    ///
    /// # Errors
    /// [`Problem::Budget`] if there are too many entries, [`Problem::Unreadable`] if a table lies in a page that the memory does not hold.
    pub fn mappings(&self) -> Result<Vec<Run>, Problem> {
        let walk = self.walk();
        if walk.exhausted {
            return Err(Problem::Budget);
        }
        match walk.unreadable.first() {
            Some(page) => Err(Problem::Unreadable(*page)),
            None => Ok(walk.runs),
        }
    }

    /// All mappings that can be found, whatever the tables look like.
    pub fn walk(&self) -> Walk {
        let mut budget = self.budget;
        let mut walk = self.walk_stage(0, &mut budget);
        if self.stages.len() == 2 {
            let second = self.walk_stage(1, &mut budget);
            walk.runs = compose(&walk.runs, &second.runs);
            walk.unreadable.extend(second.unreadable);
            walk.exhausted |= second.exhausted;
        }
        walk
    }

    /// Where a read or a write at this IOVA goes.
    ///
    /// # Errors
    /// [`Fault`] if it does not go through, for whatever reason.
    pub fn translate(&self, iova: u64, write: bool) -> Result<u64, Fault> {
        self.request(iova, write, &mut None)
    }

    fn request(&self, iova: u64, write: bool, trace: &mut Trace) -> Result<u64, Fault> {
        let mut address = iova;
        for stage in 0..self.stages.len() {
            address = self.through(stage, address, if write { Purpose::Write } else { Purpose::Read }, trace).map_err(|_| Fault)?;
        }
        Ok(address)
    }

    /// What hardware writes into entries when a read or a write at this IOVA goes through, from the root down: an entry before what it leads to. Where another stage
    /// translates a stage's tables, an entry there is used by every read of an entry, and by a mark as by a write.
    ///
    /// # Errors
    /// [`Fault`] if it does not go through. What that leaves behind is not said.
    pub fn marks(&self, iova: u64, write: bool) -> Result<Vec<Marked>, Fault> {
        let mut trace = Some(Vec::new());
        self.request(iova, write, &mut trace)?;
        let mut now: BTreeMap<u64, u64> = BTreeMap::new();
        let mut marked = Vec::new();
        for used in trace.into_iter().flatten() {
            let old = *now.get(&used.address).unwrap_or(&used.entry);
            let new = self.stages[used.stage].0.marked(used.step, old, used.write);
            if new != old {
                marked.push(Marked { stage: used.stage, address: used.address, old, new });
            }
            now.insert(used.address, new);
        }
        Ok(marked)
    }

    /// Where the only stage has a structure that is read through it.
    ///
    /// # Errors
    /// [`Fault`] if it cannot be read there.
    pub fn fetch(&self, address: u64) -> Result<u64, Fault> {
        self.through(0, address, Purpose::Fetch, &mut None).map_err(|_| Fault)
    }

    /// One stage's answer for one address.
    fn through(&self, stage: usize, input: u64, purpose: Purpose, trace: &mut Trace) -> Result<u64, NoEntry> {
        let (config, regions) = &self.stages[stage];
        let input = config.effective(input);
        for region in regions {
            if input < region.first || !region.contains(input - region.first) {
                continue;
            }
            let position = region.table_first + (input - region.first);
            return self.descend(
                stage,
                region,
                position,
                purpose,
                0,
                Table { address: region.root, half: region.half, exists: None },
                config.granted(),
                trace,
            );
        }
        Err(NoEntry::Fault)
    }

    /// What the entries from this table on say about one place in a region.
    #[allow(clippy::too_many_arguments)]
    fn descend(
        &self,
        stage: usize,
        region: &Region,
        position: u64,
        purpose: Purpose,
        depth: usize,
        table: Table,
        allowed: Access,
        trace: &mut Trace,
    ) -> Result<u64, NoEntry> {
        let (config, step) = (&self.stages[stage].0, region.steps[depth]);
        let index = (position >> step.shift) % step.entries;
        if !table.has(index) {
            return Err(NoEntry::Fault);
        }
        let at = table.address + index * config.entry_bytes();
        let (physical, entry) = self.read(stage, at, trace)?;
        let decoded = config.decode(table.half, step, entry);
        let marks = config.missing_marks(step, entry);
        let marked = marks == Marks::Any || marks == Marks::ByWrites && purpose == Purpose::Write;
        if decoded != Entry::Fault && marked && !self.can_mark(stage, at, trace) {
            return Err(NoEntry::Fault);
        }
        if let Some(used) = trace {
            used.push(Used { stage, address: physical, step, entry, write: purpose == Purpose::Write });
        }
        match decoded {
            Entry::Fault => Err(NoEntry::Fault),
            Entry::Table { address, limit, skip, exists, half } => {
                let next = region.steps[depth + 1 + skip];
                // The bits of levels that are left out must be zero.
                if bits(position, step.shift - 1, 0) >> next.shift >= next.entries {
                    return Err(NoEntry::Fault);
                }
                self.descend(stage, region, position, purpose, depth + 1 + skip, Table { address, half, exists }, allowed.and(limit), trace)
            }
            Entry::Leaf { address, access, size, reach } => {
                let offset = bits(position, size.unwrap_or(step.shift) - 1, 0);
                if reach.is_some_and(|(first, last)| offset < first || last < offset) {
                    return Err(NoEntry::Fault);
                }
                if !allowed.and(access).allows(purpose == Purpose::Write) || purpose == Purpose::Fetch && config.keeps_tables_out(entry) {
                    return Err(NoEntry::Fault);
                }
                let address = address + offset;
                if beyond(address, config.output_bits()) { Err(NoEntry::Fault) } else { Ok(address) }
            }
        }
    }

    /// An entry of a stage's table, and where it stands in memory. If another stage follows, it translates the table's address.
    fn read(&self, stage: usize, address: u64, trace: &mut Trace) -> Result<(u64, u64), NoEntry> {
        let physical = if stage + 1 < self.stages.len() { self.through(stage + 1, address, Purpose::Fetch, trace)? } else { address };
        let config = &self.stages[stage].0;
        let entry = match config.entry_bytes() {
            4 => self.memory.read4(physical, config.big_endian()),
            _ => self.memory.read(physical, config.big_endian()),
        };
        entry.map(|entry| (physical, entry)).map_err(|_| NoEntry::Unreadable(physical - physical % PAGE))
    }

    /// Whether the entry at an address of this stage's tables can be written.
    fn can_mark(&self, stage: usize, address: u64, trace: &mut Trace) -> bool {
        stage + 1 == self.stages.len() || self.through(stage + 1, address, Purpose::Write, trace).is_ok()
    }

    fn walk_stage(&self, stage: usize, budget: &mut u64) -> Walk {
        let mut visit = Visit { budget: *budget, walk: Walk::default(), nothing: HashSet::new() };
        for region in &self.stages[stage].1 {
            let root = Table { address: region.root, half: region.half, exists: None };
            self.visit(stage, region, 0, root, 0, self.stages[stage].0.granted(), &mut visit);
        }
        *budget = visit.budget;
        visit.walk.runs = merge(visit.walk.runs);
        visit.walk
    }

    /// Every entry of one table, and of those that it points to. `start` is where the table begins in what the first table could cover. False: all of the table
    /// was looked at, and there is nothing in it or below.
    #[allow(clippy::too_many_arguments)]
    fn visit(&self, stage: usize, region: &Region, depth: usize, table: Table, start: u64, allowed: Access, visit: &mut Visit) -> bool {
        let key = (region.first, depth, table.address, table.half, table.exists, allowed);
        if visit.nothing.contains(&key) {
            return false;
        }
        let (config, step) = (&self.stages[stage].0, region.steps[depth]);
        let mut anything = false;
        for index in (0..step.entries).filter(|index| table.has(*index)) {
            let position = start + (index << step.shift);
            // The part of the region that this entry covers, as offsets.
            let end = position + ((1 << step.shift) - 1);
            let region_end = region.table_first + region.length();
            if end < region.table_first || position > region_end {
                anything = true;
                continue;
            }
            if visit.budget == 0 {
                visit.walk.exhausted = true;
                return true;
            }
            visit.budget -= 1;
            let at = table.address + index * config.entry_bytes();
            let entry = match self.read(stage, at, &mut None) {
                Ok((_, entry)) => entry,
                Err(NoEntry::Fault) => continue,
                Err(NoEntry::Unreadable(page)) => {
                    visit.walk.unreadable.insert(page);
                    anything = true;
                    continue;
                }
            };
            let decoded = config.decode(table.half, step, entry);
            // Most entries lack no mark, and need no second stage for it.
            let marks = if decoded == Entry::Fault { Marks::None } else { config.missing_marks(step, entry) };
            let refused = marks != Marks::None && !self.can_mark(stage, at, &mut None);
            match decoded {
                Entry::Fault => {}
                _ if refused && marks == Marks::Any => {}
                Entry::Table { address, limit, skip, exists, half } => {
                    // Without levels between, what the next table covers is the beginning of this slot: the bits of the levels left out are zero.
                    anything |= self.visit(stage, region, depth + 1 + skip, Table { address, half, exists }, position, allowed.and(limit), visit);
                }
                Entry::Leaf { address, access, size, reach } => {
                    anything = true;
                    let mut access = allowed.and(access);
                    access.write &= !refused;
                    // The part of the leaf under this slot, of that the part inside the region, and of that what can be reached.
                    let offset = position % (1 << size.unwrap_or(step.shift));
                    let address = address + offset;
                    let (mut first, mut last) = (position.max(region.table_first), end.min(region_end));
                    if let Some((front, back)) = reach {
                        let begin = position - offset;
                        (first, last) = (first.max(begin + front), last.min(begin + back));
                    }
                    if first > last {
                        continue;
                    }
                    if access != Access::NONE && !beyond(address, config.output_bits()) {
                        let iova = region.first + (first - region.table_first);
                        append(&mut visit.walk.runs, Run { iova, address: address + (first - position), size: last - first + 1, access });
                    }
                }
            }
        }
        if !anything {
            visit.nothing.insert(key);
        }
        anything
    }
}

/// Two stages after each other: the parts of each first-stage run that the second stage maps.
fn compose(first: &[Run], second: &[Run]) -> Vec<Run> {
    let mut runs = Vec::new();
    for run in first {
        for other in second {
            let begin = run.address.max(other.iova);
            let last = (run.address + (run.size - 1)).min(other.iova + (other.size - 1));
            let access = run.access.and(other.access);
            if begin <= last && access != Access::NONE {
                runs.push(Run {
                    iova: run.iova + (begin - run.address),
                    address: other.address + (begin - other.iova),
                    size: last - begin + 1,
                    access,
                });
            }
        }
    }
    merge(runs)
}
