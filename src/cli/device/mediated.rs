//! Mediated devices and the types that the host's devices offer, as `busway device list` shows them.

use std::fmt::Write as _;

use busway_host::{Host, MediatedDevice, MediatedType};
use serde::Serialize;

use super::block::labelled;
use crate::cli::style::{Screen, Style};
use crate::cli::text::{fold, length, shorten};

/// Between two columns.
const GAP: usize = 2;
/// What is left of a type's name on a narrow terminal.
const NAME_LEAST: usize = 12;

/// Where the users of a device begin on lines of their own, as in the table of PCI devices.
const INDENT: usize = 14;

/// A column of a small table: its title, whether it may be cut, and its cells.
struct Column {
    title: &'static str,
    can_be_cut: bool,
    cells: Vec<String>,
}

/// A table of the devices; empty where there are none. Who uses each stands beside it, or below where there
/// is no room.
pub(super) fn devices(devices: &[&MediatedDevice], screen: Screen) -> String {
    let of = |cell: fn(&MediatedDevice) -> String| devices.iter().map(|one| cell(one)).collect();
    let mut columns = vec![
        column("MEDIATED DEVICE", of(|one| one.uuid.to_string())),
        Column {
            can_be_cut: true,
            ..column("PARENT", of(|one| or_dash(parent(one))))
        },
        Column {
            can_be_cut: true,
            ..column("TYPE", of(|one| or_dash(one.kind.as_deref())))
        },
        column("DRIVER", of(|one| or_dash(one.driver.as_deref()))),
        column(
            "GROUP",
            of(|one| or_dash(one.group.map(|group| group.to_string()).as_deref())),
        ),
    ];
    let users = column("USED BY", of(|one| users(one).join(", ")));
    let others: usize = columns.iter().map(|column| column.width() + GAP).sum();
    let needed = others + users.width();
    match screen.width.is_none_or(|limit| needed <= limit) {
        true => {
            columns.push(users);
            table(&columns, &[], screen)
        }
        false => table(&columns, &users.cells, screen),
    }
}

/// A table of the types; empty where there are none.
pub(super) fn types(types: &[&MediatedType], screen: Screen) -> String {
    let of = |cell: fn(&MediatedType) -> String| types.iter().map(|one| cell(one)).collect();
    let columns = [
        column("TYPE", of(|one| one.id.clone())),
        column("OF", of(|one| one.parent.name.clone())),
        column(
            "LEFT",
            of(|one| or_dash(one.available.map(|left| left.to_string()).as_deref())),
        ),
        column("API", of(|one| or_dash(one.api.as_deref()))),
        Column {
            can_be_cut: true,
            ..column("NAME", of(|one| one.name.clone().unwrap_or_default()))
        },
    ];
    table(&columns, &[], screen)
}

impl Column {
    fn width(&self) -> usize {
        let cells = self.cells.iter().map(|cell| length(cell));
        cells.max().unwrap_or(0).max(self.title.len())
    }
}

fn column(title: &'static str, cells: Vec<String>) -> Column {
    Column {
        title,
        can_be_cut: false,
        cells,
    }
}

fn or_dash(cell: Option<&str>) -> String {
    cell.unwrap_or("-").to_owned()
}

fn parent(device: &MediatedDevice) -> Option<&str> {
    device.parent.as_ref().map(|parent| parent.name.as_str())
}

/// What a device is, in a picture's or a tree's line.
pub(super) fn name(device: &MediatedDevice) -> String {
    let kind = device.kind_name.as_ref().or(device.kind.as_ref());
    format!(
        "mediated device: {}",
        kind.map_or("being removed", String::as_str)
    )
}

/// Who has it open.
pub(super) fn users(device: &MediatedDevice) -> Vec<String> {
    device.users.iter().map(ToString::to_string).collect()
}

/// Columns beside each other, the last first cut where the screen is too narrow for all, and below each line
/// who uses what it is of.
fn table(columns: &[Column], users: &[String], screen: Screen) -> String {
    let rows = columns.first().map_or(0, |column| column.cells.len());
    if rows == 0 {
        return String::new();
    }
    let mut widths: Vec<_> = columns.iter().map(Column::width).collect();
    let total: usize = widths.iter().map(|width| width + GAP).sum();
    let limit = screen.width.unwrap_or(usize::MAX);
    let mut over = total.saturating_sub(GAP).saturating_sub(limit);
    for (column, width) in columns.iter().zip(&mut widths).rev() {
        if column.can_be_cut {
            let cut = over.min(width.saturating_sub(NAME_LEAST));
            *width -= cut;
            over -= cut;
        }
    }
    let mut text = String::new();
    let titles = columns.iter().map(|column| column.title);
    line(
        &mut text,
        titles.zip(widths.iter().copied()),
        Style::BOLD,
        screen,
    );
    for row in 0..rows {
        let cells = columns.iter().map(|column| column.cells.get(row));
        let cells = cells.map(|cell| cell.map_or("", String::as_str));
        line(
            &mut text,
            cells.zip(widths.iter().copied()),
            Style::PLAIN,
            screen,
        );
        if let Some(users) = users.get(row).filter(|users| !users.is_empty()) {
            for line in fold(&format!("used by {users}"), limit.saturating_sub(INDENT)) {
                let _infallible = writeln!(text, "{:INDENT$}{line}", "");
            }
        }
    }
    text
}

