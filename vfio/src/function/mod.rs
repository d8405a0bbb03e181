//! A host device as a PCI function of the guest.

mod bars;
mod interrupts;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use busway_pci::pace::{self, Pace};
use busway_pci::{
    Activity, AtomicOps, BarIndex, BarKind, BarPart, BarRegion, InterruptMode, InterruptPin,
    PciFunction, spec,
};

use self::interrupts::{MsiPart, MsixPart, connect_pin};
use crate::access::read_dword;
use crate::aer::is_silent;
use crate::clique::Clique;
use crate::config::{DeferredOutcome, GuestConfig};
use crate::lists::{self, List};
use crate::msix_layout::{DeviceLocation, GuestLocation};
use crate::pin::{InPlaceOfPin, Pin};
use crate::quirks::Quirks;
use crate::resets::ResetHandle;
use crate::rom::Rom;
use crate::survey::{Part, check_header, find_msi, find_msix, map_parts, read_bars};
use crate::{
    Area, AssignOptions, DeviceIo, Placement, RegionIndex, ResetMethod, SurveyError, Wiring,
};

/// A host device, as the guest sees it.
///
/// The device is reset when it becomes a function and when it stops being one, and is quiet then: no
/// interrupt, no bus mastering. The guest's interrupts cost nothing before it unmasks them.
///
/// Its pin is connected while neither MSI nor MSI-X is enabled, from power-on.
#[derive(Debug)]
pub struct AssignedFunction {
    name: String,
    state: Mutex<State>,
    /// What decodes, apart from the state, which is held through resets: who asks holds what all
    /// functions share. Changed while the state is held.
    decoded: Mutex<Vec<BarRegion>>,
    /// Its BARs: which, of what kind, and bytes.
    sizes: Vec<(BarIndex, BarKind, u64)>,
    table: Option<GuestLocation>,
    pba: Option<GuestLocation>,
    device_pba: Option<DeviceLocation>,
    reset: ResetHandle,
    /// What is seen of it without the state's lock.
    activity: Arc<Activity>,
    /// What the guest has the host do about it.
    pace: Pace,
    rom: Option<Rom>,
    // Dropped before the device: a mapping holds it open.
    parts: Vec<Part>,
    io: Arc<dyn DeviceIo>,
}

/// What the guest can change.
#[derive(Debug)]
struct State {
    config: GuestConfig,
    /// The device did not answer when it was last reset, and does not have its state at power-on yet.
    /// It decodes nothing, and is quiet still.
    reset_incomplete: bool,
    pin: Option<Pin>,
    msi: Option<MsiPart>,
    msix: Option<MsixPart>,
}

impl State {
    /// Whether the guest enabled MSI or MSI-X.
    fn uses_messages(&self) -> bool {
        self.msi.as_ref().is_some_and(|state| state.msi.enabled())
            || self.msix.as_ref().is_some_and(|state| state.msix.enabled())
    }

    /// How it interrupts now, and with how many vectors.
    fn interrupts(&self) -> (InterruptMode, usize) {
        let msix = self.msix.as_ref().filter(|part| part.msix.enabled());
        let msi = self.msi.as_ref().filter(|part| part.msi.enabled());
        match (msix, msi) {
            (Some(part), _) => (InterruptMode::Msix, part.msix.connected()),
            (None, Some(part)) => (InterruptMode::Msi, part.msi.connected()),
            (None, None) if self.pin.is_some() && self.config.pin_connected() => {
                (InterruptMode::Pin, 1)
            }
            (None, None) => (InterruptMode::None, 0),
        }
    }

    /// Brings the pin in line with the registers.
    fn update_pin(&mut self) {
        let messages = self.uses_messages();
        if let Some(pin) = &mut self.pin {
            pin.update(messages, &mut self.config);
        }
    }
}

/// A way to look at a function, for as long as anybody likes: the device may be gone meanwhile.
#[derive(Clone, Debug)]
pub struct AssignedSight {
    /// What the guest asks of it, and how it interrupts.
    pub activity: Arc<Activity>,
    /// Vectors that the guest can have: of MSI-X, else of MSI.
    pub vectors: u16,
    /// Bytes of BARs that the guest reaches without an exit.
    pub direct_bytes: u64,
}

