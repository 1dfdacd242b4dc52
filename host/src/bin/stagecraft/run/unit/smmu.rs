//! Arm SMMUv3: IHI 0070 chapters 4 (commands), 5 (structures), 6 (registers) and 7 (events).

use anyhow::Result;

use super::{Architecture, Described, Forget, Memory, Refused, named, push, words};

/// Streams of tables of one stage.
#[derive(Debug)]
pub struct Smmu {
    /// Stage 2.
    pub second: bool,
}

/// Log2 of the number of streams.
const STREAMS: u64 = 6;
/// Bytes of a stream table entry.
const STE: u64 = 64;

/// Encoding of an output address size: IPS, S2PS and OAS.
fn size(bits: u64) -> u64 {
    [32, 36, 40, 42, 44, 48, 52].iter().position(|size| *size == bits).unwrap_or(5) as u64
}

/// TG0 and S2TG.
const fn granule(bytes: u64) -> u64 {
    match bytes {
        0x4000 => 2,
        0x1_0000 => 1,
        _ => 0,
    }
}

/// A setting that has a default.
fn or(value: u64, default: u64) -> u64 {
    if value == 0 { default } else { value }
}

/// Context descriptor, section 5.4: the first four words.
fn context_descriptor(device: &Described) -> [u64; 4] {
    // T0SZ 5:0, TG0 7:6, IR0 9:8, OR0 11:10, SH0 13:12, ENDI 15, EPD1 30, V 31, IPS 34:32, AFFD 35, WXN 36, TBI0 38, PAN 40, AA64 41, HD 42, HA 43, R 45, A 46, ASID 63:48.
    let shareable = if device.setting("non-shareable") == 0 { 3 << 12 } else { 0 };
    let low = (64 - or(device.setting("input-bits"), 48))
        | granule(device.setting("granule")) << 6
        | 1 << 8
        | 1 << 10
        | shareable
        | device.flag("big-endian", 15)
        | 1 << 30
        | 1 << 31
        | size(or(device.setting("output-bits"), 48)) << 32
        | device.flag("access-flag-disabled", 35)
        | device.flag("wxn", 36)
        | device.flag("tbi", 38)
        | 1 << 41
        | device.flag("hardware-dirty", 42)
        | device.flag("hardware-access", 43)
        | 1 << 45
        | 1 << 46
        | u64::from(device.space) << 48;
    // HAD0 is bit 1 of the second word, E0PD0 bit 2 and HAFT bit 3; DS is bit 58 of the third.
    let second =
        device.root() | device.flag("hierarchy-disabled", 1) | device.flag("unprivileged-disabled", 2) | device.flag("hardware-table-access", 3);
    // What Linux writes: non-cacheable, write-back, device nGnRE, inner non-cacheable outer write-back.
    let mair = device.config.settings.get("mair").unwrap_or(0xffff_ffff_f404_ff44);
    [low, second, device.flag("lpa2", 58), mair]
}

/// Words 2 and 3 of a stream table entry for stage 2, section 5.2.
fn second_stage(device: &Described) -> [u64; 2] {
    // S2VMID 15:0, S2T0SZ 37:32, S2SL0 39:38, S2IR0 41:40, S2OR0 43:42, S2SH0 45:44, S2TG 47:46, S2PS 50:48, S2AA64 51, S2ENDI 52, S2AFFD 53, S2HD 55, S2HA 56, S2R 58, S2HAFT 59.
    let bytes = or(device.setting("granule"), 4096);
    let start = device.geometry.roots.first().and_then(|root| device.geometry.levels.get(usize::from(root.level))).map_or(0, |level| level.number);
    // S2SL0 counts down from level 2 with 4 KiB, where 3 is level 3, and from level 3 with others.
    let start = match (bytes, start) {
        (4096, 3) => 3,
        (4096, level) => 2 - level,
        (_, level) => 3 - level,
    };
    let word = u64::from(device.space)
        | (64 - or(device.setting("input-bits"), 48)) << 32
        | (start.clamp(0, 3) as u64) << 38
        | 1 << 40
        | 1 << 42
        | 3 << 44
        | granule(bytes) << 46
        | size(or(device.setting("output-bits"), 48)) << 48
        | 1 << 51
        | device.flag("big-endian", 52)
        | device.flag("access-flag-disabled", 53)
        | device.flag("hardware-dirty", 55)
        | device.flag("hardware-access", 56)
        | 1 << 58
        | device.flag("hardware-table-access", 59);
    [word, device.root()]
}

