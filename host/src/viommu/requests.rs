//! Page requests: devices that ask for pages, and wait for the guest's answer.
//!
//! ```text
//!   device --PageRequest--> is the page in the guest's tables? -- yes --> the host has it now: Success
//!                             | no
//!                             v
//!                           a record in the guest's queue of page requests (plugin)
//!                             |      the guest maps the page, or does not
//!                             v
//!                           a command of the guest's (plugin) --> the page is looked at again --> its answer, for the device
//! ```
//!
//! A guest's architecture has no such queue, or its unit has none: then what its tables say is the answer, and what they refuse is an event.

use vm_memory::GuestMemory;

use super::events::Told;
use super::host::{AddressSpaces, HostError};
use super::{Call, Handled, StreamState, Viommu};
use crate::plugin::Requester;
use crate::plugin::queue::{Answer, BlockedDma, Effect, EventAccess, GROUPS, GroupResponse, Invalidation, PageRequest, Scope};
use crate::{Access, Span};

/// What a device is told that asked for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageResponse {
    /// Whose requests.
    pub requester: Requester,
    /// Which group of them.
    pub group: u16,
    /// The answer.
    pub answer: Answer,
}

/// Requests of one group that were not answered yet.
#[derive(Debug, Default)]
pub(super) struct Group {
    pages: Vec<PageRequest>,
    /// The guest was told: it will answer.
    told: bool,
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Devices ask for pages. Groups are answered when their last request is there: at once if the guest's tables have all pages by now, or refuse them and its unit
    /// has no queue of page requests. Otherwise the guest is told ([`Handled::page_requests`]), and answers by a command. Answers are in [`Handled::responses`], and
    /// the host was told of them.
    pub fn page_requests(&mut self, requests: &[PageRequest]) -> Handled {
        let _span = tracing::debug_span!("page_requests", requests = requests.len()).entered();
        let mut call = self.begin();
        for request in requests {
            self.take_request(request, &mut call);
        }
        self.finish(call)
    }

    /// The same for all page requests that wait at the host.
    ///
    /// # Errors
    /// The host could not be asked. Nothing was done.
    pub fn serve_page_requests(&mut self) -> Result<Handled, HostError> {
        let requests = self.host.page_requests()?;
        Ok(self.page_requests(&requests))
    }

    fn take_request(&mut self, request: &PageRequest, call: &mut Call) {
        let key = (request.requester, request.group);
        let held: usize = self.requested;
        let is_told = self.groups.get(&key).is_some_and(|group| group.told);
        if request.group >= GROUPS || is_told || held >= self.limits.page_requests {
            // As units do whose queue is full: the device tries again, and asks again.
            self.figures.refused_requests += 1;
            if request.last {
                let answer = if request.group >= GROUPS { Answer::Invalid } else { Answer::Success };
                call.handled.responses.push(PageResponse { requester: request.requester, group: request.group, answer });
            }
            return;
        }
        self.requested += 1;
        self.groups.entry(key).or_default().pages.push(*request);
        if request.last {
            self.decide(key, call);
        }
    }

    /// A group is complete.
    fn decide(&mut self, key: (Requester, u16), call: &mut Call) {
        let Some(mut group) = self.groups.remove(&key) else { return };
        let missing = self.first_missing(&group.pages, call);
        let Some(missing) = missing else { return self.close(key, &group, Answer::Success, call) };
        let unit = &self.unit;
        let records: Result<Vec<_>, _> = group
            .pages
            .iter()
            .map(|page| self.supervisor.ask(|instance| instance.encode_page_request(unit.kind(), unit.registers(), page)))
            .collect();
        if let Ok(records) = records {
            self.figures.page_requests += records.len() as u64;
            call.handled.page_requests.extend(records);
            group.told = true;
            self.groups.insert(key, group);
            return;
        }
        if let Told::Event(event) = self.event(&blocked(&missing)) {
            self.tell(&event, call);
        }
        self.close(key, &group, Answer::Invalid, call);
    }

    fn close(&mut self, (requester, number): (Requester, u16), group: &Group, answer: Answer, call: &mut Call) {
        self.requested -= group.pages.len();
        call.handled.responses.push(PageResponse { requester, group: number, answer });
    }

    /// Looks at the guest's tables again, and says which page is not to be had.
    fn first_missing(&mut self, pages: &[PageRequest], call: &mut Call) -> Option<PageRequest> {
        let first = pages.first()?;
        let Some(StreamState::Space(number)) = self.streams.get(&first.requester).map(|stream| stream.state.clone()) else { return Some(*first) };
        let space = self.spaces.get(&number)?;
        if space.way.tables().is_empty() {
            return None;
        }
        let scope = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };
        let look = |page: &PageRequest| {
            let iova = Span::of_log2(page.address.0 & !0xfff, 12);
            Invalidation { index: 0, effect: Effect::Range { scope, iova } }
        };
        let before = call.handled.blocked;
        let told = self.host.invalidate(space.id, &pages.iter().map(look).collect::<Vec<_>>());
        self.told(number, told, false, call);
        if call.handled.blocked > before {
            return Some(*first);
        }
        pages.iter().find(|page| !self.allows(number, page)).copied()
    }

    /// Whether the guest's tables allow all that is asked for.
    fn allows(&mut self, number: u64, page: &PageRequest) -> bool {
        let Access { read, write } = page.access;
        // Reading is the least that a device can do with a page.
        let wanted = [(read || !write, EventAccess::Read), (write, EventAccess::Write)];
        let request = blocked(page);
        wanted.into_iter().filter(|(wanted, _)| *wanted).all(|(_, access)| {
            let translated = self.walk(number, &BlockedDma { access, ..request });
            matches!(translated, Some(Ok(translation)) if self.map.target(translation.address.0).is_some())
        })
    }

    /// The guest answers, after everything else that it asked for in the same batch.
    pub(super) fn answered(&mut self, responses: &[GroupResponse], call: &mut Call) {
        for response in responses {
            let key = (Requester { id: response.id.into(), pasid: response.pasid }, response.group);
            // An answer to nothing is what hardware would pass on to a device that does not wait.
            if !self.groups.get(&key).is_some_and(|group| group.told) {
                continue;
            }
            let Some(group) = self.groups.remove(&key) else { continue };
            if response.answer == Answer::Success {
                // What it mapped it need not have announced. If it is not there after all, the device finds out.
                let _ = self.first_missing(&group.pages, call);
            }
            self.close(key, &group, response.answer, call);
        }
    }

    /// A stream exists no more: whoever detaches its device answers what it waits for.
    pub(super) fn drop_requests(&mut self, requester: Requester) {
        for group in (0..GROUPS).filter_map(|group| self.groups.remove(&(requester, group))).collect::<Vec<_>>() {
            self.requested -= group.pages.len();
        }
    }

    /// Tells the host of answers.
    pub(super) fn respond(&mut self, call: &mut Call) {
        if !call.handled.responses.is_empty()
            && let Err(error) = self.host.answer(&call.handled.responses)
        {
            self.figures.host_errors += 1;
            call.handled.unanswered = Some(error);
        }
    }
}

/// A request for a page as one that was refused.
const fn blocked(page: &PageRequest) -> BlockedDma {
    let access = match (page.access.write, page.execute) {
        (true, _) => EventAccess::Write,
        (false, true) => EventAccess::Execute,
        (false, false) => EventAccess::Read,
    };
    BlockedDma { requester: page.requester, iova: page.address, access, privileged: page.privileged }
}
