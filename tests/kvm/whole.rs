//! `busway run` as a whole, with kernels of a few instructions.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::bare::{kernel, outw, power_off, say};

/// A word of RAM that no loader writes, so that it outlives a reset.
const MEMORY: [u8; 4] = 0x20_0000_u32.to_le_bytes();

pub(crate) struct Run {
    pub(crate) folder: TempDir,
    pub(crate) command: Command,
}

/// What came of a run.
pub(crate) struct Finished {
    pub(crate) output: Output,
    /// `--report`
    report: serde_json::Value,
}

impl Run {
    pub(crate) fn new(code: &[u8]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        fs::write(&path, kernel(code)).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
        command
            .args([
                "run",
                "--seccomp",
                "true",
                "--memory",
                "size=64M",
                "--kernel",
            ])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        Self { folder, command }
    }

    /// What comes of it; nothing, said on standard error, where there is no KVM.
    pub(crate) fn finish(mut self) -> Option<Finished> {
        if !has_kvm() {
            return None;
        }
        let report = self.folder.path().join("report.json");
        self.command.arg("--report").arg(&report);
        let output = self.command.output().unwrap();
        let report = serde_json::from_slice(&fs::read(report).unwrap()).unwrap();
        Some(Finished { output, report })
    }

    /// Runs until the guest has said `word`.
    pub(crate) fn until(mut self, word: &str) -> Option<(Child, TempDir)> {
        if !has_kvm() {
            return None;
        }
        let mut child = self.command.spawn().unwrap();
        let mut said = String::new();
        let output = child.stdout.as_mut().unwrap();
        while !said.contains(word) {
            let mut byte = [0];
            output.read_exact(&mut byte).unwrap();
            said.push(byte[0].into());
        }
        Some((child, self.folder))
    }
}

pub(crate) fn has_kvm() -> bool {
    let there = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new("/dev/kvm"));
    if let Err(error) = &there {
        eprintln!("skipped: /dev/kvm: {error}");
    }
    there.is_ok()
}

pub(crate) fn signal(child: &Child, number: libc::c_int) {
    // SAFETY: the call takes no pointer; the child has not been waited for, so the id is its.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, number) }, 0);
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_guest_that_powers_off_ends_with_status_0_and_its_output_is_whole() {
    let text = "all of this, to the last byte\n".repeat(50);
    let Some(Finished { output, report }) = Run::new(&[say(&text), power_off()].concat()).finish()
    else {
        return;
    };
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), text);
    assert!(report["milliseconds"]["first_instruction"].is_f64());
    assert_eq!(report["exits"]["pio_write"], text.len() + 1);
}

#[test]
fn each_way_to_reset_restarts_the_guest_and_memory_outlives_it() {
    // inc dword [MEMORY]; cmp dword [MEMORY], 3; jge over the reset
    for (name, reset) in [
        ("0xcf9", vec![0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee]),
        ("keyboard controller", vec![0xb0, 0xfe, 0xe6, 0x64]),
    ] {
        let reset = [&reset[..], &[0xeb, 0xfe]].concat();
        let code = [
            &say("boot ")[..],
            &[0xff, 0x05],
            &MEMORY,
            &[0x83, 0x3d],
            &MEMORY,
            &[3, 0x7d, reset.len() as u8],
            &reset,
            &power_off(),
        ]
        .concat();
        let Some(Finished { output, .. }) = Run::new(&code).finish() else {
            return;
        };
        assert_eq!(output.status.code(), Some(0), "{name}: {}", stderr(&output));
        assert_eq!(output.stdout, b"boot boot boot ", "{name}");
    }
}

#[test]
fn a_kernel_that_triple_faults_at_once_is_named_and_not_tried_for_ever() {
    // ud2, without an interrupt table
    let Some(Finished { output, .. }) = Run::new(&[0x0f, 0x0b]).finish() else {
        return;
    };
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("triple-faulted"),
        "{}",
        stderr(&output)
    );
}

