//! Tables of any format: geometry, walking, transcoding, building. Knows neither plugins nor kernels.
//!
//! An entry is *address* plus *pattern*. Addresses are moved natively; patterns are judged by a [`Format`], once each, and the answers remembered.

mod format;
mod geometry;

pub use format::{Encoded, FaultKind, Finding, Format, FormatError, Meaning, Need, Next, Severity};
pub use geometry::{AddressField, ByteOrder, Geometry, Level, Mark, Nonsense, Root, Segment, Shape};
