//! The guest's IOMMU as a VMM drives it. The VMM emulates registers and queues of its unit and knows no format: what a structure, a command or a fault record
//! means is the plugin's to say, and which address spaces follow from it is found out here.
//!
//! ```text
//!   VMM                          Viommu                                             AddressSpaces
//!    | connect, stream_changed ---> look up the stream (plugin) -- same as before? --> nothing
//!    | registers_changed            |                              another way? -----> switch, or attach to the space that has it
//!    |                              |                              blocked? ---------> detach
//!    | commands(raw entries) -----> decode (plugin) --- structures ---> look up those concerned, as above
//!    |                              |               --- translations -> by tag: the spaces concerned ---> invalidate, once each
//!    | table_written(page) -------> who looks at this page? --- structures of a stream: look up again, as above
//!    |                              |                       --- tables of a space: table_written
//!    | memory_changed -----------> tables and structures in it ------------------------------> memory_changed
//!    | page_requests -------------> in the guest's tables? else the architecture's record ---> bytes for its queue; its command is the answer
//!    | faults(blocked DMA) -------> walk the guest's tables ---> the architecture's record (plugin) ---> bytes for the guest's event queue
//! ```
//!
//! # Streams and spaces
//!
//! A *stream* is a device's DMA, without a PASID or with one. Streams whose DMA goes the same way, by the same tables under the same settings, share one address
//! space. A lookup is a function of the unit's registers and of the guest memory that it reads, which is recorded: as long as all of that still reads the same, the
//! answer is the same and no plugin is asked. The pages that were read are watched like those of tables, so that a guest which changes a structure without a
//! command is noticed.
//!
//! # What may go wrong, and what happens then
//!
//! | what | what happens |
//! |---|---|
//! | the plugin fails | what it said is remembered, see [`Supervisor`]; unknown patterns and streams whose structures changed are blocked, and judged when it answers again |
//! | it fails to decode commands | they count as: everything may have changed |
//! | the host refuses a space, or fails to invalidate | the streams concerned are detached, and tried again |
//! | it fails while it moves another stream than the one that a call is about | that one is detached as well, and tried again |
//! | a stream cannot be detached either | [`Handled::loose`]: the VMM must stop the device |
//! | memory goes with structures or tables in it | what stood there is unreadable, as for hardware: blocked, and told to the guest |
//! | the guest reaches a limit | what is beyond is blocked and reported to the guest |
//!
//! What is tried again is tried after so many calls, twice as many after each failure: there is no clock here.
//!
//! # Threads
//!
//! One vIOMMU serves one call at a time, as a unit serves its queue in order; different units work in parallel. It may be moved between threads, and is shared behind a lock:
//! all that does something changes it, so there is nothing that two threads could do with it at a time.

mod commands;
mod context;
mod events;
mod host;
mod index;
mod lookups;
mod moves;
mod pages;
mod replace;
mod requests;
mod retry;
mod watching;

pub use crate::plugin::queue::BlockedDma;
pub use commands::{CommandError, Illegal};
pub use context::ContextSpaces;
pub use events::Events;
pub use host::{AddressSpaces, HostError, Told, Way};
pub use replace::ReplaceError;
pub use requests::PageResponse;
pub use watching::Watching;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;

use vm_memory::GuestMemory;

use crate::device::{Trace, Unit};
use crate::memory::{self, MemoryMap};
use crate::plugin::queue::{Effect, EventRecord, Invalidation};
use crate::plugin::{Blocked, Outcome, Requester, SuperviseError, Supervisor, Tag};
use crate::sync::Watcher;
use crate::table::AddressSpace;
use crate::{Gpa, Span};

use index::Index;
use pages::{Holder, Pages};
use requests::Group;
use retry::{Again, Retry};

