//! What the service manager that started this process is told of it: sd_notify(3).
//!
//! There is one service manager, known by `NOTIFY_SOCKET`, and it is told from the main thread: that the VM runs, how
//! it is, that it ends, and, as often as `WATCHDOG_USEC` says, that the event loop goes round. Nobody waits for it: a
//! message that its socket has no room for is sent again. Where there is none, all of this does nothing.

use std::collections::BTreeMap;
use std::env;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What the environment says of the service manager. None of it is meant for processes that this one starts.
const VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];
/// How long a message waits that the service manager's socket had no room for.
const AGAIN: Duration = Duration::from_millis(100);
/// What it takes at most to give one device back: the kernel waits a minute for one that does not come back from its
/// reset (Linux, drivers/pci/pci.c, `pci_dev_wait`), and some more is for all else.
const GIVING_BACK: Duration = Duration::from_secs(90);

static MANAGER: Mutex<Option<Manager>> = Mutex::new(None);

/// Takes what the environment says of the service manager out of it, and connects to that.
///
/// Call it before the first thread is started.
pub(crate) fn start() {
    let [socket, usec, pid] = VARIABLES.map(env::var_os);
    for name in VARIABLES {
        // SAFETY: no other thread is there to read or write the environment: the caller has started none.
        unsafe { env::remove_var(name) };
    }
    let Some(address) = socket.filter(|address| !address.is_empty()) else {
        return;
    };
    match Manager::connect(&address, interval(usec, pid)) {
        Ok(manager) => *current() = Some(manager),
        Err(error) => log::warn!(
            "NOTIFY_SOCKET={}: the service manager will not be told of the VM: {error}",
            address.display()
        ),
    }
}

/// Takes the service manager's socket, for a process that passes on what another one says.
pub(crate) fn take_socket() -> Option<UnixDatagram> {
    current().take().map(|manager| manager.socket)
}

/// Has the service manager, where there is one, be told by another socket: that of a process which passes it on.
pub(crate) fn tell_by(socket: UnixDatagram) {
    if let Some(manager) = current().as_mut() {
        manager.socket = socket;
    }
}

/// The VM runs, or, in a process that makes VMs as it is told, can be asked for.
pub(crate) fn ready(status: &str) {
    tell(&[("READY", "1"), ("STATUS", status)]);
}

/// How the VM is, for a person.
pub(crate) fn status(text: &str) {
    tell(&[("STATUS", text)]);
}

/// The process ends, which takes as long as the guest has to power off (`limit`), and then what it takes to give
/// `devices` back. A stop by the service manager lasts as long, whatever it has been told otherwise.
pub(crate) fn stopping(status: &str, limit: Duration, devices: usize) {
    let devices = u32::try_from(devices).unwrap_or(u32::MAX).saturating_add(1);
    let time = limit.saturating_add(GIVING_BACK.saturating_mul(devices));
    tell(&[
        ("STOPPING", "1"),
        ("EXTEND_TIMEOUT_USEC", &time.as_micros().to_string()),
        ("STATUS", status),
    ]);
}

/// When [`on_time`] is to be called next.
pub(crate) fn deadline() -> Option<Instant> {
    current().as_ref().and_then(Manager::deadline)
}

/// The event loop has come round.
pub(crate) fn on_time(now: Instant) {
    if let Some(manager) = current().as_mut() {
        manager.on_time(now);
    }
}

