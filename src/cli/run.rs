//! `busway run`: from flags and file to a configuration, to a guest that runs, to its report.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use busway_vfio::files::check_output;
use clap::Args;

use super::failure::Failure;
use super::schema::{self, Section};
use super::words::{Place, Wrong};
use super::{DIAGNOSTICS, file, logging, progress};
use crate::config::{ConsoleConfig, VmConfig};
use crate::machine::{self, Ended};
use crate::report::{Report, Stage};

/// What `busway run` takes.
#[derive(Debug, Default, Args)]
pub(super) struct RunArgs {
    /// Read the VM from a file, with the same words as the flags
    ///
    /// A TOML file: `kernel`, `initramfs` and `cmdline` at its top, a table for each flag ([cpus],
    /// [memory]), and one of a list of tables for each device ([[disk]], [[net]], [[device]]). A
    /// string in a table's place is what would stand after the flag: serial = "tty". What a flag says
    /// too, the flag decides, key by key; devices of flags come after those of the file.
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    config: Option<PathBuf>,

    /// Kernel: a bzImage, or an ELF file with a PVH entry
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    kernel: Option<PathBuf>,

    /// Initial RAM file system
    #[arg(long, value_name = "FILE", help_heading = BOOT)]
    initramfs: Option<PathBuf>,

    /// Kernel command line [default: console= where there is one]
    ///
    /// Where absent: console=ttyS0, or console=hvc0 where --console alone is there, or is heard.
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, help_heading = BOOT)]
    cmdline: Option<String>,

    /// Processors: boot=N[,max=N]
    ///
    ///   boot=N          how many run at boot, 1 to 64 [1]
    ///   max=N           how many there can be; as many as boot, for now [boot]
    #[arg(long, value_name = LIST, verbatim_doc_comment, help_heading = RESOURCES)]
    cpus: Vec<String>,

    /// RAM: size=SIZE[,shared=on|off][,hugepages=on|off]…
    ///
    ///   size=SIZE           bytes, or with K, M, G or T after it [512M]
    ///   shared=on|off       mapped so that another process can map it too [off]
    ///   hugepages=on|off    taken from hugetlbfs [off]
    ///   hugepage_size=SIZE  size of a huge page [the host's default]
    ///   prefault=on|off     touched before the guest starts [on with --device]
    ///   thp=on|off          transparent huge pages [on]
    #[arg(long, value_name = LIST, verbatim_doc_comment, help_heading = RESOURCES)]
    memory: Vec<String>,

    /// Virtio disk: path=FILE[,readonly=on|off][,direct=on|off]…
    ///
    ///   path=FILE           raw image or block device
    ///   readonly=on|off     the guest may not write [off]
    ///   direct=on|off       past the host's page cache, by O_DIRECT [off]
    ///   num_queues=N        request queues, a worker each [1]
    ///   queue_size=N        descriptors of a queue, a power of two [128]
    ///   id=NAME             name, unique in the VM
    #[arg(long, value_name = LIST, num_args = 1.., verbatim_doc_comment, help_heading = DEVICES)]
    disk: Vec<String>,

    /// Virtio NIC on a tap interface: tap=NAME[,mac=MAC]…
    ///
    ///   tap=NAME            the interface, made where there is none [named by the kernel]
    ///   mac=MAC             the guest's address [random]
    ///   num_queues=N        receive and transmit queues together, even [2]
    ///   queue_size=N        descriptors of a queue, a power of two [256]
    ///   id=NAME             name, unique in the VM
    #[arg(long, value_name = LIST, num_args = 1.., verbatim_doc_comment, help_heading = DEVICES)]
    net: Vec<String>,

    /// Virtio entropy device: src=FILE [default: src=/dev/urandom]
    #[arg(long, value_name = LIST, help_heading = DEVICES)]
    rng: Vec<String>,

    /// Serial port: off|null|tty|pty|file=PATH|socket=PATH [default: tty]
    ///
    ///   off           no such device
    ///   null          output goes nowhere
    ///   tty           this terminal; Ctrl-A x ends the guest
    ///   pty           a new pseudo-terminal, whose name is printed
    ///   file=PATH     output to a file of the user's own, which is emptied first
    ///   size=SIZE     with file=: when it is so large, it becomes PATH.1 and begins anew [16M]
    ///   socket=PATH   a Unix socket that listens
    #[arg(long, value_name = "WHERE", verbatim_doc_comment, help_heading = DEVICES)]
    serial: Option<String>,

    /// Virtio console: as --serial [default: off]
    #[arg(long, value_name = "WHERE", help_heading = DEVICES)]
    console: Option<String>,

    /// Host PCI device, bound to vfio-pci: ADDRESS[,id=NAME][,on_error=…][,vf_token=UUID]
    ///
    ///   path=PATH         address (0000:01:00.0, 01:00.0) or folder in sysfs; needs no `path=`
    ///   fd=N              a descriptor that Busway inherits, instead of opening the device: of its
    ///                     /dev/vfio/devices/vfioN, or of its group's /dev/vfio/N (with path=, where
    ///                     the group has several devices)
    ///   id=NAME           name, unique in the VM
    ///   on_error=stop     an uncorrectable error of the device's ends the VM [stop]
    ///   on_error=pause    it holds the guest; a signal such as SIGTERM ends it
    ///   on_error=ignore   it is logged
    ///   vf_token=UUID     what all share who use a physical function and its virtual
    ///                     functions, where VFIO has both
    ///   rom=on|off        the guest gets the expansion ROM [on, unless it is known to do harm]
    ///   romfile=FILE      an expansion ROM in place of the device's
    ///   x_nv_gpudirect_clique=N
    ///                     GPUs of NVIDIA's with the same N, 0 to 15, copy to each other directly
    ///
    /// Functions of one host device become one device of the guest's.
    /// `busway device list` shows what there is, `busway device bind ADDRESS` prepares one.
    #[arg(
        long, value_name = "ADDRESS,…", num_args = 1.., verbatim_doc_comment, help_heading = PASSTHROUGH
    )]
    device: Vec<String>,

    /// How devices are reached: iommufd=on|off|auto[,p2p=on|off|auto]… [default: iommufd=auto]
    ///
    ///   iommufd=on    by iommufd and the device's cdev
    ///   iommufd=off   by the VFIO group and a type1 container
    ///   iommufd=auto  by iommufd where the host has it
    ///   iommufd_fd=N  an iommufd that Busway inherits, instead of opening /dev/iommu
    ///   p2p=on        devices reach each other's memory (peer-to-peer DMA), or it is an error
    ///   p2p=off       they do not
    ///   p2p=auto      they do where the host can: by type1, and by iommufd from Linux 6.19 on;
    ///                 what will not work is said once [auto]
    ///   vf_token=UUID that of each device which needs one and has none of its own
    #[arg(long, value_name = LIST, verbatim_doc_comment, help_heading = PASSTHROUGH)]
    platform: Vec<String>,

    /// Write the boot report as JSON, when the guest starts and at the end
    #[arg(long, value_name = "FILE", help_heading = DIAGNOSTICS)]
    report: Option<PathBuf>,
}

