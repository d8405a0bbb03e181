//! Devices of any kind that another process serves: the kind and its queues are said by whoever starts the VM, and the
//! features and the configuration are the back end's.
//!
//! Neither a vCPU nor the event loop speaks with a back end, so the driver reads a copy of the configuration. What it
//! writes is passed on by the link's thread, which then asks for the whole anew; a read that follows a write waits for
//! that, but not for long. Virtio 1.3 §2.5; QEMU, docs/interop/vhost-user.rst, VHOST_USER_SET_CONFIG

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use busway_vfio::EventFd;

use super::connection::Connection;
use super::kind::{BackEndsConfig, Contents, Kind};
use super::link::Loss;
use crate::config::GenericConfig;
use crate::virtio::config_space::{ChangeListener, ConfigSpace};
use crate::virtio::spec::device_type;
use crate::virtio::vhost::VhostError;

/// The features that belong to a kind of device: bits 0 to 23, and 50 up. The others are the rings' and the
/// transport's, or vhost's own. Virtio 1.3 §2.2
const OF_THE_KIND: u64 = 0xff_ffff | u64::MAX << 50;

/// How long a read of the configuration waits for what the driver has written before.
const CURRENT: Duration = Duration::from_millis(200);

/// Bytes of the configurations of kinds, as back ends have had them longest: some refuse to be asked for more than
/// they have. Virtio 1.3 §5; what is not here has 256, as many as QEMU asks for (`VHOST_USER_MAX_CONFIG_SIZE`).
const CONFIG_SIZES: &[(u16, usize)] = &[
    (device_type::BLOCK, 60),
    (device_type::CONSOLE, 12),
    (device_type::ENTROPY, 0),
    (8, 36),
    (16, 16),
    (18, 136),
    (device_type::VSOCK, 8),
    (20, 56),
    (25, 12),
    (device_type::FS, 40),
    (34, 0),
    (36, 2),
    (41, 8),
];
const CONFIG_SIZE: usize = 256;

/// PCI class codes, as QEMU has them for its devices of these kinds; the others have none (0xff, unassigned).
const CLASSES: &[(u16, u32)] = &[
    (device_type::BLOCK, 0x01_00_00),
    (device_type::CONSOLE, 0x07_80_00),
    (device_type::ENTROPY, 0x10_80_00),
    (8, 0x01_00_00),
    (16, 0x03_80_00),
    (18, 0x09_80_00),
    (device_type::VSOCK, 0x07_80_00),
    (25, 0x04_01_00),
    (device_type::FS, 0x01_80_00),
    (36, 0x0c_09_00),
];
const NO_CLASS: u32 = 0xff_00_00;

/// Kinds whose requests say all that there is to know, so that another back end goes on where no request is open.
const FORGETFUL: &[u16] = &[device_type::BLOCK, device_type::ENTROPY];

/// The device that `config` asks for.
pub(super) fn kind(config: &GenericConfig) -> Kind {
    let of = |table: &[(u16, usize)]| {
        let mut entries = table.iter();
        let found = entries.find(|(kind, _)| *kind == config.virtio_id);
        found.map_or(CONFIG_SIZE, |(_, size)| *size)
    };
    let mut classes = CLASSES.iter();
    let class = classes.find(|(kind, _)| *kind == config.virtio_id);
    Kind {
        device_type: config.virtio_id,
        class: class.map_or(NO_CLASS, |(_, class)| *class),
        features: OF_THE_KIND,
        own: 0,
        net: None,
        queue_sizes: config.queue_sizes.clone(),
        contents: Contents::Passed(
            config
                .config_size
                .map_or_else(|| of(CONFIG_SIZES), usize::from),
        ),
        loss: match FORGETFUL.contains(&config.virtio_id) {
            true => Loss::Requests,
            false => Loss::Session,
        },
    }
}

/// A configuration that the back end has and the driver may write.
pub(super) struct Passed {
    state: Mutex<State>,
    /// What was written has been passed on, or will not be for now.
    current: Condvar,
    size: usize,
    /// Wakes who passes on.
    wake: EventFd,
    listener: OnceLock<ChangeListener>,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    /// Which bytes the driver has written that the back end has not been told of.
    written: Vec<bool>,
    /// How often the driver has written, and how much of that the back end knows.
    writes: u64,
    known: u64,
    generation: u8,
    served: bool,
}

impl State {
    fn is_current(&self) -> bool {
        self.known == self.writes || !self.served
    }

    /// Runs of bytes to be passed on, each with its offset.
    fn take_written(&mut self) -> Vec<(usize, Vec<u8>)> {
        let mut runs: Vec<(usize, Vec<u8>)> = Vec::new();
        for (at, (byte, written)) in self.bytes.iter().zip(&mut self.written).enumerate() {
            if !std::mem::take(written) {
                continue;
            }
            match runs.last_mut() {
                Some((start, run)) if *start + run.len() == at => run.push(*byte),
                _ => runs.push((at, vec![*byte])),
            }
        }
        runs
    }

    /// Gives back what was taken to be passed on.
    fn put_back(&mut self, runs: &[(usize, Vec<u8>)]) {
        for (start, run) in runs {
            let fields = self.written.iter_mut().skip(*start);
            fields.take(run.len()).for_each(|written| *written = true);
        }
    }

    /// Whether it is another for the driver, but for what that has written meanwhile.
    fn replace(&mut self, bytes: &[u8]) -> bool {
        let mut changed = false;
        let fields = self.bytes.iter_mut().zip(&self.written);
        for ((field, written), byte) in fields.zip(bytes) {
            if !written && field != byte {
                *field = *byte;
                changed = true;
            }
        }
        if changed {
            self.generation = self.generation.wrapping_add(1);
        }
        changed
    }
}

