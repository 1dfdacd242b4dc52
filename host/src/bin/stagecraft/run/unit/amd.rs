//! AMD-Vi: 48882 chapters 2 (structures, commands, events) and 3 (registers).

use anyhow::Result;

use super::{Architecture, Described, Forget, Memory, Refused, blocks, named, push, words};

/// Devices with host tables, or with guest tables for requests without PASID.
#[derive(Debug)]
pub struct Amd {
    /// Guest tables.
    pub guest: bool,
}

/// Bytes of a device table entry, and how many there are.
const ENTRY: u64 = 32;
const ENTRIES: u64 = 128;

impl Amd {
    /// INVALIDATE_IOMMU_PAGES, section 2.4.3: domain 47:32, PASID 19:0 with GN (bit 2). S (bit 0) with ones below the size's bit; PDE (bit 1) is for tables as well.
    fn pages(&self, device: &Described, address: u64, pages_log2: u32, leaf: bool, commands: &mut Vec<u8>) {
        let sized = match pages_log2 {
            0 => address,
            log2 => address | ((1 << (log2 - 1)) - 1) << 12 | 1,
        };
        push(commands, &[3 << 60 | u64::from(device.space) << 32, sized | u64::from(!leaf) << 1 | u64::from(self.guest) << 2]);
    }
}

impl Architecture for Amd {
    fn kind(&self) -> &'static str {
        "amd-vi"
    }

    fn set_up(&self, memory: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>> {
        let table = memory.take(ENTRY * ENTRIES)?;
        for device in devices {
            let domain = u64::from(device.space);
            // V, TV, IR, IW.
            let valid = 3 | 3 << 61;
            let words = if self.guest {
                // One level of guest CR3 table, of which PASID 0 alone has an entry. Its address is in three parts.
                let contexts = memory.take(4096)?;
                memory.write(contexts, &[device.root() | 1])?;
                let low = valid | 1 << 54 | 1 << 55 | (contexts >> 12 & 7) << 58;
                let high = domain | (contexts >> 15 & 0xffff) << 16 | (contexts >> 31) << 43;
                [low, high, (device.setting("levels").clamp(4, 5) - 4) << 54, 0]
            } else {
                [valid | device.setting("levels").clamp(1, 6) << 9 | device.root(), domain, 0, 0]
            };
            memory.write(table + device.id * ENTRY, &words)?;
        }
        // The size is in pages, minus one. CONTROL: IommuEn, CmdBufEn, EventLogEn, GTEn. EFR: no NXSup, GTSup, HATS and GATS as wide as can be.
        let control = 1 | 1 << 12 | 1 << 2 | u64::from(self.guest) << 16;
        Ok(named(&[
            ("DEVTAB_BASE", table | (ENTRY * ENTRIES / 4096 - 1)),
            ("CONTROL", control),
            ("EXT_FEATURES", 1 << 48 | 1 << 4 | 2 << 10 | 1 << 12),
        ]))
    }

    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>) {
        for (address, log2) in blocks(what.iova) {
            self.pages(device, address, log2, what.leaf, commands);
        }
    }

    /// All of the address space: all ones up to bit 62.
    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>) {
        push(commands, &[3 << 60 | u64::from(device.space) << 32, 0x7fff_ffff_ffff_f000 | 3 | u64::from(self.guest) << 2]);
    }

    /// COMPLETION_WAIT.
    fn wait(&self, commands: &mut Vec<u8>) {
        push(commands, &[1 << 60, 0]);
    }

    /// IO_PAGE_FAULT, section 2.5.3: DeviceID 15:0; RW (53) means something with PR (52).
    fn event(&self, record: &[u8]) -> Option<Refused> {
        let [first, address] = words(record)?;
        let write = (first >> 52 & 1 == 1).then_some(first >> 53 & 1 == 1);
        (first >> 60 == 2).then_some(Refused { id: first & 0xffff, iova: address, write })
    }

    fn record_bytes(&self) -> Option<u64> {
        Some(16)
    }
}
