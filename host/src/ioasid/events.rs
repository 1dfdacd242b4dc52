//! Requests that units refused, as the kernel tells of them: in records of a vIOMMU's event queue, which the plugin of the host's format decodes.
//!
//! ```text
//!   unit -- record --> the kernel's queue -- read --> records -- plugin --> requests -- whoever has the device --> its guest
//! ```

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::context::Inner;
use super::metrics::Counter;
use super::{Context, Device, Error};
use crate::kernel::handle::{EventQueue, Viommu};
use crate::kernel::{Errno, Event};
use crate::plugin::queue::BlockedDma;

/// Records that a queue of the kernel's holds.
const DEPTH: u32 = 256;
/// Records, and requests, that are kept for those who have not asked yet.
const KEPT: usize = 4096;

/// Requests that units refused.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostEvents {
    /// The oldest first; their requesters have the numbers that the guest knows devices by.
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

#[derive(Debug, Default)]
struct State {
    records: VecDeque<Record>,
    requests: VecDeque<(usize, BlockedDma)>,
    lost: u64,
}

impl State {
    fn keep<T>(queue: &mut VecDeque<T>, one: T, lost: &mut u64) {
        if queue.len() < KEPT {
            queue.push_back(one);
        } else {
            *lost += 1;
        }
    }
}

/// What was read, and not asked for yet.
#[derive(Debug, Default)]
pub(super) struct Told(Mutex<State>);

impl Told {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

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
        let mut told = self.told.lock();
        let State { records, lost, .. } = &mut *told;
        let mut read = 0;
        for Event { sequence, record } in events {
            *lost += u64::from(sequence.wrapping_sub(self.next) & NUMBERS);
            self.next = sequence.wrapping_add(1) & NUMBERS;
            match record {
                Some(bytes) => State::keep(records, Record { unit: self.unit, format: Arc::clone(&self.format), bytes }, lost),
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
    /// Requests of these devices, and of PASIDs of them, that units refused since the last time, each once: for whoever tells their guests. What is known of other devices is kept
    /// for those who ask for them; of a device that is not connected any more nobody is told.
    ///
    /// The kernel tells of such requests where it has a vIOMMU of the unit's architecture under what the device is attached to, and then of those that the table itself refuses; a
    /// page that the host's own tables lack is the host's business. See [`Device::capabilities`] for recoverable faults, which are another matter.
    ///
    /// # Errors
    /// [`Error::Kernel`]: what was read before is kept for the next time.
    pub fn host_events(&self, devices: &[Device]) -> Result<HostEvents, Error> {
        let _span = tracing::debug_span!("host_events", devices = devices.len()).entered();
        let read = self.0.read_events();
        self.0.decode_events();
        let read = read.map_err(Error::kernel("reading events"))?;
        self.0.count(Counter::Faults, read);
        let connected = self.0.connected();
        let mut state = self.0.told().lock();
        let mut blocked = Vec::new();
        state.requests.retain(|(unit, request)| {
            let is_of = |known_unit: usize, id: u64| known_unit == *unit && id == request.requester.id;
            if devices.iter().any(|device| is_of(device.0.unit(), device.virtual_id())) {
                blocked.push(*request);
                return false;
            }
            connected.iter().any(|device| is_of(device.unit(), device.virtual_id()))
        });
        Ok(HostEvents { blocked, lost: std::mem::take(&mut state.lost) })
    }
}

impl Inner {
    /// Reads all queues, also if one cannot be read.
    fn read_events(&self) -> Result<u64, Errno> {
        let read: Vec<_> = self.parents().iter().map(|parent| parent.read_events()).collect();
        read.into_iter().sum()
    }

    fn decode_events(&self) {
        let records = std::mem::take(&mut self.told().lock().records);
        for Record { unit, format, bytes } in records {
            let supervisor = self.supervisors().by_format(&format);
            let decoded = supervisor.map(|supervisor| supervisor.ask(|instance| instance.decode_event(&bytes)));
            let mut told = self.told().lock();
            let State { requests, lost, .. } = &mut *told;
            match decoded {
                Ok(Ok(Some(request))) => State::keep(requests, (unit, request), lost),
                Ok(Ok(None)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, %format, "what a unit refused cannot be read");
                    *lost += 1;
                }
                // It was there when the queue was made.
                Err(_) => *lost += 1,
            }
        }
    }
}
