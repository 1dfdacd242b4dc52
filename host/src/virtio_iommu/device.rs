//! The device: endpoints, domains, and what becomes of each request's bytes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::config::{Config, ConfigError, Features};
use super::domain::Domain;
use super::fault::{Reason, Report};
use super::request::{Request, Reserved, ReservedKind, Status};
use crate::memory::MemoryMap;
use crate::table::Translation;
use crate::{Access, Attributes, Change, Gpa, Span};

/// How much a guest can make the device remember. Beyond it requests end with [`Status::NoMem`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestLimits {
    /// Domains at a time.
    pub domains: usize,
    /// Mappings at a time, in all domains together.
    pub mappings: u64,
}

impl Default for RequestLimits {
    /// 4096 domains; mappings for 16 GiB in pages of 4 KiB.
    fn default() -> Self {
        Self { domains: 4096, mappings: 1 << 22 }
    }
}

/// What an endpoint's DMA gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Guest-physical memory as it is.
    Bypass,
    /// Nothing.
    Blocked,
    /// What the domain maps.
    Domain(u32),
}

/// What a request changed, in the order in which it is to be made real.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// A domain came into being, with nothing in it.
    Created {
        /// Its id.
        domain: u32,
        /// Its endpoints bypass translation.
        bypass: bool,
    },
    /// An endpoint's DMA gets something else from now on, in one step.
    Moved {
        /// The endpoint.
        endpoint: u32,
        /// What it gets.
        reach: Reach,
    },
    /// A domain ended, and all that it mapped; no endpoint has it any more. With a move this comes after the new domain was created.
    Destroyed {
        /// Its id, which may be used again.
        domain: u32,
    },
    /// A domain maps something else.
    Changed {
        /// Its id.
        domain: u32,
        /// What.
        change: Change,
    },
}

