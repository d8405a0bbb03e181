//! The seam between a PCI function and the machine that holds it.

use std::fmt::Debug;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::activity::Activity;
use crate::address::Segment;
use crate::atomics::AtomicOps;
use crate::bar::{BarIndex, BarKind, BarRegion};
use crate::windows::{Reserve, Windows};

/// An address in Busway's own process, valid for as long as the function that named it lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAddress(pub usize);

/// A part of a BAR that the guest may use without Busway standing between.
#[derive(Clone, Debug)]
pub enum BarPart {
    /// Memory the guest reaches directly, such as a host device's registers mapped by `mmap`.
    ///
    /// Of a BAR smaller than a page it can be the page that begins with the BAR, where nothing else
    /// is in that on the host; the guest has it while nothing else is in its own page either.
    Memory {
        /// Bytes from the BAR's start; page-aligned.
        offset: u64,
        /// Bytes; a multiple of the page size.
        size: u64,
        /// Where it is mapped in this process.
        host: HostAddress,
    },
    /// A register whose write, of any value, signals an eventfd.
    Doorbell {
        /// Bytes from the BAR's start.
        offset: u64,
        /// The eventfd.
        event: Arc<OwnedFd>,
    },
}

/// One PCI function, as the guest sees it.
///
/// A function is shared between vCPU threads and locks itself. `config_*` and `bar_*` accesses come
/// from the guest: any offset and any width of 1, 2, 4 or 8 bytes has to be answered, and where
/// nothing is behind it, reads give all ones.
///
/// A function never maps its BARs itself. Before and after each configuration write the topology asks
/// [`decoded`](Self::decoded) and, where the answer changed, moves the BARs through the
/// [`BarMapper`], outside of the function's lock.
pub trait PciFunction: Send + Sync + Debug {
    /// What messages call it: a host device by its address there.
    fn name(&self) -> String {
        "a device".to_owned()
    }

    /// Where its accesses are counted, if they are.
    fn activity(&self) -> Option<&Activity> {
        None
    }

    /// Reads configuration space at `offset` (0 to 4095); the access does not cross a doubleword.
    fn config_read(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space at `offset` (0 to 4095); the access does not cross a doubleword.
    fn config_write(&self, offset: u16, data: &[u8]);

    /// Every BAR that the function has, decoding or not, at the address its register holds.
    fn bars(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    /// Every BAR that the function has: which, of what kind, and its bytes. Fixed for the function's life.
    ///
    /// A function that holds a lock through [`run_deferred`](Self::run_deferred) or [`reset`](Self::reset) answers without
    /// it: who looks for room for another function asks, and waits for nothing.
    fn bar_sizes(&self) -> Vec<(BarIndex, BarKind, u64)> {
        let bars = self.bars().into_iter();
        bars.map(|bar| (bar.index, bar.kind, bar.size)).collect()
    }

    /// The BARs that decode now: the command register's enable for their kind is set (and the ROM's
    /// own enable, for the ROM). Values written while decoding is off are only values.
    ///
    /// Answers at once, and never waits for [`run_deferred`](Self::run_deferred) or [`reset`](Self::reset): it is
    /// asked with the topology's locks held, for which the writes to other functions wait. Nothing but a
    /// configuration write, `run_deferred` and `reset` changes the answer.
    fn decoded(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    /// Carries out what a configuration write asked for and what must not happen while a BAR is mapped,
    /// such as putting a host device to sleep or resetting it. A function with such a thing to do
    /// decodes nothing until then. Says whether it decodes something again.
    ///
    /// Called after each configuration write by which it decodes nothing, when none of its BARs is
    /// mapped.
    fn run_deferred(&self) -> bool {
        false
    }

    /// The parts of a BAR that need no exit. Asked when the BAR is mapped; fixed for the function's
    /// life.
    fn parts(&self, bar: BarIndex) -> Vec<BarPart> {
        let _ = bar;
        Vec::new()
    }

    /// Whether other devices are to reach the memory that its [`parts`](Self::parts) name: not so where it
    /// may go while they do.
    fn is_peer(&self) -> bool {
        true
    }

    /// Opens a part of a BAR, or a piece of one, as a dma-buf, by which other devices can be let
    /// reach it; nothing where it can be reached by none, because it is no host device's memory.
    /// Linux, Documentation/driver-api/dma-buf.rst
    fn dma_buf(&self, bar: BarIndex, offset: u64, size: u64) -> Option<io::Result<OwnedFd>> {
        let _ = (bar, offset, size);
        None
    }

    /// Reads from a BAR, `offset` bytes from its start.
    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let _ = (bar, offset);
        data.fill(u8::MAX);
    }

    /// Writes to a BAR, `offset` bytes from its start.
    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let _ = (bar, offset, data);
    }

    /// Puts the function into its state at power-on.
    ///
    /// Called when the guest restarts, with no vCPU running, and when the guest resets the bus that
    /// the function is on: then with none of its BARs mapped, while a last access may still be on its
    /// way.
    fn reset(&self);

    /// The bridge side of the function, where it is one.
    fn bridge(&self) -> Option<&dyn Bridge> {
        None
    }
}

/// What a PCI-to-PCI bridge (a root port) lets through to its secondary bus.
///
/// PCIe 6.0 §7.5.1.3.
pub trait Bridge {
    /// Secondary and subordinate bus number, as the guest has set them; `(0, 0)` before that.
    fn bus_numbers(&self) -> (u8, u8);

