//! What the models get wrong: the one list of reasons why a test does not ask something, or expects another answer.
//!
//! Found with QEMU 10.0.2 by comparison with known tables, and with the architectures' texts where the two differed.

/// A known error of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KnownError {
    /// The model.
    pub model: &'static str,
    /// What it does, and what the architecture says.
    pub what: &'static str,
}

const fn error(model: &'static str, what: &'static str) -> KnownError {
    KnownError { model, what }
}

/// Five levels are not walked.
pub const VTD_FIVE_LEVELS: KnownError =
    error("intel-iommu", "no second or first stage of five levels: the capabilities offer three and four, or four");

/// No nested translation.
pub const VTD_NESTED: KnownError = error("intel-iommu", "no nested translation: ECAP.NEST is 0");

/// Pages around the interrupt range.
pub const VTD_INTERRUPT_PAGES: KnownError = error(
    "intel-iommu",
    "a page that has 0xfee00000..=0xfeefffff somewhere in it is refused as a whole, not only where a request's address comes to lie in that range",
);

/// The snoop bit.
pub const VTD_SNOOP: KnownError =
    error("intel-iommu", "in scalable mode SNP is accepted in leaves of the second stage although ECAP.SC is 0, which makes it reserved");

/// Leaves of the first stage that have one of two marks.
pub const VTD_ONE_MARK: KnownError = error("intel-iommu", "a write through a leaf of the first stage that has one of A and D does not set the other");

/// Concatenated start tables of stage 2.
pub const SMMU_CONCATENATED: KnownError = error("SMMUv3", "of concatenated start tables of stage 2 it always walks the first");

/// The two bits that say what unprivileged requests may do.
pub const SMMU_PRIVILEGED: KnownError = error("SMMUv3", "AP[1] and APTable[0] are not looked at: every request passes for a privileged one");

/// TBI1 is not looked at.
pub const SMMU_TBI1: KnownError = error("SMMUv3", "whether the top byte is ignored in the upper half is taken from TBI0");

/// Blocks where there are none.
pub const SMMU_BLOCKS: KnownError =
    error("SMMUv3", "a block descriptor is accepted at levels that have none: with 16K and 64K granules at level 1, and at level 0");

/// Bits 15:12 of descriptors of 64K tables.
pub const SMMU_64K_BITS: KnownError = error(
    "SMMUv3",
    "bits 15:12 of a descriptor of the 64K granule are ignored. They are address bits 51:48 where there are such; where not, as here, the architecture allows this, \
     and that they count as an address that is too large, as the engine has it",
);

/// Some faults of stage 2 leave no event.
pub const SMMU_UNRECORDED: KnownError =
    error("SMMUv3", "with stage 2 alone, an IOVA beyond OAS leaves no event: it counts as an error of stage 1, whose CD.R is not set");

/// The address of the first table of a nested stage 1 is cut off.
pub const SMMU_NESTED_ROOT: KnownError =
    error("SMMUv3", "with two stages, the address of stage 1's first table is cut to CD.IPS after stage 2 has translated it");

/// A table of a nested stage 1 that is larger than a page of stage 2.
pub const SMMU_NESTED_TABLES: KnownError =
    error("SMMUv3", "with two stages, only the first byte of a stage 1 table is translated; the rest is taken to follow it");

/// The bit for unprivileged requests.
pub const RISCV_USER: KnownError =
    error("riscv-iommu-pci", "U is not looked at, neither in the first stage (requests are unprivileged) nor in the second");

/// The permissions of two stages.
pub const RISCV_TWO_STAGES: KnownError = error(
    "riscv-iommu-pci",
    "with two stages, a read faults where the first stage allows writing and the second does not; a write faults if the second stage forbids to write the first \
     one's tables",
);

/// Bits above the address.
pub const RISCV_UPPER_BITS: KnownError =
    error("riscv-iommu-pci", "bits 63:54 of an entry are taken for a part of its address: N, PBMT and reserved bits neither work nor fault properly");

/// Bits that are reserved in pointers.
pub const RISCV_POINTER_BITS: KnownError = error("riscv-iommu-pci", "A, D and U in an entry that points to a table do not fault");

/// Writes to pages that were not accessed.
pub const RISCV_ACCESSED: KnownError =
    error("riscv-iommu-pci", "a write is refused if D is clear, and not if A is: both must be set where hardware does not set them");

/// Addresses beyond what the paging mode covers.
pub const AMD_WIDTH: KnownError = error("amd-iommu", "an IOVA beyond what the paging mode covers is cut off instead of refused");

/// The bits of levels that are left out.
pub const AMD_SKIPPED: KnownError = error("amd-iommu", "where NextLevel leaves out levels, the IOVA's bits of these levels are not looked at");

/// Leaves that are not present.
pub const AMD_PRESENT: KnownError = error("amd-iommu", "PR is not looked at in a leaf: its IR and IW alone decide");

/// Reserved bits.
pub const AMD_RESERVED: KnownError =
    error("amd-iommu", "bits 58:52 are not looked at, nor bits 60:59 of an entry that points to a table: reserved bits do not fault");

/// Leaves of the highest level.
pub const AMD_LEVEL_6: KnownError = error("amd-iommu", "an entry of level 6 may be a leaf; there are none at this level");

/// Coded sizes.
pub const AMD_SIZES: KnownError =
    error("amd-iommu", "NextLevel 7 may code any size, also one that is not between the sizes of the entry's own level and of the one above");

/// No events.
pub const AMD_EVENTS: KnownError = error("amd-iommu", "no event is ever logged: the check whether the log has overflown always says yes");

/// Tables that refer to themselves.
pub const AMD_LOOPS: KnownError = error(
    "amd-iommu",
    "NextLevel may be the table's own level or a higher one, and the walk may never end: try nothing whose way does not end by itself",
);

/// No guest translation.
pub const AMD_VERSION_2: KnownError =
    error("amd-iommu", "v2 tables (GCR3) are not for requests without PASID, and the device has no others: EXT_FEATURES.GIoSup is 0");

/// All of them.
pub const ALL: &[KnownError] = &[
    VTD_FIVE_LEVELS,
    VTD_NESTED,
    VTD_INTERRUPT_PAGES,
    VTD_SNOOP,
    VTD_ONE_MARK,
    SMMU_CONCATENATED,
    SMMU_PRIVILEGED,
    SMMU_TBI1,
    SMMU_BLOCKS,
    SMMU_64K_BITS,
    SMMU_UNRECORDED,
    SMMU_NESTED_ROOT,
    SMMU_NESTED_TABLES,
    RISCV_USER,
    RISCV_TWO_STAGES,
    RISCV_UPPER_BITS,
    RISCV_POINTER_BITS,
    RISCV_ACCESSED,
    AMD_WIDTH,
    AMD_SKIPPED,
    AMD_PRESENT,
    AMD_RESERVED,
    AMD_LEVEL_6,
    AMD_SIZES,
    AMD_EVENTS,
    AMD_LOOPS,
    AMD_VERSION_2,
];
