//! Commands, fault records and page requests: IOMMU sections 3.1 to 3.3. An entry of the command queue has 16 bytes, a fault record 32, a page request 16.
//!
//! Where more is forgotten than a command asks for: `IOTINVAL.VMA` without GV means the host's own address spaces, and here all that fit otherwise; second-stage
//! addresses mean all IOVAs of an address space of two stages; reserved bits are not judged. The extensions for ranges of addresses (S) and for non-leaf
//! entries (NL) are understood whether or not the unit has them.

use stagecraft_sdk::bits::Field;
use stagecraft_sdk::queue::{Access, decode_each, record_words};
use stagecraft_sdk::{Answer, BlockedDma, Command, Effect, Error, Event, EventRecord, FaultKind, Format, PageRequest, Registers, Response, Scope};

use crate::second_stage::SecondStage;
use crate::spec::registers::capabilities;

const COMMANDS: &str = "RISC-V IOMMU 1.0 section 3.1";
const RECORDS: &str = "RISC-V IOMMU 1.0 section 3.2";
const REQUESTS: &str = "RISC-V IOMMU 1.0 section 3.3";

/// `cqcsr.cmd_ill`, which the unit sets.
const COMMAND_ILLEGAL: u32 = 1 << 10;

/// Word 0.
mod low {
    use super::Field;

    pub(super) const OPCODE: Field = Field::new(6, 0);
    pub(super) const FUNCTION: Field = Field::new(9, 7);
    /// IOTINVAL: there is an address.
    pub(super) const AV: Field = Field::new(10, 10);
    pub(super) const PSCID: Field = Field::new(31, 12);
    /// There is a PSCID; of ATS, a process id.
    pub(super) const PSCV: Field = Field::new(32, 32);
    /// There is a GSCID.
    pub(super) const GV: Field = Field::new(33, 33);
    pub(super) const GSCID: Field = Field::new(59, 44);
    /// IODIR: process id, whether there is a device id, and it.
    pub(super) const PID: Field = Field::new(31, 12);
    pub(super) const DV: Field = Field::new(33, 33);
    pub(super) const DID: Field = Field::new(63, 40);
    /// ATS: requester id and, if valid, its segment.
    pub(super) const DSV: Field = Field::new(33, 33);
    pub(super) const RID: Field = Field::new(55, 40);
    pub(super) const DSEG: Field = Field::new(63, 56);
}

/// Word 1.
mod high {
    use super::Field;

    /// IOTINVAL: the page number codes a size.
    pub(super) const S: Field = Field::new(9, 9);
    /// IOTINVAL: page number.
    pub(super) const PAGE: Field = Field::new(61, 10);
    /// ATS.INVAL: an invalidation request's payload: of all process ids; the address codes a size; address.
    pub(super) const GLOBAL: Field = Field::new(0, 0);
    pub(super) const ATS_S: Field = Field::new(11, 11);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
    /// ATS.PRGR: a page request group response's payload: the group, and the answer.
    pub(super) const GROUP: Field = Field::new(40, 32);
    pub(super) const RESPONSE: Field = Field::new(47, 44);
}

/// What a batch of commands asks for.
pub(crate) fn decode(commands: &[u8]) -> Result<Vec<Command>, Error> {
    decode_each::<16>(commands, COMMANDS, |entry, push| {
        let words = stagecraft_sdk::bits::words(entry);
        push(effect(words[0], words[1]).unwrap_or(Effect::Illegal(COMMAND_ILLEGAL)));
    })
}

