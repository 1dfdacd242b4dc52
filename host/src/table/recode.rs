//! Entries of one format become entries of another, many at a time: addresses move, patterns are replaced, one becomes several or several become one.
//!
//! As in `lanes`, the loops are plain; for processors with registers of 64 bytes there is one written for them, which does all of it in one pass.
#![allow(unsafe_code)]

use crate::table::geometry::Move;
use crate::table::lanes::{Pattern, for_all_lanes, stream};
use crate::table::leaves::Kinds;

/// How entries are written.
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
    /// Addresses stay where they are, and so do their bytes; one entry for each leaf.
    pub(super) in_place: bool,
    /// Entries go past the cache: pairs of them, from an even slot. [`fence`](crate::table::lanes::fence) must follow.
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

/// Whether everything that [`recode`] does is done in one pass here.
#[inline]
pub(super) fn has_one_pass() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        false
    }
}

/// Writes `source` to the entries of `target` from `slot`; how many leaves are of the second kind, and how many source entries are gaps.
pub(super) fn recode(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: Form<'_>) -> (u64, u64) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass() {
        let (done, others, gaps) = wide::recode(source, kinds, target, slot, form);
        if done == source.len() {
            return (others, gaps);
        }
        let (more_others, more_gaps) = recode_blocks(&source[done..], kinds, target, slot + done * form.parts.len(), form);
        return (others + more_others, gaps + more_gaps);
    }
    if form.in_place && !form.past_cache {
        return transcode(source, kinds, &mut target[slot..slot + source.len()], form);
    }
    recode_blocks(source, kinds, target, slot, form)
}

/// What entries are expected to be: of these kinds, with addresses in `first..=first + room`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Expected {
    pub(super) pattern: Pattern,
    pub(super) first: u64,
    pub(super) room: u64,
}

/// [`recode`], and whether all entries are as expected. None: not with these entries, or not on this processor, and nothing was written.
pub(super) fn recode_expected(source: &[u64], expected: Expected, target: &mut [u64], slot: usize, form: Form<'_>) -> Option<(bool, u64, u64)> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass() {
        return wide::recode_expected(source, expected, target, slot, form);
    }
    let _ = (source, expected, target, slot, form);
    None
}

