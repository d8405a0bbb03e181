use super::*;
use crate::virtio::spec::pci::common;
use crate::virtio::spec::status;
use crate::virtio::testing::{Buffer, Driver, Ring};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use tempfile::NamedTempFile;

const MIB: u64 = 1 << 20;

pub(super) fn image(size: u64) -> NamedTempFile {
    // Not in /tmp, which may be a tmpfs: no direct I/O there on older kernels.
    let file = NamedTempFile::new_in("/var/tmp").unwrap();
    file.as_file().set_len(size).unwrap();
    file
}

pub(super) fn disk(file: &NamedTempFile, change: impl FnOnce(&mut DiskConfig)) -> Blk {
    let mut config = DiskConfig {
        queue_size: 64,
        ..DiskConfig::new(file.path())
    };
    change(&mut config);
    Blk::new("disk0", &config).unwrap()
}

/// Sector, number of sectors, and flags.
type Range = (u64, u32, u32);

/// A disk's driver that has come up, and the queue's buffers.
pub(super) struct Disk {
    pub(super) driver: Driver,
    ring: Ring,
    header: u64,
    data: u64,
    status: u64,
}

const RAM: u64 = crate::virtio::testing::RAM_SIZE;
const DATA_SIZE: u64 = 256 << 10;

impl Disk {
    pub(super) fn new(device: Blk) -> Self {
        Self::with_features(device, !spec::feature::EVENT_IDX)
    }

    fn with_features(device: Blk, features: u64) -> Self {
        let mut driver = Driver::new(device);
        let queues = u16::from_le_bytes(driver.common(common::NUM_QUEUES));
        driver.enable_msix(queues + 1);
        driver.negotiate(features);
        let ring = driver.queue(0, 64);
        driver.ready();
        assert_eq!(driver.status() & status::DEVICE_NEEDS_RESET, 0);
        let header = driver.alloc(16);
        let data = driver.alloc(DATA_SIZE);
        let status = driver.alloc(1);
        Self {
            driver,
            ring,
            header,
            data,
            status,
        }
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> u8 {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.driver.write(self.header, &header);
        self.driver.write(self.status, &[0xee]);
        let mut chain = vec![(self.header, 16, false)];
        chain.extend_from_slice(data);
        chain.push((self.status, 1, true));
        self.driver.run(&mut self.ring, &chain);
        self.driver.read(self.status, 1)[0]
    }

    pub(super) fn write(&mut self, sector: u64, bytes: &[u8]) -> u8 {
        self.driver.write(self.data, bytes);
        self.request(
            blk::T_OUT,
            sector,
            &[(self.data, bytes.len() as u32, false)],
        )
    }

    fn read(&mut self, sector: u64, len: u32) -> (u8, Vec<u8>) {
        let status = self.request(blk::T_IN, sector, &[(self.data, len, true)]);
        (status, self.driver.read(self.data, len as usize))
    }

    fn ranges(&mut self, kind: u32, ranges: &[Range]) -> u8 {
        let mut bytes = Vec::new();
        for (sector, sectors, flags) in ranges {
            bytes.extend(sector.to_le_bytes());
            bytes.extend(sectors.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
        }
        self.driver.write(self.data, &bytes);
        self.request(kind, 0, &[(self.data, bytes.len() as u32, false)])
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed))
        .collect()
}

#[test]
fn what_is_written_is_in_the_file_and_is_read_back() {
    for direct in [false, true] {
        let file = image(MIB);
        let mut disk = Disk::new(disk(&file, |config| config.direct = direct));
        let bytes = pattern(64 << 10, 7);
        assert_eq!(disk.write(8, &bytes), blk::S_OK);
        assert_eq!(disk.request(blk::T_FLUSH, 0, &[]), blk::S_OK);
        let mut stored = vec![0; bytes.len()];
        file.as_file().read_exact_at(&mut stored, 8 * 512).unwrap();
        assert_eq!(stored, bytes, "direct={direct}");
        assert_eq!(
            disk.read(8, 64 << 10),
            (blk::S_OK, bytes),
            "direct={direct}"
        );
        assert_eq!(disk.driver.route(0).wait(), 3);
    }
}

#[test]
fn what_a_driver_asks_for_is_counted_and_seen_beside_it_over_pauses_and_resets() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    let sight = disk.driver.function.sight();
    let seen = || match sight.seen().totals {
        crate::virtio::Totals::Disk(totals) => totals,
        other => panic!("{other:?}"),
    };
    assert_eq!(sight.seen().driver, crate::virtio::DriverState::Ready);
    assert_eq!(seen(), crate::virtio::DiskTotals::default());
    assert_eq!(disk.write(8, &pattern(8192, 1)), blk::S_OK);
    disk.driver.function.pause();
    disk.driver.function.resume();
    assert_eq!(disk.read(8, 512).0, blk::S_OK);
    assert_eq!(disk.request(blk::T_FLUSH, 0, &[]), blk::S_OK);
    let totals = seen();
    assert_eq!((totals.writes.ops, totals.writes.bytes), (1, 8192));
    assert_eq!((totals.reads.ops, totals.reads.bytes), (1, 512));
    assert_eq!((totals.others, totals.errors), (1, 0));
    assert!(totals.reads.shortest_micros <= totals.reads.longest_micros);
    // An interrupt for each, by its queue's vector.
    let now = sight.seen();
    assert_eq!(now.interrupts, 3);
    assert_eq!(now.function.mode, busway_pci::InterruptMode::Msix);
    assert!(now.function.connected >= 1);
    disk.driver.set_common(common::DEVICE_STATUS, &[0]);
    assert_eq!(sight.seen().driver, crate::virtio::DriverState::None);
    assert_eq!(seen(), totals);
}

