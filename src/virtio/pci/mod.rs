//! The PCI transport: a virtio device as a PCI function. Modern only. Virtio 1.3 §4.1.
//!
//! It negotiates, validates queues, starts and stops the device, and carries interrupts. What a request
//! means is the device's.

mod layout;
mod registers;
mod state;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{
    Activity, BarError, BarIndex, BarKind, BarPart, BarRegion, Bars, Identity, InterruptRoutes,
    PciFunction,
};
use busway_vfio::EventFd;

use super::activation::Activation;
use super::config_space::ConfigSpace;
use super::counts::{Counts, ServedBy, Sight};
use super::device::VirtioDevice;
use super::interrupts::Interrupts;
use super::life::{DeviceState, Life, Progress};
use super::retired::Retired;
use super::spec::{self, status};
use crate::memory::GuestRam;
use crate::monitor::{self, Source};
use crate::shortage;
use crate::virtio::error::StartError;
use crate::virtio::queue::{Call, QueueSetup};
use layout::{BarPlace, Capabilities};
use registers::{Change, Outside};
pub use registers::{QueueRegisters, Registers};
pub use state::{StateError, VirtioPciState};

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
    /// virtio device {name}: no eventfd for a queue: {source}
    #[error("virtio device {name}: no eventfd for a queue: {source}")]
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
/// notification, the ISR and what the device runs do without it; nothing that runs ever takes it, so
/// that stopping it with the lock held ends.
pub struct VirtioPci {
    name: String,
    ram: GuestRam,
    function: Mutex<FunctionState>,
    interrupts: Arc<Interrupts>,
    device_config: Arc<dyn ConfigSpace>,
    doorbells: Vec<EventFd>,
    capabilities: Capabilities,
    counts: Counts,
    served_by: ServedBy,
}

#[derive(Debug)]
struct FunctionState {
    config: busway_pci::ConfigSpace,
    registers: Registers,
    device: Box<dyn VirtioDevice>,
    life: Life,
    /// A reset goes on, for the host has something of the device's still: the status that the driver reads
    /// until that is over. Virtio 1.3 §4.1.4.3.1: the driver waits for 0.
    resetting: Option<u8>,
    /// Somebody has paused the device: it is not started before it is resumed, whatever the driver does.
    paused: bool,
}

