//! How virtio devices leave a guest that runs: asked for and let go of, refused, taken by force, or at a restart.

use std::time::Instant;

use super::seats::Left;
use super::{Entry, Hotplug, VirtioDevices};
use crate::machine::passthrough::RELEASE_LIMIT;
use crate::machine::requests::{Answer, Asker, Files, RequestError};

/// That somebody wants a device removed.
#[derive(Debug)]
pub(super) struct Removal {
    asker: Asker,
    /// Where the guest does not let go, it loses the device.
    force: bool,
    deadline: Option<Instant>,
}

impl VirtioDevices {
    /// Asks the guest to let go of the device called `id`. Whoever asks is answered when it is closed, or
    /// when the guest is found not to let go. `force`: it then loses the device's end on the host. `held`: the
    /// guest does not run, and cannot be asked. Gives back who asks where no virtio device is called so.
    pub(in crate::machine) fn remove(
        &mut self,
        id: &str,
        force: bool,
        held: bool,
        asker: Asker,
    ) -> Option<Asker> {
        let named = |entry: &&mut Entry| !entry.retired && entry.name == id;
        let Some(entry) = self.entries.iter_mut().find(named) else {
            return Some(asker);
        };
        if entry.removal.is_some() {
            asker.answer(Err(RequestError::State("about to let go of it already")));
            return None;
        }
        entry.removal = Some(Removal {
            asker,
            force,
            deadline: Instant::now().checked_add(RELEASE_LIMIT),
        });
        let slot = entry.slot;
        let reaches = |hotplug: &&Hotplug| hotplug.slots >> slot & 1 != 0;
        match self.hotplug.as_ref().filter(reaches) {
            _ if held => self.give_up_on(slot, "the guest does not run"),
            Some(hotplug) => {
                log::info!(
                    "{}: the guest is asked to let go of it, and has {} s",
                    entry.config.described(&entry.name),
                    RELEASE_LIMIT.as_secs()
                );
                hotplug.registers.ask(slot);
            }
            None => self.give_up_on(slot, "the guest cannot be asked for what is in its slot"),
        }
        None
    }

    /// The guest has let go of devices.
    pub(in crate::machine) fn on_ejected(&mut self) {
        for left in self.seats.left() {
            self.release(left, "the guest let go of it");
        }
    }

    /// The guest does not let go of what is in `slot`, by the status of `_OST`.
    pub(in crate::machine) fn on_refused(&mut self, slot: u8, status: u8) {
        // ACPI 6.5 §6.3.5, table 6.53.
        let why = match status {
            0x80 => "it cannot let go of such a device",
            0x81 => "it uses the device",
            0x82 => "the device is busy",
            0x83 => "what depends on the device is busy",
            _ => "it gives no reason",
        };
        let why = format!("the guest refuses to let go of it: {why} (status {status:#x} of _OST)");
        self.give_up_on(slot, &why);
    }

    /// By when something has to have happened.
    pub(in crate::machine) fn deadline(&self) -> Option<Instant> {
        let removals = self
            .entries
            .iter()
            .filter_map(|entry| entry.removal.as_ref());
        removals.filter_map(|removal| removal.deadline).min()
    }

    /// Gives up on what the guest was asked for and has not let go of in time.
    pub(in crate::machine) fn on_time(&mut self, now: Instant) {
        let late = |entry: &&Entry| {
            let deadline = entry.removal.as_ref().and_then(|removal| removal.deadline);
            deadline.is_some_and(|deadline| deadline <= now)
        };
        while let Some(slot) = self.entries.iter().find(late).map(|entry| entry.slot) {
            let unseen = self
                .hotplug
                .as_ref()
                .is_none_or(|hotplug| hotplug.registers.withdraw(slot));
            let limit = RELEASE_LIMIT.as_secs();
            let why = match unseen {
                true => format!("the guest was not there to be asked for it within {limit} s"),
                false => format!(
                    "the guest was told and did not let go of it within {limit} s; it still can"
                ),
            };
            self.give_up_on(slot, &why);
        }
    }

    /// The guest does not let go of what is in `slot`: it keeps the device, or its function alone.
    fn give_up_on(&mut self, slot: u8, why: &str) {
        let in_slot = |entry: &&mut Entry| entry.slot == slot;
        let Some(entry) = self.entries.iter_mut().find(in_slot) else {
            return;
        };
        let Some(Removal { asker, force, .. }) = entry.removal.take() else {
            return;
        };
        if !force {
            let why = format!("{why}, and keeps it: --force takes it all the same");
            asker.answer(Err(RequestError::Failed(why)));
            return;
        }
        entry.retired = true;
        // The host has these back as well.
        entry.files = Files::default();
        let (described, why) = (entry.config.described(&entry.name), why.to_owned());
        let function = entry.function.upgrade();
        let work = {
            let described = described.clone();
            move || {
                if let Some(function) = function {
                    function.retire();
                }
                log::warn!("{described}: {why}, and loses it; the host has it back");
                asker.answer(Ok(Answer::Done));
            }
        };
        self.releases.start("release", &described, work);
    }

    /// The guest starts anew: what was to leave is not there for it. Waits until all that leaves is closed.
    /// No vCPU may run.
    pub(in crate::machine) fn on_restart(&mut self) {
        self.on_ejected();
        for entry in &self.entries {
            if entry.removal.is_some() || entry.retired {
                self.seats.empty(entry.slot);
            }
        }
        for left in self.seats.left() {
            if let Some(hotplug) = &self.hotplug {
                hotplug.registers.gone(left.slot);
            }
            self.release(left, "the guest restarts without it");
        }
        self.releases.finish();
        if let Some(hotplug) = &self.hotplug {
            hotplug.registers.reset();
        }
    }

    /// Closes what was taken out of a slot, without waiting for that.
    fn release(&mut self, left: Left, how: &str) {
        let Left { slot, functions } = left;
        let Some(at) = self.entries.iter().position(|entry| entry.slot == slot) else {
            return;
        };
        let entry = self.entries.remove(at);
        let (described, how) = (entry.config.described(&entry.name), how.to_owned());
        let work = {
            let described = described.clone();
            move || {
                drop(functions);
                log::info!("{described}: {how}");
                if let Some(removal) = entry.removal {
                    removal.asker.answer(Ok(Answer::Done));
                }
            }
        };
        self.releases.start("release", &described, work);
    }
}
