//! From a function's registration to its table.
//!
//! A zPCI function has no device table: the guest registers an anchor (IOTA) and the bounds of the input addresses (PBA, PAL) with one instruction
//! per function. They come as the registers `IOTA_<id>`, `BASE_<id>` and `LIMIT_<id>`, with the function's id in hexadecimal digits. Nothing in guest
//! memory is read.
//!
//! # An anchor, or only an address
//!
//! An anchor says what it designates, in its low bits. Drivers keep the table's address and add those bits when they register it, and a tracer may see
//! either. So a value whose low 14 bits are zero is taken for the bare address of a table of the kind that drivers choose: the smallest region table that
//! holds the addresses up to the limit, region-third at least. The types in the table's entries are not asked: what is in memory must
//! not choose how it is read.

use stagecraft_sdk::{Binding, Blocked, Error, Format, GuestMemory, Offer, Outcome, Registers, Requester, TableConfig, Unit};

use crate::dma::{Dma, last_iova};
use crate::spec::iota;

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct S390Zpci;

const SECTION: &str = "zPCI, register I/O address translation parameters";

/// A register of one function: its name, and its value if it was given.
struct Register {
    name: String,
    value: Option<u64>,
}

impl Register {
    fn new(registers: &Registers, what: &str, id: u64) -> Self {
        let name = format!("{what}_{id:x}");
        let value = registers.get(&name).or_else(|| registers.get(&format!("{what}_{id:X}")));
        Self { name, value }
    }

    fn need(&self) -> Result<u64, Error> {
        self.value.ok_or_else(|| self.refuse("this register is needed and was not given"))
    }

    fn refuse(&self, reason: &str) -> Error {
        Error::invalid(&self.name, self.value.unwrap_or(0), SECTION, reason)
    }
}

/// What an anchor designates.
struct Anchor {
    levels: u8,
    root: u64,
    read_only: bool,
}

/// The table that `register` designates; `last` is the highest input address.
fn anchor(register: &Register, last: u64) -> Result<Anchor, Error> {
    let iota = register.need()?;
    if iota & iota::TRANSLATION == 0 {
        if iota & iota::TABLE_ALIGNMENT.mask() != 0 {
            return Err(register.refuse("neither an anchor that enables translation (bit 11) nor the address of a table of 16 KiB"));
        }
        let levels = (3..5).find(|levels| last <= last_iova(*levels)).unwrap_or(5);
        return Ok(Anchor { levels, root: iota, read_only: false });
    }
    let levels = match iota::DESIGNATION.of(iota) {
        iota::PAGE_TABLE if iota::FRAME_SIZE.of(iota) == iota::FRAME_4K => 1,
        iota::PAGE_TABLE => return Err(Error::Unsupported("a page table of frames that are larger than 4 KiB".to_owned())),
        iota::SEGMENT_TABLE => 2,
        iota::REGION_THIRD_TABLE => 3,
        iota::REGION_SECOND_TABLE => 4,
        iota::REGION_FIRST_TABLE => 5,
        iota::FRAME | iota::IO_FRAME => return Err(Error::Unsupported("an anchor that designates a frame of memory and no table".to_owned())),
        _ => return Err(register.refuse("this designation type is reserved")),
    };
    Ok(Anchor { levels, root: iota::ORIGIN.in_place(iota), read_only: iota & iota::PROTECTED != 0 })
}

impl Unit for S390Zpci {
    fn lookup(registers: &Registers, requester: Requester, _memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        if requester.pasid.is_some() {
            return Ok(Blocked::outcome("INVALAS", SECTION, "zPCI has no requests with PASID"));
        }
        let [iota, base, limit] = ["IOTA", "BASE", "LIMIT"].map(|what| Register::new(registers, what, requester.id));
        let registered = iota.value.is_some_and(|value| value != 0) || limit.value.is_some_and(|value| value != 0);
        if !registered {
            return Ok(Blocked::outcome("INVALAS", SECTION, "the function has no I/O address translation registered"));
        }
        // Registration drops the bits below a page.
        let (first, last) = (base.need()? & !0xfff, limit.need()? | 0xfff);
        if first > last {
            return Err(limit.refuse("the highest input address is below the lowest one"));
        }
        if iota.need()? == 0 {
            let what = format!("a function that is not translated: its input addresses are absolute ones plus {first:#x}");
            return if first == 0 && last == u64::MAX { Ok(Outcome::Bypass) } else { Err(Error::Unsupported(what)) };
        }
        let Anchor { levels, root, read_only } = anchor(&iota, last)?;
        if first > last_iova(levels) {
            return Err(base.refuse("the lowest input address is beyond what the designated table can hold"));
        }
        let settings = [("levels", levels.into()), ("root", root), ("first-iova", first), ("last-iova", last.min(last_iova(levels)))];
        let mut table = TableConfig::new(Dma::NAME, &settings);
        if read_only {
            table.settings.set("read-only", 1);
        }
        Ok(Outcome::Tables(vec![table]))
    }

    fn pasids(_registers: &Registers, _id: u64, _memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    /// The kernel has no hardware information of this architecture: its tables are always built by map and unmap.
    fn offers(kind: u32, _info: &[u8]) -> Result<Vec<Offer>, Error> {
        Err(Error::Unsupported(format!("hardware information of type {kind} is not zPCI's: the kernel has none for it")))
    }

    fn bind_data(table: &TableConfig, _context_address: u64) -> Result<Binding, Error> {
        Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on zPCI", table.format)))
    }
}
