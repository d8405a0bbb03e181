//! `busway run`: from flags and file to a configuration, to a guest that runs, to its report.

mod confinement;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::Context as _;
use busway_host::files::check_output;
use clap::Args;

use super::failure::Failure;
use super::foreign::{self, ForeignError};
use super::schema::{self, Section};
use super::words::{SourcePlace, Wrong};
use super::{DIAGNOSTICS, file, logging, progress};
use crate::config::{Accepted, Choice, ConsoleConfig, Placing, VmConfig};
use crate::control::{Server, SocketAddress};
use crate::exit::RUNTIME;
use crate::machine::{self, Ended, Requests};
use crate::report::{Report, Stage, Walls};
use crate::sandbox::landlock;
use crate::sandbox::{self, Kind, Mode};

/// What `busway run` takes.
#[derive(Clone, Debug, Default, Args)]
pub(super) struct RunArgs {
    /// Read the VM from a file, with the same words as the flags
    ///
    /// A TOML file: `kernel`, `initramfs` and `cmdline` at its top, a table for each flag ([cpus],
    /// [memory], [firmware]), and one of a list of tables for each device ([[disk]], [[net]], [[fs]],
    /// [[device]]). A
    /// string in a table's place is what would stand after the flag: serial = "tty". What a flag says
    /// too, the flag decides, key by key; devices of flags come after those of the file.
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    config: Option<PathBuf>,

    /// Kernel: a bzImage, or an ELF file with a PVH entry
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    kernel: Option<PathBuf>,

