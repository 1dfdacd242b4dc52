//! Stream table entry, IHI 0070 section 5.2.

crate::spec::slots! {
    /// Valid.
    V = [0:0];
    /// 0b0xx abort, 0b100 bypass, 0b101 stage 1, 0b110 stage 2, 0b111 both.
    CONFIG = [3:1];
    /// CD table: 0 linear, 1 two levels with 4K leaves, 2 two levels with 64K leaves.
    S1FMT = [5:4];
    /// Address of the CD or CD table, in place.
    S1CONTEXTPTR = [55:6];
    /// RES0.
    RESERVED_0 = [58:56];
    /// Number of CDs, log2.
    S1CDMAX = [63:59];
    /// Requests without SubstreamID: 0 refuse, 1 bypass stage 1, 2 use substream 0.
    S1DSS = [65:64];
    /// Inner cacheability of the CD.
    S1CIR = [67:66];
    /// Outer cacheability of the CD.
    S1COR = [69:68];
    /// Shareability of the CD.
    S1CSH = [71:70];
    /// Stage 1 permission indirection is allowed.
    S1PIE = [88:88];
    /// Stage 2 gives the memory type.
    S2FWB = [89:89];
    /// CDs give partition numbers, which VMSPTR leads to the meaning of.
    S1MPAM = [90:90];
    /// Stage 1 must not stall.
    S1STALLD = [91:91];
    /// ATS: 0 none, 1 full, 2 split-stage, 3 full with a device permission table.
    EATS = [93:92];
    /// 0b00 EL1, 0b10 EL2 or EL2-E2H.
    STRW = [95:94];
    /// RES0.
    RESERVED_1 = [107:105];
    /// 0b10 unprivileged, 0b11 privileged.
    PRIVCFG = [113:112];
    /// 0b10 reads are of data, 0b11 of instructions.
    INSTCFG = [115:114];
    /// VMID.
    S2VMID = [143:128];
    /// 64 minus the input address size.
    S2T0SZ = [165:160];
    /// Start level, see `start_level`.
    S2SL0 = [167:166];
    /// Inner cacheability of table walks.
    S2IR0 = [169:168];
    /// Outer cacheability of table walks.
    S2OR0 = [171:170];
    /// Shareability of table walks, and with S2DS of everything.
    S2SH0 = [173:172];
    /// 0 4K, 1 64K, 2 16K.
    S2TG = [175:174];
    /// Output address size.
    S2PS = [178:176];
    /// 64-bit descriptors.
    S2AA64 = [179:179];
    /// Tables are big-endian.
    S2ENDI = [180:180];
    /// AF counts as 1.
    S2AFFD = [181:181];
    /// Stage 1 tables in device memory are refused.
    S2PTW = [182:182];
    /// Hardware sets dirty marks.
    S2HD = [183:183];
    /// Hardware sets the Access flag.
    S2HA = [184:184];
    /// Stall on faults.
    S2S = [185:185];
    /// Record faults.
    S2R = [186:186];
    /// Hardware sets the Access flag of tables.
    S2HAFT = [187:187];
    /// Permission indirection.
    S2PIE = [188:188];
    /// Permission overlays.
    S2POE = [189:189];
    /// Bit 2 of S2SL0.
    S2SL0_2 = [194:194];
    /// LPA2.
    S2DS = [195:195];
    /// Table address bits 51:4, in place.
    S2TTB = [243:196];
    /// RES0 without 128-bit descriptors.
    RESERVED_3 = [255:244];
    /// Accesses must come through tables that stage 2 assures.
    ASSURED_ONLY = [329:329];
    /// Checks of top-level tables.
    TL = [331:330];
    /// Address of the VM structure, in place.
    VMSPTR = [375:332];
}

/// The output address size that a unit must have for a walk that starts here; DDI 0487, `AArch64.S2InvalidSL`. `granule` is log2.
pub(crate) const fn start_level_needs(granule: u8, start: i8) -> u8 {
    match (granule, start) {
        (12, 0) | (16, 1) => 44,
        (14, 1) => 42,
        _ => 0,
    }
}

/// The start level, or nothing if the encoding is reserved; DDI 0487 tables D8-19, D8-29 and D8-38. `granule` is log2.
pub(crate) const fn start_level(granule: u8, sl0: u64, sl0_2: bool) -> Option<i8> {
    match (granule, sl0, sl0_2) {
        (12, 0, true) => Some(-1),
        (12, 2, false) | (14, 3, _) => Some(0),
        (12, 1, false) | (14 | 16, 2, _) => Some(1),
        (12, 0, false) | (14 | 16, 1, _) => Some(2),
        (12, 3, false) | (14 | 16, 0, _) => Some(3),
        _ => None,
    }
}
