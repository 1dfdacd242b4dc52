//! SMMUv3: random address spaces, the production engine and QEMU's model.
#![allow(clippy::unwrap_used)]

use stagecraft_models::judge::rounds;
use stagecraft_models::production::Production;
use stagecraft_models::smmu::{Smmu, Stages};
use stagecraft_models::spaces::{Contents, Space, smmu};
use stagecraft_models::{Board, available};
use stagecraft_tests::reference::generate::Rng;

const VARIETY: Contents = Contents { variety: true };
const GRANULES: &[u64] = &[4096, 4096, 16384, 65536];

fn judge(stages: Stages, count: usize, space: impl Fn(&mut Rng) -> Space) {
    if !available(Board::ArmVirt) {
        return;
    }
    let mut model = Smmu::start(stages).unwrap();
    rounds(&mut model, &Production::new().unwrap(), 12, count, space);
}

#[test]
fn stage_1() {
    judge(Stages::First, 100, |rng| smmu::stage_1(GRANULES, VARIETY, rng));
}

#[test]
fn stage_2() {
    judge(Stages::Second, 100, |rng| smmu::stage_2(rng.pick(GRANULES), VARIETY, rng));
}

#[test]
fn nested() {
    judge(Stages::Nested, 60, |rng| smmu::nested(VARIETY, rng));
}
