//! The workspace's programs, as the emulated host and its guests run them.

use std::collections::BTreeMap;
use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// The cargo profile to build with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// Optimised, with every overflow and debug assertion checked: for tests.
    Lab,
    /// As users have it: for measuring.
    Release,
}

/// Builds `busway`, and returns its path; or that of one built already, which `BUSWAY_LAB_PROGRAM` names,
/// such as a package's.
pub fn build_busway(profile: Profile) -> Result<PathBuf> {
    if let Some(path) = env::var_os("BUSWAY_LAB_PROGRAM") {
        return Ok(path.into());
    }
    build_static("busway", "busway", profile)
}

/// Builds `lab-io`, which writes and verifies whole drives, and returns its path.
pub fn build_lab_io() -> Result<PathBuf> {
    build_static("busway-lab", "lab-io", Profile::Lab)
}

/// Builds `lab-pci`, which drives devices from a guest's user space, and returns its path.
pub fn build_lab_pci() -> Result<PathBuf> {
    build_static("busway-lab", "lab-pci", Profile::Lab)
}

/// Builds the tests of a target of `busway`'s, and returns the path of the program that they are. It looks for `busway` where
/// [`build_busway`] builds it for that profile.
pub fn build_tests(target: &str) -> Result<PathBuf> {
    build(
        "busway",
        ["test", "--no-run", "--test"],
        target,
        Profile::Lab,
    )
}

/// Builds a program of the workspace, static so that it runs whatever C library is there, and
/// returns its path. A process builds each program once.
pub fn build_static(package: &str, program: &str, profile: Profile) -> Result<PathBuf> {
    type Built = BTreeMap<(String, Profile), PathBuf>;
    static BUILT: Mutex<Built> = Mutex::new(Built::new());
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let key = (program.to_owned(), profile);
    if let Some(path) = built.get(&key) {
        return Ok(path.clone());
    }
    let path = build(package, ["build", "--quiet", "--bin"], program, profile)?;
    built.insert(key, path.clone());
    Ok(path)
}

fn build(package: &str, how: [&str; 3], program: &str, profile: Profile) -> Result<PathBuf> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    let profile = match profile {
        Profile::Lab => "lab",
        Profile::Release => "release",
    };
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."))
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static",
        )
        .args(how)
        .args([program, "--package", package])
        .args(["--target", TARGET, "--profile", profile])
        .args(["--message-format", "json-render-diagnostics"])
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("cargo could not build {program}");
    }
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["target"]["name"] == program)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
        .with_context(|| format!("cargo built no program named {program}"))
}