fn line<'a>(
    text: &mut String,
    cells: impl Iterator<Item = (&'a str, usize)>,
    style: Style,
    screen: Screen,
) {
    let mut gap = 0;
    for (cell, width) in cells {
        let cell = shorten(cell, width);
        let room = width.saturating_sub(length(&cell)) + GAP;
        if !cell.is_empty() {
            let cell = style.paint(&cell, screen.colour);
            let _infallible = write!(text, "{:gap$}{cell}", "");
            gap = 0;
        }
        gap += room;
    }
    text.push('\n');
}

/// A block for each device.
pub(super) fn blocks<'a>(
    host: &'a Host,
    devices: &'a [&MediatedDevice],
    screen: Screen,
) -> impl Iterator<Item = String> + 'a {
    devices.iter().map(move |device| {
        let mut lines = vec![("type", kind(device))];
        lines.push(("driver", or_none(device.driver.as_deref())));
        let group = device.group.map(|group| format!("{group}, made by VFIO"));
        lines.push(("group", or_none(group.as_deref())));
        if let Some(parent) = parent(device) {
            let parent = match host
                .mediated_types()
                .iter()
                .any(|t| t.parent.name == parent)
            {
                true => parent.to_owned(),
                false => format!("{parent}, which offers no types any more"),
            };
            lines.push(("made of", parent));
        }
        lines.extend(users(device).into_iter().map(|user| ("used by", user)));
        labelled(&device.uuid.to_string(), "mediated device", lines, screen)
    })
}

fn or_none(words: Option<&str>) -> String {
    words.unwrap_or("none").to_owned()
}

fn kind(device: &MediatedDevice) -> String {
    let Some(kind) = &device.kind else {
        return "gone: the device is being removed".to_owned();
    };
    let mut words = kind.clone();
    if let Some(name) = device.kind_name.as_ref().filter(|name| *name != kind) {
        let _infallible = write!(words, " ({name})");
    }
    if let Some(api) = &device.api {
        let _infallible = write!(words, ", {api}");
    }
    words
}

/// A kind of mediated devices in words: `i915-GVTg_V5_4: 1 left, vfio-pci; …`.
pub(super) fn type_words(kind: &MediatedType) -> String {
    let mut words = format!("{}:", kind.id);
    let left = kind.available.map(|left| format!("{left} left"));
    let facts = [left, kind.api.clone()].into_iter().flatten();
    let _infallible = write!(words, " {}", facts.collect::<Vec<_>>().join(", "));
    let name = kind.name.iter().filter(|name| **name != kind.id);
    for more in name.chain(&kind.description) {
        let _infallible = write!(words, "; {more}");
    }
    words
}

/// A block for each device that offers types and is no PCI function, whose block says so itself.
pub(super) fn parents<'a>(
    types: &'a [&MediatedType],
    screen: Screen,
) -> impl Iterator<Item = String> + 'a {
    let others = types.iter().filter(|kind| kind.parent.address.is_none());
    let mut names: Vec<_> = others.map(|kind| kind.parent.name.as_str()).collect();
    names.dedup();
    names.into_iter().map(move |name| {
        let of = types.iter().filter(|kind| kind.parent.name == name);
        let lines = of.map(|kind| ("mediates", type_words(kind))).collect();
        labelled(name, "no PCI device", lines, screen)
    })
}

/// A device, as the schema in `docs/device-json.md` has it.
#[derive(Serialize)]
pub(super) struct DeviceJson<'a> {
    uuid: String,
    parent: Option<&'a str>,
    parent_address: Option<String>,
    #[serde(rename = "type")]
    kind: Option<&'a str>,
    type_name: Option<&'a str>,
    device_api: Option<&'a str>,
    driver: Option<&'a str>,
    vfio_group: Option<u32>,
    vfio_node: Option<&'a str>,
    users: Vec<UserJson<'a>>,
}

#[derive(Serialize)]
struct UserJson<'a> {
    pid: u32,
    command: &'a str,
}

/// A type, as the schema in `docs/device-json.md` has it.
#[derive(Serialize)]
pub(super) struct TypeJson<'a> {
    parent: &'a str,
    parent_address: Option<String>,
    #[serde(rename = "type")]
    id: &'a str,
    name: Option<&'a str>,
    description: Option<&'a str>,
    available_instances: Option<u32>,
    device_api: Option<&'a str>,
}

pub(super) fn device_json(device: &MediatedDevice) -> DeviceJson<'_> {
    let address = device.parent.as_ref().and_then(|parent| parent.address);
    DeviceJson {
        uuid: device.uuid.to_string(),
        parent: parent(device),
        parent_address: address.map(|address| address.to_string()),
        kind: device.kind.as_deref(),
        type_name: device.kind_name.as_deref(),
        device_api: device.api.as_deref(),
        driver: device.driver.as_deref(),
        vfio_group: device.group,
        vfio_node: device.vfio_cdev.as_deref(),
        users: device
            .users
            .iter()
            .map(|user| UserJson {
                pid: user.pid,
                command: &user.command,
            })
            .collect(),
    }
}

pub(super) fn type_json(kind: &MediatedType) -> TypeJson<'_> {
    TypeJson {
        parent: &kind.parent.name,
        parent_address: kind.parent.address.map(|address| address.to_string()),
        id: &kind.id,
        name: kind.name.as_deref(),
        description: kind.description.as_deref(),
        available_instances: kind.available,
        device_api: kind.api.as_deref(),
    }
}
