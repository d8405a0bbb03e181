//! Mediated devices: the kernel's samples of a serial card and a display, which are no PCI devices of the host's.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{Host, HostConfig, Kernel, Lab};

use crate::assigned::{Interface, guest};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "a_mediated_card_and_display_serve_come_and_go_by_group",
        |lab| serve(lab, Interface::Group),
    ),
    Proof::new(
        "a_mediated_card_and_display_serve_come_and_go_by_cdev",
        |lab| serve(lab, Interface::Cdev),
    ),
];

const CTL: &str = "busway ctl --api-socket /run/vm.sock";

/// Two ports, there from the start.
const CARD: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
/// The same, plugged in later.
const PLUGGED: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1002";
/// With a memory BAR.
const DISPLAY: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1003";

/// What the guest does with a card: a line through its port and back, by its interrupt. Its driver is the kernel's own
/// (4348:3253) and sends when the pin says that it can. Less than sixteen bytes come back at once, for the card holds a
/// full ring of sixteen to be empty (Linux, samples/vfio-mdev/mtty.c).
const CARDS: &str = r#"
cards() { grep -l 0x4348 /sys/bus/pci/devices/*/vendor 2>/dev/null | wc -l; }
port() { # NUMBER: the first port of that card
    card=$(grep -l 0x4348 /sys/bus/pci/devices/*/vendor | sed -n "$1p" | cut -d / -f 6)
    find /sys/devices -path "*$card*" -name 'ttyS*' | sort | head -n 1 | xargs basename
}
echoed() { # PORT TEXT: what comes back, and how often the port interrupted
    exec 5<>/dev/$1
    stty -F /dev/$1 raw -echo clocal
    printf '%s\n' "$2" >&5
    IFS= read -r -t 20 back <&5 || back=nothing
    counts=$(grep -w "$1" /proc/interrupts | cut -d : -f 2 | awk '{ print $1 + $2 }')
    exec 5>&-
    echo "$back after $counts interrupts"
}
"#;

/// What came back from a port, and that it was told of by interrupts.
fn came_back(said: &str, text: &str) -> Result<()> {
    let after = said.strip_prefix(text).unwrap_or_default();
    let count = after.split_ascii_whitespace().nth(1).unwrap_or("0");
    tell!("from the port: {said}");
    ensure!(
        count.parse().is_ok_and(|count: u64| count > 0),
        "{text}: {said}"
    );
    Ok(())
}

fn made(host: &Host) -> Result<()> {
    host.run(&format!(
        "modprobe -a mtty mbochs\n\
         make() {{ echo $1 > /sys/class/mdev_bus/$2/mdev_supported_types/$3/create; }}\n\
         make {CARD} mtty mtty-2\n\
         make {PLUGGED} mtty mtty-2\n\
         make {DISPLAY} mbochs mbochs-small\n\
         udevadm settle"
    ))
    .map(drop)
}

fn serve(lab: &mut Lab, interface: Interface) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd))?;
    made(host)?;
    let listed = host.run("busway device list")?;
    tell!("{listed}");
    for words in [CARD, DISPLAY, "Dual port serial", "mbochs-small"] {
        ensure!(listed.contains(words), "no {words} in the list");
    }
    host.run(&format!("busway device check {CARD} {DISPLAY} {PLUGGED}"))?;

    let [_, way] = interface.arguments();
    let platform = format!("{way},hotplug_slots=2,hotplug_mmio64=64M");
    let run = guest()?
        .device(CARD)
        .device(DISPLAY)
        .args(&["--platform", &platform, "--api-socket", "/run/vm.sock"])
        .limit(Duration::from_secs(180))
        .script(&format!(
            "{CARDS}\
             value card \"$(echoed $(port 1) first-card)\"\n\
             display=$(grep -l 0x1111 /sys/bus/pci/devices/*/device | cut -d / -f 6)\n\
             echo 1 >/sys/bus/pci/devices/$display/enable\n\
             at=$(head -n 1 /sys/bus/pci/devices/$display/resource | cut -d ' ' -f 1)\n\
             devmem $((at + 0x1000)) 32 0x600df00d\n\
             devmem $((at + 0x2000)) 32 0\n\
             value display $(devmem $((at + 0x1000)) 32)\n\
             until [ \"$(cards)\" = 2 ] && port=$(port 2) && [ -n \"$port\" ]; do sleep 0.1; done\n\
             value plugged \"$(echoed $port second-card)\"\n\
             until [ \"$(cards)\" = 1 ]; do sleep 0.1; done\n\
             value left \"$(echoed $(port 1) card-left)\"\n\
             until_pressed waiting\n\
             dmesg | grep -E 'ttyS|4348|1234:1111|pciehp' | block log\n"
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value display")?;
    // The kernel waits for the card's user, whom its driver does not tell.
    let removal = host.spawn(&format!("echo 1 > /sys/bus/mdev/devices/{CARD}/remove"))?;
    let going = format!("{{ busway device check {CARD} || true; }} | grep 'being removed'");
    let said = host.run(&format!("until {going}; do sleep 0.1; done"))?;
    tell!("while it is removed: {said}");
    tell!("{}", host.run(&format!("{CTL} add-device {PLUGGED}"))?);
    running.wait_line("@@value plugged")?;
    let again = host.run(&format!("{CTL} add-device {PLUGGED} 2>&1 || true"))?;
    ensure!(
        again.contains(PLUGGED) && again.contains("already"),
        "{again}"
    );
    let info = host.run(&format!("{CTL} info"))?;
    ensure!(info.contains(CARD) && info.contains(PLUGGED), "{info}");
    ensure!(removal.is_running(), "it went from under its guest");
    tell!("{}", host.run(&format!("{CTL} remove-device {CARD}"))?);
    removal.wait(Duration::from_secs(60))?.success()?;
    running.wait_line("@@value waiting")?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    tell!("the guest's log:\n{}", result.block("log")?);
    came_back(result.value("card")?, "first-card")?;
    came_back(result.value("plugged")?, "second-card")?;
    came_back(result.value("left")?, "card-left")?;
    ensure!(
        result.value("display")? == "0x600DF00D",
        "the display's memory reads {}",
        result.value("display")?
    );
    // Nobody holds them any more.
    host.run(&format!(
        "for each in {PLUGGED} {DISPLAY}; do echo 1 > /sys/bus/mdev/devices/$each/remove; done\n\
         [ -z \"$(ls /sys/bus/mdev/devices)\" ] && modprobe -r mtty mbochs"
    ))?;
    Ok(())
}
