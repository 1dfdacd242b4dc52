//! From a unit's registers to the tables that a device uses.

use crate::{Error, TableConfig};

/// Reads guest memory on behalf of [`Unit::lookup`]; bounded by the host. Read a structure once, whole, and keep it.
pub trait GuestMemory {
    /// `length` bytes (at most 4,096) at a guest-physical address.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if any of it lies outside guest memory or the budget is spent.
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error>;

    /// The same for an address that `table` translates first, as stage 2 does for the structures of a nested stage 1.
    ///
    /// # Errors
    /// [`Error::Unreadable`] also if the translation faults or forbids reading.
    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error>;
}

/// Registers by their architectural names.
#[derive(Clone, Debug, Default)]
pub struct Registers(Vec<(String, u64)>);

impl Registers {
    /// The register `name`, if the host gave it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(n, _)| n == name).map(|&(_, value)| value)
    }

    /// The register `name`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not there.
    pub fn need(&self, name: &str) -> Result<u64, Error> {
        self.get(name).ok_or_else(|| Error::invalid(name, 0, "", "this register is needed and was not given"))
    }
}

impl FromIterator<(String, u64)> for Registers {
    fn from_iter<T: IntoIterator<Item = (String, u64)>>(registers: T) -> Self {
        Self(registers.into_iter().collect())
    }
}

/// Who asks: a requester id, StreamID or device id, and a PASID if the request has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requester {
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// PASID or SubstreamID; 20 bits.
    pub pasid: Option<u32>,
}

/// Every DMA of the requester is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// The event or fault reason of the architecture, such as `C_BAD_STE`.
    pub event: String,
    /// Document and section.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

impl Blocked {
    /// As an [`Outcome`].
    #[must_use]
    pub fn outcome(event: &str, section: &str, reason: &str) -> Outcome {
        Outcome::Blocked(Self { event: event.to_owned(), section: section.to_owned(), reason: reason.to_owned() })
    }
}

/// What a requester's DMA gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Guest-physical memory as it is.
    Bypass,
    /// Nothing.
    Blocked(Blocked),
    /// One table, or two of which the second translates the outputs of the first.
    Tables(Vec<TableConfig>),
}

/// A table format that a real unit accepts, with the limits of its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Full name of the table format.
    pub format: String,
    /// Setting, and its largest value (for a set of sizes: their sum).
    pub limits: Vec<(String, u64)>,
    /// What has to be so besides, for people: sentences in lower case without a full stop.
    pub conditions: Vec<String>,
}

/// How the kernel is told about a nested table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// An `iommu_hwpt_data_type`.
    pub kind: u32,
    /// Its bytes.
    pub data: Vec<u8>,
    /// The structure that must stand at the context address first; may be empty.
    pub context: Vec<u8>,
}

/// An IOMMU architecture's device structures.
pub trait Unit {
    /// What requests of `requester` get. What hardware would refuse in guest memory is [`Outcome::Blocked`].
    ///
    /// # Errors
    /// Registers that are missing or contradict each other.
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error>;

    /// The PASIDs with a valid context, ascending, at most 1,024, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Unit::lookup`].
    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error>;

    /// What a real unit with this `iommu_hw_info` (data type and bytes) accepts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kind is another architecture's, [`Error::Invalid`] if there are too few bytes.
    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error>;

    /// How the kernel is told about `table` when it is nested; `context_address` is where [`Binding::context`] would stand.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel has no nesting for this format.
    fn bind_data(table: &TableConfig, context_address: u64) -> Result<Binding, Error>;
}
