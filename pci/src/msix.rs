//! MSI-X: a function's table of messages, the pending bits, and when a vector costs a route.
//!
//! A vector is connected to the guest when MSI-X is enabled and the vector is unmasked for the first
//! time; from then on masking holds the route back and takes nothing down. The other vectors never
//! notice. Where the table lies in a BAR is the function's business.

use std::sync::Arc;

use crate::connection::{Connection, VectorComplaints, VectorError};
use crate::interrupt::{InterruptRoutes, MsiMessage, VectorOwner};
use crate::spec;

/// Where the table or the PBA lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLocation {
    /// Which BAR, 0 to 5.
    pub bar: u8,
    /// Bytes from the BAR's start; a multiple of eight.
    pub offset: u32,
}

impl MsixLocation {
    /// The register of the capability that says it. PCIe 6.0 §7.7.2.3.
    #[must_use]
    pub fn register(self) -> u32 {
        (self.offset & !spec::MSIX_BIR) | (u32::from(self.bar) & spec::MSIX_BIR)
    }

    /// What the register of a capability says.
    #[must_use]
    pub fn from_register(register: u32) -> Self {
        Self {
            bar: (register & spec::MSIX_BIR) as u8,
            offset: register & !spec::MSIX_BIR,
        }
    }
}

/// One entry of the table, its pending bit, and its way to the guest.
#[derive(Debug)]
struct Vector {
    message: MsiMessage,
    control: u32,
    /// Triggered while there was no connection to hold it back.
    pending: bool,
    connection: Option<Connection>,
}

impl Vector {
    fn at_reset() -> Self {
        Self {
            message: MsiMessage::default(),
            control: spec::MSIX_VECTOR_MASK,
            pending: false,
            connection: None,
        }
    }

    fn masked(&self) -> bool {
        self.control & spec::MSIX_VECTOR_MASK != 0
    }

    fn dword(&self, number: u64) -> u32 {
        match number {
            0 => self.message.address as u32,
            1 => (self.message.address >> 32) as u32,
            2 => self.message.data,
            _ => self.control,
        }
    }

    fn set_dword(&mut self, number: u64, value: u32) {
        let address = self.message.address;
        match number {
            0 => {
                self.message.address = (address & !u64::from(u32::MAX)) | u64::from(value & !3);
            }
            1 => {
                self.message.address = (address & u64::from(u32::MAX)) | u64::from(value) << 32;
            }
            2 => self.message.data = value,
            _ => self.control = value & spec::MSIX_VECTOR_MASK,
        }
    }

    fn pending(&self) -> bool {
        self.pending || self.connection.as_ref().is_some_and(Connection::pending)
    }
}

/// The MSI-X state of a function. PCIe 6.0 §7.7.2 and §6.1.4.
///
/// It belongs to the function that has it and is locked with it.
#[derive(Debug)]
pub struct Msix {
    routes: Arc<dyn InterruptRoutes>,
    vectors: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
    complaints: VectorComplaints,
}

impl Msix {
    /// MSI-X with a table of `vectors` entries, taken into 1..=2048, all masked.
    #[must_use]
    pub fn new(vectors: u16, routes: Arc<dyn InterruptRoutes>) -> Self {
        let count = vectors.clamp(1, spec::MSIX_MAX_VECTORS);
        Self {
            routes,
            vectors: (0..count).map(|_| Vector::at_reset()).collect(),
            enabled: false,
            function_masked: false,
            complaints: VectorComplaints::of("a function"),
        }
    }

    /// Says whose it is, for the log.
    #[must_use]
    pub fn named(mut self, name: impl Into<Box<str>>) -> Self {
        self.complaints = VectorComplaints::of(name);
        self
    }

    /// How many vectors the table has.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.vectors.len() as u16
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_size(&self) -> u64 {
        self.vectors.len() as u64 * spec::MSIX_ENTRY_SIZE
    }

    /// Bytes of the PBA: a bit for each vector, in quadwords.
    #[must_use]
    pub fn pba_size(&self) -> u64 {
        self.vectors.len().div_ceil(64) as u64 * 8
    }

