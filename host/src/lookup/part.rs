//! Pages of which only parts are mapped, or that go to addresses that begin elsewhere in a page: a list of exact spans, in place of the page's mapping.
//!
//! A list takes the words of a node. It is never changed once readers can find it: a change makes another one.

use super::word::{ABOUT, PAGE_BITS, SLOTS};
use crate::{Attributes, Span};

/// Parts of one page that a list has room for.
pub(super) const MOST_PARTS: usize = SLOTS / 2;

const OFFSET: u64 = (1 << PAGE_BITS) - 1;

/// A part of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// Which bytes of the page.
    pub bytes: Span,
    /// Where the first of them goes.
    pub address: u64,
    /// What it allows.
    pub attributes: Attributes,
}

impl Part {
    /// The two words of a part.
    fn words(&self) -> [u64; 2] {
        [self.bytes.first | self.bytes.last << PAGE_BITS | self.attributes.bits() << (2 * PAGE_BITS), self.address]
    }

    /// The part that two words are.
    fn read(words: [u64; 2]) -> Option<Self> {
        let bytes = Span::new(words[0] & OFFSET, words[0] >> PAGE_BITS & OFFSET)?;
        Some(Self { bytes, address: words[1], attributes: Attributes::from_bits(words[0] >> (2 * PAGE_BITS))? })
    }

    /// What is left of it outside of `cut`.
    fn without(self, cut: Span) -> impl Iterator<Item = Self> {
        let before = cut.first.checked_sub(1).and_then(|last| self.bytes.intersection(Span { first: 0, last }));
        let after = cut.last.checked_add(1).and_then(|first| self.bytes.intersection(Span { first, last: u64::MAX }));
        let within = move |bytes: Span| Self { bytes, address: self.address.wrapping_add(bytes.first - self.bytes.first), ..self };
        before.into_iter().chain(after).map(within)
    }

    /// Whether `next` continues it.
    fn continues(&self, next: &Self) -> bool {
        self.bytes.last + 1 == next.bytes.first
            && self.attributes == next.attributes
            && self.address.wrapping_add(self.bytes.length_minus_one()).wrapping_add(1) == next.address
    }
}

/// The part that `offset` lies in, of the list whose words begin at `at`. `load` reads a word; none where there is none.
pub(super) fn find(load: impl Fn(usize) -> Option<u64>, at: usize, offset: u64) -> Option<Part> {
    let count = load(at + ABOUT)?.min(MOST_PARTS as u64) as usize;
    (0..count).filter_map(|part| Part::read([load(at + 2 * part)?, load(at + 2 * part + 1)?])).find(|part| part.bytes.contains(offset))
}

/// The first part that begins behind `offset`, of the same list: its first byte.
pub(super) fn next(load: impl Fn(usize) -> Option<u64>, at: usize, offset: u64) -> Option<u64> {
    let count = load(at + ABOUT)?.min(MOST_PARTS as u64) as usize;
    (0..count).filter_map(|part| load(at + 2 * part)).map(|word| word & OFFSET).find(|first| *first > offset)
}

/// All parts of a list.
pub(super) fn parts(words: &[u64]) -> Vec<Part> {
    let count = (words[ABOUT] as usize).min(MOST_PARTS);
    words.as_chunks::<2>().0.iter().take(count).filter_map(|words| Part::read(*words)).collect()
}

/// Fills a list's words; false if there are more parts than it has room for.
pub(super) fn fill(words: &mut [u64], parts: &[Part]) -> bool {
    if parts.len() > MOST_PARTS {
        return false;
    }
    for (words, part) in words.as_chunks_mut::<2>().0.iter_mut().zip(parts) {
        *words = part.words();
    }
    words[ABOUT] = parts.len() as u64;
    true
}

/// `parts` with `part`, or with nothing, at `bytes`; in ascending order, and those that continue each other joined.
pub(super) fn change(parts: &[Part], bytes: Span, part: Option<Part>) -> Vec<Part> {
    let mut changed: Vec<Part> = parts.iter().flat_map(|old| old.without(bytes)).chain(part).collect();
    changed.sort_by_key(|part| part.bytes);
    changed.dedup_by(|next, part| {
        let joined = part.continues(next);
        if joined {
            part.bytes.last = next.bytes.last;
        }
        joined
    });
    changed
}
