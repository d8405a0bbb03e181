//! A machine's life: one event loop, from the first instruction to the end.

mod orders;

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use crate::kvm::VcpuEvent;
use crate::machine::RunError;
use crate::machine::assembly::Machine;
use crate::machine::events::Event;
use crate::machine::long_work;
use crate::machine::madvise::Boot;
use crate::machine::memory_devices::MemoryDevices;
use crate::machine::observed::State;
use crate::machine::passthrough::Verdict;
use crate::machine::requests::{Answer, Asker, Request, Requests};
use crate::machine::signals::Signals;
use crate::monitor::{self, Source as About};
use crate::notify;
use crate::provoked;

/// A guest that triple-faults is restarted, as a PC would be: some kernels reboot in this way. One
/// that does it this soon would do it for ever.
const TOO_SOON: Duration = Duration::from_secs(5);

/// How long the process lasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lasting {
    /// As long as its one VM.
    Vm,
    /// Until it is told to end. A guest that powers off by itself tells it so.
    Served,
    /// Until it is told to end, by its API or by a signal.
    Kept,
}

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

/// Why the loop stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The VM ends.
    End(Ended),
    /// The guest starts anew.
    Restart,
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
    Watchdog,
}

impl Source {
    const ALL: [Self; 7] = [
        Self::Signal,
        Self::Event,
        Self::Quit,
        Self::Clock,
        Self::Device,
        Self::Request,
        Self::Watchdog,
    ];
}

/// What the loop remembers.
#[derive(Debug)]
pub(super) struct Life {
    /// What a signal ends, and when.
    lasting: Lasting,
    /// Who waits for the guest's start.
    starters: Vec<Asker>,
    /// What whoever reads events is told of it then.
    start: &'static str,
    /// When the guest started, the last time.
    started: Instant,
    /// How long it may take to power off when it was asked to by a signal.
    power_off_limit: Duration,
    /// By when it has to have powered off.
    deadline: Option<Instant>,
    phase: Phase,
    /// It is paused, or about to be, for a device of its had an error.
    held: bool,
    /// What a guest did last before it was paused, to be dealt with when it goes on.
    deferred: Vec<Event>,
    /// Devices that are to come under the name of one that is taken for gone, until the guest has released that.
    waiting: Vec<(Request, Asker)>,
}

/// Whether the guest runs.
#[derive(Debug)]
enum Phase {
    Running,
    /// It is stopped, and these wait until it stands still.
    Pausing(Vec<Asker>),
    /// It stands still until somebody lets it go on.
    Paused,
}

/// What becomes of a guest that restarts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Restart {
    /// It restarts.
    Anew,
    /// It was asked to power off, and this is how it did: the VM ends.
    End,
    /// It asked before it was paused, and is restarted when it goes on.
    Later,
}

