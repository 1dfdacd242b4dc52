//! Tables in which single entries are damaged: every bit of every kind of entry at every level, and random ones.
//!
//! One image holds hundreds of damaged entries, each in a slot of its own, so that no table has to be written again between two requests. A chain of tables leads
//! from the root to the last level; a damaged pointer stands beside the chain's own and points, or should, to the same table.

mod ladders;
mod nested;

pub use ladders::{AmdLadder, ArmLadder, Halves, RiscvLadder, VtdLadder};
pub use nested::{Nested, Stage};

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::ops::Range;

use anyhow::{Result, bail};
use stagecraft_tests::reference::generate::Rng;

use crate::judge::Tally;
use crate::known::KnownError;
use crate::production::{Answer, Production};
use crate::tables::Arena;
use crate::{Memory, Model, Outcome, Probe, Tables};

/// An entry that means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Good {
    /// What it is.
    pub what: &'static str,
    /// The entry.
    pub entry: u64,
}

/// The levels of a format, from the last one (height 0) upwards, and what stands in them.
pub trait Ladder {
    /// For messages.
    fn name(&self) -> String;

    /// The formats that the engine must find, first stage first.
    fn formats(&self) -> Vec<&'static str>;

    /// Log2 of what an entry covers, and the number of entries of a table, by height.
    fn rungs(&self) -> Vec<(u32, u64)>;

    /// Where tables may be.
    fn places(&self) -> Range<u64> {
        0x4000_0000..0x8000_0000
    }

    /// Log2 of the end of all addresses that leaves are given.
    fn address_bits(&self) -> u32 {
        38
    }

    /// Entry bits that hold address bits from 39 upwards: beyond the machine's RAM.
    fn high_address(&self) -> u64 {
        0xf_ff80_0000_0000
    }

    /// Bits about which the model is known to be wrong wherever they are set: most of the random changes leave them alone.
    fn blind_bits(&self) -> u64 {
        0
    }

    /// Pointers in a table of `height` to a table of `below`, which is lower; none if the format does not have this.
    fn pointer(&self, height: usize, below: usize, table: u64) -> Option<Good>;

    /// The lowest height at which entries are damaged.
    fn lowest(&self) -> usize {
        0
    }

    /// Leaves in a table of `height` that map an address, which is aligned to their size, and log2 of that size.
    fn leaves(&self, height: usize) -> Vec<(Good, u32)>;

    /// A leaf with an address.
    fn with_address(&self, leaf: u64, address: u64) -> u64 {
        leaf | address
    }

    /// The address field of any entry.
    fn address(&self, entry: u64) -> u64 {
        entry & 0xf_ffff_ffff_f000
    }

    /// The IOVA of a place in what the root covers.
    fn iova(&self, position: u64) -> u64 {
        position
    }

    /// How many bytes from the third page of all on are left for [`Ladder::complete`]: entries of the last level that are not damaged.
    fn kept(&self) -> u64 {
        0
    }

    /// Where in the machine an address that a leaf has comes to lie, if anywhere.
    fn place(&self, address: u64) -> Option<u64> {
        Some(address)
    }

    /// For the model.
    fn tables(&self, root: u64) -> Tables;

    /// What else is needed beside the damaged tables.
    fn complete(&self, image: Image, _: &mut Rng) -> Image {
        image
    }

    /// The known error because of which the model cannot be asked to read or write through a damaged entry.
    fn excuse(&self, damage: &Damage, write: bool) -> Option<KnownError>;
}

/// A damaged entry.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// The height of its table.
    pub height: usize,
    /// What it was.
    pub good: Good,
    /// What it is.
    pub entry: u64,
    /// An IOVA that goes through it.
    pub iova: u64,
    /// For a pointer: the height of the table that it pointed to.
    pub below: Option<usize>,
}

impl fmt::Debug for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let changed = self.good.entry ^ self.entry;
        let bits: Vec<u32> = (0..64).filter(|bit| changed >> bit & 1 == 1).collect();
        write!(f, "{} at height {}, {:#x} became {:#x}", self.good.what, self.height, self.good.entry, self.entry)?;
        if bits.len() > 4 { write!(f, ", many bits") } else { write!(f, ", bits {bits:?}") }
    }
}

/// Tables with damaged entries.
#[derive(Clone, Debug)]
pub struct Image {
    /// The tables.
    pub memory: Memory,
    /// The first one of those that are damaged.
    pub root: u64,
    /// For the model.
    pub tables: Tables,
    /// The address that the bytes of [`Ladder::kept`] are mapped to.
    pub kept: u64,
    /// The damaged entries.
    pub damages: Vec<Damage>,
}

/// What is done to an entry.
#[derive(Clone, Copy, Debug)]
enum Change {
    Flip(u64),
    /// All bits but these.
    Random {
        value: u64,
        kept: u64,
    },
}

