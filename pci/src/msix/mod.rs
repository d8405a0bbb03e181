//! MSI-X: a function's table of messages, the pending bits, and when a vector costs a route.
//!
//! A vector is connected to the guest when MSI-X is enabled and the vector is unmasked for the first
//! time; from then on masking holds the route back and takes nothing down. The other vectors never
//! notice. Where the table lies in a BAR is the function's business.
//!
//! What the table holds is [`MsixState`], plain and without descriptors; the connections stand beside it
//! and follow from it.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

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

/// The version of [`MsixState`] that is written and read. It changes with the meaning of a field.
const VERSION: u16 = 1;

/// What a function's MSI-X remembers. PCIe 6.0 §7.7.2 and §6.1.4.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsixState {
    /// The version of this structure.
    pub version: u16,
    /// MSI-X Enable, of the message control register.
    pub enabled: bool,
    /// Function Mask, of the message control register.
    pub function_masked: bool,
    /// The table's entries, 1 to 2048.
    pub vectors: Vec<VectorState>,
}

/// One entry of the table, and its pending bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VectorState {
    /// Message address and data; the address is a multiple of four.
    pub message: MsiMessage,
    /// The mask bit of the entry's vector control.
    pub masked: bool,
    /// An interrupt is held back here, by a mask, until the entry is unmasked.
    pub pending: bool,
}

/// A saved table is not one that this function can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MsixStateError {
    /// it was saved in version {0} of the format, and this Busway knows 1
    #[error("it was saved in version {0} of the format, and this Busway knows {VERSION}")]
    Version(u16),
    /// it has {saved} vectors, and the function {own}
    #[error("it has {saved} vectors, and the function {own}")]
    Vectors {
        /// How many were saved.
        saved: usize,
        /// How many the function has.
        own: usize,
    },
}

impl MsixState {
    fn at_reset(vectors: u16) -> Self {
        Self {
            version: VERSION,
            enabled: false,
            function_masked: false,
            vectors: vec![VectorState::AT_RESET; vectors.into()],
        }
    }
}

impl VectorState {
    const AT_RESET: Self = Self {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
        pending: false,
    };

    fn dword(&self, number: u64) -> u32 {
        match number {
            0 => self.message.address as u32,
            1 => (self.message.address >> 32) as u32,
            2 => self.message.data,
            _ if self.masked => spec::MSIX_VECTOR_MASK,
            _ => 0,
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
            _ => self.masked = value & spec::MSIX_VECTOR_MASK != 0,
        }
    }
}

/// The MSI-X of a function: its state, and the ways to the guest that are made of it.
///
/// It belongs to the function that has it and is locked with it.
#[derive(Debug)]
pub struct Msix {
    routes: Arc<dyn InterruptRoutes>,
    state: MsixState,
    /// One place for each entry.
    connections: Vec<Option<Connection>>,
    complaints: VectorComplaints,
}

impl Msix {
    /// MSI-X with a table of `vectors` entries, taken into 1..=2048, all masked.
    #[must_use]
    pub fn new(vectors: u16, routes: Arc<dyn InterruptRoutes>) -> Self {
        let count = vectors.clamp(1, spec::MSIX_MAX_VECTORS);
        Self {
            routes,
            state: MsixState::at_reset(count),
            connections: (0..count).map(|_| None).collect(),
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
        self.connections.len() as u16
    }

    /// What it remembers. An interrupt that a connection holds back is pending in it.
    #[must_use]
    pub fn state(&self) -> MsixState {
        let mut state = self.state.clone();
        for (vector, connection) in state.vectors.iter_mut().zip(&self.connections) {
            vector.pending |= connection.as_ref().is_some_and(Connection::pending);
        }
        state
    }

    /// Whether [`restore`](Self::restore) can take `state`.
    ///
    /// # Errors
    /// [`MsixStateError`]
    pub fn check(&self, state: &MsixState) -> Result<(), MsixStateError> {
        let (saved, own) = (state.vectors.len(), self.connections.len());
        if state.version != VERSION {
            return Err(MsixStateError::Version(state.version));
        }
        if saved != own {
            return Err(MsixStateError::Vectors { saved, own });
        }
        Ok(())
    }

    /// Goes to a state that was saved, and connects the vectors that it has unmasked. One that
    /// [`check`](Self::check) refuses changes nothing.
    pub fn restore(&mut self, state: &MsixState, owner: &mut dyn VectorOwner) {
        if self.check(state).is_err() {
            return;
        }
        self.reset(owner);
        self.state.vectors.clone_from(&state.vectors);
        for vector in &mut self.state.vectors {
            vector.message.address &= !3;
        }
        let bit = |set, bit| if set { bit } else { 0 };
        self.write_control(
            bit(state.enabled, spec::MSIX_CONTROL_ENABLE)
                | bit(state.function_masked, spec::MSIX_CONTROL_MASK),
            owner,
        );
    }

    /// Bytes of the table.
    #[must_use]
    pub fn table_size(&self) -> u64 {
        self.connections.len() as u64 * spec::MSIX_ENTRY_SIZE
    }

    /// Bytes of the PBA: a bit for each vector, in quadwords.
    #[must_use]
    pub fn pba_size(&self) -> u64 {
        self.connections.len().div_ceil(64) as u64 * 8
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
            | bit(self.state.enabled, spec::MSIX_CONTROL_ENABLE)
            | bit(self.state.function_masked, spec::MSIX_CONTROL_MASK)
    }

    /// The guest wrote the message control register; all but its two writable bits is ignored.
    pub fn write_control(&mut self, control: u16, owner: &mut dyn VectorOwner) {
        let enable = control & spec::MSIX_CONTROL_ENABLE != 0;
        let mask = control & spec::MSIX_CONTROL_MASK != 0;
        let changed = (enable, mask) != (self.state.enabled, self.state.function_masked);
        let was_enabled = std::mem::replace(&mut self.state.enabled, enable);
        self.state.function_masked = mask;
        if was_enabled && !enable {
            self.disconnect(owner);
        } else if changed && enable {
            if !was_enabled && let Err(error) = owner.enable() {
                self.complaints.make("MSI-X", &VectorError::Device(error));
            }
            for vector in 0..self.vectors() {
                self.update_vector(vector, owner);
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
            let Some(vector) = vector.and_then(|number| self.state.vectors.get_mut(number)) else {
                break;
            };
            let mut value = [0; 4];
            value.copy_from_slice(bytes);
            vector.set_dword(at % 16 / 4, u32::from_le_bytes(value));
            let number = number as u16;
            if let Some(done) = touched.replace(number).filter(|&done| done != number) {
                self.update_vector(done, owner);
            }
        }
        if let Some(last) = touched {
            self.update_vector(last, owner);
        }
    }

    /// Reads the PBA, `offset` bytes from its start; zeros beyond its end. A bit is set while an
    /// interrupt is held back by a mask: here, not in the source.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..=u64::MAX).zip(data) {
            *byte = bits_at(at, |number| self.pending(number));
        }
    }

