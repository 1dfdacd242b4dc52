//! A format of a supervised plugin: its instance may fail and be made anew; what it said is kept.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use crate::Attributes;
use crate::plugin::supervise::{Shared, SuperviseError, Version, is_failure, lock};
use crate::plugin::{CallError, PluginFormat, TableConfig};
use crate::table::{Encoded, Finding, Format, FormatError, Geometry, MAX_REMEMBERED, Meaning};

/// A question to a format whose answer is remembered. `level` is an index into [`Geometry::levels`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Question {
    /// [`Format::decode`].
    Decode {
        /// Kind of table.
        level: u8,
        /// The format's word.
        inherited: u64,
        /// The entry's bits that are no address.
        pattern: u64,
    },
    /// [`Format::decode_entry`].
    DecodeEntry {
        /// Kind of table.
        level: u8,
        /// The format's word.
        inherited: u64,
        /// The entry.
        entry: u64,
    },
    /// [`Format::encode_leaf`].
    EncodeLeaf {
        /// Kind of table.
        level: u8,
        /// Size of the leaf.
        size_log2: u8,
        /// [`Attributes::bits`].
        attributes: u64,
    },
    /// [`Format::encode_table`].
    EncodeTable {
        /// Kind of table.
        level: u8,
        /// Kind of the table below.
        next: u8,
    },
}

impl fmt::Display for Question {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Decode { level, inherited, pattern } => write!(f, "level kind {level}, inherited {inherited:#x}, pattern {pattern:#x}"),
            Self::DecodeEntry { level, inherited, entry } => write!(f, "level kind {level}, inherited {inherited:#x}, entry {entry:#x}"),
            Self::EncodeLeaf { level, size_log2, attributes } => {
                write!(f, "a leaf of 2^{size_log2} bytes at level kind {level} with attributes {attributes:#x}")
            }
            Self::EncodeTable { level, next } => write!(f, "an entry of level kind {level} for a table of kind {next}"),
        }
    }
}

/// What was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To [`Question::Decode`] and [`Question::DecodeEntry`].
    Meaning(Meaning),
    /// To [`Question::EncodeLeaf`].
    Leaf(Option<Encoded>),
    /// To [`Question::EncodeTable`].
    Table(Option<u64>),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Meaning(meaning) => write!(f, "{meaning:x?}"),
            Self::Leaf(Some(leaf)) => write!(f, "pattern {:#x}, which grants `{}`", leaf.pattern, leaf.attributes),
            Self::Table(Some(entry)) => write!(f, "entry {entry:#x}"),
            Self::Leaf(None) | Self::Table(None) => f.write_str("none"),
        }
    }
}

/// Most answers that are remembered: those that the engine remembers of a table that it reads, and of one that it makes.
const MOST_ANSWERS: usize = 3 * MAX_REMEMBERED;
/// Most questions that are remembered for having no answer.
const MOST_HOPELESS: usize = 256;

/// What a format is, whether or not it has an instance.
pub(super) struct Entry {
    pub(super) config: TableConfig,
    pub(super) geometry: Geometry,
    /// There is an instance.
    open: AtomicBool,
    /// When it was asked last.
    used: AtomicU64,
    pub(super) inner: Mutex<Inner>,
}

