//! From registers to tables: root, context, PASID directory and PASID table entries (chapters 3 and 9), and the kernel's view of a real unit.
//!
//! A request that hardware would refuse is blocked with the condition code of table 30 (section 7.1.3), such as `LCT.2`. Not judged here: protected memory
//! regions (PMEN) and host permission tables, which no untranslated request meets.
//!
//! Addresses of interrupts are intercepted for requests without PASID, as section 3.15 says; requests with PASID are translated there as anywhere. So are
//! inputs of a second stage below a first: what counts is the address in the request.
//!
//! A field that the specification reserves because a capability is missing faults only where the field would have been used: Linux fills in the
//! second stage's AW of a first-stage entry on units without a second stage, and hardware goes along. In the same way Linux 5.13 to 5.17 sets SNP in
//! second-stage leaves and PGSNP in PASID entries of every unit in scalable mode, and models of units without snoop control (ECAP.SC) go along: they ask for
//! what happens anyway.

use stagecraft_sdk::bits::{mask, words};
use stagecraft_sdk::{
    Binding, BlockKind, Blocked, Command, Error, Event, EventRecord, Extent, Format, GuestMemory, Intercept, InvalidationTarget, Offer, Outcome,
    PageRequest, Place, PlaceToBind, RangeEntry, Recipe, Registers, Requester, Structure, TableConfig, Tag, Translated, Unit,
};

use crate::first_stage::FirstStage;
use crate::queue;
use crate::second_stage::{SecondStage, WIDEST, address_width};
use crate::spec::registers::{cap, ecap, gsts, rtaddr};
use crate::spec::structures::{POINTER, PRESENT, context, directory, pasid, root, scalable_context};
use crate::{DEFAULT_OUTPUT_BITS, INTERRUPTS};

/// The architecture.
#[derive(Clone, Copy, Debug)]
pub struct IntelVtd;

/// Most PASIDs that [`Unit::pasids`] answers.
const MOST_PASIDS: usize = 1024;
/// Most PASID tables that [`Unit::pasids`] reads.
const MOST_PASID_TABLES: u32 = 1024;
const PAGE: u32 = 4096;

/// `iommu_hw_info` data type, and the size of its data.
const HW_INFO_INTEL_VTD: u32 = 1;
const HW_INFO_BYTES: usize = 24;
/// `IOMMU_HW_INFO_VTD_ERRATA_772415_SPR17` of its flags.
const VTD_ERRATUM_772415: u64 = 1;
/// `iommu_hwpt_data_type`, and the flags of its data.
const HWPT_DATA_VTD_S1: u32 = 1;
/// `IOMMU_HWPT_INVALIDATE_DATA_VTD_S1`, and `IOMMU_VTD_INV_FLAGS_LEAF`.
const INVALIDATE_VTD_S1: u32 = 0;
const INVALIDATE_LEAF: u64 = 1;
const VTD_S1_SRE: u64 = 1;
const VTD_S1_EAFE: u64 = 1 << 1;
const VTD_S1_WPE: u64 = 1 << 2;

/// A fault condition of table 30: its code, the number that a fault record would have, and a sentence.
fn fault(event: &str, number: u8, reason: &str) -> Blocked {
    Blocked::refused(event, &format!("D51397 section 7.1.3, fault reason {number:X}h"), reason)
}

/// The same where nothing was set up for the requester.
fn unused(event: &str, number: u8, reason: &str) -> Blocked {
    Blocked { kind: BlockKind::Unused, ..fault(event, number, reason) }
}

/// `Err` if the condition holds.
fn unless(condition: bool, event: &str, number: u8, reason: &str) -> Result<(), Blocked> {
    if condition { Err(fault(event, number, reason)) } else { Ok(()) }
}

/// `Err` if one of `words` is not zero: what is reserved, or wrong, in each word of the structure that was read last.
fn unless_zero(words: &[u64], event: &str, number: u8, reason: &str) -> Result<(), Blocked> {
    if words.iter().any(|word| *word != 0) { Err(fault(event, number, reason).at_first(words)) } else { Ok(()) }
}

/// `bits` if the condition holds.
const fn when(condition: bool, bits: u64) -> u64 {
    if condition { bits } else { 0 }
}

