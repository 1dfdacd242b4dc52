//! A plugin that behaves well, from file to answer.

use stagecraft::Attributes;
use stagecraft::plugin::{Config, DetectMemory, Engine, Outcome, Plugin, Requester, TableConfig};
use stagecraft::table::{FaultKind, Format as _, Meaning, Next};

const HOSTILE: &[u8] = include_bytes!("../hostile/built/hostile.wasm");

struct NoMemory;

impl DetectMemory for NoMemory {
    fn read(&mut self, _: u64, length: u32) -> Option<Vec<u8>> {
        Some(vec![0; length as usize])
    }
    fn read_through(&mut self, _: &TableConfig, _: u64, _: u32) -> Option<Vec<u8>> {
        None
    }
}

#[test]
fn a_format_answers() {
    let engine = Engine::new(Config::default()).expect("an engine");
    let plugin = Plugin::load(&engine, HOSTILE).expect("a plugin");
    let mut format = plugin.open(&TableConfig::new("hostile/radix", &[("root", 0x1000)])).expect("open");
    assert_eq!(format.geometry().expect("geometry").levels.len(), 3);
    let table = Meaning::Table { next: Next { level: 1, first: 0, last: u16::MAX }, inherited: 1 };
    assert_eq!(format.decode(0, 0, 1).expect("decode"), table);
    let attributes = Attributes::READ.with(Attributes::WRITE).with(Attributes::COHERENT);
    assert_eq!(format.decode(2, 0, 3).expect("decode"), Meaning::Leaf { size_log2: 12, attributes });
    assert_eq!(format.decode(2, 0, 1 << 63 | 3).expect("decode"), Meaning::Fault(FaultKind::Reserved));
    assert_eq!(format.calls(), 5);
}

#[test]
fn a_unit_answers() {
    let engine = Engine::new(Config::default()).expect("an engine");
    let plugin = Plugin::load(&engine, HOSTILE).expect("a plugin");
    let mut instance = plugin.instantiate().expect("an instance");
    let registers = [("ROOT".to_owned(), 0x4000)];
    let outcome = instance.lookup(&registers, Requester::default(), NoMemory).expect("an answer");
    assert!(matches!(outcome, Outcome::Blocked(_)), "{outcome:?}");
}
