//! The walk: from the roots down, every entry read once, all work charged to a budget.
//!
//! A walk visits the IOVAs of a span in ascending order and tells a [`Visitor`] what is there. Runs of equal leaves are handed over as slices, so that
//! what follows can work at the speed of memory.

mod rows;

use std::fmt;
use std::ops::Range;

use crate::memory::{Budget, EntryLayout, EntryMemory, Exhausted, MemoryMap, Nearby, PAGE};
use crate::table::empty::{Empties, TableKey};
use crate::table::format::{FaultKind, Finding, Format, FormatError, Meaning, Missing};
use crate::table::geometry::{AddressField, Geometry, Nonsense, Root};
use crate::table::lanes::{Pattern, Scanned, all_in_place_within, all_within, repeated, run_length, scan};
use crate::table::leaves::{Kinds, Piece, Run};
use crate::table::passage::{ALL, FEWEST, FIRST, Misses, Passing, SECOND, START, Usual};
use crate::table::recode::{Expected, Judged};
use crate::table::remember::{Judge, JudgeError, LevelPlan, Plan, Remembered};
use crate::table::visit::{Cause, FaultAt, Step, Visitor};
use crate::table::walk::rows::Pointers;
use crate::{Attributes, Gpa, Iova, Span};

/// A table in memory, with the format that explains it and what that format said so far.
#[derive(Debug)]
pub struct Table {
    plan: Plan,
    judge: Judge,
    scratch: Scratch,
}

/// Memory that walks use again: one buffer per level, the path, and what is remembered of a walk.
#[derive(Default)]
struct Scratch {
    buffers: Vec<Box<Buffer>>,
    path: Vec<Step>,
    empties: Empties,
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scratch")
    }
}

/// Entries that are read at once: a page of the smallest entries.
const BUFFER: usize = (PAGE / 4) as usize;

/// Begins at a cache line, for wide registers.
#[repr(align(64))]
struct Buffer([u64; BUFFER]);

/// A table cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The format failed.
    #[error("the format failed: {0}")]
    Format(FormatError),
    /// The format describes a table that cannot be.
    #[error(transparent)]
    Nonsense(#[from] Nonsense),
}

/// A walk ended early.
#[derive(Debug, thiserror::Error)]
pub enum WalkError {
    /// The budget is spent.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// The format failed.
    #[error("the format failed: {0}")]
    Format(FormatError),
    /// The format says that a table is followed by one that cannot follow.
    #[error(transparent)]
    Nonsense(#[from] Nonsense),
    /// The visitor has seen enough.
    #[error("stopped by the visitor")]
    Stopped,
}

impl From<JudgeError> for WalkError {
    fn from(error: JudgeError) -> Self {
        match error {
            JudgeError::Exhausted(error) => Self::Exhausted(error),
            JudgeError::Format(error) => Self::Format(error),
        }
    }
}

impl Table {
    /// A table whose geometry and entries `format` explains.
    ///
    /// # Errors
    /// The format failed, or describes a table that cannot be.
    pub fn open(mut format: Box<dyn Format>) -> Result<Self, OpenError> {
        let plan = Plan::new(format.geometry().map_err(OpenError::Format)?)?;
        let judge = Judge::new(format, plan.levels.len());
        Ok(Self { plan, judge, scratch: Scratch::default() })
    }

    /// The table's geometry.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.plan.geometry
    }

    /// How often the format was asked anything since the table was opened, the geometry left out.
    #[must_use]
    pub fn questions(&self) -> u64 {
        self.judge.asked()
    }

    /// All that the format finds wrong with an entry, worst first.
    ///
    /// # Errors
    /// The format failed.
    pub fn explain(&mut self, step: &Step) -> Result<Vec<Finding>, FormatError> {
        let Some(entry) = step.entry else { return Ok(Vec::new()) };
        let Some(level) = self.plan.levels.get(usize::from(step.level)) else { return Ok(Vec::new()) };
        let pattern = entry & !level.field(level.shape_of(entry)).entry_mask;
        self.judge.explain(step.level, step.inherited, pattern, entry)
    }

    /// How many bytes an entry maps, as a power of two, which may be more than its slot; none if it is no leaf.
    ///
    /// # Errors
    /// The format failed.
    pub fn leaf_size(&mut self, step: &Step) -> Result<Option<u8>, FormatError> {
        let Some(entry) = step.entry else { return Ok(None) };
        let Some(level) = self.plan.levels.get(usize::from(step.level)) else { return Ok(None) };
        let pattern = entry & !level.field(level.shape_of(entry)).entry_mask;
        self.judge.leaf_size(step.level, step.inherited, pattern, entry)
    }

