//! Marks that hardware set in a host table: which leaves were accessed, and which were written through.
//!
//! A leaf that hardware marks is written clean, and its entry tells. Of one whose writes the format cannot mark, or not with these attributes, every byte counts as
//! written; of one that the guest has marked as accessed, or whose accesses hardware does not mark, as accessed. A mark must not get lost: where a leaf is replaced whose
//! entry the guest has not touched, its last entry is looked at, and what takes its place keeps the mark. For the log of writes, a table that goes is looked at once more
//! when no walk is in it any longer.

use crate::sync::marks::Marked;
use crate::sync::nested::slots::Place;
use crate::sync::nested::{HostTable, NestedTable, Slot, TableMemory};
use crate::sync::spans::Spans;
use crate::table::{Level, Mark, Rung};
use crate::{Change, Gpa, Span};

/// How it is known whether a leaf was written through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    /// It cannot be.
    Never,
    /// Hardware marks the entry at the first write.
    Marked,
    /// Nobody knows: it counts as written.
    Unseen,
}

/// What a leaf's marks tell, besides what stands in its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tracks {
    /// Hardware marks the first access; otherwise it counts as accessed.
    pub(super) accessed: bool,
    pub(super) writes: Writes,
    /// What stood here before for the same entry of the guest's was marked as accessed.
    pub(super) was_accessed: bool,
    /// The same of writes; or it was marked, and the mark was taken away again.
    pub(super) was_dirty: bool,
}

/// What is known of a leaf that goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) accessed: bool,
    pub(super) dirty: bool,
}

impl Tracks {
    /// Whether it was written through since the mark was last taken away.
    fn is_written(self, level: &Level, entry: u64) -> bool {
        match self.writes {
            Writes::Never => false,
            Writes::Marked => level.dirty.is_set(entry),
            Writes::Unseen => true,
        }
    }

    fn of(self, iova: Span, level: &Level, entry: u64) -> Marked {
        let accessed = !self.accessed || self.was_accessed || level.accessed.is_set(entry);
        Marked { iova, accessed, dirty: self.was_dirty || self.is_written(level, entry) }
    }
}

/// A table that nothing leads to any more, and where it was.
#[derive(Debug)]
pub(super) struct Retired {
    pub(super) table: HostTable,
    pub(super) chain: usize,
    pub(super) depth: usize,
}

/// A leaf and where its entry stands.
#[derive(Clone, Copy)]
struct LeafAt<'a> {
    rung: &'a Rung,
    iova: Span,
    id: u32,
    table: Gpa,
    index: u64,
    tracks: Tracks,
}

impl<M: TableMemory> NestedTable<M> {
    /// Writes leaves that nobody accessed without the mark from now on, or with it, where hardware sets it: what is accessed is then told by [`NestedTable::marks`]. Leaves that
    /// were written with the mark, and all where the format has none, count as accessed. Only for hardware that can write into tables.
    pub fn track_accessed(&mut self, on: bool) {
        self.plan.leaves.take_accessed(on);
    }

    /// What was marked of leaves that [`NestedTable::remap`] has taken away since the last call, and that nothing has taken the place of.
    pub fn take_gone(&mut self) -> Vec<Marked> {
        std::mem::take(&mut self.gone)
    }

    /// As [`Sink::track_dirty`](crate::sync::Sink::track_dirty) says.
    pub fn track_dirty(&mut self, on: bool) -> bool {
        if !self.geometry().levels.iter().any(|level| level.dirty.exists()) {
            return false;
        }
        self.plan.leaves.takes_dirty = on;
        self.log = if on { self.log.take().or_else(|| Some(Spans::up_to(LOG))) } else { None };
        self.begins = on;
        true
    }

