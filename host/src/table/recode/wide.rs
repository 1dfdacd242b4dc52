//! All in one pass, for processors with registers of 64 bytes.

use std::arch::x86_64::{
    __m512i, _mm512_and_si512, _mm512_castsi256_si512, _mm512_cmpneq_epi64_mask, _mm512_cvtepi64_epi32, _mm512_inserti64x4, _mm512_loadu_si512,
    _mm512_mask_max_epu64, _mm512_mask_mov_epi64, _mm512_mask_sub_epi64, _mm512_mask_ternarylogic_epi64, _mm512_mask_test_epi64_mask,
    _mm512_mask_xor_epi64, _mm512_maskz_compress_epi64, _mm512_maskz_mov_epi64, _mm512_or_si512, _mm512_permutexvar_epi64, _mm512_reduce_add_epi64,
    _mm512_reduce_max_epu64, _mm512_reduce_or_epi64, _mm512_rolv_epi64, _mm512_set1_epi64, _mm512_set4_epi32, _mm512_setzero_si512,
    _mm512_shuffle_epi8, _mm512_storeu_si512, _mm512_stream_si512, _mm512_sub_epi64, _mm512_ternarylogic_epi64, _mm512_test_epi8_mask,
    _mm512_xor_si512,
};

use super::{Expected, Form, Group, Judged, Kinds, Onto, Passed, halves};
use crate::memory::guest_line;
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

/// Lines that are read: entries, or where a guest may write them, and where these are to be kept.
#[derive(Clone, Copy)]
struct Source<const GUEST: bool> {
    from: *const u8,
    kept: *mut u64,
}

impl Source<false> {
    const fn entries(entries: &[u64]) -> Self {
        Self { from: entries.as_ptr().cast(), kept: std::ptr::null_mut() }
    }
}

impl<const GUEST: bool> Source<GUEST> {
    /// Line `at`. One of a guest's is read once.
    ///
    /// # Safety
    /// It is there, and so is its place among those that are kept; a guest's begins at a multiple of 16.
    #[target_feature(enable = "avx512f")]
    #[inline]
    unsafe fn line(self, at: usize) -> __m512i {
        let from = self.from.wrapping_add(at * 64);
        if !GUEST {
            // SAFETY: the caller's promise.
            return unsafe { _mm512_loadu_si512(from.cast()) };
        }
        // SAFETY: the caller's promise.
        let line = unsafe { guest_line(from) };
        // SAFETY: the same.
        unsafe { _mm512_storeu_si512(self.kept.wrapping_add(at * 8).cast(), line) };
        line
    }
}

/// In how many ways bits move; zero: all stay in place.
fn moves(expected: &Expected, form: &Form<'_>) -> usize {
    let stay = expected.pattern.moved.mask == 0 && form.moves.iter().all(|one| one.turn == 0);
    if stay { 0 } else { form.moves.len().max(1) }
}

/// As many entries as fill whole lines; none if this cannot be done with them.
fn lines<'a>(source: &'a [u64], target: &mut [u64], slot: usize, form: &Form<'_>) -> Option<Lines<'a>> {
    // Entries of 4 bytes are written sixteen at a time, all others eight.
    let step = if form.narrow && form.parts.len() == 1 { 16 } else { 8 };
    let source = &source[..source.len() / step * step];
    let slots = source.len() * form.parts.len();
    let target = if form.narrow { halves(target)[slot..slot + slots].as_mut_ptr().cast::<u64>() } else { target[slot..slot + slots].as_mut_ptr() };
    let possible = form.moves.len() <= MAX_MOVES && (!form.past_cache || target.addr().is_multiple_of(64)) && !source.is_empty();
    possible.then_some(Lines { source, target })
}

/// [`recode`](super::recode) of as many entries as fill whole lines; how many these are, how many of them are of the second kind, and how many absent.
pub(super) fn recode(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: &Form<'_>) -> (usize, u64, u64) {
    let Some(lines) = lines(source, target, slot, form) else { return (0, 0, 0) };
    let expected = Expected { pattern: Pattern { mask: 0, kinds, address: 0, moved: Move::default() }, first: 0, room: 0 };
    let recode = whole_lines::<false, false>(&expected, form);
    // SAFETY: the caller has asked the processor; the target has just the bytes for these entries, and begins at a line where they go past the cache.
    let judged = unsafe { recode(Source::entries(lines.source), lines.source.len(), lines.target, &expected, form) };
    let Some(Passed { others, gaps }) = judged.passed() else { return (0, 0, 0) }; // anything is as expected
    (lines.source.len(), others, gaps)
}

