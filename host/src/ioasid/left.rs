//! Marks that hardware set in host tables that are gone: kept until somebody writes marks into the guest's entries.
//!
//! They are not written when a table goes. Whoever takes it away may be the one who handles writes of watched pages, and would wait for itself.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::record::lock;
use crate::memory::{EntryLayout, MarkMemory, WriteError};
use crate::sync::MarksWritten;
use crate::{Gpa, Span};

/// Entries that are kept, at most: what more there are stay unmarked, and count as skipped.
const MOST: usize = 1 << 20;
/// What an entry was read as by different host tables, at most.
const READINGS: usize = 8;

/// An entry as it is to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Entry {
    layout: EntryLayout,
    new: u64,
}

#[derive(Debug, Default)]
struct Kept {
    /// By where it is, and as what it was read: several host tables may have read it at different times.
    entries: BTreeMap<(u64, u64), Entry>,
    refused: u64,
}

/// The guest's entries that are to be marked. Whatever is to be marked is taken in as if it were the guest's memory.
#[derive(Debug, Default)]
pub(super) struct Left(Mutex<Kept>);

impl Left {
    /// Marks them in `memory`, each as hardware does; one that the guest has changed is left alone.
    pub(super) fn write<M: MarkMemory + ?Sized>(&self, memory: &M) -> MarksWritten {
        let Kept { entries, refused } = std::mem::take(&mut *lock(&self.0));
        let mut written = MarksWritten { skipped: refused, ..MarksWritten::default() };
        let entries: Vec<((u64, u64), Entry)> = entries.into_iter().collect();
        for readings in entries.chunk_by(|((one, _), _), ((other, _), _)| one == other) {
            let mut missing: Vec<&((u64, u64), Entry)> = readings.iter().collect();
            // What one reading marks may be what another one was of.
            loop {
                let before = missing.len();
                missing.retain(|((address, old), entry)| !entry.mark(memory, Gpa(*address), *old));
                if missing.len() == before {
                    break;
                }
            }
            written.earlier += u64::from(missing.len() < readings.len());
        }
        written
    }

    /// Memory goes, and what stands in it.
    pub(super) fn forget(&self, memory: Span) {
        lock(&self.0).entries.retain(|(address, _), _| !memory.contains(*address));
    }
}

impl Entry {
    /// False: all marks are there, set by others, or the guest has changed it.
    fn mark<M: MarkMemory + ?Sized>(&self, memory: &M, address: Gpa, old: u64) -> bool {
        let marks = old ^ self.new;
        // Others may have set some of them: all that are missing may be, then fewer.
        let mut missing = marks;
        while missing != 0 {
            match memory.compare_exchange_entry(address, self.layout, self.new ^ missing, self.new) {
                Ok(true) => return true,
                Ok(false) => missing = (missing - 1) & marks,
                Err(_) => return false,
            }
        }
        false
    }
}

impl MarkMemory for Left {
    fn compare_exchange_entry(&self, address: Gpa, layout: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        let mut kept = lock(&self.0);
        let is_full = kept.entries.len() >= MOST;
        let mut readings = kept.entries.range_mut((address.0, 0)..=(address.0, u64::MAX));
        // Two tables led to it, or it is marked once more.
        let known = readings.find(|((_, read), known)| *read == old || known.new == old);
        if let Some(((_, read), known)) = known {
            known.new = if *read == old { old ^ (old ^ known.new | old ^ new) } else { new };
            return Ok(true);
        }
        if is_full || kept.entries.range((address.0, 0)..=(address.0, u64::MAX)).count() >= READINGS {
            kept.refused += 1;
            return Err(WriteError(address));
        }
        kept.entries.insert((address.0, old), Entry { layout, new });
        Ok(true)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::table::ByteOrder;

    /// One entry.
    struct Word(Mutex<u64>);

    impl MarkMemory for Word {
        fn compare_exchange_entry(&self, _: Gpa, _: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
            let mut word = self.0.lock().unwrap();
            let is_old = *word == old;
            *word = if is_old { new } else { *word };
            Ok(is_old)
        }
    }

    #[test]
    fn what_is_left_is_marked_once_whoever_else_marks_it() {
        const LAYOUT: EntryLayout = EntryLayout { bytes: 8, order: ByteOrder::Little };
        let keep = |left: &Left, old: u64, new: u64| left.compare_exchange_entry(Gpa(0x1000), LAYOUT, old, new).unwrap();
        // A clean entry, 0x80, is marked by taking that away; 0x20 is the mark of an access.
        for (stands, becomes, earlier) in [(0x81, 0x21, 1), (0xa1, 0x21, 1), (0x01, 0x21, 1), (0x21, 0x21, 0), (0x83, 0x83, 0), (0, 0, 0)] {
            // Others have read it before it was marked by anybody, or after, and come before or after those who have more to tell.
            for kept in [
                &[(0x81, 0x21)][..],
                &[(0xa1, 0x21), (0x81, 0xa1), (0x81, 0x01)],
                &[(0x81, 0xa1), (0x81, 0x01)],
                &[(0x81, 0xa1), (0xa1, 0x21)],
                &[(0x93, 0xb3), (0x81, 0x21)],
            ] {
                let (left, word) = (Left::default(), Word(Mutex::new(stands)));
                assert!(kept.iter().all(|(old, new)| keep(&left, *old, *new)));
                assert_eq!(left.write(&word), MarksWritten { earlier, ..MarksWritten::default() }, "{stands:#x}, {kept:x?}");
                assert_eq!(*word.0.lock().unwrap(), becomes, "{stands:#x}, {kept:x?}");
                assert_eq!(left.write(&word), MarksWritten::default(), "they are kept no longer");
            }
        }
    }

    #[test]
    fn so_many_are_kept_and_no_more() {
        let (left, layout) = (Left::default(), EntryLayout { bytes: 8, order: ByteOrder::Little });
        let keep = |entry: u64| left.compare_exchange_entry(Gpa(entry * 8), layout, 1, 3);
        assert!((0..MOST as u64).all(|entry| keep(entry) == Ok(true)));
        assert_eq!(keep(MOST as u64), Err(WriteError(Gpa(MOST as u64 * 8))));
        assert_eq!(keep(7), Ok(true));
        // What goes with its memory makes room.
        left.forget(Span { first: 0, last: 79 });
        assert_eq!(keep(MOST as u64), Ok(true));
        let word = Word(Mutex::new(0));
        assert_eq!(left.write(&word), MarksWritten { skipped: 1, ..MarksWritten::default() });
        // Nor are there endlessly many readings of one.
        let read = |old: u64| left.compare_exchange_entry(Gpa(8), layout, old << 8, old << 8 | 1);
        assert!((0..READINGS as u64).all(|old| read(old) == Ok(true)) && read(READINGS as u64).is_err());
    }
}
