//! All orders in which two programs send, read and end their halves.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::credit::ROOM;
use super::super::packet::{Header, Key, Op};
use super::{Guest, from_host};
use crate::virtio::spec::vsock;

/// What either program does next.
#[derive(Clone, Debug)]
enum Step {
    GuestSends(usize),
    GuestReads,
    GuestEnds,
    HostSends(usize),
    HostReads(usize),
    HostEnds,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let size = || prop_oneof![1_usize..10, 1_usize..9000, 1_usize..300_000];
    let step = prop_oneof![
        4 => size().prop_map(Step::GuestSends),
        4 => Just(Step::GuestReads),
        1 => Just(Step::GuestEnds),
        4 => size().prop_map(Step::HostSends),
        4 => size().prop_map(Step::HostReads),
        1 => Just(Step::HostEnds),
    ];
    proptest::collection::vec(step, 1..40)
}

/// A connection as its two programs know it: what each is to hear, and has heard.
struct Talk {
    guest: Guest,
    key: Key,
    program: UnixStream,
    /// As the driver counts.
    sent: u32,
    host_forwarded: u32,
    read: u32,
    to_host: Vec<u8>,
    host_heard: Vec<u8>,
    host_over: bool,
    to_guest: Vec<u8>,
    guest_heard: Vec<u8>,
    guest_over: bool,
    guest_ended: bool,
    host_ended: bool,
}

impl Talk {
    fn new() -> Self {
        let mut guest = Guest::ready();
        let (key, program) = guest.program_connects(5);
        program.set_nonblocking(true).unwrap();
        Self {
            guest,
            key,
            program,
            sent: 0,
            host_forwarded: 0,
            read: 0,
            to_host: Vec::new(),
            host_heard: Vec::new(),
            host_over: false,
            to_guest: Vec::new(),
            guest_heard: Vec::new(),
            guest_over: false,
            guest_ended: false,
            host_ended: false,
        }
    }

    fn header(&self, op: Op) -> Header {
        Header {
            fwd_cnt: self.read.into(),
            ..Guest::header(self.key, op)
        }
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::GuestSends(size) if !self.guest_ended => {
                let room = ROOM - self.sent.wrapping_sub(self.host_forwarded);
                let size = size.min(room as usize);
                let data: Vec<u8> = (0..size)
                    .map(|i| (i * 7 + self.to_host.len()) as u8)
                    .collect();
                if size > 0 {
                    self.guest.send_whole(&self.header(Op::Rw), &data);
                }
                self.sent += size as u32;
                self.to_host.extend(data);
            }
            Step::GuestReads => {
                while let Some((header, data)) = self.guest.poll() {
                    self.hear(&header, data);
                }
            }
            Step::GuestEnds if !self.guest_ended => {
                self.guest_ended = true;
                let header = Header {
                    flags: vsock::SHUTDOWN_SEND.into(),
                    ..self.header(Op::Shutdown)
                };
                self.guest.send_whole(&header, &[]);
            }
            Step::HostSends(size) if !self.host_ended => {
                let data: Vec<u8> = (0..size)
                    .map(|i| (i * 5 + self.to_guest.len()) as u8)
                    .collect();
                match self.program.write(&data) {
                    Ok(count) => self.to_guest.extend(&data[..count]),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            Step::HostReads(size) => {
                let mut data = vec![0; size];
                match self.program.read(&mut data) {
                    Ok(0) => self.host_over = true,
                    Ok(count) => self.host_heard.extend(&data[..count]),
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            Step::HostEnds if !self.host_ended => {
                self.host_ended = true;
                self.program.shutdown(Shutdown::Write).unwrap();
            }
            Step::GuestSends(_) | Step::GuestEnds | Step::HostSends(_) | Step::HostEnds => {}
        }
    }

    fn hear(&mut self, header: &Header, data: Vec<u8>) {
        assert_eq!(from_host(header), self.key);
        self.host_forwarded = header.fwd_cnt.get();
        match Op::of(header).unwrap() {
            Op::Rw => {
                assert!(!self.guest_over, "data behind the end");
                self.read = self.read.wrapping_add(data.len() as u32);
                self.guest_heard.extend(data);
                self.guest.send_whole(&self.header(Op::CreditUpdate), &[]);
            }
            Op::CreditUpdate => {}
            Op::CreditRequest => self.guest.send_whole(&self.header(Op::CreditUpdate), &[]),
            Op::Shutdown => {
                self.guest_over |= header.flags.get() & vsock::SHUTDOWN_SEND != 0;
                let receives = header.flags.get() & vsock::SHUTDOWN_RECEIVE == 0;
                assert!(receives || self.guest_ended, "the program reads still");
            }
            op => panic!("{op:?}"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// In whatever order the two send, read slowly and end their halves, each hears all that the other has sent, and its
    /// end behind that and not before.
    #[test]
    fn each_direction_arrives_whole_and_ends_by_itself_in_every_order(steps in steps()) {
        let mut talk = Talk::new();
        for step in &steps {
            talk.step(step);
            prop_assert!(talk.guest_ended || !talk.host_over);
            prop_assert!(talk.host_ended || !talk.guest_over);
        }
        talk.step(&Step::GuestEnds);
        talk.step(&Step::HostEnds);
        let start = Instant::now();
        while !(talk.host_over && talk.guest_over) {
            talk.step(&Step::GuestReads);
            talk.step(&Step::HostReads(1 << 20));
            prop_assert!(start.elapsed() < Duration::from_secs(20), "no end");
        }
        prop_assert!(talk.host_heard == talk.to_host);
        prop_assert!(talk.guest_heard == talk.to_guest);
        // Both are over: the guest's socket goes, and with it the connection.
        let key = talk.key;
        talk.guest.send(key, Op::Rst);
        talk.guest.send(key, Op::Rw);
        loop {
            let (header, _) = talk.guest.packet();
            if Op::of(&header) == Some(Op::Rst) {
                break;
            }
        }
    }
}
