//! The virtio console: one port, carried by an [`Endpoint`]. Virtio 1.3 §5.3.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::activation::Activation;
use super::config_space::{ConfigSpace, Fields};
use super::device::VirtioDevice;
use super::error::QueueError;
use super::error::StartError;
use super::life::{ConsoleState, DeviceState, Progress, Running};
use super::queue::{Served, Virtqueue};
use super::segments::Segments;
use super::spec::{self, console};
use super::worker::{Worker, doorbell_events};
use crate::devices::console::{Endpoint, Input, Reader, Writer};
use crate::memory::{GuestRam, RamMap};

const QUEUE_SIZE: u16 = 64;
/// Input is read in pieces of this many bytes: a person types, and a paste is several.
const INPUT_PIECE: usize = 256;
/// Pieces in one round, after which output has its turn.
const INPUT_ROUND: usize = 64;
const OUTPUT_PIECE: usize = 4096;

/// A virtio console.
#[derive(Debug)]
pub struct Console {
    name: String,
    writer: Writer,
    input: Option<Arc<Mutex<Reader>>>,
    config: Arc<Fields>,
}

impl Console {
    /// A console whose other end is `endpoint`.
    #[must_use]
    pub fn new(name: &str, endpoint: Endpoint) -> Self {
        Self {
            name: name.to_owned(),
            writer: endpoint.writer,
            input: endpoint.reader.map(|reader| Arc::new(Mutex::new(reader))),
            config: Fields::new(vec![0; console::CONFIG_SIZE]),
        }
    }
}

impl VirtioDevice for Console {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::CONSOLE
    }

    fn class(&self) -> u32 {
        0x07_80_00 // communication controller, other
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn takes(&self, _features: u64, state: &DeviceState) -> bool {
        match state {
            DeviceState::None => true,
            DeviceState::Console(state) => state.input.len() <= INPUT_PIECE,
            _ => false,
        }
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let state = match activation.state() {
            DeviceState::Console(state) => state.clone(),
            _ => ConsoleState::default(),
        };
        let queues = (
            activation.take_queue(console::RECEIVEQ)?,
            activation.take_queue(console::TRANSMITQ)?,
        );
        let mut workers: Vec<Box<dyn Worker>> = Vec::new();
        if let (Some(receive), Some(transmit)) = queues {
            let input = self.input.clone();
            let input = input.map(|reader| Keyboard::new(reader, &state.input));
            workers.push(Box::new(ConsoleWorker {
                name: self.name.clone(),
                ram: activation.ram().clone(),
                receive,
                transmit,
                writer: self.writer.clone(),
                printed: state.printed,
                input: input.transpose()?,
            }));
        }
        activation.run(workers, DeviceState::Console(state))
    }
}

/// The endpoint's input, read only when that does not block.
#[derive(Debug)]
struct Keyboard {
    reader: Arc<Mutex<Reader>>,
    ready: Epoll,
    fd: RawFd,
    /// What has been read and waits for buffers: the last `waiting` bytes of the first `len`.
    bytes: [u8; INPUT_PIECE],
    len: usize,
    waiting: usize,
    closed: bool,
}

impl Keyboard {
    /// `typed` has been read before and waits for buffers.
    fn new(reader: Arc<Mutex<Reader>>, typed: &[u8]) -> io::Result<Self> {
        let fd = lock(&reader).as_raw_fd();
        let ready = Epoll::new()?;
        ready.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        let mut bytes = [0; INPUT_PIECE];
        for (to, from) in bytes.iter_mut().zip(typed) {
            *to = *from;
        }
        let len = typed.len().min(INPUT_PIECE);
        Ok(Self {
            reader,
            ready,
            fd,
            bytes,
            len,
            waiting: len,
            closed: false,
        })
    }

    /// What has been read and waits for buffers.
    fn typed(&self) -> &[u8] {
        let start = self.len.saturating_sub(self.waiting);
        self.bytes.get(start..self.len).unwrap_or_default()
    }

