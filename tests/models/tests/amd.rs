//! AMD v1: random address spaces, the production engine and `amd-iommu`.
#![allow(clippy::unwrap_used)]

use stagecraft_models::amd::Amd;
use stagecraft_models::judge::rounds;
use stagecraft_models::production::Production;
use stagecraft_models::spaces::{Contents, amd};
use stagecraft_models::{Board, available};

#[test]
fn version_1() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Amd::start().unwrap();
    rounds(&mut model, &Production::new().unwrap(), 12, 100, |rng| amd::space(Contents { variety: true }, rng));
}
