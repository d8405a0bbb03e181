//! A VM whose process Landlock bounds to the files that it names.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

use crate::bare::{kernel, power_off, say};
use crate::served::{Served, eventually, lives};
use crate::whole::{Finished, Run, has_kvm, wait_for_the_button};

/// The level of this kernel's Landlock; nothing, said on standard error, where it has none.
fn level() -> Option<i32> {
    // SAFETY: the call is given no memory, and a flag that asks for the number. landlock_create_ruleset(2)
    let level = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    let level = i32::try_from(level).ok().filter(|level| *level > 0);
    if level.is_none() {
        eprintln!("skipped: this kernel has no Landlock");
    }
    level
}

#[test]
fn a_guest_runs_under_landlock_with_all_that_its_flags_name() {
    let (true, Some(level)) = (has_kvm(), level()) else {
        return;
    };
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("out")).unwrap();
    fs::write(path("kernel"), kernel(&[say("here"), power_off()].concat())).unwrap();
    fs::write(path("disk"), [0; 64 << 10]).unwrap();
    let run = |kernel: &str, more: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_busway"))
            .args([
                "run",
                "-v",
                "--memory",
                "size=64M",
                "--rng",
                "src=/dev/urandom",
            ])
            .arg("--kernel")
            .arg(path(kernel))
            .arg("--disk")
            .arg(format!("path={}", path("disk").display()))
            .arg("--serial")
            .arg(format!("file={}", path("out/serial").display()))
            .arg("--report")
            .arg(path("out/report"))
            .args(more)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    let report = || -> Value {
        let text = fs::read(path("out/report")).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    // By default, and where it is asked for.
    for flags in [&[][..], &["--landlock", "true"], &["--landlock"]] {
        let output = run("kernel", flags);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{flags:?}: {stderr}");
        assert_eq!(fs::read_to_string(path("out/serial")).unwrap(), "here");
        let walls = json!({ "seccomp": "true", "landlock": level.min(9), "lacking": null, "jail": false, "user": null });
        assert_eq!(report()["walls"], walls, "{stderr}");
        let told = format!("Landlock is in force, at level {}", level.min(9));
        assert!(stderr.contains(&told), "{stderr}");
        assert_eq!(stderr.matches("Landlock is").count(), 1, "{stderr}");
    }
    let output = run("kernel", &["--landlock", "false"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert!(!stderr.contains("Landlock is"), "{stderr}");
    assert_eq!(report()["walls"]["landlock"], Value::Null);
    // What is missing is told as ever, and not as a denial.
    let output = run("missing", &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("No such file"), "{stderr}");
}

#[test]
fn rules_without_landlock_are_a_mistake_that_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--kernel", "k", "--landlock", "false"])
        .args(["--landlock-rules", "path=/srv"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("give --landlock true"), "{stderr}");
}

#[test]
fn a_vm_made_over_the_api_restarts_under_landlock_and_gets_only_what_it_named() {
    let Some(_) = level() else { return };
    let Some(served) = Served::start(&["-v"]) else {
        return;
    };
    let mut vm = served.vm(&lives("boot "));
    // Not in the folder where the socket is made, which is in reach as a whole.
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["allowed", "elsewhere"] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("disk"), [0; 4096]).unwrap();
    }
    vm["landlock_enable"] = json!(true);
    vm["landlock_rules"] = json!([{ "path": path("allowed"), "access": "rw" }]);
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    eventually("its word", || served.said() == "boot ");
    for round in 2..5 {
        assert_eq!(served.put("vm.reboot"), 204);
        eventually("its word again", || served.said() == "boot ".repeat(round));
    }
    let (_, info) = served.ask("GET", "vm.info", None);
    assert_eq!(info["config"]["landlock_enable"], true);
    assert_eq!(info["config"]["landlock_rules"], vm["landlock_rules"]);
    let add = |name: &str| {
        let disk = json!({ "path": path(name).join("disk"), "id": name });
        served.ask("PUT", "vm.add-disk", Some(&disk))
    };
    assert_eq!(add("allowed").0, 200);
    let (status, said) = add("elsewhere");
    assert!(status >= 400, "{status}");
    let said = said.to_string();
    assert!(
        said.contains("Landlock") && said.contains("--landlock-rules"),
        "{said}"
    );
    // It lives on, and its own threads are still counted.
    assert_eq!(served.ask("GET", "vm.activity", None).0, 200);
    assert_eq!(served.put("vm.pause"), 204);
    assert_eq!(served.put("vm.resume"), 204);
    assert_eq!(served.put("vmm.shutdown"), 200);
    // Its socket is gone, which this looks at, too.
    let (status, errors) = served.ended();
    assert_eq!(status.code(), Some(0), "{errors}");
    assert_eq!(
        errors.matches("is in force, at level").count(),
        1,
        "{errors}"
    );
}

#[test]
fn a_process_that_was_started_with_landlock_has_it_whatever_its_vm_says_of_that() {
    let Some(_) = level() else { return };
    let folder = folders();
    let path = |name: &str| folder.path().join(name);
    let rule = format!("path={},access=rw", path("images").display());
    let flags = ["-v", "--landlock", "true", "--landlock-rules", &rule];
    let Some(served) = Served::start(&flags) else {
        return;
    };
    let vm = served.vm(&lives("boot "));
    assert_eq!(served.ask("PUT", "vm.create", Some(&vm)).0, 204);
    assert_eq!(served.put("vm.boot"), 204);
    eventually("its word", || served.said() == "boot ");
    let (_, info) = served.ask("GET", "vm.info", None);
    assert_eq!(info["config"]["landlock_enable"], true);
    let add = |name: &str| {
        let disk = json!({ "path": path(name) });
        served.ask("PUT", "vm.add-disk", Some(&disk)).0
    };
    assert_eq!(add("images/more"), 200);
    assert!(add("elsewhere/disk") >= 400);
    assert_eq!(served.put("vmm.shutdown"), 200);
    assert_eq!(served.ended().0.code(), Some(0));
}

