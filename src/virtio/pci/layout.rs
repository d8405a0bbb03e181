//! Where a virtio function has what: its one BAR, and the capabilities that point into it.
//! Virtio 1.3 §4.1.4.

use std::ops::Range;

use busway_pci::{ConfigSpace, Msix, MsixLocation};
use zerocopy::little_endian::U32;
use zerocopy::{Immutable, IntoBytes};

use crate::virtio::spec::pci::{self, common};

/// The BAR that has all of it: 64-bit memory, not prefetchable, for reading the ISR clears it.
pub(super) const BAR: u8 = 0;

/// Bytes from one notification register to the next.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

const PAGE: u64 = busway_pci::PAGE_SIZE;
const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const NOTIFY: u64 = 3 * PAGE;
const MSIX_TABLE: u64 = 4 * PAGE;
const MSIX_PBA: u64 = 5 * PAGE;
/// Bytes of the BAR.
pub(super) const BAR_SIZE: u64 = 8 * PAGE;

/// Most queues of a function: their vectors, and the configuration's, fill the table's page.
pub(super) const MAX_QUEUES: usize = 255;

/// A place in the BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BarPlace {
    /// The common configuration.
    Common(u64),
    /// The ISR register.
    Isr,
    /// The device's configuration.
    Device(u64),
    /// A queue's notification register.
    Notify(u16),
    /// The MSI-X table.
    Table(u64),
    /// The MSI-X pending bits.
    Pba(u64),
    /// Nothing.
    Nowhere,
}

/// What is `offset` bytes from the BAR's start.
pub(super) fn place(offset: u64) -> BarPlace {
    let within = offset % PAGE;
    match offset - within {
        COMMON => BarPlace::Common(within),
        ISR if within == 0 => BarPlace::Isr,
        DEVICE => BarPlace::Device(within),
        NOTIFY => BarPlace::Notify((within / u64::from(NOTIFY_MULTIPLIER)) as u16),
        MSIX_TABLE => BarPlace::Table(within),
        MSIX_PBA => BarPlace::Pba(within),
        _ => BarPlace::Nowhere,
    }
}

/// Where queue `index` is notified, from the BAR's start.
pub(super) fn doorbell(index: usize) -> u64 {
    NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER)
}

/// `struct virtio_pci_cap` after the identifier and the next pointer. Virtio 1.3 §4.1.4.
#[derive(Immutable, IntoBytes)]
#[repr(C)]
struct CapabilityBody {
    size: u8,
    kind: u8,
    bar: u8,
    id: u8,
    padding: [u8; 2],
    offset: U32,
    length: U32,
}

/// The body of a capability of `size` bytes in all.
fn capability(kind: u8, size: u8, offset: u64, length: u64) -> Vec<u8> {
    let body = CapabilityBody {
        size,
        kind,
        bar: BAR,
        id: 0,
        padding: [0; 2],
        offset: (offset as u32).into(),
        length: (length as u32).into(),
    };
    body.as_bytes().to_vec()
}

/// Where in configuration space the capabilities are that do something.
#[derive(Clone, Debug)]
pub(super) struct Capabilities {
    /// The MSI-X message control register.
    pub(super) msix_control: u16,
    /// The capability through which the BAR is reached without mapping it.
    pub(super) access: u16,
}

/// `struct virtio_pci_cap`'s size.
const CAP_SIZE: u8 = 16;
/// `struct virtio_pci_cfg_cap` and `struct virtio_pci_notify_cap`: four bytes more.
const LONG_CAP_SIZE: u8 = 20;
/// `bar` in `struct virtio_pci_cap`.
pub(super) const CAP_BAR: u16 = 4;
/// `offset` in `struct virtio_pci_cap`.
pub(super) const CAP_OFFSET: u16 = 8;
/// `length` in `struct virtio_pci_cap`.
pub(super) const CAP_LENGTH: u16 = 12;
/// `pci_cfg_data` in `struct virtio_pci_cfg_cap`.
const CAP_DATA: u16 = 16;

impl Capabilities {
    /// Adds them all to `config`, for a device with `queues` queues and a configuration of
    /// `config_size` bytes.
    pub(super) fn add(
        config: &mut ConfigSpace,
        msix: &Msix,
        queues: usize,
        config_size: usize,
    ) -> Self {
        let at = |offset| MsixLocation {
            bar: BAR,
            offset: offset as u32,
        };
        let msix = config.add_capability(
            busway_pci::spec::CAP_MSIX,
            &msix.capability_body(at(MSIX_TABLE), at(MSIX_PBA)),
            &Msix::CAPABILITY_WRITABLE,
        );
        let mut add = |body: &[u8], writable: &[u8]| {
            config.add_capability(busway_pci::spec::CAP_VENDOR, body, writable)
        };
        add(
            &capability(pci::CAP_COMMON_CFG, CAP_SIZE, COMMON, common::SIZE),
            &[],
        );
        let mut notify = capability(
            pci::CAP_NOTIFY_CFG,
            LONG_CAP_SIZE,
            NOTIFY,
            queues as u64 * u64::from(NOTIFY_MULTIPLIER),
        );
        notify.extend(NOTIFY_MULTIPLIER.to_le_bytes());
        add(&notify, &[]);
        add(&capability(pci::CAP_ISR_CFG, CAP_SIZE, ISR, 1), &[]);
        if config_size > 0 {
            let size = config_size as u64;
            add(
                &capability(pci::CAP_DEVICE_CFG, CAP_SIZE, DEVICE, size),
                &[],
            );
        }
        let mut access = capability(pci::CAP_PCI_CFG, LONG_CAP_SIZE, 0, 0);
        access.extend([0; 4]);
        // The BAR, the offset and the length are the driver's; the data is no register.
        let mut writable = vec![0, 0, 0xff, 0, 0, 0];
        writable.extend([0xff; 8]);
        Self {
            msix_control: msix + busway_pci::spec::MSIX_CONTROL,
            access: add(&access, &writable),
        }
    }

    /// Whether an access to configuration space touches the MSI-X control register.
    pub(super) fn touches_msix(&self, offset: u16, len: usize) -> bool {
        touches(self.msix_control..self.msix_control + 2, offset, len)
    }

    /// Whether it touches the access capability's data.
    pub(super) fn touches_data(&self, offset: u16, len: usize) -> bool {
        touches(self.data()..self.data() + 4, offset, len)
    }

    /// Where that data is.
    pub(super) fn data(&self) -> u16 {
        self.access + CAP_DATA
    }
}

fn touches(register: Range<u16>, offset: u16, len: usize) -> bool {
    let end = usize::from(offset).saturating_add(len);
    offset < register.end && end > usize::from(register.start)
}
