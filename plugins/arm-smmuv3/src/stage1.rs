//! `arm-smmuv3/stage1`: stage 1 of VMSAv8-64 as a context descriptor configures it.
//!
//! Two ranges: the low one (TTB0) starts at zero, the high one (TTB1) ends at the last address. Each has its own chain of tables, so that a table's
//! kind also says which range it belongs to; chains that are equal in all respects are shared.

use stagecraft_sdk::{Attributes, ByteOrder, Encoded, Error, Findings, Format, Kind, Level, Mark, MemoryType, Need, Next, Root, Settings};

use crate::spec::descriptor::{stage1 as leaf, table};
use crate::vmsa::{self, Granule, Hardware, Table};

/// The default of `mair`, which is what Linux writes: 0 non-cacheable, 1 write-back, 2 device, 3 outer write-back only; the rest write-back.
pub(crate) const LINUX_MAIR: u64 = 0xffff_ffff_f404_ff44;

/// All settings, in the order of the manifest.
pub(crate) const SETTINGS: &[&str] = &[
    "granule",
    "input-bits",
    "output-bits",
    "root",
    "granule-high",
    "input-bits-high",
    "root-high",
    "mair",
    "low-disabled",
    "tbi",
    "tbi-high",
    "hierarchy-disabled",
    "hierarchy-disabled-high",
    "unprivileged-disabled",
    "unprivileged-disabled-high",
    "non-shareable",
    "non-shareable-high",
    Hardware::NAMES[0],
    Hardware::NAMES[1],
    Hardware::NAMES[2],
    Hardware::NAMES[3],
    "big-endian",
    "lpa",
    "lpa2",
    "privileged",
    "single-privilege",
    "wxn",
    "pan",
];

/// A restriction from a table above: the bits of the inherited word.
mod inherited {
    pub(super) const PRIVILEGED_ONLY: u64 = 1;
    pub(super) const READ_ONLY: u64 = 2;
    pub(super) const UXN: u64 = 4;
    pub(super) const PXN: u64 = 8;
}

/// One of the two ranges.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(clippy::struct_excessive_bools)]
pub(crate) struct Range {
    pub(crate) granule: Granule,
    pub(crate) input_bits: u8,
    pub(crate) root: u64,
    pub(crate) top_byte_ignored: bool,
    pub(crate) hierarchy_disabled: bool,
    pub(crate) unprivileged_disabled: bool,
    pub(crate) non_shareable: bool,
}

/// What a chain of tables is made from: one range without its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    table: Table,
    hierarchy_disabled: bool,
    unprivileged_disabled: bool,
    non_shareable: bool,
}

/// Stage 1 tables.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools)]
pub struct Stage1 {
    pub(crate) low: Option<Range>,
    pub(crate) high: Option<Range>,
    pub(crate) output_bits: u8,
    pub(crate) mair: u64,
    pub(crate) hardware: Hardware,
    pub(crate) big_endian: bool,
    pub(crate) lpa: bool,
    pub(crate) lpa2: bool,
    pub(crate) privileged: bool,
    pub(crate) single_privilege: bool,
    pub(crate) wxn: bool,
    pub(crate) pan: bool,
    places: Vec<Place>,
    roots: Vec<Root>,
}

/// Names of the settings of one range.
struct RangeNames {
    root: &'static str,
    top_byte_ignored: &'static str,
    hierarchy_disabled: &'static str,
    unprivileged_disabled: &'static str,
    non_shareable: &'static str,
}

const LOW: RangeNames = RangeNames {
    root: "root",
    top_byte_ignored: "tbi",
    hierarchy_disabled: "hierarchy-disabled",
    unprivileged_disabled: "unprivileged-disabled",
    non_shareable: "non-shareable",
};
const HIGH: RangeNames = RangeNames {
    root: "root-high",
    top_byte_ignored: "tbi-high",
    hierarchy_disabled: "hierarchy-disabled-high",
    unprivileged_disabled: "unprivileged-disabled-high",
    non_shareable: "non-shareable-high",
};

