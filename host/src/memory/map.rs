//! The guest's memory map: which guest-physical addresses exist.

use std::fmt;

use crate::Span;

/// What a range of guest-physical addresses is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Memory.
    Ram,
    /// Device memory: BARs, doorbells.
    Device,
    /// Where Stagecraft put converted tables. No leaf may point here.
    Table,
}

impl Kind {
    /// The name in a snapshot.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Device => "device",
            Self::Table => "table",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// One range of the map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it is.
    pub kind: Kind,
    /// Where it is.
    pub span: Span,
}

/// All guest-physical addresses that exist, sorted and not overlapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryMap {
    regions: Vec<Region>,
    /// Where leaves may point: RAM and device memory, neighbours joined.
    targets: Vec<Span>,
}

/// Two ranges of a memory map overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("memory ranges {0} and {1} overlap")]
pub struct MemoryMapError(pub Span, pub Span);

impl MemoryMap {
    /// A map of these regions, in any order.
    ///
    /// # Errors
    /// Two regions that overlap.
    pub fn new(mut regions: Vec<Region>) -> Result<Self, MemoryMapError> {
        regions.sort_by_key(|region| region.span);
        if let Some(pair) = regions.windows(2).find(|pair| pair[0].span.last >= pair[1].span.first) {
            return Err(MemoryMapError(pair[0].span, pair[1].span));
        }
        let mut targets: Vec<Span> = Vec::new();
        for region in regions.iter().filter(|region| region.kind != Kind::Table) {
            match targets.last_mut() {
                Some(last) if last.last.checked_add(1) == Some(region.span.first) => last.last = region.span.last,
                _ => targets.push(region.span),
            }
        }
        Ok(Self { regions, targets })
    }

    /// All addresses below `2^bits` exist: for tables whose outputs a second stage bounds.
    #[must_use]
    pub fn everything(bits: u8) -> Self {
        let span = Span::of_log2(0, bits);
        Self { regions: vec![Region { kind: Kind::Ram, span }], targets: vec![span] }
    }

    /// The regions, sorted.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that `address` lies in.
    #[inline]
    #[must_use]
    pub fn region(&self, address: u64) -> Option<Region> {
        let index = self.regions.partition_point(|region| region.span.last < address);
        self.regions.get(index).copied().filter(|region| region.span.contains(address))
    }

    /// Whether both addresses exist.
    #[inline]
    pub(crate) fn has_both(&self, first: u64, last: u64) -> bool {
        let exists = |address: u64| {
            let index = self.regions.partition_point(|region| region.span.last < address);
            self.regions.get(index).filter(|region| region.span.first <= address)
        };
        exists(first).is_some_and(|region| last <= region.span.last || exists(last).is_some())
    }

    /// The widest span around `address` that leaves may point to; neighbouring regions count as one.
    #[must_use]
    pub fn target(&self, address: u64) -> Option<Span> {
        let index = self.targets.partition_point(|span| span.last < address);
        self.targets.get(index).copied().filter(|span| span.contains(address))
    }

    /// All spans that leaves may point to, ascending; neighbouring regions count as one.
    #[must_use]
    pub fn targets(&self) -> &[Span] {
        &self.targets
    }

    /// The parts of `span` that leaves may point to, ascending.
    pub fn targets_within(&self, span: Span) -> impl Iterator<Item = Span> + '_ {
        let start = self.targets.partition_point(|target| target.last < span.first);
        self.targets[start..].iter().map_while(move |target| target.intersection(span))
    }

    /// The lowest address, aligned to `alignment`, at or above `from`, of a hole of `bytes` bytes below `2^bits`.
    #[must_use]
    pub fn hole(&self, from: u64, bytes: u64, alignment: u64, bits: u8) -> Option<u64> {
        let end = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        let beyond = bytes.saturating_sub(1);
        let mut at = from.checked_next_multiple_of(alignment)?;
        for region in &self.regions {
            if at.checked_add(beyond)? < region.span.first {
                break;
            }
            if region.span.last >= at {
                at = region.span.last.checked_add(1)?.checked_next_multiple_of(alignment)?;
            }
        }
        (at.checked_add(beyond)? <= end).then_some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(kind: Kind, first: u64, last: u64) -> Region {
        Region { kind, span: Span { first, last } }
    }

    #[test]
    fn neighbours_are_one_target_and_tables_are_none() {
        let map = MemoryMap::new(vec![region(Kind::Device, 0x3000, 0x3fff), region(Kind::Ram, 0x1000, 0x2fff), region(Kind::Table, 0x4000, 0x4fff)])
            .expect("no overlap");
        assert_eq!(map.target(0x2fff), Some(Span { first: 0x1000, last: 0x3fff }));
        assert_eq!(map.target(0x4000), None);
        assert_eq!(map.region(0x4000).map(|region| region.kind), Some(Kind::Table));
        assert_eq!(map.region(0xfff), None);
        let parts: Vec<Span> = map.targets_within(Span { first: 0x2000, last: 0x8000 }).collect();
        assert_eq!(parts, [Span { first: 0x2000, last: 0x3fff }]);
    }

    #[test]
    fn overlap_is_refused() {
        assert!(MemoryMap::new(vec![region(Kind::Ram, 0, 0xfff), region(Kind::Device, 0xfff, 0xfff)]).is_err());
    }

    #[test]
    fn holes_are_found_between_regions() {
        let map = MemoryMap::new(vec![region(Kind::Ram, 0x1000, 0x1fff), region(Kind::Ram, 0x4000, u64::MAX)]).expect("no overlap");
        assert_eq!(map.hole(0, 0x1000, 0x1000, 64), Some(0));
        assert_eq!(map.hole(0, 0x2000, 0x1000, 64), Some(0x2000));
        assert_eq!(map.hole(0, 0x2001, 0x1000, 64), None);
        assert_eq!(map.hole(0, 0x2000, 0x1000, 13), None, "beyond the address width");
        assert_eq!(map.hole(0, 0, 0x1000, 64), Some(0), "of nothing");
    }
}
