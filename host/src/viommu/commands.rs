//! The guest's commands, as they stand in its queue.

use std::collections::{BTreeMap, BTreeSet};

use vm_memory::GuestMemory;

use super::host::AddressSpaces;
use super::{Call, Handled, Viommu};
use crate::memory::{Kind, read_bytes};
use crate::plugin::queue::{Effect, GroupResponse, Invalidation, MAX_COMMAND_BYTES, Scope};
use crate::plugin::{Requester, SuperviseError};
use crate::{Gpa, Span};

/// A command that hardware would not take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Illegal {
    /// Which of the batch, counted from zero: those before it were handled.
    pub index: u16,
    /// The code that the unit reports.
    pub code: u32,
}

/// Commands were not handled at all.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// They are too many or no whole entries, or the unit has no such queue.
    #[error("the commands have no meaning: {0}")]
    Meaning(#[source] SuperviseError),
    /// There is no memory where the guest has its queue, or not at all of it: hardware would report an abort of its own read.
    #[error("the commands at {0} cannot be read: there is no guest memory")]
    Unreadable(Span),
    /// More than one call takes.
    #[error("{0:#x} bytes of commands; one call takes at most {MAX_COMMAND_BYTES:#x}")]
    TooLong(u64),
}

/// Ranges of one space in one batch; with more of them everything is looked at.
const MOST_RANGES: usize = 4096;

/// Everybody.
const ALL: Scope = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };

/// What a batch asks for.
#[derive(Default)]
struct Plan {
    devices: BTreeSet<u64>,
    streams: BTreeSet<Requester>,
    everything: bool,
    /// Ranges by space.
    ranges: BTreeMap<u64, Vec<Invalidation>>,
    /// Answers to page requests.
    responses: Vec<GroupResponse>,
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Whole entries of the unit's command queue, in the order in which they were queued; at most
    /// [`MAX_COMMAND_BYTES`] at once. When this returns, no DMA uses what they make invalid.
    ///
    /// Each address space is told once, whatever the number of commands.
    ///
    /// # Errors
    /// [`CommandError::Meaning`]. Nothing was done.
    pub fn commands(&mut self, entries: &[u8]) -> Result<Handled, CommandError> {
        let _span = tracing::trace_span!("commands", bytes = entries.len()).entered();
        let mut call = self.begin();
        let unit = &self.unit;
        let decoded = self.supervisor.ask(|instance| instance.decode_commands(unit.kind(), unit.registers(), entries));
        let items = match decoded {
            Ok(items) => items,
            // Nobody knows what they say: more is looked at rather than less.
            Err(error) if error.is_failure() => {
                call.handled.undecoded = Some(error);
                [Effect::Structures(ALL), Effect::Everything].map(|effect| Invalidation { index: 0, effect }).to_vec()
            }
            Err(error) => return Err(CommandError::Meaning(error)),
        };
        self.invalidations(&items, &mut call);
        Ok(self.finish(call))
    }

    /// The same for entries that stand in guest memory, in these bytes one after the other: those of a ring between its two pointers are one span, or two. One whose last
    /// byte is before its first has none.
    ///
    /// # Errors
    /// As [`Viommu::commands`], and [`CommandError::Unreadable`] for a queue in memory that is not there, or not there any more. Nothing was done.
    pub fn commands_at(&mut self, parts: &[Span]) -> Result<Handled, CommandError> {
        let parts: Vec<&Span> = parts.iter().filter(|part| !part.is_none()).collect();
        let bytes = parts.iter().fold(0_u64, |sum, part| sum.saturating_add(part.length_minus_one().saturating_add(1)));
        if bytes > MAX_COMMAND_BYTES as u64 {
            return Err(CommandError::TooLong(bytes));
        }
        let mut entries = Vec::with_capacity(bytes as usize);
        for part in parts {
            let is_ram = |address| self.map.region(address).is_some_and(|region| region.kind == Kind::Ram);
            let read = read_bytes(&self.memory, Gpa(part.first), part.length_minus_one() as usize + 1);
            let read = read.ok().filter(|_| is_ram(part.first) && is_ram(part.last));
            entries.extend(read.ok_or(CommandError::Unreadable(*part))?);
        }
        self.commands(&entries)
    }

    /// The same for commands that somebody decoded.
    pub fn invalidate(&mut self, items: &[Invalidation]) -> Handled {
        let _span = tracing::trace_span!("invalidate", commands = items.len()).entered();
        let mut call = self.begin();
        self.invalidations(items, &mut call);
        self.finish(call)
    }