impl Machine {
    /// Lets the guest run until it ends or starts anew.
    pub(super) fn live(
        &mut self,
        life: &mut Life,
        signals: &Signals,
        requests: &Requests,
    ) -> Result<Stop, RunError> {
        let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
        for source in Source::ALL {
            let Some(descriptor) = self.descriptor(source, signals, requests) else {
                continue;
            };
            let event = EpollEvent::new(EventSet::IN, source as u64);
            epoll
                .ctl(ControlOperation::Add, descriptor, event)
                .map_err(RunError::system("epoll_ctl"))?;
        }
        life.started = Instant::now();
        self.vcpus.resume();
        monitor::tell(
            About::Vm,
            std::mem::replace(&mut life.start, "rebooted"),
            &[],
        );
        for asker in life.starters.drain(..) {
            asker.answer(Ok(Answer::Done));
        }
        notify::ready(RUNS);
        requests.rouse();
        let mut boot = Boot::begins();
        let mut ready = [EpollEvent::default(); Source::ALL.len()];
        loop {
            let others = [
                boot.deadline(),
                self.passthrough.deadline(),
                self.virtio.deadline(),
                self.processors.deadline(),
                notify::deadline(),
            ];
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
                let stop = match source {
                    Some(Source::Signal) => self.on_signal(life, signals, requests)?,
                    Some(Source::Event) => self.on_event(life)?,
                    Some(Source::Quit) => Some(Stop::End(Ended::Quit)),
                    Some(Source::Clock) => {
                        self.board.rtc.on_timer();
                        None
                    }
                    Some(Source::Device) => {
                        self.on_device(life)?;
                        None
                    }
                    Some(Source::Request) => self.on_request(life, requests),
                    Some(Source::Watchdog) => self.on_watchdog(life),
                    None => None,
                };
                if let Some(stop) = stop {
                    return Ok(stop);
                }
            }
            let now = Instant::now();
            boot.on_time(now);
            notify::on_time(now);
            self.passthrough.on_time(&mut self.pci, now);
            self.virtio.on_time(now);
            self.processors.on_time(now);
            for (request, asker) in std::mem::take(&mut life.waiting) {
                self.add(life, request, asker);
            }
            if life.deadline.is_some_and(|deadline| deadline <= now) {
                return Err(RunError::DeafGuest {
                    limit: life.power_off_limit,
                });
            }
        }
    }

    /// What tells of `source`, where there is such a thing.
    fn descriptor(&self, source: Source, signals: &Signals, requests: &Requests) -> Option<RawFd> {
        Some(match source {
            Source::Signal => signals.as_raw_fd(),
            Source::Event => self.events.as_raw_fd(),
            Source::Quit => self.quit.as_raw_fd(),
            Source::Clock => self.board.rtc.as_raw_fd(),
            Source::Device => self.passthrough.attached.as_raw_fd(),
            Source::Request => requests.as_raw_fd(),
            Source::Watchdog => self.watchdog.as_ref()?.as_raw_fd(),
        })
    }

    /// The watchdog's timer: a guest that has not fed it starts anew.
    fn on_watchdog(&self, life: &Life) -> Option<Stop> {
        if !self.watchdog.as_ref()?.on_timer() {
            return None;
        }
        log::warn!("the guest has not fed its watchdog in time, and is reset");
        monitor::tell(About::Guest, "watchdog", &[("action", "reset")]);
        match life.restart() {
            Restart::Anew => Some(Stop::Restart),
            Restart::End => Some(ends_with("the guest's watchdog has run out")),
            Restart::Later => {
                self.events.push(Event::Reset);
                None
            }
        }
    }

    /// An error of a device's can end the VM or hold the guest.
    fn on_device(&mut self, life: &mut Life) -> Result<(), RunError> {
        let seats = self.pci.seats();
        let runs = matches!(life.phase, Phase::Running);
        let verdict = self.passthrough.attached.on_ready(seats, !runs)?;
        if verdict == Verdict::Hold {
            life.held = true;
            self.stop(life, None);
        }
        Ok(())
    }

    /// The first signal asks the guest to power off, the second does not ask. A guest that is held
    /// cannot be asked. A process that outlives its VMs ends as it is, as those who run such expect.
    fn on_signal(
        &self,
        life: &mut Life,
        signals: &Signals,
        requests: &Requests,
    ) -> Result<Option<Stop>, RunError> {
        while let Some(signal) = signals.take() {
            if life.lasting != Lasting::Vm {
                log::info!("signal {signal}: the VM ends as it is, and the process with it");
                let devices = self.passthrough.open_devices().names().len();
                notify::stopping("The process ends", Duration::ZERO, devices);
                requests.end_process();
                return Ok(Some(Stop::End(Ended::Asked)));
            }
            if life.deadline.is_some() {
                return Err(RunError::Killed { signal });
            }
            match life.phase {
                Phase::Running => {}
                _ if life.held => return Err(RunError::EndedHeld { signal }),
                Phase::Pausing(_) | Phase::Paused => {
                    log::warn!("signal {signal}: the guest is paused, and the VM ends as it is");
                    return Ok(Some(Stop::End(Ended::Asked)));
                }
            }
            log::info!(
                "signal {signal}: the guest is asked to power off, and has {} s for it",
                life.power_off_limit.as_secs()
            );
            let status = "The guest was asked to power off";
            let devices = self.passthrough.open_devices().names().len();
            notify::stopping(status, life.power_off_limit, devices);
            life.deadline = Instant::now().checked_add(life.power_off_limit);
            self.board.power.press_button();
        }
        Ok(None)
    }

    /// What waits now, and not what comes meanwhile: the guest makes events, and signals have to be
    /// handled between them.
    fn on_event(&mut self, life: &mut Life) -> Result<Option<Stop>, RunError> {
        // At least one look, which takes the signal of what was cleared.
        for _ in 0..self.events.count().max(1) {
            let Some(event) = self.events.take() else {
                break;
            };
            let stop = match event.clone() {
                Event::PowerOff | Event::Vcpu(VcpuEvent::PowerOff) => {
                    Some(Stop::End(Ended::PowerOff))
                }
                Event::Reset | Event::Vcpu(VcpuEvent::Reset) => match life.restart() {
                    Restart::Anew => {
                        log::info!("the guest restarts");
                        Some(Stop::Restart)
                    }
                    Restart::End => Some(ends_with("the guest restarts")),
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
                            Some(Stop::Restart)
                        }
                        Restart::End => Some(ends_with(&fault.to_string())),
                        Restart::Later => life.defer(event),
                    }
                }
                Event::SlotPower { slot, on } => {
                    let state = if on { "on" } else { "off" };
                    log::debug!("slot {slot}: the guest switched its power {state}");
                    self.passthrough
                        .attached
                        .on_slot_power(self.pci.seats(), slot);
                    None
                }
                Event::SlotSteady { slot } => {
                    let seats = self.pci.seats();
                    self.passthrough.attached.on_slot_steady(seats, slot);
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
                    self.passthrough.attached.on_ejected(self.pci.seats());
                    self.virtio.on_ejected();
                    None
                }
                Event::Refused { slot, status } => {
                    let attached = &mut self.passthrough.attached;
                    attached.on_refused(slot, status, self.pci.seats());
                    self.virtio.on_refused(slot, status);
                    None
                }
                Event::CpuEjected { cpu } => {
                    self.processors.on_ejected(cpu, &self.vcpus);
                    None
                }
                Event::CpuRefused { cpu, status } => {
                    self.processors.on_refused(cpu, status);
                    None
                }
                Event::MemoryReported { device, status } => {
                    MemoryDevices::on_reported(device, status);
                    None
                }
                Event::Vcpu(VcpuEvent::Parked { id }) => {
                    self.processors.on_parked(id);
                    None
                }
                Event::Panicked => return Err(RunError::Panicked),
                Event::Vcpu(VcpuEvent::Crash) => return Err(RunError::Crashed),
                Event::Vcpu(VcpuEvent::Failed { id, reason }) => {
                    return Err(RunError::Vcpu { vcpu: id, reason });
                }
            };
            if stop.is_some() {
                return Ok(stop);
            }
        }
        Ok(None)
    }
}

