//! A guest that runs: what its commands ask for, and how faults are told to it. What a plugin answers is checked.

use crate::plugin::Requester;
use crate::plugin::bindings::exports::stagecraft::format::queue as wit;
use crate::plugin::bindings::stagecraft::format::types;
use crate::plugin::error::clean;
use crate::table::FaultKind;
use crate::{Access, Iova, Span};

/// Most bytes of commands that one call takes.
pub const MAX_COMMAND_BYTES: usize = 64 << 10;
/// Most words of one answer: eight items for each entry of 16 bytes.
const MAX_WORDS: usize = MAX_COMMAND_BYTES / 16 * 8 * 4;
/// Most bytes of an event record.
pub(super) const MAX_RECORD_BYTES: usize = 256;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing that concerns translation: a wait, a hint, a response.
    Nothing,
    /// Forget all translations.
    Everything,
    /// Forget the translations of these addresses.
    Range {
        /// Whose.
        scope: Scope,
        /// The IOVAs; see [`Scope::second_stage`].
        iova: Span,
    },
    /// Device structures were changed.
    Structures(Scope),
    /// Forget what device TLBs keep.
    DeviceTlb {
        /// Whose.
        scope: Scope,
        /// The IOVAs.
        iova: Span,
    },
    /// The command is illegal, and hardware goes no further; with the code that it reports.
    Illegal(u32),
    /// A group of page requests is answered.
    Response(GroupResponse),
}

/// The guest's answer to a group of page requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupResponse {
    /// The requester.
    pub id: u32,
    /// The PASID of the requests.
    pub pasid: Option<u32>,
    /// Which group, as [`PageRequest::group`] has it.
    pub group: u16,
    /// What the device is told.
    pub answer: Answer,
}

/// What a device is told that asked for pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// They are there: it tries again.
    Success,
    /// At least one is not to be had.
    Invalid,
    /// It is not to ask any more.
    Failure,
}

/// Whom a command means: everybody that no field leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scope {
    /// Only leaves were changed; of structures, only the last one on the way.
    pub leaf: bool,
    /// The addresses are inputs of the second of two tables: of an address space of two tables all IOVAs are meant.
    pub second_stage: bool,
    /// VMID, domain id, GSCID.
    pub domain: Option<u16>,
    /// ASID, PASID, PSCID; of structures and device TLBs a PASID.
    pub space: Option<u32>,
    /// The requester, and the bits of its id that play no part.
    pub id: Option<(u32, u32)>,
}

impl Scope {
    /// Whether an address space with this tag, used by `id`, is meant.
    #[must_use]
    pub fn includes(&self, tag: super::Tag, id: u64) -> bool {
        let number = |wanted: Option<u32>, has: Option<u32>| wanted.is_none() || has.is_none() || wanted == has;
        let same_id = self.id.is_none_or(|(wanted, ignored)| (u64::from(wanted) ^ id) & !u64::from(ignored) == 0);
        number(self.domain.map(u32::from), tag.domain) && number(self.space, tag.space) && same_id
    }
}

/// One thing that one command of a batch asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Invalidation {
    /// Which command of the batch, counted from zero.
    pub index: u16,
    /// What it asks for.
    pub effect: Effect,
}

/// What a request did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventAccess {
    /// It read.
    Read,
    /// It wrote.
    Write,
    /// It fetched instructions.
    Execute,
}

/// A request that failed, in words of no architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Why.
    pub fault: FaultKind,
    /// For a request that was blocked: [`Blocked::event`](super::Blocked::event). Such an event has neither format nor level, unless a structure stood
    /// behind a table that failed.
    pub name: Option<String>,
    /// The format of the table that failed: only the plugin knows which stage that is. None if no table was reached.
    pub format: Option<String>,
    /// The level of the last entry that was looked at, as [`Level::number`](crate::table::Level::number) has it.
    pub level: Option<i8>,
    /// The entries of that table that were looked at, from its root.
    pub entries: Vec<u64>,
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// The request's PASID.
    pub pasid: Option<u32>,
    /// What the device asked for.
    pub iova: u64,
    /// The second stage's input, where that failed under a first one.
    pub intermediate: Option<u64>,
    /// The second stage failed while an entry of the first one's tables, or a device structure, was read.
    pub reading_table: bool,
    /// A structure or entry that could not be read: its address.
    pub unreadable: Option<u64>,
    /// What the device did.
    pub access: EventAccess,
    /// The request was privileged.
    pub privileged: bool,
    /// The domain of the address space's tag.
    pub domain: Option<u32>,
}

