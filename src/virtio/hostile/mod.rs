//! Guests that do as they please with virtio devices: [`queues`] takes any bytes as what a guest does with a device's
//! registers, its configuration and its queues, and panics where something does not hold that always has to.
//!
//! The device's workers run on the story's own thread ([`stage`]), so that it comes out the same each time. The tests
//! at the end of this file play random bytes; `tests/fuzz` what reaches new code.

mod blocks;
mod devices;
mod guest;
mod stage;

use busway_pci::PciFunction;

use self::devices::Kind;
use self::guest::{Guest, INDIRECT, QUEUE_SIZE, rings};
pub(in crate::virtio) use self::stage::Stage;
use super::life::{DeviceState, LeftRequest, QueuePosition};
use super::spec::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, status};
use crate::devices::hostile::Story;

/// Steps of a story; what is behind them is not played.
const STEPS: usize = 400;
/// How often the workers may be woken for one request that is as it should be.
const TURNS: usize = 8;

/// Plays one story. Its first byte says of which kind the device is.
///
/// # Panics
/// A device panics, does not take back the state that it had, or does not work when it has been reset and is then used
/// as it should be.
pub fn queues(story: &[u8]) {
    let mut story = Story(story);
    let guest = Guest::new(Kind::of(story.byte()));
    begin(&guest, u64::MAX);
    for _ in 0..STEPS {
        if story.0.is_empty() {
            break;
        }
        step(&guest, &mut story);
    }
    recover(&guest);
}

/// A driver that keeps to the rules, up to where it is ready.
fn begin(guest: &Guest, features: u64) {
    guest.negotiate(features);
    guest.set_queues(QUEUE_SIZE);
    guest.ready();
}

fn step(guest: &Guest, story: &mut Story<'_>) {
    match story.byte() % 20 {
        0..4 => {
            let (which, number) = (story.byte(), u64::from(story.byte()));
            let (queue, chain) = guest.kind.request(guest, which, number);
            let first = u16::from(story.byte()) % (QUEUE_SIZE - 4);
            guest.submit(queue, first, &chain);
            guest.notify(queue);
        }
        4..7 => describe(guest, story),
        7 => {
            let queue = queue(story);
            guest.offer(queue, head(story));
            guest.notify(queue);
        }
        8 => jump(guest, story),
        9 => guest.notify(queue(story)),
        10 => guest.write(address(story), &story.take::<8>()),
        11 => poke(guest, story),
        12 => configure(guest, story),
        13 => begin(guest, story.quadword()),
        14 => set_up(guest, story),
        15 => guest.reset(),
        16 => pause(guest, story),
        17 => guest.function.reset(),
        _ => {
            let (which, length) = (story.byte(), story.word());
            guest.outside.happens(which, length);
            guest.notify(u16::from(which) % 8);
        }
    }
}

fn queue(story: &mut Story<'_>) -> u16 {
    u16::from(story.byte()) % 6
}

/// A descriptor's number, seldom one that the queue has not.
fn head(story: &mut Story<'_>) -> u16 {
    match story.byte() {
        255 => story.word(),
        byte => u16::from(byte) % QUEUE_SIZE,
    }
}

/// An address: in the rings, in RAM, across the end of a part of it, or anywhere.
fn address(story: &mut Story<'_>) -> u64 {
    match story.byte() % 8 {
        0..4 => u64::from(story.word()),
        4 => 0x1_ff00 + u64::from(story.word() % 0x200),
        5 => 0x4_0000 + u64::from(story.word()),
        6 => rings(queue(story))[2] + u64::from(story.byte()),
        _ => story.quadword(),
    }
}

/// A length: small, a page or so, as long as there can be, or any.
fn length(story: &mut Story<'_>) -> u32 {
    match story.byte() % 8 {
        0..4 => story.byte().into(),
        4 => 0,
        5 => u32::MAX,
        6 => story.dword(),
        _ => story.word().into(),
    }
}

/// A descriptor of any shape, in a queue's table or in an indirect one, which another may lead to.
fn describe(guest: &Guest, story: &mut Story<'_>) {
    let table = match story.byte() {
        which @ 0..128 => rings(u16::from(which) % 6)[0],
        which => INDIRECT + 0x100 * u64::from(which % 8),
    };
    let (index, shape) = (head(story), story.byte());
    let (address, len) = match shape & 8 {
        0 => (address(story), length(story)),
        _ => {
            let table = INDIRECT + 0x100 * u64::from(story.byte() % 8);
            // Whole tables for the most part.
            (table, 16 * u32::from(story.byte()) + u32::from(shape >> 7))
        }
    };
    let flag = |bit: u8, flag| if shape & bit != 0 { flag } else { 0 };
    let flags = flag(1, DESC_F_NEXT) | flag(2, DESC_F_WRITE) | flag(8, DESC_F_INDIRECT);
    let next = head(story);
    guest.describe(table, index, (address, len, flags, next));
}

