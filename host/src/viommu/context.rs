//! Address spaces of a [`Context`]: the host's side of a vIOMMU over a kernel.

use std::collections::{BTreeMap, BTreeSet};

use super::PageResponse;
use super::host::{AddressSpaces, HostError, Told, Way};
use crate::ioasid::{self, Context, Device, Error, GuestMemory, GuestView, HostEvents, Ioasid, Kind, Property, Refusal, Request, SpaceId};
use crate::kernel::{self, Pasid, ResponseCode};
use crate::lookup::Lookup;
use crate::plugin::queue::{Answer, GROUPS, Invalidation, PageRequest};
use crate::plugin::{Outcome, Requester, Tag, Translated};
use crate::sync::{self, Report, Watcher};
use crate::{Access, Gpa};

/// IOASIDs of a context, for one vIOMMU.
///
/// Pages with tables are watched by the vIOMMU's watcher. Formats are opened by the context's own supervisors; the vIOMMU's supervisor is to be one of them, so
/// that the plugin is one for both.
#[derive(Debug)]
pub struct ContextSpaces {
    context: Context,
    /// What IOASIDs are made like.
    template: Request,
    devices: BTreeMap<u64, Device>,
    spaces: BTreeMap<SpaceId, Ioasid>,
    /// Device models of the VMM's.
    emulated: BTreeSet<u64>,
    /// What these look up.
    lookups: BTreeMap<Requester, Lookup>,
    /// Page requests that were read and not answered: by the number of the group that the vIOMMU knows, which is one for each.
    waiting: BTreeMap<(Requester, u16), (SpaceId, u32)>,
    /// Why devices might reach memory that went: none is attached until that is over.
    unsettled: Option<String>,
    /// How many were detached because the kernel failed, in all of the context, when that was looked at last.
    lost: u64,
}

impl ContextSpaces {
    /// IOASIDs with the strategies, limits and other wishes of `template`; what is in them is the guest's to say. For a guest that is to be migrated it asks for
    /// [`Request::dirty_tracking`]; [`Context::track_dirty`] then begins, whatever the guest does with its address spaces.
    #[must_use]
    pub const fn new(context: Context, template: Request) -> Self {
        Self {
            context,
            template,
            devices: BTreeMap::new(),
            spaces: BTreeMap::new(),
            emulated: BTreeSet::new(),
            lookups: BTreeMap::new(),
            waiting: BTreeMap::new(),
            unsettled: None,
            lost: 0,
        }
    }

    /// The context.
    #[must_use]
    pub const fn context(&self) -> &Context {
        &self.context
    }

    /// Connects the device with this label, which the guest knows by `id`: before [`Viommu::connect`](super::Viommu::connect). A device that [`Saved::restore`](ioasid::Saved::restore)
    /// connected under the same number is taken over, once, with what it is attached to: the vIOMMU then puts its own address spaces in the place of the restored ones, so that
    /// each transaction sees either the one or the other.
    ///
    /// # Errors
    /// As [`Context::connect_as`]. [`Error::Refused`]: it was restored under another number.
    pub fn connect(&mut self, id: u64, label: &str) -> Result<Device, Error> {
        let device = match self.context.device(label).filter(Device::is_restored) {
            Some(device) if device.virtual_id() == id => device.taken_over(),
            Some(device) => {
                let reason = format!("device {label} was restored as {:#x}, and is to be {id:#x}", device.virtual_id());
                return Err(Refusal { property: Property::Attachment, reason }.into());
            }
            None => self.context.connect_as(label, id)?,
        };
        self.devices.insert(id, device.clone());
        Ok(device)
    }

    /// A device model of the VMM's, which the guest knows by `id`: before [`Viommu::connect`](super::Viommu::connect). It looks IOVAs up in software, by
    /// [`ContextSpaces::lookup`].
    pub fn emulate(&mut self, id: u64) {
        self.emulated.insert(id);
    }

    /// What a requester of a device model looks up now; none if it is blocked. A call of the vIOMMU may put it on another address space: ask again after each, and use
    /// no older one.
    #[must_use]
    pub fn lookup(&self, requester: Requester) -> Option<&Lookup> {
        self.lookups.get(&requester)
    }

    /// Lets go of a device: after [`Viommu::disconnect`](super::Viommu::disconnect).
    pub fn disconnect(&mut self, id: u64) {
        self.devices.remove(&id);
        self.emulated.remove(&id);
    }

