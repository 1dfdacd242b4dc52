//! The warm questions: one format under one configuration, as the table engine wants it.

use wasmtime::component::ResourceAny;

use crate::Attributes;
use crate::plugin::bindings::exports::stagecraft::format::table::GuestFormat;
use crate::plugin::store::{Pace, Sandbox};
use crate::plugin::{CallError, Plugin, TableConfig, words};
use crate::table::{Encoded, Finding, Format, FormatError, Geometry, Meaning};

/// A table format of a plugin under one configuration, in an instance of its own.
///
/// Its geometry was checked when it was opened. When the plugin traps, runs out of time or memory, or answers what cannot be read, every later question
/// gets the same error: it fails closed until the format is opened again.
pub struct PluginFormat {
    plugin: Plugin,
    config: TableConfig,
    sandbox: Sandbox,
    resource: ResourceAny,
    geometry: Geometry,
}

impl std::fmt::Debug for PluginFormat {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluginFormat").field("config", &self.config).field("sandbox", &self.sandbox).finish_non_exhaustive()
    }
}

impl PluginFormat {
    pub(super) fn open(plugin: &Plugin, table: &TableConfig) -> Result<Self, CallError> {
        plugin.check_format(&table.format)?;
        let mut sandbox = Sandbox::new(plugin)?;
        let config = words::table_config_in(table);
        let opened = sandbox.call(Pace::Cold, |exports, store| exports.stagecraft_format_table().format().call_open(store, &config))?;
        let resource = opened.map_err(|error| sandbox.refused(error))?;
        let answer = sandbox.call(Pace::Warm, |exports, store| exports.stagecraft_format_table().format().call_geometry(store, resource))?;
        let geometry = words::geometry(answer);
        geometry.check().map_err(|nonsense| sandbox.nonsense(nonsense.to_string()))?;
        Ok(Self { plugin: plugin.clone(), config: table.clone(), sandbox, resource, geometry })
    }

    /// The plugin.
    #[must_use]
    pub fn plugin(&self) -> &Plugin {
        &self.plugin
    }

    /// The configuration that it was opened with.
    #[must_use]
    pub fn config(&self) -> &TableConfig {
        &self.config
    }

    /// The geometry, which was checked when the format was opened.
    #[must_use]
    pub fn geometry_ref(&self) -> &Geometry {
        &self.geometry
    }

    /// Number of calls into the plugin so far, the two for opening it included.
    #[must_use]
    pub fn calls(&self) -> u64 {
        self.sandbox.calls()
    }

    /// Why no call works any more.
    #[must_use]
    pub fn failed(&self) -> Option<&CallError> {
        self.sandbox.failed()
    }

    /// The same format in a fresh instance.
    ///
    /// # Errors
    /// As [`Plugin::open`].
    pub fn reopen(&self) -> Result<Self, CallError> {
        Self::open(&self.plugin, &self.config)
    }

    fn ask<R>(
        &mut self,
        question: impl FnOnce(GuestFormat<'_>, &mut wasmtime::Store<super::store::State>, ResourceAny) -> wasmtime::Result<R>,
    ) -> Result<R, CallError> {
        let resource = self.resource;
        self.sandbox.call(Pace::Warm, |exports, store| question(exports.stagecraft_format_table().format(), store, resource))
    }

    fn nonsense(&self, what: String) -> FormatError {
        self.sandbox.nonsense(what).into()
    }
}

impl Format for PluginFormat {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        Ok(self.geometry.clone())
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        let meaning = self.ask(|format, store, this| format.call_decode(store, this, level, inherited, pattern))?;
        words::meaning(meaning, self.geometry.levels.len()).map_err(|what| self.nonsense(what))
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        let meaning = self.ask(|format, store, this| format.call_decode_entry(store, this, level, inherited, entry))?;
        match words::meaning(meaning, self.geometry.levels.len()).map_err(|what| self.nonsense(what))? {
            Meaning::WholeEntry => Err(self.nonsense(format!("asked for the whole entry {entry:#x}, which it was shown"))),
            meaning => Ok(meaning),
        }
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        Ok(words::findings(self.ask(|format, store, this| format.call_explain(store, this, level, inherited, pattern))?))
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        let answer = self.ask(|format, store, this| format.call_encode_leaf(store, this, level, size_log2, attributes.bits()))?;
        let Some(encoded) = answer else { return Ok(None) };
        let granted = words::attributes(encoded.attributes).map_err(|what| self.nonsense(what))?;
        if !granted.within(attributes) {
            return Err(self.nonsense(format!("a leaf that grants `{granted}` where `{attributes}` was asked for")));
        }
        Ok(Some(Encoded { pattern: encoded.pattern, attributes: granted }))
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        Ok(self.ask(|format, store, this| format.call_encode_table(store, this, level, next))?)
    }
}
