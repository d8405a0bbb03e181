//! A machine out of a configuration.

use std::ops::ControlFlow;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use busway_vfio::{AssignOptions, EventFd};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::RunError;
use super::address_plan::{AddressPlan, PlannedFunction, PluggedRoom, SegmentAddresses};
use super::aside::Aside;
use super::consoles::{CONSOLE, SERIAL, open_console, terminal};
use super::definition::Definition;
use super::early::Early;
use super::events::Events;
use super::firmware::{FirmwareBoard, FirmwareSource, Surroundings};
use super::passthrough::{Found, OpenDevices, Opened, Passthrough, options};
use super::pci::Pci;
use super::resize::ProcessorCount;
use super::seats::Owner;
use super::segments::{add_empty_ports, last_bus, open_slots, segments};
use super::virtio::VirtioDevices;
use crate::acpi::{self, PluggableMemory};
use crate::arch::board::Board;
use crate::arch::boot::{self, BootSource, E820};
use crate::arch::layout;
use crate::arch::{CpuFeatures, CpuModel};
use crate::config::{
    ConsoleConfig, CpusConfig, DEFAULT_ZONE, MemoryConfig, VirtioConfig, VmConfig,
};
use crate::devices::cpu_hotplug::CpuHotplug;
use crate::devices::pvpanic::Pvpanic;
use crate::devices::tpm::{self, Tpm};
use crate::devices::watchdog::Watchdog;
use crate::kvm::{Buses, ExitKind, Vcpus, Vm, keep_from, keep_from_none};
use crate::memory::{Area, Ballooned, Discards, Ram, Regions, Slots};
use crate::report::{Report, Stage};
use crate::smbios::{self, FirmwareTable, Identity};
use crate::virtio::MemoryTable;
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;

/// A machine. The fields go in the order in which they stand: who uses something before what is used.
#[derive(Debug)]
pub(super) struct Machine {
    pub(super) vcpus: Vcpus,
    pub(super) processors: ProcessorCount,
    /// A pause of the virtio devices that is under way, which is waited for.
    pub(super) pausing: Arc<Aside>,
    // Waits for the devices that are being released, whose functions the topology has no more.
    pub(super) passthrough: Passthrough,
    pub(super) virtio: VirtioDevices,
    pub(super) pci: Pci,
    pub(super) board: Board,
    pub(super) watchdog: Option<Arc<Watchdog>>,
    pub(super) tpm: Option<Tpm>,
    /// The pseudo-terminals that the serial port and the console are at.
    pub(super) serial_terminal: Option<PathBuf>,
    pub(super) console_terminal: Option<PathBuf>,
    /// What it was made of.
    definition: Arc<Definition>,
    _memory: MemoryMap,
    pub(super) ram: Ram,
    pub(super) events: Arc<Events>,
    pub(super) quit: EventFd,
    boot: Boot,
    pub(super) vm: Vm,
}

/// What a start needs, the first as every other.
#[derive(Debug)]
enum Boot {
    /// A kernel is loaded, and entered where it says.
    Kernel(Box<KernelBoot>),
    /// The boot processor begins as at power-on, with firmware.
    Firmware(FirmwareBoard),
}

/// A kernel, and what it is told of the board.
#[derive(Debug)]
struct KernelBoot {
    source: BootSource,
    acpi: acpi::Hardware,
    /// Where there is anything to be told of which machine it is.
    smbios: Option<smbios::Tables>,
}

/// What the guest begins with.
#[derive(Debug)]
enum Source {
    Kernel(BootSource),
    Firmware(FirmwareSource),
}

impl Source {
    fn is_bios(&self) -> bool {
        matches!(self, Self::Firmware(source) if source.firmware.is_bios())
    }
}

/// What a machine is begun with: none of it takes the kernel long.
///
/// It belongs to the main thread, for KVM calls the VM's folder of counters after the thread that makes it, where
/// `kvm_stat` and others look for the process. Linux, virt/kvm/kvm_main.c, `kvm_create_vm_debugfs`.
#[derive(Debug)]
pub(super) struct Begun {
    source: Source,
    options: Vec<AssignOptions>,
    vm: Vm,
}

