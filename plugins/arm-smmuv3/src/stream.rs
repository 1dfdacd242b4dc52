//! From the registers to a stream table entry, and what the entry says: IHI 0070 sections 3.3, 5.1, 5.2 and 6.3.
//!
//! All streams are Non-secure. Where a version of the architecture leaves a choice, what SMMUv3.1 and later must do is done.

use stagecraft_sdk::bits::Field;
use stagecraft_sdk::queue::Access;
use stagecraft_sdk::{Blocked, Error, Event, Format, GuestMemory, Registers, TableConfig};

use crate::Stage2;
use crate::notes;
use crate::spec::registers::{address_size, cr2, idr0, idr1, idr3, idr5, l1std, physical_address_size, strtab_base, strtab_base_cfg};
use crate::spec::{Slot, Words, cd, field, ste};
use crate::stage2::{default_start, start_level_setting};
use crate::vmsa::{Granule, align_down, root_alignment};

/// PRIVCFG.
const UNPRIVILEGED: u64 = 2;
const PRIVILEGED: u64 = 3;
/// INSTCFG.
const DATA: u64 = 2;
const INSTRUCTION: u64 = 3;

/// Why a lookup ends early.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The hardware refuses the request.
    Blocked(Blocked),
    /// This plugin cannot answer.
    Error(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

/// The hardware refuses the request.
pub(crate) fn blocked<T>(event: &str, section: &str, reason: &str) -> Result<T, Stop> {
    Err(Stop::Blocked(Blocked::refused(event, section, reason)))
}

/// A field of a stream table entry, by its name, has a value that the hardware refuses.
pub(crate) fn bad_entry<T>(name: &str, reason: &str) -> Result<T, Stop> {
    Err(bad_field("C_BAD_STE", &format!("IHI 0070 section 5.2, {name}"), reason, field(ste::ALL, name)))
}

/// The same of a context descriptor.
pub(crate) fn bad_context<T>(name: &str, reason: &str) -> Result<T, Stop> {
    Err(bad_field("C_BAD_CD", &format!("IHI 0070 section 5.4, {name}"), reason, field(cd::ALL, name)))
}

/// The same of a field whose name in the specification stands for several.
pub(crate) fn bad_field(event: &str, section: &str, reason: &str, slot: Option<Slot>) -> Stop {
    let blocked = Blocked::refused(event, section, reason);
    Stop::Blocked(match slot.map(Slot::place) {
        Some((word, bits)) => blocked.at(word as u8, bits),
        None => blocked,
    })
}

/// The same where nothing was set up for the requester.
pub(crate) fn unused<T>(event: &str, section: &str, reason: &str) -> Result<T, Stop> {
    Err(Stop::Blocked(Blocked::unused(event, section, reason)))
}

/// A feature that this plugin does not have.
pub(crate) fn unsupported<T>(what: &str) -> Result<T, Stop> {
    Err(Stop::Error(Error::Unsupported(what.to_owned())))
}

/// The error of a format that refuses what a structure says, as the event that the structure would cause.
pub(crate) fn refused<T>(event: &str, section: &str, opened: Result<T, Error>) -> Result<T, Stop> {
    match opened {
        Ok(opened) => Ok(opened),
        Err(Error::Invalid(invalid)) => blocked(event, section, &format!("{} {:#x}: {}", invalid.field, invalid.value, invalid.reason)),
        Err(error) => Err(error.into()),
    }
}

/// Bytes to the eight words of a structure; short reads count as unreadable.
pub(crate) fn structure(bytes: &[u8], address: u64) -> Result<Words, Error> {
    stagecraft_sdk::bits::words(bytes).try_into().map_err(|_| Error::Unreadable(address))
}

/// The event of a configuration read that failed; other errors stay what they are.
pub(crate) fn read_failed<T>(result: Result<T, Error>, event: &str, reason: &str) -> Result<T, Stop> {
    match result {
        Ok(value) => Ok(value),
        Err(Error::Unreadable(address)) => blocked(event, "IHI 0070 section 7.3", &format!("{reason} at {address:#x} cannot be read")),
        Err(error) => Err(error.into()),
    }
}

/// What the ID registers say.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Features {
    idr0: u64,
    idr1: u64,
    idr3: u64,
    idr5: u64,
    e2h: bool,
}

