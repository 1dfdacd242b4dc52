//! What the JSON forms have in common; `docs/json.md` describes them.

use std::fmt;

use serde_json::{Map, Value, json};
use stagecraft::plugin::{Settings, TableConfig};
use stagecraft::table::{Intercept, Window};

/// Version of all JSON forms.
pub const VERSION: u64 = 1;

/// A number as a hex string.
pub fn hex(value: u64) -> Value {
    Value::String(format!("{value:#x}"))
}

/// A number of bytes; all of an address space are 2^64, one more than 64 bits say.
pub fn bytes(bytes: u128) -> Value {
    u64::try_from(bytes).map_or_else(|_| Value::from(bytes as f64), Value::from)
}

/// Settings without the root: JSON numbers, or hex strings for addresses and where a JSON number would lose digits.
pub fn settings(settings: &Settings) -> Value {
    let value = |name: &str, value: u64| if name.starts_with("root") || value >> 53 != 0 { hex(value) } else { Value::from(value) };
    let others = settings.iter().filter(|(name, _)| *name != "root");
    others.map(|(name, number)| (name.to_owned(), value(name, number))).collect::<Map<_, _>>().into()
}

/// Format, root and settings of a table.
pub fn table(config: &TableConfig) -> Value {
    json!({"format": config.format, "root": config.settings.get("root").map(hex), "settings": settings(&config.settings)})
}

/// Addresses that something else than the tables serves.
pub fn intercept(intercept: &Intercept) -> Value {
    let Intercept { passed, mask, value, server, address, section } = intercept;
    let section = Some(section).filter(|section| !section.is_empty());
    json!({"passed": passed, "mask": hex(*mask), "value": hex(*value), "server": server, "address": address.map(hex), "section": section})
}

/// IOVAs that go to memory without any table.
pub fn window(window: &Window) -> Value {
    let size = bytes(u128::from(window.iova.length_minus_one()) + 1);
    let access = window.attributes.access(true).as_str();
    json!({"iova": hex(window.iova.first), "address": hex(window.address), "size": size, "access": access})
}

/// A stream's id and PASID.
pub fn stream((id, pasid): (u64, Option<u32>)) -> Value {
    json!({"id": hex(id), "pasid": pasid})
}

/// Separates the elements of a list that is written one by one.
#[derive(Debug, Default)]
pub struct Separator(bool);

impl Separator {
    /// What to write before the next element.
    pub fn next(&mut self) -> impl fmt::Display + use<> {
        if std::mem::replace(&mut self.0, true) { ",\n" } else { "\n" }
    }
}
