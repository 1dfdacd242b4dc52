//! Who advances Wasmtime's epoch, so that a plugin that does not return is interrupted.
//!
//! Compiled plugins look at a counter at every loop and function entry. Somebody has to advance it: a thread of ours, or the embedder.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// Who measures the time of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ticker {
    /// One thread called `stagecraft-epoch`, which sleeps while no call is in flight and is joined when the last
    /// [`Engine`](super::Engine) is dropped.
    #[default]
    Thread,
    /// No thread: the embedder calls [`Engine::tick`](super::Engine::tick) about every millisecond while calls are in flight. If nobody ticks, nothing
    /// is interrupted.
    Embedder,
}

/// Time between two ticks.
const PERIOD: Duration = Duration::from_millis(1);
/// Ticks without any call after which the thread sleeps until it is woken: waking it for every call would cost more than the call.
const IDLE_TICKS: u32 = 16;

/// Counts calls in flight and drives the thread, if there is one.
#[derive(Debug)]
pub(super) struct Clock {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    in_flight: AtomicUsize,
    asleep: AtomicBool,
    stop: Mutex<bool>,
    wake: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.stop.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Clock {
    pub(super) fn new(ticker: Ticker, engine: wasmtime::Engine) -> std::io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = match ticker {
            Ticker::Embedder => None,
            Ticker::Thread => {
                let shared = Arc::clone(&shared);
                Some(std::thread::Builder::new().name("stagecraft-epoch".to_owned()).spawn(move || tick(&shared, &engine))?)
            }
        };
        Ok(Self { shared, thread })
    }

    /// A call is in flight until the guard is dropped.
    pub(super) fn enter(&self) -> InFlight<'_> {
        // SeqCst on both flags, here and in `tick`: either this sees the thread asleep, or the thread sees the call.
        self.shared.in_flight.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            let _stop = self.shared.lock();
            self.shared.asleep.store(false, Ordering::SeqCst);
            self.shared.wake.notify_one();
        }
        InFlight(&self.shared)
    }

    #[cfg(test)]
    fn is_asleep(&self) -> bool {
        self.shared.asleep.load(Ordering::SeqCst)
    }
}

fn tick(shared: &Shared, engine: &wasmtime::Engine) {
    let mut idle = 0;
    let mut stop = shared.lock();
    while !*stop {
        if idle >= IDLE_TICKS {
            shared.asleep.store(true, Ordering::SeqCst);
            while shared.in_flight.load(Ordering::SeqCst) == 0 && shared.asleep.load(Ordering::SeqCst) && !*stop {
                stop = shared.wake.wait(stop).unwrap_or_else(PoisonError::into_inner);
            }
            shared.asleep.store(false, Ordering::SeqCst);
            idle = 0;
        } else {
            (stop, _) = shared.wake.wait_timeout(stop, PERIOD).unwrap_or_else(PoisonError::into_inner);
            if shared.in_flight.load(Ordering::SeqCst) == 0 {
                idle += 1;
            } else {
                engine.increment_epoch();
                idle = 0;
            }
        }
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        *self.shared.lock() = true;
        self.shared.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // It cannot panic; and if it did, there would be nobody to tell.
            let _ = thread.join();
        }
    }
}

/// See [`Clock::enter`].
#[derive(Debug)]
pub(super) struct InFlight<'a>(&'a Shared);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_thread_sleeps_when_idle_and_wakes_for_a_call() {
        let clock = Clock::new(Ticker::Thread, wasmtime::Engine::default()).expect("a thread");
        let asleep = |expected| {
            (0..5000).any(|_| {
                clock.is_asleep() == expected || {
                    std::thread::sleep(PERIOD);
                    false
                }
            })
        };
        for _ in 0..3 {
            assert!(asleep(true), "sleeps when nothing is in flight");
            let _call = clock.enter();
            assert!(asleep(false), "a call wakes it");
            std::thread::sleep(PERIOD * (IDLE_TICKS + 8));
            assert!(!clock.is_asleep(), "ticks as long as the call lasts");
        }
    }
}
