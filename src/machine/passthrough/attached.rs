//! The host's devices in a VM that runs: what their errors do to it, and how they leave it.
//!
//! A device that the host wants back is asked of the guest by its slot's attention button. The guest's
//! driver lets go and switches the slot's power off, and the device is closed, by which the host's
//! `unbind` returns. Where nobody attends to the slot, or not in time, or the device is gone already,
//! the device is pulled out: the guest's driver finds it absent. Either is done beside the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use busway_pci::{Complaints, FunctionId, Topology};
use busway_vfio::{DeviceEvents, DeviceIo, ErrorCounts, ErrorStatus, Resets, is_silent};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::releases::Releases;
use crate::config::{DeviceConfig, OnError};
use crate::machine::RunError;

/// How long a guest may take to let go of a device that the host wants back. Linux waits five seconds
/// of these after the button was pressed, for it could be pressed again to take that back.
pub(in crate::machine) const RELEASE_LIMIT: Duration = Duration::from_secs(30);

/// How often a device's errors are told of at most.
const QUIET: Duration = Duration::from_secs(5);

/// The devices.
#[derive(Debug)]
pub(in crate::machine) struct Attached {
    /// Ready when an event of a device's has come.
    ready: Epoll,
    devices: Vec<Entry>,
    /// Those that leave the VM.
    releases: Releases,
    /// Says which device is not to be asked now, for that would wait for its reset.
    resets: Arc<Resets>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    on_error: OnError,
    /// The root port in whose slot it is.
    port: FunctionId,
    /// By when the guest has to have let go.
    leaves: Option<Instant>,
    counts: ErrorCounts,
    complaints: Complaints,
    events: DeviceEvents,
    io: Arc<dyn DeviceIo>,
}

/// Whether a VM goes on after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) enum Verdict {
    /// It does.
    GoOn,
    /// The guest is to be held.
    Hold,
}

impl Attached {
    pub(in crate::machine) fn new(resets: Arc<Resets>) -> io::Result<Self> {
        Ok(Self {
            ready: Epoll::new()?,
            devices: Vec::new(),
            releases: Releases::default(),
            resets,
        })
    }

    /// Hears from now on what the device of `config`, which is in the slot behind `port`, tells.
    pub(in crate::machine) fn add(
        &mut self,
        config: &DeviceConfig,
        port: FunctionId,
        io: Arc<dyn DeviceIo>,
    ) {
        let name = config.name();
        let events = DeviceEvents::listen(&name, &*io);
        for event in [&events.error, &events.request].into_iter().flatten() {
            let watched = self.ready.ctl(
                ControlOperation::Add,
                event.as_raw_fd(),
                EpollEvent::new(EventSet::IN, 0),
            );
            if let Err(error) = watched {
                log::warn!("{name}: its events are not heard: epoll_ctl: {error}");
            }
        }
        self.devices.push(Entry {
            name,
            on_error: config.on_error,
            port,
            leaves: None,
            counts: ErrorCounts::read(&config.path),
            complaints: Complaints::every(QUIET),
            events,
            io,
        });
    }

    /// Deals with what the devices have told. `held`: the guest does not run, and cannot be asked.
    pub(in crate::machine) fn on_ready(
        &mut self,
        topology: &Arc<Topology>,
        held: bool,
    ) -> Result<Verdict, RunError> {
        let mut verdict = Verdict::GoOn;
        for device in &mut self.devices {
            let errors = device.events.error.as_ref().map_or(0, |event| event.take());
            if errors == 0 {
                continue;
            }
            let resetting = self.resets.is_resetting(&device.io);
            if device.fail(held, resetting)? == Verdict::Hold {
                verdict = Verdict::Hold;
            }
        }
        let held = held || verdict == Verdict::Hold;
        let wanted: Vec<_> = self
            .devices
            .iter()
            .filter(|device| {
                let request = device.events.request.as_ref();
                request.is_some_and(|event| event.take() > 0)
            })
            .map(|device| device.port)
            .collect();
        for port in wanted {
            self.ask_for(port, topology, held);
        }
        Ok(verdict)
    }

    /// The guest switched the power of a slot: where it was asked to let go, it has.
    pub(in crate::machine) fn on_slot_power(&mut self, topology: &Arc<Topology>, slot: u16) {
        let let_go = self.devices.iter().find_map(|device| {
            let off = topology.with_slot(device.port, |its| its.slot() == slot && !its.powered());
            (device.leaves.is_some() && off == Some(true)).then_some(device.port)
        });
        if let Some(port) = let_go {
            self.release(port, topology, "the guest let go of it");
        }
    }

    /// By when something has to have happened.
    pub(in crate::machine) fn deadline(&self) -> Option<Instant> {
        self.devices.iter().filter_map(|device| device.leaves).min()
    }

