//! Every format that a model has, converted into every other by the production engine: the same requests have the same outcomes on the models of both.
//!
//! What the target cannot say must fault there, and must have been counted. Refused as [`Loss`] kinds: `input-range` (IOVAs beyond the target's levels, or in an
//! upper half that it does not have), `output-range` (addresses beyond the target's output size), `granule` (pages that do not make up a whole aligned page of
//! the target), `permission` (write-only leaves where the target has none). A source's IOVAs with an ignored top byte are not asked about: the target has them
//! without a tag only.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use stagecraft::table::Loss;
use stagecraft_models::amd::Amd;
use stagecraft_models::conversion::{self, Goal, converted, in_memory, reserve};
use stagecraft_models::judge::{Tally, compare_with_excuses, lookup, questions, seeds, tag_interrupts};
use stagecraft_models::known::{self, KnownError};
use stagecraft_models::production::Production;
use stagecraft_models::riscv::Riscv;
use stagecraft_models::smmu::{Smmu, Stages};
use stagecraft_models::spaces::{Contents, INTERRUPTS, Space, amd, riscv, smmu, vtd};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Board, Model, Tables, available};
use stagecraft_tests::reference::Run;
use stagecraft_tests::reference::generate::Rng;

/// A model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seat {
    Legacy,
    ScalableSecond,
    ScalableFirst,
    Amd,
    Smmu,
    Riscv,
}

/// One of each.
struct Models {
    vtd: [Vtd; 3],
    amd: Amd,
    smmu: Smmu,
    riscv: Riscv,
}

impl Models {
    fn start() -> Result<Models> {
        let vtd = [Vtd::start(Mode::Legacy, 48)?, Vtd::start(Mode::ScalableSecond, 48)?, Vtd::start(Mode::ScalableFirst, 48)?];
        Ok(Models { vtd, amd: Amd::start()?, smmu: Smmu::start(Stages::Nested)?, riscv: Riscv::start()? })
    }

    fn get(&mut self, seat: Seat) -> &mut dyn Model {
        match seat {
            Seat::Legacy => &mut self.vtd[0],
            Seat::ScalableSecond => &mut self.vtd[1],
            Seat::ScalableFirst => &mut self.vtd[2],
            Seat::Amd => &mut self.amd,
            Seat::Smmu => &mut self.smmu,
            Seat::Riscv => &mut self.riscv,
        }
    }
}

