//! Entries of one format become entries of another, many at a time: addresses move, patterns are replaced, one becomes several or several become one.
//!
//! As in `lanes`, the loops are plain; for processors with registers of 64 bytes there is one written for them, which does all of it in one pass.
#![allow(unsafe_code)]

#[cfg(test)]
mod tests;
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod wide;

use std::num::NonZero;

use crate::memory::GuestEntries;
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

impl Form<'_> {
    /// Whether [`recode_sparse`] serves it: one word for each leaf, and zero where there is none.
    pub(super) const fn is_sparse(&self) -> bool {
        self.absent == 0 && !self.narrow && self.parts.len() == 1
    }
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
pub(super) fn recode(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: &Form<'_>) -> (u64, u64) {
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

/// What entries turned out to be. One word, and never stored in parts: what is loaded wider than it was stored waits for all stores before, those past the cache
/// among them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Judged(NonZero<u64>);

impl Judged {
    /// At least one is not as expected.
    pub(super) const UNLIKE: Self = Self(NonZero::<u64>::MAX);

    /// All are as expected.
    #[inline]
    pub(super) const fn alike(Passed { others, gaps }: Passed) -> Self {
        // Of a page of entries, each fits into half a word with room to spare.
        match NonZero::new(1 | others << 1 | gaps << 32) {
            Some(word) => Self(word),
            None => Self::UNLIKE,
        }
    }

    /// What there was, if all are as expected.
    #[inline]
    pub(super) fn passed(self) -> Option<Passed> {
        let word = self.0.get();
        (self != Self::UNLIKE).then_some(Passed { others: (word & 0xffff_ffff) >> 1, gaps: word >> 32 })
    }
}

impl std::fmt::Debug for Judged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Judged").field(&self.passed()).finish()
    }
}

/// What there was among entries that are as expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Leaves of the second kind.
    pub(super) others: u64,
    /// Absent entries.
    pub(super) gaps: u64,
}

/// [`recode`], and whether all entries are as expected. None: not with these entries, or not on this processor, and nothing was written.
#[inline]
pub(super) fn recode_expected(source: &[u64], expected: &Expected, target: &mut [u64], slot: usize, form: &Form<'_>) -> Option<Judged> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass() {
        return wide::recode_expected(source, expected, target, slot, form);
    }
    let _ = (source, expected, target, slot, form);
    None
}

/// Where entries are written that are recoded as they are read.
#[derive(Debug)]
pub(super) enum Onto<'a> {
    /// The entries of a table from a slot on, as by [`recode_expected`].
    Slots(&'a mut [u64], usize),
    /// As by [`recode_sparse`].
    Sparse(&'a mut [u64], &'a mut u64),
}

/// Reads a guest's entries, each once, to be `kept`, and [recodes](recode_expected) them at the same time. None: not with these entries, or not on this processor, and
/// nothing was read.
#[inline]
pub(super) fn recode_guests(from: &GuestEntries<'_>, kept: &mut [u64], expected: &Expected, onto: Onto<'_>, form: &Form<'_>) -> Option<Judged> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass() && from.len() == kept.len() {
        // SAFETY: all of these may be read, and begin at a multiple of 16; the processor was asked.
        return unsafe { wide::recode_guests(from.first(), kept, expected, onto, form) };
    }
    let _ = (from, kept, expected, onto, form);
    None
}

/// [`recode_expected`] of a whole table of a page, in a [sparse](Form::is_sparse) form: only lines that hold a leaf are written, and, with zeros, those that may
/// have held one, whose bits are set in `written`, and set there now. None: as there.
#[inline]
pub(super) fn recode_sparse(source: &[u64], expected: &Expected, target: &mut [u64], written: &mut u64, form: &Form<'_>) -> Option<Judged> {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if has_one_pass()
        && let (Some(source), Some(target)) = (source.as_chunks::<8>().0.as_array::<64>(), target.as_chunks_mut::<8>().0.first_chunk_mut::<64>())
    {
        return wide::recode_sparse(source, expected, target, written, form);
    }
    let _ = (source, expected, target, written, form);
    None
}

for_all_lanes! {
    /// [`recode`] where addresses and bytes stay in place.
    fn transcode(source: &[u64], kinds: Kinds, target: &mut [u64], form: &Form<'_>) -> (u64, u64) {
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
    fn recode_blocks(source: &[u64], kinds: Kinds, target: &mut [u64], slot: usize, form: &Form<'_>) -> (u64, u64) {
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
fn leaves_of(block: &[u64], kinds: Kinds, leaves: &mut [u64], form: &Form<'_>) -> (u64, u64) {
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
