//! The device between a driver of a few lines and programs on the host.

mod life;
mod orders;

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use zerocopy::{FromBytes, IntoBytes};

use super::credit::ROOM;
use super::packet::{HEADER_SIZE, Header, Key, Op};
use super::socket::SocketDevice;
use super::{RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::virtio::spec::{self, vsock};
use crate::virtio::testing::{Driver, Ring, eventually, readable};

const CID: u32 = 9;
const BUFFERS: u16 = 16;
const BUFFER: u64 = 4096;
/// What the driver buffers of a connection.
const GUEST_ROOM: u32 = 6000;

/// The guest, and the host's folder.
struct Guest {
    driver: Driver,
    receive: Ring,
    transmit: Ring,
    /// Where the buffers for packets are, and what is sent.
    buffers: u64,
    out: u64,
    /// Buffers that the device was given since the driver was made ready.
    given: u16,
    folder: TempDir,
}

impl Guest {
    /// A device whose driver is not ready yet.
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let device = SocketDevice::new("vsock0", CID, &folder.path().join("s")).unwrap();
        let mut driver = Driver::new(device);
        driver.negotiate(0);
        let (receive, transmit) = (driver.queue(0, BUFFERS), driver.queue(1, BUFFERS));
        let buffers = driver.alloc(BUFFER * u64::from(BUFFERS));
        let out = driver.alloc(u64::from(ROOM) + BUFFER);
        Self {
            driver,
            receive,
            transmit,
            buffers,
            out,
            given: 0,
            folder,
        }
    }

    fn ready() -> Self {
        let mut this = Self::new();
        this.start();
        this
    }

    /// The driver resets the device, and is ready anew.
    fn restart(&mut self) {
        self.driver.negotiate(!spec::feature::EVENT_IDX);
        self.receive = self.driver.queue(RECEIVE_QUEUE, BUFFERS);
        self.transmit = self.driver.queue(TRANSMIT_QUEUE, BUFFERS);
        self.start();
    }

    fn start(&mut self) {
        self.driver.ready();
        self.given = 0;
        for _ in 0..BUFFERS {
            self.give_buffer();
        }
    }

    /// One more buffer: each is of one descriptor, whose number is the buffer's.
    fn give_buffer(&mut self) {
        let number = self.given % BUFFERS;
        self.given = self.given.wrapping_add(1);
        let at = self.buffers + BUFFER * u64::from(number);
        let head = self.receive.submit(&[(at, BUFFER as u32, true)]);
        assert_eq!(head, number);
        self.driver.notify(&self.receive);
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("s")
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.path().join(format!("s_{port}"))).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.path()).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        stream
    }

    fn header(key: Key, op: Op) -> Header {
        Header {
            src_cid: u64::from(CID).into(),
            dst_cid: vsock::HOST_CID.into(),
            src_port: key.guest.into(),
            dst_port: key.host.into(),
            kind: vsock::TYPE_STREAM.into(),
            op: op.number(),
            buf_alloc: GUEST_ROOM.into(),
            ..Header::default()
        }
    }

    fn send(&mut self, key: Key, op: Op) {
        self.send_whole(&Self::header(key, op), &[]);
    }

    fn shut(&mut self, key: Key, flags: u32) {
        let header = Header {
            flags: flags.into(),
            ..Self::header(key, Op::Shutdown)
        };
        self.send_whole(&header, &[]);
    }

    fn data(&mut self, key: Key, data: &[u8]) {
        self.send_whole(&Self::header(key, Op::Rw), data);
    }

    fn send_whole(&mut self, header: &Header, data: &[u8]) {
        let header = Header {
            len: u32::try_from(data.len()).unwrap().into(),
            ..*header
        };
        self.driver.write(self.out, header.as_bytes());
        let at = self.out + BUFFER;
        self.driver.write(at, data);
        let chain = [
            (self.out, HEADER_SIZE as u32, false),
            (at, data.len() as u32, false),
        ];
        let chain = if data.is_empty() { &chain[..1] } else { &chain };
        self.driver.run(&mut self.transmit, chain);
    }

    /// The next packet, where there is one. Its buffer is the device's again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (head, len) = self.receive.poll_used()?;
        let at = self.buffers + BUFFER * u64::from(head);
        let bytes = self.driver.read(at, len as usize);
        let (header, data) = bytes.split_at(HEADER_SIZE);
        let header = Header::read_from_bytes(header).unwrap();
        assert_eq!(header.dst_cid.get(), u64::from(CID));
        assert_eq!(header.src_cid.get(), vsock::HOST_CID);
        assert_eq!(header.len.get() as usize, data.len());
        self.give_buffer();
        Some((header, data.to_vec()))
    }

    fn packet(&mut self) -> (Header, Vec<u8>) {
        let mut packet = None;
        eventually("a packet for the guest", || {
            packet = self.poll();
            packet.is_some()
        });
        packet.unwrap()
    }

    /// The next packet is this one, which has no data.
    fn expect(&mut self, key: Key, op: Op) -> Header {
        let (header, data) = self.packet();
        assert_eq!((Op::of(&header), data.len()), (Some(op), 0));
        assert_eq!(from_host(&header), key);
        header
    }

    /// Nothing is on its way to the guest: what is asked now is answered next.
    fn expect_nothing(&mut self) {
        let nobody = Key { host: 1, guest: 1 };
        self.send(nobody, Op::CreditRequest);
        self.expect(nobody, Op::Rst);
    }

    /// A connection that a program on the host wanted to port `guest`.
    fn program_connects(&mut self, guest: u32) -> (Key, UnixStream) {
        let mut program = self.connect();
        writeln!(program, "CONNECT {guest}").unwrap();
        let (header, _) = self.packet();
        assert_eq!(Op::of(&header), Some(Op::Request));
        let key = from_host(&header);
        assert_eq!(key.guest, guest);
        self.send(key, Op::Response);
        assert_eq!(line(&mut program), format!("OK {}\n", key.host));
        (key, program)
    }

    /// A connection that the guest wanted.
    fn guest_connects(&mut self, key: Key, listener: &UnixListener) -> UnixStream {
        self.send(key, Op::Request);
        self.expect(key, Op::Response);
        listener.accept().unwrap().0
    }
}

