//! Loading entries that the guest may write at the same moment: the one place in reading memory that is unsafe.
//!
//! `vm-memory` lends one atomic at a time, with all its checks for each; tables have hundreds of entries side by side.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// Loads `entries.len()` words from the start of `slice`, each once and atomically; false if they are not all there or not aligned.
#[inline]
pub(super) fn load_u64<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, entries: &mut [u64]) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr().cast::<AtomicU64>();
    if !first.is_aligned() || slice.len() / 8 < entries.len() {
        return false;
    }
    // SAFETY: a `VolatileSlice` vouches for its bytes being valid for reading while the guard lives. The words are within it and aligned, and atomics may
    // be read while somebody else writes them.
    let words = unsafe { std::slice::from_raw_parts(first, entries.len()) };
    for (entry, word) in entries.iter_mut().zip(words) {
        *entry = word.load(Ordering::Relaxed);
    }
    true
}

/// The same for words of 32 bits.
#[inline]
pub(super) fn load_u32<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, entries: &mut [u64]) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr().cast::<AtomicU32>();
    if !first.is_aligned() || slice.len() / 4 < entries.len() {
        return false;
    }
    // SAFETY: as above.
    let words = unsafe { std::slice::from_raw_parts(first, entries.len()) };
    for (entry, word) in entries.iter_mut().zip(words) {
        *entry = u64::from(word.load(Ordering::Relaxed));
    }
    true
}
