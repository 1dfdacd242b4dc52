//! Two stages: the outputs of the first stage's table are inputs of the second's, and so are the addresses of the first one's tables.
//!
//! ```text
//!    guest's memory --- Shadow of the second stage ---> Behind: its pieces, and where first-stage tables are
//!          |                                               |
//!          +----- Through: read where Behind says -----> Shadow of the first stage ---> Passing: its pieces, by both of their sides
//!                                                                                          |
//!    Told: each piece of the first, cut where pieces of the second begin and end <---------+
//! ```
//!
//! A change of the second stage costs what passes through it: the parts of first-stage pieces there, and the first-stage tables there, which are read
//! again if they are somewhere else now. A change of the first stage costs the second-stage pieces that it passes through.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};

use crate::memory::{Budget, EntryMemory, MarkMemory, MemoryMap, PAGE};
use crate::sync::changes::{Changes, Reason};
use crate::sync::marks::{Marked, MarksWritten};
use crate::sync::shadow::{Prepared, Shadow, ShadowFigures, ShadowLimits};
use crate::sync::stages::Ground;
use crate::sync::stages::behind::{Behind, Marks, Moved, TablePages, Through, page_span};
use crate::sync::stages::look::{Look, Rules};
use crate::sync::stages::passing::{Passing, outputs, part};
use crate::sync::stages::watch::lock;
use crate::sync::wanted::Wanted;
use crate::table::{Compared, FaultAt, Format, Intercepted, OpenError, Piece, Step, Visitor, WalkError};
use crate::{Attributes, Change, Gpa, Span};

/// What of a piece is compared with intercepts, between the stages and in the end.
const BETWEEN: &Rules = &[(1, Compared::Output)];
const BOTH_ENDS: &Rules = &[(0, Compared::Iova), (2, Compared::Output)];

/// A guest with two tables.
pub(super) struct Two {
    pub(super) first: Shadow,
    pub(super) second: Shadow,
    behind: Arc<Mutex<Behind>>,
    passing: Passing,
    /// First IOVAs of pieces of the first stage of which not all parts were told.
    wanting: BTreeSet<u64>,
    /// Of both stages together.
    limits: ShadowLimits,
    /// The second stage was read.
    begun: bool,
    found: Changes,
}

impl fmt::Debug for Two {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Two").field("first", &self.first).field("second", &self.second).finish_non_exhaustive()
    }
}

impl Two {
    pub(super) fn open(first: Box<dyn Format>, second: Box<dyn Format>, ground: &Ground) -> Result<Self, OpenError> {
        let second = Shadow::open(second, ground.map.clone(), ground.limits, Box::new(ground.watch.clone()))?;
        let behind = Behind::new(ground.watch.clone(), second.geometry().no_tables_in);
        let pages = Box::new(TablePages(Arc::clone(&behind)));
        Ok(Self {
            first: Shadow::open(first, MemoryMap::everything(64), ground.limits, pages)?,
            second,
            behind,
            passing: Passing::default(),
            wanting: BTreeSet::new(),
            limits: ground.limits,
            begun: false,
            found: Changes::new(),
        })
    }

    pub(super) fn figures(&self) -> ShadowFigures {
        let (first, second) = (self.first.figures(), self.second.figures());
        ShadowFigures {
            tables: first.tables + second.tables,
            table_pages: first.table_pages + second.table_pages,
            leaves: first.leaves + second.leaves,
            blocked: first.blocked + second.blocked + self.wanting.len() as u64,
            questions: first.questions + second.questions,
            patterns: first.patterns + second.patterns,
        }
    }

