//! The loops over entries that decide the speed of a conversion, compiled for the baseline and for wider registers. The loops are plain and safe; what is
//! unsafe is to say that the processor has the registers, after having asked it.
#![allow(unsafe_code)]

use crate::Span;
use crate::table::geometry::Move;
use crate::table::leaves::Kinds;

/// Defines a function whose body is also compiled for wider registers.
macro_rules! for_all_lanes {
    ($(#[$doc:meta])* $access:vis fn $name:ident$(<const $count:ident: usize>)?($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$doc])*
        #[allow(clippy::unused_unit)]
        $access fn $name$(<const $count: usize>)?($($argument: $type),*) -> $result {
            #[inline(always)]
            fn plain$(<const $count: usize>)?($($argument: $type),*) -> $result $body
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
                fn avx512$(<const $count: usize>)?($($argument: $type),*) -> $result {
                    plain$(::<$count>)?($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn avx2$(<const $count: usize>)?($($argument: $type),*) -> $result {
                    plain$(::<$count>)?($($argument),*)
                }
                if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512dq") && is_x86_feature_detected!("avx512vl") {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { avx512$(::<$count>)?($($argument),*) };
                }
                if is_x86_feature_detected!("avx2") {
                    // SAFETY: the processor has what the function is compiled for.
                    return unsafe { avx2$(::<$count>)?($($argument),*) };
                }
            }
            plain$(::<$count>)?($($argument),*)
        }
    };
}
pub(super) use for_all_lanes;

/// What entries of one or two kinds have in common.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pattern {
    /// Bits that are not address.
    pub(super) mask: u64,
    pub(super) kinds: Kinds,
    /// Address bits that stand in place.
    pub(super) address: u64,
    /// Those that do not.
    pub(super) moved: Move,
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

/// Entries that are looked at together: few at first, for runs that end soon. Each block costs a look at what was found, so on most processors they grow.
const FIRST_BLOCK: usize = 64;

/// How many of the first `entries` are of these kinds, and whether all addresses in them are in `first..=first + room`.
pub(super) fn scan(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if entries.len() >= FIRST_BLOCK && is_x86_feature_detected!("avx512f") {
        let scan: unsafe fn(&[u64], Pattern, u64, u64) -> Scanned = match (pattern.kinds.has_gaps(), pattern.moved.mask != 0) {
            (false, false) => scan_blocks::<false, false>,
            (false, true) => scan_blocks::<false, true>,
            (true, false) => scan_blocks::<true, false>,
            (true, true) => scan_blocks::<true, true>,
        };
        // SAFETY: the processor has what the function is compiled for.
        let done = unsafe { scan(entries, pattern, first, room) };
        let rest = &entries[done.count..];
        // What comes next is either not of these kinds, soon, or less than a block.
        return if rest.is_empty() { done } else { done.and(scan_anywhere(&rest[..rest.len().min(FIRST_BLOCK)], pattern, first, room)) };
    }
    scan_anywhere(entries, pattern, first, room)
}

/// The whole blocks that [`scan`] begins with, for a processor with wide registers.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn scan_blocks<const GAPS: bool, const MOVED: bool>(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_cmpneq_epi64_mask, _mm512_loadu_si512, _mm512_mask_max_epu64, _mm512_mask_or_epi64, _mm512_mask_sub_epi64,
        _mm512_mask_ternarylogic_epi64, _mm512_mask_test_epi64_mask, _mm512_mask_xor_epi64, _mm512_reduce_add_epi64, _mm512_reduce_max_epu64,
        _mm512_rolv_epi64, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_sub_epi64, _mm512_ternarylogic_epi64, _mm512_test_epi64_mask,
        _mm512_xor_si512,
    };
    /// `a | b & c`.
    const OR_AND: i32 = 0b1111_1000;
    let Pattern { mask, kinds, address, moved } = pattern;
    let all = |word: u64| _mm512_set1_epi64(word as i64);
    let (pattern_of_first, test, gap, one_less) = (all(kinds.pattern()), all(kinds.test()), all(kinds.gap()), all(u64::MAX));
    let (difference, mask_of_all, address_bits, lowest) = (all(kinds.difference()), all(mask), all(address), all(first));
    let (turn, moved_bits, zero) = (all(moved.turn.into()), all(moved.apply(u64::MAX)), _mm512_setzero_si512());
    let (mut count, mut present_of_all, mut farthest_of_all, mut seconds_of_all) = (0, zero, zero, zero);
    for block in entries.as_chunks::<FIRST_BLOCK>().0 {
        let (mut unexpected, mut presents, mut farthest, mut seconds) = (zero, present_of_all, farthest_of_all, seconds_of_all);
        for eight in block.as_chunks::<8>().0 {
            // SAFETY: eight words.
            let words = unsafe { _mm512_loadu_si512(eight.as_ptr().cast::<__m512i>()) };
            let present = if GAPS { _mm512_cmpneq_epi64_mask(words, gap) } else { 0xff };
            let different = _mm512_xor_si512(words, pattern_of_first);
            let second = _mm512_mask_test_epi64_mask(present, different, test);
            seconds = _mm512_mask_or_epi64(seconds, second, one_less, one_less);
            let different = _mm512_mask_xor_epi64(different, second, different, difference);
            unexpected = _mm512_mask_ternarylogic_epi64::<OR_AND>(unexpected, present, different, mask_of_all);
            let address = _mm512_and_si512(words, address_bits);
            let address = if MOVED { _mm512_ternarylogic_epi64::<OR_AND>(address, _mm512_rolv_epi64(words, turn), moved_bits) } else { address };
            farthest = _mm512_mask_max_epu64(farthest, present, farthest, _mm512_sub_epi64(address, lowest));
            if GAPS {
                presents = _mm512_mask_sub_epi64(presents, present, presents, one_less);
            }
        }
        if _mm512_test_epi64_mask(unexpected, unexpected) != 0 {
            break;
        }
        (present_of_all, farthest_of_all, seconds_of_all) = (presents, farthest, seconds);
        count += FIRST_BLOCK;
    }
    let gaps = if GAPS { count as u64 - _mm512_reduce_add_epi64(present_of_all).cast_unsigned() } else { 0 };
    let uniform = gaps == 0 && _mm512_test_epi64_mask(seconds_of_all, seconds_of_all) == 0;
    Scanned { count, gaps, outside: _mm512_reduce_max_epu64(farthest_of_all) > room, uniform }
}

