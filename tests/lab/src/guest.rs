//! One guest, run in the emulated host by Busway or by QEMU.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow, bail};
use serde_json::Value;

use crate::cpio;
use crate::digest::last_lines;
use crate::host::Host;
use crate::job::Job;
use crate::parts::Parts;
use crate::snapshot::Snapshot;
use crate::spent;
use crate::suspect::{Suspect, left_a_triple_fault};
use crate::transcript::{EXEC, Transcript, UP};

/// The VMM that runs a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// The `busway` that [`Host::install`] put into the host.
    Busway,
    /// QEMU's q35 machine with KVM, from the host's own package.
    Qemu,
}

/// The kernel that a guest boots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKernel {
    /// Debian's own, a bzImage.
    Stock,
    /// The same unpacked, an ELF file that is entered by PVH.
    StockElf,
}

/// What every guest's kernel is started with.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1";
/// What Busway says of a guest that does.
const TRIPLE_FAULT: &str = "triple-faulted";
/// What its boot can do without where the boot is not on trial: checks of timers, of ciphers and of a source of
/// randomness that takes a third of a second to fill, another address each time, and defences against attackers.
const QUICKLY: &str = "mitigations=off nokaslr no_timer_check tsc=reliable audit=0 cryptomgr.notests \
                       initcall_blacklist=jent_mod_init init_on_alloc=0 randomize_kstack_offset=off lsm=landlock";

/// What a host runs before guests begin with firmware, which writes CR8: the emulator has to be kept from that, see
/// `setup/lab-cr8.c`.
pub const BEFORE_FIRMWARE: &str = "[ -d /sys/module/lab_cr8 ] || insmod /usr/local/lib/lab-cr8.ko";

/// A guest to be run: what it is made of, and the script that it runs.
///
/// The script is busybox's shell with `set -e`. It has the functions `value KEY WORDS`,
/// `COMMAND | block NAME` and `mark NAME [SECONDS]`; at a mark the host takes a [`Snapshot`] of the
/// VMM, while the guest waits that long (a second, if it says nothing). At the script's end the guest
/// powers off, and `status` is among its values.
#[derive(Debug, Clone)]
pub struct GuestRun {
    vmm: Vmm,
    kernel: GuestKernel,
    cpus: u32,
    memory_mib: u64,
    devices: Vec<String>,
    cmdline: String,
    arguments: Vec<String>,
    opener: Option<String>,
    programs: bool,
    net_programs: bool,
    files: Vec<(String, PathBuf)>,
    script: String,
    limit: Duration,
    dies: bool,
}

impl GuestRun {
    /// One processor, 512 MiB, the stock kernel as ELF, which boots sooner, no device and nothing to do.
    pub fn new(vmm: Vmm) -> Self {
        Self {
            vmm,
            kernel: GuestKernel::StockElf,
            cpus: 1,
            memory_mib: 512,
            devices: Vec::new(),
            cmdline: format!("{CMDLINE} {QUICKLY}"),
            arguments: Vec::new(),
            opener: None,
            programs: false,
            net_programs: false,
            files: Vec::new(),
            script: String::new(),
            limit: Duration::from_secs(180),
            dies: false,
        }
    }

