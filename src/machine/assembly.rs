//! A machine out of a configuration.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, ScopedJoinHandle};

use busway_iommu::{DmaSpace, HostPaths, Mode, Space};
use busway_pci::{Function, FunctionId, InterruptRoutes, Windows};
use busway_vfio::{
    AssignOptions, AssignedFunction, DeviceError, KernelDevice, Opener, Resets, RomChoice,
    RomImage, TokenUse, VfToken, Wiring,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::RunError;
use super::assigned::Assigned;
use super::bars::Bars;
use super::dma::DmaListener;
use super::events::Events;
use super::pci::{Pci, pins_behind_port};
use super::places::{Behind, HostFunction, behind_ports};
use super::platform::{Platform, open_console};
use super::signals::Signals;
use crate::acpi;
use crate::boot::{self, BootSource, E820};
use crate::config::{Choice, ConsoleConfig, DeviceConfig, VmConfig};
use crate::kvm::{Buses, CpuModel, ExitKind, IrqRouter, Vcpus, Vm};
use crate::memory::{GuestRam, Ram, Regions, layout};
use crate::report::{Report, Stage};
use crate::virtio::blk::Blk;
use crate::virtio::console::Console;
use crate::virtio::net::Net;
use crate::virtio::rng::Rng;
use crate::virtio::{VirtioDevice, VirtioPci};

/// A machine. The fields go in the order in which they stand: who uses something before what is used.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) vcpus: Vcpus,
    pub(super) pci: Pci,
    pub(super) assigned: Assigned,
    pub(super) platform: Platform,
    dma: Option<Arc<dyn DmaSpace>>,
    _memory: MemoryMap,
    ram: Ram,
    pub(super) events: Arc<Events>,
    pub(super) quit: EventFd,
    /// Counts the assigned devices' vectors.
    host_vectors: IrqRouter,
    boot: Boot,
    pub(super) vm: Vm,
}

/// What a start needs, the first as every other.
#[derive(Debug)]
struct Boot {
    source: BootSource,
    acpi: acpi::Platform,
}

/// The list of regions, emptied when it is dropped, so that nothing is mapped for anybody then.
#[derive(Debug)]
struct MemoryMap(Arc<Regions>);

