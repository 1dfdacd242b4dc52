//! What can go wrong, and which property of a path or an address space says no.

use std::fmt;

use crate::Span;
use crate::kernel::Errno;
use crate::lookup::LookupError;
use crate::memory::MemoryMapError;
use crate::offers::OffersError;
use crate::pins::PinError;
use crate::plugin::{CallError, OpenFormatError, PluginsError, SuperviseError};
use crate::sync::{CommitError, LiveError};
use crate::table::{BuildError, OpenError, WalkError};

/// A property that two things that are to be joined do not have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Property {
    /// They are not of one context.
    Context,
    /// The device, or its PASID, is attached already, or is not.
    Attachment,
    /// The path has no strategy that the request allows.
    Strategy,
    /// The device is behind another unit, and what was made for the first one cannot serve it.
    Unit,
    /// The table's format, or a setting of it.
    Format,
    /// IOVAs that the device must not, or cannot, use.
    Iova,
    /// Requests with PASIDs.
    Pasid,
    /// Page requests, for recoverable faults.
    PageRequests,
    /// Recording which pages were written.
    DirtyTracking,
    /// Dropping what hardware cached of a table.
    Invalidation,
    /// What is in the address space: the call is for another kind.
    Kind,
    /// A limit of the context or the address space.
    Limit,
}

impl Property {
    /// Its name, for messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Context => "context",
            Self::Attachment => "attachment",
            Self::Strategy => "strategy",
            Self::Unit => "unit",
            Self::Format => "format",
            Self::Iova => "IOVA range",
            Self::Pasid => "PASID",
            Self::PageRequests => "page requests",
            Self::DirtyTracking => "dirty tracking",
            Self::Invalidation => "invalidation",
            Self::Kind => "kind",
            Self::Limit => "limit",
        }
    }
}

impl fmt::Display for Property {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A property says no.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{property}: {reason}")]
pub struct Refusal {
    /// Which.
    pub property: Property,
    /// Why, in one sentence in lower case without a full stop.
    pub reason: String,
}

impl Refusal {
    pub(super) fn new(property: Property, reason: impl Into<String>) -> Self {
        Self { property, reason: reason.into() }
    }
}

/// A call on a context, a device or an IOASID failed. Unless a variant says otherwise, nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Two things do not fit together.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel refused.
    #[error("{what}: {errno}")]
    Kernel {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        errno: Errno,
    },
    /// A plugin is not there, or not usable.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A plugin refused or failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A plugin failed before, and is not asked at the moment.
    #[error(transparent)]
    Supervised(SuperviseError),
    /// A unit's hardware information is not understood.
    #[error(transparent)]
    Offers(#[from] OffersError),
    /// The guest's tables cannot be read by their description.
    #[error("the guest's tables: {0}")]
    Open(#[from] OpenError),
    /// A host table cannot be made.
    #[error("the host's table: {0}")]
    Build(#[from] BuildError),
    /// The guest's tables could not be walked to the end.
    #[error(transparent)]
    Walk(#[from] WalkError),
    /// Software lookups.
    #[error(transparent)]
    Lookup(#[from] LookupError),
    /// The description of guest memory makes no sense.
    #[error(transparent)]
    Memory(#[from] MemoryMapError),
    /// Guest memory cannot be made known to the kernel, or not be taken back.
    #[error(transparent)]
    Pins(#[from] PinError),
    /// Host tables would stand where the guest has memory.
    #[error("guest memory at {memory} lies where host tables may stand, {tables}")]
    TableWindow {
        /// The region.
        memory: Span,
        /// The window for tables.
        tables: Span,
    },
    /// The device's caches could not be told what is gone. The tables are right; devices that might use what was taken away were detached and stay blocked until
    /// [`Ioasid::recover`](super::Ioasid::recover) succeeds, or they are attached anew.
    #[error("devices were detached: {0}")]
    Blocked(#[source] CommitError),
    /// Devices could neither be moved nor be put back: they were detached, and stay blocked until [`Ioasid::recover`](super::Ioasid::recover) succeeds.
    #[error("devices were detached, because they could be neither moved nor put back: {0}")]
    Detached(#[source] Box<Self>),
    /// Nothing of this kind is mapped there, or a mapping would be cut.
    #[error("no mapping is at {0} as a whole")]
    NotMapped(Span),
    /// Something is mapped there.
    #[error("{0} is mapped already, or a part of it")]
    Mapped(Span),
    /// Not guest memory, or not all of it.
    #[error("there is no guest memory at {0}, or not at all of it")]
    NotMemory(Span),
}

impl Error {
    pub(super) fn kernel(what: &'static str) -> impl FnOnce(Errno) -> Self {
        move |errno| Self::Kernel { what, errno }
    }
}

impl From<OpenFormatError> for Error {
    fn from(error: OpenFormatError) -> Self {
        match error {
            OpenFormatError::Plugins(error) => Self::Plugins(error),
            OpenFormatError::Supervised(SuperviseError::Call(error)) => Self::Call(error),
            OpenFormatError::Supervised(error) => Self::Supervised(error),
        }
    }
}

impl From<LiveError> for Error {
    fn from(error: LiveError) -> Self {
        match error {
            LiveError::Open(error) => Self::Open(error),
            LiveError::Commit(error) => Self::Blocked(error),
        }
    }
}
