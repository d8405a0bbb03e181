//! Drives PCI devices from user space, in a guest: those of the zoo that Linux has no driver for.
//!
//!     lab-pci edu ADDRESS msi|intx COUNT
//!     lab-pci doorbell ADDRESS COUNT
//!     lab-pci pending ADDRESS COUNT
//!     lab-pci memory ADDRESS BAR SEED
//!
//! `edu` has the device compute factorials, copies memory in and out of it by its DMA engine, and has
//! it send COUNT interrupts, each after the last one has come: a lost one ends the program, a doubled
//! one shows in the sum. `doorbell` does the same with every vector of an `ivshmem-doorbell` that is
//! its own peer. `pending` rings it while the vector is masked, looks for the pending bit, and has the
//! mask go. `memory` writes a pattern over the whole of a memory BAR and reads it back.
//!
//! Each prints one line of `key=value` words. Interrupts come by VFIO without an IOMMU, which is all
//! that a guest without a virtual one has.

mod doorbell;
mod edu;
mod interrupts;
mod mapped;
mod vfio;

use std::time::Instant;

use anyhow::{Context, Result, bail};
use busway_lab::pattern;

use crate::mapped::MappedBar;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["edu", address, kind @ ("msi" | "intx"), count] => {
            edu::run(address, kind == "msi", number(count)?)
        }
        ["doorbell", address, count] => doorbell::run(address, number(count)?),
        ["pending", address, count] => doorbell::pending(address, number(count)?),
        ["memory", address, bar, seed] => memory(address, number(bar)?, number(seed)?),
        _ => bail!(
            "usage: lab-pci edu ADDRESS msi|intx COUNT | doorbell ADDRESS COUNT | pending ADDRESS COUNT \
             | memory ADDRESS BAR SEED"
        ),
    }
}

fn number(word: &str) -> Result<u64> {
    word.parse().with_context(|| format!("{word} is no number"))
}

/// The pattern over the whole BAR, then the same read back, in two passes so that a write that went
/// elsewhere in the BAR is found.
fn memory(address: &str, bar: u64, seed: u64) -> Result<()> {
    const CHUNK: usize = 64 << 10;
    let bar = MappedBar::open(address, bar)?;
    let mut chunk = vec![0; CHUNK.min(bar.size())];
    let started = Instant::now();
    for offset in (0..bar.size()).step_by(chunk.len()) {
        pattern::fill(&mut chunk, offset as u64, seed);
        bar.write_bytes(offset, &chunk)?;
    }
    for offset in (0..bar.size()).step_by(chunk.len()) {
        bar.read_bytes(offset, &mut chunk)?;
        pattern::check(&chunk, offset as u64, seed)?;
    }
    let rate = 2.0 * bar.size() as f64 / 1e6 / started.elapsed().as_secs_f64();
    println!("bytes={} mb_per_second={rate:.1}", bar.size());
    Ok(())
}
