//! Marks on their way back: what the library writes into the guest's tables of what its devices did.

use stagecraft::Span;
use stagecraft::ioasid::Strategy;
use stagecraft_tests::reference::snapshot::Memory;
use stagecraft_tests::reference::tables::TableConfig;
use stagecraft_tests::reference::walk::Walker;

use crate::compare::limits;
use crate::session::{Outcomes, Session, Who};

/// IOVAs that are looked at for each requester, at most.
const LOOKED_AT: usize = 24;

impl Session<'_> {
    /// Has marks written by each address space that knows the tables as they are now. What a device reaches lacks none then, in entries of any level and stage; and
    /// nothing else has changed.
    pub fn write_marks(&mut self) -> Outcomes {
        let now = self.moments.len() - 1;
        for number in 0..self.spaces.len() {
            let space = &self.spaces[number];
            let stages = self.stages(space.view);
            if stages.is_empty() || space.since != now || space.other.is_some() || self.is_short(space) {
                continue;
            }
            let before = self.tables();
            let written = space.ioasid.write_marks(Span::ALL);
            let after = self.tables();
            let what = |text: &str| format!("marks of {:?}, {written:?}: {text}", space.view);
            if written.skipped > 0 {
                return Err(what("the guest has changed nothing since"));
            }
            let changed = are_marks(&stages, &before, &after).map_err(|error| what(&error))?;
            if (changed == 0) != (written.accessed + written.dirty + written.tables == 0) {
                return Err(what(&format!("{changed} words are others")));
            }
            let attached: Vec<Who> = self.attached.iter().filter(|(_, of)| **of == number).map(|(who, _)| *who).collect();
            for who in attached {
                if limits(&space.ioasid, &self.devices[who.0], who.1)?.strategy == Strategy::Native {
                    continue;
                }
                let walker = Walker::new(&after, &stages).map_err(|problem| problem.to_string())?;
                for iova in self.touched.iter().rev().take(LOOKED_AT).chain(&self.recent) {
                    let Ok(marks) = walker.marks(*iova, false) else { continue };
                    if !marks.is_empty() && self.machine.dma(who, *iova, false).is_some() {
                        return Err(what(&format!("{iova:#x} can be read, and lacks {marks:x?}")));
                    }
                }
            }
            self.coverage.add_many("leaves marked".to_owned(), written.accessed + written.dirty);
            self.coverage.add_many("pointers marked".to_owned(), written.tables);
            if let Some(last) = self.moments.last_mut() {
                *last = after;
            }
        }
        Ok(())
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
