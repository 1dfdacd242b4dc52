//! AMD-Vi for Stagecraft: which tables a device uses, and what their entries mean.
//!
//! | module | what it knows |
//! |---|---|
//! | `spec` | bit layouts, with the sections of the specification (publication 48882, revision 3.10) |
//! | [`mod@unit`] | registers, device table and guest CR3 tables |
//! | [`kernel`] | what a real unit accepts; how the kernel is told |
//! | `queue` | commands and event log entries |
//! | [`v1`] | `amd-vi/v1`: host tables, the units' own format |
//! | [`v2`] | `amd-vi/v2`: guest tables, the processors' format |
//!
//! # Physical addresses
//!
//! Both formats have 52 bits of address. What the unit really has is in its PCI capability, not in its registers, so addresses are taken as wide
//! as entries can say, and what lies beyond RAM is for the memory map to judge; `output-bits` overrides it.
//!
//! With memory encryption one of those bits (the C-bit, usually 47 or 51) selects an encryption key and is no address. A guest that sets it in its tables
//! has encrypted memory, which its host cannot read anyway: the bit is not known here, and an address that has it faults, being outside the memory map.
//!
//! # Capabilities
//!
//! What `EXT_FEATURES` does not show is no reason to refuse a device table entry that uses it: firmware can replace the register's contents for software
//! (the IVHD's copy of it), so that a driver rightly uses what the register does not show: Linux sets GIoV so on units without GIOSup. More levels of host
//! tables, guest tables or guest CR3 tables than it shows are noted as warnings; GIoV without GIOSup is not, because real guests have that. It counts only where it changes what entries mean: `NXSup` and "no host
//! tables".
//!
//! # Addresses that are not translated
//!
//! Requests without PASID to 0xfee0_0000..=0xfeef_ffff are interrupts (section 2.2.5): [`mod@unit`] intercepts them, and tables that are made have nothing there.
//! Requests with PASID are taken to be translated there, as on other x86 units: interrupts have none.
//!
//! Left to the tables is the HyperTransport range, 0xfd_0000_0000..=0xff_ffff_ffff, although for requests without PASID it has special addresses (section 2.1.2,
//! the table of special address controls):
//!
//! * Not all of it is refused. 0xfd_f920_0000..=0xfd_faff_ffff is reserved and left to the page tables; system management (from 0xfd_f910_0000) and port I/O
//!   (from 0xfd_fc00_0000) are what SysMgt and IoCtl of the device table entry say, which have a value for "translated".
//! * Units of today may have HTRangeIgnore, and then all of it is as any other address. It is in a register (`EXT_FEATURES2`) that snapshots need not have, so
//!   that whoever finds a mapping there cannot tell a driver that knows its unit from one that does not.
//!
//! A guest's driver maps nothing there unless its unit lets it: Linux reserves all of the range (`IOMMU_RESV_RESERVED`), but for units with HTRangeIgnore. The kernel
//! of a host leaves it out of the ranges of IOVAs that it offers, by which live tables are cut. To refuse what a guest has mapped there would therefore
//! break guests on units with HTRangeIgnore, and stop nothing on others.

pub mod kernel;
mod queue;
mod spec;
pub mod unit;
pub mod v1;
pub mod v2;

use stagecraft_sdk::{Error, Settings};

#[allow(unused_imports)] // the macro uses these on wasm32 only
use crate::{unit::AmdVi, v1::V1, v2::V2};

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: AmdVi,
    formats: [V1, V2],
}

/// Address bits of entries, and the default of `output-bits`.
pub const ADDRESS_BITS: u64 = 52;

/// Interrupts: requests without PASID to these addresses are never translated, whatever the tables say.
pub(crate) const INTERRUPTS: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// `inherited`: the device table entry or a table above forbids reads.
const NO_READ: u64 = 1;
/// `inherited`: the device table entry or a table above forbids writes.
const NO_WRITE: u64 = 2;

/// Settings `read` and `write`, as `inherited` of the root.
fn root_permissions(settings: &Settings) -> Result<u64, Error> {
    let forbidden = |name, bit| Ok(if settings.flag(name, true)? { 0 } else { bit });
    Ok(forbidden("read", NO_READ)? | forbidden("write", NO_WRITE)?)
}

/// Setting `root`.
fn root_address(settings: &Settings, section: &'static str) -> Result<u64, Error> {
    let root = settings.or("root", 0);
    if root & 0xfff != 0 || root >> ADDRESS_BITS != 0 {
        return Err(Error::invalid("root", root, section, "the root table must be aligned to 4096 bytes and below 2^52"));
    }
    Ok(root)
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

    use crate::{v1::V1, v2::V2};

    /// Every setting of the manifest is known to the format, at its default the format is the same as without it, and one step outside what is
    /// allowed is refused; and the format knows no others.
    fn check<F: Format>(format: &Value, names: &[&str]) {
        assert_eq!(format["name"], F::NAME);
        let one = |name: &str, value: u64| -> Settings { [(name.to_owned(), value)].into_iter().collect() };
        let plain = F::open(&Settings::default()).unwrap();
        let settings = format["settings"].as_array().unwrap();
        assert_eq!(settings.iter().map(|setting| setting["name"].as_str().unwrap()).collect::<Vec<_>>(), names);
        for setting in settings {
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
        check::<V1>(&manifest["formats"][0], crate::v1::NAMES);
        check::<V2>(&manifest["formats"][1], crate::v2::NAMES);
        let registers = manifest["registers"].as_array().unwrap();
        for name in ["DEVTAB_BASE", "CONTROL", "EXT_FEATURES", "EXCL_BASE", "DEVTAB_SEG*"] {
            assert!(registers.iter().any(|register| register == name));
        }
    }
}