    /// Looks at IOVAs that ascend; at all of them only after all inputs of the second stage.
    pub(super) fn synchronise<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, wanted: &[Wanted]) {
        // The first stage may give room back as soon as its tables are somewhere else.
        let before = self.first.figures();
        let is_whole = is_whole(wanted);
        if !self.begun || is_whole {
            self.begun = true;
            self.with_second(look, |shadow, memory, budget, changes| shadow.synchronise(memory, Span::ALL, false, budget, changes));
        }
        self.with_first(look, |shadow, through, budget, changes| shadow.synchronise_all(through, wanted, budget, changes));
        if is_whole {
            self.use_room(look, before);
        }
        self.try_again(look, wanted);
    }

    /// What the second stage had no room for, if the first one holds less than `before`.
    fn use_room<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, before: ShadowFigures) {
        let now = self.first.figures();
        if self.second.figures().blocked > 0 && (now.table_pages < before.table_pages || now.leaves < before.leaves) {
            self.with_second(look, |shadow, memory, budget, changes| shadow.synchronise(memory, Span::ALL, false, budget, changes));
        }
    }

    /// Looks at inputs of the second stage that ascend, at all that passes through them, and then at IOVAs that ascend: each stage's tables are gone down once.
    pub(super) fn synchronise_both<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, wanted: &[Wanted], second: &[Wanted]) {
        if !self.begun || is_whole(wanted) {
            return self.synchronise(look, &[Wanted::whole(Span::ALL)]);
        }
        let moved = self.follow_second(look, |shadow, memory, budget, changes| shadow.synchronise_all(memory, second, budget, changes));
        let mut pages: BTreeMap<u64, Moved> = moved.into_iter().collect();
        for one in second {
            // Where marks are another question now, the same entries are looked at as well.
            for page in lock(&self.behind).tables(one.span) {
                pages.entry(page).or_insert(Moved::Elsewhere);
            }
        }
        if pages.is_empty() && wanted.is_empty() {
            return;
        }
        self.with_first(look, |shadow, through, budget, changes| {
            pages.iter().for_each(|(page, moved)| read_page_again(shadow, through, *page, *moved, budget, changes));
            if !wanted.is_empty() {
                shadow.synchronise_all(through, wanted, budget, changes);
            }
        });
        self.try_again(look, wanted);
    }

    pub(super) fn table_written<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, address: Gpa, length: u64) {
        let Some(last) = length.checked_sub(1).map(|rest| address.0.saturating_add(rest)) else { return };
        self.with_second(look, |shadow, memory, budget, changes| shadow.table_written(memory, address, length, budget, changes));
        let written = lock(&self.behind).written(Span { first: address.0, last });
        if !written.is_empty() {
            self.with_first(look, |shadow, through, budget, changes| {
                for part in &written {
                    shadow.table_written(through, Gpa(part.first), part.length_minus_one() + 1, budget, changes);
                }
            });
        }
    }

    /// Other roots or settings. All of both stages is read again.
    pub(super) fn switch<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, first: Prepared, second: Prepared) {
        self.begun = true;
        // First-stage tables that move meanwhile are read again below, with the format that explains them.
        let before = self.first.figures();
        let closed = second.geometry().no_tables_in;
        self.follow_second(look, |shadow, memory, budget, changes| shadow.switch_to(second, memory, budget, changes));
        lock(&self.behind).close(closed);
        self.with_first(look, |shadow, through, budget, changes| shadow.switch_to(first, through, budget, changes));
        self.use_room(look, before);
    }

    /// Guest memory came or went.
    pub(super) fn memory_changed<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, map: &MemoryMap) {
        self.with_second(look, |shadow, memory, budget, changes| shadow.memory_changed(memory, map.clone(), budget, changes));
        // Where a table of the first stage is, the same page may be there again with something else in it.
        let pages: Vec<(u64, Moved)> = lock(&self.behind).tables(Span::ALL).map(|page| (page, Moved::Elsewhere)).collect();
        self.read_again(look, &pages);
    }

    /// Marks the first stage, the second for what passes through it, and the second for the first one's tables, which hardware reads, and writes where it marks them.
    pub(super) fn mark<M: MarkMemory + ?Sized>(&mut self, memory: &M, marked: Marked, budget: &Budget, written: &mut MarksWritten) {
        let through = Marks { behind: &self.behind, memory, tables: RefCell::default() };
        let (second, mut outer, mut seen) = (&mut self.second, MarksWritten::default(), BTreeSet::new());
        let marks = second.geometry().levels.iter().any(|level| level.accessed.exists() || level.table_accessed.exists());
        let mut read = |entry: Gpa| {
            let page = entry.0 / PAGE;
            if seen.insert(page) {
                second.mark(memory, Marked { iova: page_span(page), accessed: true, dirty: false }, budget, &mut outer);
            }
        };
        self.first.mark_reading(&through, marked, budget, written, if marks { Some(&mut read) } else { None });
        written.add(outer);
        for table in through.tables.into_inner() {
            self.second.mark(memory, Marked { iova: table, accessed: true, dirty: true }, budget, written);
        }
        let second = &mut self.second;
        for piece in self.passing.pieces(marked.iova) {
            let Some(Piece { iova, address: first, .. }) = piece.within(marked.iova) else { continue };
            let inputs = Span { first, last: first + iova.length_minus_one() };
            second.mark(memory, Marked { iova: inputs, ..marked }, budget, written);
        }
    }

    /// Does something to the second stage's shadow, and follows what changed through the first.
    fn with_second<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, act: impl FnOnce(&mut Shadow, &M, &Budget, &mut Changes)) {
        let moved = self.follow_second(look, act);
        self.read_again(look, &moved);
    }

    /// The same, and says which pages of first-stage tables are somewhere else now.
    fn follow_second<M: ?Sized>(&mut self, look: &mut Look<'_, M>, act: impl FnOnce(&mut Shadow, &M, &Budget, &mut Changes)) -> Vec<(u64, Moved)> {
        self.second.set_limits(left(self.limits, self.first.figures()));
        act(&mut self.second, look.memory, look.budget, &mut self.found);
        let privileged = self.first.geometry().privileged;
        let mut behind = lock(&self.behind);
        look.changes.absorb_blocked(&self.found, 2, |inputs, each| {
            // What passes there, and what first-stage tables there serve.
            let _ = self.passing.through_until(inputs, |_, part| if each(part.iova) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) });
            let _ = behind.tables(inputs).try_for_each(|page| self.first.served_by(page, &mut *each));
        });
        let mut pages = BTreeSet::new();
        let batch = self.found.batch();
        for change in batch {
            pages.extend(behind.tables(change.span()));
            match change {
                Change::Unmap(span) => {
                    behind.unmap(*span);
                    self.passing.through(*span, |_, part| look.told.drop_within(part.iova));
                }
                Change::Map(outer) => {
                    behind.map(*outer);
                    let (wanting, anew) = (&mut self.wanting, look.is_anew(batch, outer));
                    self.passing.through(outer.iova, |piece, _| {
                        if !tell(look, piece, outer, privileged, anew) {
                            wanting.insert(piece.iova.first);
                        }
                    });
                }
            }
        }
        self.found.clear();
        pages.into_iter().filter_map(|page| Some((page, behind.moved(page)?))).collect()
    }

    /// Does something to the first stage's shadow, and tells what changed.
    fn with_first<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, act: impl FnOnce(&mut Shadow, &Through<'_, M>, &Budget, &mut Changes)) {
        self.first.set_limits(left(self.limits, self.second.figures()));
        act(&mut self.first, &Through { behind: &self.behind, memory: look.memory }, look.budget, &mut self.found);
        look.changes.absorb_blocked(&self.found, 1, |iova, each| {
            each(iova);
        });
        let privileged = self.first.geometry().privileged;
        let behind = lock(&self.behind);
        let batch = self.found.batch();
        for change in batch {
            match change {
                Change::Unmap(span) => {
                    look.told.drop_within(*span);
                    self.passing.remove(span.first);
                    self.wanting.remove(&span.first);
                }
                Change::Map(piece) => {
                    self.passing.insert(*piece);
                    let anew = look.is_anew(batch, piece);
                    if !tell_through(look, &behind, piece, privileged, anew) {
                        self.wanting.insert(piece.iova.first);
                    }
                }
            }
        }
        drop(behind);
        self.found.clear();
    }

    /// Reads the first-stage tables in these intermediate pages again.
    fn read_again<M: EntryMemory + ?Sized>(&mut self, look: &mut Look<'_, M>, pages: &[(u64, Moved)]) {
        if !pages.is_empty() {
            self.with_first(look, |shadow, through, budget, changes| {
                pages.iter().for_each(|(page, moved)| read_page_again(shadow, through, *page, *moved, budget, changes));
            });
        }
    }

    /// All parts of all pieces, after the intercepts changed.
    pub(super) fn tell_all<M: ?Sized>(&mut self, look: &mut Look<'_, M>) {
        let (privileged, behind) = (self.first.geometry().privileged, lock(&self.behind));
        self.wanting =
            self.passing.all().filter(|piece| !tell_through(look, &behind, piece, privileged, false)).map(|piece| piece.iova.first).collect();
    }

    /// What there was no room for, where it is looked at anyway.
    fn try_again<M: ?Sized>(&mut self, look: &mut Look<'_, M>, wanted: &[Wanted]) {
        if self.wanting.is_empty() {
            return;
        }
        let (privileged, behind) = (self.first.geometry().privileged, lock(&self.behind));
        let passing = &self.passing;
        for Wanted { span, .. } in wanted {
            self.wanting.retain(|first| {
                let Some(piece) = passing.get(*first) else { return false };
                let Some(here) = piece.iova.intersection(*span) else { return true };
                let inputs = Span { first: piece.address + (here.first - piece.iova.first), last: piece.address + (here.last - piece.iova.first) };
                let all = behind.pieces(inputs).all(|outer| tell(look, piece, &outer, privileged, false));
                !all || here != piece.iova
            });
        }
    }
}

