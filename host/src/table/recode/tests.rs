//! What the loops write and find, against entry by entry.

use super::*;
use crate::Attributes;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        ((self.next() >> 32) * bound) >> 32
    }
}

/// A target and where it begins, for entries of either size.
fn put(words: &mut [u64], slot: usize, entry: u64, form: Form<'_>) {
    let bytes = if form.narrow { 4 } else { 8 };
    let mut entry = entry.to_le_bytes();
    if form.big {
        entry[..bytes].reverse();
    }
    let (word, at) = (slot * bytes / 8, slot * bytes % 8);
    let mut target = words[word].to_ne_bytes();
    target[at..at + bytes].copy_from_slice(&entry[..bytes]);
    words[word] = u64::from_ne_bytes(target);
}

fn judged_as((as_expected, others, gaps): (bool, u64, u64)) -> Judged {
    if as_expected { Judged::alike(Passed { others, gaps }) } else { Judged::UNLIKE }
}

/// What [`recode_expected`] is to find and write, entry by entry.
fn plainly(source: &[u64], expected: Expected, target: &mut [u64], slot: usize, form: Form<'_>) -> (bool, u64, u64) {
    let (kinds, pattern) = (expected.pattern.kinds, expected.pattern);
    let (mut as_expected, mut others, mut gaps) = (true, 0, 0);
    for (index, entry) in source.iter().enumerate() {
        let gap = kinds.has_gaps() && *entry == kinds.gap();
        let second = kinds.is_second(*entry) && !gap;
        let address = entry & pattern.address | pattern.moved.apply(*entry);
        as_expected &= gap || kinds.leaf_distance(*entry, pattern.mask) == 0 && address.wrapping_sub(expected.first) <= expected.room;
        others += u64::from(second);
        gaps += u64::from(gap);
        for (part, bits) in form.parts.iter().enumerate() {
            let moved = form.moves.iter().fold(0, |all, one| all | one.apply(*entry));
            let leaf = form.patterns[usize::from(second)] | moved | bits;
            put(target, slot + index * form.parts.len() + part, if gap { form.absent } else { leaf }, form);
        }
    }
    (as_expected, others, gaps)
}

/// Address bits 12 to 43 of the source, in up to four parts that move by different distances, to wherever they do not meet patterns.
fn some_moves(random: &mut Random, narrow: bool) -> Vec<Move> {
    if narrow {
        let turn = 64 - [0, 2, 8][random.below(3) as usize];
        return vec![Move { mask: 0xffff_f000, turn: turn % 64 }];
    }
    let whole = 0xfff_ffff_f000_u64;
    match random.below(5) {
        0 => vec![Move { mask: whole, turn: 0 }],
        1 => vec![Move { mask: whole, turn: 62 }],
        count => (0..count).map(|index| Move { mask: whole & 0xff_0000_0ff0 << (index * 8), turn: (index * 63 % 64) as u32 }).collect(),
    }
}

fn first_difference(words: &[u64], wanted: &[u64]) -> Option<(usize, u64, u64)> {
    words.iter().zip(wanted).enumerate().find(|(_, (word, wanted))| word != wanted).map(|(index, (word, wanted))| (index, *word, *wanted))
}

