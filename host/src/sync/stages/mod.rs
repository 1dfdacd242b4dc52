//! What a requester's DMA gets, live: nothing, guest memory through windows, or what one table or two tables say.
//!
//! ```text
//!    Way (a plugin's answer) ---> Space: blocked | windows | One (a Shadow) | Two (a Shadow behind a Shadow)
//!                                   |
//!                                   +--> Told: all pieces, cut by intercepts and stages ---> Changes: what the ends of a look differ in
//! ```
//!
//! A [`Space`] may become another of these at any moment, with [`Space::switch`]: what a byte's translation is before and after is compared, and only what
//! differs is told. One table of which nothing or a few IOVAs are intercepted, the usual case, needs none of this: its changes go straight on without those
//! IOVAs, and nothing is kept besides the shadow.
//!
//! # Limits
//!
//! [`ShadowLimits`] hold for all tables of an address space together: pages of tables, and entries that are leaves. So many pieces may be told as there may
//! be leaves; of a piece that would be more, the parts for which there is room are mapped and the rest is blocked, until it is looked at again.

mod behind;
mod look;
mod one;
mod passing;
mod told;
mod two;
mod watch;
mod way;

pub use way::Way;

use std::fmt;
use std::ops::ControlFlow;

use crate::address::cut;
use crate::memory::{Budget, EntryMemory, MarkMemory, MemoryMap};
use crate::sync::changes::{Changes, Reason};
use crate::sync::marks::{Marked, MarksWritten};
use crate::sync::shadow::{Prepared, ReopenError, Shadow, ShadowFigures, ShadowLimits, Watcher};
use crate::sync::wanted::{Wanted, join};
use crate::table::{AddressSpace, Format, Geometry, Intercept, Level, OpenError, Piece, Window};
use crate::{Gpa, Span};
use look::{Look, Teller};
use one::One;
use told::Told;
use two::Two;
use watch::Shared;
use way::Stages;

/// What every kind of address space needs.
#[derive(Debug)]
struct Ground {
    map: MemoryMap,
    limits: ShadowLimits,
    watch: Shared,
}

#[derive(Debug)]
enum Kind {
    Blocked,
    Direct(Vec<Window>),
    One(Box<One>),
    Two(Box<Two>),
}

/// One live description of what a requester's DMA gets.
pub struct Space {
    kind: Kind,
    intercepts: Vec<Intercept>,
    /// The IOVAs that are intercepted, if nothing else is: sorted, not overlapping.
    holes: Option<Vec<Span>>,
    /// Empty for one table of which at most IOVAs are intercepted.
    told: Told,
    ground: Ground,
    /// Questions that were asked for kinds that it was before.
    asked_before: u64,
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("kind", &self.kind).field("intercepts", &self.intercepts).finish_non_exhaustive()
    }
}

impl Kind {
    fn figures(&self) -> ShadowFigures {
        match self {
            Self::Blocked | Self::Direct(_) => ShadowFigures::default(),
            Self::One(one) => one.figures(),
            Self::Two(two) => two.figures(),
        }
    }
}

impl From<Shadow> for Space {
    /// One table, which may have been read.
    fn from(mut shadow: Shadow) -> Self {
        let pages: Vec<Gpa> = shadow.watched_pages().collect();
        let watch = Shared::adopt(pages.into_iter(), |watcher| shadow.exchange_watcher(watcher));
        let ground = Ground { map: shadow.map().clone(), limits: shadow.limits(), watch };
        Self {
            kind: Kind::One(Box::new(One::new(shadow))),
            intercepts: Vec::new(),
            holes: Some(Vec::new()),
            told: Told::default(),
            ground,
            asked_before: 0,
        }
    }
}

impl Space {
    /// An address space in which nothing is mapped. `map` says what exists of the guest's memory; `watcher` hears which guest pages hold tables, now and after
    /// each switch.
    #[must_use]
    pub fn new(map: MemoryMap, limits: ShadowLimits, watcher: Box<dyn Watcher>) -> Self {
        let ground = Ground { map, limits, watch: Shared::new(watcher) };
        Self { kind: Kind::Blocked, intercepts: Vec::new(), holes: Some(Vec::new()), told: Told::default(), ground, asked_before: 0 }
    }

