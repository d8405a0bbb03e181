//! A machine's life: one event loop, from the first instruction to the end.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::RunError;
use super::assembly::Machine;
use super::events::Event;
use super::passthrough::Verdict;
use super::signals::Signals;
use crate::kvm::VcpuEvent;
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
}

/// What the loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Event,
    Quit,
    Clock,
    Device,
}

impl Source {
    const ALL: [Self; 5] = [
        Self::Signal,
        Self::Event,
        Self::Quit,
        Self::Clock,
        Self::Device,
    ];
}

/// What the loop remembers.
struct Life {
    /// When the guest started, the last time.
    started: Instant,
    /// By when it has to have powered off.
    deadline: Option<Instant>,
    /// The guest does not run, until somebody lets it.
    held: bool,
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
            held: false,
        };
        let mut ready = [EpollEvent::default(); Source::ALL.len()];
        loop {
            let count = match epoll.wait(
                life.timeout(self.passthrough.attached.deadline()),
                &mut ready,
            ) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.map_err(RunError::system("epoll_wait"))?,
            };
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
                    None => None,
                };
                if let Some(ended) = ended {
                    return Ok(ended);
                }
            }
            let now = Instant::now();
            self.passthrough.attached.on_time(self.pci.topology(), now);
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
        }
    }

    /// An error of a device's can end the VM or hold the guest.
    fn on_device(&mut self, life: &mut Life) -> Result<(), RunError> {
        let topology = self.pci.topology();
        let verdict = self.passthrough.attached.on_ready(topology, life.held)?;
        if verdict == Verdict::Hold {
            // Not waited for: a vCPU may have the kernel reset a device, for a minute.
            self.vcpus.stop();
            life.held = true;
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
            if life.held {
                return Err(RunError::EndedHeld { signal });
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
            let ended = match event {
                Event::PowerOff | Event::Vcpu(VcpuEvent::PowerOff) => Some(Ended::PowerOff),
                Event::Reset | Event::Vcpu(VcpuEvent::Reset) => match life.restart() {
                    Restart::Anew => {
                        log::info!("the guest restarts");
                        self.start_anew(life, signals)?
                    }
                    Restart::End => Some(ends_with("the guest restarts")),
                    Restart::Held => stays_held("the guest restarts"),
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

    fn start_anew(
        &mut self,
        life: &mut Life,
        signals: &Signals,
    ) -> Result<Option<Ended>, RunError> {
        let ended = self.restart(signals)?;
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

fn stays_held(what: &str) -> Option<Ended> {
    log::warn!("{what}, but stays held: a device of its had an error before");
    None
}

impl Life {
    /// What becomes of a guest that restarts now.
    fn restart(&self) -> Restart {
        match (self.held, self.deadline) {
            (true, _) => Restart::Held,
            (false, Some(_)) => Restart::End,
            (false, None) => Restart::Anew,
        }
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
    fn a_guest_restarts_unless_it_was_asked_to_power_off_or_is_held() {
        let life = |deadline, held| Life {
            started: Instant::now(),
            deadline,
            held,
        };
        let asked = Some(Instant::now());
        assert_eq!(life(None, false).restart(), Restart::Anew);
        assert_eq!(life(asked, false).restart(), Restart::End);
        assert_eq!(life(None, true).restart(), Restart::Held);
        assert_eq!(life(asked, true).restart(), Restart::Held);
    }
}