/// A device asks for a page. It may ask for several at once, in one group, and waits for one answer to all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Whose.
    pub requester: Requester,
    /// An address in the page.
    pub address: Iova,
    /// What it wants to do there.
    pub access: Access,
    /// It wants to execute.
    pub execute: bool,
    /// It asks with privilege.
    pub privileged: bool,
    /// By which number the answer names the group: 9 bits.
    pub group: u16,
    /// It is the last one of its group.
    pub last: bool,
}

/// A request of a device that the host refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockedDma {
    /// Whose.
    pub requester: Requester,
    /// What it asked for.
    pub iova: Iova,
    /// What it wanted to do.
    pub access: EventAccess,
    /// It was a privileged request.
    pub privileged: bool,
}

/// Groups that a requester can have at a time.
pub const GROUPS: u16 = 512;

/// An architecture's record of an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventRecord {
    /// Where it goes, as the architecture calls it: a queue, a log, a register.
    pub queue: String,
    /// The record.
    pub bytes: Vec<u8>,
}

/// Bits of word 0 that are named for each kind.
const NAMED: [u64; 7] = [0xf, 0xf, 0xffff_ffff_f1ff, 0xffff_ffff_f1ff, 0xffff_ffff_f1ff, 0xf, 0xffff_f18f];
const INDEX: u64 = 0xffff << 48;

/// Unpacks the answer of `decode-commands` to a batch of `bytes`; the reason if it has no meaning.
pub(super) fn invalidations(words: &[u64], bytes: usize) -> Result<Vec<Invalidation>, String> {
    let (items, rest) = words.as_chunks::<4>();
    if !rest.is_empty() || words.len() > MAX_WORDS {
        return Err(format!("{} words; there are four per item, and at most {MAX_WORDS}", words.len()));
    }
    let mut found: Vec<Invalidation> = Vec::with_capacity(items.len());
    for item in items {
        let next = invalidation(item)?;
        // No command is shorter than a byte.
        if usize::from(next.index) >= bytes {
            return Err(format!("item {} is of command {}, of {bytes} bytes of commands", found.len(), next.index));
        }
        if let Some(last) = found.last() {
            if last.index > next.index {
                return Err(format!("command {} after command {}", next.index, last.index));
            }
            if matches!(last.effect, Effect::Illegal(_)) {
                return Err(format!("an item after the illegal command {}", last.index));
            }
        }
        found.push(next);
    }
    Ok(found)
}

fn invalidation(item: &[u64; 4]) -> Result<Invalidation, String> {
    let [word, id, first, last] = *item;
    let kind = (word & 0xf) as usize;
    let Some(named) = NAMED.get(kind) else { return Err(format!("word {word:#x} is of kind {kind}; there are 0 to 6")) };
    if word & !(named | INDEX) != 0 {
        return Err(format!("word {word:#x} has bits {:#x}, which have no meaning", word & !(named | INDEX)));
    }
    let number = |flag: u32, low: u32, bits: u32| {
        let value = word >> low & ((1 << bits) - 1);
        match word >> flag & 1 {
            0 if value != 0 => Err(format!("word {word:#x} has a number that does not count")),
            0 => Ok(None),
            _ => Ok(Some(value as u32)),
        }
    };
    let index = (word >> 48) as u16;
    let others = |used: bool, value: u64| if !used && value != 0 { Err(format!("{value:#x} means nothing beside word {word:#x}")) } else { Ok(()) };
    others(matches!(kind, 2 | 4 | 6), first | last)?;
    if kind == 5 {
        let code = u32::try_from(id).map_err(|_| format!("the code {id:#x} of an illegal command has more than 32 bits"))?;
        return Ok(Invalidation { index, effect: Effect::Illegal(code) });
    }
    others(word >> 8 & 1 == 1, id)?;
    if kind < 2 {
        return Ok(Invalidation { index, effect: if kind == 0 { Effect::Nothing } else { Effect::Everything } });
    }
    let (wanted, ignored) = (id as u32, (id >> 32) as u32);
    if wanted & ignored != 0 {
        return Err(format!("the id {wanted:#x} has bits that play no part ({ignored:#x})"));
    }
    if kind == 6 {
        if word >> 8 & 1 == 0 || ignored != 0 {
            return Err(format!("word {word:#x} answers page requests of more than one requester"));
        }
        let group = u16::try_from(first).ok().filter(|group| *group < GROUPS).ok_or_else(|| format!("{first:#x} is no group of page requests"))?;
        let answer = match last {
            0 => Answer::Success,
            1 => Answer::Invalid,
            2 => Answer::Failure,
            _ => return Err(format!("{last:#x} is no answer to page requests; there are 0 to 2")),
        };
        return Ok(Invalidation { index, effect: Effect::Response(GroupResponse { id: wanted, pasid: number(7, 12, 20)?, group, answer }) });
    }
    let scope = Scope {
        leaf: word >> 4 & 1 == 1,
        second_stage: word >> 5 & 1 == 1,
        domain: number(6, 32, 16)?.map(|domain| domain as u16),
        space: number(7, 12, 20)?,
        id: (word >> 8 & 1 == 1).then_some((wanted, ignored)),
    };
    if kind == 3 {
        return Ok(Invalidation { index, effect: Effect::Structures(scope) });
    }
    let Some(iova) = Span::new(first, last) else { return Err(format!("the empty range {first:#x}..={last:#x}")) };
    Ok(Invalidation { index, effect: if kind == 2 { Effect::Range { scope, iova } } else { Effect::DeviceTlb { scope, iova } } })
}

