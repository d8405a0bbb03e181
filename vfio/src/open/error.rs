//! Why a device could not be opened.

use std::io;
use std::path::PathBuf;

use busway_iommu::{Obstacle, OpenError, PCI_API};

use crate::HostName;

/// A device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// the path names neither a PCI device nor a mediated one
    #[error(
        "{path} is neither a PCI device nor a mediated one: give its address (0000:01:00.0), its UUID, or \
         its folder in /sys/bus/pci/devices or /sys/bus/mdev/devices"
    )]
    NotPci {
        /// What was given.
        path: PathBuf,
    },
    /// there is no such device
    #[error(
        "there is no {} {name} on this host: `busway device list` shows those there are",
        name.kind()
    )]
    NotThere {
        /// The device.
        name: HostName,
    },
    /// the device is with another driver
    #[error("{name} is bound to {driver}, not to vfio-pci: `busway device bind {name}`")]
    WrongDriver {
        /// The device.
        name: HostName,
        /// Its driver.
        driver: String,
    },
    /// the device has no driver
    #[error("{name} is bound to no driver, and needs vfio-pci: `busway device bind {name}`")]
    NoDriver {
        /// The device.
        name: HostName,
    },
    /// the mediated device has no driver
    #[error(
        "{name} is bound to no driver, and what makes mediated devices brings theirs: `dmesg` may say \
         why that did not take it; remove it and make it anew"
    )]
    NotLent {
        /// The device.
        name: HostName,
    },
    /// the mediated device is none for a PCI bus
    #[error(
        "{name} is a mediated device of the kind {api}, and a guest of Busway's can be given those of \
         the kind {PCI_API} only"
    )]
    WrongApi {
        /// The device.
        name: HostName,
        /// What it looks like to who opens it.
        api: String,
    },
    /// the mediated device's driver did not open it in time
    #[error(
        "{name} was not opened in time by the driver that made it: NVIDIA's waits for its manager, which \
         looks for `-uuid UUID` on the command line of the process, as QEMU has it, and finds it in \
         --cmdline as well; `journalctl -u nvidia-vgpu-mgr` may say more"
    )]
    TimedOut {
        /// The device.
        name: HostName,
    },
    /// the kernel makes no groups for mediated devices
    #[error(
        "{name} has no VFIO group (the host's kernel was built without CONFIG_VFIO_GROUP): use \
         `--platform iommufd=on`"
    )]
    NoVfioGroup {
        /// The device.
        name: HostName,
    },
    /// the device is in no IOMMU group
    #[error("{name} cannot be isolated: {obstacle}")]
    NoGroup {
        /// The device.
        name: HostName,
        /// Why.
        obstacle: Obstacle,
    },
    /// the VM has it already
    #[error("{name} is given to this VM twice")]
    Twice {
        /// The device.
        name: HostName,
    },
    /// {name}: {source}
    #[error("{name}: {source}")]
    Open {
        /// The device.
        name: HostName,
        /// Why.
        source: OpenError,
    },
    /// somebody else uses the device
    #[error("{name} is in use by {holder}: end that first")]
    Busy {
        /// The device.
        name: HostName,
        /// The process, as well as it can be told.
        holder: String,
    },
    /// the kernel says only that it cannot be bound
    #[error(
        "{name} cannot be bound to an iommufd (invalid argument): it is in use through another \
         descriptor (`fuser -v {path}` as root names whose), or the host cannot switch it on, or its \
         IOMMU is not coherent with the processors' caches; `dmesg` may say more, and `--platform \
         iommufd=off` needs no such IOMMU"
    )]
    NotBound {
        /// The device.
        name: HostName,
        /// The node that it would be open through.
        path: PathBuf,
    },
    /// the device is shared between a PF and its VFs, and the token is missing
    #[error(
        "{name} needs a VF token, as VFIO has both the physical function and its virtual \
         functions: say the one that they were opened with, `--device {name},vf_token=UUID`, or \
         bind the physical function to its own driver"
    )]
    NoVfToken {
        /// The device.
        name: HostName,
    },
    /// the token is another one
    #[error(
        "{name} has another VF token than the one given: it is the one that its physical \
         function was opened with, first and while no virtual function was in use"
    )]
    WrongVfToken {
        /// The device.
        name: HostName,
    },
    /// the token is for nothing
    #[error(
        "{name} takes no VF token: it is neither a physical function, nor a virtual function \
         whose physical function is with VFIO; leave vf_token= out"
    )]
    UnusedVfToken {
        /// The device.
        name: HostName,
    },
    /// {what} failed for {name}: {source}
    #[error("{what} failed for {name}: {source}")]
    Kernel {
        /// The device.
        name: HostName,
        /// The call.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}
