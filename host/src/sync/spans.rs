//! A set of addresses that takes no more memory than it may: where it would, it has more addresses than were put into it.

use crate::Span;

/// Spans that are kept apart, if nobody says otherwise.
const MOST: usize = 64;

/// Addresses, as spans that neither overlap nor touch, ascending.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spans {
    list: Vec<Span>,
    most: usize,
}

impl Default for Spans {
    fn default() -> Self {
        Self::up_to(MOST)
    }
}

impl Spans {
    /// None yet, and so many at most.
    pub(crate) const fn up_to(most: usize) -> Self {
        Self { list: Vec::new(), most }
    }

    pub(crate) fn as_slice(&self) -> &[Span] {
        &self.list
    }

    /// The first span, or the rest of it, that has addresses from `first` on.
    pub(crate) fn at_or_behind(&self, first: u64) -> Option<Span> {
        let span = self.list.get(self.list.partition_point(|span| span.last < first))?;
        Some(Span { first: span.first.max(first), ..*span })
    }

    /// Adds a span; where there are too many, the two that are nearest to each other become one.
    pub(crate) fn add(&mut self, span: Span) {
        let from = self.list.partition_point(|other| other.last.saturating_add(1) < span.first);
        let to = self.list.partition_point(|other| other.first <= span.last.saturating_add(1));
        let joined =
            self.list[from..to].iter().fold(span, |joined, other| Span { first: joined.first.min(other.first), last: joined.last.max(other.last) });
        self.list.splice(from..to, [joined]);
        if self.list.len() > self.most {
            let gap = |index: &usize| self.list[index + 1].first - self.list[*index].last;
            if let Some(index) = (0..self.list.len() - 1).min_by_key(gap) {
                self.list[index].last = self.list.remove(index + 1).last;
            }
        }
    }

    /// Takes a span out.
    pub(crate) fn remove(&mut self, span: Span) {
        let cut = |other: Span| {
            let before = span.first.checked_sub(1).and_then(|last| Span::new(other.first, last.min(other.last)));
            let behind = span.last.checked_add(1).and_then(|first| Span::new(first.max(other.first), other.last));
            before.into_iter().chain(behind)
        };
        let list = std::mem::take(&mut self.list);
        // One more than before at most: what was in one is in two.
        list.into_iter().flat_map(cut).for_each(|rest| self.add(rest));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(first: u64, last: u64) -> Span {
        Span { first, last }
    }

    #[test]
    fn what_touches_is_joined_and_what_is_removed_is_cut_out() {
        let mut spans = Spans::default();
        for (first, last) in [(10, 19), (40, 49), (20, 29), (0, 4), (u64::MAX, u64::MAX), (45, 60)] {
            spans.add(span(first, last));
        }
        assert_eq!(spans.as_slice(), [span(0, 4), span(10, 29), span(40, 60), span(u64::MAX, u64::MAX)]);
        spans.remove(span(3, 44));
        spans.remove(span(50, 50));
        spans.remove(span(u64::MAX, u64::MAX));
        assert_eq!(spans.as_slice(), [span(0, 2), span(45, 49), span(51, 60)]);
        assert_eq!(
            [0, 1, 3, 49, 50, 60].map(|first| spans.at_or_behind(first)),
            [span(0, 2), span(1, 2), span(45, 49), span(49, 49), span(51, 60), span(60, 60)].map(Some)
        );
        assert_eq!(spans.at_or_behind(61), None);
        spans.remove(Span::ALL);
        assert!(spans.as_slice().is_empty());
    }

    #[test]
    fn too_many_become_fewer_and_none_is_lost() {
        let mut spans = Spans::default();
        let all: Vec<Span> = (0..1000).map(|index| span(index * index * 100, index * index * 100 + 9)).collect();
        all.iter().for_each(|span| spans.add(*span));
        assert_eq!(spans.as_slice().len(), MOST);
        assert!(all.iter().all(|one| spans.as_slice().iter().any(|kept| kept.intersection(*one) == Some(*one))));
        assert!(spans.as_slice().windows(2).all(|pair| pair[0].last + 1 < pair[1].first));
    }
}
