//! What happens in a test, as values that proptest makes and shrinks. Every number counts modulo what there is.

use proptest::prelude::*;

use crate::guest::{Guest, Wish};

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

/// What a guest does to its tables.
#[derive(Clone, Copy, Debug)]
pub enum Edit {
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
}

/// Which calls of the kernel fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Failing {
    /// One.
    Nth,
    /// It and all after it.
    From,
    /// A step inside of a call.
    Step,
}

/// Calls of the kernel that are to fail in the next operation that has so many of them.
#[derive(Clone, Copy, Debug)]
pub struct Trap {
    pub n: u8,
    pub failing: Failing,
    /// EIO, and not ENOMEM.
    pub io: bool,
    /// Nobody sees to it before something else has happened.
    pub lingers: bool,
}

#[derive(Clone, Copy, Debug)]
pub enum Operation {
    /// Of the guest's tables; of two stages the first.
    Edit(Edit),
    /// Of a second stage's tables.
    Second(Edit),
    /// The address space gets another root, everything, or nothing.
    Switch {
        space: u8,
        view: u8,
    },
    /// A device, or a PASID of it.
    Attach {
        device: u8,
        pasid: u8,
        space: u8,
    },
    Detach {
        device: u8,
        pasid: u8,
    },
    /// Memory comes or goes.
    Memory {
        which: u8,
    },
    /// A better strategy is looked for.
    Reconsider {
        space: u8,
    },
    /// One more address space, with what is in this one.
    Allocate {
        space: u8,
    },
    /// An address space goes; all that is attached to it is detached.
    Drop {
        space: u8,
    },
    /// The guest moves to another host.
    Migrate {
        host: u8,
        second: Option<u8>,
    },
    /// A device asks for a page that it does not reach.
    Ask {
        device: u8,
        place: u16,
        write: bool,
    },
    Fail(Trap),
    /// Of one address space, or of all.
    Tell {
        space: u8,
        telling: Telling,
        shuffle: u64,
    },
}

impl Edit {
    pub const NAMES: [&str; 10] = ["map", "unmap", "map again", "permissions", "move a leaf", "split", "merge", "move a table", "share", "unlink"];

    const fn name(self) -> &'static str {
        Self::NAMES[match self {
            Self::Map(_) => 0,
            Self::Unmap { .. } => 1,
            Self::Again { .. } => 2,
            Self::Permissions { .. } => 3,
            Self::MoveLeaf { .. } => 4,
            Self::Split { .. } => 5,
            Self::Merge { .. } => 6,
            Self::MoveTable { .. } => 7,
            Self::Share { .. } => 8,
            Self::Unlink { .. } => 9,
        }]
    }

    /// Makes it in a guest's tables, as far as it can; whether anything changed.
    pub fn make(self, guest: &mut Guest) -> bool {
        match self {
            Self::Map(wish) => guest.map(wish),
            Self::Unmap { leaf } => guest.unmap(leaf),
            Self::Again { gone } => guest.again(gone),
            Self::Permissions { leaf, access } => guest.change(leaf, Some(access), None),
            Self::MoveLeaf { leaf, target } => guest.change(leaf, None, Some(target)),
            Self::Split { leaf } => guest.split(leaf),
            Self::Merge { table, target } => guest.merge(table, target),
            Self::MoveTable { table } => guest.move_table(table),
            Self::Share { table, root, place, step } => guest.share(table, root, place, step),
            Self::Unlink { table } => guest.unlink(table),
        }
    }
}

impl Operation {
    /// All that are not edits.
    pub const NAMES: [&str; 11] = ["switch", "attach", "detach", "memory", "reconsider", "allocate", "drop", "migrate", "ask", "fail", "tell"];

