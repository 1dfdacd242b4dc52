//! Software lookups: where IOVAs go, for a VMM's own device models.
//!
//! [`Lookup`] answers for one address space, from any thread, without a lock and without waiting: a few loads that depend on each other. [`Updater`] is the one
//! writer and takes batches of [`Change`](crate::Change)s. [`LookupIommu`] puts both behind `vm_memory`'s `Iommu`, so that virtqueue code runs over `IommuMemory`.
//!
//! The tree has slots of a page, of 512 pages, of 512 times 512 and so on, and its root covers no more IOVAs than are used. A slot is one word that says all
//! about it. Parts of pages are kept to the byte.
//!
//! ```
//! use stagecraft::lookup::{Limits, Updater};
//! use stagecraft::table::Piece;
//! use stagecraft::{Attributes, Change, Gpa, Iova, Span};
//!
//! let (mut updater, lookup) = Updater::new(Limits::default())?;
//! let iova = Span { first: 0x1_0000, last: 0x1_ffff };
//! updater.apply(&[Change::Map(Piece { iova, address: 0x8000_0000, attributes: Attributes::READ })])?;
//! assert_eq!(lookup.find(Iova(0x1_2345)).map(|target| target.address), Some(Gpa(0x8000_2345)));
//! updater.apply(&[Change::Unmap(iova)])?;
//! assert_eq!(lookup.find(Iova(0x1_2345)), None);
//! # Ok::<(), stagecraft::lookup::LookupError>(())
//! ```

mod iommu;
mod nodes;
mod part;
#[cfg(test)]
mod tests;
mod tree;
mod update;
mod word;

use std::sync::Arc;

pub use iommu::{Extents, LookupIommu, Miss};
pub use update::Updater;

use crate::table::Piece;
use crate::{Attributes, Gpa, Iova, Span};

/// How much an address space may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Nodes of 4160 bytes, each twice: for the readers and for the writer. Scattered mappings take one node each, and up to five more above it.
    pub nodes: u32,
}

impl Default for Limits {
    /// 16,384 nodes: enough for 32 GiB of 4 KiB pages side by side.
    fn default() -> Self {
        Self { nodes: 1 << 14 }
    }
}

/// An address space cannot be made, or not changed as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// Too little memory for an address space.
    #[error("no memory for {nodes} nodes of a software lookup")]
    NoMemory {
        /// How many there should be.
        nodes: u32,
    },
    /// The limit is reached.
    #[error("no room for mappings at {span}: the software lookup has {limit} nodes already")]
    Full {
        /// What is not mapped, or not whole.
        span: Span,
        /// The limit.
        limit: u32,
    },
    /// A page has more parts than can be kept.
    #[error("the page {page} has more than {} parts", part::MOST_PARTS)]
    TooFine {
        /// The page. Nothing of it is mapped now.
        page: Span,
    },
}

/// Where an IOVA goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The address.
    pub address: Gpa,
    /// What is allowed there.
    pub attributes: Attributes,
}

/// Looks things up in an address space. Clones answer for the same one; any number of threads may use one of them.
#[derive(Clone, Debug)]
pub struct Lookup {
    tree: Arc<tree::Tree>,
}

impl Lookup {
    /// Where `iova` goes; none if nothing is mapped there. Whether the access is allowed is the caller's to compare.
    #[inline]
    #[must_use]
    pub fn find(&self, iova: Iova) -> Option<Target> {
        self.tree.find(iova.0).map(|(address, attributes)| Target { address: Gpa(address), attributes })
    }

    /// A mapping around `iova`: the whole of it, or the part that lies in one of this tree's slots. None if nothing is mapped there.
    #[inline]
    #[must_use]
    pub fn piece(&self, iova: Iova) -> Option<Piece> {
        self.tree.piece(iova.0)
    }

    /// What lies in `span`, in ascending order: pieces, and spans where nothing is mapped. Neighbours that continue each other may come as one or as several.
    /// Each of them was true at some moment; an [`Updater`] that works meanwhile may have changed the next before it is looked at.
    pub fn pieces(&self, span: Span) -> impl Iterator<Item = Result<Piece, Span>> + '_ {
        let mut next = Some(span.first);
        std::iter::from_fn(move || {
            let first = next?;
            let found = match self.piece(Iova(first)) {
                Some(piece) => Ok(piece.within(Span { first, last: span.last })?),
                None => Err(Span { first, last: self.tree.hole(first).min(span.last) }),
            };
            let last = found.map_or_else(|hole| hole.last, |piece| piece.iova.last);
            next = last.checked_add(1).filter(|next| *next <= span.last);
            Some(found)
        })
    }
}
