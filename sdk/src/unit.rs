//! From a unit's registers to the tables that a device uses.

use crate::{Attributes, BlockedDma, Command, Error, Event, EventRecord, PageRequest, Severity, TableConfig};

/// Reads guest memory on behalf of [`Unit::lookup`]; bounded by the host. Read a structure once, whole, and keep it.
pub trait GuestMemory {
    /// `length` bytes (at most 4,096) at a guest-physical address.
    ///
    /// # Errors
    /// [`Error::Unreadable`] if any of it lies outside guest memory or the budget is spent.
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error>;

    /// The same for an address that `table` translates first, as stage 2 does for the structures of a nested stage 1.
    ///
    /// # Errors
    /// [`Error::Unreadable`] also if the translation faults or forbids reading.
    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error>;

    /// Says something about a structure besides the answer of [`Unit::lookup`]. The host keeps the first 64 of one lookup, and none of [`Unit::pasids`].
    fn note(&mut self, note: Note) {
        let _ = note;
    }

    /// Says which structure an answer [`Outcome::Blocked`] is about. The SDK does so for every [`Unit::lookup`]: it is the one that was read last.
    fn refuse(&mut self, address: u64, blocked: &Blocked) {
        let _ = (address, blocked);
    }
}

/// Memory that remembers which structure was read last.
struct LastRead<'a> {
    memory: &'a mut dyn GuestMemory,
    address: Option<u64>,
}

impl GuestMemory for LastRead<'_> {
    fn read(&mut self, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.address = Some(address);
        self.memory.read(address, length)
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Result<Vec<u8>, Error> {
        self.address = Some(address);
        self.memory.read_through(table, address, length)
    }

    fn note(&mut self, note: Note) {
        self.memory.note(note);
    }

    fn refuse(&mut self, address: u64, blocked: &Blocked) {
        self.memory.refuse(address, blocked);
    }
}

/// [`Unit::lookup`], as the host is told of it: with the structure that hardware refuses, if it refuses one.
///
/// # Errors
/// As [`Unit::lookup`].
pub fn lookup_and_refuse<U: Unit>(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
    let mut memory = LastRead { memory, address: None };
    let outcome = U::lookup(registers, requester, &mut memory)?;
    if let (Outcome::Blocked(blocked @ Blocked { kind: BlockKind::Refused, .. }), Some(address)) = (&outcome, memory.address) {
        memory.refuse(address, blocked);
    }
    Ok(outcome)
}

/// Bits of a device structure that should not be so, and that hardware does not mind. What hardware refuses is [`Outcome::Blocked`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// [`Severity::Warning`], or [`Severity::Info`] for what is merely odd.
    pub severity: Severity,
    /// Where the structure stands, as [`GuestMemory`] was asked for it.
    pub address: u64,
    /// Which 64-bit word of the structure, from 0.
    pub word: u8,
    /// The bits of that word, as the unit reads it.
    pub bits: u64,
    /// Document and section.
    pub section: &'static str,
    /// One sentence in lower case without a full stop, that names the structure.
    pub reason: &'static str,
}

/// Where a device structure stands, what it is, and what is noted about it.
pub struct Structure<'a> {
    memory: &'a mut dyn GuestMemory,
    address: u64,
    section: &'static str,
}

impl std::fmt::Debug for Structure<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Structure").field("address", &self.address).field("section", &self.section).finish_non_exhaustive()
    }
}

impl<'a> Structure<'a> {
    /// The structure at `address`, which `section` of a specification describes.
    pub fn new(memory: &'a mut dyn GuestMemory, address: u64, section: &'static str) -> Self {
        Self { memory, address, section }
    }

    /// A warning, unless `bits`, a part of word number `word`, is zero.
    pub fn warn(&mut self, word: u8, bits: u64, reason: &'static str) -> &mut Self {
        if bits != 0 {
            self.memory.note(Note { severity: Severity::Warning, address: self.address, word, bits, section: self.section, reason });
        }
        self
    }
}

/// A unit's registers by their architectural names, and which kind of unit it is.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    unit: String,
    values: Vec<(String, u64)>,
}

impl Registers {
    /// The same registers of a unit of this kind.
    #[must_use]
    pub fn of_unit(self, unit: &str) -> Self {
        Self { unit: unit.to_owned(), ..self }
    }

    /// The kind of unit: one of the manifest's `units`. The host always says it; registers that a test collects have none.
    #[must_use]
    pub fn unit(&self) -> &str {
        &self.unit
    }

