//! From registers to tables: device table entries and guest CR3 tables (sections 2.2.2 and 2.2.6).
//!
//! A device's DMA gets, in the order in which the unit looks:
//!
//! | what the device table entry says | what the DMA gets |
//! |---|---|
//! | V = 0, or the unit is off | no translation |
//! | V = 1, TV = 0 | nothing |
//! | GV = 1, and a PASID or GIoV = 1 | the guest table of the PASID (of PASID 0 without one), then the host table |
//! | Mode 1 to 6 | the host table, with IR and IW of the entry |
//! | Mode 0 | no translation, if IR and IW are set; nothing, if both are clear |
//!
//! Mode 0 with one of IR and IW alone is a bypass for reads or for writes only. The exclusion range and address routing (MARC) let some addresses by
//! untranslated beside a table; no outcome of the contract says that, so the answer is that this is not supported. A guest table without a host table takes IR
//! and IW into its own settings.
//!
//! A request that hardware would refuse is blocked with the event that it would log (section 2.5). Addresses of interrupts are intercepted for requests without
//! PASID; see the crate's documentation for the other special addresses, which are not judged.
//!
//! Addresses in guest CR3 tables, and of guest tables, are guest-physical: the host table translates them, if there is one. That of the first guest CR3 table
//! is so only if CONTROL.GCR3TRPMode says so.

use stagecraft_sdk::bits::words;
use stagecraft_sdk::{
    Attributes, Binding, Blocked, BlockedDma, Command, Direct, Error, EventRecord, FaultKind, Format, GuestMemory, Intercept, Offer, Outcome,
    PageRequest, PlaceToBind, Registers, Requester, Structure, TableConfig, Tag, Translated, Unit, Window,
};

use crate::queue;
use crate::spec::device_table::{
    BYTES, DOMAIN_ID, EX, GIOV, GLX, GUEST_PAGING_MODE, GV, HAD, HOST_ROOT, IR, IW, MODE, RESERVED_0, RESERVED_2, RESERVED_3, SA, TV, V, WORDS, gcr3,
    gcr3_root,
};
use crate::spec::registers::{control, devtab, efr, exclusion};
use crate::v1::{V1, input_bits};
use crate::v2::V2;
use crate::{ADDRESS_BITS, INTERRUPTS, kernel};

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct AmdVi;

/// Most PASIDs that [`Unit::pasids`] answers.
const MOST_PASIDS: usize = 1024;
/// Most guest CR3 tables that [`Unit::pasids`] reads.
const MOST_GCR3_TABLES: u32 = 1024;
const PAGE: u32 = 4096;

const GCR3_TABLE: &str = "48882 section 2.2.6";
const DEVICE_TABLE: &str = "48882 section 2.2.2";
const REGISTERS: &str = "48882 section 3.4";

/// Bits of PASIDs that a guest CR3 table with GLX 0, 1 or 2 selects entries with.
const PASID_BITS: [u32; 3] = [9, 18, 20];

/// An event that the unit would log.
#[derive(Clone, Copy)]
enum Event {
    IllegalDevTableEntry,
    IoPageFault,
    DevTabHardwareError,
    PageTabHardwareError,
    InvalidDeviceRequest,
}

impl Event {
    const fn name_and_section(self) -> (&'static str, &'static str) {
        match self {
            Self::IllegalDevTableEntry => ("ILLEGAL_DEV_TABLE_ENTRY", "48882 section 2.5.2"),
            Self::IoPageFault => ("IO_PAGE_FAULT", "48882 section 2.5.3"),
            Self::DevTabHardwareError => ("DEV_TAB_HARDWARE_ERROR", "48882 section 2.5.4"),
            Self::PageTabHardwareError => ("PAGE_TAB_HARDWARE_ERROR", "48882 section 2.5.5"),
            Self::InvalidDeviceRequest => ("INVALID_DEVICE_REQUEST", "48882 section 2.5.9"),
        }
    }
}

