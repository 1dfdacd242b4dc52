//! `vm_memory`'s `Iommu` over a lookup.
//!
//! That trait wants its answers in an `Iotlb`, a map of ranges behind a lock in its own example. Here each access gets a map of its own with what the lookup said
//! for this access and nothing else: nothing is shared, so nothing is locked.

use std::fmt;
use std::ops::Deref;

use vm_memory::iommu::{Error, IotlbIterator, IovaRange};
use vm_memory::{GuestAddress, Iommu, Iotlb, Permissions};

use super::Lookup;
use crate::table::Piece;
use crate::{Access, Iova, Span};

/// Fragments of one access, unless the caller says otherwise: 256 MiB of scattered 4 KiB pages.
const MOST_FRAGMENTS: usize = 1 << 16;

/// An access that the lookup does not allow as it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Miss {
    /// From the first IOVA that failed to the last of the access. Not all of it need have failed.
    pub iova: Span,
    /// What the device wants to do.
    pub access: Access,
    /// The first IOVA is mapped, but does not allow it.
    pub mapped: bool,
}

/// An IOMMU for `vm_memory::IommuMemory`: a [`Lookup`], and somebody who is asked about what it does not have.
///
/// The last byte of the 64-bit space cannot be accessed this way, since `vm_memory` has ranges with exclusive ends; that is an error, as is an access of more than
/// the most fragments.
pub struct LookupIommu<R> {
    lookup: Lookup,
    resolve: R,
    privileged: bool,
    most_fragments: usize,
}

/// What one access may use.
#[derive(Debug)]
pub struct Extents(Iotlb);

impl Deref for Extents {
    type Target = Iotlb;

    fn deref(&self) -> &Iotlb {
        &self.0
    }
}

impl<R: Fn(&Miss) -> Result<(), String> + Send + Sync> LookupIommu<R> {
    /// Accesses of an unprivileged device. `resolve` is asked at a miss, once for each access: it may walk the guest's tables and update the lookup, and says in
    /// words why it did not. Then the lookup is asked again, once.
    pub const fn new(lookup: Lookup, resolve: R) -> Self {
        Self { lookup, resolve, privileged: false, most_fragments: MOST_FRAGMENTS }
    }

    /// The same for a device whose requests are privileged.
    #[must_use]
    pub fn privileged(self) -> Self {
        Self { privileged: true, ..self }
    }

    /// The same, with at most so many fragments in one access: ranges of IOVAs that go to addresses which continue each other.
    #[must_use]
    pub fn with_most_fragments(self, most_fragments: usize) -> Self {
        Self { most_fragments, ..self }
    }

    /// What it looks up in.
    #[must_use]
    pub const fn lookup(&self) -> &Lookup {
        &self.lookup
    }

    /// All of an access, or the first thing that is in its way.
    fn gather(&self, iova: Span, access: Access) -> Result<Gathered, Miss> {
        let mut iotlb = Iotlb::new();
        let mut fragments = 1;
        let mut next = iova.first;
        let mut run: Option<Piece> = None;
        loop {
            let missed = |mapped| Miss { iova: Span { first: next, last: iova.last }, access, mapped };
            let piece = self.lookup.piece(Iova(next)).ok_or_else(|| missed(false))?;
            if !piece.attributes.access(self.privileged).allows(access) {
                return Err(missed(true));
            }
            let here = Span { first: next, last: piece.iova.last.min(iova.last) };
            let address = piece.address.wrapping_add(next - piece.iova.first);
            match &mut run {
                Some(run) if run.address.wrapping_add(next - run.iova.first) == address => run.iova.last = here.last,
                _ => {
                    if let Some(run) = run.replace(Piece { iova: here, address, ..piece }) {
                        fragments += 1;
                        if fragments > self.most_fragments {
                            return Ok(Gathered::TooMany);
                        }
                        insert(&mut iotlb, &run, access);
                    }
                }
            }
            if here.last == iova.last {
                run.iter().for_each(|run| insert(&mut iotlb, run, access));
                return Ok(Gathered::All(Extents(iotlb)));
            }
            next = here.last + 1;
        }
    }
}

enum Gathered {
    All(Extents),
    TooMany,
}

fn insert(iotlb: &mut Iotlb, run: &Piece, access: Access) {
    // The length fits, since it is no more than that of the access; and there is no error in this version of `vm_memory`: what is not inserted is a miss.
    let length = run.iova.length_minus_one() as usize + 1;
    drop(iotlb.set_mapping(GuestAddress(run.iova.first), GuestAddress(run.address), length, permissions(access)));
}

const fn permissions(access: Access) -> Permissions {
    match (access.read, access.write) {
        (false, false) => Permissions::No,
        (true, false) => Permissions::Read,
        (false, true) => Permissions::Write,
        (true, true) => Permissions::ReadWrite,
    }
}

fn cannot(base: u64, length: usize, reason: String) -> Error {
    Error::CannotResolve { iova_range: IovaRange { base: GuestAddress(base), length }, reason }
}

impl<R: Fn(&Miss) -> Result<(), String> + Send + Sync> Iommu for LookupIommu<R> {
    type IotlbGuard<'a>
        = Extents
    where
        Self: 'a;

    fn translate(&self, iova: GuestAddress, length: usize, access: Permissions) -> Result<IotlbIterator<Extents>, Error> {
        let failed = |reason: &str| cannot(iova.0, length, reason.to_owned());
        let Some(beyond) = iova.0.checked_add(length as u64) else {
            return Err(failed("it reaches the end of the 64-bit space"));
        };
        let wanted = Access { read: access.allow(Permissions::Read), write: access.has_write() };
        let extents = match Span::new(iova.0, beyond.wrapping_sub(1)).filter(|_| length > 0) {
            None => Extents(Iotlb::new()),
            Some(span) => {
                let gathered = self.gather(span, wanted).or_else(|miss| {
                    let refused = |miss: &Miss, reason| cannot(miss.iova.first, miss.iova.length_minus_one() as usize + 1, reason);
                    (self.resolve)(&miss).map_err(|reason| refused(&miss, reason))?;
                    let why = |miss: Miss| if miss.mapped { format!("{wanted} is not allowed") } else { "it is not mapped".to_owned() };
                    self.gather(span, wanted).map_err(|miss| refused(&miss, why(miss)))
                })?;
                match gathered {
                    Gathered::All(extents) => extents,
                    Gathered::TooMany => return Err(failed(&format!("more than {} fragments", self.most_fragments))),
                }
            }
        };
        Iotlb::lookup(extents, iova, length, access).map_err(|_| failed("its fragments do not fit together"))
    }
}

impl<R> fmt::Debug for LookupIommu<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LookupIommu").field("lookup", &self.lookup).field("privileged", &self.privileged).finish_non_exhaustive()
    }
}
