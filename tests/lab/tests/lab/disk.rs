//! Busway's virtio disk: what it costs the guest, and what is on it whatever happens to Busway.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{
    Device, GuestKernel, GuestResult, Host, HostConfig, Kernel, Lab, Output, RunningGuest,
};

use crate::assigned::{guest, word};
use crate::{Proof, Tier, count, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "random_io_on_a_disk_leaves_the_guest_seldom_and_interrupts_it_for_a_batch",
        random,
    ),
    Proof::rounds(
        "what_a_guest_flushed_to_raw_and_qcow2_disks_is_there_when_busway_is_killed",
        killed,
    ),
    Proof::new(
        "a_disk_on_a_frozen_file_system_holds_nothing_else_up",
        frozen,
    ),
    Proof::soak(
        "what_a_guest_flushed_to_raw_and_qcow2_disks_is_there_when_the_host_crashes",
        |lab, _tier| crashed(lab),
    ),
    Proof::new(
        "virtio_disks_work_by_plain_calls_where_io_uring_is_forbidden",
        by_plain_calls,
    ),
];

/// A host whose drive is its own.
fn host(lab: &mut Lab) -> Result<&Host> {
    lab.host(&HostConfig::new(Kernel::Iommufd).device(Device::nvme("nv0", 64)))
}

/// What fio reads and writes, in seconds each.
const SECONDS: u32 = 4;
/// Most exits for each request at queue depth 16, without those that a busy guest has anyway.
const MOST_EXITS: f64 = 0.6;
/// How long the guest is busy without its disk. Timers of guest and host end its processor's time in the guest so many
/// times a second: the slower the machine, the fewer requests share these.
const BUSY_SECONDS: u32 = 2;

fn random(lab: &mut Lab) -> Result<()> {
    let host = host(lab)?;
    let phase = |rw: &str| {
        format!(
            "before=$(interrupts)\nmark {rw} 1\n\
             fio --name=io --filename=/dev/vda --rw={rw} --bs=4k --iodepth=16 --ioengine=io_uring --direct=1 \
             --time_based --runtime={SECONDS} --output-format=json >/tmp/fio\nmark {rw}-end 1\n\
             value {rw}-interrupts $(( $(interrupts) - before ))\n\
             value {rw}-requests \"$(awk '/\"total_ios\"/ {{ gsub(/[^0-9]/, \"\"); n += $0 }} END {{ print n }}' /tmp/fio)\"\n"
        )
    };
    let run = guest()?
        .kernel(GuestKernel::Stock)
        .programs()
        .args(&["--disk", "path=/dev/nvme0n1,direct=on"])
        .script(&format!(
            "interrupts() {{ awk '/virtio[0-9]+-req/ {{ n += $2 }} END {{ print n + 0 }}' /proc/interrupts; }}\n\
             mark busy 1\ntimeout {BUSY_SECONDS} sh -c 'while :; do :; done' || true\nmark busy-end 1\n\
             {}{}",
            phase("randread"),
            phase("randwrite")
        ));
    let result = host.guest(&run)?.success()?;
    let between = |name: &str| {
        let marks = &result.marks;
        let mark = |name: &str| {
            marks
                .get(name)
                .with_context(|| format!("no snapshot of {name}"))
        };
        anyhow::Ok((mark(name)?, mark(&format!("{name}-end"))?))
    };
    let busy = {
        let (before, after) = between("busy")?;
        after.since(before, "exits").context("no counter")? as f64
            / (after.vcpu_seconds() - before.vcpu_seconds())
    };
    tell!("without its disk: {busy:.0} exits a second of its processor's time");
    for rw in ["randread", "randwrite"] {
        let number =
            |what: &str| anyhow::Ok(result.value(&format!("{rw}-{what}"))?.parse::<f64>()?);
        let (before, after) = between(rw)?;
        let requests = number("requests")?;
        let all = after.since(before, "exits").context("no counter")? as f64;
        let exits = (all - busy * (after.vcpu_seconds() - before.vcpu_seconds())) / requests;
        let interrupts = number("interrupts")? / requests;
        tell!(
            "{rw}: {requests} requests, {:.2} exits each, {exits:.2} of them its own, and {interrupts:.2} interrupts",
            all / requests
        );
        let each = after.kvm.keys().filter_map(|name| {
            let each = after.since(before, name)? as f64 / requests;
            (each >= 0.01).then(|| format!("{name} {each:.2}"))
        });
        tell!(
            "KVM's counters for each: {}",
            each.collect::<Vec<_>>().join(", ")
        );
        ensure!(requests > 100.0, "{rw}: {requests} requests");
        ensure!(
            exits <= MOST_EXITS,
            "{rw}: {exits:.2} exits of its own for each of {requests} requests, {interrupts:.2} interrupts; {busy:.0} a second without it"
        );
        ensure!(
            interrupts <= 0.5,
            "{rw}: {interrupts:.2} interrupts for each of {requests} requests"
        );
    }
    Ok(())
}

