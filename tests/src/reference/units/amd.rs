//! AMD-Vi units: host tables, guest tables behind guest CR3 tables of one to three levels, and both.

use super::{Nested, Request, STRUCTURES, nest};
use crate::reference::generate::{Format, Generated, Options, Rng, build, random_config, random_leaves};
use crate::reference::snapshot::{Memory, Snapshot};
use crate::reference::tables::{AmdV1, TableConfig};
use crate::reference::{Access, bits};

/// Where guest CR3 tables go, behind the device table.
const TABLES: u64 = STRUCTURES + 0x20_0000;

/// GTEn 16, IommuEn 0; GCR3TRPMode 58.
fn unit(memory: Memory, guest_physical: bool) -> Snapshot {
    // 4 KiB for each 128 devices: 2^16 of them.
    let registers =
        [("DEVTAB_BASE", STRUCTURES + 0x1ff), ("CONTROL", 1 + (1 << 16) + (u64::from(guest_physical) << 58)), ("EXT_FEATURES", 0x1_0000_e9d3)];
    Snapshot {
        unit_kind: "amd-vi".to_string(),
        registers: registers.iter().map(|(name, value)| (name.to_string(), *value)).collect(),
        memory,
        ..Snapshot::default()
    }
}

fn write_entry(memory: &mut Memory, id: u64, entry: [u64; 4]) {
    // The pages with the device's entry and with its neighbours'.
    for near in [id.saturating_sub(1), id, (id + 1).min(0xffff)] {
        memory.add_zeroed(STRUCTURES + near * 32, 32);
    }
    for (index, word) in entry.iter().enumerate() {
        memory.write(STRUCTURES + id * 32 + index as u64 * 8, *word, false);
    }
    // Valid neighbours without translation fields are blocked, those that are not valid pass.
    memory.write(STRUCTURES + (id ^ 1) * 32, 1, false);
}

/// V, TV, IR and IW.
fn start(granted: Access) -> u64 {
    3 + (u64::from(granted.read) << 61) + (u64::from(granted.write) << 62)
}

/// Tables of a format with all address bits, which no register limits.
fn tables(format: Format, rng: &mut Rng, change: impl FnOnce(&mut TableConfig)) -> Generated {
    let mut config = random_config(format, rng);
    change(&mut config);
    let options = Options { clusters: 6, ..Options::default() };
    let leaves = random_leaves(&config, rng, options);
    build(config, &leaves, rng, options)
}

/// A device with a host table.
#[allow(clippy::missing_panics_doc)]
pub fn amd_host(seed: u64) -> (Snapshot, Request, Generated) {
    let rng = &mut Rng::new(seed);
    let generated = tables(Format::AmdV1, rng, |config| {
        let TableConfig::AmdV1(config) = config else { unreachable!() };
        config.output_bits = 52;
        (config.update_accessed, config.update_dirty) = (false, false);
    });
    let TableConfig::AmdV1(config) = generated.config else { unreachable!() };
    let id = rng.below(1 << 16);
    let mut memory = generated.snapshot.memory.clone();
    write_entry(&mut memory, id, [start(config.granted) + (u64::from(config.levels) << 9) + config.root, rng.below(1 << 16), 0, 0]);
    (unit(memory, false), Request { id, pasid: None, others: vec![(id ^ 1, None), (id, Some(0)), (id, Some(5))], messages: None }, generated)
}

/// Guest CR3 tables that lead a PASID to a root; returns the first one's address. `moved` says where guest pages are to be written.
fn guest_cr3(memory: &mut Memory, glx: u64, pasid: u64, root: u64, places: [u64; 3]) -> u64 {
    for level in 0..=glx {
        let next = if level == 0 { root } else { places[level as usize - 1] };
        memory.add_zeroed(places[level as usize], 4096);
        memory.write(places[level as usize] + bits(pasid >> (9 * level), 8, 0) * 8, next + 1, false);
    }
    places[glx as usize]
}

/// The words of a device table entry that say where guest CR3 tables are: GIoV 54, GV 55, GLX 57:56; GuestPagingMode 183:182.
fn guest_fields(table: u64, glx: u64, implicit: bool, levels: u32) -> [u64; 4] {
    let first = (u64::from(implicit) << 54) + (1 << 55) + (glx << 56) + (bits(table, 14, 12) << 58);
    let second = (bits(table, 30, 15) << 16) + (bits(table, 51, 31) << 43) + 7;
    [first, second, u64::from(levels - 4) << 54, 0]
}

