//! Requests that units refused, as the kernel tells of them: in records of a vIOMMU's event queue, which the plugin of the host's format decodes.
//!
//! ```text
//!   unit -- record --> the kernel's queue -- read --> records -- plugin --> requests -- whoever has the device --> its guest
//! ```

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use super::context::Inner;
use super::metrics::Counter;
use super::record::lock;
use super::{Context, Device, Error};
use crate::kernel::handle::{EventQueue, Viommu};
use crate::kernel::{Errno, Event};
use crate::plugin::SuperviseError;
use crate::plugin::queue::BlockedDma;

/// Records that a queue of the kernel's holds.
const DEPTH: u32 = 256;
/// Records that are kept until they can be read, and requests of one device until somebody asks for them.
const KEPT: usize = 1024;

/// Requests that units refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostEvents {
    /// Of each device the oldest first; their requesters have the numbers that the guest knows devices by.
    pub blocked: Vec<BlockedDma>,
    /// How many more there were, of which nothing is known: the kernel's queue was full, or nobody could say what a record means. Whose they were is not known either.
    pub lost: u64,
}

/// A record that was read.
#[derive(Debug)]
struct Record {
    unit: usize,
    format: Arc<str>,
    bytes: Vec<u8>,
}

/// Requests of one device.
#[derive(Debug, Default)]
struct OfDevice {
    requests: VecDeque<BlockedDma>,
    /// Those that there was no room for.
    lost: u64,
}

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Record>,
    /// By unit, and by the number that the guest knows a device by.
    devices: BTreeMap<(usize, u64), OfDevice>,
    /// Nobody knows whose.
    lost: u64,
}

/// What was read, and not asked for yet.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<State>);

/// The event queue of a vIOMMU. What is in it at its end is kept.
#[derive(Debug)]
pub(super) struct Events {
    queue: EventQueue,
    /// The number of the next event, if none is lost.
    next: u32,
    unit: usize,
    format: Arc<str>,
    told: Arc<Told>,
}

impl Events {
    /// None: the kernel has no such queues.
    pub(super) fn new(viommu: &Viommu, viommu_type: u32, unit: usize, format: &str, told: &Arc<Told>) -> Result<Option<Self>, Errno> {
        // The kernel numbers types of queues as those of their vIOMMUs.
        match viommu.event_queue(viommu_type, DEPTH) {
            Ok(queue) => Ok(Some(Self { queue, next: 0, unit, format: format.into(), told: Arc::clone(told) })),
            Err(Errno::EOPNOTSUPP | Errno::ENOTTY) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Reads what is there; how many records.
    pub(super) fn read(&mut self) -> Result<u64, Errno> {
        let events = self.queue.kernel().read_events(self.queue.id())?;
        let mut told = lock(&self.told.0);
        let State { records, lost, .. } = &mut *told;
        let mut read = 0;
        for Event { sequence, record } in events {
            *lost += u64::from(sequence.wrapping_sub(self.next) & NUMBERS);
            self.next = sequence.wrapping_add(1) & NUMBERS;
            match record {
                Some(_) if records.len() >= KEPT => *lost += 1,
                Some(bytes) => records.push_back(Record { unit: self.unit, format: Arc::clone(&self.format), bytes }),
                // The last one that was lost has this number.
                None => *lost += 1,
            }
            read += 1;
        }
        Ok(read)
    }
}

/// Numbers of events begin again after this one.
const NUMBERS: u32 = 0x7fff_ffff;

impl Drop for Events {
    fn drop(&mut self) {
        if let Err(errno) = self.read() {
            tracing::warn!(%errno, "what a unit refused at last is not known");
        }
    }
}

impl Context {
    /// Requests of these devices, and of PASIDs of them, that units refused since the last time, each once and at most so many: for whoever tells their guests. What is beyond is for the next time, and what is
    /// known of other devices is kept for those who ask for them, up to a limit for each; of a device that is not connected any more nobody is told.
    ///
    /// The kernel tells of such requests where it has a vIOMMU of the unit's architecture under what the device is attached to, and then of those that the table itself refuses; a
    /// page that the host's own tables lack is the host's business. Recoverable faults are another matter: [`Ioasid::read_faults`](super::Ioasid::read_faults).
    ///
    /// # Errors
    /// [`Error::Kernel`]: what was read before is kept for the next time.
    pub fn host_events(&self, devices: &[Device], most: usize) -> Result<HostEvents, Error> {
        let _span = tracing::debug_span!("host_events", devices = devices.len()).entered();
        let read = self.0.read_events();
        self.0.decode_events();
        let read = read.map_err(Error::kernel("reading events"))?;
        self.0.count(Counter::Faults, read);
        let connected: BTreeSet<(usize, u64)> = self.0.connected().iter().map(|device| (device.unit(), device.virtual_id())).collect();
        let mut state = lock(&self.0.told().0);
        let mut events = HostEvents { blocked: Vec::new(), lost: std::mem::take(&mut state.lost) };
        state.devices.retain(|device, _| connected.contains(device));
        // One after the other of each, so that nobody who makes many is heard instead of others.
        let mut before = None;
        while before != Some(events.blocked.len()) {
            before = Some(events.blocked.len());
            for device in devices {
                let Some(of) = state.devices.get_mut(&(device.0.unit(), device.virtual_id())) else { continue };
                events.lost += std::mem::take(&mut of.lost);
                events.blocked.extend(if events.blocked.len() < most { of.requests.pop_front() } else { None });
            }
        }
        Ok(events)
    }
}

impl Inner {
    /// Reads all queues, also if one cannot be read.
    fn read_events(&self) -> Result<u64, Errno> {
        let read: Vec<_> = self.parents().iter().map(|parent| parent.read_events()).collect();
        read.into_iter().sum()
    }

    /// As long as a plugin does not answer at all, its records wait.
    fn decode_events(&self) {
        let mut records = std::mem::take(&mut lock(&self.told().0).records);
        let mut wait = VecDeque::new();
        let mut silent: Option<Arc<str>> = None;
        while let Some(record) = records.pop_front() {
            if silent.as_ref() == Some(&record.format) {
                wait.push_back(record);
                continue;
            }
            // It was there when the queue was made.
            let Ok(supervisor) = self.supervisors().by_format(&record.format) else { continue };
            match supervisor.ask(|instance| instance.decode_event(&record.bytes)) {
                Ok(request) => request.into_iter().for_each(|request| lock(&self.told().0).take(record.unit, request)),
                Err(error @ (SuperviseError::Waiting { .. } | SuperviseError::Quarantined { .. })) => {
                    tracing::warn!(%error, "what a unit refused cannot be read yet");
                    silent = Some(Arc::clone(&record.format));
                    wait.push_back(record);
                }
                Err(error) => {
                    tracing::warn!(%error, "what a unit refused cannot be read");
                    lock(&self.told().0).lost += 1;
                }
            }
        }
        let mut told = lock(&self.told().0);
        wait.append(&mut told.records);
        told.records = wait;
    }
}

impl State {
    fn take(&mut self, unit: usize, request: BlockedDma) {
        let of = self.devices.entry((unit, request.requester.id)).or_default();
        if of.requests.len() < KEPT {
            of.requests.push_back(request);
        } else {
            of.lost += 1;
        }
    }
}
