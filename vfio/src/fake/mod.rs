//! A device that is not there, for tests: any configuration space, and a record of what it was told.

mod recorded;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use busway_pci::{
    InterruptLine, InterruptLines, InterruptPin, InterruptRoute, InterruptRoutes, MsiMessage,
    RouteError,
};

use crate::event_fd::signal;
use crate::{
    Affected, Area, DeviceIo, DeviceRegion, EventFd, FunctionReset, IrqError, IrqIndex, IrqInfo,
    Mapping, RegionIndex,
};

/// What a device was told about its interrupts: whether each vector got an eventfd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IrqCall {
    Set(IrqIndex, u32, Vec<bool>),
    UnmaskOn(IrqIndex),
    Unmask(IrqIndex),
    Disable(IrqIndex),
}

/// A device in memory. Writes to configuration space change it as they are.
#[derive(Debug)]
pub(crate) struct FakeDevice {
    pub(crate) config: Mutex<Vec<u8>>,
    /// What the host shows of it without VFIO.
    pub(crate) own_config: Option<Vec<u8>>,
    pub(crate) bars: [DeviceRegion; 6],
    pub(crate) intx: IrqInfo,
    /// What setting the pin up fails with.
    pub(crate) intx_refused: Option<i32>,
    /// Its driver takes no eventfd to unmask the pin by.
    pub(crate) no_unmask_events: bool,
    /// Called whenever the pin was unmasked by hand.
    pub(crate) on_unmask: Hook,
    /// It is a mediated device.
    pub(crate) mediated: bool,
    /// What its ROM reads; no ROM where it is empty.
    pub(crate) rom: Vec<u8>,
    pub(crate) rom_reads: Mutex<usize>,
    pub(crate) msi: IrqInfo,
    pub(crate) msix: IrqInfo,
    /// How many vectors the host has for it.
    pub(crate) most_vectors: u32,
    /// How many of them other devices have.
    pub(crate) taken_vectors: AtomicU32,
    /// What the device sends whenever its interrupts were just disabled.
    pub(crate) sends_when_disabled: Vec<u32>,
    pub(crate) can_reset: bool,
    /// Its power management, at 0x60, has no state but D0.
    pub(crate) only_d0: bool,
    pub(crate) irqs: Mutex<Irqs>,
    /// The state in its power management, at 0x60, at each disabling of interrupts.
    pub(crate) power_when_disabled: Mutex<Vec<u8>>,
    /// Its own interrupt disable bit. What its command register reads is VFIO's.
    pub(crate) pin_disabled: AtomicBool,
    pub(crate) resets: Mutex<Vec<u16>>,
    /// It does not answer; VFIO does for its identity.
    pub(crate) silent: AtomicBool,
    /// How many resets are refused, because somebody holds the device.
    pub(crate) resets_held_up: AtomicUsize,
    /// Events that somebody wants to hear of.
    pub(crate) listened: Mutex<Vec<IrqIndex>>,
    pub(crate) function_reset: Option<FunctionReset>,
    /// What a hot reset of it touches; no bus to reset where there is nothing.
    pub(crate) reach: Mutex<Vec<Affected>>,
    /// What the command register held at each hot reset.
    pub(crate) hot_resets: Mutex<Vec<u16>>,
    /// The bus does not come up again after a hot reset.
    pub(crate) bus_is_dead: AtomicBool,
    pub(crate) reset_by_opening: bool,
    /// Called at each reset, of whichever kind.
    pub(crate) on_reset: Hook,
    /// How many dma-bufs of its memory were given out.
    pub(crate) dma_bufs: AtomicUsize,
    pub(crate) bar_writes: Mutex<Vec<(RegionIndex, u64, Vec<u8>)>>,
}

/// Something to be called.
#[derive(Default)]
pub(crate) struct Hook(pub(crate) Mutex<Option<Box<dyn Fn() + Send>>>);

impl Hook {
    fn call(&self) {
        if let Some(call) = &*self.0.lock().unwrap() {
            call();
        }
    }
}

impl fmt::Debug for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hook")
    }
}

#[derive(Debug, Default)]
pub(crate) struct Irqs {
    calls: Vec<IrqCall>,
    kind: Option<IrqIndex>,
    vectors: Vec<Option<OwnedFd>>,
    /// What the device sent on vectors that have no eventfd, which the kernel masks in it.
    pending: Vec<u32>,
}

impl Irqs {
    fn send(&mut self, vector: u32) {
        match self.vectors.get(vector as usize) {
            Some(Some(event)) => signal(event.as_fd()),
            _ if self.kind == Some(IrqIndex::Msix) => self.pending.push(vector),
            _ => {}
        }
    }
}

