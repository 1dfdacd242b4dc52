//! Faults told to the guest: in its own architecture's records, of what its own tables say.

use vm_memory::GuestMemory;

use super::host::{AddressSpaces, Way};
use super::{Call, StreamState, Viommu};
use crate::device::{Behind, Denied, Trace};
use crate::memory::{self, Budget, VmMemory};
use crate::plugin::queue::{Event, EventAccess, EventRecord};
use crate::plugin::{Outcome, Requester, TableConfig};
use crate::sync::Report;
use crate::table::{AddressSpace, Cause, Fault, FaultKind, Table, Translation};
use crate::{Access, Iova};

/// A request of a device that the host refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedDma {
    /// Whose.
    pub requester: Requester,
    /// What it asked for.
    pub iova: Iova,
    /// What it wanted to do.
    pub access: EventAccess,
    /// It was a privileged request.
    pub privileged: bool,
}

/// What the guest is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Records, in the order of the requests.
    pub records: Vec<EventRecord>,
    /// Requests that there was no room for, or whose record the plugin could not make: the queue overflowed, as the guest sees it.
    pub lost: u64,
    /// Requests that the unit tells nobody about: to addresses that are nowhere, or that something else serves.
    pub silent: u64,
}

/// What becomes of one refused request.
pub(super) enum Told {
    Event(Box<Event>),
    Silent,
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// The host refused these requests. What the guest is told is what its own tables and structures say about them; at most
    /// [`Limits::events`](super::Limits::events) of them are looked at.
    pub fn faults(&mut self, requests: &[BlockedDma]) -> Events {
        let _span = tracing::debug_span!("faults", faults = requests.len()).entered();
        let mut events = Events::default();
        let most = self.limits.events as usize;
        for request in &requests[..requests.len().min(most)] {
            match self.event(request) {
                Told::Silent => events.silent += 1,
                Told::Event(event) => match self.encode(&event) {
                    Some(record) => events.records.push(record),
                    None => events.lost += 1,
                },
            }
        }
        let beyond = requests.len().saturating_sub(most) as u64;
        events.lost += beyond;
        self.figures.lost_events += beyond;
        events
    }

    /// Entries of a space are blocked: the guest hears of the first ones as of requests to nothing.
    pub(super) fn tell_blocked(&mut self, number: u64, report: &Report, call: &mut Call) {
        let Some(space) = self.spaces.get(&number) else { return };
        let requester = space.members.first().copied().or(call.about).unwrap_or_default();
        let way = space.way.clone();
        for blocked in &report.blocked {
            let request = BlockedDma { requester, iova: Iova(blocked.iova.first), access: EventAccess::Read, privileged: false };
            let event = self.nothing_there(&request, Some(&way));
            self.tell(&event, call);
        }
        let beyond = report.blocked_count.saturating_sub(report.blocked.len() as u64);
        call.handled.lost_events += beyond;
        self.figures.lost_events += beyond;
    }

    /// One more record, if there is room.
    pub(super) fn tell(&mut self, event: &Event, call: &mut Call) {
        let record = if call.handled.events.len() < self.limits.events as usize {
            self.encode(event)
        } else {
            self.figures.lost_events += 1;
            None
        };
        match record {
            Some(record) => call.handled.events.push(record),
            None => call.handled.lost_events += 1,
        }
    }

    fn encode(&mut self, event: &Event) -> Option<EventRecord> {
        let unit = &self.unit;
        let record = self.supervisor.ask(|instance| instance.encode_event(unit.kind(), unit.registers(), event));
        match &record {
            Ok(_) => self.figures.events += 1,
            Err(_) => self.figures.lost_events += 1,
        }
        record.ok()
    }

    /// What the unit would report.
    pub(super) fn event(&mut self, request: &BlockedDma) -> Told {
        let Some(stream) = self.streams.get(&request.requester) else { return self.event_of_stranger(request) };
        let way = match &stream.outcome {
            Some(Outcome::Tables(tables)) => Some(Way::Tables { tables: tables.tables.clone(), intercepts: Vec::new() }),
            _ => None,
        };
        let number = match &stream.state {
            StreamState::Blocked(blocked) => return Told::Event(Box::new(refused(request, &blocked.event, &stream.trace))),
            StreamState::Unknown(_) | StreamState::Refused(_) => return Told::Event(Box::new(self.nothing_there(request, way.as_ref()))),
            StreamState::Space(number) => *number,
        };
        match self.walk(number, request) {
            Some(Err(fault)) => self.event_of_fault(request, number, &fault),
            // It reaches memory, if there were any.
            None if way.is_none() => Told::Silent,
            // The guest allows it, and the host has it not, or not yet.
            Some(Ok(_)) | None => Told::Event(Box::new(self.nothing_there(request, way.as_ref()))),
        }
    }

