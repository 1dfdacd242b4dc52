//! From a stream table entry to a context descriptor, and what the descriptor says: IHI 0070 sections 5.3 and 5.4.

use stagecraft_sdk::{Blocked, Error, Format, GuestMemory, TableConfig};

use crate::Stage1;
use crate::notes;
use crate::spec::registers::{address_size, idr0, idr3, l1cd};
use crate::spec::{Slot, Words, cd, ste};
use crate::stage1::LINUX_MAIR;
use crate::stream::{Features, Stop, Stream, bad_context, bad_field, read_failed, refused, structure, unsupported, unused};
use crate::vmsa::{Granule, align_down, root_alignment};

/// Bytes that one read may have.
const CHUNK: u64 = 4096;
/// Bytes of a context descriptor.
const CD: u64 = 64;
/// Reads of context descriptors that listing the PASIDs of one stream may cost: 16 MiB. A level 1 table, at most 32 reads, comes on top.
const MAX_READS: u32 = 4096;
/// PASIDs in one answer.
const MAX_PASIDS: usize = 1024;

/// The CD table of a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contexts<'a> {
    words: &'a Words,
    features: &'a Features,
    stream: &'a Stream,
    /// Log2 of the number of CDs; 0 without substreams.
    max: u8,
    /// Log2 of the number of CDs in a leaf table, if there are two levels.
    leaf: Option<u8>,
}

impl<'a> Contexts<'a> {
    pub(crate) fn new(words: &'a Words, features: &'a Features, stream: &'a Stream) -> Self {
        let max = if features.substream_bits() == 0 { 0 } else { ste::S1CDMAX.of(words) as u8 };
        let leaf = match ste::S1FMT.of(words) {
            1 if max > 0 => Some(6),
            2 if max > 0 => Some(10),
            _ => None,
        };
        Self { words, features, stream, max, leaf }
    }

    /// Requests without SubstreamID use substream 0, which no other request may.
    pub(crate) fn zero_is_taken(&self) -> bool {
        ste::S1DSS.of(self.words) == 2
    }

    /// The CD that a request uses, or nothing if it bypasses stage 1; IHI 0070 section 5.2, S1CDMax and S1DSS.
    pub(crate) fn select(&self, pasid: Option<u32>) -> Result<Option<u32>, Stop> {
        match pasid {
            None if self.max == 0 => Ok(Some(0)),
            None => match ste::S1DSS.of(self.words) {
                1 => Ok(None),
                2 => Ok(Some(0)),
                _ => unused("F_STREAM_DISABLED", "IHI 0070 section 5.2, S1DSS", "requests without SubstreamID are refused, as the driver wants it"),
            },
            Some(_) if self.max == 0 => unused("C_BAD_SUBSTREAMID", "IHI 0070 section 5.2, S1CDMax", "substreams are disabled"),
            Some(pasid) if u64::from(pasid) >> self.max != 0 => {
                unused("C_BAD_SUBSTREAMID", "IHI 0070 section 5.2, S1CDMax", "the SubstreamID lies outside the context descriptor table")
            }
            Some(0) if self.zero_is_taken() => {
                let reason = "substream 0 is for requests without SubstreamID";
                Err(bad_field("F_STREAM_DISABLED", "IHI 0070 section 5.2, S1DSS", reason, Some(ste::S1DSS)))
            }
            Some(pasid) => Ok(Some(pasid)),
        }
    }

    /// Address of the table: aligned to its size, and to 64 bytes at least.
    fn base(&self) -> u64 {
        let log2 = match self.leaf {
            Some(leaf) => (self.max.saturating_sub(leaf) + 3).max(6),
            None => self.max + 6,
        };
        align_down(ste::S1CONTEXTPTR.in_place(self.words), log2)
    }

    /// The structures of a nested stream are behind stage 2.
    fn read(&self, memory: &mut dyn GuestMemory, address: u64, length: u64) -> Result<Vec<u8>, Error> {
        match &self.stream.stage2 {
            Some(table) => memory.read_through(table, address, length as u32),
            None => memory.read(address, length as u32),
        }
    }

    /// The CDs that a level 1 descriptor leads to.
    fn leaf_table(&self, descriptor: u64, leaf: u8) -> Result<u64, Stop> {
        if l1cd::V.of(descriptor) == 0 {
            return unused("C_BAD_SUBSTREAMID", "IHI 0070 section 5.3", "the level 1 context descriptor is not valid");
        }
        let address = align_down(l1cd::L2PTR.in_place(descriptor), leaf + 6);
        let limit = if self.stream.stage2.is_some() { self.features.intermediate_bits() } else { self.features.physical_bits() };
        if address >> limit != 0 {
            let blocked = Blocked::refused(
                "C_BAD_SUBSTREAMID",
                "IHI 0070 section 5.3",
                "the address in the level 1 context descriptor lies beyond the address size",
            );
            return Err(Stop::Blocked(blocked.at(0, l1cd::L2PTR.mask())));
        }
        Ok(address)
    }

