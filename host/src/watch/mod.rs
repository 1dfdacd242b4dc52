//! Guest pages that hold tables, watched for writes: for guests that do not say when they make a mapping.
//!
//! [`Watcher`] is what the engine needs of a VMM. A VMM may have its own, such as read-only memory slots of KVM; [`UffdWatcher`] is a real one, for memory that is
//! mapped in this process.
//!
//! What a watcher reports is a *page*, not a value. The order that loses no write is: [`Watcher::serve`] says that a page was written and lets its writer go on;
//! [`Watcher::rearm`] watches it again; and only then the page is read. A write before the rearming is seen by that read, one after it is reported.

mod calls;
#[cfg(test)]
mod tests;
mod uffd;

pub use uffd::{UffdWatcher, Writers};

use rustix::io::Errno;

use crate::{Gpa, Span};

/// Watches guest pages for writes.
pub trait Watcher {
    /// Watches the 4 KiB page at `page`, a multiple of its size, from now on. Nothing happens if it is watched already.
    ///
    /// # Errors
    /// It cannot be watched.
    fn watch(&mut self, page: Gpa) -> Result<(), WatchError>;

    /// Watches it no more. Who waits to write to it goes on, and is not reported.
    ///
    /// # Errors
    /// The system refuses it. The page counts as not watched nevertheless.
    fn unwatch(&mut self, page: Gpa) -> Result<(), WatchError>;

    /// Watches a page again that was reported. Read it after this call, not before.
    ///
    /// A writer that did not get to writing since the report waits and is reported again. Rearm a page that is written all the time when its content is needed,
    /// not at once after each report: its writers would get nowhere.
    ///
    /// # Errors
    /// It is not watched, or the system refuses it. The page may then be written without a report.
    fn rearm(&mut self, page: Gpa) -> Result<(), WatchError>;

    /// Tells `written` about all writes that are known now, as first byte and length in bytes, and lets the writers go on; how many there were. Never waits.
    /// What is reported is not watched again before it is rearmed. A report may cover more than the page that was asked for, where the host's pages are larger.
    ///
    /// # Errors
    /// The system refuses it; this is the first error. What was reported is true.
    fn serve(&mut self, written: &mut dyn FnMut(Gpa, u64)) -> Result<usize, WatchError>;
}

/// Pages cannot be watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WatchError {
    /// This process may not.
    #[error(
        "userfaultfd is forbidden ({0}): it takes CAP_SYS_PTRACE, vm.unprivileged_userfaultfd = 1, or leave to open /dev/userfaultfd; writers in user mode alone can be watched without"
    )]
    Forbidden(Errno),
    /// The kernel has none.
    #[error("this kernel has no userfaultfd (CONFIG_USERFAULTFD)")]
    NoUserfaultfd,
    /// The kernel has an older one.
    #[error("this kernel's userfaultfd cannot protect memory from writing (CONFIG_HAVE_ARCH_USERFAULTFD_WP, Linux 5.7)")]
    NoWriteProtection,
    /// Memory of a kind that the kernel cannot protect.
    #[error(
        "the kernel cannot protect guest memory at {span} from writing ({errno}): for shared memory it takes Linux 5.19, and no other userfaultfd may have it"
    )]
    Memory {
        /// Which addresses.
        span: Span,
        /// What it said.
        errno: Errno,
    },
    /// No memory of this process, or no multiple of a page.
    #[error("no page of guest memory at {0}")]
    NoPage(Gpa),
    /// Not watched.
    #[error("the page at {0} is not watched")]
    NotWatched(Gpa),
    /// A page cannot be protected, or not be released.
    #[error("the page at {page} cannot be {} ({errno}); pages larger than 4 KiB are protected whole or not at all", if *.protect { "protected from writing" } else { "released" })]
    Protect {
        /// The page.
        page: Gpa,
        /// Whether it was to be protected.
        protect: bool,
        /// What the kernel said.
        errno: Errno,
    },
    /// Another call failed.
    #[error("userfaultfd: {what} failed ({errno})")]
    Call {
        /// Which.
        what: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
}
