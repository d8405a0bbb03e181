//! Interrupts of assigned devices in every mode: MSI-X, MSI and INTx of one NIC in one guest, pins
//! that share a line, vectors that move between processors, and that none is lost or doubled.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    DataServer, Device, GuestKernel, GuestResult, GuestRun, Host, HostConfig, Kernel, Lab, Vmm,
    build_lab_pci, edu_sends, exact, exact_while_moved,
};

use crate::assigned::{Interface, guest, word};
use crate::{Proof, Tier, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::rounds(
        "interrupts_in_each_mode_of_one_nic_in_turn_by_group",
        |lab, tier| modes(lab, Interface::Group, tier),
    ),
    Proof::soak(
        "interrupts_in_each_mode_of_one_nic_in_turn_by_cdev",
        |lab, tier| modes(lab, Interface::Cdev, tier),
    ),
    Proof::new(
        "interrupts_of_two_nics_of_one_group_share_a_line_by_group",
        |lab| shared_line(lab, Interface::Group),
    ),
    Proof::soak(
        "interrupts_of_two_nics_of_one_group_share_a_line_by_cdev",
        |lab, _| shared_line(lab, Interface::Cdev),
    ),
    Proof::new(
        "interrupts_move_to_another_processor_by_one_route_update_each",
        affinity,
    ),
    Proof::rounds(
        "interrupts_are_neither_lost_nor_doubled_by_group",
        |lab, tier| counted(lab, Interface::Group, tier),
    ),
    Proof::soak(
        "interrupts_are_neither_lost_nor_doubled_by_cdev",
        |lab, tier| counted(lab, Interface::Cdev, tier),
    ),
    Proof::new(
        "interrupts_that_move_while_they_come_are_neither_lost_nor_doubled",
        moved_while_they_come,
    ),
    Proof::new(
        "interrupts_of_masked_vectors_are_pending_and_come_once_when_the_mask_goes",
        pending,
    ),
    Proof::new(
        "interrupts_of_a_card_without_disable_bit_need_a_line_of_their_own",
        exclusive_line,
    ),
];

/// Root ports have eight lines between them, so that this many devices lie between two that share one.
const BETWEEN: usize = 7;

