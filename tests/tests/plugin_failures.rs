//! Whatever a plugin does, the caller gets a typed error in bounded time and memory, and everybody else keeps working.

use std::fmt::Write as _;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use stagecraft::plugin::queue::{BlockedDma, Effect, Event, EventAccess, MAX_COMMAND_BYTES, Scope};
use stagecraft::plugin::{
    BlockKind, Blocked, CallError, Config, DetectMemory, Direct, Engine, Instance, Limits, Notes, Outcome, PlaceToBind, Plugin, PluginFormat,
    Refusal, Requester, Settings, TableConfig, Ticker, Translated,
};
use stagecraft::table::{FaultKind, Format as _, FormatError, Meaning, Missing, Need, Next, Severity, Window};
use stagecraft::{Attributes, Iova, Span};
use stagecraft_plugin_hostile::{bad, mode};

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");
const LEAF: u64 = 0b101;

/// Compiled once for all tests of this file.
fn plugin() -> Plugin {
    static PLUGIN: OnceLock<Plugin> = OnceLock::new();
    let load = || Plugin::load(&Engine::new(Config::default()).expect("an engine"), HOSTILE).expect("a plugin");
    PLUGIN.get_or_init(load).clone()
}

fn config(mode: u64) -> TableConfig {
    TableConfig::new("hostile/radix", &[("root", 0x1000), ("mode", mode)])
}

fn open(mode: u64) -> PluginFormat {
    plugin().open(&config(mode)).expect("opens")
}

fn call_error(error: &FormatError) -> CallError {
    error.downcast_ref::<CallError>().expect("a call error").clone()
}

fn decode_error(format: &mut PluginFormat) -> CallError {
    call_error(&format.decode(2, 0, LEAF).expect_err("fails"))
}

fn nonsense(error: &CallError) -> &str {
    match error {
        CallError::Nonsense { what, .. } => what,
        other => panic!("{other:?}"),
    }
}

fn trap_text(error: &CallError) -> &str {
    match error {
        CallError::Trap { text, .. } => text,
        other => panic!("{other:?}"),
    }
}

/// A word at every address that is a multiple of eight: the same everywhere.
#[derive(Default)]
struct Words {
    word: u64,
    reads: u32,
    budget: Option<u32>,
    burn: Duration,
}

impl Words {
    fn of(word: u64) -> Self {
        Self { word, ..Self::default() }
    }
}

impl DetectMemory for Words {
    fn read(&mut self, _: u64, length: u32) -> Option<Vec<u8>> {
        self.reads += 1;
        let start = Instant::now();
        while start.elapsed() < self.burn {
            std::hint::black_box(0);
        }
        if self.budget.is_some_and(|budget| self.reads > budget) {
            return None;
        }
        Some(self.word.to_le_bytes().into_iter().cycle().take(length as usize).collect())
    }

    fn read_through(&mut self, table: &TableConfig, address: u64, length: u32) -> Option<Vec<u8>> {
        assert_eq!(table, &TableConfig::new("hostile/radix", &[("root", 0x7000)]), "the plugin's own words arrive");
        assert_eq!(address, 0x2000);
        self.read(address, length)
    }
}

fn registers(mode: u64) -> Vec<(String, u64)> {
    [("ROOT", 0x2000), ("MODE", mode), ("EXTRA1", 0x7000)].map(|(name, value)| (name.to_owned(), value)).to_vec()
}

fn lookup(mode: u64, memory: impl DetectMemory + 'static) -> (Instance, Result<Outcome, CallError>) {
    let mut instance = plugin().instantiate().expect("an instance");
    let outcome = instance.lookup("hostile", &registers(mode), Requester { id: 3, pasid: None }, memory);
    (instance, outcome)
}