/// A PASID with as many bits as the guest CR3 tables resolve.
fn random_pasid(glx: u64, rng: &mut Rng) -> u64 {
    1 + rng.below((1 << (9 * (glx + 1)).min(20)) - 1)
}

fn guest_tables(rng: &mut Rng, pasid: u64, granted: Option<Access>) -> Generated {
    tables(Format::AmdV2, rng, |config| {
        let TableConfig::AmdV2(config) = config else { unreachable!() };
        (config.output_bits, config.page_1g, config.sign_extended) = (52, true, pasid != 0);
        if let Some(granted) = granted {
            config.granted = granted;
        }
    })
}

/// A device with guest tables, for a PASID or, with GIoV, for requests without one.
#[allow(clippy::missing_panics_doc)]
pub fn amd_guest(seed: u64) -> (Snapshot, Request, Generated) {
    let rng = &mut Rng::new(seed);
    let (glx, implicit) = (seed % 3, rng.percent(40));
    let pasid = if implicit { 0 } else { random_pasid(glx, rng) };
    let generated = guest_tables(rng, pasid, None);
    let TableConfig::AmdV2(config) = generated.config else { unreachable!() };
    let id = rng.below(1 << 16);
    let mut memory = generated.snapshot.memory.clone();
    let table = guest_cr3(&mut memory, glx, pasid, config.root, [TABLES, TABLES + 0x1000, TABLES + 0x2000]);
    let mut entry = guest_fields(table, glx, implicit, config.levels);
    entry[0] += start(config.granted);
    write_entry(&mut memory, id, entry);
    let beyond = 1 << (9 * (glx + 1)).min(20);
    let others = vec![(id ^ 1, None), (id, Some(pasid ^ 1)), (id, Some(pasid + beyond))];
    (unit(memory, false), Request { id, pasid: (!implicit).then_some(pasid), others, messages: None }, generated)
}

/// A device with guest tables behind a host table.
#[allow(clippy::missing_panics_doc)]
pub fn amd_nested(seed: u64) -> (Snapshot, Request, Nested) {
    let rng = &mut Rng::new(seed);
    let (glx, implicit, guest_physical) = (seed % 3, rng.percent(30), rng.percent(50));
    let pasid = if implicit { 0 } else { random_pasid(glx, rng) };
    let mut first = guest_tables(rng, pasid, Some(Access::RW));
    let TableConfig::AmdV2(config) = first.config else { unreachable!() };
    // Guest pages for guest CR3 tables; the first one is the host's own unless the unit says otherwise.
    let mut places = [0x12_3000, 0x45_6000, 0x78_9000];
    if !guest_physical {
        places[glx as usize] = TABLES;
    }
    let mut guest = Memory::default();
    let table = guest_cr3(&mut guest, glx, pasid, config.root, places);
    let own = guest.pages.remove(&TABLES);
    let granted = rng.pick(&[Access::RW, Access::RW, Access::R]);
    if !granted.write {
        // Nobody can mark entries: all have been used before.
        let memory = &mut first.snapshot.memory;
        let words: Vec<u64> = memory.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8)).collect();
        for at in words {
            let entry = memory.read(at, false).unwrap();
            memory.write(at, entry | (entry & 1) << 5, false);
        }
    }
    let host = AmdV1 { root: 0, levels: rng.pick(&[5, 6]), output_bits: 52, granted, update_accessed: false, update_dirty: false };
    let nested = nest(first, TableConfig::AmdV1(host), &guest, seed);
    let TableConfig::AmdV1(host) = nested.second.config else { unreachable!() };
    let mut memory = nested.memory.clone();
    memory.pages.extend(own.map(|page| (TABLES, page)));
    let id = rng.below(1 << 16);
    let mut entry = guest_fields(table, glx, implicit, config.levels);
    entry[0] += start(granted) + (u64::from(host.levels) << 9) + host.root;
    write_entry(&mut memory, id, entry);
    let others = vec![(id ^ 1, None), (id, Some(pasid ^ 1))];
    (unit(memory, guest_physical), Request { id, pasid: (!implicit).then_some(pasid), others, messages: None }, nested)
}
