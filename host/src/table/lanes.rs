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

impl Scanned {
    /// This, and what follows.
    const fn and(self, next: Self) -> Self {
        Self {
            count: self.count + next.count,
            gaps: self.gaps + next.gaps,
            outside: self.outside | next.outside,
            uniform: self.uniform & next.uniform,
        }
    }
}

/// Entries that are looked at together: few at first, for runs that end soon. Each block costs a look at what was found, so they grow.
const FIRST_BLOCK: usize = 64;

/// How many of the first `entries` are of these kinds, and whether all addresses in them are in `first..=first + room`.
pub(super) fn scan(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if pattern.kinds.has_gaps() && entries.len() > FIRST_BLOCK && is_x86_feature_detected!("avx512f") {
        // Where tables are full nothing needs to be known about gaps.
        let start = scan_anywhere(&entries[..FIRST_BLOCK], pattern, first, room);
        let rest = &entries[FIRST_BLOCK..];
        if start.count < FIRST_BLOCK {
            return start;
        }
        let more = if start.gaps == 0 {
            scan_anywhere(rest, pattern, first, room)
        } else {
            // SAFETY: the processor has what the function is compiled for.
            unsafe { scan_with_gaps(rest, pattern, first, room) }
        };
        return start.and(more);
    }
    scan_anywhere(entries, pattern, first, room)
}

/// [`scan`] for a processor with wide registers, where there are gaps.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn scan_with_gaps(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_cmpeq_epi64_mask, _mm512_loadu_si512, _mm512_mask_max_epu64, _mm512_mask_xor_epi64,
        _mm512_reduce_max_epu64, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_sub_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
    };
    let Pattern { mask, kinds, address } = pattern;
    let all = |word: u64| _mm512_set1_epi64(word as i64);
    let (pattern_of_first, test, gap) = (all(kinds.pattern()), all(kinds.test()), all(kinds.gap()));
    let (difference, mask_of_all, address_bits, lowest) = (all(kinds.difference()), all(mask), all(address), all(first));
    let (mut count, mut gaps, mut farthest) = (0, 0_u64, _mm512_setzero_si512());
    for eight in entries.as_chunks::<8>().0 {
        // SAFETY: eight words.
        let words = unsafe { _mm512_loadu_si512(eight.as_ptr().cast::<__m512i>()) };
        let absents = _mm512_cmpeq_epi64_mask(words, gap);
        let mut different = _mm512_xor_si512(words, pattern_of_first);
        let second = _mm512_test_epi64_mask(different, test);
        different = _mm512_mask_xor_epi64(different, second, different, difference);
        if _mm512_test_epi64_mask(different, mask_of_all) & !absents != 0 {
            break;
        }
        let distance = _mm512_sub_epi64(_mm512_and_si512(words, address_bits), lowest);
        farthest = _mm512_mask_max_epu64(farthest, !absents, farthest, distance);
        gaps += u64::from(absents.count_ones());
        count += 8;
    }
    let done = Scanned { count, gaps, outside: _mm512_reduce_max_epu64(farthest) > room, uniform: false };
    done.and(scan_anywhere(&entries[count..entries.len().min(count + 8)], pattern, first, room))
}

