//! What a made-up device decodes, and its configuration space.

use super::line::{Line, size};

/// The attribute `resource` of `bars=16K,-,256M/64p,128/io` (`-` is an absent one; `64`: a 64-bit one, which takes
/// two places; `p`: prefetchable) and `rom=512K`. Flags as in linux/ioport.h.
pub(super) fn resource(line: &Line) -> String {
    const IO: u64 = 0x0004_0101;
    const MEMORY: u64 = 0x0004_0200;
    const PREFETCH: u64 = 0x0000_2008;
    const WIDE: u64 = 0x0010_0004;
    const ROM: u64 = 0x0004_e200;
    let mut rows = Vec::new();
    let mut next = 0x6_0000_0000_u64;
    let mut row = |size: u64, flags: u64, rows: &mut Vec<String>| {
        let start = next.next_multiple_of(size);
        next = start + size;
        rows.push(format!(
            "{start:#018x} {:#018x} {flags:#018x}",
            start + size - 1
        ));
    };
    let none = format!("{:#018x} {:#018x} {:#018x}", 0, 0, 0);
    for bar in line.get("bars").unwrap_or_default().split(',') {
        let (text, kind) = bar.split_once('/').unwrap_or((bar, ""));
        if matches!(text, "" | "-") {
            rows.push(none.clone());
            continue;
        }
        let mut flags = if kind == "io" { IO } else { MEMORY };
        if kind.contains('p') {
            flags |= PREFETCH;
        }
        if kind.starts_with("64") {
            flags |= WIDE;
        }
        row(size(text), flags, &mut rows);
        if kind.starts_with("64") {
            rows.push(none.clone());
        }
    }
    rows.truncate(6);
    rows.resize(6, none.clone());
    match line.get("rom") {
        Some(rom) => row(size(&rom), ROM, &mut rows),
        None => rows.push(none.clone()),
    }
    rows.join("\n")
}

/// The configuration space of a port whose ACS is `none`, `off` or `on` (PCIe 6.0 §7.7.11).
pub(super) fn config_with_acs(acs: &str) -> Vec<u8> {
    let mut config = vec![0; 4096];
    config[0x06] = 0x10;
    config[0x34] = 0x40;
    // A PCI Express capability, version 2, of a root port.
    config[0x40..0x44].copy_from_slice(&[0x10, 0x00, 0x42, 0x01]);
    let next = match acs {
        "none" => 0,
        _ => 0x140_u32,
    };
    // Advanced error reporting, and behind it access control services.
    config[0x100..0x104].copy_from_slice(&(next << 20 | 0x2_0001).to_le_bytes());
    if next != 0 {
        config[0x140..0x144].copy_from_slice(&0x1_000d_u32.to_le_bytes());
        config[0x144..0x146].copy_from_slice(&0x001d_u16.to_le_bytes());
        let control: u16 = if acs == "on" { 0x1d } else { 0 };
        config[0x146..0x148].copy_from_slice(&control.to_le_bytes());
    }
    config
}
