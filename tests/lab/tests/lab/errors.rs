//! Errors of devices, which arrive by the host's AER: what is told of them, and what they do to the VM.

use anyhow::{Result, ensure};
use busway_lab::{BEFORE_FIRMWARE, Device, GuestKernel, GuestRun, Host, HostConfig, Kernel, Lab};

use crate::assigned::{Interface, guest};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "errors_of_devices_are_told_of_or_stop_the_vm_as_each_says_by_group",
        |lab| told_and_stopped(lab, Interface::Group),
    ),
    Proof::soak(
        "errors_of_devices_are_told_of_or_stop_the_vm_as_each_says_by_cdev",
        |lab, _| told_and_stopped(lab, Interface::Cdev),
    ),
    Proof::soak(
        "errors_of_devices_are_told_of_or_stop_the_vm_under_firmware",
        |lab, _| under_firmware(lab),
    ),
    Proof::new(
        "errors_hold_the_guest_until_it_is_resumed_or_a_signal_ends_it",
        held,
    ),
    Proof::new(
        "errors_of_a_port_are_those_of_the_device_behind_it",
        of_the_port,
    ),
];

/// Two devices that signal errors, and a drive that cannot. Their root ports are `port2` to `port4`.
fn host(lab: &mut Lab) -> Result<(&Host, [String; 3])> {
    let config = HostConfig::new(Kernel::Iommufd)
        .device(Device::rng("rng0"))
        .device(Device::rng("rng1"))
        .device(Device::nvme("nv0", 64));
    let host = lab.host(&config)?;
    let [one, other, drive] = ["rng0", "rng1", "nv0"].map(|id| host.address(id));
    let addresses = [one?, other?, drive?];
    host.run(&format!("busway device bind {}", addresses.join(" ")))?;
    Ok((host, addresses))
}

/// Has a device or a port detect an error.
fn inject(host: &Host, id: &str, error: &str) -> Result<()> {
    let said = host
        .qmp()
        .monitor(&format!("pcie_aer_inject_error {id} {error}"))?;
    ensure!(said.contains("OK"), "QEMU says: {said}");
    Ok(())
}

/// A guest that runs until it is ended.
fn waiting(devices: &[String]) -> Result<GuestRun> {
    let run = guest()?.kernel(GuestKernel::StockElf);
    let run = devices.iter().fold(run, |run, device| run.device(device));
    Ok(run.script("value ready yes\nwhile true; do sleep 1000; done\n"))
}

fn says(said: &str, all: &[&str]) -> Result<()> {
    for words in all {
        ensure!(said.contains(words), "no {words:?} in: {said}");
    }
    Ok(())
}

fn told_and_stopped(lab: &mut Lab, interface: Interface) -> Result<()> {
    let (host, [first, second, _]) = host(lab)?;
    let run = signalling(&first, &second)?.args(&interface.arguments());
    each_as_it_says(host, &run, [&first, &second])
}

fn under_firmware(lab: &mut Lab) -> Result<()> {
    let (host, [first, second, _]) = host(lab)?;
    host.run(BEFORE_FIRMWARE)?;
    let run = signalling(&first, &second)?
        .kernel(GuestKernel::Stock)
        .firmware();
    each_as_it_says(host, &run, [&first, &second])
}

/// A guest that ignores the first one's errors.
fn signalling(first: &str, second: &str) -> Result<GuestRun> {
    waiting(&[format!("{first},on_error=ignore"), second.to_owned()])
}

fn each_as_it_says(host: &Host, run: &GuestRun, [first, second]: [&str; 2]) -> Result<()> {
    let running = host.start_guest(run)?;
    running.wait_line("@@value ready")?;
    inject(host, "rng0", "COMP_TIME")?;
    running.wait_said(&format!("{first} had an uncorrectable error"))?;
    inject(host, "rng1", "MALF_TLP")?;
    let result = running.finish()?;
    tell!("Busway says:\n{}", result.stderr);
    ensure!(result.status == 1, "status {}", result.status);
    // The kernel leaves what a fatal error set, and counts what it clears.
    says(
        &result.stderr,
        &[
            &format!("{second} had an uncorrectable error"),
            "device status",
            "the host counted CmpltTO (non-fatal)",
            "Malformed TLP (fatal)",
            "on_error=pause",
        ],
    )
}

fn held(lab: &mut Lab) -> Result<()> {
    let (host, [first, ..]) = host(lab)?;
    let run = waiting(&[format!("{first},on_error=pause,id=uplink")])?;
    let run = run.args(&["--api-socket", "/run/vm.sock"]);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    inject(host, "rng0", "COMP_TIME")?;
    running.wait_said("the guest is held")?;
    // A vCPU that is held is not in the guest: it sleeps in user space.
    let pid = running.pid()?;
    let state = host.run(&format!(
        "for task in /proc/{pid}/task/*; do\n\
             if [ \"$(cat $task/comm)\" = vcpu0 ]; then cat $task/wchan; fi\n\
         done"
    ))?;
    ensure!(state.contains("futex"), "the vCPU waits in {state:?}");
    // It goes on as a guest does that was paused, and is held by the next error.
    let ctl = "busway ctl --api-socket /run/vm.sock";
    let told = host.run(&format!(
        "{ctl} info | grep state && {ctl} resume && {ctl} info | grep state"
    ))?;
    says(&told, &["held: ", "the guest runs", "running"])?;
    inject(host, "rng0", "COMP_TIME")?;
    let held = format!("until {ctl} info | grep -q held; do sleep 0.1; done");
    host.run(&held)?;
    running.signal("TERM")?;
    let result = running.finish()?;
    ensure!(result.status == 1, "status {}", result.status);
    says(
        &result.stderr,
        &[
            "goes on after an error",
            "(uplink) had an uncorrectable error",
            "ended by signal 15",
        ],
    )
}

/// For an error of the link the kernel tells everything behind the port.
fn of_the_port(lab: &mut Lab) -> Result<()> {
    let (host, [.., drive]) = host(lab)?;
    let running = host.start_guest(&waiting(std::slice::from_ref(&drive))?)?;
    running.wait_line("@@value ready")?;
    inject(host, "port4", "DLP")?;
    let result = running.finish()?;
    tell!("Busway says:\n{}", result.stderr);
    ensure!(result.status == 1, "status {}", result.status);
    says(
        &result.stderr,
        &[&format!("{drive} had an uncorrectable error")],
    )
}
