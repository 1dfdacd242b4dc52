//! The hardware's walkers of tables that user space owns.
//!
//! Written from the architectures alone; they share nothing with the format plugins or the table engine. A walk loads every entry with one atomic
//! load, through the parent's table, and changes accessed and dirty bits with a compare-exchange: if the entry changed meanwhile it is looked at
//! again. No lock is held that anybody who changes tables would take.

pub(super) mod arm;
pub(super) mod context;
pub(super) mod riscv;
pub(super) mod x86;

use std::sync::Arc;

use super::cache::{Full, Space};
use super::device::Binding;
use super::domain::{Domain, Refused};
use super::fault::{Reason, Stage};
use super::memory::UserMemory;
use super::unit::Unit;
pub(super) use context::Context;

/// A leaf, as the IOTLB keeps it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leaf {
    /// Output address of the first byte of the leaf.
    pub(super) output: u64,
    /// A multiple of the size.
    pub(super) size_log2: u8,
    pub(super) read: bool,
    pub(super) write: bool,
    /// A write needs no further look at the entry.
    pub(super) dirty: bool,
    /// Valid in all of the owner's spaces.
    pub(super) global: bool,
    /// The architecture's number of the level.
    pub(super) level: i8,
}

/// A table, as the walk caches keep it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    pub(super) address: u64,
    /// Log2 of what one entry covers, bytes.
    pub(super) shift: u8,
    /// Log2 of the number of entries.
    pub(super) index_bits: u8,
    /// The architecture's number of the level.
    pub(super) level: i8,
    /// What the path to here forbids, in the format's own words.
    pub(super) restrictions: u8,
}

/// What an entry means.
pub(super) enum Entry {
    /// Another table. The entry is to become `update` first.
    Table { next: Table, update: u64 },
    /// A leaf. The entry is to become `update` first.
    Leaf { leaf: Leaf, update: u64 },
    /// The walk ends.
    Fault(Reason),
}

/// A failed walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) reason: Reason,
    pub(super) stage: Stage,
    pub(super) level: Option<i8>,
}

impl Failed {
    pub(super) fn first(reason: Reason) -> Self {
        Self { reason, stage: Stage::First, level: None }
    }

    fn at(self, level: i8) -> Self {
        Self { level: Some(level), ..self }
    }
}

impl From<Full> for Failed {
    fn from(_: Full) -> Self {
        Self::first(Reason::CacheFull)
    }
}

/// A format's tables for one address space.
#[derive(Clone, Debug)]
pub(super) enum Format {
    X86(x86::X86),
    Arm(arm::Arm),
    Riscv(riscv::Riscv),
}

impl Format {
    fn root(&self, iova: u64) -> Result<Table, Reason> {
        match self {
            Self::X86(x86) => x86.root(iova),
            Self::Arm(arm) => arm.root(iova),
            Self::Riscv(riscv) => riscv.root(iova),
        }
    }

    fn judge(&self, table: &Table, entry: u64, iova: u64, writes: bool) -> Entry {
        match self {
            Self::X86(x86) => x86.judge(table, entry, writes),
            Self::Arm(arm) => arm.judge(table, entry, iova, writes),
            Self::Riscv(riscv) => riscv.judge(table, entry, writes),
        }
    }

    /// An IOVA without the bits that the architecture does not look at.
    fn normal(&self, iova: u64) -> u64 {
        match self {
            Self::Arm(arm) => arm.normal(iova),
            Self::X86(_) | Self::Riscv(_) => iova,
        }
    }

    fn big_endian(&self) -> bool {
        match self {
            Self::Arm(arm) => arm.big_endian,
            Self::X86(_) => false,
            Self::Riscv(riscv) => riscv.big_endian,
        }
    }
}

/// What a walk reads through.
#[derive(Clone, Copy)]
pub(super) struct Reach<'a> {
    pub(super) memory: &'a UserMemory,
    pub(super) binding: &'a Binding,
}

