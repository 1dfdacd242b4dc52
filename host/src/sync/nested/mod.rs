//! A host table of any format, kept in step in memory that hardware reads all the while.
//!
//! ```text
//!   apply:  new tables are filled while nobody can reach them -> one atomic store per slot links them, replaces or removes what was there
//!           tables that nothing leads to any more are *retired*: a walk may still be in them
//!   the caller invalidates what is needed
//!   completed:  retired tables are free
//! ```
//!
//! A slot goes from its old content to its new one with one store, also when a large page becomes a table of small ones or the reverse. So a page whose
//! translation stays the same translates at every moment.
//!
//! Pages are the largest that the format has within each piece that is mapped, never across two of them, and always as large as one slot: a leaf that
//! fills several slots could not be replaced with one store.

mod exchange;
mod marks;
mod memory;
mod plan;
mod slots;

pub use memory::{RegionTables, TableMemory};

use std::sync::Arc;

use crate::memory::EntryLayout;
use crate::sync::marks::Marked;
use crate::sync::sink::{CommitError, Committer, Sink};
use crate::sync::spans::Spans;
use crate::table::{BuildError, Geometry, Loss, Losses, Piece, low_bits};
use crate::{Change, Gpa, Iova, Span};
use exchange::{Writer, leaf};
use marks::{Retired, Tracks};
use plan::HostPlan;
use slots::{One, Place, covers, extent, piece_of, split, touching};

/// What hardware may have cached and must forget.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Needed {
    /// IOVAs whose translations were removed or replaced: ascending, neither overlapping nor touching.
    pub spans: Vec<Span>,
    /// Tables were taken away as well, so that caches of table entries count. Otherwise only leaves were.
    pub tables: bool,
}

impl Needed {
    /// Nothing is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty() && !self.tables
    }

    /// Adds IOVAs that ascend, to what there may be from earlier batches.
    fn add(&mut self, mut spans: impl Iterator<Item = Span>) {
        let Some(mut last) = self.spans.pop().or_else(|| spans.next()) else { return };
        let mut ascend = true;
        for span in spans {
            if last.first <= span.first && last.last.saturating_add(1) >= span.first {
                last.last = last.last.max(span.last);
            } else {
                ascend &= last.first <= span.first;
                self.spans.push(std::mem::replace(&mut last, span));
            }
        }
        self.spans.push(last);
        if ascend {
            return;
        }
        self.spans.sort_unstable();
        self.spans.dedup_by(|next, last| {
            let touches = last.last.saturating_add(1) >= next.first;
            last.last = if touches { last.last.max(next.last) } else { last.last };
            touches
        });
    }
}

/// What a host table is made of, and what it could not take in. Counts only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NestedFigures {
    /// Tables that are linked.
    pub tables: u64,
    /// Tables that wait for an invalidation.
    pub retired: u64,
    /// Questions that the format was asked.
    pub questions: u64,
    /// How often pieces, or parts of pieces, were not mapped because there was no memory for tables.
    pub without_memory: u64,
    /// How often pieces, or parts of pieces, were not mapped because the format failed or contradicted itself.
    pub format_failures: u64,
}

/// What a slot of a table holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Slot {
    Absent,
    Leaf(Tracks),
    Table(u32),
}

/// A table of the host.
#[derive(Debug)]
struct HostTable {
    address: Gpa,
    bytes: u64,
    slots: Box<[Slot]>,
    /// Slots that are not absent.
    live: u64,
}

