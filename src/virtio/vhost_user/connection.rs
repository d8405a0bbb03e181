//! A connection to a back end: calls that end in time, and what was agreed on at its beginning.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserInflight};
use vhost::vhost_user::{Error as ProtocolError, Frontend, VhostUserFrontend};
use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use vhost::{
    VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo,
    VringConfigData,
};
use vmm_sys_util::eventfd::EventFd as VringEvent;

use super::channel::Channel;
use super::guard::Guard;
use super::meeting::Meeting;
use super::number;
use crate::memory::Region;
use crate::unix_socket::SocketError;
use crate::virtio::spec::{feature, net};
use crate::virtio::vhost::{Addresses, BackEnd, VhostError, infos};

/// How long a back end has to answer a message.
const ANSWER: Duration = Duration::from_secs(5);
/// `VHOST_USER_F_PROTOCOL_FEATURES`
const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// What is made use of, of what back ends offer.
const KNOWN: Protocol = Protocol::MQ
    .union(Protocol::REPLY_ACK)
    .union(Protocol::MTU)
    .union(Protocol::CONFIG)
    .union(Protocol::INFLIGHT_SHMFD)
    .union(Protocol::BACKEND_REQ);

/// Why a back end cannot serve a device.
#[derive(Debug, thiserror::Error)]
pub enum BackEndError {
    /// guest RAM is private to Busway, and a back end could not reach it: start the VM with --memory shared=on
    #[error("{PRIVATE_MEMORY}")]
    PrivateMemory,
    /// no back end is to be reached at {socket}: {source}; start it first
    #[error("no back end is to be reached at {}: {source}; start it first", .socket.display())]
    Connect {
        /// Where it should listen.
        socket: PathBuf,
        /// Why it is not reached.
        source: io::Error,
    },
    /// the socket for its back end: {0}
    #[error("the socket for its back end: {0}")]
    Listen(SocketError),
    /// no back end has come to {socket}
    #[error("no back end has connected to {} within {seconds} s: start it beside the VM, as the end that \
        connects, or leave vhost_mode=server out", .socket.display())]
    Alone {
        /// Where it should connect.
        socket: PathBuf,
        /// How long it was waited for.
        seconds: u64,
    },
    /// the back end at {socket}: {source}
    #[error("the back end at {}: {source}", .socket.display())]
    Step {
        /// Where it listens.
        socket: PathBuf,
        /// What failed.
        source: VhostError,
    },
    /// the back end at {socket} {what}
    #[error("the back end at {} {what}", .socket.display())]
    Unfit {
        /// Where it listens.
        socket: PathBuf,
        /// What is wrong with it, and what to do.
        what: &'static str,
    },
    /// the back end at {socket} has {have} queues, and num_queues= asks for {wanted}
    #[error("the back end at {} serves {have} {of}, and this device has {wanted}: ask for fewer by num_queues=, or give it more", .socket.display())]
    Queues {
        /// Where it listens.
        socket: PathBuf,
        /// What is counted: `queues`, or `pairs of queues`.
        of: &'static str,
        /// How many it serves.
        have: u64,
        /// How many the device has.
        wanted: usize,
    },
}

/// That memory is not shared, with the remedy.
pub(super) const PRIVATE_MEMORY: &str = "guest RAM is private to Busway, and a back end in another process \
    could not reach it: start the VM with --memory shared=on";

/// What a device wants of its back end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Queues that the back end serves.
    pub(super) queues: usize,
    /// Bytes of its configuration, where that is the back end's.
    pub(super) config: Option<usize>,
    /// What a NIC wants besides.
    pub(super) net: Option<NetNeeds>,
}

/// What a NIC wants of its back end.
#[derive(Clone, Copy, Debug)]
pub(super) struct NetNeeds {
    /// Pairs of queues, from 1 on.
    pub(super) pairs: u16,
    /// The longest packet of the guest's; bytes.
    pub(super) mtu: Option<u16>,
}

/// What a back end keeps note of requests in that it has taken and not answered: it is kept here, and is the next back
/// end's where this one dies.
pub(super) struct Inflight {
    file: File,
    place: VhostUserInflight,
}

impl fmt::Debug for Inflight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Inflight").field(&self.file).finish()
    }
}

/// A connection.
pub(crate) struct Connection {
    frontend: Mutex<Frontend>,
    stream: UnixStream,
    guard: Guard,
    features: u64,
    protocol: Protocol,
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection")
            .field("features", &self.features)
            .field("protocol", &self.protocol)
            .finish_non_exhaustive()
    }
}

