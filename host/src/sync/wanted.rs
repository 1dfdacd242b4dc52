//! Which IOVAs somebody wants to be looked at.

use crate::Span;

/// IOVAs to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) span: Span,
    /// Entries that were tables are taken to be the same tables.
    pub(super) leaf_only: bool,
}

impl Wanted {
    /// All tables on the way are looked at as well.
    #[inline]
    pub(super) const fn whole(span: Span) -> Self {
        Self { span, leaf_only: false }
    }
}

/// From the first IOVA of some that ascend to the last.
#[inline]
pub(super) fn extent(wanted: &[Wanted]) -> Option<Span> {
    Some(Span { first: wanted.first()?.span.first, last: wanted.last()?.span.last })
}

/// Of some that ascend, those that have an IOVA of `span`.
#[inline]
pub(super) fn within(wanted: &[Wanted], span: Span) -> &[Wanted] {
    // Mostly there is one, or all are.
    let from =
        if wanted.first().is_none_or(|first| first.span.last >= span.first) { 0 } else { wanted.partition_point(|one| one.span.last < span.first) };
    let wanted = &wanted[from..];
    let to = if wanted.last().is_none_or(|last| last.span.first <= span.last) {
        wanted.len()
    } else {
        wanted.partition_point(|one| one.span.first <= span.last)
    };
    &wanted[..to]
}

/// Sorts them, and joins those that overlap, and those that touch and are alike when they meet; leaves only, if both are.
#[inline]
pub(super) fn join(wanted: &mut Vec<Wanted>) {
    if wanted.len() >= 2 {
        join_all(wanted);
    }
}

fn join_all(wanted: &mut Vec<Wanted>) {
    if !wanted.is_sorted_by_key(|one| one.span.first) {
        // Guests free what they mapped in a few runs that ascend; a stable sort joins runs, the other one would not see them.
        wanted.sort_by_key(|one| one.span.first);
    }
    wanted.dedup_by(|next, last| {
        let touches = last.span.last.saturating_add(1) >= next.span.first;
        // Two that only touch stay apart if one of them is for leaves only.
        let joined = touches && (last.leaf_only == next.leaf_only || next.span.first <= last.span.last);
        if joined {
            last.span.last = last.span.last.max(next.span.last);
            last.leaf_only &= next.leaf_only;
        }
        joined
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(first: u64, last: u64, leaf_only: bool) -> Wanted {
        Wanted { span: Span { first, last }, leaf_only }
    }

    #[test]
    fn what_overlaps_is_one_and_what_touches_if_it_is_alike() {
        let mut all =
            vec![wanted(30, 39, true), wanted(0, 9, true), wanted(10, 19, true), wanted(20, 29, false), wanted(35, 50, false), wanted(60, 69, true)];
        join(&mut all);
        // The second and the third were not alike when they met.
        assert_eq!(all, [wanted(0, 19, true), wanted(20, 29, false), wanted(30, 50, false), wanted(60, 69, true)]);
        assert_eq!(extent(&all), Some(Span { first: 0, last: 69 }));
        assert_eq!(within(&all, Span { first: 19, last: 59 }), &all[..3]);
        assert_eq!(within(&all, Span { first: 51, last: 59 }), []);
        assert_eq!(within(&all, Span { first: 69, last: 70 }), &all[3..]);
        assert_eq!(within(&all, Span::ALL), &all[..]);
    }
}
