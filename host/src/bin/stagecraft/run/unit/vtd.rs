//! Intel VT-d: D51397 chapters 6 (invalidation descriptors), 9 (structures) and 11 (registers, fault records).

use anyhow::Result;

use super::{Architecture, Described, Forget, Memory, Refused, blocks, named, push, words};

/// Legacy mode has second-stage tables, scalable mode here first-stage ones.
#[derive(Debug)]
pub struct Vtd {
    /// Scalable mode.
    pub scalable: bool,
}

impl Vtd {
    /// A descriptor: of 128 bits in legacy mode, and of 256 in scalable mode.
    fn push(&self, commands: &mut Vec<u8>, low: u64, high: u64) {
        push(commands, &[low, high]);
        if self.scalable {
            push(commands, &[0, 0]);
        }
    }

    /// Address bits of second-stage tables.
    fn width(device: &Described) -> u64 {
        match device.setting("levels") {
            3 => 39,
            5 => 57,
            _ => 48,
        }
    }
}

impl Architecture for Vtd {
    fn kind(&self) -> &'static str {
        "intel-vtd"
    }

    fn set_up(&self, memory: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>> {
        // All devices are on the first bus: one root entry, and in it, of scalable mode, the lower half of the devices.
        let (root, contexts) = (memory.take(4096)?, memory.take(4096)?);
        memory.write(root, &[contexts | 1, 0])?;
        let mut width = 39;
        for device in devices {
            width = width.max(Self::width(device));
            if self.scalable {
                let (directory, table) = (memory.take(4096)?, memory.take(4096)?);
                // Section 9.6: P, PGTT 1 (8:6); DID 15:0; SRE 0, FSPM 3:2, WPE 4, EAFE 7.
                let flags = device.flag("supervisor", 0) | device.flag("write-protect", 4) | device.flag("extended-access", 7);
                let levels = device.setting("levels").clamp(4, 5);
                memory.write(table, &[1 | 1 << 6, device.space.into(), device.root() | (levels - 4) << 2 | flags, 0, 0, 0, 0, 0])?;
                memory.write(directory, &[table | 1])?;
                // Section 9.4: P, PDTS 0; RID_PASID 0.
                memory.write(contexts + device.id * 32, &[directory | 1, 0, 0, 0])?;
            } else {
                // Section 9.3: P, TT 0; AW 2:0, DID 23:8.
                let levels = device.setting("levels").clamp(3, 5);
                let width = levels - 2;
                memory.write(contexts + device.id * 16, &[device.root() | 1, width | u64::from(device.space) << 8])?;
            }
        }
        let snoop = u64::from(devices.iter().any(|device| device.setting("snoop-control") != 0)) << 7;
        // CAP: ND 6, SAGAW 3 to 5 levels, MGAW, SSLPS, FS1GP, FS5LP. ECAP: QI, PT, SC, NEST, SRS, EAFS, SMTS, SSTS, FSTS, SMPWCS.
        let guest_bits = if self.scalable { 48 } else { width };
        let cap = 6 | 0b1110 << 8 | (guest_bits - 1) << 16 | 3 << 34 | 1 << 56 | 1 << 60;
        let scalable = if self.scalable { 1 << 26 | 1 << 31 | 1 << 34 | 1 << 43 | 1 << 46 | 1 << 47 | 1 << 48 } else { 0 };
        Ok(named(&[
            ("VER", 0x10),
            ("CAP", cap),
            ("ECAP", 1 << 1 | 1 << 6 | snoop | scalable),
            // TES, RTPS.
            ("GSTS", 1 << 31 | 1 << 30),
            ("RTADDR", root | u64::from(self.scalable) << 10),
            ("IQA", u64::from(self.scalable) << 11),
        ]))
    }

    /// IOTLB and PASID-based IOTLB invalidation, page-selective: sections 6.5.2.3 and 6.5.2.4.
    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>) {
        let kind = if self.scalable { 6 } else { 2 };
        for (address, log2) in blocks(what.iova) {
            self.push(commands, kind | 3 << 4 | u64::from(device.space) << 16, address | u64::from(log2) | u64::from(what.leaf) << 6);
        }
    }

    /// The same, domain-selective or PASID-selective.
    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>) {
        let kind = if self.scalable { 6 } else { 2 };
        self.push(commands, kind | 2 << 4 | u64::from(device.space) << 16, 0);
    }

    /// Invalidation wait.
    fn wait(&self, commands: &mut Vec<u8>) {
        self.push(commands, 5, 0);
    }

    /// Section 11.4.14: F 63, T1 62 (not a write), source id 15:0 of the second word.
    fn event(&self, record: &[u8]) -> Option<Refused> {
        let [address, second] = words(record)?;
        (second >> 63 == 1).then_some(Refused { id: second & 0xffff, iova: address, write: Some(second >> 62 & 1 == 0) })
    }

    fn record_bytes(&self) -> Option<u64> {
        Some(16)
    }
}
