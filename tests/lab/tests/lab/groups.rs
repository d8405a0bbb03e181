//! Devices that hang together on the host: several functions of one device, several devices of one
//! group, physical and virtual functions; and what is left in a device when its guest is done.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use busway_lab::{Device, GuestKernel, Host, HostConfig, Kernel, Lab};
use serde_json::Value;

use crate::assigned::{Interface, guest};
use crate::bare::{kernel, power_off, say};
use crate::bare_kernel::{Trace, identify, restart};
use crate::{Proof, Tier, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::rounds(
        "groups_two_functions_of_one_device_are_one_in_the_guest_and_work_after_each_restart",
        two_functions,
    ),
    Proof::rounds(
        "groups_no_trace_of_one_start_is_left_in_any_device_at_the_next_by_group",
        |lab, tier| fresh(lab, Interface::Group, tier),
    ),
    Proof::soak(
        "groups_no_trace_of_one_start_is_left_in_any_device_at_the_next_by_cdev",
        |lab, tier| fresh(lab, Interface::Cdev, tier),
    ),
    Proof::rounds(
        "groups_a_drive_goes_again_and_again_from_its_driver_to_a_guest_that_is_killed_and_back",
        killed_rounds,
    ),
    Proof::soak(
        "groups_sixteen_functions_work_in_one_guest_by_group",
        |lab, _| sixteen(lab, Interface::Group),
    ),
    Proof::new(
        "groups_sixteen_functions_in_one_guest_by_cdev_are_mapped_for_as_often_as_one",
        |lab| sixteen(lab, Interface::Cdev),
    ),
    Proof::new(
        "groups_who_keeps_a_group_or_a_reset_from_the_vm_is_named_and_let_be",
        in_the_way,
    ),
    Proof::new(
        "groups_a_second_vm_gets_nothing_of_a_group_and_is_told_who_has_it",
        second_vm,
    ),
    Proof::new(
        "groups_a_virtual_function_of_a_physical_one_with_vfio_needs_its_token",
        token,
    ),
];

/// A drive; a device of two functions; two devices on a conventional bus; a NIC with virtual
/// functions; one of two functions that are isolated from each other; and more.
fn herd() -> HostConfig {
    HostConfig::new(Kernel::Iommufd)
        .device(Device::nvme("nv0", 16))
        .device(Device::nvme("two0", 16))
        .device(Device::e1000e("two1").beside("two0"))
        .device(Device::e1000("old0"))
        .device(Device::rtl8139("old1"))
        .device(Device::igb("many"))
        .device(Device::igb("dual0"))
        .device(Device::igb("dual1").beside("dual0"))
        .device(Device::edu("edu"))
        .device(Device::xhci("usb"))
}

/// The addresses of devices, which VFIO has by now.
fn bound(host: &Host, ids: &[&str]) -> Result<Vec<String>> {
    let addresses = ids
        .iter()
        .map(|id| host.address(id))
        .collect::<Result<Vec<_>>>()?;
    host.run(&format!("busway device bind {}", addresses.join(" ")))?;
    Ok(addresses)
}

fn give_back(host: &Host, addresses: &[String]) -> Result<()> {
    let addresses = addresses.join(" ");
    host.run(&format!("busway device unbind {addresses}; udevadm settle"))
        .map(drop)
}

/// What came of a guest with a kernel of a few instructions.
struct Bare {
    status: i32,
    stdout: String,
    stderr: String,
    report: Value,
}

impl Bare {
    fn run(host: &Host, kernel: &[u8], interface: Interface, arguments: &str) -> Result<Self> {
        fs::write(host.share().join("bare"), kernel)?;
        let platform = interface.arguments().join(" ");
        let script = format!(
            "rm -f /lab/bare.json; exec busway -vv run --kernel /lab/bare --memory size=32M \
             --serial tty --report /lab/bare.json {platform} {arguments} </dev/null"
        );
        let output = host.output(&script, Duration::from_secs(120))?;
        let report = fs::read(host.share().join("bare.json")).unwrap_or_default();
        Ok(Self {
            status: output.status,
            stdout: output.stdout,
            stderr: output.stderr,
            report: serde_json::from_slice(&report).unwrap_or_default(),
        })
    }

