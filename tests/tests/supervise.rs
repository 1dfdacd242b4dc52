//! A plugin under supervision: what it said is kept, how long it waits, whom it makes room for.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, OnceLock};

use stagecraft::plugin::{
    Config, Difference, Engine, Health, Limits, Plugin, Policy, ReplaceError, SuperviseError, Supervised, Supervisor, TableConfig,
};
use stagecraft::sync::{NestedTable, RegionTables};
use stagecraft::table::{Format as _, FormatError, Meaning, Piece};
use stagecraft::{Attributes, Change, Gpa, Span};
use stagecraft_plugin_hostile::{mode, version};
use vm_memory::MmapRegion;

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");
const LEAF: u64 = 0b101;
const ALLERGEN: u64 = 1 << 9;

fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(|| Engine::new(Config::default()).unwrap())
}

fn plugin() -> Plugin {
    static PLUGIN: OnceLock<Plugin> = OnceLock::new();
    PLUGIN.get_or_init(|| Plugin::load(engine(), HOSTILE).unwrap()).clone()
}

/// Another version of it.
fn of_version(other: u8) -> Plugin {
    let mut bytes = HOSTILE.to_vec();
    let place = bytes.windows(version::MARK.len()).position(|window| window == version::MARK).unwrap();
    bytes[place + version::MARK.len()] = other;
    Plugin::load(engine(), &bytes).unwrap()
}

/// A host table of the plugin's format.
fn host_table(supervisor: &Supervisor, mode: u64) -> NestedTable<RegionTables> {
    let memory = RegionTables::new(Arc::new(MmapRegion::new(1 << 20).unwrap()), Gpa(1 << 40));
    NestedTable::new(Box::new(supervisor.open(&config(mode, 1 << 40)).unwrap()), memory).unwrap()
}

const EXECUTABLE: Attributes = Attributes::READ.with(Attributes::EXECUTE);
const WRITABLE: Attributes = Attributes::READ.with(Attributes::WRITE);

/// A page of 4 KiB comes; whether the table has it.
fn map(table: &mut NestedTable<RegionTables>, page: u64, attributes: Attributes) -> bool {
    let iova = Span::of_log2(page << 12, 12);
    table.apply(&[Change::Map(Piece { iova, address: page << 12, attributes })]);
    table.completed();
    table.has(stagecraft::Iova(iova.first))
}

fn config(mode: u64, root: u64) -> TableConfig {
    TableConfig::new("hostile/radix", &[("root", root), ("mode", mode)])
}

fn error(result: Result<Meaning, FormatError>) -> SuperviseError {
    result.unwrap_err().downcast_ref::<SuperviseError>().unwrap().clone()
}

/// A pattern that nobody asked about.
fn unknown(number: u64) -> u64 {
    LEAF | number << 53
}

fn ask(format: &mut Supervised, pattern: u64) -> Result<Meaning, FormatError> {
    format.decode(2, 0, pattern)
}

#[test]
fn waiting_is_counted_in_operations_and_doubles() {
    let policy = Policy { failures: 100, first_wait: 3, longest_wait: 10, attempts: 100, ..Policy::default() };
    let supervisor = Supervisor::new(plugin(), policy);
    let mut format = supervisor.open(&config(mode::ALLERGIC, 0x1000)).unwrap();
    let known = ask(&mut format, LEAF).unwrap();
    for wait in [3, 6, 10, 10] {
        assert!(matches!(error(ask(&mut format, LEAF | ALLERGEN)), SuperviseError::Call(_)));
        assert_eq!(supervisor.health(), Health::Waiting(wait));
        assert!(supervisor.is_failing());
        let made = supervisor.figures().instances;
        // What is known does not wait, and does not count.
        assert_eq!(ask(&mut format, LEAF).unwrap(), known);
        for left in (0..wait).rev() {
            assert_eq!(error(ask(&mut format, unknown(1))), SuperviseError::Waiting { plugin: "hostile".into(), left });
        }
        assert_eq!((supervisor.health(), supervisor.figures().instances), (Health::Working, made));
    }
    // An operation that asks nothing counts as well.
    let _ = ask(&mut format, LEAF | ALLERGEN);
    (0..10).for_each(|_| supervisor.pass());
    assert!(ask(&mut format, unknown(1)).is_ok());
    let figures = supervisor.figures();
    assert_eq!((figures.failures, figures.recoveries, supervisor.is_failing()), (5, 1, false), "{figures:?}");
}

