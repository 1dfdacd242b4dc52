//! A watcher by userfaultfd's write protection.

use std::collections::BTreeSet;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{Mode, OFlags, open};
use rustix::io::{Errno, read};
use vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::calls;
use super::{WatchError, Watcher};
use crate::memory::PAGE;
use crate::{Gpa, Span};

/// Bytes of `struct uffd_msg`, and how many are read at once.
const MESSAGE: usize = 32;
const MESSAGES: usize = 16;
/// `UFFD_EVENT_PAGEFAULT`.
const PAGE_FAULT: u8 = 0x12;
/// How often a protection is tried while the kernel says that the memory is just being changed.
const TRIES: usize = 100;

/// Whose writes are reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Writers {
    /// Everybody's who writes through this process's memory: its threads, vCPUs of KVM, system calls.
    All,
    /// Those of its threads in user mode. Where the kernel writes to a watched page for somebody, a system call fails with `EFAULT`. It takes no privilege.
    UserMode,
}

/// A range of guest memory that is mapped in this process.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    gpa: Span,
    host: u64,
}

/// Watches guest memory that is mapped in this process, by userfaultfd.
///
/// There are no threads in it: wait until its file descriptor can be read (`AsFd`), and call [`Watcher::serve`]. A writer to a watched page waits for that, so the
/// thread that serves must not write to watched pages itself. If the watcher is dropped, all writers go on.
///
/// Writes through other mappings, of this or another process, are not seen. Nor is memory that is discarded (`madvise`, a balloon): its pages read as
/// zero after that, and may not be watched any more; rearm and read them then. Fork makes a copy that nobody watches.
pub struct UffdWatcher<S: GuestAddressSpace> {
    fd: OwnedFd,
    /// Keeps the memory mapped.
    memory: S::T,
    mapped: Vec<Mapped>,
    watched: BTreeSet<u64>,
    /// Bytes that can be protected: the host's page.
    unit: u64,
    /// Pages that nobody touched yet must be touched before they can be protected.
    touch: bool,
}

