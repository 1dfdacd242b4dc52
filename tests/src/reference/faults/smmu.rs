//! SMMUv3: records of the event queue.
//!
//! Source: Arm IHI 0070 sections 3.4, 3.12, 5.2 to 5.5 and 7.3. Bits that a record does not name are zero.

use super::path::Path;
use super::{Answer, Cause, Fetch, Refused, Request, Told, Unit, field, flag};
use crate::reference::detect::{self, Resolution};
use crate::reference::tables::{TableConfig, beyond};
use crate::reference::{Problem, bit, bits};

const BAD_STREAMID: u64 = 0x02;
const STE_FETCH: u64 = 0x03;
const BAD_STE: u64 = 0x04;
const STREAM_DISABLED: u64 = 0x06;
const BAD_SUBSTREAMID: u64 = 0x08;
const CD_FETCH: u64 = 0x09;
const BAD_CD: u64 = 0x0a;
const WALK_EABT: u64 = 0x0b;
const TRANSLATION: u64 = 0x10;
const ADDR_SIZE: u64 = 0x11;
const ACCESS: u64 = 0x12;
const PERMISSION: u64 = 0x13;

/// Number 7:0, SSV 11, SubstreamID 31:12, StreamID 63:32. Without SSV the SubstreamID is unknown.
fn head(number: u64, request: &Request) -> (u64, u64) {
    let word = number | field(request.id, 63, 32);
    match request.pasid {
        Some(substream) => (word | 1 << 11 | field(substream.into(), 31, 12), u64::MAX),
        None => (word, !(0xf_ffff << 12)),
    }
}

/// A record of configuration: nothing but its head.
fn configuration(number: u64, request: &Request) -> Told {
    Told::Record(vec![head(number, request), (0, u64::MAX), (0, u64::MAX), (0, u64::MAX)])
}

/// A structure that could not be read: Reason 79:64, which is the implementation's own, FetchAddr 247:195.
fn fetch(number: u64, request: &Request, address: u64) -> Told {
    Told::Record(vec![head(number, request), (0, !0xffff), (0, u64::MAX), (address, u64::MAX)])
}

/// Which table a walk ended in, and for what it was read.
struct Place {
    second: bool,
    /// CD 0, TTD 1, IN 2.
    class: u64,
}

/// PnU 97, InD 98 (of a read), RnW 99, NSIPA 102 (zero here), S2 103, CLASS 105:104.
fn attributes(request: &Request, place: &Place) -> u64 {
    let bits = flag(request.privileged, 33) | flag(request.executes(), 34) | flag(request.reads(), 35);
    bits | flag(place.second, 39) | field(place.class, 41, 40)
}

/// A record of a walk.
fn walk(request: &Request, refused: &Refused, second: bool) -> (u64, Told) {
    let cause = *refused.causes.last().expect("a cause");
    let class = match refused.fetch {
        Some(Fetch::Structure) => 0,
        Some(Fetch::Entry { .. }) => 1,
        None => 2,
    };
    let mut place = Place { second, class };
    if let Cause::Unreadable(address) = cause {
        // Where the first stage's own entry cannot be read the class is that of tables (section 7.3.12). Reason 79:64 is the implementation's own.
        if !second {
            place.class = 1;
        }
        let word = attributes(request, &place);
        return (WALK_EABT, Told::Record(vec![head(WALK_EABT, request), (word, !0xffff), (request.iova, u64::MAX), (address, u64::MAX)]));
    }
    let number = match cause {
        Cause::AddressSize => ADDR_SIZE,
        Cause::AccessFlag => ACCESS,
        Cause::Permission | Cause::Privilege => PERMISSION,
        _ => TRANSLATION,
    };
    let mut word = attributes(request, &place);
    // STAG 79:64 goes with Stall (95), which is clear; 127:112 are the implementation's own.
    let mut counts = !(0xffff | 0xffff << 48);
    if number == PERMISSION && class == 1 {
        // TTRnW 108: what the table was accessed for. Reads, as nothing is marked here.
        let writes = matches!(refused.fetch, Some(Fetch::Entry { writes: true, .. }));
        word |= flag(!writes, 44);
    } else if number == PERMISSION {
        counts &= !(1 << 44);
    }
    // IPA 247:204 with S2, without it unknown.
    let ipa = if second { (refused.input >> 12 << 12, u64::MAX) } else { (0, 0) };
    (number, Told::Record(vec![head(number, request), (word, counts), (request.iova, u64::MAX), ipa]))
}