    /// A guest that does nothing, with these arguments.
    fn up(host: &Host, interface: Interface, arguments: &str) -> Result<Self> {
        let code = [say("up\n"), power_off()].concat();
        Self::run(host, &kernel(&code), interface, arguments)
    }

    fn success(self, said: &str) -> Result<Self> {
        let Self {
            status,
            stdout,
            stderr,
            ..
        } = &self;
        ensure!(
            *status == 0 && stdout == said,
            "status {status}; the guest said {stdout:?}, Busway: {stderr}"
        );
        Ok(self)
    }

    /// That it was refused because of the host, and why.
    fn refused(self, words: &[&str]) -> Result<()> {
        let Self { status, stderr, .. } = &self;
        ensure!(*status == 3, "status {status}: {stderr}");
        self.says(words)
    }

    fn says(&self, words: &[&str]) -> Result<()> {
        for word in words {
            ensure!(
                self.stderr.contains(word),
                "no {word:?} in: {}",
                self.stderr
            );
        }
        Ok(())
    }

    /// How each device is reset, as the report says, in the order in which they were given.
    fn resets(&self) -> Result<Vec<&str>> {
        let devices = self.report["devices"].as_array().context("no devices")?;
        let words = devices.iter().map(|device| device["reset"].as_str());
        words.collect::<Option<_>>().context("no word")
    }
}

fn devices(addresses: &[String]) -> String {
    format!("--device {}", addresses.join(" "))
}

/// How often a guest is restarted.
fn restarts(tier: Tier) -> u8 {
    tier.of(2, 10)
}

