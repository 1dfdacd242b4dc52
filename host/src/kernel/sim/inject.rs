//! Failures on demand, and a count of the calls.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use super::lock::lock;
use crate::kernel::{Errno, Result};

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Kinds of kernel calls: the methods of [`Kernel`](crate::kernel::Kernel).
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Call {
            $($(#[$doc])* $name,)*
        }
    };
}

calls! {
    /// `bind_device`
    BindDevice,
    /// `unbind_device`
    UnbindDevice,
    /// `hw_info` and `path`
    HwInfo,
    /// `ioas_alloc`
    IoasAlloc,
    /// `ioas_iova_ranges`
    IovaRanges,
    /// `ioas_allow_iovas`
    AllowIovas,
    /// `ioas_map`
    Map,
    /// `ioas_map_file`
    MapFile,
    /// `ioas_copy`
    Copy,
    /// `ioas_unmap`
    Unmap,
    /// `set_option` and `option`
    Option,
    /// `hwpt_alloc`
    HwptAlloc,
    /// `hwpt_invalidate`
    Invalidate,
    /// `set_dirty_tracking`
    SetDirtyTracking,
    /// `dirty_bitmap`
    DirtyBitmap,
    /// `viommu_alloc`
    ViommuAlloc,
    /// `vdevice_alloc`
    VdeviceAlloc,
    /// `fault_queue_alloc`
    FaultQueueAlloc,
    /// `read_faults`
    ReadFaults,
    /// `respond`
    Respond,
    /// `event_queue_alloc`
    EventQueueAlloc,
    /// `read_events`
    ReadEvents,
    /// `attach`
    Attach,
    /// `detach`
    Detach,
    /// `destroy`
    Destroy,
}

impl Call {
    /// Whether the contract lets this call fail without a mistake of the caller.
    #[must_use]
    pub const fn can_fail(self) -> bool {
        !matches!(self, Self::UnbindDevice | Self::Detach | Self::Destroy)
    }
}

/// An error that waits for its time.
#[derive(Clone, Copy, Debug)]
struct Trap {
    /// So many pass before it.
    left: u64,
    errno: Errno,
    /// All that come after it are caught as well.
    stays: bool,
    sprung: bool,
}

impl Trap {
    const fn new(n: u64, errno: Errno, stays: bool) -> Self {
        Self { left: n.saturating_sub(1), errno, stays, sprung: false }
    }

    /// Whether it is this one's turn.
    fn spring(trap: &mut Option<Self>) -> Option<Errno> {
        match trap {
            Some(Self { left: 0, errno, stays, sprung }) => {
                let (errno, stays) = (*errno, *stays);
                *sprung = true;
                if !stays {
                    *trap = None;
                }
                Some(errno)
            }
            Some(armed) => {
                armed.left -= 1;
                None
            }
            None => None,
        }
    }
}

/// Looks on.
#[derive(Clone)]
struct Observer(Arc<dyn Fn(Call) + Send + Sync>);

impl fmt::Debug for Observer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Observer")
    }
}

/// Counts calls, and fails one.
#[derive(Debug, Default)]
pub(super) struct Calls(Mutex<CallState>);

#[derive(Debug, Default)]
struct CallState {
    counts: BTreeMap<Call, u64>,
    trap: Option<Trap>,
    observer: Option<Observer>,
}

impl Calls {
    /// The entry of every call.
    pub(super) fn enter(&self, call: Call) -> Result<()> {
        let observer = lock(&self.0).observer.clone();
        if let Some(Observer(observer)) = observer {
            observer(call);
        }
        let mut state = lock(&self.0);
        *state.counts.entry(call).or_default() += 1;
        let errno = if call.can_fail() { Trap::spring(&mut state.trap) } else { None };
        errno.map_or(Ok(()), Err)
    }

    pub(super) fn observe(&self, observer: Option<Arc<dyn Fn(Call) + Send + Sync>>) {
        lock(&self.0).observer = observer.map(Observer);
    }

    pub(super) fn fail_nth(&self, n: u64, errno: Errno) {
        lock(&self.0).trap = Some(Trap::new(n, errno, false));
    }

    pub(super) fn fail_from(&self, n: u64, errno: Errno) {
        lock(&self.0).trap = Some(Trap::new(n, errno, true));
    }

    /// True if it was still waiting.
    pub(super) fn disarm(&self) -> bool {
        lock(&self.0).trap.take().is_some_and(|trap| !trap.sprung)
    }

    pub(super) fn counts(&self) -> BTreeMap<Call, u64> {
        lock(&self.0).counts.clone()
    }
}

/// Steps inside of calls that can fail: each allocation, pinning and filling of a table.
#[derive(Debug, Default)]
pub(super) struct Steps(Mutex<Option<Trap>>);

impl Steps {
    pub(super) fn step(&self) -> Result<()> {
        Trap::spring(&mut lock(&self.0)).map_or(Ok(()), Err)
    }

    pub(super) fn fail_nth(&self, n: u64, errno: Errno) {
        *lock(&self.0) = Some(Trap::new(n, errno, false));
    }

    pub(super) fn disarm(&self) -> bool {
        lock(&self.0).take().is_some()
    }
}