    /// Reads the CD of substream `index`, which `select` gave.
    pub(crate) fn find(&self, index: u32, memory: &mut dyn GuestMemory) -> Result<Words, Stop> {
        let index = u64::from(index);
        let behind = if self.stream.stage2.is_some() { " behind stage 2" } else { "" };
        let address = match self.leaf {
            Some(leaf) => {
                let address = self.base() + (index >> leaf) * 8;
                let what = format!("the level 1 context descriptor{behind}");
                let bytes = read_failed(self.read(memory, address, 8), "F_CD_FETCH", &what)?;
                let descriptor = stagecraft_sdk::bits::words(&bytes).first().copied().unwrap_or(0);
                let table = self.leaf_table(descriptor, leaf)?;
                notes::context_descriptor(memory, address, descriptor);
                table + (index & ((1 << leaf) - 1)) * CD
            }
            None => self.base() + index * CD,
        };
        let words = self.read(memory, address, CD).and_then(|bytes| structure(&bytes, address));
        let words = read_failed(words, "F_CD_FETCH", &format!("the context descriptor{behind}"))?;
        if cd::V.is_set(&words) {
            notes::context(memory, address, &words, self.features);
        }
        Ok(words)
    }

    /// The SubstreamIDs whose CD is valid, ascending; work and answer are bounded. What cannot be read has none.
    pub(crate) fn list(&self, memory: &mut dyn GuestMemory) -> Vec<u32> {
        let mut found = Vec::new();
        if self.max == 0 {
            return found;
        }
        let mut reads = MAX_READS;
        let first = u32::from(self.zero_is_taken());
        match self.leaf {
            None => self.list_table(memory, self.base(), 1 << self.max, 0, first, &mut reads, &mut found),
            Some(leaf) => {
                let entries = 1_u64 << self.max.saturating_sub(leaf);
                let per_leaf = 1_u64 << leaf.min(self.max);
                let mut done = 0;
                while done < entries && reads > 0 && found.len() < MAX_PASIDS {
                    let length = ((entries - done) * 8).min(CHUNK);
                    let bytes = self.read(memory, self.base() + done * 8, length).unwrap_or_default();
                    for (i, &descriptor) in stagecraft_sdk::bits::words(&bytes).iter().enumerate() {
                        if let Ok(address) = self.leaf_table(descriptor, leaf) {
                            let start = (done + i as u64) << leaf;
                            self.list_table(memory, address, per_leaf, start, first, &mut reads, &mut found);
                        }
                    }
                    done += length / 8;
                }
            }
        }
        found
    }

    /// The same for `count` CDs side by side, the first of which belongs to substream `start`.
    #[allow(clippy::too_many_arguments)]
    fn list_table(&self, memory: &mut dyn GuestMemory, base: u64, count: u64, start: u64, first: u32, reads: &mut u32, found: &mut Vec<u32>) {
        let mut done = 0;
        while done < count && *reads > 0 && found.len() < MAX_PASIDS {
            *reads -= 1;
            let length = ((count - done) * CD).min(CHUNK);
            let bytes = self.read(memory, base + done * CD, length).unwrap_or_default();
            for (i, bytes) in bytes.chunks_exact(CD as usize).enumerate() {
                let Ok(words) = structure(bytes, base) else { continue };
                let Ok(substream) = u32::try_from(start + done + i as u64) else { continue };
                let illegal = matches!(config(&words, self.words, self.features, self.stream), Err(Stop::Blocked(_)));
                if cd::V.is_set(&words) && !illegal && substream >= first && found.len() < MAX_PASIDS {
                    found.push(substream);
                }
            }
            done += length / CD;
        }
    }
}

/// The fields of one range of a CD.
struct RangeSlots {
    disabled: Slot,
    size: Slot,
    granule: fn(u64) -> Option<u8>,
    granule_slot: Slot,
    shareability: Slot,
    root: Slot,
    top_byte_ignored: Slot,
    hierarchy_disabled: Slot,
    unprivileged_disabled: Slot,
    suffix: &'static str,
}

