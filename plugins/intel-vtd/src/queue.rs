//! Invalidation descriptors, fault records and page requests: D51397 sections 6.5.2 and 11.4.14, and chapter 7. A descriptor has 16 bytes, or 32 with `IQA.DW`; a fault
//! record has 16, a page request 32.
//!
//! Where more is forgotten than a descriptor asks for:
//!
//! * A function mask that leaves out bit 2 alone is exact; all others too.
//! * Reserved bits, and sizes (AM) beyond what the unit has, are not judged.
//! * Page-selective invalidation by domain means the second stage's addresses, and so all IOVAs of a nested address space.

use stagecraft_sdk::bits::Field;
use stagecraft_sdk::queue::{Access, decode_each};
use stagecraft_sdk::{Answer, Command, Effect, Error, Event, EventRecord, FaultKind, Format, PageRequest, Registers, Response, Scope};

use crate::second_stage::SecondStage;
use crate::spec::first_stage;
use crate::spec::registers::{ecap, iqa, rtaddr};

const DESCRIPTORS: &str = "D51397 section 6.5.2";
const RECORDS: &str = "D51397 section 11.4.14";
const REQUESTS: &str = "D51397 chapter 7";

/// Word 0.
mod low {
    use super::Field;

    /// Type, bits 3:0, and the high ones.
    pub(super) const TYPE: Field = Field::new(3, 0);
    pub(super) const TYPE_HIGH: Field = Field::new(11, 9);
    /// Granularity.
    pub(super) const G: Field = Field::new(5, 4);
    pub(super) const DID: Field = Field::new(31, 16);
    /// Context cache: source id and the function bits that play no part.
    pub(super) const SID: Field = Field::new(47, 32);
    pub(super) const FM: Field = Field::new(49, 48);
    pub(super) const PASID: Field = Field::new(51, 32);
    /// PASID-based device TLB, and page group response: source id.
    pub(super) const PASID_SID: Field = Field::new(31, 16);
    /// Page group response: there is a PASID.
    pub(super) const PP: Field = Field::new(4, 4);
    /// Page group response: what the device is told.
    pub(super) const RESPONSE: Field = Field::new(15, 12);
}

/// Word 1.
mod high {
    use super::Field;

    /// Log2 of the number of pages.
    pub(super) const AM: Field = Field::new(5, 0);
    /// Only leaves.
    pub(super) const IH: Field = Field::new(6, 6);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
    /// Device TLB: the address codes a size.
    pub(super) const S: Field = Field::new(0, 0);
    /// PASID-based device TLB: of all PASIDs; the address codes a size.
    pub(super) const GLOBAL: Field = Field::new(0, 0);
    pub(super) const PASID_S: Field = Field::new(11, 11);
    /// Page group response: the group.
    pub(super) const GROUP: Field = Field::new(11, 3);
}

/// FSTS.IQE, which the unit sets.
const INVALIDATION_QUEUE_ERROR: u32 = 1 << 4;

/// What a batch of descriptors asks for.
pub(crate) fn decode(registers: &Registers, descriptors: &[u8]) -> Result<Vec<Command>, Error> {
    let is_legacy = rtaddr::TTM.of(registers.get("RTADDR").unwrap_or(0)) == rtaddr::LEGACY;
    let effect = |bytes: &[u8]| {
        let words = stagecraft_sdk::bits::words(bytes);
        effect(words[0], words[1], is_legacy).unwrap_or(Effect::Illegal(INVALIDATION_QUEUE_ERROR))
    };
    if iqa::DW.of(registers.need("IQA")?) == 1 {
        decode_each::<32>(descriptors, DESCRIPTORS, |entry, push| push(effect(entry)))
    } else {
        decode_each::<16>(descriptors, DESCRIPTORS, |entry, push| push(effect(entry)))
    }
}

