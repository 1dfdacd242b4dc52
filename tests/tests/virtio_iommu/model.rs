//! A naive model: every byte of a small address space on its own, and every rule as a loop over bytes. Random sequences of requests must have the same status
//! and lead to the same translations; and whoever only listens to the effects must know as much as the device.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use stagecraft::memory::{Budget, Kind, Limits};
use stagecraft::table::{Collector, Source};
use stagecraft::virtio_iommu::{
    Config, Device, DomainRange, Effect, Landing, MapFlags, Reach, Reason, Request, RequestLimits, Reserved, ReservedKind, Status,
};
use stagecraft::{Access, Change, Span};

use crate::{device, memory};

/// The address space: bytes at both of its ends.
const HALF: u64 = 48;
const IOVAS: u64 = 2 * HALF;
const GRANULE: u64 = 2;
const MAPPINGS: usize = 9;
const DOMAINS: usize = 3;
/// Guest memory: 0 to 29 and 30 to 39 side by side, 60 to 79 on its own.
const MEMORY: [(Kind, u64, u64); 3] = [(Kind::Ram, 0, 29), (Kind::Device, 30, 39), (Kind::Ram, 60, 79)];
const RESERVED: [(ReservedKind, u64, u64); 2] = [(ReservedKind::Reserved, 20, 23), (ReservedKind::Msi, 31, 31)];
/// The endpoint that has them.
const WITH_RESERVED: u32 = 3;

/// The IOVA with this number.
const fn iova(number: u64) -> u64 {
    if number < HALF { number } else { u64::MAX - (IOVAS - 1 - number) }
}

fn exists(address: u64) -> bool {
    MEMORY.iter().any(|(_, first, last)| (*first..=*last).contains(&address))
}

fn reserved(endpoint: u32, iova: u64) -> Option<ReservedKind> {
    let region = RESERVED.iter().find(|(_, first, last)| endpoint == WITH_RESERVED && (*first..=*last).contains(&iova));
    region.map(|(kind, _, _)| *kind)
}

/// What one byte of a domain maps to: which MAP made it, where it goes, with which flags.
type Byte = (u64, u64, u32);

#[derive(Default)]
struct ModelDomain {
    bypass: bool,
    bytes: BTreeMap<u64, Byte>,
}

#[derive(Default)]
struct Model {
    attached: BTreeMap<u32, u32>,
    domains: BTreeMap<u32, ModelDomain>,
    serial: u64,
}

impl Model {
    fn mappings(&self) -> usize {
        let serials = self.domains.values().flat_map(|domain| domain.bytes.values().map(|byte| byte.0));
        serials.collect::<BTreeSet<u64>>().len()
    }

    fn is_last(&self, endpoint: u32) -> bool {
        let domain = self.attached.get(&endpoint);
        domain.is_some() && self.attached.iter().filter(|(other, other_domain)| **other != endpoint && Some(*other_domain) == domain).count() == 0
    }

    fn detach(&mut self, endpoint: u32) {
        let last = self.is_last(endpoint);
        if let Some(domain) = self.attached.remove(&endpoint).filter(|_| last) {
            self.domains.remove(&domain);
        }
    }

    /// The status, or, where several rules are broken, all statuses that one of them has.
    fn request(&mut self, request: &Request) -> Vec<Status> {
        match *request {
            Request::Attach { domain, endpoint, flags } => self.attach(domain, endpoint, flags),
            Request::Detach { domain, endpoint } if (1..=4).contains(&endpoint) => {
                if self.attached.get(&endpoint) != Some(&domain) {
                    return vec![Status::Inval];
                }
                self.detach(endpoint);
                Vec::new()
            }
            Request::Detach { .. } => vec![Status::NoEnt],
            Request::Map { domain, first, last, address, flags } => self.map(domain, first, last, address, flags.0),
            Request::Unmap { domain, first, last } => self.unmap(domain, first, last),
            Request::Probe { endpoint } => {
                if (1..=4).contains(&endpoint) {
                    Vec::new()
                } else {
                    vec![Status::NoEnt]
                }
            }
        }
    }

