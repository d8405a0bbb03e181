//! Back ends that lie, stammer, fall silent or die, at each message: nobody waits without end, and the rest works.

use super::*;

/// Each message that a device needs before its driver comes, and what a back end can do in its place.
#[test]
fn a_back_end_that_behaves_badly_at_the_beginning_is_refused_in_bounded_time() {
    let questions = [
        fake::GET_FEATURES,
        fake::GET_PROTOCOL_FEATURES,
        fake::GET_QUEUE_NUM,
        fake::GET_CONFIG,
    ];
    let others = [fake::SET_OWNER, fake::SET_PROTOCOL_FEATURES];
    let vices = |request| {
        [
            Vice::Close,
            Vice::Says(vec![0xff; 4096]),
            Vice::Says([request, 5, u32::MAX].map(u32::to_ne_bytes).concat()),
        ]
    };
    std::thread::scope(|scope| {
        for request in questions.into_iter().chain(others) {
            for vice in vices(request) {
                if matches!(vice, Vice::Says(_)) && others.contains(&request) {
                    // What nobody asked for is taken for the next answer.
                    continue;
                }
                scope.spawn(move || {
                    let fake = Fake::start();
                    fake.script().vices.insert(request, vice.clone());
                    let why = refusal_or_late(&fake);
                    let named = why.starts_with("disk disk0: the back end at ");
                    assert!(named, "{request} {vice:?}: {why}");
                });
            }
        }
    });
}

fn refusal_or_late(fake: &Fake) -> String {
    let start = Instant::now();
    let why = refusal(Want::Disk, fake.socket());
    assert!(start.elapsed() < Duration::from_secs(8), "{why}");
    why
}

#[test]
fn a_back_end_that_does_not_answer_or_only_begins_to_is_refused_when_its_time_is_over() {
    std::thread::scope(|scope| {
        for (request, vice) in [
            (fake::GET_FEATURES, Vice::Silent),
            (fake::GET_CONFIG, Vice::Stammer),
        ] {
            scope.spawn(move || {
                let fake = Fake::start().with(|script| drop(script.vices.insert(request, vice)));
                let why = refusal_or_late(&fake);
                assert!(why.contains("no answer within 5 s"), "{why}");
            });
        }
    });
}

#[test]
fn a_back_end_that_dies_at_any_message_of_a_start_is_waited_for_and_served_by_the_next() {
    for request in [
        fake::SET_FEATURES,
        fake::SET_MEM_TABLE,
        fake::SET_VRING_ADDR,
        fake::SET_VRING_BASE,
        fake::SET_VRING_KICK,
        fake::SET_VRING_ENABLE,
        fake::GET_INFLIGHT_FD,
        fake::SET_INFLIGHT_FD,
    ] {
        let fake = Fake::start().with(|script| drop(script.vices.insert(request, Vice::Close)));
        let mut guest = Guest::new(Want::Disk, &fake);
        let [mut ring, _] = guest.begin();
        eventually("it was asked", || fake.script().asked.contains(&request));
        fake.script().vices.clear();
        guest.ask(&mut ring);
        assert!(!guest.needs_reset());
    }
}

/// Neither who pauses nor the driver waits for a back end that keeps the queues.
#[test]
fn a_back_end_that_keeps_the_queues_holds_up_no_driver_and_a_pause_for_a_second() {
    let fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    fake.script()
        .vices
        .insert(fake::GET_VRING_BASE, Vice::Silent);
    let start = Instant::now();
    guest
        .driver
        .set_common(spec::pci::common::DEVICE_STATUS, &[0]);
    assert!(
        start.elapsed() < Duration::from_millis(500),
        "the driver waited"
    );
    assert_ne!(guest.driver.status(), 0, "the reset is not over");
    let outstanding = guest.driver.function.outstanding().unwrap();
    assert!(outstanding.contains("back end"), "{outstanding}");
    eventually("it is over", || guest.driver.status() == 0);
    fake.script().vices.clear();
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    fake.script().vices.insert(
        fake::GET_VRING_BASE,
        Vice::Late(Duration::from_millis(1500)),
    );
    let start = Instant::now();
    guest.driver.function.pause();
    let took = start.elapsed();
    assert!(took < Duration::from_millis(1400), "{took:?}");
    // It goes on where the back end was, when that has said so.
    fake.script().vices.clear();
    guest.driver.function.resume();
    guest.ask(&mut ring);
    assert!(!guest.needs_reset());
}

#[test]
fn a_back_end_that_talks_unasked_or_comes_back_as_another_is_not_listened_to() {
    let mut fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    let twice = [fake::SET_VRING_ENABLE, 5, 8, 0, 0].map(u32::to_ne_bytes);
    let twice = Vice::Says(twice.concat().repeat(2));
    fake.script().vices.insert(fake::SET_VRING_ENABLE, twice);
    let [mut ring, _] = guest.begin();
    eventually("it was connected with anew", || fake.connections() > 1);
    fake.script().vices.clear();
    guest.ask(&mut ring);
    fake.die();
    // It lacks what the driver uses: nobody is served by it.
    fake.script().features &= !(1 << 28);
    fake.listen();
    eventually("it needs a reset", || guest.needs_reset());
    fake.script().features |= 1 << 28;
    fake.die();
    fake.listen();
    guest.reset();
    let [mut ring, _] = guest.begin();
    guest.ask(&mut ring);
    assert!(!guest.needs_reset());
}

/// One ring is served, and has completed a request, when the back end dies at the other.
#[test]
fn a_request_that_was_done_before_a_start_was_over_is_not_done_again() {
    let fake = Fake::start();
    let mut guest = Guest::new(Want::Disk, &fake);
    fake.script().dies_enabling = Some(1);
    let [mut ring, _] = guest.begin();
    let buffer = guest.driver.alloc(64);
    ring.submit(&[(buffer, 8, true)]);
    guest.driver.notify(&ring);
    eventually("it was connected with anew", || fake.connections() > 1);
    assert_eq!(ring.wait_used(), (0, 8));
    guest.ask(&mut ring);
    assert_eq!(ring.poll_used(), None);
    assert!(!guest.needs_reset());
}