impl Connection {
    /// Meets the back end at `meeting`, where it is or will be within `patience`, and agrees with it on all that
    /// is not the driver's to choose. `heard` is signalled when it says something by itself later. `reached` is given the
    /// socket before anything is said on it.
    ///
    /// # Errors
    /// [`BackEndError`]
    pub(super) fn open(
        meeting: &Meeting,
        needs: Needs,
        patience: Duration,
        heard: &EventFd,
        reached: impl FnOnce(UnixStream),
    ) -> Result<Self, BackEndError> {
        let socket = meeting.socket();
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::TimedOut => BackEndError::Alone {
                socket: socket.to_owned(),
                seconds: patience.as_secs(),
            },
            _ => BackEndError::Connect {
                socket: socket.to_owned(),
                source,
            },
        };
        let stream = meeting.reach(patience).map_err(failed)?;
        reached(stream.try_clone().map_err(failed)?);
        let guard = Guard::new(&stream, heard).map_err(failed)?;
        let other = stream.try_clone().map_err(failed)?;
        let mut this = Self {
            frontend: Mutex::new(Frontend::from_stream(other, needs.queues as u64)),
            stream,
            guard,
            features: 0,
            protocol: Protocol::empty(),
        };
        let step = |source| BackEndError::Step {
            socket: socket.to_owned(),
            source,
        };
        this.agree().map_err(step)?;
        this.check(socket, needs)?;
        this.open_channel().map_err(step)?;
        Ok(this)
    }

    /// Whether the back end can serve what `needs` are of.
    fn check(&self, socket: &Path, needs: Needs) -> Result<(), BackEndError> {
        let unfit = |what| BackEndError::Unfit {
            socket: socket.to_owned(),
            what,
        };
        if self.features & feature::VERSION_1 == 0 {
            return Err(unfit("is for legacy drivers alone (no VIRTIO_F_VERSION_1)"));
        }
        if needs.config.is_some() && !self.has(Protocol::CONFIG) {
            return Err(unfit(
                "does not say what the device is (no VHOST_USER_PROTOCOL_F_CONFIG): it serves another kind",
            ));
        }
        if let Some(NetNeeds { pairs, mtu }) = needs.net {
            if pairs > 1 && (self.features & net::F_MQ == 0 || !self.has(Protocol::MQ)) {
                return Err(unfit(
                    "serves one pair of queues (no VIRTIO_NET_F_MQ, or no VHOST_USER_PROTOCOL_F_MQ): leave \
                     num_queues= out, or give it more",
                ));
            }
            if mtu.is_some() && self.features & net::F_MTU == 0 {
                return Err(unfit(
                    "does not hold itself to an MTU (no VIRTIO_NET_F_MTU): leave mtu= out, and set it there",
                ));
            }
        }
        self.check_queues(socket, needs)
    }

    fn check_queues(&self, socket: &Path, needs: Needs) -> Result<(), BackEndError> {
        if !self.has(Protocol::MQ) {
            return Ok(());
        }
        // A NIC's back ends count pairs. DPDK, lib/vhost/vhost_user.c, vhost_user_get_queue_num; QEMU, net/vhost-user.c
        let (of, wanted, have) = match needs.net {
            Some(NetNeeds { pairs, .. }) => (
                "pairs of queues",
                usize::from(pairs),
                self.exchange(|stream| number::get(stream, number::GET_QUEUE_NUM)),
            ),
            None => ("queues", needs.queues, self.call(Frontend::get_queue_num)),
        };
        let socket = || socket.to_owned();
        let have = have.map_err(VhostError::at("GET_QUEUE_NUM"));
        let have = have.map_err(|source| BackEndError::Step {
            socket: socket(),
            source,
        })?;
        if have < wanted as u64 {
            return Err(BackEndError::Queues {
                socket: socket(),
                of,
                have,
                wanted,
            });
        }
        Ok(())
    }

    fn agree(&mut self) -> Result<(), VhostError> {
        self.set_owner().map_err(VhostError::at("SET_OWNER"))?;
        let features = self.get_features();
        self.features = features.map_err(VhostError::at("GET_FEATURES"))?;
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        let offered = self.call(Frontend::get_protocol_features);
        let offered = offered.map_err(VhostError::at("GET_PROTOCOL_FEATURES"))?;
        let mut wanted = offered & KNOWN;
        if !wanted.contains(Protocol::CONFIG) {
            // There is nothing that it could ask for then.
            wanted.remove(Protocol::BACKEND_REQ);
        }
        let agreed = self.call(|frontend| frontend.set_protocol_features(wanted));
        agreed.map_err(VhostError::at("SET_PROTOCOL_FEATURES"))?;
        self.protocol = wanted;
        if wanted.contains(Protocol::REPLY_ACK) {
            self.frontend()
                .set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        Ok(())
    }

    /// Gives the back end a way to say that the configuration has changed.
    fn open_channel(&self) -> Result<(), VhostError> {
        if !self.has(Protocol::BACKEND_REQ) {
            return Ok(());
        }
        let (channel, other) = Channel::new()
            .map_err(vhost::Error::IOError)
            .map_err(VhostError::at("socketpair"))?;
        // It may ask before it answers this.
        self.guard.listen(channel);
        let set = self.call(|frontend| frontend.set_backend_request_fd(&other));
        set.map_err(VhostError::at("SET_BACKEND_REQ_FD"))
    }

    fn has(&self, feature: Protocol) -> bool {
        self.protocol.contains(feature)
    }

    /// What the back end offers a driver.
    pub(super) fn features(&self) -> u64 {
        self.features & !PROTOCOL_FEATURES
    }

    /// What is to be set at the back end for a driver that has chosen `features`.
    pub(super) fn agreed(&self, features: u64) -> u64 {
        features | self.features & PROTOCOL_FEATURES
    }

    /// The first `size` bytes of the device's configuration.
    pub(super) fn config(&self, size: usize) -> Result<Vec<u8>, VhostError> {
        let asked = vec![0; size];
        let config = self.call(|frontend| {
            let flags = VhostUserConfigFlags::empty();
            frontend.get_config(0, size as u32, flags, &asked)
        });
        let (_, bytes) = config.map_err(VhostError::at("GET_CONFIG"))?;
        Ok(bytes)
    }

    /// Whether the back end has a configuration.
    pub(super) fn has_config(&self) -> bool {
        self.has(Protocol::CONFIG)
    }

    /// Writes into the device's configuration, as its driver has done.
    pub(super) fn set_config(&self, offset: usize, bytes: &[u8]) -> Result<(), VhostError> {
        let offset = u32::try_from(offset).unwrap_or(u32::MAX);
        let set =
            self.call(|frontend| frontend.set_config(offset, VhostUserConfigFlags::empty(), bytes));
        match set {
            // It takes none of it, which the driver sees by what it reads.
            Err(error) if leaves_order(&error) => Ok(()),
            set => set.map_err(VhostError::at("SET_CONFIG")),
        }
    }

    /// Has the back end know the longest packet of the guest's, in bytes, where it wants to.
    pub(super) fn set_mtu(&self, mtu: u16) -> Result<(), VhostError> {
        if !self.has(Protocol::MTU) {
            return Ok(());
        }
        let acknowledges = self.has(Protocol::REPLY_ACK);
        let said = self
            .exchange(|stream| number::set(stream, number::NET_SET_MTU, mtu.into(), acknowledges));
        said.map_err(VhostError::at("NET_SET_MTU"))
    }

    /// Whether the back end has said, since the last time of asking, that its configuration is another.
    pub(super) fn take_config_change(&self) -> bool {
        self.guard.take_config_change()
    }

    /// Has the back end keep note of requests in the area that `kept` has from one before it, or in a new one, for
    /// `queues` queues of `size` descriptors. `None`: it keeps no such note.
    pub(super) fn share_inflight(
        &self,
        kept: Option<Inflight>,
        queues: u16,
        size: u16,
    ) -> Result<Option<Inflight>, VhostError> {
        if !self.has(Protocol::INFLIGHT_SHMFD) {
            return Ok(None);
        }
        let inflight = match kept {
            Some(kept) => kept,
            None => {
                let asked = VhostUserInflight::new(0, 0, queues, size);
                let got = self.call(|frontend| frontend.get_inflight_fd(&asked));
                let (place, file) = got.map_err(VhostError::at("GET_INFLIGHT_FD"))?;
                Inflight { file, place }
            }
        };
        let set = self
            .call(|frontend| frontend.set_inflight_fd(&inflight.place, inflight.file.as_raw_fd()));
        set.map_err(VhostError::at("SET_INFLIGHT_FD"))?;
        Ok(Some(inflight))
    }

    /// Whether the back end has gone, or has sent what nobody asked for: then it is not understood any more, and the
    /// connection ends. To be asked where the socket is said to be ready.
    pub(super) fn is_over(&self) -> bool {
        // No answer is on its way while the front end is held.
        let _calls = self.frontend();
        if !self.guard.is_cut() && is_readable(&self.stream) {
            self.guard.cut();
        }
        self.guard.is_cut()
    }

    /// Ends the connection.
    pub(super) fn cut(&self) {
        self.guard.cut();
    }

    /// The socket, for who ends the connection while a call goes on.
    pub(super) fn stream(&self) -> io::Result<UnixStream> {
        self.stream.try_clone()
    }

    fn frontend(&self) -> std::sync::MutexGuard<'_, Frontend> {
        self.frontend.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does a call that the `vhost` crate does not make, in the time of one, while it makes none.
    fn exchange<T>(&self, exchange: impl FnOnce(&UnixStream) -> io::Result<T>) -> vhost::Result<T> {
        self.call(|_frontend| exchange(&self.stream).map_err(vhost::Error::IOError))
    }

    /// Does one call, which takes [`ANSWER`] at most. After a failure in which the two sides may have lost each
    /// other's place, the connection is over.
    fn call<T>(&self, call: impl FnOnce(&mut Frontend) -> vhost::Result<T>) -> vhost::Result<T> {
        let mut frontend = self.frontend();
        if self.guard.is_cut() {
            return Err(vhost::Error::VhostUserProtocol(ProtocolError::Disconnected));
        }
        let deadline = Instant::now() + ANSWER;
        let result = self.guard.within(deadline, || call(&mut frontend));
        result.map_err(|error| {
            if self.guard.was_late() {
                let late = format!("no answer within {} s", ANSWER.as_secs());
                let late = io::Error::new(io::ErrorKind::TimedOut, late);
                return vhost::Error::IOError(late);
            }
            if !leaves_order(&error) {
                self.guard.cut();
            }
            error
        })
    }
}

