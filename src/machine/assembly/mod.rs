//! A machine out of a configuration, in steps: it is begun, takes what it needs from the host, is laid out, and is fitted
//! with devices.

mod begun;
mod fitted;
mod ground;
mod taken;
mod told;

use std::path::PathBuf;
use std::sync::Arc;

use busway_vfio::EventFd;

use super::RunError;
use super::address_plan::{AddressPlan, PluggedRoom};
use super::aside::Aside;
use super::definition::Definition;
use super::early::Early;
use super::events::Events;
use super::firmware::{FirmwareBoard, Surroundings};
use super::memory_devices::MemoryDevices;
use super::passthrough::{Found, OpenDevices, Passthrough};
use super::pci::Pci;
use super::resize::ProcessorCount;
use super::virtio::VirtioDevices;
use crate::acpi;
use crate::arch::CpuModel;
use crate::arch::board::Board;
use crate::arch::boot::{self, BootSource, E820};
use crate::arch::layout;
use crate::config::{CoreScheduling, CpusConfig, VirtioConfig, VmConfig};
use crate::devices::tpm::Tpm;
use crate::devices::watchdog::Watchdog;
use crate::kvm::{Buses, Cores, ExitKind, IrqRouter, Vcpus, Vm, keep_from, keep_from_none};
use crate::memory::Ram;
use crate::report::{Report, Stage};
use crate::smbios;

pub(super) use begun::Begun;
pub use begun::few_arenas;
use begun::{Source, cpu_features};
use fitted::Fitted;
#[cfg(any(test, feature = "hostile"))]
pub(super) use fitted::add_board_devices;
use ground::Ground;
use taken::{MemoryMap, Taken, plan};
pub(super) use told::processors_now;
use told::smbios_tables;

/// A machine. The fields go in the order in which they stand: who uses something before what is used.
#[derive(Debug)]
pub(in crate::machine) struct Machine {
    pub(in crate::machine) vcpus: Vcpus,
    pub(in crate::machine) processors: ProcessorCount,
    /// Where RAM comes by ACPI.
    pub(in crate::machine) memory_devices: Option<MemoryDevices>,
    /// A pause of the virtio devices that is under way, which is waited for.
    pub(in crate::machine) pausing: Arc<Aside>,
    // Waits for the devices that are being released, whose functions the topology has no more.
    pub(in crate::machine) passthrough: Passthrough,
    pub(in crate::machine) virtio: VirtioDevices,
    pub(in crate::machine) pci: Pci,
    pub(in crate::machine) board: Board,
    pub(in crate::machine) watchdog: Option<Arc<Watchdog>>,
    pub(in crate::machine) tpm: Option<Tpm>,
    /// The pseudo-terminals that the serial port and the console are at.
    pub(in crate::machine) serial_terminal: Option<PathBuf>,
    pub(in crate::machine) console_terminal: Option<PathBuf>,
    /// What it was made of.
    definition: Arc<Definition>,
    _memory: MemoryMap,
    pub(in crate::machine) ram: Ram,
    pub(in crate::machine) events: Arc<Events>,
    pub(in crate::machine) quit: EventFd,
    boot: Boot,
    pub(in crate::machine) vm: Vm,
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

/// What every step of an assembly works with.
#[derive(Debug)]
struct Steps<'a> {
    definition: &'a Arc<Definition>,
    config: &'a VmConfig,
    report: &'a Report,
    early: &'a Early,
    plan: AddressPlan,
    model: CpuModel,
    buses: Buses,
    router: IrqRouter,
    events: Arc<Events>,
    quit: EventFd,
    /// Devices can be asked for while the guest runs.
    can_be_asked: bool,
    /// By what is in effect of what `--cpus core_scheduling=` says.
    cores: Cores,
    vm: Vm,
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
        let cores = keep_apart(&config.cpus)?;
        let model = CpuModel::new(&vm, cpu_features(config))?;
        let router = vm.irq_router()?;
        let found = Found::find(definition, options)?;
        let room = PluggedRoom::of(config, can_be_asked, model.address_bits());
        let steps = Steps {
            definition,
            config,
            report,
            early,
            plan: plan(config, &found, &model, room)?,
            model,
            buses: Buses::default(),
            router,
            events: Events::new().map_err(RunError::system("eventfd"))?,
            quit: EventFd::new().map_err(RunError::system("eventfd"))?,
            can_be_asked,
            cores,
            vm,
        };
        steps.plan.pluggable(&config.memory_to_plan())?;
        let tpm = config.tpm.as_ref();
        let tpm = tpm.map(|tpm| Tpm::open(&tpm.socket, layout::TPM_START));
        let tpm = tpm.transpose()?;

