//! DMA: what devices reach, of the guest's memory and of each other's, and the limits and descriptors
//! that this takes.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestResult, GuestRun, Host, HostConfig, Kernel, Lab, Parts, Vmm};

use crate::assigned::{Interface, guest};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "dma_devices_reach_each_other_by_type1_and_lose_it_when_a_bar_goes",
        |lab| {
            let host = pair(lab)?;
            peer_to_peer(&host, "iommufd=off,p2p=on").map(drop)
        },
    ),
    Proof::new(
        "dma_auto_takes_the_container_where_iommufd_maps_no_device",
        auto_without_dma_buf,
    ),
    Proof::new(
        "dma_without_dma_bufs_is_said_once_and_the_guest_runs",
        without_dma_buf,
    ),
    Proof::new(
        "dma_an_unprivileged_busway_runs_with_descriptors_opened_by_somebody_else",
        handed_over,
    ),
    Proof::new("dma_limits_are_foreseen_with_exact_figures", limits),
    Proof::new("dma_a_guest_of_huge_pages_has_its_drive", huge_pages),
    Proof::new(
        "dma_devices_reach_each_other_by_dma_buf_and_lose_it_when_a_bar_goes",
        |lab| {
            let host = dma_buf_host(lab)?;
            peer_to_peer(&host, "iommufd=on,p2p=on").map(drop)
        },
    ),
    Proof::new(
        "dma_auto_takes_iommufd_where_devices_reach_each_other_by_dma_buf",
        |lab| {
            let host = dma_buf_host(lab)?;
            let result = peer_to_peer(&host, "iommufd=auto")?;
            way(&result, "iommufd", "dma-bufs")
        },
    ),
];

/// The size of the memory device's BAR.
const BAR_MIB: u64 = 16;

/// A host with a device that has a DMA engine, one that has memory, a drive, and a huge page of 1 GiB.
fn host_with_pair() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .cmdline("hugepagesz=1G hugepages=1")
        .device(Device::nvme("nv0", 64))
        .device(Device::edu("edu0"))
        .device(Device::ivshmem("mem0", BAR_MIB))
}

/// A host whose devices VFIO has by now, and their addresses.
struct Pair<'lab> {
    host: &'lab Host,
    edu: String,
    memory: String,
}

fn pair(lab: &mut Lab) -> Result<Pair<'_>> {
    bind(lab.host(&host_with_pair())?)
}

fn dma_buf_host(lab: &mut Lab) -> Result<Pair<'_>> {
    let config = HostConfig::new(Kernel::Backports)
        .device(Device::edu("edu0"))
        .device(Device::ivshmem("mem0", BAR_MIB));
    bind(lab.host(&config)?)
}

fn bind(host: &Host) -> Result<Pair<'_>> {
    let (edu, memory) = (host.address("edu0")?, host.address("mem0")?);
    host.run(&format!("busway device bind {edu} {memory}"))?;
    Ok(Pair { host, edu, memory })
}

/// The shell functions of a guest that drives `edu`'s DMA engine from and to the other device's BAR 2:
/// each copies sixteen words, spread over a page, there and back, and compares what the processor sees.
/// QEMU, docs/specs/edu.rst and docs/specs/ivshmem-spec.rst.
pub(crate) const DRIVE: &str = r#"
find() { dirname "$(grep -l "$2" $(grep -l "$1" /sys/bus/pci/devices/*/vendor | sed s/vendor/device/) | head -n 1)"; }
edu=$(find 0x1234 0x11e8) memory=$(find 0x1af4 0x1110) port=$(dirname "$(readlink -f $memory)")
bytes() { # DEVICE OFFSET BYTE...: into configuration space
    file=$1/config; at=$2; shift 2
    for byte; do printf "\\$(printf %03o "$byte")"; done | dd of=$file bs=1 seek=$((at)) conv=notrunc 2>/dev/null
}
byte() { hexdump -s $(($2)) -n 1 -e '"%d"' $1/config; }
bar() { sed -n "$(($2 + 1))p" $1/resource | cut -d ' ' -f 1; }
for device in $edu $memory; do echo 1 >$device/enable; bytes $device 4 6; done
registers=$(bar $edu 0) base=$(bar $memory 2)
dma() { # FROM TO COMMAND: one page
    devmem $((registers + 0x80)) 64 $(printf 0x%x $1)
    devmem $((registers + 0x88)) 64 $(printf 0x%x $2)
    devmem $((registers + 0x90)) 64 0x1000
    devmem $((registers + 0x98)) 64 $3
    while [ $(($(devmem $((registers + 0x98)) 32) & 1)) = 1 ]; do sleep 0.1; done
}
words=$(seq 0 256 3840)
write() { for at in $words; do devmem $(($1 + at)) 64 $(printf 0x%x $(($2 * (at + 1) * 0x9e3779b97f4a7c))); done; }
clear() { for at in $words; do devmem $(($1 + at)) 64 0; done; }
same() { for at in $words; do [ "$(devmem $(($1 + at)) 64)" = "$(devmem $(($2 + at)) 64)" ] || { echo "differs at $at"; return; }; done; echo same; }
there() { dma $1 0x40000 1; }             # from the memory into the engine's buffer
back() { dma 0x40000 $1 3; }              # and out of it
round() { write $1 $2; clear $(($1 + 0x2000)); there $1; back $(($1 + 0x2000)); same $1 $(($1 + 0x2000)); }
"#;

