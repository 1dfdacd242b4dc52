//! Mappings that the VMM makes, in an address space of the kernel's: one call maps in the tables of all units that devices of the IOASID are behind, or in none.

use std::collections::BTreeMap;

use super::context::Inner;
use super::record::{Log, lock};
use super::{Error, Property, Refusal};
use crate::kernel::handle::Ioas;
use crate::kernel::{CopyRange, Errno, Map, MapFlags};
use crate::memory::MemoryMap;
use crate::table::Piece;
use crate::{Access, Attributes, Change, Gpa, Iova, Span};

/// What a mapping leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// Guest memory, from this address on. It is pinned once, however many mappings lead there.
    Guest(Gpa),
    /// Memory of this process, from this address on. It stays mapped there as long as the mapping lives.
    User(u64),
}

/// A mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) last: u64,
    pub(super) target: Target,
    pub(super) access: Access,
}

/// An address space of the kernel's, and what is in it.
#[derive(Debug)]
pub(super) struct Managed {
    mappings: BTreeMap<u64, Mapping>,
    limit: usize,
    /// Where mappings that go count as written, while somebody wants to know.
    written: Option<Log>,
    ioas: Ioas,
}

fn length(span: Span) -> u64 {
    span.length_minus_one().saturating_add(1)
}

pub(super) fn flags(access: Access) -> MapFlags {
    let of = |wanted, flag| if wanted { flag } else { MapFlags::NONE };
    of(access.read, MapFlags::READABLE) | of(access.write, MapFlags::WRITEABLE)
}

impl Managed {
    pub(super) fn new(context: &Inner, limit: usize) -> Result<Self, Error> {
        let ioas = Ioas::alloc(context.kernel()).map_err(Error::kernel("making an address space"))?;
        Ok(Self { mappings: BTreeMap::new(), limit, written: None, ioas })
    }

    pub(super) const fn ioas(&self) -> &Ioas {
        &self.ioas
    }

    /// Mappings that go are to be told there.
    pub(super) fn keep_in(&mut self, written: Option<Log>) {
        self.written = written;
    }

    /// By first IOVA.
    pub(super) const fn mappings(&self) -> &BTreeMap<u64, Mapping> {
        &self.mappings
    }

    fn overlap(&self, span: Span) -> Option<Span> {
        let (first, mapping) = self.mappings.range(..=span.last).next_back()?;
        (mapping.last >= span.first).then_some(Span { first: *first, last: mapping.last })
    }

    /// Maps in all tables or in none.
    pub(super) fn map(&mut self, context: &Inner, span: Span, target: Target, access: Access) -> Result<(), Error> {
        if span.is_none() {
            return Err(Refusal::new(Property::Iova, format!("{span} ends before it begins")).into());
        }
        if self.mappings.len() >= self.limit {
            return Err(Refusal::new(Property::Limit, format!("the address space has {} mappings already", self.limit)).into());
        }
        if self.overlap(span).is_some() {
            return Err(Error::Mapped(span));
        }
        self.put(context, span, target, access)?;
        self.mappings.insert(span.first, Mapping { last: span.last, target, access });
        Ok(())
    }

    /// Tells the kernel of a mapping.
    fn put(&self, context: &Inner, span: Span, target: Target, access: Access) -> Result<(), Error> {
        let (iova, length) = (Some(Iova(span.first)), length(span));
        match target {
            Target::Guest(gpa) => {
                let beyond = gpa.0.checked_add(span.length_minus_one()).and_then(|last| Span::new(gpa.0, last));
                let memory = beyond.ok_or(Error::NotMemory(Span { first: gpa.0, last: u64::MAX }))?;
                // What is going may still be known to the kernel.
                if context.memory().map().target(memory.first).is_none_or(|target| target.last < memory.last) {
                    return Err(Error::NotMemory(memory));
                }
                let request = CopyRange {
                    flags: flags(access),
                    destination: self.ioas.id(),
                    destination_iova: iova,
                    source: context.pins().ioas().id(),
                    source_iova: Iova(gpa.0),
                    length,
                };
                context.kernel().ioas_copy(&request).map_err(|errno| match errno {
                    Errno::ENOENT => Error::NotMemory(memory),
                    errno => Error::kernel("mapping guest memory")(errno),
                })?;
            }
            Target::User(user_address) => {
                let map = Map { flags: flags(access), iova, user_address, length };
                context.kernel().ioas_map(self.ioas.id(), &map).map_err(Error::kernel("mapping memory"))?;
            }
        }
        Ok(())
    }