    /// An IOASID of this vIOMMU.
    #[must_use]
    pub fn ioasid(&self, id: SpaceId) -> Option<&Ioasid> {
        self.spaces.get(&id)
    }

    /// What became of spaces in a call of the context that failed for some: devices of those were detached by the context.
    fn stale(&self, error: &Error) -> Vec<Told<SpaceId>> {
        let is_stale = |ioasid: &&Ioasid| {
            let stats = ioasid.stats();
            stats.blocked + stats.stale > 0
        };
        self.spaces.values().filter(is_stale).map(|ioasid| (ioasid.id(), Err(HostError::Stale(error.to_string().into())))).collect()
    }

    fn find(&self, id: SpaceId) -> Result<&Ioasid, HostError> {
        self.spaces.get(&id).ok_or_else(|| HostError::Refused(format!("{id} is gone").into()))
    }
}

/// All commands that reach a space concern it: it needs no name.
fn view(way: &Way) -> GuestView {
    let outcome = match way {
        Way::Bypass => Outcome::Bypass,
        Way::Direct(direct) => Outcome::Direct(direct.clone()),
        Way::Tables { tables, intercepts } => {
            Outcome::Tables(Translated { tables: tables.clone(), intercepts: intercepts.clone(), tag: Tag::default() })
        }
    };
    GuestView { outcome, id: 0 }
}

fn host_error(error: Error) -> HostError {
    match error {
        Error::Blocked(_) | Error::Detached(_) => HostError::Stale(Box::new(error)),
        error => HostError::Refused(Box::new(error)),
    }
}

impl AddressSpaces for ContextSpaces {
    type Id = SpaceId;
    type Memory = GuestMemory;

    /// Tables are read when the first device is attached.
    fn allocate(&mut self, way: &Way, _: sync::Way, watcher: Box<dyn Watcher>) -> Result<(SpaceId, Report), HostError> {
        let request = Request { kind: Kind::Guest(view(way)), ..self.template.clone() };
        let ioasid = self.context.allocate_watched(request, watcher).map_err(host_error)?;
        let id = ioasid.id();
        self.spaces.insert(id, ioasid);
        Ok((id, Report::default()))
    }

    fn release(&mut self, space: SpaceId) {
        self.spaces.remove(&space);
        self.waiting.retain(|_, (of, _)| *of != space);
    }

    fn attach(&mut self, requester: Requester, space: SpaceId) -> Result<Report, HostError> {
        if let Some(reason) = &self.unsettled {
            return Err(HostError::Refused(format!("memory that went may still be reached: {reason}").into()));
        }
        let ioasid = self.find(space)?;
        if self.emulated.contains(&requester.id) {
            let (lookup, report) = ioasid.look_up().map_err(host_error)?;
            self.lookups.insert(requester, lookup);
            return Ok(report);
        }
        let missing = || HostError::Refused(format!("nobody connected device {:#x}", requester.id).into());
        let device = self.devices.get(&requester.id).ok_or_else(missing)?;
        let pasid = requester.pasid.map(Pasid);
        let attached = device.attached().iter().any(|(of, _)| *of == pasid);
        if attached { ioasid.replace(device, pasid) } else { ioasid.attach(device, pasid) }.map_err(host_error)
    }

    fn detach(&mut self, requester: Requester) -> Result<(), HostError> {
        self.lookups.remove(&requester);
        let Some(device) = self.devices.get(&requester.id) else { return Ok(()) };
        let pasid = requester.pasid.map(Pasid);
        match device.detach(pasid) {
            // Those that a failed call concerned were detached by the context.
            Err(Error::Refused(refusal)) if refusal.property == Property::Attachment => Ok(()),
            detached => detached.map_err(host_error),
        }
    }

    /// Those who wait in one of the IOASIDs. Mostly it is known at once that there are none.
    fn lost(&mut self) -> Vec<Requester> {
        let lost = self.context.lost();
        if std::mem::replace(&mut self.lost, lost) == lost {
            return Vec::new();
        }
        let waiting = self.spaces.values().flat_map(Ioasid::lost);
        let requester = |(device, pasid): (Device, Option<Pasid>)| {
            let id = self.devices.iter().find(|(_, known)| **known == device).map(|(id, _)| *id)?;
            Some(Requester { id, pasid: pasid.map(|pasid| pasid.0) })
        };
        waiting.filter_map(requester).collect()
    }

