//! Memory types: section B3.8.

use stagecraft_sdk::MemoryType;

use crate::spec::{nmrr, prrr};

/// The bits of a leaf that choose how its memory is treated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Code {
    pub(crate) tex: u64,
    pub(crate) c: u64,
    pub(crate) b: u64,
    pub(crate) s: u64,
}

/// How codes are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// TEX, C and B say it all: section B3.8.2.
    Direct,
    /// TEX[0], C and B are an index: section B3.8.3.
    Remap { prrr: u64, nmrr: u64 },
}

impl Scheme {
    /// Memory type, and whether accesses snoop; none if the code is reserved or implementation defined. Write-through counts as write-back.
    pub(crate) fn decode(self, code: Code) -> Option<(MemoryType, bool)> {
        let Code { tex, c, b, s } = code;
        let (memory_type, shareable) = match self {
            Self::Direct => {
                let memory_type = match (tex, c, b) {
                    (0, 0, _) | (2, 0, 0) => MemoryType::Device,
                    (0, 1, _) | (1, 1, 1) => MemoryType::WriteBack,
                    (1, 0, 0) => MemoryType::NonCacheable,
                    // TEX[1:0] is the outer, C and B the inner cacheability.
                    (4.., ..) if tex & 3 != 0 && (c, b) != (0, 0) => MemoryType::WriteBack,
                    (4.., ..) => MemoryType::NonCacheable,
                    _ => return None,
                };
                (memory_type, s == 1)
            }
            Self::Remap { prrr, nmrr } => {
                let n = (tex & 1) << 2 | c << 1 | b;
                let two_bits = |register: u64, lsb: u64| register >> lsb & 3;
                let memory_type = match two_bits(prrr, prrr::kind_lsb(n)) {
                    // Type 6 is implementation defined.
                    _ if n == 6 => return None,
                    prrr::RESERVED => return None,
                    prrr::NORMAL if two_bits(nmrr, nmrr::inner_lsb(n)) == 0 || two_bits(nmrr, nmrr::outer_lsb(n)) == 0 => MemoryType::NonCacheable,
                    prrr::NORMAL => MemoryType::WriteBack,
                    _ => MemoryType::Device,
                };
                (memory_type, prrr >> (prrr::SHAREABLE_LSB + s) & 1 == 1)
            }
        };
        Some((memory_type, memory_type == MemoryType::WriteBack && shareable))
    }

    /// A code for this memory type, with the coherence asked for if there is one.
    pub(crate) fn encode(self, memory_type: MemoryType, coherent: bool) -> Option<Code> {
        // Codes that mean the same in both schemes as Linux sets them up, then all others.
        let usual = [(1, 1, 1), (1, 0, 0), (0, 0, 1)].into_iter();
        let codes = usual.chain((0..32).map(|code| (code >> 2, code >> 1 & 1, code & 1)));
        let codes = codes.flat_map(|(tex, c, b)| [1, 0].map(|s| Code { tex, c, b, s }));
        let of_type: Vec<_> = codes.filter(|code| self.decode(*code).is_some_and(|(found, _)| found == memory_type)).collect();
        let exact = of_type.iter().find(|code| self.decode(**code).is_some_and(|(_, snoops)| snoops == coherent));
        exact.or(of_type.first()).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use MemoryType::{Device, NonCacheable, WriteBack};

    fn all(scheme: Scheme, s: u64) -> Vec<Option<(MemoryType, bool)>> {
        (0..32).map(|code| scheme.decode(Code { tex: code >> 2, c: code >> 1 & 1, b: code & 1, s })).collect()
    }

    #[test]
    fn every_code_means_what_the_manual_says() {
        let (d, n, w, x) = (Some((Device, false)), Some((NonCacheable, false)), Some((WriteBack, true)), None);
        let expected = [
            d, d, w, w, // TEX 0
            n, x, x, w, // TEX 1
            d, x, x, x, // TEX 2
            x, x, x, x, // TEX 3
            n, n, n, n, // outer not cached
            n, w, w, w, n, w, w, w, n, w, w, w,
        ];
        assert_eq!(all(Scheme::Direct, 1), expected);
        let not_shared = expected.map(|entry| entry.map(|(memory_type, _)| (memory_type, false)));
        assert_eq!(all(Scheme::Direct, 0), not_shared);
    }

    #[test]
    fn remapping_reads_the_registers() {
        // 0 strongly-ordered, 1 device, 2 normal, 3 reserved, 4 to 7 normal; 2 cached inside only, 4 outside only, 5 and 7 both.
        let prrr = 0b10_10_10_10_11_10_01_00 | 1 << 19;
        let nmrr = 0b11_00_01_00_00_01_00_00 | 0b10_00_01_01_00_00_00_00 << 16;
        let scheme = Scheme::Remap { prrr, nmrr };
        let (d, n, w, x) = (Some((Device, false)), Some((NonCacheable, false)), Some((WriteBack, true)), None);
        assert_eq!(all(scheme, 1)[..8], [d, d, n, x, n, w, x, w]);
        assert_eq!(all(scheme, 1)[8..16], all(scheme, 1)[..8], "TEX[2:1] are software's");
        assert_eq!(all(scheme, 0)[5], Some((WriteBack, false)));
        let other = Scheme::Remap { prrr: prrr ^ 3 << 18, nmrr };
        assert_eq!((all(other, 0)[5], all(other, 1)[5]), (w, Some((WriteBack, false))));
    }

    #[test]
    fn what_is_encoded_decodes_again() {
        let linux = Scheme::Remap { prrr: crate::short::LINUX_PRRR, nmrr: crate::short::LINUX_NMRR };
        for scheme in [Scheme::Direct, linux] {
            for (memory_type, coherent, tex, c, b) in
                [(WriteBack, true, 1, 1, 1), (WriteBack, false, 1, 1, 1), (NonCacheable, false, 1, 0, 0), (Device, false, 0, 0, 1)]
            {
                let Some(code) = scheme.encode(memory_type, coherent) else { panic!("{memory_type:?}") };
                assert_eq!((code.tex, code.c, code.b), (tex, c, b));
                assert_eq!(scheme.decode(code), Some((memory_type, coherent)));
            }
        }
        let only_device = Scheme::Remap { prrr: 0, nmrr: 0 };
        assert_eq!(only_device.encode(WriteBack, true), None);
        assert!(only_device.encode(Device, false).is_some());
        let never_shared = Scheme::Remap { prrr: 0b10 << 14, nmrr: 1 << 14 | 1 << 30 };
        assert_eq!(never_shared.encode(WriteBack, true).and_then(|code| never_shared.decode(code)), Some((WriteBack, false)));
    }
}