/// Both ways by the DMA engine; then with decoding off, with the BAR somewhere else, and after a reset.
fn peer_to_peer(pair: &Pair<'_>, platform: &str) -> Result<GuestResult> {
    let run = engine_guest(pair)
        .args(&["--platform", platform])
        .script(&format!(
            "{DRIVE}
value first \"$(round $base 3)\"
write $base 5; there $base
bytes $memory 4 4; back $((base + 0x2000)); bytes $memory 4 6
value off \"$(same $base $((base + 0x2000)))\"
value on \"$(round $base 7)\"
# The BAR moves up by 64 GiB, with the window of the port before it.
far=$((base + 0x1000000000))
bytes $memory 4 4
for place in \"$port 0x28\" \"$port 0x2c\" \"$memory 0x1c\"; do
    bytes $place $(($(byte $place) + 0x10))
done
bytes $memory 4 6
value moved \"$(round $far 9)\"
clear $((far + 0x2000)); back $((base + 0x2000))
value left \"$(same $far $((far + 0x2000)))\"
echo 1 >$memory/reset; bytes $memory 4 6
value reset \"$(round $far 11)\"
"
        ));
    let result = pair.host.guest(&run)?.success()?;
    for (key, wanted) in [
        ("first", "same"),
        ("off", "differs at 0"),
        ("on", "same"),
        ("moved", "same"),
        ("left", "differs at 0"),
        ("reset", "same"),
    ] {
        let found = result.value(key)?;
        ensure!(
            found == wanted,
            "{key}: {found}, not {wanted}: {}",
            result.stderr
        );
    }
    ensure!(
        !result.stderr.contains("peer"),
        "there was nothing to complain of: {}",
        result.stderr
    );
    Ok(result)
}

/// The boot report says that the devices were reached by this interface, for a reason with these words.
fn way(result: &GuestResult, interface: &str, why: &str) -> Result<()> {
    let report = result.report.as_ref().context("no report")?;
    let says = |pointer: &str, words: &str| {
        let text = report.pointer(pointer).and_then(serde_json::Value::as_str);
        text.is_some_and(|text| text.contains(words))
    };
    ensure!(
        says("/iommu/interface", interface) && says("/iommu/why", why),
        "not by {interface} ({why}): {report}"
    );
    Ok(())
}

/// Linux 6.12 has iommufd, and no dma-bufs of VFIO devices: devices that are to reach each other go by
/// the container, and do; others by iommufd.
fn auto_without_dma_buf(lab: &mut Lab) -> Result<()> {
    let pair = pair(lab)?;
    let result = peer_to_peer(&pair, "iommufd=auto")?;
    way(&result, "type1", "from Linux 6.19 on")?;
    let off = engine_guest(&pair)
        .args(&["--platform", "p2p=off"])
        .script("value up yes\n");
    let off = pair.host.guest(&off)?.success()?;
    way(&off, "iommufd", "p2p=off")
}

/// A guest that asks for no entropy now and then: under a kernel with dma-bufs of devices the emulator cannot carry out
/// MMIO that comes soon after a page fault, of which this guest's programs have many. See `docs/lab.md`.
fn engine_guest(pair: &Pair<'_>) -> GuestRun {
    GuestRun::new(Vmm::Busway)
        .cmdline("rng_core.default_quality=0")
        .device(&pair.edu)
        .device(&pair.memory)
}

