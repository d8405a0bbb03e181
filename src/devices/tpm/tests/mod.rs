//! A guest's driver at the registers, with a swtpm that does as a script says behind them, and with Debian's.

mod debians;
mod fake;

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::command::{self, RC_FAILURE};
use super::link::Limits;
use super::{Tpm, TpmError};
use crate::kvm::BusDevice;
use fake::{Fake, Vice, What};
use std::sync::Arc;

pub(super) const BASE: u64 = 0xfed4_0000;

const LOC_CTRL: u64 = 0x08;
const CTRL_REQ: u64 = 0x40;
const CTRL_STS: u64 = 0x44;
const CTRL_CANCEL: u64 = 0x48;
const CTRL_START: u64 = 0x4c;
const BUFFER: u64 = 0x80;

/// A guest's driver, which has a locality.
pub(super) struct Driver(Arc<dyn BusDevice>);

impl Driver {
    pub(super) fn of(tpm: &Tpm) -> Self {
        Self(tpm.registers())
    }

    fn read(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u64, value: u32) {
        self.0.write(register, &value.to_le_bytes());
    }

    fn start(&self, command: &[u8]) {
        self.write(LOC_CTRL, 1);
        self.write(CTRL_REQ, 1);
        for (place, piece) in command.chunks(8).enumerate() {
            self.0.write(BUFFER + 8 * place as u64, piece);
        }
        self.write(CTRL_START, 1);
    }

    /// Looks until the command is done, as a driver does.
    fn response(&self) -> Vec<u8> {
        let start = Instant::now();
        while self.read(CTRL_START) != 0 {
            assert!(start.elapsed() < Duration::from_secs(60), "no response");
            std::thread::yield_now();
        }
        let mut whole = vec![0; 3968];
        self.0.read(BUFFER, &mut whole);
        let size = command::size(&whole).unwrap();
        whole.truncate(size);
        whole
    }

    pub(super) fn ask(&self, command: &[u8]) -> Vec<u8> {
        self.start(command);
        self.response()
    }

    pub(super) fn has_failed(&self) -> bool {
        self.read(CTRL_STS) & 1 != 0
    }
}

/// What the scripted swtpm counts, and answers with how often it was.
const MEASURE: [u8; 10] = fake::MEASURE;

fn measured(times: u8) -> Vec<u8> {
    fake::measured(times)
}

fn failure() -> Vec<u8> {
    command::response(RC_FAILURE).to_vec()
}

/// Limits that a test waits out.
fn short() -> Limits {
    let soon = Duration::from_millis(50);
    Limits {
        connect: soon,
        control: soon,
        command: soon,
        cancelled: soon,
        end: soon,
    }
}

fn open(fake: &Fake) -> Tpm {
    Tpm::open(fake.socket(), BASE).unwrap()
}

/// Control commands by their numbers: the TPM is switched off and on.
const SWITCHED_ON: [u32; 4] = [14, 17, 2, 4];

#[test]
fn commands_are_carried_out_by_swtpm_and_answered_in_the_guests_buffer() {
    let fake = Fake::new();
    let tpm = open(&fake);
    assert_eq!(fake.asked(), [&[1, 16][..], &SWITCHED_ON].concat());
    let driver = Driver::of(&tpm);
    for times in 1..=3 {
        assert_eq!(driver.ask(&MEASURE), measured(times));
    }
    // The longest that there can be, in both directions.
    let mut long = vec![0x5a; 3968];
    long[..10].copy_from_slice(&[0x80, 1, 0, 0, 0x0f, 0x80, 0, 0, 0, fake::ECHO]);
    assert_eq!(driver.ask(&long), long);
    assert!(!driver.has_failed());
    drop(tpm);
    assert_eq!(fake.asked().last(), Some(&14), "switched off with the VM");
}

#[test]
fn a_reset_of_the_guest_is_one_of_the_tpm_whose_measurements_begin_anew() {
    let fake = Fake::new();
    let tpm = open(&fake);
    let driver = Driver::of(&tpm);
    for life in 1..=3 {
        assert_eq!(driver.ask(&MEASURE), measured(1));
        assert_eq!(driver.ask(&MEASURE), measured(2));
        assert_eq!(
            fake.asked(),
            [&[1, 16][..], &SWITCHED_ON.repeat(life)].concat()
        );
        tpm.reset();
        // The driver has to begin anew as well.
        driver.write(CTRL_START, 1);
        assert_eq!((driver.read(CTRL_START), driver.read(CTRL_STS)), (0, 2));
    }
    assert_eq!(fake.connections(), 1);
}

