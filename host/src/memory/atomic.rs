//! Loading entries that the guest may write at the same moment: the one place in reading memory that is unsafe.
//!
//! `vm-memory` lends one atomic at a time, with all its checks for each; tables have hundreds of entries side by side.
//!
//! On x86 processors with AVX, aligned loads of 16 bytes are atomic (Intel SDM volume 3, section 10.1.1 "Guaranteed Atomic Operations"; AMD APM volume 2,
//! section 7.3.2 "Access Atomicity"), so that two entries of 8 bytes can be loaded at once and neither is torn. Rust has no such atomic: inline assembly does it.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

#[cfg(all(target_arch = "x86_64", not(miri)))]
use crate::memory::entries::LINE;
use crate::memory::entries::changed_lines;
use crate::table::widen;
#[cfg(all(target_arch = "x86_64", not(miri)))]
use crate::table::{Passage, Registers};

/// Where bytes of guest memory stand in this process. It can be used for one thing: to tell the processor which bytes near them will be read soon. Nothing is
/// read through it, so it may outlive the memory, or point into the void.
#[derive(Clone, Copy, Debug)]
pub struct Nearby(Option<*const u8>);

impl Nearby {
    /// It is not known where the bytes stand.
    pub const UNKNOWN: Self = Self(None);

    /// Tells the processor that `bytes` bytes at `distance` from these will be read soon. A hint: it has no effect that a program could see.
    #[inline]
    pub(crate) fn expect(self, distance: u64, bytes: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        if let Some(first) = self.0 {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            for line in (0..bytes).step_by(64) {
                let at = first.wrapping_add(distance.wrapping_add(line) as usize);
                // SAFETY: a prefetch accesses nothing and faults nowhere, whatever the address is.
                unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
            }
        }
        let _ = (self, distance, bytes);
    }

    /// The bytes at `distance` from these.
    pub(crate) fn at(self, distance: u64) -> Self {
        Self(self.0.map(|first| first.wrapping_add(distance as usize)))
    }
}

/// Where a slice stands.
pub(super) fn nearby<B: BitmapSlice>(slice: &VolatileSlice<'_, B>) -> Nearby {
    Nearby(Some(slice.ptr_guard().as_ptr()))
}

/// Loads the word of 4 or 8 bytes at the start of `slice`, once and atomically; none if it is not all there or not aligned.
#[inline]
pub(super) fn load_one<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, bytes: usize) -> Option<u64> {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr();
    if slice.len() < bytes {
        return None;
    }
    // A `VolatileSlice` vouches for its bytes being valid for reading while the guard lives. The word is within it and aligned, and an atomic may be read while
    // somebody else writes it.
    match (first.cast::<AtomicU64>(), first.cast::<AtomicU32>()) {
        // SAFETY: see above.
        (word, _) if bytes == 8 && word.is_aligned() => Some(unsafe { &*word }.load(Ordering::Relaxed)),
        // SAFETY: see above.
        (_, word) if bytes == 4 && word.is_aligned() => Some(unsafe { &*word }.load(Ordering::Relaxed).into()),
        _ => None,
    }
}

/// Loads `entries.len()` words from the start of `slice`, each once and atomically; false if they are not all there or not aligned.
#[inline]
pub(super) fn load_u64<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, entries: &mut [u64]) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr().cast::<AtomicU64>();
    if !first.is_aligned() || slice.len() / 8 < entries.len() {
        return false;
    }
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if entries.len() >= LINE && entries.len().is_multiple_of(LINE) && first.addr().is_multiple_of(16) && is_x86_feature_detected!("avx") {
        let (from, to, lines) = (first.cast(), entries.as_mut_ptr(), entries.len() / LINE);
        // A `VolatileSlice` vouches for its bytes being valid for reading while the guard lives, and somebody else may write them; `lines` lines are within
        // both. The loads are aligned.
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: see above; the processor has AVX-512F.
            unsafe { load_lines_wide(from, to, lines) };
        } else {
            // SAFETY: see above; the processor has AVX.
            unsafe { load_lines(from, to, lines) };
        }
        return true;
    }
    // SAFETY: a `VolatileSlice` vouches for its bytes being valid for reading while the guard lives. The words are within it and aligned, and atomics may
    // be read while somebody else writes them.
    let words = unsafe { std::slice::from_raw_parts(first, entries.len()) };
    for (entry, word) in entries.iter_mut().zip(words) {
        *entry = word.load(Ordering::Relaxed);
    }
    true
}

