//! AMD v1 tables with known content, judged by `amd-iommu`.
#![allow(clippy::unwrap_used)]

use std::ops::Range;

use anyhow::Context;
use stagecraft_models::amd::Amd;
use stagecraft_models::judge::{Tally, add_rejected, compare, interesting, lookup, seeds};
use stagecraft_models::tables::amd::{AmdTable, build};
use stagecraft_models::tables::random_leaves;
use stagecraft_models::{Access, Board, Model, available};
use stagecraft_tests::reference::generate::Rng;

/// Where tables go.
const PLACES: Range<u64> = 0x4000_0000..0x8000_0000;

/// Interrupts, which are not translated.
const INTERRUPTS: Range<u64> = 0xfee0_0000..0xfef0_0000;

#[test]
fn version_1() {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Amd::start().unwrap();
    let mut total = Tally::default();
    for seed in seeds(12) {
        let mut rng = Rng::new(seed);
        let access = if rng.percent(10) { rng.pick(&[Access::R, Access::W]) } else { Access::RW };
        let config = AmdTable { root: 0, mode: rng.pick(&[1, 2, 3, 3, 4, 4, 5, 6]), access };
        let accesses = [Access::R, Access::W, Access::RW, Access::RW];
        let leaves = random_leaves(&config.windows(), &config.sizes(), &accesses, &mut rng, 14);
        let tables = build(config, &leaves, PLACES, &mut rng);
        let built = &tables.built;
        model.write_memory(&built.memory).unwrap();
        model.set_table(&built.config).unwrap();
        let mut iovas = interesting(&built.truth, &mut rng, 100);
        add_rejected(&mut iovas, &built.decoys, &mut rng, 30);
        let expect = |iova, write| lookup(&built.truth, iova, write);
        // See `known::AMD_WIDTH` and `known::AMD_SKIPPED`.
        let width = built.config.windows()[0].1;
        let aliased = |iova: u64| (width < 64 && iova >> width != 0) || tables.skipped.iter().any(|range| range.contains(&iova));
        let ask = |iova: u64, _| !INTERRUPTS.contains(&iova) && !aliased(iova);
        total.add(compare(&mut model, &iovas, expect, ask).with_context(|| format!("seed {seed}: {:#x?}", built.config)).unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}
