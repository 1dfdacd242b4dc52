//! A small radix format that behaves badly on request: what the engine's limits are tested against.
//!
//! The setting `mode` of a table, and the register `MODE` of the unit, select a [`mode`]. Mode 0 behaves well.

use stagecraft_sdk::bits::{bit, mask};
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{
    Attributes, Binding, Blocked, BlockedDma, Command, Direct, Effect, Encoded, Error, Event, EventRecord, FaultKind, Finding, Findings, Format,
    GuestMemory, InvalidationTarget, Kind, Level, Missing, Need, Next, Note, Offer, Outcome, Place, PlaceToBind, Recipe, Registers, Requester, Root,
    Scope, Segment, Settings, Severity, Shape, TableConfig, Tag, Translated, Unit, Window,
};
use std::cell::Cell;

stagecraft_sdk::export_format! {
    manifest: "../manifest.json",
    unit: Hostile,
    formats: [Radix],
}

/// Roots for which the recipe of [`Unit::bind_data`] makes no sense.
pub mod bad {
    /// Entries without words.
    pub const NO_WORDS: u64 = 0x10_0000;
    /// Entries of different lengths.
    pub const OTHER_LENGTH: u64 = 0x10_1000;
    /// A place in a word that is not there.
    pub const WORD: u64 = 0x10_2000;
    /// A place that leaves its word.
    pub const BITS: u64 = 0x10_3000;
    /// An address without its lowest bits.
    pub const NUMBER: u64 = 0x10_4000;
    /// Pages of 1 TiB.
    pub const PAGE: u64 = 0x10_5000;
    /// No entries at all.
    pub const MOST: u64 = 0x10_6000;
    /// An address without its highest bits.
    pub const SHORT: u64 = 0x10_7000;
}

/// How to behave.
pub mod mode {
    /// Well.
    pub const WELL: u64 = 0;
    /// Panics in `decode`, or in `lookup`.
    pub const PANIC: u64 = 1;
    /// Never returns from `decode`, or from `lookup`.
    pub const LOOP: u64 = 2;
    /// Allocates for ever in `decode`, or in `lookup`.
    pub const BOMB: u64 = 3;
    /// A geometry with 60 index bits.
    pub const NONSENSE_GEOMETRY: u64 = 4;
    /// A geometry with 2,000 roots.
    pub const MANY_ROOTS: u64 = 5;
    /// `decode` answers something else at every call.
    pub const FICKLE: u64 = 6;
    /// A leaf that is writable-when-dirty and not writable.
    pub const NO_MEANING: u64 = 7;
    /// `encode_leaf` grants all that there is.
    pub const WIDEN: u64 = 8;
    /// Recurses without end in `decode`, or in `lookup`.
    pub const RECURSE: u64 = 9;
    /// Logs a million messages in `decode`, and then answers well.
    pub const LOG_FLOOD: u64 = 10;
    /// `explain` answers many reasons that all are the same 1 MiB of memory.
    pub const ALIASED: u64 = 11;
    /// `explain` answers a reason of 4 GiB; `pasids` a list of 4 GiB.
    pub const HUGE: u64 = 12;
    /// Panics in `open`.
    pub const PANIC_IN_OPEN: u64 = 13;
    /// Never returns from `open`.
    pub const LOOP_IN_OPEN: u64 = 14;
    /// A table entry that names level kind 200.
    pub const NO_SUCH_LEVEL: u64 = 15;
    /// `decode_entry` asks for the whole entry.
    pub const WHOLE_AGAIN: u64 = 16;
    /// `decode` reads guest memory, which is not there outside of `detect`, and answers absent if it gets none.
    pub const READS_MEMORY: u64 = 17;
    /// Panics in `decode` with a text of 320 KiB.
    pub const LONG_PANIC: u64 = 18;
    /// `lookup` answers a format that the manifest does not name.
    pub const FOREIGN_FORMAT: u64 = 19;
    /// `lookup` and `open` say that something is unsupported.
    pub const UNSUPPORTED: u64 = 20;
    /// `lookup` reads guest memory until none is given, and answers `blocked`.
    pub const READS_FOR_EVER: u64 = 21;
    /// `lookup` reads `ROOT` through a table at `EXTRA1`.
    pub const READ_THROUGH: u64 = 22;
    /// `lookup` wants 1 MiB at once.
    pub const READS_TOO_MUCH: u64 = 23;
    /// `pasids` answers 100,000 of them.
    pub const MANY_PASIDS: u64 = 24;
    /// `lookup` answers three tables.
    pub const THREE_TABLES: u64 = 25;
    /// `lookup` answers no table.
    pub const NO_TABLES: u64 = 26;
    /// `lookup` answers two windows that overlap.
    pub const OVERLAPPING_WINDOWS: u64 = 27;
    /// `lookup` answers the device's memory at an offset, which is `EXTRA1`.
    pub const DIRECT: u64 = 28;
    /// Leaves lack more bytes than they have.
    pub const NOTHING_LEFT: u64 = 29;
    /// Leaves lack their first 16 bytes, and their last 256.
    pub const PARTS: u64 = 30;
    /// `decode_commands` answers items in the wrong order.
    pub const WRONG_ORDER: u64 = 31;
    /// `encode_event` answers 100,000 bytes.
    pub const LONG_RECORD: u64 = 32;
    /// `lookup` notes 10,000 times the same 1 KiB and a bit, after a note of no bits; `pasids` notes something, too.
    pub const NOTE_FLOOD: u64 = 33;
    /// `lookup` notes one thing as an error, with a text of 64 KiB.
    pub const NOTE: u64 = 34;
    /// An instance panics at its fourth `decode`.
    pub const WEARS_OUT: u64 = 35;
    /// Panics in `encode_leaf` of what may be executed, in `decode` of patterns with bit 9, in `lookup` where the word has bit 9, and in `decode_commands` of the byte 0xde.
    pub const ALLERGIC: u64 = 36;
}

