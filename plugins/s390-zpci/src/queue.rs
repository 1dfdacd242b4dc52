//! Refresh PCI translations (RPCIT). The architecture has no queue for it: it is an instruction, and what stands for an entry here is a record of 24 bytes, three
//! big-endian words: the function's id, as `lookup` takes it, and address and length as the instruction's second operand has them. A VMM knows which function a handle
//! belongs to; a handle means nothing here.
//!
//! The instruction also announces mappings: entries that were absent may be cached as such.

use stagecraft_sdk::queue::decode_each;
use stagecraft_sdk::{Command, Effect, Error, Scope};

const SECTION: &str = "zPCI, refresh PCI translations";

/// Status 16, which the instruction ends with: the range is not one of whole pages.
const INVALID_RANGE: u32 = 16;

/// What a batch of refreshes asks for.
pub(crate) fn decode(commands: &[u8]) -> Result<Vec<Command>, Error> {
    decode_each::<24>(commands, SECTION, |entry, push| {
        let words: Vec<u64> = stagecraft_sdk::bits::words(entry).into_iter().map(u64::swap_bytes).collect();
        let (id, address, length) = (words[0], words[1], words[2]);
        let last = length.checked_sub(1).and_then(|length| address.checked_add(length));
        // Ids of more than 32 bits do not fit: all functions are meant then.
        let function = if id >> 32 == 0 { Scope::ALL.id(id) } else { Scope::ALL };
        push(match last {
            Some(last) if (address | length) & 0xfff == 0 => Effect::Range(function.range(address, last)),
            _ => Effect::Illegal(INVALID_RANGE),
        });
    })
}
