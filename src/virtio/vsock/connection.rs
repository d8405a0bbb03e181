//! One connection between a program in the guest and one on the host: what either has sent and the other has not had,
//! and which of the two directions are over. Virtio 1.3 §5.10.6.
//!
//! A direction ends by itself. The guest's end of sending reaches the host's program behind all that was sent before, as
//! shutdown(2), and the other way as VIRTIO_VSOCK_OP_SHUTDOWN.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, IoSlice, Write as _};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use super::credit::{Credit, ROOM};
use super::packet::{Header, Key, Op, Outgoing};
use crate::virtio::segments::Segments;
use crate::virtio::spec::vsock::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// The most data of one packet. Linux, `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`
const PACKET_MOST: usize = 64 << 10;

/// Bytes of the guest's on their way to a program on the host.
#[derive(Debug)]
pub(super) struct Outlet {
    stream: UnixStream,
    /// What the program has not read.
    kept: VecDeque<u8>,
    /// It reads, as far as is known.
    open: bool,
}

impl Outlet {
    /// Writes what is kept, as far as the program's end takes it. How much has left.
    fn flush(&mut self) -> usize {
        let mut left = 0;
        while self.open && !self.kept.is_empty() {
            let (front, back) = self.kept.as_slices();
            match (&self.stream).write_vectored(&[IoSlice::new(front), IoSlice::new(back)]) {
                Ok(count) => {
                    let count = count.min(self.kept.len());
                    self.kept.drain(..count);
                    left += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return left,
                Err(_) => left += self.close(),
            }
        }
        if self.kept.is_empty() {
            self.kept = VecDeque::new();
        }
        left
    }

    /// The program reads no more. How much of what is kept is of no use now.
    fn close(&mut self) -> usize {
        self.open = false;
        let lost = self.kept.len();
        self.kept = VecDeque::new();
        lost
    }

    /// Passes on what the guest has sent. How much has left.
    fn pass(&mut self, data: &mut Segments<'_>) -> usize {
        let mut left = 0;
        while self.open && self.kept.is_empty() && !data.is_empty() {
            match data.send(self.stream.as_fd()) {
                Ok(count) => {
                    data.advance(count);
                    left += count;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => left += self.close(),
            }
        }
        if !self.open {
            return left + data.len();
        }
        let mut piece = [0; 4096];
        while !data.is_empty() {
            let count = data.read(&mut piece);
            self.kept.extend(piece.get(..count).unwrap_or_default());
        }
        left
    }
}

/// What is left of a connection that the guest has closed: bytes that it has sent before.
#[derive(Debug)]
pub(super) struct Leaving(Outlet);

impl Leaving {
    /// Whether something is left after another attempt, and whether that got any further.
    pub(super) fn flush(&mut self) -> (bool, bool) {
        let left = self.0.flush();
        (self.0.open && !self.0.kept.is_empty(), left > 0)
    }

    /// The program is gone.
    pub(super) fn close(&mut self) {
        self.0.close();
    }
}

/// How far a connection has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A program on the host wants it, and the guest is to be asked.
    Wanted,
    /// The guest has been asked.
    Asked,
    /// A program in the guest wants it, and is to hear that it has it.
    Granted,
    /// Both know of it.
    Open,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    key: Key,
    phase: Phase,
    outlet: Outlet,
    credit: Credit,
    /// The guest may send still.
    guest_sends: bool,
    /// The guest may receive still.
    guest_receives: bool,
    /// All that the guest has sent is out, and the program has been told that no more comes.
    drained: bool,
    /// There may be something to read from the program.
    readable: bool,
    /// The program sends no more, and all is with the guest; or the guest receives no more.
    ended: bool,
    /// The guest was asked for its credit, and has not said anything since.
    asked_credit: bool,
    /// The guest wants to know its credit.
    owes_credit: bool,
    /// What the guest has heard of the ends of the program's directions: `SHUTDOWN_*`.
    told: u32,
}

/// What a packet of the guest's makes of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Stays,
    /// It is over, and the guest is told by a reset, unless it has said so itself.
    Ends {
        /// The guest is told.
        reset: bool,
    },
}

impl Fate {
    const BROKEN: Self = Self::Ends { reset: true };
}

