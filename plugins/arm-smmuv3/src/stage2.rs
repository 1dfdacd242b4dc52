//! `arm-smmuv3/stage2`: stage 2 of VMSAv8-64 as a stream table entry configures it.
//!
//! One range that starts at zero. Its first table may be up to 16 tables side by side, which the start level and the input size decide together. Table
//! descriptors restrict nothing.

use stagecraft_sdk::{Attributes, ByteOrder, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Settings};

use crate::spec::descriptor::stage2 as leaf;
use crate::vmsa::{self, Granule, Hardware, Table};

/// All settings, in the order of the manifest.
pub(crate) const SETTINGS: &[&str] = &[
    "granule",
    "input-bits",
    "output-bits",
    "start-level",
    "root",
    Hardware::NAMES[0],
    Hardware::NAMES[1],
    Hardware::NAMES[2],
    Hardware::NAMES[3],
    "big-endian",
    "lpa",
    "lpa2",
    "force-write-back",
    "non-shareable",
    "protected-walk",
];

/// The setting `start-level` for level -1.
pub(crate) const START_LEVEL_MINUS_ONE: u64 = 255;

/// Concatenation resolves this many more input bits: 16 tables.
const CONCATENATED: u8 = 4;

/// Values of MemAttr\[3:0\] that new leaves get; with and without FWB.
mod memory {
    pub(super) const DEVICE: u64 = 0b0001;
    pub(super) const NON_CACHEABLE: u64 = 0b0101;
    pub(super) const WRITE_BACK: u64 = 0b1111;
    pub(super) const FORCED_WRITE_BACK: u64 = 0b0110;
}

/// Stage 2 tables.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct Stage2 {
    output_bits: u8,
    hardware: Hardware,
    big_endian: bool,
    force_write_back: bool,
    non_shareable: bool,
    protected_walk: bool,
    tables: Vec<Table>,
    root: Root,
}

/// The start level without concatenation, or with as little as the architecture allows: the 16K granule has a level 0 only with LPA2 (DDI 0487 rule
/// DXBSH).
pub(crate) fn default_start(granule: Granule, input_bits: u8, lpa2: bool) -> i8 {
    let start = granule.start(input_bits);
    if granule.log2() == 14 && start == 0 && !lpa2 { 1 } else { start }
}

/// `start-level` for a level.
pub(crate) fn start_level_setting(start: i8) -> u64 {
    u64::try_from(start).unwrap_or(START_LEVEL_MINUS_ONE)
}

fn start_level(settings: &Settings, granule: Granule, input_bits: u8, lpa2: bool) -> Result<(i8, u8), Error> {
    let section = "DDI 0487 section D8.2";
    let default = default_start(granule, input_bits, lpa2);
    let value = settings.one_of("start-level", start_level_setting(default), &[0, 1, 2, 3, START_LEVEL_MINUS_ONE], section)?;
    let start = if value == START_LEVEL_MINUS_ONE { -1 } else { value as i8 };
    let (exists, concatenated) = match (granule.log2(), start) {
        (14, 0) => (lpa2, 0),
        (14 | 16, -1) | (16, 0) => (false, 0),
        // Level -1 of the 4K granule begins where 48 bits end, and nothing wider than 48 bits is there without LPA2.
        _ => (true, CONCATENATED),
    };
    if !exists {
        return Err(Error::invalid("start-level", value, section, "this granule has no such level, or only with lpa2"));
    }
    match granule.first_index_bits(input_bits, start, concatenated) {
        Some(index_bits) => Ok((start, index_bits)),
        None => Err(Error::invalid("start-level", value, section, "1 to 16 tables at this level do not make up the input size")),
    }
}

impl Stage2 {
    fn table(&self, level: u8) -> Option<&Table> {
        self.tables.get(usize::from(level))
    }

    /// Tables D8-96 and D8-101: a MemAttr value, and whether it is reserved. Where stage 1 would decide there is none to ask: write-back, the weakest.
    const fn memory_type(&self, mem_attr: u64) -> (MemoryType, bool) {
        match (self.force_write_back, mem_attr >> 2, mem_attr & 3) {
            (false, 0, _) | (true, 0, _) => (MemoryType::Device, false),
            (true, 2, _) => (MemoryType::Device, true),
            (true, _, 0) => (MemoryType::Device, true),
            (true, _, 1) => (MemoryType::NonCacheable, false),
            (true, _, _) => (MemoryType::WriteBack, false),
            // 0b0100 is write-back without tags where that exists.
            (false, 1, 0) => (MemoryType::WriteBack, true),
            (false, _, 0) => (MemoryType::Device, true),
            (false, 1, _) | (false, _, 1) => (MemoryType::NonCacheable, false),
            (false, _, _) => (MemoryType::WriteBack, false),
        }
    }
}

