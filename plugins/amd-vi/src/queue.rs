//! Commands, events and page requests: 48882 sections 2.4, 2.5 and 2.6. An entry of the command buffer has 16 bytes, and so have one of the event log and one of the
//! peripheral page request (PPR) log.
//!
//! Where more is forgotten than a command asks for: pages of a guest-physical range mean all IOVAs of a nested address space, reserved bits are not judged,
//! and `INVALIDATE_IOMMU_ALL` counts as legal whether or not the unit says that it has it. All pages of a PASID mean its guest CR3 table entry as well: that is what
//! drivers write who changed it, and there is no other command for these tables alone.

use stagecraft_sdk::bits::Field;
use stagecraft_sdk::queue::{Access, decode_each, record_words};
use stagecraft_sdk::{Answer, BlockedDma, Command, Effect, Error, Event, EventRecord, FaultKind, Format, PageRequest, Registers, Response, Scope};

use crate::spec::registers::efr;
use crate::spec::v1;
use crate::v1::V1;

const COMMANDS: &str = "48882 section 2.4";
const EVENTS: &str = "48882 section 2.5";
const REQUESTS: &str = "48882 section 2.6";

/// Code of the event that an illegal command causes, section 2.5.6.
const ILLEGAL_COMMAND_ERROR: u32 = 5;

/// Word 0 of commands and events.
mod low {
    use super::Field;

    pub(super) const DEVICE: Field = Field::new(15, 0);
    pub(super) const CODE: Field = Field::new(63, 60);
    /// INVALIDATE_IOMMU_PAGES, and INVALIDATE_DEVTAB_ENTRY's neighbours.
    pub(super) const PASID: Field = Field::new(19, 0);
    pub(super) const DOMAIN: Field = Field::new(47, 32);
    /// INVALIDATE_IOTLB_PAGES: parts of the PASID.
    pub(super) const PASID_15_8: Field = Field::new(23, 16);
    pub(super) const PASID_7_0: Field = Field::new(55, 48);
    pub(super) const PASID_19_16: Field = Field::new(59, 56);
    /// COMPLETE_PPR_REQUEST.
    pub(super) const PASID_OF_REQUEST: Field = Field::new(51, 32);
}

/// Word 1 of the commands with an address.
mod high {
    use super::Field;

    /// The address codes a size.
    pub(super) const S: Field = Field::new(0, 0);
    /// Page directory entries too, not only leaves.
    pub(super) const PDE: Field = Field::new(1, 1);
    /// A guest-virtual address of a PASID.
    pub(super) const GN: Field = Field::new(2, 2);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
    /// COMPLETE_PPR_REQUEST: the group (Completion Tag, without the bit that says that a request is the last one), and the answer.
    pub(super) const TAG: Field = Field::new(40, 32);
    pub(super) const COMPLETION: Field = Field::new(47, 44);
}

/// What a batch of commands asks for.
pub(crate) fn decode(commands: &[u8]) -> Result<Vec<Command>, Error> {
    decode_each::<16>(commands, COMMANDS, |entry, push| {
        let words = stagecraft_sdk::bits::words(entry);
        let (low, high) = (words[0], words[1]);
        let guest = high::GN.of(high) == 1;
        match low::CODE.of(low) {
            // COMPLETION_WAIT, INVALIDATE_INTERRUPT_TABLE, PREFETCH_IOMMU_PAGES.
            1 | 5 | 6 => push(Effect::Nothing),
            // COMPLETE_PPR_REQUEST, section 2.4.7. Answers that PCI Express has not named count as its failure.
            7 => {
                let answer = match high::COMPLETION.of(high) {
                    0 => Answer::Success,
                    1 => Answer::Invalid,
                    _ => Answer::Failure,
                };
                let pasid = guest.then_some(low::PASID_OF_REQUEST.of(low) as u32);
                push(Effect::Response(Response { id: low::DEVICE.of(low) as u32, pasid, group: high::TAG.of(high) as u16, answer }));
            }
            2 => push(Effect::Structures(Scope::ALL.id(low::DEVICE.of(low)))),
            3 => {
                let domain = Scope::ALL.domain(low::DOMAIN.of(low));
                let scope = if guest { domain.space(low::PASID.of(low)) } else { domain.second_stage() };
                if guest && size_log2(high) >= 64 {
                    push(Effect::Structures(scope));
                }
                push(Effect::Range(sized(scope, high).leaf(high::PDE.of(high) == 0)));
            }
            4 => {
                let pasid = low::PASID_19_16.of(low) << 16 | low::PASID_15_8.of(low) << 8 | low::PASID_7_0.of(low);
                let device = Scope::ALL.id(low::DEVICE.of(low));
                push(Effect::DeviceTlb(sized(if guest { device.space(pasid) } else { device }, high)));
            }
            8 => {
                push(Effect::Structures(Scope::ALL));
                push(Effect::Everything);
            }
            _ => push(Effect::Illegal(ILLEGAL_COMMAND_ERROR)),
        }
    })
}

