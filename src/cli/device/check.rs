//! `busway device check`: whether a guest can have devices, and what to do where it cannot.

use busway_host::{Called, Opens, SysRoot};
use clap::Args;

use super::names::Names;
use super::{DeviceCommandError, ListError};
use crate::cli::findings::{self, FindingArgs};
use crate::cli::style::Screen;
use crate::preflight::Preflight;

/// `busway device check`
#[derive(Args, Clone, Debug)]
pub struct CheckArgs {
    /// The devices that a guest is to have together: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1,
    /// mediated devices' UUIDs, or files of sysfs
    #[arg(value_name = "DEVICE", required = true)]
    pub addresses: Vec<Called>,

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
    let memory = args.findings.memory;
    let found = Preflight::of(root, &args.addresses, memory, opens)?;
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
