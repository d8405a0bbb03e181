use std::io::{Read, Write};
use std::path::PathBuf;
use std::time::Instant;

use super::*;
use crate::config::MemoryConfig;
use crate::memory::{Ram, Regions};
use crate::virtio::spec::{self, status};
use crate::virtio::testing::{Driver, RAM_SIZE, Ring, eventually};
use fake::{Fake, Script, Vice};

mod fake;
mod generic;
mod hostile;
mod net;

/// A guest's RAM, and the table of it.
fn memory(shared: bool) -> (GuestRam, Arc<MemoryTable>, Regions) {
    let config = MemoryConfig {
        size: RAM_SIZE,
        shared,
        ..MemoryConfig::default()
    };
    let ram = Ram::new(&config, false).unwrap();
    let (regions, table) = (Regions::default(), Arc::<MemoryTable>::default());
    regions.listen(table.clone()).unwrap();
    for region in ram.regions() {
        regions.add(region).unwrap();
    }
    (ram.guest().clone(), table, regions)
}

/// A guest with a device that `fake` serves.
struct Guest {
    driver: Driver,
    table: Arc<MemoryTable>,
    _regions: Regions,
}

/// A device, with the memory of its guest.
type Opened = (VhostUser, GuestRam, Arc<MemoryTable>, Regions);

/// What is to be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Want {
    Fs,
    Disk,
    Net,
}

fn open(want: Want, socket: PathBuf, shared: bool) -> Result<Opened, VhostUserError> {
    let (kind, described) = match want {
        Want::Fs => (Kind::fs(&FsConfig::new("share", &socket)), "fs fs0"),
        Want::Disk => {
            let config = DiskConfig {
                num_queues: 2,
                queue_size: 64,
                ..DiskConfig::new("")
            };
            (Kind::disk(&config), "disk disk0")
        }
        Want::Net => (net::kind(|_| {}), "net net0"),
    };
    let at = (&*socket, VhostMode::Client);
    opened(kind, described, at, Duration::ZERO, shared)
}

fn opened(
    kind: Kind,
    described: &str,
    at: (&Path, VhostMode),
    patience: Duration,
    shared: bool,
) -> Result<Opened, VhostUserError> {
    let (ram, table, regions) = memory(shared);
    let name = described.split(' ').next_back().unwrap();
    let device = VhostUser::open(name, described.into(), kind, at, patience, &ram, &table);
    Ok((device?, ram, table, regions))
}

fn refusal(want: Want, socket: PathBuf) -> String {
    open(want, socket, true).unwrap_err().to_string()
}

impl Guest {
    fn new(want: Want, fake: &Fake) -> Self {
        Self::of(open(want, fake.socket(), true).unwrap())
    }

    fn of((device, ram, table, regions): Opened) -> Self {
        Self {
            driver: Driver::with_ram(device, ram),
            table,
            _regions: regions,
        }
    }

    /// The driver takes what it is offered, and begins with two queues.
    fn begin(&mut self) -> [Ring; 2] {
        self.driver.negotiate(u64::MAX);
        self.driver.enable_msix(2);
        let rings = [0, 1].map(|index| self.driver.queue(index, 16));
        self.driver.ready();
        rings
    }

    /// A request of `ring` is answered by who serves the ring.
    fn ask(&mut self, ring: &mut Ring) {
        let buffer = self.driver.alloc(64);
        assert_eq!(self.driver.run(ring, &[(buffer, 32, true)]), 32);
        assert_eq!(
            self.driver.read(buffer, 33),
            [vec![ring.index as u8; 32], vec![0]].concat()
        );
    }

    fn needs_reset(&self) -> bool {
        self.driver.status() & status::DEVICE_NEEDS_RESET != 0
    }

    /// The driver resets the device, as soon as that is over.
    fn reset(&self) {
        use spec::pci::common;
        self.driver.set_common(common::DEVICE_STATUS, &[0]);
        eventually("the reset is over", || self.driver.status() == 0);
    }
}

#[test]
fn a_folder_says_its_tag_and_a_disk_what_its_back_end_says_with_its_own_queues() {
    let fake = Fake::start();
    let fs = Guest::new(Want::Fs, &fake).driver;
    let bytes: [u8; 44] = fs.bar_read(fs.device);
    assert_eq!(&bytes[..6], b"share\0");
    assert_eq!(bytes[36..40], [1, 0, 0, 0]);
    assert_eq!(bytes[40..], [0xff; 4]);
    assert_eq!(
        fs.offered() & 0xffff_ffff_00ff_ffff,
        spec::feature::VERSION_1
    );
    drop(fs);
    let disk = Guest::new(Want::Disk, &fake).driver;
    let bytes: [u8; 60] = disk.bar_read(disk.device);
    assert_eq!(
        bytes[12..16],
        62_u32.to_le_bytes(),
        "as many segments as a queue holds"
    );
    assert_eq!(bytes[34..36], [2, 0]);
    assert_eq!(bytes[..12], [7; 12]);
    let offered = disk.offered();
    assert_ne!(offered & spec::blk::F_MQ, 0);
    assert_eq!(offered & spec::blk::F_CONFIG_WCE, 0);
    assert_eq!(offered >> 33, 0, "nothing that is not known");
}

