//! From registers to tables: device directory and device contexts, process directory and process contexts (IOMMU chapter 2).
//!
//! A request that hardware would refuse is blocked with the cause that a fault record would have (IOMMU section 3.2). Only untranslated requests are
//! looked at. What no register says is taken to be as the structures in memory have it: whether `fctl.GXL` can be written, and how wide
//! quality-of-service ids are.

use stagecraft_sdk::bits::{Field, words};
use stagecraft_sdk::{
    Attributes, Binding, BlockKind, Blocked, BlockedDma, Command, Direct, Error, Event, EventRecord, FaultKind, Format, GuestMemory, Intercept,
    Offer, Outcome, PageRequest, PlaceToBind, Registers, Requester, Structure, TableConfig, Tag, Translated, Unit, Window,
};

use crate::entries::WIDEST_OUTPUT;
use crate::first_stage::FirstStage;
use crate::second_stage::{NARROW, SecondStage};
use crate::spec::registers::{capabilities, ddtp, fctl};
use crate::spec::structures::{atp, device, pointer, process, ta, tc};
use crate::{kernel, queue};

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct RiscvIommu;

/// Most process ids that [`Unit::pasids`] answers.
const MOST_PASIDS: usize = 1024;
/// Most tables of process contexts that [`Unit::pasids`] reads.
const MOST_PROCESS_TABLES: u32 = 1024;
const PAGE: u64 = 4096;
/// Physical addresses have at least so many bits.
const NARROWEST_OUTPUT: u64 = 32;

/// A cause of a fault record: its number, and what the specification calls it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Cause(u16, &'static str);

const GUEST_PAGE_FAULT: Cause = Cause(21, "Read guest-page fault");
const ALL_DISALLOWED: Cause = Cause(256, "All inbound transactions disallowed");
const DDT_LOAD: Cause = Cause(257, "DDT entry load access fault");
const DDT_INVALID: Cause = Cause(258, "DDT entry not valid");
const DDT_MISCONFIGURED: Cause = Cause(259, "DDT entry misconfigured");
const TYPE_DISALLOWED: Cause = Cause(260, "Transaction type disallowed");
const PDT_LOAD: Cause = Cause(265, "PDT entry load access fault");
const PDT_INVALID: Cause = Cause(266, "PDT entry not valid");
const PDT_MISCONFIGURED: Cause = Cause(267, "PDT entry misconfigured");

/// All of them, for fault records.
const CAUSES: [Cause; 9] =
    [GUEST_PAGE_FAULT, ALL_DISALLOWED, DDT_LOAD, DDT_INVALID, DDT_MISCONFIGURED, TYPE_DISALLOWED, PDT_LOAD, PDT_INVALID, PDT_MISCONFIGURED];

fn fault(Cause(number, name): Cause, reason: &str) -> Blocked {
    Blocked::refused(name, &format!("RISC-V IOMMU 1.0 section 3.2, cause {number}"), reason)
}

/// `Err` if the condition holds, because nothing was set up for the requester.
fn unused_if(condition: bool, cause: Cause, reason: &str) -> Result<(), Blocked> {
    if condition { Err(Blocked { kind: BlockKind::Unused, ..fault(cause, reason) }) } else { Ok(()) }
}

/// `Err` if one of `words` is not zero: what is wrong with each word of the structure that was read last.
fn unless_zero(words: &[u64], cause: Cause, reason: &str) -> Result<(), Blocked> {
    if words.iter().any(|word| *word != 0) { Err(fault(cause, reason).at_first(words)) } else { Ok(()) }
}

/// `bits` if the condition holds.
const fn when(condition: bool, bits: u64) -> u64 {
    if condition { bits } else { 0 }
}

/// A page number as an address.
const fn page(number: u64) -> u64 {
    number << 12
}

