//! The one writer.

use std::sync::Arc;

use super::nodes::Nodes;
use super::part::{self, Part};
use super::tree::Tree;
use super::word::{self, ABSENT, INDEX_BITS, NODE, PAGE_BITS, SLOTS, TOP, Word};
use super::{Limits, Lookup, LookupError};
use crate::table::Piece;
use crate::{Change, Span};

const PAGE_MASK: u64 = (1 << PAGE_BITS) - 1;

/// Changes what the handles of one [`Lookup`] find. There is one of it for each address space.
#[derive(Debug)]
pub struct Updater {
    tree: Arc<Tree>,
    nodes: Nodes,
    limits: Limits,
    /// Where something may be missing since the last batch.
    missing: Vec<Span>,
}

impl Updater {
    /// An address space in which nothing is mapped, and a handle for those who look things up. Memory is reserved for as many nodes as `limits` allows, and
    /// taken as they are used.
    ///
    /// # Errors
    /// There is not so much memory.
    pub fn new(limits: Limits) -> Result<(Self, Lookup), LookupError> {
        let words = (limits.nodes as usize).saturating_mul(NODE);
        let no_memory = LookupError::NoMemory { nodes: limits.nodes };
        let (Some(tree), Some(nodes)) = (Tree::new(words), Nodes::new(words)) else { return Err(no_memory) };
        let tree = Arc::new(tree);
        Ok((Self { tree: Arc::clone(&tree), nodes, limits, missing: Vec::new() }, Lookup { tree }))
    }

    /// Makes one batch of changes, in their order. When it returns, no lookup that begins then finds anything that was unmapped; until then a lookup finds the
    /// old or the new. What is mapped before and after the batch, to the same address, is found all the time, also if the batch unmaps and maps it.
    ///
    /// # Errors
    /// There was no room for all of it, or it is too fine; this is the first error. Everything that was to be unmapped is unmapped nevertheless, and a mapping that
    /// failed is not there at all. Only then something may be missing that no change spoke of: what was mapped in one slot with what changed. [`Updater::missing`] says where.
    pub fn apply(&mut self, changes: &[Change]) -> Result<(), LookupError> {
        let mut result = Ok(());
        self.missing.clear();
        for change in changes {
            let made = match change {
                // What does not fit whole is not mapped; unmapping it ends well or drops more.
                Change::Map(piece) => self.write(piece.iova, Some(piece)).or_else(|error| {
                    self.missing.push(piece.iova);
                    self.write(piece.iova, None).and(Err(error))
                }),
                Change::Unmap(span) => self.write(*span, None),
            };
            result = result.and(made);
        }
        self.nodes.publish(&self.tree);
        result
    }

    /// IOVAs at which something is missing after the last batch, which failed: in no order, and some perhaps more than once. What is mapped there may be mapped again when
    /// there is room, whether it is there or not.
    #[must_use]
    pub fn missing(&self) -> &[Span] {
        &self.missing
    }

    /// Unmaps everything.
    pub fn clear(&mut self) {
        self.nodes.clear();
        self.nodes.publish(&self.tree);
    }

