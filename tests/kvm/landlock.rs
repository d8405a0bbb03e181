//! A VM whose process Landlock bounds to the files that it names.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::json;
use tempfile::tempdir;

use crate::bare::{kernel, power_off, say};
use crate::served::{Served, eventually, lives};
use crate::whole::has_kvm;

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
    let run = |kernel: &str, rules: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_busway"))
            .args(["run", "-v", "--seccomp", "true", "--landlock", "true"])
            .args(["--memory", "size=64M", "--rng", "src=/dev/urandom"])
            .arg("--kernel")
            .arg(path(kernel))
            .arg("--disk")
            .arg(format!("path={}", path("disk").display()))
            .arg("--serial")
            .arg(format!("file={}", path("out/serial").display()))
            .arg("--report")
            .arg(path("out/report"))
            .args(rules)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    };
    for round in 0..2 {
        let output = run("kernel", &[]);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{round}: {stderr}");
        assert_eq!(fs::read_to_string(path("out/serial")).unwrap(), "here");
        assert!(path("out/report").exists(), "{stderr}");
        let told = format!("Landlock is in force, at level {}", level.min(9));
        assert!(stderr.contains(&told), "{stderr}");
        assert_eq!(stderr.matches("Landlock").count(), 1, "{stderr}");
    }
    // What is missing is told as ever, and not as a denial.
    let output = run("missing", &[]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(stderr.contains("No such file"), "{stderr}");
}

#[test]
fn rules_without_landlock_are_a_mistake_that_is_told() {
    let output = Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--kernel", "k", "--landlock-rules", "path=/srv"])
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
