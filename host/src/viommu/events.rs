//! Faults told to the guest: in its own architecture's records, of what its own tables say.

use vm_memory::GuestMemory;

use super::host::{AddressSpaces, HostError, Way};
use super::{Call, StreamState, Viommu};
use crate::device::{Behind, Denied, Trace};
use crate::ioasid::HostEvents;
use crate::memory::{self, Budget, MemoryMap, VmMemory, Within};
use crate::plugin::queue::{BlockedDma, Event, EventAccess, EventRecord};
use crate::plugin::{CallError, Outcome, Refusal, SuperviseError, TableConfig};
use crate::sync::Report;
use crate::table::{AddressSpace, Cause, Fault, FaultKind, Table, Translation};
use crate::{Access, Iova};

/// What the guest is to be told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// Records, in the order of the requests.
    pub records: Vec<EventRecord>,
    /// Requests that there was no room for, or whose record the plugin could not make: the queue overflowed, as the guest sees it.
    pub lost: u64,
    /// Requests that the unit tells nobody about: to addresses that are nowhere, or that something else serves, or because the guest does not want to be told.
    pub silent: u64,
}

/// What the plugin makes of an event.
enum Encoded {
    Record(EventRecord),
    /// The architecture or the guest wants none.
    Silent,
    /// It made none.
    Lost,
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
                    Encoded::Record(record) => events.records.push(record),
                    Encoded::Silent => events.silent += 1,
                    Encoded::Lost => events.lost += 1,
                },
            }
        }
        let beyond = requests.len().saturating_sub(most) as u64;
        events.lost += beyond;
        self.figures.lost_events += beyond;
        events
    }

    /// The same for refused requests that the host knows of; what is beyond [`Limits::events`](super::Limits::events) is for the next call. Hosts tell of them where the kernel has a vIOMMU of its unit's architecture; those that were lost on the way are
    /// lost to the guest as well.
    ///
    /// # Errors
    /// The host could not be asked. What it had told before that is for the next call.
    pub fn serve_events(&mut self) -> Result<Events, HostError> {
        let HostEvents { blocked, lost } = self.host.host_events(self.limits.events as usize)?;
        let mut events = self.faults(&blocked);
        events.lost += lost;
        self.figures.lost_events += lost;
        Ok(events)
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
        let encoded = if call.handled.events.len() < self.limits.events as usize {
            self.encode(event)
        } else {
            self.figures.lost_events += 1;
            Encoded::Lost
        };
        match encoded {
            Encoded::Record(record) => call.handled.events.push(record),
            Encoded::Silent => {}
            Encoded::Lost => call.handled.lost_events += 1,
        }
    }

    fn encode(&mut self, event: &Event) -> Encoded {
        let unit = &self.unit;
        match self.supervisor.ask(|instance| unit.encode_event_in(instance, event)) {
            Ok(record) => {
                self.figures.events += 1;
                Encoded::Record(record)
            }
            Err(SuperviseError::Call(CallError::Refused { refusal: Refusal::Unsupported(_), .. })) => Encoded::Silent,
            Err(_) => {
                self.figures.lost_events += 1;
                Encoded::Lost
            }
        }
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
        let way_of_space = self.spaces.get(&number).map(|space| space.way.clone());
        match self.walk(number, request) {
            Some(Err(fault)) => self.event_of_fault(request, way_of_space.as_ref(), &fault),
            // There is no memory, which is the bus's business.
            Some(Ok(translation)) if self.map.target(translation.address.0).is_none() => Told::Silent,
            // It reaches memory, if there is any. If not the unit may find that such an address is too large.
            None if way.is_none() && self.map.target(request.iova.0).is_none() => Told::Event(Box::new(plain(request, FaultKind::AddressSize))),
            None if way.is_none() => Told::Silent,
            // The guest allows it, and the host has it not, or not yet.
            Some(Ok(_)) | None => Told::Event(Box::new(self.nothing_there(request, way.as_ref()))),
        }
    }

    /// A stream that nobody connected: a device, or a PASID that the guest did not set up, or that no host has (0).
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
            (Ok(()), Some(Outcome::Tables(tables))) => {
                let way = Way::Tables { tables: tables.tables, intercepts: tables.intercepts };
                let Some(mut walker) = self.walker(&way) else { return Told::Silent };
                match self.translate(&mut walker, request) {
                    Some(Err(fault)) => self.event_of_fault(request, Some(&way), &fault),
                    _ => Told::Silent,
                }
            }
            _ => Told::Silent,
        }
    }

    fn event_of_fault(&self, request: &BlockedDma, way: Option<&Way>, fault: &Fault) -> Told {
        let kind = match fault.cause {
            Cause::Entry(kind) => kind,
            // A table that is nowhere cannot be read.
            Cause::Missing => FaultKind::Unreadable,
            Cause::OutsideMemory | Cause::Intercepted => return Told::Silent,
        };
        let tables = way.map_or(&[][..], Way::tables);
        let format = tables.get(usize::from(fault.stage).saturating_sub(1)).map(|table| table.format.clone());
        Told::Event(Box::new(Event {
            fault: kind,
            format,
            level: fault.level,
            entries: fault.path.iter().filter_map(|step| step.entry).collect(),
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
        let translated = self.translate(&mut walker, request);
        self.spaces.get_mut(&number)?.walker = Some(walker);
        translated
    }

    /// Where a request goes, whether or not there is memory: what may not be done is found before that.
    fn translate(&self, walker: &mut AddressSpace, request: &BlockedDma) -> Option<Result<Translation, Fault>> {
        let budget = Budget::new(memory::Limits { questions: self.limits.questions, ..memory::Limits::default() });
        let access = match request.access {
            EventAccess::Read | EventAccess::Execute => Access::READ,
            EventAccess::Write => Access::WRITE,
        };
        let memory = Within(VmMemory(&self.memory), &self.map);
        walker.translate(&memory, &MemoryMap::everything(64), request.iova, access, &budget).ok()
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
        entries: Vec::new(),
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
        Some(Denied::Behind(Behind { format, fault, level, address, unreadable, entries })) => Event {
            fault: *fault,
            format: Some(format.clone()),
            level: *level,
            entries: entries.clone(),
            intermediate: Some(*address),
            reading_table: true,
            unreadable: *unreadable,
            ..event
        },
    }
}