impl Change {
    fn random(ladder: &dyn Ladder, rng: &mut Rng) -> Change {
        let some = |rng: &mut Rng| (0..2 + rng.below(3)).fold(0, |bits, _| bits | 1 << rng.below(64));
        let blind = if rng.percent(80) { ladder.blind_bits() } else { 0 };
        match rng.below(6) {
            0 => Change::Flip(some(rng) & !blind),
            1 => Change::Flip(some(rng) & !ladder.high_address() & !blind),
            // The low bits say what an entry is; the address stays in RAM.
            2 => Change::Random { value: rng.number() & !ladder.high_address(), kept: 0xfff | blind },
            3 => Change::Random { value: rng.number() & !ladder.high_address(), kept: blind },
            // An address that stays.
            4 => Change::Random { value: rng.number(), kept: !ladder.high_address() & 0x7f_ffff_f000 | blind },
            _ => Change::Random { value: rng.number(), kept: blind },
        }
    }

    fn apply(self, entry: u64) -> u64 {
        match self {
            Change::Flip(bits) => entry ^ bits,
            Change::Random { value, kept } => entry & kept | value & !kept,
        }
    }
}

/// An entry to be damaged: which of the leaves or, for a pointer, the height that it points to, and what is done.
#[derive(Clone, Copy, Debug)]
struct Task {
    leaf: Option<usize>,
    below: usize,
    change: Change,
}

/// Images with every single bit of every kind of entry flipped once, and `random` other changes of each.
pub fn images(ladder: &dyn Ladder, random: usize, rng: &mut Rng) -> Vec<Image> {
    let mut tasks: BTreeMap<usize, Vec<Task>> = BTreeMap::new();
    for height in ladder.lowest()..ladder.rungs().len() {
        let leaves = (0..ladder.leaves(height).len()).map(|leaf| (Some(leaf), 0));
        let pointers = (0..height).filter(|below| ladder.pointer(height, *below, 0).is_some()).map(|below| (None, below));
        for (leaf, below) in leaves.chain(pointers) {
            let flips = (0..64).map(|bit| Change::Flip(1 << bit));
            let changes: Vec<Change> = flips.chain((0..random).map(|_| Change::random(ladder, rng))).collect();
            tasks.entry(height).or_default().extend(changes.into_iter().map(|change| Task { leaf, below, change }));
        }
    }
    let mut images = Vec::new();
    while tasks.values().any(|tasks| !tasks.is_empty()) {
        let image = image(ladder, &mut tasks, rng);
        images.push(ladder.complete(image, rng));
    }
    images
}

/// An image with as many of the tasks as there are slots for.
fn image(ladder: &dyn Ladder, tasks: &mut BTreeMap<usize, Vec<Task>>, rng: &mut Rng) -> Image {
    let rungs = ladder.rungs();
    let mut arena = Arena::new(ladder.places());
    let chain: Vec<u64> = rungs.iter().map(|(_, entries)| arena.room((entries * 8).next_multiple_of(4096), rng)).collect();
    for height in 1..rungs.len() {
        if let Some(pointer) = ladder.pointer(height, height - 1, chain[height - 1]) {
            arena.write(chain[height], pointer.entry);
        }
    }
    // At the end of the chain: entry 1 of the last table.
    let (page, _) = ladder.leaves(0)[0];
    let address = random_address(ladder, rungs[0].0, rng);
    arena.write(chain[0] + 8, ladder.with_address(page.entry, address));
    // Behind it what is kept.
    let (kept, kept_slots) = (random_address(ladder, 20, rng), ladder.kept() >> rungs[0].0);
    for slot in 0..kept_slots {
        arena.write(chain[0] + (2 + slot) * 8, ladder.with_address(page.entry, kept + (slot << rungs[0].0)));
    }
    let mut damages = Vec::new();
    for (height, tasks) in tasks.iter_mut() {
        let (shift, entries) = rungs[*height];
        let mut slots: Vec<u64> = (2 + if *height == 0 { kept_slots } else { 0 }..entries).collect();
        while let (false, Some(task)) = (slots.is_empty(), tasks.pop()) {
            let slot = slots.swap_remove(rng.below(slots.len() as u64) as usize);
            let (good, offset, below) = match task.leaf {
                Some(leaf) => {
                    let (good, size) = ladder.leaves(*height)[leaf];
                    // A leaf that is larger than RAM is looked at where RAM is.
                    let offset = if size > 36 { (8 << 30) + rng.below(400 << 30) } else { rng.below(1 << size.min(shift)) };
                    let entry = ladder.with_address(good.entry, random_address(ladder, size, rng));
                    (Good { entry, ..good }, offset % (1 << shift), None)
                }
                None => {
                    let Some(good) = ladder.pointer(*height, task.below, chain[task.below]) else { continue };
                    (good, (1 << rungs[0].0) + rng.below(1 << rungs[0].0), Some(task.below))
                }
            };
            let entry = task.change.apply(good.entry);
            arena.write(chain[*height] + slot * 8, entry);
            let iova = ladder.iova((slot << shift) + (offset - offset % 8));
            damages.push(Damage { height: *height, good, entry, iova, below });
        }
    }
    let root = chain[rungs.len() - 1];
    Image { memory: arena.memory, root, tables: ladder.tables(root), kept, damages }
}

