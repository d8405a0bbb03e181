//! `busway device`: the host's PCI devices, and moving them to VFIO and back.
//!
//! What stands here is what a person types and reads; the work is done by [`busway_vfio::host`].

mod check;
mod facts;
mod json;
mod list;
mod long;
mod names;
mod permits;
mod svg;
mod table;
mod topology;
mod tree;
mod watch;

use std::io::{self, Write};
use std::path::Path;

use busway_pci::{Bdf, ParseBdfError};
use busway_vfio::host::{
    self, BindError, Bound, HostError, Kernel, LinuxKernel, Step, SysRoot, UnbindError, Unbound,
};
use clap::{Args, Subcommand};

pub use check::CheckArgs;
pub use list::{ListArgs, ListError};
use names::Names;
use permits::{BindPermits, UnbindPermits};
pub(super) use table::{fold, shorten};

use super::style::{Screen, write_out};

/// `busway device`
#[derive(Args, Clone, Debug)]
pub struct DeviceArgs {
    /// What to do.
    #[command(subcommand)]
    pub command: DeviceCommand,
}

/// What `busway device` can do.
#[derive(Subcommand, Clone, Debug)]
pub enum DeviceCommand {
    /// Show the host's PCI devices, and what uses each
    ///
    /// GROUP is the IOMMU group: its members go to a guest together. Where the terminal is wide there is
    /// more: LINK (speed in GT/s and lanes, with the most it can where that is more), RESET (how the kernel
    /// can reset it), VFS (virtual functions, of those it can make), BARS (their sizes) and OTHERS (drivers
    /// that it could have). Run as root, it also shows which processes hold devices by VFIO. Output that is
    /// not read on a terminal is not cut.
    List(ListArgs),
    /// Say whether a guest can have devices, and what to do where it cannot
    ///
    /// Every obstacle is named, with the command that removes it, and what else is worth knowing. Several
    /// devices are looked at as one guest's. Nothing is changed. Exit status: 0 a guest can have them now;
    /// 3 something stands against it, if only that they are to be bound; 2 there is no such device.
    Check(CheckArgs),
    /// Give devices to VFIO, so that a guest can have them
    ///
    /// The devices are taken from their drivers and given to vfio-pci: all of them, or, where
    /// something fails, none. Refused are devices that the host uses (mounted, swapped to, the default
    /// route), and devices that share an IOMMU group with others that stay with the host.
    Bind(BindArgs),
    /// Give devices back to the host's own drivers
    ///
    /// Refused while a process still has the device open.
    Unbind(UnbindArgs),
}

/// `busway device bind`
#[derive(Args, Clone, Debug)]
pub struct BindArgs {
    /// The devices: 0000:01:00.0, or 01:00.0 for short, or their folders in sysfs
    #[arg(value_name = "ADDRESS", value_parser = address, required = true)]
    pub addresses: Vec<Bdf>,

    /// What is done in spite of what stands against it.
    #[command(flatten)]
    pub permits: BindPermits,
}

/// `busway device unbind`
#[derive(Args, Clone, Debug)]
pub struct UnbindArgs {
    /// The devices: 0000:01:00.0, or 01:00.0 for short, or their folders in sysfs
    #[arg(value_name = "ADDRESS", value_parser = address, required = true)]
    pub addresses: Vec<Bdf>,

    /// What is done in spite of what stands against it.
    #[command(flatten)]
    pub permits: UnbindPermits,
}

/// An address, or a folder of sysfs whose name is one.
fn address(text: &str) -> Result<Bdf, ParseBdfError> {
    let name = Path::new(text).file_name().and_then(|name| name.to_str());
    name.unwrap_or(text)
        .parse()
        .map_err(|_| ParseBdfError(text.to_owned()))
}

