//! One plugin instance in one `Store`: the fault domain. After a trap the Store is of no more use, and every later call answers the same error.

use rustix::time::{ClockId, clock_gettime};
use std::sync::Arc;
use std::time::{Duration, Instant};
use wasmtime::{PoolConcurrencyLimitError, Store, Trap, UpdateDeadline};

use crate::plugin::bindings::stagecraft::format::{guest_memory, log, notes, types};
use crate::plugin::instance::DetectMemory;
use crate::plugin::{CallError, Engine, Limits, Notes, Plugin, bindings, error, words};

/// What the imports of one instance work on.
pub(super) struct State {
    pub(super) plugin: Arc<str>,
    pub(super) memory: Option<Box<dyn DetectMemory>>,
    /// There while a `lookup` runs.
    pub(super) notes: Option<Notes>,
    limits: Arc<Limits>,
    said: Option<String>,
    memory_denied: Option<usize>,
    timer: Timer,
    reads: u32,
    log: LogBudget,
}

impl State {
    fn new(plugin: Arc<str>, limits: Arc<Limits>) -> Self {
        let log = LogBudget { started: Instant::now(), left: limits.log_messages, dropped: 0 };
        Self { plugin, memory: None, notes: None, limits, said: None, memory_denied: None, timer: Timer::default(), reads: 0, log }
    }

    /// Host work on behalf of the plugin, which its deadline does not count.
    fn host_work<R>(&mut self, work: impl FnOnce(&mut dyn DetectMemory) -> R) -> Option<R> {
        let memory = self.memory.as_deref_mut()?;
        self.reads = self.reads.checked_add(1).filter(|&reads| reads <= MAX_READS)?;
        let before = thread_time();
        let result = work(memory);
        self.timer.host += thread_time().saturating_sub(before);
        Some(result)
    }
}

/// Processor time of this thread.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

/// The deadline of one call, in processor time: a plugin is not to blame when the machine runs something else. The clock is read only when a
/// tick arrives during the call, so that a short call never pays for it.
#[derive(Default)]
struct Timer {
    limit: Duration,
    /// Thread time and host work at the first tick of this call.
    first: Option<(Duration, Duration)>,
    host: Duration,
    expired: bool,
}

impl Timer {
    fn tick(&mut self) -> UpdateDeadline {
        let now = thread_time();
        let (first, host) = *self.first.get_or_insert((now, self.host));
        if now.saturating_sub(first).saturating_sub(self.host.saturating_sub(host)) < self.limit {
            return UpdateDeadline::Continue(1);
        }
        self.expired = true;
        UpdateDeadline::Interrupt
    }
}

struct LogBudget {
    started: Instant,
    left: u32,
    dropped: u64,
}

impl LogBudget {
    /// Whether one more message passes, and how many were dropped before it.
    fn take(&mut self, per_second: u32) -> Option<u64> {
        if self.left == 0 {
            if self.started.elapsed() < Duration::from_secs(1) {
                self.dropped += 1;
                return None;
            }
            *self = Self { started: Instant::now(), left: per_second, dropped: self.dropped };
        }
        self.left = self.left.checked_sub(1)?;
        Some(std::mem::take(&mut self.dropped))
    }
}

impl log::Host for State {
    fn write(&mut self, level: log::Level, message: String) {
        let plugin = &*self.plugin;
        let message = error::clean(&message);
        if level == log::Level::Panic {
            self.said = Some(message);
            return;
        }
        match self.log.take(self.limits.log_messages) {
            None => return,
            Some(0) => {}
            Some(dropped) => tracing::warn!(plugin, dropped, "the plugin logs too much"),
        }
        match level {
            log::Level::Error => tracing::error!(plugin, "{message}"),
            log::Level::Warning => tracing::warn!(plugin, "{message}"),
            log::Level::Info | log::Level::Panic => tracing::info!(plugin, "{message}"),
        }
    }
}

/// Most bytes of one read; the WIT says so.
const MAX_READ: u32 = 4096;
/// Most reads of one call: four times what a scan of all 2^20 PASIDs takes. The lender's own budget is usually tighter.
const MAX_READS: u32 = 65_536;

impl guest_memory::Host for State {
    fn read(&mut self, address: u64, length: u32) -> Option<Vec<u8>> {
        if length > MAX_READ {
            return None;
        }
        let bytes = self.host_work(|memory| memory.read(address, length))??;
        (bytes.len() == length as usize).then_some(bytes)
    }

    fn read_through(&mut self, table: types::TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
        if length > MAX_READ {
            return None;
        }
        let table = words::table_config(table).ok()?;
        let bytes = self.host_work(|memory| memory.read_through(&table, address, length))??;
        (bytes.len() == length as usize).then_some(bytes)
    }
}