    /// The root that serves `iova`, and the IOVA in the form that people read.
    #[must_use]
    pub fn root(&self, iova: Iova) -> Option<(usize, Iova)> {
        self.plan.geometry.roots.iter().enumerate().find_map(|(index, root)| {
            let canonical = iova.0 & !root.ignored | root.first & root.ignored;
            (root.first..=root.last).contains(&canonical).then_some((index, Iova(canonical)))
        })
    }

    /// Tells `visitor` what is mapped in `span`, in ascending order.
    ///
    /// # Errors
    /// The budget is spent, the format failed, or the visitor stopped the walk.
    pub fn walk<M: EntryMemory + ?Sized, V: Visitor>(
        &mut self,
        memory: &M,
        map: &MemoryMap,
        span: Span,
        budget: &Budget,
        visitor: &mut V,
    ) -> Result<(), WalkError> {
        self.walk_stage(1, memory, map, span, budget, visitor)
    }

    pub(crate) fn walk_stage<M: EntryMemory + ?Sized, V: Visitor>(
        &mut self,
        stage: u8,
        memory: &M,
        map: &MemoryMap,
        span: Span,
        budget: &Budget,
        visitor: &mut V,
    ) -> Result<(), WalkError> {
        let geometry = &self.plan.geometry;
        let output = Span::of_log2(0, geometry.output_bits);
        let layout = EntryLayout { bytes: geometry.entry_bytes, order: geometry.order };
        let mut walker = Walker {
            plan: &self.plan,
            judge: &mut self.judge,
            memory,
            map,
            output,
            layout,
            budget,
            visitor,
            stage,
            buffers: &mut self.scratch.buffers,
            path: &mut self.scratch.path,
            empties: &mut self.scratch.empties,
            told: 0,
            last_read: None,
            usual: None,
            misses: Misses::default(),
            announced: false,
        };
        walker.path.clear();
        walker.empties.clear();
        let mut next = Some(span.first);
        for root in &geometry.roots {
            let Some(part) = span.intersection(Span { first: root.first, last: root.last }) else { continue };
            if let Some(first) = next.filter(|first| *first < part.first) {
                walker.visitor.absent(Span { first, last: part.first - 1 }, &[])?;
            }
            walker.root(root, part)?;
            next = part.last.checked_add(1);
        }
        match next {
            Some(first) if first <= span.last => walker.visitor.absent(Span { first, last: span.last }, &[]),
            _ => Ok(()),
        }
    }
}

/// A table that is being walked: where it is and what is known about it.
#[derive(Clone, Copy)]
struct Place {
    level: u8,
    table: u64,
    /// IOVA of entry 0.
    base: u64,
    inherited: u64,
    /// The tables that are probably walked after this one.
    ahead: [u64; 2],
}

/// Where no table is.
const NOWHERE: u64 = u64::MAX;

/// Where the last entries were read from.
#[derive(Clone, Copy)]
struct LastRead {
    address: u64,
    region: Span,
    nearby: Nearby,
}

impl LastRead {
    /// Tells the processor that a part of the `length` bytes at `ahead` will be read soon, if they are near these; as many at `before` are read before.
    ///
    /// How a page goes on, and that the next one in memory follows, the processor sees by itself: it is told of the beginning, and of that of the one after it. A page
    /// that is somewhere else is asked for whole: the first part before the last page but one is done with, the second before the last is read, and the third before
    /// that is looked at. All at once would have to wait.
    #[inline(always)]
    fn expect(&self, (before, ahead): (u64, u64), length: u64, part: Range<u64>) {
        // No table begins where one would end that begins nowhere.
        if ahead == NOWHERE || !self.region.contains(ahead) {
            return;
        }
        let place = self.nearby.at(ahead.wrapping_sub(self.address));
        if before.wrapping_add(length) != ahead {
            let (first, next) = (length / ALL * part.start, length / ALL * part.end);
            place.expect_later(first, next - first);
        } else if part.end == ALL {
            place.expect(0, START.min(length));
            place.expect_later(length, START.min(length));
        }
    }
}

/// What became of a table that an entry points to.
enum Found {
    /// The visitor was told what there is.
    Told,
    /// It was walked before, and there was nothing. The visitor was not told.
    Nothing,
}

/// Where leaves that are alike begin, and what the first of them is.
#[derive(Clone, Copy)]
struct Leaves<'a> {
    /// Index of the first slot.
    index: u64,
    iova: u64,
    place: Place,
    known: &'a Remembered,
    attributes: Attributes,
}

struct Walker<'a, M: ?Sized, V> {
    plan: &'a Plan,
    judge: &'a mut Judge,
    memory: &'a M,
    map: &'a MemoryMap,
    output: Span,
    layout: EntryLayout,
    budget: &'a Budget,
    visitor: &'a mut V,
    stage: u8,
    buffers: &'a mut Vec<Box<Buffer>>,
    path: &'a mut Vec<Step>,
    empties: &'a mut Empties,
    /// Runs of leaves, leaves and faults that the visitor was told of, if nothing else: a table with nothing in it leaves this as it was.
    told: u64,
    last_read: Option<LastRead>,
    /// What full tables were like lately.
    usual: Option<Usual>,
    misses: Misses,
    /// The visitor was told that entries are about to be read, and they were not.
    announced: bool,
}

