//! Registers and the level 1 descriptors that they and the STE lead to.

/// IHI 0070 section 6.3.9.
pub(crate) mod cr0 {
    crate::spec::fields! {
        /// Non-secure streams are translated.
        SMMUEN = [0:0];
    }
}

/// IHI 0070 section 6.3.12.
pub(crate) mod cr2 {
    crate::spec::fields! {
        /// STRW 0b10 is EL2-E2H, with two privilege levels and two ranges.
        E2H = [0:0];
        /// C_BAD_STREAMID is recorded.
        RECINVSID = [1:1];
    }
}

/// IHI 0070 section 6.3.14.
pub(crate) mod gbpa {
    crate::spec::fields! {
        /// While the SMMU is disabled, everything is refused.
        ABORT = [20:20];
    }
}

/// IHI 0070 section 6.3.1.
pub(crate) mod idr0 {
    crate::spec::fields! {
        /// Stage 2 is there.
        S2P = [0:0];
        /// Stage 1 is there.
        S1P = [1:1];
        /// Translation table formats: bit 0 AArch32, bit 1 AArch64.
        TTF = [3:2];
        /// Accesses to tables and structures snoop.
        COHACC = [4:4];
        /// Hardware updates: 1 Access flag, 2 and dirty state, 3 and the Access flag of tables.
        HTTU = [7:6];
        /// STRW is not RES0.
        HYP = [9:9];
        /// ATS is there.
        ATS = [10:10];
        /// Split-stage ATS is not there.
        NS1ATS = [11:11];
        /// 16-bit ASIDs.
        ASID16 = [12:12];
        /// Page requests are there.
        PRI = [16:16];
        /// 16-bit VMIDs.
        VMID16 = [18:18];
        /// Two-level CD tables.
        CD2L = [19:19];
        /// Byte order of tables: 0 either, 2 little, 3 big.
        TTENDIAN = [22:21];
        /// Stalls: 0 configurable, 1 never, 2 always.
        STALL_MODEL = [25:24];
        /// CD.A must be 1.
        TERM_MODEL = [26:26];
        /// Two-level stream tables.
        ST_LEVEL = [28:27];
    }
}

/// IHI 0070 section 6.3.2.
pub(crate) mod idr1 {
    crate::spec::fields! {
        /// StreamID bits.
        SIDSIZE = [5:0];
        /// SubstreamID bits.
        SSIDSIZE = [10:6];
        /// PRIVCFG and INSTCFG work.
        ATTR_PERMS_OVR = [26:26];
    }
}

/// IHI 0070 section 6.3.4.
pub(crate) mod idr3 {
    crate::spec::fields! {
        /// CD.HAD0 and CD.HAD1 work.
        HAD = [2:2];
        /// Memory is partitioned: STE.S1MPAM and STE.VMSPtr work.
        MPAM = [7:7];
        /// STE.S2FWB works.
        FWB = [8:8];
        /// TxSZ up to 48 (47 with 64K).
        STT = [9:9];
        /// Invalidation by ranges.
        RIL = [10:10];
        /// CD.E0PD0 and CD.E0PD1 work.
        E0PD = [13:13];
        /// Device permission tables: STE.EATS 0b11 works.
        DPT = [15:15];
        /// CD.EPAN works.
        EPAN = [17:17];
        /// CD.PIE works.
        S1PI = [18:18];
        /// STE.S2PIE works.
        S2PI = [19:19];
        /// STE.S2POE works.
        S2PO = [20:20];
        /// Translation hardening: STE.AssuredOnly, TL0 and TL1 work.
        THE = [21:21];
        /// CD.AIE works.
        AIE = [23:23];
    }
}

/// IHI 0070 section 6.3.6.
pub(crate) mod idr5 {
    crate::spec::fields! {
        /// Output address size, coded as IPS is.
        OAS = [2:0];
        /// 4K granule.
        GRAN4K = [4:4];
        /// 16K granule.
        GRAN16K = [5:5];
        /// 64K granule.
        GRAN64K = [6:6];
        /// LPA2: 52-bit addresses with the 4K and 16K granules.
        DS = [7:7];
        /// 128-bit descriptors.
        D128 = [8:8];
        /// Virtual addresses: 0 48 bits, 1 52 bits, 2 56 bits.
        VAX = [11:10];
    }
}

/// IHI 0070 section 6.3.24.
pub(crate) mod strtab_base {
    crate::spec::fields! {
        /// Address, in place.
        ADDR = [55:6];
        /// Read-allocate hint.
        RA = [62:62];
    }
}

/// IHI 0070 section 6.3.25.
pub(crate) mod strtab_base_cfg {
    crate::spec::fields! {
        /// Number of StreamIDs, log2.
        LOG2SIZE = [5:0];
        /// StreamID bits of a second-level table: 6, 8 or 10.
        SPLIT = [10:6];
        /// 0 linear, 1 two levels.
        FMT = [17:16];
    }
}

/// Level 1 stream table descriptor, IHI 0070 section 5.1.
pub(crate) mod l1std {
    crate::spec::fields! {
        /// `2^(SPAN-1)` STEs; 0 and 12 to 31 are invalid.
        SPAN = [4:0];
        /// RES0.
        RESERVED_LOW = [5:5];
        /// Address of the STEs, in place.
        L2PTR = [55:6];
        /// RES0.
        RESERVED_HIGH = [63:56];
    }
}

/// Level 1 context descriptor, IHI 0070 section 5.3.
pub(crate) mod l1cd {
    crate::spec::fields! {
        /// L2PTR is valid.
        V = [0:0];
        /// RES0.
        RESERVED_LOW = [11:1];
        /// Address of the CDs, in place.
        L2PTR = [55:12];
        /// RES0.
        RESERVED_HIGH = [63:56];
    }
}

/// IDR5.OAS in bits; IHI 0070 section 6.3.6.
pub(crate) const fn physical_address_size(code: u64) -> u8 {
    if code == 7 { 56 } else { address_size(code) }
}

/// IDR5.OAS, CD.IPS and STE.S2PS in bits, as the 64-bit table formats can use it; IHI 0070 sections 5.2, 5.4 and 6.3.6.
pub(crate) const fn address_size(code: u64) -> u8 {
    match code {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        5 => 48,
        _ => 52,
    }
}

/// The other way; the smallest code that has `bits`.
pub(crate) const fn address_size_code(bits: u8) -> u64 {
    match bits {
        0..=32 => 0,
        33..=36 => 1,
        37..=40 => 2,
        41..=42 => 3,
        43..=44 => 4,
        45..=48 => 5,
        _ => 6,
    }
}