/// See [`recode_expected`](super::recode_expected).
pub(super) fn recode_expected(source: &[u64], expected: &Expected, target: &mut [u64], slot: usize, form: &Form<'_>) -> Option<Judged> {
    let lines = lines(source, target, slot, form).filter(|lines| lines.source.len() == source.len())?;
    // SAFETY: as in `recode`.
    Some(unsafe { whole_lines::<false, true>(expected, form)(Source::entries(lines.source), lines.source.len(), lines.target, expected, form) })
}

/// See [`recode_lines`].
type Recode<const GUEST: bool> = unsafe fn(Source<GUEST>, usize, *mut u64, &Expected, &Form<'_>) -> Judged;

/// The one that serves.
fn whole_lines<const GUEST: bool, const JUDGE: bool>(expected: &Expected, form: &Form<'_>) -> Recode<GUEST> {
    match (expected.pattern.kinds.has_gaps(), moves(expected, form)) {
        (false, 0) => recode_lines::<GUEST, JUDGE, false, 0>,
        (true, 0) => recode_lines::<GUEST, JUDGE, true, 0>,
        (false, 1) => recode_lines::<GUEST, JUDGE, false, 1>,
        (false, 2) => recode_lines::<GUEST, JUDGE, false, 2>,
        (false, _) => recode_lines::<GUEST, JUDGE, false, MAX_MOVES>,
        (true, 1) => recode_lines::<GUEST, JUDGE, true, 1>,
        (true, 2) => recode_lines::<GUEST, JUDGE, true, 2>,
        (true, _) => recode_lines::<GUEST, JUDGE, true, MAX_MOVES>,
    }
}

/// See [`recode_guests`](super::recode_guests).
///
/// # Safety
/// As many entries as are `kept` may be read at `from`, which is a multiple of 16, and the processor has what this takes.
pub(super) unsafe fn recode_guests(from: *const u8, kept: &mut [u64], expected: &Expected, onto: Onto<'_>, form: &Form<'_>) -> Option<Judged> {
    let source = Source::<true> { from, kept: kept.as_mut_ptr() };
    match onto {
        Onto::Slots(target, slot) => {
            let lines = lines(kept, target, slot, form).filter(|lines| lines.source.len() == kept.len())?;
            // SAFETY: as in `recode`, and the caller's promise.
            Some(unsafe { whole_lines::<true, true>(expected, form)(source, kept.len(), lines.target, expected, form) })
        }
        Onto::Sparse(target, written) => {
            let target = target.as_chunks_mut::<8>().0.first_chunk_mut::<64>().filter(|_| kept.len() == 512)?;
            // SAFETY: as in `recode_sparse`, and the caller's promise.
            some_lines::<true>(target, expected, form).map(|recode| unsafe { recode(source, expected, target, written, form) })
        }
    }
}

/// See [`recode_sparse`](super::recode_sparse).
pub(super) fn recode_sparse(
    source: &[[u64; 8]; 64],
    expected: &Expected,
    target: &mut [[u64; 8]; 64],
    written: &mut u64,
    form: &Form<'_>,
) -> Option<Judged> {
    // SAFETY: the caller has asked the processor; where lines go past the cache, the target begins at one.
    some_lines::<false>(target, expected, form)
        .map(|recode| unsafe { recode(Source::entries(source.as_flattened()), expected, target, written, form) })
}

/// See [`recode_some_lines`].
type RecodeSome<const GUEST: bool> = unsafe fn(Source<GUEST>, &Expected, &mut [[u64; 8]; 64], &mut u64, &Form<'_>) -> Judged;

/// The one that serves. None: this cannot be done.
fn some_lines<const GUEST: bool>(target: &[[u64; 8]; 64], expected: &Expected, form: &Form<'_>) -> Option<RecodeSome<GUEST>> {
    if form.moves.len() > MAX_MOVES || form.past_cache && !target.as_ptr().addr().is_multiple_of(64) {
        return None;
    }
    Some(match moves(expected, form) {
        0 => recode_some_lines::<GUEST, 0>,
        1 => recode_some_lines::<GUEST, 1>,
        2 => recode_some_lines::<GUEST, 2>,
        _ => recode_some_lines::<GUEST, MAX_MOVES>,
    })
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

impl Found {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn nothing() -> Self {
        let zero = _mm512_setzero_si512();
        Self { others: zero, present: zero, unexpected: zero, farthest: zero }
    }

    /// What so many entries are.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn result<const GAPS: bool>(self, entries: usize, room: u64) -> Judged {
        let sum = |counts| _mm512_reduce_add_epi64(counts).cast_unsigned();
        let gaps = if GAPS { entries as u64 - sum(self.present) } else { 0 };
        let as_expected = _mm512_reduce_or_epi64(self.unexpected) == 0 && _mm512_reduce_max_epu64(self.farthest) <= room;
        if as_expected { Judged::alike(Passed { others: sum(self.others), gaps }) } else { Judged::UNLIKE }
    }
}

/// Writes a line, past the cache or not.
///
/// # Safety
/// There are 64 bytes to be written; past the cache, they begin at a line, and a fence follows before anybody is told: see `Stage`.
#[target_feature(enable = "avx512f")]
#[inline]
unsafe fn put_line(at: *mut __m512i, line: __m512i, past_cache: bool) {
    if past_cache {
        // SAFETY: the caller's promise.
        unsafe { _mm512_stream_si512(at, line) };
    } else {
        // SAFETY: the same.
        unsafe { _mm512_storeu_si512(at, line) };
    }
}

impl<const MOVES: usize> Registers<MOVES> {
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn new(Expected { pattern, first, .. }: &Expected, form: &Form<'_>) -> Self {
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
            lowest: all(*first),
        }
    }

    /// What becomes of eight entries, and which of its words are leaves: all bits, or none.
    #[target_feature(enable = "avx512f")]
    #[inline]
    fn leaves<const JUDGE: bool, const GAPS: bool>(self, words: __m512i, found: &mut Found) -> (__m512i, __m512i) {
        let present = if GAPS { _mm512_cmpneq_epi64_mask(words, self.gap) } else { 0xff };
        let different = _mm512_xor_si512(words, self.pattern);
        let second = _mm512_mask_test_epi64_mask(present, different, self.test);
        if JUDGE {
            let different = _mm512_mask_xor_epi64(different, second, different, self.other);
            found.unexpected = _mm512_mask_ternarylogic_epi64::<OR_AND>(found.unexpected, present, different, self.mask);
            // Where nothing moves, what differs from the pattern of an expected entry is its address.
            let address = match MOVES {
                0 => different,
                _ => {
                    let in_place = _mm512_and_si512(words, self.address);
                    _mm512_ternarylogic_epi64::<OR_AND>(in_place, _mm512_rolv_epi64(words, self.turn), self.moved)
                }
            };
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
    let merge: unsafe fn(&[u64], Kinds, &Group, &mut [u64]) -> bool = if kinds.has_gaps() { merge_lines::<true> } else { merge_lines::<false> };
    // SAFETY: the caller has asked the processor.
    let whole = unsafe { merge(entries, kinds, group, firsts) };
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
                let compressed = _mm512_maskz_compress_epi64(begins, words);
                let room = firsts[at..at + 8].as_mut_ptr();
                // SAFETY: eight words.
                unsafe { _mm512_storeu_si512(room.cast::<__m512i>(), compressed) };
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

/// Recodes whole lines, which have so many entries; whether they are as expected, if that is asked for, how many leaves are of the second kind, and how many entries
/// absent.
///
/// # Safety
/// All entries that the source becomes may be written to the target, which is a multiple of 64 if they go past the cache. All lines of the source are there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn recode_lines<const GUEST: bool, const JUDGE: bool, const GAPS: bool, const MOVES: usize>(
    source: Source<GUEST>,
    entries: usize,
    target: *mut u64,
    expected: &Expected,
    form: &Form<'_>,
) -> Judged {
    let registers = Registers::<MOVES>::new(expected, form);
    let swap = back_to_front(form.narrow);
    let mut found = Found::nothing();
    let mut at = target.cast::<__m512i>();
    let mut put = |line: __m512i| {
        let line = if form.big { _mm512_shuffle_epi8(line, swap) } else { line };
        // SAFETY: the caller's promise: one line after the other.
        unsafe { put_line(at, line, form.past_cache) };
        at = at.wrapping_add(1);
    };
    let lines = entries / 8;
    // SAFETY: the caller's promise.
    let next = |line: usize| unsafe { source.line(line) };
    match (form.parts.len(), form.narrow) {
        (1, false) => {
            for line in 0..lines {
                put(registers.leaves::<JUDGE, GAPS>(next(line), &mut found).0);
            }
        }
        (1, true) => {
            for pair in 0..lines / 2 {
                let (low, high) = (next(pair * 2), next(pair * 2 + 1));
                let (low, high) = (registers.leaves::<JUDGE, GAPS>(low, &mut found).0, registers.leaves::<JUDGE, GAPS>(high, &mut found).0);
                put(pack(low, high));
            }
        }
        (_, false) => {
            for line in 0..lines {
                let (leaves, kept) = registers.leaves::<JUDGE, GAPS>(next(line), &mut found);
                for line in form.lines {
                    put(spread::<GAPS>(line, leaves, kept));
                }
            }
        }
        (_, true) => {
            for line in 0..lines {
                let (leaves, kept) = registers.leaves::<JUDGE, GAPS>(next(line), &mut found);
                for [low, high] in form.lines.as_chunks::<2>().0 {
                    put(pack(spread::<GAPS>(low, leaves, kept), spread::<GAPS>(high, leaves, kept)));
                }
            }
        }
    }
    found.result::<GAPS>(entries, expected.room)
}

/// See [`recode_sparse`](super::recode_sparse).
///
/// # Safety
/// The target is a multiple of 64 if it is written past the cache. 64 lines of the source are there.
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn recode_some_lines<const GUEST: bool, const MOVES: usize>(
    source: Source<GUEST>,
    expected: &Expected,
    target: &mut [[u64; 8]; 64],
    written: &mut u64,
    form: &Form<'_>,
) -> Judged {
    let registers = Registers::<MOVES>::new(expected, form);
    let (swap, zero) = (back_to_front(form.narrow), _mm512_setzero_si512());
    let mut found = Found::nothing();
    // SAFETY: eight words, which begin at a line if they go past the cache.
    let mut put = |line: usize, words: __m512i| unsafe { put_line(target[line].as_mut_ptr().cast(), words, form.past_cache) };
    // First which lines hold any leaf: to decide that line by line would be guesswork for the processor.
    let mut leaves = [0_u8; 64];
    for (line, leaves) in leaves.iter_mut().enumerate() {
        // SAFETY: the caller's promise.
        *leaves = _mm512_cmpneq_epi64_mask(unsafe { source.line(line) }, registers.gap);
    }
    // What was a guest's was read, and is looked at as it was.
    let read = Source::<false> { from: if GUEST { source.kept.cast_const().cast() } else { source.from }, kept: std::ptr::null_mut() };
    // SAFETY: 64 bytes.
    let leaves = unsafe { _mm512_loadu_si512(leaves.as_ptr().cast::<__m512i>()) };
    let lines = _mm512_test_epi8_mask(leaves, leaves);
    for line in bits(lines) {
        // SAFETY: the caller's promise.
        let (words, _) = registers.leaves::<true, true>(unsafe { read.line(line) }, &mut found);
        put(line, if form.big { _mm512_shuffle_epi8(words, swap) } else { words });
    }
    for line in bits(*written & !lines) {
        put(line, zero);
    }
    *written = lines;
    found.result::<true>(64 * 8, expected.room)
}

/// The numbers of the bits that are set, ascending.
#[inline(always)]
fn bits(mut set: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = (set != 0).then(|| set.trailing_zeros() as usize)?;
        set &= set - 1;
        Some(bit)
    })
}