impl<'a> Reach<'a> {
    /// The unit that walks.
    pub(super) fn unit(self) -> &'a Arc<Unit> {
        &self.binding.parent[0].unit
    }

    /// Through the kernel's tables of all units on the path, which must agree.
    pub(super) fn second(self, address: u64, writes: bool) -> Result<u64, Failed> {
        let through = |domain: &Arc<Domain>| {
            domain.translate(address, writes).map_err(|refused| {
                let reason = if refused == Refused::Permission { Reason::Permission } else { Reason::NotPresent };
                Failed { reason, stage: Stage::Second, level: None }
            })
        };
        let (first, others) = self.binding.parent.split_first().ok_or(Failed::first(Reason::NotAttached))?;
        let found = through(first)?;
        for other in others {
            if through(other)? != found {
                return Err(Failed { reason: Reason::PathDisagrees, stage: Stage::Second, level: None });
            }
        }
        Ok(found)
    }

    /// A word of a structure or table, in memory order.
    pub(super) fn load(self, address: u64) -> Result<u64, Failed> {
        let user = self.second(address, false).map_err(|_| Failed::first(Reason::TableAccess))?;
        self.memory.load(user).map(u64::from_le).ok_or(Failed::first(Reason::TableAccess))
    }

    /// False if the word is not `old` any more.
    fn change(self, address: u64, old: u64, new: u64) -> Result<bool, Failed> {
        let user = self.second(address, true).map_err(|_| Failed::first(Reason::TableAccess))?;
        self.memory.compare_exchange(user, old.to_le(), new.to_le()).ok_or(Failed::first(Reason::TableAccess))
    }
}

/// Entries that change all the time are looked at again so often.
const RETRIES: u32 = 1000;

/// Translates through stage 1: from the caches, or by a walk that fills them.
pub(super) fn translate(reach: Reach<'_>, space: Space, format: &Format, iova: u64, writes: bool) -> Result<Leaf, Failed> {
    let caches = &reach.unit().caches;
    let iova = format.normal(iova);
    if let Some(leaf) = caches.leaf(space, iova) {
        match (writes, leaf) {
            (false, Leaf { read: false, level, .. }) | (true, Leaf { write: false, level, .. }) => {
                return Err(Failed::first(Reason::Permission).at(level));
            }
            (true, Leaf { dirty: false, .. }) => {} // the entry in memory has to be made dirty first
            _ => return Ok(leaf),
        }
    }
    let mut table = match caches.table(space, iova) {
        Some(table) => table,
        None => format.root(iova).map_err(Failed::first)?,
    };
    loop {
        match step(reach, format, &table, iova, writes)? {
            Entry::Table { next, .. } => {
                caches.insert_table(space, iova, table.shift, next)?;
                table = next;
            }
            Entry::Leaf { leaf, .. } => {
                let space = if leaf.global { space.global() } else { space };
                caches.insert_leaf(space, iova, leaf)?;
                return Ok(leaf);
            }
            Entry::Fault(reason) => return Err(Failed::first(reason).at(table.level)),
        }
    }
}

/// Reads an entry, and makes it accessed and dirty as need be.
fn step(reach: Reach<'_>, format: &Format, table: &Table, iova: u64, writes: bool) -> Result<Entry, Failed> {
    let index = (iova >> table.shift) & ((1 << table.index_bits) - 1);
    let address = table.address + index * 8;
    let order = |word: u64| if format.big_endian() { word.swap_bytes() } else { word };
    for _ in 0..RETRIES {
        let word = reach.load(address).map_err(|failed| failed.at(table.level))?;
        let judged = format.judge(table, order(word), iova, writes);
        let (Entry::Table { update, .. } | Entry::Leaf { update, .. }) = judged else { return Ok(judged) };
        let update = order(update);
        if update == word || reach.change(address, word, update).map_err(|failed| failed.at(table.level))? {
            return Ok(judged);
        }
    }
    Err(Failed::first(Reason::TableAccess).at(table.level))
}
