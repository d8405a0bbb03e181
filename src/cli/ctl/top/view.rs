//! How `ctl top` is shown.

use std::time::Duration;

use super::rates::{Device, Doing, Look, Vcpu};
use crate::cli::ctl::answer::{number, text};
use crate::cli::ctl::columns::{Cell, Column, short, short_bytes, table};
use crate::cli::ctl::{devices, info};
use crate::cli::style::{Screen, Style};
use crate::cli::text::{fold, shorten};

/// One picture of a VM.
pub(super) fn show(socket: &str, now: &Look, doing: &Doing, screen: Screen) -> String {
    let mut text = head(socket, now, doing, screen);
    if !doing.vcpus.is_empty() {
        text.push('\n');
        text += &vcpus(&doing.vcpus, screen);
    }
    if !doing.devices.is_empty() {
        text.push('\n');
        text += &of_devices(&doing.devices, screen);
    }
    text
}

fn head(socket: &str, now: &Look, doing: &Doing, screen: Screen) -> String {
    let answer = &now.answer;
    let width = screen.width.unwrap_or(usize::MAX);
    let pid = number(answer, "/pid");
    let title = shorten(&format!("{socket}, process {pid}"), width);
    let state = info::state(answer);
    let style = match state.as_str() {
        "running" => Style::GOOD,
        _ => Style::WARN,
    };
    let up = Duration::from_millis(number(answer, "/uptime_ms"));
    let memory = short_bytes(number(answer, "/memory_bytes") as f64);
    let mut facts = vec![
        format!("up {}", time(up)),
        format!("{memory} of memory"),
        format!("processors {}", percent(doing.cpu)),
    ];
    if answer.get("dma").is_some() {
        let mapped = short_bytes(number(answer, "/dma/bytes") as f64);
        let mappings = number(answer, "/dma/mappings");
        facts.push(format!("{mapped} in {mappings} DMA mappings"));
        let moved = number(answer, "/vector_updates");
        facts.push(format!("vectors moved {moved} times"));
    }
    let title = Style::BOLD.paint(title, screen.colour);
    let mut text = format!("{title}\n{}", style.paint(&state, screen.colour));
    // What does not fit beside the state goes on below.
    let room = width.saturating_sub(state.chars().count() + 2).max(20);
    for (index, line) in fold(&facts.join(", "), room).into_iter().enumerate() {
        text += if index == 0 { ", " } else { "  " };
        text += &line;
        text.push('\n');
    }
    text
}

fn vcpus(vcpus: &[Vcpu], screen: Screen) -> String {
    const COLUMNS: [Column; 13] = [
        Column::words("VCPU"),
        Column::number("CPU"),
        Column::number("EXITS/S"),
        Column::number("MMIO R").rank(3),
        Column::number("MMIO W").rank(3),
        Column::number("PIO R").rank(4),
        Column::number("PIO W").rank(4),
        Column::number("OTHER").rank(5),
        Column::number("KVM EXITS").rank(1),
        Column::number("HALTS").rank(6),
        Column::number("INTERRUPTS").rank(2),
        Column::number("KVM FAULTS").rank(7),
        Column::number("HOST FAULTS").rank(8),
    ];
    let rows = vcpus.iter().map(|vcpu| {
        let exit = |kind: &str| count(vcpu.exits.get(kind).copied());
        let kvm = |name: &str| count(vcpu.kvm.get(name).copied());
        vec![
            Cell::from(vcpu.id.to_string()),
            percent(vcpu.cpu).into(),
            count(Some(vcpu.exits.values().sum())),
            exit("mmio_read"),
            exit("mmio_write"),
            exit("pio_read"),
            exit("pio_write"),
            exit("other"),
            kvm("exits"),
            kvm("halt_exits"),
            kvm("irq_injections"),
            kvm("pf_taken"),
            count(Some(vcpu.faults)),
        ]
    });
    table(&COLUMNS, &rows.collect::<Vec<_>>(), screen)
}

fn of_devices(all: &[Device], screen: Screen) -> String {
    const COLUMNS: [Column; 12] = [
        Column::words("DEVICE").cut_to(12),
        Column::words("KIND").rank(6),
        Column::words("STATE"),
        Column::words("INTERRUPTS").rank(4),
        Column::number("IRQ/S").rank(3),
        Column::number("EXITS/S"),
        Column::number("MAPPED").rank(5),
        Column::number("CPU").rank(7),
        Column::number("IN/S"),
        Column::number("OUT/S"),
        Column::number("IN OPS").rank(1),
        Column::number("OUT OPS").rank(2),
    ];
    let rows = all.iter().map(|device| {
        let shown = &device.shown;
        let first = |names: [&str; 2]| {
            let mut rates = names.iter().filter_map(|name| device.counters.get(*name));
            rates.next().copied()
        };
        let bytes = |names| first(names).map(short_bytes).unwrap_or_default();
        let mapped = shown.pointer("/dma/bytes").and_then(|bytes| bytes.as_u64());
        vec![
            Cell::from(text(shown, "/id")),
            text(shown, "/kind").into(),
            devices::state(shown),
            devices::interrupts(shown).into(),
            count(device.interrupts),
            count(shown.get("exits").map(|_| device.exits)),
            mapped
                .map(|bytes| short_bytes(bytes as f64))
                .unwrap_or_default()
                .into(),
            device.cpu.map(percent).unwrap_or_default().into(),
            bytes(["read_bytes", "rx_bytes"]).into(),
            bytes(["write_bytes", "tx_bytes"]).into(),
            count(first(["read_ops", "rx_frames"])),
            count(first(["write_ops", "tx_frames"])),
        ]
    });
    table(&COLUMNS, &rows.collect::<Vec<_>>(), screen)
}

/// What is counted and does not move is there, and dim.
fn count(rate: Option<f64>) -> Cell {
    match rate {
        None => "".into(),
        Some(rate) => {
            let said = short(rate);
            let style = if said == "0" {
                Style::DIM
            } else {
                Style::PLAIN
            };
            Cell::styled(said, style)
        }
    }
}

fn percent(part: f64) -> String {
    format!("{:.0}%", part * 100.0)
}

/// `17s`, `2:05`, `1:02:03`, `3d 1:02:03`.
fn time(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, seconds) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}:{seconds:02}"),
        (0, ..) => format!("{hours}:{minutes:02}:{seconds:02}"),
        _ => format!("{days}d {hours}:{minutes:02}:{seconds:02}"),
    }
}