    fn invalidations(&mut self, items: &[Invalidation], call: &mut Call) {
        let plan = self.plan(items, call);
        self.changed(plan.devices, plan.streams, call);
        if plan.everything {
            let with_tables = self.spaces.iter().filter(|(_, space)| !space.way.tables().is_empty());
            for number in with_tables.map(|(number, _)| *number).collect::<Vec<_>>() {
                self.invalidate_space(number, &[Invalidation { index: 0, effect: Effect::Everything }], true, call);
            }
        } else {
            for (number, ranges) in plan.ranges {
                self.invalidate_space(number, &ranges, false, call);
            }
        }
        self.answered(&plan.responses, call);
    }

    fn plan(&self, items: &[Invalidation], call: &mut Call) -> Plan {
        let mut plan = Plan::default();
        // Drivers name the same space again and again.
        let mut last: Option<(Scope, BTreeSet<u64>)> = None;
        for item in items {
            match item.effect {
                // What device TLBs keep is the device's.
                Effect::Nothing | Effect::DeviceTlb { .. } => {}
                Effect::Everything => plan.everything = true,
                Effect::Structures(scope) => self.plan_structures(&scope, &mut plan),
                Effect::Range { scope, iova } => {
                    let whom = Scope { leaf: false, second_stage: false, ..scope };
                    let spaces = match &last {
                        Some((known, spaces)) if *known == whom => spaces,
                        _ => &last.insert((whom, self.meant(&whom))).1,
                    };
                    let scope = Scope { leaf: scope.leaf, second_stage: scope.second_stage, ..ALL };
                    let invalidation = Invalidation { index: item.index, effect: Effect::Range { scope, iova: iova.or_all() } };
                    for number in spaces {
                        add(plan.ranges.entry(*number).or_default(), invalidation);
                    }
                }
                Effect::Response(response) => plan.responses.push(response),
                Effect::Illegal(code) => {
                    call.handled.illegal = Some(Illegal { index: item.index, code });
                    break;
                }
            }
        }
        plan
    }

    /// The spaces with tables that a scope means.
    fn meant(&self, scope: &Scope) -> BTreeSet<u64> {
        let mut found = BTreeSet::new();
        let named = |requester: &Requester| {
            let stream = self.streams.get(requester)?;
            let (number, tag) = stream.named?;
            scope.includes(tag, requester.id).then_some(number)
        };
        match scope.id {
            None => self.index.named(scope, &mut found),
            Some((id, 0)) => found.extend(self.streams_of(id.into()).iter().filter_map(named)),
            Some(_) => found.extend(self.streams.keys().filter_map(named)),
        }
        found
    }

    /// The streams whose structures a scope means; its space is a PASID. Requests without one may use any. A PASID that is new may be of any domain, whatever those of its
    /// device are that are known.
    fn plan_structures(&self, scope: &Scope, plan: &mut Plan) {
        let (by_domain, by_id) = (Scope { space: None, ..*scope }, Scope { space: None, domain: None, ..*scope });
        let mut add = |requester: Requester| {
            let Some(stream) = self.streams.get(&requester) else { return };
            if self.devices.contains_key(&requester.id) && by_id.includes(stream.tag, requester.id) {
                plan.devices.insert(requester.id);
            }
            let is_meant = requester.pasid.is_none() || scope.space.is_none() || requester.pasid == scope.space;
            if is_meant && by_domain.includes(stream.tag, requester.id) {
                plan.streams.insert(requester);
            }
        };
        match scope.id {
            Some((id, 0)) => self.streams_of(id.into()).into_iter().for_each(&mut add),
            _ => self.streams.keys().copied().for_each(&mut add),
        }
    }

    fn invalidate_space(&mut self, number: u64, invalidations: &[Invalidation], whole: bool, call: &mut Call) {
        let Some(space) = self.spaces.get(&number).filter(|space| !space.dead && !call.synchronised.contains(&number)) else { return };
        let told = self.host.invalidate(space.id, invalidations);
        if whole {
            call.synchronised.insert(number);
        }
        self.told(number, told, whole, call);
    }
}

fn add(ranges: &mut Vec<Invalidation>, invalidation: Invalidation) {
    let is_all = |invalidation: &Invalidation| matches!(invalidation.effect, Effect::Range { scope, iova: Span::ALL } if !scope.leaf);
    if ranges.last().is_some_and(|last| last.effect == invalidation.effect || is_all(last)) {
        return;
    }
    if is_all(&invalidation) || ranges.len() >= MOST_RANGES {
        ranges.clear();
        ranges.push(Invalidation { effect: Effect::Range { scope: ALL, iova: Span::ALL }, ..invalidation });
    } else {
        ranges.push(invalidation);
    }
}
