//! RISC-V IOMMU for Stagecraft: which tables a device uses, and what their entries mean.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts, with the sections of the specifications |
//! | [`mod@unit`] | registers, device and process directories, device and process contexts |
//! | `queue` | commands and fault records |
//! | `kernel` | real units, and how a kernel would be told about a table |
//! | `entries` | what the entries of both stages have in common |
//! | [`first_stage`] | `riscv-iommu/first-stage`: Sv32, Sv39, Sv48, Sv57 |
//! | [`second_stage`] | `riscv-iommu/second-stage`: Sv32x4, Sv39x4, Sv48x4, Sv57x4 |
//!
//! # MSI page tables
//!
//! With `msiptp.MODE` Flat, hardware compares the page number of what the first stage answered with a pattern, and sends accesses to such pages
//! through an MSI page table instead of the second stage. That table is indexed by arbitrary bits of the page number and has entries of 16 bytes that
//! may stand for interrupt files in memory: it is no part of this contract's tables. Such addresses are reported as intercepted: IOVAs where there is no first
//! stage, its outputs where there is one. Reads of tables and directories behind the second stage are not intercepted.

mod entries;
pub mod first_stage;
mod kernel;
mod queue;
pub mod second_stage;
mod spec;
pub mod unit;

use stagecraft_sdk::Settings;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{first_stage::FirstStage, second_stage::SecondStage, unit::RiscvIommu};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: RiscvIommu,
    formats: [FirstStage, SecondStage],
}

/// `settings` in the order of `names`, in which people read them.
fn in_manifest_order(settings: &Settings, names: &[&str]) -> Settings {
    names.iter().filter_map(|&name| Some((name.to_owned(), settings.get(name)?))).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Error, Format, Settings};

    use crate::{first_stage::FirstStage, second_stage::SecondStage};

    /// The manifest lists the format's settings in their order; at its default a setting is the same as left out, and nonsense is refused.
    fn check<F: Format>(format: &Value) {
        assert_eq!(format["name"], F::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = F::open(&Settings::default()).unwrap();
        let Err(Error::Invalid(invalid)) = F::open(&one("no-such-setting", 0)).map(drop) else { panic!() };
        let listed: Vec<_> = format["settings"].as_array().unwrap().iter().map(|setting| setting["name"].as_str().unwrap()).collect();
        assert!(invalid.reason.ends_with(&listed.join(", ")), "{} {listed:?}", invalid.reason);
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(F::open(&one(name, default)).unwrap().geometry(), plain.geometry(), "{name}"),
                None => assert!(name.ends_with("root")),
            }
            assert!(F::open(&one(name, u64::MAX)).is_err(), "{name}");
        }
    }

    #[test]
    fn the_manifest_and_the_formats_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(manifest["formats"].as_array().unwrap().len(), 2);
        check::<FirstStage>(&manifest["formats"][0]);
        check::<SecondStage>(&manifest["formats"][1]);
        let registers = manifest["registers"].as_array().unwrap();
        for name in ["CAPABILITIES", "FCTL", "DDTP"] {
            assert!(registers.iter().any(|register| register == name));
        }
    }
}
