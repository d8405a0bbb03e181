//! What an emulated host is made of.

use std::fs;
use std::time::Duration;

use crate::zoo::Device;

/// The kernel that the emulated host runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    /// Debian's own, as it is: VFIO by group and type1 container, no iommufd.
    Stock,
    /// The same with the VFIO of its own source that Debian leaves out: also by cdev, with iommufd.
    Iommufd,
    /// That of Debian's backports, likewise with iommufd: what only it can is mapping a device's memory for others by
    /// dma-buf.
    Backports,
    /// Debian's stable one as the lab builds it, with core scheduling, which no kernel of Debian's has: few drivers, no VFIO and
    /// no module. It is made when it is first asked for.
    CoreScheduling,
}

/// The IOMMU that the emulated host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Iommu {
    /// Intel VT-d with interrupt remapping.
    Intel,
    /// AMD-Vi with interrupt and DMA remapping.
    Amd,
    /// None: what a host without one says.
    None,
}

impl Iommu {
    pub(crate) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Intel => &["-device", "intel-iommu,intremap=on,caching-mode=on"],
            Self::Amd => &["-device", "amd-iommu,intremap=on,dma-remap=on"],
            Self::None => &[],
        }
    }
}

/// An emulated host: what [`Host::boot`](crate::Host::boot) boots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostConfig {
    pub(crate) kernel: Kernel,
    pub(crate) iommu: Iommu,
    pub(crate) cpus: u32,
    pub(crate) threads: u32,
    pub(crate) memory_mib: u64,
    pub(crate) cmdline: String,
    pub(crate) devices: Vec<Device>,
    pub(crate) native_hot_plug: bool,
    pub(crate) systemd: bool,
    pub(crate) numa_nodes: u32,
}

impl HostConfig {
    /// Two processors, an Intel IOMMU, no device yet, and 6 GiB: memory for a guest of 4 GiB. Hosts that differ only in
    /// their devices share a saved state.
    pub fn new(kernel: Kernel) -> Self {
        Self {
            kernel,
            iommu: Iommu::Intel,
            cpus: 2,
            threads: 1,
            memory_mib: 6144,
            cmdline: String::new(),
            devices: Vec::new(),
            native_hot_plug: false,
            systemd: false,
            numa_nodes: 0,
        }
    }

    /// Takes another IOMMU.
    pub fn iommu(mut self, iommu: Iommu) -> Self {
        self.iommu = iommu;
        self
    }

    /// Takes another number of processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Has each core run so many of its processors as threads (SMT), which are as many as that or a multiple.
    pub fn threads(mut self, threads: u32) -> Self {
        self.threads = threads;
        self
    }

    /// Takes another memory size.
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Appends words to the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = words.to_owned();
        self
    }

    /// Leaves hot-plug to the kernel's `pciehp`, which sees for itself what happens to a slot, where else the
    /// firmware tells it.
    pub fn native_hot_plug(mut self) -> Self {
        self.native_hot_plug = true;
        self
    }

    /// Has it boot by systemd, as the host that a package is installed on does. What it writes is there after
    /// [`Host::reboot`](crate::Host::reboot), and no file is copied over its root.
    pub fn systemd(mut self) -> Self {
        self.systemd = true;
        self
    }

    /// Splits its processors and its memory evenly into so many NUMA nodes, each with a PCI root bus of its own, where
    /// [`Device::on_node`] has one device.
    pub fn numa_nodes(mut self, nodes: u32) -> Self {
        self.numa_nodes = nodes;
        self
    }

    /// Whether QEMU can save its state: that of AMD's IOMMU it cannot, and one that is to boot is none. Nothing is plugged
    /// later where a node has a bus of its own.
    pub(crate) fn can_be_saved(&self) -> bool {
        self.iommu != Iommu::Amd && !self.systemd && self.numa_nodes == 0
    }

    /// Adds a device.
    pub fn device(mut self, device: Device) -> Self {
        self.devices.push(device);
        self
    }
}

/// What runs the emulated host's processors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Accelerator {
    /// This machine's KVM, nested: full speed.
    Kvm,
    /// QEMU's emulation, anywhere.
    Tcg,
}

impl Accelerator {
    /// KVM where this machine's can nest, as far as it says; `BUSWAY_LAB_ACCEL=tcg` or `kvm`
    /// overrules.
    pub(crate) fn detect() -> Self {
        match std::env::var("BUSWAY_LAB_ACCEL").as_deref() {
            Ok("kvm") => return Self::Kvm,
            Ok("tcg") => return Self::Tcg,
            _ => {}
        }
        let says = |path: &str, wanted: &[&str]| {
            fs::read_to_string(path).is_ok_and(|text| {
                text.split_ascii_whitespace()
                    .any(|word| wanted.contains(&word))
            })
        };
        let nests = ["kvm_intel", "kvm_amd"].iter().any(|module| {
            says(
                &format!("/sys/module/{module}/parameters/nested"),
                &["Y", "y", "1"],
            )
        });
        let opens = fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
        match says("/proc/cpuinfo", &["vmx", "svm"]) && nests && opens {
            true => Self::Kvm,
            false => Self::Tcg,
        }
    }

    /// How long a boot may take, on a machine that is slow and busy with other things.
    pub(crate) fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Self::Kvm => 120,
            Self::Tcg => 600,
        })
    }

    pub(crate) fn arguments(self) -> &'static [&'static str] {
        match self {
            Self::Kvm => &["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => &["-accel", "tcg,thread=multi", "-cpu", "EPYC-v1,+svm,+npt"],
        }
    }
}