impl fmt::Debug for Passed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Passed").field(&*self.state()).finish()
    }
}

impl Passed {
    /// The first `size` bytes of what the back end has, or nothing where it has no configuration. `wake` wakes who
    /// passes on what is written.
    pub(super) fn open(
        size: usize,
        connection: &Connection,
        wake: &EventFd,
    ) -> Result<Arc<Self>, VhostError> {
        let size = if connection.has_config() { size } else { 0 };
        let bytes = match size {
            0 => Vec::new(),
            size => connection.config(size).map_err(|error| VhostError {
                what: "GET_CONFIG (config_size= says how many bytes the device has)",
                ..error
            })?,
        };
        Ok(Self::new(bytes, wake))
    }

    fn new(bytes: Vec<u8>, wake: &EventFd) -> Arc<Self> {
        Arc::new(Self {
            size: bytes.len(),
            state: Mutex::new(State {
                written: vec![false; bytes.len()],
                bytes,
                served: true,
                ..State::default()
            }),
            current: Condvar::new(),
            wake: wake.clone(),
            listener: OnceLock::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ConfigSpace for Passed {
    fn size(&self) -> usize {
        self.size
    }

    fn read(&self, offset: u64, data: &mut [u8]) {
        let waited = self
            .current
            .wait_timeout_while(self.state(), CURRENT, |state| !state.is_current());
        let (state, _late) = waited.unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = state.bytes.get(start..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(i).copied().unwrap_or(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        {
            let mut state = self.state();
            let State { bytes, written, .. } = &mut *state;
            let fields = bytes.iter_mut().zip(written).skip(start);
            for ((field, written), byte) in fields.zip(data) {
                (*field, *written) = (*byte, true);
            }
            state.writes += 1;
        }
        self.wake.signal();
    }

    fn generation(&self) -> u8 {
        self.state().generation
    }

    fn on_change(&self, listener: ChangeListener) {
        if self.listener.set(listener).is_err() {
            log::error!("a virtio device's configuration has a listener already");
        }
    }
}

impl BackEndsConfig for Arc<Passed> {
    fn refresh(&self, connection: &Connection) -> Result<(), VhostError> {
        if self.size == 0 {
            return Ok(());
        }
        let bytes = connection.config(self.size)?;
        let changed = self.state().replace(&bytes);
        if changed && let Some(listener) = self.listener.get() {
            listener();
        }
        Ok(())
    }

    /// What comes of it is no change that the driver has to hear of: it has made it.
    fn pass_on(&self, connection: &Connection) -> Result<(), VhostError> {
        let (runs, writes) = {
            let mut state = self.state();
            if state.known == state.writes {
                return Ok(());
            }
            (state.take_written(), state.writes)
        };
        for (offset, bytes) in &runs {
            if let Err(error) = connection.set_config(*offset, bytes) {
                // The next back end hears of all of it.
                self.state().put_back(&runs);
                return Err(error);
            }
        }
        if !runs.is_empty() {
            let bytes = connection.config(self.size)?;
            self.state().replace(&bytes);
        }
        self.state().known = writes;
        self.current.notify_all();
        Ok(())
    }

    fn set_served(&self, served: bool) {
        self.state().served = served;
        self.current.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn passed(size: usize) -> Arc<Passed> {
        Passed::new(vec![0; size], &EventFd::new().unwrap())
    }

    #[test]
    fn features_of_rings_and_of_vhost_are_not_passed_on() {
        let config = GenericConfig::new(4, "/s", vec![64]);
        let features = kind(&config).features;
        // VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, packed rings, an IOMMU's addresses.
        for bit in [26, 28, 29, 30, 32, 33, 34, 40] {
            assert_eq!(features & 1 << bit, 0, "{bit}");
        }
        assert_eq!(features & 1, 1);
        assert_eq!(features >> 50 & 1, 1);
    }

    #[test]
    fn a_read_waits_for_what_was_written_and_no_longer_than_that_where_nobody_serves() {
        let space = passed(8);
        space.set_served(false);
        let start = std::time::Instant::now();
        space.write(0, &[1]);
        let mut byte = [0];
        space.read(0, &mut byte);
        assert_eq!(byte, [1]);
        assert!(start.elapsed() < CURRENT);
        space.set_served(true);
        let start = std::time::Instant::now();
        space.read(0, &mut byte);
        assert!(start.elapsed() >= CURRENT);
    }

    proptest! {
        /// Whatever the driver writes, each byte of it that lies in the configuration is passed on once, with the
        /// last value, and nothing else is.
        #[test]
        fn what_is_passed_on_is_what_was_written(
            size in 0_usize..40,
            writes in prop::collection::vec((any::<u64>(), 0_u64..50, prop::collection::vec(any::<u8>(), 0..9)), 0..12),
        ) {
            let space = passed(size);
            let mut expected = vec![None; size];
            for (far, near, data) in &writes {
                let offset = if far % 5 == 0 { *far } else { *near };
                space.write(offset, data);
                for (i, byte) in data.iter().enumerate() {
                    let at = usize::try_from(offset).unwrap_or(usize::MAX).saturating_add(i);
                    if let Some(field) = expected.get_mut(at) {
                        *field = Some(*byte);
                    }
                }
            }
            let runs = space.state().take_written();
            let mut passed = vec![None; size];
            for (at, run) in runs {
                for (i, byte) in run.into_iter().enumerate() {
                    prop_assert_eq!(passed[at + i].replace(byte), None);
                }
            }
            prop_assert_eq!(passed, expected);
            prop_assert!(space.state().take_written().is_empty());
        }
    }
}
