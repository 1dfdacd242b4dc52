//! What was really exercised.

use std::collections::BTreeMap;
use std::sync::Mutex;

#[derive(Debug, Default)]
pub struct Coverage(Mutex<BTreeMap<String, u64>>);

impl Coverage {
    pub fn add(&self, what: String) {
        self.add_many(what, 1);
    }

    pub fn add_many(&self, what: String, count: u64) {
        *self.0.lock().unwrap().entry(what).or_default() += count;
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.lock().unwrap().get(what).copied().unwrap_or(0)
    }

    /// How often anything whose name begins so.
    pub fn all(&self, prefix: &str) -> u64 {
        self.0.lock().unwrap().iter().filter(|(what, _)| what.starts_with(prefix)).map(|(_, count)| count).sum()
    }

    pub fn print(&self) {
        self.0.lock().unwrap().iter().for_each(|(what, count)| println!("{count:>9} {what}"));
    }
}
