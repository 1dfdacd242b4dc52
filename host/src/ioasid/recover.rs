//! Devices that were detached because the kernel failed: who they are, and how they come back.
//!
//! A device itself knows which IOASID it waits for, so that it waits no more once it is attached anywhere, or detached; an IOASID only knows whom to ask.

use std::sync::Arc;

use super::device::{Connected, Held};
use super::part::{Dropped, Part, Users};
use super::space::{Space, State};
use super::{Device, Error, Ioasid};
use crate::kernel::Pasid;
use crate::sync::{LiveError, Report};

impl Ioasid {
    /// Tries again what failed with [`Error::Blocked`], and to map what there was no memory for, and attaches the devices again that were detached for it, or with [`Error::Detached`]. Those that
    /// were attached to something, or detached ([`Ioasid::detach`]), meanwhile are not touched.
    ///
    /// # Errors
    /// The first error, if not all is well after all was tried; what failed and who is still blocked is tried again by the next call. [`Error::Blocked`]: what was
    /// taken away may still be reached by way of one unit. [`Error::Kernel`]: a device could not be attached.
    pub fn recover(&self) -> Result<(), Error> {
        let _span = tracing::debug_span!("recover", ioasid = self.id().0).entered();
        let mut detached = Dropped::new();
        let mut result = {
            let mut state = self.0.lock();
            let told = state.missing();
            let settle = |part: &mut Part| part.settle().and_then(|()| part.offer(&told)).map(|()| Report::default()).map_err(LiveError::Commit);
            self.0.each(&mut state, &mut detached, settle, |_| Ok(Report::default())).map(drop)
        };
        for (device, pasid) in self.0.waiting() {
            let device = Device(device);
            let attached = self.attach(&device, pasid).map(drop);
            // Somebody else may have attached or detached it meanwhile.
            if device.0.is_waiting(pasid, self.id()) {
                result = result.and(attached);
            }
        }
        // A device that was attached may have settled what failed before.
        let is_well = self.0.waiting().is_empty() && !self.0.lock().parts.iter().any(|part| part.stale);
        if is_well { Ok(()) } else { result }
    }

    /// Who was detached because the kernel failed, and is to be attached again.
    pub(crate) fn lost(&self) -> Vec<(Device, Option<Pasid>)> {
        self.0.waiting().into_iter().map(|(device, pasid)| (Device(device), pasid)).collect()
    }
}

impl Space {
    /// Who was detached because the kernel failed, and is to be attached again.
    pub(super) fn waiting(&self) -> Vec<(Arc<Connected>, Option<Pasid>)> {
        let mut users: Vec<_> = self.lock().blocked.iter().filter_map(|(device, pasid)| Some((device.upgrade()?, *pasid))).collect();
        // The last handle of a device may be among those that go.
        users.retain(|(device, pasid)| device.is_waiting(*pasid, self.id()));
        users
    }
}

impl State {
    /// Users that are attached nowhere any more are taken off; false if there are none.
    pub(super) fn take_off_lost(&mut self, space: &Space, dropped: &mut Dropped) -> bool {
        let mut any = false;
        for part in &mut self.parts {
            let users = part.take_off(space.id(), dropped, |held| matches!(held, Held::Nowhere));
            space.context().count_lost(users.len());
            any |= !users.is_empty();
            note(&mut self.blocked, users);
        }
        any
    }
}

/// Adds users that were detached, each once.
pub(super) fn note(blocked: &mut Users, users: Users) {
    for (device, pasid) in users {
        blocked.retain(|(known, of)| known.strong_count() > 0 && !(known.ptr_eq(&device) && *of == pasid));
        blocked.push((device, pasid));
    }
}
