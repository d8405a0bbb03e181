//! How a host comes up: booted, or started from the saved state of one that has booted.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::{Console, Host, Qemu};
use crate::agent::Agent;
use crate::config::{Accelerator, HostConfig};
use crate::doorbell;
use crate::inspector::Inspector;
use crate::machine;
use crate::parts::Parts;
use crate::process::spawn_bound;
use crate::qmp::Qmp;
use crate::saved;
use crate::scratch::Scratch;
use crate::spent;
use crate::zoo;

/// Where a host begins.
#[derive(Debug, Clone, Copy)]
enum Start<'a> {
    /// At its firmware, with everything plugged.
    Boot,
    /// At its firmware, with only what has to be there then: to be saved.
    Bare,
    /// Where another one was saved, with the rest plugged afterwards.
    Saved(&'a Path),
}

impl Host {
    pub(super) fn boot_on(config: HostConfig, console: Console) -> Result<Self> {
        let _boot = spent::host_boots();
        let parts = Parts::prepare()?;
        let launch = |accelerator| Self::launch(&config, &parts, console, accelerator, Start::Boot);
        if Accelerator::detect() == Accelerator::Kvm {
            let booted = launch(Accelerator::Kvm).and_then(|host| {
                host.run("test -c /dev/kvm")
                    .context("the emulated host has no /dev/kvm")?;
                Ok(host)
            });
            match booted {
                Ok(host) => return Ok(host),
                Err(error) => {
                    eprintln!("lab: this machine's KVM does not nest after all: {error:#}");
                }
            }
        }
        if console == Console::Terminal || !config.can_be_saved() {
            return launch(Accelerator::Tcg);
        }
        let state = saved::state(&parts, &config, |file| {
            Self::launch(&config, &parts, console, Accelerator::Tcg, Start::Bare)?.save(file)
        })?;
        let start = Start::Saved(&state);
        Self::launch(&config, &parts, console, Accelerator::Tcg, start)
    }

    fn launch(
        config: &HostConfig,
        parts: &Parts,
        console: Console,
        accelerator: Accelerator,
        start: Start<'_>,
    ) -> Result<Self> {
        let scratch = Scratch::new(&parts.cache)?;
        let folder = scratch.path();
        fs::create_dir_all(folder.join("share/jobs"))?;
        for (name, bytes) in config.devices.iter().filter_map(zoo::Device::backing) {
            File::create_new(folder.join(name))?.set_len(bytes)?;
        }
        let (line, agent_end) = UnixStream::pair()?;
        let (monitor, qmp_end) = UnixStream::pair()?;
        let logs = [folder.join("console.log"), folder.join("qemu.log")];
        let mut command = machine::qemu(parts);
        command
            .args(machine::arguments(config, parts, accelerator)?)
            .args(machine::written(config, folder)?)
            .args(console.arguments(&logs[0]))
            .args(machine::line("agent", &agent_end))
            .args(["-device", "isa-serial,index=1,chardev=agent"])
            .args(machine::line("qmp", &qmp_end))
            .args(["-mon", "chardev=qmp,mode=control"])
            .stderr(File::create(&logs[1])?);
        let mut inherited = vec![agent_end.into(), qmp_end.into()];
        let mut servers = Vec::new();
        for device in &config.devices {
            if let zoo::Kind::IvshmemDoorbell { vectors } = device.kind {
                let memory = folder.join(format!("{}.img", device.id));
                let (server, end) = doorbell::serve(&memory, vectors)?;
                command.args(machine::line(&format!("{}-server", device.id), &end));
                servers.push(server);
                inherited.push(end.into());
            }
        }
        let [fixed, plugged] = zoo::plans(&config.devices, folder);
        let (words, folders) = machine::folders(parts, folder);
        let later = [folders, plugged.devices].concat();
        command.args(fixed.words);
        // A state must hold nothing of what differs between hosts: networks have one of their own.
        if !matches!(start, Start::Bare) {
            command.args(plugged.words).args(words);
        }
        let now = match start {
            Start::Boot => [fixed.devices, later.clone()].concat(),
            Start::Bare | Start::Saved(_) => fixed.devices,
        };
        for device in now {
            command.args(["-device", &device]);
        }
        if matches!(start, Start::Saved(_)) {
            command.args(["-incoming", "defer"]);
        }
        if console == Console::Log {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        }
        let child = spawn_bound(command, inherited).context("cannot start the lab's QEMU")?;
        let qemu = Qemu(child);
        spent::emulator(qemu.0.id());
        let agent = Agent::new(line, logs)?;
        let qmp = Qmp::new(monitor, &agent).map_err(|_| agent.death("QEMU started"))?;
        let qmp = Arc::new(Mutex::new(qmp));
        let inspector = Inspector::new(Arc::clone(&qmp), qemu.0.id(), folder.to_owned());
        agent.set_inspector(inspector);
        let monitor = || qmp.lock().unwrap_or_else(PoisonError::into_inner);
        if let Start::Saved(state) = start {
            let loaded = monitor().load(state);
            if let Err(error) = loaded {
                // Whatever it is, the next host makes a new one.
                let _ = fs::remove_file(state);
                return Err(agent.death(&format!("its saved state was loaded: {error:#}")));
            }
            for device in &later {
                let said = monitor().monitor(&format!("device_add {device}"))?;
                if !said.is_empty() {
                    bail!("QEMU does not plug {device}: {said}");
                }
            }
        } else {
            agent.wait_ready(accelerator.patience())?;
        }
        if !matches!(start, Start::Bare) {
            let plugged = monitor().functions()?;
            agent.settle(&plugged, accelerator.patience())?;
        }
        Ok(Self {
            qemu,
            agent,
            qmp,
            jobs: AtomicU64::new(1),
            _doorbells: servers,
            config: config.clone(),
            parts: parts.clone(),
            scratch,
        })
    }

    /// Writes its state to a file, and is no more.
    fn save(self, file: &Path) -> Result<()> {
        self.qmp().save(file)
    }
}

impl Qmp {
    /// Sees to it that QEMU tells when a state is written or read.
    fn expect_migration(&mut self) -> Result<()> {
        let capability = json!([{ "capability": "events", "state": true }]);
        self.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": capability }),
        )?;
        Ok(())
    }

    /// Waits until the state is written or read.
    fn wait_migrated(&mut self) -> Result<()> {
        loop {
            let event = self.wait_event("MIGRATION", Accelerator::Tcg.patience())?;
            match event["data"]["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    let why = self.execute("query-migrate", json!({}))?;
                    bail!("QEMU says: {}", why["error-desc"]);
                }
                _ => {}
            }
        }
    }

    fn save(&mut self, file: &Path) -> Result<()> {
        self.expect_migration()?;
        self.execute("stop", json!({}))?;
        // As fast as it can, and not at the 128 MiB a second that a network would get.
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 0 }))?;
        let uri = format!("file:{}", file.display());
        self.execute("migrate", json!({ "uri": uri }))?;
        self.wait_migrated().context("saving the host's state")
    }

    fn load(&mut self, file: &Path) -> Result<()> {
        self.expect_migration()?;
        let uri = format!("file:{}", file.display());
        self.execute("migrate-incoming", json!({ "uri": uri }))?;
        self.wait_migrated().context("loading a host's state")?;
        self.execute("cont", json!({}))?;
        Ok(())
    }
}
