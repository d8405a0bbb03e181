//! The words of DMA, and the trait that memory code maps through.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use crate::{Backing, DmaMapping, IovaRange, MapError, Stats};

/// An I/O virtual address: what a device puts on the bus, before the IOMMU translates it. For a VM
/// without a virtual IOMMU it is the guest-physical address.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl fmt::Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iova({:#x})", self.0)
    }
}

impl fmt::Display for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// An address in this process, of memory that is there for devices to read and write.
///
/// Whoever gives one to [`DmaSpace::map`] promises that the memory from there on was mapped for that
/// purpose (guest RAM, a host device's BAR), that no Rust reference relies on its content, and that
/// it stays mapped until [`DmaSpace::unmap`].
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostVa(pub usize);

impl fmt::Debug for HostVa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostVa({:#x})", self.0)
    }
}

/// What devices may do with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Read it only: a guest's ROM.
    Read,
    /// Read and write it.
    ReadWrite,
}

impl Access {
    /// Whether devices may write.
    #[must_use]
    pub const fn writes(self) -> bool {
        matches!(self, Self::ReadWrite)
    }
}

/// Opens a part of a device as a dma-buf.
pub type OpenDmaBuf<'a> = dyn Fn() -> io::Result<OwnedFd> + 'a;

/// A set of mappings from I/O virtual addresses to memory, which devices are attached to.
///
/// Adjacent pieces with one owner are one mapping: where they continue each other in both address
/// spaces, they may reach the kernel as one, and are unmapped together.
pub trait DmaSpace: Send + Sync + fmt::Debug {
    /// Lets every device of this space reach `size` bytes at `host` by `iova`. All three are
    /// multiples of the page size. `owner` is what errors call it: `guest RAM below 4 GiB`.
    ///
    /// The kernel pins the memory, which takes as long as populating it does. A Type1 container does
    /// so when its first device is attached, if that is later.
    ///
    /// # Errors
    /// [`MapError`]; nothing is mapped then.
    fn map(
        &self,
        iova: Iova,
        host: HostVa,
        size: u64,
        access: Access,
        owner: &str,
    ) -> Result<(), MapError> {
        let mapping = DmaMapping {
            iova,
            host,
            size,
            access,
            backing: Backing::Memory,
            owner: owner.to_owned(),
        };
        self.add(mapping, &|| Err(io::ErrorKind::Unsupported.into()))
    }

    /// The same of memory that is unmapped by itself, whatever of the same owner lies beside it: it never shares a
    /// mapping. It need be unmapped alone no more than other mappings: one call can take several.
    ///
    /// # Errors
    /// As of [`map`](Self::map).
    fn map_block(
        &self,
        iova: Iova,
        host: HostVa,
        size: u64,
        access: Access,
        owner: &str,
    ) -> Result<(), MapError> {
        let mapping = DmaMapping {
            iova,
            host,
            size,
            access,
            backing: Backing::Block,
            owner: owner.to_owned(),
        };
        self.add(mapping, &|| Err(io::ErrorKind::Unsupported.into()))
    }

    /// How many more mappings the kernel takes; `None` where it has no such limit, or does not say.
    fn room(&self) -> Option<u64> {
        None
    }

    /// Lets every device of this space reach a part of another device by `iova`: peer-to-peer DMA.
    /// The part is `size` bytes of a BAR that are mapped at `host`; `dma_buf` opens the same bytes as
    /// a dma-buf, which iommufd maps in the place of an address.
    ///
    /// Nothing is pinned. A dma-buf's mapping is dead once the device that it belongs to is reset:
    /// it has to be unmapped and mapped again.
    ///
    /// # Errors
    /// [`MapError`]; [`MapError::NoPeerToPeer`] where the host's kernel cannot do it.
    fn map_device(
        &self,
        iova: Iova,
        host: HostVa,
        size: u64,
        dma_buf: &OpenDmaBuf<'_>,
        owner: &str,
    ) -> Result<(), MapError> {
        let mapping = DmaMapping {
            iova,
            host,
            size,
            access: Access::ReadWrite,
            backing: Backing::Device,
            owner: owner.to_owned(),
        };
        self.add(mapping, dma_buf)
    }

    /// What [`map`](Self::map) and [`map_device`](Self::map_device) come down to: `dma_buf` is for a
    /// part of a device.
    ///
    /// # Errors
    /// [`MapError`], as of these two.
    fn add(&self, mapping: DmaMapping, dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError>;

    /// Takes back what was mapped within `size` bytes from `iova`, which may be several mappings but
    /// no part of one.
    ///
    /// # Errors
    /// [`MapError`]; everything stays mapped then.
    fn unmap(&self, iova: Iova, size: u64) -> Result<(), MapError>;

    /// Where memory can be mapped, ascending: what the attached devices' IOMMUs reach, less what
    /// they reserve (MSI doorbells, firmware's RMRRs). Attaching a device can narrow it.
    ///
    /// # Errors
    /// [`MapError::Kernel`]
    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError>;

    /// What was done so far. Answers at once, also while something is being mapped.
    fn stats(&self) -> Stats;
}
