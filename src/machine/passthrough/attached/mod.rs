//! The host's devices in a VM that runs: what is seen of them, what their errors do to it, and how they [leave](leaving) it.

mod leaving;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use busway_pci::{Complaints, Function};
use busway_vfio::{AssignedSight, DeviceEvents, DeviceIo, ErrorCounts, ErrorStatus};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::attach::{Attacher, Prepared, Users};
use crate::config::{DeviceConfig, OnError};
use crate::machine::RunError;
use crate::machine::aside::Aside;
use crate::machine::events::Events;
use crate::machine::observed::{AssignedDoing, DeviceSeen, DeviceState, Doing};
use crate::machine::removal::{Closing, Removal};
use crate::machine::seats::{Seat, Seats};

/// The kind of the host's devices, for who looks.
pub(super) const ASSIGNED: &str = "assigned";

/// How often a device's errors are told of at most.
const QUIET: Duration = Duration::from_secs(5);

/// The devices.
#[derive(Debug)]
pub(in crate::machine) struct Attached {
    /// Ready when an event of a device's has come.
    ready: Epoll,
    devices: Vec<Entry>,
    /// The closing of devices that leave the VM.
    releases: Aside,
    /// Those that are being closed.
    closing: Closing<Leaver>,
    events: Arc<Events>,
    attacher: Arc<Attacher>,
}

#[derive(Debug)]
struct Entry {
    name: String,
    config: DeviceConfig,
    on_error: OnError,
    /// Where it is; so are all functions of its slot.
    seat: Seat,
    /// By when the guest has to have release it, where somebody wants it back.
    leaves: Option<Term>,
    /// What becomes of the slot's button for that.
    button: Button,
    /// Who asked for that, and whether it is pulled out where the guest does not.
    removal: Option<Removal>,
    counts: ErrorCounts,
    /// Uncorrectable errors so far.
    errors: u64,
    /// The guest is held for one of them.
    holds: bool,
    /// Its number in its slot.
    number: Function,
    sight: AssignedSight,
    complaints: Complaints,
    events: DeviceEvents,
    io: Arc<dyn DeviceIo>,
    users: Arc<Users>,
}

/// A device that has left its slot and is not closed yet.
#[derive(Clone, Debug, PartialEq)]
struct Leaver {
    config: DeviceConfig,
    seat: Seat,
    /// Somebody takes it for gone.
    told: bool,
}

/// The time that a guest has to release a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Term {
    end: Instant,
    limit: Duration,
}

/// The attention button of a device that is to leave.
#[derive(Clone, Copy, Debug, Default)]
struct Button {
    /// It is to be pressed when the slot is steady, or by this time.
    due: Option<Instant>,
    /// How often it was.
    presses: u8,
}

/// Whether a VM goes on after an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) enum Verdict {
    /// The VM goes on.
    GoOn,
    /// The guest is to be held.
    Hold,
}

impl Attached {
    pub(super) fn new(attacher: Arc<Attacher>, events: Arc<Events>) -> io::Result<Self> {
        Ok(Self {
            ready: Epoll::new()?,
            devices: Vec::new(),
            releases: Aside::default(),
            closing: Closing::default(),
            events,
            attacher,
        })
    }