    /// The same with what `way` gives. Nothing is read yet: [`Space::synchronise`] does.
    ///
    /// # Errors
    /// A format failed, or describes a table that cannot be.
    pub fn open(way: Way, map: MemoryMap, limits: ShadowLimits, watcher: Box<dyn Watcher>) -> Result<Self, OpenError> {
        let mut space = Self::new(map, limits, watcher);
        space.kind = Kind::open(way.stages, &space.ground)?;
        space.intercept(way.intercepts);
        Ok(space)
    }

    /// Looks at the IOVAs of `span` again and adds what changed to `changes`. With `leaf_only`, entries that were tables are taken to be the same tables.
    ///
    /// Of two tables this is the first one; the second, too, if `span` is [`Span::ALL`] without `leaf_only`, because commands that mean all IOVAs may mean
    /// both. Otherwise [`Space::synchronise_second`] looks at the second.
    ///
    /// The budget is charged for questions to formats, and for leaves: each piece of the second stage that a piece of the first is compared with, and
    /// each part that an intercept makes. All else is bounded by the limits.
    pub fn synchronise<M: EntryMemory + ?Sized>(&mut self, memory: &M, span: Span, leaf_only: bool, budget: &Budget, changes: &mut Changes) {
        self.synchronise_all(memory, &[Wanted { span, leaf_only }], budget, changes);
    }

    /// The same for IOVAs that ascend, at once.
    pub(super) fn synchronise_all<M: EntryMemory + ?Sized>(&mut self, memory: &M, wanted: &[Wanted], budget: &Budget, changes: &mut Changes) {
        if let Some(shadow) = self.straight(changes) {
            return shadow.synchronise_all(memory, wanted, budget, changes);
        }
        self.look(memory, budget, changes, |kind, look, ground| match kind {
            Kind::Blocked => {}
            Kind::Direct(windows) => show_windows(windows, look, ground),
            Kind::One(one) => one.synchronise(look, wanted),
            Kind::Two(two) => two.synchronise(look, wanted),
        });
    }

    /// Looks at inputs of the second of two tables again, and at everything that passes through them: pieces of the first stage, and its tables. Of one table
    /// these are the IOVAs.
    pub fn synchronise_second<M: EntryMemory + ?Sized>(&mut self, memory: &M, span: Span, leaf_only: bool, budget: &Budget, changes: &mut Changes) {
        self.synchronise_both(memory, (&[], &[Wanted { span, leaf_only }]), budget, changes);
    }

    /// IOVAs, and inputs of the second of two tables, which both ascend: in one look. What the second stage says decides where the first one's tables are, so that it comes
    /// first.
    pub(super) fn synchronise_both<M: EntryMemory + ?Sized>(
        &mut self,
        memory: &M,
        (wanted, second): (&[Wanted], &[Wanted]),
        budget: &Budget,
        changes: &mut Changes,
    ) {
        if second.is_empty() {
            return self.synchronise_all(memory, wanted, budget, changes);
        }
        if let Kind::Two(_) = self.kind {
            return self.look(memory, budget, changes, |kind, look, _| {
                if let Kind::Two(two) = kind {
                    two.synchronise_both(look, wanted, second);
                }
            });
        }
        // Of one table these are IOVAs as well.
        let mut all: Vec<Wanted> = second.iter().chain(wanted).copied().collect();
        join(&mut all);
        self.synchronise_all(memory, &all, budget, changes);
    }

    /// `length` bytes of guest memory from `address` on were written: reads the entries among them again, of all tables, and adds what changed to `changes`.
    pub fn table_written<M: EntryMemory + ?Sized>(&mut self, memory: &M, address: Gpa, length: u64, budget: &Budget, changes: &mut Changes) {
        if let Some(shadow) = self.straight(changes) {
            return shadow.table_written(memory, address, length, budget, changes);
        }
        self.look(memory, budget, changes, |kind, look, _| match kind {
            Kind::Blocked | Kind::Direct(_) => {}
            Kind::One(one) => one.table_written(look, address, length),
            Kind::Two(two) => two.table_written(look, address, length),
        });
    }

