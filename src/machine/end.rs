//! The end of a machine: all that it has is given back, and whoever does not want to wait for that can end the process.

use std::ops::ControlFlow;
use std::time::Duration;

use super::RunError;
use super::assembly::Machine;
use super::life::Ended;
use super::long_work::{LongWork, WorkEvent};
use super::passthrough::OpenDevices;
use super::requests::{Extent, Info, Requests};
use super::signals::Signals;
use crate::notify;

/// How long the end may take of a VM that was to be killed.
const KILLED_LIMIT: Duration = Duration::from_secs(5);

impl Machine {
    /// Gives everything back, which takes as long as the kernel needs to reset and close the devices. A signal
    /// meanwhile is the end at once, and so is [`KILLED_LIMIT`] where a second signal has come before: `ended`
    /// says how the guest did. What is not given back then, the kernel takes with the process.
    ///
    /// A process that outlives the VM has an `audience`: a first signal is then for the process, which ends when
    /// all is given back.
    ///
    /// # Errors
    /// What `ended` is, or [`RunError::Unfinished`]
    pub(super) fn end(
        self: Box<Self>,
        signals: &Signals,
        audience: Option<&Audience<'_>>,
        ended: Result<Ended, RunError>,
    ) -> Result<Ended, RunError> {
        let devices = self.passthrough.open_devices();
        if audience.is_none() {
            let status = "The VM ends, and its devices are given back";
            notify::stopping(status, Duration::ZERO, devices.names().len());
        }
        give_back(self, &devices, signals, audience, ended, KILLED_LIMIT)
    }
}

/// Who can ask while a VM is given back, and what they are told of it.
pub(super) struct Audience<'a> {
    pub(super) requests: &'a Requests,
    pub(super) info: Info,
}

impl Audience<'_> {
    /// Whether that was the first to want the process to end.
    fn hears_signal(&self) -> bool {
        let first = self.requests.extent() != Some(Extent::Process);
        self.requests.end_process();
        first
    }
}

/// Drops `all`, which closes `devices`, on a thread of its own.
fn give_back<T: Send + 'static>(
    all: T,
    devices: &OpenDevices,
    signals: &Signals,
    audience: Option<&Audience<'_>>,
    ended: Result<Ended, RunError>,
    killed_limit: Duration,
) -> Result<Ended, RunError> {
    let killed = matches!(ended, Err(RunError::Killed { .. }));
    let long_work = LongWork {
        signals,
        quit: None,
        requests: audience.map(|audience| audience.requests),
        limit: killed.then_some(killed_limit),
    };
    let result = long_work.during(
        "end",
        move || drop(all),
        |event| {
            ControlFlow::Break(match event {
                WorkEvent::Signal(signal) if audience.is_some_and(Audience::hears_signal) => {
                    log::info!("signal {signal}: the process ends when all is given back");
                    return ControlFlow::Continue(());
                }
                WorkEvent::Request => {
                    if let Some(Audience { requests, info }) = audience {
                        requests.attend(|| info.clone());
                    }
                    return ControlFlow::Continue(());
                }
                WorkEvent::Signal(signal) => RunError::unfinished("ending", signal, devices),
                _ => RunError::Unfinished {
                    why: format!(
                        "the guest was killed, and {} s went by",
                        killed_limit.as_secs()
                    ),
                    doing: "ending",
                    devices: devices.names(),
                },
            })
        },
    );
    match (result, ended) {
        (Ok(()), ended) => ended,
        (Err(unfinished), Ok(_) | Err(RunError::Killed { .. })) => Err(unfinished),
        (Err(unfinished), Err(error)) => {
            log::error!("{error}");
            Err(unfinished)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Instant;

    use super::super::requests::{Answer, Request};
    use super::*;

    /// What is given back when the test lets it.
    struct Slow(mpsc::Receiver<()>);

    impl Drop for Slow {
        fn drop(&mut self) {
            let _word = self.0.recv();
        }
    }

    fn signal(number: libc::c_int) {
        // SAFETY: the signal is blocked in this thread, which is the one it goes to.
        unsafe { libc::pthread_kill(libc::pthread_self(), number) };
    }

    #[test]
    fn the_end_waits_for_the_kernel_unless_a_signal_comes() {
        let (signals, devices) = (Signals::new().unwrap(), OpenDevices::default());
        for ended in [Ok(Ended::Asked), Err(RunError::Panicked)] {
            let (go_on, waits) = mpsc::channel();
            let said = format!("{ended:?}");
            go_on.send(()).unwrap();
            let result = give_back(Slow(waits), &devices, &signals, None, ended, KILLED_LIMIT);
            assert_eq!(format!("{result:?}"), said);
        }
        for ended in [
            Ok(Ended::Asked),
            Err(RunError::Panicked),
            Err(RunError::Killed { signal: 2 }),
        ] {
            let (_never, waits) = mpsc::channel();
            signal(libc::SIGHUP);
            let start = Instant::now();
            let result = give_back(Slow(waits), &devices, &signals, None, ended, KILLED_LIMIT);
            let error = result.unwrap_err();
            let said = error.to_string();
            assert!(
                said.starts_with("signal 1 came while the VM was ending"),
                "{said}"
            );
            assert_eq!(error.exit_status(), crate::exit::RUNTIME);
            assert!(start.elapsed() < KILLED_LIMIT, "{:?}", start.elapsed());
        }
    }

    #[test]
    fn a_process_that_goes_on_answers_meanwhile_and_its_first_signal_waits_for_the_end() {
        let (signals, devices) = (Signals::new().unwrap(), OpenDevices::default());
        let requests = Requests::new().unwrap();
        let control = requests.control();
        let (go_on, waits) = mpsc::channel();
        signal(libc::SIGHUP);
        let audience = Audience {
            requests: &requests,
            info: Info::default(),
        };
        let asking = std::thread::spawn(move || {
            let told = control.ask(Request::Info);
            go_on.send(()).unwrap();
            told
        });
        let ended = Ok(Ended::Asked);
        let audience = Some(&audience);
        let result = give_back(
            Slow(waits),
            &devices,
            &signals,
            audience,
            ended,
            KILLED_LIMIT,
        );
        assert_eq!(result.unwrap(), Ended::Asked);
        assert_eq!(asking.join().unwrap(), Ok(Answer::Info(Box::default())));
        assert_eq!(requests.extent(), Some(Extent::Process));
    }

    #[test]
    fn a_vm_that_was_killed_by_a_second_signal_ends_in_time() {
        let (signals, devices) = (Signals::new().unwrap(), OpenDevices::default());
        let (_never, waits) = mpsc::channel();
        let killed = Err(RunError::Killed { signal: 2 });
        let result = give_back(
            Slow(waits),
            &devices,
            &signals,
            None,
            killed,
            Duration::from_millis(20),
        );
        let said = result.unwrap_err().to_string();
        assert!(
            said.contains("0 s went by while the VM was ending"),
            "{said}"
        );
    }
}
