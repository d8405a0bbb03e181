//! The device by which a guest tells that it has panicked: QEMU's pvpanic as a PCI function. QEMU,
//! docs/specs/pvpanic.rst.
//!
//! Nothing is done about it but to tell: the log has a line, and whoever reads events an event.

use std::sync::{Mutex, MutexGuard, PoisonError};

use busway_pci::{
    BarError, BarIndex, BarKind, BarRegion, Bars, Complaints, ConfigSpace, Identity, PAGE_SIZE,
    PciFunction,
};

use crate::monitor::{self, Source};

/// The guest has panicked, and does not go on. `PVPANIC_PANICKED`
const PANICKED: u8 = 1 << 0;
/// It has panicked, and a kernel that it has kept for that takes over. `PVPANIC_CRASH_LOADED`
const CRASH_LOADED: u8 = 1 << 1;
/// What is taken, which a read tells.
const EVENTS: u8 = PANICKED | CRASH_LOADED;

/// Events of one start of the guest that are told: there is one, of a guest that means it.
const TOLD: u32 = 4;

/// The function. Its BAR has one register, of a byte.
#[derive(Debug)]
pub struct Pvpanic {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    space: ConfigSpace,
    complaints: Complaints,
}

impl Pvpanic {
    /// The function.
    ///
    /// # Errors
    /// Its BAR cannot be.
    pub fn new() -> Result<Self, BarError> {
        let mut bars = Bars::new();
        let kind = BarKind::Memory64 {
            prefetchable: false,
        };
        // 64-bit, for the room below 4 GiB is the assigned devices'; a page, so that nobody's registers share it.
        bars.add(BarIndex::Bar(0), kind, PAGE_SIZE)?;
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0011,
            revision: 1,
            class: 0x08_80_00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        Ok(Self {
            state: Mutex::new(State {
                space: ConfigSpace::type0(&identity, bars),
                complaints: Complaints::first(TOLD),
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest has written `event`: what it means, where it is told.
    fn event(&self, event: u8) -> Option<&'static str> {
        let word = match event {
            _ if event & PANICKED != 0 => "panic",
            _ if event & CRASH_LOADED != 0 => "crash_loaded",
            _ => return None,
        };
        let level = self.state().complaints.next(log::Level::Warn);
        (level == log::Level::Warn).then_some(word)
    }
}

impl PciFunction for Pvpanic {
    fn name(&self) -> String {
        "pvpanic".to_owned()
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.state().space.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.state().space.write(offset, data);
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.state().space.regions()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        self.state().space.decoded()
    }

    fn bar_read(&self, _bar: BarIndex, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let (Some(register), 0) = (data.first_mut(), offset) {
            *register = EVENTS;
        }
    }

    fn bar_write(&self, _bar: BarIndex, offset: u64, data: &[u8]) {
        let (Some(&event), 0) = (data.first(), offset) else {
            return;
        };
        let Some(word) = self.event(event) else {
            return;
        };
        match word {
            "panic" => log::warn!("the guest tells that it has panicked (pvpanic)"),
            _ => log::warn!(
                "the guest tells that it has panicked, and that its crash kernel takes over (pvpanic)"
            ),
        }
        // Cloud Hypervisor's words.
        monitor::tell(Source::Guest, "panic", &[("event", word)]);
    }

    fn reset(&self) {
        let mut state = self.state();
        state.space.reset();
        state.complaints = Complaints::first(TOLD);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_finds_the_device_and_what_it_takes() {
        let device = Pvpanic::new().unwrap();
        let mut id = [0; 4];
        device.config_read(0, &mut id);
        assert_eq!(u32::from_le_bytes(id), 0x0011_1b36);
        let mut events = [0];
        device.bar_read(BarIndex::Bar(0), 0, &mut events);
        assert_eq!(events, [3]);
    }

    #[test]
    fn a_panic_is_told_and_a_guest_that_panics_for_ever_is_heard_a_few_times() {
        let device = Pvpanic::new().unwrap();
        assert_eq!(device.event(2), Some("crash_loaded"));
        assert_eq!(device.event(1), Some("panic"));
        assert_eq!(device.event(3), Some("panic"), "what does not go on counts");
        assert_eq!(device.event(0), None);
        assert_eq!(device.event(0x84), None);
        assert_eq!(device.event(1), Some("panic"));
        assert_eq!(device.event(1), None);
        device.reset();
        assert_eq!(device.event(1), Some("panic"));
        // Any width, at any place.
        for offset in [0, 1, 4095] {
            device.bar_write(BarIndex::Bar(0), offset, &[]);
            device.bar_write(BarIndex::Bar(0), offset, &[0; 8]);
            device.bar_read(BarIndex::Bar(0), offset, &mut [0; 8]);
        }
    }
}
