//! Kinds of leaves: what a format said about a leaf's pattern, by number.

use std::collections::HashMap;

use crate::table::{LevelPlan, Missing, Piece};
use crate::{Attributes, Span};

/// All that must be known about a leaf besides its entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Kind {
    /// Where its address is.
    pub(super) shape: Option<u8>,
    /// Its size is coded in address bits.
    pub(super) whole: bool,
    pub(super) size_log2: u8,
    pub(super) attributes: Attributes,
    pub(super) missing: Missing,
}

/// A leaf that shows all of its bytes.
pub(super) const NOTHING_MISSING: Missing = Missing { front: 0, back: 0 };

const MARKS: Attributes = Attributes::ACCESSED;

impl Kind {
    /// What the part of a slot shows of the leaf in it, before anybody asked which of that exists. None: requests fault.
    pub(super) fn piece(&self, level: &LevelPlan, part: Span, entry: u64, output: Span) -> Option<Piece> {
        let below = Span::of_log2(0, self.size_log2).last;
        let address = level.field(self.shape).extract(entry);
        let address = if self.whole { address & !below } else { address };
        if self.size_log2 < level.index_lsb || address & below != 0 || !output.contains(address) {
            return None;
        }
        let base = part.first & !below;
        let here = if self.missing == NOTHING_MISSING {
            part
        } else {
            Span::new(base.saturating_add(self.missing.front.into()), (base | below).saturating_sub(self.missing.back.into()))?.intersection(part)?
        };
        let first = address | (here.first & below);
        let reachable = Span { first, last: first.saturating_add(here.length_minus_one()) }.intersection(output)?;
        let iova = Span { first: here.first, last: here.first + reachable.length_minus_one() };
        Some(Piece { iova, address: first, attributes: self.attributes })
    }
}

/// Whether a device could not tell the two apart. Whether somebody looked at a page is the guest's business.
pub(in crate::sync) fn alike(one: Option<Piece>, other: Option<Piece>) -> bool {
    let plain = |piece: Piece| Piece { attributes: piece.attributes.without(MARKS), ..piece };
    one.map(plain) == other.map(plain)
}

/// The kinds that were met.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    list: Vec<Kind>,
    numbers: HashMap<Kind, u32>,
}

/// A bound on what a guest can make the host keep.
const MOST: usize = 1 << 16;
/// Kinds that are tried before the map.
const FIRST: usize = 8;

impl Kinds {
    /// The number of a kind; none if there are too many.
    #[inline]
    pub(super) fn number(&mut self, kind: Kind) -> Option<u32> {
        if let Some(number) = self.list.iter().take(FIRST).position(|known| *known == kind) {
            return Some(number as u32);
        }
        if let Some(number) = self.numbers.get(&kind) {
            return Some(*number);
        }
        if self.list.len() >= MOST {
            return None;
        }
        let number = self.list.len() as u32;
        self.list.push(kind);
        self.numbers.insert(kind, number);
        Some(number)
    }

    pub(super) fn get(&self, number: u32) -> Option<&Kind> {
        self.list.get(number as usize)
    }
}
