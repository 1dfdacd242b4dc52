//! What went wrong, in one line, and the exit status.

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use stagecraft::convert::ConvertError;
use stagecraft::device::LookupError;
use stagecraft::guest::GuestError;
use stagecraft::memory::Exhausted;
use stagecraft::table::{BuildError, WalkError};

use crate::output::{BAD, printable};

/// How the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Status {
    /// All went well.
    Good,
    /// Violations, differences, refusals, or a spent budget.
    Found,
    /// The command line, the plugins or the snapshot are wrong.
    Trouble,
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        Self::from(status as u8)
    }
}

/// Says what went wrong, and which status that is. A reader that went away is nobody to tell.
pub fn report(error: &anyhow::Error) -> Status {
    let gone =
        |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref::<std::io::Error>().is_some_and(|io| io.kind() == ErrorKind::BrokenPipe);
    if error.chain().any(gone) {
        return Status::Good;
    }
    complain(&format!("{}{error:#}{}", place(error), hint(error)));
    if spent(error).is_some() { Status::Found } else { Status::Trouble }
}

/// What an error is about that does not say so itself: only writing to standard output has no name of a file.
fn place(error: &anyhow::Error) -> &'static str {
    if error.downcast_ref::<std::io::Error>().is_some() && error.chain().count() == 1 { "standard output: " } else { "" }
}

/// What would help.
fn hint(error: &anyhow::Error) -> &'static str {
    match error.downcast_ref::<ConvertError>() {
        Some(ConvertError::Build { error: BuildError::Full(_), .. }) => "; --table-bytes allows more",
        Some(ConvertError::NoHole { .. }) => "; --table-bytes N asks for less",
        _ => spent(error).map_or("", |exhausted| more(exhausted.what)),
    }
}

/// Which option allows more, by the words that a spent budget is named with. Some budgets cannot be changed.
pub fn more(spent: &str) -> &'static str {
    let about = |words: &str| spent.contains(words);
    if about("tables visited") {
        "; --budget-tables allows more"
    } else if about("leaves") || about("separate mappings") {
        "; --budget-leaves allows more"
    } else if about("patterns asked about") {
        "; --budget-questions allows more"
    } else if about(IN_ONE_REPORT) {
        "; --device ID asks for one device"
    } else {
        ""
    }
}

/// Ends the name of a budget of what a report may repeat.
pub const IN_ONE_REPORT: &str = "in one report";

/// Characters of a message that are shown: its beginning and its end. A snapshot may have names of any length.
const SHOWN: (usize, usize) = (600, 300);

/// One line on stderr.
pub fn complain(message: &str) {
    // Nobody is left to tell if stderr is closed.
    let _ = writeln!(anstream::stderr(), "{BAD}error:{BAD:#} {}", shortened(printable(message)));
}

/// A line that people can read, whatever it quotes.
fn shortened(line: String) -> String {
    let characters: Vec<char> = line.chars().collect();
    let Some(left_out) = characters.len().checked_sub(SHOWN.0 + SHOWN.1).filter(|left_out| *left_out > 0) else { return line };
    let (begin, end) = (&characters[..SHOWN.0], &characters[SHOWN.0 + left_out..]);
    format!("{} [{left_out} characters] {}", begin.iter().collect::<String>(), end.iter().collect::<String>())
}

/// The budget that was spent, if one was: the guest's tables are larger than the caller allows, and nothing is wrong with the call.
fn spent(error: &anyhow::Error) -> Option<Exhausted> {
    let guest = match error.downcast_ref::<ConvertError>() {
        Some(ConvertError::Guest(error)) => Some(error),
        _ => error.downcast_ref::<GuestError>(),
    };
    match guest? {
        GuestError::Walk(WalkError::Exhausted(exhausted)) | GuestError::Lookup(LookupError::Exhausted(exhausted)) => Some(*exhausted),
        _ => None,
    }
}

/// Prints help or a version as asked for; a command line that cannot be understood is one line like every other error.
pub fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind as Kind;
    if matches!(error.kind(), Kind::DisplayHelp | Kind::DisplayVersion | Kind::DisplayHelpOnMissingArgumentOrSubcommand) {
        let _ = error.print();
        return ExitCode::from(u8::from(error.use_stderr()) * 2);
    }
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ").replace(" tip: ", "; ");
    complain(line.strip_prefix("error: ").unwrap_or(&line));
    Status::Trouble.into()
}
