//! Records of refused DMA, beside what the reference makes of structures and tables: also of such as have a bit that is not as the guest meant it.

use stagecraft::Iova;
use stagecraft::plugin::Requester;
use stagecraft::plugin::queue::EventAccess;
use stagecraft::viommu::{BlockedDma, StreamState};
use stagecraft_tests::reference::faults::{self, Answer, Kind, Request};
use stagecraft_tests::reference::snapshot::Snapshot;
use vm_memory::{Bytes, GuestAddress};

use super::structures::id;
use super::{Front, snapshot};
use crate::guests::{Arch, words};
use crate::session::Outcomes;

/// Requests of each requester.
const REQUESTS: usize = 6;

impl Front<'_> {
    /// What stands in memory, as far as it is there.
    fn seen(&self) -> Snapshot {
        let mut seen = snapshot(&self.structures, &self.guests);
        let there = self.machine.there;
        seen.memory.pages.retain(|page, _| there.has(*page));
        seen
    }

    /// A request of a device to one of these addresses.
    fn some_request(&mut self, device: usize, pasid: Option<u32>, samples: &[u64]) -> Request {
        let kind = [Kind::Read, Kind::Write, Kind::Write, Kind::Read, Kind::Execute][self.rng.below(5) as usize];
        let iova = self.rng.pick(samples) ^ [0, 0, 8, 0x7f0][self.rng.below(4) as usize];
        Request { id: id(device), pasid, iova, kind, privileged: self.rng.percent(20) }
    }

    /// Memory with tables is gone: what is refused now.
    pub(super) fn compare_events_of_hole(&mut self) -> Outcomes {
        let samples = self.samples();
        if self.is_broken { Ok(()) } else { self.compare_events_at(&samples) }
    }

    /// Records of what is refused now.
    pub(super) fn compare_events(&mut self, samples: &[u64]) -> Outcomes {
        if self.is_broken || !self.rng.percent(60) { Ok(()) } else { self.compare_events_at(samples) }
    }

    fn compare_events_at(&mut self, samples: &[u64]) -> Outcomes {
        let seen = self.seen();
        for device in 0..self.devices.len() {
            if !self.is_settled(device) {
                continue;
            }
            for pasid in self.structures.requesters() {
                for _ in 0..REQUESTS {
                    let request = self.some_request(device, pasid, samples);
                    if self.machine.dma((device, pasid), request.iova, request.kind == Kind::Write).is_none() {
                        self.compare_event(&seen, &request, "")?;
                    }
                }
            }
            // Nobody has these PASIDs, but it may be that the guest has 0.
            for pasid in [0, 0x1ff, 0xf_ffff] {
                let request = self.some_request(device, Some(pasid), samples);
                self.compare_event(&seen, &request, " of a stranger")?;
            }
        }
        // Nor has anybody these devices: of the last one in a table, and beyond.
        for id in [0x70, 0x20f0] {
            let request = Request { id, ..self.some_request(0, None, samples) };
            self.compare_event(&seen, &request, " of a stranger")?;
        }
        self.damage_entry(&seen, samples)?;
        if self.rng.percent(30) { self.damage_structure(samples) } else { Ok(()) }
    }

    /// What the guest wrote of a device's structures is known.
    fn is_settled(&self, device: usize) -> bool {
        self.is_connected[device] && self.since[device] == self.moments.len() - 1
    }

    /// One request: asks the library, and the reference.
    fn compare_event(&mut self, seen: &Snapshot, request: &Request, what: &str) -> Outcomes {
        let there = self.machine.there;
        let expected = faults::expected(seen, &|address| there.has(address), request);
        self.compare_with(expected.map_err(|problem| problem.to_string()), request, what).map(drop)
    }

    fn compare_with(&mut self, expected: Result<Option<Answer>, String>, request: &Request, what: &str) -> Result<bool, String> {
        let arch = self.structures.arch;
        let Request { id, pasid, iova, kind, privileged } = *request;
        let requester = Requester { id, pasid };
        // Who waits for the host, or cannot have what the guest says, has nothing there, whatever the guest says.
        let state = self.viommu.stream(requester).cloned();
        if matches!(state, Some(StreamState::Refused(_) | StreamState::Unknown(_))) {
            self.coverage.add("vIOMMU: event of a refused stream".to_owned());
            return Ok(false);
        }
        let access = match kind {
            Kind::Read => EventAccess::Read,
            Kind::Write => EventAccess::Write,
            Kind::Execute => EventAccess::Execute,
        };
        let events = self.viommu.faults(&[BlockedDma { requester, iova: Iova(iova), access, privileged }]);
        let answer = match expected {
            Ok(Some(answer)) => answer,
            Ok(None) => {
                self.coverage.add(format!("vIOMMU: event{what}: the guest allows it"));
                return Ok(false);
            }
            Err(_) => {
                self.coverage.add(format!("vIOMMU: event{what}: not known"));
                return Ok(false);
            }
        };
        // What privileged requests and those for instructions may do the reference does not know.
        let of_permission = ["Permission", "Privilege", "nothing is allowed", "IR and IW"].iter().any(|part| answer.why.contains(part));
        if of_permission && (privileged || kind == Kind::Execute) {
            return Ok(false);
        }
        // Nor does the library of privileged requests, which it hears of when a table refuses them as others.
        if events.records.is_empty() && privileged && ["PC.ENS", "SPT.6"].iter().any(|part| answer.why.contains(part)) {
            return Ok(false);
        }
        let record = events.records.first().map(|record| &record.bytes[..]);
        if events.lost != 0 || !answer.told.iter().any(|told| told.is(record)) {
            let in_words = |bytes: &[u8]| bytes.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default())).collect::<Vec<_>>();
            let setting = (id >= 0x18).then(|| self.structures.settings.get((id as usize - 0x18) / 8)).flatten();
            return Err(format!(
                "{arch:?}: {request:x?}{what} ({setting:?}, {state:?}) is told {:x?}, lost {}, and not {:x?} ({})",
                record.map(in_words),
                events.lost,
                answer.told,
                answer.why
            ));
        }
        let told = if record.is_some() { "" } else { ", silent" };
        self.coverage.add(format!("vIOMMU: event of {arch:?}{what}{told}"));
        Ok(true)
    }

    /// An entry on the way of a request has a bit that it should not have, or has it not. Nobody but the library looks while it is so.
    fn damage_entry(&mut self, seen: &Snapshot, samples: &[u64]) -> Outcomes {
        let there = self.machine.there;
        for _ in 0..REQUESTS {
            let device = self.rng.below(self.devices.len() as u64) as usize;
            let requesters = self.structures.requesters();
            let pasid = self.rng.pick(&requesters);
            let request = self.some_request(device, pasid, samples);
            if !self.is_settled(device) {
                continue;
            }
            let (_, visited) = faults::visited(seen, &|address| there.has(address), &request);
            // What structures were found by caches know.
            let structures: Vec<u64> = visited.iter().filter(|read| !read.of_walk).map(|read| read.address).collect();
            let entries: Vec<u64> = visited.iter().filter(|read| read.of_walk).map(|read| read.address).collect();
            let entries: Vec<u64> = entries.into_iter().filter(|address| !structures.contains(address)).collect();
            if entries.is_empty() {
                continue;
            }
            let (address, bit) = (self.rng.pick(&entries), self.rng.below(64));
            let (before, after) = self.damage(address, bit)?;
            let mut damaged = seen.clone();
            damaged.memory.write(address, after, false);
            let done = self.compare_event(&damaged, &request, " of a damaged entry");
            self.write(address, before)?;
            done.map_err(|error| format!("{error}; {address:#x} had {after:#x} and not {before:#x}"))?;
        }
        Ok(())
    }

    /// The same with a structure, which caches know until they are told.
    fn damage_structure(&mut self, samples: &[u64]) -> Outcomes {
        self.tell_all()?;
        let (device, there) = (self.rng.below(self.devices.len() as u64) as usize, self.machine.there);
        if !self.is_settled(device) {
            return Ok(());
        }
        let requesters = self.structures.requesters();
        let pasid = self.rng.pick(&requesters);
        let request = self.some_request(device, pasid, samples);
        let (_, visited) = faults::visited(&self.seen(), &|address| there.has(address), &request);
        let words: Vec<u64> = visited.into_iter().filter(|read| !read.of_walk).map(|read| read.address).collect();
        if words.is_empty() {
            return Ok(());
        }
        let (address, bit) = (self.rng.pick(&words), self.rng.below(64));
        let (before, after) = self.damage(address, bit)?;
        self.structures_changed()?;
        let mut done = Ok(());
        let seen = self.seen();
        for _ in 0..REQUESTS {
            let request = self.some_request(device, pasid, samples);
            done = done.and_then(|()| self.compare_event(&seen, &request, " of a damaged structure"));
        }
        self.write(address, before)?;
        self.structures_changed()?;
        done.map_err(|error| format!("{error}; {address:#x} had {after:#x} and not {before:#x}"))
    }

    /// Nothing of any structure is cached. What hardware thinks of a damaged one nobody judges.
    fn structures_changed(&mut self) -> Outcomes {
        let devices = 0..self.devices.len();
        let structures = devices.flat_map(|device| self.structures.forget_device(device, &[], 0));
        // In legacy mode a device's entry is known by a domain, which it may not have any more: all of the context cache.
        let contexts = (self.structures.arch == Arch::Vtd).then(|| words(&[1 | 1 << 4, 0]));
        let all: Vec<Vec<u8>> = structures.chain(contexts).chain(self.structures.forget_everything()).collect();
        self.commands(&all).map(drop)
    }

    /// A word in memory, and what becomes of it.
    fn damage(&mut self, address: u64, bit: u64) -> Result<(u64, u64), String> {
        let before: u64 = self.machine.memory.read_obj(GuestAddress(address)).map_err(|error| error.to_string())?;
        let after = before ^ 1 << bit;
        self.write(address, after)?;
        Ok((before, after))
    }

    fn write(&self, address: u64, word: u64) -> Outcomes {
        self.machine.memory.write_obj(word, GuestAddress(address)).map_err(|error| error.to_string())
    }
}
