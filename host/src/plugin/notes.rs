//! What a plugin notes about device structures during one `lookup`, bounded.

use crate::Gpa;
use crate::plugin::bindings::stagecraft::format::{notes, types};
use crate::plugin::error;
use crate::table::Severity;

/// Bits of a device structure that should not be so, and that hardware does not mind.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Note {
    /// [`Severity::Warning`] or [`Severity::Info`]: what hardware refuses is [`Outcome::Blocked`](super::Outcome::Blocked), and never a note.
    pub severity: Severity,
    /// Where the structure stands: guest-physical, for a structure behind a second stage an input of that.
    pub address: Gpa,
    /// Which 64-bit word of the structure, from 0.
    pub word: u8,
    /// The bits of that word, as the unit reads it.
    pub bits: u64,
    /// Document and section; may be empty.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

/// Notes of one lookup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notes {
    /// The first [`Notes::MOST`].
    pub kept: Vec<Note>,
    /// How many came after those.
    pub dropped: u64,
}

impl Notes {
    /// Notes of one lookup that are kept; the contract says so. Real structures get a handful.
    pub const MOST: usize = 64;

    /// Keeps a note if there is room. One that points to no bit says nothing and is ignored.
    pub(super) fn add(&mut self, note: &notes::Note) {
        if note.bits == 0 {
            return;
        }
        if self.kept.len() >= Self::MOST {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        let severity = match note.severity {
            types::Severity::Error | types::Severity::Warning => Severity::Warning,
            types::Severity::Info => Severity::Info,
        };
        let (section, reason) = (error::clean(&note.section), error::clean(&note.reason));
        self.kept.push(Note { severity, address: Gpa(note.address), word: note.word, bits: note.bits, section, reason });
    }
}
