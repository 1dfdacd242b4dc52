//! Mappings that the owner of an address space makes one by one, and not a guest's tables: each is made exactly, or refused with the reason.

use super::book::{Wanted, overlapping, uncovered};
use super::fill::count_narrowed;
use super::{Areas, AreasError};
use crate::kernel::Errno;
use crate::sync::sink::{CommitError, Sink};
use crate::table::{Loss, Piece};
use crate::{Change, Span};

/// A mapping was not made. Nothing changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Something is mapped there.
    #[error("{asked} overlaps what is mapped at {present}")]
    Overlap {
        /// What was asked for.
        asked: Span,
        /// IOVAs of one mapping that is there.
        present: Span,
    },
    /// Part of it cannot be said in the host.
    #[error("{span} cannot be mapped: {}", loss.describe())]
    Lost {
        /// The first part of which that is true.
        span: Span,
        /// Why.
        loss: Loss,
    },
    /// Writing is asked for, and the memory is read-only.
    #[error("{0} cannot be mapped for writing: the memory is read-only")]
    ReadOnly(Span),
    /// The address space is at its limit.
    #[error("the address space is at its limit of {0} areas or mappings")]
    Full(usize),
    /// What was there before has not been removed yet; after the next commit it has.
    #[error("what was unmapped at {0} is not gone yet: commit first")]
    Stale(Span),
    /// The kernel refused.
    #[error("the kernel refused to map {span}: {errno}")]
    Kernel {
        /// The part.
        span: Span,
        /// Why.
        errno: Errno,
    },
}

/// A mapping was not removed.
#[derive(Debug, thiserror::Error)]
pub enum UnmapError {
    /// Nothing is mapped there. Nothing changed.
    #[error("nothing is mapped at {0}")]
    Absent(Span),
    /// A mapping would be cut. Nothing changed.
    #[error("{asked} cuts the mapping {present}")]
    Cut {
        /// What was asked for.
        asked: Span,
        /// The mapping.
        present: Span,
    },
    /// The mappings are forgotten, but some of it may still be reached: commit until that succeeds.
    #[error(transparent)]
    Commit(#[from] CommitError),
}

/// A sink that also takes single mappings.
///
/// # What it promises
///
/// * `map` makes all of a mapping or, on an error, nothing. What the kernel would not remove again after a failure is removed at the next commit, which fails
///   until it is gone.
/// * When `unmap` returns without an error, no device reaches what was there.
pub trait Managed: Sink {
    /// Maps a piece, exactly as it is.
    ///
    /// # Errors
    /// [`MapError`].
    fn map(&mut self, piece: &Piece) -> Result<(), MapError>;

    /// Whether `unmap` would find whole mappings within the span.
    ///
    /// # Errors
    /// [`UnmapError::Absent`], [`UnmapError::Cut`].
    fn check_unmap(&self, span: Span) -> Result<(), UnmapError>;

    /// Removes all mappings within the span, at least one.
    ///
    /// # Errors
    /// [`UnmapError`].
    fn unmap(&mut self, span: Span) -> Result<(), UnmapError>;
}

impl Managed for Areas {
    fn map(&mut self, piece: &Piece) -> Result<(), MapError> {
        self.refresh();
        if self.ranges_unknown {
            self.query_ranges();
        }
        let (first, wanted) = (piece.iova.first, Wanted::of(piece));
        if let Some((at, other)) = overlapping(&self.wanted, piece.iova).next() {
            return Err(MapError::Overlap { asked: piece.iova, present: other.span(at) });
        }
        if self.wanted.len() >= self.limits.pieces {
            return Err(MapError::Full(self.limits.pieces));
        }
        let (mut parts, mut lost) = (Vec::new(), None);
        self.scope.parts(first, &wanted, &mut parts, &mut |loss, span| lost = lost.or(Some(MapError::Lost { span, loss })));
        lost.map_or(Ok(()), Err)?;
        if let Some(narrower) = parts.iter().find(|part| part.flags != wanted.flags) {
            return Err(MapError::ReadOnly(narrower.iova));
        }
        let blocks: usize = parts.iter().map(|part| self.scope.view.within(part.memory()).len()).sum();
        if self.areas.len() + blocks > self.limits.areas {
            return Err(MapError::Full(self.limits.areas));
        }
        let mut free = Vec::new();
        if parts.iter().any(|part| uncovered(part, &self.areas, &mut free)) || free != parts {
            return Err(MapError::Stale(piece.iova));
        }
        for part in &parts {
            if let Err(errno) = self.copy_here(part) {
                let made: Vec<u64> = overlapping(&self.areas, piece.iova).map(|(first, _)| first).collect();
                self.unmap_areas(&made);
                return Err(MapError::Kernel { span: part.iova, errno });
            }
        }
        self.wanted.insert(first, wanted);
        count_narrowed(&mut self.losses, piece);
        Ok(())
    }

    fn check_unmap(&self, span: Span) -> Result<(), UnmapError> {
        let mut found = false;
        for (first, wanted) in overlapping(&self.wanted, span) {
            let present = wanted.span(first);
            if present.intersection(span) != Some(present) {
                return Err(UnmapError::Cut { asked: span, present });
            }
            found = true;
        }
        if found { Ok(()) } else { Err(UnmapError::Absent(span)) }
    }

    fn unmap(&mut self, span: Span) -> Result<(), UnmapError> {
        self.check_unmap(span)?;
        let changes: Vec<Change> = overlapping(&self.wanted, span).map(|(first, wanted)| Change::Unmap(wanted.span(first))).collect();
        self.apply(&changes);
        Ok(self.commit()?)
    }
}

impl From<AreasError> for CommitError {
    fn from(error: AreasError) -> Self {
        Self(Box::new(error))
    }
}