/// An endpoint cannot be added.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// There is one already.
    #[error("there is an endpoint {0:#x} already")]
    Exists(u32),
    /// Section 5.13.6.8.1: reserved regions do not overlap.
    #[error("reserved IOVAs {0} and {1} overlap")]
    Overlap(Span, Span),
    /// Section 5.13.6.8.1: at most one doorbell.
    #[error("more than one region for message signalled interrupts")]
    Doorbells,
    /// The list of properties would not fit into a PROBE request.
    #[error("{needed} bytes of properties; probe_size is {size}")]
    ProbeSize {
        /// Bytes of the properties.
        needed: usize,
        /// What the configuration says.
        size: u32,
    },
}

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Landing {
    /// Guest memory.
    Memory(Translation),
    /// The doorbell of message signalled interrupts, in a region that PROBE told the guest about: the VMM knows which interrupt that is.
    Doorbell,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Endpoint {
    pub(super) domain: Option<u32>,
    pub(super) reserved: Vec<Reserved>,
}

#[derive(Clone, Debug)]
pub(super) struct Attached {
    /// None: a bypass domain.
    pub(super) contents: Option<Domain>,
    pub(super) endpoints: BTreeSet<u32>,
    /// What no endpoint of the domain can have mapped, ascending and joined.
    pub(super) reserved: Vec<Span>,
}

/// A virtio-iommu device without its virtqueues.
#[derive(Clone, Debug)]
pub struct Device {
    pub(super) offered: Features,
    pub(super) accepted: Features,
    pub(super) config: Config,
    first_bypass: bool,
    pub(super) map: Arc<MemoryMap>,
    pub(super) limits: RequestLimits,
    pub(super) endpoints: BTreeMap<u32, Endpoint>,
    pub(super) domains: BTreeMap<u32, Attached>,
    pub(super) mappings: u64,
}

impl Device {
    /// A device that offers `features`, for a guest with the memory of `map`.
    ///
    /// # Errors
    /// A configuration that the specification does not allow.
    pub fn new(features: Features, config: Config, map: Arc<MemoryMap>, limits: RequestLimits) -> Result<Self, ConfigError> {
        config.check(features)?;
        Ok(Self {
            offered: features,
            accepted: Features::default(),
            config,
            first_bypass: config.bypass,
            map,
            limits,
            endpoints: BTreeMap::new(),
            domains: BTreeMap::new(),
            mappings: 0,
        })
    }

    /// Adds an endpoint, and says what its DMA gets now.
    ///
    /// # Errors
    /// There is one with this id, or its reserved regions cannot be so.
    pub fn add_endpoint(&mut self, id: u32, reserved: &[Reserved]) -> Result<Reach, EndpointError> {
        if self.endpoints.contains_key(&id) {
            return Err(EndpointError::Exists(id));
        }
        let mut reserved = reserved.to_vec();
        reserved.sort_by_key(|reserved| reserved.span);
        if let Some(pair) = reserved.windows(2).find(|pair| pair[0].span.last >= pair[1].span.first) {
            return Err(EndpointError::Overlap(pair[0].span, pair[1].span));
        }
        if reserved.iter().filter(|reserved| reserved.kind == ReservedKind::Msi).count() > 1 {
            return Err(EndpointError::Doorbells);
        }
        let needed = reserved.len() * Reserved::PROPERTY_BYTES;
        if needed > self.config.probe_size as usize {
            return Err(EndpointError::ProbeSize { needed, size: self.config.probe_size });
        }
        self.endpoints.insert(id, Endpoint { domain: None, reserved });
        Ok(self.unattached())
    }

    /// Removes an endpoint that the guest does not have any more, and its domain if it was the last one in it.
    pub fn remove_endpoint(&mut self, id: u32, effects: &mut Vec<Effect>) {
        if let Some(domain) = self.endpoints.get(&id).and_then(|endpoint| endpoint.domain) {
            effects.push(Effect::Moved { endpoint: id, reach: Reach::Blocked });
            self.leave(domain, id, effects);
        }
        self.endpoints.remove(&id);
    }

    /// The driver accepted these features.
    ///
    /// # Errors
    /// They are not all offered.
    pub fn accept(&mut self, features: Features, effects: &mut Vec<Effect>) -> Result<(), ConfigError> {
        let unknown = features.without(self.offered).0;
        if unknown != 0 {
            return Err(ConfigError::NotOffered(unknown));
        }
        let before = self.unattached();
        self.accepted = features;
        self.tell_unattached(before, effects);
        Ok(())
    }

    /// The features that the device offers.
    #[must_use]
    pub const fn offered(&self) -> Features {
        self.offered
    }

    /// The configuration space as it is now.
    #[must_use]
    pub const fn config(&self) -> &Config {
        &self.config
    }

    /// The driver wrote to the configuration space. Only `bypass` can be written (section 5.13.4.1), if it was negotiated and with 0 or 1; anything else has no
    /// effect.
    pub fn write_config(&mut self, offset: u64, bytes: &[u8], effects: &mut Vec<Effect>) {
        let at = Config::BYPASS_OFFSET.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        let bypass = at.and_then(|at| bytes.get(at)).copied();
        if let (true, Some(value @ (0 | 1))) = (self.accepted.contains(Features::BYPASS_CONFIG), bypass) {
            let before = self.unattached();
            self.config.bypass = value == 1;
            self.tell_unattached(before, effects);
        }
    }

    /// The driver resets the device: no endpoint is attached, no domain is left, no feature is accepted. `bypass` stays as it is (section 5.13.4.2).
    pub fn reset(&mut self, effects: &mut Vec<Effect>) {
        let before: Vec<(u32, Option<Reach>)> = self.endpoints.keys().map(|id| (*id, self.reach(*id))).collect();
        self.accepted = Features::default();
        for endpoint in self.endpoints.values_mut() {
            endpoint.domain = None;
        }
        let reach = self.unattached();
        effects.extend(before.iter().filter(|(_, was)| *was != Some(reach)).map(|(endpoint, _)| Effect::Moved { endpoint: *endpoint, reach }));
        effects.extend(self.domains.keys().map(|domain| Effect::Destroyed { domain: *domain }));
        self.domains.clear();
        self.mappings = 0;
    }

    /// The whole system is reset: as [`Device::reset`], and `bypass` is what it was at first.
    pub fn reset_system(&mut self, effects: &mut Vec<Effect>) {
        self.reset(effects);
        let before = self.unattached();
        self.config.bypass = self.first_bypass;
        self.tell_unattached(before, effects);
    }

    /// What endpoints without a domain get (section 5.13.6). Whether `bypass` counts depends on what is offered; the older feature has to be negotiated.
    #[must_use]
    pub const fn unattached(&self) -> Reach {
        let by_config = self.offered.contains(Features::BYPASS_CONFIG) && self.config.bypass;
        if by_config || self.accepted.contains(Features::BYPASS) { Reach::Bypass } else { Reach::Blocked }
    }

    fn tell_unattached(&self, before: Reach, effects: &mut Vec<Effect>) {
        let reach = self.unattached();
        if reach != before {
            let unattached = self.endpoints.iter().filter(|(_, endpoint)| endpoint.domain.is_none());
            effects.extend(unattached.map(|(id, _)| Effect::Moved { endpoint: *id, reach }));
        }
    }

    /// What an endpoint's DMA gets; none if there is no such endpoint.
    #[must_use]
    pub fn reach(&self, endpoint: u32) -> Option<Reach> {
        let Some(domain) = self.endpoints.get(&endpoint)?.domain else { return Some(self.unattached()) };
        let bypass = self.domains.get(&domain).is_some_and(|domain| domain.contents.is_none());
        Some(if bypass { Reach::Bypass } else { Reach::Domain(domain) })
    }

    /// A domain's mappings; none if there is no such domain or it is a bypass domain.
    #[must_use]
    pub fn domain(&self, id: u32) -> Option<&Domain> {
        self.domains.get(&id)?.contents.as_ref()
    }

    /// Mappings in all domains together.
    #[must_use]
    pub const fn mappings(&self) -> u64 {
        self.mappings
    }

    /// The properties of an endpoint, as a PROBE request tells them, without what is unused; none if there is no such endpoint.
    #[must_use]
    pub fn properties(&self, endpoint: u32) -> Option<Vec<u8>> {
        Some(self.endpoints.get(&endpoint)?.reserved.iter().flat_map(Reserved::property).collect())
    }

    /// Serves one request from the request queue: `readable` and `writable` are the two parts of its buffer. Effects are added to `effects`, and how many bytes
    /// were used is returned: zero where the specification wants nothing to be written.
    pub fn serve(&mut self, readable: &[u8], writable: &mut [u8], effects: &mut Vec<Effect>) -> usize {
        // Without a place for the status the request is not done either: the driver would take it for failed.
        let Some(last_tail) = writable.len().checked_sub(4) else { return 0 };
        let request = Request::decode(readable);
        let is_probe = readable.first() == Some(&5);
        if is_probe && !self.offered.contains(Features::PROBE) {
            return 0;
        }
        let size = if is_probe { self.config.probe_size as usize } else { 0 };
        // The tail comes after the properties; where they do not fit it is what there is at the end.
        let (properties, tail) = writable.split_at_mut(size.min(last_tail));
        properties.fill(0);
        let status = match request {
            Err(error) => match error.status() {
                Some(status) => status,
                None => return 0,
            },
            // Section 5.13.6.7.2: no property at all if there is no room for `probe_size` bytes.
            Ok(Request::Probe { .. }) if properties.len() < size => Status::Inval,
            Ok(request) => self.handle(&request, effects),
        };
        if let (Ok(Request::Probe { endpoint }), Status::Ok) = (request, status)
            && let Some(known) = self.properties(endpoint)
        {
            // They fit: `add_endpoint` saw to it.
            properties.iter_mut().zip(known).for_each(|(place, byte)| *place = byte);
        }
        tail[..4].copy_from_slice(&[status as u8, 0, 0, 0]);
        properties.len() + 4
    }

    /// Where an access of one byte goes, or what to report.
    ///
    /// # Errors
    /// The report for the event queue.
    pub fn translate(&self, endpoint: u32, iova: u64, access: Access) -> Result<Landing, Report> {
        let report = |reason| Report { reason, endpoint, access, address: Some(iova) };
        let known = self.endpoints.get(&endpoint).ok_or_else(|| report(Reason::Unknown))?;
        let (address, attributes) = match self.reach(endpoint) {
            Some(Reach::Bypass) => (iova, Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT)),
            Some(Reach::Domain(domain)) => {
                if let Some(reserved) = known.reserved.iter().find(|reserved| reserved.span.contains(iova)) {
                    let rings = reserved.kind == ReservedKind::Msi && access.write && !access.read;
                    return if rings { Ok(Landing::Doorbell) } else { Err(report(Reason::Mapping)) };
                }
                let piece = self.domain(domain).and_then(|domain| domain.find(iova)).ok_or_else(|| report(Reason::Mapping))?;
                (piece.address + (iova - piece.iova.first), piece.attributes)
            }
            Some(Reach::Blocked) | None => return Err(report(Reason::Domain)),
        };
        if !attributes.access(false).allows(access) {
            return Err(report(Reason::Mapping));
        }
        match self.map.target(address) {
            Some(_) => Ok(Landing::Memory(Translation { address: Gpa(address), attributes })),
            None => Err(report(Reason::Unknown)),
        }
    }

    /// All domains, by id: who is in it, and what it maps (none for a bypass domain).
    pub fn domains(&self) -> impl Iterator<Item = (u32, impl Iterator<Item = u32>, Option<&Domain>)> {
        self.domains.iter().map(|(id, domain)| (*id, domain.endpoints.iter().copied(), domain.contents.as_ref()))
    }

    /// The features that the driver accepted; none before it did.
    #[must_use]
    pub const fn accepted(&self) -> Features {
        self.accepted
    }
}
