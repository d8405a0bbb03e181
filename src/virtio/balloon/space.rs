//! A balloon's configuration: how large it is to be, which the device says, and how large it is, which the driver says.
//! Virtio 1.3 §5.5.4.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use crate::virtio::config_space::{ChangeListener, ConfigSpace, Fields};
use crate::virtio::spec::balloon;

/// `struct virtio_balloon_config`; numbers are pages of 4 KiB.
#[derive(Debug)]
pub(crate) struct BalloonSpace {
    fields: Arc<Fields>,
    target: AtomicU32,
    actual: AtomicU32,
}

impl BalloonSpace {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            fields: Fields::new(vec![0; balloon::CONFIG_SIZE]),
            target: AtomicU32::new(0),
            actual: AtomicU32::new(0),
        })
    }

    /// Pages that the balloon is to have.
    pub(crate) fn target(&self) -> u32 {
        self.target.load(Relaxed)
    }

    /// Has the driver hear of another number.
    pub(super) fn set_target(&self, pages: u32) {
        self.target.store(pages, Relaxed);
        self.fields
            .set(balloon::CONFIG_NUM_PAGES, &pages.to_le_bytes());
    }

    /// Pages that it has, as the driver says.
    pub(crate) fn actual(&self) -> u32 {
        self.actual.load(Relaxed)
    }

    pub(super) fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Relaxed);
    }
}

impl ConfigSpace for BalloonSpace {
    fn size(&self) -> usize {
        self.fields.size()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.fields.read(offset, data);
        let actual = self.actual().to_le_bytes();
        for (at, byte) in (offset..).zip(data) {
            let within = at.checked_sub(balloon::CONFIG_ACTUAL as u64);
            let within = within.and_then(|within| usize::try_from(within).ok());
            if let Some(of_actual) = within.and_then(|within| actual.get(within)) {
                *byte = *of_actual;
            }
        }
    }

    /// The driver writes `actual`, in one access of four bytes; nothing else is its to write.
    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(pages), true) = (data.try_into(), offset == balloon::CONFIG_ACTUAL as u64) {
            self.set_actual(u32::from_le_bytes(pages));
        }
    }

    fn generation(&self) -> u8 {
        self.fields.generation()
    }

    fn on_change(&self, listener: ChangeListener) {
        self.fields.on_change(listener);
    }
}
