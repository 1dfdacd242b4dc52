//! What attaching a device would come to, without doing it: what is said, what is answered, and what is done rest on the same questions.

use std::sync::Arc;

use super::device::{Connected, Who, outside};
use super::dirty::NOT_RECORDED;
use super::nested::{OWNERS_PASIDS, takes_pasids};
use super::parent::Under;
use super::part::{Host, Part};
use super::space::{Content, Space, State};
use super::strategy::{Candidate, Choice};
use super::{Chosen, Device, Error, Explanation, GuestMemory, Ioasid, Property, Refusal, Strategy};
use crate::Span;
use crate::kernel::Pasid;
use crate::plugin::CallError;
use crate::table::Geometry;

impl Ioasid {
    /// What would be chosen for a device, or for a PASID of it, without making anything; where it would share what is there, what was chosen for that. Where it cannot be
    /// attached, nothing is chosen, and why is in [`Explanation::rejected`] or [`Explanation::notes`].
    ///
    /// # Errors
    /// A plugin or the kernel fails.
    pub fn explain_for(&self, device: &Device, pasid: Option<Pasid>) -> Result<Explanation, Error> {
        match self.0.outlook(&device.0, pasid) {
            Err(Error::Refused(refusal)) => {
                let mut explanation = Explanation::new(device.label());
                explanation.notes.push(refusal.to_string());
                Ok(explanation)
            }
            outlook => outlook,
        }
    }

    /// Whether it serves a device too, or a PASID of it: whether attaching would succeed, or for one that is attached elsewhere replacing, as far as that can be known
    /// without doing it. What only an attempt shows is whether the kernel makes what the strategy takes, whether memory and limits suffice, and whether room for a PASID
    /// can be made in what others use.
    ///
    /// # Errors
    /// The property that says no.
    pub fn serves(&self, device: &Device, pasid: Option<Pasid>) -> Result<(), Refusal> {
        match self.0.outlook(&device.0, pasid) {
            Ok(Explanation { chosen: Some(_), .. }) => Ok(()),
            Ok(none) => Err(Refusal::new(Property::Strategy, format!("device {}: {}", device.label(), none.why_not()))),
            Err(Error::Refused(refusal)) => Err(refusal),
            Err(error) => Err(Refusal::new(Property::Strategy, format!("device {}: {error}", device.label()))),
        }
    }
}

/// What attaching would come to.
struct Outlook {
    explanation: Explanation,
    /// Page requests go to the page table.
    takes_faults: bool,
    /// Guest memory behind it that the device cannot use.
    outside: Option<Span>,
}

fn not_reached(device: &Connected, span: Span) -> Refusal {
    Refusal::new(Property::Iova, format!("guest memory at {span} lies where device {} must not translate", device.label()))
}

fn owners_pasids(device: &Connected) -> Refusal {
    Refusal::new(Property::Pasid, format!("device {}: {OWNERS_PASIDS}", device.label()))
}

impl Space {
    /// What is chosen when a device, or a PASID of it, is attached now. Refused: by something else than strategies.
    fn outlook(&self, device: &Arc<Connected>, pasid: Option<Pasid>) -> Result<Explanation, Error> {
        self.check(device, pasid)?;
        let company = pasid.is_some() || device.slots().keys().any(Option::is_some);
        let state = self.lock();
        let Outlook { explanation, takes_faults, outside: memory } = self.choose(&state, device, pasid, company)?;
        if explanation.chosen.is_none() {
            return Ok(explanation);
        }
        if takes_faults && state.faults.is_some() && !device.asks_for_pages()? {
            return Err(Refusal::new(Property::PageRequests, format!("{} cannot ask for pages", Who(device.label(), pasid))).into());
        }
        if let Some(span) = memory {
            return Err(not_reached(device, span).into());
        }
        // What a device must not translate is what it asks for without PASID: the kernel keeps it free for nobody else.
        if let (Content::Managed(managed), None) = (&state.content, pasid) {
            let span = |(first, mapping): (&u64, &super::managed::Mapping)| Span { first: *first, last: mapping.last };
            if let Some(span) = managed.mappings().iter().map(span).find(|span| outside(&device.capabilities().iova, *span)) {
                return Err(Refusal::new(Property::Iova, format!("{span} is mapped, and device {} cannot use all of it", device.label())).into());
            }
        }
        Ok(explanation)
    }

    fn choose(&self, state: &State, device: &Arc<Connected>, pasid: Option<Pasid>, company: bool) -> Result<Outlook, Error> {
        let is_managed = matches!(state.content, Content::Managed(_));
        match self.shared(state, device, pasid, company)?.0.map(|place| &state.parts[place]) {
            Some(part) if !company || part.has_pasids() => {
                let outside = part.recorder().filter(|_| pasid.is_none()).and_then(|_| self.memory_outside(device));
                return Ok(Outlook { explanation: part.explain(), takes_faults: part.takes_faults(is_managed), outside });
            }
            // It is made anew, so that PASIDs get in.
            Some(part) if part.can_make_room_for(device) => {
                let anew = self.chosen_anew(state, device, company)?;
                return if anew.explanation.chosen.is_some() { Ok(anew) } else { Err(owners_pasids(device).into()) };
            }
            Some(_) => return Err(owners_pasids(device).into()),
            None => self.check_unit(state, device, company)?,
        }
        self.chosen_anew(state, device, company)
    }

