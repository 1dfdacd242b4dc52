//! What a leaf allows: the closed normal form that all formats meet in.

use std::fmt;

/// Permissions and memory type of a leaf, packed as the WIT's `attributes`.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Attributes(u64);

/// How memory is to be treated, strictest last.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemoryType {
    /// Normal, write-back cacheable.
    WriteBack,
    /// Normal, not cacheable.
    NonCacheable,
    /// Device.
    Device,
}

impl Attributes {
    /// Reads pass.
    pub const READ: Self = Self(1);
    /// Writes pass.
    pub const WRITE: Self = Self(1 << 1);
    /// Instruction fetches pass.
    pub const EXECUTE: Self = Self(1 << 2);
    /// Only privileged requests pass.
    pub const PRIVILEGED_ONLY: Self = Self(1 << 3);
    /// Accesses snoop the processors' caches.
    pub const COHERENT: Self = Self(1 << 6);
    /// Marked as accessed.
    pub const ACCESSED: Self = Self(1 << 7);
    /// Marked as dirty.
    pub const DIRTY: Self = Self(1 << 8);
    /// Clean now, and hardware marks it dirty at the first write.
    pub const WRITABLE_WHEN_DIRTY: Self = Self(1 << 9);

    const MEMORY_TYPE: u64 = 3 << 4;
    const KNOWN: u64 = (1 << 10) - 1;
    const PERMISSIONS: u64 = 0b111;

    /// No permission, normal write-back memory, no marks.
    #[must_use]
    pub const fn none() -> Self {
        Self(0)
    }

    /// From the packed word; none if it has a bit without a meaning, or says writable-when-dirty without write.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Option<Self> {
        if bits & !Self::KNOWN != 0 || bits & Self::MEMORY_TYPE == Self::MEMORY_TYPE {
            return None;
        }
        if bits & Self::WRITABLE_WHEN_DIRTY.0 != 0 && bits & Self::WRITE.0 == 0 {
            return None;
        }
        Some(Self(bits))
    }

    /// The packed word.
    #[must_use]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// Whether all of `other`'s flags are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// With the flags of `other` as well.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Without the flags of `other`; without `WRITE` there is no `WRITABLE_WHEN_DIRTY` either.
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        let bits = self.0 & !other.0;
        if bits & Self::WRITE.0 == 0 { Self(bits & !Self::WRITABLE_WHEN_DIRTY.0) } else { Self(bits) }
    }

    /// How the memory is to be treated.
    #[must_use]
    pub const fn memory_type(self) -> MemoryType {
        match self.0 & Self::MEMORY_TYPE {
            0 => MemoryType::WriteBack,
            0x10 => MemoryType::NonCacheable,
            _ => MemoryType::Device,
        }
    }

    /// With another memory type.
    #[must_use]
    pub const fn with_memory_type(self, memory_type: MemoryType) -> Self {
        Self(self.0 & !Self::MEMORY_TYPE | (memory_type as u64) << 4)
    }

    /// No request passes.
    #[must_use]
    pub const fn grants_nothing(self) -> bool {
        self.0 & Self::PERMISSIONS == 0
    }

    /// Allows nothing that `limit` does not: no further permission, and privileged requests only where `limit` says so.
    #[must_use]
    pub const fn within(self, limit: Self) -> bool {
        self.0 & Self::PERMISSIONS & !limit.0 == 0
            && (self.0 & Self::PRIVILEGED_ONLY.0 != 0 || limit.0 & Self::PRIVILEGED_ONLY.0 == 0 || self.grants_nothing())
    }

    /// What two stages in a row allow: permissions that both give, the stricter memory type, coherent only if both are.
    /// Marks and dirty tracking are the first stage's.
    #[must_use]
    pub fn through(self, outer: Self) -> Self {
        let permissions = self.0 & outer.0 & Self::PERMISSIONS;
        let both = self.0 & outer.0 & Self::COHERENT.0;
        let either = (self.0 | outer.0) & Self::PRIVILEGED_ONLY.0;
        let marks = self.0 & (Self::ACCESSED.0 | Self::DIRTY.0);
        let tracked = (self.0 | outer.0) & Self::WRITABLE_WHEN_DIRTY.0;
        let memory_type = self.memory_type().max(outer.memory_type());
        Self(permissions | both | either | marks | tracked).without(Self::none()).with_memory_type(memory_type)
    }

    /// The access of a device: `privileged` requests pass where only those do.
    #[must_use]
    pub const fn access(self, privileged: bool) -> Access {
        if self.0 & Self::PRIVILEGED_ONLY.0 != 0 && !privileged {
            return Access { read: false, write: false };
        }
        Access { read: self.0 & Self::READ.0 != 0, write: self.0 & Self::WRITE.0 != 0 }
    }
}

