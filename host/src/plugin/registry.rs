//! All plugins that a host has: those that come with the library, and those of a directory.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::plugin::{DirectoryError, Engine, LoadError, Manifest, Plugin, PluginDirectory, admission};

/// The plugins of this repository, as `cargo xtask plugins` built them.
#[cfg(feature = "builtin-plugins")]
const BUILTIN: &[&[u8]] = &[
    include_bytes!("../../builtin/apple-dart.wasm"),
    include_bytes!("../../builtin/arm-smmuv3.wasm"),
    include_bytes!("../../builtin/arm-v7s.wasm"),
    include_bytes!("../../builtin/intel-vtd.wasm"),
    include_bytes!("../../builtin/loongarch.wasm"),
    include_bytes!("../../builtin/riscv-iommu.wasm"),
    include_bytes!("../../builtin/amd-vi.wasm"),
    include_bytes!("../../builtin/s390-zpci.wasm"),
];
#[cfg(not(feature = "builtin-plugins"))]
const BUILTIN: &[&[u8]] = &[];

/// Where a plugin comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Embedded in the library.
    Builtin,
    /// A file.
    File(PathBuf),
    /// Bytes that the embedder gave.
    Bytes,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Builtin => f.write_str("built in"),
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Bytes => f.write_str("given by the embedder"),
        }
    }
}

/// A plugin that is not there, or not usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PluginsError {
    /// The plugin directory, or a file in it.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A plugin that does not get in.
    #[error("plugin {plugin} ({origin}): {error}")]
    Load {
        /// Its name, or its file's.
        plugin: String,
        /// Where it comes from.
        origin: Origin,
        /// Why not.
        error: LoadError,
    },
    /// Two plugins have the same name in their manifests, or know the same kind of unit; only a built-in plugin can be replaced, by one of its name.
    #[error("`{name}` comes from two plugins: {first} and {second}; remove one of them")]
    Conflict {
        /// Name of the plugin or unit.
        name: String,
        /// Where one comes from.
        first: Origin,
        /// Where the other comes from.
        second: Origin,
    },
    /// There is none of this name.
    #[error("no plugin knows the {what} `{name}`; there are {known}")]
    Unknown {
        /// `unit` or `table format`.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

/// The plugins of a host. Their manifests are read at once; each plugin is compiled, or taken from the cache, when it is first asked for.
///
/// A plugin of a directory replaces the built-in one of the same name: a vendor's update needs no new library.
#[derive(Debug)]
pub struct Plugins {
    engine: Engine,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    manifest: Manifest,
    bytes: Bytes,
    loaded: Mutex<Option<Plugin>>,
}

#[derive(Clone)]
enum Bytes {
    Static(&'static [u8]),
    Owned(Arc<[u8]>),
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.get().len())
    }
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Static(bytes) => bytes,
            Self::Owned(bytes) => bytes,
        }
    }
}

impl Plugins {
    /// No plugins.
    #[must_use]
    pub fn empty(engine: &Engine) -> Self {
        Self { engine: engine.clone(), entries: Vec::new() }
    }

    /// The plugins that come with the library; none without the feature `builtin-plugins`.
    ///
    /// # Errors
    /// [`PluginsError::Load`] if the engine's limits are too tight for them.
    pub fn builtin(engine: &Engine) -> Result<Self, PluginsError> {
        let mut plugins = Self::empty(engine);
        for bytes in BUILTIN {
            plugins.insert("built in", Origin::Builtin, Bytes::Static(bytes))?;
        }
        Ok(plugins)
    }

    /// With all plugins of `directory`. One that has the name of a built-in plugin replaces it.
    ///
    /// # Errors
    /// [`PluginsError`], with the file's name: a file that is no plugin is an error and is not passed over.
    pub fn with_directory(mut self, directory: &PluginDirectory) -> Result<Self, PluginsError> {
        for name in directory.names()? {
            let bytes = directory.read(&name, self.engine.limits().component_bytes)?;
            self.insert(&name, Origin::File(directory.path().join(&name)), Bytes::Owned(bytes.into()))?;
        }
        Ok(self)
    }

