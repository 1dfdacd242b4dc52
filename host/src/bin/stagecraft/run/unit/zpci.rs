//! s390's zPCI: functions with anchors of tables, and the instruction RPCIT, which stands for a queue.

use anyhow::{Result, bail};
use stagecraft::Span;

use super::{Architecture, Described, Forget, Memory, Refused};

/// Functions.
#[derive(Debug)]
pub struct Zpci;

impl Zpci {
    /// RPCIT as operands: function, address and length, big-endian.
    fn refresh(device: &Described, span: Span, commands: &mut Vec<u8>) {
        let words = [device.id, span.first, span.length_minus_one().wrapping_add(1)];
        commands.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    }

    /// The addresses of a function.
    fn range(device: &Described) -> Span {
        let first = device.setting("first-iova");
        let held = device.geometry.roots.first().map_or(u64::MAX, |root| root.last);
        Span { first, last: device.config.settings.get("last-iova").unwrap_or(u64::MAX).min(held) }
    }
}

impl Architecture for Zpci {
    fn kind(&self) -> &'static str {
        "s390-zpci"
    }

    fn set_up(&self, _: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>> {
        let mut registers = Vec::new();
        for device in devices {
            // Bit 11 enables translation; bits 4:2 say which table it is: a page table, a segment table, or region-third to region-first; bit 9 protects.
            let designation = match device.config.settings.get("levels").unwrap_or(3) {
                1 => 7,
                levels @ 2..=5 => levels - 2,
                levels => bail!("levels = {levels}: no table of a function has so many"),
            };
            let range = Self::range(device);
            let anchor = device.root() | 1 << 11 | designation << 2 | device.flag("read-only", 9);
            for (name, value) in [("IOTA", anchor), ("BASE", range.first), ("LIMIT", range.last)] {
                registers.push((format!("{name}_{:x}", device.id), value));
            }
        }
        Ok(registers)
    }

    fn has_queue(&self) -> bool {
        false
    }

    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>) {
        Self::refresh(device, what.iova, commands);
    }

    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>) {
        let range = Self::range(device);
        // A length that is a number of bytes cannot say all 64 bits of addresses.
        let last = if range.first == 0 { range.last.min(u64::MAX - 0x1000) } else { range.last };
        Self::refresh(device, Span { first: range.first, last }, commands);
    }

    /// The instruction is over when it is over.
    fn wait(&self, _: &mut Vec<u8>) {}

    /// Absent entries may be cached as such.
    fn announces_maps(&self) -> bool {
        true
    }

    /// An error event names a handle, which only the hypervisor gives out: no plugin makes one.
    fn event(&self, _: &[u8]) -> Option<Refused> {
        None
    }

    fn record_bytes(&self) -> Option<u64> {
        None
    }
}