    /// The guest's memory is what `map` says from now on. What is mapped of memory that is gone is unmapped, and what came is mapped where tables or windows say
    /// so; tables in memory that is gone are dropped with everything below them, and tables in memory that came are read: `memory` must have what came.
    pub fn memory_changed<M: EntryMemory + ?Sized>(&mut self, memory: &M, map: MemoryMap, budget: &Budget, changes: &mut Changes) {
        self.ground.map = map;
        self.look(memory, budget, changes, |kind, look, ground| match kind {
            Kind::Blocked => {}
            Kind::Direct(windows) => show_windows(windows, look, ground),
            Kind::One(one) => one.memory_changed(look, &ground.map),
            Kind::Two(two) => two.memory_changed(look, &ground.map),
        });
    }

    /// Whether a guest's entry can be marked at all, by what its configuration promises.
    #[must_use]
    pub fn has_marks(&self) -> bool {
        let marks = |level: &Level| level.accessed.exists() || level.dirty.exists() || level.table_accessed.exists();
        let any = |geometry: &Geometry| geometry.levels.iter().any(marks);
        match &self.kind {
            Kind::Blocked | Kind::Direct(_) => false,
            Kind::One(one) => any(one.shadow.geometry()),
            Kind::Two(two) => any(two.first.geometry()) || any(two.second.geometry()),
        }
    }

    /// Marks the guest's leaves for the IOVAs of `marked` that are not marked yet, of all tables, and before them the entries on the way there, where a format says that
    /// hardware does; adds what was done to `written`. Of two stages, entries of the first are read and written through the second, whose entries for them are marked as
    /// well.
    pub fn mark<M: MarkMemory + ?Sized>(&mut self, memory: &M, marked: Marked, budget: &Budget, written: &mut MarksWritten) {
        if !self.has_marks() {
            return;
        }
        match &mut self.kind {
            Kind::Blocked | Kind::Direct(_) => {}
            Kind::One(one) => one.shadow.mark(memory, marked, budget, written),
            Kind::Two(two) => two.mark(memory, marked, budget, written),
        }
    }

    /// The guest's registers or structures say something else: `way` is what its DMA gets from now on. All tables are read again; `changes` has what differs,
    /// and nothing for a byte whose translation is the same in pieces of the same size.
    ///
    /// While one kind takes another's place, both are held, each within the limits.
    ///
    /// # Errors
    /// A format failed, or describes a table that cannot be. The address space is then as it was.
    pub fn switch<M: EntryMemory + ?Sized>(&mut self, way: Way, memory: &M, budget: &Budget, changes: &mut Changes) -> Result<(), OpenError> {
        let Way { stages, intercepts } = way;
        match (&self.kind, stages) {
            (Kind::One(one), Stages::One(format)) => {
                let prepared = Prepared::new(format)?;
                let same = one.shadow.has_shape_of(&prepared);
                self.switch_in_place(intercepts, same, memory, budget, changes, |kind, look| {
                    if let Kind::One(one) = kind {
                        one.switch(look, prepared);
                    }
                });
            }
            (Kind::Two(_), Stages::Two { first, second }) => {
                let (first, second) = (Prepared::new(first)?, Prepared::new(second)?);
                self.switch_in_place(intercepts, true, memory, budget, changes, |kind, look| {
                    if let Kind::Two(two) = kind {
                        two.switch(look, first, second);
                    }
                });
            }
            (_, stages) => {
                let kind = Kind::open(stages, &self.ground)?;
                self.remember();
                self.told.drop_all();
                // The old one lets go of its pages when the new one has its own.
                let before = std::mem::replace(&mut self.kind, kind);
                self.asked_before += before.figures().questions;
                self.intercept(intercepts);
                self.look_at_told(memory, budget, changes, |kind, look, ground| match kind {
                    Kind::Blocked => {}
                    Kind::Direct(windows) => show_windows(windows, look, ground),
                    Kind::One(one) => one.synchronise(look, &[Wanted::whole(Span::ALL)]),
                    Kind::Two(two) => two.synchronise(look, &[Wanted::whole(Span::ALL)]),
                });
                drop(before);
            }
        }
        Ok(())
    }