    /// What waits for the guest. Reads more where nothing does, without blocking.
    fn fill(&mut self) -> Option<&[u8]> {
        let mut event = [EpollEvent::default()];
        while self.waiting == 0 {
            if self.closed || !matches!(self.ready.wait(0, &mut event), Ok(1)) {
                return None;
            }
            match lock(&self.reader).read(&mut self.bytes) {
                Input::Bytes(count) => {
                    self.len = count.min(INPUT_PIECE);
                    self.waiting = self.len;
                }
                Input::Nothing => {}
                Input::Closed => self.closed = true,
            }
        }
        Some(self.typed())
    }

    fn took(&mut self, count: usize) {
        self.waiting = self.waiting.saturating_sub(count);
    }
}

fn lock(reader: &Mutex<Reader>) -> MutexGuard<'_, Reader> {
    reader.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct ConsoleWorker {
    name: String,
    ram: GuestRam,
    receive: Virtqueue,
    transmit: Virtqueue,
    writer: Writer,
    /// Bytes that are out already of the next chain.
    printed: usize,
    input: Option<Keyboard>,
}

const TRANSMIT: usize = 1;

impl ConsoleWorker {
    /// Gives the guest what has been typed, as far as it has buffers.
    fn receive(&mut self, memory: &RamMap) -> Result<(), QueueError> {
        let Some(input) = &mut self.input else {
            return Ok(());
        };
        for _ in 0..INPUT_ROUND {
            let Some(bytes) = input.fill() else {
                return Ok(());
            };
            let Some(mut chain) = self.receive.pop(memory)? else {
                if self.receive.enable_notification(memory)? {
                    continue;
                }
                return Ok(());
            };
            let written = chain.writable.write(bytes);
            input.took(written);
            self.receive.complete(memory, chain.head(), written)?;
            self.receive.interrupt(memory)?;
        }
        self.receive.wake_again();
        Ok(())
    }
}

/// Writes out what is left of a chain, of which `printed` bytes are out already, and counts on. Leaves
/// it when the device is being stopped: a chain can hold more than a slow reader takes in days.
fn write_out(
    mut bytes: Segments<'_>,
    printed: &mut usize,
    writer: &mut Writer,
    stop: &AtomicBool,
) -> Served {
    bytes.advance(*printed);
    let mut piece = [0; OUTPUT_PIECE];
    while !bytes.is_empty() {
        if stop.load(Ordering::Relaxed) {
            return Served::Left;
        }
        let count = bytes.read(&mut piece);
        if let Err(error) = writer.write_all(piece.get(..count).unwrap_or_default()) {
            log::debug!("console output: {error}");
            break;
        }
        *printed = printed.saturating_add(count);
    }
    *printed = 0;
    Served::Done(0)
}

