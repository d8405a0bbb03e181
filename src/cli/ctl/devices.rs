//! `ctl devices`: a VM's devices, what they are at and what they have done.

use serde_json::Value;

use super::answer::{list, number, text};
use super::columns::{Cell, Column, short, short_bytes, table};
use crate::cli::style::{Screen, Style};

/// A table of what `vm.devices` answers.
pub(super) fn show(answer: &Value, screen: Screen) -> String {
    const COLUMNS: [Column; 13] = [
        Column::words("DEVICE").cut_to(12),
        Column::words("KIND"),
        Column::words("STATE"),
        Column::words("GUEST"),
        Column::words("HOST").rank(1),
        Column::words("DRIVER").rank(4),
        Column::words("INTERRUPTS").rank(2),
        Column::number("SENT").rank(8),
        Column::number("EXITS").rank(3),
        Column::number("MAPPED").rank(5),
        Column::number("IN").rank(6),
        Column::number("OUT").rank(7),
        Column::number("ERRORS").rank(9),
    ];
    let devices = list(answer, "/devices");
    if devices.is_empty() {
        return "the VM has no device; before it is booted it has none\n".to_owned();
    }
    let rows: Vec<_> = devices.iter().map(row).collect();
    table(&COLUMNS, &rows, screen)
}

fn row(device: &Value) -> Vec<Cell> {
    let errors = number(device, "/errors").max(number(device, "/counters/errors"));
    vec![
        Cell::from(text(device, "/id")),
        text(device, "/kind").into(),
        state(device),
        text(device, "/pci_bdf").into(),
        text(device, "/host_bdf").into(),
        text(device, "/driver").into(),
        interrupts(device).into(),
        count(device, "/interrupts/sent"),
        exits(device)
            .map(|exits| short(exits as f64))
            .unwrap_or_default()
            .into(),
        bytes(device, &["/dma/bytes"]),
        bytes(device, &["/counters/read_bytes", "/counters/rx_bytes"]),
        bytes(device, &["/counters/write_bytes", "/counters/tx_bytes"]),
        match errors {
            0 => "".into(),
            errors => Cell::styled(errors.to_string(), Style::BAD),
        },
    ]
}

/// How it is, in a colour.
pub(super) fn state(device: &Value) -> Cell {
    let state = text(device, "/state");
    let style = match state.as_str() {
        "present" => Style::GOOD,
        "held" => Style::BAD,
        _ => Style::WARN,
    };
    Cell::styled(state, style)
}

/// By what it interrupts, and with how many of its vectors.
pub(super) fn interrupts(device: &Value) -> String {
    let of = |name: &str| number(device, &format!("/interrupts/{name}"));
    match text(device, "/interrupts/mode") {
        mode if mode.is_empty() || mode == "none" || mode == "pin" => mode,
        mode => format!("{mode} {}/{}", of("vectors"), of("vectors_most")),
    }
}

/// How often its accesses left the guest; none where that is not known.
pub(super) fn exits(device: &Value) -> Option<u64> {
    let exits = device.get("exits")?.as_object()?;
    Some(
        exits
            .values()
            .filter_map(Value::as_u64)
            .fold(0, u64::saturating_add),
    )
}

fn count(device: &Value, pointer: &str) -> Cell {
    let count = device.pointer(pointer).and_then(Value::as_u64);
    count
        .map(|count| short(count as f64))
        .unwrap_or_default()
        .into()
}

/// The first of these that there is.
fn bytes(device: &Value, pointers: &[&str]) -> Cell {
    let mut values = pointers
        .iter()
        .filter_map(|pointer| device.pointer(pointer)?.as_u64());
    values
        .next()
        .map(|bytes| short_bytes(bytes as f64))
        .unwrap_or_default()
        .into()
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    /// Some of each kind.
    pub(in crate::cli::ctl) fn some() -> Value {
        json!({ "devices": [
            {
                "id": "drive", "kind": "assigned", "host_bdf": "0000:01:00.0", "pci_bdf": "0000:02:00.0",
                "state": "present", "interrupts": { "mode": "msi-x", "vectors": 5, "vectors_most": 33 },
                "exits": { "config_reads": 800, "config_writes": 100, "bar_reads": 300, "bar_writes": 34 },
                "dma": { "mappings": 3, "bytes": 8_u64 << 30, "map_calls": 2, "device_map_calls": 1 },
                "direct_bytes": 16384, "reset": "flr", "errors": 0,
            },
            {
                "id": "0000:03:00.0", "kind": "assigned", "host_bdf": "0000:03:00.0", "state": "coming",
            },
            {
                "id": "root", "kind": "disk", "pci_bdf": "0000:00:01.0", "state": "present", "driver": "ready",
                "interrupts": { "mode": "msi-x", "vectors": 2, "vectors_most": 2, "sent": 1234 },
                "exits": { "config_reads": 90, "config_writes": 30, "bar_reads": 60, "bar_writes": 20 },
                "counters": { "read_bytes": 123_456_789, "write_bytes": 4096, "errors": 2 },
            },
            {
                "id": "net0", "kind": "net", "pci_bdf": "0000:00:02.0", "state": "going", "driver": "ready",
                "interrupts": { "mode": "msi-x", "vectors": 3, "vectors_most": 4, "sent": 99 },
                "exits": { "config_reads": 90, "config_writes": 30, "bar_reads": 60, "bar_writes": 20 },
                "counters": { "rx_bytes": 5_000_000, "tx_bytes": 2048 },
            },
        ] })
    }

    #[test]
    fn a_wide_terminal_has_all_and_a_narrow_one_what_says_most() {
        let wide = "\
DEVICE        KIND      STATE    GUEST         HOST          DRIVER  INTERRUPTS  SENT  EXITS  MAPPED      IN   OUT  ERRORS
drive         assigned  present  0000:02:00.0  0000:01:00.0          msi-x 5/33         1.2k    8GiB
0000:03:00.0  assigned  coming                 0000:03:00.0
root          disk      present  0000:00:01.0                ready   msi-x 2/2   1.2k    200          118MiB  4KiB       2
net0          net       going    0000:00:02.0                ready   msi-x 3/4     99    200          4.8MiB  2KiB
";
        assert_eq!(show(&some(), Some(200).into()), wide);
        let narrow = "\
DEVICE        KIND      STATE    GUEST         HOST          INTERRUPTS  EXITS
drive         assigned  present  0000:02:00.0  0000:01:00.0  msi-x 5/33   1.2k
0000:03:00.0  assigned  coming                 0000:03:00.0
root          disk      present  0000:00:01.0                msi-x 2/2     200
net0          net       going    0000:00:02.0                msi-x 3/4     200
";
        assert_eq!(show(&some(), Some(80).into()), narrow);
    }

    #[test]
    fn an_answer_of_another_form_is_no_harm_and_steers_no_terminal() {
        for answer in [
            Value::Null,
            json!({ "devices": 1 }),
            json!({ "devices": [] }),
        ] {
            assert!(show(&answer, Screen::default()).starts_with("the VM has no device"));
        }
        let odd = json!({ "devices": [1, { "id": "\u{1b}[2J", "exits": 3, "interrupts": [] }] });
        let shown = show(&odd, Screen::default());
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
    }
}
