//! The writer's own copy of the words, and which nodes are in use. A batch changes the copy; then all that changed is published at once, each slot with one store.
//!
//! So what a batch unmaps and maps again to the same place never disappears for readers: the word of its slot does not change, or changes once.

use std::collections::VecDeque;

use super::part;
use super::tree::Tree;
use super::word::{self, ABOUT, ABSENT, NODE, SLOTS, Word};

/// Instead of a slot, for the root.
pub(super) const ROOT: usize = usize::MAX;

/// So many unused nodes rest before the first of them is used again: a reader must be overtaken by all these changes before it has to look again.
const RESERVE: usize = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Not used.
    Free,
    /// Made by this batch: readers do not know it.
    New,
    /// Readers find it.
    Live,
    /// Unlinked by this batch: readers still find it.
    Retired,
}

/// What the writer knows about a node.
#[derive(Clone, Copy, Debug)]
struct About {
    state: State,
    /// Slots that hold something.
    used: u16,
    /// Readers may know it as another node.
    known: bool,
    /// The slot that links to it.
    parent: usize,
}

/// All nodes.
pub(super) struct Nodes {
    words: Box<[u64]>,
    about: Vec<About>,
    free: VecDeque<usize>,
    made: Vec<usize>,
    retired: Vec<usize>,
    emptied: Vec<usize>,
    changed: Vec<usize>,
    /// Level and place of the root.
    pub(super) root: Option<(u32, usize)>,
    root_changed: bool,
    in_use: usize,
}

impl Nodes {
    /// Room for so many words. None if there is not so much memory.
    pub(super) fn new(words: usize) -> Option<Self> {
        Some(Self {
            words: bytemuck::allocation::try_zeroed_slice_box(words).ok()?,
            about: Vec::new(),
            free: VecDeque::new(),
            made: Vec::new(),
            retired: Vec::new(),
            emptied: Vec::new(),
            changed: Vec::new(),
            root: None,
            root_changed: false,
            in_use: 0,
        })
    }

    /// Nodes that are in use.
    pub(super) const fn in_use(&self) -> usize {
        self.in_use
    }

    /// The word of a slot.
    pub(super) fn word(&self, slot: usize) -> u64 {
        self.words[slot]
    }

    /// The parts of a list.
    pub(super) fn parts(&self, at: usize) -> Vec<part::Part> {
        part::parts(&self.words[at..at + NODE])
    }

    /// A new node without content, which `parent` is going to link to: where its words begin. None if there is no room.
    pub(super) fn make(&mut self, parent: usize) -> Option<usize> {
        let fresh = self.about.len();
        let has_fresh = (fresh + 1) * NODE <= self.words.len();
        let node = if self.free.len() > RESERVE || !has_fresh { self.free.pop_front() } else { None };
        let node = match node {
            Some(node) => {
                self.words[node * NODE..(node + 1) * NODE].fill(ABSENT);
                node
            }
            None if has_fresh => {
                self.about.push(About { state: State::Free, used: 0, known: false, parent });
                fresh
            }
            None => return None,
        };
        self.about[node] = About { state: State::New, used: 0, parent, ..self.about[node] };
        self.made.push(node);
        // Until something is put into it.
        self.emptied.push(node);
        self.in_use += 1;
        Some(node * NODE)
    }

    /// A new root; `prefix` says which IOVAs it covers.
    pub(super) fn make_root(&mut self, level: u32, prefix: u64) -> Option<usize> {
        let at = self.make(ROOT)?;
        self.words[at + ABOUT] = prefix;
        self.root = Some((level, at));
        self.root_changed = true;
        Some(at)
    }

    /// What the word about a node says.
    pub(super) fn about(&self, at: usize) -> u64 {
        self.words[at + ABOUT]
    }

    /// Says that `slot` links to the node at `at` now.
    pub(super) fn adopt(&mut self, slot: usize, at: usize) {
        self.about[at / NODE].parent = slot;
        self.set(slot, word::node(at));
    }

