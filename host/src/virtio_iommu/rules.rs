//! What the specification demands of each request: Virtio 1.3 sections 5.13.6.3.2 (ATTACH) to 5.13.6.7.2 (PROBE).
//!
//! All checks of a request come before its first effect. Where the specification leaves a status open, or more than one applies, the comment says so.

use std::collections::BTreeSet;

use super::config::Features;
use super::device::{Attached, Device, Effect};
use super::domain::Domain;
use super::request::{MapFlags, Request, Status, attach_flags};
use crate::table::Piece;
use crate::{Change, Span};

impl Device {
    /// Does what a request asks, and adds its effects to `effects`; any other status than [`Status::Ok`] means that nothing has changed.
    ///
    /// PROBE has no effect; [`Device::properties`] are its answer.
    pub fn handle(&mut self, request: &Request, effects: &mut Vec<Effect>) -> Status {
        let result = match *request {
            Request::Attach { domain, endpoint, flags } => self.attach(domain, endpoint, flags, effects),
            Request::Detach { domain, endpoint } => self.detach(domain, endpoint, effects),
            // Section 5.13.6.5: only available when negotiated.
            Request::Map { .. } | Request::Unmap { .. } if !self.accepted.contains(Features::MAP_UNMAP) => Err(Status::Unsupp),
            Request::Map { domain, first, last, address, flags } => self.map(domain, (first, last), address, flags, effects),
            Request::Unmap { domain, first, last } => self.unmap(domain, (first, last), effects),
            Request::Probe { .. } if !self.offered.contains(Features::PROBE) => Err(Status::Unsupp),
            Request::Probe { endpoint } => self.endpoints.get(&endpoint).map(|_| ()).ok_or(Status::NoEnt),
        };
        result.err().unwrap_or(Status::Ok)
    }

