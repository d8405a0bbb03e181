//! `ctl info`: a table of what a VM is made of.

use serde_json::Value;

use super::answer::{list, number, text};
use crate::cli::style::{Screen, Style};
use crate::cli::text::fold;

/// A line of the table: what it is of, and what it says.
type Row = (&'static str, String);

/// What a VM is made of, as a table.
pub(super) fn show(info: &Value, screen: Screen) -> String {
    table(&rows(info), screen)
}

fn rows(info: &Value) -> Vec<Row> {
    let mut rows = vec![("state", state(info)), ("memory", memory(info))];
    for zone in list(info, "/config/memory/zones") {
        rows.push(("zone", zone_of(zone)));
    }
    let processors = number(info, "/config/cpus/boot_vcpus");
    rows.push(("processors", processors.to_string()));
    for part in ["kernel", "initramfs", "cmdline"] {
        let said = text(info, &format!("/config/payload/{part}"));
        if !said.is_empty() {
            rows.push((part, said));
        }
    }
    for part in ["serial", "console"] {
        let console = &info["config"][part];
        let words = [
            text(console, "/mode").to_lowercase(),
            text(console, "/file"),
        ];
        rows.push((
            part,
            joined(words.into_iter().chain([text(console, "/socket")])),
        ));
    }
    for disk in list(info, "/config/disks") {
        let readonly = disk["readonly"] == true;
        let (id, place) = (text(disk, "/id"), in_guest(info, disk));
        let notes = [
            text(disk, "/path"),
            named(id),
            note("read-only", readonly),
            place,
        ];
        rows.push(("disk", joined(notes)));
    }
    for nic in list(info, "/config/net") {
        let tap = match text(nic, "/tap") {
            tap if tap.is_empty() => "a new tap".to_owned(),
            tap => tap,
        };
        rows.push((
            "nic",
            joined([
                tap,
                text(nic, "/mac"),
                named(text(nic, "/id")),
                in_guest(info, nic),
            ]),
        ));
    }
    rows.extend(devices(info));
    if let Some(slots @ 1..) = info["empty_slots"].as_u64() {
        rows.push(("slots", format!("{slots} empty")));
    }
    rows
}

/// What it is doing, in words.
pub(super) fn state(info: &Value) -> String {
    match text(info, "/state") {
        _ if info["held"] == true => "held: a device had an error (on_error=pause)".to_owned(),
        created if created == "Created" => "not booted, or being put together".to_owned(),
        state => state.to_lowercase(),
    }
}

/// Bytes of RAM that it has, or is to have.
pub(super) fn memory_bytes(info: &Value) -> u64 {
    number(info, "/memory_actual_size")
}

fn memory(info: &Value) -> String {
    format!("{} MiB", memory_bytes(info) >> 20)
}

/// A memory zone: its name, what the guest has of it, what it is to have where that is another amount, and the host's node.
fn zone_of(zone: &Value) -> String {
    let (size, plugged) = (number(zone, "/size"), number(zone, "/hotplugged_size"));
    let wanted = size.saturating_add(plugged);
    let now = zone["actual_size"].as_u64().unwrap_or(wanted);
    let node = zone["host_numa_node"].as_u64();
    joined([
        text(zone, "/id"),
        format!("{} MiB", now >> 20),
        note(&format!("to be {} MiB", wanted >> 20), now != wanted),
        node.map_or(String::new(), |node| {
            format!("of the host's NUMA node {node}")
        }),
    ])
}

/// Where the guest has a virtio device, if it has it yet.
fn in_guest(info: &Value, device: &Value) -> String {
    let id = device["id"].as_str().unwrap_or_default();
    let node = info["device_tree"].get(id);
    match node.map(|node| text(node, "/pci_bdf")) {
        Some(address) if !address.is_empty() => format!("in the guest {address}"),
        _ => String::new(),
    }
}

/// The host's devices that the guest has; before it has any, those that it is to have.
fn devices(info: &Value) -> Vec<Row> {
    let there = info["device_tree"].as_object().into_iter().flatten();
    let there: Vec<Row> = there
        .filter(|(_, node)| node.get("host_bdf").is_some())
        .map(|(id, node)| {
            let (host, guest) = (text(node, "/host_bdf"), text(node, "/pci_bdf"));
            let name = if *id == host {
                String::new()
            } else {
                named(id.clone())
            };
            (
                "device",
                joined([host, name, format!("in the guest {guest}")]),
            )
        })
        .collect();
    if !there.is_empty() || info["state"] != "Created" {
        return there;
    }
    let wanted = list(info, "/config/devices").iter().map(|device| {
        let path = text(device, "/path");
        let address = path.trim_end_matches('/').rsplit('/').next();
        let address = address.unwrap_or_default().to_owned();
        ("device", joined([address, named(text(device, "/id"))]))
    });
    wanted.collect()
}

/// The words that are there, with commas.
fn joined(words: impl IntoIterator<Item = String>) -> String {
    let words = words.into_iter().filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join(", ")
}

fn note(word: &str, applies: bool) -> String {
    if applies {
        word.to_owned()
    } else {
        String::new()
    }
}

fn named(id: String) -> String {
    if id.is_empty() {
        id
    } else {
        format!("id {id}")
    }
}

/// The names of rows in a column, what they say beside it, in as many lines as the screen needs.
fn table(rows: &[Row], screen: Screen) -> String {
    let widest = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let indent = widest.saturating_add(2);
    let width = screen.width.unwrap_or(usize::MAX).saturating_sub(indent);
    let mut table = String::new();
    for (name, said) in rows {
        let style = match (*name, said.as_str()) {
            ("state", "running") => Style::GOOD,
            ("state", _) => Style::WARN,
            _ => Style::PLAIN,
        };
        for (index, line) in fold(said, width).into_iter().enumerate() {
            let name = if index == 0 { name } else { "" };
            let line = style.paint(line, screen.colour);
            table += &format!("{name:indent$}{line}\n");
        }
    }
    table
}
