use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::*;
use crate::Affected;
use crate::fake::{FakeDevice, held_up};

const A: &str = "0000:02:01.0";
const B: &str = "0000:02:02.0";
const ELSEWHERE: &str = "0000:05:00.0";

fn affected(address: &str) -> Affected {
    Affected {
        address: address.parse().unwrap(),
        owned: true,
        driver: Some("vfio-pci".to_owned()),
    }
}

/// A device without a reset of its own, on a bus with these.
fn on_bus(bus: &[&str]) -> Arc<FakeDevice> {
    let fake = FakeDevice {
        function_reset: None,
        ..FakeDevice::default()
    };
    *fake.reach.lock().unwrap() = bus.iter().map(|address| affected(address)).collect();
    Arc::new(fake)
}

fn with_reset(function_reset: FunctionReset) -> Arc<FakeDevice> {
    Arc::new(FakeDevice {
        function_reset: Some(function_reset),
        ..FakeDevice::default()
    })
}

fn vm(devices: &[(&str, &Arc<FakeDevice>)]) -> (Arc<Resets>, Vec<ResetHandle>) {
    let resets = Arc::<Resets>::default();
    let devices: Vec<(&str, Arc<dyn DeviceIo>)> = devices
        .iter()
        .map(|&(name, fake)| (name, fake.clone() as Arc<dyn DeviceIo>))
        .collect();
    for (name, io) in &devices {
        resets.add(name, io.clone());
    }
    resets.begin();
    let handles = devices.iter().map(|(name, io)| resets.join(name, io));
    let handles = handles.collect();
    (resets, handles)
}

fn hot(devices: &[&Arc<FakeDevice>]) -> usize {
    let counts = devices
        .iter()
        .map(|fake| fake.hot_resets.lock().unwrap().len());
    counts.sum()
}

#[test]
fn a_shared_bus_is_reset_once_when_all_on_it_are_quiet_and_not_before() {
    let (a, b) = (on_bus(&[A, B]), on_bus(&[A, B]));
    let other = with_reset(FunctionReset::Flr);
    let (_resets, handles) = vm(&[(A, &a), (ELSEWHERE, &other), (B, &b)]);
    assert_eq!(hot(&[&a, &b]), 1, "at the start");
    assert_eq!(other.resets().len(), 1);
    for (round, last) in [(2, 2), (3, 0)] {
        handles.iter().for_each(ResetHandle::touch);
        let first = 2 - last;
        handles[first].reset();
        handles[1].reset();
        assert_eq!(hot(&[&a, &b]), round - 1, "one is in use");
        handles[last].reset();
        assert_eq!(hot(&[&a, &b]), round);
        assert_eq!(other.resets().len(), round);
    }
}

#[test]
fn a_mediated_device_is_on_no_bus_and_waits_for_nobody() {
    const MEDIATED: &str = "bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3";
    for function_reset in [Some(FunctionReset::Mediated), None] {
        let (a, b) = (on_bus(&[A, B]), on_bus(&[A, B]));
        let card = Arc::new(FakeDevice {
            mediated: true,
            function_reset,
            ..FakeDevice::default()
        });
        let (_resets, handles) = vm(&[(A, &a), (MEDIATED, &card), (B, &b)]);
        let own = usize::from(function_reset.is_some());
        assert_eq!(
            (hot(&[&a, &b]), card.resets().len()),
            (1, own),
            "at the start"
        );
        handles.iter().for_each(ResetHandle::touch);
        // It is in use while the bus of the others is reset.
        handles[0].reset();
        handles[2].reset();
        assert_eq!((hot(&[&a, &b]), card.resets().len()), (2, own));
        assert!(handles[0].is_shared() && !handles[1].is_shared());
        handles[1].reset();
        assert_eq!((hot(&[&a, &b, &card]), card.resets().len()), (2, 2 * own));
    }
}

#[test]
fn a_function_that_is_used_again_is_not_hit_by_a_reset_that_it_had_asked_for() {
    let (a, b) = (on_bus(&[A, B]), on_bus(&[A, B]));
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    handles.iter().for_each(ResetHandle::touch);
    handles[0].reset();
    handles[0].touch();
    handles[1].reset();
    assert_eq!(hot(&[&a, &b]), 1, "only that of the start");
    handles[0].reset();
    assert_eq!(hot(&[&a, &b]), 2);
}

#[test]
fn one_with_a_reset_of_its_own_holds_back_the_reset_of_the_bus_it_is_on() {
    let (a, b) = (on_bus(&[A, B]), with_reset(FunctionReset::Flr));
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    handles.iter().for_each(ResetHandle::touch);
    handles[0].reset();
    assert_eq!(hot(&[&a]), 1);
    handles[1].reset();
    assert_eq!(hot(&[&a]), 2);
    // At the start the bus's reset was its own as well.
    assert_eq!(b.resets().len(), 1);
}

