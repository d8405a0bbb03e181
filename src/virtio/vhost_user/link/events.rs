//! What the thread of a link waits for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::virtio::vhost::Watch;
use crate::virtio::vhost_user::connection::Connection;

/// Tokens; all other events are of rings.
const WAKE: u64 = 0;
const SOCKET: u64 = 1;
const RINGS: u64 = 2;

/// What there is to wait for, while connection and rings stay the same.
#[derive(Debug)]
pub(super) struct Events(Epoll);

/// What is ready.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Ready {
    pub(super) socket: bool,
    pub(super) rings: bool,
}

impl Events {
    pub(super) fn of(
        wake: &EventFd,
        connection: Option<&Connection>,
        watch: Option<&Watch<Connection>>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let add = |fd: RawFd, events, token| {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
        };
        add(wake.as_raw_fd(), EventSet::IN, WAKE)?;
        if let Some(connection) = connection {
            let events = EventSet::IN | EventSet::READ_HANG_UP;
            add(connection.as_fd().as_raw_fd(), events, SOCKET)?;
        }
        for (fd, events) in watch.into_iter().flat_map(Watch::sources) {
            add(fd, events, RINGS)?;
        }
        Ok(Self(epoll))
    }

    /// Waits for any of it, for `timeout` at most.
    pub(super) fn wait(&self, timeout: Option<Duration>) -> io::Result<Ready> {
        let timeout = timeout.map_or(-1, |timeout| {
            // Rounded up, so that the time has come afterwards.
            i32::try_from(timeout.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
        });
        let mut events = [EpollEvent::default(); 8];
        let count = match self.0.wait(timeout, &mut events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            count => count?,
        };
        let mut ready = Ready::default();
        for event in events.iter().take(count) {
            ready.socket |= event.data() == SOCKET;
            ready.rings |= event.data() == RINGS;
        }
        Ok(ready)
    }
}
