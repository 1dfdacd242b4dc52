//! Collecting what a walk finds: maximal runs of mappings, and faults.

use crate::memory::Exhausted;
use crate::table::leaves::Piece;
use crate::table::stages::Fault;
use crate::table::visit::{Cause, FaultAt, Step, Visitor};
use crate::table::walk::WalkError;
use crate::{Access, Span};

/// A maximal run: IOVAs that continue each other, to addresses that continue each other, with the same access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The IOVAs.
    pub iova: Span,
    /// Where the first of them goes.
    pub address: u64,
    /// What a device may do.
    pub access: Access,
}

/// Collects maximal runs and the first few faults.
#[derive(Debug)]
pub struct Collector {
    privileged: bool,
    keep_faults: usize,
    most: u64,
    mappings: Vec<Mapping>,
    faults: Vec<(Span, Fault)>,
    fault_count: u64,
    intercepted: u64,
    missing: Option<u64>,
    leaf_sizes: [u64; 65],
}

impl Collector {
    /// Collects what an unprivileged request, or a `privileged` one, can reach, and up to `keep_faults` faults.
    #[must_use]
    pub const fn new(privileged: bool, keep_faults: usize) -> Self {
        Self {
            privileged,
            keep_faults,
            most: u64::MAX,
            mappings: Vec::new(),
            faults: Vec::new(),
            fault_count: 0,
            intercepted: 0,
            missing: None,
            leaf_sizes: [0; 65],
        }
    }

    /// The same, for at most `most` runs: more end the walk.
    #[must_use]
    pub fn at_most(self, most: u64) -> Self {
        Self { most, ..self }
    }

    /// The runs so far, sorted by IOVA.
    #[must_use]
    pub fn mappings(&self) -> &[Mapping] {
        &self.mappings
    }

    /// The runs, sorted by IOVA.
    #[must_use]
    pub fn into_mappings(self) -> Vec<Mapping> {
        self.mappings
    }

    /// The faults that were kept: the IOVAs, and why. Where nothing is mapped is no fault.
    #[must_use]
    pub fn faults(&self) -> &[(Span, Fault)] {
        &self.faults
    }

    /// All faults, those that were not kept included.
    #[must_use]
    pub const fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// Those of the faults that are none of the tables': mapped ranges that something else serves ([`Cause::Intercepted`]).
    #[must_use]
    pub const fn intercepted_count(&self) -> u64 {
        self.intercepted
    }

    /// The first page that the memory map promises and that could not be read.
    #[must_use]
    pub const fn missing(&self) -> Option<u64> {
        self.missing
    }

    /// How many leaves of `2^n` bytes there are, at index `n`. Parts of leaves count by their own size, rounded down.
    #[must_use]
    pub const fn leaf_sizes(&self) -> &[u64; 65] {
        &self.leaf_sizes
    }
}

impl Visitor for Collector {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        self.leaf_sizes[piece.iova.length_minus_one().checked_add(1).map_or(64, |bytes| bytes.ilog2() as usize)] += 1;
        let access = piece.attributes.access(self.privileged);
        if access.is_none() {
            return Ok(());
        }
        if let Some(last) = self.mappings.last_mut()
            && last.access == access
            && last.iova.last.checked_add(1) == Some(piece.iova.first)
            && last.address.checked_add(last.iova.length_minus_one()).and_then(|address| address.checked_add(1)) == Some(piece.address)
        {
            last.iova.last = piece.iova.last;
        } else if self.mappings.len() as u64 >= self.most {
            return Err(Exhausted { what: "separate mappings", limit: self.most }.into());
        } else {
            self.mappings.push(Mapping { iova: piece.iova, address: piece.address, access });
        }
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.fault_count += 1;
        self.intercepted += u64::from(fault.cause == Cause::Intercepted);
        if fault.cause == Cause::Missing && self.missing.is_none() {
            self.missing = fault.address;
        }
        if self.faults.len() < self.keep_faults {
            let level = fault.path.last().map(|step| step.number);
            let (input, path) = (fault.span.first, fault.path.to_vec());
            let FaultAt { stage, cause, address, reading_table, .. } = *fault;
            let kept = Fault { stage, cause, level, input, address, reading_table, path };
            self.faults.push((fault.span, kept));
        }
        Ok(())
    }
}