/// How much a guest may make one vIOMMU do and keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Address spaces at the same time. How much each may hold is the host's to say; the two together bound all.
    pub spaces: usize,
    /// PASIDs of one device.
    pub pasids: usize,
    /// Event records of one call; further ones are counted.
    pub events: u32,
    /// Page requests that wait for the guest's answer. Devices that ask beyond it are told to try again.
    pub page_requests: usize,
    /// Questions to a format for the sake of one fault.
    pub questions: u64,
    /// What one lookup may read and ask.
    pub lookup: memory::Limits,
    /// Streams and spaces that one call tries again, on top of what it was called for.
    pub retries: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            spaces: 1024,
            pasids: 1024,
            events: 16,
            page_requests: 4096,
            questions: 256,
            lookup: memory::Limits { bytes: 1 << 22, ..memory::Limits::default() },
            retries: 4,
        }
    }
}

/// Which unit a guest has.
#[derive(Clone, Debug)]
pub struct UnitConfig {
    /// One of the units that the plugin's manifest names.
    pub kind: String,
    /// Its registers, as the architecture names them.
    pub registers: Vec<(String, u64)>,
    /// Which guest-physical addresses exist.
    pub map: Arc<MemoryMap>,
    /// Bounds.
    pub limits: Limits,
}

/// What became of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamState {
    /// The plugin does not answer, and what it said before is out of date: blocked until it does.
    Unknown(String),
    /// The guest has set it up to be refused, or not at all.
    Blocked(Blocked),
    /// The guest wants something that cannot be had: blocked, for this reason.
    Refused(String),
    /// It has this address space.
    Space(u64),
}

/// A stream.
#[derive(Debug)]
struct Stream {
    state: StreamState,
    /// The space that the host has it attached to.
    attached: Option<u64>,
    /// What the last lookup said, and what it read for that.
    outcome: Option<Outcome>,
    tag: Tag,
    trace: Trace,
    /// The outcome does not follow from registers and `trace`.
    stale: bool,
    /// The space that commands mean for its sake, and by which numbers.
    named: Option<(u64, Tag)>,
    retry: Retry,
}

/// A device that has PASIDs.
#[derive(Debug, Default)]
struct Device {
    trace: Trace,
    stale: bool,
    pasids: Vec<u32>,
    retry: Retry,
}

/// An address space.
#[derive(Debug)]
struct Space<I> {
    id: I,
    way: Way,
    members: BTreeSet<Requester>,
    /// Nobody else is to be attached: it is out of step.
    dead: bool,
    /// Entries were blocked because the plugin did not answer, and for no other reason.
    for_plugin: bool,
    /// Since entries of it were blocked, all of it was looked at, and none was.
    is_whole: bool,
    /// The call that looked at it last: no call does so twice for what is tried again.
    looked: u64,
    /// Entries are blocked.
    retry: Retry,
    /// For looking into the guest's tables when a device was refused.
    walker: Option<AddressSpace>,
}

/// Bytes of one write that are looked at page by page.
const LONGEST_WRITE: u64 = 1 << 20;

/// What one call did.
#[derive(Debug, Default)]
pub struct Handled {
    /// The first command that was illegal: it and those after it were not handled, as hardware would not. None: all were.
    pub illegal: Option<Illegal>,
    /// Why the commands could not be decoded; they were handled as if they had named everything.
    pub undecoded: Option<SuperviseError>,
    /// Records for the guest about entries and streams that are blocked.
    pub events: Vec<EventRecord>,
    /// Further ones that there was no room or no record for.
    pub lost_events: u64,
    /// Records for the guest's queue of page requests.
    pub page_requests: Vec<EventRecord>,
    /// Groups of page requests that were answered, by the guest or for it.
    pub responses: Vec<PageResponse>,
    /// Why the host could not tell devices of answers.
    pub unanswered: Option<HostError>,
    /// Changes of translations.
    pub changes: u64,
    /// Streams that the plugin was asked about.
    pub lookups: u64,
    /// Address spaces that were looked at.
    pub spaces: u64,
    /// Entries that are blocked, among those that were looked at.
    pub blocked: u64,
    /// Streams that could not be kept from DMA although they must be: their devices have to be stopped.
    pub loose: Vec<(Requester, HostError)>,
    /// Why DMA does not reach memory that came. None: it does, where the guest's tables say so.
    pub memory: Option<HostError>,
}

