//! Guests that begin with Debian's own firmware: a kernel that it starts, and disks that it boots.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{
    BEFORE_FIRMWARE, BOOT_FILE, Device, GuestKernel, GuestResult, GuestRun, Host, Lab, NETBOOT,
    Vmm, build_lab_io,
};

use crate::assigned::{give_back, zoo};
use crate::dma::DRIVE;
use crate::hotplug::{CTL, EAGER, SOCKET, at_once};
use crate::life::COMPLAINTS;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "firmware_starts_a_kernel_with_an_assigned_drive_whose_bars_it_places",
        kernel,
    ),
    Proof::new(
        "firmware_boots_a_virtio_disk_and_then_the_same_from_an_assigned_drive",
        disks,
    ),
    Proof::soak(
        "firmware_boots_over_the_network_by_the_rom_of_an_assigned_nic",
        |lab, _| network(lab),
    ),
];

const FIRMWARE: [&str; 2] = ["--firmware", "auto,vars=/run/vm.vars"];

/// Gives the guest `efibootmgr`, `dmidecode` and `sfdisk`: the start of a script that becomes the VMM.
pub(crate) const TOOLS: &str = "cat /boot/guest-firmware.img >>\"$6\"\n";

/// Which machine a guest is told that it is, and how it says what it was told.
pub(crate) const IDENTITY: &str = "serial_number=bw-0001,uuid=3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611,\
                                   oem_strings=[busway,\"two words, one comma\"]";
pub(crate) const IDENTIFY: &str = "\
    value identity \"$(dmidecode -s system-uuid) $(dmidecode -s system-serial-number) $(dmidecode -s system-manufacturer)\"\n\
    value strings \"$(dmidecode --oem-string count) $(dmidecode --oem-string 1) $(dmidecode --oem-string 2)\"\n\
    value dmidecode \"$(dmidecode 2>&1 | grep -ciE 'invalid|broken|truncated|wrong')\"\n\
    value sysfs \"$(cat /sys/class/dmi/id/product_uuid) $(cat /sys/class/dmi/id/product_serial)\"\n";

/// The guest was told which machine it is.
pub(crate) fn identified(result: &GuestResult) -> Result<()> {
    const UUID_AND_SERIAL: &str = "3c1f7a52-9b0e-4d6a-8e43-5f2b7d90c611 bw-0001";
    for (key, wanted) in [
        ("identity", format!("{UUID_AND_SERIAL} Busway")),
        ("strings", "2 busway two words, one comma".to_owned()),
        ("dmidecode", "0".to_owned()),
        ("sysfs", UUID_AND_SERIAL.to_owned()),
    ] {
        let found = result.value(key)?;
        ensure!(found == wanted, "{key}: {found}, not {wanted}");
    }
    Ok(())
}

/// Turns the VMM's command line into that of a guest which boots a disk: a partition table, an EFI system partition with
/// Debian's boot loader, and the kernel, initial RAM file system and command line that the VMM was to be given. `$disk`
/// is where it goes.
const DISK: &str = "\
    set -e\n\
    kernel=$4 initramfs=$6 cmdline=$8 image=${disk:-/run/esp.img}\n\
    shift 8\n\
    export MTOOLS_SKIP_CHECK=1\n\
    [ -b \"$image\" ] || truncate -s 160M \"$image\"\n\
    sectors=$(($(stat -Lc %s \"$image\") / 512))\n\
    [ ! -b \"$image\" ] || sectors=$(blockdev --getsz \"$image\")\n\
    echo 2048,$((sectors - 4096)),U | sfdisk -q --wipe always -X gpt \"$image\" >&2\n\
    esp=$image@@1M\n\
    mformat -i \"$esp\" -F -v EFI -T $((sectors - 4096)) -h 64 -s 32 -H 2048 ::\n\
    mmd -i \"$esp\" ::/EFI ::/EFI/BOOT ::/EFI/debian\n\
    mcopy -i \"$esp\" /usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed ::/EFI/BOOT/BOOTX64.EFI\n\
    mcopy -i \"$esp\" \"$kernel\" ::/vmlinuz\n\
    mcopy -i \"$esp\" \"$initramfs\" ::/initrd\n\
    printf 'search --file /vmlinuz --set=root\\nlinux /vmlinuz %s\\ninitrd /initrd\\nboot\\n' \"$cmdline\" |\n\
    mcopy -i \"$esp\" - ::/EFI/debian/grub.cfg\n\
    rm -f \"$initramfs\"\n";

