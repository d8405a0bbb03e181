//! The body of `vm.create`: a VM in Cloud Hypervisor's words (its OpenAPI description, `VmConfig`), as the
//! configuration that the command line makes too.
//!
//! Absent and null are the same: what Cloud Hypervisor does then. Words that it does not know are ignored, as clients
//! expect; what it knows and Busway cannot do is refused (`lacking`), but for what clients say of every VM and no
//! guest sees before it is resized: that is kept, and shown.

mod parts;

use serde::Deserialize;

use super::beside::{Beside, needs_id};
use super::device::AddDevice;
use super::generic::AddGeneric;
use super::lacking::{Asked, Fault, Lack};
use super::numa::{AddNode, AddZone};
use super::pmem::AddPmem;
use super::virtio::{AddDisk, AddFs, AddNet, AddVsock};
use crate::config::{
    Accepted, Choice, ConsoleConfig, CoreScheduling, CpusConfig, HotplugMethod, LandlockRule,
    MemoryConfig, MemoryZoneConfig, Placing, Topology, VcpuAffinity, VirtioConfig, VmConfig,
};
use crate::machine::{self, Files, Handed};
use parts::{Balloon, Console, ConsoleMode, OldArgs, OldPath, Payload, Platform, Rng, Tpm};

/// `VmConfig`
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct CreateVm {
    cpus: Option<Cpus>,
    memory: Option<Memory>,
    payload: Option<Payload>,
    /// Three that stand here in the place of `payload`, as older clients have them.
    kernel: Option<OldPath>,
    initramfs: Option<OldPath>,
    cmdline: Option<OldArgs>,
    disks: Option<Vec<AddDisk>>,
    net: Option<Vec<AddNet>>,
    fs: Option<Vec<AddFs>>,
    rng: Option<Rng>,
    serial: Option<Console>,
    console: Option<Console>,
    devices: Option<Vec<AddDevice>>,
    platform: Option<Platform>,
    debug_console: Option<Console>,
    balloon: Option<Balloon>,
    #[serde(alias = "generic-vhost-user")]
    generic_vhost_user: Option<Vec<AddGeneric>>,
    iommu: Asked,
    landlock_enable: Option<bool>,
    landlock_rules: Option<Vec<LandlockRule>>,
    numa: Option<Vec<AddNode>>,
    pci_segments: Asked,
    /// Beside Cloud Hypervisor's: RAM and vCPUs are placed by where the devices are.
    place: Option<Placing>,
    pmem: Option<Vec<AddPmem>>,
    pvpanic: Option<bool>,
    rate_limit_groups: Asked,
    tpm: Option<Tpm>,
    user_devices: Asked,
    vdpa: Asked,
    vsock: Option<AddVsock>,
    watchdog: Option<bool>,
}

/// `CpusConfig`
#[derive(Debug, Deserialize)]
struct Cpus {
    boot_vcpus: Option<u8>,
    max_vcpus: Option<u8>,
    topology: Option<Topology>,
    max_phys_bits: Option<u8>,
    nested: Option<bool>,
    #[serde(default)]
    kvm_hyperv: Asked,
    affinity: Option<Vec<VcpuAffinity>>,
    /// Beside Cloud Hypervisor's: those processors are the vCPUs' alone.
    dedicated: Option<bool>,
    #[serde(default)]
    features: Asked,
    core_scheduling: Option<CoreScheduling>,
}

/// `MemoryConfig`
#[derive(Debug, Deserialize)]
struct Memory {
    size: Option<u64>,
    shared: Option<bool>,
    hugepages: Option<bool>,
    hugepage_size: Option<u64>,
    prefault: Option<bool>,
    thp: Option<bool>,
    hotplug_size: Option<u64>,
    hotplug_method: Option<HotplugMethod>,
    hotplugged_size: Option<u64>,
    #[serde(default)]
    mergeable: Asked,
    zones: Option<Vec<AddZone>>,
}

