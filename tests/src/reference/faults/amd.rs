//! AMD-Vi: entries of the event log.
//!
//! Source: AMD 48882 sections 2.1.3.2 (page faults), 2.2.2 (device table), 2.2.6 (guest CR3 tables) and 2.5.2 to 2.5.5 (events).

use super::path::Path;
use super::{Answer, Cause, Refused, Request, Told, Unit, field, flag};
use crate::reference::detect::{self, Resolution};
use crate::reference::tables::{AmdV1, TableConfig};
use crate::reference::{Access, Problem, bit, bits};

const ILLEGAL_DEV_TABLE_ENTRY: u64 = 1;
const IO_PAGE_FAULT: u64 = 2;
const DEV_TAB_HARDWARE_ERROR: u64 = 3;
const PAGE_TAB_HARDWARE_ERROR: u64 = 4;

/// What the flags of an IO_PAGE_FAULT say.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Flags {
    /// PR 0: RW, PE and RZ mean nothing.
    Absent,
    /// PR and PE.
    Denied,
    /// PR and RZ.
    Reserved,
    /// PR, and neither PE nor RZ: a level that there is not.
    Level,
}

/// Whose address it is that was looked up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// GN, and the PASID.
    Guest(u64),
    /// The domain.
    Host(u64),
}

/// Code 63:60, device 15:0; with GN (48) the PASID's bits 15:0 in 47:32 and 19:16 in 19:16, else a domain in 47:32.
fn head(code: u64, request: &Request, whose: Whose) -> u64 {
    let who = match whose {
        Whose::Guest(pasid) => 1 << 48 | field(bits(pasid, 15, 0), 47, 32) | field(bits(pasid, 19, 16), 19, 16),
        Whose::Host(domain) => field(domain, 47, 32),
    };
    code << 60 | field(request.id, 15, 0) | who
}

/// NX 49, US 50 (both with GN and PR), I 51, PR 52, RW 53, PE 54, RZ 55, TR 56. The address is in the second word.
fn page_fault(request: &Request, whose: Whose, address: u64, flags: Flags) -> Told {
    let mut word = head(IO_PAGE_FAULT, request, whose);
    word |= match flags {
        Flags::Absent => 0,
        Flags::Denied => 1 << 52 | 1 << 54,
        Flags::Reserved => 1 << 52 | 1 << 55,
        Flags::Level => 1 << 52,
    };
    word |= flag(request.writes() && flags != Flags::Absent, 53);
    let guest = matches!(whose, Whose::Guest(_));
    word |= flag(guest && request.executes(), 49) | flag(guest && !request.privileged, 50);
    let mut told = Told::record(&[word, address]);
    if flags == Flags::Absent {
        told = told.without(0, 55, 53).without(0, 50, 49);
    }
    if guest { told } else { told.without(0, 50, 49) }
}

/// Types 58:57 are the system's own, and so are the flags that go with them; the address has no lower bits.
fn hardware_error(code: u64, request: &Request, whose: Option<Whose>, address: u64) -> Told {
    let word = head(code, request, whose.unwrap_or(Whose::Host(0)));
    let told = Told::record(&[word, address & !0xf]).without(0, 58, 49).without(1, 3, 0);
    // A device table has neither domain nor PASID.
    if whose.is_some() { told } else { told.without(0, 48, 16) }
}

/// RZ 55: reserved bits, and not a level; RW 53. A PASID, if there is one, with GN. Bits 1:0 of the address are not there.
fn illegal(request: &Request, reserved: &[bool]) -> Vec<Told> {
    let whose = request.pasid.map_or(Whose::Host(0), |pasid| Whose::Guest(pasid.into()));
    let word = head(ILLEGAL_DEV_TABLE_ENTRY, request, whose) | flag(request.writes(), 53);
    let one = |reserved: &bool| {
        let told = Told::record(&[word | flag(*reserved, 55), request.iova & !3]).without(0, 50, 49);
        // Without PASID there is nothing to report.
        if request.pasid.is_some() { told } else { told.without(0, 47, 32) }
    };
    reserved.iter().map(one).collect()
}