/// What the last guest writes over both disks.
const SEED: u64 = 7;

/// In each round a guest finds what the one before has flushed, and writes on until Busway is killed. The last one writes
/// one pattern over both, and `qemu-img` finds it in both images.
fn killed(lab: &mut Lab, tier: Tier) -> Result<()> {
    let host = host(lab)?;
    host.run(
        "rm -f /run/churn.*; truncate -s 8M /run/churn.raw; qemu-img create -q -f qcow2 /run/base.qcow2 8M\n\
         qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 /run/churn.qcow2",
    )?;
    let rounds = tier.of(2, 50);
    let mut flushed = [0_u64; 2];
    for round in 0..=rounds {
        let last = round == rounds;
        let [look, churn] = scripts(flushed);
        let whole = format!("lab-io write /dev/vda {SEED}\nlab-io write /dev/vdb {SEED}\n");
        let script = look + if last { &whole } else { &churn };
        let run = guest()?
            .args(&[
                "--disk",
                "path=/run/churn.raw",
                "path=/run/churn.qcow2,image_type=qcow2,backing_files=on",
            ])
            .script(&script);
        if last {
            host.guest(&run)?.success()?;
            break;
        }
        let running = host.start_guest(&run)?;
        wait_for_flushes(&running)?;
        running.signal("KILL")?;
        let result = running.finish()?;
        ensure!(result.status == 128 + 9, "status {}", result.status);
        flushed = flushed_by(&result)?;
        // A leak is 3: clusters that nobody has are lost, and nothing else.
        host.run("qemu-img check -q /run/churn.qcow2 || [ $? = 3 ]")?;
    }
    count("rounds", rounds);
    compared(host)?;
    host.run("qemu-img check -q /run/base.qcow2; rm -f /run/churn.* /run/base.qcow2")
        .map(drop)
}

/// What looks whether so many writes are there, and what writes on from there.
fn scripts([raw, qcow2]: [u64; 2]) -> [String; 2] {
    [
        format!(
            "value raw \"$(lab-io churned /dev/vda {raw})\"\nvalue qcow2 \"$(lab-io churned /dev/vdb {qcow2})\"\n"
        ),
        format!("lab-io churn /dev/vda {raw} &\nlab-io churn /dev/vdb {qcow2} &\nwait\n"),
    ]
}

/// Waits until the guest has found what was flushed before, and has flushed more.
fn wait_for_flushes(running: &RunningGuest<'_>) -> Result<()> {
    running.wait_line("@@value qcow2 blocks=")?;
    for disk in ["/dev/vda", "/dev/vdb"] {
        running.wait_line(&format!("path={disk}"))?;
    }
    Ok(())
}

/// How many writes the guest has flushed, by what it said last of each disk.
fn flushed_by(result: &GuestResult) -> Result<[u64; 2]> {
    let text = result.transcript.text();
    let flushed = |disk: &str| {
        let lines = text.lines();
        let mut said = lines.filter(|line| line.ends_with(disk) && line.contains("flushed="));
        let said = said.next_back().context("nothing was flushed")?;
        anyhow::Ok(word(said, "flushed")?.parse()?)
    };
    Ok([flushed("/dev/vda")?, flushed("/dev/vdb")?])
}

