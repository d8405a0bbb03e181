//! What is asked of a machine from outside: by its control socket, today.
//!
//! Whoever asks has a [`Control`], on any thread. The main thread takes the requests in order, whatever it has: no
//! VM, one that is to be, or one that lives. It answers each once, at once or when what was asked for has
//! happened; it never waits for that itself. Whoever asked waits for the answer alone.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use busway_vfio::EventFd;

use super::RunError;
use super::handed::{Files, Handed};
use super::observed::{Observed, State};
use crate::config::{DeviceConfig, NoZoneError, VirtioConfig, VmConfig};
use crate::report::AssignedDevice;
use crate::sandbox::{jail_remedy, landlock};
use crate::shortage;

/// How many requests wait to be taken; whoever asks then is refused.
const MOST: usize = 64;

/// Something that is asked of a machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// How it is.
    Info,
    /// What its vCPUs and devices have done.
    Observe,
    /// Remember what the VM is to be, where there is none, with what was passed with the request for it.
    Create(Box<VmConfig>, Handed),
    /// Put the VM together and let its guest begin; one that was paused goes on. Answered when the guest runs, or
    /// when it is known that it will not.
    Boot,
    /// Have the guest start anew, as its own reset does. Answered when it runs again.
    Reboot,
    /// Give each of the guest's processors a non-maskable interrupt.
    Nmi,
    /// Stop the guest between two instructions. Answered when no vCPU is in it and its virtio devices are
    /// quiet.
    Pause,
    /// Let a guest that was paused go on.
    Resume,
    /// Press the guest's power button. Answered when that is done, not when the guest has powered off.
    PowerButton,
    /// End the VM without asking the guest, and so much with it. Answered when all is given back; where the
    /// process ends as well, whoever asked is dropped unanswered then.
    End(Extent),
    /// Add functions of one host device, in an empty slot; where a descriptor was passed with the request, the only
    /// one, by that. Answered when they are in it.
    AddDevice(Vec<DeviceConfig>, Files),
    /// Add a virtio device, for descriptors that were passed with the request, or for what the configuration names where
    /// there are none. Answered when the guest can find it.
    AddVirtio(Box<VirtioConfig>, Files),
    /// Give the guest so many processors.
    Resize {
        /// How many.
        vcpus: u16,
        /// Answered when the guest has them, and no more, or when it is found to keep some; else when it has been asked.
        wait: bool,
    },
    /// Have the guest have so many bytes of RAM, with those that it started with. Answered when its driver is told, which
    /// for RAM that comes by ACPI is when devices reach it.
    ResizeMemory(u64),
    /// Have the guest have so many bytes of RAM of one zone, with those that it started with. Answered when its driver is told.
    ResizeZone {
        /// The zone's name.
        id: String,
        /// Bytes.
        bytes: u64,
    },
    /// Have the balloon be of so many bytes. Answered when the guest's driver is told.
    ResizeBalloon(u64),
    /// Have the guest release a device, and with it all in its slot.
    RemoveDevice {
        /// Its name, or its address on the host where it has none.
        id: String,
        /// Pull it out where the guest does not release it.
        force: bool,
        /// How long the guest has for it; what the configuration says, where nothing else is asked for.
        limit: Option<Duration>,
        /// Answered when the host has it back, or when the guest is found not to release it; else when the guest
        /// has been asked, and the device is not shown among the VM's any more.
        wait: bool,
    },
}

/// What ends, from the least to the most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Extent {
    /// The VM, which can be booted again.
    Vm,
    /// What it was to be as well.
    Definition,
    /// All that this process does.
    Process,
}