/// Which version of this plugin: what tests change in the built file.
pub mod version {
    /// In front of the version, one byte.
    pub const MARK: &[u8; 15] = b"hostile version";
    /// The first one.
    pub const FIRST: u8 = b'0';
    /// Says of a leaf with bit 10 that it cannot be written.
    pub const DECODES_OTHERWISE: u8 = b'1';
    /// Makes leaves of 2 MiB with bit 10 set.
    pub const ENCODES_OTHERWISE: u8 = b'2';
    /// Has output addresses of 50 bits.
    pub const OTHER_GEOMETRY: u8 = b'3';
    /// Calls a device without a word unused, not refused.
    pub const LOOKS_UP_OTHERWISE: u8 = b'4';
    /// Panics in `open`.
    pub const PANICS: u8 = b'5';
}

/// The version, where it can be found and changed.
static VERSION: [u8; 16] = *b"hostile version0";

fn is_version(version: u8) -> bool {
    std::hint::black_box(&VERSION)[15] == version
}

const PRESENT: u64 = bit(0);
const WRITE: u64 = bit(1);
const LEAF: u64 = bit(2);
const WHOLE: u64 = bit(3);
const ADDRESS: (u8, u8) = (51, 12);
const RESERVED: u64 = mask(63, 52);
const ALLERGEN: u64 = bit(9);

/// Three levels of 512 entries; bit 0 present, bit 1 writable, bit 2 leaf, bit 3 "look at the whole entry".
#[derive(Debug)]
pub struct Radix {
    root: Option<u64>,
    mode: u64,
    calls: Cell<u64>,
}

impl Radix {
    fn misbehave(&self, pattern: u64) {
        match self.mode {
            mode::PANIC => panic!("told to panic at pattern {pattern:#x}"),
            mode::LOOP => spin(),
            mode::BOMB => explode(),
            mode::RECURSE => {
                std::hint::black_box(recurse(pattern));
            }
            mode::LONG_PANIC => panic!("{}", "long ".repeat(1 << 16)),
            mode::LOG_FLOOD => flood(),
            mode::WEARS_OUT if self.calls.get() > 3 => panic!("worn out"),
            mode::ALLERGIC if pattern & ALLERGEN != 0 => panic!("told to panic at pattern {pattern:#x}"),
            _ => {}
        }
    }
}

