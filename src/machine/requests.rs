//! What is asked of a machine from outside while it lives: by its control socket, today.
//!
//! Whoever asks has a [`Control`], on any thread. The machine's event loop takes the requests in order and
//! answers each once, at once or when what was asked for has happened; it never waits for that itself. Whoever asked waits for
//! the answer alone.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use busway_vfio::EventFd;
use serde::Serialize;

use super::RunError;
use crate::config::{DeviceConfig, VirtioConfig};
use crate::report::AssignedDevice;

/// How many requests wait to be taken; whoever asks then is refused.
const MOST: usize = 64;

/// Something that is asked of a machine.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// How it is.
    Info,
    /// Stop the guest between two instructions. Answered when no vCPU is in it and its virtio devices are
    /// quiet.
    Pause,
    /// Let a guest that was paused go on.
    Resume,
    /// Press the guest's power button. Answered when that is done, not when the guest has powered off.
    PowerButton,
    /// End the VM without asking the guest.
    Shutdown,
    /// Add functions of one host device, in an empty slot. Answered when they are in it.
    AddDevice(Vec<DeviceConfig>),
    /// Add a virtio device, for descriptors that were passed with the request, or for what the configuration names where
    /// there are none. Answered when the guest can find it.
    AddVirtio(Box<VirtioConfig>, Files),
    /// Have the guest release a device, and with it all in its slot. Answered when the host has it
    /// back, or when the guest is found not to release it.
    RemoveDevice {
        /// Its name, or its address on the host where it has none.
        id: String,
        /// Pull it out where the guest does not release it.
        force: bool,
        /// How long the guest has for it; what the configuration says, where nothing else is asked for.
        limit: Option<Duration>,
    },
}

/// Descriptors that were passed with the request. They are closed with the last clone.
#[derive(Clone, Debug, Default)]
pub struct Files(Arc<[OwnedFd]>);

impl Files {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> &[OwnedFd] {
        &self.0
    }
}

impl From<Vec<OwnedFd>> for Files {
    fn from(files: Vec<OwnedFd>) -> Self {
        Self(files.into())
    }
}

/// The same descriptors, by their numbers.
impl PartialEq for Files {
    fn eq(&self, other: &Self) -> bool {
        let numbers = |files: &Self| {
            files
                .all()
                .iter()
                .map(AsRawFd::as_raw_fd)
                .collect::<Vec<_>>()
        };
        numbers(self) == numbers(other)
    }
}

impl Eq for Files {}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub enum State {
    /// It is being put together: memory is taken, devices are opened.
    #[default]
    Created,
    /// The guest runs.
    Running,
    /// It was paused, and goes on when it is asked to.
    Paused,
    /// It is paused, or about to be, after an error of a device (`on_error=pause`); it goes on when it is asked to.
    Held,
}

/// How a machine is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// What it is doing.
    pub state: State,
    /// Bytes of RAM that the guest has; 0 while it is being put together.
    pub memory: u64,
    /// The host devices that the guest has; none while it is being put together.
    pub devices: Vec<AssignedDevice>,
    /// What they are called, by their addresses on the host.
    pub ids: BTreeMap<String, String>,
    /// How many devices can be added.
    pub empty_slots: usize,
    /// The virtio devices that the guest has and that can leave it; none while it is being put together.
    pub virtio: Vec<VirtioInfo>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is done.
    Done,
    /// To [`Request::Info`].
    Info(Info),
    /// To [`Request::AddDevice`] and [`Request::AddVirtio`].
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
    /// the VM has {0} already
    #[error("the VM has {0} already, or another device of that name")]
    Exists(String),
    /// the VM has no device {0}
    #[error("the VM has no device `{0}`")]
    Unknown(String),
    /// it was tried and failed
    #[error("{0}")]
    Failed(String),
    /// the VM has ended
    #[error("the VM has ended")]
    Ended,
    /// too many requests wait
    #[error("{MOST} requests wait already: ask again")]
    TooMany,
}

impl RequestError {
    /// That something was tried and failed, with every cause that its text leaves out.
    pub(super) fn failed(error: &dyn std::error::Error) -> Self {
        let mut text = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            let more = error.to_string();
            if !text.contains(&more) {
                text = format!("{text}: {more}");
            }
            cause = error.source();
        }
        Self::Failed(text)
    }
}

/// Who waits for the answer to a request. Dropped without one, the VM has ended.
#[derive(Debug)]
pub(super) struct Asker(SyncSender<Result<Answer, RequestError>>);

impl Asker {
    pub(super) fn answer(self, answer: Result<Answer, RequestError>) {
        // Who asked may wait no longer.
        let _ = self.0.send(answer);
    }
}

/// That somebody wants a device removed, other than the host.
#[derive(Debug)]
pub(super) struct Removal {
    pub(super) asker: Asker,
    /// Where the guest does not release it, it loses the device.
    pub(super) force: bool,
    /// How long the guest has for it.
    pub(super) limit: Duration,
}

#[derive(Debug)]
struct Mailbox {
    waiting: Mutex<Waiting>,
    signal: EventFd,
}