    /// A device of a context that was restored may be attached to what was restored with it.
    fn keep_only(&mut self, id: u64, attached: &[Requester]) -> Result<(), HostError> {
        let Some(device) = self.devices.get(&id) else { return Ok(()) };
        let mut result = Ok(());
        for (pasid, _) in device.attached() {
            let requester = Requester { id, pasid: pasid.map(|pasid| pasid.0) };
            if !attached.contains(&requester) {
                result = result.and(device.detach(pasid).map_err(host_error));
            }
        }
        result
    }

    fn switch(&mut self, space: SpaceId, way: &Way, _: sync::Way) -> Result<Report, HostError> {
        self.find(space)?.switch(view(way)).map_err(host_error)
    }

    fn invalidate(&mut self, space: SpaceId, invalidations: &[Invalidation]) -> Result<Report, HostError> {
        self.find(space)?.invalidate(invalidations).map_err(host_error)
    }

    fn table_written(&mut self, space: SpaceId, address: Gpa, length: u64) -> Result<Report, HostError> {
        self.find(space)?.table_written(address, length).map_err(host_error)
    }

    /// The context of several vIOMMUs hears the same from each.
    fn memory_changed(&mut self, memory: GuestMemory) -> Result<Vec<Told<SpaceId>>, HostError> {
        let wanted = memory.regions().to_vec();
        self.unsettled = None;
        match self.context.memory_changed(memory) {
            Ok(reports) => {
                let own = reports.into_iter().filter(|(id, _)| self.spaces.contains_key(id));
                Ok(own.map(|(id, report)| (id, Ok(report))).collect())
            }
            Err(error) => {
                let now = self.context.memory();
                let ((_, more), (_, less)) = (ioasid::compare(now.regions(), &wanted), ioasid::compare(&wanted, now.regions()));
                let is_blocked = matches!(error, Error::Blocked(_));
                if more.is_empty() && self.context.memory_leaving().is_empty() {
                    // All is as it is to be but for who was detached; or what came is not there, and that has to be said.
                    return match (is_blocked, less.is_empty()) {
                        (true, true) => Ok(self.stale(&error)),
                        (true, false) => Err(HostError::Stale(Box::new(error))),
                        (false, _) => Err(host_error(error)),
                    };
                }
                self.unsettled = Some(error.to_string());
                Err(HostError::Stale(Box::new(error)))
            }
        }
    }

    /// Those of all IOASIDs, if the template has them.
    fn page_requests(&mut self) -> Result<Vec<PageRequest>, HostError> {
        let mut requests = Vec::new();
        if !self.template.page_requests {
            return Ok(requests);
        }
        for (space, ioasid) in &self.spaces {
            for fault in ioasid.read_faults().map_err(host_error)? {
                let device = self.devices.iter().find(|(_, device)| device.bound().id() == fault.device);
                let requester = device.map(|(id, _)| Requester { id: *id, pasid: fault.pasid.map(|pasid| pasid.0) });
                let free = requester.and_then(|requester| (0..GROUPS).find(|group| !self.waiting.contains_key(&(requester, *group))));
                let (Some(requester), Some(group)) = (requester, free) else {
                    // Nobody's, or more than there are numbers for.
                    let answer = kernel::PageResponse { cookie: fault.cookie, code: ResponseCode::Invalid };
                    ioasid.answer_fault(answer).map_err(host_error)?;
                    continue;
                };
                self.waiting.insert((requester, group), (*space, fault.cookie));
                let access = Access { read: fault.read, write: fault.write };
                let (address, last) = (fault.address, true);
                requests.push(PageRequest { requester, address, access, execute: false, privileged: false, group, last });
            }
        }
        Ok(requests)
    }

    fn host_events(&mut self, most: usize) -> Result<HostEvents, HostError> {
        let devices: Vec<Device> = self.devices.values().cloned().collect();
        self.context.host_events(&devices, most).map_err(host_error)
    }

    fn answer(&mut self, responses: &[PageResponse]) -> Result<(), HostError> {
        let mut result = Ok(());
        for response in responses {
            let Some((space, cookie)) = self.waiting.remove(&(response.requester, response.group)) else { continue };
            // With the space its queue is gone, and whoever waited there was answered.
            let Some(ioasid) = self.spaces.get(&space) else { continue };
            let code = if response.answer == Answer::Success { ResponseCode::Success } else { ResponseCode::Invalid };
            result = result.and(ioasid.answer_fault(kernel::PageResponse { cookie, code }).map_err(host_error));
        }
        result
    }
}