impl Default for FakeDevice {
    fn default() -> Self {
        Self {
            config: Mutex::new(vec![0; 4096]),
            own_config: None,
            bars: Default::default(),
            intx: IrqInfo::default(),
            intx_refused: None,
            no_unmask_events: false,
            on_unmask: Hook::default(),
            mediated: false,
            rom: Vec::new(),
            rom_reads: Mutex::default(),
            msi: IrqInfo::default(),
            msix: IrqInfo::default(),
            most_vectors: u32::MAX,
            taken_vectors: AtomicU32::default(),
            sends_when_disabled: Vec::new(),
            can_reset: true,
            only_d0: false,
            irqs: Mutex::default(),
            power_when_disabled: Mutex::default(),
            pin_disabled: AtomicBool::default(),
            resets: Mutex::default(),
            silent: AtomicBool::default(),
            resets_held_up: AtomicUsize::default(),
            listened: Mutex::default(),
            function_reset: Some(FunctionReset::Other),
            reach: Mutex::default(),
            hot_resets: Mutex::default(),
            bus_is_dead: AtomicBool::default(),
            reset_by_opening: false,
            on_reset: Hook::default(),
            dma_bufs: AtomicUsize::default(),
            bar_writes: Mutex::default(),
        }
    }
}

impl FakeDevice {
    pub(crate) fn set_config(&self, offset: usize, data: &[u8]) {
        self.config.lock().unwrap()[offset..offset + data.len()].copy_from_slice(data);
    }

    pub(crate) fn config_at<const N: usize>(&self, offset: usize) -> [u8; N] {
        self.config.lock().unwrap()[offset..offset + N]
            .try_into()
            .unwrap()
    }

    pub(crate) fn set_bar(&mut self, bar: usize, size: u64) {
        self.bars[bar] = DeviceRegion {
            size,
            readable: true,
            writable: true,
            areas: vec![Area { offset: 0, size }],
        };
    }

    pub(crate) fn irq_calls(&self) -> Vec<IrqCall> {
        self.irqs.lock().unwrap().calls.clone()
    }

    pub(crate) fn forget_irq_calls(&self) {
        self.irqs.lock().unwrap().calls.clear();
    }

    /// The kind of interrupt that is set up.
    pub(crate) fn kind(&self) -> Option<IrqIndex> {
        self.irqs.lock().unwrap().kind
    }

    /// Which vectors have an eventfd.
    pub(crate) fn connected(&self) -> Vec<bool> {
        let irqs = self.irqs.lock().unwrap();
        irqs.vectors.iter().map(Option::is_some).collect()
    }

    /// Sends a message, as the device does. One on a vector without eventfd stays pending in the
    /// device; one while messages are disabled is lost.
    pub(crate) fn send(&self, vector: u32) {
        self.irqs.lock().unwrap().send(vector);
    }

    /// What the command register held at each reset.
    pub(crate) fn resets(&self) -> Vec<u16> {
        self.resets.lock().unwrap().clone()
    }
}

impl DeviceIo for FakeDevice {
    fn region(&self, index: RegionIndex) -> DeviceRegion {
        match index {
            RegionIndex::CONFIG => DeviceRegion {
                size: self.config.lock().unwrap().len() as u64,
                readable: true,
                writable: true,
                areas: Vec::new(),
            },
            RegionIndex::ROM => DeviceRegion {
                size: self.rom.len() as u64,
                readable: true,
                ..DeviceRegion::default()
            },
            other => self
                .bars
                .get(other.number() as usize)
                .cloned()
                .unwrap_or_default(),
        }
    }