/// The connection of a packet of the host's.
fn from_host(header: &Header) -> Key {
    Key {
        host: header.src_port.get(),
        guest: header.dst_port.get(),
    }
}

/// A line, and nothing beyond it.
fn line(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    while bytes.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap()
}

fn rest(mut stream: &UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_program_on_the_host_reaches_one_in_the_guest_and_both_are_heard() {
    let mut guest = Guest::ready();
    let mut program = guest.connect();
    // What follows the line is the guest's, and waits until the guest has accepted.
    program.write_all(b"CONNECT 5\nearly").unwrap();
    let (header, _) = guest.packet();
    let key = from_host(&header);
    assert!(key.host >= 1 << 30 && header.buf_alloc.get() == ROOM);
    guest.expect_nothing();
    guest.send(key, Op::Response);
    let (header, data) = guest.packet();
    assert_eq!((Op::of(&header), &data[..]), (Some(Op::Rw), &b"early"[..]));
    assert_eq!(line(&mut program), format!("OK {}\n", key.host));
    guest.data(key, b"answer\n");
    assert_eq!(line(&mut program), "answer\n");
    // Another on the same port is another connection.
    let (other, _program) = guest.program_connects(5);
    assert_ne!(other, key);
}

#[test]
fn the_guest_reaches_who_listens_and_hears_at_once_that_nobody_does() {
    let mut guest = Guest::ready();
    let key = Key {
        host: 7,
        guest: 1234,
    };
    guest.send(key, Op::Request);
    guest.expect(key, Op::Rst);
    let listener = guest.listen(7);
    let mut program = guest.guest_connects(key, &listener);
    program.write_all(b"hello").unwrap();
    assert_eq!(guest.packet().1, b"hello");
    guest.data(key, b"you");
    let mut heard = [0; 3];
    program.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"you");
}

