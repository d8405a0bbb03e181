//! BARs of ports and of less than a page, and ROMs, as a guest finds them.

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestRun, Host, HostConfig, Kernel, Lab, Profile, Vmm, build_static};

use crate::Proof;
use crate::assigned::{bound, give_back};

pub(crate) const PROOFS: &[Proof] = &[
    (
        "bars_of_ports_and_of_less_than_a_page_are_the_devices_own",
        small,
    ),
    ("roms_are_the_devices_own_a_files_or_none", roms),
];

fn host() -> HostConfig {
    HostConfig::new(Kernel::Small)
        .device(Device::e1000("old1"))
        .device(Device::rtl8139("old2"))
}

fn guest() -> Result<GuestRun> {
    Ok(GuestRun::new(Vmm::Busway).file("bin/lab-bars", &lab_bars()?))
}

fn lab_bars() -> Result<std::path::PathBuf> {
    build_static("busway-lab", "lab-bars", Profile::Lab)
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
        "cd /sys/bus/pci/devices/{nic} && echo 1 >rom && cat rom >/lab/rom.bin; echo 0 >rom; \
         sha256sum </lab/rom.bin; stat -c %s /lab/rom.bin"
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
