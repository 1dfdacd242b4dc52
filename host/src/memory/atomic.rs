//! Loading entries that the guest may write at the same moment: the one place in reading memory that is unsafe.
//!
//! `vm-memory` lends one atomic at a time, with all its checks for each; tables have hundreds of entries side by side.
//!
//! On x86 processors with AVX, aligned loads of 16 bytes are atomic (AMD APM volume 2, section 7.3.2 "Access Atomicity"; Intel SDM volume 3, section 10.1.1 "Guaranteed Atomic
//! Operations", of a few instructions, of which `vmovdqa` is one), so that two entries of 8 bytes can be loaded at once and neither is torn. Rust has no such atomic:
//! inline assembly does it.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{GuestMemoryRegion, MemoryRegionAddress, VolatileSlice};

use crate::memory::EntryLayout;
#[cfg(all(target_arch = "x86_64", not(miri)))]
use crate::memory::entries::LINE;
use crate::memory::entries::changed_lines;
#[cfg(all(target_arch = "x86_64", not(miri)))]
use crate::table::widen;
use crate::table::{ByteOrder, Passing, swap_bytes};

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
        {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            // SAFETY: a prefetch accesses nothing and faults nowhere, whatever the address is.
            self.each_line(distance, bytes, |line| unsafe { _mm_prefetch::<_MM_HINT_T0>(line) });
        }
        let _ = (self, distance, bytes);
    }

    /// The same for what will be read a little later: it need not come nearer than the second cache.
    #[inline]
    pub(crate) fn expect_later(self, distance: u64, bytes: u64) {
        #[cfg(all(target_arch = "x86_64", not(miri)))]
        {
            use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
            // SAFETY: a prefetch accesses nothing and faults nowhere, whatever the address is.
            self.each_line(distance, bytes, |line| unsafe { _mm_prefetch::<_MM_HINT_T1>(line) });
        }
        let _ = (self, distance, bytes);
    }

    #[cfg(all(target_arch = "x86_64", not(miri)))]
    #[inline]
    fn each_line(self, distance: u64, bytes: u64, tell: impl Fn(*const i8)) {
        if let Some(first) = self.0 {
            let lines = (0..bytes).step_by(LINE_BYTES);
            lines.for_each(|line| tell(first.wrapping_add(distance.wrapping_add(line) as usize).cast()));
        }
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

/// Loads the word of 4 or 8 bytes at `offset` into a region, once and atomically; none if it is not all there or not aligned.
#[inline]
pub(super) fn load_in<R: GuestMemoryRegion + ?Sized>(region: &R, offset: u64, bytes: usize) -> Option<u64> {
    load_one(&region.get_slice(MemoryRegionAddress(offset), bytes).ok()?, bytes)
}

/// Bytes of a cache line.
#[cfg(all(target_arch = "x86_64", not(miri)))]
const LINE_BYTES: usize = 8 * LINE;

/// Loads `entries.len()` entries of `layout` from the start of `slice`, each once and atomically; false if they are not all there or not aligned.
#[inline]
pub(super) fn load<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, layout: EntryLayout, entries: &mut [u64]) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr();
    let bytes = usize::from(layout.bytes);
    if !first.addr().is_multiple_of(bytes) || slice.len() / bytes < entries.len() {
        return false;
    }
    let swap = (layout.order == ByteOrder::Big) != cfg!(target_endian = "big");
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if let lines @ 1.. = entries.len() * bytes / LINE_BYTES
        && lines * LINE_BYTES == entries.len() * bytes
        && first.addr().is_multiple_of(16)
        && is_x86_feature_detected!("avx")
    {
        // A `VolatileSlice` vouches for its bytes being valid for reading while the guard lives, and somebody else may write them; `lines` lines are within
        // both. The loads are aligned, and what is loaded 16 bytes at a time tears no entry of 8 or of 4.
        if bytes == 8 && !swap {
            // SAFETY: see above; the processor has AVX.
            unsafe { load_lines(first, entries.as_mut_ptr(), lines) };
            return true;
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
            // SAFETY: see above; the processor has AVX-512F and AVX-512BW.
            unsafe { wide::load(first, bytes == 4, swap, entries) };
            return true;
        }
        if bytes == 8 {
            // SAFETY: see above; the processor has AVX.
            unsafe { load_lines(first, entries.as_mut_ptr(), lines) };
        } else {
            let mut words = [0_u64; 16 * LINE];
            for (index, part) in entries.chunks_mut(2 * words.len()).enumerate() {
                let lines = part.len() / (2 * LINE);
                // SAFETY: as above, some lines at a time: all of them are within the slice, and these fit into `words`.
                unsafe { load_lines(first.wrapping_add(index * size_of_val(&words)), words.as_mut_ptr(), lines) };
                widen(&words[..lines * LINE], part);
            }
        }
        swap_if(swap, layout, entries);
        return true;
    }
    // A `VolatileSlice` vouches for its bytes being valid for reading while the guard lives. The entries are within it and aligned, and atomics may be read
    // while somebody else writes them.
    if bytes == 8 {
        // SAFETY: see above.
        let words = unsafe { std::slice::from_raw_parts(first.cast::<AtomicU64>(), entries.len()) };
        for (entry, word) in entries.iter_mut().zip(words) {
            *entry = word.load(Ordering::Relaxed);
        }
    } else {
        // SAFETY: see above.
        let words = unsafe { std::slice::from_raw_parts(first.cast::<AtomicU32>(), entries.len()) };
        for (entry, word) in entries.iter_mut().zip(words) {
            *entry = u64::from(word.load(Ordering::Relaxed));
        }
    }
    swap_if(swap, layout, entries);
    true
}