impl RangeNames {
    fn open(&self, settings: &Settings, granule: Granule, input_bits: u8) -> Result<Range, Error> {
        Ok(Range {
            granule,
            input_bits,
            root: settings.or(self.root, 0),
            top_byte_ignored: settings.flag(self.top_byte_ignored, false)?,
            hierarchy_disabled: settings.flag(self.hierarchy_disabled, false)?,
            unprivileged_disabled: settings.flag(self.unprivileged_disabled, false)?,
            non_shareable: settings.flag(self.non_shareable, false)?,
        })
    }

    /// Refuses settings of a range that is not there.
    fn refuse(&self, settings: &Settings, reason: &str) -> Result<(), Error> {
        for name in [self.top_byte_ignored, self.hierarchy_disabled, self.unprivileged_disabled, self.non_shareable] {
            if let Some(value) = settings.get(name) {
                return Err(Error::invalid(name, value, "", reason));
            }
        }
        Ok(())
    }
}

impl Stage1 {
    /// The high range, if a setting asks for it.
    fn open_high(settings: &Settings, low_granule: Granule, low_bits: u8, lpa2: bool) -> Result<Option<Range>, Error> {
        if settings.get("root-high").is_none() && settings.get("input-bits-high").is_none() {
            if let Some(value) = settings.get("granule-high") {
                return Err(Error::invalid("granule-high", value, "", "there is no high range without input-bits-high or root-high"));
            }
            HIGH.refuse(settings, "there is no high range without input-bits-high or root-high")?;
            return Ok(None);
        }
        let granule = vmsa::granule(settings, "granule-high", low_granule)?;
        let input_bits = vmsa::input_bits(settings, "input-bits-high", low_bits, granule, lpa2)?;
        HIGH.open(settings, granule, input_bits).map(Some)
    }

    /// Makes the tables and the root of one range.
    fn add(&mut self, names: &RangeNames, range: Range, first: u64, last: u64) -> Result<(), Error> {
        let start = range.granule.start(range.input_bits);
        let Some(index_bits) = range.granule.first_index_bits(range.input_bits, start, 0) else {
            return Err(Error::invalid("input-bits", range.input_bits.into(), "DDI 0487 section D8.2", "no table can hold this"));
        };
        vmsa::check_root(names.root, range.root, index_bits, self.output_bits, range.granule, self.lpa2)?;
        let chain: Vec<Place> = vmsa::tables(range.granule, start, index_bits, self.lpa2, self.lpa)
            .into_iter()
            .map(|table| Place {
                table,
                hierarchy_disabled: range.hierarchy_disabled,
                unprivileged_disabled: range.unprivileged_disabled,
                non_shareable: range.non_shareable,
            })
            .collect();
        let mut level = 0;
        if self.places != chain {
            level = self.places.len() as u8;
            self.places.extend(chain);
        }
        let ignored = if range.top_byte_ignored { 0xff << 56 } else { 0 };
        self.roots.push(Root { setting: names.root, first, last, ignored, address: range.root, level, inherited: 0 });
        Ok(())
    }

    fn place(&self, level: u8) -> Option<&Place> {
        self.places.get(usize::from(level))
    }

    fn has_lpa2_range(&self) -> bool {
        [self.low, self.high].iter().flatten().any(|range| range.granule != Granule::K64)
    }

    /// The MAIR byte that a leaf selects.
    const fn memory_attribute(&self, pattern: u64) -> u8 {
        (self.mair >> (8 * leaf::ATTR_INDEX.of(pattern))) as u8
    }

    /// The index of an attribute byte for `memory_type`, and what it really is. Memory that cannot be cached is never made cacheable.
    fn attribute_index(&self, memory_type: MemoryType) -> Option<(u64, MemoryType)> {
        let (usual, other) = match memory_type {
            MemoryType::WriteBack => (0xff, MemoryType::NonCacheable),
            MemoryType::NonCacheable => (0x44, MemoryType::Device),
            MemoryType::Device => (0x04, MemoryType::NonCacheable),
        };
        let bytes = self.mair.to_le_bytes();
        let find = |wanted| bytes.iter().position(|&byte| memory_type_of(byte) == wanted);
        let index = bytes.iter().position(|&byte| byte == usual).or_else(|| find(memory_type));
        match index {
            Some(index) => Some((index as u64, memory_type)),
            None => find(other).map(|index| (index as u64, other)),
        }
    }
}

