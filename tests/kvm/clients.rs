//! Whole lives of VMs as clients of Cloud Hypervisor's API lead them: what each sends, byte for byte, and what it
//! demands of the answers. `clients/README.md` has the language.
//!
//! The guest is one of a few instructions, without a host device. In the lab the same tests run in an emulated host that has
//! both, a real guest and a device for it: `BUSWAY_CLIENTS` then says so, a `WORD=VALUE` a line.

mod demands;
mod wire;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::{FdFlags, fcntl_setfd};
use serde_json::Value;
use tempfile::TempDir;

use crate::attentive::attentive;
use crate::bare::kernel;
use crate::whole::{has_kvm, signal};
use demands::{find, is};
pub(crate) use wire::{Answer, receive, send, try_send};

/// What nothing here takes as long as, and what nothing takes in the lab, on a machine that is busy with other things.
fn limit() -> Duration {
    match std::env::var_os(REAL) {
        None => Duration::from_secs(30),
        Some(_) => Duration::from_secs(300),
    }
}

/// Where the lab says what its guest and its devices are: the words `KERNEL`, `INITRAMFS`, `CMDLINE`, `MEMORY` (in bytes),
/// `VFIO`, the address of the device that the VM begins with, and `VFIO2`, that of one which comes later.
const REAL: &str = "BUSWAY_CLIENTS";
/// The memory of the guests in the files.
const SMALL: &str = "134217728";
/// So many interrupts of its device say that a guest works with it, and has not only found it.
const WORKS: u64 = 100;

/// A client's way through a VM's life.
struct Walk {
    child: Child,
    folder: TempDir,
    /// Where the process was given its socket as a descriptor.
    _listener: Option<UnixListener>,
    connections: BTreeMap<String, UnixStream>,
    words: BTreeMap<String, String>,
    events: Option<Arc<Mutex<Vec<String>>>>,
    seen: usize,
    taps: Vec<File>,
    /// When the VM was asked for.
    created: Instant,
}

/// The start of a process by `client`.
fn start(client: &str) -> Option<Walk> {
    if !has_kvm() {
        return None;
    }
    let folder = tempfile::tempdir().unwrap();
    let run = folder.path().display().to_string();
    let mut words = BTreeMap::new();
    for (word, name, size) in [
        ("INITRAMFS", "initramfs", 4096),
        ("DISK", "disk", 1 << 20),
        ("DISK2", "disk2", 1 << 20),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, vec![0; size]).unwrap();
        words.insert(word.to_owned(), path.display().to_string());
    }
    let path = folder.path().join("kernel");
    fs::write(&path, kernel(&attentive())).unwrap();
    words.insert("KERNEL".to_owned(), path.display().to_string());
    words.insert(
        "TAP".to_owned(),
        format!("bw{}", std::process::id() % 100_000),
    );
    words.insert("CMDLINE".to_owned(), "console=ttyS0".to_owned());
    words.insert("RUN".to_owned(), run.clone());
    let real = std::env::var(REAL).unwrap_or_default();
    let real = real.lines().filter_map(|line| line.split_once('='));
    words.extend(real.map(|(word, value)| (word.to_owned(), value.to_owned())));
    let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
    let socket = folder.path().join("api");
    let libvirt = client.starts_with("libvirt");
    let listener = libvirt.then(|| {
        let listener = UnixListener::bind(&socket).unwrap();
        fcntl_setfd(&listener, FdFlags::empty()).unwrap();
        listener
    });
    match &listener {
        Some(listener) => command
            .arg("--api-socket")
            .arg(format!("fd={}", listener.as_raw_fd())),
        None => command.arg("--api-socket").arg(&socket),
    };
    let events = (client != "libvirt-9").then(|| {
        let fifo = folder.path().join("events");
        let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
        assert!(made.success());
        command
            .arg("--event-monitor")
            .arg(format!("path={}", fifo.display()));
        let events = Arc::<Mutex<Vec<String>>>::default();
        let told = events.clone();
        thread::spawn(move || {
            // Opened here, as libvirt does, before there is anybody who writes.
            let reader = BufReader::new(File::open(fifo).unwrap());
            let (mut source, mut event) = (String::new(), String::new());
            for line in reader.lines().map_while(Result::ok) {
                let value = |line: &str| line.split('"').nth(3).unwrap_or_default().to_owned();
                match line.trim_start() {
                    line if line.starts_with("\"source\"") => source = value(line),
                    line if line.starts_with("\"event\"") => event = value(line),
                    "" if !event.is_empty() => {
                        told.lock().unwrap().push(format!("{source} {event}"));
                        event.clear();
                    }
                    _ => {}
                }
            }
        });
        events
    });
    if client.starts_with("kata") {
        command.args(["-v", "--seccomp", "false"]);
    }
    let child = command
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(folder.path().join("log")).unwrap())
        .spawn()
        .unwrap();
    let walk = Walk {
        child,
        folder,
        _listener: listener,
        connections: BTreeMap::new(),
        words,
        events,
        seen: 0,
        taps: Vec::new(),
        created: Instant::now(),
    };
    walk.eventually("the socket", || UnixStream::connect(&socket).is_ok());
    Some(walk)
}

