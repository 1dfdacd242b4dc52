//! The table engine with format crates compiled natively: what is built is what is walked, whatever the page sizes.
#![allow(clippy::unwrap_used)]

mod native;

use native::Native;
use proptest::prelude::*;
use stagecraft::memory::{Budget, Limits, MemoryMap, VmMemory};
use stagecraft::table::{AddressSpace, Arena, Builder, Cause, Collector, FaultKind, Format, Loss, Mapping, Piece, Table};
use stagecraft::{Access, Attributes, Iova, Span};
use stagecraft_plugin_arm_smmuv3::Stage1;
use stagecraft_plugin_intel_vtd::first_stage::FirstStage;
use stagecraft_plugin_intel_vtd::second_stage::SecondStage;
use stagecraft_sdk::{Format as _, Settings};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A target: opens the format with the address of a root.
type Target = Box<dyn Fn(&[(String, u64)]) -> Box<dyn Format>>;

fn target<F: stagecraft_sdk::Format + Send + 'static>(settings: &'static [(&'static str, u64)]) -> Target {
    Box::new(move |roots| {
        let all = settings.iter().map(|(name, value)| ((*name).to_owned(), *value)).chain(roots.iter().cloned());
        let settings: Settings = all.collect();
        Box::new(Native(F::open(&settings).unwrap()))
    })
}

fn targets() -> Vec<(&'static str, Target)> {
    vec![
        ("vtd first stage, 4 levels", target::<FirstStage>(&[("levels", 4)])),
        ("vtd first stage, 5 levels", target::<FirstStage>(&[("levels", 5)])),
        ("vtd second stage, 3 levels", target::<SecondStage>(&[("levels", 3)])),
        ("vtd second stage, 4 levels", target::<SecondStage>(&[("levels", 4)])),
        ("vtd second stage, 5 levels", target::<SecondStage>(&[("levels", 5)])),
        ("vtd second stage without large pages", target::<SecondStage>(&[("levels", 4), ("page-2m", 0), ("page-1g", 0)])),
    ]
}

fn everything() -> MemoryMap {
    MemoryMap::everything(52)
}

/// Builds `pieces` and walks the result: the mappings, and what was refused.
fn round_trip(open: &Target, pieces: &[Piece]) -> (Vec<Mapping>, stagecraft::table::Built, u64) {
    let mut arena = Arena::new(1 << 32, 64 << 20);
    let mut builder = Builder::new(open(&[]), &mut arena).unwrap();
    for piece in pieces {
        builder.map(piece).unwrap();
    }
    let built = builder.finish().unwrap();
    let roots: Vec<(String, u64)> = built.roots.iter().map(|(name, root)| (name.clone(), root.0)).collect();
    let mut table = Table::open(open(&roots)).unwrap();
    let mut collector = Collector::new(false, 100);
    let budget = Budget::new(Limits::default());
    table.walk(&arena, &everything(), Span::ALL, &budget, &mut collector).unwrap();
    assert_eq!(collector.faults(), []);
    // Every mapping is also found one by one, at both ends.
    let mut space = AddressSpace::single(table);
    for mapping in collector.mappings() {
        for offset in [0, mapping.iova.length_minus_one()] {
            let iova = Iova(mapping.iova.first + offset);
            let access = Access { read: mapping.access.read, write: mapping.access.write };
            let found = space.translate(&arena, &everything(), iova, access, &budget).unwrap().unwrap();
            assert_eq!(found.address.0, mapping.address + offset);
        }
    }
    (collector.into_mappings(), built, arena.bytes())
}

/// Ascending pieces with gaps: pages and larger ranges, some continuing the one before, at both ends of the address space.
fn pieces() -> impl Strategy<Value = Vec<Piece>> {
    let step = (0_u64..4, 0_u64..5, 0_u8..4, any::<u32>(), 0_u8..3);
    (
        prop::collection::vec(step, 1..60),
        prop::sample::select(vec![0_u64, 0x1_3fff_f000, 0x7f_ffc0_0000, 0x7fff_ff00_0000, 0xffff_8000_0000_0000, 0xffff_ffff_c000_0000]),
    )
        .prop_map(|(steps, start)| {
            let mut pieces: Vec<Piece> = Vec::new();
            let mut next = Some(start);
            for (gap, pages, kind, address, permission) in steps {
                let Some(mut first) = next else { break };
                let size: u64 = match kind {
                    0 | 1 => (pages + 1) << 12,
                    2 => (pages + 1) << 21,
                    _ => 1 << 30,
                };
                if kind >= 2 && gap > 1 {
                    first = match first.checked_next_multiple_of(if kind == 2 { 1 << 21 } else { 1 << 30 }) {
                        Some(first) => first,
                        None => break,
                    };
                }
                let Some(first) = first.checked_add(gap.saturating_sub(1) << 12) else { break };
                let Some(last) = first.checked_add(size - 1) else { break };
                let continued = pieces.last().filter(|_| gap == 0).map(|last| last.address + last.iova.length_minus_one() + 1);
                let aligned = (u64::from(address) << 12)
                    & if kind == 2 {
                        !0x1f_ffff
                    } else if kind == 3 {
                        !0x3fff_ffff
                    } else {
                        !0
                    };
                let attributes = match permission {
                    0 => Attributes::READ,
                    _ => Attributes::READ.with(Attributes::WRITE),
                };
                let attributes = attributes.with(Attributes::COHERENT).with(Attributes::ACCESSED);
                pieces.push(Piece { iova: Span { first, last }, address: continued.unwrap_or(aligned), attributes });
                next = last.checked_add(1);
            }
            pieces
        })
}

fn merged(pieces: &[Piece], windows: &[Span]) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for piece in pieces {
        for window in windows {
            let Some(iova) = piece.iova.intersection(*window) else { continue };
            let mapping = Mapping { iova, address: piece.address + (iova.first - piece.iova.first), access: piece.attributes.access(false) };
            match mappings.last_mut() {
                Some(last)
                    if last.iova.last.checked_add(1) == Some(iova.first)
                        && last.access == mapping.access
                        && last.address + last.iova.length_minus_one() + 1 == mapping.address =>
                {
                    last.iova.last = iova.last;
                }
                _ => mappings.push(mapping),
            }
        }
    }
    mappings
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_built_is_what_is_walked(pieces in pieces()) {
        for (name, open) in targets() {
            let (walked, built, bytes) = round_trip(&open, &pieces);
            let geometry = open(&[]).geometry().unwrap();
            let mut windows: Vec<Span> = geometry.roots.iter().map(|root| Span { first: root.first, last: root.last }).collect();
            // What units never look up in such tables is nobody's.
            for hole in &geometry.untranslated {
                let without = |window: Span| match window.intersection(*hole) {
                    None => vec![window],
                    Some(_) => {
                        let before = (window.first < hole.first).then(|| Span { first: window.first, last: hole.first - 1 });
                        let behind = (window.last > hole.last).then(|| Span { first: hole.last + 1, last: window.last });
                        before.into_iter().chain(behind).collect()
                    }
                };
                windows = windows.into_iter().flat_map(without).collect();
            }
            let expected = merged(&pieces, &windows);
            prop_assert_eq!(&walked, &expected, "{}", name);
            // What lies outside was counted, byte by byte.
            let total: u128 = pieces.iter().map(|piece| u128::from(piece.iova.length_minus_one()) + 1).sum();
            let mapped: u128 = expected.iter().map(|mapping| u128::from(mapping.iova.length_minus_one()) + 1).sum();
            prop_assert_eq!(built.losses.refused_bytes(), total - mapped, "{}", name);
            prop_assert_eq!(built.losses.get(Loss::InputRange).map_or(0, |count| count.bytes), total - mapped);

            // The same mappings, page by page: the same table, to the byte, because it depends on the mappings alone.
            let small: Vec<Piece> = pieces.iter().filter(|piece| piece.iova.length_minus_one() < 8 << 21).flat_map(|piece| {
                (0..=piece.iova.length_minus_one() >> 12).map(|page| Piece {
                    iova: Span::of_log2(piece.iova.first + (page << 12), 12), address: piece.address + (page << 12), attributes: piece.attributes,
                })
            }).collect();
            let large: Vec<Piece> = pieces.iter().filter(|piece| piece.iova.length_minus_one() < 8 << 21).copied().collect();
            let (one, other) = (round_trip(&open, &small), round_trip(&open, &large));
            prop_assert_eq!(one.0, other.0);
            prop_assert_eq!(one.2, other.2);
            prop_assert_eq!(one.1.leaves, other.1.leaves);
            let _ = bytes;
        }
    }

    #[test]
    fn a_table_converted_by_walking_is_the_table_built_directly(pieces in pieces()) {
        // Source tables without large pages, so that the run-wise way is taken and full tables are promoted.
        let source = target::<SecondStage>(&[("levels", 5), ("page-2m", 0), ("page-1g", 0)]);
        let small: Vec<Piece> = pieces.iter().filter(|piece| piece.iova.length_minus_one() < 1 << 30).copied().collect();
        let mut source_arena = Arena::new(1 << 32, 64 << 20);
        let mut builder = Builder::new(source(&[]), &mut source_arena).unwrap();
        for piece in &small {
            builder.map(piece).unwrap();
        }
        let built = builder.finish().unwrap();
        let roots: Vec<(String, u64)> = built.roots.iter().map(|(name, root)| (name.clone(), root.0)).collect();
        let inside: Vec<Piece> = small.iter().filter(|piece| piece.iova.last < 1 << 57).copied().collect();
        for (name, open) in targets() {
            let mut arena = Arena::new(1 << 33, 64 << 20);
            let mut builder = Builder::new(open(&[]), &mut arena).unwrap();
            let mut table = Table::open(source(&roots)).unwrap();
            table.walk(&source_arena, &everything(), Span::ALL, &Budget::new(Limits::default()), &mut builder).unwrap();
            let converted = builder.finish().unwrap();
            let direct = round_trip(&open, &inside);
            prop_assert_eq!(converted.leaves, direct.1.leaves, "{}", name);
            prop_assert_eq!(arena.bytes(), direct.2, "{}", name);
            let roots: Vec<(String, u64)> = converted.roots.iter().map(|(name, root)| (name.clone(), root.0)).collect();
            let mut collector = Collector::new(false, 10);
            Table::open(open(&roots)).unwrap().walk(&arena, &everything(), Span::ALL, &Budget::new(Limits::default()), &mut collector).unwrap();
            prop_assert_eq!(collector.mappings(), &direct.0[..], "{}", name);
        }
    }
}

