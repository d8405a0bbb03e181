//! A guest's life: how it boots, restarts and ends, and what is left when Busway dies.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{GuestKernel, Host, Lab};

use crate::Proof;
use crate::assigned::{bound, give_back, guest, zoo};
use crate::firmware::{IDENTIFY, IDENTITY, TOOLS, identified};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "killed_during_io_leaves_a_drive_that_a_second_guest_boots_with",
        killed,
    ),
    Proof::new("a_guest_restarts_with_its_drive_and_its_disk", restarted),
    Proof::new(
        "a_guest_that_triple_faults_restarts_with_its_timers",
        triple_faulted,
    ),
    Proof::new("sigterm_powers_the_guest_off", powered_off),
    Proof::new(
        "a_guest_that_ignores_the_power_button_is_killed_in_time",
        ignored,
    ),
    Proof::new(
        "the_control_socket_shows_pauses_resumes_and_ends_a_guest_with_a_drive",
        controlled,
    ),
    Proof::new(
        "the_stock_kernel_finds_nothing_wrong_with_the_machine",
        clean_log,
    ),
    Proof::new("sixteen_processors_start", many_cpus),
    Proof::new("an_initramfs_above_4_gib_is_found", far_initramfs),
    Proof::new(
        "a_thread_that_panics_ends_the_vm_and_its_drive_is_given_back",
        panicked,
    ),
];

fn killed(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let endless = "lab-io write /dev/nvme0n1 1\nvalue io begun\n\
                   while true; do lab-io write /dev/nvme0n1 1 >/dev/null; done\n";
    let run = guest()?.device(&address).script(endless);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value io begun")?;
    running.signal("KILL")?;
    let result = running.finish()?;
    ensure!(result.status == 128 + 9, "status {}", result.status);
    give_back(host, &address, "nvme")?;
    host.run(&format!("udevadm settle; busway device bind {address}"))?;
    let second = guest()?.device(&address).script(
        "lab-io write /dev/nvme0n1 2\nvalue verified \"$(lab-io verify /dev/nvme0n1 2)\"\n",
    );
    host.guest(&second)?.success()?.value("verified").map(drop)
}

/// The first boot leaves a word on each drive and resets; the second finds both.
fn restarted(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    host.run("rm -f /run/restart.raw; truncate -s 1M /run/restart.raw")?;
    let run = guest()?
        .device(&address)
        .args(&["--disk", "path=/run/restart.raw"])
        .script(
            "if [ \"$(head -c 5 /dev/vda)\" = again ]; then\n\
             value second \"$(head -c 5 /dev/nvme0n1)\"\n\
         else\n\
             value first \"$(cat /sys/class/nvme/nvme0/serial)\"\n\
             printf again | dd of=/dev/nvme0n1 bs=4096 conv=sync,fsync 2>/dev/null\n\
             printf again | dd of=/dev/vda bs=4096 conv=sync,fsync 2>/dev/null\n\
             reboot -f\n\
         fi\n",
        );
    let result = host.guest(&run)?.success()?;
    ensure!(
        result.value("second")? == "again",
        "the drive's word was {}",
        result.value("second")?
    );
    Ok(())
}

/// The first boot ends in a triple fault, on purpose, and not in its first five seconds, for such a guest is not
/// restarted. Timers of the second would be late by the time that the host has been up, each of them, where KVM and the
/// guest disagree about the TSC.
fn triple_faulted(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let run = guest()?
        .device(&address)
        .cpus(2)
        .cmdline("reboot=triple")
        .dies()
        .script(
            "if [ \"$(head -c 5 /dev/nvme0n1)\" = fault ]; then\n\
             value second \"$(nproc)\"\n\
             value before \"$(cut -d . -f 1 /proc/uptime)\"\n\
             for each in 1 2 3 4 5 6 7 8 9 10; do sleep 0.1; done\n\
             value after \"$(cut -d . -f 1 /proc/uptime)\"\n\
         else\n\
             printf fault | dd of=/dev/nvme0n1 bs=4096 conv=sync,fsync 2>/dev/null\n\
             while [ \"$(cut -d . -f 1 /proc/uptime)\" -lt 6 ]; do sleep 1; done\n\
             reboot -f\n\
         fi\n",
        );
    let result = host.guest(&run)?.success()?;
    ensure!(
        result.stderr.contains("triple-faulted on vCPU"),
        "nothing was said of a triple fault: {}",
        result.stderr
    );
    ensure!(
        result.value("second")? == "2",
        "{}",
        result.value("second")?
    );
    let uptime = |key| anyhow::Ok(result.value(key)?.parse::<u64>()?);
    let slept = uptime("after")? - uptime("before")?;
    ensure!(slept < 60, "ten sleeps of 0.1 s took {slept} s");
    Ok(())
}

