//! What the PCI side of a passthrough device stands on: one device's regions, interrupts and reset.
//!
//! The kernel's VFIO is one implementation ([`KernelDevice`](crate::KernelDevice)), a fake device in
//! tests another. Error and request events are interrupts here as well: VFIO numbers them so.

use std::fmt::Debug;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use busway_pci::AtomicOps;
use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR5_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ROM_REGION_INDEX,
};

use crate::areas::Area;
use crate::{Affected, FunctionReset, Mapping};

/// A region of a VFIO PCI device. linux/vfio.h
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RegionIndex(u32);

impl RegionIndex {
    /// Configuration space.
    pub const CONFIG: Self = Self(VFIO_PCI_CONFIG_REGION_INDEX);
    /// The expansion ROM.
    pub const ROM: Self = Self(VFIO_PCI_ROM_REGION_INDEX);

    /// The BAR numbered `number`, 0 to 5.
    #[must_use]
    pub const fn bar(number: u8) -> Option<Self> {
        if number as u32 <= VFIO_PCI_BAR5_REGION_INDEX {
            Some(Self(number as u32))
        } else {
            None
        }
    }

    /// The kernel's number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0
    }
}

/// What there is to know of a region.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceRegion {
    /// Bytes; zero where the device has no such region.
    pub size: u64,
    /// It can be read.
    pub readable: bool,
    /// It can be written.
    pub writable: bool,
    /// The parts that can be mapped, ascending and disjoint.
    pub areas: Vec<Area>,
}

/// A kind of interrupt of a VFIO PCI device. linux/vfio.h
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqIndex {
    /// The pin.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
    /// An error that the device does not recover from by itself; one vector.
    Error,
    /// The host wants the device back; one vector.
    Request,
}

impl IrqIndex {
    /// The kernel's number.
    #[must_use]
    pub const fn number(self) -> u32 {
        match self {
            Self::Intx => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
            Self::Error => VFIO_PCI_ERR_IRQ_INDEX,
            Self::Request => VFIO_PCI_REQ_IRQ_INDEX,
        }
    }
}

/// What there is to know of a kind of interrupt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many vectors.
    pub count: u32,
    /// Vectors can be added while others are in use (`VFIO_IRQ_INFO_NORESIZE` is clear): for MSI-X
    /// from Linux 6.5 on, where the host's interrupt controller allows it.
    pub resizable: bool,
}

/// Interrupts could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum IrqError {
    /// the host gives the device {given} vectors at most
    #[error("the host gives the device {given} vectors at most")]
    Fewer {
        /// How many it can have.
        given: u32,
    },
    /// {users}, and this device cannot be told apart on it
    #[error(
        "{users}, and this device cannot share it: it has no working interrupt disable bit (PCI \
         2.3); unbind those others from their drivers, put the card into another slot, or use a \
         driver that uses MSI in the guest"
    )]
    LineShared {
        /// Who else is on the line.
        users: String,
    },
    /// VFIO_DEVICE_SET_IRQS failed: {0}
    #[error("VFIO_DEVICE_SET_IRQS failed: {0}")]
    Kernel(io::Error),
}

/// One host device, opened.
pub trait DeviceIo: Send + Sync + Debug {
    /// What a region is; an empty one where the device has none by this number.
    fn region(&self, index: RegionIndex) -> DeviceRegion;

    /// Reads `data.len()` bytes, `offset` bytes into a region. For 1, 2 and 4 naturally aligned
    /// bytes this is one access of the device; for 8 it is one or two, as the kernel can.
    ///
    /// # Errors
    /// The device is gone, asleep, or has nothing there.
    fn region_read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()>;

    /// Writes; as [`region_read`](Self::region_read).
    ///
    /// # Errors
    /// As for reading.
    fn region_write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()>;

    /// The doubleword at `offset` of the device's configuration space without what VFIO makes of it, so
    /// with all capabilities in its lists. Nothing where the host does not show it.
    fn own_config(&self, offset: u16) -> Option<u32> {
        let _ = offset;
        None
    }

