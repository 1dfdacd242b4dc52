//! Stagecraft as a VMM uses it: plugins in their sandbox, guest memory through `vm-memory`, tables built in an arena that is used again.

use std::sync::{Arc, Mutex, PoisonError};

use stagecraft::memory::{Budget, Limits, MemoryMap, VmMemory};
use stagecraft::plugin::{Plugins, TableConfig};
use stagecraft::table::{Arena, Builder, Built, Encoded, Finding, Format, FormatError, Geometry, Meaning, Table};
use stagecraft::{Attributes, Span};
use vm_memory::GuestMemoryMmap;

/// The target's settings.
#[must_use]
pub fn target(five_levels: bool) -> TableConfig {
    TableConfig::new("intel-vtd/first-stage", &[("levels", if five_levels { 5 } else { 4 })])
}

/// An opened format that one [`Builder`] after the other uses: opening costs an instance of the plugin.
#[derive(Clone)]
pub struct Reused(Arc<Mutex<dyn Format>>);

impl std::fmt::Debug for Reused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reused")
    }
}

impl Reused {
    /// Wraps an opened format.
    pub fn new(format: impl Format + 'static) -> Self {
        Self(Arc::new(Mutex::new(format)))
    }

    fn with<R>(&self, call: impl FnOnce(&mut (dyn Format + 'static)) -> R) -> R {
        call(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Format for Reused {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        self.with(Format::geometry)
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        self.with(|format| format.decode(level, inherited, pattern))
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        self.with(|format| format.decode_entry(level, inherited, entry))
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        self.with(|format| format.explain(level, inherited, pattern))
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        self.with(|format| format.encode_leaf(level, size_log2, attributes))
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        self.with(|format| format.encode_table(level, next))
    }
}

/// Opens a table through its plugin.
#[must_use]
pub fn open(plugins: &Plugins, config: &TableConfig) -> Table {
    Table::open(Box::new(plugins.by_format(&config.format).unwrap().open(config).unwrap())).unwrap()
}

/// Opens a format through its plugin.
#[must_use]
pub fn open_format(plugins: &Plugins, config: &TableConfig) -> Reused {
    Reused::new(plugins.by_format(&config.format).unwrap().open(config).unwrap())
}

/// Converts what `source` maps, all of it, into a table in `arena`.
pub fn convert(source: &mut Table, memory: &GuestMemoryMmap, map: &MemoryMap, format: impl Format + 'static, arena: &mut Arena) -> Built {
    arena.reset();
    let mut builder = Builder::new(Box::new(format), arena).unwrap();
    // Encodings that must be seen whole are asked about once for each distinct entry: more than a guest may ask for by default.
    let budget = Budget::new(Limits { questions: 1 << 20, ..Limits::default() });
    source.walk(&VmMemory(memory), map, Span::ALL, &budget, &mut builder).unwrap();
    builder.finish().unwrap()
}
