//! A TPM that is Debian's swtpm, in guests with Debian's kernel, which has its driver built in.

use std::time::Duration;

use anyhow::{Result, ensure};
use busway_lab::{
    BEFORE_FIRMWARE, GuestKernel, GuestResult, GuestRun, Host, HostConfig, Job, Kernel, Lab, Vmm,
};

use crate::Proof;
use crate::hotplug::{CTL, SOCKET};
use crate::life::COMPLAINTS;

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "tpm_of_a_guest_with_a_kernel_begins_anew_at_its_restart_and_says_that_it_has_failed_without_swtpm",
        with_a_kernel,
    ),
    Proof::new(
        "tpm_has_in_its_registers_what_firmware_measured_the_same_after_a_restart",
        by_firmware,
    ),
];

const TPM: [&str; 2] = ["--tpm", "socket=/run/tpm.sock"];
const ZERO: &str = "0000000000000000000000000000000000000000000000000000000000000000";

fn start(host: &Host) -> Result<Job> {
    let job = host.spawn(
        "rm -f /run/tpm.sock; mkdir -p /run/tpm; exec swtpm socket --tpm2 --tpmstate dir=/run/tpm \
         --ctrl type=unixio,path=/run/tpm.sock",
    )?;
    host.run(
        "for each in $(seq 500); do [ ! -S /run/tpm.sock ] || exit 0; sleep 0.02; done; exit 1",
    )?;
    Ok(job)
}

/// `pcr N` is a register of the bank of SHA-256; `extend` adds to register 16 by `TPM2_PCR_Extend` with an empty password, and
/// gives the response's code; `next LIFE` says on the disk which life of the guest's comes.
const SCRIPT: &str = r#"
pcr() { tr A-F a-f <"/sys/class/tpm/tpm0/pcr-sha256/$1"; }
bytes() { for each in "$@"; do printf "\\x$each"; done; }
extend() {
    exec 3<>/dev/tpm0
    { bytes 80 02 00 00 00 41 00 00 01 82 00 00 00 10 00 00 00 09 40 00 00 09 00 00 00 00 00 00 00 00 01 00 0b
      head -c 32 /dev/zero; } >/tmp/command
    cat /tmp/command >&3
    dd bs=4096 count=1 <&3 2>/dev/null | hexdump -v -e '/1 "%02x"' | cut -c 13-20
    exec 3>&-
}
value version "$(cat /sys/class/tpm/tpm0/tpm_version_major)"
life=$(head -c 6 /dev/vda | tr -d '\0')
life=${life:-first}
next() { printf "$1" | dd of=/dev/vda conv=sync,fsync 2>/dev/null; }
"#;

/// Without firmware nothing is measured before the kernel. What the guest adds is gone after its restart. When swtpm is killed
/// the guest goes on, and its commands fail; a swtpm in its place is the TPM of the next life.
fn with_a_kernel(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Stock))?;
    host.run("rm -rf /run/tpm /run/tpm.raw; truncate -s 1M /run/tpm.raw")?;
    let swtpm = start(host)?;
    let script = format!(
        "{SCRIPT}\
         value before_$life \"$(pcr 16)\"\n\
         value extend_$life \"$(extend)\"\n\
         value after_$life \"$(pcr 16)\"\n\
         if [ $life = first ]; then next second; reboot -f; fi\n\
         if [ $life = second ]; then\n\
         until_pressed killed\n\
         value lost \"$(extend 2>&1)\"\n\
         next third-\n\
         until_pressed back\n\
         reboot -f\n\
         fi\n\
         {{ dmesg | grep -iE \"{COMPLAINTS}\" || true; }} | block complaints\n"
    );
    let run = GuestRun::new(Vmm::Busway)
        .args(&["--disk", "path=/run/tpm.raw"])
        .args(&TPM)
        .args(&SOCKET)
        .script(&script);
    let running = host.start_guest(&run)?;
    running.wait_line("@@value killed")?;
    swtpm.signal("KILL")?;
    let _killed = swtpm.wait(Duration::from_secs(10))?;
    running.wait_said("the guest's TPM has failed")?;
    host.run(&format!("{CTL} power-button"))?;
    running.wait_line("@@value back")?;
    let again = start(host)?;
    host.run(&format!("{CTL} power-button"))?;
    let result = running.finish()?.success()?;
    drop(again);
    ensure!(result.value("version")? == "2");
    for life in ["first", "second", "third-"] {
        let [before, done, after] =
            ["before", "extend", "after"].map(|key| format!("{key}_{life}"));
        ensure!(
            result.value(&before)? == ZERO,
            "{before}: {}",
            result.value(&before)?
        );
        ensure!(
            result.value(&done)? == "00000000",
            "{done}: {}",
            result.value(&done)?
        );
        let after = result.value(&after)?;
        ensure!(
            after != ZERO && after == result.value("after_first")?,
            "{life}: {after}"
        );
    }
    ensure!(
        result.value("lost")? != "00000000",
        "a command was carried out by nobody"
    );
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    host.run("rm -rf /run/tpm /run/tpm.raw").map(drop)
}

/// OVMF measures itself and what it starts: its registers are not zero, and are the same after a restart.
fn by_firmware(lab: &mut Lab) -> Result<()> {
    let host = lab.host(&HostConfig::new(Kernel::Stock))?;
    host.run(BEFORE_FIRMWARE)?;
    host.run("rm -rf /run/tpm /run/tpm.raw; truncate -s 1M /run/tpm.raw")?;
    let swtpm = start(host)?;
    let script = format!(
        "{SCRIPT}\
         for each in 0 1 2 3 4 5 6 7; do value \"pcr${{each}}_$life\" \"$(pcr $each)\"; done\n\
         if [ $life = first ]; then next second; reboot -f; fi\n\
         {{ dmesg | grep -iE \"{COMPLAINTS}|tpm.*(fail|error)\" || true; }} | block complaints\n"
    );
    let run = GuestRun::new(Vmm::Busway)
        .kernel(GuestKernel::Stock)
        .limit(Duration::from_secs(300))
        .args(&[
            "--firmware",
            "auto,vars=/run/tpm.vars",
            "--disk",
            "path=/run/tpm.raw",
        ])
        .args(&TPM)
        .script(&script);
    let result = host.start_guest(&run)?.finish()?.success()?;
    drop(swtpm);
    measured(&result)?;
    let complaints = result.block("complaints")?;
    ensure!(complaints.is_empty(), "the guest complains:\n{complaints}");
    host.run("rm -rf /run/tpm /run/tpm.raw /run/tpm.vars")
        .map(drop)
}

/// Code, its configuration, what was started, and its state of Secure Boot; in the second life as in the first, but for what
/// boots are counted in.
fn measured(result: &GuestResult) -> Result<()> {
    for number in 0..8 {
        let [first, second] = ["first", "second"].map(|life| format!("pcr{number}_{life}"));
        let (first, second) = (result.value(&first)?, result.value(&second)?);
        ensure!(first != ZERO && second != ZERO, "PCR {number} is zero");
        if [0, 2, 3, 7].contains(&number) {
            ensure!(first == second, "PCR {number}: {first}, then {second}");
        }
    }
    Ok(())
}