    fn attach(&mut self, domain: u32, endpoint: u32, flags: u32) -> Vec<Status> {
        let mut wrong = Vec::new();
        if flags > 1 {
            wrong.push(Status::Inval);
        }
        if !(1..=4).contains(&endpoint) {
            wrong.push(Status::NoEnt);
        }
        if domain > 5 {
            wrong.push(Status::Range);
        }
        let known = self.domains.get(&domain);
        if known.is_some_and(|known| known.bypass != (flags == 1)) {
            wrong.push(Status::Inval);
        }
        let here = self.attached.get(&endpoint) == Some(&domain);
        if !here && known.is_some_and(|known| known.bytes.keys().any(|iova| reserved(endpoint, *iova).is_some())) {
            wrong.push(Status::Unsupp);
        }
        if known.is_none() && self.domains.len() - usize::from(self.is_last(endpoint)) >= DOMAINS {
            wrong.push(Status::NoMem);
        }
        if wrong.is_empty() && !here {
            self.detach(endpoint);
            self.attached.insert(endpoint, domain);
            self.domains.entry(domain).or_insert_with(|| ModelDomain { bypass: flags == 1, ..ModelDomain::default() });
        }
        wrong
    }

    fn map(&mut self, domain: u32, first: u64, last: u64, address: u64, flags: u32) -> Vec<Status> {
        let mappings = self.mappings();
        let endpoints: Vec<u32> = self.attached.iter().filter(|(_, other)| **other == domain).map(|(endpoint, _)| *endpoint).collect();
        let Some(known) = self.domains.get_mut(&domain) else { return vec![Status::NoEnt] };
        let mut wrong = Vec::new();
        if known.bypass || flags > 7 || first > last {
            wrong.push(Status::Inval);
        }
        if !first.is_multiple_of(GRANULE) || !address.is_multiple_of(GRANULE) || last % GRANULE != GRANULE - 1 {
            wrong.push(Status::Range);
        }
        if mappings >= MAPPINGS {
            wrong.push(Status::NoMem);
        }
        if last.saturating_sub(first) > 2 * IOVAS {
            // From one end of the space to the other: more than there is memory, over everything that is reserved or mapped.
            wrong.extend([Status::Fault, Status::Inval]);
            return wrong;
        }
        for byte in first..=last {
            if known.bytes.contains_key(&byte) || endpoints.iter().any(|endpoint| reserved(*endpoint, byte).is_some()) {
                wrong.push(Status::Inval);
            }
            if address.checked_add(byte - first).is_none_or(|address| !exists(address)) {
                wrong.push(Status::Fault);
            }
        }
        if wrong.is_empty() {
            self.serial += 1;
            known.bytes.extend((first..=last).map(|byte| (byte, (self.serial, address + (byte - first), flags))));
        }
        wrong
    }

    fn unmap(&mut self, domain: u32, first: u64, last: u64) -> Vec<Status> {
        let Some(known) = self.domains.get_mut(&domain) else { return vec![Status::NoEnt] };
        if known.bypass || first > last {
            return vec![Status::Inval];
        }
        let inside: BTreeSet<u64> = known.bytes.iter().filter(|(byte, _)| (first..=last).contains(*byte)).map(|(_, byte)| byte.0).collect();
        let cut = known.bytes.iter().any(|(byte, (serial, _, _))| inside.contains(serial) && !(first..=last).contains(byte));
        if cut {
            return vec![Status::Range];
        }
        known.bytes.retain(|_, (serial, _, _)| !inside.contains(serial));
        Vec::new()
    }

    /// Where an access goes, or why it does not.
    fn translate(&self, endpoint: u32, iova: u64, write: bool) -> Result<Option<u64>, Reason> {
        let Some(domain) = self.attached.get(&endpoint) else { return Err(Reason::Domain) };
        let domain = &self.domains[domain];
        if domain.bypass {
            return if exists(iova) { Ok(Some(iova)) } else { Err(Reason::Unknown) };
        }
        match (reserved(endpoint, iova), domain.bytes.get(&iova)) {
            (Some(ReservedKind::Msi), _) if write => Ok(None),
            (None, Some((_, address, flags))) if flags & (1 << u32::from(write)) != 0 => Ok(Some(*address)),
            _ => Err(Reason::Mapping),
        }
    }
}

/// Where each byte goes, and what is allowed there.
type Heard = BTreeMap<u64, (u64, Access)>;

/// Somebody who hears nothing but effects.
#[derive(Default)]
struct Listener {
    reach: BTreeMap<u32, Reach>,
    /// For each domain: what each byte maps to, and whether it is a bypass domain.
    domains: BTreeMap<u32, (bool, Heard)>,
    /// The spans that were mapped as one.
    spans: BTreeMap<u32, BTreeSet<Span>>,
}

