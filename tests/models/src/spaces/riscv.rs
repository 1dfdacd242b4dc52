//! RISC-V tables of one stage and of two.

use stagecraft_tests::reference::generate::Rng;

use super::{Contents, PLACES, Space, add_common, add_interrupts, around_interrupts, crossings, into_device_memory};
use crate::judge::{lookup, second_stage};
use crate::riscv::RiscvTables;
use crate::tables::random_leaves;
use crate::tables::riscv::{RiscvTable, build};
use crate::{Access, Board, Tables, known};

/// The format of a stage.
pub fn format(second: bool) -> &'static str {
    if second { "riscv-iommu/second-stage" } else { "riscv-iommu/first-stage" }
}

/// A random address space of one stage.
pub fn space(second: bool, levels: u32, contents: Contents, rng: &mut Rng) -> Space {
    let config = RiscvTable { root: 0, levels, second };
    let mut leaves = random_leaves(&config.windows(), &config.sizes(), &[Access::R, Access::RW, Access::RW], rng, 12);
    into_device_memory(&mut leaves, &Board::RiscvVirt.device_memory(), rng);
    add_common(&mut leaves, 4096, rng);
    // To an x86 target these are something else.
    add_interrupts(&mut leaves, 4096, rng);
    let built = build(config, &leaves, PLACES, contents.variety, rng);
    let tables = match second {
        true => RiscvTables { second: Some(built.config), ..RiscvTables::default() },
        false => RiscvTables { first: Some(built.config), ..RiscvTables::default() },
    };
    Space {
        tables: Tables::Riscv(tables),
        formats: vec![format(second)],
        memory: built.memory,
        truth: built.truth,
        beneath: Vec::new(),
        decoys: built.decoys,
        corners: around_interrupts(rng),
        excuse: Box::new(|_, _| None),
    }
}

/// A random address space of two stages.
pub fn two_stages(rng: &mut Rng) -> Space {
    let config = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second: false };
    let accesses = [Access::R, Access::RW, Access::RW];
    let mut leaves = random_leaves(&config.windows(), &config.sizes(), &accesses, rng, 8);
    add_common(&mut leaves, 4096, rng);
    let first = build(config, &leaves, PLACES, false, rng);
    let (mut leaves, mut memory) = second_stage(&first.memory, &first.truth, 4096, 4096, &accesses, rng);
    let config = RiscvTable { root: 0, levels: rng.pick(&[3, 4, 5]), second: true };
    // What the second stage's width leaves out is not mapped.
    let bits = config.windows()[0].1;
    leaves.retain(|leaf| leaf.iova >> bits == 0);
    let second = build(config, &leaves, PLACES, false, rng);
    memory.pages.extend(second.memory.pages);
    let corners = crossings(&first.truth, &leaves, rng);
    let truth = super::compose(&first.truth, &second.truth);
    let (first_truth, second_truth) = (first.truth, second.truth);
    Space {
        tables: Tables::Riscv(RiscvTables { first: Some(first.config), second: Some(second.config) }),
        formats: vec![format(false), format(true)],
        memory,
        truth,
        beneath: Vec::new(),
        decoys: Vec::new(),
        corners,
        excuse: Box::new(move |iova, write| {
            let through = |address, write| lookup(&second_truth, address, write);
            let address = lookup(&first_truth, iova, true).filter(|_| !write)?;
            (through(address, true).is_none() && through(address, false).is_some()).then_some(known::RISCV_TWO_STAGES)
        }),
    }
}
