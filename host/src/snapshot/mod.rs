//! Snapshots: a guest's IOMMU registers and the pages that hold its structures, as a folder.
//!
//! `snapshot.json` and `pages.bin` of format version 1. Instead of `unit.registers` a snapshot may name the tables themselves (`tables`), as those that
//! were converted do; see [`Source`].

mod dump;
mod json;
mod memory;
mod store;

use std::path::{Path, PathBuf};

use vm_memory::GuestRegionCollection;

use crate::memory::MemoryMap;

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
    /// A table: full format name, and settings without the root, which stands beside them.
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
    /// The device with this id.
    #[must_use]
    pub fn device(&self, id: u64) -> Option<&Device> {
        self.devices.iter().find(|device| device.id == id)
    }
}