    /// Gives a slot another word, and gives up what was below it.
    pub(super) fn replace(&mut self, slot: usize, word: u64) {
        self.give_up(self.words[slot]);
        self.set(slot, word);
    }

    /// Gives a slot another word.
    pub(super) fn set(&mut self, slot: usize, word: u64) {
        let old = std::mem::replace(&mut self.words[slot], word);
        let node = slot / NODE;
        let about = &mut self.about[node];
        about.used = about.used + u16::from(word != ABSENT) - u16::from(old != ABSENT);
        if about.used == 0 {
            self.emptied.push(node);
        }
        if about.state == State::Live && old != word {
            self.changed.push(slot);
        }
    }

    /// Writes a list, in place if no reader knows it; false if it does not fit.
    pub(super) fn write_list(&mut self, slot: usize, parts: &[part::Part]) -> bool {
        let old = match word::read(self.words[slot]) {
            Word::List(at) if self.about[at / NODE].state == State::New => Some(at),
            _ => None,
        };
        let Some(at) = old.or_else(|| self.make(slot)) else { return false };
        let fits = part::fill(&mut self.words[at..at + NODE], parts);
        if old.is_none() {
            self.replace(slot, word::list(at));
        }
        fits
    }

    /// Gives up all nodes below a word.
    fn give_up(&mut self, word: u64) {
        match word::read(word) {
            Word::Node(at) => {
                for slot in at..at + SLOTS {
                    self.give_up(self.words[slot]);
                }
                self.retire(at / NODE);
            }
            Word::List(at) => self.retire(at / NODE),
            Word::Absent | Word::Mapped(..) => {}
        }
    }

    fn retire(&mut self, node: usize) {
        self.in_use -= 1;
        if self.about[node].state == State::Live {
            self.about[node].state = State::Retired;
            self.retired.push(node);
        } else {
            self.about[node].state = State::Free;
            self.free.push_back(node);
        }
    }

    /// Gives up the whole tree.
    pub(super) fn clear(&mut self) {
        if let Some((_, at)) = self.root.take() {
            self.give_up(word::node(at));
            self.root_changed = true;
        }
    }

    /// Gives up nodes of slots that hold nothing any more.
    fn give_up_emptied(&mut self) {
        while let Some(node) = self.emptied.pop() {
            let About { state, used, parent, .. } = self.about[node];
            if used != 0 || !matches!(state, State::New | State::Live) {
                continue;
            }
            if parent == ROOT {
                self.clear();
            } else if word::read(self.words[parent]) == Word::Node(node * NODE) {
                self.replace(parent, ABSENT);
            }
        }
    }

    /// Shows readers all that changed.
    pub(super) fn publish(&mut self, tree: &Tree) {
        self.give_up_emptied();
        if self.made.iter().any(|node| self.about[*node].state == State::New && self.about[*node].known) {
            tree.count_up();
        }
        for node in self.made.drain(..) {
            // Twice in the list if it was given up and made again: the first time serves both.
            if self.about[node].state == State::New {
                self.about[node] = About { state: State::Live, known: true, ..self.about[node] };
                (node * NODE..node * NODE + ABOUT + 1).for_each(|at| tree.publish(at, self.words[at]));
            }
        }
        for slot in self.changed.drain(..) {
            // What is left of an unlinked node stays as it is, for readers that are in it.
            if self.about[slot / NODE].state == State::Live {
                tree.publish(slot, self.words[slot]);
            }
        }
        if std::mem::take(&mut self.root_changed) {
            tree.publish_root(self.root);
        }
        for node in self.retired.drain(..) {
            self.about[node].state = State::Free;
            self.free.push_back(node);
        }
    }
}

impl std::fmt::Debug for Nodes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nodes").field("in_use", &self.in_use).field("root", &self.root).finish_non_exhaustive()
    }
}
