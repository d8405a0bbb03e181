//! What the host may lack while a VM starts: descriptors, addresses, processes, room in a file system. Whatever it is, and
//! at whichever step, the VM runs or ends in order, and what is missing is named with its remedy.

mod descriptors;
mod quota;

use std::fs;
use std::process::{Command, Output, Stdio};

use tempfile::{TempDir, tempdir};

use crate::bare::{kernel, power_off, say};
use crate::whole::has_kvm;

/// A folder with a guest that says where it is and powers off, and with a disk.
struct Wanting(TempDir);

impl Wanting {
    /// None, said on standard error, where there is no KVM.
    fn new() -> Option<Self> {
        if !has_kvm() {
            return None;
        }
        let this = Self(tempdir().unwrap());
        fs::write(
            this.path("kernel"),
            kernel(&[say("here"), power_off()].concat()),
        )
        .unwrap();
        fs::write(this.path("disk"), [0; 64 << 10]).unwrap();
        Some(this)
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Runs the guest with its serial port at `serial`, under what the shell does before: `limit`.
    fn run(&self, limit: &str, serial: &str) -> Output {
        let disk = format!("path={}", self.path("disk"));
        Command::new("sh")
            .args(["-c", &format!("{limit} && exec \"$@\""), "sh"])
            .arg(env!("CARGO_BIN_EXE_busway"))
            .args(["run", "--cpus", "boot=2", "--memory", "size=256M"])
            .args(["--kernel", &self.path("kernel"), "--disk", &disk])
            .args(["--serial", serial])
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The guest has run to its end.
fn has_run(output: &Output) -> bool {
    output.status.success()
}

/// The process has ended in order, and its last words are an error that has one of these in it.
fn names(output: &Output, what: &[&str]) {
    let said = text(output);
    let code = output.status.code();
    assert!(
        matches!(code, Some(1..=3)) && !said.contains("panicked"),
        "{:?}: {said}",
        output.status
    );
    assert!(said.contains("busway: error: "), "{said}");
    assert!(what.iter().any(|words| said.contains(words)), "{said}");
}

#[test]
fn with_any_number_of_descriptors_a_vm_runs_or_says_that_it_is_these() {
    let Some(wanting) = Wanting::new() else {
        return;
    };
    let mut ran = 0;
    for number in 4.. {
        let output = wanting.run(&format!("ulimit -n {number}"), "off");
        if has_run(&output) {
            ran += 1;
            // What runs with so many runs with more.
            if ran == 3 {
                break;
            }
            continue;
        }
        assert_eq!(ran, 0, "{number} descriptors: {}", text(&output));
        assert!(number < 200, "{}", text(&output));
        names(&output, &["ulimit -n", "LimitNOFILE"]);
    }
}

#[test]
fn a_limit_of_addresses_is_named_with_its_figure() {
    let Some(wanting) = Wanting::new() else {
        return;
    };
    let output = wanting.run("ulimit -v 260000", "off");
    names(&output, &["may map 266240000 bytes"]);
    assert!(text(&output).contains("ulimit -v"), "{}", text(&output));
}

#[test]
fn a_full_file_system_is_told_of_and_the_guest_runs_on() {
    let Some(wanting) = Wanting::new() else {
        return;
    };
    let output = wanting.run("true", "file=/dev/full");
    assert!(has_run(&output), "{}", text(&output));
    let said = text(&output);
    assert!(
        said.contains("/dev/full") && said.contains("No space left"),
        "{said}"
    );
}

/// In a mount namespace where `/mnt` is a file system of so many inodes, of which its root is one: a lock beside a socket takes
/// one, and the socket another. Nothing, said on standard error, where this user may mount nothing.
fn within_a_full_file_system(inodes: u32, words: &[&str]) -> Option<Output> {
    let mount = format!("mount -t tmpfs -o nr_inodes={inodes} full /mnt");
    let run = |script: &str| {
        Command::new("unshare")
            .args(["--mount", "--map-root-user", "sh", "-ec", script, "sh"])
            .args(words)
            .stdin(Stdio::null())
            .output()
    };
    match run(&mount) {
        Ok(output) if output.status.success() => {}
        other => {
            eprintln!("skipped: {other:?}");
            return None;
        }
    }
    Some(run(&format!("{mount}; exec \"$@\"")).unwrap())
}

#[test]
fn a_control_socket_on_a_full_file_system_is_named_with_what_helps() {
    let Some(wanting) = Wanting::new() else {
        return;
    };
    let kernel = wanting.path("kernel");
    let words = [
        env!("CARGO_BIN_EXE_busway"),
        "run",
        "--kernel",
        &kernel,
        "--serial",
        "off",
        "--api-socket",
        "/mnt/api",
    ];
    for inodes in [1, 2] {
        let Some(output) = within_a_full_file_system(inodes, &words) else {
            return;
        };
        names(&output, &["/mnt/api"]);
        let said = text(&output);
        assert_eq!(output.status.code(), Some(3), "{said}");
        assert!(
            said.contains("No space left") && said.contains("df -i"),
            "{said}"
        );
    }
    let output = within_a_full_file_system(3, &words).unwrap();
    assert!(has_run(&output), "{}", text(&output));
}

#[test]
fn what_a_full_file_system_has_no_room_for_is_told_of_and_the_guest_runs_to_its_end() {
    let Some(wanting) = Wanting::new() else {
        return;
    };
    let kernel = wanting.path("kernel");
    let words = [
        env!("CARGO_BIN_EXE_busway"),
        "run",
        "--kernel",
        &kernel,
        "--serial",
        "null",
        "--report",
        "/mnt/report",
    ];
    let Some(output) = within_a_full_file_system(1, &words) else {
        return;
    };
    let said = text(&output);
    assert!(has_run(&output), "{said}");
    assert!(
        said.contains("--report /mnt/report: ") && said.contains("No space left"),
        "{said}"
    );
}
