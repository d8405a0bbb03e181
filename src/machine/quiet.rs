//! The virtio devices of a guest that is paused: they are quiet from the time when no vCPU is in it, and go
//! on before one is again. A device that is assigned is the guest's own, and is left alone.

use std::sync::{Arc, Weak};
use std::time::Duration;

use super::aside::Aside;
use crate::virtio::VirtioPci;

/// How often it is looked whether the host has given back what it has: nothing tells of that by itself.
const SETTLE: Duration = Duration::from_millis(20);

/// The virtio functions of a machine, for whoever pauses them, on any thread. Those that are gone need
/// nothing.
#[derive(Clone, Debug, Default)]
pub(super) struct VirtioFunctions(Vec<Weak<VirtioPci>>);

impl VirtioFunctions {
    pub(super) fn push(&mut self, function: &Arc<VirtioPci>) {
        self.0.retain(|function| function.strong_count() > 0);
        self.0.push(Arc::downgrade(function));
    }

    /// What pauses them on a thread of its own, and calls `then` there when all are quiet. A disk whose
    /// host does not answer is not before a second is over. Whoever drops the last of `aside` waits for it.
    pub(super) fn pause_aside(
        self,
        aside: Arc<Aside>,
        then: impl FnOnce() + Send + 'static,
    ) -> impl FnOnce() + Send + 'static {
        move || {
            aside.start("pause", "the virtio devices", move || {
                for function in self.alive() {
                    log::debug!("{}: is paused", function.name());
                    function.pause();
                }
                then();
            });
        }
    }

    /// Waits until the host has given back what it has of a reset device's, for it may still read and write
    /// guest memory for that; as long as `go_on`, which is told what is waited for, says so.
    pub(super) fn wait_for_outstanding(&self, go_on: impl Fn(&str) -> bool) {
        for function in self.alive() {
            let mut reported = false;
            while let Some(what) = function.outstanding() {
                let what = format!("{}, of which the host has {what}", function.name());
                if !std::mem::replace(&mut reported, true) {
                    log::warn!("the restart waits for {what}");
                }
                if !go_on(&what) {
                    return;
                }
                std::thread::sleep(SETTLE);
            }
        }
    }

    /// Lets them go on, which takes no time to speak of.
    pub(super) fn resume(&self) {
        for function in self.alive() {
            function.resume();
        }
    }

    fn alive(&self) -> impl Iterator<Item = Arc<VirtioPci>> {
        self.0.iter().filter_map(Weak::upgrade)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;
    use crate::config::RngConfig;
    use crate::virtio::life::{Progress, Running};
    use crate::virtio::rng::Rng;
    use crate::virtio::testing::{Driver, Ring, eventually};
    use crate::virtio::{Activation, ConfigSpace, StartError, VirtioDevice};

    /// A source of zeroes that counts what of it runs, and whose stop waits for a word where `slow` has
    /// one to come.
    #[derive(Debug)]
    struct Slow {
        rng: Rng,
        slow: Option<Receiver<()>>,
        running: Arc<AtomicUsize>,
    }

    #[derive(Debug)]
    struct SlowRun {
        rng: Box<dyn Running>,
        slow: Option<Receiver<()>>,
        running: Arc<AtomicUsize>,
    }

    impl Running for SlowRun {
        fn stop(self: Box<Self>) -> Progress {
            if let Some(slow) = self.slow {
                // Or the test is over.
                let _word = slow.recv();
            }
            let progress = self.rng.stop();
            self.running.fetch_sub(1, Ordering::SeqCst);
            progress
        }
    }

    impl VirtioDevice for Slow {
        fn name(&self) -> &str {
            self.rng.name()
        }

        fn device_type(&self) -> u16 {
            self.rng.device_type()
        }

        fn class(&self) -> u32 {
            self.rng.class()
        }

        fn features(&self) -> u64 {
            self.rng.features()
        }

        fn queue_sizes(&self) -> Vec<u16> {
            self.rng.queue_sizes()
        }

        fn config(&self) -> Arc<dyn ConfigSpace> {
            self.rng.config()
        }

        fn start(&mut self, activation: Activation) -> Result<Box<dyn Running>, StartError> {
            let rng = self.rng.start(activation)?;
            self.running.fetch_add(1, Ordering::SeqCst);
            Ok(Box::new(SlowRun {
                rng,
                slow: self.slow.take(),
                running: self.running.clone(),
            }))
        }
    }

    /// Two devices that run, of which the second is slow to stop until it is told.
    struct Machine {
        go_on: Sender<()>,
        functions: VirtioFunctions,
        drivers: [(Driver, Ring); 2],
        running: Arc<AtomicUsize>,
    }

    fn machine() -> Machine {
        let running = Arc::<AtomicUsize>::default();
        let (go_on, slow) = channel();
        let mut functions = VirtioFunctions::default();
        let drivers = [None, Some(slow)].map(|slow| {
            let src = "/dev/zero".into();
            let rng = Rng::new(
                "rng",
                &RngConfig {
                    src,
                    ..RngConfig::default()
                },
            )
            .unwrap();
            let mut driver = Driver::new(Slow {
                rng,
                slow,
                running: running.clone(),
            });
            functions.push(&driver.function);
            driver.negotiate(0);
            let ring = driver.queue(0, 16);
            driver.ready();
            (driver, ring)
        });
        Machine {
            go_on,
            functions,
            drivers,
            running,
        }
    }

    #[test]
    fn nobody_but_who_asked_waits_for_a_device_that_is_slow_to_stop() {
        let mut machine = machine();
        let (aside, (done, paused)) = (Arc::new(Aside::default()), channel());
        let functions = machine.functions.clone();
        let pause = functions.pause_aside(aside.clone(), move || done.send(()).unwrap());
        assert_eq!(machine.running.load(Ordering::SeqCst), 2);
        // Returns, though the slow one still runs.
        pause();
        eventually("the first is quiet", || {
            machine.running.load(Ordering::SeqCst) == 1
        });
        assert!(paused.try_recv().is_err());
        machine.go_on.send(()).unwrap();
        paused.recv().unwrap();
        drop(aside);
        assert_eq!(machine.running.load(Ordering::SeqCst), 0);
        // What is asked of them meanwhile waits until they go on.
        for (driver, ring) in &mut machine.drivers {
            ring.submit(&[(0x10_0000, 8, true)]);
            driver.notify(ring);
            std::thread::sleep(std::time::Duration::from_millis(20));
            assert_eq!(ring.poll_used(), None);
        }
        machine.functions.resume();
        assert_eq!(machine.running.load(Ordering::SeqCst), 2);
        for (_, ring) in &mut machine.drivers {
            assert_eq!(ring.wait_used(), (0, 8));
        }
    }

    #[test]
    fn the_end_waits_for_a_pause_that_is_under_way_and_devices_that_are_gone_need_none() {
        let machine = machine();
        let [(first, _), second] = machine.drivers;
        drop(first);
        let (aside, ended) = (Arc::new(Aside::default()), Arc::<AtomicUsize>::default());
        let pause = {
            let ended = ended.clone();
            let functions = machine.functions.clone();
            functions.pause_aside(aside.clone(), move || {
                ended.fetch_add(1, Ordering::SeqCst);
            })
        };
        pause();
        machine.go_on.send(()).unwrap();
        drop(aside);
        assert_eq!(ended.load(Ordering::SeqCst), 1);
        assert_eq!(machine.running.load(Ordering::SeqCst), 0);
        drop(second);
        machine.functions.resume();
        assert_eq!(machine.running.load(Ordering::SeqCst), 0);
    }
}