impl Begun {
    pub(super) fn new(config: &VmConfig) -> Result<Self, RunError> {
        many_files();
        // What costs nothing to find out comes first.
        let source = open_source(config)?;
        let options: Result<_, RunError> = config.device.iter().map(options).collect();
        Ok(Self {
            source,
            options: options?,
            vm: Vm::new()?,
        })
    }
}

/// The list of regions, emptied when it is dropped, so that nothing is mapped for anybody then.
#[derive(Debug)]
struct MemoryMap(Arc<Regions>);

impl MemoryMap {
    /// Puts RAM into it, mapped into the VM and known to virtio devices' back ends.
    fn fill(&self, ram: &Ram, vm: &Vm, table: &Arc<MemoryTable>) -> Result<(), RunError> {
        self.0.listen(Arc::new(vm.memslots()))?;
        self.0.listen(table.clone())?;
        for region in ram.regions() {
            self.0.add(region)?;
        }
        Ok(())
    }
}

impl Drop for MemoryMap {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl Machine {
    /// Takes from the host what `config` asks for and puts it together, ready for the guest's first
    /// instruction, unless it is not wanted any more. What it opens is among `devices`.
    pub(super) fn assemble(
        begun: Begun,
        definition: &Arc<Definition>,
        report: &Report,
        early: &Early,
        devices: &OpenDevices,
        can_be_asked: bool,
    ) -> Result<Self, RunError> {
        let Begun {
            source,
            options,
            vm,
        } = begun;
        let config = &definition.config;
        keep_away(&config.cpus);
        let model = CpuModel::new(&vm, cpu_features(config))?;
        let router = vm.irq_router()?;
        let found = Found::find(definition, options)?;
        let room = PluggedRoom::of(config, can_be_asked, model.address_bits());
        let plan = plan(config, &found, &model, room)?;
        plan.pluggable(&config.memory_to_plan())?;
        let tpm = config.tpm.as_ref();
        let tpm = tpm.map(|tpm| Tpm::open(&tpm.socket, layout::TPM_START));
        let tpm = tpm.transpose()?;

        let quit = EventFd::new().map_err(RunError::system("eventfd"))?;
        let events = Events::new().map_err(RunError::system("eventfd"))?;
        let memory = MemoryMap(Arc::default());
        let mut passthrough = Passthrough::new(config, &vm, &memory.0, &router, &events, devices)?;
        passthrough.keep_iommufd(&found)?;
        let open = || passthrough.open(found, report);
        let (ram, opened) = take(config, &plan, open, report, early)?;
        let table = Arc::<MemoryTable>::default();
        memory.fill(&ram, &vm, &table)?;
        report.set_guest_memory(ram.host_ranges());
        report.reached(Stage::Open);
        early.check()?;
        let opened = opened?;

        if let Some(opened) = &opened {
            passthrough.map(opened)?;
            passthrough.account(report);
        }
        report.reached(Stage::DmaMap);
        early.check()?;

        let buses = Buses::default();
        let usable = passthrough.usable_ranges();
        let mut taken = ram.guest_ranges();
        taken.extend(ram.pluggable_range());
        let windows = plan.windows(&taken, &usable);
        let mut segments = segments(config, plan.share(&windows)?)?;
        let mut acpi = acpi_hardware(config, &segments);
        acpi.pluggable = ram.pluggable_range().map(|range| PluggableMemory {
            ram: ram.guest_ranges(),
            range,
        });
        acpi.numa = numa(config, &ram);
        if config.firmware.is_some()
            && let Some(only) = segments.first_mut()
        {
            only.windows = plan.bar_windows(&windows, &usable);
            if source.is_bios() {
                only.windows.memory32 = layout::bios_mmio32(&only.windows.memory32);
            }
        }
        let windows = match segments.first() {
            Some(first) => first.windows.clone(),
            None => windows,
        };
        let lines = router.shared_lines();
        let mut pci = Pci::new(
            segments,
            &buses,
            memory.0.clone(),
            vm.doorbells(),
            lines,
            config.firmware.is_some(),
        )?;
        pci.keep_places(config);
        let serial = open_console(
            SERIAL,
            &config.serial,
            definition.terminals.serial.as_ref(),
            &quit,
        )?;
        let serial_terminal = terminal(&config.serial, serial.as_ref());
        let board = Board::new(
            serial,
            &buses,
            &router,
            pci.topology(),
            events.clone(),
            config.firmware.is_some(),
        )?;
        let routes = Arc::new(router.clone());
        let top_of_ram = taken.last().map_or(0, |range| range.end);
        let area = Area::new(plan.plugged_area(top_of_ram, &usable));
        let slots = Slots::new(ram.guest(), &memory.0, area);
        let mut virtio =
            VirtioDevices::new(ram.guest(), &table, slots, routes, pci.seats(), &events);
        let console_terminal = add_virtio(
            &mut virtio,
            &mut pci,
            definition,
            (memory.0.discards(), ram.ballooned(&memory.0)),
            &quit,
        )?;
        if let Some(pluggable) = ram.pluggable(&memory.0) {
            let requested = config.memory.hotplugged_size.unwrap_or(0);
            let node = acpi.numa.as_ref().map_or(0, |numa| numa.pluggable);
            let node = u16::try_from(node).unwrap_or(u16::MAX);
            virtio.add_memory(pluggable, requested, node, &mut pci)?;
        } else if config.memory.refuse_acpi().is_err() {
            log::info!(
                "the guest keeps the RAM that it starts with: none comes by ACPI yet (memory.hotplug_method Acpi), and \
                 by VirtioMem it does"
            );
        }
        let watchdog = add_board_devices(config, &mut pci)?;
        if let Some(tpm) = &tpm {
            let (at, registers) = (layout::TPM_START, tpm.registers());
            buses.mmio.insert("TPM", at, tpm::SIZE, registers)?;
        }
        if let Some(opened) = opened {
            passthrough.attach_first(opened, &mut pci)?;
        }
        add_empty_ports(&mut pci, config, &router, &events)?;
        // The host can want back an assigned device of any VM.
        if can_be_asked || pci.seats().count(Owner::Assigned) > 0 {
            let slots = open_slots(&pci, &buses, &router, &events)?;
            for (root, slots) in acpi.roots.iter_mut().zip(slots) {
                root.slots = slots;
            }
        }
        let processors = ProcessorCount::new(&config.cpus, &buses, &router, &events)?;
        let boot = match source {
            Source::Kernel(source) => Boot::Kernel(Box::new(KernelBoot {
                source,
                acpi,
                smbios: smbios_tables(config),
            })),
            Source::Firmware(source) => {
                let around = Surroundings {
                    config,
                    plan: &plan,
                    model: &model,
                    ram: &ram,
                    regions: &memory.0,
                    buses: &buses,
                    pci: &pci,
                    virtio: &virtio,
                    windows: &windows,
                    processors: processors.registers(),
                    acpi,
                };
                Boot::Firmware(FirmwareBoard::new(source, &around)?)
            }
        };
        report.reached(Stage::Devices);
        early.check()?;

        let mut vcpus = Vcpus::new(
            &vm,
            &model,
            config.cpus.grouped(),
            config.cpus.boot,
            &buses,
            &events.sink(),
        )?;
        let places = config.cpus.affinity.iter().cloned();
        let places =
            places.map(|place| (u8::try_from(place.vcpu).unwrap_or(u8::MAX), place.host_cpus));
        vcpus.place(places)?;
        let machine = Self {
            vcpus,
            processors,
            pausing: Arc::default(),
            passthrough,
            virtio,
            pci,
            board,
            watchdog,
            tpm,
            serial_terminal,
            console_terminal,
            definition: definition.clone(),
            _memory: memory,
            ram,
            events,
            quit,
            boot,
            vm,
        };
        machine.load()?;
        if let Boot::Kernel(_) = machine.boot {
            // Addresses are assigned by now, so that what devices reach at them can be known.
            machine.passthrough.survey(&machine.pci)?;
        }
        Ok(machine)
    }

