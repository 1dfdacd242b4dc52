//! Fault reports, as a driver finds them in the event queue: Virtio 1.3 section 5.13.6.9.

use crate::Access;
use crate::table::{Cause, Fault, FaultKind};

/// Why a DMA failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Nothing that the others describe.
    Unknown = 0,
    /// The endpoint is attached to no domain.
    Domain = 1,
    /// Nothing is mapped there, or the mapping does not allow it.
    Mapping = 2,
}

/// One report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Report {
    /// Why.
    pub reason: Reason,
    /// The endpoint.
    pub endpoint: u32,
    /// What it tried.
    pub access: Access,
    /// The IOVA, if it is known.
    pub address: Option<u64>,
}

impl Report {
    /// Bytes of a report.
    pub const BYTES: usize = 24;

    const READ: u32 = 1;
    const WRITE: u32 = 1 << 1;
    const ADDRESS: u32 = 1 << 8;

    /// The report of a fault that the engine describes, met by an access of `endpoint` at `iova`.
    ///
    /// What the guest could have mapped and has not is a fault of the mapping. Everything else is the host's business (memory that is gone, a host table that
    /// is damaged) and has no reason of its own in the specification.
    #[must_use]
    pub const fn of(fault: &Fault, endpoint: u32, iova: u64, access: Access) -> Self {
        let reason = match fault.cause {
            Cause::Entry(FaultKind::Translation | FaultKind::Permission) => Reason::Mapping,
            Cause::Entry(_) | Cause::OutsideMemory | Cause::Intercepted | Cause::Missing => Reason::Unknown,
        };
        Self { reason, endpoint, access, address: Some(iova) }
    }

    /// The report, as it stands in a buffer of the event queue.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(self.access.read, Self::READ) | flag(self.access.write, Self::WRITE) | flag(self.address.is_some(), Self::ADDRESS);
        bytes[0] = self.reason as u8;
        bytes[4..8].copy_from_slice(&flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.endpoint.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.address.unwrap_or(0).to_le_bytes());
        bytes
    }

    /// Writes the report into a buffer of the event queue: how many bytes were used. A buffer that is too small gets nothing and is used with zero bytes: a
    /// report is never spread over several.
    #[must_use]
    pub fn write(&self, buffer: &mut [u8]) -> usize {
        match buffer.get_mut(..Self::BYTES) {
            Some(place) => {
                place.copy_from_slice(&self.to_bytes());
                Self::BYTES
            }
            None => 0,
        }
    }
}
