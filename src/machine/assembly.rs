//! A machine out of a configuration.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use busway_iommu::DmaSpace;
use busway_pci::pace::SystemClock;
use busway_pci::{Function, FunctionId, InterruptRoutes, Windows};
use busway_vfio::{
    AssignOptions, AssignedFunction, EventFd, KernelDevice, Resets, RomChoice, RomImage, Wiring,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::RunError;
use super::address_plan::AddressPlan;
use super::assigned::Assigned;
use super::bars::Bars;
use super::dma::DmaListener;
use super::events::Events;
use super::host_devices::HostDevices;
use super::opening::open_devices;
use super::pci::{Pci, pins_behind_port};
use super::places::{Behind, behind_ports};
use super::platform::{Platform, open_console};
use super::signals::Signals;
use crate::acpi;
use crate::boot::{self, BootSource, E820};
use crate::config::{ConsoleConfig, DeviceConfig, VmConfig};
use crate::kvm::{Buses, CpuFeatures, CpuModel, ExitKind, IrqRouter, Vcpus, Vm};
use crate::memory::{GuestRam, Ram, Regions};
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
    // Waits for the devices that are being released, whose functions the topology has no more.
    pub(super) assigned: Assigned,
    pub(super) pci: Pci,
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
        many_files();
        // What costs nothing to find out comes first.
        let source = open_kernel(config)?;
        let options = assign_options(config)?;
        let vm = Vm::new()?;
        let features = CpuFeatures {
            nested: config.cpus.nested,
            pmu: config.cpus.pmu,
        };
        let model = CpuModel::new(&vm, features)?;
        let router = vm.irq_router()?;

        let host_devices = HostDevices::find(config)?;
        let device_configs = host_devices.configs(config);
        let prefault = config.memory.prefault.unwrap_or(!config.device.is_empty());
        let plan = AddressPlan::new(
            &config.memory,
            &host_devices.planned(&options),
            host_devices.reserved(),
            model.address_bits(),
        )?;
        let given = host_devices.functions();
        let ram = Ram::around(
            &config.memory,
            prefault || !config.device.is_empty(),
            plan.mmio32_start,
            &plan.reserved,
        )?;
        // The kernel resets each device that is opened, and memory is populated meanwhile.
        let failed = AtomicBool::new(false);
        let (populated, opened) = thread::scope(|scope| {
            let opening = scope.spawn(|| {
                open_devices(config, host_devices, &vm, &ram, report)
                    .inspect_err(|_| failed.store(true, Ordering::Relaxed))
            });
            let populated = match prefault {
                true => populate(&ram, report, signals, &failed),
                false => Ok(()),
            };
            report.reached(Stage::Memory);
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
        report.reached(Stage::Open);
        signals.check()?;

        let (dma, devices) = match opened? {
            Some((space, devices)) => {
                let dma = space.dma();
                let listener = Arc::new(DmaListener::new(dma.clone(), config.platform.p2p));
                memory.0.listen(listener.clone())?;
                let stats = dma.stats();
                report.set_mappings(stats.map_calls, stats.bytes, stats.device_map_calls);
                (Some((dma, listener)), devices)
            }
            None => (None, Vec::new()),
        };
        report.reached(Stage::DmaMap);
        signals.check()?;

        let buses = Buses::default();
        let usable = dma.as_ref().map(|(dma, _)| dma.usable_ranges());
        let usable = usable.and_then(Result::ok).unwrap_or_default();
        let windows = plan.windows(&ram.guest_ranges(), &usable);
        let bars = Bars::new(
            buses.clone(),
            memory.0.clone(),
            vm.doorbells(),
            [&windows.memory32[..], &windows.memory64].concat(),
        );
        let acpi = acpi_platform(config, &windows);
        let mut pci = Pci::new(bars, &buses, windows)?;
        let quit = EventFd::new().map_err(RunError::system("eventfd"))?;
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
        let resets = Arc::<Resets>::default();
        let mut assigned =
            Assigned::new(resets.clone()).map_err(RunError::system("epoll_create"))?;
        let devices: Vec<_> = devices.into_iter().map(Arc::new).collect();
        for device in &devices {
            resets.add(device.name(), device.clone());
        }
        resets.begin();
        for port in behind_ports(&given) {
            let of = |behind: &Behind| {
                Some(Given {
                    config: device_configs.get(behind.index)?,
                    options: options.get(behind.index)?,
                    number: behind.function,
                    device: devices.get(behind.index)?.clone(),
                })
            };
            let here: Vec<_> = port.iter().filter_map(of).collect();
            let port = add_assigned(&mut pci, &here, &resets, &router, &host_vectors, &events)?;
            for given in here {
                assigned.add(given.config, port, given.device);
            }
        }
        let (dma, listener) = dma.unzip();
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
        // Addresses are assigned by now, so that what devices reach at them can be known.
        if let Some(listener) = listener {
            listener.survey(&machine.pci.host_functions())?;
        }
        Ok(machine)
    }

    /// Does what firmware does, and puts the boot processor at the kernel's entry. No vCPU may run.
    pub(super) fn load(&self) -> Result<(), RunError> {
        use vm_memory::GuestAddressSpace;

        self.pci.assign()?;
        let ram = self.ram.guest().memory();
        let rsdp = acpi::install(&*ram, &self.boot.acpi)?;
        let map = E820::new(&self.ram.guest_ranges());
        let entry = boot::load(&*ram, &self.boot.source, &map, rsdp)?;
        self.vcpus.enter(|sregs| entry.apply(sregs))?;
        Ok(())
    }

    /// Says in the report what the run has cost so far.
    pub(super) fn account(&self, report: &Report) {
        if let Some(dma) = &self.dma {
            let stats = dma.stats();
            report.set_mappings(stats.map_calls, stats.bytes, stats.device_map_calls);
        }
        let vectors = self.host_vectors.vectors();
        report.set_vectors(vectors.most as u64, vectors.updates);
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

/// A host function that was asked for, opened.
struct Given<'a> {
    config: &'a DeviceConfig,
    options: &'a AssignOptions,
    /// Its number in the guest.
    number: Function,
    device: Arc<KernelDevice>,
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

/// Puts the functions of a host device, all of them given, behind a root port, which is returned.
fn add_assigned(
    pci: &mut Pci,
    functions: &[Given<'_>],
    resets: &Arc<Resets>,
    router: &IrqRouter,
    host_vectors: &IrqRouter,
    events: &Arc<Events>,
) -> Result<FunctionId, RunError> {
    let names: Vec<_> = functions.iter().map(|given| given.device.name()).collect();
    let names = names.join(" and ");
    let slot = pci.port_slot(&names)?;
    let mut behind = Vec::new();
    for given in functions {
        let wiring = Wiring {
            routes: Arc::new(host_vectors.clone()),
            lines: Arc::new(router.pins(pins_behind_port(slot))),
            resets: resets.clone(),
            clock: Arc::new(SystemClock::default()),
        };
        let device = given.device.clone();
        let name = device.name().to_owned();
        let function = AssignedFunction::new(&name, device, wiring, given.options)?;
        log::info!("{}", function.summary());
        behind.push((given.number, function));
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

/// Has as many files be open as this process may raise its limit to: each vector of a device that its
/// driver uses is one, and the usual limit is below what a guest with many devices and processors has.
fn many_files() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::debug!("RLIMIT_NOFILE: {error}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_files_can_be_open_as_the_limit_can_be_raised_to() {
        let limit = getrlimit(Resource::Nofile);
        // Others' tests go on meanwhile.
        let lower = Rlimit {
            current: limit.maximum.map(|most| most - 1),
            ..limit
        };
        setrlimit(Resource::Nofile, lower).unwrap();
        many_files();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
