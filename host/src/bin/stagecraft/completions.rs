//! `stagecraft completions`: what a shell needs to complete the command line.

use std::io::Write as _;

use anyhow::Result;
use clap::{Args, CommandFactory as _};
use clap_complete::Shell;

use crate::failure::Status;
use crate::options::Cli;
use crate::output::raw;

/// Print completions for a shell
///
/// For example: stagecraft completions bash > ~/.local/share/bash-completion/completions/stagecraft
#[derive(Args, Debug)]
pub struct Arguments {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<Status> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut Cli::command(), "stagecraft", &mut script);
    let mut out = raw();
    out.write_all(&script)?;
    out.flush()?;
    Ok(Status::Good)
}