/// The supported levels of a mode: `first` is a stage's lowest encoding, each further one has one level more.
fn supported(capabilities: u64, mode: u64, levels: &[(Field, u64)]) -> Option<u64> {
    let (field, levels) = levels.get(usize::try_from(mode.checked_sub(atp::FEWEST_LEVELS)?).ok()?)?;
    (field.of(capabilities) == 1).then_some(*levels)
}

/// A unit that has a device directory.
struct Hardware {
    capabilities: u64,
    big_endian: bool,
    narrow_guests: bool,
    output_bits: u64,
    directory: u64,
    directory_levels: u32,
}

/// What the unit does with all requests alike, or how it looks them up.
enum Mode {
    Off,
    Bare,
    Directory(Hardware),
}

/// A device context, checked.
struct Device {
    tc: u64,
    ta: u64,
    fsc: u64,
    /// The guest's id, if there is a second stage.
    guest: Option<u32>,
    second: Option<TableConfig>,
    /// MSI page table: its address, mask and pattern.
    msi: Option<[u64; 3]>,
}

impl Device {
    fn has(&self, bit: u64) -> bool {
        self.tc & bit != 0
    }

    /// What goes to the MSI page table: guest-physical addresses of interrupt files, IOMMU section 2.1.3.6. They are compared before the second stage.
    fn intercept(&self, passed: u8) -> Option<Intercept> {
        let [root, mask, pattern] = self.msi?;
        let mask = !page(mask) & !(PAGE - 1);
        Some(Intercept {
            passed,
            mask,
            value: page(pattern) & mask,
            server: "MSI page table".to_owned(),
            address: Some(root),
            section: "RISC-V IOMMU 1.0 section 2.1.3.6".to_owned(),
        })
    }

    /// What a request gets that the first stage, with the id of its address space, translates.
    fn outcome(self, first: Option<(TableConfig, u32)>) -> Outcome {
        let intercepts: Vec<Intercept> = self.intercept(u8::from(first.is_some())).into_iter().collect();
        let (first, space) = first.unzip();
        let tables: Vec<TableConfig> = first.into_iter().chain(self.second).collect();
        if !tables.is_empty() {
            return Outcome::Tables(Translated { tables, intercepts, tag: Tag { domain: self.guest, space } });
        }
        if intercepts.is_empty() {
            return Outcome::Bypass;
        }
        let attributes = Attributes { read: true, write: true, execute: true, coherent: true, ..Attributes::default() };
        Outcome::Direct(Direct { windows: vec![Window { first: 0, last: u64::MAX, address: 0, attributes }], intercepts })
    }

    /// Levels of the process directory; none if there is no such directory.
    fn process_levels(&self) -> Option<u32> {
        let mode = atp::MODE.of(self.fsc);
        (self.has(tc::PDTV) && mode != atp::BARE).then_some(mode as u32)
    }

    /// A part of the process directory, which is behind the second stage and has a byte order of its own.
    fn read(&self, memory: &mut dyn GuestMemory, address: u64, bytes: u64) -> Result<Vec<u64>, Error> {
        let bytes = match &self.second {
            Some(table) => memory.read_through(table, address, bytes as u32),
            None => memory.read(address, bytes as u32),
        }?;
        Ok(in_order(&bytes, self.has(tc::SBE)))
    }

    /// Whether the second stage refused to have an entry of the first one's table marked: it can be read there.
    fn refuses_mark(&self, event: &Event, memory: &mut dyn GuestMemory) -> bool {
        let refused = self.second.as_ref().zip(event.intermediate).filter(|_| event.fault == FaultKind::Permission && event.name.is_none());
        refused.is_some_and(|(table, address)| memory.read_through(table, address & !7, 8).is_ok())
    }

    /// The same with the fault that hardware would report.
    fn read_or_fault<const N: usize>(&self, memory: &mut dyn GuestMemory, address: u64, what: &str) -> Result<[u64; N], Blocked> {
        let cause = if self.second.is_some() { GUEST_PAGE_FAULT } else { PDT_LOAD };
        let failed = || fault(cause, &format!("the {what} at {address:#x} cannot be read"));
        self.read(memory, address, 8 * N as u64).map_err(|_| failed())?.try_into().map_err(|_| failed())
    }