impl Features {
    /// IDR0, IDR1 and IDR5 are needed; IDR3 and CR2 count as zero if they are not given.
    pub(crate) fn new(registers: &Registers) -> Result<Self, Error> {
        Ok(Self {
            idr0: registers.need("IDR0")?,
            idr1: registers.need("IDR1")?,
            idr3: registers.get("IDR3").unwrap_or(0),
            idr5: registers.need("IDR5")?,
            e2h: cr2::E2H.of(registers.get("CR2").unwrap_or(0)) != 0,
        })
    }

    pub(crate) const fn idr0(&self, field: Field) -> u64 {
        field.of(self.idr0)
    }

    pub(crate) const fn has3(&self, field: Field) -> bool {
        field.of(self.idr3) != 0
    }

    pub(crate) const fn has_d128(&self) -> bool {
        idr5::D128.of(self.idr5) != 0
    }

    pub(crate) const fn has_lpa2(&self) -> bool {
        idr5::DS.of(self.idr5) != 0
    }

    pub(crate) const fn has_52_bit_input(&self) -> bool {
        idr5::VAX.of(self.idr5) != 0
    }

    pub(crate) const fn permissions_can_be_overridden(&self) -> bool {
        idr1::ATTR_PERMS_OVR.of(self.idr1) != 0
    }

    /// A request as its stream's entry makes it, which is what events tell of: IHI 0070 sections 5.2 (PRIVCFG, INSTCFG) and 7.3.
    pub(crate) fn overridden(&self, words: &Words, event: Event) -> Event {
        if !self.permissions_can_be_overridden() {
            return event;
        }
        let privileged = match ste::PRIVCFG.of(words) {
            UNPRIVILEGED => false,
            PRIVILEGED => true,
            _ => event.privileged,
        };
        let access = match (ste::INSTCFG.of(words), event.access) {
            (DATA, Access::Execute) => Access::Read,
            (INSTRUCTION, Access::Read) => Access::Execute,
            (_, access) => access,
        };
        Event { privileged, access, ..event }
    }

    /// 0 to 20; larger values make no sense.
    pub(crate) fn substream_bits(&self) -> u8 {
        idr1::SSIDSIZE.of(self.idr1).min(20) as u8
    }

    /// Output address size, of which the 64-bit table formats can use 52 bits.
    pub(crate) const fn output_bits(&self) -> u8 {
        address_size(idr5::OAS.of(self.idr5))
    }

    /// The same of addresses in structures.
    pub(crate) const fn physical_bits(&self) -> u8 {
        physical_address_size(idr5::OAS.of(self.idr5))
    }

    /// Intermediate address size, IHI 0070 section 3.4: AArch32 tables have 40 bits.
    pub(crate) fn intermediate_bits(&self) -> u8 {
        if self.idr0(idr0::TTF) & 1 != 0 { self.physical_bits().max(40) } else { self.physical_bits() }
    }

    /// HTTU: Access flags of tables too.
    pub(crate) const fn marks_tables(&self) -> bool {
        self.idr0(idr0::HTTU) == 3
    }

    /// Whether tables with this granule reach 52-bit addresses whatever size is configured: FEAT_LPA, which the 64K granule alone has.
    pub(crate) fn has_lpa(&self, granule: Granule) -> bool {
        granule == Granule::K64 && self.output_bits() == 52
    }

    pub(crate) const fn has_granule(&self, granule: Granule) -> bool {
        let field = match granule.log2() {
            12 => idr5::GRAN4K,
            14 => idr5::GRAN16K,
            _ => idr5::GRAN64K,
        };
        field.of(self.idr5) != 0
    }

    /// The smallest input address size, from the largest TxSZ.
    pub(crate) const fn least_input_bits(&self, granule: Granule) -> u8 {
        match (self.has3(idr3::STT), granule.log2()) {
            (false, _) => 25,
            (true, 16) => 17,
            (true, _) => 16,
        }
    }

    /// Whether tables of this byte order may be configured.
    pub(crate) const fn allows_endianness(&self, big: bool) -> bool {
        match self.idr0(idr0::TTENDIAN) {
            2 => !big,
            3 => big,
            _ => true,
        }
    }
}

