//! Marks on their way back: what the library writes into the guest's tables of what its devices did.

use std::collections::BTreeSet;

use stagecraft::Span;
use stagecraft::ioasid::Strategy;
use stagecraft::sync::MarksWritten;
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::TableConfig;
use stagecraft_tests::reference::walk::Walker;

use crate::compare::limits;
use crate::session::{Outcomes, Session, View, Who};

/// IOVAs that are looked at for each requester, at most.
const LOOKED_AT: usize = 24;

/// A device, where it did DMA, and whether that was a write.
type Used = (Who, u64, bool);

impl Session<'_> {
    /// Devices do DMA, and each address space that knows the tables as they are now has marks written. What was used lacks none then, in entries of any level and stage; and
    /// nothing else has changed.
    pub fn write_marks(&mut self) -> Outcomes {
        let now = self.moments.len() - 1;
        for number in 0..self.spaces.len() {
            let space = &self.spaces[number];
            let stages = self.stages(space.view);
            if stages.is_empty() || space.since != now || space.other.is_some() || self.is_short(space) {
                continue;
            }
            let what = |view: View, text: &str| Err(format!("marks of {view:?}: {text}"));
            let view = space.view;
            let (used, unused) = self.use_some(number)?;
            let before = self.tables();
            let written = self.spaces[number].ioasid.write_marks(Span::ALL);
            let mut after = self.tables();
            if written.skipped > 0 {
                return what(view, &format!("{written:?}, and the guest has changed nothing since"));
            }
            let changed = are_marks(&self.all_stages(), &before, &after)?;
            if (changed == 0) != (written == MarksWritten::default()) {
                return what(view, &format!("{written:?}, and {changed} words are others"));
            }
            let walker = Walker::new(&after, &stages).map_err(|problem| problem.to_string())?;
            for (who, iova, write) in &used {
                if let Ok(marks) = walker.marks(*iova, *write)
                    && !marks.is_empty()
                {
                    let verb = if *write { "written" } else { "read" };
                    return what(view, &format!("{written:?}: {iova:#x} was {verb} by {who:?}, and lacks {marks:x?}"));
                }
            }
            // Where hosts do not tell, all counts as used.
            let left = unused.iter().filter(|iova| walker.marks(**iova, false).is_ok_and(|marks| !marks.is_empty())).count();
            let again = self.spaces[number].ioasid.write_marks(Span::ALL);
            if again != MarksWritten::default() {
                return what(view, &format!("nobody has done anything since, and there are {again:?}"));
            }
            self.coverage.add_many("leaves marked".to_owned(), written.accessed + written.dirty);
            self.coverage.add_many("pointers marked".to_owned(), written.tables);
            self.coverage.add_many("marked for what is gone".to_owned(), written.earlier);
            self.coverage.add_many("pages left without marks".to_owned(), left as u64);
            if written.earlier > 0 {
                // An entry that had no mark, and could not be marked, has one: more may be mapped than was, and counts as used where hosts do not tell.
                for space in self.spaces.iter().filter(|space| matches!(space.view, View::Behind(..))) {
                    space.ioasid.synchronise().map_err(|error| format!("synchronise: {error}"))?;
                    space.ioasid.write_marks(Span::ALL);
                    self.coverage.add("synchronised for earlier marks".to_owned());
                }
                after = self.tables();
            }
            if let Some(last) = self.moments.last_mut() {
                *last = after;
            }
        }
        Ok(())
    }

    /// Each device that has a host's table or areas there reads some pages and writes others: what it got at, and where nobody did anything.
    fn use_some(&mut self, space: usize) -> Result<(Vec<Used>, Vec<u64>), String> {
        let attached: Vec<Who> = self.attached.iter().filter(|(_, of)| **of == space).map(|(who, _)| *who).collect();
        let iovas: BTreeSet<u64> = self.touched.iter().rev().take(LOOKED_AT).chain(&self.recent).copied().collect();
        let (mut used, mut unused) = (Vec::new(), iovas.clone());
        for who in attached {
            if limits(&self.spaces[space].ioasid, &self.devices[who.0], who.1)?.strategy == Strategy::Native {
                continue;
            }
            for iova in &iovas {
                let how = self.rng.below(4);
                if how < 2 && self.machine.dma(who, *iova, how == 1).is_some() {
                    used.push((who, *iova, how == 1));
                    unused.remove(iova);
                }
            }
        }
        Ok((used, unused.into_iter().collect()))
    }

    /// Of all tables that there are.
    fn all_stages(&self) -> Vec<TableConfig> {
        let first = (0..self.guest.roots()).map(|root| self.guest.config(root));
        let second = self.second.iter().flat_map(|second| (0..second.roots()).map(|root| second.config(root)));
        first.chain(second).collect()
    }
}

/// How many words are others, if all that makes them so are marks.
fn are_marks(stages: &[TableConfig], before: &Memory, after: &Memory) -> Result<u64, String> {
    let mut changed = 0;
    for (page, bytes) in &before.pages {
        if after.pages.get(page) == Some(bytes) {
            continue;
        }
        for at in (*page..*page + 4096).step_by(8) {
            let is_marked = |config: &TableConfig| {
                let read = |memory: &Memory, at: u64| match config.entry_bytes() {
                    4 => memory.read4(at, config.big_endian()),
                    _ => memory.read(at, config.big_endian()),
                };
                (at..at + 8).step_by(config.entry_bytes() as usize).all(|at| {
                    let [old, new] = [before, after].map(|memory| read(memory, at).unwrap());
                    let steps = config.regions().unwrap().into_iter().flat_map(|region| region.steps);
                    old == new || steps.into_iter().any(|step| [false, true].iter().any(|write| config.marked(step, old, *write) == new))
                })
            };
            let [old, new] = [before, after].map(|memory| memory.read(at, false).unwrap());
            if old != new {
                changed += 1;
                if !stages.iter().any(is_marked) {
                    return Err(format!("{at:#x} was {old:#x}, and is {new:#x}"));
                }
            }
        }
    }
    Ok(changed)
}
