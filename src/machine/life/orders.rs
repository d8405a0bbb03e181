//! What a machine is asked to do while it lives: over the control socket, and by its own loop where a device's error
//! stops the guest.

use super::{About, Ended, HELD, Life, PAUSING, Phase, RUNS, Stop};
use crate::machine::assembly::Machine;
use crate::machine::removal::Removal;
use crate::machine::requests::{Answer, Asker, Request, RequestError, Requests};
use crate::machine::resize::Wish;
use crate::monitor;
use crate::notify;

impl Machine {
    /// What is asked now, and not what is asked meanwhile.
    pub(super) fn on_request(&mut self, life: &mut Life, requests: &Requests) -> Option<Stop> {
        for _ in 0..requests.count().max(1) {
            let Some((request, asker)) = requests.take() else {
                break;
            };
            match request {
                Request::Info => asker.answer(Ok(Answer::Info(Box::new(self.info(life))))),
                Request::Observe => {
                    let seen = Box::new(self.observed(life));
                    asker.answer(Ok(Answer::Observed(seen)));
                }
                Request::Create(..) => asker.answer(Err(RequestError::AlreadyCreated)),
                Request::Boot if matches!(life.phase, Phase::Paused) => {
                    asker.answer(self.go_on(life));
                }
                Request::Boot => asker.answer(Err(RequestError::State("running already"))),
                Request::Reboot => {
                    if let Some(stop) = self.reboot(life, asker) {
                        return Some(stop);
                    }
                }
                Request::Nmi => asker.answer(self.interrupt()),
                Request::Pause => self.pause(life, asker),
                Request::Resume => asker.answer(self.go_on(life)),
                Request::PowerButton => {
                    log::info!("the control socket presses the guest's power button");
                    self.board.power.press_button();
                    asker.answer(Ok(Answer::Done));
                }
                Request::AddDevice(..) | Request::AddVirtio(..) => self.add(life, request, asker),
                Request::ResizeMemory(bytes) => self.resize_memory(bytes, asker),
                Request::ResizeZone { id, bytes } => asker.answer(self.resize_zone(&id, bytes)),
                Request::ResizeBalloon(bytes) => asker.answer(self.resize_balloon(bytes)),
                Request::RemoveDevice {
                    id,
                    force,
                    limit,
                    wait,
                } => {
                    let held = !matches!(life.phase, Phase::Running);
                    let limit = limit.unwrap_or_else(|| self.passthrough.removal_limit());
                    let removal = Removal::new(asker, wait, force, limit);
                    if let Some(removal) = self.virtio.remove(&id, removal, held) {
                        let seats = self.pci.seats();
                        self.passthrough.remove(&id, removal, seats, held);
                    }
                }
                Request::Resize { vcpus, wait } => {
                    let runs = matches!(life.phase, Phase::Running);
                    let limit = self.passthrough.removal_limit();
                    let wish = Wish {
                        count: vcpus,
                        wait,
                        asker,
                        limit,
                    };
                    self.processors.resize(wish, runs, &mut self.vcpus);
                }
                Request::End(extent) => {
                    log::info!("the VM ends, as its control socket asks");
                    requests.end(extent, asker);
                    return Some(Stop::End(Ended::Asked));
                }
            }
        }
        None
    }

    /// Adds a device. Where whoever asks has been told that one of this name goes, they are right to use its name
    /// again: the new one comes when the guest has released the other.
    pub(super) fn add(&mut self, life: &mut Life, request: Request, asker: Asker) {
        let attached = &self.passthrough.attached;
        let waits = match &request {
            Request::AddDevice(configs, _) => configs
                .iter()
                .any(|one| attached.is_leaving(one) || self.virtio.is_leaving(&one.id())),
            Request::AddVirtio(config, _) => config
                .id()
                .is_some_and(|id| attached.is_id_leaving(id) || self.virtio.is_leaving(id)),
            _ => false,
        };
        if waits {
            life.waiting.push((request, asker));
            return;
        }
        match request {
            Request::AddDevice(configs, files) => {
                match configs.iter().find(|one| self.virtio.has(&one.id())) {
                    Some(one) => asker.answer(Err(RequestError::Exists(one.name()))),
                    None => self.passthrough.attach(configs, files, &self.pci, asker),
                }
            }
            Request::AddVirtio(config, files) => {
                let attached = &self.passthrough.attached;
                let taken = |id: &str| attached.has_id(id);
                self.virtio
                    .add(*config, files, self.vcpus.cores(), taken, asker);
            }
            _ => {}
        }
    }

