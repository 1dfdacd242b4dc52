//! What a second stage lets a first one do besides reading its tables: hardware writes its marks there, and device memory may be closed to it. Entries by hand, from the
//! specifications; the engine and the naive reader are both asked.
#![allow(clippy::unwrap_used)]

mod configs;

use stagecraft::guest::{Guest, State};
use stagecraft::memory::{Budget, Limits, MemoryMap};
use stagecraft::table::{AddressSpace, Cause, Collector, FaultKind, Table};
use stagecraft::{Iova, Span};
use stagecraft_tests::reference::generate::{Options, Rng, build};
use stagecraft_tests::reference::snapshot::{Device, Memory, MemoryRange};
use stagecraft_tests::reference::tables::riscv::Entries;
use stagecraft_tests::reference::tables::{AmdV1, AmdV2, ArmHalf, ArmStage1, ArmStage2, RiscvFirst, RiscvSecond, TableConfig, VtdFirst, VtdSecond};
use stagecraft_tests::reference::units::smmu_nested;
use stagecraft_tests::reference::walk::Walker;
use stagecraft_tests::reference::{Access, Run, detect};

use configs::{View, plugin_config};

/// Intermediate addresses of tables, from the root down, and of the page.
const TABLES: [u64; 4] = [0x10_0000, 0x20_1000, 0x30_2000, 0x40_3000];
const DATA: u64 = 0x50_4000;
/// Where the second stage puts the page.
const TARGET: u64 = 0x1_0000_0000;
/// Selects entry 1 at each of four levels of nine bits, and byte 8 of the page.
const IOVA: u64 = (1 << 39) + (1 << 30) + (1 << 21) + (1 << 12) + 8;

/// How a first stage's entries look, and their marks.
struct First {
    name: &'static str,
    config: TableConfig,
    second: TableConfig,
    levels: usize,
    /// An entry with nothing but marks missing: a pointer, and a page for reading and writing.
    pointer: fn(u64) -> u64,
    page: fn(u64) -> u64,
    /// The bit that a pointer lacks before it was used, if hardware sets one.
    pointer_accessed: Option<u64>,
    page_accessed: u64,
    /// What a page is that was not written.
    clean: fn(u64) -> u64,
    /// Hardware sets marks; otherwise they are there already.
    marks: bool,
}

const ENTRIES: Entries = Entries { output_bits: 56, svnapot: false, svpbmt: false, svrsw60t59b: false, hardware_update: true, big_endian: false };

fn arm(hardware: bool) -> TableConfig {
    let low = ArmHalf { root: TABLES[0], granule: 4096, input_bits: 48, top_byte_ignored: false, hierarchical_disabled: false };
    let (hardware_access, hardware_dirty) = (hardware, hardware);
    TableConfig::ArmStage1(ArmStage1 { low: Some(low), output_bits: 48, mair: 0xff, hardware_access, hardware_dirty, ..ArmStage1::default() })
}

fn stage2(protected_walk: bool) -> TableConfig {
    TableConfig::ArmStage2(ArmStage2 { granule: 4096, input_bits: 48, output_bits: 48, protected_walk, ..ArmStage2::default() })
}