impl Walk {
    fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    fn eventually(&self, what: &str, mut there: impl FnMut() -> bool) {
        let start = Instant::now();
        while !there() {
            assert!(start.elapsed() < limit(), "{what}\n{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The text with its words filled in.
    fn filled(&self, text: &str) -> String {
        let words = self.words.iter();
        words.fold(text.to_owned(), |text, (word, value)| {
            text.replace(&format!("${{{word}}}"), value)
        })
    }

    /// A request for a VM as it is with a real guest, of a size to run one, and with a device. Without one it is as it was.
    fn whole(&self, body: String) -> String {
        let Some(device) = self.words.get("VFIO") else {
            return body;
        };
        let initramfs = format!("\"initramfs\":\"{}\"", self.words["INITRAMFS"]);
        let body = body.replace(SMALL, &self.words["MEMORY"]);
        let mut body = body.replace("\"initramfs\": null", &initramfs);
        for (key, text) in [
            ("\"initramfs\"", initramfs),
            (
                "\"cmdline\"",
                format!("\"cmdline\":\"{}\"", self.words["CMDLINE"]),
            ),
        ] {
            if !body.contains(key) {
                body = body.replace("\"payload\":{", &format!("\"payload\":{{{text},"));
            }
        }
        let end = body.rfind('}').unwrap_or(body.len());
        let path = format!("/sys/bus/pci/devices/{device}");
        body.insert_str(end, &format!(",\"devices\":[{{\"path\":\"{path}\"}}]"));
        body
    }

    /// What stands for the size of the small guests' memory is the size of this one's.
    fn whole_number(&self, number: &serde_json::Number) -> Value {
        match self.words.get("MEMORY") {
            Some(memory) if number.to_string() == SMALL => memory.parse::<u64>().unwrap().into(),
            _ => number.clone().into(),
        }
    }

    /// Waits until the guest works with the device that it begins with. The lab hears when the VM was asked for, booted and at work.
    fn wait_booted(&self) {
        let Some(device) = self.words.get("VFIO") else {
            return;
        };
        println!(
            "\n@@ booted after {} ms",
            self.created.elapsed().as_millis()
        );
        self.wait_working(device);
        println!("@@ works after {} ms", self.created.elapsed().as_millis());
    }

    /// Waits until the guest works with a device.
    fn wait_working(&self, device: &str) {
        let interrupts = || {
            let all = fs::read_to_string("/proc/interrupts").unwrap();
            let ours = all
                .lines()
                .filter(|line| line.contains("vfio-msi") && line.contains(device));
            let counts = ours.flat_map(|line| {
                let numbers = line.split_whitespace().skip(1);
                numbers.map_while(|word| word.parse::<u64>().ok())
            });
            counts.sum::<u64>()
        };
        // Each look takes an emulated host milliseconds.
        self.eventually("the guest works with its device", || {
            thread::sleep(Duration::from_millis(100));
            interrupts() >= WORKS
        });
    }

    fn step(&mut self, step: &Value) {
        let name = step["step"].as_str().unwrap().to_owned();
        let needs = step["needs"].as_str();
        if needs.is_some_and(|word| !self.words.contains_key(word)) {
            return;
        }
        if step["ask"].is_string() {
            self.ask(&name, step);
            match name.as_str() {
                "boot" => self.wait_booted(),
                "add-device" => self.wait_working(&self.words["VFIO2"]),
                _ => {}
            }
        } else if let Some(path) = step["vsock"].as_str() {
            self.reach_agent(&self.filled(path));
        } else if step["gives_up"] == true {
            self.connections.clear();
            for name in ["api", "events"] {
                fs::remove_file(self.folder.path().join(name)).unwrap();
            }
        } else if let Some(events) = step["events"].as_array() {
            for event in events {
                self.wait_event(event.as_str().unwrap());
            }
        } else if step["threads"] == true {
            let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
            // Those of connections that are over may be gone by now.
            let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
            let names = tasks.filter_map(|task| name(task.unwrap()));
            let vcpus: Vec<_> = names.filter(|name| name.starts_with("vcpu")).collect();
            let is_number = |name: &String| name[4..].trim_end().parse::<u8>().is_ok();
            assert!(
                !vcpus.is_empty() && vcpus.iter().all(is_number),
                "{vcpus:?}"
            );
        } else if let Some(number) = step["signal"].as_i64() {
            signal(&self.child, number as libc::c_int);
        } else {
            self.wait_exit(i32::try_from(step["exits"].as_i64().unwrap()).unwrap());
        }
    }

    /// Reaches the guest by its vsock, as Kata reaches its agent: who is turned away, for nobody listens yet, tries anew.
    /// In a guest of a few instructions nobody ever listens, and who comes is not turned away.
    fn reach_agent(&self, path: &str) {
        let is_real = self.words.contains_key("VFIO");
        let dial = || -> std::io::Result<bool> {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(limit()))?;
            (&stream).write_all(b"CONNECT 1024\n")?;
            if !is_real {
                return Ok(true);
            }
            let mut lines = BufReader::new(&stream);
            let mut line = String::new();
            lines.read_line(&mut line)?;
            if !line.starts_with("OK ") {
                return Ok(false);
            }
            (&stream).write_all(b"is it there?\n")?;
            line.clear();
            lines.read_line(&mut line)?;
            Ok(line == "is it there?\n")
        };
        self.eventually("the guest's agent", || dial().unwrap_or(false));
    }

    fn wait_event(&mut self, event: &str) {
        let events = self.events.clone().expect("a reader of events");
        let mut at = None;
        self.eventually(event, || {
            let events = events.lock().unwrap();
            at = events.iter().skip(self.seen).position(|one| one == event);
            at.is_some()
        });
        let skipped = events.lock().unwrap()[self.seen..self.seen + at.unwrap()].to_vec();
        // It would end the domain.
        assert!(!skipped.contains(&"vm shutdown".to_owned()), "{skipped:?}");
        self.seen += at.unwrap() + 1;
    }

    fn wait_exit(&mut self, code: i32) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(status.code(), Some(code), "{}", self.log());
                return;
            }
            assert!(start.elapsed() < limit(), "{}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn ask(&mut self, name: &str, step: &Value) {
        let mut body = self.filled(step["body"].as_str().unwrap_or_default());
        let (method, endpoint) = step["ask"].as_str().unwrap().split_once(' ').unwrap();
        if endpoint == "vm.create" {
            body = self.whole(body);
            self.created = Instant::now();
            if self.words.contains_key("VFIO") {
                println!("\n@@ {name}");
            }
        }
        let length = body.len().to_string();
        let mut lines = vec![format!("{method} /api/v1/{endpoint} HTTP/1.1")];
        let headers = step["headers"].as_array().unwrap().iter();
        lines.extend(headers.map(|line| line.as_str().unwrap().replace("${LEN}", &length)));
        let on = step["on"].as_str().unwrap();
        let kept = self.connections.remove(on).filter(|_| on != "new");
        let mut stream = kept.unwrap_or_else(|| {
            let stream = UnixStream::connect(self.folder.path().join("api")).unwrap();
            stream.set_read_timeout(Some(limit())).unwrap();
            stream
        });
        let count = usize::try_from(step["taps"].as_u64().unwrap_or(0)).unwrap();
        for _ in 0..count {
            match tap() {
                Some(tap) => self.taps.push(tap),
                None => return eprintln!("skipped: {name}: no tap is to be had"),
            }
        }
        let taps: Vec<_> = self.taps.drain(..).collect();
        let files: Vec<_> = taps.iter().map(AsFd::as_fd).collect();
        match step["way"].as_str().unwrap() {
            "whole" => send(&stream, &(lines.join("\r\n") + "\r\n\r\n" + &body), &files),
            "late-chunk" => {
                send(&stream, &(lines.join("\r\n") + "\r\n\r\n"), &files);
                assert_eq!(receive(&mut stream).unwrap().status, 100, "{name}");
                send(&stream, "0\r\n\r\n", &[]);
            }
            "pieces" => {
                let (first, rest): (Vec<_>, Vec<_>) = lines
                    .iter()
                    .partition(|line| !line.starts_with("Content-Length"));
                let first: Vec<_> = first.into_iter().map(String::as_str).collect();
                send(&stream, &(first.join("\r\n") + "\r\n"), &files);
                for line in rest {
                    send(&stream, &format!("{line}\r\n"), &[]);
                }
                send(&stream, "\r\n", &[]);
                send(&stream, &body, &[]);
            }
            other => panic!("{name}: no way to send is called {other}"),
        }
        let Some(answer) = receive(&mut stream) else {
            panic!("{name}: no answer\n{}", self.log());
        };
        drop(files);
        self.check(name, step, &answer);
        if !answer.head.contains("Connection: close") {
            self.connections.insert(on.to_owned(), stream);
        }
    }

    fn check(&mut self, name: &str, step: &Value, answer: &Answer) {
        let text = String::from_utf8(answer.body.clone()).unwrap();
        let place = format!("{name}: {} {text}\n{}", answer.status, self.log());
        let status = u64::from(answer.status);
        if step["not_yet"] == true {
            assert_eq!(status, 501, "{place}");
            assert!(text.contains("cannot do this yet"), "{place}");
            return;
        }
        if let Some(takes) = step["takes"].as_array() {
            assert!(takes.contains(&status.into()), "{place}");
        } else {
            let bound = |index: usize| step["takes_range"][index].as_u64().unwrap();
            assert!((bound(0)..=bound(1)).contains(&status), "{place}");
        }
        for rule in step["rules"].as_array().into_iter().flatten() {
            let rule = rule.as_str().unwrap();
            assert!(answer.follows(rule), "{rule}: {place}\n{}", answer.head);
        }
        let value: Value = serde_json::from_str(&text).unwrap_or_default();
        for want in step["wants"].as_array().into_iter().flatten() {
            let (pointer, op) = (want[0].as_str().unwrap(), want[1].as_str().unwrap());
            let wanted = match &want[2] {
                Value::String(text) => Value::String(self.filled(text)),
                Value::Number(number) => self.whole_number(number),
                Value::Object(parts) => parts
                    .iter()
                    .map(|(key, part)| {
                        let filled = part.as_str().map(|text| Value::String(self.filled(text)));
                        (key.clone(), filled.unwrap_or_else(|| part.clone()))
                    })
                    .collect(),
                other => other.clone(),
            };
            for (parent, found) in find(&value, pointer) {
                let right = is(op, &text, parent, found, &wanted);
                assert!(right, "{pointer} {op} {wanted}: {place}");
            }
        }
        for (key, pointer) in step["keeps"].as_object().into_iter().flatten() {
            let kept = value
                .pointer(pointer.as_str().unwrap())
                .and_then(Value::as_str);
            self.words
                .insert(format!("saved.{key}"), kept.expect(name).to_owned());
        }
    }
}

impl Drop for Walk {
    fn drop(&mut self) {
        // It has ended, or the test has failed.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

/// A tap without a name of ours, which goes when its last descriptor is closed. None without the right to make one.
fn tap() -> Option<File> {
    // linux/if_tun.h: TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR.
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    const FLAGS: i16 = 0x0002 | 0x1000 | 0x4000;
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .ok()?;
    let mut request = [0_u8; 40];
    request[16..18].copy_from_slice(&FLAGS.to_ne_bytes());
    // SAFETY: TUNSETIFF reads and writes an ifreq, for which there is room.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF as _, request.as_mut_ptr()) };
    (made == 0).then_some(file)
}

fn walk(client: &str, steps: &str) {
    let Some(mut walk) = start(client) else {
        return;
    };
    for line in steps.lines() {
        walk.step(&serde_json::from_str(line).unwrap());
    }
}

#[test]
fn katas_go_runtime_leads_a_vm_through_its_life() {
    walk("kata-go", include_str!("clients/kata-go.jsonl"));
}

#[test]
fn katas_rust_runtime_leads_a_vm_through_its_life() {
    walk("kata-rs", include_str!("clients/kata-rs.jsonl"));
}

#[test]
fn libvirt_9_leads_a_vm_through_its_life() {
    walk("libvirt-9", include_str!("clients/libvirt-9.jsonl"));
}

#[test]
fn libvirt_11_leads_a_vm_through_its_life() {
    walk("libvirt-11", include_str!("clients/libvirt-11.jsonl"));
}

#[test]
fn the_newest_libvirt_leads_a_vm_through_its_life() {
    walk("libvirt-main", include_str!("clients/libvirt-main.jsonl"));
}

#[test]
fn ch_remote_leads_a_vm_through_its_life() {
    walk("ch-remote", include_str!("clients/ch-remote.jsonl"));
}

#[test]
fn virtink_leads_a_vm_through_its_life() {
    walk("virtink", include_str!("clients/virtink.jsonl"));
}
