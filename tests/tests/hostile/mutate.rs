//! What a hostile guest writes.

use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::snapshot::{MemoryRange, Snapshot};
use stagecraft_tests::reference::tables::TableConfig;

/// A random page of the guest.
fn page(snapshot: &Snapshot, rng: &mut Rng) -> u64 {
    let index = rng.below(snapshot.memory.pages.len() as u64) as usize;
    *snapshot.memory.pages.keys().nth(index).expect("the index is below the number of pages")
}

/// A random word that is in use, in a random page: structures, which are few, are met as often as tables.
fn word(snapshot: &Snapshot, rng: &mut Rng) -> u64 {
    let page = page(snapshot, rng);
    let content = &snapshot.memory.pages[&page];
    let used: Vec<u64> = (0..512).filter(|index| content[*index as usize * 8..][..8] != [0; 8]).collect();
    page + if used.is_empty() { rng.below(512) } else { rng.pick(&used) } * 8
}

/// A number with few, many, or all bits.
pub fn absurd(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => 0,
        1 => u64::MAX,
        2 => 1 << rng.below(64),
        3 => !(1 << rng.below(64)),
        4 => rng.number() >> rng.below(64),
        _ => rng.number(),
    }
}

/// How a guest's entries are written.
#[derive(Clone, Copy, Debug, Default)]
pub struct Words {
    pub big_endian: bool,
    /// Page numbers stand at bit 10, as in RISC-V's entries, and not in place.
    pub numbers: bool,
}

impl Words {
    /// Of the tables that a guest begins with.
    pub fn of(config: &TableConfig) -> Words {
        Words { big_endian: config.big_endian(), numbers: matches!(config, TableConfig::RiscvFirst(_) | TableConfig::RiscvSecond(_)) }
    }

    /// An entry with another address.
    pub fn point(self, entry: u64, address: u64) -> u64 {
        if self.numbers { entry & !0x003f_ffff_ffff_fc00 | address >> 2 } else { entry & !0x000f_ffff_ffff_f000 | address }
    }
}

/// Damages the guest in a few ways at once; which, in words.
pub fn mutate(snapshot: &mut Snapshot, rng: &mut Rng, words: Words) -> String {
    let mut done = Vec::new();
    for _ in 0..=rng.below(3) {
        done.push(mutate_once(snapshot, rng, words));
    }
    done.join(", ")
}

/// Registers, or beginnings of their names, that lead somewhere.
const LEADING: &[&str] = &[
    "CR0",
    "CR2",
    "IDR0",
    "IDR1",
    "IDR3",
    "IDR5",
    "STRTAB_BASE",
    "CAP",
    "ECAP",
    "GSTS",
    "RTADDR",
    "DEVTAB_",
    "CONTROL",
    "EXT_FEATURES",
    "CAPABILITIES",
    "FCTL",
    "DDTP",
    "IOTA_",
    "BASE_",
    "LIMIT_",
];

fn mutate_once(snapshot: &mut Snapshot, rng: &mut Rng, words: Words) -> String {
    if snapshot.memory.pages.is_empty() {
        return "nothing left".to_owned();
    }
    let big_endian = words.big_endian;
    let read = |snapshot: &Snapshot, address: u64| snapshot.memory.read(address, big_endian).expect("the page is there");
    match rng.below(13) {
        0..=3 => {
            let count = 1 + rng.below(24);
            for _ in 0..count {
                let at = word(snapshot, rng);
                let value = read(snapshot, at) ^ (1 << rng.below(64));
                snapshot.memory.write(at, value, big_endian);
            }
            format!("{count} bits flipped")
        }
        // Loops: an entry that points to some page of the guest, its own often enough.
        4 => {
            for _ in 0..=rng.below(8) {
                let at = word(snapshot, rng);
                let target = if rng.percent(40) { at & !0xfff } else { page(snapshot, rng) };
                let value = words.point(read(snapshot, at), target);
                snapshot.memory.write(at, value, big_endian);
            }
            "entries point to other pages".to_owned()
        }
        // A self-map: all entries of a page point to it.
        5 => {
            let at = word(snapshot, rng);
            let value = words.point(read(snapshot, at), at & !0xfff);
            for index in 0..512 {
                snapshot.memory.write((at & !0xfff) + index * 8, value, big_endian);
            }
            format!("page {:#x} filled with {value:#x}", at & !0xfff)
        }
        6 => {
            for _ in 0..=rng.below(4) {
                let at = word(snapshot, rng);
                let value = read(snapshot, at) | words.point(0, rng.number() & 0x000f_ffff_ffff_f000);
                snapshot.memory.write(at, value, big_endian);
            }
            "addresses outside memory".to_owned()
        }
        7 => {
            for _ in 0..=rng.below(4) {
                let (one, other) = (page(snapshot, rng), page(snapshot, rng));
                let (first, second) = (snapshot.memory.pages[&one].clone(), snapshot.memory.pages[&other].clone());
                snapshot.memory.pages.insert(one, second);
                snapshot.memory.pages.insert(other, first);
            }
            "pages exchanged".to_owned()
        }
        8 => {
            for _ in 0..=rng.below(3) {
                let page = page(snapshot, rng);
                if snapshot.memory.pages.len() > 1 {
                    snapshot.memory.pages.remove(&page);
                }
            }
            "pages missing".to_owned()
        }
        9 => {
            let (page, from) = (page(snapshot, rng), rng.below(512));
            for index in from..512 {
                snapshot.memory.write(page + index * 8, 0, big_endian);
            }
            format!("page {page:#x} ends at word {from}")
        }
        10 if !snapshot.registers.is_empty() => {
            let names: Vec<String> = snapshot.registers.keys().cloned().collect();
            // Those that lead somewhere more often than the many others.
            let index = names.len() as u64;
            let known: Vec<&str> = names.iter().map(String::as_str).filter(|name| LEADING.iter().any(|known| name.starts_with(known))).collect();
            let name = if rng.percent(80) { rng.pick(&known).to_owned() } else { names[rng.below(index) as usize].clone() };
            let value = if rng.percent(60) { snapshot.registers[&name] ^ (1 << rng.below(64)) } else { absurd(rng) };
            snapshot.registers.insert(name.clone(), value);
            format!("{name} is {value:#x}")
        }
        11 => {
            let (page, count) = (page(snapshot, rng), 1 + rng.below(512));
            for _ in 0..count {
                let value = absurd(rng);
                snapshot.memory.write(page + rng.below(512) * 8, value, big_endian);
            }
            format!("{count} absurd words in page {page:#x}")
        }
        _ => shrink_map(snapshot, rng),
    }
}

/// Cuts a hole into the memory map, with the borders of pages or without.
fn shrink_map(snapshot: &mut Snapshot, rng: &mut Rng) -> String {
    if snapshot.map.is_empty() {
        return "no memory map".to_owned();
    }
    let index = rng.below(snapshot.map.len() as u64) as usize;
    let MemoryRange { kind, first, last } = snapshot.map.remove(index);
    let first_page = first / 4096;
    let pages = last / 4096 - first_page + 1;
    let hole = first_page + rng.below(pages);
    let scale = rng.below(20);
    let size = 1 + rng.below(1 << scale);
    if hole > first_page {
        snapshot.map.push(MemoryRange { kind: kind.clone(), first, last: hole * 4096 - 1 });
    }
    if let Some(behind) = hole.checked_add(size).map(|page| page * 4096).filter(|behind| *behind <= last) {
        snapshot.map.push(MemoryRange { kind, first: behind, last });
    }
    format!("{size} pages from {:#x} cut out of the memory map", hole * 4096)
}
