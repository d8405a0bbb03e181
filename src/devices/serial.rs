//! The serial port: a 16550A whose output and input are a console's.
//!
//! The registers are `vm-superio`'s. A thread of its own brings input, and waits while the guest's
//! receive FIFO is full; output goes by the console's [`Writer`].

use std::convert::Infallible;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use busway_vfio::EventFd;
use vm_superio::Trigger;
use vm_superio::serial::{SerialEvents, SerialState};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};

use super::console::{Endpoint, Input, Reader, Writer};
use super::watch;
use crate::kvm::BusDevice;
use crate::provoked;
use crate::sandbox::{self, Kind};

/// Bytes of its registers.
pub const SIZE: u16 = 8;

type Uart = vm_superio::Serial<Irq, Arc<Room>, Writer>;

/// The port.
#[derive(Debug)]
pub struct Serial {
    uart: Arc<Mutex<Uart>>,
    irq: Irq,
    room: Arc<Room>,
    writer: Writer,
    input: Option<InputThread>,
}

#[derive(Debug)]
struct InputThread {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Serial {
    /// The port, whose interrupt, edge-triggered, is `irq`. It takes [`SIZE`] bytes.
    ///
    /// # Errors
    /// There is no thread or no descriptor to be had for the input.
    pub fn new(irq: EventFd, endpoint: Endpoint) -> io::Result<Self> {
        let irq = Irq(irq);
        let room = Arc::new(Room {
            event: EventFd::new()?,
            wanted: AtomicBool::new(false),
        });
        let Endpoint { writer, reader, .. } = endpoint;
        let uart = Arc::new(Mutex::new(Uart::with_events(
            irq.clone(),
            room.clone(),
            writer.clone(),
        )));
        let input = reader
            .map(|reader| InputThread::start(reader, uart.clone(), room.clone()))
            .transpose()?;
        Ok(Self {
            uart,
            irq,
            room,
            writer,
            input,
        })
    }

    /// The machine was reset: the registers are as after power-on, and unread input is gone.
    pub fn reset(&self) {
        let mut uart = lock(&self.uart);
        *uart = Uart::with_events(self.irq.clone(), self.room.clone(), self.writer.clone());
        self.room.signal();
    }

    /// What the registers hold.
    #[must_use]
    pub fn state(&self) -> SerialState {
        lock(&self.uart).state()
    }

    /// Waits until the output has been written, for a second at most.
    pub fn drain(&self) {
        self.writer.drain();
    }
}

/// The registers are a byte wide; a wider access reaches as many of them, as it does on an ISA bus.
impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut uart = lock(&self.uart);
        for (register, byte) in (offset..).zip(data) {
            *byte = uart.read(register as u8);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut uart = lock(&self.uart);
        for (register, &byte) in (offset..).zip(data) {
            if let Err(error) = uart.write(register as u8, byte) {
                log::debug!("serial port: {error}");
            }
        }
    }
}

impl Drop for Serial {
    fn drop(&mut self) {
        // The reader gives the terminal back when its thread ends.
        self.input = None;
        self.writer.drain();
    }
}

impl InputThread {
    fn start(reader: Reader, uart: Arc<Mutex<Uart>>, room: Arc<Room>) -> io::Result<Self> {
        let stop = EventFd::new()?;
        let events = Epoll::new()?;
        watch(&events, ControlOperation::Add, &stop)?;
        watch(&events, ControlOperation::Add, &room.event)?;
        watch(&events, ControlOperation::Add, &reader)?;
        let stop_fd = stop.as_raw_fd();
        let thread = std::thread::Builder::new()
            .name("serial-in".into())
            .spawn(move || {
                sandbox::enter(Kind::Input);
                if let Err(error) = bring_input(reader, &uart, &room, &events, stop_fd) {
                    log::warn!("the serial port's input ended: {error}");
                }
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for InputThread {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::warn!("the serial port's input thread panicked");
        }
    }
}

/// The input thread: reads as much as the FIFO has room for, and waits for room where it has none.
fn bring_input(
    mut reader: Reader,
    uart: &Mutex<Uart>,
    room: &Room,
    events: &Epoll,
    stop: i32,
) -> io::Result<()> {
    let mut buffer = [0; 64];
    let mut ready = [EpollEvent::default(); 3];
    loop {
        let count = match events.wait(-1, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        };
        provoked::here();
        for event in ready.iter().take(count) {
            if event.fd() == stop {
                return Ok(());
            }
            if event.fd() == room.event.as_raw_fd() {
                // Read to make it unreadable; what it counted does not matter.
                let _count = room.event.take();
                watch(events, ControlOperation::Add, &reader)?;
                continue;
            }
            let free = {
                let uart = lock(uart);
                let free = uart.fifo_capacity();
                if free == 0 {
                    room.wanted.store(true, Ordering::Relaxed);
                }
                free
            };
            if free == 0 {
                watch(events, ControlOperation::Delete, &reader)?;
                continue;
            }
            let free = free.min(buffer.len());
            match reader.read(&mut buffer[..free]) {
                Input::Bytes(count) => {
                    let bytes = buffer.get(..count).unwrap_or_default();
                    if let Err(error) = lock(uart).enqueue_raw_bytes(bytes) {
                        log::debug!("serial port: {error}");
                    }
                }
                Input::Nothing => {}
                Input::Closed => return Ok(()),
            }
        }
    }
}

fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The interrupt's eventfd.
#[derive(Clone, Debug)]
struct Irq(EventFd);

impl Trigger for Irq {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.signal();
        Ok(())
    }
}

/// Tells the input thread that the FIFO has room again, where it asked. Both sides hold the UART's lock.
#[derive(Debug)]
struct Room {
    event: EventFd,
    wanted: AtomicBool,
}

impl Room {
    fn signal(&self) {
        if self.wanted.swap(false, Ordering::Relaxed) {
            self.event.signal();
        }
    }
}

impl SerialEvents for Room {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.signal();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::config::ConsoleConfig;

