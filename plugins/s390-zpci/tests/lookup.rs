//! Registration: every way to a table, and every way to be refused.
#![allow(clippy::unwrap_used, missing_docs)]

use proptest::prelude::*;
use stagecraft_plugin_s390_zpci::dma::Dma;
use stagecraft_plugin_s390_zpci::unit::S390Zpci;
use stagecraft_sdk::{
    Direct, Error, Format, GuestMemory, Meaning, Outcome, PlaceToBind, Registers, Requester, TableConfig, Translated, Unit, Window,
};

/// Nothing may be read: a function's table is known from its registers alone.
struct NoMemory;

impl GuestMemory for NoMemory {
    fn read(&mut self, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        panic!("{address:#x} was read")
    }

    fn read_through(&mut self, _: &TableConfig, address: u64, _: u32) -> Result<Vec<u8>, Error> {
        panic!("{address:#x} was read")
    }
}

const ID: u64 = 0x1_00a0;
const TABLE: u64 = 0x1234_4000;
const BASE: u64 = 0x1_0000_0000;
const LIMIT: u64 = 0x1_37ff_ffff;

fn registers(list: &[(&str, u64)]) -> Registers {
    list.iter().map(|&(name, value)| (name.to_owned(), value)).collect()
}

fn ask(list: &[(&str, u64)]) -> Result<Outcome, Error> {
    S390Zpci::lookup(&registers(list), Requester { id: ID, pasid: None }, &mut NoMemory)
}

fn registered(iota: u64, base: u64, limit: u64) -> Result<Outcome, Error> {
    ask(&[("IOTA_100a0", iota), ("BASE_100a0", base), ("LIMIT_100a0", limit)])
}