/// The same, if the stage records faults: R is for four kinds of them, and means nothing while faults stall (section 5.5).
fn recorded(request: &Request, refused: &Refused, second: bool, records: bool) -> Answer {
    let (number, told) = walk(request, refused, second);
    let told = if number >= TRANSLATION && !records { Told::Nothing } else { told };
    Answer::one(format!("{refused:x?}, recorded: {records}"), told)
}

/// The bits of OAS.
fn output_bits(code: u64) -> u32 {
    [32, 36, 40, 42, 44, 48, 52, 56][code as usize]
}

/// Where the STE is; none if there is none for the StreamID.
fn ste_address(unit: &Unit<'_>, id: u64) -> Result<Option<u64>, Problem> {
    // STRTAB_BASE_CFG: LOG2SIZE 5:0, FMT 17:16.
    let config = unit.register("STRTAB_BASE_CFG");
    let log2 = bits(config, 5, 0);
    if bits(config, 17, 16) != 0 {
        return Err(Problem::Unsupported("two levels of streams".to_owned()));
    }
    let base = bits(unit.register("STRTAB_BASE"), 55, 6) << 6;
    Ok((id >> log2 == 0).then_some(base + id * 64))
}

pub(super) fn expected(unit: &Unit<'_>, request: &Request) -> Result<Option<Answer>, Problem> {
    let one = |why: &str, told: Told| Ok(Some(Answer::one(why, told)));
    if !bit(unit.register("CR0"), 0) {
        // GBPA.ABORT: without a record.
        return if bit(unit.register("GBPA"), 20) { one("SMMUEN", Told::Nothing) } else { Ok(None) };
    }
    let Some(address) = ste_address(unit, request.id)? else {
        // CR2.RECINVSID.
        return one("StreamID", if bit(unit.register("CR2"), 1) { configuration(BAD_STREAMID, request) } else { Told::Nothing });
    };
    let Some(ste) = unit.words::<8>(address)? else { return one("STE cannot be read", fetch(STE_FETCH, request, address)) };
    if !bit(ste[0], 0) {
        return one("STE.V", configuration(BAD_STE, request));
    }
    // Config 3:1.
    let config = bits(ste[0], 3, 1);
    if config < 4 {
        return one("STE.Config aborts", Told::Nothing);
    }
    let resolution = detect::resolve_pasid(unit.snapshot, request.id, request.pasid.map(u64::from));
    let reason = if let Ok(Resolution::Blocked(reason)) = &resolution { reason.clone() } else { String::new() };
    let reason = reason.as_str();
    // Without halves there is no table, and every address is outside of all.
    let no_halves = reason == "both halves are off";
    let of_cd = reason.starts_with("CD.");
    let of_ste = reason.starts_with("STE.") && !reason.contains("S1DSS")
        || [
            "a stage that is not implemented",
            "EATS 0b10",
            "EATS 0b01",
            "EATS 0b11",
            "STRW",
            "S2VMID",
            "S1STALLD",
            "S1CDMax",
            "S1Fmt",
            "S1ContextPtr",
            "VMSPtr",
        ]
        .contains(&reason)
        || reason.starts_with("start-level")
        || reason.starts_with("input-bits");
    if of_ste {
        return one(reason, configuration(BAD_STE, request));
    }
    let (first, second) = (bit(config, 0), bit(config, 1));
    // S1CDMax 63:59.
    let most = if bits(unit.register("IDR1"), 10, 6) == 0 { 0 } else { bits(ste[0], 63, 59) };
    if let Some(substream) = request.pasid {
        let bad = !first || most == 0 || u64::from(substream) >> most != 0;
        if bad {
            // The SubstreamID is always valid, and bit 11 zero.
            return one("SubstreamID", bad_substream(request, substream));
        }
    }
    // S1DSS 65:64.
    let dss = bits(ste[1], 1, 0);
    let disabled = match request.pasid {
        None => dss == 0 || dss == 3,
        Some(substream) => dss == 2 && substream == 0,
    };
    if first && most != 0 && disabled {
        let word = STREAM_DISABLED | field(request.id, 63, 32);
        return one("S1DSS", Told::record(&[word, 0, 0, 0]));
    }
    let skips = !first || most != 0 && dss == 1 && request.pasid.is_none();
    let (ste_words, records_second) = (ste, bit(ste[2], 58));
    let stages = match resolution {
        Ok(Resolution::Tables(stages)) => stages,
        Ok(Resolution::Bypass) => {
            // F_ADDR_SIZE of stage 1, beyond what addresses have (section 3.4).
            let most = output_bits(bits(unit.register("IDR5"), 2, 0));
            return Ok((request.iova >> most != 0).then(|| bypassed(request)));
        }
        _ => Vec::new(),
    };
    if skips {
        let most = output_bits(bits(unit.register("IDR5"), 2, 0));
        if request.iova >> most != 0 {
            return Ok(Some(bypassed(request)));
        }
    } else if let Some(answer) = context(unit, request, &ste_words, most, of_cd)? {
        return Ok(Some(answer));
    }
    if no_halves && !skips {
        let refused = Refused { stage: 0, input: request.iova, fetch: None, causes: vec![Cause::Range], depth: 0, before: Vec::new() };
        return Ok(Some(recorded(request, &refused, false, records_first(unit, request, &ste_words, most)?)));
    }
    if stages.is_empty() {
        return Err(Problem::Unsupported(format!("{reason:?} of a stream")));
    }
    let is_second = |stage: usize| second && stage + 1 == stages.len();
    match Path::new(unit, &stages)?.request(request)? {
        Ok(_) => Ok(None),
        Err(refused) => {
            let of_second = is_second(refused.stage);
            let records = if of_second { records_second } else { records_first(unit, request, &ste_words, most)? };
            Ok(Some(recorded(request, &refused, of_second, records)))
        }
    }
}