/// The available ring's index, flags or event becomes another.
fn jump(guest: &Guest, story: &mut Story<'_>) {
    let queue = queue(story);
    let [_, avail, used] = rings(queue);
    let at = match story.byte() % 4 {
        0 | 1 => avail + 2,
        2 => avail + u64::from(story.byte() % 96),
        _ => used + u64::from(story.byte()),
    };
    guest.write(at, &story.word().to_le_bytes());
    guest.notify(queue);
}

/// An access to the BAR, of any width.
fn poke(guest: &Guest, story: &mut Story<'_>) {
    let (place, within) = (story.byte(), story.word());
    // Common configuration, ISR, device's configuration, notifications and tables are a page each.
    let offset = match place {
        255 => u64::MAX - u64::from(within),
        _ => 0x1000 * u64::from(place % 9) + u64::from(within % 0x1100),
    };
    let data = story.take::<16>();
    let width = usize::from(story.byte() % 17);
    let mut read = [0; 16];
    if let (Some(data), Some(read)) = (data.get(..width), read.get_mut(..width)) {
        guest
            .function
            .bar_read(busway_pci::BarIndex::Bar(0), offset, read);
        guest.bar_write(offset, data);
    }
}

/// An access to configuration space.
fn configure(guest: &Guest, story: &mut Story<'_>) {
    let offset = story.word() % 0x1000;
    let mut data = story.take::<4>();
    let width = [1, 2, 4, 1].get(usize::from(story.byte() % 4));
    if let Some(data) = data.get_mut(..width.copied().unwrap_or(1)) {
        guest.function.config_write(offset, data);
        guest.function.config_read(offset, data);
    }
}

/// A driver that sets up one queue as it likes, and is ready.
fn set_up(guest: &Guest, story: &mut Story<'_>) {
    guest.negotiate(story.quadword());
    let queue = queue(story);
    let size = match story.byte() % 4 {
        0 => story.word(),
        shift => 1 << (2 + shift),
    };
    let mut places = rings(queue);
    let which = usize::from(story.byte());
    if let Some(place) = places.get_mut(which) {
        *place = address(story);
    }
    guest.set_queue(queue, size, places);
    guest.ready();
    guest.notify(queue);
}

/// A pause, in which the state is written and read; or another is, as from somebody's file.
fn pause(guest: &Guest, story: &mut Story<'_>) {
    let function = &guest.function;
    function.pause();
    let mut state = function.state().expect("it is paused");
    match story.byte() % 4 {
        0 => {}
        1 => function.restore(&state).expect("its own state"),
        2 => {
            let saved = serde_json::to_string(&state).expect("JSON");
            let state = serde_json::from_str(&saved).expect("JSON");
            function.restore(&state).expect("its own state");
        }
        _ => {
            let position = QueuePosition {
                next_avail: story.word(),
                next_used: story.word(),
            };
            state.progress.queues = vec![position; usize::from(story.byte() % 8)];
            if let DeviceState::Disk(disk) = &mut state.progress.device {
                disk.left = (0..story.byte() % 4)
                    .map(|queue| LeftRequest {
                        queue: queue.into(),
                        head: story.byte().into(),
                    })
                    .collect();
            }
            if let DeviceState::Console(console) = &mut state.progress.device {
                console.printed = story.dword() as usize;
                console.input = vec![b'x'; usize::from(story.word() % 300)];
            }
            let _not_this_ones = function.restore(&state);
        }
    }
    function.resume();
    guest.notify(0);
}

/// Whatever has happened, a driver that resets the device and keeps to the rules is served.
fn recover(guest: &Guest) {
    let first = guest.kind.first();
    guest.reset();
    assert_eq!(guest.status(), 0, "a reset that does not end");
    begin(guest, u64::MAX);
    let ready = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;
    assert_eq!(guest.status(), ready, "{:?} does not start", guest.kind);
    let (queue, chain) = guest.kind.request(guest, first, 0);
    guest.submit(queue, 0, &chain);
    for _ in 0..TURNS {
        guest.notify(queue);
        if guest.used(queue).0 == 1 {
            break;
        }
    }
    let (used, written) = guest.used(queue);
    assert_eq!(used, 1, "{:?} does not answer", guest.kind);
    let right = guest.kind.is_right(guest, written);
    assert!(
        right,
        "{:?} answers wrongly, with {written} bytes",
        guest.kind
    );
    assert_eq!(guest.status(), ready, "{:?} needs a reset", guest.kind);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_of_device_serves_a_guest_that_keeps_to_the_rules() {
        for (byte, _) in (0..).zip(Kind::ALL) {
            queues(&[byte]);
        }
    }

    proptest! {
        #[test]
        fn no_guest_has_a_device_panic_or_keeps_it_from_working_after_a_reset(
            story in proptest::collection::vec(any::<u8>(), 0..1200)
        ) {
            queues(&story);
        }
    }
}
