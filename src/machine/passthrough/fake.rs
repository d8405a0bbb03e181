//! A host and a KVM that are made up, whose calls fail where a test has them fail.

use std::any::Any;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, Weak};

use busway_iommu::{
    DmaMapping, DmaSpace, Iova, IovaRange, MapError, OpenDmaBuf, SpaceKind, Stats, SysRoot,
};
use busway_pci::{
    InterruptLine, InterruptLines, InterruptPin, InterruptRoute, InterruptRoutes, MsiMessage,
    RouteError,
};
use busway_vfio::{
    Area, DeviceIo, DeviceRegion, EventFd, FunctionReset, Inherited, IrqError, IrqIndex, IrqInfo,
    RegionIndex, VfToken,
};

use super::attach::Wires;
use super::opener::{Joined, MakeSpace, OpenDevice, OpenSpace};
use crate::kvm::{IrqRouter, VectorCount};
use crate::machine::RunError;

/// The device that no slot has room for.
pub(super) const LARGE: &str = "0000:fe:03.0";

/// Lets one of the calls fail that are made.
#[derive(Debug, Default)]
pub(super) struct Faults(Mutex<Count>);

#[derive(Debug, Default)]
struct Count {
    /// How many were made.
    made: usize,
    /// The number of the one that fails.
    fails: Option<usize>,
    /// What that was.
    failed: Option<&'static str>,
}

impl Faults {
    fn pass(&self, what: &'static str) -> io::Result<()> {
        let mut count = self.0.lock().unwrap();
        count.made += 1;
        if count.fails != Some(count.made) {
            return Ok(());
        }
        count.failed = Some(what);
        Err(io::Error::from_raw_os_error(libc::EIO))
    }

    /// The call of this number fails, from now on; none does where it is none.
    pub(super) fn arm(&self, fails: Option<usize>) {
        *self.0.lock().unwrap() = Count {
            fails,
            ..Count::default()
        };
    }

    pub(super) fn failed(&self) -> Option<&'static str> {
        self.0.lock().unwrap().failed
    }
}

/// A host whose calls can fail, and what it has given out.
#[derive(Clone, Debug)]
pub(super) struct FakeHost {
    /// Nothing is there.
    paths: SysRoot,
    pub(super) faults: Arc<Faults>,
    out: Arc<Mutex<Out>>,
}

#[derive(Debug, Default)]
struct Out {
    devices: Vec<Weak<FakeDevice>>,
    spaces: Vec<Weak<FakeSpace>>,
    joined: Vec<Weak<()>>,
}

impl FakeHost {
    pub(super) fn new() -> Self {
        Self {
            paths: SysRoot::under("/nowhere".as_ref()),
            faults: Arc::default(),
            out: Arc::default(),
        }
    }

    /// Each of its devices has an error.
    pub(super) fn fail_all(&self) {
        let out = self.out.lock().unwrap();
        let devices = out.devices.iter().filter_map(Weak::upgrade);
        devices.for_each(|device| device.fail());
    }

    /// Open devices, spaces, groups that keep one of use, and pieces of memory that are mapped.
    pub(super) fn held(&self) -> [usize; 4] {
        fn there<T>(all: &[Weak<T>]) -> usize {
            all.iter().filter(|one| one.strong_count() > 0).count()
        }
        let out = self.out.lock().unwrap();
        let spaces = out.spaces.iter().filter_map(Weak::upgrade);
        let mapped = spaces.map(|space| space.mapped.lock().unwrap().len()).sum();
        [
            there(&out.devices),
            there(&out.spaces),
            there(&out.joined),
            mapped,
        ]
    }
}

impl MakeSpace for FakeHost {
    fn paths(&self) -> &SysRoot {
        &self.paths
    }

    fn make(
        &self,
        _kind: SpaceKind,
        _iommufd: Option<File>,
        _ram: u64,
    ) -> Result<OpenSpace, RunError> {
        self.faults
            .pass("make a space")
            .map_err(RunError::system("make"))?;
        let space = Arc::new(FakeSpace {
            faults: self.faults.clone(),
            mapped: Mutex::default(),
        });
        let weak = Arc::downgrade(&space);
        self.out.lock().unwrap().spaces.push(weak);
        let host = self.clone();
        Ok(Arc::new(FakeOpener { host, space }))
    }
}