/// How a machine is.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Info {
    /// What it is doing.
    pub state: State,
    /// What it is made of, or is to be: with what has come since its start, and without what has gone. What was left to
    /// the host is as the host has it, where that is known: `cpus.core_scheduling`.
    pub config: VmConfig,
    /// Bytes of RAM that the guest has; 0 while it is being put together.
    pub memory: u64,
    /// Bytes that it has of each memory zone to which RAM can come, by their names; none while it is being put together.
    pub zones: BTreeMap<String, u64>,
    /// Bytes of it that are in the guest's balloon.
    pub balloon: u64,
    /// The host devices that the guest has; none while it is being put together.
    pub devices: Vec<AssignedDevice>,
    /// What they are called, by their addresses on the host.
    pub ids: BTreeMap<String, String>,
    /// How many devices can be added.
    pub empty_slots: usize,
    /// The virtio devices that the guest has and that can leave it; none while it is being put together.
    pub virtio: Vec<VirtioInfo>,
    /// Where the serial port is to be found, where that is not said by the configuration: a pseudo-terminal.
    pub serial: Option<PathBuf>,
    /// The same of the console.
    pub console: Option<PathBuf>,
}

impl Info {
    /// Of a VM that is to be `config`, and has nothing yet.
    pub(super) fn of(config: &VmConfig, state: State) -> Self {
        Self {
            state,
            config: config.clone(),
            ..Self::default()
        }
    }

    /// What there is to be observed of a machine of which no more than this can be told now.
    pub(super) fn observed(&self) -> Answer {
        Answer::Observed(Box::new(Observed::of(self.state, self.memory)))
    }
}

/// A virtio device that a guest has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VirtioInfo {
    /// What it is called.
    pub id: String,
    /// Its address in the guest.
    pub address: String,
    /// What it is.
    pub config: VirtioConfig,
}

/// The answer to a request that was granted.
#[derive(Clone, Debug, PartialEq)]
pub enum Answer {
    /// It is done. To [`Request::AddDevice`] and [`Request::AddVirtio`]: the VM will have it when it is booted.
    Done,
    /// To [`Request::Info`].
    Info(Box<Info>),
    /// To [`Request::Observe`].
    Observed(Box<Observed>),
    /// To [`Request::AddDevice`] and [`Request::AddVirtio`], where the guest can have it now.
    Added(Added),
    /// To [`Request::RemoveDevice`] where the slot had several functions: what they were called, all of them.
    RemovedTogether(Vec<String>),
}

/// What was added: the functions of one device, in the order of their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Added {
    /// Its first function, and mostly its only one.
    pub first: AddedFunction,
    /// The others.
    pub others: Vec<AddedFunction>,
    /// Whether a driver of the guest's attends to the slot. Where none does the guest is still booting, or has
    /// none, and finds the device when it has one.
    pub attended: bool,
}

impl Added {
    /// A device of one function, which the guest hears of.
    pub(crate) fn one(id: String, address: String) -> Self {
        Self {
            first: AddedFunction { id, address },
            others: Vec::new(),
            attended: true,
        }
    }
}

/// One function of a device that was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddedFunction {
    /// What it is called from now on.
    pub id: String,
    /// Its address in the guest.
    pub address: String,
}

/// Why a request was not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// the guest is {0}, ...
    #[error("the guest is {0}")]
    State(&'static str),
    /// there is no VM, nor what it is to be
    #[error("VM is not created")]
    NotCreated,
    /// there is a VM, or what it is to be
    #[error("VM is already created")]
    AlreadyCreated,
    /// there is no VM that runs
    #[error("VM is not running")]
    NotRunning,
    /// what was asked for contradicts itself
    #[error("{0}")]
    Invalid(String),
    /// the VM has {0} already
    #[error("the VM has {0} already, or another device of that name")]
    Exists(String),
    /// the VM has no device {0}
    #[error("the VM has no device `{0}`")]
    Unknown(String),
    /// there is no memory zone of this name
    #[error(transparent)]
    NoZone(NoZoneError),
    /// it was tried and failed
    #[error("{0}")]
    Failed(String),
    /// the VM has ended
    #[error("the VM has ended")]
    Ended,
    /// processors that were asked for are not released yet
    #[error(
        "Too Many Requests: the guest is releasing processors that it was asked for before; ask again when it has, or \
         has refused"
    )]
    Resizing,
    /// RAM that was asked for before is still on its way
    #[error(
        "Too Many Requests: RAM that was asked for before is still being mapped; ask again when that is answered"
    )]
    Growing,
    /// too many requests wait
    #[error("{MOST} requests wait already: ask again")]
    TooMany,
}

