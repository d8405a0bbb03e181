//! RAM that comes by ACPI: the guest has more of it when somebody asks for more.
//!
//! What comes is mapped for devices before the guest hears of it, which takes the kernel long for much of it, on a thread of
//! its own. It stays: Cloud Hypervisor's clients, for whom this is, only ever ask for more. A guest that starts anew finds all
//! that has come.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use super::RunError;
use super::aside::Aside;
use super::events::Events;
use super::requests::{Answer, Asker, RequestError};
use crate::arch::{gsi, layout};
use crate::devices::memory_hotplug::{self, DEVICES, MemoryHotplug};
use crate::kvm::{Buses, IrqRouter};
use crate::memory::{Amount, PlugError, Pluggable};
use crate::monitor::{self, Source};

/// The memory devices of a machine.
#[derive(Debug)]
pub(super) struct MemoryDevices {
    shared: Arc<Shared>,
    /// RAM that is about to come, which is waited for.
    coming: Aside,
}

#[derive(Debug)]
struct Shared {
    pluggable: Pluggable,
    registers: Arc<MemoryHotplug>,
    /// RAM is about to come.
    busy: AtomicBool,
    /// None is to come any more.
    stop: AtomicBool,
}

impl MemoryDevices {
    /// Of a machine about to be put together, whose guest is to have `first` bytes of `pluggable` from its start on, with
    /// the registers on its bus.
    ///
    /// # Errors
    /// [`RunError`]: another device has the registers' addresses, or the first of it cannot be had.
    pub(super) fn new(
        pluggable: Pluggable,
        first: u64,
        buses: &Buses,
        router: &IrqRouter,
        events: &Arc<Events>,
    ) -> Result<Self, RunError> {
        let line = Arc::new(router.level_line(gsi::MEMORY_HOTPLUG));
        let registers = Arc::new(MemoryHotplug::new(line, events.clone()));
        buses.mmio.insert(
            "memory hot-plug registers",
            layout::MEMORY_HOTPLUG_START,
            memory_hotplug::SIZE,
            registers.clone(),
        )?;
        let devices = Self::of(pluggable, registers);
        devices.shared.plug(first)?;
        devices.on_restart();
        Ok(devices)
    }

    fn of(pluggable: Pluggable, registers: Arc<MemoryHotplug>) -> Self {
        Self {
            shared: Arc::new(Shared {
                pluggable,
                registers,
                busy: AtomicBool::new(false),
                stop: AtomicBool::new(false),
            }),
            coming: Aside::default(),
        }
    }

    /// Bytes that have come.
    pub(super) fn plugged(&self) -> u64 {
        self.shared.pluggable.plugged()
    }

    /// Has the guest have `bytes` bytes of RAM, beside the `first` that it was put together with. `asker` is answered when it
    /// is told of them.
    pub(super) fn resize(&self, first: u64, bytes: u64, asker: Asker) {
        let more = match self.to_come(first, bytes) {
            Ok(0) => return asker.answer(Ok(Answer::Done)),
            Ok(more) => more,
            Err(error) => return asker.answer(Err(error)),
        };
        self.shared.busy.store(true, Relaxed);
        monitor::tell(Source::Vm, "resizing", &[]);
        log::info!(
            "the guest gets {} of RAM, as the control socket asks: it has {bytes} bytes then",
            Amount(more)
        );
        let shared = self.shared.clone();
        self.coming.start("plug", "RAM that is to come", move || {
            let plugged = shared.plug(more);
            if let Ok(range) = &plugged {
                shared.registers.plugged(range.clone());
            }
            shared.busy.store(false, Relaxed);
            monitor::tell(Source::Vm, "resized", &[]);
            asker.answer(match plugged {
                Ok(_) => Ok(Answer::Done),
                Err(error) => Err(RequestError::failed(&error)),
            });
        });
    }

    /// How many bytes have to come for the guest to have `bytes`.
    fn to_come(&self, first: u64, bytes: u64) -> Result<u64, RequestError> {
        let Shared {
            pluggable,
            registers,
            busy,
            ..
        } = &*self.shared;
        if busy.load(Relaxed) {
            return Err(RequestError::Growing);
        }
        let (block, most) = (pluggable.block_size(), pluggable.size());
        let now = first.saturating_add(pluggable.plugged());
        let invalid = |why: String| Err(RequestError::Invalid(why));
        let Some(more) = bytes.checked_sub(now) else {
            return invalid(format!(
                "{bytes} bytes of RAM are less than the {now} that the guest has, and RAM that comes by ACPI \
                 (memory.hotplug_method Acpi) stays: a VM started with VirtioMem in its place (--memory \
                 hotplug_method=virtio-mem) gives RAM back"
            ));
        };
        if bytes.saturating_sub(first) > most {
            return invalid(format!(
                "{bytes} bytes of RAM are more than the guest can have: {first} that it was started with, and {most} that \
                 can come (--memory hotplug_size=, memory.hotplug_size)"
            ));
        }
        if !more.is_multiple_of(block) {
            let over = more.checked_rem(block).unwrap_or(0);
            return invalid(format!(
                "{bytes} bytes of RAM are {more} more than the guest has, and RAM comes by ACPI in whole blocks of {block} \
                 bytes: ask for {} or {} bytes",
                bytes.saturating_sub(over),
                bytes.saturating_sub(over).saturating_add(block)
            ));
        }
        if more > 0 && !registers.has_room() {
            return invalid(format!(
                "RAM has come {DEVICES} times since the guest started, which is as often as ACPI's memory devices can tell \
                 of it: restart the guest, which has what it has in one of them then"
            ));
        }
        Ok(more)
    }

