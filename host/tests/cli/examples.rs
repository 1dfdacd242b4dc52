//! The example of a VMM with a passed-through device runs to its end: it checks itself.

use crate::support::fixtures;

#[allow(dead_code)]
#[path = "../../examples/passed_through_device.rs"]
mod passed_through_device;

#[test]
fn a_passed_through_device_reaches_what_its_guest_maps() {
    passed_through_device::run(&fixtures().join("arm64-s1-4k"), 0x38).unwrap();
}