#[test]
fn a_swtpm_that_lies_or_dies_makes_a_tpm_that_has_failed_until_the_guest_restarts() {
    let oversize = [0x80, 1, 0, 0, 0x0f, 0x81, 0, 0, 0, 0];
    let endless = [0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let twice = [measured(1), measured(1)].concat();
    for vice in [
        Vice::Close,
        Vice::Says(oversize.to_vec()),
        Vice::Says(endless.to_vec()),
        Vice::Says(vec![0; 10]),
        Vice::Says(vec![0xff; 4096]),
        Vice::Says(twice),
    ] {
        let fake = Fake::new();
        let tpm = open(&fake);
        let driver = Driver::of(&tpm);
        fake.set(What::Command, Some(vice.clone()));
        // Of two responses the first is one, and that the other was not asked for is seen before the next command.
        let says_two = matches!(&vice, Vice::Says(bytes) if bytes.len() == 26);
        let first = if says_two { measured(1) } else { failure() };
        assert_eq!(driver.ask(&MEASURE), first, "{vice:?}");
        fake.set(What::Command, None);
        for _ in 0..3 {
            assert_eq!(driver.ask(&MEASURE), failure(), "{vice:?}");
            assert!(driver.has_failed());
        }
        tpm.reset();
        assert_eq!(driver.ask(&MEASURE), measured(1), "{vice:?}");
        assert!(!driver.has_failed());
    }
}

#[test]
fn a_swtpm_that_goes_while_nothing_is_asked_is_noticed_and_one_in_its_place_is_found_at_the_restart()
 {
    let mut fake = Fake::new();
    let tpm = open(&fake);
    let driver = Driver::of(&tpm);
    fake.die();
    let start = Instant::now();
    while !driver.has_failed() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::yield_now();
    }
    assert_eq!(driver.ask(&MEASURE), failure());
    // Without one the restarted guest's has failed as well.
    tpm.reset();
    assert_eq!(driver.ask(&MEASURE), failure());
    fake.revive();
    assert_eq!(driver.ask(&MEASURE), failure());
    tpm.reset();
    assert_eq!(driver.ask(&MEASURE), measured(1));
}

#[test]
fn a_swtpm_that_hangs_is_waited_for_in_bounded_time_and_by_no_vcpu() {
    let fake = Fake::new();
    let limits = Limits {
        command: Duration::from_secs(1),
        ..Limits::default()
    };
    let tpm = Tpm::open_within(fake.socket(), BASE, limits).unwrap();
    let driver = Driver::of(&tpm);
    fake.set(What::Command, Some(Vice::Silent));
    driver.start(&MEASURE);
    // The start has returned, and the registers are read and written while it hangs.
    assert_eq!(driver.read(CTRL_START), 1);
    assert_eq!(driver.response(), failure());
    assert!(driver.has_failed());
}

#[test]
fn a_command_that_is_cancelled_ends_with_what_swtpm_then_says() {
    let fake = Fake::new();
    let tpm = open(&fake);
    let driver = Driver::of(&tpm);
    fake.set(What::Command, Some(Vice::UntilCancelled));
    for _ in 0..3 {
        driver.start(&MEASURE);
        assert_eq!(driver.read(CTRL_START), 1);
        driver.write(CTRL_CANCEL, 1);
        // TPM_RC_CANCELED
        assert_eq!(driver.response(), command::response(0x909));
    }
    fake.set(What::Command, None);
    assert_eq!(driver.ask(&MEASURE), measured(1));
    assert_eq!(fake.asked().iter().filter(|one| **one == 9).count(), 3);
}

#[test]
fn one_that_swtpm_does_not_end_when_it_is_cancelled_is_not_waited_for_without_end() {
    let fake = Fake::new();
    let limits = Limits {
        cancelled: Duration::from_millis(100),
        ..Limits::default()
    };
    let tpm = Tpm::open_within(fake.socket(), BASE, limits).unwrap();
    let driver = Driver::of(&tpm);
    fake.set(What::Command, Some(Vice::Silent));
    driver.start(&MEASURE);
    driver.write(CTRL_CANCEL, 1);
    assert_eq!(driver.response(), failure());
}