fn firsts() -> Vec<First> {
    let vtd_second = VtdSecond::default();
    let x86 = |name, config, second, marks| First {
        name,
        config,
        second,
        levels: 4,
        // P, R/W, U/S, A; with D.
        pointer: |address| address | 0x27,
        page: |address| address | 0x67,
        pointer_accessed: Some(1 << 5),
        page_accessed: 1 << 5,
        clean: |page| page & !(1 << 6),
        marks,
    };
    let vtd = VtdFirst { root: TABLES[0], levels: 4, output_bits: 52, large_1g: true, execute_disable: true, extended_access: false };
    let amd = AmdV2 {
        root: TABLES[0],
        levels: 4,
        output_bits: 52,
        sign_extended: false,
        page_1g: true,
        privileged: false,
        granted: Access::RW,
        update_accessed: true,
        update_dirty: true,
    };
    let host = TableConfig::AmdV1(AmdV1 { root: 0, levels: 4, output_bits: 52, granted: Access::RW, update_accessed: false, update_dirty: false });
    let unmarked = AmdV2 { update_accessed: false, update_dirty: false, ..amd };
    let vmsa = |name, marks| First {
        name,
        config: arm(marks),
        second: stage2(false),
        levels: 4,
        // A page with AF, inner shareable, for unprivileged requests, DBM and execute-never.
        pointer: |address| address | 3,
        page: |address| address | 0x0068_0000_0000_0743,
        pointer_accessed: None,
        page_accessed: 1 << 10,
        // AP[2]: read-only, until DBM has it written to.
        clean: |page| page | 1 << 7,
        marks,
    };
    vec![
        x86("VT-d, D51397 section 9.7", TableConfig::VtdFirst(vtd), TableConfig::VtdSecond(vtd_second), true),
        First {
            pointer: |address| address | 0x427,
            page: |address| address | 0x467,
            // EA alone.
            pointer_accessed: Some(1 << 10),
            page_accessed: 1 << 10,
            ..x86(
                "VT-d with EAFE, D51397 section 9.7",
                TableConfig::VtdFirst(VtdFirst { extended_access: true, ..vtd }),
                TableConfig::VtdSecond(vtd_second),
                true,
            )
        },
        x86("AMD-Vi, 48882 section 2.2.6", TableConfig::AmdV2(amd), host, true),
        x86("AMD-Vi that is told to set no marks", TableConfig::AmdV2(unmarked), host, false),
        vmsa("SMMUv3 with HA and HD, IHI 0070 section 3.13.5", true),
        First {
            name: "RISC-V with ADE, IOMMU section 2.1.3.1",
            config: TableConfig::RiscvFirst(RiscvFirst { root: TABLES[0], levels: 4, entries: ENTRIES }),
            second: TableConfig::RiscvSecond(RiscvSecond {
                root: 0,
                levels: 4,
                input_bits: 50,
                entries: Entries { hardware_update: false, ..ENTRIES },
            }),
            levels: 4,
            pointer: |address| address >> 2 | 1,
            // V, R, W, U, A, D.
            page: |address| address >> 2 | 0xd7,
            pointer_accessed: None,
            page_accessed: 1 << 6,
            clean: |page| page & !(1 << 7),
            marks: true,
        },
    ]
}

/// The entries on the way to [`IOVA`], written where a second stage puts them that lets `read_only` be read alone.
fn place(first: &First, entries: &[u64], read_only: Option<usize>) -> (Memory, TableConfig) {
    let address = |level: usize| 0x20_0000_0000 + level as u64 * 0x1000;
    let mut leaves: Vec<Run> = (0..first.levels)
        .map(|level| {
            let access = if read_only == Some(level) { Access::R } else { Access::RW };
            Run { iova: TABLES[level], address: address(level), size: 4096, access }
        })
        .collect();
    leaves.push(Run { iova: DATA, address: TARGET, size: 4096, access: Access::RW });
    let plain = Options { restrictions: false, decoys: false, noise: false, ..Options::default() };
    let second = build(first.second, &leaves, &mut Rng::new(1), plain);
    let mut memory = second.snapshot.memory;
    for (level, entry) in entries.iter().enumerate() {
        memory.add_zeroed(address(level), 4096);
        memory.write(address(level) + 8, *entry, false);
    }
    (memory, second.config)
}

fn entries(first: &First) -> Vec<u64> {
    (0..first.levels).map(|level| if level + 1 < first.levels { (first.pointer)(TABLES[level + 1]) } else { (first.page)(DATA) }).collect()
}

fn open(config: &TableConfig) -> Table {
    let config = plugin_config(config);
    Table::open(Box::new(configs::plugins().by_format(&config.format).unwrap().open(&config).unwrap())).unwrap()
}