impl<'a, M: EntryMemory + ?Sized, V: Visitor> Walker<'a, M, V> {
    fn root(&mut self, root: &Root, span: Span) -> Result<(), WalkError> {
        let level = &self.plan.levels[usize::from(root.level)];
        let top = u32::from(level.index_lsb + level.index_bits);
        let base = root.first & u64::MAX.checked_shl(top).unwrap_or(0);
        self.table(Place { level: root.level, table: root.address, base, inherited: root.inherited, ahead: [NOWHERE; 2] }, span, (0, u64::MAX))
    }

    /// Walks the part of a table that lies in `span`, of which the entries `exists` exist.
    fn table(&mut self, place: Place, span: Span, exists: (u64, u64)) -> Result<(), WalkError> {
        charge_table(self.budget, self.stage)?;
        let level = &self.plan.levels[usize::from(place.level)];
        let lsb = level.index_lsb;
        let (wanted_first, wanted_last) = ((span.first - place.base) >> lsb, (span.last - place.base) >> lsb);
        let (first, last) = (wanted_first.max(exists.0), wanted_last.min(exists.1).min(level.entries() - 1));
        self.path.push(Step {
            level: place.level,
            number: level.number,
            table: Gpa(place.table),
            index: first,
            entry: None,
            inherited: place.inherited,
        });
        if first > last {
            self.visitor.absent(span, self.path)?;
            self.path.pop();
            return Ok(());
        }
        if wanted_first < first {
            self.visitor.absent(Span { first: span.first, last: place.base + (first << lsb) - 1 }, self.path)?;
        }
        let mut buffer = self.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])));
        let bytes = u64::from(self.layout.bytes);
        let mut index = first;
        while index <= last {
            // `table` is aligned to the entry size, so a page holds whole entries. A table at the end of all addresses may be longer than what is left.
            let Some(address) = place.table.checked_add(index * bytes) else {
                self.set_step(index, None);
                let rest = Span {
                    first: span.first.max(place.base + (index << lsb)),
                    last: span.last.min(Span::of_log2(place.base + (last << lsb), lsb).last),
                };
                self.fault(Cause::Entry(FaultKind::AddressSize), rest, Some(place.table))?;
                break;
            };
            let count = ((PAGE - address % PAGE) >> bytes.trailing_zeros()).min(last - index + 1);
            let entries = &mut buffer.0[..count as usize];
            let here = Span {
                first: span.first.max(place.base + (index << lsb)),
                last: span.last.min(Span::of_log2(place.base + ((index + count - 1) << lsb), lsb).last),
            };
            self.announce();
            let more = index + count <= last;
            let length = count * bytes;
            let [next, second] = if more { [address.wrapping_add(length), NOWHERE] } else { place.ahead };
            self.expect((address, next), length, FIRST..SECOND);
            let read = self.read_passing((place, index), address, entries, here);
            self.after_reading((place, index), address, entries, here, read, [next, second])?;
            index += count;
        }
        self.buffers.push(buffer);
        if last < wanted_last {
            self.set_step(last, None);
            self.visitor.absent(Span { first: place.base + ((last + 1) << lsb), last: span.last }, self.path)?;
        }
        self.path.pop();
        Ok(())
    }

    /// Tells the visitor that entries are about to be read, once.
    #[inline(always)]
    fn announce(&mut self) {
        if !std::mem::take(&mut self.announced) {
            self.visitor.table();
        }
    }

    /// Goes on with entries of a table that were read from `address`, or could not be.
    fn after_reading(
        &mut self,
        (place, index): (Place, u64),
        address: u64,
        entries: &[u64],
        here: Span,
        read: Result<Option<Judged>, Cause>,
        [next, second]: [u64; 2],
    ) -> Result<(), WalkError> {
        let passed = match read {
            Ok(passed) => passed,
            Err(cause) => {
                self.set_step(index, None);
                return self.fault(cause, here, Some(address));
            }
        };
        let (length, lsb) = (entries.len() as u64 * u64::from(self.layout.bytes), self.plan.levels[usize::from(place.level)].index_lsb);
        self.expect((address, next), length, SECOND..ALL);
        let told = self.pass(place, index, entries, here, passed)?;
        self.expect((next, second), length, 0..FIRST);
        if told < entries.len() {
            let next = index + told as u64;
            let rest = Span { first: here.first.max(place.base + (next << lsb)), ..here };
            self.entries(place, next, &entries[told..], rest)?;
        }
        Ok(())
    }

    /// Entries as if they were like the last, if they are all that there are at these IOVAs.
    #[inline(always)]
    fn usual_run<'e>(&self, usual: &Usual, (place, index): (Place, u64), entries: &'e [u64], span: Span) -> Option<Run<'e>>
    where
        'a: 'e,
    {
        let plan: &'a Plan = self.plan;
        let level = &plan.levels[usize::from(place.level)];
        let size_log2 = level.index_lsb;
        let first = place.base + (index << size_log2);
        // All IOVAs are `2^64` bytes.
        let whole = (span.first, span.last - span.first) == (first, ((entries.len() as u64) << size_log2).wrapping_sub(1));
        let is_usual = (usual.level, usual.inherited) == (place.level, place.inherited);
        (whole && is_usual && entries.len() >= FEWEST).then(|| Run {
            iova: Iova(first),
            size_log2,
            entries,
            field: level.field(usual.shape),
            kinds: usual.expected.pattern.kinds,
            within: usual.within,
        })
    }

    /// Reads entries, and has those that are like the last written on at the same time, if that can be done for all of them: what they turned out to be.
    #[inline(always)]
    fn read_passing(&mut self, at: (Place, u64), address: u64, entries: &mut [u64], span: Span) -> Result<Option<Judged>, Cause> {
        let Some(usual) = self.usual.filter(|_| !self.misses.are_skipped()) else { return self.read(address, entries).map(|()| None) };
        let region = self.region(address, entries.len())?;
        let count = entries.len();
        let mut receiver =
            self.usual_run(&usual, at, entries, span).and_then(|run| self.visitor.receive(&run)).filter(|receiver| receiver.count >= count);
        let Some(mut passing) = receiver.as_mut().and_then(|receiver| Passing::new(receiver, &usual, count)) else {
            return self.read(address, entries).map(|()| None);
        };
        let nearby = self.memory.read_entries_passing(Gpa(address), self.layout, entries, &mut passing).map_err(|_| Cause::Missing)?;
        let judged = passing.judged;
        self.last_read = Some(LastRead { address, region, nearby });
        Ok(judged)
    }

    /// Tells of entries as of those that are like the last, as far as they are, and the visitor can make use of that; how many these are. All of them may have `passed`
    /// when they were read.
    #[inline(always)]
    fn pass(&mut self, place: Place, index: u64, entries: &[u64], span: Span, passed: Option<Judged>) -> Result<usize, WalkError> {
        let Some(usual) = self.usual else { return Ok(0) };
        let Some(mut run) = self.usual_run(&usual, (place, index), entries, span) else { return Ok(0) };
        if self.misses.skips() {
            return Ok(0);
        }
        let (first, size_log2) = (run.iova.0, run.size_log2);
        let (mut told, mut before) = (0, passed);
        while told < entries.len() {
            run = Run { iova: Iova(first + ((told as u64) << size_log2)), entries: &entries[told..], ..run };
            let (count, judged) = match before.take() {
                Some(judged) => (run.entries.len(), judged),
                None => {
                    let mut receiver = self.visitor.receive(&run);
                    let Some(receiver) = &mut receiver else { break };
                    let count = receiver.count.min(run.entries.len());
                    let Some(judged) = receiver.pass(&run.entries[..count], &usual) else { break };
                    (count, judged)
                }
            };
            run.entries = &run.entries[..count];
            let Some(passed) = judged.passed().filter(|passed| passed.gaps < count as u64) else {
                self.misses.miss();
                break;
            };
            self.misses = Misses::default();
            let leaves = count as u64 - passed.gaps;
            if leaves > self.budget.leaves_left() || !self.visitor.received(&run, passed)? {
                break;
            }
            self.budget.charge_leaves(leaves)?;
            self.told += 1;
            told += count;
        }
        Ok(told)
    }

    #[inline(always)]
    fn read(&mut self, address: u64, entries: &mut [u64]) -> Result<(), Cause> {
        let region = self.region(address, entries.len())?;
        let nearby = self.memory.read_entries_nearby(Gpa(address), self.layout, entries).map_err(|_| Cause::Missing)?;
        self.last_read = Some(LastRead { address, region, nearby });
        Ok(())
    }

    /// The memory that the first of so many entries is in, if all of them exist.
    #[inline(always)]
    fn region(&self, address: u64, entries: usize) -> Result<Span, Cause> {
        let last = address.saturating_add(entries as u64 * u64::from(self.layout.bytes) - 1);
        let here = Span { first: address, last };
        if let Some(known) = self.last_read.map(|read| read.region).filter(|known| known.intersection(here) == Some(here)) {
            return Ok(known);
        }
        let region = self.map.region(address).filter(|region| region.span.last >= last || self.map.region(last).is_some());
        region.map(|region| region.span).ok_or(Cause::OutsideMemory)
    }

    /// See [`LastRead::expect`].
    #[inline(always)]
    fn expect(&self, (before, ahead): (u64, u64), length: u64, part: Range<u64>) {
        if let Some(last) = &self.last_read {
            last.expect((before, ahead), length, part);
        }
    }

    /// See [`tables_ahead`]; of level kind `below`.
    #[inline(always)]
    fn tables_ahead(&self, entries: &[u64], below: u8, known: &Remembered, field: &AddressField) -> [u64; 2] {
        tables_ahead(entries, self.table_bytes(below), known, field)
    }

    /// The size of a table of this kind; of one that does not exist, a page.
    #[inline]
    fn table_bytes(&self, level: u8) -> u64 {
        self.plan.levels.get(usize::from(level)).map_or(PAGE, |level| level.entries() * u64::from(self.layout.bytes))
    }

    fn set_step(&mut self, index: u64, entry: Option<u64>) {
        if let Some(step) = self.path.last_mut() {
            step.index = index;
            step.entry = entry;
        }
    }

    fn fault(&mut self, cause: Cause, span: Span, address: Option<u64>) -> Result<(), WalkError> {
        self.told += 1;
        self.visitor.fault(&FaultAt { stage: self.stage, cause, span, address, reading_table: false, path: self.path })
    }

    /// Goes through entries that were read; `index` is the first one's. `span` is what is wanted of the IOVAs that they cover.
    fn entries(&mut self, place: Place, index: u64, entries: &[u64], span: Span) -> Result<(), WalkError> {
        let plan = self.plan;
        let level = &plan.levels[usize::from(place.level)];
        let lsb = level.index_lsb;
        let mut at = 0;
        while at < entries.len() {
            let entry = entries[at];
            let known = self.judge.judge(level, place.level, place.inherited, entry, self.budget)?;
            let iova = place.base + ((index + at as u64) << lsb);
            let slot = Span::of_log2(iova, lsb);
            // Only the first and the last slot can be cut.
            let part = slot.intersection(span).unwrap_or(slot);
            let meaning = match known.meaning {
                Meaning::WholeEntry => self.judge.judge_whole(place.level, place.inherited, entry, self.budget)?,
                meaning => meaning,
            };
            at += match meaning {
                Meaning::Absent => {
                    // What was said of a whole entry holds for that one.
                    let (mask, pattern) = if known.meaning == Meaning::WholeEntry { (u64::MAX, entry) } else { (known.mask, known.pattern) };
                    let count = run_length(&entries[at..], mask, pattern);
                    let last = Span::of_log2(iova + ((count as u64 - 1) << lsb), lsb).last.min(span.last);
                    self.set_step(index + at as u64, Some(entry));
                    self.visitor.absent(Span { first: part.first, last }, self.path)?;
                    count
                }
                Meaning::Leaf { size_log2, attributes } if size_log2 >= lsb && part == slot && known.meaning != Meaning::WholeEntry => {
                    let candidates = whole_slots(&entries[at..], iova, lsb, span);
                    let first = Leaves { index: index + at as u64, iova, place, known: &known, attributes };
                    let count = match size_log2 == lsb {
                        true => self.leaves(first, candidates)?,
                        false if self.visitor.takes_large() => self.large_leaves(first, candidates, size_log2)?,
                        false => 0,
                    };
                    if count == 0 {
                        self.set_step(index + at as u64, Some(entry));
                        self.single_leaf(level, lsb, &known, entry, part, size_log2, attributes, NOTHING_MISSING)?;
                    }
                    count.max(1)
                }
                Meaning::Leaf { size_log2, attributes } => {
                    self.set_step(index + at as u64, Some(entry));
                    self.single_leaf(level, lsb, &known, entry, part, size_log2, attributes, NOTHING_MISSING)?;
                    1
                }
                Meaning::Part { size_log2, attributes, missing } => {
                    self.set_step(index + at as u64, Some(entry));
                    self.single_leaf(level, lsb, &known, entry, part, size_log2, attributes, missing)?;
                    1
                }
                Meaning::Table { next, inherited } => {
                    self.set_step(index + at as u64, Some(entry));
                    let field = level.field(known.shape);
                    let exists = (u64::from(next.first), last_index(next.last));
                    let below = Place { level: next.level, table: field.extract(entry), base: slot.first, inherited, ahead: [NOWHERE; 2] };
                    // Entries that are alike lead to tables of the same kind, unless the format looks at the addresses as well.
                    let alike = part == slot && known.meaning != Meaning::WholeEntry;
                    if alike {
                        let (index, entries) = (index + at as u64, whole_slots(&entries[at..], iova, lsb, span));
                        let pointers = Pointers { index, entries, known: &known, field, slot_log2: lsb };
                        let count = self.tables_in_a_row(below, pointers, exists)?;
                        if count > 0 {
                            at += count;
                            continue;
                        }
                    }
                    let below = Place { ahead: self.tables_ahead(&entries[at + 1..], next.level, &known, field), ..below };
                    if alike && self.table_bytes(next.level) <= PAGE / 2 {
                        let neighbours = whole_slots(&entries[at..], iova, lsb, span);
                        let count = self.side_by_side(below, neighbours, &known, lsb, exists);
                        let ahead = self.tables_ahead(&entries[at + count..], next.level, &known, field);
                        if count > 1 && self.tables_together(Place { ahead, ..below }, &neighbours[..count], exists)? {
                            at += count;
                            continue;
                        }
                    }
                    match self.next_table(place.level, below, slot, part, exists)? {
                        Found::Told => 1,
                        Found::Nothing => {
                            // Neighbours that lead there as well are told of together.
                            let count = run_length(&entries[at..], u64::MAX, entry);
                            let last = Span::of_log2(iova + ((count as u64 - 1) << lsb), lsb).last.min(span.last);
                            self.visitor.nothing_below(Span { first: part.first, last }, count as u64, self.path)?;
                            count
                        }
                    }
                }
                Meaning::Fault(kind) => {
                    self.set_step(index + at as u64, Some(entry));
                    // The output size counts before the Access flag; Arm DDI 0487, the priorities of faults of a translation stage.
                    let address = level.field(known.shape).extract(entry);
                    match kind == FaultKind::AccessFlag && !self.output.contains(address) {
                        true => self.fault(Cause::Entry(FaultKind::AddressSize), part, Some(address))?,
                        false => self.fault(Cause::Entry(kind), part, None)?,
                    }
                    1
                }
                Meaning::WholeEntry => return Err(Nonsense("the format wants to see a whole entry that it has seen".to_owned()).into()),
            };
        }
        Ok(())
    }

    /// A leaf that is looked at for itself. `part` is what is wanted of its slot, which `2^lsb` bytes are in.
    #[allow(clippy::too_many_arguments)]
    fn single_leaf(
        &mut self,
        level: &LevelPlan,
        lsb: u8,
        known: &Remembered,
        entry: u64,
        part: Span,
        size_log2: u8,
        attributes: Attributes,
        missing: Missing,
    ) -> Result<(), WalkError> {
        self.budget.charge_leaves(1)?;
        if size_log2 < lsb {
            return self.fault(Cause::Entry(FaultKind::Reserved), part, None);
        }
        let below = Span::of_log2(0, size_log2).last;
        let address = level.field(known.shape).extract(entry);
        // A whole-entry leaf has its size in address bits: they are not address. A leaf above its slot shows the piece under it.
        let address = if known.meaning == Meaning::WholeEntry { address & !below } else { address };
        if missing == NOTHING_MISSING {
            return self.leaf(part, address, part.first & below, size_log2, attributes);
        }
        let base = part.first & !below;
        let Some(shown) = Span::new(base.saturating_add(missing.front.into()), (base | below).saturating_sub(missing.back.into())) else {
            return self.fault(Cause::Entry(FaultKind::Permission), part, None);
        };
        let Some(here) = part.intersection(shown) else { return self.fault(Cause::Entry(FaultKind::Permission), part, None) };
        if part.first < here.first {
            self.fault(Cause::Entry(FaultKind::Permission), Span { first: part.first, last: here.first - 1 }, None)?;
        }
        self.leaf(here, address, here.first & below, size_log2, attributes)?;
        if here.last < part.last {
            self.fault(Cause::Entry(FaultKind::Permission), Span { first: here.last + 1, last: part.last }, None)?;
        }
        Ok(())
    }

    /// Walks the table `next`, which an entry of a table of kind `above` points to, unless there was nothing in it before.
    fn next_table(&mut self, above: u8, next: Place, slot: Span, part: Span, exists: (u64, u64)) -> Result<Found, WalkError> {
        let Some(below) = self.plan.levels.get(usize::from(next.level)) else {
            return Err(Nonsense(format!("level kind {} is followed by level kind {}, which does not exist", above, next.level)).into());
        };
        let this = &self.plan.levels[usize::from(above)];
        let top = below.index_lsb + below.index_bits;
        if top > this.index_lsb || below.index_bits > crate::table::geometry::MAX_INDEX_BITS {
            return Err(Nonsense(format!(
                "level kind {} (entries of 2^{} bytes) is followed by level kind {} of 2^{top} bytes",
                above, this.index_lsb, next.level
            ))
            .into());
        }
        if !self.output.contains(next.table) {
            return self.fault(Cause::Entry(FaultKind::AddressSize), part, Some(next.table)).map(|()| Found::Told);
        }
        if !next.table.is_multiple_of(u64::from(self.layout.bytes)) {
            return self.fault(Cause::Entry(FaultKind::Misaligned), part, Some(next.table)).map(|()| Found::Told);
        }
        let key = TableKey { level: next.level, table: next.table, inherited: next.inherited, exists };
        if self.empties.has(&key) {
            return Ok(Found::Nothing);
        }
        // A level that was skipped: IOVA bits between the two tables must be zero.
        let reachable = Span::of_log2(slot.first, top);
        let Some(inside) = part.intersection(reachable) else {
            self.visitor.absent(part, self.path)?;
            return Ok(Found::Told);
        };
        let before = self.told;
        self.table(next, inside, exists)?;
        // Of a table that was walked in part, nothing is known.
        if self.told == before && inside == reachable {
            self.empties.add(key);
        }
        if let Some(first) = inside.last.checked_add(1).filter(|first| *first <= part.last) {
            self.visitor.absent(Span { first, last: part.last }, self.path)?;
        }
        Ok(Found::Told)
    }

    /// Leaves as large as their slots: all of the first kind, and of one more, that stand side by side; how many entries these are.
    fn leaves(&mut self, first: Leaves<'_>, entries: &[u64]) -> Result<usize, WalkError> {
        self.alike(first, entries, 0)
    }

    /// Leaves that fill several slots each, with the same entry; how many entries these are. Zero: `entries` does not begin with one that does.
    fn large_leaves(&mut self, first: Leaves<'_>, entries: &[u64], size_log2: u8) -> Result<usize, WalkError> {
        let repeat_log2 = size_log2 - self.plan.levels[usize::from(first.place.level)].index_lsb;
        if first.iova & Span::of_log2(0, size_log2).last != 0 || entries.len() >> repeat_log2.min(63) == 0 {
            return Ok(0);
        }
        let mut buffer = self.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])));
        let count = repeated(entries, 1 << repeat_log2, &mut buffer.0);
        let result = if count == 0 { Ok(0) } else { self.alike(first, &buffer.0[..count], repeat_log2) };
        self.buffers.push(buffer);
        result.map(|count| count << repeat_log2)
    }

    /// Leaves like the first of `entries`, and of one more kind, that stand side by side, each of which fills `2^repeat_log2` slots; how many these are.
    fn alike(&mut self, first: Leaves<'_>, entries: &[u64], repeat_log2: u8) -> Result<usize, WalkError> {
        let Leaves { index, iova, place, known, attributes } = first;
        let level = &self.plan.levels[usize::from(place.level)];
        let (size_log2, field) = (level.index_lsb + repeat_log2, level.field(known.shape));
        let size_mask = Span::of_log2(0, size_log2).last;
        let within = self.map.target(field.extract(entries[0])).and_then(|target| target.intersection(self.output));
        // Where this does not hold, every address counts as one outside of memory, and is looked at again.
        let plain = within.filter(|within| field.is_plain() && within.length_minus_one() >= size_mask);
        let (lowest, room) = plain.map_or((0, 0), |within| (within.first, within.length_minus_one() - size_mask));
        let mut pattern = Pattern { mask: known.mask, kinds: Kinds::one(known.pattern, attributes), address: field.in_place, moved: field.moved };
        // Tables that had leaves of another kind a moment ago have some again.
        if let Some((other, attributes)) = self.judge.companion(place.level, known) {
            pattern.kinds = pattern.kinds.with(other, attributes);
        }
        if self.visitor.takes_gaps()
            && let Some(absent) = self.judge.absent(place.level, place.inherited)
        {
            pattern.kinds = pattern.kinds.with_gaps(absent);
        }
        if plain.is_some() && repeat_log2 == 0 && field.address_mask & size_mask == 0 {
            let (level, inherited) = (place.level, place.inherited);
            let expected = Expected { pattern, first: lowest, room };
            self.usual = within.map(|within| Usual { level, inherited, shape: known.shape, expected, within });
        }
        let Scanned { count, gaps, outside, uniform } = scan(entries, pattern, lowest, room);
        if uniform {
            pattern.kinds = pattern.kinds.first();
        } else if gaps == 0 {
            pattern.kinds = pattern.kinds.without_gaps();
        }
        let run = &entries[..count];
        let run = &run[..run.iter().rposition(|entry| !pattern.kinds.is_gap(*entry)).map_or(0, |last| last + 1)];
        self.budget.charge_leaves((count as u64 - gaps) << repeat_log2)?;
        self.told += 1;
        let within = if outside || plain.is_none() { self.targets_of(run, field, &pattern.kinds, size_mask) } else { within };
        if field.address_mask & size_mask == 0
            && let Some(within) = within
        {
            self.set_step(index, Some(run[0]));
            self.visitor.leaves(&Run { iova: Iova(iova), size_log2, entries: run, field, kinds: pattern.kinds, within }, self.path)?;
            return Ok(count);
        }
        for (offset, entry) in run.iter().enumerate().filter(|(_, entry)| !pattern.kinds.is_gap(**entry)) {
            // Slot by slot: each shows the piece of the leaf under it.
            for slot in (offset as u64) << repeat_log2..(offset as u64 + 1) << repeat_log2 {
                let span = Span::of_log2(iova + (slot << level.index_lsb), level.index_lsb);
                self.set_step(index + slot, Some(*entry));
                self.leaf(span, field.extract(*entry), span.first & size_mask, size_log2, pattern.kinds.of(*entry))?;
            }
        }
        Ok(count)
    }

    /// A span that all targets of `run` lie in, if all of them are in guest memory, in whichever part of it.
    #[inline(never)]
    fn targets_of(&self, run: &[u64], field: &AddressField, kinds: &Kinds, size_mask: u64) -> Option<Span> {
        let mut spans = [Span { first: 0, last: 0 }; MAX_TARGETS];
        let targets = self.map.targets().iter().filter_map(|target| target.intersection(self.output));
        let mut count = 0;
        for target in targets.filter(|target| target.last >= size_mask) {
            *spans.get_mut(count)? = target;
            count += 1;
        }
        let spans = &spans[..count];
        let within = Span { first: spans.first()?.first, last: spans.last()?.last };
        if (field.address_mask | within.last) >> 63 != 0 {
            return None;
        }
        if field.is_in_place() {
            return all_in_place_within(run, *kinds, field.in_place, spans, size_mask).then_some(within);
        }
        all_within(run.iter().filter(|entry| !kinds.is_gap(**entry)).map(|entry| field.extract(*entry)), spans, size_mask).then_some(within)
    }

    /// One leaf, of which `part` is wanted; `offset` is how far into the leaf that is.
    fn leaf(&mut self, part: Span, address: u64, offset: u64, size_log2: u8, attributes: Attributes) -> Result<(), WalkError> {
        self.told += 1;
        if !self.output.contains(address) {
            return self.fault(Cause::Entry(FaultKind::AddressSize), part, Some(address));
        }
        if address & Span::of_log2(0, size_log2).last != 0 {
            return self.fault(Cause::Entry(FaultKind::Misaligned), part, Some(address));
        }
        let first = address | offset;
        let wanted = Span { first, last: first.saturating_add(part.last - part.first) };
        let Some(reachable) = wanted.intersection(self.output) else { return self.fault(Cause::Entry(FaultKind::AddressSize), part, Some(address)) };
        // Only what exists in guest memory is a mapping; the holes are faults.
        let mut next = Some(wanted.first);
        for target in self.map.targets_within(reachable) {
            if let Some(hole) = next.filter(|hole| *hole < target.first) {
                let span = Span { first: part.first + (hole - first), last: part.first + (target.first - 1 - first) };
                self.fault(Cause::OutsideMemory, span, Some(hole))?;
            }
            let iova = Span { first: part.first + (target.first - first), last: part.first + (target.last - first) };
            // The first piece was paid for with the leaf.
            if next.is_none_or(|next| next != wanted.first) {
                self.budget.charge_leaves(1)?;
            }
            self.visitor.piece(&Piece { iova, address: target.first, attributes }, self.path)?;
            next = target.last.checked_add(1);
        }
        match next {
            Some(hole) if hole <= wanted.last => {
                self.fault(Cause::OutsideMemory, Span { first: part.first + (hole - first), last: part.last }, Some(hole))
            }
            _ => Ok(()),
        }
    }
}

