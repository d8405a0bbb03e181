//! `busway device check`: whether a guest can have devices, and what to do where it cannot.

use busway_host::{Called, Check, DeviceCheck, Host, MediatedCheck, Opens, SysRoot};
use clap::Args;
use serde::Serialize;

use super::names::Names;
use super::{DeviceCommandError, ListError};
use crate::cli::findings::{self, FindingArgs, FindingJson};
use crate::cli::style::{Screen, Style};

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

#[derive(Serialize)]
struct Json<'a> {
    version: u32,
    ready: bool,
    devices: Vec<DeviceJson<'a>>,
    mediated_devices: Vec<MediatedJson<'a>>,
    host: Vec<FindingJson<'a>>,
}

#[derive(Serialize)]
struct DeviceJson<'a> {
    address: String,
    ready: bool,
    needs_only_binding: bool,
    findings: Vec<FindingJson<'a>>,
}

#[derive(Serialize)]
struct MediatedJson<'a> {
    uuid: String,
    ready: bool,
    findings: Vec<FindingJson<'a>>,
}

/// What was found, in words or as JSON; and what the command ends with.
pub(super) fn show(
    root: &SysRoot,
    args: &CheckArgs,
    screen: Screen,
    opens: Opens<'_>,
) -> Result<(String, Result<(), DeviceCommandError>), DeviceCommandError> {
    let host = Host::read(root)?;
    let (addresses, uuids) = super::find_all(root, &args.addresses)?;
    let check = Check::of_all(&host, &addresses, &uuids, args.findings.memory, opens);
    let ready = check.is_ready();
    let end = match ready {
        true => Ok(()),
        false => Err(DeviceCommandError::NotReady {
            absent: check.devices.iter().any(|device| !device.is_there)
                || check.mediated.iter().any(|device| !device.is_there),
        }),
    };
    if args.findings.json {
        let json = Json {
            version: super::json::VERSION,
            ready,
            devices: check.devices.iter().map(device_json).collect(),
            mediated_devices: check.mediated.iter().map(mediated_json).collect(),
            host: findings::json(&check.host),
        };
        let text = serde_json::to_string_pretty(&json).map_err(ListError::from)?;
        return Ok((text + "\n", end));
    }
    let names = Names::load();
    let mut text = String::new();
    for of in &check.devices {
        let name = host
            .device(of.address)
            .map(|device| names.device(device.vendor, device.device));
        let verdict = verdict(of);
        text += &findings::heading(
            &format!("{}  {}", of.address, name.unwrap_or_default()),
            verdict,
            screen,
        );
        text += &findings::show(&of.findings, screen);
        text.push('\n');
    }
    for of in &check.mediated {
        let verdict = match of.is_ready() {
            true => READY,
            false => NOT_READY,
        };
        text += &findings::heading(&format!("{}  mediated device", of.uuid), verdict, screen);
        text += &findings::show(&of.findings, screen);
        text.push('\n');
    }
    let (word, style) = match findings::has_obstacle(&check.host) {
        true => ("cannot give devices to guests", Style::BAD),
        false => ("can give devices to guests", Style::GOOD),
    };
    text += &findings::heading("This host", (word, style), screen);
    text += &findings::show(&check.host, screen);
    Ok((text, end))
}

const READY: (&str, Style) = ("ready", Style::GOOD);
const NOT_READY: (&str, Style) = ("not ready", Style::BAD);

fn verdict(device: &DeviceCheck) -> (&'static str, Style) {
    match (device.is_ready(), device.needs_only_binding()) {
        (true, _) => READY,
        (false, true) => ("ready to be bound", Style::WARN),
        (false, false) => NOT_READY,
    }
}

fn mediated_json(device: &MediatedCheck) -> MediatedJson<'_> {
    MediatedJson {
        uuid: device.uuid.to_string(),
        ready: device.is_ready(),
        findings: findings::json(&device.findings),
    }
}

fn device_json(device: &DeviceCheck) -> DeviceJson<'_> {
    DeviceJson {
        address: device.address.to_string(),
        ready: device.is_ready(),
        needs_only_binding: device.needs_only_binding(),
        findings: findings::json(&device.findings),
    }
}