type Source = (&'static str, Seat, fn(Contents, &mut Rng) -> Space);

const X86_SOURCES: &[Source] = &[
    ("VT-d legacy second stage", Seat::Legacy, |contents, rng| vtd::space(Mode::Legacy, 48, contents, rng)),
    ("VT-d scalable second stage", Seat::ScalableSecond, |contents, rng| vtd::space(Mode::ScalableSecond, 48, contents, rng)),
    ("VT-d first stage", Seat::ScalableFirst, |contents, rng| vtd::space(Mode::ScalableFirst, 48, contents, rng)),
    ("AMD v1", Seat::Amd, amd::space),
];

const ARM_SOURCES: &[Source] = &[
    ("SMMUv3 stage 1, 4K", Seat::Smmu, |contents, rng| smmu::stage_1(&[4096], contents, rng)),
    ("SMMUv3 stage 1, 16K", Seat::Smmu, |contents, rng| smmu::stage_1(&[16384], contents, rng)),
    ("SMMUv3 stage 1, 64K", Seat::Smmu, |contents, rng| smmu::stage_1(&[65536], contents, rng)),
    ("SMMUv3 stage 2", Seat::Smmu, |contents, rng| smmu::stage_2(rng.pick(&[4096, 16384, 65536]), contents, rng)),
    ("SMMUv3 nested", Seat::Smmu, smmu::nested),
];

const RISCV_SOURCES: &[Source] = &[
    ("RISC-V Sv39", Seat::Riscv, |contents, rng| riscv::space(false, 3, contents, rng)),
    ("RISC-V Sv48", Seat::Riscv, |contents, rng| riscv::space(false, 4, contents, rng)),
    ("RISC-V Sv57", Seat::Riscv, |contents, rng| riscv::space(false, 5, contents, rng)),
    ("RISC-V second stage", Seat::Riscv, |contents, rng| riscv::space(true, rng.pick(&[3, 4, 5]), contents, rng)),
    ("RISC-V two stages", Seat::Riscv, |_, rng| riscv::two_stages(rng)),
];

type Destination = (&'static str, Seat, fn(&mut Rng) -> Goal);

const DESTINATIONS: &[Destination] = &[
    ("VT-d legacy second stage", Seat::Legacy, conversion::vtd_second),
    ("VT-d scalable second stage", Seat::ScalableSecond, conversion::vtd_second),
    ("VT-d first stage", Seat::ScalableFirst, |_| conversion::vtd_first()),
    ("AMD v1", Seat::Amd, conversion::amd),
    ("SMMUv3 stage 1, 4K", Seat::Smmu, |rng| conversion::smmu_first(4096, rng)),
    ("SMMUv3 stage 1, 16K", Seat::Smmu, |rng| conversion::smmu_first(16384, rng)),
    ("SMMUv3 stage 1, 64K", Seat::Smmu, |rng| conversion::smmu_first(65536, rng)),
    ("SMMUv3 stage 2", Seat::Smmu, |rng| conversion::smmu_second(rng.pick(&[4096, 16384, 65536]), rng)),
    ("RISC-V Sv39", Seat::Riscv, |_| conversion::riscv_first(3)),
    ("RISC-V Sv48", Seat::Riscv, |_| conversion::riscv_first(4)),
    ("RISC-V Sv57", Seat::Riscv, |_| conversion::riscv_first(5)),
    ("RISC-V second stage", Seat::Riscv, |rng| conversion::riscv_second(rng.pick(&[3, 4, 5]))),
];

/// What the target's model gets wrong about a converted table.
fn excuse(seat: Seat, goal: &Goal, iova: u64, address: Option<u64>) -> Option<KnownError> {
    let inside = goal.windows.iter().any(|(first, last)| (*first..=*last).contains(&iova));
    // The page of 1 GiB that has interrupts in it, and all smaller ones.
    let near_interrupts = address.is_some_and(|address| address >> 30 == 3);
    match seat {
        Seat::Legacy | Seat::ScalableSecond | Seat::ScalableFirst if near_interrupts => Some(known::VTD_INTERRUPT_PAGES),
        Seat::Amd if !inside && !INTERRUPTS.contains(&iova) => Some(known::AMD_WIDTH),
        Seat::Smmu if goal.target.format.ends_with("stage2") && iova >> 44 != 0 => Some(known::SMMU_UNRECORDED),
        _ => None,
    }
}

/// Every other address space has restrictions and bits without effect. Where pages differ in what the target cannot say anyway, they do not make up a larger page:
/// then only targets with pages of 4 KiB are asked.
fn has_variety(seed: u64) -> bool {
    seed.is_multiple_of(2)
}

/// One source: judged by its own model, then converted to every destination and judged there. `count` is how much is asked.
fn judge_source(
    models: &mut Models,
    production: &Production,
    source: &Source,
    seed: u64,
    count: usize,
    tallies: &mut BTreeMap<(&'static str, &'static str), Tally>,
) -> Result<()> {
    let (name, seat, make) = source;
    let mut rng = Rng::new(seed);
    let variety = has_variety(seed);
    let space = make(Contents { variety }, &mut rng);
    let iovas: Vec<u64> =
        questions(&space, &mut rng, count).into_iter().filter(|iova| !space.has_tags() || iova >> 56 == 0 || iova >> 56 == 255).collect();
    let model = models.get(*seat);
    model.write_memory(&space.memory)?;
    model.set_table(space.tables)?;
    let mut snapshot = model.snapshot()?;
    reserve(&mut snapshot);
    let truth = in_memory(&space.truth, &snapshot.map);
    let snapshot = production.load(&snapshot)?;
    let goals = DESTINATIONS.iter().map(|(name, seat, make)| (*name, *seat, make(&mut rng))).filter(|(.., goal)| !variety || goal.granule == 4096);
    let goals: Vec<(&str, Seat, Goal)> = goals.collect();
    // What every destination is asked, and for each some that it can say and some that it cannot.
    let mut questions: Vec<Vec<u64>> = Vec::new();
    for (.., goal) in &goals {
        let mut own = goal.sample(&truth, false, &mut rng, count);
        own.extend(goal.sample(&truth, true, &mut rng, count / 3));
        own.extend(&iovas);
        questions.push(own);
    }
    let all: BTreeSet<u64> = questions.iter().flatten().copied().collect();
    let all: Vec<u64> = all.into_iter().collect();
    tag_interrupts(model, &space.beneath, &all)?;
    let tally = compare_with_excuses(model, &all, |iova, write| space.lookup(iova, write), |iova, write| space.excuse(iova, write))
        .with_context(|| format!("{:#x?}", space.tables))?;
    ensure!(tally.unrecorded == 0 || !model.records(), "refusals without a record: {tally:?}");
    // Arm and RISC-V tables have pages that no request of the models can use.
    let exact = matches!(space.tables, Tables::Vtd(_) | Tables::Amd(_));
    for ((destination, seat, goal), iovas) in goals.iter().zip(questions) {
        let result = judge_destination(models.get(*seat), production, (*seat, goal), &snapshot, (&truth, exact), &iovas);
        let tally = result.with_context(|| format!("from {:#x?} to {destination}, {:#x?}", space.tables, goal))?;
        tallies.entry((name, destination)).or_default().add(tally);
    }
    Ok(())
}

fn judge_destination(
    model: &mut dyn Model,
    production: &Production,
    (seat, goal): (Seat, &Goal),
    snapshot: &stagecraft::snapshot::Snapshot,
    (truth, exact): (&[Run], bool),
    iovas: &[u64],
) -> Result<Tally> {
    let converted = converted(production, snapshot, goal)?;
    goal.check_losses(&converted.table, truth, exact)?;
    for loss in iovas.iter().filter_map(|iova| goal.loss(truth, *iova)) {
        ensure!(converted.table.built.losses.get(loss).is_some(), "not counted: {loss}");
    }
    model.write_memory(&converted.memory)?;
    model.set_table(converted.tables)?;
    let expect = |iova: u64, write: bool| lookup(truth, iova, write).filter(|_| goal.loss(truth, iova).is_none());
    tag_interrupts(model, truth, iovas)?;
    let tally = compare_with_excuses(model, iovas, expect, |iova, write| excuse(seat, goal, iova, expect(iova, write)))
        .with_context(|| format!("{:x?}", converted.table.table))?;
    ensure!(tally.unrecorded == 0 || !model.records(), "refusals without a record: {tally:?}");
    Ok(tally)
}

fn judge(sources: &[Source]) {
    if ![Board::Q35, Board::ArmVirt, Board::RiscvVirt].into_iter().all(available) {
        return;
    }
    let mut models = Models::start().unwrap();
    let production = Production::new().unwrap();
    let mut tallies = BTreeMap::new();
    let mut all_pairs = false;
    for seed in seeds(2) {
        all_pairs |= !has_variety(seed);
        for source in sources {
            let result = judge_source(&mut models, &production, source, seed, 12, &mut tallies);
            result.with_context(|| format!("STAGECRAFT_SEED={seed} STAGECRAFT_ROUNDS=1: {}", source.0)).unwrap();
        }
    }
    let mut total = Tally::default();
    for ((source, destination), tally) in &tallies {
        println!("{source} -> {destination}: {} reached, {} refused", tally.reached, tally.refused);
        // Two stages scatter pages: those of a larger target may not come about.
        let scattered = source.contains("nested") || source.contains("two stages");
        assert!(tally.reached > 0 || scattered || !all_pairs, "{source} -> {destination}: {tally:?}");
        total.add(*tally);
    }
    assert!(total.reached > 0 && total.refused > 0, "{total:?}");
    assert!(tallies.len() == sources.len() * DESTINATIONS.len() || !all_pairs, "a pair is missing");
    println!("{total:?}, {:.0} requests a second", total.rate());
}

#[test]
fn from_x86() {
    judge(X86_SOURCES);
}

#[test]
fn from_arm() {
    judge(ARM_SOURCES);
}

#[test]
fn from_riscv() {
    judge(RISCV_SOURCES);
}

/// The losses that this test expects are those that the engine refuses.
#[test]
fn refused_losses() {
    let refused: Vec<Loss> = Loss::ALL.into_iter().filter(|loss| loss.is_refused()).collect();
    assert_eq!(refused, [Loss::InputRange, Loss::OutputRange, Loss::Granule, Loss::Permission]);
}
