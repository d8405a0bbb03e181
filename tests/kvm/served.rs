//! A process that is told over its API what to do, with kernels of a few instructions.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::attentive::{attentive, hears_nmi};
use crate::bare::{kernel, power_off, say};
use crate::whole::{has_kvm, signal};

/// What nothing here takes as long as.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// A process that serves its API, with a folder of its own.
pub(crate) struct Served {
    child: Child,
    folder: TempDir,
}

impl Served {
    /// None, said on standard error, where there is no KVM.
    pub(crate) fn start(flags: &[&str]) -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_busway"))
            .arg("--api-socket")
            .arg(folder.path().join("api"))
            .args(["--seccomp", "true"])
            .args(flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let served = Self { child, folder };
        eventually("the API", || {
            served.try_ask("GET", "vmm.ping", None).is_some()
        });
        // The event loop answers this one, which then has all that it waits with.
        served.ask("GET", "vm.info", None);
        Some(served)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A VM whose kernel is `code`, and which says what it says to `serial`.
    pub(crate) fn vm(&self, code: &[u8]) -> Value {
        let path = self.path("kernel");
        fs::write(&path, kernel(code)).unwrap();
        json!({
            "cpus": { "boot_vcpus": 2, "max_vcpus": 4 },
            "memory": { "size": 64 << 20 },
            "payload": { "kernel": path, "cmdline": "" },
            "serial": { "mode": "File", "file": self.path("serial") },
            "console": { "mode": "Null", "file": null },
        })
    }

    pub(crate) fn said(&self) -> String {
        fs::read_to_string(self.path("serial")).unwrap_or_default()
    }

    fn try_ask(&self, method: &str, name: &str, body: Option<&Value>) -> Option<(u16, Value)> {
        let mut stream = UnixStream::connect(self.path("api")).ok()?;
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        write!(
            stream,
            "{method} /api/v1/{name} HTTP/1.1\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        let (head, body) = text.split_once("\r\n\r\n")?;
        let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?.parse().ok()?;
        Some((status, serde_json::from_str(body).unwrap_or_default()))
    }

    /// The answer's status, and its body as JSON.
    pub(crate) fn ask(&self, method: &str, name: &str, body: Option<&Value>) -> (u16, Value) {
        let answer = self.try_ask(method, name, body);
        answer.unwrap_or_else(|| panic!("{name} was not answered"))
    }

    pub(crate) fn put(&self, name: &str) -> u16 {
        self.ask("PUT", name, None).0
    }

    pub(crate) fn state(&self) -> Value {
        self.ask("GET", "vm.info", None).1["state"].take()
    }

    /// How many clients it has not closed yet: the sockets of its path that do not listen. Linux,
    /// net/unix/af_unix.c, `unix_seq_show`
    fn clients(&self) -> usize {
        let list = fs::read_to_string("/proc/net/unix").unwrap();
        let (path, listens) = (self.path("api").display().to_string(), "01");
        let is_client =
            |line: &&str| line.ends_with(&path) && line.split_whitespace().nth(5) != Some(listens);
        list.lines().filter(is_client).count()
    }

    /// Waits until it has closed all clients.
    pub(crate) fn settle(&self) {
        eventually("all clients are closed", || self.clients() == 0);
    }

    /// How many descriptors it has open when it has closed those of all clients.
    pub(crate) fn all_descriptors(&self) -> usize {
        self.settle();
        let folder = format!("/proc/{}/fd", self.child.id());
        fs::read_dir(folder).unwrap().count()
    }

    /// The same without those of clients, which come and go.
    pub(crate) fn descriptors(&self) -> usize {
        let folder = format!("/proc/{}/fd", self.child.id());
        let all = fs::read_dir(folder).unwrap();
        let targets = all.filter_map(|one| fs::read_link(one.unwrap().path()).ok());
        targets
            .filter(|target| !target.display().to_string().starts_with("socket:"))
            .count()
    }

    /// Processor time of the thread of this name, in clock ticks of 10 ms.
    fn ticks(&self, name: &str) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let mut stats =
            tasks.filter_map(|task| fs::read_to_string(task.unwrap().path().join("stat")).ok());
        let stat = stats
            .find(|stat| stat.contains(&format!("({name})")))
            .unwrap();
        let fields = stat.rsplit(')').next().unwrap().split_whitespace();
        // utime and stime. proc(5)
        let times = fields.skip(11).take(2);
        times.map(|field| field.parse::<u64>().unwrap()).sum()
    }

    /// Its end, and what it wrote to standard error.
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if start.elapsed() > LIMIT {
                self.child.kill().unwrap();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut errors = String::new();
        let stderr = self.child.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut errors).unwrap();
        assert!(!self.path("api").exists(), "the socket is left: {errors}");
        (status, errors)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // It has ended, or the test has failed.
        let _ended = self.child.kill();
        let _ended = self.child.wait();
    }
}

