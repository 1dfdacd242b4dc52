//! What a requester's DMA is to get: a plugin's answer with its formats opened.

use std::fmt;

use crate::plugin::{Outcome, TableConfig};
use crate::table::{Format, Intercept, Window};
use crate::{Attributes, Span};

/// What a requester's DMA is to get.
pub struct Way {
    pub(super) stages: Stages,
    pub(super) intercepts: Vec<Intercept>,
}

/// What stands between a requester and memory.
pub(super) enum Stages {
    Blocked,
    Direct(Vec<Window>),
    One(Box<dyn Format>),
    Two { first: Box<dyn Format>, second: Box<dyn Format> },
}

impl fmt::Debug for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stages: &dyn fmt::Debug = match &self.stages {
            Stages::Blocked => &"blocked",
            Stages::Direct(windows) => windows,
            Stages::One(_) => &"one table",
            Stages::Two { .. } => &"two tables",
        };
        f.debug_struct("Way").field("stages", stages).field("intercepts", &self.intercepts).finish()
    }
}

impl Way {
    const fn new(stages: Stages) -> Self {
        Self { stages, intercepts: Vec::new() }
    }

    /// Nothing.
    #[must_use]
    pub const fn blocked() -> Self {
        Self::new(Stages::Blocked)
    }

    /// Guest memory as it is: one window over all of it, to read and to write.
    #[must_use]
    pub fn bypass() -> Self {
        let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
        Self::direct(vec![Window { iova: Span::ALL, address: 0, attributes }])
    }

    /// Guest memory through windows. Those that overlap an earlier one, and those that do not end on both sides, are closed; IOVAs in none fault.
    #[must_use]
    pub fn direct(mut windows: Vec<Window>) -> Self {
        windows.sort_by_key(|window| window.iova);
        let mut last: Option<u64> = None;
        windows.retain(|window| {
            let ends = window.address.checked_add(window.iova.length_minus_one()).is_some();
            let apart = last.is_none_or(|last| last < window.iova.first);
            if ends && apart {
                last = Some(window.iova.last);
            }
            ends && apart
        });
        Self::new(Stages::Direct(windows))
    }

    /// What one table says.
    #[must_use]
    pub fn table(format: Box<dyn Format>) -> Self {
        Self::new(Stages::One(format))
    }

    /// What two tables say: the outputs of the first, and the addresses of its tables, are inputs of the second.
    #[must_use]
    pub fn tables(first: Box<dyn Format>, second: Box<dyn Format>) -> Self {
        Self::new(Stages::Two { first, second })
    }

    /// The same, without addresses that something else serves: nothing is mapped there.
    #[must_use]
    pub fn with_intercepts(self, intercepts: Vec<Intercept>) -> Self {
        Self { intercepts, ..self }
    }

    /// What a plugin found; `open` opens the format of a table.
    ///
    /// # Errors
    /// Those of `open`.
    pub fn of<E>(outcome: &Outcome, mut open: impl FnMut(&TableConfig) -> Result<Box<dyn Format>, E>) -> Result<Self, E> {
        Ok(match outcome {
            Outcome::Bypass => Self::bypass(),
            Outcome::Blocked(_) => Self::blocked(),
            Outcome::Direct(direct) => Self::direct(direct.windows.clone()).with_intercepts(direct.intercepts.clone()),
            Outcome::Tables(translated) => {
                let way = match translated.tables.as_slice() {
                    [] => Self::blocked(),
                    [table] => Self::table(open(table)?),
                    // There are never more than two.
                    [first, second, ..] => Self::tables(open(first)?, open(second)?),
                };
                way.with_intercepts(translated.intercepts.clone())
            }
        })
    }
}

impl From<Box<dyn Format>> for Way {
    fn from(format: Box<dyn Format>) -> Self {
        Self::table(format)
    }
}
