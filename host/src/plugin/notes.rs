//! What a plugin notes about device structures during one `lookup`, bounded.

use crate::Gpa;
use crate::plugin::bindings::stagecraft::format::{notes, types};
use crate::plugin::error;
use crate::table::Severity;

/// Bits of a device structure that should not be so, and that hardware does not mind; or those that it refuses.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Note {
    /// [`Severity::Warning`] or [`Severity::Info`]. [`Severity::Error`]: the structure because of which the answer is [`Outcome::Blocked`](super::Outcome::Blocked);
    /// there is none beside any other answer.
    pub severity: Severity,
    /// Where the structure stands: guest-physical, for a structure behind a second stage an input of that.
    pub address: Gpa,
    /// Which 64-bit word of the structure, from 0.
    pub word: u8,
    /// The bits of that word, as the unit reads it; zero only for an error that concerns the structure as a whole.
    pub bits: u64,
    /// Document and section; may be empty.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

/// Notes of one lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The first [`Notes::MOST`], and an error in any case.
    pub kept: Vec<Note>,
    /// How many came after those.
    pub dropped: u64,
}

impl Notes {
    /// Notes of one lookup that are kept; the contract says so. Real structures get a handful.
    pub const MOST: usize = 64;

    /// What hardware refuses, if the answer was that it does, and where that is known.
    #[must_use]
    pub fn refused(&self) -> Option<&Note> {
        self.kept.iter().rfind(|note| note.severity == Severity::Error)
    }

    /// Keeps a note if there is room. One that points to no bit says nothing and is ignored, unless it is an error.
    pub(super) fn add(&mut self, note: &notes::Note) {
        let error = note.severity == types::Severity::Error;
        if note.bits == 0 && !error {
            return;
        }
        if self.kept.len() >= Self::MOST && (!error || self.refused().is_some()) {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        let severity = match note.severity {
            types::Severity::Error => Severity::Error,
            types::Severity::Warning => Severity::Warning,
            types::Severity::Info => Severity::Info,
        };
        let (section, reason) = (error::clean(&note.section), error::clean(&note.reason));
        self.kept.push(Note { severity, address: Gpa(note.address), word: note.word, bits: note.bits, section, reason });
    }

    /// The answer is known. Errors are about a refusal; beside another answer they are warnings.
    pub(super) fn settle(&mut self, refused: bool) {
        if refused {
            return;
        }
        self.kept.retain(|note| note.bits != 0);
        self.kept.iter_mut().filter(|note| note.severity == Severity::Error).for_each(|note| note.severity = Severity::Warning);
    }
}