    fn attach(&mut self, id: u32, endpoint_id: u32, flags: u32, effects: &mut Vec<Effect>) -> Result<(), Status> {
        let bypass = flags & attach_flags::BYPASS != 0;
        let known = if self.accepted.contains(Features::BYPASS_CONFIG) { attach_flags::BYPASS } else { 0 };
        if flags & !known != 0 {
            return Err(Status::Inval);
        }
        let endpoint = self.endpoints.get(&endpoint_id).ok_or(Status::NoEnt)?;
        // Out of range has a status of its own, and the driver MUST NOT send it (section 5.13.6.1).
        let range = self.config.domain_range;
        if self.offered.contains(Features::DOMAIN_RANGE) && !(range.first..=range.last).contains(&id) {
            return Err(Status::Range);
        }
        let left = endpoint.domain.filter(|domain| *domain != id);
        match self.domains.get(&id) {
            Some(domain) if domain.contents.is_none() != bypass => return Err(Status::Inval),
            Some(_) if endpoint.domain == Some(id) => return Ok(()),
            // What is mapped already is where the endpoint's properties say that nothing can be: they are not compatible.
            Some(Attached { contents: Some(contents), .. }) if endpoint.reserved.iter().any(|region| contents.overlap(region.span).is_some()) => {
                return Err(Status::Unsupp);
            }
            Some(_) => {}
            None => {
                // As if it were detached first: a domain that ends with it makes room.
                let ends = left.and_then(|domain| self.domains.get(&domain)).is_some_and(|domain| domain.endpoints.len() == 1);
                if self.domains.len() - usize::from(ends) >= self.limits.domains {
                    return Err(Status::NoMem);
                }
                let contents = (!bypass).then(Domain::new);
                self.domains.insert(id, Attached { contents, endpoints: BTreeSet::new(), reserved: Vec::new() });
                effects.push(Effect::Created { domain: id, bypass });
            }
        }
        let before = self.reach(endpoint_id);
        if let Some(endpoint) = self.endpoints.get_mut(&endpoint_id) {
            endpoint.domain = Some(id);
        }
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.endpoints.insert(endpoint_id);
        }
        self.collect_reserved(id);
        if let Some(reach) = self.reach(endpoint_id).filter(|reach| Some(*reach) != before) {
            effects.push(Effect::Moved { endpoint: endpoint_id, reach });
        }
        if let Some(domain) = left {
            self.leave(domain, endpoint_id, effects);
        }
        Ok(())
    }

    fn detach(&mut self, id: u32, endpoint_id: u32, effects: &mut Vec<Effect>) -> Result<(), Status> {
        let before = self.reach(endpoint_id).ok_or(Status::NoEnt)?;
        let endpoint = self.endpoints.get_mut(&endpoint_id).ok_or(Status::NoEnt)?;
        // Also if there is no such domain. The specification allows this status and does not demand it.
        if endpoint.domain != Some(id) {
            return Err(Status::Inval);
        }
        endpoint.domain = None;
        let reach = self.unattached();
        if reach != before {
            effects.push(Effect::Moved { endpoint: endpoint_id, reach });
        }
        self.leave(id, endpoint_id, effects);
        Ok(())
    }

    /// An endpoint is not in a domain any more, and the domain ends if it was the last one.
    pub(super) fn leave(&mut self, id: u32, endpoint: u32, effects: &mut Vec<Effect>) {
        let Some(domain) = self.domains.get_mut(&id) else { return };
        domain.endpoints.remove(&endpoint);
        if domain.endpoints.is_empty() {
            self.mappings -= domain.contents.as_ref().map_or(0, Domain::len);
            self.domains.remove(&id);
            effects.push(Effect::Destroyed { domain: id });
        } else {
            self.collect_reserved(id);
        }
    }

    /// Joins the reserved regions of all endpoints of a domain, so that a MAP request looks at few of them, however many endpoints there are.
    fn collect_reserved(&mut self, id: u32) {
        let Some(domain) = self.domains.get_mut(&id) else { return };
        let of = |id: &u32| self.endpoints.get(id).into_iter().flat_map(|endpoint| endpoint.reserved.iter().map(|region| region.span));
        let mut spans: Vec<Span> = domain.endpoints.iter().flat_map(of).collect();
        spans.sort_unstable();
        domain.reserved.clear();
        for span in spans {
            match domain.reserved.last_mut() {
                Some(last) if span.first <= last.last => last.last = last.last.max(span.last),
                _ => domain.reserved.push(span),
            }
        }
    }

    fn map(&mut self, id: u32, (first, last): (u64, u64), address: u64, flags: MapFlags, effects: &mut Vec<Effect>) -> Result<(), Status> {
        let domain = self.domains.get_mut(&id).ok_or(Status::NoEnt)?;
        let contents = domain.contents.as_mut().ok_or(Status::Inval)?;
        let known = MapFlags::READ.with(MapFlags::WRITE).0 | if self.accepted.contains(Features::MMIO) { MapFlags::MMIO.0 } else { 0 };
        if flags.0 & !known != 0 {
            return Err(Status::Inval);
        }
        // The driver MUST make `virt_end` greater than `virt_start`; a mapping of one byte, with both equal, is legal by section 5.13.6.
        let span = Span::new(first, last).ok_or(Status::Inval)?;
        let range = self.config.input_range;
        if self.offered.contains(Features::INPUT_RANGE) && span.intersection(range) != Some(span) {
            return Err(Status::Range);
        }
        // A mapping may end with the last address there is: `virt_end + 1` is zero then, and aligned.
        if (first | address | last.wrapping_add(1)) & (self.config.granule() - 1) != 0 {
            return Err(Status::Range);
        }
        let reserved = &domain.reserved[domain.reserved.partition_point(|region| region.last < first)..];
        if contents.overlap(span).is_some() || reserved.first().is_some_and(|region| region.first <= last) {
            return Err(Status::Inval);
        }
        // Section 5.13.6.5: within the guest-physical address space, all of it. No status is prescribed.
        let whole = address.checked_add(last - first).is_some_and(|end| self.map.target(address).is_some_and(|target| target.contains(end)));
        if !whole {
            return Err(Status::Fault);
        }
        if self.mappings >= self.limits.mappings {
            return Err(Status::NoMem);
        }
        let piece = Piece { iova: span, address, attributes: flags.attributes() };
        contents.map(piece).map_err(|_| Status::Inval)?;
        self.mappings += 1;
        effects.push(Effect::Changed { domain: id, change: Change::Map(piece) });
        Ok(())
    }

    fn unmap(&mut self, id: u32, (first, last): (u64, u64), effects: &mut Vec<Effect>) -> Result<(), Status> {
        let contents = self.domains.get_mut(&id).ok_or(Status::NoEnt)?.contents.as_mut().ok_or(Status::Inval)?;
        // Neither alignment nor the input range is a condition: what is unmapped is what was mapped.
        let span = Span::new(first, last).ok_or(Status::Inval)?;
        let mut removed = 0;
        let unmapped = contents.unmap(span, |span| {
            removed += 1;
            effects.push(Effect::Changed { domain: id, change: Change::Unmap(span) });
        });
        self.mappings -= removed;
        unmapped.map_err(|_| Status::Range)
    }
}
