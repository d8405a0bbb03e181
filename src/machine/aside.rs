//! What is done beside the event loop while a VM runs: host devices that come are opened and reset, those
//! that leave are reset and closed, each slot's on a thread of their own, and virtio devices are paused.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset (Linux,
//! drivers/pci/pci.c, `pci_dev_wait`), and as long as a disk takes for its flush. The event loop hears
//! signals and the guest meanwhile.

use crate::provoked;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

/// The work that has begun. Dropping it waits for it.
#[derive(Debug, Default)]
pub(super) struct Aside {
    running: Mutex<Vec<JoinHandle<()>>>,
}

impl Aside {
    /// Has `work` done on a thread called `name`, for what is called `what` in messages. Where there is no
    /// thread to be had, it is done before this returns.
    pub(super) fn start(&self, name: &str, what: &str, work: impl FnOnce() + Send + 'static) {
        // Those that are over have nothing to give.
        self.running().retain(|thread| !thread.is_finished());
        let work = Arc::new(Mutex::new(Some(work)));
        let take = |work: &Mutex<Option<_>>| {
            let mut work = work.lock().unwrap_or_else(PoisonError::into_inner);
            work.take()
        };
        let on_thread = {
            let work = work.clone();
            move || {
                provoked::here();
                if let Some(work) = take(&work) {
                    work();
                }
            }
        };
        match thread::Builder::new()
            .name(name.to_owned())
            .spawn(on_thread)
        {
            Ok(thread) => self.running().push(thread),
            Err(error) => {
                log::warn!("{what}: no thread for it ({name}): {error}; the VM waits for it");
                if let Some(work) = take(&work) {
                    work();
                }
            }
        }
    }

    /// Waits for all that have begun.
    pub(super) fn finish(&self) {
        let running = std::mem::take(&mut *self.running());
        for thread in running {
            // Its panic has been told of, and ends the VM.
            let _panicked = thread.join();
        }
    }

    fn running(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_release_that_takes_long_keeps_nobody_waiting_but_who_asks_for_its_end() {
        let (done, releases) = (Arc::new(AtomicUsize::new(0)), Aside::default());
        let (go_on, held) = mpsc::channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..3 {
            let (done, held) = (done.clone(), held.clone());
            releases.start("release", "a device", move || {
                let _disconnected = held.lock().unwrap().recv();
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        // All of them are under way, and none is over.
        assert_eq!(done.load(Ordering::Relaxed), 0);
        drop(go_on);
        releases.finish();
        assert_eq!(done.load(Ordering::Relaxed), 3);
        let dropped = done.clone();
        releases.start("release", "another", move || {
            dropped.fetch_add(1, Ordering::Relaxed);
        });
        drop(releases);
        assert_eq!(done.load(Ordering::Relaxed), 4);
    }
}
