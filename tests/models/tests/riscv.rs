//! RISC-V: random address spaces, the production engine and `riscv-iommu-pci`.
#![allow(clippy::unwrap_used)]

use stagecraft_models::judge::rounds;
use stagecraft_models::production::Production;
use stagecraft_models::riscv::Riscv;
use stagecraft_models::spaces::{Contents, Space, riscv};
use stagecraft_models::{Board, available};
use stagecraft_tests::reference::generate::Rng;

const VARIETY: Contents = Contents { variety: true };

fn judge(count: usize, space: impl Fn(&mut Rng) -> Space) {
    if !available(Board::RiscvVirt) {
        return;
    }
    let mut model = Riscv::start().unwrap();
    rounds(&mut model, &Production::new().unwrap(), 12, count, space);
}

#[test]
fn first_stage_alone() {
    judge(100, |rng| riscv::space(false, rng.pick(&[3, 4, 5]), VARIETY, rng));
}

#[test]
fn second_stage_alone() {
    judge(100, |rng| riscv::space(true, rng.pick(&[3, 4, 5]), VARIETY, rng));
}

#[test]
fn both_stages() {
    judge(60, riscv::two_stages);
}
