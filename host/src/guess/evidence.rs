//! What speaks for a candidate, counted; and how long its words are in bits.

use std::collections::HashMap;

use crate::table::FaultKind;

use super::ENOUGH;

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
    /// Pages of tables that should be there and are not.
    pub holes: u64,
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

    /// Whether there is enough of it, and little that other settings would explain better.
    pub(super) fn explains_all(&self) -> bool {
        self.good() >= ENOUGH && self.bad() == 0 && self.holes == 0 && self.empty_tables == 0 && self.idle_bits <= self.patterns
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
pub(super) const WRONG: f64 = -16.0;
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
/// A leaf that a table above it lets nobody reach.
pub(super) const SHUT: f64 = 4.0;
/// Leaves that cannot be cached, in RAM; once per pattern.
pub(super) const UNUSUAL: f64 = 2.0;

/// Weight of a pattern that was not seen yet, in patterns that were.
const NEW: f64 = 1.0;
/// A bit that changes nothing is so often other than the format itself would have it.
const IDLE: f64 = 1.0 / 32.0;
/// A bit that changes the meaning is set so often.
const EFFECTIVE: f64 = 0.5;
/// Patterns that are what the format itself would make are so frequent, and then say one of so many things.
const OWN: f64 = 0.5;
const MEANINGS: f64 = 8.0;
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

    /// Whether `pattern` was not seen yet.
    pub(super) fn is_new(&self, pattern: u64) -> bool {
        !self.seen.contains_key(&pattern)
    }

    /// Bits to say `pattern`. `own`: a new one, and what the format itself would make.
    pub(super) fn cost(&mut self, pattern: u64, own: bool) -> f64 {
        let total = self.total as f64 + NEW;
        self.total += 1;
        let different = self.seen.len();
        if let Some(count) = self.seen.get_mut(&pattern) {
            let bits = choice(total / *count as f64);
            *count += 1;
            return bits;
        }
        let mut bits = 0.0;
        for (bit, expected, ones) in &mut self.ones {
            let set = (*ones as f64 + *expected) / (different as f64 + 1.0);
            let is_set = (pattern ^ self.roles.usual) & *bit != 0;
            bits -= if is_set { set.log2() } else { (1.0 - set).log2() };
            *ones += u64::from(is_set);
        }
        if different < MOST_PATTERNS {
            self.seen.insert(pattern, 1);
        }
        // Either it is what the format makes, or made bit by bit.
        let likelihood = (1.0 - OWN) * (-bits).exp2() + if own { OWN / MEANINGS } else { 0.0 };
        choice(total / NEW) - likelihood.max(f64::MIN_POSITIVE).log2()
    }

    /// Bits that change nothing, and are not as the format itself would have them.
    pub(super) fn odd(&self, pattern: u64) -> u64 {
        (pattern ^ self.roles.usual) & self.roles.idle
    }

    pub(super) fn different(&self) -> u64 {
        self.seen.len() as u64
    }
}

/// How a leaf follows the one before.
#[derive(Clone, Copy, Debug)]
pub(super) enum Move {
    /// Begins where that ends.
    Continues = 0,
    /// As far from it as that from the one before.
    GoesOn = 1,
    /// Anywhere.
    Jumps = 2,
}

/// How leaves follow each other, counted: half of them continue to begin with.
#[derive(Clone, Debug)]
pub(super) struct Moves([f64; 3]);

impl Default for Moves {
    fn default() -> Self {
        Self([2.0, 1.0, 1.0])
    }
}

impl Moves {
    /// Bits to say it.
    pub(super) fn cost(&mut self, this: Move) -> f64 {
        let bits = choice(self.0.iter().sum::<f64>() / self.0[this as usize]);
        self.0[this as usize] += 1.0;
        bits
    }
}

/// How the targets of leaves of one size are aligned, counted. A guest's buffers are aligned to something, and that says nothing about the format.
#[derive(Clone, Debug)]
pub(super) struct Alignment {
    seen: [u32; 65],
    total: u32,
}

impl Default for Alignment {
    fn default() -> Self {
        Self { seen: [0; 65], total: 0 }
    }
}

impl Alignment {
    /// Bits more than it takes where nothing is known, to say that the target is the `page`th of this size; there are `pages`, as a logarithm. Never less than
    /// minus that: the address has no more bits.
    pub(super) fn cost(&mut self, page: u64, pages: f64) -> f64 {
        let most = pages.clamp(0.0, 63.0) as u32;
        let zeros = page.trailing_zeros().min(most);
        let chance = if zeros == most { (-f64::from(zeros)).exp2() } else { (-f64::from(zeros) - 1.0).exp2() };
        let seen = &mut self.seen[zeros as usize];
        let likelihood = (f64::from(*seen) + chance) / (f64::from(self.total) + 1.0);
        *seen += 1;
        self.total += 1;
        (chance / likelihood).log2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_that_repeats_becomes_cheap_and_an_idle_bit_is_dear() {
        let class = || Class::new(Roles { effective: 0b11, idle: 0b1100, usual: 0 });
        let mut plain = class();
        assert!(plain.is_new(0b01));
        let first = plain.cost(0b01, false);
        assert!((3.0..3.3).contains(&first), "two bits, one that it is not the format's own, and next to nothing for clear bits: {first}");
        for _ in 0..1000 {
            plain.cost(0b01, false);
        }
        let again = plain.cost(0b01, false);
        assert!(!plain.is_new(0b01) && again < 0.01, "{again}");
        let idle = class().cost(0b1101, false);
        assert!(idle > first + 8.0, "{idle}");
    }

    #[test]
    fn what_the_format_itself_makes_is_cheap_whatever_its_bits() {
        let mut class = Class::new(Roles { effective: 0xffff, idle: 0, usual: 0 });
        let own = class.cost(0x1234, true);
        assert!((3.9..=4.0).contains(&own), "{own}");
        assert!(Class::new(Roles { effective: 0xffff, idle: 0, usual: 0 }).cost(0x1234, false) > own + 10.0);
    }

    #[test]
    fn alignment_is_learnt() {
        let mut alignment = Alignment::default();
        assert!(alignment.cost(4, 20.0).abs() < 1e-9, "as much as without counting");
        (0..1000).for_each(|page| {
            alignment.cost(4 + 8 * page, 20.0);
        });
        assert!(alignment.cost(12, 20.0) < -2.9 && alignment.cost(1, 20.0) > 5.0);
        let mut zero = Alignment::default();
        (0..1000).for_each(|_| assert!(zero.cost(0, 3.0) >= -3.0 && Alignment::default().cost(0, 0.0).abs() < 1e-9));
    }

    #[test]
    fn zero_is_cheap_as_anything() {
        assert!((as_anything(0, 8) - 2.0).abs() < 1e-9 && (as_anything(0, 4) - 1.0).abs() < 1e-9);
        assert!((as_anything(1, 8) - 7.0).abs() < 1e-9 && (as_anything(u64::MAX, 8) - 74.0).abs() < 1e-9);
    }
}