const LOW: RangeSlots = RangeSlots {
    disabled: cd::EPD0,
    size: cd::T0SZ,
    granule: cd::granule0,
    granule_slot: cd::TG0,
    shareability: cd::SH0,
    root: cd::TTB0,
    top_byte_ignored: cd::TBI0,
    hierarchy_disabled: cd::HAD0,
    unprivileged_disabled: cd::E0PD0,
    suffix: "",
};
const HIGH: RangeSlots = RangeSlots {
    disabled: cd::EPD1,
    size: cd::T1SZ,
    granule: cd::granule1,
    granule_slot: cd::TG1,
    shareability: cd::SH1,
    root: cd::TTB1,
    top_byte_ignored: cd::TBI1,
    hierarchy_disabled: cd::HAD1,
    unprivileged_disabled: cd::E0PD1,
    suffix: "-high",
};

/// The granule and the size of a range.
struct RangeSize {
    granule: Granule,
    input_bits: u8,
    lpa2: bool,
}

impl RangeSlots {
    fn size(&self, words: &Words, features: &Features) -> Result<RangeSize, Stop> {
        let bad = |slot: Slot, name: &str, reason: &str| Err(bad_field("C_BAD_CD", &format!("IHI 0070 section 5.4, {name}"), reason, Some(slot)));
        let granule = match (self.granule)(self.granule_slot.of(words)).map(Granule::from_log2) {
            Some(granule) if features.has_granule(granule) => granule,
            _ => return bad(self.granule_slot, "TGx", "the granule is reserved or not implemented"),
        };
        let lpa2 = features.has_lpa2() && cd::DS.is_set(words) && granule != Granule::K64;
        let input_bits = 64 - self.size.of(words) as u8;
        let most = if features.has_52_bit_input() { granule.widest(lpa2) } else { 48 };
        if input_bits < features.least_input_bits(granule) || input_bits > most {
            return bad(self.size, "TxSZ", "the input address size is out of range");
        }
        Ok(RangeSize { granule, input_bits, lpa2 })
    }

    /// Flags of the range, and its root as the hardware aligns it.
    fn settings(&self, words: &Words, size: &RangeSize, output_bits: u8, features: &Features, stream: &Stream) -> Vec<(String, u64)> {
        let two = !stream.single_privilege;
        let had = features.has3(idr3::HAD) && self.hierarchy_disabled.is_set(words);
        let e0pd = two && features.has3(idr3::E0PD) && self.unprivileged_disabled.is_set(words);
        let start = size.granule.start(size.input_bits);
        let index_bits = size.granule.first_index_bits(size.input_bits, start, 0).unwrap_or(0);
        let root = align_down(self.root.in_place(words), root_alignment(index_bits, output_bits));
        let flags = [
            ("tbi", self.top_byte_ignored.is_set(words)),
            ("hierarchy-disabled", had),
            ("unprivileged-disabled", e0pd),
            ("non-shareable", size.lpa2 && self.shareability.of(words) < 2),
        ];
        let flags = flags.into_iter().filter(|&(_, set)| set).map(|(name, _)| (format!("{name}{}", self.suffix), 1));
        std::iter::once((format!("root{}", self.suffix), root)).chain(flags).collect()
    }
}

/// IHI 0070 section 5.4.2, `CdIllegal`, without what concerns the ranges.
fn check(words: &Words, entry: &Words, features: &Features, stream: &Stream, off: (bool, bool)) -> Result<(), Stop> {
    let bad = bad_context;
    if !cd::V.is_set(words) {
        return unused("C_BAD_CD", "IHI 0070 section 5.4, V", "the context descriptor is not valid");
    }
    if features.idr0(idr0::TERM_MODEL) != 0 && !cd::A.is_set(words) {
        return bad("A", "faults always abort: A must be 1");
    }
    match (features.idr0(idr0::STALL_MODEL), cd::S.is_set(words)) {
        (1, true) => return bad("S", "stalls are not implemented"),
        (2, false) => return bad("S", "stalls are forced"),
        (_, true) if ste::S1STALLD.is_set(entry) => return bad("S", "the stream table entry forbids stalls"),
        _ => {}
    }
    if off != (true, true) && !features.allows_endianness(cd::ENDI.is_set(words)) {
        return bad("ENDI", "this byte order is not implemented");
    }
    if !cd::AA64.is_set(words) {
        if features.has_d128() {
            return unsupported("128-bit descriptors (VMSAv9-128) at stage 1");
        }
        if features.idr0(idr0::TTF) & 1 == 0 {
            return bad("AA64", "AArch32 tables are not implemented");
        }
        return unsupported("AArch32 tables (VMSAv8-32 LPAE) at stage 1");
    }
    if features.idr0(idr0::TTF) & 2 == 0 {
        return bad("AA64", "AArch64 tables are not implemented");
    }
    let httu = features.idr0(idr0::HTTU);
    let (access, dirty) = (cd::HA.is_set(words), cd::HD.is_set(words));
    if ((access || dirty) && httu == 0) || (dirty && httu == 1) || (httu == 3 && cd::HAFT.is_set(words) && !access) {
        return bad("HA", "hardware updates that are not implemented, or of tables alone");
    }
    // In EL2, where there is one privilege level, the ASID plays no part.
    if !stream.single_privilege && features.idr0(idr0::ASID16) == 0 && cd::ASID.of(words) > 0xff {
        return bad("ASID", "the ASID has more than 8 bits");
    }
    if features.has3(idr3::S1PI) && ste::S1PIE.is_set(entry) && cd::PIE.is_set(words) {
        return unsupported("stage 1 permission indirection");
    }
    if features.has3(idr3::AIE) && cd::AIE.is_set(words) {
        return unsupported("the stage 1 attribute index extension");
    }
    Ok(())
}

