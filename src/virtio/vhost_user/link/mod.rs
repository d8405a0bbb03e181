//! The thread of a device that has to do with its back end: it connects, hands queues over and takes them back, and
//! does so anew when the back end has died and another one listens. Nobody else waits for the back end, but for a
//! stop, and that a second at most.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use busway_pci::Complaints;
use busway_vfio::EventFd;

use super::connection::{BackEndError, Connection, Inflight, Needs};
use super::kind::BackEndsConfig;
use super::meeting::Meeting;
use super::run::Run;
use crate::sandbox::{self, Kind};
use crate::virtio::config_space::Fields;
use crate::virtio::error::QueueError;
use crate::virtio::life::QueuePosition;
use crate::virtio::spec::net;
use crate::virtio::vhost::{Handed, MemoryTable, Rings, VhostError, Watch};
use events::Events;
pub(super) use shared::Shared;

mod events;
mod shared;

/// How long requests that a back end had in hand are waited for: the stop that waits for that has some more.
const DRAIN: Duration = Duration::from_millis(800);
/// How often it is tried to reach a back end that has gone.
const AGAIN: Duration = Duration::from_millis(200);
/// How often it is looked whether requests that a back end had in hand are over.
const LOOK: Duration = Duration::from_millis(1);
/// Losses of one device's back end that are warnings in the log. One that comes and dies at once could fill it.
const LOUD_LOSSES: u32 = 8;
const STACK_SIZE: usize = 256 << 10;

/// Positions in queues, by their numbers.
pub(super) type Positions = Vec<(u16, QueuePosition)>;

/// What dies with a back end that keeps no note of requests for the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Loss {
    /// The requests that it had in hand: the next one goes on where there were none.
    Requests,
    /// What it knows of its driver: the next one cannot go on.
    Session,
    /// Packets, as on a wire: the next one goes on behind what was completed. Back ends of NICs complete in order.
    Packets,
}

/// What the link is for.
#[derive(Debug)]
pub(super) struct Purpose {
    pub(super) name: String,
    /// What messages call the device: `fs fs0`.
    pub(super) described: String,
    /// What the thread is called.
    pub(super) thread: String,
    pub(super) meeting: Arc<Meeting>,
    pub(super) needs: Needs,
    /// Descriptors of the longest queue.
    pub(super) queue_size: u16,
    pub(super) loss: Loss,
    /// The device's configuration, where it is the back end's.
    pub(super) config: Option<Box<dyn BackEndsConfig>>,
    /// The configuration of a NIC, whose link is up while there is a back end.
    pub(super) carrier: Option<Arc<Fields>>,
    pub(super) memory: Arc<MemoryTable>,
}

/// The thread, for the device that it serves. Dropping it ends the connection.
#[derive(Debug)]
pub(super) struct Link {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Serves `purpose` by `connection`, and by others after it. `wake` is what `connection` signals.
    ///
    /// # Errors
    /// There is no thread or descriptor to be had.
    pub(super) fn start(
        purpose: Purpose,
        connection: Connection,
        wake: EventFd,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            described: purpose.described.clone(),
            state: Mutex::default(),
            free: Condvar::new(),
            wake,
        });
        let thread_name = purpose.thread.clone();
        shared.state().stream = Some(connection.stream()?);
        let worker = LinkWorker {
            shared: Arc::clone(&shared),
            purpose,
            connection: Some(Arc::new(connection)),
            held: None,
            inflight: None,
            served: false,
            gone_since: None,
            met_at: Instant::now(),
            next_try: Instant::now(),
            events: None,
            complaints: Complaints::first(LOUD_LOSSES),
        };
        let thread = Builder::new()
            .name(thread_name)
            .stack_size(STACK_SIZE)
            .spawn(move || {
                sandbox::enter(Kind::VhostUser);
                worker.run();
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        let stream = {
            let mut state = self.shared.state();
            state.quit = true;
            state.stream.take()
        };
        if let Some(stream) = stream {
            // It may have ended by itself.
            let _over = stream.shutdown(Shutdown::Both);
        }
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            // Its panic was reported when it happened.
            let _panicked = thread.join();
        }
    }
}

