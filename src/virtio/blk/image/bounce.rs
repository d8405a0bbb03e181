//! A buffer for what a direct file does not take from where it lies.

/// Bytes of the buffer through which go what a direct file does not take from where it lies, and the
/// zeros that the host cannot write otherwise.
const BOUNCE_SIZE: usize = 64 << 10;

/// An aligned buffer, made for one request. Zeros at first.
pub(super) struct Bounce {
    bytes: Vec<u8>,
    start: usize,
}

impl Bounce {
    pub(super) fn new(alignment: usize) -> Self {
        let bytes = vec![0; BOUNCE_SIZE.saturating_add(alignment)];
        let start = bytes.as_ptr().align_offset(alignment.max(1));
        Self { bytes, start }
    }

    /// The buffer's first `len` bytes, or all of it.
    pub(super) fn first(&mut self, len: usize) -> &mut [u8] {
        let end = self.start.saturating_add(len.min(BOUNCE_SIZE));
        self.bytes.get_mut(self.start..end).unwrap_or_default()
    }
}