/// Reads the stream table entry of StreamID `id`.
pub(crate) fn find(registers: &Registers, features: &Features, id: u64, memory: &mut dyn GuestMemory) -> Result<Words, Stop> {
    let cfg = registers.need("STRTAB_BASE_CFG")?;
    let base = strtab_base::ADDR.in_place(registers.need("STRTAB_BASE")?);
    let log2size = strtab_base_cfg::LOG2SIZE.of(cfg) as u8;
    let range = u64::from(log2size).min(idr1::SIDSIZE.of(features.idr1)).min(32);
    if id >> range != 0 {
        return unused("C_BAD_STREAMID", "IHI 0070 section 6.3.25", "the StreamID lies outside the stream table");
    }
    let two_levels = features.idr0(idr0::ST_LEVEL) != 0 && strtab_base_cfg::FMT.of(cfg) == 1;
    let address = if two_levels {
        let split = match strtab_base_cfg::SPLIT.of(cfg) {
            split @ (8 | 10) => split as u8,
            _ => 6,
        };
        let base = align_down(base, log2size.saturating_sub(split).saturating_add(3).max(6));
        let address = base + (id >> split) * 8;
        let bytes = read_failed(memory.read(address, 8), "F_STE_FETCH", "the level 1 stream table descriptor")?;
        let descriptor = stagecraft_sdk::bits::words(&bytes).first().copied().unwrap_or(0);
        let entry = second_level(descriptor, split, id)?;
        notes::stream_descriptor(memory, address, descriptor);
        entry
    } else {
        align_down(base, log2size.saturating_add(6)) + id * 64
    };
    let words = memory.read(address, 64).and_then(|bytes| structure(&bytes, address));
    let words = read_failed(words, "F_STE_FETCH", "the stream table entry")?;
    if ste::V.is_set(&words) {
        notes::stream_entry(memory, address, &words, features);
    }
    Ok(words)
}

/// Address of the entry that a level 1 descriptor leads to, IHI 0070 section 5.1.1.
fn second_level(descriptor: u64, split: u8, id: u64) -> Result<u64, Stop> {
    let span = l1std::SPAN.of(descriptor) as u8;
    let section = "IHI 0070 section 5.1";
    if span == 0 || span > 11 {
        return unused("C_BAD_STREAMID", section, "the level 1 stream table descriptor is invalid");
    }
    if span > split + 1 {
        let blocked = Blocked::refused("C_BAD_STREAMID", section, "the span of the level 1 stream table descriptor exceeds the split point");
        return Err(Stop::Blocked(blocked.at(0, l1std::SPAN.mask())));
    }
    let index = id & ((1 << split) - 1);
    if index >> (span - 1) != 0 {
        return unused("C_BAD_STREAMID", section, "the StreamID lies outside the span of its level 1 stream table descriptor");
    }
    Ok(align_down(l1std::L2PTR.in_place(descriptor), 6 + (span - 1)) + index * 64)
}

/// What an STE asks for.
#[derive(Clone, Debug)]
pub(crate) struct Stream {
    /// Stage 1 translates.
    pub(crate) stage1: bool,
    /// Stage 2 translates, with this table.
    pub(crate) stage2: Option<TableConfig>,
    /// Requests are all privileged: EL2 without E2H. One range, no EPD.
    pub(crate) single_privilege: bool,
    /// PRIVCFG says that requests are privileged.
    pub(crate) privileged: bool,
    /// Its translations belong to this VMID.
    pub(crate) vmid: Option<u32>,
}