/// Linux 6.12 has no dma-bufs of VFIO devices: by `auto` the guest runs and one sentence says what will
/// not work, by `on` nothing starts, and by `off` nothing is said.
fn without_dma_buf(lab: &mut Lab) -> Result<()> {
    let pair = pair(lab)?;
    let run = || {
        engine_guest(&pair)
            .args(&Interface::Cdev.arguments())
            .script(&format!("{DRIVE}\nclear $base; value base $base\n"))
    };
    let said = |result: &GuestResult| {
        let lines = result.stderr.lines();
        lines.filter(|line| line.contains("peer-to-peer")).count()
    };
    let auto = pair.host.guest(&run())?.success()?;
    ensure!(said(&auto) == 1, "not said once: {}", auto.stderr);
    for words in ["CONFIG_VFIO_PCI_DMABUF", "iommufd=off", "p2p=off"] {
        ensure!(auto.stderr.contains(words), "no {words}: {}", auto.stderr);
    }
    let off = run().args(&["--platform", "p2p=off"]);
    let off = pair.host.guest(&off)?.success()?;
    ensure!(said(&off) == 0, "said nevertheless: {}", off.stderr);
    let Pair { host, edu, memory } = pair;
    let flags = format!("--platform iommufd=on,p2p=on --device {edu} {memory}");
    let words = ["p2p=on", "CONFIG_VFIO_PCI_DMABUF", "iommufd=off"];
    refused(host, "", &flags, 3, &words).map(drop)
}

/// `busway run` with these flags, in a shell where `before` came first, ends with this status and says
/// all of these; returns what it said.
fn refused(host: &Host, before: &str, flags: &str, status: i32, says: &[&str]) -> Result<String> {
    let kernel = Parts::inside("bzImage");
    let script = format!(
        "{before}\nset -- busway run --kernel {kernel} --serial off {flags}\n\
         if [ -n \"$user\" ]; then set -- setpriv --reuid=$user --regid=$user --clear-groups \"$@\"; fi\n\
         exec \"$@\""
    );
    let output = host.output(&script, Duration::from_secs(120))?;
    tell!("{}", output.stderr);
    ensure!(
        output.status == status,
        "status {}, not {status}: {}",
        output.status,
        output.stderr
    );
    for words in says {
        let stderr = &output.stderr;
        ensure!(stderr.contains(words), "no {words:?} in: {stderr}");
    }
    Ok(output.stderr)
}

/// The user without any right, and the KiB of a guest's memory that it may pin.
const NOBODY: u32 = 65534;
const MEMORY_KIB: u64 = 512 << 10;

/// What opens the drive for somebody else, by either of the kernel's interfaces.
fn opener(host: &Host, interface: Interface, address: &str) -> Result<(String, &'static str)> {
    let device = format!("/sys/bus/pci/devices/{address}");
    let (nodes, flags) = match interface {
        Interface::Cdev => (
            format!("exec 5<>/dev/vfio/devices/$(basename {device}/vfio-dev/vfio*) 6<>/dev/iommu"),
            "--device fd=5 --platform iommufd_fd=6",
        ),
        Interface::Group => (
            format!("exec 5<>/dev/vfio/$(basename $(readlink {device}/iommu_group))"),
            "--device fd=5",
        ),
    };
    host.run("chmod 666 /dev/kvm; chmod 777 /lab/jobs /lab/jobs/*")?;
    // The nodes are root's alone: without the descriptors nobody gets there.
    let closed = "chmod 600 /dev/vfio/devices/* /dev/iommu $(ls -d /dev/vfio/[0-9]*)";
    Ok((format!("{closed}\n{nodes}"), flags))
}

/// Runs the rest of its arguments with a tap of two queues as descriptors 8 and 9. linux/if_tun.h: `TUNSETIFF`, and
/// `IFF_TAP`, `IFF_NO_PI`, `IFF_VNET_HDR` and `IFF_MULTI_QUEUE`.
const WITH_TAP: &str = "\
import fcntl, os, struct, subprocess, sys
for number in 8, 9:
    queue = os.open('/dev/net/tun', os.O_RDWR)
    fcntl.ioctl(queue, 0x400454ca, struct.pack('16sH22x', b'given-tap', 0x2 | 0x1000 | 0x4000 | 0x100))
    os.dup2(queue, number)
