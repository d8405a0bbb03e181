//! The port that firmware builds for debugging write their messages to: QEMU's `isa-debugcon`. What they
//! write goes to the log, a line at a time, at level debug.

use std::sync::{Mutex, PoisonError};

use crate::kvm::BusDevice;

/// The port that OVMF and SeaBIOS write to.
pub const PORT: u16 = 0x402;

/// What the port reads, so that firmware knows that it is there. QEMU hw/char/debugcon.c, `readback`.
const PRESENT: u8 = 0xe9;
/// The most bytes that are one line of the log.
const LONGEST: usize = 512;

/// The port. Belongs at [`PORT`], one byte.
#[derive(Debug, Default)]
pub struct DebugPort {
    line: Mutex<Vec<u8>>,
}

impl DebugPort {
    /// Takes a byte, and gives the line that it completes.
    fn take(&self, byte: u8) -> Option<String> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        if byte != b'\n' {
            line.push(byte);
            if line.len() < LONGEST {
                return None;
            }
        }
        let text = String::from_utf8_lossy(&line);
        let text = text.trim_end().replace(char::is_control, " ");
        line.clear();
        (!text.is_empty()).then_some(text)
    }
}

impl BusDevice for DebugPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(PRESENT);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        for line in data.iter().filter_map(|byte| self.take(*byte)) {
            log::debug!("firmware: {line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_come_whole_without_control_characters_and_of_bounded_length() {
        let port = DebugPort::default();
        let lines = |text: &[u8]| -> Vec<String> {
            let bytes = text.iter();
            bytes.filter_map(|byte| port.take(*byte)).collect()
        };
        assert_eq!(lines(b"SEC\x1b[0m: hello\r\n\nPE"), ["SEC [0m: hello"]);
        assert_eq!(lines(b"I\n"), ["PEI"]);
        assert_eq!(lines(&[b'x'; 3 * LONGEST]).len(), 3);
        let mut data = [0];
        port.read(0, &mut data);
        assert_eq!(data, [0xe9]);
    }
}
