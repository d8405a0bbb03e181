//! `busway --api-socket …` without a command, and a program that is called `cloud-hypervisor`: a process that makes
//! and boots VMs as its API tells it, started as Cloud Hypervisor is.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use busway_host::files::{Existing, OutputError, open_output};
use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory as _, FromArgMatches as _, Parser, Subcommand as _};

use super::run::RunArgs;
use super::{Command, DIAGNOSTICS, Failure, logging, panic, print, schema, start_logging};
use crate::config::{Accepted, Choice, ConsoleConfig, VmConfig};
use crate::control::{Server, SocketAddress};
use crate::exit::RUNTIME;
use crate::machine::{self, Requests};
use crate::monitor;

/// The program's name by which all that it is given is meant for this.
const NAME: &str = "cloud-hypervisor";
/// The version of Cloud Hypervisor that this is, to whoever asks.
const VERSION: &str = "v53.0.0";
const SOCKET: &str = "--api-socket";

/// Makes and boots VMs as its API tells it
///
/// The process begins without a VM, or with the one that the flags describe, and goes on when a VM is shut down
/// over the API. It is started and told as Cloud Hypervisor is. A signal ends it and its VM at once.
#[derive(Debug, Parser)]
#[command(name = "busway", disable_version_flag = true, max_term_width = 100)]
struct Serve {
    #[command(flatten)]
    vm: RunArgs,

    /// Go on when a guest powers off or fails by itself
    #[arg(long, help_heading = PROCESS)]
    no_shutdown: bool,

    /// Tell what happens as JSON, an object for each event: path=FILE|fd=N
    ///
    /// A named pipe is opened before anything else is done, which waits until somebody reads it. A
    /// file that stays gets 16 MiB at most.
    #[arg(long, value_name = "WHERE", help_heading = PROCESS)]
    event_monitor: Option<EventMonitor>,

    /// Say what is done; -vv: how; -vvv: all
    #[arg(short, long, action = ArgAction::Count, help_heading = DIAGNOSTICS)]
    verbose: u8,

    /// Append the log to a file instead of standard error
    #[arg(long, value_name = "FILE", help_heading = DIAGNOSTICS)]
    log_file: Option<PathBuf>,

    /// Taken for Cloud Hypervisor's sake: the log has one form
    #[arg(long, value_name = "FORMAT", hide = true)]
    log_format: Option<String>,

    /// Print the version of Cloud Hypervisor that clients are to take this for
    #[arg(short = 'V', long, help_heading = DIAGNOSTICS)]
    version: bool,
}

const PROCESS: &str = "Process";

/// Why a process that takes its VMs over an API has neither a jail nor another user, and what does instead.
const OF_ONE_VM: &str = "a process that takes its VMs over an API opens what they name, VM after VM; start it as the user, and \
    in the namespaces, that it is to have";

/// `--event-monitor`
#[derive(Clone, Debug, PartialEq, Eq)]
enum EventMonitor {
    Path(PathBuf),
    Fd(u32),
}

impl FromStr for EventMonitor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("path=").filter(|path| !path.is_empty()) {
            return Ok(Self::Path(path.into()));
        }
        let number = text
            .strip_prefix("fd=")
            .and_then(|number| number.parse().ok());
        number
            .filter(|number| *number > 2)
            .map(Self::Fd)
            .ok_or_else(|| "say path=FILE, or fd=N with a descriptor of 3 or more".to_owned())
    }
}

impl EventMonitor {
    /// The named pipe that it is.
    fn pipe(&self) -> Option<&Path> {
        let Self::Path(path) = self else {
            return None;
        };
        is_pipe(path).then_some(path)
    }

    /// Opens it, and waits for who is to read a named pipe.
    fn open(&self) -> Result<File, OutputError> {
        let path = match self {
            Self::Path(path) => path.clone(),
            // Opened anew, so that its flags are this process's alone.
            Self::Fd(number) => format!("/proc/self/fd/{number}").into(),
        };
        if is_pipe(&path) {
            let mut options = File::options();
            options.write(true).custom_flags(libc::O_NOFOLLOW);
            return Ok(options.open(&path)?);
        }
        Ok(open_output(&path, Existing::Append)?.file)
    }
}

fn is_pipe(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|there| there.file_type().is_fifo())
}

/// Why there is nothing to serve.
#[derive(Debug, thiserror::Error)]
#[error(
    "nothing to do: say where the API is to be, with --api-socket PATH, or which VM to boot, with --kernel"
)]
struct NothingToDo;