/// MAIR byte to memory type: device, non-cacheable at either level, or cached (write-through counts as write-back). Reserved bytes as IHI 0070 section
/// 5.4 (MAIR0) says: `0000xxxx` is device, `xxxx0000` inner write-through.
const fn memory_type_of(byte: u8) -> MemoryType {
    match (byte >> 4, byte & 15) {
        (0, _) => MemoryType::Device,
        (0b0100, _) | (_, 0b0100) => MemoryType::NonCacheable,
        _ => MemoryType::WriteBack,
    }
}

impl Format for Stage1 {
    const NAME: &'static str = "arm-smmuv3/stage1";

    fn open(settings: &Settings) -> Result<Self, Error> {
        settings.only(SETTINGS)?;
        let lpa2 = settings.flag("lpa2", false)?;
        let granule = vmsa::granule(settings, "granule", Granule::K4)?;
        let input_bits = vmsa::input_bits(settings, "input-bits", 48, granule, lpa2)?;
        let low_disabled = settings.flag("low-disabled", false)?;
        let low = if low_disabled {
            if let Some(root) = settings.get("root") {
                return Err(Error::invalid("root", root, "IHI 0070 section 5.4, EPD0", "the low range is disabled"));
            }
            LOW.refuse(settings, "the low range is disabled")?;
            None
        } else {
            Some(LOW.open(settings, granule, input_bits)?)
        };
        let high = Self::open_high(settings, granule, input_bits, lpa2)?;
        let output_bits = vmsa::output_bits(settings)?;
        let wide = [&low, &high].into_iter().flatten().any(|range| range.granule == Granule::K64);
        let mut this = Self {
            low,
            high,
            output_bits,
            mair: settings.or("mair", LINUX_MAIR),
            hardware: Hardware::open(settings)?,
            big_endian: settings.flag("big-endian", false)?,
            lpa: vmsa::lpa(settings, output_bits, wide)?,
            lpa2,
            privileged: settings.flag("privileged", false)?,
            single_privilege: settings.flag("single-privilege", false)?,
            wxn: settings.flag("wxn", false)?,
            pan: settings.flag("pan", false)?,
            places: Vec::new(),
            roots: Vec::new(),
        };
        if low.is_none() && high.is_none() {
            return Err(Error::invalid("low-disabled", 1, "IHI 0070 section 5.4, EPD0", "no range is left"));
        }
        if this.single_privilege && (high.is_some() || low_disabled) {
            let reason = "with one privilege level there is the low range, and nothing else";
            return Err(Error::invalid("single-privilege", 1, "IHI 0070 section 5.4.1", reason));
        }
        if lpa2 && !this.has_lpa2_range() {
            return Err(Error::invalid("lpa2", 1, "IHI 0070 section 5.4, DS", "has no meaning with the 64K granule alone"));
        }
        if let Some(range) = low {
            this.add(&LOW, range, 0, u64::MAX >> (64 - range.input_bits))?;
        }
        if let Some(range) = high {
            this.add(&HIGH, range, u64::MAX << range.input_bits, u64::MAX)?;
        }
        Ok(this)
    }

    fn suggest(settings: &Settings, need: &Need) -> Result<Settings, Error> {
        let mut settings = settings.clone();
        let lpa2 = settings.flag("lpa2", false)?;
        settings.set_default("granule", Granule::K4.bytes());
        let granule = vmsa::granule(&settings, "granule", Granule::K4)?;
        settings.set_default("input-bits", need.last_low.map_or(48, |last| granule.suggest_input_bits(last, lpa2)));
        settings.set_default("output-bits", vmsa::suggest_output_bits(need.last_address, granule.widest(lpa2)));
        if let Some(first) = need.first_high {
            settings.set_default("granule-high", granule.bytes());
            let granule = vmsa::granule(&settings, "granule-high", granule)?;
            settings.set_default("input-bits-high", granule.suggest_input_bits(!first, lpa2));
        }
        Self::open(&settings)?;
        Ok(settings)
    }

