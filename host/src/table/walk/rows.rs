//! Tables that entries side by side lead to. Most are like the one before: these are walked without what only others need.

use crate::memory::{EntryMemory, PAGE};
use crate::table::empty::TableKey;
use crate::table::geometry::AddressField;
use crate::table::leaves::Run;
use crate::table::passage::{ALL, FIRST, Misses, Passing, SECOND, Usual};
use crate::table::recode::Judged;
use crate::table::remember::Remembered;
use crate::table::visit::{Cause, Step, Visitor};
use crate::table::walk::{BUFFER, Buffer, LastRead, Place, WalkError, Walker, charge_table, tables_ahead};
use crate::{Gpa, Iova, Span};

/// Entries of 8 bytes in a page.
const ENTRIES: usize = (PAGE / 8) as usize;

/// Entries side by side in a table, all of whose slots are wanted.
#[derive(Clone, Copy)]
pub(super) struct Pointers<'a> {
    /// Index of the first.
    pub(super) index: u64,
    pub(super) entries: &'a [u64],
    /// What the format said of the first, and where such entries have their address.
    pub(super) known: &'a Remembered,
    pub(super) field: &'a AddressField,
    /// Each has `2^slot_log2` bytes of IOVAs.
    pub(super) slot_log2: u8,
}