    /// A stream that nobody connected, such as a PASID that the guest did not set up.
    fn event_of_stranger(&mut self, request: &BlockedDma) -> Told {
        let unit = &self.unit;
        self.figures.lookups += 1;
        let (mut outcome, mut trace) = (None, Trace::default());
        let asked = self.supervisor.ask(|instance| {
            let (found, read) = unit.lookup_in(instance, request.requester);
            (outcome, trace) = (found.ok().map(|found| found.value), read);
            instance.failed().cloned().map_or(Ok(()), Err)
        });
        match (asked, outcome) {
            (Ok(()), Some(Outcome::Blocked(blocked))) => Told::Event(Box::new(refused(request, &blocked.event, &trace))),
            _ => Told::Silent,
        }
    }

    fn event_of_fault(&self, request: &BlockedDma, number: u64, fault: &Fault) -> Told {
        let Some(space) = self.spaces.get(&number) else { return Told::Silent };
        let is_read = fault.path.last().is_some_and(|step| step.entry.is_some());
        let kind = match fault.cause {
            Cause::Entry(kind) => kind,
            Cause::Missing => FaultKind::Unreadable,
            // A table that is nowhere cannot be read; a page that is nowhere is the bus's business.
            Cause::OutsideMemory if !is_read && !fault.path.is_empty() => FaultKind::Unreadable,
            Cause::OutsideMemory | Cause::Intercepted => return Told::Silent,
        };
        let tables = space.way.tables();
        let format = tables.get(usize::from(fault.stage).saturating_sub(1)).map(|table| table.format.clone());
        Told::Event(Box::new(Event {
            fault: kind,
            format,
            level: fault.level,
            intermediate: (tables.len() == 2 && fault.stage == 2).then_some(fault.input),
            reading_table: fault.reading_table,
            unreadable: fault.address.filter(|_| kind == FaultKind::Unreadable),
            domain: self.streams.get(&request.requester).and_then(|stream| stream.tag.domain),
            ..plain(request, kind)
        }))
    }

    /// The event of a request to an entry that counts as absent, in the last table of the first stage.
    fn nothing_there(&self, request: &BlockedDma, way: Option<&Way>) -> Event {
        let table = way.and_then(|way| way.tables().first());
        let space = way.and_then(|way| self.ways.get(way)).and_then(|number| self.spaces.get(number));
        let tables = space.and_then(|space| space.walker.as_ref()).and_then(|walker| walker.tables().next());
        let last = tables.and_then(|table| table.geometry().levels.last()).map(|level| level.number);
        Event {
            format: table.map(|table| table.format.clone()),
            level: last.or(table.is_some().then_some(1)),
            domain: self.streams.get(&request.requester).and_then(|stream| stream.tag.domain),
            ..plain(request, FaultKind::Translation)
        }
    }

    /// What the guest's tables say about a request; none where there are none, or nobody can say.
    pub(super) fn walk(&mut self, number: u64, request: &BlockedDma) -> Option<Result<Translation, Fault>> {
        let mut walker = self.spaces.get_mut(&number)?.walker.take();
        if walker.is_none() {
            let way = self.spaces.get(&number)?.way.clone();
            walker = self.walker(&way);
        }
        let mut walker = walker?;
        let budget = Budget::new(memory::Limits { questions: self.limits.questions, ..memory::Limits::default() });
        let access = match request.access {
            EventAccess::Read | EventAccess::Execute => Access::READ,
            EventAccess::Write => Access::WRITE,
        };
        let translated = walker.translate(&VmMemory(&self.memory), &self.map, request.iova, access, &budget);
        self.spaces.get_mut(&number)?.walker = Some(walker);
        translated.ok()
    }

    fn walker(&self, way: &Way) -> Option<AddressSpace> {
        match way {
            Way::Bypass => None,
            Way::Direct(direct) => Some(AddressSpace::direct(direct.windows.clone()).with_intercepts(direct.intercepts.clone())),
            Way::Tables { intercepts, .. } => {
                let open = |table: &TableConfig| Table::open(Box::new(self.supervisor.open(table).ok()?)).ok();
                let space = match way.tables() {
                    [] => return None,
                    [table] => AddressSpace::single(open(table)?),
                    [first, second, ..] => AddressSpace::nested(open(first)?, open(second)?),
                };
                Some(space.with_intercepts(intercepts.clone()))
            }
        }
    }
}

/// What is known of every request.
fn plain(request: &BlockedDma, fault: FaultKind) -> Event {
    Event {
        fault,
        name: None,
        format: None,
        level: None,
        id: request.requester.id,
        pasid: request.requester.pasid,
        iova: request.iova.0,
        intermediate: None,
        reading_table: false,
        unreadable: None,
        access: request.access,
        privileged: request.privileged,
        domain: None,
    }
}

/// The event of a stream that is blocked, and of the structure that could not be read if that is why.
fn refused(request: &BlockedDma, name: &str, trace: &Trace) -> Event {
    let event = Event { name: Some(name.to_owned()), ..plain(request, FaultKind::Configuration) };
    match trace.denied() {
        None => event,
        Some(Denied::Unreadable(address)) => Event { unreadable: Some(*address), ..event },
        Some(Denied::Behind(Behind { format, fault, level, address })) => {
            Event { fault: *fault, format: Some(format.clone()), level: *level, intermediate: Some(*address), reading_table: true, ..event }
        }
    }
}
