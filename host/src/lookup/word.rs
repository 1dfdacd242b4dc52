//! One word of the tree: what a slot holds, whole, so that a reader sees the old or the new and nothing between.
//!
//! | bits | of a mapping | of a link |
//! |---|---|---|
//! | 1:0 | kind | kind |
//! | 11:2 | attributes | zero |
//! | 63:12 | address of the slot's first byte | where the node's words begin |

use crate::{Attributes, Span};

/// Bits of a page: the smallest slot.
pub(super) const PAGE_BITS: u32 = 12;
/// Bits of an index into a node.
pub(super) const INDEX_BITS: u32 = 9;
/// Slots of a node.
pub(super) const SLOTS: usize = 1 << INDEX_BITS;
/// Words of a node: its slots, one word about the node, and some that are left over so that nodes begin at cache lines.
pub(super) const NODE: usize = SLOTS + 8;
/// Where the word about the node is: for a node of slots the IOVAs that it covers, for a list its length.
pub(super) const ABOUT: usize = SLOTS;
/// The highest level of nodes: 7 bits are left for it.
pub(super) const TOP: u32 = 5;

/// Nothing is mapped.
pub(super) const ABSENT: u64 = 0;

const KIND: u64 = 3;
const MAPPED: u64 = 1;
const NODE_LINK: u64 = 2;
const LIST_LINK: u64 = 3;
const PAGE_MASK: u64 = (1 << PAGE_BITS) - 1;

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// Nothing.
    Absent,
    /// All of the slot, to this address.
    Mapped(u64, Attributes),
    /// Smaller slots: where the words of their node begin.
    Node(usize),
    /// Parts of a page: where the words of their list begin.
    List(usize),
}

/// Bits of an IOVA below the index into a node of `level`.
pub(super) const fn shift(level: u32) -> u32 {
    PAGE_BITS + INDEX_BITS * level
}

/// The part of an IOVA above what a node at `level` covers.
pub(super) const fn prefix(iova: u64, level: u32) -> u64 {
    // In two steps, since the top level covers more than 64 bits.
    iova >> shift(level) >> INDEX_BITS
}

/// The IOVAs below a node of `level` with this prefix.
pub(super) const fn covered(level: u32, prefix: u64) -> Span {
    if level >= TOP {
        return Span::ALL;
    }
    let bits = shift(level) + INDEX_BITS;
    Span { first: prefix << bits, last: prefix << bits | ((1 << bits) - 1) }
}

/// Which slot of a node at `shift` is meant.
#[inline]
pub(super) const fn index(iova: u64, shift: u32) -> usize {
    (iova >> shift) as usize & (SLOTS - 1)
}

/// A mapping of a whole slot; `address` is a multiple of the page size.
pub(super) const fn mapped(address: u64, attributes: Attributes) -> u64 {
    address & !PAGE_MASK | attributes.bits() << 2 | MAPPED
}

/// A link to a node.
pub(super) const fn node(at: usize) -> u64 {
    (at as u64) << PAGE_BITS | NODE_LINK
}

/// A link to a list.
pub(super) const fn list(at: usize) -> u64 {
    (at as u64) << PAGE_BITS | LIST_LINK
}

/// Whether this is a link to a node, the only thing that a descent asks on its way.
#[inline]
pub(super) const fn is_node(word: u64) -> bool {
    word & KIND == NODE_LINK
}

/// Whether this is a mapping of a whole slot.
#[inline]
pub(super) const fn is_mapped(word: u64) -> bool {
    word & KIND == MAPPED
}

/// Address and attributes of a mapping. None for words that are none: only a reader that was overtaken sees such a word, and looks again.
#[inline]
pub(super) fn whole(word: u64) -> Option<(u64, Attributes)> {
    Some((word & !PAGE_MASK, Attributes::from_bits((word & PAGE_MASK) >> 2)?))
}

/// Where a link leads.
#[inline]
pub(super) const fn target(word: u64) -> usize {
    (word >> PAGE_BITS) as usize
}

/// What a word says.
#[inline]
pub(super) fn read(word: u64) -> Word {
    match word & KIND {
        MAPPED => whole(word).map_or(Word::Absent, |(address, attributes)| Word::Mapped(address, attributes)),
        NODE_LINK => Word::Node(target(word)),
        LIST_LINK => Word::List(target(word)),
        _ => Word::Absent,
    }
}