#[test]
fn a_plugin_that_behaves_well_is_understood() {
    let mut format = open(mode::WELL);
    assert_eq!(format.geometry().expect("geometry").levels.len(), 3);
    let table = Meaning::Table { next: Next { level: 1, first: 0, last: u16::MAX }, inherited: 1 };
    assert_eq!(format.decode(0, 0, 1).expect("decode"), table);
    let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
    assert_eq!(format.decode(2, 0, 3).expect("decode"), Meaning::Leaf { size_log2: 12, attributes });
    assert_eq!(format.decode(2, 0, 1 << 63 | 3).expect("decode"), Meaning::Fault(FaultKind::Reserved));
    assert_eq!(format.decode(2, 0, LEAF | 8).expect("decode"), Meaning::WholeEntry);
    let read = Attributes::READ.with(Attributes::COHERENT);
    assert_eq!(format.decode_entry(2, 0, LEAF | 1 << 12).expect("entry"), Meaning::Leaf { size_log2: 13, attributes: read });
    let findings = format.explain(2, 0, 1 << 63 | 3).expect("explain");
    assert_eq!((findings[0].severity, findings[0].bits, &*findings[0].section), (Severity::Error, 1 << 63, "hostile section 2"));
    let encoded = format.encode_leaf(2, 12, attributes.with(Attributes::EXECUTE)).expect("encode").expect("a leaf");
    assert_eq!((encoded.pattern, encoded.attributes), (7, attributes));
    assert_eq!(format.encode_leaf(2, 21, attributes).expect("encode"), None);
    assert_eq!(format.encode_table(0, 1).expect("encode"), Some(3));
    assert_eq!(format.calls(), 2 + 9, "open and geometry, and one for each question; geometry is not asked again");
}

#[test]
fn a_unit_that_behaves_well_is_understood() {
    let outcome = |word| lookup(mode::WELL, Words::of(word)).1.expect("an answer");
    assert_eq!(outcome(1), Outcome::Bypass);
    assert_eq!(outcome(0x9000), Outcome::Tables(Translated::of(vec![TableConfig::new("hostile/radix", &[("root", 0x9000)])])));
    let blocked = Blocked {
        kind: BlockKind::Refused,
        event: "H_BLOCKED".to_owned(),
        section: "hostile section 3".to_owned(),
        reason: "the word is zero".to_owned(),
    };
    assert_eq!(outcome(0), Outcome::Blocked(blocked));
    let through = lookup(mode::READ_THROUGH, Words::of(0x5000)).1.expect("an answer");
    assert_eq!(through, Outcome::Tables(Translated::of(vec![TableConfig::new("hostile/radix", &[("root", 0x5000)])])));

    let mut instance = plugin().instantiate().expect("an instance");
    assert_eq!(instance.pasids("hostile", &registers(0), 3, Words::of(0)).expect("pasids"), [1, 2, 3]);
    let offers = instance.offers(7, &[39]).expect("offers");
    assert_eq!((&*offers[0].format, &offers[0].limits[..]), ("hostile/radix", &[("width".to_owned(), 39)][..]));
    let place = PlaceToBind { context_address: 4096, space: 5, ..PlaceToBind::default() };
    let binding = instance.bind_data(&config(0), &place).expect("binding");
    let (data, context) = (0x1000_u64.to_le_bytes().to_vec(), 4096_u64.to_le_bytes().to_vec());
    assert_eq!((binding.kind, binding.data, binding.context), (7, data, context));
    assert_eq!((binding.viommu, binding.pasids, binding.invalidation.is_some()), (Some(8), true, true));
    let need = Need { last_low: Some(0xffff), ..Need::default() };
    let settings = instance.suggest("hostile/radix", &Settings::new(), &need).expect("settings");
    assert_eq!(settings.get("mode"), Some(0));
    assert_eq!(instance.calls(), 4);
}

/// The kernel would be told something, and the host would not know what.
#[test]
fn recipes_that_make_no_sense_are_refused_with_the_reason() {
    let cases = [
        (bad::NO_WORDS, "invalidations of 0 words"),
        (bad::OTHER_LENGTH, "invalidations of 2 and of 3 words"),
        (bad::WORD, "of word 2 of an invalidation of 2 words"),
        (bad::BITS, "52 bits of a number from 12 on at bit 13"),
        (bad::NUMBER, "52 bits of a number from 13 on at bit 0"),
        (bad::PAGE, "pages of 2^40 bytes"),
        (bad::MOST, "at most 0 invalidations"),
        (bad::SHORT, "without all bits of a page's address"),
    ];
    for (root, reason) in cases {
        let mut instance = plugin().instantiate().expect("an instance");
        let error = instance.bind_data(&TableConfig::new("hostile/radix", &[("root", root)]), &PlaceToBind::default()).expect_err(reason);
        assert!(nonsense(&error).contains(reason), "{reason}: {error}");
    }
}