/// Whether these arguments, the program's name first, are meant for this.
pub(super) fn is_meant(args: &[OsString]) -> bool {
    let Some((program, args)) = args.split_first() else {
        return false;
    };
    if Path::new(program).file_name() == Some(OsStr::new(NAME)) {
        return true;
    }
    for arg in args.iter().filter_map(|arg| arg.to_str()) {
        if arg == SOCKET
            || arg
                .strip_prefix(SOCKET)
                .is_some_and(|rest| rest.starts_with('='))
        {
            return true;
        }
        if Command::has_subcommand(arg) || arg == "help" {
            return false;
        }
    }
    false
}

/// The flags, of which two have Cloud Hypervisor's defaults here, and the report of one boot is nobody's.
pub(super) fn command() -> clap::Command {
    let serial = schema::SERIAL
        .summary
        .replace("[default: tty]", "[default: null]");
    let console = schema::CONSOLE
        .summary
        .replace("[default: off]", "[default: tty]");
    Serve::command()
        .mut_arg("serial", |arg| arg.help(serial))
        .mut_arg("console", |arg| arg.help(console))
        .mut_arg("report", |arg| arg.hide(true))
        .mut_arg("jail", |arg| arg.hide(true))
        .mut_arg("user", |arg| arg.hide(true))
}

fn parse(args: Vec<OsString>) -> Result<Serve, clap::Error> {
    let mut command = command();
    let matches = command.try_get_matches_from_mut(args)?;
    let serve = Serve::from_arg_matches(&matches)?;
    if serve.vm.report.is_some() {
        let why = "--report is of the one VM of `busway run`";
        return Err(command.error(ErrorKind::ArgumentConflict, why));
    }
    // What its VMs name is not known before they are made, and its threads are there by then.
    for (flag, said) in [
        (
            "--jail",
            serve.vm.jail.as_ref().is_some_and(|said| said == "true"),
        ),
        ("--user", serve.vm.user.is_some()),
    ] {
        if said {
            let why = format!("{flag} is of the one VM of `busway run`: {OF_ONE_VM}");
            return Err(command.error(ErrorKind::ArgumentConflict, why));
        }
    }
    Ok(serve)
}

/// Runs the process that these arguments describe.
pub(super) fn main(args: Vec<OsString>) -> ExitCode {
    let serve = match parse(args) {
        Ok(serve) => serve,
        Err(error) => return print(&error),
    };
    if serve.version {
        println!("{NAME} {VERSION}");
        return ExitCode::SUCCESS;
    }
    match panic::caught(|| serve.run()) {
        Some(Ok(())) => {
            log::logger().flush();
            ExitCode::SUCCESS
        }
        Some(Err(failure)) => failure.report(),
        None => ExitCode::from(RUNTIME),
    }
}

impl Serve {
    fn run(&self) -> Result<(), Failure> {
        start_logging(self.verbose, self.log_file.as_deref())?;
        if let Some(monitor) = &self.event_monitor {
            let started = monitor.open().and_then(|file| Ok(monitor::start(file)?));
            started.map_err(|error| Failure::usage(format!("--event-monitor: {error}")))?;
        }
        let described = self.described();
        let at_once = described.as_ref().ok().cloned();
        let at_once = at_once.and_then(|(first, socket)| Some((first?, socket)));
        self.vm.confine(at_once.as_ref())?;
        // Threads start below, and the signals that end a VM are the machine's.
        machine::block_signals();
        logging::step_aside();
        let (first, socket) = described?;
        let bounds = self.vm.process_bounds().map_err(Failure::usage)?;
        if first.is_none() && socket.is_none() {
            return Err(Failure::usage(NothingToDo));
        }
        if self.log_format.is_some() {
            log::debug!("--log-format: the log has one form");
        }
        let requests = Requests::new().map_err(|error| Failure::new(error.exit_status(), error))?;
        let server = socket
            .as_ref()
            .map(|socket| Server::start(socket, requests.control()))
            .transpose()
            .map_err(|error| Failure::new(error.exit_status(), error))?;
        let made = socket.as_ref().and_then(SocketAddress::path);
        let made = made.map(std::path::Path::to_owned);
        let events = self.event_monitor.as_ref().and_then(EventMonitor::pipe);
        if let (Some(server), Some(events)) = (&server, events) {
            server.end_when_given_up(events, requests.control());
        }
        let served = machine::serve(first, self.no_shutdown, made, bounds, requests);
        // Who asked for the end may kill this process when it is answered: nothing comes after it.
        if let Some(server) = server {
            server.finish();
        }
        served.map_err(|error| Failure::new(error.exit_status(), error))
    }

