//! What devices write through a page table of guest memory that several address spaces share, told to each of them.
//!
//! The kernel has one record for a page table. Whoever reads it and clears it would take from the others what they have not been told; so whatever is read is kept
//! for all who listen. What one IOASID's devices wrote is told to the others as well: pages count as written that may have been.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Span;
use crate::kernel::Errno;
use crate::kernel::handle::Hwpt;
use crate::sync::PageSet;

/// Writes that nobody has been told of, of parts that are gone among them.
pub(super) type Log = Arc<Mutex<PageSet>>;

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest memory that is in a parent address space and may be written, and that the kernel therefore records.
#[derive(Debug, Default)]
pub(super) struct Mapped(Mutex<Vec<Span>>);

impl Mapped {
    pub(super) fn add(&self, span: Span) {
        lock(&self.0).push(span);
    }

    pub(super) fn remove(&self, span: Span) {
        let cut = |other: &Span| {
            let before = span.first.checked_sub(1).and_then(|last| Span::new(other.first, last.min(other.last)));
            let behind = span.last.checked_add(1).and_then(|first| Span::new(first.max(other.first), other.last));
            before.into_iter().chain(behind).collect::<Vec<_>>()
        };
        let mut list = lock(&self.0);
        *list = list.iter().flat_map(cut).collect();
    }

    fn within(&self, targets: Span) -> Vec<Span> {
        lock(&self.0).iter().filter_map(|span| span.intersection(targets)).collect()
    }
}

#[derive(Debug, Default)]
struct Heard {
    next: u64,
    of: BTreeMap<u64, PageSet>,
}

/// A page table of guest memory at its guest-physical addresses, and who listens to what is written through it.
#[derive(Debug)]
pub(super) struct Recorder {
    hwpt: Hwpt,
    mapped: Arc<Mapped>,
    heard: Mutex<Heard>,
    can: bool,
}

impl Recorder {
    /// `can`: the page table was made for it.
    pub(super) fn new(hwpt: Hwpt, mapped: &Arc<Mapped>, can: bool) -> Arc<Self> {
        Arc::new(Self { hwpt, mapped: Arc::clone(mapped), heard: Mutex::default(), can })
    }

    pub(super) const fn hwpt(&self) -> &Hwpt {
        &self.hwpt
    }

    /// Writes can be recorded.
    pub(super) const fn can(&self) -> bool {
        self.can
    }

    /// Begins to listen, to what is written from now on.
    pub(super) fn listen(self: &Arc<Self>) -> Result<Listener, Errno> {
        let mut heard = lock(&self.heard);
        if heard.of.is_empty() {
            self.hwpt.kernel().set_dirty_tracking(self.hwpt.id(), true)?;
        } else {
            self.gather(&mut heard, Span::ALL)?;
        }
        let number = heard.next;
        heard.next += 1;
        heard.of.insert(number, PageSet::default());
        drop(heard);
        Ok(Listener { recorder: Arc::clone(self), number })
    }

    /// Takes what the kernel has recorded, for all.
    fn gather(&self, heard: &mut Heard, targets: Span) -> Result<(), Errno> {
        let mut keep = |run: Span| heard.of.values_mut().for_each(|pages| pages.add(run));
        self.mapped.within(targets).into_iter().try_for_each(|span| self.hwpt.written(span, true, &mut keep))
    }

    /// Memory went, with what was recorded of it: whatever comes there is another.
    pub(super) fn lose(&self, span: Span) {
        lock(&self.heard).of.values_mut().for_each(|pages| pages.add(span));
    }
}

/// Somebody who is told what is written; the kernel records as long as there is one.
#[derive(Debug)]
pub(super) struct Listener {
    recorder: Arc<Recorder>,
    number: u64,
}

impl Listener {
    /// Tells what was written at `targets` since the beginning or the last call that cleared. On an error nothing is lost.
    pub(super) fn read(&self, targets: Span, clear: bool, tell: &mut dyn FnMut(Span)) -> Result<(), Errno> {
        let recorder = &self.recorder;
        let mut heard = lock(&recorder.heard);
        if clear {
            recorder.gather(&mut heard, targets)?;
        } else {
            recorder.mapped.within(targets).into_iter().try_for_each(|span| recorder.hwpt.written(span, false, tell))?;
        }
        if let Some(pages) = heard.of.get_mut(&self.number) {
            pages.each(targets, tell);
            if clear {
                pages.remove(targets);
            }
        }
        Ok(())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let mut heard = lock(&self.recorder.heard);
        heard.of.remove(&self.number);
        if heard.of.is_empty() {
            let hwpt = &self.recorder.hwpt;
            // If it goes on, nobody reads it.
            let _ = hwpt.kernel().set_dirty_tracking(hwpt.id(), false);
        }
    }
}
