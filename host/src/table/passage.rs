//! Tables that are judged and rewritten while they are read.
//!
//! Most tables are like the one before: the same kinds of leaves, perhaps with gaps. Such a table need not wait until all of it is there. Its entries are
//! compared with what is expected while they pass through registers on their way from guest memory, and written to the next free table at once, past the
//! cache; the copy that they leave behind serves whoever looks closer. If any entry is not as expected, what was written is nothing, and the copy is looked at
//! as always.
#![allow(unsafe_code)]

use crate::Span;
use crate::memory::{EntryLayout, Nearby};
use crate::table::geometry::ByteOrder;
use crate::table::lanes::Pattern;

/// Entries of a table that can pass: a page of eight bytes each.
pub(super) const ENTRIES: usize = 512;

/// So many bytes of the next table are asked for early. The processor sees by itself how a table goes on; what it does not see is where it starts.
pub(super) const START: u64 = 1024;

/// What the leaves of a table were like.
#[derive(Clone, Copy)]
pub(super) struct Usual {
    pub(super) level: u8,
    pub(super) inherited: u64,
    pub(super) shape: Option<u8>,
    pub(super) pattern: Pattern,
    pub(super) within: Span,
    pub(super) room: u64,
}

/// Tables that were not like the last: the more of them in a row, the more are not tried.
#[derive(Clone, Copy, Default)]
pub(super) struct Misses {
    in_a_row: u32,
    skip: u32,
}

impl Misses {
    pub(super) fn miss(&mut self) {
        self.in_a_row = (self.in_a_row + 1).min(6);
        self.skip = (1 << self.in_a_row) - 2;
    }

    pub(super) fn skips(&mut self) -> bool {
        let skips = self.skip > 0;
        self.skip = self.skip.saturating_sub(1);
        skips
    }
}

/// The only entries that are passed through a visitor's hands while they are read.
pub(super) const PASSING: EntryLayout = EntryLayout { bytes: 8, order: ByteOrder::Little };

/// What the entries of a table are expected to be, and what becomes of them.
#[derive(Debug)]
pub struct Passage<'a> {
    /// What is expected: all addresses stand in place.
    pattern: Pattern,
    /// Addresses are expected in `first..=first + room`.
    first: u64,
    room: u64,
    receiver: Receiver<'a>,
    /// Where the next table stands: it is asked for when this one is there.
    ahead: Nearby,
    /// What was found, once all entries have passed.
    passed: Passed,
}

/// What is to become of entries, and where it is written.
#[derive(Debug)]
pub struct Receiver<'a> {
    pub(super) entries: Target,
    pub(super) table: &'a mut [u64; ENTRIES],
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

/// What was found on the way.
#[derive(Clone, Copy, Debug, Default)]
pub struct Passed {
    /// All entries were as expected.
    pub(super) expected: bool,
    /// Leaves of the second kind.
    pub(super) others: u64,
    /// Absent entries.
    pub(super) gaps: u64,
}

impl<'a> Passage<'a> {
    /// None: this processor cannot do it.
    pub(super) fn new(pattern: Pattern, (first, room): (u64, u64), receiver: Receiver<'a>, ahead: Nearby) -> Option<Self> {
        let aligned = receiver.table.as_ptr().addr().is_multiple_of(64);
        (aligned && is_possible()).then_some(Self { pattern, first, room, receiver, ahead, passed: Passed::default() })
    }

    /// All of this table was loaded.
    pub(crate) fn is_there(&self) {
        self.ahead.expect(0, START);
    }

    pub(super) const fn passed(&self) -> Passed {
        self.passed
    }
}

/// Whether this processor can do it.
fn is_possible() -> bool {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        is_x86_feature_detected!("avx512f")
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    {
        false
    }
}

#[cfg(all(target_arch = "x86_64", not(miri)))]
pub(crate) mod wide {
    use std::arch::x86_64::{
        __m512i, _mm512_and_si512, _mm512_cmpneq_epi64_mask, _mm512_mask_max_epu64, _mm512_mask_mov_epi64, _mm512_mask_sub_epi64,
        _mm512_mask_ternarylogic_epi64, _mm512_mask_test_epi64_mask, _mm512_mask_xor_epi64, _mm512_reduce_add_epi64, _mm512_reduce_max_epu64,
        _mm512_reduce_or_epi64, _mm512_set1_epi64, _mm512_setzero_si512, _mm512_stream_si512, _mm512_sub_epi64, _mm512_ternarylogic_epi64,
        _mm512_xor_si512,
    };