impl Listener {
    fn hear(&mut self, effect: &Effect) {
        match *effect {
            Effect::Created { domain, bypass } => assert!(self.domains.insert(domain, (bypass, BTreeMap::new())).is_none(), "it is there already"),
            Effect::Destroyed { domain } => {
                assert!(!self.reach.values().any(|reach| *reach == Reach::Domain(domain)), "an endpoint has it still");
                assert!(self.domains.remove(&domain).is_some(), "there is none");
                self.spans.remove(&domain);
            }
            Effect::Moved { endpoint, reach } => assert_ne!(self.reach.insert(endpoint, reach), Some(reach), "it has that already"),
            Effect::Changed { domain, change: Change::Map(piece) } => {
                let bytes = &mut self.domains.get_mut(&domain).expect("a domain").1;
                for byte in piece.iova.first..=piece.iova.last {
                    let target = (piece.address + (byte - piece.iova.first), piece.attributes.access(false));
                    assert!(bytes.insert(byte, target).is_none(), "something is mapped there");
                }
                self.spans.entry(domain).or_default().insert(piece.iova);
            }
            Effect::Changed { domain, change: Change::Unmap(span) } => {
                assert!(self.spans.entry(domain).or_default().remove(&span), "{span} was not mapped as one");
                let bytes = &mut self.domains.get_mut(&domain).expect("a domain").1;
                assert!((span.first..=span.last).all(|byte| bytes.remove(&byte).is_some()));
            }
        }
    }
}

fn subject() -> Device {
    let config = Config { page_size_mask: GRANULE | 1 << 4, domain_range: DomainRange { first: 0, last: 5 }, ..Config::default() };
    let limits = RequestLimits { domains: DOMAINS, mappings: MAPPINGS as u64 };
    let mut device = device(config, memory(&MEMORY), limits);
    let regions: Vec<Reserved> =
        RESERVED.iter().map(|(kind, first, last)| Reserved { kind: *kind, span: Span { first: *first, last: *last } }).collect();
    for endpoint in 1..=4 {
        device.add_endpoint(endpoint, if endpoint == WITH_RESERVED { &regions } else { &[] }).unwrap();
    }
    device
}

fn compare(device: &Device, model: &Model, listener: &Listener) -> Result<(), TestCaseError> {
    prop_assert_eq!(device.mappings(), model.mappings() as u64);
    for endpoint in 1..=4 {
        prop_assert_eq!(device.reach(endpoint), Some(listener.reach.get(&endpoint).copied().unwrap_or(Reach::Blocked)));
        for number in 0..IOVAS {
            for write in [false, true] {
                let access = if write { Access::WRITE } else { Access::READ };
                let found = match device.translate(endpoint, iova(number), access) {
                    Ok(Landing::Memory(translation)) => Ok(Some(translation.address.0)),
                    Ok(Landing::Doorbell) => Ok(None),
                    Err(report) => Err(report.reason),
                };
                prop_assert_eq!(found, model.translate(endpoint, iova(number), write), "endpoint {} {:#x} write {}", endpoint, iova(number), write);
            }
        }
    }
    let budget = Budget::new(Limits::default());
    prop_assert_eq!(listener.domains.keys().collect::<Vec<_>>(), model.domains.keys().collect::<Vec<_>>());
    for (id, domain) in &model.domains {
        let heard = &listener.domains[id];
        prop_assert_eq!(heard.0, domain.bypass);
        prop_assert_eq!(device.domain(*id).is_none(), domain.bypass);
        let Some(contents) = device.domain(*id) else { continue };
        // A walk of the whole and of a part; runs with any access, byte by byte.
        for span in [Span::ALL, Span { first: 3, last: iova(IOVAS - 4) }] {
            let mut collector = Collector::new(false, 9);
            contents.walk(&memory(&MEMORY), span, &budget, &mut collector).unwrap();
            let byte = |run: &stagecraft::table::Mapping| {
                let (first, address, access) = (run.iova.first, run.address, run.access);
                (first..=run.iova.last).map(move |byte| (byte, (address + (byte - first), access))).collect::<Vec<_>>()
            };
            let walked: BTreeMap<u64, (u64, Access)> = collector.mappings().iter().flat_map(byte).collect();
            let naive = |flags: u32| Access { read: flags & 1 != 0, write: flags & 2 != 0 };
            let wanted = |(byte, (_, address, flags)): (&u64, &Byte)| (*byte, (*address, naive(*flags)));
            let in_span = |(byte, (_, access)): &(u64, (u64, Access))| span.contains(*byte) && !access.is_none();
            prop_assert_eq!(&walked, &domain.bytes.iter().map(wanted).filter(in_span).collect());
            let known: BTreeMap<u64, (u64, Access)> = heard.1.iter().map(|(byte, target)| (*byte, *target)).filter(in_span).collect();
            prop_assert_eq!(walked, known);
        }
    }
    Ok(())
}

