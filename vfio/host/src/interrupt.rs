//! Ctrl-C in the middle of a change: the change is undone, and not left where it is.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::register_signal_handler;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    ASKED.store(true, Ordering::Relaxed);
}

/// Has SIGINT, SIGTERM and SIGHUP only be noted from now on.
pub fn note_interrupts() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        if let Err(error) = register_signal_handler(signal, note) {
            log::warn!("signal {signal} will end the program at once: {error}");
        }
    }
}

/// Whether one has come.
#[must_use]
pub fn interrupted() -> bool {
    ASKED.load(Ordering::Relaxed)
}