#[test]
fn one_that_does_not_answer_keeps_nobody_waiting_and_is_not_reset_by_itself() {
    let (a, b) = (on_bus(&[A, B]), with_reset(FunctionReset::Flr));
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    let own = b.resets().len();
    b.silent.store(true, Ordering::Relaxed);
    for round in 2..4 {
        handles.iter().for_each(ResetHandle::touch);
        handles[1].reset();
        handles[0].reset();
        assert_eq!((hot(&[&a]), b.resets().len()), (round, own));
    }
}

#[test]
fn one_alone_that_does_not_answer_has_its_bus_reset_but_not_when_it_is_let_go() {
    let a = Arc::new(FakeDevice {
        function_reset: Some(FunctionReset::PowerState),
        reach: Mutex::new(vec![affected(A)]),
        ..FakeDevice::default()
    });
    let (_resets, handles) = vm(&[(A, &a)]);
    a.silent.store(true, Ordering::Relaxed);
    handles[0].touch();
    handles[0].reset();
    assert_eq!((hot(&[&a]), a.resets().len()), (2, 0));
    handles[0].touch();
    handles[0].retire();
    assert_eq!((hot(&[&a]), a.resets().len()), (2, 0));
}

#[test]
fn what_waits_for_others_has_the_next_best_at_once() {
    let (a, b) = (on_bus(&[A, B]), on_bus(&[A, B]));
    let power = FakeDevice {
        function_reset: Some(FunctionReset::PowerState),
        reach: Mutex::new(vec![affected(A), affected(B)]),
        ..FakeDevice::default()
    };
    drop(a);
    let a = Arc::new(power);
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    assert_eq!(a.resets().len(), 0, "the bus was reset");
    handles.iter().for_each(ResetHandle::touch);
    handles[0].reset();
    assert_eq!((a.resets().len(), hot(&[&a, &b])), (1, 1));
    handles[1].reset();
    assert_eq!(hot(&[&a, &b]), 2);
}

#[test]
fn a_blocker_leaves_the_next_best_or_nothing() {
    let stranger = Affected {
        owned: false,
        driver: Some("igb".to_owned()),
        ..affected(B)
    };
    let a = on_bus(&[A]);
    a.reach.lock().unwrap().push(stranger.clone());
    let power = with_reset(FunctionReset::PowerState);
    *power.reach.lock().unwrap() = vec![affected(ELSEWHERE), stranger];
    let (_resets, handles) = vm(&[(A, &a), (ELSEWHERE, &power)]);
    assert_eq!(handles[0].method(), ResetMethod::None);
    assert_eq!(handles[1].method().word(), "pm");
    assert_eq!((a.resets().len(), power.resets().len()), (0, 1));
    assert_eq!(hot(&[&a, &power]), 0);
}

#[test]
fn a_blocker_that_went_is_found_out_at_the_next_reset() {
    let a = on_bus(&[A]);
    a.reach.lock().unwrap()[0].owned = false;
    let (_resets, handles) = vm(&[(A, &a)]);
    assert_eq!(handles[0].method(), ResetMethod::None);
    a.reach.lock().unwrap()[0].owned = true;
    handles[0].touch();
    handles[0].reset();
    assert_eq!(hot(&[&a]), 1);
    assert_eq!(handles[0].method().word(), "hot");
}

#[test]
fn a_bus_that_does_not_come_up_again_is_tried_once_for_all_on_it() {
    let on_dead_bus = || {
        Arc::new(FakeDevice {
            function_reset: Some(FunctionReset::PowerState),
            reach: Mutex::new(vec![affected(A), affected(B)]),
            bus_is_dead: true.into(),
            ..FakeDevice::default()
        })
    };
    let (a, b) = (on_dead_bus(), on_dead_bus());
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    for round in 1..3 {
        assert_eq!(hot(&[&a, &b]), round);
        assert!([&a, &b].iter().all(|fake| fake.resets().len() >= round));
        assert_eq!(handles[1].method().word(), "pm");
        handles.iter().for_each(ResetHandle::touch);
        handles.iter().for_each(ResetHandle::reset);
    }
}

#[test]
fn what_the_kernel_did_by_opening_and_will_do_by_closing_is_not_done_again() {
    let opened = |function_reset| {
        Arc::new(FakeDevice {
            function_reset: Some(function_reset),
            reset_by_opening: true,
            reach: Mutex::new(vec![affected(A)]),
            ..FakeDevice::default()
        })
    };
    let (flr, power) = (
        opened(FunctionReset::Flr),
        opened(FunctionReset::PowerState),
    );
    let (_resets, handles) = vm(&[(ELSEWHERE, &flr), (A, &power)]);
    assert_eq!((flr.resets().len(), hot(&[&power])), (0, 1));
    handles.iter().for_each(ResetHandle::touch);
    handles.iter().for_each(ResetHandle::reset);
    assert_eq!((flr.resets().len(), hot(&[&power])), (1, 2));
    handles.iter().for_each(ResetHandle::touch);
    handles.iter().for_each(ResetHandle::retire);
    assert_eq!((flr.resets().len(), hot(&[&power])), (1, 3));
}