    /// Word 0 and word 1 of the context of a process, IOMMU section 2.3.2.
    fn process(&self, levels: u32, id: u64, memory: &mut dyn GuestMemory) -> Result<[u64; 2], Blocked> {
        let index = [id & 0xff, id >> 8 & 0x1ff, id >> 17];
        let mut table = page(atp::PPN.of(self.fsc));
        for level in (1..levels as usize).rev() {
            let [entry] = self.read_or_fault(memory, table + index[level] * pointer::BYTES, "process directory entry")?;
            unused_if(entry & pointer::V == 0, PDT_INVALID, "the process directory entry is not valid")?;
            unless_zero(&[entry & pointer::RESERVED], PDT_MISCONFIGURED, "the process directory entry has a reserved bit")?;
            table = page(pointer::PPN.of(entry));
        }
        let address = table + index[0] * process::BYTES;
        let context: [u64; 2] = self.read_or_fault(memory, address, "process context")?;
        unused_if(context[0] & process::V == 0, PDT_INVALID, "the process context is not valid")?;
        unless_zero(&[context[0] & process::RESERVED], PDT_MISCONFIGURED, "the process context has a reserved bit")?;
        if atp::MODE.of(context[1]) == atp::BARE {
            let reason = "the process context has a root without a first stage (fsc)";
            Structure::new(memory, address, "RISC-V IOMMU 1.0 section 2.2.3").warn(1, atp::PPN.in_place(context[1]), reason);
        }
        Ok(context)
    }
}

/// Page numbers, and what stands beside them, of a device context whose modes say that there is nothing: IOMMU section 2.1.3.
fn note_unused(&[tc, iohgatp, _, fsc, msiptp, msi_mask, msi_pattern, _]: &[u64; 8], address: u64, memory: &mut dyn GuestMemory) {
    let mut structure = Structure::new(memory, address, "RISC-V IOMMU 1.0 section 2.1.3");
    let unless_used = |atp, used: bool| if used { 0 } else { atp };
    structure
        .warn(1, unless_used(iohgatp, atp::MODE.of(iohgatp) != atp::BARE), "the device context has a root without a second stage (iohgatp)")
        .warn(3, unless_used(fsc, tc & tc::PDTV != 0 || atp::MODE.of(fsc) != atp::BARE), "the device context has a root without a first stage (fsc)")
        .warn(
            3,
            unless_used(fsc, tc & tc::PDTV == 0 || atp::MODE.of(fsc) != atp::BARE),
            "the device context has the address of a process directory without one",
        )
        .warn(
            4,
            unless_used(msiptp, atp::MODE.of(msiptp) != atp::BARE),
            "the device context has the address of an MSI page table without one (msiptp)",
        )
        .warn(5, unless_used(msi_mask, atp::MODE.of(msiptp) != atp::BARE), "the device context has a mask of MSI pages without an MSI page table")
        .warn(
            6,
            unless_used(msi_pattern, atp::MODE.of(msiptp) != atp::BARE),
            "the device context has a pattern of MSI pages without an MSI page table",
        );
}

/// 64-bit words of a structure in guest memory.
fn in_order(bytes: &[u8], big_endian: bool) -> Vec<u64> {
    let mut words = words(bytes);
    if big_endian {
        words.iter_mut().for_each(|word| *word = word.swap_bytes());
    }
    words
}

