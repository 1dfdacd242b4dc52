//! Formats with settings, as source or target of a conversion.

/// A format and its settings.
pub type Side = (&'static str, &'static [(&'static str, u64)]);

/// Formats in all that concerns where addresses are, how wide entries are, and which pages there are.
pub const SIDES: [Side; 25] = [
    ("arm-smmuv3/stage1", &[]),
    ("arm-smmuv3/stage1", &[("granule", 16384)]),
    ("arm-smmuv3/stage1", &[("granule", 65536), ("output-bits", 52)]),
    ("arm-smmuv3/stage1", &[("lpa2", 1), ("input-bits", 52), ("output-bits", 52), ("big-endian", 1)]),
    ("arm-smmuv3/stage2", &[]),
    ("intel-vtd/first-stage", &[]),
    ("intel-vtd/second-stage", &[]),
    ("intel-vtd/second-stage", &[("page-2m", 0), ("page-1g", 0)]),
    ("amd-vi/v1", &[]),
    ("amd-vi/v1", &[("next-level-7", 1)]),
    ("amd-vi/v2", &[]),
    ("riscv-iommu/first-stage", &[]),
    ("riscv-iommu/first-stage", &[("svnapot", 1)]),
    ("riscv-iommu/first-stage", &[("svnapot", 1), ("big-endian", 1)]),
    ("riscv-iommu/first-stage", &[("levels", 2)]),
    ("riscv-iommu/first-stage", &[("levels", 2), ("big-endian", 1)]),
    ("riscv-iommu/second-stage", &[]),
    ("s390-zpci/dma", &[]),
    ("loongarch/paging", &[]),
    ("loongarch/paging", &[("granule", 4096)]),
    ("apple-dart/dart1", &[("granule", 4096)]),
    ("apple-dart/dart1", &[("input-bits", 36)]),
    ("apple-dart/dart2", &[("input-bits", 36)]),
    ("arm-v7s/short", &[]),
    ("arm-v7s/short", &[("split", 1), ("output-bits", 40)]),
];
