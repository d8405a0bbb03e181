//! What a person sees of `busway`: its help, its complaints, its exit status.

mod colour;
mod ctl;
mod dependencies;
mod errors;
mod help;
mod kubernetes;
mod package;
mod promises;

use std::path::PathBuf;

use snapbox::cmd::Command;

/// `busway`, with nothing of this terminal's in its way.
fn busway() -> Command {
    Command::new(env!("CARGO_BIN_EXE_busway"))
        .env_remove("COLUMNS")
        .env_remove("NO_COLOR")
        .stdin("")
}

/// A file with this text, and the folder that it lives in as long as that does.
fn file(name: &str, text: &str) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder for temporary files");
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("a file in it");
    (folder, path)
}
