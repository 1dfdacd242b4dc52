//! A plugin in the life of a guest: what happens when it fails, and how a new version takes its place.
//!
//! ```text
//!    good answers                       a failure: the instance is dropped
//!   +----------+     +--------+ ----------------------------------------> +---------+
//!   |          v     |        |                                           | Waiting | so many operations are refused without a call,
//!   +--------- |  Working     | <---------------------------------------- |         | twice as many after each further failure
//!              +-----+--------+   a fresh instance answers                +----+----+
//!                    ^                                                        | failures without enough good answers between them
//!                    |        lift, or another version takes over             v
//!                    +------------------------------------------------ Quarantined: no instance is made any more
//! ```
//!
//! Whoever asks gets an error meanwhile, which blocks what was asked about and nothing else: every answer that was given is remembered and still given.
//! A question that one instance after the other fails on is not asked again, so that a guest that found such a pattern cannot take the plugin from the
//! other patterns.
//!
//! There is no clock here: waiting is counted in operations. [`Supervisor::pass`] counts one that asked nothing.

mod all;
mod format;
mod replace;

pub use all::{OpenFormatError, Supervisors};
pub use format::{Answer, Question, Supervised};
pub use replace::{Difference, ReplaceError};

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};

use crate::plugin::{CallError, Instance, Plugin, TableConfig};
use format::Entry;

/// When a plugin that fails gets another chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Failures, with fewer than [`Policy::forgiven_after`] good answers after each, that put a plugin into quarantine.
    pub failures: u32,
    /// Good answers in a row after which earlier failures do not count any more.
    pub forgiven_after: u32,
    /// Operations that are refused after the first failure; twice as many after each further one.
    pub first_wait: u64,
    /// Most operations that are refused after one failure.
    pub longest_wait: u64,
    /// Instances that may fail on one and the same question before it is not asked any more.
    pub attempts: u32,
    /// Formats that have an instance at the same time; one that was not asked for longest gives its own up when another needs one. See
    /// [`Limits::instances`](super::Limits::instances), which is for all plugins together.
    pub instances: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self { failures: 8, forgiven_after: 1024, first_wait: 1, longest_wait: 1024, attempts: 2, instances: 64 }
    }
}

/// Whether a plugin is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// It is.
    Working,
    /// It failed, and so many operations pass before a fresh instance is made.
    Waiting(u64),
    /// It failed too often: no instance is made before somebody calls [`Supervisor::lift`] or [`Supervisor::replace`].
    Quarantined,
}

/// What happened so far. Counts only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SupervisorFigures {
    /// Failures of the plugin: traps, deadlines, memory, nonsense.
    pub failures: u64,
    /// Instances that were made, for formats and for cold questions.
    pub instances: u64,
    /// Questions that an instance was asked.
    pub asked: u64,
    /// Instances that answered well after a failure.
    pub recoveries: u64,
    /// Questions that were answered from memory although a format was asked.
    pub remembered: u64,
    /// Operations that were refused because the plugin failed before.
    pub refused: u64,
    /// How often it was put into quarantine.
    pub quarantines: u64,
    /// Versions that took the place of another.
    pub replacements: u64,
}

/// Why a supervised plugin did not answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum SuperviseError {
    /// It failed now, or refused what it was asked.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It failed before, and is given time.
    #[error("plugin {plugin} failed; {left} more operations pass before it is tried again")]
    Waiting {
        /// Its name.
        plugin: Arc<str>,
        /// How many.
        left: u64,
    },
    /// It failed too often.
    #[error("plugin {plugin} is in quarantine after {failures} failures; the last one: {last}")]
    Quarantined {
        /// Its name.
        plugin: Arc<str>,
        /// How many.
        failures: u64,
        /// The last one.
        last: Box<CallError>,
    },
    /// Instances failed on this very question.
    #[error("plugin {plugin} is not asked about {question} any more: it failed on that {attempts} times")]
    Hopeless {
        /// Its name.
        plugin: Arc<str>,
        /// The question.
        question: Question,
        /// How often.
        attempts: u32,
    },
}

