//! What a shadow offers to whoever joins several.

use crate::Span;
use crate::memory::{Budget, EntryMemory, MemoryMap};
use crate::sync::changes::Changes;
use crate::sync::shadow::node::{NodeId, What};
use crate::sync::shadow::pass::Pass;
use crate::sync::shadow::{Shadow, ShadowLimits, Watcher, same_shape};
use crate::table::Piece;
use crate::table::{Format, Judge, OpenError, Plan};
use std::ops::ControlFlow;

/// A format whose geometry was asked for and makes sense: a shadow can be given it, and nothing can fail any more.
pub(in crate::sync) struct Prepared {
    format: Box<dyn Format>,
    plan: Plan,
}

impl Prepared {
    pub(in crate::sync) fn new(mut format: Box<dyn Format>) -> Result<Self, OpenError> {
        let plan = Plan::new(format.geometry().map_err(OpenError::Format)?)?;
        Ok(Self { format, plan })
    }
}

impl Shadow {
    /// Whether tables of the new format can be compared with those that were seen, entry by entry.
    pub(in crate::sync) fn has_shape_of(&self, prepared: &Prepared) -> bool {
        same_shape(&self.plan.geometry, &prepared.plan.geometry)
    }

    /// [`Shadow::switch`], with a format that was looked at.
    pub(in crate::sync) fn switch_to<M: EntryMemory + ?Sized>(&mut self, prepared: Prepared, memory: &M, budget: &Budget, changes: &mut Changes) {
        let keep = self.has_shape_of(&prepared);
        let Prepared { format, plan } = prepared;
        if !keep {
            for root in 0..self.roots.len() {
                if let Some(node) = self.roots[root].take() {
                    Pass::new(self, memory, budget, changes).remove(node);
                }
            }
            self.roots = vec![None; plan.geometry.roots.len()];
        }
        self.judge = Judge::new(format, plan.levels.len());
        self.plan = plan;
        for root in 0..self.roots.len() {
            let whole = self.root_span(root);
            Pass::new(self, memory, budget, changes).root_anew(root, whole);
        }
    }

    /// Tells `each` every piece that is mapped at some IOVA of `span`.
    pub fn pieces(&self, span: Span, each: &mut dyn FnMut(Piece)) {
        let _ = self.pieces_until(span, &mut |piece| {
            each(piece);
            ControlFlow::Continue(())
        });
    }

    pub(in crate::sync) fn pieces_until(&self, span: Span, each: &mut dyn FnMut(Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        for root in self.roots.iter().flatten() {
            self.pieces_of(*root, span, each)?;
        }
        ControlFlow::Continue(())
    }

    fn pieces_of(&self, id: NodeId, span: Span, each: &mut dyn FnMut(Piece) -> ControlFlow<()>) -> ControlFlow<()> {
        let Some(node) = self.nodes.get(id) else { return ControlFlow::Continue(()) };
        let level = &self.plan.levels[usize::from(node.level)];
        for at in 0..node.states.len() {
            match node.states[at].what() {
                What::Table(below) => self.pieces_of(below, span, each)?,
                What::Leaf(kind) => {
                    let slot = Span::of_log2(node.base + ((node.first + at as u64) << level.index_lsb), level.index_lsb);
                    let slot = slot.intersection(node.span).unwrap_or(slot);
                    let output = Span::of_log2(0, self.plan.geometry.output_bits);
                    let piece = self.kinds.get(kind).and_then(|kind| kind.piece(level, slot, node.entries[at], output));
                    let Some(piece) = piece.filter(|piece| !piece.attributes.grants_nothing()) else { continue };
                    let targets = Span { first: piece.address, last: piece.address + piece.iova.length_minus_one() };
                    for target in self.map.targets_within(targets) {
                        let first = piece.iova.first + (target.first - targets.first);
                        let iova = Span { first, last: first + target.length_minus_one() };
                        if iova.intersection(span).is_some() {
                            each(Piece { iova, address: target.first, attributes: piece.attributes })?;
                        }
                    }
                }
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }

    pub(in crate::sync) const fn limits(&self) -> ShadowLimits {
        self.limits
    }

    /// Other limits; what is held already stays.
    pub(in crate::sync) const fn set_limits(&mut self, limits: ShadowLimits) {
        self.limits = limits;
    }

    pub(in crate::sync) const fn map(&self) -> &MemoryMap {
        &self.map
    }

    /// Has another watcher from now on, which knows of all pages that are watched; the old one is told nothing more.
    pub(in crate::sync) fn exchange_watcher(&mut self, watcher: Box<dyn Watcher>) -> Box<dyn Watcher> {
        self.pages.exchange_watcher(watcher)
    }
}