/// What a function uses, for reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// The device.
    pub name: String,
    /// Vectors that have a way to the guest now.
    pub vectors_connected: usize,
    /// Vectors that the guest can have: of MSI-X, else of MSI.
    pub vectors: usize,
    /// Its interrupt pin, and whether that has a way to the guest now.
    pub pin: Option<(InterruptPin, bool)>,
    /// The parts of BARs that the guest reaches without an exit: BAR, offset, bytes.
    pub mapped: Vec<(u8, u64, u64)>,
    /// How it is reset.
    pub reset: ResetMethod,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direct: u64 = self.mapped.iter().map(|(_, _, size)| size).sum();
        let Self { name, vectors, .. } = self;
        write!(f, "{name}: {vectors} vectors, ")?;
        if let Some((pin, _)) = self.pin {
            write!(f, "{pin}, ")?;
        }
        write!(
            f,
            "{} KiB of BARs without exits, reset by {}",
            direct >> 10,
            self.reset
        )
    }
}

/// The lists of capabilities that the guest walks, of those that the device has.
fn capabilities(io: &dyn DeviceIo, placement: Placement) -> (List, List) {
    let dword = |offset| read_dword(io, offset);
    let own = |offset| io.own_config(offset).unwrap_or(0);
    let mut standard = lists::standard(&dword, &own);
    let size = io.region(RegionIndex::CONFIG).size;
    let mut extended = if size > u64::from(spec::EXTENDED_CONFIG_START) {
        lists::extended(&dword, &own)
    } else {
        List::default()
    };
    if placement == Placement::RootBus {
        lists::integrate(&dword, &mut standard, &mut extended);
    }
    (standard, extended)
}

impl AssignedFunction {
    /// Resets the device behind `io`, called `name` in messages (its address on the host), and makes
    /// a function of it that is connected to its guest by `wiring`.
    ///
    /// # Errors
    /// [`SurveyError`]
    pub fn new(
        name: &str,
        io: Arc<dyn DeviceIo>,
        wiring: Wiring,
        options: &AssignOptions,
    ) -> Result<Arc<Self>, SurveyError> {
        let Wiring {
            routes,
            lines,
            resets,
            clock,
            placement,
        } = wiring;
        let AssignOptions {
            rom,
            nv_gpudirect_clique,
        } = options;
        let reset = resets.join(name, &io);
        check_header(name, &*io)?;
        let quirks = Quirks::of(&*io);
        let rom = Rom::new(name, &*io, rom, quirks.hides_rom());
        let bars = read_bars(&*io, rom.as_ref()).map_err(|source| SurveyError::Bar {
            name: name.to_owned(),
            source,
        })?;
        let (mut standard, extended) = capabilities(&*io, placement);
        let msi = find_msi(name, &*io, &mut standard);
        let layout = find_msix(name, &*io, &mut standard, &bars.regions(), &quirks);
        let clique = nv_gpudirect_clique
            .map(|number| Clique::add(name, &*io, number, &mut standard))
            .transpose()?;
        let parts = map_parts(name, &*io, &bars.regions(), layout.as_ref());
        let sizes = bars.regions().into_iter();
        let sizes = sizes.map(|bar| (bar.index, bar.kind, bar.size)).collect();
        let mut config = GuestConfig::new(&*io, bars, &standard, &extended, placement);
        for (start, end) in quirks.registers() {
            config.pass(start, end);
        }
        if let Some(clique) = clique {
            clique.show(&mut config);
        }
        let msi = msi.map(|found| MsiPart::new(name, &io, found, routes.clone(), &mut config));
        let msix = layout.map(|found| MsixPart::new(name, &io, found, routes, &mut config));
        config.quieten(&*io);
        let has_messages = msi.is_some() || msix.is_some();
        let pin = connect_pin(name, &io, lines, &mut config, has_messages)?;
        let layout = layout.map(|(_, layout)| layout);
        let function = Self {
            name: name.to_owned(),
            decoded: Mutex::new(config.decoded()),
            state: Mutex::new(State {
                config,
                reset_incomplete: false,
                pin,
                msi,
                msix,
            }),
            sizes,
            table: layout.map(|layout| layout.table()),
            pba: layout.map(|layout| layout.pba()),
            device_pba: layout.map(|layout| layout.device_pba()),
            reset,
            activity: Arc::default(),
            pace: Pace::new(name, clock),
            rom,
            parts,
            io,
        };
        function.note_interrupts(&function.lock());
        Ok(Arc::new(function))
    }

