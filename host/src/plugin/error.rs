//! Every way in which a plugin can fail, typed.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::plugin::CacheError;

/// A component that is not let in, or could not be made ready.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadError {
    /// More bytes than [`Limits::component_bytes`](super::Limits::component_bytes).
    #[error("{bytes} bytes are too many for a plugin: the limit is {limit}")]
    TooLarge {
        /// Size of the file.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// Something else than a component.
    #[error("not a WebAssembly component but {what}: build it with the component linker (`cargo xtask plugins` shows how)")]
    NotAComponent {
        /// What it is.
        what: &'static str,
    },
    /// A component that is cut off or broken.
    #[error("a broken component: {reason}")]
    Malformed {
        /// The parser's words.
        reason: String,
    },
    /// Built for another version of the contract.
    #[error("the plugin speaks stagecraft:format@{found} and this host {expected}: rebuild the plugin with the stagecraft-sdk of this host")]
    WrongVersion {
        /// The plugin's.
        found: String,
        /// The host's.
        expected: &'static str,
    },
    /// Wants something that plugins do not get.
    #[error("the plugin imports `{name}`; a plugin gets {allowed} and nothing else", allowed = super::admission::IMPORTS.join(", "))]
    ForeignImport {
        /// The import's name.
        name: String,
    },
    /// Lacks an interface.
    #[error("the plugin does not export `{name}`")]
    MissingExport {
        /// The interface.
        name: String,
    },
    /// Has an export that is not in the contract.
    #[error("the plugin exports `{name}`, which is not part of the contract")]
    ForeignExport {
        /// The export's name.
        name: String,
    },
    /// No manifest in the custom section `stagecraft:manifest`.
    #[error("the plugin carries no manifest in a custom section `stagecraft:manifest`: use `export_format!`")]
    NoManifest,
    /// A manifest that makes no sense.
    #[error("the plugin's manifest: {reason}")]
    BadManifest {
        /// What is wrong.
        reason: String,
    },
    /// A memory without a maximum, or with too high a one.
    #[error("the plugin's memory {what}: link it with `--max-memory` of at most {limit} bytes")]
    Memory {
        /// What is wrong.
        what: String,
        /// The limit.
        limit: usize,
    },
    /// More modules, instances or tables than a plugin needs.
    #[error("{count} {what} are too many for a plugin: the limit is {limit}")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How many.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// The names are right, the types are not.
    #[error("the plugin does not fit stagecraft:format@{version}: {reason}; rebuild it with the stagecraft-sdk of this host", version = super::CONTRACT)]
    Contract {
        /// Which type differs.
        reason: String,
    },
    /// Refused by the compiler.
    #[error("the plugin does not compile: {reason}")]
    Compile {
        /// The compiler's words.
        reason: String,
    },
    /// Not in the cache, and this build has no compiler.
    #[error("no compiled form of the plugin in the cache, and this build cannot compile (feature `compile`): fill the cache with a build that can")]
    NotCompiled,
    /// The cache is not fit for use.
    #[error(transparent)]
    Cache(#[from] CacheError),
}

/// What a plugin refused, in its own words.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// A feature that the architecture has and the plugin has not.
    Unsupported(String),
    /// A register, setting or field that makes no sense.
    Invalid {
        /// Its name.
        field: String,
        /// Its value.
        value: u64,
        /// Document and section; may be empty.
        section: String,
        /// Why not.
        reason: String,
    },
    /// Guest memory at this address could not be read.
    Unreadable(u64),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsupported(what) => write!(f, "not supported: {what}"),
            Self::Invalid { field, value, section, reason } => {
                write!(f, "{field} = {value:#x}: {reason}")?;
                if section.is_empty() { Ok(()) } else { write!(f, " ({section})") }
            }
            Self::Unreadable(address) => write!(f, "guest memory at {address:#x} could not be read"),
        }
    }
}

/// A call that a plugin did not answer, or not usably.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The plugin refuses with a reason. It keeps working.
    #[error("plugin {plugin}: {refusal}")]
    Refused {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// What and why.
        refusal: Refusal,
    },
    /// The plugin trapped.
    #[error("plugin {plugin} trapped: {text}")]
    Trap {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// The text of its panic if it said one, else the trap's name.
        text: String,
    },
    /// The plugin did not answer in time.
    #[error("plugin {plugin} did not answer within {limit:?} of processor time")]
    Deadline {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// The limit.
        limit: Duration,
    },
    /// The plugin trapped because it got no more memory.
    #[error("plugin {plugin} wanted more memory than its {limit} bytes")]
    MemoryCap {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// The limit: the policy's, or the maximum of the plugin's own memory.
        limit: usize,
    },
    /// An answer without a meaning.
    #[error("plugin {plugin} answered nonsense: {what}")]
    Nonsense {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// What, and why it has no meaning.
        what: String,
    },
    /// The caller asked with something that the manifest does not name.
    #[error("plugin {plugin} knows no {what} `{name}`; there are {known}")]
    Unknown {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// `register`, `unit` or `table format`.
        what: &'static str,
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// The caller gave something twice.
    #[error("{what} `{name}` is given twice")]
    Twice {
        /// `register` or `setting`.
        what: &'static str,
        /// Its name.
        name: String,
    },
    /// The caller gave more than one call takes.
    #[error("{bytes} bytes of {what} are too many for one call: the limit is {limit}")]
    TooLong {
        /// What there is too much of.
        what: &'static str,
        /// How much was given.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// All [`Limits::instances`](super::Limits::instances) are in use.
    #[error("no room for another instance of plugin {plugin}: all {limit} are in use")]
    TooManyInstances {
        /// Name of the plugin.
        plugin: Arc<str>,
        /// The limit.
        limit: u32,
    },
}

/// `text` from a plugin, fit for logs and terminals: cut at 1,024 bytes, control characters replaced.
pub(super) fn clean(text: &str) -> String {
    let mut end = text.len().min(1024);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let clean = |c: char| if c.is_control() && c != '\n' { char::REPLACEMENT_CHARACTER } else { c };
    text[..end].chars().map(clean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_plugins_is_cut_and_cleaned() {
        assert_eq!(clean("a\u{1b}[31mb\n"), "a\u{fffd}[31mb\n");
        assert_eq!(clean(&"\u{e4}".repeat(2000)).len(), 1024);
        assert_eq!(clean(&format!("x{}", "\u{e4}".repeat(2000))).len(), 1023, "never inside a character");
    }
}