    use super::{ENTRIES, Passage, Passed};

    /// `a & b | c`.
    const AND_OR: i32 = 0b1110_1010;
    /// `a | b & c`.
    const OR_AND: i32 = 0b1111_1000;

    /// A passage in registers. What is found is counted in registers too: to move a mask out of them for each line costs more than all the rest.
    #[derive(Clone, Copy)]
    pub(crate) struct Registers {
        pattern: __m512i,
        test: __m512i,
        difference: __m512i,
        mask: __m512i,
        gap: __m512i,
        address: __m512i,
        lowest: __m512i,
        leaf: __m512i,
        leaf_difference: __m512i,
        absent: __m512i,
        one_less: __m512i,
    }

    /// What was found so far, for each eighth entry.
    #[derive(Clone, Copy)]
    pub(crate) struct Found {
        unexpected: __m512i,
        others: __m512i,
        present: __m512i,
        farthest: __m512i,
    }

    impl Registers {
        #[target_feature(enable = "avx512f")]
        #[inline]
        pub(crate) fn new(passage: &Passage<'_>) -> (Self, Found) {
            let all = |word: u64| _mm512_set1_epi64(word as i64);
            let (kinds, entries) = (passage.pattern.kinds, passage.receiver.entries);
            let this = Self {
                pattern: all(kinds.pattern()),
                test: all(kinds.test()),
                difference: all(kinds.difference()),
                mask: all(passage.pattern.mask),
                gap: all(kinds.gap()),
                address: all(passage.pattern.address),
                lowest: all(passage.first),
                leaf: all(entries.patterns[0]),
                leaf_difference: all(entries.patterns[0] ^ entries.patterns[1]),
                absent: all(entries.absent),
                one_less: all(u64::MAX),
            };
            let zero = _mm512_setzero_si512();
            (this, Found { unexpected: zero, others: zero, present: zero, farthest: zero })
        }

        /// Eight entries: compares them, and writes what becomes of them.
        ///
        /// # Safety
        /// `target` is a multiple of 64, and 64 bytes may be written there.
        #[target_feature(enable = "avx512f")]
        #[inline]
        pub(crate) unsafe fn line<const GAPS: bool>(self, words: __m512i, found: &mut Found, target: *mut u64) {
            let present = if GAPS { _mm512_cmpneq_epi64_mask(words, self.gap) } else { 0xff };
            let different = _mm512_xor_si512(words, self.pattern);
            let second = _mm512_mask_test_epi64_mask(present, different, self.test);
            let different = _mm512_mask_xor_epi64(different, second, different, self.difference);
            found.unexpected = _mm512_mask_ternarylogic_epi64::<OR_AND>(found.unexpected, present, different, self.mask);
            let distance = _mm512_sub_epi64(_mm512_and_si512(words, self.address), self.lowest);
            found.farthest = _mm512_mask_max_epu64(found.farthest, present, found.farthest, distance);
            found.others = _mm512_mask_sub_epi64(found.others, second, found.others, self.one_less);
            let leaf = _mm512_ternarylogic_epi64::<AND_OR>(words, self.address, self.leaf);
            let leaf = _mm512_mask_xor_epi64(leaf, second, leaf, self.leaf_difference);
            let entry = if GAPS {
                found.present = _mm512_mask_sub_epi64(found.present, present, found.present, self.one_less);
                _mm512_mask_mov_epi64(self.absent, present, leaf)
            } else {
                leaf
            };
            // SAFETY: the caller's promise; `Stage` fences before it lets go of the memory.
            unsafe { _mm512_stream_si512(target.cast(), entry) };
        }
    }

    impl Passage<'_> {
        /// Whether there may be absent entries.
        pub(crate) const fn has_gaps(&self) -> bool {
            self.pattern.kinds.has_gaps()
        }

        /// All entries have passed.
        #[target_feature(enable = "avx512f")]
        pub(crate) fn end(&mut self, found: Found) {
            let sum = |counts| _mm512_reduce_add_epi64(counts).cast_unsigned();
            let expected = _mm512_reduce_or_epi64(found.unexpected) == 0 && _mm512_reduce_max_epu64(found.farthest) <= self.room;
            let gaps = if self.has_gaps() { (ENTRIES as u64).saturating_sub(sum(found.present)) } else { 0 };
            self.passed = Passed { expected, others: sum(found.others), gaps };
        }

        /// Where what becomes of the entries is written: at a multiple of 64.
        pub(crate) fn target(&mut self) -> *mut u64 {
            self.receiver.table.as_mut_ptr()
        }
    }
}