    /// The device's name in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Which of the device's AtomicOps the host carries out at its root port.
    #[must_use]
    pub fn atomic_ops(&self) -> AtomicOps {
        self.io.atomic_ops()
    }

    /// How it is reset, as things are. Waits for nothing, also while it is being reset.
    #[must_use]
    pub fn reset_method(&self) -> ResetMethod {
        self.reset.method()
    }

    /// What it uses now. Waits for a reset of it that goes on.
    #[must_use]
    pub fn summary(&self) -> Summary {
        let state = self.lock();
        let msi = state.msi.as_ref();
        let msix = state.msix.as_ref();
        Summary {
            name: self.name.clone(),
            vectors_connected: msi.map_or(0, |state| state.msi.connected())
                + msix.map_or(0, |state| state.msix.connected()),
            vectors: match (msix, msi) {
                (Some(state), _) => state.msix.vectors().into(),
                (None, Some(state)) => state.msi.vectors().into(),
                (None, None) => 0,
            },
            pin: state
                .pin
                .as_ref()
                .map(|pin| (pin.pin(), state.config.pin_connected())),
            mapped: self
                .parts
                .iter()
                .map(|part| (part.bar, part.area.offset, part.area.size))
                .collect(),
            reset: self.reset.method(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A way to look at the function, which keeps nothing of it and waits for nothing.
    #[must_use]
    pub fn sight(&self) -> AssignedSight {
        let state = self.lock();
        let (msi, msix) = (state.msi.as_ref(), state.msix.as_ref());
        AssignedSight {
            activity: Arc::clone(&self.activity),
            vectors: match (msix, msi) {
                (Some(part), _) => part.msix.vectors(),
                (None, Some(part)) => part.msi.vectors().into(),
                (None, None) => 0,
            },
            direct_bytes: self.parts.iter().map(|part| part.area.size).sum(),
        }
    }

    /// Notes how it interrupts now.
    fn note_interrupts(&self, state: &State) {
        let (mode, connected) = state.interrupts();
        self.activity.interrupts_by(mode, connected);
    }

    /// Notes what decodes now, and how it interrupts.
    fn note_decoded(&self, state: &State) {
        self.note_interrupts(state);
        let decoded = match state.reset_incomplete {
            true => Vec::new(),
            false => state.config.decoded(),
        };
        *self.decoding() = decoded;
    }

    /// The guest pays for a change of the device's power state, from what it was.
    fn charge_power(&self, state: &State, was_asleep: bool) {
        let changes = u32::from(state.config.is_asleep() != was_asleep);
        self.pace.charge(pace::SWITCH, changes);
    }

    fn decoding(&self) -> MutexGuard<'_, Vec<BarRegion>> {
        self.decoded.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects no interrupt any more. The device is awake then: the kernel masks MSI-X's vectors in the
    /// table, which a sleeping device does not answer for, and the host would hear of an error.
    fn disconnect(&self, state: &mut State) {
        state.config.wake(&*self.io);
        if let Some(MsixPart { msix, vectors, .. }) = &mut state.msix {
            msix.reset(vectors);
        }
        if let Some(MsiPart { msi, vectors, .. }) = &mut state.msi {
            msi.reset(vectors);
        }
        if let Some(pin) = &mut state.pin {
            pin.disconnect(&mut state.config);
            state.config.disable_pin(&*self.io);
        }
    }

    /// Makes the device quiet, has `reset` reset it, and puts everything of ours into its state at
    /// power-on, with no interrupt connected.
    fn reset_by(&self, state: &mut State, reset: impl FnOnce(&ResetHandle)) {
        self.decoding().clear();
        self.disconnect(state);
        // The kernel puts back what the command register holds before: bus mastering goes first.
        state.config.quieten(&*self.io);
        state.reset_incomplete = is_silent(&*self.io);
        reset(&self.reset);
        state.config.reset(&*self.io);
    }

    /// The guest will not use the device again: it is made quiet, and reset where the kernel does not
    /// when it is closed. Devices that are reset together are all told so before the first is dropped.
    pub fn retire(&self) {
        let mut state = self.lock();
        match self.reset.is_used() {
            true => self.reset_by(&mut state, ResetHandle::retire),
            false => self.disconnect(&mut state),
        }
        self.note_interrupts(&state);
    }
}

impl PciFunction for AssignedFunction {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn activity(&self) -> Option<&Activity> {
        Some(&self.activity)
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        let state = self.lock();
        state.config.read(&*self.io, offset, data);
        if let Some(MsiPart { at, msi, .. }) = &state.msi
            && let Some(offset) = offset.checked_sub(*at)
        {
            msi.read(offset, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.lock();
        if state.reset_incomplete && !is_silent(&*self.io) {
            // The kernel saved what it read then, and put that back when the bus was reset.
            state.reset_incomplete = false;
            self.disconnect(&mut state);
            state.config.reset(&*self.io);
        }
        if !state.reset_incomplete {
            self.reset.touch();
        }
        let (messages, asleep) = (state.uses_messages(), state.config.is_asleep());
        let State {
            config,
            pin,
            msi,
            msix,
            ..
        } = &mut *state;
        config.write(&*self.io, offset, data);
        if let Some(MsiPart { at, msi, vectors }) = msi
            && let Some(offset) = offset.checked_sub(*at)
        {
            let pin = pin.as_mut();
            let vectors = &mut InPlaceOfPin {
                vectors,
                pin,
                config,
                pace: &self.pace,
            };
            msi.write(offset, data, vectors);
        }
        if let Some(MsixPart { at, msix, vectors }) = msix {
            let control: u16 = config.held(at.saturating_add(spec::MSIX_CONTROL));
            // The kernel masks vectors in the table, which a sleeping device does not answer for. It sends no message
            // either, and what the guest wrote is carried out by the write that wakes it.
            if control != msix.control() && !config.is_asleep() {
                let pin = pin.as_mut();
                let vectors = &mut InPlaceOfPin {
                    vectors,
                    pin,
                    config,
                    pace: &self.pace,
                };
                msix.write_control(control, vectors);
            }
        }
        let command = (spec::COMMAND..spec::COMMAND + 2).contains(&offset);
        if command || state.uses_messages() != messages {
            state.update_pin();
        }
        if messages && !state.uses_messages() && state.pin.is_some() {
            state.config.disable_pin(&*self.io);
        }
        self.note_decoded(&state);
        self.charge_power(&state, asleep);
        drop(state);
        self.pace.pay();
    }

    fn run_deferred(&self) -> bool {
        let mut state = self.lock();
        let asleep = state.config.is_asleep();
        let outcome = state.config.run_deferred(&*self.io);
        if outcome == DeferredOutcome::Reset {
            self.reset_by(&mut state, ResetHandle::reset_function);
            state.update_pin();
            self.pace.charge(pace::RESET, 1);
        }
        self.note_decoded(&state);
        self.charge_power(&state, asleep);
        drop(state);
        self.pace.pay();
        outcome == DeferredOutcome::Decodes
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.lock().config.bars()
    }

    fn bar_sizes(&self) -> Vec<(BarIndex, BarKind, u64)> {
        self.sizes.clone()
    }

    fn decoded(&self) -> Vec<BarRegion> {
        self.decoding().clone()
    }

    fn parts(&self, bar: BarIndex) -> Vec<BarPart> {
        self.parts_of(bar)
    }

    fn is_peer(&self) -> bool {
        !self.io.is_mediated()
    }

    fn dma_buf(&self, bar: BarIndex, offset: u64, size: u64) -> Option<io::Result<OwnedFd>> {
        let BarIndex::Bar(number) = bar else {
            return None;
        };
        let index = RegionIndex::bar(number)?;
        Some(self.io.dma_buf(index, Area { offset, size }))
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.read_bar(bar, offset, data);
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.write_bar(bar, offset, data);
    }

    fn reset(&self) {
        let mut state = self.lock();
        self.reset_by(&mut state, ResetHandle::reset);
        // One that is reset with others as well stays quiet till they are: its pin is connected by the
        // next write to the command register, without which the device has nothing to tell.
        if !self.reset.is_shared() {
            state.update_pin();
        }
        self.note_decoded(&state);
        drop(state);
        self.pace.charge(pace::RESET, 1);
        self.pace.pay();
    }
}

impl Drop for AssignedFunction {
    fn drop(&mut self) {
        self.retire();
    }
}

#[cfg(test)]
mod bus_tests;
#[cfg(test)]
mod options_tests;
#[cfg(test)]
mod tests;