    /// Takes another kernel.
    pub fn kernel(mut self, kernel: GuestKernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Takes another number of processors.
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Takes another memory size.
    pub fn memory_mib(mut self, memory_mib: u64) -> Self {
        self.memory_mib = memory_mib;
        self
    }

    /// Gives the guest a host device by its address, which has to be bound to VFIO.
    pub fn device(mut self, address: &str) -> Self {
        self.devices.push(address.to_owned());
        self
    }

    /// Leaves out of the kernel's command line what spares it a second of its boot, for trials of how it boots.
    pub fn booted_in_full(mut self) -> Self {
        self.cmdline = CMDLINE.to_owned();
        self
    }

    /// Appends words to the kernel's command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// Adds words to the VMM's own command line.
    pub fn args(mut self, words: &[&str]) -> Self {
        self.arguments
            .extend(words.iter().map(|&word| word.to_owned()));
        self
    }

    /// Has Debian's firmware start the kernel, which has to be [`GuestKernel::Stock`]. The host needs
    /// [`BEFORE_FIRMWARE`] first.
    pub fn firmware(self) -> Self {
        match self.vmm {
            Vmm::Busway => self.args(&["--firmware", "auto"]),
            Vmm::Qemu => {
                let chip = "if=pflash,format=raw";
                let code = "unit=0,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd";
                let variables = "unit=1,snapshot=on,file=/usr/share/OVMF/OVMF_VARS_4M.fd";
                let [code, variables] = [code, variables].map(|words| format!("{chip},{words}"));
                self.args(&["-drive", &code, "-drive", &variables])
            }
        }
    }

    /// Has a bash script become the VMM: it prepares what it will, descriptors and limits among it, and ends with
    /// `exec … "$@"`.
    pub fn opened_by(mut self, script: &str) -> Self {
        self.opener = Some(script.to_owned());
        self
    }

    /// Gives the guest Debian's `fio` and `lspci`, at the price of 57 MB more of initramfs.
    pub fn programs(mut self) -> Self {
        self.programs = true;
        self
    }

    /// Gives the guest Debian's `iperf3`, and the kernel's bridge as files that `insmod` takes in their order: `/lib/bridge/*`.
    pub fn net_programs(mut self) -> Self {
        self.net_programs = true;
        self
    }

    /// Puts a file of this machine, such as a static program, into the guest: `bin/lab-io`.
    pub fn file(mut self, inside: &str, outside: &Path) -> Self {
        self.files.push((inside.to_owned(), outside.to_owned()));
        self
    }

    /// What the guest does.
    pub fn script(mut self, script: &str) -> Self {
        self.script = script.to_owned();
        self
    }

    /// The guest triple-faults or crashes on purpose; in any other, that may be the emulator's doing: see `docs/lab.md`.
    pub fn dies(mut self) -> Self {
        self.dies = true;
        self
    }

    /// How long it may take altogether.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// What the kernel is started with.
    pub fn kernel_words(&self) -> &str {
        &self.cmdline
    }

    /// The initramfs segment of the guest's own: appended to `guest.img`, it brings script and files.
    pub fn segment(&self) -> Result<Vec<u8>> {
        let mut files = vec![("script", self.script.clone().into_bytes())];
        for (inside, outside) in &self.files {
            let content = fs::read(outside);
            let content = content.with_context(|| format!("reading {}", outside.display()))?;
            files.push((inside, content));
        }
        Ok(cpio::archive(
            files
                .iter()
                .map(|(name, content)| (*name, content.as_slice())),
        ))
    }

    fn command(&self, kernel: &str, initramfs: &str, report: &str) -> Vec<String> {
        let mut words: Vec<String> = Vec::new();
        let mut add = |more: &[&str]| words.extend(more.iter().map(|&word| word.to_owned()));
        let boot = [kernel, initramfs, &self.cmdline];
        match self.vmm {
            Vmm::Busway => {
                add(&["busway", "run", "--kernel", boot[0], "--initramfs", boot[1]]);
                add(&[
                    "--cmdline",
                    boot[2],
                    "--cpus",
                    &format!("boot={}", self.cpus),
                ]);
                add(&["--memory", &format!("size={}M", self.memory_mib)]);
                add(&["--serial", "tty", "--report", report]);
                if let Ok(seccomp) = std::env::var("BUSWAY_LAB_SECCOMP")
                    && !self.arguments.iter().any(|word| word == "--seccomp")
                {
                    add(&["--seccomp", &seccomp]);
                }
                self.devices
                    .iter()
                    .for_each(|address| add(&["--device", address]));
            }
            Vmm::Qemu => {
                add(&[
                    "qemu-system-x86_64",
                    "-machine",
                    "q35,accel=kvm",
                    "-cpu",
                    "host",
                ]);
                add(&[
                    "-nodefaults",
                    "-no-user-config",
                    "-display",
                    "none",
                    "-no-reboot",
                ]);
                add(&["-serial", "stdio", "-kernel", boot[0], "-initrd", boot[1]]);
                add(&["-append", boot[2], "-smp", &self.cpus.to_string()]);
                add(&["-m", &self.memory_mib.to_string()]);
                for (port, functions) in functions_by_slot(&self.devices).iter().enumerate() {
                    add(&[
                        "-device",
                        &format!("pcie-root-port,id=port{port},chassis={port}"),
                    ]);
                    for (function, address) in functions.iter().enumerate() {
                        let place = format!("bus=port{port},addr=0.{function},multifunction=on");
                        add(&["-device", &format!("vfio-pci,host={address},{place}")]);
                    }
                }
            }
        }
        words.extend(self.arguments.iter().cloned());
        words
    }
}

/// A guest that runs.
#[derive(Debug)]
pub struct RunningGuest<'host> {
    host: &'host Host,
    job: Job,
    limit: Duration,
    dies: bool,
    _boot: spent::GuestBoot,
    left: Left,
}

