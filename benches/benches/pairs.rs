//! Bulk conversion of every format to every other, against SMMUv3 stage 1 to VT-d first stage: a matrix of ratios, and one of questions to plugins.
#![allow(clippy::unwrap_used, missing_docs)]

use std::cell::RefCell;
use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use stagecraft::plugin::{Config, Engine, Plugins, TableConfig};
use stagecraft::table::{Arena, Table};
use stagecraft_benches::contest::{Contestant, in_turn, is_measuring, is_wanted};
use stagecraft_benches::pairs::{BASELINE, LARGE, Made, SIDES, Side, bytes, make};
use stagecraft_benches::production::{self, Reused};

/// Where built tables claim to be: low enough for entries of 4 bytes.
const TARGET: u64 = 1 << 31;

/// Entries on the finer side of a pair.
fn entries() -> u64 {
    if is_measuring() { 262_144 } else { 2048 }
}

/// Sources that are rotated through, and targets, in MiB each.
const MEBIBYTES: u64 = 64;

/// A pair that is ready: the same tables, into one arena after the other.
struct Pair<'a> {
    made: &'a Made,
    arenas: &'a [RefCell<Arena>],
    source: Table,
    target: Reused,
    next: usize,
}

impl<'a> Pair<'a> {
    /// Converts every copy once, and checks that all of it was; the number of questions that both plugins were asked for the first.
    fn new(plugins: &Plugins, made: &'a Made, arenas: &'a [RefCell<Arena>], name: &str, target: &Side) -> (Self, u64) {
        let config = TableConfig::new(target.format, target.settings);
        let source = production::open(plugins, &made.config);
        let mut pair = Self { made, arenas, source, target: production::open_format(plugins, &config), next: 0 };
        let mut questions = None;
        for copy in 0..made.copies.len().max(arenas.len()) {
            pair.next = copy;
            let built = pair.convert();
            assert_eq!(built.losses.refused_bytes(), 0, "{name} to {}: {:?}", target.name, built.losses);
            assert!(built.leaves >= made.bytes >> target.page_log2, "{name} to {}", target.name);
            questions.get_or_insert(built.questions + pair.source.questions());
        }
        (pair, questions.unwrap_or(0))
    }

    fn convert(&mut self) -> stagecraft::table::Built {
        self.next += 1;
        let copy = &self.made.copies[self.next % self.made.copies.len()];
        let arena = &mut self.arenas[self.next % self.arenas.len()].borrow_mut();
        production::convert(&mut self.source, copy, &self.made.map, self.target.clone(), arena)
    }
}

fn arenas() -> Vec<RefCell<Arena>> {
    // Most targets take eight bytes for an entry.
    let count = if is_measuring() { (MEBIBYTES << 20) / (entries() * 8) } else { 2 };
    (0..count).map(|_| RefCell::new(Arena::new(TARGET, 1 << 30))).collect()
}

fn print_matrix(what: &str, rows: &[(&str, Vec<String>)]) {
    println!("\n{what}; rows are sources");
    println!("{:<12}{}", "", SIDES.map(|side| format!("{:>12}", side.name)).concat());
    for (name, cells) in rows {
        println!("{name:<12}{}", cells.iter().map(|cell| format!("{cell:>12}")).collect::<String>());
    }
}

fn pairs(criterion: &mut Criterion) {
    if !is_wanted("pairs") {
        return;
    }
    let plugins = Plugins::builtin(&Engine::new(Config::default()).unwrap()).unwrap();
    let mebibytes = if is_measuring() { MEBIBYTES } else { 0 };
    let (arenas, more_arenas) = (arenas(), arenas());
    let (first, second) = (&SIDES[BASELINE.0], &SIDES[BASELINE.1]);
    let (mut ratios, mut questions) = (Vec::new(), Vec::new());
    for source in SIDES.iter().chain(&LARGE) {
        let (mut made, mut compared): (Vec<(u8, Made)>, Vec<Made>) = (Vec::new(), Vec::new());
        let (mut ratio_row, mut question_row) = (Vec::new(), Vec::new());
        for target in &SIDES {
            let (unit, size) = (source.page_log2.max(target.page_log2), bytes(source, target, entries()));
            if !made.iter().any(|(known, made)| (*known, made.bytes) == (unit, size)) {
                made.push((unit, make(&plugins, source, unit, size, mebibytes)));
            }
            let (_, tables) = made.iter().find(|(known, made)| (*known, made.bytes) == (unit, size)).unwrap();
            // The comparison has as many entries.
            let same = size >> source.slot_log2.min(target.slot_log2) << 12;
            if !compared.iter().any(|made| made.bytes == same) {
                compared.push(make(&plugins, first, 12, same, mebibytes));
            }
            let baseline = compared.iter().find(|made| made.bytes == same).unwrap();
            let (mut baseline, _) = Pair::new(&plugins, baseline, &more_arenas, first.name, second);
            let (mut pair, asked) = Pair::new(&plugins, tables, &arenas, source.name, target);
            if std::ptr::eq(source, first) || std::ptr::eq(target, second) {
                criterion.bench_function(&format!("pairs/{} to {}", source.name, target.name), |bencher| bencher.iter(|| black_box(pair.convert())));
            }
            let mut contestants =
                [Contestant::new("baseline", || drop(black_box(baseline.convert()))), Contestant::new("pair", || drop(black_box(pair.convert())))];
            let ratio = if is_measuring() { in_turn(9, &mut contestants)[1] } else { f64::NAN };
            ratio_row.push(format!("{ratio:.2}"));
            question_row.push(asked.to_string());
        }
        ratios.push((source.name, ratio_row));
        questions.push((source.name, question_row));
    }
    if is_measuring() {
        print_matrix("times SMMUv3 stage 1 to VT-d first stage of as many entries, medians of 9 rounds in turn", &ratios);
    }
    print_matrix("questions to both plugins, none of them asked before", &questions);
}

fn short() -> Criterion {
    use std::time::Duration;
    Criterion::default().sample_size(10).warm_up_time(Duration::from_millis(50)).measurement_time(Duration::from_millis(200))
}

criterion_group! { name = benches; config = short().configure_from_args(); targets = pairs }
criterion_main!(benches);
