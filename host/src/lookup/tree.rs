//! What readers see: words, and the way through them.
//!
//! A descent loads one word per level and ends at one that says all about its slot. Words of nodes that are not used any more are used again for others, and a
//! reader may still be on its way through them. So there is a generation: the writer counts it up before it writes the first word of a node that readers may know
//! as another one, and a reader that finds it changed looks again. It waits for nobody, and looks again only if in the meantime the writer used up its reserve
//! of unused nodes.
//!
//! Orderings: all words are stored with release and loaded with acquire. A reader that sees a word which was written after the count sees the count, too; one that
//! began with this count sees all unlinks that came before it, and finds no way to the nodes that were unlinked.

use std::sync::atomic::{AtomicU64, Ordering};

use super::part;
use super::word::{self, ABOUT, ABSENT, INDEX_BITS, PAGE_BITS, Word};
use crate::table::Piece;
use crate::{Attributes, Span};

/// Level of an empty tree's root: none.
const EMPTY: u64 = 7;

/// The words.
pub(super) struct Tree {
    words: Box<[AtomicU64]>,
    root: AtomicU64,
    generation: AtomicU64,
}

/// A level and a node's place as one word.
const fn root_word(root: Option<(u32, usize)>) -> u64 {
    match root {
        Some((level, at)) => (at as u64) << 3 | level as u64,
        None => EMPTY,
    }
}

/// Where a descent ended.
#[derive(Clone, Copy)]
struct Slot {
    word: u64,
    /// Bits of an IOVA within the slot.
    bits: u32,
}

impl Slot {
    /// Where `iova` goes, if this slot is mapped whole.
    #[inline]
    fn target(self, iova: u64) -> Option<(u64, Attributes)> {
        let (address, attributes) = word::whole(self.word)?;
        Some((address.wrapping_add(iova & ((1 << self.bits) - 1)), attributes))
    }

    /// The same, of all this slot.
    #[inline]
    fn piece(self, iova: u64) -> Option<Piece> {
        let (address, attributes) = word::whole(self.word)?;
        let within = (1_u64 << self.bits) - 1;
        Some(Piece { iova: Span { first: iova & !within, last: iova | within }, address, attributes })
    }
}

impl Tree {
    /// No mapping, and room for so many words. None if there is not so much memory.
    pub(super) fn new(words: usize) -> Option<Self> {
        // Zeroed by the system when they are touched.
        let words = bytemuck::allocation::try_zeroed_slice_box(words).ok()?;
        Some(Self { words, root: AtomicU64::new(EMPTY), generation: AtomicU64::new(0) })
    }

    /// A new value for a word.
    pub(super) fn publish(&self, at: usize, word: u64) {
        self.words[at].store(word, Ordering::Release);
    }

    /// A new root.
    pub(super) fn publish_root(&self, root: Option<(u32, usize)>) {
        self.root.store(root_word(root), Ordering::Release);
    }

    /// From here on, words are written that readers may know as others.
    pub(super) fn count_up(&self) {
        // There is one writer.
        self.generation.store(self.generation.load(Ordering::Relaxed).wrapping_add(1), Ordering::Release);
    }

    #[inline]
    fn load(&self, at: usize) -> Option<u64> {
        self.words.get(at).map(|word| word.load(Ordering::Acquire))
    }

    /// The slot that `iova` lies in, as far as it can be believed: [`Tree::consistent`].
    #[inline]
    fn descend(&self, iova: u64) -> Slot {
        let root = self.root.load(Ordering::Acquire);
        let nothing = Slot { word: ABSENT, bits: 0 };
        let (level, mut at) = ((root & EMPTY) as u32, (root >> 3) as usize);
        if level > word::TOP || self.load(at + ABOUT) != Some(word::prefix(iova, level)) {
            return nothing;
        }
        let mut bits = word::shift(level);
        loop {
            let Some(word) = self.load(at + word::index(iova, bits)) else { return nothing };
            if !word::is_node(word) {
                return Slot { word, bits };
            }
            // Below a page is no node: this reader was overtaken.
            if bits == PAGE_BITS {
                return nothing;
            }
            at = word::target(word);
            bits -= INDEX_BITS;
        }
    }