impl Drop for MemoryMap {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl Machine {
    /// Takes from the host what `config` asks for and puts it together, ready for the guest's first
    /// instruction.
    pub(super) fn assemble(
        config: &VmConfig,
        report: &Report,
        signals: &Signals,
    ) -> Result<Self, RunError> {
        few_arenas();
        // What costs nothing to find out comes first.
        let source = open_kernel(config)?;
        let options = assign_options(config)?;
        let vm = Vm::new()?;
        let model = CpuModel::new(&vm)?;
        let router = vm.irq_router()?;

        let prefault = config.memory.prefault.unwrap_or(!config.device.is_empty());
        let ram = Ram::new(&config.memory, prefault || !config.device.is_empty())?;
        // The kernel resets each device that is opened, and memory is populated meanwhile.
        let failed = AtomicBool::new(false);
        let (populated, opened) = thread::scope(|scope| {
            let opening = scope.spawn(|| {
                open_devices(config, &vm, &ram)
                    .inspect_err(|_| failed.store(true, Ordering::Relaxed))
            });
            let populated = match prefault {
                true => populate(&ram, report, signals, &failed),
                false => Ok(()),
            };
            let opened = opening.join().unwrap_or_else(|panic| resume_unwind(panic));
            (populated, opened)
        });
        populated?;
        let memory = MemoryMap(Arc::default());
        memory.0.listen(Arc::new(vm.memslots()))?;
        for region in ram.regions() {
            memory.0.add(region)?;
        }
        report.set_guest_memory(ram.host_ranges());
        report.reached(Stage::Memory);
        signals.check()?;

        let (dma, devices) = match opened? {
            Some((space, devices)) => {
                let dma = space.dma();
                memory.0.listen(Arc::new(DmaListener::new(dma.clone())))?;
                let stats = dma.stats();
                report.set_mappings(stats.map_calls, stats.bytes);
                (Some(dma), devices)
            }
            None => (None, Vec::new()),
        };
        report.reached(Stage::DmaMap);
        signals.check()?;

        let buses = Buses::default();
        let windows = windows(&ram, &model);
        let bars = Bars::new(
            buses.clone(),
            memory.0.clone(),
            vm.doorbells(),
            [windows.memory32.clone(), windows.memory64.clone()],
        );
        let acpi = acpi_platform(config, &windows);
        let mut pci = Pci::new(bars, &buses, windows)?;
        let quit = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(RunError::system("eventfd"))?;
        let events = Events::new().map_err(RunError::system("eventfd"))?;
        let platform = Platform::new(
            &config.serial,
            &buses,
            &router,
            pci.topology(),
            &events,
            &quit,
        )?;
        add_virtio(&mut pci, config, ram.guest(), &router, &quit)?;
        let host_vectors = router.counting_anew();
        let mut assigned = Assigned::new().map_err(RunError::system("epoll_create"))?;
        let devices: Vec<_> = devices.into_iter().map(Arc::new).collect();
        let resets = Arc::<Resets>::default();
        for device in &devices {
            resets.add(device.name(), device.clone());
        }
        resets.begin();
        let given: Vec<_> = devices
            .iter()
            .map(|device| HostFunction::of(device))
            .collect();
        for behind in behind_ports(&given) {
            let device = |behind: &Behind| {
                let options = options.get(behind.index)?;
                Some((behind.function, devices.get(behind.index)?.clone(), options))
            };
            let functions: Vec<_> = behind.iter().filter_map(device).collect();
            let port = add_assigned(
                &mut pci,
                &functions,
                &resets,
                &router,
                &host_vectors,
                &events,
            )?;
            let configs = behind
                .iter()
                .filter_map(|each| config.device.get(each.index));
            for (config, (_, device, _)) in configs.zip(functions) {
                assigned.add(config, port, device);
            }
        }
        report.reached(Stage::Devices);
        signals.check()?;

        let vcpus = Vcpus::new(&vm, &model, config.cpus.boot, &buses, &events.sink())?;
        let machine = Self {
            vcpus,
            pci,
            assigned,
            platform,
            dma,
            _memory: memory,
            ram,
            events,
            quit,
            host_vectors,
            boot: Boot { source, acpi },
            vm,
        };
        machine.load()?;
        Ok(machine)
    }

    /// Does what firmware does, and puts the boot processor at the kernel's entry. No vCPU may run.
    pub(super) fn load(&self) -> Result<(), RunError> {
        use vm_memory::GuestAddressSpace;

        self.pci.assign()?;
        let ram = self.ram.guest().memory();
        let rsdp = acpi::install(&*ram, &self.boot.acpi)?;
        let map = E820::new(&layout::ram_ranges(self.ram.size()));
        let entry = boot::load(&*ram, &self.boot.source, &map, rsdp)?;
        self.vcpus.enter(|sregs| entry.apply(sregs))?;
        Ok(())
    }

    /// Puts everything into its state at power-on, and starts the kernel anew. Host devices are
    /// reset, and stay with the VM.
    pub(super) fn restart(&mut self) -> Result<(), RunError> {
        self.vcpus.hold();
        self.assigned.on_restart(self.pci.topology());
        self.events.clear();
        self.pci.topology().reset();
        self.platform.reset();
        self.vm.reset_chips()?;
        self.vcpus.reset()?;
        self.load()
    }

