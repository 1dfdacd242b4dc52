//! Addresses as newtypes, and inclusive ranges of them.

use std::fmt;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }

        impl From<u64> for $name {
            fn from(value: u64) -> Self {
                Self(value)
            }
        }
    };
}

address! {
    /// An I/O virtual address, in bytes: what a device puts on the bus.
    Iova
}
address! {
    /// A guest-physical address, in bytes.
    Gpa
}

/// Addresses `first..=last`. Never empty, and able to reach the last byte of the 64-bit space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    /// Lowest address.
    pub first: u64,
    /// Highest address.
    pub last: u64,
}

impl Span {
    /// All 64-bit addresses.
    pub const ALL: Self = Self { first: 0, last: u64::MAX };

    /// `first..=last`, unless that is empty.
    #[inline]
    #[must_use]
    pub const fn new(first: u64, last: u64) -> Option<Self> {
        if first <= last { Some(Self { first, last }) } else { None }
    }

    /// `2^size_log2` bytes from `first`; cut at the end of the 64-bit space.
    #[inline]
    #[must_use]
    pub const fn of_log2(first: u64, size_log2: u8) -> Self {
        let mask = if size_log2 >= 64 { u64::MAX } else { (1 << size_log2) - 1 };
        Self { first, last: first.saturating_add(mask) }
    }

    /// Whether `address` lies within.
    #[inline]
    #[must_use]
    pub const fn contains(self, address: u64) -> bool {
        self.first <= address && address <= self.last
    }

    /// What both have in common.
    #[inline]
    #[must_use]
    pub const fn intersection(self, other: Self) -> Option<Self> {
        let first = if self.first > other.first { self.first } else { other.first };
        let last = if self.last < other.last { self.last } else { other.last };
        Self::new(first, last)
    }

    /// Whether its last address is before its first: no span, but a caller may have computed it so.
    pub(crate) const fn is_none(self) -> bool {
        self.first > self.last
    }

    /// All addresses, if its last is before its first: whoever computed that may have gone beyond the last address that there is.
    pub(crate) const fn or_all(self) -> Self {
        if self.is_none() { Self::ALL } else { self }
    }

    /// Bytes, minus one: the whole 64-bit space is expressible.
    #[inline]
    #[must_use]
    pub const fn length_minus_one(self) -> u64 {
        self.last - self.first
    }
}

/// Cuts `span` at the borders of `holes`, which are sorted and do not overlap: in ascending order, whether a part is in none of them, and the part.
pub(crate) fn cut(holes: &[Span], span: Span) -> impl Iterator<Item = (bool, Span)> + '_ {
    let mut next = Some(span.first);
    std::iter::from_fn(move || {
        let first = next.filter(|first| *first <= span.last)?;
        let (outside, last) = match holes.iter().find(|hole| hole.last >= first) {
            Some(hole) if hole.first <= first => (false, hole.last),
            Some(hole) => (true, hole.first - 1),
            None => (true, u64::MAX),
        };
        let last = last.min(span.last);
        next = last.checked_add(1);
        Some((outside, Span { first, last }))
    })
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first, self.last)
    }
}