#[test]
fn all_forms_are_written_as_entry_by_entry() {
    let mut random = Random(0x5eed);
    let (mut judged, mut unexpected) = (0, 0);
    for round in 0..if cfg!(miri) { 40 } else { 6000 } {
        let (narrow, big) = (random.below(2) == 0, random.below(2) == 0);
        let moves = some_moves(&mut random, narrow);
        let parts = 1_usize << if random.below(2) == 0 { 0 } else { random.below(6) };
        // Patterns below the address; parts in bits that no pattern and no address has.
        let parts: Vec<u64> = (0..parts as u64).map(|part| if narrow { part << 4 & 0xf0 } else { part << 58 }).collect();
        let lines = lines(&parts);
        let patterns = [random.below(8) | 1, random.below(8) | 1];
        let in_place = parts.len() == 1 && !narrow && !big && moves.iter().all(|one| one.turn == 0);
        let absent = [0, 0x400][random.below(2) as usize];
        let mut kinds = Kinds::one(3, Attributes::READ);
        if random.below(2) == 0 {
            kinds = kinds.with(3 | [1 << 7, 1 << 54, 0x11 << 6][random.below(3) as usize], Attributes::READ);
        }
        if random.below(2) == 0 {
            kinds = kinds.with_gaps([0, 0x400][random.below(2) as usize]);
        }
        let whole = if narrow { 0xffff_f000_u64 } else { 0xfff_ffff_f000 };
        let moved = if round % 3 == 0 { Move { mask: whole, turn: 62 } } else { Move::default() };
        let address = if moved.mask == 0 { whole } else { 0 };
        let (first, room) = if random.below(2) == 0 { (0, u64::MAX >> 8) } else { (0x1000, whole >> 2) };
        let expected = Expected { pattern: Pattern { mask: !whole, kinds, address, moved }, first, room };
        let count = [8, 16, 64, 512, 1 + random.below(100)][random.below(5) as usize] as usize;
        let (some_gaps, odd) = (random.below(2), random.below(4) == 0);
        let source: Vec<u64> = (0..count)
            .map(|_| {
                let leaf =
                    (random.next() & whole >> 3).max(0x8000) & whole | if random.below(3) == 0 { kinds.pattern() ^ kinds.difference() } else { 3 };
                match random.below(64) {
                    0..8 if some_gaps == 1 && kinds.has_gaps() => kinds.gap(),
                    8 if odd => leaf ^ 1 << random.below(if narrow { 32 } else { 64 }),
                    _ => leaf,
                }
            })
            .collect();
        let slots = count * parts.len();
        let slot = [0, 0, 8, 16, 64, 2 * random.below(20)][random.below(6) as usize] as usize;
        let past_cache = random.below(2) == 0 && (!narrow || slots.is_multiple_of(2));
        let form = Form { moves: &moves, patterns, absent, parts: &parts, lines: &lines, narrow, big, in_place, past_cache };
        // From a line on, as tables are; nothing before and after may change.
        let fresh = || vec![0xdead_beef_u64; 8 + slot + slots + 8];
        let wanted_in = |memory: &[u64]| {
            let (mut wanted, aligned) = (fresh(), memory.as_ptr().align_offset(64));
            let found = plainly(&source, expected, &mut wanted[aligned..], slot, form);
            (wanted, aligned, found)
        };
        let mut memory = fresh();
        let (wanted, aligned, found) = wanted_in(&memory);
        let counts = recode(&source, kinds, &mut memory[aligned..], slot, &form);
        crate::table::lanes::fence();
        assert_eq!(counts, (found.1, found.2), "round {round}: {form:?}");
        assert_eq!(first_difference(&memory, &wanted), None, "round {round}: {form:?}");
        let mut memory = fresh();
        let (wanted, aligned, found) = wanted_in(&memory);
        if let Some(counts) = recode_expected(&source, &expected, &mut memory[aligned..], slot, &form) {
            crate::table::lanes::fence();
            assert_eq!(counts, judged_as(found), "round {round}: {expected:?} {form:?}");
            assert_eq!(first_difference(&memory, &wanted), None, "round {round}: {form:?}");
            judged += 1;
            unexpected += u64::from(counts == Judged::UNLIKE);
        }
    }
    assert!(cfg!(miri) || !has_one_pass() || judged > 1000 && unexpected > 100 && unexpected < judged / 2, "{judged}, {unexpected} unexpected");
}