impl CreateVm {
    /// The same as the configuration of a VM, with those of `files` that are for it.
    ///
    /// # Errors
    /// The first thing that is wrong, or that Busway cannot do
    pub(super) fn into_config(self, files: &Files) -> Result<(VmConfig, Handed), Fault> {
        self.check()?;
        let (mut beside, mut handed) = (Beside::new(files), Handed::default());
        let mut accepted = Accepted::default();
        let mut config = VmConfig {
            // What Cloud Hypervisor does where nothing is said.
            serial: ConsoleConfig::Null,
            console: ConsoleConfig::Tty,
            ..VmConfig::default()
        };
        let old = [
            self.kernel.map(|kernel| kernel.path),
            self.initramfs.map(|initramfs| initramfs.path),
            self.cmdline.map(|cmdline| cmdline.args),
        ];
        self.payload.unwrap_or_default().apply(old, &mut config)?;
        if let Some(cpus) = self.cpus {
            config.cpus = cpus.into_config(&mut accepted)?;
        }
        if let Some(memory) = self.memory {
            (config.memory, config.memory_zone) = memory.into_config()?;
            config.sum_zones();
        }
        let nodes = self.numa.unwrap_or_default().into_iter();
        config.numa = nodes.map(AddNode::into_config).collect::<Result<_, _>>()?;
        config.place = self.place.unwrap_or_default();
        config.watchdog = self.watchdog.unwrap_or(false);
        config.pvpanic = self.pvpanic.unwrap_or(false);
        config.balloon = self.balloon.map(Balloon::into_config);
        config.tpm = self.tpm.map(Tpm::into_config).transpose()?;
        if let Some(rng) = self.rng {
            Lack::VirtualIommu.unless_asked(rng.iommu)?;
            if let Some(src) = rng.src {
                config.rng.src = src;
            }
        }
        if let Some(serial) = self.serial {
            config.serial = serial.into_config("serial")?;
        }
        if let Some(console) = self.console {
            config.console = console.into_config("console")?;
        }
        for disk in self.disks.unwrap_or_default() {
            let place: Vec<_> = disk.fd_index.into_iter().collect();
            let files = beside.take(&place, "disks.fd_index")?;
            let disk = disk.into_config(&files)?;
            if !files.is_empty() {
                let id = needs_id(disk.id(), "disks.fd_index")?;
                handed.virtio.insert(id, files);
            }
            if let VirtioConfig::Disk(disk) = disk {
                config.disk.push(disk);
            }
        }
        for net in self.net.unwrap_or_default() {
            let places = net.fd_indexes.clone().unwrap_or_default();
            let files = beside.take(&places, "net.fd_indexes")?;
            let net = net.into_config(&files)?;
            if !files.is_empty() {
                let id = needs_id(net.id(), "net.fd_indexes")?;
                handed.virtio.insert(id, files);
            }
            if let VirtioConfig::Net(net) = net {
                config.net.push(net);
            }
        }
        for fs in self.fs.unwrap_or_default() {
            if let VirtioConfig::Fs(fs) = fs.into_config(&Files::default())? {
                config.fs.push(fs);
            }
        }
        for pmem in self.pmem.unwrap_or_default() {
            if let VirtioConfig::Pmem(pmem) = pmem.into_config(&Files::default())? {
                config.pmem.push(pmem);
            }
        }
        for generic in self.generic_vhost_user.unwrap_or_default() {
            if let VirtioConfig::Generic(generic) = generic.into_config(&Files::default())? {
                config.generic.push(generic);
            }
        }
        if let Some(vsock) = self.vsock
            && let VirtioConfig::Vsock(vsock) = vsock.into_config(&Files::default())?
        {
            config.vsock = Some(vsock);
        }
        for device in self.devices.unwrap_or_default() {
            let place: Vec<_> = device.fd_index.into_iter().collect();
            let files = beside.take(&place, "devices.fd_index")?;
            let devices = device.into_configs(&files)?;
            if let Some(device) = devices.first().filter(|_| !files.is_empty()) {
                handed.devices.insert(device.id(), files);
            }
            config.device.extend(devices);
        }
        if let Some(platform) = self.platform {
            let place: Vec<_> = platform.iommufd_fd_index.into_iter().collect();
            handed.iommufd = beside.take(&place, "platform.iommufd_fd_index")?;
            if !handed.iommufd.is_empty() {
                machine::check_iommufd(&handed.iommufd).map_err(|error| error.to_string())?;
            }
            config.platform = platform.into_config()?;
        }
        // As Cloud Hypervisor: which files clients add later is not known, and they are not used to naming them.
        config.landlock = match self.landlock_enable {
            Some(true) => Choice::On,
            Some(false) | None => Choice::Off,
        };
        config.landlock_rules = self.landlock_rules.unwrap_or_default();
        beside.finish()?;
        // Clients look for devices where Cloud Hypervisor has them.
        config.platform.root_ports.get_or_insert(false);
        config.accepted = Some(Box::new(accepted)).filter(|all| **all != Accepted::default());
        Ok((config, handed))
    }