    fn region_read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        if index == RegionIndex::CONFIG && self.silent.load(Ordering::Relaxed) {
            data.fill(u8::MAX);
            let identity = self.config_at::<4>(0);
            let identity = identity.iter().skip(offset as usize);
            data.iter_mut()
                .zip(identity)
                .for_each(|(to, from)| *to = *from);
        } else if index == RegionIndex::CONFIG {
            let config = self.config.lock().unwrap();
            let start = offset as usize;
            let found = config.get(start..start + data.len());
            data.copy_from_slice(found.ok_or(io::ErrorKind::InvalidInput)?);
        } else if index == RegionIndex::ROM {
            *self.rom_reads.lock().unwrap() += 1;
            let start = offset as usize;
            let found = self.rom.get(start..start + data.len());
            data.copy_from_slice(found.ok_or(io::ErrorKind::InvalidInput)?);
        } else {
            data.fill(0x5a);
        }
        Ok(())
    }

    fn region_write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        if index == RegionIndex::CONFIG && self.silent.load(Ordering::Relaxed) {
            // Lost.
        } else if index == RegionIndex::CONFIG {
            let mut config = self.config.lock().unwrap();
            let start = offset as usize;
            let disabled = config[5] & 4;
            let found = config.get_mut(start..start + data.len());
            found
                .ok_or(io::ErrorKind::InvalidInput)?
                .copy_from_slice(data);
            // As drivers/vfio/pci/vfio_pci_config.c: the device's own follows a change of VFIO's.
            if config[5] & 4 != disabled {
                self.pin_disabled.store(disabled == 0, Ordering::Relaxed);
            }
            if self.only_d0 {
                config[0x64] &= !3;
            }
        } else {
            let write = (index, offset, data.to_vec());
            self.bar_writes.lock().unwrap().push(write);
        }
        Ok(())
    }

    fn own_config(&self, offset: u16) -> Option<u32> {
        let start = usize::from(offset);
        let bytes = self.own_config.as_ref()?.get(start..start + 4)?;
        Some(u32::from_le_bytes(bytes.try_into().ok()?))
    }

    fn map(&self, _index: RegionIndex, area: Area) -> io::Result<Mapping> {
        Mapping::anonymous(area.size, area.offset)
    }

    fn dma_buf(&self, _index: RegionIndex, _area: Area) -> io::Result<OwnedFd> {
        self.dma_bufs.fetch_add(1, Ordering::Relaxed);
        File::open("/dev/null").map(OwnedFd::from)
    }

    fn irq(&self, index: IrqIndex) -> IrqInfo {
        match index {
            IrqIndex::Intx => self.intx,
            IrqIndex::Msi => self.msi,
            IrqIndex::Msix => self.msix,
            IrqIndex::Error | IrqIndex::Request => IrqInfo {
                count: 1,
                resizable: false,
            },
        }
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        first: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), IrqError> {
        if matches!(index, IrqIndex::Error | IrqIndex::Request) {
            self.listened.lock().unwrap().push(index);
            return Ok(());
        }
        let mut irqs = self.irqs.lock().unwrap();
        let end = first + events.len() as u32;
        let connected: Vec<_> = events.iter().map(Option::is_some).collect();
        irqs.calls
            .push(IrqCall::Set(index, first, connected.clone()));
        // As drivers/vfio/pci/vfio_pci_intrs.c: one kind at a time; the first call makes room, for
        // good unless the kernel can add.
        if irqs.kind.is_some_and(|kind| kind != index) {
            let error = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(IrqError::Kernel(error));
        }
        if let (IrqIndex::Intx, Some(error)) = (index, self.intx_refused) {
            return Err(IrqError::Kernel(io::Error::from_raw_os_error(error)));
        }
        if irqs.vectors.is_empty() {
            let taken = self.taken_vectors.load(Ordering::Relaxed);
            let given = self.most_vectors.saturating_sub(taken);
            if end > given && index != IrqIndex::Intx {
                return Err(IrqError::Fewer { given });
            }
            irqs.vectors.resize_with(end as usize, || None);
        }
        if end as usize > irqs.vectors.len() {
            if !self.irq(index).resizable {
                let error = io::Error::from_raw_os_error(libc::EINVAL);
                return Err(IrqError::Kernel(error));
            }
            irqs.vectors.resize_with(end as usize, || None);
        }
        for (slot, event) in irqs.vectors[first as usize..].iter_mut().zip(events) {
            *slot = event.map(|event| event.try_clone_to_owned().unwrap());
        }
        irqs.kind = Some(index);
        for vector in std::mem::take(&mut irqs.pending) {
            irqs.send(vector);
        }
        Ok(())
    }

    fn unmask_on(&self, index: IrqIndex, _event: BorrowedFd<'_>) -> Result<(), IrqError> {
        let mut irqs = self.irqs.lock().unwrap();
        assert_eq!((irqs.kind, index), (Some(IrqIndex::Intx), IrqIndex::Intx));
        if self.no_unmask_events {
            return Err(IrqError::Kernel(io::Error::from_raw_os_error(libc::ENOTTY)));
        }
        irqs.calls.push(IrqCall::UnmaskOn(index));
        Ok(())
    }

    fn unmask(&self, index: IrqIndex) -> Result<(), IrqError> {
        self.irqs.lock().unwrap().calls.push(IrqCall::Unmask(index));
        self.on_unmask.call();
        Ok(())
    }

    fn is_mediated(&self) -> bool {
        self.mediated
    }

    fn disable_irqs(&self, index: IrqIndex) -> Result<(), IrqError> {
        let mut irqs = self.irqs.lock().unwrap();
        irqs.calls.push(IrqCall::Disable(index));
        if irqs.kind == Some(index) {
            let [power] = self.config_at(0x64);
            self.power_when_disabled.lock().unwrap().push(power & 3);
            // As drivers/pci/msi/msi.c, `pci_intx_for_msi`.
            if index != IrqIndex::Intx {
                self.pin_disabled.store(false, Ordering::Relaxed);
            }
            irqs.vectors.clear();
            irqs.pending.clear();
            irqs.kind = None;
        }
        for vector in &self.sends_when_disabled {
            irqs.send(*vector);
        }
        Ok(())
    }

    fn can_reset(&self) -> bool {
        self.can_reset
    }

    fn reset(&self) -> io::Result<()> {
        let less = |left: usize| left.checked_sub(1);
        let relaxed = Ordering::Relaxed;
        if self
            .resets_held_up
            .fetch_update(relaxed, relaxed, less)
            .is_ok()
        {
            return Err(io::Error::from_raw_os_error(libc::EAGAIN));
        }
        let command = u16::from_le_bytes(self.config_at(4));
        self.resets.lock().unwrap().push(command);
        self.on_reset.call();
        Ok(())
    }

    fn function_reset(&self) -> Option<FunctionReset> {
        self.function_reset.filter(|_| self.can_reset)
    }

    fn is_reset_by_opening(&self) -> bool {
        self.reset_by_opening
    }

    fn hot_reset_reach(&self) -> io::Result<Vec<Affected>> {
        let reach = self.reach.lock().unwrap().clone();
        match reach.is_empty() {
            true => Err(io::Error::from_raw_os_error(libc::ENODEV)),
            false => Ok(reach),
        }
    }

    fn hot_reset(&self) -> io::Result<()> {
        if self.reach.lock().unwrap().iter().any(|each| !each.owned) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let command = u16::from_le_bytes(self.config_at(4));
        self.hot_resets.lock().unwrap().push(command);
        self.on_reset.call();
        match self.bus_is_dead.load(Ordering::Relaxed) {
            true => Err(io::Error::from_raw_os_error(libc::ENOTTY)),
            false => Ok(()),
        }
    }
}