for_all_lanes! {
    /// [`scan`] on any processor.
    fn scan_anywhere(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
        if pattern.moved.mask == 0 { scan_as::<false>(entries, pattern, first, room) } else { scan_as::<true>(entries, pattern, first, room) }
    }
}

/// The loop of [`scan`], for addresses of which some bits move, or none.
#[inline(always)]
fn scan_as<const MOVED: bool>(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    let Pattern { mask, kinds, address, moved } = pattern;
    let address_of = |entry: u64| entry & address | if MOVED { moved.apply(entry) } else { 0 };
    let distance_of = |entry: u64| address_of(entry).wrapping_sub(first);
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
            if (address_of(all) < first) | (distance_of(any) > room) {
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

for_all_lanes! {
    /// How many of the first groups of `group` entries (a power of two) have the same entry in all places; these entries, one of each group, go to `firsts`.
    pub(super) fn repeated(entries: &[u64], group: usize, firsts: &mut [u64]) -> usize {
        let mut count = 0;
        for (entries, target) in entries.chunks_exact(group).zip(firsts) {
            let first = entries[0];
            if entries.iter().fold(0, |different, entry| different | (entry ^ first)) != 0 {
                break;
            }
            *target = first;
            count += 1;
        }
        count
    }
}

for_all_lanes! {
    /// How many of the first `entries` have `entry & mask == pattern`.
    pub(super) fn run_length(entries: &[u64], mask: u64, pattern: u64) -> usize {
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

for_all_lanes! {
    /// Swaps the bytes of entries of 8 bytes, or of 4 that were widened.
    pub(crate) fn swap_bytes(entries: &mut [u64], unused: u32) -> () {
        for entry in entries {
            *entry = entry.swap_bytes() >> unused;
        }
    }
}

for_all_lanes! {
    /// Entries of 4 bytes, two to a word in the order of memory, to one per word.
    pub(crate) fn widen(words: &[u64], entries: &mut [u64]) -> () {
        for (two, word) in entries.as_chunks_mut::<2>().0.iter_mut().zip(words) {
            let (low, high) = (word & 0xffff_ffff, word >> 32);
            *two = if cfg!(target_endian = "big") { [high, low] } else { [low, high] };
        }
    }
}

for_all_lanes! {
    /// Whether anywhere the first two of `group` entries (a power of two) are in a row: the first without any of `below`, the second like it with `next` added,
    /// in the bits of `mask`.
    pub(super) fn any_in_a_row(entries: &[u64], group: usize, below: u64, next: u64, mask: u64) -> bool {
        let pair = |first: u64, second: u64| u64::from((first & below) | (first ^ second ^ next) & mask == 0);
        if group == 2 {
            return entries.as_chunks::<2>().0.iter().fold(0, |any, [first, second]| any | pair(*first, *second)) != 0;
        }
        entries.chunks_exact(group).fold(0, |any, group| any | pair(group[0], group[1])) != 0
    }
}

for_all_lanes! {
    /// Whether each address in `entries` lies within one of `spans`, with a page's last byte at `size_mask`. Absent entries do not count.
    pub(super) fn all_in_place_within(entries: &[u64], kinds: Kinds, address: u64, spans: &[Span], size_mask: u64) -> bool {
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

/// Copies words past the cache where both begin at a multiple of 16 bytes; [`fence`] must follow before anybody else looks at `target`.
pub(super) fn stream(source: &[u64], target: &mut [u64]) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if target.as_ptr().addr().is_multiple_of(64) && source.len().is_multiple_of(8) && is_x86_feature_detected!("avx512f") {
        // SAFETY: the processor has what the function is compiled for.
        unsafe { stream_lines(source, target) };
        return;
    }
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

/// Copies whole lines past the cache to a multiple of 64 bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f")]
fn stream_lines(source: &[u64], target: &mut [u64]) {
    use std::arch::x86_64::{__m512i, _mm512_loadu_si512, _mm512_stream_si512};
    for (source, target) in source.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<8>().0) {
        // SAFETY: eight words.
        let words = unsafe { _mm512_loadu_si512(source.as_ptr().cast::<__m512i>()) };
        // SAFETY: eight words at a multiple of 64 bytes; `Stage` fences before it lets go of the memory.
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
