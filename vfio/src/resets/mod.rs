//! Resetting the devices of one VM, those together that a hot reset touches together.
//!
//! A hot reset may not hit a function that the guest is using. So each function says when it has been
//! made quiet and wants its reset, and when the guest uses it again; a hot reset is carried out when
//! the last function that it touches has become quiet, once for all of them.
//!
//! A reset can take the kernel a minute, and no lock is held meanwhile. Those under way are noted with
//! the functions that they touch, whose own accesses wait for them, and on one bus of the host there is
//! one at a time: the kernel refuses a reset whose device another one holds, and newer ones hold the
//! bridge above as well.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use busway_pci::{Bdf, Bus, Complaints, Segment};

use crate::aer::is_silent;
use crate::held_up::{self, Step};
use crate::patience::patiently;
use crate::reset::{Decision, decide};
use crate::{DeviceIo, FunctionReset, ResetMethod};

/// The devices of a VM, as far as resets go.
#[derive(Debug, Default)]
pub struct Resets {
    members: Mutex<Vec<Member>>,
    /// A reset is over.
    over: Condvar,
}

#[derive(Debug)]
struct Member {
    io: Arc<dyn DeviceIo>,
    name: String,
    address: Option<Bdf>,
    /// It is on no bus of the host's, so that nobody else's reset touches it.
    mediated: bool,
    method: ResetMethod,
    /// Nothing of it happens: no interrupt, no DMA, no access by the guest.
    quiet: bool,
    /// It is to be reset as soon as all that are touched are quiet.
    pending: bool,
    /// A reset that touches it is under way.
    in_reset: bool,
    /// That its reset is not what it should be.
    lesser: Complaints,
    /// That the kernel refused it: a guest can ask for it without end.
    refusals: Complaints,
}

impl Resets {
    /// Adds a device, called `name` in messages (its address on the host), that no guest uses yet.
    /// [`begin`](Self::begin) comes next.
    pub fn add(&self, name: &str, io: Arc<dyn DeviceIo>) {
        let member = Member {
            address: name.parse().ok(),
            mediated: io.is_mediated(),
            name: name.to_owned(),
            // Nothing has to be done where the kernel has just done it.
            pending: !(io.is_reset_by_opening()
                && io.function_reset().is_some_and(FunctionReset::is_thorough)),
            io,
            method: ResetMethod::None,
            quiet: true,
            in_reset: false,
            lesser: Complaints::first(1),
            refusals: Complaints::first(1),
        };
        self.lock().push(member);
    }

    /// Forgets a device that was added, and of which no function was made: it is to be closed.
    pub fn forget(&self, io: &Arc<dyn DeviceIo>) {
        self.lock().retain(|member| !member.is(io));
    }

    /// Resets what was added and is not in its state at power-on. Devices that may be reset together
    /// have to be added before, so that it happens once.
    pub fn begin(&self) {
        for io in self.those(|member| member.quiet) {
            self.decide(&io);
        }
        self.carry_out_pending();
    }

    /// Whether a reset touches a device now. Who reads its configuration space meanwhile waits in the
    /// kernel until the reset is over, a minute at the most. Linux, drivers/pci/access.c, `pci_wait_cfg`.
    #[must_use]
    pub fn is_resetting(&self, io: &Arc<dyn DeviceIo>) -> bool {
        self.with(io, |member| member.in_reset) == Some(true)
    }

    /// The part of it that the function of the device `io` has, which is added where it is not there.
    pub(crate) fn join(self: &Arc<Self>, name: &str, io: &Arc<dyn DeviceIo>) -> ResetHandle {
        if self.with(io, |_| ()).is_none() {
            self.add(name, io.clone());
            self.begin();
            // A device that comes at run time may find the bus in use.
            self.do_next_best(io);
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

    /// Waits until a reset is over.
    fn wait<'a>(&self, members: MutexGuard<'a, Vec<Member>>) -> MutexGuard<'a, Vec<Member>> {
        let members = self.over.wait(members);
        members.unwrap_or_else(PoisonError::into_inner)
    }

    /// The devices of some members.
    fn those(&self, which: impl Fn(&Member) -> bool) -> Vec<Arc<dyn DeviceIo>> {
        let members = self.lock();
        let found = members.iter().filter(|member| which(member));
        found.map(|member| member.io.clone()).collect()
    }

    /// What `with` makes of a device's member.
    fn with<T>(&self, io: &Arc<dyn DeviceIo>, with: impl FnOnce(&mut Member) -> T) -> Option<T> {
        let mut members = self.lock();
        members.iter_mut().find(|member| member.is(io)).map(with)
    }

    /// Decides how a device is reset, and remembers it.
    fn decide(&self, io: &Arc<dyn DeviceIo>) -> Option<ResetMethod> {
        let address = self.with(io, |member| member.address)?;
        let decision = decide(address, io.function_reset(), || io.hot_reset_reach());
        self.with(io, |member| {
            member.tell(decision);
            member.method.clone()
        })
    }