    /// Does what firmware does, and puts the boot processor at the kernel's entry; or leaves all that to
    /// firmware, with which the processor begins at power-on. No vCPU may run.
    pub(super) fn load(&self) -> Result<(), RunError> {
        use vm_memory::GuestAddressSpace;

        let KernelBoot {
            source,
            acpi,
            smbios,
        } = match &self.boot {
            Boot::Kernel(boot) => &**boot,
            Boot::Firmware(board) => {
                board.power_on(&self.board);
                return Ok(());
            }
        };
        self.pci.assign()?;
        let ram = self.ram.guest().memory();
        let mut acpi = acpi.clone();
        processors_now(&mut acpi, self.processors.registers());
        let rsdp = acpi::install(&*ram, &acpi)?;
        if let Some(tables) = smbios {
            boot::tell_identity(&*ram, tables)?;
        }
        let others = acpi.roots.iter().skip(1).map(|root| root.ecam.clone());
        let map = E820::new(&self.ram.guest_ranges()).reserving(others);
        let entry = boot::load(&*ram, source, &map, rsdp)?;
        self.vcpus.enter(|sregs| entry.apply(sregs))?;
        Ok(())
    }

    /// What the machine is made of: what it began with, what has come since, and not what has gone.
    pub(super) fn config(&self) -> VmConfig {
        let mut config = self.definition.config.clone();
        config.disk.clear();
        config.net.clear();
        config.fs.clear();
        config.pmem.clear();
        config.generic.clear();
        config.vsock = None;
        for device in self.virtio.configs() {
            match device {
                VirtioConfig::Disk(disk) => config.disk.push(disk),
                VirtioConfig::Net(net) => config.net.push(net),
                VirtioConfig::Fs(fs) => config.fs.push(fs),
                VirtioConfig::Pmem(pmem) => config.pmem.push(pmem),
                VirtioConfig::Generic(generic) => config.generic.push(generic),
                VirtioConfig::Vsock(vsock) => config.vsock = Some(vsock),
            }
        }
        config.device = self.passthrough.attached.configs();
        self.processors.show(&mut config.cpus);
        if let Some(memory) = self.virtio.memory() {
            let requested = memory.totals().requested;
            let said = config.memory.hotplugged_size.is_some() || requested > 0;
            config.memory.hotplugged_size = said.then_some(requested);
        }
        if let (Some(balloon), Some(target)) = (&mut config.balloon, self.virtio.balloon()) {
            balloon.size = target.bytes();
        }
        config
    }