fn swap_if(swap: bool, layout: EntryLayout, entries: &mut [u64]) {
    if swap {
        swap_bytes(entries, 64 - u32::from(layout.bytes) * 8);
    }
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
            "vmovdqa {b:x}, xmmword ptr [{from} + 16]",
            "vmovdqa {c:x}, xmmword ptr [{from} + 32]",
            "vmovdqa {d:x}, xmmword ptr [{from} + 48]",
            "vinsertf128 {a:y}, {a:y}, {b:x}, 1",
            "vinsertf128 {c:y}, {c:y}, {d:x}, 1",
            "vmovdqu ymmword ptr [{to}], {a:y}",
            "vmovdqu ymmword ptr [{to} + 32], {c:y}",
            "add {from}, 64",
            "add {to}, 64",
            "dec {lines}",
            "jnz 2b",
            from = inout(reg) from => _,
            to = inout(reg) to => _,
            lines = inout(reg) lines => _,
            a = out(ymm_reg) _,
            b = out(ymm_reg) _,
            c = out(ymm_reg) _,
            d = out(ymm_reg) _,
            options(nostack)
        );
    }
}

/// Loads `known.len()` entries of 8 bytes in the processor's order from the start of `slice`, each once and atomically, and tells in which lines any is another, with all words of these lines in
/// `fresh`. None: they are not all there or not aligned.
#[inline]
pub(super) fn changed_u64<B: BitmapSlice>(slice: &VolatileSlice<'_, B>, layout: EntryLayout, known: &[u64], fresh: &mut [u64]) -> Option<u128> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let guard = slice.ptr_guard();
        let first = guard.as_ptr();
        let whole = known.len().is_multiple_of(LINE) && fresh.len() == known.len() && slice.len() / 8 >= known.len();
        if whole && first.addr().is_multiple_of(16) && is_x86_feature_detected!("avx2") {
            // SAFETY: as for `load`: the lines are within the slice, the loads are aligned, the processor has AVX2.
            return Some(unsafe { compare_lines(first, known, fresh) });
        }
    }
    load(slice, layout, fresh).then(|| changed_lines(known, fresh))
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
                "vmovdqa {second:x}, xmmword ptr [{from} + 16]",
                "vmovdqa {back:x}, xmmword ptr [{from} + 32]",
                "vmovdqa {fourth:x}, xmmword ptr [{from} + 48]",
                "vinserti128 {front}, {front}, {second:x}, 1",
                "vinserti128 {back}, {back}, {fourth:x}, 1",
                from = in(reg) from,
                front = out(ymm_reg) front,
                back = out(ymm_reg) back,
                second = out(ymm_reg) _,
                fourth = out(ymm_reg) _,
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

/// Entries of 8 bytes in the processor's order where a guest may write them: they begin at a multiple of 16, and all of them may be read.
#[derive(Debug)]
pub(crate) struct GuestEntries<'a> {
    first: *const u8,
    count: usize,
    guard: PhantomData<&'a ()>,
}

impl GuestEntries<'_> {
    /// The first of them.
    pub(crate) const fn first(&self) -> *const u8 {
        self.first
    }

    /// How many there are.
    pub(crate) const fn len(&self) -> usize {
        self.count
    }
}