#[test]
fn tables_with_gaps_are_written_where_they_have_leaves() {
    let mut random = Random(0x6eed);
    let (mut judged, mut unexpected, mut skipped) = (0, 0, 0);
    for round in 0..if cfg!(miri) { 4 } else { 2000 } {
        let big = random.below(2) == 0;
        let moves = some_moves(&mut random, false);
        let form = Form {
            moves: &moves,
            patterns: [random.below(8) | 1, random.below(8) | 1],
            absent: 0,
            parts: &[0],
            lines: &lines(&[0]),
            narrow: false,
            big,
            in_place: false,
            past_cache: random.below(2) == 0,
        };
        assert!(form.is_sparse());
        let gap = [0, 0x400][random.below(2) as usize];
        let kinds = Kinds::one(3, Attributes::READ).with(3 | 1 << 7, Attributes::READ).with_gaps(gap);
        let whole = 0xfff_ffff_f000;
        let pattern = Pattern { mask: !whole, kinds, address: whole, moved: Move::default() };
        let expected = Expected { pattern, first: 0, room: whole };
        let density = 1 + random.below(8);
        let mut source: Vec<u64> =
            (0..512).map(|_| if random.below(density) == 0 { random.next() & whole | 3 | random.below(2) << 7 } else { gap }).collect();
        // Runs of gaps, and an entry that is not as expected.
        for _ in 0..random.below(8) {
            let first = random.below(448) as usize;
            source[first..first + 64].fill(gap);
        }
        if random.below(4) == 0 {
            source[random.below(512) as usize] = 1 << random.below(63) | 5;
        }
        // Memory that held something in some of its lines, and is zero elsewhere.
        let mut written = random.next() & random.next();
        let before = written;
        let mut memory = vec![0xdead_beef_u64; 512 + 16];
        let aligned = memory.as_ptr().align_offset(64);
        let target = &mut memory[aligned..aligned + 512];
        for (index, word) in target.iter_mut().enumerate() {
            *word = if written >> (index / 8) & 1 != 0 { random.next() } else { 0 };
        }
        let mut wanted = vec![0; 512];
        let found = plainly(&source, expected, &mut wanted, 0, form);
        let Some(counts) = recode_sparse(&source, &expected, target, &mut written, &form) else { continue };
        crate::table::lanes::fence();
        assert_eq!(counts, judged_as(found), "round {round}: {expected:?} {form:?}");
        assert_eq!(first_difference(target, &wanted), None, "round {round}: {form:?}");
        let holds_leaf = |line: usize| source[line * 8..line * 8 + 8].iter().any(|entry| *entry != gap);
        assert_eq!(written, (0..64).map(|line| u64::from(holds_leaf(line)) << line).sum::<u64>(), "round {round}");
        skipped += (!before & !written).count_ones();
        judged += 1;
        unexpected += u64::from(counts == Judged::UNLIKE);
    }
    assert!(
        cfg!(miri) || !has_one_pass() || judged > 1000 && unexpected > 100 && unexpected < judged / 2 && skipped > 1000,
        "{judged}, {unexpected}, {skipped}"
    );
}

#[test]
fn groups_are_whole_where_each_entry_says_so() {
    let mut random = Random(0x3eed);
    let mut whole = 0;
    for round in 0..if cfg!(miri) { 40 } else { 4000 } {
        let parts = 1_u64 << (1 + random.below(5));
        let group = Group::new((0..parts).map(|part| part << 12).collect(), (parts - 1) << 12);
        let mut kinds = Kinds::one(3, Attributes::READ);
        if random.below(2) == 0 {
            kinds = kinds.with_gaps(0);
        }
        let absent = random.below(2) == 0;
        let mut entries: Vec<u64> = Vec::new();
        for _ in 0..[1, 16, 32, 1 + random.below(40)][random.below(4) as usize] {
            let first = random.next() & 0xffff_ffff_f000 & !group.below | 3;
            // Back to front, they are not one.
            let turned = if random.below(40) == 0 { group.below } else { 0 };
            let gap = absent && random.below(3) == 0;
            entries.extend(group.parts.iter().map(|part| if gap { 0 } else { first ^ part ^ turned }));
        }
        if random.below(2) == 0 {
            let place = random.below(entries.len() as u64) as usize;
            entries[place] ^= 1 << random.below(64);
        }
        let is_whole = |entries: &[u64]| {
            let gap = entries.iter().all(|entry| kinds.is_gap(*entry));
            let begins = entries[0] & group.below == 0 && !kinds.is_gap(entries[0]);
            gap || begins && entries.iter().zip(&group.parts).all(|(entry, part)| *entry == entries[0] ^ part)
        };
        let wanted = entries.chunks(parts as usize).all(is_whole);
        let mut firsts = vec![7];
        assert_eq!(merge(&entries, kinds, &group, &mut firsts), wanted, "round {round}");
        assert!(firsts.iter().eq(entries.iter().step_by(parts as usize)), "round {round}");
        whole += u64::from(wanted);
    }
    assert!(cfg!(miri) || (500..3500).contains(&whole), "{whole}");
}
