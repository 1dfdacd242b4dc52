//! Bits of stream table entries and context descriptors that are reserved, and that the SMMU ignores: those that are RES0, and fields of features that the unit
//! does not have (IHI 0070 sections 5.1 to 5.4). What makes a structure illegal is elsewhere. Bits that versions of the architecture, or implementations, use
//! for other things than finding a table are not looked at.

use stagecraft_sdk::{GuestMemory, Structure};

use crate::spec::registers::{idr0, idr3, l1cd, l1std};
use crate::spec::{Slot, Words, cd, ste};
use crate::stream::Features;

fn fields(structure: &mut Structure<'_>, words: &Words, unused: &[(bool, Slot)], reason: &'static str) {
    let mut bits = [0_u64; 8];
    for (_, slot) in unused.iter().filter(|(unused, _)| *unused) {
        let (word, mask) = slot.place();
        bits[word] |= words[word] & mask;
    }
    for (word, bits) in (0..).zip(bits) {
        structure.warn(word, bits, reason);
    }
}

/// A level 1 stream table descriptor.
pub(crate) fn stream_descriptor(memory: &mut dyn GuestMemory, address: u64, descriptor: u64) {
    let reserved = descriptor & (l1std::RESERVED_LOW.mask() | l1std::RESERVED_HIGH.mask());
    Structure::new(memory, address, "IHI 0070 section 5.1").warn(0, reserved, "the level 1 stream table descriptor has reserved bits");
}

/// A level 1 context descriptor.
pub(crate) fn context_descriptor(memory: &mut dyn GuestMemory, address: u64, descriptor: u64) {
    let reserved = descriptor & (l1cd::RESERVED_LOW.mask() | l1cd::RESERVED_HIGH.mask());
    Structure::new(memory, address, "IHI 0070 section 5.3").warn(0, reserved, "the level 1 context descriptor has reserved bits");
}

/// A valid stream table entry.
pub(crate) fn stream_entry(memory: &mut dyn GuestMemory, address: u64, words: &Words, features: &Features) {
    let mut structure = Structure::new(memory, address, "IHI 0070 section 5.2");
    let reserved = [(true, ste::RESERVED_0), (true, ste::RESERVED_1), (!features.has_d128(), ste::RESERVED_3)];
    fields(&mut structure, words, &reserved, "the stream table entry has reserved bits");
    let missing = [
        (!features.has3(idr3::S1PI), ste::S1PIE),
        (!features.has3(idr3::FWB), ste::S2FWB),
        (features.idr0(idr0::ATS) == 0, ste::EATS),
        (!features.marks_tables(), ste::S2HAFT),
        (!features.has3(idr3::S2PI), ste::S2PIE),
        (!features.has_lpa2(), ste::S2SL0_2),
        (!features.has_lpa2(), ste::S2DS),
    ];
    fields(&mut structure, words, &missing, "the stream table entry uses a feature that the unit does not have");
}

/// A valid context descriptor.
pub(crate) fn context(memory: &mut dyn GuestMemory, address: u64, words: &Words, features: &Features) {
    let mut structure = Structure::new(memory, address, "IHI 0070 section 5.4");
    let missing = [
        (!features.has3(idr3::HAD), cd::HAD0),
        (!features.has3(idr3::HAD), cd::HAD1),
        (!features.has3(idr3::E0PD), cd::E0PD0),
        (!features.has3(idr3::E0PD), cd::E0PD1),
        (!features.marks_tables(), cd::HAFT),
        (!features.has3(idr3::EPAN), cd::EPAN),
        (!features.has3(idr3::AIE), cd::AIE),
        (!features.has_lpa2(), cd::DS),
        (!features.has3(idr3::S1PI), cd::PIE),
    ];
    fields(&mut structure, words, &missing, "the context descriptor uses a feature that the unit does not have");
}