    /// Other formats for the same kind of address space. `same`: what was seen can be compared, entry by entry.
    fn switch_in_place<M: EntryMemory + ?Sized>(
        &mut self,
        intercepts: Vec<Intercept>,
        same: bool,
        memory: &M,
        budget: &Budget,
        changes: &mut Changes,
        act: impl FnOnce(&mut Kind, &mut Look<'_, M>),
    ) {
        let others = intercepts != self.intercepts;
        if self.is_straight() && !others && same {
            return self.look(memory, budget, changes, |kind, look, _| act(kind, look));
        }
        self.remember();
        if others {
            self.told.drop_all();
            self.intercept(intercepts);
        }
        self.look_at_told(memory, budget, changes, |kind, look, _| {
            act(kind, look);
            match kind {
                Kind::One(one) if others => one.tell_all(look),
                Kind::Two(two) if others => two.tell_all(look),
                _ => {}
            }
        });
    }

    /// Asks another instance of the same format from now on, for the first table or the second; blocked entries are judged again when they are read next.
    ///
    /// # Errors
    /// The format failed, describes other tables, or there is no such table. All is then as it was.
    pub fn reopen(&mut self, stage: u8, format: Box<dyn Format>) -> Result<(), ReopenError> {
        match (&mut self.kind, stage) {
            (Kind::One(one), 1) => one.shadow.reopen(format),
            (Kind::Two(two), 1) => two.first.reopen(format),
            (Kind::Two(two), 2) => two.second.reopen(format),
            _ => Err(ReopenError::Geometry),
        }
    }

    /// What was seen of the first table, or of the second; none if there is no such table. The outputs of a first of two are inputs of the second, and its
    /// tables are where the second puts them.
    #[must_use]
    pub fn table(&self, stage: u8) -> Option<&Shadow> {
        match (&self.kind, stage) {
            (Kind::One(one), 1) => Some(&one.shadow),
            (Kind::Two(two), 1) => Some(&two.first),
            (Kind::Two(two), 2) => Some(&two.second),
            _ => None,
        }
    }

    /// What is held of all tables together. Pieces of which not all parts are told, for want of room, count as blocked entries.
    #[must_use]
    pub fn figures(&self) -> ShadowFigures {
        let figures = self.kind.figures();
        ShadowFigures { questions: self.asked_before + figures.questions, ..figures }
    }

    /// The guest pages that hold tables, in no order.
    pub fn watched_pages(&self) -> impl Iterator<Item = Gpa> + use<> {
        self.ground.watch.pages().into_iter()
    }

    /// Tells `each` every piece that is mapped at some IOVA of `span`, in ascending order, as the last changes left it. Pieces are told as they were when they
    /// were mapped: the first and the last may reach beyond `span`.
    pub fn pieces(&self, span: Span, each: &mut dyn FnMut(Piece)) {
        let _ = self.pieces_until(span, &mut |piece| {
            each(piece);
            ControlFlow::Continue(())
        });
    }

    /// The same, until `each` has had enough.
    pub(super) fn pieces_until(&self, span: Span, each: &mut dyn FnMut(Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        match &self.kind {
            Kind::One(one) if self.is_straight() => match self.holes.as_deref() {
                None | Some([]) => one.shadow.pieces_until(span, each),
                Some(holes) => one.shadow.pieces_until(span, &mut |piece| {
                    let here = |part: &Span| part.intersection(span).is_some();
                    let mut parts = cut(holes, piece.iova).filter(|(outside, part)| *outside && here(part));
                    parts.try_for_each(|(_, part)| each(piece.part(part)))
                }),
            },
            _ => self.told.pieces(span).try_for_each(each),
        }
    }

    /// Something else serves these addresses from now on.
    fn intercept(&mut self, intercepts: Vec<Intercept>) {
        self.holes = holes(&intercepts);
        self.intercepts = intercepts;
    }

    /// Changes of the table are changes of the address space, but for IOVAs that are intercepted.
    fn is_straight(&self) -> bool {
        matches!(self.kind, Kind::One(_)) && self.holes.is_some()
    }

    /// The only table, if its changes are those of the address space and nothing else is to be done.
    #[inline]
    fn straight(&mut self, changes: &mut Changes) -> Option<&mut Shadow> {
        match &mut self.kind {
            Kind::One(one) if !one.wants() => {
                changes.leave_out(self.holes.as_deref()?);
                Some(&mut one.shadow)
            }
            _ => None,
        }
    }

    /// From here on [`Space::told`] has everything.
    fn remember(&mut self) {
        if let (true, Kind::One(one)) = (self.is_straight(), &self.kind) {
            let holes = self.holes.as_deref().unwrap_or_default();
            one.shadow.pieces(Span::ALL, &mut |piece| outside(holes, piece, |part| self.told.remember(part)));
        }
    }

    fn look<M: EntryMemory + ?Sized>(
        &mut self,
        memory: &M,
        budget: &Budget,
        changes: &mut Changes,
        act: impl FnOnce(&mut Kind, &mut Look<'_, M>, &Ground),
    ) {
        let (straight, most) = (self.is_straight(), self.ground.limits.leaves);
        let holes = self.holes.as_deref().filter(|_| straight);
        changes.leave_out(holes.unwrap_or_default());
        let mut look = Look {
            memory,
            budget,
            changes: &mut *changes,
            told: &mut self.told,
            intercepts: &self.intercepts,
            holes,
            most,
            straight,
            switching: false,
        };
        act(&mut self.kind, &mut look, &self.ground);
        self.told.settle(changes);
    }

    /// The same, for which all that is mapped is in [`Space::told`] before and after.
    fn look_at_told<M: EntryMemory + ?Sized>(
        &mut self,
        memory: &M,
        budget: &Budget,
        changes: &mut Changes,
        act: impl FnOnce(&mut Kind, &mut Look<'_, M>, &Ground),
    ) {
        let straight = self.is_straight();
        // The shadow of a single table counts what it holds.
        let most = if straight { u64::MAX } else { self.ground.limits.leaves };
        changes.leave_out(&[]);
        let mut look = Look {
            memory,
            budget,
            changes: &mut *changes,
            told: &mut self.told,
            intercepts: &self.intercepts,
            holes: self.holes.as_deref().filter(|_| straight),
            most,
            straight: false,
            switching: true,
        };
        act(&mut self.kind, &mut look, &self.ground);
        self.told.settle(changes);
        if straight {
            self.told = Told::default();
        }
    }
}

impl Kind {
    fn open(stages: Stages, ground: &Ground) -> Result<Self, OpenError> {
        let one = |format| Shadow::open(format, ground.map.clone(), ground.limits, Box::new(ground.watch.clone()));
        Ok(match stages {
            Stages::Blocked => Self::Blocked,
            Stages::Direct(windows) => Self::Direct(windows),
            Stages::One(format) => Self::One(Box::new(One::new(one(format)?))),
            Stages::Two { first, second } => Self::Two(Box::new(Two::open(first, second, ground)?)),
        })
    }
}

/// The IOVAs that are intercepted, sorted and joined; none if other addresses are intercepted as well.
fn holes(intercepts: &[Intercept]) -> Option<Vec<Span>> {
    let mut spans = intercepts.iter().map(Intercept::iovas).collect::<Option<Vec<Span>>>()?;
    spans.sort_unstable();
    spans.dedup_by(|next, last| {
        let joined = next.first <= last.last;
        last.last = if joined { last.last.max(next.last) } else { last.last };
        joined
    });
    Some(spans)
}

/// The parts of a piece that are in no hole.
fn outside(holes: &[Span], piece: Piece, mut each: impl FnMut(Piece)) {
    cut(holes, piece.iova).filter(|(outside, _)| *outside).for_each(|(_, part)| each(piece.part(part)));
}

/// All that windows show. There are few of them, so that they are looked at as a whole.
fn show_windows<M: EntryMemory + ?Sized>(windows: &[Window], look: &mut Look<'_, M>, ground: &Ground) {
    look.told.drop_all();
    let mut space = AddressSpace::direct(windows.to_vec()).with_intercepts(look.intercepts.to_vec());
    let mut teller = Teller { told: look.told, most: look.most, next: 0, anew: false };
    let shown = space.walk(look.memory, &ground.map, Span::ALL, look.budget, &mut teller);
    let next = teller.next;
    if shown.is_err() {
        look.changes.block(Span { first: next, last: u64::MAX }, Reason::Leaves);
    }
}
