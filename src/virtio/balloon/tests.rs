//! A balloon with the driver of the tests: pages that go and come, statistics, reports, and what is not given away.

use super::worker::MAX_PAGES;
use super::*;
use crate::config::{BesideDevices, MemoryConfig};
use crate::memory::{Ram, Region, RegionError, RegionListener, Regions};
use crate::virtio::testing::{Driver, Ring, eventually};

const MIB: u64 = 1 << 20;
/// Pages of the guest from this address on go into the balloon.
const PAGES: u64 = 2 * MIB;

struct Inflated {
    driver: Driver,
    inflate: Ring,
    deflate: Ring,
    target: BalloonTarget,
    regions: Arc<Regions>,
    list: u64,
}

impl Inflated {
    fn new(config: &BalloonConfig) -> Self {
        Self::with(config, !spec::feature::EVENT_IDX)
    }

    /// With a driver that takes those of `features` that are offered.
    fn with(config: &BalloonConfig, features: u64) -> Self {
        let ram = Ram::new(
            &MemoryConfig {
                size: 4 * MIB,
                thp: false,
                ..MemoryConfig::default()
            },
            false,
        );
        let mut ram = ram.unwrap();
        let regions = Arc::<Regions>::default();
        if let Some(block) = config.block_size(4 * MIB) {
            ram.split(block);
        }
        for region in ram.regions() {
            regions.add(region).unwrap();
        }
        let (discards, ballooned) = (regions.discards(), ram.ballooned(&regions));
        let balloon = Balloon::new("balloon", config, discards, ballooned).unwrap();
        let target = balloon.target();
        let mut driver = Driver::with_ram(balloon, ram.guest().clone());
        driver.negotiate(features);
        let (inflate, deflate) = (driver.queue(0, 16), driver.queue(1, 16));
        let list = driver.alloc(4 * MAX_PAGES as u64);
        Self {
            driver,
            inflate,
            deflate,
            target,
            regions,
            list,
        }
    }

    fn write_numbers(&self, numbers: impl Iterator<Item = u32>) -> u32 {
        let bytes: Vec<u8> = numbers.flat_map(u32::to_le_bytes).collect();
        self.driver.write(self.list, &bytes);
        bytes.len() as u32
    }

    fn inflate(&mut self, numbers: impl Iterator<Item = u32>) {
        let len = self.write_numbers(numbers);
        let chain = [(self.list, len, false)];
        assert_eq!(self.driver.run(&mut self.inflate, &chain), 0);
    }

    fn deflate(&mut self, numbers: impl Iterator<Item = u32>) {
        let len = self.write_numbers(numbers);
        let chain = [(self.list, len, false)];
        assert_eq!(self.driver.run(&mut self.deflate, &chain), 0);
    }

    fn totals(&self) -> BalloonTotals {
        match self.driver.function.sight().seen().totals {
            crate::virtio::Totals::Balloon(totals) => totals,
            other => panic!("{other:?}"),
        }
    }

    /// Whether the page at `address` holds nothing any more.
    fn is_gone(&self, address: u64) -> bool {
        self.driver
            .read(address, 4096)
            .iter()
            .all(|byte| *byte == 0)
    }
}

fn page(address: u64) -> u32 {
    (address / balloon::PAGE) as u32
}

/// As a DMA space, which has memory pinned.
struct Pins;

impl RegionListener for Pins {
    fn name(&self) -> &str {
        "a DMA space"
    }

    fn added(&self, _region: &Arc<Region>) -> Result<(), RegionError> {
        Ok(())
    }

    fn removed(&self, _region: &Arc<Region>) {}

    fn pins(&self) -> bool {
        true
    }
}

