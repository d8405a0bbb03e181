//! Where devices sit in a guest that runs, and how a device is told of and asked for there.
//!
//! A seat is the hot-plug slot of a root port, whose registers are PCIe's own, or one of the slots 1 to 15 of bus 0 of a
//! segment, of which ACPI tells (`devices::pci_hotplug`), with registers for each segment. Assigned devices have either, virtio devices those of bus 0, which
//! both choose from together. Whoever owns a device takes it out of its seat, the guest having released it or not.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use busway_pci::{
    Device, Function, FunctionId, InterruptLevel, PciFunction, RootSlot, Segment, Topology,
};
use busway_vfio::Placement;

use super::events::Events;
use crate::config::PciPlace;
use crate::devices::pci_hotplug::{PciHotplug, SlotKeeper};

/// For how long an access of a vCPU's to a device that leaves is waited for, and how often it is looked at.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_micros(200);

/// The slots of bus 0 from 1 up to before this one are for devices; those from here on for root ports, as far as there are
/// enough.
pub(super) const LOW_SLOTS: u8 = 16;

/// How long a change of a seat waits at most until the guest is done with what it is at there: the five
/// seconds that Linux takes for a button, one for the power to go, and as many again.
pub(super) const STEADY_LIMIT: Duration = Duration::from_secs(12);

/// A place for a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seat {
    /// Behind this root port, in its slot. PCIe 6.0 §6.7
    Port(FunctionId),
    /// This slot of bus 0 of a segment.
    Low(RootSlot),
}

impl Seat {
    /// The root port that it is behind.
    pub(super) const fn port(self) -> Option<FunctionId> {
        match self {
            Self::Port(port) => Some(port),
            Self::Low(_) => None,
        }
    }

    /// What a function is there.
    pub(super) const fn placement(self) -> Placement {
        match self {
            Self::Port(_) => Placement::BehindPort,
            Self::Low(_) => Placement::RootBus,
        }
    }
}

/// Whose a device in a slot of bus 0 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Owner {
    /// Of the assigned devices.
    Assigned,
    /// Of the virtio devices.
    Virtio,
}

/// The seats of a machine.
#[derive(Debug)]
pub(super) struct Seats {
    topology: Arc<Topology>,
    low: Arc<LowSlots>,
    /// By segment.
    registers: Mutex<BTreeMap<Segment, Arc<PciHotplug>>>,
}

impl Seats {
    /// Seats that a guest is not told of yet: [`open`](Self::open).
    pub(super) fn new(topology: Arc<Topology>) -> Self {
        Self {
            low: Arc::new(LowSlots {
                topology: topology.clone(),
                changing: Mutex::default(),
                state: Mutex::default(),
            }),
            topology,
            registers: Mutex::default(),
        }
    }

    /// Lets devices come to the slots of bus 0 of `segment` that are `free` (bit n: slot n), and leave these and those that
    /// are taken. Gives the registers, which belong on the bus, and interrupt by `line`.
    pub(super) fn open(
        &self,
        segment: Segment,
        free: u32,
        line: Arc<dyn InterruptLevel>,
        events: &Arc<Events>,
    ) -> Arc<PciHotplug> {
        let keeper = Arc::new(Keeper {
            segment,
            low: self.low.clone(),
            events: events.clone(),
        });
        let registers = Arc::new(PciHotplug::new(line, keeper));
        let mut state = self.low.state();
        let mut open = free;
        let here = |slot: &&RootSlot| slot.segment == segment && slot.device.number() < LOW_SLOTS;
        for slot in state.taken.keys().filter(here) {
            open |= bit(slot.device);
            registers.prepare(slot.device.number());
        }
        state.open.insert(segment, open);
        drop(state);
        lock(&self.registers).insert(segment, registers.clone());
        registers
    }

    /// Bit n: a device can come to slot n of bus 0 of `segment`, and leave it.
    pub(super) fn open_slots(&self, segment: Segment) -> u32 {
        self.low.state().open(segment)
    }

    /// How many slots of bus 0 a device could come to now, of all segments.
    pub(super) fn free_slots(&self) -> usize {
        let state = self.low.state();
        let segments = state.open.keys();
        segments
            .map(|segment| state.free(*segment).count_ones() as usize)
            .sum()
    }

