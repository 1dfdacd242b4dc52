//! What devices wrote: marks on their way back into the guest's tables, and logs of written pages.
//!
//! Where the log is, depends on the strategy: the kernel records in page tables of guest memory that the unit's own walk of a guest's table ends in ([`Recorder`](super::record)),
//! in the tables of areas and of the VMM's mappings; and hardware marks the entries of host tables. What one of these knew when it goes, by a switch, a better strategy or
//! a mapping that is taken away, is kept by the IOASID, and what an IOASID knew when it goes, by its context.

use std::sync::Arc;

use super::metrics::Counter;
use super::part::{Engine, Host, Part};
use super::record::{Listener, Log, lock};
use super::space::{Content, Space, State};
use super::{Context, Error, Ioasid, Property, Refusal, Target};
use crate::kernel::Errno;
use crate::memory::{MarkMemory, PAGE};
use crate::sync::{DirtyError, MOST_PAGES, MarksWritten, PageSet, Sink, pages_of, set_bits};
use crate::{Change, Span};

/// Pieces that are mapped anew at once.
const CHUNK: usize = 4096;

impl Ioasid {
    /// Looks which leaves for IOVAs of `span` the hosts' hardware marked, and marks the guest's entries, as accessed and as dirty, where the guest's configuration
    /// promises that hardware does; those that lead to a leaf before that leaf. Where a host does not tell, as areas of the kernel, all of them count as marked. Where the unit walks the guest's own table it
    /// sets the marks by itself.
    ///
    /// Marks that hosts knew of that are gone, because devices went to other IOASIDs or got other strategies, or because the guest's structures changed, are kept until
    /// this is called for any IOASID of the context, and are written whatever `span` is; those that there was no room for count as skipped. An access while the guest's structures become others, by what
    /// was before, may be missed.
    ///
    /// Such an entry ([`MarksWritten::earlier`]) may lead to memory now where it did not: if the second of two stages lets it be read, and not marked.
    /// [`Ioasid::synchronise`] maps that.
    pub fn write_marks(&self, span: Span) -> MarksWritten {
        let memory = self.0.context().memory();
        let mut all = self.0.context().marks_left().write(memory.marks());
        let mut state = self.0.lock();
        for part in &mut state.parts {
            all.add(part.write_marks(memory.marks(), span));
        }
        all
    }

    /// Begins or ends to record which guest memory devices write, for migration; beginning again begins with nothing. Translations stay what they are all the while, and who
    /// is attached or moved later is recorded as well.
    ///
    /// # Errors
    /// [`Error::Refused`]: a unit that has a part in it cannot; nobody records then. All but host tables whose format has marks for it need
    /// [`Request::dirty_tracking`](super::Request::dirty_tracking). [`Error::Kernel`]; [`Error::Blocked`].
    pub fn track_dirty(&self, on: bool) -> Result<(), Error> {
        let _memory = self.0.context().hold_memory();
        self.0.record(&mut self.0.lock(), on)
    }

    /// Which pages of guest memory at `targets` devices may have written since the last call that cleared them, or since [`Ioasid::track_dirty`]. Bit `n % 64` of
    /// word `n / 64` is the `n`th page of 4 KiB, counted from the page of the first address. With `clear` they are forgotten. No write is ever missing; of pages that were
    /// not written, those are told that share a leaf or a table of the kernel's with ones that were, and those of mappings that went, if they could be written.
    ///
    /// # Errors
    /// [`Error::Refused`]: nobody records, or there are more than 2^30 pages. [`Error::Kernel`], [`Error::Blocked`]: nothing is forgotten; after the latter all of the span counts
    /// as written.
    pub fn dirty(&self, targets: Span, clear: bool) -> Result<Vec<u64>, Error> {
        let mut bitmap = Bitmap::new(targets)?;
        let mut pages = PageSet::default();
        let _memory = self.0.context().hold_memory();
        self.0.written(targets, clear, &mut pages)?;
        pages.each(targets, &mut |span| bitmap.set(span));
        Ok(bitmap.words)
    }
}

