//! Guests of a host whose processors are two threads of one core: what may be on the core beside a vCPU.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use busway_lab::{Host, HostConfig, Kernel, Lab, Profile, build_busway, build_tests};

use crate::assigned::guest;
use crate::hotplug::{CTL, SOCKET};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[Proof::soak(
    "cores_with_two_threads_run_beside_a_vcpu_what_was_asked_for_and_nothing_else",
    |lab, _| beside(lab),
)];

/// Both of the guest's processors are busy, and then the first only.
const SCRIPT: &str = "\
    busy() { taskset $1 sh -c 'while :; do :; done' & }\n\
    busy 1; busy 2; second=$!\n\
    until_pressed both\n\
    kill $second\n\
    until_pressed first\n";

/// How long is looked at how much threads run, in seconds of the host's.
const WINDOW: &str = "3";

/// The processor time of the first vCPU, of the second, and of the host's own loop where there is one, each as part of the
/// time that passes meanwhile.
fn shares(host: &Host) -> Result<[f64; 3]> {
    let said = host.run(&format!(
        "tasks() {{ for one in vcpu0 vcpu1 cores-loop; do\n\
         grep -lx $one /proc/[0-9]*/task/*/comm 2>/dev/null || true; done; }}\n\
         look() {{ date +%s%N; for each in $all; do awk '{{ print $1 }}' ${{each%comm}}schedstat; done; }}\n\
         all=$(tasks); before=$(look); sleep {WINDOW}; after=$(look)\n\
         echo $before; echo $after"
    ))?;
    let mut lines = said.lines().map(|line| {
        let words = line.split_ascii_whitespace();
        words.map(str::parse).collect::<Result<Vec<f64>, _>>()
    });
    let mut line = || lines.next().context("two lines")?.context("numbers");
    let (before, after) = (line()?, line()?);
    let grown: Vec<f64> = after.iter().zip(&before).map(|(a, b)| a - b).collect();
    match grown[..] {
        [wall, first, second] => Ok([first, second, 0.0].map(|one| one / wall)),
        [wall, first, second, third] => Ok([first, second, third].map(|one| one / wall)),
        _ => anyhow::bail!("{said}"),
    }
}

/// A guest whose two vCPUs are each on a thread of the core: of the time that passes, the part that the one runs which runs
/// less, and both parts together; first of the two vCPUs, and then of the first and a busy loop of the host's.
fn together(host: &Host, word: &str) -> Result<[(f64, f64); 2]> {
    let cpus = format!("affinity=[0@[0],1@[1]],core_scheduling={word}");
    let run = guest()?
        .cpus(2)
        .args(&["--cpus", &cpus])
        .args(&SOCKET)
        .limit(Duration::from_secs(300))
        .script(SCRIPT);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value both")?;
    let [first, second, _] = shares(host)?;
    tell!("{word}: the vCPUs run {first:.2} and {second:.2}");
    let own = (first.min(second), first + second);
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value first")?;
    host.run(
        "ln -sf /bin/sh /run/cores-loop\n\
         taskset 2 /run/cores-loop -c 'while :; do :; done' </dev/null >/dev/null 2>&1 & echo $! >/run/loop.pid",
    )?;
    let [first, second, other] = shares(host)?;
    tell!("{word}: the vCPUs run {first:.2} and {second:.2}, the host's loop {other:.2}");
    host.run(&format!("kill $(cat /run/loop.pid); {CTL} power-button"))?;
    running.finish()?.success()?;
    Ok([own, (first.min(other), first + other)])
}

/// The tests of `tests/kvm/cores.rs` see each thread's cookie. Then guests show what comes of them: two threads that may not be
/// on one core together run no longer than one of them could, and those that may run twice as long.
fn beside(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::CoreScheduling).threads(2))?;
    let siblings =
        host.run("cat /sys/devices/system/cpu/cpu0/topology/thread_siblings_list /sys/devices/system/cpu/smt/active")?;
    ensure!(
        siblings.split_ascii_whitespace().eq(["0-1", "1"]),
        "{siblings}"
    );
    for word in ["off", "vm", "vcpu"] {
        let [own, other] = together(host, word)?;
        let apart = |(less, sum): (f64, f64), is: bool, whose: &str| {
            let right = if is { sum < 1.3 } else { sum > 1.6 };
            ensure!(right && less > 0.1, "{word}: {less}, {sum} with {whose}");
            anyhow::Ok(())
        };
        apart(own, word == "vcpu", "its own vCPU")?;
        apart(other, word != "off", "the host's loop")?;
    }
    let tests = build_tests("kvm")?;
    host.install_as(&tests, "busway-kvm-tests")?;
    // The tests start the program where it was when they were built.
    let busway = build_busway(Profile::Lab)?;
    let folder = busway.parent().context("a program is in a folder")?;
    let said = host.run(&format!(
        "mkdir -p '{}'\nln -s /usr/local/bin/busway '{}'\n\
         BUSWAY_TEST_COOKIES=1 busway-kvm-tests cores:: --test-threads=1 2>&1",
        folder.display(),
        busway.display()
    ))?;
    ensure!(said.contains("3 passed"), "{said}");
    Ok(())
}
