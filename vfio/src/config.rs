//! The guest's view of a device's configuration space: for each bit, whether the device answers or
//! Busway does. Built once from the policy's table and the device's lists.

use busway_pci::{Bars, ConfigSpace, Identity, InterruptPin, spec};

use crate::access::{read_byte, read_dword, write_aligned};
use crate::aer::is_silent;
use crate::lists::{Kept, List};
use crate::policy::{
    self, Action, EXP_TYPE, EXP_TYPE_ENDPOINT, EXP_TYPE_INTEGRATED_ENDPOINT, Rule,
};
use crate::power::Power;
use crate::{DeviceIo, Placement, RegionIndex};

const SIZE: usize = spec::CONFIG_SPACE_SIZE as usize;

/// 2.5 GT/s and one lane: in link capabilities and link status alike. PCIe 6.0 §7.5.3.6
const EXP_SLOWEST_LINK: u32 = 1 | 1 << spec::EXP_LINK_WIDTH_SHIFT;

/// One byte's bits, by who answers for them.
#[derive(Clone, Copy, Debug, Default)]
struct Source {
    /// Read from the device.
    read: u8,
    /// Written to the device.
    write: u8,
    /// Neither, and the device keeps what it has: the guest writes a copy.
    keep: u8,
}

/// Where the guest asks for a function level reset.
#[derive(Clone, Copy, Debug)]
struct ResetBit {
    offset: u16,
    mask: u8,
}

/// What the guest sees of a configuration space, and what it changed of Busway's part.
#[derive(Debug)]
pub(crate) struct GuestConfig {
    /// Busway's bits. What it holds where the device answers means nothing.
    overlay: ConfigSpace,
    sources: Vec<Source>,
    reset_bits: Vec<ResetBit>,
    /// A function level reset was asked for, and comes when nothing of the device is mapped.
    reset_wanted: bool,
    power: Option<Power>,
    /// What registers held at power-on that the guest writes in the device: where, what, which bits.
    fresh: Vec<(u16, u8, u8)>,
    /// What stays in the device's command register whatever the guest writes: decoding, which is on,
    /// and whether it signals errors, which is as the host has it.
    constant: u16,
    /// The guest's interrupt disable bit is told to the device; else it is disabled there.
    pin_connected: bool,
}

impl GuestConfig {
    /// The view of the device behind `io`, whose BARs and lists are these, and which is `placement` in the guest.
    pub(crate) fn new(
        io: &dyn DeviceIo,
        bars: Bars,
        standard: &List,
        extended: &List,
        placement: Placement,
    ) -> Self {
        let size = io.region(RegionIndex::CONFIG).size;
        let passed = Source {
            read: u8::MAX,
            write: u8::MAX,
            keep: 0,
        };
        let absent = Source::default();
        let regions = bars.regions();
        let has = |io: bool| {
            let mut kinds = regions.iter().map(|region| region.kind);
            kinds.any(|kind| (kind == busway_pci::BarKind::Io) == io)
        };
        let bit = |set, bit| if set { bit } else { 0 };
        let mut config = Self {
            overlay: ConfigSpace::type0(&Identity::default(), bars),
            sources: (0..SIZE as u64)
                .map(|at| if at < size { passed } else { absent })
                .collect(),
            reset_bits: Vec::new(),
            reset_wanted: false,
            power: None,
            fresh: Vec::new(),
            constant: bit(has(true), spec::COMMAND_IO)
                | bit(has(false), spec::COMMAND_MEMORY)
                | read_dword(io, spec::COMMAND) as u16 & spec::COMMAND_SERR,
            pin_connected: false,
        };
        for rule in policy::HEADER {
            config.apply(io, 0, spec::HEADER_SIZE, rule);
        }
        // Written whenever the device is quietened.
        config.fresh.retain(|(at, ..)| !is_command(*at));
        for extent in standard.hidden.iter().chain(&extended.hidden) {
            config.hide(extent.start, extent.end);
        }
        config.link_standard(standard);
        config.link_extended(extended);
        for kept in standard.kept.iter().chain(&extended.kept) {
            for rule in kept.rules {
                config.apply(io, kept.extent.start, kept.extent.end, rule);
            }
            if kept.read_only {
                config.protect(kept.extent.start, kept.extent.end);
            }
        }
        config.protect_unlisted_extended(extended);
        if let Some(express) = standard.find(spec::CAP_PCI_EXPRESS.into()) {
            config.adapt_express(io, express, placement);
        }
        if let Some(features) = standard.find(spec::CAP_ADVANCED_FEATURES.into())
            && read_dword(io, features.extent.start) & policy::AF_CAPABILITIES_FLR != 0
        {
            config.reset_bits.push(ResetBit {
                offset: features.extent.start.saturating_add(4),
                mask: policy::AF_CONTROL_FLR as u8,
            });
        }
        config.power = standard
            .find(spec::CAP_POWER_MANAGEMENT.into())
            .map(|power| Power::new(power.extent.start));
        config
    }