fn two_functions(lab: &mut Lab, tier: Tier) -> Result<()> {
    let restarts = restarts(tier);
    let host = lab.host(&herd())?;
    let addresses = bound(host, &["two0", "two1"])?;
    host.run("rm -f /run/count; truncate -s 1M /run/count")?;
    // Restarted without a word to the drivers, so that the devices are in full work.
    let run = guest()?
        .limit(Duration::from_secs(420))
        .kernel(GuestKernel::StockElf)
        .device(&addresses[0])
        .device(&addresses[1])
        .args(&["--disk", "path=/run/count"])
        .script(&format!(
            "devices=/sys/bus/pci/devices\n\
             boot=$(tr -d '\\0' </dev/vda | head -c 4); boot=$((boot + 0))\n\
             header=$(hexdump -s 14 -n 1 -e '1/1 \"%02x\"' $devices/0000:01:00.0/config)\n\
             functions=$(ls $devices | grep -c '^0000:01:00')\n\
             for function in 0 1; do\n\
                 drivers=\"$drivers $(basename $(readlink $devices/0000:01:00.$function/driver))\"\n\
             done\n\
             lab-io write /dev/nvme0n1 $((boot + 1)) >/dev/null\n\
             lab-io verify /dev/nvme0n1 $((boot + 1)) >/dev/null\n\
             dhcp eth0\n\
             value boot_$boot \"$header $functions$drivers $(ip -4 -o addr show eth0 | wc -l)\"\n\
             [ $boot = {restarts} ] && exit 0\n\
             printf %s $((boot + 1)) | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null\n\
             echo b >/proc/sysrq-trigger; sleep 60\n",
        ));
    let started = Instant::now();
    let result = host.guest(&run)?.success()?;
    for boot in 0..=restarts {
        let found = result.value(&format!("boot_{boot}"))?;
        ensure!(found == "80 2 nvme e1000e 1", "boot {boot}: {found}");
    }
    count("restarts", restarts.into());
    tell!(
        "{restarts} restarts in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    give_back(host, &addresses)
}

/// Each device in turn has a register changed; a function by itself, by what it shares a device with,
/// and by what it shares a bus with.
fn fresh(lab: &mut Lab, interface: Interface, tier: Tier) -> Result<()> {
    let restarts = restarts(tier);
    let host = lab.host(&herd())?;
    let addresses = bound(host, &["nv0", "two0", "two1", "old0", "old1", "dual0"])?;
    // The drives' interrupt mask, for QEMU's keep their queues' addresses through a reset; receive control of Intel's NICs; the first byte of Realtek's own address.
    let trace = |bus, function, bar, offset| Trace {
        bus,
        function,
        bar,
        offset,
        change: 2,
    };
    let traces = [
        trace(1, 0, 0, 0x0c),
        trace(2, 0, 0, 0x0c),
        trace(2, 1, 0, 0x100),
        trace(3, 0, 0, 0x100),
        trace(4, 0, 1, 0),
        trace(5, 0, 0, 0x100),
    ];
    let kernel = restart(restarts, &traces);
    let result = Bare::run(host, &kernel, interface, &devices(&addresses))?.success("fresh\n")?;
    let resets = result.resets()?;
    tell!("{resets:?}");
    // One at the start, one for each restart, and one at the end; not one for each function.
    for id in ["two", "old"] {
        let of = |line: &&str| {
            let mut addresses = addresses.iter().zip(["", "two", "two", "old", "old", ""]);
            line.contains("hot reset, which")
                && addresses.any(|(at, set)| set == id && line.contains(at))
        };
        let found = result.stderr.lines().filter(of).count();
        ensure!(
            found == usize::from(restarts) + 2,
            "{id}: {found} hot resets in {restarts} restarts"
        );
    }
    count("restarts", restarts.into());
    give_back(host, &addresses)
}

fn killed_rounds(lab: &mut Lab, tier: Tier) -> Result<()> {
    let rounds: u32 = tier.of(4, 50);
    let host = lab.host(&herd())?;
    let address = host.address("nv0")?;
    fs::write(host.share().join("bare"), identify(*b"NV0 "))?;
    let started = Instant::now();
    // The guest says that its drive has answered by DMA, and the drive runs when Busway is killed.
    let script = format!(
        "set -e; device=/sys/bus/pci/devices/{address}\n\
         is_with() {{ [ \"$(basename $(readlink $device/driver))\" = $1 ]; }}\n\
         for round in $(seq 1 {rounds}); do\n\
             is_with nvme\n\
             busway device bind {address} >/dev/null\n\
             is_with vfio-pci\n\
             [ $((round % 2)) = 0 ] && iommufd=on || iommufd=off\n\
             coproc busway run --kernel /lab/bare --memory size=32M --serial tty \
                 --platform iommufd=$iommufd --device {address}\n\
             busway=$COPROC_PID; exec 7<&${{COPROC[0]}}\n\
             read -r -t 60 said <&7\n\
             [ \"${{said%$'\\r'}}\" = 'io done' ]\n\
             kill -KILL $busway; wait $busway || [ $? = 137 ]\n\
             exec 7<&-\n\
             busway device unbind {address} >/dev/null\n\
             echo $round\n\
         done\n\
         udevadm settle; lab-io write /dev/$(ls $device/nvme/nvme*/ | grep -m 1 '^nvme.*n1$') 1\n"
    );
    let output = host.output(&script, Duration::from_secs(600))?.success()?;
    let done = output.lines().filter(|line| line.parse::<u32>().is_ok());
    ensure!(done.count() == rounds as usize, "{output}");
    count("kills", rounds.into());
    tell!(
        "{rounds} rounds of bind, run, kill -9 and unbind in {:.0} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn sixteen(lab: &mut Lab, interface: Interface) -> Result<()> {
    let host = lab.host(&herd())?;
    let mut addresses = bound(
        host,
        &[
            "nv0", "two0", "two1", "old0", "old1", "dual0", "dual1", "edu", "usb",
        ],
    )?;
    let virtual_functions = host.virtual_functions("many", 7)?;
    host.run(&format!(
        "busway device bind {}",
        virtual_functions.join(" ")
    ))?;
    addresses.extend(virtual_functions.iter().cloned());
    ensure!(addresses.len() == 16);
    let run = |addresses: &[String], script: &str| {
        let run = guest()?
            .kernel(GuestKernel::StockElf)
            .args(&interface.arguments())
            .script(script);
        let run = addresses.iter().fold(run, |run, at| run.device(at));
        host.guest(&run)?.success()
    };
    let result = run(
        &addresses,
        "for each in /sys/bus/pci/devices/*; do\n\
             case $each in *:00:*) ;; *) value driver_${each##*/} \"$(basename \"$(readlink $each/driver)\")\";; esac\n\
         done\n\
         for drive in /dev/nvme?n1; do lab-io write $drive 3 && lab-io verify $drive 3; done >/dev/null\n\
         for nic in /sys/class/net/*; do\n\
             case $(basename \"$(readlink $nic/device/driver)\") in\n\
                 igbvf|igb|e1000e) dhcp ${nic##*/}; value address_${nic##*/} \"$(ip -4 -o addr show ${nic##*/} | wc -l)\";;\n\
             esac\n\
         done\n\
         value vectors \"$(grep -c 'PCI-MSIX\\?-0000:\\(0[1-9a-f]\\|[1-9a-f].\\):' /proc/interrupts)\"\n\
         cat /proc/interrupts | block interrupts\n",
    )?;
    let report = |result: &busway_lab::GuestResult, pointer: &str| {
        let report = result.report.as_ref().context("no report")?;
        let number = report.pointer(pointer).and_then(Value::as_u64);
        number.with_context(|| format!("no {pointer} in {report}"))
    };
    let values = &result.transcript.values;
    let of = |key: &'static str| {
        let found = values.iter().filter(move |(name, _)| name.starts_with(key));
        found.map(|(_, value)| value.as_str())
    };
    let mut drivers: Vec<_> = of("driver_").filter(|driver| !driver.is_empty()).collect();
    drivers.sort_unstable();
    tell!("drivers: {}", drivers.join(" "));
    ensure!(of("driver_").count() == 16, "{values:?}");
    ensure!(
        of("address_").count() == 10 && of("address_").all(|count| count == "1"),
        "{values:?}"
    );
    let (seen, told) = (
        result.value("vectors")?.parse::<u64>()?,
        report(&result, "/vectors")?,
    );
    ensure!(
        seen == told,
        "the guest uses {seen} vectors, the report says {told}:\n{}",
        result.block("interrupts")?
    );
    let calls = report(&result, "/dma_mappings/calls")?;
    tell!("{seen} vectors, {calls} map calls");
    if matches!(interface, Interface::Cdev) {
        let one = run(&addresses[..1], "value alone yes\n")?;
        let alone = report(&one, "/dma_mappings/calls")?;
        ensure!(
            calls == alone,
            "{calls} map calls for 16 functions, {alone} for one"
        );
    }
    host.run(&format!(
        "busway device unbind {}",
        virtual_functions.join(" ")
    ))?;
    let physical = host.address("many")?;
    host.run(&format!(
        "echo 0 >/sys/bus/pci/devices/{physical}/sriov_numvfs"
    ))?;
    give_back(host, &addresses[..9])
}

fn in_the_way(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&herd())?;
    let [drive, nic] = ["two0", "two1"].map(|id| host.address(id));
    let (drive, nic) = (drive?, nic?);
    let [dual, other] = ["dual0", "dual1"].map(|id| host.address(id));
    let (dual, other) = (dual?, other?);
    host.bind_by_hand(&drive)?;
    host.bind_by_hand(&dual)?;
    for interface in [Interface::Group, Interface::Cdev] {
        // A group with a member that its own driver has.
        let member = format!("{nic} is bound to e1000e: `busway device bind {nic}`");
        Bare::up(host, interface, &format!("--device {drive}"))?.refused(&[&member])?;
        // A hot reset that would touch what is in another group.
        host.run(&format!("echo >/sys/bus/pci/devices/{dual}/reset_method"))?;
        let blocked = Bare::up(host, interface, &format!("--device {dual}"))?.success("up\n")?;
        let why = format!("{other}, which is bound to igb (`busway device bind {other}`");
        blocked.says(&[&format!("{dual} cannot be reset in full"), &why])?;
        ensure!(blocked.resets()? == ["none"], "{}", blocked.report);
        ensure!(
            blocked.stderr.matches(&why).count() == 1,
            "said once: {}",
            blocked.stderr
        );
        host.bind_by_hand(&other)?;
        let foreign = Bare::up(host, interface, &format!("--device {dual}"))?.success("up\n")?;
        foreign.says(&[&format!(
            "{other}, which is with vfio-pci but not this VM's (`--device {other}`)"
        )])?;
        let both =
            Bare::up(host, interface, &format!("--device {dual} {other}"))?.success("up\n")?;
        ensure!(both.resets()?[0] == "hot", "{}", both.report);
        host.unbind_by_hand(&other)?;
        host.run(&format!(
            "echo default >/sys/bus/pci/devices/{dual}/reset_method"
        ))?;
    }
    // A member that was not given, and that nobody has, is left alone.
    host.bind_by_hand(&nic)?;
    for interface in [Interface::Group, Interface::Cdev] {
        let alone = Bare::up(host, interface, &format!("--device {drive}"))?.success("up\n")?;
        ensure!(!alone.stderr.contains(&nic), "{}", alone.stderr);
    }
    for address in [&drive, &nic, &dual] {
        host.unbind_by_hand(address)?;
    }
    Ok(())
}

