//! Leaves as a walk tells of them: runs of many that are alike, or one piece after the other.

use crate::table::geometry::AddressField;
use crate::{Attributes, Iova, Span};

/// One or two patterns of leaves, and perhaps the value of absent entries between them. The two are told apart by one bit, so that leaves of both, in any
/// order, are as fast as leaves of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kinds {
    patterns: [u64; 2],
    /// A bit in which the patterns differ; zero if there is one only.
    test: u64,
    attributes: [Attributes; 2],
    /// The absent entry, if there may be any.
    absent: u64,
    gaps: bool,
}

impl Kinds {
    pub(super) const fn one(pattern: u64, attributes: Attributes) -> Self {
        Self { patterns: [pattern; 2], test: 0, attributes: [attributes; 2], absent: 0, gaps: false }
    }

    pub(super) const fn with(self, pattern: u64, attributes: Attributes) -> Self {
        let difference = self.patterns[0] ^ pattern;
        Self {
            patterns: [self.patterns[0], pattern],
            test: difference & difference.wrapping_neg(),
            attributes: [self.attributes[0], attributes],
            ..self
        }
    }

    pub(super) const fn with_gaps(self, absent: u64) -> Self {
        Self { absent, gaps: true, ..self }
    }

    /// What leaves of the first and of the second kind allow; the same if there is one kind only.
    #[must_use]
    pub const fn attributes(&self) -> [Attributes; 2] {
        self.attributes
    }

    /// Whether there is one kind only, without gaps.
    #[must_use]
    pub const fn is_one(&self) -> bool {
        self.test == 0 && !self.gaps
    }

    /// The same kinds, with other attributes.
    #[must_use]
    pub fn map(self, change: impl Fn(Attributes) -> Attributes) -> Self {
        Self { attributes: self.attributes.map(change), ..self }
    }

    /// Whether an entry is absent.
    #[inline]
    #[must_use]
    pub const fn is_gap(&self, entry: u64) -> bool {
        self.gaps && entry == self.absent
    }

    /// Whether a leaf is of the second kind; anything for an absent entry.
    #[inline]
    #[must_use]
    pub const fn is_second(&self, entry: u64) -> bool {
        (entry ^ self.patterns[0]) & self.test != 0
    }

    pub(crate) const fn pattern(&self) -> u64 {
        self.patterns[0]
    }

    /// What an absent entry is, if there may be any.
    pub(crate) const fn gap(&self) -> u64 {
        self.absent
    }

    /// The bit that tells the second kind from the first.
    pub(crate) const fn test(&self) -> u64 {
        self.test
    }

    /// The bits in which the patterns differ.
    pub(crate) const fn difference(&self) -> u64 {
        self.patterns[0] ^ self.patterns[1]
    }

    /// That bit, if the patterns differ in no other.
    #[inline]
    pub(crate) const fn only_difference(&self) -> u64 {
        if self.patterns[0] ^ self.patterns[1] == self.test { self.test } else { 0 }
    }

    pub(super) const fn without_gaps(self) -> Self {
        Self { gaps: false, ..self }
    }

    /// The first kind alone.
    pub(super) const fn first(self) -> Self {
        Self::one(self.patterns[0], self.attributes[0])
    }

    /// Zero for a leaf of one of these kinds.
    #[inline]
    pub(crate) const fn leaf_distance(&self, entry: u64, mask: u64) -> u64 {
        (entry ^ if self.is_second(entry) { self.patterns[1] } else { self.patterns[0] }) & mask
    }

    /// The same, and for an absent entry.
    #[inline]
    pub(crate) const fn distance(&self, entry: u64, mask: u64) -> u64 {
        if self.is_gap(entry) { 0 } else { self.leaf_distance(entry, mask) }
    }

    pub(crate) const fn has_gaps(&self) -> bool {
        self.gaps
    }

    /// What a leaf allows that is of one of these kinds.
    #[inline]
    #[must_use]
    pub const fn of(&self, entry: u64) -> Attributes {
        self.attributes[self.is_second(entry) as usize]
    }
}

/// Leaves of one or two kinds and of one size, side by side, perhaps with absent entries between them; their targets are in guest memory and aligned. The first
/// and the last entry are leaves. Of leaves that fill several slots with the same entry, that is here once.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// IOVA of the first.
    pub iova: Iova,
    /// Each maps `2^size_log2` bytes.
    pub size_log2: u8,
    /// The entries, in native byte order.
    pub entries: &'a [u64],
    /// Where their addresses are.
    pub field: &'a AddressField,
    /// What they allow.
    pub kinds: Kinds,
    /// Every target lies in this span.
    pub within: Span,
}

impl Run<'_> {
    /// The leaves one by one.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.entries.iter().enumerate().filter(|(_, entry)| !self.kinds.is_gap(**entry)).map(|(index, entry)| Piece {
            iova: Span::of_log2(self.iova.0 + ((index as u64) << self.size_log2), self.size_log2),
            address: self.field.extract(*entry),
            attributes: self.kinds.of(*entry),
        })
    }
}

/// A part of a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The IOVAs.
    pub iova: Span,
    /// Where the first of them goes.
    pub address: u64,
    /// What it allows.
    pub attributes: Attributes,
}

impl Piece {
    /// What is at some of its IOVAs.
    #[must_use]
    pub(crate) const fn part(&self, iova: Span) -> Self {
        Self { iova, address: self.address.wrapping_add(iova.first - self.iova.first), attributes: self.attributes }
    }

    /// What is at those of its IOVAs that lie in `span`, if any do.
    #[must_use]
    pub(crate) fn within(&self, span: Span) -> Option<Self> {
        Some(self.part(self.iova.intersection(span)?))
    }
}
