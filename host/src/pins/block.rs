//! Blocks of guest memory, and who uses them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::PinError;
use crate::Span;

/// One area of the GPA IOAS.
#[derive(Debug)]
pub(crate) struct Block {
    /// Guest-physical addresses.
    pub(crate) span: Span,
    /// Devices may write to it.
    pub(crate) writable: bool,
    /// Bytes of the budget.
    pub(super) counted: u64,
    /// Copies of it, and whether there may be more.
    users: AtomicU64,
    /// Of an alias: what it was copied from. Held until the kernel has forgotten this block.
    origin: Mutex<Option<Use>>,
}

/// Nobody may use the block any more.
const CLOSED: u64 = 1 << 63;
/// It was closed before somebody wanted to remove it.
const WITHDRAWN: u64 = 1 << 62;
const COUNT: u64 = WITHDRAWN - 1;

impl Block {
    pub(super) const fn new(span: Span, writable: bool, counted: u64, origin: Option<Use>) -> Self {
        Self { span, writable, counted, users: AtomicU64::new(0), origin: Mutex::new(origin) }
    }

    /// The kernel has forgotten it. Somebody may look at an old view for a while.
    pub(super) fn gone(&self) {
        drop(self.origin.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    pub(super) fn users(&self) -> u64 {
        self.users.load(Ordering::Acquire) & COUNT
    }

    /// Whether its users should let go of it.
    pub(crate) fn is_closed(&self) -> bool {
        self.users.load(Ordering::Acquire) & CLOSED != 0
    }

    pub(super) fn close(&self) {
        self.users.fetch_or(CLOSED | WITHDRAWN, Ordering::AcqRel);
    }

    pub(super) fn open(&self) {
        self.users.fetch_and(COUNT, Ordering::AcqRel);
    }

    /// Whether it was withdrawn, not only closed for removal.
    pub(super) fn was_closed(&self) -> bool {
        self.users.load(Ordering::Acquire) & WITHDRAWN != 0
    }

    /// Closes it unless it has users; how many, if so.
    pub(super) fn close_unused(&self) -> Result<(), u64> {
        let closed = self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| (users & COUNT == 0).then_some(users | CLOSED));
        closed.map(|_| ()).map_err(|users| users & COUNT)
    }
}

/// The use of a block by one area. The block is not removed before it is dropped.
#[derive(Debug)]
pub(crate) struct Use(Arc<Block>);

impl Use {
    /// None: the block is being taken away.
    pub(crate) fn take(block: &Arc<Block>) -> Option<Self> {
        let taken = block.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| (users & CLOSED == 0).then_some(users + 1));
        taken.ok().map(|_| Self(Arc::clone(block)))
    }

    pub(crate) fn block(&self) -> &Block {
        &self.0
    }
}

impl Clone for Use {
    /// For a copy of the copy: one more user, also of a block that is being taken away, which waits for this one anyway.
    fn clone(&self) -> Self {
        self.0.users.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::AcqRel);
    }
}

/// All blocks at one moment, sorted.
#[derive(Clone, Debug, Default)]
pub(crate) struct View(Vec<Arc<Block>>);

impl View {
    pub(super) fn of(blocks: &[Arc<Block>]) -> Self {
        Self(blocks.to_vec())
    }

    pub(super) fn blocks(&self) -> &[Arc<Block>] {
        &self.0
    }

    /// Those that have an address of the span.
    pub(crate) fn within(&self, span: Span) -> &[Arc<Block>] {
        let start = self.0.partition_point(|block| block.span.last < span.first);
        let end = self.0.partition_point(|block| block.span.first <= span.last);
        self.0.get(start..end).unwrap_or_default()
    }

    /// Those within the span, at least one, and none is cut.
    pub(super) fn whole(&self, span: Span) -> Result<&[Arc<Block>], PinError> {
        let blocks = self.within(span);
        match blocks.iter().find(|block| block.span.first < span.first || block.span.last > span.last) {
            Some(cut) => Err(PinError::Cut { asked: span, block: cut.span }),
            None if blocks.is_empty() => Err(PinError::Absent(span)),
            None => Ok(blocks),
        }
    }

    /// From the first address to the last.
    pub(super) fn hull(&self) -> Span {
        let ends = self.0.first().zip(self.0.last());
        ends.map_or(Span::ALL, |(first, last)| Span { first: first.span.first, last: last.span.last })
    }

    pub(super) fn with(&self, blocks: &[Arc<Block>]) -> Arc<Self> {
        let mut all: Vec<Arc<Block>> = self.0.iter().chain(blocks).cloned().collect();
        all.sort_unstable_by_key(|block| block.span);
        Arc::new(Self(all))
    }

    /// Without some of them, which are sorted.
    pub(super) fn without(&self, blocks: &[Arc<Block>]) -> Arc<Self> {
        let gone = |block: &Arc<Block>| blocks.binary_search_by_key(&block.span, |other| other.span).is_ok();
        Arc::new(Self(self.0.iter().filter(|block| !gone(block)).cloned().collect()))
    }
}
