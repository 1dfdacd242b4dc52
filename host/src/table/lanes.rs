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

/// Entries that are looked at together.
const BLOCK: usize = 128;

/// What was found at the start of some entries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scanned {
    /// Entries of the kinds that were looked for.
    pub(super) count: usize,
    /// How many of them are absent.
    pub(super) gaps: u64,
    /// Whether the address of any other is out of bounds.
    pub(super) outside: bool,
}

for_all_lanes! {
    /// How many of the first `entries` are of these kinds, and whether all addresses in them are in `first..=last`. Addresses, `first` and `last` are below
    /// 2^63, so that the sign of a difference tells.
    fn scan(entries: &[u64], pattern: Pattern, first: u64, last: u64) -> Scanned {
        let Pattern { mask, kinds, address } = pattern;
        let beyond = |entry: u64| (entry & address).wrapping_sub(first) | last.wrapping_sub(entry & address);
        let (mut count, mut gaps, mut outside) = (0, 0_u64, 0);
        for block in entries.chunks(BLOCK) {
            let (mut different, mut also_gaps, mut also_outside) = (0, 0_u64, 0);
            if kinds.is_one() {
                for entry in block {
                    different |= (entry ^ kinds.pattern()) & mask;
                    also_outside |= beyond(*entry);
                }
            } else if !kinds.has_gaps() {
                for entry in block {
                    different |= kinds.leaf_distance(*entry, mask);
                    also_outside |= beyond(*entry);
                }
            } else {
                for entry in block {
                    different |= kinds.distance(*entry, mask);
                    also_outside |= beyond(*entry) & !kinds.gap(*entry);
                    also_gaps = also_gaps.wrapping_sub(kinds.gap(*entry));
                }
            }
            if different != 0 {
                for entry in block.iter().take_while(|entry| kinds.distance(**entry, mask) == 0) {
                    outside |= beyond(*entry) & !kinds.gap(*entry);
                    gaps = gaps.wrapping_sub(kinds.gap(*entry));
                    count += 1;
                }
                break;
            }
            outside |= also_outside;
            gaps += also_gaps;
            count += block.len();
        }
        Scanned { count, gaps, outside: outside >> 63 != 0 }
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
        let difference = patterns[0] ^ patterns[1];
        if kinds.is_one() {
            for (target, source) in target.iter_mut().zip(source) {
                *target = patterns[0] | source & address;
            }
            return (0, 0);
        }
        let (mut others, mut gaps) = (0_u64, 0_u64);
        if !kinds.has_gaps() {
            for (target, source) in target.iter_mut().zip(source) {
                let selector = kinds.selector(*source);
                *target = (patterns[0] ^ difference & selector) | source & address;
                others = others.wrapping_sub(selector);
            }
            return (others, 0);
        }
        for (target, source) in target.iter_mut().zip(source) {
            let (selector, gap) = (kinds.selector(*source), kinds.gap(*source));
            let leaf = (patterns[0] ^ difference & selector) | source & address;
            *target = leaf & !gap | absent & gap;
            others = others.wrapping_sub(selector & !gap);
            gaps = gaps.wrapping_sub(gap);
        }
        (others, gaps)
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
