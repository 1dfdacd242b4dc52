//! Damaged entries: every bit of every kind of entry at every level, and random ones. Where the model faults the engine faults; where the model translates the
//! engine has the same address. What is not asked is excused by an entry of [`stagecraft_models::known`].
#![allow(clippy::unwrap_used)]

use stagecraft_models::amd::Amd;
use stagecraft_models::entries::{AmdLadder, ArmLadder, Halves, Ladder, Nested, RiscvLadder, VtdLadder, images, judge_image};
use stagecraft_models::judge::{Tally, seeds};
use stagecraft_models::production::Production;
use stagecraft_models::riscv::Riscv;
use stagecraft_models::smmu::{Smmu, Stages};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Board, Model, available};
use stagecraft_tests::reference::generate::Rng;

/// Every ladder in every round. `random` is how many random changes each kind of entry gets besides its single bits.
fn judge(model: &mut dyn Model, ladders: &[&dyn Ladder], random: usize) {
    let production = Production::new().unwrap();
    let mut total = Tally::default();
    let mut wrong = String::new();
    for seed in seeds(1) {
        for ladder in ladders {
            for image in images(*ladder, random, &mut Rng::new(seed)) {
                match judge_image(model, &production, *ladder, &image) {
                    Ok(tally) => total.add(tally),
                    Err(error) => wrong += &format!("STAGECRAFT_SEED={seed} STAGECRAFT_ROUNDS=1: {error:#}\n"),
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert!(total.reached > 0 && total.refused > 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

#[test]
fn vtd_legacy() {
    if available(Board::Q35) {
        let [three, four] = [3, 4].map(|levels| VtdLadder { scalable: false, first_stage: false, levels });
        judge(&mut Vtd::start(Mode::Legacy, 48).unwrap(), &[&three, &four], 100);
    }
}

#[test]
fn vtd_scalable() {
    if available(Board::Q35) {
        judge(&mut Vtd::start(Mode::ScalableSecond, 48).unwrap(), &[&VtdLadder { scalable: true, first_stage: false, levels: 4 }], 20);
        judge(&mut Vtd::start(Mode::ScalableFirst, 48).unwrap(), &[&VtdLadder { scalable: true, first_stage: true, levels: 4 }], 100);
    }
}

fn arm(first_stage: bool, granule: u64, input_bits: u32, output_bits: u32) -> ArmLadder {
    ArmLadder { first_stage, granule, input_bits, output_bits, halves: Halves::Low }
}

#[test]
fn smmu_stage_1() {
    if available(Board::ArmVirt) {
        let [a, b, c, d] =
            [(4096, 48, 44), (4096, 39, 36), (16384, 47, 40), (65536, 48, 44)].map(|(granule, input, output)| arm(true, granule, input, output));
        let [e, f] = [a, c].map(|ladder| ArmLadder { halves: Halves::High, ..ladder });
        let g = ArmLadder { halves: Halves::Tagged, ..b };
        judge(&mut Smmu::start(Stages::First).unwrap(), &[&a, &b, &c, &d, &e, &f, &g], 60);
    }
}

#[test]
fn smmu_stage_2() {
    if available(Board::ArmVirt) {
        let [a, b, c, d] =
            [(4096, 44, 44), (4096, 36, 36), (16384, 40, 40), (65536, 44, 44)].map(|(granule, input, output)| arm(false, granule, input, output));
        judge(&mut Smmu::start(Stages::Second).unwrap(), &[&a, &b, &c, &d], 60);
    }
}

#[test]
fn smmu_nested() {
    if available(Board::ArmVirt) {
        let [a, b] = [(4096, 48, 44), (16384, 40, 36)].map(|(granule, input, output)| Nested(arm(true, granule, input, output)));
        let [c, d] = [(4096, 44, 44), (16384, 40, 40)].map(|(granule, input, output)| Nested(arm(false, granule, input, output)));
        judge(&mut Smmu::start(Stages::Nested).unwrap(), &[&a, &b, &c, &d], 40);
    }
}

#[test]
fn riscv_nested() {
    if available(Board::RiscvVirt) {
        let [a, b] = [3, 5].map(|levels| Nested(RiscvLadder { second: false, levels }));
        let [c, d] = [3, 4].map(|levels| Nested(RiscvLadder { second: true, levels }));
        judge(&mut Riscv::start().unwrap(), &[&a, &b, &c, &d], 40);
    }
}

#[test]
fn riscv() {
    if available(Board::RiscvVirt) {
        let [a, b, c] = [3, 4, 5].map(|levels| RiscvLadder { second: false, levels });
        let [d, e, f] = [3, 4, 5].map(|levels| RiscvLadder { second: true, levels });
        judge(&mut Riscv::start().unwrap(), &[&a, &b, &c, &d, &e, &f], 40);
    }
}

#[test]
fn amd_v1() {
    if available(Board::Q35) {
        // An entry means the same under every mode, except in the first table: what is above it is not there.
        let [a, b, c, d, e, f] = [1, 2, 3, 4, 5, 6].map(|mode| AmdLadder { mode, root_only: mode != 6 });
        judge(&mut Amd::start().unwrap(), &[&a, &b, &c, &d, &e, &f], 30);
    }
}
