//! What can be wrong with firmware and its variables.

use std::io;
use std::path::PathBuf;

use busway_host::files::no_room;

/// Firmware cannot be used. Each message is whole: what, which file, why, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum FirmwareError {
    /// no firmware is installed
    #[error(
        "no UEFI firmware for this kind of machine is installed (no descriptor in {looked}): install the \
         package `ovmf` (Debian, Ubuntu) or `edk2-ovmf` (Fedora, Arch), name a file with --firmware FILE, \
         or give a kernel with --kernel FILE"
    )]
    NotInstalled {
        /// The folders that were looked through.
        looked: String,
    },
    /// --firmware {path}: {source}
    #[error("cannot open firmware {}: {source}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// {path} is no firmware
    #[error(
        "{} is no UEFI firmware for a PC: {why}; packages have it as OVMF_CODE_4M.fd or OVMF.fd",
        path.display()
    )]
    NotFirmware {
        /// The file.
        path: PathBuf,
        /// What is there instead.
        why: String,
    },
    /// {path} holds variables and no code
    #[error(
        "{} is a store of firmware variables and has no code: give the code with --firmware (such as \
         OVMF_CODE_4M.fd), and the store beside it with vars=",
        path.display()
    )]
    IsVariables {
        /// The file.
        path: PathBuf,
    },
    /// {path} is a BIOS, and keeps no variables
    #[error(
        "{} is a BIOS, which keeps no variables: leave vars={} out, or give UEFI firmware",
        path.display(), vars.display()
    )]
    BiosVariables {
        /// The file.
        path: PathBuf,
        /// Where variables were to be kept.
        vars: PathBuf,
    },
    /// {path} is a BIOS, and starts no kernel
    #[error(
        "{} is a BIOS, which boots disks and starts no kernel: leave --kernel or --firmware out, or give UEFI firmware",
        path.display()
    )]
    BiosKernel {
        /// The file.
        path: PathBuf,
    },
    /// {path} needs system management mode
    #[error(
        "{} is a build for Secure Boot that needs system management mode, which Busway has not: use a build \
         without, such as {instead}",
        path.display()
    )]
    NeedsSmm {
        /// The file.
        path: PathBuf,
        /// A build that works.
        instead: String,
    },
    /// there is no template of variables for {path}
    #[error(
        "{} is code without variables, and no template of them is known for it: name a store that was made \
         for it with vars=FILE",
        path.display()
    )]
    NoTemplate {
        /// The firmware.
        path: PathBuf,
    },
    /// there is no store at {vars}, and none can be made
    #[error(
        "vars={}: there is no such file, and it cannot be made, for no template of variables is known for {}: \
         copy the one that came with the firmware",
        vars.display(), path.display()
    )]
    NoStore {
        /// Where the store was to be.
        vars: PathBuf,
        /// The firmware.
        path: PathBuf,
    },
    /// the store {vars} cannot be used
    #[error("vars={}: {what}: {source}{}", vars.display(), no_room(source))]
    Store {
        /// The store.
        vars: PathBuf,
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// {vars} is in use by {holder}
    #[error(
        "vars={} is in use by {holder}: each VM needs a store of its own, so name another file",
        vars.display()
    )]
    Locked {
        /// The store.
        vars: PathBuf,
        /// Who has it.
        holder: String,
    },
    /// {vars} is no store of variables
    #[error(
        "{} is no store of firmware variables: {why}; name another file, or remove it to have a new one made",
        vars.display()
    )]
    NotVariables {
        /// The file.
        vars: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// {vars} and {path} do not belong together
    #[error(
        "{} has {size} bytes, and the variables of {} have {expected}: the two were not made for each other",
        vars.display(), path.display()
    )]
    Mismatch {
        /// The store.
        vars: PathBuf,
        /// Its bytes.
        size: u64,
        /// The firmware.
        path: PathBuf,
        /// What would fit.
        expected: String,
    },
    /// {path} is too large
    #[error("{} and its variables have {size} bytes, more than the 16 MiB that there is room for", path.display())]
    TooLarge {
        /// The firmware.
        path: PathBuf,
        /// Bytes, with the variables.
        size: u64,
    },
    /// {path} cannot be started by firmware
    #[error(
        "kernel {} cannot be started by firmware: {why}; leave --firmware out, or give a bzImage with an EFI \
         stub (CONFIG_EFI_STUB)",
        path.display()
    )]
    Kernel {
        /// The kernel.
        path: PathBuf,
        /// Why.
        why: &'static str,
    },
    /// Firmware cannot be told of something.
    #[error(transparent)]
    Items(#[from] crate::devices::fw_cfg::ItemsError),
}