#[test]
fn good_answers_make_failures_forgotten() {
    let policy = Policy { failures: 2, forgiven_after: 4, first_wait: 0, attempts: 100, ..Policy::default() };
    let supervisor = Supervisor::new(plugin(), policy);
    let mut format = supervisor.open(&config(mode::ALLERGIC, 0x1000)).unwrap();
    for round in 0..5 {
        assert!(ask(&mut format, LEAF | ALLERGEN).is_err());
        (0..4).for_each(|number| assert!(ask(&mut format, unknown(1 + 4 * round + number)).is_ok()));
    }
    assert_eq!(supervisor.health(), Health::Working);
    assert!(ask(&mut format, LEAF | ALLERGEN).is_err());
    (0..3).for_each(|number| assert!(ask(&mut format, unknown(100 + number)).is_ok()));
    assert!(ask(&mut format, LEAF | ALLERGEN).is_err());
    assert_eq!(supervisor.health(), Health::Quarantined);
    assert!(matches!(error(ask(&mut format, unknown(200))), SuperviseError::Quarantined { failures: 7, .. }));
    let refused = supervisor.open(&config(mode::WELL, 0x2000)).unwrap_err();
    assert!(refused.to_string().starts_with("plugin hostile is in quarantine after 7 failures; the last one: plugin hostile trapped"), "{refused}");
    supervisor.lift();
    assert!(ask(&mut format, unknown(200)).is_ok());
}

#[test]
fn every_way_to_fail_counts_and_a_refusal_does_not() {
    for (mode, failing) in [(mode::PANIC, true), (mode::LOOP, true), (mode::BOMB, true), (mode::NO_SUCH_LEVEL, true), (mode::NO_MEANING, true)] {
        let supervisor = Supervisor::new(plugin(), Policy::default());
        let mut format = supervisor.open(&config(mode, 0x1000)).unwrap();
        let pattern = if mode == mode::NO_SUCH_LEVEL { 1 } else { LEAF | 2 };
        assert!(format.decode(if mode == mode::NO_SUCH_LEVEL { 0 } else { 2 }, 0, pattern).is_err(), "mode {mode}");
        assert_eq!((supervisor.is_failing(), supervisor.figures().failures), (failing, 1), "mode {mode}");
    }
    let supervisor = Supervisor::new(plugin(), Policy::default());
    assert!(!supervisor.open(&config(mode::UNSUPPORTED, 0x1000)).unwrap_err().is_failure());
    assert!(!supervisor.ask(|instance| instance.offers(8, &[1])).unwrap_err().is_failure());
    assert_eq!(supervisor.figures().failures, 0);
    assert!(supervisor.open(&config(mode::PANIC_IN_OPEN, 0x1000)).unwrap_err().is_failure());
    assert_eq!(supervisor.figures().failures, 1);
}

#[test]
fn a_fickle_plugin_is_held_to_its_first_answer() {
    let supervisor = Supervisor::new(plugin(), Policy::default());
    let mut format = supervisor.open(&config(mode::FICKLE, 0x1000)).unwrap();
    let first = ask(&mut format, LEAF).unwrap();
    for _ in 0..5 {
        assert_eq!(ask(&mut format, LEAF).unwrap(), first);
    }
    assert_eq!((format.answers(), supervisor.figures().remembered), (1, 5));
}

#[test]
fn formats_share_a_few_instances() {
    let mut limits = Limits::default();
    limits.instances = 3;
    let few = Plugin::load(&Engine::new(Config::default().with_limits(limits)).unwrap(), HOSTILE).unwrap();
    let supervisor = Supervisor::new(few, Policy { instances: 2, ..Policy::default() });
    let mut formats: Vec<Supervised> = (0..20).map(|number| supervisor.open(&config(mode::WELL, 0x1000 * number)).unwrap()).collect();
    for round in 1..4 {
        for format in &mut formats {
            assert!(matches!(ask(format, unknown(round)), Ok(Meaning::Fault(_))));
            // Cold questions have the third one.
            supervisor.ask(|instance| instance.offers(7, &[39])).unwrap();
        }
    }
    let made = supervisor.figures().instances;
    assert_eq!(supervisor.figures().failures, 0);
    // The one that was asked last still has its own.
    ask(formats.last_mut().unwrap(), unknown(9)).unwrap();
    assert_eq!(supervisor.figures().instances, made);
    ask(&mut formats[0], unknown(9)).unwrap();
    assert_eq!(supervisor.figures().instances, made + 1);
}

