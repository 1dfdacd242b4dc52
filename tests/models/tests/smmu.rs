//! SMMUv3 tables with known content, judged by QEMU's model.
#![allow(clippy::unwrap_used)]

use anyhow::Context;
use stagecraft_models::judge::{Tally, add_rejected, compare, interesting, lookup, rejected, second_stage, seeds};
use stagecraft_models::smmu::{Smmu, SmmuTables, Stages, context_descriptor};
use stagecraft_models::{Access, Board, Memory, Model, available};
use stagecraft_tests::reference::generate::{Generated, Options, Rng, build, random_leaves};
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, Entry, Region, TableConfig};
use stagecraft_tests::reference::walk::Walker;

/// Without hardware updates, big-endian tables or 52-bit addresses: the model has none of them (IDR0.HTTU 0, TTENDIAN little, IDR5.OAS 44).
fn stage1(output_bits: u32, rng: &mut Rng) -> ArmStage1 {
    let half = |rng: &mut Rng| ArmHalf {
        root: 0,
        granule: rng.pick(&[4096, 4096, 16384, 65536]),
        input_bits: rng.pick(&[25, 30, 32, 36, 39, 40, 42, 44, 47, 48, 48]),
        top_byte_ignored: rng.percent(20),
        hierarchical_disabled: rng.percent(20),
    };
    let low = half(rng);
    // The same TBI in both (see `known::SMMU_TBI1`).
    let high = if rng.percent(50) { Some(ArmHalf { top_byte_ignored: low.top_byte_ignored, ..half(rng) }) } else { None };
    let low = Some(low);
    ArmStage1 { low, high, output_bits, mair: 0x04_ff_44, access_flag_disabled: rng.percent(20), ..ArmStage1::default() }
}

fn stage2(granule: u64, input_bits: u32, output_bits: u32, rng: &mut Rng) -> ArmStage2 {
    // As many levels as it takes without concatenated tables (see `known::SMMU_CONCATENATED`).
    let page_bits = granule.trailing_zeros();
    let levels = (input_bits - page_bits).div_ceil(page_bits - 3);
    ArmStage2 { granule, input_bits, output_bits, start_level: 4 - levels as i32, access_flag_disabled: rng.percent(20), ..ArmStage2::default() }
}

fn generate(config: TableConfig, options: Options, rng: &mut Rng) -> Generated {
    let leaves = random_leaves(&config, rng, options);
    build(config, &leaves, rng, options)
}

fn first_of(generated: &Generated) -> ArmStage1 {
    let TableConfig::ArmStage1(config) = generated.config else { unreachable!() };
    config
}

fn second_of(generated: &Generated) -> ArmStage2 {
    let TableConfig::ArmStage2(config) = generated.config else { unreachable!() };
    config
}

/// What stage 1 says to privileged requests, which the model takes all for (see `known::SMMU_PRIVILEGED`).
fn privileged(generated: &Generated, iova: u64, write: bool) -> Option<u64> {
    let config = TableConfig::ArmStage1(ArmStage1 { privileged: true, ..first_of(generated) });
    Walker::new(&generated.snapshot.memory, &[config]).unwrap().translate(iova, write).ok()
}

/// IOVAs behind block descriptors at levels that have none (see `known::SMMU_BLOCKS`): the first and the last of each.
fn misplaced_blocks(generated: &Generated) -> Vec<(u64, u64)> {
    fn visit(generated: &Generated, region: &Region, depth: usize, table: u64, start: u64, found: &mut Vec<(u64, u64)>) {
        let step = region.steps[depth];
        // Without 52-bit addresses: 4K has them at levels 1 and 2, the others at level 2 only.
        let lowest = if region.steps.last().unwrap().shift == 12 { 1 } else { 2 };
        for index in 0..step.entries {
            let position = start + (index << step.shift);
            let entry = generated.snapshot.memory.read(table + index * 8, false).unwrap_or(0);
            match generated.config.decode(region.half, step, entry) {
                Entry::Table { address, .. } => visit(generated, region, depth + 1, address, position, found),
                Entry::Fault if entry % 4 == 1 && step.level < lowest => {
                    let first = region.first + position;
                    found.push((first, first + ((1 << step.shift) - 1)));
                }
                _ => {}
            }
        }
    }
    let mut found = Vec::new();
    for region in generated.config.regions().unwrap() {
        visit(generated, &region, 0, region.root, 0, &mut found);
    }
    found
}

fn in_any(ranges: &[(u64, u64)], iova: u64) -> bool {
    ranges.iter().any(|(first, last)| (*first..=*last).contains(&iova))
}

