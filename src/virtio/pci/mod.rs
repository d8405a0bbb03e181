//! The PCI transport: a virtio device as a PCI function. Modern only. Virtio 1.3 §4.1.
//!
//! It negotiates, validates queues, starts and stops the device's workers, and carries interrupts.
//! What a request means is the device's.

mod layout;
mod registers;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{
    BarError, BarIndex, BarKind, BarPart, BarRegion, Bars, ConfigSpace, Identity, InterruptRoutes,
    PciFunction,
};
use busway_vfio::EventFd;
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestAddressSpace};

use super::device::{Activation, DeviceConfig, VirtioDevice};
use super::interrupts::Interrupts;
use super::queue::Virtqueue;
use super::spec;
use super::worker::Workers;
use crate::memory::{GuestRam, RamMap};
use layout::{Capabilities, Place};
use registers::Change;
pub use registers::{QueueRegisters, Registers};

/// A device cannot be made into a PCI function.
#[derive(Debug, thiserror::Error)]
pub enum VirtioPciError {
    /// virtio device {name} has {queues} queues, and there can be at most {limit}
    #[error("virtio device {name} has {queues} queues, and there can be at most {limit}")]
    Queues {
        /// The device.
        name: String,
        /// How many it has.
        queues: usize,
        /// How many there can be.
        limit: usize,
    },
    /// virtio device {name}: {source}
    #[error("virtio device {name}: {source}")]
    Bar {
        /// The device.
        name: String,
        /// What is wrong with its BAR.
        source: BarError,
    },
    /// virtio device {name}: no eventfd for a queue: {source}; the limit on open files may be too low (ulimit -n)
    #[error(
        "virtio device {name}: no eventfd for a queue: {source}; the limit on open files may be too low (ulimit -n)"
    )]
    Event {
        /// The device.
        name: String,
        /// Why.
        source: io::Error,
    },
}

/// A virtio device as a PCI function.
///
/// The function's lock is taken by what a driver does while it starts and stops a device. A
/// notification, the ISR and the workers do without it; a worker never takes it, so that stopping
/// one with the lock held ends.
pub struct VirtioPci {
    name: String,
    ram: GuestRam,
    function: Mutex<Function>,
    interrupts: Arc<Interrupts>,
    device_config: Arc<DeviceConfig>,
    doorbells: Vec<EventFd>,
    capabilities: Capabilities,
}

#[derive(Debug)]
struct Function {
    config: ConfigSpace,
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    workers: Option<Workers>,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci")
            .field("name", &self.name)
            .field("function", &self.function)
            .finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts `device` behind a PCI function. Nothing runs before the guest's driver is ready.
    ///
    /// # Errors
    /// [`VirtioPciError`]
    pub fn new(
        device: Box<dyn VirtioDevice>,
        ram: GuestRam,
        routes: Arc<dyn InterruptRoutes>,
    ) -> Result<Arc<Self>, VirtioPciError> {
        let name = device.name().to_owned();
        let queue_sizes = device.queue_sizes();
        let queues = queue_sizes.len();
        if queues > layout::MAX_QUEUES {
            return Err(VirtioPciError::Queues {
                name,
                queues,
                limit: layout::MAX_QUEUES,
            });
        }
        let doorbells = queue_sizes
            .iter()
            .map(|_| EventFd::new())
            .collect::<Result<Vec<_>, _>>()
            .map_err(|source| VirtioPciError::Event {
                name: name.clone(),
                source,
            })?;
        let interrupts = Interrupts::new(&name, queues as u16, routes);
        let mut config = config_space(&*device).map_err(|source| VirtioPciError::Bar {
            name: name.clone(),
            source,
        })?;
        let device_config = device.config();
        let capabilities = Capabilities::add(
            &mut config,
            &interrupts.msix(),
            queues,
            device_config.size(),
        );
        let features = device.features()
            | spec::feature::VERSION_1
            | spec::feature::EVENT_IDX
            | spec::feature::INDIRECT_DESC;
        Ok(Arc::new(Self {
            name,
            ram,
            function: Mutex::new(Function {
                config,
                registers: Registers::new(features, &queue_sizes),
                device,
                workers: None,
            }),
            interrupts: Arc::new(interrupts),
            device_config,
            doorbells,
            capabilities,
        }))
    }

