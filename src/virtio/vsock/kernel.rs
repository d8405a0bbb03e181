//! The socket device whose packets pass in the host's kernel: vhost-vsock between the guest's queues and the sockets of
//! programs on the host. Linux, drivers/vhost/vsock.c.
//!
//! This process serves the event queue alone.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vsock::VhostVsock;
use vhost::{VhostBackend, VringConfigData};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;
use zerocopy::little_endian::U64;

use super::VsockError;
use super::events::EventQueue;
use super::{QUEUE_SIZE, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::config::VsockConfig;
use crate::memory::GuestRam;
use crate::virtio::activation::Activation;
use crate::virtio::config_space::{ConfigSpace, Fields};
use crate::virtio::counts::ServedBy;
use crate::virtio::device::VirtioDevice;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::{DeviceState, Progress, QueuePosition, Running};
use crate::virtio::spec::{self, feature, vsock};
use crate::virtio::vhost::kernel::{KernelError, VSOCK};
use crate::virtio::vhost::{
    self as back_end, Addresses, BackEnd, Handed, MemoryTable, Rings, Watch,
};
use crate::virtio::worker::Worker;

/// A socket device of the kernel's.
#[derive(Debug)]
pub(super) struct KernelDevice {
    name: String,
    kernel: Arc<KernelVsock>,
    features: u64,
    memory: Arc<MemoryTable>,
    config: Arc<Fields>,
    /// It has run, so that its driver's connections are its own.
    has_run: bool,
}

impl KernelDevice {
    /// Opens the kernel's device and takes the address. It is told of the guest's memory by `memory`.
    ///
    /// # Errors
    /// [`VsockError`]
    pub(super) fn new(
        name: &str,
        config: &VsockConfig,
        ram: &GuestRam,
        memory: &Arc<MemoryTable>,
    ) -> Result<Self, VsockError> {
        let name = name.to_owned();
        let (kernel, features) = match KernelVsock::open(ram) {
            Ok(opened) => opened,
            Err(source) => return Err(VsockError::Kernel { name, source }),
        };
        let cid = config.cid;
        match kernel.0.set_guest_cid(cid.into()) {
            Ok(()) => {}
            Err(vhost::Error::IoctlError(error))
                if error.raw_os_error() == Some(libc::EADDRINUSE) =>
            {
                return Err(VsockError::CidTaken { name, cid });
            }
            Err(error) => {
                let source = VSOCK.refused("VHOST_VSOCK_SET_GUEST_CID")(error);
                return Err(VsockError::Kernel { name, source });
            }
        }
        Ok(Self {
            name,
            kernel: Arc::new(kernel),
            features,
            memory: Arc::clone(memory),
            config: Fields::new(U64::new(cid.into()).as_bytes().to_vec()),
            has_run: false,
        })
    }
}

impl VirtioDevice for KernelDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn device_type(&self) -> u16 {
        spec::device_type::VSOCK
    }

    fn class(&self) -> u32 {
        0x07_80_00 // communication controller, other
    }

    fn features(&self) -> u64 {
        self.features & vsock::F_SEQPACKET
    }

    fn ring_features(&self) -> u64 {
        VSOCK.ring_features(self.features).unwrap_or_default()
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn served_by(&self) -> ServedBy {
        ServedBy::Kernel
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let queues = [RECEIVE_QUEUE, TRANSMIT_QUEUE].into_iter();
        let queues = queues.map_while(|queue| activation.take_setup(queue));
        let queues: Vec<_> = queues.collect();
        let went_on = queues
            .iter()
            .any(|queue| queue.position != QueuePosition::default());
        let moved = went_on && !self.has_run;
        let handed = Handed {
            name: format!("vsock {}", self.name),
            first: 0,
            features: activation.features() & self.features,
            queues,
            active: u16::MAX,
        };
        let mut rings = Vec::new();
        // The kernel serves both or none.
        if handed.queues.len() == 2 {
            let kernel = Arc::clone(&self.kernel);
            let ram = activation.ram();
            rings.push(Rings::start(kernel, handed, ram, &self.memory)?);
        }
        let worker = Box::new(VsockWorker {
            name: self.name.clone(),
            ram: activation.ram().clone(),
            watch: Watch::new(&rings),
            events: EventQueue::take(&mut activation, moved)?,
        });
        self.has_run = true;
        back_end::run(activation, rings, worker, DeviceState::None)
    }
}

/// The kernel's part: ring 0 receives, ring 1 transmits.
struct KernelVsock(vhost::vhost_kern::vsock::Vsock<GuestRam>);

impl KernelVsock {
    /// Opens it; with the features that it has.
    fn open(ram: &GuestRam) -> Result<(Self, u64), KernelError> {
        let opened = vhost::vhost_kern::vsock::Vsock::new(ram.clone());
        let this = Self(opened.map_err(|error| VSOCK.not_opened(error))?);
        this.set_owner().map_err(VSOCK.refused("VHOST_SET_OWNER"))?;
        let features = this.get_features();
        let features = features.map_err(VSOCK.refused("VHOST_GET_FEATURES"))?;
        let rings = VSOCK.ring_features(features)?;
        let own = feature::VERSION_1 | vsock::F_SEQPACKET;
        Ok((this, rings | features & own))
    }
}

impl std::fmt::Debug for KernelVsock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("KernelVsock")
            .field(&self.as_raw_fd())
            .finish()
    }
}

impl AsRawFd for KernelVsock {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl VhostKernBackend for KernelVsock {
    type AS = GuestRam;

    fn mem(&self) -> &GuestRam {
        self.0.mem()
    }

    /// [`Rings`] has looked: each part of a ring is in one region, which may also be its end.
    fn is_valid(&self, _config_data: &VringConfigData) -> bool {
        true
    }
}

impl BackEnd for KernelVsock {
    const ADDRESSES: Addresses = Addresses::Guest;

    fn begin(&self, _rings: &[u16]) -> Result<(), vhost::Error> {
        self.0.start()
    }

    fn end(&self, _rings: &[u16]) -> Result<(), vhost::Error> {
        self.0.stop()
    }
}

/// What this process does for the device.
#[derive(Debug)]
struct VsockWorker {
    name: String,
    ram: GuestRam,
    watch: Watch<KernelVsock>,
    events: EventQueue,
}

impl Worker for VsockWorker {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn kind(&self) -> &'static str {
        "vsock"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        let events = self.events.source();
        events.into_iter().chain(self.watch.sources()).collect()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        self.events.send_reset(&self.ram.memory())?;
        self.watch.wake()
    }

    fn leave(&mut self, progress: &mut Progress) {
        self.events.leave(progress);
    }
}
