//! The host's side: what a vIOMMU needs of whoever owns the address spaces.

use std::fmt;

use super::PageResponse;
use crate::Gpa;
use crate::ioasid::HostEvents;
use crate::plugin::queue::{Invalidation, PageRequest};
use crate::plugin::{Direct, Requester, TableConfig};
use crate::sync::{self, Report, Watcher};
use crate::table::{Format, Intercept};

/// Where the DMA of a stream goes: streams for which this is equal share one address space.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// To guest-physical memory as it is.
    Bypass,
    /// The same for some addresses, at an offset or with less access.
    Direct(Direct),
    /// Where tables say.
    Tables {
        /// One table, or two of which the second translates the outputs of the first.
        tables: Vec<TableConfig>,
        /// Addresses that something else serves.
        intercepts: Vec<Intercept>,
    },
}

impl Way {
    /// The same with its formats open, for an address space that follows it.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn open<E>(&self, mut open: impl FnMut(&TableConfig) -> Result<Box<dyn Format>, E>) -> Result<sync::Way, E> {
        Ok(match self {
            Self::Bypass => sync::Way::bypass(),
            Self::Direct(direct) => sync::Way::direct(direct.windows.clone()).with_intercepts(direct.intercepts.clone()),
            Self::Tables { tables, intercepts } => {
                let way = match tables.as_slice() {
                    [] => sync::Way::blocked(),
                    [table] => sync::Way::table(open(table)?),
                    [first, second, ..] => sync::Way::tables(open(first)?, open(second)?),
                };
                way.with_intercepts(intercepts.clone())
            }
        })
    }

    /// The tables; none if there are none.
    #[must_use]
    pub fn tables(&self) -> &[TableConfig] {
        match self {
            Self::Tables { tables, .. } => tables,
            Self::Bypass | Self::Direct(_) => &[],
        }
    }
}

/// Whatever the host's side has to say.
type Source = Box<dyn std::error::Error + Send + Sync>;

/// The host's side refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// It refused, and nothing changed.
    #[error(transparent)]
    Refused(Source),
    /// The space may be out of step: nobody may use it.
    #[error("an address space may be out of step: {0}")]
    Stale(#[source] Source),
}

/// What memory that came or went did to one space, or why it is out of step.
pub type Told<I> = (I, Result<Report, HostError>);

/// Makes address spaces, keeps them in step, and attaches devices to them.
///
/// # Who calls
///
/// One vIOMMU, one call at a time. A requester is attached to at most one space; one that is attached to none is blocked.
///
/// # What an implementation promises
///
/// * A space that was allocated or switched is in step with the guest's tables as they were read during the call.
/// * [`AddressSpaces::attach`] replaces an attachment without a moment in which a page that translates alike in both does not translate.
/// * When [`AddressSpaces::switch`], [`AddressSpaces::invalidate`] or [`AddressSpaces::table_written`] return, no DMA uses what the guest took away in what they
///   mean, and the kernel was called at most once to invalidate.
/// * When [`AddressSpaces::attach`] or [`AddressSpaces::detach`] return without an error, no DMA of the requester uses the space before. Others than the requester stay
///   attached whatever these return, unless [`AddressSpaces::lost`] tells of them.
/// * After an error of [`AddressSpaces::invalidate`] or [`AddressSpaces::table_written`], and after [`HostError::Stale`] of any call, the vIOMMU detaches everybody
///   from the space and releases it. After any other error nothing changed.
/// * A page is watched, by the watcher that the space was given, before a table in it is read.
/// * When [`AddressSpaces::memory_changed`] returns without an error, or with [`HostError::Refused`], no DMA reaches memory that went.
pub trait AddressSpaces {
    /// Names an address space.
    type Id: Copy + Ord + fmt::Debug;

    /// What this side has to know of the guest's memory.
    type Memory;

    /// Makes an address space, with nothing attached; `opened` is `way` with its formats open.
    ///
    /// # Errors
    /// It cannot be had: a format that cannot be converted, no room.
    fn allocate(&mut self, way: &Way, opened: sync::Way, watcher: Box<dyn Watcher>) -> Result<(Self::Id, Report), HostError>;

    /// Drops an address space that nobody is attached to.
    fn release(&mut self, space: Self::Id);

    /// Attaches a requester, instead of whatever it was attached to. What was read for the first time because of that is reported.
    ///
    /// # Errors
    /// The requester's path cannot have it.
    fn attach(&mut self, requester: Requester, space: Self::Id) -> Result<Report, HostError>;

    /// Blocks a requester.
    ///
    /// # Errors
    /// It is still attached: somebody must stop the device.
    fn detach(&mut self, requester: Requester) -> Result<(), HostError>;

    /// The tables of all that are attached are these from now on. What translates alike before and after translates all the while.
    ///
    /// # Errors
    /// The new tables cannot be had, or the kernel refused.
    fn switch(&mut self, space: Self::Id, way: &Way, opened: sync::Way) -> Result<Report, HostError>;

    /// The guest's commands, of which all concern this space: their scopes name nobody.
    ///
    /// # Errors
    /// The kernel refused.
    fn invalidate(&mut self, space: Self::Id, invalidations: &[Invalidation]) -> Result<Report, HostError>;

    /// Guest memory was written that may hold tables of this space: `length` bytes from `address` on.
    ///
    /// # Errors
    /// The kernel refused.
    fn table_written(&mut self, space: Self::Id, address: Gpa, length: u64) -> Result<Report, HostError>;

    /// The guest's memory is this from now on: regions came, or went, or both. What that did to each space with tables.
    ///
    /// # Errors
    /// [`HostError::Refused`]: what came is not there for DMA, and what went is gone all the same. [`HostError::Stale`]: DMA may still reach what went; everybody is
    /// detached from all spaces.
    fn memory_changed(&mut self, memory: Self::Memory) -> Result<Vec<Told<Self::Id>>, HostError>;

    /// Requesters that a call detached although it was not about them, because the kernel failed while it made room for others, or when these went: each is told once.
    /// They are attached to nothing, and [`AddressSpaces::detach`] ends whatever else is kept of them. A call that is about everybody in a space says so by its
    /// error.
    fn lost(&mut self) -> Vec<Requester> {
        Vec::new()
    }

    /// The vIOMMU has looked at a device that was connected: of it, these requesters are attached. Whatever else of it is attached, from before this vIOMMU was made, is to
    /// be blocked.
    ///
    /// # Errors
    /// Something is still attached: somebody must stop the device.
    fn keep_only(&mut self, id: u64, attached: &[Requester]) -> Result<(), HostError> {
        let _ = (id, attached);
        Ok(())
    }

    /// Requests of devices that units refused, each once and at most so many, the others at the next call; none where nobody tells the host.
    ///
    /// # Errors
    /// The kernel could not be asked.
    fn host_events(&mut self, most: usize) -> Result<HostEvents, HostError> {
        let _ = most;
        Ok(HostEvents::default())
    }

    /// Page requests of devices that wait for an answer, each once; none where devices cannot ask.
    ///
    /// # Errors
    /// The kernel could not be asked.
    fn page_requests(&mut self) -> Result<Vec<PageRequest>, HostError> {
        Ok(Vec::new())
    }

    /// Answers to page requests, for the devices. Those that nobody waits for any more are passed over.
    ///
    /// # Errors
    /// The kernel could not be told.
    fn answer(&mut self, responses: &[PageResponse]) -> Result<(), HostError> {
        let _ = responses;
        Ok(())
    }
}
