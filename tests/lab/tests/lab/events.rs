//! What happens to a device while a guest has it: the host wants it back, or lets it go itself.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use busway_lab::{Device, GuestKernel, Host, HostConfig, Kernel, Lab};
use serde_json::json;

use crate::assigned::{Interface, bound, guest};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "unbinding_devices_in_use_asks_the_guest_and_gives_them_back_group",
        |lab| asked_back(lab, Interface::Group, GuestKernel::Stock),
    ),
    Proof::new(
        "unbinding_devices_in_use_asks_the_guest_and_gives_them_back_cdev",
        |lab| asked_back(lab, Interface::Cdev, GuestKernel::StockElf),
    ),
    Proof::new(
        "unbinding_returns_in_time_from_a_guest_that_does_not_answer",
        unanswered,
    ),
    Proof::new(
        "a_drive_that_leaves_the_host_during_io_is_an_error_in_the_guest_and_released",
        |lab| left(lab, Leaving::Asked),
    ),
    Proof::new(
        "a_drive_pulled_out_of_its_slot_leaves_the_guest_and_is_released",
        |lab| left(lab, Leaving::Unasked),
    ),
];

/// How a drive leaves the host.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// The host's slot asks for it, as `device_del` has it.
    Asked,
    /// It is gone before anybody knows.
    Unasked,
}

/// Reads from the drive until that fails.
const READ_TO_THE_END: &str =
    "while dd if=/dev/nvme0n1 of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; do :; done\n";

/// Waits until the driver has taken leave of its drive, which tells nobody.
const WAIT_FOR_THE_END: &str = "while [ -e /sys/class/nvme/nvme0 ]; do sleep 1; done\n";

/// Unbinds a device in use, for which the kernel waits until VFIO's user closes the device, and sees that the
/// host's own driver has it.
fn take_back(host: &Host, address: &str, driver: &str) -> Result<()> {
    let start = Instant::now();
    host.run(&format!("busway device unbind --allow-open {address}"))?;
    tell!(
        "{driver}: unbound from the guest after {:?}",
        start.elapsed()
    );
    let found = host.driver(address)?;
    ensure!(
        found.as_deref() == Some(driver),
        "{address} went to {found:?}, not {driver}"
    );
    Ok(())
}

/// The guest is asked for its NIC, and then for its drive, the last device of its DMA space.
fn asked_back(lab: &mut Lab, interface: Interface, kernel: GuestKernel) -> Result<()> {
    let (host, nic) = bound(lab, "nic0")?;
    let drive = host.address("nv0")?;
    host.run(&format!("busway device bind {drive}"))?;
    let run = guest()?
        .kernel(kernel)
        .device(&drive)
        .device(&nic)
        .args(&interface.arguments())
        .script(&format!(
            "lab-io write /dev/nvme0n1 5\n\
             ip link set eth0 up\n\
             value ready yes\n\
             {READ_TO_THE_END}{WAIT_FOR_THE_END}\
             value drive \"$(ls /sys/class/nvme | wc -l)\"\n\
             value nic \"$(ls /sys/class/net | grep -c eth || true)\"\n\
             dmesg | grep -i 'slot(' | block slots\n"
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    for (address, driver) in [(&nic, "e1000e"), (&drive, "nvme")] {
        take_back(host, address, driver)?;
    }
    let result = running.finish()?.success()?;
    ensure!(
        (result.value("drive")?, result.value("nic")?) == ("0", "0"),
        "the guest still has a device: {:?}",
        result.transcript.values
    );
    let slots = result.block("slots")?;
    ensure!(
        slots.matches("Button press").count() == 2,
        "the guest was not asked for both:\n{slots}"
    );
    ensure!(
        result.stderr.matches("the guest released it").count() == 2,
        "Busway says:\n{}",
        result.stderr
    );
    let verified =
        host.run("udevadm wait --timeout=120 /dev/nvme0n1 && lab-io verify /dev/nvme0n1 5")?;
    tell!("the host reads what the guest wrote: {verified}");
    Ok(())
}

/// A guest that has panicked attends to nothing any more.
fn unanswered(lab: &mut Lab) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(30);
    let (host, drive) = bound(lab, "nv0")?;
    let run = guest()?
        .device(&drive)
        .cmdline("panic=0")
        .dies()
        .script("echo c >/proc/sysrq-trigger\n");
    let running = host.start_guest(&run)?;
    running.wait_line("Kernel panic")?;
    let start = Instant::now();
    take_back(host, &drive, "nvme")?;
    let took = start.elapsed();
    // Whoever is slow is the emulator, and it is slow by seconds.
    ensure!((LIMIT..3 * LIMIT).contains(&took), "it took {took:?}");
    running.signal("KILL")?;
    let result = running.finish()?;
    ensure!(
        result.stderr.contains("did not release it within 30 s"),
        "Busway says:\n{}",
        result.stderr
    );
    Ok(())
}

fn left(lab: &mut Lab, leaving: Leaving) -> Result<()> {
    let config = HostConfig::new(Kernel::Iommufd).device(Device::nvme("nv0", 64));
    let (config, reading) = match leaving {
        Leaving::Asked => (config, READ_TO_THE_END),
        // QEMU's drive would tear up QEMU's heap if it went with reads under way.
        Leaving::Unasked => (config.native_hot_plug(), ""),
    };
    let host = lab.host(&config)?;
    let drive = host.address("nv0")?;
    host.run(&format!("busway device bind {drive}"))?;
    let run = guest()?
        .kernel(GuestKernel::StockElf)
        .device(&drive)
        .script(&format!(
            "value ready \"$(cat /sys/class/nvme/nvme0/serial)\"\n\
             {reading}{WAIT_FOR_THE_END}\
             value drives \"$(ls /sys/class/nvme | wc -l)\"\n",
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let start = Instant::now();
    match leaving {
        Leaving::Asked => {
            host.qmp().execute("device_del", json!({ "id": "nv0" }))?;
            host.qmp()
                .wait_event("DEVICE_DELETED", Duration::from_secs(120))?;
            tell!("the drive left after {:?}", start.elapsed());
        }
        // Slot control: with power and its indicator off QEMU takes the drive out. The host hears of it when the
        // slot has power again, for of one without it Linux holds that it was emptied. PCIe 6.0 §7.5.3.10
        Leaving::Unasked => {
            host.run(&format!(
                "port=$(basename \"$(dirname \"$(readlink -f /sys/bus/pci/devices/{drive})\")\")\n\
                 setpci -s \"$port\" CAP_EXP+18.w=0700:0720\n\
                 setpci -s \"$port\" CAP_EXP+18.w=0120:0720"
            ))?;
        }
    }
    let result = running.finish()?.success()?;
    ensure!(result.value("drives")? == "0", "the drive is left");
    let words = match leaving {
        Leaving::Asked => "the guest released it",
        Leaving::Unasked => "is gone from the host",
    };
    ensure!(result.stderr.contains(words), "it says: {}", result.stderr);
    ensure!(
        !host.console().contains("Call Trace"),
        "the host complains:\n{}",
        host.console()
    );
    let there = host.run("ls /sys/bus/pci/drivers/vfio-pci")?;
    ensure!(!there.contains(&drive), "VFIO still has {there}");
    // The next trial wants its drive.
    lab.stop();
    Ok(())
}