/// Why a lookup ends without tables.
enum Stop {
    /// The hardware refuses the request.
    Blocked(Blocked),
    /// This plugin cannot answer.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

fn blocked(event: Event, reason: &str) -> Stop {
    let (name, section) = event.name_and_section();
    Stop::Blocked(Blocked::refused(name, section, reason))
}

/// `Err` if the condition holds, because nothing was set up.
fn unused_if(condition: bool, event: Event, reason: &str) -> Result<(), Stop> {
    let (name, section) = event.name_and_section();
    if condition { Err(Stop::Blocked(Blocked::unused(name, section, reason))) } else { Ok(()) }
}

/// `Err` if the condition holds.
fn unless(condition: bool, event: Event, reason: &str) -> Result<(), Stop> {
    if condition { Err(blocked(event, reason)) } else { Ok(()) }
}

/// `Err` if one of `words` is not zero: what is wrong with each word of the structure that was read last.
fn unless_zero(words: &[u64], event: Event, reason: &str) -> Result<(), Stop> {
    let (name, section) = event.name_and_section();
    let blocked = || Stop::Blocked(Blocked::refused(name, section, reason).at_first(words));
    if words.iter().any(|word| *word != 0) { Err(blocked()) } else { Ok(()) }
}

fn unsupported(what: &str) -> Stop {
    Stop::Error(Error::Unsupported(what.to_owned()))
}

/// Addresses of interrupts, which no tables serve, and no bypass.
fn interrupts() -> Intercept {
    let (first, last) = INTERRUPTS;
    let (server, section) = ("interrupt controller".to_owned(), "48882 section 2.2.5".to_owned());
    Intercept { passed: 0, mask: !(last - first), value: first, server, address: None, section }
}

/// All of guest memory as it is, for reads or for writes only.
fn one_way(read: bool, write: bool) -> Direct {
    let attributes = Attributes { read, write, coherent: true, ..Attributes::default() };
    Direct { windows: vec![Window { first: 0, last: u64::MAX, address: 0, attributes }], intercepts: vec![interrupts()] }
}

/// A unit that translates.
struct Hardware {
    control: u64,
    /// EXT_FEATURES; none if nobody knows.
    features: Option<u64>,
    exclusion: u64,
    /// Bases and sizes of the device table's segments.
    segments: Vec<u64>,
}

/// Reads guest-physical addresses: through the host table, if there is one.
struct GuestPhysical<'a> {
    memory: &'a mut dyn GuestMemory,
    host: Option<&'a TableConfig>,
}

impl GuestPhysical<'_> {
    fn read(&mut self, address: u64, length: u32, translated: bool) -> Result<Vec<u64>, Error> {
        let bytes = match self.host.filter(|_| translated) {
            Some(host) => self.memory.read_through(host, address, length)?,
            None => self.memory.read(address, length)?,
        };
        if bytes.len() == length as usize { Ok(words(&bytes)) } else { Err(Error::Unreadable(address)) }
    }
}

impl Hardware {
    /// The unit, or nothing if it does not translate.
    fn new(registers: &Registers) -> Result<Option<Self>, Error> {
        let (first, control) = (registers.need("DEVTAB_BASE")?, registers.need("CONTROL")?);
        if control::IOMMU_EN.of(control) == 0 {
            return Ok(None);
        }
        let count = match control::DEV_TBL_SEG_EN.of(control) {
            log2 @ 0..=3 => 1 << log2,
            _ => return Err(Error::invalid("CONTROL", control, REGISTERS, "this number of device table segments is reserved")),
        };
        let segments = [Ok(first)].into_iter().chain((1..count).map(|segment| registers.need(&format!("DEVTAB_SEG{segment}_BASE"))));
        Ok(Some(Self {
            control,
            features: registers.get("EXT_FEATURES"),
            exclusion: registers.get("EXCL_BASE").unwrap_or(0),
            segments: segments.collect::<Result<_, _>>()?,
        }))
    }

    /// A field of EXT_FEATURES that changes what entries mean; zero if nobody knows.
    fn feature(&self, field: stagecraft_sdk::bits::Field) -> u64 {
        self.features.map_or(0, |features| field.of(features))
    }