    /// Makes the bytes from `start` to before `end` Busway's, all zero.
    pub(crate) fn hide(&mut self, start: u16, end: u16) {
        let span = usize::from(start)..usize::from(end).min(SIZE);
        for source in self.sources.get_mut(span).into_iter().flatten() {
            *source = Source::default();
        }
    }

    /// Gives Busway's part of a register its value, and the bits that the guest can change.
    pub(crate) fn define<R: busway_pci::Register>(&mut self, offset: u16, value: R, writable: R) {
        self.overlay.define(offset, value, writable);
    }

    /// Busway's part of a register.
    pub(crate) fn held<R: busway_pci::Register>(&self, offset: u16) -> R {
        self.overlay.get(offset)
    }

    /// Keeps the guest from writing the bytes from `start` to before `end`.
    fn protect(&mut self, start: u16, end: u16) {
        let span = usize::from(start)..usize::from(end).min(SIZE);
        for source in self.sources.get_mut(span).into_iter().flatten() {
            source.write = 0;
        }
    }

    /// Lets the guest write the bytes from `start` to before `end`, where they are the device's.
    pub(crate) fn pass(&mut self, start: u16, end: u16) {
        let span = usize::from(start)..usize::from(end).min(SIZE);
        for source in self.sources.get_mut(span).into_iter().flatten() {
            source.write = source.read;
        }
    }

    /// Keeps the guest from writing what is of no capability in the extended list.
    fn protect_unlisted_extended(&mut self, extended: &List) {
        let mut extents: Vec<_> = extended.kept.iter().map(|kept| kept.extent).collect();
        extents.sort_by_key(|extent| extent.start);
        let mut start = spec::EXTENDED_CONFIG_START;
        for extent in extents {
            self.protect(start, extent.start);
            start = extent.end;
        }
        self.protect(start, spec::CONFIG_SPACE_SIZE);
    }

    fn apply(&mut self, io: &dyn DeviceIo, base: u16, end: u16, rule: &Rule) {
        let start = base.saturating_add(rule.offset);
        let held = match rule.action {
            Action::Pass | Action::Shadow => read_dword(io, start).to_le_bytes(),
            _ => [0; 4],
        };
        let bytes = (start..end.min(spec::CONFIG_SPACE_SIZE)).zip(rule.mask.to_le_bytes());
        for ((at, mask), held) in bytes.zip(held) {
            let Some(source) = self.sources.get_mut(usize::from(at)) else {
                return;
            };
            match rule.action {
                Action::Pass if mask != 0 => self.fresh.push((at, held & mask, mask)),
                Action::Pass | Action::Clear => {}
                Action::ReadOnly => source.write &= !mask,
                Action::Emulate | Action::Shadow | Action::Hide => {
                    source.read &= !mask;
                    source.write &= !mask;
                }
            }
            if rule.action == Action::Shadow && mask != 0 {
                source.keep |= mask;
                self.overlay.define(at, held, mask);
            }
        }
    }

