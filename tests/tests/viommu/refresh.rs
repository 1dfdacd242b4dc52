//! A guest of s390: functions have anchors of tables in registers, and the instruction RPCIT, as records of 24 bytes, announces what comes and what goes. Entries are
//! written word by word from the Principles of Operation (SA22-7832, chapter 3, dynamic address translation): big-endian, absent where their bit for that is set.

use stagecraft::memory::PAGE;
use stagecraft::plugin::{Policy, Supervisor};
use stagecraft::viommu::Limits;

use super::behaviour::{ONE, Rig, TWO, plugin};
use super::guests::{Arch, DATA, Guest};

/// Tables of regions and segments have 2,048 entries, page tables 256.
const REGIONS: u64 = 0x60_0000;
const OTHER_REGIONS: u64 = 0x61_0000;
const SEGMENTS: u64 = 0x62_0000;
const PAGES: u64 = 0x63_0000;
const OTHER_PAGES: u64 = 0x63_0800;

/// The table-type bits of a region-third table; and of a region or segment entry, and of a page's, that it is not there; and that a page is read alone.
const THIRD: u64 = 1 << 2;
const NO_TABLE: u64 = 0x20;
const NO_PAGE: u64 = 0x400;
const PROTECTED: u64 = 0x200;

/// Addresses of a function.
const BASE: u64 = 1 << 32;
const LIMIT: u64 = (1 << 40) - 1;
const IOVA: u64 = 0x12_3456_7000;

/// Anchors: translation is on, and the table is one of third regions.
fn registers(roots: [u64; 2]) -> Vec<(String, u64)> {
    let of = |(id, root): (u64, u64)| {
        [("IOTA", root | 1 << 11 | THIRD), ("BASE", BASE), ("LIMIT", LIMIT)].map(|(name, value)| (format!("{name}_{id:x}"), value))
    };
    [ONE, TWO].into_iter().zip(roots).flat_map(of).collect()
}

fn put(guest: &Guest, slot: u64, entry: u64) {
    guest.store(slot, entry.swap_bytes());
}

/// A page, or none.
fn page(guest: &Guest, pages: u64, iova: u64, entry: u64) {
    put(guest, pages + (iova >> 12 & 0xff) * 8, entry);
}

/// Two functions, each with an anchor of its own; the tables hang together, and no page is there.
fn rig() -> Rig {
    let guest = Guest::new(Arch::Smmu);
    for (table, count, absent) in
        [(REGIONS, 2048, NO_TABLE | THIRD), (OTHER_REGIONS, 2048, NO_TABLE | THIRD), (SEGMENTS, 2048, NO_TABLE), (PAGES, 512, NO_PAGE)]
    {
        (0..count).for_each(|index| put(&guest, table + index * 8, absent));
    }
    for regions in [REGIONS, OTHER_REGIONS] {
        // All four parts of the table of segments are there.
        put(&guest, regions + (IOVA >> 31 & 0x7ff) * 8, SEGMENTS | THIRD | 3);
    }
    put(&guest, SEGMENTS + (IOVA >> 20 & 0x7ff) * 8, PAGES);
    let supervisor = Supervisor::new(plugin("s390-zpci"), Policy::default());
    let mut rig = Rig::with(guest, supervisor, "s390-zpci", registers([REGIONS, OTHER_REGIONS]), Limits::default());
    [ONE, TWO].iter().for_each(|id| drop(rig.viommu.connect(*id, false)));
    rig
}

fn refresh(id: u64, iova: u64, length: u64) -> Vec<u8> {
    [id, iova, length].iter().flat_map(|word| word.to_be_bytes()).collect()
}

fn both(rig: &Rig) -> [Option<u64>; 2] {
    [rig.reads(ONE, IOVA), rig.reads(TWO, IOVA)]
}