impl Architecture for Smmu {
    fn kind(&self) -> &'static str {
        "arm-smmuv3"
    }

    fn set_up(&self, memory: &mut Memory, devices: &[Described]) -> Result<Vec<(String, u64)>> {
        let table = memory.take(STE << STREAMS)?;
        let (mut wide, mut lpa2) = (false, false);
        for device in devices {
            let at = table + device.id * STE;
            if self.second {
                // V; Config 0b110.
                let [vmid, root] = second_stage(device);
                memory.write(at, &[1 | 6 << 1, 1 << 44, vmid, root])?;
            } else {
                let cd = memory.take(64)?;
                memory.write(cd, &context_descriptor(device))?;
                // V; Config 0b101; one context descriptor.
                memory.write(at, &[1 | 5 << 1 | cd, 0, 0, 0])?;
            }
            wide |= device.setting("output-bits") > 48 || device.setting("input-bits") > 48 || device.setting("lpa") != 0;
            lpa2 |= device.setting("lpa2") != 0;
        }
        // IDR0: S2P, S1P, both formats, COHACC, HTTU 3, ASID16, VMID16, CD2L, no stalls, ST_LEVEL 1. IDR1: 16 StreamID bits. IDR3: HAD, RIL. IDR5: OAS 2:0, all
        // granules 6:4, DS 7, VAX 11:10. CR0: SMMUEN, event and command queues.
        let oas = if wide || lpa2 { 6 } else { 5 };
        let idr5 = oas | 7 << 4 | u64::from(lpa2) << 7 | u64::from(wide || lpa2) << 10;
        Ok(named(&[
            ("IDR0", 0x090c_109b | 3 << 6),
            ("IDR1", 16),
            ("IDR3", 1 << 2 | 1 << 10),
            ("IDR5", idr5),
            ("CR0", 0b1101),
            ("CR2", 0),
            ("STRTAB_BASE_CFG", STREAMS),
            ("STRTAB_BASE", table),
        ]))
    }

    /// CMD_TLBI_NH_VA and CMD_TLBI_S2_IPA with ranges (sections 4.4.1.1 and 4.4.2): `(NUM + 1) * 2^SCALE` granules.
    fn forget(&self, device: &Described, what: Forget, commands: &mut Vec<u8>) {
        let bytes = or(device.setting("granule"), 4096);
        let (opcode, name) = if self.second { (0x2a, u64::from(device.space) << 32) } else { (0x12, u64::from(device.space) << 48) };
        let code = [4096, 0x4000, 0x1_0000].iter().position(|size| *size == bytes).unwrap_or(0) as u64 + 1;
        let (mut at, mut left) = (what.iova.first, (what.iova.length_minus_one() / bytes) + 1);
        while left > 0 {
            let scale = u64::from(left.trailing_zeros()).min(31);
            let number = (left >> scale).min(32);
            // A single granule is a command without a range: the encoding of one is reserved without a level.
            let (range, tg) = if number << scale == 1 { (0, 0) } else { ((number - 1) << 12 | scale << 20, code << 10) };
            push(commands, &[opcode | name | range, at | tg | u64::from(what.leaf)]);
            left -= number << scale;
            at = at.wrapping_add((number << scale) * bytes);
        }
    }

    /// CMD_TLBI_NH_ASID, CMD_TLBI_S12_VMALL.
    fn forget_all(&self, device: &Described, commands: &mut Vec<u8>) {
        let space = u64::from(device.space);
        push(commands, &[if self.second { 0x28 | space << 32 } else { 0x11 | space << 48 }, 0]);
    }

    /// CMD_SYNC.
    fn wait(&self, commands: &mut Vec<u8>) {
        push(commands, &[0x46, 0]);
    }

    /// F_WALK_EABT, and F_TRANSLATION to F_PERMISSION: StreamID 63:32 of the first word, RnW bit 35 of the second; the address.
    fn event(&self, record: &[u8]) -> Option<Refused> {
        let [first, second, address, _] = words(record)?;
        matches!(first & 0xff, 0x0b | 0x10..=0x13).then_some(Refused { id: first >> 32, iova: address, write: Some(second >> 35 & 1 == 0) })
    }

    fn record_bytes(&self) -> Option<u64> {
        Some(32)
    }
}
