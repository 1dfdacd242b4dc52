//! Tables of any format: geometry, walking, transcoding, building. Knows neither plugins nor kernels.
//!
//! An entry is *address* plus *pattern*. Addresses are moved natively; patterns are judged by a [`Format`], once each, and the answers remembered.

mod arena;
mod build;
mod collect;
mod direct;
mod empty;
mod format;
mod geometry;
mod intercept;
mod lanes;
mod leaves;
mod loss;
mod marking;
mod passage;
mod recode;
mod remember;
mod source;
mod stage;
mod stages;
mod target;
mod visit;
mod walk;

pub use arena::{Arena, Full};
pub use build::{BuildError, Builder, Built};
pub use collect::{Collector, Mapping};
pub use direct::Window;
pub use format::{Encoded, FaultKind, Finding, Format, FormatError, Meaning, Missing, Need, Next, Severity};
pub use geometry::{AddressField, ByteOrder, Geometry, Level, Mark, Nonsense, Root, Segment, Shape};
pub(crate) use geometry::{MAX_INDEX_BITS, Move, may_hold_tables};
pub use intercept::Intercept;
pub(crate) use intercept::{Compared, Intercepted};
pub(crate) use lanes::{swap_bytes, widen};
pub use leaves::{Kinds, Piece, Run};
pub(crate) use loss::narrowed;
pub use loss::{Count, Loss, Losses};
pub(crate) use marking::LeafMarks;
pub use passage::{Passing, Receiver};
pub use recode::Passed;
pub(crate) use remember::{Judge, JudgeError, LevelPlan, MAX_REMEMBERED, Plan};
pub use source::Source;
pub use stages::{AddressSpace, Fault, Translation};
pub(crate) use target::{Leaf, Rung, Target, low_bits};
pub use visit::{Cause, FaultAt, Step, Visitor};
pub use walk::{OpenError, Table, WalkError};