/// Nothing for a descriptor that is illegal.
fn effect(low: u64, high: u64, is_legacy: bool) -> Option<Effect> {
    let domain = Scope::ALL.domain(low::DID.of(low));
    let space = domain.space(low::PASID.of(low));
    let pages = |scope: Scope| scope.around(high::ADDRESS.in_place(high), 12 + high::AM.of(high) as u32).leaf(high::IH.of(high) == 1);
    match (low::TYPE.of(low) | low::TYPE_HIGH.of(low) << 4, low::G.of(low)) {
        // Context cache: global, domain, device. Entries of scalable mode have no domain, and which one the descriptor names plays no part: drivers name 0.
        (1, 1) => Some(Effect::Structures(Scope::ALL)),
        (1, 2) => Some(Effect::Structures(if is_legacy { domain } else { Scope::ALL })),
        (1, 3) => {
            let ignored = [0, 0b100, 0b110, 0b111][low::FM.of(low) as usize];
            let whose = if is_legacy { domain } else { Scope::ALL };
            Some(Effect::Structures(whose.id(low::SID.of(low)).ignoring(ignored)))
        }
        // IOTLB: global, domain, pages.
        (2, 1) => Some(Effect::Everything),
        (2, 2) => Some(Effect::Range(domain)),
        (2, 3) => Some(Effect::Range(pages(domain.second_stage()))),
        // Device TLB.
        (3, _) => Some(Effect::DeviceTlb(sized(Scope::ALL.id(low::SID.of(low)), high, high::S))),
        // Interrupt entry cache; wait.
        (4 | 5, _) => Some(Effect::Nothing),
        // PASID-based IOTLB: of a PASID, pages.
        (6, 2) => Some(Effect::Range(space)),
        (6, 3) => Some(Effect::Range(pages(space))),
        // PASID cache: domain, PASID, global.
        (7, 0) => Some(Effect::Structures(domain)),
        (7, 1) => Some(Effect::Structures(space)),
        (7, 3) => Some(Effect::Structures(Scope::ALL)),
        // PASID-based device TLB.
        (8, _) => {
            let device = Scope::ALL.id(low::PASID_SID.of(low));
            let scope = if high::GLOBAL.of(high) == 1 { device } else { device.space(low::PASID.of(low)) };
            Some(Effect::DeviceTlb(sized(scope, high, high::PASID_S)))
        }
        // Page group response, chapter 7. Answers that PCI Express has not named count as its failure.
        (9, _) => {
            let answer = match low::RESPONSE.of(low) {
                0 => Answer::Success,
                1 => Answer::Invalid,
                _ => Answer::Failure,
            };
            let pasid = (low::PP.of(low) == 1).then_some(low::PASID.of(low) as u32);
            Some(Effect::Response(Response { id: low::PASID_SID.of(low) as u32, pasid, group: high::GROUP.of(high) as u16, answer }))
        }
        _ => None,
    }
}

/// A page, or as many as the ones at the address's lower end say: the first zero is half the size.
fn sized(scope: Scope, high: u64, flag: Field) -> Scope {
    let address = high::ADDRESS.in_place(high);
    let size_log2 = if flag.of(high) == 1 { 13 + (address >> 12).trailing_ones() } else { 12 };
    scope.around(address, size_log2)
}

/// Word 1 of a fault record.
mod record {
    use super::Field;

    pub(super) const SID: Field = Field::new(15, 0);
    /// Privileged, of a request with PASID.
    pub(super) const PRIV: Field = Field::new(29, 29);
    /// Execute, of a request with PASID.
    pub(super) const EXE: Field = Field::new(30, 30);
    /// There is a PASID.
    pub(super) const PP: Field = Field::new(31, 31);
    pub(super) const REASON: Field = Field::new(39, 32);
    pub(super) const PASID: Field = Field::new(59, 40);
    /// Read.
    pub(super) const T1: Field = Field::new(62, 62);
    /// The record is valid.
    pub(super) const F: Field = Field::new(63, 63);
}

/// Fault reasons of what leads to the tables, section 7.1.3, by the names that `lookup` and the review of an event give.
const REASONS: [(&str, u64); 43] = [
    ("LRT.1", 0x08),
    ("LRT.2", 0x01),
    ("LRT.3", 0x0a),
    ("LCT.1", 0x09),
    ("LCT.2", 0x02),
    ("LCT.3", 0x0b),
    ("LCT.4.1", 0x03),
    ("LCT.4.2", 0x03),
    ("LCT.4.3", 0x03),
    ("LGN.1", 0x04),
    ("RTA.1.1", 0x30),
    ("RTA.1.2", 0x30),
    ("RTA.1.3", 0x30),
    ("RTA.1.4", 0x30),
    ("RTA.2", 0x31),
    ("RTA.4", 0x33),
    ("SRT.1", 0x38),
    ("SRT.2", 0x39),
    ("SRT.3", 0x3a),
    ("SCT.1", 0x40),
    ("SCT.2", 0x41),
    ("SCT.3", 0x42),
    ("SCT.4.1", 0x43),
    ("SCT.4.2", 0x43),
    ("SCT.4.3", 0x43),
    ("SCT.6", 0x45),
    ("SCT.7", 0x46),
    ("SCT.9", 0x48),
    ("SPD.1", 0x50),
    ("SPD.2", 0x51),
    ("SPD.3", 0x52),
    ("SPT.1", 0x58),
    ("SPT.2", 0x59),
    ("SPT.3", 0x5a),
    ("SPT.6", 0x5d),
    ("SFS.4", 0x73),
    ("SFS.5", 0x74),
    ("SFS.6", 0x75),
    ("SFS.7", 0x76),
    ("SFS.8", 0x77),
    ("SSS.4", 0x7b),
    ("SGN.4", 0x83),
    ("SGN.5", 0x84),
];