#[derive(Debug)]
struct FakeOpener {
    host: FakeHost,
    space: Arc<FakeSpace>,
}

impl OpenDevice for FakeOpener {
    fn dma(&self) -> Arc<dyn DmaSpace> {
        self.space.clone()
    }

    fn join(&self, _folder: &Path) -> Result<Joined, RunError> {
        let faults = &self.host.faults;
        faults.pass("join").map_err(RunError::system("join"))?;
        let joined = Arc::new(());
        let weak = Arc::downgrade(&joined);
        self.host.out.lock().unwrap().joined.push(weak);
        let joined: Box<dyn Any + Send> = Box::new(joined);
        Ok(joined)
    }

    fn inherit(&self, _handed: Inherited, _folder: &Path) -> Result<(), RunError> {
        unreachable!("no descriptor is inherited");
    }

    fn open(&self, folder: &Path, _: Option<&VfToken>) -> Result<Arc<dyn DeviceIo>, RunError> {
        let faults = self.host.faults.clone();
        faults.pass("open").map_err(RunError::system("open"))?;
        let device = Arc::new(FakeDevice {
            faults,
            config: Mutex::new(configuration()),
            bar_size: if folder.ends_with(LARGE) {
                64 << 20
            } else {
                16 << 10
            },
            error: Mutex::default(),
            _group: File::open("/dev/null").unwrap(),
        });
        let weak = Arc::downgrade(&device);
        self.host.out.lock().unwrap().devices.push(weak);
        Ok(device)
    }
}

#[derive(Debug)]
struct FakeSpace {
    faults: Arc<Faults>,
    mapped: Mutex<BTreeSet<u64>>,
}

impl DmaSpace for FakeSpace {
    fn add(&self, mapping: DmaMapping, _dma_buf: &OpenDmaBuf<'_>) -> Result<(), MapError> {
        let DmaMapping {
            iova, size, owner, ..
        } = mapping;
        let refused = |_| MapError::Malformed {
            owner,
            iova,
            size,
            why: "a test has it so",
        };
        self.faults.pass("map memory").map_err(refused)?;
        assert!(self.mapped.lock().unwrap().insert(iova.0));
        Ok(())
    }

    fn unmap(&self, iova: Iova, _size: u64) -> Result<(), MapError> {
        assert!(self.mapped.lock().unwrap().remove(&iova.0));
        Ok(())
    }

    fn usable_ranges(&self) -> Result<Vec<IovaRange>, MapError> {
        Ok(vec![IovaRange::ALL])
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }
}

/// A drive with a pin, MSI-X and a BAR; the descriptor stands for its own.
#[derive(Debug)]
struct FakeDevice {
    faults: Arc<Faults>,
    config: Mutex<Vec<u8>>,
    bar_size: u64,
    /// What its errors are told by.
    error: Mutex<Option<File>>,
    _group: File,
}

fn configuration() -> Vec<u8> {
    let mut config = vec![0; 256];
    let mut set = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
    set(0, &[0x36, 0x1b, 0x10, 0x00, 0, 0, 0x10, 0]);
    set(0x08, &[2, 2, 8, 1]);
    set(0x10, &[4]); // A 64-bit BAR.
    set(0x34, &[0x40]);
    set(0x3d, &[1]); // INTA
    // MSI-X: three vectors, the table at 0x2000 and the pending bits at 0x3000 of BAR 0.
    set(0x40, &[0x11, 0x80, 2, 0, 0, 0x20, 0, 0, 0, 0x30, 0, 0]);
    // PCI Express, an endpoint with function level reset.
    set(0x80, &[0x10, 0, 2, 0, 0, 0x80, 0, 0x10]);
    config
}

impl FakeDevice {
    /// It has an error that it does not recover from.
    fn fail(&self) {
        let error = self.error.lock().unwrap();
        error
            .as_ref()
            .unwrap()
            .write_all(&1_u64.to_ne_bytes())
            .unwrap();
    }

    fn refuse(&self, what: &'static str) -> Result<(), IrqError> {
        self.faults.pass(what).map_err(IrqError::Kernel)
    }
}

impl DeviceIo for FakeDevice {
    fn region(&self, index: RegionIndex) -> DeviceRegion {
        let size = match index {
            RegionIndex::CONFIG => 256,
            bar if bar.number() == 0 => self.bar_size,
            _ => return DeviceRegion::default(),
        };
        DeviceRegion {
            size,
            readable: true,
            writable: true,
            areas: match index {
                RegionIndex::CONFIG => Vec::new(),
                _ => vec![Area { offset: 0, size }],
            },
        }
    }

