//! One device of each kind, with a made-up end on the host, and what a driver that keeps to the rules asks of it.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::blocks::ballooned;
use super::guest::{Buffer, DATA, Guest};
use crate::config::{
    BalloonConfig, DiskConfig, HotplugMethod, ImageType, MemoryConfig, PMEM_ALIGNMENT, PmemConfig,
    RngConfig,
};
use crate::devices::console::Endpoint;
use crate::memory::{Area, GuestRam, Pluggable, Ram, Slots};
use crate::virtio::VirtioDevice;
use crate::virtio::balloon::Balloon;
use crate::virtio::blk::Blk;
use crate::virtio::console::Console;
use crate::virtio::mem::Mem;
use crate::virtio::net::Net;
use crate::virtio::pmem::Pmem;
use crate::virtio::rng::Rng;
use crate::virtio::spec::{blk, net, pmem};

/// Bytes of a disk.
const DISK: u64 = 256 << 10;
/// Pairs of queues of a NIC.
const PAIRS: usize = 2;

/// Bytes that can be plugged.
const PLUGGABLE: u64 = 128 << 20;
/// Where they are to the guest.
const PLUGGABLE_START: u64 = 4 << 30;

thread_local! {
    /// The memory that blocks are of: one for each thread, for it stays mapped.
    static BLOCKS: OnceCell<Ram> = const { OnceCell::new() };
}

/// Memory of which nothing is plugged, and which no device reaches.
fn pluggable() -> io::Result<Pluggable> {
    let config = MemoryConfig {
        size: 4096,
        thp: false,
        hotplug_size: Some(PLUGGABLE),
        hotplug_method: HotplugMethod::VirtioMem,
        ..MemoryConfig::default()
    };
    let ram = BLOCKS.with(|blocks| match blocks.get() {
        Some(ram) => Ok(ram.clone()),
        None => Ram::new(&config, false).map(|ram| blocks.get_or_init(|| ram).clone()),
    });
    let (ram, regions) = (ram.map_err(io::Error::other)?, Arc::default());
    let piece = ram.pluggable(&regions).next();
    let (_, pluggable) = piece.ok_or(io::ErrorKind::NotFound)?;
    let emptied = pluggable.unplug_all(|| true);
    emptied.map_err(io::Error::other)?;
    Ok(pluggable)
}

/// A kind of device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Raw,
    Qcow2,
    Net,
    Console,
    Rng,
    Balloon,
    Pmem,
    Memory,
}

impl Kind {
    /// All of them.
    pub(super) const ALL: [Self; 8] = [
        Self::Raw,
        Self::Qcow2,
        Self::Net,
        Self::Console,
        Self::Rng,
        Self::Balloon,
        Self::Pmem,
        Self::Memory,
    ];

    pub(super) fn of(byte: u8) -> Self {
        let at = usize::from(byte) % Self::ALL.len();
        Self::ALL.get(at).copied().unwrap_or(Self::Raw)
    }

    /// A device of this kind for a guest with `ram`, and the host's end of it.
    pub(super) fn make(self, ram: &GuestRam) -> io::Result<(Box<dyn VirtioDevice>, Outside)> {
        let mut outside = Outside::default();
        let device: Box<dyn VirtioDevice> = match self {
            Self::Raw | Self::Qcow2 => {
                let file = File::from(memfd_create(c"disk", MemfdFlags::CLOEXEC)?);
                let mut config = DiskConfig::new("");
                config.fd = u32::try_from(file.as_raw_fd()).ok();
                config.num_queues = 2;
                if self == Self::Qcow2 {
                    write_qcow2(&file)?;
                    config.image_type = ImageType::Qcow2;
                } else {
                    file.set_len(DISK)?;
                }
                let disk = Blk::new("disk", &config).map_err(io::Error::other)?;
                Box::new(disk.served_here())
            }
            Self::Net => {
                let mut sockets = Vec::new();
                for _ in 0..PAIRS {
                    let (here, there) = socketpair(
                        AddressFamily::UNIX,
                        SocketType::SEQPACKET,
                        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
                        None,
                    )?;
                    outside.ends.push(here.into());
                    sockets.push(there);
                }
                Box::new(Net::on_sockets("net", sockets))
            }
            Self::Console => {
                let (reader, writer) = io::pipe()?;
                rustix::io::ioctl_fionbio(&writer, true)?;
                outside.ends.push(OwnedFd::from(writer).into());
                Box::new(Console::new("console", Endpoint::typed_from(reader.into())))
            }
            Self::Rng => {
                let config = RngConfig {
                    src: "/dev/zero".into(),
                    ..RngConfig::default()
                };
                Box::new(Rng::new("rng", &config).map_err(io::Error::other)?)
            }
            Self::Balloon => {
                let config = BalloonConfig {
                    size: 0x8000,
                    deflate_on_oom: true,
                    free_page_reporting: true,
                    ..BalloonConfig::default()
                };
                let (regions, blocks) = ballooned()?;
                let discards = regions.discards();
                let balloon = Balloon::new("balloon", &config, discards, Some(blocks));
                Box::new(balloon.map_err(io::Error::other)?)
            }
            Self::Pmem => {
                let file = File::from(memfd_create(c"pmem", MemfdFlags::CLOEXEC)?);
                file.set_len(PMEM_ALIGNMENT)?;
                // Without a thread that flushes, so that a story comes out the same each time.
                let config = PmemConfig {
                    discard_writes: true,
                    ..PmemConfig::new(format!("/proc/self/fd/{}", file.as_raw_fd()))
                };
                let slots = Slots::new(ram, &Arc::default(), Area::new(1 << 32..1 << 33));
                let pmem = Pmem::new("pmem", &config, &slots).map_err(io::Error::other)?;
                Box::new(pmem)
            }
            Self::Memory => {
                let device = Mem::new("memory", pluggable()?, PLUGGABLE / 2, 0);
                Box::new(device.map_err(io::Error::other)?)
            }
        };
        Ok((device, outside))
    }