impl Connection {
    fn new(key: Key, phase: Phase, stream: UnixStream) -> Self {
        Self {
            key,
            phase,
            outlet: Outlet {
                stream,
                kept: VecDeque::new(),
                open: true,
            },
            credit: Credit::default(),
            guest_sends: true,
            guest_receives: true,
            drained: false,
            readable: true,
            ended: false,
            asked_credit: false,
            owes_credit: false,
            told: 0,
        }
    }

    /// One that the program at the other end of `stream` wants. The stream does not block.
    pub(super) fn wanted_by_host(key: Key, stream: UnixStream) -> Self {
        Self::new(key, Phase::Wanted, stream)
    }

    /// One that the guest has asked for by `header`, and has.
    pub(super) fn wanted_by_guest(header: &Header, stream: UnixStream) -> Self {
        let mut this = Self::new(header.key(), Phase::Granted, stream);
        this.credit.learn(header);
        this
    }

    pub(super) fn key(&self) -> Key {
        self.key
    }

    /// The bytes that are still on their way to the program, where there are any.
    pub(super) fn into_leaving(mut self) -> Option<Leaving> {
        self.outlet.flush();
        let left = self.outlet.open && !self.outlet.kept.is_empty();
        left.then_some(Leaving(self.outlet))
    }

    /// Whether it waits for the guest's answer: to a request, or to the end of both directions.
    pub(super) fn is_waiting(&self) -> bool {
        matches!(self.phase, Phase::Wanted | Phase::Asked)
            || self.told == SHUTDOWN_SEND | SHUTDOWN_RECEIVE
    }

    /// Whether the guest has heard of it.
    pub(super) fn is_known(&self) -> bool {
        self.phase != Phase::Wanted
    }

    /// The program has said something, or ended its sending.
    pub(super) fn host_speaks(&mut self) {
        self.readable = true;
    }

    /// The program reads.
    pub(super) fn host_reads(&mut self) {
        let left = self.outlet.flush();
        self.credit.forward(left);
        self.drain();
    }

    /// The program is gone, or neither direction has anything to come. What it has sent may be unread.
    pub(super) fn host_leaves(&mut self) -> Fate {
        match self.phase {
            // Nobody is left to wait for the guest's answer.
            Phase::Wanted | Phase::Asked => Fate::Ends {
                reset: self.is_known(),
            },
            Phase::Granted | Phase::Open => {
                let lost = self.outlet.close();
                self.credit.forward(lost);
                self.readable = true;
                Fate::Stays
            }
        }
    }

    /// A packet from the guest, which is not a request, with its data.
    pub(super) fn take(&mut self, op: Op, header: &Header, data: &mut Segments<'_>) -> Fate {
        self.credit.learn(header);
        // A guest that has none says so at once, and will say when it has some.
        self.asked_credit &= self.credit.for_guest() == 0;
        match (op, self.phase) {
            (Op::Rst, _) => Fate::Ends { reset: false },
            (Op::Response, Phase::Asked) => self.open(),
            (Op::Rw, Phase::Granted | Phase::Open) => self.take_data(header, data),
            (Op::Shutdown, Phase::Granted | Phase::Open) => self.shut(header.flags.get()),
            (Op::CreditUpdate, _) => Fate::Stays,
            (Op::CreditRequest, Phase::Granted | Phase::Open) => {
                self.owes_credit = true;
                Fate::Stays
            }
            _ => Fate::BROKEN,
        }
    }

    /// The guest has accepted: the program hears so, and may speak.
    fn open(&mut self) -> Fate {
        self.phase = Phase::Open;
        let line = format!("OK {}\n", self.key.host);
        match (&self.outlet.stream).write(line.as_bytes()) {
            Ok(count) if count == line.len() => Fate::Stays,
            // Nothing was written before, so there is room unless the program is gone.
            _ => Fate::BROKEN,
        }
    }

    fn take_data(&mut self, header: &Header, data: &mut Segments<'_>) -> Fate {
        let whole = usize::try_from(header.len.get()).is_ok_and(|len| len == data.len());
        if !self.guest_sends || !whole || !self.credit.receive(data.len()) {
            return Fate::BROKEN;
        }
        let left = self.outlet.pass(data);
        self.credit.forward(left);
        Fate::Stays
    }

