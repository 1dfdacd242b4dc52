//! No unit: nothing is detected, nothing is nested.

use stagecraft_sdk::{Binding, Error, GuestMemory, Offer, Outcome, PlaceToBind, Registers, Requester, TableConfig, Unit};

/// Stands where other architectures have device structures.
#[derive(Clone, Copy, Debug)]
pub struct NoUnit;

fn unsupported<T>() -> Result<T, Error> {
    Err(Error::Unsupported("LoongArch has no I/O unit with device structures: give the table's settings".to_owned()))
}

impl Unit for NoUnit {
    fn lookup(_: &Registers, _: Requester, _: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        unsupported()
    }

    fn pasids(_: &Registers, _: u64, _: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        unsupported()
    }

    fn offers(_: u32, _: &[u8]) -> Result<Vec<Offer>, Error> {
        unsupported()
    }

    fn bind_data(_: &TableConfig, _: &PlaceToBind) -> Result<Binding, Error> {
        unsupported()
    }
}