    // Registers and bits of the 16550.
    const DATA: u64 = 0;
    const INTERRUPT_ENABLE: u64 = 1;
    const LINE_STATUS: u64 = 5;
    const DATA_READY: u8 = 1;

    /// A port on a socket in `folder`, with a client connected.
    fn port(folder: &tempfile::TempDir) -> (Serial, UnixStream, EventFd) {
        let path = folder.path().join("serial");
        let quit = EventFd::new().unwrap();
        let endpoint = Endpoint::open(&ConsoleConfig::Socket(path.clone()), &quit)
            .unwrap()
            .unwrap();
        assert_eq!(endpoint.location.as_deref(), Some(path.as_path()));
        let irq = EventFd::new().unwrap();
        let serial = Serial::new(irq.clone(), endpoint).unwrap();
        let mut client = UnixStream::connect(path).unwrap();
        client
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        serial.write(INTERRUPT_ENABLE, &[1]);
        // Input has arrived only when the client has been accepted.
        client.write_all(b"!").unwrap();
        interrupt(&irq);
        assert_eq!(read(&serial, DATA), b'!');
        (serial, client, irq)
    }

    /// Waits for an interrupt.
    fn interrupt(irq: &EventFd) {
        let patience = Timespec {
            tv_sec: 20,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(irq, PollFlags::IN)], Some(&patience)).unwrap();
        assert!(irq.take() > 0, "no interrupt");
    }

    fn read(serial: &Serial, register: u64) -> u8 {
        let mut data = [0];
        serial.read(register, &mut data);
        data[0]
    }

    #[test]
    fn what_the_guest_writes_reaches_the_client() {
        let folder = tempfile::tempdir().unwrap();
        let (serial, mut client, _irq) = port(&folder);
        for byte in b"hello" {
            serial.write(DATA, &[*byte]);
        }
        let mut buffer = [0; 5];
        client.read_exact(&mut buffer).unwrap();
        assert_eq!(&buffer, b"hello");
        drop(serial);
        assert!(!folder.path().join("serial").exists(), "the socket is gone");
    }

    #[test]
    fn no_program_started_later_inherits_its_events() {
        let folder = tempfile::tempdir().unwrap();
        let (serial, _client, _irq) = port(&folder);
        for event in [&serial.room.event, &serial.input.as_ref().unwrap().stop] {
            let reported = format!("/proc/self/fdinfo/{}", event.as_raw_fd());
            let reported = std::fs::read_to_string(reported).unwrap();
            // In octal. proc_pid_fdinfo(5)
            let flags = reported
                .lines()
                .find_map(|line| line.strip_prefix("flags:"));
            let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            let wanted = libc::O_CLOEXEC | libc::O_NONBLOCK;
            assert_eq!(flags & wanted, wanted);
        }
    }

    #[test]
    fn input_beyond_the_fifo_waits_until_the_guest_has_read() {
        let folder = tempfile::tempdir().unwrap();
        let (serial, mut client, irq) = port(&folder);
        let sent: Vec<u8> = (0..1000_u32).map(|n| n as u8).collect();
        client.write_all(&sent).unwrap();
        let mut seen = Vec::new();
        while seen.len() < sent.len() {
            interrupt(&irq);
            while read(&serial, LINE_STATUS) & DATA_READY != 0 {
                seen.push(read(&serial, DATA));
            }
        }
        assert_eq!(seen, sent);
    }

    #[test]
    fn a_reset_forgets_the_registers_and_input_goes_on() {
        let folder = tempfile::tempdir().unwrap();
        let (serial, mut client, irq) = port(&folder);
        client.write_all(&[7; 300]).unwrap();
        interrupt(&irq);
        serial.reset();
        assert_eq!(serial.state().interrupt_enable, 0);
        client.write_all(b"z").unwrap();
        serial.write(INTERRUPT_ENABLE, &[1]);
        loop {
            interrupt(&irq);
            while read(&serial, LINE_STATUS) & DATA_READY != 0 {
                if read(&serial, DATA) == b'z' {
                    return;
                }
            }
        }
    }
}