/// [`load`] of entries that are written on at the same time, if that can be done; otherwise `passing` is as it was.
#[inline]
pub(super) fn load_passing<B: BitmapSlice>(
    slice: &VolatileSlice<'_, B>,
    layout: EntryLayout,
    entries: &mut [u64],
    passing: &mut Passing<'_, '_>,
) -> bool {
    let guard = slice.ptr_guard();
    let first = guard.as_ptr();
    if layout.bytes == 8 && layout.order.is_native() && first.addr().is_multiple_of(16) && slice.len() / 8 >= entries.len() {
        // A `VolatileSlice` vouches for its bytes being valid for reading while the guard lives; these are aligned and within it.
        let there = GuestEntries { first, count: entries.len(), guard: PhantomData };
        if passing.read(&there, entries) {
            return true;
        }
    }
    load(slice, layout, entries)
}

/// For processors with registers of 64 bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(super) mod wide {
    use std::arch::asm;
    use std::arch::x86_64::{
        __m256i, __m512i, _mm512_castsi256_si512, _mm512_castsi512_si256, _mm512_cvtepu32_epi64, _mm512_extracti64x4_epi64, _mm512_inserti64x4,
        _mm512_set4_epi32, _mm512_shuffle_epi8, _mm512_storeu_si512,
    };

    use super::LINE;

    /// Loads a line, 16 bytes with each load: one register for a line, so that the loads of further ones need not wait.
    ///
    /// # Safety
    /// `from` is a multiple of 16, and 64 bytes may be read there.
    #[target_feature(enable = "avx512f")]
    #[inline]
    pub(crate) unsafe fn line(from: *const u8) -> __m512i {
        let (front, back): (__m256i, __m256i);
        // SAFETY: the caller's promise; no stack, no flags. Only the first sixteen registers have a short name, which these loads take.
        unsafe {
            asm!(
                "vmovdqa {front:x}, xmmword ptr [{from}]",
                "vmovdqa {second:x}, xmmword ptr [{from} + 16]",
                "vmovdqa {back:x}, xmmword ptr [{from} + 32]",
                "vmovdqa {fourth:x}, xmmword ptr [{from} + 48]",
                "vinserti128 {front}, {front}, {second:x}, 1",
                "vinserti128 {back}, {back}, {fourth:x}, 1",
                from = in(reg) from,
                front = out(ymm_reg) front,
                back = out(ymm_reg) back,
                second = out(ymm_reg) _,
                fourth = out(ymm_reg) _,
                options(nostack, readonly, preserves_flags)
            );
        }
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(front), back)
    }

    /// Loads entries that fill whole lines: entries of 4 bytes, or such as are swapped.
    ///
    /// # Safety
    /// `from` is a multiple of 16, and entries of 4 or 8 bytes may be read there that fill `entries`. The processor has AVX-512F and AVX-512BW.
    pub(super) unsafe fn load(from: *const u8, narrow: bool, swap: bool, entries: &mut [u64]) {
        let load: unsafe fn(*const u8, &mut [u64]) = match (narrow, swap) {
            (false, _) => load_lines::<false, true>,
            (true, false) => load_lines::<true, false>,
            (true, true) => load_lines::<true, true>,
        };
        // SAFETY: the caller's promise.
        unsafe { load(from, entries) };
    }

    /// See [`load`].
    ///
    /// # Safety
    /// As for [`load`].
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn load_lines<const NARROW: bool, const SWAP: bool>(from: *const u8, entries: &mut [u64]) {
        // Within each 16 bytes: every four of them back to front, or every eight.
        let order = if NARROW {
            _mm512_set4_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203)
        } else {
            _mm512_set4_epi32(0x0809_0a0b, 0x0c0d_0e0f, 0x0001_0203, 0x0405_0607)
        };
        let next = |at: usize| {
            // SAFETY: the caller's promise.
            let line = unsafe { line(from.wrapping_add(at * 8 * LINE)) };
            if SWAP { _mm512_shuffle_epi8(line, order) } else { line }
        };
        // SAFETY: eight words.
        let put = |eight: &mut [u64; LINE], line: __m512i| unsafe { _mm512_storeu_si512(eight.as_mut_ptr().cast(), line) };
        let lines = entries.as_chunks_mut::<LINE>().0;
        if NARROW {
            for (at, [low, high]) in lines.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                let line = next(at);
                put(low, _mm512_cvtepu32_epi64(_mm512_castsi512_si256(line)));
                put(high, _mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64::<1>(line)));
            }
        } else {
            for (at, eight) in lines.iter_mut().enumerate() {
                put(eight, next(at));
            }
        }
    }
}