#[test]
fn stage_1() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(Stages::First).unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let output_bits = rng.pick(&[32, 36, 36, 40, 44]);
        let config = TableConfig::ArmStage1(stage1(output_bits, &mut rng));
        let generated = generate(config, Options::default(), &mut rng);
        model.write_memory(&generated.snapshot.memory).unwrap();
        model.set_table(&SmmuTables { first: Some(first_of(&generated)), ..SmmuTables::default() }).unwrap();
        let mut iovas = interesting(&generated.truth, &mut rng, 100);
        add_rejected(&mut iovas, &rejected(&generated.snapshot.memory, &generated.config), &mut rng, 30);
        let expect = |iova, write| lookup(&generated.truth, iova, write);
        let misplaced = misplaced_blocks(&generated);
        let ask = |iova: u64, write| !in_any(&misplaced, iova) && privileged(&generated, iova, write) == expect(iova, write);
        total.add(compare(&mut model, &iovas, expect, ask).with_context(|| format!("seed {seed}: {:#x?}", generated.config)).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

#[test]
fn stage_2() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(Stages::Second).unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let output_bits = rng.pick(&[36, 36, 40, 44]);
        let granule = rng.pick(&[4096, 4096, 16384, 65536]);
        let input_bits = rng.pick(&[32, 36, 39, 40, 42, 44]).min(output_bits);
        let config = TableConfig::ArmStage2(stage2(granule, input_bits, output_bits, &mut rng));
        let generated = generate(config, Options::default(), &mut rng);
        model.write_memory(&generated.snapshot.memory).unwrap();
        model.set_table(&SmmuTables { second: Some(second_of(&generated)), ..SmmuTables::default() }).unwrap();
        let mut iovas = interesting(&generated.truth, &mut rng, 100);
        add_rejected(&mut iovas, &rejected(&generated.snapshot.memory, &generated.config), &mut rng, 30);
        let expect = |iova, write| lookup(&generated.truth, iova, write);
        // See `known::SMMU_UNRECORDED`.
        let misplaced = misplaced_blocks(&generated);
        let ask = |iova: u64, _| iova >> 44 == 0 && !in_any(&misplaced, iova);
        total.add(compare(&mut model, &iovas, expect, ask).with_context(|| format!("seed {seed}: {:#x?}", generated.config)).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

#[test]
fn nested() {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(Stages::Nested).unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let first = generate(TableConfig::ArmStage1(stage1(rng.pick(&[36, 40]), &mut rng)), Options { clusters: 6, ..Options::default() }, &mut rng);
        // The context descriptor is in a page beside the tables.
        let context = 0x8000_1000;
        let mut memory: Memory = first.snapshot.memory.clone();
        for (word, index) in context_descriptor(&first_of(&first)).unwrap().into_iter().zip(0..) {
            memory.write(context + index * 8, word, false);
        }
        let granule = rng.pick(&[4096, 4096, 16384, 65536]);
        let halves = [first_of(&first).low, first_of(&first).high];
        let block = halves.iter().flatten().map(|half| half.granule).max().unwrap().max(granule);
        // See `known::SMMU_NESTED_TABLES` for the blocks, and `known::SMMU_NESTED_ROOT` for 36 output bits at least.
        let (leaves, mut moved) = second_stage(&memory, &first.truth, granule, block, &[Access::R, Access::W, Access::RW, Access::RW], &mut rng);
        let config = TableConfig::ArmStage2(stage2(granule, rng.pick(&[40, 42]), rng.pick(&[42, 44]), &mut rng));
        let second = build(config, &leaves, &mut rng, Options::default());
        moved.pages.extend(second.snapshot.memory.pages.clone());
        model.write_memory(&moved).unwrap();
        let tables = SmmuTables { first: Some(first_of(&first)), second: Some(second_of(&second)), context: Some(context) };
        model.set_table(&tables).unwrap();
        // Where both stages have something, and elsewhere.
        let mut iovas = interesting(&first.truth, &mut rng, 60);
        add_rejected(&mut iovas, &rejected(&first.snapshot.memory, &first.config), &mut rng, 20);
        for _ in 0..60 {
            let leaf = rng.pick(&leaves);
            if let Some(run) = first.truth.iter().find(|run| run.address <= leaf.iova && leaf.iova - run.address < run.size) {
                iovas.push(run.iova + (leaf.iova - run.address) + rng.below(512) * 8);
            }
        }
        let expect = |iova, write| lookup(&second.truth, lookup(&first.truth, iova, write)?, write);
        let misplaced = misplaced_blocks(&first);
        let ask = |iova: u64, write| !in_any(&misplaced, iova) && privileged(&first, iova, write) == lookup(&first.truth, iova, write);
        total.add(compare(&mut model, &iovas, expect, ask).with_context(|| format!("seed {seed}: {tables:#x?}")).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}
