//! Another version of the plugin takes over while the guest runs.

use vm_memory::GuestMemory;

use super::host::AddressSpaces;
use super::{Handled, Viommu};
use crate::plugin::{self, CallError, Outcome, Plugin, Requester};

/// A new version of the plugin was not taken. The old one goes on as if nothing had been.
#[derive(Debug, thiserror::Error)]
pub enum ReplaceError {
    /// It failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// It says something else of a stream whose structures have not changed.
    #[error("stream {}: was {old:x?}, is {new:x?}", name(.requester))]
    Stream {
        /// Which stream.
        requester: Requester,
        /// What the old one said.
        old: Box<Outcome>,
        /// What the new one says; none if it refuses.
        new: Option<Box<Outcome>>,
    },
    /// It has other PASIDs for a device whose structures have not changed.
    #[error("device {id:#x}: had PASIDs {old:x?}, has {new:x?}")]
    Pasids {
        /// Which device.
        id: u64,
        /// What the old one said.
        old: Vec<u32>,
        /// What the new one says.
        new: Vec<u32>,
    },
    /// It disagrees about tables.
    #[error(transparent)]
    Plugin(#[from] plugin::ReplaceError),
}

fn name(requester: &Requester) -> String {
    match requester.pasid {
        None => format!("{:#x}", requester.id),
        Some(pasid) => format!("{:#x} with PASID {pasid:#x}", requester.id),
    }
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Lets another version of the plugin take over: it must find the same for every stream and device, and agree about all patterns that are remembered and
    /// about the geometry of all tables. See [`Supervisor::replace`](crate::plugin::Supervisor::replace). What was blocked for want of a plugin is tried again.
    ///
    /// # Errors
    /// The first thing that it says otherwise; nothing changed.
    pub fn replace_plugin(&mut self, new: Plugin) -> Result<Handled, ReplaceError> {
        let _span = tracing::debug_span!("replace_plugin").entered();
        let old = self.supervisor.plugin();
        if old.name() != new.name() {
            return Err(plugin::ReplaceError::Name { old: old.name().to_owned(), new: new.name().to_owned() }.into());
        }
        let mut instance = new.instantiate()?;
        for (requester, stream) in &self.streams {
            // A stream whose structures are changing is looked up again anyway.
            let Some(before) = stream.outcome.as_ref().filter(|_| !stream.stale && self.unit.is_unchanged(&stream.trace)) else { continue };
            let after = self.unit.lookup_in(&mut instance, *requester).0.ok().map(|found| found.value);
            if let Some(error) = instance.failed() {
                return Err(error.clone().into());
            }
            if after.as_ref() != Some(before) {
                return Err(ReplaceError::Stream { requester: *requester, old: Box::new(before.clone()), new: after.map(Box::new) });
            }
        }
        for (id, device) in &self.devices {
            if device.stale || !self.unit.is_unchanged(&device.trace) {
                continue;
            }
            let mut pasids = self.unit.pasids_in(&mut instance, *id).0.map(|found| found.value).unwrap_or_default();
            if let Some(error) = instance.failed() {
                return Err(error.clone().into());
            }
            pasids.truncate(self.limits.pasids);
            if pasids != device.pasids {
                return Err(ReplaceError::Pasids { id: *id, old: device.pasids.clone(), new: pasids });
            }
        }
        self.supervisor.replace(new)?;
        Ok(self.try_everything())
    }
}
