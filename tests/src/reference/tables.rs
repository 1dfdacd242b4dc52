//! Four table formats: where a walk starts, and what one entry means.
//!
//! Sources: Arm DDI 0487 chapter D8 (VMSAv8-64), Arm IHI 0070 sections 3.4, 5.2, 5.4 and 13.4 (SMMUv3), Intel Virtualization Technology for Directed I/O
//! sections 3.6, 3.7 and 9.7, 9.8 (first-stage and second-stage paging entries).

use std::collections::BTreeMap;

use super::{Access, Problem, bit, bits};

/// Settings by name, all numbers.
pub type Settings = BTreeMap<String, u64>;

/// One half of an SMMU stage 1 input space: TTB0 or TTB1 with its controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ArmHalf {
    /// Address of the first table.
    pub root: u64,
    /// 4096, 16384 or 65536.
    pub granule: u64,
    /// 64 - TxSZ.
    pub input_bits: u32,
    /// TBIx: bits 63 to 56 of the IOVA are not looked at.
    pub top_byte_ignored: bool,
    /// HADx: the restrictions in table descriptors are ignored.
    pub hierarchical_disabled: bool,
}

/// `arm-smmuv3/stage1`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArmStage1 {
    /// TTB0, for IOVAs from zero; none if walks are disabled there.
    pub low: Option<ArmHalf>,
    /// TTB1, for IOVAs up to the last one; none if walks are disabled there.
    pub high: Option<ArmHalf>,
    /// Output addresses with bits at or above this fault.
    pub output_bits: u32,
    /// Memory attributes; not looked at.
    pub mair: u64,
    /// The unit sets access flags.
    pub hardware_access: bool,
    /// The unit clears AP\[2\] of entries with DBM; only together with `hardware_access`.
    pub hardware_dirty: bool,
    /// A clear access flag is as good as a set one.
    pub access_flag_disabled: bool,
    /// Entries are big-endian.
    pub big_endian: bool,
    /// DS: 52-bit addresses with 4K and 16K granules.
    pub lpa2: bool,
    /// Requests count as privileged (STE.PRIVCFG, or an EL2 regime).
    pub privileged: bool,
}

/// `arm-smmuv3/stage2`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ArmStage2 {
    /// Address of the first table, or of the first of the concatenated ones.
    pub root: u64,
    /// 4096, 16384 or 65536.
    pub granule: u64,
    /// 64 - T0SZ.
    pub input_bits: u32,
    /// Output addresses with bits at or above this fault.
    pub output_bits: u32,
    /// The architecture's number of the level where the walk starts, -1 to 3.
    pub start_level: i32,
    /// The unit sets access flags.
    pub hardware_access: bool,
    /// The unit sets S2AP\[1\] of entries with DBM; only together with `hardware_access`.
    pub hardware_dirty: bool,
    /// A clear access flag is as good as a set one.
    pub access_flag_disabled: bool,
    /// Entries are big-endian.
    pub big_endian: bool,
    /// DS: 52-bit addresses with 4K and 16K granules.
    pub lpa2: bool,
}

/// `intel-vtd/first-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdFirst {
    /// Address of the first table.
    pub root: u64,
    /// 4 or 5.
    pub levels: u32,
    /// The host address width: addresses beyond it are reserved.
    pub output_bits: u32,
    /// 1G leaves are supported (CAP.FL1GP).
    pub large_1g: bool,
    /// NXE: bit 63 is not reserved.
    pub execute_disable: bool,
}

/// `intel-vtd/second-stage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VtdSecond {
    /// Address of the first table.
    pub root: u64,
    /// 3, 4 or 5.
    pub levels: u32,
    /// IOVAs with bits at or above this fault: what the levels give, or less (CAP.MGAW).
    pub input_bits: u32,
    /// The host address width: addresses beyond it are reserved.
    pub output_bits: u32,
    /// 2M leaves are supported (CAP.SLLPS).
    pub large_2m: bool,
    /// 1G leaves are supported (CAP.SLLPS).
    pub large_1g: bool,
    /// The unit has snoop control (ECAP.SC): bit 11 of a leaf is not reserved.
    pub snoop_control: bool,
}

/// A table with its format and settings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableConfig {
    /// SMMUv3 stage 1.
    ArmStage1(ArmStage1),
    /// SMMUv3 stage 2.
    ArmStage2(ArmStage2),
    /// VT-d first stage.
    VtdFirst(VtdFirst),
    /// VT-d second stage.
    VtdSecond(VtdSecond),
}