pub(super) fn expected(unit: &Unit<'_>, request: &Request) -> Result<Option<Answer>, Problem> {
    let control = unit.register("CONTROL");
    if !bit(control, 0) {
        return Ok(None);
    }
    let base = unit.register("DEVTAB_BASE");
    if bits(control, 36, 34) != 0 {
        return Err(Problem::Unsupported("segments of the device table".to_owned()));
    }
    if request.id * 32 >= (bits(base, 8, 0) + 1) * 4096 {
        // Beyond the table: an entry that is none, or as others have it a page fault with nothing present.
        let mut told = illegal(request, &[false, true]);
        let whose = request.pasid.map_or(Whose::Host(0), |pasid| Whose::Guest(pasid.into()));
        told.push(page_fault(request, whose, request.iova, Flags::Absent).without(0, 48, 32).without(0, 19, 16));
        return Ok(Some(Answer::new("beyond the device table", told)));
    }
    let address = (bits(base, 51, 12) << 12) + request.id * 32;
    let Some(entry) = unit.words::<4>(address)? else {
        return Ok(Some(Answer::one("device table", hardware_error(DEV_TAB_HARDWARE_ERROR, request, None, address))));
    };
    if !bit(entry[0], 0) {
        return Ok(None);
    }
    let answer = of_entry(unit, request, &entry)?;
    // SA 98: all page faults are suppressed. SE 97: but for the first, which nobody here counts.
    Ok(answer.map(|mut answer| {
        let is_page_fault = |told: &Told| matches!(told, Told::Record(words) if words[0].0 >> 60 == IO_PAGE_FAULT);
        let (all, first) = (bit(entry[1], 34), bit(entry[1], 33));
        if all {
            answer.told.iter_mut().filter(|told| is_page_fault(told)).for_each(|told| *told = Told::Nothing);
        } else if first && answer.told.iter().any(is_page_fault) {
            answer.told.push(Told::Nothing);
        }
        answer.why += &format!(", suppressed: {all} {first}");
        answer
    }))
}

fn of_entry(unit: &Unit<'_>, request: &Request, entry: &[u64; 4]) -> Result<Option<Answer>, Problem> {
    let domain = bits(entry[1], 15, 0);
    let host = Whose::Host(domain);
    let both = request.pasid.map_or(vec![host], |pasid| vec![Whose::Guest(pasid.into()), host]);
    let faults = |flags: &[Flags]| -> Vec<Told> {
        let each = |whose: &Whose| flags.iter().map(|flags| page_fault(request, *whose, request.iova, *flags)).collect::<Vec<_>>();
        both.iter().flat_map(each).collect()
    };
    let resolution = detect::resolve_pasid(unit.snapshot, request.id, request.pasid.map(u64::from));
    let reason = if let Ok(Resolution::Blocked(reason)) = &resolution { reason.as_str() } else { "" };
    match reason {
        "reserved bits of the device table entry" => return Ok(Some(Answer::new(reason, illegal(request, &[true])))),
        // A level, or as section 2.2.2 has it of SNP and of units without such tables a reserved value.
        "Mode 7" | "GLX" | "GuestPagingMode" | "the unit has no host tables" => {
            return Ok(Some(Answer::new(reason, illegal(request, &[false, true]))));
        }
        // Section 2.2.2, tables 7 and 8: with V and without TV requests are target aborted.
        "TV is 0" => return Ok(Some(Answer::new(reason, [faults(&[Flags::Absent, Flags::Denied]), illegal(request, &[false])].concat()))),
        // "Access controlled by IR and IW": they deny it, or there is no page.
        "nothing is allowed" => return Ok(Some(Answer::new(reason, faults(&[Flags::Denied, Flags::Absent])))),
        // Guest translation is off: no page for it, or an entry that should have it.
        "PASID without guest tables" => {
            return Ok(Some(Answer::new(reason, [faults(&[Flags::Absent, Flags::Level]), illegal(request, &[false])].concat())));
        }
        "PASID out of range" => return Ok(Some(Answer::new(reason, faults(&[Flags::Absent, Flags::Level])))),
        _ => {}
    }
    // GIoV 54: requests without PASID have PASID 0.
    let guest = bit(entry[0], 55) && bit(unit.register("CONTROL"), 16);
    let pasid = request.pasid.or((guest && bit(entry[0], 54)).then_some(0)).map(u64::from);
    if let Some(pasid) = pasid
        && let Some(answer) = guest_table(unit, request, entry, pasid)?
    {
        return Ok(Some(answer));
    }
    let stages = match resolution {
        Ok(Resolution::Tables(stages)) => stages,
        Ok(Resolution::Bypass) => return Ok(None),
        Ok(Resolution::Direct(window)) if window.access.allows(request.writes()) => return Ok(None),
        Ok(Resolution::Direct(_)) => return Ok(Some(Answer::new("IR and IW", faults(&[Flags::Denied])))),
        other => return Err(Problem::Unsupported(format!("{other:?}"))),
    };
    let refused = Path::new(unit, &stages)?.request(request)?.err();
    Ok(refused.map(|refused| Answer::new(format!("{refused:x?}"), walked(&stages, request, &refused, pasid, domain))))
}

