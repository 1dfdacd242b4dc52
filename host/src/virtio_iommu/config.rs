//! Feature bits and the configuration space: Virtio 1.3 sections 5.13.3 and 5.13.4.

use crate::Span;

/// Feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Features(pub u64);

impl Features {
    /// `input_range` holds.
    pub const INPUT_RANGE: Self = Self(1);
    /// `domain_range` holds.
    pub const DOMAIN_RANGE: Self = Self(1 << 1);
    /// MAP and UNMAP requests.
    pub const MAP_UNMAP: Self = Self(1 << 2);
    /// Endpoints without a domain bypass translation; superseded by [`Features::BYPASS_CONFIG`].
    pub const BYPASS: Self = Self(1 << 3);
    /// PROBE requests.
    pub const PROBE: Self = Self(1 << 4);
    /// The flag for memory-mapped I/O in MAP requests.
    pub const MMIO: Self = Self(1 << 5);
    /// The `bypass` field, and bypass domains.
    pub const BYPASS_CONFIG: Self = Self(1 << 6);
    /// What a new device offers: everything but [`Features::BYPASS`] (section 5.13.3.2).
    pub const ALL: Self = Self(0b111_0111);

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

    /// Without `other`.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// Domain ids, `first..=last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DomainRange {
    /// Lowest.
    pub first: u32,
    /// Highest.
    pub last: u32,
}

/// The configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Page sizes; the lowest bit that is set is the granularity of mappings, in bytes, the others are hints.
    pub page_size_mask: u64,
    /// IOVAs that can be mapped, inclusive, where [`Features::INPUT_RANGE`] is offered.
    pub input_range: Span,
    /// Domain ids that can be used, inclusive, where [`Features::DOMAIN_RANGE`] is offered.
    pub domain_range: DomainRange,
    /// Bytes of properties in a PROBE request.
    pub probe_size: u32,
    /// Whether endpoints without a domain bypass translation, where [`Features::BYPASS_CONFIG`] is offered.
    pub bypass: bool,
}

impl Default for Config {
    /// 4 KiB granularity, all IOVAs, all domain ids, 512 bytes of properties, no bypass.
    fn default() -> Self {
        Self {
            page_size_mask: !0xfff,
            input_range: Span::ALL,
            domain_range: DomainRange { first: 0, last: u32::MAX },
            probe_size: 512,
            bypass: false,
        }
    }
}

/// A configuration that the specification does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Section 5.13.4.2: at least one bit.
    #[error("page_size_mask is zero")]
    NoPageSize,
    /// A range with nothing in it.
    #[error("{0} is empty")]
    Empty(&'static str),
    /// Section 5.13.3.2: not both.
    #[error("the features BYPASS and BYPASS_CONFIG exclude each other")]
    BothBypasses,
    /// A bit that this version of the device does not have.
    #[error("feature bits {0:#x} have no meaning for this device")]
    UnknownFeatures(u64),
    /// The driver accepted what was not offered.
    #[error("feature bits {0:#x} were accepted and not offered")]
    NotOffered(u64),
}

impl Config {
    /// Bytes of the configuration space.
    pub const BYTES: usize = 40;
    /// Where `bypass` is, the only field that a driver may write.
    pub const BYPASS_OFFSET: u64 = 36;

    /// The granularity of mappings in bytes; never zero after [`Config::check`].
    #[must_use]
    pub const fn granule(&self) -> u64 {
        self.page_size_mask & self.page_size_mask.wrapping_neg()
    }

    /// Whether a device with `features` can have this configuration.
    ///
    /// # Errors
    /// What the specification does not allow.
    pub const fn check(&self, features: Features) -> Result<(), ConfigError> {
        if self.page_size_mask == 0 {
            return Err(ConfigError::NoPageSize);
        }
        if self.input_range.first > self.input_range.last {
            return Err(ConfigError::Empty("input_range"));
        }
        if self.domain_range.first > self.domain_range.last {
            return Err(ConfigError::Empty("domain_range"));
        }
        if features.contains(Features::BYPASS) && features.contains(Features::BYPASS_CONFIG) {
            return Err(ConfigError::BothBypasses);
        }
        match features.0 & !Features::ALL.with(Features::BYPASS).0 {
            0 => Ok(()),
            unknown => Err(ConfigError::UnknownFeatures(unknown)),
        }
    }

    /// The configuration space, as a driver reads it.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let words = [self.page_size_mask, self.input_range.first, self.input_range.last];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        let halves = [self.domain_range.first, self.domain_range.last, self.probe_size];
        for (place, half) in bytes[24..].chunks_exact_mut(4).zip(halves) {
            place.copy_from_slice(&half.to_le_bytes());
        }
        bytes[36] = u8::from(self.bypass);
        bytes
    }
}
