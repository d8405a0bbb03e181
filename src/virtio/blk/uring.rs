//! An image's requests by io_uring: they go to the kernel many at a time, and come back many at a time.
//!
//! One thread uses a ring: it makes the calls, and completions are put into the ring while it is in one
//! (`IORING_SETUP_DEFER_TASKRUN`, Linux 6.1), so that none interrupts it and they gather.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use busway_vfio::EventFd;
use io_uring::register::Restriction;
use io_uring::types::{Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{Builder, IoUring, opcode, squeue};

use super::flight::{Flight, Work};

/// The image's place among the ring's registered files.
const IMAGE: Fixed = Fixed(0);

/// A ring, and the requests that are in it.
pub(super) struct Uring {
    ring: IoUring,
    event: EventFd,
    /// By the number that the kernel gives back with them.
    flights: Vec<Option<Box<Flight>>>,
    free: Vec<usize>,
}

impl fmt::Debug for Uring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uring")
            .field("in_flight", &self.in_flight())
            .finish_non_exhaustive()
    }
}

/// The ways to set a ring up, the best first; a kernel refuses flags that it does not know.
const SETUPS: [fn(&mut Builder); 3] = [
    // Linux 6.1
    |builder| {
        builder
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag();
    },
    // Linux 5.19
    |builder| {
        builder.setup_coop_taskrun().setup_taskrun_flag();
    },
    // Linux 5.10
    |_| (),
];

impl Uring {
    /// A ring for `entries` requests of `file` at once, which stays open for as long. It is for one thread,
    /// which [begins](Self::begin) it.
    ///
    /// # Errors
    /// The kernel's: it has no io_uring, or keeps it from this process.
    pub(super) fn new(entries: u16, file: &File) -> io::Result<Self> {
        let mut made = Err(io::ErrorKind::Unsupported.into());
        for setup in SETUPS {
            let mut builder = IoUring::builder();
            builder.dontfork().setup_r_disabled();
            setup(&mut builder);
            made = builder.build(entries.into());
            match &made {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                _ => break,
            }
        }
        let ring = made?;
        let event = EventFd::new()?;
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        ring.submitter()
            .register_eventfd(event.as_fd().as_raw_fd())?;
        ring.submitter()
            .register_restrictions(&mut restrictions())?;
        Ok(Self {
            ring,
            event,
            flights: (0..entries).map(|_| None).collect(),
            free: (0..entries.into()).collect(),
        })
    }

    /// On the thread that will use it: lets it take requests.
    ///
    /// # Errors
    /// The kernel's.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        self.ring.submitter().register_enable_rings()?;
        // One look-up less for each call, where the kernel (5.18) has that.
        if let Err(error) = self.ring.submitter().register_ring_fd() {
            log::debug!("io_uring: the ring's own descriptor is not registered: {error}");
        }
        Ok(())
    }

    /// Is signalled when something has come back while it is [armed](Self::arm). The ring's own descriptor
    /// does not become ready by what is deferred.
    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    /// Has the event be signalled from now on, and says whether something has
    /// come back already.
    pub(super) fn arm(&mut self) -> bool {
        let completion = self.ring.completion();
        completion.enable_eventfd();
        let there = !completion.is_empty();
        drop(completion);
        // What is signalled has to be seen after what says that it is to be: as for a queue's notifications.
        fence(Ordering::SeqCst);
        let submission = self.ring.submission();
        there || submission.taskrun() || submission.cq_overflow() || {
            drop(submission);
            !self.ring.completion().is_empty()
        }
    }

    /// Has nothing be signalled: who uses the ring is about to look.
    pub(super) fn disarm(&mut self) {
        self.ring.completion().disable_eventfd();
    }

    /// Forgets the signals so far.
    pub(super) fn hear(&self) {
        let _signals = self.event.take();
    }

    /// Requests that the kernel has, or will have by the next [`enter`](Self::enter).
    pub(super) fn in_flight(&self) -> usize {
        self.flights.len().saturating_sub(self.free.len())
    }

    /// Requests that are in the kernel's hands.
    pub(super) fn flights(&self) -> impl Iterator<Item = &Flight> {
        self.flights.iter().flatten().map(|flight| &**flight)
    }

    /// Has `flight` go with the next call.
    ///
    /// # Errors
    /// The request, where there is no room.
    pub(super) fn push(&mut self, mut flight: Box<Flight>) -> Result<(), Box<Flight>> {
        let Some(&number) = self.free.last() else {
            return Err(flight);
        };
        let entry = entry(&mut flight).user_data(number as u64);
        // SAFETY: what the entry points to, the list of the buffers and these themselves, is the flight's,
        // which is kept below, on the heap and unchanged, until its completion has been taken. The image is
        // open for as long as the ring, which has registered it.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            return Err(flight);
        }
        if let Some(place) = self.flights.get_mut(number) {
            *place = Some(flight);
            self.free.pop();
        }
        Ok(())
    }

    /// Whether requests wait for the next call.
    pub(super) fn has_waiting(&mut self) -> bool {
        !self.ring.submission().is_empty()
    }

    /// Gives the kernel what waits, and takes what has come back; with `hold`, waits until there are so many
    /// completions, or for so long.
    ///
    /// # Errors
    /// The kernel's; none for want of memory, for then what waits goes on waiting.
    pub(super) fn enter(&mut self, hold: Option<(usize, Duration)>) -> io::Result<()> {
        let submission = self.ring.submission();
        let idle = submission.is_empty() && !submission.taskrun() && !submission.cq_overflow();
        drop(submission);
        let submitter = self.ring.submitter();
        let result = match hold {
            Some((want, patience)) if self.ring.params().is_feature_ext_arg() => {
                let patience = Timespec::from(patience);
                submitter.submit_with_args(want, &SubmitArgs::new().timespec(&patience))
            }
            _ if idle => return Ok(()),
            _ => submitter.submit(),
        };
        match result {
            Ok(_submitted) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR | libc::EAGAIN | libc::EBUSY) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// Takes what the kernel has given back: each with the bytes that are done.
    pub(super) fn reap(&mut self, done: &mut Vec<(Box<Flight>, io::Result<usize>)>) {
        for completion in self.ring.completion() {
            let number = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
            let Some(flight) = self.flights.get_mut(number).and_then(Option::take) else {
                continue;
            };
            self.free.push(number);
            let result = completion.result();
            let result = usize::try_from(result)
                .map_err(|_negative| io::Error::from_raw_os_error(result.saturating_neg()));
            done.push((flight, result));
        }
    }
}

