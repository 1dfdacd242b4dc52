//! What structures say of an event: whether the guest wants a record of it (IHI 0070 section 5.5), and what else only they know.

use stagecraft_sdk::{Error, Event, FaultKind, Format, GuestMemory, Registers};

use crate::context::{self, Contexts};
use crate::queue::REFUSED_MARK;
use crate::spec::registers::{cr0, cr2};
use crate::spec::{Words, cd, ste};
use crate::stream::{self, Features, Stop, Stream};
use crate::{Stage1, Stage2};

/// The event of a walk, which the stage records or not. Where a CD disables both halves no walk is needed.
fn is_of_walk(event: &Event) -> bool {
    event.format.is_some() || event.name.as_deref() == Some("F_TRANSLATION")
}

/// The event, or none if nothing is recorded.
pub(crate) fn review(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
    if event.name.as_deref() == Some("C_BAD_STREAMID") {
        let recorded = cr2::RECINVSID.of(registers.get("CR2").unwrap_or(0)) != 0;
        return Ok(Some(event).filter(|_| recorded));
    }
    let features = match Features::new(registers) {
        Ok(features) => features,
        Err(_) => return Ok(Some(event)),
    };
    let passes = event.passes();
    if passes && cr0::SMMUEN.of(registers.get("CR0").unwrap_or(1)) == 0 {
        // Section 3.4: the disabled unit aborts, and records nothing.
        return Ok(None);
    }
    if !passes && !is_of_walk(&event) {
        return Ok(Some(event));
    }
    let entry = match stream::find(registers, &features, event.id, memory) {
        Ok(entry) => entry,
        // The guest has taken the entry away: what no entry allows.
        Err(_) if passes => return Ok(bypassed(features.intermediate_bits(), event)),
        Err(_) => return Ok(Some(event)),
    };
    let event = features.overridden(&entry, event);
    if passes {
        // No stage is configured, or stage 1 alone, which the request bypasses.
        let is_plain = ste::CONFIG.of(&entry) == 0b100;
        return Ok(bypassed(if is_plain { features.physical_bits() } else { features.intermediate_bits() }, event));
    }
    match recorded(&entry, &features, &event, memory) {
        Ok(Recorded { before_walk: true, wanted, .. }) => Ok(before_walk(event).filter(|_| wanted)),
        // F_WALK_EABT is always recorded.
        _ if event.fault == FaultKind::Unreadable => Ok(Some(event)),
        Ok(Recorded { stage1: false, .. }) if is_beyond_input(&features, &event) => Ok(bypassed(features.intermediate_bits(), event)),
        Ok(Recorded { wanted: false, .. }) => Ok(None),
        Ok(Recorded { of_mark: true, .. }) => Ok(Some(Event { name: Some(REFUSED_MARK.to_owned()), ..event })),
        Ok(_) | Err(_) => Ok(Some(event)),
    }
}

/// Section 3.4: an address with more bits than the unit has is an address size fault of the stage 1 that is bypassed, which no flag suppresses.
fn bypassed(most: u8, event: Event) -> Option<Event> {
    let too_large = event.iova >> most != 0;
    too_large.then(|| Event { name: Some("F_ADDR_SIZE".to_owned()), format: None, ..event })
}

/// Section 5.4, E0PD0: a translation fault of stage 1, whatever a walk would have found.
fn before_walk(event: Event) -> Option<Event> {
    let (name, format) = (Some("F_TRANSLATION".to_owned()), Some(Stage1::NAME.to_owned()));
    Some(Event { name, format, level: None, entries: Vec::new(), intermediate: None, reading_table: false, unreadable: None, ..event })
}

/// Stage 2 alone refused the IOVA before it read anything, and stage 1 would have before.
fn is_beyond_input(features: &Features, event: &Event) -> bool {
    event.is_of(Stage2::NAME) && event.level.is_none() && !event.reading_table && event.intermediate.is_none() && {
        event.fault == FaultKind::Translation && event.iova >> features.intermediate_bits() != 0
    }
}

/// Whether the stage that failed records faults: STE.S2R, CD.R; stalls are always recorded. And what structures know of it.
struct Recorded {
    wanted: bool,
    /// Stage 1 translates the request.
    stage1: bool,
    /// Stage 2 refused to have a stage 1 descriptor written: it can be read there.
    of_mark: bool,
    /// The request may not even ask for this half of the addresses: E0PD0 or E0PD1 (section 5.4).
    before_walk: bool,
}

fn recorded(entry: &Words, features: &Features, event: &Event, memory: &mut dyn GuestMemory) -> Result<Recorded, Stop> {
    let stream = Stream::new(entry, features)?;
    let contexts = Contexts::new(entry, features, &stream);
    let index = if stream.stage1 { contexts.select(event.pasid)? } else { None };
    let context = match index {
        Some(index) if event.name.is_none() || !event.is_of(Stage2::NAME) => Some(contexts.find(index, memory)?),
        _ => None,
    };
    // With one privilege level everything counts as privileged (section 13.4.1).
    let refuses = |words| !event.privileged && !stream.single_privilege && context::refuses_unprivileged(words, features, event.iova);
    if event.is_of(Stage2::NAME) && !context.as_ref().is_some_and(refuses) {
        let wanted = ste::S2R.is_set(entry) || ste::S2S.is_set(entry);
        let of_table = event.fault == FaultKind::Permission && event.reading_table && event.name.is_none();
        let refused = stream.stage2.as_ref().zip(event.intermediate).filter(|_| of_table);
        let of_mark = refused.is_some_and(|(table, address)| memory.read_through(table, address & !7, 8).is_ok());
        return Ok(Recorded { wanted, stage1: index.is_some(), of_mark, before_walk: false });
    }
    let Some(words) = context else { return Ok(Recorded { wanted: true, stage1: false, of_mark: false, before_walk: false }) };
    let before_walk = refuses(&words);
    Ok(Recorded { wanted: cd::R.is_set(&words) || cd::S.is_set(&words), stage1: true, of_mark: false, before_walk })
}
