//! VT-d tables with known content, judged by `intel-iommu`.
#![allow(clippy::unwrap_used)]

use anyhow::Context;
use stagecraft_models::judge::{Tally, add_rejected, compare, interesting, lookup, rejected, seeds};
use stagecraft_models::vtd::{Mode, Vtd};
use stagecraft_models::{Board, Model, available};
use stagecraft_tests::reference::generate::{Options, Rng, build, random_leaves};
use stagecraft_tests::reference::tables::{TableConfig, VtdFirst, VtdSecond};

fn rounds(mode: Mode, address_bits: u32) {
    if !available(Board::Q35) {
        return;
    }
    let mut model = Vtd::start(mode, address_bits).unwrap();
    let mut total = Tally::default();
    for seed in seeds(10) {
        let mut rng = Rng::new(seed);
        // RAM goes a bit beyond 39 bits.
        let output_bits = if address_bits == 39 { 39 } else { rng.pick(&[36, 39, 40]) };
        let config = match mode {
            Mode::ScalableFirst => TableConfig::VtdFirst(VtdFirst { root: 0, levels: 4, output_bits, large_1g: true, execute_disable: true }),
            _ => {
                let levels = if address_bits == 39 { 3 } else { rng.pick(&[3, 4, 4]) };
                TableConfig::VtdSecond(VtdSecond {
                    root: 0,
                    levels,
                    input_bits: 12 + 9 * levels,
                    output_bits,
                    large_2m: true,
                    large_1g: true,
                    snoop_control: false,
                })
            }
        };
        let options = Options::default();
        let leaves = random_leaves(&config, &mut rng, options);
        let generated = build(config, &leaves, &mut rng, options);
        model.write_memory(&generated.snapshot.memory).unwrap();
        model.set_table(&generated.config).unwrap();
        let mut iovas = interesting(&generated.truth, &mut rng, 120);
        add_rejected(&mut iovas, &rejected(&generated.snapshot.memory, &generated.config), &mut rng, 30);
        let expect = |iova, write| lookup(&generated.truth, iova, write);
        let tally = compare(&mut model, &iovas, expect, |_, _| true).with_context(|| format!("seed {seed}: {:#x?}", generated.config));
        total.add(tally.unwrap());
    }
    assert!(total.reached > 0 && total.refused > 0 && total.unrecorded == 0, "{total:?}");
    println!("{}: {total:?}, {:.0} requests a second", model.name(), total.rate());
}

#[test]
fn legacy_second_stage() {
    rounds(Mode::Legacy, 48);
}

#[test]
fn legacy_second_stage_with_39_bits() {
    rounds(Mode::Legacy, 39);
}

#[test]
fn scalable_second_stage() {
    rounds(Mode::ScalableSecond, 48);
}

#[test]
fn scalable_first_stage() {
    rounds(Mode::ScalableFirst, 48);
}
