//! Guests that begin with Debian's own firmware: a kernel that it starts, and disks that it boots.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{GuestKernel, GuestResult, GuestRun, Host, Lab, Vmm, build_lab_io};

use crate::Proof;
use crate::assigned::{bound, give_back};
use crate::hotplug::{CTL, EAGER, SOCKET, at_once};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "firmware_starts_a_kernel_with_an_assigned_drive_whose_bars_it_places",
        kernel,
    ),
    Proof::new(
        "firmware_boots_a_virtio_disk_and_then_the_same_from_an_assigned_drive",
        disks,
    ),
];

const FIRMWARE: [&str; 2] = ["--firmware", "auto,vars=/run/vm.vars"];

/// Turns the VMM's command line into that of a guest which boots a disk: an EFI system partition's file system with
/// Debian's boot loader, and the kernel, initial RAM file system and command line that the VMM was to be given. `$disk`
/// is where it goes, `$options` what the VMM is given in place of the kernel.
const DISK: &str = "\
    set -e\n\
    kernel=$4 initramfs=$6 cmdline=$8 image=${disk:-/run/esp.img}\n\
    shift 8\n\
    export MTOOLS_SKIP_CHECK=1\n\
    [ -b \"$image\" ] || truncate -s 160M \"$image\"\n\
    sectors=$(($(stat -Lc %s \"$image\") / 512))\n\
    [ ! -b \"$image\" ] || sectors=$(blockdev --getsz \"$image\")\n\
    mformat -i \"$image\" -F -v EFI -T \"$sectors\" -h 64 -s 32 ::\n\
    mmd -i \"$image\" ::/EFI ::/EFI/BOOT ::/EFI/debian\n\
    mcopy -i \"$image\" /usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed ::/EFI/BOOT/BOOTX64.EFI\n\
    mcopy -i \"$image\" \"$kernel\" ::/vmlinuz\n\
    mcopy -i \"$image\" \"$initramfs\" ::/initrd\n\
    printf 'search --file /vmlinuz --set=root\\nlinux /vmlinuz %s\\ninitrd /initrd\\nboot\\n' \"$cmdline\" |\n\
    mcopy -i \"$image\" - ::/EFI/debian/grub.cfg\n\
    rm -f \"$initramfs\"\n";

/// What a guest says of how it was booted, and of its log: what firmware is blamed for, and what finds no room.
const ASK: &str = "\
    value efi \"$([ -d /sys/firmware/efi ] && echo yes)\"\n\
    value bridge \"$(cat /sys/bus/pci/devices/0000:00:00.0/device)\"\n\
    dmesg | grep -iE 'firmware bug|BIOS bug|conflict|no space for|failed to assign|can.t claim' | block complaints\n";

/// Firmware writes CR8, which the emulator has to be kept from: `tests/lab/setup/lab-cr8.c`.
const PREPARE: &str = "[ -d /sys/module/lab_cr8 ] || insmod /usr/local/lib/lab-cr8.ko";

fn by_firmware(host: &Host) -> Result<GuestRun> {
    host.run(PREPARE)?;
    Ok(GuestRun::new(Vmm::Busway)
        .kernel(GuestKernel::Stock)
        .limit(Duration::from_secs(300)))
}

