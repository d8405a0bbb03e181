//! A device's configuration structure: what the guest reads and writes of it, and how it hears that
//! the device has changed it. Virtio 1.3 §2.5.

use std::fmt::{self, Debug};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Is called after each change that the device makes of its configuration, on the thread that made it.
pub type ChangeListener = Box<dyn Fn() + Send + Sync>;

/// A device's configuration.
///
/// The size of a disk, the state of a link and what else may change while the driver runs is here:
/// whoever changes it changes the configuration, which tells the driver.
pub trait ConfigSpace: Send + Sync + Debug {
    /// Bytes.
    fn size(&self) -> usize;

    /// Reads at `offset`, any width; all ones beyond the end.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The driver writes at `offset`, any width. Nothing happens where the device has no field that a
    /// driver may write.
    fn write(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// A number that differs after each change from the one before it, so that a driver that reads a
    /// field in several accesses knows whether they belong together. Virtio 1.3 §2.5.1.
    fn generation(&self) -> u8;

    /// Has `listener` hear of changes from now on. The transport calls this once.
    fn on_change(&self, listener: ChangeListener);
}

/// A configuration of fields that the driver reads and only the device changes.
pub(super) struct Fields {
    image: Mutex<Image>,
    size: usize,
    listener: OnceLock<ChangeListener>,
}

#[derive(Debug)]
struct Image {
    bytes: Vec<u8>,
    generation: u8,
}

impl Debug for Fields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Fields").field(&*self.image()).finish()
    }
}

impl Fields {
    /// A configuration of these bytes.
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            size: bytes.len(),
            image: Mutex::new(Image {
                bytes,
                generation: 0,
            }),
            listener: OnceLock::new(),
        })
    }

    /// Changes the field at `offset`, which lies within the configuration. The driver hears of it where
    /// the value is another.
    pub(super) fn set(&self, offset: usize, value: &[u8]) {
        if self.set_untold(offset, value)
            && let Some(listener) = self.listener.get()
        {
            listener();
        }
    }

    /// The same of a field of whose changes no driver hears. Gives whether the value is another.
    pub(super) fn set_untold(&self, offset: usize, value: &[u8]) -> bool {
        let mut image = self.image();
        let end = offset.saturating_add(value.len());
        let Some(field) = image.bytes.get_mut(offset..end) else {
            return false;
        };
        if field == value {
            return false;
        }
        field.copy_from_slice(value);
        image.generation = image.generation.wrapping_add(1);
        true
    }

    fn image(&self) -> MutexGuard<'_, Image> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigSpace for Fields {
    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let image = self.image();
        let bytes = image.bytes.get(start..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0xff);
        }
    }

    fn generation(&self) -> u8 {
        self.image().generation
    }

    fn on_change(&self, listener: ChangeListener) {
        if self.listener.set(listener).is_err() {
            log::error!("a virtio device's configuration has a listener already");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_change_is_told_once_and_what_changes_nothing_is_not_told() {
        let fields = Fields::new(vec![1, 2, 3, 4]);
        let reported = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&reported);
        fields.on_change(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        fields.set(1, &[2, 3]);
        fields.set(3, &[9, 9]);
        fields.set(usize::MAX, &[9]);
        assert_eq!(
            (reported.load(Ordering::Relaxed), fields.generation()),
            (0, 0)
        );
        fields.set(1, &[2, 7]);
        assert_eq!(
            (reported.load(Ordering::Relaxed), fields.generation()),
            (1, 1)
        );
        let mut data = [0; 6];
        fields.read(0, &mut data);
        assert_eq!(data, [1, 2, 7, 4, 0xff, 0xff]);
    }

    #[test]
    fn what_a_driver_writes_changes_nothing() {
        let fields = Fields::new(vec![1, 2]);
        fields.write(0, &[9, 9]);
        let mut data = [0; 2];
        fields.read(0, &mut data);
        assert_eq!((data, fields.generation()), ([1, 2], 0));
    }

    #[test]
    fn a_field_that_changes_between_two_halves_of_a_read_is_seen_to_have_changed() {
        let fields = Fields::new(vec![0; 8]);
        let half = |offset| {
            let mut data = [0; 4];
            fields.read(offset, &mut data);
            u32::from_le_bytes(data)
        };
        for value in 1..=300_u64 {
            let before = fields.generation();
            let low = half(0);
            fields.set(0, &(value | value << 32).to_le_bytes());
            assert_ne!(low, half(4));
            assert_ne!(before, fields.generation());
        }
    }
}