impl FunctionState {
    /// The status that the driver reads while a reset goes on.
    fn is_resetting(&mut self) -> Option<u8> {
        if self.resetting.is_some() && self.device.outstanding().is_none() {
            self.resetting = None;
        }
        self.resetting
    }
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
        let interrupts = Arc::new(Interrupts::new(&name, queues as u16, routes));
        let mut config = config_space(&*device).map_err(|source| VirtioPciError::Bar {
            name: name.clone(),
            source,
        })?;
        let (device_config, counts) = (device.config(), device.counts());
        let served_by = device.served_by();
        let capabilities = Capabilities::add(
            &mut config,
            &interrupts.msix(),
            queues,
            device_config.size(),
        );
        let changes = Arc::downgrade(&interrupts);
        device_config.on_change(Box::new(move || {
            if let Some(interrupts) = changes.upgrade() {
                interrupts.config_changed();
            }
        }));
        let features = device.features() | spec::feature::VERSION_1 | device.ring_features();
        Ok(Arc::new(Self {
            name,
            ram,
            function: Mutex::new(FunctionState {
                config,
                registers: Registers::new(features, &queue_sizes),
                device,
                life: Life::Stopped(Progress::default()),
                resetting: None,
                paused: false,
            }),
            interrupts,
            device_config,
            doorbells,
            capabilities,
            counts,
            served_by,
        }))
    }

    /// The device's name in this VM.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the driver has set up, as far as it is in registers: [`state`](Self::state) has the rest.
    pub fn registers(&self) -> Registers {
        self.function().registers.clone()
    }

    /// A way to look at the device, which keeps nothing of it.
    #[must_use]
    pub fn sight(&self) -> Sight {
        Sight {
            shown: Arc::clone(self.interrupts.shown()),
            counts: self.counts.clone(),
            served_by: self.served_by,
        }
    }

    /// The driver's status is as the registers have it.
    fn show_status(&self, function: &FunctionState) {
        let shown = self.interrupts.shown();
        shown
            .status
            .store(function.registers.status, Ordering::Relaxed);
    }

    /// How many MSI-X vectors have a route to the guest now.
    #[cfg(test)]
    pub(crate) fn connected_vectors(&self) -> usize {
        self.interrupts.msix().connected()
    }

    /// How queue `queue` interrupts the driver.
    #[cfg(test)]
    pub(crate) fn call(&self, queue: u16) -> Call {
        Call::new(Arc::clone(&self.interrupts), queue)
    }

    fn function(&self) -> MutexGuard<'_, FunctionState> {
        self.function.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut function = self.function();
        if function.is_resetting().is_some() {
            return;
        }
        let FunctionState {
            registers, device, ..
        } = &mut *function;
        let vectors = self.interrupts.msix().vectors();
        let change = registers.write(offset, data, vectors, |features| device.accepts(features));
        match change {
            Change::None => {}
            Change::Reset => {
                self.stop(&mut function);
                self.tell("reset");
            }
            Change::Ready => {
                self.start(&mut function);
                self.tell("activated");
            }
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
        self.show_status(&function);
    }

    /// What a stop of the device left with the host, in words; `None` where there is nothing. Until then the
    /// buffers of those requests are the host's.
    pub fn outstanding(&self) -> Option<String> {
        self.function().device.outstanding()
    }

    /// Pauses the device: when this returns, nothing of it touches guest memory, but for buffers of requests
    /// that the host does not give back ([`outstanding`](Self::outstanding)). What the driver makes
    /// available meanwhile waits, as does what comes from outside as far as the host keeps it, and the
    /// driver finds nothing changed. A device that is paused already stays so.
    ///
    /// Takes as long as [`life`](super::life) says, with the function's lock held: where vCPUs are to
    /// stand still as well, they are stopped first.
    pub fn pause(&self) {
        let mut function = self.function();
        function.paused = true;
        function.life.stop();
    }

    /// Ends a pause: the device goes on where it was stopped. One whose driver is not ready starts when
    /// it is; one that waits for a reset goes on waiting.
    pub fn resume(&self) {
        let mut function = self.function();
        function.paused = false;
        self.start(&mut function);
    }

    /// Takes the device's end on the host away, with all that it holds there, while the guest may still
    /// use it. Its driver is told that the device needs a reset, and finds after one that it does not start;
    /// it can release it in order. Takes as long as [`pause`](Self::pause).
    pub fn retire(&self) {
        let mut function = self.function();
        function.life.reset();
        let retired = Box::new(Retired::of(&*function.device));
        let device = std::mem::replace(&mut function.device, retired);
        self.interrupts
            .needs_reset(&self.name, &"its end on the host was taken away");
        drop(function);
        // Closing can take long, and a driver may wait for the lock.
        drop(device);
    }

    /// What its driver did with it.
    fn tell(&self, event: &str) {
        monitor::tell(Source::VirtioDevice, event, &[("id", &self.name)]);
    }

    /// Starts the device where its driver is ready and nothing stands against it.
    fn start(&self, function: &mut FunctionState) {
        let ready = function.registers.status & status::DRIVER_OK != 0;
        let resetting = function.is_resetting().is_some();
        if !ready || function.paused || resetting || self.interrupts.is_broken() {
            return;
        }
        if let Err(error) = self.try_start(function) {
            let reason = shortage::explained(&error);
            self.interrupts.needs_reset(&self.name, &reason);
        }
    }

    fn try_start(&self, function: &mut FunctionState) -> Result<(), StartError> {
        let Some(progress) = function.life.progress() else {
            return Ok(());
        };
        let registers = &function.registers;
        let activation = Activation::new(
            registers.driver_features,
            self.ram.clone(),
            self.queues(registers, progress),
            progress.clone(),
            Arc::clone(&self.interrupts),
        )?;
        function.life = Life::Running(function.device.start(activation)?);
        Ok(())
    }

    /// The queues that the driver has enabled, each with the device's position in it.
    fn queues(&self, registers: &Registers, progress: &Progress) -> Vec<Option<QueueSetup>> {
        let event_idx = registers.negotiated(spec::feature::EVENT_IDX);
        let queues = (0..).zip(registers.queues.iter().zip(&self.doorbells));
        queues
            .map(|(index, (queue, doorbell))| {
                queue.enabled.then(|| QueueSetup {
                    index,
                    size: queue.size,
                    desc: queue.desc,
                    avail: queue.driver,
                    used: queue.device,
                    event_idx,
                    position: progress.queue(index),
                    kick: doorbell.clone(),
                    call: Call::new(Arc::clone(&self.interrupts), index),
                })
            })
            .collect()
    }

    /// The driver, or the bus, resets the device: a stop whose state is dropped. Virtio 1.3 §2.4.
    fn stop(&self, function: &mut FunctionState) {
        function.life.reset();
        let status = function.registers.status;
        function.registers.reset();
        self.interrupts.reset();
        function.device.set_state(&DeviceState::None);
        self.show_status(function);
        if let Some(what) = function.device.outstanding() {
            // A back end in another process is never waited for, so that each reset goes on for a while.
            let level = match function.device.served_by() {
                ServedBy::BackEnd => log::Level::Debug,
                _ => log::Level::Warn,
            };
            log::log!(
                level,
                "{}: its reset goes on until the host gives back {what}",
                self.name
            );
            function
                .resetting
                .get_or_insert(status | status::ACKNOWLEDGE);
        }
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

fn config_space(device: &dyn VirtioDevice) -> Result<busway_pci::ConfigSpace, BarError> {
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
    Ok(busway_pci::ConfigSpace::type0(&identity, bars))
}

impl PciFunction for VirtioPci {
    fn name(&self) -> String {
        format!("virtio device {}", self.name)
    }

    fn activity(&self) -> Option<&Activity> {
        Some(&self.interrupts.shown().activity)
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
            BarPlace::Common(at) => {
                let mut function = self.function();
                let outside = Outside {
                    resetting: function.is_resetting(),
                    needs_reset: self.interrupts.is_broken(),
                    generation: self.device_config.generation(),
                };
                function.registers.read(at, data, outside);
            }
            BarPlace::Isr => {
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.interrupts.take_isr();
                }
            }
            BarPlace::Device(at) => self.device_config.read(at, data),
            BarPlace::Table(at) => self.interrupts.msix().table_read(at, data),
            BarPlace::Pba(at) => self.interrupts.msix().pba_read(at, data),
            BarPlace::Notify(_) | BarPlace::Nowhere => {}
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if bar != BarIndex::Bar(layout::BAR) {
            return;
        }
        match layout::place(offset) {
            BarPlace::Common(at) => self.write_common(at, data),
            BarPlace::Notify(queue) => {
                if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
                    doorbell.signal();
                }
            }
            BarPlace::Table(at) => self
                .interrupts
                .with_msix(|msix, owner| msix.table_write(at, data, owner)),
            BarPlace::Device(at) => self.device_config.write(at, data),
            BarPlace::Isr | BarPlace::Pba(_) | BarPlace::Nowhere => {}
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
        self.function().life.reset();
    }
}