    /// The guest sends no more, or receives no more.
    fn shut(&mut self, flags: u32) -> Fate {
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
            self.drain();
        }
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_receives = false;
            self.ended = true;
            // The program gets EPIPE from now on.
            let _gone = self.outlet.stream.shutdown(Shutdown::Read);
        }
        match self.guest_sends || self.guest_receives {
            true => Fate::Stays,
            // This is the answer that the guest waits for. What it has sent is on its way all the same.
            false => Fate::Ends { reset: true },
        }
    }

    /// Has the program hear that the guest sends no more, once it has had all.
    fn drain(&mut self) {
        if !self.guest_sends && self.outlet.kept.is_empty() && !self.drained {
            self.drained = true;
            let _gone = self.outlet.stream.shutdown(Shutdown::Write);
        }
    }

    /// What the guest should know of the program's directions: `SHUTDOWN_*`.
    fn ends(&self) -> u32 {
        let sends = if self.ended { SHUTDOWN_SEND } else { 0 };
        let over = !self.outlet.open || self.drained && self.ended;
        sends | if over { SHUTDOWN_RECEIVE } else { 0 }
    }

    fn may_read(&self) -> bool {
        let room = self.credit.for_guest() > 0 || !self.asked_credit;
        self.phase == Phase::Open && self.readable && !self.ended && room
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_more(&self) -> bool {
        match self.phase {
            Phase::Wanted | Phase::Granted => true,
            Phase::Asked => false,
            Phase::Open => {
                let told = self.ends() & !self.told == 0;
                self.may_read() || !told || self.owes_credit || self.credit.is_due()
            }
        }
    }

    /// The next packet for the guest, whose data is put into `room`. Nothing, where there is none after all.
    ///
    /// # Errors
    /// What is wrong with `room`.
    pub(super) fn next(
        &mut self,
        room: &mut Segments<'_>,
    ) -> Result<Option<Outgoing>, &'static str> {
        match self.phase {
            Phase::Wanted => {
                self.phase = Phase::Asked;
                return Ok(Some(Outgoing::bare(Op::Request)));
            }
            Phase::Granted => {
                self.phase = Phase::Open;
                return Ok(Some(Outgoing::bare(Op::Response)));
            }
            Phase::Asked => return Ok(None),
            Phase::Open => {}
        }
        if self.may_read()
            && let Some(packet) = self.read(room)?
        {
            return Ok(Some(packet));
        }
        let ends = self.ends();
        if ends & !self.told != 0 {
            self.told = ends;
            return Ok(Some(Outgoing {
                flags: ends,
                ..Outgoing::bare(Op::Shutdown)
            }));
        }
        if self.owes_credit || self.credit.is_due() {
            self.owes_credit = false;
            return Ok(Some(Outgoing::bare(Op::CreditUpdate)));
        }
        Ok(None)
    }

    /// Reads what the program has sent.
    fn read(&mut self, room: &mut Segments<'_>) -> Result<Option<Outgoing>, &'static str> {
        let credit = self.credit.for_guest();
        if credit == 0 {
            self.asked_credit = true;
            return Ok(Some(Outgoing::bare(Op::CreditRequest)));
        }
        let most = usize::try_from(credit).map_or(PACKET_MOST, |credit| credit.min(PACKET_MOST));
        let room = room.take_front(most);
        if room.is_empty() {
            return Err("a receive buffer without room for data");
        }
        loop {
            match room.receive(self.outlet.stream.as_fd()) {
                Ok(0) => {}
                Ok(len) => {
                    self.credit.send(len);
                    let packet = Outgoing::bare(Op::Rw);
                    return Ok(Some(Outgoing { len, ..packet }));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) => self.fail(&error),
            }
            self.ended = true;
            self.readable = false;
            return Ok(None);
        }
    }

    /// The program is gone and has not read all, or the like.
    fn fail(&mut self, error: &io::Error) {
        log::debug!("vsock port {}: {error}", self.key.host);
        let lost = self.outlet.close();
        self.credit.forward(lost);
    }

    /// A header for a packet of this connection's to the guest: the buffer here, and what was taken out of it.
    pub(super) fn credit(&mut self) -> (u32, u32) {
        self.credit.tell()
    }
}

/// The room that a header names which is of no connection.
pub(super) const NO_CREDIT: (u32, u32) = (ROOM, 0);
