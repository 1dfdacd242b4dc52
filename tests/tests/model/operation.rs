//! What happens in a test, as values that proptest makes and shrinks. Every number counts modulo what there is.

use proptest::prelude::*;

use crate::guest::Wish;

/// How a guest tells what is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Telling {
    /// By ranges of its address space, for leaves only where that is right.
    Ranges,
    /// Page by page where the ranges are small, in any order.
    Pages,
    /// In two calls, and DMA goes on in between.
    Halves,
    /// All of its address space.
    Space,
    /// All of its domain.
    Domain,
    /// Everything.
    Everything,
    /// By what was written.
    Written,
    /// The library is to look at everything.
    Synchronise,
}

impl Telling {
    pub const ALL: [Self; 8] =
        [Self::Ranges, Self::Pages, Self::Halves, Self::Space, Self::Domain, Self::Everything, Self::Written, Self::Synchronise];
}

#[derive(Clone, Copy, Debug)]
pub enum Operation {
    Map(Wish),
    Unmap {
        leaf: u16,
    },
    /// What was unmapped is mapped again.
    Again {
        gone: u16,
    },
    Permissions {
        leaf: u16,
        access: u8,
    },
    MoveLeaf {
        leaf: u16,
        target: u16,
    },
    Split {
        leaf: u16,
    },
    Merge {
        table: u16,
        target: u16,
    },
    MoveTable {
        table: u16,
    },
    Share {
        table: u16,
        root: u8,
        place: u8,
        step: u8,
    },
    Unlink {
        table: u16,
    },
    /// The address space gets another root, everything, or nothing.
    Switch {
        space: u8,
        view: u8,
    },
    Attach {
        device: u8,
        space: u8,
    },
    Detach {
        device: u8,
    },
    /// Memory comes or goes.
    Memory,
    /// A better strategy is looked for.
    Reconsider {
        space: u8,
    },
    /// Of one address space, or of all.
    Tell {
        space: u8,
        telling: Telling,
        shuffle: u64,
    },
}

impl Operation {
    pub const NAMES: [&str; 16] = [
        "map",
        "unmap",
        "permissions",
        "move a leaf",
        "split",
        "merge",
        "move a table",
        "share",
        "unlink",
        "switch",
        "attach",
        "detach",
        "memory",
        "reconsider",
        "tell",
        "map again",
    ];

    pub fn name(&self) -> &'static str {
        Self::NAMES[match self {
            Self::Map(_) => 0,
            Self::Unmap { .. } => 1,
            Self::Permissions { .. } => 2,
            Self::MoveLeaf { .. } => 3,
            Self::Split { .. } => 4,
            Self::Merge { .. } => 5,
            Self::MoveTable { .. } => 6,
            Self::Share { .. } => 7,
            Self::Unlink { .. } => 8,
            Self::Switch { .. } => 9,
            Self::Attach { .. } => 10,
            Self::Detach { .. } => 11,
            Self::Memory => 12,
            Self::Reconsider { .. } => 13,
            Self::Tell { .. } => 14,
            Self::Again { .. } => 15,
        }]
    }
}

/// How devices get what is in address spaces, if it can be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum How {
    /// The best there is: the guest's own table where the unit takes it.
    Best,
    Nested,
    Areas,
    /// Units take no tables.
    Plain,
}

/// What a test begins with.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// Of the guest's settings, and of all that is random in its entries.
    pub seed: u64,
    /// Settings that units take as they are, if the format is one of theirs.
    pub plain: bool,
    pub host: u8,
    /// Another unit beside the first.
    pub second: Option<u8>,
    pub how: How,
    pub devices: u8,
    pub spaces: u8,
    pub lookups: bool,
}

fn telling() -> impl Strategy<Value = Telling> {
    use Telling::*;
    prop_oneof![
        8 => Just(Ranges), 4 => Just(Pages), 3 => Just(Halves), 1 => Just(Space), 1 => Just(Domain), 1 => Just(Everything), 3 => Just(Written), 1 => Just(Synchronise)
    ]
}

fn wish() -> impl Strategy<Value = Wish> {
    // Small numbers meet each other often.
    let step = prop_oneof![2 => Just(0), 3 => 0..6_u8];
    let whole = (0..4_u8, 0..16_u8, step, any::<u8>(), any::<u16>(), 0..8_u8);
    (whole, prop::bool::weighted(0.1), prop::bool::weighted(0.3), prop::bool::weighted(0.3)).prop_map(
        |((root, place, step, size, target, access), restricted, skip, replace)| Wish {
            root,
            place,
            step,
            size,
            target,
            access,
            restricted,
            skip,
            replace,
        },
    )
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    prop_oneof![
        14 => wish().prop_map(O::Map),
        6 => any::<u16>().prop_map(|leaf| O::Unmap { leaf }),
        6 => any::<u16>().prop_map(|gone| O::Again { gone }),
        3 => (any::<u16>(), 0..3_u8).prop_map(|(leaf, access)| O::Permissions { leaf, access }),
        3 => (any::<u16>(), any::<u16>()).prop_map(|(leaf, target)| O::MoveLeaf { leaf, target }),
        3 => any::<u16>().prop_map(|leaf| O::Split { leaf }),
        3 => (any::<u16>(), any::<u16>()).prop_map(|(table, target)| O::Merge { table, target }),
        4 => any::<u16>().prop_map(|table| O::MoveTable { table }),
        4 => (any::<u16>(), 0..4_u8, 0..16_u8, 0..4_u8).prop_map(|(table, root, place, step)| O::Share { table, root, place, step }),
        3 => any::<u16>().prop_map(|table| O::Unlink { table }),
        3 => (any::<u8>(), 0..8_u8).prop_map(|(space, view)| O::Switch { space, view }),
        2 => (any::<u8>(), any::<u8>()).prop_map(|(device, space)| O::Attach { device, space }),
        1 => any::<u8>().prop_map(|device| O::Detach { device }),
        2 => Just(O::Memory),
        1 => any::<u8>().prop_map(|space| O::Reconsider { space }),
        10 => (0..4_u8, telling(), any::<u64>()).prop_map(|(space, telling, shuffle)| O::Tell { space, telling, shuffle }),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    let how = prop_oneof![3 => Just(How::Best), 3 => Just(How::Nested), 2 => Just(How::Areas), 1 => Just(How::Plain)];
    let host = (0..4_u8, prop::option::weighted(0.4, 0..4_u8));
    (any::<u64>(), prop::bool::weighted(0.4), host, how, 2..4_u8, 1..3_u8, prop::bool::weighted(0.6))
        .prop_map(|(seed, plain, (host, second), how, devices, spaces, lookups)| Setup { seed, plain, host, second, how, devices, spaces, lookups })
}

/// What it begins with, and what happens then.
pub fn cases(operations: usize) -> impl Strategy<Value = (Setup, Vec<Operation>)> {
    // The seed decides what the numbers mean, so that it does not shrink.
    (setup().no_shrink(), prop::collection::vec(operation(), 1..operations))
}
