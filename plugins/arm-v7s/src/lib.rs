//! ARMv7 short descriptors for Stagecraft.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts |
//! | [`short`] | `arm-v7s/short`: first-level and second-level tables |
//! | `memory` | memory types: TEX, C, B and S, with and without remapping |
//! | [`mod@unit`] | that a table is described by its settings |
//!
//! Sections are those of the ARM Architecture Reference Manual, ARMv7-A and ARMv7-R edition (DDI 0406).
//!
//! Not supported: supersections beyond 32 bits. Their bits 23:20 and 8:5 are address bits 39:32; a leaf that uses them faults. The contract cannot
//! say where such an address is, because bit 18, which tells a supersection from a section, is an address bit of a table entry.

mod memory;
pub mod short;
mod spec;
pub mod unit;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{short::Short, unit::NoUnit};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: NoUnit,
    formats: [Short],
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Format, Settings};

    use crate::short::{NAMES, Short};

    #[test]
    fn the_manifest_and_the_format_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        let [format] = &manifest["formats"].as_array().unwrap()[..] else { panic!("one format") };
        assert_eq!(format["name"], Short::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = Short::open(&Settings::default()).unwrap();
        let mut names = Vec::new();
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(Short::open(&one(name, default)).unwrap(), plain, "{name}"),
                None => assert!(name.starts_with("root")),
            }
            assert!(Short::open(&one(name, u64::MAX)).is_err(), "{name}");
            names.push(name);
        }
        assert_eq!(names, NAMES);
        assert!(Short::open(&one("no-such-setting", 0)).is_err());
    }
}
