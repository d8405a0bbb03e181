//! `busway device`: the host's PCI devices, and moving them to VFIO and back.
//!
//! What stands here is what a person types and reads; the work is done by [`busway_host`].

mod binding;
mod block;
mod check;
mod facts;
mod json;
mod list;
mod long;
mod mediated;
mod names;
mod permits;
mod svg;
mod table;
mod topology;
mod tree;
mod vfs;
mod watch;

use std::io::{self, Write};

use busway_host::{
    AtBootError, BindError, Called, CalledError, HostError, Kernel, LinuxKernel, NoUser,
    RestoreError, SysRoot, UnbindError, VfsError,
};
use busway_pci::Bdf;
use clap::{Args, Subcommand};

pub(super) use binding::Changes;
pub use binding::{BindArgs, RestoreArgs, UnbindArgs};
pub use check::CheckArgs;
pub use list::{ListArgs, ListError};
use names::Names;
pub use vfs::VfsArgs;
pub(super) use vfs::aligned;

use super::style::{Screen, write_out};
use crate::exit::{HOST, RUNTIME, USAGE};
use crate::preflight::PreflightError;

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
    /// more, and --long shows all of it on any: LINK (speed in GT/s and lanes, with the most it can where
    /// that is more), RESET (how the kernel can reset it), VFS (virtual functions, of those it can make),
    /// BARS (their sizes) and OTHERS (modules that it could have a driver of). Run as root, it also shows
    /// which processes hold devices by VFIO. Output that is not read on a terminal is not cut. Mediated
    /// devices, and the types of them that devices offer, stand below in tables of their own.
    List(ListArgs),
    /// Say whether a guest can have devices, and what to do where it cannot
    ///
    /// Every obstacle is named, with the command that removes it, and what else is worth knowing. Several
    /// devices are looked at as one guest's. Nothing is changed. Exit status: 0 a guest can have them now;
    /// 3 something stands against it, if only that they are to be bound; 2 there is no such device.
    Check(CheckArgs),
    /// Give devices to VFIO, so that a guest can have them
    ///
    /// The devices are taken from their drivers and given to vfio-pci, or to the variant of it that the
    /// kernel has for them: all of them, or, where something fails or Ctrl-C is pressed, none. Refused
    /// are devices that the host uses (mounted, swapped to, the default route), and devices that share
    /// an IOMMU group with others that stay with the host. What each had before is written down, for
    /// `restore`.
    Bind(BindArgs),
    /// Give devices back to the host's own drivers
    ///
    /// A driver_override that was there before they were bound is set again, and the rule that binds
    /// them at boot is removed. Refused while a process still has the device open.
    Unbind(UnbindArgs),
    /// Put devices back exactly as they were before Busway moved them
    ///
    /// That is the driver or none, driver_override, and who has the nodes; after a crash in the middle
    /// of `bind` as well. The record of it lasts until the host reboots, as the binding itself does;
    /// what is bound at every boot is then left to the host's own drivers.
    Restore(RestoreArgs),
    /// Make, set, list and remove virtual functions (SR-IOV)
    Vfs(VfsArgs),
}

/// The PCI functions that a person named.
fn find(root: &SysRoot, called: &[Called]) -> Result<Vec<Bdf>, CalledError> {
    called.iter().map(|called| called.find(root)).collect()
}

/// Why `busway device` failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceCommandError {
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Devices to be shown are not there.
    #[error(transparent)]
    List(#[from] ListError),
    /// Devices were not given to VFIO.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Devices that are to be bound at each boot were not.
    #[error(transparent)]
    AtBoot(#[from] AtBootError),
    /// Devices were not given to the host's own drivers.
    #[error(transparent)]
    Unbind(#[from] UnbindError),
    /// Devices were not put back.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// Virtual functions are not as asked.
    #[error(transparent)]
    Vfs(#[from] VfsError),
    /// What was named is not one device.
    #[error(transparent)]
    Called(#[from] CalledError),
    /// Their nodes cannot be given to the user.
    #[error(transparent)]
    User(#[from] NoUser),
    /// The VM's file is none.
    #[error("{0}")]
    Config(String),
    /// cannot tell where this program is, for udev to run it at boot: {0}
    #[error("cannot tell where this program is, for udev to run it at boot: {0}")]
    OwnPath(io::Error),
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

impl From<PreflightError> for DeviceCommandError {
    fn from(error: PreflightError) -> Self {
        match error {
            PreflightError::Host(error) => error.into(),
            PreflightError::Called(error) => error.into(),
        }
    }
}

impl DeviceCommandError {
    /// The status to exit with, of [`crate::exit`].
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        let usage = match self {
            Self::List(ListError::Refused(refused))
            | Self::Bind(BindError::Refused(refused))
            | Self::Unbind(UnbindError::Refused(refused))
            | Self::Restore(RestoreError::Refused(refused)) => {
                // Where one of them is the host's fault, mending the command line does not help.
                refused.0.iter().all(busway_host::Refusal::is_usage)
            }
            Self::Vfs(VfsError::Refused(error)) => error.is_usage(),
            Self::NotReady { absent } => *absent,
            Self::Config(_) => true,
            Self::List(
                ListError::NoGroup { .. } | ListError::NoKind { .. } | ListError::NotMediated(_),
            )
            | Self::Called(_)
            | Self::List(ListError::Called(_))
            | Self::User(_) => true,
            Self::Host(_)
            | Self::List(ListError::Host(_))
            | Self::Bind(BindError::Host(_) | BindError::Persist(_))
            | Self::Unbind(UnbindError::Host(_))
            | Self::Restore(RestoreError::Host(_))
            | Self::Vfs(VfsError::Host(_)) => false,
            Self::List(ListError::Picture { .. } | ListError::Json(_))
            | Self::Bind(_)
            | Self::AtBoot(_)
            | Self::Unbind(_)
            | Self::Restore(_)
            | Self::Vfs(_)
            | Self::OwnPath(_)
            | Self::Output(_) => return RUNTIME,
        };
        if usage { USAGE } else { HOST }
    }
}

/// Runs `busway device` on this host.
///
/// # Errors
///
/// [`DeviceCommandError`], whose [`exit_status`](DeviceCommandError::exit_status) says what to exit with.
pub fn run(args: &DeviceArgs) -> Result<(), DeviceCommandError> {
    let mut out = io::stdout().lock();
    let changes = !matches!(
        args.command,
        DeviceCommand::List(_) | DeviceCommand::Check(_)
    );
    if changes {
        busway_host::note_interrupts();
    }
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
) -> Result<(), DeviceCommandError> {
    let screen = screen.into();
    let (said, result) = match &args.command {
        DeviceCommand::List(list) if list.watch => return watch_list(list, root, out, screen),
        DeviceCommand::List(list) => (list::show(root, &Names::load(), list, screen)?, Ok(())),
        DeviceCommand::Check(args) => check::show(root, args, screen, &busway_host::open_node)?,
        DeviceCommand::Bind(args) => binding::bind(args, root, kernel),
        DeviceCommand::Unbind(args) => binding::unbind(args, root, kernel),
        DeviceCommand::Restore(args) => binding::restore(args, root, kernel),
        DeviceCommand::Vfs(args) => vfs::vfs(args, root, kernel),
    };
    let written = write_out(out, &said);
    result?;
    Ok(written?)
}

/// Shows the list anew whenever it changes, until whoever reads has seen enough.
fn watch_list(
    list: &ListArgs,
    root: &SysRoot,
    out: &mut dyn Write,
    screen: Screen,
) -> Result<(), DeviceCommandError> {
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