/// The engine's answer and the naive reader's; whether it succeeds.
fn ask(stages: &[TableConfig; 2], memory: &Memory, write: bool, what: &str) -> bool {
    let mut space = AddressSpace::nested(open(&stages[0]), open(&stages[1]));
    let (map, budget) = (MemoryMap::everything(56), Budget::new(Limits::default()));
    let access = if write { stagecraft::Access::WRITE } else { stagecraft::Access::READ };
    let found = space.translate(&View(memory), &map, Iova(IOVA), access, &budget).unwrap();
    let naive = Walker::new(memory, stages).unwrap();
    assert_eq!(found.as_ref().ok().map(|found| found.address.0), naive.translate(IOVA, write).ok(), "{what}: {found:?}");
    let mut collector = Collector::new(false, 0);
    space.walk(&View(memory), &map, Span::ALL, &budget, &mut collector).unwrap();
    let told = collector.mappings().first().is_some_and(|run| if write { run.access.write } else { run.access.read });
    assert_eq!(told, found.is_ok(), "{what}: walked and translated");
    assert_eq!(naive.mappings().unwrap().first().is_some_and(|run| run.access.allows(write)), told, "{what}");
    match found {
        Ok(found) => assert_eq!(found.address.0, TARGET + 8),
        Err(fault) => {
            assert_eq!((fault.stage, fault.cause, fault.reading_table), (2, Cause::Entry(FaultKind::Permission), true), "{what}: {fault:?}");
            // The second stage's own entry that forbids it, and for which address.
            assert!(!fault.path.is_empty() && TABLES.contains(&(fault.input & !0xfff)), "{what}: {fault:?}");
            return false;
        }
    }
    true
}

/// Each mark missing alone, behind each table that cannot be written alone.
#[test]
fn entries_that_lack_a_mark_need_a_page_that_can_be_written() {
    let mut faults = 0;
    for first in firsts() {
        let last = first.levels - 1;
        for read_only in [None, Some(0), Some(1), Some(2), Some(3)] {
            for unmarked in 0..first.levels + 2 {
                let mut entries = entries(&first);
                // Pointers, then the page: not accessed, not written.
                let lacks = match unmarked {
                    level if level < last => {
                        let Some(bit) = first.pointer_accessed else { continue };
                        entries[level] &= !bit;
                        Some((level, false))
                    }
                    level if level == last => {
                        entries[last] &= !first.page_accessed;
                        Some((last, false))
                    }
                    level if level == last + 1 => {
                        entries[last] = (first.clean)(entries[last]);
                        Some((last, true))
                    }
                    _ => None,
                };
                let (memory, second) = place(&first, &entries, read_only);
                for write in [false, true] {
                    let what = format!("{}: table {read_only:?} cannot be written, {lacks:?} lacks a mark, write {write}", first.name);
                    let refused = first.marks && lacks.is_some_and(|(level, by_writes)| read_only == Some(level) && (write || !by_writes));
                    assert_eq!(ask(&[first.config, second], &memory, write, &what), !refused, "{what}");
                    faults += u32::from(refused);
                }
            }
        }
    }
    // Three pointers of two formats, one of them with another mark as well; five pages not accessed by reads and writes, and not written by writes.
    assert_eq!(faults, 3 * 3 * 2 + 5 * 2 + 5);
}

/// Makes the stage 2 page for `address`, the output, device memory or write-back: MemAttr, bits 5:2 of its descriptor.
fn set_memory_type(memory: &mut Memory, address: u64, device: bool) {
    let pages: Vec<u64> = memory.pages.keys().copied().collect();
    let mut found = 0;
    for at in pages.iter().flat_map(|page| (0..512).map(move |index| page + index * 8)) {
        let word = memory.read(at, false).unwrap();
        if word & 0xffff_ffff_f000 == address && word & 3 == 3 && word & 1 << 6 != 0 {
            memory.write(at, word & !(0xf << 2) | if device { 1 << 2 } else { 0xf << 2 }, false);
            found += 1;
        }
    }
    assert_eq!(found, 1, "{address:#x}");
}