    /// Adds to what [`pba_read`](Self::pba_read) gave the bits of the source's own PBA, read at the
    /// same offset: those of vectors that are not connected, for the source has them masked.
    pub fn pba_add(&self, offset: u64, data: &mut [u8], source: &[u8]) {
        if !self.state.enabled {
            return;
        }
        let unconnected = |number| matches!(self.connections.get(number), Some(None));
        for ((at, byte), source) in (offset..=u64::MAX).zip(data).zip(source) {
            *byte |= bits_at(at, unconnected) & source;
        }
    }

    /// Interrupts the guest, as a device in this process does. While the vector is masked the
    /// interrupt is kept, as one, and shows in the PBA. Nothing happens while MSI-X is disabled, or
    /// where there is no such vector.
    pub fn trigger(&mut self, vector: u16) {
        if !self.state.enabled {
            return;
        }
        let number = usize::from(vector);
        match self.connections.get(number) {
            Some(Some(connection)) => connection.trigger(),
            Some(None) => {
                if let Some(vector) = self.state.vectors.get_mut(number) {
                    vector.pending = true;
                }
            }
            None => {}
        }
    }

    /// Whether the guest enabled MSI-X.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.state.enabled
    }

    /// How many vectors have a route to the guest now.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.connections.iter().flatten().count()
    }

    /// Goes to the state at reset: disabled, every vector masked, nothing pending.
    pub fn reset(&mut self, owner: &mut dyn VectorOwner) {
        if self.state.enabled {
            self.disconnect(owner);
        }
        self.state = MsixState::at_reset(self.vectors());
    }

    fn vector_at(&self, offset: u64) -> Option<&VectorState> {
        let number = usize::try_from(offset / spec::MSIX_ENTRY_SIZE).ok()?;
        self.state.vectors.get(number)
    }

    fn pending(&self, number: usize) -> bool {
        let state = self.state.vectors.get(number);
        let connection = self.connections.get(number).and_then(Option::as_ref);
        state.is_some_and(|vector| vector.pending) || connection.is_some_and(Connection::pending)
    }

    /// The source stops signalling first; only then do the eventfds close.
    fn disconnect(&mut self, owner: &mut dyn VectorOwner) {
        owner.disconnect_all();
        self.connections.fill_with(|| None);
        for vector in &mut self.state.vectors {
            vector.pending = false;
        }
    }

    /// Brings a vector's connection in line with its entry and the control register.
    fn update_vector(&mut self, number: u16, owner: &mut dyn VectorOwner) {
        let place = usize::from(number);
        let (Some(vector), Some(slot)) = (
            self.state.vectors.get_mut(place),
            self.connections.get_mut(place),
        ) else {
            return;
        };
        if !self.state.enabled {
            return;
        }
        let masked = self.state.function_masked || vector.masked;
        let result = match (&mut *slot, masked) {
            (None, true) => Ok(()),
            (None, false) => connect(vector, number, &*self.routes, owner)
                .map(|connection| *slot = Some(connection)),
            (Some(connection), true) => connection.mask(true),
            (Some(connection), false) => connection
                .retarget(vector.message)
                .and_then(|()| connection.mask(false)),
        };
        if let Err(error) = result {
            if matches!(error, VectorError::Device(_)) && owner.has_lost_all() {
                self.connections.fill_with(|| None);
            }
            self.complaints
                .make(&format!("MSI-X vector {number}"), &error);
        }
    }
}

/// The byte at `at` of a table of bits, of which `bit` gives each by its number.
fn bits_at(at: u64, bit: impl Fn(usize) -> bool) -> u8 {
    let first = usize::try_from(at).ok().and_then(|at| at.checked_mul(8));
    let numbers = first.map_or(0..0, |first| first..first.saturating_add(8));
    (0..)
        .zip(numbers)
        .filter(|(_, number)| bit(*number))
        .fold(0, |byte, (place, _)| byte | 1 << place)
}

/// Makes `vector` its route, tells the source, and sends what was pending.
fn connect(
    vector: &mut VectorState,
    number: u16,
    routes: &dyn InterruptRoutes,
    owner: &mut dyn VectorOwner,
) -> Result<Connection, VectorError> {
    let connection = Connection::new(routes, number, vector.message)?;
    owner
        .connect(number, &[connection.event()])
        .map_err(VectorError::Device)?;
    if std::mem::take(&mut vector.pending) {
        connection.trigger();
    }
    Ok(connection)
}

#[cfg(test)]
mod tests;