/// A host table that is kept in step.
pub struct NestedTable<M> {
    plan: HostPlan,
    memory: M,
    layout: EntryLayout,
    tables: Vec<Option<HostTable>>,
    free: Vec<u32>,
    /// The root of each chain.
    roots: Vec<u32>,
    retired: Vec<Retired>,
    /// The table that was changed last, while it is linked.
    near: Option<Near>,
    needed: Needed,
    losses: Losses,
    without_memory: u64,
    format_failures: u64,
    /// No memory was left in this batch: nobody asks again.
    full: bool,
    /// Where pieces are missing because there was no memory.
    refused: Spans,
    /// Memory was given back since one was refused.
    released: bool,
    /// Where pieces are missing because the format failed.
    unanswered: Spans,
    /// It is asked about them again: once for each commit while it fails.
    asks_again: bool,
    /// Where that begins.
    next_asked: u64,
    /// The batch that is applied replaces leaves by the same, as far as the guest knows.
    keeps_marks: bool,
    /// Guest-physical addresses that were written through leaves that are gone, while somebody wants to know.
    log: Option<Spans>,
    /// Leaves that are gone although the guest has not touched its entries.
    gone: Vec<Marked>,
    /// It has just been begun: what is mapped anew was written before.
    begins: bool,
}

impl<M> std::fmt::Debug for NestedTable<M> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NestedTable").field("figures", &self.figures()).field("losses", &self.losses).finish_non_exhaustive()
    }
}

impl<M> NestedTable<M> {
    /// What it is made of.
    #[must_use]
    pub fn figures(&self) -> NestedFigures {
        NestedFigures {
            tables: (self.tables.len() - self.free.len()) as u64,
            retired: self.retired.len() as u64,
            questions: self.plan.leaves.target.questions,
            without_memory: self.without_memory,
            format_failures: self.format_failures,
        }
    }

    /// What the format could not say, since the beginning.
    #[must_use]
    pub const fn losses(&self) -> &Losses {
        &self.losses
    }

    /// The format's geometry; the addresses of its roots are those of the settings, not of this table.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        self.plan.geometry()
    }

    /// The memory that the tables are in.
    #[must_use]
    pub const fn memory(&self) -> &M {
        &self.memory
    }

    /// IOVAs at which mapped pieces may be missing because there was no memory for tables: ascending, and few. Where they would be many, more rather than less.
    #[must_use]
    pub fn refused(&self) -> &[Span] {
        self.refused.as_slice()
    }

    /// IOVAs at which mapped pieces may be missing because the format failed: ascending, and few. Where they would be many, more rather than less.
    #[must_use]
    pub fn unanswered(&self) -> &[Span] {
        self.unanswered.as_slice()
    }

    /// Whether a leaf stands where hardware looks an IOVA up.
    #[must_use]
    pub fn has(&self, iova: Iova) -> bool {
        let canonical = |root: &crate::table::Root| iova.0 & !root.ignored | root.first & root.ignored;
        self.geometry().roots.iter().map(canonical).zip(&self.plan.windows).any(|(iova, window)| {
            let chain = &self.plan.chains[window.chain];
            let (mut table, mut base) = (self.roots[window.chain], window.base);
            window.span.contains(iova)
                && chain.rungs.iter().any(|rung| {
                    let slot = |table: &HostTable| table.slots.get(((iova - base) >> rung.lsb) as usize).copied();
                    match self.tables.get(table as usize).and_then(Option::as_ref).and_then(slot) {
                        Some(Slot::Leaf(_)) => true,
                        Some(Slot::Table(below)) => {
                            (table, base) = (below, iova & !low_bits(rung.lsb));
                            false
                        }
                        Some(Slot::Absent) | None => {
                            table = u32::MAX;
                            false
                        }
                    }
                })
        })
    }

    /// For each root, the setting that holds its address, and the address. They stay what they are.
    pub fn roots(&self) -> impl Iterator<Item = (&str, Gpa)> + '_ {
        let address = |root: &u32| self.tables.get(*root as usize).and_then(Option::as_ref).map(|table| table.address);
        self.plan.chains.iter().zip(&self.roots).filter_map(move |(chain, root)| Some((chain.setting.as_str(), address(root)?)))
    }
}

