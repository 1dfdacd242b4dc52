//! What one look at a guest's tables found, on its way to be one batch.

use std::collections::HashMap;

use crate::address::cut;
use crate::table::Piece;
use crate::{Attributes, Change, Span};

/// Why entries were not followed although the guest wrote them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// The address space has as many pages of tables as it may.
    TablePages,
    /// It has as many leaves as it may.
    Leaves,
    /// The call asked the format as often as it may.
    Questions,
    /// The format failed, and this pattern is not remembered.
    Format,
    /// The format gave an answer that cannot be.
    Nonsense,
}

impl Reason {
    /// All reasons.
    pub const ALL: [Self; 5] = [Self::TablePages, Self::Leaves, Self::Questions, Self::Format, Self::Nonsense];

    /// One sentence in lower case.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::TablePages => "the address space has as many pages of tables as it may",
            Self::Leaves => "the address space has as many leaves as it may",
            Self::Questions => "too many different patterns were met at once",
            Self::Format => "the format failed, and this pattern is not remembered",
            Self::Nonsense => "the format gave an answer that cannot be",
        }
    }
}

/// Entries that count as absent until they are looked at again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The IOVAs that they would serve.
    pub iova: Span,
    /// The stage of the tables that they are in: 1, or 2 for the second of two.
    pub stage: u8,
    /// Why.
    pub reason: Reason,
}

/// Blocked entries of one batch that are told one by one.
const EXAMPLES: usize = 16;

/// Changes that were found and not handed over yet. Whatever order they were found in, and however often a guest changed its mind meanwhile, the batch
/// keeps the promises of [`Change`].
#[derive(Debug, Default)]
pub struct Changes {
    unmaps: Vec<Change>,
    maps: Vec<Change>,
    /// Where in `maps` the piece is that begins at an IOVA; made when somebody looks for one.
    places: Option<HashMap<u64, usize>>,
    /// No piece in `maps` begins beyond this.
    highest: u64,
    /// Unmaps, or maps, do not ascend.
    mixed: (bool, bool),
    /// Both kinds, for a batch that has both.
    batch: Vec<Change>,
    blocked: Vec<Blocked>,
    blocked_count: u64,
    /// IOVAs of which nothing is taken in.
    holes: Vec<Span>,
}