#[test]
fn a_direct_disk_takes_buffers_at_any_address() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |config| config.direct = true));
    let bytes = pattern(160 << 10, 3);
    disk.driver.write(disk.data + 1, &bytes);
    let (odd, len) = (disk.data + 1, bytes.len() as u32);
    let halves = |write| [(odd, 4097, write), (odd + 4097, len - 4097, write)];
    assert_eq!(disk.request(blk::T_OUT, 16, &halves(false)), blk::S_OK);
    disk.driver.write(disk.data, &vec![0; DATA_SIZE as usize]);
    assert_eq!(disk.request(blk::T_IN, 16, &halves(true)), blk::S_OK);
    assert_eq!(disk.driver.read(odd, bytes.len()), bytes);
}

#[test]
fn many_buffers_are_one_request() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    let bytes = pattern(60 * 512, 9);
    disk.driver.write(disk.data, &bytes);
    let buffers =
        |write| -> Vec<Buffer> { (0..60).map(|i| (disk.data + i * 512, 512, write)).collect() };
    let (out, into) = (buffers(false), buffers(true));
    assert_eq!(disk.request(blk::T_OUT, 0, &out), blk::S_OK);
    disk.driver.write(disk.data, &vec![0; bytes.len()]);
    assert_eq!(disk.request(blk::T_IN, 0, &into), blk::S_OK);
    assert_eq!(disk.driver.read(disk.data, bytes.len()), bytes);
}

#[test]
fn a_readonly_disk_says_so_and_refuses_writes() {
    let file = image(MIB);
    let device = disk(&file, |config| config.readonly = true);
    assert_ne!(device.features() & blk::F_RO, 0);
    let mut disk = Disk::new(device);
    assert_eq!(disk.write(0, &[1; 512]), blk::S_IOERR);
    assert_eq!(disk.ranges(blk::T_DISCARD, &[(0, 8, 0)]), blk::S_UNSUPP);
    assert_eq!(
        disk.ranges(blk::T_WRITE_ZEROES, &[(0, 8, 0)]),
        blk::S_UNSUPP
    );
    assert_eq!(disk.read(0, 512), (blk::S_OK, vec![0; 512]));
}

#[test]
fn discard_frees_and_write_zeroes_zeroes() {
    use std::os::unix::fs::MetadataExt;
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    for sector in [0, 512] {
        assert_eq!(disk.write(sector, &pattern(256 << 10, 1)), blk::S_OK);
    }
    file.as_file().sync_all().unwrap();
    let before = file.as_file().metadata().unwrap().blocks();
    let everything = [(0, 512, 0), (512, 512, 0)];
    assert_eq!(disk.ranges(blk::T_DISCARD, &everything), blk::S_OK);
    assert!(file.as_file().metadata().unwrap().blocks() < before);
    for unmap in [0, 1] {
        disk.write(0, &pattern(4096, 1));
        assert_eq!(
            disk.ranges(blk::T_WRITE_ZEROES, &[(1, 2, unmap)]),
            blk::S_OK
        );
        let (_, bytes) = disk.read(0, 2048);
        assert_eq!(bytes[512..1536], [0; 1024]);
        assert_ne!(bytes[..512], [0; 512]);
        assert_ne!(bytes[1536..], [0; 512]);
    }
}

