//! Table configurations: a format's name and its settings.

use std::fmt;

/// Named numbers, in the order given; no name twice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Settings(Vec<(String, u64)>);

impl Settings {
    /// No settings.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// The value of `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(known, _)| known == name).map(|&(_, value)| value)
    }

    /// Sets `name`, replacing an earlier value.
    pub fn set(&mut self, name: &str, value: u64) {
        match self.0.iter_mut().find(|(known, _)| known == name) {
            Some(slot) => slot.1 = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl<N: Into<String>> FromIterator<(N, u64)> for Settings {
    /// The last value of a name counts.
    fn from_iter<T: IntoIterator<Item = (N, u64)>>(settings: T) -> Self {
        let mut all = Self::new();
        for (name, value) in settings {
            all.set(&name.into(), value);
        }
        all
    }
}

/// One address space in guest memory: a table format's full name and its settings, the addresses of the roots among them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct TableConfig {
    /// Full name, such as `intel-vtd/first-stage`.
    pub format: String,
    /// A setting that is absent has the default of the plugin's manifest.
    pub settings: Settings,
}

impl TableConfig {
    /// A configuration of the format called `format`.
    #[must_use]
    pub fn new(format: &str, settings: &[(&str, u64)]) -> Self {
        Self { format: format.to_owned(), settings: settings.iter().copied().collect() }
    }

    /// The part of the format's name that names the architecture.
    #[must_use]
    pub fn unit(&self) -> &str {
        self.format.split_once('/').map_or(&*self.format, |(unit, _)| unit)
    }
}

impl fmt::Display for TableConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.format)?;
        self.settings.iter().try_for_each(|(name, value)| write!(f, " {name}={value:#x}"))
    }
}