    /// The capability's body, for [`ConfigSpace::add_capability`](crate::ConfigSpace::add_capability)
    /// with [`CAPABILITY_WRITABLE`](Self::CAPABILITY_WRITABLE).
    #[must_use]
    pub fn capability_body(&self, table: MsixLocation, pba: MsixLocation) -> [u8; 10] {
        let mut body = [0; 10];
        let (control, rest) = body.split_at_mut(2);
        let (table_register, pba_register) = rest.split_at_mut(4);
        control.copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        table_register.copy_from_slice(&table.register().to_le_bytes());
        pba_register.copy_from_slice(&pba.register().to_le_bytes());
        body
    }

    /// The bits of the capability's body that the guest can change: enable and function mask.
    pub const CAPABILITY_WRITABLE: [u8; 2] =
        (spec::MSIX_CONTROL_ENABLE | spec::MSIX_CONTROL_MASK).to_le_bytes();

    /// The message control register.
    #[must_use]
    pub fn control(&self) -> u16 {
        let bit = |set, bit| if set { bit } else { 0 };
        (self.vectors() - 1)
            | bit(self.enabled, spec::MSIX_CONTROL_ENABLE)
            | bit(self.function_masked, spec::MSIX_CONTROL_MASK)
    }

    /// The guest wrote the message control register; all but its two writable bits is ignored.
    pub fn write_control(&mut self, control: u16, owner: &mut dyn VectorOwner) {
        let enable = control & spec::MSIX_CONTROL_ENABLE != 0;
        let mask = control & spec::MSIX_CONTROL_MASK != 0;
        let changed = (enable, mask) != (self.enabled, self.function_masked);
        let was_enabled = std::mem::replace(&mut self.enabled, enable);
        self.function_masked = mask;
        if was_enabled && !enable {
            self.disconnect(owner);
        } else if changed && enable {
            if !was_enabled && let Err(error) = owner.enable() {
                self.complaints.make("MSI-X", &VectorError::Device(error));
            }
            for vector in 0..self.vectors() {
                self.settle(vector, owner);
            }
        }
    }