    /// The register `name`, if the host gave it.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<u64> {
        self.values.iter().find(|(n, _)| n == name).map(|&(_, value)| value)
    }

    /// The register `name`.
    ///
    /// # Errors
    /// [`Error::Invalid`] if it is not there.
    pub fn need(&self, name: &str) -> Result<u64, Error> {
        self.get(name).ok_or_else(|| Error::invalid(name, 0, "", "this register is needed and was not given"))
    }
}

impl FromIterator<(String, u64)> for Registers {
    fn from_iter<T: IntoIterator<Item = (String, u64)>>(registers: T) -> Self {
        Self { unit: String::new(), values: registers.into_iter().collect() }
    }
}

/// Who asks: a requester id, StreamID or device id, and a PASID if the request has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Requester {
    /// Requester id, StreamID or device id.
    pub id: u64,
    /// PASID or SubstreamID; 20 bits.
    pub pasid: Option<u32>,
}

/// Why a requester is blocked at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// Nobody set anything up for it, or it is set up to be refused: drivers leave devices that nobody uses so.
    Unused,
    /// Something was set up, and hardware refuses it.
    Refused,
}

/// Every DMA of the requester is refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocked {
    /// Whether anybody wanted something else.
    pub kind: BlockKind,
    /// The event or fault reason of the architecture, such as `C_BAD_STE`.
    pub event: String,
    /// Document and section.
    pub section: String,
    /// One sentence in lower case without a full stop.
    pub reason: String,
    /// Which 64-bit word, from 0, of the structure that was read last.
    pub word: u8,
    /// The bits of that word that show it; zero where no bits do, or they are not known.
    pub bits: u64,
}

impl Blocked {
    /// Something was set up, and hardware refuses it.
    #[must_use]
    pub fn refused(event: &str, section: &str, reason: &str) -> Self {
        let [event, section, reason] = [event, section, reason].map(str::to_owned);
        Self { kind: BlockKind::Refused, event, section, reason, word: 0, bits: 0 }
    }

    /// The same, for these bits of word number `word` of the structure that was read last.
    #[must_use]
    pub fn at(self, word: u8, bits: u64) -> Self {
        Self { word, bits, ..self }
    }

    /// The same, for the first of the words `bits` that is not zero: what is wrong with each word of the structure that was read last.
    #[must_use]
    pub fn at_first(self, bits: &[u64]) -> Self {
        match bits.iter().position(|bits| *bits != 0) {
            Some(word) => self.at(word as u8, bits[word]),
            None => self,
        }
    }

    /// Nothing was set up.
    #[must_use]
    pub fn unused(event: &str, section: &str, reason: &str) -> Self {
        Self { kind: BlockKind::Unused, ..Self::refused(event, section, reason) }
    }
}

/// IOVAs that go to guest-physical memory without any table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// Lowest IOVA.
    pub first: u64,
    /// Highest IOVA.
    pub last: u64,
    /// Where the lowest goes; the others follow.
    pub address: u64,
    /// What is allowed.
    pub attributes: Attributes,
}

/// Addresses that something else than the tables serves: those with `address & mask == value`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Intercept {
    /// How many tables an address has passed when it is compared: 0, it is the IOVA.
    pub passed: u8,
    /// Bits that are compared.
    pub mask: u64,
    /// Their value.
    pub value: u64,
    /// What serves them, such as `MSI page table`.
    pub server: String,
    /// Where that stands in guest memory, if it does.
    pub address: Option<u64>,
    /// Document and section.
    pub section: String,
}

/// By which numbers invalidation commands name an address space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tag {
    /// VMID, domain id, GSCID.
    pub domain: Option<u32>,
    /// ASID, PASID, PSCID: within the domain.
    pub space: Option<u32>,
}

/// DMA of some addresses goes to guest-physical memory without any table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Direct {
    /// 1 to 16, sorted and not overlapping; IOVAs in none of them fault.
    pub windows: Vec<Window>,
    /// At most 16, none of which has passed a table.
    pub intercepts: Vec<Intercept>,
}

/// The tables of a requester.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Translated {
    /// One table, or two of which the second translates the outputs of the first.
    pub tables: Vec<TableConfig>,
    /// Addresses that the tables do not serve; at most 16.
    pub intercepts: Vec<Intercept>,
    /// Its name in invalidation commands.
    pub tag: Tag,
}

impl Translated {
    /// Tables without intercepts.
    #[must_use]
    pub fn new(tables: Vec<TableConfig>, tag: Tag) -> Self {
        Self { tables, intercepts: Vec::new(), tag }
    }
}

/// What a requester's DMA gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Guest-physical memory as it is.
    Bypass,
    /// The same for some addresses, at an offset or with less access.
    Direct(Direct),
    /// Nothing.
    Blocked(Blocked),
    /// What tables say.
    Tables(Translated),
}