    /// How many slots of bus 0 this owner's devices have, or are about to have.
    pub(super) fn count(&self, owner: Owner) -> usize {
        let state = self.low.state();
        let slots = state.taken.values();
        slots.filter(|(other, _)| *other == owner).count()
    }

    /// Keeps a free slot of bus 0 for a device that is on its way: the one that is asked for, or the first.
    pub(super) fn claim(&self, owner: Owner, place: PciPlace) -> Option<RootSlot> {
        let mut state = self.low.state();
        let segment = place.segment();
        let free = state.free(segment);
        let device = match place.device() {
            Some(device) => Some(device).filter(|device| free & bit(*device) != 0),
            None => Device::new(free.trailing_zeros() as u8),
        };
        let slot = RootSlot {
            segment,
            device: device?,
        };
        state.taken.insert(slot, (owner, Occupant::Coming));
        Some(slot)
    }

    /// The device that a slot of bus 0 was kept for does not come.
    pub(super) fn give_up(&self, seat: Seat) {
        let Seat::Low(slot) = seat else {
            return;
        };
        let mut state = self.low.state();
        if let Some((_, Occupant::Coming)) = state.taken.get(&slot) {
            state.taken.remove(&slot);
        }
    }

    /// The function is in `slot` of bus 0 from now on.
    pub(super) fn take(&self, slot: RootSlot, owner: Owner, function: FunctionId) {
        let mut state = self.low.state();
        state
            .taken
            .insert(slot, (owner, Occupant::Function(function)));
    }

    /// Tells the guest of what has come into `slot` of bus 0.
    pub(super) fn tell(&self, slot: RootSlot) {
        if let Some(registers) = self.registers_of(slot) {
            registers.plugged(slot.device.number());
        }
    }

    /// The slots of bus 0 whose devices, `owner`'s, the guest has released since the last time. They answer no more,
    /// and are to be [taken out](Self::take_out).
    pub(super) fn released(&self, owner: Owner) -> Vec<RootSlot> {
        let mut state = self.low.state();
        let mut slots = Vec::new();
        for (slot, (other, occupant)) in &mut state.taken {
            if let Occupant::Released { reported, .. } = occupant
                && *other == owner
                && !std::mem::replace(reported, true)
            {
                slots.push(*slot);
            }
        }
        slots
    }

    /// Whether the guest could be asked for what is there: something tells it, and it listens, as far as that can be
    /// known. Of a guest's driver for ACPI nothing is known.
    pub(super) fn attended(&self, seat: Seat) -> bool {
        match seat {
            Seat::Port(port) => self.topology.with_slot(port, |slot| slot.attended()) == Some(true),
            Seat::Low(slot) => self.registers_of(slot).is_some(),
        }
    }

    /// Whether what is there has power, which a guest switches at a root port only.
    pub(super) fn powered(&self, seat: Seat) -> bool {
        match seat {
            Seat::Port(port) => self.topology.with_slot(port, |slot| slot.powered()) != Some(false),
            Seat::Low(_) => true,
        }
    }

    /// Whether it is the slot of a root port that has this number.
    pub(super) fn is_of_port(&self, seat: Seat, number: u16) -> bool {
        match seat {
            Seat::Port(port) => {
                self.topology.with_slot(port, |slot| slot.slot() == number) == Some(true)
            }
            Seat::Low(_) => false,
        }
    }

    /// Whether the device can be changed without the guest missing it.
    pub(super) fn is_steady(&self, seat: Seat) -> bool {
        match seat {
            Seat::Port(port) => self.topology.with_slot(port, |slot| slot.steady()) != Some(false),
            // The registers keep what a guest has not seen.
            Seat::Low(_) => true,
        }
    }

    /// Asks the guest to release what is there, by the slot's button or by ACPI. Whether it could be.
    pub(super) fn ask(&self, seat: Seat) -> bool {
        match seat {
            Seat::Port(port) => {
                self.topology.with_slot(port, |slot| slot.press_button()) == Some(true)
            }
            Seat::Low(slot) => {
                let registers = self.registers_of(slot);
                let number = slot.device.number();
                registers.map(|registers| registers.ask(number)).is_some()
            }
        }
    }

