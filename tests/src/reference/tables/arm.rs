//! VMSAv8-64 as SMMUv3 uses it.
//!
//! Sources: Arm DDI 0487 chapter D8 (VMSAv8-64), Arm IHI 0070 sections 3.4, 5.2, 5.4 and 13.4 (SMMUv3).

use super::settings::{ALWAYS, Reader, Said, said};
use super::{Entry, Region, Step};
use crate::reference::{Access, Problem, bit, bits};

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
    /// The unit sets access flags of tables too; only together with `hardware_access`.
    pub hardware_tables: bool,
    /// Entries are big-endian.
    pub big_endian: bool,
    /// The unit has 52-bit physical addresses, and with the 64K granule blocks at level 1, whatever `output_bits` is.
    pub lpa: bool,
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
    /// The unit sets access flags of tables too; only together with `hardware_access`.
    pub hardware_tables: bool,
    /// Entries are big-endian.
    pub big_endian: bool,
    /// As in stage 1.
    pub lpa: bool,
    /// DS: 52-bit addresses with 4K and 16K granules.
    pub lpa2: bool,
    /// PTW: stage 1 tables and context descriptors are not read from device memory.
    pub protected_walk: bool,
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
fn arm_block_allowed(g: u32, level: i32, lpa2: bool, lpa: bool) -> bool {
    match g {
        12 => level == 1 || level == 2 || (level == 0 && lpa2),
        14 => level == 2 || (level == 1 && lpa2),
        _ => level == 2 || (level == 1 && lpa),
    }
}

enum ArmKind {
    Fault,
    Table,
    Leaf,
}

/// Bits 1 and 0: x0 invalid; 11 table (level 3: page); 01 block (level 3: reserved).
fn arm_kind(descriptor: u64, level: i32, g: u32, lpa2: bool, lpa: bool) -> ArmKind {
    match (bits(descriptor, 1, 0), level) {
        (0b11, 3) => ArmKind::Leaf,
        (0b11, _) => ArmKind::Table,
        (0b01, 3) => ArmKind::Fault,
        (0b01, _) if arm_block_allowed(g, level, lpa2, lpa) => ArmKind::Leaf,
        _ => ArmKind::Fault,
    }
}

impl ArmStage1 {
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
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
            regions.push(Region { first, bits: input_bits, table_first: 0, root, steps, half, last: None });
        }
        Ok(regions)
    }

    pub(super) fn decode(&self, half: usize, step: Step, descriptor: u64) -> Entry {
        let part = if half == 0 { self.low } else { self.high }.unwrap();
        let g = granule_bits(part.granule).unwrap();
        match arm_kind(descriptor, step.level, g, self.lpa2, self.lpa) {
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
                Entry::table(address, limit, half)
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
                Entry::leaf(address, access)
            }
        }
    }
}

impl ArmStage2 {
    pub(super) fn regions(&self) -> Result<Vec<Region>, Problem> {
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
        Ok(vec![Region { first: 0, bits: input_bits, table_first: 0, root, steps, half: 0, last: None }])
    }

    pub(super) fn decode(&self, step: Step, descriptor: u64) -> Entry {
        let g = granule_bits(self.granule).unwrap();
        match arm_kind(descriptor, step.level, g, self.lpa2, self.lpa) {
            ArmKind::Fault => Entry::Fault,
            // Stage 2 has no hierarchical permissions.
            ArmKind::Table => match arm_address(descriptor, g, g, self.lpa2, self.output_bits) {
                Some(address) => Entry::table(address, Access::RW, 0),
                None => Entry::Fault,
            },
            ArmKind::Leaf => {
                let Some(address) = arm_address(descriptor, g, step.shift, self.lpa2, self.output_bits) else { return Entry::Fault };
                if !bit(descriptor, 10) && !self.hardware_access && !self.access_flag_disabled {
                    return Entry::Fault;
                }
                // S2AP, bits 7 and 6: bit 6 reads, bit 7 writes; with DBM and hardware management of dirty state the first write sets bit 7.
                let writable_clean = self.hardware_access && self.hardware_dirty && bit(descriptor, 51);
                Entry::leaf(address, Access { read: bit(descriptor, 6), write: bit(descriptor, 7) || writable_clean })
            }
        }
    }
}

fn output_bits(reader: &Reader<'_>) -> Result<u32, Problem> {
    reader.number("output-bits", 48, 32, 52)
}