#[test]
fn pages_that_the_guest_gives_are_the_hosts_and_come_back_as_zeros() {
    let mut it = Inflated::new(&BalloonConfig::default());
    it.driver.ready();
    it.target.set(MIB, 4 * MIB).unwrap();
    let target = it.driver.bar_read::<4>(it.driver.device);
    assert_eq!(u32::from_le_bytes(target), 256);
    it.driver.write(PAGES, &vec![7; 2 * MIB as usize]);
    // Upwards, downwards, and one by itself.
    let first = page(PAGES);
    it.inflate(
        (first..first + 64)
            .chain((first + 64..first + 128).rev())
            .chain([first + 300]),
    );
    it.driver
        .bar_write(it.driver.device + 4, &129_u32.to_le_bytes());
    let totals = it.totals();
    assert_eq!((totals.actual, totals.given), (129 * 4096, 129 * 4096));
    assert!(it.is_gone(PAGES) && it.is_gone(PAGES + 127 * 4096));
    assert!(it.is_gone(PAGES + 300 * 4096));
    assert!(!it.is_gone(PAGES + 128 * 4096));
    it.target.set(0, 4 * MIB).unwrap();
    it.deflate(first..first + 64);
    it.driver
        .bar_write(it.driver.device + 4, &65_u32.to_le_bytes());
    let totals = it.totals();
    assert_eq!((totals.actual, totals.given), (65 * 4096, 65 * 4096));
    assert_eq!(totals.wanted, 0, "the host asked for it");
}

#[test]
fn a_guest_that_takes_pages_out_of_want_is_seen_to_and_the_target_stays() {
    let mut it = Inflated::new(&BalloonConfig {
        size: MIB,
        deflate_on_oom: true,
        ..BalloonConfig::default()
    });
    it.driver.ready();
    let first = page(PAGES);
    it.inflate(first..first + 256);
    it.driver
        .bar_write(it.driver.device + 4, &256_u32.to_le_bytes());
    it.deflate(first..first + 16);
    it.driver
        .bar_write(it.driver.device + 4, &240_u32.to_le_bytes());
    let totals = it.totals();
    assert_eq!((totals.target, totals.actual), (MIB, 240 * 4096));
    assert_eq!(totals.wanted, 16 * 4096);
}

#[test]
fn a_driver_that_leaves_takes_its_pages_and_is_not_said_to_be_in_want() {
    let mut it = Inflated::new(&BalloonConfig {
        size: MIB,
        ..BalloonConfig::default()
    });
    it.driver.ready();
    let first = page(PAGES);
    it.inflate(first..first + 256);
    it.driver
        .bar_write(it.driver.device + 4, &256_u32.to_le_bytes());
    it.deflate(first..first + 256);
    let totals = it.totals();
    assert_eq!((totals.target, totals.wanted, totals.given), (MIB, 0, 0));
}

#[test]
fn beside_what_pins_memory_the_guest_is_answered_and_its_pages_stay() {
    let mut it = Inflated::new(&BalloonConfig {
        free_page_reporting: true,
        ..BalloonConfig::default()
    });
    let mut reporting = it.driver.queue(3, 16);
    it.driver.ready();
    it.driver.write(PAGES, &vec![7; MIB as usize]);
    let first = page(PAGES);
    it.inflate(first..first + 1);
    let pins: Arc<dyn RegionListener> = Arc::new(Pins);
    it.regions.listen(pins.clone()).unwrap();
    it.inflate(first + 1..first + 2);
    it.driver
        .run(&mut reporting, &[(PAGES + 0x2000, 4096, true)]);
    let totals = it.totals();
    assert!(totals.inhibited);
    assert_eq!((totals.given, totals.taken_back), (0, 4096));
    assert!(it.is_gone(PAGES) && !it.is_gone(PAGES + 0x1000));
    assert!(!it.is_gone(PAGES + 0x2000));
    it.regions.forget(&pins);
    it.driver
        .run(&mut reporting, &[(PAGES + 0x2000, 4096, true)]);
    assert!(it.is_gone(PAGES + 0x2000) && !it.totals().inhibited);
    assert_eq!((it.totals().given, it.totals().reported), (0, 4096));
}

#[test]
fn page_numbers_outside_of_ram_and_too_many_of_them_do_nothing() {
    let mut it = Inflated::new(&BalloonConfig::default());
    it.driver.ready();
    it.driver.write(PAGES, &[7; 4096]);
    it.inflate([u32::MAX, u32::MAX - 1, 0x10_0000].into_iter());
    assert_eq!(it.totals().given, 0);
    // A list that goes on behind what is looked at: the last page is not reached.
    let beyond = std::iter::repeat_n(page(4 * MIB), MAX_PAGES - 1);
    it.inflate(beyond.chain([page(PAGES)]));
    assert_eq!(it.totals().given, 4096);
    assert!(it.is_gone(PAGES));
}