/// The same, with the images on a drive's file system, and the host's kernel gone from one moment to the next.
fn crashed(lab: &mut Lab) -> Result<()> {
    const ROUNDS: u64 = 5;
    let config = HostConfig::new(Kernel::Iommufd).device(Device::nvme("nv0", 128));
    let host = lab.host(&config)?;
    host.run(
        "set -e; mkfs.ext4 -q /dev/nvme0n1; mkdir -p /run/kept; mount /dev/nvme0n1 /run/kept; cd /run/kept\n\
         truncate -s 8M raw; qemu-img create -q -f qcow2 base 8M; qemu-img create -q -f qcow2 -b base -F qcow2 qcow2\n\
         sync; mkdir -p /lab/keep/usr/local/bin; cp /usr/local/bin/* /lab/keep/usr/local/bin/",
    )?;
    let mut flushed = [0; 2];
    for round in 0..=ROUNDS {
        let [look, churn] = scripts(flushed);
        let last = round == ROUNDS;
        let run = guest()?
            .args(&[
                "--disk",
                "path=/run/kept/raw",
                "path=/run/kept/qcow2,image_type=qcow2,backing_files=on",
            ])
            .script(&(look + if last { "" } else { &churn }));
        if last {
            host.guest(&run)?.success()?;
            break;
        }
        let running = host.start_guest(&run)?;
        wait_for_flushes(&running)?;
        host.crash()?;
        flushed = flushed_by(&running.finish()?)?;
        tell!("crash {round}: {flushed:?} writes were flushed");
        host.run(
            "set -e; udevadm wait --timeout=60 /dev/nvme0n1; mkdir -p /run/kept; mount /dev/nvme0n1 /run/kept\n\
             qemu-img check -q /run/kept/qcow2 || [ $? = 3 ]",
        )?;
    }
    count("crashes", ROUNDS);
    // What is in /lab/keep would be in the next trial's host.
    lab.stop();
    Ok(())
}

/// By `qemu-img`, both images hold what the guest wrote, which is made anew here, and nothing else passes for it.
fn compared(host: &Host) -> Result<()> {
    let compare = |image: &str, seed: u64| {
        let (format, file) = (image, format!("/run/churn.{image}"));
        let output = host.output(
            &format!(
                "truncate -s 8M /run/wrote && lab-io write /run/wrote {seed} >&2 || exit 100\n\
                 qemu-img compare -f {format} -F raw {file} /run/wrote; status=$?; rm -f /run/wrote; exit $status"
            ),
            Duration::from_secs(60),
        )?;
        let Output {
            status,
            stdout,
            stderr,
        } = output;
        anyhow::Ok((status, format!("{stdout}{stderr}")))
    };
    for image in ["raw", "qcow2"] {
        let (status, said) = compare(image, SEED)?;
        ensure!(status == 0, "{image}, status {status}: {said}");
        // 1 is for images that differ, and more for those that could not be read.
        let (status, said) = compare(image, SEED + 1)?;
        ensure!(
            status == 1,
            "{image} beside another pattern, status {status}: {said}"
        );
    }
    Ok(())
}