impl Context {
    /// As [`Ioasid::write_marks`], for all IOASIDs that there are or were: before a guest's memory is copied for the last time, so that it finds all marks where it goes.
    pub fn write_marks(&self) -> MarksWritten {
        let mut all = self.0.marks_left().write(self.memory().marks());
        self.ioasids().iter().for_each(|ioasid| all.add(ioasid.write_marks(Span::ALL)));
        all
    }

    /// As [`Ioasid::track_dirty`], for all IOASIDs, and for those that are made later: what their devices write is told by [`Context::dirty`], also when an IOASID is gone.
    ///
    /// # Errors
    /// As [`Ioasid::track_dirty`], for the first that cannot; nobody records then.
    pub fn track_dirty(&self, on: bool) -> Result<(), Error> {
        // Dropped after the lock: the last handle of an IOASID takes it.
        let ioasids;
        let _memory = self.0.hold_memory();
        let mut record = lock(self.0.record());
        ioasids = self.ioasids();
        *record = None;
        for ioasid in &ioasids {
            // The lock is not held any more when all are told to end.
            let begun = ioasid.0.record(&mut ioasid.0.lock(), on);
            if let Err(error) = begun {
                ioasids.iter().for_each(|ioasid| drop(ioasid.0.record(&mut ioasid.0.lock(), false)));
                return Err(error);
            }
        }
        *record = on.then(Log::default);
        Ok(())
    }

    /// As [`Ioasid::dirty`], of all IOASIDs that there are or were since [`Context::track_dirty`].
    ///
    /// # Errors
    /// As [`Ioasid::dirty`].
    pub fn dirty(&self, targets: Span, clear: bool) -> Result<Vec<u64>, Error> {
        let mut bitmap = Bitmap::new(targets)?;
        let ioasids;
        let _memory = self.0.hold_memory();
        let record = lock(self.0.record());
        ioasids = self.ioasids();
        let log = record.as_ref().ok_or_else(nobody)?;
        let mut pages = PageSet::default();
        for ioasid in &ioasids {
            if let Err(error) = ioasid.0.written(targets, clear, &mut pages) {
                if clear {
                    lock(log).join(&pages);
                }
                return Err(error);
            }
        }
        let mut log = lock(log);
        log.each(targets, &mut |span| pages.add(span));
        if clear {
            log.remove(targets);
        }
        drop(log);
        pages.each(targets, &mut |span| bitmap.set(span));
        Ok(bitmap.words)
    }
}

/// A bit for each page of a span.
struct Bitmap {
    first: u64,
    words: Vec<u64>,
}

impl Bitmap {
    fn new(targets: Span) -> Result<Self, Error> {
        let first = targets.first / PAGE;
        let Some(pages) = pages_of(targets) else {
            return Err(Refusal::new(Property::Limit, format!("{targets} has more than {MOST_PAGES:#x} pages, or ends before it begins")).into());
        };
        Ok(Self { first, words: vec![0; pages.div_ceil(64) as usize] })
    }

    /// A part of the span.
    fn set(&mut self, span: Span) {
        set_bits(&mut self.words, span.first / PAGE - self.first, span.last / PAGE - self.first);
    }
}

/// Why a strategy cannot tell.
pub(super) const NOT_RECORDED: &str =
    "the kernel records no writes in page tables that such a table stands on, and hardware does not mark them in the table";

fn cannot(part: &Part) -> Error {
    let what = part.explanation.chosen.as_ref().map_or_else(String::new, |chosen| format!(" ({}: {})", chosen.strategy, chosen.what));
    Refusal::new(
        Property::DirtyTracking,
        format!("what device {} writes{what} is not recorded: the request did not ask for it", part.explanation.device),
    )
    .into()
}

fn nobody() -> Error {
    Refusal::new(Property::DirtyTracking, "nobody records what devices write").into()
}