/// What the tables of a walk that ends make of a request.
fn walked(stages: &[TableConfig], request: &Request, refused: &Refused, pasid: Option<u64>, domain: u64) -> Vec<Told> {
    let guest = matches!(stages[refused.stage], TableConfig::AmdV2(_));
    // Section 2.5.3, GN: "the transaction used a guest address", or a nested one. Of a nested walk that fails behind a guest address both are told in practice:
    // the guest's address with its PASID, or the one that the host table was asked for with the domain.
    let mut who = Vec::new();
    if let Some(pasid) = pasid {
        who.push((Whose::Guest(pasid), request.iova));
        // Without a PASID it is a guest address by GIoV alone.
        if request.pasid.is_none() {
            who.push((Whose::Host(domain), request.iova));
        }
    } else {
        who.push((Whose::Host(domain), request.iova));
    }
    if !guest && pasid.is_some() {
        who.push((Whose::Host(domain), refused.input));
    }
    let mut told = Vec::new();
    for cause in &refused.causes {
        let flags: &[Flags] = match cause {
            Cause::Absent => &[Flags::Absent],
            Cause::Permission | Cause::Privilege => &[Flags::Denied],
            Cause::Reserved | Cause::AddressSize => &[Flags::Reserved],
            Cause::Level => &[Flags::Level],
            // An address that no table has, or no entry: no page is there for it.
            _ => &[Flags::Absent, Flags::Level],
        };
        if let Cause::Unreadable(address) = cause {
            told.extend(who.iter().map(|(whose, _)| hardware_error(PAGE_TAB_HARDWARE_ERROR, request, Some(*whose), *address)));
            continue;
        }
        told.extend(who.iter().flat_map(|(whose, address)| flags.iter().map(|flags| page_fault(request, *whose, *address, *flags))));
    }
    told
}

/// What is told because there is no guest table for a PASID.
fn guest_table(unit: &Unit<'_>, request: &Request, entry: &[u64; 4], pasid: u64) -> Result<Option<Answer>, Problem> {
    // GLX 57:56; GCR3 root pointer: bits 14:12 in 60:58, 30:15 in 95:80, 51:31 in 127:107.
    let levels = bits(entry[0], 57, 56);
    let mut table = bits(entry[0], 60, 58) << 12 | bits(entry[1], 31, 16) << 15 | bits(entry[1], 63, 43) << 31;
    // Mode 11:9; the host table translates the second level's address, and with CONTROL.GCR3TRPMode (58) the first one's.
    let mode = bits(entry[0], 11, 9) as u32;
    let granted = Access { read: bit(entry[0], 61), write: bit(entry[0], 62) };
    let host = (mode != 0).then(|| {
        TableConfig::AmdV1(AmdV1 {
            root: bits(entry[0], 51, 12) << 12,
            levels: mode,
            output_bits: 52,
            granted,
            update_accessed: false,
            update_dirty: false,
        })
    });
    let mut translated = bit(unit.register("CONTROL"), 58);
    let domain = bits(entry[1], 15, 0);
    let who = || {
        let guest = Some(Whose::Guest(pasid));
        [guest, Some(Whose::Host(domain)).filter(|_| request.pasid.is_none())].into_iter().flatten()
    };
    for level in (0..=levels).rev() {
        let mut at = table + bits(pasid >> (9 * level), 8, 0) * 8;
        if let Some(host) = host.filter(|_| translated) {
            match Path::new(unit, &[host])?.structure(at)? {
                Ok(physical) => at = physical,
                Err(refused) => {
                    return Ok(Some(Answer::new(format!("GCR3 table: {refused:x?}"), walked(&[host], request, &refused, Some(pasid), domain))));
                }
            }
        }
        let Some(word) = unit.read(at)? else {
            let told = who().map(|whose| hardware_error(PAGE_TAB_HARDWARE_ERROR, request, Some(whose), at)).collect();
            return Ok(Some(Answer::new("GCR3 table cannot be read", told)));
        };
        let flags = match (bit(word, 0), bits(word, 63, 52)) {
            (false, _) => Some(Flags::Absent),
            (true, 0) => None,
            (true, _) => Some(Flags::Reserved),
        };
        if let Some(flags) = flags {
            let told = who().map(|whose| page_fault(request, whose, request.iova, flags)).collect();
            return Ok(Some(Answer::new("GCR3 table entry", told)));
        }
        translated = true;
        table = bits(word, 51, 12) << 12;
    }
    // A root that is no guest-physical address: the host table has no page for it.
    if let Some(host) = host
        && table >> (12 + 9 * mode).min(63) != 0
    {
        let refused = Refused { stage: 0, input: table, fetch: None, causes: vec![Cause::Range], depth: 0, before: Vec::new() };
        return Ok(Some(Answer::new("root beyond", walked(&[host], request, &refused, Some(pasid), domain))));
    }
    Ok(None)
}