/// Says what the VMM said last, where a trial has failed and left its guest.
#[derive(Debug)]
struct Left {
    said: Option<PathBuf>,
    dies: bool,
}

impl Drop for Left {
    fn drop(&mut self) {
        let said = self.said.take();
        let said = said.and_then(|path| fs::read_to_string(path).ok());
        if let Some(said) = said.filter(|said| !said.is_empty()) {
            if !self.dies && said.contains(TRIPLE_FAULT) {
                left_a_triple_fault();
            }
            eprintln!(
                "the trial has left its guest; the VMM said:\n{}",
                last_lines(&said, 15)
            );
        }
    }
}

/// What came of a guest.
#[derive(Debug, Clone)]
pub struct GuestResult {
    /// The VMM's exit status.
    pub status: i32,
    /// The guest's console, and what its script said.
    pub transcript: Transcript,
    /// The VMM's counters at each of the guest's marks.
    pub marks: BTreeMap<String, Snapshot>,
    /// What the VMM wrote to its standard error.
    pub stderr: String,
    /// Busway's boot report, if it wrote one.
    pub report: Option<Value>,
}

impl Host {
    /// Runs a guest to its end.
    pub fn guest(&self, run: &GuestRun) -> Result<GuestResult> {
        self.start_guest(run)?.finish()
    }

    /// Starts a guest.
    pub fn start_guest(&self, run: &GuestRun) -> Result<RunningGuest<'_>> {
        let folder = self.job_folder()?;
        let inside = folder.inside();
        fs::write(folder.path.join("script.cpio"), run.segment()?)?;
        fs::write(folder.path.join("guest-run"), include_str!("guest-run.sh"))?;
        let kernel = Parts::inside(match run.kernel {
            GuestKernel::Stock => "bzImage",
            GuestKernel::StockElf => "vmlinux",
        });
        let mut images = vec![Parts::inside("guest.img")];
        if run.programs {
            images.push(Parts::inside("guest-programs.img"));
        }
        if run.net_programs {
            images.push(Parts::inside("guest-net.img"));
        }
        let initramfs = format!("/run/lab/{}.img", folder.id);
        let command = run.command(&kernel, &initramfs, &format!("{inside}/report.json"));
        let command = match &run.opener {
            Some(opener) => {
                fs::write(folder.path.join("opener"), opener)?;
                [vec!["bash".to_owned(), format!("{inside}/opener")], command].concat()
            }
            None => command,
        };
        let command: Vec<String> = command.iter().map(|word| quote(word)).collect();
        let script = format!(
            "trap 'rm -f {initramfs}' EXIT\ncat {} {inside}/script.cpio >{initramfs}\n\
             bash {inside}/guest-run {inside} {} {}\n",
            images.join(" "),
            if run.dies { "dies" } else { "lives" },
            command.join(" "),
        );
        let name = format!("a guest under {:?}", run.vmm);
        let _boot = spent::guest_boots(&folder.path.join("stdout"));
        let left = Left {
            said: Some(folder.path.join("vmm.stderr")),
            dies: run.dies,
        };
        let job = self.start(folder, &name, &script)?;
        Ok(RunningGuest {
            host: self,
            job,
            limit: run.limit,
            dies: run.dies,
            _boot,
            left,
        })
    }
}