    #[arg(
        long, help = schema::FIRMWARE.summary, long_help = schema::FIRMWARE.help(),
        value_name = "FILE,…", help_heading = BOOT
    )]
    firmware: Option<String>,

    /// Initial RAM file system
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    initramfs: Option<PathBuf>,

    /// Kernel command line [default: console= where there is one]
    ///
    /// Where absent: console=ttyS0, or console=hvc0 where --console alone is there, or is heard.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = BOOT)]
    cmdline: Option<String>,

    #[arg(
        long, help = schema::CPUS.summary, long_help = schema::CPUS.help(),
        value_name = LIST, help_heading = RESOURCES
    )]
    cpus: Vec<String>,

    #[arg(
        long, help = schema::MEMORY.summary, long_help = schema::MEMORY.help(),
        value_name = LIST, help_heading = RESOURCES
    )]
    memory: Vec<String>,

    #[arg(
        long, help = schema::MEMORY_ZONE.summary, long_help = schema::MEMORY_ZONE.help(),
        value_name = LIST, num_args = 1.., help_heading = RESOURCES, hide_short_help = true
    )]
    memory_zone: Vec<String>,

    #[arg(
        long, help = schema::NUMA.summary, long_help = schema::NUMA.help(),
        value_name = LIST, num_args = 1.., help_heading = RESOURCES, hide_short_help = true
    )]
    numa: Vec<String>,

    /// Place RAM and vCPUs where the devices are: auto|off [default: off]
    ///
    /// auto: the guest has a NUMA node for each of the host's that its devices are on, with an equal part of
    /// RAM and vCPUs, which are there on the host as well. It goes without --memory-zone, --numa and
    /// --cpus affinity=, by which the same is said in full.
    #[arg(
        long, value_name = "HOW", value_parser = Placing::WORDS, help_heading = RESOURCES,
        hide_short_help = true, hide_possible_values = true
    )]
    place: Option<String>,

    #[arg(
        long, help = schema::DISK.summary, long_help = schema::DISK.help(),
        value_name = LIST, num_args = 1.., help_heading = DEVICES
    )]
    disk: Vec<String>,

    #[arg(
        long, help = schema::NET.summary, long_help = schema::NET.help(),
        value_name = LIST, num_args = 1.., help_heading = DEVICES
    )]
    net: Vec<String>,

    #[arg(
        long, help = schema::FS.summary, long_help = schema::FS.help(),
        value_name = LIST, num_args = 1.., help_heading = DEVICES
    )]
    fs: Vec<String>,

    #[arg(
        long, help = schema::PMEM.summary, long_help = schema::PMEM.help(),
        value_name = LIST, num_args = 1.., help_heading = DEVICES
    )]
    pmem: Vec<String>,

    #[arg(
        long, help = schema::GENERIC.summary, long_help = schema::GENERIC.help(),
        value_name = LIST, num_args = 1.., help_heading = DEVICES, hide_short_help = true
    )]
    generic_vhost_user: Vec<String>,

    #[arg(
        long, help = schema::VSOCK.summary, long_help = schema::VSOCK.help(),
        value_name = LIST, help_heading = DEVICES
    )]
    vsock: Vec<String>,

    #[arg(
        long, help = schema::BALLOON.summary, long_help = schema::BALLOON.help(),
        value_name = LIST, help_heading = DEVICES
    )]
    balloon: Vec<String>,

    /// A watchdog (Intel's 6300ESB) that resets a guest which does not feed it
    #[arg(long, help_heading = DEVICES)]
    watchdog: bool,

    /// A device by which the guest tells that it has panicked: in the log, and as an event
    #[arg(long, help_heading = DEVICES)]
    pvpanic: bool,

    #[arg(
        long, help = schema::TPM.summary, long_help = schema::TPM.help(),
        value_name = LIST, help_heading = DEVICES
    )]
    tpm: Vec<String>,

    #[arg(
        long, help = schema::RNG.summary, long_help = schema::RNG.help(),
        value_name = LIST, help_heading = DEVICES
    )]
    rng: Vec<String>,

    #[arg(
        long, help = schema::SERIAL.summary, long_help = schema::SERIAL.help(),
        value_name = "WHERE", help_heading = DEVICES
    )]
    serial: Option<String>,

    #[arg(long, help = schema::CONSOLE.summary, value_name = "WHERE", help_heading = DEVICES)]
    console: Option<String>,

    #[arg(
        long, help = schema::DEVICE.summary, long_help = schema::DEVICE.help(),
        value_name = "ADDRESS,…", num_args = 1.., help_heading = PASSTHROUGH
    )]
    device: Vec<String>,

    #[arg(
        long, help = schema::PLATFORM.summary, long_help = schema::PLATFORM.help(),
        value_name = LIST, help_heading = PASSTHROUGH
    )]
    platform: Vec<String>,

    #[arg(
        long, help = schema::API_SOCKET.summary, long_help = schema::API_SOCKET.help(),
        value_name = "WHERE", help_heading = CONTROL
    )]
    api_socket: Option<String>,

    /// What becomes of calls of the kernel's that a thread has no need of
    ///
    /// Each thread has a filter of the calls that its kind makes. docs/security.md has the kinds.
    #[arg(long, value_name = "WHAT", default_value_t = Mode::default(), value_enum, help_heading = DIAGNOSTICS)]
    pub(super) seccomp: Mode,

    /// Bound the process to the files that its VM names, by Landlock: true|false|auto
    ///
    /// Those are the files, sockets and devices of the flags and of the file, with what the host has for
    /// them. auto: where the kernel has it, and -v and the boot report tell of one that has not; true: an
    /// error there. [default: auto; false for a process that takes VMs over its API, each of which can
    /// say landlock_enable] A disk that is added later by its path lies beside one that the VM has, where
    /// that is in a folder for images, or where --landlock-rules says; a descriptor is always taken.
    /// docs/security.md says what is in reach, and what each level of the kernel's bounds.
    #[arg(
        long, value_name = "WHAT", num_args = 0..=1, default_missing_value = "true",
        value_parser = confinement::landlock_parser(), hide_possible_values = true, help_heading = DIAGNOSTICS
    )]
    landlock: Option<Choice>,

    #[arg(
        long, help = schema::LANDLOCK_RULES.summary, long_help = schema::LANDLOCK_RULES.help(),
        value_name = "RULE", num_args = 1.., help_heading = DIAGNOSTICS
    )]
    landlock_rules: Vec<String>,

    /// Put the process into a jail with what its VM names: true|false
    ///
    /// It has namespaces of its own (mounts, processes, network, IPC, host name), and a root with the files,
    /// sockets and devices that --landlock leaves in reach, and nothing else of the host's. A tap that is
    /// added comes as a descriptor. The process that was started waits outside, tells signals on, and ends
    /// with its VM. Without root it needs user namespaces. [default: false]
    #[arg(
        long, value_name = "WHETHER", num_args = 0..=1, default_missing_value = "true",
        value_parser = ["true", "false"], hide_possible_values = true, help_heading = DIAGNOSTICS
    )]
    pub(super) jail: Option<String>,

    /// Become this user when all is open: UID[:GID]|NAME[:GROUP]
    ///
    /// What only root may open is open by then. No capability is left when the guest begins, and what is
    /// opened later is opened by that user's rights. NAME and UID have the groups that /etc/passwd and /etc/group give them; where a group is
    /// named, it is the only one. Folders in which the VM makes files and sockets have to be that user's.
    #[arg(long, value_name = "USER", help_heading = DIAGNOSTICS)]
    pub(super) user: Option<String>,

    /// Write the boot report as JSON, when the guest starts and at the end
    #[arg(long, value_name = "FILE", help_heading = DIAGNOSTICS)]
    pub(super) report: Option<PathBuf>,
}