impl Mode {
    fn new(registers: &Registers) -> Result<Self, Error> {
        let (capabilities, fctl, ddtp) = (registers.need("CAPABILITIES")?, registers.need("FCTL")?, registers.need("DDTP")?);
        let mode = ddtp::MODE.of(ddtp);
        match mode {
            ddtp::OFF => return Ok(Self::Off),
            ddtp::BARE => return Ok(Self::Bare),
            _ if mode <= ddtp::THREE_LEVELS => {}
            _ => return Err(Error::invalid("DDTP", ddtp, "RISC-V IOMMU 1.0 section 5.5", "this mode is reserved")),
        }
        let output_bits = capabilities::PAS.of(capabilities);
        if output_bits < NARROWEST_OUTPUT {
            return Err(Error::invalid(
                "CAPABILITIES",
                capabilities,
                "RISC-V IOMMU 1.0 section 5.3",
                "physical addresses (PAS) have 32 bits at least",
            ));
        }
        Ok(Self::Directory(Hardware {
            capabilities,
            big_endian: fctl::BE.of(fctl) == 1,
            narrow_guests: fctl::GXL.of(fctl) == 1,
            output_bits: output_bits.min(WIDEST_OUTPUT),
            directory: page(ddtp::PPN.of(ddtp)),
            directory_levels: (mode - ddtp::BARE) as u32,
        }))
    }
}

impl Hardware {
    fn has(&self, capability: Field) -> bool {
        capability.of(self.capabilities) == 1
    }

    /// Levels of a second stage with this mode; none if the unit has no such mode.
    fn second_levels(&self, mode: u64) -> Option<u64> {
        let wide = [(capabilities::SV39X4, 3), (capabilities::SV48X4, 4), (capabilities::SV57X4, 5)];
        let narrow = [(capabilities::SV32X4, 2)];
        supported(self.capabilities, mode, if self.narrow_guests { &narrow } else { &wide })
    }

    /// The same of a first stage.
    fn first_levels(&self, mode: u64, narrow_supervisor: bool) -> Option<u64> {
        let wide = [(capabilities::SV39, 3), (capabilities::SV48, 4), (capabilities::SV57, 5)];
        let narrow = [(capabilities::SV32, 2)];
        supported(self.capabilities, mode, if narrow_supervisor { &narrow } else { &wide })
    }

    /// A configuration with the settings that both stages have.
    fn table(&self, format: &str, levels: u64, root: u64, output_bits: u64, hardware_update: bool, big_endian: bool) -> TableConfig {
        let mut table = TableConfig::new(format, &[("levels", levels), ("root", root)]);
        let wide = levels > 2;
        let mut set = |name, value, default| {
            if value != default {
                table.settings.set(name, value);
            }
        };
        set("output-bits", output_bits, WIDEST_OUTPUT);
        set("svnapot", u64::from(wide), 0);
        set("svpbmt", u64::from(wide && self.has(capabilities::SVPBMT)), 0);
        set("svrsw60t59b", u64::from(wide && self.has(capabilities::SVRSW60T59B)), 0);
        set("hardware-update", u64::from(hardware_update), 0);
        set("big-endian", u64::from(big_endian), 0);
        table
    }

    /// The context of a device, IOMMU section 2.3.1.
    fn device(&self, id: u64, memory: &mut dyn GuestMemory) -> Result<Device, Blocked> {
        let extended = self.has(capabilities::MSI_FLAT);
        let (leaf_bits, bytes) = if extended { (6, device::EXTENDED_BYTES) } else { (7, device::BYTES) };
        let too_wide = id >> (leaf_bits + 9 * (self.directory_levels - 1)) != 0;
        unused_if(too_wide, TYPE_DISALLOWED, "the device id is wider than the levels of the device directory can look up")?;
        let index = [id & ((1 << leaf_bits) - 1), id >> leaf_bits & 0x1ff, id >> (leaf_bits + 9)];
        let mut read = |address: u64, bytes: u64, what: &str| {
            let failed = || fault(DDT_LOAD, &format!("the {what} at {address:#x} cannot be read"));
            let words = in_order(&memory.read(address, bytes as u32).map_err(|_| failed())?, self.big_endian);
            if words.len() as u64 * 8 == bytes { Ok(words) } else { Err(failed()) }
        };
        let mut table = self.directory;
        for level in (1..self.directory_levels as usize).rev() {
            let words = read(table + index[level] * pointer::BYTES, pointer::BYTES, "device directory entry")?;
            unused_if(words[0] & pointer::V == 0, DDT_INVALID, "the device directory entry is not valid")?;
            unless_zero(&[words[0] & pointer::RESERVED], DDT_MISCONFIGURED, "the device directory entry has a reserved bit")?;
            table = page(pointer::PPN.of(words[0]));
        }
        let address = table + index[0] * bytes;
        let mut context = read(address, bytes, "device context")?;
        context.resize(8, 0);
        let context = context.try_into().unwrap_or_default();
        self.check_device(&context)?;
        let checked = self.check_modes(&context)?;
        note_unused(&context, address, memory);
        Ok(checked)
    }

