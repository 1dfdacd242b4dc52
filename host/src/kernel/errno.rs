//! The kernel's error numbers, by the kernel's names.

use std::fmt;

/// An error number of the kernel, positive as in `errno`.
///
/// Numbers without a name here are kept: a real kernel may return any.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $number:literal, $meaning:literal;)*) => {
        impl Errno {
            $(#[doc = $meaning] pub const $name: Self = Self($number);)*

            fn describe(self) -> Option<(&'static str, &'static str)> {
                match self.0 {
                    $($number => Some((stringify!($name), $meaning)),)*
                    _ => None,
                }
            }
        }
    };
}

// The numbers are those of asm-generic/errno.h, which all architectures that have an IOMMU here use.
errnos! {
    EPERM = 1, "not permitted";
    ENOENT = 2, "no such object, area or range";
    EINTR = 4, "interrupted";
    EIO = 5, "the hardware or its data are not as they must be";
    E2BIG = 7, "unknown fields are set";
    EBADF = 9, "not an open file of the right kind";
    EAGAIN = 11, "nothing there now";
    ENOMEM = 12, "out of memory, or beyond the limit of locked memory";
    EFAULT = 14, "no such user memory";
    EBUSY = 16, "in use";
    EEXIST = 17, "there is one already";
    ENODEV = 19, "no such device";
    EINVAL = 22, "invalid argument";
    ENOTTY = 25, "unknown call";
    ENOSPC = 28, "no room";
    EOVERFLOW = 75, "beyond the address space";
    EMSGSIZE = 90, "the answer does not fit";
    EOPNOTSUPP = 95, "not supported";
    EADDRINUSE = 98, "the range is in use";
    ETIMEDOUT = 110, "timed out";
}

impl Errno {
    /// The kernel's name, if it is one of those here.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        self.describe().map(|(name, _)| name)
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.describe() {
            Some((name, meaning)) => write!(f, "{name} ({meaning})"),
            None => write!(f, "errno {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl std::error::Error for Errno {}

/// The answer of a kernel call.
pub type Result<T, E = Errno> = std::result::Result<T, E>;
