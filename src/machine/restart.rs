//! A restart of the machine, which can be ended meanwhile.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset, and is not to be
//! interrupted in that. Linux, drivers/pci/pci.c, `pci_dev_wait`. So devices are reset on a thread of
//! their own: signals and requests are answered meanwhile, and no reset begins after one that ends the VM. The
//! one that goes on is waited for, unless another signal comes.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::RunError;
use super::assembly::Machine;
use super::life::Ended;
use super::long_work::{LongWork, WorkEvent};
use super::requests::{Answer, Info, Request, RequestError, Requests};
use super::signals::Signals;
use crate::kvm::KvmError;
use crate::notify;

/// A machine that was to restart, and whether it ends instead, or could not.
type Restarted = (Box<Machine>, Result<Option<Ended>, RunError>);

impl Machine {
    /// Puts everything into its state at power-on, and loads the kernel anew. Host devices are reset,
    /// and stay with the VM. Where a signal or a person at the console ends the VM meanwhile, it is
    /// only good for that.
    ///
    /// # Errors
    /// [`RunError::Unfinished`] at a second signal: the machine is left to the thread that resets it.
    pub(super) fn restart(
        mut self: Box<Self>,
        signals: &Signals,
        requests: &Requests,
        info: &Info,
    ) -> Result<Restarted, RunError> {
        notify::status("The guest restarts");
        let (quit, devices) = (self.quit.clone(), self.passthrough.open_devices());
        let long_work = LongWork {
            signals,
            quit: Some(&quit),
            requests: Some(requests),
            limit: None,
        };
        let resets = Arc::<RestartResets>::default();
        let mut listening = Listening {
            requests,
            info,
            resets: resets.clone(),
            ended: None,
        };
        let work = move || {
            let done = self.reset_all(&resets);
            (self, done)
        };
        let (mut machine, done) = long_work.during("restart", work, |event| {
            listening
                .note(event)
                .map_break(|signal| RunError::unfinished("restarting", signal, &devices))
        })?;
        let ended = listening.ended;
        let done = done.map_err(RunError::from).and_then(|()| match ended {
            None => machine.power_on(),
            Some(_) => Ok(()),
        });
        Ok((machine, done.map(|()| ended)))
    }

    /// Everything that was the last life's goes, and devices are reset, unless `resets` are stopped.
    fn reset_all(&mut self, resets: &RestartResets) -> Result<(), KvmError> {
        let topology = self.pci.topology();
        self.vcpus.hold();
        self.passthrough.attached.on_restart(self.pci.seats());
        self.virtio.on_restart();
        self.processors.on_restart(&self.vcpus);
        self.events.clear();
        // A device's pin is connected anew by its reset, and what it signals then must not be
        // forgotten by the chips.
        self.vm.reset_chips()?;
        topology.reset_while(|function| resets.go_on(&function.name()));
        // The guest's memory is about to be another's.
        self.pci
            .virtio()
            .wait_for_outstanding(|what| resets.go_on(what));
        // No device reaches memory any more, and no driver's request is served.
        self.unplug_memory();
        Ok(())
    }

    fn power_on(&mut self) -> Result<(), RunError> {
        self.board.reset();
        if let Some(tpm) = &self.tpm {
            tpm.reset();
        }
        self.vcpus.reset()?;
        self.load()
    }
}

/// How far the resets have come.
#[derive(Debug, Default)]
struct RestartResets {
    stop: AtomicBool,
    /// The function that is being reset.
    current: Mutex<Option<String>>,
}

impl RestartResets {
    /// Whether to go on with `what`, whose reset comes next, or is waited for.
    fn go_on(&self, what: &str) -> bool {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(what.to_owned());
        drop(current);
        !self.stop.load(Ordering::Relaxed)
    }

    fn stop(&self, why: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let current = current.as_deref().unwrap_or("the devices");
        log::warn!("{why}: the VM ends when the reset of {current} returns");
    }
}

