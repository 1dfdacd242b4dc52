//! VT-d tables of three and four levels.

use stagecraft_tests::reference::detect::without_interrupts;
use stagecraft_tests::reference::generate::{Options, Rng, build, random_leaves};
use stagecraft_tests::reference::tables::{TableConfig, VtdFirst, VtdSecond};

use super::{Contents, Space, add_common, add_interrupts, around_interrupts, into_device_memory};
use crate::judge::rejected;
use crate::vtd::Mode;
use crate::{Board, Tables};

/// A random address space for a model of this mode and address width.
pub fn space(mode: Mode, address_bits: u32, contents: Contents, rng: &mut Rng) -> Space {
    // RAM goes a bit beyond 39 bits.
    let output_bits = if address_bits == 39 { 39 } else { rng.pick(&[36, 39, 40]) };
    let config = match mode {
        Mode::ScalableFirst => {
            TableConfig::VtdFirst(VtdFirst { root: 0, levels: 4, output_bits, large_1g: true, execute_disable: true, extended_access: false })
        }
        _ => {
            let levels = if address_bits == 39 { 3 } else { rng.pick(&[3, 4, 4]) };
            let input_bits = 12 + 9 * levels;
            TableConfig::VtdSecond(VtdSecond { root: 0, levels, input_bits, output_bits, ..VtdSecond::default() })
        }
    };
    let options = Options { restrictions: contents.variety, noise: contents.variety, ..Options::default() };
    let mut leaves = random_leaves(&config, rng, options);
    into_device_memory(&mut leaves, &Board::Q35.device_memory(), rng);
    add_common(&mut leaves, 4096, rng);
    add_interrupts(&mut leaves, 4096, rng);
    let generated = build(config, &leaves, rng, options);
    Space {
        tables: Tables::Vtd(generated.config),
        formats: vec![config.format()],
        decoys: rejected(&generated.snapshot.memory, &generated.config),
        corners: around_interrupts(rng),
        memory: generated.snapshot.memory,
        truth: without_interrupts(&generated.truth),
        beneath: generated.truth,
        excuse: Box::new(|_, _| None),
    }
}
