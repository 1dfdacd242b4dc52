//! From a stream's registers to its tables. DART has no structures in memory above the tables.
//!
//! Registers of a stream carry its id and, for roots, a number: `TCR_<id>` and `TTBR_<id>_<n>`, the id in hexadecimal digits.
//!
//! | kind of unit | registers as T8020's | tables | address bits |
//! |---|---|---|---|
//! | `apple-dart-t8020` | yes | DART1, up to four roots | 36 |
//! | `apple-dart-t6000` | yes | DART2, up to four roots | 42 |
//! | `apple-dart-t8110` | no | DART2, one root | what `PARAMS3` says |
//! | `apple-dart` | unless there is `PARAMS3` | as that kind | |

use stagecraft_sdk::{
    Binding, Blocked, Error, Format, GuestMemory, Offer, Outcome, PlaceToBind, Registers, Requester, TableConfig, Tag, Translated, Unit,
};

use crate::spec::{params, t8020, t8110};
use crate::table::{Dart1, Dart2, ROOTS};

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct AppleDart;

const SECTION: &str = "Linux, Apple DART registers";

fn blocked(reason: &str) -> Result<Outcome, Error> {
    Ok(Outcome::Blocked(Blocked::refused("NO_TTBR", SECTION, reason)))
}

/// Which registers a unit has, and which tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Generation {
    T8020,
    T6000,
    T8110,
}

impl Generation {
    fn new(registers: &Registers) -> Self {
        match registers.unit() {
            "apple-dart-t8020" => Self::T8020,
            "apple-dart-t6000" => Self::T6000,
            "apple-dart-t8110" => Self::T8110,
            _ if registers.get("PARAMS3").is_some() => Self::T8110,
            _ => Self::T8020,
        }
    }

    /// The root in a TTBR, if it is valid.
    const fn root(self, ttbr: u64) -> Option<u64> {
        let (valid, address) = match self {
            Self::T8110 => (ttbr & t8110::VALID, t8110::ADDRESS.of(ttbr) << t8110::ADDRESS_SHIFT),
            Self::T8020 | Self::T6000 => (ttbr & t8020::VALID, t8020::ADDRESS.of(ttbr) << t8020::ADDRESS_SHIFT),
        };
        if valid != 0 { Some(address) } else { None }
    }

    /// The table without its roots.
    fn table(self, registers: &Registers, tcr: u64, granule: u64) -> Result<TableConfig, Error> {
        if self == Self::T8020 {
            return Ok(TableConfig::new(Dart1::NAME, &[("granule", granule)]));
        }
        let mut table = TableConfig::new(Dart2::NAME, &[("granule", granule)]);
        if self == Self::T6000 {
            return Ok(table);
        }
        if tcr & t8110::REMAP != 0 {
            return Err(Error::Unsupported("a stream that uses another stream's registers".to_owned()));
        }
        let params3 = registers.need("PARAMS3")?;
        let levels = if tcr & t8110::FOUR_LEVEL != 0 { 3 } else { 2 };
        table.settings.set("levels", levels);
        // There is one root, whatever the addresses' width.
        table.settings.set("input-bits", params::INPUT_BITS.of(params3).min(14 + 11 * levels));
        table.settings.set("output-bits", params::OUTPUT_BITS.of(params3).min(Dart2::WIDEST));
        Ok(table)
    }
}

impl Unit for AppleDart {
    fn lookup(registers: &Registers, requester: Requester, _memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        if requester.pasid.is_some() {
            return blocked("DART has no requests with PASID");
        }
        let id = requester.id;
        let generation = Generation::new(registers);
        let tcr = registers.need(&format!("TCR_{id:x}"))?;
        let (translate, bypass) = match generation {
            Generation::T8110 => (t8110::TRANSLATE, t8110::BYPASS),
            Generation::T8020 | Generation::T6000 => (t8020::TRANSLATE, t8020::BYPASS),
        };
        match (tcr & translate != 0, tcr & bypass != 0) {
            (false, true) => return Ok(Outcome::Bypass),
            (false, false) => {
                let reason = "the stream is neither translated nor bypassed";
                return Ok(Outcome::Blocked(Blocked::unused("NO_TTBR", SECTION, reason)));
            }
            (true, true) => return blocked("the stream is to be translated and bypassed at once"),
            (true, false) => {}
        }
        let shift = params::PAGE_SHIFT.of(registers.need("PARAMS1")?);
        if !(12..=14).contains(&shift) {
            return Err(Error::invalid("PARAMS1", shift, SECTION, "pages have 4 KiB or 16 KiB"));
        }
        let mut table = generation.table(registers, tcr, 1 << shift)?;
        let count = if generation == Generation::T8110 { 1 } else { ROOTS.len() };
        let mut any = false;
        for (index, name) in ROOTS.into_iter().enumerate().take(count) {
            if let Some(root) = generation.root(registers.get(&format!("TTBR_{id:x}_{index}")).unwrap_or(0)) {
                table.settings.set(name, root);
                any = true;
            }
        }
        if !any {
            return blocked("the stream is translated and no root is valid");
        }
        // Widths and alignments that registers can say and tables cannot.
        let opened = if table.format == Dart2::NAME { Dart2::open(&table.settings).map(drop) } else { Dart1::open(&table.settings).map(drop) };
        opened.map(|()| Outcome::Tables(Translated::new(vec![table], Tag::default())))
    }

    fn pasids(_registers: &Registers, _id: u64, _memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    fn offers(kind: u32, _info: &[u8]) -> Result<Vec<Offer>, Error> {
        Err(Error::Unsupported(format!("hardware information of type {kind} is not DART's: the kernel has none for it")))
    }

    fn bind_data(table: &TableConfig, _: &PlaceToBind) -> Result<Binding, Error> {
        Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on DART", table.format)))
    }
}
