//! What a shadow offers to whoever joins several.

use std::ops::ControlFlow;

use crate::memory::{Budget, EntryMemory, MemoryMap, PAGE};
use crate::sync::changes::Changes;
use crate::sync::shadow::pass::{Mode, Pass};
use crate::sync::shadow::words::Words;
use crate::sync::shadow::{Shadow, ShadowLimits, Watcher, same_shape};
use crate::table::{Format, Geometry, Judge, OpenError, Plan};
use crate::{Gpa, Span};

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

    pub(in crate::sync) const fn geometry(&self) -> &Geometry {
        &self.plan.geometry
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
        self.empties.begin();
        self.empties.forget();
        self.asked_before += self.judge.asked();
        self.judge = Judge::new(format, plan.levels.len());
        self.words = Words::new(plan.levels.len());
        self.plan = plan;
        for root in 0..self.roots.len() {
            let whole = self.root_span(root);
            Pass::new(self, memory, budget, changes).root_anew(root, whole);
        }
        Pass::new(self, memory, budget, changes).settle();
    }

    /// Whether hardware can mark entries in a page of tables is another question now: looks at them again, also at those that are the same.
    pub(in crate::sync) fn marks_changed<M: EntryMemory + ?Sized>(&mut self, memory: &M, page: Gpa, budget: &Budget, changes: &mut Changes) {
        self.look_at_entries(memory, Span::of_log2(page.0, PAGE.trailing_zeros() as u8), Mode::Judge, budget, changes);
    }

    /// Tells `each` the IOVAs that tables in a page serve, by the page's number, until it says false.
    pub(in crate::sync) fn served_by(&self, page: u64, each: &mut dyn FnMut(Span) -> bool) -> ControlFlow<()> {
        let mut nodes = Vec::new();
        self.pages.holders(page, &mut nodes);
        for id in nodes {
            match self.nodes.get(id) {
                Some(node) if node.shared.is_some() => self.shared_by(id, each)?,
                Some(node) if !each(node.span) => return ControlFlow::Break(()),
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
