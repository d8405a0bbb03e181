//! The walls behind the VMM, round a VM that runs.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use busway::sandbox::{Kind, capabilities};
use rustix::thread::{CapabilitySet, capabilities as rights_now};
use serde_json::json;
use tempfile::tempdir;

use crate::attentive::attentive;
use crate::bare::{kernel, power_off, say};
use crate::served::{Served, eventually};
use crate::whole::has_kvm;

/// A line of a task's status, by its key; nothing where there is none. proc_pid_status(5)
fn of<'a>(status: &'a str, key: &str) -> &'a str {
    let line = status.lines().find_map(|line| line.strip_prefix(key));
    line.map_or("", |line| line.trim_start_matches(':').trim())
}

/// The kind of a thread of this name.
fn kind_of(name: &str) -> Kind {
    let begins = [
        ("vcpu", Kind::Vcpu),
        ("_disk", Kind::Disk),
        ("_rng", Kind::Entropy),
        ("_vsock", Kind::Vsock),
        ("vsock-out", Kind::VsockPorts),
        ("http", Kind::Http),
        ("log", Kind::Log),
        ("console-out", Kind::ConsoleOutput),
    ];
    let kind = begins
        .into_iter()
        .find(|(begin, _)| name.starts_with(begin));
    kind.map_or(Kind::Main, |(_, kind)| kind)
}

/// How names begin of threads that KVM, vhost and io_uring make in a process.
const KERNELS: [&str; 3] = ["kvm-", "vhost-", "iou-"];

/// The name of a task that has the walls of its kind; nothing of one that has ended or is the kernel's, and what is wrong of
/// any other.
fn judge(task: &Path, rights: CapabilitySet) -> Result<Option<String>, String> {
    // As a whole: the task may be gone a moment later, for threads that serve a connection come and go.
    let Ok(status) = fs::read_to_string(task.join("status")) else {
        return Ok(None);
    };
    let name = of(&status, "Name");
    if status.is_empty() || of(&status, "State").starts_with(['X', 'Z']) {
        return Ok(None);
    }
    let walls = [of(&status, "Seccomp"), of(&status, "NoNewPrivs")];
    if walls != ["2", "1"] {
        return Err(format!("{name}: filters and no-new-privs are {walls:?}"));
    }
    // The kernel's own threads have the rights of the one that had them made, and run nothing of the process's.
    if KERNELS.iter().any(|begin| name.starts_with(begin)) {
        return Ok(None);
    }
    let expected = format!("{:016x}", (capabilities(kind_of(name)) & rights).bits());
    match of(&status, "CapEff") {
        effective if effective == expected => Ok(Some(name.to_owned())),
        effective => Err(format!("{name}: {effective}, not {expected}")),
    }
}

/// Looks at each task of a process, and gives their names. One that is just starting has a name before it has its walls.
fn look_at(pid: u64) -> Vec<String> {
    let rights = rights_now(None).unwrap().permitted;
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let tasks = tasks.map(|task| task.unwrap().path());
    let names = tasks.filter_map(|task| {
        let mut judged = judge(&task, rights);
        eventually(&format!("{judged:?}"), || {
            judged = judge(&task, rights);
            judged.is_ok()
        });
        judged.unwrap()
    });
    names.collect()
}

#[test]
fn walls_stand_round_every_task_of_a_vm_that_runs() {
    let Some(served) = Served::start(&[]) else {
        return;
    };
    let pid = served.ask("GET", "vmm.ping", None).1["pid"]
        .as_u64()
        .unwrap();
    look_at(pid);
    let mut vm = served.vm(&attentive());
    let disk = served.path("disk");
    fs::write(&disk, [0; 4096]).unwrap();
    vm["disks"] = json!([{ "path": disk, "id": "first" }]);
    vm["vsock"] = json!({ "cid": 3, "socket": served.path("vsock") });
    vm["cpus"]["affinity"] = json!([{ "vcpu": 1, "host_cpus": [0] }]);
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    let names = look_at(pid);
    for name in ["vcpu0", "vcpu1", "vsock-out", "log"] {
        assert!(names.iter().any(|one| one == name), "{name}: {names:?}");
    }
    // Asked on a thread that serves clients, which looks at the whole host for it, and opens no node.
    let device = json!({ "path": "0000:00:00.0" });
    let (status, _) = served.ask("PUT", "vm.check-device", Some(&device));
    assert!([200, 404, 500].contains(&status), "{status}");
    let more = served.path("more");
    fs::write(&more, [0; 4096]).unwrap();
    let more = json!({ "path": more, "id": "more" });
    assert_eq!(served.ask("PUT", "vm.add-disk", Some(&more)).0, 200);
    assert_eq!(served.put("vm.pause"), 204);
    assert_eq!(served.put("vm.resume"), 204);
    assert_eq!(served.put("vm.reboot"), 204);
    eventually("the guest runs again", || served.state() == "Running");
    look_at(pid);
    assert_eq!(served.put("vmm.shutdown"), 200);
}

#[test]
fn a_limit_of_files_is_told_of_and_ends_nothing() {
    if !has_kvm() {
        return;
    }
    let folder = tempdir().unwrap();
    let (guest, disk) = (folder.path().join("kernel"), folder.path().join("disk"));
    fs::write(&guest, kernel(&[say("here"), power_off()].concat())).unwrap();
    fs::write(&disk, [0; 64 << 10]).unwrap();
    let run = |memory: &str| {
        Command::new("sh")
            .args(["-c", "ulimit -f 16 && exec \"$@\"", "sh"])
            .arg(env!("CARGO_BIN_EXE_busway"))
            .args(["run", "--seccomp", "true", "--memory", memory, "--kernel"])
            .arg(&guest)
            .arg("--disk")
            .arg(format!("path={}", disk.display()))
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let shared = run("size=64M,shared=on");
    let stderr = String::from_utf8_lossy(&shared.stderr);
    assert!(
        stderr.contains("67108864 bytes") && stderr.contains("RLIMIT_FSIZE"),
        "{stderr}"
    );
    assert!(
        shared.status.code().is_some(),
        "{}: {stderr}",
        shared.status
    );
    let private = run("size=64M");
    let stderr = String::from_utf8_lossy(&private.stderr);
    assert_eq!(private.status.code(), Some(0), "{stderr}");
    assert!(
        stderr.contains("65536 bytes") && stderr.contains("RLIMIT_FSIZE"),
        "{stderr}"
    );
}