impl<M: TableMemory> NestedTable<M> {
    /// An empty table of the format, with its root tables in `memory`.
    ///
    /// # Errors
    /// The format failed, or describes a table that cannot be, or there is no memory for the roots.
    pub fn new(format: Box<dyn crate::table::Format>, memory: M) -> Result<Self, BuildError> {
        let plan = HostPlan::new(format)?;
        let layout = plan.layout();
        let mut this = Self {
            plan,
            memory,
            layout,
            tables: Vec::new(),
            free: Vec::new(),
            roots: Vec::new(),
            retired: Vec::new(),
            near: None,
            needed: Needed::default(),
            losses: Losses::default(),
            without_memory: 0,
            format_failures: 0,
            full: false,
            refused: Spans::default(),
            released: false,
            unanswered: Spans::default(),
            asks_again: false,
            next_asked: 0,
            keeps_marks: false,
            log: None,
            gone: Vec::new(),
            begins: false,
        };
        for chain in this.plan.chains.clone() {
            let (rung, bytes) = (&chain.rungs[0], chain.bytes(0));
            let address = this.memory.allocate(bytes).ok_or(crate::table::Full { base: 0, limit: bytes })?;
            this.memory.fill(address, layout, &vec![rung.absent; rung.entries as usize]);
            let slots = vec![Slot::Absent; rung.entries as usize].into_boxed_slice();
            let root = this.keep(HostTable { address, bytes, slots, live: 0 });
            this.roots.push(root);
        }
        Ok(this)
    }

    /// Makes the changes of a batch, as [`Sink::apply`] says; what must be invalidated, of this batch and of all since [`NestedTable::completed`].
    ///
    /// IOVAs that units do not look up ([`Geometry::untranslated`]) are left out: the table may be for requests without PASID, now or later.
    pub fn apply(&mut self, batch: &[Change]) -> &Needed {
        if self.geometry().leaves_out(Span::ALL) && batch.iter().any(|change| self.geometry().leaves_out(change.span())) {
            let batch = self.looked_up(batch);
            return self.apply_all(&batch);
        }
        self.apply_all(batch)
    }

    /// The parts of changes that are at IOVAs which units look up. What is not is counted where it would be mapped.
    #[cold]
    fn looked_up(&mut self, batch: &[Change]) -> Vec<Change> {
        let mut kept = Vec::with_capacity(batch.len() + 1);
        for change in batch {
            let parts: Vec<(bool, Span)> = self.geometry().cut(change.span()).collect();
            for (looked_up, iova) in parts {
                match change {
                    Change::Unmap(_) if looked_up => kept.push(Change::Unmap(iova)),
                    Change::Map(piece) if looked_up => kept.push(Change::Map(piece.part(iova))),
                    Change::Map(piece) => self.lose(Loss::InputRange, piece, iova),
                    Change::Unmap(_) => {}
                }
            }
        }
        kept
    }

    /// The same, of IOVAs that units look up.
    fn apply_all(&mut self, batch: &[Change]) -> &Needed {
        self.full = false;
        self.plan.leaves.failed = false;
        if let [change] = batch
            && self.apply_near(change)
        {
            return &self.needed;
        }
        let (unmaps, maps) = split(batch);
        self.needed.add(unmaps.iter().map(Change::span));
        let mut all = false;
        for index in 0..self.plan.windows.len() {
            let span = self.plan.windows[index].span;
            let (here, those) = (touching(unmaps, span), touching(maps, span));
            let Some(extent) = extent(here, those) else { continue };
            all |= those.len() == maps.len() && span.first <= extent.first && extent.last <= span.last;
            self.update_window(index, extent, here, those);
        }
        if !all {
            self.lose_outside(maps);
        }
        &self.needed
    }

    /// Makes one change, if it concerns one slot of the table that was changed last, and this stays. False: nothing was done.
    #[inline]
    fn apply_near(&mut self, change: &Change) -> bool {
        let (Some(near), iova, false) = (&self.near, change.span(), self.looks_at_marks()) else { return false };
        let chain = &*self.plan.chains[near.chain];
        let (lsb, below) = (chain.rungs[near.depth].lsb, low_bits(chain.rungs[near.depth].lsb));
        let inside = near.span.first <= iova.first && iova.last <= near.span.last;
        let Some(table) = &mut self.tables[near.id as usize] else { return false };
        let map = piece_of(change);
        if !inside || iova.first & below != 0 || iova.last != iova.first | below || map.is_none() && table.live == 1 {
            return false;
        }
        let (leaves, losses, memory) = (&mut self.plan.leaves, &mut self.losses, &mut self.memory);
        let mut writer = Writer { chain, number: near.chain, depth: near.depth, leaves, losses, memory, layout: self.layout };
        let made = writer.put(table, One { index: (iova.first - near.base) >> lsb, unmap: map.is_none(), map });
        if made && map.is_none() {
            self.needed.add(std::iter::once(iova));
        }
        made
    }