/// Section 2.4.3: a page, or with S as many as the ones at the address's lower end say: the first zero is half the size.
fn sized(scope: Scope, high: u64) -> Scope {
    match size_log2(high) {
        64.. => scope,
        size_log2 => scope.around(high::ADDRESS.in_place(high), size_log2),
    }
}

/// All ones up to bit 62 is the whole address space, whatever bit 63 says.
const fn size_log2(high: u64) -> u32 {
    if high::S.of(high) == 1 { 13 + (high >> 12).trailing_ones() } else { 12 }
}

/// Flags of events, word 0.
mod flag {
    use super::Field;

    /// There is a PASID where the domain would be.
    pub(super) const GN: Field = Field::new(48, 48);
    /// An instruction fetch.
    pub(super) const NX: Field = Field::new(49, 49);
    /// A user's request.
    pub(super) const US: Field = Field::new(50, 50);
    /// It was to interrupt.
    pub(super) const I: Field = Field::new(51, 51);
    /// Something is there, and the access is not allowed or the entry is wrong.
    pub(super) const PR: Field = Field::new(52, 52);
    /// A write.
    pub(super) const RW: Field = Field::new(53, 53);
    /// No permission.
    pub(super) const PE: Field = Field::new(54, 54);
    /// A reserved bit or level.
    pub(super) const RZ: Field = Field::new(55, 55);
    /// A device TLB asked for a translation.
    pub(super) const TR: Field = Field::new(56, 56);
    /// The PASID's high bits.
    pub(super) const PASID_19_16: Field = Field::new(19, 16);
}

/// The event log entry.
pub(crate) fn encode(event: &Event) -> Result<EventRecord, Error> {
    let code = match (event.name.as_deref(), event.fault) {
        _ if is_page_fault(event) => 2,
        (None | Some("PAGE_TAB_HARDWARE_ERROR"), _) => 4,
        (Some("ILLEGAL_DEV_TABLE_ENTRY"), _) => 1,
        (Some("DEV_TAB_HARDWARE_ERROR"), _) => 3,
        (Some(name), _) => return Err(Error::Unsupported(format!("an event log entry for `{name}`"))),
    };
    let id = u16::try_from(event.id).map_err(|_| Error::invalid("id", event.id, EVENTS, "a DeviceID has 16 bits"))?;
    let mut low = low::CODE.put(code) | low::DEVICE.put(id.into());
    match (code, event.pasid) {
        // The device table itself has no PASIDs.
        (1 | 2 | 4, Some(pasid)) => {
            let pasid = u64::from(pasid);
            low |= flag::GN.put(1) | low::DOMAIN.put(pasid & 0xffff) | flag::PASID_19_16.put(pasid >> 16);
        }
        (2 | 4, None) => low |= low::DOMAIN.put(event.domain.unwrap_or(0).into()),
        _ => {}
    }
    let write = event.access == Access::Write;
    if code == 2 {
        low |= page_fault_flags(event);
    } else {
        low |= flag::RW.put(write.into());
    }
    if code == 1 {
        low |= flag::RZ.put((event.fault == FaultKind::Reserved).into());
    }
    // Hardware errors name what could not be read.
    let address = match code {
        1 => event.iova & !3,
        2 => event.iova,
        _ => event.unreadable.unwrap_or(0) & !0xf,
    };
    Ok(EventRecord::of_words("event log", &[low, address]))
}

/// [`low::CODE`]: a request of a kind that the unit does not take, section 2.5.9.
const INVALID_DEVICE_REQUEST: u64 = 8;

/// The request that an event log entry is about, sections 2.5.2 to 2.5.9.
pub(crate) fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
    let [low, high] = record_words::<2>(record, EVENTS)?;
    let code = low::CODE.of(low);
    // Others are about commands.
    if !matches!(code, 1..=4 | INVALID_DEVICE_REQUEST) || code <= 4 && flag::I.of(low) != 0 {
        return Ok(None);
    }
    let has_pasid = code != 3 && flag::GN.of(low) != 0;
    // Requests without PASID have the address space of PASID 0, and no others do.
    let pasid = has_pasid.then(|| (flag::PASID_19_16.of(low) << 16 | low::DOMAIN.of(low)) as u32).filter(|pasid| *pasid != 0);
    // Of something that is not there an IO_PAGE_FAULT does not say what was wanted, and none does for translation requests.
    let says = code <= 4 && flag::TR.of(low) == 0 && (code != 2 || flag::PR.of(low) != 0);
    let access = match (says && flag::RW.of(low) != 0, says && has_pasid && code == 2 && flag::NX.of(low) != 0) {
        (true, _) => Access::Write,
        (false, true) => Access::Execute,
        (false, false) => Access::Read,
    };
    let privileged = says && has_pasid && code == 2 && flag::US.of(low) == 0;
    // Hardware errors have the address of what could not be read.
    let iova = if matches!(code, 3 | 4) { 0 } else { high };
    Ok(Some(BlockedDma { id: low::DEVICE.of(low), pasid, iova, access, privileged }))
}