/// An address above the holes below 4 GiB, aligned to a size; zero for what is larger than RAM.
fn random_address(ladder: &dyn Ladder, size_log2: u32, rng: &mut Rng) -> u64 {
    if size_log2 > 36 { 0 } else { ((8 << 30) + rng.below((1 << ladder.address_bits()) - (16 << 30))) >> size_log2 << size_log2 }
}

/// What the model should do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Reached(u64),
    Refused,
    /// It goes where nobody can look.
    NotRefused,
}

/// Asks engine and model about every damaged entry of an image.
///
/// # Errors
/// Lists the disagreements.
pub fn judge_image(model: &mut dyn Model, production: &Production, ladder: &dyn Ladder, image: &Image) -> Result<Tally> {
    model.write_memory(&image.memory)?;
    model.set_table(image.tables)?;
    let snapshot = production.load(&model.snapshot()?)?;
    let mut view = production.view(&snapshot)?;
    if view.formats() != ladder.formats() {
        bail!("the engine finds {:x?}", view.configs);
    }
    let mut tally = Tally::default();
    let mut asked = Vec::new();
    for damage in &image.damages {
        for write in [false, true] {
            if ladder.excuse(damage, write).is_some() {
                tally.excused += 1;
                tally.unasked += 1;
                continue;
            }
            let answer = view.ask(damage.iova, write)?;
            if let Some(address) = answer.address() {
                model.tag_page(address)?;
            }
            asked.push((*damage, write, answer));
        }
        // A request that should be refused must be noticed where the entry's address, old or new, would take it.
        let (shift, _) = ladder.rungs()[damage.height];
        for entry in [damage.good.entry, damage.entry] {
            let address = (ladder.address(entry) >> shift << shift) + damage.iova % (1 << shift);
            if let Some(address) = ladder.place(address) {
                model.tag_page(address)?;
            }
        }
    }
    // A page that was unwritten when the engine looked at it, and is tagged now, says something else to the model.
    let expected = |model: &mut dyn Model, write: bool, answer: &Answer| match *answer {
        Answer::Reaches(address) if model.machine().is_target(address) => Some(Expected::Reached(address)),
        Answer::Reaches(_) => (!write && model.records()).then_some(Expected::NotRefused),
        // Below 4 GiB there are devices that do not like to be read or written.
        Answer::Outside(address) => (address >> 32 != 0 && model.records()).then_some(Expected::NotRefused),
        Answer::Refused(_) => Some(Expected::Refused),
        Answer::Unwritten(page) => (!model.machine().is_tagged(page)).then_some(Expected::Refused),
    };
    let mut questions = Vec::new();
    for (damage, write, answer) in asked {
        match expected(model, write, &answer) {
            Some(expected) => questions.push((damage, write, answer, expected)),
            None => tally.unasked += 1,
        }
    }
    let probe = |(damage, write, _, expected): &(Damage, bool, Answer, Expected)| Probe {
        iova: damage.iova,
        write: *write,
        expected: if let Expected::Reached(address) = expected { Some(*address) } else { None },
    };
    let probes: Vec<Probe> = questions.iter().map(probe).collect();
    let start = std::time::Instant::now();
    let outcomes = model.dma_many(&probes)?;
    tally.time = start.elapsed();
    let (mut wrong, mut count) = (String::new(), 0);
    for ((damage, write, answer, expected), outcome) in questions.iter().zip(outcomes) {
        match (expected, outcome) {
            (Expected::Reached(address), Outcome::Reached(reached)) if *address == reached => tally.reached += 1,
            (Expected::NotRefused, Outcome::Reached(_) | Outcome::Elsewhere(_) | Outcome::Nothing) => tally.reached += 1,
            (Expected::Refused, Outcome::Fault(_)) => tally.refused += 1,
            (Expected::Refused, Outcome::Nothing) if !model.records() => {
                tally.refused += 1;
                tally.unrecorded += 1;
            }
            _ => {
                count += 1;
                if count <= 40 {
                    let kind = if *write { "write" } else { "read" };
                    let engine = match answer {
                        Answer::Refused(fault) => format!("refused, {}", fault.cause.as_str()),
                        other => format!("{other:x?}"),
                    };
                    writeln!(wrong, "  {damage:?}, {kind} at {:#x}: engine {engine}; model {outcome:x?}", damage.iova)?;
                }
            }
        }
    }
    if count > 0 {
        bail!("{}, {}: {count} of {} requests differ:\n{wrong}{:x?}", model.name(), ladder.name(), probes.len(), view.configs);
    }
    Ok(tally)
}
