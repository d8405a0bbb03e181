//! The lab itself: both hosts have what VFIO stands on, and a guest of QEMU's gets a drive there.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use busway_lab::{
    DataServer, Device, GATEWAY, GuestKernel, GuestRun, Host, HostConfig, Kernel, Lab, Upload, Vmm,
    may_be_the_emulators,
};

use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "stock_host_has_kvm_vfio_and_a_group_for_each_device",
        stock_host,
    ),
    Proof::new(
        "stock_host_gives_qemu_guest_a_drive_that_keeps_its_data",
        qemu_guest_drive,
    ),
    Proof::new(
        "stock_host_gives_qemu_guest_a_nic_that_moves_data_both_ways",
        qemu_guest_nic,
    ),
    Proof::new("iommufd_host_has_iommufd", iommufd_host),
    Proof::new(
        "iommufd_host_boots_the_stock_kernel_as_elf_and_counts_at_marks",
        qemu_guest_marks,
    ),
    Proof::new(
        "iommufd_host_makes_virtual_functions_each_alone_in_its_group",
        virtual_functions,
    ),
    Proof::new(
        "a_wait_that_runs_out_says_what_the_host_and_its_processes_were_doing",
        overdue_job,
    ),
    Proof::new(
        "a_wait_that_runs_out_has_a_host_that_takes_no_orders_show_its_stacks",
        overdue_host,
    ),
    Proof::new("nothing_is_left_after_a_host_is_dropped", nothing_left),
    Proof::new("nothing_runs_on_after_its_owner_is_killed", killed_owner),
];

fn zoo(kernel: Kernel) -> HostConfig {
    HostConfig::new(kernel)
        .device(Device::nvme("nv0", 256))
        .device(Device::e1000e("nic0"))
}

/// The drive and the NIC are each alone in an IOMMU group.
pub(crate) fn check_groups(host: &Host) -> Result<()> {
    let mut groups = BTreeSet::new();
    for id in ["nv0", "nic0"] {
        let address = host.address(id)?;
        let members = host.run(&format!(
            "ls /sys/bus/pci/devices/{address}/iommu_group/devices"
        ))?;
        ensure!(members.trim() == address, "{id}'s group has {members}");
        groups.insert(host.run(&format!(
            "readlink /sys/bus/pci/devices/{address}/iommu_group"
        ))?);
    }
    ensure!(groups.len() == 2, "the devices share a group");
    Ok(())
}

fn stock_host(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Stock))?;
    host.run("test -c /dev/kvm && test -c /dev/vfio/vfio && ! test -e /dev/iommu")?;
    ensure!(host.driver(&host.address("nv0")?)?.as_deref() == Some("nvme"));
    ensure!(host.driver(&host.address("nic0")?)?.as_deref() == Some("e1000e"));
    check_groups(host)
}

fn iommufd_host(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Iommufd))?;
    host.run("test -c /dev/kvm && test -c /dev/vfio/vfio && test -c /dev/iommu")?;
    check_groups(host)
}

fn qemu_guest_drive(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Stock))?;
    let address = host.address("nv0")?;
    let verify = "fio --name=verify --rw=write --bs=64k --size=32m --direct=1 --ioengine=io_uring \
                  --iodepth=8 --verify=crc32c --minimal --filename=";
    host.bind_by_hand(&address)?;
    let run = GuestRun::new(Vmm::Qemu)
        .device(&address)
        .programs()
        .script(&format!(
            "value serial $(cat /sys/class/nvme/nvme0/serial)\n\
         {verify}/dev/nvme0n1 --do_verify=1 >/dev/null\n\
         sync\n"
        ));
    let result = host.guest(&run)?.success()?;
    tell!("guest's first program after {:?}", result.boot_time());
    ensure!(result.value("serial")? == "NV0");
    host.unbind_by_hand(&address)?;
    host.run(&format!(
        "udevadm settle; {verify}/dev/nvme0n1 --verify_only=1"
    ))?;
    Ok(())
}

fn qemu_guest_nic(lab: &mut Lab) -> Result<()> {
    const BYTES: u64 = 1_000_000;
    let host = lab.host(&zoo(Kernel::Stock))?;
    let address = host.address("nic0")?;
    let server = DataServer::start()?;
    host.bind_by_hand(&address)?;
    let run = GuestRun::new(Vmm::Qemu).device(&address).script(&format!(
        "dhcp eth0\n\
         wget -q -O /data {}\n\
         value sha256 $(sha256sum </data)\n\
         value echoed $(upload {GATEWAY} {} /data)\n",
        server.url(BYTES, 1),
        server.port(),
    ));
    let result = host.guest(&run)?.success()?;
    host.unbind_by_hand(&address)?;
    let sha256 = DataServer::sha256(BYTES, 1);
    ensure!(result.value("sha256")?.starts_with(&sha256));
    ensure!(result.value("echoed")? == sha256);
    ensure!(
        server.uploads()
            == [Upload {
                bytes: BYTES,
                sha256
            }]
    );
    Ok(())
}