    /// Reserved bits and bits that contradict each other or the unit's capabilities, IOMMU section 2.1.4. The base format's missing words are zero.
    fn check_device(&self, &[tc, iohgatp, ta, _, msiptp, msi_mask, msi_pattern, last]: &[u64; 8]) -> Result<(), Blocked> {
        let has = |bit| tc & bit != 0;
        let wrong = |words: &[u64], reason| unless_zero(words, DDT_MISCONFIGURED, reason);
        let wrong_tc = |condition, bits, reason| wrong(&[when(condition, bits)], reason);
        unused_if(!has(tc::V), DDT_INVALID, "the device context is not valid")?;
        wrong(&[tc & tc::RESERVED], "the device context has a reserved bit (tc)")?;
        let qos = if self.has(capabilities::QOSID) { 0 } else { ta::QOS };
        wrong(&[0, 0, ta & (ta::RESERVED | qos)], "the device context has a reserved bit (ta)")?;
        let msi_reserved = [0, 0, 0, 0, msiptp & atp::RESERVED, msi_mask & !device::MSI_PAGE, msi_pattern & !device::MSI_PAGE, last];
        wrong(&msi_reserved, "the device context has a reserved bit (MSI)")?;
        wrong(&[0, 0, 0, 0, when(atp::MODE.of(msiptp) > atp::FLAT, atp::MODE.mask())], "the MSI page table has a reserved mode")?;
        let services = has(tc::EN_ATS) || has(tc::EN_PRI) || has(tc::PRPR);
        wrong_tc(services && !self.has(capabilities::ATS), tc & (tc::EN_ATS | tc::EN_PRI | tc::PRPR), "the unit has no translation services (ATS)")?;
        wrong_tc(
            has(tc::EN_PRI) && !has(tc::EN_ATS),
            tc::EN_PRI | tc::EN_ATS,
            "page requests (EN_PRI) are enabled without translation services (EN_ATS)",
        )?;
        wrong_tc(
            has(tc::PRPR) && !has(tc::EN_PRI),
            tc::PRPR | tc::EN_PRI,
            "responses to page requests (PRPR) are configured without page requests (EN_PRI)",
        )?;
        if has(tc::T2GPA) {
            wrong_tc(!self.has(capabilities::T2GPA), tc::T2GPA, "the unit's translation services do not answer guest-physical addresses (T2GPA)")?;
            wrong_tc(!has(tc::EN_ATS), tc::T2GPA | tc::EN_ATS, "guest-physical answers (T2GPA) are enabled without translation services (EN_ATS)")?;
            wrong_tc(atp::MODE.of(iohgatp) == atp::BARE, tc::T2GPA, "guest-physical answers (T2GPA) are enabled without a second stage")?;
        }
        wrong_tc(has(tc::DPE) && !has(tc::PDTV), tc::DPE | tc::PDTV, "a default process (DPE) is enabled without a process directory (PDTV)")?;
        let updates = has(tc::SADE) || has(tc::GADE);
        wrong_tc(
            updates && !self.has(capabilities::AMO_HWAD),
            tc & (tc::SADE | tc::GADE),
            "the unit does not set accessed and dirty bits (SADE, GADE)",
        )?;
        let other_order = has(tc::SBE) != self.big_endian;
        wrong_tc(other_order && !self.has(capabilities::END), tc::SBE, "the unit has only one byte order, and SBE asks for the other")?;
        wrong_tc(self.narrow_guests && !has(tc::SXL), tc::SXL, "guests have 32 bits (GXL), and their supervisors do not (SXL)")
    }