    /// Carries out what is pending and can be.
    fn carry_out_pending(&self) {
        for io in self.those(|member| member.pending) {
            // It may have been done with another one's, or have gone.
            if self.with(&io, |member| member.pending) != Some(true) {
                continue;
            }
            match self.decide(&io) {
                Some(ResetMethod::Hot { others }) => self.reset_together(&io, &others),
                Some(_) => self.reset_alone(&io, |member| member.pending),
                None => {}
            }
        }
    }

    /// Resets the slot or bus of a device whose reset is pending, where all that it touches are quiet.
    fn reset_together(&self, io: &Arc<dyn DeviceIo>, others: &[Bdf]) {
        let Some((touched, turn)) = self.take_turn_together(io, others) else {
            return;
        };
        let result = patiently(|| io.hot_reset());
        let mut left = Vec::new();
        let mut members = self.lock();
        let waiting = members.iter_mut().filter(|member| member.is_in(&touched));
        for member in waiting.filter(|member| member.pending) {
            // Once for all of them: a bus that does not come up again costs a minute each time.
            let Err(error) = &result else {
                member.pending = false;
                continue;
            };
            if member.lesser.make(Instant::now()).is_some() {
                let name = &member.name;
                log::warn!("{name}: VFIO_DEVICE_PCI_HOT_RESET: {error}; the next best is done");
            }
            member.method = match member.io.function_reset() {
                Some(how) => ResetMethod::Function(how),
                None => ResetMethod::None,
            };
            member.pending = false;
            left.push((member.io.clone(), member.name.clone()));
        }
        drop(members);
        for (io, name) in left {
            self.reset_now(&io, &name);
        }
        drop(turn);
    }

    /// Waits for the turn of a hot reset, and says what it touches; nothing where it may not be.
    fn take_turn_together(
        &self,
        io: &Arc<dyn DeviceIo>,
        others: &[Bdf],
    ) -> Option<(Vec<Arc<dyn DeviceIo>>, Turn<'_>)> {
        let mut members = self.lock();
        loop {
            let own = members.iter().find(|member| member.is(io))?;
            let (address, bus, name) = (own.address, own.bus(), own.name.clone());
            // A device whose address is not known may be one of them.
            let touched = |other: &Member| {
                other.is(io)
                    || !other.mediated
                        && other
                            .address
                            .is_none_or(|other| address.is_none() || others.contains(&other))
            };
            if !own.pending || !members.iter().all(|other| other.quiet || !touched(other)) {
                return None;
            }
            let in_the_way = |other: &Member| touched(other) || other.bus() == bus;
            if members
                .iter()
                .any(|other| other.in_reset && in_the_way(other))
            {
                members = self.wait(members);
                continue;
            }
            log::debug!("{name}: hot reset, which touches {} others", others.len());
            let mut all = Vec::new();
            for member in members.iter_mut().filter(|other| touched(other)) {
                member.in_reset = true;
                all.push(member.io.clone());
            }
            let turn = Turn {
                resets: self,
                touched: all.clone(),
            };
            return Some((all, turn));
        }
    }

    /// Resets the function by itself, where that goes, and `wanted` holds when its turn comes. The kernel
    /// would wait a minute for one that does not answer to come out of such a reset.
    fn reset_alone(&self, io: &Arc<dyn DeviceIo>, wanted: impl Fn(&Member) -> bool) {
        if let Some((name, _turn)) = self.take_turn(io, wanted) {
            self.with(io, |member| member.pending = false);
            self.reset_now(io, &name);
        }
    }

    /// In its turn.
    fn reset_now(&self, io: &Arc<dyn DeviceIo>, name: &str) {
        if io.function_reset().is_none() {
            return;
        }
        if is_silent(&**io) {
            log::debug!("{name} does not answer, and is not reset by itself");
            return;
        }
        held_up::where_a_test_asks(Step::Reset, name);
        let refused = patiently(|| io.reset()).err();
        self.with(io, |member| member.say(refused));
    }

    /// Waits until nothing else on the bus is reset.
    fn take_turn(
        &self,
        io: &Arc<dyn DeviceIo>,
        wanted: impl Fn(&Member) -> bool,
    ) -> Option<(String, Turn<'_>)> {
        let mut members = self.lock();
        loop {
            let own = members.iter().find(|member| member.is(io))?;
            if !wanted(own) {
                return None;
            }
            let bus = own.bus();
            let in_the_way = |other: &Member| other.is(io) || other.bus() == bus;
            if members
                .iter()
                .any(|other| other.in_reset && in_the_way(other))
            {
                members = self.wait(members);
                continue;
            }
            let own = members.iter_mut().find(|member| member.is(io))?;
            own.in_reset = true;
            let turn = Turn {
                resets: self,
                touched: vec![io.clone()],
            };
            return Some((own.name.clone(), turn));
        }
    }