/// What a guest says of how it was booted.
const ASK: &str = "\
    value efi \"$([ -d /sys/firmware/efi ] && echo yes)\"\n\
    value bridge \"$(cat /sys/bus/pci/devices/0000:00:00.0/device)\"\n\
    mount -t efivarfs efivarfs /sys/firmware/efi/efivars\n";

/// A guest that asks so, and for what its log blames firmware for, and what finds no room.
fn ask() -> String {
    format!("{ASK}{{ dmesg | grep -iE \"{COMPLAINTS}\" || true; }} | block complaints\n")
}

/// `entry DISK LABEL` sets a boot entry for a disk's first partition; `entries` shows all.
const ENTRIES: &str = "\
    entry() { efibootmgr -q -C -d $1 -p 1 -L \"$2\" -l '\\EFI\\BOOT\\BOOTX64.EFI'; }\n\
    entries() { efibootmgr | block entries; }\n";

/// How long a guest may take that begins with firmware.
const LIMIT: Duration = Duration::from_secs(300);

fn by_firmware(host: &Host) -> Result<GuestRun> {
    host.run(BEFORE_FIRMWARE)?;
    Ok(GuestRun::new(Vmm::Busway)
        .kernel(GuestKernel::Stock)
        .limit(LIMIT))
}

/// Sizes of the large BARs, in GiB.
const LARGE: [u64; 2] = [4, 16];

/// What a guest finds of BARs: the lines of each function's, by vendor and device; and what the end of the memory of each
/// size in GiB holds, which is told that size.
const BARS: &str = "\
    for each in /sys/bus/pci/devices/*; do\n\
    echo $(cat $each/vendor $each/device); head -n 6 $each/resource\n\
    done | block bars\n\
    for each in $(grep -l 0x1110 /sys/bus/pci/devices/*/device); do\n\
    memory=${each%/device}; size=$(stat -c %s $memory/resource2)\n\
    echo 1 >$memory/enable\n\
    last=$(($(sed -n 's/ .*//;3p' $memory/resource) + size - 8))\n\
    devmem $last 64 $((size >> 30))\n\
    value last_$((size >> 30)) $(($(devmem $last 64)))\n\
    done\n";

/// The firmware numbers buses and places BARs its own way: the drive works where it is, and large BARs have
/// their place. A guest that restarts begins with the firmware anew, finds all of it again, and the boot
/// entry that it has set. A NIC comes into the empty slot that it has left room for, and a disk on bus 0, and both leave.
fn kernel(lab: &mut Lab) -> Result<()> {
    let [small, large] = LARGE;
    let config = zoo()
        .device(Device::ivshmem("small", small << 10))
        .device(Device::ivshmem("large", large << 10));
    let host = lab.host(&config)?;
    let nic = host.address("nic0")?;
    let devices: Result<Vec<_>> = ["nv0", "small", "large"]
        .iter()
        .map(|id| host.address(id))
        .collect();
    let devices = devices?;
    host.run(&format!(
        "busway device bind {nic} {} && rm -f /run/hot.raw && truncate -s 1M /run/hot.raw",
        devices.join(" ")
    ))?;
    let mut run = by_firmware(host)?
        .file("bin/lab-io", &build_lab_io()?)
        .cpus(2)
        .args(&FIRMWARE)
        .args(&["--platform", &format!("hotplug_slots=1,p2p=off,{IDENTITY}")])
        .args(&SOCKET)
        .opened_by(&format!("{TOOLS}exec \"$@\"\n"))
        .script(&kernels_script());
    for device in &devices {
        run = run.device(device);
    }
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
    identified(&result)?;
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
    for size in LARGE {
        let last = result.value(&format!("last_{size}"))?;
        ensure!(last == size.to_string(), "{size} GiB: {last}");
    }
    same_bars(host, &devices, result.block("bars")?)?;
    // Over a restart by the guest; and over its end, as the store has it.
    let entries = result.block("entries")?;
    ensure!(entries.contains("Before the restart"), "{entries}");
    host.run(
        "python3 -c \"assert 'Before the end'.encode('utf-16-le') in open('/run/vm.vars', 'rb').read()\"",
    )
    .map(drop)
}

