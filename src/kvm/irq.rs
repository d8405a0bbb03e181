//! The way of an interrupt to the guest: KVM's table of GSIs, its irqfds and its lines.
//!
//! One [`IrqRouter`] owns the table. A message-signalled vector has a GSI of its own, an eventfd and
//! an irqfd for as long as its [`InterruptRoute`] lives; the pins of the legacy interrupt controllers
//! are routed once.

use std::fmt;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{InterruptLevel, InterruptRoute, InterruptRoutes, MsiMessage, RouteError};
use busway_vfio::EventFd;
use kvm_bindings::{KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::EventFd as KvmEventFd;

use super::error::KvmError;
use super::wires::Wires;
use crate::arch::chips::{IOAPIC_PINS, legacy_routes};

/// Vectors in use, for the boot report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VectorCount {
    /// Message-signalled vectors routed now.
    pub now: usize,
    /// The most there were.
    pub most: usize,
    /// How often one's message was changed: updates of KVM's table beyond those that took and gave
    /// back.
    pub updates: u64,
}

/// A handle to the owner of the GSI routing table, cheap to clone. A handle counts the vectors that
/// came through it and its clones.
#[derive(Clone)]
pub struct IrqRouter {
    shared: Arc<Shared>,
    count: Arc<Counter>,
}

/// Vectors of one handle.
#[derive(Debug, Default)]
struct Counter {
    now: AtomicUsize,
    most: AtomicUsize,
    updates: AtomicU64,
}

struct Shared {
    fd: Wires,
    /// How many routes the table can hold.
    limit: u32,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    /// The message of GSI `IOAPIC_PINS + index`.
    messages: Vec<Option<MsiMessage>>,
    /// How many of them there are.
    used: usize,
}

impl fmt::Debug for IrqRouter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqRouter")
            .field("limit", &self.shared.limit)
            .field("vectors", &self.vectors())
            .finish_non_exhaustive()
    }
}

impl IrqRouter {
    pub(super) fn new(fd: impl Into<Wires>, limit: u32) -> Result<Self, KvmError> {
        let shared = Shared {
            fd: fd.into(),
            limit,
            table: Mutex::default(),
        };
        shared
            .install(&Table::default())
            .map_err(KvmError::ioctl("KVM_SET_GSI_ROUTING", "the VM"))?;
        Ok(Self {
            shared: Arc::new(shared),
            count: Arc::default(),
        })
    }

    /// Another handle to the same table, with a count of its own.
    #[must_use]
    pub fn with_own_count(&self) -> Self {
        Self {
            shared: self.shared.clone(),
            count: Arc::default(),
        }
    }

    /// How many vectors are in use by way of this handle.
    #[must_use]
    pub fn vectors(&self) -> VectorCount {
        VectorCount {
            now: self.count.now.load(Ordering::Relaxed),
            most: self.count.most.load(Ordering::Relaxed),
            updates: self.count.updates.load(Ordering::Relaxed),
        }
    }

    /// One whose interrupts arrive nowhere.
    ///
    /// # Errors
    /// None.
    #[cfg(any(test, feature = "hostile"))]
    pub(crate) fn loose() -> Result<Self, KvmError> {
        /// Linux, include/linux/kvm_host.h, `KVM_MAX_IRQ_ROUTES`.
        const ROUTES: u32 = 4096;
        Self::new(Wires::Loose, ROUTES)
    }

    /// Where it leads.
    pub(super) fn wires(&self) -> &Wires {
        &self.shared.fd
    }

    /// A pin of the legacy interrupt controllers that a device holds up or down.
    pub fn level_line(&self, gsi: u32) -> LevelLine {
        LevelLine {
            fd: self.shared.fd.clone(),
            gsi,
        }
    }

