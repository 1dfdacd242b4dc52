//! userfaultfd's calls: the one place in watching that is unsafe.
//!
//! Only write protection is used. All that it can do to memory is to stop whoever writes to it until somebody lifts the protection or closes the fd, so these
//! functions are safe for any address; the kernel refuses those that are not mapped.
//!
//! Structures and numbers: `linux/userfaultfd.h`; meaning: ioctl_userfaultfd(2), "Userfaultfd" in the kernel's admin guide.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, FromRawFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

const GROUP: u8 = 0xaa;
const API_VERSION: u64 = 0xaa;
/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: u32 = 1;
const REGISTER_WRITE_PROTECTION: u64 = 1 << 1;
/// The bit of `UFFDIO_WRITEPROTECT` in the answer to registering.
const CAN_WRITE_PROTECT: u64 = 1 << 6;

/// Feature: faults say that they are caused by write protection.
pub(super) const WRITE_PROTECTION: u64 = 1;
/// Feature: write protection of shared memory and huge pages.
pub(super) const SHARED: u64 = 1 << 12;
/// Feature: write protection of anonymous pages that nobody touched yet.
pub(super) const UNPOPULATED: u64 = 1 << 13;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_writeprotect`.
#[repr(C)]
struct WriteProtect {
    start: u64,
    length: u64,
    mode: u64,
}

const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0);
const WRITE_PROTECT: Opcode = opcode::read_write::<WriteProtect>(GROUP, 6);

/// `USERFAULTFD_IOC_NEW`: its argument are flags, its answer is a file descriptor.
struct New(u32);

// SAFETY: the call takes an integer instead of a pointer and accesses no memory of this process; its answer is a file descriptor that nobody else owns.
unsafe impl Ioctl for New {
    type Output = OwnedFd;

    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(GROUP, 0)
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::without_provenance_mut(self.0 as usize)
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the call succeeded, so this is a new descriptor.
        Ok(unsafe { OwnedFd::from_raw_fd(output) })
    }
}

fn flags(user_only: bool) -> UserfaultfdFlags {
    let user_only = if user_only { UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY) } else { UserfaultfdFlags::empty() };
    UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK | user_only
}

/// A new userfaultfd, which does not block, from the system call.
pub(super) fn create(user_only: bool) -> rustix::io::Result<OwnedFd> {
    // SAFETY: the call is; what the descriptor can do is what this module does with it, and its caller is told so.
    unsafe { rustix::mm::userfaultfd(flags(user_only)) }
}

/// The same from `/dev/userfaultfd`.
pub(super) fn create_from(device: impl AsFd) -> rustix::io::Result<OwnedFd> {
    // SAFETY: `New` describes this call, and other devices answer that they do not know it.
    unsafe { ioctl(device, New(flags(false).bits())) }
}

/// The handshake, for exactly these features.
pub(super) fn enable(fd: impl AsFd, features: u64) -> rustix::io::Result<()> {
    let mut api = Api { api: API_VERSION, features, ioctls: 0 };
    // SAFETY: this number means an `Api`.
    let update = unsafe { Updater::<API, Api>::new(&mut api) };
    // SAFETY: the kernel reads and writes the structure and nothing else.
    unsafe { ioctl(fd, update) }
}

/// Registers addresses of this process for write protection; nothing is protected yet.
pub(super) fn register(fd: impl AsFd, start: u64, length: u64) -> rustix::io::Result<()> {
    let mut register = Register { start, length, mode: REGISTER_WRITE_PROTECTION, ioctls: 0 };
    // SAFETY: this number means a `Register`.
    let update = unsafe { Updater::<REGISTER, Register>::new(&mut register) };
    // SAFETY: the kernel reads and writes the structure; what it does to the addresses is said above.
    unsafe { ioctl(fd, update) }?;
    if register.ioctls & CAN_WRITE_PROTECT == 0 { Err(Errno::OPNOTSUPP) } else { Ok(()) }
}

/// Protects registered addresses from writing, or lifts that and wakes whoever waits for it.
pub(super) fn write_protect(fd: impl AsFd, start: u64, length: u64, protect: bool) -> rustix::io::Result<()> {
    let mut change = WriteProtect { start, length, mode: u64::from(protect) };
    // SAFETY: this number means a `WriteProtect`.
    let update = unsafe { Updater::<WRITE_PROTECT, WriteProtect>::new(&mut change) };
    // SAFETY: the kernel reads the structure; what it does to the addresses is said above.
    unsafe { ioctl(fd, update) }
}
