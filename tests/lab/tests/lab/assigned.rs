//! What the trials with assigned devices share: one host for all, and the two ways into VFIO.

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestRun, Host, HostConfig, Kernel, Lab, Vmm, build_lab_io};

/// The host that most trials share: it has both of VFIO's interfaces.
pub(crate) fn zoo() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .device(Device::nvme("nv0", 64))
        .device(Device::e1000e("nic0"))
        .device(Device::igb("nic1"))
}

/// Which of the kernel's interfaces a device is opened by.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Interface {
    /// The IOMMU group and the type1 container.
    Group,
    /// The device's own node, and iommufd.
    Cdev,
}

impl Interface {
    /// What tells Busway so.
    pub(crate) fn arguments(self) -> [&'static str; 2] {
        match self {
            Self::Group => ["--platform", "iommufd=off"],
            Self::Cdev => ["--platform", "iommufd=on"],
        }
    }
}

/// A guest of Busway's that has `lab-io`.
pub(crate) fn guest() -> Result<GuestRun> {
    Ok(GuestRun::new(Vmm::Busway).file("bin/lab-io", &build_lab_io()?))
}

/// The shared host, and the address there of one of its devices, which VFIO has by now.
pub(crate) fn bound<'lab>(lab: &'lab mut Lab, id: &str) -> Result<(&'lab Host, String)> {
    let host = lab.host(&zoo())?;
    let address = host.address(id)?;
    host.run(&format!("busway device bind {address}"))?;
    ensure!(
        host.driver(&address)?.as_deref() == Some("vfio-pci"),
        "bind left it elsewhere"
    );
    Ok((host, address))
}

/// Gives a device back to its own driver by `busway device unbind`, and waits for that driver.
pub(crate) fn give_back(host: &Host, address: &str, driver: &str) -> Result<()> {
    host.run(&format!("busway device unbind {address}"))?;
    let found = host.driver(address)?;
    ensure!(
        found.as_deref() == Some(driver),
        "{address} went to {found:?}, not {driver}"
    );
    Ok(())
}

/// The value of `key=` in a line of such words, as `lab-io` prints.
pub(crate) fn word<'a>(line: &'a str, key: &str) -> Result<&'a str> {
    line.split_ascii_whitespace()
        .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
        .with_context(|| format!("no {key}= in: {line}"))
}