#[test]
fn a_listener_without_room_is_a_reset_and_keeps_nobody_waiting() {
    let mut guest = Guest::ready();
    let listener = guest.listen(7);
    rustix::net::listen(&listener, 0).unwrap();
    let start = Instant::now();
    let mut refused = 0;
    for port in 0..20 {
        let key = Key {
            host: 7,
            guest: 100 + port,
        };
        guest.send(key, Op::Request);
        let (header, _) = guest.packet();
        refused += u32::from(Op::of(&header) == Some(Op::Rst));
    }
    assert!(refused > 15 && start.elapsed() < Duration::from_secs(5));
}

#[test]
fn no_reset_is_answered_by_a_reset_and_all_else_of_no_connection_is() {
    let mut guest = Guest::ready();
    let key = Key { host: 7, guest: 8 };
    for op in [
        Op::Response,
        Op::Shutdown,
        Op::Rw,
        Op::CreditUpdate,
        Op::CreditRequest,
    ] {
        guest.send(key, op);
        guest.expect(key, Op::Rst);
    }
    guest.send(key, Op::Rst);
    guest.expect_nothing();
    // Of a kind of socket that there is not, as of none at all.
    for (op, answered) in [(Op::Request, true), (Op::Rst, false)] {
        let header = Header {
            kind: 2.into(),
            ..Guest::header(key, op)
        };
        guest.send_whole(&header, &[]);
        if answered {
            assert_eq!(guest.expect(key, Op::Rst).kind.get(), 2);
        }
        guest.expect_nothing();
    }
    // To or from another address.
    for (src, dst) in [(CID, 1_u32), (CID + 1, 2)] {
        let header = Header {
            src_cid: u64::from(src).into(),
            dst_cid: u64::from(dst).into(),
            ..Guest::header(key, Op::Request)
        };
        guest.send_whole(&header, &[]);
        guest.expect_nothing();
    }
}

#[test]
fn ports_that_are_used_again_at_once_are_not_hit_by_the_reset_of_the_connection_before() {
    let mut guest = Guest::ready();
    let listener = guest.listen(7);
    let key = Key { host: 7, guest: 8 };
    let _first = guest.guest_connects(key, &listener);
    // The driver has no buffers for a while.
    for port in 0..u32::from(BUFFERS) {
        guest.send(
            Key {
                host: 6,
                guest: port,
            },
            Op::Request,
        );
    }
    guest.shut(key, vsock::SHUTDOWN_SEND | vsock::SHUTDOWN_RECEIVE);
    guest.send(key, Op::Rst);
    guest.send(key, Op::Request);
    for _ in 0..BUFFERS {
        assert_eq!(Op::of(&guest.packet().0), Some(Op::Rst));
    }
    guest.expect(key, Op::Response);
    let mut second = listener.accept().unwrap().0;
    second.write_all(b"here").unwrap();
    assert_eq!(guest.packet().1, b"here");
}

#[test]
fn what_the_guest_sent_before_it_closed_arrives_at_a_program_that_reads_late() {
    let mut guest = Guest::ready();
    let (key, program) = guest.program_connects(5);
    // More than the program's socket takes.
    let sent: Vec<u8> = (0..2 * ROOM).map(|i| (i >> 8 ^ i) as u8).collect();
    for piece in sent.chunks(ROOM as usize) {
        guest.data(key, piece);
    }
    guest.shut(key, vsock::SHUTDOWN_SEND | vsock::SHUTDOWN_RECEIVE);
    // It has its answer before the program has read anything, and the ports are free.
    loop {
        let (header, _) = guest.packet();
        match Op::of(&header) {
            Some(Op::CreditUpdate) => {}
            op => break assert_eq!(op, Some(Op::Rst)),
        }
    }
    guest.send(key, Op::Rst);
    guest.expect_nothing();
    assert!(rest(&program) == sent);
}