impl fmt::Debug for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for Attributes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (flag, name) in [(Self::READ, "r"), (Self::WRITE, "w"), (Self::EXECUTE, "x")] {
            f.write_str(if self.contains(flag) { name } else { "-" })?;
        }
        f.write_str(match self.memory_type() {
            MemoryType::WriteBack => " write-back",
            MemoryType::NonCacheable => " non-cacheable",
            MemoryType::Device => " device",
        })?;
        let flags = [
            (Self::PRIVILEGED_ONLY, " privileged-only"),
            (Self::COHERENT, " coherent"),
            (Self::ACCESSED, " accessed"),
            (Self::DIRTY, " dirty"),
            (Self::WRITABLE_WHEN_DIRTY, " writable-when-dirty"),
        ];
        for (flag, name) in flags {
            if self.contains(flag) {
                f.write_str(name)?;
            }
        }
        Ok(())
    }
}

/// What a device may do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access {
    /// Reads pass.
    pub read: bool,
    /// Writes pass.
    pub write: bool,
}

impl Access {
    /// A read.
    pub const READ: Self = Self { read: true, write: false };
    /// A write.
    pub const WRITE: Self = Self { read: false, write: true };

    /// Neither reads nor writes pass.
    #[must_use]
    pub const fn is_none(self) -> bool {
        !self.read && !self.write
    }

    /// Whether everything that `wanted` does passes.
    #[must_use]
    pub const fn allows(self, wanted: Self) -> bool {
        (self.read || !wanted.read) && (self.write || !wanted.write)
    }

    /// `r`, `w`, `rw`, or `-` for neither.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match (self.read, self.write) {
            (true, true) => "rw",
            (true, false) => "r",
            (false, true) => "w",
            (false, false) => "-",
        }
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_without_a_meaning_are_refused() {
        assert!(Attributes::from_bits(1 << 10).is_none());
        assert!(Attributes::from_bits(0x30).is_none(), "memory type 3");
        assert!(Attributes::from_bits(1 << 9).is_none(), "writable-when-dirty without write");
        let all = Attributes::from_bits(0x3ef).expect("all flags, device memory");
        assert_eq!(all.memory_type(), MemoryType::Device);
    }

    #[test]
    fn within_means_no_wider() {
        let (r, rw) = (Attributes::READ, Attributes::READ.with(Attributes::WRITE));
        assert!(r.within(rw) && !rw.within(r));
        let privileged = rw.with(Attributes::PRIVILEGED_ONLY);
        assert!(privileged.within(rw), "fewer requests pass");
        assert!(!rw.within(privileged), "unprivileged requests would pass");
    }

    #[test]
    fn two_stages_allow_what_both_allow() {
        let inner = Attributes::READ.with(Attributes::WRITE).with(Attributes::WRITABLE_WHEN_DIRTY).with(Attributes::COHERENT);
        let outer = Attributes::READ.with(Attributes::EXECUTE).with_memory_type(MemoryType::Device);
        let both = inner.through(outer);
        assert_eq!(both, Attributes::READ.with_memory_type(MemoryType::Device));
    }
}