impl Format for Stage2 {
    const NAME: &'static str = "arm-smmuv3/stage2";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(SETTINGS)?;
        let lpa2 = settings.flag("lpa2", false)?;
        let granule = vmsa::granule(settings, "granule", Granule::K4)?;
        if lpa2 && granule == Granule::K64 {
            return Err(Error::invalid("lpa2", 1, "IHI 0070 section 5.2, S2DS", "has no meaning with the 64K granule"));
        }
        let input_bits = vmsa::input_bits(settings, "input-bits", 48, granule, lpa2)?;
        let output_bits = vmsa::output_bits(settings)?;
        let lpa = vmsa::lpa(settings, output_bits, granule == Granule::K64)?;
        let (start, index_bits) = start_level(settings, granule, input_bits, lpa2)?;
        let address = settings.or("root", 0);
        vmsa::check_root("root", address, index_bits, output_bits, granule, lpa2)?;
        let last = u64::MAX >> (64 - input_bits);
        Ok(Self {
            output_bits,
            hardware: Hardware::open(settings)?,
            big_endian: settings.flag("big-endian", false)?,
            force_write_back: settings.flag("force-write-back", false)?,
            non_shareable: settings.flag("non-shareable", false)?,
            protected_walk: settings.flag("protected-walk", false)?,
            tables: vmsa::tables(granule, start, index_bits, lpa2, lpa),
            root: Root { setting: "root", first: 0, last, ignored: 0, address, level: 0, inherited: 0 },
        })
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let lpa2 = settings.flag("lpa2", false)?;
        settings.set_default("granule", Granule::K4.bytes());
        let granule = vmsa::granule(&settings, "granule", Granule::K4)?;
        settings.set_default("input-bits", need.last_low.map_or(48, |last| granule.suggest_input_bits(last, lpa2)));
        settings.set_default("output-bits", vmsa::suggest_output_bits(need.last_address, granule.widest(lpa2)));
        let input_bits = vmsa::input_bits(&settings, "input-bits", 48, granule, lpa2)?;
        settings.set_default("start-level", start_level_setting(default_start(granule, input_bits, lpa2)));
        Self::open(&settings)?;
        Ok(settings)
    }

    fn candidates() -> Vec<Settings> {
        let shape = |granule, input_bits, start, lpa2| vmsa::Candidate { granule, input_bits, start: Some(start_level_setting(start)), lpa2 };
        let usual = [(4096, 48, 0), (4096, 39, 1), (4096, 40, 1), (16384, 47, 1), (16384, 40, 2), (65536, 48, 1), (65536, 42, 2), (65536, 52, 1)];
        let narrow = [
            (4096, 41, 1),
            (4096, 42, 1),
            (4096, 43, 1),
            (4096, 44, 0),
            (4096, 42, 0),
            (4096, 36, 1),
            (4096, 32, 1),
            (4096, 34, 2),
            (4096, 30, 2),
            (16384, 48, 1),
            (16384, 36, 2),
            (16384, 44, 1),
            (16384, 38, 2),
            (65536, 44, 2),
            (65536, 46, 2),
            (65536, 40, 2),
            (65536, 36, 2),
            (65536, 32, 2),
            (16384, 40, 1),
            (4096, 40, 0),
            (65536, 29, 3),
        ];
        let wide = [(4096, 52, -1), (4096, 52, 0), (4096, 48, 0), (16384, 52, 0), (16384, 48, 1), (16384, 51, 1)];
        vmsa::candidates(
            &usual.map(|(granule, bits, start)| shape(granule, bits, start, false)),
            &narrow.map(|(granule, bits, start)| shape(granule, bits, start, false)),
            &wide.map(|(granule, bits, start)| shape(granule, bits, start, true)),
        )
    }

    fn levels(&self) -> Vec<Level> {
        let dirty = Mark { mask: leaf::WRITE.mask(), value: leaf::WRITE.mask() };
        self.tables.iter().map(|table| table.level(self.hardware, dirty)).collect()
    }

    fn roots(&self) -> Vec<Root> {
        vec![self.root.clone()]
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn byte_order(&self) -> ByteOrder {
        if self.big_endian { ByteOrder::Big } else { ByteOrder::Little }
    }

    /// IHI 0070 section 5.2, S2PTW: any Device type.
    fn no_tables_in(&self) -> &'static [MemoryType] {
        if self.protected_walk { &[MemoryType::Device] } else { &[] }
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        self.table(level).map_or(Kind::Absent, |table| table.kind(pattern))
    }

    fn check(&self, level: u8, kind: Kind, _inherited: u64, pattern: u64, findings: &mut Findings) {
        let Some(table) = self.table(level) else { return };
        if !table.check(kind, self.hardware, pattern, findings) {
            return;
        }
        if kind == Kind::Table {
            let reason = "a stage 2 table descriptor restricts nothing: bits 63:59 are reserved";
            findings.should_be_zero(pattern, stagecraft_sdk::bits::mask(63, 59), "DDI 0487 section D8.3.1.1", reason);
            return;
        }
        vmsa::check_shareability(table.lpa2(), pattern, findings);
        if self.memory_type(leaf::MEM_ATTR.of(pattern)).1 {
            findings.warning(leaf::MEM_ATTR.mask(), "DDI 0487 section D8.6", "the memory attribute is reserved");
        }
    }

    fn next(&self, level: u8, _pattern: u64) -> Next {
        Table::next(level)
    }

    fn leaf_size_log2(&self, level: u8, _pattern: u64) -> u8 {
        self.table(level).map_or(0, Table::leaf_size_log2)
    }

    /// DDI 0487 section D8.4.2.1, tables D8-76 and D8-78: XN\[1\] alone decides for unprivileged requests.
    fn attributes(&self, level: u8, _inherited: u64, pattern: u64) -> Attributes {
        let Some(table) = self.table(level) else { return Attributes::default() };
        let is_set = |field: stagecraft_sdk::bits::Field| field.of(pattern) != 0;
        let clean = self.hardware.dirty && is_set(leaf::DBM) && !is_set(leaf::WRITE);
        let (memory_type, _) = self.memory_type(leaf::MEM_ATTR.of(pattern));
        let shareability = match (table.lpa2(), self.non_shareable) {
            (false, _) => leaf::SH.of(pattern),
            (true, false) => vmsa::INNER,
            (true, true) => vmsa::NON_SHAREABLE,
        };
        Attributes {
            read: is_set(leaf::READ),
            write: is_set(leaf::WRITE) || clean,
            execute: leaf::XN.of(pattern) & 2 == 0,
            privileged_only: false,
            memory_type,
            coherent: vmsa::is_coherent(memory_type, shareability),
            accessed: self.hardware.accessed(pattern),
            dirty: self.hardware.dirty && is_set(leaf::WRITE),
            writable_when_dirty: clean,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, asked: Attributes) -> Option<Encoded> {
        let table = self.table(level)?;
        // Stage 2 does not know privileged data accesses: to drop the restriction would widen.
        if asked.grants_nothing() || asked.privileged_only {
            return None;
        }
        let clean = self.hardware.dirty && asked.write && asked.writable_when_dirty && !asked.dirty;
        let dirty = self.hardware.dirty && asked.write && asked.dirty;
        let mem_attr = match (asked.memory_type, self.force_write_back) {
            (MemoryType::Device, _) => memory::DEVICE,
            (MemoryType::NonCacheable, _) => memory::NON_CACHEABLE,
            (MemoryType::WriteBack, false) => memory::WRITE_BACK,
            (MemoryType::WriteBack, true) => memory::FORCED_WRITE_BACK,
        };
        let mut pattern = table.leaf_type(size_log2)?
            | leaf::MEM_ATTR.put(mem_attr)
            | leaf::READ.put(asked.read.into())
            | leaf::WRITE.put((asked.write && !clean).into())
            | self.hardware.encode_access_flag(asked.accessed)
            | leaf::DBM.put((clean || dirty).into())
            | leaf::XN.put(if asked.execute { 0 } else { 2 });
        if !table.lpa2() {
            pattern |= leaf::SH.put(vmsa::encode_shareability(asked.memory_type, asked.coherent));
        }
        let says = self.attributes(level, 0, pattern);
        let attributes = Attributes {
            accessed: if self.hardware.access { says.accessed } else { asked.accessed },
            dirty: if dirty || clean { says.dirty } else { asked.dirty },
            ..says
        };
        Some(Encoded { pattern, attributes })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        self.table(level)?.encode_table(self.hardware, level, next)
    }
}
