//! A host that does nothing and writes down what it is asked.

use std::collections::BTreeMap;

use stagecraft::Gpa;
use stagecraft::plugin::Requester;
use stagecraft::plugin::queue::Invalidation;
use stagecraft::sync::{self, Report, Watcher};
use stagecraft::viommu::{AddressSpaces, HostError, Told, Way};

/// One call.
#[derive(Clone, Debug, PartialEq)]
pub enum Asked {
    Allocate(u32),
    Release(u32),
    Attach(Requester, u32),
    Detach(Requester),
    Switch(u32),
    Invalidate(u32, Vec<Invalidation>),
    Written(u32, u64, u64),
}

#[derive(Default)]
pub struct Recorder {
    pub asked: Vec<Asked>,
    pub attached: BTreeMap<Requester, u32>,
    /// Watchers of spaces, for tests that play the shadow.
    pub watchers: BTreeMap<u32, Box<dyn Watcher>>,
    /// What is refused.
    pub refuse_detach: bool,
    pub refuse_allocate: bool,
    pub refuse_attach: bool,
    pub refuse_looks: bool,
    /// Spaces that are out of step when memory comes or goes.
    pub stale: Vec<u32>,
    next: u32,
}

impl Recorder {
    pub fn take(&mut self) -> Vec<Asked> {
        std::mem::take(&mut self.asked)
    }

    fn look(&mut self, asked: Asked) -> Result<Report, HostError> {
        self.asked.push(asked);
        if self.refuse_looks { Err(HostError::Stale("told to fail".into())) } else { Ok(Report::default()) }
    }
}

fn refused() -> HostError {
    HostError::Refused("told to refuse".into())
}

impl AddressSpaces for Recorder {
    type Id = u32;
    type Memory = ();

    fn allocate(&mut self, _: &Way, _: sync::Way, watcher: Box<dyn Watcher>) -> Result<(u32, Report), HostError> {
        if self.refuse_allocate {
            return Err(refused());
        }
        let id = self.next;
        self.next += 1;
        self.watchers.insert(id, watcher);
        self.asked.push(Asked::Allocate(id));
        Ok((id, Report::default()))
    }

    fn release(&mut self, space: u32) {
        assert!(!self.attached.values().any(|attached| *attached == space), "in use");
        assert!(self.watchers.remove(&space).is_some(), "released twice");
        self.asked.push(Asked::Release(space));
    }

    fn attach(&mut self, requester: Requester, space: u32) -> Result<Report, HostError> {
        assert!(self.watchers.contains_key(&space), "a space that is there");
        if self.refuse_attach {
            return Err(refused());
        }
        self.attached.insert(requester, space);
        self.asked.push(Asked::Attach(requester, space));
        Ok(Report::default())
    }

    fn detach(&mut self, requester: Requester) -> Result<(), HostError> {
        if self.refuse_detach {
            return Err(refused());
        }
        assert!(self.attached.remove(&requester).is_some(), "{requester:?} was not attached");
        self.asked.push(Asked::Detach(requester));
        Ok(())
    }

    fn switch(&mut self, space: u32, _: &Way, _: sync::Way) -> Result<Report, HostError> {
        self.look(Asked::Switch(space))
    }

    fn invalidate(&mut self, space: u32, invalidations: &[Invalidation]) -> Result<Report, HostError> {
        self.look(Asked::Invalidate(space, invalidations.to_vec()))
    }

    fn table_written(&mut self, space: u32, address: Gpa, length: u64) -> Result<Report, HostError> {
        self.look(Asked::Written(space, address.0, length))
    }

    fn memory_changed(&mut self, (): ()) -> Result<Vec<Told<u32>>, HostError> {
        if self.refuse_looks {
            return Err(HostError::Stale("told to fail".into()));
        }
        Ok(self.stale.iter().map(|space| (*space, Err(HostError::Stale("told to fail".into())))).collect())
    }
}