for words in 'addr add 192.168.79.1/24 dev given-tap', 'link set given-tap up':
    subprocess.run(['ip'] + words.split(), check=True)
os.execvp(sys.argv[1], sys.argv[1:])
";

/// The drive's own driver writes and verifies in a guest whose VMM is nobody's, with the limit of locked
/// memory far below the guest's memory, and allowed to be raised to exactly that. Its NIC is on a tap that was given as
/// well, which is gone with the VM.
fn handed_over(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host_with_pair())?;
    let address = host.address("nv0")?;
    host.run(&format!("busway device bind {address}"))?;
    for interface in [Interface::Cdev, Interface::Group] {
        let (open, flags) = opener(host, interface, &address)?;
        let flags: Vec<&str> = flags.split(' ').collect();
        let run = guest()?
            .args(&flags)
            .args(&["--net", "fd=[8,9],num_queues=4"])
            .opened_by(&format!(
                "{open}\nchmod 777 $(dirname $0)\nulimit -S -l 64\nulimit -H -l {MEMORY_KIB}\n\
                 exec python3 -c \"{WITH_TAP}\" setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups \"$@\"\n"
            ))
            .script(
                "value serial \"$(cat /sys/class/nvme/nvme0/serial)\"\n\
                 lab-io write /dev/nvme0n1 5\nvalue verified \"$(lab-io verify /dev/nvme0n1 5)\"\n\
                 modprobe -q virtio_net\nip addr add 192.168.79.2/24 dev eth0\nip link set eth0 up\n\
                 value reached \"$(ping -c 1 -w 30 192.168.79.1 | grep -c '1 packets received')\"\n\
                 until_pressed running\n",
            );
        let running = host.start_guest(&run)?;
        running.wait_line("@@value running")?;
        let pid = running.pid()?;
        // The user on the first line, then the flags of each of VFIO's descriptors.
        let seen = host.run(&format!(
            "awk '/^Uid/ {{ print $2 }}' /proc/{pid}/status\n\
             for n in /proc/{pid}/fd/*; do case $(readlink $n) in /dev/vfio/*|/dev/iommu) \
             grep flags /proc/{pid}/fdinfo/${{n##*/}};; esac; done"
        ))?;
        let (user, flags) = seen.split_once('\n').context("it has ended already")?;
        running.signal("TERM")?;
        let result = running.finish()?.success()?;
        ensure!(result.value("serial")?.trim() == "NV0", "another drive");
        ensure!(result.value("reached")? == "1", "the tap leads nowhere");
        host.run("! ip link show given-tap")?;
        ensure!(user.trim() == NOBODY.to_string(), "it is user {user}");
        // O_CLOEXEC is 02000000.
        let kept = flags.lines().filter(|line| !line.ends_with("2100002"));
        ensure!(
            !flags.is_empty() && kept.count() == 0,
            "open on exec: {flags}"
        );
    }
    let before = format!("user={NOBODY}; exec 7</dev/null");
    refused(
        host,
        &before,
        "--device fd=7",
        2,
        &["/dev/null", "/dev/vfio/devices/vfioN"],
    )?;
    refused(
        host,
        &before,
        "--device fd=99",
        2,
        &["descriptor 99 is not open"],
    )?;
    sent(host, &address)?;
    let (open, _) = opener(host, Interface::Cdev, &address)?;
    let other = format!("--device fd=5,path={}", host.address("edu0")?);
    refused(host, &open, &other, 2, &[&address, "leave path= out"]).map(drop)
}

/// Asks the VM at the first argument to add the device whose node is the second, by a descriptor beside the request.
const SEND: &str = "\
import os, socket, sys
body = '{\"id\": \"sent\", \"fd\": 3}'
request = f'PUT /api/v1/vm.add-device HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n{body}'
with socket.socket(socket.AF_UNIX) as vm:
    vm.settimeout(60)
    vm.connect(sys.argv[1])
    socket.send_fds(vm, [request.encode()], [os.open(sys.argv[2], os.O_RDWR)])
    print(vm.recv(65536).decode())
";

