//! Translation table descriptors of VMSAv8-64, DDI 0487 section D8.3.1. Where the output address stands is the business of `vmsa`.

/// Bit 0 of a valid descriptor.
pub(crate) const VALID: u64 = 1 << 0;
/// Bits 1:0: 0b11 is a table, or at level 3 a page; 0b01 is a block, or at level 3 reserved.
pub(crate) const TYPE: u64 = 0b11;
/// A table, or at level 3 a page.
pub(crate) const TABLE_OR_PAGE: u64 = 0b11;
/// A block.
pub(crate) const BLOCK: u64 = 0b01;

/// Table descriptor of stage 1, table D8-50; stage 2 has none of these.
pub(crate) mod table {
    crate::spec::fields! {
        /// Nothing below is executable by privileged requests.
        PXN_TABLE = [59:59];
        /// Nothing below is executable by unprivileged requests.
        UXN_TABLE = [60:60];
        /// APTable[0]: nothing below is accessible to unprivileged requests.
        PRIVILEGED_ONLY = [61:61];
        /// APTable[1]: nothing below is writable.
        READ_ONLY = [62:62];
    }
}

/// Block and page descriptor of stage 1, table D8-52.
pub(crate) mod stage1 {
    crate::spec::fields! {
        /// Index into MAIR.
        ATTR_INDEX = [4:2];
        /// AP[1]: unprivileged requests pass.
        UNPRIVILEGED = [6:6];
        /// AP[2]: writes do not pass; with DBM, clean.
        READ_ONLY = [7:7];
        /// Shareability: 0 non-shareable, 2 outer, 3 inner; with LPA2 address bits 51:50.
        SH = [9:8];
        /// Access flag.
        AF = [10:10];
        /// Not global: belongs to one ASID.
        NG = [11:11];
        /// Dirty bit modifier: hardware may clear AP[2].
        DBM = [51:51];
        /// Privileged execute never.
        PXN = [53:53];
        /// Unprivileged execute never.
        UXN = [54:54];
    }
}

/// Block and page descriptor of stage 2, table D8-53.
pub(crate) mod stage2 {
    crate::spec::fields! {
        /// Memory type, tables D8-96 and D8-101.
        MEM_ATTR = [5:2];
        /// S2AP[0]: reads pass.
        READ = [6:6];
        /// S2AP[1]: writes pass; with DBM, dirty.
        WRITE = [7:7];
        /// As in stage 1.
        SH = [9:8];
        /// Access flag.
        AF = [10:10];
        /// Dirty bit modifier: hardware may set S2AP[1].
        DBM = [51:51];
        /// Execute never: 0 never forbidden, 1 only unprivileged, 2 forbidden, 3 only privileged. Bit 1 stands at 54.
        XN = [54:53];
    }
}
