//! Commands, events and page requests: IHI 0070 chapters 4, 7 and 8. An entry of the command queue has 16 bytes, an event record 32, an entry of the PRI queue 16.
//!
//! Where more is forgotten than a command asks for:
//!
//! * EL2 commands without an ASID forget everything, because such streams have no VMID that others lack.
//! * `CFGI_CD` of SubstreamID 0 means all substreams of the stream: requests without SubstreamID may use that descriptor.
//! * Reserved bits, and reserved combinations of TTL, NUM and SCALE, are not judged: the range counts as it stands.
//!
//! VAs are sign-extended from bit 55: a tag in the top byte is no part of what a walk looks at.

use stagecraft_sdk::bits::Field;
use stagecraft_sdk::queue::{Access, record_words};
use stagecraft_sdk::{Answer, BlockedDma, Effect, Error, Event, EventRecord, FaultKind, Format, PageRequest, Registers, Response, Scope};

use crate::Stage2;
use crate::spec::registers::{cr2, idr0, idr3, idr5};

const COMMANDS: &str = "IHI 0070 section 4.1";
const EVENTS: &str = "IHI 0070 section 7.3";
const REQUESTS: &str = "IHI 0070 chapter 8";

/// CERROR_ILL, IHI 0070 section 4.1.4.
const ILLEGAL: u32 = 1;

/// Word 0 of a command.
mod low {
    use super::Field;

    pub(super) const OPCODE: Field = Field::new(7, 0);
    /// ATC_INV: of all SubstreamIDs.
    pub(super) const GLOBAL: Field = Field::new(9, 9);
    /// Secure stream.
    pub(super) const SSEC: Field = Field::new(10, 10);
    /// There is a SubstreamID.
    pub(super) const SSV: Field = Field::new(11, 11);
    /// SYNC: how completion is told; 3 is reserved.
    pub(super) const CS: Field = Field::new(13, 12);
    /// Range: granules minus one, before scaling.
    pub(super) const NUM: Field = Field::new(16, 12);
    /// Range: log2 of the factor; the highest bit counts with LPA2 alone.
    pub(super) const SCALE: Field = Field::new(25, 20);
    pub(super) const SUBSTREAM: Field = Field::new(31, 12);
    pub(super) const STREAM: Field = Field::new(63, 32);
    pub(super) const VMID: Field = Field::new(47, 32);
    pub(super) const ASID: Field = Field::new(63, 48);
}

/// Word 1 of a command.
mod high {
    use super::Field;

    pub(super) const LEAF: Field = Field::new(0, 0);
    /// CFGI_STE_RANGE: log2 of the number of StreamIDs, minus one; 31 is all of them.
    pub(super) const RANGE: Field = Field::new(4, 0);
    /// ATC_INV: log2 of the number of pages of 4 KiB.
    pub(super) const SIZE: Field = Field::new(5, 0);
    /// PRI_RESP: the group of page requests.
    pub(super) const GROUP: Field = Field::new(8, 0);
    /// PRI_RESP: the answer; 3 is reserved.
    pub(super) const RESP: Field = Field::new(13, 12);
    /// Range: 0 none, 1 4K, 2 16K, 3 64K.
    pub(super) const TG: Field = Field::new(11, 10);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
    pub(super) const IPA: Field = Field::new(51, 12);
}

/// What decides which commands are legal, and what they mean.
pub(crate) struct Commands {
    idr0: u64,
    idr3: u64,
    /// The largest SCALE, and the bits of it that count.
    scale: (u64, u64),
    e2h: bool,
}

impl Commands {
    pub(crate) fn new(registers: &Registers) -> Result<Self, Error> {
        Ok(Self {
            idr0: registers.need("IDR0")?,
            idr3: registers.get("IDR3").unwrap_or(0),
            scale: if idr5::DS.of(registers.get("IDR5").unwrap_or(0)) != 0 { (39, 0x3f) } else { (31, 0x1f) },
            e2h: cr2::E2H.of(registers.get("CR2").unwrap_or(0)) != 0,
        })
    }

