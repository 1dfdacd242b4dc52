//! VT-d: random address spaces, the production engine and `intel-iommu`.
#![allow(clippy::unwrap_used)]

use stagecraft_models::judge::rounds;
use stagecraft_models::production::Production;
use stagecraft_models::spaces::{Contents, vtd};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Board, available};

fn judge(mode: Mode, address_bits: u32) {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(mode, address_bits).unwrap();
    let space = |rng: &mut _| vtd::space(mode, address_bits, Contents { variety: true }, rng);
    rounds(&mut model, &Production::new().unwrap(), 10, 120, space);
}

#[test]
fn legacy_second_stage() {
    judge(Mode::Legacy, 48);
}

#[test]
fn legacy_second_stage_with_39_bits() {
    judge(Mode::Legacy, 39);
}

#[test]
fn scalable_second_stage() {
    judge(Mode::ScalableSecond, 48);
}

#[test]
fn scalable_first_stage() {
    judge(Mode::ScalableFirst, 48);
}
