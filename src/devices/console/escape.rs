//! The escape key of Busway's own terminal, and what follows it.

use std::io::Write;

use busway_vfio::EventFd;

use super::output::Writer;

/// Ctrl-A
const ESCAPE: u8 = 1;
const HELP: &[u8] = b"\r\nbusway: Ctrl-A x quits, Ctrl-A a sends Ctrl-A, Ctrl-A h shows this\r\n";

/// The escape key's state.
#[derive(Debug)]
pub(super) struct Escape {
    quit: EventFd,
    output: Writer,
    /// The last byte was the escape key.
    pressed: bool,
}

impl Escape {
    pub(super) fn new(quit: EventFd, output: Writer) -> Self {
        Self {
            quit,
            output,
            pressed: false,
        }
    }

    /// Takes the escape key and what follows it out of `bytes`, and says how many bytes are left at
    /// their front. A key that means nothing after the escape key is dropped with it.
    pub(super) fn filter(&mut self, bytes: &mut [u8]) -> usize {
        let mut kept = 0;
        for at in 0..bytes.len() {
            let byte = bytes.get(at).copied().unwrap_or_default();
            if !self.pressed && byte == ESCAPE {
                self.pressed = true;
                continue;
            }
            let keep = if std::mem::take(&mut self.pressed) {
                match byte {
                    b'x' | b'X' => {
                        self.quit.signal();
                        None
                    }
                    b'h' | b'H' | b'?' => {
                        // A writer never fails.
                        let _ = self.output.write(HELP);
                        None
                    }
                    b'a' | b'A' | ESCAPE => Some(ESCAPE),
                    _ => None,
                }
            } else {
                Some(byte)
            };
            if let (Some(byte), Some(slot)) = (keep, bytes.get_mut(kept)) {
                *slot = byte;
                kept += 1;
            }
        }
        kept
    }
}