/// A level of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// The format's own number of the level: Arm -1 to 3 from the root, VT-d 5 to 1.
    pub level: i32,
    /// Log2 of what one entry covers.
    pub shift: u32,
    /// Entries in a table of this level; for the first level of concatenated tables, in all of them.
    pub entries: u64,
}

/// A range of IOVAs with one root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    /// The lowest IOVA.
    pub first: u64,
    /// Log2 of the range's size.
    pub bits: u32,
    /// Where the lowest IOVA lies in what the first table could cover: zero, except for the upper half of VT-d's first stage.
    pub table_first: u64,
    /// Address of the first table, aligned as the hardware aligns it.
    pub root: u64,
    /// The levels from the root.
    pub steps: Vec<Step>,
    /// 1 for Arm's TTB1, else 0.
    pub half: usize,
}

/// What an entry says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Not present, or malformed: requests fail.
    Fault,
    /// Another table.
    Table {
        /// Its address.
        address: u64,
        /// The most that anything behind it allows.
        limit: Access,
    },
    /// A leaf.
    Leaf {
        /// The output address of its first byte.
        address: u64,
        /// What it allows by itself.
        access: Access,
    },
}

fn granule_bits(granule: u64) -> Result<u32, Problem> {
    match granule {
        4096 => Ok(12),
        16384 => Ok(14),
        65536 => Ok(16),
        _ => Err(Problem::Illegal(format!("granule {granule}"))),
    }
}

/// DDI 0487 D8.2: a page of the granule holds `2^(g-3)` entries, so each level resolves g-3 bits; level 3 resolves the bits just above the page offset.
fn arm_shift(g: u32, level: i32) -> u32 {
    g + (g - 3) * (3 - level) as u32
}

/// The level nearest to the leaves at which one table, not longer than a granule, covers the input.
pub(crate) fn arm_start_level(g: u32, input_bits: u32) -> i32 {
    let mut level = 3;
    while arm_shift(g, level) + (g - 3) < input_bits {
        level -= 1;
    }
    level
}

fn arm_steps(g: u32, input_bits: u32, start_level: i32) -> Vec<Step> {
    (start_level..=3)
        .map(|level| {
            let shift = arm_shift(g, level);
            let entries = if level == start_level { 1 << (input_bits - shift) } else { 1 << (g - 3) };
            Step { level, shift, entries }
        })
        .collect()
}

/// IHI 0070 CD.TTB0, STE.S2TTB: the SMMU aligns the value to the size of the first table; to 64 bytes at least when addresses have 52 bits.
fn arm_root(root: u64, entries: u64, output_bits: u32) -> u64 {
    let mut alignment = entries * 8;
    if output_bits == 52 && alignment < 64 {
        alignment = 64;
    }
    root - root % alignment
}

/// Largest input: 48 bits, or 52 bits with the 64K granule or DS (IHI 0070 section 3.4). Smallest: 12 bits above a page, TxSZ 48 (39 without small tables).
fn arm_input_bits(input_bits: u64, granule: u64, lpa2: bool) -> Result<u32, Problem> {
    let largest = if granule == 65536 || lpa2 { 52 } else { 48 };
    let smallest = if granule == 65536 { 17 } else { 16 };
    if (smallest..=largest).contains(&input_bits) { Ok(input_bits as u32) } else { Err(Problem::Illegal(format!("input-bits {input_bits}"))) }
}

/// The address field of a descriptor (DDI 0487 D8.3), without the bits below `shift`; none if it is beyond the output size.
fn arm_address(descriptor: u64, g: u32, shift: u32, lpa2: bool, output_bits: u32) -> Option<u64> {
    let mut address = 0;
    if g == 16 {
        // 64K granule: bits 15 to 12 are address bits 51 to 48. That is so on every implementation with 52-bit physical addresses, whatever size is configured, and
        // a choice of the implementation on others (`AArch64.LeafBase`): the one that fails closed is taken.
        address |= bits(descriptor, 47, 16) << 16;
        address |= bits(descriptor, 15, 12) << 48;
    } else if lpa2 {
        // DS: bits 49 to g in place, bits 9 to 8 are address bits 51 to 50.
        address |= bits(descriptor, 49, g) << g;
        address |= bits(descriptor, 9, 8) << 50;
    } else {
        address |= bits(descriptor, 47, g) << g;
    }
    address -= address % (1 << shift);
    // An address size fault, for table addresses as for output addresses.
    if address >> output_bits == 0 { Some(address) } else { None }
}

