//! What real units offer, and what is picked for real guests: the result says everything that was promised.
#![allow(clippy::unwrap_used)]

mod fixtures;

use stagecraft::convert::{Target, convert};
use stagecraft::guest::{Guest, State};
use stagecraft::memory::{Budget, Limits};
use stagecraft::offers::{Choice, Hardware, OffersError, beyond, offers, pick};
use stagecraft::plugin::{Config, Engine, Plugins};
use stagecraft::snapshot::{Snapshot, Source, store};
use stagecraft::table::{Collector, Mapping};
use stagecraft::{Gpa, Span};

const NEST: u64 = 1 << 26;

/// `struct iommu_hw_info_vtd`.
fn vtd(flags: u32, cap: u64, ecap: u64) -> Hardware {
    let info = [u64::from(flags), cap, ecap].iter().flat_map(|word| word.to_le_bytes()).collect();
    Hardware { kind: 1, info }
}

/// `struct iommu_hw_info_arm_smmuv3`.
fn smmu(idr: [u32; 6]) -> Hardware {
    let info = [0, 0].iter().chain(&idr).chain(&[0, 0]).flat_map(|word| word.to_le_bytes()).collect();
    Hardware { kind: 2, info }
}

/// `struct iommu_hw_info_amd`.
fn amd(features: u64, features2: u64) -> Hardware {
    Hardware { kind: 4, info: [features, features2].iter().flat_map(|word| word.to_le_bytes()).collect() }
}

fn register(snapshot: &Snapshot, name: &str) -> u64 {
    let Source::Unit { registers, .. } = &snapshot.source else { panic!("a real guest") };
    registers.iter().find(|(known, _)| known == name).map_or(0, |(_, value)| *value)
}

fn plugins() -> Plugins {
    Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap()
}

/// Units that take tables: QEMU's capability registers with nesting added, a real-looking SMMUv3, and an AMD unit with guest tables.
fn nesting_units() -> Vec<(&'static str, Hardware)> {
    vec![
        ("VT-d, 4 levels", vtd(0, 0x01d2_008c_222f_0606, 0x8800_0000_0f42 | NEST)),
        ("VT-d, 5 levels", vtd(1, 0x11d2_008c_2238_0e06, 0x0001_8800_0000_0f42 | NEST)),
        ("SMMUv3", smmu([0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x74])),
        ("SMMUv3, 16K and 64K", smmu([0x0d44_101b, 0x0273_0010, 0, 0x1414, 0, 0x65])),
        ("AMD", amd(1 << 4 | 1 << 48 | 1 << 3, 1 << 3)),
    ]
}

#[test]
fn the_units_of_the_snapshots_offer_what_they_have() {
    let plugins = plugins();
    for fixture in fixtures::all() {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let Source::Unit { kind, .. } = &snapshot.source else { panic!("a real guest") };
        let hardware = match &**kind {
            "intel-vtd" => vtd(0, register(&snapshot, "CAP"), register(&snapshot, "ECAP")),
            _ => smmu(["IDR0", "IDR1", "IDR2", "IDR3", "IDR4", "IDR5"].map(|name| register(&snapshot, name) as u32)),
        };
        let offered = offers(&plugins, &hardware).unwrap();
        // QEMU's VT-d has no nesting; its SMMUv3 has, if both stages are there.
        let both_stages = &**kind == "arm-smmuv3" && register(&snapshot, "IDR0") & 3 == 3;
        assert_eq!(offered.len(), usize::from(both_stages), "{}", fixture.name);
        for offer in offered {
            let limit = |name: &str| offer.limits.iter().find(|(known, _)| known == name).unwrap().1;
            assert_eq!((limit("granule"), limit("output-bits"), limit("input-bits")), (4096 + 16384 + 65536, 44, 48), "{}", fixture.name);
        }
    }
}

#[test]
fn errata_and_limits_are_said() {
    let plugins = plugins();
    let offer = |hardware: &Hardware| offers(&plugins, hardware).unwrap().pop().unwrap();
    let [old, new] = [0, 1].map(|flags| offer(&vtd(flags, 0x01d2_008c_222f_0606, 0x0001_8800_0000_0f42 | NEST)));
    assert!(old.conditions.is_empty() && new.conditions.len() == 1 && new.conditions[0].contains("772415"), "{:?}", new.conditions);
    let limit = |offer: &stagecraft::plugin::Offer, name: &str| offer.limits.iter().find(|(known, _)| known == name).unwrap().1;
    assert_eq!((limit(&old, "levels"), limit(&old, "output-bits"), limit(&old, "page-1g")), (4, 48, 1));
    assert!(matches!(offers(&plugins, &Hardware { kind: 77, info: vec![0; 64] }), Err(OffersError::UnknownKind(77))));
    assert!(matches!(offers(&plugins, &Hardware { kind: 1, info: vec![0; 3] }), Err(OffersError::Call(_))), "too few bytes");
}

