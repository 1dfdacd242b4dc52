//! From structures to ways: streams are looked up again when what their last lookup read has changed.

use std::collections::BTreeSet;

use vm_memory::GuestMemory;

use super::host::{AddressSpaces, Way};
use super::pages::{Holder, Pages};
use super::retry::Again;
use super::{Call, Stream, Viommu};
use crate::device::{Found, LookupError, Trace, Unit};
use crate::plugin::{Blocked, Instance, Outcome, Requester, Tag, Translated};

/// What a stream is to get.
#[derive(Debug)]
pub(super) enum Wanted {
    Way(Way, Tag),
    Blocked(Blocked),
    Refused(String),
    /// Nobody knows.
    Unknown(String),
}

/// A guest that changes structures while they are read is looked at so many times in one call.
const TRIES: u32 = 3;

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Structures of these devices and streams may have changed: finds out, and does what follows.
    pub(super) fn changed(&mut self, devices: BTreeSet<u64>, mut streams: BTreeSet<Requester>, call: &mut Call) {
        for id in devices {
            self.find_pasids(id, &mut streams, call);
        }
        let moves: Vec<(Requester, Wanted)> = streams.into_iter().filter_map(|requester| Some((requester, self.find(requester, call)?))).collect();
        self.apply(moves, call);
    }

    /// What a stream is to get; none if it has that.
    fn find(&mut self, requester: Requester, call: &mut Call) -> Option<Wanted> {
        let stream = self.streams.get(&requester)?;
        if !stream.stale && self.unit.is_unchanged(&stream.trace) {
            self.figures.unchanged += 1;
            return None;
        }
        for _ in 0..TRIES {
            let (found, trace) = self.ask(call, |unit, instance| unit.lookup_in(instance, requester));
            let stream = self.streams.get_mut(&requester)?;
            let outcome = match found {
                Err(error) if error.is_failure() => {
                    // What the last lookup read is what is watched: who writes to it has us look again.
                    stream.stale = true;
                    self.schedule(Again::Stream(requester));
                    return Some(Wanted::Unknown(error.to_string()));
                }
                Err(error) => Err(error.to_string()),
                Ok(outcome) => Ok(outcome),
            };
            watch(&self.pages, Holder::Stream(requester), &mut stream.trace, trace);
            // Read again now that it is watched: what was written in between was told to nobody.
            stream.stale = stream.trace.is_complete() && !self.unit.is_unchanged(&stream.trace);
            if stream.stale {
                continue;
            }
            stream.outcome = outcome.as_ref().ok().cloned();
            return Some(match outcome {
                Ok(Outcome::Bypass) => Wanted::Way(Way::Bypass, Tag::default()),
                Ok(Outcome::Direct(direct)) => Wanted::Way(Way::Direct(direct), Tag::default()),
                Ok(Outcome::Tables(Translated { tables, intercepts, tag })) => Wanted::Way(Way::Tables { tables, intercepts }, tag),
                Ok(Outcome::Blocked(blocked)) => Wanted::Blocked(blocked),
                Err(reason) => Wanted::Refused(reason),
            });
        }
        self.schedule(Again::Stream(requester));
        Some(Wanted::Unknown("the structures that lead to its tables change all the time".to_owned()))
    }

    /// Finds the PASIDs of a device: new streams are added to `streams`, those that are gone are dropped.
    fn find_pasids(&mut self, id: u64, streams: &mut BTreeSet<Requester>, call: &mut Call) {
        let Some(device) = self.devices.get(&id) else { return };
        if !device.stale && self.unit.is_unchanged(&device.trace) {
            return;
        }
        for _ in 0..TRIES {
            let (found, trace) = self.ask(call, |unit, instance| unit.pasids_in(instance, id));
            let Some(device) = self.devices.get_mut(&id) else { return };
            device.stale = true;
            if found.as_ref().is_err_and(LookupError::is_failure) {
                // The PASIDs that are known are looked up one by one, which fails as well if their structures changed.
                return self.schedule(Again::Device(id));
            }
            watch(&self.pages, Holder::Device(id), &mut device.trace, trace);
            device.stale = device.trace.is_complete() && !self.unit.is_unchanged(&device.trace);
            if !device.stale {
                self.settled(Again::Device(id));
                return self.set_pasids(id, found.unwrap_or_default(), streams, call);
            }
        }
        self.schedule(Again::Device(id));
    }

    fn set_pasids(&mut self, id: u64, mut pasids: Vec<u32>, streams: &mut BTreeSet<Requester>, call: &mut Call) {
        self.figures.refused_pasids += pasids.len().saturating_sub(self.limits.pasids) as u64;
        pasids.truncate(self.limits.pasids);
        for requester in self.streams_of(id) {
            if requester.pasid.is_some_and(|pasid| pasids.binary_search(&pasid).is_err()) {
                streams.remove(&requester);
                self.forget(requester, call);
            }
        }
        for pasid in &pasids {
            let requester = Requester { id, pasid: Some(*pasid) };
            self.streams.entry(requester).or_insert_with(|| {
                streams.insert(requester);
                Stream::new()
            });
        }
        if let Some(device) = self.devices.get_mut(&id) {
            device.pasids = pasids;
        }
    }

    /// A stream exists no more.
    pub(super) fn forget(&mut self, requester: Requester, call: &mut Call) {
        self.drop_requests(requester);
        self.leave(requester, call);
        self.settled(Again::Stream(requester));
        if let Some(stream) = self.streams.remove(&requester) {
            stream.trace.pages().for_each(|page| self.pages.remove(page, Holder::Stream(requester)));
        }
    }

    /// Asks the plugin to follow structures.
    fn ask<T>(
        &mut self,
        call: &mut Call,
        lookup: impl Fn(&Unit<M>, &mut Instance) -> (Result<Found<T>, LookupError>, Trace),
    ) -> (Result<T, LookupError>, Trace) {
        self.figures.lookups += 1;
        call.handled.lookups += 1;
        let (unit, mut trace) = (&self.unit, Trace::default());
        let asked = self.supervisor.ask(|instance| {
            let (found, read) = lookup(unit, instance);
            trace = read;
            match found {
                Ok(found) => Ok(Ok(found.value)),
                Err(LookupError::Call(error)) => Err(error),
                Err(other) => Ok(Err(other)),
            }
        });
        (asked.map_err(LookupError::from).and_then(|found| found), trace)
    }
}

/// The pages of `new` are watched from now on instead of those of `trace`.
fn watch(pages: &Pages, holder: Holder, trace: &mut Trace, new: Trace) {
    new.pages().for_each(|page| pages.add(page, holder));
    let kept: BTreeSet<_> = new.pages().collect();
    trace.pages().filter(|page| !kept.contains(page)).for_each(|page| pages.remove(page, holder));
    *trace = new;
}
