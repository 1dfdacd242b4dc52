//! Context descriptor, IHI 0070 section 5.4.

crate::spec::slots! {
    /// 64 minus the input address size of the low range.
    T0SZ = [5:0];
    /// Granule of the low range: 0 4K, 1 64K, 2 16K.
    TG0 = [7:6];
    /// Inner cacheability of table walks from TTB0.
    IR0 = [9:8];
    /// Outer cacheability of table walks from TTB0.
    OR0 = [11:10];
    /// Shareability of table walks from TTB0, and with DS of everything below it.
    SH0 = [13:12];
    /// The low range is off.
    EPD0 = [14:14];
    /// Tables are big-endian.
    ENDI = [15:15];
    /// As T0SZ for the high range.
    T1SZ = [21:16];
    /// Granule of the high range: 1 16K, 2 4K, 3 64K.
    TG1 = [23:22];
    /// As IR0.
    IR1 = [25:24];
    /// As OR0.
    OR1 = [27:26];
    /// As SH0.
    SH1 = [29:28];
    /// The high range is off.
    EPD1 = [30:30];
    /// Valid.
    V = [31:31];
    /// Output address size.
    IPS = [34:32];
    /// AF counts as 1.
    AFFD = [35:35];
    /// Writable memory is not executable.
    WXN = [36:36];
    /// The same for privileged fetches of user-writable memory; ignored with 64-bit descriptors.
    UWXN = [37:37];
    /// Bits 63:56 of an address in the low range play no part.
    TBI0 = [38:38];
    /// Bits 63:56 of an address in the high range play no part.
    TBI1 = [39:39];
    /// Privileged data accesses to user memory are refused.
    PAN = [40:40];
    /// 64-bit descriptors.
    AA64 = [41:41];
    /// Hardware sets dirty marks.
    HD = [42:42];
    /// Hardware sets the Access flag.
    HA = [43:43];
    /// Stall on faults.
    S = [44:44];
    /// Record faults.
    R = [45:45];
    /// Abort on faults.
    A = [46:46];
    /// The ASID is not shared with processors.
    ASET = [47:47];
    /// Address space identifier.
    ASID = [63:48];
    /// Attributes in table descriptors of the low range are ignored.
    HAD0 = [65:65];
    /// Unprivileged requests to the low range fault.
    E0PD0 = [66:66];
    /// Hardware sets the Access flag of tables.
    HAFT = [67:67];
    /// Table address bits 51:4, in place.
    TTB0 = [115:68];
    /// PAN also looks at unprivileged execute permission.
    EPAN = [123:123];
    /// As HAD0.
    HAD1 = [129:129];
    /// As E0PD0.
    E0PD1 = [130:130];
    /// Attribute index extension.
    AIE = [131:131];
    /// As TTB0.
    TTB1 = [179:132];
    /// LPA2.
    DS = [186:186];
    /// Permission indirection.
    PIE = [187:187];
    /// Eight attribute bytes.
    MAIR = [255:192];
}

/// Log2 of the granule in TG0 and S2TG.
pub(crate) const fn granule0(code: u64) -> Option<u8> {
    match code {
        0 => Some(12),
        1 => Some(16),
        2 => Some(14),
        _ => None,
    }
}

/// TG0's code for a granule of `2^log2` bytes.
pub(crate) const fn granule0_code(log2: u8) -> u64 {
    match log2 {
        14 => 2,
        16 => 1,
        _ => 0,
    }
}

/// Log2 of the granule in TG1.
pub(crate) const fn granule1(code: u64) -> Option<u8> {
    match code {
        1 => Some(14),
        2 => Some(12),
        3 => Some(16),
        _ => None,
    }
}

/// TG1's code for a granule of `2^log2` bytes.
pub(crate) const fn granule1_code(log2: u8) -> u64 {
    match log2 {
        14 => 1,
        16 => 3,
        _ => 2,
    }
}
