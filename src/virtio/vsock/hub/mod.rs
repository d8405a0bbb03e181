//! All that the host has of a socket device: the Unix socket where programs connect, and the connections, by the port
//! numbers of their two ends. It outlives the driver's runs; who serves the queues asks it what is for the guest, and gives
//! it what the guest says.
//!
//! All that it keeps is bounded, and nothing in it waits: a connection that cannot be had at once is refused.

mod callers;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use busway_pci::Complaints;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::timerfd::TimerFd;
use zerocopy::IntoBytes;

use super::connection::{Connection, Fate, Leaving, NO_CREDIT};
use super::handshake::Caller;
use super::packet::{HEADER_SIZE, Header, Key, Op, Outgoing};
use super::ports::Ports;
use crate::unix_socket::{Listening, SocketAddress, SocketError};
use crate::virtio::segments::Segments;
use crate::virtio::spec::vsock;

/// The most connections, with those that are being made.
pub(super) const PEERS_MOST: usize = 512;
/// Those of them that have not said what they want, at most. Others wait to be accepted.
const CALLERS_MOST: usize = 128;
/// The most resets that wait for the guest's buffers before no more is taken from it.
pub(super) const RESETS_MOST: usize = 128;
/// How long a program has to say what it wants, and the guest to answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long what the guest has sent before it closed waits for a program that reads nothing.
const LINGER: Duration = Duration::from_secs(60);
/// How often it is looked whose time is over, while there is somebody who has a time.
const TICK: Duration = Duration::from_secs(1);
/// Events that are looked at in one go, and programs that are accepted.
const ROUND: usize = 64;
/// The ports of the host's ends of connections that programs on the host want: beyond those that programs choose.
const FIRST_PORT: u32 = 1 << 30;
const PORTS: u32 = 1 << 30;
/// Times that the log says that the host has no more descriptors.
const LOGGED_ERRORS: u32 = 3;

const LISTENER: u64 = 0;
const TIMER: u64 = 1;
const FIRST_TOKEN: u64 = 2;

/// What the host has of a device.
#[derive(Debug)]
pub(super) struct Hub {
    name: String,
    cid: u64,
    /// Connects to programs.
    ports: Ports,
    listening: Listening,
    /// Watches all descriptors, so that there is one to wait for.
    events: Epoll,
    timer: TimerFd,
    /// When it is looked next whose time is over.
    tick: Option<Instant>,
    peers: BTreeMap<u64, Peer>,
    /// Those of the peers that the guest knows, or is to know.
    keys: BTreeMap<Key, u64>,
    callers: usize,
    next_token: u64,
    next_port: u32,
    /// Connections that may have something for the guest.
    ready: VecDeque<u64>,
    resets: VecDeque<Reset>,
    /// Somebody waits to be accepted.
    knocking: bool,
    /// The host had no descriptor for who waits; it is tried anew at the next tick.
    exhausted: bool,
    complaints: Complaints,
}

/// A packet that is of no connection, or of none any more.
#[derive(Clone, Copy, Debug)]
struct Reset {
    key: Key,
    kind: u16,
}

/// Who has a descriptor.
#[derive(Debug)]
struct Peer {
    role: Role,
    /// When its time is over.
    deadline: Option<Instant>,
    /// It is among the ready.
    queued: bool,
}

#[derive(Debug)]
enum Role {
    Caller(Caller),
    Connected(Box<Connection>),
    Leaving(Leaving),
}