    /// Takes back what the guest was asked, for its time is up. Whether it had not seen that yet, as far as it
    /// can be known.
    pub(super) fn withdraw(&self, seat: Seat) -> bool {
        match seat {
            Seat::Port(_) => false,
            Seat::Low(slot) => self
                .registers_of(slot)
                .is_none_or(|registers| registers.withdraw(slot.device.number())),
        }
    }

    /// Takes out all functions of a seat, so that nothing answers there, and gives them to the caller, to be dropped.
    /// Waits for what a vCPU had one carry out, such as a reset, and until no vCPU has one any more.
    ///
    /// Where the guest has not released a device of bus 0, the slot stays taken until it does, or starts anew: it is
    /// asked to, so that its driver looks and finds the device gone.
    pub(super) fn take_out(&self, seat: Seat) -> Vec<Arc<dyn PciFunction>> {
        let slot = match seat {
            Seat::Port(port) => return alone(self.topology.unplug(port)),
            Seat::Low(slot) => slot,
        };
        let registers = self.registers_of(slot);
        let (functions, left_behind) = self.low.take_out(slot, registers.is_some());
        if let Some(registers) = registers.filter(|_| left_behind) {
            registers.ask(slot.device.number());
        }
        alone(functions)
    }

    /// The guest starts anew, and finds what is there: all that was to leave has been taken out.
    pub(super) fn restart(&self) {
        let mut state = self.low.state();
        let mut absent = Vec::new();
        state.taken.retain(|slot, (_, occupant)| {
            let stays = !matches!(occupant, Occupant::Absent);
            absent.extend((!stays).then_some(*slot));
            stays
        });
        drop(state);
        for (segment, registers) in &*lock(&self.registers) {
            for slot in absent.iter().filter(|slot| slot.segment == *segment) {
                registers.gone(slot.device.number());
            }
            registers.reset();
        }
    }

    /// The address of a function in its guest, by the bus number that its port has now.
    pub(super) fn address(&self, seat: Seat, number: Function) -> Option<String> {
        let bdf = match seat {
            Seat::Port(port) => {
                let behind = self.topology.behind(port).into_iter();
                let mut addresses = behind.filter_map(|id| self.topology.bdf(id));
                addresses.find(|bdf| bdf.function == number)?
            }
            Seat::Low(slot) => slot.bdf(number),
        };
        Some(bdf.to_string())
    }

    /// The functions that guests have released, and nobody has taken out yet: the machine ends.
    pub(super) fn clear(&self) -> Vec<Arc<dyn PciFunction>> {
        let taken = std::mem::take(&mut self.low.state().taken);
        let functions = taken.into_values().map(|(_, occupant)| match occupant {
            Occupant::Released { functions, .. } => functions,
            _ => Vec::new(),
        });
        functions.flatten().collect()
    }

    /// The registers, where they tell of this slot.
    fn registers_of(&self, slot: RootSlot) -> Option<Arc<PciHotplug>> {
        let open = self.open_slots(slot.segment) & bit(slot.device) != 0;
        let registers = lock(&self.registers).get(&slot.segment).cloned();
        registers.filter(|_| open)
    }
}

/// Why a guest does not release what is in a slot of bus 0, by the status of `_OST`. ACPI 6.5 §6.3.5, table 6.53
pub(super) fn refusal(status: u8) -> String {
    let why = match status {
        0x80 => "it cannot release such a device",
        0x81 => "it uses the device",
        0x82 => "the device is busy",
        0x83 => "what depends on the device is busy",
        _ => "it gives no reason",
    };
    format!("the guest refuses to release it: {why} (status {status:#x} of _OST)")
}

/// The slots of bus 0.
#[derive(Debug)]
struct LowSlots {
    topology: Arc<Topology>,
    /// Held while a function is taken out, which can take as long as its reset: by who is to have it, and by the vCPU
    /// whose guest releases it, so that one of the two does.
    changing: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// By segment, bit n: a device can come to slot n, and leave it.
    open: BTreeMap<Segment, u32>,
    taken: BTreeMap<RootSlot, (Owner, Occupant)>,
}