#[test]
fn a_handle_on_the_memory_can_be_kept() {
    let memory = Arc::new(Mutex::new(Words::of(1)));
    let (_instance, outcome) = lookup(mode::WELL, Arc::clone(&memory));
    assert_eq!(outcome, Ok(Outcome::Bypass));
    assert_eq!(memory.lock().expect("not poisoned").reads, 1);
    assert_eq!(Arc::strong_count(&memory), 1, "the instance keeps nothing");
}

#[test]
fn a_refusal_is_the_plugins_own_words_and_breaks_nothing() {
    let error = plugin().open(&TableConfig::new("hostile/radix", &[("root", 0x1001)])).expect_err("refused");
    let refusal = Refusal::Invalid {
        field: "root".to_owned(),
        value: 0x1001,
        section: "hostile section 1".to_owned(),
        reason: "not aligned to 4,096".to_owned(),
    };
    assert_eq!(error, CallError::Refused { plugin: "hostile".into(), refusal });
    assert_eq!(error.to_string(), "plugin hostile: root = 0x1001: not aligned to 4,096 (hostile section 1)");

    let mut instance = plugin().instantiate().expect("an instance");
    let unsupported = |error: CallError| matches!(error, CallError::Refused { refusal: Refusal::Unsupported(_), .. });
    assert!(unsupported(instance.offers(8, &[1]).expect_err("refused")));
    assert!(unsupported(plugin().open(&config(mode::UNSUPPORTED)).expect_err("refused")));
    let error = instance.lookup("hostile", &registers(0), Requester::default(), Words { budget: Some(0), ..Words::default() }).expect_err("refused");
    assert_eq!(error, CallError::Refused { plugin: "hostile".into(), refusal: Refusal::Unreadable(0x2000) });
    assert!(instance.offers(7, &[1]).is_ok(), "it keeps working");
    assert_eq!(instance.failed(), None);
}

#[test]
fn names_that_the_manifest_does_not_have_do_not_reach_the_plugin() {
    let mut instance = plugin().instantiate().expect("an instance");
    let mut ask = |name: &str| instance.lookup("hostile", &[("ROOT".to_owned(), 1), (name.to_owned(), 1)], Requester::default(), Words::of(1));
    let error = ask("ROUTE").expect_err("unknown");
    assert_eq!(error.to_string(), "plugin hostile knows no register `ROUTE`; there are MODE, ROOT, EXTRA*");
    assert_eq!(ask("ROOT").expect_err("twice"), CallError::Twice { what: "register", name: "ROOT".to_owned() });
    assert!(ask("EXTRA7").is_ok());
    assert_eq!(instance.calls(), 1);
    let error = plugin().open(&TableConfig::new("hostile/other", &[])).expect_err("unknown");
    assert_eq!(error.to_string(), "plugin hostile knows no table format `hostile/other`; there are hostile/radix");
}

#[test]
fn a_panic_is_quoted_and_ends_that_instance_only() {
    let mut other = open(mode::WELL);
    let mut format = open(mode::PANIC);
    let error = decode_error(&mut format);
    let text = trap_text(&error);
    assert!(text.contains("told to panic at pattern 0x5") && text.contains("tests/hostile/src/lib.rs"), "{text}");
    let calls = format.calls();
    assert_eq!(call_error(&format.encode_table(0, 1).expect_err("poisoned")), error, "the same error for every later question");
    assert_eq!((format.calls(), format.failed()), (calls, Some(&error)), "without another call");
    assert!(other.decode(2, 0, LEAF).is_ok(), "another instance is untouched");
    let mut fresh = format.reopen().expect("a fresh instance");
    assert!(fresh.encode_table(0, 1).is_ok());

    let error = plugin().open(&config(mode::PANIC_IN_OPEN)).expect_err("fails");
    assert!(trap_text(&error).contains("told to panic in open"));
    let (mut instance, outcome) = lookup(mode::PANIC, Words::of(1));
    let error = outcome.expect_err("fails");
    assert!(trap_text(&error).contains("told to panic for device 0x3"));
    assert_eq!(instance.offers(7, &[1]).expect_err("poisoned"), error);
}

#[test]
fn a_long_panic_is_cut() {
    let error = decode_error(&mut open(mode::LONG_PANIC));
    assert!((900..=1024).contains(&trap_text(&error).len()), "{}", trap_text(&error).len());
}

/// Processor time of this thread.
fn processor_time() -> Duration {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    Duration::from_nanos(stat.split(' ').next().and_then(|nanoseconds| nanoseconds.parse().ok()).expect("nanoseconds"))
}