fn request() -> impl Strategy<Value = Request> {
    let place = (0..IOVAS, 0_u64..10, any::<u8>()).prop_map(|(start, length, how)| {
        // Most are aligned, few are not or are the wrong way round.
        let (first, last) = (start & !1, (start & !1) + 2 * length + 1);
        let (first, last) = if how < 20 { (start, start + length) } else { (first, last) };
        let (first, last) = if how == 255 { (last, first) } else { (first, last) };
        (iova(first.min(IOVAS - 1)), iova(last.min(IOVAS - 1)))
    });
    // Mostly what there is, now and then what there is not.
    let domain = prop_oneof![9 => 0_u32..3, 1 => 3_u32..7];
    let endpoint = prop_oneof![2 => Just(WITH_RESERVED), 6 => 1_u32..5, 1 => Just(0), 1 => Just(5)];
    let flags = prop_oneof![8 => 0_u32..4, 1 => 4_u32..9];
    let address = prop_oneof![8 => (0_u64..40).prop_map(|half| 2 * half), 1 => 0_u64..90, 1 => Just(u64::MAX - 1)];
    prop_oneof![
        3 => (domain.clone(), endpoint.clone(), prop_oneof![6 => Just(0_u32), 2 => Just(1), 1 => Just(2)])
            .prop_map(|(domain, endpoint, flags)| Request::Attach { domain, endpoint, flags }),
        1 => (domain.clone(), endpoint.clone()).prop_map(|(domain, endpoint)| Request::Detach { domain, endpoint }),
        8 => (domain.clone(), place.clone(), address, flags)
            .prop_map(|(domain, (first, last), address, flags)| Request::Map { domain, first, last, address, flags: MapFlags(flags) }),
        4 => (domain, place).prop_map(|(domain, (first, last))| Request::Unmap { domain, first, last }),
        1 => endpoint.prop_map(|endpoint| Request::Probe { endpoint }),
    ]
}

/// Attaches at first, so that domains 0 to 2 have something in them more often than not.
fn sequence() -> impl Strategy<Value = Vec<Request>> {
    prop::collection::vec(request(), 1..120).prop_map(|mut requests| {
        let first = (0..3).map(|domain| Request::Attach { domain, endpoint: domain + 1, flags: 0 });
        requests.splice(0..0, first);
        requests
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn random_requests_are_answered_as_a_naive_device_answers_them(requests in sequence()) {
        let (mut device, mut model, mut listener) = (subject(), Model::default(), Listener::default());
        for (step, request) in requests.iter().enumerate() {
            let mut effects = Vec::new();
            let status = device.handle(request, &mut effects);
            let allowed = model.request(request);
            if allowed.is_empty() {
                prop_assert_eq!(status, Status::Ok, "step {}: {:?}", step, request);
            } else {
                prop_assert!(allowed.contains(&status), "step {}: {:?} ended with {}, and not one of {:?}", step, request, status, allowed);
                prop_assert!(effects.is_empty());
            }
            effects.iter().for_each(|effect| listener.hear(effect));
            if step % 8 == 0 || step + 1 == requests.len() {
                compare(&device, &model, &listener)?;
            }
        }
    }
}

/// How often each status comes out of the sequences above: a test of the test.
#[test]
fn random_requests_have_all_kinds_of_ends() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut count: BTreeMap<Status, u64> = BTreeMap::new();
    let mut maps = 0;
    for _ in 0..50 {
        let requests = sequence().new_tree(&mut runner).unwrap().current();
        let mut device = subject();
        for request in &requests {
            let status = device.handle(request, &mut Vec::new());
            *count.entry(status).or_default() += 1;
            maps += u64::from(status == Status::Ok && matches!(request, Request::Map { .. } | Request::Unmap { .. }));
        }
    }
    for status in [Status::Ok, Status::Inval, Status::Range, Status::NoEnt, Status::Fault, Status::NoMem, Status::Unsupp] {
        assert!(count.get(&status).is_some_and(|count| *count > 3), "{status}: {count:?}");
    }
    assert!(maps > 500, "{maps}");
}