/// Has a device's next resets wait until the sender is dropped; the receiver tells that one has begun.
pub(crate) fn held_up(fake: &FakeDevice) -> (mpsc::Sender<()>, mpsc::Receiver<()>) {
    let (go_on, wait) = mpsc::channel();
    let (tell, begun) = mpsc::channel();
    *fake.on_reset.0.lock().unwrap() = Some(Box::new(move || {
        let _nobody_listens = tell.send(());
        let _dropped = wait.recv();
    }));
    (go_on, begun)
}

/// A new eventfd.
pub(crate) fn eventfd() -> EventFd {
    EventFd::new().unwrap()
}

/// Routes that go nowhere.
#[derive(Debug, Default)]
pub(crate) struct FakeRoutes {
    pub(crate) made: Mutex<Vec<MsiMessage>>,
}

#[derive(Debug)]
struct FakeRoute(EventFd);

impl InterruptRoutes for FakeRoutes {
    fn connect(&self, _: u16, message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        self.made.lock().unwrap().push(message);
        Ok(Arc::new(FakeRoute(eventfd())))
    }
}

impl InterruptRoute for FakeRoute {
    fn update(&self, _message: MsiMessage) -> Result<(), RouteError> {
        Ok(())
    }

    fn set_masked(&self, _masked: bool) -> Result<(), RouteError> {
        Ok(())
    }

    fn pending(&self) -> bool {
        false
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn trigger(&self) {}
}

/// Lines that go nowhere.
#[derive(Debug, Default)]
pub(crate) struct FakeLines {
    /// The pins that were connected.
    pub(crate) made: Mutex<Vec<InterruptPin>>,
    /// What tells the device of each that its interrupt is over.
    pub(crate) resamples: Mutex<Vec<EventFd>>,
}

#[derive(Debug)]
struct FakeLine {
    event: EventFd,
    resample: EventFd,
}

impl InterruptLines for FakeLines {
    fn connect(&self, pin: InterruptPin) -> Result<Arc<dyn InterruptLine>, RouteError> {
        self.made.lock().unwrap().push(pin);
        let resample = eventfd();
        self.resamples.lock().unwrap().push(resample.clone());
        Ok(Arc::new(FakeLine {
            event: eventfd(),
            resample,
        }))
    }
}

impl InterruptLine for FakeLine {
    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn resample(&self) -> BorrowedFd<'_> {
        self.resample.as_fd()
    }
}
