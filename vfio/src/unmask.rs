//! Unmasking an interrupt pin from here, for drivers that take no eventfd for it.
//!
//! vfio-pci unmasks its device itself when an eventfd is signalled. Drivers of mediated devices need not
//! take one (Linux, samples/vfio-mdev/mtty.c): a thread waits for the eventfd in the kernel's place, and
//! tells the device each time. It lives while the pin is connected.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use busway_pci::Complaints;
use rustix::event::{PollFd, PollFlags, poll};

use crate::{DeviceIo, EventFd, IrqError, IrqIndex};

/// What a thread does first.
static BEGIN: OnceLock<fn()> = OnceLock::new();

/// Has each thread that this crate starts call `begin` first, such as to give up rights that it needs none of. The
/// first word counts.
pub fn begin_threads_with(begin: fn()) {
    let _first = BEGIN.set(begin);
}

/// Unmasks a device's pin whenever an eventfd is signalled, until this is dropped.
#[derive(Debug)]
pub(crate) struct Unmasker {
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Unmasker {
    /// Whether `error`, of [`DeviceIo::unmask_on`], says that the driver takes no eventfd.
    pub(crate) fn is_wanted(error: &IrqError) -> bool {
        let IrqError::Kernel(error) = error else {
            return false;
        };
        matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EOPNOTSUPP))
    }

    /// Begins, for the device called `name` in the log. A signal that is there already counts.
    ///
    /// # Errors
    /// The kernel's: there are as many files or threads as there may be.
    pub(crate) fn start(
        name: &str,
        io: Arc<dyn DeviceIo>,
        event: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        let stop = EventFd::new()?;
        let (stopped, event) = (stop.clone(), EventFd::from(event.try_clone_to_owned()?));
        let device = name.to_owned();
        let thread = thread::Builder::new()
            .name("unmask".to_owned())
            .spawn(move || {
                if let Some(begin) = BEGIN.get() {
                    begin();
                }
                unmask(&device, &*io, &event, &stopped);
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Unmasker {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::debug!("a thread that unmasks a pin has panicked");
        }
    }
}

fn unmask(name: &str, io: &dyn DeviceIo, event: &EventFd, stop: &EventFd) {
    let complaints = Complaints::first(1);
    loop {
        let mut fds = [
            PollFd::new(event, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                log::error!("{name}: its interrupt pin stays masked: poll: {error}");
                return;
            }
        }
        let [_, stopped] = &fds;
        if !stopped.revents().is_empty() {
            return;
        }
        if event.take() > 0
            && let Err(error) = io.unmask(IrqIndex::Intx)
            && complaints.make(Instant::now()).is_some()
        {
            log::warn!("{name}: its interrupt pin stays masked: {error}");
        }
    }
}