/// IHI 0070 section 5.2, S2PTW: a stage 1 walk that reads device memory is a stage 2 permission fault. Data may be there.
#[test]
fn protected_walks_do_not_read_tables_from_device_memory() {
    let first = firsts().into_iter().find(|first| first.name.starts_with("SMMUv3")).unwrap();
    for protected in [false, true] {
        for device in [None, Some(0), Some(1), Some(2), Some(3), Some(4)] {
            let First { config, .. } = first;
            let first = First { second: stage2(protected), ..firsts().remove(3) };
            let (mut memory, second) = place(&first, &entries(&first), None);
            for level in 0..5 {
                let address = if level == 4 { TARGET } else { 0x20_0000_0000 + level as u64 * 0x1000 };
                set_memory_type(&mut memory, address, device == Some(level));
            }
            let what = format!("S2PTW {protected}, device memory {device:?}");
            for write in [false, true] {
                let refused = protected && device.is_some_and(|level| level < 4);
                assert_eq!(ask(&[config, second], &memory, write, &what), !refused, "{what}");
            }
        }
    }
}

/// The same for context descriptors: a table of them, and one of them, in device memory.
#[test]
fn protected_walks_do_not_read_context_descriptors_from_device_memory() {
    let mut tried = 0;
    for seed in 0..40 {
        let Some((mut snapshot, nested)) = smmu_nested(seed) else { continue };
        let TableConfig::ArmStage2(second) = nested.second.config else { unreachable!() };
        if second.big_endian {
            continue;
        }
        let stages = [nested.second.config];
        let through = |snapshot: &stagecraft_tests::reference::snapshot::Snapshot, address| {
            Walker::new(&snapshot.memory, &stages).unwrap().translate(address, false).unwrap()
        };
        // As the unit's builder has it: the table of CDs, and those of requests without a substream and with 70.
        let [table, lower, upper] = [0x12_3000, 0x78_9000, 0x45_6000].map(|address| through(&snapshot, address));
        let ste = snapshot.memory.pages.keys().copied().find(|page| *page == 0x30_0000_0000).unwrap() + 0x38 * 64;
        let word = snapshot.memory.read(ste + 16, false).unwrap();
        for protected in [false, true] {
            snapshot.memory.write(ste + 16, word | u64::from(protected) << 54, false);
            for device in [None, Some(table), Some(lower), Some(upper)] {
                for page in [table, lower, upper] {
                    set_memory_type(&mut snapshot.memory, page, device == Some(page));
                }
                let mut loaded = snapshot.clone();
                loaded.map = vec![MemoryRange { kind: "ram".to_owned(), first: 0, last: (1 << 56) - 1 }];
                loaded.devices = vec![Device { label: "nic".to_owned(), id: 0x38 }];
                let folder = tempfile::tempdir().unwrap();
                loaded.write_snapshot(folder.path()).unwrap();
                let loaded = stagecraft::snapshot::Snapshot::load(folder.path()).unwrap();
                let guest = Guest::new(&loaded, configs::plugins()).unwrap();
                for (pasid, page) in [(None, lower), (Some(70), upper)] {
                    let refused = protected && (device == Some(table) || device == Some(page));
                    let what = format!("seed {seed}, S2PTW {protected}, device memory {device:x?}, pasid {pasid:?}");
                    let state = guest.stream(0x38, pasid).unwrap().state;
                    assert_eq!(matches!(state, State::Blocked(_)), refused, "{what}: {state:?}");
                    let naive = detect::resolve_pasid(&snapshot, 0x38, pasid.map(u64::from)).unwrap();
                    assert_eq!(matches!(naive, detect::Resolution::Blocked(_)), refused, "{what}: {naive:?}");
                }
            }
        }
        tried += 1;
    }
    assert!(tried > 5, "{tried}");
}
