//! What the entries stand for that a guest writes all the time: for each kind of table the few patterns that were met last, with all that is needed to tell what
//! they show. They hold as long as the format's answers do.

use crate::Attributes;
use crate::sync::shadow::kind::{Asked, Kind, NOTHING_MISSING};
use crate::sync::shadow::node::State;
use crate::table::{LeafMarks, Move, Plan, low_bits};

/// Patterns of one kind of table.
const RECENT: usize = 4;

/// What all entries with one pattern stand for: nothing, or a leaf.
#[derive(Clone, Copy, Debug)]
pub(super) struct Word {
    mask: u64,
    pattern: u64,
    inherited: u64,
    state: State,
    /// A leaf that shows a page, as large as its slot, if its address can be. Otherwise nothing is shown.
    is_page: bool,
    /// Where its address is: bits that stand in place, and those that move.
    in_place: u64,
    moved: Move,
    /// Address bits that no page has: below its size, and beyond all outputs.
    never: u64,
    /// A leaf that hardware has to mark.
    waits: bool,
    attributes: Attributes,
}

/// No entry is this.
const NONE: Word = Word {
    mask: 0,
    pattern: 1,
    inherited: 0,
    state: State::NOTHING,
    is_page: false,
    in_place: 0,
    moved: Move { mask: 0, turn: 0 },
    never: 0,
    waits: false,
    attributes: Attributes::none(),
};

impl Word {
    /// Whether an entry of a table with this word is one of these.
    #[inline]
    pub(super) const fn is(&self, inherited: u64, entry: u64) -> bool {
        self.matches(entry) && self.inherited == inherited
    }

    /// The same in a table with this word.
    #[inline]
    pub(super) const fn matches(&self, entry: u64) -> bool {
        entry & self.mask == self.pattern
    }

    /// What such entries stand for.
    pub(super) const fn state(&self) -> State {
        self.state
    }

    /// What is allowed where they lead.
    pub(super) const fn attributes(&self) -> Attributes {
        self.attributes
    }

    /// Where the page goes that an entry shows, if it shows one.
    #[inline]
    const fn page(&self, entry: u64) -> Option<u64> {
        let address = self.address(entry);
        if self.is_page && self.can_be(address) { Some(address) } else { None }
    }

    /// Where a leaf leads.
    #[inline]
    pub(super) const fn address(&self, entry: u64) -> u64 {
        entry & self.in_place | self.moved.apply(entry)
    }

    /// Whether a page can be there.
    #[inline]
    pub(super) const fn can_be(&self, address: u64) -> bool {
        address & self.never == 0
    }
}

/// One entry instead of another.
#[derive(Clone, Copy)]
pub(super) struct Swap {
    /// What the old one stands for, and the new one.
    pub(super) old: State,
    pub(super) new: State,
    /// The new one is a leaf that hardware has to mark.
    pub(super) waits: bool,
    /// Where the page goes that is shown: by the new one, or else by the old one.
    pub(super) page: Option<u64>,
    pub(super) attributes: Attributes,
}

impl Swap {
    #[inline(always)]
    pub(super) fn new(old: &Word, new: &Word, known: u64, entry: u64) -> Self {
        let page = if new.state == State::NOTHING { old.page(known) } else { new.page(entry) };
        Self { old: old.state, new: new.state, waits: new.waits, page, attributes: new.attributes }
    }

    /// Whether a page comes where nothing was, or goes and leaves nothing; none if it is another kind of change.
    pub(super) fn comes(old: &Word, new: &Word) -> Option<bool> {
        match (old.state == State::NOTHING, new.state == State::NOTHING) {
            (true, false) if new.is_page && !new.waits => Some(true),
            (false, true) if old.is_page => Some(false),
            _ => None,
        }
    }
}

/// All words.
#[derive(Debug)]
pub(super) struct Words(Vec<[Word; RECENT]>);

impl Words {
    /// None yet, for so many kinds of tables.
    pub(super) fn new(levels: usize) -> Self {
        Self(vec![[NONE; RECENT]; levels])
    }

    /// What two entries of one table stand for, if that is remembered.
    #[inline]
    pub(super) fn find(&self, level: u8, inherited: u64, entries: [u64; 2]) -> Option<[&Word; 2]> {
        let words = self.0.get(usize::from(level))?;
        let find = |entry: u64| words.iter().find(|word| word.is(inherited, entry));
        Some([find(entries[0])?, find(entries[1])?])
    }

    /// Remembers what was asked about an entry, if that is simple: its pattern tells what it is, and it is nothing, or a leaf of a kind as large as its slot.
    pub(super) fn learn(&mut self, level: u8, plan: &Plan, inherited: u64, asked: &Asked, leaf: Option<(State, &Kind)>) {
        let Some(words) = self.0.get_mut(usize::from(level)) else { return };
        let mut word = Word { mask: asked.mask, pattern: asked.pattern, inherited, ..NONE };
        if let Some((state, kind)) = leaf {
            let table = &plan.levels[usize::from(level)];
            let field = table.field(kind.shape);
            let simple = kind.size_log2 == table.index_lsb && kind.missing == NOTHING_MISSING && field.is_plain();
            if asked.whole || !simple {
                return;
            }
            word = Word {
                state,
                is_page: !kind.attributes.grants_nothing(),
                in_place: field.in_place,
                moved: field.moved,
                never: low_bits(kind.size_log2) | !low_bits(plan.geometry.output_bits),
                waits: !LeafMarks::of(&plan.geometry, level, kind.attributes).is_none(),
                attributes: kind.attributes,
                ..word
            };
        }
        if asked.whole {
            return;
        }
        let same = |known: &Word| (known.mask, known.pattern, known.inherited) == (word.mask, word.pattern, inherited);
        match words.iter_mut().find(|known| same(known)) {
            Some(known) => *known = word,
            None => {
                words.rotate_right(1);
                words[0] = word;
            }
        }
    }
}
