//! LoongArch page tables for Stagecraft.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts |
//! | [`paging`] | `loongarch/paging`: the processors' tables |
//! | [`mod@unit`] | that there is no device structure to follow: a table is described by its settings |
//!
//! Sections are those of the "LoongArch Reference Manual, volume 1: Basic Architecture".

pub mod paging;
mod spec;
pub mod unit;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{paging::Paging, unit::NoUnit};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: NoUnit,
    formats: [Paging],
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Format, Settings};

    use crate::paging::{NAMES, Paging};

    #[test]
    fn the_manifest_and_the_format_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        let [format] = &manifest["formats"].as_array().unwrap()[..] else { panic!("one format") };
        assert_eq!(format["name"], Paging::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = Paging::open(&Settings::default()).unwrap();
        let mut names = Vec::new();
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(Paging::open(&one(name, default)).unwrap().geometry(), plain.geometry(), "{name}"),
                None => assert!(["root", "root-high", "input-bits"].contains(&name)),
            }
            assert!(Paging::open(&one(name, u64::MAX)).is_err(), "{name}");
            names.push(name);
        }
        assert_eq!(names, NAMES);
        assert!(Paging::open(&one("no-such-setting", 0)).is_err());
    }
}