impl Stream {
    /// IHI 0070 section 5.2.2, `SteIllegal`.
    pub(crate) fn new(words: &Words, features: &Features) -> Result<Self, Stop> {
        let bad = bad_entry;
        if !ste::V.is_set(words) {
            return unused("C_BAD_STE", "IHI 0070 section 5.2, V", "the stream table entry is not valid");
        }
        let config = ste::CONFIG.of(words);
        if config & 0b100 == 0 {
            return unused("ABORT", "IHI 0070 section 5.2, Config", "the stream is disabled; no event is recorded");
        }
        let (stage1, stage2) = (config & 1 != 0, config & 2 != 0);
        if stage1 && features.idr0(idr0::S1P) == 0 {
            return bad("Config", "stage 1 is not implemented");
        }
        if stage2 && features.idr0(idr0::S2P) == 0 {
            return bad("Config", "stage 2 is not implemented");
        }
        let strw = if stage1 && !stage2 && features.idr0(idr0::HYP) != 0 { ste::STRW.of(words) } else { 0 };
        if (stage1 || stage2) && features.idr0(idr0::ATS) != 0 {
            let stalls = ste::S2S.is_set(words);
            let illegal = match ste::EATS.of(words) {
                1 => stage2 && stalls,
                2 => !(stage1 && stage2) || stalls || features.idr0(idr0::NS1ATS) != 0,
                3 if features.has3(idr3::DPT) => stage2 && stalls || strw != 0,
                _ => false,
            };
            if illegal {
                return bad("EATS", "this kind of ATS does not go with the stages, the StreamWorld, with stalls or with the implementation");
            }
        }
        if strw & 1 != 0 {
            return bad("STRW", "the StreamWorld is reserved");
        }
        let vmid_counts = features.idr0(idr0::S2P) != 0 && (stage1 || stage2) && strw == 0;
        if vmid_counts && features.idr0(idr0::VMID16) == 0 && ste::S2VMID.of(words) > 0xff {
            return bad("S2VMID", "the VMID has more than 8 bits");
        }
        if stage1 {
            Self::check_stage1(words, features, stage2)?;
        }
        let partitions = stage1 && stage2 && features.has3(idr3::MPAM) && ste::S1MPAM.is_set(words);
        if partitions && ste::VMSPTR.in_place(words) >> features.physical_bits() != 0 {
            return bad("VMSPtr", "the address lies beyond the address size");
        }
        if (stage1 || stage2) && features.permissions_can_be_overridden() && ste::INSTCFG.of(words) == INSTRUCTION {
            return unsupported("reads that are instruction fetches (STE.INSTCFG)");
        }
        let stage2 = if stage2 { Some(stage2_config(words, features, stage1)?) } else { None };
        let privileged = features.permissions_can_be_overridden() && ste::PRIVCFG.of(words) == PRIVILEGED;
        let vmid = vmid_counts.then(|| ste::S2VMID.of(words) as u32);
        let single_privilege = strw == 2 && !features.e2h;
        Ok(Self { stage1, stage2, single_privilege, privileged, vmid })
    }

    fn check_stage1(words: &Words, features: &Features, stage2: bool) -> Result<(), Stop> {
        let bad = bad_entry;
        if ste::S1STALLD.is_set(words) && features.idr0(idr0::STALL_MODEL) != 0 {
            return bad("S1STALLD", "stalls cannot be configured");
        }
        if features.substream_bits() != 0 {
            if ste::S1CDMAX.of(words) > u64::from(features.substream_bits()) {
                return bad("S1CDMax", "there are more context descriptors than SubstreamIDs");
            }
            if ste::S1CDMAX.of(words) != 0 && features.idr0(idr0::CD2L) == 0 && matches!(ste::S1FMT.of(words), 1 | 2) {
                return bad("S1Fmt", "two-level context descriptor tables are not implemented");
            }
        }
        let limit = if stage2 { features.intermediate_bits() } else { features.physical_bits() };
        if ste::S1CONTEXTPTR.in_place(words) >> limit != 0 {
            return bad("S1ContextPtr", "the address lies beyond the address size");
        }
        Ok(())
    }
}