/// What came during a restart, and what came of it.
struct Listening<'a> {
    requests: &'a Requests,
    /// How the machine is, for who asks.
    info: &'a Info,
    resets: Arc<RestartResets>,
    /// The VM ends: its guest is between two lives, and has nothing to power off.
    ended: Option<Ended>,
}

impl Listening<'_> {
    /// At a signal, when the console is left, or where that is asked for, the resets are stopped, and the VM
    /// ends. Breaks with a signal after that: nothing is waited for any more.
    fn note(&mut self, event: WorkEvent) -> ControlFlow<i32> {
        let (ended, why) = match event {
            WorkEvent::Signal(signal) if self.ended.is_some() => return ControlFlow::Break(signal),
            WorkEvent::Signal(signal) => {
                self.requests.end_process();
                (Ended::PowerOff, format!("signal {signal}"))
            }
            WorkEvent::Quit => (Ended::Quit, "the console was left".to_owned()),
            WorkEvent::Request if self.answer() => (
                Ended::Asked,
                "the control socket asks for the end".to_owned(),
            ),
            WorkEvent::Request | WorkEvent::Late => return ControlFlow::Continue(()),
        };
        if self.ended.is_none() {
            self.resets.stop(&why);
            self.ended = Some(ended);
        }
        ControlFlow::Continue(())
    }

    /// Answers who asks now, and says whether that was for the end.
    fn answer(&self) -> bool {
        let mut ends = false;
        for _ in 0..self.requests.count().max(1) {
            let Some((request, asker)) = self.requests.take() else {
                break;
            };
            match request {
                Request::Info => asker.answer(Ok(Answer::Info(Box::new(self.info.clone())))),
                Request::Observe => asker.answer(Ok(self.info.observed())),
                Request::End(extent) => {
                    self.requests.end(extent, asker);
                    ends = true;
                }
                _ => asker.answer(Err(RequestError::State("restarting: ask again"))),
            }
        }
        ends
    }
}

#[cfg(test)]
mod tests {
    use busway_pci::{HostBridge, PciFunction};

    use super::super::requests::Extent;
    use super::*;

    #[test]
    fn who_asks_is_answered_and_a_signal_a_person_and_a_request_end_the_vm() {
        let (requests, info) = (Requests::new().unwrap(), Info::default());
        let control = requests.control();
        let listening = || Listening {
            requests: &requests,
            info: &info,
            resets: Arc::default(),
            ended: None,
        };
        for (event, ended) in [
            (WorkEvent::Signal(15), Ended::PowerOff),
            (WorkEvent::Quit, Ended::Quit),
        ] {
            let mut listening = listening();
            assert!(listening.resets.go_on(&HostBridge::new().name()));
            assert!(listening.note(event).is_continue());
            assert_eq!(listening.ended, Some(ended));
            // No reset begins any more, and another signal does not wait for the one that goes on.
            assert!(!listening.resets.go_on(&HostBridge::new().name()));
            assert!(listening.note(WorkEvent::Quit).is_continue());
            assert_eq!(listening.ended, Some(ended));
            assert_eq!(listening.note(WorkEvent::Signal(2)), ControlFlow::Break(2));
        }
        let mut listening = listening();
        let asking = std::thread::spawn(move || {
            let end = Request::End(Extent::Process);
            let requests = [Request::Info, Request::Observe, Request::Pause, end];
            requests.map(|request| control.ask(request))
        });
        while listening.ended.is_none() {
            assert!(listening.note(WorkEvent::Request).is_continue());
            std::thread::yield_now();
        }
        let answers = [
            Ok(Answer::Info(Box::default())),
            Ok(Answer::Observed(Box::default())),
            Err(RequestError::State("restarting: ask again")),
            // It is told of the process's end, which comes when all is given back.
            Err(RequestError::Ended),
        ];
        assert_eq!(asking.join().unwrap(), answers);
        assert_eq!(listening.ended, Some(Ended::Asked));
    }
}