    /// The device's name in this VM.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the device remembers now, apart from its queues' positions, which are in guest memory
    /// and with the workers.
    pub fn registers(&self) -> Registers {
        self.function().registers.clone()
    }

    /// How many MSI-X vectors have a route to the guest now.
    #[cfg(test)]
    pub(crate) fn connected_vectors(&self) -> usize {
        self.interrupts.msix().connected()
    }

    fn function(&self) -> MutexGuard<'_, Function> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut function = self.function();
        let Function {
            registers, device, ..
        } = &mut *function;
        let vectors = self.interrupts.msix().vectors();
        let change = registers.write(offset, data, vectors, |features| device.accepts(features));
        match change {
            Change::None => {}
            Change::Reset => self.stop(&mut function),
            Change::Ready => self.start(&mut function),
            Change::ConfigVector => {
                self.interrupts
                    .set_config_vector(function.registers.config_vector);
            }
            Change::QueueVector(index) => {
                let queue = function.registers.queues.get(usize::from(index));
                let vector = queue.map_or(spec::NO_VECTOR, |queue| queue.vector);
                self.interrupts.set_queue_vector(index, vector);
            }
        }
    }

    /// The driver is ready.
    fn start(&self, function: &mut Function) {
        if let Err(error) = self.try_start(function) {
            self.interrupts.needs_reset(&self.name, &error);
        }
    }

    fn try_start(&self, function: &mut Function) -> Result<(), StartError> {
        let stop = Arc::new(AtomicBool::new(false));
        let registers = &function.registers;
        let event_idx = registers.negotiated(spec::feature::EVENT_IDX);
        let memory = self.ram.memory();
        let mut queues = Vec::with_capacity(registers.queues.len());
        for (index, (queue, doorbell)) in (0..).zip(registers.queues.iter().zip(&self.doorbells)) {
            queues.push(if queue.enabled {
                let ring = ring(queue, event_idx, &memory)
                    .map_err(|source| StartError::Queue { index, source })?;
                Some(Virtqueue::new(
                    index,
                    ring,
                    doorbell.clone(),
                    Arc::clone(&self.interrupts),
                    Arc::clone(&stop),
                ))
            } else {
                None
            });
        }
        let workers = function.device.activate(Activation {
            features: registers.driver_features,
            ram: self.ram.clone(),
            queues,
        })?;
        function.workers = Some(Workers::start(workers, stop, &self.interrupts)?);
        Ok(())
    }

    /// The driver, or the bus, resets the device. Virtio 1.3 §2.4.
    fn stop(&self, function: &mut Function) {
        function.workers = None;
        function.registers.reset();
        self.interrupts.reset();
    }

    /// What the access capability points at: an offset into the BAR, and a width. Virtio 1.3
    /// §4.1.4.9.
    fn window(&self) -> Option<(u64, usize)> {
        let function = self.function();
        let at = self.capabilities.access;
        let bar: u8 = function.config.get(at + layout::CAP_BAR);
        let offset: u32 = function.config.get(at + layout::CAP_OFFSET);
        let length: u32 = function.config.get(at + layout::CAP_LENGTH);
        let fits = bar == layout::BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) < layout::BAR_SIZE;
        fits.then_some((offset.into(), length as usize))
    }
}

/// Why a device did not start, though its driver is ready.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("queue {index}: {source}")]
    Queue {
        index: u16,
        source: virtio_queue::Error,
    },
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// The ring that a queue's registers describe, where all of it lies in RAM.
fn ring(
    registers: &QueueRegisters,
    event_idx: bool,
    memory: &RamMap,
) -> Result<Queue, virtio_queue::Error> {
    let mut queue = Queue::new(registers.max_size)?;
    queue.try_set_size(registers.size)?;
    queue.try_set_desc_table_address(GuestAddress(registers.desc))?;
    queue.try_set_avail_ring_address(GuestAddress(registers.driver))?;
    queue.try_set_used_ring_address(GuestAddress(registers.device))?;
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    if !queue.is_valid(memory) {
        return Err(virtio_queue::Error::FindMemoryRegion);
    }
    Ok(queue)
}