    /// The guest starts anew, with all that has come. No vCPU may run.
    pub(super) fn on_restart(&self) {
        self.coming.finish();
        let Shared {
            pluggable,
            registers,
            ..
        } = &*self.shared;
        let start = pluggable.start();
        registers.reset(start..start.saturating_add(pluggable.plugged()));
    }

    /// The guest has said what it made of RAM that has come.
    pub(super) fn on_reported(device: u8, status: u8) {
        match status {
            0 => log::info!("the guest uses the RAM that has come (memory device {device})"),
            _ => log::warn!(
                "the guest does not use the RAM that has come (memory device {device}: status {status:#x} of _OST), which \
                 stays with the VM; its kernel says why, such as that it takes memory in larger blocks \
                 (/sys/devices/system/memory/block_size_bytes)"
            ),
        }
    }
}

impl Drop for MemoryDevices {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        self.coming.finish();
    }
}

impl Shared {
    /// Plugs the next `bytes` bytes, which are whole blocks; and gives where they are.
    fn plug(&self, bytes: u64) -> Result<Range<u64>, PlugError> {
        let start = self.pluggable.start();
        let start = start.saturating_add(self.pluggable.plugged());
        let count = bytes.checked_div(self.pluggable.block_size());
        if let Some(blocks) = self.pluggable.range(start, count.unwrap_or(0)) {
            self.pluggable.plug(&blocks, || !self.stop.load(Relaxed))?;
        }
        Ok(start..start.saturating_add(bytes))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, sync_channel};

    use busway_pci::InterruptLevel;

    use super::*;
    use crate::config::MemoryConfig;
    use crate::devices::memory_hotplug::{MemoryKeeper, PRESENT};
    use crate::kvm::BusDevice;
    use crate::memory::{Ram, Region, RegionError, RegionListener, Regions};

    const MIB: u64 = 1 << 20;
    const BLOCK: u64 = 128 * MIB;
    const FIRST: u64 = 64 * MIB;

    #[derive(Debug)]
    struct Nobody;

    impl InterruptLevel for Nobody {
        fn set(&self, _: bool) {}
    }

    impl MemoryKeeper for Nobody {
        fn reported(&self, _: u8, _: u8) {}
    }

    /// What has memory mapped, and refuses what is beyond a limit.
    #[derive(Debug)]
    struct Mapper {
        registers: Arc<MemoryHotplug>,
        limit: u64,
    }

    impl RegionListener for Mapper {
        fn name(&self) -> &str {
            "mapper"
        }

        fn added(&self, _: &Arc<Region>) -> Result<(), RegionError> {
            Ok(())
        }

        fn removed(&self, _: &Arc<Region>) {}

        fn plugged(&self, region: &Arc<Region>, bytes: &Range<u64>) -> Result<(), RegionError> {
            // The guest hears of nothing that is not mapped.
            let told: u64 = ranges(&self.registers).iter().map(|(_, size)| size).sum();
            assert!(told <= bytes.start, "{told:#x}: {bytes:x?} of {region}");
            match bytes.end > self.limit {
                true => Err("the limit of locked memory".into()),
                false => Ok(()),
            }
        }
    }

    fn read(registers: &MemoryHotplug, offset: u64) -> u64 {
        let mut data = [0; 8];
        registers.read(offset, &mut data);
        u64::from_le_bytes(data)
    }

    /// Where the RAM of each device is, and how much.
    fn ranges(registers: &MemoryHotplug) -> Vec<(u64, u64)> {
        let count = (read(registers, PRESENT) as u32).count_ones();
        let of = |device: u32| {
            registers.write(memory_hotplug::SELECT, &device.to_le_bytes());
            (
                read(registers, memory_hotplug::START),
                read(registers, memory_hotplug::LENGTH),
            )
        };
        (0..count).map(of).collect()
    }