/// Whether all is to be looked at: commands that mean all IOVAs may mean both stages.
fn is_whole(wanted: &[Wanted]) -> bool {
    wanted.contains(&Wanted::whole(Span::ALL))
}

/// Reads the first-stage tables in an intermediate page again, of which this is another than before.
fn read_page_again<M: EntryMemory + ?Sized>(
    shadow: &mut Shadow,
    through: &Through<'_, M>,
    page: u64,
    moved: Moved,
    budget: &Budget,
    changes: &mut Changes,
) {
    match moved {
        Moved::Elsewhere => shadow.table_written(through, Gpa(page * PAGE), PAGE, budget, changes),
        Moved::Marks => shadow.marks_changed(through, Gpa(page * PAGE), budget, changes),
    }
}

/// What one stage may take of what both may take together.
const fn left(limits: ShadowLimits, other: ShadowFigures) -> ShadowLimits {
    ShadowLimits { table_pages: limits.table_pages.saturating_sub(other.table_pages), leaves: limits.leaves.saturating_sub(other.leaves) }
}

/// Tells what a piece of the first stage is behind all of the second. False: not all of it, there is no room.
fn tell_through<M: ?Sized>(look: &mut Look<'_, M>, behind: &Behind, piece: &Piece, privileged: bool, anew: bool) -> bool {
    behind.pieces(outputs(piece)).all(|outer| tell(look, piece, &outer, privileged, anew))
}