#[test]
fn one_that_left_holds_nobody_back() {
    let (a, b) = (on_bus(&[A, B]), on_bus(&[A, B]));
    let (resets, mut handles) = vm(&[(A, &a), (B, &b)]);
    handles.iter().for_each(ResetHandle::touch);
    handles.pop();
    assert_eq!(resets.lock().len(), 1);
    handles[0].reset();
    assert_eq!(hot(&[&a]), 2);
}

#[test]
fn one_that_comes_to_a_bus_in_use_has_the_next_best_and_the_bus_when_all_are_quiet() {
    let a = on_bus(&[A, B]);
    let (resets, handles) = vm(&[(A, &a)]);
    handles[0].touch();
    let b = Arc::new(FakeDevice {
        function_reset: Some(FunctionReset::PowerState),
        reach: Mutex::new(vec![affected(A), affected(B)]),
        ..FakeDevice::default()
    });
    let io: Arc<dyn DeviceIo> = b.clone();
    let _late = resets.join(B, &io);
    assert_eq!((b.resets().len(), hot(&[&a, &b])), (1, 1), "A is in use");
    handles[0].reset();
    assert_eq!((b.resets().len(), hot(&[&a, &b])), (1, 2));
}

#[test]
fn a_device_that_somebody_holds_for_a_moment_is_reset_all_the_same() {
    let a = with_reset(FunctionReset::Flr);
    let (_resets, handles) = vm(&[(A, &a)]);
    handles[0].touch();
    a.resets_held_up.store(2, Ordering::Relaxed);
    handles[0].reset();
    assert_eq!(a.resets().len(), 2);
    // Not for ever: while the host unbinds it, it waits for the VM.
    a.resets_held_up.store(1000, Ordering::Relaxed);
    handles[0].reset();
    assert_eq!(a.resets().len(), 2);
    assert!(a.resets_held_up.load(Ordering::Relaxed) > 900);
}

#[test]
fn a_reset_that_takes_long_holds_nobody_up_but_what_is_on_its_bus() {
    let [slow, far, near] = [(); 3].map(|()| with_reset(FunctionReset::Flr));
    let (resets, handles) = vm(&[(A, &slow), (ELSEWHERE, &far), (B, &near)]);
    let (go_on, begun) = held_up(&slow);
    let resetting = || {
        let devices = [&slow, &far, &near].map(|fake| fake.clone() as Arc<dyn DeviceIo>);
        devices.map(|io| resets.is_resetting(&io))
    };
    let (near_is_reset, near_done) = mpsc::channel();
    handles.iter().for_each(ResetHandle::touch);
    thread::scope(|scope| {
        scope.spawn(|| handles[0].reset_function());
        begun.recv().unwrap();
        assert_eq!(resetting(), [true, false, false]);
        handles[1].reset();
        handles[1].touch();
        handles[1].reset_function();
        assert_eq!(far.resets().len(), 3);
        assert_eq!(handles[0].method().word(), "flr");
        // One at a time on a bus: the kernel would refuse the second.
        scope.spawn(|| {
            handles[2].reset();
            near_is_reset.send(()).unwrap();
        });
        let pause = Duration::from_millis(50);
        assert!(near_done.recv_timeout(pause).is_err());
        assert_eq!(near.resets().len(), 1);
        drop(go_on);
        near_done.recv().unwrap();
        assert_eq!(near.resets().len(), 2);
    });
    assert_eq!(resetting(), [false; 3]);
}

#[test]
fn a_hot_reset_waits_for_a_neighbours_own_and_who_uses_what_it_touches_waits_for_it() {
    let (a, b) = (on_bus(&[A, B]), with_reset(FunctionReset::Flr));
    let (_resets, handles) = vm(&[(A, &a), (B, &b)]);
    handles.iter().for_each(ResetHandle::touch);
    let (b_goes_on, b_begun) = held_up(&b);
    let (a_goes_on, a_begun) = held_up(&a);
    let (used, is_used) = mpsc::channel();
    let pause = Duration::from_millis(50);
    thread::scope(|scope| {
        scope.spawn(|| handles[1].reset());
        b_begun.recv().unwrap();
        // It has none of its own, and its bus's has to wait.
        scope.spawn(|| handles[0].reset());
        assert!(a_begun.recv_timeout(pause).is_err());
        assert_eq!(hot(&[&a]), 1);
        drop(b_goes_on);
        a_begun.recv().unwrap();
        scope.spawn(|| {
            handles[1].touch();
            used.send(()).unwrap();
        });
        assert!(is_used.recv_timeout(pause).is_err(), "while it is reset");
        drop(a_goes_on);
        is_used.recv().unwrap();
    });
    assert_eq!(hot(&[&a]), 2);
}

#[test]
fn a_device_of_which_no_function_was_made_is_not_kept_open() {
    let fake = with_reset(FunctionReset::Flr);
    let resets = Resets::default();
    let io: Arc<dyn DeviceIo> = fake.clone();
    resets.add("0000:01:00.0", io.clone());
    assert_eq!(Arc::strong_count(&fake), 3);
    resets.forget(&io);
    drop(io);
    assert_eq!(Arc::strong_count(&fake), 1, "it closes with its last owner");
}
