//! Bit layouts, and nothing else. "IHI 0070" is the SMMUv3 architecture specification, "DDI 0487" the Arm architecture reference manual for A-profile.
//!
//! Bits of the STE and the CD are numbered across the whole 64-byte structure, as the specification does: `[165:160]` is bits `[37:32]` of the third
//! 64-bit word.

pub(crate) mod cd;
pub(crate) mod command;
pub(crate) mod descriptor;
pub(crate) mod registers;
pub(crate) mod ste;

use stagecraft_sdk::bits::Field;

/// An STE or a CD: eight little-endian words.
pub(crate) type Words = [u64; 8];

/// A field of a 64-byte structure.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot {
    word: usize,
    field: Field,
}

impl Slot {
    /// Bits `[high:low]` of the structure; they lie in one 64-bit word.
    pub(crate) const fn new(high: u16, low: u16) -> Self {
        assert!(high >= low && high < 512 && high / 64 == low / 64);
        Self { word: (low / 64) as usize, field: Field::new((high % 64) as u8, (low % 64) as u8) }
    }

    /// The field's value.
    pub(crate) const fn of(self, words: &Words) -> u64 {
        self.field.of(words[self.word])
    }

    /// The word of the structure that it is in, and its mask there.
    pub(crate) const fn place(self) -> (usize, u64) {
        (self.word, self.field.mask())
    }

    /// A one-bit field that is set.
    pub(crate) const fn is_set(self, words: &Words) -> bool {
        self.of(words) != 0
    }

    /// The field where it stands in its word: for addresses, whose bits stand in place.
    pub(crate) const fn in_place(self, words: &Words) -> u64 {
        self.field.in_place(words[self.word])
    }

    /// Replaces the field's value; bits of `value` that do not fit are dropped.
    pub(crate) const fn set(self, words: &mut Words, value: u64) {
        words[self.word] = (words[self.word] & !self.field.mask()) | self.field.put(value);
    }

    /// Replaces the field by the bits of `address` that stand where the field stands.
    pub(crate) const fn set_in_place(self, words: &mut Words, address: u64) {
        words[self.word] = (words[self.word] & !self.field.mask()) | self.field.in_place(address);
    }
}

/// The field that the specification calls `name`, whatever its capitals.
pub(crate) fn field(fields: &[(&str, Slot)], name: &str) -> Option<Slot> {
    fields.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, slot)| *slot)
}