    /// Whether what stood in an entry must be looked at when it goes.
    const fn looks_at_marks(&self) -> bool {
        self.log.is_some() || self.keeps_marks
    }

    /// Makes the changes in a window, beginning at the lowest table that has all of them and stays.
    #[inline]
    fn update_window(&mut self, number: usize, extent: Span, unmaps: &[Change], maps: &[Change]) {
        let chain = &self.plan.chains[self.plan.windows[number].chain];
        let root = self.root(number);
        let mut at = match &self.near {
            Some(near) if near.chain == root.chain && near.span.first <= extent.first && extent.last <= near.span.last => *near,
            _ => root,
        };
        while let Some(table) = self.tables[at.id as usize].as_ref() {
            let (lsb, below) = (chain.rungs[at.depth].lsb, low_bits(chain.rungs[at.depth].lsb));
            let whole = Span { first: extent.first & !below, last: extent.first | below };
            if extent.last > whole.last || extent == whole {
                break;
            }
            let Slot::Table(id) = table.slots[((whole.first - at.base) >> lsb) as usize] else { break };
            let span = Span { first: whole.first.max(at.span.first), last: whole.last.min(at.span.last) };
            at = Near { id, depth: at.depth + 1, base: whole.first, span, ..at };
        }
        // A table that may become empty is looked at by the one that it hangs from.
        let lsb = chain.rungs[at.depth].lsb;
        let gone: u64 = unmaps.iter().map(|unmap| (unmap.span().last >> lsb) - (unmap.span().first >> lsb) + 1).sum();
        let stays = self.tables[at.id as usize].as_ref().is_some_and(|table| table.live > gone);
        let from = if at.depth > 0 && stays { at } else { root };
        self.near = (from.depth > 0).then_some(from);
        let place = Place { chain, number: from.chain, depth: from.depth, base: from.base, span: from.span };
        let mut slots = place.slots(unmaps, maps);
        let looks_at_marks = self.looks_at_marks();
        if let (Some(table), false) = (&mut self.tables[from.id as usize], looks_at_marks) {
            let (leaves, losses, memory) = (&mut self.plan.leaves, &mut self.losses, &mut self.memory);
            Writer { chain, number: from.chain, depth: from.depth, leaves, losses, memory, layout: self.layout }.exchange(table, &mut slots);
        }
        if let Some((unmaps, maps)) = slots.rest() {
            let chain = Arc::clone(chain);
            self.update(from.id, Place { chain: &chain, ..place }, unmaps, maps);
        }
    }

    /// The root of a window.
    fn root(&self, number: usize) -> Near {
        let window = &self.plan.windows[number];
        Near { id: self.roots[window.chain], chain: window.chain, depth: 0, base: window.base, span: window.span }
    }

    /// What must be invalidated.
    #[must_use]
    pub const fn needed(&self) -> &Needed {
        &self.needed
    }

    /// What was needed has been invalidated: no walk is in retired tables any more.
    pub fn completed(&mut self) {
        self.released |= !self.retired.is_empty();
        for retired in std::mem::take(&mut self.retired) {
            self.note_retired(&retired);
            self.memory.release(retired.table.address, retired.table.bytes);
        }
        self.needed.spans.clear();
        self.needed.tables = false;
        self.asks_again = !self.unanswered.as_slice().is_empty();
    }

    /// As [`Sink::wants`] says.
    #[must_use]
    pub fn wants(&self) -> Option<Span> {
        let unanswered = || self.unanswered.at_or_behind(self.next_asked).or_else(|| self.unanswered.at_or_behind(0));
        let refused = || self.refused.as_slice().first().copied().filter(|_| self.released || self.memory.may_come());
        self.asks_again.then(unanswered).flatten().or_else(refused)
    }