impl RunningGuest<'_> {
    /// Waits until the guest's console shows a line that contains these words.
    pub fn wait_line(&self, words: &str) -> Result<String> {
        self.wait_line_in("stdout", words)
    }

    /// Waits until the VMM has said these words on its standard error.
    pub fn wait_said(&self, words: &str) -> Result<String> {
        self.wait_line_in("vmm.stderr", words)
    }

    fn wait_line_in(&self, file: &str, words: &str) -> Result<String> {
        let wanted = |line: &str| line.contains(words);
        let what = format!("{words:?}");
        self.job
            .wait_line_in(file, &what, self.limit, wanted, || self.restarted_itself())
            .map_err(|error| self.with_what_was_said(error))
    }

    /// What the VMM said last, beside why a line did not come.
    fn with_what_was_said(&self, error: Error) -> Error {
        let said = fs::read_to_string(self.job.folder().join("vmm.stderr")).unwrap_or_default();
        // What is to be begun anew is known by its kind, and says this by itself.
        if said.is_empty() || error.is::<Suspect>() {
            return error;
        }
        anyhow!("{error:#}\nthe VMM said:\n{}", last_lines(&said, 15))
    }

    /// That the guest has triple-faulted though it was not to: it begins anew then, and what a trial waits for does not
    /// come.
    fn restarted_itself(&self) -> Option<Error> {
        let said = fs::read_to_string(self.job.folder().join("vmm.stderr")).unwrap_or_default();
        (!self.dies && said.contains(TRIPLE_FAULT)).then(|| {
            let console = last_lines(&self.job.stdout(), 40);
            Suspect(format!(
                "the guest triple-faulted; its console ends:\n{console}\nthe VMM said:\n{said}"
            ))
            .into()
        })
    }

    /// Waits until the guest's first program has begun.
    pub fn wait_up(&self) -> Result<()> {
        self.wait_line(UP).map(drop)
    }

    /// The VMM's process id in the host.
    pub fn pid(&self) -> Result<u32> {
        self.wait_line(EXEC)?;
        let text = fs::read_to_string(self.job.folder().join("vmm.pid"))?;
        text.trim()
            .parse()
            .context("the VMM's process id is no number")
    }

    /// Sends the VMM a signal, by its name without `SIG`.
    pub fn signal(&self, name: &str) -> Result<()> {
        let pid = self.pid()?;
        self.host.run(&format!("kill -s {name} {pid}")).map(drop)
    }

    /// Waits for the end, and collects what came of it. At the limit the VMM is killed.
    pub fn finish(mut self) -> Result<GuestResult> {
        self.left.said = None;
        let read = |name: &str| {
            let bytes = fs::read(self.job.folder().join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let output = self.job.wait(self.limit)?;
        let mut marks = BTreeMap::new();
        for entry in fs::read_dir(self.job.folder())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(mark) = name.strip_prefix("mark.") {
                marks.insert(mark.to_owned(), Snapshot::parse(&read(&name)));
            }
        }
        let stderr = read("vmm.stderr") + &output.stderr;
        let result = GuestResult {
            status: output.status,
            transcript: Transcript::parse(&output.stdout),
            marks,
            stderr,
            report: serde_json::from_str(&read("report.json")).ok(),
        };
        if !self.dies
            && let Some(what) = result.death()
        {
            bail!(Suspect(result.explain(what)));
        }
        Ok(result)
    }
}

impl GuestResult {
    /// From the VMM's start to the guest's first program.
    pub fn boot_time(&self) -> Option<Duration> {
        let started = self.transcript.time_of(EXEC)?;
        Duration::try_from_secs_f64(self.transcript.time_of(UP)? - started).ok()
    }