impl<S> UffdWatcher<S>
where
    S: GuestAddressSpace,
    S::M: GuestMemoryBackend,
{
    /// A watcher of all memory in `space` as it is now, with a userfaultfd of its own.
    ///
    /// # Errors
    /// The kernel forbids it, or cannot protect this memory.
    pub fn new(space: &S, writers: Writers) -> Result<Self, WatchError> {
        let refused = |errno| match errno {
            Errno::NOSYS => WatchError::NoUserfaultfd,
            errno => WatchError::Forbidden(errno),
        };
        let fd = match calls::create(writers == Writers::UserMode) {
            // Whoever may open the device needs no privilege.
            Err(Errno::PERM) if writers == Writers::All => open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
                .and_then(calls::create_from)
                .map_err(|_| WatchError::Forbidden(Errno::PERM)),
            created => created.map_err(refused),
        }?;
        Self::with_fd(space, fd)
    }

    /// The same with a userfaultfd of the caller's: for a process that got it from one with more privileges but with its own memory. It must be new, and not
    /// block.
    ///
    /// # Errors
    /// As [`UffdWatcher::new`].
    pub fn with_fd(space: &S, fd: OwnedFd) -> Result<Self, WatchError> {
        // A handshake with unknown features fails and can be tried again.
        let wanted = [calls::SHARED | calls::UNPOPULATED, calls::SHARED, 0].map(|features| features | calls::WRITE_PROTECTION);
        let mut enabled = Err(Errno::INVAL);
        let mut features = 0;
        for wanted in wanted {
            if enabled == Err(Errno::INVAL) {
                features = wanted;
                enabled = calls::enable(&fd, features);
            }
        }
        enabled
            .map_err(|errno| if errno == Errno::INVAL { WatchError::NoWriteProtection } else { WatchError::Call { what: "the handshake", errno } })?;
        let unit = (rustix::param::page_size() as u64).max(PAGE);
        let mut this =
            Self { fd, memory: space.memory(), mapped: Vec::new(), watched: BTreeSet::new(), unit, touch: features & calls::UNPOPULATED == 0 };
        this.mapped = this.register(&this.memory)?;
        Ok(this)
    }

    /// Registers what of `memory` is not registered yet: all of it that can be watched.
    fn register(&self, memory: &S::T) -> Result<Vec<Mapped>, WatchError> {
        let mut mapped = Vec::new();
        for region in memory.iter() {
            let first = region.start_addr().0;
            // What is no whole page of the host cannot be protected.
            let length = if first.is_multiple_of(PAGE) { region.len() / self.unit * self.unit } else { 0 };
            let Some(gpa) = length.checked_sub(1).and_then(|beyond| Span::new(first, first.checked_add(beyond)?)) else { continue };
            let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| WatchError::NoPage(Gpa(first)))?.addr() as u64;
            if !self.mapped.iter().any(|known| known.gpa == gpa && known.host == host) {
                calls::register(&self.fd, host, length).map_err(|errno| WatchError::Memory { span: gpa, errno })?;
            }
            mapped.push(Mapped { gpa, host });
        }
        Ok(mapped)
    }

    /// The guest's memory is what `space` has now. Memory that comes can be watched from now on; writers to memory that goes, which is still mapped in this process, go on, and
    /// its pages are watched no more.
    ///
    /// # Errors
    /// The kernel cannot protect what came: everything is as before.
    pub fn memory_changed(&mut self, space: &S) -> Result<(), WatchError> {
        let memory = space.memory();
        let mapped = self.register(&memory)?;
        let stays = |page: u64| mapped.iter().any(|new| new.gpa.contains(page) && self.host_of(page) == Some(new.host + (page - new.gpa.first)));
        let (kept, gone): (BTreeSet<u64>, BTreeSet<u64>) = self.watched.iter().partition(|page| stays(**page));
        for page in gone {
            // Whatever the kernel says of it: it is no guest memory any more.
            let _ = self.protect(Gpa(page), false);
        }
        (self.watched, self.mapped, self.memory) = (kept, mapped, memory);
        Ok(())
    }

    fn host_of(&self, page: u64) -> Option<u64> {
        self.mapped.iter().find(|mapped| mapped.gpa.contains(page)).map(|mapped| mapped.host + (page - mapped.gpa.first))
    }

    /// The unit that a page lies in: its first guest address, and where it is in this process.
    fn unit(&self, page: Gpa) -> Result<(u64, u64), WatchError> {
        let mapped = self.mapped.iter().find(|mapped| mapped.gpa.contains(page.0) && page.0.is_multiple_of(PAGE)).ok_or(WatchError::NoPage(page))?;
        let offset = (page.0 - mapped.gpa.first) / self.unit * self.unit;
        Ok((mapped.gpa.first + offset, mapped.host + offset))
    }

    fn protect(&self, page: Gpa, protect: bool) -> Result<(), WatchError> {
        let (gpa, host) = self.unit(page)?;
        if protect && self.touch {
            self.memory.load::<u8>(GuestAddress(gpa), Ordering::Relaxed).map_err(|_| WatchError::NoPage(page))?;
        }
        for _ in 0..TRIES {
            match calls::write_protect(&self.fd, host, self.unit, protect) {
                Err(Errno::AGAIN) => {}
                result => return result.map_err(|errno| WatchError::Protect { page, protect, errno }),
            }
        }
        Err(WatchError::Protect { page, protect, errno: Errno::AGAIN })
    }

    /// Whether any page of the unit is watched.
    fn is_watched(&self, unit: u64) -> bool {
        self.watched.range(unit..=unit.saturating_add(self.unit - 1)).next().is_some()
    }

    /// Units to which somebody waits to write, as the fd's messages say.
    fn faults(&self) -> Result<BTreeSet<u64>, WatchError> {
        let mut units = BTreeSet::new();
        let mut buffer = [0; MESSAGE * MESSAGES];
        loop {
            let length = match read(&self.fd, &mut buffer) {
                Err(Errno::AGAIN) | Ok(0) => return Ok(units),
                Err(Errno::INTR) => continue,
                result => result.map_err(|errno| WatchError::Call { what: "reading", errno })?,
            };
            for message in buffer[..length].as_chunks::<MESSAGE>().0 {
                // Byte 0 is the event, bytes 16 to 24 are the address of a page fault.
                let address = message[16..].first_chunk().map_or(0, |bytes| u64::from_ne_bytes(*bytes));
                let mapped = self.mapped.iter().find(|mapped| address >= mapped.host && address - mapped.host <= mapped.gpa.length_minus_one());
                if let Some(mapped) = mapped.filter(|_| message[0] == PAGE_FAULT) {
                    units.insert(mapped.gpa.first + (address - mapped.host) / self.unit * self.unit);
                }
            }
        }
    }
}

impl<S> Watcher for UffdWatcher<S>
where
    S: GuestAddressSpace,
    S::M: GuestMemoryBackend,
{
    fn watch(&mut self, page: Gpa) -> Result<(), WatchError> {
        if self.watched.contains(&page.0) {
            return Ok(());
        }
        self.protect(page, true)?;
        self.watched.insert(page.0);
        Ok(())
    }

    fn unwatch(&mut self, page: Gpa) -> Result<(), WatchError> {
        let (unit, _) = self.unit(page)?;
        if !self.watched.remove(&page.0) || self.is_watched(unit) {
            return Ok(());
        }
        self.protect(page, false)
    }

    fn rearm(&mut self, page: Gpa) -> Result<(), WatchError> {
        if !self.watched.contains(&page.0) {
            return Err(WatchError::NotWatched(page));
        }
        self.protect(page, true)
    }

    fn serve(&mut self, written: &mut dyn FnMut(Gpa, u64)) -> Result<usize, WatchError> {
        let (mut count, mut result) = (0, Ok(()));
        for unit in self.faults()? {
            let released = self.protect(Gpa(unit), false);
            // The others' messages are read, too: whoever waits there must not wait for ever.
            result = result.and(released);
            if self.is_watched(unit) {
                written(Gpa(unit), self.unit);
                count += 1;
            }
        }
        result.map(|()| count)
    }
}

impl<S: GuestAddressSpace> AsFd for UffdWatcher<S> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<S: GuestAddressSpace> fmt::Debug for UffdWatcher<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UffdWatcher")
            .field("fd", &self.fd)
            .field("mapped", &self.mapped)
            .field("watched", &self.watched.len())
            .finish_non_exhaustive()
    }
}
