//! A back end that notes what it is told and serves nothing, and a device whose rings it has; for tests.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use super::{Addresses, BackEnd, Handed, MemoryTable, Rings, Watch, run};
use crate::virtio::activation::Activation;
use crate::virtio::config_space::{ConfigSpace, Fields};
use crate::virtio::device::VirtioDevice;
use crate::virtio::error::{QueueError, StartError};
use crate::virtio::life::{DeviceState, Progress, Running};
use crate::virtio::spec::{device_type, feature};
use crate::virtio::worker::Worker;

/// The features that it offers beside `VIRTIO_F_VERSION_1`.
pub(crate) const FEATURE: u64 = 1 << 3;

/// What the test and the back end share.
#[derive(Debug, Default)]
pub(crate) struct FakeBackEnd {
    calls: Mutex<Vec<String>>,
    /// The step that it refuses.
    pub(crate) refuses: Mutex<Option<&'static str>>,
    /// The next available entry of each ring.
    pub(crate) bases: Mutex<BTreeMap<usize, u16>>,
    events: Mutex<BTreeMap<(&'static str, usize), EventFd>>,
}

impl FakeBackEnd {
    /// What it has been told since the last time of asking.
    pub(crate) fn calls(&self) -> Vec<String> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }

    /// The eventfd that it has: `call`, `kick` or `err` of a ring.
    pub(crate) fn event(&self, what: &'static str, ring: usize) -> HandedEvent {
        HandedEvent(
            self.events.lock().unwrap()[&(what, ring)]
                .try_clone()
                .unwrap(),
        )
    }

    fn note(&self, what: &'static str, arguments: String) -> vhost::Result<()> {
        let call = format!("{what} {arguments}");
        self.calls.lock().unwrap().push(call.trim_end().to_owned());
        match *self.refuses.lock().unwrap() {
            Some(refused) if refused == what => Err(vhost::Error::InvalidOperation),
            _ => Ok(()),
        }
    }

    fn take_event(&self, what: &'static str, ring: usize, fd: &EventFd) -> vhost::Result<()> {
        self.note(what, ring.to_string())?;
        let copy = fd.try_clone().map_err(vhost::Error::IOError)?;
        self.events.lock().unwrap().insert((what, ring), copy);
        Ok(())
    }
}

/// An eventfd that was handed over.
#[derive(Debug)]
pub(crate) struct HandedEvent(EventFd);

impl HandedEvent {
    /// Signals it, as a back end does.
    pub(crate) fn signal(&self) {
        self.0.write(1).unwrap();
    }

    /// How often it was signalled.
    pub(crate) fn take(&self) -> u64 {
        self.0.read().unwrap_or(0)
    }
}

impl VhostBackend for FakeBackEnd {
    fn get_features(&self) -> vhost::Result<u64> {
        Ok(FEATURE | feature::VERSION_1)
    }

    fn set_features(&self, features: u64) -> vhost::Result<()> {
        self.note("features", format!("{features:#x}"))
    }

    fn set_owner(&self) -> vhost::Result<()> {
        self.note("owner", String::new())
    }

    fn reset_owner(&self) -> vhost::Result<()> {
        Ok(())
    }

    fn set_mem_table(
        &self,
        regions: &[VhostUserMemoryRegionInfo],
    ) -> vhost::Result<Option<Vec<u64>>> {
        let regions = regions.iter();
        let regions: Vec<_> = regions
            .map(|one| format!("{:#x}+{:#x}", one.guest_phys_addr, one.memory_size))
            .collect();
        self.note("memory", regions.join(" ")).map(|()| None)
    }

    fn set_log_base(&self, _: u64, _: Option<VhostUserDirtyLogRegion>) -> vhost::Result<()> {
        Ok(())
    }

    fn set_log_fd(&self, _: RawFd) -> vhost::Result<()> {
        Ok(())
    }

    fn set_vring_num(&self, ring: usize, num: u16) -> vhost::Result<()> {
        self.note("num", format!("{ring}: {num}"))
    }

    fn set_vring_addr(&self, ring: usize, to: &VringConfigData) -> vhost::Result<()> {
        let (desc, avail, used) = (to.desc_table_addr, to.avail_ring_addr, to.used_ring_addr);
        self.note("addr", format!("{ring}: {desc:#x} {avail:#x} {used:#x}"))
    }

    fn set_vring_base(&self, ring: usize, base: u16) -> vhost::Result<()> {
        self.bases.lock().unwrap().insert(ring, base);
        self.note("base", format!("{ring}: {base}"))
    }

    fn get_vring_base(&self, ring: usize) -> vhost::Result<u32> {
        self.note("get", ring.to_string())?;
        Ok(self
            .bases
            .lock()
            .unwrap()
            .get(&ring)
            .copied()
            .unwrap_or_default()
            .into())
    }

    fn set_vring_call(&self, ring: usize, fd: &EventFd) -> vhost::Result<()> {
        self.take_event("call", ring, fd)
    }

    fn set_vring_kick(&self, ring: usize, fd: &EventFd) -> vhost::Result<()> {
        self.take_event("kick", ring, fd)
    }

    fn set_vring_err(&self, ring: usize, fd: &EventFd) -> vhost::Result<()> {
        self.take_event("err", ring, fd)
    }
}

impl BackEnd for FakeBackEnd {
    const ADDRESSES: Addresses = Addresses::Guest;

    fn begin(&self, rings: &[u16]) -> vhost::Result<()> {
        self.note("begin", format!("{rings:?}"))
    }

    fn end(&self, rings: &[u16]) -> vhost::Result<()> {
        self.note("end", format!("{rings:?}"))
    }
}

/// A device with two queues, both of which the back end has.
#[derive(Debug)]
pub(crate) struct FakeDevice {
    pub(crate) back_end: Arc<FakeBackEnd>,
    pub(crate) memory: Arc<MemoryTable>,
    config: Arc<Fields>,
}

impl FakeDevice {
    pub(crate) fn new(back_end: &Arc<FakeBackEnd>, memory: &Arc<MemoryTable>) -> Self {
        Self {
            back_end: Arc::clone(back_end),
            memory: Arc::clone(memory),
            config: Fields::new(vec![0; 8]),
        }
    }
}

impl VirtioDevice for FakeDevice {
    fn name(&self) -> &str {
        "fake"
    }

    fn device_type(&self) -> u16 {
        device_type::ENTROPY
    }

    fn class(&self) -> u32 {
        0xff_00_00
    }

    fn features(&self) -> u64 {
        FEATURE
    }

    fn ring_features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 64]
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.config) as _
    }

    fn start(&mut self, mut activation: Activation) -> Result<Box<dyn Running>, StartError> {
        let handed = Handed {
            name: "fake".to_owned(),
            first: 0,
            queues: (0..2).filter_map(|at| activation.take_setup(at)).collect(),
            features: activation.features(),
            active: u16::MAX,
        };
        let back_end = Arc::clone(&self.back_end);
        let rings = vec![Rings::start(
            back_end,
            handed,
            activation.ram(),
            &self.memory,
        )?];
        let worker = Box::new(Watcher(Watch::new(&rings)));
        run(activation, rings, worker, DeviceState::None)
    }
}

#[derive(Debug)]
struct Watcher(Watch<FakeBackEnd>);

impl Worker for Watcher {
    fn name(&self) -> String {
        "fake".to_owned()
    }

    fn kind(&self) -> &'static str {
        "vhost"
    }

    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        self.0.sources()
    }

    fn wake(&mut self, _source: usize) -> Result<(), QueueError> {
        self.0.wake()
    }

    fn leave(&mut self, _progress: &mut Progress) {}
}
