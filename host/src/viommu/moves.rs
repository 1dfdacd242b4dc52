//! From ways to attachments: who goes the same way shares a space, and a space whose streams all go another way together gets other tables in place.

use std::collections::BTreeMap;

use vm_memory::GuestMemory;

use super::host::{AddressSpaces, HostError, Way};
use super::lookups::Wanted;
use super::retry::{Again, Retry};
use super::{Call, Space, StreamState, Viommu};
use crate::plugin::{Requester, SuperviseError, Tag};
use crate::sync::{self, Reason, Report};
use crate::table::Format;

/// Why a stream cannot have the way that it wants.
enum Refusal {
    /// The plugin is out of use.
    Plugin(SuperviseError),
    Other(String),
}

impl<M: GuestMemory + Clone + Send + 'static, A: AddressSpaces> Viommu<M, A> {
    /// Gives streams what they want. Those that get nothing come first: whatever fails later, they are blocked.
    pub(super) fn apply(&mut self, moves: Vec<(Requester, Wanted)>, call: &mut Call) {
        let mut ways: Vec<(Requester, Way, Tag)> = Vec::with_capacity(moves.len());
        for (requester, wanted) in moves {
            let state = match wanted {
                Wanted::Way(way, tag) => {
                    ways.push((requester, way, tag));
                    continue;
                }
                Wanted::Blocked(blocked) => StreamState::Blocked(blocked),
                Wanted::Refused(reason) => StreamState::Refused(reason),
                Wanted::Unknown(reason) => StreamState::Unknown(reason),
            };
            self.leave(requester, call);
            self.set_state(requester, state);
        }
        ways.retain(|(requester, way, tag)| !self.stays(*requester, way, *tag));
        self.switch_together(&mut ways, call);
        for (requester, way, tag) in ways {
            self.go(requester, &way, tag, call);
        }
    }

    /// Whether a stream has what it wants already; perhaps under another name.
    fn stays(&mut self, requester: Requester, way: &Way, tag: Tag) -> bool {
        let Some(stream) = self.streams.get(&requester) else { return true };
        let StreamState::Space(number) = stream.state else { return false };
        let has = self.spaces.get(&number).is_some_and(|space| !space.dead && space.way == *way);
        if has {
            self.name(requester, number, tag);
        }
        has
    }

    /// Spaces whose streams all want the same other tables get those in place.
    fn switch_together(&mut self, ways: &mut Vec<(Requester, Way, Tag)>, call: &mut Call) {
        let mut from: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
        for (index, (requester, ..)) in ways.iter().enumerate() {
            if let Some(number) = self.streams.get(requester).and_then(|stream| stream.attached) {
                from.entry(number).or_default().push(index);
            }
        }
        let mut done = vec![false; ways.len()];
        for (number, members) in from {
            let (Some(space), Some(first)) = (self.spaces.get(&number), members.first()) else { continue };
            let way = ways[*first].1.clone();
            let together = members.len() == space.members.len() && members.iter().all(|index| ways[*index].1 == way);
            let alike = !way.tables().is_empty() && !space.way.tables().is_empty();
            if space.dead || !together || !alike || self.ways.contains_key(&way) {
                continue;
            }
            // A format that cannot be opened is no reason to drop the space here: each stream is told on its own way.
            let Ok(opened) = self.open(&way) else { continue };
            let (id, old) = (space.id, space.way.clone());
            let told = self.host.switch(id, &way, opened);
            if let Err(HostError::Refused(_)) = told {
                self.figures.host_errors += 1;
                continue;
            }
            if told.is_ok() {
                self.figures.switches += 1;
                self.ways.remove(&old);
                self.ways.insert(way.clone(), number);
                if let Some(space) = self.spaces.get_mut(&number) {
                    (space.way, space.walker) = (way, None);
                }
                for index in &members {
                    let (requester, _, tag) = &ways[*index];
                    self.name(*requester, number, *tag);
                    self.set_state(*requester, StreamState::Space(number));
                    done[*index] = true;
                }
                call.synchronised.insert(number);
            } else {
                members.iter().for_each(|index| done[*index] = true);
            }
            self.told(number, told, true, call);
        }
        let mut done = done.into_iter();
        ways.retain(|_| !done.next().unwrap_or(false));
    }

    /// Attaches a stream to the space that goes its way, which is made if there is none.
    fn go(&mut self, requester: Requester, way: &Way, tag: Tag, call: &mut Call) {
        call.about = Some(requester);
        let number = match self.space_for(requester, way, call) {
            Ok(number) => number,
            Err(refusal) => {
                self.leave(requester, call);
                let state = match refusal {
                    Refusal::Plugin(error) => StreamState::Unknown(error.to_string()),
                    Refusal::Other(reason) => StreamState::Refused(reason),
                };
                return self.try_again(requester, state);
            }
        };
        let Some(space) = self.spaces.get_mut(&number) else { return };
        match self.host.attach(requester, space.id) {
            Ok(report) => {
                self.figures.attachments += 1;
                space.members.insert(requester);
                let before = self.streams.get_mut(&requester).and_then(|stream| stream.attached.replace(number));
                if let Some(before) = before.filter(|before| *before != number) {
                    self.without(before, requester);
                }
                self.name(requester, number, tag);
                self.set_state(requester, StreamState::Space(number));
                if report != Report::default() {
                    self.told(number, Ok(report), true, call);
                }
            }
            Err(error) => {
                self.figures.host_errors += 1;
                self.leave(requester, call);
                self.drop_if_empty(number);
                self.try_again(requester, StreamState::Refused(error.to_string()));
            }
        }
    }

    /// The space that goes this way.
    fn space_for(&mut self, requester: Requester, way: &Way, call: &mut Call) -> Result<u64, Refusal> {
        if let Some(number) = self.ways.get(way) {
            return Ok(*number);
        }
        if self.spaces.len() >= self.limits.spaces {
            // The one that it leaves may make room, at the price of a moment without any.
            self.leave(requester, call);
        }
        if self.spaces.len() >= self.limits.spaces {
            return Err(Refusal::Other(format!("the guest uses more than {} address spaces", self.limits.spaces)));
        }
        let opened = self.open(way).map_err(|error| match error.is_failure() {
            true => Refusal::Plugin(error),
            false => Refusal::Other(error.to_string()),
        })?;
        let number = self.next_space;
        let (id, report) = self.host.allocate(way, opened, self.pages.watcher_of(number)).map_err(|error| {
            self.figures.host_errors += 1;
            Refusal::Other(error.to_string())
        })?;
        self.next_space += 1;
        self.figures.allocations += 1;
        let space = Space {
            id,
            way: way.clone(),
            members: [].into(),
            dead: false,
            for_plugin: false,
            is_whole: false,
            looked: 0,
            retry: Retry::default(),
            walker: None,
        };
        self.spaces.insert(number, space);
        self.ways.insert(way.clone(), number);
        self.numbers.insert(id, number);
        call.synchronised.insert(number);
        self.told(number, Ok(report), true, call);
        Ok(number)
    }

    /// A way with its formats open.
    fn open(&self, way: &Way) -> Result<sync::Way, SuperviseError> {
        way.open(|table| Ok(Box::new(self.supervisor.open(table)?) as Box<dyn Format>))
    }

    /// Blocks a stream.
    pub(super) fn leave(&mut self, requester: Requester, call: &mut Call) {
        let Some(number) = self.streams.get(&requester).and_then(|stream| stream.attached) else { return };
        self.unname(requester);
        match self.host.detach(requester) {
            Ok(()) => {
                self.figures.detachments += 1;
                if let Some(stream) = self.streams.get_mut(&requester) {
                    stream.attached = None;
                }
                self.without(number, requester);
            }
            Err(error) => {
                self.figures.host_errors += 1;
                call.handled.loose.push((requester, error));
                self.schedule(Again::Stream(requester));
            }
        }
    }

    /// Streams that the host detached although nobody asked for it are blocked, and tried again.
    pub(super) fn let_go_of_lost(&mut self, call: &mut Call) {
        for requester in self.host.lost() {
            if self.streams.get(&requester).is_none_or(|stream| stream.attached.is_none()) {
                // It is known to be blocked. Nobody but this vIOMMU is to attach it again.
                if let Err(error) = self.host.detach(requester) {
                    call.handled.loose.push((requester, error));
                }
                continue;
            }
            self.figures.host_errors += 1;
            self.leave(requester, call);
            self.try_again(requester, StreamState::Refused("the kernel failed while it was moved to another page table".to_owned()));
        }
    }

    /// What the host said of a space that was to be looked at, all of it if `whole`. After an error nobody may use it.
    pub(super) fn told(&mut self, number: u64, told: Result<Report, HostError>, whole: bool, call: &mut Call) {
        call.handled.spaces += 1;
        self.figures.looks += 1;
        if let Some(space) = self.spaces.get_mut(&number) {
            space.looked = self.calls;
        }
        match told {
            Ok(report) => {
                call.handled.changes += report.changes;
                call.handled.blocked += report.blocked_count;
                if report.blocked_count > 0 {
                    if let Some(space) = self.spaces.get_mut(&number) {
                        space.for_plugin = report.blocked.iter().all(|blocked| blocked.reason == Reason::Format);
                        space.is_whole = false;
                    }
                    self.tell_blocked(number, &report, call);
                    self.schedule(Again::Space(number));
                    return;
                }
                if let Some(space) = self.spaces.get_mut(&number) {
                    space.is_whole |= whole;
                    space.for_plugin &= !report.lacks;
                }
                if report.lacks {
                    self.schedule(Again::Space(number));
                } else if whole {
                    self.settled(Again::Space(number));
                }
            }
            Err(error) => {
                self.figures.host_errors += 1;
                let Some(space) = self.spaces.get_mut(&number) else { return };
                space.dead = true;
                if self.ways.get(&space.way) == Some(&number) {
                    self.ways.remove(&space.way);
                }
                let members: Vec<Requester> = space.members.iter().copied().collect();
                for requester in members {
                    self.leave(requester, call);
                    self.try_again(requester, StreamState::Refused(error.to_string()));
                }
                self.drop_if_empty(number);
            }
        }
    }

    fn set_state(&mut self, requester: Requester, state: StreamState) {
        let Some(stream) = self.streams.get_mut(&requester) else { return };
        let is_loose = stream.attached.is_some() && !matches!(state, StreamState::Space(_));
        let is_settled = !is_loose && !matches!(state, StreamState::Unknown(_));
        if !matches!(state, StreamState::Space(_)) {
            // By which numbers caches know it that it has nothing is not what they knew it by before.
            stream.tag = Tag::default();
        }
        stream.state = state;
        if is_settled {
            self.settled(Again::Stream(requester));
        }
    }

    /// A stream is blocked, and looked up again in some time whatever its structures say.
    fn try_again(&mut self, requester: Requester, state: StreamState) {
        if let Some(stream) = self.streams.get_mut(&requester) {
            stream.stale = true;
            stream.state = state;
            self.schedule(Again::Stream(requester));
        }
    }

    /// Commands mean a space by this tag for the sake of a stream.
    fn name(&mut self, requester: Requester, number: u64, tag: Tag) {
        self.unname(requester);
        let has_tables = self.spaces.get(&number).is_some_and(|space| !space.way.tables().is_empty());
        let Some(stream) = self.streams.get_mut(&requester) else { return };
        stream.tag = tag;
        if has_tables {
            stream.named = Some((number, tag));
            self.index.add(tag, number);
        }
    }

    fn unname(&mut self, requester: Requester) {
        if let Some((number, tag)) = self.streams.get_mut(&requester).and_then(|stream| stream.named.take()) {
            self.index.remove(tag, number);
        }
    }

    fn without(&mut self, number: u64, requester: Requester) {
        if let Some(space) = self.spaces.get_mut(&number) {
            space.members.remove(&requester);
        }
        self.drop_if_empty(number);
    }

    fn drop_if_empty(&mut self, number: u64) {
        let Some(space) = self.spaces.get(&number).filter(|space| space.members.is_empty()) else { return };
        if self.ways.get(&space.way) == Some(&number) {
            self.ways.remove(&space.way);
        }
        self.host.release(space.id);
        self.numbers.remove(&space.id);
        self.settled(Again::Space(number));
        self.spaces.remove(&number);
    }
}