    /// The guest starts anew, whether it runs or stands still.
    fn reboot(&mut self, life: &mut Life, asker: Asker) -> Option<Stop> {
        match life.phase {
            _ if life.deadline.is_some() => {
                asker.answer(Err(RequestError::State("asked to power off")));
                return None;
            }
            Phase::Pausing(_) => {
                asker.answer(Err(RequestError::State(PAUSING)));
                return None;
            }
            Phase::Running => {}
            Phase::Paused => {
                life.phase = Phase::Running;
                life.held = false;
                // What a guest did before it was paused is of a life that is over.
                life.deferred.clear();
                self.pci.virtio().resume();
                if let Some(watchdog) = &self.watchdog {
                    watchdog.resume();
                }
            }
        }
        log::info!("the guest restarts, as the control socket asks");
        life.starters.push(asker);
        Some(Stop::Restart)
    }

    fn resize_balloon(&self, bytes: u64) -> Result<Answer, RequestError> {
        let Some(balloon) = self.virtio.balloon() else {
            let why = "the VM has no balloon: it is started with --balloon, or with `balloon` in vm.create";
            return Err(RequestError::Invalid(why.to_owned()));
        };
        // What is plugged is gone when the guest starts anew, and its balloon is as large then.
        let set = balloon.set(bytes, self.ram.size());
        set.map_err(|error| RequestError::Invalid(error.to_string()))?;
        log::info!("the guest's balloon is to have {bytes} bytes, as the control socket asks");
        Ok(Answer::Done)
    }

    fn interrupt(&self) -> Result<Answer, RequestError> {
        log::info!(
            "the guest's processors get a non-maskable interrupt, as the control socket asks"
        );
        let sent = self.vm.interrupt(self.vcpus.started());
        sent.map_err(|error| RequestError::failed(&error))?;
        Ok(Answer::Done)
    }

    /// Answered when no vCPU is in the guest and its virtio devices are quiet, which is not waited for.
    fn pause(&mut self, life: &mut Life, asker: Asker) {
        match &life.phase {
            Phase::Paused if life.held => asker.answer(Err(RequestError::State(HELD))),
            Phase::Paused => asker.answer(Err(RequestError::State("paused already"))),
            Phase::Running | Phase::Pausing(_) => self.stop(life, Some(asker)),
        }
    }

    /// Stops the guest, and tells `asker` when it stands still. A vCPU may have the kernel reset a device, for a
    /// minute, and a virtio device may be in the middle of a flush.
    pub(super) fn stop(&mut self, life: &mut Life, asker: Option<Asker>) {
        match &mut life.phase {
            Phase::Running => {
                monitor::tell(About::Vm, "pausing", &[]);
                if let Some(watchdog) = &self.watchdog {
                    watchdog.pause();
                }
                life.phase = Phase::Pausing(asker.into_iter().collect());
                let events = self.events.clone();
                let virtio = self.pci.virtio().clone();
                let pause = virtio.pause_aside(self.pausing.clone(), move || events.stopped());
                self.vcpus.stop_then(pause);
            }
            Phase::Pausing(askers) => askers.extend(asker),
            Phase::Paused => {}
        }
    }

    fn go_on(&mut self, life: &mut Life) -> Result<Answer, RequestError> {
        match life.phase {
            Phase::Running => return Err(RequestError::State("not paused")),
            Phase::Pausing(_) => return Err(RequestError::State("not paused yet")),
            Phase::Paused => {}
        }
        if std::mem::take(&mut life.held) {
            self.passthrough.attached.go_on();
            log::warn!("the guest goes on after an error of a device of its, as it is asked to");
        }
        monitor::tell(About::Vm, "resuming", &[]);
        self.vcpus.tell_of_stop();
        life.phase = Phase::Running;
        for event in life.deferred.drain(..) {
            self.events.push(event);
        }
        self.pci.virtio().resume();
        if let Some(watchdog) = &self.watchdog {
            watchdog.resume();
        }
        self.vcpus.resume();
        monitor::tell(About::Vm, "resumed", &[]);
        notify::status(RUNS);
        log::info!("the guest goes on");
        Ok(Answer::Done)
    }
}
