//! A restart of the machine, with an ear for what ends it.
//!
//! The kernel waits up to a minute for a device that does not come back from its reset, and is not to be
//! interrupted in that. Linux, drivers/pci/pci.c, `pci_dev_wait`. So devices are reset on a thread of
//! their own: a signal is heard meanwhile, and no reset begins after it.

use std::io;
use std::os::fd::AsRawFd;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

use busway_pci::PciFunction;
use busway_vfio::EventFd;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::RunError;
use super::assembly::Machine;
use super::life::Ended;
use super::signals::Signals;
use crate::kvm::KvmError;

impl Machine {
    /// Puts everything into its state at power-on, and loads the kernel anew. Host devices are reset,
    /// and stay with the VM. Where a signal or a person at the console ends the VM meanwhile, it is
    /// only good for that.
    pub(super) fn restart(&mut self, signals: &Signals) -> Result<Option<Ended>, RunError> {
        let Self {
            vcpus,
            pci,
            passthrough,
            events,
            vm,
            quit,
            ..
        } = self;
        let (topology, resets) = (pci.topology(), Resets::default());
        let reset = || -> Result<(), KvmError> {
            vcpus.hold();
            passthrough.attached.on_restart(topology);
            events.clear();
            // A device's pin is connected anew by its reset, and what it signals then must not be
            // forgotten by the chips.
            vm.reset_chips()?;
            topology.reset_while(|function| resets.go_on(function));
            Ok(())
        };
        let (done, ended) = with_an_ear(signals, quit, &resets, reset)?;
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
    /// Whether `function` is to be reset, which comes next.
    fn go_on(&self, function: &dyn PciFunction) -> bool {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Some(function.name());
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

// What is waited for.
const SIGNAL: u64 = 0;
const QUIT: u64 = 1;
const DONE: u64 = 2;

/// Signals when it is dropped, in a panic too.
struct Done<'a>(&'a EventFd);

impl Drop for Done<'_> {
    fn drop(&mut self) {
        self.0.signal();
    }
}

/// Has `work` done on a thread of its own, and gives what came of it. At a signal, or when the console
/// is left, `resets` are stopped, and the VM ends: its guest is between two lives, and has nothing to
/// power off.
fn with_an_ear<T: Send>(
    signals: &Signals,
    quit: &EventFd,
    resets: &Resets,
    work: impl FnOnce() -> T + Send,
) -> Result<(T, Option<Ended>), RunError> {
    let done = EventFd::new().map_err(RunError::system("eventfd"))?;
    let epoll = Epoll::new().map_err(RunError::system("epoll_create"))?;
    for (fd, source) in [
        (signals.as_raw_fd(), SIGNAL),
        (quit.as_raw_fd(), QUIT),
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
        let ended = listen(&epoll, signals, resets);
        let result = working.join().unwrap_or_else(|panic| resume_unwind(panic));
        Ok((result, ended?))
    })
}

/// Waits for the end of the work, or for what ends the VM before.
fn listen(epoll: &Epoll, signals: &Signals, resets: &Resets) -> Result<Option<Ended>, RunError> {
    let mut ready = [EpollEvent::default()];
    loop {
        match epoll.wait(-1, &mut ready) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result.map_err(RunError::system("epoll_wait"))?,
        };
        let [event] = ready;
        match event.data() {
            SIGNAL => {
                if let Some(signal) = signals.take() {
                    resets.stop(&format!("signal {signal}"));
                    return Ok(Some(Ended::PowerOff));
                }
            }
            QUIT => {
                resets.stop("the console was left");
                return Ok(Some(Ended::Quit));
            }
            _ => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use busway_pci::HostBridge;

    use super::*;

    /// Resets functions for as long as nobody says stop.
    fn reset_on_and_on(resets: &Resets) -> bool {
        let (start, bridge) = (Instant::now(), HostBridge::new());
        while resets.go_on(&bridge) {
            if start.elapsed() > Duration::from_secs(20) {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
        }
        true
    }

    #[test]
    fn a_signal_and_a_person_stop_the_resets_and_end_the_vm() {
        let (signals, quit) = (Signals::new().unwrap(), EventFd::new().unwrap());
        let untouched = with_an_ear(&signals, &quit, &Resets::default(), || 7).unwrap();
        assert_eq!(untouched, (7, None));
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGHUP) };
        let resets = Resets::default();
        let stopped = with_an_ear(&signals, &quit, &resets, || reset_on_and_on(&resets)).unwrap();
        assert_eq!(stopped, (true, Some(Ended::PowerOff)));
        let (left, resets) = (quit.clone(), Resets::default());
        let work = || {
            left.signal();
            reset_on_and_on(&resets)
        };
        let stopped = with_an_ear(&signals, &quit, &resets, work).unwrap();
        assert_eq!(stopped, (true, Some(Ended::Quit)));
    }
}
