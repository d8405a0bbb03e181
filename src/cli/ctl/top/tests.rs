//! What is seen between two looks, and how it looks.

use std::cell::RefCell;

use serde_json::{Value, json};

use super::*;

/// A VM with two vCPUs, a drive, a disk and a NIC; `round` says how far it is.
fn activity(round: u64) -> Value {
    let vcpu = |id: u64| {
        json!({
            "id": id,
            "exits": {
                "mmio_read": round * 10, "mmio_write": round * (id + 1) * 1500, "pio_read": 0, "pio_write": round,
                "other": 0,
            },
            "kvm": { "exits": 40_000 * round, "halt_exits": 100 * round, "irq_injections": 900 * round, "pf_taken": 3 },
        })
    };
    let thread = |tid: u64, name: &str, cpu_us: u64| json!({ "tid": tid, "name": name, "cpu_us": cpu_us * round, "minor_faults": 2 * round, "major_faults": 0 });
    let mut devices = crate::cli::ctl::devices::tests::some()["devices"].take();
    devices[0]["exits"]["bar_writes"] = json!(34 + 500 * round);
    devices[2]["interrupts"]["sent"] = json!(1234 + 250 * round);
    devices[2]["counters"] = json!({
        "read_ops": 100 * round, "read_bytes": 409_600 * round, "read_latency_avg": 17,
        "write_ops": 0, "write_bytes": 0, "errors": 0,
    });
    devices[3]["counters"] = json!({
        "rx_frames": 3000 * round, "rx_bytes": 4_500_000 * round, "tx_frames": 10, "tx_bytes": 900,
    });
    json!({
        "state": "Running", "pid": 4711, "uptime_ms": 3_723_000 + 1000 * round, "memory_bytes": 8_u64 << 30,
        "process_cpu_us": 1_230_000 * round,
        "vcpus": [vcpu(0), vcpu(1)],
        "threads": [
            thread(1, "busway", 10_000), thread(2, "vcpu0", 900_000), thread(3, "vcpu1", 250_000),
            thread(4, "_disk-root-q0", 70_000), thread(5, "_net0-q0", 5000),
        ],
        "devices": devices,
        "dma": { "mappings": 3, "bytes": 8_u64 << 30, "map_calls": 2, "device_map_calls": 1 },
        "vector_updates": 7,
    })
}

fn look(round: u64) -> Look {
    Look {
        at: Duration::from_secs(round),
        answer: activity(round),
    }
}

fn picture(width: Option<usize>) -> String {
    let doing = rates::between(&look(1), &look(2));
    view::show("/run/vm", &look(2), &doing, width.into())
}

#[test]
fn a_picture_fits_80_columns_and_200() {
    let narrow = snapbox::file!["snapshots/top-80.txt"];
    snapbox::assert_data_eq!(picture(Some(80)), narrow);
    let wide = snapbox::file!["snapshots/top-200.txt"];
    snapbox::assert_data_eq!(picture(Some(200)), wide);
    for width in [40, 60, 80, 120, 200] {
        let picture = picture(Some(width));
        let too_long = picture
            .lines()
            .find(|line| line.chars().count() > width.max(60));
        assert_eq!(too_long, None, "{width}");
    }
}

#[test]
fn colours_are_those_that_can_be_read_on_light_and_dark() {
    let doing = rates::between(&look(1), &look(2));
    let screen = Screen {
        colour: true,
        ..Screen::from(Some(80))
    };
    let picture = view::show("/run/vm", &look(2), &doing, screen);
    assert!(
        picture.contains("\x1b[38;5;34mrunning\x1b[0m"),
        "{picture:?}"
    );
    // No background, and none of the sixteen colours that a terminal may show as it likes.
    for sequence in picture.split("\x1b[").skip(1) {
        let style = sequence.split('m').next().unwrap();
        assert!(
            ["0", "1", "2", "38;5;34", "38;5;172"].contains(&style),
            "{style}"
        );
    }
}

#[test]
fn rates_are_by_the_second_and_what_began_anew_has_counted_from_nothing() {
    let mut before = look(2);
    before.answer["vcpus"][0]["exits"]["mmio_read"] = json!(1_000_000);
    let mut now = look(4);
    now.answer["vcpus"][0]["exits"]["mmio_read"] = json!(50);
    let doing = rates::between(&before, &now);
    assert_eq!(doing.time, Duration::from_secs(2));
    assert_eq!(doing.vcpus[0].exits["mmio_read"], 25.0);
    assert_eq!(doing.vcpus[1].exits["mmio_write"], 3000.0);
    assert_eq!(doing.vcpus[0].cpu, 0.9);
    assert_eq!(doing.devices[0].exits, 500.0);
    assert_eq!(doing.devices[2].interrupts, Some(250.0));
    // The threads of the device's own queues.
    assert_eq!(doing.devices[2].cpu, Some(0.07));
    assert_eq!(doing.devices[3].cpu, Some(0.005));
    assert_eq!(doing.devices[0].cpu, None);
    let json = rates::json(&now, &doing);
    assert_eq!(json["interval_ms"], 2000);
    assert_eq!(
        json["per_second"]["devices"][2]["counters"]["read_ops"],
        100.0
    );
    assert_eq!(json["totals"]["pid"], 4711);
    assert!(
        json["per_second"]["devices"][2]["counters"]
            .get("read_latency_avg")
            .is_none()
    );
}

