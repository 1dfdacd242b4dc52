//! The one place where compiled code is taken from bytes. Everything unsafe about plugins is here.

#![allow(unsafe_code)]

use wasmtime::component::Component;

use crate::plugin::cache::OwnEntry;

/// Makes a component from an entry of the cache.
///
/// Wasmtime checks that the artefact was made by this version of it, with this configuration, for a processor like this one, and it trusts the machine
/// code in it: a compiled artefact is trusted like a shared library.
///
/// # Errors
/// An artefact of another version, configuration or processor.
pub(super) fn deserialize(engine: &wasmtime::Engine, entry: &OwnEntry) -> wasmtime::Result<Component> {
    // SAFETY: Wasmtime asks for bytes that `Component::serialize` made. Only the cache makes an `OwnEntry`, from a regular file that belongs to this
    // user and that nobody else may write, in a directory of which the same holds, with the checksum that `Cache::put` wrote. Whoever can still
    // change such a file can also change this process's own libraries.
    unsafe { Component::deserialize(engine, entry.artefact()) }
}