impl Drop for Uring {
    /// What the kernel has still is never freed: it would read and write what somebody else has by then.
    fn drop(&mut self) {
        if self.in_flight() > 0 {
            std::mem::forget(std::mem::take(&mut self.flights));
            return;
        }
        // The kernel takes a ring apart some time after it was closed. The image is released now, for its
        // lock is as long as it is open; and by the thread that began the ring, or by nobody.
        let mut submitter = self.ring.submitter();
        if let Err(error) = submitter.unregister_files() {
            log::debug!("io_uring: the image stays registered for a while: {error}");
        }
        if let Err(error) = submitter.unregister_ring_fd() {
            log::debug!("io_uring: the ring's own descriptor was not registered: {error}");
        }
    }
}

/// What the ring takes once it is enabled: reads, writes and flushes of the registered image, and what its end needs. A
/// filter of system calls does not see what is asked for by a ring.
/// io_uring_register(2), `IORING_REGISTER_RESTRICTIONS`
fn restrictions() -> Vec<Restriction> {
    let requests = [
        opcode::Read::CODE,
        opcode::Write::CODE,
        opcode::Readv::CODE,
        opcode::Writev::CODE,
        opcode::Fsync::CODE,
    ];
    let requests = requests.map(Restriction::sqe_op);
    let registrations = REGISTRATIONS.map(Restriction::register_op);
    let image = squeue::Flags::FIXED_FILE.bits();
    let flags = [
        Restriction::sqe_flags_allowed(image),
        Restriction::sqe_flags_required(image),
    ];
    requests
        .into_iter()
        .chain(registrations)
        .chain(flags)
        .collect()
}

/// linux/io_uring.h: IORING_UNREGISTER_FILES, IORING_REGISTER_RING_FDS, IORING_UNREGISTER_RING_FDS
const REGISTRATIONS: [u8; 3] = [3, 20, 21];

/// What the kernel is asked for.
fn entry(flight: &mut Flight) -> squeue::Entry {
    let flags = if flight.lasting { libc::RWF_DSYNC } else { 0 };
    let write = flight.work == Work::Write;
    if flight.work == Work::Flush {
        return opcode::Fsync::new(IMAGE)
            .flags(FsyncFlags::DATASYNC)
            .build();
    }
    let (buffers, at) = flight.window();
    let count = u32::try_from(buffers.len()).unwrap_or(u32::MAX);
    match (buffers, write) {
        (&[buffer], false) if buffer.iov_len <= u32::MAX as usize => {
            opcode::Read::new(IMAGE, buffer.iov_base.cast(), buffer.iov_len as u32)
                .offset(at)
                .build()
        }
        (&[buffer], true) if buffer.iov_len <= u32::MAX as usize => {
            opcode::Write::new(IMAGE, buffer.iov_base.cast(), buffer.iov_len as u32)
                .offset(at)
                .rw_flags(flags)
                .build()
        }
        (buffers, false) => opcode::Readv::new(IMAGE, buffers.as_ptr(), count)
            .offset(at)
            .build(),
        (buffers, true) => opcode::Writev::new(IMAGE, buffers.as_ptr(), count)
            .offset(at)
            .rw_flags(flags)
            .build(),
    }
}