    pub(crate) fn decode(&self, commands: &[u8]) -> Result<Vec<stagecraft_sdk::Command>, Error> {
        stagecraft_sdk::queue::decode_each::<16>(commands, COMMANDS, |entry, push| {
            let words = stagecraft_sdk::bits::words(entry);
            push(self.effect(words[0], words[1]).unwrap_or(Effect::Illegal(ILLEGAL)));
        })
    }

    fn has(&self, feature: Field) -> bool {
        feature.of(self.idr0) != 0
    }

    fn has3(&self, feature: Field) -> bool {
        feature.of(self.idr3) != 0
    }

    /// What a command asks for; nothing if it is illegal.
    fn effect(&self, low: u64, high: u64) -> Option<Effect> {
        let legal = |condition: bool, effect: Effect| condition.then_some(effect);
        let (first, second) = (self.has(idr0::S1P), self.has(idr0::S2P));
        let opcode = low::OPCODE.of(low);
        let of_stream = matches!(opcode, 0x01..=0x07 | 0x40..=0x45);
        if of_stream && low::SSEC.of(low) != 0 {
            return None;
        }
        let stream = Scope::ALL.id(low::STREAM.of(low));
        let leaf = high::LEAF.of(high) != 0;
        match opcode {
            // PREFETCH_CONFIG, PREFETCH_ADDR.
            0x01 | 0x02 => Some(Effect::Nothing),
            // CFGI_VMS_PIDM; DPTI_ALL, DPTI_PA: what translated requests may reach.
            0x07 => legal(self.has3(idr3::MPAM), Effect::Nothing),
            0x70 | 0x73 => legal(self.has3(idr3::DPT), Effect::Nothing),
            // CFGI_STE; CFGI_STE_RANGE, and as CFGI_ALL.
            0x03 => Some(Effect::Structures(stream.leaf(leaf))),
            0x04 => Some(Effect::Structures(match high::RANGE.of(high) {
                31 => Scope::ALL,
                range => stream.ignoring(((2_u64 << range) - 1) as u32),
            })),
            // CFGI_CD, CFGI_CD_ALL.
            0x05 => legal(first, Effect::Structures(substream(stream, low).leaf(leaf))),
            0x06 => legal(first, Effect::Structures(stream)),
            // TLBI_NH_ALL, _ASID, _VA, _VAA.
            0x10 => legal(first, Effect::Range(self.vmid(low))),
            0x11 => legal(first, Effect::Range(self.vmid(low).space(self.asid(low)))),
            0x12 => legal(first, Effect::Range(self.range(self.vmid(low).space(self.asid(low)), low, high).leaf(leaf))),
            0x13 => legal(first, Effect::Range(self.range(self.vmid(low), low, high).leaf(leaf))),
            // TLBI_EL2_ALL, _ASID, _VA, _VAA.
            0x20 => legal(self.has(idr0::HYP), Effect::Everything),
            0x21 => legal(self.has(idr0::HYP), if self.e2h { Effect::Range(Scope::ALL.space(self.asid(low))) } else { Effect::Everything }),
            0x22 | 0x23 => {
                let scope = self.range(Scope::ALL, low, high).leaf(leaf);
                let scope = if opcode == 0x22 && self.e2h { scope.space(self.asid(low)) } else { scope };
                legal(self.has(idr0::HYP), Effect::Range(scope))
            }
            // TLBI_S12_VMALL, TLBI_S2_IPA, TLBI_NSNH_ALL.
            0x28 => legal(second, Effect::Range(self.vmid(low))),
            0x2a => {
                let (first, last) = self.extent(high::IPA.in_place(high), low, high);
                legal(second, Effect::Range(self.vmid(low).second_stage().range(first, last).leaf(leaf)))
            }
            0x30 => Some(Effect::Everything),
            0x40 => {
                let all = low::GLOBAL.of(low) != 0 || low::SSV.of(low) == 0;
                let scope = if all { stream } else { stream.space(low::SUBSTREAM.of(low)) };
                let size_log2 = 12 + high::SIZE.of(high) as u32;
                legal(self.has(idr0::ATS), Effect::DeviceTlb(scope.around(high::ADDRESS.in_place(high), size_log2)))
            }
            // PRI_RESP, section 4.5.2.
            0x41 if self.has(idr0::PRI) => {
                let answer = [Answer::Failure, Answer::Invalid, Answer::Success].get(high::RESP.of(high) as usize).copied()?;
                let pasid = (low::SSV.of(low) != 0).then_some(low::SUBSTREAM.of(low) as u32);
                Some(Effect::Response(Response { id: low::STREAM.of(low) as u32, pasid, group: high::GROUP.of(high) as u16, answer }))
            }
            // RESUME and STALL_TERM, which need stalls; SYNC.
            0x44 | 0x45 => legal(idr0::STALL_MODEL.of(self.idr0) != 1, Effect::Nothing),
            0x46 => legal(low::CS.of(low) != 3, Effect::Nothing),
            _ => None,
        }
    }

