//! The fast way of building: runs of leaves that are written as they come, many at a time.
//!
//! It is for leaves as large as the target's slots, a few times larger, or a few times smaller where they make up the target's pages without a gap. Everything
//! else goes one piece after the other, and the table is the same.

use std::sync::Arc;

use crate::memory::{EntryLayout, PAGE};
use crate::table::arena::write_entry;
use crate::table::build::{BuildError, Builder, Leaf, low_bits, note, note_table};
use crate::table::geometry::{AddressField, ByteOrder, Move};
use crate::table::lanes;
use crate::table::leaves::{Piece, Run};
use crate::table::passage::{Merged, Receiver};
use crate::table::recode::{self, Form, Group, Passed};
use crate::table::stage::is_staged;
use crate::{Attributes, Iova, Span};

/// A leaf that becomes more leaves than this, or of which a page needs more, takes the slow way.
const MAX_SPLIT_LOG2: u8 = recode::MAX_PARTS.trailing_zeros() as u8;

/// The first part of a table is large if so many like it fill the table.
const PARTS_OF_TABLE: u64 = 4;

/// How runs of leaves of one size, of one or two kinds, are written.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The size of the leaves, and what they allow.
    from: (u8, [Attributes; 2]),
    /// Where their addresses are.
    field: AddressField,
    window: usize,
    depth: usize,
    /// The size of the target's slots, and how many of them a leaf fills.
    slot: u8,
    split_log2: u8,
    table_entries: u64,
    absent: u64,
    /// The last byte that the target's pages can lead to.
    farthest: u64,
    /// The same for addresses that move so: bits that none of them had were left out.
    last_address: u64,
    /// How addresses move.
    moves: Vec<Move>,
    /// What is added for each of the slots that a leaf fills.
    parts: Vec<u64>,
    lines: Vec<([u64; 8], [u64; 8])>,
    /// Addresses stay where they are, and so do their bytes.
    in_place: bool,
    /// Larger pages than these that the same table may have.
    larger: Option<Larger>,
    leaves: [Arc<Leaf>; 2],
}

/// Where entries were written that may be of no use.
#[derive(Clone, Copy, Debug)]
pub(super) struct Upcoming {
    /// The table, which may not be handed out yet, and its size.
    offset: u64,
    bytes: u64,
    /// The size of the pages.
    page: u8,
    past_cache: bool,
}

/// How leaves that are smaller than the target's pages make up such pages.
#[derive(Debug)]
pub(super) struct Merging {
    /// The size of the leaves.
    from: u8,
    /// Where their addresses are.
    field: AddressField,
    /// The size of the pages.
    page: u8,
    group: Group,
}

/// The next larger pages that the same table may have, of several of the leaves each.
#[derive(Clone, Copy, Debug)]
struct Larger {
    /// Leaves in the smallest such page.
    group: usize,
    /// Address bits below it, in the source's entries.
    below: u64,
    /// The address bit that tells the second leaf of the page from the first.
    next: u64,
}

impl Prepared {
    /// How entries are written.
    fn form(&self, layout: EntryLayout, past_cache: bool) -> Form<'_> {
        let [leaf, other] = &self.leaves;
        Form {
            moves: &self.moves,
            patterns: [leaf.pattern, other.pattern],
            absent: self.absent,
            parts: &self.parts,
            lines: &self.lines,
            narrow: layout.bytes == 4,
            big: layout.order == ByteOrder::Big,
            in_place: self.in_place,
            past_cache,
        }
    }

    /// Whether a larger page may begin anywhere, in slots of one table that begin and end where larger pages do.
    fn has_larger(&self, entries: &[u64], field: &AddressField) -> bool {
        self.larger.is_some_and(|larger| lanes::any_in_a_row(entries, larger.group, larger.below, larger.next, field.entry_mask))
    }

    fn serves(&self, run: &Run<'_>) -> bool {
        let (size_log2, [first, second]) = self.from;
        let attributes = run.kinds.attributes();
        size_log2 == run.size_log2 && first == attributes[0] && (second == attributes[1] || run.kinds.is_one()) && self.field == *run.field
    }

    /// Bits of addresses were left out that `run` may have.
    const fn falls_short(&self, run: &Run<'_>) -> bool {
        run.within.last > self.last_address && run.within.last <= self.farthest
    }
}