impl Hub {
    /// Listens at `socket`, in the place of one that nobody listens at any more.
    pub(super) fn new(name: &str, cid: u32, socket: &Path) -> Result<Self, SocketError> {
        let listening = Listening::open(&SocketAddress::Path(socket.to_owned()))?;
        let failed = |source| SocketError::System {
            what: "wait for connections at",
            path: socket.to_owned(),
            source,
        };
        let ports = Ports::of(socket).map_err(failed)?;
        let events = Epoll::new().map_err(failed)?;
        let timer = TimerFd::new().map_err(|error| failed(error.into()))?;
        for (fd, token) in [
            (listening.listener().as_raw_fd(), LISTENER),
            (timer.as_raw_fd(), TIMER),
        ] {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, token);
            events
                .ctl(ControlOperation::Add, fd, event)
                .map_err(failed)?;
        }
        Ok(Self {
            name: name.to_owned(),
            cid: cid.into(),
            ports,
            listening,
            events,
            timer,
            tick: None,
            peers: BTreeMap::new(),
            keys: BTreeMap::new(),
            callers: 0,
            next_token: FIRST_TOKEN,
            next_port: 0,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            knocking: false,
            exhausted: false,
            complaints: Complaints::first(LOGGED_ERRORS),
        })
    }

    /// Readable when something has happened on the host.
    pub(super) fn fd(&self) -> RawFd {
        self.events.as_raw_fd()
    }

    /// The guest knows of no connection any more. Programs that have not been connected to it wait on.
    pub(super) fn reset(&mut self) {
        self.ready.clear();
        self.resets.clear();
        self.keys.clear();
        self.peers
            .retain(|_, peer| !matches!(peer.role, Role::Connected(_)));
    }

    /// It goes on after a stop, which is nobody's time that is waited for.
    pub(super) fn resume(&mut self) {
        let now = Instant::now();
        for deadline in self.peers.values_mut().flat_map(|peer| &mut peer.deadline) {
            *deadline = (*deadline).max(now + PATIENCE);
        }
    }

    /// Looks what has happened on the host.
    pub(super) fn hear(&mut self) {
        let mut events = [EpollEvent::default(); ROUND];
        let count = match self.events.wait(0, &mut events) {
            Ok(count) => count,
            Err(error) => {
                log::debug!("vsock {}: epoll_wait: {error}", self.name);
                0
            }
        };
        for event in events.iter().take(count) {
            match event.data() {
                LISTENER => self.knocking = true,
                TIMER => {}
                token => self.stirs(token, event.event_set()),
            }
        }
        self.expire(Instant::now());
        self.accept();
    }

    /// Watches a stream, by a token of its own.
    fn watch(&mut self, stream: &UnixStream) -> io::Result<u64> {
        let token = self.next_token;
        let events = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP;
        let event = EpollEvent::new(events | EventSet::EDGE_TRIGGERED, token);
        self.events
            .ctl(ControlOperation::Add, stream.as_raw_fd(), event)?;
        self.next_token = token.wrapping_add(1).max(FIRST_TOKEN);
        Ok(token)
    }

    fn enter(&mut self, token: u64, role: Role, deadline: Option<Instant>) {
        let peer = Peer {
            role,
            deadline,
            queued: false,
        };
        self.peers.insert(token, peer);
        if deadline.is_some() {
            self.arm();
        }
    }

    /// Something has happened to a peer.
    fn stirs(&mut self, token: u64, events: EventSet) {
        let gone = events.intersects(EventSet::HANG_UP | EventSet::ERROR);
        let Some(peer) = self.peers.get_mut(&token) else {
            return;
        };
        match &mut peer.role {
            Role::Caller(_) => self.caller_stirs(token, gone),
            Role::Connected(connection) => {
                if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                    connection.host_speaks();
                }
                if events.contains(EventSet::OUT) {
                    connection.host_reads();
                }
                let fate = match gone {
                    true => connection.host_leaves(),
                    false => Fate::Stays,
                };
                self.follow(token, fate);
            }
            Role::Leaving(leaving) => {
                if gone {
                    leaving.close();
                }
                let (more, further) = leaving.flush();
                if further {
                    peer.deadline = Some(Instant::now() + LINGER);
                }
                if !more {
                    self.peers.remove(&token);
                }
            }
        }
    }

    /// Sees to a connection after something has happened to it.
    fn follow(&mut self, token: u64, fate: Fate) {
        if let Fate::Ends { reset } = fate {
            return self.end(token, reset);
        }
        let Some(peer) = self.peers.get_mut(&token) else {
            return;
        };
        let Role::Connected(connection) = &peer.role else {
            return;
        };
        if connection.has_more() && !peer.queued {
            peer.queued = true;
            self.ready.push_back(token);
        }
        match (connection.is_waiting(), peer.deadline) {
            (true, None) => {
                peer.deadline = Some(Instant::now() + PATIENCE);
                self.arm();
            }
            (false, Some(_)) => peer.deadline = None,
            _ => {}
        }
    }

    /// A connection is over. What the guest has sent before goes on its way.
    fn end(&mut self, token: u64, reset: bool) {
        let Some(peer) = self.peers.remove(&token) else {
            return;
        };
        let Role::Connected(connection) = peer.role else {
            return;
        };
        let key = connection.key();
        self.keys.remove(&key);
        if reset {
            self.refuse(key, vsock::TYPE_STREAM);
        }
        if let Some(leaving) = connection.into_leaving() {
            let role = Role::Leaving(leaving);
            self.enter(token, role, Some(Instant::now() + LINGER));
        }
    }

    fn refuse(&mut self, key: Key, kind: u16) {
        self.resets.push_back(Reset { key, kind });
    }

    /// Has the timer go off at the next tick.
    fn arm(&mut self) {
        if self.tick.is_some() {
            return;
        }
        match self.timer.reset(TICK, None) {
            Ok(()) => self.tick = Some(Instant::now() + TICK),
            Err(error) => log::debug!("vsock {}: timerfd_settime: {error}", self.name),
        }
    }

    /// Ends whose time is over.
    fn expire(&mut self, now: Instant) {
        if self.tick.is_none_or(|tick| now < tick) {
            return;
        }
        self.tick = None;
        self.exhausted = false;
        let over = |peer: &Peer| peer.deadline.is_some_and(|deadline| deadline <= now);
        let tokens: Vec<u64> = self
            .peers
            .iter()
            .filter(|(_, peer)| over(peer))
            .map(|(token, _)| *token)
            .collect();
        for token in tokens {
            match self.peers.get(&token).map(|peer| &peer.role) {
                Some(Role::Caller(_)) => {
                    self.callers = self.callers.saturating_sub(1);
                    self.peers.remove(&token);
                }
                Some(Role::Connected(connection)) => {
                    let known = connection.is_known();
                    self.end(token, known);
                }
                Some(Role::Leaving(_)) => {
                    self.peers.remove(&token);
                }
                None => {}
            }
        }
        if self.peers.values().any(|peer| peer.deadline.is_some()) {
            self.arm();
        }
    }

    /// Whether no more should be taken from the guest before it has taken what waits for it.
    pub(super) fn is_full(&self) -> bool {
        self.resets.len() >= RESETS_MOST
    }

    /// A packet of the guest's, with its data. A reset is never answered by a reset.
    pub(super) fn take(&mut self, header: &Header, data: &mut Segments<'_>) {
        if header.src_cid.get() != self.cid || header.dst_cid.get() != vsock::HOST_CID {
            return;
        }
        let (key, op) = (header.key(), Op::of(header));
        let kind = header.kind.get();
        if kind != vsock::TYPE_STREAM {
            if op != Some(Op::Rst) {
                self.refuse(key, kind);
            }
            return;
        }
        if matches!(op, Some(Op::Rst | Op::Request)) {
            // Of a connection before this one on the same ports, of which the guest has seen the end.
            self.resets.retain(|reset| reset.key != key);
        }
        let token = self.keys.get(&key).copied();
        match (token, op) {
            (None, Some(Op::Rst)) => {}
            (None, Some(Op::Request)) => self.connect(header),
            (None, _) => self.refuse(key, kind),
            (Some(token), None | Some(Op::Request)) => self.end(token, true),
            (Some(token), Some(op)) => {
                let Some(peer) = self.peers.get_mut(&token) else {
                    return;
                };
                if let Role::Connected(connection) = &mut peer.role {
                    let fate = connection.take(op, header, data);
                    self.follow(token, fate);
                }
            }
        }
    }

    /// The guest wants a connection to a program on the host.
    fn connect(&mut self, header: &Header) {
        let key = header.key();
        let connected = match self.peers.len() < PEERS_MOST {
            true => self.ports.connect(key.host),
            false => Err(io::Error::other("too many connections")),
        };
        let watched = connected.and_then(|stream| Ok((self.watch(&stream)?, stream)));
        match watched {
            Ok((token, stream)) => {
                self.keys.insert(key, token);
                let connection = Connection::wanted_by_guest(header, stream);
                self.enter(token, Role::Connected(Box::new(connection)), None);
                self.follow(token, Fate::Stays);
            }
            Err(error) => {
                log::debug!("vsock {}: port {}: {error}", self.name, key.host);
                self.refuse(key, vsock::TYPE_STREAM);
            }
        }
    }

    /// Whether there may be something for the guest.
    pub(super) fn has_more(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// Puts the next packet for the guest into `buffer`, and says how long it is. Nothing, where there is none after all.
    ///
    /// # Errors
    /// What is wrong with `buffer`.
    pub(super) fn next(&mut self, buffer: &Segments<'_>) -> Result<Option<usize>, &'static str> {
        let mut data = buffer.clone();
        let mut place = data.take_front(HEADER_SIZE);
        if place.len() < HEADER_SIZE {
            return Err("a receive buffer shorter than a header");
        }
        if let Some(Reset { key, kind }) = self.resets.pop_front() {
            let header = self.header(key, kind, Outgoing::bare(Op::Rst), NO_CREDIT);
            return Ok(Some(place.write(header.as_bytes())));
        }
        while let Some(token) = self.ready.pop_front() {
            let Some(peer) = self.peers.get_mut(&token) else {
                continue;
            };
            peer.queued = false;
            let Role::Connected(connection) = &mut peer.role else {
                continue;
            };
            let Some(packet) = connection.next(&mut data.clone())? else {
                continue;
            };
            let (key, credit) = (connection.key(), connection.credit());
            let header = self.header(key, vsock::TYPE_STREAM, packet, credit);
            self.follow(token, Fate::Stays);
            return Ok(Some(
                place.write(header.as_bytes()).saturating_add(packet.len),
            ));
        }
        Ok(None)
    }

    fn header(&self, key: Key, kind: u16, packet: Outgoing, credit: (u32, u32)) -> Header {
        Header {
            src_cid: vsock::HOST_CID.into(),
            dst_cid: self.cid.into(),
            src_port: key.host.into(),
            dst_port: key.guest.into(),
            len: u32::try_from(packet.len).unwrap_or(u32::MAX).into(),
            kind: kind.into(),
            op: packet.op.number(),
            flags: packet.flags.into(),
            buf_alloc: credit.0.into(),
            fwd_cnt: credit.1.into(),
        }
    }
}

#[cfg(test)]
mod tests;