impl State {
    fn open(&self, segment: Segment) -> u32 {
        self.open.get(&segment).copied().unwrap_or(0)
    }

    /// Bit n: slot n of the segment is open, and nothing is in it or on its way.
    fn free(&self, segment: Segment) -> u32 {
        let taken = self.taken.keys().filter(|slot| slot.segment == segment);
        taken.fold(self.open(segment), |open, slot| open & !bit(slot.device))
    }
}

/// What is in a slot.
#[derive(Debug)]
enum Occupant {
    /// It is kept for a device that is on its way.
    Coming,
    Function(FunctionId),
    /// The guest has released them, and they wait for their owner. Nobody else has them, but for an access that a vCPU
    /// began before.
    Released {
        functions: Vec<Arc<dyn PciFunction>>,
        /// The owner knows.
        reported: bool,
    },
    /// Nothing, and the guest has not released what it had there.
    Absent,
}

impl LowSlots {
    /// Takes out what is in `slot`. Whether the guest has not released it, where it can (`releases`): the slot stays
    /// taken then.
    fn take_out(&self, slot: RootSlot, releases: bool) -> (Vec<Arc<dyn PciFunction>>, bool) {
        let _one = lock(&self.changing);
        let mut state = self.state();
        let Some((_, occupant)) = state.taken.get_mut(&slot) else {
            return (Vec::new(), false);
        };
        match occupant {
            Occupant::Coming | Occupant::Absent => (Vec::new(), false),
            Occupant::Released { functions, .. } => {
                let functions = std::mem::take(functions);
                state.taken.remove(&slot);
                (functions, false)
            }
            Occupant::Function(function) => {
                let function = *function;
                if releases {
                    *occupant = Occupant::Absent;
                } else {
                    state.taken.remove(&slot);
                }
                drop(state);
                (self.topology.remove(function), releases)
            }
        }
    }

    /// The guest has released what is in `slot`. Whether its owner is to hear of it.
    fn release(&self, slot: RootSlot) -> bool {
        let _one = lock(&self.changing);
        let mut state = self.state();
        let function = match state.taken.get(&slot) {
            Some((_, Occupant::Function(function))) => *function,
            Some((_, Occupant::Absent)) => {
                state.taken.remove(&slot);
                return false;
            }
            _ => return false,
        };
        drop(state);
        let functions = self.topology.remove(function);
        if let Some((_, occupant)) = self.state().taken.get_mut(&slot) {
            *occupant = Occupant::Released {
                functions,
                reported: false,
            };
        }
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

/// What hears the guest.
#[derive(Debug)]
struct Keeper {
    segment: Segment,
    low: Arc<LowSlots>,
    events: Arc<Events>,
}

impl SlotKeeper for Keeper {
    fn eject(&self, slot: u8) {
        let slot = self.slot(slot);
        if slot.is_some_and(|slot| self.low.release(slot)) {
            self.events.ejected();
        }
    }

    fn refused(&self, slot: u8, status: u8) {
        if let Some(slot) = self.slot(slot) {
            self.events.refused(slot, status);
        }
    }
}

impl Keeper {
    fn slot(&self, number: u8) -> Option<RootSlot> {
        let segment = self.segment;
        Device::new(number).map(|device| RootSlot { segment, device })
    }
}

/// The bit of a slot of bus 0.
const fn bit(device: Device) -> u32 {
    1 << device.number()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until nobody else has these functions. A vCPU in the middle of an access has the one that it accesses; who is
/// the last to have one resets and closes its device, which takes the kernel's time.
fn alone(functions: Vec<Arc<dyn PciFunction>>) -> Vec<Arc<dyn PciFunction>> {
    let begun = Instant::now();
    let is_shared = |function: &Arc<dyn PciFunction>| Arc::strong_count(function) > 1;
    while functions.iter().any(is_shared) {
        if begun.elapsed() > PATIENCE {
            log::warn!("a vCPU does not end its access to a device that is taken out");
            break;
        }
        thread::sleep(PAUSE);
    }
    functions
}