impl Builder<'_> {
    /// Leaves as large as the target's slots, or a few times larger or smaller, and one or two patterns for all of them.
    pub(super) fn map_run(&mut self, run: &Run<'_>) -> Result<(), BuildError> {
        let span = Span { first: run.iova.0, last: run.iova.0 + ((run.entries.len() as u64) << run.size_log2).wrapping_sub(1) };
        if self.leaves_out(span) {
            return self.map_pieces(run);
        }
        let known = self.prepared.take_if(|known| known.serves(run) && !known.falls_short(run) && self.windows[known.window].holds(span));
        let prepared = match known {
            Some(known) => known,
            None => match self.prepare(run, span)? {
                Some(prepared) => prepared,
                None => return self.map_merged(run),
            },
        };
        // It is lent out and put back: counting who has it would wait, each time, until all that was written has reached memory.
        let result = self.map_prepared(run, &prepared);
        self.prepared = Some(prepared);
        result
    }

    /// The slow way.
    fn map_pieces(&mut self, run: &Run<'_>) -> Result<(), BuildError> {
        run.pieces().filter(|piece| !piece.attributes.grants_nothing()).try_for_each(|piece| self.map(&piece))
    }

    /// Leaves that are smaller than the target's pages: those that make up whole pages become a run of such pages.
    fn map_merged(&mut self, run: &Run<'_>) -> Result<(), BuildError> {
        let known = self.merging.take_if(|known| known.from == run.size_log2 && known.field == *run.field);
        let Some(merging) = known.or_else(|| self.prepare_merging(run)) else { return self.map_pieces(run) };
        let mut merged = std::mem::take(&mut self.merged);
        let result = self.map_whole_pages(run, &merging, &mut merged);
        self.merged = merged;
        self.merging = Some(merging);
        result
    }

    /// How leaves like these make up the target's smallest pages; none: not a few of them do.
    fn prepare_merging(&self, run: &Run<'_>) -> Option<Box<Merging>> {
        let smallest = self.chains.iter().filter_map(|chain| chain.sizes.last()).map(|(size, _)| *size).min()?;
        let merge_log2 = smallest.checked_sub(run.size_log2).filter(|log2| (1..=MAX_SPLIT_LOG2).contains(log2))?;
        let parts = (0..1 << merge_log2).map(|part| run.field.insert(part << run.size_log2)).collect::<Option<Vec<u64>>>()?;
        let group = Group::new(parts, bits_below(run.field, smallest));
        Some(Box::new(Merging { from: run.size_log2, field: run.field.clone(), page: smallest, group }))
    }

    fn map_whole_pages(&mut self, run: &Run<'_>, merging: &Merging, merged: &mut Vec<u64>) -> Result<(), BuildError> {
        let (page, group) = (merging.page, &merging.group);
        // What stands before the first whole page, and after the last.
        let before = ((run.iova.0.wrapping_neg() & low_bits(page)) >> run.size_log2) as usize;
        let count = run.entries.len().saturating_sub(before) & !(group.len() - 1);
        if count == 0 || !recode::merge(&run.entries[before..before + count], run.kinds, group, merged) {
            return self.map_pieces(run);
        }
        let is_leaf = |entry: &u64| !run.kinds.is_gap(*entry);
        let (head, tail) = (&run.entries[..before], &run.entries[before + count..]);
        self.map_part(run, head, run.iova.0)?;
        let first = run.iova.0 + ((before as u64) << run.size_log2);
        // A run begins and ends with a leaf.
        if let (Some(begin), Some(end)) = (merged.iter().position(is_leaf), merged.iter().rposition(is_leaf)) {
            self.map_run(&Run { iova: Iova(first + ((begin as u64) << page)), size_log2: page, entries: &merged[begin..=end], ..*run })?;
        }
        self.map_part(run, tail, first.wrapping_add((count as u64) << run.size_log2))
    }

    /// Some of a run's entries, the slow way.
    fn map_part(&mut self, run: &Run<'_>, entries: &[u64], iova: u64) -> Result<(), BuildError> {
        self.map_pieces(&Run { iova: Iova(iova), entries, ..*run })
    }

    /// How runs like this one are written; none: one piece after the other.
    fn prepare(&mut self, run: &Run<'_>, span: Span) -> Result<Option<Box<Prepared>>, BuildError> {
        let here = self.window.filter(|window| self.windows[*window].holds(span));
        let Some(window) = here.or_else(|| self.windows.iter().position(|window| window.holds(span))) else { return Ok(None) };
        let chain = self.windows[window].chain;
        let sizes = &self.chains[chain].sizes;
        let Some(position) = sizes.iter().position(|(size, _)| *size <= run.size_log2) else { return Ok(None) };
        let (size, depth) = sizes[position];
        let rung = &self.chains[chain].rungs[depth];
        // Where the target has no pages of the source's size, or larger ones than its slots, each leaf fills a few slots.
        let (slot, table_entries, absent) = (rung.lsb, rung.entries, rung.absent);
        let split_log2 = run.size_log2 - slot;
        if split_log2 > MAX_SPLIT_LOG2 || table_entries >> split_log2 == 0 {
            return Ok(None);
        }
        // Larger pages at the same level; and if these are already above their slots, at any: full tables of such are not promoted.
        let larger = sizes[..position].iter().rev().find(|(_, other)| *other == depth || size > slot).map(|(size, _)| *size);
        let larger = match larger {
            Some(larger) => {
                let group = 1_u64.checked_shl(u32::from(larger - run.size_log2)).unwrap_or(u64::MAX);
                let Some(next) = run.field.insert(1 << run.size_log2) else { return Ok(None) };
                let below = bits_below(run.field, larger);
                if group > table_entries >> split_log2 {
                    return Ok(None);
                }
                Some(Larger { group: group as usize, below, next })
            }
            None => None,
        };
        let attributes = run.kinds.attributes();
        let mut leaves = [None, None];
        for (leaf, attributes) in leaves.iter_mut().zip(attributes) {
            let encoding = self.encoding(chain, attributes);
            *leaf = self.ask(encoding, size)?.cloned();
        }
        let [Some(leaf), Some(other)] = leaves else { return Ok(None) };
        if leaf.field != other.field {
            return Ok(None);
        }
        let parts: Option<Vec<u64>> = (0..1 << split_log2).map(|part: u64| leaf.field.insert(part << slot & !low_bits(size))).collect();
        let Some(parts) = parts else { return Ok(None) };
        let lines = recode::lines(&parts);
        let farthest = leaf.last_address.min(other.last_address);
        let (moves, reach) = needed(run.field.to(&leaf.field), run.field, run.within.last);
        let last_address = farthest.min(reach);
        let in_memory_order = self.layout.bytes == 8 && (self.layout.order == ByteOrder::Big) == cfg!(target_endian = "big");
        let in_place = run.field.is_in_place() && moves.iter().all(|one| one.turn == 0) && in_memory_order && split_log2 == 0;
        let (from, field, leaves) = ((run.size_log2, attributes), run.field.clone(), [leaf, other]);
        Ok(Some(Box::new(Prepared {
            from,
            field,
            window,
            depth,
            slot,
            split_log2,
            table_entries,
            absent,
            farthest,
            last_address,
            moves,
            parts,
            lines,
            in_place,
            larger,
            leaves,
        })))
    }

    fn map_prepared(&mut self, run: &Run<'_>, prepared: &Prepared) -> Result<(), BuildError> {
        if run.within.last > prepared.last_address {
            return self.map_pieces(run);
        }
        let Some(larger) = prepared.larger else { return self.map_slots(run, prepared) };
        // What stands before the first place for a larger page, and after the last, may be a part of one with what comes before or after.
        let group = larger.group as u64;
        let before = (((run.iova.0 >> run.size_log2).wrapping_neg() & (group - 1)) as usize).min(run.entries.len());
        let count = (run.entries.len() - before) & !(larger.group - 1);
        let (head, tail) = (&run.entries[..before], &run.entries[before + count..]);
        self.map_part(run, head, run.iova.0)?;
        // A table at a time: where no larger page can begin, there is none.
        let mut done = before;
        while done < before + count {
            let iova = run.iova.0 + ((done as u64) << run.size_log2);
            let slots = (iova - self.windows[prepared.window].base) >> prepared.slot & (prepared.table_entries - 1);
            let room = ((prepared.table_entries - slots) as usize >> prepared.split_log2).max(1);
            let entries = &run.entries[done..before + count][..room.min(before + count - done)];
            let part = Run { iova: Iova(iova), entries, ..*run };
            done += entries.len();
            if prepared.has_larger(entries, run.field) {
                self.map_pieces(&part)?;
            } else {
                self.map_slots(&part, prepared)?;
            }
        }
        self.map_part(run, tail, run.iova.0.wrapping_add(((before + count) as u64) << run.size_log2))
    }

    fn map_slots(&mut self, run: &Run<'_>, prepared: &Prepared) -> Result<(), BuildError> {
        let Prepared { window, depth, slot, split_log2, table_entries, .. } = *prepared;
        self.flush()?;
        let (mut done, mut all_others, mut all_gaps) = (0, 0, 0);
        while done < run.entries.len() {
            let iova = run.iova.0 + ((done as u64) << run.size_log2);
            let below = (iova - self.windows[window].base) >> slot & (table_entries - 1);
            let count = ((table_entries - below) as usize >> split_log2).min(run.entries.len() - done);
            let part = &run.entries[done..done + count];
            done += count;
            if run.kinds.has_gaps() && part.iter().all(|entry| run.kinds.is_gap(*entry)) {
                all_gaps += count as u64;
                continue; // a table with nothing in it is not made
            }
            self.open_to(window, depth, iova)?;
            let index = self.fill_to(depth, iova)?;
            let slots = count << split_log2;
            let (others, gaps) = self.write_slots(part, run, prepared, index as usize, slots);
            self.note_slots(run, part, prepared, index, slots as u64, gaps);
            self.leaves += (count as u64 - gaps) << split_log2;
            all_others += others;
            all_gaps += gaps;
        }
        let narrowing = run.entries.len() as u64 - all_others - all_gaps;
        self.note_run(run, prepared, narrowing, all_others);
        Ok(())
    }

    /// Remembers what `slots` slots of the open table, from `index` on, were filled with.
    fn note_slots(&mut self, run: &Run<'_>, part: &[u64], prepared: &Prepared, index: u64, slots: u64, gaps: u64) {
        let [leaf, other] = &prepared.leaves;
        let [attributes, other_attributes] = prepared.from.1;
        let second = run.kinds.is_second(part[0]);
        let (kind, pattern) = if second { (other_attributes, other.pattern) } else { (attributes, leaf.pattern) };
        let same = |entry: &u64| leaf.pattern == other.pattern || run.kinds.is_second(*entry) == second;
        // Pages above their slots are never promoted: a larger page would have been seen before.
        let plain = run.size_log2 == prepared.slot || prepared.parts.get(1) != Some(&0);
        let contiguous = plain && gaps == 0 && is_contiguous(part, run.field, run.size_log2) && part.iter().all(same);
        let first = run.field.extract(part[0]);
        let next = first.wrapping_add((part.len() as u64) << run.size_log2);
        note(&mut self.open[prepared.depth], index, slots, kind, contiguous.then_some(pattern), first, next);
    }

    /// Notes what the leaves of a run lose, of which so many are of the first and of the second kind.
    fn note_run(&mut self, run: &Run<'_>, prepared: &Prepared, firsts: u64, others: u64) {
        let [leaf, other] = &prepared.leaves;
        if run.kinds.is_one() {
            if !leaf.narrowed.is_empty() {
                let bytes = (run.entries.len() as u128) << run.size_log2;
                self.note_narrowed(leaf, prepared.from.1[0], (run.iova.0, run.field.extract(run.entries[0])), run.entries.len() as u64, bytes);
            }
        } else {
            self.note_kind(run, false, leaf, firsts);
            self.note_kind(run, true, other, others);
        }
    }

    /// Where entries that are expected to be leaves like those of `run` can be written while they are looked at: to the next slots of a table, or to the first
    /// ones of the next table, past the cache if that is large or comes late.
    #[inline(always)]
    pub(super) fn ready_for(&mut self, run: &Run<'_>) -> Option<Receiver<'_>> {
        // What was written in advance before, and not taken, was of no use.
        self.upcoming = None;
        let prepared = self.prepared.as_ref()?;
        // Leaves that are smaller than the target's pages make up some.
        let merging = self.merging.as_ref().filter(|merging| merging.from == run.size_log2 && merging.field == *run.field);
        let merging = merging.filter(|merging| prepared.serves(&Run { size_log2: merging.page, ..*run }));
        let page = merging.map_or(run.size_log2, |merging| merging.page);
        if merging.is_none() && !prepared.serves(run) {
            return None;
        }
        let merge_log2 = page - run.size_log2;
        let window = &self.windows[prepared.window];
        let rung = &self.chains[window.chain].rungs[prepared.depth];
        let first = run.iova.0;
        let last = first.checked_add(((run.entries.len() as u64) << run.size_log2).wrapping_sub(1))?;
        let whole = first & low_bits(page) == 0 && run.entries.len().is_multiple_of(1 << merge_log2);
        if !whole || !window.holds(Span { first, last }) || self.leaves_out(Span { first, last }) || run.within.last > prepared.last_address {
            return None;
        }
        // As many as fit into a table; the others are asked about again.
        let index = (first - window.base) >> prepared.slot & (prepared.table_entries - 1);
        let base = first - (index << prepared.slot);
        let count = (run.entries.len() as u64 >> merge_log2).min((prepared.table_entries - index) >> prepared.split_log2);
        let slots = count << prepared.split_log2;
        // Whole groups that may be larger pages, and whole lines.
        let group = prepared.larger.map_or(1, |larger| larger.group as u64);
        let entry_bytes = u64::from(self.layout.bytes);
        let groups = (first >> page | count).is_multiple_of(group);
        let lines = ((index | slots) * entry_bytes).is_multiple_of(64);
        if count == 0 || !groups || !lines {
            return None;
        }
        // A table that is open and filled where it belongs, or the next one.
        let same = self.window == Some(prepared.window) && self.open.len() > prepared.depth;
        let (offset, past_cache, is_next) = match self.open.get(prepared.depth).filter(|open| same && open.base == base) {
            Some(open) if self.staged[prepared.depth].is_none() && open.filled <= index => (open.offset, open.past_cache, false),
            Some(_) => return None,
            None => {
                let before = self.arena.bytes().saturating_sub(self.before);
                let staged = is_staged(rung.bytes, before);
                if staged && !is_large(slots, prepared.table_entries) || index != 0 || prepared.depth == 0 {
                    return None;
                }
                (self.arena.upcoming(rung.room)?, staged || goes_past_cache(rung.bytes, before), true)
            }
        };
        self.upcoming = Some(Upcoming { offset, bytes: rung.room, page, past_cache });
        let more = low_bits(page) - low_bits(run.size_log2);
        let merging = merging.map(|merging| Merged { group: &merging.group, more, firsts: &mut self.merged });
        let (form, slot, count) = (prepared.form(self.layout, past_cache), index as usize, (count << merge_log2) as usize);
        // Of a whole table with gaps only the lines that have leaves are written, and those that had some.
        let whole = slots == prepared.table_entries && run.kinds.has_gaps() && merging.is_none() && form.is_sparse();
        if past_cache {
            self.stage.expect_writes();
        }
        let (table, written) = self.arena.room_ahead(offset, rung.room, whole && is_next);
        Some(Receiver { form, table, slot, count, merging, written })
    }

    /// Leaves were written where [`Builder::ready_for`] said; false if they are needed elsewhere.
    pub(super) fn map_passed(&mut self, run: &Run<'_>, passed: Passed) -> Result<bool, BuildError> {
        let (Some(upcoming), Some(prepared)) = (self.upcoming, self.prepared.take()) else { return Ok(false) };
        // An error ends the build, and what was lent for it with it. Results are not kept to be returned: see `Judged`.
        let taken = if upcoming.page == run.size_log2 {
            self.take_passed(run, &prepared, upcoming, passed)?
        } else {
            let merged = std::mem::take(&mut self.merged);
            let log2 = upcoming.page - run.size_log2;
            let pages = Run { size_log2: upcoming.page, entries: &merged, ..*run };
            let taken = self.take_passed(&pages, &prepared, upcoming, Passed { others: passed.others >> log2, gaps: passed.gaps >> log2 })?;
            self.merged = merged;
            taken
        };
        self.prepared = Some(prepared);
        if taken {
            self.upcoming = None;
        }
        Ok(taken)
    }

    fn take_passed(&mut self, run: &Run<'_>, prepared: &Prepared, upcoming: Upcoming, passed: Passed) -> Result<bool, BuildError> {
        if prepared.has_larger(run.entries, run.field) {
            return Ok(false);
        }
        if self.take_whole_table(run, prepared, upcoming, passed)? {
            return Ok(true);
        }
        let depth = prepared.depth;
        self.flush()?;
        self.open_to(prepared.window, depth, run.iova.0)?;
        // Whatever was flushed or closed may have taken the place. The table is open now: it must be filled.
        let foreseen = self.open[depth].offset == upcoming.offset;
        if foreseen {
            self.stage.skip(self.staged[depth].take());
            self.open[depth].past_cache = upcoming.past_cache;
        }
        let index = self.fill_to(depth, run.iova.0)?;
        let slots = run.entries.len() << prepared.split_log2;
        let (others, gaps) = match foreseen {
            true => (passed.others, passed.gaps),
            false => self.write_slots(run.entries, run, prepared, index as usize, slots),
        };
        self.note_slots(run, run.entries, prepared, index, slots as u64, gaps);
        let leaves = run.entries.len() as u64 - gaps;
        self.leaves += leaves << prepared.split_log2;
        self.note_run(run, prepared, leaves - others, others);
        Ok(true)
    }

    /// A whole table, which the table above is open for and which is no larger page: it need not be opened to be closed. False: not one of these, and nothing is done.
    #[inline]
    fn take_whole_table(&mut self, run: &Run<'_>, prepared: &Prepared, upcoming: Upcoming, passed: Passed) -> Result<bool, BuildError> {
        let Some(above) = prepared.depth.checked_sub(1) else { return Ok(false) };
        let whole = (run.entries.len() as u64) << prepared.split_log2 == prepared.table_entries;
        let open = self.window == Some(prepared.window) && self.open.len() >= prepared.depth && self.pending.is_none();
        let rungs = &self.chains[self.windows[prepared.window].chain].rungs;
        if !whole
            || !open
            || rungs[prepared.depth].bytes != upcoming.bytes
            || passed.gaps == 0 && starts_in_a_row(run)
            || !self.is_in_open(above, run.iova.0)
        {
            return Ok(false);
        }
        if let Some(open) = self.open.get(prepared.depth) {
            if open.base == run.iova.0 {
                return Ok(false);
            }
            self.close_to(above)?;
            // If that turned out to be one larger page, its place is the next one.
            if self.arena.upcoming(upcoming.bytes) != Some(upcoming.offset) {
                return Ok(false);
            }
        }
        let rungs = &self.chains[self.windows[prepared.window].chain].rungs;
        let (table_field, table_pattern) = (&rungs[above].table_field, rungs[above].table_pattern);
        // What is handed out next stays so until it is asked for.
        let Some(entry) = table_field.insert(self.arena.base() + upcoming.offset).map(|bits| bits | table_pattern) else { return Ok(false) };
        let index = self.fill_to(above, run.iova.0)?;
        let offset = self.arena.claim(upcoming.bytes)?;
        debug_assert_eq!(offset, upcoming.offset, "the table that was said to be the next one");
        if upcoming.past_cache {
            self.stage.skip(None);
        }
        let layout = self.layout;
        write_entry(self.words(above), layout, index as usize, entry);
        note_table(&mut self.open[above], index);
        let leaves = run.entries.len() as u64 - passed.gaps;
        self.leaves += leaves << prepared.split_log2;
        self.note_run(run, prepared, leaves - passed.others, passed.others);
        Ok(true)
    }

    /// Writes leaves into the open table from slot `index`; how many are of the second kind, and how many entries are gaps.
    fn write_slots(&mut self, part: &[u64], run: &Run<'_>, prepared: &Prepared, index: usize, slots: usize) -> (u64, u64) {
        let depth = prepared.depth;
        let narrow = self.layout.bytes == 4;
        // A table needs no page to be filled in if most of it comes in a few large parts: they are written where they belong, past the cache.
        let large = index == 0 && is_large(slots as u64, prepared.table_entries) && (slots * usize::from(self.layout.bytes)).is_multiple_of(64);
        // What has gaps takes longer where that is not done in one pass.
        if large && self.staged[depth].is_some() && (!prepared.in_place || !run.kinds.has_gaps() || recode::has_one_pass()) {
            self.stage.skip(self.staged[depth].take());
            self.open[depth].past_cache = true;
        }
        let past_cache = self.open[depth].past_cache && (!narrow || (index | slots).is_multiple_of(2));
        if past_cache {
            self.stage.skip(None);
        }
        let form = prepared.form(self.layout, past_cache);
        recode::recode(part, run.kinds, self.words(depth), index, &form)
    }

    /// Notes what `count` leaves of one of two kinds lose.
    fn note_kind(&mut self, run: &Run<'_>, second: bool, leaf: &Leaf, count: u64) {
        let example = || {
            let of_kind = |entry: &u64| !run.kinds.is_gap(*entry) && run.kinds.is_second(*entry) == second;
            let index = run.entries.iter().position(of_kind).unwrap_or(0);
            let iova = Span::of_log2(run.iova.0 + ((index as u64) << run.size_log2), run.size_log2);
            Piece { iova, address: run.field.extract(run.entries[index]), attributes: run.kinds.of(run.entries[index]) }
        };
        for loss in leaf.narrowed.iter().filter(|_| count > 0) {
            self.losses.add(*loss, example, count, u128::from(count) << run.size_log2);
        }
    }
}