#[derive(Debug, Default)]
struct Waiting {
    requests: VecDeque<(Request, Asker)>,
    /// The event loop takes requests, or soon will; else the machine is being put together.
    open: bool,
    closed: bool,
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
            return Err(RequestError::Ended);
        }
        if !waiting.open && request == Request::Info {
            Asker(sender).answer(Ok(Answer::Info(Info::default())));
            return Ok(receiver);
        }
        if waiting.requests.len() >= MOST {
            return Err(RequestError::TooMany);
        }
        waiting.requests.push_back((request, Asker(sender)));
        self.0.signal.signal();
        Ok(receiver)
    }
}

/// The machine's end of its [`Control`]s. Dropping it tells all who ask that the VM has ended.
#[derive(Debug)]
pub struct Requests(Arc<Mailbox>);

impl Requests {
    /// Of a machine that is still to be put together. What is asked before it lives waits, but for
    /// [`Request::Info`].
    ///
    /// # Errors
    /// [`RunError::System`], of eventfd(2)
    pub fn new() -> Result<Self, RunError> {
        Ok(Self(Arc::new(Mailbox {
            waiting: Mutex::default(),
            signal: EventFd::new().map_err(RunError::system("eventfd"))?,
        })))
    }

    /// A handle for whoever asks things of the machine.
    #[must_use]
    pub fn control(&self) -> Control {
        Control(self.0.clone())
    }

    /// Whether anybody can ask.
    pub(super) fn can_be_asked(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }

    /// The machine lives: requests are taken from now on, and those that waited are signalled again.
    pub(super) fn open(&self) {
        let mut waiting = self.0.waiting();
        waiting.open = true;
        if !waiting.requests.is_empty() {
            self.0.signal.signal();
        }
    }

    /// Whether the end is among what is asked of a machine that does not live yet. That is granted; the rest
    /// waits on, and its signal is taken.
    pub(super) fn take_shutdown(&self) -> bool {
        let mut waiting = self.0.waiting();
        let _count = self.0.signal.take();
        let asked = std::mem::take(&mut waiting.requests).into_iter();
        let (ends, rest): (VecDeque<_>, VecDeque<_>) =
            asked.partition(|(request, _)| *request == Request::Shutdown);
        waiting.requests = rest;
        drop(waiting);
        let any = !ends.is_empty();
        for (_, asker) in ends {
            asker.answer(Ok(Answer::Done));
        }
        any
    }

    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.0.waiting().requests.len()
    }

    /// The next request. Nothing is left of the signal with the last one.
    pub(super) fn take(&self) -> Option<(Request, Asker)> {
        let mut waiting = self.0.waiting();
        let request = waiting.requests.pop_front();
        if waiting.requests.is_empty() {
            let _count = self.0.signal.take();
        }
        request
    }
}

#[cfg(test)]
impl Requests {
    /// A machine that lives, for tests of those who ask; what is returned plays it. Each request is answered
    /// with what `react` gives, or waits until the end where it gives nothing. The machine ends when a
    /// request to shut down is granted.
    pub(crate) fn play(
        self,
        mut react: impl FnMut(&Request) -> Option<Result<Answer, RequestError>> + Send,
    ) -> impl FnOnce() + Send {
        self.open();
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
            let ended = request == Request::Shutdown && answer.is_ok();
            asker.answer(answer);
            if ended {
                return;
            }
        }
    }
}

impl Drop for Requests {
    fn drop(&mut self) {
        let mut waiting = self.0.waiting();
        waiting.closed = true;
        waiting.requests.clear();
    }
}

impl AsRawFd for Requests {
    fn as_raw_fd(&self) -> RawFd {
        self.0.signal.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn each_request_is_answered_once_and_in_order() {
        let requests = Requests::new().unwrap();
        let control = requests.control();
        let Ok(Answer::Info(info)) = control.ask(Request::Info) else {
            panic!("while it is put together, it says so at once");
        };
        assert_eq!(info.state, State::Created);
        requests.open();
        let first = control.send(Request::Pause).unwrap();
        let second = control.send(Request::Info).unwrap();
        let (one, asker) = requests.take().unwrap();
        assert_eq!((one, requests.count()), (Request::Pause, 1));
        asker.answer(Ok(Answer::Done));
        let (two, asker) = requests.take().unwrap();
        assert_eq!(two, Request::Info);
        asker.answer(Err(RequestError::State("paused")));
        assert_eq!(first.recv(), Ok(Ok(Answer::Done)));
        assert_eq!(second.recv(), Ok(Err(RequestError::State("paused"))));
        assert!(requests.take().is_none());
    }

    #[test]
    fn whoever_waits_or_comes_later_is_told_of_the_end() {
        let requests = Requests::new().unwrap();
        let control = requests.control();
        requests.open();
        let taken = control.send(Request::Pause).unwrap();
        let (_, asker) = requests.take().unwrap();
        let waits = {
            let control = control.clone();
            thread::spawn(move || control.ask(Request::Info))
        };
        while requests.count() == 0 {
            thread::yield_now();
        }
        drop(requests);
        drop(asker);
        assert_eq!(waits.join().unwrap(), Err(RequestError::Ended));
        assert!(taken.recv().is_err());
        assert_eq!(control.ask(Request::Info), Err(RequestError::Ended));
    }

    #[test]
    fn no_more_wait_than_fit() {
        let requests = Requests::new().unwrap();
        let control = requests.control();
        requests.open();
        let kept: Vec<_> = (0..MOST).map(|_| control.send(Request::Info)).collect();
        assert!(kept.iter().all(Result::is_ok));
        assert_eq!(
            control.send(Request::Info).unwrap_err(),
            RequestError::TooMany
        );
    }
}
