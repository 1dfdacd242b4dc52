//! Bounds on the work that a guest can cause.

use std::cell::Cell;

/// How much work one call may do on behalf of one guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tables visited. A table that many entries point to counts each time, unless there is nothing in it: then it counts once in each walk.
    pub tables: u64,
    /// Leaves seen. A leaf that memory is there for in several pieces counts as many; a table of the second stage that is visited for the sake of a
    /// first-stage leaf or table counts as one.
    pub leaves: u64,
    /// Separate mappings that are collected.
    pub mappings: u64,
    /// Questions to the format about patterns that are not remembered.
    pub questions: u64,
    /// Bytes of device structures read.
    pub bytes: u64,
    /// Faults recorded; further ones are counted.
    pub faults: usize,
}

impl Default for Limits {
    /// Enough for a guest with 128 GiB mapped in 4K pages, and ends a table that points to itself in well under a second.
    fn default() -> Self {
        Self { tables: 1 << 16, leaves: 1 << 25, mappings: 1 << 24, questions: 1 << 14, bytes: 1 << 24, faults: 1000 }
    }
}

impl Limits {
    /// Limits for a guest of which only `pages` 4K pages can hold tables: each may be visited a few times, no more.
    #[must_use]
    pub fn for_pages(pages: u64) -> Self {
        let tables = pages.saturating_mul(4).saturating_add(64);
        let bytes = pages.saturating_mul(16 * 4096).saturating_add(1 << 20);
        // A table has up to 512 entries per page; with two stages each of them may cost a walk of some levels.
        let mappings = tables.saturating_mul(512);
        Self { tables, leaves: mappings.saturating_mul(4), mappings, bytes, ..Self::default() }
    }
}

/// A budget is spent: the guest's tables are larger, or more circular, than the caller allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped by budget: more than {limit} {what}")]
pub struct Exhausted {
    /// What was counted.
    pub what: &'static str,
    /// The limit that was reached.
    pub limit: u64,
}

/// What is left of [`Limits`].
#[derive(Debug)]
pub struct Budget {
    limits: Limits,
    tables: Cell<u64>,
    leaves: Cell<u64>,
    questions: Cell<u64>,
    bytes: Cell<u64>,
}

impl Budget {
    /// An unspent budget.
    #[must_use]
    pub const fn new(limits: Limits) -> Self {
        Self {
            limits,
            tables: Cell::new(limits.tables),
            leaves: Cell::new(limits.leaves),
            questions: Cell::new(limits.questions),
            bytes: Cell::new(limits.bytes),
        }
    }

    /// The limits that this budget started with.
    #[must_use]
    pub const fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Tables visited so far.
    #[must_use]
    pub const fn tables_visited(&self) -> u64 {
        self.limits.tables - self.tables.get()
    }

    /// Leaves seen so far.
    #[must_use]
    pub const fn leaves_seen(&self) -> u64 {
        self.limits.leaves - self.leaves.get()
    }

    /// Questions asked so far.
    #[must_use]
    pub const fn questions_asked(&self) -> u64 {
        self.limits.questions - self.questions.get()
    }

    #[inline]
    fn charge(cell: &Cell<u64>, amount: u64, what: &'static str, limit: u64) -> Result<(), Exhausted> {
        match cell.get().checked_sub(amount) {
            Some(left) => {
                cell.set(left);
                Ok(())
            }
            None => {
                cell.set(0);
                Err(Exhausted { what, limit })
            }
        }
    }

    /// One more table.
    ///
    /// # Errors
    /// The budget is spent.
    #[inline]
    pub fn charge_table(&self) -> Result<(), Exhausted> {
        self.charge_tables(1)
    }

    /// `count` more tables.
    ///
    /// # Errors
    /// The budget is spent.
    #[inline]
    pub fn charge_tables(&self, count: u64) -> Result<(), Exhausted> {
        Self::charge(&self.tables, count, "tables visited", self.limits.tables)
    }

    /// Tables that may still be visited.
    #[inline]
    pub(crate) const fn tables_left(&self) -> u64 {
        self.tables.get()
    }

    /// Leaves that may still be seen.
    #[inline]
    pub(crate) const fn leaves_left(&self) -> u64 {
        self.leaves.get()
    }

    /// `count` more leaves.
    ///
    /// # Errors
    /// The budget is spent.
    #[inline]
    pub fn charge_leaves(&self, count: u64) -> Result<(), Exhausted> {
        Self::charge(&self.leaves, count, "leaves", self.limits.leaves)
    }

    /// One more question to the format.
    ///
    /// # Errors
    /// The budget is spent.
    pub fn charge_question(&self) -> Result<(), Exhausted> {
        Self::charge(&self.questions, 1, "different patterns asked about", self.limits.questions)
    }

    /// `count` more bytes of device structures.
    ///
    /// # Errors
    /// The budget is spent.
    pub fn charge_bytes(&self, count: u64) -> Result<(), Exhausted> {
        Self::charge(&self.bytes, count, "bytes of device structures", self.limits.bytes)
    }
}