impl Worker for ConsoleWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "console"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let mut sources = vec![
            (self.receive.doorbell(), doorbell_events()),
            (self.transmit.doorbell(), doorbell_events()),
        ];
        if let Some(input) = &self.input {
            sources.push((input.fd, doorbell_events()));
        }
        sources
    }

    fn wake(&mut self, source: usize) -> Result<(), QueueError> {
        let ram = self.ram.clone();
        let memory = ram.memory();
        if source == TRANSMIT {
            let (writer, printed) = (&mut self.writer, &mut self.printed);
            let stop = self.transmit.stop();
            return self.transmit.drain(&memory, |chain| {
                Ok(write_out(chain.readable, printed, writer, &stop))
            });
        }
        self.receive(&memory)
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.receive.leave(progress);
        self.transmit.leave(progress);
        let input = self.input.as_ref().map(Keyboard::typed);
        progress.device = DeviceState::Console(ConsoleState {
            input: input.unwrap_or_default().to_vec(),
            printed: self.printed,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConsoleConfig;
    use crate::virtio::spec::pci::common;
    use crate::virtio::testing::{Driver, eventually};
    use busway_vfio::EventFd;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::time::{Duration, Instant};

    fn over_socket() -> (tempfile::TempDir, Console, UnixStream) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("console");
        let quit = EventFd::new().unwrap();
        let endpoint = Endpoint::open(&ConsoleConfig::Socket(path.clone()), &quit)
            .unwrap()
            .unwrap();
        let console = Console::new("console0", endpoint);
        (folder, console, UnixStream::connect(path).unwrap())
    }

    #[test]
    fn what_is_typed_reaches_the_guest_and_what_it_prints_comes_out() {
        let (_folder, console, mut terminal) = over_socket();
        let mut driver = Driver::new(console);
        driver.enable_msix(3);
        for round in 0..3 {
            driver.negotiate(!spec::feature::EVENT_IDX);
            let mut receive = driver.queue(0, 16);
            let mut transmit = driver.queue(1, 16);
            driver.ready();
            let buffer = driver.alloc(64);
            // The client is known to the console once its first bytes have been read.
            terminal.write_all(b"typed").unwrap();
            receive.submit(&[(buffer, 2, true)]);
            receive.submit(&[(buffer + 16, 16, true)]);
            driver.notify(&receive);
            assert_eq!([receive.wait_used().1, receive.wait_used().1], [2, 3]);
            assert_eq!(driver.read(buffer, 2), b"ty");
            assert_eq!(driver.read(buffer + 16, 3), b"ped");
            driver.route(0).wait();
            driver.write(buffer, b"printed");
            driver.run(&mut transmit, &[(buffer, 3, false), (buffer + 3, 4, false)]);
            let mut printed = [0; 7];
            terminal.read_exact(&mut printed).unwrap();
            assert_eq!(&printed, b"printed", "round {round}");
            driver.route(1).wait();
        }
    }

    #[test]
    fn input_waits_for_the_guests_buffers_and_none_is_lost() {
        let (_folder, console, mut terminal) = over_socket();
        let mut driver = Driver::new(console);
        driver.negotiate(0);
        let mut receive = driver.queue(0, 16);
        driver.queue(1, 16);
        driver.ready();
        let typed: Vec<u8> = (0..20_000).map(|i| i as u8).collect();
        terminal.write_all(&typed).unwrap();
        let buffer = driver.alloc(64);
        let mut got = Vec::new();
        while got.len() < typed.len() {
            let len = driver.run(&mut receive, &[(buffer, 64, true)]) as usize;
            got.extend(driver.read(buffer, len));
        }
        assert_eq!(got, typed);
    }

    #[test]
    fn a_reset_does_not_wait_for_a_slow_reader_of_a_long_output() {
        let (_folder, console, mut terminal) = over_socket();
        let mut driver = Driver::new(console);
        driver.negotiate(0);
        let mut receive = driver.queue(0, 16);
        let mut transmit = driver.queue(1, 64);
        driver.ready();
        // The client is known to the console once its first bytes have been read.
        terminal.write_all(b"!").unwrap();
        let buffer = driver.alloc(16);
        driver.run(&mut receive, &[(buffer, 16, true)]);
        // 240 MiB, of which the reader takes six in a second.
        transmit.submit(&[(0, 4 << 20, false); 60]);
        let reader = std::thread::spawn(move || {
            let mut piece = [0; 64 << 10];
            while terminal.read(&mut piece).is_ok_and(|count| count > 0) {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        driver.notify(&transmit);
        std::thread::sleep(Duration::from_millis(200));
        let start = Instant::now();
        driver.set_common(common::DEVICE_STATUS, &[0]);
        let waited = start.elapsed();
        assert!(waited < Duration::from_secs(5), "{waited:?}");
        drop(driver);
        reader.join().unwrap();
    }

    #[test]
    fn output_that_is_paused_in_its_middle_comes_out_once_and_whole() {
        let (_folder, console, mut terminal) = over_socket();
        let mut driver = Driver::new(console);
        driver.negotiate(0);
        let mut receive = driver.queue(0, 16);
        let mut transmit = driver.queue(1, 64);
        driver.ready();
        // The client is known to the console once its first bytes have been read.
        terminal.write_all(b"!").unwrap();
        let buffer = driver.alloc(16);
        driver.run(&mut receive, &[(buffer, 16, true)]);
        let text: Vec<u8> = (0..2_u32 << 20).map(|i| (i >> 8 ^ i) as u8).collect();
        let at = 0x10_0000;
        driver.write(at, &text);
        transmit.submit(&[(at, 1 << 20, false), (at + (1 << 20), 1 << 20, false)]);
        transmit.submit(&[(at, 5, false)]);
        let expected = [&text[..], &text[..5]].concat();
        let reader = std::thread::spawn(move || {
            let mut got: Vec<u8> = Vec::new();
            let mut piece = [0; 32 << 10];
            while got.len() < expected.len() {
                let count = terminal.read(&mut piece).unwrap();
                got.extend(&piece[..count]);
                std::thread::sleep(Duration::from_millis(5));
            }
            assert!(got == expected);
        });
        driver.notify(&transmit);
        let mut in_the_middle = 0;
        while transmit.poll_used().is_none() {
            std::thread::sleep(Duration::from_millis(10));
            driver.function.pause();
            let state = driver.function.state().unwrap();
            if let DeviceState::Console(state) = state.progress.device
                && state.printed > 0
            {
                in_the_middle += 1;
            }
            driver.function.resume();
        }
        transmit.wait_used();
        assert!(transmit.poll_used().is_none());
        assert!(in_the_middle > 0);
        reader.join().unwrap();
    }

    #[test]
    fn what_was_typed_and_has_found_no_buffers_waits_through_a_pause_and_not_through_a_reset() {
        let (_folder, console, mut terminal) = over_socket();
        let mut driver = Driver::new(console);
        let up = |driver: &mut Driver| {
            driver.negotiate(0);
            let receive = driver.queue(0, 16);
            driver.queue(1, 16);
            driver.ready();
            receive
        };
        let typed = |driver: &Driver, expected: &[u8]| {
            eventually("typed", || {
                driver.function.pause();
                let state = driver.function.state().unwrap().progress.device;
                driver.function.resume();
                matches!(state, DeviceState::Console(state) if state.input == expected)
            });
        };
        let mut receive = up(&mut driver);
        terminal.write_all(b"early").unwrap();
        typed(&driver, b"early");
        let buffer = driver.alloc(64);
        assert_eq!(driver.run(&mut receive, &[(buffer, 2, true)]), 2);
        typed(&driver, b"rly");
        assert_eq!(driver.run(&mut receive, &[(buffer, 16, true)]), 3);
        assert_eq!(driver.read(buffer, 3), b"rly");
        terminal.write_all(b"lost").unwrap();
        typed(&driver, b"lost");
        receive = up(&mut driver);
        terminal.write_all(b"late").unwrap();
        assert_eq!(driver.run(&mut receive, &[(buffer, 16, true)]), 4);
        assert_eq!(driver.read(buffer, 4), b"late");
    }

    #[test]
    fn a_null_console_swallows_all() {
        let quit = EventFd::new().unwrap();
        let endpoint = Endpoint::open(&ConsoleConfig::Null, &quit)
            .unwrap()
            .unwrap();
        let mut driver = Driver::new(Console::new("console0", endpoint));
        driver.negotiate(0);
        let mut receive = driver.queue(0, 16);
        let mut transmit = driver.queue(1, 16);
        driver.ready();
        receive.submit(&[(0x1000, 16, true)]);
        driver.notify(&receive);
        for _ in 0..100 {
            driver.run(&mut transmit, &[(0x1000, 4096, false)]);
        }
        assert!(receive.poll_used().is_none());
    }
}
