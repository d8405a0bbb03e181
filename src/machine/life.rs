//! A machine's life: one event loop, from the first instruction to the end.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::RunError;
use super::assembly::Machine;
use super::events::Event;
use super::passthrough::Verdict;
use super::requests::{Answer, Asker, Info, Request, RequestError, State};
use super::signals::Signals;
use crate::kvm::VcpuEvent;
use crate::provoked;
use crate::report::{Report, Stage};

/// How long a guest may take to power off when it was asked to by a signal.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(20);

/// A guest that triple-faults is restarted, as a PC would be: some kernels reboot in this way. One
/// that does it this soon would do it for ever.
const TOO_SOON: Duration = Duration::from_secs(5);

/// How a VM ended that ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// The guest turned itself off.
    PowerOff,
    /// A person at the console left it (Ctrl-A x).
    Quit,
    /// It was asked to end by its control socket, or by a signal while it was paused.
    Asked,
}

/// What the loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Event,
    Quit,
    Clock,
    Device,
    Request,
}

impl Source {
    const ALL: [Self; 6] = [
        Self::Signal,
        Self::Event,
        Self::Quit,
        Self::Clock,
        Self::Device,
        Self::Request,
    ];
}

/// What the loop remembers.
struct Life {
    /// When the guest started, the last time.
    started: Instant,
    /// By when it has to have powered off.
    deadline: Option<Instant>,
    phase: Phase,
    /// What a guest did last before it was paused, to be dealt with when it goes on.
    deferred: Vec<Event>,
}

/// Whether the guest runs.
#[derive(Debug)]
enum Phase {
    Running,
    /// It is stopped, and these wait until it stands still.
    Pausing(Vec<Asker>),
    /// It stands still until somebody lets it go on.
    Paused,
    /// It is stopped for good: a device of its had an error.
    Held,
}

/// What becomes of a guest that restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    /// It does.
    Anew,
    /// It was asked to power off, and this is how it did: the VM ends.
    End,
    /// It asked before it was held, and stays as it is.
    Held,
    /// It asked before it was paused, and is restarted when it goes on.
    Later,
}

