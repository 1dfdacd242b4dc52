//! From a stream's registers to its tables. DART has no structures in memory above the tables.
//!
//! Registers of a stream carry its id and, for roots, a number: `TCR_<id>` and `TTBR_<id>_<n>`, the id in hexadecimal digits. A unit that gives `PARAMS3` is
//! of T8110's kind, any other of T8020's. T6000's kind has T8020's registers and DART2's tables, which no register tells; it is not detected.

use stagecraft_sdk::{Binding, Blocked, Error, Format, GuestMemory, Offer, Outcome, Registers, Requester, TableConfig, Unit};

use crate::spec::{params, t8020, t8110};
use crate::table::{Dart1, Dart2, ROOTS};

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct AppleDart;

const SECTION: &str = "Linux, Apple DART registers";

fn blocked(event: &str, reason: &str) -> Result<Outcome, Error> {
    Ok(Blocked::outcome(event, SECTION, reason))
}

impl Unit for AppleDart {
    fn lookup(registers: &Registers, requester: Requester, _memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        if requester.pasid.is_some() {
            return blocked("NO_TTBR", "DART has no requests with PASID");
        }
        let id = requester.id;
        let params3 = registers.get("PARAMS3");
        let tcr = registers.need(&format!("TCR_{id:x}"))?;
        let (translate, bypass) = if params3.is_some() { (t8110::TRANSLATE, t8110::BYPASS) } else { (t8020::TRANSLATE, t8020::BYPASS) };
        match (tcr & translate != 0, tcr & bypass != 0) {
            (false, true) => return Ok(Outcome::Bypass),
            (false, false) => return blocked("NO_TTBR", "the stream is neither translated nor bypassed"),
            (true, true) => return blocked("NO_TTBR", "the stream is to be translated and bypassed at once"),
            (true, false) => {}
        }
        let shift = params::PAGE_SHIFT.of(registers.need("PARAMS1")?);
        if !(12..=14).contains(&shift) {
            return Err(Error::invalid("PARAMS1", shift, SECTION, "pages have 4 KiB or 16 KiB"));
        }
        let mut table = TableConfig::new(Dart1::NAME, &[("granule", 1 << shift)]);
        if let Some(params3) = params3 {
            if tcr & t8110::REMAP != 0 {
                return Err(Error::Unsupported("a stream that uses another stream's registers".to_owned()));
            }
            table.format = Dart2::NAME.to_owned();
            let levels = if tcr & t8110::FOUR_LEVEL != 0 { 3 } else { 2 };
            // There is one root, whatever the addresses' width.
            let input_bits = params::INPUT_BITS.of(params3).min(14 + 11 * levels);
            table.settings.set("levels", levels);
            table.settings.set("input-bits", input_bits);
            table.settings.set("output-bits", params::OUTPUT_BITS.of(params3).min(Dart2::WIDEST));
        }
        let count = if params3.is_some() { 1 } else { ROOTS.len() };
        let mut any = false;
        for (index, name) in ROOTS.into_iter().enumerate().take(count) {
            let ttbr = registers.get(&format!("TTBR_{id:x}_{index}")).unwrap_or(0);
            let (valid, address) = match params3 {
                Some(_) => (ttbr & t8110::VALID, t8110::ADDRESS.of(ttbr) << t8110::ADDRESS_SHIFT),
                None => (ttbr & t8020::VALID, t8020::ADDRESS.of(ttbr) << t8020::ADDRESS_SHIFT),
            };
            if valid != 0 {
                table.settings.set(name, address);
                any = true;
            }
        }
        if !any {
            return blocked("NO_TTBR", "the stream is translated and no root is valid");
        }
        // Widths and alignments that registers can say and tables cannot.
        let opened = if params3.is_some() { Dart2::open(&table.settings).map(drop) } else { Dart1::open(&table.settings).map(drop) };
        opened.map(|()| Outcome::Tables(vec![table]))
    }

    fn pasids(_registers: &Registers, _id: u64, _memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    fn offers(kind: u32, _info: &[u8]) -> Result<Vec<Offer>, Error> {
        Err(Error::Unsupported(format!("hardware information of type {kind} is not DART's: the kernel has none for it")))
    }

    fn bind_data(table: &TableConfig, _context_address: u64) -> Result<Binding, Error> {
        Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on DART", table.format)))
    }
}
