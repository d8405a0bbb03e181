//! What this process does, with a VM or without one: it remembers what a VM is to be, puts it together, lets it
//! live, and gives it back.
//!
//! There is one way through a VM's life ([`live`]), for a process that is there for one VM ([`run`]) as for one that
//! is told over its API what to do ([`serve`]). The main thread owns all of this, and waits for nobody but those
//! who ask.

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::assembly::{Begun, Machine};
use super::consoles::Terminals;
use super::definition::{Definition, invalid};
use super::early::Early;
use super::end::Audience;
use super::holders::look_for_holders;
use super::life::{Ended, Lasting, Life, Stop};
use super::long_work;
use super::observed::State;
#[cfg(debug_assertions)]
use super::panics;
use super::passthrough::OpenDevices;
use super::requests::{Answer, Asker, Extent, Info, Request, RequestError, Requests};
use super::signals::Signals;
use super::{PanicWatch, RunError, madvise, payload, placing};
use crate::config::{Choice, LandlockRule, VmConfig};
use crate::memory::unmap_unused;
use crate::monitor::{self, Source};
use crate::notify;
use crate::provoked;
use crate::report::{Report, Stage};
use crate::sandbox;
use crate::sandbox::landlock::{self, Rules};

/// A machine whose guest runs no more, and how that came.
type Lived = (Box<Machine>, Result<Ended, RunError>);

/// Runs a VM until it ends, saying in `report` how far it has come.
///
/// The calling thread is the machine's event loop. [`block_signals`](super::block_signals) has to be called before
/// any thread is started, for the signals that end a VM have to come here. Whoever has a
/// [`Control`](super::Control) of `requests` can ask things of the machine meanwhile.
///
/// # Errors
/// [`RunError`], whose [`exit_status`](RunError::exit_status) tells bad configuration, a host that
/// cannot do it, and failure apart.
pub fn run(config: &VmConfig, report: &Arc<Report>, requests: Requests) -> Result<Ended, RunError> {
    let signals = Signals::new()?;
    let definition = Arc::new(Definition::from(config.clone()));
    let watch = PanicWatch::start();
    let lived = live(
        &definition,
        report,
        &signals,
        &requests,
        Lasting::Vm,
        None,
        &watch,
    );
    let (machine, ended) = match lived {
        Err(RunError::AskedEarly) => return Ok(Ended::Asked),
        lived => lived?,
    };
    // Whoever still waits is told of the end before all that the machine has is given back.
    match requests.can_be_asked() {
        true => requests.close(Info::of(&machine.config(), State::Shutdown)),
        false => drop(requests),
    }
    machine.end(&signals, None, ended)
}

/// Does what `requests` ask, VM after VM, until the process is to end. `first`: a VM that is there at once.
///
/// The calling thread is the event loop, as with [`run`]. A VM that could not be put together, or that was ended over
/// the API, leaves the process as it was. `kept`: so does one whose guest powered off or failed. `socket`: what is removed
/// at the end, where Landlock bounds the process by then. `bounds`: what of that the process was started with.
///
/// # Errors
/// What a VM failed with that takes the process with it
pub fn serve(
    first: Option<VmConfig>,
    kept: bool,
    socket: Option<PathBuf>,
    bounds: ProcessBounds,
    requests: Requests,
) -> Result<(), RunError> {
    let mut served = Served {
        signals: Signals::new()?,
        requests,
        lasting: if kept { Lasting::Kept } else { Lasting::Served },
        socket,
        bounds,
        definition: None,
    };
    monitor::tell(Source::Vmm, "starting", &[]);
    let ended = served.serve(first);
    if served.definition.is_some() {
        monitor::tell(Source::Vm, "deleted", &[]);
    }
    monitor::tell(Source::Vmm, "shutdown", &[]);
    ended
}