    /// Says in the report what the run has cost so far.
    pub(super) fn account(&self, report: &Report) {
        if let Some(dma) = &self.dma {
            let stats = dma.stats();
            report.set_mappings(stats.map_calls, stats.bytes);
        }
        report.set_vectors(self.host_vectors.vectors().most as u64);
        report.set_devices(self.pci.assigned());
        for kind in ExitKind::ALL {
            report.set_exits(kind.name(), self.vcpus.exits(kind));
        }
    }
}

fn open_kernel(config: &VmConfig) -> Result<BootSource, RunError> {
    let kernel = config.kernel.as_deref().unwrap_or(Path::new(""));
    let cmdline = match &config.cmdline {
        Some(cmdline) => cmdline,
        None => boot::default_cmdline(&config.serial, &config.console),
    };
    Ok(BootSource::open(
        kernel,
        config.initramfs.as_deref(),
        cmdline,
    )?)
}

/// Touches all of RAM, unless a signal comes, or somebody else has failed and it is for nothing.
fn populate(
    ram: &Ram,
    report: &Report,
    signals: &Signals,
    failed: &AtomicBool,
) -> Result<(), RunError> {
    let total = ram.size();
    let mut stopped = None;
    report.pinning(0, total);
    ram.prefault(|done| {
        report.pinning(done, total);
        stopped = stopped.or_else(|| signals.take());
        if stopped.is_some() || failed.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    match stopped {
        Some(signal) => Err(RunError::StoppedEarly { signal }),
        None => Ok(()),
    }
}

/// A DMA space and the assigned devices in it; nothing where there are none.
///
/// The devices are opened before RAM is mapped: a VFIO container maps only with a group in it.
fn open_devices(
    config: &VmConfig,
    vm: &Vm,
    ram: &Ram,
) -> Result<Option<(Space, Vec<KernelDevice>)>, RunError> {
    if config.device.is_empty() {
        return Ok(None);
    }
    let paths = HostPaths::default();
    let folders: Vec<&Path> = config.device.iter().map(|device| &*device.path).collect();
    let mode = match config.platform.iommufd {
        Choice::On => Mode::On,
        Choice::Off => Mode::Off,
        Choice::Auto => Mode::Auto,
    };
    let space = Space::open(&paths, mode, &folders)?;
    space.reserve(&paths, ram.size())?;
    let uses: Vec<_> = folders
        .iter()
        .map(|folder| TokenUse::of(&paths, folder))
        .collect();
    let opener = Opener::new(paths, space.clone(), Some(Arc::new(vm.vfio()?)));
    let opener = &opener;
    let open = |setting: bool| -> Vec<Option<Result<KernelDevice, DeviceError>>> {
        thread::scope(|scope| {
            let devices = config.device.iter().zip(&uses).map(|(device, &used)| {
                let open =
                    move || opener.open(&device.path, vf_token(config, device, used).as_ref());
                ((used == TokenUse::Sets) == setting).then(|| scope.spawn(open))
            });
            let opening: Vec<_> = devices.collect();
            let join = |thread: ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            opening.into_iter().map(|thread| thread.map(join)).collect()
        })
    };
    // Opening a physical function says which token its virtual functions have.
    let (first, then) = (open(true), open(false));
    let devices = first.into_iter().zip(then).filter_map(|(a, b)| a.or(b));
    Ok(Some((space, devices.collect::<Result<_, _>>()?)))
}

/// The VF token of a device: its own or, where it can have one, that of all.
fn vf_token(config: &VmConfig, device: &DeviceConfig, used: TokenUse) -> Option<VfToken> {
    let of_all = config.platform.vf_token.as_ref();
    let token = device
        .vf_token
        .as_ref()
        .or(of_all.filter(|_| used != TokenUse::None));
    // The configuration has been found sound.
    token?.parse().ok()
}

fn windows(ram: &Ram, model: &CpuModel) -> Windows {
    Windows {
        io: layout::PCI_IO,
        memory32: layout::MMIO32_START..layout::MMIO32_END,
        memory64: layout::mmio64(ram.size(), model.address_bits()),
    }
}

fn acpi_platform(config: &VmConfig, windows: &Windows) -> acpi::Platform {
    acpi::Platform {
        cpus: (0..config.cpus.boot)
            .map(|id| acpi::Cpu {
                apic_id: id.into(),
                enabled: true,
            })
            .collect(),
        // One behind each root port, and each assigned device has a port.
        last_bus: u8::try_from(config.device.len()).unwrap_or(u8::MAX),
        mmio32: windows.memory32.clone(),
        mmio64: windows.memory64.clone(),
        serial: config.serial != ConsoleConfig::Off,
        native_hotplug: !config.device.is_empty(),
    }
}

/// The virtio devices: disks, NICs, console and entropy source.
fn add_virtio(
    pci: &mut Pci,
    config: &VmConfig,
    ram: &GuestRam,
    router: &IrqRouter,
    quit: &EventFd,
) -> Result<(), RunError> {
    let routes: Arc<dyn InterruptRoutes> = Arc::new(router.clone());
    let mut add = |device: Box<dyn VirtioDevice>| -> Result<(), RunError> {
        let function = VirtioPci::new(device, ram.clone(), routes.clone())?;
        let name = function.name().to_owned();
        pci.add(&name, function)
    };
    let name = |kind, index, id: &Option<String>| match id {
        Some(id) => id.clone(),
        None => format!("{kind}{index}"),
    };
    for (index, disk) in config.disk.iter().enumerate() {
        add(Box::new(Blk::new(&name("disk", index, &disk.id), disk)?))?;
    }
    for (index, net) in config.net.iter().enumerate() {
        let net = Net::new(&name("net", index, &net.id), net)?;
        log::info!("net {}: tap {}", net.name(), net.tap_name());
        add(Box::new(net))?;
    }
    if let Some(endpoint) = open_console("--console", &config.console, quit)? {
        add(Box::new(Console::new("console", endpoint)))?;
    }
    add(Box::new(Rng::new("rng", &config.rng)?))
}

/// What was said about each assigned device, in their order.
fn assign_options(config: &VmConfig) -> Result<Vec<AssignOptions>, RunError> {
    let options = config.device.iter().map(|device| {
        let rom = match (&device.romfile, device.rom) {
            (Some(path), _) => RomChoice::Image(RomImage::load(path)?),
            (None, Some(true)) => RomChoice::Device,
            (None, Some(false)) => RomChoice::None,
            (None, None) => RomChoice::Auto,
        };
        Ok(AssignOptions {
            rom,
            nv_gpudirect_clique: device.x_nv_gpudirect_clique,
        })
    });
    options.collect()
}

/// The functions of a host device, with their numbers, behind a root port, which is given.
fn add_assigned(
    pci: &mut Pci,
    functions: &[(Function, Arc<KernelDevice>, &AssignOptions)],
    resets: &Arc<Resets>,
    router: &IrqRouter,
    host_vectors: &IrqRouter,
    events: &Arc<Events>,
) -> Result<FunctionId, RunError> {
    let names: Vec<_> = functions
        .iter()
        .map(|(_, device, _)| device.name())
        .collect();
    let names = names.join(" and ");
    let slot = pci.port_slot(&names)?;
    let mut behind = Vec::new();
    for (number, device, options) in functions {
        let wiring = Wiring {
            routes: Arc::new(host_vectors.clone()),
            lines: Arc::new(router.pins(pins_behind_port(slot))),
            resets: resets.clone(),
        };
        let function = AssignedFunction::new(device.name(), device.clone(), wiring, options)?;
        log::info!("{}", function.summary());
        behind.push((*number, function));
    }
    let routes = Arc::new(router.clone());
    pci.add_behind_port(slot, &names, behind, routes, events.clone())
}

/// Keeps glibc from giving each thread a heap of its own: what the threads here allocate is little,
/// and each heap has pages that are only ever touched once.
fn few_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the parameter exists and takes any count; allocations made before stay valid.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