#[test]
fn a_cold_question_that_fails_costs_its_instance_only() {
    let supervisor = Supervisor::new(plugin(), Policy::default());
    let mut format = supervisor.open(&config(mode::WELL, 0x1000)).unwrap();
    let registers = |mode: u64| [("ROOT", 0x2000), ("MODE", mode)].map(|(name, value)| (name.to_owned(), value)).to_vec();
    let decode = |mode: u64| supervisor.ask(|instance| instance.decode_commands("hostile", &registers(mode), &[0, 1]));
    assert!(decode(mode::PANIC).unwrap_err().is_failure());
    assert!(matches!(decode(mode::WELL), Err(SuperviseError::Waiting { .. })));
    assert_eq!(decode(mode::WELL).unwrap().len(), 2);
    assert!(ask(&mut format, LEAF).is_ok());
}

#[test]
fn a_new_version_writes_the_leaves_of_live_host_tables_as_the_old_one() {
    let supervisor = Supervisor::new(plugin(), Policy::default());
    let mut table = host_table(&supervisor, mode::WELL);
    // Nothing has been written yet.
    for other in [version::ENCODES_OTHERWISE, version::FIRST] {
        supervisor.replace(of_version(other)).unwrap();
    }
    assert!(map(&mut table, 0, WRITABLE));
    let error = supervisor.replace(of_version(version::ENCODES_OTHERWISE)).unwrap_err();
    assert!(matches!(&error, ReplaceError::Differs(Difference::Answer { .. })), "{error}");
    assert!(error.to_string().contains("leaf"), "{error}");
    // The old one goes on, and so does one that agrees, with what was asked before and with what was not.
    assert!(map(&mut table, 1, WRITABLE) && map(&mut table, 2, Attributes::READ));
    supervisor.replace(of_version(version::DECODES_OTHERWISE)).unwrap();
    assert!(map(&mut table, 3, WRITABLE) && map(&mut table, 4, EXECUTABLE));
    assert_eq!(table.figures().format_failures, 0);
}

#[test]
fn leaves_that_kill_a_plugin_are_missing_alone() {
    let supervisor = Supervisor::new(plugin(), Policy::default());
    let mut table = host_table(&supervisor, mode::ALLERGIC);
    assert!(map(&mut table, 0, WRITABLE) && !map(&mut table, 1, EXECUTABLE));
    assert!(matches!(supervisor.health(), Health::Waiting(_)), "{:?}", supervisor.health());
    // What was said before is written by a plugin that waits; what was not waits with it.
    assert!(map(&mut table, 2, WRITABLE) && !map(&mut table, 3, Attributes::READ));
    for page in 4..100 {
        assert!(!map(&mut table, page, EXECUTABLE));
        supervisor.pass();
    }
    let figures = supervisor.figures();
    assert_eq!((figures.failures, figures.quarantines), (u64::from(Policy::default().attempts), 0), "{figures:?}");
    assert!(map(&mut table, 100, Attributes::READ));
    // What was not answered is offered again, and is there or waits.
    let lacking = [Span::of_log2(1 << 12, 12), Span { first: 3 << 12, last: (100 << 12) - 1 }];
    assert_eq!(table.unanswered(), lacking);
    let pieces = |attributes| move |page: u64| Change::Map(Piece { iova: Span::of_log2(page << 12, 12), address: page << 12, attributes });
    while let Some(wanted) = table.wants() {
        let pieces: Vec<Change> =
            (wanted.first >> 12..=wanted.last >> 12).map(|page| pieces(if page == 3 { Attributes::READ } else { EXECUTABLE })(page)).collect();
        table.offer(wanted, &pieces);
        table.completed();
        if table.has(stagecraft::Iova(3 << 12)) {
            break;
        }
    }
    assert_eq!(table.unanswered(), [lacking[0], Span { first: 4 << 12, last: (100 << 12) - 1 }]);
}