    /// What a strategy would make for a device, and what is to be noted about it; none if something speaks against it, which is in `explanation` then.
    pub(super) fn candidate(
        &self,
        state: &State,
        device: &Connected,
        company: bool,
        memory: &GuestMemory,
        strategy: Strategy,
        explanation: &mut Explanation,
    ) -> Result<Option<(Candidate, Vec<String>)>, Error> {
        let (candidate, notes) = match self.choice(state, device, memory).judge(strategy)? {
            Ok(candidate) => candidate,
            Err(reasons) => {
                explanation.reject(strategy, reasons);
                return Ok(None);
            }
        };
        if let Some(objection) = self.objection(state, device, company, &candidate)? {
            explanation.reject(strategy, vec![objection.to_string()]);
            return Ok(None);
        }
        Ok(Some((candidate, notes)))
    }

    fn chosen_anew(&self, state: &State, device: &Connected, company: bool) -> Result<Outlook, Error> {
        let mut explanation = Explanation::new(device.label());
        let mut takes_faults = false;
        let memory = self.context().memory();
        for strategy in Strategy::ALL {
            let Some((candidate, notes)) = self.candidate(state, device, company, &memory, strategy, &mut explanation)? else { continue };
            explanation.chosen = Some(Chosen { strategy, what: candidate.what() });
            explanation.notes = notes;
            // What follows a guest with areas was objected to.
            takes_faults = matches!(candidate, Candidate::Own(_) | Candidate::Table(..) | Candidate::Areas);
            break;
        }
        Ok(Outlook { explanation, takes_faults, outside: None })
    }

    pub(super) fn choice<'a>(&'a self, state: &'a State, device: &'a Connected, memory: &'a GuestMemory) -> Choice<'a> {
        Choice {
            request: self.request(),
            kind: &state.kind,
            geometry: state.geometry.as_ref(),
            capabilities: device.capabilities(),
            plugins: self.context().plugins(),
            supervisors: self.context().supervisors(),
            memory,
        }
    }

    /// What speaks against a candidate besides what is in the tables: with `company`, page tables of the device itself and of its PASIDs are to be side by side.
    pub(super) fn objection(&self, state: &State, device: &Connected, company: bool, candidate: &Candidate) -> Result<Option<Refusal>, Error> {
        if company {
            match self.takes_pasids(device, candidate) {
                Ok(true) => {}
                Ok(false) => return Ok(Some(Refusal::new(Property::Pasid, OWNERS_PASIDS))),
                // It has something that the kernel does not take from users, whoever is attached.
                Err(error @ Error::Call(CallError::Refused { .. })) => return Ok(Some(Refusal::new(Property::Format, error.to_string()))),
                Err(error) => return Err(error),
            }
        }
        if state.faults.is_some() && matches!(candidate, Candidate::Areas) && !matches!(state.content, Content::Managed(_)) {
            return Ok(Some(Refusal::new(Property::PageRequests, "faults in areas that follow a guest are not recoverable")));
        }
        let has_memory = matches!(candidate, Candidate::Memory | Candidate::Own(_) | Candidate::Table(..));
        if let Some(span) = if has_memory { self.memory_outside(device) } else { None } {
            return Ok(Some(not_reached(device, span)));
        }
        let marks = |geometry: &Geometry| geometry.levels.iter().any(|level| level.dirty.exists());
        let needs_record = match candidate {
            Candidate::Own(_) => true,
            Candidate::Table(_, format) => !marks(format.geometry_ref()),
            Candidate::Memory | Candidate::Nothing | Candidate::Areas => false,
        };
        if self.request().dirty_tracking && needs_record && !self.context().records_nested(device)? {
            return Ok(Some(Refusal::new(Property::DirtyTracking, NOT_RECORDED)));
        }
        Ok(None)
    }

    /// Guest memory that a device cannot use, though all of it is behind page tables that are not areas.
    fn memory_outside(&self, device: &Connected) -> Option<Span> {
        let memory = self.context().memory();
        let known = memory.regions().iter().filter(|region| region.user_address.is_some());
        known.map(|region| region.span).find(|span| outside(&device.capabilities().iova, *span))
    }

    /// Whether single PASIDs can be attached to what a candidate makes.
    fn takes_pasids(&self, device: &Connected, candidate: &Candidate) -> Result<bool, Error> {
        match candidate {
            Candidate::Memory | Candidate::Nothing | Candidate::Areas => Ok(true),
            Candidate::Own(config) => takes_pasids(self.context(), device, config, Under::Guest),
            Candidate::Table(config, format) => {
                let mut config = config.clone();
                format.geometry_ref().roots.iter().for_each(|root| config.settings.set(&root.setting, 0));
                takes_pasids(self.context(), device, &config, Under::Host)
            }
        }
    }
}

impl Part {
    /// Page requests go to its page table, if the address space has a queue for them.
    const fn takes_faults(&self, is_managed: bool) -> bool {
        match self.host {
            Host::Own(..) | Host::Table(..) => true,
            Host::Kernel { .. } => is_managed,
            Host::Areas(_) => false,
        }
    }

    /// Made anew, it could be one that leaves a device's PASIDs alone: the device itself has it, or others behind the device's unit do.
    pub(super) fn can_make_room_for(&self, device: &Arc<Connected>) -> bool {
        let is_itself =
            |(user, pasid): &(std::sync::Weak<Connected>, Option<Pasid>)| pasid.is_none() && std::ptr::eq(user.as_ptr(), Arc::as_ptr(device));
        self.users.iter().any(is_itself) || self.unit == device.unit() && !self.is_unused()
    }

    /// Areas are for all units: the kernel keeps a table for each of them.
    pub(super) const fn is_for_all_units(&self) -> bool {
        matches!(self.host, Host::Areas(_))
    }
}