    /// With the plugin in `bytes`. If it has the name of a built-in plugin it replaces it.
    ///
    /// # Errors
    /// [`PluginsError::Load`] and [`PluginsError::Conflict`].
    pub fn with_plugin(mut self, bytes: &[u8]) -> Result<Self, PluginsError> {
        self.insert("given", Origin::Bytes, Bytes::Owned(bytes.into()))?;
        Ok(self)
    }

    fn insert(&mut self, label: &str, origin: Origin, bytes: Bytes) -> Result<(), PluginsError> {
        let manifest = admission::admit(bytes.get(), self.engine.limits()).map_err(|error| PluginsError::Load {
            plugin: label.to_owned(),
            origin: origin.clone(),
            error,
        })?;
        if let Some(same) = self.entries.iter().position(|entry| entry.manifest.name == manifest.name) {
            let first = self.entries[same].origin.clone();
            if first != Origin::Builtin {
                return Err(PluginsError::Conflict { name: manifest.name, first, second: origin });
            }
            tracing::info!(plugin = manifest.name, %origin, "replaces the built-in plugin");
            self.entries.remove(same);
        }
        // Names of formats begin with the plugin's, so that two plugins cannot have the same. Units are free.
        let unit = |entry: &&Entry| entry.manifest.units.iter().any(|unit| manifest.units.contains(unit));
        if let Some(other) = self.entries.iter().find(unit) {
            let name = other.manifest.units.iter().find(|unit| manifest.units.contains(unit)).cloned().unwrap_or_default();
            return Err(PluginsError::Conflict { name, first: other.origin.clone(), second: origin });
        }
        self.entries.push(Entry { origin, manifest, bytes, loaded: Mutex::new(None) });
        self.entries.sort_by(|a, b| a.manifest.name.cmp(&b.manifest.name));
        Ok(())
    }

    /// The engine that they run on.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// Manifests and origins, sorted by name. Compiles nothing.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&Manifest, &Origin)> {
        self.entries.iter().map(|entry| (&entry.manifest, &entry.origin))
    }

    /// The plugin for units of this kind, such as `intel-vtd`.
    ///
    /// # Errors
    /// [`PluginsError::Unknown`] with what there is, or [`PluginsError::Load`].
    pub fn by_unit(&self, kind: &str) -> Result<Plugin, PluginsError> {
        match self.entries.iter().find(|entry| entry.manifest.units.iter().any(|unit| unit == kind)) {
            Some(entry) => entry.load(&self.engine),
            None => Err(unknown("unit", kind, self.entries.iter().flat_map(|entry| &entry.manifest.units).map(|unit| &**unit))),
        }
    }

    /// The plugin with the table format of this full name, such as `intel-vtd/first-stage`.
    ///
    /// # Errors
    /// As [`Plugins::by_unit`].
    pub fn by_format(&self, format: &str) -> Result<Plugin, PluginsError> {
        match self.entries.iter().find(|entry| entry.manifest.format(format).is_some()) {
            Some(entry) => entry.load(&self.engine),
            None => {
                let formats = self.entries.iter().flat_map(|entry| &entry.manifest.formats);
                Err(unknown("table format", format, formats.map(|format| &*format.name)))
            }
        }
    }
}

fn unknown<'a>(what: &'static str, name: &str, known: impl Iterator<Item = &'a str>) -> PluginsError {
    let known: Vec<&str> = known.collect();
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    PluginsError::Unknown { what, name: super::error::clean(name), known }
}

impl Entry {
    fn load(&self, engine: &Engine) -> Result<Plugin, PluginsError> {
        // Held while compiling: two threads that ask for the same plugin compile it once.
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plugin) = &*loaded {
            return Ok(plugin.clone());
        }
        let plugin = Plugin::load_admitted(engine, self.bytes.get(), self.manifest.clone()).map_err(|error| PluginsError::Load {
            plugin: self.manifest.name.clone(),
            origin: self.origin.clone(),
            error,
        })?;
        *loaded = Some(plugin.clone());
        Ok(plugin)
    }
}