/// A table format that a real unit accepts, with the limits of its settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Full name of the table format.
    pub format: String,
    /// Setting, and its largest value (for a set of sizes: their sum).
    pub limits: Vec<(String, u64)>,
    /// What has to be so besides, for people: sentences in lower case without a full stop.
    pub conditions: Vec<String>,
}

/// Bits `number_lsb .. number_lsb + width` of a number are bits `lsb .. lsb + width` of word `word` of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which word of the entry.
    pub word: u8,
    /// The lowest bit there.
    pub lsb: u8,
    /// How many bits, 1 to 64.
    pub width: u8,
    /// The lowest bit of the number.
    pub number_lsb: u8,
}

/// How one entry of an invalidation array says that it means several pages in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// Their number.
    Count(Place),
    /// There are `(number + 1) * 2^scale` pages.
    Scaled {
        /// One less than the number.
        number: Place,
        /// Its scale.
        scale: Place,
    },
    /// `2^n` pages aligned to their size, n at least 1: bits `page_log2 .. page_log2 + n - 1` of the address are ones, and the one above is zero.
    Block,
}

/// An entry for several pages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RangeEntry {
    /// Its words, with zeroes where the address and the extent go.
    pub words: Vec<u64>,
    /// How it says how many pages there are.
    pub extent: Extent,
}

/// Whose caches an invalidation array is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InvalidationTarget {
    /// The nested page table.
    PageTable,
    /// The vIOMMU that it is in.
    Viommu,
}

/// How the kernel is told to forget what was cached of a nested table. The host writes invalidation arrays by it, and asks nobody meanwhile. Entries are 1 to
/// 8 words of 64 bits, little-endian in memory, and all of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// An `iommu_hwpt_invalidate_data_type`.
    pub data_type: u32,
    /// Whose caches.
    pub target: InvalidationTarget,
    /// Log2 of the bytes of a page, 12 to 21: addresses and extents are in such pages.
    pub page_log2: u8,
    /// The entry for one page, with zeroes where the address goes.
    pub page: Vec<u64>,
    /// Where the IOVA of the first page goes: all its bits from `page_log2` on.
    pub address: Place,
    /// The entry for several pages, if there is one.
    pub range: Option<RangeEntry>,
    /// Ones that are added if only leaves were changed.
    pub leaf: Vec<u64>,
    /// Ones that are added if tables were changed as well. None: what was cached of tables only goes with `everything`.
    pub tables: Option<Vec<u64>>,
    /// The entry that is for all pages, and for tables.
    pub everything: Vec<u64>,
    /// With more entries than this, 1 to 4096, `everything` is better.
    pub most: u32,
}

/// How the kernel is told about a nested table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Binding {
    /// An `iommu_hwpt_data_type`.
    pub kind: u32,
    /// Its bytes.
    pub data: Vec<u8>,
    /// The structure that must stand at the context address first; may be empty.
    pub context: Vec<u8>,
    /// The `iommu_viommu_type` of the vIOMMU that the table is made in; none: it is made directly over its parent.
    pub viommu: Option<u32>,
    /// The kernel attaches such a table to single PASIDs. Otherwise PASIDs are the context structure's business.
    pub pasids: bool,
    /// None: nothing can be invalidated, so that nothing that was mapped can ever be changed.
    pub invalidation: Option<Recipe>,
}

/// What a nested table is bound to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlaceToBind {
    /// An `iommu_hw_info` data type.
    pub kind: u32,
    /// Its bytes; none: nothing is known of the unit.
    pub info: Vec<u8>,
    /// Where [`Binding::context`] would stand; a multiple of 4096.
    pub context_address: u64,
    /// The number by which the unit's caches and invalidations know the address space: 1 and more, no two of one vIOMMU have the same.
    pub space: u32,
    /// The host made the table, of this format's own leaves. Otherwise it is a guest's own, and what is cached of it may not be found by `space` alone (global
    /// entries).
    pub host_made: bool,
}

/// An IOMMU architecture's device structures.
pub trait Unit {
    /// What requests of `requester` get. What hardware would refuse in guest memory is [`Outcome::Blocked`]. A plugin for several kinds of unit asks
    /// [`Registers::unit`].
    ///
    /// # Errors
    /// Registers that are missing or contradict each other.
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error>;

    /// The PASIDs with a valid context, ascending, at most 1,024, without the one that requests without PASID use.
    ///
    /// # Errors
    /// As [`Unit::lookup`].
    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error>;

    /// What a real unit with this `iommu_hw_info` (data type and bytes) accepts.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kind is another architecture's, [`Error::Invalid`] if there are too few bytes.
    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error>;

