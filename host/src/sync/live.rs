//! One address space of a running guest: what its DMA gets, and the sink that the changes go to.

use std::fmt;
use std::ops::ControlFlow;

use crate::memory::{Budget, EntryMemory, Limits, MemoryMap};
use crate::plugin::Tag;
use crate::plugin::queue::{Effect, Invalidation};
use crate::sync::changes::{Blocked, Changes};
use crate::sync::sink::{CommitError, Sink};
use crate::sync::stages::{Space, Way};
use crate::sync::wanted::{Wanted, join};
use crate::table::{Format, OpenError};
use crate::{Change, Gpa, Span};

/// The host could not be brought in step.
#[derive(Debug, thiserror::Error)]
pub enum LiveError {
    /// The new format of the guest's tables cannot be used. Nothing changed.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The host's table is in step, and its caches may not be; [`Live::commit`] tries again. Until it succeeds the device must be kept from DMA.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// A sink could not take another one's place. The other one stays, and is in step.
pub struct ReplaceError<S> {
    /// The sink that was to be the new one. It may have everything; it is not kept in step.
    pub sink: S,
    /// Why.
    pub error: CommitError,
}

impl<S> fmt::Debug for ReplaceError<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReplaceError").field("error", &self.error).finish_non_exhaustive()
    }
}

impl<S> fmt::Display for ReplaceError<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.error, f)
    }
}

impl<S> std::error::Error for ReplaceError<S> {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.error)
    }
}

/// Pieces that a sink is given at once, where there may be any number.
const CHUNK: usize = 4096;

/// What one call did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Changes that were handed to the sink.
    pub changes: u64,
    /// Pieces that there had been no room for, and that were offered to the sink again.
    pub offered: u64,
    /// The first few entries that were blocked.
    pub blocked: Vec<Blocked>,
    /// All that were, also those for which there was room before the call ended.
    pub blocked_count: u64,
    /// Pieces are missing in the host, for want of memory or because its format failed, and are tried again by the next call.
    pub lacks: bool,
    /// Device structures were changed: whoever knows what leads to these tables must look again.
    pub structures: bool,
    /// The code of an illegal command, if one was among them. Commands after it were not handled, as hardware would not.
    pub illegal: Option<u32>,
}

impl Report {
    /// What another call did, after this one.
    pub fn join(&mut self, next: Self) {
        self.changes += next.changes;
        self.offered += next.offered;
        self.blocked.extend(next.blocked);
        self.blocked_count += next.blocked_count;
        self.lacks |= next.lacks;
        self.structures |= next.structures;
        self.illegal = self.illegal.or(next.illegal);
    }
}

/// One address space that is kept in step.
#[derive(Debug)]
pub struct Live<S> {
    pub(super) space: Space,
    pub(super) sink: S,
    /// How commands name this address space.
    tag: Tag,
    id: u64,
    /// Questions that one call may ask.
    pub(super) questions: u64,
    pub(super) tracks_dirty: bool,
    changes: Changes,
    wanted: Vec<Wanted>,
    /// Inputs of the second of two stages.
    second: Vec<Wanted>,
}

/// What commands said besides.
#[derive(Clone, Copy, Default)]
struct Heard {
    structures: bool,
    illegal: Option<u32>,
}

impl<S: Sink> Live<S> {
    /// Joins the two; a [`Shadow`](crate::sync::Shadow) is an address space of one table. Commands that mean `tag` and the requester `id` concern this
    /// address space; each call may ask formats `questions` questions.
    ///
    /// Nothing is read yet: [`Live::synchronise`] does.
    pub fn new(space: impl Into<Space>, sink: S, tag: Tag, id: u64, questions: u64) -> Self {
        let space = space.into();
        Self { space, sink, tag, id, questions, tracks_dirty: false, changes: Changes::new(), wanted: Vec::new(), second: Vec::new() }
    }

    /// What the requester's DMA gets, as far as it was seen.
    pub const fn space(&self) -> &Space {
        &self.space
    }

    /// How commands name this address space.
    pub const fn tag(&self) -> Tag {
        self.tag
    }

