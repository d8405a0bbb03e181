//! What happens to a device while a guest has it: errors, the host wanting it back, and its leaving
//! the host without asking anybody.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use busway_lab::{Device, GuestKernel, GuestRun, Host, HostConfig, Kernel, Lab};
use serde_json::json;

use crate::Proof;
use crate::assigned::{Interface, bound, give_back, guest};

pub(crate) const PROOFS: &[Proof] = &[
    (
        "unbinding_devices_in_use_asks_the_guest_and_gives_them_back_group",
        |lab| asked_back(lab, Interface::Group, GuestKernel::Stock),
    ),
    (
        "unbinding_devices_in_use_asks_the_guest_and_gives_them_back_cdev",
        |lab| asked_back(lab, Interface::Cdev, GuestKernel::SmallElf),
    ),
    (
        "unbinding_returns_in_time_from_a_guest_that_does_not_answer",
        unanswered,
    ),
    (
        "an_error_is_logged_or_stops_the_vm_as_its_device_says",
        logged_and_stopped,
    ),
    ("an_error_holds_the_guest_until_a_signal_ends_it", held),
    (
        "drives_that_leave_the_host_during_io_are_errors_in_the_guest_and_released",
        left,
    ),
];

/// Reads until it fails: whoever waits for it, waits for the drive's end.
fn read_to_the_end(drive: &str) -> String {
    format!(
        "while dd if=/dev/{drive} of=/dev/null bs=64k count=64 iflag=direct 2>/dev/null; do :; done"
    )
}

/// Unbinds a device as any program of the host's does it, which the kernel lets wait for VFIO's user,
/// and sees that the host's own driver has it.
fn take_back(host: &Host, address: &str, driver: &str) -> Result<()> {
    let start = Instant::now();
    host.unbind_by_hand(address)?;
    println!(
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
             {}\n\
             value drive \"$(ls /sys/class/nvme | wc -l)\"\n\
             value nic \"$(ls /sys/class/net | grep -c eth || true)\"\n\
             dmesg | grep -i 'slot(' | block slots\n",
            read_to_the_end("nvme0n1")
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
        result.stderr.matches("the guest let go of it").count() == 2,
        "Busway says:\n{}",
        result.stderr
    );
    let name = host.run(&format!(
        "udevadm settle; ls /sys/bus/pci/devices/{drive}/nvme"
    ))?;
    let verified = host.run(&format!("lab-io verify /dev/{}n1 5", name.trim()))?;
    println!("the host reads what the guest wrote: {verified}");
    Ok(())
}

/// A guest that has panicked attends to nothing any more.
fn unanswered(lab: &mut Lab) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(30);
    let (host, drive) = bound(lab, "nv0")?;
    let run = guest()?
        .device(&drive)
        .cmdline("console=ttyS0 quiet panic=0")
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
        result.stderr.contains("did not let go of it within 30 s"),
        "Busway says:\n{}",
        result.stderr
    );
    Ok(())
}

/// Has a device report an error.
fn inject(host: &Host, id: &str, error: &str) -> Result<()> {
    let said = host
        .qmp()
        .monitor(&format!("pcie_aer_inject_error {id} {error}"))?;
    println!("QEMU: {}", said.trim());
    Ok(())
}

/// A guest that waits for a byte on its serial port, which nobody sends: it runs until it is ended.
fn waiting(devices: &[String]) -> Result<GuestRun> {
    let run = guest()?.kernel(GuestKernel::SmallElf);
    let run = devices.iter().fold(run, |run, device| run.device(device));
    Ok(run.script("value ready yes\nwhile true; do sleep 1000; done\n"))
}

fn logged_and_stopped(lab: &mut Lab) -> Result<()> {
    let (host, first) = bound(lab, "nic0")?;
    let second = host.address("nic1")?;
    host.run(&format!("busway device bind {second}"))?;
    let run = waiting(&[format!("{first},on_error=ignore"), second.clone()])?;
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    inject(host, "nic0", "UNSUP")?;
    running.wait_said(&format!("{first} had an uncorrectable error"))?;
    inject(host, "nic1", "MALF_TLP")?;
    let result = running.finish()?;
    println!("Busway says:\n{}", result.stderr);
    ensure!(result.status == 1, "status {}", result.status);
    for words in [
        format!("{second} had an uncorrectable error"),
        "the VM was stopped".to_owned(),
        "device status".to_owned(),
        "UnsupReq".to_owned(),
        "on_error=pause".to_owned(),
    ] {
        ensure!(result.stderr.contains(&words), "it says: {}", result.stderr);
    }
    give_back(host, &first, "e1000e")?;
    give_back(host, &second, "igb")
}

