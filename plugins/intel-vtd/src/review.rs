//! What structures say of an event: whether faults are recorded for a device or a PASID (FPD: D51397 sections 9.3 to 9.6), and by which pointer a table was reached.

use stagecraft_sdk::bits::{bit, mask, words};
use stagecraft_sdk::{Error, Event, FaultKind, Format, GuestMemory, Registers, TableConfig};

use crate::spec::first_stage;
use crate::spec::registers::rtaddr;
use crate::spec::structures::{POINTER, PRESENT, context, directory, pasid, root, scalable_context};
use crate::unit::Hardware;
use crate::{FirstStage, SecondStage};

/// Fault processing is disabled, in every structure but the root entry.
const FPD: u64 = bit(1);

/// Conditions that are recorded whatever structures say: those of the root table, and structures that cannot be read.
const UNQUALIFIED: [&str; 7] = ["LRT.", "SRT.", "RTA.", "LCT.1", "SCT.1", "SPD.1", "SPT.1"];

/// What was read on the way to a request's tables, as far as it goes.
#[derive(Default)]
struct Found {
    /// FPD of the context entry, of it or the PASID directory entry, and of any.
    quiet: [bool; 3],
    /// SSPTPTR.
    second: Option<TableConfig>,
    /// FSPTPTR.
    first: Option<u64>,
    /// Requests for supervisor privilege are refused (SRE), whatever the translation type.
    user_only: bool,
}

/// The event, or none if nothing is recorded.
pub(crate) fn review(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
    let Ok(Some(unit)) = Hardware::new(registers) else { return Ok(Some(event)) };
    let is_legacy = unit.mode == rtaddr::LEGACY;
    let passes = event.passes();
    if passes && event.iova >> unit.host_bits() == 0 {
        return Ok(None);
    }
    let found = if is_legacy { legacy(&unit, event.id, memory) } else { scalable(&unit, &event, memory) }.unwrap_or_default();
    // What comes behind the structure that is wrong has no say.
    let is_quiet = match event.name.as_deref() {
        Some(name) if UNQUALIFIED.iter().any(|known| name.starts_with(known)) => false,
        Some(name) if ["LCT.", "SCT.", "SGN.10"].iter().any(|known| name.starts_with(known)) => found.quiet[0],
        Some(name) if name.starts_with("SPD.") => found.quiet[1],
        _ => found.quiet[2],
    };
    if is_quiet {
        return Ok(None);
    }
    let name = if event.name.is_some() {
        None
    } else if found.user_only && event.privileged && event.pasid.is_some() {
        Some("SPT.6")
    } else if passes {
        Some(if is_legacy { "LGN.1" } else { "SGN.4" })
    } else {
        of_pointer(is_legacy, &found, &event, memory).or_else(|| beyond_second(unit.host_bits(), &found, &event))
    };
    Ok(Some(Event { name: name.map(str::to_owned).or(event.name), ..event }))
}

/// The condition of a walk that says by which pointer, or for what, an entry was reached.
fn of_pointer(is_legacy: bool, found: &Found, event: &Event, memory: &mut dyn GuestMemory) -> Option<&'static str> {
    let page_of = |address: Option<u64>| address.map(|address| address >> 12);
    // No entry was read: it is one of the first table.
    if event.fault == FaultKind::Unreadable && event.entries.is_empty() {
        return match event.is_of(SecondStage::NAME) {
            true if is_legacy => Some("LCT.4.3"),
            true => Some("SSS.4"),
            false => event.is_of(FirstStage::NAME).then_some("SFS.4"),
        };
    }
    if event.fault == FaultKind::Permission && event.is_of(SecondStage::NAME) && event.reading_table {
        // What can be read was to be marked.
        let table = found.second.as_ref()?;
        let address = event.intermediate?;
        if memory.read_through(table, address & !7, 8).is_ok() {
            return Some("SFS.8");
        }
        return Some(if page_of(event.intermediate) == page_of(found.first) { "SFS.6" } else { "SFS.7" });
    }
    None
}

