//! How virtio devices leave a guest that runs: asked for and released, refused, taken by force, or at a restart.

use std::time::Instant;

use busway_pci::RootSlot;

use super::{Entry, VirtioDevices, address};
use crate::machine::handed::Files;
use crate::machine::removal::{Removal, tell_of};
use crate::machine::requests::{Answer, RequestError};
use crate::machine::seats::{Owner, Seat, refusal};

/// A request to remove a device, and how far it is.
#[derive(Debug)]
pub(super) struct Leaving {
    removal: Removal,
    deadline: Option<Instant>,
}

impl VirtioDevices {
    /// Asks the guest to release the device called `id`. Whoever asks is answered when it is closed, or
    /// when the guest is found not to release it. By force it then loses the device's end on the host. `held`: the
    /// guest does not run, and cannot be asked. Gives the request back where no virtio device is called so.
    pub(in crate::machine) fn remove(
        &mut self,
        id: &str,
        removal: Removal,
        held: bool,
    ) -> Option<Removal> {
        let named = |entry: &&mut Entry| !entry.retired && entry.name == id;
        let Some(entry) = self.entries.iter_mut().find(named) else {
            return Some(removal);
        };
        if let Some(leaving) = &mut entry.leaving {
            leaving.removal.join(removal);
            return None;
        }
        let limit = removal.limit();
        entry.leaving = Some(Leaving {
            removal,
            deadline: Instant::now().checked_add(limit),
        });
        let slot = entry.slot;
        if held {
            self.give_up_on(slot, "the guest does not run");
        } else if self.seats.ask(Seat::Low(slot)) {
            log::info!(
                "{}: the guest is asked to release it, and has {} s",
                entry.config.described(&entry.name),
                limit.as_secs()
            );
            if let Some(leaving) = &mut entry.leaving {
                leaving.removal.asked();
            }
        } else {
            self.give_up_on(slot, "the guest cannot be asked for what is in its slot");
        }
        None
    }

    /// Whether somebody takes the device called `id` for gone, though the guest has not released it yet.
    pub(in crate::machine) fn is_leaving(&self, id: &str) -> bool {
        let mut entries = self.entries.iter();
        entries.any(|entry| !entry.retired && entry.name == id && Self::is_told_gone(entry))
            || self.closing.any(|name| name == id)
    }

    /// The same of a device.
    pub(super) fn is_told_gone(entry: &Entry) -> bool {
        let leaving = entry.leaving.as_ref();
        leaving.is_some_and(|leaving| leaving.removal.is_told())
    }

    /// The guest has released devices.
    pub(in crate::machine) fn on_ejected(&mut self) {
        for slot in self.seats.released(Owner::Virtio) {
            self.release(slot, "the guest released it");
        }
    }

    /// The guest does not release what is in `slot`, by the status of `_OST`.
    pub(in crate::machine) fn on_refused(&mut self, slot: RootSlot, status: u8) {
        self.give_up_on(slot, &refusal(status));
    }

    /// By when something has to have happened.
    pub(in crate::machine) fn deadline(&self) -> Option<Instant> {
        let leaving = self
            .entries
            .iter()
            .filter_map(|entry| entry.leaving.as_ref());
        leaving.filter_map(|leaving| leaving.deadline).min()
    }

    /// Gives up on what the guest was asked for and has not released in time.
    pub(in crate::machine) fn on_time(&mut self, now: Instant) {
        let late = |entry: &Entry| {
            let leaving = entry.leaving.as_ref()?;
            let is_late = leaving.deadline.is_some_and(|deadline| deadline <= now);
            is_late.then_some((entry.slot, leaving.removal.limit().as_secs()))
        };
        while let Some((slot, limit)) = self.entries.iter().find_map(late) {
            let why = match self.seats.withdraw(Seat::Low(slot)) {
                true => format!("the guest was not there to be asked for it within {limit} s"),
                false => format!(
                    "the guest was told and did not release it within {limit} s; it still can"
                ),
            };
            self.give_up_on(slot, &why);
        }
    }

    /// The guest does not release what is in `slot`: it keeps the device, or its function alone.
    fn give_up_on(&mut self, slot: RootSlot, why: &str) {
        let in_slot = |entry: &&mut Entry| entry.slot == slot;
        let Some(entry) = self.entries.iter_mut().find(in_slot) else {
            return;
        };
        let Some(Leaving { removal, .. }) = entry.leaving.take() else {
            return;
        };
        let (described, why) = (entry.config.described(&entry.name), why.to_owned());
        if !removal.force() {
            let why = format!("{why}, and keeps it: --force takes it all the same");
            removal.end(&described, Err(RequestError::Failed(why)));
            return;
        }
        entry.retired = true;
        // The host has these back as well.
        entry.files = Files::default();
        let (name, address) = (entry.name.clone(), address(slot));
        let function = entry.function.upgrade();
        let work = {
            let described = described.clone();
            move || {
                if let Some(function) = function {
                    function.retire();
                }
                log::warn!("{described}: {why}, and loses it; the host has it back");
                tell_of(&name, Some(&address));
                removal.end(&described, Ok(Answer::Done));
            }
        };
        self.releases.start("release", &described, work);
    }

    /// The guest starts anew: what was to leave is not there for it. Waits until all that leaves is closed.
    /// No vCPU may run. Assigned devices have left before.
    pub(in crate::machine) fn on_restart(&mut self) {
        self.on_ejected();
        let leaves = |entry: &&Entry| entry.leaving.is_some() || entry.retired;
        while let Some(slot) = self.entries.iter().find(leaves).map(|entry| entry.slot) {
            self.release(slot, "the guest restarts without it");
        }
        self.releases.finish();
        self.seats.restart();
    }

    /// Takes a device out of its slot, where the guest has not released it, and closes it, without waiting for
    /// that.
    fn release(&mut self, slot: RootSlot, how: &str) {
        let Some(at) = self.entries.iter().position(|entry| entry.slot == slot) else {
            return;
        };
        let entry = self.entries.remove(at);
        let (described, how) = (entry.config.described(&entry.name), how.to_owned());
        let (closing, events, seats) = (
            self.closing.clone(),
            self.events.clone(),
            self.seats.clone(),
        );
        if Self::is_told_gone(&entry) {
            closing.begin(entry.name.clone());
        }
        let work = {
            let described = described.clone();
            move || {
                drop(seats.take_out(Seat::Low(slot)));
                log::info!("{described}: {how}");
                // One that it lost before has been told of.
                if !entry.retired {
                    tell_of(&entry.name, Some(&address(slot)));
                }
                if let Some(leaving) = entry.leaving {
                    leaving.removal.end(&described, Ok(Answer::Done));
                }
                closing.end(&entry.name);
                // Whoever waits for that is looked at.
                events.attached();
            }
        };
        self.releases.start("release", &described, work);
    }
}
