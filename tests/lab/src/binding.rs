//! Binding by hand, through sysfs: for QEMU as the VMM, and to check Busway's own binding against.

use anyhow::{Context, Result};

use crate::host::Host;

impl Host {
    /// Gives a device, by its address, to `vfio-pci`, with nothing but sysfs.
    pub fn bind_by_hand(&self, address: &str) -> Result<()> {
        self.rebind(address, "vfio-pci")?;
        let driver = self.driver(address)?;
        anyhow::ensure!(
            driver.as_deref() == Some("vfio-pci"),
            "{address} went to {driver:?}"
        );
        Ok(())
    }

    /// Gives a device back to whichever driver the host has for it.
    pub fn unbind_by_hand(&self, address: &str) -> Result<()> {
        self.rebind(address, "")
    }

    fn rebind(&self, address: &str, driver: &str) -> Result<()> {
        let script = format!(
            "set -e; device=/sys/bus/pci/devices/{address}\n\
             echo '{driver}' >$device/driver_override\n\
             if [ -e $device/driver ]; then echo {address} >$device/driver/unbind; fi\n\
             echo {address} >/sys/bus/pci/drivers_probe\n"
        );
        self.run(&script)
            .map(drop)
            .with_context(|| format!("cannot rebind {address}"))
    }

    /// The driver that a device has.
    pub fn driver(&self, address: &str) -> Result<Option<String>> {
        let link = format!("readlink /sys/bus/pci/devices/{address}/driver || true");
        let path = self.run(&link)?;
        Ok(path
            .trim()
            .rsplit('/')
            .next()
            .filter(|name| !name.is_empty())
            .map(str::to_owned))
    }
}