/// The fault record.
pub(crate) fn encode(registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
    let reason = match event.name.as_deref() {
        Some("SGN.10") => 0x89,
        // SPT.4.1 to SPT.4.4.
        Some(name) if name.starts_with("SPT.4.") => 0x5b,
        Some(name) => {
            let unknown = || Error::Unsupported(format!("a fault record for `{name}`"));
            REASONS.into_iter().find(|(known, _)| *known == name).map(|(_, reason)| reason).ok_or_else(unknown)?
        }
        None if rtaddr::TTM.of(registers.need("RTADDR")?) == rtaddr::LEGACY => legacy_reason(event),
        None => scalable_reason(event),
    };
    let id = u16::try_from(event.id).map_err(|_| Error::invalid("id", event.id, RECORDS, "a source id has 16 bits"))?;
    let mut high = record::SID.put(id.into()) | record::REASON.put(reason) | record::F.put(1);
    high |= record::T1.put((event.access != Access::Write).into());
    if let Some(pasid) = event.pasid {
        high |= record::PP.put(1) | record::PASID.put(pasid.into());
        high |= record::PRIV.put(event.privileged.into()) | record::EXE.put((event.access == Access::Execute).into());
    }
    Ok(EventRecord::of_words("FRCD", &[event.iova & !0xfff, high]))
}

/// Tables of legacy mode. What no table covers has more bits than the unit's addresses.
const fn legacy_reason(event: &Event) -> u64 {
    match (event.fault, event.access) {
        (FaultKind::Translation, _) if event.level.is_none() => 0x04,
        (FaultKind::Translation | FaultKind::Permission | FaultKind::AccessFlag | FaultKind::Configuration, Access::Write) => 0x05,
        (FaultKind::Translation | FaultKind::Permission | FaultKind::AccessFlag | FaultKind::Configuration, _) => 0x06,
        (FaultKind::Unreadable, _) => 0x07,
        (FaultKind::Reserved | FaultKind::Misaligned | FaultKind::AddressSize, _) => 0x0c,
    }
}

/// Tables of scalable mode: SFS, SSS and SGN conditions.
fn scalable_reason(event: &Event) -> u64 {
    let second = event.is_of(SecondStage::NAME);
    match (event.fault, event.access) {
        (FaultKind::Translation, _) if event.level.is_none() => {
            if second {
                0x84
            } else {
                0x80
            }
        }
        // The second stage forbids reading the first one's tables: SFS.7, unless structures say more.
        (FaultKind::Permission, _) if second && event.reading_table => 0x76,
        (FaultKind::Translation, _) if !second => 0x71,
        (FaultKind::Translation, _) => 0x79,
        // A user's request to a supervisor's page: U/S of any entry.
        (FaultKind::Permission, _) if !second && !event.privileged && event.entries.iter().any(|entry| entry & first_stage::US == 0) => 0x81,
        (FaultKind::Permission | FaultKind::AccessFlag | FaultKind::Configuration, Access::Execute) => 0x82,
        (FaultKind::Permission | FaultKind::AccessFlag | FaultKind::Configuration, Access::Write) => 0x85,
        (FaultKind::Permission | FaultKind::AccessFlag | FaultKind::Configuration, Access::Read) => 0x86,
        (FaultKind::Unreadable, _) => {
            if second {
                0x78
            } else {
                0x70
            }
        }
        (FaultKind::Reserved | FaultKind::Misaligned | FaultKind::AddressSize, _) => {
            if second {
                0x7a
            } else {
                0x72
            }
        }
    }
}

/// Words of a page request descriptor.
mod request {
    use super::Field;

    /// Word 0.
    pub(super) const TYPE: Field = Field::new(7, 0);
    pub(super) const PP: Field = Field::new(8, 8);
    pub(super) const SID: Field = Field::new(31, 16);
    pub(super) const PASID: Field = Field::new(51, 32);
    /// With a PASID only: to execute, and privileged.
    pub(super) const EXE: Field = Field::new(52, 52);
    pub(super) const PM: Field = Field::new(53, 53);
    /// Word 1.
    pub(super) const R: Field = Field::new(0, 0);
    pub(super) const W: Field = Field::new(1, 1);
    /// The last in its group.
    pub(super) const LPIG: Field = Field::new(2, 2);
    pub(super) const GROUP: Field = Field::new(11, 3);
    pub(super) const ADDRESS: Field = Field::new(63, 12);

    /// [`TYPE`]: a page request.
    pub(super) const PAGE_REQUEST: u64 = 1;
}

/// The page request descriptor.
pub(crate) fn encode_page_request(registers: &Registers, page: &PageRequest) -> Result<EventRecord, Error> {
    if ecap::PRS.of(registers.need("ECAP")?) == 0 {
        return Err(Error::Unsupported("page requests: the unit has no queue for them (ECAP.PRS)".to_owned()));
    }
    let id = u16::try_from(page.id).map_err(|_| Error::invalid("id", page.id, REQUESTS, "a source id has 16 bits"))?;
    let mut low = request::TYPE.put(request::PAGE_REQUEST) | request::SID.put(id.into());
    if let Some(pasid) = page.pasid {
        low |= request::PP.put(1) | request::PASID.put(pasid.into());
        low |= request::EXE.put(page.execute.into()) | request::PM.put(page.privileged.into());
    }
    let mut high = request::R.put(page.read.into()) | request::W.put(page.write.into()) | request::LPIG.put(page.last.into());
    high |= request::GROUP.put(page.group.into()) | request::ADDRESS.in_place(page.address);
    Ok(EventRecord::of_words("PRQ", &[low, high, 0, 0]))
}
