//! `busway --api-socket …` without a command, and a program that is called `cloud-hypervisor`: a process that makes
//! and boots VMs as its API tells it, started as Cloud Hypervisor is.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgAction, Parser, Subcommand as _, ValueEnum};

use super::run::RunArgs;
use super::{Command, DIAGNOSTICS, Failure, logging, panic, print, start_logging};
use crate::config::{Accepted, ConsoleConfig, VmConfig};
use crate::control::Server;
use crate::exit::RUNTIME;
use crate::machine::{self, Requests};

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

    /// Taken for Cloud Hypervisor's sake: Busway filters no system calls
    #[arg(long, value_name = "WHAT", default_value = "true", hide_default_value = true, help_heading = PROCESS)]
    seccomp: Seccomp,

    /// Say what is done; -vv: how; -vvv: all
    #[arg(short, long, action = ArgAction::Count, help_heading = DIAGNOSTICS)]
    verbose: u8,

    /// Append the log to a file instead of standard error
    #[arg(long, value_name = "FILE", help_heading = DIAGNOSTICS)]
    log_file: Option<PathBuf>,

    /// Print the version of Cloud Hypervisor that clients are to take this for
    #[arg(short = 'V', long, help_heading = DIAGNOSTICS)]
    version: bool,
}

const PROCESS: &str = "Process";

/// `--seccomp`
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Seccomp {
    True,
    False,
    Log,
    Errno,
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

/// Runs the process that these arguments describe.
pub(super) fn main(args: Vec<OsString>) -> ExitCode {
    let serve = match Serve::try_parse_from(args) {
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
        // Threads start below, and the signals that end a VM are the machine's.
        machine::block_signals();
        logging::step_aside();
        let first = self.first().map_err(Failure::usage)?;
        let socket = self.vm.api_socket().map_err(Failure::usage)?;
        if first.is_none() && socket.is_none() {
            return Err(Failure::usage(NothingToDo));
        }
        if self.seccomp != Seccomp::False {
            log::debug!("--seccomp: Busway filters no system calls");
        }
        let requests = Requests::new().map_err(|error| Failure::new(error.exit_status(), error))?;
        let server = socket
            .map(|socket| Server::start(&socket, requests.control()))
            .transpose()
            .map_err(|error| Failure::new(error.exit_status(), error))?;
        let served = machine::serve(first, self.no_shutdown, requests);
        // Who asked for the end may kill this process when it is answered: nothing comes after it.
        if let Some(server) = server {
            server.finish();
        }
        served.map_err(|error| Failure::new(error.exit_status(), error))
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
            ..VmConfig::default()
        };
        let config = self.vm.config_from(defaults, |config| {
            // It is taken, as over the API, and shown.
            if let Some(max) = config.cpus.max.filter(|max| *max > config.cpus.boot) {
                config.cpus.max = None;
                config.accepted = Some(Box::new(Accepted {
                    max_vcpus: Some(max),
                    ..Accepted::default()
                }));
            }
        })?;
        Ok(Some(config))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn args(text: &str) -> Vec<OsString> {
        text.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn the_flags_are_in_order() {
        Serve::command().debug_assert();
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
            let serve = Serve::try_parse_from(args(text)).unwrap();
            serve.first().unwrap()
        };
        assert_eq!(
            first("busway --api-socket /run/s -vv --seccomp false"),
            None
        );
        let config = first(
            "busway --api-socket path=/run/s --kernel k --disk path=a path=b --cpus boot=2,max=4 --net tap=t",
        )
        .unwrap();
        let accepted = config.accepted.clone().unwrap_or_default();
        assert_eq!((config.cpus.boot, accepted.max_vcpus), (2, Some(4)));
        assert_eq!((config.disk.len(), config.net.len()), (2, 1));
        let consoles = (ConsoleConfig::Null, ConsoleConfig::Tty);
        assert_eq!((config.serial, config.console), consoles);
    }
}
