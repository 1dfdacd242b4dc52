//! Apple's device address resolution table (DART) for Stagecraft.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts of registers and entries |
//! | [`mod@unit`] | registers: which roots a stream has |
//! | [`table`] | `apple-dart/dart1` and `apple-dart/dart2`: two packings of the same tables |
//!
//! # Sources
//!
//! There is no public specification. What is known is in Linux (`io-pgtable-dart.c`, `apple-dart.c`) and other systems' drivers.

mod spec;
pub mod table;
pub mod unit;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{table::Dart1, table::Dart2, unit::AppleDart};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: AppleDart,
    formats: [Dart1, Dart2],
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Format, Settings};

    use crate::table::{Dart1, Dart2, NAMES};

    fn check<F: Format>(format: &Value) {
        assert_eq!(format["name"], F::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = F::open(&Settings::default()).unwrap();
        let mut names = Vec::new();
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(F::open(&one(name, default)).unwrap().geometry(), plain.geometry(), "{name}"),
                None => assert!(name.starts_with("root")),
            }
            assert!(F::open(&one(name, u64::MAX)).is_err(), "{name}");
            names.push(name);
        }
        assert_eq!(names, NAMES);
        assert!(F::open(&one("no-such-setting", 0)).is_err());
    }

    #[test]
    fn the_manifest_and_the_formats_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        assert_eq!(manifest["formats"].as_array().unwrap().len(), 2);
        check::<Dart1>(&manifest["formats"][0]);
        check::<Dart2>(&manifest["formats"][1]);
    }
}
