//! Chance that is the same for the same seed, on every machine and in every version.

/// A generator: SplitMix64.
#[derive(Clone, Copy, Debug)]
pub struct Chance(u64);

impl Chance {
    /// Begins at a seed.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// One below `bound`; 0 if that is 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        let word = self.next();
        // The highest bits of a product: as even as anybody needs here.
        ((word as u128 * bound as u128) >> 64) as u64
    }
}
