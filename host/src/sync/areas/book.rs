//! What the guest wants, what the kernel has, and what follows from both: no kernel call is made here.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::kernel::MapFlags;
use crate::pins::{PAGE, Use, View};
use crate::table::{Loss, Piece};
use crate::{Access, Attributes, Span};

/// A piece that was told, and not taken back.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    last: u64,
    /// Guest-physical, of the first byte.
    address: u64,
    /// None at all: the kernel cannot say what it allows.
    pub(super) flags: MapFlags,
}

impl Wanted {
    pub(super) fn of(piece: &Piece) -> Self {
        // Devices' requests carry no privileges that the kernel's tables could tell apart.
        Self { last: piece.iova.last, address: piece.address, flags: flags(piece.attributes.access(false)) }
    }

    pub(super) const fn span(&self, first: u64) -> Span {
        Span { first, last: self.last }
    }

    /// As a piece, with what of its attributes is known.
    pub(super) fn piece(&self, first: u64) -> Piece {
        let of = |flag, attributes| if self.flags.contains(flag) { attributes } else { Attributes::none() };
        let attributes = of(MapFlags::READABLE, Attributes::READ).with(of(MapFlags::WRITEABLE, Attributes::WRITE));
        Piece { iova: self.span(first), address: self.address, attributes }
    }
}

fn flags(access: Access) -> MapFlags {
    let of = |wanted, flag| if wanted { flag } else { MapFlags::NONE };
    of(access.read, MapFlags::READABLE) | of(access.write, MapFlags::WRITEABLE)
}

/// Without writing where memory is read-only.
const fn narrow(flags: MapFlags, writable: bool) -> MapFlags {
    if writable { flags } else { MapFlags(flags.0 & !MapFlags::WRITEABLE.0) }
}

/// An area as the kernel has it: it can be removed as a whole only.
#[derive(Clone, Debug)]
pub(super) struct Area {
    pub(super) last: u64,
    /// Guest-physical, of the first byte.
    pub(super) address: u64,
    pub(super) flags: MapFlags,
    /// Several pieces of one batch that nothing but their order in memory joins.
    pub(super) joined: bool,
    pub(super) held: Use,
}

impl Area {
    pub(super) const fn span(&self, first: u64) -> Span {
        Span { first, last: self.last }
    }
}

/// By first IOVA.
pub(super) type AreaMap = BTreeMap<u64, Area>;

/// What ends somewhere.
pub(super) trait Extent {
    fn last(&self) -> u64;
}

impl Extent for Area {
    fn last(&self) -> u64 {
        self.last
    }
}

impl Extent for Wanted {
    fn last(&self) -> u64 {
        self.last
    }
}

/// Those that have an IOVA of the span, ascending.
pub(super) fn overlapping<T: Extent>(map: &BTreeMap<u64, T>, span: Span) -> impl Iterator<Item = (u64, &T)> {
    let before = map.range(..span.first).next_back().filter(|(_, one)| one.last() >= span.first);
    before.into_iter().chain(map.range(span.first..=span.last)).map(|(first, one)| (*first, one))
}

/// What could be one copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) iova: Span,
    pub(super) address: u64,
    pub(super) flags: MapFlags,
    pub(super) joined: bool,
}

impl Part {
    fn cut(&self, iova: Span) -> Self {
        Self { iova, address: self.address + (iova.first - self.iova.first), ..*self }
    }

    pub(super) const fn memory(&self) -> Span {
        Span { first: self.address, last: self.address + self.iova.length_minus_one() }
    }

    /// Makes this one and the next, which begins behind it, one part; false if they are not neighbours in memory, or would be longer than `limit` bytes.
    pub(super) fn join(&mut self, next: &Self, limit: u64) -> bool {
        let follows = self.iova.last.checked_add(1) == Some(next.iova.first) && self.memory().last.checked_add(1) == Some(next.address);
        let joined = follows && self.flags == next.flags && next.iova.last - self.iova.first < limit;
        if joined {
            self.iova.last = next.iova.last;
            self.joined = true;
        }
        joined
    }
}

/// Where areas may be, and what they can reach.
#[derive(Clone, Debug)]
pub(super) struct Scope {
    /// Sorted and disjoint.
    pub(super) ranges: Vec<Span>,
    /// IOVAs and lengths are multiples of it, bytes: a power of two.
    pub(super) alignment: u64,
    pub(super) view: Arc<View>,
}

