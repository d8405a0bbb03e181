//! `busway device check`: whether a guest can have devices, and what to do where it cannot.

use std::path::PathBuf;

use busway_host::{Called, Opens, SysRoot};
use clap::Args;

use super::names::Names;
use super::{DeviceCommandError, ListError};
use crate::cli::findings::{self, FindingArgs};
use crate::cli::run::RunArgs;
use crate::cli::style::Screen;
use crate::preflight::Preflight;

/// `busway device check`
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// The devices that a guest is to have together: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1,
    /// mediated devices' UUIDs, or files of sysfs
    #[arg(value_name = "DEVICE", required_unless_present = "config")]
    pub addresses: Vec<Called>,

    /// Look at a VM's file as well: at its devices, for its memory, and whether that and its vCPUs are on
    /// their NUMA nodes
    #[arg(long, value_name = "FILE", conflicts_with = "memory")]
    pub config: Option<PathBuf>,

    /// How they are looked at.
    #[command(flatten)]
    pub findings: FindingArgs,
}

/// What was found, in words or as JSON; and what the command ends with.
pub(super) fn show(
    root: &SysRoot,
    args: &CheckArgs,
    screen: Screen,
    opens: Opens<'_>,
) -> Result<(String, Result<(), DeviceCommandError>), DeviceCommandError> {
    let config = args.config.as_deref().map(RunArgs::of_file).transpose();
    let config = config.map_err(|error| DeviceCommandError::Config(error.to_string()))?;
    let mut called = args.addresses.clone();
    let mut memory = args.findings.memory;
    if let Some(config) = &config {
        memory = config.most_memory();
        for device in &config.device {
            // One that is a descriptor alone cannot be told.
            let name = device.host_name().ok().map(|name| name.to_string().parse());
            called.extend(name.and_then(Result::ok));
        }
    }
    let mut found = Preflight::of(root, &called, memory, opens)?;
    if let Some(config) = &config {
        found.across(config);
    }
    let Preflight { host, check } = &found;
    let ready = check.is_ready();
    let end = match ready {
        true => Ok(()),
        false => Err(DeviceCommandError::NotReady {
            absent: check.devices.iter().any(|device| !device.is_there)
                || check.mediated.iter().any(|device| !device.is_there),
        }),
    };
    if args.findings.json {
        let text = serde_json::to_string_pretty(&found.json()).map_err(ListError::from)?;
        return Ok((text + "\n", end));
    }
    let names = Names::load();
    let mut text = String::new();
    for of in &check.devices {
        let name = host
            .device(of.address)
            .map(|device| names.device(device.vendor, device.device));
        let verdict = findings::verdict(of.is_ready(), of.needs_only_binding());
        text += &findings::heading(
            &format!("{}  {}", of.address, name.unwrap_or_default()),
            verdict,
            screen,
        );
        text += &findings::show(&of.findings, screen);
        text.push('\n');
    }
    for of in &check.mediated {
        let verdict = findings::verdict(of.is_ready(), false);
        text += &findings::heading(&format!("{}  mediated device", of.uuid), verdict, screen);
        text += &findings::show(&of.findings, screen);
        text.push('\n');
    }
    let verdict = findings::host_verdict(&found.json().host);
    text += &findings::heading("This host", verdict, screen);
    text += &findings::show(&check.host, screen);
    Ok((text, end))
}