#[test]
fn what_a_function_refreshes_it_gets() {
    let mut rig = rig();
    assert_eq!(both(&rig), [None, None]);
    // What comes is there for whoever asked.
    page(&rig.guest, PAGES, IOVA, DATA);
    let handled = rig.viommu.commands(&refresh(ONE, IOVA, PAGE)).unwrap();
    assert_eq!((handled.illegal, handled.changes, both(&rig)), (None, 1, [Some(DATA), None]));
    rig.viommu.commands(&refresh(TWO, IOVA & !0xf_ffff, 1 << 20)).unwrap();
    assert_eq!((both(&rig), rig.writes(ONE, IOVA), rig.writes(TWO, IOVA)), ([Some(DATA); 2], true, true));
    // What changes and what goes, as well, and nothing before.
    page(&rig.guest, PAGES, IOVA, (DATA + 0x1000) | PROTECTED);
    assert_eq!(both(&rig), [Some(DATA); 2]);
    rig.viommu.commands(&refresh(TWO, IOVA, PAGE)).unwrap();
    assert_eq!((both(&rig), rig.writes(ONE, IOVA), rig.writes(TWO, IOVA)), ([Some(DATA), Some(DATA + 0x1000)], true, false));
    rig.viommu.commands(&[refresh(ONE, IOVA - PAGE, PAGE), refresh(ONE, IOVA + PAGE, 0x10 * PAGE)].concat()).unwrap();
    assert_eq!(both(&rig), [Some(DATA), Some(DATA + 0x1000)], "neighbours");
    page(&rig.guest, PAGES, IOVA, NO_PAGE);
    let all = |id| refresh(id, BASE, LIMIT - BASE + 1);
    let handled = rig.viommu.commands(&[all(ONE), all(TWO)].concat()).unwrap();
    assert_eq!((handled.spaces, both(&rig)), (2, [None, None]));
}

/// Whole tables that come, are others, and go.
#[test]
fn what_is_refreshed_may_be_a_table() {
    let mut rig = rig();
    page(&rig.guest, PAGES, IOVA, DATA);
    page(&rig.guest, OTHER_PAGES, IOVA, DATA + 0x2000);
    rig.viommu.commands(&refresh(ONE, IOVA, PAGE)).unwrap();
    assert_eq!(both(&rig), [Some(DATA), None]);
    put(&rig.guest, SEGMENTS + (IOVA >> 20 & 0x7ff) * 8, OTHER_PAGES);
    rig.viommu.commands(&refresh(ONE, IOVA, PAGE)).unwrap();
    assert_eq!(both(&rig), [Some(DATA + 0x2000), None]);
    put(&rig.guest, REGIONS + (IOVA >> 31 & 0x7ff) * 8, NO_TABLE | THIRD);
    rig.viommu.commands(&[refresh(ONE, IOVA, PAGE), refresh(TWO, IOVA, PAGE)].concat()).unwrap();
    assert_eq!(both(&rig), [None, Some(DATA + 0x2000)]);
}

#[test]
fn what_is_no_range_of_pages_ends_a_batch() {
    for (iova, length) in [(IOVA | 8, PAGE), (IOVA, 0), (IOVA, PAGE / 2), (u64::MAX - 0xfff, 2 * PAGE)] {
        let mut rig = rig();
        page(&rig.guest, PAGES, IOVA, DATA);
        let handled = rig.viommu.commands(&[refresh(ONE, IOVA, PAGE), refresh(TWO, iova, length), refresh(TWO, IOVA, PAGE)].concat()).unwrap();
        // Status 16: the range is not one of whole pages.
        assert_eq!((handled.illegal.map(|illegal| illegal.code), both(&rig)), (Some(16), [Some(DATA), None]), "{iova:#x}, {length:#x}");
    }
    assert!(rig().viommu.commands(&refresh(ONE, IOVA, PAGE)[..23]).is_err(), "a record that is cut off");
}

/// The instruction that registers an anchor (MPCIFC), which a VMM tells as registers.
#[test]
fn another_anchor_is_another_address_space() {
    let mut rig = rig();
    page(&rig.guest, PAGES, IOVA, DATA);
    [ONE, TWO].iter().for_each(|id| drop(rig.viommu.commands(&refresh(*id, IOVA, PAGE)).unwrap()));
    assert_eq!(both(&rig), [Some(DATA); 2]);
    put(&rig.guest, REGIONS + (IOVA >> 31 & 0x7ff) * 8, NO_TABLE | THIRD);
    // The first one goes to the second one's tables, which are as they were; then to none.
    rig.viommu.registers_changed(registers([OTHER_REGIONS; 2]));
    assert_eq!(both(&rig), [Some(DATA); 2]);
    rig.viommu.registers_changed(registers([REGIONS, OTHER_REGIONS]));
    assert_eq!(both(&rig), [None, Some(DATA)]);
    let off: Vec<(String, u64)> = registers([OTHER_REGIONS; 2]).into_iter().filter(|(name, _)| !name.ends_with(&format!("_{TWO:x}"))).collect();
    rig.viommu.registers_changed(off);
    assert_eq!(both(&rig), [Some(DATA), None]);
}
