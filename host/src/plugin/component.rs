//! A plugin: admitted, compiled, linked, ready to be instantiated.

use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use wasmtime::component::Component;

use crate::plugin::store::State;
use crate::plugin::{CallError, Engine, Instance, LoadError, Manifest, PluginFormat, TableConfig, admission, bindings};

/// A plugin that is ready for use. Cheap to clone.
#[derive(Clone)]
pub struct Plugin(Arc<Inner>);

struct Inner {
    engine: Engine,
    name: Arc<str>,
    manifest: Manifest,
    content: [u8; 32],
    pre: bindings::PluginPre<State>,
}

impl std::fmt::Debug for Plugin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Plugin").field("name", &self.name()).field("content", &self.content_hash()).finish_non_exhaustive()
    }
}

impl Plugin {
    /// Admits the component in `bytes` and makes it ready: from the engine's cache, or else by compiling it (and filling the cache).
    ///
    /// # Errors
    /// [`LoadError`]: everything but [`LoadError::Compile`], [`LoadError::Contract`], [`LoadError::NotCompiled`] and [`LoadError::Cache`] is found before
    /// anything is compiled.
    pub fn load(engine: &Engine, bytes: &[u8]) -> Result<Self, LoadError> {
        let manifest = admission::admit(bytes, engine.limits())?;
        Self::load_admitted(engine, bytes, manifest)
    }

    pub(super) fn load_admitted(engine: &Engine, bytes: &[u8], manifest: Manifest) -> Result<Self, LoadError> {
        let content: [u8; 32] = Sha256::digest(bytes).into();
        let cached = match engine.cache() {
            Some(cache) => cache.get(engine.wasmtime(), &content)?,
            None => None,
        };
        let component = match cached {
            Some(component) => component,
            None => compile(engine, bytes, &content)?,
        };
        let contract = |error: wasmtime::Error| LoadError::Contract { reason: super::error::clean(&format!("{error:#}")) };
        let pre = engine.linker().instantiate_pre(&component).map_err(contract)?;
        let pre = bindings::PluginPre::new(pre).map_err(contract)?;
        let name = Arc::from(&*manifest.name);
        Ok(Self(Arc::new(Inner { engine: engine.clone(), name, manifest, content, pre })))
    }

    /// Name in the manifest.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What the plugin says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.0.manifest
    }

    /// Hex SHA-256 of the component: what went in, for logs and for comparing two hosts before a migration.
    #[must_use]
    pub fn content_hash(&self) -> String {
        super::hex(&self.0.content)
    }

    /// The engine that it runs on.
    #[must_use]
    pub fn engine(&self) -> &Engine {
        &self.0.engine
    }

    /// A fresh instance, for the cold questions.
    ///
    /// # Errors
    /// [`CallError`] if it traps or takes too long on the way up, or if there is no room.
    pub fn instantiate(&self) -> Result<Instance, CallError> {
        Instance::new(self)
    }

    /// A format under one configuration, in an instance of its own.
    ///
    /// # Errors
    /// [`CallError::Refused`] with the setting's name if the configuration is inconsistent, [`CallError::Unknown`] if the manifest does not name the
    /// format, [`CallError::Nonsense`] if the geometry is one that no table can have, and everything that can go wrong with a call.
    pub fn open(&self, table: &TableConfig) -> Result<PluginFormat, CallError> {
        PluginFormat::open(self, table)
    }

    pub(super) fn shared_name(&self) -> Arc<str> {
        Arc::clone(&self.0.name)
    }

    pub(super) fn pre(&self) -> &bindings::PluginPre<State> {
        &self.0.pre
    }

    /// Refuses a format that the manifest does not name.
    pub(super) fn check_format(&self, format: &str) -> Result<(), CallError> {
        if self.manifest().format(format).is_some() {
            return Ok(());
        }
        let known = self.manifest().formats.iter().map(|format| &*format.name).collect::<Vec<_>>().join(", ");
        Err(CallError::Unknown { plugin: self.shared_name(), what: "table format", name: super::error::clean(format), known })
    }
}

#[cfg(feature = "compile")]
fn compile(engine: &Engine, bytes: &[u8], content: &[u8; 32]) -> Result<Component, LoadError> {
    let refused = |error: wasmtime::Error| LoadError::Compile { reason: super::error::clean(&format!("{error:#}")) };
    let component = on_threads(engine.compile_threads().get(), || Component::from_binary(engine.wasmtime(), bytes))?.map_err(refused)?;
    if let Some(cache) = engine.cache() {
        cache.put(content, &component.serialize().map_err(refused)?)?;
    }
    Ok(component)
}

/// Runs `work` where Wasmtime finds this many threads, which are gone when it returns: none outlives the compilation, and the process-wide pool is not touched.
#[cfg(feature = "compile")]
fn on_threads<T: Send>(threads: usize, work: impl FnOnce() -> T + Send) -> Result<T, LoadError> {
    if threads == 1 {
        return Ok(work());
    }
    let name = |index| format!("stagecraft-compile-{index}");
    let started = |error: rayon::ThreadPoolBuildError| LoadError::Compile { reason: format!("its threads cannot be started: {error}") };
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).thread_name(name).build().map_err(started)?;
    Ok(pool.install(work))
}

#[cfg(not(feature = "compile"))]
fn compile(_: &Engine, _: &[u8], _: &[u8; 32]) -> Result<Component, LoadError> {
    Err(LoadError::NotCompiled)
}
