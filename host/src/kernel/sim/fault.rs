//! What becomes of transactions that do not translate.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::lock::lock;
use crate::Iova;
use crate::kernel::{DeviceId, Errno, Event, PageFault, PageResponse, Pasid, ResponseCode, Result};

/// Read or write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DmaAccess {
    /// The device reads memory.
    Read,
    /// The device writes memory.
    Write,
}

/// Which table refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Stage {
    /// None was reached: the device, its attachment, its context structures.
    Context,
    /// The one that user space owns.
    First,
    /// The kernel's own.
    Second,
}

/// Why a transaction did not translate.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Reason {
    /// DMA is blocked.
    #[error("nothing is attached")]
    NotAttached,
    /// No such PASID, or none is allowed here.
    #[error("the PASID is not in use")]
    Pasid,
    /// A context structure (CD, GCR3 entry, process context) is not valid.
    #[error("a context structure is not valid")]
    Context,
    /// The STE says so.
    #[error("the device's entry aborts all")]
    Abort,
    /// An entry is absent.
    #[error("not present")]
    NotPresent,
    /// The path does not allow this access.
    #[error("no permission")]
    Permission,
    /// Reserved bits are set, or a leaf is where none may be.
    #[error("a reserved encoding")]
    Reserved,
    /// The IOVA is beyond what the table translates, or not canonical.
    #[error("outside the input range")]
    InputRange,
    /// An address in an entry is beyond the output size.
    #[error("beyond the output size")]
    AddressSize,
    /// The accessed or dirty bit is clear, and hardware does not set it.
    #[error("access flag or dirty bit is clear")]
    AccessFlag,
    /// A structure or table lies where the parent does not reach, or keeps changing.
    #[error("a table cannot be read or updated")]
    TableAccess,
    /// The range is the interrupt controller's.
    #[error("the interrupt range")]
    InterruptRange,
    /// The units on the path lead to different memory.
    #[error("units on the path disagree")]
    PathDisagrees,
    /// The caches are at their limit: a test does more than it was set up for.
    #[error("the caches are full")]
    CacheFull,
    /// The memory is not registered any more.
    #[error("there is no memory")]
    NoMemory,
    /// A page request was answered as invalid.
    #[error("the page request was refused")]
    Refused,
    /// A page request was not answered, or answering did not help.
    #[error("the page request timed out")]
    TimedOut,
}

/// A transaction that did not translate.
#[derive(Clone, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[error("{device}: {access:?} at {iova}: {reason}")]
pub struct Fault {
    /// Label of the device.
    pub device: String,
    /// With a PASID, or without.
    pub pasid: Option<Pasid>,
    /// Where.
    pub iova: Iova,
    /// What it wanted.
    pub access: DmaAccess,
    /// Why not.
    pub reason: Reason,
    /// Which table refused.
    pub stage: Stage,
    /// The level as the architecture counts it: VT-d and AMD from 5 down to 1, SMMUv3 from -1 up to 3, RISC-V from 4 down to 0.
    pub level: Option<i8>,
}

/// A fault queue: page requests of devices, and where they wait.
#[derive(Debug, Default)]
pub(super) struct FaultQueue {
    state: Mutex<Requests>,
    answered: Condvar,
}

#[derive(Debug, Default)]
struct Requests {
    next: u32,
    unread: VecDeque<PageFault>,
    /// Read or not; until answered.
    waiting: Vec<(PageFault, Option<ResponseCode>)>,
}

/// One round of waiting for an answer.
const ROUND: Duration = Duration::from_millis(1);

impl FaultQueue {
    /// Asks, and waits for so many rounds; none if nobody answered.
    pub(super) fn request(&self, mut fault: PageFault, rounds: u32) -> Option<ResponseCode> {
        let mut state = lock(&self.state);
        state.next = state.next.wrapping_add(1);
        (fault.cookie, fault.group) = (state.next, state.next & 0x1ff);
        state.unread.push_back(fault);
        state.waiting.push((fault, None));
        let mut answer = None;
        for _ in 0..rounds {
            (state, _) = self.answered.wait_timeout(state, ROUND).unwrap_or_else(PoisonError::into_inner);
            answer = state.waiting.iter().find(|(waiting, _)| waiting.cookie == fault.cookie).and_then(|(_, answer)| *answer);
            if answer.is_some() {
                break;
            }
        }
        state.waiting.retain(|(waiting, _)| waiting.cookie != fault.cookie);
        state.unread.retain(|unread| unread.cookie != fault.cookie);
        answer
    }

    pub(super) fn read(&self) -> Vec<PageFault> {
        lock(&self.state).unread.drain(..).collect()
    }

    pub(super) fn respond(&self, response: PageResponse) -> Result<()> {
        let mut state = lock(&self.state);
        let unread = state.unread.iter().any(|fault| fault.cookie == response.cookie);
        let waiting = state.waiting.iter_mut().find(|(fault, answer)| fault.cookie == response.cookie && answer.is_none());
        match waiting {
            // What was not read cannot be known.
            Some((_, answer)) if !unread => *answer = Some(response.code),
            _ => return Err(Errno::EINVAL),
        }
        drop(state);
        self.answered.notify_all();
        Ok(())
    }

    /// Answers everything that a device waits for as invalid.
    pub(super) fn give_up(&self, device: DeviceId, pasid: Option<Pasid>) {
        let mut state = lock(&self.state);
        state.unread.retain(|fault| (fault.device, fault.pasid) != (device, pasid));
        for (_, answer) in state.waiting.iter_mut().filter(|(fault, answer)| (fault.device, fault.pasid) == (device, pasid) && answer.is_none()) {
            *answer = Some(ResponseCode::Invalid);
        }
        drop(state);
        self.answered.notify_all();
    }
}

/// An event queue.
#[derive(Debug)]
pub(super) struct EventQueue {
    depth: usize,
    state: Mutex<Events>,
}

#[derive(Debug, Default)]
struct Events {
    sequence: u32,
    events: VecDeque<Event>,
    lost: bool,
}

impl EventQueue {
    pub(super) fn new(depth: usize) -> Self {
        Self { depth, state: Mutex::default() }
    }

    pub(super) fn push(&self, record: Vec<u8>) {
        let mut state = lock(&self.state);
        let sequence = state.sequence;
        state.sequence = sequence.wrapping_add(1) & 0x7fff_ffff;
        if state.events.len() < self.depth {
            state.lost = false;
            state.events.push_back(Event { sequence, record: Some(record) });
        } else {
            state.lost = true;
        }
    }

    pub(super) fn read(&self) -> Vec<Event> {
        let mut state = lock(&self.state);
        let mut events: Vec<Event> = state.events.drain(..).collect();
        if std::mem::take(&mut state.lost) {
            let sequence = state.sequence.wrapping_sub(1) & 0x7fff_ffff;
            events.push(Event { sequence, record: None });
        }
        events
    }
}
