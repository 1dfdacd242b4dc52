//! Calls of the kernel that fail, and how all is well again.

use std::collections::BTreeMap;

use stagecraft::kernel::Errno;
use stagecraft::kernel::sim::Sim;

use crate::operation::{Failing, Operation, Trap};
use crate::session::{Outcomes, Session, Who};

impl Trap {
    fn errno(self) -> Errno {
        if self.io { Errno::EIO } else { Errno::ENOMEM }
    }

    /// From now on.
    pub fn arm(self, sim: &Sim) {
        let n = u64::from(self.n) + 1;
        match self.failing {
            Failing::Nth => sim.fail_nth(n, self.errno()),
            Failing::From => sim.fail_from(n, self.errno()),
            Failing::Step => sim.fail_step_nth(n, self.errno()),
        }
    }
}

impl Session<'_> {
    /// An operation in which calls of the kernel may fail, if they are to. After a failure nobody reaches what the guest does not allow; when the kernel works again and
    /// somebody has seen to it, all is as if nothing had happened.
    pub fn within_reach_of_failures(&mut self, operation: Operation) -> Result<bool, String> {
        if self.is_broken {
            self.recover()?;
        }
        if let Some(trap) = self.trap {
            trap.arm(&self.machine.sim);
        }
        let result = self.manage(operation);
        let sprung = self.trap.filter(|_| !self.machine.sim.disarm());
        let done = result?;
        let failed = std::mem::take(&mut self.failed);
        let Some(trap) = sprung else {
            // Sooner or later it is so many.
            self.trap.iter_mut().for_each(|trap| trap.n /= 2);
            return if failed.is_empty() { Ok(done) } else { Err(failed.join("; ")) };
        };
        self.trap = None;
        self.is_broken = true;
        let heard = if failed.is_empty() { "unheard" } else { "heard" };
        self.coverage.add(format!("failure {:?} in {}, {heard}", trap.failing, operation.name()));
        let why = |error: String| format!("after {trap:?} ({}): {error}", failed.join("; "));
        if trap.failing == Failing::From {
            trap.arm(&self.machine.sim);
            Trap { n: 0, ..trap }.arm(&self.machine.sim);
            self.compare().map_err(why)?;
            for space in &self.spaces {
                // It cannot succeed where there is something to do.
                let _ = space.ioasid.recover();
            }
        }
        self.compare().map_err(why)?;
        self.machine.sim.disarm();
        if !trap.lingers {
            self.recover().map_err(why)?;
        }
        Ok(true)
    }

    /// The kernel works again, and what failed is tried again.
    pub fn recover(&mut self) -> Outcomes {
        if !std::mem::take(&mut self.is_broken) {
            return Ok(());
        }
        if self.memory_before.is_some() {
            self.context.memory_changed(self.machine.guest_memory()).map_err(|error| format!("memory once more: {error}"))?;
            self.memory_before = None;
        }
        if !self.context.memory_leaving().is_empty() {
            return Err("memory is still leaving".to_owned());
        }
        for number in 0..self.spaces.len() {
            let ioasid = self.spaces[number].ioasid.clone();
            ioasid.recover().map_err(|error| format!("recover: {error}"))?;
            if self.spaces[number].other.take().is_some() {
                let view = self.view(self.spaces[number].view, self.spaces[number].tag);
                let again = ioasid.switch(view);
                self.report(Some(number), again, "the same switch")?;
            }
            if ioasid.stats().without_memory > 0 {
                let again = ioasid.synchronise();
                self.report(Some(number), again, "synchronise after a failure")?;
                self.is_told(number);
            }
            let stats = ioasid.stats();
            let left = (stats.blocked, stats.stale, if self.setup.scarce.is_none() { stats.without_memory } else { 0 });
            if left != (0, 0, 0) {
                return Err(format!("address space {number} after recovery: {left:?} are blocked, stale, without memory"));
            }
        }
        if let Some(error) = self.failed.pop() {
            return Err(error);
        }
        self.coverage.add("recovered".to_owned());
        self.is_attached_as_expected()?;
        let pinned = self.context.metrics().pinned_bytes;
        if pinned == self.machine.there.bytes() {
            Ok(())
        } else {
            Err(format!("{pinned:#x} bytes are known to the kernel, and not {:#x}", self.machine.there.bytes()))
        }
    }

    /// Every device, and every PASID of it, is where it is to be.
    pub fn is_attached_as_expected(&self) -> Outcomes {
        let mut found: BTreeMap<Who, usize> = BTreeMap::new();
        for (number, device) in self.devices.iter().enumerate() {
            for (pasid, id) in device.attached() {
                let space = self.spaces.iter().position(|space| space.ioasid.id() == id).ok_or("attached to an address space that is not there")?;
                found.insert((number, pasid.map(|pasid| pasid.0)), space);
            }
        }
        // Who waits for the kernel to work again is blocked, and nothing else.
        let waits = |who: &Who, space: &usize| self.is_broken && !found.contains_key(who) && self.spaces[*space].ioasid.stats().blocked > 0;
        let is_right = found.iter().all(|(who, space)| self.attached.get(who) == Some(space))
            && self.attached.iter().all(|(who, space)| found.get(who) == Some(space) || waits(who, space));
        if is_right { Ok(()) } else { Err(format!("attached are {found:?} and not {:?}", self.attached)) }
    }
}