fn held(lab: &mut Lab) -> Result<()> {
    let (host, nic) = bound(lab, "nic0")?;
    let run = waiting(&[format!("{nic},on_error=pause,id=uplink")])?;
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    inject(host, "nic0", "COMP_TIME")?;
    running.wait_said("the guest is held")?;
    // A vCPU that is held is not in the guest: it sleeps in user space.
    let pid = running.pid()?;
    let state = host.run(&format!(
        "for task in /proc/{pid}/task/*; do\n\
           [ \"$(cat $task/comm)\" = vcpu0 ] && cat $task/wchan && echo\n\
         done"
    ))?;
    ensure!(state.contains("futex"), "the vCPU waits in {state:?}");
    running.signal("TERM")?;
    let result = running.finish()?;
    ensure!(result.status == 1, "status {}", result.status);
    for words in ["(uplink) had an uncorrectable error", "ended by signal 15"] {
        ensure!(result.stderr.contains(words), "it says: {}", result.stderr);
    }
    give_back(host, &nic, "e1000e")
}

/// One drive is asked for by the host's own slot, as `device_del` does; the power of the other one's
/// slot is cut, and it is gone before anybody knows.
fn left(lab: &mut Lab) -> Result<()> {
    let config = HostConfig::new(Kernel::Small)
        .device(Device::nvme("nv0", 64))
        .device(Device::nvme("nv1", 64));
    let host = lab.host(&config)?;
    let [asked, cut] = [host.address("nv0")?, host.address("nv1")?];
    host.run(&format!("busway device bind {asked} {cut}"))?;
    let run = guest()?
        .kernel(GuestKernel::SmallElf)
        .device(&asked)
        .device(&cut)
        .script(&format!(
            "ready() {{ value ready \"$(cat /sys/class/nvme/nvme*/serial)\"; }}\n\
             ready\n\
             for drive in /sys/class/nvme/nvme*; do\n\
               eval \"$(cat $drive/serial | tr -d ' ')=$(basename $drive)n1\"\n\
             done\n\
             {{ {}; value asked over; }} &\n\
             {}; value cut over\n\
             wait\n\
             value drives \"$(ls /sys/class/nvme | wc -l)\"\n\
             dmesg | grep -i 'slot(' | block slots\n",
            read_to_the_end("$NV0"),
            read_to_the_end("$NV1"),
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    let start = Instant::now();
    host.qmp().execute("device_del", json!({ "id": "nv0" }))?;
    running.wait_line("@@value asked over")?;
    host.qmp()
        .wait_event("DEVICE_DELETED", Duration::from_secs(120))?;
    println!("the drive left by device_del after {:?}", start.elapsed());
    let start = Instant::now();
    host.run(&format!(
        "port=$(basename \"$(dirname \"$(readlink -f /sys/bus/pci/devices/{cut})\")\")\n\
         setpci -s \"$port\" CAP_EXP+18.w=0700:0700"
    ))?;
    running.wait_line("@@value cut over")?;
    println!(
        "the drive without power was over after {:?}",
        start.elapsed()
    );
    let result = running.finish()?.success()?;
    println!("Busway says:\n{}", result.stderr);
    println!("the guest says:\n{}", result.block("slots")?);
    ensure!(result.value("drives")? == "0", "a drive is left");
    for words in ["the guest let go of it", "is gone from the host"] {
        ensure!(result.stderr.contains(words), "it says: {}", result.stderr);
    }
    let left = host.run("ls /sys/bus/pci/drivers/vfio-pci")?;
    ensure!(!left.contains(":00.0"), "VFIO still has {left}");
    ensure!(
        !host.console().contains("Call Trace"),
        "the host complains:\n{}",
        host.console()
    );
    lab.stop();
    Ok(())
}
