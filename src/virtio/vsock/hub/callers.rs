//! Programs on the host that connect, from when they are accepted until they have said what they want.

use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use log::Level;

use super::{CALLERS_MOST, FIRST_PORT, Hub, PATIENCE, PEERS_MOST, PORTS, Peer, ROUND, Role};
use crate::shortage;
use crate::virtio::vsock::connection::{Connection, Fate};
use crate::virtio::vsock::handshake::{Caller, Said};
use crate::virtio::vsock::packet::Key;

impl Hub {
    /// Whether there is more to be done that nobody will wake for.
    pub(in crate::virtio::vsock) fn is_unfinished(&self) -> bool {
        self.accepts()
    }

    fn accepts(&self) -> bool {
        let room = self.peers.len() < PEERS_MOST && self.callers < CALLERS_MOST;
        self.knocking && !self.exhausted && room
    }

    pub(super) fn accept(&mut self) {
        for _ in 0..ROUND {
            if !self.accepts() {
                return;
            }
            match self.listening.listener().accept() {
                Ok((stream, _)) => self.greet(stream),
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.knocking = false,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => {
                    let level = self.complaints.next(Level::Warn);
                    let error = shortage::explained(&error);
                    log::log!(level, "vsock {}: accept: {error}", self.name);
                    self.exhausted = true;
                    self.arm();
                }
            }
        }
    }

    fn greet(&mut self, stream: UnixStream) {
        let watched = stream
            .set_nonblocking(true)
            .and_then(|()| self.watch(&stream));
        let token = match watched {
            Ok(token) => token,
            Err(error) => return log::debug!("vsock {}: {error}", self.name),
        };
        self.callers += 1;
        let role = Role::Caller(Caller::new(stream));
        self.enter(token, role, Some(Instant::now() + PATIENCE));
    }

    /// A program says what it wants. One that has left before it could be answered wants nothing.
    pub(super) fn caller_stirs(&mut self, token: u64, gone: bool) {
        let Some(Peer {
            role: Role::Caller(caller),
            ..
        }) = self.peers.get_mut(&token)
        else {
            return;
        };
        let said = match gone {
            true => Said::Nonsense,
            false => caller.read(),
        };
        if said == Said::Partly {
            return;
        }
        self.callers = self.callers.saturating_sub(1);
        let peer = self.peers.remove(&token).map(|peer| peer.role);
        let (Said::Port(guest), Some(Role::Caller(caller))) = (said, peer) else {
            return;
        };
        let key = Key {
            host: self.free_port(guest),
            guest,
        };
        self.keys.insert(key, token);
        let connection = Connection::wanted_by_host(key, caller.into_stream());
        self.enter(token, Role::Connected(Box::new(connection)), None);
        self.follow(token, Fate::Stays);
    }

    /// A port of the host's that has no connection to `guest`. There are more ports than connections.
    fn free_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = FIRST_PORT + self.next_port % PORTS;
            self.next_port = (self.next_port + 1) % PORTS;
            if !self.keys.contains_key(&Key { host, guest }) {
                return host;
            }
        }
    }
}
