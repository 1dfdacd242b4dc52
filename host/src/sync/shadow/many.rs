//! Entries of one page that are wanted one by one: read together, and each looked at by itself.

use std::ops::Range;

use crate::Span;
use crate::memory::{EntryMemory, LINE, PAGE};
use crate::sync::shadow::Shadow;
use crate::sync::shadow::node::{Node, What};
use crate::sync::shadow::pass::{BUFFER, Mode, Pass, count};
use crate::sync::shadow::words::{Swap, Word};
use crate::sync::wanted::{Wanted, extent};
use crate::table::{Piece, low_bits};

/// Entries of one page that are wanted, from which on all between them are read as well: at once, instead of one by one.
const MANY: usize = 4;

impl<M: EntryMemory + ?Sized> Pass<'_, M> {
    /// The first few that each need a few entries of the same page, and share none with others; none if they are too few.
    pub(super) fn run<'w>(&self, node: &Node, wanted: &'w [Wanted]) -> Option<&'w [Wanted]> {
        if wanted.len() < MANY {
            return None;
        }
        let bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let first = self.shadow.place(node, wanted[0].span.first.max(node.span.first));
        let address = node.table + (node.first + first as u64) * bytes;
        let last = first + ((PAGE - address % PAGE) >> bytes.trailing_zeros()) as usize - 1;
        let places = |one: &Wanted| self.shadow.places(node, node.span.intersection(one.span).unwrap_or(node.span)).into_inner();
        let mut count = count(wanted, |one| places(one).1 - places(one).0 < LINE && places(one).1 <= last);
        while count > 0 && wanted.get(count).is_some_and(|next| self.shadow.place(node, next.span.first) == places(&wanted[count - 1]).1) {
            count -= 1;
        }
        (count >= MANY).then(|| &wanted[..count])
    }

    /// Entries of one page, far apart perhaps: what is between them is read as well, and of that nothing is used. No place out of `unread` is read; tells the first
    /// that is still unread.
    pub(super) fn many(&mut self, node: &mut Node, run: &[Wanted], unread: Range<usize>, mode: Mode, deep: bool) -> usize {
        let Some(part) = extent(run).and_then(|extent| extent.intersection(node.span)) else { return unread.start };
        let (from, to) = self.shadow.places(node, part).into_inner();
        // Whole lines are read faster, and do not cross pages where tables begin at one.
        let bytes = u64::from(self.shadow.plan.geometry.entry_bytes);
        let in_lines = (node.table + node.first * bytes) & (LINE as u64 * bytes - 1) == 0;
        let (from, to) = if in_lines { (from / LINE * LINE, to / LINE * LINE + LINE - 1) } else { (from, to) };
        let (from, to) = (from.max(unread.start), to.min(unread.end - 1));
        let mut buffer = self.buffer();
        let changed = self.read(node, from, &mut buffer.0[..to + 1 - from]);
        match changed {
            // Entries that are the same need nothing, and so nothing is asked of them.
            Some(changed) if mode == Mode::Compare && node.unknown + node.tables + node.empties == 0 => {
                let fresh = &buffer.0[..to + 1 - from];
                let mut places = Places::new(self.shadow, node, run, from..to + 1, changed);
                self.changed(node, (from, fresh), &mut places, deep);
            }
            _ => self.each(node, run, (from, changed, &buffer.0), unread.start, mode, deep),
        }
        self.shadow.scratch.buffers.push(buffer);
        to + 1
    }

    /// Of entries that were read, those that are wanted and changed, in a table of leaves.
    fn changed(&mut self, node: &mut Node, (from, fresh): (usize, &[u64]), places: &mut Places, deep: bool) {
        while let Some(place) = places.peek() {
            places.skip();
            let (at, entry) = (from + place, fresh[place]);
            let known = node.entries[at];
            if entry == known {
                continue;
            }
            let words = self.shadow.words.find(node.level, node.inherited, [known, entry]).map(|[old, new]| [*old, *new]);
            let is_done = words.as_ref().is_some_and(|[old, new]| self.swap(node, at, entry, Swap::new(old, new, known, entry)));
            match words.filter(|_| is_done) {
                // Most become what the last one became.
                Some([old, new]) => match Swap::comes(&old, &new) {
                    Some(true) => self.alike::<true>(node, (from, fresh), places, [&old, &new]),
                    Some(false) => self.alike::<false>(node, (from, fresh), places, [&old, &new]),
                    None => {}
                },
                None => {
                    let slot = self.shadow.slot(node, at);
                    self.entry(node, at, entry, &[Wanted::whole(slot)], Mode::Compare, deep);
                }
            }
        }
    }

    /// Pages that all come, or all go, as long as they do as `old` and `new` say; the first that does not is left. By itself, so that what it needs is at hand.
    #[inline(never)]
    fn alike<const COME: bool>(&mut self, node: &mut Node, (from, fresh): (usize, &[u64]), places: &mut Places, [old, new]: [&Word; 2]) {
        let (lsb, count) = (self.shadow.plan.levels[usize::from(node.level)].index_lsb, fresh.len());
        let (below, first) = (low_bits(lsb), node.base + ((node.first + from as u64) << lsb));
        let iova = move |place: usize| Span { first: first + ((place as u64) << lsb), last: (first + ((place as u64) << lsb)) | below };
        let Some(target) = self.shadow.target.filter(|target| target.length_minus_one() >= below) else { return };
        if first < node.span.first || iova(count - 1).last > node.span.last {
            return;
        }
        let (lowest, highest, leaf) = (target.first, target.last - below, if COME { new } else { old });
        let (entries, states) = (&mut node.entries[from..from + count], &mut node.states[from..from + count]);
        while let Some(begin) = places.peek().map(|place| iova(place).first) {
            let room = if COME { self.shadow.limits.leaves.saturating_sub(self.shadow.leaves) } else { u64::MAX };
            let (word, mut rest) = places.word();
            let (entries, states, wanted) = (&mut *entries, &mut *states, rest.count_ones());
            let next = std::iter::from_fn(move || {
                let place = word + rest.trailing_zeros() as usize;
                let (entry, known, state) = (*fresh.get(place).filter(|_| rest != 0)?, entries.get_mut(place)?, states.get_mut(place)?);
                let address = leaf.address(if COME { entry } else { *known });
                let is_such = new.matches(entry) && old.matches(*known) && old.state() == *state;
                if !is_such || !leaf.can_be(address) || address < lowest || address > highest {
                    return None;
                }
                (*known, *state) = (entry, new.state());
                rest &= rest - 1;
                Some((iova(place), address))
            });
            let next = next.take(usize::try_from(room).unwrap_or(usize::MAX));
            let attributes = new.attributes();
            let count = match COME {
                true => self.changes.map_ascending(begin, next.map(move |(iova, address)| Piece { iova, address, attributes })),
                false => self.changes.unmap_ascending(begin, next.map(|(iova, _)| iova)),
            };
            self.shadow.leaves = if COME { self.shadow.leaves + count as u64 } else { self.shadow.leaves - count as u64 };
            (0..count).for_each(|_| places.skip());
            if count < wanted as usize {
                return;
            }
        }
    }

    /// Each entry that is wanted, whatever it is: of some that were read, from the place `from` on, lines that are `changed` are in `fresh`; none of them could be read
    /// if nothing is known of that. What is before `next` was looked at.
    fn each(
        &mut self,
        node: &mut Node,
        run: &[Wanted],
        (from, changed, fresh): (usize, Option<u128>, &[u64]),
        mut next: usize,
        mode: Mode,
        deep: bool,
    ) {
        let mut rest = run;
        while let [first, ..] = rest {
            let Some(part) = node.span.intersection(first.span) else { break };
            let (first_place, last_place) = self.shadow.places(node, part).into_inner();
            let at = next.max(first_place);
            if at > last_place {
                rest = &rest[1..];
                continue;
            }
            next = at + 1;
            let last = self.shadow.slot(node, at).last;
            let here = &rest[..count(rest, |one| one.span.first <= last)];
            if at == last_place {
                rest = &rest[1..];
            }
            let Some(changed) = changed else {
                self.one_entry(node, at, here, mode, deep);
                continue;
            };
            let is_new = changed >> ((at - from) / LINE) & 1 != 0;
            let entry = if is_new { fresh[at - from] } else { node.entries[at] };
            match node.states[at].what() {
                What::Table(child) if mode == Mode::Compare && here.iter().all(|one| one.leaf_only) => self.visit(child, here, mode),
                _ => self.entry(node, at, entry, here, mode, deep),
            }
        }
    }
}

