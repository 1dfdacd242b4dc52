//! Table configurations: a format's name and its settings.

/// One address space in guest memory: a table format's name and its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableConfig {
    /// Full name, such as `intel-vtd/first-stage`.
    pub format: String,
    /// Settings, the addresses of the roots among them.
    pub settings: Settings,
}

impl TableConfig {
    /// A configuration of the format called `format`.
    #[must_use]
    pub fn new(format: &str, settings: &[(&str, u64)]) -> Self {
        Self { format: format.to_owned(), settings: settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect() }
    }
}

/// Named numbers, in the order given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings(Vec<(String, u64)>);

impl Settings {
    /// These settings, in this order.
    #[must_use]
    pub fn of(settings: &[(&str, u64)]) -> Self {
        settings.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
    }

    /// The value of `name`, if given.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.0.iter().find(|(n, _)| n == name).map(|&(_, value)| value)
    }

    /// The value of `name`, or `default`.
    #[must_use]
    pub fn or(&self, name: &str, default: u64) -> u64 {
        self.get(name).unwrap_or(default)
    }

    /// A setting that is 0 or 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other value.
    pub fn flag(&self, name: &'static str, default: bool) -> Result<bool, Error> {
        match self.or(name, u64::from(default)) {
            0 => Ok(false),
            1 => Ok(true),
            value => Err(Error::invalid(name, value, "", "must be 0 or 1")),
        }
    }

    /// A setting that has one of the values listed.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other value.
    pub fn one_of(&self, name: &'static str, default: u64, allowed: &[u64], section: &'static str) -> Result<u64, Error> {
        let value = self.or(name, default);
        if allowed.contains(&value) {
            return Ok(value);
        }
        let mut reason = "must be one of ".to_owned();
        for (place, value) in allowed.iter().enumerate() {
            list(&mut reason, place, &value.to_string());
        }
        Err(Error::invalid(name, value, section, &reason))
    }

    /// A setting that lies in `first..=last`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for any other value.
    pub fn within(&self, name: &'static str, default: u64, first: u64, last: u64, section: &'static str) -> Result<u64, Error> {
        let value = self.or(name, default);
        if (first..=last).contains(&value) {
            return Ok(value);
        }
        Err(Error::invalid(name, value, section, &format!("must be {first} to {last}")))
    }

    /// Refuses a setting that is not among `known`.
    ///
    /// # Errors
    /// [`Error::Invalid`] with the first unknown name.
    pub fn only(&self, known: &[&str]) -> Result<(), Error> {
        match self.0.iter().find(|(name, _)| !known.contains(&name.as_str())) {
            Some((name, value)) => {
                let mut reason = "no such setting; there are ".to_owned();
                known.iter().enumerate().for_each(|(place, name)| list(&mut reason, place, name));
                Err(Error::invalid(name, *value, "", &reason))
            }
            None => Ok(()),
        }
    }

    /// Sets `name`, replacing an earlier value.
    pub fn set(&mut self, name: &str, value: u64) {
        match self.0.iter_mut().find(|(n, _)| n == name) {
            Some(slot) => slot.1 = value,
            None => self.0.push((name.to_owned(), value)),
        }
    }

    /// Sets `name` unless it has a value already.
    pub fn set_default(&mut self, name: &str, value: u64) {
        if self.get(name).is_none() {
            self.set(name, value);
        }
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }
}

impl FromIterator<(String, u64)> for Settings {
    fn from_iter<T: IntoIterator<Item = (String, u64)>>(settings: T) -> Self {
        Self(settings.into_iter().collect())
    }
}

/// Adds a word to a list. Every plugin carries this, and the joins of the standard library are a kilobyte each.
fn list(text: &mut String, place: usize, word: &str) {
    if place != 0 {
        text.push_str(", ");
    }
    text.push_str(word);
}

/// Why a plugin cannot answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Error {
    /// A feature that exists in the architecture and not in this plugin.
    Unsupported(String),
    /// A register, setting or field with a value that makes no sense.
    Invalid(Invalid),
    /// Guest memory at this address could not be read.
    Unreadable(u64),
}

/// A value that makes no sense, and where the specification says so.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invalid {
    /// Name of the register, setting or field.
    pub field: String,
    /// Its value.
    pub value: u64,
    /// Document and section; may be empty.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
}

impl Error {
    /// An [`Error::Invalid`].
    #[must_use]
    pub fn invalid(field: &str, value: u64, section: &str, reason: &str) -> Self {
        Self::Invalid(Invalid { field: field.to_owned(), value, section: section.to_owned(), reason: reason.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_checked_by_name_and_value() {
        let settings: Settings = [("levels".to_owned(), 4), ("flag".to_owned(), 2)].into_iter().collect();
        assert_eq!(settings.one_of("levels", 3, &[3, 4], "section 1"), Ok(4));
        assert_eq!(settings.one_of("granule", 4096, &[4096], ""), Ok(4096), "the default");
        let refused = |result: Result<u64, Error>| match result {
            Err(Error::Invalid(invalid)) => invalid.reason,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(settings.one_of("levels", 3, &[3, 5], "")), "must be one of 3, 5");
        assert_eq!(refused(settings.within("levels", 3, 5, 6, "")), "must be 5 to 6");
        assert!(settings.flag("flag", false).is_err() && settings.flag("other", true) == Ok(true));
        assert!(settings.only(&["levels", "flag"]).is_ok() && settings.only(&["levels"]).is_err());
        let mut changed = settings.clone();
        changed.set("levels", 5);
        changed.set_default("levels", 3);
        changed.set_default("root", 0);
        assert_eq!(changed.iter().collect::<Vec<_>>(), [("levels", 5), ("flag", 2), ("root", 0)]);
    }
}
