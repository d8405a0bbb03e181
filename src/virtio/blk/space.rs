//! A disk's configuration, of which the driver writes one field: whether writes may stay in a cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::virtio::config_space::{ChangeListener, ConfigSpace, Fields};
use crate::virtio::spec::blk;

/// A disk's configuration.
#[derive(Debug)]
pub(super) struct DiskSpace {
    fields: Arc<Fields>,
    writeback: AtomicBool,
}

impl DiskSpace {
    /// A configuration of these bytes, with `writeback` in its field.
    pub(super) fn new(bytes: Vec<u8>, writeback: bool) -> Arc<Self> {
        Arc::new(Self {
            fields: Fields::new(bytes),
            writeback: AtomicBool::new(writeback),
        })
    }

    /// Whether writes may stay in a cache until the driver flushes.
    pub(super) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// Puts the field back to what it was, without telling the driver.
    pub(super) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
    }

    /// Another size of the disk, in sectors. The driver hears of it.
    pub(super) fn set_capacity(&self, sectors: u64) {
        self.fields
            .set(blk::CONFIG_CAPACITY, &sectors.to_le_bytes());
    }
}

impl ConfigSpace for DiskSpace {
    fn size(&self) -> usize {
        self.fields.size()
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        self.fields.read(offset, data);
        let field = (blk::CONFIG_WRITEBACK as u64)
            .checked_sub(offset)
            .and_then(|at| data.get_mut(usize::try_from(at).ok()?));
        if let Some(field) = field {
            *field = self.writeback().into();
        }
    }

    /// Virtio 1.3 §5.2.5.2: the driver writes 0 or 1 to `writeback`; nothing else is its to write.
    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], true) = (data, offset == blk::CONFIG_WRITEBACK as u64) {
            self.set_writeback(value & 1 != 0);
        }
    }

    fn generation(&self) -> u8 {
        self.fields.generation()
    }

    fn on_change(&self, listener: ChangeListener) {
        self.fields.on_change(listener);
    }
}