fn bad_substream(request: &Request, substream: u32) -> Told {
    Told::record(&[BAD_SUBSTREAMID | field(substream.into(), 31, 12) | field(request.id, 63, 32), 0, 0, 0])
}

/// Stage 1 is bypassed, and the address has more bits than there are. No CD says whether this is recorded: it is.
fn bypassed(request: &Request) -> Answer {
    let refused = Refused { stage: 0, input: request.iova, fetch: None, causes: vec![Cause::AddressSize], depth: 0, before: Vec::new() };
    Answer::one("bypassed", walk(request, &refused, false).1)
}

/// What is asked for a CD, step by step.
struct Reader<'a> {
    unit: &'a Unit<'a>,
    second: Option<TableConfig>,
}

/// A word, or what is told instead: a walk that ends, or an address where there is no memory.
enum Word {
    Is(u64),
    Refused(Refused),
    Nowhere(u64),
}

impl Reader<'_> {
    fn read(&self, address: u64) -> Result<Word, Problem> {
        let physical = match self.second {
            None => address,
            Some(second) => match Path::new(self.unit, &[second])?.structure(address)? {
                Ok(physical) => physical,
                Err(refused) => return Ok(Word::Refused(refused)),
            },
        };
        Ok(self.unit.read(physical)?.map_or(Word::Nowhere(physical), Word::Is))
    }
}

/// What is behind the CD: the second stage, by a stream of the same STE without a first.
fn second_stage(unit: &Unit<'_>, request: &Request, ste: &[u64; 8]) -> Result<Option<TableConfig>, Problem> {
    if bits(ste[0], 3, 1) != 7 {
        return Ok(None);
    }
    let mut alone = unit.snapshot.clone();
    let address = ste_address(unit, request.id)?.expect("an STE");
    alone.memory.write(address, (ste[0] & !0xe) | 6 << 1, false);
    match detect::resolve_pasid(&alone, request.id, None)? {
        Resolution::Tables(stages) => Ok(stages.first().copied()),
        other => Err(Problem::Unsupported(format!("{other:?} of a second stage"))),
    }
}