/// A guest that runs gets its drive over the API, by a descriptor of the node that its VMM could not open.
fn sent(host: &Host, address: &str) -> Result<()> {
    const SOCKET: &str = "/tmp/sent.sock";
    let (open, _) = opener(host, Interface::Cdev, address)?;
    fs::write(host.share().join("send.py"), SEND)?;
    let run = guest()?
        .args(&["--platform", "iommufd_fd=6", "--api-socket", SOCKET])
        .opened_by(&format!(
            "{open} 5<&-\nchmod 777 $(dirname $0)\nulimit -S -l 64\nulimit -H -l {MEMORY_KIB}\n\
             exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups \"$@\"\n"
        ))
        .script(
            "modprobe -q nvme\nvalue up yes\nuntil [ -b /dev/nvme0n1 ]; do usleep 20000; done\n\
             value serial \"$(cat /sys/class/nvme/nvme0/serial)\"\n\
             lab-io write /dev/nvme0n1 7\nvalue verified \"$(lab-io verify /dev/nvme0n1 7)\"\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value up")?;
    let answer = host.run(&format!(
        "python3 /lab/send.py {SOCKET} \\\n\
         /dev/vfio/devices/$(basename /sys/bus/pci/devices/{address}/vfio-dev/vfio*)"
    ))?;
    ensure!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("\"sent\""),
        "{answer}"
    );
    let result = running.finish()?.success()?;
    ensure!(result.value("serial")?.trim() == "NV0", "another drive");
    Ok(())
}

/// The limit of locked memory, as an unprivileged user, on both interfaces, and the container's limit of
/// mappings.
fn limits(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host_with_pair())?;
    let address = host.address("nv0")?;
    host.run(&format!("busway device bind {address}"))?;
    for interface in [Interface::Cdev, Interface::Group] {
        let (open, flags) = opener(host, interface, &address)?;
        let less = MEMORY_KIB - 1;
        let before = format!("{open}\nuser={NOBODY}; ulimit -l {less}");
        let flags = format!("--memory size=512M {flags}");
        let figure = format!("ulimit -l {MEMORY_KIB}`");
        refused(
            host,
            &before,
            &flags,
            3,
            &[&figure, "LimitMEMLOCK", "65534 hard memlock"],
        )?;
    }
    let limit = "/sys/module/vfio_iommu_type1/parameters/dma_entry_limit";
    let was = host.run(&format!("cat {limit}; echo 0 >{limit}"))?;
    let flags = format!("--platform iommufd=off --device {address}");
    let outcome = refused(host, "", &flags, 3, &["guest RAM", "takes 0 more", limit]);
    host.run(&format!("echo {} >{limit}", was.trim()))?;
    outcome.map(drop)
}

/// Huge pages of both sizes; what is missing is said with a command that makes it good.
fn huge_pages(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&host_with_pair())?;
    let address = host.address("nv0")?;
    host.run(&format!("busway device bind {address}"))?;
    let memory = "--memory size=512M,hugepages=on,hugepage_size=2M";
    let flags = format!("{memory} --device {address}");
    let said = refused(host, "", &flags, 3, &["256 huge pages", "0 are free"])?;
    // What the kernel would make on demand does as well.
    let overcommit = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_overcommit_hugepages";
    host.run(&format!("echo 256 >{overcommit}"))?;
    let run = guest()?
        .memory_mib(512)
        .device(&address)
        .args(&["--memory", "hugepages=on,hugepage_size=2M"]);
    host.guest(&run)?.success()?;
    host.run(&format!("echo 0 >{overcommit}"))?;
    let remedy = said.split('`').nth(1).context("no command")?;
    host.run(&remedy.replace("sudo ", ""))?;
    for (page, mib) in [("2048kB", 512), ("1048576kB", 1024)] {
        let size = page.trim_end_matches("kB");
        let run = guest()?
            .memory_mib(mib)
            .device(&address)
            .args(&["--memory", &format!("hugepages=on,hugepage_size={size}K")])
            .script(
                "lab-io write /dev/nvme0n1 6\nvalue verified \"$(lab-io verify /dev/nvme0n1 6)\"\n\
                 until_pressed running\n",
            );
        let running = host.start_guest(&run)?;
        running.wait_line("@@value running")?;
        let free = host.run(&format!(
            "cat /sys/kernel/mm/hugepages/hugepages-{page}/free_hugepages"
        ))?;
        running.signal("TERM")?;
        running.finish()?.success()?;
        ensure!(free.trim() == "0", "{free} pages of {page} were not used");
    }
    host.run("echo 0 >/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
        .map(drop)
}