/// Whether it is an IO_PAGE_FAULT: of a table, also of the host table on the way to a guest CR3 table, and of a PASID that has no table. INVALID_DEVICE_REQUEST, which
/// that is beside others, has no type for it.
pub(crate) fn is_page_fault(event: &Event) -> bool {
    match event.name.as_deref() {
        None => event.fault != FaultKind::Unreadable,
        Some("PAGE_TAB_HARDWARE_ERROR") => event.format.is_some() && !matches!(event.fault, FaultKind::Unreadable | FaultKind::Configuration),
        Some(name) => matches!(name, "IO_PAGE_FAULT" | "INVALID_DEVICE_REQUEST"),
    }
}

/// Whether what is wrong with an entry of a host table is no reserved bit: then it is the level, or a size.
fn is_level(event: &Event) -> bool {
    let Some(entry) = event.entries.last().filter(|_| event.is_of(V1::NAME)) else { return false };
    let is_table = !matches!(v1::NEXT_LEVEL.of(*entry), v1::LEAF | v1::SIZED_LEAF);
    entry & (v1::RESERVED | if is_table { v1::U | v1::FC } else { 0 }) == 0
}

/// Section 2.5.3. All other flags mean something only if PR is set.
fn page_fault_flags(event: &Event) -> u64 {
    let malformed = matches!(event.fault, FaultKind::Reserved | FaultKind::Misaligned);
    let denied = matches!(event.fault, FaultKind::Permission | FaultKind::AccessFlag);
    if !malformed && !denied {
        return 0;
    }
    let guest = event.pasid.is_some();
    flag::PR.put(1)
        | flag::RW.put((event.access == Access::Write).into())
        | flag::PE.put(denied.into())
        | flag::RZ.put((malformed && !is_level(event)).into())
        | flag::US.put((guest && !event.privileged).into())
        | flag::NX.put((guest && event.access == Access::Execute).into())
}

/// Word 0 of an entry of the PPR log. Flags are from bit 48 on.
mod request {
    use super::Field;

    pub(super) const DEVICE: Field = Field::new(15, 0);
    pub(super) const PASID_15_0: Field = Field::new(31, 16);
    /// The group.
    pub(super) const TAG: Field = Field::new(40, 32);
    /// The highest bit of the tag: the last one of its group.
    pub(super) const LAST: Field = Field::new(41, 41);
    pub(super) const PASID_19_16: Field = Field::new(45, 42);
    /// To execute, to read, to write, as a user.
    pub(super) const EXE: Field = Field::new(49, 49);
    pub(super) const READ: Field = Field::new(50, 50);
    pub(super) const WRITE: Field = Field::new(53, 53);
    pub(super) const US: Field = Field::new(54, 54);
    /// There is a PASID.
    pub(super) const GN: Field = Field::new(56, 56);
    pub(super) const CODE: Field = Field::new(63, 60);

    /// [`CODE`]: PAGE_SERVICE_REQUEST.
    pub(super) const PAGE_SERVICE_REQUEST: u64 = 1;
}

/// The entry of the PPR log.
pub(crate) fn encode_page_request(registers: &Registers, page: &PageRequest) -> Result<EventRecord, Error> {
    if efr::PPR_SUP.of(registers.get("EXT_FEATURES").unwrap_or(0)) == 0 {
        return Err(Error::Unsupported("page requests: the unit has no log for them (EFR.PPRSup)".to_owned()));
    }
    let id = u16::try_from(page.id).map_err(|_| Error::invalid("id", page.id, REQUESTS, "a DeviceID has 16 bits"))?;
    let mut low = request::CODE.put(request::PAGE_SERVICE_REQUEST) | request::DEVICE.put(id.into()) | request::TAG.put(page.group.into());
    low |= request::LAST.put(page.last.into()) | request::READ.put(page.read.into()) | request::WRITE.put(page.write.into());
    low |= request::US.put((!page.privileged).into()) | request::EXE.put(page.execute.into());
    if let Some(pasid) = page.pasid {
        let pasid = u64::from(pasid);
        low |= request::GN.put(1) | request::PASID_15_0.put(pasid & 0xffff) | request::PASID_19_16.put(pasid >> 16);
    }
    Ok(EventRecord::of_words("PPR log", &[low, page.address & !0xfff]))
}
