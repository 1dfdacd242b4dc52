//! How much a guest can make a context and its address spaces hold.

use crate::lookup;
use crate::sync::{AreaLimits, ShadowLimits};

/// Limits of a whole context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextLimits {
    /// Bytes of guest memory that may be made known to the kernel, and so be pinned: each counts once.
    pub pinned_bytes: u64,
    /// Bytes of host tables, of all address spaces together. They are pinned as well.
    pub table_bytes: u64,
    /// IOASIDs at a time.
    pub spaces: usize,
}

impl Default for ContextLimits {
    /// Guest memory as much as there is; 16 GiB of host tables; 65,536 IOASIDs.
    fn default() -> Self {
        Self { pinned_bytes: u64::MAX, table_bytes: 16 << 30, spaces: 1 << 16 }
    }
}

/// Limits of one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceLimits {
    /// What is kept of the guest's tables.
    pub shadow: ShadowLimits,
    /// Questions that one call may ask a format about patterns that are not remembered.
    pub questions: u64,
    /// Bytes of host tables. What does not fit is not mapped, and counted.
    pub table_bytes: u64,
    /// Areas of the kernel's; flags are the context's business.
    pub areas: AreaLimits,
    /// Software lookups.
    pub lookup: lookup::Limits,
    /// Mappings that the VMM, or a guest with requests, has made at a time.
    pub mappings: usize,
}

impl Default for SpaceLimits {
    /// [`ShadowLimits::default`], [`AreaLimits::default`], [`lookup::Limits::default`], 1,024 questions, 512 MiB of host tables, 4,194,304 mappings.
    fn default() -> Self {
        Self {
            shadow: ShadowLimits::default(),
            questions: 1024,
            table_bytes: 512 << 20,
            areas: AreaLimits::default(),
            lookup: lookup::Limits::default(),
            mappings: 1 << 22,
        }
    }
}