    /// Translations of a VMID; of all, if there is no stage 2.
    fn vmid(&self, low: u64) -> Scope {
        let vmid = low::VMID.of(low) & if self.has(idr0::VMID16) { 0xffff } else { 0xff };
        if self.has(idr0::S2P) { Scope::ALL.domain(vmid) } else { Scope::ALL }
    }

    fn asid(&self, low: u64) -> u64 {
        low::ASID.of(low) & if self.has(idr0::ASID16) { 0xffff } else { 0xff }
    }

    fn range(&self, scope: Scope, low: u64, high: u64) -> Scope {
        let va = high::ADDRESS.in_place(high);
        let (first, last) = self.extent(((va << 8) as i64 >> 8) as u64, low, high);
        scope.range(first, last)
    }

    /// IHI 0070 section 4.4.1.1: `(NUM + 1) * 2^SCALE` granules. Without a granule it is the page that has the address, of 4 KiB at least.
    fn extent(&self, address: u64, low: u64, high: u64) -> (u64, u64) {
        let granule_log2 = match high::TG.of(high) {
            tg @ 1..=3 if self.has3(idr3::RIL) => 10 + 2 * tg,
            _ => return (address & !0xfff, address | 0xfff),
        };
        let (largest, counts) = self.scale;
        let granules = (low::NUM.of(low) + 1) << (low::SCALE.of(low) & counts).min(largest);
        let first = address >> granule_log2 << granule_log2;
        (first, first.saturating_add((granules << granule_log2) - 1))
    }
}

fn substream(stream: Scope, low: u64) -> Scope {
    match low::SUBSTREAM.of(low) {
        0 => stream,
        substream => stream.space(substream),
    }
}

/// Word 0 of an event record.
mod record_0 {
    use super::Field;

    pub(super) const EVENT: Field = Field::new(7, 0);
    pub(super) const SSV: Field = Field::new(11, 11);
    pub(super) const SUBSTREAM: Field = Field::new(31, 12);
    pub(super) const STREAM: Field = Field::new(63, 32);
}

/// Word 1 of the record of an access.
mod record_1 {
    use super::Field;

    /// Privileged.
    pub(super) const PNU: Field = Field::new(33, 33);
    /// Instruction fetch.
    pub(super) const IND: Field = Field::new(34, 34);
    /// Read.
    pub(super) const RNW: Field = Field::new(35, 35);
    /// Stage 2.
    pub(super) const S2: Field = Field::new(39, 39);
    /// What was being translated.
    pub(super) const CLASS: Field = Field::new(41, 40);
    /// The stage 1 table was being read, and not marked.
    pub(super) const TTRNW: Field = Field::new(44, 44);

    /// [`CLASS`]: the address of a context descriptor.
    pub(super) const CD: u64 = 0;
    /// [`CLASS`]: the address of a stage 1 table.
    pub(super) const TT: u64 = 1;
    /// [`CLASS`]: the input address.
    pub(super) const IN: u64 = 2;
}

/// Word 3: an IPA.
const IPA: Field = Field::new(55, 12);
/// Word 3: the address of a structure.
const FETCH: Field = Field::new(55, 3);