    /// Reads until nothing that was read belonged to a node which became another one meanwhile.
    #[inline]
    fn consistent<T>(&self, read: impl Fn() -> T) -> T {
        loop {
            let before = self.generation.load(Ordering::Acquire);
            let value = read();
            if self.generation.load(Ordering::Acquire) == before {
                return value;
            }
        }
    }

    /// The slot that `iova` lies in, if it is mapped whole and no node became another one meanwhile: nearly always.
    #[inline]
    fn whole(&self, iova: u64) -> Option<Slot> {
        let before = self.generation.load(Ordering::Acquire);
        let slot = self.descend(iova);
        (word::is_mapped(slot.word) && self.generation.load(Ordering::Acquire) == before).then_some(slot)
    }

    /// Where `iova` goes.
    #[inline]
    pub(super) fn find(&self, iova: u64) -> Option<(u64, Attributes)> {
        match self.whole(iova) {
            Some(slot) => slot.target(iova),
            None => self.find_rare(iova),
        }
    }

    #[cold]
    fn find_rare(&self, iova: u64) -> Option<(u64, Attributes)> {
        self.consistent(|| {
            let slot = self.descend(iova);
            match word::read(slot.word) {
                Word::Mapped(..) => slot.target(iova),
                Word::List(at) => self.find_part(at, iova),
                Word::Absent | Word::Node(_) => None,
            }
        })
    }

    fn find_part(&self, at: usize, iova: u64) -> Option<(u64, Attributes)> {
        let offset = iova & ((1 << PAGE_BITS) - 1);
        let part = part::find(|at| self.load(at), at, offset)?;
        Some((part.address.wrapping_add(offset - part.bytes.first), part.attributes))
    }

    /// The mapped slot, or part of a page, that `iova` lies in; what is mapped in one piece may be several of them. None if nothing is mapped there.
    #[inline]
    pub(super) fn piece(&self, iova: u64) -> Option<Piece> {
        match self.whole(iova) {
            Some(slot) => slot.piece(iova),
            None => self.piece_rare(iova),
        }
    }

    #[cold]
    fn piece_rare(&self, iova: u64) -> Option<Piece> {
        self.consistent(|| {
            let slot = self.descend(iova);
            match word::read(slot.word) {
                Word::Mapped(..) => slot.piece(iova),
                Word::List(at) => {
                    let page = iova & !((1 << PAGE_BITS) - 1);
                    let part = part::find(|at| self.load(at), at, iova - page)?;
                    let iova = Span { first: page + part.bytes.first, last: page + part.bytes.last };
                    Some(Piece { iova, address: part.address, attributes: part.attributes })
                }
                Word::Absent | Word::Node(_) => None,
            }
        })
    }

    /// The last IOVA before what the root covers, or the last of all, for one that the root does not cover.
    fn outside(&self, iova: u64) -> u64 {
        let root = self.root.load(Ordering::Acquire);
        let level = (root & EMPTY) as u32;
        let first = self.load((root >> 3) as usize + ABOUT).filter(|_| level <= word::TOP).map(|prefix| word::covered(level, prefix).first);
        first.filter(|first| iova < *first).map_or(u64::MAX, |first| first - 1)
    }

    /// The last IOVA of the hole that `iova` lies in, or an earlier one where one of the tree's slots ends. For an IOVA that is mapped: itself.
    pub(super) fn hole(&self, iova: u64) -> u64 {
        self.consistent(|| {
            let slot = self.descend(iova);
            match word::read(slot.word) {
                Word::Absent if slot.bits == 0 => self.outside(iova),
                Word::Absent => iova | ((1 << slot.bits) - 1),
                Word::List(at) => {
                    let offset = iova & ((1 << PAGE_BITS) - 1);
                    if part::find(|at| self.load(at), at, offset).is_some() {
                        return iova;
                    }
                    let last = part::next(|at| self.load(at), at, offset).map_or((1 << PAGE_BITS) - 1, |first| first - 1);
                    iova - offset + last
                }
                Word::Mapped(..) | Word::Node(_) => iova,
            }
        })
    }
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree").field("words", &self.words.len()).finish_non_exhaustive()
    }
}