#[test]
fn bad_ranges_change_nothing() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    let bytes = pattern(4096, 5);
    disk.write(0, &bytes);
    let beyond = [(0, 8, 0), (2048, 1, 0)];
    let cases: [(u32, &[Range], u8); 6] = [
        (blk::T_DISCARD, &beyond, blk::S_IOERR),
        (blk::T_WRITE_ZEROES, &beyond, blk::S_IOERR),
        (blk::T_WRITE_ZEROES, &[(u64::MAX, 8, 0)], blk::S_IOERR),
        (blk::T_WRITE_ZEROES, &[(0, u32::MAX, 0)], blk::S_IOERR),
        (blk::T_WRITE_ZEROES, &[(0, 8, 2)], blk::S_UNSUPP),
        (blk::T_DISCARD, &[(0, 8, 1)], blk::S_UNSUPP),
    ];
    for (kind, ranges, expected) in cases {
        assert_eq!(disk.ranges(kind, ranges), expected, "{kind} {ranges:?}");
    }
    assert_eq!(disk.read(0, 4096).1, bytes);
}

#[test]
fn requests_beyond_the_disk_or_of_unknown_kind_are_answered_with_an_error() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    for (sector, len) in [
        (2048, 512),
        (2047, 1024),
        (u64::MAX, 512),
        (1 << 55, 512),
        (0, 100),
    ] {
        assert_eq!(disk.read(sector, len).0, blk::S_IOERR, "{sector} {len}");
        assert_eq!(disk.write(sector, &vec![1; len as usize]), blk::S_IOERR);
    }
    assert_eq!(file.as_file().metadata().unwrap().len(), MIB);
    assert_eq!(disk.request(0x1234, 0, &[]), blk::S_UNSUPP);
    // A file that has shrunk under the guest.
    file.as_file().set_len(4096).unwrap();
    assert_eq!(disk.read(2000, 512).0, blk::S_IOERR);
    assert_eq!(disk.read(0, 512).0, blk::S_OK);
}

#[test]
fn the_disk_is_known_by_its_name() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    let status = disk.request(blk::T_GET_ID, 0, &[(disk.data, 20, true)]);
    assert_eq!(status, blk::S_OK);
    assert_eq!(
        disk.driver.read(disk.data, 20),
        b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn the_configuration_has_size_and_queues() {
    let file = image(3 * MIB + 100);
    let driver = Driver::new(disk(&file, |config| config.num_queues = 4));
    assert_eq!(
        u64::from_le_bytes(driver.bar_read(driver.device)),
        3 * MIB / 512
    );
    assert_eq!(u16::from_le_bytes(driver.bar_read(driver.device + 34)), 4);
    assert_eq!(u32::from_le_bytes(driver.bar_read(driver.device + 20)), 512);
    assert_eq!(driver.bar_read::<8>(driver.device + 60), [0xff; 8]);
    assert_ne!(driver.offered() & blk::F_MQ, 0);
}

#[test]
fn each_queue_has_its_own_worker_and_vector() {
    let file = image(MIB);
    let mut driver = Driver::new(disk(&file, |config| config.num_queues = 3));
    driver.enable_msix(4);
    driver.negotiate(0);
    let mut rings: Vec<_> = (0..3).map(|index| driver.queue(index, 16)).collect();
    driver.ready();
    let header = driver.alloc(16);
    let status = driver.alloc(1);
    driver.write(header, &blk::T_FLUSH.to_le_bytes());
    for (vector, ring) in (0..).zip(&mut rings) {
        driver.run(ring, &[(header, 16, false), (status, 1, true)]);
        assert_eq!(driver.route(vector).wait(), 1);
        assert_eq!(driver.function.connected_vectors(), 4);
    }
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let names: Vec<_> = threads
        .filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok())
        .collect();
    for index in 0..3 {
        assert!(names.contains(&format!("_disk0-q{index}\n")), "{names:?}");
    }
}

