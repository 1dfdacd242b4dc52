//! What speaks for a candidate, counted; and how long its words are in bits.

use std::collections::HashMap;

use crate::table::FaultKind;

/// Entries that this format calls faults, by kind.
pub type Faults = [u64; FaultKind::ALL.len()];

/// What a walk met under one configuration.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evidence {
    /// Evidence in bits: chance would do as well once in `2^bits` times. Negative: chance does better.
    pub bits: f64,
    /// Tables that were read.
    pub tables: u64,
    /// Table entries whose table can be read.
    pub pointers: u64,
    /// Tables of each level, from the root's down.
    pub tables_by_level: Vec<u64>,
    /// Tables without any entry.
    pub empty_tables: u64,
    /// Table entries whose table is not known because only a part of memory is.
    pub unknown_tables: u64,
    /// Leaves whose target is in memory, at least its first byte.
    pub leaves: u64,
    /// Leaves whose target is outside memory.
    pub leaves_outside: u64,
    /// Leaves that let nobody pass.
    pub useless_leaves: u64,
    /// Leaves that continue the one before them.
    pub continued: u64,
    /// Table entries whose table is outside memory, or not among the pages that are known.
    pub tables_outside: u64,
    /// Table entries whose table was, in whole or part, already something else.
    pub overlaps: u64,
    /// Table entries that skip a level.
    pub skips: u64,
    /// Entries that fault.
    pub faults: Faults,
    /// Different patterns of leaves and tables.
    pub patterns: u64,
    /// Bits that change nothing, and are in some pattern other than the format itself would have them.
    pub idle_bits: u64,
    /// Why the walk ended before everything was seen.
    pub stopped: Option<&'static str>,
}

impl Evidence {
    /// All entries that fault.
    #[must_use]
    pub fn fault_count(&self) -> u64 {
        self.faults.iter().sum()
    }

    /// Entries that are as they should be: tables and leaves.
    #[must_use]
    pub fn good(&self) -> u64 {
        self.leaves + self.pointers + self.unknown_tables
    }

    /// Entries that are not.
    #[must_use]
    pub fn bad(&self) -> u64 {
        self.fault_count() + self.leaves_outside + self.tables_outside + self.overlaps
    }
}

/// Bits of a word as anything: of each half, whether it is zero, how many digits it has otherwise, and these, but for the first, which is 1.
pub(super) fn as_anything(entry: u64, bytes: u8) -> f64 {
    let half = |half: u64| if half == 0 { 1.0 } else { 6.0 + f64::from(half.ilog2()) };
    if bytes == 4 { half(entry) } else { half(entry >> 32) + half(entry & 0xffff_ffff) }
}

/// Bits to say which of `count` things.
pub(super) fn choice(count: f64) -> f64 {
    count.max(1.0).log2()
}

/// A word that a table of this format would not have.
pub(super) const WRONG: f64 = -8.0;
/// A leaf of which a part is outside memory: legal, and rare.
pub(super) const PARTLY: f64 = 4.0;
/// A table without any entry.
pub(super) const EMPTY: f64 = 4.0;
/// A table entry that skips a level.
pub(super) const SKIP: f64 = 16.0;
/// A page of a table that is not there.
pub(super) const HOLE: f64 = 16.0;
/// An absent entry with something in it; once per pattern.
pub(super) const REMAINS: f64 = -6.0;
/// An entry that points where the one before it points.
pub(super) const AGAIN: f64 = -3.0;
/// Leaves for privileged requests where there are others, or device memory in RAM; once per pattern.
pub(super) const ODD: f64 = 10.0;
/// Leaves that cannot be cached, in RAM; once per pattern.
pub(super) const UNUSUAL: f64 = 2.0;

/// Weight of a pattern that was not seen yet, in patterns that were.
const NEW: f64 = 1.0;
/// A bit that changes nothing is so often other than the format itself would have it.
const IDLE: f64 = 1.0 / 16.0;
/// A bit that changes the meaning is set so often.
const EFFECTIVE: f64 = 0.5;
/// Patterns of one class that are told apart.
const MOST_PATTERNS: usize = 4096;

/// What bits of a class do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Roles {
    /// They change the meaning.
    pub effective: u64,
    /// They change nothing.
    pub idle: u64,
    /// Those of them that the format itself sets when it makes such an entry.
    pub usual: u64,
}

/// Patterns of one kind of entry at one level, coded by what was seen so far.
#[derive(Debug, Default)]
pub(super) struct Class {
    roles: Roles,
    seen: HashMap<u64, u64>,
    total: u64,
    /// Bits that can be one or the other: how often they are expected to be set, or for idle ones to be other than usual; and how many of the different
    /// patterns have them so.
    ones: Vec<(u64, f64, u64)>,
}

impl Class {
    pub(super) fn new(roles: Roles) -> Self {
        let expected = |bit: u64| if roles.idle & bit != 0 { IDLE } else { EFFECTIVE };
        let free = (0..64).map(|bit| 1_u64 << bit).filter(|bit| (roles.idle | roles.effective) & bit != 0);
        let ones = free.map(|bit| (bit, expected(bit), 0)).collect();
        Self { roles, ones, ..Self::default() }
    }

    /// Bits to say `pattern`, and whether it is new.
    pub(super) fn cost(&mut self, pattern: u64) -> (f64, bool) {
        let total = self.total as f64 + NEW;
        self.total += 1;
        let different = self.seen.len();
        if let Some(count) = self.seen.get_mut(&pattern) {
            let bits = choice(total / *count as f64);
            *count += 1;
            return (bits, false);
        }
        let mut bits = choice(total / NEW);
        for (bit, expected, ones) in &mut self.ones {
            let set = (*ones as f64 + *expected) / (different as f64 + 1.0);
            let is_set = (pattern ^ self.roles.usual) & *bit != 0;
            bits -= if is_set { set.log2() } else { (1.0 - set).log2() };
            *ones += u64::from(is_set);
        }
        if different < MOST_PATTERNS {
            self.seen.insert(pattern, 1);
        }
        (bits, true)
    }

    /// Bits that change nothing, and are not as the format itself would have them.
    pub(super) fn odd(&self, pattern: u64) -> u64 {
        (pattern ^ self.roles.usual) & self.roles.idle
    }

    pub(super) fn different(&self) -> u64 {
        self.seen.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_that_repeats_becomes_cheap_and_an_idle_bit_is_dear() {
        let mut class = Class::new(Roles { effective: 0b11, idle: 0b1100, usual: 0 });
        let (first, new) = class.cost(0b01);
        assert!(new && (2.0..2.3).contains(&first), "two bits, and next to nothing for clear bits: {first}");
        for _ in 0..1000 {
            class.cost(0b01);
        }
        let (again, new) = class.cost(0b01);
        assert!(!new && again < 0.01, "{again}");
        let mut other = Class::new(Roles { effective: 0b11, idle: 0b1100, usual: 0 });
        let (idle, _) = other.cost(0b1101);
        assert!(idle > first + 7.0, "{idle}");
    }

    #[test]
    fn zero_is_cheap_as_anything() {
        assert!((as_anything(0, 8) - 2.0).abs() < 1e-9 && (as_anything(0, 4) - 1.0).abs() < 1e-9);
        assert!((as_anything(1, 8) - 7.0).abs() < 1e-9 && (as_anything(u64::MAX, 8) - 74.0).abs() < 1e-9);
    }
}
