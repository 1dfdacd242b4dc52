//! Where an access goes, and what becomes of one that failed: recoverable faults of devices, looked at in the guest's tables.

#[cfg(doc)]
use super::Request;
use super::metrics::Counter;
use super::part::Dropped;
use super::space::{Content, State};
use super::{Error, GuestView, Ioasid, Kind, Property, Refusal, managed};
use crate::kernel::handle::FaultQueue;
use crate::kernel::{Errno, PageFault, PageResponse, ResponseCode};
use crate::memory::{Budget, Limits};
use crate::plugin::Tag;
use crate::plugin::queue::Invalidation;
use crate::table::{Fault, Translation};
use crate::{Access, Gpa, Iova, Span};

/// What became of a recoverable fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// The translation is there now: the device tries again.
    Mapped,
    /// The guest's tables do not allow it. The device gives up, and the guest is to be told.
    Refused(Box<Fault>),
    /// The guest's tables allow it, and a host of a device that is attached has it not: a limit of the address space is reached, there is no memory for tables, the unit's
    /// format or the kernel cannot say it, or the guest's format's plugin does not answer. The device gives up.
    Blocked,
    /// Nothing is mapped there, in an address space that has no tables.
    Unmapped,
}

impl Ioasid {
    /// Where an access of one byte goes, by the guest's tables as they stand in memory now, or by what was mapped.
    ///
    /// # Errors
    /// The outer error ends the question; the inner one is the device's fault, and is none for an address space without tables.
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Result<Translation, Option<Fault>>, Error> {
        let mut state = self.0.lock();
        self.translate_in(&mut state, iova, access)
    }

    fn translate_in(&self, state: &mut State, iova: Iova, access: Access) -> Result<Result<Translation, Option<Fault>>, Error> {
        let found = |piece: Option<crate::table::Piece>| {
            let piece = piece.filter(|piece| piece.attributes.access(false).allows(access)).ok_or(None)?;
            Ok(Translation { address: Gpa(piece.address + (iova.0 - piece.iova.first)), attributes: piece.attributes })
        };
        match &state.content {
            Content::Requests(domain) => return Ok(found(domain.find(iova.0).copied())),
            Content::Managed(managed) => {
                let here = managed.mappings().range(..=iova.0).next_back().filter(|(_, mapping)| mapping.last >= iova.0);
                return Ok(found(here.and_then(|(first, mapping)| managed::piece(*first, mapping))));
            }
            Content::Guest => {}
        }
        let memory = self.0.context().memory();
        let Kind::Guest(view) = &state.kind else { return Ok(Err(None)) };
        let mut space = match state.translator.take() {
            Some(space) => space,
            None => Box::new(view.open(self.0.context())?),
        };
        let budget = Budget::new(Limits { questions: self.0.request().limits.questions, ..Limits::default() });
        let result = space.translate(memory.entries(), memory.map(), iova, access, &budget);
        // A format that failed is opened again next time.
        if result.is_ok() {
            state.translator = Some(space);
        }
        Ok(result?.map_err(Some))
    }

    /// A device's fault: looks at the guest's tables there once more. [`Response::Mapped`]: the host has what the guest says, and the device may try again.
    ///
    /// # Errors
    /// [`Error::Blocked`], or the tables cannot be walked.
    pub fn fault(&self, iova: Iova, access: Access) -> Result<Response, Error> {
        let _span = tracing::debug_span!("fault", ioasid = self.id().0, %iova).entered();
        self.0.context().count(Counter::Faults, 1);
        self.look_for_fault(iova, access)
    }

    fn look_for_fault(&self, iova: Iova, access: Access) -> Result<Response, Error> {
        let mut detached = Dropped::new();
        let mut state = self.0.lock();
        let memory = self.0.context().memory();
        let page = Span { first: iova.0 & !(crate::memory::PAGE - 1), last: iova.0 | (crate::memory::PAGE - 1) };
        let mut is_blocked = false;
        if let Kind::Guest(view) = state.kind.clone() {
            let again = [again(&view, page)];
            let report = self.0.each(
                &mut state,
                &mut detached,
                |part| part.invalidate(&memory, &view, &again),
                |software| software.invalidate(&memory, &again),
            )?;
            is_blocked = report.blocked_count > 0;
        }
        Ok(match self.translate_in(&mut state, iova, access)? {
            Ok(_) if is_blocked || state.parts.iter().any(|part| !part.users.is_empty() && !part.has(iova)) => Response::Blocked,
            Ok(_) => Response::Mapped,
            Err(Some(fault)) => Response::Refused(Box::new(fault)),
            Err(None) => Response::Unmapped,
        })
    }

    fn faults(&self) -> Result<FaultQueue, Refusal> {
        let queue = self.0.lock().faults.clone();
        queue.ok_or_else(|| Refusal::new(Property::PageRequests, "the IOASID was made without page requests"))
    }

    /// Recoverable faults that wait, each once: for whoever asks a guest before [`Ioasid::answer_fault`]. See [`Ioasid::serve_faults`].
    ///
    /// # Errors
    /// [`Error::Refused`]: the IOASID was made without [`Request::page_requests`]. [`Error::Kernel`].
    pub fn read_faults(&self) -> Result<Vec<PageFault>, Error> {
        let queue = self.faults()?;
        let faults = self.0.context().kernel().read_faults(queue.id()).map_err(Error::kernel("reading faults"))?;
        self.0.context().count(Counter::Faults, faults.len() as u64);
        Ok(faults)
    }

    /// Answers a fault of [`Ioasid::read_faults`]. If the device has given up meanwhile nothing happens.
    ///
    /// # Errors
    /// As [`Ioasid::read_faults`].
    pub fn answer_fault(&self, answer: PageResponse) -> Result<(), Error> {
        let queue = self.faults()?;
        // EINVAL: nobody waits for it any more.
        let told = self.0.context().kernel().respond(queue.id(), answer).or_else(|errno| if errno == Errno::EINVAL { Ok(()) } else { Err(errno) });
        told.map_err(Error::kernel("answering a fault"))
    }

    /// Answers all recoverable faults that wait, after [`Ioasid::fault`]; what they were and what became of them.
    ///
    /// # Errors
    /// [`Error::Refused`]: the IOASID was made without [`Request::page_requests`]. [`Error::Kernel`]: what was read and not answered is answered as invalid
    /// when its device is detached. A fault whose tables cannot be walked is answered as invalid, and is the error after the others were answered.
    pub fn serve_faults(&self) -> Result<Vec<(PageFault, Response)>, Error> {
        let faults = self.read_faults()?;
        let mut served = Vec::new();
        let mut failed = Ok(());
        for fault in faults {
            let response = self.look_for_fault(fault.address, Access { read: fault.read, write: fault.write });
            let code = if matches!(response, Ok(Response::Mapped)) { ResponseCode::Success } else { ResponseCode::Invalid };
            failed = failed.and(self.answer_fault(PageResponse { cookie: fault.cookie, code }));
            match response {
                Ok(response) => served.push((fault, response)),
                Err(error) => failed = failed.and(Err(error)),
            }
        }
        failed.map(|()| served)
    }
}

/// A look at one page, for a fault.
fn again(view: &GuestView, iova: Span) -> Invalidation {
    use crate::plugin::queue::{Effect, Scope};
    let Tag { domain, space } = view.tag();
    let domain = domain.and_then(|domain| u16::try_from(domain).ok());
    Invalidation { index: 0, effect: Effect::Range { scope: Scope { leaf: false, second_stage: false, domain, space, id: None }, iova } }
}
