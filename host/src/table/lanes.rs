//! The loops over entries that decide the speed of a conversion, compiled for the baseline and for wider registers. The loops are plain and safe; what is
//! unsafe is to say that the processor has the registers, after having asked it.
#![allow(unsafe_code)]

use crate::Span;
use crate::table::walk::Kinds;

/// Defines a function whose body is also compiled for wider registers.
macro_rules! for_all_lanes {
    ($(#[$doc:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$doc])*
        pub(super) fn $name($($argument: $type),*) -> $result {
            #[inline(always)]
            fn plain($($argument: $type),*) -> $result $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
                fn avx512($($argument: $type),*) -> $result {
                    plain($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2($($argument: $type),*) -> $result {
                    plain($($argument),*)
                }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { avx512($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { avx2($($argument),*) };
                }
            }
            plain($($argument),*)
        }
    };
}

/// What entries of one or two kinds have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// Bits that are not address.
    pub(super) mask: u64,
    pub(super) kinds: Kinds,
    /// Address bits, which stand in place.
    pub(super) address: u64,
}

/// What was found at the start of some entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanned {
    /// Entries of the kinds that were looked for.
    pub(super) count: usize,
    /// How many of them are absent.
    pub(super) gaps: u64,
    /// Whether the address of any other is out of bounds.
    pub(super) outside: bool,
    /// All of them are leaves of the first kind.
    pub(super) uniform: bool,
}

/// Entries that are looked at together: few at first, for runs that end soon. Each block costs a look at what was found, so they grow.
const FIRST_BLOCK: usize = 64;

for_all_lanes! {
    /// How many of the first `entries` are of these kinds, and whether all addresses in them are in `first..=first + room`.
    fn scan(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
        let Pattern { mask, kinds, address } = pattern;
        let distance_of = |entry: u64| (entry & address).wrapping_sub(first);
        let (mut count, mut gaps, mut farthest, mut uniform) = (0, 0_u64, 0_u64, true);
        let mut size = FIRST_BLOCK;
        while count < entries.len() {
            let block = &entries[count..entries.len().min(count + size)];
            // What all entries have in common, and what any has, often decides, and costs least.
            let (mut any, mut all) = (0, u64::MAX);
            for entry in block {
                any |= entry;
                all &= entry;
            }
            let varying = (any ^ all) & mask;
            if varying & !kinds.only_difference() == 0 && kinds.leaf_distance(all, mask) == 0 {
                uniform &= varying == 0 && !kinds.is_second(all);
                // The lowest and the highest address are between these two.
                if (all & address < first) | (distance_of(any) > room) {
                    for entry in block {
                        farthest = farthest.max(distance_of(*entry));
                    }
                }
                count += block.len();
                size *= 8;
                continue;
            }
            uniform = false;
            let (mut different, mut also_gaps, mut also_farthest) = (0, 0_u64, 0_u64);
            if kinds.is_one() {
                for entry in block {
                    different |= (entry ^ kinds.pattern()) & mask;
                    also_farthest = also_farthest.max(distance_of(*entry));
                }
            } else if !kinds.has_gaps() {
                for entry in block {
                    different |= kinds.leaf_distance(*entry, mask);
                    also_farthest = also_farthest.max(distance_of(*entry));
                }
            } else {
                for entry in block {
                    let gap = kinds.is_gap(*entry);
                    different |= kinds.distance(*entry, mask);
                    also_farthest = also_farthest.max(if gap { 0 } else { distance_of(*entry) });
                    also_gaps += u64::from(gap);
                }
            }
            if different != 0 {
                for entry in block.iter().take_while(|entry| kinds.distance(**entry, mask) == 0) {
                    let gap = kinds.is_gap(*entry);
                    farthest = farthest.max(if gap { 0 } else { distance_of(*entry) });
                    gaps += u64::from(gap);
                    count += 1;
                }
                break;
            }
            farthest = farthest.max(also_farthest);
            gaps += also_gaps;
            count += block.len();
            size *= 8;
        }
        Scanned { count, gaps, outside: farthest > room, uniform }
    }
}

/// The entries to be written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    /// The pattern for each of two kinds.
    pub(super) patterns: [u64; 2],
    /// For gaps.
    pub(super) absent: u64,
    /// Address bits, which stand in place in source and target.
    pub(super) address: u64,
}

