//! Resetting the devices of one VM, those together that a hot reset touches together.
//!
//! A hot reset may not hit a function that the guest is using. So each function says when it has been
//! made quiet and wants its reset, and when the guest uses it again; a hot reset is carried out when
//! the last function that it touches has become quiet, once for all of them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::Bdf;

use crate::aer::is_silent;
use crate::patience::patiently;
use crate::reset::{Decision, decide};
use crate::{DeviceIo, FunctionReset, ResetMethod};

/// The devices of a VM, as far as resets go.
#[derive(Debug, Default)]
pub struct Resets {
    /// Held while a device is reset, so that no two resets meet in the kernel, which would refuse one.
    members: Mutex<Vec<Member>>,
}

#[derive(Debug)]
struct Member {
    io: Arc<dyn DeviceIo>,
    name: String,
    address: Option<Bdf>,
    method: ResetMethod,
    /// Nothing of it happens: no interrupt, no DMA, no access by the guest.
    quiet: bool,
    /// It is to be reset as soon as all that are touched are quiet.
    owed: bool,
    /// That its reset is not what it should be has been said.
    said: bool,
    /// That the kernel refused it has been said: a guest can ask for it without end.
    refusal_said: bool,
}

impl Resets {
    /// Adds a device, called `name` in messages (its address on the host), that no guest uses yet.
    /// [`begin`](Self::begin) comes next.
    pub fn add(&self, name: &str, io: Arc<dyn DeviceIo>) {
        let member = Member {
            address: name.parse().ok(),
            name: name.to_owned(),
            // Nothing has to be done where the kernel has just done it.
            owed: !(io.is_reset_by_opening()
                && io.function_reset().is_some_and(FunctionReset::is_thorough)),
            io,
            method: ResetMethod::None,
            quiet: true,
            said: false,
            refusal_said: false,
        };
        self.lock().push(member);
    }

    /// Resets what was added and is not in its state at power-on. Devices that may be reset together
    /// have to be added before, so that it happens once.
    pub fn begin(&self) {
        let mut members = self.lock();
        for at in 0..members.len() {
            if let Some(member) = members.get_mut(at).filter(|member| member.quiet) {
                let decision = member.decide();
                member.tell(decision);
            }
        }
        settle(&mut members);
    }

