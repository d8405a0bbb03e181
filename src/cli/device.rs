//! `busway device`: the host's PCI devices, and moving them to VFIO and back.
//!
//! What stands here is what a person types and reads; the work is done by [`busway_vfio::host`].

mod names;
mod permits;
mod table;

use std::collections::HashMap;
use std::io::{self, IsTerminal as _, Write};
use std::path::Path;

use busway_pci::{Bdf, ParseBdfError};
use busway_vfio::host::{
    self, BindError, Bound, Host, HostDevice, HostError, Kernel, LinuxKernel, RefusedError, Step,
    SysRoot, UnbindError, Unbound, Usage,
};
use clap::{Args, Subcommand};

use names::Names;
use permits::{BindPermits, UnbindPermits};
use table::{Row, Table};

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
    /// GROUP is the IOMMU group: its members go to a guest together. Run as root, it also shows which
    /// processes hold devices by VFIO. Output that is not read on a terminal is not cut.
    List(ListArgs),
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

/// `busway device list`
#[derive(Args, Clone, Debug)]
pub struct ListArgs {
    /// Show only these devices: 0000:01:00.0, or 01:00.0 for short
    #[arg(value_name = "ADDRESS", value_parser = address)]
    pub addresses: Vec<Bdf>,
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
    /// A device to be shown is not there.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// Devices were not bound.
    #[error(transparent)]
    Bind(#[from] BindError),
    /// Devices were not given back.
    #[error(transparent)]
    Unbind(#[from] UnbindError),
    /// cannot write the result: {0}
    #[error("cannot write the result: {0}")]
    Output(#[from] io::Error),
}

impl DeviceError {
    /// The status to exit with: 1 a failure, 2 bad usage, 3 the host cannot do it.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Refused(refused)
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
            Self::Bind(BindError::Failed { .. })
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
    let width = out
        .is_terminal()
        .then(|| terminal_size::terminal_size_of(&out))
        .flatten()
        .map(|(width, _)| usize::from(width.0));
    run_on(args, &SysRoot::default(), &mut LinuxKernel, &mut out, width)
}

/// Runs `busway device` on the host below `root`, and writes what a terminal of `width` columns
/// shows; none: no terminal.
///
/// # Errors
///
/// As [`run`].
pub fn run_on(
    args: &DeviceArgs,
    root: &SysRoot,
    kernel: &mut dyn Kernel,
    out: &mut dyn Write,
    width: Option<usize>,
) -> Result<(), DeviceError> {
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
        DeviceCommand::List(list) => show(&Host::read(root)?, list, width)?,
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
    match out.write_all(said.as_bytes()).and_then(|()| out.flush()) {
        // Whoever reads has seen enough.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => Ok(result?),
    }
}

fn show(host: &Host, list: &ListArgs, width: Option<usize>) -> Result<String, RefusedError> {
    let absent = |address: &&Bdf| host.device(**address).is_none();
    let absent = list
        .addresses
        .iter()
        .filter(absent)
        .map(|&address| host::Refusal::NotThere { address });
    let absent: Vec<_> = absent.collect();
    if !absent.is_empty() {
        return Err(RefusedError(absent));
    }
    let names = Names::load();
    let wanted = |device: &&HostDevice| {
        list.addresses.is_empty() || list.addresses.contains(&device.address)
    };
    // A host has many devices of a kind, and a vendor's part of the database may be long.
    let mut known = HashMap::new();
    let mut rows = Vec::new();
    for device in host.devices().filter(wanted) {
        let ids = (device.vendor, device.device);
        let name = known
            .entry(ids)
            .or_insert_with(|| names.device(ids.0, ids.1));
        let class = names.class(device.class);
        rows.push(row(device, host.usage(device.address), class, name.clone()));
    }
    Ok(Table { rows: &rows, width }.to_string())
}

fn row(device: &HostDevice, uses: &[Usage], class: String, name: String) -> Row {
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    Row {
        address: device.address.to_string(),
        class,
        name,
        driver: device.driver.clone().unwrap_or_else(|| "-".to_owned()),
        group: number(device.group),
        node: number(device.numa_node),
        uses: uses.iter().map(Usage::to_string).collect(),
    }
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
