//! MSI: up to 32 vectors that share one message, told apart by its lowest bits.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crate::connection::{Connection, VectorComplaints, VectorError};
use crate::interrupt::{InterruptRoutes, MsiMessage, VectorOwner};
use crate::spec;

/// What a function's MSI can do. PCIe 6.0 §7.7.1.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiFeatures {
    /// How many vectors it asks for: 1, 2, 4, 8, 16 or 32; others are rounded down into these.
    pub vectors: u8,
    /// Whether the message address has 64 bits.
    pub address_64: bool,
    /// Whether each vector has a mask and a pending bit.
    pub masking: bool,
}

impl MsiFeatures {
    /// What the message control register of a capability says.
    #[must_use]
    pub fn from_control(control: u16) -> Self {
        let log2 = (control >> spec::MSI_CONTROL_CAPABLE_SHIFT & 0b111).min(5);
        Self {
            vectors: 1 << log2,
            address_64: control & spec::MSI_CONTROL_64 != 0,
            masking: control & spec::MSI_CONTROL_MASKING != 0,
        }
    }

    fn log2(self) -> u16 {
        self.vectors.clamp(1, spec::MSI_MAX_VECTORS).ilog2() as u16
    }

    fn control(self) -> u16 {
        let bit = |set, bit| if set { bit } else { 0 };
        self.log2() << spec::MSI_CONTROL_CAPABLE_SHIFT
            | bit(self.address_64, spec::MSI_CONTROL_64)
            | bit(self.masking, spec::MSI_CONTROL_MASKING)
    }

    /// Where the message data register is.
    fn data_offset(self) -> u16 {
        if self.address_64 { 0x0c } else { 0x08 }
    }

    /// Bytes of the capability, with its identifier and next pointer.
    #[must_use]
    pub fn capability_size(self) -> u16 {
        self.data_offset() + if self.masking { 0x0c } else { 0x02 }
    }
}

/// The registers as the capability lays them out, from its start.
type Registers = [u8; 0x18];

/// The MSI state of a function. PCIe 6.0 §7.7.1 and §6.1.4.
///
/// All vectors that the guest enabled are connected together when it sets the enable bit. It belongs
/// to the function that has it and is locked with it.
#[derive(Debug)]
pub struct Msi {
    routes: Arc<dyn InterruptRoutes>,
    features: MsiFeatures,
    enabled: bool,
    /// How many vectors software gave, as a power of two.
    given: u16,
    address: u64,
    data: u16,
    mask: u32,
    /// Triggered with no connection to hold it back.
    pending: u32,
    /// None, or as many as are enabled.
    connections: Vec<Connection>,
    complaints: VectorComplaints,
}

impl Msi {
    /// MSI, disabled.
    #[must_use]
    pub fn new(features: MsiFeatures, routes: Arc<dyn InterruptRoutes>) -> Self {
        Self {
            routes,
            features,
            enabled: false,
            given: 0,
            address: 0,
            data: 0,
            mask: 0,
            pending: 0,
            connections: Vec::new(),
            complaints: VectorComplaints::of("a function"),
        }
    }

    /// Says whose it is, for the log.
    #[must_use]
    pub fn named(mut self, name: impl Into<Box<str>>) -> Self {
        self.complaints = VectorComplaints::of(name);
        self
    }

    /// The capability's body at reset, for
    /// [`ConfigSpace::add_capability`](crate::ConfigSpace::add_capability) with nothing writable:
    /// this state answers for the registers.
    #[must_use]
    pub fn capability_body(&self) -> Vec<u8> {
        let size = usize::from(self.features.capability_size());
        let registers = self.registers();
        registers.get(2..size).unwrap_or_default().to_vec()
    }

    /// Bytes of the capability, with its identifier and next pointer.
    #[must_use]
    pub fn capability_size(&self) -> u16 {
        self.features.capability_size()
    }

    /// Whether the guest enabled MSI.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// How many vectors the function asks for.
    #[must_use]
    pub fn vectors(&self) -> u8 {
        1 << self.features.log2()
    }

    /// How many vectors have a route to the guest now.
    #[must_use]
    pub fn connected(&self) -> usize {
        self.connections.len()
    }