/// Puts a VM together, and lets its guest run until its end; `starter` is told when it does, or why it does not.
///
/// # Errors
/// [`RunError`], where there is no machine to be given back
fn live(
    definition: &Arc<Definition>,
    report: &Arc<Report>,
    signals: &Signals,
    requests: &Requests,
    lasting: Lasting,
    starter: Option<Asker>,
    watch: &PanicWatch,
) -> Result<Lived, RunError> {
    let mut machine = match assemble(definition, report, signals, requests) {
        Ok(machine) => machine,
        Err(error) => {
            if let Some(starter) = starter {
                starter.answer(Err(RequestError::failed(&error)));
            }
            return Err(error);
        }
    };
    // Before the guest's first instruction, and after the last thing that is root's to open.
    sandbox::end_opening().map_err(RunError::system("capset"))?;
    watch.tell(&machine.events);
    #[cfg(debug_assertions)]
    panics::panic_where_a_test_asks();
    machine.account(report);
    let limit = definition.config.platform.power_off_limit();
    let mut life = Life::new(lasting, starter, limit);
    let ended = loop {
        madvise::forget_the_start();
        report.reached(Stage::FirstInstruction);
        let restarted = match machine.live(&mut life, signals, requests) {
            Ok(Stop::Restart) => {
                monitor::tell(Source::Vm, "rebooting", &[]);
                let info = machine.info(&life);
                machine.restart(signals, requests, &info)?
            }
            Ok(Stop::End(ended)) => break Ok(ended),
            Err(error) => break Err(error),
        };
        match restarted {
            (again, Ok(None)) => machine = again,
            (last, ended) => {
                machine = last;
                break ended.map(|ended| ended.unwrap_or(Ended::PowerOff));
            }
        }
    };
    machine.account(report);
    Ok((machine, ended))
}

/// Puts a machine together, with an ear for who does not want it any more.
fn assemble(
    definition: &Arc<Definition>,
    report: &Arc<Report>,
    signals: &Signals,
    requests: &Requests,
) -> Result<Box<Machine>, RunError> {
    definition.config.validate()?;
    let definition = match placing::placed(&definition.config, report)? {
        Some(config) => Arc::new(Definition {
            config,
            ..Definition::clone(definition)
        }),
        None => Arc::clone(definition),
    };
    definition.config.validate()?;
    let (early, devices) = (Arc::<Early>::default(), OpenDevices::default());
    let work = {
        let (definition, report) = (definition.clone(), report.clone());
        let (early, devices) = (early.clone(), devices.clone());
        let can_be_asked = requests.can_be_asked();
        let begun = Begun::new(&definition.config)?;
        move || {
            let machine =
                Machine::assemble(begun, &definition, &report, &early, &devices, can_be_asked);
            machine.map(Box::new)
        }
    };
    let info = || definition.info(State::Created);
    let left = |signal| RunError::unfinished("being put together", signal, &devices);
    early.during(signals, requests, info, work, left)
}

/// A process that is told what to do.
#[derive(Debug)]
struct Served {
    signals: Signals,
    requests: Requests,
    lasting: Lasting,
    /// The control socket that the process has made.
    socket: Option<PathBuf>,
    bounds: ProcessBounds,
    definition: Option<Definition>,
}

/// Whether Landlock bounds a process whatever its VMs say of that, and what it may open beside what they name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessBounds {
    /// Off leaves it to the VMs.
    pub landlock: Choice,
    /// What may be opened besides.
    pub rules: Vec<LandlockRule>,
}

impl Default for ProcessBounds {
    fn default() -> Self {
        Self {
            landlock: Choice::Off,
            rules: Vec::new(),
        }
    }
}

/// What the process does when a VM is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// It waits to be told.
    Wait,
    /// It ends.
    End,
}

// What is waited for.
const SIGNAL: u64 = 0;
const REQUEST: u64 = 1;

impl Served {
    fn serve(&mut self, first: Option<VmConfig>) -> Result<(), RunError> {
        if let Some(config) = first {
            let terminals = Terminals::open(&config)?;
            self.definition = Some(Definition {
                terminals: Arc::new(terminals),
                ..config.into()
            });
            if let Next::End = self.boot(None)? {
                return Ok(());
            }
        }
        while let Some(asker) = self.wait()? {
            if let Next::End = self.boot(Some(asker))? {
                break;
            }
        }
        Ok(())
    }

