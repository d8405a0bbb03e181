//! Workers without threads: a story wakes them itself, so that it comes out the same each time it is played.

use std::cell::RefCell;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::epoll::{Epoll, EpollEvent};

use crate::virtio::interrupts::Interrupts;
use crate::virtio::life::{Progress, Running};
use crate::virtio::worker::{Worker, watch_sources};

thread_local! {
    static STAGE: RefCell<Option<Stage>> = const { RefCell::new(None) };
}

/// Where the workers of the devices that a thread starts are played, in the place of threads.
#[derive(Clone, Debug, Default)]
pub(in crate::virtio) struct Stage(Arc<Mutex<Vec<Player>>>);

#[derive(Debug)]
struct Player {
    worker: Box<dyn Worker>,
    ready: Epoll,
    interrupts: Arc<Interrupts>,
    /// The driver has broken the rules of one of its queues, and it has ended.
    over: bool,
}

impl Player {
    fn wake(&mut self, source: usize) {
        if self.over {
            return;
        }
        if let Err(error) = self.worker.wake(source) {
            self.interrupts.needs_reset(&self.worker.name(), &error);
            self.end();
        }
    }

    fn end(&mut self) {
        if !std::mem::replace(&mut self.over, true) {
            assert!(self.worker.end().is_none(), "a worker leaves a wait");
        }
    }
}

impl Stage {
    /// What this thread starts is played here from now on, until the stage is dropped.
    pub(super) fn set() -> Self {
        let stage = Self::default();
        STAGE.with_borrow_mut(|it| *it = Some(stage.clone()));
        stage
    }

    /// Ends what [`set`](Self::set) began.
    pub(super) fn unset() {
        STAGE.with_borrow_mut(|it| *it = None);
    }

    /// The stage of the thread that calls, where it has one.
    pub(in crate::virtio) fn of_this_thread() -> Option<Self> {
        STAGE.with_borrow(Clone::clone)
    }

    fn players(&self) -> MutexGuard<'_, Vec<Player>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins with `workers`, each woken once for each of its sources, as their threads would.
    ///
    /// # Errors
    /// There is no descriptor to wait by.
    pub(in crate::virtio) fn start(
        self,
        workers: Vec<Box<dyn Worker>>,
        stop: Arc<AtomicBool>,
        interrupts: Arc<Interrupts>,
        progress: Progress,
    ) -> io::Result<Box<dyn Running>> {
        for mut worker in workers {
            worker.begin();
            let sources = worker.sources().len();
            let mut player = Player {
                ready: watch_sources(&*worker)?,
                worker,
                interrupts: Arc::clone(&interrupts),
                over: false,
            };
            for source in 0..sources {
                player.wake(source);
            }
            self.players().push(player);
        }
        Ok(Box::new(Played {
            stage: self,
            stop,
            progress,
        }))
    }

    /// Wakes each worker for those of its sources that are ready.
    pub(super) fn play(&self) {
        for player in &mut *self.players() {
            let mut events = [EpollEvent::default(); 8];
            let ready = player.ready.wait(0, &mut events).unwrap_or(0);
            for event in events.iter().take(ready) {
                player.wake(usize::try_from(event.data()).unwrap_or(0));
            }
        }
    }
}

/// A device whose workers are on the stage.
#[derive(Debug)]
struct Played {
    stage: Stage,
    stop: Arc<AtomicBool>,
    progress: Progress,
}

impl Played {
    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for mut player in self.stage.players().drain(..) {
            player.end();
            player.worker.leave(&mut self.progress);
        }
    }
}

impl Running for Played {
    fn stop(mut self: Box<Self>) -> Progress {
        self.end();
        std::mem::take(&mut self.progress)
    }
}

impl Drop for Played {
    fn drop(&mut self) {
        self.end();
    }
}