#[test]
fn a_response_of_the_life_before_is_nobodys() {
    let fake = Fake::new();
    let tpm = open(&fake);
    let driver = Driver::of(&tpm);
    fake.set(What::Command, Some(Vice::UntilCancelled));
    driver.start(&MEASURE);
    fake.wait_for_command();
    fake.set(What::Command, None);
    tpm.reset();
    assert_eq!(driver.ask(&MEASURE), measured(1));
    assert_eq!(
        fake.asked(),
        [&[1, 16][..], &SWITCHED_ON, &[9], &SWITCHED_ON].concat()
    );
}

#[test]
fn a_vm_ends_at_once_whatever_its_tpm_is_at() {
    for what in [What::Command, What::Control(14)] {
        let fake = Fake::new();
        let tpm = open(&fake);
        let driver = Driver::of(&tpm);
        fake.set(what, Some(Vice::Silent));
        match what {
            What::Command => {
                driver.start(&MEASURE);
                fake.wait_for_command();
            }
            What::Control(_) => tpm.reset(),
        }
        let start = Instant::now();
        drop(tpm);
        // Five minutes and ten seconds are the limits of the two.
        assert!(start.elapsed() < Duration::from_secs(5), "{what:?}");
    }
}

fn refused(fake: &Fake, limits: Limits) -> String {
    let error: TpmError = Tpm::open_within(fake.socket(), BASE, limits).unwrap_err();
    error.to_string()
}

#[test]
fn a_tpm_that_cannot_be_had_is_named_with_what_helps() {
    let mut fake = Fake::new();
    fake.set(What::Control(1), Some(Vice::Silent));
    let error = refused(&fake, short());
    assert!(error.contains("in time (CMD_GET_CAPABILITY)"), "{error}");
    for (what, vice, says) in [
        (
            What::Control(1),
            Vice::Says(vec![0; 8]),
            "capabilities 0x3405",
        ),
        (What::Control(16), Vice::Close, "closed the connection"),
        (
            What::Control(2),
            Vice::Says(vec![0, 0, 0, 9]),
            "CMD_INIT with 0x9",
        ),
        (
            What::Control(17),
            Vice::Says([[0; 4], [0, 0, 0x10, 0], [0; 4], [0; 4]].concat()),
            "4096 bytes",
        ),
        (
            What::Command,
            Vice::Says(vec![0, 0xc4, 0, 0, 0, 10, 0, 0, 0, 0x26]),
            "--tpm2",
        ),
        (
            What::Command,
            Vice::Says(b"HTTP/1.1 400 Bad".to_vec()),
            "no swtpm",
        ),
    ] {
        fake.set(what, Some(vice));
        let error = refused(&fake, Limits::default());
        assert!(error.starts_with("--tpm socket=/"), "{error}");
        assert!(error.contains(says), "{says}: {error}");
        fake.set(what, None);
    }
    fake.die();
    let error = refused(&fake, Limits::default());
    assert!(error.contains("start `swtpm socket --tpm2"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_swtpm_says_the_guest_is_answered_with_a_response_or_that_the_tpm_has_failed(
        control in prop::option::of((prop::sample::select(&[1_u32, 16, 14, 17, 2, 4][..]), prop::collection::vec(any::<u8>(), 0..40))),
        says in prop::collection::vec(any::<u8>(), 0..60),
        header in any::<bool>(),
    ) {
        let fake = Fake::new();
        if let Some((command, says)) = control {
            fake.set(What::Control(command), Some(Vice::Says(says)));
        }
        // Where it cannot be had at all, that is said.
        if let Ok(tpm) = Tpm::open_within(fake.socket(), BASE, short()) {
            let says = match header {
                true => [&[0x80, 1, 0, 0, 0, 20][..], &says].concat(),
                false => says,
            };
            fake.set(What::Command, Some(Vice::Says(says.clone())));
            let driver = Driver::of(&tpm);
            for _ in 0..2 {
                let response = driver.ask(&MEASURE);
                prop_assert!(says.starts_with(&response) || response == failure(), "{response:x?}");
            }
        }
    }
}
