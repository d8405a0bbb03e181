//! BARs of every kind, ROMs, resets and power states, as a guest finds them.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    Device, GuestKernel, GuestRun, Host, HostConfig, Iommu, Kernel, Lab, Profile, Vmm, build_static,
};

use crate::assigned::{self, Interface, bound, give_back, word, zoo};
use crate::emulated_host::check_groups;
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "bars_of_1_and_4_gib_are_all_reachable_without_exits_by_cdev",
        |lab| large(lab, Interface::Cdev),
    ),
    Proof::soak(
        "bars_of_1_and_4_gib_are_all_reachable_without_exits_by_group",
        |lab, _| large(lab, Interface::Group),
    ),
    Proof::new(
        "bars_of_ports_and_of_less_than_a_page_are_the_devices_own",
        small,
    ),
    Proof::new("roms_are_the_devices_own_a_files_or_none", roms),
    Proof::new(
        "bars_of_a_drive_that_is_reset_or_asleep_are_gone_and_come_back",
        resets,
    ),
    Proof::new(
        "bars_of_512_mib_below_4_gib_have_room_and_the_guest_has_all_its_ram",
        below_4_gib,
    ),
    Proof::new(
        "bars_and_windows_keep_clear_of_what_amds_iommu_reserves",
        amd,
    ),
];

fn host() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .device(Device::e1000("old1"))
        .device(Device::rtl8139("old2"))
}

/// The same small memory beside devices with a lot of their own.
fn large_host() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .memory_mib(3072)
        .device(Device::ivshmem("mem1", 1024))
        .device(Device::ivshmem("mem4", 4096))
}

fn guest() -> Result<GuestRun> {
    Ok(GuestRun::new(Vmm::Busway).file("bin/lab-bars", &lab_bars()?))
}

fn lab_bars() -> Result<std::path::PathBuf> {
    build_static("busway-lab", "lab-bars", Profile::Lab)
}

