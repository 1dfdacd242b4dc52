//! PCI functions of IBM Z (zPCI) for Stagecraft: which tables a function uses, and what their entries mean.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts of the anchor and of the entries |
//! | [`mod@unit`] | registration: anchor, and the bounds of the input addresses |
//! | `queue` | refreshes |
//! | [`dma`] | `s390-zpci/dma`: region, segment and page tables |
//!
//! # Sources
//!
//! The specification of zPCI is not public. Its tables are those of dynamic address translation, which the Principles of Operation (SA22-7832) describe
//! in chapter 3, with differences that Linux (`asm/pci_dma.h`) and QEMU (`s390-pci-bus.c`) show. Where the two disagree with the processor's rules, or
//! leave a question open, this plugin does what QEMU's model does, as the guests at hand run on it, but for one thing: the model refuses every entry
//! without any address bit, so that nothing can be mapped to absolute page 0, and here address bits play no part in judging an entry.
//!
//! Storage keys are not looked at.

pub mod dma;
mod queue;
mod spec;
pub mod unit;

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{dma::Dma, unit::S390Zpci};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: S390Zpci,
    formats: [Dma],
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::Value;
    use stagecraft_sdk::{Format, Settings};

    use crate::dma::Dma;

    #[test]
    fn the_manifest_and_the_format_agree() {
        let manifest: Value = serde_json::from_str(include_str!("../manifest.json")).unwrap();
        assert_eq!(manifest["version"], env!("CARGO_PKG_VERSION"));
        let [format] = &manifest["formats"].as_array().unwrap()[..] else { panic!("one format") };
        assert_eq!(format["name"], Dma::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = Dma::open(&Settings::default()).unwrap();
        for setting in format["settings"].as_array().unwrap() {
            let name = setting["name"].as_str().unwrap();
            assert!(!setting["description"].as_str().unwrap().is_empty() && setting["allowed"].is_string());
            match setting["default"].as_u64() {
                Some(default) => assert_eq!(Dma::open(&one(name, default)).unwrap().geometry(), plain.geometry(), "{name}"),
                None => assert!(["root", "last-iova"].contains(&name)),
            }
            assert_eq!(Dma::open(&one(name, u64::MAX)).is_err(), name != "last-iova", "{name}");
            assert!(Dma::open(&one(name, u64::MAX - 1)).is_err(), "{name}");
        }
        assert_eq!(format["settings"].as_array().unwrap().len(), crate::dma::NAMES.len());
        assert!(Dma::open(&one("no-such-setting", 0)).is_err());
        assert_eq!(manifest["registers"], serde_json::json!(["IOTA_*", "BASE_*", "LIMIT_*"]));
    }
}
