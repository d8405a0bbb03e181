//! The guest's two ways to configuration space: memory (ECAM) and the ports CF8 and CFC.
//!
//! Both only find out who is meant and hand on to the [`Topology`].

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::address::Bdf;
use crate::spec;
use crate::topology::Topology;

/// Configuration space as memory: 4 KiB for each function of 256 buses. PCIe 6.0 §7.2.2.
#[derive(Clone, Debug)]
pub struct Ecam {
    topology: Arc<Topology>,
}

impl Ecam {
    /// The configuration space of `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>) -> Self {
        Self { topology }
    }

    /// Reads `offset` bytes from the start of bus 0; all ones where nothing answers.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(u8::MAX);
        let mut rest = data;
        for (bdf, register, width) in by_function(offset, rest.len()) {
            let (part, after) = rest.split_at_mut(width);
            self.topology.config_read(bdf, register, part);
            rest = after;
        }
    }

    /// Writes `offset` bytes from the start of bus 0; dropped where nothing answers.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut rest = data;
        for (bdf, register, width) in by_function(offset, data.len()) {
            let (part, after) = rest.split_at(width);
            self.topology.config_write(bdf, register, part);
            rest = after;
        }
    }
}

/// Cuts an access at the end of each function's configuration space, and off at the end of ECAM.
fn by_function(offset: u64, width: usize) -> impl Iterator<Item = (Bdf, u16, usize)> {
    let function_size = u64::from(spec::CONFIG_SPACE_SIZE);
    let end = offset.saturating_add(width as u64).min(spec::ECAM_SIZE);
    let mut at = offset;
    std::iter::from_fn(move || {
        let part = at;
        if part >= end {
            return None;
        }
        at = (part + 1).next_multiple_of(function_size).min(end);
        let bdf = Bdf::from_routing_id((part / function_size) as u16);
        Some((bdf, (part % function_size) as u16, (at - part) as usize))
    })
}

/// Configuration space through I/O ports: an address at CF8, then data at CFC. It reaches the first
/// 256 bytes of each function. PCI Local Bus Specification 3.0 §3.2.2.3.2.
#[derive(Debug)]
pub struct Cf8Cfc {
    topology: Arc<Topology>,
    address: AtomicU32,
}

impl Cf8Cfc {
    /// How many ports there are from 0xCF8 on.
    pub const PORTS: u64 = 8;

    /// The bits of the address register that there are.
    const ADDRESS_BITS: u32 = 0x80ff_fffc;

    /// The configuration space of `topology`.
    #[must_use]
    pub fn new(topology: Arc<Topology>) -> Self {
        Self {
            topology,
            address: AtomicU32::new(0),
        }
    }

    /// Reads `port` ports above 0xCF8. The address register answers accesses of its whole width
    /// only; narrower ones (such as to the reset register at 0xCF9) read all ones here.
    pub fn read(&self, port: u64, data: &mut [u8]) {
        let address = self.address.load(Ordering::Relaxed);
        if port == 0 && data.len() == 4 {
            data.copy_from_slice(&address.to_le_bytes());
            return;
        }
        match target(address, port, data.len()) {
            Some((bdf, register)) => self.topology.config_read(bdf, register, data),
            None => data.fill(u8::MAX),
        }
    }

    /// Writes `port` ports above 0xCF8. The address register takes accesses of its whole width only.
    pub fn write(&self, port: u64, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (port, data) {
            let address = u32::from_le_bytes([a, b, c, d]) & Self::ADDRESS_BITS;
            self.address.store(address, Ordering::Relaxed);
            return;
        }
        let address = self.address.load(Ordering::Relaxed);
        if let Some((bdf, register)) = target(address, port, data.len()) {
            self.topology.config_write(bdf, register, data);
        }
    }

    /// Puts the address register to zero, as at reset.
    pub fn reset(&self) {
        self.address.store(0, Ordering::Relaxed);
    }
}

/// Which register an access to the data ports means, where it is within them and they are enabled.
fn target(address: u32, port: u64, width: usize) -> Option<(Bdf, u16)> {
    let byte = port.checked_sub(4).filter(|&byte| byte < 4)?;
    let fits = byte + width as u64 <= 4;
    if !fits || address & spec::CONFIG_ADDRESS_ENABLE == 0 {
        return None;
    }
    let bdf = Bdf::from_routing_id((address >> 8) as u16);
    Some((bdf, (address & 0xfc) as u16 + byte as u16))
}
