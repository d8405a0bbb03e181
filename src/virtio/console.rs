//! The virtio console: one port, carried by an [`Endpoint`]. Virtio 1.3 §5.3.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::device::{Activation, DeviceConfig, VirtioDevice, Worker, doorbell_events};
use super::queue::{QueueError, Virtqueue};
use super::segments::Segments;
use super::spec::{self, console};
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
    config: Arc<DeviceConfig>,
}

impl Console {
    /// A console whose other end is `endpoint`.
    #[must_use]
    pub fn new(name: &str, endpoint: Endpoint) -> Self {
        Self {
            name: name.to_owned(),
            writer: endpoint.writer,
            input: endpoint.reader.map(|reader| Arc::new(Mutex::new(reader))),
            config: DeviceConfig::new(vec![0; console::CONFIG_SIZE]),
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

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn activate(&mut self, mut activation: Activation) -> io::Result<Vec<Box<dyn Worker>>> {
        let queues = (
            activation.take_queue(console::RECEIVEQ.into()),
            activation.take_queue(console::TRANSMITQ.into()),
        );
        let (Some(receive), Some(transmit)) = queues else {
            return Ok(Vec::new());
        };
        let input = self.input.clone().map(Keyboard::new).transpose()?;
        Ok(vec![Box::new(ConsoleWorker {
            name: self.name.clone(),
            ram: activation.ram,
            receive,
            transmit,
            writer: self.writer.clone(),
            input,
        })])
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
    fn new(reader: Arc<Mutex<Reader>>) -> io::Result<Self> {
        let fd = lock(&reader).as_raw_fd();
        let ready = Epoll::new()?;
        ready.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
        Ok(Self {
            reader,
            ready,
            fd,
            bytes: [0; INPUT_PIECE],
            len: 0,
            waiting: 0,
            closed: false,
        })
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
        self.bytes
            .get(self.len.saturating_sub(self.waiting)..self.len)
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

/// Leaves off when the device is being stopped: a chain can hold more than a slow reader takes in days.
fn write_out(mut bytes: Segments<'_>, writer: &mut Writer, stop: &AtomicBool) {
    let mut piece = [0; OUTPUT_PIECE];
    while !stop.load(Ordering::Relaxed) {
        let count = bytes.read(&mut piece);
        let Some(piece) = piece.get(..count).filter(|piece| !piece.is_empty()) else {
            return;
        };
        if let Err(error) = writer.write_all(piece) {
            log::debug!("console output: {error}");
            return;
        }
    }
}

impl Worker for ConsoleWorker {
    fn name(&self) -> String {
        self.name.clone()
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
            let (writer, stop) = (&mut self.writer, self.transmit.stop());
            return self.transmit.drain(&memory, |chain| {
                write_out(chain.readable, writer, &stop);
                Ok(0)
            });
        }
        self.receive(&memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConsoleConfig;
    use crate::virtio::spec::pci::common;
    use crate::virtio::testing::Driver;
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