/// All that a device reaches, and the leaves that only privileged requests reach left out.
fn reached(guest: &Guest<'_>, id: u64, pasid: Option<u32>) -> Option<Vec<Mapping>> {
    let State::Translated(configs) = guest.stream(id, pasid).unwrap().state else { return None };
    let mut space = guest.open(&configs).unwrap();
    let mut collector = Collector::new(space.privileged(), 0);
    space.walk(&guest.memory(), guest.map(), Span::ALL, &Budget::new(Limits { tables: 1 << 20, ..Limits::default() }), &mut collector).unwrap();
    Some(collector.into_mappings())
}

#[test]
fn what_is_picked_says_everything_that_was_promised() {
    let plugins = plugins();
    let (mut native, mut converted, mut refused) = (0, 0, 0);
    for fixture in fixtures::all().into_iter().filter(|fixture| !fixture.big) {
        let snapshot = Snapshot::load(&fixture.path).unwrap();
        let guest = Guest::new(&snapshot, &plugins).unwrap();
        let streams = guest.streams().unwrap();
        for (unit, hardware) in nesting_units() {
            let what = format!("{} on {unit}", fixture.name);
            let offered = offers(&plugins, &hardware).unwrap();
            match pick(&guest, &streams, &offered, 1 << 28).unwrap() {
                Choice::Native { offer } => {
                    native += 1;
                    let own = streams.iter().filter_map(|stream| if let State::Translated(configs) = &stream.state { Some(configs) } else { None });
                    for configs in own {
                        assert!(configs.len() == 1 && configs[0].format == offer.format && beyond(&configs[0], None, &offer).is_empty(), "{what}");
                    }
                }
                Choice::Convert { offer, target, conversion, .. } => {
                    converted += 1;
                    assert!(conversion.tables.iter().all(|table| table.built.losses.refused_bytes() == 0), "{what}");
                    let folder = tempfile::tempdir().unwrap();
                    let path = folder.path().join("converted");
                    store(&path, false, "", &conversion.map, &snapshot.devices, &conversion.streams, &conversion.arena).unwrap();
                    let after = Snapshot::load(&path).unwrap();
                    let after = Guest::new(&after, &plugins).unwrap();
                    for stream in &streams {
                        let (before, now) = (reached(&guest, stream.id, stream.pasid), reached(&after, stream.id, stream.pasid));
                        assert_eq!(before, now, "{what}: device {:#x}", stream.id);
                    }
                    for table in &conversion.tables {
                        assert_eq!(beyond(&table.table, None, &offer), [""; 0], "{what}");
                    }
                    let again = convert(&guest, &streams, &target, &mut |_, _| {}).unwrap();
                    assert_eq!(again.tables.len(), conversion.tables.len());
                }
                Choice::Nothing(rejections) => {
                    refused += 1;
                    assert!(!rejections.is_empty() && rejections.iter().all(|rejection| rejection.reasons.len() > 1), "{what}: {rejections:?}");
                    // Write-only doorbells and buffers, pages smaller than the unit has, addresses beyond its output or its levels.
                    let words = rejections.iter().map(ToString::to_string).collect::<String>();
                    assert!(["permission", "granule", "output-range", "and the unit has"].iter().any(|word| words.contains(word)), "{what}: {words}");
                }
            }
        }
    }
    println!("{native} bound as they are, {converted} converted, {refused} refused");
    assert!(native > 0 && converted > 0 && refused > 0);
}

#[test]
fn nothing_offered_is_nothing_picked() {
    let plugins = plugins();
    let snapshot = Snapshot::load(&fixtures::small().path).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let streams = guest.streams().unwrap();
    assert!(matches!(pick(&guest, &streams, &[], Target::new("").table_bytes).unwrap(), Choice::Nothing(rejections) if rejections.is_empty()));
}

/// A device whose structures are not all there may have tables that nobody looked at.
#[test]
fn nothing_is_picked_for_half_a_guest() {
    let plugins = plugins();
    let snapshot = Snapshot::load(&fixtures::small().path).unwrap();
    let guest = Guest::new(&snapshot, &plugins).unwrap();
    let mut streams = guest.streams().unwrap();
    let mut native = 0;
    for (unit, hardware) in nesting_units() {
        let offered = offers(&plugins, &hardware).unwrap();
        streams[0].missing = None;
        native += u32::from(matches!(pick(&guest, &streams, &offered, 1 << 28).unwrap(), Choice::Native { .. }));
        streams[0].missing = Some(Gpa(0x1234));
        let error = pick(&guest, &streams, &offered, 1 << 28).expect_err(unit);
        assert_eq!(error.to_string(), "the snapshot lacks page 0x1000, which the tables of device 0x0 need", "{unit}");
    }
    assert!(native > 0, "also where the tables would be bound as they are");
}