/// Why `busway device` failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Devices to be shown are not there.
    #[error(transparent)]
    List(#[from] ListError),
    /// Devices were not bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Devices were not given back.
    #[error(transparent)]
    Unbind(#[from] UnbindError),
    /// A guest cannot have the devices now; why has been said.
    #[error("")]
    NotReady {
        /// Whether some are not there at all.
        absent: bool,
    },
    /// cannot write the result: {0}
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl DeviceError {
    /// The status to exit with: 1 a failure, 2 bad usage, 3 the host cannot do it.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::List(ListError::Refused(refused))
            | Self::Bind(BindError::Refused(refused))
            | Self::Unbind(UnbindError::Refused(refused)) => {
                // Where one of them is the host's fault, mending the command line does not help.
                if refused.0.iter().all(host::Refusal::is_usage) {
                    2
                } else {
                    3
                }
            }
            Self::Host(_) | Self::Bind(BindError::Host(_)) | Self::Unbind(UnbindError::Host(_)) => {
                3
            }
            Self::NotReady { absent } => {
                if *absent {
                    2
                } else {
                    3
                }
            }
            Self::List(ListError::NoGroup { .. } | ListError::NoKind { .. }) => 2,
            Self::List(ListError::Host(_)) => 3,
            Self::List(ListError::Picture { .. } | ListError::Json(_))
            | Self::Bind(BindError::Failed { .. })
            | Self::Unbind(UnbindError::Failed(_))
            | Self::Output(_) => 1,
        }
    }
}

/// Runs `busway device` on this host.
///
/// # Errors
///
/// [`DeviceError`], whose [`exit_status`](DeviceError::exit_status) says what to exit with.
pub fn run(args: &DeviceArgs) -> Result<(), DeviceError> {
    let mut out = io::stdout().lock();
    let screen = Screen::of_stdout();
    run_on(
        args,
        &SysRoot::default(),
        &mut LinuxKernel,
        &mut out,
        screen,
    )
}

/// Runs `busway device` on the host below `root`, and writes what a screen shows: a terminal of so many
/// columns, or none.
///
/// # Errors
///
/// As [`run`].
pub fn run_on(
    args: &DeviceArgs,
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    out: &mut dyn Write,
    screen: impl Into<Screen>,
) -> Result<(), DeviceError> {
    let screen = screen.into();
    let mut loaded = String::new();
    let mut tell = |step: &Step| {
        log::info!("{step}");
        if let Step::Load { module } = step
            && module == host::VFIO_PCI
        {
            loaded = format!("loaded the module {module}\n");
        }
    };
    let lines: String = match &args.command {
        DeviceCommand::List(list) if list.watch => return watch_list(list, root, out, screen),
        DeviceCommand::List(list) => list::show(root, &Names::load(), list, screen)?,
        DeviceCommand::Check(args) => {
            let (text, ready) = check::show(root, args, screen, &host::open_node)?;
            write_out(out, &text)?;
            return ready;
        }
        DeviceCommand::Bind(bind) => {
            let bound = host::bind(
                root,
                kernel,
                &bind.addresses,
                &bind.permits.all(),
                &mut tell,
            )?;
            bound.iter().map(bound_line).collect()
        }
        DeviceCommand::Unbind(unbind) => {
            let unbound = host::unbind(
                root,
                kernel,
                &unbind.addresses,
                &unbind.permits.all(),
                &mut tell,
            )?;
            unbound.iter().map(unbound_line).collect()
        }
    };
    let said = loaded + &lines;
    Ok(write_out(out, &said)?)
}

/// Shows the list anew whenever it changes, until whoever reads has seen enough.
fn watch_list(
    list: &ListArgs,
    root: &SysRoot,
    out: &mut dyn Write,
    screen: Screen,
) -> Result<(), DeviceError> {
    let names = Names::load();
    watch::watch(
        &mut |screen| Ok(list::show(root, &names, list, screen)?),
        screen,
        out,
        &mut || {
            std::thread::sleep(list::EVERY);
            Some(Screen::of_stdout())
        },
    )
}

fn bound_line(bound: &Bound) -> String {
    let Bound {
        address,
        group,
        driver,
        former,
        already,
    } = bound;
    let from = match former {
        _ if *already => "already with".to_owned(),
        Some(former) => format!("taken from {former}, now with"),
        None => "now with".to_owned(),
    };
    format!("{address}: {from} {driver}, IOMMU group {group}\n")
}

fn unbound_line(unbound: &Unbound) -> String {
    let Unbound {
        address,
        former,
        driver,
    } = unbound;
    let now = match (former, driver) {
        (Some(former), Some(driver)) => format!("taken from {former}, now with {driver}"),
        (Some(former), None) => {
            format!("taken from {former}; no driver of the host takes it")
        }
        (None, Some(driver)) => format!("with {driver}; VFIO does not have it"),
        (None, None) => "with no driver, and none of the host takes it".to_owned(),
    };
    format!("{address}: {now}\n")
}