    /// Whether the bridge forwards `region` downstream: its command register and windows allow it.
    fn forwards(&self, region: &BarRegion) -> bool;

    /// Whether the guest holds the secondary bus in reset, or without power. The topology resets the
    /// functions below when that begins, and lets nothing through while it lasts.
    ///
    /// PCIe 6.0 §7.5.1.3.13, §6.7.
    fn in_reset(&self) -> bool {
        false
    }

    /// The slot behind the bridge, where devices can come and go at run time.
    fn hot_plug(&self) -> Option<&dyn HotPlug> {
        None
    }
}

/// A slot whose device can come and go while the guest runs. PCIe 6.0 §6.7.
///
/// The topology says what is in it ([`Topology::add`](crate::Topology::add),
/// [`Topology::plug`](crate::Topology::plug), [`Topology::unplug`](crate::Topology::unplug)); the
/// machine presses its button.
pub trait HotPlug {
    /// Its number.
    fn slot(&self) -> u16;

    /// What firmware gives the bridge's windows at least.
    fn reserve(&self) -> Reserve;

    /// The ranges that the bridge's windows are now, as the guest has set them; empty ones where they are
    /// closed.
    fn windows(&self) -> Windows;

    /// Whether it can have a window for I/O ports.
    fn has_io(&self) -> bool;

    /// Says that the bridge carries out these AtomicOps, until the slot is empty again.
    fn complete(&self, atomics: AtomicOps);

    /// Something is in the slot, or not, from before the guest's start.
    fn prepare(&self, present: bool);

    /// Something came into the slot, or left it, and the guest is told.
    fn set_present(&self, present: bool);

    /// Whether the guest gives it power.
    fn powered(&self) -> bool;

    /// Whether the guest is not in the middle of an operation on the slot: its power indicator does not blink,
    /// and says what the power is. A change of the slot waits until it is, for a guest can miss it before.
    fn steady(&self) -> bool;

    /// Whether a driver of the guest's hears of what comes and goes, by the interrupt that the slot sends.
    fn attended(&self) -> bool;

    /// Presses the attention button, by which the guest is asked to release what is in the slot,
    /// or to take it. `false`, and nothing is done, where no driver of the guest's attends to it. A
    /// second press before the guest has acted takes back the first.
    fn press_button(&self) -> bool;
}

/// Makes BARs reachable for the guest. The machine implements it.
///
/// Called without any function's lock held; the same BAR is never mapped twice without an `unmap`
/// between.
pub trait BarMapper: Send + Sync {
    /// Makes `region` reach `function`, which is in `segment`.
    ///
    /// # Errors
    /// The region overlaps something else, or is outside of the segment's windows, or the kernel refused. The BAR then stays unmapped and
    /// the caller logs it: a guest that places a BAR badly harms itself only.
    fn map(
        &self,
        segment: Segment,
        function: &Arc<dyn PciFunction>,
        region: &BarRegion,
    ) -> io::Result<()>;

    /// Undoes [`map`](Self::map).
    fn unmap(&self, function: &Arc<dyn PciFunction>, region: &BarRegion);
}
