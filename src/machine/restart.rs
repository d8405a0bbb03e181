//! A restart of the machine, with an ear for what ends it.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset, and is not to be
//! interrupted in that. Linux, drivers/pci/pci.c, `pci_dev_wait`. So devices are reset on a thread of
//! their own: signals and requests are heard meanwhile, and no reset begins after one that ends the VM.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::RunError;
use super::assembly::Machine;
use super::life::Ended;
use super::requests::{Answer, Info, Request, RequestError, Requests};
use super::signals::Signals;
use crate::kvm::KvmError;

impl Machine {
    /// Puts everything into its state at power-on, and loads the kernel anew. Host devices are reset,
    /// and stay with the VM. Where a signal or a person at the console ends the VM meanwhile, it is
    /// only good for that.
    pub(super) fn restart(
        &mut self,
        signals: &Signals,
        info: &Info,
    ) -> Result<Option<Ended>, RunError> {
        let Self {
            requests,
            vcpus,
            pci,
            passthrough,
            events,
            vm,
            quit,
            ..
        } = self;
        let (topology, resets) = (pci.topology(), Resets::default());
        let virtio = pci.virtio();
        let reset = || -> Result<(), KvmError> {
            vcpus.hold();
            passthrough.attached.on_restart(topology);
            events.clear();
            // A device's pin is connected anew by its reset, and what it signals then must not be
            // forgotten by the chips.
            vm.reset_chips()?;
            topology.reset_while(|function| resets.go_on(&function.name()));
            // The guest's memory is about to be another's.
            virtio.wait_settled(|what| resets.go_on(what));
            Ok(())
        };
        let ears = Ears {
            signals,
            quit,
            requests,
            info,
        };
        let (done, ended) = with_an_ear(&ears, &resets, reset)?;
        done?;
        if ended.is_none() {
            self.platform.reset();
            self.vcpus.reset()?;
            self.load()?;
        }
        Ok(ended)
    }
}

/// How far the resets have come.
#[derive(Debug, Default)]
struct Resets {
    stop: AtomicBool,
    /// The function that is being reset.
    current: Mutex<Option<String>>,
}

impl Resets {
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

/// Who is heard during a restart.
struct Ears<'a> {
    signals: &'a Signals,
    quit: &'a EventFd,
    requests: &'a Requests,
    /// How the machine is, for who asks.
    info: &'a Info,
}

// What is waited for.
const SIGNAL: u64 = 0;
const QUIT: u64 = 1;
const DONE: u64 = 2;
const REQUEST: u64 = 3;

/// Signals when it is dropped, in a panic too.
struct Done<'a>(&'a EventFd);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.signal();
    }
}

/// Has `work` done on a thread of its own, and gives what came of it. At a signal, when the console is
/// left, or where that is asked for, `resets` are stopped, and the VM ends: its guest is between two
/// lives, and has nothing to power off.
fn with_an_ear<T: Send>(
    ears: &Ears<'_>,
    resets: &Resets,
    work: impl FnOnce() -> T + Send,
) -> Result<(T, Option<Ended>), RunError> {
    let done = EventFd::new().map_err(RunError::system("eventfd"))?;
    let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
    for (fd, source) in [
        (ears.signals.as_raw_fd(), SIGNAL),
        (ears.quit.as_raw_fd(), QUIT),
        (ears.requests.as_raw_fd(), REQUEST),
        (done.as_raw_fd(), DONE),
    ] {
        let event = EpollEvent::new(EventSet::IN, source);
        epoll
            .ctl(ControlOperation::Add, fd, event)
            .map_err(RunError::system("epoll_ctl"))?;
    }
    thread::scope(|scope| {
        let working = thread::Builder::new()
            .name("restart".to_owned())
            .spawn_scoped(scope, || {
                let _done = Done(&done);
                work()
            })
            .map_err(RunError::system("a thread for the restart"))?;
        let ended = listen(&epoll, ears, resets);
        let result = working.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((result, ended?))
    })
}

impl Ears<'_> {
    /// Answers who asks now, and says whether that was for the end.
    fn answer(&self) -> bool {
        for _ in 0..self.requests.count().max(1) {
            let Some((request, asker)) = self.requests.take() else {
                break;
            };
            match request {
                Request::Info => asker.answer(Ok(Answer::Info(self.info.clone()))),
                Request::Shutdown => {
                    asker.answer(Ok(Answer::Done));
                    return true;
                }
                _ => asker.answer(Err(RequestError::State("restarting: ask again"))),
            }
        }
        false
    }
}

/// Waits for the end of the work, or for what ends the VM before.
fn listen(epoll: &Epoll, ears: &Ears<'_>, resets: &Resets) -> Result<Option<Ended>, RunError> {
    let mut ready = [EpollEvent::default()];
    loop {
        match epoll.wait(-1, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(RunError::system("epoll_wait"))?,
        };
        let [event] = ready;
        match event.data() {
            SIGNAL => {
                if let Some(signal) = ears.signals.take() {
                    resets.stop(&format!("signal {signal}"));
                    return Ok(Some(Ended::PowerOff));
                }
            }
            QUIT => {
                resets.stop("the console was left");
                return Ok(Some(Ended::Quit));
            }
            REQUEST => {
                if ears.answer() {
                    resets.stop("the control socket asks for the end");
                    return Ok(Some(Ended::Asked));
                }
            }
            _ => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use busway_pci::{HostBridge, PciFunction};

    use super::*;

    /// Resets functions for as long as nobody says stop.
    fn reset_on_and_on(resets: &Resets) -> bool {
        let (start, bridge) = (Instant::now(), HostBridge::new());
        while resets.go_on(&bridge.name()) {
            if start.elapsed() > Duration::from_secs(20) {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    #[test]
    fn who_asks_is_answered_and_a_signal_a_person_and_a_request_end_the_vm() {
        let (signals, quit) = (Signals::new().unwrap(), EventFd::new().unwrap());
        let (requests, info) = (Requests::new().unwrap(), Info::default());
        requests.open();
        let ears = Ears {
            signals: &signals,
            quit: &quit,
            requests: &requests,
            info: &info,
        };
        let untouched = with_an_ear(&ears, &Resets::default(), || 7).unwrap();
        assert_eq!(untouched, (7, None));
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) };
        let resets = Resets::default();
        let stopped = with_an_ear(&ears, &resets, || reset_on_and_on(&resets)).unwrap();
        assert_eq!(stopped, (true, Some(Ended::PowerOff)));
        let (left, resets) = (quit.clone(), Resets::default());
        let work = || {
            left.signal();
            reset_on_and_on(&resets)
        };
        let stopped = with_an_ear(&ears, &resets, work).unwrap();
        assert_eq!(stopped, (true, Some(Ended::Quit)));
        let _left = quit.take();
        let (control, resets) = (requests.control(), Resets::default());
        let work = || {
            let info = control.ask(Request::Info);
            let pause = control.ask(Request::Pause);
            let end = control.ask(Request::Shutdown);
            (info, pause, end, reset_on_and_on(&resets))
        };
        let (answers, ended) = with_an_ear(&ears, &resets, work).unwrap();
        let restarting = Err(RequestError::State("restarting: ask again"));
        let answered = (
            Ok(Answer::Info(Info::default())),
            restarting,
            Ok(Answer::Done),
            true,
        );
        assert_eq!((answers, ended), (answered, Some(Ended::Asked)));
    }
}
