//! What a plugin says about itself, read before anything is compiled.

use serde::Deserialize;

use crate::plugin::{CONTRACT, LoadError, Settings};

/// The JSON document in the custom section `stagecraft:manifest`. Unknown fields are ignored.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct Manifest {
    /// The contract, such as `stagecraft:format@0.1.0`.
    pub contract: String,
    /// Name of the plugin, such as `intel-vtd`; the first part of its formats' names.
    pub name: String,
    /// The plugin's own version.
    #[serde(default)]
    pub version: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// Under which licence it comes.
    #[serde(default)]
    pub license: String,
    /// Kinds of units whose device structures it knows, such as `intel-vtd`.
    #[serde(default)]
    pub units: Vec<String>,
    /// Registers that `lookup` and `pasids` take; a trailing `*` stands for any ending.
    #[serde(default)]
    pub registers: Vec<String>,
    /// Table formats.
    pub formats: Vec<FormatManifest>,
}

/// One table format of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct FormatManifest {
    /// Full name, such as `intel-vtd/first-stage`.
    pub name: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// Document and section.
    #[serde(default)]
    pub section: String,
    /// Settings of a configuration.
    #[serde(default)]
    pub settings: Vec<SettingManifest>,
}

impl FormatManifest {
    /// The settings that can be wished for: where roots are is where the table ends up.
    pub fn wishable(&self) -> impl Iterator<Item = &str> {
        self.settings.iter().map(|setting| setting.name.as_str()).filter(|name| !name.starts_with("root"))
    }

    /// The first setting that is none of the [wishable](Self::wishable) ones: its name, and theirs.
    pub(crate) fn unknown<'a>(&self, settings: &'a Settings) -> Option<(&'a str, String)> {
        let (name, _) = settings.iter().find(|(name, _)| self.wishable().all(|known| known != *name))?;
        Some((name, self.wishable().collect::<Vec<_>>().join(", ")))
    }
}

/// One setting of a [`FormatManifest`].
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct SettingManifest {
    /// In lower case with hyphens.
    pub name: String,
    /// The value when it is absent; none: it has to be given, or its absence means something.
    #[serde(default)]
    pub default: Option<u64>,
    /// Which values make sense, for people.
    #[serde(default)]
    pub allowed: String,
    /// One line for people.
    #[serde(default)]
    pub description: String,
}

const MAX_BYTES: usize = 64 << 10;
const MAX_FORMATS: usize = 16;
const MAX_SETTINGS: usize = 64;
const MAX_UNITS: usize = 16;
const MAX_REGISTERS: usize = 256;
const MAX_NAME: usize = 64;
const MAX_TEXT: usize = 1024;