    /// As [`Sink::marks`](crate::sync::Sink::marks) says. The cost is that of one load for each leaf of the span.
    pub fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        self.each_leaf(span, &mut |leaf| {
            let entry = self.memory.load(leaf.table, self.layout, leaf.index);
            let marked = leaf.tracks.of(leaf.iova, self.plan.level(leaf.rung), entry);
            if marked.accessed || marked.dirty {
                each(marked);
            }
        });
    }

    /// As [`Sink::dirty`](crate::sync::Sink::dirty) says. The cost is that of one load for each writable leaf of the whole table.
    pub fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        if let Some(log) = &mut self.log {
            log.as_slice().iter().filter_map(|span| span.intersection(targets)).for_each(&mut *each);
            if clear {
                log.remove(targets);
            }
        }
        let mut marked = Vec::new();
        self.each_leaf(Span::ALL, &mut |leaf| {
            if leaf.tracks.writes == Writes::Never {
                return;
            }
            let (level, entry) = (self.plan.level(leaf.rung), self.memory.load(leaf.table, self.layout, leaf.index));
            let target = self.plan.address(leaf.rung, entry);
            let Some(part) = target.intersection(targets).filter(|_| leaf.tracks.is_written(level, entry)) else { return };
            each(part);
            // What is beyond the span is told when somebody asks for it.
            if clear && part == target && leaf.tracks.writes == Writes::Marked {
                marked.push((leaf.id, leaf.index, leaf.iova, level.dirty));
            }
        });
        marked.iter().for_each(|(id, index, _, mark)| self.clean(*id, *index, *mark));
        self.needed.add(marked.iter().map(|(_, _, iova, _)| *iova));
    }

    /// Takes the mark away, and remembers it.
    fn clean(&mut self, id: u32, index: u64, mark: Mark) {
        let Some(table) = self.tables.get_mut(id as usize).and_then(Option::as_mut) else { return };
        let mut entry = self.memory.load(table.address, self.layout, index);
        loop {
            let stood = self.memory.compare_exchange(table.address, self.layout, index, entry, mark.taken(entry));
            if stood == entry {
                break;
            }
            entry = stood;
        }
        if let Slot::Leaf(tracks) = &mut table.slots[index as usize] {
            tracks.was_dirty = true;
        }
    }

    /// Makes the changes of a batch of which the guest's entries do not know, as [`Sink::remap`](crate::sync::Sink::remap) says.
    pub fn remap(&mut self, batch: &[Change]) {
        self.keeps_marks = true;
        self.apply(batch);
        self.keeps_marks = false;
    }

    /// Writes an entry where something was, and looks what hardware had marked up to then.
    pub(super) fn replace(&mut self, table: &HostTable, place: Place<'_>, index: u64, entry: u64) -> Used {
        let mut old = self.memory.load(table.address, self.layout, index);
        loop {
            let stood = self.memory.compare_exchange(table.address, self.layout, index, old, entry);
            if stood == old {
                break;
            }
            old = stood;
        }
        let tracks = match table.slots[index as usize] {
            Slot::Leaf(tracks) => tracks,
            // Walks may be in a table until the invalidation: what was used of one in which something is counts as all of it.
            Slot::Table(below) => {
                let is_empty = self.tables.get(below as usize).and_then(Option::as_ref).is_none_or(|below| below.live == 0);
                return Used { accessed: !is_empty, dirty: !is_empty };
            }
            Slot::Absent => return Used { accessed: false, dirty: false },
        };
        let rung = &place.chain.rungs[place.depth];
        let written = tracks.is_written(self.plan.level(rung), old);
        let Marked { accessed, dirty, .. } = tracks.of(Span::ALL, self.plan.level(rung), old);
        let is_old = self.begins && self.keeps_marks;
        if let Some(log) = self.log.as_mut().filter(|_| written && !is_old) {
            log.add(self.plan.address(rung, old));
        }
        Used { accessed, dirty }
    }

    /// A leaf, or all leaves of a table, stand where others were that were used, or nothing does: at `iova`.
    pub(super) fn soil(&mut self, slot: &mut Slot, used: Used, iova: Span) {
        match slot {
            // Too many are one too many marks, not one too few.
            Slot::Absent if !used.accessed && !used.dirty => {}
            Slot::Absent if self.gone.len() >= GONE => {
                let first = self.gone.iter().fold(iova.first, |first, gone| first.min(gone.iova.first));
                let last = self.gone.iter().fold(iova.last, |last, gone| last.max(gone.iova.last));
                self.gone = vec![Marked { iova: Span { first, last }, accessed: true, dirty: true }];
            }
            Slot::Absent => self.gone.push(Marked { iova, accessed: used.accessed, dirty: used.dirty }),
            Slot::Leaf(tracks) => {
                tracks.was_accessed |= used.accessed;
                tracks.was_dirty |= used.dirty;
            }
            Slot::Table(id) => {
                let Some(mut table) = self.tables.get_mut(*id as usize).and_then(Option::take) else { return };
                // What is absent there has no part in it.
                table.slots.iter_mut().filter(|slot| **slot != Slot::Absent).for_each(|slot| self.soil(slot, used, iova));
                self.tables[*id as usize] = Some(table);
            }
        }
    }

    /// No walk is in a table any more: what was written through it up to now is all.
    pub(super) fn note_retired(&mut self, retired: &Retired) {
        let Some(mut log) = self.log.take() else { return };
        let rung = &self.plan.chains[retired.chain].rungs[retired.depth];
        for (index, slot) in retired.table.slots.iter().enumerate() {
            let Slot::Leaf(tracks) = slot else { continue };
            let entry = self.memory.load(retired.table.address, self.layout, index as u64);
            if tracks.is_written(self.plan.level(rung), entry) {
                log.add(self.plan.address(rung, entry));
            }
        }
        self.log = Some(log);
    }

    fn each_leaf(&self, span: Span, each: &mut dyn FnMut(LeafAt<'_>)) {
        for window in &self.plan.windows {
            if let Some(span) = window.span.intersection(span) {
                let place = Place { chain: &self.plan.chains[window.chain], number: window.chain, depth: 0, base: window.base, span };
                self.leaves_in(self.roots[window.chain], place, each);
            }
        }
    }

    fn leaves_in(&self, id: u32, place: Place<'_>, each: &mut dyn FnMut(LeafAt<'_>)) {
        let Some(table) = self.tables.get(id as usize).and_then(Option::as_ref) else { return };
        let rung = &place.chain.rungs[place.depth];
        for index in (place.span.first - place.base) >> rung.lsb..=(place.span.last - place.base) >> rung.lsb {
            let iova = Span::of_log2(place.base + (index << rung.lsb), rung.lsb);
            match table.slots[index as usize] {
                Slot::Absent => {}
                Slot::Leaf(tracks) => each(LeafAt { rung, iova, id, table: table.address, index, tracks }),
                Slot::Table(below) => {
                    if let Some(part) = iova.intersection(place.span) {
                        self.leaves_in(below, place.at(part).below(), each);
                    }
                }
            }
        }
    }
}

/// Leaves that are gone, before they are told as one.
const GONE: usize = 4096;
/// Separate spans of guest memory that the log of leaves that went has, before it has more than was written.
const LOG: usize = 4096;