    fn region_read(&self, index: RegionIndex, offset: u64, data: &mut [u8]) -> io::Result<()> {
        self.faults.pass("read a register")?;
        data.fill(0);
        if index == RegionIndex::CONFIG {
            let from = offset as usize;
            let config = self.config.lock().unwrap();
            // It has no extended configuration space.
            let there = config.get(from..from + data.len());
            data.copy_from_slice(there.ok_or(io::ErrorKind::InvalidInput)?);
        }
        Ok(())
    }

    fn region_write(&self, index: RegionIndex, offset: u64, data: &[u8]) -> io::Result<()> {
        self.faults.pass("write a register")?;
        if index == RegionIndex::CONFIG {
            let from = offset as usize;
            self.config.lock().unwrap()[from..from + data.len()].copy_from_slice(data);
        }
        Ok(())
    }

    fn map(&self, _: RegionIndex, _: Area) -> io::Result<busway_vfio::Mapping> {
        self.faults.pass("map a BAR")?;
        Err(io::ErrorKind::Unsupported.into())
    }

    fn irq(&self, index: IrqIndex) -> IrqInfo {
        let count = match index {
            IrqIndex::Msix => 3,
            IrqIndex::Msi => 0,
            _ => 1,
        };
        IrqInfo {
            count,
            resizable: true,
        }
    }

    fn set_irqs(
        &self,
        index: IrqIndex,
        _: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), IrqError> {
        self.refuse("set interrupts up")?;
        if let (IrqIndex::Error, [Some(event)]) = (index, events) {
            let event = event.try_clone_to_owned().map_err(IrqError::Kernel)?;
            *self.error.lock().unwrap() = Some(event.into());
        }
        Ok(())
    }

    fn unmask_on(&self, _: IrqIndex, _: BorrowedFd<'_>) -> Result<(), IrqError> {
        self.refuse("unmask on an event")
    }

    fn unmask(&self, _: IrqIndex) -> Result<(), IrqError> {
        self.refuse("unmask")
    }

    fn disable_irqs(&self, _: IrqIndex) -> Result<(), IrqError> {
        self.refuse("disable interrupts")
    }

    fn can_reset(&self) -> bool {
        true
    }

    fn reset(&self) -> io::Result<()> {
        self.faults.pass("reset")
    }

    fn function_reset(&self) -> Option<FunctionReset> {
        Some(FunctionReset::Flr)
    }
}

/// Ways to the guest, whose making can fail: KVM's for messages, and for a pin its eventfds, for KVM takes its time to
/// disconnect one.
#[derive(Clone, Debug)]
pub(super) struct FaultyWires {
    pub(super) router: IrqRouter,
    pub(super) faults: Arc<Faults>,
}

#[derive(Debug)]
struct FakeLine([EventFd; 2]);

impl InterruptLine for FakeLine {
    fn event(&self) -> BorrowedFd<'_> {
        self.0[0].as_fd()
    }

    fn resample(&self) -> BorrowedFd<'_> {
        self.0[1].as_fd()
    }
}

fn refused(source: io::Error) -> RouteError {
    RouteError::Kernel {
        what: "KVM_IRQFD",
        source,
    }
}

impl Wires for FaultyWires {
    fn routes(&self, _: &str) -> Arc<dyn InterruptRoutes> {
        Arc::new(self.clone())
    }

    fn lines(&self, _gsis: [u32; 4]) -> Arc<dyn InterruptLines> {
        Arc::new(self.clone())
    }

    fn vectors(&self) -> VectorCount {
        self.router.vectors()
    }
}

impl InterruptRoutes for FaultyWires {
    fn connect(
        &self,
        vector: u16,
        message: MsiMessage,
    ) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        self.faults.pass("route a message").map_err(refused)?;
        InterruptRoutes::connect(&self.router, vector, message)
    }
}

impl InterruptLines for FaultyWires {
    fn connect(&self, _pin: InterruptPin) -> Result<Arc<dyn InterruptLine>, RouteError> {
        self.faults.pass("connect a pin").map_err(refused)?;
        let events = [EventFd::new(), EventFd::new()].map(Result::unwrap);
        Ok(Arc::new(FakeLine(events)))
    }
}
