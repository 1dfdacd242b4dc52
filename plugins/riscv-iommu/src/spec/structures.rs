//! Structures between the device directory table pointer and the page tables: IOMMU sections 2.1 and 2.2. Words are counted from 0.

use stagecraft_sdk::bits::{Field, bit, mask};

/// Pointer to a further table of a device or process directory, IOMMU sections 2.1.1 and 2.2.1: 8 bytes.
pub(crate) mod pointer {
    use super::{Field, bit, mask};

    /// Size in bytes.
    pub(crate) const BYTES: u64 = 8;
    /// Valid.
    pub(crate) const V: u64 = bit(0);
    /// Page number of the table.
    pub(crate) const PPN: Field = Field::new(53, 10);
    /// Must be zero.
    pub(crate) const RESERVED: u64 = mask(9, 1) | mask(63, 54);
}

/// Word 0 of a device context, IOMMU section 2.1.3.1. Bits 31:24 are a vendor's own.
pub(crate) mod tc {
    use super::{bit, mask};

    /// Valid.
    pub(crate) const V: u64 = bit(0);
    /// Address translation services.
    pub(crate) const EN_ATS: u64 = bit(1);
    /// Page requests.
    pub(crate) const EN_PRI: u64 = bit(2);
    /// Translation services answer guest-physical addresses.
    pub(crate) const T2GPA: u64 = bit(3);
    /// Faults of the device are not reported, but for those of the directory.
    pub(crate) const DTF: u64 = bit(4);
    /// Word 3 points to a process directory.
    pub(crate) const PDTV: u64 = bit(5);
    /// Responses to page requests carry the process id.
    pub(crate) const PRPR: u64 = bit(6);
    /// Hardware sets accessed and dirty flags in the second stage.
    pub(crate) const GADE: u64 = bit(7);
    /// Hardware sets accessed and dirty flags in the first stage.
    pub(crate) const SADE: u64 = bit(8);
    /// Requests without process id use process 0.
    pub(crate) const DPE: u64 = bit(9);
    /// Process directory and first stage are big-endian.
    pub(crate) const SBE: u64 = bit(10);
    /// First stages have the formats of 32-bit supervisors.
    pub(crate) const SXL: u64 = bit(11);
    /// Must be zero.
    pub(crate) const RESERVED: u64 = mask(23, 12) | mask(63, 32);
}

/// A word with a page number and a mode: words 1 (iohgatp), 3 (fsc) and 4 (msiptp) of a device context, IOMMU sections 2.1.3.2, 2.1.3.4 and
/// 2.1.3.5, and word 1 (fsc) of a process context, IOMMU section 2.2.3.2.
pub(crate) mod atp {
    use super::{Field, mask};

    /// Page number.
    pub(crate) const PPN: Field = Field::new(43, 0);
    /// Must be zero; in word 1 of a device context it is [`GSCID`].
    pub(crate) const RESERVED: u64 = mask(59, 44);
    /// Word 1 of a device context: the guest's id.
    pub(crate) const GSCID: Field = Field::new(59, 44);
    /// Mode.
    pub(crate) const MODE: Field = Field::new(63, 60);

    /// [`MODE`] of all of them: nothing.
    pub(crate) const BARE: u64 = 0;
    /// [`MODE`] of a process directory: the levels, up to this many.
    pub(crate) const THREE_LEVELS: u64 = 3;
    /// [`MODE`] of MSI page tables.
    pub(crate) const FLAT: u64 = 1;
    /// [`MODE`] of a stage: three levels, and with the formats of 32-bit software two. Four and five levels follow.
    pub(crate) const FEWEST_LEVELS: u64 = 8;
}

/// Word 2 of a device context, IOMMU section 2.1.3.3.
pub(crate) mod ta {
    use super::{Field, mask};

    /// Id of the address space; also in word 0 of a process context.
    pub(crate) const PSCID: Field = Field::new(31, 12);

    /// Must be zero.
    pub(crate) const RESERVED: u64 = mask(11, 0) | mask(39, 32);
    /// Quality-of-service ids, reserved on a unit without them.
    pub(crate) const QOS: u64 = mask(63, 40);
}

/// Device contexts, IOMMU section 2.1.2.
pub(crate) mod device {
    use super::mask;

    /// Size in bytes of the base format.
    pub(crate) const BYTES: u64 = 32;
    /// Size in bytes of the extended format.
    pub(crate) const EXTENDED_BYTES: u64 = 64;
    /// Words 5 and 6 (mask and pattern of MSI pages), IOMMU section 2.1.3.6: page number.
    pub(crate) const MSI_PAGE: u64 = mask(51, 0);
}

/// Process contexts, IOMMU section 2.2.2, and their word 0, section 2.2.3.1.
pub(crate) mod process {
    use super::{bit, mask};

    /// Size in bytes.
    pub(crate) const BYTES: u64 = 16;
    /// Word 0: valid.
    pub(crate) const V: u64 = bit(0);
    /// Word 0: requests with supervisor privilege are allowed.
    pub(crate) const ENS: u64 = bit(1);
    /// Word 0: those may access what requests without it may.
    pub(crate) const SUM: u64 = bit(2);
    /// Word 0: must be zero. Bits 31:12 are the id of the address space.
    pub(crate) const RESERVED: u64 = mask(11, 3) | mask(63, 32);
}

#[cfg(test)]
mod tests {
    use super::{atp, device, pointer, process, ta, tc};
    use crate::spec::{assert_layout, assert_partition};

    #[test]
    fn every_field_stands_where_the_specification_says() {
        assert_layout(&[(pointer::PPN, 0xfed_cba9_8765)], 0xfed_cba9_8765 << 10);
        assert_layout(&[(atp::PPN, 0xfed_cba9_8765), (atp::MODE, 9)], 0x9000_0fed_cba9_8765);
        let flags = [tc::V, tc::EN_ATS, tc::EN_PRI, tc::T2GPA, tc::DTF, tc::PDTV, tc::PRPR, tc::GADE, tc::SADE, tc::DPE, tc::SBE, tc::SXL];
        for (position, flag) in (0..).zip(flags) {
            assert_eq!(flag, 1 << position);
        }
        assert_eq!([process::V, process::ENS, process::SUM], [1, 2, 4]);
    }

    #[test]
    fn fields_and_reserved_bits_make_whole_words() {
        let space = ta::PSCID.mask();
        assert_eq!((space, atp::GSCID.mask()), (0xffff_f000, atp::RESERVED));
        assert_partition(&[pointer::V, pointer::PPN.mask(), pointer::RESERVED]);
        assert_partition(&[0xfff, 0xff00_0000, tc::RESERVED]);
        assert_partition(&[atp::PPN.mask(), atp::RESERVED, atp::MODE.mask()]);
        assert_partition(&[ta::RESERVED, ta::QOS, space]);
        assert_partition(&[process::V, process::ENS, process::SUM, process::RESERVED, space]);
        assert_eq!(device::MSI_PAGE, u64::MAX >> 12);
    }
}
