//! The one place where compiled code is taken from outside the process. Everything unsafe about plugins is here.

#![allow(unsafe_code)]

use std::os::fd::AsRawFd as _;
use wasmtime::component::Component;

use crate::plugin::cache::OwnEntry;

/// Makes a component from an entry of the cache.
///
/// Wasmtime checks that the artefact was made by this version of it, with this configuration, for a processor like this one, and it trusts the machine
/// code in it: a compiled artefact is trusted like a shared library. Like one it is mapped from its file, which is three times faster than a copy; where
/// `/proc` is not mounted, as in a jail, it is copied.
///
/// # Errors
/// An artefact of another version, configuration or processor.
pub(super) fn deserialize(engine: &wasmtime::Engine, entry: &OwnEntry) -> wasmtime::Result<Component> {
    let mapped = format!("/proc/self/fd/{}", entry.file().as_raw_fd());
    // SAFETY: Wasmtime asks for what `Component::serialize` made, and for a file that does not change while it is mapped (privately). Only the cache makes
    // an `OwnEntry`, from a regular file that belongs to this user and that nobody else may write, in a directory of which the same holds, with the
    // checksum that `Cache::put` wrote; and the cache never writes to a file that has its name. Whoever can still change such a file can also change
    // this process's own libraries. The name is the open file's, so that it cannot be another.
    let component = unsafe { Component::deserialize_file(engine, mapped) };
    component.or_else(|error| {
        let Some(artefact) = entry.artefact() else { return Err(error) };
        // SAFETY: as above; the bytes are our own, and have the checksum.
        unsafe { Component::deserialize(engine, artefact) }
    })
}