    /// Unmaps all mappings in `span`, none of which may be cut, in all tables or in none; how many.
    pub(super) fn unmap(&mut self, context: &Inner, span: Span) -> Result<u64, Error> {
        let before = self.mappings.range(..span.first).next_back().filter(|(_, mapping)| mapping.last >= span.first);
        let inside: Vec<(u64, u64)> = self.mappings.range(span.first..=span.last).map(|(first, mapping)| (*first, mapping.last)).collect();
        if before.is_some() || inside.last().is_none_or(|(_, last)| *last > span.last) {
            return Err(Error::NotMapped(span));
        }
        if let (Some((first, _)), Some((_, last))) = (inside.first(), inside.last())
            && let Err(errno) = self.take(Span { first: *first, last: *last })
        {
            // A kernel may have come half-way, and what it removed is recorded no more.
            inside.iter().for_each(|(first, _)| {
                self.note_written(*first);
                self.restore(context, *first);
            });
            return Err(Error::kernel("unmapping")(errno));
        }
        for (first, _) in &inside {
            self.note_written(*first);
            self.mappings.remove(first);
        }
        Ok(inside.len() as u64)
    }

    /// What the kernel has in a span goes, from the tables of all units.
    fn take(&self, span: Span) -> Result<(), Errno> {
        self.ioas.kernel().ioas_unmap(self.ioas.id(), Iova(span.first), length(span)).map(drop)
    }

    /// A mapping goes. The kernel does not say what was written before it unmapped.
    fn note_written(&self, first: u64) {
        if let (Some(mapping), Some(written)) = (self.mappings.get(&first), &self.written)
            && let (Target::Guest(gpa), true) = (mapping.target, mapping.access.write)
        {
            lock(written).add(Span { first: gpa.0, last: gpa.0 + (mapping.last - first) });
        }
    }

    /// A mapping is there again after a call that may have removed it. Where it can neither be there nor be known to be gone, it stays known.
    fn restore(&mut self, context: &Inner, first: u64) {
        let Some(Mapping { last, target, access }) = self.mappings.get(&first).copied() else { return };
        let span = Span { first, last };
        let restored = self.put(context, span, target, access);
        let is_there = matches!(restored, Ok(()) | Err(Error::Kernel { errno: Errno::EEXIST, .. }));
        if !is_there && matches!(self.take(span), Ok(()) | Err(Errno::ENOENT)) {
            tracing::error!(%span, "a mapping that was to stay is gone, because calls of the kernel failed");
            self.mappings.remove(&first);
        }
    }

    /// Unmaps what leads to guest memory that is not in `map`, whole, as far as the kernel does; what that was is added to `lost`. The first error.
    pub(super) fn memory_changed(&mut self, map: &MemoryMap, lost: &mut Vec<Change>) -> Result<(), Error> {
        let leads = |first: u64, mapping: &Mapping| match mapping.target {
            Target::User(_) => false,
            Target::Guest(gpa) => {
                let last = gpa.0.saturating_add(mapping.last - first);
                map.target(gpa.0).is_none_or(|target| target.last < last)
            }
        };
        let span = |(first, mapping): (&u64, &Mapping)| leads(*first, mapping).then_some(Span { first: *first, last: mapping.last });
        let mut result = Ok(());
        for span in self.mappings.iter().filter_map(span).collect::<Vec<Span>>() {
            match self.take(span) {
                Ok(()) => {
                    self.mappings.remove(&span.first);
                    lost.push(Change::Unmap(span));
                }
                Err(errno) => result = result.and(Err(Error::kernel("unmapping memory that went")(errno))),
            }
        }
        result
    }

    /// What lookups in software have of them: mappings of guest memory.
    pub(super) fn pieces(&self) -> impl Iterator<Item = Change> + '_ {
        self.mappings.iter().filter_map(|(first, mapping)| Some(Change::Map(piece(*first, mapping)?)))
    }
}

pub(super) fn piece(first: u64, mapping: &Mapping) -> Option<Piece> {
    let Target::Guest(gpa) = mapping.target else { return None };
    let of = |wanted, flag| if wanted { flag } else { Attributes::none() };
    let attributes = of(mapping.access.read, Attributes::READ).with(of(mapping.access.write, Attributes::WRITE)).with(Attributes::COHERENT);
    Some(Piece { iova: Span { first, last: mapping.last }, address: gpa.0, attributes })
}