/// What a vIOMMU did since it was made. Counts only grow, but for the first four.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Streams at the moment.
    pub streams: u64,
    /// Address spaces at the moment.
    pub spaces: u64,
    /// Guest pages that are watched.
    pub watched_pages: u64,
    /// Streams and spaces that will be tried again.
    pub pending: u64,
    /// Lookups that a plugin was asked for.
    pub lookups: u64,
    /// Lookups that were not needed because nothing had changed.
    pub unchanged: u64,
    /// Address spaces that were made.
    pub allocations: u64,
    /// Spaces that got other tables in place.
    pub switches: u64,
    /// Attachments, the first ones and those that replaced another.
    pub attachments: u64,
    /// Streams that were blocked.
    pub detachments: u64,
    /// Address spaces that an invalidation or a written page was told.
    pub looks: u64,
    /// What the host refused or failed.
    pub host_errors: u64,
    /// Spaces and streams that were tried again.
    pub retries: u64,
    /// PASIDs beyond the limit, which are not served.
    pub refused_pasids: u64,
    /// Event records that were made.
    pub events: u64,
    /// Those that there was no room or no record for.
    pub lost_events: u64,
    /// Page requests that the guest was told of.
    pub page_requests: u64,
    /// Those that there was no room for.
    pub refused_requests: u64,
}

/// One call while it runs.
#[derive(Debug, Default)]
struct Call {
    handled: Handled,
    /// Spaces that were read as a whole in this call already.
    synchronised: BTreeSet<u64>,
    /// For whose sake a space is being made.
    about: Option<Requester>,
}

/// The guest's IOMMU.
pub struct Viommu<M, A: AddressSpaces> {
    unit: Unit<M>,
    memory: M,
    map: Arc<MemoryMap>,
    supervisor: Supervisor,
    host: A,
    limits: Limits,
    streams: BTreeMap<Requester, Stream>,
    /// Those that have PASIDs.
    devices: BTreeMap<u64, Device>,
    spaces: BTreeMap<u64, Space<A::Id>>,
    ways: HashMap<Way, u64>,
    numbers: BTreeMap<A::Id, u64>,
    index: Index,
    pages: Pages,
    next_space: u64,
    /// Calls so far.
    calls: u64,
    due: BTreeSet<(u64, Again)>,
    written: Vec<Holder>,
    /// Groups of page requests that were not answered yet, and how many requests are in them.
    groups: BTreeMap<(Requester, u16), Group>,
    requested: usize,
    figures: Figures,
}

impl<M, A: AddressSpaces> fmt::Debug for Viommu<M, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Viommu").field("unit", &self.unit).field("figures", &self.figures()).finish_non_exhaustive()
    }
}

impl<M, A: AddressSpaces> Viommu<M, A> {
    /// What it did.
    #[must_use]
    pub fn figures(&self) -> Figures {
        Figures {
            streams: self.streams.len() as u64,
            spaces: self.spaces.len() as u64,
            watched_pages: self.pages.watched(),
            pending: self.due.len() as u64,
            ..self.figures
        }
    }

    /// What became of a stream; none if it is not known.
    #[must_use]
    pub fn stream(&self, requester: Requester) -> Option<&StreamState> {
        self.streams.get(&requester).map(|stream| &stream.state)
    }

    /// All streams that are known.
    pub fn streams(&self) -> impl Iterator<Item = (Requester, &StreamState)> {
        self.streams.iter().map(|(requester, stream)| (*requester, &stream.state))
    }

    /// The host's name of an address space of [`StreamState::Space`].
    #[must_use]
    pub fn space(&self, number: u64) -> Option<(A::Id, &Way)> {
        self.spaces.get(&number).map(|space| (space.id, &space.way))
    }

    /// The host's side.
    pub const fn host(&self) -> &A {
        &self.host
    }

    /// The host's side. What belongs to this vIOMMU is not to be changed behind its back.
    pub const fn host_mut(&mut self) -> &mut A {
        &mut self.host
    }