/// What the thread has in hand.
#[derive(Debug)]
struct Held {
    run: Run,
    rings: Arc<Rings<Connection>>,
    watch: Watch<Connection>,
}

#[derive(Debug)]
struct LinkWorker {
    shared: Arc<Shared>,
    purpose: Purpose,
    connection: Option<Arc<Connection>>,
    held: Option<Held>,
    inflight: Option<Inflight>,
    /// This back end has served the driver, since that began anew.
    served: bool,
    gone_since: Option<Instant>,
    /// When this back end was met.
    met_at: Instant,
    next_try: Instant,
    events: Option<Events>,
    complaints: Complaints,
}

impl LinkWorker {
    fn run(mut self) {
        while !self.shared.state().quit {
            let wanted_back = {
                let state = self.shared.state();
                state.stop && state.held
            };
            if wanted_back && let Some(held) = self.held.take() {
                self.take_back(held);
            }
            self.look_after_connection();
            self.take_up();
            self.follow_active();
            if let Err(error) = self.wait() {
                log::error!("{}: {error}", self.purpose.described);
                break;
            }
        }
        if let Some(held) = self.held.take() {
            held.rings.abandon();
        }
    }

    /// Waits until there is something to do, and does what a connection and rings ask for.
    fn wait(&mut self) -> io::Result<()> {
        let events = match self.events.take() {
            Some(events) => events,
            None => {
                let watch = self.held.as_ref().map(|held| &held.watch);
                Events::of(&self.shared.wake, self.connection.as_deref(), watch)?
            }
        };
        let timeout = match self.connection {
            Some(_) => None,
            None => Some(self.next_try.saturating_duration_since(Instant::now())),
        };
        let ready = events.wait(timeout)?;
        self.events = Some(events);
        let _signals = self.shared.wake.take();
        if ready.socket
            && let Some(connection) = &self.connection
            && connection.is_over()
        {
            self.lose("its connection ended");
            return Ok(());
        }
        if ready.rings
            && let Some(held) = &self.held
            && let Err(error) = held.watch.wake()
        {
            self.end_service(&error);
        }
        Ok(())
    }

    /// A back end that says so has another configuration; one that has gone may have come back.
    fn look_after_connection(&mut self) {
        match &self.connection {
            Some(connection) => {
                let connection = Arc::clone(connection);
                let changed = connection.take_config_change();
                let passed = match &self.purpose.config {
                    Some(config) => config.pass_on(&connection),
                    None => Ok(()),
                };
                let current = passed.and_then(|()| match changed {
                    true => self.refresh(&connection),
                    false => Ok(()),
                });
                if let Err(error) = current {
                    self.lose(&error.to_string());
                }
            }
            None if Instant::now() >= self.next_try => self.connect(),
            None => {}
        }
    }

    fn refresh(&self, connection: &Connection) -> Result<(), VhostError> {
        match &self.purpose.config {
            Some(config) => config.refresh(connection),
            None => Ok(()),
        }
    }

    /// Tells the back end which queues are to be served, where that has changed.
    fn follow_active(&mut self) {
        let Some(held) = &self.held else {
            return;
        };
        let (active, told) = {
            let state = self.shared.state();
            (state.active, state.told_active)
        };
        if active == told {
            return;
        }
        match held.rings.serve_up_to(active) {
            Ok(()) => {
                self.shared.state().told_active = active;
                self.shared.free.notify_all();
            }
            Err(error) => self.lose(&error.to_string()),
        }
    }

    /// A driver sees whether there is a back end.
    fn set_carrier(&self, up: bool) {
        if let Some(config) = &self.purpose.carrier {
            let status = if up { net::S_LINK_UP } else { 0 };
            config.set(net::CONFIG_STATUS, &status.to_le_bytes());
        }
    }

