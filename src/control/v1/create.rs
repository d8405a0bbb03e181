//! The body of `vm.create`: a VM in Cloud Hypervisor's words (its OpenAPI description, `VmConfig`), as the
//! configuration that the command line makes too.
//!
//! Absent and null are the same: what Cloud Hypervisor does then. Words that it does not know are ignored, as clients
//! expect; what it knows and Busway cannot do is refused (`lacking`), but for what clients say of every VM and no
//! guest sees before it is resized: that is kept, and shown.

use std::path::PathBuf;

use serde::Deserialize;

use super::beside::{Beside, needs_id};
use super::device::AddDevice;
use super::generic::AddGeneric;
use super::lacking::{Asked, Fault, Lack};
use super::numa::{AddNode, AddZone};
use super::pmem::AddPmem;
use super::some_text;
use super::virtio::{AddDisk, AddFs, AddNet, AddVsock};
use crate::config::{
    Accepted, BalloonConfig, BesideDevices, Choice, ConsoleConfig, CoreScheduling, CpusConfig,
    FirmwareConfig, HotplugMethod, LandlockRule, MemoryConfig, MemoryZoneConfig, Placing,
    PlatformConfig, Topology, TpmConfig, VcpuAffinity, VirtioConfig, VmConfig,
};
use crate::machine::{self, Files, Handed};

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

/// `PayloadConfig`
#[derive(Debug, Default, Deserialize)]
struct Payload {
    firmware: Option<String>,
    kernel: Option<String>,
    initramfs: Option<String>,
    cmdline: Option<String>,
    #[serde(default)]
    igvm: Asked,
    #[serde(default)]
    host_data: Asked,
    #[serde(default)]
    mrconfigid: Asked,
}

#[derive(Debug, Deserialize)]
struct OldPath {
    path: String,
}

#[derive(Debug, Deserialize)]
struct OldArgs {
    args: String,
}

/// `BalloonConfig`
#[derive(Debug, Deserialize)]
struct Balloon {
    size: u64,
    #[serde(default)]
    deflate_on_oom: bool,
    #[serde(default)]
    free_page_reporting: bool,
    /// Beside Cloud Hypervisor's: what becomes of it beside assigned devices.
    #[serde(default)]
    vfio: BesideDevices,
    /// Beside Cloud Hypervisor's: bytes of a block that goes back then.
    block: Option<u64>,
}

impl Balloon {
    fn into_config(self) -> BalloonConfig {
        BalloonConfig {
            size: self.size,
            deflate_on_oom: self.deflate_on_oom,
            free_page_reporting: self.free_page_reporting,
            vfio: self.vfio,
            block: self.block,
        }
    }
}

/// `TpmConfig`
#[derive(Debug, Deserialize)]
struct Tpm {
    socket: Option<String>,
}

impl Tpm {
    fn into_config(self) -> Result<TpmConfig, Fault> {
        let socket = some_text(self.socket);
        let socket = socket.ok_or("tpm: socket is missing, at which swtpm listens")?;
        Ok(TpmConfig {
            socket: socket.into(),
        })
    }
}

/// `RngConfig`
#[derive(Debug, Deserialize)]
struct Rng {
    src: Option<PathBuf>,
    #[serde(default)]
    iommu: Asked,
}

/// `ConsoleConfig`
#[derive(Debug, Deserialize)]
struct Console {
    mode: ConsoleMode,
    file: Option<PathBuf>,
    socket: Option<PathBuf>,
    #[serde(default)]
    iommu: Asked,
}

/// `ConsoleConfig.mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
enum ConsoleMode {
    Off,
    Pty,
    Tty,
    File,
    Socket,
    Null,
}