    fn link_standard(&mut self, list: &List) {
        let first = list.kept.first().map_or(0, |kept| kept.extent.start);
        self.define(spec::CAPABILITIES_POINTER, first as u8, 0);
        let bit = if first == 0 {
            0
        } else {
            spec::STATUS_CAPABILITIES
        };
        self.define(spec::STATUS, bit, 0);
        for (kept, next) in list.links() {
            let start = kept.extent.start;
            self.hide(start, start.saturating_add(2));
            self.define(start, kept.id | next << 8, 0);
        }
    }

    /// The list has to begin at 0x100. Where what is there is hidden, a null capability leads on to
    /// the rest. PCIe 6.0 §7.6.3, §7.9.28
    fn link_extended(&mut self, list: &List) {
        let start = spec::EXTENDED_CONFIG_START;
        let first = list.kept.first().map_or(0, |kept| kept.extent.start);
        if first != start {
            self.hide(start, start + 4);
            self.define(start, u32::from(first) << 20, 0);
        }
        for (kept, next) in list.links() {
            let header =
                u32::from(kept.id) | u32::from(kept.version & 0xf) << 16 | u32::from(next) << 20;
            self.hide(kept.extent.start, kept.extent.start.saturating_add(4));
            self.define(kept.extent.start, header, 0);
        }
    }

    /// Makes a PCIe function of the kind that belongs where the guest has it. PCIe 6.0 §7.5.3.2
    ///
    /// Behind a port, one that is integrated into the host's root complex becomes an endpoint with the slowest link
    /// there is. On bus 0 every one is integrated, and what tells of a link reads zero.
    fn adapt_express(&mut self, io: &dyn DeviceIo, express: Kept, placement: Placement) {
        let base = express.extent.start;
        let dword = |offset: u16| read_dword(io, base.saturating_add(offset));
        if dword(spec::EXP_DEVICE_CAPABILITIES) & policy::EXP_DEVICE_CAPABILITIES_FLR != 0 {
            self.reset_bits.push(ResetBit {
                offset: base.saturating_add(spec::EXP_DEVICE_CONTROL + 1),
                mask: (policy::EXP_DEVICE_CONTROL_FLR >> 8) as u8,
            });
        }
        let own = dword(0) & EXP_TYPE;
        match placement {
            Placement::BehindPort if own == EXP_TYPE_INTEGRATED_ENDPOINT => {
                self.set_express_type(io, express, EXP_TYPE_ENDPOINT);
                for (offset, value) in [
                    (spec::EXP_LINK_CAPABILITIES, EXP_SLOWEST_LINK),
                    (spec::EXP_LINK_CONTROL, EXP_SLOWEST_LINK << 16),
                ] {
                    self.replace(express, offset, value);
                }
            }
            Placement::BehindPort => {}
            Placement::RootBus => {
                self.set_express_type(io, express, EXP_TYPE_INTEGRATED_ENDPOINT);
                for offset in policy::EXP_LINK {
                    self.replace(express, *offset, 0);
                }
            }
        }
    }

    /// Says of a PCIe function that it is of this type.
    fn set_express_type(&mut self, io: &dyn DeviceIo, express: Kept, value: u32) {
        let rule = Rule {
            offset: 0,
            mask: EXP_TYPE,
            action: Action::Hide,
            why: "the type is that of a function where the guest has it",
        };
        let base = express.extent.start;
        self.apply(io, base, express.extent.end, &rule);
        let [.., byte, _] = value.to_le_bytes();
        let at = base.saturating_add(2);
        let held = self.held::<u8>(at);
        self.define(at, held | byte, 0);
    }

    /// Has a doubleword of a capability read as `value`, where it is in the capability, and not be written.
    fn replace(&mut self, capability: Kept, offset: u16, value: u32) {
        let at = capability.extent.start.saturating_add(offset);
        let end = at.saturating_add(4);
        if end <= capability.extent.end {
            self.hide(at, end);
            self.define(at, value, 0);
        }
    }