impl notes::Host for State {
    fn add(&mut self, note: notes::Note) {
        if let Some(notes) = &mut self.notes {
            notes.add(&note);
        }
    }
}

impl types::Host for State {}

impl wasmtime::ResourceLimiter for State {
    fn memory_growing(&mut self, _: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let limit = maximum.unwrap_or(usize::MAX).min(self.limits.memory_bytes);
        if desired > limit {
            self.memory_denied = Some(limit);
        }
        Ok(desired <= limit)
    }

    fn table_growing(&mut self, _: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= maximum.unwrap_or(usize::MAX).min(super::admission::MAX_CORE_TABLE_ENTRIES))
    }
}

/// How long a call may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    Cold,
    Warm,
}

/// An instance in its Store, and the one way to call it.
pub(super) struct Sandbox {
    engine: Engine,
    pub(super) store: Store<State>,
    exports: bindings::Plugin,
    failed: Option<CallError>,
    calls: u64,
}

impl Sandbox {
    pub(super) fn new(plugin: &Plugin) -> Result<Self, CallError> {
        let engine = plugin.engine();
        let state = State::new(plugin.shared_name(), engine.shared_limits());
        let mut store = Store::new(engine.wasmtime(), state);
        store.limiter(|state| state);
        store.set_hostcall_fuel(engine.limits().answer_bytes);
        store.epoch_deadline_callback(|mut store| Ok(store.data_mut().timer.tick()));
        begin(&mut store, engine.limits().cold);
        let in_flight = engine.enter();
        let exports = plugin.pre().instantiate(&mut store).map_err(|error| failure(&store, &error))?;
        drop(in_flight);
        Ok(Self { engine: engine.clone(), store, exports, failed: None, calls: 0 })
    }

    /// One call. A call that fails leaves nothing usable behind.
    pub(super) fn call<R>(
        &mut self,
        pace: Pace,
        call: impl FnOnce(&bindings::Plugin, &mut Store<State>) -> wasmtime::Result<R>,
    ) -> Result<R, CallError> {
        if let Some(failed) = &self.failed {
            return Err(failed.clone());
        }
        self.calls += 1;
        let limits = self.engine.limits();
        begin(&mut self.store, if pace == Pace::Warm { limits.warm } else { limits.cold });
        let _in_flight = self.engine.enter();
        call(&self.exports, &mut self.store).map_err(|error| {
            let error = failure(&self.store, &error);
            tracing::warn!(plugin = &*self.store.data().plugin, %error, "a plugin failed");
            self.failed = Some(error.clone());
            error
        })
    }

    /// Calls made so far.
    pub(super) const fn calls(&self) -> u64 {
        self.calls
    }

    /// Why nothing works any more.
    pub(super) const fn failed(&self) -> Option<&CallError> {
        self.failed.as_ref()
    }

    pub(super) fn plugin(&self) -> Arc<str> {
        Arc::clone(&self.store.data().plugin)
    }

    pub(super) fn nonsense(&self, what: impl Into<String>) -> CallError {
        CallError::Nonsense { plugin: self.plugin(), what: what.into() }
    }

    /// A plugin's own refusal.
    pub(super) fn refused(&self, error: types::Error) -> CallError {
        CallError::Refused { plugin: self.plugin(), refusal: words::refusal(error) }
    }
}

fn begin(store: &mut Store<State>, limit: Duration) {
    let state = store.data_mut();
    state.said = None;
    state.memory_denied = None;
    state.reads = 0;
    state.timer = Timer { limit, ..Timer::default() };
    store.set_epoch_deadline(1);
}

/// What went wrong, from what the Store knows.
fn failure(store: &Store<State>, error: &wasmtime::Error) -> CallError {
    let state = store.data();
    let plugin = Arc::clone(&state.plugin);
    if error.is::<PoolConcurrencyLimitError>() {
        return CallError::TooManyInstances { plugin, limit: state.limits.instances };
    }
    if state.timer.expired {
        return CallError::Deadline { plugin, limit: state.timer.limit };
    }
    match error.downcast_ref::<Trap>() {
        Some(_) if state.memory_denied.is_some() && state.said.is_none() => {
            CallError::MemoryCap { plugin, limit: state.memory_denied.unwrap_or_default() }
        }
        Some(trap) => CallError::Trap { plugin, text: state.said.clone().unwrap_or_else(|| trap.to_string()) },
        // Not a trap: Wasmtime could not read the answer, or what was handed to an import. It has no type for that, but says why.
        None => CallError::Nonsense { plugin, what: error::clean(&format!("an answer that cannot be read: {}", error.root_cause())) },
    }
}