impl Scope {
    /// What of a piece can be mapped; `lose` hears of the rest.
    pub(super) fn parts(&self, first: u64, wanted: &Wanted, parts: &mut Vec<Part>, lose: &mut dyn FnMut(Loss, Span)) {
        let (span, low) = (wanted.span(first), self.alignment.max(PAGE) - 1);
        if wanted.flags == MapFlags::NONE {
            return lose(Loss::Permission, span);
        }
        if wanted.address.checked_add(span.length_minus_one()).is_none() {
            return lose(Loss::OutputRange, span);
        }
        let Some(whole) = inward(span, low).filter(|_| (first ^ wanted.address) & low == 0) else { return lose(Loss::Granule, span) };
        rest(span, Some(whole), &mut |part| lose(Loss::Granule, part));
        let mut next = Some(whole.first);
        for range in &self.ranges {
            let Some(inside) = range.intersection(whole).and_then(|inside| inward(inside, low)) else { continue };
            if let Some(gap) = next.and_then(|next| Span::new(next, inside.first.checked_sub(1)?)) {
                lose(Loss::InputRange, gap);
            }
            self.memory(inside, wanted.address + (inside.first - first), wanted.flags, parts, lose);
            next = inside.last.checked_add(1);
        }
        if let Some(gap) = next.and_then(|next| Span::new(next, whole.last)) {
            lose(Loss::InputRange, gap);
        }
    }

    /// The parts of a span that memory is behind: as long as blocks follow each other and allow the same.
    fn memory(&self, iova: Span, address: u64, flags: MapFlags, parts: &mut Vec<Part>, lose: &mut dyn FnMut(Loss, Span)) {
        let memory = Span { first: address, last: address + iova.length_minus_one() };
        let at = |address: u64| iova.first + (address - memory.first);
        let (start, mut next) = (parts.len(), Some(memory.first));
        for block in self.view.within(memory).iter().filter(|block| !block.is_closed()) {
            let Some(inside) = block.span.intersection(memory) else { continue };
            let inside_iova = Span { first: at(inside.first), last: at(inside.last) };
            if let Some(gap) = next.and_then(|next| Span::new(next, inside.first.checked_sub(1)?)) {
                lose(Loss::OutputRange, Span { first: at(gap.first), last: at(gap.last) });
            }
            next = inside.last.checked_add(1);
            let part = Part { iova: inside_iova, address: inside.first, flags: narrow(flags, block.writable), joined: false };
            if part.flags == MapFlags::NONE {
                lose(Loss::Permission, part.iova);
                continue;
            }
            match parts.get_mut(start..).and_then(<[Part]>::last_mut) {
                Some(last) if last.iova.last.checked_add(1) == Some(part.iova.first) && last.flags == part.flags => last.iova.last = part.iova.last,
                _ => parts.push(part),
            }
        }
        if let Some(gap) = next.and_then(|next| Span::new(next, memory.last)) {
            lose(Loss::OutputRange, Span { first: at(gap.first), last: at(gap.last) });
        }
        // Blocks are whole pages, but the host's pages may be larger.
        let low = self.alignment.max(PAGE) - 1;
        if low >= PAGE {
            let found: Vec<Part> = parts.drain(start..).collect();
            for part in found {
                let whole = inward(part.iova, low);
                rest(part.iova, whole, &mut |part| lose(Loss::Granule, part));
                parts.extend(whole.map(|whole| part.cut(whole)));
            }
        }
    }
}

/// The whole pages of a span; `low` has the bits of an offset into one.
const fn inward(span: Span, low: u64) -> Option<Span> {
    let (first, last) = match (span.first.checked_add(low), span.last.checked_add(1)) {
        (None, _) => return None,
        (Some(first), None) => (first & !low, u64::MAX),
        (Some(first), Some(end)) => match (end & !low).checked_sub(1) {
            Some(last) => (first & !low, last),
            None => return None,
        },
    };
    Span::new(first, last)
}

/// What of a span is not in a part of it.
fn rest(span: Span, part: Option<Span>, tell: &mut dyn FnMut(Span)) {
    let Some(part) = part else { return tell(span) };
    if let Some(before) = part.first.checked_sub(1).and_then(|last| Span::new(span.first, last)) {
        tell(before);
    }
    if let Some(behind) = part.last.checked_add(1).and_then(|first| Span::new(first, span.last)) {
        tell(behind);
    }
}

/// What of a part no area covers; true if an area is in the way that says something else.
pub(super) fn uncovered(part: &Part, areas: &AreaMap, parts: &mut Vec<Part>) -> bool {
    let (mut next, mut blocked) = (Some(part.iova.first), false);
    for (first, area) in overlapping(areas, part.iova) {
        if let Some(gap) = next.and_then(|next| Span::new(next, first.checked_sub(1)?)) {
            parts.push(part.cut(gap));
        }
        // Where both would have the IOVA 0 is the same if they are the same.
        blocked |= part.flags != area.flags || part.address.wrapping_sub(part.iova.first) != area.address.wrapping_sub(first);
        next = area.last.checked_add(1);
    }
    if let Some(gap) = next.and_then(|next| Span::new(next, part.iova.last)) {
        parts.push(part.cut(gap));
    }
    blocked
}

