//! Supervisors of all plugins, for one guest.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::plugin::supervise::{Policy, SuperviseError, Supervised, Supervisor, lock};
use crate::plugin::{Plugin, Plugins, PluginsError, TableConfig};

/// A format could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenFormatError {
    /// No plugin knows it, or it cannot be loaded.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// The plugin refused or failed.
    #[error(transparent)]
    Supervised(#[from] SuperviseError),
}

/// All plugins of a host under supervision, for one guest: what one guest provokes counts against nobody else. Clones are the same.
#[derive(Clone, Debug)]
pub struct Supervisors(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    plugins: Arc<Plugins>,
    policy: Policy,
    /// By the plugin's name, from when it is first needed.
    known: Mutex<BTreeMap<String, Supervisor>>,
}

impl Supervisors {
    /// None is needed yet.
    #[must_use]
    pub fn new(plugins: Arc<Plugins>, policy: Policy) -> Self {
        Self(Arc::new(Inner { plugins, policy, known: Mutex::default() }))
    }

    /// The plugins.
    #[must_use]
    pub fn plugins(&self) -> &Arc<Plugins> {
        &self.0.plugins
    }

    /// The supervisor of whoever knows this kind of unit.
    ///
    /// # Errors
    /// Nobody does, or it cannot be loaded.
    pub fn by_unit(&self, unit: &str) -> Result<Supervisor, PluginsError> {
        self.0.plugins.by_unit(unit).map(|plugin| self.of(plugin))
    }

    /// The supervisor of whoever knows this table format.
    ///
    /// # Errors
    /// Nobody does, or it cannot be loaded.
    pub fn by_format(&self, format: &str) -> Result<Supervisor, PluginsError> {
        self.0.plugins.by_format(format).map(|plugin| self.of(plugin))
    }

    /// A format under one configuration.
    ///
    /// # Errors
    /// As [`Supervisors::by_format`] and [`Supervisor::open`].
    pub fn open(&self, config: &TableConfig) -> Result<Supervised, OpenFormatError> {
        Ok(self.by_format(&config.format)?.open(config)?)
    }

    /// All that were needed so far.
    #[must_use]
    pub fn known(&self) -> Vec<Supervisor> {
        lock(&self.0.known).values().cloned().collect()
    }

    /// The supervisor that was made for it first stays, with whatever version it has by now.
    fn of(&self, plugin: Plugin) -> Supervisor {
        let name = plugin.name().to_owned();
        lock(&self.0.known).entry(name).or_insert_with(|| Supervisor::new(plugin, self.0.policy)).clone()
    }
}