/// A file system that is frozen takes no write, and nothing takes one back from it.
fn frozen(lab: &mut Lab) -> Result<()> {
    const CTL: &str = "busway ctl --api-socket /run/vm.sock";
    let host = host(lab)?;
    host.run(
        "set -e; mkfs.ext4 -q /dev/nvme0n1; mkdir -p /run/cold; mount /dev/nvme0n1 /run/cold\n\
         truncate -s 8M /run/cold/disk.raw; truncate -s 8M /run/warm.raw",
    )?;
    let run = guest()?
        .args(&["--disk", "path=/run/cold/disk.raw", "path=/run/warm.raw"])
        .args(&["--api-socket", "/run/vm.sock"])
        .script(
            "value up yes\nuntil_pressed frozen\n\
             lab-io write /dev/vda 3 >/tmp/cold &\n\
             value other \"$(lab-io write /dev/vdb 4 && lab-io verify /dev/vdb 4)\"\n\
             wait\nvalue cold \"$(cat /tmp/cold && lab-io verify /dev/vda 3)\"\n",
        );
    let running = host.start_guest(&run)?;
    running.wait_line("@@value frozen")?;
    host.run(&format!("fsfreeze -f /run/cold && {CTL} power-button"))?;
    let others = running.wait_line("@@value other");
    // With the write in the kernel: a pause is answered, and so is a resume.
    let paused = others.and_then(|_| {
        host.run(&format!(
            "set -e; for round in 1 2; do timeout 15 {CTL} pause; {CTL} info | grep -q -i paused; {CTL} resume; done"
        ))
    });
    host.run("fsfreeze -u /run/cold")?;
    paused?;
    let result = running.finish()?.success()?;
    ensure!(
        result.stderr.contains("does not give back"),
        "nobody says what was waited for: {}",
        result.stderr
    );
    result.value("cold")?;
    host.run("umount /run/cold; rm -f /run/warm.raw").map(drop)
}

/// A raw file with a limit and a processor of its own, a qcow2 image and a block device, by the calls that there were
/// before io_uring; and a console at a socket beside them.
fn by_plain_calls(lab: &mut Lab) -> Result<()> {
    let host = host(lab)?;
    host.run(
        "set -e; sysctl -q -w kernel.io_uring_disabled=2; rm -f /run/hvc.*\n\
         truncate -s 8M /run/plain.raw; qemu-img create -q -f qcow2 /run/plain.qcow2 8M",
    )?;
    let disks = ["/dev/vda", "/dev/vdb", "/dev/vdc"];
    let work = disks.map(|disk| {
        format!(
            "value {disk} \"$(lab-io write {disk} 6 && lab-io verify {disk} 6)\"\n\
             dd if=/dev/zero of={disk} bs=512 seek=1 count=1 conv=notrunc,fsync 2>/dev/null\n\
             blkdiscard -o 1048576 -l 1048576 {disk}\nlab-io zero {disk} 2097152 1048576\n\
             value zeroed{disk} \"$(dd if={disk} bs=1M skip=2 count=1 2>/dev/null | tr -d '\\0' | wc -c)\"\n"
        )
    });
    let run = guest()?
        .args(&[
            "--disk",
            "path=/run/plain.raw,queue_affinity=[0@[0]],bw_size=8M,bw_refill_time=500",
            "path=/run/plain.qcow2,image_type=qcow2",
            "path=/dev/nvme0n1,direct=on",
        ])
        .args(&["--console", "socket=/run/hvc.sock"])
        .script(&format!(
            "value up yes\nread -r said </dev/hvc0\nvalue said \"$said\"\necho the guest is heard >/dev/hvc0\n{}",
            work.concat()
        ));
    let running = host.start_guest(&run)?;
    running.wait_line("@@value up")?;
    let client = host.spawn(
        "printf 'the host is heard\\n' | socat -t 300 - UNIX-CONNECT:/run/hvc.sock,shut-none >/run/hvc.said",
    )?;
    let result = running.finish()?.success()?;
    ensure!(
        result
            .stderr
            .contains("kernel.io_uring_disabled keeps it from this process"),
        "nobody says what serves the disks: {}",
        result.stderr
    );
    ensure!(result.value("said")? == "the host is heard");
    for disk in disks {
        result.value(disk)?;
        ensure!(result.value(&format!("zeroed{disk}"))? == "0", "{disk}");
    }
    // The client ends when Busway has.
    host.run(
        "for each in $(seq 100); do grep -q 'the guest is heard' /run/hvc.said && exit 0; sleep 0.1; done; exit 1",
    )?;
    drop(client);
    host.run("qemu-img check -q /run/plain.qcow2; rm -f /run/plain.* /run/hvc.said\nsysctl -q -w kernel.io_uring_disabled=0")
        .map(drop)
}
