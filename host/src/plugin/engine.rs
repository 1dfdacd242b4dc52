//! The engine: one Wasmtime engine with what plugins need and nothing else, its clock and its cache.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::sync::Arc;
use wasmtime::component::{HasSelf, Linker};
use wasmtime::{InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::plugin::cache::{Cache, CacheError};
use crate::plugin::store::State;
use crate::plugin::ticker::{Clock, InFlight};
use crate::plugin::{Limits, Ticker, admission, bindings};

/// How an [`Engine`] is set up.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Config {
    /// Directory for compiled plugins; it must be this user's alone and is created if it is missing. None: plugins are compiled at every start.
    pub cache: Option<PathBuf>,
    /// What a plugin may use.
    pub limits: Limits,
    /// Who measures the time of a call.
    pub ticker: Ticker,
    /// Threads that compile a plugin. With one, the caller's thread does it; more are started for each plugin and end with it.
    pub compile_threads: NonZeroUsize,
    /// Plugins are compiled with optimisation: it takes more than twice as long, once for each plugin and cache, and calls are about a quarter faster. Worth it
    /// for who decodes raw commands of a running guest; nothing else asks plugins often.
    pub optimise: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { cache: None, limits: Limits::default(), ticker: Ticker::default(), compile_threads: NonZeroUsize::MIN, optimise: false }
    }
}

impl Config {
    /// With a directory for compiled plugins.
    #[must_use]
    pub fn with_cache(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cache = Some(directory.into());
        self
    }

    /// With other limits.
    #[must_use]
    pub fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// With another ticker.
    #[must_use]
    pub fn with_ticker(mut self, ticker: Ticker) -> Self {
        self.ticker = ticker;
        self
    }

    /// With so many threads to compile a plugin.
    #[must_use]
    pub fn with_compile_threads(mut self, threads: NonZeroUsize) -> Self {
        self.compile_threads = threads;
        self
    }

    /// With plugins that are compiled with optimisation, or without.
    #[must_use]
    pub fn with_optimisation(mut self, optimise: bool) -> Self {
        self.optimise = optimise;
        self
    }
}

/// The engine could not be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Limits that Wasmtime cannot keep on this machine, such as more address space than there is.
    #[error("the plugin engine cannot be set up: {reason}")]
    Setup {
        /// Wasmtime's words.
        reason: String,
    },
    /// The ticker's thread could not be started.
    #[error("the plugin engine's thread cannot be started: {0}")]
    Thread(std::io::Error),
    /// The cache is not fit for use.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// Compiles and runs plugins. Cheap to clone; all clones are the same engine.
#[derive(Clone, Debug)]
pub struct Engine(Arc<Inner>);

struct Inner {
    wasmtime: wasmtime::Engine,
    linker: Linker<State>,
    clock: Clock,
    cache: Option<Cache>,
    limits: Arc<Limits>,
    #[cfg(feature = "compile")]
    compile_threads: NonZeroUsize,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("limits", &self.limits).field("cache", &self.cache).finish_non_exhaustive()
    }
}

impl Engine {
    /// Sets up an engine. Starts a thread if `config` says so, and touches the cache's directory.
    ///
    /// # Errors
    /// [`EngineError`], with what stands in the way.
    pub fn new(config: Config) -> Result<Self, EngineError> {
        let setup = |error: wasmtime::Error| EngineError::Setup { reason: format!("{error:#}") };
        let cache = config.cache.as_deref().map(|path| Cache::open(path, &form(&config))).transpose()?;
        let wasmtime = wasmtime::Engine::new(&settings(&config)).map_err(setup)?;
        let mut linker = Linker::new(&wasmtime);
        bindings::Plugin::add_to_linker::<State, HasSelf<State>>(&mut linker, |state| state).map_err(setup)?;
        let clock = Clock::new(config.ticker, wasmtime.clone()).map_err(EngineError::Thread)?;
        Ok(Self(Arc::new(Inner {
            wasmtime,
            linker,
            clock,
            cache,
            limits: Arc::new(config.limits),
            #[cfg(feature = "compile")]
            compile_threads: config.compile_threads,
        })))
    }

    /// Advances the clock of [`Ticker::Embedder`]: call it about every millisecond while calls are in flight, from any thread or signal handler.
    pub fn tick(&self) {
        self.0.wasmtime.increment_epoch();
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> &Limits {
        &self.0.limits
    }

    pub(super) fn shared_limits(&self) -> Arc<Limits> {
        Arc::clone(&self.0.limits)
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.wasmtime
    }

    pub(super) fn linker(&self) -> &Linker<State> {
        &self.0.linker
    }

    pub(super) fn cache(&self) -> Option<&Cache> {
        self.0.cache.as_ref()
    }

    #[cfg(feature = "compile")]
    pub(super) fn compile_threads(&self) -> NonZeroUsize {
        self.0.compile_threads
    }

    pub(super) fn enter(&self) -> InFlight<'_> {
        self.0.clock.enter()
    }
}

/// What of the configuration is in compiled code: with another, an entry of the cache is no use.
fn form(config: &Config) -> String {
    format!("m{:x}{}", config.limits.memory_bytes, if config.optimise { "-optimised" } else { "" })
}

/// Everything off that plugins do not need: what does not exist has no bugs.
fn settings(config: &Config) -> wasmtime::Config {
    let limits = &config.limits;
    let mut settings = wasmtime::Config::new();
    settings
        .wasm_component_model(true)
        // Component model async is not for us; without it calls are three times faster.
        .concurrency_support(false)
        .gc_support(false)
        .wasm_tail_call(false)
        .wasm_multi_memory(false)
        .wasm_memory64(false)
        .wasm_simd(false)
        .wasm_relaxed_simd(false)
        .wasm_custom_page_sizes(false)
        .wasm_wide_arithmetic(false)
        .shared_memory(false)
        // No handlers for SIGSEGV, SIGILL and SIGFPE in the VMM's process: see the module's documentation.
        .signals_based_traps(false)
        .memory_reservation(limits.memory_bytes as u64)
        .memory_guard_size(0)
        .memory_reservation_for_growth(0)
        .memory_may_move(false)
        .epoch_interruption(true)
        // Nobody reads a plugin's stack: smaller artefacts load faster.
        .generate_address_map(false)
        .native_unwind_info(false)
        .wasm_backtrace_max_frames(None)
        .max_wasm_stack(limits.stack_bytes)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool(limits)));
    // A plugin is asked a few dozen times per table and its answers are remembered: code that is there sooner is worth more than code that is faster.
    #[cfg(feature = "compile")]
    {
        settings.parallel_compilation(config.compile_threads.get() > 1);
        if !config.optimise {
            settings.cranelift_opt_level(wasmtime::OptLevel::None).cranelift_regalloc_algorithm(wasmtime::RegallocAlgorithm::SinglePass);
        }
    }
    settings
}

fn pool(limits: &Limits) -> PoolingAllocationConfig {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(limits.instances)
        .total_core_instances(limits.instances.saturating_mul(4))
        .total_memories(limits.instances)
        .total_tables(limits.instances.saturating_mul(3))
        .max_core_instances_per_component(admission::MAX_CORE_INSTANCES)
        .max_memories_per_component(1)
        .max_tables_per_component(admission::MAX_CORE_TABLES)
        .max_memories_per_module(1)
        .max_tables_per_module(2)
        .table_elements(admission::MAX_CORE_TABLE_ENTRIES)
        .max_memory_size(limits.memory_bytes)
        .max_unused_warm_slots(limits.instances.min(16))
        .linear_memory_keep_resident(64 << 10);
    pool
}