/// DDI 0487 D8.3.1: the levels where a block descriptor is allowed.
fn arm_block_allowed(g: u32, level: i32, lpa2: bool, output_bits: u32) -> bool {
    match g {
        12 => level == 1 || level == 2 || (level == 0 && lpa2),
        14 => level == 2 || (level == 1 && lpa2),
        _ => level == 2 || (level == 1 && output_bits == 52),
    }
}

enum ArmKind {
    Fault,
    Table,
    Leaf,
}

/// Bits 1 and 0: x0 invalid; 11 table (level 3: page); 01 block (level 3: reserved).
fn arm_kind(descriptor: u64, level: i32, g: u32, lpa2: bool, output_bits: u32) -> ArmKind {
    match (bits(descriptor, 1, 0), level) {
        (0b11, 3) => ArmKind::Leaf,
        (0b11, _) => ArmKind::Table,
        (0b01, 3) => ArmKind::Fault,
        (0b01, _) if arm_block_allowed(g, level, lpa2, output_bits) => ArmKind::Leaf,
        _ => ArmKind::Fault,
    }
}

impl ArmStage1 {
    fn regions(&self) -> Result<Vec<Region>, Problem> {
        let mut regions = Vec::new();
        for (half, part) in [self.low, self.high].into_iter().enumerate() {
            let Some(part) = part else { continue };
            let g = granule_bits(part.granule)?;
            let input_bits = arm_input_bits(u64::from(part.input_bits), part.granule, self.lpa2)?;
            let steps = arm_steps(g, input_bits, arm_start_level(g, input_bits));
            let first = if half == 1 { 0u64.wrapping_sub(1 << input_bits) } else { 0 };
            let root = arm_root(part.root, steps[0].entries, self.output_bits);
            if root >> self.output_bits != 0 {
                return Err(Problem::Illegal(format!("root {root:#x} is beyond {} bits", self.output_bits)));
            }
            regions.push(Region { first, bits: input_bits, table_first: 0, root, steps, half });
        }
        Ok(regions)
    }

    fn decode(&self, half: usize, step: Step, descriptor: u64) -> Entry {
        let part = if half == 0 { self.low } else { self.high }.unwrap();
        let g = granule_bits(part.granule).unwrap();
        match arm_kind(descriptor, step.level, g, self.lpa2, self.output_bits) {
            ArmKind::Fault => Entry::Fault,
            ArmKind::Table => {
                let Some(address) = arm_address(descriptor, g, g, self.lpa2, self.output_bits) else { return Entry::Fault };
                let mut limit = Access::RW;
                if !part.hierarchical_disabled {
                    // APTable, bits 62 and 61 (DDI 0487 D8.4): bit 62 takes writing away, bit 61 everything from unprivileged requests.
                    if bit(descriptor, 62) {
                        limit.write = false;
                    }
                    if bit(descriptor, 61) && !self.privileged {
                        limit = Access::NONE;
                    }
                }
                Entry::Table { address, limit }
            }
            ArmKind::Leaf => {
                let Some(address) = arm_address(descriptor, g, step.shift, self.lpa2, self.output_bits) else { return Entry::Fault };
                // AF, bit 10: a clear one faults, unless hardware sets it or it is taken as set.
                if !bit(descriptor, 10) && !self.hardware_access && !self.access_flag_disabled {
                    return Entry::Fault;
                }
                // AP[2:1], bits 7 and 6: AP[1] allows unprivileged access, AP[2] forbids writing. With DBM (bit 51) and hardware management of dirty state, AP[2]
                // set means "clean": the first write clears it.
                let writable_clean = self.hardware_access && self.hardware_dirty && bit(descriptor, 51);
                let reachable = bit(descriptor, 6) || self.privileged;
                let access = Access { read: reachable, write: reachable && (!bit(descriptor, 7) || writable_clean) };
                Entry::Leaf { address, access }
            }
        }
    }
}