#[test]
fn a_call_that_does_not_return_is_interrupted() {
    let limits = Limits::default();
    // Processor time, as the limits are: on a busy machine the wall clock says nothing.
    let timed = |limit: Duration, call: &mut dyn FnMut() -> CallError| {
        let start = processor_time();
        assert_eq!(call(), CallError::Deadline { plugin: "hostile".into(), limit });
        let took = processor_time() - start;
        assert!(took >= limit && took < limit + Duration::from_millis(500), "{took:?}");
    };
    timed(limits.warm, &mut || decode_error(&mut open(mode::LOOP)));
    timed(limits.cold, &mut || plugin().open(&config(mode::LOOP_IN_OPEN)).expect_err("fails"));
    timed(limits.cold, &mut || lookup(mode::LOOP, Words::of(1)).1.expect_err("fails"));
}

#[test]
fn reads_are_limited() {
    let memory = Arc::new(Mutex::new(Words::of(1)));
    // Whatever comes first: no more reads, or the deadline.
    lookup(mode::READS_FOR_EVER, Arc::clone(&memory)).1.expect_err("fails");
    let reads = memory.lock().expect("not poisoned").reads;
    assert!(reads <= 65_536, "{reads}");
}

#[test]
fn the_hosts_own_work_does_not_count_towards_the_deadline() {
    let slow = Words { word: 1, burn: Duration::from_millis(30), budget: Some(10), ..Words::default() };
    let (_, outcome) = lookup(mode::READS_FOR_EVER, slow);
    assert!(outcome.is_err_and(|error| matches!(error, CallError::Refused { .. })), "300 ms of reading, and then the budget's end");
}

#[test]
fn memory_is_bounded() {
    let error = decode_error(&mut open(mode::BOMB));
    assert_eq!(error, CallError::MemoryCap { plugin: "hostile".into(), limit: 4 << 20 });
    assert!(matches!(lookup(mode::BOMB, Words::of(1)).1, Err(CallError::MemoryCap { .. })));
}

#[test]
fn recursion_without_end_is_a_trap() {
    let error = decode_error(&mut open(mode::RECURSE));
    assert!(trap_text(&error).contains("stack") || trap_text(&error).contains("out of bounds"), "{error}");
    assert!(matches!(lookup(mode::RECURSE, Words::of(1)).1, Err(CallError::Trap { .. })));
}

/// The most memory that this process ever had.
fn peak_bytes() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<usize>().expect("a number") << 10
}

#[test]
fn lists_that_claim_more_than_there_is_cost_nothing() {
    let error = call_error(&open(mode::ALIASED).explain(2, 0, LEAF).expect_err("10,000 times the same MiB"));
    nonsense(&error);
    let error = call_error(&open(mode::HUGE).explain(2, 0, LEAF).expect_err("2 GiB that are not there"));
    nonsense(&error);
    let mut instance = plugin().instantiate().expect("an instance");
    nonsense(&instance.pasids("hostile", &registers(mode::HUGE), 3, Words::of(1)).expect_err("4 GiB that are not there"));
    assert!(peak_bytes() < 400 << 20, "{} bytes", peak_bytes());
}

#[test]
fn answers_without_a_meaning_are_refused_and_named() {
    let error = decode_error(&mut open(mode::NO_MEANING));
    assert!(nonsense(&error).contains("attributes 0x241 have no meaning"), "{error}");
    let error = decode_error(&mut open(mode::NOTHING_LEFT));
    assert!(nonsense(&error).contains("lacks 0x800 bytes at its beginning and 0x800 at its end"), "{error}");
    let error = call_error(&open(mode::NO_SUCH_LEVEL).decode(0, 0, 1).expect_err("no such level"));
    assert!(nonsense(&error).contains("level kind 200; there are 3"), "{error}");
    let error = call_error(&open(mode::WHOLE_AGAIN).decode_entry(2, 0, LEAF).expect_err("again"));
    assert!(nonsense(&error).contains("whole entry 0x5, which it was shown"), "{error}");
    let error = call_error(&open(mode::WIDEN).encode_leaf(2, 12, Attributes::READ).expect_err("wider"));
    assert!(nonsense(&error).contains("grants `rwx write-back coherent` where `r-- write-back` was asked for"), "{error}");
    for mode in [mode::NONSENSE_GEOMETRY, mode::MANY_ROOTS] {
        let error = plugin().open(&config(mode)).expect_err("nonsense");
        assert!(nonsense(&error).contains("nonsense geometry"), "{error}");
    }
}

