//! AMD v1 tables.

use stagecraft_tests::reference::detect::without_interrupts;
use stagecraft_tests::reference::generate::Rng;

use super::{Contents, Space, add_common, add_interrupts, around_interrupts, into_device_memory};
use crate::tables::amd::{AmdTable, build};
use crate::tables::random_leaves;
use crate::{Access, Board, Tables, known};

/// Where tables go.
const PLACES: std::ops::Range<u64> = 0x4000_0000..0x8000_0000;

/// A random address space.
pub fn space(contents: Contents, rng: &mut Rng) -> Space {
    let access = if contents.variety && rng.percent(10) { rng.pick(&[Access::R, Access::W]) } else { Access::RW };
    let config = AmdTable { root: 0, mode: rng.pick(&[1, 2, 3, 3, 4, 4, 5, 6]), access };
    let accesses = [Access::R, Access::W, Access::RW, Access::RW];
    let mut leaves = random_leaves(&config.windows(), &config.sizes(), &accesses, rng, 14);
    into_device_memory(&mut leaves, &Board::Q35.device_memory(), rng);
    add_common(&mut leaves, 4096, rng);
    let width = config.windows()[0].1;
    if width > 32 {
        add_interrupts(&mut leaves, 4096, rng);
    }
    let tables = build(config, &leaves, PLACES, rng);
    let skipped = tables.skipped;
    Space {
        tables: Tables::Amd(tables.built.config),
        formats: vec!["amd-vi/v1"],
        memory: tables.built.memory,
        truth: without_interrupts(&tables.built.truth),
        beneath: tables.built.truth,
        decoys: tables.built.decoys,
        corners: around_interrupts(rng),
        excuse: Box::new(move |iova, _| {
            if width < 64 && iova >> width != 0 {
                Some(known::AMD_WIDTH)
            } else {
                skipped.iter().any(|range| range.contains(&iova)).then_some(known::AMD_SKIPPED)
            }
        }),
    }
}
