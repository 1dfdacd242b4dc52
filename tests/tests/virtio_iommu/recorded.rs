//! A real driver's requests: Linux 6.12's virtio-iommu driver (Debian's kernel, amd64) with an NVMe disk, a virtio disk and a network card behind QEMU 10.0.2's
//! device, recorded with `-trace virtio_iommu_*`. QEMU says what was asked, which mappings an UNMAP removed, and where each DMA went.
//!
//! The network card moves to the identity domain on the way (`echo identity > /sys/bus/pci/.../iommu_group/type`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use stagecraft::guest::Guest;
use stagecraft::memory::{Kind, MemoryMap};
use stagecraft::plugin::{Config as PluginConfig, Engine, Plugins};
use stagecraft::snapshot::{self, Domains, Snapshot};
use stagecraft::virtio_iommu::{
    Config, Device, Domain, DomainRange, Effect, Features, Landing, MapFlags, Reach, Request, RequestLimits, Reserved, ReservedKind, Status,
    attach_flags,
};
use stagecraft::{Access, Change, Span};

use crate::memory;

/// One line: the event, and `name=value` or bare words.
struct Line<'a> {
    event: &'a str,
    text: &'a str,
}

impl Line<'_> {
    /// The number after `name=`.
    fn number(&self, name: &str) -> u64 {
        let at = self.text.find(&format!("{name}=")).unwrap_or_else(|| panic!("{name} in {}", self.text)) + name.len() + 1;
        let word = self.text[at..].split([' ', ',']).find(|word| !word.is_empty()).unwrap();
        word.strip_prefix("0x").map_or_else(|| word.parse().unwrap(), |hex| u64::from_str_radix(hex, 16).unwrap())
    }

    fn id(&self, name: &str) -> u32 {
        u32::try_from(self.number(name)).unwrap()
    }
}

fn lines(text: &str) -> Vec<Line<'_>> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(event, text)| Line { event: event.trim_start_matches("virtio_iommu_"), text })
        .collect()
}

fn guest_memory() -> std::sync::Arc<MemoryMap> {
    memory(&[(Kind::Ram, 0, 0xfff_ffff)])
}

