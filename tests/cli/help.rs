use snapbox::file;

use crate::busway;

#[test]
fn the_short_help_names_the_commands() {
    busway()
        .arg("-h")
        .assert()
        .success()
        .stdout_eq(file!["snapshots/busway-h.txt"]);
}

#[test]
fn a_process_that_is_told_by_its_api_has_a_help_of_its_own_and_the_version_that_clients_look_for() {
    busway()
        .args(["--api-socket", "/run/vmm.sock", "-h"])
        .assert()
        .success()
        .stdout_eq(file!["snapshots/api-socket-h.txt"]);
    busway()
        .args(["--api-socket", "/run/vmm.sock", "--version"])
        .assert()
        .success()
        .stdout_eq("cloud-hypervisor v53.0.0\n");
}

#[test]
fn run_has_a_short_help_and_a_long_one() {
    busway()
        .args(["run", "-h"])
        .assert()
        .success()
        .stdout_eq(file!["snapshots/run-h.txt"]);
    for long in [["run", "--help"], ["help", "run"]] {
        busway()
            .args(long)
            .assert()
            .success()
            .stdout_eq(file!["snapshots/run-help.txt"]);
    }
}

#[test]
fn no_line_of_the_help_is_too_wide_for_its_page() {
    let output = busway().args(["run", "--help"]).output().unwrap();
    for line in String::from_utf8(output.stdout).unwrap().lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn nothing_said_is_bad_usage_with_the_help() {
    let assert = busway().assert().code(2).stdout_eq("");
    let stderr = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(stderr.contains("Usage: busway"), "{stderr}");
}

#[test]
fn the_version_is_the_packages() {
    busway()
        .arg("--version")
        .assert()
        .success()
        .stdout_eq(concat!("busway ", env!("CARGO_PKG_VERSION"), "\n"));
}

#[test]
fn every_shell_gets_its_completions() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = busway().args(["completions", shell]).output().unwrap();
        assert!(output.status.success(), "{shell}");
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains("initramfs"), "{shell}");
    }
}