    pub fn name(&self) -> String {
        let other = match self {
            Self::Edit(edit) => return edit.name().to_owned(),
            Self::Second(edit) => return format!("second stage: {}", edit.name()),
            Self::Switch { .. } => 0,
            Self::Attach { .. } => 1,
            Self::Detach { .. } => 2,
            Self::Memory { .. } => 3,
            Self::Reconsider { .. } => 4,
            Self::Allocate { .. } => 5,
            Self::Drop { .. } => 6,
            Self::Migrate { .. } => 7,
            Self::Ask { .. } => 8,
            Self::Fail(_) => 9,
            Self::Tell { .. } => 10,
        };
        Self::NAMES[other].to_owned()
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
    /// The guest's tables are behind those of a second stage, if there is one for the format.
    pub stages: bool,
    /// Devices can ask for pages.
    pub requests: bool,
    /// Something of which the address spaces may have very little.
    pub scarce: Option<u8>,
}

impl Setup {
    /// One unit, two devices, one address space, and nothing special.
    pub const fn simple(host: u8, how: How) -> Self {
        Self { seed: 0, plain: false, host, second: None, how, devices: 2, spaces: 1, lookups: true, stages: false, requests: false, scarce: None }
    }
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

fn edit() -> impl Strategy<Value = Edit> {
    use Edit as E;
    prop_oneof![
        14 => wish().prop_map(E::Map),
        6 => any::<u16>().prop_map(|leaf| E::Unmap { leaf }),
        6 => any::<u16>().prop_map(|gone| E::Again { gone }),
        3 => (any::<u16>(), 0..3_u8).prop_map(|(leaf, access)| E::Permissions { leaf, access }),
        3 => (any::<u16>(), any::<u16>()).prop_map(|(leaf, target)| E::MoveLeaf { leaf, target }),
        3 => any::<u16>().prop_map(|leaf| E::Split { leaf }),
        3 => (any::<u16>(), any::<u16>()).prop_map(|(table, target)| E::Merge { table, target }),
        4 => any::<u16>().prop_map(|table| E::MoveTable { table }),
        4 => (any::<u16>(), 0..4_u8, 0..16_u8, 0..4_u8).prop_map(|(table, root, place, step)| E::Share { table, root, place, step }),
        3 => any::<u16>().prop_map(|table| E::Unlink { table }),
    ]
}

fn trap() -> impl Strategy<Value = Trap> {
    let failing = prop_oneof![3 => Just(Failing::Nth), 2 => Just(Failing::From), 2 => Just(Failing::Step)];
    // Most operations have few calls.
    let n = prop_oneof![4 => 0..3_u8, 2 => 0..12_u8, 1 => 0..60_u8];
    (n, failing, prop::bool::weighted(0.2), prop::bool::weighted(0.3)).prop_map(|(n, failing, io, lingers)| Trap { n, failing, io, lingers })
}

fn operation() -> impl Strategy<Value = Operation> {
    use Operation as O;
    // The device itself more often than its PASIDs.
    let pasid = || prop_oneof![3 => Just(0), 2 => 1..4_u8];
    prop_oneof![
        44 => edit().prop_map(O::Edit),
        20 => edit().prop_map(O::Second),
        3 => (any::<u8>(), 0..8_u8).prop_map(|(space, view)| O::Switch { space, view }),
        4 => (any::<u8>(), pasid(), any::<u8>()).prop_map(|(device, pasid, space)| O::Attach { device, pasid, space }),
        2 => (any::<u8>(), pasid()).prop_map(|(device, pasid)| O::Detach { device, pasid }),
        3 => any::<u8>().prop_map(|which| O::Memory { which }),
        1 => any::<u8>().prop_map(|space| O::Reconsider { space }),
        1 => any::<u8>().prop_map(|space| O::Allocate { space }),
        1 => any::<u8>().prop_map(|space| O::Drop { space }),
        1 => (0..4_u8, prop::option::weighted(0.4, 0..4_u8)).prop_map(|(host, second)| O::Migrate { host, second }),
        4 => (any::<u8>(), any::<u16>(), any::<bool>()).prop_map(|(device, place, write)| O::Ask { device, place, write }),
        5 => trap().prop_map(O::Fail),
        12 => (0..4_u8, telling(), any::<u64>()).prop_map(|(space, telling, shuffle)| O::Tell { space, telling, shuffle }),
    ]
}

fn setup() -> impl Strategy<Value = Setup> {
    let how = prop_oneof![3 => Just(How::Best), 3 => Just(How::Nested), 2 => Just(How::Areas), 1 => Just(How::Plain)];
    let host = (0..4_u8, prop::option::weighted(0.4, 0..4_u8));
    let rare = (prop::bool::weighted(0.6), prop::bool::weighted(0.3), prop::option::weighted(0.2, any::<u8>()));
    (any::<u64>(), prop::bool::weighted(0.4), host, how, 2..4_u8, 1..3_u8, prop::bool::weighted(0.6), rare).prop_map(
        |(seed, plain, (host, second), how, devices, spaces, lookups, (stages, requests, scarce))| Setup {
            seed,
            plain,
            host,
            second,
            how,
            devices,
            spaces,
            lookups,
            stages,
            requests,
            scarce,
        },
    )
}

/// What it begins with, and what happens then.
pub fn cases(operations: usize) -> impl Strategy<Value = (Setup, Vec<Operation>)> {
    // The seed decides what the numbers mean, so that it does not shrink.
    (setup().no_shrink(), prop::collection::vec(operation(), 1..operations))
}
