//! Intel VT-d for Stagecraft: which tables a device uses, and what their entries mean.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts, with the sections of the specification (D51397-018, revision 5.10) |
//! | [`mod@unit`] | registers, root, context and PASID structures; what a real unit accepts; how the kernel is told |
//! | `queue` | invalidation descriptors and fault records |
//! | [`first_stage`] | `intel-vtd/first-stage`: x86-64 tables |
//! | [`second_stage`] | `intel-vtd/second-stage`: the tables of legacy mode, and of scalable mode below the first stage or alone |
//!
//! # Host address width
//!
//! Address bits from HAW upwards are reserved in every structure, but no register holds HAW: firmware reports it in its DMAR table. The
//! specification only promises that MGAW, which is in a register, is not smaller (section 11.4.2). So HAW is taken to be MGAW, but
//! [`DEFAULT_OUTPUT_BITS`] at least: emulated units are given small guest widths on machines that have device memory above them, and what lies beyond
//! RAM is then for the memory map to judge. `output-bits` overrides it where the truth is known.

pub mod first_stage;
mod queue;
mod review;
pub mod second_stage;
mod spec;
pub mod unit;

use stagecraft_sdk::Settings;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{first_stage::FirstStage, second_stage::SecondStage, unit::IntelVtd};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: IntelVtd,
    formats: [FirstStage, SecondStage],
}

/// Host address width if nothing else is known; see the crate's documentation.
pub const DEFAULT_OUTPUT_BITS: u64 = 48;

/// Interrupts, section 3.15: requests without PASID to these addresses are never translated, whatever the tables say. Those with PASID are.
pub(crate) const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// How many bits it takes to say `address`, as far as entries can.
fn output_bits_for(address: u64) -> u64 {
    u64::from(64 - address.leading_zeros()).clamp(12, 52)
}

/// `settings` in the order of `names`, in which people read them.
fn in_manifest_order(settings: &Settings, names: &[&str]) -> Settings {
    names.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Format, Settings};

    use crate::{first_stage::FirstStage, second_stage::SecondStage};

    /// Every setting of the manifest is known to the format, at its default the format is the same as without it, and one step outside what is
    /// allowed is refused.
    fn check<F: Format>(format: &Value) {
        assert_eq!(format["name"], F::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = F::open(&Settings::default()).unwrap();
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(F::open(&one(name, default)).unwrap().geometry(), plain.geometry(), "{name}"),
                None => assert_eq!(name, "root"),
            }
            assert!(F::open(&one(name, u64::MAX)).is_err(), "{name}");
        }
        assert!(F::open(&one("no-such-setting", 0)).is_err());
    }

    #[test]
    fn the_manifest_and_the_formats_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(manifest["formats"].as_array().unwrap().len(), 2);
        check::<FirstStage>(&manifest["formats"][0]);
        check::<SecondStage>(&manifest["formats"][1]);
        let registers = manifest["registers"].as_array().unwrap();
        for name in ["CAP", "ECAP", "GSTS", "RTADDR"] {
            assert!(registers.iter().any(|register| register == name));
        }
    }
}