/// `Err` if the condition holds, because nothing was set up.
fn unused_if(condition: bool, event: &str, number: u8, reason: &str) -> Result<(), Blocked> {
    if condition { Err(unused(event, number, reason)) } else { Ok(()) }
}

/// `N` words at `address`, read once.
fn read<const N: usize>(memory: &mut dyn GuestMemory, address: u64, event: &str, number: u8, what: &str) -> Result<[u64; N], Blocked> {
    let failed = || fault(event, number, &format!("the {what} at {address:#x} cannot be read"));
    let bytes = memory.read(address, 8 * N as u32).map_err(|_| failed())?;
    words(&bytes).try_into().map_err(|_| failed())
}

/// Addresses of interrupts, which no tables serve: section 3.15.
fn interrupts() -> Intercept {
    let (first, last) = INTERRUPTS;
    Intercept {
        passed: 0,
        mask: !(last - first),
        value: first,
        server: "interrupt controller".to_owned(),
        address: None,
        section: "D51397 section 3.15".to_owned(),
    }
}

/// A unit that translates: what it can do, and where its tables start.
pub(crate) struct Hardware {
    cap: u64,
    ecap: u64,
    pub(crate) root_table: u64,
    pub(crate) mode: u64,
    io_permissions: bool,
}

impl Hardware {
    /// The unit, or nothing if it does not translate.
    pub(crate) fn new(registers: &Registers) -> Result<Option<Self>, Error> {
        let (cap, ecap) = (registers.need("CAP")?, registers.need("ECAP")?);
        let (gsts, rtaddr) = (registers.need("GSTS")?, registers.need("RTADDR")?);
        let unit = Self {
            cap,
            ecap,
            root_table: rtaddr::RTA.in_place(rtaddr),
            mode: rtaddr::TTM.of(rtaddr),
            io_permissions: ecap::SSIRWS.of(ecap) & rtaddr::SSIRWE.of(rtaddr) == 1,
        };
        Ok((gsts::TES.of(gsts) == 1).then_some(unit))
    }

    fn has(&self, capability: stagecraft_sdk::bits::Field) -> bool {
        capability.of(self.ecap) == 1
    }

    /// Maximum guest address width.
    fn guest_bits(&self) -> u64 {
        cap::MGAW.of(self.cap) + 1
    }

    /// Host address width; see the crate's documentation.
    pub(crate) fn host_bits(&self) -> u64 {
        self.guest_bits().clamp(DEFAULT_OUTPUT_BITS, 52)
    }

    /// Pointer bits that must be zero.
    fn beyond_host(&self) -> u64 {
        mask(63, self.host_bits() as u8)
    }

    /// Whether `domain` has bits that the unit does not have.
    fn domain_is_too_wide(&self, domain: u64) -> bool {
        domain >> (4 + 2 * cap::ND.of(self.cap)).min(16) != 0
    }

    /// Levels of the second stage that the encoding `aw` stands for, if the unit has them.
    pub(crate) fn levels(&self, aw: u64) -> Option<u64> {
        ((1..=3).contains(&aw) && cap::SAGAW.of(self.cap) >> aw & 1 == 1).then_some(aw + 2)
    }

    pub(crate) fn second_stage(&self, root: u64, levels: u64, accessed_dirty: bool) -> TableConfig {
        let mut table = TableConfig::new(SecondStage::NAME, &[("levels", levels), ("root", root)]);
        let mut set = |name, value, default| {
            if value != default {
                table.settings.set(name, value);
            }
        };
        set("output-bits", self.host_bits(), DEFAULT_OUTPUT_BITS);
        let limit = self.guest_bits().max(12);
        set("input-bits", if limit < address_width(levels) { limit } else { WIDEST }, WIDEST);
        set("page-2m", cap::SSLPS_2M.of(self.cap), 1);
        set("page-1g", cap::SSLPS_1G.of(self.cap), 1);
        set("snoop-control", u64::from(self.has(ecap::SC) || self.mode == rtaddr::SCALABLE), 0);
        set("accessed-dirty", u64::from(accessed_dirty), 0);
        set("io-permissions", u64::from(self.io_permissions), 0);
        table
    }