    /// A table of the high range looks like one of the low range: the low one stands for both.
    fn candidates() -> Vec<Settings> {
        let shape = |granule, input_bits, lpa2| vmsa::Candidate { granule, input_bits, start: None, lpa2 };
        let usual = [(4096, 48), (4096, 39), (16384, 48), (16384, 47), (65536, 48), (65536, 42), (16384, 36), (65536, 52)];
        let narrow = [
            (4096, 44),
            (4096, 42),
            (4096, 40),
            (4096, 36),
            (4096, 32),
            (4096, 30),
            (16384, 44),
            (16384, 40),
            (65536, 40),
            (65536, 36),
            (65536, 32),
            (16384, 32),
            (4096, 34),
            (65536, 39),
            (65536, 38),
            (16384, 45),
            (16384, 34),
            (65536, 29),
        ];
        let wide = [(4096, 52), (4096, 48), (16384, 52), (16384, 48), (4096, 39), (16384, 47)];
        vmsa::candidates(
            &usual.map(|(granule, bits)| shape(granule, bits, false)),
            &narrow.map(|(granule, bits)| shape(granule, bits, false)),
            &wide.map(|(granule, bits)| shape(granule, bits, true)),
        )
    }

    fn levels(&self) -> Vec<Level> {
        let dirty = Mark { mask: leaf::READ_ONLY.mask(), value: 0 };
        self.places.iter().map(|place| place.table.level(self.hardware, dirty)).collect()
    }

    fn roots(&self) -> Vec<Root> {
        self.roots.clone()
    }

    fn output_bits(&self) -> u8 {
        self.output_bits
    }

    fn byte_order(&self) -> ByteOrder {
        if self.big_endian { ByteOrder::Big } else { ByteOrder::Little }
    }

    fn privileged(&self) -> bool {
        self.privileged || self.single_privilege
    }

    fn kind(&self, level: u8, pattern: u64) -> Kind {
        self.place(level).map_or(Kind::Absent, |place| place.table.kind(pattern))
    }

    fn check(&self, level: u8, kind: Kind, _inherited: u64, pattern: u64, findings: &mut Findings) {
        let Some(place) = self.place(level) else { return };
        if !place.table.check(kind, self.hardware, pattern, findings) || kind != Kind::Leaf {
            return;
        }
        vmsa::check_shareability(place.table.lpa2(), pattern, findings);
        let byte = self.memory_attribute(pattern);
        if (byte >> 4 == 0 && byte & 3 != 0) || (byte >> 4 != 0 && byte & 15 == 0) {
            let reason = "selects a MAIR byte with a reserved value";
            findings.warning(leaf::ATTR_INDEX.mask(), "IHI 0070 section 5.4, MAIR0", reason);
        }
    }

    fn next(&self, level: u8, _pattern: u64) -> Next {
        Table::next(level)
    }

    fn inherit(&self, level: u8, inherited: u64, pattern: u64) -> u64 {
        if self.place(level).is_none_or(|place| place.hierarchy_disabled) {
            return inherited;
        }
        let mut restrictions = vec![(table::READ_ONLY, inherited::READ_ONLY), (table::UXN_TABLE, inherited::UXN)];
        if !self.single_privilege {
            restrictions.extend([(table::PRIVILEGED_ONLY, inherited::PRIVILEGED_ONLY), (table::PXN_TABLE, inherited::PXN)]);
        }
        restrictions.iter().filter(|(field, _)| field.of(pattern) != 0).fold(inherited, |word, (_, bit)| word | bit)
    }

    fn leaf_size_log2(&self, level: u8, _pattern: u64) -> u8 {
        self.place(level).map_or(0, |place| place.table.leaf_size_log2())
    }