    /// Which of the device's AtomicOps the host carries out at its root port.
    fn atomic_ops(&self) -> AtomicOps {
        AtomicOps::NONE
    }

    /// Maps a part of a region that [`DeviceRegion::areas`] covers.
    ///
    /// # Errors
    /// The kernel's.
    fn map(&self, index: RegionIndex, area: Area) -> io::Result<Mapping>;

    /// Opens a part of a region that [`DeviceRegion::areas`] covers as a dma-buf.
    ///
    /// # Errors
    /// The kernel's: ENOTTY before Linux 6.19, and where it is built without it; EOPNOTSUPP where the
    /// device's driver is a variant without it.
    fn dma_buf(&self, index: RegionIndex, area: Area) -> io::Result<OwnedFd> {
        let _ = (index, area);
        Err(io::Error::from_raw_os_error(libc::ENOTTY))
    }

    /// How many interrupts of a kind there are.
    fn irq(&self, index: IrqIndex) -> IrqInfo;

    /// Has vector `first + i` signal `events[i]`, or nothing. The first call for a kind enables it,
    /// with `first + events.len()` vectors; later ones change the vectors that they name and leave
    /// the others alone.
    ///
    /// # Errors
    /// [`IrqError`]; the vectors named signal nothing then.
    fn set_irqs(
        &self,
        index: IrqIndex,
        first: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), IrqError>;

    /// Has the device unmask itself whenever `event` is signalled: an interrupt pin, which masks
    /// itself when it has signalled and has to be set before. A signal that is there already counts.
    ///
    /// # Errors
    /// [`IrqError::Kernel`]: ENOTTY where the device's driver takes no eventfd for it.
    fn unmask_on(&self, index: IrqIndex, event: BorrowedFd<'_>) -> Result<(), IrqError>;

    /// Unmasks an interrupt pin now.
    ///
    /// # Errors
    /// [`IrqError::Kernel`]
    fn unmask(&self, index: IrqIndex) -> Result<(), IrqError> {
        let _ = index;
        Err(IrqError::Kernel(io::Error::from_raw_os_error(libc::ENOTTY)))
    }

    /// Disables a kind of interrupt. Nothing happens where it is not enabled.
    ///
    /// # Errors
    /// [`IrqError::Kernel`]
    fn disable_irqs(&self, index: IrqIndex) -> Result<(), IrqError>;

    /// Whether it is a mediated device: made by a driver of the host's, on no bus, and with memory that
    /// driver may take away at any time, so that nobody else is to reach it by DMA.
    fn is_mediated(&self) -> bool {
        false
    }

    /// Whether the device can be reset by itself: by FLR, a change of power state, or because it is
    /// alone on its bus.
    fn can_reset(&self) -> bool;

    /// Resets the device. Interrupts have to be disabled before.
    ///
    /// # Errors
    /// The kernel's; ENOTTY where there is no way.
    fn reset(&self) -> io::Result<()>;

    /// What [`reset`](Self::reset) does; nothing where it cannot be done.
    fn function_reset(&self) -> Option<FunctionReset> {
        self.can_reset().then_some(FunctionReset::Other)
    }

    /// Whether the kernel resets the device, as far as it can be by itself, when this process opens it
    /// and when it closes it: not so where somebody else has it open as well.
    fn is_reset_by_opening(&self) -> bool {
        false
    }

    /// What a reset of the device's slot or bus touches, the device itself among it.
    ///
    /// # Errors
    /// The kernel's; ENODEV where neither can be reset.
    fn hot_reset_reach(&self) -> io::Result<Vec<Affected>> {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }

    /// Resets the device's slot or bus. Everything that this touches has to be quiet.
    ///
    /// # Errors
    /// The kernel's; EINVAL where it does not hold all of it to be this process's.
    fn hot_reset(&self) -> io::Result<()> {
        Err(io::Error::from_raw_os_error(libc::ENODEV))
    }
}
