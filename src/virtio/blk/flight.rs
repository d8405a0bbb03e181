//! A request that is with the host: what is asked for, the guest memory that it is for, and what becomes
//! of it when the host gives it back.

use std::fmt;
use std::io;
use std::time::Instant;

use super::image::Image;
use super::steps::Stop;
use crate::virtio::counts::DiskWork;
use crate::virtio::segments::Held;
use crate::virtio::spec::blk;

/// Bytes of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) flags: u32,
}

/// What the host is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read,
    Write,
    Flush,
    Discard(Vec<Range>),
    Zero(Vec<Range>),
}

/// A request that is with the host.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) work: Work,
    /// The change is to last when the request is answered.
    pub(super) lasting: bool,
    head: u16,
    /// What is left to be read or written.
    data: Held,
    /// The byte of the disk that it starts at.
    at: u64,
    /// The byte of the request that says what has become of it.
    status: Held,
    /// Bytes that were asked for.
    asked: u64,
    /// Bytes of the request's buffers that count as written when it is answered.
    written: usize,
    /// The ring does not take it: a thread does it.
    plain: bool,
    started: Instant,
}

/// What is to be done with a request that the host has given back.
#[derive(Debug)]
pub(super) enum Next {
    /// It goes to the host once more, for what is left of it.
    Again,
    /// It is to be answered.
    Answer(io::Result<()>),
    /// It is left for the next start.
    Leave,
}

impl Flight {
    /// A request whose chain begins with descriptor `head`: `data` from or to byte `at` of the disk.
    pub(super) fn new(head: u16, work: Work, data: Held, at: u64, status: Held) -> Self {
        Self {
            work,
            lasting: false,
            head,
            at,
            // The status comes behind what the device writes, whether that has been written or not.
            written: 0,
            asked: data.len() as u64,
            data,
            status,
            plain: false,
            started: Instant::now(),
        }
    }

    pub(super) fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that are read or written.
    pub(super) fn bytes(&self) -> usize {
        self.data.len()
    }

    /// What it asked for, and how many bytes of data.
    pub(super) fn asked(&self) -> (DiskWork, u64) {
        let work = match self.work {
            Work::Read => DiskWork::Read,
            Work::Write => DiskWork::Write,
            Work::Flush | Work::Discard(_) | Work::Zero(_) => DiskWork::Other,
        };
        (work, self.asked)
    }

    /// Whether a limit of bytes and operations is for it: it moves data.
    pub(super) fn is_limited(&self) -> bool {
        matches!(self.work, Work::Read | Work::Write)
    }

    /// Bytes that count as written by the device when it is answered.
    pub(super) fn set_written(&mut self, written: usize) {
        self.written = written;
    }

    pub(super) fn started(&self) -> Instant {
        self.started
    }

    /// Whether the ring takes it: a read or write of memory that the image takes as it lies, or a flush.
    pub(super) fn is_for_ring(&self, image: &Image) -> bool {
        let direct = match self.work {
            Work::Read | Work::Write => self.data.aligned(image.memory_alignment()),
            Work::Flush => true,
            Work::Discard(_) | Work::Zero(_) => false,
        };
        direct && !self.plain
    }

    /// The memory of the next call, and the byte of the disk that it starts at. The memory's list stays
    /// where it is until the request comes back.
    pub(super) fn window(&mut self) -> (&[libc::iovec], u64) {
        (self.data.window(), self.at)
    }

    /// Does it here and now, by calls that return when it is done: as many bytes as are done.
    ///
    /// # Errors
    /// The host's, and [`io::ErrorKind::Interrupted`] where `stop` has ended it before.
    pub(super) fn carry_out(&self, image: &Image, stop: Stop<'_>) -> io::Result<usize> {
        #[cfg(test)]
        image.gate.pass();
        let data = self.data.segments();
        match &self.work {
            Work::Read => image.read(data, self.at, stop)?,
            Work::Write => image.write(data, self.at, stop)?,
            Work::Flush => image.flush()?,
            Work::Discard(ranges) => {
                for range in ranges {
                    image.discard(range.start, range.len, stop)?;
                }
            }
            Work::Zero(ranges) => {
                for range in ranges {
                    let may_unmap = range.flags & blk::RANGE_F_UNMAP != 0;
                    image.zero(range.start, range.len, may_unmap, stop)?;
                }
            }
        }
        if self.lasting {
            image.flush()?;
        }
        Ok(self.data.len())
    }

    /// What is to be done now that the host has given it back with `result`, the bytes that are done.
    /// `ending` says that nothing goes to the host any more.
    pub(super) fn returned(&mut self, result: io::Result<usize>, ending: bool) -> Next {
        let more = if ending { Next::Leave } else { Next::Again };
        match result {
            Ok(0) if self.data.len() > 0 => Next::Answer(Err(match self.work {
                Work::Read => io::ErrorKind::UnexpectedEof.into(),
                _ => io::ErrorKind::WriteZero.into(),
            })),
            Ok(done) => {
                self.data.advance(done);
                self.at = self.at.saturating_add(done as u64);
                if self.data.len() == 0 {
                    Next::Answer(Ok(()))
                } else {
                    more
                }
            }
            Err(error) => match error.raw_os_error() {
                Some(libc::ECANCELED) => more,
                // The file does not take it by the ring, or the ring has no more room for it.
                Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::ENOMEM) if !self.plain => {
                    self.plain = true;
                    more
                }
                _ if error.kind() == io::ErrorKind::Interrupted => more,
                _ => Next::Answer(Err(error)),
            },
        }
    }

    /// Writes the status, and gives what the driver is told of the request: its first descriptor, and the
    /// bytes that were written.
    pub(super) fn answer(&self, status: u8) -> (u16, usize) {
        self.status.segments().write(&[status]);
        (self.head, self.written)
    }
}

impl fmt::Display for Flight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (len, at) = (self.data.len(), self.at);
        match &self.work {
            Work::Read => write!(f, "a read of {len} bytes from byte {at} on"),
            Work::Write => write!(f, "a write of {len} bytes from byte {at} on"),
            Work::Flush => f.write_str("a flush"),
            Work::Discard(_) => f.write_str("a discard"),
            Work::Zero(_) => f.write_str("a write of zeroes"),
        }
    }
}
