//! RISC-V IOMMU 1.0: chapters 2 (structures), 3 (queues) and 5 (registers).

use anyhow::Result;

use super::{Architecture, Described, Forget, Memory, Refused, named, push, words};

/// Devices with tables of one stage.
#[derive(Debug)]
pub struct Riscv {
    /// The second stage.
    pub second: bool,
}

/// Pages of a range that are forgotten one by one, as without the extension for sizes; beyond it everything is.
const MOST_PAGES: u64 = 64;

impl Riscv {
    /// IOTINVAL.VMA with PSCID (PSCV), or IOTINVAL.GVMA with GSCID (GV); AV says that there is an address.
    fn command(&self, device: &Described, address: Option<u64>) -> [u64; 2] {
        let space = u64::from(device.space);
        let low = if self.second { 1 | 1 << 7 | 1 << 33 | space << 44 } else { 1 | space << 12 | 1 << 32 };
        match address {
            Some(address) => [low | 1 << 10, (address >> 12 << 10) & ((1 << 62) - 1)],
            None => [low, 0],
        }
    }
}

impl Architecture for Riscv {
    fn kind(&self) -> &'static str {
        "riscv-iommu"
    }

    fn set_up(&self, memory: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>> {
        // One level of 128 device contexts of the base format.
        let table = memory.take(4096)?;
        let (mut narrow, mut memory_types, mut reserved_bits, mut bits) = (false, 0, 0, 56);
        for device in devices {
            let levels = device.setting("levels").clamp(2, 5);
            narrow |= levels == 2;
            memory_types |= device.flag("svpbmt", 15);
            reserved_bits |= device.flag("svrsw60t59b", 14);
            bits = device.config.settings.get("output-bits").unwrap_or(bits);
            let mode = if levels == 2 { 8 } else { levels + 5 };
            let (space, page) = (u64::from(device.space), device.root() >> 12);
            // tc: V, GADE (7), SADE (8), SXL (11); iohgatp: MODE, GSCID, PPN; ta: PSCID; fsc: MODE, PPN.
            let narrow = u64::from(levels == 2) << 11;
            let words = if self.second {
                [1 | device.flag("hardware-update", 7) | narrow, mode << 60 | space << 44 | page, 0, 0]
            } else {
                [1 | device.flag("hardware-update", 8) | narrow, 0, space << 12, mode << 60 | page]
            };
            memory.write(table + device.id * 32, &words)?;
        }
        // Version 1.0, all modes of both stages, AMO_HWAD; PAS.
        let capabilities = 0x10 | 0xf << 8 | 0xf << 16 | 1 << 24 | memory_types | reserved_bits | bits.clamp(32, 56) << 32;
        // GXL: guests of 32 bits. DDTP: one level.
        Ok(named(&[("CAPABILITIES", capabilities), ("FCTL", u64::from(narrow && self.second) << 2), ("DDTP", table >> 12 << 10 | 2)]))
    }

    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>) {
        // With an address only leaves are forgotten.
        let pages = (what.iova.length_minus_one() >> 12) + 1;
        if pages > MOST_PAGES || !what.leaf {
            return self.forget_all(device, commands);
        }
        for page in 0..pages {
            push(commands, &self.command(device, Some(what.iova.first + (page << 12))));
        }
    }

    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>) {
        push(commands, &self.command(device, None));
    }

    /// IOFENCE.C.
    fn wait(&self, commands: &mut Vec<u8>) {
        push(commands, &[2, 0]);
    }

    /// Section 3.2: CAUSE 11:0, TTYP 39:34 (2 reads, 3 writes), DID 63:40; iotval.
    fn event(&self, record: &[u8]) -> Option<Refused> {
        let [first, _, address, _] = words(record)?;
        let kind = first >> 34 & 0x3f;
        let is_of_tables = matches!(first & 0xfff, 5 | 7 | 13 | 15 | 21 | 23);
        (is_of_tables && matches!(kind, 2 | 3)).then_some(Refused { id: first >> 40, iova: address, write: Some(kind == 3) })
    }

    fn record_bytes(&self) -> Option<u64> {
        Some(32)
    }
}