/// A guest that was asked to power off may restart instead, and would not be asked again.
fn ends_with(what: &str) -> Stop {
    log::info!("{what}; it was asked to power off, and the VM ends");
    Stop::End(Ended::PowerOff)
}

/// What the service manager is told of a guest that is neither paused nor about to end.
const RUNS: &str = "The guest runs";

/// Why a guest cannot be restarted, or go on.
const PAUSING: &str = "about to be paused: ask again";

/// Why a guest that is held cannot be paused.
const HELD: &str = "paused already, after an error of a device (on_error=pause)";

impl Life {
    /// Of a guest that is to run. `starter` is told when it does.
    pub(super) fn new(lasting: Lasting, starter: Option<Asker>, power_off_limit: Duration) -> Self {
        Self {
            lasting,
            starters: starter.into_iter().collect(),
            start: "booted",
            started: Instant::now(),
            power_off_limit,
            deadline: None,
            phase: Phase::Running,
            held: false,
            deferred: Vec::new(),
            waiting: Vec::new(),
        }
    }

    /// What becomes of a guest that restarts now.
    fn restart(&self) -> Restart {
        match (&self.phase, self.deadline) {
            (Phase::Pausing(_) | Phase::Paused, _) => Restart::Later,
            (Phase::Running, Some(_)) => Restart::End,
            (Phase::Running, None) => Restart::Anew,
        }
    }

    /// How long ago the guest started.
    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    pub(super) fn state(&self) -> State {
        match self.phase {
            _ if self.held => State::Held,
            Phase::Running | Phase::Pausing(_) => State::Running,
            Phase::Paused => State::Paused,
        }
    }

    /// The guest stands still, if it was to.
    fn stopped(&mut self) {
        // It may have begun another pause since.
        if let Phase::Pausing(askers) = &mut self.phase {
            let askers = std::mem::take(askers);
            self.phase = Phase::Paused;
            monitor::tell(About::Vm, "paused", &[]);
            notify::status(if self.held {
                "The guest is paused, after an error of a device"
            } else {
                "The guest is paused"
            });
            log::info!("the guest is paused");
            for asker in askers {
                asker.answer(Ok(Answer::Done));
            }
        }
    }

    fn defer(&mut self, event: Event) -> Option<Stop> {
        log::debug!("{event:?} waits until the guest goes on");
        self.deferred.push(event);
        None
    }

    /// Until its deadline or the other. epoll_wait(2)
    fn timeout(&self, other: Option<Instant>) -> i32 {
        long_work::timeout(self.deadline.into_iter().chain(other).min())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_restarts_unless_it_was_asked_to_power_off_or_does_not_run() {
        let life = |deadline, phase| Life {
            deadline,
            phase,
            ..Life::new(Lasting::Vm, None, Duration::ZERO)
        };
        let asked = Some(Instant::now());
        for (deadline, phase, becomes) in [
            (None, Phase::Running, Restart::Anew),
            (asked, Phase::Running, Restart::End),
            (asked, Phase::Paused, Restart::Later),
            (None, Phase::Pausing(Vec::new()), Restart::Later),
        ] {
            assert_eq!(life(deadline, phase).restart(), becomes);
        }
    }

    #[test]
    fn a_guest_that_is_held_is_paused_and_said_to_be_held() {
        let mut life = Life::new(Lasting::Vm, None, Duration::ZERO);
        life.held = true;
        life.phase = Phase::Pausing(Vec::new());
        // What it asked for before waits until it goes on.
        assert_eq!(
            (life.state(), life.restart()),
            (State::Held, Restart::Later)
        );
        life.stopped();
        assert!(matches!(life.phase, Phase::Paused));
        assert_eq!(
            (life.state(), life.restart()),
            (State::Held, Restart::Later)
        );
        life.held = false;
        assert_eq!(life.state(), State::Paused);
    }
}