    /// How the kernel is told about `table` when it is nested, and about what changes in it.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel has no nesting for this format; [`Error::Invalid`] for an address or a number that the unit cannot have.
    fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error>;

    /// What a batch of raw entries of the command queue asks for, in order. It ends with the first illegal command, and may ask for more than the commands do,
    /// never for less.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if this plugin does not know the commands, [`Error::Invalid`] for a part of an entry or a register that is missing.
    fn decode_commands(registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        let _ = (registers, commands);
        Err(Error::Unsupported("commands of this architecture".to_owned()))
    }

    /// What device structures in guest memory add to `event` before [`Unit::encode_event`] has it: another name, or none if the guest does not want to hear of it.
    /// Registers that are missing and memory that cannot be read add nothing.
    ///
    /// # Errors
    /// As [`Unit::encode_event`].
    fn review_event(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
        let _ = (registers, memory);
        Ok(Some(event))
    }

    /// The architecture's record of `event`, and where it goes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if there is no record of such a thing, or this plugin does not know it; [`Error::Invalid`] for what a record cannot hold.
    fn encode_event(registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        let _ = (registers, event);
        Err(Error::Unsupported("event records of this architecture".to_owned()))
    }

    /// The architecture's record of a page request, and where it goes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the unit has no queue for it, or this plugin does not know it; [`Error::Invalid`] for what a record cannot hold.
    fn encode_page_request(registers: &Registers, request: &PageRequest) -> Result<EventRecord, Error> {
        let _ = (registers, request);
        Err(Error::Unsupported("page requests of this architecture".to_owned()))
    }

    /// The request that `record` is about, which the host's kernel handed out for a vIOMMU of this architecture; none if it is about no request of a device's own.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel has no such vIOMMU, or this plugin does not know its records; [`Error::Invalid`] for a part of a record.
    fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
        let _ = record;
        Err(Error::Unsupported("the kernel's records of this architecture".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Refuses what it reads at 0x1000 if it finds something there, and else what it does not find behind the table.
    struct Refusing;

    impl Unit for Refusing {
        fn lookup(_: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
            let refused = |reason| Blocked::refused("BAD", "section 1", reason);
            if requester.id == 0 {
                return Ok(Outcome::Blocked(refused("a register")));
            }
            if memory.read(0x1000, 8)?[0] == 1 {
                return Ok(Outcome::Blocked(if requester.id == 1 {
                    refused("a bit").at_first(&[0, 0, 6, 1])
                } else {
                    Blocked::unused("NONE", "", "")
                }));
            }
            let failed = memory.read_through(&TableConfig::new("a/b", &[]), 0x2000, 8).is_err();
            Ok(if failed { Outcome::Blocked(refused("unreadable")) } else { Outcome::Bypass })
        }

        fn pasids(_: &Registers, _: u64, _: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
            Ok(Vec::new())
        }

        fn offers(_: u32, _: &[u8]) -> Result<Vec<Offer>, Error> {
            Ok(Vec::new())
        }

        fn bind_data(_: &TableConfig, _: &PlaceToBind) -> Result<Binding, Error> {
            Err(Error::Unsupported("nesting".to_owned()))
        }
    }

    /// One byte, and what was refused: address, word, bits.
    struct Memory(u8, Vec<(u64, u8, u64)>);

    impl GuestMemory for Memory {
        fn read(&mut self, _: u64, _: u32) -> Result<Vec<u8>, Error> {
            Ok(vec![self.0; 8])
        }

        fn read_through(&mut self, _: &TableConfig, address: u64, _: u32) -> Result<Vec<u8>, Error> {
            Err(Error::Unreadable(address))
        }

        fn refuse(&mut self, address: u64, blocked: &Blocked) {
            self.1.push((address, blocked.word, blocked.bits));
        }
    }

    #[test]
    fn what_is_refused_is_the_structure_that_was_read_last() {
        let refused = |id: u64, byte: u8| {
            let mut memory = Memory(byte, Vec::new());
            let outcome = lookup_and_refuse::<Refusing>(&Registers::default(), Requester { id, pasid: None }, &mut memory);
            assert!(matches!(outcome, Ok(Outcome::Blocked(_))));
            memory.1
        };
        assert_eq!(refused(0, 1), [], "no structure was read");
        assert_eq!(refused(1, 1), [(0x1000, 2, 6)]);
        assert_eq!(refused(2, 1), [], "nothing was set up");
        assert_eq!(refused(1, 0), [(0x2000, 0, 0)], "one that cannot be read has no bits");
    }
}
