//! What went wrong, in one line, and the exit status.

use std::io::{ErrorKind, Write as _};
use std::process::ExitCode;

use stagecraft::convert::ConvertError;
use stagecraft::device::LookupError;
use stagecraft::guest::GuestError;
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
    if is_budget(error) { Status::Found } else { Status::Trouble }
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
        _ if is_budget(error) => "; --budget-tables and --budget-leaves allow more",
        _ => "",
    }
}

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

/// Whether a budget was spent: the guest's tables are larger than the caller allows, and nothing is wrong with the call.
fn is_budget(error: &anyhow::Error) -> bool {
    let spent = |error: &GuestError| matches!(error, GuestError::Walk(WalkError::Exhausted(_)) | GuestError::Lookup(LookupError::Exhausted(_)));
    match error.downcast_ref::<ConvertError>() {
        Some(ConvertError::Guest(error)) => spent(error),
        _ => error.downcast_ref::<GuestError>().is_some_and(spent),
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
