//! Requests as bytes: layout, what is too short, what is reserved, and anything at all.

use proptest::prelude::*;
use stagecraft::Span;
use stagecraft::memory::Kind;
use stagecraft::virtio_iommu::{Config, DecodeError, Device, Effect, Features, MapFlags, Request, RequestLimits, Reserved, ReservedKind};

use crate::{device, memory};

fn usual() -> Device {
    let mut device = device(Config { probe_size: 64, ..Config::default() }, memory(&[(Kind::Ram, 0, 0xff_ffff)]), RequestLimits::default());
    device.add_endpoint(1, &[Reserved { kind: ReservedKind::Msi, span: Span { first: 0xfee0_0000, last: 0xfeef_ffff } }]).unwrap();
    device
}

/// Serves one request into a buffer of 0xaa: the bytes used, and the buffer.
fn serve(device: &mut Device, readable: &[u8], size: usize) -> (usize, Vec<u8>) {
    let mut writable = vec![0xaa; size];
    let used = device.serve(readable, &mut writable, &mut Vec::new());
    (used, writable)
}

fn parts(fields: &[&[u8]]) -> Vec<u8> {
    fields.concat()
}

#[test]
fn each_request_is_laid_out_as_the_specification_says() {
    let (d, e) = (7_u32.to_le_bytes(), 0x38_u32.to_le_bytes());
    let (first, last, address) = (0x1000_u64.to_le_bytes(), 0x1_0000_0fff_u64.to_le_bytes(), 0x8000_0000_0000_u64.to_le_bytes());
    for (bytes, request) in [
        (parts(&[&[1, 0, 0, 0], &d, &e, &[1, 0, 0, 0], &[0; 4]]), Request::Attach { domain: 7, endpoint: 0x38, flags: 1 }),
        (parts(&[&[2, 0, 0, 0], &d, &e, &[0; 8]]), Request::Detach { domain: 7, endpoint: 0x38 }),
        (
            parts(&[&[3, 0, 0, 0], &d, &first, &last, &address, &[7, 0, 0, 0]]),
            Request::Map { domain: 7, first: 0x1000, last: 0x1_0000_0fff, address: 0x8000_0000_0000, flags: MapFlags(7) },
        ),
        (parts(&[&[4, 0, 0, 0], &d, &first, &last, &[0; 4]]), Request::Unmap { domain: 7, first: 0x1000, last: 0x1_0000_0fff }),
        (parts(&[&[5, 0, 0, 0], &e, &[0; 64]]), Request::Probe { endpoint: 0x38 }),
    ] {
        assert_eq!(request.encode(), bytes, "{request:?}");
        assert_eq!(Request::decode(&bytes), Ok(request));
        // What is reserved in the head is not looked at, and neither is what comes behind.
        let mut other = bytes.clone();
        other[1..4].fill(0xff);
        other.extend([0xff; 9]);
        assert_eq!(Request::decode(&other), Ok(request));
        for length in 1..bytes.len() {
            assert_eq!(Request::decode(&bytes[..length]), Err(DecodeError::Short { needed: bytes.len(), found: length }));
        }
    }
    assert_eq!(Request::decode(&[]), Err(DecodeError::Short { needed: 4, found: 0 }));
    for code in [0_u8, 6, 0x80, 255] {
        assert_eq!(Request::decode(&[code; 80]), Err(DecodeError::Unknown(code)));
    }
}

#[test]
fn the_configuration_space_is_laid_out_as_the_specification_says() {
    let domains = stagecraft::virtio_iommu::DomainRange { first: 0x1112_1314, last: 0x2122_2324 };
    let input_range = Span { first: 0x0102_0304_0506_0708, last: 0x1112_1314_1516_1718 };
    let config = Config { page_size_mask: !0xfff, input_range, domain_range: domains, probe_size: 0x200, bypass: true };
    let mut expected = Vec::new();
    [!0xfff_u64, 0x0102_0304_0506_0708, 0x1112_1314_1516_1718].iter().for_each(|word| expected.extend(word.to_le_bytes()));
    [0x1112_1314_u32, 0x2122_2324, 0x200].iter().for_each(|half| expected.extend(half.to_le_bytes()));
    expected.extend([1, 0, 0, 0]);
    assert_eq!(config.to_bytes()[..], expected);
}

#[test]
fn which_reserved_fields_matter() {
    let mut device = usual();
    let mut attach = Request::Attach { domain: 1, endpoint: 1, flags: 0 }.encode();
    attach[19] = 1;
    assert_eq!(serve(&mut device, &attach, 4), (4, vec![4, 0, 0, 0]), "INVAL, and the tail's reserved bytes are zero");
    attach[19] = 0;
    assert_eq!(serve(&mut device, &attach, 4), (4, vec![0; 4]));
    let map = Request::Map { domain: 1, first: 0, last: 0xfff, address: 0, flags: MapFlags(1) }.encode();
    assert_eq!(serve(&mut device, &map, 4), (4, vec![0; 4]));
    let mut unmap = Request::Unmap { domain: 1, first: 0, last: 0xfff }.encode();
    unmap[24] = 1;
    assert_eq!(serve(&mut device, &unmap, 4), (4, vec![4, 0, 0, 0]));
    assert_eq!(device.mappings(), 1, "refused and not done");
    let mut detach = Request::Detach { domain: 1, endpoint: 1 }.encode();
    detach[12..].fill(0xff);
    assert_eq!(serve(&mut device, &detach, 4), (4, vec![0; 4]), "ignored");
    let mut probe = Request::Probe { endpoint: 1 }.encode();
    probe[8..].fill(0xff);
    assert_eq!(serve(&mut device, &probe, 68).1[64..], [0; 4], "ignored");
}