impl Machine {
    /// Lets the guest run until it ends.
    pub(super) fn live(&mut self, report: &Report, signals: &Signals) -> Result<Ended, RunError> {
        let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
        for source in Source::ALL {
            let event = EpollEvent::new(EventSet::IN, source as u64);
            epoll
                .ctl(
                    ControlOperation::Add,
                    self.descriptor(source, signals),
                    event,
                )
                .map_err(RunError::system("epoll_ctl"))?;
        }
        self.account(report);
        report.reached(Stage::FirstInstruction);
        self.vcpus.resume();
        let mut life = Life {
            started: Instant::now(),
            deadline: None,
            phase: Phase::Running,
            deferred: Vec::new(),
        };
        self.requests.open();
        let mut ready = [EpollEvent::default(); Source::ALL.len()];
        loop {
            let others = [self.passthrough.deadline(), self.virtio.deadline()];
            let others = others.into_iter().flatten().min();
            let count = match epoll.wait(life.timeout(others), &mut ready) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.map_err(RunError::system("epoll_wait"))?,
            };
            provoked::here();
            for event in ready.iter().take(count) {
                let source = usize::try_from(event.data())
                    .ok()
                    .and_then(|index| Source::ALL.get(index));
                let ended = match source {
                    Some(Source::Signal) => self.on_signal(&mut life, signals)?,
                    Some(Source::Event) => self.on_event(&mut life, signals)?,
                    Some(Source::Quit) => Some(Ended::Quit),
                    Some(Source::Clock) => {
                        self.platform.rtc.on_timer();
                        None
                    }
                    Some(Source::Device) => {
                        self.on_device(&mut life)?;
                        None
                    }
                    Some(Source::Request) => self.on_request(&mut life),
                    None => None,
                };
                if let Some(ended) = ended {
                    return Ok(ended);
                }
            }
            let now = Instant::now();
            self.passthrough.on_time(&mut self.pci, now);
            self.virtio.on_time(now);
            if life.deadline.is_some_and(|deadline| deadline <= now) {
                return Err(RunError::DeafGuest {
                    limit: POWER_OFF_LIMIT,
                });
            }
        }
    }

    fn descriptor(&self, source: Source, signals: &Signals) -> RawFd {
        match source {
            Source::Signal => signals.as_raw_fd(),
            Source::Event => self.events.as_raw_fd(),
            Source::Quit => self.quit.as_raw_fd(),
            Source::Clock => self.platform.rtc.as_raw_fd(),
            Source::Device => self.passthrough.attached.as_raw_fd(),
            Source::Request => self.requests.as_raw_fd(),
        }
    }

    /// An error of a device's can end the VM or hold the guest.
    fn on_device(&mut self, life: &mut Life) -> Result<(), RunError> {
        let topology = self.pci.topology();
        let runs = matches!(life.phase, Phase::Running);
        let verdict = self.passthrough.attached.on_ready(topology, !runs)?;
        if verdict == Verdict::Hold {
            // Not waited for: a vCPU may have the kernel reset a device, for a minute.
            self.vcpus.stop();
            life.hold();
        }
        Ok(())
    }

    /// The first signal asks the guest to power off, the second does not ask. A guest that is held
    /// cannot be asked.
    fn on_signal(&self, life: &mut Life, signals: &Signals) -> Result<Option<Ended>, RunError> {
        while let Some(signal) = signals.take() {
            if life.deadline.is_some() {
                return Err(RunError::Killed { signal });
            }
            match life.phase {
                Phase::Running => {}
                Phase::Held => return Err(RunError::EndedHeld { signal }),
                Phase::Pausing(_) | Phase::Paused => {
                    log::warn!("signal {signal}: the guest is paused, and the VM ends as it is");
                    return Ok(Some(Ended::Asked));
                }
            }
            log::info!(
                "signal {signal}: the guest is asked to power off, and has {} s for it",
                POWER_OFF_LIMIT.as_secs()
            );
            life.deadline = Instant::now().checked_add(POWER_OFF_LIMIT);
            self.platform.power.press_button();
        }
        Ok(None)
    }

    /// What waits now, and not what comes meanwhile: the guest makes events, and signals have to be
    /// heard between them.
    fn on_event(&mut self, life: &mut Life, signals: &Signals) -> Result<Option<Ended>, RunError> {
        // At least one look, which takes the signal of what was cleared.
        for _ in 0..self.events.count().max(1) {
            let Some(event) = self.events.take() else {
                break;
            };
            let ended = match event.clone() {
                Event::PowerOff | Event::Vcpu(VcpuEvent::PowerOff) => Some(Ended::PowerOff),
                Event::Reset | Event::Vcpu(VcpuEvent::Reset) => match life.restart() {
                    Restart::Anew => {
                        log::info!("the guest restarts");
                        self.start_anew(life, signals)?
                    }
                    Restart::End => Some(ends_with("the guest restarts")),
                    Restart::Held => stays_held("the guest restarts"),
                    Restart::Later => life.defer(event),
                },
                Event::Vcpu(VcpuEvent::TripleFault { id, rip }) => {
                    let fault = RunError::TripleFault {
                        vcpu: id,
                        rip,
                        after: life.started.elapsed(),
                    };
                    match life.restart() {
                        Restart::Anew if life.started.elapsed() < TOO_SOON => return Err(fault),
                        Restart::Anew => {
                            log::warn!("{fault}; it is restarted");
                            self.start_anew(life, signals)?
                        }
                        Restart::End => Some(ends_with(&fault.to_string())),
                        Restart::Held => stays_held(&fault.to_string()),
                        Restart::Later => life.defer(event),
                    }
                }
                Event::SlotPower { slot, on } => {
                    let state = if on { "on" } else { "off" };
                    log::debug!("slot {slot}: the guest switched its power {state}");
                    self.passthrough
                        .attached
                        .on_slot_power(self.pci.topology(), slot);
                    None
                }
                Event::SlotSteady { slot } => {
                    let topology = self.pci.topology();
                    self.passthrough.attached.on_slot_steady(topology, slot);
                    None
                }
                Event::Stopped => {
                    life.stopped();
                    None
                }
                Event::Attached => {
                    self.passthrough.on_attached();
                    self.virtio.on_attached(&mut self.pci);
                    None
                }
                Event::Ejected => {
                    self.virtio.on_ejected();
                    None
                }
                Event::Refused { slot, status } => {
                    self.virtio.on_refused(slot, status);
                    None
                }
                Event::Panicked => return Err(RunError::Panicked),
                Event::Vcpu(VcpuEvent::Crash) => return Err(RunError::Crashed),
                Event::Vcpu(VcpuEvent::Failed { id, reason }) => {
                    return Err(RunError::Vcpu { vcpu: id, reason });
                }
            };
            if ended.is_some() {
                return Ok(ended);
            }
        }
        Ok(None)
    }

    /// What is asked now, and not what is asked meanwhile.
    fn on_request(&mut self, life: &mut Life) -> Option<Ended> {
        for _ in 0..self.requests.count().max(1) {
            let Some((request, asker)) = self.requests.take() else {
                break;
            };
            match request {
                Request::Info => asker.answer(Ok(Answer::Info(self.info(life)))),
                Request::Pause => self.pause(life, asker),
                Request::Resume => asker.answer(self.go_on(life)),
                Request::PowerButton => {
                    log::info!("the control socket presses the guest's power button");
                    self.platform.power.press_button();
                    asker.answer(Ok(Answer::Done));
                }
                Request::AddDevice(configs) => {
                    match configs.iter().find(|one| self.virtio.has(&one.id())) {
                        Some(one) => asker.answer(Err(RequestError::Exists(one.name()))),
                        None => self.passthrough.attach(configs, &self.pci, asker),
                    }
                }
                Request::AddVirtio(config, files) => {
                    let attached = &self.passthrough.attached;
                    let taken = |id: &str| attached.has_id(id);
                    self.virtio.add(config, files, taken, asker);
                }
                Request::RemoveDevice { id, force } => {
                    let held = !matches!(life.phase, Phase::Running);
                    if let Some(asker) = self.virtio.remove(&id, force, held, asker) {
                        let topology = self.pci.topology();
                        let attached = &mut self.passthrough.attached;
                        attached.remove(&id, force, topology, held, asker);
                    }
                }
                Request::Shutdown => {
                    log::info!("the VM ends, as its control socket asks");
                    asker.answer(Ok(Answer::Done));
                    return Some(Ended::Asked);
                }
            }
        }
        None
    }

    fn info(&self, life: &Life) -> Info {
        Info {
            state: life.state(),
            memory: self.ram.size(),
            devices: self.pci.assigned(),
            ids: self.passthrough.attached.ids(),
            empty_slots: self.passthrough.empty_slots(&self.pci),
            virtio: self.virtio.info(),
        }
    }

    /// Answered when no vCPU is in the guest and its virtio devices are quiet, which is not waited for.
    fn pause(&mut self, life: &mut Life, asker: Asker) {
        match &mut life.phase {
            Phase::Running => {
                life.phase = Phase::Pausing(vec![asker]);
                let events = self.events.clone();
                let virtio = self.pci.virtio().clone();
                let pause = virtio.pause_aside(self.pausing.clone(), move || events.stopped());
                self.vcpus.stop_then(pause);
            }
            Phase::Pausing(askers) => askers.push(asker),
            Phase::Paused => asker.answer(Err(RequestError::State("paused already"))),
            Phase::Held => asker.answer(Err(RequestError::State(HELD))),
        }
    }

    fn go_on(&mut self, life: &mut Life) -> Result<Answer, RequestError> {
        match life.phase {
            Phase::Running => return Err(RequestError::State("not paused")),
            Phase::Pausing(_) => return Err(RequestError::State("not paused yet")),
            Phase::Held => return Err(RequestError::State(HELD)),
            Phase::Paused => {}
        }
        self.vcpus.tell_of_stop();
        life.phase = Phase::Running;
        for event in life.deferred.drain(..) {
            self.events.push(event);
        }
        self.pci.virtio().resume();
        self.vcpus.resume();
        log::info!("the guest goes on");
        Ok(Answer::Done)
    }

    fn start_anew(
        &mut self,
        life: &mut Life,
        signals: &Signals,
    ) -> Result<Option<Ended>, RunError> {
        let info = self.info(life);
        let ended = self.restart(signals, &info)?;
        if ended.is_none() {
            life.started = Instant::now();
            self.vcpus.resume();
        }
        Ok(ended)
    }
}