    /// Reads the capability, `offset` bytes from its start: fills those bytes of `data` that fall on
    /// its registers and leaves the others (its identifier and next pointer, and what lies behind
    /// it) as they are.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = self.registers();
        for (at, byte) in (offset..=u16::MAX).zip(data) {
            if self.owns(at) {
                *byte = registers.get(usize::from(at)).copied().unwrap_or(0);
            }
        }
    }

    /// Writes the capability, `offset` bytes from its start: takes those bytes of `data` that fall
    /// on its registers and ignores the others.
    pub fn write(&mut self, offset: u16, data: &[u8], owner: &mut dyn VectorOwner) {
        let mut registers = self.registers();
        let mut ours = false;
        for (at, byte) in (offset..=u16::MAX).zip(data) {
            if let Some(register) = registers.get_mut(usize::from(at)).filter(|_| self.owns(at)) {
                *register = *byte;
                ours = true;
            }
        }
        if ours {
            self.take(&registers, owner);
        }
    }

    /// Interrupts the guest, as a device in this process does. While the vector is masked the
    /// interrupt is kept, as one. Nothing happens while MSI is disabled. A vector beyond those that
    /// the guest gave is vector 0: the function was told to make do.
    pub fn trigger(&mut self, vector: u8) {
        if !self.enabled {
            return;
        }
        let vector = if u16::from(vector) < self.count() {
            vector
        } else {
            0
        };
        match self.connections.get(usize::from(vector)) {
            Some(connection) => connection.trigger(),
            None => self.pending |= 1 << vector,
        }
    }

    /// Goes to the state at reset: disabled, nothing masked, nothing pending.
    pub fn reset(&mut self, owner: &mut dyn VectorOwner) {
        if self.enabled {
            self.disconnect(owner);
        }
        self.enabled = false;
        (self.given, self.address, self.data, self.mask) = (0, 0, 0, 0);
    }

    /// How many vectors the guest gave, never more than were asked for.
    fn count(&self) -> u16 {
        1 << self.given.min(self.features.log2())
    }

    /// Whether the byte at `offset` is one of the registers.
    fn owns(&self, offset: u16) -> bool {
        (spec::MSI_CONTROL..self.features.capability_size()).contains(&offset)
    }

    fn registers(&self) -> Registers {
        let mut registers = Registers::default();
        let mut put = |offset: u16, bytes: &[u8]| {
            let offset = usize::from(offset);
            if let Some(to) = registers.get_mut(offset..offset + bytes.len()) {
                to.copy_from_slice(bytes);
            }
        };
        let enable = if self.enabled {
            spec::MSI_CONTROL_ENABLE
        } else {
            0
        };
        let control =
            self.features.control() | self.given << spec::MSI_CONTROL_ENABLED_SHIFT | enable;
        let data = self.features.data_offset();
        put(spec::MSI_CONTROL, &control.to_le_bytes());
        put(spec::MSI_ADDRESS, &self.address.to_le_bytes());
        put(data, &u32::from(self.data).to_le_bytes());
        if self.features.masking {
            put(data + 4, &self.mask.to_le_bytes());
            put(data + 8, &self.pending_bits().to_le_bytes());
        }
        registers
    }

    fn pending_bits(&self) -> u32 {
        (0..)
            .zip(&self.connections)
            .filter(|(_, connection)| connection.pending())
            .fold(self.pending, |bits, (vector, _): (u32, _)| {
                bits | 1 << vector
            })
    }

    /// Takes over what the guest left in the registers and acts on what changed.
    fn take(&mut self, registers: &Registers, owner: &mut dyn VectorOwner) {
        let get = |offset: u16| {
            let mut bytes = [0; 4];
            let from = registers.iter().skip(usize::from(offset));
            for (to, from) in bytes.iter_mut().zip(from) {
                *to = *from;
            }
            u32::from_le_bytes(bytes)
        };
        let data = self.features.data_offset();
        let control = get(spec::MSI_CONTROL) as u16;
        let high = if self.features.address_64 {
            get(spec::MSI_ADDRESS + 4)
        } else {
            0
        };
        self.address = u64::from(get(spec::MSI_ADDRESS) & !3) | u64::from(high) << 32;
        self.data = get(data) as u16;
        if self.features.masking {
            self.mask = get(data + 4) & (u32::MAX >> (32 - (1u32 << self.features.log2())));
        }
        let was = (self.enabled, self.count());
        self.enabled = control & spec::MSI_CONTROL_ENABLE != 0;
        self.given = (control & spec::MSI_CONTROL_ENABLED) >> spec::MSI_CONTROL_ENABLED_SHIFT;
        if was.0 && was != (self.enabled, self.count()) {
            self.disconnect(owner);
        }
        if self.enabled {
            self.update_connections(owner);
        }
    }

    fn message(&self, vector: u16) -> MsiMessage {
        MsiMessage {
            address: self.address,
            data: u32::from((self.data & !(self.count() - 1)) | vector),
        }
    }

    fn masked(&self, vector: u16) -> bool {
        self.mask & 1 << vector != 0
    }

    /// Connects what is enabled, or brings the connections in line with the registers.
    fn update_connections(&mut self, owner: &mut dyn VectorOwner) {
        let outcome = if self.connections.is_empty() {
            self.connect(owner)
        } else {
            self.refresh()
        };
        if let Err(error) = outcome {
            self.complaints.make("MSI", &error);
        }
    }

    fn connect(&mut self, owner: &mut dyn VectorOwner) -> Result<(), VectorError> {
        let mut connections = Vec::new();
        for vector in 0..self.count() {
            let mut connection = Connection::new(&*self.routes, vector, self.message(vector))?;
            connection.mask(self.masked(vector))?;
            connections.push(connection);
        }
        let events: Vec<BorrowedFd<'_>> = connections.iter().map(Connection::event).collect();
        owner.connect(0, &events).map_err(VectorError::Device)?;
        for (vector, connection) in connections.iter().enumerate() {
            if self.pending & 1 << vector != 0 {
                connection.trigger();
            }
        }
        self.pending = 0;
        self.connections = connections;
        Ok(())
    }

    /// A masked vector takes over its message when its mask goes: the guest may write the message in
    /// pieces till then, and moves an interrupt with one update.
    fn refresh(&mut self) -> Result<(), VectorError> {
        let vectors = 0..self.count();
        let wanted: Vec<_> = vectors.map(|v| (self.message(v), self.masked(v))).collect();
        for (connection, (message, masked)) in self.connections.iter_mut().zip(wanted) {
            if masked {
                connection.mask(true)?;
            } else {
                connection.retarget(message)?;
                connection.mask(false)?;
            }
        }
        Ok(())
    }

    /// The source stops signalling first; only then do the eventfds close.
    fn disconnect(&mut self, owner: &mut dyn VectorOwner) {
        owner.disconnect_all();
        self.connections.clear();
        self.pending = 0;
    }
}

#[cfg(test)]
mod tests;