/// Says "ready", and waits for the power button.
pub(crate) fn wait_for_the_button() -> Vec<u8> {
    // PM1 enable = the power button; mov dx, 0x600; again: in ax, dx; test ah, 1; jz again
    let wait = [
        0x66, 0xba, 0x00, 0x06, 0x66, 0xed, 0xf6, 0xc4, 0x01, 0x74, 0xf9,
    ];
    [&outw(0x602, 0x100)[..], &say("ready"), &wait].concat()
}

#[test]
fn sigterm_presses_the_power_button() {
    let code = [wait_for_the_button(), power_off()].concat();
    let Some((child, _folder)) = Run::new(&code).until("ready") else {
        return;
    };
    signal(&child, libc::SIGTERM);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[test]
fn a_guest_that_restarts_when_it_is_asked_to_power_off_is_not_started_again() {
    for (reset, said) in [
        // mov al, 0xfe; out 0x64, al; jmp $
        (
            &[0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe][..],
            "the guest restarts",
        ),
        // ud2, without an interrupt table
        (&[0x0f, 0x0b], "triple-faulted"),
    ] {
        let code = [&wait_for_the_button()[..], reset].concat();
        let mut run = Run::new(&code);
        run.command.arg("--verbose");
        let Some((child, _folder)) = run.until("ready") else {
            return;
        };
        signal(&child, libc::SIGTERM);
        let output = child.wait_with_output().unwrap();
        let errors = stderr(&output);
        assert_eq!(output.status.code(), Some(0), "{errors}");
        assert!(output.stdout.is_empty(), "started again");
        let asked = errors.contains("it was asked to power off, and the VM ends");
        assert!(asked && errors.contains(said), "{errors}");
    }
}

#[test]
fn a_second_signal_kills_a_guest_that_does_not_listen() {
    let Some((child, _folder)) =
        Run::new(&[&say("deaf")[..], &[0xeb, 0xfe]].concat()).until("deaf")
    else {
        return;
    };
    signal(&child, libc::SIGTERM);
    // Signals of one kind that wait are one: the second has to be another or come later.
    signal(&child, libc::SIGINT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("killed"), "{}", stderr(&output));
}

#[test]
fn a_vm_ends_soon_whether_its_guest_is_deaf_or_paused_and_in_each_way() {
    const LIMIT: Duration = Duration::from_secs(5);
    for (paused, signals, status) in [
        // A guest that runs is asked first, and one that stands still cannot be.
        (false, &[libc::SIGTERM, libc::SIGINT][..], 1),
        (true, &[libc::SIGTERM], 0),
        (false, &[], 0),
        (true, &[], 0),
    ] {
        let mut run = Run::new(&[&say("deaf")[..], &[0xeb, 0xfe]].concat());
        let socket = run.folder.path().join("api");
        run.command.arg("--api-socket").arg(&socket);
        let Some((child, _folder)) = run.until("deaf") else {
            return;
        };
        let ask = |verb: &str| {
            let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
            command.args(["ctl", verb, "--api-socket"]).arg(&socket);
            assert!(command.output().unwrap().status.success(), "{verb}");
        };
        if paused {
            ask("pause");
        }
        let start = Instant::now();
        for &number in signals {
            signal(&child, number);
        }
        if signals.is_empty() {
            ask("shutdown");
        }
        let output = child.wait_with_output().unwrap();
        let (took, errors) = (start.elapsed(), stderr(&output));
        assert!(took < LIMIT, "paused: {paused}, {signals:?}: {took:?}");
        assert_eq!(output.status.code(), Some(status), "{errors}");
        assert!(!socket.exists());
    }
}

#[test]
fn a_thread_that_panics_ends_the_vm_in_order_with_a_word_and_status_1() {
    let mut run = Run::new(&[&say("runs")[..], &[0xeb, 0xfe]].concat());
    run.command.env("BUSWAY_TEST_PANIC_AFTER_MS", "300");
    let Some(Finished { output, report }) = run.finish() else {
        return;
    };
    let errors = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert_eq!(output.stdout, b"runs");
    let lines: Vec<_> = errors.lines().collect();
    assert_eq!(lines.len(), 2, "{errors}");
    assert!(lines[0].contains("this is a bug in Busway"), "{errors}");
    assert!(lines[1].contains("the VM was ended"), "{errors}");
    // What is written at any end was.
    assert!(report["exits"]["pio_write"].as_u64() >= Some(4), "{report}");
}

/// Whatever thread it is, with a word that names it.
#[test]
fn a_panic_on_a_thread_of_any_kind_ends_the_vm_and_names_the_thread() {
    // mov dx, 0x3f8; in al, dx; out dx, al; jmp back
    let chatter = [0x66, 0xba, 0xf8, 0x03, 0xec, 0xee, 0xeb, 0xf8];
    for name in [
        "vcpu0",
        "main",
        "console-out",
        "stdin",
        "serial-in",
        "http",
        "restart",
    ] {
        let reset = [0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee];
        let code = if name == "restart" {
            &reset[..]
        } else {
            &chatter
        };
        let mut run = Run::new(code);
        let socket = run.folder.path().join("api");
        let api = format!("path={}", socket.display());
        run.command
            .args(["--api-socket", &api])
            .env("BUSWAY_TEST_PANIC_AFTER_MS", "200")
            .env("BUSWAY_TEST_PANIC_IN", name)
            .stdin(Stdio::piped());
        if !has_kvm() {
            return;
        }
        let mut child = run.command.spawn().unwrap();
        let (mut typed, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let reading = thread::spawn(move || io::copy(&mut output, &mut io::sink()));
        let begun = Instant::now();
        // Has each kind of thread come by.
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("{name}: it lives on");
            }
            let _gone = typed.write_all(b"key");
            if let Ok(mut stream) = UnixStream::connect(&socket) {
                let _gone = stream.write_all(b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n");
                let _gone = stream.set_read_timeout(Some(Duration::from_millis(50)));
                let _answer = stream.read(&mut [0; 64]);
            }
        };
        reading.join().unwrap().unwrap();
        let mut errors = String::new();
        child.stderr.unwrap().read_to_string(&mut errors).unwrap();
        assert_eq!(status.code(), Some(1), "{name}: {errors}");
        let first = errors.lines().find(|line| line.contains("this is a bug"));
        let named = format!(", thread {name})");
        assert!(first.unwrap().ends_with(&named), "{name}: {errors}");
        assert!(!socket.exists(), "{name}: the socket is left");
    }
}

/// Processor time of a process's first thread, which is the event loop, in clock ticks of 10 ms.
fn ticks(child: &Child) -> u64 {
    let id = child.id();
    let stat = fs::read_to_string(format!("/proc/{id}/task/{id}/stat")).unwrap();
    let fields = stat.rsplit(')').next().unwrap().split_whitespace();
    // utime and stime. proc(5)
    fields
        .skip(11)
        .take(2)
        .map(|field| field.parse::<u64>().unwrap())
        .sum()
}

#[test]
fn a_clock_that_a_guest_sets_to_the_end_of_time_keeps_nobody_busy() {
    // mov al, index; out 0x70, al; mov al, value; out 0x71, al
    let set = |index, value| [0xb0, index, 0xe6, 0x70, 0xb0, value, 0xe6, 0x71];
    // 2262-04-11T23:47:15Z, and then time runs on, with update interrupts on.
    let registers = [
        (11, 0x82),
        (0x32, 0x22),
        (9, 0x62),
        (8, 0x04),
        (7, 0x11),
        (4, 0x23),
        (2, 0x47),
        (0, 0x15),
        (11, 0x12),
    ];
    let set: Vec<u8> = registers
        .into_iter()
        .flat_map(|(index, value)| set(index, value))
        .collect();
    let code = [&set[..], &say("set"), &[0xfa, 0xf4, 0xeb, 0xfd]].concat();
    let Some((child, _folder)) = Run::new(&code).until("set") else {
        return;
    };
    // The loop may have had much to do before, and a second and a half brings the end of time.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    let before = ticks(&child);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let busy = ticks(&child) - before;
    signal(&child, libc::SIGKILL);
    child.wait_with_output().unwrap();
    assert!(busy < 20, "{busy} ticks of 100");
}