#[test]
fn what_is_not_known_or_has_no_tail_is_not_written() {
    let mut device = usual();
    let attach = Request::Attach { domain: 1, endpoint: 1, flags: 0 }.encode();
    assert_eq!(serve(&mut device, &[9; 80], 8), (0, vec![0xaa; 8]), "an unknown type");
    assert_eq!(serve(&mut device, &attach, 3), (0, vec![0xaa; 3]), "no room for the tail");
    assert_eq!(device.reach(1), Some(stagecraft::virtio_iommu::Reach::Blocked), "and not done");
    assert_eq!(serve(&mut device, &attach[..19], 4), (4, vec![1, 0, 0, 0]), "too short, and there is a tail: IOERR");
    assert_eq!(serve(&mut device, &[], 4), (4, vec![1, 0, 0, 0]));
    assert_eq!(serve(&mut device, &attach, 9), (4, vec![0, 0, 0, 0, 0xaa, 0xaa, 0xaa, 0xaa, 0xaa]), "the tail is the first that can be written");
    let none = Features::ALL.without(Features::PROBE);
    let mut old = Device::new(none, Config::default(), memory(&[]), RequestLimits::default()).unwrap();
    assert_eq!(serve(&mut old, &Request::Probe { endpoint: 1 }.encode(), 600), (0, vec![0xaa; 600]), "PROBE without the feature");
}

#[test]
fn probe_tells_the_reserved_regions() {
    let mut device = usual();
    let probe = Request::Probe { endpoint: 1 }.encode();
    let (used, bytes) = serve(&mut device, &probe, 68);
    let mut expected = vec![1, 0, 20, 0, 1, 0, 0, 0];
    expected.extend(0xfee0_0000_u64.to_le_bytes());
    expected.extend(0xfeef_ffff_u64.to_le_bytes());
    expected.resize(68, 0);
    assert_eq!((used, bytes), (68, expected), "one property, zeroes, and the tail behind them");
    let (used, bytes) = serve(&mut device, &Request::Probe { endpoint: 2 }.encode(), 68);
    assert_eq!((used, &bytes[..64], &bytes[64..]), (68, &[0; 64][..], &[6, 0, 0, 0][..]), "NOENT");
    let (used, bytes) = serve(&mut device, &probe, 60);
    assert_eq!((used, &bytes[..56], &bytes[56..]), (60, &[0; 56][..], &[4, 0, 0, 0][..]), "less room than probe_size: INVAL and no property");
}

/// A request whose numbers are near those that mean something.
fn likely() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![0_u64..3, Just(0x1000), Just(0x1fff), Just(0x2000), Just(0xfff), Just(u64::MAX), any::<u64>()];
    (0_u8..7, prop::collection::vec(number, 6), prop::collection::vec((0_usize..80, any::<u8>()), 0..3), 0_usize..80).prop_map(
        |(code, words, flips, cut)| {
            let domain = words[0] as u32;
            let request = match code {
                0 | 1 => Request::Attach { domain, endpoint: words[1] as u32, flags: words[2] as u32 & 1 },
                2 => Request::Detach { domain, endpoint: words[1] as u32 },
                3 | 6 => Request::Map { domain, first: words[1], last: words[2], address: words[3], flags: MapFlags(words[4] as u32 & 7) },
                4 => Request::Unmap { domain, first: words[1], last: words[2] },
                _ => Request::Probe { endpoint: domain },
            };
            let mut bytes = request.encode();
            for (at, value) in flips {
                if at >= 40
                    && let Some(byte) = bytes.get_mut(at - 40)
                {
                    *byte = value;
                }
            }
            if cut < 8 {
                bytes.truncate(cut * 5);
            }
            bytes
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Whatever a guest sends: no panic, nothing written where nothing is to be, and a request that did not end well changed nothing.
    #[test]
    fn anything_at_all(requests in prop::collection::vec((prop_oneof![likely(), prop::collection::vec(any::<u8>(), 0..90)], 0_usize..90), 1..60)) {
        let mut device = usual();
        device.add_endpoint(2, &[]).unwrap();
        for (readable, size) in requests {
            let before = device.clone();
            let mut writable = vec![0xaa; size];
            let mut effects: Vec<Effect> = Vec::new();
            let used = device.serve(&readable, &mut writable, &mut effects);
            prop_assert!(used <= size && (used == 0 || used >= 4));
            prop_assert!(writable[used..].iter().all(|byte| *byte == 0xaa));
            let status = used.checked_sub(4).map(|tail| writable[tail]);
            prop_assert!(status.is_none_or(|status| status <= 8));
            if used > 0 {
                prop_assert_eq!(&writable[used - 3..used], &[0, 0, 0]);
            }
            if status != Some(0) {
                prop_assert!(effects.is_empty());
                prop_assert_eq!(format!("{before:?}"), format!("{device:?}"));
            }
        }
    }
}
