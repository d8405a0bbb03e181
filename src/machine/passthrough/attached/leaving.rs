//! How devices leave a VM that runs: the guest is asked where they sit (`seats`), by its slot's attention button or by
//! ACPI. Its driver releases them and switches the slot's power off, or says by ACPI that it has, and they are closed,
//! by which the host's `unbind` returns. Where nobody attends to the slot, or not in time, or a device is gone already,
//! it is pulled out: the guest's driver finds it absent. Either is done beside the event loop.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use busway_pci::RootSlot;
use busway_vfio::is_silent;
use vmm_sys_util::epoll::{ControlOperation, EpollEvent};

use super::{Attached, Button, Entry, Leaver, Term};
use crate::machine::passthrough::attach::Prepared;
use crate::machine::removal::{Removal, tell_of};
use crate::machine::requests::{Answer, RequestError};
use crate::machine::seats::{Owner, STEADY_LIMIT, Seat, Seats, refusal};

/// How often the button is pressed for one device: a guest that has not heard of the last change yet can take
/// the first for that of the device before.
const PRESSES: u8 = 2;

impl Attached {
    /// Closes devices that found no place, beside the event loop.
    pub(in crate::machine::passthrough) fn refuse(&mut self, functions: Vec<Prepared>) {
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
    pub(in crate::machine) fn on_refused(
        &mut self,
        slot: RootSlot,
        status: u8,
        seats: &Arc<Seats>,
    ) {
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
        self.go_on();
        self.on_ejected(seats);
        let leaving = |device: &&Entry| device.leaves.is_some();
        while let Some(seat) = self.devices.iter().find(leaving).map(|device| device.seat) {
            self.release(seat, seats, "the guest restarts without it");
        }
        self.releases.finish();
    }

    /// Waits until all is closed that leaves.
    #[cfg(test)]
    pub(in crate::machine::passthrough) fn settle(&self) {
        self.releases.finish();
    }

    /// Somebody wants back what is in `seat`, and gives the guest `limit` for it.
    pub(super) fn ask_for(
        &mut self,
        seat: Seat,
        seats: &Arc<Seats>,
        held: bool,
        who: &str,
        limit: Duration,
    ) {
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