fn second_vm(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&herd())?;
    let [drive, nic] = ["two0", "two1"].map(|id| host.address(id));
    let (drive, nic) = (drive?, nic?);
    for address in [&drive, &nic] {
        host.bind_by_hand(address)?;
    }
    fs::write(host.share().join("held"), identify(*b"TWO0"))?;
    for first in [Interface::Group, Interface::Cdev] {
        // Its guest has had an answer of its drive by DMA, and stays.
        let vm = host.spawn(&format!(
            "echo $$; exec busway run --kernel /lab/held --memory size=32M --serial tty {} --device {drive} </dev/null",
            first.arguments().join(" ")
        ))?;
        vm.wait_line(Duration::from_secs(60), |line| line.trim() == "io done")?;
        let process = vm.stdout().lines().next().unwrap_or_default().to_owned();
        let holder = format!("process {process} (busway)");
        for second in [Interface::Group, Interface::Cdev] {
            // The device, and another one of its group.
            for address in [&drive, &nic] {
                let asked = Bare::up(host, second, &format!("--device {address}"))?;
                let said = asked.stderr.lines().last().unwrap_or_default();
                tell!("{first:?}, then {second:?}: {said}");
                asked.refused(&[address, &holder])?;
            }
        }
        ensure!(vm.is_running(), "{}", vm.stderr());
        vm.signal("KILL")?;
        vm.wait(Duration::from_secs(60))?;
        // Its end frees the group.
        for second in [Interface::Group, Interface::Cdev] {
            Bare::up(host, second, &format!("--device {drive} {nic}"))?.success("up\n")?;
        }
    }
    for address in [&drive, &nic] {
        host.unbind_by_hand(address)?;
    }
    Ok(())
}

