//! `busway device list`: which devices are shown, and in which form.

use std::io::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use busway_host::files::{Existing, OutputError, open_output};
use busway_host::{
    Called, CalledError, Host, HostDevice, HostError, MediatedDevice, Refusal, RefusedError,
    SysRoot, Uuid,
};
use clap::Args;

use super::facts::{self, Facts, Shown, is_lent};
use super::names::Names;
use super::table::{Row, Styles, Table};
use super::topology::Topology;
use super::{json, long, mediated, svg, tree};
use crate::cli::findings;
use crate::cli::style::{Screen, Style, of_palette};
use crate::preflight::find_all;

/// `busway device list`
#[derive(Args, Clone, Debug, Default)]
pub struct ListArgs {
    /// Show only these devices: 0000:01:00.0, 01:00.0, 10de:1b81, wlp3s0, nvme0n1, a mediated device's UUID,
    /// or a file of sysfs
    #[arg(value_name = "DEVICE")]
    pub addresses: Vec<Called>,

    /// Show only the members of this IOMMU group
    #[arg(long, value_name = "NUMBER")]
    pub group: Vec<u32>,

    /// Show only devices of this kind: a word of the column CLASS (nvme, ethernet, vga), one of net,
    /// storage, display, audio, usb and bridge, or the first digits of the class code (0108)
    #[arg(long, value_name = "KIND")]
    pub class: Vec<String>,

    /// Show all that is known of each, in a block
    #[arg(short, long, group = "form")]
    pub long: bool,

    /// Show which device is behind which, with IOMMU groups in colour
    #[arg(long, group = "form")]
    pub tree: bool,

    /// Print JSON, whose schema docs/device-json.md describes
    #[arg(long, group = "form")]
    pub json: bool,

    /// Draw the topology into a file; -: to standard output
    #[arg(long, value_name = "FILE", group = "form", conflicts_with = "watch")]
    pub svg: Option<PathBuf>,

    /// Show it anew whenever it changes, until Ctrl-C; with --json, each time on a line of its own
    #[arg(long)]
    pub watch: bool,
}

/// How often a watched host is looked at.
pub(super) const EVERY: Duration = Duration::from_secs(1);