    /// As [`Sink::offer`] says.
    pub fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.refused.remove(span);
        self.unanswered.remove(span);
        self.next_asked = span.last.wrapping_add(1);
        // What stands at the ends of refused spans is the border of a slot or of a piece: cut there, no page becomes smaller.
        let pieces: Vec<Change> = pieces.iter().filter_map(piece_of).filter_map(|piece| piece.within(span)).map(Change::Map).collect();
        self.apply(&pieces);
    }

    fn lose_outside(&mut self, maps: &[Change]) {
        for piece in maps.iter().filter_map(piece_of) {
            let mut next = Some(piece.iova.first);
            for index in 0..self.plan.windows.len() {
                let Some(part) = self.plan.windows[index].span.intersection(piece.iova) else { continue };
                if let Some(first) = next.filter(|first| *first < part.first) {
                    self.lose(Loss::InputRange, piece, Span { first, last: part.first - 1 });
                }
                next = part.last.checked_add(1);
            }
            if let Some(first) = next.filter(|first| *first <= piece.iova.last) {
                self.lose(Loss::InputRange, piece, Span { first, last: piece.iova.last });
            }
        }
    }

    fn lose(&mut self, loss: Loss, piece: &Piece, part: Span) {
        let example = Piece { iova: part, address: piece.address + (part.first - piece.iova.first), ..*piece };
        self.losses.add(loss, || example, 1, u128::from(part.length_minus_one()) + 1);
    }

    fn keep(&mut self, table: HostTable) -> u32 {
        match self.free.pop() {
            Some(index) => {
                self.tables[index as usize] = Some(table);
                index
            }
            None => {
                self.tables.push(Some(table));
                (self.tables.len() - 1) as u32
            }
        }
    }

    /// Makes the changes in the part of a table that `place` says.
    fn update(&mut self, id: u32, place: Place<'_>, unmaps: &[Change], maps: &[Change]) {
        let mut slots = place.slots(unmaps, maps);
        loop {
            let looks_at_marks = self.looks_at_marks();
            let Some(table) = self.tables.get_mut(id as usize).and_then(Option::as_mut) else { return };
            if !looks_at_marks {
                let (leaves, losses, memory) = (&mut self.plan.leaves, &mut self.losses, &mut self.memory);
                let (chain, number, depth) = (place.chain, place.number, place.depth);
                Writer { chain, number, depth, leaves, losses, memory, layout: self.layout }.exchange(table, &mut slots);
            }
            let Some((index, slot, unmaps, maps)) = slots.next() else { return };
            let Some(mut table) = self.tables[id as usize].take() else { return };
            self.change(&mut table, index, place.at(slot), unmaps, maps);
            self.tables[id as usize] = Some(table);
        }
    }

    /// Makes the changes in one slot; `slot` has the part of it that can be mapped.
    fn change(&mut self, table: &mut HostTable, index: u64, slot: Place<'_>, unmaps: &[Change], maps: &[Change]) {
        let old = table.slots[index as usize];
        if unmaps.is_empty() && matches!(old, Slot::Leaf(_)) {
            return; // offered again, and there
        }
        if let [Change::Map(piece)] = maps
            && let Some(entry) = self.leaf(slot, piece)
        {
            return self.set(table, slot, index, entry.0, entry.1);
        }
        let absent = slot.chain.rungs[slot.depth].absent;
        match old {
            Slot::Table(below) if !(maps.is_empty() && covers(unmaps, slot.whole())) => {
                self.update(below, slot.below(), unmaps, maps);
                if self.tables[below as usize].as_ref().is_none_or(|below| below.live == 0) {
                    self.set(table, slot, index, Slot::Absent, absent);
                }
            }
            _ => match self.build(slot, maps) {
                Some((below, entry)) => self.set(table, slot, index, Slot::Table(below), entry),
                None if old != Slot::Absent => self.set(table, slot, index, Slot::Absent, absent),
                None => {}
            },
        }
    }

    /// One store, and what it took away.
    fn set(&mut self, table: &mut HostTable, place: Place<'_>, index: u64, mut slot: Slot, entry: u64) {
        let old = table.slots[index as usize];
        if matches!(old, Slot::Leaf(_)) && self.log.is_some() || old != Slot::Absent && self.keeps_marks {
            let used = self.replace(table, place, index, entry);
            if self.keeps_marks {
                self.soil(&mut slot, used, place.whole());
            }
        } else {
            self.memory.store(table.address, self.layout, index, entry);
        }
        table.slots[index as usize] = slot;
        table.live = table.live + u64::from(slot != Slot::Absent) - u64::from(old != Slot::Absent);
        if let Slot::Table(below) = old {
            self.retire(below, place.number, place.depth + 1);
        }
    }

    /// Nothing leads to a table any more, nor to what is below it.
    fn retire(&mut self, id: u32, chain: usize, depth: usize) {
        let Some(table) = self.tables.get_mut(id as usize).and_then(Option::take) else { return };
        self.free.push(id);
        self.near = None;
        self.needed.tables = true;
        for slot in &table.slots {
            if let Slot::Table(below) = slot {
                self.retire(*below, chain, depth + 1);
            }
        }
        self.retired.push(Retired { table, chain, depth });
    }

    fn leaf(&mut self, slot: Place<'_>, piece: &Piece) -> Option<(Slot, u64)> {
        leaf(&mut self.plan.leaves, &mut self.losses, slot, piece)
    }

    /// Makes and fills the table that shows what `maps` has in a slot: the table and the entry that points to it. None: there is nothing that it could show.
    fn build(&mut self, slot: Place<'_>, maps: &[Change]) -> Option<(u32, u64)> {
        if maps.is_empty() {
            return None;
        }
        // What no page can show is lost here and now: it may be larger than anybody could go through page by page.
        if let [Change::Map(piece)] = maps
            && self.is_lost(slot, piece)
        {
            return None;
        }
        if slot.depth + 1 >= slot.chain.rungs.len() {
            maps.iter().filter_map(piece_of).for_each(|piece| self.lose_in(slot, piece, Loss::Granule));
            return None;
        }
        if self.full {
            self.refuse(slot, maps);
            return None;
        }
        let place = slot.below();
        let rung = &slot.chain.rungs[place.depth];
        let mut entries = vec![rung.absent; rung.entries as usize];
        let mut kept = vec![Slot::Absent; rung.entries as usize];
        let mut live = 0;
        let mut slots = place.slots(&[], maps);
        while let Some((index, span, _, maps)) = slots.next() {
            let inner = place.at(span);
            let leaf = if let [Change::Map(piece)] = maps { self.leaf(inner, piece) } else { None };
            let (new, entry) = match leaf {
                Some(leaf) => leaf,
                None => match self.build(inner, maps) {
                    Some((below, entry)) => (Slot::Table(below), entry),
                    None => continue,
                },
            };
            (kept[index as usize], entries[index as usize]) = (new, entry);
            live += 1;
        }
        if live == 0 {
            return None;
        }
        let bytes = slot.chain.bytes(place.depth);
        let address = self.memory.allocate(bytes);
        let linked = address.and_then(|address| Some((address, slot.chain.rungs[slot.depth].link(address.0)?)));
        let Some((address, entry)) = linked else {
            // Nobody saw what is below: it can be used again at once.
            self.full = true;
            self.refuse(slot, maps);
            if let Some(address) = address {
                self.memory.release(address, bytes);
            }
            kept.iter().for_each(|slot| self.give_back(*slot));
            return None;
        };
        self.memory.fill(address, self.layout, &entries);
        let table = HostTable { address, bytes, slots: kept.into_boxed_slice(), live };
        Some((self.keep(table), entry))
    }

    /// There is no memory for a table that shows `maps` in a slot.
    fn refuse(&mut self, slot: Place<'_>, maps: &[Change]) {
        self.without_memory += maps.len() as u64;
        self.released = false;
        if let (Some(first), Some(last)) = (maps.first(), maps.last())
            && let Some(part) = (Span { first: first.span().first, last: last.span().last }).intersection(slot.span)
        {
            self.refused.add(part);
        }
    }

    /// Frees a table that was never linked.
    fn give_back(&mut self, slot: Slot) {
        let Slot::Table(id) = slot else { return };
        let Some(table) = self.tables.get_mut(id as usize).and_then(Option::take) else { return };
        self.free.push(id);
        self.memory.release(table.address, table.bytes);
        table.slots.iter().for_each(|slot| self.give_back(*slot));
    }

    /// Whether not even the smallest page can show any byte that a piece has in a slot; it is counted if so.
    fn is_lost(&mut self, slot: Place<'_>, piece: &Piece) -> bool {
        let Some(part) = piece.iova.intersection(slot.span) else { return true };
        let Some(leaves) = self.plan.leaves.of(slot.chain, slot.number, piece.attributes) else {
            self.format_failures += 1;
            self.unanswered.add(part);
            self.asks_again = false;
            return true;
        };
        let smallest = leaves.iter().zip(&slot.chain.rungs).filter_map(|(leaf, rung)| Some((&leaf.as_ref()?.0, rung.lsb))).next_back();
        let address = piece.address + (part.first - piece.iova.first);
        let loss = match smallest {
            None => Loss::Permission,
            Some((_, size)) if (part.first ^ address) & low_bits(size) != 0 => Loss::Granule,
            Some((leaf, size)) if !leaf.reaches(address & !low_bits(size), size) => Loss::OutputRange,
            Some(_) => return false,
        };
        self.lose_in(slot, piece, loss);
        true
    }

    fn lose_in(&mut self, slot: Place<'_>, piece: &Piece, loss: Loss) {
        if let Some(part) = piece.iova.intersection(slot.span) {
            self.lose(loss, piece, part);
        }
    }
}

