//! What a virtio device remembers, as a plain structure, and the common configuration through which
//! the guest reads and writes it. Virtio 1.3 §4.1.4.3.
//!
//! No descriptor, no thread and no memory is touched here: a write that calls for more than state is
//! answered with a [`Change`].

use serde::{Deserialize, Serialize};

use crate::virtio::spec::pci::common;
use crate::virtio::spec::{NO_VECTOR, feature, status};

/// One queue's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The most descriptors that it can have.
    pub max_size: u16,
    /// The driver's number of descriptors: a power of two up to `max_size`.
    pub size: u16,
    /// Its MSI-X vector.
    pub vector: u16,
    /// The driver has set it up; from now on its registers are fixed.
    pub enabled: bool,
    /// Guest-physical address of the descriptor table.
    pub desc: u64,
    /// Guest-physical address of the driver area, the available ring.
    pub driver: u64,
    /// Guest-physical address of the device area, the used ring.
    pub device: u64,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size,
            vector: NO_VECTOR,
            enabled: false,
            desc: 0,
            driver: 0,
            device: 0,
        }
    }
}

/// A device's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    /// What the device offers.
    pub device_features: u64,
    /// Which half of it is read.
    pub device_feature_select: u32,
    /// What the driver accepts.
    pub driver_features: u64,
    /// Which half of it is read and written.
    pub driver_feature_select: u32,
    /// The MSI-X vector for changes of the configuration.
    pub config_vector: u16,
    /// Device status, without `DEVICE_NEEDS_RESET`, which is the workers' to say.
    pub status: u8,
    /// Which queue's registers are read and written.
    pub queue_select: u16,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
}

/// What the common configuration shows that is not a register: it changes without the driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Outside {
    /// A reset goes on, and this is the status until it is over.
    pub(super) resetting: Option<u8>,
    /// The device waits for a reset.
    pub(super) needs_reset: bool,
    /// The generation of the device's configuration.
    pub(super) generation: u8,
}

/// What a write to the common configuration calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Only the registers' state changes.
    None,
    /// The driver wants the device reset.
    Reset,
    /// The driver is ready: the device may use its queues.
    Ready,
    /// The vector for changes of the configuration is another.
    ConfigVector,
    /// This queue's vector is another.
    QueueVector(u16),
}

impl Registers {
    pub(super) fn new(device_features: u64, queue_sizes: &[u16]) -> Self {
        Self {
            device_features,
            device_feature_select: 0,
            driver_features: 0,
            driver_feature_select: 0,
            config_vector: NO_VECTOR,
            status: 0,
            queue_select: 0,
            queues: queue_sizes
                .iter()
                .copied()
                .map(QueueRegisters::new)
                .collect(),
        }
    }

