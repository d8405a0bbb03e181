//! What a VM opens while its guest runs, by a trace of the calls. The lab has the same with host devices.

use std::fs;
use std::process::{Command, Stdio};

use tempfile::tempdir;

use crate::attentive::attentive;
use crate::bare::kernel;
use crate::opened::{STRACE, Table, since_the_guest_began};
use crate::served::eventually;
use crate::whole::has_kvm;

/// Whether strace(1) can be run; where it cannot, why is said on standard error.
pub(crate) fn has_strace() -> bool {
    let version = Command::new("strace").arg("--version").output();
    if let Err(error) = &version {
        eprintln!("skipped: cannot run strace (Debian package strace): {error}");
    }
    version.is_ok()
}

#[test]
fn while_a_guest_runs_nothing_is_opened_but_what_is_listed() {
    if !has_kvm() || !has_strace() {
        return;
    }
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    for name in ["vm", "images"] {
        fs::create_dir(path(name)).unwrap();
    }
    for name in ["images/first", "images/more"] {
        fs::write(path(name), [0; 64 << 10]).unwrap();
    }
    fs::write(path("kernel"), kernel(&attentive())).unwrap();
    let child = Command::new(STRACE[0])
        .args(&STRACE[1..])
        .arg(path("trace"))
        .arg(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--memory", "size=64M", "--cpus", "boot=2"])
        .args(["--kernel", &path("kernel")])
        .args(["--disk", &format!("path={}", path("images/first"))])
        .args(["--vsock", &format!("cid=3,socket={}", path("vm/vsock"))])
        .args(["--serial", &format!("file={}", path("vm/serial"))])
        .args(["--api-socket", &path("vm/api")])
        .args(["--report", &path("vm/report")])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let ctl = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
        command.args(["ctl", "--api-socket", &path("vm/api")]);
        let output = command.args(arguments).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
            false => Err(said),
        }
    };
    eventually("the guest runs", || {
        ctl(&["info"]).is_ok_and(|said| said.contains("running"))
    });
    for arguments in [
        &["info"][..],
        &["devices"],
        &["top", "--once"],
        &["add-disk", &path("images/more"), "--id", "more"],
        &["pause"],
        &["resume"],
        &["remove-device", "more"],
        &["reboot"],
        &["power-button"],
    ] {
        let done = ctl(arguments);
        assert!(done.is_ok(), "{arguments:?}: {done:?}");
    }
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{said}");
    // strace(1) is a process of its own, and is done when it has seen the end.
    let trace = || String::from_utf8_lossy(&fs::read(path("trace")).unwrap()).into_owned();
    eventually("the trace's end", || trace().contains("+++ exited with 0"));
    let asked = since_the_guest_began(&trace()).expect("the guest began");
    let own = ["vm/*", "images/*"].map(path);
    let own = own.each_ref().map(|pattern| &**pattern);
    let table = Table::read();
    let added = asked.iter().any(|one| one.path == path("images/more"));
    assert!(added, "{asked:#?}");
    let other: Vec<_> = asked
        .iter()
        .filter(|one| !table.has(&one.path, &own))
        .collect();
    assert!(
        other.is_empty(),
        "docs/security.md does not list {other:#?}"
    );
}