    /// Bytes that mappings take: those that readers see, and as many for the writer.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        (self.nodes.in_use() * NODE * 16) as u64
    }

    /// Another handle for those who look things up.
    #[must_use]
    pub fn lookup(&self) -> Lookup {
        Lookup { tree: Arc::clone(&self.tree) }
    }

    const fn full(&self, span: Span) -> LookupError {
        LookupError::Full { span, limit: self.limits.nodes }
    }

    fn write(&mut self, span: Span, piece: Option<&Piece>) -> Result<(), LookupError> {
        if piece.is_some() {
            self.cover(span)?;
        }
        let Some((level, root)) = self.nodes.root else { return Ok(()) };
        let Some(span) = word::covered(level, self.nodes.about(root)).intersection(span) else { return Ok(()) };
        self.write_node(root, word::shift(level), span, piece)
    }

    /// Sees to it that the root covers `span`.
    fn cover(&mut self, span: Span) -> Result<(), LookupError> {
        let full = self.full(span);
        let one = |level| word::prefix(span.first, level) == word::prefix(span.last, level);
        let Some((mut level, mut root)) = self.nodes.root else {
            let level = (0..TOP).find(|level| one(*level)).unwrap_or(TOP);
            return self.nodes.make_root(level, word::prefix(span.first, level)).map(|_| ()).ok_or(full);
        };
        while !(one(level) && word::prefix(span.first, level) == self.nodes.about(root)) {
            let first = word::covered(level, self.nodes.about(root)).first;
            level += 1;
            let above = self.nodes.make_root(level, word::prefix(first, level)).ok_or(full)?;
            self.nodes.adopt(above + word::index(first, word::shift(level)), root);
            root = above;
        }
        Ok(())
    }

    /// Writes the slots of a node as far as `span` goes; the node covers it.
    fn write_node(&mut self, at: usize, bits: u32, span: Span, piece: Option<&Piece>) -> Result<(), LookupError> {
        let within = (1_u64 << bits) - 1;
        let mut result = Ok(());
        let mut first = span.first;
        loop {
            let last = span.last.min(first | within);
            let made = self.write_slot(at + word::index(first, bits), bits, Span { first, last }, piece);
            result = result.and(made);
            // A mapping that does not fit is given up; unmapping goes on.
            if last == span.last || (result.is_err() && piece.is_some()) {
                return result;
            }
            first = last + 1;
        }
    }

    /// Writes what `span` has of a slot.
    fn write_slot(&mut self, slot: usize, bits: u32, span: Span, piece: Option<&Piece>) -> Result<(), LookupError> {
        if span.length_minus_one() == (1 << bits) - 1 {
            let word = piece.map_or(Some(ABSENT), |piece| {
                let address = piece.address.wrapping_add(span.first - piece.iova.first);
                (address & PAGE_MASK == 0).then(|| word::mapped(address, piece.attributes))
            });
            if let Some(word) = word {
                self.nodes.replace(slot, word);
                return Ok(());
            }
        }
        if bits == PAGE_BITS {
            return self.write_parts(slot, span, piece);
        }
        let node = match word::read(self.nodes.word(slot)) {
            Word::Node(at) => at,
            Word::Absent if piece.is_none() => return Ok(()),
            _ => self.split(slot, bits, span)?,
        };
        self.write_node(node, bits - INDEX_BITS, span, piece)
    }

    /// Makes a slot one of smaller slots, which hold what it held.
    fn split(&mut self, slot: usize, bits: u32, span: Span) -> Result<usize, LookupError> {
        let Some(at) = self.nodes.make(slot) else {
            // Rather nothing is mapped than too much.
            self.nodes.replace(slot, ABSENT);
            let within = (1_u64 << bits) - 1;
            let slot = Span { first: span.first & !within, last: span.last | within };
            self.missing.push(slot);
            return Err(self.full(slot));
        };
        if let Word::Mapped(address, attributes) = word::read(self.nodes.word(slot)) {
            for index in 0..SLOTS {
                let address = address.wrapping_add((index as u64) << (bits - INDEX_BITS));
                self.nodes.set(at + index, word::mapped(address, attributes));
            }
        }
        self.nodes.set(slot, word::node(at));
        Ok(at)
    }

    /// Writes a part of a page.
    fn write_parts(&mut self, slot: usize, span: Span, piece: Option<&Piece>) -> Result<(), LookupError> {
        let before = match word::read(self.nodes.word(slot)) {
            Word::Mapped(address, attributes) => vec![Part { bytes: Span { first: 0, last: PAGE_MASK }, address, attributes }],
            Word::List(at) => self.nodes.parts(at),
            Word::Absent | Word::Node(_) => Vec::new(),
        };
        let bytes = Span { first: span.first & PAGE_MASK, last: span.last & PAGE_MASK };
        let part = piece.map(|piece| {
            let address = piece.address.wrapping_add(span.first - piece.iova.first);
            Part { bytes, address, attributes: piece.attributes }
        });
        let after = part::change(&before, bytes, part);
        match &after[..] {
            [] => self.nodes.replace(slot, ABSENT),
            [part] if part.bytes.length_minus_one() == PAGE_MASK && part.address & PAGE_MASK == 0 => {
                self.nodes.replace(slot, word::mapped(part.address, part.attributes));
            }
            parts => {
                if !self.nodes.write_list(slot, parts) {
                    self.nodes.replace(slot, ABSENT);
                    let page = Span { first: span.first & !PAGE_MASK, last: span.last | PAGE_MASK };
                    self.missing.push(page);
                    return Err(if parts.len() > part::MOST_PARTS { LookupError::TooFine { page } } else { self.full(page) });
                }
            }
        }
        Ok(())
    }
}