for_all_lanes! {
    /// [`recode`] where addresses and bytes stay in place.
    fn transcode(source: &[u64], kinds: Kinds, target: &mut [u64], form: Form<'_>) -> (u64, u64) {
        let (patterns, absent) = (form.patterns, form.absent);
        let address = form.moves.iter().fold(0, |mask, one| mask | one.mask);
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

/// Entries that are written together.
const SLOTS: usize = 64;

/// Some of them, at the beginning of a line.
#[repr(align(64))]
struct Slots([u64; SLOTS]);

for_all_lanes! {
    /// [`recode`] on any processor: some entries at a time, which stay in the cache between one step and the next.
    fn recode_blocks(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: Form<'_>) -> (u64, u64) {
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
/// Leaves that make up a larger one.
#[derive(Clone, Debug)]
pub(super) struct Group {
    /// For each of them, a power of two up to [`MAX_PARTS`], the address bits that it has and the first has not.
    parts: Vec<u64>,
    /// Those that the first may not have.
    below: u64,
    /// The parts line by line, and for each word of a line, where in it the first leaf of its group is.
    lines: Vec<([u64; 8], [u64; 8])>,
}

impl Group {
    /// Leaves whose addresses differ by `parts`, the first of which has no address bits in `below`.
    pub(super) fn new(parts: Vec<u64>, below: u64) -> Self {
        let line = |line: usize| {
            (
                std::array::from_fn(|word| (word / parts.len() * parts.len()) as u64),
                std::array::from_fn(|word| parts[(line * 8 + word) % parts.len()]),
            )
        };
        let lines = (0..parts.len().div_ceil(8)).map(line).collect();
        Self { parts, below, lines }
    }

    /// How many leaves there are in a group.
    pub(super) const fn len(&self) -> usize {
        self.parts.len()
    }
}

/// Puts the first leaf of every group into `firsts`; whether all groups are one larger leaf each, or absent together.
pub(super) fn merge(entries: &[u64], kinds: Kinds, group: &Group, firsts: &mut Vec<u64>) -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass() && entries.len().is_multiple_of(8) {
        return wide::merge(entries, kinds, group, firsts);
    }
    firsts.clear();
    match group.len() {
        2 => are_whole::<2>(entries, kinds, group, firsts),
        4 => are_whole::<4>(entries, kinds, group, firsts),
        8 => are_whole::<8>(entries, kinds, group, firsts),
        16 => are_whole::<16>(entries, kinds, group, firsts),
        _ => are_whole::<MAX_PARTS>(entries, kinds, group, firsts),
    }
}

fn are_whole<const PARTS: usize>(entries: &[u64], kinds: Kinds, group: &Group, firsts: &mut Vec<u64>) -> bool {
    let Some(parts) = group.parts.first_chunk::<PARTS>() else { return false };
    let groups = entries.as_chunks::<PARTS>().0;
    firsts.extend(groups.iter().map(|group| group[0]));
    let differ = if kinds.has_gaps() { differ_or_absent(groups, kinds, parts, group.below) } else { differ(groups, parts, group.below) };
    !differ
}

for_all_lanes! {
    /// Whether any of `groups` is not one leaf.
    fn differ<const PARTS: usize>(groups: &[[u64; PARTS]], parts: &[u64; PARTS], below: u64) -> bool {
        let (mut different, mut low) = ([0; PARTS], 0);
        for group in groups {
            low |= group[0];
            for (different, (entry, part)) in different.iter_mut().zip(group.iter().zip(parts)) {
                *different |= entry ^ part ^ group[0];
            }
        }
        different.iter().fold(low & below, |any, different| any | different) != 0
    }
}

for_all_lanes! {
    /// The same where groups may be absent.
    fn differ_or_absent<const PARTS: usize>(groups: &[[u64; PARTS]], kinds: Kinds, parts: &[u64; PARTS], below: u64) -> bool {
        let (mut different, mut low) = ([0; PARTS], 0);
        for group in groups {
            let kept = if kinds.is_gap(group[0]) { 0 } else { u64::MAX };
            low |= group[0] & kept;
            for (different, (entry, part)) in different.iter_mut().zip(group.iter().zip(parts)) {
                *different |= entry ^ part & kept ^ group[0];
            }
        }
        different.iter().fold(low & below, |any, different| any | different) != 0
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
mod wide {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_castsi256_si512, _mm512_cmpneq_epi64_mask, _mm512_cvtepi64_epi32, _mm512_inserti64x4, _mm512_loadu_si512,
        _mm512_mask_max_epu64, _mm512_mask_mov_epi64, _mm512_mask_sub_epi64, _mm512_mask_ternarylogic_epi64, _mm512_mask_test_epi64_mask,
        _mm512_mask_xor_epi64, _mm512_maskz_compress_epi64, _mm512_maskz_mov_epi64, _mm512_or_si512, _mm512_permutexvar_epi64,
        _mm512_reduce_add_epi64, _mm512_reduce_max_epu64, _mm512_reduce_or_epi64, _mm512_rolv_epi64, _mm512_set1_epi64, _mm512_set4_epi32,
        _mm512_setzero_si512, _mm512_shuffle_epi8, _mm512_storeu_si512, _mm512_stream_si512, _mm512_sub_epi64, _mm512_ternarylogic_epi64,
        _mm512_xor_si512,
    };

    use super::{Expected, Form, Group, Kinds, halves};
    use crate::table::geometry::Move;
    use crate::table::lanes::Pattern;

    /// `a & b | c`.
    const AND_OR: i32 = 0b1110_1010;
    /// `a | b & c`.
    const OR_AND: i32 = 0b1111_1000;

    /// Most ways in which the bits of one address move.
    const MAX_MOVES: usize = 4;

    /// Entries that fill whole lines, and what of the target they become.
    struct Lines<'a> {
        source: &'a [u64],
        target: *mut u64,
    }

    /// In how many ways bits move; zero: all stay in place.
    fn moves(expected: Expected, form: Form<'_>) -> usize {
        let stay = expected.pattern.moved.mask == 0 && form.moves.iter().all(|one| one.turn == 0);
        if stay { 0 } else { form.moves.len().max(1) }
    }

    /// As many entries as fill whole lines; none if this cannot be done with them.
    fn lines<'a>(source: &'a [u64], target: &mut [u64], slot: usize, form: Form<'_>) -> Option<Lines<'a>> {
        // Entries of 4 bytes are written sixteen at a time, all others eight.
        let step = if form.narrow && form.parts.len() == 1 { 16 } else { 8 };
        let source = &source[..source.len() / step * step];
        let slots = source.len() * form.parts.len();
        let target =
            if form.narrow { halves(target)[slot..slot + slots].as_mut_ptr().cast::<u64>() } else { target[slot..slot + slots].as_mut_ptr() };
        let possible = form.moves.len() <= MAX_MOVES && (!form.past_cache || target.addr().is_multiple_of(64)) && !source.is_empty();
        possible.then_some(Lines { source, target })
    }

    /// [`recode`](super::recode) of as many entries as fill whole lines; how many these are, how many of them are of the second kind, and how many absent.
    pub(super) fn recode(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: Form<'_>) -> (usize, u64, u64) {
        let Some(lines) = lines(source, target, slot, form) else { return (0, 0, 0) };
        let expected = Expected { pattern: Pattern { mask: 0, kinds, address: 0, moved: Move::default() }, first: 0, room: 0 };
        let recode: unsafe fn(&Lines<'_>, Expected, Form<'_>) -> (bool, u64, u64) = match (kinds.has_gaps(), moves(expected, form)) {
            (false, 0) => recode_lines::<false, false, 0>,
            (true, 0) => recode_lines::<false, true, 0>,
            (false, 1) => recode_lines::<false, false, 1>,
            (false, 2) => recode_lines::<false, false, 2>,
            (false, _) => recode_lines::<false, false, MAX_MOVES>,
            (true, 1) => recode_lines::<false, true, 1>,
            (true, 2) => recode_lines::<false, true, 2>,
            (true, _) => recode_lines::<false, true, MAX_MOVES>,
        };
        // SAFETY: the caller has asked the processor; the target has just the bytes for these entries, and begins at a line where they go past the cache.
        let (_, others, gaps) = unsafe { recode(&lines, expected, form) };
        (lines.source.len(), others, gaps)
    }

    /// See [`recode_expected`](super::recode_expected).
    pub(super) fn recode_expected(source: &[u64], expected: Expected, target: &mut [u64], slot: usize, form: Form<'_>) -> Option<(bool, u64, u64)> {
        let lines = lines(source, target, slot, form).filter(|lines| lines.source.len() == source.len())?;
        let recode: unsafe fn(&Lines<'_>, Expected, Form<'_>) -> (bool, u64, u64) = match (expected.pattern.kinds.has_gaps(), moves(expected, form)) {
            (false, 0) => recode_lines::<true, false, 0>,
            (true, 0) => recode_lines::<true, true, 0>,
            (false, 1) => recode_lines::<true, false, 1>,
            (false, 2) => recode_lines::<true, false, 2>,
            (false, _) => recode_lines::<true, false, MAX_MOVES>,
            (true, 1) => recode_lines::<true, true, 1>,
            (true, 2) => recode_lines::<true, true, 2>,
            (true, _) => recode_lines::<true, true, MAX_MOVES>,
        };
        // SAFETY: as in `recode`.
        Some(unsafe { recode(&lines, expected, form) })
    }

    /// Within each 16 bytes: every eight of them back to front, or every four.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn back_to_front(narrow: bool) -> __m512i {
        if narrow {
            _mm512_set4_epi32(0x0c0d_0e0f, 0x0809_0a0b, 0x0405_0607, 0x0001_0203)
        } else {
            _mm512_set4_epi32(0x0809_0a0b, 0x0c0d_0e0f, 0x0001_0203, 0x0405_0607)
        }
    }

    /// Sixteen words become entries of 4 bytes.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn pack(low: __m512i, high: __m512i) -> __m512i {
        _mm512_inserti64x4::<1>(_mm512_castsi256_si512(_mm512_cvtepi64_epi32(low)), _mm512_cvtepi64_epi32(high))
    }

    /// How leaves are made, and what they are expected to be, in registers.
    #[derive(Clone, Copy)]
    struct Registers<const MOVES: usize> {
        pattern: __m512i,
        test: __m512i,
        gap: __m512i,
        first: __m512i,
        difference: __m512i,
        absent: __m512i,
        one_less: __m512i,
        turns: [__m512i; MOVES],
        masks: [__m512i; MOVES],
        /// Where nothing moves: the bits that are kept.
        kept: __m512i,
        mask: __m512i,
        other: __m512i,
        address: __m512i,
        turn: __m512i,
        moved: __m512i,
        lowest: __m512i,
    }

    /// What was found, for each eighth entry: to move a mask out of its register for each line costs more than to count in others.
    #[derive(Clone, Copy)]
    struct Found {
        others: __m512i,
        present: __m512i,
        unexpected: __m512i,
        farthest: __m512i,
    }

    impl<const MOVES: usize> Registers<MOVES> {
        #[target_feature(enable = "avx512f")]
        #[inline]
        fn new(Expected { pattern, first, .. }: Expected, form: Form<'_>) -> Self {
            let all = |word: u64| _mm512_set1_epi64(word as i64);
            let kinds = pattern.kinds;
            let zero = _mm512_setzero_si512();
            let (mut turns, mut masks) = ([zero; MOVES], [zero; MOVES]);
            for (index, one) in form.moves.iter().enumerate().take(MOVES) {
                (turns[index], masks[index]) = (all(one.turn.into()), all(one.apply(u64::MAX)));
            }
            Self {
                pattern: all(kinds.pattern()),
                test: all(kinds.test()),
                gap: all(kinds.gap()),
                first: all(form.patterns[0]),
                difference: all(form.patterns[0] ^ form.patterns[1]),
                absent: all(form.absent),
                one_less: all(u64::MAX),
                turns,
                masks,
                kept: all(form.moves.first().map_or(0, |one| one.mask)),
                mask: all(pattern.mask),
                other: all(kinds.difference()),
                address: all(pattern.address),
                turn: all(pattern.moved.turn.into()),
                moved: all(pattern.moved.apply(u64::MAX)),
                lowest: all(first),
            }
        }

        /// What becomes of eight entries, and which of its words are leaves: all bits, or none.
        #[target_feature(enable = "avx512f")]
        #[inline]
        fn leaves<const JUDGE: bool, const GAPS: bool>(self, words: &[u64; 8], found: &mut Found) -> (__m512i, __m512i) {
            // SAFETY: eight words.
            let words = unsafe { _mm512_loadu_si512(words.as_ptr().cast::<__m512i>()) };
            let present = if GAPS { _mm512_cmpneq_epi64_mask(words, self.gap) } else { 0xff };
            let different = _mm512_xor_si512(words, self.pattern);
            let second = _mm512_mask_test_epi64_mask(present, different, self.test);
            if JUDGE {
                let different = _mm512_mask_xor_epi64(different, second, different, self.other);
                found.unexpected = _mm512_mask_ternarylogic_epi64::<OR_AND>(found.unexpected, present, different, self.mask);
                let address = _mm512_and_si512(words, self.address);
                let address =
                    if MOVES == 0 { address } else { _mm512_ternarylogic_epi64::<OR_AND>(address, _mm512_rolv_epi64(words, self.turn), self.moved) };
                let distance = _mm512_sub_epi64(address, self.lowest);
                found.farthest = _mm512_mask_max_epu64(found.farthest, present, found.farthest, distance);
            }
            let mut leaves = if MOVES == 0 { _mm512_ternarylogic_epi64::<AND_OR>(words, self.kept, self.first) } else { self.first };
            for index in 0..MOVES {
                leaves = _mm512_ternarylogic_epi64::<OR_AND>(leaves, _mm512_rolv_epi64(words, self.turns[index]), self.masks[index]);
            }
            leaves = _mm512_mask_xor_epi64(leaves, second, leaves, self.difference);
            found.others = _mm512_mask_sub_epi64(found.others, second, found.others, self.one_less);
            if !GAPS {
                return (leaves, self.one_less);
            }
            found.present = _mm512_mask_sub_epi64(found.present, present, found.present, self.one_less);
            (_mm512_mask_mov_epi64(self.absent, present, leaves), _mm512_maskz_mov_epi64(present, self.one_less))
        }
    }

    /// Eight words of a line that several make up: their leaves, with what is added to each.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn spread<const GAPS: bool>((leaf, part): &([u64; 8], [u64; 8]), leaves: __m512i, kept: __m512i) -> __m512i {
        // SAFETY: eight words.
        let load = |words: &[u64; 8]| unsafe { _mm512_loadu_si512(words.as_ptr().cast::<__m512i>()) };
        let (leaf, part) = (load(leaf), load(part));
        let part = if GAPS { _mm512_and_si512(part, _mm512_permutexvar_epi64(leaf, kept)) } else { part };
        _mm512_or_si512(_mm512_permutexvar_epi64(leaf, leaves), part)
    }

    /// See [`merge`](super::merge).
    pub(super) fn merge(entries: &[u64], kinds: Kinds, group: &Group, firsts: &mut Vec<u64>) -> bool {
        let groups = entries.len() / group.len();
        firsts.clear();
        // Lines are written whole.
        firsts.resize(groups + 8, 0);
        // SAFETY: the caller has asked the processor; there is room for a line more than is needed.
        let whole = unsafe {
            if kinds.has_gaps() { merge_lines::<true>(entries, kinds, group, firsts) } else { merge_lines::<false>(entries, kinds, group, firsts) }
        };
        firsts.truncate(groups);
        whole
    }

    /// See [`merge`](super::merge); `firsts` has room for eight more.
    #[target_feature(enable = "avx512f")]
    fn merge_lines<const GAPS: bool>(entries: &[u64], kinds: Kinds, group: &Group, firsts: &mut [u64]) -> bool {
        /// `a ^ b ^ c`.
        const XOR: i32 = 0b1001_0110;
        // SAFETY: eight words.
        let load = |words: &[u64; 8]| unsafe { _mm512_loadu_si512(words.as_ptr().cast::<__m512i>()) };
        let all = |word: u64| _mm512_set1_epi64(word as i64);
        let (gap, below, zero) = (all(kinds.gap()), all(group.below), _mm512_setzero_si512());
        let (mut different, mut low) = (zero, zero);
        // Up to a line has whole groups, or a group has whole lines.
        let per_line = (8 / group.len()).max(1);
        let begins = (0..8).step_by(group.len()).fold(0_u8, |begins, word| begins | 1 << word);
        let mut at = 0;
        for lines in entries.as_chunks::<8>().0.chunks_exact(group.lines.len()) {
            let mut first = zero;
            for (index, (words, (place, part))) in lines.iter().zip(&group.lines).enumerate() {
                let (words, mut part) = (load(words), load(part));
                if index == 0 {
                    first = _mm512_permutexvar_epi64(load(place), words);
                    // SAFETY: eight words: the caller promises that much room.
                    unsafe { _mm512_storeu_si512(firsts[at..at + 8].as_mut_ptr().cast::<__m512i>(), _mm512_maskz_compress_epi64(begins, words)) };
                    at += per_line;
                }
                if GAPS {
                    part = _mm512_maskz_mov_epi64(_mm512_cmpneq_epi64_mask(first, gap), part);
                }
                different = _mm512_or_si512(different, _mm512_ternarylogic_epi64::<XOR>(words, part, first));
            }
            let present = if GAPS { _mm512_cmpneq_epi64_mask(first, gap) } else { 0xff };
            low = _mm512_mask_ternarylogic_epi64::<OR_AND>(low, present, first, below);
        }
        _mm512_reduce_or_epi64(_mm512_or_si512(different, low)) == 0
    }

    /// Recodes whole lines; whether they are as expected, if that is asked for, how many leaves are of the second kind, and how many entries absent.
    ///
    /// # Safety
    /// All entries that the source becomes may be written to the target, which is a multiple of 64 if they go past the cache.
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn recode_lines<const JUDGE: bool, const GAPS: bool, const MOVES: usize>(
        lines: &Lines<'_>,
        expected: Expected,
        form: Form<'_>,
    ) -> (bool, u64, u64) {
        let registers = Registers::<MOVES>::new(expected, form);
        let (swap, zero) = (back_to_front(form.narrow), _mm512_setzero_si512());
        let mut found = Found { others: zero, present: zero, unexpected: zero, farthest: zero };
        let mut at = lines.target.cast::<__m512i>();
        let mut put = |line: __m512i| {
            let line = if form.big { _mm512_shuffle_epi8(line, swap) } else { line };
            // SAFETY: the caller's promise: one line after the other; `Stage` fences before it lets go of the memory.
            unsafe { if form.past_cache { _mm512_stream_si512(at, line) } else { _mm512_storeu_si512(at, line) } };
            at = at.wrapping_add(1);
        };
        let sources = lines.source.as_chunks::<8>().0;
        match (form.parts.len(), form.narrow) {
            (1, false) => {
                for eight in sources {
                    put(registers.leaves::<JUDGE, GAPS>(eight, &mut found).0);
                }
            }
            (1, true) => {
                for [low, high] in sources.as_chunks::<2>().0 {
                    let (low, high) = (registers.leaves::<JUDGE, GAPS>(low, &mut found).0, registers.leaves::<JUDGE, GAPS>(high, &mut found).0);
                    put(pack(low, high));
                }
            }
            (_, false) => {
                for eight in sources {
                    let (leaves, kept) = registers.leaves::<JUDGE, GAPS>(eight, &mut found);
                    for line in form.lines {
                        put(spread::<GAPS>(line, leaves, kept));
                    }
                }
            }
            (_, true) => {
                for eight in sources {
                    let (leaves, kept) = registers.leaves::<JUDGE, GAPS>(eight, &mut found);
                    for [low, high] in form.lines.as_chunks::<2>().0 {
                        put(pack(spread::<GAPS>(low, leaves, kept), spread::<GAPS>(high, leaves, kept)));
                    }
                }
            }
        }
        let sum = |counts| _mm512_reduce_add_epi64(counts).cast_unsigned();
        let gaps = if GAPS { lines.source.len() as u64 - sum(found.present) } else { 0 };
        let as_expected = _mm512_reduce_or_epi64(found.unexpected) == 0 && _mm512_reduce_max_epu64(found.farthest) <= expected.room;
        (as_expected, sum(found.others), gaps)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Attributes;

    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn below(&mut self, bound: u64) -> u64 {
            ((self.next() >> 32) * bound) >> 32
        }
    }

    /// A target and where it begins, for entries of either size.
    fn put(words: &mut [u64], slot: usize, entry: u64, form: Form<'_>) {
        let bytes = if form.narrow { 4 } else { 8 };
        let mut entry = entry.to_le_bytes();
        if form.big {
            entry[..bytes].reverse();
        }
        let (word, at) = (slot * bytes / 8, slot * bytes % 8);
        let mut target = words[word].to_ne_bytes();
        target[at..at + bytes].copy_from_slice(&entry[..bytes]);
        words[word] = u64::from_ne_bytes(target);
    }

    /// What [`recode_expected`] is to find and write, entry by entry.
    fn plainly(source: &[u64], expected: Expected, target: &mut [u64], slot: usize, form: Form<'_>) -> (bool, u64, u64) {
        let (kinds, pattern) = (expected.pattern.kinds, expected.pattern);
        let (mut as_expected, mut others, mut gaps) = (true, 0, 0);
        for (index, entry) in source.iter().enumerate() {
            let gap = kinds.has_gaps() && *entry == kinds.gap();
            let second = kinds.is_second(*entry) && !gap;
            let address = entry & pattern.address | pattern.moved.apply(*entry);
            as_expected &= gap || kinds.leaf_distance(*entry, pattern.mask) == 0 && address.wrapping_sub(expected.first) <= expected.room;
            others += u64::from(second);
            gaps += u64::from(gap);
            for (part, bits) in form.parts.iter().enumerate() {
                let moved = form.moves.iter().fold(0, |all, one| all | one.apply(*entry));
                let leaf = form.patterns[usize::from(second)] | moved | bits;
                put(target, slot + index * form.parts.len() + part, if gap { form.absent } else { leaf }, form);
            }
        }
        (as_expected, others, gaps)
    }

    /// Address bits 12 to 43 of the source, in up to four parts that move by different distances, to wherever they do not meet patterns.
    fn some_moves(random: &mut Random, narrow: bool) -> Vec<Move> {
        if narrow {
            let turn = 64 - [0, 2, 8][random.below(3) as usize];
            return vec![Move { mask: 0xffff_f000, turn: turn % 64 }];
        }
        let whole = 0xfff_ffff_f000_u64;
        match random.below(5) {
            0 => vec![Move { mask: whole, turn: 0 }],
            1 => vec![Move { mask: whole, turn: 62 }],
            count => (0..count).map(|index| Move { mask: whole & 0xff_0000_0ff0 << (index * 8), turn: (index * 63 % 64) as u32 }).collect(),
        }
    }

    fn first_difference(words: &[u64], wanted: &[u64]) -> Option<(usize, u64, u64)> {
        words.iter().zip(wanted).enumerate().find(|(_, (word, wanted))| word != wanted).map(|(index, (word, wanted))| (index, *word, *wanted))
    }

    #[test]
    fn all_forms_are_written_as_entry_by_entry() {
        let mut random = Random(0x5eed);
        let (mut judged, mut unexpected) = (0, 0);
        for round in 0..6000 {
            let (narrow, big) = (random.below(2) == 0, random.below(2) == 0);
            let moves = some_moves(&mut random, narrow);
            let parts = 1_usize << if random.below(2) == 0 { 0 } else { random.below(6) };
            // Patterns below the address; parts in bits that no pattern and no address has.
            let parts: Vec<u64> = (0..parts as u64).map(|part| if narrow { part << 4 & 0xf0 } else { part << 58 }).collect();
            let lines = lines(&parts);
            let patterns = [random.below(8) | 1, random.below(8) | 1];
            let in_place = parts.len() == 1 && !narrow && !big && moves.iter().all(|one| one.turn == 0);
            let absent = [0, 0x400][random.below(2) as usize];
            let mut kinds = Kinds::one(3, Attributes::READ);
            if random.below(2) == 0 {
                kinds = kinds.with(3 | [1 << 7, 1 << 54, 0x11 << 6][random.below(3) as usize], Attributes::READ);
            }
            if random.below(2) == 0 {
                kinds = kinds.with_gaps([0, 0x400][random.below(2) as usize]);
            }
            let whole = if narrow { 0xffff_f000_u64 } else { 0xfff_ffff_f000 };
            let moved = if round % 3 == 0 { Move { mask: whole, turn: 62 } } else { Move::default() };
            let address = if moved.mask == 0 { whole } else { 0 };
            let (first, room) = if random.below(2) == 0 { (0, u64::MAX >> 8) } else { (0x1000, whole >> 2) };
            let expected = Expected { pattern: Pattern { mask: !whole, kinds, address, moved }, first, room };
            let count = [8, 16, 64, 512, 1 + random.below(100)][random.below(5) as usize] as usize;
            let (some_gaps, odd) = (random.below(2), random.below(4) == 0);
            let source: Vec<u64> = (0..count)
                .map(|_| {
                    let leaf = (random.next() & whole >> 3).max(0x8000) & whole
                        | if random.below(3) == 0 { kinds.pattern() ^ kinds.difference() } else { 3 };
                    match random.below(64) {
                        0..8 if some_gaps == 1 && kinds.has_gaps() => kinds.gap(),
                        8 if odd => leaf ^ 1 << random.below(if narrow { 32 } else { 64 }),
                        _ => leaf,
                    }
                })
                .collect();
            let slots = count * parts.len();
            let slot = [0, 0, 8, 16, 64, 2 * random.below(20)][random.below(6) as usize] as usize;
            let past_cache = random.below(2) == 0 && (!narrow || slots.is_multiple_of(2));
            let form = Form { moves: &moves, patterns, absent, parts: &parts, lines: &lines, narrow, big, in_place, past_cache };
            // Aligned to a line, as tables are.
            let mut memory = vec![0xdead_beef_u64; 8 + slot + slots + 8];
            let aligned = memory.as_ptr().align_offset(64);
            let before = memory.clone();
            let mut wanted = memory.clone();
            let found = plainly(&source, expected, &mut wanted[aligned..], slot, form);
            let counts = recode(&source, kinds, &mut memory[aligned..], slot, form);
            crate::table::lanes::fence();
            assert_eq!(counts, (found.1, found.2), "round {round}: {form:?}");
            assert_eq!(first_difference(&memory, &wanted), None, "round {round}: {form:?}");
            let mut memory = before;
            // Where it is aligned otherwise, it cannot go past the cache.
            let aligned = memory.as_ptr().align_offset(64);
            let mut wanted = memory.clone();
            plainly(&source, expected, &mut wanted[aligned..], slot, form);
            if let Some((as_expected, others, gaps)) = recode_expected(&source, expected, &mut memory[aligned..], slot, form) {
                crate::table::lanes::fence();
                assert_eq!((as_expected, others, gaps), found, "round {round}: {expected:?} {form:?}");
                assert_eq!(first_difference(&memory, &wanted), None, "round {round}: {form:?}");
                judged += 1;
                unexpected += u64::from(!as_expected);
            }
        }
        assert!(!has_one_pass() || judged > 1000 && unexpected > 100 && unexpected < judged / 2, "{judged}, {unexpected} unexpected");
    }

    #[test]
    fn groups_are_whole_where_each_entry_says_so() {
        let mut random = Random(0x3eed);
        let mut whole = 0;
        for round in 0..4000 {
            let parts = 1_u64 << (1 + random.below(5));
            let group = Group::new((0..parts).map(|part| part << 12).collect(), (parts - 1) << 12);
            let mut kinds = Kinds::one(3, Attributes::READ);
            if random.below(2) == 0 {
                kinds = kinds.with_gaps(0);
            }
            let absent = random.below(2) == 0;
            let mut entries: Vec<u64> = Vec::new();
            for _ in 0..[1, 16, 32, 1 + random.below(40)][random.below(4) as usize] {
                let first = random.next() & 0xffff_ffff_f000 & !group.below | 3;
                let gap = absent && random.below(3) == 0;
                entries.extend(group.parts.iter().map(|part| if gap { 0 } else { first | part }));
            }
            if random.below(2) == 0 {
                let place = random.below(entries.len() as u64) as usize;
                entries[place] ^= 1 << random.below(64);
            }
            let is_whole = |entries: &[u64]| {
                let gap = kinds.has_gaps() && entries.iter().all(|entry| *entry == kinds.gap());
                let begins = entries[0] & group.below == 0;
                gap || begins && entries.iter().zip(&group.parts).all(|(entry, part)| *entry == entries[0] ^ part)
            };
            let wanted = entries.chunks(parts as usize).all(is_whole);
            let mut firsts = vec![7];
            assert_eq!(merge(&entries, kinds, &group, &mut firsts), wanted, "round {round}");
            assert!(firsts.iter().eq(entries.iter().step_by(parts as usize)), "round {round}");
            whole += u64::from(wanted);
        }
        assert!((500..3500).contains(&whole), "{whole}");
    }
}