#[derive(Default)]
pub(super) struct Inner {
    /// An instance, with the number of the version that it is of.
    instance: Option<(u64, PluginFormat)>,
    pub(super) answers: HashMap<Question, Answer>,
    /// Questions that instances failed on, and how many.
    hopeless: BTreeMap<Question, u32>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Entry {
    /// Gives up the instance.
    fn close(&self, inner: &mut Inner) {
        inner.instance = None;
        self.open.store(false, Ordering::Relaxed);
    }

    /// Asks again what instances failed on.
    pub(super) fn forgive(&self) {
        lock(&self.inner).hopeless.clear();
    }

    /// Another version is asked from now on.
    pub(super) fn retire(&self, inner: &mut Inner) {
        self.close(inner);
        inner.hopeless.clear();
    }
}

/// Puts a question to an instance.
pub(super) fn put(format: &mut PluginFormat, question: Question) -> Result<Answer, CallError> {
    let answer = match question {
        Question::Decode { level, inherited, pattern } => format.decode(level, inherited, pattern).map(Answer::Meaning),
        Question::DecodeEntry { level, inherited, entry } => format.decode_entry(level, inherited, entry).map(Answer::Meaning),
        Question::EncodeLeaf { level, size_log2, attributes } => {
            let attributes = Attributes::from_bits(attributes).unwrap_or_default();
            format.encode_leaf(level, size_log2, attributes).map(Answer::Leaf)
        }
        Question::EncodeTable { level, next } => format.encode_table(level, next).map(Answer::Table),
    };
    answer.map_err(|error| call_error(format, error))
}

/// The error of a plugin, which is what its formats answer.
fn call_error(format: &PluginFormat, error: FormatError) -> CallError {
    match error.downcast::<CallError>() {
        Ok(error) => *error,
        Err(other) => CallError::Nonsense { plugin: format.plugin().shared_name(), what: other.to_string() },
    }
}

/// A format of a supervised plugin, for the table engine.
///
/// It never fails for good: a question whose answer is known is answered, and any other gets an error while the plugin is out of use.
#[derive(Debug)]
pub struct Supervised {
    shared: Arc<Shared>,
    entry: Arc<Entry>,
}

impl Supervised {
    pub(super) fn open(shared: &Arc<Shared>, config: &TableConfig) -> Result<Self, SuperviseError> {
        let version = shared.version();
        make_room(shared, None);
        let opened = shared.instantiate(&version, |plugin| plugin.open(config))?;
        shared.succeeded();
        let entry = Arc::new(Entry {
            config: config.clone(),
            geometry: opened.geometry_ref().clone(),
            open: AtomicBool::new(true),
            used: AtomicU64::new(shared.stamp()),
            inner: Mutex::new(Inner { instance: Some((version.number, opened)), ..Inner::default() }),
        });
        lock(&shared.formats).push(Arc::downgrade(&entry));
        Ok(Self { shared: Arc::clone(shared), entry })
    }

    /// The configuration that it was opened with.
    #[must_use]
    pub fn config(&self) -> &TableConfig {
        &self.entry.config
    }

    /// The geometry, which was checked when it was opened.
    #[must_use]
    pub fn geometry_ref(&self) -> &Geometry {
        &self.entry.geometry
    }

    /// Answers that are remembered.
    #[must_use]
    pub fn answers(&self) -> usize {
        lock(&self.entry.inner).answers.len()
    }

    fn answer(&self, question: Question) -> Result<Answer, SuperviseError> {
        let version = self.shared.version();
        let mut inner = lock(&self.entry.inner);
        if let Some(known) = inner.answers.get(&question).copied() {
            lock(&self.shared.state).figures.remembered += 1;
            return Ok(known);
        }
        if let Some(attempts) = inner.hopeless.get(&question).copied().filter(|attempts| *attempts >= self.shared.policy.attempts) {
            lock(&self.shared.state).figures.refused += 1;
            return Err(SuperviseError::Hopeless { plugin: version.plugin.shared_name(), question, attempts });
        }
        let answer = self.with_instance(&version, &mut inner, |format| put(format, question));
        match &answer {
            Ok(answer) if inner.answers.len() < MOST_ANSWERS => drop(inner.answers.insert(question, *answer)),
            Err(SuperviseError::Call(error)) if is_failure(error) => {
                let room = inner.hopeless.len() < MOST_HOPELESS || inner.hopeless.contains_key(&question);
                if room {
                    *inner.hopeless.entry(question).or_default() += 1;
                }
            }
            _ => {}
        }
        answer
    }