/// Declares the fields of a 64-byte structure, and the list of all of them. A layout is whole: some fields nothing else reads.
macro_rules! slots {
    ($($(#[$doc:meta])* $name:ident = [$high:literal : $low:literal];)+) => {
        $($(#[$doc])* #[allow(dead_code)] pub(crate) const $name: $crate::spec::Slot = $crate::spec::Slot::new($high, $low);)+
        /// All fields, by name.
        pub(crate) const ALL: &[(&str, $crate::spec::Slot)] = &[$((stringify!($name), $name)),+];
    };
}
/// The same for a register or a 64-bit entry.
macro_rules! fields {
    ($($(#[$doc:meta])* $name:ident = [$high:literal : $low:literal];)+) => {
        $($(#[$doc])* #[allow(dead_code)] pub(crate) const $name: stagecraft_sdk::bits::Field = stagecraft_sdk::bits::Field::new($high, $low);)+
        #[cfg(test)]
        pub(in crate::spec) const ALL: &[(&str, stagecraft_sdk::bits::Field)] = &[$((stringify!($name), $name)),+];
    };
}
pub(crate) use {fields, slots};

#[cfg(test)]
mod tests {
    use super::*;

    /// Sets every field to a value of its own, and reads all of them back.
    fn every_slot_is_its_own(fields: &[(&str, Slot)]) -> Words {
        let value = |i: usize, slot: Slot| (i as u64 * 0x9e37_79b9 + 1) & (slot.field.mask() >> slot.field.mask().trailing_zeros());
        let mut words = [0; 8];
        for (i, &(_, slot)) in fields.iter().enumerate() {
            slot.set(&mut words, value(i, slot));
        }
        for (i, &(name, slot)) in fields.iter().enumerate() {
            assert_eq!(slot.of(&words), value(i, slot), "{name}");
        }
        words
    }

    #[test]
    fn no_field_of_a_structure_overlaps_another() {
        for fields in [ste::ALL, cd::ALL] {
            every_slot_is_its_own(fields);
            let mut seen = [0_u64; 8];
            for (name, slot) in fields {
                assert_eq!(seen[slot.word] & slot.field.mask(), 0, "{name} overlaps");
                seen[slot.word] |= slot.field.mask();
            }
        }
    }

    #[test]
    fn no_field_of_a_register_or_entry_overlaps_another() {
        use registers::{cr0, cr2, gbpa, idr0, idr1, idr3, idr5, l1cd, l1std, strtab_base, strtab_base_cfg};
        let groups = [
            cr0::ALL,
            cr2::ALL,
            gbpa::ALL,
            idr0::ALL,
            idr1::ALL,
            idr3::ALL,
            idr5::ALL,
            strtab_base::ALL,
            strtab_base_cfg::ALL,
            l1std::ALL,
            l1cd::ALL,
        ];
        let groups = groups.into_iter().chain([descriptor::stage1::ALL, descriptor::stage2::ALL, descriptor::table::ALL]);
        for fields in groups {
            let mut seen = 0;
            for (name, field) in fields {
                assert_eq!(seen & field.mask(), 0, "{name} overlaps");
                seen |= field.mask();
                assert_eq!(field.of(field.put(u64::MAX)), field.mask() >> field.mask().trailing_zeros(), "{name}");
            }
        }
    }

    /// Words written by hand from IHI 0070 sections 5.2 and 5.4, one distinct value per field.
    #[test]
    fn fields_stand_where_the_specification_puts_them() {
        let mut words = [0; 8];
        ste::V.set(&mut words, 1);
        ste::CONFIG.set(&mut words, 0b101);
        ste::S1FMT.set(&mut words, 0b10);
        ste::S1CONTEXTPTR.set_in_place(&mut words, 0x00aa_bbcc_ddee_ffc0);
        ste::S1CDMAX.set(&mut words, 0b10101);
        assert_eq!(words[0], 0xa8aa_bbcc_ddee_ffeb);
        ste::S1DSS.set(&mut words, 2);
        ste::S1CIR.set(&mut words, 1);
        ste::S1COR.set(&mut words, 1);
        ste::S1CSH.set(&mut words, 3);
        assert_eq!(words[1], 0xd6, "what Linux writes");
        ste::S2FWB.set(&mut words, 1);
        ste::S1STALLD.set(&mut words, 1);
        ste::EATS.set(&mut words, 2);
        ste::STRW.set(&mut words, 2);
        ste::PRIVCFG.set(&mut words, 3);
        assert_eq!(words[1], 0x0003_0000_aa00_00d6);
        ste::S2VMID.set(&mut words, 7);
        ste::S2T0SZ.set(&mut words, 20);
        ste::S2SL0.set(&mut words, 2);
        ste::S2IR0.set(&mut words, 1);
        ste::S2OR0.set(&mut words, 1);
        ste::S2SH0.set(&mut words, 3);
        ste::S2PS.set(&mut words, 4);
        ste::S2AA64.set(&mut words, 1);
        ste::S2PTW.set(&mut words, 1);
        ste::S2R.set(&mut words, 1);
        assert_eq!(words[2], 0x044c_3594_0000_0007, "what Linux writes");
        ste::S2TG.set(&mut words, 2);
        ste::S2ENDI.set(&mut words, 1);
        ste::S2AFFD.set(&mut words, 1);
        ste::S2HD.set(&mut words, 1);
        ste::S2HA.set(&mut words, 1);
        ste::S2S.set(&mut words, 1);
        assert_eq!(words[2], 0x07fc_b594_0000_0007);
        ste::S2SL0_2.set(&mut words, 1);
        ste::S2DS.set(&mut words, 1);
        ste::S2TTB.set_in_place(&mut words, 0x000f_1234_5678_9ab0);
        assert_eq!(words[3], 0x000f_1234_5678_9abc);

        let mut words = [0; 8];
        cd::T0SZ.set(&mut words, 16);
        cd::TG0.set(&mut words, 2);
        cd::IR0.set(&mut words, 1);
        cd::OR0.set(&mut words, 1);
        cd::SH0.set(&mut words, 3);
        cd::EPD1.set(&mut words, 1);
        cd::V.set(&mut words, 1);
        cd::IPS.set(&mut words, 4);
        cd::AA64.set(&mut words, 1);
        cd::R.set(&mut words, 1);
        cd::A.set(&mut words, 1);
        cd::ASET.set(&mut words, 1);
        cd::ASID.set(&mut words, 1);
        assert_eq!(words[0], 0x0001_e204_c000_3590, "what Linux writes");
        cd::EPD0.set(&mut words, 1);
        cd::ENDI.set(&mut words, 1);
        cd::T1SZ.set(&mut words, 25);
        cd::TG1.set(&mut words, 3);
        cd::AFFD.set(&mut words, 1);
        cd::WXN.set(&mut words, 1);
        cd::TBI0.set(&mut words, 1);
        cd::PAN.set(&mut words, 1);
        cd::HD.set(&mut words, 1);
        cd::S.set(&mut words, 1);
        assert_eq!(words[0], 0x0001_f75c_c0d9_f590);
        cd::TBI1.set(&mut words, 1);
        cd::HA.set(&mut words, 1);
        assert_eq!(words[0], 0x0001_ffdc_c0d9_f590);
        cd::HAD0.set(&mut words, 1);
        cd::E0PD0.set(&mut words, 1);
        cd::TTB0.set_in_place(&mut words, 0x000f_1234_5678_9ab0);
        assert_eq!(words[1], 0x000f_1234_5678_9ab6);
        cd::HAD1.set(&mut words, 1);
        cd::TTB1.set_in_place(&mut words, 0x0001_0000_0000_0040);
        cd::DS.set(&mut words, 1);
        assert_eq!(words[2], 0x0401_0000_0000_0042);
        cd::MAIR.set(&mut words, u64::MAX);
        assert_eq!(words[3], u64::MAX);
    }
}