    /// A request as the device's own driver makes it, by numbers of the story's: the queue, and the chain.
    pub(super) fn request(self, guest: &Guest, which: u8, number: u64) -> (u16, Vec<Buffer>) {
        let data = Buffer::written(DATA + 0x1000, 0x200);
        match self {
            Self::Raw | Self::Qcow2 => {
                let kinds = [
                    blk::T_IN,
                    blk::T_OUT,
                    blk::T_FLUSH,
                    blk::T_GET_ID,
                    blk::T_DISCARD,
                    blk::T_WRITE_ZEROES,
                ];
                let kind = kinds.get(usize::from(which) % 6).copied().unwrap_or(0);
                // `struct virtio_blk_req`, and behind it a range of a discard. Virtio 1.3 §5.2.6.
                guest.write(DATA, &[kind, 0].map(u32::to_le_bytes).concat());
                guest.write(DATA + 8, &number.to_le_bytes());
                let sectors = u32::from(which) << 1;
                guest.write(DATA + 16, &number.to_le_bytes());
                guest.write(DATA + 24, &[sectors, 0].map(u32::to_le_bytes).concat());
                let header = Buffer::read(DATA, 16);
                let data = match kind {
                    blk::T_OUT => Buffer::read(DATA + 0x1000, 0x200),
                    blk::T_DISCARD | blk::T_WRITE_ZEROES => Buffer::read(DATA + 16, 16),
                    _ => data,
                };
                let status = Buffer::written(DATA + 0x3000, 1);
                let chain = match kind {
                    blk::T_FLUSH => vec![header, status],
                    _ => vec![header, data, status],
                };
                (u16::from(which >> 7), chain)
            }
            Self::Net => {
                let last = 2 * PAIRS as u16;
                let queue = u16::from(which) % (last + 1);
                match queue {
                    // Virtio 1.3 §5.1.6.5
                    _ if queue == last => {
                        let class = [net::CTRL_MQ, net::CTRL_GUEST_OFFLOADS, 1, 2];
                        let class = class.get(usize::from(which >> 6)).copied().unwrap_or(0);
                        guest.write(DATA, &[class, 0]);
                        guest.write(DATA + 2, &number.to_le_bytes());
                        let answer = Buffer::written(DATA + 0x20, 1);
                        (queue, vec![Buffer::read(DATA, 10), answer])
                    }
                    _ if queue % 2 == 1 => {
                        // Segments of every kind and of none, whose numbers are right and wrong.
                        let kinds = [net::GSO_NONE, net::GSO_TCPV4, net::GSO_UDP_L4, which];
                        let kind = kinds.get(usize::from(which >> 6)).copied();
                        let flags = (number >> 7) as u8;
                        guest.write(DATA, &[flags, kind.unwrap_or(0), 0, 0]);
                        let fields = [number as u16 & 0xf, 34, 6, 0];
                        guest.write(DATA + 4, &fields.map(u16::to_le_bytes).concat());
                        let header = Buffer::read(DATA, net::HEADER_SIZE as u32);
                        (queue, vec![header, Buffer::read(DATA + 0x1000, 0x100)])
                    }
                    _ => (queue, vec![data]),
                }
            }
            Self::Console => match which % 2 {
                0 => (0, vec![data]),
                _ => (1, vec![Buffer::read(DATA, 0x100)]),
            },
            Self::Rng => (0, vec![data]),
            Self::Pmem => {
                guest.write(DATA, &u32::from(which).to_le_bytes());
                let answer = Buffer::written(DATA + 0x3000, 4);
                (0, vec![Buffer::read(DATA, 4), answer])
            }
            Self::Memory => {
                // `struct virtio_mem_req`: any kind, somewhere in the region, at a block's beginning or not.
                let kind = u16::from(which % 5);
                let address = PLUGGABLE_START + (number << 19);
                let blocks = 1 + u16::from(which >> 4);
                guest.write(DATA, &u64::from(kind).to_le_bytes());
                guest.write(DATA + 8, &address.to_le_bytes());
                guest.write(DATA + 16, &u64::from(blocks).to_le_bytes());
                let answer = Buffer::written(DATA + 0x1000, 10);
                (0, vec![Buffer::read(DATA, 24), answer])
            }
            Self::Balloon => match which % 4 {
                // Pages behind what else is used here, and one anywhere.
                queue @ 0..2 => {
                    // And, in a long request, a block of them.
                    let first = 0x10 + number as u32 % 0x40;
                    let block = [0, 1, 2, 3].map(|page| first & !3 | page);
                    let pages = [&[first, number as u32 * 0x0101], &block[..]].concat();
                    let pages: Vec<u8> = pages.into_iter().flat_map(u32::to_le_bytes).collect();
                    guest.write(DATA, &pages);
                    let length = 4 + u32::from(which >> 7) * 20;
                    (queue.into(), vec![Buffer::read(DATA, length)])
                }
                2 => {
                    guest.write(DATA, &[which >> 2, 0]);
                    guest.write(DATA + 2, &number.to_le_bytes());
                    (2, vec![Buffer::read(DATA, 10)])
                }
                _ => (3, vec![Buffer::written(0x1_0000 + (number << 11), 0x2000)]),
            },
        }
    }

