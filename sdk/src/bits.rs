//! Bit fields: layout in one place, behaviour elsewhere.
//!
//! ```
//! use stagecraft_sdk::bits::{Field, bit, mask};
//! const OUTPUT: Field = Field::new(47, 12);
//! assert_eq!(OUTPUT.of(0x0000_8000_dead_b003), 0x8_000d_eadb);
//! assert_eq!(OUTPUT.put(0x1), 0x1000);
//! assert_eq!(bit(7) | mask(2, 0), 0x87);
//! ```

/// Bit `n`.
#[must_use]
pub const fn bit(n: u8) -> u64 {
    1 << n
}

/// Bits `high..=low`, as specifications write them: `mask(47, 12)` for `[47:12]`.
#[must_use]
pub const fn mask(high: u8, low: u8) -> u64 {
    assert!(high >= low && high < 64);
    (u64::MAX >> (63 - high)) & (u64::MAX << low)
}

/// A field of a 64-bit word, named by its highest and lowest bit as specifications do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    high: u8,
    low: u8,
}

impl Field {
    /// The field `[high:low]`.
    #[must_use]
    pub const fn new(high: u8, low: u8) -> Self {
        assert!(high >= low && high < 64);
        Self { high, low }
    }

    /// The field's bits.
    #[must_use]
    pub const fn mask(self) -> u64 {
        mask(self.high, self.low)
    }

    /// The field's value in `word`.
    #[must_use]
    pub const fn of(self, word: u64) -> u64 {
        (word & self.mask()) >> self.low
    }

    /// A word with the field set to `value`; bits of `value` that do not fit are dropped.
    #[must_use]
    pub const fn put(self, value: u64) -> u64 {
        (value << self.low) & self.mask()
    }

    /// The bits of `word` where they stand: for addresses, which specifications name by their own bit numbers.
    #[must_use]
    pub const fn in_place(self, word: u64) -> u64 {
        word & self.mask()
    }
}

/// Little-endian 64-bit words of a structure in guest memory; bytes beyond the last whole word are dropped.
#[must_use]
pub fn words(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_named_by_their_highest_and_lowest_bit() {
        let field = Field::new(11, 9);
        assert_eq!((field.mask(), field.of(0xfff), field.put(0b1010), field.in_place(u64::MAX)), (0xe00, 7, 0x400, 0xe00));
        assert_eq!(Field::new(63, 0).of(u64::MAX), u64::MAX);
        assert_eq!((mask(63, 63), mask(0, 0), bit(63)), (1 << 63, 1, 1 << 63));
        assert_eq!(words(&[1, 0, 0, 0, 0, 0, 0, 0x80, 9]), [0x8000_0000_0000_0001], "a cut word is dropped");
    }
}
