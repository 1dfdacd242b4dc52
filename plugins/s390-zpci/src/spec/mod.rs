//! Bit layouts and nothing else. Bits are counted from the least significant one, as everywhere in this project: bit 63 of z/Architecture documents
//! is bit 0 here.

pub(crate) mod entry;
pub(crate) mod iota;
