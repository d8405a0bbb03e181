//! The swtpm that the distribution packages, unmodified.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::{BASE, Driver, Tpm, failure};

/// `TPM2_Startup` of `TPM_SU_CLEAR`. TPM 2.0 Library, Part 3, §9.3
const STARTUP: [u8; 12] = [0x80, 1, 0, 0, 0, 12, 0, 0, 1, 0x44, 0, 0];
const SUCCESS: [u8; 4] = [0; 4];
/// `TPM_RC_INITIALIZE`
const NOT_STARTED: [u8; 4] = [0, 0, 1, 0];
const SHA256: [u8; 2] = [0, 0x0b];

/// `TPM2_PCR_Read` of PCR 0 in the bank of SHA-256. §22.4
fn pcr_read() -> Vec<u8> {
    let mut command = vec![0x80, 1, 0, 0, 0, 20, 0, 0, 1, 0x7e, 0, 0, 0, 1];
    command.extend(SHA256);
    command.extend([3, 1, 0, 0]);
    command
}

/// `TPM2_PCR_Extend` of PCR 0 by a digest, with no password. §22.2
fn pcr_extend(digest: [u8; 32]) -> Vec<u8> {
    let mut command = vec![0x80, 2, 0, 0, 0, 0, 0, 0, 1, 0x82, 0, 0, 0, 0];
    // TPM_RS_PW, without a nonce, attributes and a password.
    command.extend([0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0]);
    command.extend([0, 0, 0, 1]);
    command.extend(SHA256);
    command.extend(digest);
    let size = u32::try_from(command.len()).unwrap();
    command[2..6].copy_from_slice(&size.to_be_bytes());
    command
}

struct Swtpm(Child);

impl Swtpm {
    fn start(folder: &Path, socket: &Path) -> Self {
        let _old = std::fs::remove_file(socket);
        let child = Command::new("swtpm")
            .args(["socket", "--tpm2", "--tpmstate"])
            .arg(format!("dir={}", folder.display()))
            .arg("--ctrl")
            .arg(format!("type=unixio,path={}", socket.display()))
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need the package swtpm: apt-get install swtpm");
        let start = Instant::now();
        while !socket.exists() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "swtpm makes no socket"
            );
            std::thread::yield_now();
        }
        Self(child)
    }
}

impl Drop for Swtpm {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[test]
fn debians_swtpm_measures_begins_anew_with_the_guest_and_is_missed_when_it_is_killed() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("s");
    let swtpm = Swtpm::start(folder.path(), &socket);
    let tpm = Tpm::open(&socket, BASE).unwrap();
    let driver = Driver::of(&tpm);
    let code = |command: &[u8]| driver.ask(command)[6..10].to_vec();
    let pcr = || {
        let response = driver.ask(&pcr_read());
        assert_eq!(response[6..10], SUCCESS, "{response:x?}");
        response[response.len() - 32..].to_vec()
    };
    for _ in 0..2 {
        assert_eq!(code(&pcr_read()), NOT_STARTED);
        assert_eq!(code(&STARTUP), SUCCESS);
        assert_eq!(pcr(), [0; 32]);
        assert_eq!(code(&pcr_extend([7; 32])), SUCCESS);
        let extended = pcr();
        assert_ne!(extended, [0; 32]);
        assert_eq!(pcr(), extended);
        tpm.reset();
    }
    assert_eq!(code(&STARTUP), SUCCESS);
    drop(swtpm);
    assert_eq!(driver.ask(&pcr_read()), failure());
    assert!(driver.has_failed());
    let _another = Swtpm::start(folder.path(), &socket);
    assert_eq!(driver.ask(&pcr_read()), failure());
    tpm.reset();
    assert_eq!(code(&STARTUP), SUCCESS);
    assert_eq!(pcr(), [0; 32]);
    drop(tpm);
    // The same process serves the next VM.
    let tpm = Tpm::open(&socket, BASE).unwrap();
    let driver = Driver::of(&tpm);
    assert_eq!(driver.ask(&STARTUP)[6..10], SUCCESS);
}