    /// The same, with the descriptors that were handed over for it.
    pub(super) fn definition(&self) -> Definition {
        Definition {
            files: self.virtio.files(),
            ..self.config().into()
        }
    }

    /// Says in the report what the run has cost so far.
    pub(super) fn account(&self, report: &Report) {
        self.passthrough.account(report);
        report.set_devices(self.pci.assigned());
        for kind in ExitKind::ALL {
            report.set_exits(kind.name(), self.vcpus.exits(kind));
        }
    }
}

fn open_source(config: &VmConfig) -> Result<Source, RunError> {
    if config.firmware.is_none() {
        return Ok(Source::Kernel(open_kernel(config)?));
    }
    let kernel = config.kernel.as_ref().map(|_| open_kernel(config));
    let source = FirmwareSource::open(config, kernel.transpose()?)?;
    Ok(Source::Firmware(source))
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

fn cpu_features(config: &VmConfig) -> CpuFeatures {
    CpuFeatures {
        nested: config.cpus.nested,
        pmu: config.cpus.pmu,
        dedicated: config.cpus.dedicated,
    }
}

/// Where RAM and windows lie, with room for what may be plugged in later.
fn plan(
    config: &VmConfig,
    found: &Found,
    model: &CpuModel,
    room: PluggedRoom,
) -> Result<AddressPlan, RunError> {
    let platform = &config.platform;
    let mut planned = found.planned(platform.reserve());
    for segment in 0..platform.segments() {
        let slots = 0..platform.hotplug_slots(segment);
        planned.extend(slots.map(|_| PlannedFunction::empty_slot(platform.reserve(), segment)));
    }
    let bits = model.address_bits();
    Ok(AddressPlan::new(
        &config.memory_to_plan(),
        &planned,
        found.reserved(),
        bits,
        config.firmware.is_some(),
        room,
        platform.segments(),
    )?)
}

/// RAM, and the devices once they are open: the kernel resets each device that is opened, and memory is
/// populated meanwhile. What came of opening is told last, so that memory's error comes before it.
fn take(
    config: &VmConfig,
    plan: &AddressPlan,
    open: impl FnOnce() -> Result<Option<Opened>, RunError> + Send,
    report: &Report,
    early: &Early,
) -> Result<(Ram, Result<Option<Opened>, RunError>), RunError> {
    let has_devices = !config.device.is_empty();
    let prefault = config.memory.prefault.unwrap_or(has_devices);
    let said = config
        .memory_zone
        .iter()
        .any(|zone| zone.prefault == Some(true));
    let memory = MemoryConfig {
        shared: config.shares_memory(),
        ..config.memory.clone()
    };
    let mut ram = Ram::around(
        &memory,
        &config.memory_zone,
        prefault || has_devices || said,
        plan.mmio32_start,
        &plan.reserved,
    )?;
    let balloon = config.balloon.as_ref();
    if let Some(block) = balloon.and_then(|balloon| balloon.block_size(config.memory.size)) {
        ram.split(block);
    }
    let failed = AtomicBool::new(false);
    let (populated, opened) = thread::scope(|scope| {
        let opening = scope.spawn(|| open().inspect_err(|_| failed.store(true, Ordering::Relaxed)));
        let populated = match ram.to_prefault(prefault) {
            0 => Ok(()),
            total => populate(&ram, prefault, total, report, early, &failed),
        };
        report.reached(Stage::Memory);
        let opened = opening.join().unwrap_or_else(|panic| resume_unwind(panic));
        (populated, opened)
    });
    populated?;
    Ok((ram, opened))
}

/// Touches all of RAM that is to be touched, which is `total` bytes, unless the machine is not wanted any more, or somebody else has failed and it is for nothing.
fn populate(
    ram: &Ram,
    unsaid: bool,
    total: u64,
    report: &Report,
    early: &Early,
    failed: &AtomicBool,
) -> Result<(), RunError> {
    let mut wanted = Ok(());
    report.pinning(0, total);
    ram.prefault(unsaid, |done| {
        report.pinning(done, total);
        wanted = early.check();
        if wanted.is_err() || failed.load(Ordering::Relaxed) {
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    wanted
}

/// What a kernel without firmware reads in SMBIOS: nothing, unless it was said which machine it is.
fn smbios_tables(config: &VmConfig) -> Option<smbios::Tables> {
    let identity = Identity::of(&config.platform);
    let board = smbios::Board {
        cpus: config.cpus.boot.into(),
        memory: config.memory.size,
        identity,
    };
    (!board.identity.is_empty()).then(|| smbios::tables(&board, FirmwareTable::Ours))
}

fn acpi_hardware(config: &VmConfig, segments: &[SegmentAddresses]) -> acpi::Hardware {
    let topology = config.cpus.grouped();
    acpi::Hardware {
        cpus: (0..config.cpus.most())
            .map(|id| acpi::Cpu {
                apic_id: topology.apic_id(id),
                enabled: id < config.cpus.boot,
            })
            .collect(),
        cpu_hotplug: config.cpus.comes_and_goes(),
        roots: (0..)
            .zip(segments)
            .map(|(segment, addresses)| acpi::Root {
                segment,
                node: config.numa_node_of_segment(segment),
                last_bus: last_bus(config, segment),
                io: addresses.windows.io.clone(),
                mmio32: addresses.windows.memory32.clone(),
                mmio64: addresses.windows.memory64.clone(),
                slots: 0,
                ecam: addresses.ecam.clone(),
            })
            .collect(),
        pluggable: None,
        numa: None,
        serial: config.serial != ConsoleConfig::Off,
        tpm: config.tpm.is_some(),
        native_hotplug: !config.device.is_empty() || config.platform.has_hotplug_slots(),
    }
}

/// What the tables tell of the guest's nodes, where it has some.
fn numa(config: &VmConfig, ram: &Ram) -> Option<acpi::Numa> {
    if config.numa.is_empty() {
        return None;
    }
    let node_of = |zone: usize| {
        let zone = config.memory_zone.get(zone);
        let zone = zone.map_or(DEFAULT_ZONE, |zone| &zone.id);
        config.numa_node_of_zone(zone).unwrap_or(0)
    };
    let stretches = ram.zone_ranges();
    let ram: Vec<_> = stretches
        .map(|(zone, range)| (node_of(zone), range))
        .collect();
    let cpus = 0..config.cpus.most();
    Some(acpi::Numa {
        cpus: cpus
            .map(|cpu| config.numa_node_of_cpu(cpu.into()).unwrap_or(0))
            .collect(),
        // It lies behind the last stretch, and is of the same memory of the host's.
        pluggable: ram.last().map_or(0, |(node, _)| *node),
        ram,
        distances: config.numa_distances(),
    })
}

/// Keeps all threads of this process from processors that are vCPUs' alone, and from none where none are.
fn keep_away(cpus: &CpusConfig) {
    if !cpus.dedicated {
        if let Err(error) = keep_from_none() {
            log::warn!("Busway's threads stay away from the processors of a VM before: {error}");
        }
        return;
    }
    let taken = cpus.affinity.iter();
    let taken: Vec<_> = taken.flat_map(|place| place.host_cpus.clone()).collect();
    match keep_from(&taken) {
        Ok(true) => {}
        Ok(false) => log::warn!(
            "--cpus dedicated=on: the vCPUs have all processors that this process may use, so that its other threads run \
             on them too"
        ),
        Err(error) => {
            log::warn!("--cpus dedicated=on: Busway's other threads are not kept away: {error}")
        }
    }
}

/// Has the tables say which processors are there now.
pub(super) fn processors_now(acpi: &mut acpi::Hardware, registers: &CpuHotplug) {
    let present = registers.processors().present;
    for (id, cpu) in (0..=u8::MAX).zip(&mut acpi.cpus) {
        cpu.enabled = present.has(id);
    }
}

/// The virtio devices: disks, NICs, console, entropy source and balloon. Gives the pseudo-terminal that the console is at.
fn add_virtio(
    virtio: &mut VirtioDevices,
    pci: &mut Pci,
    definition: &Definition,
    (discards, ballooned): (&Arc<Discards>, Option<Ballooned>),
    quit: &EventFd,
) -> Result<Option<PathBuf>, RunError> {
    let Definition {
        config,
        files,
        terminals,
        ..
    } = definition;
    virtio.add_first(config, files, pci)?;
    let mut at = None;
    if let Some(endpoint) =
        open_console(CONSOLE, &config.console, terminals.console.as_ref(), quit)?
    {
        at = terminal(&config.console, Some(&endpoint));
        virtio.add_fixed(Box::new(Console::new("console", endpoint)), pci)?;
    }
    virtio.add_fixed(Box::new(Rng::new("rng", &config.rng)?), pci)?;
    if let Some(balloon) = &config.balloon {
        virtio.add_balloon(balloon, discards, ballooned, pci)?;
    }
    Ok(at)
}

/// The devices of the board that are on PCI and not virtio's. Gives the watchdog.
pub(super) fn add_board_devices(
    config: &VmConfig,
    pci: &mut Pci,
) -> Result<Option<Arc<Watchdog>>, RunError> {
    if config.pvpanic {
        let pvpanic = Pvpanic::new().map_err(std::io::Error::other);
        let pvpanic = pvpanic.map_err(RunError::system("a BAR of pvpanic's"))?;
        pci.add_board(Arc::new(pvpanic))?;
    }
    if !config.watchdog {
        return Ok(None);
    }
    let watchdog = Arc::new(Watchdog::new().map_err(RunError::system("timerfd_create"))?);
    pci.add_board(watchdog.clone())?;
    Ok(Some(watchdog))
}

/// Keeps glibc from giving each thread a heap of its own: what the threads here allocate is little,
/// and each heap has pages that are only ever touched once. Call it before any thread is started.
pub fn few_arenas() {
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