fn host_config() -> HostConfig {
    let host = HostConfig::new(Kernel::Iommufd)
        .device(Device::e1000e("nic0"))
        .device(Device::e1000("old0"))
        .device(Device::rtl8139("old1"));
    let host = host.device(Device::doorbell("bell0", 4));
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
    host.run(&format!("busway device bind {}", addresses.join(" ")))?;
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

/// `reload MODE` loads the driver anew and takes the link up.
///
/// The driver tests MSI by a cause, RXSEQ, for which the emulated NIC has no mask bit, so that it never
/// interrupts (its IMS reads 0x95 where 0x9d was written), and the driver goes back to the pin: on the
/// host itself and under QEMU as well. Any other interrupt meanwhile shows it that MSI works. So the
/// guest has the NIC say that its link changed, by the NIC's ports, until the driver is content.
const RELOAD: &str = "\
    put() { printf \"$2\" | dd of=$nic/resource2 bs=4 seek=$1 conv=notrunc 2>/dev/null; }\n\
    reload() {\n\
        modprobe -r e1000e; modprobe e1000e IntMode=$1\n\
        [ $1 = 1 ] || { ip link set eth0 up; return; }\n\
        nic=$(readlink -f /sys/class/net/eth0/device)\n\
        printf '\\7' | dd of=$nic/config bs=1 seek=4 conv=notrunc 2>/dev/null\n\
        put 0 '\\310\\0\\0\\0'\n\
        while :; do put 1 '\\4\\0\\0\\0'; done & changing=$!\n\
        ip link set eth0 up; kill $changing; wait $changing || :\n\
    }\n";

/// The driver is loaded anew for each mode, and the interrupts change with it.
fn modes(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let (host, addresses) = bound(lab, &["nic0"])?;
    let server = DataServer::start()?;
    // The driver's parameter: 2 is MSI-X, 1 MSI, 0 the pin.
    let turns: &[u8] = tier.of(&[2, 1, 0], &[2, 1, 0, 1, 2, 0]);
    let mut script = functions(&server) + RELOAD;
    for (turn, mode) in turns.iter().enumerate() {
        let kind = kind_of(*mode);
        script += &format!(
            "for try in 1 2 3 4 5 6; do\n\
                 reload {mode}; ! grep eth0 /proc/interrupts | grep -q {kind} || break\n\
             done\n\
             dhcp eth0; fetch turn{turn} eth0; irqs turn{turn} eth0\n"
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
        count("turns", 1);
        count("interrupts", all);
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

/// An interrupt moves when the next one comes, so there are some until it has.
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
                 after=$((3 - $(cpu))); echo $after >/proc/irq/$irq/smp_affinity\n\
                 until [ $(cpu) = $after ]; do ping -q -c 1 {gateway} >/dev/null; done\n\
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

/// A guest for devices that Linux has no driver for.
fn pci_guest() -> Result<GuestRun> {
    Ok(GuestRun::new(Vmm::Busway)
        .kernel(GuestKernel::StockElf)
        .file("bin/lab-pci", &build_lab_pci()?))
}

/// The address in the guest of its first function of a kind.
fn address_of(kind: &str) -> String {
    format!("$(basename $(dirname $(grep -l {kind} /sys/bus/pci/devices/*/device | head -n 1)))")
}

const EDU: &str = "0x11e8";
const DOORBELL: &str = "0x1110";

/// How many interrupts a device sends: by MSI, by its pin, and by each of four vectors of MSI-X.
struct Sent {
    msi: u64,
    pin: u64,
    each_vector: u64,
}

impl Sent {
    const FEW: Self = Self {
        msi: 20_000,
        pin: 3_000,
        each_vector: 500,
    };
    const MANY: Self = Self {
        msi: 100_000,
        pin: 100_000,
        each_vector: 25_000,
    };
}

/// One after another, each waited for: by MSI, by the pin, and by MSI again; by each vector of MSI-X.
fn counted(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let (host, addresses) = bound(lab, &["edu0", "bell0"])?;
    let Sent {
        msi,
        pin,
        each_vector,
    } = tier.of(&Sent::FEW, &Sent::MANY);
    let script = format!(
        "value msi \"$(lab-pci edu {edu} msi {msi})\"\n\
         value pin \"$(lab-pci edu {edu} intx {pin})\"\n\
         value again \"$(lab-pci edu {edu} msi 1000)\"\n\
         value msix \"$(lab-pci doorbell {bell} {each_vector})\"\n",
        edu = address_of(EDU),
        bell = address_of(DOORBELL),
    );
    let run = addresses
        .iter()
        .fold(pci_guest()?, |run, address| run.device(address))
        .args(&interface.arguments())
        .limit(Duration::from_secs(1200))
        .script(&script);
    let result = host.guest(&run)?.success()?;
    for (key, sent) in [
        ("msi", edu_sends(*msi)),
        ("pin", edu_sends(*pin)),
        ("again", edu_sends(1000)),
        ("msix", 4 * each_vector),
    ] {
        let line = result.value(key)?;
        tell!("{key}: {line}");
        exact(line, sent).context(key)?;
        count("sent", word(line, "sent")?.parse()?);
        count("counted", word(line, "counted")?.parse()?);
    }
    ensure_clean(&result)
}

/// The same, with the interrupts moved to and fro between two processors all the time.
fn moved_while_they_come(lab: &mut Lab) -> Result<()> {
    const MSI: u64 = 4_000;
    const PIN: u64 = 1_000;
    const EACH_VECTOR: u64 = 250;
    let (host, addresses) = bound(lab, &["edu0", "bell0"])?;
    let script = format!(
        "move() {{ # moves what VFIO has until told to end, and says how often it did\n\
             trap 'echo $moves; exit' TERM; moves=0\n\
             while :; do for mask in 1 2; do\n\
                 for irq in $(grep vfio /proc/interrupts | cut -d : -f 1); do\n\
                     ! echo $mask >/proc/irq/$irq/smp_affinity || moves=$((moves + 1))\n\
                 done; done; done 2>/dev/null\n\
         }}\n\
         while_moving() {{\n\
             move >/tmp/moves & mover=$!\n\
             value $1 \"$($2)\"; kill $mover; wait $mover || :; value $1-moves $(cat /tmp/moves)\n\
         }}\n\
         while_moving msi \"lab-pci edu {edu} msi {MSI}\"\n\
         while_moving pin \"lab-pci edu {edu} intx {PIN}\"\n\
         while_moving msix \"lab-pci doorbell {bell} {EACH_VECTOR}\"\n",
        edu = address_of(EDU),
        bell = address_of(DOORBELL),
    );
    let run = addresses
        .iter()
        .fold(pci_guest()?, |run, address| run.device(address))
        .cpus(2)
        .args(&Interface::Cdev.arguments())
        .script(&script);
    let result = host.guest(&run)?.success()?;
    for (key, sent) in [
        ("msi", edu_sends(MSI)),
        ("pin", edu_sends(PIN)),
        ("msix", 4 * EACH_VECTOR),
    ] {
        let line = result.value(key)?;
        let moves = result.value(&format!("{key}-moves"))?;
        tell!("{key}: {line}, moved {moves} times");
        exact_while_moved(line, sent).context(key)?;
        ensure!(moves.parse::<u64>()? >= 20, "{key}: moved {moves} times");
    }
    ensure_clean(&result)
}

/// What the device sends on a masked vector shows among the pending bits, and there only.
fn pending(lab: &mut Lab) -> Result<()> {
    let (host, addresses) = bound(lab, &["bell0"])?;
    let run = pci_guest()?.device(&addresses[0]).script(&format!(
        "value pending \"$(lab-pci pending {} 500)\"\n",
        address_of(DOORBELL)
    ));
    let result = host.guest(&run)?.success()?;
    exact(result.value("pending")?, 4 * 500)
}

/// VFIO told to use no card's interrupt disable bit, and four NICs that keep the host's four lines
/// for such slots busy.
fn without_disable_bit() -> HostConfig {
    let host = HostConfig::new(Kernel::Iommufd)
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
