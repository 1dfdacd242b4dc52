//! What a walk finds, as areas: IOVAs that continue each other and look the same in a picture.

use stagecraft::memory::{Kind, MemoryMap, PAGE};
use stagecraft::table::{Cause, FaultAt, Piece, Step, Visitor, WalkError};
use stagecraft::{Access, Span};

/// IOVAs that continue each other, mapped by pages of one size, with one access, to one kind of memory. Their addresses may be anywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// The IOVAs.
    pub iova: Span,
    /// What a device may do.
    pub access: Access,
    /// Pages of `2^page_log2` bytes.
    pub page_log2: u8,
    /// What they lead to.
    pub kind: Kind,
}

impl Area {
    /// How many bytes.
    pub fn bytes(&self) -> u128 {
        u128::from(self.iova.length_minus_one()) + 1
    }
}

/// Collects areas.
pub struct Areas<'a> {
    map: &'a MemoryMap,
    privileged: bool,
    /// Ascending.
    pub areas: Vec<Area>,
    /// Leaves of each size, at index log2.
    pub leaves: [u64; 65],
    /// Entries or ranges that fault.
    pub faults: u64,
    /// The first page that could not be read.
    pub missing: Option<u64>,
}

impl<'a> Areas<'a> {
    /// What an unprivileged request, or a `privileged` one, can reach.
    pub const fn new(map: &'a MemoryMap, privileged: bool) -> Self {
        Self { map, privileged, areas: Vec::new(), leaves: [0; 65], faults: 0, missing: None }
    }
}

impl Visitor for Areas<'_> {
    fn piece(&mut self, piece: &Piece, _: &[Step]) -> Result<(), WalkError> {
        let page_log2 = piece.iova.length_minus_one().checked_add(1).map_or(64, |bytes| bytes.ilog2() as u8);
        self.leaves[usize::from(page_log2)] += 1;
        let access = piece.attributes.access(self.privileged);
        if access.is_none() {
            return Ok(());
        }
        let kind = self.map.region(piece.address).map_or(Kind::Ram, |region| region.kind);
        let area = Area { iova: piece.iova, access, page_log2, kind };
        match self.areas.last_mut() {
            Some(last) if last.iova.last.checked_add(1) == Some(area.iova.first) && Area { iova: area.iova, ..*last } == area => {
                last.iova.last = area.iova.last;
            }
            _ => self.areas.push(area),
        }
        Ok(())
    }

    fn fault(&mut self, fault: &FaultAt<'_>) -> Result<(), WalkError> {
        self.faults += 1;
        if fault.cause == Cause::Missing && self.missing.is_none() {
            self.missing = fault.address.map(|address| address & !(PAGE - 1));
        }
        Ok(())
    }
}