/// Copies `lines` lines, 16 bytes with each load: what is wider is joined from them.
///
/// # Safety
/// `from` is a multiple of 16; `lines`, at least one, times 64 bytes from there may be read, and from `to` written. The processor has AVX.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx")]
unsafe fn load_lines(from: *const u8, to: *mut u64, lines: usize) {
    // SAFETY: the caller's promise; no stack, no flags kept.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqa {a:x}, xmmword ptr [{from}]",
            "vmovdqa {b:x}, xmmword ptr [{from} + 32]",
            "vinsertf128 {a:y}, {a:y}, xmmword ptr [{from} + 16], 1",
            "vinsertf128 {b:y}, {b:y}, xmmword ptr [{from} + 48], 1",
            "vmovdqu ymmword ptr [{to}], {a:y}",
            "vmovdqu ymmword ptr [{to} + 32], {b:y}",
            "add {from}, 64",
            "add {to}, 64",
            "dec {lines}",
            "jnz 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            lines = inout(reg) lines => _,
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            options(nostack)
        );
    }
}

/// Loads `known.len()` words from the start of `slice`, each once and atomically, and tells in which lines any is another, with all words of these lines in
/// `fresh`. None: they are not all there or not aligned.
#[inline]
pub(super) fn changed_u64<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, known: &[u64], fresh: &mut [u64]) -> Option<u128> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let guard = slice.ptr_guard();
        let first = guard.as_ptr();
        let whole = known.len().is_multiple_of(LINE) && fresh.len() == known.len() && slice.len() / 8 >= known.len();
        if whole && first.addr().is_multiple_of(16) && is_x86_feature_detected!("avx2") {
            // SAFETY: as for `load_u64`: the lines are within the slice, the loads are aligned, the processor has AVX2.
            return Some(unsafe { compare_lines(first, known, fresh) });
        }
    }
    load_u64(slice, fresh).then(|| changed_lines(known, fresh))
}

/// Compares lines from `from` on with those in `known`. Guest memory is loaded 16 bytes at a time: what is wider is joined from that. Words stay in registers
/// unless they are of a line that differs.
///
/// # Safety
/// `from` is a multiple of 16, and as many bytes as are in `known` may be read there. The processor has AVX2.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx2")]
unsafe fn compare_lines(mut from: *const u8, known: &[u64], fresh: &mut [u64]) -> u128 {
    use std::arch::x86_64::{__m256i, _mm256_loadu_si256, _mm256_or_si256, _mm256_storeu_si256, _mm256_testz_si256, _mm256_xor_si256};
    let mut changed = 0;
    for (line, (known, fresh)) in known.as_chunks::<LINE>().0.iter().zip(fresh.as_chunks_mut::<LINE>().0).enumerate() {
        let (front, back): (__m256i, __m256i);
        // SAFETY: the caller's promise; no stack, no flags, nothing is written.
        unsafe {
            std::arch::asm!(
                "vmovdqa {front:x}, xmmword ptr [{from}]",
                "vinserti128 {front}, {front}, xmmword ptr [{from} + 16], 1",
                "vmovdqa {back:x}, xmmword ptr [{from} + 32]",
                "vinserti128 {back}, {back}, xmmword ptr [{from} + 48], 1",
                from = in(reg) from,
                front = out(ymm_reg) front,
                back = out(ymm_reg) back,
                options(readonly, nostack, preserves_flags)
            );
        }
        from = from.wrapping_add(64);
        let half = LINE / 2;
        // SAFETY: four of the eight words.
        let known_front = unsafe { _mm256_loadu_si256(known.as_ptr().cast()) };
        // SAFETY: the other four.
        let known_back = unsafe { _mm256_loadu_si256(known.as_ptr().wrapping_add(half).cast()) };
        let differs = _mm256_or_si256(_mm256_xor_si256(front, known_front), _mm256_xor_si256(back, known_back));
        if _mm256_testz_si256(differs, differs) == 0 {
            // SAFETY: four of the eight words.
            unsafe { _mm256_storeu_si256(fresh.as_mut_ptr().cast(), front) };
            // SAFETY: the other four.
            unsafe { _mm256_storeu_si256(fresh.as_mut_ptr().wrapping_add(half).cast(), back) };
            changed |= 1 << line;
        }
    }
    changed
}