#[test]
fn an_answer_of_another_form_is_no_harm_and_steers_no_terminal() {
    for answer in [
        Value::Null,
        json!({ "vcpus": 1, "devices": [1, []], "threads": [null] }),
        json!({ "state": "\u{1b}[2J", "devices": [{ "id": "\u{1b}[2J", "counters": { "\u{1b}": 1 } }] }),
    ] {
        let one = Look {
            at: Duration::ZERO,
            answer,
        };
        let doing = rates::between(&look(1), &one);
        let shown = view::show("/run/vm", &one, &doing, Some(80).into());
        assert!(
            shown.ends_with('\n') && !shown.contains('\u{1b}'),
            "{shown:?}"
        );
        let _written = rates::json(&one, &doing);
    }
}

/// What is written of these looks; the end comes behind them.
fn watched(looks: Vec<Looked>, live: bool, json: bool, once: bool) -> (String, End) {
    let left = RefCell::new(looks.into_iter());
    let mut out = Vec::new();
    let shown = Shown {
        socket: "/run/vm",
        once,
        json,
        live,
    };
    let screen = || Screen {
        height: live.then_some(6),
        ..Screen::from(Some(80))
    };
    let end = {
        let mut terminal = Terminal::enter(&mut out, live).unwrap();
        let mut next = || left.borrow_mut().next().unwrap();
        let mut wait = || left.borrow().len() > 0;
        let end = shown.watch(look(1), &mut next, &mut wait, screen, &mut terminal);
        end.unwrap()
    };
    (String::from_utf8(out).unwrap(), end)
}

#[test]
fn a_terminal_is_as_it_was_on_ctrl_c_and_when_the_vm_has_ended() {
    for (looks, expected) in [
        (vec![Looked::At(look(2)), Looked::Silent], End::Asked),
        (vec![Looked::At(look(2)), Looked::Gone], End::Gone),
        (vec![Looked::At(ended())], End::Gone),
    ] {
        let (written, end) = watched(looks, true, false, false);
        assert_eq!(end, expected);
        assert!(
            written.starts_with(ENTER) && written.ends_with(LEAVE),
            "{written:?}"
        );
        assert_eq!(written.matches(ENTER).count(), 1);
        // Nothing scrolls.
        for frame in written.split(CLEAR).skip(1) {
            assert!(frame.lines().count() <= 6, "{frame:?}");
        }
    }
}

/// A process that has no VM any more.
fn ended() -> Look {
    let mut look = look(2);
    look.answer.as_object_mut().unwrap().remove("uptime_ms");
    look
}

#[test]
fn scripts_have_one_object_or_one_a_line_and_no_word_for_the_terminal() {
    let looks = || vec![Looked::At(look(2)), Looked::At(look(3))];
    let (written, end) = watched(looks(), false, true, true);
    assert_eq!(end, End::Enough);
    let object: Value = serde_json::from_str(&written).unwrap();
    assert_eq!(object["interval_ms"], 1000);
    let (written, _) = watched(looks(), false, true, false);
    assert_eq!(written.lines().count(), 2);
    for line in written.lines() {
        serde_json::from_str::<Value>(line).unwrap();
    }
    let (written, _) = watched(looks(), false, false, false);
    assert!(
        !written.contains('\u{1b}') && written.contains("\n\n/run/vm"),
        "{written}"
    );
}

#[test]
fn whoever_looks_once_is_told_that_the_vm_does_not_answer() {
    let (written, end) = watched(vec![Looked::Silent], false, true, true);
    assert_eq!((written.as_str(), end), ("", End::Silent));
}

#[test]
fn an_interval_is_a_number_of_seconds_within_a_range() {
    assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
    for wrong in ["0", "0.05", "3601", "-1", "NaN", "inf", "soon", ""] {
        seconds(wrong).unwrap_err();
    }
}

#[test]
fn q_ends_it_and_other_keys_do_not() {
    let signals = Signals::new().unwrap();
    let pause_with = |typed: &[u8]| {
        let (keys, mut person) = io::pipe().unwrap();
        person.write_all(typed).unwrap();
        let goes_on = pause(&signals, Some(keys.as_fd()), Duration::from_millis(20));
        (goes_on, person)
    };
    assert!(pause_with(b"x ").0);
    assert!(!pause_with(b"xq").0);
    let (keys, gone) = io::pipe().unwrap();
    drop(gone);
    let time = Duration::from_secs(100);
    assert!(!pause(&signals, Some(keys.as_fd()), time), "hung up");
    // SAFETY: the signal is blocked in this thread, which is the one it goes to.
    unsafe { libc::pthread_kill(libc::pthread_self(), libc::SIGINT) };
    assert!(!pause(&signals, None, time));
    assert!(pause(&signals, None, Duration::from_millis(1)));
}
