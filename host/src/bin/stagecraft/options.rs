//! The command line: global options, and the list of subcommands. Each subcommand's own options stand in its file.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::{completions, convert, diff, draw, formats, guess, inspect, man, offers, run, translate, validate};

/// Page tables for any vIOMMU, on any IOMMU.
///
/// Looks into the I/O page tables of a guest (a snapshot: a folder with the registers of its vIOMMU and the pages that hold its tables) through sandboxed
/// format plugins: what maps where, what is wrong with it, and the same in another format.
///
/// Exit status: 0 when all went well; 1 when `validate` found violations, `diff` found differences, `convert --strict` refused, `guess` or `offers` found nothing that fits, a DMA of `run` went wrong, or a budget was spent; 2
/// for everything that is wrong with the command line, the plugins or the snapshot, with one line on stderr that names it.
#[derive(Debug, Parser)]
#[command(name = "stagecraft", version, propagate_version = true, max_term_width = 110, disable_help_subcommand = true)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// Options of all subcommands.
#[derive(Args, Debug)]
#[command(next_help_heading = "Options of all commands")]
pub struct Global {
    /// What to print: text for people, or JSON as docs/json.md describes it
    #[arg(long, global = true, value_name = "FORM", default_value = "human")]
    pub format: Form,
    /// Colours: on a terminal unless NO_COLOR is set, always, or never
    #[arg(long, global = true, value_name = "WHEN", default_value = "auto")]
    pub color: Color,
    /// Folder with further plugins (*.wasm); one that has the name of a built-in plugin replaces it [env: STAGECRAFT_PLUGINS]
    #[arg(long, global = true, value_name = "DIR")]
    pub plugins: Option<PathBuf>,
    /// Folder for compiled plugins, yours alone [default: stagecraft in $XDG_CACHE_HOME or ~/.cache, if it can be used]
    #[arg(long, global = true, value_name = "DIR")]
    pub cache: Option<PathBuf>,
    /// Stop walking a table after this many tables visited [default: four times the pages of the snapshot]
    #[arg(long, global = true, value_name = "N", value_parser = crate::numbers::number, allow_negative_numbers = true)]
    pub budget_tables: Option<u64>,
    /// Stop walking a table after this many leaves [default: 512 per table of the other budget]
    #[arg(long, global = true, value_name = "N", value_parser = crate::numbers::number, allow_negative_numbers = true)]
    pub budget_leaves: Option<u64>,
    /// Stop walking a table after this many different patterns of entries, each of which its plugin is asked about [default: 16384]
    #[arg(long, global = true, value_name = "N", value_parser = crate::numbers::number, allow_negative_numbers = true)]
    pub budget_questions: Option<u64>,
}

/// What to print.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Form {
    /// Text for people.
    Human,
    /// JSON.
    Json,
}

impl Global {
    /// Whether JSON is wanted.
    pub fn json(&self) -> bool {
        self.format == Form::Json
    }
}

/// When to use colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal, and unless `NO_COLOR` is set.
    Auto,
    /// Always.
    Always,
    /// Never.
    Never,
}

impl Color {
    /// From here on, for this process.
    pub fn choose(self) {
        match self {
            Self::Auto => anstream::ColorChoice::Auto,
            Self::Always => anstream::ColorChoice::Always,
            Self::Never => anstream::ColorChoice::Never,
        }
        .write_global();
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    Formats(formats::Arguments),
    Inspect(inspect::Arguments),
    Validate(validate::Arguments),
    Translate(translate::Arguments),
    Convert(convert::Arguments),
    Diff(diff::Arguments),
    Draw(draw::Arguments),
    Guess(guess::Arguments),
    Offers(offers::Arguments),
    Run(run::Arguments),
    Completions(completions::Arguments),
    Man(man::Arguments),
}