/// Whether a call failed without harm: the back end has said no, or nothing was sent.
fn leaves_order(error: &vhost::Error) -> bool {
    matches!(
        error,
        vhost::Error::VhostUserProtocol(
            ProtocolError::BackendInternalError
                | ProtocolError::InvalidParam
                | ProtocolError::InactiveFeature(_)
                | ProtocolError::InactiveOperation(_)
        )
    )
}

fn is_readable(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP)];
    matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl BackEnd for Connection {
    const ADDRESSES: Addresses = Addresses::Process;

    /// What no other process can map (persistent memory with changes of the VM's own) is left out: a request in it is
    /// the driver's mistake.
    fn set_memory(&self, regions: &[Arc<Region>]) -> vhost::Result<()> {
        let mut shared = regions.to_vec();
        shared.retain(|region| region.file().is_some());
        self.set_mem_table(&infos(&shared)).map(drop)
    }

    fn begin(&self, rings: &[u16]) -> vhost::Result<()> {
        self.enable(rings, true)
    }

    fn end(&self, rings: &[u16]) -> vhost::Result<()> {
        self.enable(rings, false)
    }
}

impl Connection {
    /// Without protocol features a ring is served from its first notification to `GET_VRING_BASE`.
    fn enable(&self, rings: &[u16], enable: bool) -> vhost::Result<()> {
        if self.features & PROTOCOL_FEATURES == 0 {
            return Ok(());
        }
        for &ring in rings {
            self.call(|frontend| frontend.set_vring_enable(ring.into(), enable))?;
        }
        Ok(())
    }
}