    /// The modes of the two stages and of the process directory, IOMMU section 2.1.4.
    fn check_modes(&self, &[tc, iohgatp, ta, fsc, msiptp, msi_mask, msi_pattern, _]: &[u64; 8]) -> Result<Device, Blocked> {
        let wrong = |words: &[u64], reason| unless_zero(words, DDT_MISCONFIGURED, reason);
        let mut second = None;
        let mode = atp::MODE.of(iohgatp);
        if mode != atp::BARE {
            let no_mode = || fault(DDT_MISCONFIGURED, "the unit does not have this mode of the second stage").at(1, atp::MODE.mask());
            let levels = self.second_levels(mode).ok_or_else(no_mode)?;
            let root = page(atp::PPN.of(iohgatp));
            wrong(&[0, when(root & 0x3fff != 0, atp::PPN.mask())], "the second stage's root table is not aligned to 16 KiB")?;
            wrong(
                &[0, when(root >> self.output_bits != 0, atp::PPN.mask())],
                "the second stage's root table has more address bits than the unit (PAS)",
            )?;
            let mut table = self.table(SecondStage::NAME, levels, root, self.output_bits, tc & tc::GADE != 0, self.big_endian);
            if tc & tc::SXL != 0 && levels > 2 {
                table.settings.set("input-bits", NARROW);
            }
            second = Some(table);
        }
        wrong(&[0, 0, 0, fsc & atp::RESERVED], "the device context has a reserved bit (fsc)")?;
        if tc & tc::PDTV == 0 {
            self.check_first(fsc, tc, second.is_some(), DDT_MISCONFIGURED)?;
        } else {
            let has = [true, self.has(capabilities::PD8), self.has(capabilities::PD17), self.has(capabilities::PD20)];
            let mode = atp::MODE.of(fsc);
            wrong(
                &[0, 0, 0, when(mode > atp::THREE_LEVELS || !has[(mode & 3) as usize], atp::MODE.mask())],
                "the unit does not have this mode of the process directory",
            )?;
        }
        let msi = (atp::MODE.of(msiptp) == atp::FLAT).then_some([page(atp::PPN.of(msiptp)), msi_mask, msi_pattern]);
        let guest = second.is_some().then(|| atp::GSCID.of(iohgatp) as u32);
        Ok(Device { tc, ta, fsc, guest, second, msi })
    }

    /// Levels of the first stage; none if it is Bare.
    fn check_first(&self, fsc: u64, tc: u64, behind_second: bool, cause: Cause) -> Result<Option<u64>, Blocked> {
        // A device context has it in word 3, a process context in word 1.
        let wrong = |bits: u64, reason| {
            if cause == PDT_MISCONFIGURED { unless_zero(&[0, bits], cause, reason) } else { unless_zero(&[0, 0, 0, bits], cause, reason) }
        };
        wrong(fsc & atp::RESERVED, "the context has a reserved bit (fsc)")?;
        let mode = atp::MODE.of(fsc);
        if mode == atp::BARE {
            return Ok(None);
        }
        let levels = self.first_levels(mode, tc & tc::SXL != 0);
        wrong(when(levels.is_none(), atp::MODE.mask()), "the unit does not have this mode of the first stage")?;
        let beyond = !behind_second && page(atp::PPN.of(fsc)) >> self.output_bits != 0;
        wrong(when(beyond, atp::PPN.mask()), "the first stage's root table has more address bits than the unit (PAS)")?;
        Ok(levels)
    }

