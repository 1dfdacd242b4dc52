//! What the JSON forms have in common; `docs/json.md` describes them.

use std::fmt;

use serde_json::{Map, Value, json};
use stagecraft::plugin::{Settings, TableConfig};

/// Version of all JSON forms.
pub const VERSION: u64 = 1;

/// A number as a hex string.
pub fn hex(value: u64) -> Value {
    Value::String(format!("{value:#x}"))
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