impl SuperviseError {
    /// The plugin is at fault or out of use, so that another try later may have an answer. Otherwise it answered: with a refusal.
    #[must_use]
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Call(error) => is_failure(error) || matches!(error, CallError::TooManyInstances { .. }),
            Self::Waiting { .. } | Self::Quarantined { .. } | Self::Hopeless { .. } => true,
        }
    }
}

/// Whether an error is the plugin's failure, and not a refusal or the caller's doing.
pub(super) const fn is_failure(error: &CallError) -> bool {
    matches!(error, CallError::Trap { .. } | CallError::Deadline { .. } | CallError::MemoryCap { .. } | CallError::Nonsense { .. })
}

/// One plugin, and all that was opened of it for one guest. Clones are the same supervisor.
///
/// One supervisor per guest: what a guest provokes counts against its own.
#[derive(Clone, Debug)]
pub struct Supervisor(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    policy: Policy,
    // Locked in this order: `cold`, `versions`, an entry of `formats`, `state`.
    /// Written while another version takes over: nothing is opened meanwhile.
    versions: RwLock<Version>,
    state: Mutex<State>,
    /// For the cold questions, with the number of the version that it is of.
    cold: Mutex<Option<(u64, Instance)>>,
    formats: Mutex<Vec<Weak<Entry>>>,
    /// Counts uses, to know who was not used for longest.
    uses: AtomicU64,
}

#[derive(Clone, Debug)]
struct Version {
    plugin: Plugin,
    number: u64,
}

#[derive(Debug, Default)]
struct State {
    /// Failures that count.
    strikes: u32,
    /// Good answers since the last failure.
    good: u32,
    /// Operations that are still refused.
    wait: u64,
    quarantined: bool,
    last: Option<CallError>,
    /// It failed, and no fresh instance has answered yet.
    failing: bool,
    figures: SupervisorFigures,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Supervisor {
    /// Supervises `plugin`.
    #[must_use]
    pub fn new(plugin: Plugin, policy: Policy) -> Self {
        Self(Arc::new(Shared {
            policy,
            versions: RwLock::new(Version { plugin, number: 0 }),
            state: Mutex::default(),
            cold: Mutex::default(),
            formats: Mutex::default(),
            uses: AtomicU64::new(0),
        }))
    }

    /// The version that is asked.
    #[must_use]
    pub fn plugin(&self) -> Plugin {
        self.0.version().plugin.clone()
    }

    /// A format of it under one configuration.
    ///
    /// # Errors
    /// As [`Plugin::open`], or it failed before.
    pub fn open(&self, config: &TableConfig) -> Result<Supervised, SuperviseError> {
        Supervised::open(&self.0, config)
    }

    /// Asks a cold question. The instance is kept for the next one.
    ///
    /// # Errors
    /// What `question` answers, or the plugin failed before.
    pub fn ask<R>(&self, mut question: impl FnMut(&mut Instance) -> Result<R, CallError>) -> Result<R, SuperviseError> {
        // A question may open formats: it holds no version.
        let mut cold = lock(&self.0.cold);
        let version = self.0.version().clone();
        if cold.as_ref().is_none_or(|(number, _)| *number != version.number) {
            *cold = None;
            let instance = self.0.instantiate(&version, Plugin::instantiate)?;
            *cold = Some((version.number, instance));
        }
        let Some((_, instance)) = cold.as_mut() else { return Err(self.0.refuse(&version)) };
        let answer = question(instance);
        if instance.failed().is_some() || answer.as_ref().is_err_and(is_failure) {
            *cold = None;
        }
        match answer {
            Ok(answer) => {
                self.0.succeeded();
                Ok(answer)
            }
            Err(error) => {
                self.0.heard(&error);
                Err(error.into())
            }
        }
    }

    /// Whether it is asked.
    #[must_use]
    pub fn health(&self) -> Health {
        let state = lock(&self.0.state);
        match (state.quarantined, state.wait) {
            (true, _) => Health::Quarantined,
            (false, 0) => Health::Working,
            (false, wait) => Health::Waiting(wait),
        }
    }

    /// It failed, and no instance has answered since.
    #[must_use]
    pub fn is_failing(&self) -> bool {
        lock(&self.0.state).failing
    }

    /// An operation passes that asks nothing: it counts where the plugin waits.
    pub fn pass(&self) {
        let mut state = lock(&self.0.state);
        state.wait = state.wait.saturating_sub(1);
    }

    /// Forgives all failures, ends the quarantine, and asks questions again that instances failed on.
    pub fn lift(&self) {
        self.0.forgive();
        self.0.live().iter().for_each(|entry| entry.forgive());
    }

    /// What happened so far.
    #[must_use]
    pub fn figures(&self) -> SupervisorFigures {
        lock(&self.0.state).figures
    }
}

impl Shared {
    fn version(&self) -> RwLockReadGuard<'_, Version> {
        self.versions.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Formats that somebody still has.
    fn live(&self) -> Vec<Arc<Entry>> {
        let mut formats = lock(&self.formats);
        formats.retain(|entry| entry.strong_count() > 0);
        formats.iter().filter_map(Weak::upgrade).collect()
    }

