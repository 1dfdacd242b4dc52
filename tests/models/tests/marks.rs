//! What DMA leaves in the tables: `intel-iommu`'s first stage sets A in every entry that it uses and D in leaves. The engine, told of the same requests, writes the same,
//! and so does the reference.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;

use stagecraft::memory::{Budget, EntryLayout, EntryMemory, Limits, MarkMemory, MemoryMap, ReadError, WriteError};
use stagecraft::sync::{Changes, Marked, MarksWritten, ShadowLimits, Space, Unwatched, Way};
use stagecraft::{Gpa, Span};
use stagecraft_models::judge::{interesting, seeds};
use stagecraft_models::known::{self, KnownError};
use stagecraft_models::production::Production;
use stagecraft_models::spaces::{Contents, vtd};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Board, Memory, Model, Outcome, Probe, Tables, available};
use stagecraft_tests::reference::generate::Rng;
use stagecraft_tests::reference::walk::{self, Walker};

/// A copy of the machine's tables, little-endian words.
struct Copy(RefCell<Memory>);

impl EntryMemory for Copy {
    fn read_entries(&self, address: Gpa, _: EntryLayout, entries: &mut [u64]) -> Result<(), ReadError> {
        for (at, entry) in (address.0..).step_by(8).zip(entries) {
            *entry = self.0.borrow().read(at, false).map_err(|_| ReadError(Gpa(at)))?;
        }
        Ok(())
    }
}

impl MarkMemory for Copy {
    fn compare_exchange_entry(&self, address: Gpa, _: EntryLayout, old: u64, new: u64) -> Result<bool, WriteError> {
        let mut memory = self.0.borrow_mut();
        let stood = memory.read(address.0, false).map_err(|_| WriteError(address))?;
        if stood == old {
            memory.write(address.0, new, false);
        }
        Ok(stood == old)
    }
}

/// A and D of a first-stage entry.
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;

/// Which error of the model concerns what a request leaves in an entry.
fn excuse(marked: &walk::Marked, write: bool) -> Option<KnownError> {
    // A write that does not set both is one of a leaf that has one, or passes a pointer.
    let is_leaf = marked.old & D != marked.new & D || marked.old & D != 0;
    (write && is_leaf && marked.old ^ marked.new != A | D).then_some(known::VTD_ONE_MARK)
}

/// Words that differ: where, and what stands there.
fn differences(one: &Memory, other: &Memory) -> Vec<(u64, u64, u64)> {
    let words = one.pages.keys().flat_map(|page| (0..512).map(move |index| page + index * 8));
    let both = words.map(|at| (at, one.read(at, false).unwrap(), other.read(at, false).unwrap()));
    both.filter(|(_, one, other)| one != other).collect()
}

#[test]
fn first_stage_entries_are_marked_as_the_model_marks_them() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(Mode::ScalableFirst, 48).unwrap();
    let production = Production::new().unwrap();
    let (mut marked, mut excused) = ([0; 2], 0);
    for seed in seeds(8) {
        let mut rng = Rng::new(seed);
        let space = vtd::space(Mode::ScalableFirst, 48, Contents { variety: true }, &mut rng);
        let Tables::Vtd(config) = space.tables else { unreachable!() };
        model.write_memory(&space.memory).unwrap();
        model.set_table(space.tables).unwrap();

        // Requests that go through, wherever they lead to memory that DMA may touch; and what the reference says that they leave behind.
        let (mut probes, mut by_reference) = (Vec::new(), space.memory.clone());
        for iova in interesting(&space.truth, &mut rng, 90) {
            let write = rng.percent(50);
            let expected = space.lookup(iova, write).filter(|address| model.machine().is_target(*address));
            let Some(address) = expected else { continue };
            let marks = Walker::new(&by_reference, &[config]).unwrap().marks(iova, write).unwrap();
            if marks.iter().any(|one| excuse(one, write).is_some()) {
                excused += 1;
                continue;
            }
            for one in marks {
                by_reference.write(one.address, one.new, false);
                // A pointer's entry gets A alone, and so does a leaf's that is read.
                marked[usize::from(one.old ^ one.new != A)] += 1;
            }
            model.tag_page(address).unwrap();
            probes.push(Probe { iova, write, expected });
        }
        let outcomes = model.dma_many(&probes).unwrap();
        let reached: Vec<Outcome> = probes.iter().map(|probe| Outcome::Reached(probe.expected.unwrap())).collect();
        assert_eq!(outcomes, reached, "seed {seed}");
        let mut by_model = Memory::default();
        for page in space.memory.pages.keys() {
            let bytes = model.machine().qtest.read(*page, 4096).unwrap();
            by_model.pages.insert(*page, <[u8; 4096]>::try_from(bytes).unwrap().into());
        }

        assert_eq!(differences(&by_model, &by_reference), [], "seed {seed}: the model and the reference");

        let copy = Copy(RefCell::new(space.memory.clone()));
        let snapshot = production.load(&model.snapshot().unwrap()).unwrap();
        let tables = production.view(&snapshot).unwrap().configs;
        let format = production.plugins().by_format(&tables[0].format).unwrap().open(&tables[0]).unwrap();
        let limits = ShadowLimits { table_pages: 1 << 12, leaves: 1 << 18 };
        let mut live = Space::open(Way::table(Box::new(format)), MemoryMap::everything(48), limits, Box::new(Unwatched)).unwrap();
        let budget = Budget::new(Limits::default());
        live.synchronise(&copy, Span::ALL, false, &budget, &mut Changes::new());
        let mut written = MarksWritten::default();
        for probe in &probes {
            let iova = Span { first: probe.iova, last: probe.iova + 7 };
            live.mark(&copy, Marked { iova, accessed: true, dirty: probe.write }, &budget, &mut written);
        }
        assert_eq!(differences(&by_model, &copy.0.into_inner()), [], "seed {seed}: the model and the engine");
        assert!(written.tables > 0 && written.skipped == 0, "seed {seed}: {written:?}");
    }
    assert!(marked.iter().all(|count| *count > 20), "{marked:?}, {excused} excused");
}