    /// An eventfd whose signal is a pulse on a pin of the legacy interrupt controllers.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn edge_line(&self, gsi: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new().map_err(|source| KvmError::Ioctl {
            what: "eventfd",
            object: format!("GSI {gsi}"),
            source,
        })?;
        lend(&event, |event| self.shared.fd.register_irqfd(event, gsi))
            .map_err(KvmError::ioctl("KVM_IRQFD", format_args!("GSI {gsi}")))?;
        Ok(event)
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands the whole table to KVM.
    fn install(&self, table: &Table) -> Result<(), kvm_ioctls::Error> {
        let mut entries = legacy_routes();
        entries.extend(
            (IOAPIC_PINS..)
                .zip(&table.messages)
                .filter_map(|(gsi, message)| Some(message_route(gsi, message.as_ref()?))),
        );
        let routing = KvmIrqRouting::from_entries(&entries)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOSPC))?;
        self.fd.set_gsi_routing(&routing)
    }

    /// Gives `message` a free GSI.
    fn take(&self, message: MsiMessage) -> Result<u32, RouteError> {
        let mut table = self.table();
        let free = table
            .messages
            .iter()
            .position(Option::is_none)
            .unwrap_or(table.messages.len());
        let exhausted = RouteError::Exhausted { limit: self.limit };
        let gsi = u32::try_from(free)
            .ok()
            .and_then(|index| index.checked_add(IOAPIC_PINS));
        // KVM wants GSIs below its limit, and no more routes than it.
        let routes = legacy_routes().len().saturating_add(table.used);
        let gsi = match gsi {
            Some(gsi) if gsi < self.limit && routes < self.limit as usize => gsi,
            _ => return Err(exhausted),
        };
        if free == table.messages.len() {
            table.messages.push(None);
        }
        if let Some(entry) = table.messages.get_mut(free) {
            *entry = Some(message);
        }
        if let Err(error) = self.install(&table) {
            if let Some(entry) = table.messages.get_mut(free) {
                *entry = None;
            }
            return Err(kernel("KVM_SET_GSI_ROUTING", error));
        }
        table.used += 1;
        Ok(gsi)
    }

    /// Changes the message of a GSI that was taken, and says whether it was another one.
    fn change(&self, gsi: u32, message: MsiMessage) -> Result<bool, RouteError> {
        let mut table = self.table();
        let Some(entry) = entry_mut(&mut table, gsi) else {
            return Ok(false);
        };
        let Some(before) = entry.replace(message).filter(|before| *before != message) else {
            return Ok(false);
        };
        let result = self.install(&table);
        if result.is_err()
            && let Some(entry) = entry_mut(&mut table, gsi)
        {
            *entry = Some(before);
        }
        result
            .map(|()| true)
            .map_err(|error| kernel("KVM_SET_GSI_ROUTING", error))
    }

    /// Frees a GSI. Its irqfd is gone, so KVM keeps the stale route until the next change: nothing
    /// can trigger it, and a table is not installed for every vector of a device that goes.
    fn free(&self, gsi: u32) {
        let mut table = self.table();
        if let Some(entry) = entry_mut(&mut table, gsi) {
            *entry = None;
            table.used = table.used.saturating_sub(1);
        }
    }
}

fn entry_mut(table: &mut Table, gsi: u32) -> Option<&mut Option<MsiMessage>> {
    let index = gsi.checked_sub(IOAPIC_PINS)?;
    table.messages.get_mut(index as usize)
}

pub(super) fn kernel(what: &'static str, error: kvm_ioctls::Error) -> RouteError {
    RouteError::Kernel {
        what,
        source: error.into(),
    }
}

fn message_route(gsi: u32, message: &MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        ..Default::default()
    };
    entry.u.msi.address_lo = message.address as u32;
    entry.u.msi.address_hi = (message.address >> 32) as u32;
    entry.u.msi.data = message.data;
    entry
}

impl InterruptRoutes for IrqRouter {
    fn connect(&self, _: u16, message: MsiMessage) -> Result<Arc<dyn InterruptRoute>, RouteError> {
        let event = eventfd()?;
        let gsi = self.shared.take(message)?;
        if let Err(error) = lend(&event, |event| self.shared.fd.register_irqfd(event, gsi)) {
            self.shared.free(gsi);
            return Err(kernel("KVM_IRQFD", error));
        }
        let now = self.count.now.fetch_add(1, Ordering::Relaxed) + 1;
        self.count.most.fetch_max(now, Ordering::Relaxed);
        Ok(Arc::new(Vector {
            router: self.shared.clone(),
            count: self.count.clone(),
            gsi,
            event,
            masked: Mutex::new(false),
        }))
    }
}

/// One vector's way.
struct Vector {
    router: Arc<Shared>,
    count: Arc<Counter>,
    gsi: u32,
    event: EventFd,
    masked: Mutex<bool>,
}

impl fmt::Debug for Vector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vector")
            .field("gsi", &self.gsi)
            .field("masked", &self.masked)
            .finish_non_exhaustive()
    }
}

