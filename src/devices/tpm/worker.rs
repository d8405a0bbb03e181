//! The thread that has swtpm carry out the guest's commands.

use std::path::PathBuf;
use std::sync::Arc;

use busway_pci::Complaints;
use rustix::event::{PollFd, PollFlags, poll};

use super::Shared;
use super::error::Broken;
use super::link::{Limits, Link, Order, Orders};
use crate::provoked;
use crate::sandbox::{self, Kind};

/// Losses of swtpm's that are told as errors: a guest that restarts can bring out more.
const LOUD_COMPLAINTS: u32 = 8;

/// The thread's own.
#[derive(Debug)]
pub(super) struct Worker {
    shared: Arc<Shared>,
    socket: PathBuf,
    limits: Limits,
    /// Nothing, where swtpm is lost.
    link: Option<Link>,
    complaints: Complaints,
}

/// What there is to do.
#[derive(Debug)]
enum Work {
    Reset,
    Command {
        bytes: Vec<u8>,
        /// Of which life of the guest's it is.
        life: u64,
    },
    End,
}

/// While the TPM is switched off nothing ends the wait but its time.
struct LastOrders<'a>(&'a Shared);

impl Orders for LastOrders<'_> {
    fn wake(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.wake()
    }

    fn look(&self) -> Order {
        let _order = self.0.look();
        Order::GoOn
    }
}

impl Worker {
    pub(super) fn new(shared: Arc<Shared>, socket: PathBuf, limits: Limits, link: Link) -> Self {
        Self {
            shared,
            socket,
            limits,
            link: Some(link),
            complaints: Complaints::first(LOUD_COMPLAINTS),
        }
    }

    /// Works until the VM's end.
    pub(super) fn run(mut self) {
        sandbox::enter(Kind::Tpm);
        loop {
            match self.next() {
                Work::Reset => self.reset(),
                Work::Command { bytes, life } => self.execute(&bytes, life),
                Work::End => break,
            }
            provoked::here();
        }
        if let Some(mut link) = self.link.take()
            && let Err(why) = link.stop(&LastOrders(&self.shared))
        {
            log::debug!("TPM: swtpm does not switch it off: {why}");
        }
    }

    /// Waits for something to do. A swtpm that goes meanwhile is told of at once.
    fn next(&mut self) -> Work {
        loop {
            let _signals = self.shared.wake.take();
            if let Some(work) = self.take() {
                return work;
            }
            let wake = self.shared.wake();
            let mut fds = vec![PollFd::new(&wake, PollFlags::IN)];
            let channels = self.link.as_ref().map(Link::channels);
            let channels = channels.iter().flatten();
            fds.extend(channels.map(|channel| PollFd::new(channel, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("TPM: poll: {}", std::io::Error::from(error));
                    return Work::End;
                }
            }
            let spoke = fds.iter().skip(1).any(|fd| !fd.revents().is_empty());
            drop(fds);
            let unasked = self.link.as_ref().filter(|_| spoke);
            if let Some(Err(why)) = unasked.map(Link::nothing_unasked) {
                self.lose(&why);
            }
        }
    }

    fn take(&self) -> Option<Work> {
        let mut state = self.shared.state();
        if state.end {
            return Some(Work::End);
        }
        if std::mem::take(&mut state.reset) {
            return Some(Work::Reset);
        }
        let life = state.life;
        let bytes = state.command.take()?;
        Some(Work::Command { bytes, life })
    }

    /// Switches the TPM off and on, by another connection where this one is lost.
    fn reset(&mut self) {
        let orders = &*self.shared;
        let kept = self.link.take().map(|mut link| {
            let done = link.initialise(orders);
            done.map(|established| (link, established))
        });
        let again = || {
            let mut link = Link::connect(&self.socket, self.limits, orders)?;
            let established = link.initialise(orders)?;
            Ok((link, established))
        };
        let done = match kept {
            Some(Ok(done)) => Ok(done),
            Some(Err(Broken::Ended)) => Err(Broken::Ended),
            Some(Err(_)) | None => again(),
        };
        match done {
            Ok((link, established)) => {
                self.link = Some(link);
                let mut state = self.shared.state();
                if !state.reset {
                    state.registers.set_established(established);
                }
            }
            Err(why) => self.lose(&why),
        }
    }

    fn execute(&mut self, command: &[u8], life: u64) {
        let done = match &mut self.link {
            Some(link) => link.execute(command, &*self.shared),
            None => {
                self.shared.state().registers.fail();
                return;
            }
        };
        match done {
            Ok(response) => {
                let mut state = self.shared.state();
                if state.life == life {
                    state.registers.finish(&response);
                    state.cancel = false;
                }
            }
            Err(why) => self.lose(&why),
        }
    }

    /// swtpm is not asked any more, and the TPM has failed until the guest's next reset.
    fn lose(&mut self, why: &Broken) {
        self.link = None;
        if matches!(why, Broken::Ended) {
            return;
        }
        let mut state = self.shared.state();
        // What a reset is waiting for is tried anew, and what was before it is over.
        if !state.reset {
            state.command = None;
            state.cancel = false;
            state.registers.fail();
        }
        drop(state);
        log::log!(
            self.complaints.next(log::Level::Error),
            "TPM ({}): {why}; the guest's TPM has failed until the guest restarts",
            self.socket.display()
        );
    }
}