/// A guest that was asked to power off may restart instead, and would not be asked again.
fn ends_with(what: &str) -> Ended {
    log::info!("{what}; it was asked to power off, and the VM ends");
    Ended::PowerOff
}

/// Why nothing can be asked of a guest that is held.
const HELD: &str = "stopped for good, after an error of a device (on_error=pause)";

fn stays_held(what: &str) -> Option<Ended> {
    log::warn!("{what}, but stays held: a device of its had an error before");
    None
}

impl Life {
    /// What becomes of a guest that restarts now.
    fn restart(&self) -> Restart {
        match (&self.phase, self.deadline) {
            (Phase::Held, _) => Restart::Held,
            (Phase::Pausing(_) | Phase::Paused, _) => Restart::Later,
            (Phase::Running, Some(_)) => Restart::End,
            (Phase::Running, None) => Restart::Anew,
        }
    }

    fn state(&self) -> State {
        match self.phase {
            Phase::Running | Phase::Pausing(_) => State::Running,
            Phase::Paused => State::Paused,
            Phase::Held => State::Held,
        }
    }

    /// The guest stands still, if it was to.
    fn stopped(&mut self) {
        // It may have been held, or have begun another pause since.
        if let Phase::Pausing(askers) = &mut self.phase {
            let askers = std::mem::take(askers);
            self.phase = Phase::Paused;
            log::info!("the guest is paused");
            for asker in askers {
                asker.answer(Ok(Answer::Done));
            }
        }
    }

