//! RISC-V tables with known content, judged by `riscv-iommu-pci`.
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use anyhow::Context;
use stagecraft_models::judge::{Tally, add_rejected, compare, interesting, lookup, second_stage, seeds};
use stagecraft_models::riscv::{Riscv, RiscvTables};
use stagecraft_models::tables::random_leaves;
use stagecraft_models::tables::riscv::{RiscvTable, build};
use stagecraft_models::{Access, Board, Model, available};
use stagecraft_tests::reference::generate::Rng;

/// Where tables go.
const PLACES: Range<u64> = 0x8010_0000..0xb000_0000;

fn one_stage(second: bool) {
    if !available(Board::RiscvVirt) {
        return;
    }
    let mut model = Riscv::start().unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let config = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second };
        let leaves = random_leaves(&config.windows(), &config.sizes(), &[Access::R, Access::RW, Access::RW], &mut rng, 12);
        let built = build(config, &leaves, PLACES, true, &mut rng);
        model.write_memory(&built.memory).unwrap();
        let tables = if second {
            RiscvTables { second: Some(built.config), ..RiscvTables::default() }
        } else {
            RiscvTables { first: Some(built.config), ..RiscvTables::default() }
        };
        model.set_table(&tables).unwrap();
        let mut iovas = interesting(&built.truth, &mut rng, 100);
        add_rejected(&mut iovas, &built.decoys, &mut rng, 30);
        let expect = |iova, write| lookup(&built.truth, iova, write);
        total.add(compare(&mut model, &iovas, expect, |_, _| true).with_context(|| format!("seed {seed}: {tables:#x?}")).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}, second {second}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

#[test]
fn first_stage_alone() {
    one_stage(false);
}

#[test]
fn second_stage_alone() {
    one_stage(true);
}

#[test]
fn both_stages() {
    if !available(Board::RiscvVirt) {
        return;
    }
    let mut model = Riscv::start().unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let config = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second: false };
        let accesses = [Access::R, Access::RW, Access::RW];
        let leaves = random_leaves(&config.windows(), &config.sizes(), &accesses, &mut rng, 8);
        let first = build(config, &leaves, PLACES, false, &mut rng);
        let (leaves, mut moved) = second_stage(&first.memory, &first.truth, 4096, 4096, &accesses, &mut rng);
        let config = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second: true };
        // What the second stage's width leaves out is not mapped.
        let bits = config.windows()[0].1;
        let leaves: Vec<_> = leaves.into_iter().filter(|leaf| leaf.iova >> bits == 0).collect();
        let second = build(config, &leaves, PLACES, false, &mut rng);
        moved.pages.extend(second.memory.pages.clone());
        model.write_memory(&moved).unwrap();
        let tables = RiscvTables { first: Some(first.config), second: Some(second.config) };
        model.set_table(&tables).unwrap();
        let mut iovas = interesting(&first.truth, &mut rng, 60);
        for _ in 0..60 {
            let leaf = rng.pick(&leaves);
            if let Some(run) = first.truth.iter().find(|run| run.address <= leaf.iova && leaf.iova - run.address < run.size) {
                iovas.push(run.iova + (leaf.iova - run.address) + rng.below(512) * 8);
            }
        }
        let expect = |iova, write| lookup(&second.truth, lookup(&first.truth, iova, write)?, write);
        // See `known::RISCV_TWO_STAGES`.
        let ask = |iova: u64, write: bool| match lookup(&first.truth, iova, true) {
            Some(address) if !write => lookup(&second.truth, address, true).is_some() || lookup(&second.truth, address, false).is_none(),
            _ => true,
        };
        total.add(compare(&mut model, &iovas, expect, ask).with_context(|| format!("seed {seed}: {tables:#x?}")).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}, both stages: {total:?}, {:.0} requests a second", model.name(), total.rate());
}
