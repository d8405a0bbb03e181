//! `busway run --tpm` as a whole, with Debian's swtpm.

use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::bare::{power_off, say};
use crate::whole::{Run, has_kvm};

const REGISTERS: u32 = 0xfed4_0000;
const LOC_CTRL: u32 = REGISTERS + 0x08;
const CTRL_REQ: u32 = REGISTERS + 0x40;
const CTRL_START: u32 = REGISTERS + 0x4c;
const BUFFER: u32 = REGISTERS + 0x80;
/// The response's code.
const CODE: u32 = BUFFER + 6;

/// `mov eax, value; mov [address], eax`
fn store(address: u32, value: [u8; 4]) -> Vec<u8> {
    [&[0xb8][..], &value, &[0xa3], &address.to_le_bytes()].concat()
}

/// `mov eax, [address]; test eax, eax`
fn load(address: u32) -> Vec<u8> {
    [&[0xa1][..], &address.to_le_bytes(), &[0x85, 0xc0]].concat()
}

/// Has the TPM begin (`TPM2_Startup`), waits for the response, and says whether it was done.
fn guest() -> Vec<u8> {
    let one = [1, 0, 0, 0];
    let started = say("started");
    [
        store(LOC_CTRL, one),
        store(CTRL_REQ, one),
        store(BUFFER, [0x80, 1, 0, 0]),
        store(BUFFER + 4, [0, 12, 0, 0]),
        store(BUFFER + 8, [1, 0x44, 0, 0]),
        store(CTRL_START, one),
        load(CTRL_START),
        // jnz to the load
        vec![0x75, 0xf7],
        load(CODE),
        // jnz over what is said
        vec![0x75, started.len() as u8],
        started,
        power_off(),
    ]
    .concat()
}

struct Swtpm(Child);

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn a_guest_begins_with_its_tpm_behind_the_walls() {
    if !has_kvm() {
        return;
    }
    let mut run = Run::new(&guest());
    let (folder, socket) = (run.folder.path(), run.folder.path().join("swtpm"));
    let swtpm = Command::new("swtpm")
        .args(["socket", "--tpm2", "--tpmstate"])
        .arg(format!("dir={}", folder.display()))
        .arg("--ctrl")
        .arg(format!("type=unixio,path={}", socket.display()))
        .stdin(Stdio::null())
        .spawn()
        .expect("this test needs the package swtpm: apt-get install swtpm");
    let _swtpm = Swtpm(swtpm);
    let start = Instant::now();
    while !socket.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "swtpm makes no socket"
        );
        thread::yield_now();
    }
    run.command
        .arg("--tpm")
        .arg(format!("socket={}", socket.display()));
    // Two VMs have it one after the other, each with it switched on anew.
    for _ in 0..2 {
        let output = run.command.output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{errors}");
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "started",
            "{errors}"
        );
    }
}