    /// The guest is stopped for good.
    fn hold(&mut self) {
        let before = std::mem::replace(&mut self.phase, Phase::Held);
        if let Phase::Pausing(askers) = before {
            for asker in askers {
                asker.answer(Err(RequestError::State(HELD)));
            }
        }
    }

    fn defer(&mut self, event: Event) -> Option<Ended> {
        log::debug!("{event:?} waits until the guest goes on");
        self.deferred.push(event);
        None
    }

    /// Milliseconds until its deadline or the other, rounded up; -1 where there is none. epoll_wait(2)
    fn timeout(&self, other: Option<Instant>) -> i32 {
        let Some(deadline) = self.deadline.into_iter().chain(other).min() else {
            return -1;
        };
        let left = deadline.saturating_duration_since(Instant::now());
        i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_restarts_unless_it_was_asked_to_power_off_or_does_not_run() {
        let life = |deadline, phase| Life {
            started: Instant::now(),
            deadline,
            phase,
            deferred: Vec::new(),
        };
        let asked = Some(Instant::now());
        for (deadline, phase, becomes) in [
            (None, Phase::Running, Restart::Anew),
            (asked, Phase::Running, Restart::End),
            (None, Phase::Held, Restart::Held),
            (asked, Phase::Held, Restart::Held),
            (asked, Phase::Paused, Restart::Later),
            (None, Phase::Pausing(Vec::new()), Restart::Later),
        ] {
            assert_eq!(life(deadline, phase).restart(), becomes);
        }
    }
}
