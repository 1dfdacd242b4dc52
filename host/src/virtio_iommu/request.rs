//! Requests as typed values and as bytes: Virtio 1.3 section 5.13.6. All fields are little-endian.
//!
//! | request | readable bytes: type, 3 reserved, then | writable bytes |
//! |---|---|---|
//! | ATTACH 1 | domain 4, endpoint 4, flags 4, reserved 4 | tail |
//! | DETACH 2 | domain 4, endpoint 4, reserved 8 | tail |
//! | MAP 3 | domain 4, first IOVA 8, last IOVA 8, address 8, flags 4 | tail |
//! | UNMAP 4 | domain 4, first IOVA 8, last IOVA 8, reserved 4 | tail |
//! | PROBE 5 | endpoint 4, reserved 64 | properties (`probe_size`), tail |
//!
//! The tail is a status byte and three reserved ones.

use std::fmt;

use crate::{Attributes, MemoryType, Span};

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request could not be read.
    IoErr = 1,
    /// Not supported, or not negotiated.
    Unsupp = 2,
    /// An error of the device's own: for a VMM that fails to make an effect real.
    DevErr = 3,
    /// Invalid parameters.
    Inval = 4,
    /// Out of range.
    Range = 5,
    /// No such endpoint or domain.
    NoEnt = 6,
    /// A guest-physical address that does not exist.
    Fault = 7,
    /// Not enough resources.
    NoMem = 8,
}

impl Status {
    /// The specification's name without its prefix.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "OK",
            Self::IoErr => "IOERR",
            Self::Unsupp => "UNSUPP",
            Self::DevErr => "DEVERR",
            Self::Inval => "INVAL",
            Self::Range => "RANGE",
            Self::NoEnt => "NOENT",
            Self::Fault => "FAULT",
            Self::NoMem => "NOMEM",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Flags of an ATTACH request.
pub mod attach_flags {
    /// The domain is a bypass domain.
    pub const BYPASS: u32 = 1;
}

/// Flags of a MAP request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MapFlags(pub u32);

impl MapFlags {
    /// Reads pass.
    pub const READ: Self = Self(1);
    /// Writes pass.
    pub const WRITE: Self = Self(1 << 1);
    /// Memory-mapped I/O: a memory type, not a permission.
    pub const MMIO: Self = Self(1 << 2);

    /// Whether all of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What a mapping with these flags allows. There is no flag for instruction fetches, so they do not pass. Memory is coherent: an endpoint's accesses are to
    /// guest memory as the guest's processors see it.
    #[must_use]
    pub const fn attributes(self) -> Attributes {
        let mut attributes = Attributes::none();
        if self.contains(Self::READ) {
            attributes = attributes.with(Attributes::READ);
        }
        if self.contains(Self::WRITE) {
            attributes = attributes.with(Attributes::WRITE);
        }
        if self.contains(Self::MMIO) { attributes.with_memory_type(MemoryType::Device) } else { attributes.with(Attributes::COHERENT) }
    }
}

/// What reserved IOVAs are for (the subtype of a RESV_MEM property).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ReservedKind {
    /// Not to be used.
    Reserved = 0,
    /// The doorbell of message signalled interrupts.
    Msi = 1,
}

/// IOVAs of an endpoint that cannot be mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reserved {
    /// What for.
    pub kind: ReservedKind,
    /// Which, inclusive.
    pub span: Span,
}

impl Reserved {
    /// Bytes of the property, its header included.
    pub const PROPERTY_BYTES: usize = 24;

    /// The RESV_MEM property (section 5.13.6.8.1). Its length field leaves out the header.
    #[must_use]
    pub fn property(&self) -> [u8; Self::PROPERTY_BYTES] {
        let mut bytes = [0; Self::PROPERTY_BYTES];
        bytes[0..2].copy_from_slice(&1_u16.to_le_bytes());
        bytes[2..4].copy_from_slice(&20_u16.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[8..16].copy_from_slice(&self.span.first.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.span.last.to_le_bytes());
        bytes
    }
}

/// A request, as the driver wrote it: nothing is checked yet but the fields that must be zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Attach an endpoint to a domain, which comes into being with its first endpoint.
    Attach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
        /// [`attach_flags`].
        flags: u32,
    },
    /// Detach an endpoint from a domain, which ends with its last endpoint.
    Detach {
        /// The domain.
        domain: u32,
        /// The endpoint.
        endpoint: u32,
    },
    /// Map IOVAs that are not mapped.
    Map {
        /// The domain.
        domain: u32,
        /// First IOVA.
        first: u64,
        /// Last IOVA, inclusive.
        last: u64,
        /// Guest-physical address of the first.
        address: u64,
        /// What is allowed there.
        flags: MapFlags,
    },
    /// Remove all mappings in a range.
    Unmap {
        /// The domain.
        domain: u32,
        /// First IOVA.
        first: u64,
        /// Last IOVA, inclusive.
        last: u64,
    },
    /// Ask for the properties of an endpoint.
    Probe {
        /// The endpoint.
        endpoint: u32,
    },
}