/// Places that one word has bits for.
const WORD: usize = u64::BITS as usize;

/// Some of the entries that were read, ascending.
struct Places {
    /// A bit for each.
    wanted: [u64; BUFFER / WORD],
    /// A bit for each line that is not as it was.
    changed: u128,
    /// The word that is gone through, and what is left of it.
    word: usize,
    rest: u64,
}

impl Places {
    /// Of the entries `among`, those that are wanted, in lines that changed.
    #[inline]
    fn new(shadow: &Shadow, node: &Node, run: &[Wanted], among: Range<usize>, changed: u128) -> Self {
        let (mut wanted, mut word, mut places) = ([0; BUFFER / WORD], 0, 0);
        for part in run.iter().filter_map(|one| node.span.intersection(one.span)) {
            let (first, last) = shadow.places(node, part).into_inner();
            for place in (first.max(among.start)..=last.min(among.end - 1)).map(|place| place - among.start) {
                if place / WORD != word {
                    wanted[word] = std::mem::take(&mut places);
                    word = place / WORD;
                }
                places |= 1 << (place % WORD);
            }
        }
        wanted[word] = places;
        Self { rest: wanted[0] & of_lines(changed as u8), wanted, changed, word: 0 }
    }

    /// The next, which stays the next.
    #[inline]
    fn peek(&mut self) -> Option<usize> {
        while self.rest == 0 {
            if self.word == BUFFER / WORD - 1 {
                return None;
            }
            self.word += 1;
            self.changed >>= WORD / LINE;
            self.rest = self.wanted[self.word] & of_lines(self.changed as u8);
        }
        Some(self.word * WORD + self.rest.trailing_zeros() as usize)
    }

    /// What is left of a word that has some: the place of its first bit, and the bits.
    #[inline]
    const fn word(&self) -> (usize, u64) {
        (self.word * WORD, self.rest)
    }

    /// What was the next is done.
    #[inline]
    const fn skip(&mut self) {
        self.rest &= self.rest.wrapping_sub(1);
    }
}

/// A bit for each entry of eight lines, of those that have a bit.
#[inline]
const fn of_lines(lines: u8) -> u64 {
    const EACH: u64 = 0x0101_0101_0101_0101;
    // Byte `n` gets bit `n`, wherever that stands in it, and then all bits.
    let alone = (lines as u64 * EACH) & 0x8040_2010_0804_0201;
    ((alone + 0x7f * EACH) >> 7 & EACH) * 0xff
}
