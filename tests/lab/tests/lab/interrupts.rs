//! Interrupts of assigned devices in every mode: MSI-X, MSI and INTx of one NIC in one guest, pins
//! that share a line, and vectors that move between processors.

use anyhow::{Context, Result, ensure};
use busway_lab::{DataServer, Device, GuestResult, Host, HostConfig, Kernel, Lab};

use crate::Proof;
use crate::assigned::{Interface, guest};

pub(crate) const PROOFS: &[Proof] = &[
    (
        "interrupts_in_each_mode_of_one_nic_in_turn_by_group",
        |lab| modes(lab, Interface::Group),
    ),
    (
        "interrupts_in_each_mode_of_one_nic_in_turn_by_cdev",
        |lab| modes(lab, Interface::Cdev),
    ),
    (
        "interrupts_of_two_nics_of_one_group_share_a_line_by_group",
        |lab| shared_line(lab, Interface::Group),
    ),
    (
        "interrupts_of_two_nics_of_one_group_share_a_line_by_cdev",
        |lab| shared_line(lab, Interface::Cdev),
    ),
    (
        "interrupts_move_to_another_processor_by_one_route_update_each",
        affinity,
    ),
    (
        "interrupts_of_a_card_without_disable_bit_need_a_line_of_their_own",
        exclusive_line,
    ),
];

/// Root ports have eight lines between them, so that this many devices lie between two that share one.
const BETWEEN: usize = 7;

fn host_config() -> HostConfig {
    let host = HostConfig::new(Kernel::Small)
        .device(Device::e1000e("nic0"))
        .device(Device::e1000("old0"))
        .device(Device::rtl8139("old1"));
    (0..BETWEEN).fold(host, |host, number| {
        host.device(Device::edu(&format!("edu{number}")))
    })
}

/// The host, and the addresses there of these devices, which VFIO has by now.
fn bound<'lab>(lab: &'lab mut Lab, ids: &[&str]) -> Result<(&'lab Host, Vec<String>)> {
    let host = lab.host(&host_config())?;
    let addresses: Vec<_> = ids
        .iter()
        .map(|id| host.address(id))
        .collect::<Result<_>>()?;
    for address in &addresses {
        host.run(&format!("busway device bind {address}"))?;
    }
    Ok((host, addresses))
}

const BYTES: u64 = 2_000_000;

/// Shell functions: `fetch NAME INTERFACE` takes the bytes and sends them back, and `irqs NAME
/// INTERFACE` says which interrupts have arrived.
fn functions(server: &DataServer) -> String {
    format!(
        "fetch() {{ wget -q -O /tmp/$2 {}; value $1-sum $(sha256sum </tmp/$2 | cut -d ' ' -f 1)\n\
         value $1-sent $(upload {} {} /tmp/$2); rm /tmp/$2; }}\n\
         irqs() {{ grep $2 /proc/interrupts | block $1-irqs; }}\n",
        server.url(BYTES, 5),
        busway_lab::GATEWAY,
        server.port(),
    )
}

fn ensure_moved(result: &GuestResult, name: &str) -> Result<()> {
    let sum = DataServer::sha256(BYTES, 5);
    for way in ["sum", "sent"] {
        let found = result.value(&format!("{name}-{way}"))?;
        ensure!(found == sum, "{name}: {way} is {found}, not {sum}");
    }
    Ok(())
}

/// The lines of `/proc/interrupts` that the guest gave: how many interrupts on all processors, and
/// what they are.
fn irqs(result: &GuestResult, name: &str) -> Result<Vec<(u64, String)>> {
    let block = result.block(&format!("{name}-irqs"))?;
    let lines = block.lines().map(|line| {
        let (_, rest) = line.split_once(':').context("a line has a number")?;
        let words: Vec<&str> = rest.split_ascii_whitespace().collect();
        let counts = words.iter().map_while(|word| word.parse::<u64>().ok());
        let kind = words.iter().skip_while(|word| word.parse::<u64>().is_ok());
        let kind: Vec<&str> = kind.copied().collect();
        Ok((counts.sum(), kind.join(" ")))
    });
    lines.collect()
}