fn qemu_guest_marks(lab: &mut Lab) -> Result<()> {
    const MEMORY: u64 = 256;
    let host = lab.host(&zoo(Kernel::Iommufd))?;
    let run = GuestRun::new(Vmm::Qemu)
        .kernel(GuestKernel::StockElf)
        .memory_mib(MEMORY)
        .cpus(2)
        .script("mark first\nmark memory\nnproc | block processors\n");
    let result = host.guest(&run)?.success()?;
    tell!("guest's first program after {:?}", result.boot_time());
    ensure!(result.block("processors")?.trim() == "2");
    let (first, memory) = (&result.marks["first"], &result.marks["memory"]);
    ensure!(
        memory.since(first, "exits").is_some_and(|exits| exits > 0),
        "no exit counted"
    );
    ensure!(
        memory
            .threads
            .iter()
            .filter(|thread| thread.name.ends_with("/KVM"))
            .count()
            == 2
    );
    ensure!(first.mappings.is_empty());
    ensure!(
        memory.mappings.iter().any(|each| each.size >= MEMORY << 10),
        "no guest memory"
    );
    ensure!(
        (1000..MEMORY << 10).contains(&memory.own_pss(MEMORY)),
        "no memory of QEMU's own"
    );
    Ok(())
}

fn virtual_functions(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Iommufd).device(Device::igb("igb0")))?;
    let functions = host.virtual_functions("igb0", 2)?;
    ensure!(functions.len() == 2);
    for function in functions {
        let group = format!("/sys/bus/pci/devices/{function}/iommu_group/devices");
        ensure!(host.run(&format!("ls {group}"))?.trim() == function);
        ensure!(host.driver(&function)?.as_deref() == Some("igbvf"));
    }
    Ok(())
}

/// The rest of a script that has begun to open a pipe in the background: it says so once the kernel has it there.
const ASLEEP: &str = "until grep -q fifo_open /proc/$!/stack; do :; done\necho asleep\nwait\n";

/// The error of a wait for a script that waits for ever once it has written `asleep`. It names all of these.
fn overdue(host: &Host, script: &str, wanted: &[&str]) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(1);
    let job = host.spawn(script)?;
    job.wait_line(Duration::from_secs(60), |line| line == "asleep")?;
    let started = Instant::now();
    let Err(error) = job.wait(LIMIT) else {
        bail!("{script} ended");
    };
    let text = format!("{error:#}");
    tell!("after {:?}:\n{text}", started.elapsed());
    ensure!(may_be_the_emulators(&error));
    let name = script.lines().next().unwrap_or_default();
    ensure!(text.starts_with(&format!("{name} took longer than {LIMIT:?}\n")));
    let everywhere = ["CPU 0 ", "CPU 1 ", " RIP ", " CPU 0/"];
    for words in everywhere.iter().chain(wanted) {
        ensure!(text.contains(words), "the report lacks {words:?}");
    }
    ensure!(text.lines().count() < 160);
    Ok(())
}

fn overdue_job(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Iommufd))?;
    // A pipe that nobody opens for writing.
    let script = "mkfifo /tmp/never\ncat /tmp/never &\n".to_owned() + ASLEEP;
    let wanted = ["asleep", "cat /tmp/never", "fifo_open", "lab-agent"];
    overdue(host, &script, &wanted)
}

fn overdue_host(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Iommufd))?;
    // The line to the agent gets no more input: termios(3), CREAD.
    let script = "stty -F /dev/ttyS1 -cread\nmkfifo /tmp/nor\ncat /tmp/nor &\n".to_owned() + ASLEEP;
    let wanted = ["its agent does not answer", "by SysRq", "fifo_open"];
    let outcome = overdue(host, &script, &wanted);
    lab.stop();
    outcome
}

/// The processes of this machine whose command line contains these words.
fn processes(words: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(id) = entry.file_name().to_string_lossy().parse() else {
            continue;
        };
        // A process can end while the folder is read.
        let cmdline = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if String::from_utf8_lossy(&cmdline).contains(words) {
            found.push(id);
        }
    }
    Ok(found)
}

fn nothing_left(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&zoo(Kernel::Iommufd))?;
    let scratch = host
        .share()
        .parent()
        .context("the share is in a folder")?
        .to_owned();
    let words = format!("{}/", scratch.display());
    ensure!(processes(&words)? == [host.qemu_pid()]);
    lab.stop();
    ensure!(processes(&words)?.is_empty(), "QEMU is still running");
    ensure!(!scratch.exists(), "{words} is still there");
    Ok(())
}

fn killed_owner(lab: &mut Lab) -> Result<()> {
    lab.stop();
    let mut owner = Command::new(env!("CARGO_BIN_EXE_lab"))
        .args([
            "run",
            "--kernel",
            "stock",
            "--without-busway",
            "--",
            "echo up; sleep infinity",
        ])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(owner.stdout.take().context("a pipe")?).read_line(&mut line)?;
    let scratch = format!("busway-lab/run/{}-", owner.id());
    let qemu = processes(&scratch)?;
    owner.kill()?;
    owner.wait()?;
    ensure!(
        line == "up\n" && qemu.len() == 1,
        "the host did not come up"
    );
    // tail ends when the process that it is told of does.
    let gone = Command::new("timeout")
        .args([
            "60",
            "tail",
            &format!("--pid={}", qemu[0]),
            "-f",
            "/dev/null",
        ])
        .status()?;
    ensure!(gone.success(), "QEMU outlives the process that started it");
    Ok(())
}
