//! Kinds of leaves: what a format said about a leaf's pattern, by number.

use std::collections::HashMap;

use crate::memory::Budget;
use crate::sync::changes::Reason;
use crate::sync::shadow::Shadow;
use crate::table::{JudgeError, LevelPlan, Meaning, Missing, Piece, low_bits};
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

/// What a format said about an entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) meaning: Meaning,
    pub(super) shape: Option<u8>,
    /// The entry was looked at as a whole.
    pub(super) whole: bool,
    /// All entries with this pattern are meant: `entry & mask == pattern`.
    pub(super) mask: u64,
    pub(super) pattern: u64,
}

impl Shadow {
    /// What the format says, or said, about an entry.
    #[inline]
    pub(super) fn meaning(&mut self, level: u8, inherited: u64, entry: u64, budget: &Budget) -> Result<Asked, Reason> {
        let reason = |error: JudgeError| match error {
            JudgeError::Exhausted(_) => Reason::Questions,
            JudgeError::Format(_) => Reason::Format,
        };
        let known = self.judge.judge(&self.plan.levels[usize::from(level)], level, inherited, entry, budget).map_err(reason)?;
        let whole = known.meaning == Meaning::WholeEntry;
        let meaning = if whole { self.judge.judge_whole(level, inherited, entry, budget).map_err(reason)? } else { known.meaning };
        Ok(Asked { meaning, shape: known.shape, whole, mask: known.mask, pattern: known.pattern })
    }

    /// The number of the kind of leaf that an entry is; none if it is none, or there are too many kinds.
    #[inline]
    pub(super) fn leaf(&mut self, asked: Asked) -> Option<u32> {
        let (size_log2, attributes, missing) = match asked.meaning {
            Meaning::Leaf { size_log2, attributes } => (size_log2, attributes, NOTHING_MISSING),
            Meaning::Part { size_log2, attributes, missing } => (size_log2, attributes, missing),
            _ => return None,
        };
        // Where all requests count as privileged, pages for privileged requests are for all.
        let attributes = if self.plan.geometry.privileged { attributes.without(Attributes::PRIVILEGED_ONLY) } else { attributes };
        self.kinds.number(Kind { shape: asked.shape, whole: asked.whole, size_log2, attributes, missing })
    }
}

impl Kind {
    /// What the part of a slot shows of the leaf in it, before anybody asked which of that exists. None: requests fault.
    #[inline]
    pub(super) fn piece(&self, level: &LevelPlan, part: Span, entry: u64, output: Span) -> Option<Piece> {
        let below = low_bits(self.size_log2);
        let address = level.field(self.shape).extract(entry);
        let address = if self.whole { address & !below } else { address };
        if self.size_log2 < level.index_lsb || address & below != 0 || address > output.last {
            return None;
        }
        let here = if self.missing == NOTHING_MISSING { part } else { self.shown(part)? };
        let first = address | (here.first & below);
        let room = output.last.checked_sub(first)?;
        let iova = Span { first: here.first, last: here.last.min(here.first.saturating_add(room)) };
        Some(Piece { iova, address: first, attributes: self.attributes })
    }

    /// What a leaf shows of a part of its slot that does not show all of its bytes.
    fn shown(&self, part: Span) -> Option<Span> {
        let below = low_bits(self.size_log2);
        let base = part.first & !below;
        let shown = Span::new(base.saturating_add(self.missing.front.into()), (base | below).saturating_sub(self.missing.back.into()));
        shown?.intersection(part)
    }
}

/// Whether it makes no difference to a device that the one became the other. That somebody looked at a page does not; that the guest wants to know of the next time does.
#[inline]
pub(in crate::sync) fn alike(before: Option<Piece>, after: Option<Piece>) -> bool {
    let plain = |piece: Piece| Piece { attributes: piece.attributes.without(MARKS), ..piece };
    let taken = |piece: Piece, after: Piece| piece.attributes.contains(MARKS) && !after.attributes.contains(MARKS);
    before.map(plain) == after.map(plain) && !before.zip(after).is_some_and(|(before, after)| taken(before, after))
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