/// A table, and what it serves.
#[derive(Clone, Copy, Debug)]
struct Near {
    id: u32,
    chain: usize,
    depth: usize,
    /// IOVA of entry 0.
    base: u64,
    span: Span,
}

/// A [`NestedTable`] with somebody who invalidates, as a sink.
#[derive(Debug)]
pub struct Nested<M, C> {
    table: NestedTable<M>,
    committer: C,
}

impl<M: TableMemory, C: Committer> Nested<M, C> {
    /// Joins the two.
    pub const fn new(table: NestedTable<M>, committer: C) -> Self {
        Self { table, committer }
    }

    /// The table.
    pub const fn table(&self) -> &NestedTable<M> {
        &self.table
    }

    /// Whoever invalidates.
    pub const fn committer(&mut self) -> &mut C {
        &mut self.committer
    }

    /// As [`NestedTable::track_accessed`].
    pub fn track_accessed(&mut self, on: bool) {
        self.table.track_accessed(on);
    }

    /// As [`NestedTable::take_gone`].
    pub fn take_gone(&mut self) -> Vec<Marked> {
        self.table.take_gone()
    }
}

impl<M: TableMemory, C: Committer> Sink for Nested<M, C> {
    fn apply(&mut self, batch: &[Change]) {
        self.table.apply(batch);
    }

    fn commit(&mut self) -> Result<(), CommitError> {
        self.table.begins = false;
        if !self.table.needed.is_empty() {
            self.committer.invalidate(&self.table.needed)?;
        }
        self.table.completed();
        Ok(())
    }

    fn wants(&self) -> Option<Span> {
        self.table.wants()
    }

    fn lacks(&self) -> bool {
        self.table.wants().is_some() || !self.table.unanswered().is_empty()
    }

    fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.table.offer(span, pieces);
    }

    fn remap(&mut self, batch: &[Change]) {
        self.table.remap(batch);
    }

    fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        self.table.marks(span, each);
    }

    fn track_dirty(&mut self, on: bool) -> bool {
        self.table.track_dirty(on)
    }

    fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        self.table.dirty(targets, clear, each);
    }
}