fn tell(fields: &[(&'static str, &str)]) {
    if let Some(manager) = current().as_mut() {
        manager.tell(fields, Instant::now());
    }
}

fn current() -> MutexGuard<'static, Option<Manager>> {
    MANAGER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How often the service manager wants to hear of this process: half of the time after which it takes it for dead.
/// sd_watchdog_enabled(3)
fn interval(usec: Option<OsString>, pid: Option<OsString>) -> Option<Duration> {
    let number = |text: OsString| text.to_str()?.parse::<u64>().ok();
    let is_meant = match pid {
        None => true,
        Some(pid) => number(pid) == Some(process::id().into()),
    };
    let usec = usec.and_then(number).filter(|usec| *usec > 0 && is_meant)?;
    Some(Duration::from_micros(usec / 2))
}

/// The service manager's socket, and what it has not been told yet.
#[derive(Debug)]
struct Manager {
    socket: UnixDatagram,
    /// Fields of the next message: the last word on each counts.
    waiting: BTreeMap<&'static str, String>,
    /// How often it wants to hear of this process, and when it is to the next time.
    watchdog: Option<(Duration, Instant)>,
    /// When what waits is sent again.
    again: Option<Instant>,
}

impl Manager {
    /// `address`: a path, or `@` and the name of an abstract socket.
    fn connect(address: &OsStr, interval: Option<Duration>) -> io::Result<Self> {
        let address = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(address)?,
            _ => return Err(io::ErrorKind::Unsupported.into()),
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&address)?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            waiting: BTreeMap::new(),
            watchdog: interval.map(|interval| (interval, Instant::now())),
            again: None,
        })
    }

    fn tell(&mut self, fields: &[(&'static str, &str)], now: Instant) {
        for (name, value) in fields {
            // A line is a field.
            let value = value.replace('\n', " ");
            self.waiting.insert(name, value);
        }
        self.send(now);
    }

    fn on_time(&mut self, now: Instant) {
        if let Some((interval, next)) = &mut self.watchdog
            && *next <= now
        {
            // A process that is late does not make up for it.
            *next = now.checked_add(*interval).unwrap_or(now);
            self.waiting.insert("WATCHDOG", "1".to_owned());
            self.send(now);
        } else if self.again.is_some_and(|again| again <= now) {
            self.send(now);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        let watchdog = self.watchdog.map(|(_, next)| next);
        watchdog.into_iter().chain(self.again).min()
    }

    /// Sends what waits, which waits on where there is no room.
    fn send(&mut self, now: Instant) {
        let fields = self.waiting.iter();
        let text: String = fields
            .map(|(name, value)| format!("{name}={value}\n"))
            .collect();
        self.again = None;
        match self.socket.send(text.as_bytes()) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) =>
            {
                self.again = now.checked_add(AGAIN);
                return;
            }
            Err(error) => log::debug!("the service manager is not told {text:?}: {error}"),
            Ok(_) => {}
        }
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A manager's socket of this name, and who tells it.
    fn manager(address: &OsStr, socket: &UnixDatagram, interval: Option<Duration>) -> Manager {
        socket.set_nonblocking(true).unwrap();
        Manager::connect(address, interval).unwrap()
    }

    fn heard(socket: &UnixDatagram) -> Option<String> {
        let mut text = [0; 1024];
        let length = socket.recv(&mut text).ok()?;
        Some(String::from_utf8(text[..length].to_vec()).unwrap())
    }

    #[test]
    fn a_service_manager_is_told_by_a_path_and_by_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let name = format!("busway-notify-{}", process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        for (address, socket) in [
            (
                path.clone().into_os_string(),
                UnixDatagram::bind(&path).unwrap(),
            ),
            (
                format!("@{name}").into(),
                UnixDatagram::bind_addr(&abstract_name).unwrap(),
            ),
        ] {
            let mut manager = manager(&address, &socket, None);
            manager.tell(
                &[("READY", "1"), ("STATUS", "The guest\nruns")],
                Instant::now(),
            );
            assert_eq!(
                heard(&socket).unwrap(),
                "READY=1\nSTATUS=The guest runs\n",
                "a line is a field"
            );
            assert_eq!((heard(&socket), manager.deadline()), (None, None));
        }
        for nowhere in ["relative", "/there/is/no/such/socket", ""] {
            assert!(
                Manager::connect(nowhere.as_ref(), None).is_err(),
                "{nowhere}"
            );
        }
    }

    #[test]
    fn the_watchdog_is_fed_when_its_time_has_come_and_not_more_often() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let interval = Duration::from_secs(5);
        let mut manager = manager(path.as_os_str(), &socket, Some(interval));
        let start = Instant::now();
        let mut fed = 0;
        for second in 0..21 {
            manager.on_time(start + Duration::from_secs(second));
            fed += u32::from(heard(&socket).as_deref() == Some("WATCHDOG=1\n"));
        }
        assert_eq!(fed, 5, "at 0, 5, 10, 15 and 20 s");
        assert_eq!(manager.deadline(), Some(start + Duration::from_secs(25)));
    }

    #[test]
    fn what_a_busy_service_manager_has_no_room_for_is_told_later_and_only_the_last_word() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        let mut manager = manager(path.as_os_str(), &socket, None);
        let now = Instant::now();
        // The kernel queues net.unix.max_dgram_qlen messages; more than any host is set to.
        let mut sent = 0;
        while manager.again.is_none() {
            manager.tell(&[("STATUS", "busy")], now);
            sent += 1;
            assert!(sent < 100_000, "the socket takes everything");
        }
        manager.tell(&[("READY", "1"), ("STATUS", "late")], now);
        assert_eq!(manager.deadline(), Some(now + AGAIN));
        while heard(&socket).is_some() {}
        manager.on_time(now);
        assert_eq!(heard(&socket), None, "its time has not come");
        manager.on_time(now + AGAIN);
        assert_eq!(heard(&socket).unwrap(), "READY=1\nSTATUS=late\n");
        // One that has gone keeps nobody: what it would have been told is dropped.
        drop(socket);
        manager.tell(&[("STATUS", "gone")], now);
        assert_eq!(manager.deadline(), None);
    }

    #[test]
    fn the_watchdogs_time_is_halved_and_is_another_process_s_where_that_is_said() {
        let own = process::id().to_string();
        for (usec, pid, expected) in [
            (Some("30000000"), None, Some(Duration::from_secs(15))),
            (
                Some("30000000"),
                Some(own.as_str()),
                Some(Duration::from_secs(15)),
            ),
            (Some("30000000"), Some("1"), None),
            (Some("30000000"), Some("none"), None),
            (Some("0"), None, None),
            (Some("-1"), None, None),
            (None, None, None),
        ] {
            let found = interval(usec.map(OsString::from), pid.map(OsString::from));
            assert_eq!(found, expected, "{usec:?} {pid:?}");
        }
    }
}