impl ArmStage2 {
    fn regions(&self) -> Result<Vec<Region>, Problem> {
        let g = granule_bits(self.granule)?;
        let input_bits = arm_input_bits(u64::from(self.input_bits), self.granule, self.lpa2)?;
        // DDI 0487 D8.2.2: the first level resolves at least one bit, and at most four more than a table has, with up to 16 concatenated tables.
        // Level -1 exists with 4K and 52-bit addresses, level 0 with 16K only then, and never with 64K.
        let lowest = match g {
            12 => -i32::from(self.lpa2),
            14 => i32::from(!self.lpa2),
            _ => 1,
        };
        if !(lowest..=3).contains(&self.start_level) {
            return Err(Problem::Illegal(format!("start-level {}", self.start_level)));
        }
        let shift = arm_shift(g, self.start_level);
        if input_bits <= shift || input_bits > shift + (g - 3) + 4 {
            return Err(Problem::Illegal(format!("start-level {} for {input_bits} bits", self.start_level)));
        }
        let steps = arm_steps(g, input_bits, self.start_level);
        let root = arm_root(self.root, steps[0].entries, self.output_bits);
        if root >> self.output_bits != 0 {
            return Err(Problem::Illegal(format!("root {root:#x} is beyond {} bits", self.output_bits)));
        }
        Ok(vec![Region { first: 0, bits: input_bits, table_first: 0, root, steps, half: 0 }])
    }

    fn decode(&self, step: Step, descriptor: u64) -> Entry {
        let g = granule_bits(self.granule).unwrap();
        match arm_kind(descriptor, step.level, g, self.lpa2, self.output_bits) {
            ArmKind::Fault => Entry::Fault,
            // Stage 2 has no hierarchical permissions.
            ArmKind::Table => match arm_address(descriptor, g, g, self.lpa2, self.output_bits) {
                Some(address) => Entry::Table { address, limit: Access::RW },
                None => Entry::Fault,
            },
            ArmKind::Leaf => {
                let Some(address) = arm_address(descriptor, g, step.shift, self.lpa2, self.output_bits) else { return Entry::Fault };
                if !bit(descriptor, 10) && !self.hardware_access && !self.access_flag_disabled {
                    return Entry::Fault;
                }
                // S2AP, bits 7 and 6: bit 6 reads, bit 7 writes; with DBM and hardware management of dirty state the first write sets bit 7.
                let writable_clean = self.hardware_access && self.hardware_dirty && bit(descriptor, 51);
                Entry::Leaf { address, access: Access { read: bit(descriptor, 6), write: bit(descriptor, 7) || writable_clean } }
            }
        }
    }
}

/// Nine bits a level, from the given level down to 1.
fn vtd_steps(levels: u32) -> Vec<Step> {
    (1..=levels).rev().map(|level| Step { level: level as i32, shift: 12 + 9 * (level - 1), entries: 512 }).collect()
}

impl VtdFirst {
    /// The IOVA must be canonical (VT-d 3.6): bits above the table's input repeat its top bit. So the lower half of the first table is at the bottom of the
    /// 64-bit space and the upper half at its top.
    fn regions(&self) -> Result<Vec<Region>, Problem> {
        if self.levels != 4 && self.levels != 5 {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let half_bits = 12 + 9 * self.levels - 1;
        let root = self.root - self.root % 4096;
        let low = Region { first: 0, bits: half_bits, table_first: 0, root, steps: vtd_steps(self.levels), half: 0 };
        let high = Region { first: 0u64.wrapping_sub(1 << half_bits), table_first: 1 << half_bits, ..low.clone() };
        Ok(vec![low, high])
    }

    fn decode(&self, step: Step, entry: u64) -> Entry {
        // Bit 0 present, 1 writable, 2 user, 7 page size, 63 execute-disable.
        if !bit(entry, 0) {
            return Entry::Fault;
        }
        if bit(entry, 63) && !self.execute_disable {
            return Entry::Fault;
        }
        let address = bits(entry, 51, 12) << 12;
        if address >> self.output_bits != 0 {
            return Entry::Fault;
        }
        let access = Access { read: bit(entry, 2), write: bit(entry, 2) && bit(entry, 1) };
        let page_size = bit(entry, 7);
        match step.level {
            1 => Entry::Leaf { address, access },
            2 | 3 if page_size => {
                // Bit 12 of a large leaf is PAT; the bits from 13 to its size are reserved.
                if (step.level == 3 && !self.large_1g) || bits(entry, step.shift - 1, 13) != 0 {
                    return Entry::Fault;
                }
                Entry::Leaf { address: address - address % (1 << step.shift), access }
            }
            _ if page_size => Entry::Fault,
            _ => Entry::Table { address, limit: access },
        }
    }
}

impl VtdSecond {
    fn regions(&self) -> Result<Vec<Region>, Problem> {
        if !(3..=5).contains(&self.levels) {
            return Err(Problem::Illegal(format!("levels {}", self.levels)));
        }
        let input_bits = self.input_bits.min(12 + 9 * self.levels);
        let root = self.root - self.root % 4096;
        Ok(vec![Region { first: 0, bits: input_bits, table_first: 0, root, steps: vtd_steps(self.levels), half: 0 }])
    }