impl RequestError {
    /// That something was tried and failed, with every cause that its text leaves out.
    pub(super) fn failed(error: &(dyn std::error::Error + 'static)) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        let bounds = || landlock::remedy(error).or_else(|| jail_remedy(error));
        if let Some(remedy) = shortage::remedy(error, &text).or_else(|| bounds().map(Into::into)) {
            text = format!("{text}: {remedy}");
        }
        Self::Failed(text)
    }
}

/// Who waits for the answer to a request. Dropped without one, the VM has ended.
#[derive(Debug)]
pub(super) struct Asker {
    sender: SyncSender<Result<Answer, RequestError>>,
}

impl Asker {
    pub(super) fn answer(self, answer: Result<Answer, RequestError>) {
        // Who asked may wait no longer.
        let _ = self.sender.send(answer);
    }
}

impl From<SyncSender<Result<Answer, RequestError>>> for Asker {
    fn from(sender: SyncSender<Result<Answer, RequestError>>) -> Self {
        Self { sender }
    }
}

#[derive(Debug)]
struct Mailbox {
    waiting: Mutex<Waiting>,
    signal: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<(Request, Asker)>,
    closed: bool,
    /// What who asks for it is told from then on.
    last: Option<Box<Info>>,
}

impl Mailbox {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Asks things of a machine, from any thread.
#[derive(Clone, Debug)]
pub struct Control(Arc<Mailbox>);

impl Control {
    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`RequestError`]
    pub fn ask(&self, request: Request) -> Result<Answer, RequestError> {
        let answer = self.send(request)?;
        // It is dropped unanswered where the machine ends meanwhile.
        answer.recv().unwrap_or(Err(RequestError::Ended))
    }

    fn send(
        &self,
        request: Request,
    ) -> Result<Receiver<Result<Answer, RequestError>>, RequestError> {
        let (sender, receiver) = sync_channel(1);
        let mut waiting = self.0.waiting();
        if waiting.closed {
            return match (&waiting.last, request) {
                (Some(info), Request::Info) => {
                    Asker::from(sender).answer(Ok(Answer::Info(info.clone())));
                    Ok(receiver)
                }
                (Some(info), Request::Observe) => {
                    Asker::from(sender).answer(Ok(info.observed()));
                    Ok(receiver)
                }
                _ => Err(RequestError::Ended),
            };
        }
        if waiting.requests.len() >= MOST {
            return Err(RequestError::TooMany);
        }
        waiting.requests.push_back((request, sender.into()));
        self.0.signal.signal();
        Ok(receiver)
    }
}

/// The main thread's end of its [`Control`]s. Dropping it tells all who ask that the VM has ended.
#[derive(Debug)]
pub struct Requests {
    mailbox: Arc<Mailbox>,
    /// Who has asked for the end, which is under way.
    ending: RefCell<Ending>,
}

/// Who has asked for an end that is under way, and for how much.
#[derive(Debug, Default)]
pub(super) struct Ending {
    pub(super) extent: Option<Extent>,
    askers: Vec<Asker>,
}

impl Ending {
    /// The end is over: those who wanted no more than that know it now. Who wants the process to end is told by its
    /// end.
    pub(super) fn finish(self) {
        for asker in self.askers {
            asker.answer(Ok(Answer::Done));
        }
    }
}

impl Requests {
    /// Of a process that has no VM yet. What is asked before somebody looks waits.
    ///
    /// # Errors
    /// [`RunError::System`], of eventfd(2)
    pub fn new() -> Result<Self, RunError> {
        Ok(Self {
            mailbox: Arc::new(Mailbox {
                waiting: Mutex::default(),
                signal: EventFd::new().map_err(RunError::system("eventfd"))?,
            }),
            ending: RefCell::default(),
        })
    }