for_all_lanes! {
    /// [`scan`] on any processor.
    fn scan_anywhere(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
        let Pattern { mask, kinds, address } = pattern;
        let distance_of = |entry: u64| (entry & address).wrapping_sub(first);
        let (mut count, mut gaps, mut farthest, mut uniform) = (0, 0_u64, 0_u64, true);
        let (mut size, mut alike) = (FIRST_BLOCK, true);
        while count < entries.len() {
            let block = &entries[count..entries.len().min(count + size)];
            // What all entries have in common, and what any has, often decides, and costs least: until it did not.
            let (mut any, mut all) = (0, u64::MAX);
            if alike {
                for entry in block {
                    any |= entry;
                    all &= entry;
                }
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
            (uniform, alike) = (false, false);
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

for_all_lanes! {
    /// How many of the first `entries` have `entry & mask == pattern`.
    fn run_length(entries: &[u64], mask: u64, pattern: u64) -> usize {
        let mut count = 0;
        for block in entries.chunks(FIRST_BLOCK) {
            let different = block.iter().fold(0, |different, entry| different | (entry & mask ^ pattern));
            if different != 0 {
                return count + block.iter().take_while(|entry| **entry & mask == pattern).count();
            }
            count += block.len();
        }
        count
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

/// Writes `source` to `target`, addresses kept and patterns replaced; how many leaves are of the second kind, and how many entries are gaps.
pub(super) fn transcode(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if !kinds.is_one() && is_x86_feature_detected!("avx512f") {
        let whole = source.len().min(target.len()) / 8 * 8;
        let (source, rest) = source.split_at(whole);
        let (target, target_rest) = target.split_at_mut(whole);
        // SAFETY: the processor has what the function is compiled for.
        let (others, gaps) = unsafe { transcode_wide::<false>(source, kinds, target, entries) };
        let (more_others, more_gaps) = transcode_anywhere(rest, kinds, target_rest, entries);
        return (others + more_others, gaps + more_gaps);
    }
    transcode_anywhere(source, kinds, target, entries)
}

for_all_lanes! {
    /// [`transcode`] on any processor.
    fn transcode_anywhere(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
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
            return Some(unsafe { transcode_wide::<true>(source, kinds, target, entries) }.0);
        }
    }
    let _ = (source, kinds, target, entries);
    None
}

/// [`transcode`] for a processor with wide registers, past the cache or not. Both slices have the same length, a multiple of 8; past the cache, `target` begins
/// at a multiple of 64 bytes, and there are no gaps.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn transcode_wide<const PAST_CACHE: bool>(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
    use std::arch::x86_64::{
        __m512i, _mm512_cmpeq_epi64_mask, _mm512_loadu_si512, _mm512_mask_mov_epi64, _mm512_mask_xor_epi64, _mm512_set1_epi64, _mm512_storeu_si512,
        _mm512_stream_si512, _mm512_ternarylogic_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
    };
    /// `a & b | c`.
    const AND_OR: i32 = 0b1110_1010;
    let all = |word: u64| _mm512_set1_epi64(word as i64);
    let (pattern, test, gap, absent) = (all(kinds.pattern()), all(kinds.test()), all(kinds.gap()), all(entries.absent));
    let (address, first, difference) = (all(entries.address), all(entries.patterns[0]), all(entries.patterns[0] ^ entries.patterns[1]));
    let (mut others, mut gaps) = (0, 0);
    for (source, target) in source.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<8>().0) {
        // SAFETY: eight words.
        let words = unsafe { _mm512_loadu_si512(source.as_ptr().cast::<__m512i>()) };
        let mut second = _mm512_test_epi64_mask(_mm512_xor_si512(words, pattern), test);
        let mut entry = _mm512_ternarylogic_epi64::<AND_OR>(words, address, first);
        entry = _mm512_mask_xor_epi64(entry, second, entry, difference);
        if kinds.has_gaps() {
            let absents = _mm512_cmpeq_epi64_mask(words, gap);
            entry = _mm512_mask_mov_epi64(entry, absents, absent);
            second &= !absents;
            gaps += u64::from(absents.count_ones());
        }
        others += u64::from(second.count_ones());
        let target = target.as_mut_ptr().cast::<__m512i>();
        if PAST_CACHE {
            // SAFETY: eight words at a multiple of 64 bytes; `Stage` fences before it lets go of the memory.
            unsafe { _mm512_stream_si512(target, entry) };
        } else {
            // SAFETY: eight words.
            unsafe { _mm512_storeu_si512(target, entry) };
        }
    }
    (others, gaps)
}

for_all_lanes! {
    /// Whether each address in `entries` lies within one of `spans`, with a page's last byte at `size_mask`. Absent entries do not count.
    fn all_in_place_within(entries: &[u64], kinds: Kinds, address: u64, spans: &[Span], size_mask: u64) -> bool {
        for block in entries.chunks(FIRST_BLOCK) {
            let mut inside = [0_u64; FIRST_BLOCK];
            if kinds.has_gaps() {
                for (inside, entry) in inside.iter_mut().zip(block) {
                    *inside = u64::from(kinds.is_gap(*entry));
                }
            }
            for span in spans.iter().filter(|span| span.length_minus_one() >= size_mask) {
                let room = span.length_minus_one() - size_mask;
                for (inside, entry) in inside.iter_mut().zip(block) {
                    *inside |= u64::from((entry & address).wrapping_sub(span.first) <= room);
                }
            }
            if inside[..block.len()].iter().fold(1, |all, inside| all & inside) == 0 {
                return false;
            }
        }
        true
    }
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

/// Copies words past the cache where that can be done; [`fence`] must follow before anybody else looks at `target`.
pub(super) fn stream(source: &[u64], target: &mut [u64]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        let fits = |bytes: usize| {
            let aligned = source.as_ptr().addr().is_multiple_of(bytes) && target.as_ptr().addr().is_multiple_of(bytes);
            aligned && source.len() == target.len() && source.len().is_multiple_of(bytes / 8)
        };
        if fits(64) && is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has what the function is compiled for.
            return unsafe { stream_lines(source, target) };
        }
        if fits(16) {
            use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_stream_si128};
            for (source, target) in source.as_chunks::<2>().0.iter().zip(target.as_chunks_mut::<2>().0) {
                // SAFETY: two words, at a multiple of 16 bytes.
                let words = unsafe { _mm_load_si128(source.as_ptr().cast::<__m128i>()) };
                // SAFETY: the same; `Stage` fences before it lets go of the memory.
                unsafe { _mm_stream_si128(target.as_mut_ptr().cast::<__m128i>(), words) };
            }
            return;
        }
    }
    target.copy_from_slice(source);
}

/// [`stream`] for whole lines: with as few stores as can be, so that what comes next need not wait for them.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn stream_lines(source: &[u64], target: &mut [u64]) {
    use std::arch::x86_64::{__m512i, _mm512_load_si512, _mm512_stream_si512};
    for (source, target) in source.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<8>().0) {
        // SAFETY: eight words, at a multiple of 64 bytes.
        let words = unsafe { _mm512_load_si512(source.as_ptr().cast::<__m512i>()) };
        // SAFETY: the same; `Stage` fences before it lets go of the memory.
        unsafe { _mm512_stream_si512(target.as_mut_ptr().cast::<__m512i>(), words) };
    }
}

/// Waits until everything that [`stream`] wrote is visible.
pub(super) fn fence() {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: every x86-64 processor has it.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}