for_all_lanes! {
    /// Writes `source` to `target`, addresses kept and patterns replaced; how many leaves are of the second kind, and how many entries are gaps.
    fn transcode(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
        let Target { patterns, absent, address } = entries;
        if kinds.is_one() {
            for (target, source) in target.iter_mut().zip(source) {
                *target = patterns[0] | source & address;
            }
            return (0, 0);
        }
        let leaf = |source: u64| (if kinds.is_second(source) { patterns[1] } else { patterns[0] }) | source & address;
        let (mut others, mut gaps) = (0_u64, 0_u64);
        if !kinds.has_gaps() {
            for (target, source) in target.iter_mut().zip(source) {
                *target = leaf(*source);
                others += u64::from(kinds.is_second(*source));
            }
            return (others, 0);
        }
        for (target, source) in target.iter_mut().zip(source) {
            let gap = kinds.is_gap(*source);
            *target = if gap { absent } else { leaf(*source) };
            others += u64::from(kinds.is_second(*source) & !gap);
            gaps += u64::from(gap);
        }
        (others, gaps)
    }
}

/// [`transcode`] past the cache, if that can be done here: without gaps, for whole lines; [`fence`] must follow.
pub(super) fn transcode_past_cache(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> Option<u64> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let whole = source.len() == target.len() && source.len().is_multiple_of(8) && target.as_ptr().addr().is_multiple_of(64);
        if whole && !kinds.has_gaps() && is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function is compiled for.
            return Some(unsafe { transcode_streaming(source, kinds, target, entries) });
        }
    }
    let _ = (source, kinds, target, entries);
    None
}

/// The same for a processor with wide registers. Both slices have the same length, a multiple of 8, and `target` begins at a multiple of 64 bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn transcode_streaming(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> u64 {
    use std::arch::x86_64::{
        __m512i, _mm512_loadu_si512, _mm512_mask_xor_epi64, _mm512_set1_epi64, _mm512_stream_si512, _mm512_ternarylogic_epi64,
        _mm512_test_epi64_mask, _mm512_xor_si512,
    };
    /// `a & b | c`.
    const AND_OR: i32 = 0b1110_1010;
    let all = |word: u64| _mm512_set1_epi64(word as i64);
    let (pattern, test) = (all(kinds.pattern()), all(kinds.test()));
    let (address, first, difference) = (all(entries.address), all(entries.patterns[0]), all(entries.patterns[0] ^ entries.patterns[1]));
    let mut others = 0;
    for (source, target) in source.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<8>().0) {
        // SAFETY: eight words.
        let words = unsafe { _mm512_loadu_si512(source.as_ptr().cast::<__m512i>()) };
        let second = _mm512_test_epi64_mask(_mm512_xor_si512(words, pattern), test);
        let leaf = _mm512_ternarylogic_epi64::<AND_OR>(words, address, first);
        let leaf = _mm512_mask_xor_epi64(leaf, second, leaf, difference);
        others += u64::from(second.count_ones());
        // SAFETY: eight words at a multiple of 64 bytes; `Stage` fences before it lets go of the memory.
        unsafe { _mm512_stream_si512(target.as_mut_ptr().cast::<__m512i>(), leaf) };
    }
    others
}

/// Whether each target of the run lies within one of `spans`, up to its last byte. For few spans, all of them below 2^63, and addresses too.
pub(super) fn all_within(addresses: impl Iterator<Item = u64>, spans: &[Span], size_mask: u64) -> bool {
    let outside = |address: u64, span: &Span| address.wrapping_sub(span.first) | (span.last - size_mask).wrapping_sub(address);
    let all = addresses.fold(0, |all, address| all | spans.iter().fold(u64::MAX, |none, span| none & outside(address, span)));
    all >> 63 == 0
}

/// Tells the processor that `words` will be written soon.
#[inline]
pub(super) fn prefetch(words: &mut [u64]) {
    #[cfg(target_arch = "x86_64")]
    for line in words.chunks_mut(8) {
        use std::arch::x86_64::{_MM_HINT_ET0, _mm_prefetch};
        // SAFETY: a prefetch is a hint and changes nothing; the address is within the slice.
        unsafe { _mm_prefetch::<_MM_HINT_ET0>(line.as_ptr().cast()) };
    }
    let _ = words;
}

/// Whether [`stream`] goes past the cache.
pub(super) const STREAMS: bool = cfg!(all(target_arch = "x86_64", not(miri)));

/// Copies words past the cache where both begin at a multiple of 16 bytes; [`fence`] must follow before anybody else looks at `target`.
pub(super) fn stream(source: &[u64], target: &mut [u64]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if source.as_ptr().addr().is_multiple_of(16) && target.as_ptr().addr().is_multiple_of(16) && source.len().is_multiple_of(2) {
        use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_stream_si128};
        for (source, target) in source.as_chunks::<2>().0.iter().zip(target.as_chunks_mut::<2>().0) {
            // SAFETY: two words, at a multiple of 16 bytes.
            let words = unsafe { _mm_load_si128(source.as_ptr().cast::<__m128i>()) };
            // SAFETY: the same; `Stage` fences before it lets go of the memory.
            unsafe { _mm_stream_si128(target.as_mut_ptr().cast::<__m128i>(), words) };
        }
        return;
    }
    target.copy_from_slice(source);
}

/// Waits until everything that [`stream`] wrote is visible.
pub(super) fn fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