impl ArmStage1 {
    pub(super) fn read(reader: &Reader<'_>) -> Result<ArmStage1, Problem> {
        reader.know(&[
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
            "hardware-table-access",
            "big-endian",
            "lpa",
            "lpa2",
            "privileged",
        ])?;
        let lpa2 = reader.flag("lpa2", false);
        // As in the CD: bit 0 is for the lower half, bit 1 for the upper one.
        let tbi = reader.get("tbi").unwrap_or(0);
        let had = reader.get("hierarchical-disabled").unwrap_or(0);
        let half = |root: u64, granule: u64, input_bits: u64, position: u32| -> Result<ArmHalf, Problem> {
            let input_bits = arm_input_bits(input_bits, granule, lpa2)?;
            let (top_byte_ignored, hierarchical_disabled) = (bit(tbi, position), bit(had, position));
            Ok(ArmHalf { root, granule, input_bits, top_byte_ignored, hierarchical_disabled })
        };
        let low = match reader.get("root") {
            Some(root) => Some(half(root, reader.need("granule")?, reader.need("input-bits")?, 0)?),
            None => None,
        };
        let high = match reader.get("root-high") {
            Some(root) => {
                let granule = reader.get("granule-high").map_or_else(|| reader.need("granule"), Ok)?;
                Some(half(root, granule, reader.get("input-bits-high").map_or_else(|| reader.need("input-bits"), Ok)?, 1)?)
            }
            None => None,
        };
        let output_bits = output_bits(reader)?;
        let large = [low, high].into_iter().flatten().any(|half: ArmHalf| half.granule == 65536);
        Ok(ArmStage1 {
            low,
            high,
            output_bits,
            mair: reader.get("mair").unwrap_or(0),
            hardware_access: reader.flag("hardware-access", false),
            hardware_dirty: reader.flag("hardware-dirty", false),
            access_flag_disabled: reader.flag("access-flag-disabled", false),
            hardware_tables: reader.flag("hardware-table-access", false),
            big_endian: reader.flag("big-endian", false),
            lpa: large && reader.flag("lpa", output_bits == 52),
            lpa2,
            privileged: reader.flag("privileged", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = Vec::new();
        let mut tbi = 0;
        let mut had = 0;
        let large = [self.low, self.high].into_iter().flatten().any(|half| half.granule == 65536);
        if let Some(low) = self.low {
            all.extend([said("root", low.root), said("granule", low.granule), said("input-bits", low.input_bits)]);
            tbi += u64::from(low.top_byte_ignored);
            had += u64::from(low.hierarchical_disabled);
        }
        if let Some(high) = self.high {
            all.extend([said("root-high", high.root), said("granule-high", high.granule), said("input-bits-high", high.input_bits)]);
            tbi += 2 * u64::from(high.top_byte_ignored);
            had += 2 * u64::from(high.hierarchical_disabled);
        }
        all.extend([("tbi", tbi, 0), ("hierarchical-disabled", had, 0), said("output-bits", self.output_bits), ("mair", self.mair, 0)]);
        all.extend([("hardware-access", u64::from(self.hardware_access), 0), ("hardware-dirty", u64::from(self.hardware_dirty), 0)]);
        all.extend([("access-flag-disabled", u64::from(self.access_flag_disabled), 0), ("big-endian", u64::from(self.big_endian), 0)]);
        all.push(("hardware-table-access", u64::from(self.hardware_tables), 0));
        all.extend([
            ("lpa", u64::from(self.lpa), u64::from(large && self.output_bits == 52)),
            ("lpa2", u64::from(self.lpa2), 0),
            ("privileged", u64::from(self.privileged), 0),
        ]);
        all
    }
}

impl ArmStage2 {
    pub(super) fn read(reader: &Reader<'_>) -> Result<ArmStage2, Problem> {
        reader.know(&[
            "root",
            "granule",
            "input-bits",
            "output-bits",
            "start-level",
            "hardware-access",
            "hardware-dirty",
            "access-flag-disabled",
            "hardware-table-access",
            "big-endian",
            "lpa",
            "lpa2",
            "protected-walk",
        ])?;
        let granule = reader.need("granule")?;
        let lpa2 = reader.flag("lpa2", false);
        let input_bits = arm_input_bits(reader.need("input-bits")?, granule, lpa2)?;
        let start_level = match reader.get("start-level") {
            // Level -1 as a number without a sign, in 64 or in 32 bits.
            Some(u64::MAX | 0xffff_ffff) => -1,
            Some(level @ 0..=3) => level as i32,
            Some(level) => return Err(Problem::Illegal(format!("start-level {level}"))),
            None => arm_start_level(granule_bits(granule)?, input_bits),
        };
        let output_bits = output_bits(reader)?;
        Ok(ArmStage2 {
            root: reader.need("root")?,
            granule,
            input_bits,
            output_bits,
            start_level,
            hardware_access: reader.flag("hardware-access", false),
            hardware_dirty: reader.flag("hardware-dirty", false),
            access_flag_disabled: reader.flag("access-flag-disabled", false),
            hardware_tables: reader.flag("hardware-table-access", false),
            big_endian: reader.flag("big-endian", false),
            lpa: granule == 65536 && reader.flag("lpa", output_bits == 52),
            lpa2,
            protected_walk: reader.flag("protected-walk", false),
        })
    }

    pub(super) fn said(&self) -> Vec<Said> {
        let mut all = vec![said("root", self.root), said("granule", self.granule), said("input-bits", self.input_bits)];
        all.push(said("output-bits", self.output_bits));
        if self.start_level != arm_start_level(granule_bits(self.granule).unwrap(), self.input_bits) {
            // Level -1 is the number of all ones.
            all.push(("start-level", i64::from(self.start_level) as u64, ALWAYS - 1));
        }
        all.extend([("hardware-access", u64::from(self.hardware_access), 0), ("hardware-dirty", u64::from(self.hardware_dirty), 0)]);
        all.extend([("access-flag-disabled", u64::from(self.access_flag_disabled), 0), ("big-endian", u64::from(self.big_endian), 0)]);
        all.push(("hardware-table-access", u64::from(self.hardware_tables), 0));
        all.extend([
            ("lpa", u64::from(self.lpa), u64::from(self.granule == 65536 && self.output_bits == 52)),
            ("lpa2", u64::from(self.lpa2), 0),
            ("protected-walk", u64::from(self.protected_walk), 0),
        ]);
        all
    }
}
