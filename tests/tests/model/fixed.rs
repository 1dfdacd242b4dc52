//! What random guests found, or find too seldom.

use stagecraft::ioasid::Strategy;
use stagecraft_tests::reference::Access;
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::tables::riscv::Entries;
use stagecraft_tests::reference::tables::{AmdV2, ArmHalf, ArmStage1, ArmStage2, Dart, Packing, RiscvFirst, S390, TableConfig, VtdSecond};

use crate::coverage::Coverage;
use crate::go_through;
use crate::guest::Wish;
use crate::machine::HOSTS;
use crate::operation::{Edit, How, Operation, Setup, Telling};
use crate::session::Session;

/// At the first place of a window, or the last one.
fn map(place: u8, size: u8, target: u16) -> Operation {
    Operation::Edit(Edit::Map(Wish { root: 0, place, step: 0, size, target, access: 0, restricted: false, skip: false, replace: false }))
}

const TELL: Operation = Operation::Tell { space: 0, telling: Telling::Ranges, shuffle: 0 };

/// On hosts of this kind, or of every kind.
fn run(config: TableConfig, hosts: &[u8], operations: &[Operation]) {
    run_behind(config, None, hosts, operations);
}

/// The same behind a second stage.
fn run_behind(config: TableConfig, second: Option<TableConfig>, hosts: &[u8], operations: &[Operation]) {
    let coverage = Coverage::default();
    for host in hosts {
        for how in [How::Best, How::Nested, How::Areas] {
            let session = Session::of(config, second.map(|second| (second, 0)), Setup::simple(*host, how), Rng::new(7), &coverage)
                .and_then(|session| go_through(session, operations));
            session.unwrap_or_else(|error| panic!("{} {how:?}: {error}", HOSTS[usize::from(*host)]));
        }
    }
}

/// A large page that begins before the first IOVA: what is mapped is its rest, from the middle of where it leads to.
#[test]
fn a_page_that_is_cut_comes_and_goes() {
    let config = TableConfig::S390(S390 {
        root: 0,
        levels: 3,
        first_iova: 0x4_5000,
        last_iova: Some(0x2345_6fff),
        output_bits: 64,
        read_only: false,
        page_1m: true,
        partial_tables: false,
    });
    let unmap = Operation::Edit(Edit::Unmap { leaf: 0 });
    let again = Operation::Edit(Edit::Again { gone: 0 });
    for place in [0, 1] {
        run(config, &[0, 1, 2, 3], &[map(place, 1, 8), TELL, unmap, TELL, again, TELL, unmap, TELL, again, TELL]);
    }
}

/// AMD without PASID has no upper half: all 48 bits select entries.
#[test]
fn iovas_up_to_the_last_one_are_reached_without_an_upper_half() {
    let config = TableConfig::VtdSecond(VtdSecond::default());
    run(config, &[2], &[map(1, 0, 8), TELL]);
}

/// Tables of a format that the unit takes, with something that it does not take from its users: they are converted.
#[test]
fn tables_that_cannot_be_bound_as_they_are_are_converted() {
    let entries = Entries { output_bits: 34, svnapot: false, svpbmt: false, svrsw60t59b: false, hardware_update: true, big_endian: false };
    run(TableConfig::RiscvFirst(RiscvFirst { root: 0, levels: 2, entries }), &[3], &[map(0, 0, 8), TELL]);
    let amd = AmdV2 {
        root: 0,
        levels: 4,
        output_bits: 52,
        sign_extended: false,
        page_1g: true,
        privileged: false,
        granted: Access::R,
        update_accessed: true,
        update_dirty: true,
    };
    run(TableConfig::AmdV2(amd), &[2], &[map(0, 0, 8), TELL]);
}