#[test]
fn the_largest_page_is_picked() {
    let open = target::<FirstStage>(&[("levels", 4)]);
    let attributes = Attributes::READ.with(Attributes::WRITE);
    let piece = |first: u64, last: u64, address: u64| Piece { iova: Span { first, last }, address, attributes };
    // 1 GiB and a page on either side, page by page.
    let pages: Vec<Piece> = (0x3_ffff_u64..=0x8_0000).map(|page| piece(page << 12, (page << 12) + 0xfff, 0x4000_0000 + (page << 12))).collect();
    let (_, built, _) = round_trip(&open, &pages);
    assert_eq!(built.leaves, 3, "two pages and one gigabyte");
    let (_, built, _) = round_trip(&open, &[piece(0x3fff_f000, 0x8000_0fff, 0x7fff_f000)]);
    assert_eq!(built.leaves, 3);
    // The same with addresses that allow 2 MiB pages only.
    let (_, built, _) = round_trip(&open, &[piece(0x4000_0000, 0x7fff_ffff, 0x20_0000)]);
    assert_eq!(built.leaves, 512);
}

#[test]
fn order_is_enforced() {
    let open = target::<FirstStage>(&[("levels", 4)]);
    let mut arena = Arena::new(1 << 32, 64 << 20);
    let mut builder = Builder::new(open(&[]), &mut arena).unwrap();
    let piece = |first: u64| Piece { iova: Span::of_log2(first, 12), address: 0x5000, attributes: Attributes::READ };
    builder.map(&piece(0x2000)).unwrap();
    builder.map(&piece(0x1000)).unwrap();
    let error = builder.finish().unwrap_err().to_string();
    assert!(error.contains("ascending"), "{error}");
}