#[test]
fn outcomes_without_a_meaning_are_refused_and_named() {
    let outcome = |mode| lookup(mode, Words::of(1)).1.expect_err("nonsense");
    assert!(nonsense(&outcome(mode::FOREIGN_FORMAT)).contains("`other/format`, which its manifest does not name"));
    assert!(nonsense(&outcome(mode::THREE_TABLES)).contains("3 tables for one requester"));
    assert!(nonsense(&outcome(mode::NO_TABLES)).contains("0 tables for one requester"));
    assert!(nonsense(&outcome(mode::OVERLAPPING_WINDOWS)).contains("windows that overlap"));
    let pasids = |mode| plugin().instantiate().expect("an instance").pasids("hostile", &registers(mode), 3, Words::of(1)).expect_err("nonsense");
    assert!(nonsense(&pasids(mode::MANY_PASIDS)).contains("100000 PASIDs; at most 1024"));
    assert!(nonsense(&pasids(mode::FICKLE)).contains("do not ascend"));
}

#[test]
fn a_plugin_is_told_the_kind_of_unit_and_only_one_that_it_knows() {
    let mut instance = plugin().instantiate().expect("an instance");
    let error = instance.lookup("hostel", &registers(0), Requester::default(), Words::of(1)).expect_err("unknown");
    assert_eq!(error.to_string(), "plugin hostile knows no unit `hostel`; there are hostile");
    assert!(instance.pasids("", &registers(0), 3, Words::of(1)).is_err() && instance.decode_commands("", &registers(0), &[]).is_err());
    assert_eq!(instance.calls(), 0);
}

#[test]
fn windows_and_parts_of_leaves_are_understood() {
    let Outcome::Direct(direct) = lookup(mode::DIRECT, Words::of(1)).1.expect("an answer") else { panic!("not direct") };
    let window = Window { iova: Span { first: 0, last: 0xffff_ffff }, address: 0x7000, attributes: Attributes::READ };
    assert_eq!(direct, Direct { windows: vec![window], intercepts: Vec::new() });
    let missing = Missing { front: 16, back: 256 };
    let attributes = Attributes::READ.with(Attributes::COHERENT);
    assert_eq!(open(mode::PARTS).decode(2, 0, LEAF).expect("an answer"), Meaning::Part { size_log2: 12, attributes, missing });
}

#[test]
fn commands_and_events_pass_the_sandbox_checked() {
    let decode = |mode, commands: &[u8]| plugin().instantiate().expect("an instance").decode_commands("hostile", &registers(mode), commands);
    let effects: Vec<Effect> = decode(mode::WELL, &[0, 1, 2, 0xff]).expect("an answer").iter().map(|item| item.effect).collect();
    let scope = Scope { leaf: false, second_stage: false, domain: Some(3), space: None, id: None };
    let range = Effect::Range { scope, iova: Span { first: 0, last: 0x1fff } };
    assert_eq!(effects, [Effect::Nothing, Effect::Everything, range, Effect::Illegal(7)]);
    assert_eq!(decode(mode::WELL, &[]).expect("an answer"), []);
    assert_eq!(decode(mode::WELL, &[0; 0x8000]).expect("an answer").len(), 0x8000);
    let error = decode(mode::WELL, &[0; MAX_COMMAND_BYTES + 1]).expect_err("too long");
    assert_eq!(error.to_string(), "65537 bytes of commands are too many for one call: the limit is 65536");
    assert!(nonsense(&decode(mode::WELL, &[0xff, 0]).expect_err("nonsense")).contains("after the illegal command 0"));
    assert!(nonsense(&decode(mode::WRONG_ORDER, &[0, 1]).expect_err("nonsense")).contains("command 0 after command 1"));
    assert!(nonsense(&decode(mode::NO_MEANING, &[0]).expect_err("nonsense")).contains("of command 65535, of 1 bytes"));
    assert!(matches!(decode(mode::PANIC, &[0]), Err(CallError::Trap { .. })));
    assert!(matches!(decode(mode::LOOP, &[0]), Err(CallError::Deadline { .. })));
    assert!(matches!(decode(mode::BOMB, &[0]), Err(CallError::MemoryCap { .. })));

    let event = Event {
        fault: FaultKind::Translation,
        name: None,
        format: Some("hostile/radix".to_owned()),
        level: Some(3),
        entries: Vec::new(),
        id: 0x38,
        pasid: Some(7),
        iova: 0x1234_5000,
        intermediate: None,
        reading_table: false,
        unreadable: None,
        access: EventAccess::Write,
        privileged: false,
        domain: None,
    };
    let encode = |mode| plugin().instantiate().expect("an instance").encode_event("hostile", &registers(mode), &event, Words::of(0));
    let record = encode(mode::WELL).expect("an answer");
    let words: Vec<u8> = [0x38_u64, 0x1234_5000, 7, 13].iter().flat_map(|word| word.to_le_bytes()).collect();
    assert_eq!((&*record.queue, record.bytes), ("log", words));
    assert!(nonsense(&encode(mode::LONG_RECORD).expect_err("nonsense")).contains("an event record of 100000 bytes"));
    assert!(matches!(encode(mode::UNSUPPORTED), Err(CallError::Refused { refusal: Refusal::Unsupported(_), .. })));
}