impl VhostBackend for Connection {
    fn get_features(&self) -> vhost::Result<u64> {
        self.call(|frontend| frontend.get_features())
    }

    fn set_features(&self, features: u64) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_features(features))
    }

    fn set_owner(&self) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_owner())
    }

    fn reset_owner(&self) -> vhost::Result<()> {
        self.call(|frontend| frontend.reset_owner())
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.call(|frontend| frontend.set_mem_table(regions))
    }

    fn set_log_base(
        &self,
        base: u64,
        region: Option<VhostUserDirtyLogRegion>,
    ) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_log_base(base, region))
    }

    fn set_log_fd(&self, fd: RawFd) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_log_fd(fd))
    }

    fn set_vring_num(&self, queue: usize, num: u16) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_num(queue, num))
    }

    fn set_vring_addr(&self, queue: usize, config: &VringConfigData) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_addr(queue, config))
    }

    fn set_vring_base(&self, queue: usize, base: u16) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_base(queue, base))
    }

    fn get_vring_base(&self, queue: usize) -> vhost::Result<u32> {
        self.call(|frontend| frontend.get_vring_base(queue))
    }

    fn set_vring_call(&self, queue: usize, event: &VringEvent) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_call(queue, event))
    }

    fn set_vring_kick(&self, queue: usize, event: &VringEvent) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_kick(queue, event))
    }

    fn set_vring_err(&self, queue: usize, event: &VringEvent) -> vhost::Result<()> {
        self.call(|frontend| frontend.set_vring_err(queue, event))
    }
}