#[test]
fn a_reset_in_mid_flight_leaves_a_disk_that_works() {
    let file = image(MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    for round in 0..20 {
        let bytes = pattern(4096, round);
        disk.driver.write(disk.data, &bytes);
        for _ in 0..8 {
            disk.ring.submit(&[
                (disk.header, 16, false),
                (disk.data, 4096, true),
                (disk.status, 1, true),
            ]);
            disk.driver.notify(&disk.ring);
        }
        disk.driver.set_common(common::DEVICE_STATUS, &[0]);
        disk.driver.negotiate(0);
        disk.ring = disk.driver.queue(0, 16);
        disk.driver.ready();
        assert_eq!(disk.write(0, &bytes), blk::S_OK);
        assert_eq!(disk.read(0, 4096), (blk::S_OK, bytes));
    }
}

#[test]
fn requests_that_are_paused_in_their_middle_are_done_once_and_right() {
    let file = image(64 * MIB);
    let mut disk = Disk::new(disk(&file, |_| ()));
    let bytes = pattern(DATA_SIZE as usize, 3);
    disk.driver.write(disk.data, &bytes);
    // Each writes 60 times the same 256 KiB: 15 MiB, in two steps.
    let data = vec![(disk.data, DATA_SIZE as u32, false); 60];
    for round in 0..12_u64 {
        let mut header = [0; 16];
        header[0] = blk::T_OUT as u8;
        let sector = round % 4 * (16 * MIB / 512);
        header[8..].copy_from_slice(&sector.to_le_bytes());
        disk.driver.write(disk.header, &header);
        disk.driver.write(disk.status, &[0xee]);
        let mut chain = vec![(disk.header, 16, false)];
        chain.extend_from_slice(&data);
        chain.push((disk.status, 1, true));
        let head = disk.ring.submit(&chain);
        disk.driver.notify(&disk.ring);
        std::thread::sleep(std::time::Duration::from_micros(round * 300));
        disk.driver.function.pause();
        let done = disk.ring.poll_used();
        let status = disk.driver.read(disk.status, 1)[0];
        assert_eq!(status, if done.is_some() { blk::S_OK } else { 0xee });
        disk.driver.function.resume();
        let done = done.unwrap_or_else(|| disk.ring.wait_used());
        assert_eq!(done, (head.into(), 1));
        assert!(disk.ring.poll_used().is_none());
        assert_eq!(disk.driver.read(disk.status, 1), [blk::S_OK]);
        let mut stored = vec![0; bytes.len()];
        let last = sector * 512 + 59 * DATA_SIZE;
        file.as_file().read_exact_at(&mut stored, last).unwrap();
        assert!(stored == bytes, "round {round}");
    }
}

#[test]
fn a_disk_whose_image_grows_or_shrinks_has_that_size_and_its_driver_hears_of_it() {
    let file = image(MIB);
    let device = disk(&file, |_| ());
    let resizer = device.resizer();
    let mut disk = Disk::new(device);
    disk.driver
        .set_common(common::CONFIG_MSIX_VECTOR, &1_u16.to_le_bytes());
    let sectors = |disk: &Disk| u64::from_le_bytes(disk.driver.bar_read(disk.driver.device));
    assert_eq!(disk.read(2048, 512).0, blk::S_IOERR);
    file.as_file().set_len(2 * MIB + 100).unwrap();
    assert_eq!(disk.read(2048, 512).0, blk::S_IOERR, "nobody has said so");
    assert_eq!(resizer.resize().unwrap(), 2 * MIB);
    assert_eq!(disk.driver.route(1).wait(), 1);
    assert_eq!(sectors(&disk), 4096);
    assert_eq!(disk.read(2048, 512).0, blk::S_OK);
    assert_eq!(resizer.resize().unwrap(), 2 * MIB);
    assert!(disk.driver.route(1).silent(), "it is the same");
    file.as_file().set_len(MIB).unwrap();
    disk.driver.function.pause();
    assert_eq!(resizer.resize().unwrap(), MIB);
    disk.driver.function.resume();
    assert_eq!(disk.driver.route(1).wait(), 1);
    assert_eq!(
        (sectors(&disk), disk.read(2048, 512).0),
        (2048, blk::S_IOERR)
    );
    file.as_file().set_len(0).unwrap();
    let error = resizer.resize().unwrap_err().to_string();
    assert!(error.contains("holds 0 bytes"), "{error}");
    assert_eq!(sectors(&disk), 2048);
}

#[test]
fn a_request_without_header_or_status_breaks_the_device_only() {
    let file = image(MIB);
    for chain in [
        &[(0x2000, 8, false), (0x3000, 1, true)][..],
        &[(0x2000, 16, false)],
    ] {
        let mut disk = Disk::new(disk(&file, |_| ()));
        disk.ring.submit(chain);
        disk.driver.notify(&disk.ring);
        crate::virtio::testing::eventually("needs reset", || {
            disk.driver.status() & status::DEVICE_NEEDS_RESET != 0
        });
    }
}

#[test]
fn impossible_queues_are_refused_with_what_would_be_possible() {
    let file = image(MIB);
    let refuse = |num_queues, queue_size| {
        let config = DiskConfig {
            num_queues,
            queue_size,
            ..DiskConfig::new(file.path())
        };
        Blk::new("disk0", &config).unwrap_err().to_string()
    };
    assert_eq!(
        refuse(0, 64),
        "disk disk0: num_queues=0 must be from 1 to 64"
    );
    assert_eq!(
        refuse(1, 100),
        "disk disk0: queue_size=100 must be a power of two from 4 to 1024"
    );
}

/// A block device made of a file.
struct Loop(String);

impl Loop {
    fn new(file: &NamedTempFile) -> Option<Self> {
        let output = std::process::Command::new("losetup")
            .args(["--find", "--show"])
            .arg(file.path())
            .output();
        match output {
            Ok(output) if output.status.success() => Some(Self(
                String::from_utf8(output.stdout).unwrap().trim().to_owned(),
            )),
            other => {
                eprintln!("skipped: no loop device here: {other:?}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup")
            .args(["--detach", &self.0])
            .status();
    }
}

#[test]
fn the_hosts_errors_are_told_of_a_few_times_in_a_disks_life() {
    let file = image(MIB);
    let device = disk(&file, |_| ());
    let complaints = Arc::clone(&device.complaints);
    let mut disk = Disk::new(device);
    file.as_file().set_len(0).unwrap();
    for round in 1..=LOGGED_ERRORS {
        assert_eq!(disk.read(0, 512).0, blk::S_IOERR);
        assert_eq!(complaints.made(), round);
        disk.driver.negotiate(0);
        disk.ring = disk.driver.queue(0, 64);
        disk.driver.ready();
    }
    assert_eq!(complaints.next(log::Level::Error), log::Level::Debug);
}

#[test]
fn a_block_device_is_a_disk_and_is_not_shared() {
    let file = image(MIB);
    let Some(device) = Loop::new(&file) else {
        return;
    };
    for direct in [false, true] {
        let config = DiskConfig {
            direct,
            queue_size: 64,
            ..DiskConfig::new(&device.0)
        };
        let mut disk = Disk::new(Blk::new("disk0", &config).unwrap());
        let sectors = u64::from_le_bytes(disk.driver.bar_read(disk.driver.device));
        assert_eq!(sectors, MIB / 512);
        let bytes = pattern(8192, 1);
        assert_eq!(disk.write(8, &bytes), blk::S_OK);
        assert_eq!(disk.request(blk::T_FLUSH, 0, &[]), blk::S_OK);
        assert_eq!(disk.read(8, 8192), (blk::S_OK, bytes));
        assert_eq!(disk.ranges(blk::T_WRITE_ZEROES, &[(8, 8, 0)]), blk::S_OK);
        assert_eq!(disk.read(8, 4096).1, vec![0; 4096]);
        assert_eq!(disk.ranges(blk::T_DISCARD, &[(16, 8, 0)]), blk::S_OK);
        let second = Blk::new("disk1", &config).unwrap_err().to_string();
        assert!(second.contains("is in use on this host"), "{second}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_request_whatever_panics_or_leaves_the_disk(
        requests in proptest::collection::vec(
            (0_u32..16, prop_oneof![0_u64..2100, any::<u64>()],
             proptest::collection::vec((0_u64..RAM, 0_u32..8192, any::<bool>()), 0..6)),
            1..12),
        direct in any::<bool>(),
    ) {
        let file = image(MIB);
        let mut disk = Disk::new(disk(&file, |config| config.direct = direct));
        for (kind, sector, mut buffers) in requests {
            buffers.sort_by_key(|buffer| buffer.2);
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            header[8..].copy_from_slice(&sector.to_le_bytes());
            disk.driver.write(disk.header, &header);
            let mut chain = vec![(disk.header, 16, false)];
            chain.extend(buffers);
            chain.push((disk.status, 1, true));
            disk.ring.submit(&chain);
            disk.driver.notify(&disk.ring);
        }
        disk.driver.function.registers();
        drop(disk);
        prop_assert_eq!(file.as_file().metadata().unwrap().len(), MIB);
    }
}