    /// DDI 0487 section D8.4.1.2, tables D8-63 to D8-66.
    fn attributes(&self, level: u8, inherited: u64, pattern: u64) -> Attributes {
        let Some(place) = self.place(level) else { return Attributes::default() };
        let is_set = |field: stagecraft_sdk::bits::Field| field.of(pattern) != 0;
        let restricted = |bit: u64| inherited & bit != 0;

        let read_only_above = restricted(inherited::READ_ONLY);
        let clean = self.hardware.dirty && is_set(leaf::DBM) && is_set(leaf::READ_ONLY) && !read_only_above;
        let writable = clean || (!is_set(leaf::READ_ONLY) && !read_only_above);
        let user = !self.single_privilege && is_set(leaf::UNPRIVILEGED) && !restricted(inherited::PRIVILEGED_ONLY);
        let uxn = is_set(leaf::UXN) || restricted(inherited::UXN);
        let pxn = is_set(leaf::PXN) || restricted(inherited::PXN);

        let never = self.wxn && writable;
        let privileged_only = !self.single_privilege && (!user || place.unprivileged_disabled);
        let execute = if self.single_privilege {
            !(uxn || never)
        } else if privileged_only || self.privileged {
            // What user code can write, privileged code cannot execute: DDI 0487 rule VWLLR.
            !(pxn || never || (user && writable))
        } else {
            !(uxn || never)
        };
        // PAN matters where all requests are privileged; elsewhere unprivileged ones still pass.
        let data = !(self.pan && self.privileged && user);

        let memory_type = memory_type_of(self.memory_attribute(pattern));
        let shareability = match (place.table.lpa2(), place.non_shareable) {
            (false, _) => leaf::SH.of(pattern),
            (true, false) => vmsa::INNER,
            (true, true) => vmsa::NON_SHAREABLE,
        };
        Attributes {
            read: data,
            write: data && writable,
            execute,
            privileged_only,
            memory_type,
            coherent: vmsa::is_coherent(memory_type, shareability),
            accessed: self.hardware.accessed(pattern),
            dirty: self.hardware.dirty && !is_set(leaf::READ_ONLY),
            writable_when_dirty: data && clean,
        }
    }

    fn encode_leaf(&self, level: u8, size_log2: u8, asked: Attributes) -> Option<Encoded> {
        let place = self.place(level)?;
        // Every stage 1 leaf is readable, and with one privilege level every request passes.
        if !asked.read || (self.single_privilege && asked.privileged_only) {
            return None;
        }
        let (index, memory_type) = self.attribute_index(asked.memory_type)?;
        let clean = self.hardware.dirty && asked.write && asked.writable_when_dirty && !asked.dirty;
        let dirty = self.hardware.dirty && asked.write && asked.dirty;
        let user = self.single_privilege || !(asked.privileged_only || (self.pan && self.privileged));
        let (uxn, pxn) = match (asked.execute, user) {
            (false, _) => (true, !self.single_privilege),
            (true, false) => (true, false),
            (true, true) => (false, false),
        };
        let mut pattern = place.table.leaf_type(size_log2)?
            | leaf::ATTR_INDEX.put(index)
            | leaf::UNPRIVILEGED.put(user.into())
            | leaf::READ_ONLY.put((!asked.write || clean).into())
            | self.hardware.encode_access_flag(asked.accessed)
            | leaf::NG.put((!self.single_privilege).into())
            | leaf::DBM.put((clean || dirty).into())
            | leaf::PXN.put(pxn.into())
            | leaf::UXN.put(uxn.into());
        if !place.table.lpa2() {
            pattern |= leaf::SH.put(vmsa::encode_shareability(memory_type, asked.coherent));
        }
        let says = self.attributes(level, 0, pattern);
        // Marks without hardware that reads them mean nothing: they come back as asked.
        let attributes = Attributes {
            accessed: if self.hardware.access { says.accessed } else { asked.accessed },
            dirty: if dirty || clean { says.dirty } else { asked.dirty },
            ..says
        };
        Some(Encoded { pattern, attributes })
    }

    fn encode_table(&self, level: u8, next: u8) -> Option<u64> {
        self.place(level)?.table.encode_table(self.hardware, level, next)
    }
}