    fn check(&self) -> Result<(), Fault> {
        for (asked, lack) in [
            (self.iommu, Lack::VirtualIommu),
            (self.pci_segments, Lack::SegmentApertures),
            (self.rate_limit_groups, Lack::SharedLimit),
            (self.user_devices, Lack::UserDevices),
            (self.vdpa, Lack::Vdpa),
        ] {
            lack.unless_asked(asked)?;
        }
        let debug = self.debug_console.as_ref();
        Lack::DebugConsole.unless_asked(debug.is_some_and(|one| one.mode != ConsoleMode::Off))
    }
}

impl Cpus {
    fn into_config(self, accepted: &mut Accepted) -> Result<CpusConfig, Fault> {
        Lack::HyperV.unless_asked(self.kvm_hyperv)?;
        Lack::Amx.unless_asked(self.features)?;
        let mut cpus = CpusConfig::default();
        cpus.boot = self.boot_vcpus.unwrap_or(cpus.boot);
        cpus.nested = self.nested.unwrap_or(cpus.nested);
        if let Some(max) = self.max_vcpus {
            if max < cpus.boot {
                return Err(Fault::Wrong(format!(
                    "cpus: max_vcpus={max} is less than boot_vcpus={}",
                    cpus.boot
                )));
            }
            cpus.max = Some(max);
        }
        if let Some(topology) = self.topology {
            let checked = topology.check(cpus.most());
            checked.map_err(|why| format!("cpus: topology: {why}"))?;
            cpus.topology = Some(topology);
        }
        cpus.affinity = self.affinity.unwrap_or_default();
        cpus.dedicated = self.dedicated.unwrap_or(false);
        // `Vm` is what clients send that mean nothing by it: Cloud Hypervisor's default.
        let asked = self.core_scheduling;
        cpus.core_scheduling = asked.filter(|one| *one != CoreScheduling::Vm);
        accepted.max_phys_bits = self.max_phys_bits;
        Ok(cpus)
    }
}

impl Memory {
    fn into_config(self) -> Result<(MemoryConfig, Vec<MemoryZoneConfig>), Fault> {
        Lack::MergedPages.unless_asked(self.mergeable)?;
        let zones = self.zones.unwrap_or_default().into_iter();
        let zones: Vec<_> = zones.map(AddZone::into_config).collect::<Result<_, _>>()?;
        let mut memory = MemoryConfig::default();
        // Zones say it where nobody else does.
        let unsaid = if zones.is_empty() { memory.size } else { 0 };
        memory.size = self.size.unwrap_or(unsaid);
        memory.shared = self.shared.unwrap_or(memory.shared);
        memory.hugepages = self.hugepages.unwrap_or(memory.hugepages);
        memory.hugepage_size = self.hugepage_size;
        memory.thp = self.thp.unwrap_or(memory.thp);
        // Clients write out the default, which is not to have it done; devices need it all the same.
        memory.prefault = self.prefault.filter(|prefault| *prefault);
        memory.hotplug_size = self.hotplug_size;
        memory.hotplug_method = self.hotplug_method.unwrap_or_default();
        memory.hotplugged_size = self.hotplugged_size;
        Ok((memory, zones))
    }
}

#[cfg(test)]
mod tests;
