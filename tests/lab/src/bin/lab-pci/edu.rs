//! QEMU's `edu`. QEMU, docs/specs/edu.rst.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, ensure};
use busway_lab::physical_address;
use vfio_bindings::bindings::vfio::{VFIO_PCI_INTX_IRQ_INDEX, VFIO_PCI_MSI_IRQ_INDEX};

use crate::interrupts::{event, kernel_count, signals, wait};
use crate::mapped::MappedBar;
use crate::vfio::VfioDevice;

const IDENTITY: usize = 0x00;
const LIVENESS: usize = 0x04;
const FACTORIAL: usize = 0x08;
const STATUS: usize = 0x20;
const INTERRUPT_STATUS: usize = 0x24;
const INTERRUPT_RAISE: usize = 0x60;
const INTERRUPT_ACKNOWLEDGE: usize = 0x64;
const DMA_SOURCE: usize = 0x80;
const DMA_DESTINATION: usize = 0x88;
const DMA_COUNT: usize = 0x90;
const DMA_COMMAND: usize = 0x98;

/// In the status register: raise an interrupt when a factorial is done.
const STATUS_INTERRUPT: u32 = 0x80;
/// What the interrupt status says then, and after a DMA transfer.
const FACTORIAL_DONE: u32 = 0x1;
const DMA_DONE: u32 = 0x100;
/// DMA commands: start, and interrupt at the end; one way or the other.
const DMA_TO_DEVICE: u64 = 0b101;
const DMA_FROM_DEVICE: u64 = 0b111;
/// The device's buffer, as its DMA engine counts.
const BUFFER: u64 = 0x40000;
const BUFFER_SIZE: usize = 4096;

/// What a DMA engine can reach in one piece: physically contiguous, as a page is.
#[repr(C, align(4096))]
struct Page([u8; BUFFER_SIZE]);

struct Edu {
    address: String,
    // Closed first: the mapping needs the device to be enabled only while it is used.
    registers: MappedBar,
    vfio: VfioDevice,
    event: std::fs::File,
    index: u32,
    sent: u64,
    counted: u64,
}

impl Edu {
    /// Waits for the interrupt that the device was just asked for, and acknowledges it.
    fn interrupt(&mut self, expected: u32) -> Result<()> {
        self.sent += 1;
        self.counted += wait(&self.event)?;
        let status = self.registers.read32(INTERRUPT_STATUS);
        ensure!(
            status == expected,
            "interrupt status {status:#x} and not {expected:#x}"
        );
        self.registers.write32(INTERRUPT_ACKNOWLEDGE, status);
        if self.index == VFIO_PCI_INTX_IRQ_INDEX {
            self.vfio.unmask(self.index)?;
        }
        Ok(())
    }

    fn compute(&mut self) -> Result<()> {
        let mut factorial = 1_u32;
        for number in 1..=12 {
            factorial *= number;
            self.registers.write32(STATUS, STATUS_INTERRUPT);
            self.registers.write32(FACTORIAL, number);
            self.interrupt(FACTORIAL_DONE)?;
            let found = self.registers.read32(FACTORIAL);
            ensure!(found == factorial, "{number}! is {factorial}, not {found}");
        }
        Ok(())
    }

    fn transfer(&mut self, source: u64, destination: u64, command: u64) -> Result<()> {
        self.registers.write64(DMA_SOURCE, source);
        self.registers.write64(DMA_DESTINATION, destination);
        self.registers.write64(DMA_COUNT, BUFFER_SIZE as u64);
        self.registers.write64(DMA_COMMAND, command);
        self.interrupt(DMA_DONE)
    }

    /// A page to the device, and back to another place.
    fn copy(&mut self) -> Result<()> {
        let mut pages = Box::new([Page([0; BUFFER_SIZE]), Page([0; BUFFER_SIZE])]);
        for (index, byte) in pages[0].0.iter_mut().enumerate() {
            *byte = (index * 7 + index / 256) as u8;
        }
        pages[1].0.fill(0xff);
        let there = physical_address(&pages[0].0[0])?;
        let back = physical_address(&pages[1].0[0])?;
        self.transfer(there, BUFFER, DMA_TO_DEVICE)?;
        self.transfer(BUFFER, back, DMA_FROM_DEVICE)?;
        // What another writer left here, the compiler has not seen.
        let pages = black_box(pages);
        ensure!(
            pages[0].0 == pages[1].0,
            "what came back is not what was sent"
        );
        Ok(())
    }
}

pub(crate) fn run(address: &str, msi: bool, count: u64) -> Result<()> {
    let vfio = VfioDevice::open(address)?;
    let registers = MappedBar::open(address, 0)?;
    let identity = registers.read32(IDENTITY);
    ensure!(identity & 0xffff == 0x00ed, "no edu: {identity:#x}");
    registers.write32(LIVENESS, 0x1234_5678);
    let found = registers.read32(LIVENESS);
    ensure!(found == !0x1234_5678, "it answers {found:#x}");

    let event = event()?;
    let index = if msi {
        VFIO_PCI_MSI_IRQ_INDEX
    } else {
        VFIO_PCI_INTX_IRQ_INDEX
    };
    vfio.connect(index, &[event.try_clone()?])?;
    let mut edu = Edu {
        address: address.to_owned(),
        registers,
        vfio,
        event,
        index,
        sent: 0,
        counted: 0,
    };
    edu.compute()?;
    edu.copy()?;
    let started = Instant::now();
    for number in 1..=count {
        let value = (number as u32 & 0xffff) << 12 | 2;
        edu.registers.write32(INTERRUPT_RAISE, value);
        edu.interrupt(value)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    // A transfer takes a tenth of a second: what was sent twice before has come by its end.
    edu.copy()?;
    edu.counted += signals(&edu.event)?;
    println!(
        "sent={} counted={} kernel={} per_second={:.0}",
        edu.sent,
        edu.counted,
        kernel_count(&edu.address)?,
        count as f64 / seconds
    );
    Ok(())
}
