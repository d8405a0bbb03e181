//! The command line: what a person types, the errors they read, and the exit status.
//!
//! It turns flags and `vm.toml` into a [`crate::config::VmConfig`] and hands that to the machine. How
//! a VM is built and run is not known here.

mod ctl;
pub mod device;
pub mod doctor;
mod failure;
mod file;
mod findings;
mod foreign;
#[cfg(any(test, feature = "hostile"))]
pub mod hostile;
pub mod hugepages;
mod logging;
mod manual;
mod nearest;
mod options;
mod panic;
mod progress;
mod run;
mod schema;
mod serve;
pub mod style;
mod text;
mod value;
mod words;

use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::error::ErrorKind;
use clap::{ArgAction, CommandFactory as _, Parser, Subcommand};
use clap_complete::Shell;

pub use failure::Failure;

use crate::exit::{RUNTIME, USAGE};
use crate::notify;
use crate::report::Report;

/// Gives guests real PCI devices
///
/// Busway is a virtual machine monitor for Linux/KVM whose first job is to give guests real PCI
/// devices.
#[derive(Debug, Parser)]
#[command(name = "busway", version, max_term_width = 100, after_help = AT_THE_END)]
#[command(arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Say what is done and where boot time went; -vv: how; -vvv: all
    #[arg(short, long, global = true, action = ArgAction::Count, help_heading = DIAGNOSTICS)]
    verbose: u8,

    /// Colour what is printed
    #[arg(
        long,
        global = true,
        value_name = "WHEN",
        default_value = "auto",
        hide_default_value = true
    )]
    #[arg(help_heading = DIAGNOSTICS)]
    color: style::ColorChoice,

    /// Append the log to a file instead of standard error
    #[arg(long, global = true, value_name = "FILE", help_heading = DIAGNOSTICS)]
    log_file: Option<PathBuf>,
}

/// The heading of what tells about a run.
const DIAGNOSTICS: &str = "Diagnostics";

const AT_THE_END: &str = "\
Without a command, --api-socket PATH has a process that makes and boots VMs as its API tells it;
`busway --api-socket PATH --help` has its flags, which are Cloud Hypervisor's.

Exit status: 0 the guest powered off, or the command did what it says; 1 it failed while running;
2 bad usage or configuration; 3 this host cannot do it.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Boot a guest
    #[command(after_long_help = run::EXAMPLES, after_help = run::MORE)]
    Run(Box<run::RunArgs>),
    /// Show, pause, resume or end a VM that runs, by its control socket
    #[command(after_help = ctl::EXIT_STATUS)]
    Ctl(ctl::CtlArgs),
    /// Show the host's PCI devices, and move them to VFIO and back
    Device(device::DeviceArgs),
    /// Look the host over: can it give devices to guests, and what would help?
    ///
    /// Exit status: 0 it can; 3 something stands against it.
    Doctor(doctor::DoctorArgs),
    /// Show the host's huge pages, and reserve some by NUMA node and size
    Hugepages(hugepages::HugepagesArgs),
    /// Print a shell's completion script
    ///
    /// For bash: busway completions bash > /etc/bash_completion.d/busway
    Completions {
        /// Whose language to write in
        shell: Shell,
    },
    /// Write the manual's pages, for packages
    #[command(hide = true)]
    Manual(manual::ManualArgs),
}

/// Runs the command that this process's arguments say.
#[must_use]
pub fn main() -> ExitCode {
    let report = Arc::new(Report::start());
    notify::start();
    panic::exit_on_any();
    let args: Vec<_> = std::env::args_os().collect();
    if serve::is_meant(&args) {
        return serve::main(args);
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => return print(&error),
    };
    match panic::caught(|| cli.execute(&report)) {
        Some(Ok(())) => {
            log::logger().flush();
            ExitCode::SUCCESS
        }
        Some(Err(failure)) => failure.report(),
        None => ExitCode::from(RUNTIME),
    }
}

impl Cli {
    fn execute(self, report: &Arc<Report>) -> Result<(), Failure> {
        style::choose(self.color);
        start_logging(self.verbose, self.log_file.as_deref())?;
        match self.command {
            Command::Run(args) => run::run(&args, self.verbose, report),
            Command::Ctl(args) => ctl::run(&args),
            Command::Device(args) => {
                device::run(&args).map_err(|error| Failure::new(error.exit_status(), error))
            }
            Command::Doctor(args) => doctor::run(&args),
            Command::Hugepages(args) => {
                hugepages::run(&args).map_err(|error| Failure::new(error.exit_status(), error))
            }
            Command::Completions { shell } => completions(shell),
            Command::Manual(args) => manual::run(&args),
        }
    }
}

fn start_logging(verbose: u8, file: Option<&Path>) -> Result<(), Failure> {
    logging::start(verbose, file).map_err(|error| {
        let file = file.unwrap_or_else(|| "".as_ref());
        Failure::usage(format!("--log-file {}: {error}", file.display()))
    })
}

/// What the argument parser has to say: help and version, or what is wrong with the arguments.
fn print(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _unread = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _unread = error.print();
            ExitCode::from(USAGE)
        }
        _ => {
            let text = error.render();
            let mut stderr = io::stderr().lock();
            let _unread = if style::ColorChoice::chosen().applies(stderr.is_terminal()) {
                write!(stderr, "busway: {}", text.ansi())
            } else {
                write!(stderr, "busway: {text}")
            };
            ExitCode::from(USAGE)
        }
    }
}

fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "busway", &mut script);
    match io::stdout().write_all(&script) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            let error = anyhow::Error::new(error).context("cannot write the script");
            Err(Failure::explained(RUNTIME, error))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_is_in_order() {
        Cli::command().debug_assert();
    }
}