    /// Reads as the guest does. What the device answers for reads ones when it is gone.
    pub(crate) fn read(&self, io: &dyn DeviceIo, offset: u16, data: &mut [u8]) {
        self.overlay.read(offset, data);
        let sources = self.sources(offset, data.len());
        if sources.iter().all(|source| source.read == 0) {
            return;
        }
        let mut device = vec![u8::MAX; sources.len()];
        if io
            .region_read(RegionIndex::CONFIG, offset.into(), &mut device)
            .is_err()
        {
            device.fill(u8::MAX);
        }
        for ((byte, device), source) in data.iter_mut().zip(device).zip(sources) {
            *byte = (device & source.read) | (*byte & !source.read);
        }
        // VFIO goes on answering for the identity of a device that is gone, by which guests look for it.
        let identity = spec::COMMAND.saturating_sub(offset);
        if identity > 0 && is_silent(io) {
            let identity = data.iter_mut().take(identity.into());
            identity.for_each(|byte| *byte = u8::MAX);
        }
    }

    /// Writes as the guest does. What may not happen while a BAR is mapped waits for
    /// [`run_deferred`](Self::run_deferred).
    pub(crate) fn write(&mut self, io: &dyn DeviceIo, offset: u16, data: &[u8]) {
        self.overlay.write(offset, data);
        let mut pieces: Vec<(u16, Vec<u8>)> = Vec::new();
        let bytes = (offset..spec::CONFIG_SPACE_SIZE).zip(data);
        for ((at, byte), source) in bytes.zip(self.sources(offset, data.len())) {
            if source.write == 0 {
                continue;
            }
            // What the guest cannot change there stays as it is in the device, whose VFIO might let it
            // through.
            let kept = (source.read & !source.write) | source.keep;
            let kept = if kept == 0 {
                0
            } else {
                read_byte(io, at) & kept
            };
            let byte = (byte & source.write) | kept | (self.held_byte(at) & !source.write);
            match pieces.last_mut() {
                Some((start, piece)) if usize::from(at - *start) == piece.len() => piece.push(byte),
                _ => pieces.push((at, vec![byte])),
            }
        }
        for (at, piece) in &pieces {
            write_aligned(io, *at, piece);
        }
        if let Some(power) = &mut self.power {
            power.written(io, offset, data);
        }
        self.reset_wanted |= self.reset_bits.iter().any(|bit| {
            let byte = bit
                .offset
                .checked_sub(offset)
                .and_then(|at| data.get(usize::from(at)));
            byte.is_some_and(|byte| byte & bit.mask != 0)
        });
    }

    /// Does what waited until nothing of the device is mapped, and says what comes of it.
    pub(crate) fn run_deferred(&mut self, io: &dyn DeviceIo) -> DeferredOutcome {
        if std::mem::take(&mut self.reset_wanted) {
            return DeferredOutcome::Reset;
        }
        match self
            .power
            .as_mut()
            .is_some_and(|power| power.run_deferred(io))
        {
            true => DeferredOutcome::Decodes,
            false => DeferredOutcome::Done,
        }
    }

    /// Every BAR, where its register says.
    pub(crate) fn bars(&self) -> Vec<busway_pci::BarRegion> {
        self.overlay.regions()
    }

    /// The BARs that decode.
    pub(crate) fn decoded(&self) -> Vec<busway_pci::BarRegion> {
        if !self.is_awake() {
            return Vec::new();
        }
        self.overlay.decoded()
    }

    /// Whether the device is there for accesses to its BARs.
    pub(crate) fn is_awake(&self) -> bool {
        !self.reset_wanted && self.power.as_ref().is_none_or(Power::is_awake)
    }

    /// Whether the device sleeps, and does not answer for its BARs.
    pub(crate) fn is_asleep(&self) -> bool {
        self.power.as_ref().is_some_and(Power::is_asleep)
    }

    /// Wakes the device, so that it can be reset.
    pub(crate) fn wake(&mut self, io: &dyn DeviceIo) {
        if let Some(power) = &mut self.power {
            power.reset(io);
        }
    }