/// `PlatformConfig`
#[derive(Debug, Deserialize)]
struct Platform {
    num_pci_segments: Option<u16>,
    /// Beside Cloud Hypervisor's: empty slots of each segment but the first.
    segment_hotplug_slots: Option<u8>,
    iommufd: Option<bool>,
    /// Beside Cloud Hypervisor's: which of the descriptors that came is an iommufd.
    iommufd_fd_index: Option<usize>,
    vfio_p2p_dma: Option<bool>,
    /// Beside Cloud Hypervisor's: devices are behind root ports, or on bus 0, where it has them.
    root_ports: Option<bool>,
    #[serde(alias = "system_serial_number")]
    serial_number: Option<String>,
    #[serde(alias = "system_uuid")]
    uuid: Option<String>,
    oem_strings: Option<Vec<String>>,
    #[serde(default)]
    iommu_segments: Asked,
    #[serde(default)]
    tdx: Asked,
    #[serde(default)]
    sev_snp: Asked,
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

impl Payload {
    fn apply(self, old: [Option<String>; 3], config: &mut VmConfig) -> Result<(), Fault> {
        Lack::ConfidentialGuests.unless_asked(self.igvm)?;
        Lack::ConfidentialGuests.unless_asked(self.host_data)?;
        Lack::ConfidentialGuests.unless_asked(self.mrconfigid)?;
        let [kernel, initramfs, cmdline] = old;
        let either = |new: Option<String>, old| some_text(new).or_else(|| some_text(old));
        config.kernel = either(self.kernel, kernel).map(PathBuf::from);
        config.initramfs = either(self.initramfs, initramfs).map(PathBuf::from);
        config.cmdline = self.cmdline.or(cmdline);
        config.firmware = some_text(self.firmware).map(|path| FirmwareConfig {
            path: Some(path.into()),
            vars: None,
        });
        Ok(())
    }
}

impl Console {
    fn into_config(self, name: &str) -> Result<ConsoleConfig, Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu)?;
        let missing = |key: &str| format!("{name}: {key} is missing, which says where");
        Ok(match self.mode {
            ConsoleMode::Off => ConsoleConfig::Off,
            ConsoleMode::Null => ConsoleConfig::Null,
            ConsoleMode::Tty => ConsoleConfig::Tty,
            ConsoleMode::Pty => ConsoleConfig::Pty,
            ConsoleMode::File => ConsoleConfig::file(self.file.ok_or_else(|| missing("file"))?),
            ConsoleMode::Socket => {
                ConsoleConfig::Socket(self.socket.ok_or_else(|| missing("socket"))?)
            }
        })
    }
}