    /// The plugin.
    pub const fn supervisor(&self) -> &Supervisor {
        &self.supervisor
    }
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// A unit as the guest has programmed it, with no device behind it yet. `memory` is a handle, which is cloned for each lookup; `watcher` hears which guest
    /// pages hold tables and structures: their writes are to be told with [`Viommu::table_written`].
    #[must_use]
    pub fn new(supervisor: Supervisor, unit: UnitConfig, memory: M, host: A, watcher: Box<dyn Watcher>) -> Self {
        let UnitConfig { kind, registers, map, limits } = unit;
        let unit = Unit::supervised(&supervisor, &kind, registers, memory.clone(), Arc::clone(&map), limits.lookup);
        Self {
            unit,
            memory,
            map,
            supervisor,
            host,
            limits,
            streams: BTreeMap::new(),
            devices: BTreeMap::new(),
            spaces: BTreeMap::new(),
            ways: HashMap::new(),
            numbers: BTreeMap::new(),
            index: Index::default(),
            pages: Pages::new(watcher),
            next_space: 0,
            calls: 0,
            due: BTreeSet::new(),
            written: Vec::new(),
            groups: BTreeMap::new(),
            requested: 0,
            figures: Figures::default(),
        }
    }

    /// A device is behind this unit from now on: it gets what the guest has set up for it. With `pasids`, so does each PASID that the guest has set up.
    pub fn connect(&mut self, id: u64, pasids: bool) -> Handled {
        let _span = tracing::debug_span!("connect", device = id).entered();
        let mut call = self.begin();
        let requester = Requester { id, pasid: None };
        self.streams.entry(requester).or_insert_with(Stream::new);
        if pasids {
            self.devices.entry(id).or_insert_with(|| Device { stale: true, ..Device::default() });
        }
        self.changed([id].into(), [requester].into(), &mut call);
        let mut attached = self.streams_of(id);
        attached.retain(|requester| self.streams.get(requester).is_some_and(|stream| stream.attached.is_some()));
        if let Err(error) = self.host.keep_only(id, &attached) {
            self.figures.host_errors += 1;
            call.handled.loose.push((requester, error));
        }
        self.finish(call)
    }

    /// A device is gone.
    pub fn disconnect(&mut self, id: u64) -> Handled {
        let _span = tracing::debug_span!("disconnect", device = id).entered();
        let mut call = self.begin();
        if let Some(mut device) = self.devices.remove(&id) {
            device.trace.pages().for_each(|page| self.pages.remove(page, Holder::Device(id)));
            device.retry.cancel(&mut self.due, Again::Device(id));
        }
        for requester in self.streams_of(id) {
            self.forget(requester, &mut call);
        }
        self.finish(call)
    }

    /// The guest changed structures that lead to a device's tables, in a way that the VMM knows of and no command said.
    pub fn stream_changed(&mut self, id: u64) -> Handled {
        let _span = tracing::debug_span!("stream_changed", device = id).entered();
        let mut call = self.begin();
        let streams = self.streams_of(id).into_iter().collect();
        self.changed([id].into(), streams, &mut call);
        self.finish(call)
    }

    /// The guest wrote registers: these are all, as they are now. Every stream is looked up again.
    pub fn registers_changed(&mut self, registers: Vec<(String, u64)>) -> Handled {
        let _span = tracing::debug_span!("registers_changed").entered();
        let mut call = self.begin();
        if registers != self.unit.registers() {
            self.unit.set_registers(registers);
            self.streams.values_mut().for_each(|stream| stream.stale = true);
            self.devices.values_mut().for_each(|device| device.stale = true);
            self.changed(self.devices.keys().copied().collect(), self.streams.keys().copied().collect(), &mut call);
        }
        self.finish(call)
    }