    /// Pulls out what the guest was asked for and has not let go of in time.
    pub(in crate::machine) fn on_time(&mut self, topology: &Arc<Topology>, now: Instant) {
        let late = |device: &&Entry| device.leaves.is_some_and(|deadline| deadline <= now);
        while let Some(port) = self.devices.iter().find(late).map(|device| device.port) {
            let limit = RELEASE_LIMIT.as_secs();
            let why = format!("the guest did not let go of it within {limit} s and loses it");
            self.release(port, topology, &why);
        }
    }

    /// Pulls out what the guest was asked for: it starts anew, and shall not find it. Waits until all
    /// that leaves is closed, for it may reach memory until then. No vCPU may run.
    pub(in crate::machine) fn on_restart(&mut self, topology: &Arc<Topology>) {
        let leaving = |device: &&Entry| device.leaves.is_some();
        while let Some(port) = self.devices.iter().find(leaving).map(|device| device.port) {
            self.release(port, topology, "the guest restarts without it");
        }
        self.releases.finish();
    }

    /// The host wants back what is behind `port`.
    fn ask_for(&mut self, port: FunctionId, topology: &Arc<Topology>, held: bool) {
        let Some(device) = self.devices.iter().find(|device| device.port == port) else {
            return; // It went with another function of its slot.
        };
        let name = &device.name;
        if device.leaves.is_some() {
            log::debug!("{name}: the host still waits for it");
            return;
        }
        if !self.resets.is_resetting(&device.io) && is_silent(&*device.io) {
            self.release(
                port,
                topology,
                "it is gone from the host, and the guest loses it",
            );
            return;
        }
        if topology.with_slot(port, |slot| slot.powered()) == Some(false) {
            self.release(port, topology, "the guest had let go of it");
            return;
        }
        if held {
            self.release(port, topology, "the guest, which is held, loses it");
            return;
        }
        if topology.with_slot(port, |slot| slot.press_button()) != Some(true) {
            let why = "the guest has no driver that could be asked to let go of it, and loses it";
            self.release(port, topology, why);
            return;
        }
        log::warn!(
            "{name}: the host wants it back; the guest is asked to let go of it, and has {} s",
            RELEASE_LIMIT.as_secs()
        );
        let deadline = Instant::now().checked_add(RELEASE_LIMIT);
        for device in self.devices.iter_mut().filter(|device| device.port == port) {
            device.leaves = deadline;
        }
    }

    /// Takes all functions of a slot from the guest, and closes their devices, without waiting for that.
    fn release(&mut self, port: FunctionId, topology: &Arc<Topology>, how: &str) {
        let leaves = |device: &mut Entry| device.port == port;
        let leaving: Vec<_> = self.devices.extract_if(.., leaves).collect();
        for device in &leaving {
            self.unwatch(device);
        }
        let names: Vec<_> = leaving.iter().map(|device| &*device.name).collect();
        let (names, topology, how) = (names.join(" and "), topology.clone(), how.to_owned());
        self.releases.start(&names, move || {
            // Dropped first: a function resets its device as it goes.
            drop(topology.unplug(port));
            for device in leaving {
                let name = device.name.clone();
                drop(device);
                log::warn!("{name}: {how}; the host has it back");
            }
        });
    }

    /// Hears no more of a device's events.
    fn unwatch(&self, device: &Entry) {
        let events = [&device.events.error, &device.events.request];
        for event in events.into_iter().flatten() {
            let unwatched = self.ready.ctl(
                ControlOperation::Delete,
                event.as_raw_fd(),
                EpollEvent::default(),
            );
            if let Err(error) = unwatched {
                log::debug!("{}: epoll_ctl: {error}", device.name);
            }
        }
    }
}

impl AsRawFd for Attached {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

impl Entry {
    /// The device had an error.
    fn fail(&mut self, held: bool, resetting: bool) -> Result<Verdict, RunError> {
        let mut what = match resetting {
            true => "its registers cannot be read, because it is being reset".to_owned(),
            false => ErrorStatus::read(&*self.io).to_string(),
        };
        let counted = self.counts.refresh();
        if !counted.is_empty() {
            what = format!("{what}; the host counted {}", counted.join(", "));
        }
        let name = &self.name;
        match self.on_error {
            OnError::Stop => Err(RunError::DeviceError {
                device: name.clone(),
                what,
            }),
            OnError::Pause if !held => {
                log::error!(
                    "{name} had an uncorrectable error: {what}; the guest is held (on_error=pause): \
                     a signal such as SIGTERM ends it"
                );
                Ok(Verdict::Hold)
            }
            OnError::Pause | OnError::Ignore => {
                if let Some(more) = self.complaints.make(Instant::now()) {
                    let more = match more {
                        0 => String::new(),
                        more => format!("; {more} more were not told of"),
                    };
                    let then = match self.on_error {
                        // The host resets the link for a fatal one, and the device forgets what it was told.
                        OnError::Ignore => {
                            "; the guest goes on with it (on_error=ignore): if its driver does not bring \
                             it back, a restart of the guest resets it"
                        }
                        _ => "",
                    };
                    log::error!("{name} had an uncorrectable error: {what}{more}{then}");
                }
                Ok(Verdict::GoOn)
            }
        }
    }
}
