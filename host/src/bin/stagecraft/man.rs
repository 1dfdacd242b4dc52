//! `stagecraft man`: the manual, made from the command line's own help.

use std::io::Write as _;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Args, CommandFactory as _};
use clap_mangen::Man;

use crate::draw::write_whole;
use crate::failure::Status;
use crate::options::Cli;
use crate::output::{counted, raw};

/// Print the manual page, or write one page per command into a folder
#[derive(Args, Debug)]
pub struct Arguments {
    /// Write stagecraft.1, stagecraft-inspect.1 and so on into this folder, which must exist; pages of the same name are replaced
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<Status> {
    let mut command = Cli::command();
    // Passes global options and names such as `stagecraft-inspect` down to the subcommands.
    command.build();
    let mut pages = vec![("stagecraft.1".to_owned(), page(&command)?)];
    for subcommand in command.get_subcommands() {
        let name = subcommand.get_name();
        let subcommand = subcommand.clone().display_name(format!("stagecraft-{name}"));
        pages.push((format!("stagecraft-{name}.1"), page(&subcommand)?));
    }
    let mut out = raw();
    match &arguments.out {
        None => out.write_all(&pages[0].1)?,
        Some(folder) => {
            if !folder.is_dir() {
                bail!("{}: no such folder; create it first", folder.display());
            }
            let pages: Vec<(PathBuf, Vec<u8>)> = pages.into_iter().map(|(name, page)| (folder.join(name), page)).collect();
            // All of them or none, as far as can be known before.
            if let Some((path, _)) = pages.iter().find(|(path, _)| path.exists() && !path.is_file()) {
                bail!("{}: exists and is not a file: it is not replaced", path.display());
            }
            for (path, page) in &pages {
                write_whole(path, page)?;
            }
            writeln!(out, "{} in {}", counted(pages.len() as u64, "page", "pages"), folder.display())?;
        }
    }
    out.flush()?;
    Ok(Status::Good)
}

fn page(command: &clap::Command) -> Result<Vec<u8>> {
    let mut page = Vec::new();
    // Without a date and without the machine's name: the same page from the same sources.
    Man::new(command.clone()).manual("Stagecraft").render(&mut page)?;
    Ok(page)
}