    /// `length` bytes of guest memory from `address` on were written. When this returns, no DMA uses what they took away. Patterns that are known cost no call
    /// of a plugin.
    pub fn table_written(&mut self, address: Gpa, length: u64) -> Handled {
        let _span = tracing::trace_span!("table_written", %address, length).entered();
        let mut call = self.begin();
        let Some(last) = length.checked_sub(1).map(|more| address.0.saturating_add(more)) else { return self.finish(call) };
        let mut written = std::mem::take(&mut self.written);
        self.pages.holders(Span { first: address.0, last }, &mut written);
        let spaces = written.partition_point(|holder| !matches!(holder, Holder::Space(_)));
        if spaces > 0 {
            let (mut devices, mut streams) = (BTreeSet::new(), BTreeSet::new());
            for holder in &written[..spaces] {
                match holder {
                    Holder::Device(id) => drop(devices.insert(*id)),
                    Holder::Stream(requester) => drop(streams.insert(*requester)),
                    Holder::Space(_) => {}
                }
            }
            self.changed(devices, streams, &mut call);
        }
        for holder in &written[spaces..] {
            let Holder::Space(number) = *holder else { continue };
            let Some(space) = self.spaces.get(&number).filter(|space| !space.dead && !call.synchronised.contains(&number)) else { continue };
            // A range that is longer than any table is looked at by its tables, and not by its pages.
            let whole = length > LONGEST_WRITE;
            let told = match whole {
                false => self.host.table_written(space.id, address, length),
                true => self.host.invalidate(space.id, &[Invalidation { index: 0, effect: Effect::Everything }]),
            };
            self.told(number, told, whole, &mut call);
        }
        self.written = written;
        self.finish(call)
    }

    /// The guest's memory is another: regions came, or went, or both. `memory` and `map` are for this vIOMMU, `host` for its host's side; that of a [`ContextSpaces`] is the
    /// whole of guest memory, and every vIOMMU of the context is told.
    ///
    /// When this returns, no DMA reaches memory that went, and what stood in it counts as unreadable: streams whose structures were there are blocked, tables there
    /// lead nowhere, and the guest is told so when a device tries. Structures and tables in memory that came are read. If the host failed ([`Handled::memory`],
    /// [`Handled::loose`]), memory that went stays mapped in this process until another call has no such error.
    ///
    /// Memory that comes is in place before the call, its pages can be watched by then; memory that goes stays in place until it has returned.
    pub fn memory_changed(&mut self, memory: M, map: Arc<MemoryMap>, host: A::Memory) -> Handled {
        let _span = tracing::debug_span!("memory_changed").entered();
        let mut call = self.begin();
        let told = self.host.memory_changed(host);
        self.memory = memory.clone();
        self.map = Arc::clone(&map);
        self.unit.set_memory(memory, map);
        match told {
            Ok(told) => self.told_each(told, &mut call),
            Err(HostError::Refused(error)) => call.handled.memory = Some(HostError::Refused(error)),
            Err(HostError::Stale(error)) => {
                let all: Vec<u64> = self.spaces.keys().copied().collect();
                for number in all {
                    self.told(number, Err(HostError::Stale(error.to_string().into())), false, &mut call);
                }
                call.handled.memory = Some(HostError::Stale(error));
            }
        }
        // Reads again what each lookup read: where that is as before, nothing is done.
        self.changed(self.devices.keys().copied().collect(), self.streams.keys().copied().collect(), &mut call);
        self.finish(call)
    }

    fn told_each(&mut self, told: Vec<Told<A::Id>>, call: &mut Call) {
        for (id, told) in told {
            if let Some(number) = self.numbers.get(&id).copied() {
                self.told(number, told, false, call);
            }
        }
    }

    /// Nothing happened: tries again what is due. For a VMM that has a timer, and guests that are quiet.
    pub fn idle(&mut self) -> Handled {
        let call = self.begin();
        self.finish(call)
    }

    fn begin(&mut self) -> Call {
        self.calls += 1;
        Call::default()
    }

    fn finish(&mut self, mut call: Call) -> Handled {
        if !self.due.is_empty() {
            self.catch_up(self.limits.retries, &mut call);
        }
        self.let_go_of_lost(&mut call);
        self.respond(&mut call);
        call.handled
    }

    /// All streams of a device.
    fn streams_of(&self, id: u64) -> Vec<Requester> {
        let all = Requester { id, pasid: None }..=Requester { id, pasid: Some(u32::MAX) };
        self.streams.range(all).map(|(requester, _)| *requester).collect()
    }
}

impl Stream {
    fn new() -> Self {
        let state = StreamState::Unknown("it was not looked up yet".to_owned());
        Self { state, attached: None, outcome: None, tag: Tag::default(), trace: Trace::default(), stale: true, named: None, retry: Retry::default() }
    }
}
