//! What a block request means: its header, its data, its status byte. Virtio 1.3 §5.2.6.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::image::Image;
use crate::virtio::queue::{Chain, QueueError, Served};
use crate::virtio::segments::Segments;
use crate::virtio::spec::{self, blk};
use busway_pci::Complaints;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Why a request has not been carried out.
#[derive(Debug)]
enum Failure {
    /// Answered with `VIRTIO_BLK_S_UNSUPP`: the guest asked for what was not offered.
    Unsupported,
    /// Answered with `VIRTIO_BLK_S_IOERR`: the guest asked for what is not there.
    Refused,
    /// Answered with `VIRTIO_BLK_S_IOERR`: the host's error.
    Host(&'static str, io::Error),
    /// Not answered: the device is being stopped, and the next start does the request from its
    /// beginning.
    Stopped,
}

impl Failure {
    /// The failure of what the image was asked to do.
    fn of(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |error| match error.kind() {
            io::ErrorKind::Interrupted => Self::Stopped,
            _ => Self::Host(what, error),
        }
    }
}

/// One queue's way to the image.
#[derive(Debug)]
pub(super) struct Requests {
    image: Arc<Image>,
    name: String,
    id: [u8; blk::ID_SIZE],
    /// The driver did not take `VIRTIO_BLK_F_FLUSH`, and so counts on each write to be lasting.
    /// Virtio 1.3 §5.2.5.2.
    write_through: bool,
    features: u64,
    complaints: Arc<Complaints>,
    stop: Arc<AtomicBool>,
}

impl Requests {
    /// The disk's host errors go to `complaints`. Where `stop` says so, a request is left off.
    pub(super) fn new(
        image: Arc<Image>,
        name: &str,
        features: u64,
        complaints: Arc<Complaints>,
        stop: Arc<AtomicBool>,
    ) -> Self {
        let mut id = [0; blk::ID_SIZE];
        for (to, from) in id.iter_mut().zip(name.bytes()) {
            *to = from;
        }
        Self {
            image,
            name: name.to_owned(),
            id,
            write_through: features & blk::F_FLUSH == 0,
            features,
            complaints,
            stop,
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Carries out one request. One that is left is done from its beginning later, which comes to the
    /// same: the driver keeps its buffers as they are until it is answered, and counts on nothing that
    /// the blocks hold until then.
    ///
    /// # Errors
    /// The chain is no request: there is no room for a header, or none for a status.
    pub(super) fn serve(&mut self, mut chain: Chain<'_>) -> Result<Served, QueueError> {
        let Some(Header { kind, sector, .. }) = chain.readable.take() else {
            return Err(chain.malformed("a block request shorter than its header"));
        };
        let Some(data_len) = chain.writable.len().checked_sub(1) else {
            return Err(chain.malformed("a block request without room for its status"));
        };
        let mut input = chain.writable.take_front(data_len);
        let sector = sector.get();
        let result = match kind.get() {
            blk::T_IN => self.read(sector, input),
            blk::T_OUT => self.write(sector, chain.readable),
            blk::T_FLUSH => self.flush(),
            blk::T_GET_ID => {
                input.write(&self.id);
                Ok(())
            }
            blk::T_DISCARD if self.has(blk::F_DISCARD) => self.discard(chain.readable),
            blk::T_WRITE_ZEROES if self.has(blk::F_WRITE_ZEROES) => self.zero(chain.readable),
            _ => Err(Failure::Unsupported),
        };
        let status = match result {
            Ok(()) => blk::S_OK,
            Err(Failure::Stopped) => return Ok(Served::Left),
            Err(Failure::Unsupported) => blk::S_UNSUPP,
            Err(Failure::Refused) => blk::S_IOERR,
            Err(Failure::Host(what, error)) => {
                self.complain(what, &error);
                blk::S_IOERR
            }
        };
        // The status comes after the data, whether that has been written or not.
        let written = data_len.saturating_add(chain.writable.write(&[status]));
        Ok(Served::Done(written))
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn complain(&self, what: &str, error: &io::Error) {
        log::log!(
            self.complaints.next(log::Level::Error),
            "disk {}: {what} failed: {error}",
            self.name
        );
    }

    /// The bytes from `sector` on, where `len` of them lie within the disk in whole blocks.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let start = sector.checked_mul(blk::SECTOR).ok_or(Failure::Refused)?;
        let end = start.checked_add(len).ok_or(Failure::Refused)?;
        let block = u64::from(self.image.limits().block_size);
        if end > self.image.capacity() || !(start | len).is_multiple_of(block) {
            return Err(Failure::Refused);
        }
        Ok(start)
    }

    fn writable(&self) -> Result<(), Failure> {
        if self.image.readonly() {
            return Err(Failure::Refused);
        }
        Ok(())
    }

    fn read(&self, sector: u64, data: Segments<'_>) -> Result<(), Failure> {
        let start = self.range(sector, data.len() as u64)?;
        self.image
            .read(data, start, &|| self.stopped())
            .map_err(Failure::of("read"))
    }

    fn write(&self, sector: u64, data: Segments<'_>) -> Result<(), Failure> {
        self.writable()?;
        let start = self.range(sector, data.len() as u64)?;
        self.image
            .write(data, start, &|| self.stopped())
            .map_err(Failure::of("write"))?;
        self.written()
    }

    fn flush(&self) -> Result<(), Failure> {
        self.image.flush().map_err(Failure::of("flush"))
    }

    fn written(&self) -> Result<(), Failure> {
        if self.write_through {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn discard(&self, ranges: Segments<'_>) -> Result<(), Failure> {
        self.writable()?;
        for range in self.ranges(ranges, super::MAX_DISCARD_SECTORS, 0)? {
            self.image
                .discard(range.start, range.len, &|| self.stopped())
                .map_err(Failure::of("discard"))?;
        }
        self.written()
    }

    fn zero(&self, ranges: Segments<'_>) -> Result<(), Failure> {
        self.writable()?;
        for range in self.ranges(ranges, super::MAX_ZERO_SECTORS, blk::RANGE_F_UNMAP)? {
            let may_unmap = range.flags & blk::RANGE_F_UNMAP != 0;
            self.image
                .zero(range.start, range.len, may_unmap, &|| self.stopped())
                .map_err(Failure::of("write zeroes"))?;
        }
        self.written()
    }

    /// `struct virtio_blk_discard_write_zeroes[]`: all are checked before one is carried out.
    fn ranges(
        &self,
        mut bytes: Segments<'_>,
        max_sectors: u32,
        allowed_flags: u32,
    ) -> Result<Vec<Range>, Failure> {
        let count = bytes.len() / size_of::<AskedRange>();
        let whole = bytes.len().is_multiple_of(size_of::<AskedRange>());
        if !whole || count == 0 || count > super::MAX_RANGES as usize {
            return Err(Failure::Refused);
        }
        let mut ranges = Vec::with_capacity(count);
        while let Some(asked) = bytes.take::<AskedRange>() {
            let (sectors, flags) = (asked.sectors.get(), asked.flags.get());
            // Virtio 1.3 §5.2.6.2: unknown flags, and unmap in a discard, are unsupported.
            if flags & !allowed_flags != 0 {
                return Err(Failure::Unsupported);
            }
            if sectors > max_sectors {
                return Err(Failure::Refused);
            }
            let len = u64::from(sectors) * spec::blk::SECTOR;
            let start = self.range(asked.sector.get(), len)?;
            ranges.push(Range { start, len, flags });
        }
        Ok(ranges)
    }
}

/// `struct virtio_blk_req` before its data. Virtio 1.3 §5.2.6.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`. Virtio 1.3 §5.2.6.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct AskedRange {
    sector: U64,
    sectors: U32,
    flags: U32,
}

#[derive(Debug)]
struct Range {
    start: u64,
    len: u64,
    flags: u32,
}