    /// Commands name it so from now on: after a [`Live::switch`] to tables with another tag.
    pub const fn set_tag(&mut self, tag: Tag) {
        self.tag = tag;
    }

    /// The host's side.
    pub const fn sink(&self) -> &S {
        &self.sink
    }

    /// The host's side.
    pub const fn sink_mut(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Gives another sink all that is mapped, as batches of maps, in ascending order. The caller commits.
    pub fn fill(&self, sink: &mut (impl Sink + ?Sized)) {
        let mut batch = Vec::new();
        self.space.pieces(Span::ALL, &mut |piece| {
            batch.push(Change::Map(piece));
            if batch.len() == CHUNK {
                sink.apply(&batch);
                batch.clear();
            }
        });
        if !batch.is_empty() {
            sink.apply(&batch);
        }
    }

    /// Takes another sink, which has nothing yet, in place of the one that there is: gives it everything, commits it, and hands out the old one. Up to then the
    /// old one is as it was, so that a device can be led from one to the other. While writes are recorded ([`Live::track_dirty`]), the new one records them from now on if it
    /// can; those up to then are told by the old one's [`Sink::dirty`], once no device uses it any more. Its marks get into the guest's entries by [`Live::write_marks_of`].
    ///
    /// # Errors
    /// The new one could not be committed. The old one stays.
    pub fn replace_sink(&mut self, mut sink: S) -> Result<S, ReplaceError<S>> {
        let tracks_dirty = self.tracks_dirty && sink.track_dirty(true);
        self.fill(&mut sink);
        match sink.commit() {
            Ok(()) => {
                self.tracks_dirty = tracks_dirty;
                Ok(std::mem::replace(&mut self.sink, sink))
            }
            Err(error) => Err(ReplaceError { sink, error }),
        }
    }

    /// Reads everything again.
    ///
    /// # Errors
    /// [`LiveError::Commit`].
    pub fn synchronise<M: EntryMemory + ?Sized>(&mut self, memory: &M) -> Result<Report, LiveError> {
        self.wanted.clear();
        self.second.clear();
        self.wanted.push(Wanted::whole(Span::ALL));
        self.look(memory, Heard::default())
    }

    /// The guest's commands, decoded. When this returns without an error, no DMA uses what the guest took away in the address spaces and ranges that they
    /// mean; the committer was called at most once.
    ///
    /// # Errors
    /// [`LiveError::Commit`].
    pub fn invalidate<M: EntryMemory + ?Sized>(&mut self, memory: &M, invalidations: &[Invalidation]) -> Result<Report, LiveError> {
        self.wanted.clear();
        self.second.clear();
        let mut heard = Heard::default();
        for invalidation in invalidations {
            match invalidation.effect {
                // What device TLBs keep is the device's, and so are answers: the host's table does not depend on them.
                Effect::Nothing | Effect::DeviceTlb { .. } | Effect::Response(_) => {}
                Effect::Everything => self.wanted.push(Wanted::whole(Span::ALL)),
                Effect::Range { scope, iova } if scope.includes(self.tag, self.id) => {
                    if scope.second_stage { &mut self.second } else { &mut self.wanted }.push(Wanted { span: iova.or_all(), leaf_only: scope.leaf });
                }
                Effect::Range { .. } => {}
                Effect::Structures(scope) => heard.structures |= scope.includes(self.tag, self.id),
                Effect::Illegal(code) => {
                    heard.illegal = Some(code);
                    break;
                }
            }
        }
        self.look(memory, heard)
    }

    /// `length` bytes of guest memory from `address` on were written, and may hold tables. The same promise as for [`Live::invalidate`].
    ///
    /// # Errors
    /// [`LiveError::Commit`].
    pub fn table_written<M: EntryMemory + ?Sized>(&mut self, memory: &M, address: Gpa, length: u64) -> Result<Report, LiveError> {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        self.space.table_written(memory, address, length, &budget, &mut self.changes);
        self.hand_over(Heard::default(), S::apply)
    }

    /// The guest's structures say something else: `way` is what its DMA gets from now on; a format stands for one table.
    ///
    /// # Errors
    /// [`LiveError::Open`], and nothing changed; [`LiveError::Commit`].
    pub fn switch<M: EntryMemory + ?Sized>(&mut self, way: impl Into<Way>, memory: &M) -> Result<Report, LiveError> {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        self.space.switch(way.into(), memory, &budget, &mut self.changes)?;
        self.hand_over(Heard::default(), S::apply)
    }

    /// Guest memory came or went: it is what `map` says from now on. When this returns without an error, no DMA reaches what is gone. As
    /// [`Space::memory_changed`] says, `memory` must have what came, and the cost is that of going through all leaves, and of reading the tables that came.
    ///
    /// # Errors
    /// [`LiveError::Commit`].
    pub fn memory_changed<M: EntryMemory + ?Sized>(&mut self, memory: &M, map: MemoryMap) -> Result<Report, LiveError> {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        self.space.memory_changed(memory, map, &budget, &mut self.changes);
        self.hand_over(Heard::default(), S::remap)
    }

    /// The format of the only table, or of the first, failed and was opened again: blocked entries are judged by the new instance.
    ///
    /// # Errors
    /// [`ReopenError`](crate::sync::ReopenError); the old one stays.
    pub fn reopen(&mut self, format: Box<dyn Format>) -> Result<(), crate::sync::ReopenError> {
        self.reopen_stage(1, format)
    }

    /// The same for the first of two tables, or the second.
    ///
    /// # Errors
    /// As [`Live::reopen`], and if there is no such table.
    pub fn reopen_stage(&mut self, stage: u8, format: Box<dyn Format>) -> Result<(), crate::sync::ReopenError> {
        self.space.reopen(stage, format)
    }

    /// Commits again after an error; pieces that the sink has room for by then are offered to it.
    ///
    /// # Errors
    /// The kernel refused again.
    pub fn commit(&mut self) -> Result<(), CommitError> {
        self.sink.commit()?;
        self.offer_again().map(|_| ())
    }

    /// Looks at what was collected.
    fn look<M: EntryMemory + ?Sized>(&mut self, memory: &M, heard: Heard) -> Result<Report, LiveError> {
        let budget = Budget::new(Limits { questions: self.questions, ..Limits::default() });
        join(&mut self.second);
        join(&mut self.wanted);
        if !self.wanted.is_empty() || !self.second.is_empty() {
            self.space.synchronise_both(memory, (&self.wanted, &self.second), &budget, &mut self.changes);
        }
        self.hand_over(heard, S::apply)
    }

    fn hand_over(&mut self, heard: Heard, apply: fn(&mut S, &[Change])) -> Result<Report, LiveError> {
        let Heard { structures, illegal } = heard;
        let (blocked, blocked_count) = (self.changes.blocked().to_vec(), self.changes.blocked_count());
        let mut changes = 0;
        if !self.changes.is_empty() {
            let batch = self.changes.batch();
            changes = batch.len() as u64;
            apply(&mut self.sink, batch);
        }
        if changes + blocked_count != 0 {
            self.changes.clear();
        }
        self.sink.commit()?;
        let offered = if self.sink.wants().is_some() { self.offer_again()? } else { 0 };
        Ok(Report { changes, offered, blocked, blocked_count, lacks: self.sink.lacks(), structures, illegal })
    }

    /// Offers the sink what it wants, as long as it wants something else each time; how many pieces these were.
    fn offer_again(&mut self) -> Result<u64, CommitError> {
        let (mut offered, mut before) = (0, None);
        while let Some(wanted) = self.sink.wants().filter(|wanted| before != Some(*wanted)) {
            before = Some(wanted);
            let mut batch = Vec::new();
            let more = self.space.pieces_until(wanted, &mut |piece| {
                batch.push(Change::Map(piece));
                if batch.len() < CHUNK { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            });
            let end = batch.last().filter(|_| more.is_break()).map_or(wanted.last, |change| change.span().last.min(wanted.last));
            offered += batch.len() as u64;
            self.sink.offer(Span { last: end, ..wanted }, &batch);
        }
        if before.is_some() {
            self.sink.commit()?;
        }
        Ok(offered)
    }
}
