//! The examples run to their ends: they check themselves, and say what happened.

use crate::support::fixtures;

#[allow(dead_code)]
#[path = "../../examples/emulated_device.rs"]
mod emulated_device;
#[allow(dead_code)]
#[path = "../../examples/passed_through_device.rs"]
mod passed_through_device;

/// What an example writes: these lines, in which a `*` stands for what is not known beforehand.
fn expect(written: &[u8], lines: &[&str]) {
    let text = str::from_utf8(written).unwrap();
    assert_eq!(text.lines().count(), lines.len(), "{text}");
    for (line, wanted) in text.lines().zip(lines) {
        let mut rest = line;
        for (index, part) in wanted.split('*').enumerate() {
            let found = rest.find(part).filter(|at| index > 0 || *at == 0);
            rest = &rest[found.unwrap_or_else(|| panic!("wanted {wanted}\nfound {line}")) + part.len()..];
        }
        assert!(
            rest.is_empty() || wanted.ends_with('*') || rest.ends_with(wanted.rsplit('*').next().unwrap_or_default()),
            "wanted {wanted}\nfound {line}"
        );
    }
}

#[test]
fn a_passed_through_device_reaches_what_its_guest_maps() {
    let mut out = Vec::new();
    passed_through_device::run(&fixtures().join("arm64-s1-4k"), 0x38, &mut out).unwrap();
    expect(
        &out,
        &[
            "device 0000:03:00.0: converted, nested: intel-vtd/first-stage levels=*",
            "  not bound as it is: *arm-smmuv3/stage1*intel-vtd/first-stage",
            "DMA to * buffers arrived in guest memory",
            // F_TRANSLATION of StreamID 0x38.
            "DMA to 0x* is blocked after the guest unmapped it; its event queue gets [10, 00, 00, 00, 38, 00, 00, 00, *",
            "and arrives again after it was mapped, unannounced",
        ],
    );
}

#[test]
fn an_emulated_device_reaches_what_its_guest_maps() {
    let mut out = Vec::new();
    emulated_device::run(&fixtures().join("arm64-s1-4k"), 0x38, &mut out).unwrap();
    // 32 rounds of eight buffers; every page is walked for once, the ring's included.
    expect(
        &out,
        &[
            "* 0x38: ring at IOVA 0x*, 8 buffers",
            "256 requests served, 9 walks of the guest's tables",
            "after the guest unmapped 0x*: *",
            "and 0x* still works",
        ],
    );
}
