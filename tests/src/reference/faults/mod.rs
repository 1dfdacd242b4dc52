//! What a unit tells its driver of a request that it refused, in the record of its architecture: from registers and memory, and the specifications alone.
//!
//! A specification says of some fields that they are unknown, and of some faults only that one of several is told. [`expected`] answers all records that are right,
//! each with the bits that count.

mod amd;
mod path;
mod riscv;
mod smmu;
mod vtd;

use std::cell::{Cell, RefCell};

use super::snapshot::Snapshot;
use super::{Problem, bits};

pub use path::{Cause, Fetch, Refused};

/// What a request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// It read.
    Read,
    /// It wrote.
    Write,
    /// It fetched instructions.
    Execute,
}

/// A request that was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// Its PASID.
    pub pasid: Option<u32>,
    /// What it asked for.
    pub iova: u64,
    /// What it wanted to do.
    pub kind: Kind,
    /// It was privileged.
    pub privileged: bool,
}

impl Request {
    fn writes(&self) -> bool {
        self.kind == Kind::Write
    }

    /// A read of data or instructions.
    fn reads(&self) -> bool {
        !self.writes()
    }

    fn executes(&self) -> bool {
        self.kind == Kind::Execute
    }
}

/// What may be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Told {
    /// Nothing.
    Nothing,
    /// A record: words, and which of their bits count.
    Record(Vec<(u64, u64)>),
}

impl Told {
    /// A record all of whose bits count.
    fn record(words: &[u64]) -> Told {
        Told::Record(words.iter().map(|word| (*word, u64::MAX)).collect())
    }

    /// Bits `high..=low` of a word do not count.
    fn without(mut self, index: usize, high: u32, low: u32) -> Told {
        if let Told::Record(words) = &mut self {
            words[index].1 &= !(u64::MAX >> (63 - high) >> low << low);
        }
        self
    }

    /// Whether these are the bytes.
    pub fn is(&self, bytes: Option<&[u8]>) -> bool {
        match (self, bytes) {
            (Told::Nothing, None) => true,
            (Told::Record(words), Some(bytes)) => {
                let same = |((word, counts), bytes): (&(u64, u64), &[u8])| (word ^ u64::from_le_bytes(bytes.try_into().unwrap())) & counts == 0;
                bytes.len() == words.len() * 8 && words.iter().zip(bytes.chunks_exact(8)).all(same)
            }
            _ => false,
        }
    }
}

/// What may be told, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Any of these.
    pub told: Vec<Told>,
    /// What was found.
    pub why: String,
}

impl Answer {
    fn new(why: impl Into<String>, told: Vec<Told>) -> Answer {
        Answer { told, why: why.into() }
    }

    fn one(why: impl Into<String>, told: Told) -> Answer {
        Answer::new(why, vec![told])
    }
}

/// What may be told of a request; none if nothing refuses it.
///
/// # Errors
/// [`Problem::Unreadable`] if the snapshot does not hold what must be read, which is also so if there is no memory: `is_there` says whether there is.
/// [`Problem::Unsupported`] where the reference does not know what a request would get.
pub fn expected(snapshot: &Snapshot, is_there: &dyn Fn(u64) -> bool, request: &Request) -> Result<Option<Answer>, Problem> {
    visited(snapshot, is_there, request).0
}

/// What was read for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Where.
    pub address: u64,
    /// It is an entry of a table, by which no structure was found.
    pub of_walk: bool,
}

/// The same, and what was read on the way: structures, and entries of tables.
#[allow(clippy::type_complexity)]
pub fn visited(snapshot: &Snapshot, is_there: &dyn Fn(u64) -> bool, request: &Request) -> (Result<Option<Answer>, Problem>, Vec<Read>) {
    let unit = Unit { snapshot, is_there, read: RefCell::default(), walks: Cell::new(false) };
    let answer = match snapshot.unit_kind.as_str() {
        "arm-smmuv3" => smmu::expected(&unit, request),
        "intel-vtd" => vtd::expected(&unit, request),
        "amd-vi" => amd::expected(&unit, request),
        "riscv-iommu" => riscv::expected(&unit, request),
        other => Err(Problem::Unsupported(format!("records of {other}"))),
    };
    (answer, unit.read.into_inner())
}

/// Registers and memory.
struct Unit<'a> {
    snapshot: &'a Snapshot,
    is_there: &'a dyn Fn(u64) -> bool,
    /// All that was read.
    read: RefCell<Vec<Read>>,
    /// A request's own walk goes on.
    walks: Cell<bool>,
}

impl Unit<'_> {
    fn register(&self, name: &str) -> u64 {
        self.snapshot.registers.get(name).copied().unwrap_or(0)
    }

    /// A word; none if there is no memory.
    fn read(&self, address: u64) -> Result<Option<u64>, Problem> {
        if !(self.is_there)(address) {
            return Ok(None);
        }
        self.read.borrow_mut().push(Read { address, of_walk: self.walks.get() });
        self.snapshot.memory.read(address, false).map(Some)
    }

    /// Words one after the other; none if there is no memory at one of them.
    fn words<const COUNT: usize>(&self, address: u64) -> Result<Option<[u64; COUNT]>, Problem> {
        let mut words = [0; COUNT];
        for (index, word) in words.iter_mut().enumerate() {
            let Some(found) = self.read(address + index as u64 * 8)? else { return Ok(None) };
            *word = found;
        }
        Ok(Some(words))
    }
}

/// A field of a record.
fn field(value: u64, high: u32, low: u32) -> u64 {
    bits(value, high - low, 0) << low
}

fn flag(set: bool, position: u32) -> u64 {
    u64::from(set) << position
}