const BOOT: &str = "Boot";
const RESOURCES: &str = "Resources";
const DEVICES: &str = "Devices";
const PASSTHROUGH: &str = "Passthrough";
const CONTROL: &str = "Control";
const LIST: &str = "KEY=VALUE,…";

/// Of RAM's size, before anybody has said it: none that RAM can have, which comes in multiples of 1 MiB.
const UNSAID: u64 = u64::MAX;

/// At the end of the short help.
pub(super) const MORE: &str = "--help has every key, and examples.";

/// At the end of the long help.
pub(super) const EXAMPLES: &str = "\
A value with commas in it goes in double quotes: --disk 'path=\"/a,b.raw\",readonly=on'.
--disk, --net, --fs, --pmem, --generic-vhost-user and --device can be given several times, and take
several values each.

Examples:
  A kernel with its initial RAM file system, on this terminal:
    busway run --kernel vmlinuz --initramfs initrd.img

  A Debian disk by its own boot loader, with the firmware of the package `ovmf`:
    busway run --disk path=debian.raw --memory size=2G --firmware auto,vars=debian.vars

  A Debian disk, two processors, a NIC, and a real NVMe drive:
    busway device bind 0000:01:00.0
    busway run --kernel vmlinuz --initramfs initrd.img --cmdline 'console=ttyS0 root=/dev/vda1' \\
        --cpus boot=2 --memory size=4G --disk path=debian.raw --net tap=vmtap0 \\
        --device 0000:01:00.0

  The same from a file, with more memory this time:
    busway run --config vm.toml --memory size=8G

Exit status: 0 the guest powered off; 1 it failed while running; 2 bad usage or configuration;
3 this host cannot do it.";

/// Runs a guest until its end.
pub(super) fn run(args: &RunArgs, verbose: u8, report: &Arc<Report>) -> Result<(), Failure> {
    // What is wrong with it is said behind the walls and by a thread, so that the end waits for no reader.
    let described = args.described();
    args.confine(described.as_ref().ok())?;
    // Threads start below, and the signals that end a VM are the machine's.
    machine::block_signals();
    machine::few_arenas();
    logging::step_aside();
    let (level, lacking) = (landlock::level(), landlock::lacking());
    let mut walls = Walls::new(args.seccomp.word(), level, lacking);
    if let Ok((config, _)) = &described {
        walls = walls.apart(config.jail, config.user.clone());
    }
    report.set_walls(walls);
    let (mut config, socket) = described?;
    if socket.is_some() {
        config.platform.make_slots(config.device.len());
    }
    let publication = Publication {
        file: args.report.clone(),
        table: verbose > 0,
    };
    publication.check()?;
    report.reached(Stage::Parse);
    let requests = Requests::new()
        .context("the VM cannot be asked anything")
        .map_err(|error| Failure::explained(RUNTIME, error))?;
    // From before the VM is put together, which can take long where much memory is to be pinned.
    let server = socket
        .map(|socket| Server::start(&socket, requests.control()))
        .transpose()
        .map_err(|error| Failure::new(error.exit_status(), error))?;
    progress::show(report);
    let publisher = publication.when_running(report);
    let ended = boot(&config, report, requests);
    // Whatever was under way is not any more.
    report.pinning(0, 0);
    report.close();
    if let Some(publisher) = publisher {
        let _panicked = publisher.join();
    }
    publication.publish(report);
    // Who asked for the end may kill this process when it is answered: nothing comes after it.
    if let Some(server) = server {
        server.finish();
    }
    ended
}

