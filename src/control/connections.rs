//! The connections of a control socket: a bounded number, a thread each.
//!
//! A connection without a request under way costs whoever comes later nothing: where there are as many as
//! may be, the one that has been idle longest gives way. Only where every one is in the middle of a request
//! is the newcomer refused.

use std::collections::BTreeMap;
use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::http::{self, Answer, Request, Trouble};
use super::wire::{Limits, Wire};
use crate::accepting::{Accepted, Acceptor, PAUSE};
use crate::provoked;
use crate::sandbox::{self, Kind};
use crate::shortage;

/// How many connections there can be.
pub(super) const MOST: usize = 10;
/// How long a connection that gives way is waited for.
const YIELD_LIMIT: Duration = Duration::from_secs(1);

/// What answers requests, on many threads at once.
pub(super) trait Service: Send + Sync {
    /// Answers a request. It may wait for what was asked.
    fn answer(&self, request: &Request) -> Answer;

    /// Answers what is no request, or comes from one connection too many.
    fn refuse(&self, status: u16, reason: &str) -> Answer;
}

/// All connections of a socket.
#[derive(Debug)]
pub(super) struct Connections {
    seats: Mutex<Seats>,
    /// Somebody has left.
    left: Condvar,
    limits: Limits,
}

#[derive(Debug, Default)]
struct Seats {
    next: u64,
    taken: BTreeMap<u64, Seat>,
    /// Nobody is let in any more.
    closed: bool,
}

#[derive(Debug)]
struct Seat {
    /// By which the connection is ended from elsewhere.
    stream: UnixStream,
    /// Since when no request has been under way; none while one is.
    idle: Option<Instant>,
    /// It has asked something before.
    used: bool,
    /// It was told to leave.
    leaving: bool,
}

/// A connection's place among the others, given back when it drops.
#[derive(Debug)]
struct SeatGuard {
    connections: Arc<Connections>,
    id: u64,
}

impl Connections {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self {
            seats: Mutex::default(),
            left: Condvar::new(),
            limits,
        })
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many there are, and how many of them are idle.
    #[cfg(test)]
    pub(super) fn count(&self) -> (usize, usize) {
        let seats = self.seats();
        let idle = seats.taken.values().filter(|seat| seat.idle.is_some());
        (seats.taken.len(), idle.count())
    }

    /// Accepts connections and serves each on a thread of its own, until `stop` is signalled.
    ///
    /// # Errors
    /// epoll(7)
    pub(super) fn accept(
        self: &Arc<Self>,
        listener: &UnixListener,
        stop: &EventFd,
        service: &Arc<dyn Service>,
    ) -> io::Result<()> {
        let epoll = Epoll::new()?;
        for descriptor in [listener.as_raw_fd(), stop.as_raw_fd()] {
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll.ctl(ControlOperation::Add, descriptor, event)?;
        }
        let mut ready = [EpollEvent::default(); 2];
        let mut acceptor = Acceptor::new(listener);
        loop {
            match epoll.wait(-1, &mut ready) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            if self.seats().closed {
                return Ok(());
            }
            match acceptor.accept(listener) {
                Ok(Accepted::Stream(stream)) => self.admit(stream, service),
                Ok(Accepted::TurnedAway(stream, error)) => {
                    unserved(Wire::new(stream, self.limits), service, &error);
                }
                Err(error) if is_passing(&error) => {}
                Err(error) => {
                    log::debug!("a connection to the control socket is not accepted: {error}");
                    thread::sleep(PAUSE);
                }
            }
        }
    }

    /// Serves a connection, or turns it away.
    fn admit(self: &Arc<Self>, stream: UnixStream, service: &Arc<dyn Service>) {
        let mut wire = Wire::new(stream, self.limits);
        let place = match self.seat(&wire) {
            Ok(Some(place)) => place,
            Ok(None) => {
                let reason = format!("all {MOST} connections are in the middle of a request");
                return turn_away(&mut wire, service, &reason);
            }
            Err(error) => return unserved(wire, service, &error),
        };
        let service = Arc::clone(service);
        let serve = move || {
            sandbox::enter(Kind::Http);
            provoked::here();
            place.serve(wire, service.as_ref());
        };
        if let Err(error) = thread::Builder::new().name("http".to_owned()).spawn(serve) {
            log::debug!("a connection to the control socket is not served: {error}");
        }
    }

    /// A place for a connection; none where all are taken by such as are in the middle of a request.
    fn seat(self: &Arc<Self>, wire: &Wire) -> io::Result<Option<SeatGuard>> {
        let stream = wire.handle()?;
        let mut seats = self.seats();
        if seats.taken.len() >= MOST && seats.dismiss_one() {
            let full = |seats: &mut Seats| seats.taken.len() >= MOST;
            let waited = self.left.wait_timeout_while(seats, YIELD_LIMIT, full);
            seats = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        if seats.closed || seats.taken.len() >= MOST {
            return Ok(None);
        }
        let id = seats.next;
        seats.next = id.wrapping_add(1);
        let seat = Seat {
            stream,
            idle: Some(Instant::now()),
            used: false,
            leaving: false,
        };
        seats.taken.insert(id, seat);
        let connections = Arc::clone(self);
        Ok(Some(SeatGuard { connections, id }))
    }

    /// Waits until there is no connection.
    pub(super) fn wait_empty(&self) {
        let anybody = |seats: &mut Seats| !seats.taken.is_empty();
        drop(self.left.wait_while(self.seats(), anybody));
    }

    /// Takes no connection any more, sends the answers that are pending, and waits until all connections are closed.
    pub(super) fn finish(&self, limit: Duration) {
        let mut seats = self.seats();
        seats.closed = true;
        for seat in seats.taken.values() {
            // What has not come whole by now is not waited for; answers can still be written.
            let _gone = seat.stream.shutdown(Shutdown::Read);
        }
        let anybody = |seats: &mut Seats| !seats.taken.is_empty();
        let waited = self.left.wait_timeout_while(seats, limit, anybody);
        let left = waited.unwrap_or_else(PoisonError::into_inner).0.taken.len();
        if left > 0 {
            log::debug!("{left} connections to the control socket are cut off");
        }
    }
}

