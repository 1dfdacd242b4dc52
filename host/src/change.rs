//! What changes in an address space, whoever says so: a guest that asks for it, or somebody who looks at its tables again.

use crate::Span;
use crate::table::Piece;

/// One change of an address space.
///
/// Changes are told in the order in which they are to be made. What one request or one look causes is one batch: it is made whole or not at all, within a
/// batch each IOVA is first unmapped and then mapped, and unmaps as well as maps come in ascending order of IOVA.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// These IOVAs are mapped now. Nothing was mapped at any of them.
    Map(Piece),
    /// Nothing is mapped at these IOVAs (`first..=last`) any more. They are exactly those of one piece that was mapped before, never a part of it: where areas
    /// can only be unmapped as they were mapped, it is one such area.
    Unmap(Span),
}

impl Change {
    /// The IOVAs that it concerns, inclusive.
    #[must_use]
    pub const fn span(&self) -> Span {
        match self {
            Self::Map(piece) => piece.iova,
            Self::Unmap(span) => *span,
        }
    }
}