/// Why nothing is shown.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    /// What was named is not one device.
    #[error(transparent)]
    Called(#[from] CalledError),
    /// The host could not be read.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A device to be shown is not there.
    #[error(transparent)]
    Refused(#[from] RefusedError),
    /// A mediated device to be shown is not there.
    #[error("there is no mediated device {0}\n  see those there are: busway device list")]
    NotMediated(Uuid),
    /// No device is in the group.
    #[error("there is no IOMMU group {group}; {}", groups(.known))]
    NoGroup {
        /// The group asked for.
        group: u32,
        /// Those that there are.
        known: Vec<u32>,
    },
    /// No device is of the kind.
    #[error("no device is of the kind `{kind}`; there are: {}", .known.join(", "))]
    NoKind {
        /// The kind asked for.
        kind: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// The result could not be written.
    #[error("cannot write {}: {source}", file.display())]
    Picture {
        /// The picture's file.
        file: PathBuf,
        /// Why not.
        source: OutputError,
    },
    /// The result could not be put into JSON.
    #[error("cannot write the devices as JSON: {0}")]
    Json(#[from] serde_json::Error),
}

fn groups(known: &[u32]) -> String {
    match (known.first(), known.last()) {
        (Some(first), Some(last)) => format!("they are numbered {first} to {last}"),
        _ => "the IOMMU is off: busway doctor says how to turn it on".to_owned(),
    }
}

/// What the arguments ask to be shown, once.
pub(super) fn show(
    root: &SysRoot,
    names: &Names,
    args: &ListArgs,
    screen: Screen,
) -> Result<String, ListError> {
    let host = Host::read(root)?;
    let facts = Facts::of(&host, names);
    let shown = select(&facts, args)?;
    let devices = &shown.devices;
    if args.json {
        return Ok(json::show(&facts, &shown, args.watch)?);
    }
    if args.tree {
        let topology = Topology::of(&host, devices, &shown.mediated);
        return Ok(tree::show(&facts, &topology, screen));
    }
    if let Some(file) = &args.svg {
        let topology = Topology::of(&host, devices, &shown.mediated);
        let picture = svg::show(&facts, &topology, &title(&host));
        if file.as_os_str() == "-" {
            return Ok(picture);
        }
        let written = open_output(file, Existing::Empty)
            .and_then(|mut output| Ok(output.file.write_all(picture.as_bytes())?));
        written.map_err(|source| ListError::Picture {
            file: file.clone(),
            source,
        })?;
        return Ok(String::new());
    }
    if args.long {
        return Ok(long::show(&facts, &shown, screen));
    }
    let shared = host.shared_groups();
    let rows: Vec<_> = devices
        .iter()
        .map(|device| row(&facts, &shared, device))
        .collect();
    let table = Table {
        rows: &rows,
        screen,
    };
    let mut text = match rows.is_empty() {
        true => String::new(),
        false => table.to_string(),
    };
    for more in [
        mediated::devices(&shown.mediated, screen),
        mediated::types(&shown.types, screen),
    ] {
        if !more.is_empty() && !text.is_empty() {
            text.push('\n');
        }
        text += &more;
    }
    // Who reads the table from a pipe expects rows.
    if let (Some(unseen), Some(_)) = (host.unseen(), screen.width) {
        text.push('\n');
        text += &findings::show(&[unseen], screen);
    }
    Ok(text)
}

/// The devices asked for, by address.
fn select<'a>(facts: &Facts<'a>, args: &ListArgs) -> Result<Shown<'a>, ListError> {
    let host = facts.host;
    let (addresses, uuids) = find_all(host.root(), &args.addresses)?;
    if let Some(absent) = uuids
        .iter()
        .find(|uuid| host.mediated_device(**uuid).is_none())
    {
        return Err(ListError::NotMediated(*absent));
    }
    let absent = addresses.iter().filter(|a| host.device(**a).is_none());
    let absent: Vec<_> = absent
        .map(|&address| Refusal::NotThere { address })
        .collect();
    if !absent.is_empty() {
        return Err(RefusedError(absent).into());
    }
    for &group in &args.group {
        let mut mediated = host.mediated_devices().iter();
        if host.group(group).next().is_none() && !mediated.any(|one| one.group == Some(group)) {
            let mut known: Vec<_> = host.devices().filter_map(|device| device.group).collect();
            known.sort_unstable();
            return Err(ListError::NoGroup { group, known });
        }
    }
    for kind in &args.class {
        if !host.devices().any(|device| is_of(facts, device, kind)) {
            let mut known: Vec<_> = host.devices().map(|d| facts.class(d).to_owned()).collect();
            known.sort_unstable();
            known.dedup();
            let kind = kind.clone();
            return Err(ListError::NoKind { kind, known });
        }
    }
    let all = addresses.is_empty() && uuids.is_empty();
    let wanted = |device: &&HostDevice| {
        (all || addresses.contains(&device.address))
            && (args.group.is_empty() || device.group.is_some_and(|g| args.group.contains(&g)))
            && (args.class.is_empty() || args.class.iter().any(|kind| is_of(facts, device, kind)))
    };
    let mediated = |device: &&MediatedDevice| {
        (all || uuids.contains(&device.uuid))
            && (args.group.is_empty() || device.group.is_some_and(|g| args.group.contains(&g)))
            && args.class.is_empty()
    };
    let whole = all && args.group.is_empty() && args.class.is_empty();
    Ok(Shown {
        devices: host.devices().filter(wanted).collect(),
        mediated: host.mediated_devices().iter().filter(mediated).collect(),
        types: host.mediated_types().iter().filter(|_| whole).collect(),
    })
}

/// Whether a device is of a kind: a word of its class, one that many kinds have in common, or the
/// beginning of its class code (PCI Code and ID Assignment 1.15 §1).
fn is_of(facts: &Facts<'_>, device: &HostDevice, kind: &str) -> bool {
    let kind = kind.to_lowercase();
    let base = device.class >> 16;
    let known = match kind.as_str() {
        "storage" | "disk" => base == 0x01,
        "net" | "network" | "nic" => base == 0x02,
        "display" | "gpu" => base == 0x03,
        "audio" => matches!(device.class >> 8, 0x0401 | 0x0403),
        "bridge" => base == 0x06,
        "usb" => device.class >> 8 == 0x0c03,
        _ => false,
    };
    let digits = kind.strip_prefix("0x").unwrap_or(&kind);
    let code = digits.len() >= 2 && format!("{:06x}", device.class).starts_with(digits);
    known || code || facts.class(device).to_lowercase().contains(&kind)
}

fn row(facts: &Facts<'_>, shared: &[u32], device: &HostDevice) -> Row {
    let number = |number: Option<u32>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let driver = device.driver.as_deref();
    let in_use = facts.host.usage(device.address);
    let colour = shared.iter().position(|group| Some(*group) == device.group);
    Row {
        address: device.address.to_string(),
        class: facts.class(device).to_owned(),
        name: facts.name(device).to_owned(),
        driver: driver.unwrap_or("-").to_owned(),
        group: number(device.group),
        node: number(device.numa_node),
        link: facts::link(device),
        functions: facts::functions(device),
        reset: device.reset_methods.join(","),
        bars: facts::bars(device),
        alternatives: facts.alternatives(device).join(","),
        uses: facts.uses(device),
        styles: Styles {
            // As in the tree: no guest is given one.
            name: match device.is_bridge() {
                true => Style::DIM,
                false => Style::PLAIN,
            },
            driver: match driver.is_some_and(is_lent) {
                true => Style::GOOD,
                false => Style::PLAIN,
            },
            group: colour.map_or(Style::PLAIN, of_palette),
            link: match device.link.is_some_and(|link| link.is_degraded()) {
                true => Style::WARN,
                false => Style::PLAIN,
            },
            uses: match in_use.iter().any(|usage| usage.prevents_bind()) {
                true => Style::WARN,
                false => Style::PLAIN,
            },
        },
    }
}

/// What a picture is called: whose devices it shows.
fn title(host: &Host) -> String {
    let name = std::fs::read_to_string(host.root().proc.join("sys/kernel/hostname"));
    match name.as_deref().map(str::trim) {
        Ok(name) if !name.is_empty() => format!("PCI devices of {name}"),
        _ => "PCI devices".to_owned(),
    }
}
