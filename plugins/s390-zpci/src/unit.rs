//! From a function's registration to its table.
//!
//! A zPCI function has no device table: the guest registers an anchor (IOTA) and the bounds of the input addresses (PBA, PAL) with one instruction
//! per function. They come as the registers `IOTA_<id>`, `BASE_<id>` and `LIMIT_<id>`, with the function's id in hexadecimal digits. Nothing in guest
//! memory is read.
//!
//! # No table
//!
//! A function that is registered without an anchor does DMA to absolute addresses at an offset: the lowest input address (PBA) goes to absolute address 0. An anchor
//! may also designate one frame of memory; what lies within it is reached without a table. Which of the input addresses the frame's first byte belongs to is
//! known only where the bounds lie within one multiple of the frame's size and begin at it; elsewhere the answer is that this is not supported.
//!
//! # An anchor, or only an address
//!
//! An anchor says what it designates, in its low bits. Drivers keep the table's address and add those bits when they register it, and a tracer may see
//! either. So a value whose low 14 bits are zero is taken for the bare address of a table of the kind that drivers choose: the smallest region table that
//! holds the addresses up to the limit, region-third at least. The types in the table's entries are not asked: what is in memory must
//! not choose how it is read.

use stagecraft_sdk::{
    Attributes, Binding, Blocked, Command, Direct, Error, Event, EventRecord, Format, GuestMemory, Offer, Outcome, PlaceToBind, Registers, Requester,
    TableConfig, Tag, Translated, Unit, Window,
};

use crate::dma::{Dma, last_iova};
use crate::queue;
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
enum Anchor {
    Table { levels: u8, root: u64, read_only: bool },
    Frame { address: u64, size_log2: u32, read_only: bool },
}

/// The table that `register` designates; `last` is the highest input address.
fn anchor(register: &Register, last: u64) -> Result<Anchor, Error> {
    let iota = register.need()?;
    if iota & iota::TRANSLATION == 0 {
        if iota & iota::TABLE_ALIGNMENT.mask() != 0 {
            return Err(register.refuse("neither an anchor that enables translation (bit 11) nor the address of a table of 16 KiB"));
        }
        let levels = (3..5).find(|levels| last <= last_iova(*levels)).unwrap_or(5);
        return Ok(Anchor::Table { levels, root: iota, read_only: false });
    }
    let read_only = iota & iota::PROTECTED != 0;
    let levels = match iota::DESIGNATION.of(iota) {
        iota::PAGE_TABLE if iota::FRAME_SIZE.of(iota) == iota::FRAME_4K => 1,
        iota::PAGE_TABLE => return Err(Error::Unsupported("a page table of frames that are larger than 4 KiB".to_owned())),
        iota::SEGMENT_TABLE => 2,
        iota::REGION_THIRD_TABLE => 3,
        iota::REGION_SECOND_TABLE => 4,
        iota::REGION_FIRST_TABLE => 5,
        iota::FRAME | iota::IO_FRAME => {
            let Some(size_log2) = iota::FRAMES_LOG2.get(iota::FRAME_SIZE.of(iota) as usize) else {
                return Err(register.refuse("this frame size is reserved"));
            };
            let address = iota::ORIGIN.in_place(iota) >> size_log2 << size_log2;
            return Ok(Anchor::Frame { address, size_log2: *size_log2, read_only });
        }
        _ => return Err(register.refuse("this designation type is reserved")),
    };
    Ok(Anchor::Table { levels, root: iota::ORIGIN.in_place(iota), read_only })
}

/// Input addresses `first..=last` go to `address` and what follows it.
fn direct(first: u64, last: u64, address: u64, read_only: bool) -> Outcome {
    let attributes = Attributes { read: true, write: !read_only, coherent: true, ..Attributes::default() };
    Outcome::Direct(Direct { windows: vec![Window { first, last, address, attributes }], intercepts: Vec::new() })
}

impl Unit for S390Zpci {
    fn lookup(registers: &Registers, requester: Requester, _memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        if requester.pasid.is_some() {
            return Ok(Outcome::Blocked(Blocked::refused("INVALAS", SECTION, "zPCI has no requests with PASID")));
        }
        let [iota, base, limit] = ["IOTA", "BASE", "LIMIT"].map(|what| Register::new(registers, what, requester.id));
        let registered = iota.value.is_some_and(|value| value != 0) || limit.value.is_some_and(|value| value != 0);
        if !registered {
            return Ok(Outcome::Blocked(Blocked::unused("INVALAS", SECTION, "the function has no I/O address translation registered")));
        }
        // Registration drops the bits below a page.
        let (first, last) = (base.need()? & !0xfff, limit.need()? | 0xfff);
        if first > last {
            return Err(limit.refuse("the highest input address is below the lowest one"));
        }
        if iota.need()? == 0 {
            return Ok(if first == 0 && last == u64::MAX { Outcome::Bypass } else { direct(first, last, 0, false) });
        }
        let (levels, root, read_only) = match anchor(&iota, last)? {
            Anchor::Table { levels, root, read_only } => (levels, root, read_only),
            Anchor::Frame { address, size_log2, read_only } => {
                let within = first.trailing_zeros() >= size_log2 && last >> size_log2 == first >> size_log2;
                let what = "bounds that are not those of the one frame that the anchor designates";
                return if within { Ok(direct(first, last, address, read_only)) } else { Err(Error::Unsupported(what.to_owned())) };
            }
        };
        if first > last_iova(levels) {
            return Err(base.refuse("the lowest input address is beyond what the designated table can hold"));
        }
        let settings = [("levels", levels.into()), ("root", root), ("first-iova", first), ("last-iova", last.min(last_iova(levels)))];
        let mut table = TableConfig::new(Dma::NAME, &settings);
        if read_only {
            table.settings.set("read-only", 1);
        }
        Ok(Outcome::Tables(Translated::new(vec![table], Tag::default())))
    }

    fn pasids(_registers: &Registers, _id: u64, _memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        Ok(Vec::new())
    }

    /// The kernel has no hardware information of this architecture: its tables are always built by map and unmap.
    fn offers(kind: u32, _info: &[u8]) -> Result<Vec<Offer>, Error> {
        Err(Error::Unsupported(format!("hardware information of type {kind} is not zPCI's: the kernel has none for it")))
    }

    fn bind_data(table: &TableConfig, _: &PlaceToBind) -> Result<Binding, Error> {
        Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on zPCI", table.format)))
    }

    fn decode_commands(_registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        queue::decode(commands)
    }

    /// The record of an error has the function's handle and its id, which nothing here knows.
    fn encode_event(_registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        Err(Error::Unsupported(format!("an error event of function {:#x}: it names a handle that no register tells", event.id)))
    }
}