/// As [`load_lines`], with one store for a line, so that the loads of further ones need not wait.
///
/// # Safety
/// As [`load_lines`]; the processor has AVX-512F.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
unsafe fn load_lines_wide(from: *const u8, to: *mut u64, lines: usize) {
    // SAFETY: the caller's promise; no stack, no flags kept.
    unsafe {
        std::arch::asm!(
            "2:",
            "vmovdqa {a:x}, xmmword ptr [{from}]",
            "vinserti32x4 {a}, {a}, xmmword ptr [{from} + 16], 1",
            "vinserti32x4 {a}, {a}, xmmword ptr [{from} + 32], 2",
            "vinserti32x4 {a}, {a}, xmmword ptr [{from} + 48], 3",
            "vmovdqu64 zmmword ptr [{to}], {a}",
            "add {from}, 64",
            "add {to}, 64",
            "dec {lines}",
            "jnz 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            lines = inout(reg) lines => _,
            a = out(zmm_reg) _,
            options(nostack)
        );
    }
}

/// A whole page of words passes through `passage`, and is kept in `entries`; false if it cannot.
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(super) fn pass_u64<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, entries: &mut [u64; 512], passage: &mut Passage<'_>) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr();
    if !first.addr().is_multiple_of(16) || slice.len() != size_of_val(entries) {
        return false;
    }
    let pass: unsafe fn(_, &mut _, &mut Passage<'_>) = if passage.has_gaps() { pass_lines::<true> } else { pass_lines::<false> };
    // SAFETY: as for `load_u64`: the page is within the slice, the loads are aligned. A passage is only made where the processor has what this needs, for an
    // aligned target.
    unsafe { pass(first, entries, passage) };
    true
}

/// See [`pass_u64`].
///
/// # Safety
/// `from` is a multiple of 16, and a page may be read there; the passage's target is a multiple of 64. The processor has AVX-512F.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
unsafe fn pass_lines<const GAPS: bool>(from: *const u8, entries: &mut [u64; 512], passage: &mut Passage<'_>) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512};
    // All is loaded before any of it is written: loads, and stores past the cache, get in each other's way.
    // SAFETY: the caller's promise: a page is there, and has room; a processor with AVX-512 has AVX.
    unsafe { load_lines_wide(from, entries.as_mut_ptr(), entries.len() / LINE) };
    passage.is_there();
    let (registers, mut found) = Registers::new(passage);
    let target = passage.target();
    for (line, words) in entries.as_chunks::<LINE>().0.iter().enumerate() {
        // SAFETY: eight words.
        let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast::<__m512i>()) };
        // SAFETY: a line of the target, as the caller promises.
        unsafe { registers.line::<GAPS>(words, &mut found, target.wrapping_add(line * LINE)) };
    }
    passage.end(found);
}

/// The same for words of 32 bits.
#[inline]
pub(super) fn load_u32<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, entries: &mut [u64]) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr().cast::<AtomicU32>();
    if !first.is_aligned() || slice.len() / 4 < entries.len() {
        return false;
    }
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if entries.len() >= 2 * LINE && entries.len().is_multiple_of(2 * LINE) && first.addr().is_multiple_of(16) && is_x86_feature_detected!("avx") {
        // What is loaded 16 bytes at a time tears no entry of 4 either.
        let mut words = [0_u64; 16 * LINE];
        for (index, part) in entries.chunks_mut(2 * words.len()).enumerate() {
            let lines = part.len() / (2 * LINE);
            // SAFETY: as for words of 64 bits, some lines at a time: all of them are within the slice, and these fit into `words`.
            unsafe { load_lines(first.cast::<u8>().wrapping_add(index * size_of_val(&words)), words.as_mut_ptr(), lines) };
            widen(&words[..lines * LINE], part);
        }
        return true;
    }
    // SAFETY: as above.
    let words = unsafe { std::slice::from_raw_parts(first, entries.len()) };
    for (entry, word) in entries.iter_mut().zip(words) {
        *entry = u64::from(word.load(Ordering::Relaxed));
    }
    true
}
