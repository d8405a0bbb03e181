//! The wired interrupt of a function: when its pin has a way to the guest.
//!
//! A pin's level is between the device and the interrupt controller.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::complaints::Complaints;
use crate::interrupt::{InterruptLine, InterruptLines, PinOwner, RouteError};
use crate::pin::InterruptPin;

/// A pin could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum PinError {
    /// its line to the guest cannot be had: {0}
    #[error("its line to the guest cannot be had: {0}")]
    Line(#[from] RouteError),
    /// {0}
    #[error("{0}")]
    Device(#[source] std::io::Error),
}

/// The version of [`IntxState`] that is written and read. It changes with the meaning of a field.
const VERSION: u16 = 1;

/// What a function's pin remembers. The level is the device's, and whether an interrupt is under way the
/// interrupt controller's; neither is here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IntxState {
    /// The version of this structure.
    pub version: u16,
    /// Which pin it is.
    pub pin: InterruptPin,
    /// The function uses neither MSI nor MSI-X, so that the pin is to have a way to the guest.
    pub wanted: bool,
}

/// A saved state is none that this pin can go on from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IntxStateError {
    /// it was saved in version {0} of the format, and this Busway knows 1
    #[error("it was saved in version {0} of the format, and this Busway knows {VERSION}")]
    Version(u16),
    /// it is {saved}'s, and the function has {own}
    #[error("it is {saved}'s, and the function has {own}")]
    Pin {
        /// The pin that was saved.
        saved: InterruptPin,
        /// The function's.
        own: InterruptPin,
    },
}

/// The wired interrupt of a function whose device masks itself when it has signalled. PCIe 6.0
/// §6.1.2.
///
/// The pin has a way to the guest while neither MSI nor MSI-X is enabled (§6.1.4), from the state at
/// reset on. The command register's interrupt disable bit (§7.5.1.1.3) is the device's to heed, and
/// takes nothing down: a guest may turn it at each interrupt. It belongs to the function that has it
/// and is locked with it.
#[derive(Debug)]
pub struct Intx {
    state: IntxState,
    lines: Arc<dyn InterruptLines>,
    line: Option<Arc<dyn InterruptLine>>,
    name: Box<str>,
    complaints: Complaints,
}

impl Intx {
    /// A pin that is not connected yet, of the function called `name` in the log.
    #[must_use]
    pub fn new(
        pin: InterruptPin,
        lines: Arc<dyn InterruptLines>,
        name: impl Into<Box<str>>,
    ) -> Self {
        Self {
            state: IntxState {
                version: VERSION,
                pin,
                wanted: false,
            },
            lines,
            line: None,
            name: name.into(),
            complaints: Complaints::first(1),
        }
    }

    /// Which pin it is.
    #[must_use]
    pub fn pin(&self) -> InterruptPin {
        self.state.pin
    }

    /// What it remembers.
    #[must_use]
    pub fn state(&self) -> IntxState {
        self.state
    }

    /// Goes to a state that was saved: the pin is connected or not, as it was wanted then. Where that fails, it
    /// is as in [`update`](Self::update).
    ///
    /// # Errors
    /// [`IntxStateError`]; nothing has changed then
    pub fn restore(
        &mut self,
        state: &IntxState,
        owner: &mut dyn PinOwner,
    ) -> Result<(), IntxStateError> {
        if state.version != VERSION {
            return Err(IntxStateError::Version(state.version));
        }
        if state.pin != self.pin() {
            return Err(IntxStateError::Pin {
                saved: state.pin,
                own: self.pin(),
            });
        }
        self.update(!state.wanted, owner);
        Ok(())
    }

    /// Whether it has a way to the guest now.
    #[must_use]
    pub fn connected(&self) -> bool {
        self.line.is_some()
    }

    /// Connects the pin; nothing where it is.
    ///
    /// # Errors
    /// [`PinError`]; it stays unconnected.
    pub fn connect(&mut self, owner: &mut dyn PinOwner) -> Result<(), PinError> {
        self.state.wanted = true;
        if self.line.is_none() {
            let line = self.lines.connect(self.state.pin)?;
            owner
                .connect(line.event(), line.resample())
                .map_err(PinError::Device)?;
            self.line = Some(line);
        }
        Ok(())
    }