#[test]
fn what_records_of_the_host_are_said_to_be_about_is_checked() {
    let decode = |record: &[u8]| plugin().instantiate().expect("an instance").decode_event(record);
    let request = BlockedDma {
        requester: Requester { id: 0x38, pasid: Some(0xf_ffff) },
        iova: Iova(0x1234_5678),
        access: EventAccess::Execute,
        privileged: true,
    };
    assert_eq!((decode(&[0; 256]), decode(&[1])), (Ok(None), Ok(Some(request))));
    assert!(nonsense(&decode(&[2]).expect_err("nonsense")).contains("0x100000"));
    assert!(matches!(decode(&[3]), Err(CallError::Trap { .. })), "{:?}", decode(&[3]));
    assert!(matches!(decode(&[]), Err(CallError::Refused { refusal: Refusal::Invalid { .. }, .. })));
    assert!(matches!(decode(&[0; 257]), Err(CallError::TooLong { bytes: 257, limit: 256, .. })));
}

#[test]
fn a_fickle_plugin_is_not_caught_here() {
    // Pure functions cannot be proved pure from outside. The table engine remembers the first answer; this says that nothing breaks.
    let mut format = open(mode::FICKLE);
    let answers: Vec<Meaning> = (0..4).map(|_| format.decode(2, 0, LEAF).expect("an answer")).collect();
    assert_eq!(answers[0], answers[2]);
    assert_ne!(answers[0], answers[1]);
}

#[test]
fn guest_memory_is_there_during_detect_only() {
    assert!(matches!(open(mode::READS_MEMORY).decode(2, 0, LEAF).expect("an answer"), Meaning::Leaf { .. }), "it got nothing to read");
    let error = lookup(mode::READS_TOO_MUCH, Words::of(1)).1.expect_err("1 MiB at once");
    assert_eq!(error, CallError::Refused { plugin: "hostile".into(), refusal: Refusal::Unreadable(0x2000) });
}

#[test]
fn notes_about_structures_are_cut_cleaned_and_never_errors() {
    let (instance, outcome) = lookup(mode::NOTE, Words::of(1));
    assert_eq!(outcome.expect("an answer"), Outcome::Bypass);
    let [note] = &*instance.notes().kept else { panic!("{:?}", instance.notes()) };
    assert_eq!((note.severity, note.address.0, note.word, note.bits), (Severity::Warning, 0x1000, 3, 1 << 7));
    assert_eq!((&*note.section, note.reason.len()), ("hostile \u{fffd}[31m section 4", 1024));
}

#[test]
fn a_flood_of_notes_is_bounded_and_counted() {
    // How long the flood takes is not what this is about.
    let mut limits = Limits::default();
    limits.cold = std::time::Duration::from_secs(60);
    let engine = Engine::new(Config::default().with_limits(limits)).expect("an engine");
    let mut instance = Plugin::load(&engine, HOSTILE).expect("a plugin").instantiate().expect("an instance");
    let outcome = instance.lookup("hostile", &registers(mode::NOTE_FLOOD), Requester { id: 3, pasid: None }, Words::of(1));
    assert_eq!(outcome.expect("an answer"), Outcome::Bypass);
    let notes = instance.notes();
    assert_eq!((notes.kept.len(), notes.dropped), (Notes::MOST, 10_000 - Notes::MOST as u64), "one without bits says nothing");
    assert!(notes.kept.iter().all(|note| note.reason.len() <= 1024 && note.bits != 0));

    // Outside of `lookup` nobody listens, and the next one begins anew.
    assert_eq!(instance.pasids("hostile", &registers(mode::NOTE_FLOOD), 3, Words::of(1)).expect("PASIDs"), [1]);
    assert_eq!(instance.notes().kept.len(), Notes::MOST);
    instance.lookup("hostile", &registers(mode::WELL), Requester { id: 3, pasid: None }, Words::of(1)).expect("an answer");
    assert_eq!(instance.notes(), &Notes::default());
}