/// The firmware numbers buses and places BARs its own way: the drive works where it is, and a guest that restarts begins
/// with the firmware anew, and finds all of it again. A NIC comes into the empty slot that it has left room for, and a
/// disk on bus 0, and both leave.
fn kernel(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let nic = host.address("nic0")?;
    host.run(&format!(
        "busway device bind {nic} && rm -f /run/hot.raw && truncate -s 1M /run/hot.raw"
    ))?;
    let run = by_firmware(host)?
        .file("bin/lab-io", &build_lab_io()?)
        .device(&drive)
        .cpus(2)
        .args(&FIRMWARE)
        .args(&["--platform", "hotplug_slots=1"])
        .args(&SOCKET)
        .script(&format!(
            "{ASK}\
             flag=\"$(dd if=/dev/nvme0n1 bs=512 skip=2048 count=1 2>/dev/null | head -c 5)\"\n\
             if [ \"$flag\" != again ]; then\n\
             printf again | dd of=/dev/nvme0n1 bs=512 seek=2048 conv=sync,fsync 2>/dev/null\n\
             value first yes\n\
             reboot -f\n\
             fi\n\
             value serial $(cat /sys/class/nvme/nvme0/serial)\n\
             value processors $(grep -c ^processor /proc/cpuinfo)\n\
             sed -n 1p /sys/class/nvme/nvme0/device/resource | block bar\n\
             cat /proc/iomem | block iomem\n\
             modprobe -aq e1000e virtio_blk\n\
             {EAGER}\
             value ready yes\n\
             until [ -e /sys/class/net/eth0 ] && [ -b /dev/vda ]; do sleep 0.1; done\n\
             ip link set eth0 up\n\
             until grep -q eth0 /proc/interrupts; do sleep 0.1; done\n\
             value hot \"$(cat /sys/class/net/eth0/device/device) $(lab-io write /dev/vda 3)\"\n\
             while [ -e /sys/class/net/eth0 ] || [ -b /dev/vda ]; do sleep 0.1; done\n"
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value ready")?;
    host.run(&at_once(&[
        format!("{CTL} add-device {nic}"),
        format!("{CTL} add-disk /run/hot.raw --id hot"),
    ]))?;
    running.wait_line("@@value hot")?;
    host.run(&at_once(&[
        format!("{CTL} remove-device {nic}"),
        format!("{CTL} remove-device hot"),
    ]))?;
    let result = running.finish()?.success()?;
    check(&result)?;
    let hot = result.value("hot")?;
    ensure!(
        hot.starts_with("0x10d3") && hot.contains("bytes=1048576"),
        "what came later: {hot}"
    );
    host.run("lab-io verify /run/hot.raw 3")?;
    give_back(host, &nic, "e1000e")?;
    ensure!(result.value("first")? == "yes");
    ensure!(result.value("serial")? == "NV0" && result.value("processors")? == "2");
    let iomem = result.block("iomem")?;
    ensure!(
        iomem.contains("PCI ECAM 0000"),
        "no configuration space in memory: {iomem}"
    );
    let bar = result.block("bar")?;
    let bar = bar.split_whitespace().next().context("a BAR")?;
    let address = u64::from_str_radix(bar.trim_start_matches("0x"), 16)?;
    ensure!(address >= 0x8000_0000, "the drive's BAR is at {bar}");
    // What the firmware sets, such as its boot options, is in the store.
    host.run(
        "python3 -c \"assert 'BootOrder'.encode('utf-16-le') in open('/run/vm.vars', 'rb').read()\"",
    )?;
    Ok(())
}

/// The same image boots from a virtio disk, with the drive beside it, and from the drive itself with no virtio disk.
fn disks(lab: &mut Lab) -> Result<()> {
    let (host, drive) = bound(lab, "nv0")?;
    let script = format!(
        "{ASK}value serial $(cat /sys/class/nvme/nvme0/serial)\n\
         value disks \"$(ls -d /sys/block/vd* | grep -c vd)\"\n"
    );
    let from = |opener: &str| -> Result<GuestResult> {
        let run = by_firmware(host)?
            .device(&drive)
            .args(&FIRMWARE)
            .opened_by(opener)
            .script(&script);
        let result = host.guest(&run)?.success()?;
        check(&result)?;
        ensure!(result.value("serial")? == "NV0");
        Ok(result)
    };
    let virtio = from(&format!(
        "{DISK}exec busway run --disk path=/run/esp.img,boot_index=1 \"$@\"\n"
    ))?;
    ensure!(virtio.value("disks")? == "1");
    let own = from(&format!(
        "busway device unbind {drive} >&2\n\
         disk=/dev/nvme0n1\n\
         until [ -b $disk ]; do sleep 0.1; done\n\
         {DISK}sync\n\
         busway device bind {drive} >&2\n\
         exec busway run \"$@\"\n"
    ))?;
    ensure!(own.value("disks")? == "0");
    Ok(())
}

/// The guest was booted by UEFI on the board that this knows, and its kernel has nothing to say against that.
fn check(result: &GuestResult) -> Result<()> {
    ensure!(result.value("efi")? == "yes", "{}", result.stderr);
    ensure!(result.value("bridge")? == "0x29c0");
    let complaints = result.block("complaints")?.trim();
    ensure!(complaints.is_empty(), "{complaints}");
    Ok(())
}
