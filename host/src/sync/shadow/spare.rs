//! Memory for the copies of tables.
//!
//! A flush goes through all copies, at the speed of memory. What the processor fetches ahead should then be copies as well, and not what stands beside them: so the memory for
//! several tables is taken at once, first that for their entries and then that for the states, as far as the allocator gives what is asked for in a row side by side.

use crate::sync::shadow::node::State;

/// Tables for which memory is taken at once, at most.
const MOST: usize = 64;

/// Memory that no table has yet, or any more: for tables of one size, which is that of nearly all.
#[derive(Debug, Default)]
pub(super) struct Spare {
    /// Entries of each.
    size: usize,
    entries: Vec<Box<[u64]>>,
    states: Vec<Box<[State]>>,
}

impl Spare {
    /// Memory for so many entries, of which none is known. `tables` are there already: with more of them, more is taken at once, so that small address spaces
    /// have none to spare.
    pub(super) fn take(&mut self, size: usize, tables: usize) -> (Box<[u64]>, Box<[State]>) {
        let at_once = (tables / 8).min(MOST);
        if self.size != size && at_once > 1 {
            *self = Self { size, ..Self::default() };
        }
        if self.size == size {
            if self.entries.is_empty() {
                self.fill(at_once);
            }
            if let (Some(mut entries), Some(mut states)) = (self.entries.pop(), self.states.pop()) {
                entries.fill(0);
                states.fill(State::UNKNOWN);
                return (entries, states);
            }
        }
        (vec![0; size].into_boxed_slice(), vec![State::UNKNOWN; size].into_boxed_slice())
    }

    fn fill(&mut self, count: usize) {
        self.entries.extend((0..count).map(|_| vec![0; self.size].into_boxed_slice()));
        self.states.extend((0..count).map(|_| vec![State::UNKNOWN; self.size].into_boxed_slice()));
        // The first is taken first: tables are mostly met in ascending order.
        self.entries.reverse();
        self.states.reverse();
    }

    /// A table is gone, and `tables` are left.
    pub(super) fn give(&mut self, entries: Box<[u64]>, states: Box<[State]>, tables: usize) {
        let most = (tables / 8).min(MOST);
        self.entries.truncate(most);
        self.states.truncate(most);
        if entries.len() == self.size && self.entries.len() < most {
            self.entries.push(entries);
            self.states.push(states);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_used_again_knows_nothing_and_little_is_kept() {
        let mut spare = Spare::default();
        let tables: Vec<_> = (0..200).map(|tables| spare.take(512, tables)).collect();
        assert!(spare.entries.len() <= 25 && spare.entries.len() == spare.states.len());
        for (left, (mut entries, mut states)) in tables.into_iter().enumerate().rev() {
            entries.fill(7);
            states.fill(State::NOTHING);
            spare.give(entries, states, left);
            assert!(spare.entries.len() <= left / 8);
        }
        for tables in [800, 3, 800] {
            let (entries, states) = spare.take(512, tables);
            assert!(entries.iter().all(|entry| *entry == 0) && states.iter().all(|state| *state == State::UNKNOWN));
        }
        let (entries, states) = spare.take(16, 1);
        assert_eq!((entries.len(), states.len()), (16, 16));
        assert_eq!(spare.take(1024, 900).0.len(), 1024);
    }
}
