//! `ivshmem-doorbell`, ringing itself. QEMU, docs/specs/ivshmem-spec.rst.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::VFIO_PCI_MSIX_IRQ_INDEX;

use crate::interrupts::{event, kernel_count, signals, wait};
use crate::mapped::MappedBar;
use crate::vfio::VfioDevice;

/// Who the device is among its peers, and where it rings one of them.
const POSITION: usize = 0x08;
const DOORBELL: usize = 0x0c;

pub(crate) fn run(address: &str, count: u64) -> Result<()> {
    let vectors = msix_vectors(address)?;
    let vfio = VfioDevice::open(address)?;
    let registers = MappedBar::open(address, 0)?;
    let own = registers.read32(POSITION);
    let events: Vec<_> = (0..vectors).map(|_| event()).collect::<Result<_>>()?;
    vfio.connect(VFIO_PCI_MSIX_IRQ_INDEX, &events)?;
    let (mut sent, mut counted) = (0_u64, 0_u64);
    let started = Instant::now();
    for round in 0..count {
        for (vector, event) in (0_u32..).zip(&events) {
            registers.write32(DOORBELL, own << 16 | vector);
            sent += 1;
            counted += wait(event).with_context(|| format!("vector {vector}, round {round}"))?;
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    for event in &events {
        counted += signals(event)?;
    }
    println!(
        "vectors={vectors} sent={sent} counted={counted} kernel={} per_second={:.0}",
        kernel_count(address)?,
        sent as f64 / seconds
    );
    Ok(())
}

/// How many vectors the device's MSI-X capability has. PCIe 6.0 §7.7.2.2
fn msix_vectors(address: &str) -> Result<u32> {
    let path = format!("/sys/bus/pci/devices/{address}/config");
    let config = fs::read(&path).with_context(|| format!("reading {path}"))?;
    let byte = |at: usize| config.get(at).copied().unwrap_or(0);
    let mut at = usize::from(byte(0x34));
    for _ in 0..48 {
        if byte(at) == 0x11 {
            let control = u16::from_le_bytes([byte(at + 2), byte(at + 3)]);
            return Ok(u32::from(control & 0x7ff) + 1);
        }
        at = usize::from(byte(at + 1));
        ensure!(at != 0, "{address} has no MSI-X");
    }
    anyhow::bail!("{address}: its capability list does not end")
}
