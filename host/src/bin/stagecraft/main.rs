//! The `stagecraft` command: looks into a guest's I/O page tables, converts, validates, compares and draws them; and plays guests that run.
//!
//! One file per subcommand; what they share stands beside them:
//!
//! | module | idea |
//! |---|---|
//! | `options` | the command line |
//! | `numbers` | numbers as people write them |
//! | `session` | plugins, cache, snapshot, budgets |
//! | `view` | all streams of a snapshot and what each reaches, every table walked once |
//! | `failure` | one line for what went wrong, and the exit status |
//! | `output` | colours, columns, sizes |
//! | `json` | the parts that the JSON forms have in common |
//! | `progress` | a bar on stderr |
//! | `svg` | elements of a picture |

mod completions;
mod convert;
mod diff;
mod draw;
mod failure;
mod formats;
mod guess;
mod inspect;
mod json;
mod man;
mod numbers;
mod offers;
mod options;
mod output;
mod progress;
mod run;
mod session;
mod svg;
mod translate;
mod validate;
mod view;

use std::process::ExitCode;

use clap::Parser as _;

use failure::{Status, usage};
use options::{Cli, Command};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    cli.global.color.choose();
    match obey(&cli) {
        Ok(status) => status.into(),
        Err(error) => failure::report(&error).into(),
    }
}

fn obey(cli: &Cli) -> anyhow::Result<Status> {
    let global = &cli.global;
    match &cli.command {
        Command::Formats(arguments) => formats::run(global, arguments),
        Command::Inspect(arguments) => inspect::run(global, arguments),
        Command::Validate(arguments) => validate::run(global, arguments),
        Command::Translate(arguments) => translate::run(global, arguments),
        Command::Convert(arguments) => convert::run(global, arguments),
        Command::Diff(arguments) => diff::run(global, arguments),
        Command::Draw(arguments) => draw::run(global, arguments),
        Command::Guess(arguments) => guess::run(global, arguments),
        Command::Offers(arguments) => offers::run(global, arguments),
        Command::Run(arguments) => run::run(global, arguments),
        Command::Completions(arguments) => completions::run(arguments),
        Command::Man(arguments) => man::run(arguments),
    }
}