    /// The VM that is there at once, if there is one, and where the process is controlled.
    fn described(&self) -> Result<(Option<VmConfig>, Option<SocketAddress>), Failure> {
        let first = self.first().map_err(Failure::usage)?;
        let asked = first.as_ref().and_then(|first| match first.jail {
            true => Some("jail"),
            false => first.user.as_ref().map(|_| "user"),
        });
        if let Some(asked) = asked {
            let why = format!("--config: `{asked}` is of the one VM of `busway run`: {OF_ONE_VM}");
            return Err(Failure::usage(why));
        }
        Ok((first, self.vm.api_socket().map_err(Failure::usage)?))
    }

    /// The VM that is there at once, where the flags describe one.
    fn first(&self) -> Result<Option<VmConfig>, super::run::NoConfig> {
        if !self.vm.describes_vm() {
            return Ok(None);
        }
        let defaults = VmConfig {
            // What Cloud Hypervisor has where nothing is said.
            serial: ConsoleConfig::Null,
            console: ConsoleConfig::Tty,
            landlock: Choice::Off,
            ..VmConfig::default()
        };
        let mut accepted = Accepted::default();
        let vm = self.vm.clone().without_foreign(&mut accepted)?;
        let config = vm.config_from(defaults, |config| {
            // Clients look for devices where Cloud Hypervisor has them.
            config.platform.root_ports.get_or_insert(false);
            if accepted != Accepted::default() {
                config.accepted = Some(Box::new(accepted));
            }
        })?;
        Ok(Some(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{FsConfig, GenericConfig, PmemConfig};

    fn args(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_flags_are_in_order() {
        command().debug_assert();
        let help = command().render_help().to_string();
        assert!(
            help.contains("[default: null]") && !help.contains("--report"),
            "{help}"
        );
    }

    #[test]
    fn a_socket_without_a_command_or_the_other_name_is_meant_for_this() {
        for (text, meant) in [
            ("busway --api-socket /run/s", true),
            ("/usr/bin/busway -v --api-socket=fd=5", true),
            ("busway --log-file l --api-socket path=/run/s", true),
            ("/opt/bin/cloud-hypervisor --version", true),
            ("cloud-hypervisor run", true),
            ("busway", false),
            ("busway --version", false),
            ("busway run --api-socket /run/s", false),
            ("busway -v ctl info --api-socket /run/s", false),
            ("busway help --api-socket", false),
            ("busway --api-sockets", false),
        ] {
            assert_eq!(is_meant(&args(text)), meant, "{text}");
        }
    }

    #[test]
    fn a_vm_on_the_command_line_has_cloud_hypervisors_defaults() {
        let first = |text: &str| {
            let serve = parse(args(text)).unwrap();
            serve.first().unwrap()
        };
        assert_eq!(
            first("busway --api-socket /run/s -vv --seccomp false"),
            None
        );
        let config = first(
            "busway --api-socket path=/run/s --kernel k --disk path=a,pci_segment=1 path=b --cpus boot=2,max=4 \
             --disk vhost_user=on,socket=/run/b,num_queues=2 --fs tag=t,socket=/run/f,pci_segment=1 \
             --net tap=t,ip=192.168.249.1 --platform num_pci_segments=2 --log-format text \
             --pmem file=/p,iommu=off,pci_segment=1 --generic-vhost-user socket=/run/g,virtio_id=26,queue_sizes=[512,256] \
             socket=/run/h,device_type=sound,queue_sizes=64,pci_segment=1",
        )
        .unwrap();
        assert_eq!((config.cpus.boot, config.cpus.max), (2, Some(4)));
        assert_eq!(config.platform.segments(), 2);
        let firmware = first("busway --api-socket /run/s --firmware /f --disk path=a").unwrap();
        assert_eq!(firmware.firmware.unwrap().path, Some("/f".into()));
        assert_eq!((config.disk.len(), config.net.len()), (3, 1));
        assert_eq!(config.disk[2].back_end(), Some("/run/b".as_ref()));
        let mut folder = FsConfig::new("t", "/run/f");
        folder.pci_segment = 1;
        assert_eq!(config.fs, [folder]);
        let mut memory = PmemConfig::new("/p");
        memory.pci_segment = 1;
        assert_eq!(config.pmem, [memory]);
        let mut generic = [
            GenericConfig::new(26, "/run/g", vec![512, 256]),
            GenericConfig::new(25, "/run/h", vec![64]),
        ];
        generic[1].pci_segment = 1;
        assert_eq!(config.generic, generic);
        assert!(config.shares_memory());
        assert_eq!(config.platform.root_ports, Some(false));
        let ports =
            first("busway --api-socket /run/s --kernel k --platform root_ports=on").unwrap();
        assert_eq!(ports.platform.root_ports, Some(true));
        let consoles = (ConsoleConfig::Null, ConsoleConfig::Tty);
        assert_eq!((config.serial, config.console), consoles);
    }
}