fn spin() {
    loop {
        std::hint::black_box(0);
    }
}

fn explode() {
    let mut held: Vec<Vec<u8>> = Vec::new();
    loop {
        held.push(vec![0x55; 1 << 20]);
        std::hint::black_box(&held);
    }
}

fn recurse(depth: u64) -> u64 {
    if depth == u64::MAX { 0 } else { std::hint::black_box(recurse(std::hint::black_box(depth + 1))) + 1 }
}

#[cfg(target_arch = "wasm32")]
fn flood() {
    use stagecraft_sdk::export::log;
    for n in 0..100_000 {
        log::write(log::Level::Info, &format!("message {n}"));
    }
}

#[cfg(not(target_arch = "wasm32"))]
fn flood() {}

/// A list that claims `length` elements, whatever is there.
fn claim<T>(length: usize) -> Vec<T> {
    // SAFETY: none. This lies to the host on purpose; the sandbox is what is under test, and nothing here reads the list.
    unsafe { Vec::from_raw_parts(std::ptr::dangling_mut::<T>().wrapping_add(16), length, length) }
}

impl Format for Radix {
    const NAME: &'static str = "hostile/radix";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(&["root", "mode"])?;
        let format = Self { root: settings.get("root"), mode: settings.or("mode", 0), calls: Cell::new(0) };
        match format.mode {
            mode::PANIC_IN_OPEN => panic!("told to panic in open"),
            _ if is_version(version::PANICS) => panic!("this version panics in open"),
            mode::LOOP_IN_OPEN => spin(),
            mode::UNSUPPORTED => return Err(Error::Unsupported("told not to support this".to_owned())),
            _ => {}
        }
        if let Some(root) = format.root.filter(|root| !root.is_multiple_of(4096)) {
            return Err(Error::invalid("root", root, "hostile section 1", "not aligned to 4,096"));
        }
        Ok(format)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        if need.last_low.is_some_and(|last| last >> 39 != 0) {
            return Err(Error::Unsupported("an IOVA of more than 39 bits".to_owned()));
        }
        let mut settings = settings.clone();
        settings.set_default("mode", 0);
        Ok(settings)
    }

    fn levels(&self) -> Vec<Level> {
        let level = |kind: u8| Level {
            number: 2 - kind.cast_signed(),
            index_lsb: 30 - 9 * kind,
            index_bits: if self.mode == mode::NONSENSE_GEOMETRY { 60 } else { 9 },
            shapes: vec![Shape { mask: PRESENT, value: PRESENT, address: vec![Segment::in_place(ADDRESS.0, ADDRESS.1)] }],
            leaf_sizes: 1 << (30 - 9 * kind),
            ..Level::default()
        };
        (0..3).map(level).collect()
    }

    fn roots(&self) -> Vec<Root> {
        let root = Root { setting: "root", first: 0, last: (1 << 39) - 1, address: self.root.unwrap_or(0), ..Root::default() };
        let count = match (self.mode, self.root) {
            (mode::MANY_ROOTS, _) => 2_000,
            (_, None) => 0,
            _ => 1,
        };
        vec![root; count]
    }

    fn output_bits(&self) -> u8 {
        if is_version(version::OTHER_GEOMETRY) { 50 } else { 52 }
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        self.calls.set(self.calls.get() + 1);
        self.misbehave(pattern);
        if self.mode == mode::FICKLE && self.calls.get().is_multiple_of(2) || pattern & PRESENT == 0 {
            Kind::Absent
        } else if level == 2 || pattern & LEAF != 0 {
            Kind::Leaf
        } else {
            Kind::Table
        }
    }

    fn check(&self, _: u8, _: Kind, _: u64, pattern: u64, findings: &mut Findings) {
        if self.mode == mode::READS_MEMORY && read_anything() {
            findings.error(FaultKind::Configuration, 0, "", "read guest memory outside of detect");
        }
        findings.reserved(pattern, RESERVED, "hostile section 2", "reserved bits are set");
    }

    fn next(&self, level: u8, _: u64) -> Next {
        if self.mode == mode::NO_SUCH_LEVEL { Next::whole(200) } else { Next::whole(level + 1) }
    }

    fn inherit(&self, _: u8, inherited: u64, pattern: u64) -> u64 {
        inherited | u64::from(pattern & WRITE == 0)
    }

    fn leaf_size_log2(&self, level: u8, _: u64) -> u8 {
        30 - 9 * level
    }

    fn missing(&self, _: u8, _: u64) -> Option<Missing> {
        match self.mode {
            mode::NOTHING_LEFT => Some(Missing { front: 0x800, back: 0x800 }),
            mode::PARTS => Some(Missing { front: 16, back: 256 }),
            _ => None,
        }
    }

    fn attributes(&self, _: u8, inherited: u64, pattern: u64) -> Attributes {
        let differs = is_version(version::DECODES_OTHERWISE) && pattern & bit(10) != 0;
        let write = pattern & WRITE != 0 && inherited & 1 == 0 && !differs;
        Attributes {
            read: true,
            write: write && self.mode != mode::NO_MEANING,
            coherent: true,
            writable_when_dirty: self.mode == mode::NO_MEANING,
            ..Attributes::default()
        }
    }

    fn needs_whole_entry(&self, _: u8, pattern: u64) -> bool {
        pattern & WHOLE != 0
    }

    fn decode_entry(&self, level: u8, inherited: u64, entry: u64) -> stagecraft_sdk::Meaning {
        if self.mode == mode::WHOLE_AGAIN {
            return stagecraft_sdk::Meaning::WholeEntry;
        }
        // Bit 12 of the address doubles the leaf.
        let size_log2 = self.leaf_size_log2(level, entry) + u8::from(entry & bit(12) != 0);
        stagecraft_sdk::Meaning::Leaf { size_log2, attributes: self.attributes(level, inherited, entry) }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, attributes: Attributes) -> Option<Encoded> {
        assert!(self.mode != mode::ALLERGIC || !attributes.execute, "told to panic at a leaf that may be executed");
        if size_log2 != 30 - 9 * level || !attributes.read {
            return None;
        }
        let wide = self.mode == mode::WIDEN;
        let write = attributes.write || wide;
        let granted = Attributes { read: true, write, execute: wide, coherent: true, ..Attributes::default() };
        let differs = if is_version(version::ENCODES_OTHERWISE) && level == 1 { bit(10) } else { 0 };
        Some(Encoded { pattern: PRESENT | LEAF | differs | if write { WRITE } else { 0 }, attributes: granted })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        (level < 2 && next == level + 1).then_some(PRESENT | WRITE)
    }

    fn explain(&self, level: u8, inherited: u64, pattern: u64) -> Vec<Finding> {
        let finding = |reason| Finding { severity: Severity::Info, kind: FaultKind::Reserved, bits: 0, section: "", reason };
        match self.mode {
            mode::ALIASED => {
                let text = "x".repeat(1 << 20).leak();
                let mut findings = Vec::with_capacity(10_000);
                for _ in 0..10_000 {
                    // SAFETY: none; see `claim`. All strings are the same memory, which only the host reads.
                    findings.push(finding(unsafe { String::from_raw_parts(text.as_mut_ptr(), 1 << 20, 1 << 20) }));
                }
                findings
            }
            mode::HUGE => {
                // SAFETY: none; as above.
                vec![finding(unsafe { String::from_raw_parts(claim::<u8>(0).as_mut_ptr(), usize::MAX >> 1, usize::MAX >> 1) })]
            }
            _ => {
                let mut findings = Findings::default();
                self.check(level, self.kind(level, pattern), inherited, pattern, &mut findings);
                findings.into_vec()
            }
        }
    }
}