    /// Goes back to the state before the driver came. Virtio 1.3 §2.4.
    pub(super) fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.max_size).collect();
        *self = Self::new(self.device_features, &sizes);
    }

    /// Whether a driver of this device could have brought the registers to hold `saved`; if not, what
    /// stands against it. `vectors` is the MSI-X table's size, and `accepts` as for
    /// [`write`](Self::write).
    pub(super) fn could_be(
        &self,
        saved: &Self,
        vectors: u16,
        accepts: impl FnOnce(u64) -> bool,
    ) -> Result<(), &'static str> {
        let is_vector = |vector| vector < vectors || vector == NO_VECTOR;
        let features = saved.driver_features;
        let known = features & !self.device_features == 0;
        let agreed = saved.status & status::FEATURES_OK != 0;
        if self.queues.len() != saved.queues.len() {
            return Err("it has another number of queues");
        }
        if agreed && !(known && saved.negotiated(feature::VERSION_1) && accepts(features)) {
            return Err("the driver uses a feature that this device does not offer");
        }
        if saved.status & status::DEVICE_NEEDS_RESET != 0
            || (saved.status & status::DRIVER_OK != 0 && !agreed)
        {
            return Err("its status is none that a driver can set");
        }
        if !is_vector(saved.config_vector) {
            return Err("a vector is beyond its table");
        }
        for (own, saved) in self.queues.iter().zip(&saved.queues) {
            if !saved.size.is_power_of_two() || saved.size > own.max_size {
                return Err("a queue has a size that this device does not offer");
            }
            if !is_vector(saved.vector) {
                return Err("a queue's vector is beyond the table");
            }
        }
        Ok(())
    }

    /// Takes what was [found to be possible](Self::could_be). What the device offers stays its own.
    pub(super) fn restore(&mut self, saved: &Self) {
        let own = std::mem::replace(self, saved.clone());
        self.device_features = own.device_features;
        for (queue, own) in self.queues.iter_mut().zip(&own.queues) {
            queue.max_size = own.max_size;
        }
    }

    /// Whether `feature` was negotiated.
    pub(super) fn negotiated(&self, feature: u64) -> bool {
        self.driver_features & feature != 0
    }

    /// Reads at `offset`, any width; all ones beyond the end.
    pub(super) fn read(&self, offset: u64, data: &mut [u8], outside: Outside) {
        let mut image = [0; common::SIZE as usize];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = at as usize;
            if let Some(place) = image.get_mut(at..at + bytes.len()) {
                place.copy_from_slice(bytes);
            }
        };
        put(
            common::DEVICE_FEATURE_SELECT,
            &self.device_feature_select.to_le_bytes(),
        );
        put(
            common::DEVICE_FEATURE,
            &half(self.device_features, self.device_feature_select).to_le_bytes(),
        );
        put(
            common::DRIVER_FEATURE_SELECT,
            &self.driver_feature_select.to_le_bytes(),
        );
        put(
            common::DRIVER_FEATURE,
            &half(self.driver_features, self.driver_feature_select).to_le_bytes(),
        );
        put(
            common::CONFIG_MSIX_VECTOR,
            &self.config_vector.to_le_bytes(),
        );
        put(
            common::NUM_QUEUES,
            &(self.queues.len() as u16).to_le_bytes(),
        );
        let needs_reset = if outside.needs_reset {
            status::DEVICE_NEEDS_RESET
        } else {
            0
        };
        let status = outside.resetting.unwrap_or(self.status | needs_reset);
        put(common::DEVICE_STATUS, &[status]);
        put(common::CONFIG_GENERATION, &[outside.generation]);
        put(common::QUEUE_SELECT, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(common::QUEUE_SIZE, &queue.size.to_le_bytes());
            put(common::QUEUE_MSIX_VECTOR, &queue.vector.to_le_bytes());
            put(
                common::QUEUE_ENABLE,
                &u16::from(queue.enabled).to_le_bytes(),
            );
            put(common::QUEUE_NOTIFY_OFF, &self.queue_select.to_le_bytes());
            put(common::QUEUE_DESC, &queue.desc.to_le_bytes());
            put(common::QUEUE_DRIVER, &queue.driver.to_le_bytes());
            put(common::QUEUE_DEVICE, &queue.device.to_le_bytes());
        } else {
            // A size of 0 says that there is no such queue.
            put(common::QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = image.get(start..).unwrap_or_default();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = there.get(i).copied().unwrap_or(0xff);
        }
    }

    /// Writes at `offset`. A write that is not of a field's width, or not allowed in this state,
    /// does nothing. `vectors` is the MSI-X table's size; `accepts` the device's say on a set of
    /// features.
    pub(super) fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        vectors: u16,
        accepts: impl FnOnce(u64) -> bool,
    ) -> Change {
        match *data {
            [value] if offset == common::DEVICE_STATUS => self.write_status(value, accepts),
            [low, high] => self.write16(offset, u16::from_le_bytes([low, high]), vectors),
            [a, b, c, d] => {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                Change::None
            }
            [a, b, c, d, e, f, g, h]
                if offset >= common::QUEUE_DESC && offset.is_multiple_of(8) =>
            {
                self.write32(offset, u32::from_le_bytes([a, b, c, d]));
                self.write32(offset.wrapping_add(4), u32::from_le_bytes([e, f, g, h]));
                Change::None
            }
            _ => Change::None,
        }
    }

    fn write_status(&mut self, value: u8, accepts: impl FnOnce(u64) -> bool) -> Change {
        if value == 0 {
            return Change::Reset;
        }
        let mut new = (value & !status::DEVICE_NEEDS_RESET) & !self.status;
        if new & status::FEATURES_OK != 0 {
            let known = self.driver_features & !self.device_features == 0;
            let modern = self.negotiated(feature::VERSION_1);
            if !known || !modern || !accepts(self.driver_features) {
                new &= !status::FEATURES_OK;
            }
        }
        let features_ok = (self.status | new) & status::FEATURES_OK != 0;
        if new & status::DRIVER_OK != 0 && !features_ok {
            new &= !status::DRIVER_OK;
        }
        // A driver must not clear a bit, save all of them. Virtio 1.3 §2.1.1.
        self.status |= new;
        if new & status::DRIVER_OK != 0 {
            Change::Ready
        } else {
            Change::None
        }
    }

    fn write16(&mut self, offset: u64, value: u16, vectors: u16) -> Change {
        let vector = if value < vectors { value } else { NO_VECTOR };
        let select = self.queue_select;
        match offset {
            common::CONFIG_MSIX_VECTOR => {
                self.config_vector = vector;
                return Change::ConfigVector;
            }
            common::QUEUE_SELECT => self.queue_select = value,
            common::QUEUE_MSIX_VECTOR => {
                if let Some(queue) = self.queues.get_mut(usize::from(select)) {
                    queue.vector = vector;
                    return Change::QueueVector(select);
                }
            }
            common::QUEUE_SIZE => {
                if let Some(queue) = self.unlocked_queue()
                    && value.is_power_of_two()
                    && value <= queue.max_size
                {
                    queue.size = value;
                }
            }
            common::QUEUE_ENABLE => {
                if let Some(queue) = self.unlocked_queue()
                    && value == 1
                {
                    queue.enabled = true;
                }
            }
            _ => {}
        }
        Change::None
    }

    fn write32(&mut self, offset: u64, value: u32) {
        match offset {
            common::DEVICE_FEATURE_SELECT => self.device_feature_select = value,
            common::DRIVER_FEATURE_SELECT => self.driver_feature_select = value,
            common::DRIVER_FEATURE if self.status & status::FEATURES_OK == 0 => {
                match self.driver_feature_select {
                    0 => set_low(&mut self.driver_features, value),
                    1 => set_high(&mut self.driver_features, value),
                    _ => {}
                }
            }
            _ => {
                let Some(queue) = self.unlocked_queue() else {
                    return;
                };
                match offset.checked_sub(common::QUEUE_DESC) {
                    Some(0) => set_low(&mut queue.desc, value),
                    Some(4) => set_high(&mut queue.desc, value),
                    Some(8) => set_low(&mut queue.driver, value),
                    Some(12) => set_high(&mut queue.driver, value),
                    Some(16) => set_low(&mut queue.device, value),
                    Some(20) => set_high(&mut queue.device, value),
                    _ => {}
                }
            }
        }
    }

    /// The selected queue, where the driver may still change it.
    fn unlocked_queue(&mut self) -> Option<&mut QueueRegisters> {
        let running = self.status & status::DRIVER_OK != 0;
        self.queues
            .get_mut(usize::from(self.queue_select))
            .filter(|queue| !queue.enabled && !running)
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(register: &mut u64, value: u32) {
    *register = (*register & !u64::from(u32::MAX)) | u64::from(value);
}

fn set_high(register: &mut u64, value: u32) {
    *register = (*register & u64::from(u32::MAX)) | u64::from(value) << 32;
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn registers() -> Registers {
        Registers::new(feature::VERSION_1 | 0b110, &[256, 16])
    }

    fn write(registers: &mut Registers, offset: u64, data: &[u8]) -> Change {
        registers.write(offset, data, 3, |features| features & 0b100 == 0)
    }

    fn status_of(registers: &Registers) -> u8 {
        let mut byte = [0];
        registers.read(common::DEVICE_STATUS, &mut byte, Outside::default());
        byte[0]
    }

    fn accept(registers: &mut Registers, features: u64) {
        for (select, half) in [(0_u32, features as u32), (1, (features >> 32) as u32)] {
            write(
                registers,
                common::DRIVER_FEATURE_SELECT,
                &select.to_le_bytes(),
            );
            write(registers, common::DRIVER_FEATURE, &half.to_le_bytes());
        }
    }

    #[test]
    fn features_are_agreed_only_where_offered_modern_and_accepted() {
        let legacy = 0b010;
        let unknown = feature::VERSION_1 | 0b1000;
        let unacceptable = feature::VERSION_1 | 0b100;
        let fine = feature::VERSION_1 | 0b010;
        for (features, agreed) in [
            (legacy, false),
            (unknown, false),
            (unacceptable, false),
            (fine, true),
        ] {
            let mut registers = registers();
            accept(&mut registers, features);
            write(&mut registers, common::DEVICE_STATUS, &[1 | 2 | 8]);
            assert_eq!(
                status_of(&registers) & status::FEATURES_OK != 0,
                agreed,
                "{features:#x}"
            );
            let ready = write(&mut registers, common::DEVICE_STATUS, &[1 | 2 | 8 | 4]);
            assert_eq!(ready == Change::Ready, agreed, "{features:#x}");
        }
    }

    #[test]
    fn features_and_queues_are_fixed_once_agreed_and_enabled() {
        let mut registers = registers();
        accept(&mut registers, feature::VERSION_1);
        write(&mut registers, common::DEVICE_STATUS, &[8]);
        accept(&mut registers, feature::VERSION_1 | 2);
        assert_eq!(registers.driver_features, feature::VERSION_1);
        write(
            &mut registers,
            common::QUEUE_DESC,
            &0x1_2345_6000_u64.to_le_bytes(),
        );
        write(&mut registers, common::QUEUE_SIZE, &128_u16.to_le_bytes());
        write(&mut registers, common::QUEUE_ENABLE, &[1, 0]);
        write(&mut registers, common::QUEUE_DESC, &[0; 4]);
        write(&mut registers, common::QUEUE_SIZE, &64_u16.to_le_bytes());
        let queue = &registers.queues[0];
        assert_eq!(
            (queue.desc, queue.size, queue.enabled),
            (0x1_2345_6000, 128, true)
        );
    }

    #[test]
    fn a_queue_that_is_not_there_has_size_zero() {
        let mut registers = registers();
        write(&mut registers, common::QUEUE_SELECT, &[2, 0]);
        let mut size = [0xff; 2];
        registers.read(common::QUEUE_SIZE, &mut size, Outside::default());
        assert_eq!(size, [0, 0]);
    }

    #[test]
    fn a_vector_beyond_the_table_reads_back_as_none() {
        let mut registers = registers();
        write(
            &mut registers,
            common::CONFIG_MSIX_VECTOR,
            &3_u16.to_le_bytes(),
        );
        assert_eq!(registers.config_vector, NO_VECTOR);
        write(
            &mut registers,
            common::QUEUE_MSIX_VECTOR,
            &2_u16.to_le_bytes(),
        );
        assert_eq!(registers.queues[0].vector, 2);
    }

    proptest! {
        #[test]
        fn any_writes_keep_the_registers_sound_and_a_reset_undoes_them(
            writes in proptest::collection::vec(
                (0_u64..64, proptest::collection::vec(any::<u8>(), 0..9)), 0..200),
        ) {
            let mut registers = registers();
            let fresh = registers.clone();
            for (offset, data) in &writes {
                write(&mut registers, *offset, data);
                let mut back = vec![0; data.len()];
                registers.read(*offset, &mut back, Outside::default());
                for queue in &registers.queues {
                    prop_assert!(queue.size.is_power_of_two() && queue.size <= queue.max_size);
                    prop_assert!(queue.vector < 3 || queue.vector == NO_VECTOR);
                }
                let ok = status::FEATURES_OK;
                prop_assert!(registers.status & status::DRIVER_OK == 0 || registers.status & ok != 0);
            }
            registers.reset();
            prop_assert_eq!(registers, fresh);
        }
    }
}
