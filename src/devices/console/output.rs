//! A console's output: a bounded buffer, and a thread that empties it.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::poll::{PollContext, WatchingEvents};

use super::Claim;
use super::input::Client;

/// Bytes that may wait.
const CAPACITY: usize = 256 << 10;
/// How long output waits for room, once, before it is dropped.
const PATIENCE: Duration = Duration::from_secs(1);
/// Bytes that are written at once.
const CHUNK: usize = 4096;

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
                .field("waiting", &handle.shared.lock().buffer.len())
                .finish(),
            None => f.write_str("Writer(null)"),
        }
    }
}

/// Closes the buffer when the last writer is gone.
struct Handle {
    shared: Arc<Shared>,
    /// The terminal is this console's as long as there is a writer.
    _claim: Option<Claim>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// There is something to write, or the buffer was closed.
    work: Condvar,
    /// Something was written.
    progress: Condvar,
}

#[derive(Default)]
struct State {
    buffer: VecDeque<u8>,
    /// The thread is writing what it has taken out.
    writing: bool,
    /// Output waited in vain, and nothing has been written since.
    stalled: bool,
    /// Bytes dropped since the last notice.
    lost: u64,
    /// Nobody writes any more.
    closed: bool,
    /// The other end is gone for good.
    failed: bool,
}

/// Where the thread writes to.
enum Sink {
    File(File),
    Client(Client),
}

impl Writer {
    pub(super) fn null() -> Self {
        Self { handle: None }
    }

    pub(super) fn to_file(file: File) -> io::Result<Self> {
        Self::to_sink(Sink::File(file), None)
    }

    pub(super) fn to_terminal(file: File, claim: Claim) -> io::Result<Self> {
        Self::to_sink(Sink::File(file), Some(claim))
    }

    pub(super) fn to_client(client: Client) -> io::Result<Self> {
        Self::to_sink(Sink::Client(client), None)
    }

    fn to_sink(sink: Sink, claim: Option<Claim>) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let thread = shared.clone();
        std::thread::Builder::new()
            .name("console-out".into())
            .spawn(move || thread.run(sink))?;
        Ok(Self {
            handle: Some(Arc::new(Handle {
                shared,
                _claim: claim,
            })),
        })
    }

    /// Waits until all output has been written, for a second at most. Belongs before the process exits.
    pub fn drain(&self) {
        if let Some(handle) = &self.handle {
            handle.shared.drain();
        }
    }
}

impl Write for Writer {
    /// Takes all of `bytes`; never fails.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(handle) = &self.handle {
            handle.shared.push(bytes);
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
        self.shared.drain();
        self.shared.lock().closed = true;
        self.shared.work.notify_one();
    }
}

impl State {
    fn is_full(&self, more: usize) -> bool {
        !self.failed && !self.buffer.is_empty() && self.buffer.len() + more > CAPACITY
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if state.is_full(bytes.len()) && !state.stalled {
            let waited = self
                .progress
                .wait_timeout_while(state, PATIENCE, |state| state.is_full(bytes.len()));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            state.stalled = state.is_full(bytes.len());
        }
        if state.failed {
            return;
        }
        if state.is_full(bytes.len()) || bytes.len() > CAPACITY {
            state.lost += bytes.len() as u64;
            return;
        }
        let was_idle = state.buffer.is_empty() && !state.writing;
        if state.lost > 0 {
            let notice = format!("\r\n[busway: {} bytes of output lost here]\r\n", state.lost);
            state.buffer.extend(notice.as_bytes());
            state.lost = 0;
        }
        state.buffer.extend(bytes);
        if was_idle {
            self.work.notify_one();
        }
    }

    fn drain(&self) {
        let waiting = |state: &mut State| {
            !state.failed && !state.stalled && (state.writing || !state.buffer.is_empty())
        };
        // Poisoned or in time, there is nothing left to do.
        drop(
            self.progress
                .wait_timeout_while(self.lock(), PATIENCE, waiting),
        );
    }

    /// The thread: writes what is in the buffer until that is closed.
    fn run(&self, mut sink: Sink) {
        let mut chunk = [0; CHUNK];
        let mut state = self.lock();
        loop {
            while state.buffer.is_empty() {
                if state.closed {
                    return;
                }
                state = self
                    .work
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            let length = state.buffer.len().min(CHUNK);
            for (to, from) in chunk.iter_mut().zip(state.buffer.drain(..length)) {
                *to = from;
            }
            state.writing = true;
            drop(state);
            let result = sink.write_all(&chunk[..length]);
            state = self.lock();
            state.writing = false;
            state.stalled = false;
            if let Err(error) = result {
                log::debug!("console output is gone: {error}");
                state.failed = true;
                state.buffer = VecDeque::new();
            }
            self.progress.notify_all();
            if state.failed {
                return;
            }
        }
    }
}

impl Sink {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => write_all(file, bytes),
            Self::Client(client) => {
                client.write_all(bytes);
                Ok(())
            }
        }
    }
}

/// As [`Write::write_all`], but waits where the file is non-blocking, as standard output can be when
/// somebody else who has it made it so.
pub(crate) fn write_all(mut file: &File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match file.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let poll: PollContext<u32> = PollContext::new()?;
                poll.add_fd_with_events(file, WatchingEvents::empty().set_write(), 0)?;
                poll.wait()?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