/// Events by name.
const NAMES: [(&str, u64); 13] = [
    ("C_BAD_STREAMID", 0x02),
    ("F_STE_FETCH", 0x03),
    ("C_BAD_STE", 0x04),
    ("F_STREAM_DISABLED", F_STREAM_DISABLED),
    ("C_BAD_SUBSTREAMID", C_BAD_SUBSTREAMID),
    ("F_CD_FETCH", F_CD_FETCH),
    ("C_BAD_CD", 0x0a),
    ("F_WALK_EABT", F_WALK_EABT),
    ("F_TRANSLATION", 0x10),
    ("F_ADDR_SIZE", 0x11),
    ("F_ACCESS", 0x12),
    ("F_PERMISSION", F_PERMISSION),
    (REFUSED_MARK, F_PERMISSION),
];
/// Stage 2 refused to have a stage 1 descriptor marked.
pub(crate) const REFUSED_MARK: &str = "F_PERMISSION of a mark";
const F_STREAM_DISABLED: u64 = 0x06;
const C_BAD_SUBSTREAMID: u64 = 0x08;
const F_STE_FETCH: u64 = 0x03;
const F_CD_FETCH: u64 = 0x09;
const F_WALK_EABT: u64 = 0x0b;
const F_PERMISSION: u64 = 0x13;
/// Others that units tell of requests: unsupported ones, translated ones where these are forbidden, and two that are about caches.
const F_UUT: u64 = 0x01;
const F_TRANSL_FORBIDDEN: u64 = 0x07;
const F_TLB_CONFLICT: u64 = 0x20;
const F_CFG_CONFLICT: u64 = 0x21;

/// The event record, IHI 0070 section 7.3.
pub(crate) fn encode(event: &Event) -> Result<EventRecord, Error> {
    let name = match event.name.as_deref() {
        // The context descriptor's own address did not get through stage 2.
        Some("F_CD_FETCH") if event.is_of(Stage2::NAME) => walk_event(event.fault),
        Some(name) => name,
        None => walk_event(event.fault),
    };
    let unknown = || Error::Unsupported(format!("an event record for `{name}`: the SMMU records none"));
    let (_, number) = NAMES.into_iter().find(|(known, _)| *known == name).ok_or_else(unknown)?;
    let id = u32::try_from(event.id).map_err(|_| Error::invalid("id", event.id, EVENTS, "a StreamID has 32 bits"))?;
    let mut words = [record_0::EVENT.put(number) | record_0::STREAM.put(id.into()), 0, 0, 0];
    match (number, event.pasid) {
        (F_STREAM_DISABLED, _) | (_, None) => {}
        // There always is one: nothing says so.
        (C_BAD_SUBSTREAMID, Some(substream)) => words[0] |= record_0::SUBSTREAM.put(substream.into()),
        (_, Some(substream)) => words[0] |= record_0::SSV.put(1) | record_0::SUBSTREAM.put(substream.into()),
    }
    match number {
        F_STE_FETCH | F_CD_FETCH => words[3] = FETCH.in_place(event.unreadable.unwrap_or(0)),
        F_WALK_EABT | 0x10.. => {
            let stage2 = event.is_of(Stage2::NAME);
            let class = match (stage2 && event.reading_table, event.name.as_deref()) {
                (true, Some("F_CD_FETCH")) => record_1::CD,
                (true, _) => record_1::TT,
                // Of stage 1 this event alone has another class, section 7.3.12.
                (false, _) if number == F_WALK_EABT && !stage2 => record_1::TT,
                (false, _) => record_1::IN,
            };
            words[1] = record_1::PNU.put(event.privileged.into())
                | record_1::IND.put((event.access == Access::Execute).into())
                | record_1::RNW.put((event.access != Access::Write).into())
                | record_1::S2.put(stage2.into())
                | record_1::CLASS.put(class)
                // No other event has it.
                | record_1::TTRNW.put((class == record_1::TT && number == F_PERMISSION && name != REFUSED_MARK).into());
            words[2] = event.iova;
            words[3] = match (number, stage2) {
                (F_WALK_EABT, _) => FETCH.in_place(event.unreadable.unwrap_or(0)),
                // Where stage 2 is alone its input is the IOVA.
                (_, true) => IPA.in_place(event.intermediate.unwrap_or(event.iova)),
                (_, false) => 0,
            };
        }
        _ => {}
    }
    Ok(EventRecord::of_words("EVENTQ", &words))
}