    fn decode(&self, step: Step, entry: u64) -> Entry {
        // Bit 0 read, 1 write, 7 page size; there is no present bit (VT-d 9.8).
        let access = Access { read: bit(entry, 0), write: bit(entry, 1) };
        if access == Access::NONE {
            return Entry::Fault;
        }
        let address = bits(entry, 51, 12) << 12;
        if address >> self.output_bits != 0 {
            return Entry::Fault;
        }
        let page_size = bit(entry, 7);
        let leaf = step.level == 1 || (step.level <= 3 && page_size);
        // Bit 62 is reserved (it was the transient-mapping bit once), and bit 11, which forces snooping, in table entries and on units without snoop control.
        if bit(entry, 62) || (bit(entry, 11) && !(leaf && self.snoop_control)) {
            return Entry::Fault;
        }
        match step.level {
            1 => Entry::Leaf { address, access },
            2 | 3 if page_size => {
                let supported = if step.level == 2 { self.large_2m } else { self.large_1g };
                // The address bits below the leaf's size are reserved.
                if !supported || bits(entry, step.shift - 1, 12) != 0 {
                    return Entry::Fault;
                }
                Entry::Leaf { address, access }
            }
            _ if page_size => Entry::Fault,
            _ => Entry::Table { address, limit: access },
        }
    }
}

impl TableConfig {
    /// Reads a format's name and settings; `root` is one of the settings. Unknown settings other than zero are refused, so that none goes unnoticed.
    ///
    /// # Errors
    /// [`Problem::Unsupported`] for an unknown format or setting, [`Problem::Illegal`] for a missing or impossible one.
    pub fn from_settings(format: &str, settings: &Settings) -> Result<TableConfig, Problem> {
        let known: &[&str] = match format {
            "arm-smmuv3/stage1" => &[
                "root",
                "granule",
                "input-bits",
                "tbi",
                "hierarchical-disabled",
                "root-high",
                "granule-high",
                "input-bits-high",
                "output-bits",
                "mair",
                "hardware-access",
                "hardware-dirty",
                "access-flag-disabled",
                "big-endian",
                "lpa2",
                "privileged",
            ],
            "arm-smmuv3/stage2" => &[
                "root",
                "granule",
                "input-bits",
                "output-bits",
                "start-level",
                "hardware-access",
                "hardware-dirty",
                "access-flag-disabled",
                "big-endian",
                "lpa2",
            ],
            "intel-vtd/first-stage" => &["root", "levels", "output-bits", "large-1g", "execute-disable"],
            "intel-vtd/second-stage" => &["root", "levels", "input-bits", "output-bits", "large-2m", "large-1g", "snoop-control"],
            _ => return Err(Problem::Unsupported(format!("format {format}"))),
        };
        if let Some(key) = settings.iter().find(|(key, value)| **value != 0 && !known.contains(&key.as_str())).map(|(key, _)| key) {
            return Err(Problem::Unsupported(format!("setting {key} of {format}")));
        }
        let get = |key: &str| settings.get(key).copied();
        let need = |key: &str| get(key).ok_or_else(|| Problem::Illegal(format!("{format} without {key}")));
        let flag = |key: &str, default: bool| get(key).map_or(default, |value| value != 0);
        let output_bits = |default: u64| match get("output-bits").unwrap_or(default) {
            value @ 32..=52 => Ok(value as u32),
            value => Err(Problem::Illegal(format!("output-bits {value}"))),
        };
        let config = match format {
            "arm-smmuv3/stage1" => {
                let lpa2 = flag("lpa2", false);
                // As in the CD: bit 0 is for the lower half, bit 1 for the upper one.
                let tbi = get("tbi").unwrap_or(0);
                let had = get("hierarchical-disabled").unwrap_or(0);
                let half = |root: Option<u64>, granule: u64, input_bits: u64, position: u32| -> Result<Option<ArmHalf>, Problem> {
                    let Some(root) = root else { return Ok(None) };
                    let input_bits = arm_input_bits(input_bits, granule, lpa2)?;
                    let (top_byte_ignored, hierarchical_disabled) = (bit(tbi, position), bit(had, position));
                    Ok(Some(ArmHalf { root, granule, input_bits, top_byte_ignored, hierarchical_disabled }))
                };
                let low = match get("root") {
                    Some(root) => half(Some(root), need("granule")?, need("input-bits")?, 0)?,
                    None => None,
                };
                let high = match get("root-high") {
                    Some(root) => {
                        let granule = get("granule-high").map_or_else(|| need("granule"), Ok)?;
                        half(Some(root), granule, get("input-bits-high").map_or_else(|| need("input-bits"), Ok)?, 1)?
                    }
                    None => None,
                };
                TableConfig::ArmStage1(ArmStage1 {
                    low,
                    high,
                    output_bits: output_bits(48)?,
                    mair: get("mair").unwrap_or(0),
                    hardware_access: flag("hardware-access", false),
                    hardware_dirty: flag("hardware-dirty", false),
                    access_flag_disabled: flag("access-flag-disabled", false),
                    big_endian: flag("big-endian", false),
                    lpa2,
                    privileged: flag("privileged", false),
                })
            }
            "arm-smmuv3/stage2" => {
                let granule = need("granule")?;
                let lpa2 = flag("lpa2", false);
                let input_bits = arm_input_bits(need("input-bits")?, granule, lpa2)?;
                let start_level = match get("start-level") {
                    // Level -1 as a number without a sign, in 64 or in 32 bits.
                    Some(u64::MAX | 0xffff_ffff) => -1,
                    Some(level @ 0..=3) => level as i32,
                    Some(level) => return Err(Problem::Illegal(format!("start-level {level}"))),
                    None => arm_start_level(granule_bits(granule)?, input_bits),
                };
                TableConfig::ArmStage2(ArmStage2 {
                    root: need("root")?,
                    granule,
                    input_bits,
                    output_bits: output_bits(48)?,
                    start_level,
                    hardware_access: flag("hardware-access", false),
                    hardware_dirty: flag("hardware-dirty", false),
                    access_flag_disabled: flag("access-flag-disabled", false),
                    big_endian: flag("big-endian", false),
                    lpa2,
                })
            }
            "intel-vtd/first-stage" => TableConfig::VtdFirst(VtdFirst {
                root: need("root")?,
                levels: need("levels")? as u32,
                output_bits: output_bits(52)?,
                large_1g: flag("large-1g", true),
                execute_disable: flag("execute-disable", true),
            }),
            _ => {
                let levels = need("levels")? as u32;
                TableConfig::VtdSecond(VtdSecond {
                    root: need("root")?,
                    levels,
                    input_bits: get("input-bits").unwrap_or(64).min(12 + 9 * u64::from(levels)) as u32,
                    output_bits: output_bits(52)?,
                    large_2m: flag("large-2m", true),
                    large_1g: flag("large-1g", true),
                    snoop_control: flag("snoop-control", false),
                })
            }
        };
        config.regions()?;
        Ok(config)
    }