#[test]
fn a_guest_that_sends_more_than_there_is_room_for_loses_its_connection_and_no_other() {
    let mut guest = Guest::ready();
    let (other, mut kept) = guest.program_connects(5);
    let (key, program) = guest.program_connects(5);
    // What the program's socket takes is room that comes back.
    let mut sent = 0;
    loop {
        guest.data(key, &vec![7; ROOM as usize]);
        sent += ROOM as usize;
        let mut over = false;
        while let Some((header, _)) = guest.poll() {
            over |= Op::of(&header) == Some(Op::Rst);
        }
        guest.send(Key { host: 1, guest: 1 }, Op::CreditRequest);
        loop {
            let (header, _) = guest.packet();
            match from_host(&header).host {
                1 => break,
                _ => over |= Op::of(&header) == Some(Op::Rst),
            }
        }
        if over {
            break;
        }
        assert!(sent < 64 << 20, "no end");
    }
    assert!(rest(&program).len() < sent);
    guest.data(other, b"still\n");
    assert_eq!(line(&mut kept), "still\n");
}

#[test]
fn a_program_that_has_gone_is_the_end_of_both_directions_behind_what_it_had_sent() {
    let mut guest = Guest::ready();
    let (key, mut program) = guest.program_connects(5);
    program.write_all(b"last words").unwrap();
    drop(program);
    let (mut heard, mut ends) = (Vec::new(), 0);
    while ends != vsock::SHUTDOWN_SEND | vsock::SHUTDOWN_RECEIVE {
        let (header, data) = guest.packet();
        heard.extend(data);
        match Op::of(&header) {
            Some(Op::Rw) => {}
            op => {
                assert_eq!(op, Some(Op::Shutdown));
                ends |= header.flags.get();
            }
        }
    }
    assert_eq!(heard, b"last words");
    guest.send(key, Op::Rst);
    guest.send(key, Op::Rw);
    guest.expect(key, Op::Rst);
}

#[test]
fn a_program_that_leaves_before_the_guest_has_answered_leaves_nothing_behind() {
    let mut guest = Guest::ready();
    let mut program = guest.connect();
    program.write_all(b"CONNECT 5\n").unwrap();
    let key = from_host(&guest.packet().0);
    drop(program);
    guest.expect(key, Op::Rst);
    // The guest's answer was on its way.
    guest.send(key, Op::Response);
    guest.expect(key, Op::Rst);
}

#[test]
fn a_thousand_programs_that_say_nonsense_and_leave_disturb_no_stream() {
    let mut guest = Guest::ready();
    let (key, mut program) = guest.program_connects(5);
    let nonsense: [&[u8]; 5] = [b"", b"CONNECT", b"\xff\xfe\n", b"CONNECT 5", &[b'a'; 400]];
    for round in 0..200_u32 {
        for bytes in nonsense {
            // Where it is turned away before it has said all, it is told so.
            let _gone = guest.connect().write_all(bytes);
        }
        guest.data(key, &round.to_le_bytes());
        let mut heard = [0; 4];
        program.read_exact(&mut heard).unwrap();
        assert_eq!(u32::from_le_bytes(heard), round);
        program.write_all(&heard).unwrap();
        let header = Header {
            fwd_cnt: (4 * round).into(),
            ..Guest::header(key, Op::CreditUpdate)
        };
        guest.send_whole(&header, &[]);
        assert_eq!(guest.packet().1, heard);
    }
}

#[test]
fn a_guest_that_shuts_one_direction_keeps_the_other() {
    let mut guest = Guest::ready();
    let (key, mut program) = guest.program_connects(5);
    guest.shut(key, vsock::SHUTDOWN_RECEIVE);
    // The program is told that nobody hears it, and hears all the same.
    eventually("EPIPE", || {
        program
            .write_all(b"x")
            .is_err_and(|error| error.kind() == ErrorKind::BrokenPipe)
    });
    guest.data(key, b"still here\n");
    assert_eq!(line(&mut program), "still here\n");
    guest.shut(key, vsock::SHUTDOWN_SEND);
    assert!(readable(program.as_fd(), Duration::from_secs(10)));
    assert!(rest(&program).is_empty());
}