fn config_space(device: &dyn VirtioDevice) -> Result<ConfigSpace, BarError> {
    let mut bars = Bars::new();
    bars.add(
        BarIndex::Bar(layout::BAR),
        BarKind::Memory64 {
            prefetchable: false,
        },
        layout::BAR_SIZE,
    )?;
    let identity = Identity {
        vendor: spec::pci::VENDOR,
        device: spec::pci::MODERN_DEVICE_BASE.wrapping_add(device.device_type()),
        revision: 1,
        class: device.class(),
        subsystem_vendor: spec::pci::VENDOR,
        subsystem: spec::pci::SUBSYSTEM_BASE.wrapping_add(device.device_type()),
    };
    Ok(ConfigSpace::type0(&identity, bars))
}

impl PciFunction for VirtioPci {
    fn name(&self) -> String {
        format!("virtio device {}", self.name)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.capabilities.touches_data(offset, data.len())
            && let Some((at, width)) = self.window()
        {
            let mut value = [0; 4];
            if let Some(value) = value.get_mut(..width) {
                self.bar_read(BarIndex::Bar(layout::BAR), at, value);
            }
            let mut function = self.function();
            function
                .config
                .set(self.capabilities.data(), u32::from_le_bytes(value));
        }
        self.function().config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        {
            let mut function = self.function();
            function.config.write(offset, data);
            if self.capabilities.touches_msix(offset, data.len()) {
                let control: u16 = function.config.get(self.capabilities.msix_control);
                self.interrupts
                    .with_msix(|msix, owner| msix.write_control(control, owner));
            }
        }
        if self.capabilities.touches_data(offset, data.len())
            && let Some((at, width)) = self.window()
        {
            let mut value = [0; 4];
            let skip = usize::from(offset.saturating_sub(self.capabilities.data()));
            for (to, from) in value.iter_mut().skip(skip).zip(data) {
                *to = *from;
            }
            if let Some(value) = value.get(..width) {
                self.bar_write(BarIndex::Bar(layout::BAR), at, value);
            }
        }
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.function().config.regions()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        self.function().config.decoded()
    }

    fn parts(&self, bar: BarIndex) -> Vec<BarPart> {
        if bar != BarIndex::Bar(layout::BAR) {
            return Vec::new();
        }
        self.doorbells
            .iter()
            .enumerate()
            .map(|(index, event)| BarPart::Doorbell {
                offset: layout::doorbell(index),
                event: event.shared(),
            })
            .collect()
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if bar != BarIndex::Bar(layout::BAR) {
            return;
        }
        match layout::place(offset) {
            Place::Common(at) => {
                let broken = self.interrupts.is_broken();
                self.function().registers.read(at, data, broken);
            }
            Place::Isr => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.interrupts.take_isr();
                }
            }
            Place::Device(at) => self.device_config.read(at, data),
            Place::Table(at) => self.interrupts.msix().table_read(at, data),
            Place::Pba(at) => self.interrupts.msix().pba_read(at, data),
            Place::Notify(_) | Place::Nowhere => {}
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BarIndex::Bar(layout::BAR) {
            return;
        }
        match layout::place(offset) {
            Place::Common(at) => self.write_common(at, data),
            Place::Notify(queue) => {
                if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
                    doorbell.signal();
                }
            }
            Place::Table(at) => self
                .interrupts
                .with_msix(|msix, owner| msix.table_write(at, data, owner)),
            // The configurations of the devices we have are read-only, as is the rest.
            Place::Device(_) | Place::Isr | Place::Pba(_) | Place::Nowhere => {}
        }
    }

    fn reset(&self) {
        let mut function = self.function();
        self.stop(&mut function);
        function.config.reset();
        self.interrupts.with_msix(|msix, owner| msix.reset(owner));
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        let mut function = self.function();
        self.stop(&mut function);
    }
}