const BOOT: &str = "Boot";
const RESOURCES: &str = "Resources";
const DEVICES: &str = "Devices";
const PASSTHROUGH: &str = "Passthrough";
const LIST: &str = "KEY=VALUE,…";

/// At the end of the short help.
pub(super) const MORE: &str = "--help has every key, and examples.";

/// At the end of the long help.
pub(super) const EXAMPLES: &str = "\
A value with commas in it goes in double quotes: --disk 'path=\"/a,b.raw\",readonly=on'.
--disk, --net and --device can be given several times, and take several values each.

Examples:
  A kernel with its initial RAM file system, on this terminal:
    busway run --kernel vmlinuz --initramfs initrd.img

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
    // Threads start below, and the signals that end a VM are the machine's.
    machine::block_signals();
    logging::step_aside();
    let config = args.config().map_err(Failure::usage)?;
    let publication = Publication {
        file: args.report.clone(),
        table: verbose > 0,
    };
    publication.check()?;
    report.reached(Stage::Parse);
    progress::show(report);
    let publisher = publication.when_running(report);
    let ended = boot(&config, report);
    // Whatever was under way is not any more.
    report.pinning(0, 0);
    report.close();
    if let Some(publisher) = publisher {
        let _panicked = publisher.join();
    }
    publication.publish(report);
    ended
}

fn boot(config: &VmConfig, report: &Report) -> Result<(), Failure> {
    match machine::run(config, report) {
        Ok(Ended::PowerOff) => log::info!("the guest powered off"),
        Ok(Ended::Quit) => log::info!("left by the console's escape key"),
        Err(error) => return Err(Failure::new(error.exit_status(), error)),
    }
    Ok(())
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
enum NoConfig {
    /// cannot read --config {0}: {1}
    #[error("cannot read --config {0}: {1}")]
    Read(PathBuf, #[source] io::Error),
    /// What a flag or the file says.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// What all together is.
    #[error(transparent)]
    Invalid(#[from] crate::config::InvalidConfig),
}

impl RunArgs {
    /// The VM that the file and the flags describe.
    fn config(&self) -> Result<VmConfig, NoConfig> {
        let mut config = VmConfig {
            // Whoever starts the first guest must see something.
            serial: ConsoleConfig::Tty,
            ..VmConfig::default()
        };
        if let Some(path) = &self.config {
            let text =
                fs::read_to_string(path).map_err(|error| NoConfig::Read(path.clone(), error))?;
            file::apply(&mut config, path, &text)?;
        }
        self.apply(&mut config)?;
        config.validate()?;
        Ok(config)
    }

    fn apply(&self, config: &mut VmConfig) -> Result<(), Wrong> {
        replace(&mut config.kernel, &self.kernel);
        replace(&mut config.initramfs, &self.initramfs);
        replace(&mut config.cmdline, &self.cmdline);
        update(&schema::CPUS, &mut config.cpus, &self.cpus)?;
        update(&schema::MEMORY, &mut config.memory, &self.memory)?;
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
        extend(&schema::DEVICE, &mut config.device, &self.device)
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
        let place = Place::Flag(section.name, text.clone());
        section.apply(target, text, &place)?;
    }
    Ok(())
}

/// One more of a section for each time it was said.
fn extend<T>(section: &Section<T>, targets: &mut Vec<T>, said: &[String]) -> Result<(), Wrong> {
    for text in said {
        let place = Place::Flag(section.name, text.clone());
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
#[path = "run_test.rs"]
mod tests;
