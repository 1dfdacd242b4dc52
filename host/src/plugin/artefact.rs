//! The one place where compiled code is taken from bytes. Everything unsafe about plugins is here.

#![allow(unsafe_code)]

/// Makes a component from an artefact of [`wasmtime::component::Component::serialize`].
///
/// Wasmtime checks that the artefact was made by this version of it, with this configuration, for a processor like this one, and it trusts the machine
/// code in it: a compiled artefact is trusted like a shared library.
///
/// # Safety
/// `artefact` was written by this library, and nobody else could have written to it since. [`Cache`](super::cache::Cache) says how it makes sure.
///
/// # Errors
/// An artefact of another version, configuration or processor.
pub(super) unsafe fn deserialize(engine: &wasmtime::Engine, artefact: &[u8]) -> wasmtime::Result<wasmtime::component::Component> {
    // SAFETY: the caller's promise is the one that Wasmtime asks for.
    unsafe { wasmtime::component::Component::deserialize(engine, artefact) }
}