    fn controls(&self, field: stagecraft_sdk::bits::Field) -> bool {
        field.of(self.control) == 1
    }

    /// The device's entry, section 2.2.2. The highest bits of a DeviceID select the segment.
    fn device_entry(&self, id: u64, memory: &mut dyn GuestMemory) -> Result<[u64; WORDS], Stop> {
        let bits = 16 - self.segments.len().trailing_zeros();
        let (segment, index) = (self.segments[(id >> bits) as usize], id & ((1 << bits) - 1));
        let (offset, size) = (index * u64::from(BYTES), (devtab::SIZE.of(segment) + 1) * u64::from(PAGE));
        unused_if(offset >= size, Event::IllegalDevTableEntry, "the DeviceID is beyond the device table")?;
        let address = devtab::BASE.in_place(segment) + offset;
        let read = memory.read(address, BYTES).ok().and_then(|bytes| words(&bytes).try_into().ok());
        let entry: [u64; WORDS] =
            read.ok_or_else(|| blocked(Event::DevTabHardwareError, &format!("the device table entry at {address:#x} cannot be read")))?;
        if entry[0] & V != 0 {
            let reason = "the device table entry has reserved bits";
            Structure::new(memory, address, DEVICE_TABLE).warn(2, entry[2] & RESERVED_2, reason).warn(3, entry[3] & RESERVED_3, reason);
            self.note_features(&entry, address, memory);
        }
        Ok(entry)
    }

    /// What a translating entry uses and EXT_FEATURES does not show; see the crate's documentation.
    fn note_features(&self, entry: &[u64; WORDS], address: u64, memory: &mut dyn GuestMemory) {
        let Some(features) = self.features.filter(|_| entry[0] & TV != 0) else { return };
        let mut structure = Structure::new(memory, address, REGISTERS);
        let (mode, hats) = (MODE.of(entry[0]), efr::HATS.of(features));
        // Without host tables any mode but 0, and with them mode 7, is refused.
        if hats != efr::NO_HOST_TABLES && (1..7).contains(&mode) && mode > hats + 4 {
            structure.warn(0, MODE.mask(), "the device table entry asks for more levels of host tables (Mode) than the unit shows (HATS)");
        }
        if !self.has_guest_tables(entry) {
            return;
        }
        if GLX.of(entry[0]) > efr::GLX_SUP.of(features) {
            structure.warn(0, GLX.mask(), "the device table entry asks for more levels of guest CR3 tables (GLX) than the unit shows (GLXSup)");
        }
        if GUEST_PAGING_MODE.of(entry[2]) > efr::GATS.of(features) {
            structure.warn(
                2,
                GUEST_PAGING_MODE.mask(),
                "the device table entry asks for more levels of guest tables (GuestPagingMode) than the unit shows (GATS)",
            );
        }
    }

    /// An entry that asks for translation, or nothing if it does not.
    fn translating_entry(&self, id: u64, memory: &mut dyn GuestMemory) -> Result<Option<[u64; WORDS]>, Stop> {
        let entry = self.device_entry(id, memory)?;
        if entry[0] & V == 0 {
            return Ok(None);
        }
        unless_zero(&[entry[0] & RESERVED_0], Event::IllegalDevTableEntry, "the device table entry has a reserved bit")?;
        if exclusion::EX_EN.of(self.exclusion) == 1 && (exclusion::ALLOW.of(self.exclusion) == 1 || entry[1] & EX != 0) {
            return Err(unsupported("an exclusion range, whose addresses pass untranslated beside the tables"));
        }
        if self.controls(control::MARC_EN) {
            return Err(unsupported("memory address routing and control (MARC), whose apertures are beside the tables"));
        }
        unused_if(entry[0] & TV == 0, Event::IoPageFault, "the translation fields of the device table entry are not valid (TV)")?;
        Ok(Some(entry))
    }