#[cfg(target_arch = "wasm32")]
fn read_anything() -> bool {
    stagecraft_sdk::export::Imported.read(0, 8).is_ok()
}

#[cfg(not(target_arch = "wasm32"))]
fn read_anything() -> bool {
    false
}

/// A unit whose structures are words from `ROOT` on, one for each device: 0 blocked, 1 bypass, anything else the root of a [`Radix`], whose mode is in `EXTRA2`.
#[derive(Debug)]
pub struct Hostile;

impl Unit for Hostile {
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        let root = registers.need("ROOT")?;
        let table = |root| match registers.get("EXTRA2") {
            Some(mode) => TableConfig::new(Radix::NAME, &[("root", root), ("mode", mode)]),
            None => TableConfig::new(Radix::NAME, &[("root", root)]),
        };
        let tables = |tables| Ok(Outcome::Tables(Translated::new(tables, Tag::default())));
        match registers.get("MODE").unwrap_or(0) {
            mode::PANIC => panic!("told to panic for device {:#x}", requester.id),
            mode::LOOP => spin(),
            mode::BOMB => explode(),
            mode::RECURSE => {
                std::hint::black_box(recurse(requester.id));
            }
            mode::LOG_FLOOD => flood(),
            mode::NOTE_FLOOD => {
                memory.note(note(Severity::Warning, 0));
                (0..10_000).for_each(|_| memory.note(note(Severity::Info, bit(7))));
            }
            mode::NOTE => memory.note(note(Severity::Error, bit(7))),
            mode::UNSUPPORTED => return Err(Error::Unsupported("told not to support this".to_owned())),
            mode::FOREIGN_FORMAT => return tables(vec![TableConfig::new("other/format", &[])]),
            mode::THREE_TABLES => return tables(vec![table(0), table(0), table(0)]),
            mode::NO_TABLES => return tables(Vec::new()),
            mode::OVERLAPPING_WINDOWS => return Ok(Outcome::Direct(Direct { windows: vec![window(0); 2], intercepts: Vec::new() })),
            mode::DIRECT => {
                let windows = vec![window(registers.need("EXTRA1")?)];
                return Ok(Outcome::Direct(Direct { windows, intercepts: Vec::new() }));
            }
            mode::READS_FOR_EVER => while memory.read(root, 4096).is_ok() {},
            mode::READS_TOO_MUCH => {
                memory.read(root, 1 << 20)?;
            }
            mode::READ_THROUGH => {
                let word = memory.read_through(&table(registers.need("EXTRA1")?), root, 8)?;
                return tables(vec![table(word_of(&word)?)]);
            }
            _ => {}
        }
        match word_of(&memory.read(root + 8 * requester.id, 8)?)? {
            0 if is_version(version::LOOKS_UP_OTHERWISE) => {
                Ok(Outcome::Blocked(Blocked::unused("H_BLOCKED", "hostile section 3", "the word is zero")))
            }
            word if word & ALLERGEN != 0 && registers.get("MODE") == Some(mode::ALLERGIC) => panic!("told to panic at word {word:#x}"),
            0 => Ok(Outcome::Blocked(Blocked::refused("H_BLOCKED", "hostile section 3", "the word is zero"))),
            1 => Ok(Outcome::Bypass),
            root => tables(vec![table(root)]),
        }
    }

    fn pasids(registers: &Registers, _: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        match registers.get("MODE").unwrap_or(0) {
            mode::NOTE_FLOOD => {
                memory.note(note(Severity::Warning, bit(7)));
                Ok(vec![1])
            }
            mode::HUGE => Ok(claim((usize::MAX >> 2) - 4)),
            mode::MANY_PASIDS => Ok((0..100_000).collect()),
            mode::FICKLE => Ok(vec![3, 2]),
            _ => Ok(vec![1, 2, 3]),
        }
    }

    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
        if kind != 7 {
            return Err(Error::Unsupported(format!("hardware information of kind {kind}")));
        }
        let width = info.first().ok_or_else(|| Error::invalid("info", 0, "", "no bytes"))?;
        Ok(vec![Offer { format: Radix::NAME.to_owned(), limits: vec![("width".to_owned(), u64::from(*width))], conditions: Vec::new() }])
    }

    /// A command is one byte: 0 nothing, 1 everything, 0xff illegal; any other a range of so many pages.
    fn decode_commands(registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        let decode = |command: u8| match command {
            0 => Effect::Nothing,
            1 => Effect::Everything,
            0xff => Effect::Illegal(7),
            pages => Effect::Range(Scope::ALL.domain(3).range(0, (u64::from(pages) << 12) - 1)),
        };
        let mut all: Vec<Command> = (0..).zip(commands).map(|(index, command)| Command { index, effect: decode(*command) }).collect();
        match registers.get("MODE").unwrap_or(0) {
            mode::PANIC => panic!("told to panic for {} commands", commands.len()),
            mode::ALLERGIC if commands.contains(&0xde) => panic!("told to panic for {} commands", commands.len()),
            mode::LOOP => spin(),
            mode::BOMB => explode(),
            mode::WRONG_ORDER => all.reverse(),
            mode::NO_MEANING => all.push(Command { index: u16::MAX, effect: Effect::Nothing }),
            _ => {}
        }
        Ok(all)
    }

    fn encode_event(registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        match registers.get("MODE").unwrap_or(0) {
            mode::LONG_RECORD => Ok(EventRecord { queue: "log".to_owned(), bytes: vec![0; 100_000] }),
            mode::UNSUPPORTED => Err(Error::Unsupported("told not to support this".to_owned())),
            _ => Ok(EventRecord::of_words(
                "log",
                &[event.id, event.iova, u64::from(event.pasid.unwrap_or(0)), event.format.as_ref().map_or(0, String::len) as u64],
            )),
        }
    }

    /// The first byte says what becomes of it: nothing, a request, one with a PASID of 21 bits, an end.
    fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
        let request = BlockedDma { id: 0x38, pasid: Some(0xf_ffff), iova: 0x1234_5678, access: Access::Execute, privileged: true };
        match record.first() {
            Some(0) => Ok(None),
            Some(1) => Ok(Some(request)),
            Some(2) => Ok(Some(BlockedDma { pasid: Some(0x10_0000), ..request })),
            Some(3) => panic!("told to panic for a record of {} bytes", record.len()),
            _ => Err(Error::invalid("record", record.len() as u64, "", "nothing")),
        }
    }

    fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
        let root = table.settings.get("root").ok_or_else(|| Error::invalid("root", 0, "", "missing"))?;
        let context = to.context_address.to_le_bytes().to_vec();
        let page = Place { word: 0, lsb: 12, width: 52, number_lsb: 12 };
        let good = Recipe {
            data_type: 9,
            target: InvalidationTarget::Viommu,
            page_log2: 12,
            page: vec![to.space.into(), 0],
            address: page,
            range: None,
            leaf: vec![0, 1],
            tables: None,
            everything: vec![to.space.into(), 2],
            most: 4,
        };
        // The root says what is wrong with the recipe.
        let recipe = match root {
            bad::NO_WORDS => Recipe { page: Vec::new(), ..good },
            bad::OTHER_LENGTH => Recipe { everything: vec![0; 3], ..good },
            bad::WORD => Recipe { address: Place { word: 2, ..page }, ..good },
            bad::BITS => Recipe { address: Place { lsb: 13, ..page }, ..good },
            bad::NUMBER => Recipe { address: Place { lsb: 0, number_lsb: 13, ..page }, ..good },
            bad::PAGE => Recipe { page_log2: 40, ..good },
            bad::MOST => Recipe { most: 0, ..good },
            bad::SHORT => Recipe { address: Place { width: 20, ..page }, ..good },
            _ => good,
        };
        Ok(Binding { kind: 7, data: root.to_le_bytes().to_vec(), context, viommu: Some(8), pasids: true, invalidation: Some(recipe) })
    }
}

fn note(severity: Severity, bits: u64) -> Note {
    const REASON: &str = match std::str::from_utf8(&[b'x'; 1 << 16]) {
        Ok(text) => text,
        Err(_) => "",
    };
    Note { severity, address: 0x1000, word: 3, bits, section: "hostile \u{1b}[31m section 4", reason: if bits == 0 { "" } else { REASON } }
}

/// Addresses below 2^32, which go to memory at an offset.
fn window(address: u64) -> Window {
    let attributes = Attributes { read: true, ..Attributes::default() };
    Window { first: 0, last: 0xffff_ffff, address, attributes }
}

fn word_of(bytes: &[u8]) -> Result<u64, Error> {
    let bytes = bytes.try_into().map_err(|_| Error::Unsupported("a short read".to_owned()))?;
    Ok(u64::from_le_bytes(bytes))
}
