//! Guessing which format a table of unknown origin has, and how many levels: for when the registers that say so are missing.
//!
//! # The question
//!
//! Given memory, a memory map and the address of a root, which of the installed formats, under which settings, explains what stands there? Plugins list the
//! settings that are worth trying ([`Instance::candidates`](crate::plugin::Instance::candidates)); nothing here knows a format.
//!
//! # The answer, in bits
//!
//! Every candidate is a hypothesis: *the words that a walk from this root reaches are entries of this format; all other words are anything*. The evidence
//! for it is the sum, over each word that the walk reaches, of `log2(P(word | entry) / P(word | anything))`: how many bits shorter the word can be said
//! when one knows that it is an entry. It is the usual comparison of hypotheses by likelihood, so that evidence of different candidates can be compared
//! although they reach different words, and an evidence of `n` bits means that chance would do as well once in `2^n` times.
//!
//! | word | as anything | as an entry |
//! |---|---|---|
//! | zero | 1 bit for each half of 32 bits | the same where it is absent: emptiness says nothing |
//! | a table | for each half that is not zero, 6 bits and its digits after the first: small numbers are frequent | its pattern, and which of the readable pages it points to |
//! | a leaf | the same | its pattern, and which address of the memory map it points to; 1 bit if that continues the leaf before |
//! | a fault, an address outside the memory map, a table that is part of another one | the same | 8 bits more than as anything |
//!
//! *Patterns* repeat in real tables, so they are coded adaptively, by how often each was seen at its level. A new one costs a bit for each of its bits that
//! changes the meaning, nothing for those that must be as they are, and much for a bit that is set though it changes nothing (found by flipping bits and
//! asking the format again, and compared with what the format itself makes): nobody sets bits that are ignored. That is how reserved, ignored, accessed and dirty bits tell formats apart whose entries are
//! otherwise alike. Leaves that a format calls device memory and that point to RAM, or that only privileged requests pass, cost a few bits once per pattern.
//!
//! *Depth* needs no rule of its own. Read with too few levels, tables look like leaves, and the evidence of everything below is lost. Read with too many,
//! pages of data are read as tables, or are not there. So the deepest nest that is consistent wins. A level that is skipped and a table without any entry
//! cost a few bits, because they are rare. Neighbours that point to the same table cost a few bits each, for the same reason, unless it leads to nothing: slots that
//! are not used may all lead to one such table, and it costs its bits once.
//!
//! # What it cannot tell
//!
//! A table is told only if a plugin lists a configuration that reads it, and there are at most 96 for a format. Not among Arm's are byte orders and 52-bit
//! descriptors of unusual widths, and first tables that stand at an address that only their own width allows: the likelihood has nothing to say of those. An Access flag
//! that nobody looks at (AFFD) reads as a mark of hardware's.
//!
//! Two formats whose entries are the same bits, used in the same way, cannot be told apart by any table. Candidates whose evidence lies within [`EQUAL`]
//! bits of the best get the same rank. The kind of unit, where it is known, only orders candidates of equal rank.
//!
//! # Bounds
//!
//! Each range of memory is walked once per candidate, the first time as the kind of table that it was first reached as; a table that contains itself, or
//! two that overlap, count against the candidate. All candidates are tried on a few tables, the better half of them on twice as many, and so on until few
//! remain, which are tried on many ([`Options`]): tables of some formats are so large that a few pages of them say little. A candidate with [`HOPELESS`]
//! bits against it is dropped. Equal input gives equal output.

mod evidence;
mod score;
mod words;

use crate::memory::{EntryMemory, MemoryMap, PAGE};
use crate::plugin::{CallError, Plugin, Plugins, PluginsError, TableConfig};
use crate::table::{FormatError, Nonsense};

pub use evidence::{Evidence, Faults};

use score::{Scored, Scorer};

/// Evidence, in bits, that a candidate must have to be a guess at all: chance would do as well once in 2^24 times, with hundreds of candidates tried.
pub const LEAST: f64 = 24.0;
/// Evidence, in bits, within which two candidates count as equal.
pub const EQUAL: f64 = 8.0;
/// Evidence, in bits, at which a candidate is dropped.
pub const HOPELESS: f64 = -2048.0;

/// What a page says that the memory map promises and that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// All pages that hold tables are there: whatever points to another one as a table is no entry. So it is in a snapshot.
    Against,
    /// Nothing: only a part of memory is known. So it is in a dump.
    Unknown,
}

/// Where the table is.
#[derive(Debug)]
pub struct Subject<'a, M: ?Sized> {
    /// Memory that tables are read from.
    pub memory: &'a M,
    /// Which addresses exist.
    pub map: &'a MemoryMap,
    /// Bytes of memory that can be read.
    pub readable: u64,
    /// What a page says that cannot.
    pub missing: Missing,
    /// Guest-physical address of the root.
    pub root: u64,
}