#[test]
fn statistics_are_asked_for_again_and_shown_by_their_names() {
    let mut it = Inflated::new(&BalloonConfig::default());
    let mut stats = it.driver.queue(2, 16);
    it.driver.ready();
    let at = it.driver.alloc(64);
    let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
    it.driver
        .write(at, &[stat(4, 1000), stat(5, 2000), stat(99, 1)].concat());
    stats.submit(&[(at, 30, false)]);
    it.driver.notify(&stats);
    eventually("statistics", || it.totals().stats().count() == 2);
    let all: Vec<_> = it.totals().stats().collect();
    assert_eq!(all, [("free_bytes", 1000), ("total_bytes", 2000)]);
    // A second buffer has the first one given back.
    stats.submit(&[(at, 10, false)]);
    it.driver.notify(&stats);
    stats.wait_used();
}

#[test]
fn a_pause_keeps_the_balloon_and_the_buffer_for_statistics() {
    let mut it = Inflated::new(&BalloonConfig::default());
    let mut stats = it.driver.queue(2, 16);
    it.driver.ready();
    let at = it.driver.alloc(64);
    it.driver.write(at, &[4, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    stats.submit(&[(at, 10, false)]);
    it.driver.notify(&stats);
    eventually("statistics", || it.totals().stats().count() == 1);
    it.driver
        .bar_write(it.driver.device + 4, &5_u32.to_le_bytes());
    it.driver.function.pause();
    let state = it.driver.function.state().unwrap();
    let expected = DeviceState::Balloon(BalloonState { actual: 5 });
    assert_eq!(state.progress.device, expected);
    it.driver.function.restore(&state).unwrap();
    it.driver.function.resume();
    let head = stats.submit(&[(at, 10, false)]);
    it.driver.notify(&stats);
    assert_eq!(stats.wait_used().0, 0, "the first of both, not {head}");
    assert_eq!(it.totals().actual, 5 * 4096);
}

#[test]
fn a_balloon_larger_than_the_guest_or_of_parts_of_pages_is_refused() {
    let it = Inflated::new(&BalloonConfig::default());
    let uneven = TargetError::Uneven { asked: 4097 };
    assert_eq!(it.target.set(4097, 4 * MIB), Err(uneven));
    for (asked, most) in [(8 * MIB, 4 * MIB), (1 << 44, u64::MAX)] {
        assert_eq!(
            it.target.set(asked, most),
            Err(TargetError::TooLarge { asked, most })
        );
    }
    it.target.set(4 * MIB, 4 * MIB).unwrap();
}

/// As a DMA space that has blocks pinned by themselves, and maps none while it is told so.
#[derive(Default)]
struct PinsBlocks {
    refuses: std::sync::atomic::AtomicBool,
    gone: std::sync::Mutex<std::collections::BTreeSet<u64>>,
}

impl PinsBlocks {
    fn set_refuses(&self, refuses: bool) {
        self.refuses
            .store(refuses, std::sync::atomic::Ordering::SeqCst);
    }

    fn gone(&self) -> Vec<u64> {
        self.gone.lock().unwrap().iter().copied().collect()
    }
}

impl RegionListener for PinsBlocks {
    fn name(&self) -> &str {
        "a DMA space"
    }

    fn added(&self, _region: &Arc<Region>) -> Result<(), RegionError> {
        Ok(())
    }

    fn removed(&self, _region: &Arc<Region>) {}

    fn plugged(
        &self,
        _region: &Arc<Region>,
        bytes: &std::ops::Range<u64>,
    ) -> Result<(), RegionError> {
        if self.refuses.load(std::sync::atomic::Ordering::SeqCst) {
            return Err("no memory".into());
        }
        assert!(self.gone.lock().unwrap().remove(&bytes.start));
        Ok(())
    }

    fn unplugged(
        &self,
        _region: &Arc<Region>,
        bytes: &std::ops::Range<u64>,
    ) -> Result<(), RegionError> {
        assert!(self.gone.lock().unwrap().insert(bytes.start));
        Ok(())
    }

    fn pins(&self) -> bool {
        true
    }
}

fn remapped() -> BalloonConfig {
    BalloonConfig {
        vfio: BesideDevices::Remap,
        free_page_reporting: true,
        ..BalloonConfig::default()
    }
}

/// Pages of the block that begins at [`PAGES`], in requests as long as are looked at.
fn the_block() -> std::ops::Range<u32> {
    page(PAGES)..page(2 * PAGES)
}

#[test]
fn beside_devices_whole_blocks_go_and_come_back_before_the_guest_is_answered() {
    let mut it = Inflated::with(&remapped(), !spec::feature::EVENT_IDX);
    let mut reporting = it.driver.queue(3, 16);
    it.driver.ready();
    let devices = Arc::<PinsBlocks>::default();
    it.regions.listen(devices.clone()).unwrap();
    it.driver.write(PAGES, &vec![7; 2 * MIB as usize]);
    let all = the_block();
    it.inflate(all.start..all.end - 1);
    assert!(devices.gone().is_empty() && !it.is_gone(PAGES));
    it.inflate(all.end - 1..all.end);
    assert_eq!(devices.gone(), [PAGES]);
    assert!(it.is_gone(PAGES));
    let totals = it.totals();
    assert_eq!((totals.unmapped, totals.given), (2 * MIB, 2 * MIB));
    assert!(!totals.inhibited);
    // What is reported is used again without a word: it stays.
    it.driver.write(MIB, &[7; 4096]);
    it.driver.run(&mut reporting, &[(MIB, 4096, true)]);
    assert!(!it.is_gone(MIB));
    // The host has no memory for devices: the guest waits, and for as long as it takes.
    devices.set_refuses(true);
    let len = it.write_numbers(all.start..all.start + 1);
    it.deflate.submit(&[(it.list, len, false)]);
    it.driver.notify(&it.deflate);
    eventually("it was tried", || it.totals().failures > 0);
    assert_eq!(it.deflate.poll_used(), None);
    assert_eq!(devices.gone(), [PAGES]);
    devices.set_refuses(false);
    it.deflate.wait_used();
    assert!(devices.gone().is_empty());
    assert_eq!(it.totals().unmapped, 0);
}

#[test]
fn a_reset_and_a_stop_in_the_middle_leave_no_block_out_of_reach() {
    let mut it = Inflated::with(&remapped(), !spec::feature::EVENT_IDX);
    it.driver.ready();
    let devices = Arc::<PinsBlocks>::default();
    it.regions.listen(devices.clone()).unwrap();
    it.inflate(the_block());
    devices.set_refuses(true);
    let len = it.write_numbers(the_block());
    let head = it.deflate.submit(&[(it.list, len, false)]);
    it.driver.notify(&it.deflate);
    eventually("it was tried", || it.totals().failures > 0);
    it.driver.function.pause();
    let state = it.driver.function.state().unwrap();
    it.driver.function.restore(&state).unwrap();
    assert_eq!(devices.gone(), [PAGES], "a pause changes nothing");
    devices.set_refuses(false);
    it.driver.function.resume();
    assert_eq!(it.deflate.wait_used().0, u32::from(head));
    it.inflate(the_block());
    assert_eq!(devices.gone(), [PAGES]);
    it.driver.set_common(spec::pci::common::DEVICE_STATUS, &[0]);
    assert!(devices.gone().is_empty());
}

#[test]
fn a_driver_that_does_not_wait_for_answers_keeps_its_pages_beside_devices() {
    let features = !spec::feature::EVENT_IDX & !balloon::F_MUST_TELL_HOST;
    let mut it = Inflated::with(&remapped(), features);
    it.driver.ready();
    let devices = Arc::<PinsBlocks>::default();
    it.regions.listen(devices.clone()).unwrap();
    it.driver.write(PAGES, &[7; 4096]);
    it.inflate(the_block());
    assert!(devices.gone().is_empty() && !it.is_gone(PAGES));
}

#[test]
fn more_pages_that_leave_than_are_looked_at_break_the_balloon_alone() {
    let mut it = Inflated::with(&remapped(), !spec::feature::EVENT_IDX);
    it.driver.ready();
    let len = 4 * MAX_PAGES as u32 + 4;
    it.deflate.submit(&[(it.list, len, false)]);
    it.driver.notify(&it.deflate);
    eventually("needs reset", || {
        it.driver.status() & spec::status::DEVICE_NEEDS_RESET != 0
    });
}