/// The guest's kernel hears the ACPI power button; its script waits for the event and obeys.
fn powered_off(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    let run = guest()?
        .kernel(GuestKernel::Stock)
        .script("until_pressed waiting\nvalue pressed yes\n");
    let running = host.start_guest(&run)?;
    running.wait_line("@@value waiting")?;
    running.signal("TERM")?;
    let result = running.finish()?.success()?;
    result.value("pressed").map(drop)
}

fn ignored(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    let run = guest()?
        .script("value deaf yes\nwhile true; do sleep 1000; done\n")
        .limit(Duration::from_secs(300));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value deaf")?;
    running.signal("TERM")?;
    let result = running.finish()?;
    ensure!(
        result.status == 1,
        "status {}: {}",
        result.status,
        result.stderr
    );
    ensure!(
        result.stderr.contains("power"),
        "it says: {}",
        result.stderr
    );
    Ok(())
}

/// A guest that is written to its drive all the while stands still between `pause` and `resume`, powers off when its
/// button is pressed, and a second one ends when it is told to. Nothing is left of either's socket.
fn controlled(lab: &mut Lab) -> Result<()> {
    const CTL: &str = "busway ctl --api-socket /run/vm.sock";
    let (host, address) = bound(lab, "nv0")?;
    let guest = || -> Result<_> {
        let guest = guest()?.kernel(GuestKernel::Stock).device(&address);
        Ok(guest.args(&["--api-socket", "/run/vm.sock"]))
    };
    let run = guest()?.script(
        "while true; do lab-io write /dev/nvme0n1 1 >/dev/null; echo tick; done &\n\
         until_pressed waiting\nkill $!\nvalue pressed yes\n",
    );
    let running = host.start_guest(&run)?;
    running.wait_line("tick")?;
    running.wait_line("@@value waiting")?;
    let info = host.run(&format!("{CTL} ping >&2 && {CTL} info"))?;
    ensure!(
        info.contains("running") && info.contains(&address),
        "info: {info}"
    );
    seen(host, CTL, &address)?;
    host.run(&format!("{CTL} pause"))?;
    let info = host.run(&format!("{CTL} info"))?;
    ensure!(info.contains("paused"), "info: {info}");
    // No processor runs, so that the process takes no time but for what asks it.
    let stat = format!("cut -d ' ' -f 14 /proc/{}/stat", running.pid()?);
    let ticks = host.run(&format!("{stat}; sleep 2; {stat}"))?;
    let ticks: Vec<u64> = ticks
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(
        matches!(*ticks, [before, after] if after - before < 20),
        "time was taken by a guest that is paused: {ticks:?}"
    );
    let again = host.run(&format!("{CTL} pause 2>&1 || echo \"status $?\""))?;
    ensure!(
        again.contains("the guest is paused") && again.contains("status 1"),
        "a second pause: {again}"
    );
    host.run(&format!("{CTL} resume && {CTL} power-button"))?;
    running.finish()?.success()?.value("pressed")?;
    host.run("! ls /run/vm.sock*")?;
    let running = host.start_guest(&guest()?.script("value up yes\nsleep 1000\n"))?;
    running.wait_line("@@value up")?;
    host.run(&format!(
        "{CTL} pause && {CTL} shutdown && ! ls /run/vm.sock*"
    ))?;
    let status = running.finish()?.status;
    ensure!(status == 0, "status {status}");
    give_back(host, &address, "nvme")
}

/// The drive at work is shown with its vectors and mappings, by vm.devices and by the metrics, and the VM is found. The
/// kernel delivers its interrupts: the drive causes no exit, and what top shows is the guest's vCPU.
fn seen(host: &Host, ctl: &str, address: &str) -> Result<()> {
    let json = |what: &str| -> Result<serde_json::Value> {
        Ok(serde_json::from_str(
            &host.run(&format!("{ctl} {what} --json"))?,
        )?)
    };
    let devices = json("devices")?;
    let of = |devices: &serde_json::Value| -> Result<serde_json::Value> {
        let mut all = devices["devices"].as_array().into_iter().flatten();
        let drive = all.find(|device| device["host_bdf"] == address);
        Ok(drive.context("the drive is not shown")?.clone())
    };
    let drive = of(&devices)?;
    let number = |at: &str| {
        drive
            .pointer(at)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0)
    };
    ensure!(
        drive["state"] == "present" && drive["interrupts"]["mode"] == "msi-x",
        "{drive:#}"
    );
    let (vectors, most) = (
        number("/interrupts/vectors"),
        number("/interrupts/vectors_most"),
    );
    ensure!(vectors > 0 && vectors <= most, "{drive:#}");
    ensure!(
        number("/dma/mappings") > 0 && number("/dma/bytes") >= 64 << 20,
        "{drive:#}"
    );
    ensure!(number("/exits/config_reads") > 0, "{drive:#}");
    let table = host.run(&format!("{ctl} devices"))?;
    ensure!(
        table.contains(address) && table.contains(&format!("msi-x {vectors}/{most}")),
        "{table}"
    );
    let top = json("top --once")?;
    ensure!(
        top.pointer("/per_second/vcpus/0/cpu")
            .is_some_and(|cpu| cpu.as_f64() > Some(0.0)),
        "{top:#}"
    );
    let later = of(&top["totals"])?;
    ensure!(
        later["exits"] == drive["exits"],
        "a drive at work causes exits: {drive:#} {later:#}"
    );
    let metrics = host.run(&format!("{ctl} metrics"))?;
    let line =
        format!("busway_device_interrupt_vectors{{device=\"{address}\",mode=\"msi-x\"}} {vectors}");
    ensure!(metrics.contains(&line), "{metrics}");
    let list = host.run("busway ctl list")?;
    ensure!(
        list.contains("/run/vm.sock") && list.contains("running"),
        "{list}"
    );
    Ok(())
}