#[test]
fn memory_for_tables_is_bounded() {
    let open = target::<SecondStage>(&[("levels", 4), ("page-2m", 0), ("page-1g", 0)]);
    let mut arena = Arena::new(1 << 32, 2 << 20);
    let mut builder = Builder::new(open(&[]), &mut arena).unwrap();
    let all = Piece { iova: Span { first: 0, last: (1 << 39) - 1 }, address: 0, attributes: Attributes::READ };
    builder.map(&all).unwrap();
    assert!(builder.finish().unwrap_err().to_string().contains("no room"));
}

#[test]
fn settings_are_suggested_for_what_is_needed() {
    let need = stagecraft_sdk::Need { last_low: Some(1 << 50), first_high: None, last_address: 0xffff, alignment_log2: 12 };
    let settings = SecondStage::suggest(&Settings::default(), &need).unwrap();
    assert_eq!(settings.get("levels"), Some(5));
}

/// The output size counts before the Access flag, wherever the address is: Arm DDI 0487, the priorities of faults of a translation stage.
#[test]
fn an_address_that_is_too_large_counts_before_the_access_flag() {
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0x1000), 0x2000)]).unwrap();
    memory.write_obj(0x2003_u64, GuestAddress(0x1000)).unwrap();
    let settings: [(&str, u64); 4] = [("granule", 4096), ("input-bits", 25), ("output-bits", 40), ("root", 0x1000)];
    let settings: Settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let found = |entry: u64| {
        memory.write_obj(entry, GuestAddress(0x2000)).unwrap();
        let table = Table::open(Box::new(Native(Stage1::open(&settings).unwrap()))).unwrap();
        let budget = Budget::new(Limits::default());
        let translated = AddressSpace::single(table).translate(&VmMemory(&memory), &everything(), Iova(0x123), Access::READ, &budget).unwrap();
        translated.map(|translation| translation.address.0).map_err(|fault| fault.cause)
    };
    // Bits 1:0 valid, 6 for unprivileged requests, 10 the Access flag.
    let (page, accessed, beyond) = (0x5043, 0x400, 1 << 40);
    assert_eq!(found(page | accessed), Ok(0x5123));
    assert_eq!(found(page), Err(Cause::Entry(FaultKind::AccessFlag)));
    assert_eq!(found(page | accessed | beyond), Err(Cause::Entry(FaultKind::AddressSize)));
    assert_eq!(found(page | beyond), Err(Cause::Entry(FaultKind::AddressSize)));
    assert_eq!(found((page | beyond) & !3), Err(Cause::Entry(FaultKind::Translation)));
}
