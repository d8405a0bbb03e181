//! Panics that a test of a whole run asks for, on a thread of a kind that it names. A release has none.

#[cfg(debug_assertions)]
pub(crate) use asked::provoke;

/// Panics where a test wants the calling thread to. Each kind of thread comes by here in its round.
#[inline]
pub(crate) fn here() {
    #[cfg(debug_assertions)]
    asked::panic_if_wanted();
}

#[cfg(debug_assertions)]
mod asked {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    /// Set when it is time.
    static WANTED: AtomicBool = AtomicBool::new(false);
    /// How the thread's name begins.
    static NAME: OnceLock<String> = OnceLock::new();

    /// Has the next thread panic that comes by and whose name begins with `name`.
    pub(crate) fn provoke(name: String) {
        let _once = NAME.set(name);
        WANTED.store(true, Ordering::Release);
    }

    pub(super) fn panic_if_wanted() {
        if !WANTED.load(Ordering::Acquire) {
            return;
        }
        let current = thread::current();
        let is_it = |name: &String| current.name().unwrap_or_default().starts_with(name);
        if NAME.get().is_some_and(is_it) && WANTED.swap(false, Ordering::AcqRel) {
            panic!("a test wants it");
        }
    }
}