/// How to guess.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Only these formats, or formats of these plugins; empty for all.
    pub only: Vec<String>,
    /// The kind of unit, if it is known: decides the order of what is equal otherwise.
    pub unit: Option<String>,
    /// Pages of tables that each candidate is tried on first, besides those of its root.
    pub trial_pages: u64,
    /// Pages of tables that the best candidates are tried on.
    pub pages: u64,
    /// Questions to a candidate's format.
    pub questions: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { only: Vec::new(), unit: None, trial_pages: 64, pages: 4096, questions: 1 << 15 }
    }
}

/// Candidates that are tried on as many tables as there may be.
const FINALISTS: usize = 24;
/// Pages of a root that a trial does not count: 16 tables of 64 KiB side by side.
const ROOT_PAGES: u64 = 256;

/// A guess cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum GuessError {
    /// A plugin cannot be loaded.
    #[error(transparent)]
    Plugins(#[from] PluginsError),
    /// A plugin failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A plugin failed while it judged an entry.
    #[error("{format}: the format failed: {error}")]
    Format {
        /// The format.
        format: String,
        /// Why.
        error: FormatError,
    },
    /// A plugin describes a table that cannot be.
    #[error("{format}: {error}")]
    Nonsense {
        /// The format.
        format: String,
        /// Why.
        error: Nonsense,
    },
    /// There is no such format or plugin.
    #[error("no format or plugin `{name}`; there are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
}

/// One format under one configuration, and what speaks for it.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Format and settings, the root among them.
    pub config: TableConfig,
    /// 1 for the likeliest, and for all that are equal to it; then counted on.
    pub rank: u32,
    /// Levels of tables from the root to the last.
    pub levels: u8,
    /// Smallest page, in bytes.
    pub granule: u64,
    /// What speaks for it and against it.
    pub evidence: Evidence,
    /// How many other settings of the format nest in the same way and were tried.
    pub variants: u32,
}

/// What was found out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Guess {
    /// The best settings of each way to nest, likeliest first; those with rank 1 are the guess, if [`Guess::fits`].
    pub candidates: Vec<Candidate>,
    /// Everything that was tried on more than a few tables, likeliest first.
    pub all: Vec<Candidate>,
    /// Configurations that were tried.
    pub tried: u32,
    /// Whether the likeliest candidate has enough evidence.
    pub fits: bool,
}

impl Guess {
    /// The likeliest candidates: several if they cannot be told apart, none if nothing fits.
    #[must_use]
    pub fn likeliest(&self) -> &[Candidate] {
        let count = self.candidates.iter().take_while(|candidate| candidate.rank == 1).count();
        if self.fits { &self.candidates[..count] } else { &[] }
    }
}

/// A configuration that is to be tried.
struct Hypothesis {
    plugin: Plugin,
    config: TableConfig,
    /// Bits against it because others of its format are more usual.
    prior: f64,
    /// Of the unit that is known to be there.
    expected: bool,
}

/// Which installed format, under which settings, the table has.
///
/// # Errors
/// A plugin cannot be loaded or fails. That nothing fits is no error: see [`Guess::fits`].
pub fn guess<M: EntryMemory + ?Sized>(plugins: &Plugins, subject: &Subject<'_, M>, options: &Options) -> Result<Guess, GuessError> {
    let mut tried = 0;
    let mut scored: Vec<(Hypothesis, Scored)> = Vec::new();
    for hypothesis in hypotheses(plugins, options)? {
        tried += 1;
        // Settings that cannot have this root, because of its alignment or width, are no candidates.
        let Some(result) = score(&hypothesis, subject, options.trial_pages, options)? else { continue };
        scored.push((hypothesis, result));
    }
    sort(&mut scored);
    // A few pages are a quarter of one format's tables, and many of another's: nobody is dropped on so little who is not among the worse half.
    let mut pages = options.trial_pages.max(1);
    while scored.len() > FINALISTS && pages < options.pages {
        scored.truncate(scored.len().div_ceil(2).max(FINALISTS));
        pages = pages.saturating_mul(2).min(options.pages);
        again(&mut scored, subject, pages, options)?;
    }
    scored.truncate(FINALISTS);
    again(&mut scored, subject, options.pages, options)?;
    Ok(ranked(&scored, tried))
}

/// Tries those that have not seen all of their tables on so many pages, and sorts.
fn again<M: EntryMemory + ?Sized>(
    scored: &mut [(Hypothesis, Scored)],
    subject: &Subject<'_, M>,
    pages: u64,
    options: &Options,
) -> Result<(), GuessError> {
    for (hypothesis, result) in &mut *scored {
        if result.evidence.stopped.is_some()
            && result.evidence.bits > HOPELESS
            && let Some(better) = score(hypothesis, subject, pages, options)?
        {
            *result = better;
        }
    }
    sort(scored);
    Ok(())
}

fn sort(scored: &mut [(Hypothesis, Scored)]) {
    let weight = |(hypothesis, result): &(Hypothesis, Scored)| result.evidence.bits - hypothesis.prior;
    // Stable: what is equal stays in the order of the plugins' names and of their candidates.
    scored.sort_by(|a, b| weight(b).total_cmp(&weight(a)));
}

