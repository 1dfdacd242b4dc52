//! What a unit notes about device structures. Tests of format crates include this file:
//!
//! ```text
//! #[path = "../../../sdk/testing/notes.rs"]
//! mod notes;
//! ```
#![allow(dead_code, unreachable_pub, missing_docs)]

use stagecraft_sdk::{Error, GuestMemory, Note, Severity, TableConfig};

/// Guest memory that remembers what was noted.
pub struct Noting<M> {
    pub memory: M,
    pub notes: Vec<Note>,
}

impl<M> Noting<M> {
    pub fn new(memory: M) -> Self {
        Self { memory, notes: Vec::new() }
    }

    /// Address, word and bits of each warning. All notes are well formed.
    pub fn warnings(&self) -> Vec<(u64, u8, u64)> {
        for note in &self.notes {
            assert!(note.bits != 0 && note.severity != Severity::Error, "{note:?}");
            assert!(!note.section.is_empty() && !note.reason.is_empty(), "{note:?}");
            assert!(!note.reason.ends_with('.') && note.reason.starts_with(char::is_lowercase), "{note:?}");
        }
        self.notes.iter().filter(|note| note.severity == Severity::Warning).map(|note| (note.address, note.word, note.bits)).collect()
    }
}

impl<M: GuestMemory> GuestMemory for Noting<M> {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.memory.read(address, length)
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.memory.read_through(table, address, length)
    }

    fn note(&mut self, note: Note) {
        self.notes.push(note);
    }
}