/// The device as QEMU made it: features and configuration from the trace.
fn device_of(lines: &[Line<'_>]) -> Device {
    let features = lines.iter().find(|line| line.event == "get_features").unwrap().number("features");
    let line = lines.iter().find(|line| line.event == "get_config").unwrap();
    let config = Config {
        page_size_mask: line.number("page_size_mask"),
        input_range: Span { first: line.number("input range start"), last: line.number("input range end") },
        domain_range: DomainRange { first: line.id("domain range start"), last: line.id("domain range end") },
        probe_size: line.id("probe_size"),
        bypass: line.number("bypass") == 1,
    };
    // Only the device's own bits: the others are the transport's.
    let features = Features(features & 0x7f);
    let mut device = Device::new(features, config, guest_memory(), RequestLimits::default()).unwrap();
    device.accept(features, &mut Vec::new()).unwrap();
    for line in lines.iter().filter(|line| line.event == "fill_resv_property") {
        let kind = if line.number("type") == 1 { ReservedKind::Msi } else { ReservedKind::Reserved };
        let span = Span { first: line.number("start"), last: line.number("end") };
        device.add_endpoint(line.id("dev"), &[Reserved { kind, span }]).unwrap();
    }
    device
}

#[derive(Default)]
struct Counts {
    attached: u64,
    mapped: u64,
    removed: u64,
    translated: u64,
    doorbells: u64,
}

/// Everything that QEMU did, in its order, done again.
fn replay(lines: &[Line<'_>], device: &mut Device) -> Counts {
    let mut counts = Counts::default();
    let request = |device: &mut Device, request: Request| {
        // As bytes, so that these are judged as well.
        let (mut tail, mut effects) = ([0xff; 4], Vec::new());
        let used = device.serve(&request.encode(), &mut tail, &mut effects);
        assert_eq!((used, tail[0]), (4, Status::Ok as u8), "{request:?}");
        effects
    };
    for (at, line) in lines.iter().enumerate() {
        match line.event {
            "attach" => {
                let (domain, endpoint) = (line.id("domain"), line.id("endpoint"));
                // The flags are not in the trace; what the endpoint's address space becomes is.
                let device_name = format!("Device {:02x}:{:02x}.{:x} ", endpoint >> 8, endpoint >> 3 & 0x1f, endpoint & 7);
                let switched = lines[at..].iter().find(|line| line.event == "switch_address_space" && line.text.starts_with(&device_name));
                let bypass = switched.is_some_and(|line| line.text.contains("enabled=0"));
                let flags = if bypass { attach_flags::BYPASS } else { 0 };
                let effects = request(device, Request::Attach { domain, endpoint, flags });
                let expected = if bypass { Reach::Bypass } else { Reach::Domain(domain) };
                assert_eq!(device.reach(endpoint), Some(expected));
                // QEMU detaches before it attaches, and says so right behind this line.
                let left = lines.get(at + 1).filter(|line| line.event == "detach_endpoint_from_domain").map(|line| line.id("domain"));
                let destroyed = effects.iter().find_map(|effect| if let Effect::Destroyed { domain } = effect { Some(*domain) } else { None });
                assert_eq!(destroyed, left);
                counts.attached += 1;
            }
            "map" => {
                let (domain, first, last) = (line.id("domain"), line.number("virt_start"), line.number("virt_end"));
                let (address, flags) = (line.number("phys_start"), MapFlags(line.id("flags")));
                let effects = request(device, Request::Map { domain, first, last, address, flags });
                assert!(matches!(effects[..], [Effect::Changed { change: Change::Map(piece), .. }] if piece.iova == Span { first, last }));
                counts.mapped += 1;
            }
            "unmap" => {
                let (domain, first, last) = (line.id("domain"), line.number("virt_start"), line.number("virt_end"));
                let effects = request(device, Request::Unmap { domain, first, last });
                let spans = effects.iter().map(|effect| match effect {
                    Effect::Changed { change: Change::Unmap(span), .. } => *span,
                    other => panic!("{other:?}"),
                });
                let done = lines[at + 1..].iter().filter(|line| !line.event.starts_with("translate")).take_while(|line| line.event == "unmap_done");
                let mut done: Vec<Span> = done.map(|line| Span { first: line.number("virt_start"), last: line.number("virt_end") }).collect();
                // QEMU takes them from the top of a balanced tree.
                done.sort_unstable();
                assert!(spans.eq(done.iter().copied()), "{}: QEMU removed {done:?}, we {effects:?}", line.text);
                counts.removed += done.len() as u64;
            }
            "translate" => translate(device, line, lines.get(at + 1), &mut counts),
            _ => {}
        }
    }
    counts
}

/// A DMA, and what QEMU said about it in the next line, if anything.
fn translate(device: &Device, line: &Line<'_>, next: Option<&Line<'_>>, counts: &mut Counts) {
    let (endpoint, address) = (line.id("rid"), line.number("addr"));
    let access = match line.number("flag") {
        1 => Access::READ,
        2 => Access::WRITE,
        _ => return,
    };
    let found = device.translate(endpoint, address, access);
    match next.filter(|next| next.event == "translate_out") {
        Some(next) => {
            let mut words = next.text.split(' ');
            let mut hex = |skip: usize| u64::from_str_radix(words.nth(skip).unwrap().strip_prefix("0x").unwrap(), 16).unwrap();
            let (from, to) = (hex(0), hex(1));
            assert_eq!(from, address);
            assert!(matches!(found, Ok(Landing::Memory(translation)) if translation.address.0 == to), "{}: to {to:#x}, and {found:?}", line.text);
            counts.translated += 1;
        }
        // QEMU says nothing about doorbells, which it lets through as they are.
        None => {
            assert_eq!(found, Ok(Landing::Doorbell), "{}", line.text);
            counts.doorbells += 1;
        }
    }
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/virtio-iommu")
}

fn trace() -> String {
    std::fs::read_to_string(fixture().join("qemu-trace.txt")).unwrap()
}

#[test]
fn a_real_drivers_requests_do_what_they_did_in_qemu() {
    let text = trace();
    let lines = lines(&text);
    let mut device = device_of(&lines);
    let counts = replay(&lines, &mut device);
    let count = |event: &str| lines.iter().filter(|line| line.event == event).count() as u64;
    assert_eq!((counts.attached, counts.mapped), (count("attach"), count("map")));
    assert_eq!((counts.removed, counts.translated), (count("unmap_done"), count("translate_out")));
    assert!(counts.mapped > 500 && counts.translated > 1000 && counts.doorbells > 10, "the recording has them");
    assert_eq!(device.mappings(), counts.mapped - counts.removed - detached(&lines));
    println!("{} maps, {} unmapped, {} DMAs where they went, {} interrupts", counts.mapped, counts.removed, counts.translated, counts.doorbells);
}

/// Mappings that ended with their domain, counted from the trace alone.
fn detached(lines: &[Line<'_>]) -> u64 {
    let (mut live, mut ended): (BTreeMap<u32, u64>, u64) = (BTreeMap::new(), 0);
    for line in lines {
        match line.event {
            "map" => *live.entry(line.id("domain")).or_default() += 1,
            "unmap_done" => *live.get_mut(&line.id("domain")).unwrap() -= 1,
            "put_domain" => ended += live.remove(&line.text.rsplit_once('=').unwrap().1.parse().unwrap()).unwrap_or(0),
            _ => {}
        }
    }
    ended
}

/// The first line after the moment when most was mapped.
fn most_mapped(lines: &[Line<'_>]) -> usize {
    let (mut live, mut most, mut moment) = (0_i64, 0, 0);
    for (at, line) in lines.iter().enumerate() {
        live += i64::from(line.event == "map") - i64::from(line.event == "unmap_done");
        if live > most {
            (most, moment) = (live, at + 1);
        }
    }
    moment
}

/// The same guest as a snapshot, written and read: every device reaches what it reached, and so it does after conversion.
#[test]
fn a_real_guest_becomes_a_snapshot() {
    let text = trace();
    let all = lines(&text);
    let lines = &all[..most_mapped(&all)];
    let mut device = device_of(&all);
    replay(lines, &mut device);
    assert!(device.mappings() > 10, "{}", device.mappings());
    let devices: Vec<snapshot::Device> =
        [0, 0x18, 0x20, 0x28].map(|id| snapshot::Device { label: format!("0000:00:{:02x}.0", id >> 3), id }).to_vec();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("guest");
    let domains = Domains::of_device(&device);
    snapshot::store_domains(
        &path,
        false,
        "amd64 guest with a virtio-iommu: NVMe disk (0x18), virtio disk (0x20), network card (0x28)",
        &guest_memory(),
        &devices,
        &domains,
    )
    .unwrap();
    // The same is in the repository, for people to look at; BLESS=1 writes it.
    let known = fixture().join("snapshot.json");
    let written = std::fs::read_to_string(path.join("snapshot.json")).unwrap();
    if std::env::var_os("BLESS").is_some() {
        std::fs::write(&known, &written).unwrap();
    }
    assert_eq!(std::fs::read_to_string(&known).unwrap(), written);
    let snapshot = Snapshot::load(&path).unwrap();
    assert_eq!(snapshot.source, snapshot::Source::Domains(domains));
    let plugins = Plugins::builtin(&Engine::new(PluginConfig::default()).unwrap()).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let mut compared = 0;
    for stream in guest.streams().unwrap() {
        let reach = device.reach(u32::try_from(stream.id).unwrap());
        match (&stream.state, reach) {
            (stagecraft::guest::State::Translated(configs), Some(Reach::Domain(id))) => {
                let mut space = guest.open(configs).unwrap();
                for piece in device.domain(id).into_iter().flat_map(Domain::iter) {
                    let access = piece.attributes.access(false);
                    for wanted in [Access::READ, Access::WRITE] {
                        let found = guest.translate(&mut space, stagecraft::Iova(piece.iova.last), wanted).unwrap();
                        let address = found.ok().map(|found| found.address.0);
                        let expected = access.allows(wanted).then_some(piece.address + piece.iova.length_minus_one());
                        assert_eq!(address, expected);
                        compared += 1;
                    }
                }
            }
            (stagecraft::guest::State::Bypass, Some(Reach::Bypass)) => {}
            other => panic!("{:#x}: {other:?}", stream.id),
        }
    }
    assert!(compared > 20, "{compared}");
}