#[test]
fn requests_are_served_by_the_back_end_through_pauses_resets_and_vectors_that_come_late() {
    for want in [Want::Fs, Want::Disk, Want::Net] {
        let fake = Fake::start();
        let mut guest = Guest::new(want, &fake);
        for _ in 0..3 {
            let mut rings = guest.begin();
            for round in 0..40 {
                for ring in &mut rings {
                    guest.ask(ring);
                }
                if round % 8 == 7 {
                    guest.driver.function.pause();
                    guest.driver.function.resume();
                }
            }
            guest.reset();
        }
        // By polling, without any vector.
        guest.driver.negotiate(0);
        let mut ring = guest.driver.queue(0, 16);
        guest.driver.ready();
        guest.ask(&mut ring);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn what_is_asked_while_the_device_is_paused_is_served_when_it_goes_on_and_once() {
    let fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    guest.driver.function.pause();
    let buffer = guest.driver.alloc(64);
    for _ in 0..3 {
        ring.submit(&[(buffer, 8, true)]);
    }
    guest.driver.notify(&ring);
    assert_eq!(ring.poll_used(), None);
    guest.driver.function.resume();
    for head in 1..=3 {
        assert_eq!(ring.wait_used(), (head, 8));
    }
    assert_eq!(ring.poll_used(), None);
    let bases = fake.script().bases.clone();
    assert_eq!(bases, [(0, 0), (1, 0), (0, 1), (1, 0)]);
}

#[test]
fn a_back_end_that_dies_and_comes_back_goes_on_with_what_the_one_before_had_in_hand() {
    for (features, held) in [(!0, 2), (!fake::INFLIGHT, 0)] {
        let mut fake = Fake::start().with(|script| script.protocol &= features);
        let mut guest = Guest::new(Want::Disk, &fake);
        let [mut ring, _] = guest.begin();
        guest.ask(&mut ring);
        fake.script().keeps = true;
        let buffer = guest.driver.alloc(64);
        for _ in 0..held {
            ring.submit(&[(buffer, 8, true)]);
        }
        guest.driver.notify(&ring);
        fake.die();
        fake.script().keeps = false;
        let start = if held > 0 {
            // What comes while nobody is there waits.
            ring.submit(&[(buffer, 8, true)]);
            guest.driver.notify(&ring);
            let start = Instant::now();
            fake.listen();
            start
        } else {
            // Nobody knows whether it came before the end, where nobody keeps note of it.
            fake.listen();
            eventually("another serves", || fake.connections() == 2);
            ring.submit(&[(buffer, 8, true)]);
            guest.driver.notify(&ring);
            Instant::now()
        };
        for head in 1..=held + 1 {
            assert_eq!(ring.wait_used(), (head, 8));
        }
        assert!(
            start.elapsed() < Duration::from_secs(1),
            "{:?}",
            start.elapsed()
        );
        guest.ask(&mut ring);
        assert!(!guest.needs_reset());
        // The notes are handed on, and begin anew with the driver.
        let inflight = fake.script().inflight.clone();
        let notes = usize::from(held > 0);
        assert_eq!(inflight.len(), 2 * notes);
        assert!(inflight.windows(2).all(|pair| pair[0] == pair[1]));
        guest.reset();
        let mut rings = guest.begin();
        guest.ask(&mut rings[1]);
        let inflight = fake.script().inflight.clone();
        assert_eq!(inflight.len(), 3 * notes);
        assert!(inflight.iter().skip(2).all(|file| *file != inflight[0]));
    }
}

#[test]
fn a_back_end_that_dies_with_what_nobody_else_knows_leaves_a_device_that_needs_a_reset_and_works_after_it()
 {
    for want in [Want::Fs, Want::Disk] {
        let mut fake = Fake::start().with(|script| script.protocol &= !fake::INFLIGHT);
        let mut guest = Guest::new(want, &fake);
        let [mut ring, _] = guest.begin();
        guest.ask(&mut ring);
        fake.script().keeps = true;
        let buffer = guest.driver.alloc(64);
        ring.submit(&[(buffer, 8, true)]);
        guest.driver.notify(&ring);
        // It has taken the request, or finds it lost as well.
        fake.die();
        eventually("it needs a reset", || guest.needs_reset());
        fake.script().keeps = false;
        fake.listen();
        guest.reset();
        let mut rings = guest.begin();
        guest.ask(&mut rings[0]);
        assert!(!guest.needs_reset());
    }
}

#[test]
fn a_folder_that_was_never_used_survives_its_back_end_and_one_that_was_does_not_even_when_paused() {
    let mut fake = Fake::start().with(|script| script.protocol &= !fake::INFLIGHT);
    let mut guest = Guest::new(Want::Fs, &fake);
    let [mut ring, _] = guest.begin();
    eventually("it is served", || {
        fake.script().asked.contains(&fake::SET_VRING_ENABLE)
    });
    fake.die();
    fake.listen();
    // What is asked for before the loss is seen could have been taken by the one that died.
    eventually("another serves", || fake.connections() == 2);
    guest.ask(&mut ring);
    guest.driver.function.pause();
    fake.die();
    fake.listen();
    guest.driver.function.resume();
    eventually("it needs a reset", || guest.needs_reset());
}

#[test]
fn a_driver_that_begins_while_nobody_serves_waits_and_can_be_paused_and_reset_meanwhile() {
    let mut fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    fake.die();
    let [mut ring, _] = guest.begin();
    guest.driver.function.pause();
    guest.driver.function.resume();
    guest.reset();
    drop(ring);
    [ring, _] = guest.begin();
    let buffer = guest.driver.alloc(64);
    ring.submit(&[(buffer, 8, true)]);
    guest.driver.notify(&ring);
    fake.listen();
    assert_eq!(ring.wait_used(), (0, 8));
}

#[test]
fn a_change_of_the_configuration_reaches_the_driver_also_while_the_back_end_is_asked() {
    let fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    let generation =
        |guest: &Guest| -> [u8; 1] { guest.driver.common(spec::pci::common::CONFIG_GENERATION) };
    let before = generation(&guest);
    fake.script().config[..8].copy_from_slice(&99_u64.to_le_bytes());
    let say = |flags: u32| {
        let script = fake.script();
        let mut channel = script.channel.as_ref().unwrap();
        let message = [2, 1 | flags, 0].map(u32::to_ne_bytes).concat();
        channel.write_all(&message).unwrap();
    };
    say(0);
    let capacity = |guest: &Guest| u64::from_le_bytes(guest.driver.bar_read(guest.driver.device));
    eventually("the driver sees it", || capacity(&guest) == 99);
    assert_ne!(generation(&guest), before);
    // It wants an answer before it answers itself.
    fake.script().config[..8].copy_from_slice(&100_u64.to_le_bytes());
    fake.script()
        .vices
        .insert(fake::SET_VRING_BASE, Vice::Late(Duration::from_millis(200)));
    let [mut ring, _] = guest.begin();
    say(1 << 3);
    let mut answer = [0; 20];
    let mut channel = fake.script().channel.as_ref().unwrap().try_clone().unwrap();
    channel.read_exact(&mut answer).unwrap();
    assert_eq!(answer[12..], [0; 8]);
    guest.ask(&mut ring);
    eventually("the driver sees it", || capacity(&guest) == 100);
}

#[test]
fn a_device_on_private_memory_is_refused_with_the_remedy_before_anybody_is_spoken_to() {
    let fake = Fake::start();
    let why = open(Want::Fs, fake.socket(), false)
        .unwrap_err()
        .to_string();
    assert!(
        why.starts_with("fs fs0: ") && why.contains("--memory shared=on"),
        "{why}"
    );
    assert!(fake.script().asked.is_empty());
}

#[test]
fn who_cannot_serve_the_device_is_named_with_what_is_missing() {
    let fake = Fake::start();
    let why = refusal(Want::Fs, fake::nobody(fake.folder.path()));
    assert!(
        why.contains("nobody") && why.contains("start it first"),
        "{why}"
    );
    type Change = fn(&mut Script);
    let cases: [(Change, &str); 4] = [
        (|script| script.features &= !(1 << 32), "legacy"),
        (|script| script.protocol &= !fake::CONFIG, "another kind"),
        (
            |script| script.queues = 1,
            "serves 1 queues, and this device has 2",
        ),
        (
            |script| drop(script.vices.insert(fake::GET_CONFIG, Vice::Refuse)),
            "GET_CONFIG",
        ),
    ];
    for (change, words) in cases {
        let fake = Fake::start().with(change);
        let why = refusal(Want::Disk, fake.socket());
        assert!(
            why.starts_with("disk disk0: ") && why.contains(words),
            "{why}"
        );
    }
}

#[test]
fn a_back_end_without_protocol_features_serves_a_folder_all_the_same() {
    let fake = Fake::start().with(|script| script.features &= !(1 << 30));
    let mut guest = Guest::new(Want::Fs, &fake);
    let mut rings = guest.begin();
    guest.ask(&mut rings[0]);
    guest.driver.function.pause();
    guest.driver.function.resume();
    guest.ask(&mut rings[1]);
    let asked = fake.script().asked.clone();
    for request in [fake::GET_PROTOCOL_FEATURES, fake::SET_VRING_ENABLE] {
        assert!(!asked.contains(&request), "{asked:?}");
    }
}
