//! Another version of a plugin takes over while guests run: only if it says what the old one said.

use std::sync::PoisonError;

use crate::plugin::supervise::format::{Answer, Question, put};
use crate::plugin::supervise::{Supervisor, Version, lock};
use crate::plugin::{CallError, Plugin, TableConfig};

/// What a new version says otherwise than the old one did: the first that was found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// It describes other tables for a configuration that is in use.
    #[error("{config}: the geometry is another")]
    Geometry {
        /// The configuration.
        config: TableConfig,
    },
    /// It answers a question otherwise.
    #[error("{format}: {question}: was {old}, is {new}")]
    Answer {
        /// Full name of the format.
        format: String,
        /// The question.
        question: Question,
        /// What is remembered.
        old: Answer,
        /// What it says.
        new: Answer,
    },
}

/// A new version was not taken. The old one goes on as if nothing had been.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum ReplaceError {
    /// It is another plugin.
    #[error("plugin {new} is no version of plugin {old}")]
    Name {
        /// The one in use.
        old: String,
        /// The one that was given.
        new: String,
    },
    /// It failed, or refused a configuration that is in use.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It disagrees.
    #[error(transparent)]
    Differs(#[from] Difference),
}

impl Supervisor {
    /// Lets another version of the plugin take over: from then on everything is asked of it, and earlier failures are forgiven.
    ///
    /// It must give the same geometry for every configuration in use, and the same answer to every question whose answer is remembered. What is remembered of
    /// each format is bounded; of the patterns beyond that nobody remembers what they were.
    ///
    /// # Errors
    /// It disagrees, fails or refuses; nothing changed.
    pub fn replace(&self, plugin: Plugin) -> Result<(), ReplaceError> {
        // Nothing is opened or asked meanwhile.
        let mut cold = lock(&self.0.cold);
        let mut version = self.0.versions.write().unwrap_or_else(PoisonError::into_inner);
        if version.plugin.name() != plugin.name() {
            return Err(ReplaceError::Name { old: version.plugin.name().to_owned(), new: plugin.name().to_owned() });
        }
        let live = self.0.live();
        for entry in &live {
            let mut format = plugin.open(&entry.config)?;
            if *format.geometry_ref() != entry.geometry {
                return Err(Difference::Geometry { config: entry.config.clone() }.into());
            }
            let inner = lock(&entry.inner);
            let mut remembered: Vec<(Question, Answer)> = inner.answers.iter().map(|(question, answer)| (*question, *answer)).collect();
            remembered.sort_unstable_by_key(|(question, _)| *question);
            for (question, old) in remembered {
                let new = put(&mut format, question)?;
                if new != old {
                    return Err(Difference::Answer { format: entry.config.format.clone(), question, old, new }.into());
                }
            }
        }
        for entry in &live {
            entry.retire(&mut lock(&entry.inner));
        }
        *cold = None;
        *version = Version { plugin, number: version.number + 1 };
        drop(version);
        self.0.forgive();
        let mut state = lock(&self.0.state);
        state.failing = false;
        state.figures.replacements += 1;
        Ok(())
    }
}