/// The tables of `bytes` bytes that `entries` point to first, as far as they are like the one before, `known`. The second counts only if it does not follow the first
/// in memory.
#[inline(always)]
fn tables_ahead(entries: &[u64], bytes: u64, known: &Remembered, field: &AddressField) -> [u64; 2] {
    let table = |entry: u64| if entry & known.mask == known.pattern { field.extract(entry) } else { NOWHERE };
    match *entries {
        [next, second, ..] if second.wrapping_sub(next) != bytes => [table(next), table(second)],
        [next, ..] => [table(next), NOWHERE],
        [] => [NOWHERE; 2],
    }
}

/// Tables of the second stage are looked up for each leaf of the first: they count as leaves.
fn charge_table(budget: &Budget, stage: u8) -> Result<(), Exhausted> {
    match stage {
        1 => budget.charge_table(),
        _ => budget.charge_leaves(1),
    }
}

/// The first of `entries`, with slots of `2^lsb` bytes from `iova` on, and those after it of which `span` has all.
fn whole_slots(entries: &[u64], iova: u64, lsb: u8, span: Span) -> &[u64] {
    let whole = ((span.last - iova).saturating_add(1) >> lsb).max(1);
    &entries[..entries.len().min(whole as usize)]
}

/// A leaf that shows all of its bytes.
const NOTHING_MISSING: Missing = Missing { front: 0, back: 0 };

const fn last_index(last: u16) -> u64 {
    if last == u16::MAX { u64::MAX } else { last as u64 }
}

/// Parts of guest memory that are looked at together.
const MAX_TARGETS: usize = 8;