    /// Hears from now on what a device tells that is in `seat`.
    pub(super) fn add(&mut self, one: Prepared, seat: Seat) {
        let (config, io) = (one.config, one.device);
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
            seat,
            leaves: None,
            button: Button::default(),
            removal: None,
            counts: ErrorCounts::read(&config.path),
            errors: 0,
            holds: false,
            number: one.number,
            sight: one.function.sight(),
            config,
            complaints: Complaints::every(QUIET),
            events,
            io,
            users: one.users,
        });
    }

    /// What the devices are called, by their names on the host.
    pub(in crate::machine) fn ids(&self) -> BTreeMap<String, String> {
        let devices = self.devices.iter();
        let named = devices.filter_map(|device| {
            let host = device.config.host_name().ok()?;
            Some((host.to_string(), device.config.id()))
        });
        named.collect()
    }

    /// What is seen of each. `held`: the guest is paused for an error of one.
    pub(super) fn observed(&self, seats: &Seats, held: bool) -> Vec<DeviceSeen> {
        let mut all: Vec<_> = self
            .devices
            .iter()
            .map(|device| device.observed(seats, held))
            .collect();
        all.extend(self.closing.each(|one| DeviceSeen {
            id: one.config.id(),
            kind: ASSIGNED,
            host: host(&one.config),
            guest: None,
            state: DeviceState::Going,
            doing: None,
        }));
        all
    }

    /// The guest goes on after an error.
    pub(in crate::machine) fn go_on(&mut self) {
        for device in &mut self.devices {
            device.holds = false;
        }
    }

    /// What was said of each, without those that somebody takes for gone, though the guest has not released them
    /// yet.
    pub(in crate::machine) fn configs(&self) -> Vec<DeviceConfig> {
        let stay = self.devices.iter().filter(|one| !self.is_told_gone(one));
        stay.map(|device| device.config.clone()).collect()
    }

    /// Whether somebody takes a device for gone, though the guest has not released it yet: it or another of its slot.
    fn is_told_gone(&self, device: &Entry) -> bool {
        let mut slot = self.devices.iter().filter(|one| one.seat == device.seat);
        slot.any(|one| one.removal.as_ref().is_some_and(Removal::is_told))
    }

    /// Whether this device, or one of this name, is taken for gone, though the guest has not released it yet.
    pub(in crate::machine) fn is_leaving(&self, config: &DeviceConfig) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|one| is_same(&one.config, config) && self.is_told_gone(one))
            || self
                .closing
                .any(|one| one.told && is_same(&one.config, config))
    }

    /// The same of a name.
    pub(in crate::machine) fn is_id_leaving(&self, id: &str) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|one| one.config.id() == id && self.is_told_gone(one))
            || self.closing.any(|one| one.told && one.config.id() == id)
    }

    /// Whether a device is called this.
    pub(in crate::machine) fn has_id(&self, id: &str) -> bool {
        self.devices.iter().any(|device| device.config.id() == id)
    }

    /// Whether the guest has the device, or one of the same name.
    pub(super) fn has(&self, config: &DeviceConfig) -> bool {
        let mut devices = self.devices.iter();
        devices.any(|device| is_same(&device.config, config))
    }

    /// Deals with what the devices have told. `held`: the guest does not run, and cannot be asked.
    pub(in crate::machine) fn on_ready(
        &mut self,
        seats: &Arc<Seats>,
        held: bool,
    ) -> Result<Verdict, RunError> {
        let mut verdict = Verdict::GoOn;
        for device in &mut self.devices {
            let errors = device.events.error.as_ref().map_or(0, |event| event.take());
            if errors == 0 {
                continue;
            }
            let resetting = self.attacher.resets.is_resetting(&device.io);
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
            .map(|device| device.seat)
            .collect();
        let limit = self.attacher.removal_limit();
        for seat in wanted {
            self.ask_for(seat, seats, held, "the host wants it back", limit);
        }
        Ok(verdict)
    }
}

/// A device's address on the host, or its UUID.
fn host(config: &DeviceConfig) -> Option<String> {
    config.host_name().ok().map(|name| name.to_string())
}

/// Whether two are of the same device, or of the same name.
fn is_same(one: &DeviceConfig, other: &DeviceConfig) -> bool {
    let host = one.host_name();
    host.is_ok() && other.host_name() == host || other.id() == one.id()
}

impl AsRawFd for Attached {
    fn as_raw_fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
}

impl Entry {
    fn observed(&self, seats: &Seats, held: bool) -> DeviceSeen {
        DeviceSeen {
            id: self.config.id(),
            kind: ASSIGNED,
            host: host(&self.config),
            guest: self.address(seats),
            state: match self {
                _ if held && self.holds => DeviceState::Held,
                _ if self.leaves.is_some() => DeviceState::Going,
                _ if !seats.powered(self.seat) => DeviceState::Off,
                _ => DeviceState::Present,
            },
            doing: Some(Doing {
                function: self.sight.activity.seen(),
                vectors: self.sight.vectors,
                assigned: Some(AssignedDoing {
                    // Known to the slot: `Machine::observed`.
                    reset: None,
                    direct_bytes: self.sight.direct_bytes,
                    errors: self.errors,
                }),
                virtio: None,
            }),
        }
    }

    /// Where it is in the guest.
    fn address(&self, seats: &Seats) -> Option<String> {
        seats.address(self.seat, self.number)
    }

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
        self.errors = self.errors.saturating_add(1);
        let name = &self.name;
        match self.on_error {
            OnError::Stop => Err(RunError::DeviceError {
                device: name.clone(),
                what,
            }),
            OnError::Pause if !held => {
                self.holds = true;
                log::error!(
                    "{name} had an uncorrectable error: {what}; the guest is held (on_error=pause): \
                     `busway ctl resume` lets it go on, a signal such as SIGTERM ends it"
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
