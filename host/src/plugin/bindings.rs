//! What Wasmtime makes of the WIT: one function per question, typed. The unsafe code is the generator's.

#![allow(unsafe_code, missing_docs, missing_debug_implementations, unreachable_pub, clippy::all)]

wasmtime::component::bindgen!({
    path: "../wit/0.1.0",
    world: "plugin",
});