    struct Test {
        devices: MemoryDevices,
        registers: Arc<MemoryHotplug>,
        start: u64,
        _ram: Ram,
    }

    impl Test {
        /// So many blocks can come, of which devices can have so many mapped.
        fn new(blocks: u64, limit: u64) -> Self {
            let config = MemoryConfig {
                size: FIRST,
                hotplug_size: Some(blocks * BLOCK + 4096),
                ..MemoryConfig::default()
            };
            let ram = Ram::new(&config, false).unwrap();
            let regions = Arc::<Regions>::default();
            ram.regions()
                .for_each(|region| regions.add(region).unwrap());
            let registers = Arc::new(MemoryHotplug::new(Arc::new(Nobody), Arc::new(Nobody)));
            let mapper = Mapper {
                registers: registers.clone(),
                limit: limit * BLOCK,
            };
            regions.listen(Arc::new(mapper)).unwrap();
            let (_, pluggable) = ram.pluggable(&regions).next().unwrap();
            assert_eq!(pluggable.size(), blocks * BLOCK);
            Self {
                start: pluggable.start(),
                devices: MemoryDevices::of(pluggable, registers.clone()),
                registers,
                _ram: ram,
            }
        }

        fn asked(&self, bytes: u64) -> Receiver<Result<Answer, RequestError>> {
            let (sender, answers) = sync_channel(1);
            self.devices.resize(FIRST, bytes, sender.into());
            answers
        }

        /// What is answered, once it is known.
        fn ask(&self, bytes: u64) -> Result<Answer, RequestError> {
            self.asked(bytes).recv().unwrap()
        }

        fn refused(&self, bytes: u64) -> String {
            self.ask(bytes).unwrap_err().to_string()
        }
    }

    #[test]
    fn each_growth_is_a_device_of_its_own_behind_the_last_and_a_restart_makes_one_of_all() {
        let test = Test::new(8, 8);
        for bytes in [FIRST, FIRST + BLOCK, FIRST + 4 * BLOCK, FIRST + 4 * BLOCK] {
            assert_eq!(test.ask(bytes), Ok(Answer::Done));
        }
        let (first, second) = (test.start, test.start + BLOCK);
        assert_eq!(
            ranges(&test.registers),
            [(first, BLOCK), (second, 3 * BLOCK)]
        );
        assert_eq!(test.devices.plugged(), 4 * BLOCK);
        test.devices.on_restart();
        assert_eq!(ranges(&test.registers), [(first, 4 * BLOCK)]);
        assert_eq!(test.ask(FIRST + 8 * BLOCK), Ok(Answer::Done));
        assert_eq!(ranges(&test.registers).len(), 2);
        assert_eq!(test.devices.plugged(), 8 * BLOCK);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name_with_what_could_and_changes_nothing() {
        let test = Test::new(4, 4);
        assert_eq!(test.ask(FIRST + 2 * BLOCK), Ok(Answer::Done));
        for (bytes, words) in [
            (FIRST + BLOCK, "hotplug_method=virtio-mem"),
            (0, "stays"),
            (FIRST + 5 * BLOCK, "hotplug_size"),
            (u64::MAX, "hotplug_size"),
            (
                FIRST + 2 * BLOCK + 64 * MIB,
                "ask for 335544320 or 469762048",
            ),
        ] {
            let why = test.refused(bytes);
            assert!(why.contains(words), "{bytes}: {why}");
        }
        assert_eq!(ranges(&test.registers), [(test.start, 2 * BLOCK)]);
    }

    #[test]
    fn what_devices_cannot_have_mapped_does_not_come_and_less_of_it_does() {
        let test = Test::new(8, 5);
        assert_eq!(test.ask(FIRST + 2 * BLOCK), Ok(Answer::Done));
        let why = test.refused(FIRST + 6 * BLOCK);
        assert!(why.contains("the limit of locked memory"), "{why}");
        assert_eq!(test.devices.plugged(), 2 * BLOCK);
        assert_eq!(ranges(&test.registers).len(), 1);
        assert_eq!(test.ask(FIRST + 5 * BLOCK), Ok(Answer::Done));
        assert_eq!(test.devices.plugged(), 5 * BLOCK);
    }

    #[test]
    fn ram_comes_as_often_as_there_are_devices_and_once_more_after_a_restart() {
        let most = u64::from(DEVICES);
        let test = Test::new(most + 1, most + 1);
        for count in 1..=most {
            assert_eq!(test.ask(FIRST + count * BLOCK), Ok(Answer::Done));
        }
        let why = test.refused(FIRST + (most + 1) * BLOCK);
        assert!(why.contains("32 times") && why.contains("restart"), "{why}");
        test.devices.on_restart();
        assert_eq!(test.ask(FIRST + (most + 1) * BLOCK), Ok(Answer::Done));
    }
}