#[test]
fn instances_are_limited_and_come_back() {
    let mut limits = Limits::default();
    limits.instances = 2;
    let engine = Engine::new(Config::default().with_limits(limits)).expect("an engine");
    let plugin = Plugin::load(&engine, HOSTILE).expect("a plugin");
    let first = plugin.open(&config(mode::WELL)).expect("one");
    let second = plugin.instantiate().expect("two");
    let error = plugin.instantiate().expect_err("three");
    assert_eq!(error, CallError::TooManyInstances { plugin: "hostile".into(), limit: 2 });
    drop((first, second));
    for _ in 0..10 {
        decode_error(&mut plugin.open(&config(mode::PANIC)).expect("a trapped one gives its place back"));
    }
}

fn threads() -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("tasks");
    tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok()).collect()
}

#[test]
fn the_embedder_can_be_the_clock() {
    let engine = Engine::new(Config::default().with_ticker(Ticker::Embedder)).expect("an engine");
    let plugin = Plugin::load(&engine, HOSTILE).expect("a plugin");
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                engine.tick();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let error = decode_error(&mut plugin.open(&config(mode::LOOP)).expect("opens"));
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(matches!(error, CallError::Deadline { .. }), "{error}");
    });
}

#[test]
fn the_clocks_thread_is_gone_with_the_engine() {
    // Other tests of this file have engines of their own, so this counts in a process of its own.
    if std::env::var_os("STAGECRAFT_ALONE").is_none() {
        let this = std::env::current_exe().expect("this test");
        let run =
            std::process::Command::new(this).args(["--exact", "the_clocks_thread_is_gone_with_the_engine"]).env("STAGECRAFT_ALONE", "1").output();
        let run = run.expect("runs");
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stdout));
        return;
    }
    let ours = || threads().iter().filter(|name| name.trim() == "stagecraft-epoc").count();
    let signals = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("status");
        status.lines().find(|line| line.starts_with("SigCgt")).map(str::to_owned)
    };
    let before = signals();
    let engine = Engine::new(Config::default()).expect("an engine");
    let clone = engine.clone();
    let plugin = Plugin::load(&engine, HOSTILE).expect("a plugin");
    decode_error(&mut plugin.open(&config(mode::PANIC)).expect("opens"));
    assert_eq!(signals(), before, "no signal handler was installed");
    assert_eq!(ours(), 1);
    drop((engine, plugin));
    assert_eq!(ours(), 1, "a clone is left");
    drop(clone);
    assert_eq!(ours(), 0);
    let silent = Engine::new(Config::default().with_ticker(Ticker::Embedder)).expect("an engine");
    assert_eq!(ours(), 0);
    drop(silent);
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<String>>>);

impl tracing::field::Visit for Collector {
    fn record_debug(&mut self, field: &tracing::field::Field, value: &dyn std::fmt::Debug) {
        let mut lines = self.0.lock().expect("not poisoned");
        if let Some(line) = lines.last_mut() {
            write!(line, " {field}={value:?}").expect("to a string");
        }
    }
}

impl tracing::Subscriber for Collector {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn event(&self, event: &tracing::Event<'_>) {
        self.0.lock().expect("not poisoned").push(event.metadata().level().to_string());
        event.record(&mut self.clone());
    }
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn logs_are_forwarded_with_the_plugins_name_and_limited() {
    let collector = Collector::default();
    tracing::subscriber::with_default(collector.clone(), || {
        // The flood may run into the deadline on a slow machine; either is fine here.
        let _ = lookup(mode::LOG_FLOOD, Words::of(1));
    });
    let lines = collector.0.lock().expect("not poisoned");
    let messages = lines.iter().filter(|line| line.starts_with("INFO") && line.contains("message ")).count();
    assert!((64..=64 * 3).contains(&messages), "{messages}");
    assert!(lines[0].contains("message 0") && lines[0].contains("plugin=\"hostile\""), "{}", lines[0]);
}
