//! What a conversion could not say in the target format.

use std::fmt;

use crate::table::leaves::Piece;
use crate::{Access, Attributes};

/// Something that the target format cannot say. The first group is refused (not mapped at all), the second narrowed (mapped with less).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Loss {
    /// The IOVA is beyond the target's input range, or one that its units never look up for such requests, like those of interrupts.
    InputRange,
    /// The target cannot reach the address: it has more bits than the target's output, or is not in memory that the kernel knows.
    OutputRange,
    /// Smaller than, or not aligned to, the target's smallest page.
    Granule,
    /// Reading or writing, as mapped, cannot be said without allowing more: write-only, privileged-only.
    Permission,
    /// Execution was allowed and is not any more.
    Execute,
    /// The memory type is not part of the target's entries.
    MemoryType,
    /// Snooping is not part of the target's entries.
    Coherent,
    /// Clean and dirty cannot be told apart: the first write is not marked.
    DirtyTracking,
    /// The source does not look at some bits of an IOVA (a tag in the top byte); in the target, IOVAs with other values of these bits fault. Counted are
    /// the mappings that had such aliases, once each, also those that are refused for another reason.
    Tagged,
}

impl Loss {
    /// All losses, refused ones first.
    pub const ALL: [Self; 9] = [
        Self::InputRange,
        Self::OutputRange,
        Self::Granule,
        Self::Permission,
        Self::Execute,
        Self::MemoryType,
        Self::Coherent,
        Self::DirtyTracking,
        Self::Tagged,
    ];

    /// Whether the mapping is left out, because having less of it would break the guest.
    #[must_use]
    pub const fn is_refused(self) -> bool {
        matches!(self, Self::InputRange | Self::OutputRange | Self::Granule | Self::Permission)
    }

    /// A short name with hyphens.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::InputRange => "input-range",
            Self::OutputRange => "output-range",
            Self::Granule => "granule",
            Self::Permission => "permission",
            Self::Execute => "execute",
            Self::MemoryType => "memory-type",
            Self::Coherent => "coherent",
            Self::DirtyTracking => "dirty-tracking",
            Self::Tagged => "tagged",
        }
    }

    /// One sentence in lower case.
    #[must_use]
    pub const fn describe(self) -> &'static str {
        match self {
            Self::InputRange => "the target does not translate these IOVAs",
            Self::OutputRange => "the target cannot reach the address",
            Self::Granule => "smaller than, or not aligned to, the target's smallest page",
            Self::Permission => "the target cannot say this permission without allowing more",
            Self::Execute => "execution was allowed and is not any more",
            Self::MemoryType => "the target's entries have no such memory type",
            Self::Coherent => "the target's entries do not say whether caches are snooped",
            Self::DirtyTracking => "the target does not mark the first write",
            Self::Tagged => "IOVAs with another tag reached the same and do not any more",
        }
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How often something was lost.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Runs of IOVAs, as they came from the source.
    pub pieces: u64,
    /// Bytes of IOVA space.
    pub bytes: u128,
    /// The first few.
    pub examples: Vec<Piece>,
}

impl Count {
    /// Counts a piece.
    pub(crate) fn add(&mut self, piece: Piece) {
        self.pieces += 1;
        self.bytes += u128::from(piece.iova.length_minus_one()) + 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(piece);
        }
    }
}

/// Examples that are kept of each loss.
const EXAMPLES: usize = 8;

/// All losses of a conversion, in the order of [`Loss::ALL`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses([Count; Loss::ALL.len()]);

impl Losses {
    #[inline]
    pub(crate) fn add(&mut self, loss: Loss, example: impl FnOnce() -> Piece, pieces: u64, bytes: u128) {
        let count = &mut self.0[loss as usize];
        count.pieces += pieces;
        count.bytes += bytes;
        if count.examples.len() < EXAMPLES {
            count.examples.push(example());
        }
    }

    /// Whether further examples of a loss would not be kept.
    pub(crate) fn has_examples(&self, loss: Loss) -> bool {
        self.0[loss as usize].examples.len() >= EXAMPLES
    }

    /// Adds what was counted elsewhere.
    pub(crate) fn add_count(&mut self, loss: Loss, other: &Count) {
        let count = &mut self.0[loss as usize];
        count.pieces += other.pieces;
        count.bytes += other.bytes;
        let room = EXAMPLES.saturating_sub(count.examples.len());
        count.examples.extend(other.examples.iter().take(room).copied());
    }

    /// What was lost, refused first.
    pub fn iter(&self) -> impl Iterator<Item = (Loss, &Count)> {
        Loss::ALL.into_iter().zip(&self.0).filter(|(_, count)| count.pieces > 0)
    }

    /// Nothing was lost.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }

    /// What was lost of `loss`.
    #[must_use]
    pub fn get(&self, loss: Loss) -> Option<&Count> {
        Some(&self.0[loss as usize]).filter(|count| count.pieces > 0)
    }

    /// Bytes of IOVA space that are not mapped in the target although they were in the source.
    #[must_use]
    pub fn refused_bytes(&self) -> u128 {
        self.iter().filter(|(loss, _)| loss.is_refused()).map(|(_, count)| count.bytes).sum()
    }
}

/// What `granted` lacks of `asked`, as narrowed losses; none if reading or writing would be lost or anything widened.
pub(crate) fn narrowed(asked: Attributes, granted: Attributes) -> Option<Vec<Loss>> {
    let flag = |attributes: Attributes, flag| attributes.contains(flag);
    let access = |attributes: Attributes| -> Access { attributes.access(true) };
    if !granted.within(asked)
        || access(granted) != access(asked)
        || flag(granted, Attributes::PRIVILEGED_ONLY) != flag(asked, Attributes::PRIVILEGED_ONLY)
    {
        return None;
    }
    let mut losses = Vec::new();
    if flag(asked, Attributes::EXECUTE) && !flag(granted, Attributes::EXECUTE) {
        losses.push(Loss::Execute);
    }
    if asked.memory_type() != granted.memory_type() {
        losses.push(Loss::MemoryType);
    }
    if flag(asked, Attributes::COHERENT) != flag(granted, Attributes::COHERENT) && asked.memory_type() == granted.memory_type() {
        losses.push(Loss::Coherent);
    }
    if flag(asked, Attributes::WRITABLE_WHEN_DIRTY) && !flag(granted, Attributes::WRITABLE_WHEN_DIRTY) {
        losses.push(Loss::DirtyTracking);
    }
    Some(losses)
}