    /// Reads the table, `offset` bytes from its start; all ones beyond its end.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let dword = self
                .vector_at(at)
                .map_or(u32::MAX, |vector| vector.dword(at % 16 / 4));
            *byte = dword.to_le_bytes()[(at % 4) as usize];
        }
    }

    /// Writes the table, `offset` bytes from its start.
    ///
    /// Accesses are aligned doublewords or quadwords; the specification leaves others undefined, and
    /// here they do nothing. A quadword is one change, so that a message and its unmasking in one
    /// write connect the vector with that message.
    pub fn table_write(&mut self, offset: u64, data: &[u8], owner: &mut dyn VectorOwner) {
        if !offset.is_multiple_of(4) || !data.len().is_multiple_of(4) {
            return;
        }
        let mut touched = None;
        for (at, bytes) in (offset..=u64::MAX).step_by(4).zip(data.chunks_exact(4)) {
            let number = at / spec::MSIX_ENTRY_SIZE;
            let vector = usize::try_from(number).ok();
            let Some(vector) = vector.and_then(|number| self.vectors.get_mut(number)) else {
                break;
            };
            let mut value = [0; 4];
            value.copy_from_slice(bytes);
            vector.set_dword(at % 16 / 4, u32::from_le_bytes(value));
            let number = number as u16;
            if let Some(done) = touched.replace(number).filter(|&done| done != number) {
                self.settle(done, owner);
            }
        }
        if let Some(last) = touched {
            self.settle(last, owner);
        }
    }

    /// Reads the PBA, `offset` bytes from its start; zeros beyond its end. A bit is set while an
    /// interrupt is held back by a mask: here, not in the source.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            let vectors = first.and_then(|first| self.vectors.get(first..));
            *byte = (0..8)
                .zip(vectors.unwrap_or_default())
                .filter(|(_, vector)| vector.pending())
                .fold(0, |byte, (bit, _)| byte | 1 << bit);
        }
    }

    /// Adds to what [`pba_read`](Self::pba_read) gave the bits of the source's own PBA, read at the
    /// same offset: those of vectors that are not connected, for the source has them masked.
    pub fn pba_add(&self, offset: u64, data: &mut [u8], source: &[u8]) {
        if !self.enabled {
            return;
        }
        for ((at, byte), source) in (offset..=u64::MAX).zip(data).zip(source) {
            let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
            let vectors = first.and_then(|first| self.vectors.get(first..));
            *byte |= (0..8)
                .zip(vectors.unwrap_or_default())
                .filter(|(_, vector)| vector.connection.is_none())
                .fold(0, |mask, (bit, _)| mask | 1 << bit)
                & source;
        }
    }

    /// Interrupts the guest, as a device in this process does. While the vector is masked the
    /// interrupt is kept, as one, and shows in the PBA. Nothing happens while MSI-X is disabled, or
    /// where there is no such vector.
    pub fn trigger(&mut self, vector: u16) {
        if !self.enabled {
            return;
        }
        let Some(vector) = self.vectors.get_mut(usize::from(vector)) else {
            return;
        };
        match &vector.connection {
            Some(connection) => connection.trigger(),
            None => vector.pending = true,
        }
    }

    /// Whether the guest enabled MSI-X.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// How many vectors have a route to the guest now.
    #[must_use]
    pub fn connected(&self) -> usize {
        let connected = |vector: &&Vector| vector.connection.is_some();
        self.vectors.iter().filter(connected).count()
    }

    /// Goes to the state at reset: disabled, every vector masked, nothing pending.
    pub fn reset(&mut self, owner: &mut dyn VectorOwner) {
        if self.enabled {
            self.disconnect(owner);
        }
        self.enabled = false;
        self.function_masked = false;
        for vector in &mut self.vectors {
            *vector = Vector::at_reset();
        }
    }

    fn vector_at(&self, offset: u64) -> Option<&Vector> {
        let number = usize::try_from(offset / spec::MSIX_ENTRY_SIZE).ok()?;
        self.vectors.get(number)
    }

    /// The source stops signalling first; only then do the eventfds close.
    fn disconnect(&mut self, owner: &mut dyn VectorOwner) {
        owner.disconnect_all();
        for vector in &mut self.vectors {
            vector.connection = None;
            vector.pending = false;
        }
    }

    /// Brings a vector's connection in line with its entry and the control register.
    fn settle(&mut self, number: u16, owner: &mut dyn VectorOwner) {
        let (enabled, function_masked) = (self.enabled, self.function_masked);
        let Some(vector) = self.vectors.get_mut(usize::from(number)) else {
            return;
        };
        if !enabled {
            return;
        }
        let masked = function_masked || vector.masked();
        let failure = match (&mut vector.connection, masked) {
            (None, true) => None,
            (None, false) => connect(vector, number, &*self.routes, owner).err(),
            (Some(connection), true) => connection.mask(true).err(),
            (Some(connection), false) => connection
                .retarget(vector.message)
                .and_then(|()| connection.mask(false))
                .err(),
        };
        if let Some(error) = failure {
            if matches!(error, VectorError::Device(_)) && owner.has_lost_all() {
                for vector in &mut self.vectors {
                    vector.connection = None;
                }
            }
            self.complaints
                .make(&format!("MSI-X vector {number}"), &error);
        }
    }
}

/// Gives `vector` its route, tells the source, and sends what was pending.
fn connect(
    vector: &mut Vector,
    number: u16,
    routes: &dyn InterruptRoutes,
    owner: &mut dyn VectorOwner,
) -> Result<(), VectorError> {
    let connection = Connection::new(routes, vector.message)?;
    owner
        .connect(number, &[connection.event()])
        .map_err(VectorError::Device)?;
    if std::mem::take(&mut vector.pending) {
        connection.trigger();
    }
    vector.connection = Some(connection);
    Ok(())
}

#[cfg(test)]
mod tests;