    /// The host table of an entry, if it has one.
    fn host_table(&self, entry: &[u64; WORDS]) -> Result<Option<TableConfig>, Stop> {
        let (mode, root) = (MODE.of(entry[0]), HOST_ROOT.in_place(entry[0]));
        let none = self.feature(efr::HATS) == efr::NO_HOST_TABLES;
        unless_zero(
            &[if none { entry[0] & (HOST_ROOT.mask() | MODE.mask()) } else { 0 }],
            Event::IllegalDevTableEntry,
            "the unit has no host tables (HATS)",
        )?;
        unless_zero(&[if mode == 7 { MODE.mask() } else { 0 }], Event::IllegalDevTableEntry, "paging mode 7 is reserved")?;
        if mode == 0 {
            return Ok(None);
        }
        let mut table = TableConfig::new(V1::NAME, &[("levels", mode), ("root", root)]);
        let mut set = |name, value, default| {
            if value != default {
                table.settings.set(name, u64::from(value));
            }
        };
        set("read", entry[0] & IR != 0, true);
        set("write", entry[0] & IW != 0, true);
        set("update-accessed", HAD.of(entry[0]) & 1 != 0, false);
        set("update-dirty", HAD.of(entry[0]) & 2 != 0, false);
        Ok(Some(table))
    }

    /// Whether an entry's guest tables count.
    fn has_guest_tables(&self, entry: &[u64; WORDS]) -> bool {
        self.controls(control::GT_EN) && entry[0] & GV != 0
    }