/// Where the CD is, or what is told because it is nowhere.
fn cd_address(unit: &Unit<'_>, request: &Request, ste: &[u64; 8], most: u64) -> Result<Result<u64, Answer>, Problem> {
    let reader = Reader { unit, second: second_stage(unit, request, ste)? };
    // S1ContextPtr 55:6, S1Fmt 5:4. Tables are aligned to their size, and lower bits of their address do not matter.
    let (context, format) = (bits(ste[0], 55, 6) << 6, bits(ste[0], 5, 4));
    let aligned = |address: u64, log2: u64| address >> log2 << log2;
    let substream = u64::from(request.pasid.unwrap_or(0));
    let leaf = match (most, format) {
        (0, _) | (_, 0 | 3) => return Ok(Ok(aligned(context, most + 6) + substream * 64)),
        (_, 1) => 6,
        _ => 10,
    };
    let at = aligned(context, (most.saturating_sub(leaf) + 3).max(6)) + (substream >> leaf) * 8;
    let descriptor = match reader.read(at)? {
        Word::Is(word) => word,
        Word::Refused(refused) => return Ok(Err(recorded(request, &refused, true, bit(ste[2], 58)))),
        Word::Nowhere(address) => return Ok(Err(Answer::one("L1CD cannot be read", fetch(CD_FETCH, request, address)))),
    };
    if !bit(descriptor, 0) {
        let told = match request.pasid {
            Some(substream) => vec![bad_substream(request, substream)],
            // Section 5.3.1 says it of transactions with SubstreamID; for CD 0 of others the number is 0 (section 7.3.9), or there is no CD.
            None => vec![bad_substream(request, 0), configuration(BAD_CD, request)],
        };
        return Ok(Err(Answer::new("L1CD.V", told)));
    }
    let table = bits(descriptor, 55, 12) << 12;
    let at = aligned(table, leaf + 6) + substream % (1 << leaf) * 64;
    if beyond(table, output_bits(bits(unit.register("IDR5"), 2, 0))) {
        // Section 3.4.3: C_BAD_SUBSTREAMID, or what its access ends in.
        let mut told = vec![bad_substream(request, request.pasid.unwrap_or(0))];
        match reader.read(at)? {
            Word::Is(_) => {}
            Word::Refused(refused) => told.extend(recorded(request, &refused, true, bit(ste[2], 58)).told),
            Word::Nowhere(address) => told.push(fetch(CD_FETCH, request, address)),
        }
        return Ok(Err(Answer::new("L1CD.L2Ptr", told)));
    }
    Ok(Ok(at))
}

/// What is told because there is no CD, or none that is valid.
fn context(unit: &Unit<'_>, request: &Request, ste: &[u64; 8], most: u64, illegal: bool) -> Result<Option<Answer>, Problem> {
    let address = match cd_address(unit, request, ste, most)? {
        Ok(address) => address,
        Err(answer) => return Ok(Some(answer)),
    };
    let reader = Reader { unit, second: second_stage(unit, request, ste)? };
    match reader.read(address)? {
        Word::Is(_) if illegal => Ok(Some(Answer::one("CD", configuration(BAD_CD, request)))),
        Word::Is(_) => Ok(None),
        Word::Refused(refused) => Ok(Some(recorded(request, &refused, true, bit(ste[2], 58)))),
        Word::Nowhere(address) => Ok(Some(Answer::one("CD cannot be read", fetch(CD_FETCH, request, address)))),
    }
}

/// CD.R, bit 45.
fn records_first(unit: &Unit<'_>, request: &Request, ste: &[u64; 8], most: u64) -> Result<bool, Problem> {
    let reader = Reader { unit, second: second_stage(unit, request, ste)? };
    match cd_address(unit, request, ste, most)? {
        Ok(address) => Ok(matches!(reader.read(address)?, Word::Is(word) if bit(word, 45))),
        Err(_) => Err(Problem::Unsupported("a CD that was there".to_owned())),
    }
}