impl Space {
    /// Begins or ends to record in all parts.
    pub(super) fn record(&self, state: &mut State, on: bool) -> Result<(), Error> {
        let log = Log::default();
        let told = state.told();
        state.written = None;
        let State { parts, content, written, .. } = state;
        // What was recorded up to now is nobody's any more.
        parts.iter_mut().for_each(|part| part.end_record(content));
        for place in 0..if on { parts.len() } else { 0 } {
            if let Err(error) = parts[place].begin_record(content, &told, &log) {
                parts.iter_mut().for_each(|part| part.end_record(content));
                return Err(error);
            }
        }
        *written = on.then(|| Arc::clone(&log));
        if let Content::Managed(managed) = content {
            managed.keep_in(on.then_some(log));
        }
        Ok(())
    }

    /// Adds what was written at `targets` to `pages`; as before on an error.
    fn written(&self, targets: Span, clear: bool, pages: &mut PageSet) -> Result<(), Error> {
        let mut state = self.lock();
        let log = state.written.clone().ok_or_else(nobody)?;
        let State { parts, content, .. } = &mut *state;
        let mut found = PageSet::default();
        for part in parts {
            if let Err(error) = part.written(content, targets, clear, &mut |span| found.add(span)) {
                let mut log = lock(&log);
                log.join(&found);
                if matches!(error, Error::Blocked(_)) {
                    log.add(targets);
                }
                return Err(error);
            }
        }
        let mut log = lock(&log);
        log.each(targets, &mut |span| found.add(span));
        if clear {
            log.remove(targets);
        }
        pages.join(&found);
        Ok(())
    }
}

/// What a part records by, while somebody wants to know.
#[derive(Debug)]
pub(super) struct Recording {
    /// Where what it knows goes when it goes.
    log: Log,
    by: By,
}

#[derive(Debug)]
enum By {
    /// The kernel, in a page table of guest memory.
    Memory(Listener),
    /// The kernel, in the page table of the VMM's mappings.
    Mappings,
    /// The host's side itself.
    Host,
    /// There is nothing that could be written.
    Nothing,
}

impl Part {
    /// Begins to record writes: those who are attached, and those who will be. `told` are the maps of an address space that nobody follows.
    pub(super) fn begin_record(&mut self, content: &Content, told: &[Change], log: &Log) -> Result<(), Error> {
        let is_managed = matches!(content, Content::Managed(_));
        let failed = Error::kernel("recording which pages are written");
        let by = match (self.recorder().cloned(), &mut self.host) {
            (Some(recorder), _) if recorder.can() => Some(By::Memory(recorder.listen().map_err(failed)?)),
            (None, Host::Kernel { hwpt, .. }) if is_managed => match hwpt.kernel().set_dirty_tracking(hwpt.id(), true) {
                Ok(()) => Some(By::Mappings),
                Err(Errno::EOPNOTSUPP) => None,
                Err(errno) => return Err(failed(errno)),
            },
            (None, Host::Kernel { .. }) => Some(By::Nothing),
            (_, Host::Table(_, engine)) => engine.track_dirty(told, true)?.then_some(By::Host),
            (_, Host::Areas(engine)) => engine.track_dirty(told, true)?.then_some(By::Host),
            _ => None,
        };
        let Some(by) = by else { return Err(cannot(self)) };
        self.record = Some(Recording { log: Arc::clone(log), by });
        Ok(())
    }

    fn end_record(&mut self, content: &Content) {
        let Some(Recording { by, .. }) = self.record.take() else { return };
        match (by, &mut self.host) {
            (By::Mappings, Host::Kernel { hwpt, .. }) if matches!(content, Content::Managed(_)) => {
                let _ = hwpt.kernel().set_dirty_tracking(hwpt.id(), false);
            }
            (By::Host, Host::Table(_, engine)) => drop(engine.track_dirty(&[], false)),
            (By::Host, Host::Areas(engine)) => drop(engine.track_dirty(&[], false)),
            _ => {}
        }
    }

