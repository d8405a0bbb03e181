//! The emulated host: booted, given scripts to run, and gone when dropped.

mod launch;

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::agent::Agent;
use crate::config::{Accelerator, HostConfig};
use crate::job::{Folder, Job, Output};
use crate::parts::Parts;
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::spent;
use crate::zoo;

/// A running emulated host. Whatever becomes of this process, QEMU ends with it.
#[derive(Debug)]
pub struct Host {
    // In the order in which they go: QEMU ends before its folder does.
    qemu: Qemu,
    agent: Arc<Agent>,
    qmp: Arc<Mutex<Qmp>>,
    jobs: AtomicU64,
    /// The servers' ends of the lines to doorbell devices: while they are open, the peers are there.
    _doorbells: Vec<UnixStream>,
    config: HostConfig,
    parts: Parts,
    scratch: Scratch,
}

/// QEMU's process, killed and reaped when dropped.
#[derive(Debug)]
struct Qemu(Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the host's console is shown; a log keeps it in either case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Console {
    Log,
    Terminal,
}

impl Console {
    fn arguments(self, log: &Path) -> [String; 4] {
        let log = log.display();
        let line = match self {
            Self::Log => format!("file,id=console,path={log}"),
            Self::Terminal => format!("stdio,id=console,signal=off,logfile={log}"),
        };
        let port = "isa-serial,index=0,chardev=console";
        [
            "-chardev".to_owned(),
            line,
            "-device".to_owned(),
            port.to_owned(),
        ]
    }
}

impl Host {
    /// Boots a host, making what the lab lacks first, and returns when its agent answers.
    pub fn boot(config: HostConfig) -> Result<Self> {
        Self::boot_on(config, Console::Log)
    }

    /// Boots a host whose console is this process's terminal.
    pub fn boot_on_terminal(config: HostConfig) -> Result<Self> {
        Self::boot_on(config, Console::Terminal)
    }

    /// What it was made of.
    pub fn config(&self) -> &HostConfig {
        &self.config
    }

    /// The lab's parts that it runs from.
    pub fn parts(&self) -> &Parts {
        &self.parts
    }

    /// The folder that the host sees as `/lab`.
    pub fn share(&self) -> PathBuf {
        self.scratch.path().join("share")
    }

    /// Everything that the host's console has shown.
    pub fn console(&self) -> String {
        let bytes = fs::read(self.scratch.path().join("console.log")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The file behind a drive or a device's memory.
    pub fn backing_file(&self, id: &str) -> PathBuf {
        self.scratch.path().join(format!("{id}.img"))
    }

    /// The file by which this machine reaches the memory of an `ivshmem-plain`. That of a large one has no
    /// name, and nobody has it open but the emulator.
    pub fn shared_memory(&self, id: &str) -> Result<PathBuf> {
        let device = self.config.devices.iter().find(|device| device.id == id);
        let Some(zoo::Kind::IvshmemPlain { size_mib }) = device.map(|device| &device.kind) else {
            bail!("{id} is no shared memory");
        };
        let named = self.backing_file(id);
        if named.exists() {
            return Ok(named);
        }
        let folder = PathBuf::from(format!("/proc/{}/fd", self.qemu.0.id()));
        for entry in
            fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))?
        {
            let path = entry?.path();
            let link = fs::read_link(&path).unwrap_or_default();
            if link == Path::new("/memfd:memory-backend-memfd (deleted)")
                && fs::metadata(&path)?.len() == size_mib << 20
            {
                return Ok(path);
            }
        }
        bail!("the emulator has no memory of {size_mib} MiB for {id}")
    }

    /// The file that holds what a sound controller has played.
    pub fn sound_file(&self, id: &str) -> PathBuf {
        self.scratch.path().join(format!("{id}.wav"))
    }

    /// QEMU's machine protocol.
    pub fn qmp(&self) -> MutexGuard<'_, Qmp> {
        self.qmp.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The address of a device of the zoo, by its id, as `0000:01:00.0`.
    pub fn address(&self, id: &str) -> Result<String> {
        self.qmp().address(id)
    }

    /// Whether it still runs.
    pub fn is_running(&self) -> bool {
        !self.agent.is_gone()
    }

    pub(crate) fn job_folder(&self) -> Result<Folder> {
        let id = self.jobs.fetch_add(1, Ordering::Relaxed);
        let path = self.share().join("jobs").join(id.to_string());
        fs::create_dir(&path)?;
        Ok(Folder { id, path })
    }

    pub(crate) fn start(&self, folder: Folder, name: &str, script: &str) -> Result<Job> {
        folder.start(&self.agent, name, script)
    }

    /// Starts a bash script in the host, beside whatever else runs there.
    pub fn spawn(&self, script: &str) -> Result<Job> {
        let name = script.lines().next().unwrap_or_default();
        self.start(self.job_folder()?, name, script)
    }

    /// Runs a bash script to its end.
    pub fn output(&self, script: &str, limit: Duration) -> Result<Output> {
        self.spawn(script)?.wait(limit)
    }

    /// Runs a bash script that has to succeed, in at most five minutes; returns what it printed.
    pub fn run(&self, script: &str) -> Result<String> {
        self.output(script, Duration::from_secs(300))?
            .success()
            .with_context(|| format!("in the emulated host: {script}"))
    }

    /// Puts a program of this machine, a static one, into the host's `/usr/local/bin`.
    pub fn install(&self, program: &Path) -> Result<()> {
        let name = program.file_name().context("a program has a name")?;
        self.install_as(program, &name.to_string_lossy())
    }

    /// The same, by another name.
    pub fn install_as(&self, program: &Path, name: &str) -> Result<()> {
        fs::copy(program, self.share().join(name))
            .with_context(|| format!("cannot copy {}", program.display()))?;
        self.run(&format!(
            "install /lab/{name} /usr/local/bin/ && rm /lab/{name}"
        ))?;
        Ok(())
    }

    /// Powers the host off as its owner would, so that what it wrote is on its drives.
    pub fn power_off(self) -> Result<()> {
        self.agent
            .order("OFF")
            .map_err(|_| self.agent.death("powering off"))?;
        let limit = Duration::from_secs(120);
        match self.agent.wait_gone(limit) {
            true => Ok(()),
            false => Err(self.agent.timed_out("powering off", limit, "", None)),
        }
    }

    /// Restarts the host, and returns when its agent answers again. Of its files only those in `/lab`
    /// are still there, and what lies in `/lab/keep` is copied over its root before udev starts. One that boots by systemd
    /// ends its services first, and has all that it has written.
    pub fn reboot(&self) -> Result<()> {
        let _boot = spent::host_boots();
        let arguments = serde_json::json!({ "reboot": "reset" });
        self.qmp().execute("set-action", arguments)?;
        let ending = if self.config.systemd { 2 } else { 1 };
        self.agent.reboot(ending * Accelerator::detect().patience())
    }

    /// Restarts the host as its processors' reset does, and returns when its agent answers again: what its kernel had not
    /// written to a drive is lost. Of its files those in `/lab` are still there, as after a [reboot](Self::reboot).
    pub fn crash(&self) -> Result<()> {
        let _boot = spent::host_boots();
        let arguments = serde_json::json!({ "reboot": "reset" });
        self.qmp().execute("set-action", arguments)?;
        let reset = || {
            self.qmp()
                .execute("system_reset", serde_json::json!({}))
                .map(drop)
        };
        self.agent.crash(Accelerator::detect().patience(), reset)
    }

    /// The process id of QEMU on this machine: what a power cut kills.
    pub fn qemu_pid(&self) -> u32 {
        self.qemu.0.id()
    }
}
