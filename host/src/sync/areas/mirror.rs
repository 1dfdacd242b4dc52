//! One address space in several hosts: for devices behind units that cannot share one.
//!
//! An IOAS with devices behind two units is mirrored by the kernel itself, in all page tables or in none. A mirror is for what no kernel joins: areas for one
//! device and a nested table for another, two kernels' containers, or two IOASes because one device reserves IOVAs that the other must not do without.

use super::managed::{Managed, MapError, UnmapError};
use crate::sync::marks::Marked;
use crate::sync::sink::{CommitError, Sink};
use crate::table::Piece;
use crate::{Change, Span};

/// Several sinks with the same content.
///
/// Batches go to all of them; what one of them cannot say is lost in that one only, and counted there. Single mappings are made in all or in none.
#[derive(Debug)]
pub struct Mirror<S> {
    sinks: Vec<S>,
}

impl<S> Mirror<S> {
    /// Joins sinks that hold the same, at first nothing.
    #[must_use]
    pub const fn new(sinks: Vec<S>) -> Self {
        Self { sinks }
    }

    /// The sinks, in the order in which they were given.
    #[must_use]
    pub fn sinks(&self) -> &[S] {
        &self.sinks
    }

    /// The sinks.
    pub fn sinks_mut(&mut self) -> &mut [S] {
        &mut self.sinks
    }
}

impl<S: Sink> Sink for Mirror<S> {
    fn apply(&mut self, batch: &[Change]) {
        self.sinks.iter_mut().for_each(|sink| sink.apply(batch));
    }

    /// Commits all of them, whatever happens to one.
    fn commit(&mut self) -> Result<(), CommitError> {
        let mut result = Ok(());
        for sink in &mut self.sinks {
            let committed = sink.commit();
            result = result.and(committed);
        }
        result
    }

    fn wants(&self) -> Option<Span> {
        self.sinks.iter().find_map(Sink::wants)
    }

    /// To all of them: those that have the pieces leave them as they are.
    fn offer(&mut self, span: Span, pieces: &[Change]) {
        self.sinks.iter_mut().for_each(|sink| sink.offer(span, pieces));
    }

    fn remap(&mut self, batch: &[Change]) {
        self.sinks.iter_mut().for_each(|sink| sink.remap(batch));
    }

    /// What any of them tells, one after the other.
    fn marks(&self, span: Span, each: &mut dyn FnMut(Marked)) {
        self.sinks.iter().for_each(|sink| sink.marks(span, each));
    }

    /// All of them, or none.
    fn track_dirty(&mut self, on: bool) -> bool {
        let mut all = true;
        for sink in &mut self.sinks {
            all &= sink.track_dirty(on);
        }
        if on && !all {
            for sink in &mut self.sinks {
                sink.track_dirty(false);
            }
        }
        all
    }

    fn dirty(&mut self, targets: Span, clear: bool, each: &mut dyn FnMut(Span)) {
        self.sinks.iter_mut().for_each(|sink| sink.dirty(targets, clear, each));
    }
}

impl<S: Managed> Managed for Mirror<S> {
    fn map(&mut self, piece: &Piece) -> Result<(), MapError> {
        for index in 0..self.sinks.len() {
            if let Err(error) = self.sinks[index].map(piece) {
                for done in &mut self.sinks[..index] {
                    // What is not gone yet is remembered there, and makes its commits fail until it is.
                    let _ = done.unmap(piece.iova);
                }
                return Err(error);
            }
        }
        Ok(())
    }

    fn check_unmap(&self, span: Span) -> Result<(), UnmapError> {
        self.sinks.iter().try_for_each(|sink| sink.check_unmap(span))
    }

    /// Unmaps in all of them, also when one fails.
    fn unmap(&mut self, span: Span) -> Result<(), UnmapError> {
        self.check_unmap(span)?;
        let mut result = Ok(());
        for sink in &mut self.sinks {
            let unmapped = sink.unmap(span);
            result = result.and(unmapped);
        }
        result
    }
}
