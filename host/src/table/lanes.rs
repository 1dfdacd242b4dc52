//! The loops over entries that decide the speed of a conversion, compiled for the baseline and for wider registers. The loops are plain and safe; what is
//! unsafe is to say that the processor has the registers, after having asked it.
#![allow(unsafe_code)]

use crate::Span;
use crate::table::geometry::Move;
use crate::table::leaves::Kinds;

/// Defines a function whose body is also compiled for wider registers.
macro_rules! for_all_lanes {
    ($(#[$doc:meta])* $access:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) -> $result:ty $body:block) => {
        $(#[$doc])*
        #[allow(clippy::unused_unit)]
        $access fn $name($($argument: $type),*) -> $result {
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

/// Entries that are looked at together: few at first, for runs that end soon. Each block costs a look at what was found, so they grow.
const FIRST_BLOCK: usize = 64;

/// How many of the first `entries` are of these kinds, and whether all addresses in them are in `first..=first + room`.
pub(super) fn scan(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if pattern.kinds.has_gaps() && pattern.moved.mask == 0 && entries.len() > FIRST_BLOCK && has_wide_registers() {
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

/// [`scan`] for a processor with wide registers, where there are gaps and addresses stand in place.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f,popcnt")]
fn scan_with_gaps(entries: &[u64], pattern: Pattern, first: u64, room: u64) -> Scanned {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_cmpeq_epi64_mask, _mm512_loadu_si512, _mm512_mask_max_epu64, _mm512_mask_xor_epi64,
        _mm512_reduce_max_epu64, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_sub_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
    };
    let Pattern { mask, kinds, address, .. } = pattern;
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

/// Registers of 64 bytes, and an instruction that counts what a mask selects.
#[cfg(all(target_arch = "x86_64", not(miri)))]
fn has_wide_registers() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("popcnt")
}

/// Writes `source` to `target`, addresses kept and patterns replaced; how many leaves are of the second kind, and how many entries are gaps.
pub(super) fn transcode(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if !kinds.is_one() && has_wide_registers() {
        let whole = source.len().min(target.len()) / 8 * 8;
        let (source, rest) = source.split_at(whole);
        let (target, target_rest) = target.split_at_mut(whole);
        // SAFETY: the processor has what the function is compiled for.
        let (others, gaps) = unsafe { transcode_wide(source, kinds, target, entries) };
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

/// [`transcode`] for a processor with wide registers. Both slices have the same length, a multiple of 8.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f,popcnt")]
fn transcode_wide(source: &[u64], kinds: Kinds, target: &mut [u64], entries: Target) -> (u64, u64) {
    use std::arch::x86_64::{
        __m512i, _mm512_cmpeq_epi64_mask, _mm512_loadu_si512, _mm512_mask_mov_epi64, _mm512_mask_xor_epi64, _mm512_set1_epi64, _mm512_storeu_si512,
        _mm512_ternarylogic_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
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
        // SAFETY: eight words.
        unsafe { _mm512_storeu_si512(target.as_mut_ptr().cast::<__m512i>(), entry) };
    }
    (others, gaps)
}

/// [`recode`] past the cache, if that can be done here: whole lines, without gaps, and addresses that move as one; [`fence`] must follow. How many leaves are
/// of the second kind.
pub(super) fn recode_past_cache(source: &[u64], kinds: Kinds, target: &mut [u64], form: Form<'_>) -> Option<u64> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if let &[one] = form.moves {
        // Entries of 4 bytes are written sixteen at a time, all others eight.
        let (step, words) = if form.narrow { (16, source.len() / 2) } else { (8, source.len() * form.parts.len()) };
        let whole = source.len().is_multiple_of(step) && words == target.len() && target.as_ptr().addr().is_multiple_of(64);
        let plain = !kinds.has_gaps() && (form.parts.len() == 1 || !form.narrow && !form.big);
        if whole && plain && has_wide_registers() && is_x86_feature_detected!("avx512bw") {
            let recode: unsafe fn(&[u64], Kinds, &mut [u64], Move, Form<'_>) -> u64 = match (one.turn != 0, form.big) {
                (false, false) => recode_streaming::<false, false>,
                (false, true) => recode_streaming::<false, true>,
                (true, false) => recode_streaming::<true, false>,
                (true, true) => recode_streaming::<true, true>,
            };
            // SAFETY: the processor has what the function is compiled for.
            return Some(unsafe { recode(source, kinds, target, one, form) });
        }
    }
    let _ = (source, kinds, target, form);
    None
}

/// The same for a processor with wide registers. `source` has a multiple of 8 entries, of 16 for narrow ones; `target` has just the words for them, and begins
/// at a multiple of 64 bytes.
#[cfg(all(target_arch = "x86_64", not(miri)))]
#[target_feature(enable = "avx512f,avx512bw,popcnt")]
fn recode_streaming<const MOVED: bool, const BIG: bool>(source: &[u64], kinds: Kinds, target: &mut [u64], one: Move, form: Form<'_>) -> u64 {
    use std::arch::x86_64::{
        __m512i, _mm512_castsi256_si512, _mm512_cvtepi64_epi32, _mm512_inserti64x4, _mm512_loadu_si512, _mm512_mask_xor_epi64, _mm512_or_si512,
        _mm512_permutexvar_epi64, _mm512_rolv_epi64, _mm512_set1_epi64, _mm512_set4_epi32, _mm512_shuffle_epi8, _mm512_stream_si512,
        _mm512_ternarylogic_epi64, _mm512_test_epi64_mask, _mm512_xor_si512,
    };
    /// `a & b | c`.
    const AND_OR: i32 = 0b1110_1010;
    let all = |word: u64| _mm512_set1_epi64(word as i64);
    // SAFETY: eight words.
    let load = |words: &[u64; 8]| unsafe { _mm512_loadu_si512(words.as_ptr().cast::<__m512i>()) };
    // SAFETY: eight words at a multiple of 64 bytes, as the whole target is; `Stage` fences before it lets go of the memory.
    let store = |target: &mut [u64; 8], words: __m512i| unsafe { _mm512_stream_si512(target.as_mut_ptr().cast::<__m512i>(), words) };
    let (pattern, test) = (all(kinds.pattern()), all(kinds.test()));
    let (address, turn) = (all(one.apply(u64::MAX)), all(one.turn.into()));
    let (first, difference) = (all(form.patterns[0]), all(form.patterns[0] ^ form.patterns[1]));
    // Within each 16 bytes: every eight of them back to front, or every four.
    let swap_8 = _mm512_set4_epi32(0x0809_0a0b, 0x0c0d_0e0f, 0x0001_0203, 0x0405_0607);
    let swap_4 = _mm512_set4_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203);
    // By value, so that all of it stays in registers.
    let leaves_of = move |source: &[u64; 8]| {
        let words = load(source);
        let second = _mm512_test_epi64_mask(_mm512_xor_si512(words, pattern), test);
        let turned = if MOVED { _mm512_rolv_epi64(words, turn) } else { words };
        let leaves = _mm512_ternarylogic_epi64::<AND_OR>(turned, address, first);
        (_mm512_mask_xor_epi64(leaves, second, leaves, difference), u64::from(second.count_ones()))
    };
    let sources = source.as_chunks::<8>().0;
    let targets = target.as_chunks_mut::<8>().0;
    let mut others = 0;
    if form.narrow {
        for (two, target) in sources.as_chunks::<2>().0.iter().zip(targets) {
            let [(low, of_low), (high, of_high)] = two.each_ref().map(leaves_of);
            let packed = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high));
            others += of_low + of_high;
            store(target, if BIG { _mm512_shuffle_epi8(packed, swap_4) } else { packed });
        }
    } else if form.parts.len() == 1 {
        for (source, target) in sources.iter().zip(targets) {
            let (leaves, seconds) = leaves_of(source);
            others += seconds;
            store(target, if BIG { _mm512_shuffle_epi8(leaves, swap_8) } else { leaves });
        }
    } else {
        let count = form.parts.len();
        for (source, targets) in sources.iter().zip(targets.chunks_exact_mut(count)) {
            let (leaves, seconds) = leaves_of(source);
            others += seconds;
            for (target, (leaf, part)) in targets.iter_mut().zip(form.lines) {
                store(target, _mm512_or_si512(_mm512_permutexvar_epi64(load(leaf), leaves), load(part)));
            }
        }
    }
    others
}

/// How entries are written that [`transcode`] cannot write.
#[derive(Clone, Copy, Debug)]
pub(super) struct Form<'a> {
    /// How addresses move from source to target.
    pub(super) moves: &'a [Move],
    /// The pattern for each of two kinds.
    pub(super) patterns: [u64; 2],
    /// For gaps.
    pub(super) absent: u64,
    /// Each leaf becomes as many entries, with these bits added: a power of two, up to [`MAX_PARTS`].
    pub(super) parts: &'a [u64],
    /// For each line of what eight leaves become: which leaf each word is of, and what is added to it. See [`lines`].
    pub(super) lines: &'a [([u64; 8], [u64; 8])],
    /// Entries of 4 bytes.
    pub(super) narrow: bool,
    /// Most significant byte first.
    pub(super) big: bool,
    /// Entries go past the cache: pairs of them, from an even slot. [`fence`] must follow.
    pub(super) past_cache: bool,
}

/// What [`Form::lines`] is for these parts.
pub(super) fn lines(parts: &[u64]) -> Vec<([u64; 8], [u64; 8])> {
    let line = |line: usize| {
        let slots: [usize; 8] = std::array::from_fn(|word| line * 8 + word);
        (slots.map(|slot| (slot / parts.len()) as u64), slots.map(|slot| parts[slot % parts.len()]))
    };
    (0..parts.len()).map(line).collect()
}

/// Most entries that a leaf becomes.
pub(super) const MAX_PARTS: usize = 1 << 5;

/// Entries that are written together.
const SLOTS: usize = 64;

/// Some of them, at the beginning of a line.
#[repr(align(64))]
struct Slots([u64; SLOTS]);

for_all_lanes! {
    /// Writes `source` to the entries of `target` from `slot`; how many leaves are of the second kind, and how many source entries are gaps.
    pub(super) fn recode(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: Form<'_>) -> (u64, u64) {
        let (mut others, mut gaps) = (0, 0);
        let (mut leaves, mut spread, mut packed) = (Slots([0; SLOTS]), Slots([0; SLOTS]), Slots([0; SLOTS]));
        let mut slot = slot;
        for block in source.chunks(SLOTS / form.parts.len()) {
            let leaves = &mut leaves.0[..block.len()];
            let (also_others, also_gaps) = leaves_of(block, kinds, leaves, form);
            others += also_others;
            gaps += also_gaps;
            let slots = block.len() * form.parts.len();
            let entries = match form.parts.len() {
                1 => leaves,
                2 => spread_over::<2>(block, kinds, leaves, form.parts, &mut spread.0[..slots]),
                4 => spread_over::<4>(block, kinds, leaves, form.parts, &mut spread.0[..slots]),
                8 => spread_over::<8>(block, kinds, leaves, form.parts, &mut spread.0[..slots]),
                16 => spread_over::<16>(block, kinds, leaves, form.parts, &mut spread.0[..slots]),
                _ => spread_over::<MAX_PARTS>(block, kinds, leaves, form.parts, &mut spread.0[..slots]),
            };
            if form.narrow && form.past_cache {
                let packed = &mut packed.0[..slots / 2];
                put_halves(entries, halves(packed), form.big);
                stream(packed, &mut target[slot / 2..][..slots / 2]);
            } else if form.narrow {
                put_halves(entries, &mut halves(target)[slot..slot + slots], form.big);
            } else {
                let target = &mut target[slot..slot + slots];
                if form.big != cfg!(target_endian = "big") {
                    entries.iter_mut().for_each(|entry| *entry = entry.swap_bytes());
                }
                if form.past_cache {
                    stream(entries, target);
                } else {
                    target.copy_from_slice(entries);
                }
            }
            slot += slots;
        }
        (others, gaps)
    }
}

/// The target's entries for `block`, in native byte order; how many leaves are of the second kind, and how many entries are gaps.
#[inline(always)]
fn leaves_of(block: &[u64], kinds: Kinds, leaves: &mut [u64], form: Form<'_>) -> (u64, u64) {
    let [first, second] = form.patterns;
    let (mut others, mut gaps) = (0_u64, 0_u64);
    if kinds.is_one() {
        leaves.fill(first);
    } else {
        for (leaf, source) in leaves.iter_mut().zip(block) {
            let (is_second, gap) = (kinds.is_second(*source), kinds.is_gap(*source));
            *leaf = if is_second { second } else { first };
            others += u64::from(is_second & !gap);
            gaps += u64::from(gap);
        }
    }
    for one in form.moves {
        for (leaf, source) in leaves.iter_mut().zip(block) {
            *leaf |= one.apply(*source);
        }
    }
    if gaps > 0 {
        for (leaf, source) in leaves.iter_mut().zip(block) {
            *leaf = if kinds.is_gap(*source) { form.absent } else { *leaf };
        }
    }
    (others, gaps)
}

/// Each leaf as many times as there are `parts`.
#[inline(always)]
fn spread_over<'a, const PARTS: usize>(block: &[u64], kinds: Kinds, leaves: &[u64], parts: &[u64], spread: &'a mut [u64]) -> &'a mut [u64] {
    let Some(parts) = parts.first_chunk::<PARTS>() else { return spread };
    for ((source, leaf), entries) in block.iter().zip(leaves).zip(spread.as_chunks_mut::<PARTS>().0) {
        let kept = if kinds.is_gap(*source) { 0 } else { u64::MAX };
        for (entry, part) in entries.iter_mut().zip(parts) {
            *entry = leaf | part & kept;
        }
    }
    spread
}

/// Entries of 4 bytes, as they stand in memory.
#[inline(always)]
fn put_halves(entries: &[u64], target: &mut [u32], big: bool) {
    if big {
        target.iter_mut().zip(entries).for_each(|(target, entry)| *target = (*entry as u32).to_be());
    } else {
        target.iter_mut().zip(entries).for_each(|(target, entry)| *target = (*entry as u32).to_le());
    }
}

/// Words as entries of 4 bytes, in the order of memory.
fn halves(words: &mut [u64]) -> &mut [u32] {
    // SAFETY: any 4 bytes are a `u32`, and a word is aligned to hold two.
    unsafe { words.align_to_mut::<u32>().1 }
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
    /// Whether every `parts.len()` entries are one: the first with these bits added, and without any of `below`.
    pub(super) fn are_whole(entries: &[u64], parts: &[u64], below: u64) -> bool {
        let mut different = 0;
        match parts.len() {
            4 => entries.as_chunks::<4>().0.iter().for_each(|group| different |= group_distance(group, parts, below)),
            16 => entries.as_chunks::<16>().0.iter().for_each(|group| different |= group_distance(group, parts, below)),
            count => entries.chunks_exact(count).for_each(|group| different |= group_distance(group, parts, below)),
        }
        different == 0
    }
}

#[inline(always)]
fn group_distance(group: &[u64], parts: &[u64], below: u64) -> u64 {
    let first = group[0];
    group.iter().zip(parts).fold(first & below, |different, (entry, part)| different | (entry ^ part ^ first))
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
