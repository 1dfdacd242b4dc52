//! What could not be done is tried again: after so many calls, twice as many after each failure.

use std::collections::BTreeSet;

use vm_memory::GuestMemory;

use super::host::AddressSpaces;
use super::{Call, Handled, StreamState, Viommu};
use crate::plugin::queue::{Effect, Invalidation};
use crate::plugin::{Health, Requester};

/// What is tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Again {
    /// The PASIDs of a device.
    Device(u64),
    /// A stream is looked up.
    Stream(Requester),
    /// A space is read.
    Space(u64),
}

/// Most calls between two tries.
const LONGEST: u64 = 1024;

/// When something is tried again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Retry {
    /// How many calls after the last try.
    wait: u64,
    /// At which call; none if it is not waiting.
    at: Option<u64>,
}

impl Retry {
    fn schedule(&mut self, due: &mut BTreeSet<(u64, Again)>, now: u64, what: Again) {
        if self.at.is_none() {
            self.wait = (2 * self.wait).clamp(1, LONGEST);
            let at = now.saturating_add(self.wait);
            self.at = Some(at);
            due.insert((at, what));
        }
    }

    pub(super) fn cancel(&mut self, due: &mut BTreeSet<(u64, Again)>, what: Again) {
        if let Some(at) = self.at {
            due.remove(&(at, what));
        }
        *self = Self::default();
    }
}

impl<M, A: AddressSpaces> Viommu<M, A> {
    fn retry(&mut self, what: Again) -> Option<&mut Retry> {
        match what {
            Again::Device(id) => self.devices.get_mut(&id).map(|device| &mut device.retry),
            Again::Stream(requester) => self.streams.get_mut(&requester).map(|stream| &mut stream.retry),
            Again::Space(number) => self.spaces.get_mut(&number).map(|space| &mut space.retry),
        }
    }

    /// It did not work: later.
    pub(super) fn schedule(&mut self, what: Again) {
        let now = self.calls;
        let mut due = std::mem::take(&mut self.due);
        if let Some(retry) = self.retry(what) {
            retry.schedule(&mut due, now, what);
        }
        self.due = due;
    }

    /// It worked, or is needed no more.
    pub(super) fn settled(&mut self, what: Again) {
        let mut due = std::mem::take(&mut self.due);
        if let Some(retry) = self.retry(what) {
            retry.cancel(&mut due, what);
        }
        self.due = due;
    }
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Ends a quarantine of the plugin, and tries again at once whatever waits.
    pub fn lift(&mut self) -> Handled {
        self.supervisor.lift();
        self.try_everything()
    }

    /// Tries whatever waits.
    pub(super) fn try_everything(&mut self) -> Handled {
        let mut call = self.begin();
        let waiting = std::mem::take(&mut self.due);
        let count = waiting.len();
        for (_, what) in waiting {
            let now = self.calls;
            if let Some(retry) = self.retry(what) {
                *retry = Retry { wait: 0, at: Some(now) };
                self.due.insert((now, what));
            }
        }
        self.catch_up(count, &mut call);
        call.handled
    }

    /// Tries at most `most` of what is due.
    pub(super) fn catch_up(&mut self, most: usize, call: &mut Call) {
        // A call that asks nothing counts as well for a plugin that waits.
        self.supervisor.pass();
        for _ in 0..most {
            let Some((at, what)) = self.due.first().copied().filter(|(at, _)| *at <= self.calls) else { return };
            self.due.remove(&(at, what));
            if let Some(retry) = self.retry(what) {
                retry.at = None;
            }
            self.figures.retries += 1;
            match what {
                Again::Device(id) => self.changed([id].into(), BTreeSet::new(), call),
                Again::Stream(requester) => {
                    let is_loose = |stream: &super::Stream| stream.attached.is_some() && !matches!(stream.state, StreamState::Space(_));
                    if self.streams.get(&requester).is_some_and(is_loose) {
                        self.leave(requester, call);
                    }
                    self.changed(BTreeSet::new(), [requester].into(), call);
                }
                Again::Space(number) => self.read_again(number, call),
            }
        }
    }

    /// Reads all tables of a space that has blocked entries; where only the host lacks something, no table.
    fn read_again(&mut self, number: u64, call: &mut Call) {
        let Some(space) = self.spaces.get(&number).filter(|space| !space.dead) else { return };
        if space.looked == self.calls || space.for_plugin && self.supervisor.health() != Health::Working {
            return self.schedule(Again::Space(number));
        }
        let everything = [Invalidation { index: 0, effect: Effect::Everything }];
        let is_whole = space.is_whole;
        let told = self.host.invalidate(space.id, if is_whole { &[] } else { &everything });
        if !is_whole {
            call.synchronised.insert(number);
        }
        self.told(number, told, true, call);
    }
}
