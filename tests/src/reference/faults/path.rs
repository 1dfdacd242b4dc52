//! A walk that says why it ends.

use super::{Request, Unit};
use crate::reference::tables::{AmdV1, Entry, Marks, Region, Step, TableConfig, beyond};
use crate::reference::{Access, Problem, bit, bits};

/// Why a stage refuses an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// No table has it.
    Range,
    /// It is not canonical.
    Canonical,
    /// An entry is not there.
    Absent,
    /// An entry has reserved bits.
    Reserved,
    /// An entry codes a level or a size that there is not.
    Level,
    /// Bits of levels that were left out are not zero.
    Skipped,
    /// An address in an entry has more bits than there are.
    AddressSize,
    /// The access flag is clear.
    AccessFlag,
    /// It is there, and the request may not do this.
    Permission,
    /// It is there, and for privileged requests alone.
    Privilege,
    /// There is no memory where an entry should be: its address.
    Unreadable(u64),
}

/// For what a stage was asked, if not for the request's own address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fetch {
    /// A structure of the device.
    Structure,
    /// An entry of the first stage's tables, in this depth.
    Entry {
        /// From the root, 0.
        depth: usize,
        /// Marks were to be written to it.
        writes: bool,
    },
}

/// Where a walk ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Which of the tables, from 0.
    pub stage: usize,
    /// What that was asked for.
    pub input: u64,
    /// Why it was asked.
    pub fetch: Option<Fetch>,
    /// Any of these: where the order of checks is open there are several.
    pub causes: Vec<Cause>,
    /// How many entries of this stage were read before the last one.
    pub depth: usize,
    /// Where the second stage ends the walk of the first: what was wrong there before. Where the order of checks is open it may be that as well.
    pub before: Vec<Cause>,
}

/// What is asked of a stage.
#[derive(Clone, Copy)]
enum Purpose {
    Request { writes: bool },
    Fetch(Fetch),
}

impl Purpose {
    fn writes(self) -> bool {
        matches!(self, Purpose::Request { writes: true } | Purpose::Fetch(Fetch::Entry { writes: true, .. }))
    }
}

/// What a walk finds, or that nobody knows.
type Found<T> = Result<Result<T, Refused>, Problem>;

/// Tables of one stage, or of two.
pub struct Path<'a> {
    unit: &'a Unit<'a>,
    stages: Vec<(TableConfig, Vec<Region>)>,
}

/// A table on the way.
struct Table {
    address: u64,
    half: usize,
    depth: usize,
    allowed: Access,
}

impl<'a> Path<'a> {
    pub fn new(unit: &'a Unit<'a>, stages: &[TableConfig]) -> Result<Path<'a>, Problem> {
        let stages = stages.iter().map(|stage| Ok((*stage, stage.regions()?))).collect::<Result<Vec<_>, Problem>>()?;
        Ok(Path { unit, stages })
    }

    /// Where a request goes.
    pub fn request(&self, request: &Request) -> Found<u64> {
        let mut address = request.iova;
        self.unit.walks.set(true);
        for stage in 0..self.stages.len() {
            match self.through(stage, address, Purpose::Request { writes: request.writes() })? {
                Ok(found) => address = found,
                Err(refused) => return Ok(Err(refused)),
            }
        }
        Ok(Ok(address))
    }

    /// Where the only stage has a structure.
    pub fn structure(&self, address: u64) -> Found<u64> {
        self.unit.walks.set(false);
        self.through(0, address, Purpose::Fetch(Fetch::Structure))
    }

    fn through(&self, stage: usize, input: u64, purpose: Purpose) -> Found<u64> {
        let (config, regions) = &self.stages[stage];
        let effective = config.effective(input);
        let found = regions.iter().find(|region| effective >= region.first && region.contains(effective - region.first));
        let refused = |causes: Vec<Cause>, depth: usize| {
            let fetch = if let Purpose::Fetch(fetch) = purpose { Some(fetch) } else { None };
            Ok(Err(Refused { stage, input, fetch, causes, depth, before: Vec::new() }))
        };
        let Some(region) = found else {
            let canonical = matches!(config, TableConfig::VtdFirst(_));
            return refused(vec![if canonical { Cause::Canonical } else { Cause::Range }], 0);
        };
        let position = region.table_first + (effective - region.first);
        let mut table = Table { address: region.root, half: region.half, depth: 0, allowed: config.granted() };
        // Where tables take permissions away, nothing says whether that is found on the way or at the end.
        let mut causes = Vec::new();
        loop {
            let step = region.steps[table.depth];
            let depth = table.depth;
            let at = table.address + (position >> step.shift) % step.entries * config.entry_bytes();
            let entry = match self.entry(stage, at, depth, false)? {
                Ok(Ok(entry)) => entry,
                Ok(Err(address)) => {
                    causes.push(Cause::Unreadable(address));
                    return refused(causes, depth);
                }
                Err(inner) => return Ok(Err(Refused { before: causes, ..inner })),
            };
            let decoded = config.decode(table.half, step, entry);
            if decoded == Entry::Fault {
                causes.extend(why(config, table.half, step, entry));
                return refused(causes, depth);
            }
            let marks = config.missing_marks(step, entry);
            if (marks == Marks::Any || marks == Marks::ByWrites && purpose.writes())
                && stage + 1 < self.stages.len()
                && let Err(inner) = self.entry(stage, at, depth, true)?
            {
                // A leaf that does not allow the request is perhaps never marked.
                if let Entry::Leaf { access, .. } = decoded
                    && !access.and(table.allowed).allows(purpose.writes())
                {
                    causes.push(denied(config, entry));
                }
                return Ok(Err(Refused { before: causes, ..inner }));
            }
            match decoded {
                Entry::Fault => unreachable!(),
                Entry::Table { address, limit, skip, half, .. } => {
                    let next = region.steps[depth + 1 + skip];
                    if bits(position, step.shift - 1, 0) >> next.shift >= next.entries {
                        causes.push(Cause::Skipped);
                        return refused(causes, depth);
                    }
                    table = Table { address, half, depth: depth + 1 + skip, allowed: table.allowed.and(limit) };
                    if !limit.allows(purpose.writes()) {
                        causes.push(denied(config, entry));
                    }
                }
                Entry::Leaf { address, access, size, .. } => {
                    if !access.allows(purpose.writes()) {
                        causes.push(denied(config, entry));
                    } else if !table.allowed.allows(purpose.writes()) && causes.is_empty() {
                        causes.push(Cause::Permission);
                    }
                    if matches!(purpose, Purpose::Fetch(_)) && config.keeps_tables_out(entry) {
                        causes.push(Cause::Permission);
                    }
                    let address = address + bits(position, size.unwrap_or(step.shift) - 1, 0);
                    // Of the widest addresses of VT-d no register says whether there are any.
                    let may_be_beyond =
                        matches!(config, TableConfig::VtdFirst(_) | TableConfig::VtdSecond(_)) && address >> 48 != 0 && !causes.is_empty();
                    if beyond(address, config.output_bits()) || may_be_beyond {
                        causes.push(Cause::AddressSize);
                    }
                    return if causes.is_empty() { Ok(Ok(address)) } else { refused(causes, depth) };
                }
            }
        }
    }

    /// An entry of a stage's table; an address where there is no memory.
    #[allow(clippy::type_complexity)]
    fn entry(&self, stage: usize, at: u64, depth: usize, writes: bool) -> Found<Result<u64, u64>> {
        let physical = if stage + 1 < self.stages.len() {
            match self.through(stage + 1, at, Purpose::Fetch(Fetch::Entry { depth, writes }))? {
                Ok(physical) => physical,
                Err(refused) => return Ok(Err(refused)),
            }
        } else {
            at
        };
        let in_order = |entry: u64| if self.stages[stage].0.big_endian() { entry.swap_bytes() } else { entry };
        Ok(Ok(self.unit.read(physical)?.map(in_order).ok_or(physical)))
    }
}