fn kernels_script() -> String {
    let ask = ask();
    format!(
        "{ask}{ENTRIES}\
         flag=\"$(dd if=/dev/nvme0n1 bs=512 skip=2048 count=1 2>/dev/null | head -c 5)\"\n\
         if [ \"$flag\" != again ]; then\n\
         echo 2048 | sfdisk -q -X gpt /dev/nvme0n1\n\
         printf again | dd of=/dev/nvme0n1 bs=512 seek=2048 conv=sync,fsync 2>/dev/null\n\
         entry /dev/nvme0n1 'Before the restart'\n\
         value first yes\n\
         reboot -f\n\
         fi\n\
         entries\n\
         entry /dev/nvme0n1 'Before the end'\n\
         {IDENTIFY}\
         value serial $(cat /sys/class/nvme/nvme0/serial)\n\
         value processors $(grep -c ^processor /proc/cpuinfo)\n\
         cat /proc/iomem | block iomem\n\
         {BARS}\
         modprobe -aq e1000e virtio_blk\n\
         {EAGER}\
         value ready yes\n\
         until [ -e /sys/class/net/eth0 ] && [ -b /dev/vda ]; do sleep 0.1; done\n\
         ip link set eth0 up\n\
         until grep -q eth0 /proc/interrupts; do sleep 0.1; done\n\
         value hot \"$(cat /sys/class/net/eth0/device/device) $(lab-io write /dev/vda 3)\"\n\
         while [ -e /sys/class/net/eth0 ] || [ -b /dev/vda ]; do sleep 0.1; done\n"
    )
}

/// Sizes and kinds of the devices' BARs are those that the host sees, and each that has a size has an address.
fn same_bars(host: &Host, devices: &[String], inside: &str) -> Result<()> {
    let guest = functions(inside)?;
    for device in devices {
        let text = host.run(&format!(
            "cd /sys/bus/pci/devices/{device} && echo $(cat vendor device) && head -n 6 resource"
        ))?;
        let [there] = &functions(&text)?[..] else {
            bail!("not one function: {text}");
        };
        ensure!(
            guest.contains(there),
            "{device} is {there:x?} on the host, and the guest has {guest:x?}"
        );
    }
    Ok(())
}

/// Vendor and device, and size and flags of each BAR, of functions as `bars` tells them.
type Function = (String, Vec<(u64, u64)>);

fn functions(text: &str) -> Result<Vec<Function>> {
    let mut functions: Vec<Function> = Vec::new();
    for line in text.lines() {
        let words: Result<Vec<u64>, _> = line
            .split_whitespace()
            .map(|word| u64::from_str_radix(word.trim_start_matches("0x"), 16))
            .collect();
        match words?[..] {
            [_, _] => functions.push((line.to_owned(), Vec::new())),
            [start, end, flags] => {
                ensure!(flags == 0 || start > 0, "a BAR has no address: {line}");
                let (_, bars) = functions.last_mut().context("a BAR of nothing")?;
                bars.push((end - start, flags));
            }
            _ => bail!("neither a function nor a BAR: {line}"),
        }
    }
    Ok(functions)
}

/// Clients of Cloud Hypervisor's API give the firmware as such, or as the kernel: it gets as far as it can without a disk,
/// and says so, though it is paused again and again.
const CLIENTS: &str = r#"
set -e
busway --api-socket path=/run/clients.sock &
until [ -S /run/clients.sock ]; do sleep 0.1; done
api() { curl -sSf --unix-socket /run/clients.sock -X PUT "http://localhost/api/v1/$@"; }
for payload in firmware kernel; do
    api vm.create -H 'Content-Type: application/json' -d '{"memory": {"size": 268435456}, "console": {"mode": "Off"},
        "payload": {"'$payload'": "/usr/share/OVMF/OVMF_CODE_4M.fd"}, "serial": {"mode": "File", "file": "/run/'$payload'"}}'
    api vm.boot
    until grep -q BdsDxe /run/$payload; do api vm.pause; api vm.resume; sleep 0.2; done
    api vm.delete
done
api vmm.shutdown
wait
"#;