    /// Resets a device by itself, as far as that goes, that waits for others to be reset with it; it
    /// goes on waiting for them.
    fn do_next_best(&self, io: &Arc<dyn DeviceIo>) {
        if let Some((name, _turn)) = self.take_turn(io, |member| member.pending) {
            self.reset_now(io, &name);
        }
    }
}

/// A reset under way. It is over when this is dropped.
#[derive(Debug)]
struct Turn<'a> {
    resets: &'a Resets,
    touched: Vec<Arc<dyn DeviceIo>>,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut members = self.resets.lock();
        let touched = members
            .iter_mut()
            .filter(|member| member.is_in(&self.touched));
        touched.for_each(|member| member.in_reset = false);
        drop(members);
        self.resets.over.notify_all();
    }
}

impl Member {
    fn is(&self, io: &Arc<dyn DeviceIo>) -> bool {
        Arc::ptr_eq(&self.io, io)
    }

    fn is_in(&self, devices: &[Arc<dyn DeviceIo>]) -> bool {
        devices.iter().any(|io| self.is(io))
    }

    /// The host's bus that it is on. Those whose address is not known may be on one.
    fn bus(&self) -> Option<(Segment, Bus)> {
        self.address.map(|address| (address.segment, address.bus))
    }

    /// Remembers what was decided, and says once that it is less than it should be.
    fn tell(&mut self, decision: Decision) {
        self.method = decision.method;
        if let Some(obstacle) = decision.obstacle
            && self.lesser.make(Instant::now()).is_some()
        {
            let Self { name, method, .. } = self;
            let instead = match method {
                ResetMethod::None => "it is not reset".to_owned(),
                method => format!("it is reset by {method} instead"),
            };
            let why = match self.mediated {
                true => "the driver that made it offers no reset".to_owned(),
                false => format!("it has no function level reset, and {obstacle}"),
            };
            log::warn!(
                "{name} cannot be reset in full, so that one guest may find what another left in it: \
                 {why}; {instead}"
            );
        }
    }

    /// Says that the kernel refused to reset the function by itself, where it did.
    fn say(&mut self, refused: Option<io::Error>) {
        let Some(error) = refused else {
            self.refusals.reset();
            return;
        };
        let why = match error.raw_os_error() {
            Some(libc::EAGAIN) => " (the host holds the device, as while it is being unbound)",
            _ => "",
        };
        log::log!(
            self.refusals.next(log::Level::Warn),
            "{}: VFIO_DEVICE_RESET: {error}{why}; it goes on as it is",
            self.name
        );
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
        let method = self.resets.with(&self.io, |member| member.method.clone());
        method.unwrap_or(ResetMethod::None)
    }

    /// The guest is about to change something: the device is not to be touched from now on. Where a
    /// reset touches it now, this waits.
    pub(crate) fn touch(&self) {
        if self.used.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut members = self.resets.lock();
        while let Some(member) = members.iter_mut().find(|member| member.is(&self.io)) {
            if !member.in_reset {
                (member.quiet, member.pending) = (false, false);
                return;
            }
            members = self.resets.wait(members);
        }
    }

    /// Whether the device may have been changed since it was last reset.
    pub(crate) fn is_used(&self) -> bool {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether there are others whose reset is this one's too.
    pub(crate) fn is_shared(&self) -> bool {
        let members = self.resets.lock();
        let own = members.iter().find(|member| member.is(&self.io));
        if own.is_some_and(|own| own.mediated) {
            return false;
        }
        let address = own.and_then(|member| member.address);
        members.iter().any(|member| match &member.method {
            ResetMethod::Hot { others } if member.is(&self.io) => !others.is_empty(),
            ResetMethod::Hot { others } => address.is_none_or(|own| others.contains(&own)),
            ResetMethod::Function(_) | ResetMethod::None => false,
        })
    }

    /// Resets the function by itself and at once, as the guest asks for by its registers.
    pub(crate) fn reset_function(&self) {
        self.resets.reset_alone(&self.io, |_| true);
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

    fn quiet(&self, alone: bool, pending: bool) {
        self.used.store(false, Ordering::Relaxed);
        let function_reset = self.io.function_reset();
        let thorough = function_reset.is_some_and(FunctionReset::is_thorough);
        if thorough && alone {
            self.resets.reset_alone(&self.io, |_| true);
        }
        // Not before: no reset of its neighbours' may meet its own.
        self.resets.with(&self.io, |member| {
            member.quiet = true;
            member.pending = pending && !thorough;
        });
        self.resets.carry_out_pending();
        // Those that are reset with it may never come: a guest can reset the bus of one alone.
        self.resets.do_next_best(&self.io);
    }
}

impl Drop for ResetHandle {
    fn drop(&mut self) {
        self.resets.forget(&self.io);
    }
}

#[cfg(test)]
mod tests;