/// The request that an event record is about.
pub(crate) fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
    let words = record_words::<4>(record, EVENTS)?;
    let number = record_0::EVENT.of(words[0]);
    let is_of_stream = NAMES.iter().any(|(_, known)| *known == number) || number == F_CFG_CONFLICT;
    let has_address = matches!(number, F_UUT | F_TRANSL_FORBIDDEN | F_WALK_EABT | 0x10..=F_PERMISSION | F_TLB_CONFLICT);
    if !is_of_stream && !has_address {
        // Translation requests and page requests, and what is told of nobody.
        return Ok(None);
    }
    let has_substream = record_0::SSV.of(words[0]) != 0 || number == C_BAD_SUBSTREAMID;
    let pasid = (has_substream && number != F_STREAM_DISABLED).then(|| record_0::SUBSTREAM.of(words[0]) as u32);
    let says = |field: Field| has_address && field.of(words[1]) != 0;
    let access = match (!has_address || says(record_1::RNW), says(record_1::IND)) {
        (false, _) => Access::Write,
        (true, true) => Access::Execute,
        (true, false) => Access::Read,
    };
    let iova = if has_address { words[2] } else { 0 };
    Ok(Some(BlockedDma { id: record_0::STREAM.of(words[0]), pasid, iova, access, privileged: says(record_1::PNU) }))
}

/// The event of a walk that failed. Reserved encodings of descriptors are translation faults.
const fn walk_event(fault: FaultKind) -> &'static str {
    match fault {
        FaultKind::Permission => "F_PERMISSION",
        FaultKind::AccessFlag => "F_ACCESS",
        FaultKind::AddressSize => "F_ADDR_SIZE",
        FaultKind::Unreadable => "F_WALK_EABT",
        FaultKind::Translation | FaultKind::Reserved | FaultKind::Misaligned | FaultKind::Configuration => "F_TRANSLATION",
    }
}

/// Words of an entry of the PRI queue.
mod request {
    use super::Field;

    /// Word 0.
    pub(super) const STREAM: Field = Field::new(31, 0);
    pub(super) const SUBSTREAM: Field = Field::new(51, 32);
    /// With a SubstreamID only: privileged, and to execute.
    pub(super) const PRIV: Field = Field::new(58, 58);
    pub(super) const X: Field = Field::new(59, 59);
    pub(super) const R: Field = Field::new(60, 60);
    pub(super) const W: Field = Field::new(61, 61);
    pub(super) const LAST: Field = Field::new(62, 62);
    pub(super) const SSV: Field = Field::new(63, 63);
    /// Word 1.
    pub(super) const GROUP: Field = Field::new(8, 0);
    pub(super) const ADDRESS: Field = Field::new(63, 12);
}

/// The entry of the PRI queue, IHI 0070 chapter 8.
pub(crate) fn encode_page_request(registers: &Registers, page: &PageRequest) -> Result<EventRecord, Error> {
    if idr0::PRI.of(registers.need("IDR0")?) == 0 {
        return Err(Error::Unsupported("page requests: the SMMU has no PRI queue (IDR0.PRI)".to_owned()));
    }
    let id = u32::try_from(page.id).map_err(|_| Error::invalid("id", page.id, REQUESTS, "a StreamID has 32 bits"))?;
    let mut low = request::STREAM.put(id.into()) | request::R.put(page.read.into()) | request::W.put(page.write.into());
    low |= request::LAST.put(page.last.into());
    if let Some(pasid) = page.pasid {
        low |= request::SSV.put(1) | request::SUBSTREAM.put(pasid.into());
        low |= request::PRIV.put(page.privileged.into()) | request::X.put(page.execute.into());
    }
    Ok(EventRecord::of_words("PRIQ", &[low, request::GROUP.put(page.group.into()) | request::ADDRESS.in_place(page.address)]))
}