fn token(lab: &mut Lab) -> Result<()> {
    const RIGHT: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    const WRONG: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f4";
    let host = lab.host(&herd())?;
    let physical = host.address("many")?;
    let drive = bound(host, &["nv0"])?.remove(0);
    host.bind_by_hand(&physical)?;
    let folder = format!("/sys/bus/pci/devices/{physical}");
    let found = host.run(&format!(
        "set -e; echo Y >/sys/module/vfio_pci/parameters/enable_sriov\n\
         echo 2 >{folder}/sriov_numvfs; udevadm settle\n\
         basename $(readlink {folder}/virtfn0)\n"
    ))?;
    let vf = found.trim();
    host.bind_by_hand(vf)?;
    let run = |arguments: &str| Bare::up(host, Interface::Group, arguments);
    run(&format!("--device {vf}"))?.refused(&[&format!("{vf} needs a VF token")])?;
    // The physical function's first user says which it is.
    run(&format!(
        "--device {vf},vf_token={RIGHT} {physical},vf_token={RIGHT}"
    ))?
    .success("up\n")?;
    run(&format!("--device {vf},vf_token={RIGHT}"))?.success("up\n")?;
    run(&format!("--device {vf},vf_token={WRONG}"))?.refused(&["another VF token"])?;
    run(&format!("--device {drive},vf_token={RIGHT}"))?
        .refused(&[&format!("{drive} takes no VF token")])?;
    // For all that need one.
    run(&format!(
        "--platform vf_token={RIGHT} --device {drive} {physical} {vf}"
    ))?
    .success("up\n")?;
    // This kernel takes none over iommufd, which is said.
    Bare::up(
        host,
        Interface::Cdev,
        &format!("--device {vf},vf_token={RIGHT}"),
    )?
    .success("up\n")?
    .says(&["takes no VF token over iommufd"])?;
    host.run(&format!("echo 0 >{folder}/sriov_numvfs"))?;
    host.unbind_by_hand(&physical)?;
    give_back(host, &[drive])
}