    /// A handle for whoever asks things of the machine.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(self.mailbox.clone())
    }

    /// Whether anybody can ask.
    pub(super) fn can_be_asked(&self) -> bool {
        Arc::strong_count(&self.mailbox) > 1
    }

    /// Takes no more requests. Who asks how the machine is, which is being given back, is told `info`.
    pub(super) fn close(self, info: Info) {
        self.waiting().last = Some(Box::new(info));
    }

    /// Signals again what waits: nobody has looked at it for a while, or has left it.
    pub(super) fn rouse(&self) {
        if !self.waiting().requests.is_empty() {
            self.mailbox.signal.signal();
        }
    }

    /// Answers what waits now and can be answered whatever is under way: how the machine is, by `info`. Who asks for
    /// the end is kept until it is over. The rest waits on, until somebody [rouses](Self::rouse) it; its signal
    /// is taken. Gives whether the end was asked for.
    pub(super) fn attend(&self, info: impl Fn() -> Info) -> bool {
        let asked = {
            let mut waiting = self.waiting();
            let _count = self.mailbox.signal.take();
            std::mem::take(&mut waiting.requests)
        };
        let (mut ends, mut rest) = (false, VecDeque::new());
        for (request, asker) in asked {
            match request {
                Request::Info => asker.answer(Ok(Answer::Info(Box::new(info())))),
                Request::Observe => asker.answer(Ok(info().observed())),
                Request::End(extent) => {
                    self.end(extent, asker);
                    ends = true;
                }
                other => rest.push_back((other, asker)),
            }
        }
        // Others may have come meanwhile, and come after these.
        let mut waiting = self.waiting();
        rest.append(&mut waiting.requests);
        waiting.requests = rest;
        ends
    }

    /// Keeps who asked for the end until it is over.
    pub(super) fn end(&self, extent: Extent, asker: Asker) {
        let mut ending = self.ending.borrow_mut();
        ending.extent = ending.extent.max(Some(extent));
        // Who wants the process to end sees it end, and is told nothing before.
        if extent < Extent::Process {
            ending.askers.push(asker);
        }
    }

    /// The process is to end with the VM: a signal says so.
    pub(super) fn end_process(&self) {
        self.ending.borrow_mut().extent = Some(Extent::Process);
    }

    /// How much is to end, where somebody has asked for that.
    pub(super) fn extent(&self) -> Option<Extent> {
        self.ending.borrow().extent
    }

    /// The end that was asked for, once it is over.
    pub(super) fn take_ending(&self) -> Ending {
        self.ending.take()
    }

    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.waiting().requests.len()
    }

    /// The next request. Nothing is left of the signal with the last one.
    pub(super) fn take(&self) -> Option<(Request, Asker)> {
        let mut waiting = self.waiting();
        let request = waiting.requests.pop_front();
        if waiting.requests.is_empty() {
            let _count = self.mailbox.signal.take();
        }
        request
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.mailbox.waiting()
    }
}

#[cfg(test)]
impl Requests {
    /// A machine that its process ends with, for tests of those who ask; what is returned plays it. Each request is
    /// answered with what `react` gives, or waits until the end where it gives nothing. The machine ends when an end
    /// is granted, which who asked for it sees.
    pub(crate) fn play(
        self,
        mut react: impl FnMut(&Request) -> Option<Result<Answer, RequestError>> + Send,
    ) -> impl FnOnce() + Send {
        let mut unanswered = Vec::new();
        move || loop {
            let Some((request, asker)) = self.take() else {
                std::thread::sleep(std::time::Duration::from_millis(1));
                continue;
            };
            let Some(answer) = react(&request) else {
                unanswered.push(asker);
                continue;
            };
            if matches!(request, Request::End(_)) && answer.is_ok() {
                return;
            }
            asker.answer(answer);
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.requests.clear();
    }
}

impl AsRawFd for Requests {
    fn as_raw_fd(&self) -> RawFd {
        self.mailbox.signal.as_raw_fd()
    }
}

#[cfg(test)]
mod tests;