/// A folder for what a VM has, one with images, and one that is nobody's.
fn folders() -> TempDir {
    let folder = tempdir().unwrap();
    for name in ["vm", "images", "elsewhere"] {
        fs::create_dir(folder.path().join(name)).unwrap();
    }
    for name in ["images/first", "images/more", "elsewhere/disk"] {
        fs::write(folder.path().join(name), [0; 64 << 10]).unwrap();
    }
    folder
}

#[test]
fn behind_the_default_walls_an_image_beside_another_is_added_by_its_path_and_no_other_file() {
    let Some(_) = level() else { return };
    let folder = folders();
    let path = |name: &str| folder.path().join(name);
    let mut run = Run::new(&[wait_for_the_button(), power_off()].concat());
    run.command
        .arg("--disk")
        .arg(format!("path={}", path("images/first").display()))
        .arg("--api-socket")
        .arg(path("vm/api"));
    let Some((child, _folder)) = run.until("ready") else {
        return;
    };
    let ctl = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_busway"));
        command.arg("ctl").args(arguments);
        let output = command.arg("--api-socket").arg(path("vm/api")).output();
        let output = output.unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.success(), stderr)
    };
    let add = |name: &str| ctl(&["add-disk", path(name).to_str().unwrap()]);
    let (added, stderr) = add("images/more");
    assert!(added, "{stderr}");
    for name in ["elsewhere/disk", "vm/../elsewhere/disk"] {
        let (added, stderr) = add(name);
        assert!(!added);
        assert!(stderr.contains("--landlock-rules"), "{stderr}");
    }
    // It is opened by who asks, whose file it is.
    let elsewhere = path("elsewhere/disk");
    let elsewhere = elsewhere.to_str().unwrap();
    let (added, stderr) = ctl(&["add-disk", "--send", elsewhere]);
    assert!(added, "{stderr}");
    assert!(ctl(&["power-button"]).0);
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    // Its socket and that one's lock are gone, or would be in the way of the next.
    assert!(!path("vm/api").exists());
}

#[test]
fn behind_the_default_walls_who_has_an_image_is_still_named() {
    let Some(_) = level() else { return };
    let folder = folders();
    let disk = format!("path={}", folder.path().join("images/first").display());
    let start = || {
        let mut run = Run::new(&[wait_for_the_button(), power_off()].concat());
        run.command.args(["--disk", &disk]);
        run
    };
    let Some((mut child, _folder)) = start().until("ready") else {
        return;
    };
    let Some(Finished { output, .. }) = start().finish() else {
        return;
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    let holder = format!("process {} (busway)", child.id());
    assert!(stderr.contains(&holder), "{stderr}");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn what_a_qcow2_image_lies_on_is_in_reach_wherever_it_is() {
    let Some(_) = level() else { return };
    let folder = folders();
    let path = |name: &str| folder.path().join(name);
    let image = |name: &str, below: &str| fs::write(path(name), qcow2(&path(below))).unwrap();
    image("images/top", "elsewhere/disk");
    let mut run = Run::new(&[say("here"), power_off()].concat());
    let disk = path("images/top");
    let disk = format!("path={},image_type=qcow2", disk.display());
    run.command
        .args(["--disk", &format!("{disk},backing_files=on")]);
    let Some(Finished { output, .. }) = run.finish() else {
        return;
    };
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
}

/// An empty image of 64 KiB and clusters of as many, which lies on a raw one. QEMU's docs/interop/qcow2.rst
pub(crate) fn qcow2(below: &Path) -> Vec<u8> {
    const CLUSTER: u64 = 64 << 10;
    let name = below.to_str().unwrap().as_bytes();
    let mut image = b"QFI\xfb".to_vec();
    let put32 = |image: &mut Vec<u8>, number: u32| image.extend(number.to_be_bytes());
    put32(&mut image, 3);
    image.extend(512_u64.to_be_bytes());
    put32(&mut image, name.len() as u32);
    put32(&mut image, 16);
    image.extend(CLUSTER.to_be_bytes());
    // No encryption; a first-level table of one entry; one cluster of the table of reference counts; no snapshots.
    put32(&mut image, 0);
    put32(&mut image, 1);
    image.extend((3 * CLUSTER).to_be_bytes());
    image.extend(CLUSTER.to_be_bytes());
    put32(&mut image, 1);
    put32(&mut image, 0);
    image.extend([0; 8 + 3 * 8]);
    // Counts of 16 bits, and the header's length.
    put32(&mut image, 4);
    put32(&mut image, 104);
    // The extension with the backing file's format, and the end of extensions.
    put32(&mut image, 0xe279_2aca);
    put32(&mut image, 3);
    image.extend(b"raw\0\0\0\0\0");
    image.extend([0; 8]);
    image.resize(512, 0);
    image.extend(name);
    image.resize(CLUSTER as usize, 0);
    // The table of reference counts, a block of them for the four clusters that there are, and the first-level table.
    image.extend((2 * CLUSTER).to_be_bytes());
    image.resize(2 * CLUSTER as usize, 0);
    image.extend([0, 1].repeat(4));
    image.resize(4 * CLUSTER as usize, 0);
    image
}