/// The same image boots from a virtio disk, a qcow2 file by direct I/O, with the drive beside it, and from the drive itself
/// with no virtio disk, and finds the boot entry of the one before, which was killed. Devices reach each other's memory
/// where the firmware put it.
fn disks(lab: &mut Lab) -> Result<()> {
    let config = zoo()
        .device(Device::edu("edu0"))
        .device(Device::ivshmem("mem0", 16));
    let host = lab.host(&config)?;
    let addresses: Result<Vec<_>> = ["nv0", "edu0", "mem0"]
        .iter()
        .map(|id| host.address(id))
        .collect();
    let addresses = addresses?;
    let [drive, others @ ..] = &addresses[..] else {
        bail!("no devices");
    };
    host.run(&format!("busway device bind {}", addresses.join(" ")))?;
    host.run(BEFORE_FIRMWARE)?;
    let ask = ask();
    let script = format!(
        "{ask}{ENTRIES}\
         value serial $(cat /sys/class/nvme/nvme0/serial)\n\
         value disks \"$(ls -d /sys/block/vd* | grep -c vd)\"\n"
    );
    let run = |opener: &str, then: &str| -> Result<GuestRun> {
        Ok(by_firmware(host)?
            .device(drive)
            .args(&FIRMWARE)
            .opened_by(&format!("{TOOLS}{opener}"))
            .script(&format!("{script}{then}")))
    };
    let started = |result: &GuestResult, disks: &str| -> Result<()> {
        check(result)?;
        ensure!(result.value("serial")? == "NV0");
        ensure!(result.value("disks")? == disks);
        Ok(())
    };
    let clients = host.spawn(CLIENTS)?;
    let virtio = host.start_guest(&run(
        &format!(
            "{DISK}qemu-img convert -O qcow2 /run/esp.img /run/esp.qcow2\n\
             rm /run/esp.img\n\
             exec busway run --disk path=/run/esp.qcow2,image_type=qcow2,direct=on,boot_index=1 \"$@\"\n"
        ),
        "entry /dev/vda 'Before the kill'\nvalue set yes\nsleep 300\n",
    )?)?;
    virtio.wait_line("@@value set yes")?;
    virtio.signal("KILL")?;
    let virtio = virtio.finish()?;
    started(&virtio, "1")?;
    clients.wait(LIMIT)?.success()?;
    let own = run(
        &format!(
            "busway device unbind {drive} >&2\n\
             disk=/dev/nvme0n1\n\
             until [ -b $disk ]; do sleep 0.1; done\n\
             {DISK}sync\n\
             udevadm settle\n\
             busway device bind {drive} >&2\n\
             exec busway run \"$@\"\n"
        ),
        &format!("entries\n{DRIVE}value reached \"$(round $base 3)\"\n"),
    )?;
    let own = others.iter().fold(own, |run, device| run.device(device));
    let own = host.guest(&own)?.success()?;
    started(&own, "0")?;
    let entries = own.block("entries")?;
    ensure!(entries.contains("Before the kill"), "{entries}");
    let reached = own.value("reached")?;
    ensure!(reached == "same", "{reached}: {}", own.stderr);
    Ok(())
}

/// Turns the VMM's command line into that of a guest which has no disk: what it boots is on the network of its NIC.
fn netboot() -> String {
    format!(
        "set -e\n\
         kernel=$4 initramfs=$6 cmdline=$8 served=/lab/{NETBOOT}\n\
         shift 8\n\
         mkdir -p \"$served/grub\"\n\
         cp /usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed \"$served/{BOOT_FILE}\"\n\
         cp \"$kernel\" \"$served/vmlinuz\"\n\
         mv \"$initramfs\" \"$served/initrd\"\n\
         printf 'linux /vmlinuz %s\\ninitrd /initrd\\nboot\\n' \"$cmdline\" >\"$served/grub/grub.cfg\"\n\
         exec busway run \"$@\"\n"
    )
}

/// A guest with no disk at all boots by the driver for UEFI that its NIC has in its own ROM: boot loader, kernel and initial
/// RAM file system come over that NIC.
fn network(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo())?;
    let nic = host.address("nic0")?;
    host.run(&format!("busway device bind {nic}"))?;
    let run = by_firmware(host)?
        .device(&nic)
        .args(&FIRMWARE)
        .opened_by(&netboot())
        .script(&format!(
            "{}value disks \"$(ls /sys/block | grep -cE '^(vd|nvme)')\"\n",
            ask()
        ));
    let result = host.guest(&run)?.success()?;
    tell!("{}", result.transcript.text());
    booted_by_uefi(&result)?;
    // Firmware that has read a ROM leaves ones in its register (edk2, PciOptionRomSupport.c, `RomDecode`), and Linux
    // says of any machine that it finds no place for that.
    let mut complaints = result.block("complaints")?.lines();
    let other = complaints.find(|line| !line.contains(": ROM [mem "));
    ensure!(other.is_none(), "{other:?}");
    ensure!(result.value("disks")? == "0");
    give_back(host, &nic, "e1000e")
}

/// The guest was booted by UEFI on the board that this knows, and its kernel has nothing to say against that.
fn check(result: &GuestResult) -> Result<()> {
    booted_by_uefi(result)?;
    let complaints = result.block("complaints")?.trim();
    ensure!(complaints.is_empty(), "{complaints}");
    Ok(())
}

fn booted_by_uefi(result: &GuestResult) -> Result<()> {
    ensure!(result.value("efi")? == "yes", "{}", result.stderr);
    ensure!(result.value("bridge")? == "0x29c0");
    Ok(())
}