impl<M: EntryMemory + ?Sized, V: Visitor> Walker<'_, M, V> {
    /// Walks the tables that `pointers` lead to, if they are a page each, from the first on while they are like the last table and the visitor receives them as they are
    /// read; how many these are. The last of them may be another, and was told of as any is. `first` is where the first one is, and `exists` which entries of each exist.
    #[inline(never)]
    pub(super) fn tables_in_a_row(&mut self, first: Place, pointers: Pointers<'_>, exists: (u64, u64)) -> Result<usize, WalkError> {
        let Some(usual) = self.usual_of(&first, pointers.slot_log2, exists).copied() else { return Ok(0) };
        if self.layout.bytes != 8 || self.table_bytes(first.level) != PAGE {
            return Ok(0);
        }
        let mut buffer = self.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])));
        let result = self.usual_tables(first, pointers, exists, &usual, &mut buffer.0[..ENTRIES]);
        self.buffers.push(buffer);
        result
    }

    /// What tables like `first` are expected to be, if they fill their slots of `2^slot_log2` bytes and are probably like the last one.
    #[inline]
    fn usual_of(&self, first: &Place, slot_log2: u8, exists: (u64, u64)) -> Option<&Usual> {
        let level = self.plan.levels.get(usize::from(first.level))?;
        let fill = level.index_lsb + level.index_bits == slot_log2 && exists.0 == 0 && exists.1 >= level.entries() - 1;
        let is_usual = |usual: &&Usual| (usual.level, usual.inherited) == (first.level, first.inherited);
        self.usual.as_ref().filter(is_usual).filter(|_| fill && !self.misses.are_skipped())
    }

    /// See [`Self::tables_in_a_row`].
    #[inline(always)]
    fn usual_tables(
        &mut self,
        first: Place,
        pointers: Pointers<'_>,
        exists: (u64, u64),
        usual: &Usual,
        entries: &mut [u64],
    ) -> Result<usize, WalkError> {
        let plan = self.plan;
        let level = &plan.levels[usize::from(first.level)];
        let Pointers { known, field, slot_log2, .. } = pointers;
        let (memory, layout, size_log2) = (self.memory, self.layout, level.index_lsb);
        let (leaf_field, kinds, within) = (level.field(usual.shape), usual.expected.pattern.kinds, usual.within);
        for (done, pointer) in pointers.entries.iter().enumerate() {
            let (table, base) = (field.extract(*pointer), first.base + ((done as u64) << slot_log2));
            let key = TableKey { level: first.level, table, inherited: first.inherited, exists };
            let plain = pointer & known.mask == known.pattern && self.output.contains(table) && table.is_multiple_of(PAGE);
            if !plain || self.empties.has(&key) {
                return Ok(done);
            }
            let Ok(region) = self.region(table, ENTRIES) else { return Ok(done) };
            self.announce();
            let run = Run { iova: Iova(base), size_log2, entries, field: leaf_field, kinds, within };
            let mut receiver = self.visitor.receive(&run);
            let receiver = receiver.as_mut().filter(|receiver| receiver.count >= ENTRIES);
            let Some(mut passing) = receiver.and_then(|receiver| Passing::new(receiver, usual, ENTRIES)) else {
                // Up to here nothing was read or charged for, and the visitor was told that something will be: others can begin anew.
                self.announced = true;
                return Ok(done);
            };
            charge_table(self.budget, self.stage)?;
            let [next, second] = tables_ahead(&pointers.entries[done + 1..], PAGE, known, field);
            if let Some(last) = &self.last_read {
                last.expect((table, next), PAGE, FIRST..SECOND);
            }
            let nearby = memory.read_entries_passing(Gpa(table), layout, entries, &mut passing);
            let mut judged = passing.judged;
            if let Ok(nearby) = nearby {
                self.last_read = Some(LastRead { address: table, region, nearby });
            }
            let before = self.told;
            if nearby.is_ok()
                && let Some(passed) = judged.and_then(Judged::passed)
                && passed.gaps < ENTRIES as u64
                && ENTRIES as u64 - passed.gaps <= self.budget.leaves_left()
            {
                self.expect((table, next), PAGE, SECOND..ALL);
                let run = Run { iova: Iova(base), size_log2, entries, field: leaf_field, kinds, within };
                if self.visitor.received(&run, passed)? {
                    self.misses = Misses::default();
                    self.budget.charge_leaves(ENTRIES as u64 - passed.gaps)?;
                    self.told += 1;
                    self.expect((next, second), PAGE, 0..FIRST);
                    continue;
                }
                // They are of no use as they were written, and nobody needs to try it again.
                judged = Some(Judged::UNLIKE);
            }
            self.set_step(pointers.index + done as u64, Some(*pointer));
            let (number, inherited) = (level.number, first.inherited);
            self.path.push(Step { level: first.level, number, table: Gpa(table), index: 0, entry: None, inherited });
            let place = Place { table, base, ..first };
            let here = Span { first: base, last: base + ((1 << slot_log2) - 1) };
            let result = self.after_reading((place, 0), table, entries, here, nearby.map(|_| judged).map_err(|_| Cause::Missing), [next, second]);
            self.path.pop();
            if self.told == before {
                self.empties.add(key);
            }
            return result.map(|()| done + 1);
        }
        Ok(pointers.entries.len())
    }

    /// How many of `entries` lead to small tables that stand side by side in one page of memory, fill their slots of `2^slot_log2` bytes, and are probably like the
    /// last; these are better read together. `first` is the first of them.
    #[inline(never)]
    pub(super) fn side_by_side(&self, first: Place, entries: &[u64], known: &Remembered, slot_log2: u8, exists: (u64, u64)) -> usize {
        let Some(above) = self.path.last().map(|step| step.level) else { return 1 };
        let bytes = self.table_bytes(first.level);
        let room = (PAGE - first.table % PAGE) / bytes;
        if self.stage != 1
            || room < 2
            || self.usual_of(&first, slot_log2, exists).is_none()
            || !first.table.is_multiple_of(u64::from(self.layout.bytes))
        {
            return 1;
        }
        let field = self.plan.levels[usize::from(above)].field(known.shape);
        let most = room.min(self.budget.tables_left()) as usize;
        let follows = |(index, entry): (usize, &u64)| {
            let table = first.table + index as u64 * bytes;
            let key = TableKey { level: first.level, table, inherited: first.inherited, exists };
            *entry & known.mask == known.pattern && field.extract(*entry) == table && self.output.contains(table) && !self.empties.has(&key)
        };
        entries.iter().enumerate().take(most).take_while(|next| follows(*next)).count()
    }

    /// Walks the tables that `pointers` lead to, which stand [side by side](Self::side_by_side) and are read at once. False: they cannot be.
    #[inline(never)]
    pub(super) fn tables_together(&mut self, first: Place, pointers: &[u64], exists: (u64, u64)) -> Result<bool, WalkError> {
        let level = &self.plan.levels[usize::from(first.level)];
        let (number, lsb, each, count) = (level.number, level.index_lsb, level.entries() as usize, pointers.len());
        let first_index = self.path.last().map_or(0, |step| step.index);
        let mut buffer = self.buffers.pop().unwrap_or_else(|| Box::new(Buffer([0; BUFFER])));
        let entries = &mut buffer.0[..each * count];
        let (length, [next, second]) = (entries.len() as u64 * u64::from(self.layout.bytes), first.ahead);
        self.expect((first.table, next), length, FIRST..SECOND);
        if self.read(first.table, entries).is_err() {
            self.buffers.push(buffer);
            return Ok(false);
        }
        (0..count).for_each(|_| self.announce());
        self.budget.charge_tables(count as u64)?;
        self.expect((first.table, next), length, SECOND..ALL);
        let span = Span { first: first.base, last: first.base + (((entries.len() as u64) << lsb) - 1) };
        let told = self.pass(first, 0, entries, span, None)?;
        self.expect((next, second), length, 0..FIRST);
        // What is not like the last is told of table by table.
        for (index, entries) in entries.chunks_exact(each).enumerate().skip(told / each) {
            let table = first.table + (index * each) as u64 * u64::from(self.layout.bytes);
            let place = Place { table, base: first.base + (((index * each) as u64) << lsb), ..first };
            let from = told.saturating_sub(index * each) as u64;
            let span = Span { first: place.base + (from << lsb), last: place.base + (((each as u64) << lsb) - 1) };
            let before = self.told;
            self.set_step(first_index + index as u64, Some(pointers[index]));
            self.path.push(Step { level: place.level, number, table: Gpa(table), index: from, entry: None, inherited: place.inherited });
            self.entries(place, from, &entries[from as usize..], span)?;
            self.path.pop();
            if self.told == before && from == 0 {
                self.empties.add(TableKey { level: place.level, table, inherited: place.inherited, exists });
            }
        }
        self.buffers.push(buffer);
        Ok(true)
    }
}