    /// Takes bus mastering from the device, so that it cannot touch memory, and leaves decoding on.
    pub(crate) fn quieten(&self, io: &dyn DeviceIo) {
        write_aligned(io, spec::COMMAND, &self.held_command().to_le_bytes());
    }

    /// Says whether the guest has the device's interrupt pin; none has one before.
    pub(crate) fn set_pin(&mut self, io: &dyn DeviceIo, pin: Option<InterruptPin>) {
        let register = pin.map_or(0, InterruptPin::register);
        self.define(spec::INTERRUPT_PIN, register, 0);
        if pin.is_none() {
            let status = Rule {
                offset: spec::STATUS & !3,
                mask: u32::from(spec::STATUS_INTERRUPT) << 16,
                action: Action::Hide,
                why: "there is no pin",
            };
            self.apply(io, 0, spec::HEADER_SIZE, &status);
        }
    }

    /// Whether the pin has a way to the guest now.
    pub(crate) fn pin_connected(&self) -> bool {
        self.pin_connected
    }

    /// Says whether it has. Without one its interrupts are disabled in the device; with one that is
    /// the guest's to say.
    pub(crate) fn set_pin_connected(&mut self, io: &dyn DeviceIo, connected: bool) {
        if std::mem::replace(&mut self.pin_connected, connected) == connected {
            return;
        }
        let [_, high] = self.held_command().to_le_bytes();
        let at = spec::COMMAND + 1;
        let [_, disable] = spec::COMMAND_INTX_DISABLE.to_le_bytes();
        let byte = (read_byte(io, at) & !disable) | (high & disable);
        write_aligned(io, at, &[byte]);
    }

    /// Has the pin's interrupts disabled in the device itself, while the pin is not connected. The kernel
    /// enables them there when it disables messages (`pci_intx_for_msi` in Linux, drivers/pci/msi), and
    /// VFIO, for which they are disabled all along, acts on a change alone.
    pub(crate) fn disable_pin(&self, io: &dyn DeviceIo) {
        if self.pin_connected {
            return;
        }
        let at = spec::COMMAND + 1;
        let [_, disable] = spec::COMMAND_INTX_DISABLE.to_le_bytes();
        let rest = read_byte(io, at) & !disable;
        for bit in [0, disable] {
            write_aligned(io, at, &[rest | bit]);
        }
    }

    /// Puts everything into its state at power-on, after the device was reset: Busway's part, and what
    /// the kernel put back into the device because the guest had written it.
    pub(crate) fn reset(&mut self, io: &dyn DeviceIo) {
        self.overlay.reset();
        self.reset_wanted = false;
        self.wake(io);
        self.quieten(io);
        for &(at, value, mask) in &self.fresh {
            let now = read_byte(io, at);
            if now & mask != value {
                write_aligned(io, at, &[(now & !mask) | value]);
            }
        }
    }

    /// What Busway has the device's command register hold.
    fn held_command(&self) -> u16 {
        let disable: u16 = match self.pin_connected {
            true => self.held(spec::COMMAND),
            false => u16::MAX,
        };
        self.constant | disable & spec::COMMAND_INTX_DISABLE
    }

    fn held_byte(&self, offset: u16) -> u8 {
        let [low, high] = self.held_command().to_le_bytes();
        match offset {
            spec::COMMAND => low,
            offset if offset == spec::COMMAND + 1 => high,
            _ => 0,
        }
    }

    fn sources(&self, offset: u16, size: usize) -> &[Source] {
        let start = usize::from(offset).min(SIZE);
        let end = start.saturating_add(size).min(SIZE);
        self.sources.get(start..end).unwrap_or_default()
    }
}

/// What came of [`GuestConfig::run_deferred`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeferredOutcome {
    /// There was nothing to do, or it is done.
    Done,
    /// BARs decode again.
    Decodes,
    /// The device is to be reset.
    Reset,
}

fn is_command(offset: u16) -> bool {
    (spec::COMMAND..spec::COMMAND + 2).contains(&offset)
}