    /// Whether the request that a driver makes of a device first, by [`request`](Self::request) of
    /// [`first`](Self::first), has come out as it has to, where `written` is what the used ring says.
    pub(super) fn is_right(self, guest: &Guest, written: u32) -> bool {
        match self {
            Self::Raw | Self::Qcow2 => {
                let status = guest.read::<1>(DATA + 0x3000);
                written == 0x201 && status == [blk::S_OK]
            }
            Self::Net | Self::Console | Self::Balloon => written == 0,
            Self::Rng => written == 0x200,
            Self::Pmem => {
                written == 4 && guest.read::<4>(DATA + 0x3000) == pmem::RESP_OK.to_le_bytes()
            }
            // It is done, as it is in every state: unplugging all.
            Self::Memory => written == 10 && guest.read::<2>(DATA + 0x1000) == [0, 0],
        }
    }

    /// Which request is tried first of a device that has to work: a read of a disk, a packet, a line, a request for
    /// entropy, a page, a flush.
    pub(super) const fn first(self) -> u8 {
        match self {
            Self::Raw | Self::Qcow2 | Self::Rng | Self::Balloon | Self::Pmem => 0,
            Self::Net | Self::Console => 1,
            Self::Memory => 2,
        }
    }
}

/// The host's end of a device.
#[derive(Debug, Default)]
pub(super) struct Outside {
    ends: Vec<File>,
}

impl Outside {
    /// Something comes from outside, as far as there is room for it; and what has come out is taken.
    pub(super) fn happens(&self, which: u8, length: u16) {
        let mut bytes = vec![which; usize::from(length) % 3000];
        // Most packets have a header that says nothing: what is behind one that may not pass is not looked at.
        if !which.is_multiple_of(4) {
            let header = bytes.iter_mut().take(net::HEADER_SIZE);
            header.for_each(|byte| *byte = 0);
        }
        let at = usize::from(which) % self.ends.len().max(1);
        for mut end in &self.ends {
            let mut packet = [0; 4096];
            // A pipe's end for writing is not to be read, which is an error and no more.
            while end.read(&mut packet).is_ok_and(|size| size > 0) {}
        }
        if let Some(mut end) = self.ends.get(at) {
            let _full = end.write(&bytes);
        }
    }
}

/// An empty qcow2 image of [`DISK`] bytes: header, a table and a block of reference counts, and a table of the first
/// level. QEMU, docs/interop/qcow2.rst
fn write_qcow2(file: &File) -> io::Result<()> {
    const CLUSTER_BITS: u32 = 12;
    const CLUSTER: u64 = 1 << CLUSTER_BITS;
    // A table of the second level has 512 entries, of which one table is enough.
    let header: [&[u8]; 16] = [
        b"QFI\xfb",
        &3_u32.to_be_bytes(),
        &[0; 12], // no backing file
        &CLUSTER_BITS.to_be_bytes(),
        &DISK.to_be_bytes(),
        &[0; 4], // not encrypted
        &1_u32.to_be_bytes(),
        &(3 * CLUSTER).to_be_bytes(), // the table of the first level
        &CLUSTER.to_be_bytes(),       // the table of reference counts
        &1_u32.to_be_bytes(),
        &[0; 12],             // no snapshots
        &[0; 24],             // features
        &4_u32.to_be_bytes(), // counts of 16 bits
        &104_u32.to_be_bytes(),
        &[0; 8], // no extensions
        &[],
    ];
    file.set_len(4 * CLUSTER)?;
    file.write_all_at(&header.concat(), 0)?;
    file.write_all_at(&(2 * CLUSTER).to_be_bytes(), CLUSTER)?;
    file.write_all_at(&1_u16.to_be_bytes().repeat(4), 2 * CLUSTER)
}
