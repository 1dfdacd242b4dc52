//! SMMUv3 tables of stage 1, stage 2, and both.

use stagecraft_tests::reference::generate::{Generated, Options, Rng, build, random_leaves};
use stagecraft_tests::reference::tables::{ArmHalf, ArmStage1, ArmStage2, Entry, Region, TableConfig};
use stagecraft_tests::reference::walk::Walker;

use super::{Contents, Space, add_common, compose, crossings, into_device_memory};
use crate::judge::{rejected, second_stage};
use crate::smmu::{SmmuTables, context_descriptor};
use crate::{Access, Board, Memory, Tables, known};

const STAGE1: &str = "arm-smmuv3/stage1";
const STAGE2: &str = "arm-smmuv3/stage2";

/// Without hardware updates, big-endian tables or 52-bit addresses: the model has none of them (IDR0.HTTU 0, TTENDIAN little, IDR5.OAS 44).
fn stage1(granules: &[u64], output_bits: u32, contents: Contents, rng: &mut Rng) -> ArmStage1 {
    let half = |rng: &mut Rng| ArmHalf {
        root: 0,
        granule: rng.pick(granules),
        input_bits: rng.pick(&[25, 30, 32, 36, 39, 40, 42, 44, 47, 48, 48]),
        top_byte_ignored: contents.variety && rng.percent(20),
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

fn options(contents: Contents) -> Options {
    Options { restrictions: contents.variety, noise: contents.variety, ..Options::default() }
}

fn generate(config: TableConfig, options: Options, rng: &mut Rng) -> Generated {
    let mut leaves = random_leaves(&config, rng, options);
    into_device_memory(&mut leaves, &Board::ArmVirt.device_memory(), rng);
    let granule = match config {
        TableConfig::ArmStage1(ArmStage1 { low: Some(half), .. }) => half.granule,
        TableConfig::ArmStage2(config) => config.granule,
        _ => unreachable!("the low half is always there"),
    };
    // 32 output bits are too few for its address.
    if config.settings().get("output-bits") != Some(&32) {
        add_common(&mut leaves, granule, rng);
    }
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

/// Whether requests that count as privileged get something else (see `known::SMMU_PRIVILEGED`).
fn depends_on_privilege(generated: &Generated, iova: u64, write: bool) -> bool {
    let through = |privileged| {
        let config = TableConfig::ArmStage1(ArmStage1 { privileged, ..first_of(generated) });
        Walker::new(&generated.snapshot.memory, &[config]).ok()?.translate(iova, write).ok()
    };
    through(true) != through(false)
}

/// IOVAs behind block descriptors at levels that have none (see `known::SMMU_BLOCKS`): the first and the last of each.
fn misplaced_blocks(generated: &Generated) -> Vec<(u64, u64)> {
    fn visit(generated: &Generated, region: &Region, depth: usize, table: u64, start: u64, found: &mut Vec<(u64, u64)>) {
        let step = region.steps[depth];
        // Without 52-bit addresses: 4K has them at levels 1 and 2, the others at level 2 only.
        let lowest = if region.steps.last().is_some_and(|step| step.shift == 12) { 1 } else { 2 };
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
    for region in generated.config.regions().unwrap_or_default() {
        visit(generated, &region, 0, region.root, 0, &mut found);
    }
    found
}

fn in_any(ranges: &[(u64, u64)], iova: u64) -> bool {
    ranges.iter().any(|(first, last)| (*first..=*last).contains(&iova))
}

/// A random address space of stage 1 with these granules.
pub fn stage_1(granules: &[u64], contents: Contents, rng: &mut Rng) -> Space {
    let output_bits = if contents.variety { rng.pick(&[32, 36, 36, 40, 44]) } else { rng.pick(&[36, 36, 40, 44]) };
    let config = TableConfig::ArmStage1(stage1(granules, output_bits, contents, rng));
    let generated = generate(config, options(contents), rng);
    let misplaced = misplaced_blocks(&generated);
    Space {
        tables: Tables::Smmu(SmmuTables { first: Some(first_of(&generated)), ..SmmuTables::default() }),
        formats: vec![STAGE1],
        memory: generated.snapshot.memory.clone(),
        truth: generated.truth.clone(),
        beneath: Vec::new(),
        decoys: rejected(&generated.snapshot.memory, &generated.config),
        corners: Vec::new(),
        excuse: Box::new(move |iova, write| {
            if in_any(&misplaced, iova) {
                Some(known::SMMU_BLOCKS)
            } else {
                depends_on_privilege(&generated, iova, write).then_some(known::SMMU_PRIVILEGED)
            }
        }),
    }
}

/// A random address space of stage 2.
pub fn stage_2(granule: u64, contents: Contents, rng: &mut Rng) -> Space {
    let output_bits = rng.pick(&[36, 36, 40, 44]);
    let input_bits = rng.pick(&[32, 36, 39, 40, 42, 44]).min(output_bits);
    let config = TableConfig::ArmStage2(stage2(granule, input_bits, output_bits, rng));
    let generated = generate(config, options(contents), rng);
    let misplaced = misplaced_blocks(&generated);
    Space {
        tables: Tables::Smmu(SmmuTables { second: Some(second_of(&generated)), ..SmmuTables::default() }),
        formats: vec![STAGE2],
        decoys: rejected(&generated.snapshot.memory, &generated.config),
        corners: Vec::new(),
        memory: generated.snapshot.memory,
        truth: generated.truth,
        beneath: Vec::new(),
        excuse: Box::new(move |iova, _| match iova >> 44 {
            0 => in_any(&misplaced, iova).then_some(known::SMMU_BLOCKS),
            _ => Some(known::SMMU_UNRECORDED),
        }),
    }
}

/// A random address space of both stages.
pub fn nested(contents: Contents, rng: &mut Rng) -> Space {
    // See `known::SMMU_NESTED_ROOT` for 36 output bits at least.
    let config = TableConfig::ArmStage1(stage1(&[4096, 4096, 16384, 65536], rng.pick(&[36, 40]), contents, rng));
    let few = Options { clusters: 6, ..options(contents) };
    let mut leaves = random_leaves(&config, rng, few);
    if let TableConfig::ArmStage1(ArmStage1 { low: Some(half), .. }) = config {
        add_common(&mut leaves, half.granule, rng);
    }
    let first = build(config, &leaves, rng, few);
    // The context descriptor is in a page beside the tables.
    let context = 0x8000_1000;
    let mut memory: Memory = first.snapshot.memory.clone();
    for (word, index) in context_descriptor(&first_of(&first)).unwrap_or_default().into_iter().zip(0..) {
        memory.write(context + index * 8, word, false);
    }
    let granule = rng.pick(&[4096, 4096, 16384, 65536]);
    let halves = [first_of(&first).low, first_of(&first).high];
    // See `known::SMMU_NESTED_TABLES`.
    let block = halves.iter().flatten().map(|half| half.granule).fold(granule, u64::max);
    let accesses = [Access::R, Access::W, Access::RW, Access::RW];
    let (mut leaves, mut moved) = second_stage(&memory, &first.truth, granule, block, &accesses, rng);
    for leaf in &mut leaves {
        // What holds no table of the first stage may be device memory.
        if moved.pages.range(leaf.address..leaf.address + leaf.size).next().is_none() {
            into_device_memory(std::slice::from_mut(leaf), &Board::ArmVirt.device_memory(), rng);
        }
    }
    let config = TableConfig::ArmStage2(stage2(granule, rng.pick(&[40, 42]), rng.pick(&[42, 44]), rng));
    let second = build(config, &leaves, rng, options(contents));
    moved.pages.extend(second.snapshot.memory.pages.clone());
    let misplaced = misplaced_blocks(&first);
    Space {
        tables: Tables::Smmu(SmmuTables { first: Some(first_of(&first)), second: Some(second_of(&second)), context: Some(context) }),
        formats: vec![STAGE1, STAGE2],
        memory: moved,
        truth: compose(&first.truth, &second.truth),
        beneath: Vec::new(),
        decoys: rejected(&first.snapshot.memory, &first.config),
        corners: crossings(&first.truth, &leaves, rng),
        excuse: Box::new(move |iova, write| {
            if in_any(&misplaced, iova) {
                Some(known::SMMU_BLOCKS)
            } else {
                depends_on_privilege(&first, iova, write).then_some(known::SMMU_PRIVILEGED)
            }
        }),
    }
}