    /// Tells what was written at `targets`.
    fn written(&mut self, content: &Content, targets: Span, clear: bool, tell: &mut dyn FnMut(Span)) -> Result<(), Error> {
        let unread = Error::kernel("reading which pages were written");
        let Some(Recording { by, .. }) = &self.record else { return Err(nobody()) };
        match (by, &mut self.host, content) {
            (By::Memory(listener), ..) => listener.read(targets, clear, tell).map_err(unread),
            (By::Mappings, Host::Kernel { hwpt, .. }, Content::Managed(managed)) => {
                for (iova, mapping) in managed.mappings().iter().filter(|(_, mapping)| mapping.access.write) {
                    let Target::Guest(gpa) = mapping.target else { continue };
                    let memory = Span { first: gpa.0, last: gpa.0 + (mapping.last - iova) };
                    let Some(inside) = memory.intersection(targets) else { continue };
                    let at = |address: u64| iova + (address - memory.first);
                    let span =
                        Span { first: at((inside.first & !(PAGE - 1)).max(memory.first)), last: at((inside.last | (PAGE - 1)).min(memory.last)) };
                    let mut in_memory = |run: Span| tell(Span { first: memory.first + (run.first - iova), last: memory.first + (run.last - iova) });
                    hwpt.written(span, clear, &mut in_memory).map_err(Error::kernel("reading which pages were written"))?;
                }
                Ok(())
            }
            (By::Host, Host::Table(_, engine), _) => engine.each_dirty(targets, clear, tell),
            (By::Host, Host::Areas(engine), _) => engine.each_dirty(targets, clear, tell),
            _ => Ok(()),
        }
    }

    fn write_marks(&mut self, memory: &(impl MarkMemory + ?Sized), span: Span) -> MarksWritten {
        match &mut self.host {
            Host::Kernel { .. } | Host::Own(..) => MarksWritten::default(),
            Host::Table(_, engine) => engine.write_marks(memory, span),
            Host::Areas(engine) => engine.write_marks(memory, span),
        }
    }

    /// Marks of hardware that it is about to forget are kept.
    pub(super) fn leave_marks(&mut self) {
        if self.was_used {
            let left = Arc::clone(&self.marks_left);
            if let Host::Table(_, engine) = &mut self.host {
                engine.leave_gone(Some(&left));
            }
            let _ = self.write_marks(&*left, Span::ALL);
        }
    }
}

impl Drop for Part {
    /// Nobody is attached any more: what it knows of marks and writes is kept, and what it cost.
    fn drop(&mut self) {
        self.leave_marks();
        self.counters.add(Counter::Questions, self.questions());
        let Some(Recording { log, by }) = self.record.take() else { return };
        let mut log = lock(&log);
        let mut keep = |span| log.add(span);
        let read = match (&by, &mut self.host) {
            (By::Memory(listener), _) => listener.read(Span::ALL, false, &mut keep).is_ok(),
            (By::Host, Host::Table(_, engine)) => engine.each_dirty(Span::ALL, false, &mut keep).is_ok(),
            (By::Host, Host::Areas(engine)) => engine.each_dirty(Span::ALL, false, &mut keep).is_ok(),
            (By::Nothing, _) => true,
            // Which mappings there are is not known here.
            _ => false,
        };
        if !read {
            log.add(Span::ALL);
        }
    }
}

impl<S: Sink> Engine<S> {
    /// False: it cannot.
    fn track_dirty(&mut self, told: &[Change], on: bool) -> Result<bool, Error> {
        match self {
            Self::Live(live) => Ok(live.track_dirty(on)?),
            Self::Told(sink) => {
                if !sink.track_dirty(on) {
                    return Ok(false);
                }
                for maps in told.chunks(CHUNK) {
                    let unmaps = maps.iter().map(|map| Change::Unmap(map.span()));
                    sink.remap(&unmaps.chain(maps.iter().copied()).collect::<Vec<_>>());
                }
                sink.commit().map_err(Error::Blocked)?;
                Ok(true)
            }
        }
    }

    fn each_dirty(&mut self, targets: Span, clear: bool, tell: &mut dyn FnMut(Span)) -> Result<(), Error> {
        match self {
            Self::Live(live) => live.each_dirty(targets, clear, tell).map_err(|error| match error {
                DirtyError::Commit(error) => Error::Blocked(error),
                error => Refusal::new(Property::DirtyTracking, error.to_string()).into(),
            }),
            Self::Told(sink) => {
                sink.dirty(targets, clear, tell);
                if clear { sink.commit().map_err(Error::Blocked) } else { Ok(()) }
            }
        }
    }
}