impl Manifest {
    /// Reads and bounds a manifest.
    ///
    /// # Errors
    /// [`LoadError::BadManifest`], or [`LoadError::WrongVersion`] if it is of another contract.
    pub fn parse(json: &[u8]) -> Result<Self, LoadError> {
        if json.len() > MAX_BYTES {
            return Err(bad(format!("{} bytes; at most {MAX_BYTES}", json.len())));
        }
        // The version first: a manifest of another version may well look different.
        #[derive(Deserialize)]
        struct Version {
            contract: String,
        }
        let version: Version = serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
        match version.contract.strip_prefix("stagecraft:format@") {
            Some(CONTRACT) => {}
            Some(found) => return Err(LoadError::WrongVersion { found: super::error::clean(found), expected: CONTRACT }),
            None => return Err(bad(format!("contract `{}`: there is `stagecraft:format@{CONTRACT}`", super::error::clean(&version.contract)))),
        }
        let manifest: Self = serde_json::from_slice(json).map_err(|error| bad(error.to_string()))?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<(), LoadError> {
        check_name("name", &self.name)?;
        for (what, text) in [("version", &self.version), ("description", &self.description), ("license", &self.license)] {
            check_text(what, text)?;
        }
        check_count("units", self.units.len(), MAX_UNITS)?;
        self.units.iter().try_for_each(|unit| check_name("unit", unit))?;
        check_count("registers", self.registers.len(), MAX_REGISTERS)?;
        for register in &self.registers {
            let stem = register.strip_suffix('*').unwrap_or(register);
            let known = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
            if stem.is_empty() || stem.len() > MAX_NAME || !stem.chars().all(known) {
                return Err(bad(format!(
                    "register `{}`: letters, digits, `_`, `-` and `.`, and at most one `*` at the end",
                    super::error::clean(register)
                )));
            }
        }
        check_count("formats", self.formats.len(), MAX_FORMATS)?;
        if self.formats.is_empty() {
            return Err(bad("no formats".to_owned()));
        }
        for (index, format) in self.formats.iter().enumerate() {
            let own = format.name.strip_prefix(&*self.name).and_then(|rest| rest.strip_prefix('/'));
            let Some(own) = own else {
                return Err(bad(format!("format `{}`: its name must begin with `{}/`", super::error::clean(&format.name), self.name)));
            };
            check_name("format", own)?;
            if self.formats[..index].iter().any(|other| other.name == format.name) {
                return Err(bad(format!("format `{}` is there twice", format.name)));
            }
            check_text("description", &format.description)?;
            check_text("section", &format.section)?;
            check_count("settings", format.settings.len(), MAX_SETTINGS)?;
            for (index, setting) in format.settings.iter().enumerate() {
                check_name("setting", &setting.name)?;
                check_text("description", &setting.description)?;
                check_text("allowed", &setting.allowed)?;
                if format.settings[..index].iter().any(|other| other.name == setting.name) {
                    return Err(bad(format!("setting `{}` of `{}` is there twice", setting.name, format.name)));
                }
            }
        }
        Ok(())
    }

    /// Whether `lookup` takes a register of this name.
    #[must_use]
    pub fn knows_register(&self, name: &str) -> bool {
        self.registers.iter().any(|known| match known.strip_suffix('*') {
            Some(stem) => name.len() > stem.len() && name.starts_with(stem),
            None => known == name,
        })
    }

    /// The table format of this full name.
    #[must_use]
    pub fn format(&self, name: &str) -> Option<&FormatManifest> {
        self.formats.iter().find(|format| format.name == name)
    }
}

impl FormatManifest {
    /// The setting of this name.
    #[must_use]
    pub fn setting(&self, name: &str) -> Option<&SettingManifest> {
        self.settings.iter().find(|setting| setting.name == name)
    }
}

fn bad(reason: String) -> LoadError {
    LoadError::BadManifest { reason }
}

fn check_count(what: &str, count: usize, most: usize) -> Result<(), LoadError> {
    if count > most { Err(bad(format!("{count} {what}; at most {most}"))) } else { Ok(()) }
}

fn check_text(what: &str, text: &str) -> Result<(), LoadError> {
    if text.len() > MAX_TEXT || text.chars().any(char::is_control) {
        return Err(bad(format!("{what}: at most {MAX_TEXT} bytes on one line")));
    }
    Ok(())
}

fn check_name(what: &str, name: &str) -> Result<(), LoadError> {
    let known = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(known) {
        return Err(bad(format!("{what} `{}`: 1 to {MAX_NAME} lower-case letters, digits and hyphens", super::error::clean(name))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"contract":"stagecraft:format@0.1.0","name":"a","registers":["CR","CD_*"],"new":1,"formats":[{"name":"a/b","settings":[{"name":"root"}]}]}"#;

    fn reason(json: &str) -> String {
        Manifest::parse(json.as_bytes()).expect_err("refused").to_string()
    }

    #[test]
    fn a_manifest_is_read_and_unknown_fields_are_ignored() {
        let manifest = Manifest::parse(GOOD.as_bytes()).expect("good");
        assert!(manifest.knows_register("CR") && manifest.knows_register("CD_1"));
        assert!(!manifest.knows_register("CRX") && !manifest.knows_register("CD_"));
        assert!(manifest.format("a/b").and_then(|format| format.setting("root")).is_some());
    }

    #[test]
    fn nonsense_is_named() {
        assert!(reason(&GOOD.replace("@0.1.0", "@0.2.0")).contains("stagecraft:format@0.2.0 and this host 0.1.0"));
        assert!(reason(&GOOD.replace("stagecraft:format@", "other@")).contains("contract `other@0.1.0`: there is `stagecraft:format@0.1.0`"));
        assert!(reason(&GOOD.replace("\"a/b\"", "\"c/b\"")).contains("must begin with `a/`"));
        assert!(reason(&GOOD.replace("\"name\":\"a\"", "\"name\":\"../a\"")).contains("lower-case"));
        assert!(reason(&GOOD.replace("CD_*", "C*D*")).contains("at most one `*`"));
        assert!(reason("[]").contains("manifest"));
        assert!(reason(&" ".repeat(70_000)).contains("at most 65536"));
        let formats = (0..17).map(|n| format!(r#"{{"name":"a/f{n}"}}"#)).collect::<Vec<_>>().join(",");
        assert!(reason(&format!(r#"{{"contract":"stagecraft:format@0.1.0","name":"a","formats":[{formats}]}}"#)).contains("17 formats"));
    }
}