    /// A value that the script must have given.
    pub fn value(&self, key: &str) -> Result<&str> {
        let value = self.transcript.values.get(key).map(String::as_str);
        value.with_context(|| self.explain(&format!("the guest gave no {key}")))
    }

    /// A block that the script must have given.
    pub fn block(&self, name: &str) -> Result<&str> {
        let block = self.transcript.blocks.get(name).map(String::as_str);
        block.with_context(|| self.explain(&format!("the guest gave no block {name}")))
    }

    /// Itself, if the VMM ended with status 0 and the guest's script did; else why not.
    pub fn success(self) -> Result<Self> {
        let script = self.transcript.values.get("status").map(String::as_str);
        if self.status == 0 && script == Some("0") {
            return Ok(self);
        }
        let script = script.unwrap_or("none: it did not reach its end");
        let what = format!(
            "the VMM's exit status is {}, the script's {script}",
            self.status
        );
        Err(anyhow::Error::msg(self.explain(&what)))
    }

    /// What the guest died of, if it did.
    fn death(&self) -> Option<&'static str> {
        /// KVM's error for an event that it could not deliver, of which `docs/lab.md` tells.
        const UNDELIVERED: &str = "KVM_EXIT_INTERNAL_ERROR 3";
        /// What `guest-run.sh` says when it ends such a guest.
        const STANDSTILL: &str = "lab: the guest stands still";
        const CRASHES: [&str; 4] = [
            "Kernel panic",
            "BUG: ",
            "Oops: ",
            "general protection fault",
        ];
        /// What the kernel says when the guest's own program had it crash.
        const ASKED_FOR: &str = "sysrq triggered crash";
        let crashed = |line: &str| CRASHES.iter().any(|words| line.contains(words));
        let console = self.transcript.text();
        if self.stderr.contains(TRIPLE_FAULT) {
            Some("the guest triple-faulted")
        } else if self.stderr.contains(STANDSTILL) {
            Some("the guest stood still")
        } else if self.stderr.contains(UNDELIVERED) {
            Some("KVM could not deliver an event")
        } else if console
            .lines()
            .any(|line| crashed(line) && !line.contains(ASKED_FOR))
        {
            Some("the guest's kernel crashed")
        } else {
            None
        }
    }

    fn explain(&self, what: &str) -> String {
        let text = self.transcript.text();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines[lines.len().saturating_sub(40)..].join("\n");
        format!(
            "{what}; the guest's console ends:\n{last}\nthe VMM said:\n{}",
            self.stderr
        )
    }
}

/// Which host functions become those of one device in the guest: the first of a slot, and what follows
/// it without a gap. Virtual functions share a slot's number, but leave gaps.
fn functions_by_slot(addresses: &[String]) -> Vec<Vec<&str>> {
    let mut slots: Vec<(&str, Vec<&str>)> = Vec::new();
    for address in addresses {
        let (slot, function) = address.rsplit_once('.').unwrap_or((address, "0"));
        let follows = |(known, functions): &&mut (&str, Vec<&str>)| {
            *known == slot && function == functions.len().to_string()
        };
        match slots.iter_mut().find(follows) {
            Some((_, functions)) => functions.push(address),
            None => slots.push((slot, vec![address])),
        }
    }
    slots.into_iter().map(|(_, functions)| functions).collect()
}

/// A word as the shell reads it back.
pub(crate) fn quote(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_of_one_device_stay_together_and_virtual_ones_do_not() {
        let addresses = ["01:00.0", "02:00.0", "02:00.1", "03:10.0", "03:10.2"].map(str::to_owned);
        let slots = functions_by_slot(&addresses);
        assert_eq!(
            slots,
            [
                vec!["01:00.0"],
                vec!["02:00.0", "02:00.1"],
                vec!["03:10.0"],
                vec!["03:10.2"]
            ]
        );
    }
}
