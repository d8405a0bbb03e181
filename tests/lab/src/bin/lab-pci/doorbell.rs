//! `ivshmem-doorbell`, ringing itself. QEMU, docs/specs/ivshmem-spec.rst.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use vfio_bindings::bindings::vfio::VFIO_PCI_MSIX_IRQ_INDEX;

use crate::interrupts::{event, kernel_count, signals, wait};
use crate::mapped::MappedBar;
use crate::vfio::VfioDevice;

/// Who the device is among its peers, and where it rings one of them.
const POSITION: usize = 0x08;
const DOORBELL: usize = 0x0c;
/// Where QEMU puts the table, and within that BAR the pending bits (`msix_init_exclusive_bar`).
const TABLE_BAR: u8 = 1;
const PENDING_BITS: usize = 0x800;
/// PCIe 6.0 §7.7.2.5 to .8: an entry, its vector control, and the mask bit there.
const ENTRY: usize = 16;
const VECTOR_CONTROL: usize = 12;
const MASKED: u32 = 1;

/// The device with all its vectors connected.
struct Doorbell {
    registers: MappedBar,
    own: u32,
    events: Vec<File>,
    // Closed last.
    _vfio: VfioDevice,
}

impl Doorbell {
    fn open(address: &str) -> Result<Self> {
        let vectors = msix_vectors(address)?;
        let vfio = VfioDevice::open(address)?;
        let registers = MappedBar::open(address, 0)?;
        let events: Vec<_> = (0..vectors).map(|_| event()).collect::<Result<_>>()?;
        vfio.connect(VFIO_PCI_MSIX_IRQ_INDEX, &events)?;
        Ok(Self {
            own: registers.read32(POSITION),
            registers,
            events,
            _vfio: vfio,
        })
    }

    fn ring(&self, vector: u32) {
        self.registers.write32(DOORBELL, self.own << 16 | vector);
    }

    fn vectors(&self) -> impl Iterator<Item = (u32, &File)> {
        (0..).zip(&self.events)
    }

    /// Takes what came after it was last waited for, and says what came of it all.
    fn report(&self, address: &str, sent: u64, mut counted: u64, seconds: f64) -> Result<()> {
        for event in &self.events {
            counted += signals(event)?;
        }
        println!(
            "vectors={} sent={sent} counted={counted} kernel={} per_second={:.0}",
            self.events.len(),
            kernel_count(address)?,
            sent as f64 / seconds
        );
        Ok(())
    }
}

pub(crate) fn run(address: &str, count: u64) -> Result<()> {
    let bell = Doorbell::open(address)?;
    let (mut sent, mut counted) = (0_u64, 0_u64);
    let started = Instant::now();
    for round in 0..count {
        for (vector, event) in bell.vectors() {
            bell.ring(vector);
            sent += 1;
            counted += wait(event).with_context(|| format!("vector {vector}, round {round}"))?;
        }
    }
    bell.report(address, sent, counted, started.elapsed().as_secs_f64())
}

/// Each vector is masked in the table, rung, found among the pending bits with no other, and unmasked.
pub(crate) fn pending(address: &str, count: u64) -> Result<()> {
    let bell = Doorbell::open(address)?;
    let table = MappedBar::open(address, u64::from(TABLE_BAR))?;
    let bits = || table.read32(PENDING_BITS);
    let (mut sent, mut counted) = (0_u64, 0_u64);
    let started = Instant::now();
    for round in 0..count {
        for (vector, event) in bell.vectors() {
            let control = vector as usize * ENTRY + VECTOR_CONTROL;
            ensure!(bits() == 0, "pending before: {:#x}", bits());
            table.write32(control, MASKED);
            bell.ring(vector);
            sent += 1;
            // The device signals by way of a thread of its own.
            let deadline = Instant::now() + Duration::from_secs(20);
            while bits() == 0 {
                ensure!(
                    Instant::now() < deadline,
                    "vector {vector}, round {round}: rung while masked, and not pending"
                );
            }
            ensure!(bits() == 1 << vector, "pending: {:#x}", bits());
            ensure!(signals(event)? == 0, "vector {vector} came while masked");
            table.write32(control, 0);
            counted += wait(event).with_context(|| format!("vector {vector}, round {round}"))?;
        }
    }
    ensure!(bits() == 0, "pending at the end: {:#x}", bits());
    bell.report(address, sent, counted, started.elapsed().as_secs_f64())
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