    fn connect(&mut self) {
        let Purpose { meeting, needs, .. } = &self.purpose;
        let shared = &self.shared;
        // The end of the device does not wait for what is agreed on here.
        let reached = |stream: UnixStream| {
            let mut state = shared.state();
            match state.quit {
                true => drop(stream.shutdown(Shutdown::Both)),
                false => state.stream = Some(stream),
            }
        };
        let opened = Connection::open(meeting, *needs, Duration::ZERO, &shared.wake, reached);
        let opened = opened.and_then(|connection| {
            let refreshed = self.refresh(&connection);
            refreshed.map_err(|source| BackEndError::Step {
                socket: meeting.socket().to_owned(),
                source,
            })?;
            Ok(connection)
        });
        match opened {
            Ok(connection) => {
                self.connection = Some(Arc::new(connection));
                (self.events, self.met_at) = (None, Instant::now());
                self.set_carrier(true);
                if let Some(config) = &self.purpose.config {
                    config.set_served(true);
                    // What was written meanwhile is passed on.
                    self.shared.wake.signal();
                }
                let away = self.gone_since.take().map(|since| since.elapsed());
                log::log!(
                    self.complaints.next(log::Level::Warn),
                    "{}: its back end is back after {} ms",
                    self.purpose.described,
                    away.unwrap_or_default().as_millis()
                );
            }
            Err(error) => {
                log::debug!("{}: {error}", self.purpose.described);
                self.next_try = Instant::now() + AGAIN;
            }
        }
    }

    /// Hands over what waits, where there is somebody to hand it to.
    fn take_up(&mut self) {
        let (Some(connection), None) = (self.connection.clone(), &self.held) else {
            return;
        };
        let (mut run, fresh) = {
            let mut state = self.shared.state();
            let Some(run) = state.waiting.take() else {
                return;
            };
            (state.held, state.stop, state.drop) = (true, false, false);
            state.told_active = state.active;
            (run, std::mem::take(&mut state.fresh))
        };
        if fresh {
            (self.inflight, self.served) = (None, false);
        }
        if let Some(left) = self.shared.state().left.take() {
            run.go_on_from(&left);
        }
        let lacking = run.features() & !connection.features();
        if lacking != 0 {
            let reason = format!(
                "another back end has come in the place of its own, and lacks features that its driver uses \
                 ({lacking:#x}): start one that has them"
            );
            return self.fail(run, &reason);
        }
        if run.has_begun()
            && !self.served
            && self.purpose.loss == Loss::Session
            && self.inflight.is_none()
        {
            return self.fail(run, &LOST_SESSION);
        }
        match self.hand_over(&connection, &run) {
            Ok(held) => {
                self.held = Some(Held { run, ..held });
                (self.served, self.events) = (true, None);
            }
            Err(error) if matches!(error.source, vhost::Error::InvalidQueue) => {
                self.fail(run, &error);
            }
            Err(error) => {
                connection.cut();
                self.lose(&error.to_string());
                // With one ring begun, requests of that may have been taken and completed.
                match matches!(error.what, "SET_VRING_KICK" | "SET_VRING_ENABLE") {
                    true => self.go_on_or_fail(run),
                    false => self.put_back(run),
                }
            }
        }
    }

    fn hand_over(&mut self, connection: &Arc<Connection>, run: &Run) -> Result<Held, VhostError> {
        use vhost::VhostBackend;

        let features = connection.agreed(run.features());
        let set = connection.set_features(features);
        set.map_err(VhostError::at("SET_FEATURES"))?;
        let mtu = self.purpose.needs.net.and_then(|needs| needs.mtu);
        if let Some(mtu) = mtu.filter(|_| features & net::F_MTU != 0) {
            connection.set_mtu(mtu)?;
        }
        let queues = u16::try_from(self.purpose.needs.queues).unwrap_or(u16::MAX);
        let kept = self.inflight.take();
        self.inflight = connection.share_inflight(kept, queues, self.purpose.queue_size)?;
        let handed = Handed {
            name: self.purpose.described.clone(),
            first: 0,
            queues: run.queues().to_vec(),
            features,
            active: self.shared.state().told_active,
        };
        let rings = Rings::start(
            Arc::clone(connection),
            handed,
            run.ram(),
            &self.purpose.memory,
        )?;
        Ok(Held {
            watch: Watch::new(std::slice::from_ref(&rings)),
            run: run.clone(),
            rings,
        })
    }