/// An event for a plugin.
pub(super) fn event_in(event: &Event) -> wit::Event {
    wit::Event {
        fault: fault_kind_in(event.fault),
        name: event.name.clone(),
        format: event.format.clone(),
        level: event.level,
        entries: event.entries.clone(),
        id: event.id,
        pasid: event.pasid,
        iova: event.iova,
        intermediate: event.intermediate,
        reading_table: event.reading_table,
        unreadable: event.unreadable,
        access: match event.access {
            EventAccess::Read => wit::Access::Read,
            EventAccess::Write => wit::Access::Write,
            EventAccess::Execute => wit::Access::Execute,
        },
        privileged: event.privileged,
        domain: event.domain,
    }
}

/// A page request for a plugin.
pub(super) fn page_request_in(request: &PageRequest) -> wit::PageRequest {
    let PageRequest { requester, address, access, execute, privileged, group, last } = *request;
    wit::PageRequest {
        id: requester.id,
        pasid: requester.pasid,
        address: address.0,
        read: access.read,
        write: access.write,
        execute,
        privileged,
        group,
        last,
    }
}

const fn fault_kind_in(kind: FaultKind) -> types::FaultKind {
    match kind {
        FaultKind::Translation => types::FaultKind::Translation,
        FaultKind::Permission => types::FaultKind::Permission,
        FaultKind::AccessFlag => types::FaultKind::AccessFlag,
        FaultKind::AddressSize => types::FaultKind::AddressSize,
        FaultKind::Reserved => types::FaultKind::Reserved,
        FaultKind::Misaligned => types::FaultKind::Misaligned,
        FaultKind::Unreadable => types::FaultKind::Unreadable,
        FaultKind::Configuration => types::FaultKind::Configuration,
    }
}

/// A record from a plugin.
pub(super) fn record(record: wit::EventRecord) -> Result<EventRecord, String> {
    let wit::EventRecord { queue, bytes } = record;
    if bytes.is_empty() || bytes.len() > MAX_RECORD_BYTES {
        return Err(format!("an event record of {} bytes; there are 1 to {MAX_RECORD_BYTES}", bytes.len()));
    }
    Ok(EventRecord { queue: clean(&queue), bytes })
}