/// Bytes that are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// A type that the specification does not have. Nothing is to be written (section 5.13.6.2).
    #[error("request type {0} is not known")]
    Unknown(u8),
    /// Not even a head, or fewer bytes than the type needs.
    #[error("a request of {found} bytes; its type needs {needed}")]
    Short {
        /// Bytes that the type needs.
        needed: usize,
        /// Bytes that there are.
        found: usize,
    },
    /// A field that must be zero is not. Which ones a device minds differs: those of ATTACH and UNMAP, not those of DETACH, PROBE and the head.
    #[error("a reserved field is not zero")]
    Reserved,
}

impl DecodeError {
    /// The status to write, if one is to be written.
    #[must_use]
    pub const fn status(self) -> Option<Status> {
        match self {
            Self::Unknown(_) => None,
            Self::Short { .. } => Some(Status::IoErr),
            Self::Reserved => Some(Status::Inval),
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

impl Request {
    /// The type byte.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::Attach { .. } => 1,
            Self::Detach { .. } => 2,
            Self::Map { .. } => 3,
            Self::Unmap { .. } => 4,
            Self::Probe { .. } => 5,
        }
    }

    /// Bytes of the readable part of a request of this type.
    const fn readable_bytes(code: u8) -> Option<usize> {
        match code {
            1 | 2 => Some(20),
            3 => Some(36),
            4 => Some(28),
            5 => Some(72),
            _ => None,
        }
    }

    /// Reads the readable part of a request. Bytes beyond what the type has are not looked at.
    ///
    /// # Errors
    /// An unknown type, too few bytes, or a reserved field that must be zero.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let code = *bytes.first().ok_or(DecodeError::Short { needed: 4, found: 0 })?;
        let needed = Self::readable_bytes(code).ok_or(DecodeError::Unknown(code))?;
        if bytes.len() < needed {
            return Err(DecodeError::Short { needed, found: bytes.len() });
        }
        let domain = u32_at(bytes, 4);
        match code {
            // Section 5.13.6.3.2: MUST reject.
            1 if u32_at(bytes, 16) != 0 => Err(DecodeError::Reserved),
            1 => Ok(Self::Attach { domain, endpoint: u32_at(bytes, 8), flags: u32_at(bytes, 12) }),
            // Section 5.13.6.4.2: MUST ignore what is reserved.
            2 => Ok(Self::Detach { domain, endpoint: u32_at(bytes, 8) }),
            3 => {
                let (first, last, address) = (u64_at(bytes, 8), u64_at(bytes, 16), u64_at(bytes, 24));
                Ok(Self::Map { domain, first, last, address, flags: MapFlags(u32_at(bytes, 32)) })
            }
            // Section 5.13.6.6.2: MAY refuse, and MAY do it all the same; it is refused and not done, so that no request does half of what it says.
            4 if u32_at(bytes, 24) != 0 => Err(DecodeError::Reserved),
            4 => Ok(Self::Unmap { domain, first: u64_at(bytes, 8), last: u64_at(bytes, 16) }),
            // Section 5.13.6.7.2: MUST ignore what is reserved.
            _ => Ok(Self::Probe { endpoint: domain }),
        }
    }

    /// The readable part, as a driver writes it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![self.code(), 0, 0, 0];
        let mut put = |field: &[u8]| bytes.extend_from_slice(field);
        match *self {
            Self::Attach { domain, endpoint, flags } => [domain, endpoint, flags, 0].iter().for_each(|field| put(&field.to_le_bytes())),
            Self::Detach { domain, endpoint } => [domain, endpoint, 0, 0].iter().for_each(|field| put(&field.to_le_bytes())),
            Self::Map { domain, first, last, address, flags } => {
                put(&domain.to_le_bytes());
                [first, last, address].iter().for_each(|field| put(&field.to_le_bytes()));
                put(&flags.0.to_le_bytes());
            }
            Self::Unmap { domain, first, last } => {
                put(&domain.to_le_bytes());
                [first, last].iter().for_each(|field| put(&field.to_le_bytes()));
                put(&[0; 4]);
            }
            Self::Probe { endpoint } => {
                put(&endpoint.to_le_bytes());
                put(&[0; 64]);
            }
        }
        bytes
    }
}