    /// Takes the queues back in order, with all requests in them done if that is soon.
    fn take_back(&mut self, held: Held) {
        let start = Instant::now();
        let Held { run, rings, watch } = held;
        let mut positions = rings.stop();
        drop((watch, rings));
        self.events = None;
        let is_over = self.connection.as_ref().is_none_or(|one| one.is_over());
        if is_over {
            self.lose("its connection ended while it was stopped");
            return self.go_on_or_fail(run);
        }
        // Some back ends give a queue back with requests in hand, and complete them after that.
        while !run.is_done(&mut positions) && start.elapsed() < DRAIN {
            std::thread::sleep(LOOK);
        }
        self.give(Some(positions));
    }

    /// The rings cannot be served any more, for `error`.
    fn end_service(&mut self, error: &QueueError) {
        let QueueError::BackEnd { .. } = error else {
            return self.lose(&error.to_string());
        };
        if let Some(Held { run, rings, .. }) = self.held.take() {
            rings.stop();
            self.events = None;
            self.fail(run, error);
        }
    }

    /// The back end has gone.
    fn lose(&mut self, why: &str) {
        let ends = {
            let mut state = self.shared.state();
            state.stream = None;
            state.quit
        };
        let Some(connection) = self.connection.take() else {
            return;
        };
        connection.cut();
        if let Some(config) = &self.purpose.config {
            config.set_served(false);
        }
        if ends {
            // The device itself has ended it.
            return;
        }
        (self.events, self.served) = (None, false);
        let now = Instant::now();
        // One that goes as soon as it has come is not met without a pause.
        self.next_try = now.max(self.met_at + AGAIN);
        self.gone_since = Some(now);
        self.set_carrier(false);
        log::log!(
            self.complaints.next(log::Level::Warn),
            "{}: its back end at {} has gone ({why}); the device waits until another {} there",
            self.purpose.described,
            self.purpose.meeting.socket().display(),
            self.purpose.meeting.comes_by()
        );
        if let Some(Held { run, rings, watch }) = self.held.take() {
            drop(watch);
            rings.abandon();
            self.go_on_or_fail(run);
        }
    }

    /// Of a run whose back end has gone: the next one does what this one has not completed, where that is known.
    fn go_on_or_fail(&mut self, mut run: Run) {
        let known = match self.purpose.loss {
            _ if self.inflight.is_some() => true,
            Loss::Requests => run.is_idle(),
            Loss::Session => run.is_untouched(),
            Loss::Packets => true,
        };
        if !known {
            let reason: &dyn std::fmt::Display = match self.purpose.loss {
                Loss::Session => &LOST_SESSION,
                Loss::Requests | Loss::Packets => &LOST_REQUESTS,
            };
            return self.fail(run, reason);
        }
        run.go_on_from_used();
        self.put_back(run);
    }

    /// Has `run` wait for a back end, unless somebody wants it stopped.
    fn put_back(&mut self, run: Run) {
        let mut state = self.shared.state();
        if state.stop {
            drop(state);
            return self.give(Some(run.positions()));
        }
        state.waiting = Some(run);
        state.held = false;
        self.shared.free.notify_all();
    }

    /// The device cannot go on: its driver has to reset it.
    fn fail(&mut self, run: Run, reason: &dyn std::fmt::Display) {
        let state = self.shared.state();
        // A driver that resets the device already must not hear that it has to.
        if !state.drop {
            run.needs_reset(&self.purpose.name, reason);
        }
        drop(state);
        self.give(Some(run.positions()));
    }

    /// Nothing is in hand any more; who waits for that has the positions.
    fn give(&mut self, positions: Option<Positions>) {
        let mut state = self.shared.state();
        let dropped = std::mem::take(&mut state.drop);
        state.left = positions.filter(|_| !dropped);
        (state.held, state.stop) = (false, false);
        self.shared.free.notify_all();
    }
}

/// What a driver has to be told, with the way on.
const LOST_SESSION: &str = "its back end has gone, and with it what it knew of its driver: when it is back, mount a \
    folder anew, and else have the driver begin anew (in the guest, unbind and bind it, or restart)";
const LOST_REQUESTS: &str = "its back end has gone with requests in hand, and kept no note of them for the next one \
    (no VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD): restart the guest, for its driver may wait for them without end";
