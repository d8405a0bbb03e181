//! A console's output: a bounded buffer, and a thread that empties it.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use super::Claim;
use super::kept::KeptFile;
use super::socket::Client;
use crate::outflow::{Backlog, Bound, Outflow, PATIENCE, write_all};
use crate::sandbox::Kind;

/// Bytes that may wait.
const CAPACITY: usize = 256 << 10;
/// Bytes that are written at once: no more than the smallest file may have.
const CHUNK: usize = crate::config::MIN_CONSOLE_FILE_SIZE as usize;

/// Takes a console's output; cheap to clone.
///
/// Writing copies to a buffer of 256 KiB that a thread empties. When a reader is slow and the buffer is
/// full, the writer waits for room, so that nothing is lost; when in a second there is none, the reader
/// counts as stalled, and output is dropped until it takes something again, and then a line says how
/// much is missing. So a guest can lose output, but a stuck terminal cannot stop it.
///
/// When the last clone drops, what waits is still given a second to be written.
#[derive(Clone)]
pub struct Writer {
    /// `None`: all output is dropped.
    handle: Option<Arc<Handle>>,
}

impl fmt::Debug for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.handle {
            Some(handle) => f
                .debug_struct("Writer")
                .field("waiting", &handle.outflow.size())
                .finish(),
            None => f.write_str("Writer(null)"),
        }
    }
}

/// Closes the buffer when the last writer is gone.
struct Handle {
    outflow: Arc<Outflow<Buffer>>,
    /// The terminal is this console's as long as there is a writer.
    _claim: Option<Claim>,
}

#[derive(Default)]
struct Buffer(VecDeque<u8>);

impl Backlog for Buffer {
    type Batch = Vec<u8>;

    fn size(&self) -> usize {
        self.0.len()
    }

    fn take(&mut self) -> Option<Vec<u8>> {
        let length = self.0.len().min(CHUNK);
        (length > 0).then(|| self.0.drain(..length).collect())
    }

    fn add_notice(&mut self, lost: u64) {
        let notice = format!("\r\n[busway: {lost} bytes of output lost here]\r\n");
        self.0.extend(notice.as_bytes());
    }
}

impl Writer {
    pub(super) fn null() -> Self {
        Self { handle: None }
    }

    pub(super) fn to_file(file: File) -> io::Result<Self> {
        Self::to(None, move |bytes| write_all(&file, &bytes))
    }

    pub(super) fn to_kept_file(mut file: KeptFile) -> io::Result<Self> {
        Self::to(None, move |bytes| file.write_all(&bytes))
    }

    pub(super) fn to_terminal(file: File, claim: Claim) -> io::Result<Self> {
        Self::to(Some(claim), move |bytes| write_all(&file, &bytes))
    }

    pub(super) fn to_client(client: Client) -> io::Result<Self> {
        Self::to(None, move |bytes| {
            client.write_all(&bytes);
            Ok(())
        })
    }

    fn to(
        claim: Option<Claim>,
        write: impl FnMut(Vec<u8>) -> io::Result<()> + Send + 'static,
    ) -> io::Result<Self> {
        let bound = Bound {
            most: CAPACITY,
            again: CAPACITY,
            wait: PATIENCE,
        };
        let outflow = Outflow::start(
            Kind::ConsoleOutput,
            "console-out",
            Buffer::default(),
            bound,
            write,
        )?;
        Ok(Self {
            handle: Some(Arc::new(Handle {
                outflow,
                _claim: claim,
            })),
        })
    }

    /// Waits until all output has been written, for a second at most. Belongs before the process exits.
    pub fn drain(&self) {
        if let Some(handle) = &self.handle {
            handle.outflow.drain(Some(PATIENCE));
        }
    }
}

impl Write for Writer {
    /// Takes all of `bytes`; never fails.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(handle) = &self.handle {
            let add = |buffer: &mut Buffer| buffer.0.extend(bytes);
            handle.outflow.push(bytes.len(), false, add);
        }
        Ok(bytes.len())
    }

    /// Does nothing: see [`drain`](Writer::drain).
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.outflow.drain(Some(PATIENCE));
        self.outflow.close();
    }
}
