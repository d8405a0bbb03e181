//! What vCPU threads tell the event loop.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::{RootSlot, SlotListener};
use busway_vfio::EventFd;

use crate::devices::PowerSink;
use crate::devices::cpu_hotplug::CpuKeeper;
use crate::devices::memory_hotplug::MemoryKeeper;
use crate::kvm::{EventSink, VcpuEvent};

/// Something that the machine has to decide.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest asked for a reset by a register.
    Reset,
    /// The guest turned itself off.
    PowerOff,
    /// The guest switched a slot's power.
    SlotPower {
        /// The slot.
        slot: u16,
        /// On or off.
        on: bool,
    },
    /// The guest is done with what it was at with a slot.
    SlotSteady {
        /// The slot.
        slot: u16,
    },
    /// A vCPU cannot deal with something.
    Vcpu(VcpuEvent),
    /// The guest has released a processor, which is to be put aside.
    CpuEjected {
        /// Its number.
        cpu: u8,
    },
    /// The guest does not release a processor.
    CpuRefused {
        /// Its number.
        cpu: u8,
        /// Why, by the status of `_OST`.
        status: u8,
    },
    /// The guest says what it made of RAM that has come.
    MemoryReported {
        /// The memory device that tells of it.
        device: u8,
        /// 0 that it uses it, else why it does not, by the status of `_OST`.
        status: u8,
    },
    /// A thread of this process panicked.
    Panicked,
    /// The guest was to be paused: no vCPU is in it any more, and its virtio devices are quiet.
    Stopped,
    /// Devices that were to be attached are ready, or will not be.
    Attached,
    /// The guest has released devices of bus 0, which are out of their slots.
    Ejected,
    /// The guest does not release the device in a slot of bus 0.
    Refused {
        /// The slot of bus 0.
        slot: RootSlot,
        /// Why, by the status of `_OST`.
        status: u8,
    },
}

/// What waits to be decided. Each thing waits once, so a guest cannot make the list long.
#[derive(Debug)]
pub(super) struct Events {
    waiting: Mutex<VecDeque<Event>>,
    signal: EventFd,
}

impl Events {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            waiting: Mutex::default(),
            signal: EventFd::new()?,
        }))
    }

    /// What vCPUs are given.
    pub(super) fn sink(self: &Arc<Self>) -> EventSink {
        let events = self.clone();
        Arc::new(move |event| events.push(Event::Vcpu(event)))
    }

    /// A thread of this process panicked.
    pub(super) fn panicked(&self) {
        self.push(Event::Panicked);
    }

    /// The guest stands still, which was to be paused.
    pub(super) fn stopped(&self) {
        self.push(Event::Stopped);
    }

    /// Devices that were to be attached are ready, or will not be.
    pub(super) fn attached(&self) {
        self.push(Event::Attached);
    }

    /// The guest has released devices of bus 0.
    pub(super) fn ejected(&self) {
        self.push(Event::Ejected);
    }

    /// The guest does not release the device in `slot` of bus 0.
    pub(super) fn refused(&self, slot: RootSlot, status: u8) {
        self.push(Event::Refused { slot, status });
    }

    /// How many wait.
    pub(super) fn count(&self) -> usize {
        self.waiting().len()
    }

    /// The next thing. Nothing is left of the signal with the last one.
    pub(super) fn take(&self) -> Option<Event> {
        let mut waiting = self.waiting();
        let event = waiting.pop_front();
        if waiting.is_empty() {
            let _count = self.signal.take();
        }
        event
    }

    /// Forgets what waits, and was about the guest: it is no more.
    pub(super) fn clear(&self) {
        let stays = |event: &Event| matches!(event, Event::Panicked | Event::Attached);
        self.waiting().retain(stays);
    }

    pub(super) fn push(&self, event: Event) {
        let mut waiting = self.waiting();
        if !waiting.contains(&event) {
            waiting.push_back(event);
            self.signal.signal();
        }
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Event>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PowerSink for Events {
    fn reset(&self) {
        self.push(Event::Reset);
    }

    fn power_off(&self) {
        self.push(Event::PowerOff);
    }
}

impl SlotListener for Events {
    fn power_switched(&self, slot: u16, on: bool) {
        self.push(Event::SlotPower { slot, on });
    }

    fn steadied(&self, slot: u16) {
        self.push(Event::SlotSteady { slot });
    }
}

impl CpuKeeper for Events {
    fn ejected(&self, cpu: u8) {
        self.push(Event::CpuEjected { cpu });
    }

    fn refused(&self, cpu: u8, status: u8) {
        self.push(Event::CpuRefused { cpu, status });
    }
}

impl MemoryKeeper for Events {
    fn reported(&self, device: u8, status: u8) {
        self.push(Event::MemoryReported { device, status });
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.signal.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    #[test]
    fn events_come_in_order_and_each_waits_once() {
        let events = Events::new().unwrap();
        for _ in 0..1000 {
            events.reset();
            events.power_off();
        }
        assert_eq!(events.take(), Some(Event::Reset));
        events.reset();
        assert_eq!(events.take(), Some(Event::PowerOff));
        assert_eq!(events.take(), Some(Event::Reset));
        assert_eq!(events.take(), None);
        events.reset();
        events.clear();
        assert_eq!(events.take(), None);
    }

    #[test]
    fn the_descriptor_is_ready_exactly_while_something_waits() {
        let events = Events::new().unwrap();
        let ready = || {
            let epoll = Epoll::new().unwrap();
            let event = EpollEvent::new(EventSet::IN, 0);
            epoll
                .ctl(ControlOperation::Add, events.as_raw_fd(), event)
                .unwrap();
            epoll.wait(0, &mut [EpollEvent::default()]).unwrap() > 0
        };
        assert!(!ready());
        events.reset();
        events.power_off();
        assert_eq!((events.count(), ready()), (2, true));
        events.take();
        assert!(ready(), "one more waits");
        events.take();
        assert!(!ready());
        // A panic is not the guest's.
        events.panicked();
        events.reset();
        events.clear();
        assert_eq!(
            (events.take(), events.take()),
            (Some(Event::Panicked), None)
        );
        // What is cleared leaves its signal to the next look.
        events.reset();
        events.clear();
        assert_eq!(events.take(), None);
        assert!(!ready());
    }
}