    /// Answers who asks while there is no VM, until one is to be booted; `None` where the process is to end.
    ///
    /// # Errors
    /// [`RunError::System`]
    fn wait(&mut self) -> Result<Option<Asker>, RunError> {
        let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
        let sources = [
            (self.signals.as_raw_fd(), SIGNAL),
            (self.requests.as_raw_fd(), REQUEST),
        ];
        for (fd, source) in sources {
            epoll
                .ctl(
                    ControlOperation::Add,
                    fd,
                    EpollEvent::new(EventSet::IN, source),
                )
                .map_err(RunError::system("epoll_ctl"))?;
        }
        self.requests.rouse();
        notify::ready("There is no VM");
        let mut ready = [EpollEvent::default(); 2];
        loop {
            notify::on_time(Instant::now());
            let count = match epoll.wait(long_work::timeout(notify::deadline()), &mut ready) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                result => result.map_err(RunError::system("epoll_wait"))?,
            };
            provoked::here();
            for event in ready.iter().take(count) {
                if event.data() == SIGNAL {
                    if let Some(signal) = self.signals.take() {
                        log::info!("signal {signal}: the process ends");
                        notify::stopping("The process ends", Duration::ZERO, 0);
                        return Ok(None);
                    }
                    continue;
                }
                for _ in 0..self.requests.count().max(1) {
                    let Some((request, asker)) = self.requests.take() else {
                        break;
                    };
                    match request {
                        Request::Boot if self.definition.is_some() => return Ok(Some(asker)),
                        // Who asked sees the process end.
                        Request::End(Extent::Process) => return Ok(None),
                        request => asker.answer(self.on_request(request)),
                    }
                }
            }
        }
    }

    /// What can be done without a VM, at once.
    fn on_request(&mut self, request: Request) -> Result<Answer, RequestError> {
        let Some(definition) = &mut self.definition else {
            return match request {
                Request::Create(config, handed) => {
                    config.validate_parts().map_err(invalid)?;
                    self.definition = Some(Definition::new(*config, handed)?);
                    Ok(Answer::Done)
                }
                // There is nothing to be ended, which is what was wanted.
                Request::End(Extent::Definition) => Ok(Answer::Done),
                Request::Info
                | Request::Observe
                | Request::Boot
                | Request::AddDevice(..)
                | Request::AddVirtio(..)
                | Request::RemoveDevice { .. }
                | Request::Resize { .. }
                | Request::ResizeMemory(_)
                | Request::ResizeZone { .. } => Err(RequestError::NotCreated),
                _ => Err(RequestError::NotRunning),
            };
        };
        match request {
            Request::Info => {
                let info = definition.info(State::Created);
                return Ok(Answer::Info(Box::new(info)));
            }
            Request::Observe => {
                return Ok(definition.info(State::Created).observed());
            }
            Request::Create(..) => return Err(RequestError::AlreadyCreated),
            Request::AddDevice(configs, files) => definition.add_devices(configs, files)?,
            Request::AddVirtio(config, files) => definition.add_virtio(*config, files)?,
            Request::RemoveDevice { id, .. } => definition.remove(&id)?,
            Request::Resize { vcpus, .. } => definition.resize(vcpus)?,
            Request::ResizeMemory(bytes) => definition.resize_memory(bytes)?,
            Request::ResizeZone { id, bytes } => definition.resize_zone(&id, bytes)?,
            Request::End(Extent::Definition) => self.forget(),
            _ => return Err(RequestError::NotRunning),
        }
        Ok(Answer::Done)
    }

    fn forget(&mut self) {
        self.definition = None;
        monitor::tell(Source::Vm, "deleted", &[]);
    }

    /// Boots the VM that there is to be, and lets it live until its end. `starter`: who wants that.
    ///
    /// # Errors
    /// What the VM failed with, where the process ends with it
    fn boot(&mut self, starter: Option<Asker>) -> Result<Next, RunError> {
        let Some(definition) = self.definition.take() else {
            return Ok(Next::Wait);
        };
        let asked = starter.is_some();
        let mut whole = definition.clone();
        let devices = whole.config.device.len();
        whole.config.platform.make_slots(devices);
        payload::sort(&mut whole.config);
        if let Err(error) = self.bound(&whole.config) {
            if let Some(starter) = starter {
                starter.answer(Err(RequestError::failed(&error)));
            }
            self.definition = Some(definition);
            return self.after(Err(error), None, !asked);
        }
        let (watch, report) = (PanicWatch::start(), Arc::new(Report::start()));
        monitor::tell(Source::Vm, "booting", &[]);
        let lived = live(
            &Arc::new(whole),
            &report,
            &self.signals,
            &self.requests,
            self.lasting,
            starter,
            &watch,
        );
        let (mut left, lived, ended) = match lived {
            Ok((machine, ended)) => {
                let mut left = machine.definition();
                // As it was said.
                let said = definition.config;
                placing::forget(&mut left.config, &said);
                left.config.platform = said.platform;
                left.config.kernel = said.kernel;
                left.config.firmware = said.firmware;
                left.config.initramfs = said.initramfs;
                left.config.cmdline = said.cmdline;
                left.iommufd = definition.iommufd;
                left.terminals = definition.terminals;
                let audience = Audience {
                    requests: &self.requests,
                    info: left.info(State::Shutdown),
                };
                let ended = machine.end(&self.signals, Some(&audience), ended);
                (left, true, ended)
            }
            Err(error) => (definition, false, Err(error)),
        };
        drop(watch);
        unmap_unused();
        let ending = self.requests.take_ending();
        let extent = ending.extent;
        // All that it had is given back by now, which is what those wait for who take devices then.
        if lived {
            monitor::tell(Source::Vm, "shutdown", &[]);
        }
        left.forget_numbers();
        self.definition = Some(left);
        if extent == Some(Extent::Definition) {
            self.forget();
        }
        ending.finish();
        self.after(ended, extent, lived || !asked)
    }

    /// Has Landlock bound the process to the files of the first VM that is booted with it, or of the first one where the
    /// process was started with it.
    ///
    /// # Errors
    /// [`RunError::Landlock`]
    fn bound(&self, config: &VmConfig) -> Result<(), RunError> {
        let choice = match config.landlock {
            Choice::Off => self.bounds.landlock,
            asked => asked,
        };
        let rules = || {
            look_for_holders(config);
            let rules = Rules::of(config, true).with(&self.bounds.rules);
            rules.with_made(self.socket.as_deref())
        };
        landlock::restrict_by_choice(choice, rules)?;
        Ok(())
    }

    /// What follows a VM. `own`: where it failed, nobody has been told why.
    ///
    /// # Errors
    /// What the VM failed with, where the process ends with it
    fn after(
        &self,
        ended: Result<Ended, RunError>,
        extent: Option<Extent>,
        own: bool,
    ) -> Result<Next, RunError> {
        let asked = extent.is_some();
        let next = match ended {
            // What is left undone is this process's.
            Err(error @ (RunError::Unfinished { .. } | RunError::Panicked)) => return Err(error),
            Err(RunError::AskedEarly) => Next::Wait,
            // Whoever sent the signal wants the process to end.
            Err(RunError::StoppedEarly { .. }) => Next::End,
            Err(error) if own && !asked && self.lasting != Lasting::Kept => return Err(error),
            Err(error) => {
                log::error!("{error}");
                Next::Wait
            }
            Ok(Ended::PowerOff) => {
                log::info!("the guest powered off");
                match self.lasting {
                    Lasting::Kept => Next::Wait,
                    Lasting::Served | Lasting::Vm => Next::End,
                }
            }
            Ok(Ended::Quit) => Next::End,
            Ok(Ended::Asked) => Next::Wait,
        };
        match extent {
            Some(Extent::Process) => Ok(Next::End),
            Some(_) => Ok(Next::Wait),
            None => Ok(next),
        }
    }
}

impl From<VmConfig> for Definition {
    fn from(config: VmConfig) -> Self {
        Self {
            config,
            ..Self::default()
        }
    }
}
