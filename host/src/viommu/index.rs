//! Which address spaces a command means, found by the numbers in it: the cost is that of those that are meant.

use std::collections::{BTreeMap, BTreeSet};

use crate::plugin::Tag;
use crate::plugin::queue::Scope;

/// An address space under one of its names: domain, space within it, and its number.
type Name = (Option<u32>, Option<u32>, u64);

/// Names of all address spaces with tables.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// By domain first; each name with the number of streams that give it.
    by_domain: BTreeMap<Name, u32>,
    /// The same, by space first.
    by_space: BTreeMap<Name, u32>,
}

impl Index {
    /// One more stream gives a space this name.
    pub(super) fn add(&mut self, tag: Tag, space: u64) {
        *self.by_domain.entry((tag.domain, tag.space, space)).or_default() += 1;
        *self.by_space.entry((tag.space, tag.domain, space)).or_default() += 1;
    }

    /// One stream less does.
    pub(super) fn remove(&mut self, tag: Tag, space: u64) {
        let less = |names: &mut BTreeMap<Name, u32>, name: Name| {
            if let Some(count) = names.get_mut(&name) {
                *count -= 1;
                if *count == 0 {
                    names.remove(&name);
                }
            }
        };
        less(&mut self.by_domain, (tag.domain, tag.space, space));
        less(&mut self.by_space, (tag.space, tag.domain, space));
    }

    /// The spaces with a name that the numbers of `scope` mean; its id does not count.
    pub(super) fn named(&self, scope: &Scope, found: &mut BTreeSet<u64>) {
        // A name without a number is always meant.
        match (scope.domain.map(u32::from), scope.space) {
            (Some(domain), space) => within(&self.by_domain, domain, space, found),
            (None, Some(space)) => within(&self.by_space, space, None, found),
            (None, None) => found.extend(self.by_domain.keys().map(|(_, _, space)| space)),
        }
    }
}

/// Names whose first number is `first` or missing, and whose second is `second`, if that counts, or missing.
fn within(names: &BTreeMap<Name, u32>, first: u32, second: Option<u32>, found: &mut BTreeSet<u64>) {
    for first in [None, Some(first)] {
        let mut add = |from: Option<u32>, to: Option<u32>| {
            found.extend(names.range((first, from, 0)..=(first, to, u64::MAX)).map(|((_, _, space), _)| space));
        };
        match second {
            None => add(None, Some(u32::MAX)),
            Some(second) => {
                add(None, None);
                add(Some(second), Some(second));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERYBODY: Scope = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };

    /// All combinations of numbers, compared with what a scope says of one tag.
    #[test]
    fn the_index_finds_whom_a_scope_includes() {
        let numbers = [None, Some(0), Some(1), Some(7)];
        let tags: Vec<Tag> = numbers.iter().flat_map(|domain| numbers.map(|space| Tag { domain: *domain, space })).collect();
        let mut index = Index::default();
        tags.iter().zip(0..).for_each(|(tag, space)| index.add(*tag, space));
        for domain in numbers {
            for space in numbers {
                let scope = Scope { domain: domain.map(|domain| domain as u16), space, ..EVERYBODY };
                let mut found = BTreeSet::new();
                index.named(&scope, &mut found);
                let wanted: BTreeSet<u64> = tags.iter().zip(0..).filter(|(tag, _)| scope.includes(**tag, 0)).map(|(_, space)| space).collect();
                assert_eq!(found, wanted, "{scope:?}");
            }
        }
    }

    #[test]
    fn a_name_stays_as_long_as_a_stream_gives_it() {
        let (mut index, tag) = (Index::default(), Tag { domain: Some(3), space: None });
        index.add(tag, 9);
        index.add(tag, 9);
        index.remove(tag, 9);
        let found = |index: &Index| {
            let mut found = BTreeSet::new();
            index.named(&Scope { domain: Some(3), ..EVERYBODY }, &mut found);
            found.len()
        };
        assert_eq!(found(&index), 1);
        index.remove(tag, 9);
        index.remove(tag, 9);
        assert_eq!(found(&index), 0);
    }
}
