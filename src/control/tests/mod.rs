//! The control socket from outside, before a machine that answers as the test says.

mod clients;
mod described;
mod endpoints;
mod hostile;
mod served;
mod sockets;

use std::collections::BTreeMap;
use std::io::{IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use busway_pci::{InterruptMode, Seen};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::config::{DeviceConfig, DiskConfig, MemoryZoneConfig, VirtioConfig, VmConfig};
use crate::kvm::{ExitKind, VcpuSeen};
use crate::machine::{
    Added, AddedFunction, Answer, Extent, Info, Request, RequestError, Requests, State, VirtioInfo,
};
use crate::machine::{
    AssignedDoing, DeviceSeen, DeviceState, DmaSeen, Doing, Observed, VirtioDoing,
};
use crate::report::AssignedDevice;
use crate::virtio::{DiskTotals, DriverState, NetTotals, ServedBy, Totals, TransferTotals};

/// What a machine does with a request: nothing is said to leave it unanswered.
type Reaction = Option<Result<Answer, RequestError>>;

/// A VM's control socket, and a machine behind it.
struct Vm {
    server: Option<Server>,
    control: Control,
    /// The machine ends when it is asked to, whatever the test has it answer.
    ends: Arc<AtomicBool>,
    machine: Option<JoinHandle<()>>,
    socket: PathBuf,
    _folder: TempDir,
}

/// Limits that a test can wait for.
const SHORT: Limits = Limits {
    between: Duration::from_millis(100),
    whole: Duration::from_secs(2),
    linger: Duration::from_secs(1),
};

impl Vm {
    fn new(react: impl FnMut(&Request) -> Reaction + Send + 'static) -> Self {
        Self::with(Limits::SERVER, react)
    }

    fn with(limits: Limits, mut react: impl FnMut(&Request) -> Reaction + Send + 'static) -> Self {
        let requests = Requests::new().unwrap();
        let control = requests.control();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("api");
        let end = Arc::new(End::default());
        // A host without any device.
        let host = busway_host::SysRoot::under(folder.path());
        std::fs::create_dir_all(host.sys.join("bus/pci/devices")).unwrap();
        let api = v1::Api::new(control.clone(), Arc::clone(&end)).on(host);
        let address = SocketAddress::Path(socket.clone());
        let server = Server::serve(&address, Arc::new(api), end, limits).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let ending = Arc::clone(&ends);
        let react = move |request: &Request| match request {
            Request::End(_) if ending.load(Relaxed) => Some(Ok(Answer::Done)),
            request => react(request),
        };
        Self {
            server: Some(server),
            control,
            ends,
            machine: Some(thread::spawn(requests.play(react))),
            socket,
            _folder: folder,
        }
    }

    /// One whose guest does what it is asked.
    fn living() -> Self {
        Self::new(living())
    }

    fn connect(&self) -> Client {
        Client::new(&self.socket)
    }

    /// How many connections are open.
    fn connections(&self) -> usize {
        self.server.as_ref().unwrap().connections.count().0
    }

    /// How many of them have no request under way.
    fn idle(&self) -> usize {
        self.server.as_ref().unwrap().connections.count().1
    }

    /// The machine has ended and all is given back.
    fn finish(&mut self) {
        if let Some(server) = self.server.take() {
            server.finish();
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        self.ends.store(true, Relaxed);
        let _ended = self.control.ask(Request::End(Extent::Process));
        self.finish();
        if let Some(machine) = self.machine.take() {
            let ended = machine.join();
            assert!(ended.is_ok() || thread::panicking());
        }
    }
}

/// A guest that is paused and resumed.
fn living() -> impl FnMut(&Request) -> Reaction {
    let mut state = State::Running;
    move |request| {
        let next = match (request, state) {
            (Request::Info, _) => return Some(how(state)),
            (Request::Observe, _) => return Some(seen(state)),
            (Request::Create(..), _) => return Some(Err(RequestError::AlreadyCreated)),
            (Request::Boot, _) => return Some(Err(RequestError::State("running already"))),
            (Request::Pause, State::Running) => State::Paused,
            (Request::Resume, State::Paused) => State::Running,
            (Request::Pause, _) => return Some(Err(RequestError::State("paused"))),
            (Request::Resume, _) => return Some(Err(RequestError::State("running"))),
            (Request::PowerButton | Request::Reboot | Request::Nmi, _) => state,
            (Request::ResizeBalloon(_) | Request::End(_), _) => state,
            (Request::AddDevice(configs, _), _) => return Some(added(configs)),
            (Request::AddVirtio(config, _), _) => return Some(added_virtio(config)),
            (Request::RemoveDevice { id, .. }, _) => return Some(removed(id)),
            (Request::Resize { vcpus, .. }, _) => return Some(resized(*vcpus)),
            (Request::ResizeMemory(bytes), _) => return Some(resized_memory(*bytes)),
            (Request::ResizeZone { id, bytes }, _) => return Some(resized_zone(id, *bytes)),
        };
        state = next;
        Some(Ok(Answer::Done))
    }
}

/// None, some, and some while others are about to leave.
fn resized(vcpus: u16) -> Result<Answer, RequestError> {
    match vcpus {
        0 => Err(RequestError::Invalid("0 processors".to_owned())),
        9 => Err(RequestError::Resizing),
        _ => Ok(Answer::Done),
    }
}

/// So little while other RAM is on its way, or another amount.
fn resized_memory(bytes: u64) -> Result<Answer, RequestError> {
    match bytes {
        1 => Err(RequestError::Growing),
        _ => Ok(Answer::Done),
    }
}

/// Of zone `a`, which has a GiB at least; there is no other.
fn resized_zone(id: &str, bytes: u64) -> Result<Answer, RequestError> {
    let config = VmConfig {
        memory_zone: vec![MemoryZoneConfig {
            hotplug_size: Some(1 << 30),
            ..MemoryZoneConfig::new("a", 1 << 30)
        }],
        ..VmConfig::default()
    };
    let zone = config.zone(id).map_err(RequestError::NoZone)?;
    let plugged = zone.to_plug(bytes);
    plugged.map_err(|error| RequestError::Invalid(error.to_string()))?;
    Ok(Answer::Done)
}

/// One that is there already, one that cannot be had, and any other.
fn added(configs: &[DeviceConfig]) -> Result<Answer, RequestError> {
    let id = configs[0].id();
    match id.as_str() {
        "0000:01:00.0" => Err(RequestError::Exists(id)),
        "early" => Ok(Answer::Added(Added {
            attended: false,
            ..Added::one(id, "0000:04:00.0".into())
        })),
        "0000:0f:00.0" => Err(RequestError::Failed(format!("{id} is bound to nvme"))),
        _ => {
            let others = (1..).zip(&configs[1..]);
            let others = others.map(|(number, config)| AddedFunction {
                id: config.id(),
                address: format!("0000:03:00.{number}"),
            });
            Ok(Answer::Added(Added {
                others: others.collect(),
                ..Added::one(id, "0000:03:00.0".into())
            }))
        }
    }
}

/// The same of a virtio device.
fn added_virtio(config: &VirtioConfig) -> Result<Answer, RequestError> {
    let id = config.id().unwrap_or(config.word()).to_owned();
    match id.as_str() {
        "twice" => Err(RequestError::Exists(id)),
        _ => Ok(Answer::Added(Added::one(id, "0000:00:04.0".into()))),
    }
}

fn removed(id: &str) -> Result<Answer, RequestError> {
    match id {
        "0000:01:00.0" => Ok(Answer::Done),
        "card" => Ok(Answer::RemovedTogether(vec![
            "card".into(),
            "0000:02:00.1".into(),
        ])),
        "stuck" => Err(RequestError::Failed("the guest did not release it".into())),
        _ => Err(RequestError::Unknown(id.into())),
    }
}

fn how(state: State) -> Result<Answer, RequestError> {
    Ok(Answer::Info(Box::new(info(state))))
}

fn seen(state: State) -> Result<Answer, RequestError> {
    Ok(Answer::Observed(Box::new(observed(state))))
}

/// A VM with a device of each kind, and one in each state that it can be in.
pub(super) fn observed(state: State) -> Observed {
    let device = |id: &str, kind, state| DeviceSeen {
        id: id.into(),
        kind,
        host: None,
        guest: None,
        state,
        doing: None,
    };
    let doing = |totals| Doing {
        function: Seen {
            config_reads: 1,
            config_writes: 2,
            bar_reads: 3,
            bar_writes: 4,
            mode: InterruptMode::Msix,
            connected: 2,
        },
        vectors: 3,
        assigned: None,
        virtio: Some(VirtioDoing {
            driver: DriverState::Ready,
            served_by: ServedBy::Busway,
            interrupts: 9,
            totals,
        }),
    };
    let assigned = Doing {
        assigned: Some(AssignedDoing {
            reset: Some("flr"),
            direct_bytes: 16 << 10,
            errors: 1,
        }),
        virtio: None,
        ..doing(Totals::None)
    };
    let disk = DiskTotals {
        reads: TransferTotals {
            ops: 2,
            bytes: 8192,
            micros: 300,
            longest_micros: 200,
            shortest_micros: 100,
        },
        others: 1,
        ..DiskTotals::default()
    };
    let net = NetTotals {
        rx_frames: 1,
        rx_bytes: 60,
        ..NetTotals::default()
    };
    let vcpu = |id| VcpuSeen {
        id,
        exits: ExitKind::ALL.map(|kind| (kind.name(), 7)),
        kvm: vec![("exits", 100), ("irq_injections", 11)],
    };
    Observed {
        state,
        uptime: Some(Duration::from_millis(1500)),
        memory: 256 << 20,
        vcpus: vec![vcpu(0), vcpu(1)],
        devices: vec![
            DeviceSeen {
                host: Some("0000:01:00.0".into()),
                guest: Some("0000:02:00.0".into()),
                doing: Some(assigned.clone()),
                ..device("drive/é\"", "assigned", DeviceState::Present)
            },
            DeviceSeen {
                doing: Some(assigned),
                ..device("bad", "assigned", DeviceState::Held)
            },
            device("late", "assigned", DeviceState::Coming),
            device("away", "assigned", DeviceState::Going),
            device("dark", "assigned", DeviceState::Off),
            DeviceSeen {
                guest: Some("0000:00:01.0".into()),
                doing: Some(doing(Totals::Disk(disk))),
                ..device("disk0", "disk", DeviceState::Present)
            },
            DeviceSeen {
                doing: Some(doing(Totals::Net(net))),
                ..device("net0", "net", DeviceState::Present)
            },
            DeviceSeen {
                doing: Some(doing(Totals::None)),
                ..device("__rng", "rng", DeviceState::Present)
            },
        ],
        dma: Some(DmaSeen {
            mappings: 3,
            bytes: 256 << 20,
            map_calls: 2,
            device_map_calls: 1,
        }),
        vector_updates: 5,
    }
}

fn info(state: State) -> Info {
    let mut device = DeviceConfig::new("01:00.0").unwrap();
    device.id = Some("drive/é".into());
    let disk = DiskConfig::new("a.raw");
    let config = VmConfig {
        kernel: Some("/boot/vmlinuz".into()),
        device: vec![device],
        disk: vec![DiskConfig {
            id: Some("disk0".into()),
            ..disk.clone()
        }],
        ..VmConfig::default()
    };
    Info {
        state,
        config,
        memory: 256 << 20,
        zones: BTreeMap::new(),
        balloon: 0,
        devices: vec![AssignedDevice {
            host: "0000:01:00.0".into(),
            guest: "0000:02:00.0".into(),
            reset: "flr",
        }],
        ids: BTreeMap::from([("0000:01:00.0".into(), "drive/é".into())]),
        empty_slots: 2,
        virtio: vec![VirtioInfo {
            id: "disk0".into(),
            address: "0000:00:01.0".into(),
            config: VirtioConfig::Disk(disk),
        }],
        serial: None,
        console: None,
    }
}

/// The other end of the socket, which reads as literally as clients do.
struct Client(UnixStream);

/// An answer: its head line by line, and its body.
#[derive(Debug)]
struct Reply {
    status: u16,
    head: Vec<String>,
    body: Vec<u8>,
}

impl Client {
    fn new(socket: &std::path::Path) -> Self {
        let stream = UnixStream::connect(socket).unwrap();
        // What is not answered by then never is.
        let limit = Some(Duration::from_secs(20));
        stream.set_read_timeout(limit).unwrap();
        stream.set_write_timeout(limit).unwrap();
        Self(stream)
    }

    fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.0.write_all(bytes.as_ref()).unwrap();
    }

    /// The same, with descriptors beside its first bytes.
    fn send_with(&self, text: &str, files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        let parts = [IoSlice::new(text.as_bytes())];
        let sent = sendmsg(&self.0, &parts, &mut control, SendFlags::empty());
        assert_eq!(sent.unwrap(), text.len());
    }

    /// The next answer; none where the connection is closed before.
    fn reply(&mut self) -> Option<Reply> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            match self.0.read(&mut byte) {
                Ok(1) => head.push(byte[0]),
                // Closed with bytes of ours unread.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                other => {
                    assert_eq!((other.unwrap(), head.len()), (0, 0), "an answer is cut off");
                    return None;
                }
            }
        }
        let head = String::from_utf8(head).unwrap();
        let head: Vec<String> = head.split("\r\n").map(str::to_owned).collect();
        let status = head[0].strip_prefix("HTTP/1.1 ").unwrap().trim();
        let status = status.parse().unwrap();
        let length = head
            .iter()
            .find_map(|line| line.strip_prefix("Content-Length: "))
            .map_or(0, |length| length.parse().unwrap());
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).unwrap();
        Some(Reply { status, head, body })
    }

    /// A request with its answer.
    fn ask(&mut self, method: &str, path: &str) -> Reply {
        self.send(request(method, path, ""));
        self.reply().unwrap()
    }

    /// Nothing comes any more.
    fn is_closed(&mut self) -> bool {
        match self.0.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

impl Reply {
    fn json(&self) -> Value {
        assert!(self.body.is_ascii());
        serde_json::from_slice(&self.body).unwrap()
    }

    fn keeps_alive(&self) -> bool {
        self.head.contains(&"Connection: keep-alive".to_owned())
    }

    /// An error's texts.
    fn messages(&self) -> Vec<String> {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// A request as simple clients write it.
fn request(method: &str, path: &str, more: &str) -> String {
    format!("{method} /api/v1/{path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n{more}\r\n")
}

/// Waits for something that comes without a word.
fn until(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        thread::sleep(Duration::from_millis(2));
    }
}
