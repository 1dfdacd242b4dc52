//! The production engine as it is shipped, plugins in their sandbox included: it finds a model's tables from registers and memory, and answers requests.

use anyhow::{Context, Result, bail};
use stagecraft::guest::{Guest, State, StreamState};
use stagecraft::memory::MemoryMap;
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::snapshot::Snapshot;
use stagecraft::table::{AddressSpace, Cause, Fault};
use stagecraft::{Access, Iova};
use stagecraft_tests::reference::snapshot;
use tempfile::TempDir;

use crate::machine::DEVICE;

/// The plugins that are built in.
#[derive(Debug)]
pub struct Production {
    plugins: Plugins,
    folder: TempDir,
}

impl Production {
    /// Loads the plugins.
    ///
    /// # Errors
    /// If one of them is not accepted.
    pub fn new() -> Result<Production> {
        Ok(Production { plugins: Plugins::builtin(&Engine::new(Config::default())?)?, folder: TempDir::new()? })
    }

    /// The plugins.
    pub fn plugins(&self) -> &Plugins {
        &self.plugins
    }

    /// Reads a snapshot, which takes the way through files that a user's snapshots take.
    ///
    /// # Errors
    /// If it is not accepted.
    pub fn load(&self, snapshot: &snapshot::Snapshot) -> Result<Snapshot> {
        snapshot.write_snapshot(self.folder.path())?;
        Ok(Snapshot::load(self.folder.path())?)
    }

    /// The device's address space in a snapshot.
    ///
    /// # Errors
    /// If the engine finds no tables, or cannot open them.
    pub fn view<'a>(&'a self, snapshot: &'a Snapshot) -> Result<View<'a>> {
        let guest = Guest::new(snapshot, &self.plugins)?;
        let stream = guest.stream(DEVICE, None)?;
        let State::Translated(configs) = &stream.state else { bail!("the engine finds no tables: {stream:?}") };
        let space = guest.space(&stream).with_context(|| format!("{configs:x?}"))?.context("no address space")?;
        Ok(View { configs: configs.clone(), stream, guest, space })
    }
}

/// What the engine says of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It reaches this address, which is in the memory map.
    Reaches(u64),
    /// The tables lead it to this address, where there is no memory.
    Outside(u64),
    /// It is refused.
    Refused(Fault),
    /// It is refused because this page of a table is not in the snapshot: memory that nobody has written.
    Unwritten(u64),
}

impl Answer {
    /// The address that the tables lead to.
    pub fn address(&self) -> Option<u64> {
        match self {
            Answer::Reaches(address) | Answer::Outside(address) => Some(*address),
            Answer::Refused(_) | Answer::Unwritten(_) => None,
        }
    }
}

/// A device's address space as the engine sees it.
#[derive(Debug)]
pub struct View<'a> {
    /// The guest that it belongs to.
    pub guest: Guest<'a>,
    /// The device's stream.
    pub stream: StreamState,
    /// The tables that were found, first stage first.
    pub configs: Vec<TableConfig>,
    space: AddressSpace,
}

impl View<'_> {
    /// The formats that were found, first stage first.
    pub fn formats(&self) -> Vec<&str> {
        self.configs.iter().map(|config| config.format.as_str()).collect()
    }

    /// Asks about a request.
    ///
    /// # Errors
    /// If the engine cannot answer.
    pub fn ask(&mut self, iova: u64, write: bool) -> Result<Answer> {
        let access = if write { Access::WRITE } else { Access::READ };
        let fault = match self.guest.translate(&mut self.space, Iova(iova), access)? {
            Ok(translation) => return Ok(Answer::Reaches(translation.address.0)),
            Err(fault) => fault,
        };
        Ok(match (fault.cause, fault.address) {
            (Cause::Missing, Some(address)) => Answer::Unwritten(address - address % 4096),
            (Cause::OutsideMemory, _) => {
                // Where the tables would lead if there were memory everywhere; a table that is outside cannot be read then either.
                let everywhere = MemoryMap::everything(64);
                let found = self.space.translate(&self.guest.memory(), &everywhere, Iova(iova), access, &self.guest.budget())?;
                found.map_or(Answer::Refused(fault), |translation| Answer::Outside(translation.address.0))
            }
            _ => Answer::Refused(fault),
        })
    }
}
