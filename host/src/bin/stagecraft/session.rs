//! What every question needs first: the plugins, the snapshot, the device that is meant.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use stagecraft::guest::Guest;
use stagecraft::plugin::{Config, Engine, EngineError, Limits, PluginDirectory, Plugins};
use stagecraft::snapshot::{Device, Snapshot};

use crate::numbers::number;
use crate::options::Global;
use crate::output::printable;

/// Devices that an error message lists.
const LISTED: usize = 12;
/// Instances of plugins that there may be at a time, where there is no address space for as many as usual: `ulimit -v` may leave little. One table
/// or two are looked at at a time.
const FEWER_INSTANCES: [u32; 2] = [64, 16];

/// The plugins and limits of one run.
#[derive(Debug)]
pub struct Session {
    /// All plugins.
    pub plugins: Plugins,
    budget_tables: Option<u64>,
    budget_leaves: Option<u64>,
    budget_questions: Option<u64>,
}

impl Session {
    /// With the built-in plugins and those of the plugin folder.
    pub fn new(global: &Global) -> Result<Self> {
        Self::with(global, Config::default())
    }

    /// The same for a guest that runs: its commands go through plugins all the while.
    pub fn for_running(global: &Global) -> Result<Self> {
        Self::with(global, Config::default().with_optimisation(true))
    }

    fn with(global: &Global, config: Config) -> Result<Self> {
        let engine = engine(global, config)?;
        let mut plugins = Plugins::builtin(&engine)?;
        let from_environment = || std::env::var_os("STAGECRAFT_PLUGINS").filter(|path| !path.is_empty()).map(PathBuf::from);
        if let Some(path) = global.plugins.clone().or_else(from_environment) {
            plugins = plugins.with_directory(&PluginDirectory::open(&path)?)?;
        }
        let Global { budget_tables, budget_leaves, budget_questions, .. } = *global;
        Ok(Self { plugins, budget_tables, budget_leaves, budget_questions })
    }

    /// A snapshot, looked at within the budgets of the command line.
    pub fn guest<'a>(&'a self, snapshot: &'a Snapshot) -> Result<Guest<'a>> {
        let mut limits = snapshot.limits();
        if let Some(tables) = self.budget_tables {
            limits.tables = tables;
            limits.leaves = tables.saturating_mul(512);
        }
        limits.leaves = self.budget_leaves.unwrap_or(limits.leaves);
        if self.budget_tables.is_some() || self.budget_leaves.is_some() {
            // A mapping has a leaf at least, so that whoever allows so many leaves allows so many mappings.
            limits.mappings = limits.leaves;
        }
        limits.questions = self.budget_questions.unwrap_or(limits.questions);
        Ok(Guest::with_limits(snapshot, &self.plugins, limits)?)
    }
}

/// The engine, with a cache for compiled plugins. A cache that was asked for must be fit for use; the default one is used if it is.
fn engine(global: &Global, config: Config) -> Result<Engine> {
    let config = config.with_compile_threads(std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN));
    if let Some(cache) = &global.cache {
        return Ok(with_room(&config.with_cache(cache))?);
    }
    if let Some(cache) = default_cache() {
        match with_room(&config.clone().with_cache(&cache)) {
            Ok(engine) if rustix::fs::access(&cache, rustix::fs::Access::WRITE_OK).is_ok() => return Ok(engine),
            Ok(_) => tracing::debug!(cache = %cache.display(), "no cache for compiled plugins: it cannot be written"),
            Err(EngineError::Cache(error)) => tracing::debug!(%error, "no cache for compiled plugins"),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(with_room(&config)?)
}

/// An engine for as many instances as there is room for.
fn with_room(config: &Config) -> Result<Engine, EngineError> {
    let mut engine = Engine::new(config.clone());
    for instances in FEWER_INSTANCES {
        if !matches!(engine, Err(EngineError::Setup { .. })) {
            break;
        }
        let mut limits = Limits::default();
        limits.instances = instances;
        engine = Engine::new(config.clone().with_limits(limits));
    }
    engine
}

fn default_cache() -> Option<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let base = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))?;
    Some(base.join("stagecraft"))
}

/// Reads a snapshot.
pub fn load(path: &Path) -> Result<Snapshot> {
    check_folder(path)?;
    Ok(Snapshot::load(path)?)
}

/// Reads a snapshot that need not say where its tables are.
pub fn load_memory(path: &Path) -> Result<Snapshot> {
    check_folder(path)?;
    Ok(Snapshot::load_memory(path)?)
}

fn check_folder(path: &Path) -> Result<()> {
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("{}: no such snapshot; give a folder with snapshot.json and pages.bin", path.display())
        }
        Ok(metadata) if !metadata.is_dir() => bail!("{}: not a folder; give the one with snapshot.json and pages.bin", path.display()),
        _ => Ok(()),
    }
}

/// The device that `text` means: its label, or its id in decimal or hex.
pub fn device<'a>(snapshot: &'a Snapshot, text: &str) -> Result<&'a Device> {
    let mut labelled = snapshot.devices.iter().filter(|device| device.label == text);
    match (labelled.next(), labelled.next()) {
        (Some(device), None) => return Ok(device),
        (Some(one), Some(other)) => bail!("devices {:#x} and {:#x} both have the label `{}`; give the id", one.id, other.id, printable(text)),
        (None, _) => {}
    }
    if let Some(device) = number(text).ok().and_then(|id| snapshot.device(id)) {
        return Ok(device);
    }
    let mut known: Vec<String> = snapshot.devices.iter().take(LISTED).map(name).collect();
    if snapshot.devices.len() > LISTED {
        known.push(format!("{} more", snapshot.devices.len() - LISTED));
    }
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    bail!("no device `{}` in this snapshot; there are {known}", printable(text))
}

/// Id and label of a device.
pub fn name(device: &Device) -> String {
    format!("{:#x} ({})", device.id, printable(&device.label))
}
