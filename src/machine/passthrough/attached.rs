//! The host's devices in a VM that runs: what their errors do to it, and how they leave it.
//!
//! A device that the host wants back is asked of the guest where it sits (`seats`): by its slot's attention
//! button, or by ACPI. The guest's driver releases it and switches the slot's power off, or says by ACPI that it
//! has, and the device is closed, by which the host's `unbind` returns. Where nobody attends to the slot, or not in
//! time, or the device is gone already, the device is pulled out: the guest's driver finds it absent. Either is done
//! beside the event loop.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use busway_pci::{Complaints, Function};
use busway_vfio::{AssignedSight, DeviceEvents, DeviceIo, ErrorCounts, ErrorStatus, is_silent};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::attach::{Attacher, Prepared, Users};
use crate::config::{DeviceConfig, OnError};
use crate::machine::RunError;
use crate::machine::aside::Aside;
use crate::machine::events::Events;
use crate::machine::observed::{AssignedDoing, DeviceSeen, DeviceState, Doing};
use crate::machine::removal::{Closing, Removal, tell_of};
use crate::machine::requests::{Answer, RequestError};
use crate::machine::seats::{Owner, STEADY_LIMIT, Seat, Seats, refusal};

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

/// How often the button is pressed for one device: a guest that has not heard of the last change yet can take
/// the first for that of the device before.
const PRESSES: u8 = 2;

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

    /// Closes devices that found no place, beside the event loop.
    pub(super) fn refuse(&mut self, functions: Vec<Prepared>) {
        let names: Vec<_> = functions.iter().map(|one| one.config.name()).collect();
        let attacher = self.attacher.clone();
        self.releases
            .start("release", &names.join(" and "), move || {
                attacher.give_up(functions)
            });
    }

    /// Asks the guest to release the device called `id`, and all others of its slot. Whoever asks is
    /// answered when they are closed, or when the guest is found not to release it. By force they are then
    /// pulled out.
    pub(in crate::machine) fn remove(
        &mut self,
        id: &str,
        removal: Removal,
        seats: &Arc<Seats>,
        held: bool,
    ) {
        let mut devices = self.devices.iter_mut();
        let Some(device) = devices.find(|device| device.config.id() == id) else {
            let unknown = RequestError::Unknown(id.to_owned());
            removal.end(id, Err(unknown));
            return;
        };
        if let Some(first) = &mut device.removal {
            first.join(removal);
            return;
        }
        let limit = removal.limit();
        device.removal = Some(removal);
        let seat = device.seat;
        self.ask_for(seat, seats, held, "it is to be removed", limit);
        let removals = self.devices.iter_mut().filter(|device| device.seat == seat);
        removals
            .filter_map(|device| device.removal.as_mut())
            .for_each(Removal::asked);
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

    /// The guest switched the power of a slot: where it was asked to release what is there, it has.
    pub(in crate::machine) fn on_slot_power(&mut self, seats: &Arc<Seats>, slot: u16) {
        let released = self.devices.iter().find_map(|device| {
            let off = seats.is_of_port(device.seat, slot) && !seats.powered(device.seat);
            (device.leaves.is_some() && off).then_some(device.seat)
        });
        if let Some(seat) = released {
            self.release(seat, seats, "the guest released it");
        }
    }

    /// The guest is done with what it was at with a slot. Where it was asked to release what is there, and
    /// gives it power again instead, it is asked once more, and then no more.
    pub(in crate::machine) fn on_slot_steady(&mut self, seats: &Arc<Seats>, slot: u16) {
        let kept = self.devices.iter_mut().find(|device| {
            let on = seats.is_of_port(device.seat, slot) && seats.powered(device.seat);
            let asked = device.button.due.is_none() && device.button.presses > 0;
            device.leaves.is_some() && asked && on
        });
        let Some(device) = kept else {
            return;
        };
        if device.button.presses < PRESSES {
            device.button.due = Some(Instant::now());
            return;
        }
        let seat = device.seat;
        self.give_up_on(seat, seats, "the guest refuses to release it");
    }

    /// The guest has released devices by ACPI, asked or not.
    pub(in crate::machine) fn on_ejected(&mut self, seats: &Arc<Seats>) {
        for seat in seats.released(Owner::Assigned).into_iter().map(Seat::Low) {
            // Of one that is being pulled out, it is known already.
            if self.devices.iter().any(|device| device.seat == seat) {
                self.release(seat, seats, "the guest released it");
            }
        }
    }

    /// The guest does not release what is in a slot of bus 0, by the status of `_OST`.
    pub(in crate::machine) fn on_refused(&mut self, slot: u8, status: u8, seats: &Arc<Seats>) {
        let seat = Seat::Low(slot);
        let mut devices = self.devices.iter();
        if devices.any(|device| device.seat == seat && device.leaves.is_some()) {
            self.give_up_on(seat, seats, &refusal(status));
        }
    }

    /// By when something has to have happened.
    pub(in crate::machine) fn deadline(&self) -> Option<Instant> {
        let devices = self.devices.iter();
        devices
            .flat_map(|device| [device.leaves.map(|term| term.end), device.button.due])
            .flatten()
            .min()
    }

    /// Presses the buttons that are due, and pulls out what the guest was asked for and has not released in time.
    pub(in crate::machine) fn on_time(&mut self, seats: &Arc<Seats>, now: Instant) {
        let due = |device: &&mut Entry| {
            let due = device.button.due;
            due.is_some_and(|due| due <= now || seats.is_steady(device.seat))
        };
        while let Some(device) = self.devices.iter_mut().find(due) {
            device.button.due = None;
            device.button.presses = device.button.presses.saturating_add(1);
            let seat = device.seat;
            if !seats.ask(seat) {
                let why = "the guest has no driver that could be asked to release it";
                self.give_up_on(seat, seats, why);
            }
        }
        let late = |device: &Entry| {
            let term = device.leaves.filter(|term| term.end <= now)?;
            Some((device.seat, term.limit.as_secs()))
        };
        while let Some((seat, limit)) = self.devices.iter().find_map(late) {
            let why = match seats.withdraw(seat) {
                true => format!("the guest was not there to be asked for it within {limit} s"),
                false => format!("the guest did not release it within {limit} s"),
            };
            self.give_up_on(seat, seats, &why);
        }
    }

    /// The guest does not release what is in `seat`: it is pulled out, unless whoever asked for it
    /// wants it no more then.
    fn give_up_on(&mut self, seat: Seat, seats: &Arc<Seats>, why: &str) {
        let here = |device: &&mut Entry| device.seat == seat;
        let mut removals = Vec::new();
        let mut pulled = true;
        for device in self.devices.iter_mut().filter(here) {
            if let Some(removal) = device.removal.take_if(|removal| !removal.force()) {
                removals.push((device.name.clone(), removal));
                pulled = false;
            }
        }
        if pulled {
            self.release(seat, seats, &format!("{why} and loses it"));
            return;
        }
        for device in self.devices.iter_mut().filter(here) {
            device.leaves = None;
            device.button = Button::default();
        }
        for (name, removal) in removals {
            let why = format!("{why}, and keeps it: --force pulls it out");
            removal.end(&name, Err(RequestError::Failed(why)));
        }
    }

    /// Pulls out what the guest was asked for: it starts anew, and shall not find it. Waits until all
    /// that leaves is closed, for it may reach memory until then. No vCPU may run.
    pub(in crate::machine) fn on_restart(&mut self, seats: &Arc<Seats>) {
        self.on_ejected(seats);
        let leaving = |device: &&Entry| device.leaves.is_some();
        while let Some(seat) = self.devices.iter().find(leaving).map(|device| device.seat) {
            self.release(seat, seats, "the guest restarts without it");
        }
        self.releases.finish();
    }

    /// Waits until all is closed that leaves.
    #[cfg(test)]
    pub(super) fn settle(&self) {
        self.releases.finish();
    }

    /// Somebody wants back what is in `seat`, and gives the guest `limit` for it.
    fn ask_for(&mut self, seat: Seat, seats: &Arc<Seats>, held: bool, who: &str, limit: Duration) {
        let now = Instant::now();
        let term = now.checked_add(limit).map(|end| Term { end, limit });
        let Some(device) = self.devices.iter().find(|device| device.seat == seat) else {
            return; // It went with another function of its slot.
        };
        let name = &device.name;
        if device.leaves.is_some() {
            log::debug!("{name}: it is waited for already");
            // Whoever waits shorter is answered first.
            for device in self.devices.iter_mut().filter(|device| device.seat == seat) {
                device.leaves = device.leaves.min(term.or(device.leaves));
            }
            return;
        }
        if !self.attacher.resets.is_resetting(&device.io) && is_silent(&*device.io) {
            self.release(
                seat,
                seats,
                "it is gone from the host, and the guest loses it",
            );
            return;
        }
        if !seats.powered(seat) {
            self.release(seat, seats, "the guest had released it");
            return;
        }
        if held {
            self.give_up_on(seat, seats, "the guest does not run");
            return;
        }
        if !seats.attended(seat) {
            let why = "the guest has no driver that could be asked to release it";
            self.give_up_on(seat, seats, why);
            return;
        }
        log::warn!(
            "{name}: {who}; the guest is asked to release it, and has {} s",
            limit.as_secs()
        );
        // One button for all of the slot. It is pressed as soon as the loop has dealt with what waits.
        let mut button = Button {
            due: now.checked_add(STEADY_LIMIT),
            presses: 0,
        };
        for device in self.devices.iter_mut().filter(|device| device.seat == seat) {
            device.leaves = term;
            device.button = std::mem::take(&mut button);
        }
    }

    /// Takes all functions of a slot from the guest, and closes their devices, without waiting for that.
    fn release(&mut self, seat: Seat, seats: &Arc<Seats>, how: &str) {
        let here = || self.devices.iter().filter(|device| device.seat == seat);
        let mut asked = here().filter_map(|device| device.removal.as_ref());
        let told = asked.any(|removal| !removal.waits());
        let leavers = here().map(|device| Leaver {
            config: device.config.clone(),
            seat,
            told,
        });
        let leavers: Vec<_> = leavers.collect();
        for leaver in &leavers {
            self.closing.begin(leaver.clone());
        }
        let leaves = |device: &mut Entry| device.seat == seat;
        let mut leaving: Vec<_> = self.devices.extract_if(.., leaves).collect();
        for device in &mut leaving {
            self.unwatch(device);
            if let Some(removal) = &mut device.removal {
                removal.asked();
            }
        }
        let names: Vec<_> = leaving.iter().map(|device| &*device.name).collect();
        let (names, seats, how) = (names.join(" and "), seats.clone(), how.to_owned());
        let attacher = self.attacher.clone();
        let ids: Vec<_> = leaving.iter().map(|device| device.config.id()).collect();
        let gone: Vec<_> = ids
            .iter()
            .zip(&leaving)
            .map(|(id, device)| (id.clone(), device.address(&seats)))
            .collect();
        let answer = match ids.len() {
            0 | 1 => Answer::Done,
            _ => Answer::RemovedTogether(ids),
        };
        let (closing, events) = (self.closing.clone(), self.events.clone());
        self.releases.start("release", &names, move || {
            // Dropped first: a function resets its device as it goes.
            drop(seats.take_out(seat));
            let removals = leaving
                .iter_mut()
                .filter_map(|device| Some((device.name.clone(), device.removal.take()?)));
            let removals: Vec<_> = removals.collect();
            let first = leaving.first().map(|device| {
                let folder = device.config.path.clone();
                (device.users.clone(), folder)
            });
            let names: Vec<_> = leaving.iter().map(|device| device.name.clone()).collect();
            if let Some((users, folder)) = first {
                attacher.close(&users, &folder, leaving);
            }
            for name in names {
                log::warn!("{name}: {how}; the host has it back");
            }
            for leaver in &leavers {
                closing.end(leaver);
            }
            // Not before all of them are closed.
            for (id, address) in &gone {
                tell_of(id, address.as_deref());
            }
            for (name, removal) in removals {
                removal.end(&name, Ok(answer.clone()));
            }
            // Whoever waits for that is looked at.
            events.attached();
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