/// The stage 2 table of an STE, which has a stage 1 as well if `nested`.
fn stage2_config(words: &Words, features: &Features, nested: bool) -> Result<TableConfig, Stop> {
    let bad = bad_entry;
    match (features.idr0(idr0::STALL_MODEL), ste::S2S.is_set(words)) {
        (1, true) => return bad("S2S", "stalls are not implemented"),
        (2, false) => return bad("S2S", "stalls are forced"),
        _ => {}
    }
    if !ste::S2AA64.is_set(words) {
        if features.has_d128() {
            return unsupported("128-bit descriptors (VMSAv9-128) at stage 2");
        }
        if features.idr0(idr0::TTF) & 1 == 0 {
            return bad("S2AA64", "AArch32 tables are not implemented");
        }
        return unsupported("AArch32 tables (VMSAv8-32 LPAE) at stage 2");
    }
    if features.idr0(idr0::TTF) & 2 == 0 {
        return bad("S2AA64", "AArch64 tables are not implemented");
    }
    let indirect = features.has3(idr3::S2PI) && ste::S2PIE.is_set(words);
    if features.has3(idr3::S2PO) && ste::S2POE.is_set(words) && !indirect {
        return bad("S2POE", "permission overlays need permission indirection");
    }
    if indirect {
        return unsupported("stage 2 permission indirection");
    }
    if features.has3(idr3::THE) && (ste::ASSURED_ONLY.is_set(words) || ste::TL.is_set(words)) {
        return unsupported("stage 2 translation hardening");
    }
    let (access, dirty) = (ste::S2HA.is_set(words), ste::S2HD.is_set(words));
    let httu = features.idr0(idr0::HTTU);
    if ((access || dirty) && httu == 0) || (dirty && httu == 1) || (httu == 3 && ste::S2HAFT.is_set(words) && !access) {
        return bad("S2HA", "hardware updates that are not implemented, or of tables alone");
    }
    if !features.allows_endianness(ste::S2ENDI.is_set(words)) {
        return bad("S2ENDI", "this byte order is not implemented");
    }
    let granule = match cd::granule0(ste::S2TG.of(words)).map(Granule::from_log2) {
        Some(granule) if features.has_granule(granule) => granule,
        _ => return bad("S2TG", "the granule is reserved or not implemented"),
    };
    let lpa2 = features.has_lpa2() && ste::S2DS.is_set(words) && granule != Granule::K64;
    let input_bits = 64 - ste::S2T0SZ.of(words) as u8;
    let most = granule.widest(lpa2).min(features.intermediate_bits());
    if input_bits < features.least_input_bits(granule) || input_bits > most {
        return bad("S2T0SZ", "the input address size is out of range");
    }
    let Some(start) = ste::start_level(granule.log2(), ste::S2SL0.of(words), lpa2 && ste::S2SL0_2.is_set(words)) else {
        return bad("S2SL0", "the start level is reserved");
    };
    if features.output_bits() < ste::start_level_needs(granule.log2(), start) {
        return bad("S2SL0", "a walk cannot start at this level on a unit with such small addresses");
    }
    if granule == Granule::K4 && start == 3 && !features.has3(idr3::STT) {
        return bad("S2SL0", "a walk cannot start at level 3 without small translation tables");
    }
    let output_bits = address_size(ste::S2PS.of(words)).min(features.output_bits());
    let mut config =
        TableConfig::new(Stage2::NAME, &[("granule", granule.bytes()), ("input-bits", input_bits.into()), ("output-bits", output_bits.into())]);
    let mut set = |name: &str, value: u64, default: u64| {
        if value != default {
            config.settings.set(name, value);
        }
    };
    set("start-level", start_level_setting(start), start_level_setting(default_start(granule, input_bits, lpa2)));
    set("hardware-access", access.into(), 0);
    set("hardware-dirty", (access && dirty).into(), 0);
    set("access-flag-disabled", (ste::S2AFFD.is_set(words) && !access).into(), 0);
    set("hardware-table-access", (access && features.marks_tables() && ste::S2HAFT.is_set(words)).into(), 0);
    set("big-endian", ste::S2ENDI.of(words), 0);
    set("lpa", features.has_lpa(granule).into(), (output_bits == 52 && granule == Granule::K64).into());
    set("lpa2", lpa2.into(), 0);
    set("force-write-back", (features.has3(idr3::FWB) && ste::S2FWB.is_set(words)).into(), 0);
    set("non-shareable", (lpa2 && ste::S2SH0.of(words) < 2).into(), 0);
    // Alone, there is nothing that would be read through it.
    set("protected-walk", (nested && ste::S2PTW.is_set(words)).into(), 0);
    // The hardware takes the low bits of the address as zero, up to the size of the table.
    let event = ("C_BAD_STE", "IHI 0070 section 5.2, S2TTB");
    let index_bits = refused(event.0, event.1, Stage2::open(&config.settings))?.levels().first().map_or(0, |level| level.index_bits);
    config.settings.set("root", align_down(ste::S2TTB.in_place(words), root_alignment(index_bits, output_bits)));
    refused(event.0, event.1, Stage2::open(&config.settings))?;
    Ok(config)
}