    /// The part of it that the function of the device `io` has, which is added where it is not there.
    pub(crate) fn join(self: &Arc<Self>, name: &str, io: &Arc<dyn DeviceIo>) -> ResetHandle {
        let known = self.lock().iter().any(|member| Arc::ptr_eq(&member.io, io));
        if !known {
            self.add(name, io.clone());
            self.begin();
            // A device that comes at run time may find the bus in use.
            do_next_best(&mut self.lock(), io);
        }
        ResetHandle {
            resets: self.clone(),
            io: io.clone(),
            used: AtomicBool::new(false),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn decide(&self) -> Decision {
        decide(self.address, self.io.function_reset(), || {
            self.io.hot_reset_reach()
        })
    }

    /// Remembers what was decided, and says once that it is less than it should be.
    fn tell(&mut self, decision: Decision) {
        self.method = decision.method;
        if let Some(obstacle) = decision.obstacle
            && !std::mem::replace(&mut self.said, true)
        {
            let Self { name, method, .. } = self;
            let instead = match method {
                ResetMethod::None => "it is not reset".to_owned(),
                method => format!("it is reset by {method} instead"),
            };
            log::warn!(
                "{name} cannot be reset in full, so that one guest may find what another left in it: \
                 it has no function level reset, and {obstacle}; {instead}"
            );
        }
    }

    /// Resets the function by itself, where that goes. The kernel would wait a minute for one that does
    /// not answer to come out of such a reset.
    fn reset_alone(&mut self) {
        self.owed = false;
        if self.io.function_reset().is_none() {
            return;
        }
        if is_silent(&*self.io) {
            log::debug!("{} does not answer, and is not reset by itself", self.name);
            return;
        }
        let refused = patiently(|| self.io.reset()).err();
        let said = std::mem::replace(&mut self.refusal_said, refused.is_some());
        if let Some(error) = refused {
            let level = match said {
                false => log::Level::Warn,
                true => log::Level::Debug,
            };
            let why = match error.raw_os_error() {
                Some(libc::EAGAIN) => " (the host holds the device, as while it is being unbound)",
                _ => "",
            };
            log::log!(
                level,
                "{}: VFIO_DEVICE_RESET: {error}{why}; it goes on as it is",
                self.name
            );
        }
    }
}

/// Carries out what is owed and can be.
fn settle(members: &mut [Member]) {
    for at in 0..members.len() {
        let Some(member) = members.get_mut(at).filter(|member| member.owed) else {
            continue;
        };
        let decision = member.decide();
        let (address, io, name) = (member.address, member.io.clone(), member.name.clone());
        let others = match &decision.method {
            ResetMethod::Hot { others } => others.clone(),
            _ => {
                member.tell(decision);
                member.reset_alone();
                continue;
            }
        };
        member.tell(decision);
        // A device whose address is not known may be one of them.
        let touched = |other: &Member| {
            Arc::ptr_eq(&other.io, &io)
                || other
                    .address
                    .is_none_or(|other| address.is_none() || others.contains(&other))
        };
        if !members.iter().all(|other| other.quiet || !touched(other)) {
            continue;
        }
        match patiently(|| io.hot_reset()) {
            Ok(()) => {
                log::debug!("{name}: hot reset, which touched {} others", others.len());
                let together = members.iter_mut().filter(|other| touched(other));
                together.for_each(|other| other.owed = false);
            }
            // Once for all of them: a bus that does not come up again costs a minute each time.
            Err(error) => {
                let waiting = |other: &&mut Member| other.owed && touched(other);
                for member in members.iter_mut().filter(waiting) {
                    if !std::mem::replace(&mut member.said, true) {
                        let name = &member.name;
                        log::warn!(
                            "{name}: VFIO_DEVICE_PCI_HOT_RESET: {error}; the next best is done"
                        );
                    }
                    member.method = match member.io.function_reset() {
                        Some(how) => ResetMethod::Function(how),
                        None => ResetMethod::None,
                    };
                    member.reset_alone();
                }
            }
        }
    }
}

/// Resets a device by itself, as far as that goes, that waits for others to be reset with it; it goes on
/// waiting for them.
fn do_next_best(members: &mut [Member], io: &Arc<dyn DeviceIo>) {
    let mut waiting = members.iter_mut().filter(|member| member.owed);
    if let Some(member) = waiting.find(|member| Arc::ptr_eq(&member.io, io)) {
        member.reset_alone();
        member.owed = true;
    }
}

/// A device's part in the resets of its VM.
#[derive(Debug)]
pub(crate) struct ResetHandle {
    resets: Arc<Resets>,
    io: Arc<dyn DeviceIo>,
    /// The guest may have changed it since it was last reset.
    used: AtomicBool,
}

impl ResetHandle {
    /// How the device is reset.
    pub(crate) fn method(&self) -> ResetMethod {
        let members = self.resets.lock();
        let found = members.iter().find(|member| self.is(member));
        found.map_or(ResetMethod::None, |member| member.method.clone())
    }

    /// The guest is about to change something: the device is not to be touched from now on.
    pub(crate) fn touch(&self) {
        if !self.used.swap(true, Ordering::Relaxed)
            && let Some(member) = self.resets.lock().iter_mut().find(|other| self.is(other))
        {
            member.quiet = false;
            member.owed = false;
        }
    }

    /// Whether the device may have been changed since it was last reset.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether there are others whose reset is this one's too.
    pub(crate) fn is_shared(&self) -> bool {
        let members = self.resets.lock();
        let own = members.iter().find(|member| self.is(member));
        let address = own.and_then(|member| member.address);
        members.iter().any(|member| match &member.method {
            ResetMethod::Hot { others } if self.is(member) => !others.is_empty(),
            ResetMethod::Hot { others } => address.is_none_or(|own| others.contains(&own)),
            ResetMethod::Function(_) | ResetMethod::None => false,
        })
    }

    /// Resets the function by itself and at once, as the guest asks for by its registers.
    pub(crate) fn reset_function(&self) {
        let mut members = self.resets.lock();
        if let Some(member) = members.iter_mut().find(|other| self.is(other)) {
            member.reset_alone();
        }
    }

    /// The device is quiet (no interrupt, no bus mastering) and wants its state at power-on. It has it
    /// when this returns, or when the last of those has come that are reset with it.
    ///
    /// One that does not answer is quiet as well, and may come back by the reset of its bus.
    pub(crate) fn reset(&self) {
        self.quiet(true, true);
    }

    /// The device is quiet, and about to be closed: the kernel resets what can be reset by itself. One
    /// that does not answer by now wants nothing more, but those that share its bus may.
    pub(crate) fn retire(&self) {
        self.quiet(!self.io.is_reset_by_opening(), !is_silent(&*self.io));
    }

    fn quiet(&self, alone: bool, owed: bool) {
        self.used.store(false, Ordering::Relaxed);
        let mut members = self.resets.lock();
        if let Some(member) = members.iter_mut().find(|other| self.is(other)) {
            member.quiet = true;
            member.owed = owed;
            match member.io.function_reset() {
                Some(how) if how.is_thorough() && !alone => member.owed = false,
                Some(how) if how.is_thorough() => member.reset_alone(),
                _ => {}
            }
        }
        settle(&mut members);
        // Those that are reset with it may never come: a guest can reset the bus of one alone.
        do_next_best(&mut members, &self.io);
    }

    fn is(&self, member: &Member) -> bool {
        Arc::ptr_eq(&member.io, &self.io)
    }
}

impl Drop for ResetHandle {
    fn drop(&mut self) {
        self.resets.lock().retain(|member| !self.is(member));
    }
}

#[cfg(test)]
#[path = "resets_test.rs"]
mod tests;