fn settings(outcome: Result<Outcome, Error>) -> String {
    let Ok(Outcome::Tables(Translated { tables, .. })) = outcome else { panic!("no tables: {outcome:?}") };
    let [table] = &tables[..] else { panic!("{tables:?}") };
    assert_eq!(table.format, Dma::NAME);
    Dma::open(&table.settings).unwrap();
    let one = |(name, value)| if value > 9 { format!("{name}={value:#x}") } else { format!("{name}={value}") };
    table.settings.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn refused(outcome: Result<Outcome, Error>) -> String {
    match outcome {
        Err(Error::Invalid(invalid)) => invalid.field,
        other => panic!("{other:?}"),
    }
}

fn is_unsupported(outcome: &Result<Outcome, Error>) -> bool {
    matches!(outcome, Err(Error::Unsupported(_)))
}

#[test]
fn an_anchor_names_its_table() {
    let whole = |iota| settings(registered(iota, 0, u64::MAX));
    let root = "root=0x12344000 first-iova=0";
    assert_eq!(whole(TABLE | 0x81c), format!("levels=1 {root} last-iova=0xfffff"));
    assert_eq!(whole(TABLE | 0x800), format!("levels=2 {root} last-iova=0x7fffffff"));
    assert_eq!(whole(TABLE | 0x804), format!("levels=3 {root} last-iova=0x3ffffffffff"));
    assert_eq!(whole(TABLE | 0x808), format!("levels=4 {root} last-iova=0x1fffffffffffff"));
    assert_eq!(whole(TABLE | 0x80c), format!("levels=5 {root} last-iova=0xffffffffffffffff"));
    assert_eq!(whole(TABLE | 0xa04), format!("levels=3 {root} last-iova=0x3ffffffffff read-only=1"));
}

#[test]
fn an_anchor_of_something_else_is_not_guessed_at() {
    for other in [0x81d, 0x81e] {
        assert!(is_unsupported(&registered(TABLE | other, BASE, LIMIT)), "{other:#x}");
    }
    for reserved in [0x818, 0x813, 0x817] {
        assert_eq!(refused(registered(TABLE | reserved, BASE, LIMIT)), "IOTA_100a0", "{reserved:#x}");
    }
}

fn window(outcome: Result<Outcome, Error>) -> (u64, u64, u64, bool) {
    let Ok(Outcome::Direct(Direct { windows, intercepts })) = outcome else { panic!("not direct: {outcome:?}") };
    let [Window { first, last, address, attributes }] = windows[..] else { panic!("{windows:?}") };
    assert!(intercepts.is_empty() && attributes.read && !attributes.execute);
    (first, last, address, attributes.write)
}

#[test]
fn an_anchor_may_designate_one_frame() {
    for designation in [0x810, 0x814] {
        let ask = |low: u64, base, limit| registered(0x1_8765_4000 | designation | low, base, limit);
        assert_eq!(window(ask(0, BASE, BASE + 0xfff)), (BASE, BASE + 0xfff, 0x1_8765_4000, true));
        assert_eq!(window(ask(1, BASE, BASE + 0xf_ffff)), (BASE, BASE + 0xf_ffff, 0x1_8760_0000, true));
        assert_eq!(window(ask(2, BASE, BASE + 0x2fff)), (BASE, BASE + 0x2fff, 0x1_8000_0000, true));
        assert_eq!(window(ask(0x200, BASE, BASE + 5)), (BASE, BASE + 0xfff, 0x1_8765_4000, false), "protected");
        assert!(is_unsupported(&ask(0, BASE, BASE + 0x1000)), "more than a frame");
        assert!(is_unsupported(&ask(1, BASE + 0x1000, BASE + 0x1fff)), "not at its beginning");
    }
}

#[test]
fn a_bare_address_is_the_smallest_region_table_that_drivers_would_choose() {
    let bare = |limit| settings(registered(TABLE, BASE, limit));
    let root = "root=0x12344000 first-iova=0x100000000";
    assert_eq!(bare(LIMIT), format!("levels=3 {root} last-iova=0x137ffffff"));
    assert_eq!(bare((1 << 42) - 1), format!("levels=3 {root} last-iova=0x3ffffffffff"));
    assert_eq!(bare(1 << 42), format!("levels=4 {root} last-iova=0x40000000fff"));
    assert_eq!(bare(1 << 53), format!("levels=5 {root} last-iova=0x20000000000fff"));
    for low in [1, 0x404, 0x1000, 0x2000] {
        assert_eq!(refused(registered(TABLE | low, BASE, LIMIT)), "IOTA_100a0", "{low:#x}");
    }
}

#[test]
fn bounds_are_whole_pages() {
    assert_eq!(settings(registered(TABLE, 0x1fff, 0x2000)), "levels=3 root=0x12344000 first-iova=0x1000 last-iova=0x2fff");
    assert_eq!(refused(registered(TABLE, BASE, BASE - 1)), "LIMIT_100a0");
    assert_eq!(refused(registered(TABLE | 0x800, BASE, LIMIT)), "BASE_100a0");
}

#[test]
fn a_function_that_is_not_registered_is_blocked() {
    for list in [&[][..], &[("IOTA_100a1", TABLE), ("BASE_100a1", BASE), ("LIMIT_100a1", LIMIT)], &[("IOTA_100a0", 0)]] {
        let Ok(Outcome::Blocked(blocked)) = ask(list) else { panic!("{list:?}") };
        assert_eq!(blocked.event, "INVALAS");
    }
    let requester = Requester { id: ID, pasid: Some(1) };
    let list = registers(&[("IOTA_100a0", TABLE), ("BASE_100a0", BASE), ("LIMIT_100a0", LIMIT)]);
    assert!(matches!(S390Zpci::lookup(&list, requester, &mut NoMemory), Ok(Outcome::Blocked(_))));
    assert_eq!(S390Zpci::pasids(&list, ID, &mut NoMemory), Ok(Vec::new()));
}

#[test]
fn a_function_without_translation_reaches_absolute_addresses_at_an_offset() {
    assert_eq!(registered(0, 0, u64::MAX), Ok(Outcome::Bypass));
    assert_eq!(window(registered(0, BASE, LIMIT)), (BASE, LIMIT, 0, true));
    assert_eq!(window(registered(0, 0, LIMIT)), (0, LIMIT, 0, true));
    assert_eq!(window(registered(0, 0x1234, 0x5678)), (0x1000, 0x5fff, 0, true));
    assert_eq!(refused(registered(0, BASE, BASE - 1)), "LIMIT_100a0");
}

#[test]
fn all_three_registers_are_needed_and_digits_may_be_of_either_case() {
    assert_eq!(refused(ask(&[("IOTA_100a0", TABLE), ("BASE_100a0", BASE)])), "LIMIT_100a0");
    assert_eq!(refused(ask(&[("IOTA_100a0", TABLE), ("LIMIT_100a0", LIMIT)])), "BASE_100a0");
    assert_eq!(refused(ask(&[("BASE_100a0", BASE), ("LIMIT_100a0", LIMIT)])), "IOTA_100a0");
    assert!(settings(ask(&[("IOTA_100A0", TABLE), ("BASE_100A0", BASE), ("LIMIT_100a0", LIMIT)])).starts_with("levels=3 root=0x12344000"));
}

#[test]
fn the_kernel_has_no_such_tables() {
    assert!(matches!(S390Zpci::offers(1, &[0; 64]), Err(Error::Unsupported(_))));
    assert!(matches!(S390Zpci::bind_data(&TableConfig::new(Dma::NAME, &[]), &PlaceToBind::default()), Err(Error::Unsupported(_))));
}

proptest! {
    #[test]
    fn any_registers_have_an_answer_that_opens(iota: u64, base: u64, limit: u64, keep in 0_u32..64, designation in 0_u64..32) {
        // Random words are rarely anchors: half of them get the bits of one.
        let anchors = [iota, (iota & !0xfff) | 0x800 | designation, iota & !0x3fff];
        for iota in anchors {
            let outcome = registered(iota, base >> keep, limit);
            if let Ok(Outcome::Tables(Translated { tables, .. })) = outcome {
                let root = Dma::open(&tables[0].settings).unwrap().geometry().roots.remove(0);
                prop_assert!(root.first <= root.last && root.first >= (base >> keep) & !0xfff && root.last <= limit | 0xfff);
            }
        }
    }

    /// Tables full of random bytes: every entry is judged, at the level that entries led to, without a loop or a panic.
    #[test]
    fn random_tables_have_an_end(bytes in proptest::collection::vec(any::<u64>(), 64), partial in 0_u64..2) {
        let settings = [("levels".to_owned(), 5), ("partial-tables".to_owned(), partial)];
        let format = Dma::open(&settings.into_iter().collect()).unwrap();
        for start in &bytes {
            let (mut level, mut inherited, mut entry) = (4, 0, *start);
            for step in 0_usize.. {
                prop_assert!(step < 5);
                let kind = &format.geometry().levels[usize::from(level)];
                let shape = kind.shapes.iter().find(|shape| entry & shape.mask == shape.value).unwrap();
                let address = shape.address.iter().fold(0, |bits, s| bits | (u64::MAX >> (64 - s.width)) << s.entry_lsb);
                let Meaning::Table { next, inherited: below } = format.decode(level, inherited, entry & !address) else { break };
                prop_assert!(next.level < level);
                (level, inherited) = (next.level, below);
                entry = bytes[(entry >> 14) as usize % bytes.len()];
            }
        }
    }
}