/// Runs the VM, of which `requests` ask, to its end.
fn boot(config: &VmConfig, report: &Arc<Report>, requests: Requests) -> Result<(), Failure> {
    match machine::run(config, report, requests) {
        Ok(Ended::PowerOff) => log::info!("the guest powered off"),
        Ok(Ended::Quit) => log::info!("left by the console's escape key"),
        Ok(Ended::Asked) => log::info!("the VM ended as it was asked to"),
        Err(error) => return Err(Failure::new(error.exit_status(), error)),
    }
    Ok(())
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum NoConfig {
    /// cannot read --config {0}: {1}
    #[error("cannot read --config {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// What a flag or the file says.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// What all together is.
    #[error(transparent)]
    Invalid(#[from] crate::config::InvalidConfig),
    /// What a flag of Cloud Hypervisor's says.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
}

impl RunArgs {
    /// The VM that the file and the flags describe.
    fn config(&self) -> Result<VmConfig, NoConfig> {
        let defaults = VmConfig {
            // Whoever starts the first guest must see something.
            serial: ConsoleConfig::Tty,
            ..VmConfig::default()
        };
        self.config_from(defaults, |_| ())
    }

    /// The VM that a file describes.
    pub(super) fn of_file(path: &Path) -> Result<VmConfig, NoConfig> {
        let args = Self {
            config: Some(path.to_owned()),
            ..Self::default()
        };
        args.config()
    }

    /// The same, and where it is controlled.
    fn described(&self) -> Result<(VmConfig, Option<SocketAddress>), Failure> {
        let config = self.config().map_err(Failure::usage)?;
        Ok((config, self.api_socket().map_err(Failure::usage)?))
    }

    /// Whether the flags say anything of a VM.
    pub(super) fn describes_vm(&self) -> bool {
        let lists = [
            &self.disk,
            &self.net,
            &self.fs,
            &self.pmem,
            &self.generic_vhost_user,
            &self.vsock,
            &self.device,
        ];
        self.config.is_some()
            || self.kernel.is_some()
            || self.firmware.is_some()
            || lists.iter().any(|list| !list.is_empty())
    }

    /// The VM that the file and the flags make of `config`, once `adapt` has had a look at it.
    pub(super) fn config_from(
        &self,
        mut config: VmConfig,
        adapt: impl FnOnce(&mut VmConfig),
    ) -> Result<VmConfig, NoConfig> {
        let size = std::mem::replace(&mut config.memory.size, UNSAID);
        if let Some(path) = &self.config {
            let text =
                fs::read_to_string(path).map_err(|error| NoConfig::Read(path.clone(), error))?;
            file::apply(&mut config, path, &text)?;
        }
        self.apply(&mut config)?;
        if config.memory.size == UNSAID {
            // Zones say it.
            config.memory.size = if config.memory_zone.is_empty() {
                size
            } else {
                0
            };
        }
        config.sum_zones();
        adapt(&mut config);
        config.find_firmware();
        config.validate()?;
        Ok(config)
    }

    /// The same flags without what only Cloud Hypervisor's say, which is `accepted`.
    ///
    /// # Errors
    /// [`ForeignError`]
    pub(super) fn without_foreign(mut self, accepted: &mut Accepted) -> Result<Self, ForeignError> {
        for (flag, values) in [
            ("cpus", &mut self.cpus),
            ("memory", &mut self.memory),
            ("memory-zone", &mut self.memory_zone),
            ("disk", &mut self.disk),
            ("net", &mut self.net),
            ("fs", &mut self.fs),
            ("pmem", &mut self.pmem),
            ("generic-vhost-user", &mut self.generic_vhost_user),
            ("vsock", &mut self.vsock),
            ("rng", &mut self.rng),
            ("device", &mut self.device),
            ("platform", &mut self.platform),
        ] {
            for value in &mut *values {
                let rest = foreign::take(flag, value, accepted)?;
                // A NIC of which nothing else was said is one all the same.
                *value = rest;
            }
            let lists = [
                "memory-zone",
                "disk",
                "net",
                "fs",
                "pmem",
                "generic-vhost-user",
                "device",
            ];
            if !lists.contains(&flag) {
                values.retain(|value| !value.is_empty());
            }
        }
        Ok(self)
    }

    pub(super) fn api_socket(&self) -> Result<Option<SocketAddress>, Wrong> {
        let make = |text: &String| {
            let place = SourcePlace::Flag(schema::API_SOCKET.name, text.clone());
            schema::API_SOCKET.make(text, &place)
        };
        self.api_socket.as_ref().map(make).transpose()
    }

    pub(super) fn apply(&self, config: &mut VmConfig) -> Result<(), Wrong> {
        replace(&mut config.kernel, &self.kernel);
        if let Some(said) = &self.firmware {
            let firmware = config.firmware.get_or_insert_default();
            update(&schema::FIRMWARE, firmware, std::slice::from_ref(said))?;
        }
        replace(&mut config.initramfs, &self.initramfs);
        replace(&mut config.cmdline, &self.cmdline);
        update(&schema::CPUS, &mut config.cpus, &self.cpus)?;
        update(&schema::MEMORY, &mut config.memory, &self.memory)?;
        extend(
            &schema::MEMORY_ZONE,
            &mut config.memory_zone,
            &self.memory_zone,
        )?;
        extend(&schema::NUMA, &mut config.numa, &self.numa)?;
        if let Some(place) = self.place.as_deref().and_then(Placing::of_word) {
            config.place = place;
        }
        config.watchdog |= self.watchdog;
        config.pvpanic |= self.pvpanic;
        if !self.balloon.is_empty() {
            let balloon = config.balloon.get_or_insert_default();
            update(&schema::BALLOON, balloon, &self.balloon)?;
        }
        update(&schema::RNG, &mut config.rng, &self.rng)?;
        update(&schema::PLATFORM, &mut config.platform, &self.platform)?;
        update(&schema::SERIAL, &mut config.serial, self.serial.as_slice())?;
        update(
            &schema::CONSOLE,
            &mut config.console,
            self.console.as_slice(),
        )?;
        extend(&schema::DISK, &mut config.disk, &self.disk)?;
        extend(&schema::NET, &mut config.net, &self.net)?;
        extend(&schema::FS, &mut config.fs, &self.fs)?;
        extend(&schema::PMEM, &mut config.pmem, &self.pmem)?;
        extend(
            &schema::GENERIC,
            &mut config.generic,
            &self.generic_vhost_user,
        )?;
        for said in &self.vsock {
            let place = SourcePlace::Flag(schema::VSOCK.name, said.clone());
            config.vsock = Some(schema::VSOCK.make(said, &place)?);
        }
        for said in &self.tpm {
            let place = SourcePlace::Flag(schema::TPM.name, said.clone());
            config.tpm = Some(schema::TPM.make(said, &place)?);
        }
        extend(&schema::DEVICE, &mut config.device, &self.device)?;
        if let Some(landlock) = self.landlock {
            config.landlock = landlock;
        }
        if let Some(jail) = &self.jail {
            config.jail = jail == "true";
        }
        replace(&mut config.user, &self.user);
        let rules = &mut config.landlock_rules;
        extend(&schema::LANDLOCK_RULES, rules, &self.landlock_rules)
    }
}

fn replace<T: Clone>(target: &mut Option<T>, said: &Option<T>) {
    if said.is_some() {
        target.clone_from(said);
    }
}

/// What was said of a section, key by key; the last word counts.
fn update<T>(section: &Section<T>, target: &mut T, said: &[String]) -> Result<(), Wrong> {
    for text in said {
        let place = SourcePlace::Flag(section.name, text.clone());
        section.apply(target, text, &place)?;
    }
    Ok(())
}

/// One more of a section for each time it was said.
fn extend<T>(section: &Section<T>, targets: &mut Vec<T>, said: &[String]) -> Result<(), Wrong> {
    for text in said {
        let place = SourcePlace::Flag(section.name, text.clone());
        targets.push(section.make(text, &place)?);
    }
    Ok(())
}

/// Who gets the report.
#[derive(Clone, Debug)]
struct Publication {
    file: Option<PathBuf>,
    table: bool,
}

impl Publication {
    /// A report that cannot be written is found out before the guest starts.
    fn check(&self) -> Result<(), Failure> {
        let Some(file) = &self.file else {
            return Ok(());
        };
        let folder = match file.parent() {
            Some(folder) if folder.as_os_str().is_empty() => Path::new("."),
            Some(folder) => folder,
            None => file,
        };
        let complaint = match fs::metadata(folder) {
            Ok(metadata) if !metadata.is_dir() => "it is not in a folder".to_owned(),
            Ok(_) if file.is_dir() => "it is a folder; name a file".to_owned(),
            Ok(_) => match check_output(file) {
                Ok(()) => return Ok(()),
                Err(error) => error.to_string(),
            },
            Err(error) => format!("{}: {error}", folder.display()),
        };
        let file = file.display();
        Err(Failure::usage(format!("--report {file}: {complaint}")))
    }

    /// Publishes when the guest has started, on a thread that the guest does not wait for.
    fn when_running(&self, report: &Arc<Report>) -> Option<JoinHandle<()>> {
        if self.file.is_none() && !self.table {
            return None;
        }
        let running = report.running();
        let publication = self.clone();
        let report = Arc::clone(report);
        let publisher = move || {
            sandbox::enter(Kind::Report);
            if running.recv().is_err() {
                return;
            }
            if let Err(error) = report.measure_own_memory() {
                log::warn!("Busway's own memory cannot be measured: {error}");
            }
            publication.publish(&report);
        };
        thread::Builder::new()
            .name("report".to_owned())
            .spawn(publisher)
            .inspect_err(|error| log::warn!("no report until the guest's end: {error}"))
            .ok()
    }

    fn publish(&self, report: &Report) {
        if let Some(file) = &self.file
            && let Err(error) = report.write(file)
        {
            log::warn!("--report {}: {error}", file.display());
        }
        if self.table {
            let table = report.snapshot().to_string();
            logging::say(&table);
        }
    }
}

#[cfg(test)]
mod tests;