/// Why a request may not do what it wants to do, of an entry that takes it away. x86: U/S is bit 2, and without it nothing is allowed.
fn denied(config: &TableConfig, entry: u64) -> Cause {
    let user = matches!(config, TableConfig::VtdFirst(_) | TableConfig::AmdV2(_)) && !bit(entry, 2);
    if user { Cause::Privilege } else { Cause::Permission }
}

/// What is wrong with an entry that no walk goes through.
fn why(config: &TableConfig, half: usize, step: Step, entry: u64) -> Vec<Cause> {
    match config {
        TableConfig::ArmStage1(stage) => {
            let half = if half == 0 { stage.low } else { stage.high };
            vmsa(half.map_or(4096, |half| half.granule), step, entry, config.output_bits(), stage.lpa)
        }
        TableConfig::ArmStage2(stage) => vmsa(stage.granule, step, entry, config.output_bits(), stage.lpa),
        TableConfig::VtdFirst(_) | TableConfig::AmdV2(_) => vec![if bit(entry, 0) { Cause::Reserved } else { Cause::Absent }],
        // R, W.
        TableConfig::VtdSecond(_) => vec![if bits(entry, 1, 0) == 0 { Cause::Absent } else { Cause::Reserved }],
        TableConfig::AmdV1(config) => amd_v1(config, step, entry),
        // One page fault for all.
        _ => vec![Cause::Absent],
    }
}

/// No more than 48 bits with granules of 4 and 16 KiB: a block is at level 2, with the smallest granule at level 1 as well, and with the largest where the unit has addresses
/// of 52 bits. IHI 0070 section 7.3.22: what the descriptor is, then its address, then AF.
fn vmsa(granule: u64, step: Step, descriptor: u64, output_bits: u32, lpa: bool) -> Vec<Cause> {
    let valid = match (bits(descriptor, 1, 0), step.level) {
        (3, _) | (1, 2) => true,
        (1, 1) => granule == 4096 || granule == 65536 && lpa,
        _ => false,
    };
    if !valid {
        return vec![Cause::Absent];
    }
    let leaf = step.level == 3 || !bit(descriptor, 1);
    let low = if leaf { step.shift } else { granule.trailing_zeros() };
    // Bits 51:48 are at 15:12 of tables of 64 KiB.
    let high = if granule == 65536 { bits(descriptor, 15, 12) << 48 } else { 0 };
    let address = bits(descriptor, 47, low) << low | high;
    vec![if beyond(address, output_bits) { Cause::AddressSize } else { Cause::AccessFlag }]
}

/// PR 0, NextLevel 11:9, reserved 58:52; of an entry with a table 60:59 as well. Which of several is told first nothing says.
fn amd_v1(config: &AmdV1, step: Step, entry: u64) -> Vec<Cause> {
    if !bit(entry, 0) {
        return vec![Cause::Absent];
    }
    let next = bits(entry, 11, 9);
    let is_table = (1..7).contains(&next);
    let mut causes = Vec::new();
    if bits(entry, 58, 52) != 0 || is_table && bits(entry, 60, 59) != 0 || beyond(bits(entry, 51, 12) << 12, config.output_bits) {
        causes.push(Cause::Reserved);
    }
    // What is left is a level, or a size. Both may be wrong.
    let valid = if is_table { (next as i32) < step.level } else { next == 0 && step.level < 6 };
    if !valid || causes.is_empty() {
        causes.push(Cause::Level);
    }
    causes
}