/// Nothing for a command that is illegal.
fn effect(low: u64, high: u64) -> Option<Effect> {
    let has = |field: Field| field.of(low) == 1;
    let guests = if has(low::GV) { Scope::ALL.domain(low::GSCID.of(low)) } else { Scope::ALL };
    match (low::OPCODE.of(low), low::FUNCTION.of(low)) {
        // IOTINVAL.VMA
        (1, 0) => {
            let scope = if has(low::PSCV) { guests.space(low::PSCID.of(low)) } else { guests };
            Some(Effect::Range(if has(low::AV) { pages(scope, high) } else { scope }))
        }
        // IOTINVAL.GVMA: a PSCID makes no sense, and an address only with a guest.
        (1, 1) if has(low::PSCV) => None,
        (1, 1) => {
            let scope = guests.second_stage();
            Some(Effect::Range(if has(low::AV) && has(low::GV) { pages(scope, high) } else { scope }))
        }
        // IOFENCE.C
        (2, 0) => Some(Effect::Nothing),
        // IODIR.INVAL_DDT, and INVAL_PDT, which needs a device.
        (3, 0) => Some(Effect::Structures(if has(low::DV) { Scope::ALL.id(low::DID.of(low)) } else { Scope::ALL })),
        (3, 1) if has(low::DV) => Some(Effect::Structures(Scope::ALL.id(low::DID.of(low)).space(low::PID.of(low)))),
        // ATS.INVAL
        (4, 0) => {
            let device = Scope::ALL.id(requester(low));
            let all = high::GLOBAL.of(high) == 1 || !has(low::PSCV);
            let scope = if all { device } else { device.space(low::PID.of(low)) };
            let address = high::ADDRESS.in_place(high);
            Some(Effect::DeviceTlb(scope.around(address, size_log2(address >> 12, high::ATS_S.of(high) == 1))))
        }
        // ATS.PRGR. Answers that PCI Express has not named count as its failure.
        (4, 1) => {
            let answer = match high::RESPONSE.of(high) {
                0 => Answer::Success,
                1 => Answer::Invalid,
                _ => Answer::Failure,
            };
            let pasid = has(low::PSCV).then_some(low::PID.of(low) as u32);
            Some(Effect::Response(Response { id: requester(low) as u32, pasid, group: high::GROUP.of(high) as u16, answer }))
        }
        _ => None,
    }
}

/// The device of an ATS command.
const fn requester(low: u64) -> u64 {
    let segment = if low::DSV.of(low) == 1 { low::DSEG.of(low) } else { 0 };
    segment << 16 | low::RID.of(low)
}

fn pages(scope: Scope, high: u64) -> Scope {
    let page = high::PAGE.of(high);
    scope.around(page << 12, size_log2(page, high::S.of(high) == 1))
}

/// Of a page, or as the ones at the page number's lower end say: the first zero is half the size.
const fn size_log2(page: u64, coded: bool) -> u32 {
    if coded { 13 + page.trailing_ones() } else { 12 }
}

/// Word 0 of a fault record.
mod record {
    use super::Field;

    pub(super) const CAUSE: Field = Field::new(11, 0);
    pub(super) const PID: Field = Field::new(31, 12);
    /// There is a process id.
    pub(super) const PV: Field = Field::new(32, 32);
    /// Supervisor privilege, of a request with a process id.
    pub(super) const PRIV: Field = Field::new(33, 33);
    /// Kind of request: untranslated, 1 to fetch, 2 to read, 3 to write.
    pub(super) const TTYP: Field = Field::new(39, 34);
    pub(super) const DID: Field = Field::new(63, 40);
}

/// `iotval2`: the second stage failed while the first one's table was read.
const IMPLICIT: u64 = 1;
/// And was to be marked.
const IMPLICIT_WRITE: u64 = 2;
/// The second stage refused to have an entry of the first one's table marked.
pub(crate) const REFUSED_MARK: &str = "guest-page fault of a mark";