/// An address in the first stage that is none of the second stage's inputs, but has no bits that are reserved: of a table, or of a page.
fn beyond_second(host_bits: u64, found: &Found, event: &Event) -> Option<&'static str> {
    found.second.as_ref()?;
    let entry = *event.entries.last()?;
    let is_page = event.level == Some(1) || entry & first_stage::PS != 0;
    let is_beyond = event.fault == FaultKind::AddressSize && event.is_of(FirstStage::NAME) && (entry & mask(51, 12)) >> host_bits == 0;
    is_beyond.then_some(if is_page { "SGN.5" } else { "SFS.5" })
}

/// `N` words at `address`.
fn read<const N: usize>(memory: &mut dyn GuestMemory, address: u64) -> Option<[u64; N]> {
    words(&memory.read(address, 8 * N as u32).ok()?).try_into().ok()
}

fn legacy(unit: &Hardware, id: u64, memory: &mut dyn GuestMemory) -> Option<Found> {
    let [low, _] = read(memory, unit.root_table + (id >> 8 & 0xff) * u64::from(root::BYTES))?;
    if low & PRESENT == 0 {
        return None;
    }
    let [low, high] = read(memory, POINTER.in_place(low) + (id & 0xff) * u64::from(context::BYTES))?;
    let second = unit.levels(context::AW.of(high)).map(|levels| unit.second_stage(POINTER.in_place(low), levels, false));
    Some(Found { quiet: [low & FPD != 0; 3], second, ..Found::default() })
}

fn scalable(unit: &Hardware, event: &Event, memory: &mut dyn GuestMemory) -> Option<Found> {
    let (bus, function) = (event.id >> 8 & 0xff, event.id & 0xff);
    let halves: [u64; 2] = read(memory, unit.root_table + bus * u64::from(root::BYTES))?;
    let half = halves[usize::from(function >= 0x80)];
    if half & PRESENT == 0 {
        return None;
    }
    let entry: [u64; 4] = read(memory, POINTER.in_place(half) + (function & 0x7f) * u64::from(scalable_context::BYTES))?;
    let mut found = Found { quiet: [entry[0] & FPD != 0; 3], ..Found::default() };
    let pasid = event.pasid.map_or(scalable_context::RID_PASID.of(entry[1]), u64::from);
    let beyond = (pasid >> 6) >> (scalable_context::PDTS.of(entry[0]) + 7) != 0;
    if entry[0] & PRESENT == 0 || beyond || event.pasid.is_some() && entry[0] & scalable_context::PASIDE == 0 {
        return Some(found);
    }
    let Some([entry]) = read(memory, POINTER.in_place(entry[0]).wrapping_add((pasid >> 6) * u64::from(directory::BYTES))) else { return Some(found) };
    if entry & FPD != 0 {
        found.quiet = [found.quiet[0], true, true];
    }
    if entry & PRESENT == 0 {
        return Some(found);
    }
    let address = POINTER.in_place(entry) + (pasid & 0x3f) * u64::from(pasid::BYTES);
    let Some(entry) = read::<8>(memory, address) else { return Some(found) };
    found.quiet[2] |= entry[0] & FPD != 0;
    let kind = pasid::PGTT.of(entry[0]);
    let has_first = matches!(kind, pasid::FIRST_STAGE | pasid::NESTED);
    if entry[0] & PRESENT != 0 {
        found.user_only = entry[2] & pasid::SRE == 0;
        found.first = has_first.then(|| POINTER.in_place(entry[2]));
        let levels = unit.levels(pasid::AW.of(entry[0])).filter(|_| matches!(kind, pasid::SECOND_STAGE | pasid::NESTED));
        found.second = levels.map(|levels| unit.second_stage(POINTER.in_place(entry[0]), levels, entry[0] & pasid::SSADE != 0));
    }
    Some(found)
}