/// Tells what a piece of the first stage is behind one of the second: what both allow, where nothing intercepts it.
fn tell<M: ?Sized>(look: &mut Look<'_, M>, inner: &Piece, outer: &Piece, privileged: bool, anew: bool) -> bool {
    let Some(inner) = part(inner, outer.iova) else { return true };
    if look.budget.charge_leaves(1).is_err() {
        look.changes.block(inner.iova, Reason::Leaves);
        return false;
    }
    let (intercepts, budget) = (look.intercepts, look.budget);
    let mut second = Second { look, outer, privileged, anew };
    if intercepts.is_empty() {
        return second.piece(&inner, &[]).is_ok();
    }
    Intercepted { intercepts, rules: BETWEEN, tables: 2, budget, visitor: &mut second }.piece(&inner, &[]).is_ok()
}

/// Hears parts of a first-stage piece that nothing intercepts before the second stage.
struct Second<'a, 'b, M: ?Sized> {
    look: &'a mut Look<'b, M>,
    outer: &'a Piece,
    privileged: bool,
    anew: bool,
}

impl<M: ?Sized> Visitor for Second<'_, '_, M> {
    fn piece(&mut self, inner: &Piece, _: &[Step]) -> Result<(), WalkError> {
        let attributes = inner.attributes.through(self.outer.attributes);
        // Where all requests count as privileged, they pass.
        let attributes = if self.privileged { attributes.without(Attributes::PRIVILEGED_ONLY) } else { attributes };
        if attributes.grants_nothing() {
            return Ok(());
        }
        let address = self.outer.address + (inner.address - self.outer.iova.first);
        let piece = Piece { iova: inner.iova, address, attributes };
        if self.look.tell(&piece, BOTH_ENDS, self.anew) { Ok(()) } else { Err(WalkError::Stopped) }
    }

    fn fault(&mut self, _: &FaultAt<'_>) -> Result<(), WalkError> {
        Ok(())
    }
}
