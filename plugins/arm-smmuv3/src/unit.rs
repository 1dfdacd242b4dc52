//! The SMMUv3 as a [`Unit`]: from registers and a StreamID to tables.
//!
//! ```text
//! CR0.SMMUEN = 0 -> GBPA            context descriptor (CD) -> stage 1 table
//!     |                                ^  linear or two levels, behind stage 2 if that is on
//!     v                                |
//! stream table (linear, two levels) -> stream table entry (STE) -> stage 2 table
//! ```

use stagecraft_sdk::{
    Binding, BlockedDma, Command, Error, Event, EventRecord, GuestMemory, Offer, Outcome, PageRequest, PlaceToBind, Registers, Requester,
    TableConfig, Tag, Translated, Unit,
};

use crate::context::{self, Contexts};
use crate::queue::{self, Commands};
use crate::review;
use crate::spec::cd;
use crate::spec::registers::{cr0, gbpa};
use crate::stream::{self, Features, Stop, Stream, blocked, unused};

/// An Arm SMMUv3, Non-secure streams.
#[derive(Clone, Copy, Debug)]
pub struct Smmuv3;

fn translate(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Stop> {
    if cr0::SMMUEN.of(registers.need("CR0")?) == 0 {
        if gbpa::ABORT.of(registers.get("GBPA").unwrap_or(0)) != 0 {
            return unused("ABORT", "IHI 0070 section 6.3.14", "the SMMU is disabled and GBPA refuses everything; no event is recorded");
        }
        return Ok(Outcome::Bypass);
    }
    let features = Features::new(registers)?;
    let entry = stream::find(registers, &features, requester.id, memory)?;
    let stream = Stream::new(&entry, &features)?;
    if !stream.stage1 && requester.pasid.is_some() {
        return blocked("C_BAD_SUBSTREAMID", "IHI 0070 section 5.2, S1Fmt", "a SubstreamID was given and stage 1 does not translate");
    }
    let contexts = Contexts::new(&entry, &features, &stream);
    let mut tables: Vec<TableConfig> = Vec::new();
    let mut tag = Tag { domain: stream.vmid, space: None };
    if stream.stage1
        && let Some(index) = contexts.select(requester.pasid)?
    {
        let words = contexts.find(index, memory)?;
        tables.push(context::config(&words, &entry, &features, &stream)?);
        // In EL2, where there is one privilege level, translations have no ASID.
        tag.space = (!stream.single_privilege).then(|| cd::ASID.of(&words) as u32);
    }
    tables.extend(stream.stage2);
    Ok(if tables.is_empty() { Outcome::Bypass } else { Outcome::Tables(Translated::new(tables, tag)) })
}

fn list(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Stop> {
    if cr0::SMMUEN.of(registers.need("CR0")?) == 0 {
        return Ok(Vec::new());
    }
    let features = Features::new(registers)?;
    let entry = stream::find(registers, &features, id, memory)?;
    let stream = Stream::new(&entry, &features)?;
    Ok(if stream.stage1 { Contexts::new(&entry, &features, &stream).list(memory) } else { Vec::new() })
}

impl Unit for Smmuv3 {
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        match translate(registers, requester, memory) {
            Ok(outcome) => Ok(outcome),
            Err(Stop::Blocked(blocked)) => Ok(Outcome::Blocked(blocked)),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        match list(registers, id, memory) {
            Ok(pasids) => Ok(pasids),
            Err(Stop::Blocked(_)) => Ok(Vec::new()),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
        crate::kernel::offers(kind, info)
    }

    fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
        crate::kernel::bind_data(table, to)
    }

    fn decode_commands(registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        Commands::new(registers)?.decode(commands)
    }

    fn review_event(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
        review::review(registers, event, memory)
    }

    fn encode_event(_registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        queue::encode(event)
    }

    fn encode_page_request(registers: &Registers, request: &PageRequest) -> Result<EventRecord, Error> {
        queue::encode_page_request(registers, request)
    }

    fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
        queue::decode_event(record)
    }
}
