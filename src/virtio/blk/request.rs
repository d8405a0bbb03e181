//! What a block request means: its header, its data, its status byte. Virtio 1.3 §5.2.6.

use std::io;
use std::sync::Arc;

use super::flight::{Flight, Range, Work};
use super::image::Image;
use super::space::DiskSpace;
use crate::memory::RamMap;
use crate::virtio::chain::Chain;
use crate::virtio::error::QueueError;
use crate::virtio::segments::{Held, Segments};
use crate::virtio::spec::{self, blk};
use busway_host::files::no_room;
use busway_pci::Complaints;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Most sectors of one discard: 2 GiB. What a reset has to wait for is less: `steps`.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Most sectors of one write zeroes: 16 MiB, for where the host cannot do better than to write.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 15;
/// Most ranges of one discard or write zeroes.
pub(super) const MAX_RANGES: u32 = 32;

/// Why a request is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Failure {
    /// Answered with `VIRTIO_BLK_S_UNSUPP`: the guest asked for what was not offered.
    Unsupported,
    /// Answered with `VIRTIO_BLK_S_IOERR`: the guest asked for what is not there.
    Refused,
}

/// What a request comes to.
#[derive(Debug)]
pub(super) enum Planned {
    /// It is answered: its first descriptor, and the bytes that were written.
    Answered(u16, usize),
    /// The host has to do it.
    Host(Box<Flight>),
}

/// One queue's requests, as they are understood.
#[derive(Debug)]
pub(super) struct Requests {
    image: Arc<Image>,
    space: Arc<DiskSpace>,
    name: String,
    id: [u8; blk::ID_SIZE],
    features: u64,
    complaints: Arc<Complaints>,
}

impl Requests {
    /// The disk's host errors go to `complaints`; `serial` is what `VIRTIO_BLK_T_GET_ID` is answered with.
    pub(super) fn new(
        image: Arc<Image>,
        space: Arc<DiskSpace>,
        name: &str,
        serial: &str,
        features: u64,
        complaints: Arc<Complaints>,
    ) -> Self {
        let mut id = [0; blk::ID_SIZE];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            image,
            space,
            name: name.to_owned(),
            id,
            features,
            complaints,
        }
    }

    /// Whether each change is to last when it is answered: the driver did not take `VIRTIO_BLK_F_FLUSH`, or
    /// nothing is to stay in a cache. Virtio 1.3 §5.2.5.2, §5.2.6.2.
    pub(super) fn write_through(&self) -> bool {
        !self.has(blk::F_FLUSH) || !self.space.writeback()
    }

    /// What the request of `chain`, which lies in `memory`, comes to.
    ///
    /// # Errors
    /// The chain is no request: there is no room for a header, or none for a status.
    pub(super) fn plan(
        &self,
        mut chain: Chain<'_>,
        memory: &Arc<RamMap>,
    ) -> Result<Planned, QueueError> {
        let Some(Header { kind, sector, .. }) = chain.readable.take() else {
            return Err(chain.malformed("a block request shorter than its header"));
        };
        let Some(data_len) = chain.writable.len().checked_sub(1) else {
            return Err(chain.malformed("a block request without room for its status"));
        };
        let head = chain.head();
        let written = data_len.saturating_add(1);
        let mut input = chain.writable.take_front(data_len);
        let result = match kind.get() {
            blk::T_IN => self.span(sector.get(), &input).map(|at| (Work::Read, at)),
            blk::T_OUT => self
                .writable()
                .and_then(|()| self.span(sector.get(), &chain.readable))
                .map(|at| (Work::Write, at)),
            blk::T_FLUSH => Ok((Work::Flush, 0)),
            blk::T_GET_ID => {
                input.write(&self.id);
                chain.writable.write(&[blk::S_OK]);
                return Ok(Planned::Answered(head, written));
            }
            blk::T_DISCARD if self.has(blk::F_DISCARD) => {
                let ranges = self.ranges(chain.readable.clone(), MAX_DISCARD_SECTORS, 0);
                ranges.map(|ranges| (Work::Discard(ranges), 0))
            }
            blk::T_WRITE_ZEROES if self.has(blk::F_WRITE_ZEROES) => {
                let (most, flags) = (MAX_ZERO_SECTORS, blk::RANGE_F_UNMAP);
                let ranges = self.ranges(chain.readable.clone(), most, flags);
                ranges.map(|ranges| (Work::Zero(ranges), 0))
            }
            _ => Err(Failure::Unsupported),
        };
        let (work, at) = match result {
            Ok(planned) => planned,
            Err(failure) => {
                let status = match failure {
                    Failure::Unsupported => blk::S_UNSUPP,
                    Failure::Refused => blk::S_IOERR,
                };
                chain.writable.write(&[status]);
                return Ok(Planned::Answered(head, written));
            }
        };
        let data = match work {
            Work::Read => &input,
            Work::Write => &chain.readable,
            _ => &Segments::default(),
        };
        let held = |segments| Held::new(memory, segments);
        let (Some(data), Some(status)) = (held(data), held(&chain.writable)) else {
            return Err(chain.malformed("a buffer outside of RAM"));
        };
        let lasting = self.write_through() && !matches!(work, Work::Read | Work::Flush);
        let mut flight = Box::new(Flight::new(head, work, data, at, status));
        flight.lasting = lasting;
        flight.set_written(written);
        Ok(Planned::Host(flight))
    }

    /// Answers a request that the host has given back with `result`.
    pub(super) fn answer(&self, flight: &Flight, result: io::Result<()>) -> (u16, usize) {
        let status = match result {
            Ok(()) => blk::S_OK,
            Err(error) => {
                self.complain(flight, &error);
                blk::S_IOERR
            }
        };
        flight.answer(status)
    }

    fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn complain(&self, flight: &Flight, error: &io::Error) {
        log::log!(
            self.complaints.next(log::Level::Error),
            "disk {}: {flight} failed: {error}{}",
            self.name,
            no_room(error)
        );
    }

    /// The byte of the disk at which `data` starts, which lies within it in whole blocks.
    fn span(&self, sector: u64, data: &Segments<'_>) -> Result<u64, Failure> {
        self.range(sector, data.len() as u64)
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

    /// `struct virtio_blk_discard_write_zeroes[]`: all are checked before one is carried out.
    fn ranges(
        &self,
        mut bytes: Segments<'_>,
        max_sectors: u32,
        allowed_flags: u32,
    ) -> Result<Vec<Range>, Failure> {
        self.writable()?;
        let count = bytes.len() / size_of::<AskedRange>();
        let whole = bytes.len().is_multiple_of(size_of::<AskedRange>());
        if !whole || count == 0 || count > MAX_RANGES as usize {
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