impl Platform {
    fn into_config(self) -> Result<PlatformConfig, Fault> {
        Lack::VirtualIommu.unless_asked(self.iommu_segments)?;
        Lack::ConfidentialGuests.unless_asked(self.tdx)?;
        Lack::ConfidentialGuests.unless_asked(self.sev_snp)?;
        let choice = |said, on, off| match said {
            None => Choice::Auto,
            Some(true) => on,
            Some(false) => off,
        };
        Ok(PlatformConfig {
            iommufd: choice(self.iommufd, Choice::On, Choice::Off),
            // On is what Cloud Hypervisor does where it can.
            p2p: choice(self.vfio_p2p_dma, Choice::Auto, Choice::Off),
            num_pci_segments: self.num_pci_segments,
            segment_hotplug_slots: self.segment_hotplug_slots,
            root_ports: self.root_ports,
            serial_number: self.serial_number,
            uuid: self.uuid,
            oem_strings: self.oem_strings.unwrap_or_default(),
            ..PlatformConfig::default()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::json::parse;

    fn config(body: &str) -> Result<VmConfig, Fault> {
        with_files(body, &Files::default()).map(|(config, _)| config)
    }

    fn with_files(body: &str, files: &Files) -> Result<(VmConfig, Handed), Fault> {
        parse::<CreateVm>(body.as_bytes())?.into_config(files)
    }

    /// What Cloud Hypervisor has where nothing is said.
    fn defaults() -> VmConfig {
        VmConfig {
            serial: ConsoleConfig::Null,
            console: ConsoleConfig::Tty,
            landlock: Choice::Off,
            platform: PlatformConfig {
                root_ports: Some(false),
                ..PlatformConfig::default()
            },
            ..VmConfig::default()
        }
    }

    #[test]
    fn devices_are_on_bus_0_unless_the_body_says_otherwise() {
        let on_bus_0 = |body: &str| {
            let config = config(body).unwrap();
            let devices = config.device.iter();
            let on = devices.map(|device| config.platform.has_on_root_bus(device));
            on.collect::<Vec<_>>()
        };
        let devices = r#""devices":[{"path":"01:00.0"},{"path":"02:00.0","root_port":true},{"path":"03:00.0","root_port":false}]"#;
        for (platform, expected) in [
            ("null", [true, false, true]),
            (r#"{"num_pci_segments":2}"#, [true, false, true]),
            (r#"{"root_ports":true}"#, [false, false, true]),
        ] {
            let body = format!(r#"{{{devices},"platform":{platform}}}"#);
            assert_eq!(on_bus_0(&body), expected, "{platform}");
        }
    }

    #[test]
    fn what_is_absent_null_or_unknown_is_as_cloud_hypervisor_has_it() {
        for body in [
            "{}",
            r#"{"cpus":null,"memory":null,"payload":null,"disks":null,"net":null,"rng":null,"serial":null,
                "console":null,"devices":null,"platform":null,"fs":null,"vsock":null,"balloon":null,"numa":null,"tpm":null,
                "watchdog":false,"iommu":false,"pvpanic":false,"landlock_enable":false,"sgx_epc":null}"#,
            r#"{"cpus":{"boot_vcpus":null,"features":{"amx":false},"kvm_hyperv":false,"affinity":null},
                "memory":{"mergeable":false,"prefault":false,"zones":[],"hotplugged_size":null},
                "payload":{"firmware":null,"kernel":"","initramfs":null,"mrconfigid":null,"host_data":null},
                "disks":[],"fs":[],"rng":{"src":null,"iommu":false},"debug_console":{"mode":"Off"},
                "platform":{"tdx":false,"sev_snp":false,"nonsense":[1,2]},"nonsense":{"a":{}}}"#,
        ] {
            assert_eq!(config(body), Ok(defaults()), "{body}");
        }
    }

    #[test]
    fn a_balloon_a_watchdog_pvpanic_and_a_tpm_are_there_where_they_are_asked_for() {
        let body = r#"{"balloon":{"size":4096,"free_page_reporting":true,"vfio":"remap","block":4194304,"nonsense":1},
            "watchdog":true,"pvpanic":true,"tpm":{"socket":"/run/swtpm"}}"#;
        let expected = VmConfig {
            balloon: Some(BalloonConfig {
                size: 4096,
                deflate_on_oom: false,
                free_page_reporting: true,
                vfio: BesideDevices::Remap,
                block: Some(4 << 20),
            }),
            watchdog: true,
            pvpanic: true,
            tpm: Some(TpmConfig {
                socket: "/run/swtpm".into(),
            }),
            ..defaults()
        };
        assert_eq!(config(body), Ok(expected));
        assert!(config(r#"{"balloon":{}}"#).is_err(), "its size is missing");
        let nowhere = config(r#"{"tpm":{"socket":""}}"#);
        assert!(nowhere.is_err_and(|why| why.to_string().contains("socket is missing")));
    }

    #[test]
    fn a_vm_in_cloud_hypervisors_words_is_the_same_as_in_flags() {
        let body = r#"{"cpus":{"boot_vcpus":2,"max_vcpus":4,"nested":false,"max_phys_bits":46,
            "topology":{"threads_per_core":1,"cores_per_die":4,"dies_per_package":1,"packages":1}},
            "memory":{"size":1073741824,"shared":true,"hugepages":true,"hugepage_size":2097152,"prefault":true,
            "thp":false,"hotplug_size":1073741824,"hotplug_method":"VirtioMem"},
            "payload":{"kernel":"/k","initramfs":"/i","cmdline":"quiet"},"disks":[{"path":"/a","id":"root"}],
            "net":[{"tap":"t","mac":"52:54:00:12:34:56"}],"rng":{"src":"/dev/random"},
            "serial":{"mode":"Socket","socket":"/s"},"console":{"mode":"File","file":"/f"},
            "devices":[{"path":"/sys/bus/pci/devices/0000:01:00.0/","id":"drive"}],
            "platform":{"num_pci_segments":2,"iommufd":true,"vfio_p2p_dma":false,
            "uuid":"3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611","serial_number":"s",
            "oem_strings":["o"]}}"#;
        let mut expected = defaults();
        expected.cpus.boot = 2;
        expected.cpus.max = Some(4);
        expected.cpus.nested = false;
        expected.cpus.topology = Some(Topology::cores(4));
        expected.memory = MemoryConfig {
            size: 1 << 30,
            shared: true,
            hugepages: true,
            hugepage_size: Some(2 << 20),
            prefault: Some(true),
            thp: false,
            ..MemoryConfig::default()
        };
        expected.kernel = Some("/k".into());
        expected.initramfs = Some("/i".into());
        expected.cmdline = Some("quiet".into());
        let mut disk = crate::config::DiskConfig::new("/a");
        disk.id = Some("root".into());
        expected.disk = vec![disk];
        expected.net = vec![crate::config::NetConfig {
            tap: Some("t".into()),
            mac: Some("52:54:00:12:34:56".parse().unwrap()),
            ..crate::config::NetConfig::default()
        }];
        expected.rng.src = "/dev/random".into();
        expected.serial = ConsoleConfig::Socket("/s".into());
        expected.console = ConsoleConfig::file("/f");
        let mut device = crate::config::DeviceConfig::new("01:00.0").unwrap();
        device.id = Some("drive".into());
        expected.device = vec![device];
        expected.platform.iommufd = Choice::On;
        expected.platform.p2p = Choice::Off;
        expected.platform.uuid = Some("3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611".into());
        expected.platform.serial_number = Some("s".into());
        expected.platform.oem_strings = vec!["o".into()];
        expected.memory.hotplug_size = Some(1 << 30);
        expected.memory.hotplug_method = HotplugMethod::VirtioMem;
        expected.accepted = Some(Box::new(Accepted {
            max_phys_bits: Some(46),
        }));
        expected.platform.num_pci_segments = Some(2);
        assert_eq!(config(body), Ok(expected));
        // As older clients have it.
        let old =
            r#"{"kernel":{"path":"/k"},"initramfs":{"path":"/i"},"cmdline":{"args":"quiet"}}"#;
        let new = r#"{"payload":{"kernel":"/k","initramfs":"/i","cmdline":"quiet"}}"#;
        assert_eq!(config(old), config(new));
        assert_eq!(config(old).unwrap().kernel, Some("/k".into()));
    }

    #[test]
    fn each_descriptor_that_comes_is_for_what_the_body_says_and_none_is_for_nothing() {
        let pipe = || std::io::pipe().unwrap().0.into();
        let files = Files::from(vec![pipe(), pipe(), pipe()]);
        let body = r#"{"disks":[{"id":"d","fd_index":1},{"path":"/a"}],
            "net":[{"id":"n","fd_indexes":[2,0],"num_queues":4,"fds":[27,28]}]}"#;
        let (config, handed) = with_files(body, &files).unwrap();
        let counts: Vec<_> = handed
            .virtio
            .iter()
            .map(|(id, files)| (&**id, files.all().len()))
            .collect();
        assert_eq!(counts, [("d", 1), ("n", 2)]);
        assert!(config.disk[0].path.to_str().unwrap().starts_with("pipe:["));
        for (body, word) in [
            ("{}", "descriptor 0 that came"),
            (
                r#"{"disks":[{"id":"d","fd_index":0}],"net":[{"id":"n","fd_indexes":[1]}]}"#,
                "descriptor 2 that came",
            ),
            (
                r#"{"disks":[{"id":"d","fd_index":3}]}"#,
                "3 descriptors came",
            ),
            (r#"{"disks":[{"id":"d","fd_index":-1}]}"#, "-1"),
            (
                r#"{"disks":[{"id":"d","fd_index":0},{"id":"e","fd_index":0}]}"#,
                "something else already",
            ),
            (
                r#"{"net":[{"id":"d","fd_indexes":[0,0],"num_queues":4}]}"#,
                "something else already",
            ),
            (r#"{"disks":[{"fd_index":0}]}"#, "needs an id"),
            (
                r#"{"disks":[{"id":"d","path":"/a","fd_index":0}]}"#,
                "leave one out",
            ),
            (r#"{"net":[{"fd_indexes":[0]}]}"#, "needs an id"),
            (
                r#"{"devices":[{"id":"v","fd_index":0}]}"#,
                "not a VFIO device's",
            ),
            (
                r#"{"devices":[{"fd_index":0,"functions":[{"path":"01:00.1"}]}]}"#,
                "one function",
            ),
            (r#"{"platform":{"iommufd_fd_index":0}}"#, "not an iommufd"),
            (r#"{"devices":[{"fd":7}]}"#, "SCM_RIGHTS"),
        ] {
            let Err(Fault::Wrong(why)) = with_files(body, &files) else {
                panic!("{body}: {:?}", with_files(body, &files));
            };
            assert!(why.contains(word), "{body}: {why}");
        }
    }

    #[test]
    fn what_busway_cannot_do_is_named_and_what_contradicts_itself_is_wrong() {
        for (body, lack) in [
            (r#"{"iommu":true}"#, Lack::VirtualIommu),
            (r#"{"memory":{"mergeable":true}}"#, Lack::MergedPages),
            (r#"{"cpus":{"kvm_hyperv":true}}"#, Lack::HyperV),
            (r#"{"platform":{"tdx":true}}"#, Lack::ConfidentialGuests),
            (r#"{"payload":{"igvm":"/i"}}"#, Lack::ConfidentialGuests),
            (r#"{"debug_console":{"mode":"Tty"}}"#, Lack::DebugConsole),
            (
                r#"{"serial":{"mode":"Off","iommu":true}}"#,
                Lack::VirtualIommu,
            ),
            (
                r#"{"net":[{"host_mac":"52:54:00:12:34:56"}]}"#,
                Lack::TapAddress,
            ),
        ] {
            assert_eq!(config(body), Err(Fault::Lacks(lack)), "{body}");
        }
        for (body, word) in [
            ("", "body"),
            ("[]", "body"),
            (r#"{"cpus":{"boot_vcpus":256}}"#, "256"),
            (r#"{"cpus":{"boot_vcpus":2,"max_vcpus":1}}"#, "max_vcpus=1"),
            (
                r#"{"cpus":{"boot_vcpus":4,"topology":{"threads_per_core":65535,"cores_per_die":65535,
                    "dies_per_package":65535,"packages":65535}}}"#,
                "topology",
            ),
            (r#"{"memory":{"size":-1}}"#, "-1"),
            (r#"{"serial":{"mode":"Nonsense"}}"#, "Nonsense"),
            (r#"{"serial":{"mode":"File"}}"#, "file is missing"),
            (r#"{"console":{"mode":"Socket"}}"#, "socket is missing"),
            (r#"{"platform":{"num_pci_segments":65536}}"#, "65536"),
            (r#"{"devices":[{"path":"nonsense"}]}"#, "nonsense"),
            (r#"{"disks":[{}]}"#, "path is missing"),
            (r#"{"fs":[{"tag":"t"}]}"#, "socket is missing"),
            (r#"{"pmem":[{}]}"#, "file is missing"),
            (
                r#"{"generic_vhost_user":[{"socket":"/s"}]}"#,
                "device_type is missing",
            ),
        ] {
            let Err(Fault::Wrong(why)) = config(body) else {
                panic!("{body}: {:?}", config(body));
            };
            assert!(why.contains(word), "{body}: {why}");
        }
    }
}