    /// The format's name.
    pub fn format(&self) -> &'static str {
        match self {
            TableConfig::ArmStage1(_) => "arm-smmuv3/stage1",
            TableConfig::ArmStage2(_) => "arm-smmuv3/stage2",
            TableConfig::VtdFirst(_) => "intel-vtd/first-stage",
            TableConfig::VtdSecond(_) => "intel-vtd/second-stage",
        }
    }

    /// The settings, `root` among them; those that have their default value are left out.
    pub fn settings(&self) -> Settings {
        let mut all: Vec<(&str, u64, u64)> = Vec::new();
        let never = u64::MAX;
        match self {
            TableConfig::ArmStage1(config) => {
                let mut tbi = 0;
                let mut had = 0;
                if let Some(low) = config.low {
                    all.extend([("root", low.root, never), ("granule", low.granule, never), ("input-bits", u64::from(low.input_bits), never)]);
                    tbi += u64::from(low.top_byte_ignored);
                    had += u64::from(low.hierarchical_disabled);
                }
                if let Some(high) = config.high {
                    all.push(("root-high", high.root, never));
                    all.push(("granule-high", high.granule, never));
                    all.push(("input-bits-high", u64::from(high.input_bits), never));
                    tbi += 2 * u64::from(high.top_byte_ignored);
                    had += 2 * u64::from(high.hierarchical_disabled);
                }
                all.extend([
                    ("tbi", tbi, 0),
                    ("hierarchical-disabled", had, 0),
                    ("output-bits", u64::from(config.output_bits), never),
                    ("mair", config.mair, 0),
                ]);
                all.extend([("hardware-access", u64::from(config.hardware_access), 0), ("hardware-dirty", u64::from(config.hardware_dirty), 0)]);
                all.extend([("access-flag-disabled", u64::from(config.access_flag_disabled), 0), ("big-endian", u64::from(config.big_endian), 0)]);
                all.extend([("lpa2", u64::from(config.lpa2), 0), ("privileged", u64::from(config.privileged), 0)]);
            }
            TableConfig::ArmStage2(config) => {
                all.extend([("root", config.root, never), ("granule", config.granule, never), ("input-bits", u64::from(config.input_bits), never)]);
                all.push(("output-bits", u64::from(config.output_bits), never));
                if config.start_level != arm_start_level(granule_bits(config.granule).unwrap(), config.input_bits) {
                    all.push(("start-level", i64::from(config.start_level) as u64, never - 1));
                }
                all.extend([("hardware-access", u64::from(config.hardware_access), 0), ("hardware-dirty", u64::from(config.hardware_dirty), 0)]);
                all.extend([("access-flag-disabled", u64::from(config.access_flag_disabled), 0), ("big-endian", u64::from(config.big_endian), 0)]);
                all.push(("lpa2", u64::from(config.lpa2), 0));
            }
            TableConfig::VtdFirst(config) => {
                all.extend([
                    ("root", config.root, never),
                    ("levels", u64::from(config.levels), never),
                    ("output-bits", u64::from(config.output_bits), 52),
                ]);
                all.extend([("large-1g", u64::from(config.large_1g), 1), ("execute-disable", u64::from(config.execute_disable), 1)]);
            }
            TableConfig::VtdSecond(config) => {
                all.extend([("root", config.root, never), ("levels", u64::from(config.levels), never)]);
                if config.input_bits < 12 + 9 * config.levels {
                    all.push(("input-bits", u64::from(config.input_bits), never));
                }
                all.push(("output-bits", u64::from(config.output_bits), 52));
                all.extend([("large-2m", u64::from(config.large_2m), 1), ("large-1g", u64::from(config.large_1g), 1)]);
                all.push(("snoop-control", u64::from(config.snoop_control), 0));
            }
        }
        all.into_iter().filter(|(_, value, default)| value != default).map(|(key, value, _)| (key.to_string(), value)).collect()
    }