/// How the guest names the interrupts of a mode.
fn kind_of(mode: u8) -> &'static str {
    match mode {
        2 => "PCI-MSIX",
        1 => "PCI-MSI-",
        _ => "IO-APIC",
    }
}

/// The driver is loaded anew for each mode, and the interrupts change with it.
fn modes(lab: &mut Lab, interface: Interface) -> Result<()> {
    let (host, addresses) = bound(lab, &["nic0"])?;
    let server = DataServer::start()?;
    // The driver's parameter: 2 is MSI-X, 1 MSI, 0 the pin.
    let turns: [u8; 6] = [2, 1, 0, 1, 2, 0];
    let mut script = functions(&server);
    for (turn, mode) in turns.iter().enumerate() {
        let kind = kind_of(*mode);
        // The driver turns to the pin where an MSI that it sends itself takes more than 100 ms, as it
        // can under emulation; so it may try a few times.
        script += &format!(
            "for try in 1 2 3 4 5 6; do\n\
                 modprobe -r e1000e; modprobe e1000e IntMode={mode}; dhcp eth0\n\
                 ! grep eth0 /proc/interrupts | grep -q {kind} || break\n\
             done\n\
             fetch turn{turn} eth0; irqs turn{turn} eth0\n"
        );
    }
    let run = guest()?
        .device(&addresses[0])
        .args(&interface.arguments())
        .script(&script);
    let result = host.guest(&run)?.success()?;
    for (turn, mode) in turns.iter().enumerate() {
        let name = format!("turn{turn}");
        ensure_moved(&result, &name)?;
        let irqs = irqs(&result, &name)?;
        let kind = kind_of(*mode);
        let lines = if *mode == 2 { 3 } else { 1 };
        let all: u64 = irqs.iter().map(|(count, _)| count).sum();
        ensure!(
            irqs.len() == lines && irqs.iter().all(|(_, what)| what.contains(kind)) && all > 20,
            "turn {turn}, mode {mode}: {irqs:?}"
        );
    }
    ensure_clean(&result)
}

/// No driver in the guest waited for an interrupt in vain, and none came that nobody wanted.
fn ensure_clean(result: &GuestResult) -> Result<()> {
    let console = result.transcript.text();
    let bad = [
        "nobody cared",
        "Failed to initialize MSI",
        "Hang",
        "timed out",
    ];
    match console
        .lines()
        .find(|line| bad.iter().any(|words| line.contains(words)))
    {
        Some(line) => anyhow::bail!("the guest complains: {line}"),
        None => Ok(()),
    }
}

/// Both NICs of the group behind a bridge, at once, on one line of the guest's interrupt controller.
fn shared_line(lab: &mut Lab, interface: Interface) -> Result<()> {
    let between: Vec<String> = (0..BETWEEN).map(|number| format!("edu{number}")).collect();
    let ids = ["old0"]
        .into_iter()
        .chain(between.iter().map(String::as_str));
    let ids: Vec<&str> = ids.chain(["old1"]).collect();
    let (host, addresses) = bound(lab, &ids)?;
    let server = DataServer::start()?;
    // Each in a network of its own, for both have the same addresses. The guest's first program is a
    // script, and its functions are wanted in the other network as well.
    let script = format!(
        "sed '1,/^ip link set lo/d; /^value booted/,$d' /init >/tmp/functions\n\
         cat >>/tmp/functions <<'END'\n{}END\n. /tmp/functions\n\
         for nic in eth0 eth1; do\n\
             value driver-$nic $(basename $(readlink /sys/class/net/$nic/device/driver)); done\n\
         unshare -n sleep 100000 & other=$!\n\
         until [ $(readlink /proc/$other/ns/net) != $(readlink /proc/self/ns/net) ]; do :; done\n\
         ip link set eth1 netns $other\n\
         there() {{ nsenter -t $other -n sh -c \". /tmp/functions; $*\"; }}\n\
         dhcp eth0; there dhcp eth1\n\
         fetch here eth0 & here=$!; there fetch there eth1 & there=$!\n\
         wait $here; wait $there; irqs both eth0; kill $other\n",
        functions(&server)
    );
    let run = addresses
        .iter()
        .fold(guest()?, |run, address| run.device(address))
        .args(&interface.arguments())
        .script(&script);
    let result = host.guest(&run)?.success()?;
    let mut drivers = [result.value("driver-eth0")?, result.value("driver-eth1")?];
    drivers.sort_unstable();
    ensure!(drivers == ["8139cp", "e1000"], "{drivers:?}");
    for name in ["here", "there"] {
        ensure_moved(&result, name)?;
    }
    let irqs = irqs(&result, "both")?;
    let [(count, what)] = &irqs[..] else {
        anyhow::bail!("not one line: {irqs:?}");
    };
    ensure!(
        what.starts_with("IO-APIC 16-fasteoi") && what.contains("eth0") && what.contains("eth1"),
        "they do not share: {what}"
    );
    ensure!(*count > 100, "{count} interrupts");
    ensure_clean(&result)
}