/// What a guest's log says where it blames the firmware, or resources are in conflict.
pub(crate) const COMPLAINTS: &str = "firmware bug|firmware warn|acpi error|acpi warning|acpi bios|conflict|\
                                     can't claim|failed to assign|no compatible bridge window|bios bug|no space for|\
                                     not assigned|call trace|soft lockup";

/// No line of the log blames the firmware or reports resources in conflict. The kernel finds out which machine it is,
/// though there is no firmware to tell it.
fn clean_log(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let run = guest()?
        .kernel(GuestKernel::Stock)
        .booted_in_full()
        .device(&address)
        .opened_by(&format!("{TOOLS}exec \"$@\"\n"))
        .args(&["--platform", IDENTITY])
        .script(&format!(
            "{IDENTIFY}value lines \"$(dmesg | wc -l)\"\nvalue clock \"$(dmesg | grep -c kvm-clock)\"\n\
         {{ dmesg | grep -iE \"{COMPLAINTS}\" || true; }} | block complaints\n"
        ));
    let result = host.guest(&run)?.success()?;
    ensure!(result.value("lines")?.parse::<u32>()? > 100, "no log");
    ensure!(result.value("clock")? != "0", "no kvm-clock");
    identified(&result)?;
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    Ok(())
}

fn many_cpus(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    let run = guest()?
        .kernel(GuestKernel::StockElf)
        .cpus(16)
        .script("value cpus \"$(nproc)\"\n");
    let result = host.guest(&run)?.success()?;
    ensure!(
        result.value("cpus")? == "16",
        "{} processors",
        result.value("cpus")?
    );
    Ok(())
}

/// The kernel is told to ask for nearly all RAM below 4 GiB (`init_size` of its setup header, at 0x260), so that
/// nothing is left there for its initramfs.
fn far_initramfs(lab: &mut Lab) -> Result<()> {
    // 0xbeff_f000 bytes from 16 MiB on: 4 KiB of 3 GiB are left.
    const ROOM: &str = "\\0\\360\\377\\276";
    let host = lab.host(&zoo())?;
    let run = guest()?
        .kernel(GuestKernel::Stock)
        .memory_mib(4096)
        .opened_by(&format!(
            "cp \"$4\" /run/far\n\
             printf '{ROOM}' | dd of=/run/far bs=1 seek=$((0x260)) conv=notrunc 2>/dev/null\n\
             exec \"${{@:1:3}}\" /run/far \"${{@:5}}\"\n"
        ))
        .script(
            "value ramdisk \"$(dmesg | sed -n 's/.*RAMDISK: .mem 0x\\([0-9a-f]*\\)-.*/\\1/p')\"\n",
        );
    let result = host.guest(&run)?.success()?;
    let at = u64::from_str_radix(result.value("ramdisk")?, 16)?;
    ensure!(at >= 1 << 32, "the initramfs is at {at:#x}");
    Ok(())
}

/// A build of the lab has a thread panic when the environment asks for it.
fn panicked(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let run = guest()?
        .device(&address)
        .opened_by("BUSWAY_TEST_PANIC_AFTER_MS=30000 exec \"$@\"\n")
        .dies()
        .script(
            "value io begun\n\
             while true; do lab-io write /dev/nvme0n1 1 >/dev/null; done\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value io begun")?;
    let result = running.finish()?;
    let said = &result.stderr;
    ensure!(result.status == 1, "status {}: {said}", result.status);
    for words in ["this is a bug in Busway", "the VM was ended"] {
        ensure!(said.contains(words), "it does not say \"{words}\": {said}");
    }
    ensure!(result.report.is_some(), "no report was written");
    give_back(host, &address, "nvme")
}