/// A first stage with pages of 64 KiB behind a second one with pages of 4 KiB: a host's table is chosen for the smaller ones, also when these come later.
#[test]
fn pages_of_a_second_stage_that_are_smaller_are_served() {
    let half = ArmHalf { root: 0, granule: 65536, input_bits: 48, top_byte_ignored: false, hierarchical_disabled: false };
    let first = ArmStage1 {
        low: Some(half),
        high: None,
        output_bits: 48,
        mair: 0xff,
        hardware_access: false,
        hardware_dirty: false,
        access_flag_disabled: true,
        hardware_tables: false,
        big_endian: false,
        lpa: false,
        lpa2: false,
        privileged: false,
    };
    let second = ArmStage2 {
        root: 0,
        granule: 4096,
        input_bits: 39,
        output_bits: 40,
        start_level: 1,
        hardware_access: false,
        hardware_dirty: false,
        access_flag_disabled: true,
        hardware_tables: false,
        big_endian: false,
        lpa: false,
        lpa2: false,
        protected_walk: false,
    };
    let wish = |place, step, target| Wish { root: 0, place, step, size: 0, target, access: 0, restricted: false, skip: false, replace: false };
    // Where the second stage begins with what leaves of the first lead to: one of them, in sixteen pages.
    let mut operations: Vec<Operation> = (16..32).map(|page| Operation::Second(Edit::Map(wish(5, page, u16::from(page) << 3)))).collect();
    operations.extend([Operation::Edit(Edit::Map(wish(0, 0, 1 << 3))), TELL]);
    // An address space with the first stage alone, for which a table with large pages will do, has the second one alone later, and both.
    operations.extend([Operation::Switch { space: 0, view: 5 }, Operation::Allocate { space: 0 }]);
    operations.extend([0, 1].map(|device| Operation::Attach { device, pasid: 0, space: 1 }));
    operations.extend([4, 0, 5, 0].map(|view| Operation::Switch { space: 1, view }));
    run_behind(TableConfig::ArmStage1(first), Some(TableConfig::ArmStage2(second)), &[0, 1, 2, 3], &operations);
}

/// The same with a PASID beside the device.
#[test]
fn pasids_of_tables_that_cannot_be_bound_as_they_are_are_converted() {
    let entries = Entries { output_bits: 34, svnapot: false, svpbmt: false, svrsw60t59b: false, hardware_update: true, big_endian: false };
    let attach = Operation::Attach { device: 0, pasid: 1, space: 0 };
    run(TableConfig::RiscvFirst(RiscvFirst { root: 0, levels: 2, entries }), &[0, 1, 2, 3], &[attach, map(0, 0, 8), TELL]);
}

/// Devices behind two units share areas, because one of them has a PASID; when that is gone each unit has a table again.
#[test]
fn areas_of_two_units_become_a_table_for_each() {
    let dart = Dart { packing: Packing::Dart2, granule: 16384, levels: 2, input_bits: 32, output_bits: 34, roots: [Some(0), None, None, None] };
    let attach = |device, pasid, space| Operation::Attach { device, pasid, space };
    let gone = Operation::Detach { device: 1, pasid: 1 };
    let operations = [map(0, 0, 8), TELL, attach(1, 1, 0), attach(2, 0, 1), gone, Operation::Reconsider { space: 1 }];
    // PASIDs go with a table of VT-d's.
    for (host, second) in (1..4).flat_map(|host| (0..4).map(move |second| (host, second))) {
        let setup = Setup { second: Some(second), devices: 3, spaces: 2, ..Setup::simple(host, How::Best) };
        let coverage = Coverage::default();
        let what = [host, second].map(|host| HOSTS[usize::from(host)]);
        let session = Session::of(TableConfig::Dart(dart), None, setup, Rng::new(7), &coverage);
        let played = session.and_then(|mut session| {
            operations.iter().try_for_each(|operation| session.run(*operation).map(drop))?;
            Ok((session.spaces[1].ioasid.strategies(), session.finish()?))
        });
        let (strategies, ()) = played.unwrap_or_else(|error| panic!("{what:?}: {error}"));
        assert_eq!(strategies, [Strategy::Nested; 2], "{what:?}");
        what.iter().for_each(|host| assert!(coverage.of(&format!("{} on {host}", Strategy::Areas)) > 0, "{what:?}: no areas"));
    }
}
