use snapbox::str;

use crate::{busway, file};

/// What `busway run` with these flags complains of, which is bad usage.
fn refused(flags: &[&str]) -> String {
    let output = busway().arg("run").args(flags).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{flags:?}");
    assert!(output.stdout.is_empty());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn a_guest_needs_a_kernel() {
    busway().arg("run").assert().code(2).stderr_eq(str![[r#"
busway: error: nothing to boot: give a kernel with --kernel FILE (a bzImage, or an ELF file with a PVH entry), or a disk that firmware can boot, with --disk path=FILE or --device ADDRESS

"#]]);
}

#[test]
fn an_unknown_flag_is_named_with_the_nearest() {
    busway()
        .args(["run", "--memroy", "size=1G"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: unexpected argument '--memroy' found

  tip: a similar argument exists: '--memory'

Usage: busway run --memory <KEY=VALUE,…>

For more information, try '--help'.

"#]]);
}

#[test]
fn an_unknown_word_of_the_file_is_named_with_its_line_and_the_nearest() {
    let (folder, _path) = file(
        "vm.toml",
        "kernel = \"vmlinuz\"\n\n[memroy]\nsize = \"1G\"\n",
    );
    busway()
        .args(["run", "--config", "vm.toml"])
        .current_dir(folder.path())
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: vm.toml: unknown key `memroy`, line 3; did you mean `memory`? (there are: kernel, firmware, initramfs, cmdline, cpus, memory, memory-zone, numa, place, disk, net, fs, pmem, generic-vhost-user, vsock, balloon, watchdog, pvpanic, tpm, rng, serial, console, device, platform, landlock, landlock-rules, jail, user)

"#]]);
}

#[test]
fn an_unknown_key_of_a_flag_is_named_with_the_nearest() {
    busway()
        .args(["run", "--disk", "path=a.raw,readolny=on"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: --disk: unknown key `readolny`; did you mean `readonly`? (there are: path, fd, vhost_user, socket, image_type, backing_files, readonly, direct, writeback, serial, num_queues, queue_size, queue_affinity, bw_size, bw_one_time_burst, bw_refill_time, ops_size, ops_one_time_burst, ops_refill_time, id, pci_segment, pci_device_id, boot_index)

"#]]);
}

#[test]
fn what_a_later_version_has_is_not_taken_silently() {
    for flags in [
        ["--firmware", "OVMF.fd"],
        ["--device", "01:00.0,iommu=on"],
        ["--net", "tap=a,host_mac=52:54:00:12:34:56"],
    ] {
        refused(&flags);
    }
}

#[test]
fn a_bad_size_says_how_to_write_one() {
    busway()
        .args(["run", "--memory", "size=4GB"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: --memory size=4GB: size: `4GB` is not a size: write a whole number of bytes, or one with K, M, G or T after it

"#]]);
    assert!(refused(&["--kernel", "k", "--memory", "size=4"]).contains("16M at least"));
}

#[test]
fn a_device_given_twice_is_refused_by_both_names() {
    busway()
        .args(["run", "--kernel", "k", "--device", "01:00.0,id=nvme"])
        .args(["--device", "path=/sys/bus/pci/devices/0000:01:00.0/"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: --device id=nvme and --device no. 2 have the same host device, `0000:01:00.0`: a device can be given once

"#]]);
}

#[test]
fn what_is_no_device_says_how_to_write_one() {
    busway()
        .args(["run", "--kernel", "k", "--device", "nvme0"])
        .assert()
        .code(2)
        .stderr_eq(str![[r#"
busway: error: --device nvme0: `nvme0` is neither a PCI address (0000:01:00.0) nor a mediated device's UUID (bd8d9d2b-5a5f-4f5a-a211-f591514ba1f3)

"#]]);
}

#[test]
fn a_file_that_is_not_there_is_named() {
    let complaint = refused(&["--config", "/nowhere/vm.toml"]);
    assert!(
        complaint.starts_with("busway: error: cannot read --config /nowhere/vm.toml: No such file"),
        "{complaint}"
    );
}

#[test]
fn a_report_that_cannot_be_written_is_known_before_the_guest_starts() {
    let complaint = refused(&["--kernel", "k", "--report", "/nowhere/report.json"]);
    assert!(complaint.contains("--report /nowhere/report.json: /nowhere: No such file"));
}

#[test]
fn errors_have_no_colours_where_nobody_sees_them() {
    assert!(!refused(&["--memory", "size=x"]).contains('\x1b'));
    assert!(!refused(&["--memroy", "size=x"]).contains('\x1b'));
}

#[test]
fn the_end_does_not_wait_for_a_pipe_that_nobody_reads() {
    use std::io::{Read as _, Write as _};
    use std::process::{Command, Stdio};
    use std::sync::mpsc::{RecvTimeoutError, channel};
    use std::thread;
    use std::time::Duration;

    let (mut reader, mut writer) = std::io::pipe().unwrap();
    let stderr = writer.try_clone().unwrap();
    // Until there is no more room.
    let (wrote, progress) = channel();
    let filling = thread::spawn(
        move || {
            while writer.write_all(b"\n").is_ok() && wrote.send(()).is_ok() {}
        },
    );
    while progress.recv_timeout(Duration::from_millis(300)) != Err(RecvTimeoutError::Timeout) {}
    let mut busway = Command::new(env!("CARGO_BIN_EXE_busway"))
        .arg("run")
        .stdin(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap();
    let (ended, end) = channel();
    let pid = busway.id();
    thread::spawn(move || ended.send(busway.wait().unwrap().code()));
    let code = end.recv_timeout(Duration::from_secs(30));
    if code.is_err() {
        let _gone = Command::new("kill").arg(pid.to_string()).status();
    }
    assert_eq!(code, Ok(Some(2)));
    drop(progress);
    // Lets the filling thread end.
    let mut some = [0; 4096];
    assert!(reader.read(&mut some).unwrap() > 0);
    filling.join().unwrap();
}

#[test]
fn a_log_and_a_report_go_to_no_link_that_somebody_placed() {
    let (folder, _path) = file("victim", "secret");
    std::os::unix::fs::symlink("victim", folder.path().join("link")).unwrap();
    for flag in ["--log-file", "--report"] {
        let output = busway()
            .args(["run", "--kernel", "vmlinuz", flag, "link"])
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{flag}");
        let said = String::from_utf8(output.stderr).unwrap();
        let expected = format!("busway: error: {flag} link: it is a symbolic link");
        assert!(said.starts_with(&expected), "{said}");
    }
    let text = std::fs::read_to_string(folder.path().join("victim")).unwrap();
    assert_eq!(text, "secret");
}

#[test]
fn a_log_is_appended_to_what_is_there() {
    let (folder, path) = file("log", "before\n");
    busway()
        .args(["run", "--config", "absent.toml", "--log-file", "log"])
        .current_dir(folder.path())
        .assert()
        .code(2);
    assert!(
        std::fs::read_to_string(path)
            .unwrap()
            .starts_with("before\n")
    );
}

#[test]
fn an_error_does_not_steer_the_terminal() {
    let said = refused(&["--config", "a\x1b[2J\rb.toml"]);
    assert!(said.contains("a\u{fffd}[2J\u{fffd}b.toml"), "{said:?}");
}

#[test]
fn a_result_that_cannot_be_written_is_a_failure_that_says_what_and_why() {
    for (arguments, what) in [
        (["completions", "bash"], "the script"),
        (["doctor", "--json"], "the result"),
    ] {
        let full = std::fs::File::create("/dev/full").unwrap();
        let output = std::process::Command::new(env!("CARGO_BIN_EXE_busway"))
            .args(arguments)
            .stdout(full)
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert_eq!(
            String::from_utf8(output.stderr).unwrap(),
            format!(
                "busway: error: cannot write {what}\n  because: No space left on device (os error 28)\n"
            )
        );
    }
}