    /// Disconnects the pin; nothing where it is not. The source stops signalling first; only then do
    /// the eventfds close.
    pub fn disconnect(&mut self, owner: &mut dyn PinOwner) {
        self.state.wanted = false;
        if let Some(line) = self.line.take() {
            owner.disconnect();
            drop(line);
        }
    }

    /// Brings the pin in line with whether the function uses messages, MSI or MSI-X. What fails is
    /// tried again at the next time of calling; the first failure is a warning.
    pub fn update(&mut self, messages: bool, owner: &mut dyn PinOwner) {
        if messages {
            self.disconnect(owner);
        } else if let Err(error) = self.connect(owner) {
            log::log!(
                self.complaints.next(log::Level::Warn),
                "{}: its interrupt pin is not connected: {error}; this is tried again when the \
                 guest next writes the command register",
                self.name
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::fake::{FakeLines, FakePinOwner};

    #[test]
    fn the_source_stops_before_the_line_goes() {
        let lines = Arc::new(FakeLines::default());
        let mut intx = Intx::new(InterruptPin::C, lines.clone(), "test");
        let mut owner = FakePinOwner::watching(&lines);
        intx.update(false, &mut owner);
        intx.update(false, &mut owner);
        assert_eq!((lines.made(), lines.up()), (vec![InterruptPin::C], 1));
        intx.update(true, &mut owner);
        assert_eq!((lines.up(), owner.lines_at_disconnect), (0, vec![1]));
    }

    #[test]
    fn what_the_device_refuses_leaves_no_line_and_is_tried_again() {
        let lines = Arc::new(FakeLines::default());
        let mut intx = Intx::new(InterruptPin::A, lines.clone(), "test");
        let mut owner = FakePinOwner::watching(&lines);
        owner.refuses = true;
        assert!(matches!(intx.connect(&mut owner), Err(PinError::Device(_))));
        assert!(!intx.connected() && lines.up() == 0);
        owner.refuses = false;
        intx.update(false, &mut owner);
        assert!(intx.connected());
        assert!(owner.lines_at_disconnect.is_empty());
    }

    #[test]
    fn a_state_of_another_version_or_pin_is_refused_and_changes_nothing() {
        let lines = Arc::new(FakeLines::default());
        let mut intx = Intx::new(InterruptPin::A, lines.clone(), "test");
        let mut owner = FakePinOwner::watching(&lines);
        let wanted = IntxState {
            wanted: true,
            ..intx.state()
        };
        for (state, error) in [
            (
                IntxState {
                    version: 2,
                    ..wanted
                },
                IntxStateError::Version(2),
            ),
            (
                IntxState {
                    pin: InterruptPin::B,
                    ..wanted
                },
                IntxStateError::Pin {
                    saved: InterruptPin::B,
                    own: InterruptPin::A,
                },
            ),
        ] {
            assert_eq!(intx.restore(&state, &mut owner), Err(error));
            assert!(!intx.connected() && lines.up() == 0);
        }
    }

    proptest! {
        /// However modes change and whatever fails: the pin is connected only while no message is,
        /// the device is told of each change once, and no line is left behind.
        #[test]
        fn a_line_is_there_exactly_while_the_device_was_told_of_it(
            steps in prop::collection::vec((any::<bool>(), any::<bool>(), any::<bool>()), 0..40),
        ) {
            let lines = Arc::new(FakeLines::default());
            let mut intx = Intx::new(InterruptPin::B, lines.clone(), "test");
            let mut owner = FakePinOwner::watching(&lines);
            for (messages, refuses, exhausted) in steps {
                owner.refuses = refuses;
                lines.exhaust(exhausted);
                let before = intx.connected();
                intx.update(messages, &mut owner);
                prop_assert_eq!(intx.connected(), !messages && (before || !refuses && !exhausted));
                prop_assert_eq!(lines.up(), usize::from(intx.connected()));
                prop_assert_eq!(owner.connected, intx.connected());

                // Another function's pin, put into this one's state, is connected as this one is meant to be.
                let other_lines = Arc::new(FakeLines::default());
                let mut other = Intx::new(InterruptPin::B, other_lines.clone(), "other");
                let mut other_owner = FakePinOwner::watching(&other_lines);
                other.update(messages ^ exhausted, &mut other_owner);
                other.restore(&intx.state(), &mut other_owner).unwrap();
                prop_assert_eq!(other.state(), intx.state());
                prop_assert_eq!(other.connected(), !messages);
                prop_assert_eq!(other_owner.connected, other.connected());
            }
        }
    }
}
