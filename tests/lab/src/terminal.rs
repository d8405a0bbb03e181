//! The terminal's settings, put back whatever happens between.

use std::mem::MaybeUninit;

/// The settings of standard input as they were; restored when dropped.
#[derive(Debug)]
pub(crate) struct Terminal(Option<libc::termios>);

impl Terminal {
    /// Remembers the settings, if standard input is a terminal.
    pub(crate) fn save() -> Self {
        let mut settings = MaybeUninit::uninit();
        // SAFETY: the pointer is to room for one `termios`.
        let outcome = unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) };
        // SAFETY: a call that succeeded has written it whole.
        Self((outcome == 0).then(|| unsafe { settings.assume_init() }))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(settings) = &self.0 {
            // SAFETY: the pointer is to settings that the same call's counterpart wrote.
            unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSADRAIN, settings) };
        }
    }
}