/// Whether the CD keeps unprivileged requests from the half that `iova` is in: E0PD0, E0PD1. Bit 55 says which half it is (IHI 0070 section 3.4.1).
pub(crate) fn refuses_unprivileged(words: &Words, features: &Features, iova: u64) -> bool {
    let half = if iova >> 55 & 1 == 0 { &LOW } else { &HIGH };
    features.has3(idr3::E0PD) && half.unprivileged_disabled.is_set(words)
}

/// The stage 1 table of a CD that was reached through the STE `entry`.
pub(crate) fn config(words: &Words, entry: &Words, features: &Features, stream: &Stream) -> Result<TableConfig, Stop> {
    // With one privilege level there is no high range and no EPD.
    let off_low = !stream.single_privilege && LOW.disabled.is_set(words);
    let off_high = stream.single_privilege || HIGH.disabled.is_set(words);
    check(words, entry, features, stream, (off_low, off_high))?;
    let low = if off_low { None } else { Some(LOW.size(words, features)?) };
    let high = if off_high { None } else { Some(HIGH.size(words, features)?) };
    let Some(any) = low.as_ref().or(high.as_ref()) else {
        return unused("F_TRANSLATION", "IHI 0070 section 5.4.1.1", "both ranges are disabled: every address faults");
    };
    let pan = !stream.single_privilege && cd::PAN.is_set(words);
    if pan && stream.privileged && features.has3(idr3::EPAN) && cd::EPAN.is_set(words) {
        return unsupported("enhanced PAN for a privileged stream");
    }

    let output_bits = address_size(cd::IPS.of(words)).min(features.output_bits());
    let mut config = TableConfig::new(
        Stage1::NAME,
        &[("granule", any.granule.bytes()), ("input-bits", any.input_bits.into()), ("output-bits", output_bits.into())],
    );
    let settings = &mut config.settings;
    match &low {
        Some(size) => LOW.settings(words, size, output_bits, features, stream).iter().for_each(|(name, value)| settings.set(name, *value)),
        None => settings.set("low-disabled", 1),
    }
    if let Some(size) = &high {
        settings.set("granule-high", size.granule.bytes());
        settings.set("input-bits-high", size.input_bits.into());
        HIGH.settings(words, size, output_bits, features, stream).iter().for_each(|(name, value)| settings.set(name, *value));
    }
    if cd::MAIR.of(words) != LINUX_MAIR {
        settings.set("mair", cd::MAIR.of(words));
    }
    let lpa2 = [&low, &high].into_iter().flatten().any(|size| size.lpa2);
    let lpa = output_bits != 52 && [&low, &high].into_iter().flatten().any(|size| features.has_lpa(size.granule));
    let access = cd::HA.is_set(words);
    let flags = [
        ("hardware-access", access),
        ("hardware-dirty", access && cd::HD.is_set(words)),
        ("access-flag-disabled", !access && cd::AFFD.is_set(words)),
        ("hardware-table-access", access && features.marks_tables() && cd::HAFT.is_set(words)),
        ("big-endian", cd::ENDI.is_set(words)),
        ("lpa", lpa),
        ("lpa2", lpa2),
        ("privileged", stream.privileged && !stream.single_privilege),
        ("single-privilege", stream.single_privilege),
        ("wxn", cd::WXN.is_set(words)),
        ("pan", pan),
    ];
    flags.into_iter().filter(|&(_, set)| set).for_each(|(name, _)| settings.set(name, 1));
    refused("C_BAD_CD", "IHI 0070 section 5.4, TTBx", Stage1::open(settings))?;
    Ok(config)
}