pub(crate) fn eventually(what: &str, mut there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !there() {
        assert!(start.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Says a word and goes on for ever.
pub(crate) fn lives(word: &str) -> Vec<u8> {
    [&say(word)[..], &[0xeb, 0xfe]].concat()
}

#[test]
fn a_vm_is_made_booted_ended_and_made_again_over_the_api() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let (status, said) = served.ask("GET", "vm.info", None);
    assert_eq!((status, said[1].as_str()), (404, Some("VM is not created")));
    for (name, status) in [
        ("vm.boot", 404),
        ("vm.pause", 500),
        ("vm.reboot", 500),
        ("vm.nmi", 500),
        ("vm.shutdown", 500),
        ("vm.delete", 204),
    ] {
        assert_eq!(served.put(name), status, "{name}");
    }
    let before = served.descriptors();
    for round in 0..2 {
        let vm = served.vm(&lives("boot "));
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        let (status, said) = served.ask("PUT", "vm.create", Some(&vm));
        assert_eq!(
            (status, said[1].as_str()),
            (500, Some("VM is already created"))
        );
        assert_eq!(served.state(), "Created");
        let (status, said) = served.ask("PUT", "vm.pause", None);
        assert_eq!((status, said[1].as_str()), (500, Some("VM is not running")));
        assert_eq!(served.ask("GET", "vm.counters", None).0, 500);
        assert_eq!(served.put("vm.boot"), 204);
        let (_, info) = served.ask("GET", "vm.info", None);
        assert_eq!(
            (&info["state"], &info["config"]["cpus"]["max_vcpus"]),
            (&json!("Running"), &json!(4))
        );
        let tasks = fs::read_dir(format!("/proc/{}/task", served.child.id())).unwrap();
        let mut names: Vec<_> = tasks
            .filter_map(|task| fs::read_to_string(task.unwrap().path().join("comm")).ok())
            .filter(|name| name.starts_with("vcpu"))
            .collect();
        names.sort();
        assert_eq!(names, ["vcpu0\n", "vcpu1\n"]);
        eventually("its word", || served.said() == "boot ");
        assert_eq!(served.put("vm.boot"), 500, "it runs");
        assert_eq!(served.ask("GET", "vm.counters", None), (200, json!({})));
        let (_, devices) = served.ask("GET", "vm.devices", None);
        let kinds: Vec<_> = devices["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| &one["kind"])
            .collect();
        assert_eq!(kinds, ["console", "rng"]);
        assert_eq!(served.put("vm.reboot"), 204);
        eventually("its word again", || served.said() == "boot boot ");
        assert_eq!(served.put("vm.pause"), 204);
        assert_eq!(served.state(), "Paused");
        // A guest that stands still starts anew as well, and goes on where that is asked for.
        assert_eq!(served.put("vm.reboot"), 204);
        eventually("a third time", || served.said() == "boot boot boot ");
        assert_eq!((served.put("vm.pause"), served.put("vm.boot")), (204, 204));
        assert_eq!(served.state(), "Running");
        assert_eq!(
            (served.put("vm.pause"), served.put("vm.resume")),
            (204, 204)
        );
        if round == 0 {
            assert_eq!(served.put("vm.shutdown"), 204);
            assert_eq!(served.state(), "Created");
            assert_eq!(served.put("vm.shutdown"), 500);
            assert_eq!(served.put("vm.boot"), 204);
            // A file is begun anew with each VM.
            eventually("its first word", || served.said() == "boot ");
        }
        assert_eq!(served.put("vm.delete"), 204);
        assert_eq!(served.ask("GET", "vm.info", None).0, 404);
        assert_eq!(served.descriptors(), before, "descriptors are left");
    }
    assert_eq!(served.put("vmm.shutdown"), 200);
    let (status, errors) = served.ended();
    assert_eq!(status.code(), Some(0), "{errors}");
    assert_eq!(errors, "");
}

#[test]
fn a_vm_that_cannot_be_booted_says_why_and_leaves_the_process_as_it_was() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let mut vm = served.vm(&lives("boot"));
    vm["payload"]["kernel"] = json!(served.path("missing"));
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    let before = served.descriptors();
    for _ in 0..2 {
        let (status, said) = served.ask("PUT", "vm.boot", None);
        assert_eq!(status, 500);
        assert!(said[1].as_str().unwrap().contains("missing"), "{said}");
        assert_eq!(served.state(), "Created");
        assert_eq!(served.descriptors(), before);
    }
    assert_eq!(served.put("vm.delete"), 204);
    // One without anything to boot is remembered, and told when it is to be booted.
    assert_eq!(served.ask("PUT", "vm.create", Some(&json!({}))).0, 204);
    let (status, said) = served.ask("PUT", "vm.boot", None);
    assert_eq!(status, 500);
    assert!(
        said[1].as_str().unwrap().starts_with("nothing to boot"),
        "{said}"
    );
    assert_eq!(served.put("vm.delete"), 204);
    let wrong = json!({ "cpus": { "boot_vcpus": 256, "max_vcpus": 256 } });
    assert_eq!(served.ask("PUT", "vm.create", Some(&wrong)).0, 400);
    let vm = served.vm(&lives("boot"));
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    // A signal ends it as it is, and nobody asks the guest.
    signal(&served.child, libc::SIGTERM);
    assert_eq!(served.ended().0.code(), Some(0));
}

#[test]
fn devices_come_to_a_vm_that_is_not_booted_yet_and_are_there_when_it_is() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let add = |id: &str| {
        let path = served.path(&format!("{id}.raw"));
        fs::write(&path, [0; 4096]).unwrap();
        served.ask(
            "PUT",
            "vm.add-disk",
            Some(&json!({ "id": id, "path": path })),
        )
    };
    let remove = |id: &str| {
        served
            .ask("PUT", "vm.remove-device", Some(&json!({ "id": id })))
            .0
    };
    assert_eq!(add("early").0, 404);
    let vm = served.vm(&lives("boot"));
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(add("one"), (204, Value::Null));
    assert_eq!(add("one").0, 409);
    assert_eq!(add("two").0, 204);
    assert_eq!((remove("two"), remove("two")), (204, 404));
    let gone = json!({ "path": served.path("gone"), "num_queues": 0 });
    assert_eq!(served.ask("PUT", "vm.add-disk", Some(&gone)).0, 400);
    assert_eq!(served.put("vm.boot"), 204);
    let ids = || {
        let (_, info) = served.ask("GET", "vm.info", None);
        let disks = info["config"]["disks"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        disks
            .iter()
            .map(|disk| disk["id"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(), ["one"]);
    let (status, added) = add("three");
    assert_eq!((status, &added["id"]), (200, &json!("three")));
    assert_eq!(ids(), ["one", "three"]);
    // What came to the VM while it ran comes to it again.
    assert_eq!(served.put("vm.shutdown"), 204);
    assert_eq!(ids(), ["one", "three"]);
    assert_eq!(served.put("vm.boot"), 204);
    assert_eq!(served.state(), "Running");
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

#[test]
fn a_guest_that_powers_off_ends_the_process_unless_that_is_to_stay() {
    for (flags, stays) in [(&[][..], false), (&["--no-shutdown"], true)] {
        let Some(served) = Served::start(flags) else {
            return;
        };
        let vm = served.vm(&[say("off"), power_off()].concat());
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        assert_eq!(served.put("vm.boot"), 204);
        if stays {
            eventually("the end of the VM", || served.state() == "Created");
            assert_eq!(served.put("vm.boot"), 204);
            eventually("the end of the VM", || served.state() == "Created");
            signal(&served.child, libc::SIGTERM);
        }
        let (status, errors) = served.ended();
        assert_eq!(status.code(), Some(0), "{errors}");
    }
}

#[test]
fn a_guest_that_fails_by_itself_ends_the_process_with_a_word_and_status_1() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    // ud2, without an interrupt table
    let vm = served.vm(&[0x0f, 0x0b]);
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let (status, errors) = served.ended();
    assert_eq!(status.code(), Some(1));
    assert!(errors.contains("triple-faulted"), "{errors}");
}

#[test]
fn a_non_maskable_interrupt_reaches_the_guest() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let vm = served.vm(&[hears_nmi(&say("nmi ")), lives("boot ")].concat());
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    eventually("its word", || served.said() == "boot ");
    assert_eq!(served.put("vm.nmi"), 204);
    eventually("the interrupt", || served.said() == "boot nmi boot ");
    // One that the guest has not started is left alone: it would be busy with nothing.
    let before = served.ticks("vcpu1");
    std::thread::sleep(Duration::from_millis(300));
    let busy = served.ticks("vcpu1") - before;
    assert!(busy < 5, "{busy} ticks of 30");
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

/// The slot of bus 0 whose device the guest releases by itself, which is that of the first disk.
const FIRST: u32 = 1 << 1;

/// Releases the devices in `slots` of bus 0, which nobody has asked for.
fn ejects(slots: u32) -> Vec<u8> {
    // mov dword [eject], slots
    let mut code = vec![0xc7, 0x05];
    code.extend(0xfec8_0008_u32.to_le_bytes());
    code.extend(slots.to_le_bytes());
    code
}

/// What the events of one kind are about, of those in the file of the folder.
fn told_in(folder: &Path, event: &str) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("events")).unwrap_or_default();
    let all = text.split("\n\n").filter(|one| !one.is_empty());
    let all = all.map(|one| serde_json::from_str::<Value>(one).unwrap());
    all.filter(|one| one["event"] == event)
        .map(|mut one| one["properties"].take())
        .collect()
}

#[test]
fn whoever_reads_events_hears_of_a_device_that_the_guest_releases_by_itself() {
    let folder = tempfile::tempdir().unwrap();
    let events = format!("path={}", folder.path().join("events").display());
    let Some(served) = Served::start(&["--event-monitor", &events]) else {
        return;
    };
    let mut vm = served.vm(&[&ejects(FIRST)[..], &lives("gone ")].concat());
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    vm["disks"] = json!([{ "path": disk, "id": "root" }]);
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let removed = || told_in(folder.path(), "device-removed");
    eventually("the event", || !removed().is_empty());
    let expected = json!({ "id": "root", "bdf": "0000:00:01.0" });
    assert_eq!(removed(), [expected]);
    assert_eq!(
        served.ask("GET", "vm.info", None).1["config"].get("disks"),
        None
    );
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

#[test]
fn a_removal_is_answered_at_once_and_told_of_when_the_guest_has_released_the_device() {
    let folder = tempfile::tempdir().unwrap();
    let events = format!("path={}", folder.path().join("events").display());
    let Some(served) = Served::start(&["--event-monitor", &events]) else {
        return;
    };
    // A guest that does not look, and another that does.
    for (code, looks) in [(lives("deaf "), false), (attentive(), true)] {
        let vm = served.vm(&code);
        assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
        assert_eq!(served.put("vm.boot"), 204);
        let disk = served.path("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        let add = || {
            let body = json!({ "path": disk, "id": "d" });
            served.ask("PUT", "vm.add-disk", Some(&body)).0
        };
        let remove = |body: Value| served.ask("PUT", "vm.remove-device", Some(&body));
        let shown = || {
            let (_, info) = served.ask("GET", "vm.info", None);
            let disks = info["config"].get("disks").is_some();
            (disks, info["device_tree"].get("d").is_some())
        };
        assert_eq!(add(), 200);
        if looks {
            // Under the same name, as soon as it is answered.
            for _ in 0..20 {
                assert_eq!(remove(json!({ "id": "d" })).0, 204);
                assert_eq!(add(), 200);
                assert_eq!(shown(), (true, true));
            }
            assert_eq!(remove(json!({ "id": "d", "wait": true })).0, 204);
            assert_eq!(shown(), (false, false));
            assert_eq!(told_in(folder.path(), "device-removed").len(), 21);
        } else {
            assert_eq!(remove(json!({ "id": "d", "timeout_s": 1 })).0, 204);
            assert_eq!(shown(), (false, true));
            eventually("it is kept", || shown() == (true, true));
            let (status, why) = remove(json!({ "id": "d", "timeout_s": 1, "wait": true }));
            assert_eq!(status, 500);
            assert!(why[1].as_str().unwrap().contains("within 1 s"), "{why}");
            assert_eq!(told_in(folder.path(), "device-removed"), [] as [Value; 0]);
        }
        assert_eq!(served.put("vm.delete"), 204);
    }
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

/// What the client of the command line prints of it.
fn ctl(served: &Served, args: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["ctl", "--json", "--api-socket"])
        .arg(served.path("api"))
        .args(args)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn what_a_guest_does_is_seen_by_vcpu_and_the_vm_is_found() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    // in al, 0x80; jmp back: one exit each.
    let vm = served.vm(&[0xe4, 0x80, 0xeb, 0xfc]);
    let file = served.path("vm.json");
    fs::write(&file, vm.to_string()).unwrap();
    ctl(&served, &["create", file.to_str().unwrap()]);
    ctl(&served, &["boot"]);
    let top = || ctl(&served, &["top", "--once", "--interval", "0.2"]);
    let first = top();
    let rate = |top: &Value, at: &str| top.pointer(at).and_then(Value::as_f64).unwrap();
    assert!(
        rate(&first, "/per_second/vcpus/0/exits/pio_read") > 0.0,
        "{first}"
    );
    assert!(rate(&first, "/per_second/vcpus/0/cpu") > 0.0, "{first}");
    // One that the guest has not started does nothing.
    assert_eq!(rate(&first, "/per_second/vcpus/1/exits/pio_read"), 0.0);
    let total = |top: &Value| {
        top["totals"]["vcpus"][0]["exits"]["pio_read"]
            .as_u64()
            .unwrap()
    };
    let second = top();
    assert!(total(&second) > total(&first));
    // KVM counts all exits, where the host's does.
    if let Some(exits) = second["totals"]["vcpus"][0]["kvm"]["exits"].as_u64() {
        assert!(exits >= total(&first), "{second}");
    }
    let listed = ctl(&served, &["list"]);
    let vms = listed["vms"].as_array().unwrap();
    let own = vms
        .iter()
        .find(|vm| vm["pid"] == served.child.id())
        .unwrap();
    assert_eq!(own["socket"], served.path("api").to_str().unwrap());
    assert_eq!(
        (&own["state"], &own["vcpus"]),
        (&json!("running"), &json!(2))
    );
    // Paused, nothing moves.
    ctl(&served, &["pause"]);
    let paused = top();
    assert_eq!(rate(&paused, "/per_second/vcpus/0/exits/pio_read"), 0.0);
    ctl(&served, &["resume"]);
    ctl(&served, &["reboot"]);
    let (_, activity) = served.ask("GET", "vm.activity", None);
    assert!(activity["uptime_ms"].as_u64().unwrap() < 60_000);
    ctl(&served, &["stop"]);
    ctl(&served, &["delete"]);
    // Without a VM the process has metrics of itself.
    let metrics = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["ctl", "metrics", "--api-socket"])
        .arg(served.path("api"))
        .output()
        .unwrap();
    let metrics = String::from_utf8(metrics.stdout).unwrap();
    assert!(metrics.contains("process_open_fds "), "{metrics}");
    ctl(&served, &["shutdown"]);
    assert_eq!(served.ended().0.code(), Some(0));
}