/// The fault record. `causes` are those of what leads to the tables: number and name.
pub(crate) fn encode(event: &Event, causes: &[(u16, &str)]) -> Result<EventRecord, Error> {
    let cause = match event.name.as_deref() {
        Some(REFUSED_MARK) | None => cause(event),
        Some(name) => {
            let unknown = || Error::Unsupported(format!("a fault record for `{name}`"));
            causes.iter().find(|(_, known)| *known == name).map(|(number, _)| u64::from(*number)).ok_or_else(unknown)?
        }
    };
    if event.id >> 24 != 0 {
        return Err(Error::invalid("id", event.id, RECORDS, "a device id has 24 bits"));
    }
    let kind = match event.access {
        Access::Execute => 1,
        Access::Read => 2,
        Access::Write => 3,
    };
    let mut first = record::CAUSE.put(cause) | record::TTYP.put(kind) | record::DID.put(event.id);
    if let Some(pasid) = event.pasid {
        first |= record::PV.put(1) | record::PID.put(pasid.into()) | record::PRIV.put(event.privileged.into());
    }
    // Guest-page faults alone have a guest-physical address, whose lowest two bits say more.
    let address = match cause {
        20 | 21 | 23 => {
            let implicit = if event.reading_table { IMPLICIT } else { 0 };
            let write = if event.name.as_deref() == Some(REFUSED_MARK) { IMPLICIT_WRITE } else { 0 };
            event.intermediate.unwrap_or(event.iova) & !3 | implicit | write
        }
        _ => 0,
    };
    Ok(EventRecord::of_words("fault queue", &[first, 0, event.iova, address]))
}

/// The request that a fault record is about.
pub(crate) fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
    let [first, _, iova, _] = record_words::<4>(record, RECORDS)?;
    // Untranslated requests, and translated ones.
    let access = match record::TTYP.of(first) {
        1 | 5 => Access::Execute,
        2 | 6 => Access::Read,
        3 | 7 => Access::Write,
        // The unit's own accesses, translation requests, messages.
        _ => return Ok(None),
    };
    let has_pasid = record::PV.of(first) != 0;
    let pasid = has_pasid.then(|| record::PID.of(first) as u32);
    let privileged = has_pasid && record::PRIV.of(first) != 0;
    Ok(Some(BlockedDma { id: record::DID.of(first), pasid, iova, access, privileged }))
}

/// The cause of a walk that failed: access faults for what cannot be read or has too many bits, page faults else, guest-page faults in the second stage.
fn cause(event: &Event) -> u64 {
    let base = match (event.fault, event.is_of(SecondStage::NAME)) {
        (FaultKind::Unreadable | FaultKind::AddressSize, _) => match event.access {
            Access::Execute => return 1,
            _ => 5,
        },
        (_, true) => match event.access {
            Access::Execute => return 20,
            _ => 21,
        },
        _ => match event.access {
            Access::Execute => return 12,
            _ => 13,
        },
    };
    match event.access {
        Access::Write => base + 2,
        _ => base,
    }
}

/// Words of a page request.
mod request {
    use super::Field;

    /// Word 0.
    pub(super) const PID: Field = Field::new(31, 12);
    pub(super) const PV: Field = Field::new(32, 32);
    /// With a process id only: privileged, and to execute.
    pub(super) const PRIV: Field = Field::new(33, 33);
    pub(super) const EXEC: Field = Field::new(34, 34);
    pub(super) const DID: Field = Field::new(63, 40);
    /// Word 1: the message's payload.
    pub(super) const R: Field = Field::new(0, 0);
    pub(super) const W: Field = Field::new(1, 1);
    pub(super) const LAST: Field = Field::new(2, 2);
    pub(super) const GROUP: Field = Field::new(11, 3);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
}

/// The page request.
pub(crate) fn encode_page_request(registers: &Registers, page: &PageRequest) -> Result<EventRecord, Error> {
    if capabilities::ATS.of(registers.need("CAPABILITIES")?) == 0 {
        return Err(Error::Unsupported("page requests: the unit has no queue for them (capabilities.ATS)".to_owned()));
    }
    if page.id >> 24 != 0 {
        return Err(Error::invalid("id", page.id, REQUESTS, "a device id has 24 bits"));
    }
    let mut first = request::DID.put(page.id);
    if let Some(pasid) = page.pasid {
        first |= request::PV.put(1) | request::PID.put(pasid.into());
        first |= request::PRIV.put(page.privileged.into()) | request::EXEC.put(page.execute.into());
    }
    let mut payload = request::R.put(page.read.into()) | request::W.put(page.write.into()) | request::LAST.put(page.last.into());
    payload |= request::GROUP.put(page.group.into()) | request::ADDRESS.in_place(page.address);
    Ok(EventRecord::of_words("page-request queue", &[first, payload]))
}