/// A request that the host refused, from a plugin.
pub(super) fn blocked_dma(blocked: wit::BlockedDma) -> Result<BlockedDma, String> {
    let wit::BlockedDma { id, pasid, iova, access, privileged } = blocked;
    if let Some(pasid) = pasid.filter(|pasid| pasid >> 20 != 0) {
        return Err(format!("the PASID {pasid:#x}, which has more than 20 bits"));
    }
    let access = match access {
        wit::Access::Read => EventAccess::Read,
        wit::Access::Write => EventAccess::Write,
        wit::Access::Execute => EventAccess::Execute,
    };
    Ok(BlockedDma { requester: Requester { id, pasid }, iova: Iova(iova), access, privileged })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Tag;

    #[test]
    fn every_kind_of_item_has_its_meaning() {
        let words = [
            [0, 0, 0, 0],
            [1 | 1 << 48, 0, 0, 0],
            [0x0001_fedc_abcd_e0d2, 0, 0x1000, 0x1fff],
            [0x0002_0000_0000_0123, 0x7_0000_01f8, 0, 0],
            [0x0003_0000_0000_0004, 0, 0, u64::MAX],
            [0x0004_0000_abcd_e186, 0x38, 0x1ff, 2],
            [0x0004_0000_0000_0106, 0x38, 7, 0],
            [0x0004_0000_0000_0005, 9, 0, 0],
        ];
        let found = invalidations(words.as_flattened(), 96).expect("a meaning");
        let everybody = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };
        let scope = Scope { leaf: true, domain: Some(0xfedc), space: Some(0xa_bcde), ..everybody };
        let structures = Scope { second_stage: true, id: Some((0x1f8, 7)), ..everybody };
        let effects = [
            (0, Effect::Nothing),
            (1, Effect::Everything),
            (1, Effect::Range { scope, iova: Span { first: 0x1000, last: 0x1fff } }),
            (2, Effect::Structures(structures)),
            (3, Effect::DeviceTlb { scope: everybody, iova: Span::ALL }),
            (4, Effect::Response(GroupResponse { id: 0x38, pasid: Some(0xa_bcde), group: 0x1ff, answer: Answer::Failure })),
            (4, Effect::Response(GroupResponse { id: 0x38, pasid: None, group: 7, answer: Answer::Success })),
            (4, Effect::Illegal(9)),
        ];
        assert_eq!(found, effects.map(|(index, effect)| Invalidation { index, effect }));
    }

    #[test]
    fn items_without_a_meaning_are_refused_with_the_reason() {
        let refused = |words: &[[u64; 4]], reason: &str| {
            let error = invalidations(words.as_flattened(), 32).expect_err("refused");
            assert!(error.contains(reason), "{error}");
        };
        refused(&[[7, 0, 0, 0]], "kind 7; there are 0 to 6");
        refused(&[[0x10, 0, 0, 0]], "bits 0x10, which have no meaning");
        refused(&[[0x202, 0, 0, 1]], "bits 0x200, which");
        refused(&[[0x1002, 0, 0, 1]], "a number that does not count");
        refused(&[[1 << 32 | 2, 0, 0, 1]], "a number that does not count");
        refused(&[[2, 1, 0, 1]], "0x1 means nothing");
        refused(&[[1, 0, 0, 1]], "0x1 means nothing");
        refused(&[[0x102, 0x1_0000_0001, 0, 1]], "bits that play no part");
        refused(&[[2, 0, 2, 1]], "the empty range");
        refused(&[[6, 0, 1, 0]], "of more than one requester");
        refused(&[[0x106, 1 << 32, 1, 0]], "of more than one requester");
        refused(&[[0x106, 1, 0x200, 0]], "no group");
        refused(&[[0x106, 1, 1, 3]], "no answer");
        refused(&[[0x116, 1, 1, 0]], "bits 0x10, which have no meaning");
        refused(&[[5, 1 << 32, 0, 0]], "more than 32 bits");
        refused(&[[1 << 48, 0, 0, 0], [0, 0, 0, 0]], "command 0 after command 1");
        refused(&[[5, 0, 0, 0], [0, 0, 0, 0]], "after the illegal command 0");
        refused(&[[32 << 48, 0, 0, 0]], "of command 32, of 32 bytes");
        assert!(invalidations(&[0; 3], 16).is_err() && invalidations(&[0; MAX_WORDS + 4], 1 << 20).is_err());
    }

    #[test]
    fn a_scope_includes_what_it_does_not_leave_out() {
        let everybody = Scope { leaf: false, second_stage: false, domain: None, space: None, id: None };
        let tag = Tag { domain: Some(5), space: Some(7) };
        assert!(everybody.includes(tag, 9) && Scope { domain: Some(5), space: Some(7), id: Some((8, 1)), ..everybody }.includes(tag, 9));
        assert!(!Scope { domain: Some(6), ..everybody }.includes(tag, 9));
        assert!(!Scope { space: Some(6), ..everybody }.includes(tag, 9));
        assert!(!Scope { id: Some((8, 2)), ..everybody }.includes(tag, 9));
        assert!(Scope { domain: Some(6), space: Some(6), ..everybody }.includes(Tag::default(), 9), "a tag that lacks the numbers is always meant");
        assert!(!Scope { id: Some((9, 0)), ..everybody }.includes(tag, 1 << 32 | 9));
    }
}