    /// The ranges of IOVAs that have a root.
    ///
    /// # Errors
    /// [`Problem::Illegal`] if the settings contradict each other.
    pub fn regions(&self) -> Result<Vec<Region>, Problem> {
        match self {
            TableConfig::ArmStage1(config) => config.regions(),
            TableConfig::ArmStage2(config) => config.regions(),
            TableConfig::VtdFirst(config) => config.regions(),
            TableConfig::VtdSecond(config) => config.regions(),
        }
    }

    /// What an entry of this level says.
    pub fn decode(&self, half: usize, step: Step, entry: u64) -> Entry {
        match self {
            TableConfig::ArmStage1(config) => config.decode(half, step, entry),
            TableConfig::ArmStage2(config) => config.decode(step, entry),
            TableConfig::VtdFirst(config) => config.decode(step, entry),
            TableConfig::VtdSecond(config) => config.decode(step, entry),
        }
    }

    /// Whether entries are big-endian.
    pub fn big_endian(&self) -> bool {
        match self {
            TableConfig::ArmStage1(config) => config.big_endian,
            TableConfig::ArmStage2(config) => config.big_endian,
            TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_) => false,
        }
    }

    /// The IOVA as it is looked up: where the top byte is ignored, bits 63 to 56 become copies of bit 55 (IHI 0070 section 3.4.1).
    pub fn effective(&self, iova: u64) -> u64 {
        if let TableConfig::ArmStage1(config) = self {
            let upper = bit(iova, 55);
            let half = if upper { config.high } else { config.low };
            if half.is_some_and(|half| half.top_byte_ignored) {
                let rest = bits(iova, 55, 0);
                return if upper { rest + (0xff << 56) } else { rest };
            }
        }
        iova
    }
}