        let mut taken = Taken::take(&steps, found, devices)?;
        let mut ground = Ground::lay_out(&steps, &taken, source.is_bios())?;
        let fitted = Fitted::fit(&steps, &mut taken, &mut ground, tpm.as_ref())?;
        steps.complete(source, taken, ground, fitted, tpm)
    }

    /// Does what firmware does, and puts the boot processor at the kernel's entry; or leaves all that to
    /// firmware, with which the processor begins at power-on. No vCPU may run.
    pub(in crate::machine) fn load(&self) -> Result<(), RunError> {
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
    pub(in crate::machine) fn config(&self) -> VmConfig {
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
        for memory in self.virtio.memory() {
            let mut zones = config.memory_zone.iter_mut();
            let plugged = match &memory.zone {
                None => Some(&mut config.memory.hotplugged_size),
                Some(id) => zones
                    .find(|zone| zone.id == *id)
                    .map(|zone| &mut zone.hotplugged_size),
            };
            if let Some(plugged) = plugged {
                let requested = memory.target.totals().requested;
                let said = plugged.is_some() || requested > 0;
                *plugged = said.then_some(requested);
            }
        }
        if let Some(devices) = &self.memory_devices {
            let plugged = devices.plugged();
            config.memory.hotplugged_size = (plugged > 0).then_some(plugged);
        }
        if let (Some(balloon), Some(target)) = (&mut config.balloon, self.virtio.balloon()) {
            balloon.size = target.bytes();
        }
        config
    }

    /// What it was put together from.
    pub(in crate::machine) fn started_as(&self) -> &VmConfig {
        &self.definition.config
    }

    /// What it is made of, with the descriptors that were handed over for it.
    pub(in crate::machine) fn definition(&self) -> Definition {
        Definition {
            files: self.virtio.files(),
            ..self.config().into()
        }
    }

    /// Says in the report what the run has cost so far.
    pub(in crate::machine) fn account(&self, report: &Report) {
        self.passthrough.account(report);
        report.set_devices(self.pci.assigned());
        for kind in ExitKind::ALL {
            report.set_exits(kind.name(), self.vcpus.exits(kind));
        }
    }
}

impl Steps<'_> {
    /// The last step: processors, and what a start needs.
    fn complete(
        self,
        source: Source,
        taken: Taken,
        ground: Ground,
        fitted: Fitted,
        tpm: Option<Tpm>,
    ) -> Result<Machine, RunError> {
        let cpus = &self.config.cpus;
        let processors = ProcessorCount::new(cpus, &self.buses, &self.router, &self.events)?;
        let boot = self.boot(source, &taken, &ground, &fitted, &processors)?;
        self.report.reached(Stage::Devices);
        self.early.check()?;
        let machine = Machine {
            vcpus: self.vcpus()?,
            processors,
            memory_devices: fitted.memory_devices,
            pausing: Arc::default(),
            passthrough: taken.passthrough,
            virtio: fitted.virtio,
            pci: ground.pci,
            board: ground.board,
            watchdog: fitted.watchdog,
            tpm,
            serial_terminal: ground.serial_terminal,
            console_terminal: fitted.console_terminal,
            definition: self.definition.clone(),
            _memory: taken.memory,
            ram: taken.ram,
            events: self.events,
            quit: self.quit,
            boot,
            vm: self.vm,
        };
        machine.load()?;
        if let Boot::Kernel(_) = machine.boot {
            // Addresses are assigned by now, so that what devices reach at them can be known.
            machine.passthrough.survey(&machine.pci)?;
        }
        Ok(machine)
    }

    fn boot(
        &self,
        source: Source,
        taken: &Taken,
        ground: &Ground,
        fitted: &Fitted,
        processors: &ProcessorCount,
    ) -> Result<Boot, RunError> {
        let acpi = ground.acpi.clone();
        let source = match source {
            Source::Firmware(source) => source,
            Source::Kernel(source) => {
                return Ok(Boot::Kernel(Box::new(KernelBoot {
                    source,
                    acpi,
                    smbios: smbios_tables(self.config),
                })));
            }
        };
        let around = Surroundings {
            config: self.config,
            plan: &self.plan,
            model: &self.model,
            ram: &taken.ram,
            regions: &taken.memory.0,
            buses: &self.buses,
            pci: &ground.pci,
            virtio: &fitted.virtio,
            windows: &ground.windows,
            processors: processors.registers(),
            acpi,
        };
        Ok(Boot::Firmware(FirmwareBoard::new(source, &around)?))
    }

    /// The processors that the guest begins with, each on those of the host's that were said.
    fn vcpus(&self) -> Result<Vcpus, RunError> {
        let cpus = &self.config.cpus;
        let mut vcpus = Vcpus::new(
            &self.vm,
            &self.model,
            cpus.grouped(),
            cpus.boot,
            &self.buses,
            &self.events.sink(),
            self.cores.clone(),
        )?;
        let places = cpus.affinity.iter().cloned();
        vcpus.place(places.map(|place| {
            let vcpu = u8::try_from(place.vcpu).unwrap_or(u8::MAX);
            (vcpu, place.host_cpus)
        }))?;
        Ok(vcpus)
    }
}

/// Keeps the calling thread, and those that it starts for the VM, apart from all others of the host's, where
/// `--cpus core_scheduling=` wants that, or does not say and the host can.
fn keep_apart(cpus: &CpusConfig) -> Result<Cores, RunError> {
    let wanted = cpus.core_scheduling.unwrap_or(CoreScheduling::Vm);
    let failed = |source| RunError::CoreScheduling {
        word: wanted.word(),
        source,
    };
    Cores::keep_apart(wanted).or_else(|error| match cpus.core_scheduling {
        Some(_) => Err(failed(error)),
        None => {
            log::debug!("the host has no core scheduling: {error}");
            Cores::keep_apart(CoreScheduling::Off).map_err(failed)
        }
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