const MOVES: u64 = 20;

/// An interrupt that moves when the next one comes, so each time one does.
fn affinity(lab: &mut Lab) -> Result<()> {
    let (host, addresses) = bound(lab, &["nic0"])?;
    let run = guest()?
        .cpus(2)
        .device(&addresses[0])
        .args(&Interface::Cdev.arguments())
        .script(&format!(
            "dhcp eth0\nirq=$(grep eth0-rx /proc/interrupts | cut -d : -f 1 | tr -d ' ')\n\
             ping -q -c 1 {gateway} >/dev/null\n\
             cpu() {{ case $(cat /proc/irq/$irq/effective_affinity) in *1) echo 1;; *2) echo 2;; esac; }}\n\
             for turn in $(seq {MOVES}); do\n\
                 before=$(cpu); echo $((3 - before)) >/proc/irq/$irq/smp_affinity\n\
                 ping -q -c 1 {gateway} >/dev/null\n\
                 [ $(cpu) = $((3 - before)) ]\n\
             done\n",
            gateway = busway_lab::GATEWAY,
        ));
    let result = host.guest(&run)?.success()?;
    let report = result.report.as_ref().context("Busway wrote no report")?;
    let moves = &report["vector_updates"];
    ensure!(
        moves.as_u64() == Some(MOVES),
        "{moves} updates for {MOVES} moves"
    );
    // Receive, transmit and link: what the guest unmasked, and no more.
    ensure!(report["vectors"].as_u64() == Some(3), "{report}");
    Ok(())
}

/// VFIO told to use no card's interrupt disable bit, and four NICs that keep the host's four lines
/// for such slots busy.
fn without_disable_bit() -> HostConfig {
    let host = HostConfig::new(Kernel::Small)
        .cmdline("vfio_pci.nointxmask=1 e1000e.IntMode=0,0,0,0")
        .device(Device::e1000("old0"));
    (0..4).fold(host, |host, number| {
        host.device(Device::e1000e(&format!("nic{number}")))
    })
}

/// While another driver is on the line the card is refused, and that driver named; then the card has
/// the line for itself, which VFIO masks as a whole, and works.
fn exclusive_line(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&without_disable_bit())?;
    let address = host.address("old0")?;
    for number in 0..4 {
        let nic = host.address(&format!("nic{number}"))?;
        host.run(&format!(
            "ip link set $(ls /sys/bus/pci/devices/{nic}/net) up"
        ))?;
    }
    host.run(&format!("busway device bind {address}"))?;
    let server = DataServer::start()?;
    let run = guest()?
        .device(&address)
        .script(&(functions(&server) + "dhcp eth0; fetch alone eth0; irqs alone eth0\n"));
    let irq = host.run(&format!("cat /sys/bus/pci/devices/{address}/irq"))?;
    let irq = irq.trim();
    let user = host.run(&format!("cat /sys/kernel/irq/{irq}/actions"))?;
    let user = user.trim();
    ensure!(!user.is_empty(), "nobody is on line {irq}");
    let refused = host.guest(&run)?;
    let words = format!("host interrupt line {irq} is also used by {user}");
    ensure!(
        refused.status == 3 && refused.stderr.contains(&words),
        "status {}: {}",
        refused.status,
        refused.stderr
    );
    host.run(&format!("ip link set {user} down"))?;
    let result = host.guest(&run)?.success()?;
    ensure_moved(&result, "alone")?;
    ensure_clean(&result)
}