impl Changes {
    /// None.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.unmaps.is_empty() && self.maps.is_empty()
    }

    /// The first few entries that were blocked.
    #[must_use]
    pub fn blocked(&self) -> &[Blocked] {
        &self.blocked
    }

    /// All entries that were blocked.
    #[must_use]
    pub const fn blocked_count(&self) -> u64 {
        self.blocked_count
    }

    /// From now on, what is found at IOVAs of `holes` is left out: they are sorted and do not overlap.
    pub(super) fn leave_out(&mut self, holes: &[Span]) {
        self.holes.clear();
        self.holes.extend_from_slice(holes);
    }

    fn has_hole(&self, span: Span) -> bool {
        self.holes.iter().any(|hole| hole.intersection(span).is_some())
    }

    /// The parts of a span that are in no hole.
    fn outside(&self, span: Span) -> Vec<Span> {
        cut(&self.holes, span).filter_map(|(outside, part)| outside.then_some(part)).collect()
    }

    #[inline]
    pub(super) fn map(&mut self, piece: Piece) {
        match self.has_hole(piece.iova) {
            true => self.map_outside(piece.iova, piece.address, piece.attributes),
            false => self.add(piece),
        }
    }

    /// Takes words, so that a piece that is simply added is never put into memory before.
    #[inline(never)]
    fn map_outside(&mut self, iova: Span, address: u64, attributes: Attributes) {
        let piece = Piece { iova, address, attributes };
        self.outside(piece.iova).into_iter().for_each(|part| self.add(piece.part(part)));
    }

    #[inline(always)]
    fn add(&mut self, piece: Piece) {
        if self.places.is_some() {
            self.note_place(piece.iova.first);
        }
        self.mixed.1 |= piece.iova.first < self.highest;
        self.highest = self.highest.max(piece.iova.first);
        self.maps.push(Change::Map(piece));
    }

    #[inline(never)]
    fn note_place(&mut self, first: u64) {
        if let Some(places) = &mut self.places {
            places.insert(first, self.maps.len());
        }
    }

    /// A piece that was mapped is gone. If this batch mapped it (a guest that writes while it is being read), the two are nothing.
    #[inline]
    pub(super) fn unmap(&mut self, span: Span) {
        match self.has_hole(span) {
            true => self.unmap_outside(span),
            false => self.take(span),
        }
    }

    #[inline(never)]
    fn unmap_outside(&mut self, span: Span) {
        self.outside(span).into_iter().for_each(|part| self.take(part));
    }

    #[inline(always)]
    fn take(&mut self, span: Span) {
        if self.maps.is_empty() || self.highest < span.first || !self.unmap_again(span.first) {
            self.mixed.0 |= self.unmaps.last().is_some_and(|last| last.span().first > span.first);
            self.unmaps.push(Change::Unmap(span));
        }
    }

    /// Maps pieces that ascend, the first at `first`; how many these were. Where that is not as easy as adding them, none of them is asked for.
    #[inline]
    pub(super) fn map_ascending(&mut self, first: u64, pieces: impl Iterator<Item = Piece>) -> usize {
        if !self.holes.is_empty() || self.places.is_some() || self.highest > first {
            return 0;
        }
        let before = self.maps.len();
        self.maps.extend(pieces.map(Change::Map));
        self.highest = self.maps.last().map_or(self.highest, |last| last.span().first.max(self.highest));
        self.maps.len() - before
    }

    /// The same for spans that were mapped and are gone.
    #[inline]
    pub(super) fn unmap_ascending(&mut self, first: u64, spans: impl Iterator<Item = Span>) -> usize {
        let is_last = self.unmaps.last().is_none_or(|last| last.span().first <= first);
        if !self.holes.is_empty() || !is_last || !self.maps.is_empty() && self.highest >= first {
            return 0;
        }
        let before = self.unmaps.len();
        self.unmaps.extend(spans.map(Change::Unmap));
        self.unmaps.len() - before
    }

    /// Takes out the piece that begins at an IOVA, if this batch mapped it.
    #[inline(never)]
    fn unmap_again(&mut self, first: u64) -> bool {
        let maps = &self.maps;
        let places = self.places.get_or_insert_with(|| maps.iter().enumerate().map(|(place, piece)| (piece.span().first, place)).collect());
        let Some(place) = places.remove(&first) else { return false };
        self.maps.swap_remove(place);
        if let Some(moved) = self.maps.get(place) {
            places.insert(moved.span().first, place);
        }
        self.mixed.1 = true;
        true
    }

    pub(super) fn block(&mut self, iova: Span, reason: Reason) {
        self.blocked_count += 1;
        if self.blocked.len() < EXAMPLES {
            self.blocked.push(Blocked { iova, stage: 1, reason });
        }
    }

    /// Tells what was blocked while another batch was found, in tables of this stage. `iovas` tells IOVAs for the inputs of such tables, until it hears false.
    pub(super) fn absorb_blocked(&mut self, other: &Self, stage: u8, mut iovas: impl FnMut(Span, &mut dyn FnMut(Span) -> bool)) {
        self.blocked_count += other.blocked_count;
        for blocked in &other.blocked {
            iovas(blocked.iova, &mut |iova| {
                let room = self.blocked.len() < EXAMPLES;
                self.blocked.extend(room.then_some(Blocked { iova, stage, ..*blocked }));
                room
            });
        }
    }

    /// The batch.
    pub fn batch(&mut self) -> &[Change] {
        if self.mixed.0 {
            self.unmaps.sort_unstable_by_key(Change::span);
        }
        if self.mixed.1 {
            self.maps.sort_unstable_by_key(Change::span);
            self.places = None;
        }
        self.mixed = (false, false);
        match (self.unmaps.is_empty(), self.maps.is_empty()) {
            (true, _) => &self.maps,
            (_, true) => &self.unmaps,
            _ => {
                self.batch.clear();
                self.batch.extend_from_slice(&self.unmaps);
                self.batch.extend_from_slice(&self.maps);
                &self.batch
            }
        }
    }

    /// Forgets everything and keeps the memory.
    pub fn clear(&mut self) {
        self.unmaps.clear();
        self.maps.clear();
        self.places = None;
        self.highest = 0;
        self.mixed = (false, false);
        self.blocked.clear();
        self.blocked_count = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attributes;

    fn piece(first: u64, address: u64) -> Piece {
        Piece { iova: Span { first, last: first + 0xfff }, address, attributes: Attributes::READ }
    }

    #[test]
    fn what_was_mapped_and_unmapped_in_one_batch_is_nothing() {
        let mut changes = Changes::new();
        changes.unmap(piece(0x1000, 0).iova);
        changes.map(piece(0x1000, 0x5000));
        changes.map(piece(0x3000, 0x6000));
        changes.unmap(piece(0x1000, 0).iova);
        changes.map(piece(0x1000, 0x7000));
        changes.map(piece(0x2000, 0x8000));
        changes.unmap(piece(0x3000, 0).iova);
        changes.map(piece(0x3000, 0x6000));
        changes.unmap(piece(0x2000, 0).iova);
        let wanted = [Change::Unmap(piece(0x1000, 0).iova), Change::Map(piece(0x1000, 0x7000)), Change::Map(piece(0x3000, 0x6000))];
        assert_eq!(changes.batch(), wanted);
    }
}