    /// IOMMU section 2.3.
    fn lookup(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Blocked> {
        let device = self.device(requester.id, memory)?;
        let refused = requester.pasid.is_some() && !device.has(tc::PDTV);
        unused_if(refused, TYPE_DISALLOWED, "the request has a process id, and the device context no process directory (PDTV)")?;
        let process_id = match requester.pasid {
            Some(id) => Some(u64::from(id)),
            None => device.has(tc::DPE).then_some(0),
        };
        let mut first = None;
        let mut space = ta::PSCID.of(device.ta) as u32;
        if !device.has(tc::PDTV) {
            first = self.first_stage(&device, device.fsc, DDT_MISCONFIGURED)?;
        } else if let (Some(id), Some(levels)) = (process_id, device.process_levels()) {
            let widths = [8, 17, 20];
            let too_wide = id >> widths[(levels as usize - 1).min(2)] != 0;
            unused_if(too_wide, TYPE_DISALLOWED, "the process id is wider than the levels of the process directory can look up")?;
            let [attributes, fsc] = device.process(levels, id, memory)?;
            first = self.first_stage(&device, fsc, PDT_MISCONFIGURED)?;
            space = ta::PSCID.of(attributes) as u32;
            // Only a request with a process id can ask for supervisor privilege.
            if let Some(table) = &mut first
                && requester.pasid.is_some()
                && attributes & process::ENS != 0
            {
                table.settings.set("supervisor", 1);
                if attributes & process::SUM != 0 {
                    table.settings.set("sum", 1);
                }
            }
        }
        let first = first.map(|table| (table, space));
        Ok(device.outcome(first))
    }

    fn first_stage(&self, device: &Device, fsc: u64, cause: Cause) -> Result<Option<TableConfig>, Blocked> {
        let Some(levels) = self.check_first(fsc, device.tc, device.second.is_some(), cause)? else { return Ok(None) };
        // Guest-physical addresses are as wide as page numbers; the second stage refuses those that it does not take.
        let output_bits = if device.second.is_some() { WIDEST_OUTPUT } else { self.output_bits };
        let root = page(atp::PPN.of(fsc));
        Ok(Some(self.table(FirstStage::NAME, levels, root, output_bits, device.has(tc::SADE), device.has(tc::SBE))))
    }

    /// See [`Unit::pasids`].
    fn pasids(&self, id: u64, memory: &mut dyn GuestMemory) -> Vec<u32> {
        let mut search = Search { found: Vec::new(), tables_left: MOST_PROCESS_TABLES };
        let Ok(device) = self.device(id, memory) else { return Vec::new() };
        let Some(levels) = device.process_levels() else { return Vec::new() };
        search.table(&device, levels, page(atp::PPN.of(device.fsc)), 0, memory);
        search.found
    }
}

/// A search of a process directory for valid contexts.
struct Search {
    found: Vec<u32>,
    tables_left: u32,
}

impl Search {
    /// Goes through a table that has so many levels with itself; `first` is the process id of its first entry.
    fn table(&mut self, device: &Device, levels: u32, address: u64, first: u64, memory: &mut dyn GuestMemory) {
        if levels == 1 {
            let Some(left) = self.tables_left.checked_sub(1) else { return };
            self.tables_left = left;
        }
        let bytes = if levels == 3 { 8 * pointer::BYTES } else { PAGE };
        let Ok(words) = device.read(memory, address, bytes) else { return };
        if levels == 1 {
            let contexts = words.into_iter().step_by(process::BYTES as usize / 8);
            for (id, _) in (first..).zip(contexts).filter(|(_, attributes)| attributes & process::V != 0) {
                let is_default = id == 0 && device.has(tc::DPE);
                if !is_default && self.found.len() < MOST_PASIDS {
                    self.found.push(id as u32);
                }
            }
            return;
        }
        let below = if levels == 3 { 17 } else { 8 };
        for (index, entry) in (0_u64..).zip(words) {
            let is_over = self.tables_left == 0 || self.found.len() == MOST_PASIDS;
            if !is_over && entry & pointer::V != 0 && entry & pointer::RESERVED == 0 {
                self.table(device, levels - 1, page(pointer::PPN.of(entry)), first + (index << below), memory);
            }
        }
    }
}

/// Device ids have 24 bits.
fn check_id(id: u64) -> Result<(), Error> {
    if id >> 24 == 0 { Ok(()) } else { Err(Error::invalid("id", id, "RISC-V IOMMU 1.0 chapter 2", "a device id has 24 bits")) }
}

impl Unit for RiscvIommu {
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        check_id(requester.id)?;
        let result = match Mode::new(registers)? {
            Mode::Off => unused_if(true, ALL_DISALLOWED, "the unit is off").map(|()| Outcome::Bypass),
            Mode::Bare => Ok(Outcome::Bypass),
            Mode::Directory(unit) => unit.lookup(requester, memory),
        };
        Ok(result.unwrap_or_else(Outcome::Blocked))
    }

    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        check_id(id)?;
        Ok(match Mode::new(registers)? {
            Mode::Directory(unit) => unit.pasids(id, memory),
            Mode::Off | Mode::Bare => Vec::new(),
        })
    }

    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
        kernel::offers(kind, info)
    }

    fn bind_data(table: &TableConfig, to: &PlaceToBind) -> Result<Binding, Error> {
        kernel::bind_data(table, to)
    }

    fn decode_commands(_registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        queue::decode(commands)
    }

    /// DTF, and privilege that a process does not have: sections 2.1.3.1 and 3.2.
    fn review_event(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
        if event.passes() {
            return Ok(None);
        }
        let Ok(Mode::Directory(unit)) = Mode::new(registers) else { return Ok(Some(event)) };
        let Ok(device) = unit.device(event.id, memory) else { return Ok(Some(event)) };
        let always = [ALL_DISALLOWED, DDT_LOAD, DDT_INVALID, DDT_MISCONFIGURED];
        let is_quiet = device.has(tc::DTF) && !always.iter().any(|Cause(_, name)| event.name.as_deref() == Some(name));
        if is_quiet {
            return Ok(None);
        }
        let process = event.pasid.filter(|_| event.privileged && event.name.is_none()).map(u64::from);
        if let (Some(id), Some(levels)) = (process, device.process_levels())
            && device.process(levels, id, memory).is_ok_and(|[attributes, _]| attributes & process::ENS == 0)
        {
            return Ok(Some(Event { name: Some(TYPE_DISALLOWED.1.to_owned()), ..event }));
        }
        let of_mark = event.reading_table && device.refuses_mark(&event, memory);
        // A part of the process directory that the second stage puts where there is no memory, or whose own tables cannot be read.
        let is_nowhere = event.format.is_none() || event.fault == FaultKind::Unreadable;
        let name = match event.name.as_deref() {
            Some(name) if name == GUEST_PAGE_FAULT.1 && is_nowhere => Some(PDT_LOAD.1.to_owned()),
            None if of_mark => Some(queue::REFUSED_MARK.to_owned()),
            _ => event.name.clone(),
        };
        Ok(Some(Event { name, ..event }))
    }

    fn encode_event(_registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        queue::encode(event, &CAUSES.map(|Cause(number, name)| (number, name)))
    }

    fn encode_page_request(registers: &Registers, request: &PageRequest) -> Result<EventRecord, Error> {
        queue::encode_page_request(registers, request)
    }

    fn decode_event(record: &[u8]) -> Result<Option<BlockedDma>, Error> {
        queue::decode_event(record)
    }
}
