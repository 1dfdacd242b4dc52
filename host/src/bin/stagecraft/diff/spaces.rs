//! Two address spaces, compared in one pass over their runs.

use stagecraft::table::Mapping;
use stagecraft::{Access, Span};

/// Where an IOVA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Guest-physical address.
    pub address: u64,
    /// What a device may do.
    pub access: Access,
}

/// IOVAs that differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The IOVAs.
    pub iova: Span,
    /// Where the first of them goes in the first space.
    pub a: Option<Target>,
    /// And in the second.
    pub b: Option<Target>,
}

/// How they differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Mapped in the second only.
    Added,
    /// Mapped in the first only.
    Removed,
    /// Mapped in both, to another address or with another access.
    Changed,
}

impl Change {
    /// `added`, `removed` or `changed`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Added => "added",
            Self::Removed => "removed",
            Self::Changed => "changed",
        }
    }
}

impl Range {
    /// How they differ.
    pub const fn change(&self) -> Change {
        match (self.a, self.b) {
            (None, _) => Change::Added,
            (_, None) => Change::Removed,
            _ => Change::Changed,
        }
    }

    /// How many bytes.
    pub fn bytes(&self) -> u128 {
        u128::from(self.iova.length_minus_one()) + 1
    }

    /// Takes in `next` if it continues this range in every respect.
    fn join(&mut self, next: &Self) -> bool {
        let length = self.iova.length_minus_one().wrapping_add(1);
        let continues = |from: Option<Target>, to: Option<Target>| match (from, to) {
            (None, None) => true,
            (Some(from), Some(to)) => from.access == to.access && from.address.wrapping_add(length) == to.address,
            _ => false,
        };
        let joined = self.iova.last.checked_add(1) == Some(next.iova.first) && continues(self.a, next.a) && continues(self.b, next.b);
        if joined {
            self.iova.last = next.iova.last;
        }
        joined
    }
}

/// What is left of a run from `from` on.
fn rest(mapping: Option<&Mapping>, from: u64) -> Option<(Span, Target)> {
    let mapping = mapping?;
    let first = mapping.iova.first.max(from);
    let address = mapping.address.wrapping_add(first - mapping.iova.first);
    Some((Span { first, last: mapping.iova.last }, Target { address, access: mapping.access }))
}

/// Where two spaces differ, in ascending order. Both are sorted runs that do not overlap; how a space is cut into runs plays no part.
pub fn compare(a: &[Mapping], b: &[Mapping]) -> Vec<Range> {
    let mut ranges: Vec<Range> = Vec::new();
    let (mut in_a, mut in_b, mut from) = (0, 0, 0);
    loop {
        let (left, right) = (rest(a.get(in_a), from), rest(b.get(in_b), from));
        let before = |other: Option<(Span, Target)>, last: u64| other.map_or(last, |(span, _)| last.min(span.first - 1));
        let range = match (left, right) {
            (None, None) => return ranges,
            (Some((left, target)), other) if other.is_none_or(|(right, _)| left.first < right.first) => {
                Range { iova: Span { first: left.first, last: before(other, left.last) }, a: Some(target), b: None }
            }
            (other, Some((right, target))) if other.is_none_or(|(left, _)| right.first < left.first) => {
                Range { iova: Span { first: right.first, last: before(other, right.last) }, a: None, b: Some(target) }
            }
            // Both start here.
            (left, right) => {
                let last = [left, right].iter().flatten().map(|(span, _)| span.last).min().unwrap_or(u64::MAX);
                let first = left.map_or(from, |(span, _)| span.first);
                Range { iova: Span { first, last }, a: left.map(|(_, target)| target), b: right.map(|(_, target)| target) }
            }
        };
        if range.a != range.b && !ranges.last_mut().is_some_and(|last| last.join(&range)) {
            ranges.push(range);
        }
        let last = range.iova.last;
        in_a += usize::from(a.get(in_a).is_some_and(|mapping| mapping.iova.last <= last));
        in_b += usize::from(b.get(in_b).is_some_and(|mapping| mapping.iova.last <= last));
        let Some(next) = last.checked_add(1) else { return ranges };
        from = next;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(first: u64, last: u64, address: u64, access: Access) -> Mapping {
        Mapping { iova: Span { first, last }, address, access }
    }

    const RW: Access = Access { read: true, write: true };

    #[test]
    fn how_a_space_is_cut_plays_no_part() {
        let whole = [run(0x1000, 0x4fff, 0x8000, RW)];
        let parts = [run(0x1000, 0x1fff, 0x8000, RW), run(0x2000, 0x4fff, 0x9000, RW)];
        assert_eq!(compare(&whole, &parts), []);
        assert_eq!(compare(&parts, &whole), []);
    }

    #[test]
    fn changes_of_all_kinds_are_found_up_to_the_last_byte() {
        let a = [run(0x0, 0xfff, 0x5000, RW), run(0x2000, 0x2fff, 0x8000, RW)];
        let b = [run(0x2000, 0x2fff, 0x8000, Access::READ), run(u64::MAX - 0xfff, u64::MAX, 0x9000, RW)];
        let found: Vec<(Change, u64, u64)> = compare(&a, &b).iter().map(|range| (range.change(), range.iova.first, range.iova.last)).collect();
        assert_eq!(found, [(Change::Removed, 0, 0xfff), (Change::Changed, 0x2000, 0x2fff), (Change::Added, u64::MAX - 0xfff, u64::MAX)]);
    }

    /// Runs of bytes below 64, from a list of gaps, lengths, addresses and accesses.
    fn space() -> impl Strategy<Value = Vec<Mapping>> {
        prop::collection::vec((0_u64..3, 1_u64..5, 0_u64..3, any::<bool>()), 0..10).prop_map(|parts| {
            let mut next = 0;
            let run = |(gap, length, address, write): (u64, u64, u64, bool)| {
                let first = next + gap;
                next = first + length;
                // Few different distances, so that the two spaces often agree.
                run(first, next - 1, first + address, Access { read: true, write })
            };
            parts.into_iter().map(run).collect()
        })
    }

    fn byte(space: &[Mapping], iova: u64) -> Option<Target> {
        let found = space.iter().find(|mapping| mapping.iova.contains(iova));
        found.map(|mapping| Target { address: mapping.address + (iova - mapping.iova.first), access: mapping.access })
    }

    proptest! {
        /// The ranges say exactly which bytes differ, and how.
        #[test]
        fn ranges_are_what_a_comparison_of_every_byte_finds((a, b) in (space(), space())) {
            let ranges = compare(&a, &b);
            prop_assert!(ranges.windows(2).all(|pair| pair[0].iova.last < pair[1].iova.first));
            for iova in 0..80 {
                let range = ranges.iter().find(|range| range.iova.contains(iova));
                let at = |target: Option<Target>, range: &Range| target.map(|target| Target { address: target.address + (iova - range.iova.first), ..target });
                let (left, right) = (byte(&a, iova), byte(&b, iova));
                match range {
                    Some(range) => prop_assert_eq!((at(range.a, range), at(range.b, range)), (left, right)),
                    None => prop_assert_eq!(left, right),
                }
            }
        }
    }
}
