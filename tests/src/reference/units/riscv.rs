//! RISC-V units: device directories of one to three levels with both contexts, process directories of one to three levels, one stage and two.

use super::{Nested, Request, STRUCTURES, nest};
use crate::reference::detect::MessageTable;
use crate::reference::generate::{Format, Generated, Options, Rng, build, random_config, random_leaves};
use crate::reference::snapshot::{Memory, Snapshot};
use crate::reference::tables::{RiscvFirst, RiscvSecond, TableConfig};
use crate::reference::{Run, bits};

/// How the unit's structures are shaped.
#[derive(Clone, Copy)]
struct Shape {
    /// Levels of the device directory.
    levels: u32,
    /// Eight words in a device context.
    extended: bool,
    /// Levels of the process directory, 0 for none.
    process_levels: u32,
    id: u64,
    /// Process id; none with a process directory is the default process 0.
    process: Option<u64>,
}

impl Shape {
    fn random(seed: u64, rng: &mut Rng) -> Shape {
        let (levels, extended, process_levels) = (1 + (seed % 3) as u32, rng.percent(50), rng.below(4) as u32);
        let width = match levels {
            1 => {
                if extended {
                    6
                } else {
                    7
                }
            }
            2 => {
                if extended {
                    15
                } else {
                    16
                }
            }
            _ => 24,
        };
        let process = match process_levels {
            0 => None,
            _ if rng.percent(30) => None,
            1 => Some(rng.below(1 << 8)),
            2 => Some(rng.below(1 << 17)),
            _ => Some(rng.below(1 << 20)),
        };
        Shape { levels, extended, process_levels, id: rng.below(1 << width), process }
    }

    /// Index of the device id at each level of the directory.
    fn indexes(&self) -> [u64; 3] {
        let own = if self.extended { 6 } else { 7 };
        [bits(self.id, own - 1, 0), bits(self.id, own + 8, own), bits(self.id, 23, own + 9)]
    }

    fn request(&self, messages: Option<MessageTable>) -> Request {
        let mut others = vec![(self.id ^ 1, None)];
        if self.levels < 3 {
            // More bits than the directory resolves.
            others.push((self.id + (1 << 20), None));
        }
        match (self.process_levels, self.process) {
            (0, _) => others.extend([(self.id, Some(0)), (self.id, Some(1))]),
            (_, process) => others.extend([(self.id, Some(process.unwrap_or(0) ^ 1)), (self.id, Some(1 << 20))]),
        }
        Request { id: self.id, pasid: self.process, others, messages }
    }
}

/// Page number of a pointer, at bit 10, and V.
fn directory_entry(address: u64) -> u64 {
    (address >> 12 << 10) + 1
}

/// MODE 63:60 and PPN.
fn pointer(mode: u64, address: u64) -> u64 {
    (mode << 60) + (address >> 12)
}

fn mode(levels: u32) -> u64 {
    u64::from(levels) + 5
}

fn write(memory: &mut Memory, address: u64, words: &[u64], big_endian: bool) {
    memory.add_zeroed(address - address % 4096, 4096);
    for (index, word) in words.iter().enumerate() {
        memory.write(address + index as u64 * 8, *word, big_endian);
    }
}

/// The process directory with the first stage's root: `pdtp`. Its pages are the guest's if there is a second stage.
fn process_directory(memory: &mut Memory, shape: &Shape, first: Option<RiscvFirst>, places: [u64; 3]) -> u64 {
    let process = shape.process.unwrap_or(0);
    let big_endian = first.is_some_and(|first| first.entries.big_endian);
    let root = first.map_or(0, |first| pointer(mode(first.levels), first.root));
    let index = [bits(process, 7, 0), bits(process, 16, 8), bits(process, 19, 17)];
    // V, and a PSCID.
    write(memory, places[0] + index[0] * 16, &[1 + (0x1234 << 12), root], big_endian);
    for level in 1..shape.process_levels as usize {
        write(memory, places[level] + index[level] * 8, &[directory_entry(places[level - 1])], big_endian);
    }
    pointer(u64::from(shape.process_levels), places[shape.process_levels as usize - 1])
}

