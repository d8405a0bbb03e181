//! What becomes of a VM when a thread of its process panics: it ends as at any other end, so that every
//! device is reset and given back.
//!
//! A panic of the thread that runs the VM unwinds it, by which it ends. One of any other thread is told to
//! the event loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::events::Events;

/// The VM of this process.
static WATCHED: Mutex<Option<Watched>> = Mutex::new(None);

#[derive(Debug, Default)]
struct Watched {
    panicked: bool,
    /// Where the event loop hears of it, once there is one.
    events: Weak<Events>,
}

fn watched() -> MutexGuard<'static, Option<Watched>> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the VM that this process runs end in order, with [`RunError::Panicked`](super::RunError::Panicked)
/// where the panic is not the calling thread's own. `false` where there is none, or where a thread had
/// panicked before: then nothing can be relied on any more. For a panic hook.
#[must_use]
pub fn end_on_panic() -> bool {
    let mut watched = watched();
    match &mut *watched {
        Some(vm) if !vm.panicked => {
            vm.panicked = true;
            if let Some(events) = vm.events.upgrade() {
                events.panicked();
            }
            true
        }
        _ => false,
    }
}

/// Has a thread panic so many milliseconds from now, where a test of a whole run asks for it by
/// [`PANIC_AFTER`]: one whose name begins as [`PANIC_IN`] says, or else one of its own. A release does not listen.
#[cfg(debug_assertions)]
pub(super) fn panic_where_a_test_asks() {
    let asked = std::env::var(PANIC_AFTER).ok();
    let Some(after) = asked.and_then(|after| after.parse().ok()) else {
        return;
    };
    std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(after));
        match std::env::var(PANIC_IN) {
            Ok(name) => crate::provoked::provoke(name),
            Err(_) => panic!("{PANIC_AFTER} is set"),
        }
    });
}

/// The environment variables that tests set.
#[cfg(debug_assertions)]
const PANIC_AFTER: &str = "BUSWAY_TEST_PANIC_AFTER_MS";
#[cfg(debug_assertions)]
const PANIC_IN: &str = "BUSWAY_TEST_PANIC_IN";

/// Lasts as long as the VM's devices are this process's: a panic ends the VM.
#[derive(Debug)]
pub(crate) struct PanicWatch(());

impl PanicWatch {
    /// There is one VM in a process.
    pub(crate) fn start() -> Self {
        *watched() = Some(Watched::default());
        Self(())
    }

    /// Tells `events` from now on, and of a panic that has been.
    pub(super) fn tell(&self, events: &Arc<Events>) {
        if let Some(vm) = &mut *watched() {
            vm.events = Arc::downgrade(events);
            if vm.panicked {
                events.panicked();
            }
        }
    }
}

impl Drop for PanicWatch {
    fn drop(&mut self) {
        *watched() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::Event;
    use super::*;

    #[test]
    fn a_panic_is_told_to_the_event_loop_once_whenever_it_comes() {
        assert!(!end_on_panic(), "no VM runs");
        let events = Events::new().unwrap();
        let watch = PanicWatch::start();
        watch.tell(&events);
        assert_eq!(events.take(), None);
        assert!(end_on_panic());
        assert_eq!(events.take(), Some(Event::Panicked));
        assert!(!end_on_panic(), "a second one");
        drop(watch);
        // While the machine is put together there is no event loop.
        let watch = PanicWatch::start();
        assert!(end_on_panic());
        watch.tell(&events);
        assert_eq!(events.take(), Some(Event::Panicked));
        drop(watch);
        assert!(!end_on_panic());
    }
}