    /// What `requester` gets, with what is no business of the tables.
    fn lookup(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Stop> {
        let outcome = self.structures(requester, memory)?;
        Ok(match outcome {
            Outcome::Tables(translated) if requester.pasid.is_none() => Outcome::Tables(Translated { intercepts: vec![interrupts()], ..translated }),
            outcome => outcome,
        })
    }

    /// What the structures say.
    fn structures(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Stop> {
        let Some(entry) = self.translating_entry(requester.id, memory)? else { return Ok(Outcome::Bypass) };
        let host = self.host_table(&entry)?;
        let (read, write) = (entry[0] & IR != 0, entry[0] & IW != 0);
        unused_if(!read && !write, Event::IoPageFault, "the device table entry allows neither reads nor writes (IR, IW)")?;
        let domain = Some(DOMAIN_ID.of(entry[1]) as u32);
        let pasid = match requester.pasid {
            Some(_) if !self.has_guest_tables(&entry) => {
                return Err(blocked(Event::InvalidDeviceRequest, "the device has no guest tables (GV), and the request has a PASID"));
            }
            Some(pasid) => pasid,
            None if self.has_guest_tables(&entry) && entry[0] & GIOV != 0 => 0,
            None => {
                return match host {
                    Some(host) => Ok(Outcome::Tables(Translated::new(vec![host], Tag { domain, space: None }))),
                    None if read && write => Ok(Outcome::Bypass),
                    None => Ok(Outcome::Direct(one_way(read, write))),
                };
            }
        };
        // Before anything else is read, as the whole entry is.
        let mode = GUEST_PAGING_MODE.of(entry[2]);
        unless_zero(&[0, 0, if mode > 1 { GUEST_PAGING_MODE.mask() } else { 0 }], Event::IllegalDevTableEntry, "this guest paging mode is reserved")?;
        let root = self.guest_root(&entry, pasid, &mut GuestPhysical { memory, host: host.as_ref() })?;
        let guest = self.guest_table(&entry, root, pasid, host.is_some())?;
        Ok(Outcome::Tables(Translated::new([guest].into_iter().chain(host).collect(), Tag { domain, space: Some(pasid) })))
    }

    /// The root of a PASID's guest table, section 2.2.6.
    fn guest_root(&self, entry: &[u64; WORDS], pasid: u32, memory: &mut GuestPhysical<'_>) -> Result<u64, Stop> {
        let levels = self.gcr3_levels(entry)?;
        unused_if(pasid >> PASID_BITS[levels - 1] != 0, Event::IoPageFault, "the PASID is beyond the guest CR3 table (GLX)")?;
        let mut table = gcr3_root(entry);
        let mut translated = self.controls(control::GCR3_TRP_MODE);
        for level in (0..levels).rev() {
            let address = table + (u64::from(pasid) >> (9 * level) & (gcr3::ENTRIES - 1)) * 8;
            let unreadable = || blocked(Event::PageTabHardwareError, &format!("the guest CR3 table entry at {address:#x} cannot be read"));
            let next = memory.read(address, 8, translated).ok().and_then(|words| words.first().copied()).ok_or_else(unreadable)?;
            unused_if(next & gcr3::V == 0, Event::IoPageFault, "the guest CR3 table entry of the PASID is not valid")?;
            unless_zero(&[next & gcr3::RESERVED], Event::IoPageFault, "the guest CR3 table entry of the PASID has a reserved bit")?;
            let reason = "the guest CR3 table entry of the PASID has reserved bits";
            Structure::new(memory.memory, address, GCR3_TABLE).warn(0, next & gcr3::IGNORED, reason);
            table = gcr3::ADDRESS.in_place(next);
            translated = true;
        }
        Ok(table)
    }

    fn gcr3_levels(&self, entry: &[u64; WORDS]) -> Result<usize, Stop> {
        match GLX.of(entry[0]) {
            3 => unless_zero(&[GLX.mask()], Event::IllegalDevTableEntry, "this number of guest CR3 table levels (GLX) is reserved").map(|()| 0),
            glx => Ok(glx as usize + 1),
        }
    }

    fn guest_table(&self, entry: &[u64; WORDS], root: u64, pasid: u32, nested: bool) -> Result<TableConfig, Stop> {
        let mut table = TableConfig::new(V2::NAME, &[("levels", 4 + GUEST_PAGING_MODE.of(entry[2])), ("root", root)]);
        let mut set = |name, value, default| {
            if value != default {
                table.settings.set(name, value);
            }
        };
        // The guest table's addresses end where the host table's input does, and permissions are the host table's business if there is one.
        let output_bits = if nested { input_bits(MODE.of(entry[0])).min(ADDRESS_BITS) } else { ADDRESS_BITS };
        set("output-bits", output_bits, ADDRESS_BITS);
        unless(root >> output_bits != 0, Event::IoPageFault, "the guest table's root is beyond the addresses that the host table translates")?;
        set("sign-extended", u64::from(pasid != 0), 1);
        set("no-execute", self.feature(efr::NX_SUP), 0);
        set("read", u64::from(nested || entry[0] & IR != 0), 1);
        set("write", u64::from(nested || entry[0] & IW != 0), 1);
        set("update-accessed", 1 - control::GA_UPDATE_DIS.of(self.control), 1);
        set("update-dirty", 1 - control::GD_UPDATE_DIS.of(self.control), 1);
        Ok(table)
    }

    /// Whether a requester is refused because of a reserved bit, and not of a level: of the device table entry, or of a guest CR3 table.
    fn has_reserved_bits(&self, entry: &[u64; WORDS], id: u64, pasid: Option<u32>, memory: &mut dyn GuestMemory) -> bool {
        if entry[0] & RESERVED_0 != 0 {
            return true;
        }
        let refused = self.structures(Requester { id, pasid }, memory);
        matches!(refused, Err(Stop::Blocked(blocked)) if blocked.event == "IO_PAGE_FAULT" && blocked.bits & gcr3::RESERVED != 0)
    }

    /// See [`Unit::pasids`].
    fn pasids(&self, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Stop> {
        let Some(entry) = self.translating_entry(id, memory)? else { return Ok(Vec::new()) };
        let host = self.host_table(&entry)?;
        let mut found = Vec::new();
        if !self.has_guest_tables(&entry) || entry[0] & (IR | IW) == 0 {
            return Ok(found);
        }
        let levels = self.gcr3_levels(&entry)?;
        let mut memory = GuestPhysical { memory, host: host.as_ref() };
        let own = (entry[0] & GIOV != 0).then_some(0);
        // Tables to read, the next one last: their level, the PASID of their first entry, address, and whether that is guest-physical.
        let mut tables = vec![(levels - 1, 0_u32, gcr3_root(&entry), self.controls(control::GCR3_TRP_MODE))];
        let mut tables_left = MOST_GCR3_TABLES;
        while let Some((level, first, address, translated)) = tables.pop() {
            let Some(left) = tables_left.checked_sub(1) else { break };
            tables_left = left;
            let Ok(entries) = memory.read(address, PAGE, translated) else { continue };
            let below = tables.len();
            for (index, next) in (0_u32..).zip(entries) {
                let pasid = u64::from(first) | u64::from(index) << (9 * level);
                if pasid >> PASID_BITS[levels - 1] != 0 {
                    break;
                }
                if next & gcr3::V == 0 || next & gcr3::RESERVED != 0 {
                    continue;
                }
                let pasid = pasid as u32;
                match level.checked_sub(1) {
                    Some(lower) => tables.push((lower, pasid, gcr3::ADDRESS.in_place(next), true)),
                    None if Some(pasid) != own => found.push(pasid),
                    None => {}
                }
                if found.len() == MOST_PASIDS {
                    return Ok(found);
                }
            }
            // Ascending PASIDs: the first of those just found is the next to be read.
            tables[below..].reverse();
        }
        Ok(found)
    }
}

/// DeviceIDs have 16 bits.
fn check_id(id: u64) -> Result<(), Error> {
    if id >> 16 == 0 { Ok(()) } else { Err(Error::invalid("id", id, DEVICE_TABLE, "a DeviceID has 16 bits")) }
}

impl Unit for AmdVi {
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        check_id(requester.id)?;
        let Some(unit) = Hardware::new(registers)? else { return Ok(Outcome::Bypass) };
        match unit.lookup(requester, memory) {
            Ok(outcome) => Ok(outcome),
            Err(Stop::Blocked(blocked)) => Ok(Outcome::Blocked(blocked)),
            Err(Stop::Error(error)) => Err(error),
        }
    }

    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        check_id(id)?;
        // What is wrong with the device is what `lookup` says.
        Ok(Hardware::new(registers)?.and_then(|unit| unit.pasids(id, memory).ok()).unwrap_or_default())
    }

    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
        kernel::offers(kind, info)
    }

    fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
        kernel::bind_data(table, to)
    }

    fn decode_commands(_registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        queue::decode(commands)
    }

    /// Page faults that the device table entry suppresses; the domain, and whether reserved bits are wrong, which only structures know.
    fn review_event(
        registers: &Registers,
        event: stagecraft_sdk::Event,
        memory: &mut dyn GuestMemory,
    ) -> Result<Option<stagecraft_sdk::Event>, Error> {
        let Ok(Some(unit)) = Hardware::new(registers) else { return Ok(Some(event)) };
        if check_id(event.id).is_err() {
            return Ok(Some(event));
        }
        if event.passes() {
            return Ok(None);
        }
        let Ok(entry) = unit.device_entry(event.id, memory) else { return Ok(Some(event)) };
        if entry[0] & V == 0 {
            return Ok(Some(event));
        }
        if entry[1] & SA != 0 && queue::is_page_fault(&event) {
            return Ok(None);
        }
        let domain = event.domain.or(Some(DOMAIN_ID.of(entry[1]) as u32));
        let is_reserved = event.fault == FaultKind::Configuration && unit.has_reserved_bits(&entry, event.id, event.pasid, memory);
        let fault = if is_reserved { FaultKind::Reserved } else { event.fault };
        Ok(Some(stagecraft_sdk::Event { domain, fault, ..event }))
    }

    fn encode_event(_registers: &Registers, event: &stagecraft_sdk::Event) -> Result<EventRecord, Error> {
        queue::encode(event)
    }

    fn encode_page_request(registers: &Registers, request: &PageRequest) -> Result<EventRecord, Error> {
        queue::encode_page_request(registers, request)
    }

    fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
        queue::decode_event(record)
    }
}