    fn first_stage(&self, entry: &[u64; 8], output_bits: u64, privileged: bool) -> TableConfig {
        let levels = 4 + pasid::FSPM.of(entry[2]);
        let mut table = TableConfig::new(FirstStage::NAME, &[("levels", levels), ("root", POINTER.in_place(entry[2]))]);
        let mut set = |name, value, default| {
            if value != default {
                table.settings.set(name, value);
            }
        };
        set("output-bits", output_bits, DEFAULT_OUTPUT_BITS);
        set("page-1g", cap::FS1GP.of(self.cap), 1);
        set("write-protect", u64::from(entry[2] & pasid::WPE != 0), 0);
        set("supervisor", u64::from(entry[2] & pasid::SRE != 0), 0);
        set("privileged", u64::from(privileged), 0);
        set("extended-access", u64::from(entry[2] & pasid::EAFE != 0), 0);
        table
    }

    /// What `requester` gets, section 3.4, with what is no business of the tables.
    fn lookup(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Blocked> {
        let outcome = self.structures(requester, memory)?;
        Ok(match outcome {
            Outcome::Tables(translated) if requester.pasid.is_none() => Outcome::Tables(Translated { intercepts: vec![interrupts()], ..translated }),
            outcome => outcome,
        })
    }

    /// What the structures say.
    fn structures(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Blocked> {
        match self.mode {
            rtaddr::LEGACY => self.legacy(requester, memory),
            rtaddr::SCALABLE => self.scalable(requester, memory),
            rtaddr::ABORT if self.has(ecap::ADMS) => Err(unused("RTA.4", 0x33, "the unit aborts all DMA")),
            rtaddr::ABORT => Err(fault("RTA.1.1", 0x30, "the root table register asks for abort-DMA mode, which the unit does not have")),
            _ => Err(fault("RTA.1.2", 0x30, "the root table register has a reserved translation table mode")),
        }
    }

    /// Section 3.4.2.
    fn legacy(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Blocked> {
        unless(self.io_permissions, "RTA.1.4", 0x30, "I/O permissions are enabled in legacy mode")?;
        unused_if(requester.pasid.is_some(), "RTA.2", 0x31, "legacy mode has no requests with PASID")?;
        let (bus, function) = (requester.id >> 8 & 0xff, requester.id & 0xff);
        let [low, high] = read(memory, self.root_table + bus * u64::from(root::BYTES), "LRT.1", 8, "root entry")?;
        unused_if(low & PRESENT == 0, "LRT.2", 1, "the root entry of this bus is not present")?;
        unless_zero(&[low & (root::RESERVED | self.beyond_host()), high], "LRT.3", 0xa, "the root entry has a reserved bit")?;

        let address = POINTER.in_place(low) + function * u64::from(context::BYTES);
        let [low, high] = read(memory, address, "LCT.1", 9, "context entry")?;
        unused_if(low & PRESENT == 0, "LCT.2", 2, "the context entry is not present")?;
        let domain = when(self.domain_is_too_wide(context::DID.of(high)), context::DID.mask());
        let reserved = [low & (context::RESERVED_0 | self.beyond_host()), high & context::RESERVED_1 | domain];
        unless_zero(&reserved, "LCT.3", 0xb, "the context entry has a reserved bit")?;
        let levels = self
            .levels(context::AW.of(high))
            .ok_or_else(|| fault("LCT.4.1", 3, "the unit does not have this address width (AW)").at(1, context::AW.mask()))?;
        match context::TT.of(low) {
            context::PASS_THROUGH if self.has(ecap::PT) => Ok(Outcome::Bypass),
            context::DEVICE_TLB if !self.has(ecap::DT) => {
                Err(fault("LCT.4.2", 3, "the translation type (TT) is for device TLBs, which the unit does not have").at(0, context::TT.mask()))
            }
            context::SECOND_STAGE | context::DEVICE_TLB => {
                let tag = Tag { domain: Some(context::DID.of(high) as u32), space: None };
                Ok(Outcome::Tables(Translated::new(vec![self.second_stage(POINTER.in_place(low), levels, false)], tag)))
            }
            _ => Err(fault("LCT.4.2", 3, "the unit does not have this translation type (TT)").at(0, context::TT.mask())),
        }
    }

    /// Section 3.4.3.
    fn scalable(&self, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Blocked> {
        let context = self.scalable_context(requester.id, memory)?;
        let largest = (1_u64 << (scalable_context::PDTS.of(context[0]) + 7 + 6)) - 1;
        let own = scalable_context::RID_PASID.of(context[1]);
        unless_zero(&[0, when(own > largest, scalable_context::RID_PASID.mask())], "SCT.4.2", 0x43, "RID_PASID is beyond the PASID directory")?;
        let Some(pasid) = requester.pasid.map(u64::from) else {
            let entry = self.pasid_entry(context[0], own, memory)?;
            return self.translation(&entry, own, context[1] & scalable_context::RID_PRIV != 0);
        };
        unless(pasid > self.largest_pasid(), "SGN.10", 0x89, "the PASID has more bits than the unit supports (PSS)")?;
        unused_if(context[0] & scalable_context::PASIDE == 0, "SCT.6", 0x45, "the context entry does not enable PASIDs")?;
        unused_if(pasid > largest, "SCT.7", 0x46, "the PASID is beyond the PASID directory")?;
        unless_zero(
            &[0, when(pasid == own, scalable_context::RID_PASID.mask())],
            "SCT.9",
            0x48,
            "the PASID is the one that requests without PASID use (RID_PASID)",
        )?;
        let entry = self.pasid_entry(context[0], pasid, memory)?;
        self.translation(&entry, pasid, false)
    }

    /// PASIDs have 20 bits at most, and as many as PSS says.
    fn largest_pasid(&self) -> u64 {
        (1 << (ecap::PSS.of(self.ecap) + 1).min(20)) - 1
    }

    /// A present and well-formed context entry: sections 9.2 and 9.4.
    fn scalable_context(&self, id: u64, memory: &mut dyn GuestMemory) -> Result<[u64; 4], Blocked> {
        unless(!self.has(ecap::SMTS), "RTA.1.3", 0x30, "the root table register asks for scalable mode, which the unit does not have")?;
        let (bus, function) = (id >> 8 & 0xff, id & 0xff);
        let halves: [u64; 2] = read(memory, self.root_table + bus * u64::from(root::BYTES), "SRT.1", 0x38, "scalable-mode root entry")?;
        let half = halves[usize::from(function >= 0x80)];
        unused_if(half & PRESENT == 0, "SRT.2", 0x39, "this half of the scalable-mode root entry is not present")?;
        let reserved = halves.map(|half| when(half & PRESENT != 0, half & (root::RESERVED | self.beyond_host())));
        unless_zero(&reserved, "SRT.3", 0x3a, "the scalable-mode root entry has a reserved bit")?;

        let address = POINTER.in_place(half) + (function & 0x7f) * u64::from(scalable_context::BYTES);
        let entry: [u64; 4] = read(memory, address, "SCT.1", 0x40, "scalable-mode context entry")?;
        unused_if(entry[0] & PRESENT == 0, "SCT.2", 0x41, "the scalable-mode context entry is not present")?;
        let mut reserved_0 = scalable_context::RESERVED_0 | self.beyond_host();
        let mut reserved_1 = scalable_context::RESERVED_1;
        for (capability, bits) in [
            (ecap::DT, scalable_context::DTE),
            (ecap::PASID, scalable_context::PASIDE),
            (ecap::PRS, scalable_context::PRE),
            (ecap::HPTS, scalable_context::HPTE),
            (ecap::PTRS, scalable_context::EPTR),
        ] {
            reserved_0 |= if self.has(capability) { 0 } else { bits };
        }
        for (capability, bits) in [(ecap::RPS, scalable_context::RID_PASID.mask()), (ecap::RPRIVS, scalable_context::RID_PRIV)] {
            reserved_1 |= if self.has(capability) { 0 } else { bits };
        }
        unless_zero(
            &[entry[0] & reserved_0, entry[1] & reserved_1, entry[2], entry[3]],
            "SCT.3",
            0x42,
            "the scalable-mode context entry has a reserved bit",
        )?;
        let enabled = |bit| entry[0] & bit != 0;
        let inconsistent = enabled(scalable_context::PRE) && !enabled(scalable_context::DTE);
        unless_zero(
            &[when(inconsistent, scalable_context::PRE | scalable_context::DTE)],
            "SCT.4.1",
            0x43,
            "page requests (PRE) are enabled without device TLBs (DTE)",
        )?;
        let inconsistent = enabled(scalable_context::EPTR) && !enabled(scalable_context::PASIDE);
        unless_zero(
            &[when(inconsistent, scalable_context::EPTR | scalable_context::PASIDE)],
            "SCT.4.3",
            0x43,
            "PASIDs in translated requests (EPTR) are enabled without PASIDs (PASIDE)",
        )?;
        Ok(entry)
    }

    /// A present PASID table entry: section 9.5 and the always reserved bits of 9.6. `pasid` is within the directory.
    fn pasid_entry(&self, context: u64, pasid: u64, memory: &mut dyn GuestMemory) -> Result<[u64; 8], Blocked> {
        let address = POINTER.in_place(context) + (pasid >> 6) * u64::from(directory::BYTES);
        let [entry] = read(memory, address, "SPD.1", 0x50, "PASID directory entry")?;
        unused_if(entry & PRESENT == 0, "SPD.2", 0x51, "the PASID directory entry is not present")?;
        unless_zero(&[entry & (directory::RESERVED | self.beyond_host())], "SPD.3", 0x52, "the PASID directory entry has a reserved bit")?;

        let address = POINTER.in_place(entry) + (pasid & 0x3f) * u64::from(pasid::BYTES);
        let entry: [u64; 8] = read(memory, address, "SPT.1", 0x58, "PASID table entry")?;
        unused_if(entry[0] & PRESENT == 0, "SPT.2", 0x59, "the PASID table entry is not present")?;
        let (reserved_0, reserved_2) = (pasid::RESERVED_0 | self.beyond_host(), pasid::RESERVED_2 | self.beyond_host());
        let always = [reserved_0, pasid::RESERVED_1, reserved_2, u64::MAX, pasid::RESERVED_4, pasid::RESERVED_5, u64::MAX, u64::MAX];
        let mut reserved: [u64; 8] = std::array::from_fn(|word| entry[word] & always[word]);
        for (capability, bits) in [(ecap::SMPWCS, pasid::PWSNP), (ecap::MTS, pasid::MEMORY_TYPE)] {
            reserved[1] |= when(!self.has(capability), entry[1] & bits);
        }
        if self.has(ecap::HPTS) {
            reserved[4] |= entry[4] & self.beyond_host();
        } else {
            reserved[4] |= entry[4] & pasid::HPT_4;
            reserved[5] |= pasid::HPT_5.in_place(entry[5]);
        }
        reserved[1] |= when(self.domain_is_too_wide(pasid::DID.of(entry[1])), pasid::DID.mask());
        unless_zero(&reserved, "SPT.3", 0x5a, "the PASID table entry has a reserved bit")?;
        self.note_pasid_entry(&entry, address, memory);
        Ok(entry)
    }

    /// Fields that are reserved without a capability, in an entry that does not use them: section 9.6. AW is none of them, because Linux fills it in always.
    fn note_pasid_entry(&self, entry: &[u64; 8], address: u64, memory: &mut dyn GuestMemory) {
        let reason = "the PASID table entry has reserved bits of a stage that it does not use";
        let mut structure = Structure::new(memory, address, "D51397 section 9.6");
        let kind = pasid::PGTT.of(entry[0]);
        if !matches!(kind, pasid::SECOND_STAGE | pasid::NESTED) && !self.has(ecap::SSADS) {
            structure.warn(0, entry[0] & pasid::SSADE, reason);
        }
        if !matches!(kind, pasid::FIRST_STAGE | pasid::NESTED) {
            let unsupported = |capability, bit| if self.has(capability) { 0 } else { bit };
            structure.warn(2, entry[2] & (unsupported(ecap::SRS, pasid::SRE) | unsupported(ecap::EAFS, pasid::EAFE)), reason);
            let beyond = pasid::FSPM.of(entry[2]) > cap::FS5LP.of(self.cap);
            structure.warn(2, if beyond { pasid::FSPM.in_place(entry[2]) } else { 0 }, reason);
        }
        structure.warn(
            1,
            when(!self.has(ecap::SC), entry[1] & pasid::PGSNP),
            "the PASID table entry asks for snooping, which the unit does not control",
        );
        structure.warn(2, entry[2] & pasid::FORMERLY_USED, "the PASID table entry has bits that were NXE and SMEP once");
    }

    /// What a PASID table entry does with a request: section 9.6.
    fn translation(&self, entry: &[u64; 8], pasid: u64, privileged: bool) -> Result<Outcome, Blocked> {
        let kind = pasid::PGTT.of(entry[0]);
        let capability = match kind {
            pasid::FIRST_STAGE => Some(ecap::FSTS),
            pasid::SECOND_STAGE => Some(ecap::SSTS),
            pasid::NESTED => Some(ecap::NEST),
            pasid::PASS_THROUGH => Some(ecap::PT),
            _ => None,
        };
        let missing = capability.is_none_or(|capability| !self.has(capability));
        unless_zero(&[when(missing, pasid::PGTT.mask())], "SPT.4.2", 0x5b, "the unit does not have this translation type (PGTT)")?;

        let mut second_levels = None;
        if matches!(kind, pasid::SECOND_STAGE | pasid::NESTED) {
            unless_zero(
                &[when(!self.has(ecap::SSADS), entry[0] & pasid::SSADE)],
                "SPT.3",
                0x5a,
                "the unit has no accessed and dirty flags (SSADE) in its second stage",
            )?;
            second_levels = self.levels(pasid::AW.of(entry[0]));
            unless_zero(&[when(second_levels.is_none(), pasid::AW.mask())], "SPT.4.1", 0x5b, "the unit does not have this address width (AW)")?;
        }
        if matches!(kind, pasid::FIRST_STAGE | pasid::NESTED) {
            let unsupported = |capability, bit| [0, 0, when(!self.has(capability), entry[2] & bit)];
            unless_zero(&unsupported(ecap::SRS, pasid::SRE), "SPT.3", 0x5a, "the unit has no supervisor requests (SRE)")?;
            unless_zero(&unsupported(ecap::EAFS, pasid::EAFE), "SPT.3", 0x5a, "the unit has no extended-accessed flag (EAFE)")?;
            let supported = pasid::FSPM.of(entry[2]) <= cap::FS5LP.of(self.cap);
            unless_zero(
                &[0, 0, when(!supported, pasid::FSPM.mask())],
                "SPT.4.3",
                0x5b,
                "the unit does not have this first-stage paging mode (FSPM)",
            )?;
        }
        unless_zero(
            &[0, 0, when(privileged && entry[2] & pasid::SRE == 0, pasid::SRE)],
            "SPT.6",
            0x5d,
            "RID_PRIV makes requests privileged, and SRE refuses those",
        )?;

        let second = second_levels.map(|levels| self.second_stage(POINTER.in_place(entry[0]), levels, entry[0] & pasid::SSADE != 0));
        let tag = Tag { domain: Some(pasid::DID.of(entry[1]) as u32), space: Some(pasid as u32) };
        let tables = |tables| Ok(Outcome::Tables(Translated::new(tables, tag)));
        match (kind, second, second_levels) {
            (pasid::FIRST_STAGE, ..) => tables(vec![self.first_stage(entry, self.host_bits(), privileged)]),
            (pasid::SECOND_STAGE, Some(second), _) => tables(vec![second]),
            (pasid::NESTED, Some(second), Some(levels)) => {
                // The first stage's addresses are guest-physical: they end where the second stage's input does.
                let input_bits = self.guest_bits().clamp(12, address_width(levels));
                let beyond = POINTER.in_place(entry[2]) >> input_bits != 0;
                unless_zero(
                    &[0, 0, when(beyond, POINTER.mask())],
                    "SPT.4.4",
                    0x5b,
                    "the first-stage table is beyond the second stage's input addresses",
                )?;
                let first = self.first_stage(entry, input_bits.min(self.host_bits()), privileged);
                tables(vec![first, second])
            }
            _ => Ok(Outcome::Bypass),
        }
    }

    /// See [`Unit::pasids`].
    fn pasids(&self, id: u64, memory: &mut dyn GuestMemory) -> Vec<u32> {
        let mut found = Vec::new();
        if self.mode != rtaddr::SCALABLE {
            return found;
        }
        let Ok(context) = self.scalable_context(id, memory) else { return found };
        if context[0] & scalable_context::PASIDE == 0 {
            return found;
        }
        let own = scalable_context::RID_PASID.of(context[1]);
        let largest = self.largest_pasid();
        let entries = (1_u64 << (scalable_context::PDTS.of(context[0]) + 7)).min((largest >> 6) + 1);
        let pages = (entries * u64::from(directory::BYTES)).div_ceil(u64::from(PAGE));
        let mut tables_left = MOST_PASID_TABLES;
        for page in 0..pages {
            let address = POINTER.in_place(context[0]).wrapping_add(page * u64::from(PAGE));
            let Ok(bytes) = memory.read(address, PAGE) else { continue };
            for (slot, entry) in (page * u64::from(PAGE / directory::BYTES)..entries).zip(words(&bytes)) {
                if entry & PRESENT == 0 || entry & (directory::RESERVED | self.beyond_host()) != 0 {
                    continue;
                }
                let Some(left) = tables_left.checked_sub(1) else { return found };
                tables_left = left;
                let Ok(bytes) = memory.read(POINTER.in_place(entry), PAGE) else { continue };
                let present = words(&bytes).into_iter().step_by(pasid::BYTES as usize / 8).take(pasid::ENTRIES as usize);
                for (index, word) in (0_u64..).zip(present) {
                    let pasid = slot << 6 | index;
                    if word & PRESENT != 0 && pasid != own && pasid <= largest {
                        found.push(pasid as u32);
                        if found.len() == MOST_PASIDS {
                            return found;
                        }
                    }
                }
            }
        }
        found
    }
}

/// Requester ids are bus, device and function: 16 bits.
fn check_id(id: u64) -> Result<(), Error> {
    if id >> 16 == 0 { Ok(()) } else { Err(Error::invalid("id", id, "D51397 section 3.4.1", "a requester id has 16 bits")) }
}

/// `struct iommu_hwpt_vtd_s1_invalidate`: address, number of pages, flags. The page table itself is the target, so that no number of the address space is in
/// it; the kernel has its own domain ids. Address 0 and all ones are everything.
fn recipe() -> Recipe {
    let place = |word, lsb, width| Place { word, lsb, width, number_lsb: lsb };
    Recipe {
        data_type: INVALIDATE_VTD_S1,
        target: InvalidationTarget::PageTable,
        page_log2: 12,
        page: vec![0, 1, 0],
        address: place(0, 12, 52),
        // A number of all ones would be everything.
        range: Some(RangeEntry { words: vec![0, 0, 0], extent: Extent::Count(place(1, 0, 52)) }),
        leaf: vec![0, 0, INVALIDATE_LEAF],
        tables: Some(vec![0, 0, 0]),
        everything: vec![0, u64::MAX, 0],
        most: 256,
    }
}

impl Unit for IntelVtd {
    fn lookup(registers: &Registers, requester: Requester, memory: &mut dyn GuestMemory) -> Result<Outcome, Error> {
        check_id(requester.id)?;
        let Some(unit) = Hardware::new(registers)? else { return Ok(Outcome::Bypass) };
        Ok(unit.lookup(requester, memory).unwrap_or_else(Outcome::Blocked))
    }

    fn pasids(registers: &Registers, id: u64, memory: &mut dyn GuestMemory) -> Result<Vec<u32>, Error> {
        check_id(id)?;
        Ok(Hardware::new(registers)?.map(|unit| unit.pasids(id, memory)).unwrap_or_default())
    }

    /// Only the first stage of a unit with nesting can be a user's own; second stages belong to the kernel, which builds them from map and unmap.
    fn offers(kind: u32, info: &[u8]) -> Result<Vec<Offer>, Error> {
        if kind != HW_INFO_INTEL_VTD {
            return Err(Error::Unsupported(format!("hardware information of type {kind} is not VT-d's")));
        }
        let info =
            info.get(..HW_INFO_BYTES).ok_or_else(|| Error::invalid("info", info.len() as u64, "", "VT-d's hardware information has 24 bytes"))?;
        // flags and reserved, capabilities, extended capabilities
        let [flags, cap, ecap]: [u64; 3] = words(info).try_into().unwrap_or_default();
        let unit = Hardware { cap, ecap, root_table: 0, mode: rtaddr::SCALABLE, io_permissions: false };
        if !unit.has(ecap::SMTS) || !unit.has(ecap::NEST) || !unit.has(ecap::FSTS) {
            return Ok(Vec::new());
        }
        // The first stage's output is the second stage's input: as wide as the widest second stage, within MGAW.
        let widest = (1..=3).filter_map(|aw| unit.levels(aw)).max().map_or(48, address_width);
        let limits = [
            ("levels", 4 + cap::FS5LP.of(cap)),
            ("output-bits", unit.guest_bits().min(widest).clamp(12, 52)),
            ("page-1g", cap::FS1GP.of(cap)),
            ("write-protect", 1),
            ("supervisor", ecap::SRS.of(ecap)),
            ("privileged", 0),
            ("extended-access", ecap::EAFS.of(ecap)),
            ("memory-type", 0),
        ];
        let limits = limits.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut conditions = Vec::new();
        if flags & VTD_ERRATUM_772415 != 0 {
            let what = "erratum 772415: the second stage below this table must have no read-only pages, so guest memory that is read-only for devices cannot be \
                        mapped there; read-only leaves of the table itself are not affected";
            conditions.push(what.to_owned());
        }
        if !unit.has(ecap::SMPWCS) {
            let what = "walks do not snoop: tables must be written back from the processors' caches, with accessed and dirty set, which hardware cannot set then";
            conditions.push(what.to_owned());
        }
        Ok(vec![Offer { format: FirstStage::NAME.to_owned(), limits, conditions }])
    }

    /// `struct iommu_hwpt_vtd_s1`: flags, address of the root table, width of its input addresses. There is no context structure.
    fn bind_data(table: &TableConfig, _: &PlaceToBind) -> Result<Binding, Error> {
        if table.format != FirstStage::NAME {
            return Err(Error::Unsupported(format!("the kernel nests no tables of format `{}` on VT-d", table.format)));
        }
        let settings = &table.settings;
        let levels = FirstStage::open(settings)?.geometry().levels.len() as u64;
        if settings.flag("memory-type", false)? {
            return Err(Error::Unsupported("the kernel sets up no page attribute table for nested tables: memory-type must be 0".to_owned()));
        }
        if settings.flag("privileged", false)? {
            return Err(Error::Unsupported("the kernel makes no requests without PASID privileged: privileged must be 0".to_owned()));
        }
        let root = settings.get("root").ok_or_else(|| Error::invalid("root", 0, "", "the table has no address yet"))?;
        let mut flags = 0;
        for (name, bit) in [("supervisor", VTD_S1_SRE), ("extended-access", VTD_S1_EAFE), ("write-protect", VTD_S1_WPE)] {
            flags |= if settings.flag(name, false)? { bit } else { 0 };
        }
        let words: [u64; 3] = [flags, root, address_width(levels)];
        Ok(Binding {
            kind: HWPT_DATA_VTD_S1,
            data: words.iter().flat_map(|word| word.to_le_bytes()).collect(),
            context: Vec::new(),
            viommu: None,
            pasids: true,
            invalidation: Some(recipe()),
        })
    }

    fn decode_commands(registers: &Registers, commands: &[u8]) -> Result<Vec<Command>, Error> {
        queue::decode(registers, commands)
    }

    fn review_event(registers: &Registers, event: Event, memory: &mut dyn GuestMemory) -> Result<Option<Event>, Error> {
        crate::review::review(registers, event, memory)
    }

    fn encode_event(registers: &Registers, event: &Event) -> Result<EventRecord, Error> {
        queue::encode(registers, event)
    }

    fn encode_page_request(registers: &Registers, request: &PageRequest) -> Result<EventRecord, Error> {
        queue::encode_page_request(registers, request)
    }
}