    /// Asks the instance, which is made if there is none; one that fails is dropped.
    fn with_instance<R>(
        &self,
        version: &Version,
        inner: &mut Inner,
        ask: impl FnOnce(&mut PluginFormat) -> Result<R, CallError>,
    ) -> Result<R, SuperviseError> {
        if inner.instance.as_ref().is_none_or(|(number, _)| *number != version.number) {
            self.entry.close(inner);
            make_room(&self.shared, Some(&self.entry));
            inner.instance = Some((version.number, self.reopen(version)?));
            self.entry.open.store(true, Ordering::Relaxed);
        }
        self.entry.used.store(self.shared.stamp(), Ordering::Relaxed);
        let Some((_, format)) = inner.instance.as_mut() else { return Err(self.shared.refuse(version)) };
        match ask(format) {
            Ok(answer) => {
                self.shared.succeeded();
                Ok(answer)
            }
            Err(error) => {
                self.entry.close(inner);
                self.shared.heard(&error);
                Err(error.into())
            }
        }
    }

    /// The same format in a fresh instance. One that describes other tables than before, or refuses what it took, has failed.
    fn reopen(&self, version: &Version) -> Result<PluginFormat, SuperviseError> {
        let contradiction = |what: &str| CallError::Nonsense { plugin: version.plugin.shared_name(), what: what.to_owned() };
        self.shared.instantiate(version, |plugin| {
            let opened = match plugin.open(&self.entry.config) {
                Err(CallError::Refused { .. }) => return Err(contradiction("a configuration that it took before is refused")),
                opened => opened?,
            };
            if *opened.geometry_ref() != self.entry.geometry {
                return Err(contradiction("another geometry than before for the same configuration"));
            }
            Ok(opened)
        })
    }
}

/// Gives up the instances of those formats that were not asked for longest, so that one more can be made; not that of `except`.
fn make_room(shared: &Shared, except: Option<&Arc<Entry>>) {
    let mut open = shared.live();
    open.retain(|entry| entry.open.load(Ordering::Relaxed) && except.is_none_or(|except| !Arc::ptr_eq(except, entry)));
    let Some(over) = (open.len() + 1).checked_sub(shared.policy.instances.max(1)) else { return };
    open.sort_by_key(|entry| entry.used.load(Ordering::Relaxed));
    for entry in &open[..over.min(open.len())] {
        // One that is being asked at this moment keeps its own.
        if let Ok(mut inner) = entry.inner.try_lock() {
            entry.close(&mut inner);
        }
    }
}

fn nonsense(question: Question, answer: Answer) -> FormatError {
    format!("asked about {question}, the supervisor remembers {answer}").into()
}

impl Format for Supervised {
    fn geometry(&mut self) -> Result<Geometry, FormatError> {
        Ok(self.entry.geometry.clone())
    }

    fn decode(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Meaning, FormatError> {
        let question = Question::Decode { level, inherited, pattern };
        match self.answer(question)? {
            Answer::Meaning(meaning) => Ok(meaning),
            other => Err(nonsense(question, other)),
        }
    }

    fn decode_entry(&mut self, level: u8, inherited: u64, entry: u64) -> Result<Meaning, FormatError> {
        let question = Question::DecodeEntry { level, inherited, entry };
        match self.answer(question)? {
            Answer::Meaning(meaning) => Ok(meaning),
            other => Err(nonsense(question, other)),
        }
    }

    fn explain(&mut self, level: u8, inherited: u64, pattern: u64) -> Result<Vec<Finding>, FormatError> {
        let version = self.shared.version();
        let mut inner = lock(&self.entry.inner);
        let ask = |format: &mut PluginFormat| format.explain(level, inherited, pattern).map_err(|error| call_error(format, error));
        Ok(self.with_instance(&version, &mut inner, ask)?)
    }

    fn encode_leaf(&mut self, level: u8, size_log2: u8, attributes: Attributes) -> Result<Option<Encoded>, FormatError> {
        let question = Question::EncodeLeaf { level, size_log2, attributes: attributes.bits() };
        match self.answer(question)? {
            Answer::Leaf(leaf) => Ok(leaf),
            other => Err(nonsense(question, other)),
        }
    }

    fn encode_table(&mut self, level: u8, next: u8) -> Result<Option<u64>, FormatError> {
        let question = Question::EncodeTable { level, next };
        match self.answer(question)? {
            Answer::Table(entry) => Ok(entry),
            other => Err(nonsense(question, other)),
        }
    }
}