/// Answers a connection that is not served.
fn turn_away(wire: &mut Wire, service: &Arc<dyn Service>, reason: &str) {
    log::debug!("a connection to the control socket is turned away: {reason}");
    let answer = service.refuse(503, reason);
    // A new connection has room for it.
    let _gone = wire.send(&answer.encode(true, false));
}

/// The same, where there is no descriptor for it. Whoever is still asking is waited for, so that the answer is read: nobody else
/// can be served meanwhile.
fn unserved(mut wire: Wire, service: &Arc<dyn Service>, error: &io::Error) {
    let error = shortage::explained(error);
    turn_away(
        &mut wire,
        service,
        &format!("no connection can be served: {error}"),
    );
    wire.finish();
}

/// What concerns one connection that was to be accepted, and not the next. accept(2)
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

impl Seats {
    /// Ends the connection that is missed least: one that has asked nothing yet before one that has, and of
    /// these the one that has been idle longest. `false` where none is idle.
    fn dismiss_one(&mut self) -> bool {
        let idle = self.taken.values_mut().filter(|seat| !seat.leaving);
        let idle = idle.filter_map(|seat| Some(((seat.used, seat.idle?), seat)));
        let Some((_, seat)) = idle.min_by_key(|(order, _)| *order) else {
            return false;
        };
        seat.leaving = true;
        let _gone = seat.stream.shutdown(Shutdown::Both);
        true
    }
}

impl SeatGuard {
    /// Answers requests until there are no more.
    fn serve(self, mut wire: Wire, service: &dyn Service) {
        loop {
            if wire.rest().is_empty() {
                self.set_idle();
                let there = wire.wait().unwrap_or(false);
                if !there || !self.set_busy() {
                    return;
                }
            }
            wire.begin();
            let (answer, close, head_only) = match http::receive(&mut wire) {
                Ok(request) => {
                    let answer = service.answer(&request);
                    (answer, request.close, request.method == "HEAD")
                }
                Err(Trouble::Refused(refusal)) => {
                    let answer = service.refuse(refusal.status(), &refusal.to_string());
                    (answer, true, false)
                }
                Err(Trouble::Gone(error)) => {
                    log::debug!("a connection to the control socket ended early: {error}");
                    return;
                }
            };
            if let Err(error) = wire.send(&answer.encode(close, head_only)) {
                log::debug!("an answer at the control socket was not taken: {error}");
                return;
            }
            if close {
                wire.finish();
                return;
            }
        }
    }

    fn set_idle(&self) {
        if let Some(seat) = self.connections.seats().taken.get_mut(&self.id) {
            // One that has just come has been idle since.
            seat.idle.get_or_insert_with(Instant::now);
        }
    }

    /// `false` where it was told to leave before.
    fn set_busy(&self) -> bool {
        let mut seats = self.connections.seats();
        let Some(seat) = seats.taken.get_mut(&self.id) else {
            return false;
        };
        seat.idle = None;
        seat.used = true;
        !seat.leaving
    }
}

impl Drop for SeatGuard {
    fn drop(&mut self) {
        self.connections.seats().taken.remove(&self.id);
        self.connections.left.notify_all();
    }
}