/// What is to become of an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// All of it is wanted as it is.
    Keep,
    /// Nothing of it is.
    Drop,
    /// Part of it is, and must not be interrupted.
    Cut,
}

/// Judges an area by what is wanted.
pub(super) fn judge(first: u64, area: &Area, wanted: &BTreeMap<u64, Wanted>, ranges: &[Span]) -> Verdict {
    let (span, block) = (area.span(first), area.held.block());
    if block.is_closed() {
        return Verdict::Drop;
    }
    let (mut same, mut differs) = (false, !ranges.iter().any(|range| range.intersection(span) == Some(span)));
    let mut next = Some(first);
    for (at, one) in overlapping(wanted, span) {
        let Some(common) = one.span(at).intersection(span) else { continue };
        differs |= next != Some(common.first);
        next = common.last.checked_add(1);
        let address = one.address.checked_add(common.first - at);
        if address == Some(area.address + (common.first - first)) && narrow(one.flags, block.writable) == area.flags {
            same = true;
        } else {
            differs = true;
        }
    }
    differs |= next.is_some_and(|next| next <= span.last);
    match (same, differs) {
        (true, false) => Verdict::Keep,
        (true, true) => Verdict::Cut,
        (false, _) => Verdict::Drop,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Gpa;
    use crate::kernel::Kernel;
    use crate::kernel::sim::SimBuilder;
    use crate::pins::{Backing, Pins, Region};

    /// Memory at 1 MiB: blocks of 64 KiB, then some that is read-only; and at the very end.
    fn view() -> Arc<View> {
        let kernel: Arc<dyn Kernel> = SimBuilder::new().build().unwrap();
        let pins = Pins::new(&kernel, u64::MAX).unwrap();
        let region = |gpa, length, writable, block| Region { gpa: Gpa(gpa), length, backing: Backing::User(0x1000_0000), writable, block };
        pins.add(&region(0x10_0000, 0x4_0000, true, Some(0x1_0000))).unwrap();
        pins.add(&region(0x14_0000, 0x2_0000, false, None)).unwrap();
        pins.add(&region(0u64.wrapping_sub(0x2_0000), 0x1_f000, true, None)).unwrap();
        pins.view().1
    }

    /// Near 0, near the memory, near the end.
    fn address() -> impl Strategy<Value = u64> {
        let base = prop_oneof![Just(0), Just(0xf_8000), Just(0x13_8000), Just(0u64.wrapping_sub(0x3_0000))];
        let offset = prop_oneof![3 => (0..0x20_u64).prop_map(|page| page * PAGE), 1 => 0..0x2_0000_u64];
        (base, offset).prop_map(|(base, offset)| base + offset)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        /// Every byte of a piece is in one part or lost once; parts keep to ranges, pages and blocks, and allow no more than the piece.
        #[test]
        fn parts_and_losses_make_up_the_piece(
            first in address(),
            length in prop_oneof![(1..0x20_u64).prop_map(|pages| pages * PAGE), 1..0x2_0000_u64],
            address in address(),
            flags in 0..4_u32,
            alignment in prop_oneof![Just(PAGE), Just(0x1_0000)],
            gap in (0..0x40_u64).prop_map(|page| page * PAGE),
        ) {
            let wanted = Wanted { last: first.saturating_add(length - 1), address, flags: MapFlags(flags << 1) };
            let ranges = vec![Span { first: 0, last: gap + 0xfff }, Span { first: gap + 0x3000, last: u64::MAX - 0x1000 }];
            let scope = Scope { ranges, alignment, view: view() };
            let (mut parts, mut lost) = (Vec::new(), Vec::new());
            scope.parts(first, &wanted, &mut parts, &mut |_, span| lost.push(span));
            let mut all: Vec<Span> = parts.iter().map(|part| part.iova).chain(lost).collect();
            all.sort_unstable();
            prop_assert_eq!((all[0].first, all[all.len() - 1].last), (first, wanted.last), "{:?}", all);
            prop_assert!(all.windows(2).all(|pair| pair[0].last.checked_add(1) == Some(pair[1].first)), "{:?}", all);
            for part in &parts {
                prop_assert_eq!(part.address - wanted.address, part.iova.first - first);
                prop_assert!((part.iova.first | part.address | part.iova.last.wrapping_add(1)) & (alignment - 1) == 0, "{:?}", part);
                prop_assert!(scope.ranges.iter().any(|range| range.intersection(part.iova) == Some(part.iova)), "{:?}", part);
                let memory = part.memory();
                let blocks = scope.view.within(memory);
                let there: u64 = blocks.iter().filter_map(|block| block.span.intersection(memory)).map(|span| span.length_minus_one() + 1).sum();
                prop_assert_eq!(there, memory.length_minus_one() + 1);
                prop_assert!(blocks.iter().all(|block| part.flags == narrow(wanted.flags, block.writable)) && part.flags != MapFlags::NONE);
            }
        }
    }
}