/// The unit with one device; `pdtp` is set if there is a process directory.
fn unit(
    mut memory: Memory,
    shape: &Shape,
    first: Option<RiscvFirst>,
    second: Option<RiscvSecond>,
    pdtp: Option<u64>,
    messages: Option<MessageTable>,
) -> Snapshot {
    let entries = first.map(|first| first.entries).or(second.map(|second| second.entries)).unwrap();
    let big_endian = second.is_some_and(|second| second.entries.big_endian);
    let sbe = first.map_or(big_endian, |first| first.entries.big_endian);
    let flag = |flag: bool, position: u32| u64::from(flag) << position;
    // V; PDTV 5, GADE 7, SADE 8, DPE 9, SBE 10.
    let mut control = 1 + flag(pdtp.is_some(), 5) + flag(pdtp.is_some() && shape.process.is_none(), 9) + flag(sbe, 10);
    control += flag(second.is_some_and(|second| second.entries.hardware_update), 7);
    control += flag(first.is_some_and(|first| first.entries.hardware_update), 8);
    let mut context = vec![
        control,
        second.map_or(0, |second| pointer(mode(second.levels), second.root) + (0x42 << 44)),
        0x777 << 12,
        pdtp.unwrap_or(first.map_or(0, |first| pointer(mode(first.levels), first.root))),
    ];
    if shape.extended {
        context.extend(messages.map_or([0; 4], |table| [pointer(1, table.root), table.mask, table.pattern, 0]));
    }
    let index = shape.indexes();
    let places = [STRUCTURES, STRUCTURES + 0x1000, STRUCTURES + 0x2000];
    write(&mut memory, places[0] + index[0] * context.len() as u64 * 8, &context, big_endian);
    for level in 1..shape.levels as usize {
        write(&mut memory, places[level] + index[level] * 8, &[directory_entry(places[level - 1])], big_endian);
    }
    // Sv32 8 to Sv57 11, Svrsw60t59b 14, Svpbmt 15, Sv32x4 16 to Sv57x4 19, MSI_FLAT 22, AMO_HWAD 24, ATS 25, T2GPA 26, END 27, PAS 37:32 is 56, PD8 to PD20 40:38.
    let capabilities = 0x10 + (0xf << 8) + flag(entries.svrsw60t59b, 14) + flag(entries.svpbmt, 15) + (0xf << 16) + flag(shape.extended, 22);
    let registers = [
        ("CAPABILITIES", capabilities + (0xf << 24) + (56 << 32) + (7 << 38)),
        ("FCTL", u64::from(big_endian)),
        ("DDTP", (places[shape.levels as usize - 1] >> 12 << 10) + u64::from(shape.levels) + 1),
    ];
    Snapshot {
        unit_kind: "riscv-iommu".to_string(),
        registers: registers.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        memory,
        ..Snapshot::default()
    }
}

/// Settings that the unit's registers give: all address bits, Svnapot.
fn settled(mut config: TableConfig) -> TableConfig {
    let (levels, entries) = match &mut config {
        TableConfig::RiscvFirst(config) => (&mut config.levels, &mut config.entries),
        TableConfig::RiscvSecond(config) => {
            config.input_bits = 59;
            (&mut config.levels, &mut config.entries)
        }
        _ => unreachable!(),
    };
    *levels = (*levels).max(3);
    (entries.output_bits, entries.svnapot) = (56, true);
    config
}

fn random_messages(shape: &Shape, rng: &mut Rng) -> Option<MessageTable> {
    (shape.extended && rng.percent(50)).then_some(MessageTable { root: 0x5000_0000, mask: 0xff, pattern: 0x2_8000 })
}

/// A device with one stage, of either kind.
#[allow(clippy::missing_panics_doc)]
pub fn riscv_single(second_stage: bool, seed: u64) -> (Snapshot, Request, Generated) {
    let rng = &mut Rng::new(seed);
    let mut shape = Shape::random(seed, rng);
    let messages = random_messages(&shape, rng);
    let config = settled(random_config(if second_stage { Format::RiscvSecond } else { Format::RiscvFirst }, rng));
    let options = Options { clusters: 6, ..Options::default() };
    let leaves = random_leaves(&config, rng, options);
    let generated = build(config, &leaves, rng, options);
    let mut memory = generated.snapshot.memory.clone();
    let (first, second) = match generated.config {
        TableConfig::RiscvFirst(config) => (Some(config), None),
        TableConfig::RiscvSecond(config) => (None, Some(config)),
        _ => unreachable!(),
    };
    // A process directory would be the guest's behind a second stage: that is for two stages.
    if second_stage {
        (shape.process_levels, shape.process) = (0, None);
    }
    let places = [STRUCTURES + 0x8000, STRUCTURES + 0x9000, STRUCTURES + 0xa000];
    let pdtp = (shape.process_levels > 0).then(|| process_directory(&mut memory, &shape, first, places));
    (unit(memory, &shape, first, second, pdtp, messages), shape.request(messages), generated)
}

/// A device with two stages.
#[allow(clippy::missing_panics_doc)]
pub fn riscv_nested(seed: u64) -> (Snapshot, Request, Nested) {
    let rng = &mut Rng::new(seed);
    let shape = Shape::random(seed, rng);
    let messages = random_messages(&shape, rng);
    let config = settled(random_config(Format::RiscvFirst, rng));
    let options = Options { clusters: 6, ..Options::default() };
    let leaves: Vec<Run> = random_leaves(&config, rng, options);
    let first = build(config, &leaves, rng, options);
    let TableConfig::RiscvFirst(own) = first.config else { unreachable!() };
    let mut guest = Memory::default();
    let pdtp = (shape.process_levels > 0).then(|| process_directory(&mut guest, &shape, Some(own), [0x12_3000, 0x45_6000, 0x78_9000]));
    // The second stage has to take all that the first puts out.
    let TableConfig::RiscvSecond(mut second) = settled(random_config(Format::RiscvSecond, rng)) else { unreachable!() };
    second.levels = 5;
    (second.entries.svpbmt, second.entries.svrsw60t59b) = (own.entries.svpbmt, own.entries.svrsw60t59b);
    let nested = nest(first, TableConfig::RiscvSecond(second), &guest, seed);
    let TableConfig::RiscvSecond(second) = nested.second.config else { unreachable!() };
    (unit(nested.memory.clone(), &shape, Some(own), Some(second), pdtp, messages), shape.request(messages), nested)
}
