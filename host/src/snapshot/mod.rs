//! Snapshots: a guest's IOMMU registers and the pages that hold its structures, as a folder.
//!
//! `snapshot.json` and `pages.bin` of format version 1. Instead of `unit.registers` a snapshot may name the tables themselves (`tables`), as those that
//! were converted do, or list what a guest without tables asked for (`domains`); see [`Source`].

mod domains;
mod dump;
mod json;
mod memory;
mod place;
mod store;

use std::path::{Path, PathBuf};

use vm_memory::GuestRegionCollection;

use crate::memory::{Limits, MemoryMap};

pub use domains::{DomainEntry, Domains, store_domains};
pub use dump::Dump;
pub use memory::PageRegion;
pub use store::{Pages, store};

/// Guest memory of which only some pages are known.
pub type PageMemory = GuestRegionCollection<PageRegion>;

/// Named numbers: settings or registers, in the order given.
pub type Named = Vec<(String, u64)>;

/// A device of the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// What people call it: its PCI address.
    pub label: String,
    /// Requester id, StreamID or device id.
    pub id: u64,
}

/// What a requester uses, when the snapshot names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stream {
    /// A table: full format name and settings.
    Table {
        /// Full format name.
        format: String,
        /// Settings, the addresses of the roots among them.
        settings: Named,
    },
    /// No translation.
    Bypass,
    /// Every DMA is refused, with the reason.
    Blocked(String),
    /// The same, because nobody set anything up for the device.
    Unused(String),
}

/// A requester of a converted snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamEntry {
    /// The device's id.
    pub id: u64,
    /// The PASID, if the stream has one.
    pub pasid: Option<u32>,
    /// What it uses.
    pub stream: Stream,
}

/// Where the tables of a snapshot are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// An IOMMU's registers.
    Unit {
        /// Which IOMMU, such as `intel-vtd`.
        kind: String,
        /// Its registers, by architectural name.
        registers: Named,
    },
    /// The tables of each requester.
    Tables(Vec<StreamEntry>),
    /// No tables: what the guest asked for.
    Domains(Domains),
}

/// A guest, as a folder.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// For people.
    pub description: String,
    /// Where the tables are found.
    pub source: Source,
    /// Which guest-physical addresses exist.
    pub map: MemoryMap,
    /// The guest's devices, sorted by id.
    pub devices: Vec<Device>,
    /// The pages that are known.
    pub memory: PageMemory,
    /// How many 4 KiB pages that are.
    pub pages: u64,
}

/// A snapshot cannot be read or written. Each message is one line that names the file and the thing.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The operating system refused.
    #[error("{}: {error}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// The file says something that makes no sense.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What, and what would be right.
        what: String,
    },
    /// Something is there already.
    #[error("{} exists already; remove it or allow overwriting with --force", .0.display())]
    Exists(PathBuf),
}

impl SnapshotError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |error| Self::Io { path: path.to_owned(), error }
    }

    fn invalid(path: &Path, what: impl Into<String>) -> Self {
        Self::Invalid { path: path.to_owned(), what: what.into() }
    }
}

impl Snapshot {
    /// Limits for the work that this snapshot can cause, which follow from its size.
    #[must_use]
    pub fn limits(&self) -> Limits {
        let limits = Limits::for_pages(self.pages);
        let Source::Domains(domains) = &self.source else { return limits };
        // Each mapping may be there in as many parts as there is memory.
        let parts = domains.mappings().saturating_mul(self.map.targets().len() as u64 + 1);
        Limits { leaves: limits.leaves.max(parts), mappings: limits.mappings.max(parts), ..limits }
    }

    /// The device with this id.
    #[must_use]
    pub fn device(&self, id: u64) -> Option<&Device> {
        self.devices.binary_search_by_key(&id, |device| device.id).ok().and_then(|index| self.devices.get(index))
    }
}
