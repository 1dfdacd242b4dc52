//! Which slots of a table changes touch.

use crate::sync::nested::plan::Chain;
use crate::table::{Piece, low_bits};
use crate::{Change, Span};

/// A table, or a slot of one, and the IOVAs that are looked at there.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) chain: &'a Chain,
    pub(super) number: usize,
    pub(super) depth: usize,
    /// IOVA of entry 0 of the table.
    pub(super) base: u64,
    /// What is wanted of the table, or of the slot.
    pub(super) span: Span,
}

impl<'a> Place<'a> {
    /// The part `span` of it.
    #[inline]
    pub(super) const fn at(self, span: Span) -> Self {
        Self { span, ..self }
    }

    /// All IOVAs of the slot that `span` is in.
    #[inline]
    pub(super) fn whole(&self) -> Span {
        let lsb = self.chain.rungs[self.depth].lsb;
        Span::of_log2(self.span.first >> lsb << lsb, lsb)
    }

    /// The table in the slot.
    #[inline]
    pub(super) fn below(self) -> Self {
        Self { depth: self.depth + 1, base: self.whole().first, ..self }
    }

    pub(super) fn slots<'c>(self, unmaps: &'c [Change], maps: &'c [Change]) -> Slots<'a, 'c> {
        Slots { place: self, next: Some(self.span.first), unmaps, maps }
    }
}

/// A change of one slot.
#[derive(Clone, Copy)]
pub(super) struct One<'c> {
    pub(super) index: u64,
    /// What was there is unmapped.
    pub(super) unmap: bool,
    /// What is mapped there.
    pub(super) map: Option<&'c Piece>,
}

/// Goes through the slots that changes touch.
pub(super) struct Slots<'a, 'c> {
    pub(super) place: Place<'a>,
    next: Option<u64>,
    unmaps: &'c [Change],
    maps: &'c [Change],
}

impl<'c> Slots<'_, 'c> {
    /// The next change, if it is of exactly one slot, and no other change touches that but one of the other kind that is of exactly this slot, too.
    #[inline]
    pub(super) fn peek(&self) -> Option<One<'c>> {
        let below = low_bits(self.place.chain.rungs[self.place.depth].lsb);
        let slot = |span: Span| span.first & below == 0 && span.last == span.first | below;
        let index = |span: Span| (span.first - self.place.base) >> self.place.chain.rungs[self.place.depth].lsb;
        match (self.unmaps.first(), self.maps.first().and_then(piece_of)) {
            (Some(unmap), None) => slot(unmap.span()).then(|| One { index: index(unmap.span()), unmap: true, map: None }),
            (None, Some(piece)) => slot(piece.iova).then(|| One { index: index(piece.iova), unmap: false, map: Some(piece) }),
            (Some(unmap), Some(piece)) => {
                let unmap = unmap.span();
                let first = if piece.iova.first < unmap.first { piece.iova } else { unmap };
                let (both, apart) = (unmap == piece.iova, unmap.last < piece.iova.first || piece.iova.last < unmap.first);
                let map = (both || first == piece.iova).then_some(piece);
                (slot(first) && (both || apart)).then(|| One { index: index(first), unmap: first == unmap, map })
            }
            (None, None) => None,
        }
    }

    /// The unmaps that were not made yet, if no map is left: whoever makes some takes them out, from the first one on.
    #[inline]
    pub(super) const fn only_unmaps(&mut self) -> Option<&mut &'c [Change]> {
        if self.maps.is_empty() { Some(&mut self.unmaps) } else { None }
    }

    /// The same with maps.
    #[inline]
    pub(super) const fn only_maps(&mut self) -> Option<&mut &'c [Change]> {
        if self.unmaps.is_empty() { Some(&mut self.maps) } else { None }
    }

    /// The change that was told next is made.
    #[inline]
    pub(super) fn made(&mut self, one: &One<'_>) {
        self.unmaps = &self.unmaps[usize::from(one.unmap)..];
        self.maps = &self.maps[usize::from(one.map.is_some())..];
    }

    /// What was not made yet; none if that is nothing.
    pub(super) const fn rest(&self) -> Option<(&'c [Change], &'c [Change])> {
        if self.unmaps.is_empty() && self.maps.is_empty() { None } else { Some((self.unmaps, self.maps)) }
    }

    /// Index, the part of the slot that is wanted, and what touches it.
    pub(super) fn next(&mut self) -> Option<(u64, Span, &'c [Change], &'c [Change])> {
        let first = [self.unmaps.first(), self.maps.first()].into_iter().flatten().map(|change| change.span().first).min()?;
        let at = first.max(self.next?);
        if at > self.place.span.last {
            return None;
        }
        let lsb = self.place.chain.rungs[self.place.depth].lsb;
        let slot = Span::of_log2(at >> lsb << lsb, lsb).intersection(self.place.span)?;
        let (unmaps, maps) = (up_to(self.unmaps, slot.last), up_to(self.maps, slot.last));
        (self.unmaps, self.maps) = (beyond(self.unmaps, slot.last), beyond(self.maps, slot.last));
        self.next = slot.last.checked_add(1);
        Some(((slot.first - self.place.base) >> lsb, slot, unmaps, maps))
    }
}

pub(super) const fn piece_of(change: &Change) -> Option<&Piece> {
    match change {
        Change::Map(piece) => Some(piece),
        Change::Unmap(_) => None,
    }
}

/// Of changes in ascending order, those that begin at or before `last`.
#[inline]
fn up_to(changes: &[Change], last: u64) -> &[Change] {
    &changes[..count(changes, |change| change.span().first <= last)]
}

/// Those that reach beyond `last`.
#[inline]
fn beyond(changes: &[Change], last: u64) -> &[Change] {
    &changes[count(changes, |change| change.span().last <= last)..]
}

/// How many changes from the first one on are as `is` says, which those behind them are not: mostly none, or one.
#[inline]
fn count(changes: &[Change], is: impl Fn(&Change) -> bool) -> usize {
    match changes {
        [] => 0,
        [first, ..] if !is(first) => 0,
        [_] => 1,
        [_, second, ..] if !is(second) => 1,
        _ => 2 + changes[2..].partition_point(is),
    }
}

/// Of changes in ascending order, those that touch `span`: mostly all, or none.
#[inline]
pub(super) fn touching(changes: &[Change], span: Span) -> &[Change] {
    match (changes.first(), changes.last()) {
        (Some(first), Some(last)) if first.span().first < span.first || last.span().last > span.last => {
            let changes = up_to(changes, span.last);
            &changes[changes.partition_point(|change| change.span().last < span.first)..]
        }
        _ => changes,
    }
}

/// The unmaps of a batch, and its maps.
#[inline]
pub(super) fn split(batch: &[Change]) -> (&[Change], &[Change]) {
    batch.split_at(count(batch, |change| matches!(change, Change::Unmap(_))))
}

/// From the first IOVA of changes to the last; unmaps and maps each ascend.
#[inline]
pub(super) fn extent(unmaps: &[Change], maps: &[Change]) -> Option<Span> {
    let of = |changes: &[Change]| Some(Span { first: changes.first()?.span().first, last: changes.last()?.span().last });
    match (of(unmaps), of(maps)) {
        (Some(unmaps), Some(maps)) => Some(Span { first: unmaps.first.min(maps.first), last: unmaps.last.max(maps.last) }),
        (unmaps, maps) => unmaps.or(maps),
    }
}

/// Whether one of the changes has the whole span.
pub(super) fn covers(changes: &[Change], span: Span) -> bool {
    changes.first().is_some_and(|change| change.span().first <= span.first && change.span().last >= span.last)
}