impl Vector {
    fn masked(&self) -> MutexGuard<'_, bool> {
        self.masked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl InterruptRoute for Vector {
    fn update(&self, message: MsiMessage) -> Result<(), RouteError> {
        if self.router.change(self.gsi, message)? {
            self.count.updates.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// A masked vector has no irqfd, so its eventfd keeps the signal; KVM looks at the eventfd when
    /// the irqfd comes back.
    fn set_masked(&self, masked: bool) -> Result<(), RouteError> {
        let mut now = self.masked();
        if *now == masked {
            return Ok(());
        }
        let fd = &self.router.fd;
        let result = lend(&self.event, |event| match masked {
            true => fd.unregister_irqfd(event, self.gsi),
            false => fd.register_irqfd(event, self.gsi),
        });
        result.map_err(|error| kernel("KVM_IRQFD", error))?;
        *now = masked;
        Ok(())
    }

    fn pending(&self) -> bool {
        *self.masked() && is_readable(&self.event)
    }

    fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn trigger(&self) {
        self.event.signal();
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if !*self.masked()
            && let Err(error) = lend(&self.event, |event| {
                self.router.fd.unregister_irqfd(event, self.gsi)
            })
        {
            log::error!("the irqfd of GSI {} stays: {error}", self.gsi);
        }
        self.router.free(self.gsi);
        self.count.now.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An eventfd for KVM to wait for, or to signal.
pub(super) fn eventfd() -> Result<EventFd, RouteError> {
    EventFd::new().map_err(no_eventfd)
}

fn no_eventfd(source: io::Error) -> RouteError {
    match source.raw_os_error() {
        Some(libc::EMFILE) => RouteError::TooManyFiles,
        _ => RouteError::Kernel {
            what: "eventfd",
            source,
        },
    }
}

/// Lends an eventfd to a call of rust-vmm's, in the type that it asks for.
pub(crate) fn lend<T>(event: &impl AsFd, call: impl FnOnce(&KvmEventFd) -> T) -> T {
    // SAFETY: the descriptor is open for as long as `event`, which stays borrowed, and is not closed by
    // what is never dropped.
    let event = unsafe { KvmEventFd::from_raw_fd(event.as_fd().as_raw_fd()) };
    call(&ManuallyDrop::new(event))
}

/// Whether an eventfd has a signal, without taking it.
fn is_readable(event: &EventFd) -> bool {
    let mut asked = [PollFd::new(event, PollFlags::IN)];
    poll(&mut asked, Some(&Timespec::default())) == Ok(1)
        && asked
            .iter()
            .any(|one| one.revents().contains(PollFlags::IN))
}

/// A pin held up or down by one device.
#[derive(Debug)]
pub struct LevelLine {
    fd: Wires,
    gsi: u32,
}

impl InterruptLevel for LevelLine {
    /// Says in the log where the kernel refused.
    fn set(&self, asserted: bool) {
        if let Err(error) = self.fd.set_irq_line(self.gsi, asserted) {
            log::error!("KVM_IRQ_LINE failed on GSI {}: {error}", self.gsi);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_that_is_reached_is_named_with_what_raises_it() {
        let said = no_eventfd(io::Error::from_raw_os_error(libc::EMFILE)).to_string();
        assert!(said.contains("ulimit -n"), "{said}");
        let said = no_eventfd(io::Error::from_raw_os_error(libc::ENOMEM)).to_string();
        assert!(said.starts_with("eventfd failed: "), "{said}");
    }

    #[test]
    fn a_vector_beyond_the_last_route_is_refused_by_name_and_had_when_another_is_gone() {
        const LIMIT: u32 = 64;
        let router = IrqRouter::new(Wires::Loose, LIMIT).unwrap();
        let mut vectors = Vec::new();
        let refused = loop {
            match router.connect(0, MsiMessage::default()) {
                Ok(vector) => vectors.push(vector),
                Err(error) => break error,
            }
        };
        // Those of the legacy pins are among them.
        assert!(vectors.len() >= LIMIT as usize - legacy_routes().len());
        assert!(matches!(refused, RouteError::Exhausted { limit: LIMIT }));
        assert!(refused.to_string().contains("64"), "{refused}");
        vectors.pop();
        vectors.push(router.connect(0, MsiMessage::default()).unwrap());
        router.connect(0, MsiMessage::default()).unwrap_err();
    }

    #[test]
    fn a_table_can_be_as_long_as_kvm_takes_it() {
        // Linux, include/linux/kvm_host.h, `KVM_MAX_IRQ_ROUTES`.
        let entries = vec![kvm_irq_routing_entry::default(); 4096];
        let routing = KvmIrqRouting::from_entries(&entries).unwrap();
        assert_eq!(routing.as_slice().len(), entries.len());
    }
}