/// Runs `lab-bars` on this machine, on the file behind a device.
fn outside(host: &Host, id: &str, action: &str, seed: u32) -> Result<()> {
    let output = Command::new(lab_bars()?)
        .arg(action)
        .arg(host.shared_memory(id)?)
        .arg(seed.to_string())
        .output()
        .context("cannot run lab-bars")?;
    ensure!(
        output.status.success(),
        "{action} of {id}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// What was put there outside is found in every page inside; what the guest writes into every word is
/// found outside. Nothing of it leaves the guest but the first touch of each huge page: the other exits
/// are the processor's own.
fn large(lab: &mut Lab, interface: Interface) -> Result<()> {
    let host = lab.host(&large_host())?;
    let addresses = bind(host, &["mem1", "mem4"])?;
    let devices = [("mem1", 1024_u64), ("mem4", 4096)];
    for (seed, (id, _)) in (21..).zip(devices) {
        outside(host, id, "sprinkle", seed)?;
    }
    // Both are 1af4:1110, in the order in which they were given.
    let mut script = String::from("set -- $(grep -l 0x1110 /sys/bus/pci/devices/*/device)\n");
    for (seed, (id, _)) in (21..).zip(devices) {
        script += &format!(
            "f=${{1%/device}}; shift\n\
             echo 1 >$f/enable\n\
             value size_{id} $(stat -c %s $f/resource2)\n\
             value decode_{id} \"$(lab-bars decode $f 4)\"\n\
             mark before_{id}\n\
             value find_{id} \"$(lab-bars find $f/resource2 {seed})\"\n\
             value fill_{id} \"$(lab-bars fill $f/resource2 {})\"\n\
             mark after_{id}\n",
            seed + 10
        );
    }
    let run = guest()?
        .kernel(GuestKernel::StockElf)
        .device(&addresses[0])
        .device(&addresses[1])
        .args(&interface.arguments())
        .limit(Duration::from_secs(600))
        .script(&script);
    let result = host.guest(&run)?.success()?;
    for (seed, (id, size_mib)) in (31..).zip(devices) {
        let size = result.value(&format!("size_{id}"))?;
        ensure!(size == (size_mib << 20).to_string(), "{id}: {size} bytes");
        outside(host, id, "check", seed)?;
        let mark = |mark| result.marks.get(&format!("{mark}_{id}"));
        let (before, after) = mark("before").zip(mark("after")).context("no marks")?;
        let grown = |counter| after.since(before, counter).unwrap_or_default();
        let said = |what: &str| result.value(&format!("{what}_{id}"));
        let mut milliseconds = 0;
        for what in ["find", "fill"] {
            milliseconds += word(said(what)?, "milliseconds")?.parse::<u64>()?;
        }
        let exits = grown("exits");
        tell!(
            "{id} {interface:?}: find {}; fill {}; decode {}; exits {exits}, to user space {}",
            said("find")?,
            said("fill")?,
            said("decode")?,
            grown("mmio_exits"),
        );
        // One for each page of 4 KiB would be 262144 a GiB; the timer takes a few each 10 ms.
        let allowed = 4000 + milliseconds * 4;
        ensure!(
            exits < allowed && grown("mmio_exits") < 200,
            "{id}: {exits} exits, {} of them for MMIO, in {milliseconds} ms",
            grown("mmio_exits")
        );
    }
    Ok(())
}

/// Binds devices of a host.
fn bind(host: &Host, ids: &[&str]) -> Result<Vec<String>> {
    let addresses: Result<Vec<_>> = ids.iter().map(|id| host.address(id)).collect();
    let addresses = addresses?;
    host.run(&format!("busway device bind {}", addresses.join(" ")))?;
    Ok(addresses)
}

/// The registers of an old card by ports and by memory: the same, at every width. Neither of its BARs
/// has a page's size, and another card shares its group.
fn small(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host())?;
    let addresses = bind(host, &["old1", "old2"])?;
    let script = "\
        f=$(dirname $(grep -l 0x8139 /sys/bus/pci/devices/*/device))\n\
        [ -L $f/driver ] && basename $f >$f/driver/unbind\n\
        echo 1 >$f/enable\n\
        value ports \"$(lab-bars get $f/resource0 0) $(lab-bars get $f/resource0 4)\"\n\
        value memory \"$(lab-bars peek $f/resource1 0) $(lab-bars peek $f/resource1 4)\"\n\
        value size \"$(stat -c %s $f/resource1)\"\n";
    let run = guest()?
        .device(&addresses[0])
        .device(&addresses[1])
        .script(script);
    let result = host.guest(&run)?.success()?;
    let [ports, memory] = [result.value("ports")?, result.value("memory")?];
    // Its MAC address, 52:54:00:12:…, as the emulator gives it.
    ensure!(
        ports == memory && ports.starts_with("value=0x12005452"),
        "{ports} by ports, {memory} by memory"
    );
    ensure!(result.value("size")? == "256", "{}", result.value("size")?);
    Ok(())
}

/// A guest with a NIC's own ROM, the same as `romfile=` of a drive that has none, and `rom=off` for
/// another NIC; no ROM at all where a drive has none.
fn roms(lab: &mut Lab) -> Result<()> {
    let (host, nic) = bound(lab, "nic0")?;
    let other = bind(host, &["nic1"])?.remove(0);
    let drive = bind(host, &["nv0"])?.remove(0);
    let on_host = host.run(&format!(
        "cd /sys/bus/pci/devices/{nic} && echo on >power/control && echo 1 >rom && cat rom >/lab/rom.bin; \
         echo 0 >rom; echo auto >power/control; sha256sum </lab/rom.bin; stat -c %s /lab/rom.bin"
    ))?;
    let mut words = on_host.split_ascii_whitespace();
    let sum = words.next().context("no sum")?;
    let size: u64 = words.nth(1).context("no size")?.parse()?;
    ensure!(size > 0, "the host finds no ROM");
    let script = "\
        rom() { f=$(dirname $(grep -l $1 /sys/bus/pci/devices/*/device))/rom\n\
        [ -f $f ] || { echo none; return; }; echo 1 >$f; sha256sum <$f | cut -d ' ' -f 1; echo 0 >$f; }\n\
        value nic $(rom 0x10d3)\nvalue again $(rom 0x10d3)\nvalue other $(rom 0x10c9)\n\
        value drive $(rom 0x0010)\n";
    let run = GuestRun::new(Vmm::Busway)
        .device(&nic)
        .device(&format!("{other},rom=off"))
        .device(&format!("{drive},romfile=/lab/rom.bin"))
        .script(script);
    let result = host.guest(&run)?.success()?;
    for (key, wanted) in [
        ("nic", sum),
        ("again", sum),
        ("other", "none"),
        ("drive", sum),
    ] {
        let found = result.value(key)?;
        ensure!(found == wanted, "{key}: {found}, not {wanted}");
    }
    give_back(host, &nic, "e1000e")?;
    give_back(host, &other, "igb")?;
    give_back(host, &drive, "nvme")
}

/// The guest's kernel resets the drive by its function level reset, with a reader at its registers;
/// then the guest puts it into D3hot and back, again with a reader, who finds ones and never more.
fn resets(lab: &mut Lab) -> Result<()> {
    for interface in [Interface::Group, Interface::Cdev] {
        let (host, drive) = bound(lab, "nv0")?;
        let script = "\
            f=$(readlink -f /sys/class/nvme/nvme0/device)\n\
            value method \"$(cat $f/reset_method)\"\n\
            value write \"$(lab-io write /dev/nvme0n1 41)\"\n\
            echo flr >$f/reset_method\n\
            for i in 1 2 3; do echo 1 >$f/reset; done\n\
            value read \"$(lab-io verify /dev/nvme0n1 41)\"\n\
            basename $f >$f/driver/unbind\n\
            value sleep \"$(lab-bars sleep $f 8)\"\n\
            value reset \"$(lab-bars reset $f 3)\"\n\
            basename $f >/sys/bus/pci/drivers/nvme/bind\n\
            until [ -b /dev/nvme0n1 ]; do sleep 0.2; done\n\
            value again \"$(lab-io verify /dev/nvme0n1 41)\"\n";
        let run = crate::assigned::guest()?
            .file("bin/lab-bars", &lab_bars()?)
            .cpus(2)
            .device(&drive)
            .args(&interface.arguments())
            .script(script);
        let result = host.guest(&run)?.success()?;
        ensure!(
            result.value("method")?.contains("flr"),
            "{}",
            result.value("method")?
        );
        let sleep = result.value("sleep")?;
        let ones: u64 = word(sleep, "ones")?.parse()?;
        ensure!(ones > 0, "nobody saw it asleep: {sleep}");
        eprintln!("{interface:?}: {sleep}; {}", result.value("reset")?);
    }
    let (host, drive) = bound(lab, "nv0")?;
    give_back(host, &drive, "nvme")
}

/// Two frame buffers of 256 MiB below 4 GiB: with the windows of their ports more than lies above 3 GiB. RAM
/// ends at 2 GiB and goes on at 4 GiB, the guest's kernel places nothing anew, and all of both BARs is reached.
fn below_4_gib(lab: &mut Lab) -> Result<()> {
    const RAM_MIB: u64 = 3072;
    let host = HostConfig::new(Kernel::Iommufd)
        .device(Device::display("fb1", 256))
        .device(Device::display("fb2", 256));
    let host = lab.host(&host)?;
    let addresses = bind(host, &["fb1", "fb2"])?;
    let script = "\
        value ram $(sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo)\n\
        value map \"$(grep 'System RAM' /proc/iomem | tr '\\n' ' ')\"\n\
        value anew \"$(dmesg | grep -c \"can't claim\\|no compatible bridge window\\|failed to assign\")\"\n\
        n=0\n\
        for f in $(grep -l 0x1111 /sys/bus/pci/devices/*/device); do\n\
            f=${f%/device} n=$((n + 1))\n\
            echo 1 >$f/enable\n\
            bar=$(sed -n 1p $f/resource | cut -d ' ' -f 1)\n\
            for at in $((bar)) $((bar + 0xffffff8)); do devmem $at 64 0x$n; done\n\
            value bar$n \"$bar $(devmem $((bar)) 64) $(devmem $((bar + 0xffffff8)) 64)\"\n\
        done\n";
    let run = guest()?
        .memory_mib(RAM_MIB)
        .device(&addresses[0])
        .device(&addresses[1])
        .script(script);
    let result = host.guest(&run)?.success()?;
    let ram: u64 = result.value("ram")?.parse()?;
    // The kernel keeps a little for itself.
    ensure!(
        ram > (RAM_MIB - 256) << 10,
        "{ram} KiB of {RAM_MIB} MiB are there"
    );
    let map = result.value("map")?;
    ensure!(
        map.contains("-7fffffff ") && map.contains("100000000-13fffffff "),
        "RAM does not end at 2 GiB and go on at 4 GiB: {map}"
    );
    ensure!(
        result.value("anew")? == "0",
        "the guest's kernel found windows wanting"
    );
    for (number, key) in (1..).zip(["bar1", "bar2"]) {
        let words: Vec<_> = result.value(key)?.split(' ').collect();
        let wanted = format!("0x{number:016x}");
        ensure!(
            words.len() == 3
                && words[1..]
                    .iter()
                    .all(|word| word.eq_ignore_ascii_case(&wanted)),
            "{key}: {words:?}"
        );
    }
    Ok(())
}

/// Behind AMD's IOMMU devices are alone in their groups, and a drive keeps what a guest writes. These IOMMUs reserve
/// 1012 to 1024 GiB, which a guest with wide addresses has within its 64-bit window: no window of its host bridge reaches
/// in.
fn amd(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo().iommu(Iommu::Amd))?;
    host.run("test -c /dev/kvm && test -c /dev/iommu")?;
    check_groups(host)?;
    let drive = bind(host, &["nv0"])?.remove(0);
    let script = "until [ -b /dev/nvme0n1 ]; do sleep 0.1; done\n\
         { lab-io write /dev/nvme0n1 3 && lab-io verify /dev/nvme0n1 3; } >/dev/null && value verified yes\n\
         value windows \"$(grep 'PCI Bus 0000:00' /proc/iomem | cut -d ' ' -f 1 | tr '\\n' ' ')\"\n";
    let run = assigned::guest()?.device(&drive).script(script);
    let result = host.guest(&run)?.success()?;
    ensure!(result.value("verified")? == "yes");
    let windows = result.value("windows")?;
    let mut above = 0;
    for window in windows.split_ascii_whitespace() {
        let (start, last) = window.split_once('-').context("no range")?;
        let [start, last] = [start, last].map(|digits| u64::from_str_radix(digits, 16));
        let (start, last) = (start?, last?);
        ensure!(
            last < 0xfd_0000_0000 || start >= 1 << 40,
            "a window reaches into what is reserved: {windows}"
        );
        above += u32::from(start >= 1 << 32);
    }
    ensure!(above > 0, "there is no 64-bit window: {windows}");
    give_back(host, &drive, "nvme")
}