    /// A fresh instance of whatever, unless the plugin failed and has to wait.
    fn instantiate<R>(&self, version: &Version, make: impl Fn(&Plugin) -> Result<R, CallError>) -> Result<R, SuperviseError> {
        {
            let mut state = lock(&self.state);
            if state.quarantined || state.wait > 0 {
                let wait = state.wait;
                state.wait = wait.saturating_sub(1);
                state.figures.refused += 1;
                drop(state);
                return Err(self.refuse(version));
            }
            state.figures.instances += 1;
        }
        make(&version.plugin).map_err(|error| {
            self.heard(&error);
            error.into()
        })
    }

    /// Why nothing is asked.
    fn refuse(&self, version: &Version) -> SuperviseError {
        let state = lock(&self.state);
        let plugin = version.plugin.shared_name();
        match &state.last {
            Some(last) if state.quarantined => SuperviseError::Quarantined { plugin, failures: state.figures.failures, last: Box::new(last.clone()) },
            _ => SuperviseError::Waiting { plugin, left: state.wait },
        }
    }

    fn succeeded(&self) {
        let mut state = lock(&self.state);
        state.figures.asked += 1;
        if std::mem::take(&mut state.failing) {
            state.figures.recoveries += 1;
        }
        state.good = state.good.saturating_add(1);
        if state.good >= self.policy.forgiven_after {
            state.strikes = 0;
        }
    }

    /// An error: if it is a failure, it has consequences.
    fn heard(&self, error: &CallError) {
        let mut state = lock(&self.state);
        state.figures.asked += 1;
        if !is_failure(error) {
            return;
        }
        state.figures.failures += 1;
        state.failing = true;
        state.good = 0;
        state.strikes = state.strikes.saturating_add(1);
        state.last = Some(error.clone());
        if state.strikes >= self.policy.failures {
            state.figures.quarantines += u64::from(!state.quarantined);
            state.quarantined = true;
        }
        let doubled = self.policy.first_wait.saturating_mul(1_u64.checked_shl(state.strikes - 1).unwrap_or(u64::MAX));
        state.wait = doubled.min(self.policy.longest_wait);
    }

    fn forgive(&self) {
        let mut state = lock(&self.state);
        (state.strikes, state.good, state.wait, state.quarantined) = (0, 0, 0, false);
    }

    /// The next number for whoever is used now.
    fn stamp(&self) -> u64 {
        self.uses.fetch_add(1, Ordering::Relaxed)
    }
}
