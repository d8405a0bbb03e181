//! Where a guest's serial port leads, within all walls: a file that begins anew when it is full, and a socket's client.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Output, Stdio};

use tempfile::{TempDir, tempdir};

use crate::bare::{kernel, power_off, say};
use crate::served::eventually;
use crate::whole::has_kvm;

/// `mov dx, 0x3f8; mov ecx, count; mov esi, 1 MiB; rep outsb`
fn pour(count: u32) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb9];
    code.extend(count.to_le_bytes());
    code.extend([0xbe, 0, 0, 0x10, 0, 0xfc, 0xf3, 0x6e]);
    code
}

/// `again: mov dx, 0x3fd; in al, dx; test al, 1; jz again; mov dx, 0x3f8; in al, dx; cmp al, byte; jne again`
fn wait_for(byte: u8) -> Vec<u8> {
    let ready = [0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xf7];
    let taken = [0x66, 0xba, 0xf8, 0x03, 0xec, 0x3c, byte, 0x75, 0xee];
    [ready, taken].concat()
}

/// A guest that runs, with its serial port at `serial`, where `{}` is the folder.
fn start(folder: &TempDir, code: &[Vec<u8>], serial: &str) -> Child {
    let path = folder.path().display().to_string();
    fs::write(folder.path().join("kernel"), kernel(&code.concat())).unwrap();
    Command::new(env!("CARGO_BIN_EXE_busway"))
        .args(["run", "--memory", "size=64M", "--kernel"])
        .arg(folder.path().join("kernel"))
        .args(["--serial", &serial.replace("{}", &path)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn has_ended(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{}: {said}", output.status);
    said
}

#[test]
fn a_file_for_a_console_begins_anew_when_it_is_full_and_the_one_before_is_kept() {
    if !has_kvm() {
        return;
    }
    let folder = tempdir().unwrap();
    let file = |name: &str| folder.path().join("out").join(name);
    fs::create_dir(folder.path().join("out")).unwrap();
    let pour = || {
        let code = [pour(100_000), power_off()];
        let child = start(&folder, &code, "file={}/out/serial,size=64K");
        has_ended(&child.wait_with_output().unwrap())
    };
    let length = |name: &str| fs::metadata(file(name)).map(|there| there.len());
    // What a run before has left is taken over, and what it has kept goes.
    for _ in 0..2 {
        let said = pour();
        let [now, before] = ["serial", "serial.1"].map(|name| length(name).unwrap());
        assert_eq!(now + before, 100_000, "{now} and {before}: {said}");
        assert!(now.max(before) <= 64 << 10, "{now} and {before}: {said}");
    }
    // What is in the way is nobody's to remove: the file begins anew without the one before.
    fs::remove_file(file("serial.1")).unwrap();
    fs::create_dir(file("serial.1")).unwrap();
    let said = pour();
    assert!(said.contains("begins anew"), "{said}");
    assert!(length("serial").unwrap() <= 64 << 10, "{said}");
}

#[test]
fn a_console_at_a_socket_hears_its_client_and_is_heard_and_takes_the_socket_away() {
    if !has_kvm() {
        return;
    }
    let folder = tempdir().unwrap();
    let socket = folder.path().join("serial");
    let code = [wait_for(b'x'), say("heard"), power_off()];
    let child = start(&folder, &code, "socket={}/serial");
    eventually("the socket listens", || {
        UnixStream::connect(&socket).is_ok()
    });
    // There is one client at a time: that of the look above has to be gone.
    let mut said = String::new();
    eventually("the guest hears", || {
        let mut client = UnixStream::connect(&socket).unwrap();
        client.write_all(b"yx").is_ok()
            && client.read_to_string(&mut said).is_ok()
            && !said.is_empty()
    });
    assert_eq!(said, "heard");
    has_ended(&child.wait_with_output().unwrap());
    assert!(!socket.exists());
}
