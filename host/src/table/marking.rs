//! Marks that hardware has to set, and of which somebody else says whether it can: in the tables of a first stage, which a second stage maps.
//!
//! A mark is a write. Where the second stage lets the page with the entry be read and not written, hardware reports the second stage's permission fault at an
//! entry that lacks its mark, and goes on at one that has it (IHI 0070 section 3.13.5).

use crate::Attributes;
use crate::table::geometry::Geometry;
use crate::table::visit::Step;

/// What a leaf lacks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LeafMarks {
    /// Any request that uses it has it marked.
    pub(crate) accessed: bool,
    /// A write has it marked.
    pub(crate) dirty: bool,
}

impl LeafMarks {
    /// What a leaf with these attributes lacks, in a table of kind `level`.
    #[inline]
    pub(crate) fn of(geometry: &Geometry, level: u8, attributes: Attributes) -> Self {
        let Some(level) = geometry.levels.get(usize::from(level)) else { return Self::default() };
        Self {
            accessed: level.accessed.exists() && !attributes.contains(Attributes::ACCESSED),
            dirty: level.dirty.exists() && attributes.contains(Attributes::WRITABLE_WHEN_DIRTY),
        }
    }

    /// Whether it lacks nothing that any request would have marked.
    #[inline]
    pub(crate) const fn is_none(self) -> bool {
        !self.accessed && !self.dirty
    }
}

/// The entries on the way to the last of `path` that hardware has to mark.
#[inline]
pub(crate) fn unmarked<'a>(geometry: &'a Geometry, path: &'a [Step]) -> impl Iterator<Item = &'a Step> {
    let above = path.split_last().map_or(&[][..], |(_, above)| above);
    above.iter().filter(|step| {
        let level = geometry.levels.get(usize::from(step.level));
        step.entry.zip(level).is_some_and(|(entry, level)| level.table_accessed.is_missing(entry))
    })
}