/// Whether `slots` slots are a large part of a table.
const fn is_large(slots: u64, table_entries: u64) -> bool {
    slots * PARTS_OF_TABLE >= table_entries
}

/// Whether parts of a table of `bytes` bytes are written past the cache as they come: tables of more than a page are not staged.
pub(super) const fn goes_past_cache(bytes: u64, before: u64) -> bool {
    bytes > PAGE && before >= crate::table::stage::IN_PLACE && lanes::STREAMS
}

/// What of `moves`, from entries with `field`, must be done with addresses up to `last`; and the last address for which it is enough.
fn needed(moves: Vec<Move>, field: &AddressField, last: u64) -> (Vec<Move>, u64) {
    let bits_of = |one: &Move| field.extract(one.mask);
    let used = u64::MAX.checked_shr(last.leading_zeros()).unwrap_or(0);
    if moves.iter().all(|one| bits_of(one) & used == 0) {
        return (moves, u64::MAX);
    }
    let (needed, spare): (Vec<Move>, Vec<Move>) = moves.into_iter().partition(|one| bits_of(one) & used != 0);
    let reach = spare.iter().map(|one| !u64::MAX.checked_shl(bits_of(one).trailing_zeros()).unwrap_or(0)).min();
    (needed, reach.unwrap_or(u64::MAX))
}

/// The bits of entries that are address bits below a page of `2^size` bytes.
fn bits_below(field: &AddressField, size: u8) -> u64 {
    field.insert(field.address_mask & low_bits(size)).unwrap_or(0)
}

/// Whether the first two leaves continue each other.
#[inline]
fn starts_in_a_row(run: &Run<'_>) -> bool {
    let [first, second, ..] = run.entries else { return true };
    run.field.extract(*second) == run.field.extract(*first).wrapping_add(1 << run.size_log2)
}

/// Whether the leaves continue each other. Real tables that do not say so in their first two entries.
fn is_contiguous(entries: &[u64], field: &AddressField, size_log2: u8) -> bool {
    let first = field.extract(entries[0]);
    entries.iter().enumerate().skip(1).all(|(index, entry)| field.extract(*entry) == first.wrapping_add((index as u64) << size_log2))
}
