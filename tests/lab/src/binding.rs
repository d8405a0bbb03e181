//! Devices by hand, through sysfs: binding for QEMU as the VMM, and to check Busway's own binding
//! against; and a NIC's virtual functions.

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

    /// Brings a NIC up and waits for its link, without which an `igb`'s virtual functions have nobody to answer them.
    /// Returns the interface's name.
    pub fn link_up(&self, id: &str) -> Result<String> {
        let address = self.address(id)?;
        let script = format!(
            "set -e; device=/sys/bus/pci/devices/{address}\n\
             nic=$(ls $device/net)\n\
             coproc ip monitor link dev $nic\n\
             ip link set $nic up\n\
             until [ \"$(cat $device/net/$nic/carrier)\" = 1 ]; do\n\
                 read -r -t 1 <&${{COPROC[0]}} || true\n\
             done\n\
             kill $COPROC_PID; echo $nic\n"
        );
        let name = self
            .run(&script)
            .with_context(|| format!("waiting for the link of {id}"))?;
        Ok(name.trim().to_owned())
    }

    /// Has an `igb` make virtual functions, each with an Ethernet address of its own. Returns their addresses.
    pub fn virtual_functions(&self, id: &str, count: u32) -> Result<Vec<String>> {
        let address = self.address(id)?;
        let nic = self.link_up(id)?;
        let script = format!(
            "set -e; device=/sys/bus/pci/devices/{address}\n\
             echo {count} >$device/sriov_numvfs\n\
             for number in $(seq 0 {last}); do\n\
                 ip link set {nic} vf $number mac 02:00:00:00:01:0$number\n\
                 basename $(readlink $device/virtfn$number)\n\
             done\n\
             udevadm settle\n",
            last = count - 1,
        );
        let addresses = self
            .run(&script)
            .with_context(|| format!("making {id}'s functions"))?;
        Ok(addresses.lines().map(str::to_owned).collect())
    }
}