fn hypotheses(plugins: &Plugins, options: &Options) -> Result<Vec<Hypothesis>, GuessError> {
    let formats: Vec<(String, String, bool)> = plugins
        .iter()
        .flat_map(|(manifest, _)| {
            let expected = options.unit.as_ref().is_some_and(|unit| manifest.units.contains(unit));
            manifest.formats.iter().map(move |format| (manifest.name.clone(), format.name.clone(), expected))
        })
        .collect();
    if let Some(name) = options.only.iter().find(|name| !formats.iter().any(|(plugin, format, _)| plugin == *name || format == *name)) {
        let known: Vec<&str> = formats.iter().map(|(_, format, _)| &**format).collect();
        return Err(GuessError::Unknown { name: name.clone(), known: known.join(", ") });
    }
    let mut hypotheses = Vec::new();
    for (plugin, format, expected) in formats {
        if !options.only.is_empty() && !options.only.iter().any(|name| *name == plugin || *name == format) {
            continue;
        }
        let plugin = plugins.by_format(&format)?;
        for (index, settings) in plugin.instantiate()?.candidates(&format)?.into_iter().enumerate() {
            let prior = (index as f64 + 1.0).log2();
            hypotheses.push(Hypothesis { plugin: plugin.clone(), config: TableConfig { format: format.clone(), settings }, prior, expected });
        }
    }
    Ok(hypotheses)
}

/// Tries one configuration on so many pages of tables besides its root, within the budget; none if it cannot have this root.
fn score<M: EntryMemory + ?Sized>(
    hypothesis: &Hypothesis,
    subject: &Subject<'_, M>,
    pages: u64,
    options: &Options,
) -> Result<Option<Scored>, GuessError> {
    let Hypothesis { plugin, config, .. } = hypothesis;
    let failed = |error: FormatError| GuessError::Format { format: config.format.clone(), error };
    let Some(unrooted) = open(plugin, config)? else { return Ok(None) };
    let geometry = unrooted.geometry_ref();
    let Some(window) = geometry.roots.first() else { return Ok(None) };
    let too_wide = geometry.output_bits < 64 && subject.root >> geometry.output_bits != 0;
    if too_wide || !subject.root.is_multiple_of(u64::from(geometry.entry_bytes)) {
        return Ok(None);
    }
    let root_pages = (geometry.table_bytes(window.level) / PAGE).min(ROOT_PAGES);
    let pages = pages.saturating_add(root_pages).min(options.pages);
    let mut rooted = config.clone();
    rooted.settings.set(&window.setting, subject.root);
    let Some(format) = open(plugin, &rooted)? else { return Ok(None) };
    let Some(scorer) = Scorer::new(Box::new(format), rooted, subject, pages, options.questions).map_err(failed)? else { return Ok(None) };
    scorer.run().map(Some).map_err(failed)
}

/// The format with this configuration; none if the plugin refuses it.
fn open(plugin: &Plugin, config: &TableConfig) -> Result<Option<crate::plugin::PluginFormat>, GuessError> {
    match plugin.open(config) {
        Ok(format) => Ok(Some(format)),
        Err(CallError::Refused { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Ranks candidates, one for each format and way to nest.
fn ranked(scored: &[(Hypothesis, Scored)], tried: u32) -> Guess {
    let best = scored.first().map_or(0.0, |(hypothesis, result)| result.evidence.bits - hypothesis.prior);
    let candidate = |result: &Scored| Candidate {
        config: result.config.clone(),
        rank: 0,
        levels: result.nest.levels(),
        granule: result.nest.granule(),
        evidence: result.evidence.clone(),
        variants: 0,
    };
    let mut groups: Vec<(&Hypothesis, &Scored, Candidate)> = Vec::new();
    for (hypothesis, result) in scored {
        match groups.iter_mut().find(|(_, known, _)| known.config.format == result.config.format && known.nest == result.nest) {
            Some((_, _, group)) => group.variants += 1,
            None => groups.push((hypothesis, result, candidate(result))),
        }
    }
    // Usualness compares settings of one format; formats are compared by evidence alone.
    let top = groups.iter().map(|(_, result, _)| result.evidence.bits).fold(f64::NEG_INFINITY, f64::max);
    let equal = |result: &Scored| top - result.evidence.bits <= EQUAL;
    groups.sort_by(|a, b| {
        let key = |(hypothesis, result, _): &(&Hypothesis, &Scored, Candidate)| (!equal(result), equal(result) && !hypothesis.expected);
        key(a).cmp(&key(b)).then(b.1.evidence.bits.total_cmp(&a.1.evidence.bits))
    });
    let mut candidates: Vec<Candidate> = Vec::with_capacity(groups.len());
    for (index, (_, result, mut candidate)) in groups.into_iter().enumerate() {
        candidate.rank = if equal(result) { 1 } else { index as u32 + 1 };
        candidates.push(candidate);
    }
    let all = (1..).zip(scored).map(|(rank, (_, result))| Candidate { rank, ..candidate(result) }).collect();
    Guess { candidates, all, tried, fits: best >= LEAST && top.is_finite() }
}
