//! A set of pages of guest memory: those that devices wrote, as far as somebody knows and has not told yet.

use std::collections::BTreeMap;

use super::spans::Spans;
use crate::Span;
use crate::memory::PAGE;

/// Pages of one chunk, one bit each: 16 MiB of guest memory.
const CHUNK: u64 = 4096;

/// Longer spans that are kept apart. Where there would be more, some that lie between two count as well.
const SPANS: usize = 4096;

/// Pages. What it takes is bounded by the guest's memory: a bit for each page of it, and some spans.
#[derive(Debug)]
pub(crate) struct PageSet {
    /// By the number of the first page, divided.
    chunks: BTreeMap<u64, Box<[u64; CHUNK as usize / 64]>>,
    /// Whole runs of pages, longer than a chunk.
    spans: Spans,
}

impl Default for PageSet {
    fn default() -> Self {
        Self { chunks: BTreeMap::new(), spans: Spans::up_to(SPANS) }
    }
}

/// The whole pages that have a byte of a span.
const fn whole(span: Span) -> Span {
    Span { first: span.first & !(PAGE - 1), last: span.last | (PAGE - 1) }
}

/// Bits `first..=last` of a word.
const fn bits(first: u64, last: u64) -> u64 {
    u64::MAX >> (63 - last) & u64::MAX << first
}

/// The words of chunks that have bits for a span's pages: chunk, word and mask.
fn words(span: Span) -> impl Iterator<Item = (u64, usize, u64)> {
    let (first, last) = (span.first / PAGE, span.last / PAGE);
    (first / 64..=last / 64).map(move |word| {
        let low = if word == first / 64 { first % 64 } else { 0 };
        let high = if word == last / 64 { last % 64 } else { 63 };
        (word * 64 / CHUNK, (word % (CHUNK / 64)) as usize, bits(low, high))
    })
}

impl PageSet {
    /// Adds all pages of a span.
    pub(crate) fn add(&mut self, span: Span) {
        if span.length_minus_one() >= CHUNK * PAGE {
            return self.spans.add(whole(span));
        }
        for (chunk, word, mask) in words(span) {
            self.chunks.entry(chunk).or_insert_with(|| Box::new([0; CHUNK as usize / 64]))[word] |= mask;
        }
    }

    /// Adds all pages of another set.
    pub(crate) fn join(&mut self, other: &Self) {
        other.each(Span::ALL, &mut |span| self.add(span));
    }

    /// Takes all pages of a span out.
    pub(crate) fn remove(&mut self, span: Span) {
        let span = whole(span);
        self.spans.remove(span);
        let (first, last) = (span.first / PAGE / CHUNK, span.last / PAGE / CHUNK);
        self.chunks.retain(|chunk, _| !(*chunk > first && *chunk < last));
        // What is left has bits of the first and the last chunk at most.
        for number in [first, last] {
            let Some(chunk) = self.chunks.get_mut(&number) else { continue };
            let here = Span { first: number * CHUNK * PAGE, last: number * CHUNK * PAGE + (CHUNK * PAGE - 1) };
            let Some(inside) = here.intersection(span) else { continue };
            words(inside).for_each(|(_, word, mask)| chunk[word] &= !mask);
            if chunk.iter().all(|word| *word == 0) {
                self.chunks.remove(&number);
            }
        }
    }

    /// Tells which pages of a span are in it, as runs in any order, some perhaps more than once; each run has whole pages, and may be cut where the span is.
    pub(crate) fn each(&self, span: Span, tell: &mut dyn FnMut(Span)) {
        self.spans.as_slice().iter().filter_map(|run| run.intersection(span)).for_each(&mut *tell);
        for (number, chunk) in self.chunks.range(span.first / PAGE / CHUNK..=span.last / PAGE / CHUNK) {
            runs(&**chunk, number * CHUNK * PAGE, &mut |run| run.intersection(span).into_iter().for_each(&mut *tell));
        }
    }
}

/// Tells the runs of bits that are set, as addresses: the first bit stands for the page at `base`.
pub(crate) fn runs(words: &[u64], base: u64, tell: &mut dyn FnMut(Span)) {
    let mut open: Option<Span> = None;
    for (index, word) in (0..).zip(words) {
        let mut rest = *word;
        while rest != 0 {
            let low = rest.trailing_zeros();
            let length = (rest >> low).trailing_ones();
            rest &= u64::MAX.checked_shl(low + length).unwrap_or(0);
            let first = base + (index * 64 + u64::from(low)) * PAGE;
            let run = Span { first, last: first + (u64::from(length) * PAGE - 1) };
            match &mut open {
                Some(open) if open.last.checked_add(1) == Some(first) => open.last = run.last,
                _ => open.replace(run).into_iter().for_each(&mut *tell),
            }
        }
    }
    open.into_iter().for_each(tell);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn all(set: &PageSet, span: Span) -> BTreeSet<u64> {
        let mut pages = BTreeSet::new();
        set.each(span, &mut |run| pages.extend(run.first / PAGE..=run.last / PAGE));
        pages
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

        /// As a plain set of page numbers: short spans and long ones, beginning anywhere.
        #[test]
        fn pages_come_and_go(steps in prop::collection::vec((any::<bool>(), 0..0x6000_u64, prop_oneof![0..4_u64, 0..0x2400_u64], 0..PAGE), 1..20)) {
            let (mut set, mut model) = (PageSet::default(), BTreeSet::new());
            for (add, page, more, offset) in steps {
                let span = Span { first: page * PAGE + offset, last: (page + more) * PAGE + (PAGE - 1) };
                if add {
                    set.add(span);
                    model.extend(page..=page + more);
                } else {
                    set.remove(span);
                    model.retain(|known| !(page..=page + more).contains(known));
                }
                prop_assert_eq!(&all(&set, Span::ALL), &model);
                let inside: BTreeSet<u64> = model.iter().copied().filter(|known| (page..=page + more).contains(known)).collect();
                prop_assert_eq!(all(&set, span), inside);
            }
            let mut other = PageSet::default();
            other.join(&set);
            prop_assert_eq!(all(&other, Span::ALL), model);
            set.remove(Span::ALL);
            prop_assert!(set.chunks.is_empty() && all(&set, Span::ALL).is_empty());
        }
    }

    #[test]
    fn the_last_page_is_one_too() {
        let mut set = PageSet::default();
        set.add(Span { first: u64::MAX, last: u64::MAX });
        assert_eq!(all(&set, Span::ALL), [u64::MAX / PAGE].into());
        set.add(Span::ALL);
        set.remove(Span { first: 0, last: u64::MAX - PAGE });
        assert_eq!(all(&set, Span::ALL), [u64::MAX / PAGE].into());
    }
}
